//! What follows a product while its sums are in the nearest cache: scales, biases, activations, rotary embedding,
//! gates, residuals, and writing the result where it goes.

#[cfg(target_arch = "x86_64")]
mod avx512;

use std::ops::Range;

use pi0_device::{Activation, Modulation};

use crate::Isa;
use crate::math::{fma, gelu, per_isa, silu};
use crate::memory::{Shared, fetch, fetch_to_write};
use crate::rope::Rope;
use crate::tensor::Tensor;
use crate::threads::share;
use crate::weight::Linear;

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
    /// Multiplies what is added to the residual, which has a row for each row then.
    pub(crate) gate: Option<Modulation<'a, Tensor>>,
    /// Every strip of the weight lies within one of them.
    pub(crate) targets: &'a [Target],
    /// Whether the result is too large to stay in a cache until it is read.
    pub(crate) streamed: bool,
    /// Of queries and keys. The weight has whole panels, and a head is some of them.
    pub(crate) rotate: Option<Rotate<'a>>,
}

/// Rotary position embedding of the first columns of a result.
pub(crate) struct Rotate<'a> {
    pub(crate) rope: &'a Rope<'a>,
    /// One past the last column rotated.
    pub(crate) until: usize,
}

impl Target {
    fn width(&self) -> usize {
        self.columns.1 - self.columns.0
    }
}

impl Finish<'_> {
    /// The target that a column belongs to.
    #[inline(always)]
    fn target(&self, column: usize) -> Option<&Target> {
        self.targets.iter().find(|t| (t.columns.0..t.columns.1).contains(&column))
    }

    /// Asks for a share of what will be added to a tile, whose sums take so many steps, and of where it goes, unless the
    /// rows are `few`, whose results stay near: else each row would wait for it.
    pub(crate) fn fetch_rows(&self, weight: &Linear, place: Place, step: usize, steps: usize, few: bool) {
        let rows = share(place.count, step, steps);
        let strips = &weight.strips[2 * place.panel..2 * place.panel + 2];
        if let Some(residual) = self.residual {
            for r in rows.clone() {
                let row = residual.row((place.row + r) % residual.rows());
                strips.iter().filter_map(|strip| row.get(strip.column)).for_each(|value| fetch(value));
            }
        }
        if self.streamed || few {
            return;
        }
        // GEGLU makes one strip of two.
        let strips = if self.activation == Some(Activation::Geglu) { &strips[..1] } else { strips };
        for strip in strips {
            let Some(target) = self.target(strip.column) else { continue };
            for r in rows.clone() {
                let at = (place.row + r) * target.width() + strip.column - target.columns.0;
                fetch_to_write(target.out.get().wrapping_add(at));
            }
        }
    }

    /// Rotates the head that ends with column `end`, if it is one to rotate, in these rows.
    pub(crate) fn rotate_head(&self, isa: Isa, end: usize, rows: Range<usize>) {
        let Some(Rotate { rope, until }) = self.rotate else { return };
        let dim = rope.head_dim;
        let Some(target) = self.target(end - 1) else { return };
        if end > until || !(end - target.columns.0).is_multiple_of(dim) {
            return;
        }
        for row in rows {
            let at = row * target.width() + end - dim - target.columns.0;
            // SAFETY: the target is `[rows, width]` and the head lies within it; its task alone uses it until the
            // end.
            rope.rotate(isa, row, unsafe { std::slice::from_raw_parts_mut(target.out.get().add(at), dim) });
        }
    }
}

/// Where a tile of sums lies in the result.
#[derive(Clone, Copy)]
pub(crate) struct Place {
    pub(crate) row: usize,
    /// Rows.
    pub(crate) count: usize,
    /// Right panel.
    pub(crate) panel: usize,
}

#[inline(always)]
fn finish_body<const FMA: bool>(
    sums: &mut [f32],
    place: Place,
    scales: Option<&[f32]>,
    weight: &Linear,
    finish: &Finish<'_>,
) {
    match weight.kernel.strip {
        16 => finish_strips::<FMA, 16, 32>(sums, place, scales, weight, finish),
        _ => finish_strips::<FMA, 8, 16>(sums, place, scales, weight, finish),
    }
}

per_isa! {
    fn any_finish_tile(sums: &mut [f32], place: Place, scales: Option<&[f32]>, weight: &Linear, finish: &Finish<'_>) = finish_body
}

/// Scales, biases, activates, gates, adds the residual and writes a tile.
pub(crate) fn finish_tile(
    isa: Isa,
    sums: &mut [f32],
    place: Place,
    scales: Option<&[f32]>,
    weight: &Linear,
    finish: &Finish<'_>,
) {
    #[cfg(target_arch = "x86_64")]
    if isa >= Isa::Avx512 && weight.kernel.strip == avx512::STRIP {
        // SAFETY: the device's instruction set was found present when it was opened.
        return unsafe { avx512::finish_tile(sums, place, scales, weight, finish) };
    }
    any_finish_tile(isa, sums, place, scales, weight, finish);
}

/// In stages over the whole tile, which is in the nearest cache: long loops that become vectors. `W` is the width
/// of a strip and `C` of the tile.
#[inline(always)]
fn finish_strips<const FMA: bool, const W: usize, const C: usize>(
    sums: &mut [f32],
    place: Place,
    scales: Option<&[f32]>,
    weight: &Linear,
    finish: &Finish<'_>,
) {
    let (rows, _) = sums.as_chunks_mut::<C>();
    let rows = &mut rows[..place.count];
    let columns = place.panel * C..(place.panel + 1) * C;
    if let Some(scales) = scales {
        let of_columns = &weight.scales[columns.clone()];
        let mut offsets = [0; C];
        if !weight.offsets.is_empty() {
            offsets.copy_from_slice(&weight.offsets[columns.clone()]);
        }
        for (row, scale) in rows.iter_mut().zip(scales) {
            for c in 0..C {
                row[c] = (row[c].to_bits() as i32).wrapping_sub(offsets[c]) as f32 * (scale * of_columns[c]);
            }
        }
    }
    if weight.biased {
        let bias = &weight.bias[columns];
        for row in rows.iter_mut() {
            for c in 0..C {
                row[c] += bias[c];
            }
        }
    }
    match finish.activation {
        None => {}
        Some(Activation::Gelu) => rows.as_flattened_mut().iter_mut().for_each(|v| *v = gelu::<FMA>(*v)),
        Some(Activation::Silu) => rows.as_flattened_mut().iter_mut().for_each(|v| *v = silu::<FMA>(*v)),
        Some(Activation::Geglu) => {
            for row in rows.iter_mut() {
                let (gate, up) = row.split_at_mut(W);
                for c in 0..W {
                    gate[c] = gelu::<FMA>(gate[c]) * up[c];
                }
            }
        }
    }
    // GEGLU made one strip of two.
    let halves = if finish.activation == Some(Activation::Geglu) { 1 } else { 2 };
    for half in 0..halves {
        let strip = weight.strips[2 * place.panel + half];
        let Some(target) = finish.target(strip.column) else { continue };
        let width = target.width();
        let streamed = finish.streamed && width.is_multiple_of(16);
        for (r, row) in rows.iter().enumerate() {
            let v = &row[half * W..half * W + W];
            let at = (place.row + r) * width + strip.column - target.columns.0;
            // SAFETY: the target is `[rows, width]` and the strip lies within it; each tile has one thread.
            let out = unsafe { std::slice::from_raw_parts_mut(target.out.get().add(at), strip.count) };
            match finish.residual {
                None if streamed && strip.count == W => stream::<W>(out, v),
                None => write::<W>(out, v, [v, v], |v, [_, _]| v),
                Some(residual) => {
                    let columns = strip.column..strip.column + strip.count;
                    let row = &residual.row((place.row + r) % residual.rows())[columns.clone()];
                    match finish.gate {
                        None => write::<W>(out, v, [row, row], |v, [r, _]| r + v),
                        // As the device's `gated_add` does it, to the bit.
                        Some(by) => {
                            let gates = &by.table.row(by.rows[place.row + r] as usize)[2 * width..];
                            write::<W>(out, v, [row, &gates[columns]], |v, [r, g]| fma::<FMA>(g, v, r));
                        }
                    }
                }
            }
        }
    }
}

/// Writes a whole strip past the caches, where the processor can.
#[inline(always)]
fn stream<const W: usize>(out: &mut [f32], v: &[f32]) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_mm_loadu_ps, _mm_stream_ps};
        assert!(out.len() == W && v.len() == W && out.as_ptr().addr().is_multiple_of(16));
        for c in (0..W).step_by(4) {
            // SAFETY: in bounds and aligned by the assertion; every x86-64 processor has these instructions. The
            // task's fence orders these writes before any use of the result.
            unsafe { _mm_stream_ps(out.as_mut_ptr().add(c), _mm_loadu_ps(v.as_ptr().add(c))) };
        }
    }
    #[cfg(not(target_arch = "x86_64"))]
    out.copy_from_slice(v);
}

/// `out[c] = f(v[c], [x[c], y[c]])`; whole strips, the common case, as one vector.
#[inline(always)]
fn write<const W: usize>(out: &mut [f32], v: &[f32], [x, y]: [&[f32]; 2], f: impl Fn(f32, [f32; 2]) -> f32) {
    if out.len() == W && x.len() == W && y.len() == W && v.len() == W {
        for c in 0..W {
            out[c] = f(v[c], [x[c], y[c]]);
        }
    } else {
        let others = x.iter().zip(y);
        out.iter_mut().zip(v).zip(others).for_each(|((o, &v), (&x, &y))| *o = f(v, [x, y]));
    }
}

#[cfg(all(test, target_arch = "x86_64"))]
mod tests {
    use pi0_device::MemoryMeter;

    use super::*;
    use crate::kernels::{Kernel, Packed};
    use crate::memory::{Block, BlockPool};
    use crate::weight::Strip;

    const ROWS: usize = 3;

    fn value(i: usize) -> f32 {
        match i % 97 {
            5 => f32::NAN,
            6 => 1e9,
            7 => -1e9,
            n => (n as f32 - 48.0) * 0.21,
        }
    }

    fn tensor(pool: &BlockPool, rows: usize, cols: usize) -> Tensor {
        let mut block = pool.take(rows * cols * 4);
        block
            .block_mut()
            .values_mut::<f32>(rows * cols)
            .iter_mut()
            .enumerate()
            .for_each(|(i, x)| *x = value(i));
        Tensor::new(block, rows, cols)
    }

    /// Two panels: one whole, of the other five columns and a strip that only fills it up.
    fn layer(integer: bool, biased: bool, paired: bool) -> Linear {
        let meter = MemoryMeter::default();
        let kernel = Kernel::of(Isa::Avx512, if integer { Packed::Int8 } else { Packed::F32 });
        let strip = |column, count| Strip { column, count };
        let strips = match paired {
            true => vec![strip(0, 16), strip(21, 16), strip(16, 5), strip(37, 5)],
            false => vec![strip(0, 16), strip(16, 16), strip(32, 5), strip(0, 0)],
        };
        let each = |f: fn(usize) -> f32| (0..64).map(f).collect::<Vec<f32>>();
        Linear {
            kernel,
            inputs: 1,
            outputs: if paired { 42 } else { 37 },
            strips,
            paired,
            right: Block::new(1).into(),
            filling: None,
            bias: each(|i| i as f32 * 0.1 - 3.0),
            biased,
            scales: if integer { each(|i| i as f32 * 0.01 + 0.1) } else { vec![] },
            offsets: if integer { (0..64).map(|i| i * 3 - 90).collect() } else { vec![] },
            _held: meter.hold(0),
        }
    }

    #[test]
    fn registers_give_the_bits_of_stages() {
        if !Isa::Avx512.is_present() {
            return;
        }
        let pool = BlockPool::new(MemoryMeter::default());
        let by_rows: Vec<u32> = (0..2 * ROWS as u32).map(|i| i % 2).collect();
        let cases = [false, true].into_iter().flat_map(|integer| {
            [false, true].into_iter().flat_map(move |biased| (0..4).map(move |a| (integer, biased, a)))
        });
        for (integer, biased, activation) in cases {
            let activation =
                [None, Some(Activation::Gelu), Some(Activation::Silu), Some(Activation::Geglu)][activation];
            let paired = activation == Some(Activation::Geglu);
            let weight = layer(integer, biased, paired);
            let width = if paired { 21 } else { 37 };
            // Of as many rows, of rows that repeat, and with gates.
            let (residual, repeated) = (tensor(&pool, 2 * ROWS, width), tensor(&pool, 2, width));
            let table = tensor(&pool, 2, 3 * width);
            let gate = Modulation { table: &table, rows: &by_rows };
            let others = [
                (None, None),
                (Some(&residual), None),
                (Some(&repeated), None),
                (Some(&residual), Some(gate)),
            ];
            for (panel, (residual, gate)) in (0..2).flat_map(|panel| others.map(|o| (panel, o))) {
                let scales = [0.5, 2.0, 1e-3];
                let run = |isa: Isa, stages: bool| {
                    let mut out = vec![7.0f32; 2 * ROWS * width];
                    let target = Target { columns: (0, width), out: Shared::new(out.as_mut_ptr()) };
                    let finish = Finish {
                        activation,
                        residual,
                        gate,
                        targets: &[target],
                        streamed: false,
                        rotate: None,
                    };
                    let place = Place { row: ROWS, count: ROWS, panel };
                    let mut sums: Vec<f32> = (0..ROWS * 32)
                        .map(|i| if integer { f32::from_bits((i * 37) as u32) } else { value(i) })
                        .collect();
                    let scales = integer.then_some(scales.as_slice());
                    match stages {
                        true => any_finish_tile(isa, &mut sums, place, scales, &weight, &finish),
                        false => finish_tile(isa, &mut sums, place, scales, &weight, &finish),
                    }
                    out
                };
                let (got, want) = (run(Isa::Avx512, false), run(Isa::Avx512, true));
                let same = |(a, b): (&f32, &f32)| a.to_bits() == b.to_bits() || a.is_nan() && b.is_nan();
                let what = (integer, biased, activation, panel, residual.map(Tensor::rows), gate.is_some());
                assert!(got.iter().zip(&want).all(same), "{what:?}: {got:?} {want:?}");
                assert!(got[..ROWS * width].iter().all(|&x| x == 7.0), "{what:?}");
            }
        }
    }
}
