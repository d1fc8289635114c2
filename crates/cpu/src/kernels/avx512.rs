//! AVX-512: two strips of 16 columns and up to 14 rows fill 28 of the 32 registers with sums.

use std::arch::x86_64::*;

use super::{Kernel, Left, Operands, Packed, nothing};

const MAX_ROWS: usize = 14;

const KERNEL: Kernel = Kernel {
    max_rows: MAX_ROWS,
    row_align: 1,
    strip: 16,
    left: Left::F32,
    packed: Packed::F32,
    block: 64,
    step: 64,
    resident: None,
    micro: f32_micro,
    enter: nothing,
    leave: nothing,
};

pub(super) static F32: Kernel = KERNEL;
pub(super) static BF16_DOT: Kernel =
    Kernel { left: Left::Bf16, packed: Packed::Bf16, micro: bf16_dot_micro, ..KERNEL };
pub(super) static INT8_DOT: Kernel =
    Kernel { left: Left::Uint8, packed: Packed::Int8, micro: int8_dot_micro, ..KERNEL };
pub(super) static BF16_AS_F32: Kernel =
    Kernel { packed: Packed::Bf16, block: 32, step: 32, micro: bf16_as_f32_micro, ..KERNEL };
pub(super) static INT8_AS_INT16: Kernel =
    Kernel { left: Left::Int8, packed: Packed::Int8, micro: int8_as_int16_micro, ..KERNEL };

/// Defines a [`super::Micro`] that picks the variant of `$inner` with the right number of rows.
macro_rules! by_rows {
    ($name:ident, $inner:ident) => {
        unsafe fn $name(rows: usize, tiles: usize, operands: Operands, sums: *mut f32, first: bool) {
            type Inner = unsafe fn(usize, *const u8, *const u8, *mut f32, bool);
            const VARIANTS: [Inner; MAX_ROWS] = [
                $inner::<1>,
                $inner::<2>,
                $inner::<3>,
                $inner::<4>,
                $inner::<5>,
                $inner::<6>,
                $inner::<7>,
                $inner::<8>,
                $inner::<9>,
                $inner::<10>,
                $inner::<11>,
                $inner::<12>,
                $inner::<13>,
                $inner::<14>,
            ];
            // SAFETY: forwarded from the caller, `rows` among it.
            unsafe { VARIANTS[rows - 1](tiles, operands.left, operands.right, sums, first) }
        }
    };
}

/// Defines the loop over depth of one kernel.
///
/// `$step` combines a sum, 4 bytes of the left operand in every lane (`left_bytes` of them apart from group to
/// group) and one register of the right operand, 16 columns of one group.
macro_rules! kernel {
    ($name:ident, $features:literal, $acc:ty, $zero:ident, $load:ident, $store:ident, $chunk:literal, $prepare:expr, $step:expr) => {
        #[target_feature(enable = $features)]
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
                        acc[0] = $load(sums.add(r * 32).cast());
                        acc[1] = $load(sums.add(r * 32 + 16).cast());
                    }
                }
                for _ in 0..tiles {
                    for g in 0..GROUPS {
                        // The panel follows in memory, and the next panel after it.
                        _mm_prefetch::<_MM_HINT_T0>(right.wrapping_add(g * 64 + 4096).cast());
                        _mm_prefetch::<_MM_HINT_T0>(right.wrapping_add(g * 64 + 5120).cast());
                        let r0 = _mm512_load_si512(right.add(g * 64).cast());
                        let r1 = _mm512_load_si512(right.add(1024 + g * 64).cast());
                        let (w0, w1) = ($prepare(r0), $prepare(r1));
                        for (r, acc) in acc.iter_mut().enumerate() {
                            let x = left.add(r * $chunk + g * ($chunk / GROUPS));
                            acc[0] = $step(acc[0], x, w0);
                            acc[1] = $step(acc[1], x, w1);
                        }
                    }
                    left = left.add(ROWS * $chunk);
                    right = right.add(2048);
                }
                for (r, acc) in acc.iter().enumerate() {
                    $store(sums.add(r * 32).cast(), acc[0]);
                    $store(sums.add(r * 32 + 16).cast(), acc[1]);
                }
            }
        }
    };
}

kernel!(
    f32_rows,
    "avx512f",
    __m512,
    _mm512_setzero_ps,
    _mm512_load_ps,
    _mm512_store_ps,
    64,
    |w| _mm512_castsi512_ps(w),
    |acc, x: *const u8, w| _mm512_fmadd_ps(_mm512_set1_ps(x.cast::<f32>().read()), w, acc)
);
by_rows!(f32_micro, f32_rows);

kernel!(
    bf16_dot_rows,
    "avx512f,avx512bw,avx512bf16",
    __m512,
    _mm512_setzero_ps,
    _mm512_load_ps,
    _mm512_store_ps,
    64,
    // SAFETY: both are 512 bits, and any bits are bf16 values.
    |w: __m512i| std::mem::transmute::<__m512i, __m512bh>(w),
    |acc, x: *const u8, w| {
        let x = _mm512_set1_epi32(x.cast::<i32>().read());
        // SAFETY: as above.
        _mm512_dpbf16_ps(acc, w, std::mem::transmute::<__m512i, __m512bh>(x))
    }
);
by_rows!(bf16_dot_micro, bf16_dot_rows);

kernel!(
    int8_dot_rows,
    "avx512f,avx512bw,avx512vnni",
    __m512i,
    _mm512_setzero_si512,
    _mm512_load_si512,
    _mm512_store_si512,
    64,
    |w| w,
    |acc, x: *const u8, w| _mm512_dpbusd_epi32(acc, _mm512_set1_epi32(x.cast::<i32>().read()), w)
);
by_rows!(int8_dot_micro, int8_dot_rows);

kernel!(
    bf16_as_f32_rows,
    "avx512f",
    __m512,
    _mm512_setzero_ps,
    _mm512_load_ps,
    _mm512_store_ps,
    128,
    |w| (
        _mm512_castsi512_ps(_mm512_slli_epi32::<16>(w)),
        _mm512_castsi512_ps(_mm512_and_si512(w, _mm512_set1_epi32(0xffff_0000_u32 as i32)))
    ),
    |acc, x: *const u8, (even, odd)| {
        let x = x.cast::<f32>();
        let acc = _mm512_fmadd_ps(_mm512_set1_ps(x.read()), even, acc);
        _mm512_fmadd_ps(_mm512_set1_ps(x.add(1).read()), odd, acc)
    }
);
by_rows!(bf16_as_f32_micro, bf16_as_f32_rows);

kernel!(
    int8_as_int16_rows,
    "avx512f,avx512bw",
    __m512i,
    _mm512_setzero_si512,
    _mm512_load_si512,
    _mm512_store_si512,
    64,
    // The even and the odd bytes of each group, widened: two products of neighbours, each without overflow.
    |w| (_mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(w)), _mm512_srai_epi16::<8>(w)),
    |acc, x: *const u8, (even, odd)| {
        let x = _mm512_set1_epi32(x.cast::<i32>().read());
        let (x_even, x_odd) = (_mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(x)), _mm512_srai_epi16::<8>(x));
        let acc = _mm512_add_epi32(acc, _mm512_madd_epi16(x_even, even));
        _mm512_add_epi32(acc, _mm512_madd_epi16(x_odd, odd))
    }
);
by_rows!(int8_as_int16_micro, int8_as_int16_rows);
