//! A model of performance on paper: cycles of each unit from documented rates, and what bounds an operation.
//!
//! Rates are those of Tenstorrent's public ISA documentation (`WormholeB0`: MatrixUnit, UNPACR, L1, NoC, DRAMTile)
//! at 1 GHz. The simulator's clocks are not cycles and play no part here; nothing has been measured on silicon.
//! The units work at the same time, so the slowest bounds a panel; waits between them are not modelled.

use crate::kernels::{Epilogue, Matmul, PHASES};
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

/// One linear layer of a pass, in elements.
#[derive(Debug, Clone, Copy)]
struct Linear {
    rows: usize,
    inputs: usize,
    outputs: usize,
    times: u64,
}

/// Linear layers of π0: `cameras` pictures, `text` prompt tokens, `steps` denoising steps of 51 rows (the state is
/// part of the first only; the difference is below a percent).
fn linears(cameras: usize, text: usize, steps: u64) -> Vec<Linear> {
    let at = |rows, inputs, outputs, times| Linear { rows, inputs, outputs, times };
    let (vision, prefix, suffix) = (256 * cameras, 256 * cameras + text, 51);
    vec![
        at(vision, 588, 1152, 1),
        at(vision, 1152, 3 * 1152, 27),
        at(vision, 1152, 1152, 27),
        at(vision, 1152, 4304, 27),
        at(vision, 4304, 1152, 27),
        at(vision, 1152, 2048, 1),
        at(prefix, 2048, 2048 + 512, 18),
        at(prefix, 2048, 2048, 18),
        at(prefix, 2048, 2 * 16384, 18),
        at(prefix, 16384, 2048, 18),
        at(suffix, 1024, 2048 + 512, 18 * steps),
        at(suffix, 2048, 1024, 18 * steps),
        at(suffix, 1024, 2 * 4096, 18 * steps),
        at(suffix, 4096, 1024, 18 * steps),
    ]
}

/// What the linear layers of a full pass take on paper, in seconds.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct PassEstimate {
    /// With the kernels as they are: panels in L1, every core fetching for itself.
    pub as_built: f64,
    /// If every core computed one block of up to four tiles at a time, without panels.
    pub without_panels: f64,
    /// If activations were fetched once and multicast to all cores, beside panels.
    pub with_multicast: f64,
    /// The matrix units alone.
    pub matrix_bound: f64,
    /// Reading every weight once a use, and nothing else.
    pub weights_bound: f64,
}

/// Estimates the linear layers of a pass with 3 cameras, 48 prompt tokens and ten steps: all but a few percent of
/// its arithmetic, and all of its weights.
pub fn full_pass(m: &Machine) -> PassEstimate {
    const L1_ROOM: u32 = 1464 * 1024 - crate::kernels::l1::DATA;
    let mut total = PassEstimate {
        as_built: 0.0,
        without_panels: 0.0,
        with_multicast: 0.0,
        matrix_bound: 0.0,
        weights_bound: 0.0,
    };
    for l in linears(3, 48, 10) {
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
        let activations = ((t.rows * t.depth + t.rows * t.cols) * Format::F32.tile_bytes()) as u64;
        let products = (t.rows * t.cols * t.depth) as u64;
        let matrix = (products * PRODUCT_CYCLES).div_ceil(m.cores as u64);
        // Every tile of weight and activation once, whoever uses it.
        let once = (weights + activations) / m.dram_bytes;
        let alone = |k: &Matmul| (k.rows, k.cols) == (k.panel_rows, k.panel_cols);
        total.as_built += least(&mut all.iter().map(|(_, c)| c.bound().1));
        total.without_panels += least(&mut all.iter().filter(|(k, _)| alone(k)).map(|(_, c)| c.bound().1));
        total.with_multicast += least(&mut all.iter().map(|(_, c)| Cycles { dram: once, ..*c }.bound().1));
        total.matrix_bound += seconds(matrix);
        total.weights_bound += seconds(weights / m.dram_bytes);
    }
    total
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::{Banks, gelu_instructions};

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
    fn the_vector_units_count_is_that_of_the_emitted_program() {
        assert_eq!(GELU_CYCLES, 32 * gelu_instructions());
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
        assert!(best.panel_rows % best.rows == 0 && 26 % best.panel_rows == 0);
    }

    #[test]
    fn estimates_are_ordered_as_they_must_be() {
        for m in [Machine::N150, Machine::N300_CHIP] {
            let e = full_pass(&m);
            println!("{} cores: {e:?}", m.cores);
            assert!(e.without_panels > e.as_built && e.as_built >= e.with_multicast);
            assert!(e.with_multicast >= e.matrix_bound.max(e.weights_bound) * 0.99);
        }
    }
}
