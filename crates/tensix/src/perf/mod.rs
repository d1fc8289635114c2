//! A model of performance on paper: what each kernel asks of each unit, what a chip's units give, and so what
//! bounds an operation and how long it takes. Nothing of ours has been measured on silicon.
//!
//! Two cases, so that no single number is believed too much. *Optimistic* takes the rates of Tenstorrent's public
//! ISA documentation (`WormholeB0`: MatrixUnit, UNPACR, L1, NoC, DRAMTile) at 1 GHz. *Realistic* takes what others
//! have measured on cards ([`Rates::REALISTIC`] names each source) and counts what the documentation leaves out:
//! waits of the unpackers, acknowledgements of writes, starting and ending a kernel, what lies between two kernels. Tests hold that case
//! against published measurements of other kernels. The simulator's clocks are not cycles and play no part here.
//!
//! The units work at the same time, so the slowest bounds a kernel.

mod pass;

pub use pass::{Estimate, Line, Model, PUBLISHED, Published, Workload, estimate};

use crate::kernels::{
    ATTENDED, EltwiseOp, Epilogue, IN_FLIGHT, LINES, Matmul, NormForm, PHASES, VectorProgram,
};
use crate::layout::{Format, TILE};

/// Cycles of a tile product in one phase: it takes so many `MVMUL`.
const PHASE_CYCLES: u64 = 16;
/// The same in all phases.
const PRODUCT_CYCLES: u64 = PHASE_CYCLES * PHASES as u64;
/// Bytes that both unpackers together read from L1 in a cycle (ISA documentation, UNPACR: 64 alone, 32 + 32 together).
const UNPACK_BYTES: u64 = 64;
/// Bytes that four packers write to L1 in a cycle.
const PACK_BYTES: u64 = 64;
/// Cycles in which an unpacker neither reads nor waits for data when partial sums are put into Dst: switching its
/// target twice and starting four transfers, about 250 instructions of its processor. An estimate.
const SWITCH_CYCLES: u64 = 400;
const F32_TILE: u64 = Format::F32.tile_bytes() as u64;

/// A chip, by what of it matters here.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Machine {
    /// Cores that compute.
    pub cores: usize,
    /// Columns of the grid that they form.
    pub columns: usize,
    /// What they and the memory do.
    pub rates: Rates,
}

/// What the units of a chip do.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Rates {
    /// Clock of the cores and networks, GHz.
    pub clock: f64,
    /// Share of its cycles in which the matrix unit multiplies while it has work.
    pub matrix: f64,
    /// GB/s that all DRAM channels deliver to cores.
    pub dram_read: f64,
    /// The same where each core reads weights from channels near it.
    pub dram_near: f64,
    /// GB/s that all DRAM channels take from cores.
    pub dram_write: f64,
    /// Bytes that a core receives in a cycle.
    pub receive: f64,
    /// Bytes that a core sends in a cycle.
    pub send: f64,
    /// Bytes that a core sends to many in a cycle.
    pub multicast: f64,
    /// Cycles until a write is acknowledged.
    pub ack: u64,
    /// Cycles by which an `UNPACR` to a source of the matrix unit is late.
    pub unpack_wait: u64,
    /// Cycles that a tile unpacked to Dst, or packed, takes at least: its processor waits for the coprocessor.
    pub turnaround: u64,
    /// Cycles of the reading processor for each tile that it fetches.
    pub fetch: u64,
    /// Cycles before a kernel's first product and after its last.
    pub start: u64,
    /// Seconds between the end of a kernel and the start of the next.
    pub launch: f64,
    /// Seconds in which the host starts an inference and learns of its end.
    pub go: f64,
}

impl Rates {
    /// What is documented: nothing is slower than its rate, and launches cost what tt-metal measures between two
    /// operations of a trace (2.7 µs, its GEMM FLOPS report: 512³ takes 12.75 µs with the host, 10.05 on the device).
    pub const OPTIMISTIC: Rates = Rates {
        clock: 1.0,
        matrix: 1.0,
        dram_read: 288.0,
        dram_near: 288.0,
        dram_write: 288.0,
        receive: 32.0,
        send: 32.0,
        multicast: 32.0,
        ack: 0,
        unpack_wait: 0,
        turnaround: 64,
        fetch: 0,
        start: 0,
        launch: 2.7e-6,
        go: 0.0,
    };

    /// What was measured on cards, and our estimates where nothing was.
    pub const REALISTIC: Rates = Rates {
        // The GEMM FLOPS report's ratio of device time to host time is 0.90 even for kernels of 160 ms: power.
        clock: 0.9,
        // The same report: a tuned 16384³ product in bf16 at HiFi4 keeps the matrix units 91.5 % busy.
        matrix: 0.915,
        // The ISA documentation's measurements (DRAMTile): cores that read banks wherever they are over NoC 0 get 190 to 200
        // GB/s of 288.
        dram_read: 195.0,
        // The same: 48 cores, four for each channel, carefully chosen.
        dram_near: 267.0,
        // The same: 134 to 154 over NoC 1 on a static virtual channel, 54.5 from 48 cores on a dynamic one.
        dram_write: 144.0,
        // The NoC's measured rates: DRAM to one core 22 bytes a cycle, one core to DRAM 21.
        receive: 22.0,
        send: 21.0,
        // Linked multicast, of the same measurements; not linked it would be 15.
        multicast: 22.0,
        // A round trip of 0.6 to 1 µs.
        ack: 800,
        // Their address counters go on by themselves; issuing takes at least 2 cycles. An estimate.
        unpack_wait: 4,
        // Two waits for the coprocessor a tile. An estimate.
        turnaround: 150,
        // 12 instructions, 2 products, loads from L1 and the network interface (8 and 7 cycles), 9 stores.
        fetch: 55,
        // From the report's 512³: 10.05 µs, of which the products take 4.5.
        start: 5_600,
        // Our command lists, an estimate: 64 cores add themselves to a counter, and each reads it once or twice until all are
        // there (a round trip of 0.6 to 1 µs each; meanwhile the next arguments come from DRAM), then counters are zeroed.
        launch: 3.9e-6,
        // An estimate: for each of 64 cores a window to move, a word to store uncached, and polls. Without command
        // lists, each launch takes the host about 1 ms so.
        go: 0.5e-3,
    };
}

/// A card or one chip of it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Chip {
    /// The one chip of an n150: 72 cores.
    N150,
    /// One of the two chips of an n300: 64 cores.
    N300,
}

impl Chip {
    /// Cores that work: 80 less the harvested rows.
    pub fn cores(self) -> usize {
        match self {
            Chip::N150 => 72,
            Chip::N300 => 64,
        }
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Chip::N150 => "n150",
            Chip::N300 => "one chip of an n300",
        }
    }
}

/// What a kernel asks: cycles of each unit of the busiest core, and bytes of the memory that all share.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Work {
    /// Cycles of the matrix unit.
    pub matrix: u64,
    /// Cycles of the vector unit.
    pub vector: u64,
    /// Cycles of both unpackers while they read.
    pub unpack: u64,
    /// Transfers to the sources of the matrix unit.
    pub unpacks: u64,
    /// Tiles unpacked to Dst one by one.
    pub fills: u64,
    /// Tiles packed.
    pub packs: u64,
    /// Tiles that the reader fetches.
    pub fetches: u64,
    /// Bytes that it receives.
    pub received: u64,
    /// Cycles of the reader beside starting fetches.
    pub reader: u64,
    /// Tiles that the writer sends.
    pub sends: u64,
    /// Writes that may be under way at once.
    pub in_flight: u64,
    /// Bytes that all cores read from DRAM.
    pub read: u64,
    /// Bytes that they read from channels near them.
    pub near: u64,
    /// Bytes that they write to it.
    pub written: u64,
    /// What a core that sends to others has to do for them, where one does.
    pub relay: Relay,
}

/// What a core does that reads for others, piece by piece.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Relay {
    /// Bytes that it receives, its own part too.
    pub received: u64,
    /// Bytes that it sends.
    pub sent: u64,
    /// Pieces; each is awaited when read and when sent.
    pub pieces: u64,
    /// Pieces that memory holds, each being read, sent or used.
    pub slots: u64,
}

impl Machine {
    /// A chip of so many cores, eight in a row.
    pub fn new(cores: usize, rates: Rates) -> Self {
        Machine { cores, columns: cores.min(8), rates }
    }

    /// The same in the realistic case.
    pub fn realistic(cores: usize) -> Self {
        Machine::new(cores, Rates::REALISTIC)
    }

    /// Columns and rows of cores in the realistic case.
    pub fn on_grid((columns, rows): (usize, usize)) -> Self {
        Machine { cores: columns * rows, columns, rates: Rates::REALISTIC }
    }

    /// Cycles of a core that reads for others: a piece is read, then sent, then used by all, one after the other; what
    /// overlaps is what different pieces do.
    fn relay(&self, w: &Work, used: f64) -> f64 {
        let (r, relay) = (&self.rates, &w.relay);
        if relay.slots == 0 {
            return 0.0;
        }
        let awaited = (relay.pieces * r.ack) as f64;
        let read = relay.received as f64 / r.receive + awaited;
        let sent = relay.sent as f64 / r.multicast + 2.0 * awaited;
        read.max(sent).max((read + sent + used) / relay.slots as f64)
    }

    /// Seconds of each unit for some work.
    pub fn units(&self, w: &Work) -> [(&'static str, f64); 8] {
        let r = &self.rates;
        let cycles = |c: f64| c / (r.clock * 1e9);
        let tile_out = (F32_TILE as f64 / r.send).max(if w.sends > 0 {
            (F32_TILE as f64 / r.send + r.ack as f64) / w.in_flight.max(1) as f64
        } else {
            0.0
        });
        let unpack = w.unpack + w.unpacks * r.unpack_wait + w.fills * r.turnaround;
        let pack = w.packs * (F32_TILE / PACK_BYTES).max(r.turnaround);
        let reader = (w.received as f64 / r.receive).max((w.fetches * r.fetch + w.reader) as f64);
        let used = (w.matrix as f64 / r.matrix).max(w.vector as f64).max(unpack as f64);
        let at = |bytes: u64, rate: f64| bytes as f64 / (rate * 1e9);
        let dram = at(w.read, r.dram_read) + at(w.near, r.dram_near) + at(w.written, r.dram_write);
        [
            ("matrix", cycles(w.matrix as f64 / r.matrix)),
            ("vector", cycles(w.vector as f64)),
            ("unpack", cycles(unpack as f64)),
            ("pack", cycles(pack as f64)),
            ("reader", cycles(reader)),
            ("writer", cycles(w.sends as f64 * tile_out)),
            ("sender", cycles(self.relay(w, used))),
            ("DRAM", dram),
        ]
    }

    /// The unit that bounds some work, and the seconds that the work takes on the device.
    pub fn bound(&self, w: &Work) -> (&'static str, f64) {
        let slowest = self.units(w).into_iter().max_by(|a, b| a.1.total_cmp(&b.1)).unwrap_or(("", 0.0));
        (slowest.0, slowest.1 + self.rates.start as f64 / (self.rates.clock * 1e9))
    }
}

/// A linear layer in tiles: rows and columns of the product, and tiles along the inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct LinearTiles {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) depth: usize,
    /// Into how many parts the inputs are divided: each has as many of the rows, and the products of the parts are added
    /// afterwards.
    pub(crate) parts: usize,
}

/// Into how many parts the inputs of a layer are divided. Long ones are where cores would have few columns each, so that every
/// tile of x that a core is sent meets only those. The order of sums depends on it, so it is the same for any number of cores.
pub(crate) fn parts_of_inputs(depth: usize, bias: bool) -> usize {
    const LONG: usize = 256;
    if depth >= LONG && depth.is_multiple_of(2) && !bias { 2 } else { 1 }
}

/// How a linear layer is computed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct LinearPlan {
    pub(crate) kernel: Matmul,
    /// Which cores work together, if x is shared.
    pub(crate) spread: Option<Spread>,
}

/// Which cores share the rows of x: groups of whole rows of the grid, each with every `groups`-th row of panels. The cores
/// of a group divide the columns.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Spread {
    pub(crate) groups: usize,
    /// Rows of the grid that a group may take.
    pub(crate) grid_rows: usize,
    /// Cores of a group.
    pub(crate) members: usize,
    /// Panels of each core.
    pub(crate) rounds: usize,
}

impl Spread {
    /// Of panels of a size, if they can be shared so: every core has the same number of them, at least two share, and
    /// the arguments fit.
    fn new(m: &Machine, t: LinearTiles, k: &Matmul, groups: usize, item_words: usize) -> Option<Self> {
        let rows = t.rows / k.panel_rows as usize;
        let columns = t.cols / k.panel_cols as usize;
        let grid_rows = m.cores / m.columns / groups;
        if grid_rows == 0 || !rows.is_multiple_of(groups) {
            return None;
        }
        let least = columns.div_ceil(grid_rows * m.columns);
        let each = (least..=columns).find(|n| columns.is_multiple_of(*n))?;
        let rounds = rows / groups * each;
        let members = columns / each;
        let fits = rounds * k.item_words() as usize <= item_words;
        (members > 1 && fits).then_some(Spread { groups, grid_rows, members, rounds })
    }
}

/// Vector instructions for a tile of GELU, counted from the program that the kernel emits.
pub(crate) const GELU_CYCLES: u64 = 32 * 75;

/// A linear layer computed in some way on so many cores.
pub(crate) fn linear(cores: usize, t: LinearTiles, plan: &LinearPlan) -> Work {
    let k = &plan.kernel;
    let (x, weight) = (k.x.tile_bytes() as u64, k.weight.whole_tile_bytes() as u64);
    let [depth, rows, cols] = [t.depth as u64, k.panel_rows.into(), k.panel_cols.into()];
    // Exponents are fetched apart.
    let fetches = if k.weight == Format::Bfp8 { 2 * cols } else { cols };
    let panels = (t.rows as u64 / rows) * (t.cols as u64 / cols);
    let rounds = plan.spread.map_or(panels.div_ceil(cores as u64), |s| s.rounds as u64);
    let tiles = rows * cols;
    let block = u64::from(k.rows * k.cols);
    let blocks = tiles / block;
    let chunks = depth.div_ceil(k.chunk.into());
    let residual = if k.epilogue == Epilogue::Residual { tiles } else { 0 };
    // Sums go out to L1 and back between chunks.
    let filled = tiles * (chunks - 1) + residual;
    let out = if k.epilogue == Epilogue::Geglu { tiles / 2 } else { tiles };
    let (shared, own) = (depth * rows * x, depth * cols * weight + residual * F32_TILE);
    let unpacked = depth * blocks * (u64::from(k.rows) * x + block * weight) + filled * F32_TILE;
    let vector = match k.epilogue {
        Epilogue::None | Epilogue::Residual => 0,
        Epilogue::Geglu => tiles / 2 * GELU_CYCLES,
        Epilogue::Gelu | Epilogue::Silu => tiles * GELU_CYCLES,
    };
    // Whole chunks are sent, over the other network than a core's own part comes.
    let sent = chunks * u64::from(k.chunk) * rows * x;
    let weights = depth * cols * weight;
    let (received, read, near, relay) = match plan.spread {
        None => (shared + own, panels * (shared + own), 0, Relay::default()),
        Some(s) => {
            let relay = Relay {
                received: rounds * (shared + own),
                sent: rounds * sent,
                pieces: rounds * chunks,
                slots: k.slots.into(),
            };
            let read = rounds * s.groups as u64 * shared + panels * (own - weights);
            (sent.max(own), read, panels * weights, relay)
        }
    };
    Work {
        matrix: rounds * tiles * depth * PHASE_CYCLES * u64::from(k.phases()),
        vector: rounds * vector,
        unpack: rounds * (unpacked / UNPACK_BYTES + filled / block * SWITCH_CYCLES),
        unpacks: rounds * depth * blocks * (u64::from(k.rows) + block),
        packs: rounds * (tiles * (chunks - 1) + out),
        fetches: rounds * (depth * (rows + fetches) + residual),
        received: rounds * received,
        sends: rounds * out,
        in_flight: IN_FLIGHT.into(),
        read,
        near,
        written: panels * out * k.output.tile_bytes() as u64,
        relay,
        ..Work::default()
    }
}

/// Rows and columns of tiles of a block: at most four fit half of Dst.
const BLOCKS: [(u32, u32); 8] = [(1, 4), (2, 2), (4, 1), (1, 3), (3, 1), (1, 2), (2, 1), (1, 1)];
/// Tiles along the inputs that may be fetched at once, at most.
const LONGEST_CHUNK: usize = 16;
/// Into how many groups cores that share may be divided.
const GROUPS: [usize; 4] = [1, 2, 4, 8];

/// Ways to compute a linear layer whose buffers fit L1 and whose arguments fit `item_words`. `like` gives what is fixed:
/// formats and epilogue. Chunks are as long as fit, and alike.
pub(crate) fn candidates(
    m: &Machine,
    t: LinearTiles,
    like: Matmul,
    l1_room: u32,
    item_words: usize,
) -> Vec<LinearPlan> {
    let divisors = |n: usize, step: u32| {
        let fits = move |d: &usize| n.is_multiple_of(*d) && d.is_multiple_of(step as usize);
        (1..=n.min(32)).filter(fits).map(|d| d as u32)
    };
    let chunked = |k: Matmul| {
        let sized = (t.depth.div_ceil(LONGEST_CHUNK)..=t.depth).map(|chunks| {
            let chunk = t.depth.div_ceil(chunks) as u32;
            Matmul { chunk, partial: t.depth as u32 > chunk, ..k }
        });
        sized.into_iter().find(|k| k.l1_bytes() <= l1_room)
    };
    let mut out = Vec::new();
    for (rows, cols) in BLOCKS {
        if like.epilogue == Epilogue::Geglu && cols % 2 == 1 {
            continue;
        }
        for panel_rows in divisors(t.rows / t.parts, rows) {
            for panel_cols in divisors(t.cols, cols) {
                let k = Matmul { rows, cols, panel_rows, panel_cols, ..like };
                if k.item_words() as usize > item_words {
                    continue;
                }
                out.extend(chunked(k).map(|kernel| LinearPlan { kernel, spread: None }));
                for slots in [2, 3] {
                    let Some(kernel) = chunked(Matmul { shared: true, slots, ..k }) else { continue };
                    let spread = |groups| Spread::new(m, t, &kernel, groups, item_words);
                    let spreads = GROUPS.into_iter().filter_map(spread);
                    out.extend(spreads.map(|s| LinearPlan { kernel, spread: Some(s) }));
                }
            }
        }
    }
    out
}

/// The way in which a linear layer is fastest on paper; none if nothing fits.
pub(crate) fn best_linear(
    m: &Machine,
    t: LinearTiles,
    like: Matmul,
    l1_room: u32,
    item_words: usize,
) -> Option<LinearPlan> {
    let cost = |plan: &LinearPlan| {
        let units = m.units(&linear(m.cores, t, plan)).map(|(_, seconds)| seconds);
        // Of those that are bound alike the one that leaves most to spare.
        units.into_iter().fold(0.0, f64::max) + 1e-3 * units.iter().sum::<f64>()
    };
    let all = candidates(m, t, like, l1_room, item_words).into_iter().map(|plan| (cost(&plan), plan));
    all.min_by(|a, b| a.0.total_cmp(&b.0)).map(|(_, plan)| plan)
}

/// A norm over `rows` rows of `cols` tiles: a core takes whole rows, or the statistics of whole rows and a part of their
/// result.
fn norm(cores: usize, rows: usize, cols: usize, form: NormForm, output: Format, parts: usize) -> Work {
    let (items, centered) = (rows * parts, form.centered());
    let (cols, own, rounds) = (cols as u64, (cols / parts) as u64, items.div_ceil(cores) as u64);
    let (passes, affine) = (1 + u64::from(centered), u64::from(form.affine()));
    let mut vector = VectorProgram::NormFinish { centered }.cycles();
    vector += cols * VectorProgram::NormStatistics { sum: false }.cycles();
    vector += own * VectorProgram::NormApply(form).cycles();
    if centered {
        vector += cols * VectorProgram::NormStatistics { sum: true }.cycles();
    }
    // Rows that share scale and bias fetch them once a core, unless each takes a part.
    let affines = affine * if form == NormForm::Ada || parts > 1 { rounds } else { 1 };
    let busy = items.div_ceil(rounds as usize) as u64;
    // Each pass reads the row, the last one scale and bias too.
    let fills = rounds * (cols * passes + own * (1 + affine));
    Work {
        vector: rounds * vector,
        unpack: fills * F32_TILE / UNPACK_BYTES,
        fills,
        packs: rounds * own,
        fetches: rounds * cols + affines * own,
        received: (rounds * cols + affines * own) * F32_TILE,
        sends: rounds * own,
        in_flight: IN_FLIGHT.into(),
        read: (items as u64 * cols + busy * affines * own) * F32_TILE,
        written: rows as u64 * cols * output.tile_bytes() as u64,
        ..Work::default()
    }
}

/// Into how many parts rows are best divided.
pub(crate) fn norm_parts(m: &Machine, rows: usize, cols: usize, form: NormForm, output: Format) -> usize {
    let seconds = |parts: &usize| m.bound(&norm(m.cores, rows, cols, form, output, *parts)).1;
    let possible = [1, 2, 4, 8].into_iter().filter(|n| cols.is_multiple_of(*n));
    possible.min_by(|a, b| seconds(a).total_cmp(&seconds(b))).unwrap_or(1)
}

/// Attention over so many rows of query tiles.
#[derive(Clone, Copy)]
struct Attended {
    heads: usize,
    /// Columns of tiles of a head.
    width: usize,
    /// Rows of query tiles.
    rows: usize,
    /// Key tiles that each of them sees.
    keys: usize,
    masked: bool,
    /// How queries are stored.
    q: Format,
    /// How keys and values are stored.
    kv: Format,
    /// Items in a row that see the same keys, which stay in L1 for them; 1 if each fetches its own.
    same: usize,
}

fn attention(cores: usize, t: Attended) -> Work {
    let (items, rounds) = ((t.heads * t.rows) as u64, (t.heads * t.rows).div_ceil(cores) as u64);
    let (width, keys) = (t.width as u64, t.keys as u64);
    let (q, kv) = (t.q.tile_bytes() as u64, t.kv.tile_bytes() as u64);
    let phases = if (t.q, t.kv) == (Format::Bf16, Format::Bf16) { PHASES - 1 } else { PHASES };
    let depth = width + u64::from(t.masked);
    let groups = width.div_ceil(3);
    let vector = keys * (VectorProgram::Scores.cycles() + VectorProgram::Exponentials.cycles())
        + width * VectorProgram::Divide.cycles();
    // Queries with every key tile; the scores; the exponentials with every group of values.
    let unpacked = keys * ((groups + 1) * F32_TILE + depth * q + (depth + width) * kv);
    // Neighbours share a core, so that each fetches keys so many times.
    let turns = rounds.div_ceil(t.same as u64);
    let (queries, of_keys) = (depth * q, keys * (depth + width) * kv);
    Work {
        matrix: rounds * keys * (depth * PHASE_CYCLES * u64::from(phases) + width * PRODUCT_CYCLES),
        vector: rounds * vector,
        unpack: rounds * unpacked / UNPACK_BYTES,
        unpacks: rounds * keys * (2 * depth + groups + width),
        fills: rounds * keys,
        packs: rounds * (2 * keys + width),
        fetches: rounds * depth + turns * keys * (depth + width),
        received: rounds * queries + turns * of_keys,
        sends: rounds * width,
        in_flight: IN_FLIGHT.into(),
        read: items * queries + items.min(items.div_ceil(rounds) * turns) * of_keys,
        written: items * width * ATTENDED.tile_bytes() as u64,
        ..Work::default()
    }
}

/// An operation element by element over so many output tiles, stored in a format.
fn eltwise(cores: usize, op: EltwiseOp, tiles: usize, output: Format) -> Work {
    let (rounds, inputs) = (tiles.div_ceil(cores) as u64, op.inputs() as u64);
    Work {
        vector: rounds * VectorProgram::Eltwise(op).cycles(),
        unpack: rounds * inputs * F32_TILE / UNPACK_BYTES,
        fills: rounds * inputs,
        packs: rounds,
        fetches: rounds * inputs,
        received: rounds * inputs * F32_TILE,
        sends: rounds,
        in_flight: IN_FLIGHT.into(),
        read: tiles as u64 * inputs * F32_TILE,
        written: tiles as u64 * output.tile_bytes() as u64,
        ..Work::default()
    }
}

/// Cycles in which the reading processor places one word of a gathered tile: two loads from L1 that each wait 8, an
/// addition, a store, and the loop's share.
const PLACE_CYCLES: u64 = 22;

/// Tiles put together word by word, each row from so many lines of 64 bytes.
fn gather(cores: usize, tiles: usize, lines: usize) -> Work {
    let rounds = tiles.div_ceil(cores) as u64;
    let lines = (TILE * lines.min(LINES)) as u64;
    Work {
        fetches: rounds * lines,
        received: rounds * lines * 64,
        reader: rounds * (TILE * TILE) as u64 * PLACE_CYCLES,
        sends: rounds,
        in_flight: IN_FLIGHT.into(),
        read: tiles as u64 * lines * 64,
        written: tiles as u64 * F32_TILE,
        ..Work::default()
    }
}

/// Tiles copied whole.
fn copy(cores: usize, tiles: usize) -> Work {
    let rounds = tiles.div_ceil(cores) as u64;
    Work {
        fetches: rounds,
        received: rounds * F32_TILE,
        sends: rounds,
        in_flight: IN_FLIGHT.into(),
        read: tiles as u64 * F32_TILE,
        written: tiles as u64 * F32_TILE,
        ..Work::default()
    }
}

#[cfg(test)]
mod tests;
