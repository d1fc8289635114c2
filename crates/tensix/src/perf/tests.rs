use super::*;
use crate::kernels::Banks;

fn sizes(rows: u32, cols: u32, panel_rows: u32, panel_cols: u32, chunk: u32) -> Matmul {
    Matmul {
        rows,
        cols,
        panel_rows,
        panel_cols,
        chunk,
        partial: true,
        weight: Format::Bf16,
        bias: false,
        epilogue: Epilogue::None,
        banks: Banks(6),
    }
}

/// By hand: 2x2 tiles over 64 along the inputs, on one core of one.
#[test]
fn a_block_is_counted_as_by_hand() {
    let m = Machine { cores: 1, dram_bytes: 288 };
    let t = LinearTiles { rows: 2, cols: 2, depth: 64 };
    let c = linear(&m, t, &sizes(2, 2, 2, 2, 64));
    assert_eq!(c.matrix, 4 * 64 * 64);
    assert_eq!(c.unpack, 64 * (2 * 4096 + 4 * 2048) / 64);
    assert_eq!(c.pack, 4 * 64);
    assert_eq!(c.noc, 64 * (2 * 4096 + 2 * 2048) / 32);
    assert_eq!(c.dram, (64 * (2 * 4096 + 2 * 2048) + 4 * 4096) / 288);
    assert_eq!(c.bound(), ("NoC", 24576));
    // In chunks of 16, sums are stored four times and filled three.
    let chunked = linear(&m, t, &sizes(2, 2, 2, 2, 16));
    assert_eq!(chunked.pack, 4 * c.pack);
    assert_eq!(chunked.unpack, c.unpack + 3 * (4 * 4096 / 64 + SWITCH_CYCLES));
}

#[test]
fn panels_cut_memory_traffic_where_there_are_rows() {
    let m = Machine::N300_CHIP;
    let t = LinearTiles { rows: 26, cols: 1024, depth: 64 };
    let block = linear(&m, t, &sizes(2, 2, 2, 2, 8));
    let best = best_linear(&m, t, sizes(1, 1, 1, 1, 8), 1_100_000, 16_000).unwrap();
    let panel = linear(&m, t, &best);
    assert_eq!(block.bound().0, "DRAM");
    assert!(block.dram > 4 * panel.dram, "{block:?} {panel:?} {best:?}");
    assert!(best.l1_bytes() <= 1_100_000);
    assert!(best.panel_rows.is_multiple_of(best.rows) && 26usize.is_multiple_of(best.panel_rows as usize));
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
fn norms_and_attention_are_counted_as_by_hand() {
    let m = Machine::N150;
    // Two rows of tiles keep two cores busy, however many there are.
    let suffix = norm(&m, 2, 32, false);
    assert_eq!(suffix, norm(&Machine { cores: 2, ..m }, 2, 32, false));
    assert_eq!((suffix.bound().0, suffix.noc), ("vector", 2 * 32 * 4096 / 32));
    // Every head fetches its keys and values again for every row of query tiles.
    let prefix = attention(&m, 8, 8, 26, 26);
    assert_eq!(prefix.dram, 8 * 26 * (8 + 2 * 26 * 8 + 8) * 4096 / 288);
    assert_eq!(prefix.matrix, 3 * 2 * 26 * 8 * 64);
    assert_eq!(prefix.bound().0, "DRAM");
}

#[test]
fn estimates_are_ordered_as_they_must_be() {
    for m in [Machine::N150, Machine::N300_CHIP] {
        let e = full_pass(&m);
        println!("{} cores: {:.3} s, {e:.3?}", m.cores, e.total());
        assert!(e.linear_without_panels > e.linear && e.linear >= e.linear_with_multicast);
        assert!(e.linear_with_multicast >= e.linear_matrix_bound.max(e.linear_weights_bound) * 0.99);
    }
}
