//! AVX2 with FMA: two strips of 8 columns and up to 5 rows fill 10 of the 16 registers with sums.

use std::arch::x86_64::*;

use super::{Kernel, Left, Operands, Packed, nothing};

const MAX_ROWS: usize = 5;

const KERNEL: Kernel = Kernel {
    max_rows: MAX_ROWS,
    row_align: 1,
    strip: 8,
    group: 4,
    left: Left::F32,
    packed: Packed::F32,
    block: 32,
    step: 32,
    resident: None,
    micro: f32_micro,
    enter: nothing,
    leave: nothing,
};

pub(super) static F32: Kernel = KERNEL;
pub(super) static BF16_AS_F32: Kernel =
    Kernel { packed: Packed::Bf16, block: 16, step: 16, micro: bf16_as_f32_micro, ..KERNEL };
pub(super) static INT8_AS_INT16: Kernel =
    Kernel { left: Left::Int8, packed: Packed::Int8, micro: int8_as_int16_micro, ..KERNEL };

/// Defines the loop over depth of one kernel and the [`super::Micro`] that picks its number of rows; `$step`
/// combines a sum, an address of the left operand and a prepared register of the right operand.
macro_rules! kernel {
    ($micro:ident, $name:ident, $zero:ident, $load:ident, $store:ident, $scalar:ty, $chunk:literal, $prepare:expr, $step:expr) => {
        #[target_feature(enable = "avx2,fma")]
        unsafe fn $name<const ROWS: usize>(
            tiles: usize,
            mut left: *const u8,
            mut right: *const u8,
            sums: *mut f32,
            first: bool,
        ) {
            const GROUPS: usize = 16;
            let mut acc = [[$zero(); 2]; ROWS];
            // SAFETY: all addresses lie within the operands, whose lengths and alignment the caller promises.
            unsafe {
                if !first {
                    for (r, acc) in acc.iter_mut().enumerate() {
                        acc[0] = $load(sums.add(r * 16).cast::<$scalar>());
                        acc[1] = $load(sums.add(r * 16 + 8).cast::<$scalar>());
                    }
                }
                for _ in 0..tiles {
                    for g in 0..GROUPS {
                        let r0 = _mm256_load_si256(right.add(g * 32).cast());
                        let r1 = _mm256_load_si256(right.add(512 + g * 32).cast());
                        let (w0, w1) = ($prepare(r0), $prepare(r1));
                        for (r, acc) in acc.iter_mut().enumerate() {
                            let x = left.add(r * $chunk + g * ($chunk / GROUPS));
                            acc[0] = $step(acc[0], x, w0);
                            acc[1] = $step(acc[1], x, w1);
                        }
                    }
                    left = left.add(ROWS * $chunk);
                    right = right.add(1024);
                }
                for (r, acc) in acc.iter().enumerate() {
                    $store(sums.add(r * 16).cast::<$scalar>(), acc[0]);
                    $store(sums.add(r * 16 + 8).cast::<$scalar>(), acc[1]);
                }
            }
        }

        by_rows!($micro, $name, 1 2 3 4 5);
    };
}

kernel!(
    f32_micro,
    f32_rows,
    _mm256_setzero_ps,
    _mm256_load_ps,
    _mm256_store_ps,
    f32,
    64,
    |w| _mm256_castsi256_ps(w),
    |acc, x: *const u8, w| _mm256_fmadd_ps(_mm256_set1_ps(x.cast::<f32>().read()), w, acc)
);

kernel!(
    bf16_as_f32_micro,
    bf16_as_f32_rows,
    _mm256_setzero_ps,
    _mm256_load_ps,
    _mm256_store_ps,
    f32,
    128,
    |w| (
        _mm256_castsi256_ps(_mm256_slli_epi32::<16>(w)),
        _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(0xffff_0000_u32 as i32)))
    ),
    |acc, x: *const u8, (even, odd)| {
        let x = x.cast::<f32>();
        let acc = _mm256_fmadd_ps(_mm256_set1_ps(x.read()), even, acc);
        _mm256_fmadd_ps(_mm256_set1_ps(x.add(1).read()), odd, acc)
    }
);

kernel!(
    int8_as_int16_micro,
    int8_as_int16_rows,
    _mm256_setzero_si256,
    _mm256_load_si256,
    _mm256_store_si256,
    __m256i,
    64,
    // The even and the odd bytes of each group, widened: two products of neighbours, each without overflow.
    |w| (_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(w)), _mm256_srai_epi16::<8>(w)),
    |acc, x: *const u8, (even, odd)| {
        let x = _mm256_set1_epi32(x.cast::<i32>().read());
        let (x_even, x_odd) = (_mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(x)), _mm256_srai_epi16::<8>(x));
        let acc = _mm256_add_epi32(acc, _mm256_madd_epi16(x_even, even));
        _mm256_add_epi32(acc, _mm256_madd_epi16(x_odd, odd))
    }
);
