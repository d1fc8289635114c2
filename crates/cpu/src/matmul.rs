//! The multiplication of activations with a packed weight: left operand packed with its norm, tiles of sums in
//! cache, and everything that follows done while they are there.

use std::cell::RefCell;
use std::ops::Range;

use crate::Isa;
use crate::epilogue::{Finish, Place, finish_tile};
use crate::kernels::{Kernel, Operands, Panels, Resident, pack};
use crate::memory::{Block, BlockPool, Pooled, Shared, fetch_all, look_up};
use crate::norm::RowNorm;
use crate::tensor::Tensor;
use crate::threads::{Threads, share};
use crate::weight::Linear;

/// Rows of one task at most; half as many where their sums must wait for another block of depth.
const CHUNK_ROWS: usize = 832;
/// With at most so many row panels the weight is hardly reused: it should pass from memory in one stream.
const FEW_PANELS: usize = 4;
/// How far ahead of its use, in bytes, such a stream is fetched: the processor's own prefetcher stops at each page
/// of 4 KB, and so far on it is already at work in the next one.
const AHEAD: usize = 3072;
/// Percent of the third-level cache that a weight may fill to be there still, beside all else, for the next rows.
const KEPT_PERCENT: usize = 38;
/// Columns of one task at most.
const CHUNK_COLUMNS: usize = 256;
/// The same where the left operand stays in the second-level cache: enough columns to pay for bringing it there.
const RESIDENT_COLUMNS: usize = 2048;
/// Row panels of one task where it is sums that must stay there, because depth comes in blocks.
const DEEP_ROWS: usize = 13;

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
    /// Bytes of second-level cache that a thread has.
    pub(crate) second_level: usize,
    /// Bytes of the cache behind it, if any, which threads share.
    pub(crate) third_level: usize,
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
    pub(crate) fn pack_left(&self, x: &Tensor, norm: Option<RowNorm<'_>>, kernel: &Kernel) -> LeftOperand {
        let panels = kernel.panels(x.rows());
        let (chunk, row_bytes) = (kernel.left_chunk(), kernel.tiles(x.cols()) * kernel.left_chunk());
        let block = self.pool.take(panels.total() * row_bytes);
        let scales = kernel.left.integer().then(|| self.pool.take(x.rows() * size_of::<f32>()));
        let out = Shared::new(block.as_ptr());
        let out_scales = scales.as_ref().map(|s| Shared::new(s.as_ptr().cast::<f32>()));
        self.threads.split(x.rows(), (1 << 14) / x.cols().max(1) + 1, |rows| {
            with_scratch(x.cols() * size_of::<f32>(), |scratch| {
                let normed = scratch.values_mut::<f32>(x.cols());
                for row in rows.clone() {
                    // Rows come from far away, and each lies in pages where no processor looks ahead.
                    if row + 1 < rows.end && panels.count > FEW_PANELS {
                        fetch_all(x.row(row + 1));
                    }
                    let values = match norm {
                        None => x.row(row),
                        Some(n) => {
                            n.apply(self.isa, row, x.row(row), normed);
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
    pub(crate) fn matmul(&self, x: &Tensor, norm: Option<RowNorm<'_>>, weight: &Linear, finish: &Finish<'_>) {
        if x.rows() == 0 {
            return;
        }
        let kernel = weight.kernel;
        let left = self.pack_left(x, norm, kernel);
        let (panels, right_panels) = (left.panels, weight.panels());
        let chunks = |count: usize, most: usize| count.div_ceil(most.max(1));
        let deep = weight.tiles() > kernel.block;
        let resident = |percent| self.second_level * percent / 100;
        let (most_rows, most_columns) = match kernel.resident {
            Some(Resident { percent, .. }) if deep => {
                (DEEP_ROWS, resident(percent) / DEEP_ROWS / kernel.tile())
            }
            Some(Resident { percent, .. }) => {
                let of_panel = kernel.max_rows * kernel.left_chunk() * weight.tiles();
                (resident(percent) / of_panel, RESIDENT_COLUMNS / kernel.columns())
            }
            None => {
                (CHUNK_ROWS / kernel.max_rows / (1 + usize::from(deep)), CHUNK_COLUMNS / kernel.columns())
            }
        };
        let row_chunks = chunks(panels.count, most_rows);
        // Whole rounds of tasks for the threads, or small tasks where rounds are few: smallest where the left operand
        // is, so that nothing is lost by bringing it to each.
        let threads = self.threads.count();
        let least = if panels.count <= FEW_PANELS { 8 } else { 4 };
        let rounds = (row_chunks * chunks(right_panels, most_columns)).div_ceil(threads).max(least);
        // A head that is rotated must be one task's.
        let unit = finish.rotate.as_ref().map_or(1, |r| r.rope.head_dim / kernel.columns());
        let units = right_panels / unit;
        let column_chunks = ((rounds * threads).div_ceil(row_chunks)..units)
            .find(|chunks| (row_chunks * chunks).is_multiple_of(threads))
            .unwrap_or(units);
        // A weight that stays in a cache may come again for other rows: then a thread keeps its rows.
        let rows_stay = weight.right.len() <= self.third_level * KEPT_PERCENT / 100;
        self.threads.run(row_chunks * column_chunks, &|i| {
            let (column_chunk, row_chunk) = match rows_stay {
                true => (i % column_chunks, i / column_chunks),
                false => (i / row_chunks, i % row_chunks),
            };
            let columns = share(units, column_chunk, column_chunks);
            let rows = share(panels.count, row_chunk, row_chunks);
            // Where no other rows use these columns, the next ones are most likely those that no thread has begun.
            let after = column_chunk + threads;
            let after = (row_chunks == 1 && after < column_chunks)
                .then(|| share(units, after, column_chunks).start * unit);
            self.task(&left, weight, finish, rows, columns.start * unit..columns.end * unit, after);
        });
    }

    /// Some row panels times some column panels, and the column panel that comes `after` them, which is fetched.
    fn task(
        &self,
        left: &LeftOperand,
        weight: &Linear,
        finish: &Finish<'_>,
        rows: Range<usize>,
        columns: Range<usize>,
        after: Option<usize>,
    ) {
        let kernel = weight.kernel;
        let (tiles, tile_values) = (weight.tiles(), kernel.tile() / size_of::<f32>());
        // Sums run over depth in order, whatever its division, so that no bit depends on it. A block's left operand
        // stays in the second-level cache, and in the first one a step of a right panel, which all row panels use.
        let few = rows.len() <= FEW_PANELS;
        // Where sums fill the second-level cache, the left operand must be a small guest there.
        let block_tiles = match &kernel.resident {
            Some(resident) if tiles > kernel.block && !few => resident.deep_block,
            _ => kernel.block,
        };
        let blocks = tiles.div_ceil(block_tiles);
        let step_tiles = if few { kernel.block } else { kernel.step };
        let steps = tiles.div_ceil(blocks).div_ceil(step_tiles);
        let kept = match (blocks, steps) {
            (1, 1) => 1,
            (1, _) => rows.len(),
            _ => rows.len() * columns.len(),
        };
        let scales = left.scales.as_ref().map(|s| s.values::<f32>(left.panels.start(left.panels.count)));
        // While the row panels take turns with a right panel, each fetches a share of the next one.
        let of_tile = kernel.right_tile() / 64;
        let share = of_tile.div_ceil(rows.len());
        let weights = |column: usize, tile: usize| {
            weight.right.as_ptr().wrapping_add((column * tiles + tile) * kernel.right_tile())
        };
        look_up(weights(columns.start, 0), tiles / blocks * kernel.right_tile());
        with_scratch(kept * tile_values * size_of::<f32>(), |scratch| {
            let sums = scratch.values_mut::<f32>(kept * tile_values);
            (kernel.enter)();
            for block in 0..blocks {
                let depth = tiles * block / blocks..tiles * (block + 1) / blocks;
                for (j, column) in columns.clone().enumerate() {
                    // How far on in the weight the panel after this one begins, if one is left.
                    let on = if column + 1 < columns.end {
                        Some(tiles.cast_signed())
                    } else if block + 1 < blocks {
                        Some(depth.len().cast_signed() - (j * tiles).cast_signed())
                    } else {
                        let past = |after: usize| ((after - column) * tiles - depth.start).cast_signed();
                        after.map(past)
                    };
                    let on = on.map(|on| on * kernel.right_tile().cast_signed());
                    if let Some(on) = on {
                        let next = weights(column, depth.start).wrapping_offset(on);
                        look_up(next, depth.len() * kernel.right_tile());
                    }
                    for step in 0..steps {
                        let from = depth.start + depth.len() * step / steps;
                        let to = depth.start + depth.len() * (step + 1) / steps;
                        for (i, panel) in rows.clone().enumerate() {
                            let (start, count) = (left.panels.start(panel), left.panels.len(panel));
                            let slot = (j * rows.len() + i) % kept;
                            let sums = &mut sums[slot * tile_values..][..tile_values];
                            let skipped = from * left.panels.padded(panel) * kernel.left_chunk();
                            let place = Place { row: start, count, panel: column };
                            if block + 1 == blocks {
                                finish.fetch_rows(weight, place, step, steps, few);
                            }
                            // SAFETY: the device's instruction set is present and `enter` was called; panel and
                            // depth lie within the operands, packed for this kernel; sums hold one tile.
                            unsafe {
                                let l = left.block.as_ptr().add(start * left.row_bytes + skipped);
                                let r = weights(column, from);
                                let shared = (i * share * (to - from) * 64).cast_signed();
                                let (lines, ahead) = match on {
                                    // One stream, which needs no asking.
                                    _ if kernel.fetches && rows.len() == 1 => (0, 0),
                                    _ if kernel.fetches => on.map_or((0, 0), |on| (share, on + shared)),
                                    _ if few && i == 0 => (of_tile, AHEAD.cast_signed()),
                                    Some(on) if !few => (share, on + shared),
                                    _ => (1, 0),
                                };
                                let next = r.wrapping_offset(ahead);
                                let operands = Operands { left: l, right: r, next, lines, tail: 0 };
                                let fresh = block == 0 && step == 0;
                                (kernel.micro)(count, to - from, operands, sums.as_mut_ptr(), fresh);
                            }
                            if block + 1 == blocks && step + 1 == steps {
                                let scales = scales.map(|s| &s[start..start + count]);
                                finish_tile(self.isa, sums, place, scales, weight, finish);
                            }
                        }
                    }
                    if block + 1 == blocks {
                        let all = left.panels.start(rows.start)..left.panels.start(rows.end);
                        finish.rotate_head(self.isa, (column + 1) * kernel.columns(), all);
                    }
                }
            }
            (kernel.leave)();
            #[cfg(target_arch = "x86_64")]
            if finish.streamed {
                // SAFETY: every x86-64 processor has this instruction; it orders streamed writes before the end of
                // the task.
                unsafe { std::arch::x86_64::_mm_sfence() };
            }
        });
    }
}
