//! The same with AVX-512, a row of a strip in a register from the sums to the result: to the bit what
//! [`super::finish_body`] gives.

use std::arch::x86_64::*;

use pi0_device::Activation;

use super::{Finish, Place};
use crate::math::{EXP2, GELU, MAGIC};
use crate::weight::Linear;

/// Columns of a strip: one register.
pub(super) const STRIP: usize = 16;

/// What turns a strip's sums into values.
#[derive(Clone, Copy)]
struct Columns {
    scales: __m512,
    offsets: __m512i,
    bias: __m512,
}

/// Where the rows of a strip go, and what is added to them.
struct Rows<'a> {
    finish: &'a Finish<'a>,
    place: Place,
    /// Of the row `place.row` and the strip's first column, and the distance of rows.
    out: *mut f32,
    width: usize,
    /// Of the strip's columns.
    mask: __mmask16,
    /// The strip's first column in the residual.
    column: usize,
    streamed: bool,
}

#[target_feature(enable = "avx512f")]
fn load(values: &[f32]) -> __m512 {
    assert!(values.len() >= STRIP);
    // SAFETY: as many values by the assertion.
    unsafe { _mm512_loadu_ps(values.as_ptr()) }
}

/// `x / (1 + 2^u)` as [`crate::math`] has it, to the bit.
#[target_feature(enable = "avx512f")]
fn logistic(x: __m512, u: __m512) -> __m512 {
    let set = |x| _mm512_set1_ps(x);
    // The second operand is what a comparison with NaN gives.
    let u = _mm512_min_ps(set(127.0), _mm512_max_ps(set(-126.0), u));
    let shifted = _mm512_add_ps(u, set(MAGIC));
    let r = _mm512_sub_ps(u, _mm512_sub_ps(shifted, set(MAGIC)));
    let mut p = set(EXP2[0]);
    for &c in &EXP2[1..] {
        p = _mm512_fmadd_ps(p, r, set(c));
    }
    let whole = _mm512_slli_epi32::<23>(_mm512_castps_si512(shifted));
    let power = _mm512_castsi512_ps(_mm512_add_epi32(_mm512_castps_si512(p), whole));
    _mm512_div_ps(x, _mm512_add_ps(set(1.0), power))
}

/// [`crate::math::gelu`], to the bit.
#[target_feature(enable = "avx512f")]
fn gelu(x: __m512) -> __m512 {
    let [linear, cubed] = GELU.map(|x| _mm512_set1_ps(x));
    logistic(x, _mm512_mul_ps(x, _mm512_fmadd_ps(_mm512_mul_ps(x, x), cubed, linear)))
}

/// [`crate::math::silu`], to the bit.
#[target_feature(enable = "avx512f")]
fn silu(x: __m512) -> __m512 {
    logistic(x, _mm512_mul_ps(x, _mm512_set1_ps(-std::f32::consts::LOG2_E)))
}

impl Columns {
    /// Those of the strip whose first column in the layout is `at`.
    #[target_feature(enable = "avx512f")]
    fn new(weight: &Linear, at: usize) -> Self {
        let integer = !weight.scales.is_empty();
        let scales = if integer { load(&weight.scales[at..]) } else { _mm512_set1_ps(1.0) };
        let offsets = match weight.offsets.get(at..at + STRIP) {
            // SAFETY: as many values by the range.
            Some(offsets) => unsafe { _mm512_loadu_si512(offsets.as_ptr().cast()) },
            None => _mm512_setzero_si512(),
        };
        let bias = if weight.biased { load(&weight.bias[at..]) } else { _mm512_setzero_ps() };
        Self { scales, offsets, bias }
    }

    /// A row's values from its sums: integers where `INTEGER`, with the row's scale. `BIASED` is the weight's.
    #[target_feature(enable = "avx512f")]
    fn values<const INTEGER: bool, const BIASED: bool>(&self, sums: &[f32], scale: f32) -> __m512 {
        let mut x = load(sums);
        if INTEGER {
            let whole = _mm512_sub_epi32(_mm512_castps_si512(x), self.offsets);
            let scale = _mm512_mul_ps(_mm512_set1_ps(scale), self.scales);
            x = _mm512_mul_ps(_mm512_cvtepi32_ps(whole), scale);
        }
        if BIASED {
            x = _mm512_add_ps(x, self.bias);
        }
        x
    }
}

impl<'a> Rows<'a> {
    /// Those of one strip of a tile; none for one that only fills a panel.
    fn new(weight: &Linear, finish: &'a Finish<'a>, place: Place, half: usize) -> Option<Self> {
        let strip = weight.strips[2 * place.panel + half];
        let target = finish.target(strip.column).filter(|_| strip.count > 0)?;
        let width = target.width();
        let column = strip.column - target.columns.0;
        let out = target.out.get().wrapping_add(place.row * width + column);
        let mask = if strip.count >= STRIP { u16::MAX } else { (1 << strip.count) - 1 };
        let whole = mask == u16::MAX && width.is_multiple_of(STRIP) && out.addr().is_multiple_of(64);
        let streamed = finish.streamed && finish.residual.is_none() && whole;
        Some(Self { finish, place, out, width, mask, column: strip.column, streamed })
    }

    /// Adds the residual to row `r` of the tile and writes it.
    #[target_feature(enable = "avx512f")]
    fn write(&self, r: usize, mut x: __m512) {
        let row = self.place.row + r;
        if let Some(residual) = self.finish.residual {
            let rows = residual.rows();
            let before = residual.row(if row < rows { row } else { row % rows });
            // SAFETY: the residual has the result's columns, and masked loads touch only those of the strip.
            let before = unsafe { _mm512_maskz_loadu_ps(self.mask, before[self.column..].as_ptr()) };
            x = match self.finish.gate {
                None => _mm512_add_ps(before, x),
                // As the device's `gated_add` does it, to the bit.
                Some(by) => {
                    let gates = &by.table.row(by.rows[row] as usize)[2 * self.width + self.column..];
                    // SAFETY: as above: a row of modulations is scale, shift and gate of each column.
                    let gates = unsafe { _mm512_maskz_loadu_ps(self.mask, gates.as_ptr()) };
                    _mm512_fmadd_ps(gates, x, before)
                }
            };
        }
        // SAFETY: the target is `[rows, width]` and the strip lies within it; each tile has one thread. A streamed strip
        // is whole and aligned, and the task's fence orders it before any use of the result.
        unsafe {
            let out = self.out.add(r * self.width);
            if self.streamed {
                _mm512_stream_ps(out, x);
            } else {
                _mm512_mask_storeu_ps(out, self.mask, x);
            }
        }
    }
}

/// Scales, biases, activates, gates, adds the residual and writes a tile of strips of 16 columns.
#[target_feature(enable = "avx512f")]
pub(super) fn finish_tile(
    sums: &[f32],
    place: Place,
    scales: Option<&[f32]>,
    weight: &Linear,
    finish: &Finish<'_>,
) {
    match (scales, weight.biased) {
        (None, false) => rows::<false, false>(sums, place, &[], weight, finish),
        (None, true) => rows::<false, true>(sums, place, &[], weight, finish),
        (Some(scales), false) => rows::<true, false>(sums, place, scales, weight, finish),
        (Some(scales), true) => rows::<true, true>(sums, place, scales, weight, finish),
    }
}

#[target_feature(enable = "avx512f")]
fn rows<const INTEGER: bool, const BIASED: bool>(
    sums: &[f32],
    place: Place,
    scales: &[f32],
    weight: &Linear,
    finish: &Finish<'_>,
) {
    let at = 2 * STRIP * place.panel;
    let columns = [Columns::new(weight, at), Columns::new(weight, at + STRIP)];
    let rows = &sums.as_chunks::<{ 2 * STRIP }>().0[..place.count];
    let scale = |r: usize| if INTEGER { scales[r] } else { 1.0 };
    let values =
        |r: usize, half: usize| columns[half].values::<INTEGER, BIASED>(&rows[r][STRIP * half..], scale(r));
    let out = |half: usize| Rows::new(weight, finish, place, half);
    // A row of both strips after the other, so that neighbouring cache lines are written together.
    match (finish.activation, out(0), out(1)) {
        (Some(Activation::Geglu), Some(out), _) => {
            for r in 0..place.count {
                out.write(r, _mm512_mul_ps(gelu(values(r, 0)), values(r, 1)));
            }
        }
        (activation, first, second) => {
            for r in 0..place.count {
                for (half, out) in [&first, &second].into_iter().enumerate() {
                    let Some(out) = out else { continue };
                    let x = values(r, half);
                    out.write(
                        r,
                        match activation {
                            Some(Activation::Gelu) => gelu(x),
                            Some(Activation::Silu) => silu(x),
                            _ => x,
                        },
                    );
                }
            }
        }
    }
}
