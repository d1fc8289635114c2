//! A model of performance on paper: cycles of each unit from documented rates, and what bounds an operation.
//!
//! Rates are those of Tenstorrent's public ISA documentation (`WormholeB0`: MatrixUnit, UNPACR, L1, NoC, DRAMTile)
//! at 1 GHz. The simulator's clocks are not cycles and play no part here; nothing has been measured on silicon.
//! The units work at the same time, so the slowest bounds a panel; waits between them are not modelled.

use crate::kernels::{EltwiseOp, Epilogue, Matmul, PHASES, VectorProgram};
use crate::layout::{Format, TILE};

/// Rows of 16 columns that `MVMUL` takes, and a tile product needs, in one phase.
const PRODUCT_CYCLES: u64 = 16 * PHASES as u64;
/// Bytes that both unpackers together read from L1 in a cycle.
const UNPACK_BYTES: u64 = 64;
/// Bytes that four packers write to L1 in a cycle.
const PACK_BYTES: u64 = 64;
/// Bytes that a core receives over a NoC in a cycle.
const NOC_BYTES: u64 = 32;

/// Cycles in which an unpacker neither reads nor waits for data when partial sums are put into Dst: switching its
/// target twice and starting four transfers, about 250 instructions of its processor. An estimate.
const SWITCH_CYCLES: u64 = 400;

/// What a chip offers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Machine {
    /// Cores that compute.
    pub cores: usize,
    /// Bytes that DRAM delivers in a cycle, all banks together.
    pub dram_bytes: u64,
}

impl Machine {
    /// The one chip of an n150: 72 cores, twelve channels of 24 GB/s.
    pub const N150: Machine = Machine { cores: 72, dram_bytes: 288 };
    /// One of the two chips of an n300: 64 cores.
    pub const N300_CHIP: Machine = Machine { cores: 64, dram_bytes: 288 };
}

/// Cycles of each unit, on the busiest core, and of DRAM.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Cycles {
    /// Matrix unit.
    pub matrix: u64,
    /// Vector unit.
    pub vector: u64,
    /// Both unpackers.
    pub unpack: u64,
    /// All packers.
    pub pack: u64,
    /// Reads over NoC 0.
    pub noc: u64,
    /// DRAM, shared by all cores.
    pub dram: u64,
}

impl Cycles {
    /// The unit that bounds the operation, and its cycles.
    pub fn bound(&self) -> (&'static str, u64) {
        let units = [
            ("matrix", self.matrix),
            ("vector", self.vector),
            ("unpack", self.unpack),
            ("pack", self.pack),
            ("NoC", self.noc),
            ("DRAM", self.dram),
        ];
        units.into_iter().max_by_key(|(_, cycles)| *cycles).unwrap_or(("", 0))
    }
}

/// A linear layer in tiles: rows and columns of the result, and tiles along the inputs.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct LinearTiles {
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) depth: usize,
}

/// Vector instructions for a tile of GELU, counted from the program that the kernel emits.
pub(crate) const GELU_CYCLES: u64 = 32 * 75;

/// Cycles of a linear layer computed with a kernel of given sizes.
pub(crate) fn linear(m: &Machine, t: LinearTiles, k: &Matmul) -> Cycles {
    let (weight, f32_tile) = (k.weight.tile_bytes() as u64, Format::F32.tile_bytes() as u64);
    let [depth, rows, cols] = [t.depth as u64, k.panel_rows.into(), k.panel_cols.into()];
    let panels = (t.rows as u64 / rows) * (t.cols as u64 / cols);
    let rounds = panels.div_ceil(m.cores as u64);
    let tiles = rows * cols;
    let blocks = tiles / u64::from(k.rows * k.cols);
    let chunks = depth.div_ceil(k.chunk.into());
    // Sums go out to L1 and back between chunks.
    let (stored, filled) =
        (tiles * chunks, tiles * (chunks - 1) + if k.epilogue == Epilogue::Residual { tiles } else { 0 });
    let fetched = depth * (rows * f32_tile + cols * weight);
    let residual = if k.epilogue == Epilogue::Residual { tiles * f32_tile } else { 0 };
    let unpacked = depth * blocks * (u64::from(k.rows) * f32_tile + u64::from(k.rows * k.cols) * weight)
        + filled * f32_tile;
    let vector = match k.epilogue {
        Epilogue::None | Epilogue::Residual => 0,
        Epilogue::Geglu => tiles / 2 * GELU_CYCLES,
        Epilogue::Gelu | Epilogue::Silu => tiles * GELU_CYCLES,
    };
    Cycles {
        matrix: rounds * tiles * depth * PRODUCT_CYCLES,
        vector: rounds * vector,
        unpack: rounds * (unpacked / UNPACK_BYTES + filled / u64::from(k.rows * k.cols) * SWITCH_CYCLES),
        pack: rounds * stored * f32_tile / PACK_BYTES,
        noc: rounds * (fetched + residual) / NOC_BYTES,
        dram: panels * (fetched + residual + tiles * f32_tile) / m.dram_bytes,
    }
}

/// Rows and columns of tiles of a block: at most four fit half of Dst.
const BLOCKS: [(u32, u32); 8] = [(1, 4), (2, 2), (4, 1), (1, 3), (3, 1), (1, 2), (2, 1), (1, 1)];
/// Tiles along the inputs that may be fetched at once.
const CHUNKS: [u32; 4] = [16, 8, 4, 2];

/// Sizes of the kernel for a linear layer whose buffers fit L1 and whose items fit `item_words`. `like` gives what
/// is fixed: formats and epilogue.
fn candidates(t: LinearTiles, like: Matmul, l1_room: u32, item_words: usize) -> Vec<Matmul> {
    let divisors = |n: usize, step: u32| {
        let fits = move |d: &usize| n.is_multiple_of(*d) && d.is_multiple_of(step as usize);
        (1..=n.min(32)).filter(fits).map(|d| d as u32)
    };
    let mut out = Vec::new();
    for (rows, cols) in BLOCKS {
        if like.epilogue == Epilogue::Geglu && cols % 2 == 1 {
            continue;
        }
        for panel_rows in divisors(t.rows, rows) {
            for panel_cols in divisors(t.cols, cols) {
                let words = 1 + panel_cols as usize + 2 * (panel_rows * panel_cols) as usize;
                let sized = CHUNKS.map(|chunk| {
                    let chunk = chunk.min(t.depth as u32);
                    let partial = t.depth as u32 > chunk;
                    Matmul { rows, cols, panel_rows, panel_cols, chunk, partial, ..like }
                });
                let fits = |k: &Matmul| k.l1_bytes() <= l1_room && words <= item_words;
                out.extend(sized.into_iter().find(fits));
            }
        }
    }
    out
}

/// The sizes with which a linear layer is fastest on paper; none if nothing fits.
pub(crate) fn best_linear(
    m: &Machine,
    t: LinearTiles,
    like: Matmul,
    l1_room: u32,
    item_words: usize,
) -> Option<Matmul> {
    candidates(t, like, l1_room, item_words).into_iter().min_by_key(|k| {
        let c = linear(m, t, k);
        (c.bound().1, c.matrix + c.unpack + c.pack + c.noc + c.dram)
    })
}

const F32_TILE: u64 = Format::F32.tile_bytes() as u64;

/// Cycles of a norm over `rows` rows of `cols` tiles: a core takes whole rows.
fn norm(m: &Machine, rows: usize, cols: usize, centered: bool) -> Cycles {
    let (cols, rounds) = (cols as u64, rows.div_ceil(m.cores) as u64);
    let passes = 1 + u64::from(centered);
    let mut vector = VectorProgram::NormFinish { centered }.cycles();
    vector += cols * VectorProgram::NormStatistics { sum: false }.cycles();
    vector += cols * VectorProgram::NormApply { centered }.cycles();
    if centered {
        vector += cols * VectorProgram::NormStatistics { sum: true }.cycles();
    }
    let busy = rows.min(m.cores) as u64;
    Cycles {
        vector: rounds * vector,
        // Each pass reads the row, the last one scale and bias too.
        unpack: rounds * cols * (passes + 1 + passes) * F32_TILE / UNPACK_BYTES,
        pack: rounds * cols * F32_TILE / PACK_BYTES,
        noc: (rounds + passes) * cols * F32_TILE / NOC_BYTES,
        dram: (2 * rows as u64 + busy * passes) * cols * F32_TILE / m.dram_bytes,
        ..Cycles::default()
    }
}

/// Cycles of attention: `heads` heads of `width` tiles, `rows` rows of query tiles that each see `keys` key tiles.
fn attention(m: &Machine, heads: usize, width: usize, rows: usize, keys: usize) -> Cycles {
    let rounds = (heads * rows).div_ceil(m.cores) as u64;
    let (width, keys, items) = (width as u64, keys as u64, (heads * rows) as u64);
    let groups = width.div_ceil(3);
    let vector = keys * (VectorProgram::Scores.cycles() + VectorProgram::Exponentials.cycles())
        + width * VectorProgram::Divide.cycles();
    // Queries with every key tile; the scores; the exponentials with every group of values.
    let unpacked = keys * (2 * width + 1 + groups + width);
    let fetched = width + 2 * keys * width;
    Cycles {
        matrix: rounds * 2 * keys * width * PRODUCT_CYCLES,
        vector: rounds * vector,
        unpack: rounds * unpacked * F32_TILE / UNPACK_BYTES,
        pack: rounds * (2 * keys + width) * F32_TILE / PACK_BYTES,
        noc: rounds * fetched * F32_TILE / NOC_BYTES,
        dram: items * (fetched + width) * F32_TILE / m.dram_bytes,
    }
}

/// Cycles of an operation element by element over so many output tiles.
fn eltwise(m: &Machine, op: EltwiseOp, tiles: usize) -> Cycles {
    let (rounds, inputs) = (tiles.div_ceil(m.cores) as u64, op.inputs() as u64);
    Cycles {
        vector: rounds * VectorProgram::Eltwise(op).cycles(),
        unpack: rounds * inputs * F32_TILE / UNPACK_BYTES,
        pack: rounds * F32_TILE / PACK_BYTES,
        noc: rounds * inputs * F32_TILE / NOC_BYTES,
        dram: tiles as u64 * (inputs + 1) * F32_TILE / m.dram_bytes,
        ..Cycles::default()
    }
}

/// One linear layer of a pass, in elements.
#[derive(Debug, Clone, Copy)]
struct Linear {
    rows: usize,
    inputs: usize,
    outputs: usize,
    times: u64,
}

/// Pictures, prompt tokens, denoising steps and rows of a step that the estimates are for.
const CAMERAS: usize = 3;
const TEXT: usize = 48;
const STEPS: u64 = 10;
const SUFFIX: usize = 51;
const VISION: usize = 256 * CAMERAS;
const PREFIX: usize = VISION + TEXT;

/// Linear layers of π0. The state row is counted in every step, though only the first has it.
fn linears() -> Vec<Linear> {
    let at = |rows, inputs, outputs, times| Linear { rows, inputs, outputs, times };
    vec![
        at(VISION, 588, 1152, 1),
        at(VISION, 1152, 3 * 1152, 27),
        at(VISION, 1152, 1152, 27),
        at(VISION, 1152, 4304, 27),
        at(VISION, 4304, 1152, 27),
        at(VISION, 1152, 2048, 1),
        at(PREFIX, 2048, 2048 + 512, 18),
        at(PREFIX, 2048, 2048, 18),
        at(PREFIX, 2048, 2 * 16384, 18),
        at(PREFIX, 16384, 2048, 18),
        at(SUFFIX, 1024, 2048 + 512, 18 * STEPS),
        at(SUFFIX, 2048, 1024, 18 * STEPS),
        at(SUFFIX, 1024, 2 * 4096, 18 * STEPS),
        at(SUFFIX, 4096, 1024, 18 * STEPS),
    ]
}

/// What a full pass takes on paper, in seconds: three cameras, 48 prompt tokens, ten steps of 50 actions.
///
/// Not in it: launches (about 2,500), which depend on the host and were never measured; moves of rows and columns
/// where heads are not whole tiles, as in the vision tower; waits between units.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct PassEstimate {
    /// Linear layers with the kernels as they are: panels in L1, every core fetching for itself.
    pub linear: f64,
    /// The same if every core computed one block of up to four tiles at a time.
    pub linear_without_panels: f64,
    /// The same if tiles that several cores need were fetched once and multicast.
    pub linear_with_multicast: f64,
    /// The same if the matrix units were all that counts.
    pub linear_matrix_bound: f64,
    /// The same if reading every weight once a use were all that counts.
    pub linear_weights_bound: f64,
    /// Attention.
    pub attention: f64,
    /// Norms.
    pub norms: f64,
    /// Operations element by element.
    pub pointwise: f64,
}

impl PassEstimate {
    /// With the kernels as they are.
    pub fn total(&self) -> f64 {
        self.linear + self.attention + self.norms + self.pointwise
    }
}

/// Estimates a full pass on one chip.
pub fn full_pass(m: &Machine) -> PassEstimate {
    let mut total = PassEstimate::default();
    linears().into_iter().for_each(|l| add_linear(m, l, &mut total));
    let seconds = |c: Cycles, times: u64| c.bound().1 as f64 * times as f64 * 1e-9;
    let tiles = |n: usize| n.div_ceil(TILE);
    let (vision, prefix, suffix) = (tiles(VISION), tiles(PREFIX), tiles(SUFFIX));
    let steps = 18 * STEPS;
    total.attention = seconds(attention(m, 16, 3, vision, tiles(256)), 27)
        + seconds(attention(m, 8, 8, prefix, prefix), 18)
        + seconds(attention(m, 8, 8, suffix, prefix + suffix), steps);
    total.norms = seconds(norm(m, vision, tiles(1152), true), 2 * 27 + 1)
        + seconds(norm(m, prefix, tiles(2048), false), 2 * 18)
        + seconds(norm(m, suffix, tiles(1024), false), 2 * steps + STEPS);
    // Queries and keys turn; GELU, GEGLU and residuals happen inside the linear layers.
    let rope = |rows: usize| eltwise(m, EltwiseOp::Rope, rows * tiles(2048 + 256));
    total.pointwise = seconds(rope(prefix), 18) + seconds(rope(suffix), steps);
    total
}

fn add_linear(m: &Machine, l: Linear, total: &mut PassEstimate) {
    const L1_ROOM: u32 = 1464 * 1024 - crate::kernels::l1::DATA;
    let tiles = |n: usize| n.div_ceil(TILE);
    let t = LinearTiles { rows: tiles(l.rows), cols: tiles(l.outputs), depth: tiles(l.inputs) };
    let like = Matmul {
        rows: 1,
        cols: 1,
        panel_rows: 1,
        panel_cols: 1,
        chunk: 8,
        partial: false,
        weight: Format::Bf16,
        bias: false,
        epilogue: Epilogue::None,
        banks: crate::kernels::Banks(6),
    };
    let seconds = |cycles: u64| cycles as f64 * l.times as f64 * 1e-9;
    let all: Vec<(Matmul, Cycles)> =
        candidates(t, like, L1_ROOM, 16_000).into_iter().map(|k| (k, linear(m, t, &k))).collect();
    let least = |cycles: &mut dyn Iterator<Item = u64>| seconds(cycles.min().unwrap_or(0));
    let weights = (t.cols * t.depth * Format::Bf16.tile_bytes()) as u64;
    let activations = (t.rows * (t.depth + t.cols)) as u64 * F32_TILE;
    let products = (t.rows * t.cols * t.depth) as u64;
    // Every tile of weight and activation once, whoever uses it.
    let once = (weights + activations) / m.dram_bytes;
    let alone = |k: &Matmul| (k.rows, k.cols) == (k.panel_rows, k.panel_cols);
    total.linear += least(&mut all.iter().map(|(_, c)| c.bound().1));
    total.linear_without_panels += least(&mut all.iter().filter(|(k, _)| alone(k)).map(|(_, c)| c.bound().1));
    total.linear_with_multicast += least(&mut all.iter().map(|(_, c)| Cycles { dram: once, ..*c }.bound().1));
    total.linear_matrix_bound += seconds((products * PRODUCT_CYCLES).div_ceil(m.cores as u64));
    total.linear_weights_bound += seconds(weights / m.dram_bytes);
}

#[cfg(test)]
mod tests;
