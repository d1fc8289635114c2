//! Attention in blocks of keys, without a stored score matrix: running maximum and sum for each row.
//!
//! Keys and values of each span and key head are packed once as right operands. The left operand's rows are pairs
//! of a query row and one of the query heads that share the key head, so all of them use each packed key. Of many heads
//! with few keys each is one task, which packs for itself what it alone uses; else all threads pack first, and a task is
//! some row panels, which take turns with each block of keys while that is in the second-level cache.

use std::ops::Range;

use bytemuck::{Pod, Zeroable};
use pi0_device::{Attention, KeyValue, Span};

use crate::Isa;
use crate::kernels::{Kernel, Operands, Panels, pack};
use crate::math::per_isa;
use crate::matmul::{Engine, with_scratch};
use crate::memory::{Pooled, Shared, fetch_all};
use crate::softmax::{BlockLayout, MOST_KEYS as BLOCK, Softmax, softmax_block};
use crate::tensor::Tensor;
use crate::threads::share;

/// Row panels at most that take turns with a block of keys: their queries and sums share the cache with it.
const TOGETHER: usize = 8;

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
    /// Packing tasks and row tasks before this span.
    packs_before: usize,
    tasks_before: usize,
    /// Row panels of one key head, and the tasks that they are divided into.
    panels: usize,
    tasks: usize,
}

impl Unit {
    /// Packing tasks of one key head.
    fn packs(&self) -> usize {
        self.key_panels + self.value_tiles
    }

    /// Packed bytes of one key head.
    fn bytes(&self) -> usize {
        self.key_bytes + self.value_bytes
    }
}

/// One key head of a span.
#[derive(Clone, Copy)]
struct Head<'a> {
    span: &'a Span,
    unit: &'a Unit,
    kv_head: usize,
}

struct Plan<'a> {
    kernel: &'static Kernel,
    q: &'a Tensor,
    kv: &'a [KeyValue<'a, Tensor>],
    spec: &'a Attention<'a>,
    /// A [`Unit`] for each span, in memory of the pool.
    units: Pooled,
    /// Whether each task is a whole head, which it packs for itself.
    alone: bool,
    bytes: usize,
    packs: usize,
    tasks: usize,
    /// Depth tiles and right panels of one head.
    dim_tiles: usize,
    dim_panels: usize,
    threads: usize,
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
        let (mut bytes, mut packs, mut panels, mut most) = (0, 0, 0, 0);
        let group = spec.heads / spec.kv_heads;
        let mut units = engine.pool.take(spec.spans.len() * size_of::<Unit>());
        let each = units.block_mut().values_mut::<Unit>(spec.spans.len());
        for (span, unit) in spec.spans.iter().zip(&mut *each) {
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
                panels: kernel.panels(span.queries.len() * group).count,
                tasks_before: 0,
                tasks: 0,
            };
            bytes += spec.kv_heads * unit.bytes();
            packs += spec.kv_heads * unit.packs();
            panels += spec.kv_heads * unit.panels;
            most = most.max(unit.bytes());
        }
        let threads = engine.threads.count();
        let alone = spec.spans.len() * spec.kv_heads >= 4 * threads && most <= engine.second_level / 4;
        let wanted = panels.div_ceil(TOGETHER).max(panels.min(2 * threads)).max(1);
        let of_task = panels.div_ceil(wanted).max(1);
        let mut tasks = 0;
        for unit in each {
            unit.tasks_before = tasks;
            unit.tasks = if alone { unit.panels.min(1) } else { unit.panels.div_ceil(of_task) };
            tasks += spec.kv_heads * unit.tasks;
        }
        Self { kernel, q, kv, spec, units, alone, bytes, packs, tasks, dim_tiles, dim_panels, threads }
    }

    fn units(&self) -> &[Unit] {
        self.units.values(self.spec.spans.len())
    }

    /// The head that something of number `index` belongs to, and its number within the head. `before` counts what is
    /// before a span, and `of` what one of its heads has.
    fn head(
        &self,
        index: usize,
        before: impl Fn(&Unit) -> usize,
        of: impl Fn(&Unit) -> usize,
    ) -> (Head<'_>, usize) {
        let at = self.units().partition_point(|u| before(u) <= index) - 1;
        let (span, unit) = (&self.spec.spans[at], &self.units()[at]);
        let (index, each) = (index - before(unit), of(unit));
        (Head { span, unit, kv_head: index / each }, index % each)
    }

    /// The columns of a key head in keys and values.
    fn columns(&self, kv_head: usize) -> Range<usize> {
        kv_head * self.spec.head_dim..(kv_head + 1) * self.spec.head_dim
    }

    /// The keys or values of one head that a span's keys from `first` on have.
    fn key_rows<'r>(&'r self, head: Head<'_>, first: usize, values: bool, out: &mut [&'r [f32]]) {
        let columns = self.columns(head.kv_head);
        let (mut skip, mut out) = (first, out.iter_mut());
        for run in &head.span.keys {
            let part = &self.kv[run.part];
            let tensor = if values { part.v } else { part.k };
            let rows = run.rows.clone().skip(skip);
            skip = skip.saturating_sub(run.rows.len());
            for row in rows {
                let Some(out) = out.next() else { return };
                *out = &tensor.row(row)[columns.clone()];
            }
        }
    }

    /// Packs one panel of keys or one depth tile of values of a head.
    ///
    /// # Safety
    /// `to` is the head's packed memory, and nothing else uses this part of it.
    unsafe fn pack(&self, isa: Isa, head: Head<'_>, index: usize, to: *mut u8) {
        let (kernel, dim, unit) = (self.kernel, self.spec.head_dim, head.unit);
        let half = kernel.right_tile() / 2;
        // SAFETY: within the head's memory, and nobody else's.
        let tile = |offset: usize| unsafe { std::slice::from_raw_parts_mut(to.add(offset), half) };
        const MOST_DEPTH: usize = 64;
        let (mut heads, mut rows) = ([[].as_slice(); MOST_DEPTH], [[].as_slice(); MOST_DEPTH]);
        if index < unit.key_panels {
            for side in 0..2 {
                let first = (2 * index + side) * kernel.strip;
                let count = unit.keys.saturating_sub(first).min(kernel.strip);
                let heads = &mut heads[..count];
                self.key_rows(head, first, false, heads);
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
            self.key_rows(head, first, true, heads);
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

    /// The same of all heads' parts by number, each in its head's share of the block.
    fn pack_shared(&self, isa: Isa, index: usize, packed: Shared<u8>) {
        let (head, index) = self.head(index, |u| u.packs_before, Unit::packs);
        // SAFETY: the head's share of the block; each part has one thread.
        unsafe {
            self.pack(isa, head, index, packed.get().add(head.unit.start + head.kv_head * head.unit.bytes()))
        }
    }

    /// Asks for a share of what the task `index` will read from f32 rows, if there is such a task: each row lies in a
    /// page of its own, where no processor looks ahead.
    fn fetch_head(&self, index: usize, part: usize, parts: usize) {
        if index >= self.tasks {
            return;
        }
        let (head, _) = self.head(index, |u| u.tasks_before, |u| u.tasks);
        let keys = share(head.unit.keys, part, parts);
        let mut rows = [[].as_slice(); BLOCK];
        for values in [false, true] {
            for first in keys.clone().step_by(BLOCK) {
                let rows = &mut rows[..(keys.end - first).min(BLOCK)];
                self.key_rows(head, first, values, rows);
                rows.iter().for_each(|row| fetch_all(row));
            }
        }
        let group = self.spec.heads / self.spec.kv_heads;
        let columns = self.columns(head.kv_head);
        let queries = share(head.span.queries.len(), part, parts);
        for row in head.span.queries.start + queries.start..head.span.queries.start + queries.end {
            fetch_all(&self.q.row(row)[columns.start * group..columns.end * group]);
        }
    }

    /// Attention of some row panels of a head.
    fn task(&self, engine: &Engine, index: usize, packed: Shared<u8>, out: Shared<f32>) {
        let (head, piece) = self.head(index, |u| u.tasks_before, |u| u.tasks);
        let (kernel, unit) = (self.kernel, head.unit);
        let group = self.spec.heads / self.spec.kv_heads;
        let all = kernel.panels(head.span.queries.len() * group);
        let panels = share(all.count, piece, unit.tasks);
        let together = if self.alone { 1 } else { panels.len() };
        let own = if self.alone { unit.bytes() } else { 0 };
        let tile = kernel.tile();
        let queries = (kernel.max_rows * self.dim_tiles * kernel.left_chunk()).next_multiple_of(64);
        let weights = kernel.max_rows * BLOCK * kernel.left.size();
        let sizes = [
            own,
            together * queries,
            weights,
            BLOCK / kernel.columns() * tile,
            together * self.dim_panels * tile,
        ];
        with_scratch(sizes.iter().sum(), |scratch| {
            let (own, rest) = scratch.values_mut::<u8>(sizes.iter().sum()).split_at_mut(sizes[0]);
            let (queries_of, rest) = rest.split_at_mut(sizes[1]);
            let (weights, rest) = rest.split_at_mut(sizes[2]);
            let (scores, sums) = rest.split_at_mut(sizes[3]);
            let scores: &mut [f32] = bytemuck::cast_slice_mut(scores);
            let sums: &mut [f32] = bytemuck::cast_slice_mut(sums);
            let packed = if self.alone {
                for part in 0..unit.packs() {
                    // SAFETY: this task's memory, as much as the head takes.
                    unsafe { self.pack(engine.isa, head, part, own.as_mut_ptr()) };
                }
                own.as_ptr()
            } else {
                // SAFETY: the head's share of the block.
                unsafe { packed.get().add(unit.start + head.kv_head * unit.bytes()).cast_const() }
            };
            for first in panels.clone().step_by(together) {
                if self.alone {
                    self.fetch_head(index + self.threads, first, all.count);
                }
                let panels = first..(first + together).min(panels.end);
                for (panel, to) in panels.clone().zip(queries_of.chunks_exact_mut(queries)) {
                    self.pack_queries(engine.isa, head, all, panel, to);
                }
                let mut states: [Softmax; TOGETHER] = Default::default();
                (kernel.enter)();
                for block in (0..unit.keys).step_by(BLOCK) {
                    let operands =
                        queries_of.chunks_exact(queries).zip(sums.chunks_exact_mut(sizes[4] / together / 4));
                    for ((panel, state), (queries, sums)) in panels.clone().zip(&mut states).zip(operands) {
                        let rows = (all.len(panel), all.padded(panel));
                        // SAFETY: `packed` holds this head, which nobody writes any more.
                        unsafe {
                            self.block(
                                engine.isa, unit, block, rows, packed, queries, scores, weights, state, sums,
                            )
                        };
                    }
                }
                (kernel.leave)();
                for ((panel, state), sums) in
                    panels.clone().zip(&states).zip(sums.chunks_exact(sizes[4] / together / 4))
                {
                    self.write(engine.isa, head, [all.start(panel), all.len(panel)], state, sums, out);
                }
            }
        });
    }

    /// The query row and the first column of a row of the left operand.
    fn place(&self, head: Head<'_>, row: usize) -> (usize, usize) {
        let group = self.spec.heads / self.spec.kv_heads;
        (head.span.queries.start + row / group, (head.kv_head * group + row % group) * self.spec.head_dim)
    }

    fn pack_queries(&self, isa: Isa, head: Head<'_>, panels: Panels, panel: usize, to: &mut [u8]) {
        let (chunk, padded) = (self.kernel.left_chunk(), panels.padded(panel));
        assert!(padded * chunk * self.dim_tiles <= to.len());
        for r in 0..panels.len(panel) {
            let (row, column) = self.place(head, panels.start(panel) + r);
            let q = &self.q.row(row)[column..column + self.spec.head_dim];
            // SAFETY: chunk `r` of each depth tile lies within the panel by the assertion, one row at a time.
            let to = unsafe {
                pack::Row::new(to.as_mut_ptr().add(r * chunk), chunk, padded * chunk, self.dim_tiles)
            };
            pack::left_row(isa, self.kernel.left, self.spec.scale, q, to);
        }
    }

    /// One panel of rows and one block of keys.
    ///
    /// # Safety
    /// The kernel is entered; `packed` holds the head of `unit`.
    #[allow(clippy::too_many_arguments)] // a panel's buffers, all different
    unsafe fn block(
        &self,
        isa: Isa,
        unit: &Unit,
        block: usize,
        (rows, padded): (usize, usize),
        packed: *const u8,
        queries: &[u8],
        scores: &mut [f32],
        weights: &mut [u8],
        state: &mut Softmax,
        sums: &mut [f32],
    ) {
        let kernel = self.kernel;
        let (columns, tile) = (kernel.columns(), kernel.tile() / size_of::<f32>());
        let lines = usize::from(!kernel.fetches);
        let count = (unit.keys - block).min(BLOCK);
        let (dims, tail) = kernel.depth_of(self.spec.head_dim);
        for (i, scores) in scores.chunks_exact_mut(tile).enumerate().take(count.div_ceil(columns)) {
            let panel = (block / columns + i) * self.dim_tiles * kernel.right_tile();
            // SAFETY: the instruction set is present and entered; the panel of keys lies within the packed head;
            // queries and scores hold a panel and a tile.
            unsafe {
                let keys = packed.add(panel);
                let operands = Operands { left: queries.as_ptr(), right: keys, next: keys, lines, tail };
                (kernel.micro)(rows, dims, operands, scores.as_mut_ptr(), true);
            }
        }
        let (tiles, chunk) = (kernel.tiles(count), kernel.left_chunk());
        let layout = BlockLayout { rows, padded, count, columns, tile, chunk, tiles, first: block == 0 };
        softmax_block(isa, kernel.left, layout, state, scores, weights, sums);
        let (depth, tail) = kernel.depth_of(count);
        for (i, sums) in sums.chunks_exact_mut(tile).enumerate() {
            let t = i * unit.value_tiles + block / kernel.depth();
            // SAFETY: as above; the weights hold as many depth tiles of the rows.
            unsafe {
                let values = packed.add(unit.key_bytes + t * kernel.right_tile());
                let operands = Operands { left: weights.as_ptr(), right: values, next: values, lines, tail };
                (kernel.micro)(rows, depth, operands, sums.as_mut_ptr(), block == 0);
            }
        }
    }

    /// Writes a panel of `count` rows, of which `first` is the first.
    fn write(
        &self,
        isa: Isa,
        head: Head<'_>,
        [first, count]: [usize; 2],
        state: &Softmax,
        sums: &[f32],
        out: Shared<f32>,
    ) {
        let (columns, tile) = (self.kernel.columns(), self.kernel.tile() / size_of::<f32>());
        for r in 0..count {
            let (row, column) = self.place(head, first + r);
            // SAFETY: each pair of query row and head belongs to one task; inside the result's rows.
            let out = unsafe {
                let at = row * self.q.cols() + column;
                std::slice::from_raw_parts_mut(out.get().add(at), self.spec.head_dim)
            };
            scaled_row(isa, &sums[r * columns..], [tile, columns], 1.0 / state.sum[r], out);
        }
    }
}

#[inline(always)]
fn scaled_row_body<const FMA: bool>(sums: &[f32], [tile, columns]: [usize; 2], by: f32, out: &mut [f32]) {
    for (out, sums) in out.chunks_mut(columns).zip(sums.chunks(tile)) {
        out.iter_mut().zip(sums).for_each(|(o, s)| *o = s * by);
    }
}

per_isa! {
    /// A row of the result from its sums, of which each `tile` values hold as many columns, times a factor.
    fn scaled_row(sums: &[f32], layout: [usize; 2], by: f32, out: &mut [f32]) = scaled_row_body
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
    let to_out = Shared::new(out.as_ptr().cast::<f32>());
    let packed = engine.pool.take(if plan.alone { 0 } else { plan.bytes });
    let to_packed = Shared::new(packed.as_ptr());
    if !plan.alone {
        let pieces = plan.packs.div_ceil(4);
        engine.threads.run(pieces, &|i| {
            share(plan.packs, i, pieces).for_each(|i| plan.pack_shared(engine.isa, i, to_packed));
        });
    }
    engine.threads.run(plan.tasks, &|i| plan.task(engine, i, to_packed, to_out));
    Tensor::new(out, q.rows(), q.cols())
}
