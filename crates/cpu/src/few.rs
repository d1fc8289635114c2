//! Attention of few query rows, such as the one token that π0-FAST writes for each robot: packing keys and values for the
//! matrix kernels would cost more than the products do. They are read as they lie, in f32, once for all heads that share
//! them.
//!
//! Keys are cut into blocks of a fixed length, each with a softmax of its own; the blocks are brought together in order.
//! So no bit depends on the number of threads.

use std::ops::Range;

use pi0_device::{Attention, KeyValue, Span};

use crate::Isa;
use crate::math::{exp, fma, per_isa, sum_lanes};
use crate::matmul::{Engine, with_scratch};
use crate::memory::Shared;
use crate::tensor::Tensor;

/// Query rows of a span at most.
const FEW: usize = 4;
/// Keys of one task: few enough that the threads share evenly.
const BLOCK: usize = 64;
/// Query rows, of all heads, that read a key together.
const TOGETHER: usize = 8;
/// Values that are multiplied at once.
const LANES: usize = 16;

/// Whether every span has so few query rows that this way is the shorter one.
pub(crate) fn suits(spec: &Attention<'_>) -> bool {
    spec.spans.iter().all(|span| span.queries.len() <= FEW)
}

/// A span's keys for one head of keys: cut into blocks.
struct Unit<'a> {
    span: &'a Span,
    kv_head: usize,
    keys: usize,
    /// Its first block among those of all units.
    first: usize,
}

/// One query row and head, over one block of keys: the largest score, the weights' sum, and their sum of values.
#[derive(Clone, Copy)]
struct Part {
    max: f32,
    sum: f32,
}

/// See [`pi0_device::Device::attention`]; the geometry is checked.
pub(crate) fn attention(
    engine: &Engine,
    q: &Tensor,
    kv: &[KeyValue<'_, Tensor>],
    spec: &Attention<'_>,
) -> Tensor {
    let group = spec.heads / spec.kv_heads;
    let dim = spec.head_dim;
    let mut units = Vec::with_capacity(spec.spans.len() * spec.kv_heads);
    let mut blocks = 0;
    for span in spec.spans {
        let keys = span.key_count();
        for kv_head in 0..spec.kv_heads {
            units.push(Unit { span, kv_head, keys, first: blocks });
            blocks += keys.div_ceil(BLOCK);
        }
    }
    // Of each block and query row of its unit: maximum, sum, values.
    let width = 2 + dim;
    let most = FEW * group;
    let partial = engine.pool.take(blocks * most * width * size_of::<f32>());
    let out = engine.pool.take(q.rows() * q.cols() * size_of::<f32>());
    let (to_partial, to_out) =
        (Shared::new(partial.as_ptr().cast::<f32>()), Shared::new(out.as_ptr().cast::<f32>()));
    let unit_of = |block: usize| &units[units.partition_point(|u| u.first <= block) - 1];
    engine.threads.run(blocks, &|block| {
        let unit = unit_of(block);
        let start = (block - unit.first) * BLOCK;
        let keys = start..unit.keys.min(start + BLOCK);
        let rows = unit.span.queries.len() * group;
        // SAFETY: the block has room for the parts of each task, which alone writes them.
        let parts = unsafe {
            std::slice::from_raw_parts_mut(to_partial.get().add(block * most * width), rows * width)
        };
        let columns = unit.kv_head * dim..(unit.kv_head + 1) * dim;
        let query = |r: usize| {
            let head = unit.kv_head * group + r % group;
            &q.row(unit.span.queries.start + r / group)[head * dim..(head + 1) * dim]
        };
        let mut k_rows = [[].as_slice(); BLOCK];
        let mut v_rows = [[].as_slice(); BLOCK];
        gather(kv, unit.span, keys.clone(), columns, &mut k_rows, &mut v_rows);
        let (k_rows, v_rows) = (&k_rows[..keys.len()], &v_rows[..keys.len()]);
        with_scratch(TOGETHER * BLOCK * size_of::<f32>(), |scratch| {
            let weights = scratch.values_mut::<f32>(TOGETHER * BLOCK);
            for from in (0..rows).step_by(TOGETHER) {
                let count = (rows - from).min(TOGETHER);
                let queries: [&[f32]; TOGETHER] = std::array::from_fn(|i| query(from + i.min(count - 1)));
                let parts = &mut parts[from * width..(from + count) * width];
                block_of(engine.isa, &queries, k_rows, v_rows, spec.scale, weights, parts);
            }
        });
    });
    let rows_of = |unit: &Unit<'_>| unit.span.queries.len() * group;
    engine.threads.split(units.len(), 4, |range| {
        for unit in &units[range] {
            let count = unit.keys.div_ceil(BLOCK);
            for r in 0..rows_of(unit) {
                let head = unit.kv_head * group + r % group;
                let at = (unit.span.queries.start + r / group) * q.cols() + head * dim;
                // SAFETY: each pair of query row and head belongs to one unit; inside the result's rows.
                let out = unsafe { std::slice::from_raw_parts_mut(to_out.get().add(at), dim) };
                let part = |block: usize| {
                    let at = ((unit.first + block) * most + r) * width;
                    // SAFETY: written by the task of that block, which is over; nobody writes any more.
                    unsafe { std::slice::from_raw_parts(to_partial.get().add(at), width) }
                };
                merge(engine.isa, count, &part, out);
            }
        }
    });
    Tensor::new(out, q.rows(), q.cols())
}

/// The rows of some of a span's keys and their values.
fn gather<'a>(
    kv: &'a [KeyValue<'a, Tensor>],
    span: &Span,
    keys: Range<usize>,
    columns: Range<usize>,
    k_rows: &mut [&'a [f32]],
    v_rows: &mut [&'a [f32]],
) {
    let (mut skip, mut at) = (keys.start, 0);
    for run in &span.keys {
        let rows = run.rows.clone().skip(skip);
        skip = skip.saturating_sub(run.rows.len());
        for row in rows {
            if at == keys.len() {
                return;
            }
            let part = &kv[run.part];
            k_rows[at] = &part.k.row(row)[columns.clone()];
            v_rows[at] = &part.v.row(row)[columns.clone()];
            at += 1;
        }
    }
}

/// Scores of up to [`TOGETHER`] query rows against one key.
#[inline(always)]
fn dots<const FMA: bool>(queries: &[&[f32]; TOGETHER], key: &[f32]) -> [f32; TOGETHER] {
    let mut lanes = [[0.0f32; LANES]; TOGETHER];
    let whole = key.len() / LANES * LANES;
    for at in (0..whole).step_by(LANES) {
        let k: &[f32; LANES] = key[at..at + LANES].try_into().expect("as many");
        for (lanes, query) in lanes.iter_mut().zip(queries) {
            let q: &[f32; LANES] = query[at..at + LANES].try_into().expect("as many");
            for i in 0..LANES {
                lanes[i] = fma::<FMA>(q[i], k[i], lanes[i]);
            }
        }
    }
    for (lanes, query) in lanes.iter_mut().zip(queries) {
        for (i, (q, k)) in query[whole..].iter().zip(&key[whole..]).enumerate() {
            lanes[i] = fma::<FMA>(*q, *k, lanes[i]);
        }
    }
    lanes.map(sum_lanes)
}

/// Values of up to [`TOGETHER`] rows in `COLUMNS` columns, each key's times its weight.
#[inline(always)]
fn weigh<const FMA: bool, const COLUMNS: usize>(
    weights: &[f32],
    v_rows: &[&[f32]],
    at: usize,
) -> [[f32; COLUMNS]; TOGETHER] {
    let mut sums = [[0.0f32; COLUMNS]; TOGETHER];
    for (k, row) in v_rows.iter().enumerate() {
        let v: &[f32; COLUMNS] = row[at..at + COLUMNS].try_into().expect("as many");
        let weights = &weights[k * TOGETHER..(k + 1) * TOGETHER];
        for (sums, &weight) in sums.iter_mut().zip(weights) {
            for i in 0..COLUMNS {
                sums[i] = fma::<FMA>(weight, v[i], sums[i]);
            }
        }
    }
    sums
}

/// Of each query row a part: maximum, sum of weights, weighted values.
#[inline(always)]
fn block_body<const FMA: bool>(
    queries: &[&[f32]; TOGETHER],
    k_rows: &[&[f32]],
    v_rows: &[&[f32]],
    scale: f32,
    weights: &mut [f32],
    parts: &mut [f32],
) {
    let dim = queries[0].len();
    let width = 2 + dim;
    for (key, scores) in k_rows.iter().zip(weights.chunks_exact_mut(TOGETHER)) {
        scores.copy_from_slice(&dots::<FMA>(queries, key).map(|dot| dot * scale));
    }
    let used = &mut weights[..k_rows.len() * TOGETHER];
    let mut state = [Part { max: f32::NEG_INFINITY, sum: 0.0 }; TOGETHER];
    for scores in used.chunks_exact(TOGETHER) {
        for (part, &score) in state.iter_mut().zip(scores) {
            // A comparison that NaN fails would drop it; it must come out.
            part.max = if part.max > score { part.max } else { score };
        }
    }
    for scores in used.chunks_exact_mut(TOGETHER) {
        for (part, score) in state.iter_mut().zip(scores) {
            *score = exp::<FMA>(*score - part.max);
            part.sum += *score;
        }
    }
    for (part, state) in parts.chunks_exact_mut(width).zip(state) {
        (part[0], part[1]) = (state.max, state.sum);
    }
    // With as many rows their sums just fit into the registers.
    const COLUMNS: usize = LANES;
    let mut at = 0;
    while at + COLUMNS <= dim {
        let sums = weigh::<FMA, COLUMNS>(used, v_rows, at);
        for (part, sums) in parts.chunks_exact_mut(width).zip(&sums) {
            part[2 + at..2 + at + COLUMNS].copy_from_slice(sums);
        }
        at += COLUMNS;
    }
    while at < dim {
        let sums = weigh::<FMA, 1>(used, v_rows, at);
        for (part, sums) in parts.chunks_exact_mut(width).zip(&sums) {
            part[2 + at] = sums[0];
        }
        at += 1;
    }
}

per_isa! {
    fn block_of(
        queries: &[&[f32]; TOGETHER],
        k_rows: &[&[f32]],
        v_rows: &[&[f32]],
        scale: f32,
        weights: &mut [f32],
        parts: &mut [f32],
    ) = block_body
}

/// Brings the parts of all blocks together.
fn merge<'a>(isa: Isa, count: usize, part: &dyn Fn(usize) -> &'a [f32], out: &mut [f32]) {
    // NaN wins.
    let larger = |a: f32, b: f32| if a > b { a } else { b };
    let max = (0..count).map(|i| part(i)[0]).fold(f32::NEG_INFINITY, larger);
    let fade = |i: usize| exp::<false>(part(i)[0] - max);
    let sum: f32 = (0..count).map(|i| fade(i) * part(i)[1]).sum();
    out.fill(0.0);
    for i in 0..count {
        add_part(isa, fade(i) / sum, &part(i)[2..], out);
    }
}

#[inline(always)]
fn add_part_body<const FMA: bool>(factor: f32, values: &[f32], out: &mut [f32]) {
    out.iter_mut().zip(values).for_each(|(o, &v)| *o = fma::<FMA>(factor, v, *o));
}

per_isa! {
    fn add_part(factor: f32, values: &[f32], out: &mut [f32]) = add_part_body
}

#[cfg(test)]
mod tests {
    use pi0_device::{Device, Keys, Reference, compare};

    use super::*;
    use crate::{Cpu, CpuOptions};

    fn values(n: usize, seed: u64) -> Vec<f32> {
        let mut state = seed;
        let next = || {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        };
        std::iter::repeat_with(next).take(n).collect()
    }

    /// What a device makes of queries and of the keys and values of each part.
    fn attend<D: Device>(
        device: &D,
        q: &[f32],
        parts: &[(Vec<f32>, Vec<f32>)],
        spec: &Attention<'_>,
    ) -> Vec<f32> {
        let up = |data: &[f32], heads: usize| {
            let cols = heads * spec.head_dim;
            device.upload(data.len() / cols, cols, data).unwrap()
        };
        let q = up(q, spec.heads);
        let kv: Vec<_> = parts.iter().map(|(k, v)| (up(k, spec.kv_heads), up(v, spec.kv_heads))).collect();
        let kv: Vec<_> = kv.iter().map(|(k, v)| KeyValue { k, v }).collect();
        device.download(&device.attention(&q, &kv, spec).unwrap()).unwrap().data
    }

    /// Every instruction set against the definition: odd widths, several heads of keys, keys of three tensors in runs that
    /// begin and end inside blocks, and rows beside each other whose spans differ.
    #[test]
    fn agrees_with_the_definition() {
        for (heads, kv_heads, head_dim) in [(8, 1, 32), (6, 2, 26), (4, 4, 64), (3, 1, 7)] {
            let (width, kv_width) = (heads * head_dim, kv_heads * head_dim);
            let sizes = [5, 300, 140];
            let q = values(5 * width, 1);
            let parts: Vec<_> = sizes
                .iter()
                .map(|&n| (values(n * kv_width, 2), values(n * kv_width, 3 + n as u64)))
                .collect();
            let run = |part, rows| Keys { part, rows };
            let spans = [
                Span { queries: 0..1, keys: vec![run(1, 3..300), run(2, 0..1), run(0, 0..1)] },
                Span { queries: 1..2, keys: vec![run(0, 1..2)] },
                Span {
                    queries: 2..5,
                    keys: vec![run(1, 0..127), run(1, 200..201), run(2, 10..140), run(0, 2..5)],
                },
            ];
            let spec = Attention { heads, kv_heads, head_dim, scale: 0.3, spans: &spans };
            assert!(suits(&spec));
            let want = attend(&Reference, &q, &parts, &spec);
            for isa in Isa::available() {
                let results = [1, 2].map(|threads| {
                    let options =
                        CpuOptions { isa: Some(isa), threads: Some(threads), ..CpuOptions::default() };
                    let cpu = Cpu::new(options).unwrap();
                    attend(&cpu, &q, &parts, &spec)
                });
                assert_eq!(results[0], results[1], "{isa}: threads");
                let agreement = compare(&results[0], &want);
                assert!(agreement.relative_l2 < 1e-6, "{isa} {heads} {kv_heads} {head_dim}: {agreement}");
            }
        }
    }

    #[test]
    fn what_is_no_number_comes_out() {
        let cpu = Cpu::new(CpuOptions::default()).unwrap();
        let up = |data: &[f32]| cpu.upload(data.len() / 4, 4, data).unwrap();
        let spans = [Span { queries: 0..1, keys: vec![Keys { part: 0, rows: 0..200 }] }];
        let spec = Attention { heads: 1, kv_heads: 1, head_dim: 4, scale: 1.0, spans: &spans };
        let (mut k, v) = (values(800, 1), values(800, 2));
        k[7] = f32::NAN;
        let (q, k, v) = (up(&values(4, 3)), up(&k), up(&v));
        let y = cpu.download(&cpu.attention(&q, &[KeyValue { k: &k, v: &v }], &spec).unwrap()).unwrap();
        assert!(y.data.iter().all(|x| x.is_nan()), "{:?}", y.data);
    }
}
