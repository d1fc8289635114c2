//! Attention in blocks of keys, without a stored score matrix: running maximum and sum for each row.
//!
//! Keys and values of each span and key head are packed once as right operands. The left operand's rows are pairs
//! of a query row and one of the query heads that share the key head, so all of them use each packed key.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use pi0_device::{Attention, KeyValue, Span};

use crate::kernels::{Kernel, Operands, pack};
use crate::matmul::{Engine, with_scratch};
use crate::memory::{Pooled, Shared};
use crate::softmax::{BlockLayout, MOST_KEYS as BLOCK, Softmax, softmax_block};
use crate::tensor::Tensor;

/// One span seen by one kernel.
#[derive(Clone, Copy, Pod, Zeroable)]
#[repr(C)]
struct Unit {
    keys: usize,
    /// Right panels of keys, and depth tiles of values.
    key_panels: usize,
    value_tiles: usize,
    /// Bytes, for one key head, of packed keys and of packed values.
    key_bytes: usize,
    value_bytes: usize,
    /// Where the first key head's keys start.
    start: usize,
    /// Packing tasks and row panels before this span.
    packs_before: usize,
    panels_before: usize,
    /// Row panels of one key head.
    panels: usize,
}

struct Plan<'a> {
    kernel: &'static Kernel,
    q: &'a Tensor,
    kv: &'a [KeyValue<'a, Tensor>],
    spec: &'a Attention<'a>,
    /// A [`Unit`] for each span, in memory of the pool.
    units: Pooled,
    bytes: usize,
    packs: usize,
    panels: usize,
    /// Depth tiles and right panels of one head.
    dim_tiles: usize,
    dim_panels: usize,
}

impl<'a> Plan<'a> {
    fn new(
        engine: &Engine,
        kernel: &'static Kernel,
        q: &'a Tensor,
        kv: &'a [KeyValue<'a, Tensor>],
        spec: &'a Attention<'a>,
    ) -> Self {
        let dim_tiles = kernel.tiles(spec.head_dim);
        let dim_panels = spec.head_dim.div_ceil(kernel.columns());
        let (mut bytes, mut packs, mut panels) = (0, 0, 0);
        let group = spec.heads / spec.kv_heads;
        let mut units = engine.pool.take(spec.spans.len() * size_of::<Unit>());
        let each = units.block_mut().values_mut::<Unit>(spec.spans.len());
        for (span, unit) in spec.spans.iter().zip(each) {
            let keys = span.key_count();
            let (key_panels, value_tiles) = (keys.div_ceil(kernel.columns()), kernel.tiles(keys));
            *unit = Unit {
                keys,
                key_panels,
                value_tiles,
                key_bytes: key_panels * dim_tiles * kernel.right_tile(),
                value_bytes: dim_panels * value_tiles * kernel.right_tile(),
                start: bytes,
                packs_before: packs,
                panels_before: panels,
                panels: kernel.panels(span.queries.len() * group).count,
            };
            bytes += spec.kv_heads * (unit.key_bytes + unit.value_bytes);
            packs += spec.kv_heads * (key_panels + value_tiles);
            panels += spec.kv_heads * unit.panels;
        }
        Self { kernel, q, kv, spec, units, bytes, packs, panels, dim_tiles, dim_panels }
    }

    fn units(&self) -> &[Unit] {
        self.units.values(self.spec.spans.len())
    }

    /// The keys or values of one head that a span's keys from `first` on have.
    fn key_rows(&self, span: &Span, first: usize, kv_head: usize, values: bool, out: &mut [&'a [f32]]) {
        let columns = kv_head * self.spec.head_dim..(kv_head + 1) * self.spec.head_dim;
        let runs = span.keys.iter().flat_map(|run| {
            let part = &self.kv[run.part];
            let tensor = if values { part.v } else { part.k };
            run.rows.clone().map(move |row| (tensor, row))
        });
        for (out, (tensor, row)) in out.iter_mut().zip(runs.skip(first)) {
            *out = &tensor.row(row)[columns.clone()];
        }
    }

    /// Packs one panel of keys or one depth tile of values.
    fn pack(&self, isa: crate::Isa, index: usize, packed: Shared<u8>) {
        let at = self.units().partition_point(|u| u.packs_before <= index) - 1;
        let (span, unit) = (&self.spec.spans[at], &self.units()[at]);
        let each = unit.key_panels + unit.value_tiles;
        let (kv_head, index) = ((index - unit.packs_before) / each, (index - unit.packs_before) % each);
        let (kernel, dim) = (self.kernel, self.spec.head_dim);
        let start = unit.start + kv_head * (unit.key_bytes + unit.value_bytes);
        let half = kernel.right_tile() / 2;
        let tile = |offset: usize| {
            // SAFETY: within this span's and head's share of the block; each task writes tiles of its own.
            unsafe { std::slice::from_raw_parts_mut(packed.get().add(start + offset), half) }
        };
        const MOST_DEPTH: usize = 64;
        let (mut heads, mut rows) = ([[].as_slice(); MOST_DEPTH], [[].as_slice(); MOST_DEPTH]);
        if index < unit.key_panels {
            for side in 0..2 {
                let first = (2 * index + side) * kernel.strip;
                let count = unit.keys.saturating_sub(first).min(kernel.strip);
                let heads = &mut heads[..count];
                self.key_rows(span, first, kv_head, false, heads);
                for t in 0..self.dim_tiles {
                    let depth = t * kernel.depth()..dim.min((t + 1) * kernel.depth());
                    rows.iter_mut().zip(&*heads).for_each(|(row, head)| *row = &head[depth.clone()]);
                    let offset = (index * self.dim_tiles + t) * kernel.right_tile() + side * half;
                    pack::right_tile(isa, kernel, &rows[..count], &[], tile(offset));
                }
            }
        } else {
            let t = index - unit.key_panels;
            let first = t * kernel.depth();
            let count = (unit.keys - first).min(kernel.depth());
            let heads = &mut heads[..count];
            self.key_rows(span, first, kv_head, true, heads);
            for strip in 0..2 * self.dim_panels {
                let columns = (strip * kernel.strip).min(dim)..((strip + 1) * kernel.strip).min(dim);
                rows.iter_mut().zip(&*heads).for_each(|(row, head)| *row = &head[columns.clone()]);
                let offset = unit.key_bytes
                    + (strip / 2 * unit.value_tiles + t) * kernel.right_tile()
                    + strip % 2 * half;
                pack::right_tile_across(isa, kernel, &rows[..count], tile(offset));
            }
        }
    }

    /// Attention of one panel of rows.
    fn panel(&self, engine: &Engine, index: usize, packed: *const u8, out: Shared<f32>) {
        let at = self.units().partition_point(|u| u.panels_before <= index) - 1;
        let (span, unit) = (&self.spec.spans[at], &self.units()[at]);
        let (kv_head, index) =
            ((index - unit.panels_before) / unit.panels, (index - unit.panels_before) % unit.panels);
        let (kernel, dim) = (self.kernel, self.spec.head_dim);
        let group = self.spec.heads / self.spec.kv_heads;
        let panels = kernel.panels(span.queries.len() * group);
        let (first, rows, padded) = (panels.start(index), panels.len(index), panels.padded(index));
        // The query row and the first column of a row of the left operand.
        let place = |r: usize| {
            let r = first + r;
            (span.queries.start + r / group, (kv_head * group + r % group) * dim)
        };
        let columns = kernel.columns();
        let chunk = kernel.left_chunk();
        let tile = kernel.max_rows * columns * size_of::<f32>();
        let queries = (padded * self.dim_tiles * chunk).next_multiple_of(64);
        let weights = padded * BLOCK * kernel.left.size();
        let scores = BLOCK / columns * tile;
        let sizes = [queries, weights, scores, self.dim_panels * tile];
        with_scratch(sizes.iter().sum(), |scratch| {
            let (queries, rest) = scratch.values_mut::<u8>(sizes.iter().sum()).split_at_mut(sizes[0]);
            let (weights, rest) = rest.split_at_mut(sizes[1]);
            let (scores, sums) = rest.split_at_mut(sizes[2]);
            let scores: &mut [f32] = bytemuck::cast_slice_mut(scores);
            let sums: &mut [f32] = bytemuck::cast_slice_mut(sums);
            let mut state = Softmax::default();
            for r in 0..rows {
                let (row, column) = place(r);
                let q = &self.q.row(row)[column..column + dim];
                // SAFETY: chunk `r` of each depth tile lies within the panel, one row at a time.
                let to = unsafe {
                    pack::Row::new(queries.as_mut_ptr().add(r * chunk), chunk, padded * chunk, self.dim_tiles)
                };
                pack::left_row(engine.isa, kernel.left, self.spec.scale, q, to);
            }
            let start = unit.start + kv_head * (unit.key_bytes + unit.value_bytes);
            (kernel.enter)();
            for block in (0..unit.keys).step_by(BLOCK) {
                let count = (unit.keys - block).min(BLOCK);
                for (i, scores) in scores.chunks_exact_mut(tile / 4).enumerate().take(count.div_ceil(columns))
                {
                    let panel = (block / columns + i) * self.dim_tiles * kernel.right_tile();
                    // SAFETY: the instruction set is present and entered; the panel of keys lies within the packed
                    // block; queries and scores hold a panel and a tile.
                    unsafe {
                        let keys = packed.add(start + panel);
                        let operands = Operands { left: queries.as_ptr(), right: keys, next: keys, lines: 1 };
                        (kernel.micro)(rows, self.dim_tiles, operands, scores.as_mut_ptr(), true);
                    }
                }
                let tiles = kernel.tiles(count);
                let layout = BlockLayout {
                    rows,
                    padded,
                    count,
                    columns,
                    tile: tile / 4,
                    chunk,
                    tiles,
                    first: block == 0,
                };
                softmax_block(engine.isa, kernel.left, layout, &mut state, scores, weights, sums);
                for (i, sums) in sums.chunks_exact_mut(tile / 4).enumerate() {
                    let t = i * unit.value_tiles + block / kernel.depth();
                    // SAFETY: as above, for a panel of values from the block's first key on.
                    unsafe {
                        let values = packed.add(start + unit.key_bytes + t * kernel.right_tile());
                        let operands =
                            Operands { left: weights.as_ptr(), right: values, next: values, lines: 1 };
                        (kernel.micro)(rows, tiles, operands, sums.as_mut_ptr(), block == 0);
                    }
                }
            }
            (kernel.leave)();
            for r in 0..rows {
                let (row, column) = place(r);
                // SAFETY: each pair of query row and head belongs to one task; inside the result's rows.
                let out = unsafe {
                    let at = row * self.q.cols() + column;
                    std::slice::from_raw_parts_mut(out.get().add(at), dim)
                };
                let inverse = 1.0 / state.sum[r];
                for (out, sums) in out.chunks_mut(columns).zip(sums.chunks_exact(tile / 4)) {
                    let sums = &sums[r * columns..];
                    out.iter_mut().zip(sums).for_each(|(o, s)| *o = s * inverse);
                }
            }
        });
    }
}

/// See [`pi0_device::Device::attention`]; the geometry is checked.
pub(crate) fn attention(
    engine: &Engine,
    kernel: &'static Kernel,
    q: &Tensor,
    kv: &[KeyValue<'_, Tensor>],
    spec: &Attention<'_>,
) -> Tensor {
    let out = engine.pool.take(q.rows() * q.cols() * size_of::<f32>());
    let plan = Plan::new(engine, kernel, q, kv, spec);
    let packed = engine.pool.take(plan.bytes);
    let (to_packed, to_out) = (Shared::new(packed.as_ptr()), Shared::new(out.as_ptr().cast::<f32>()));
    let pieces = plan.packs.div_ceil(4);
    engine
        .threads
        .run(pieces, &|i| share(plan.packs, i, pieces).for_each(|i| plan.pack(engine.isa, i, to_packed)));
    engine.threads.run(plan.panels, &|i| plan.panel(engine, i, to_packed.get(), to_out));
    Tensor::new(out, q.rows(), q.cols())
}

fn share(count: usize, i: usize, of: usize) -> Range<usize> {
    count * i / of..count * (i + 1) / of
}
