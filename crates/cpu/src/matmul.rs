//! The multiplication of activations with a packed weight: left operand packed with its norm, tiles of sums in
//! cache, and everything that follows done while they are there.

use std::cell::RefCell;

use pi0_device::Activation;

use crate::Isa;
use crate::kernels::{Kernel, Left, Panels, pack};
use crate::math::{gelu, per_isa, silu};
use crate::memory::{Block, BlockPool, Pooled, Shared};
use crate::norm::norm_row;
use crate::tensor::Tensor;
use crate::threads::Threads;
use crate::weight::{Linear, NormWeight};

/// Rows of the left operand that a task keeps in the second-level cache, in f32 sums and packed values.
const CHUNK_ROWS: usize = 416;
/// Columns of one task at most.
const CHUNK_COLUMNS: usize = 256;

thread_local! {
    static SCRATCH: RefCell<Option<Block>> = const { RefCell::new(None) };
}

/// Lends this thread's scratch memory; its contents are whatever was left there.
pub(crate) fn with_scratch<R>(bytes: usize, f: impl FnOnce(&mut Block) -> R) -> R {
    SCRATCH.with(|cell| {
        // Taken out while in use, so that a nested use gets its own.
        let mut block = match cell.take() {
            Some(block) if block.len() >= bytes => block,
            _ => Block::new(bytes),
        };
        let result = f(&mut block);
        cell.replace(Some(block));
        result
    })
}

/// What runs the operations: threads, memory, instruction set.
pub(crate) struct Engine {
    pub(crate) isa: Isa,
    pub(crate) threads: Threads,
    pub(crate) pool: BlockPool,
}

/// Some columns of the result and where they go.
#[derive(Clone, Copy)]
pub(crate) struct Target {
    /// First column of the layer's result, and one past the last.
    pub(crate) columns: (usize, usize),
    /// `[rows, columns]`, contiguous.
    pub(crate) out: Shared<f32>,
}

/// What follows the product.
pub(crate) struct Finish<'a> {
    pub(crate) activation: Option<Activation>,
    /// Its rows divide the result's rows and repeat.
    pub(crate) residual: Option<&'a Tensor>,
    /// Every strip of the weight lies within one of them.
    pub(crate) targets: &'a [Target],
}

/// A packed left operand.
pub(crate) struct LeftOperand {
    block: Pooled,
    /// Of integer rows.
    scales: Option<Pooled>,
    panels: Panels,
    /// Bytes of one row.
    row_bytes: usize,
}

impl Engine {
    /// Packs `x`, normalized if asked, for `kernel`.
    pub(crate) fn pack_left(&self, x: &Tensor, norm: Option<&NormWeight>, kernel: &Kernel) -> LeftOperand {
        let panels = kernel.panels(x.rows());
        let (chunk, row_bytes) = (kernel.left_chunk(), kernel.tiles(x.cols()) * kernel.left_chunk());
        let block = self.pool.take(panels.total() * row_bytes);
        let integer = matches!(kernel.left, Left::Int8 | Left::Uint8);
        let scales = integer.then(|| self.pool.take(x.rows() * size_of::<f32>()));
        let out = Shared::new(block.as_ptr());
        let out_scales = scales.as_ref().map(|s| Shared::new(s.as_ptr().cast::<f32>()));
        self.threads.split(x.rows(), (1 << 14) / x.cols().max(1) + 1, |rows| {
            with_scratch(x.cols() * size_of::<f32>(), |scratch| {
                let normed = scratch.values_mut::<f32>(x.cols());
                for row in rows {
                    let values = match norm {
                        None => x.row(row),
                        Some(n) => {
                            norm_row(self.isa, n.kind, n.eps, &n.weight, &n.bias, x.row(row), normed);
                            &*normed
                        }
                    };
                    // SAFETY: rows of a panel interleave in chunks; each row has chunks of its own, inside the
                    // block, and one thread.
                    let place = unsafe { panels.place(row, out.get(), chunk, row_bytes) };
                    let scale = pack::left_row(self.isa, kernel.left, 1.0, values, place);
                    if let Some(scales) = out_scales {
                        // SAFETY: in bounds, and each row has one thread.
                        unsafe { scales.get().add(row).write(scale) };
                    }
                }
            });
        });
        LeftOperand { block, scales, panels, row_bytes }
    }

    /// `finish(norm(x) · wᵀ + bias)`. The shapes fit: `x` is `[rows, inputs]`.
    pub(crate) fn matmul(&self, x: &Tensor, norm: Option<&NormWeight>, weight: &Linear, finish: &Finish<'_>) {
        if x.rows() == 0 {
            return;
        }
        let kernel = weight.kernel;
        let left = self.pack_left(x, norm, kernel);
        let (panels, right_panels) = (left.panels, weight.panels());
        let chunks = |count: usize, most: usize| count.div_ceil(most.max(1));
        let row_chunks = chunks(panels.count, CHUNK_ROWS / kernel.max_rows);
        let mut column_chunks = chunks(right_panels, CHUNK_COLUMNS / kernel.columns());
        // Whole rounds of tasks for the threads, or small tasks where rounds are few.
        let threads = self.threads.count();
        let rounds = (row_chunks * column_chunks).div_ceil(threads).max(4);
        column_chunks = (rounds * threads).div_ceil(row_chunks).min(right_panels);
        self.threads.run(row_chunks * column_chunks, &|i| {
            let (column_chunk, row_chunk) = (i / row_chunks, i % row_chunks);
            let share = |count: usize, i: usize, of: usize| count * i / of..count * (i + 1) / of;
            self.task(
                &left,
                weight,
                finish,
                share(panels.count, row_chunk, row_chunks),
                share(right_panels, column_chunk, column_chunks),
            );
        });
    }

    /// Some row panels times some column panels.
    fn task(
        &self,
        left: &LeftOperand,
        weight: &Linear,
        finish: &Finish<'_>,
        rows: std::ops::Range<usize>,
        columns: std::ops::Range<usize>,
    ) {
        let kernel = weight.kernel;
        let (tiles, tile_values) = (weight.tiles(), kernel.max_rows * kernel.columns());
        // The division of depth must not depend on threads: it decides the order of additions.
        let blocks = tiles.div_ceil(kernel.block);
        let kept = if blocks > 1 { rows.len() * columns.len() } else { 1 };
        let scales = left.scales.as_ref().map(|s| s.values::<f32>(left.panels.start(left.panels.count)));
        with_scratch(kept * tile_values * size_of::<f32>(), |scratch| {
            let sums = scratch.values_mut::<f32>(kept * tile_values);
            (kernel.enter)();
            for block in 0..blocks {
                let depth = tiles * block / blocks..tiles * (block + 1) / blocks;
                for (j, column) in columns.clone().enumerate() {
                    for (i, panel) in rows.clone().enumerate() {
                        let slot = if blocks > 1 { j * rows.len() + i } else { 0 };
                        let sums = &mut sums[slot * tile_values..(slot + 1) * tile_values];
                        let (start, count) = (left.panels.start(panel), left.panels.len(panel));
                        let skipped = depth.start * left.panels.padded(panel) * kernel.left_chunk();
                        // SAFETY: the device's instruction set is present and `enter` was called; panel and
                        // depth lie within the operands, packed for this kernel; sums hold one tile.
                        unsafe {
                            let l = left.block.as_ptr().add(start * left.row_bytes + skipped);
                            let r = (column * tiles + depth.start) * kernel.right_tile();
                            let r = weight.right.as_ptr().add(r);
                            (kernel.micro)(count, depth.len(), l, r, sums.as_mut_ptr(), block == 0);
                        }
                        if block + 1 == blocks {
                            let scales = scales.map(|s| &s[start..start + count]);
                            finish_tile(
                                self.isa,
                                sums,
                                Place { row: start, count, panel: column },
                                scales,
                                weight,
                                finish,
                            );
                        }
                    }
                }
            }
            (kernel.leave)();
        });
    }
}

/// Where a tile of sums lies in the result.
#[derive(Clone, Copy)]
struct Place {
    row: usize,
    /// Rows.
    count: usize,
    /// Right panel.
    panel: usize,
}

#[inline(always)]
fn finish_body<const FMA: bool>(
    sums: &[f32],
    place: Place,
    scales: Option<&[f32]>,
    weight: &Linear,
    finish: &Finish<'_>,
) {
    match weight.kernel.strip {
        16 => finish_strips::<FMA, 16>(sums, place, scales, weight, finish),
        _ => finish_strips::<FMA, 8>(sums, place, scales, weight, finish),
    }
}

per_isa! {
    /// Scales, biases, activates, adds the residual and writes a tile.
    fn finish_tile(sums: &[f32], place: Place, scales: Option<&[f32]>, weight: &Linear, finish: &Finish<'_>) = finish_body
}

#[inline(always)]
fn finish_strips<const FMA: bool, const W: usize>(
    sums: &[f32],
    place: Place,
    scales: Option<&[f32]>,
    weight: &Linear,
    finish: &Finish<'_>,
) {
    let geglu = finish.activation == Some(Activation::Geglu);
    // GEGLU makes one strip of two.
    for half in 0..if geglu { 1 } else { 2 } {
        let strip = weight.strips[2 * place.panel + half];
        let Some(target) = finish.targets.iter().find(|t| (t.columns.0..t.columns.1).contains(&strip.column))
        else {
            continue;
        };
        if strip.count == 0 {
            continue;
        }
        let width = target.columns.1 - target.columns.0;
        for r in 0..place.count {
            let tile = &sums[r * 2 * W..(r + 1) * 2 * W];
            let scale = scales.map(|s| s[r]);
            let mut v = linear_strip::<W>(tile, half, scale, weight, place.panel);
            match finish.activation {
                None => {}
                Some(Activation::Gelu) => v.iter_mut().for_each(|v| *v = gelu::<FMA>(*v)),
                Some(Activation::Silu) => v.iter_mut().for_each(|v| *v = silu::<FMA>(*v)),
                Some(Activation::Geglu) => {
                    let up = linear_strip::<W>(tile, 1, scale, weight, place.panel);
                    v.iter_mut().zip(up).for_each(|(v, up)| *v = gelu::<FMA>(*v) * up);
                }
            }
            let row = place.row + r;
            if let Some(residual) = finish.residual {
                let residual = &residual.row(row % residual.rows())[strip.column..strip.column + strip.count];
                v.iter_mut().zip(residual).for_each(|(v, r)| *v += r);
            }
            let at = row * width + strip.column - target.columns.0;
            // SAFETY: the target is `[rows, width]` and the strip lies within it; each tile has one thread.
            let out = unsafe { std::slice::from_raw_parts_mut(target.out.get().add(at), strip.count) };
            match <&mut [f32; W]>::try_from(&mut *out) {
                Ok(out) => *out = v,
                Err(_) => out.copy_from_slice(&v[..strip.count]),
            }
        }
    }
}

/// One row of one strip of a tile as f32, with its bias.
#[inline(always)]
fn linear_strip<const W: usize>(
    tile: &[f32],
    half: usize,
    scale: Option<f32>,
    weight: &Linear,
    panel: usize,
) -> [f32; W] {
    let mut v = [0.0; W];
    v.copy_from_slice(&tile[half * W..(half + 1) * W]);
    let columns = (2 * panel + half) * W..(2 * panel + half + 1) * W;
    if let Some(scale) = scale {
        let scales = &weight.scales[columns.clone()];
        if weight.offsets.is_empty() {
            v.iter_mut().zip(scales).for_each(|(v, s)| *v = v.to_bits() as i32 as f32 * (scale * s));
        } else {
            let offsets = &weight.offsets[columns.clone()];
            v.iter_mut().zip(scales).zip(offsets).for_each(|((v, s), o)| {
                *v = (v.to_bits() as i32).wrapping_sub(*o) as f32 * (scale * s);
            });
        }
    }
    v.iter_mut().zip(&weight.bias[columns]).for_each(|(v, b)| *v += b);
    v
}
