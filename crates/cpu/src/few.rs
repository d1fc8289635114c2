//! Attention of few query rows, such as the one token that π0-FAST writes for each robot: packing keys and values for the
//! matrix kernels would cost more than the products do. They are read as they lie, in f32, once for all heads that share
//! them.
//!
//! Keys are cut into blocks of a fixed length, each with a softmax of its own; the blocks are brought together in order.
//! So no bit depends on the number of threads, nor on what other rows are there.
//!
//! The lanes of all vectors are pairs of a query row and a head: scores of a key, weights and sums of a column lie together
//! for [`LANES`] pairs, and no sum runs across a vector.

use std::array::from_fn;
use std::ops::Range;

use pi0_device::{Attention, KeyValue, Span};

use crate::math::{exp, fma, per_isa};
use crate::matmul::{Engine, with_scratch};
use crate::memory::{Shared, fetch};
use crate::tensor::Tensor;

/// Query rows of a span at most.
const FEW: usize = 4;
/// Keys of one task: few enough that the threads share evenly.
const BLOCK: usize = 64;
/// Pairs of a query row and a head that read a key together.
const LANES: usize = 8;
/// Keys, or columns of values, that are multiplied at once: as many sums as hide the time that one takes.
const TOGETHER: usize = 8;
/// Values in a cache line.
const LINE: usize = 16;

/// One value of each pair.
type Lanes = [f32; LANES];

/// Whether every span has so few query rows that this way is the shorter one.
pub(crate) fn suits(spec: &Attention<'_>) -> bool {
    spec.spans.iter().all(|span| span.queries.len() <= FEW)
}

/// A span's pairs that read one head of keys together.
struct Unit<'a> {
    span: &'a Span,
    kv_head: usize,
    /// Among the pairs of the span and this head of keys.
    pairs: Range<usize>,
    keys: usize,
    /// Where its blocks begin among those of all units.
    first: usize,
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
    let (mut blocks, mut most) = (0, 0);
    for span in spec.spans {
        let (keys, pairs) = (span.key_count(), span.queries.len() * group);
        for kv_head in 0..spec.kv_heads {
            for from in (0..pairs).step_by(LANES) {
                let pairs = from..pairs.min(from + LANES);
                units.push(Unit { span, kv_head, pairs, keys, first: blocks });
                blocks += keys.div_ceil(BLOCK);
                most = most.max(keys.div_ceil(BLOCK));
            }
        }
    }
    // Of each block and pair: maximum, sum, values.
    let width = 2 + dim;
    let partial = engine.pool.take(blocks * width * size_of::<Lanes>());
    let out = engine.pool.take(q.rows() * q.cols() * size_of::<f32>());
    let (to_partial, to_out) =
        (Shared::new(partial.as_ptr().cast::<Lanes>()), Shared::new(out.as_ptr().cast::<f32>()));
    // Row and first column of a pair in queries and result.
    let place = |unit: &Unit<'_>, pair: usize| {
        let head = unit.kv_head * group + pair % group;
        (unit.span.queries.start + pair / group, head * dim)
    };
    // The units take turns with each block: rows of one robot mostly see the same keys.
    engine.threads.run(most * units.len(), &|i| {
        let (block, unit) = (i / units.len(), &units[i % units.len()]);
        let keys = block * BLOCK..unit.keys.min((block + 1) * BLOCK);
        if keys.is_empty() {
            return;
        }
        // SAFETY: the memory has room for the parts of each block, whose task alone writes them.
        let part = unsafe {
            let at = to_partial.get().add((unit.first + block) * width);
            std::slice::from_raw_parts_mut(at, width)
        };
        let columns = unit.kv_head * dim..(unit.kv_head + 1) * dim;
        let mut k_rows = [[].as_slice(); BLOCK];
        let mut v_rows = [[].as_slice(); BLOCK];
        gather(kv, unit.span, keys.clone(), columns, &mut k_rows, &mut v_rows);
        let (k_rows, v_rows) = (&k_rows[..keys.len()], &v_rows[..keys.len()]);
        with_scratch((dim + BLOCK) * size_of::<Lanes>(), |scratch| {
            let (queries, weights) = scratch.values_mut::<Lanes>(dim + BLOCK).split_at_mut(dim);
            queries.fill([0.0; LANES]);
            for (lane, pair) in unit.pairs.clone().enumerate() {
                let (row, column) = place(unit, pair);
                for (to, x) in queries.iter_mut().zip(&q.row(row)[column..column + dim]) {
                    to[lane] = *x;
                }
            }
            block_of(engine.isa, queries, k_rows, v_rows, spec.scale, &mut weights[..k_rows.len()], part);
        });
    });
    engine.threads.split(units.len(), 1, |range| {
        for unit in &units[range] {
            let count = unit.keys.div_ceil(BLOCK);
            // SAFETY: written by the tasks above, which are over; nobody writes any more.
            let parts = unsafe {
                std::slice::from_raw_parts(to_partial.get().add(unit.first * width), count * width)
            };
            with_scratch(dim * size_of::<Lanes>(), |scratch| {
                let sums = scratch.values_mut::<Lanes>(dim);
                merge(engine.isa, parts, sums);
                for (lane, pair) in unit.pairs.clone().enumerate() {
                    let (row, column) = place(unit, pair);
                    // SAFETY: each pair belongs to one unit; inside the result's rows.
                    let out = unsafe {
                        std::slice::from_raw_parts_mut(to_out.get().add(row * q.cols() + column), dim)
                    };
                    out.iter_mut().zip(&*sums).for_each(|(out, sum)| *out = sum[lane]);
                }
            });
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

/// Scores of each pair against some keys.
#[inline(always)]
fn dots<const FMA: bool>(queries: &[Lanes], keys: [&[f32]; TOGETHER]) -> [Lanes; TOGETHER] {
    let keys = keys.map(|key| &key[..queries.len()]);
    let mut sums = [[0.0; LANES]; TOGETHER];
    for (d, query) in queries.iter().enumerate() {
        for (sum, key) in sums.iter_mut().zip(&keys) {
            *sum = from_fn(|lane| fma::<FMA>(key[d], query[lane], sum[lane]));
        }
    }
    sums
}

/// `COLUMNS` columns of values, each key's times each pair's weight.
#[inline(always)]
fn weigh<const FMA: bool, const COLUMNS: usize>(
    weights: &[Lanes],
    v_rows: &[&[f32]],
    at: usize,
) -> [Lanes; COLUMNS] {
    let mut sums = [[0.0; LANES]; COLUMNS];
    for (weights, row) in weights.iter().zip(v_rows) {
        let values: &[f32; COLUMNS] = row[at..at + COLUMNS].try_into().expect("as many");
        for (sum, value) in sums.iter_mut().zip(values) {
            *sum = from_fn(|lane| fma::<FMA>(*value, weights[lane], sum[lane]));
        }
    }
    sums
}

/// A comparison that NaN fails would drop it; it must come out.
#[inline(always)]
fn larger(a: f32, b: f32) -> f32 {
    if a > b { a } else { b }
}

/// Of each pair a part: maximum, sum of weights, weighted values.
#[inline(always)]
fn block_body<const FMA: bool>(
    queries: &[Lanes],
    k_rows: &[&[f32]],
    v_rows: &[&[f32]],
    scale: f32,
    weights: &mut [Lanes],
    part: &mut [Lanes],
) {
    let lines = |row: &[f32]| row.iter().step_by(LINE).for_each(|value| fetch(value));
    // Where all of it lies is looked up at once; the lines themselves are asked for row by row, in order.
    k_rows.iter().chain(v_rows).for_each(|row| fetch(row.as_ptr()));
    k_rows.iter().take(TOGETHER).for_each(|row| lines(row));
    for (at, scores) in (0..).step_by(TOGETHER).zip(weights.chunks_mut(TOGETHER)) {
        k_rows.iter().skip(at + TOGETHER).take(TOGETHER).for_each(|row| lines(row));
        v_rows.iter().skip(at).take(TOGETHER).for_each(|row| lines(row));
        let dots = dots::<FMA>(queries, from_fn(|i| k_rows[(at + i).min(k_rows.len() - 1)]));
        scores.iter_mut().zip(dots).for_each(|(scores, dots)| *scores = dots.map(|dot| dot * scale));
    }
    let mut max = [f32::NEG_INFINITY; LANES];
    for scores in &*weights {
        max = from_fn(|lane| larger(max[lane], scores[lane]));
    }
    let mut sum = [0.0; LANES];
    for scores in &mut *weights {
        *scores = from_fn(|lane| exp::<FMA>(scores[lane] - max[lane]));
        sum = from_fn(|lane| sum[lane] + scores[lane]);
    }
    let [max_part, sum_part, values @ ..] = part else { return };
    (*max_part, *sum_part) = (max, sum);
    let (whole, rest) = values.as_chunks_mut::<TOGETHER>();
    let done = whole.len() * TOGETHER;
    for (at, to) in (0..).step_by(TOGETHER).zip(whole) {
        *to = weigh::<FMA, TOGETHER>(weights, v_rows, at);
    }
    for (at, to) in (done..).zip(rest) {
        [*to] = weigh::<FMA, 1>(weights, v_rows, at);
    }
}

per_isa! {
    fn block_of(
        queries: &[Lanes],
        k_rows: &[&[f32]],
        v_rows: &[&[f32]],
        scale: f32,
        weights: &mut [Lanes],
        part: &mut [Lanes],
    ) = block_body
}

/// Brings the parts of all blocks together, each as long as `sums` and two more.
#[inline(always)]
fn merge_body<const FMA: bool>(parts: &[Lanes], sums: &mut [Lanes]) {
    let width = 2 + sums.len();
    let mut max = [f32::NEG_INFINITY; LANES];
    for part in parts.chunks_exact(width) {
        max = from_fn(|lane| larger(max[lane], part[0][lane]));
    }
    let fade = |part: &[Lanes]| -> Lanes { from_fn(|lane| exp::<FMA>(part[0][lane] - max[lane])) };
    let mut total = [0.0; LANES];
    for part in parts.chunks_exact(width) {
        let fade = fade(part);
        total = from_fn(|lane| fma::<FMA>(fade[lane], part[1][lane], total[lane]));
    }
    sums.fill([0.0; LANES]);
    for part in parts.chunks_exact(width) {
        let fade = fade(part);
        let share: Lanes = from_fn(|lane| fade[lane] / total[lane]);
        for (sum, value) in sums.iter_mut().zip(&part[2..]) {
            *sum = from_fn(|lane| fma::<FMA>(share[lane], value[lane], sum[lane]));
        }
    }
}

per_isa! {
    fn merge(parts: &[Lanes], sums: &mut [Lanes]) = merge_body
}

#[cfg(test)]
mod tests {
    use pi0_device::{Device, Keys, Reference, compare};

    use super::*;
    use crate::{Cpu, CpuOptions, Isa};

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
