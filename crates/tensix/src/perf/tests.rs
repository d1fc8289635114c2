use super::pass::estimate_at;
use super::*;
use crate::kernels::Banks;

fn sizes(rows: u32, cols: u32, panel_rows: u32, panel_cols: u32, chunk: u32) -> LinearPlan {
    let formats = [Format::F32, Format::Bf16];
    let like = Matmul::smallest(formats, false, Epilogue::None, Format::F32, Banks(12));
    let kernel = Matmul { rows, cols, panel_rows, panel_cols, chunk, partial: true, ..like };
    LinearPlan { kernel, spread: None }
}

/// By hand: 2x2 tiles over 64 along the inputs, on one core of one.
#[test]
fn a_block_is_counted_as_by_hand() {
    let t = LinearTiles { rows: 2, cols: 2, depth: 64, parts: 1 };
    let w = linear(1, t, &sizes(2, 2, 2, 2, 64));
    assert_eq!(w.matrix, 4 * 64 * 64);
    assert_eq!(w.unpack, 64 * (2 * 4096 + 4 * 2048) / 64);
    assert_eq!((w.unpacks, w.packs, w.sends, w.fetches), (64 * 6, 4, 4, 64 * 4));
    assert_eq!(w.received, 64 * (2 * 4096 + 2 * 2048));
    assert_eq!((w.read, w.written), (w.received, 4 * 4096));
    let optimistic = Machine::new(1, Rates { dram_read: 32.0, ..Rates::OPTIMISTIC });
    let (unit, seconds) = optimistic.bound(&w);
    assert_eq!((unit, (seconds * 1e9) as u64), ("DRAM", 64 * 12288 / 32 + 4 * 4096 / 288));
    // An unpacker waits 4 cycles six times a place: 280 cycles for 256 of products.
    let realistic = Machine::new(1, Rates { receive: 1e9, dram_read: 1e9, ..Rates::REALISTIC });
    let unpack = realistic.units(&w)[2].1 * 0.9e9;
    assert_eq!((unpack / 64.0).round() as u64, 2 * 64 + 4 * 32 + 6 * 4);
    // In chunks of 16, sums are stored four times and filled three.
    let chunked = linear(1, t, &sizes(2, 2, 2, 2, 16));
    assert_eq!(chunked.packs, 4 * w.packs);
    assert_eq!(chunked.unpack, w.unpack + 3 * (4 * 4096 / 64 + SWITCH_CYCLES));
}

#[test]
fn panels_cut_memory_traffic_where_there_are_rows() {
    let m = Machine::realistic(64);
    let t = LinearTiles { rows: 26, cols: 1024, depth: 64, parts: 1 };
    let block = linear(64, t, &sizes(2, 2, 2, 2, 8));
    let best = best_linear(&m, t, sizes(1, 1, 1, 1, 8).kernel, 1_100_000, 16_000).unwrap();
    let panel = linear(64, t, &best);
    assert_eq!(m.bound(&block).0, "DRAM");
    assert!(block.read > 4 * panel.read, "{block:?} {panel:?} {best:?}");
    let k = best.kernel;
    assert!(k.l1_bytes() <= 1_100_000);
    assert!(k.panel_rows.is_multiple_of(k.rows) && 26usize.is_multiple_of(k.panel_rows as usize));
}

/// By hand: 16 rows and 36 columns of tiles over 49 along the inputs, shared by 2 groups of 18 cores.
#[test]
fn what_is_shared_is_read_once_a_group() {
    let m = Machine::realistic(64);
    let t = LinearTiles { rows: 16, cols: 36, depth: 49, parts: 1 };
    let alone = sizes(2, 2, 8, 2, 13);
    let kernel = Matmul { shared: true, slots: 3, ..alone.kernel };
    let spread = Spread::new(&m, t, &kernel, 2, 16_000).unwrap();
    assert_eq!(spread, Spread { groups: 2, grid_rows: 4, members: 18, rounds: 1 });
    let w = linear(64, t, &LinearPlan { kernel, spread: Some(spread) });
    // x as f32, in four chunks of 13 of which the last has 10; the weight as bf16.
    let (x, own) = (49 * 8 * 4096, 49 * 2 * 2048);
    assert_eq!(w.relay, Relay { received: x + own, sent: 52 * 8 * 4096, pieces: 4, slots: 3 });
    assert_eq!((w.read, w.near, w.received), (2 * x, 2 * 18 * own, 52 * 8 * 4096));
    let unshared = linear(64, t, &alone);
    assert_eq!(unshared.read, 36 * (x + own));
    assert_eq!((w.matrix, w.unpack, w.written), (unshared.matrix, unshared.unpack, unshared.written));
    // Reading, sending and using in three slots: a third of the sum, if none of them alone takes longer.
    let (r, cycles) = (m.rates, |unit: &str| m.units(&w).iter().find(|u| u.0 == unit).unwrap().1 * 0.9e9);
    let read = (x + own) as f64 / r.receive + 4.0 * 800.0;
    let sent = (52 * 8 * 4096) as f64 / r.multicast + 8.0 * 800.0;
    let third = (read + sent + cycles("unpack")) / 3.0;
    assert!((cycles("sender") - read.max(sent).max(third)).abs() < 1.0, "{read} {sent} {third}");
    // Columns that cannot be dealt evenly are not shared; nor is anything by one core, or rows by too many groups.
    assert_eq!(Spread::new(&m, LinearTiles { cols: 2, ..t }, &kernel, 1, 16_000), None);
    assert_eq!(Spread::new(&m, t, &kernel, 4, 16_000), None);
    assert_eq!(Spread::new(&Machine::realistic(1), t, &kernel, 1, 16_000), None);
    let uneven = Spread::new(&m, LinearTiles { cols: 2 * 67, ..t }, &kernel, 1, 16_000);
    assert_eq!(uneven, None, "67 panels over 64 cores");
    let rounds = Spread::new(&Machine::on_grid((3, 2)), t, &kernel, 1, 16_000).unwrap();
    assert_eq!(rounds, Spread { groups: 1, grid_rows: 2, members: 6, rounds: 6 });
}

/// By hand: two loads, an addition and its `SFPNOP`, a store, for each of 32 vectors, and one reset.
#[test]
fn vector_programs_are_counted_as_they_run() {
    assert_eq!(VectorProgram::Eltwise(EltwiseOp::Add).cycles(), 1 + 32 * 5);
    assert_eq!(VectorProgram::Eltwise(EltwiseOp::Gelu).cycles(), 1 + GELU_CYCLES);
    // Two halves of four groups: five loads, two constants (of one and two words), and four times load,
    // product, store, maximum with their waits; a store; and two resets.
    assert_eq!(VectorProgram::Scores.cycles(), 2 + 8 * (1 + 2 + 4 * 6 + 1));
}

#[test]
fn norms_attention_and_moves_are_counted_as_by_hand() {
    // Two rows of tiles keep two cores busy, however many there are.
    let suffix = norm(72, 2, 32, NormForm::Rms, Format::F32, 1);
    assert_eq!(suffix, norm(2, 2, 32, NormForm::Rms, Format::F32, 1));
    assert_eq!((suffix.received, suffix.sends), (2 * 32 * 4096, 32));
    // In four parts: eight cores, each with the statistics of 32 tiles and the result of 8.
    let parts = norm(72, 2, 32, NormForm::Rms, Format::F32, 4);
    assert_eq!((parts.fills, parts.sends), (32 + 2 * 8, 8));
    assert_eq!((parts.read, parts.written), (8 * (32 + 8) * 4096, suffix.written));
    let m64 = Machine::realistic(64);
    let best = norm_parts(&m64, 2, 32, NormForm::Rms, Format::F32);
    assert!(m64.bound(&norm(64, 2, 32, NormForm::Rms, Format::F32, best)).1 < 0.7 * m64.bound(&suffix).1);
    assert_eq!(norm_parts(&Machine::realistic(1), 2, 32, NormForm::Rms, Format::F32), 1);
    assert_eq!(norm_parts(&m64, 2, 33, NormForm::Rms, Format::F32), 1, "33 columns have no halves");
    // Every head fetches its keys and values again for every row of query tiles.
    let attended = Attended {
        heads: 8,
        width: 8,
        rows: 26,
        keys: 26,
        masked: false,
        q: Format::F32,
        kv: Format::F32,
        same: 1,
    };
    let prefix = attention(72, attended);
    assert_eq!(prefix.read, 8 * 26 * (8 + 2 * 26 * 8) * 4096);
    assert_eq!(prefix.matrix, 3 * 2 * 26 * 8 * 64);
    // A mask is one more tile of the contraction, beside queries and keys.
    let masked = attention(72, Attended { masked: true, ..attended });
    assert_eq!(masked.read - prefix.read, 8 * 26 * (1 + 26) * 4096);
    assert_eq!(masked.matrix - prefix.matrix, 3 * 26 * 64);
    // Keys and values in bf16 take half; queries stay f32.
    let short = attention(72, Attended { kv: Format::Bf16, ..attended });
    assert_eq!(short.read, 8 * 26 * (8 + 26 * 8) * 4096);
    // Where keys stay, each core fetches them once: 208 items on 72 cores are three for each of 70.
    let stays = attention(72, Attended { same: 8 * 26, ..attended });
    assert_eq!(stays.read, 8 * 26 * 8 * 4096 + 70 * 2 * 26 * 8 * 4096);
    assert_eq!(stays.received, 3 * 8 * 4096 + 2 * 26 * 8 * 4096);
    assert_eq!((stays.matrix, stays.vector, stays.unpack), (prefix.matrix, prefix.vector, prefix.unpack));
    // Rows of two pictures: 4 items a core, 8 in a row alike.
    let pictures = Attended { heads: 16, width: 3, rows: 16, keys: 8, same: 8, ..attended };
    assert_eq!(attention(64, pictures).read, 256 * 3 * 4096 + 64 * 2 * 8 * 3 * 4096);
    // A gathered tile takes its processor about 25 µs at 0.9 GHz.
    let m = Machine { rates: Rates { start: 0, ..Rates::REALISTIC }, ..Machine::realistic(64) };
    let (unit, seconds) = m.bound(&gather(64, 1, 2));
    assert_eq!(unit, "reader");
    assert!((20e-6..30e-6).contains(&seconds), "{seconds}");
}

/// A matrix product by somebody else's kernel: tuned, on a grid of 8x8 cores, its operands multicast over rows and
/// columns, blocks of 2x4 tiles, two contexts of the unpackers. Sizes in tiles.
fn tuned(rows: u64, depth: u64, cols: u64, tile: u64, phases: u64) -> Work {
    let out = rows * cols / 64;
    Work {
        matrix: out * depth * 16 * phases,
        unpack: out / 8 * depth * (2 + 8) * tile / UNPACK_BYTES,
        // Rows come over one network, columns over the other.
        received: (rows / 8).max(cols / 8) * depth * tile,
        sends: out,
        in_flight: 16,
        read: (rows + cols) * depth * tile,
        written: rows * cols * tile,
        ..Work::default()
    }
}

/// tt-metal's GEMM FLOPS report, n150, 64 cores, trace: what the realistic rates say of those kernels.
#[test]
fn published_products_are_met() {
    let m = Machine::realistic(64);
    // What, tiles, bytes of a tile, phases, TFLOP/s with the host, and by how much we may be off. The two 2048³ at
    // HiFi2 were slower than anything here explains: there the model is too kind.
    let cases = [
        ("bf16 HiFi4 512³", [16, 16, 16], 2048, 4, 21.0, 0.10),
        ("bf16 HiFi4 1024x2048x2048", [32, 64, 64], 2048, 4, 50.0, 0.05),
        ("bf16 HiFi4 2048³", [64, 64, 64], 2048, 4, 51.7, 0.05),
        ("bf16 HiFi4 16384³", [512, 512, 512], 2048, 4, 54.3, 0.05),
        ("bf16 HiFi2 2048³", [64, 64, 64], 2048, 2, 76.6, 0.20),
        ("bf16 HiFi2 16384³", [512, 512, 512], 2048, 2, 85.4, 0.12),
        ("bfp8 HiFi2 2048³", [64, 64, 64], 1088, 2, 86.0, 0.20),
        ("bfp8 HiFi2 16384³", [512, 512, 512], 1088, 2, 102.0, 0.10),
        ("bfp8 LoFi 16384³", [512, 512, 512], 1088, 1, 163.0, 0.10),
        ("bfp4 LoFi 16384³", [512, 512, 512], 576, 1, 200.0, 0.10),
    ];
    for (what, [rows, depth, cols], tile, phases, published, tolerance) in cases {
        let work = Work { read: 0, ..tuned(rows, depth, cols, tile, phases) };
        let (unit, seconds) = m.bound(&work);
        let products = 2.0 * (rows * depth * cols) as f64 * 32f64.powi(3);
        // In a trace, operations are 2.7 µs apart.
        let tflops = products / (seconds + 2.7e-6) * 1e-12;
        println!("{what}: {tflops:.1} TFLOP/s on paper ({unit}), {published} measured");
        assert!((tflops / published - 1.0).abs() < tolerance, "{what}: {tflops}, published {published}");
    }
    // Of the device's own time a tuned 2048³ keeps the matrix units 85 to 90 % busy.
    let work = tuned(64, 64, 64, 2048, 4);
    let busy = work.matrix as f64 / 0.9e9 / m.bound(&work).1;
    assert!((0.85..=0.90).contains(&busy), "{busy}");
}

/// tt-metal's DRAM report: with a reader beside each channel, products that DRAM bounds reach 82 to 90 % of 288 GB/s;
/// readers anywhere get 190 to 200.
#[test]
fn published_bandwidths_are_met() {
    // 32 rows times bf16 weights of 2048x8192 to 8192x16384.
    let work = |depth: u64, cols: u64| Work {
        matrix: depth * cols / 64 * PRODUCT_CYCLES,
        received: depth * cols * 2048 / 64,
        sends: cols / 64,
        in_flight: 1,
        read: depth * cols * 2048,
        written: cols * 2048,
        ..Work::default()
    };
    let rate = |m: &Machine, w: &Work| w.read as f64 / (m.bound(w).1 + 2.7e-6) * 1e-9;
    let m = Machine::realistic(64);
    for (depth, cols) in [(64, 256), (128, 256), (128, 512), (256, 512)] {
        let w = work(depth, cols);
        let near = Work { read: 0, near: w.read, ..w };
        assert_eq!(m.bound(&near).0, "DRAM");
        let share = near.near as f64 / (m.bound(&near).1 + 2.7e-6) * 1e-9 / 288.0;
        assert!((0.82..=0.93).contains(&share), "{depth}x{cols}: {share}");
        let anywhere = rate(&m, &w);
        assert!((170.0..=200.0).contains(&anywhere), "{depth}x{cols}: {anywhere}");
    }
}

/// A core that writes tile after tile and waits for each is bound by that, not by its rate.
#[test]
fn writes_that_are_awaited_one_by_one_are_slow() {
    let m = Machine::realistic(1);
    let writer = |in_flight| m.units(&Work { sends: 1, in_flight, ..Work::default() })[5].1 * 0.9e9;
    assert_eq!(writer(1).round(), (4096.0f64 / 21.0 + 800.0).round());
    assert_eq!(writer(4).round(), ((4096.0f64 / 21.0 + 800.0) / 4.0).round());
    assert_eq!(writer(16).round(), (4096.0f64 / 21.0).round());
}

#[test]
fn estimates_are_ordered_as_they_must_be() {
    let usual = Workload { model: Model::Pi0, cameras: 2, tokens: 32, steps: 10, bfp8: false };
    for chip in [Chip::N150, Chip::N300] {
        for model in [Model::Pi0, Model::Pi05] {
            let w = Workload { model, ..usual };
            let e = estimate(chip, &w);
            let ([k0, k1], [t0, t1]) = (e.kernels(), e.total());
            println!(
                "{} {model:?}: kernels {:.0} to {:.0} ms, {} launches, all {:.0} to {:.0} ms",
                chip.name(),
                k0 * 1e3,
                k1 * 1e3,
                e.launch_count(),
                t0 * 1e3,
                t1 * 1e3
            );
            for l in &e.lines {
                println!(
                    "  {:10} {:14} {:5} {:7.1} {:7.1} {}",
                    l.stage,
                    l.kind,
                    l.launches,
                    l.optimistic * 1e3,
                    l.realistic * 1e3,
                    l.bound
                );
            }
            assert!(e.matrix < k0 && e.weights < k0 && k0 < k1 && t0 < t1, "{e:?}");
            assert!(e.lines.iter().all(|l| l.launches > 0 && l.optimistic < l.realistic));
            let more = |w: Workload| estimate(chip, &w).kernels()[1];
            assert!(more(Workload { cameras: 3, ..w }) > 1.1 * k1 && more(Workload { steps: 1, ..w }) < k1);
            assert!(more(Workload { cameras: 0, tokens: 1, steps: 1, ..w }) > 0.0);
        }
    }
    // Until all twelve channels were used, each tensor lay in half of them, writes took any virtual channel, and each
    // transfer to a source waited for both unpackers.
    let six =
        Rates { dram_read: 99.0, dram_near: 99.0, dram_write: 54.5, unpack_wait: 25, ..Rates::REALISTIC };
    let six = [Rates::OPTIMISTIC, six];
    let six = estimate_at(Chip::N300, six, &usual).kernels()[1];
    println!("six channels: kernels {:.0} ms", six * 1e3);
    assert!(six > 1.3 * estimate(Chip::N300, &usual).kernels()[1]);
    // The linear layers of this workload are 2.9 TFLOP, tiles counted whole, on matrix units of 65.5 TFLOP/s.
    let matrix = estimate(Chip::N300, &usual).matrix;
    assert!((0.043..0.045).contains(&matrix), "{matrix}");
}
