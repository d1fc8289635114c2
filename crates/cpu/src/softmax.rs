//! Softmax over one block of keys: scores become weights, packed for the product with the values.

use crate::Isa;
use crate::kernels::{Left, pack};
use crate::math::{exp, per_isa, sum_by};

/// Keys of one block: a multiple of every kernel's depth tile and panel width.
pub(crate) const MOST_KEYS: usize = 256;
/// Rows of the largest kernel tile.
const MOST_ROWS: usize = 32;

/// Running maximum and sum of each row.
pub(crate) struct Softmax {
    max: [f32; MOST_ROWS],
    pub(crate) sum: [f32; MOST_ROWS],
}

impl Softmax {
    /// Row `r` has another block, with maximum `max` and sum `sum`: what came before fades to the new maximum.
    #[inline(always)]
    fn advance<const FMA: bool>(
        &mut self,
        r: usize,
        (max, sum): (f32, f32),
        BlockLayout { columns, tile, first, .. }: BlockLayout,
        sums: &mut [f32],
    ) {
        if first {
            self.sum[r] = sum;
        } else {
            let fade = exp::<FMA>(self.max[r] - max);
            self.sum[r] = self.sum[r] * fade + sum;
            if fade != 1.0 {
                for sums in sums.chunks_exact_mut(tile) {
                    sums[r * columns..(r + 1) * columns].iter_mut().for_each(|s| *s *= fade);
                }
            }
        }
        self.max[r] = max;
    }
}

impl Default for Softmax {
    fn default() -> Self {
        Self { max: [f32::NEG_INFINITY; MOST_ROWS], sum: [0.0; MOST_ROWS] }
    }
}

/// The shape of one block.
#[derive(Clone, Copy)]
pub(crate) struct BlockLayout {
    pub(crate) rows: usize,
    pub(crate) padded: usize,
    /// Keys.
    pub(crate) count: usize,
    /// Of one tile of scores or sums, and its values.
    pub(crate) columns: usize,
    pub(crate) tile: usize,
    /// Bytes of a row's chunk in the left operand, and depth tiles.
    pub(crate) chunk: usize,
    pub(crate) tiles: usize,
    /// Whether the sums are not yet begun.
    pub(crate) first: bool,
}

#[inline(always)]
fn softmax_body<const FMA: bool>(
    left: Left,
    layout: BlockLayout,
    state: &mut Softmax,
    scores: &[f32],
    weights: &mut [u8],
    sums: &mut [f32],
) {
    let BlockLayout { rows, padded, count, columns, tile, chunk, tiles, .. } = layout;
    let mut row = [0.0f32; MOST_KEYS];
    for r in 0..rows {
        for (to, from) in row.chunks_exact_mut(columns).zip(scores.chunks_exact(tile)) {
            to.copy_from_slice(&from[r * columns..(r + 1) * columns]);
        }
        let row = &mut row[..count];
        let max = maximum(row, state.max[r]);
        row.iter_mut().for_each(|x| *x = exp::<FMA>(*x - max));
        let sum = sum_by(row, |x| x);
        state.advance::<FMA>(r, (max, sum), layout, sums);
        // SAFETY: chunk `r` of each depth tile lies within the weights, which hold `padded` rows of a block.
        let to = unsafe { pack::Row::new(weights[r * chunk..].as_mut_ptr(), chunk, padded * chunk, tiles) };
        pack::left_row_body::<FMA>(left, 1.0, row, to);
    }
}

per_isa! {
    fn any_softmax_block(
        left: Left,
        layout: BlockLayout,
        state: &mut Softmax,
        scores: &[f32],
        weights: &mut [u8],
        sums: &mut [f32],
    ) = softmax_body
}

#[inline(always)]
fn maximum(x: &[f32], start: f32) -> f32 {
    let mut lanes = [start; 32];
    let chunks = x.chunks_exact(32);
    let rest = chunks.remainder();
    for chunk in chunks {
        for i in 0..32 {
            lanes[i] = if chunk[i] > lanes[i] { chunk[i] } else { lanes[i] };
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane = if x > *lane { x } else { *lane };
    }
    lanes.iter().fold(start, |m, &x| if x > m { x } else { m })
}

/// Turns scores into weights `exp(score - max)`, packed as a left operand, and brings earlier sums to the new
/// maximum. `scores` holds [`MOST_KEYS`] columns in tiles.
pub(crate) fn softmax_block(
    isa: Isa,
    left: Left,
    layout: BlockLayout,
    state: &mut Softmax,
    scores: &[f32],
    weights: &mut [u8],
    sums: &mut [f32],
) {
    #[cfg(target_arch = "x86_64")]
    if left == Left::Bf16 && isa >= Isa::Avx512Bf16 {
        // SAFETY: the device's instruction set was found present when it was opened.
        return unsafe {
            match layout.count {
                0..=32 => x86::softmax_bf16::<2>(layout, state, scores, weights, sums),
                33..=64 => x86::softmax_bf16::<4>(layout, state, scores, weights, sums),
                65..=128 => x86::softmax_bf16::<8>(layout, state, scores, weights, sums),
                _ => x86::softmax_bf16::<16>(layout, state, scores, weights, sums),
            }
        };
    }
    any_softmax_block(isa, left, layout, state, scores, weights, sums);
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;
    use std::array::from_fn;

    use super::{BlockLayout, Softmax};

    /// In pairs, then pairs of pairs; `N` is a power of two.
    #[inline(always)]
    fn fold<const N: usize>(mut v: [__m512; N], f: impl Fn(__m512, __m512) -> __m512) -> __m512 {
        let mut width = N / 2;
        while width > 0 {
            for i in 0..width {
                v[i] = f(v[i], v[i + width]);
            }
            width /= 2;
        }
        v[0]
    }

    /// `e^x` to about 3e-6 relative for x in -87 to 0, and zero far below: a thousandth of what rounding to bf16 is off.
    #[target_feature(enable = "avx512f")]
    fn exp(x: __m512) -> __m512 {
        let x = _mm512_mul_ps(x, _mm512_set1_ps(std::f32::consts::LOG2_E));
        let whole = _mm512_roundscale_ps::<0>(x);
        let r = _mm512_sub_ps(x, whole);
        // Highest first, the polynomial of this degree with 1 at 0 that is nearest to 2^r for r within a half: to 2.8e-6.
        let mut p = _mm512_set1_ps(9.582_853e-3);
        for c in [5.590_642_6e-2, 0.240_240_99, 0.693_124_2, 1.0] {
            p = _mm512_fmadd_ps(p, r, _mm512_set1_ps(c));
        }
        _mm512_scalef_ps(p, whole)
    }

    /// The whole row stays in registers, `VECTORS` of 16 keys.
    #[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
    pub(super) fn softmax_bf16<const VECTORS: usize>(
        layout: BlockLayout,
        state: &mut Softmax,
        scores: &[f32],
        weights: &mut [u8],
        sums: &mut [f32],
    ) {
        let BlockLayout { rows, padded, count, columns, tile, chunk, tiles, .. } = layout;
        assert!(columns == 32 && chunk == 64 && rows <= padded && count <= 16 * VECTORS);
        assert!(rows * columns <= tile && scores.len() >= (VECTORS / 2 - 1) * tile + rows * columns);
        assert!(tiles <= VECTORS / 2 && weights.len() >= tiles * padded * chunk);
        let masks: [u16; VECTORS] = from_fn(|i| match count.saturating_sub(16 * i) {
            n @ 0..16 => (1u16 << n) - 1,
            _ => u16::MAX,
        });
        let least = _mm512_set1_ps(f32::NEG_INFINITY);
        for r in 0..rows {
            let v: [__m512; VECTORS] = from_fn(|i| {
                let at = i / 2 * tile + r * columns + i % 2 * 16;
                // SAFETY: within the scores by the assertions.
                unsafe { _mm512_mask_loadu_ps(least, masks[i], scores.as_ptr().add(at)) }
            });
            let all = fold(v, |a, b| _mm512_max_ps(a, b));
            let max = _mm512_reduce_max_ps(all).max(state.max[r]);
            let most = _mm512_set1_ps(max);
            let v: [__m512; VECTORS] = from_fn(|i| exp(_mm512_sub_ps(v[i], most)));
            let all = fold(v, |a, b| _mm512_add_ps(a, b));
            let sum = _mm512_reduce_add_ps(all);
            for t in 0..tiles {
                let both = _mm512_cvtne2ps_pbh(v[2 * t + 1], v[2 * t]);
                // SAFETY: 64 bytes within the weights by the assertions.
                unsafe {
                    let to = weights.as_mut_ptr().add((t * padded + r) * chunk);
                    _mm512_storeu_si512(to.cast(), std::mem::transmute::<__m512bh, __m512i>(both));
                }
            }
            state.advance::<true>(r, (max, sum), layout, sums);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::math::from_bf16;

    #[test]
    fn every_instruction_set_agrees_with_f64() {
        const ROWS: usize = 5;
        let (columns, tile) = (32, ROWS * 32);
        for count in [1, 16, 31, 100, 255, MOST_KEYS] {
            // Two blocks, the second with larger scores in every other row, and lanes beyond the keys that are garbage.
            let score = |block: usize, r: usize, k: usize| {
                ((k * 37 + r * 11 + block * 5) % 97) as f32 * 0.3 - 20.0 + (block * (r % 2) * 15) as f32
            };
            for isa in Isa::available() {
                let (mut state, mut sums) = (Softmax::default(), vec![1.0f32; tile]);
                for block in 0..2 {
                    let mut scores = vec![77.0f32; MOST_KEYS / columns * tile];
                    for (r, k) in (0..ROWS).flat_map(|r| (0..count).map(move |k| (r, k))) {
                        scores[k / columns * tile + r * columns + k % columns] = score(block, r, k);
                    }
                    let tiles = count.div_ceil(32);
                    let layout = BlockLayout {
                        rows: ROWS,
                        padded: ROWS,
                        count,
                        columns,
                        tile,
                        chunk: 64,
                        tiles,
                        first: block == 0,
                    };
                    let mut weights = vec![0u16; tiles * ROWS * 32];
                    let bytes = bytemuck::cast_slice_mut(&mut weights);
                    softmax_block(isa, Left::Bf16, layout, &mut state, &scores, bytes, &mut sums);
                    for r in 0..ROWS {
                        let of = |b: usize| (0..count).map(move |k| f64::from(score(b, r, k)));
                        let max = (0..=block).flat_map(of).fold(f64::MIN, f64::max);
                        let sum: f64 = (0..=block).flat_map(of).map(|s| (s - max).exp()).sum();
                        assert!((f64::from(state.sum[r]) / sum - 1.0).abs() < 1e-5, "{isa} sum of row {r}");
                        for k in 0..tiles * 32 {
                            let got = from_bf16(weights[(k / 32 * ROWS + r) * 32 + k % 32]);
                            let want =
                                if k < count { (f64::from(score(block, r, k)) - max).exp() } else { 0.0 };
                            let off = (f64::from(got) - want).abs();
                            assert!(off <= want / 250.0, "{isa} key {k} of {count}: {got} {want}");
                        }
                        if block == 1 {
                            let before = of(0).fold(f64::MIN, f64::max);
                            let fade = (before - max).exp();
                            assert!(
                                (f64::from(sums[r * columns]) - fade).abs() < 1e-5,
                                "{isa} fade of row {r}"
                            );
                        }
                    }
                }
            }
        }
    }
}
