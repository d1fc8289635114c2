//! AVX-512: two strips of 16 columns and up to 14 rows fill 28 of the 32 registers with sums.

use std::arch::x86_64::*;
use std::ops::Range;

use super::pack::{Columns, Row};
use super::{Kernel, Left, Operands, Packed, Resident, nothing};

const MAX_ROWS: usize = 14;
/// With at most so many rows a product is as fast as its weight comes from memory.
const STREAMED_ROWS: usize = 8;
/// Of the second-level cache; weights pass by in the rest.
const PERCENT: usize = 39;

const KERNEL: Kernel = Kernel {
    max_rows: MAX_ROWS,
    row_align: 1,
    strip: 16,
    group: 4,
    left: Left::F32,
    packed: Packed::F32,
    block: 64,
    step: 64,
    resident: Some(Resident { percent: PERCENT, deep_block: 32 }),
    fetches: true,
    tails: true,
    micro: f32_micro,
    enter: nothing,
    leave: nothing,
};

pub(super) static F32: Kernel = KERNEL;
pub(super) static BF16_DOT: Kernel =
    Kernel { left: Left::Bf16, packed: Packed::Bf16, micro: bf16_dot_micro, ..KERNEL };
pub(super) static INT8_DOT: Kernel =
    Kernel { left: Left::Uint8, packed: Packed::Int8, micro: int8_dot_micro, ..KERNEL };
pub(super) static BF16_AS_F32: Kernel = Kernel {
    packed: Packed::Bf16,
    block: 32,
    step: 32,
    resident: Some(Resident { percent: PERCENT, deep_block: 16 }),
    micro: bf16_as_f32_micro,
    ..KERNEL
};
pub(super) static INT8_AS_INT16: Kernel = Kernel {
    // Fewer sums: widened weights need registers, too.
    max_rows: 12,
    left: Left::Int16,
    packed: Packed::Int8,
    block: 32,
    step: 32,
    micro: int8_as_int16_micro,
    ..KERNEL
};

/// Defines the loop over depth of one kernel.
///
/// `$chunk` bytes hold a row's 16 groups. `$step` combines a sum, an address in one of them, and what `$prepare` makes of
/// one register of the right operand, 16 columns of the group.
macro_rules! kernel {
    ($micro:ident, $name:ident, $features:literal, $acc:ty, $zero:ident, $load:ident, $store:ident, $chunk:literal, $prepare:expr, $step:expr) => {
        #[target_feature(enable = $features)]
        unsafe fn $name<const ROWS: usize>(
            tiles: usize,
            Operands { mut left, mut right, mut next, lines, tail }: Operands,
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
                    for _ in 0..lines {
                        _mm_prefetch::<_MM_HINT_T1>(next.cast());
                        next = next.wrapping_add(64);
                    }
                    if ROWS <= STREAMED_ROWS {
                        // One strip after the other, in the order of addresses, which volatile reads keep: the processor
                        // then runs ahead by itself as fast as memory can follow. Where the compiler turned the order
                        // or asked ahead, the weight came at a third to four fifths of that. Each sum is made in the
                        // order of the other form.
                        for g in 0..GROUPS {
                            let at = right.add(g * 64);
                            let w = $prepare(at.cast::<__m512i>().read_volatile());
                            for (r, acc) in acc.iter_mut().enumerate() {
                                let x = left.add(r * $chunk + g * ($chunk / GROUPS));
                                acc[0] = $step(acc[0], x, w);
                            }
                        }
                        for g in 0..GROUPS {
                            let at = right.add(1024 + g * 64);
                            let w = $prepare(at.cast::<__m512i>().read_volatile());
                            for (r, acc) in acc.iter_mut().enumerate() {
                                let x = left.add(r * $chunk + g * ($chunk / GROUPS));
                                acc[1] = $step(acc[1], x, w);
                            }
                        }
                    } else {
                        for g in 0..GROUPS {
                            // From the second-level cache mostly, where earlier calls brought it.
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
                    }
                    left = left.add(ROWS * $chunk);
                    right = right.add(2048);
                }
                for g in 0..tail {
                    let r0 = _mm512_load_si512(right.add(g * 64).cast());
                    let r1 = _mm512_load_si512(right.add(1024 + g * 64).cast());
                    let (w0, w1) = ($prepare(r0), $prepare(r1));
                    for (r, acc) in acc.iter_mut().enumerate() {
                        let x = left.add(r * $chunk + g * ($chunk / GROUPS));
                        acc[0] = $step(acc[0], x, w0);
                        acc[1] = $step(acc[1], x, w1);
                    }
                }
                for (r, acc) in acc.iter().enumerate() {
                    $store(sums.add(r * 32).cast(), acc[0]);
                    $store(sums.add(r * 32 + 16).cast(), acc[1]);
                }
            }
        }

        unsafe fn $micro(rows: usize, tiles: usize, operands: Operands, sums: *mut f32, first: bool) {
            type Inner = unsafe fn(usize, Operands, *mut f32, bool);
            const VARIANTS: [Inner; MAX_ROWS] = [
                $name::<1>,
                $name::<2>,
                $name::<3>,
                $name::<4>,
                $name::<5>,
                $name::<6>,
                $name::<7>,
                $name::<8>,
                $name::<9>,
                $name::<10>,
                $name::<11>,
                $name::<12>,
                $name::<13>,
                $name::<14>,
            ];
            // SAFETY: forwarded from the caller, `rows` among it.
            unsafe { VARIANTS[rows - 1](tiles, operands, sums, first) }
        }
    };
}

kernel!(
    f32_micro,
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

kernel!(
    bf16_dot_micro,
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

kernel!(
    int8_dot_micro,
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

kernel!(
    bf16_as_f32_micro,
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

kernel!(
    int8_as_int16_micro,
    int8_as_int16_rows,
    "avx512f,avx512bw",
    __m512i,
    _mm512_setzero_si512,
    _mm512_load_si512,
    _mm512_store_si512,
    128,
    // The even and the odd bytes of each group, widened: two products of neighbours, each without overflow.
    |w| (_mm512_srai_epi16::<8>(_mm512_slli_epi16::<8>(w)), _mm512_srai_epi16::<8>(w)),
    |acc, x: *const u8, (even, odd)| {
        let x = x.cast::<i32>();
        let acc = _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_set1_epi32(x.read()), even));
        _mm512_add_epi32(acc, _mm512_madd_epi16(_mm512_set1_epi32(x.add(1).read()), odd))
    }
);

/// A row of a left panel in bf16, times `factor`; see [`super::pack::left_row`]. The processor rounds as
/// [`crate::math::to_bf16`] does, but takes subnormal numbers for zero.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) fn bf16_row(factor: f32, values: &[f32], mut out: Row) {
    let factor = _mm512_set1_ps(factor);
    let mut values = values.chunks(32);
    for i in 0..out.count() {
        let values = values.next().unwrap_or_default();
        let mask = if values.len() == 32 { u32::MAX } else { (1u32 << values.len()) - 1 };
        let to = out.chunk::<[u8; 64]>(i).as_mut_ptr();
        // SAFETY: masked loads touch only the values there are; the chunk has 64 bytes.
        unsafe {
            let low = _mm512_maskz_loadu_ps(mask as u16, values.as_ptr());
            let high = _mm512_maskz_loadu_ps((mask >> 16) as u16, values.as_ptr().wrapping_add(16));
            let both = _mm512_cvtne2ps_pbh(_mm512_mul_ps(high, factor), _mm512_mul_ps(low, factor));
            _mm512_storeu_si512(to.cast(), std::mem::transmute::<__m512bh, __m512i>(both));
        }
    }
}

/// A row of a left panel in unsigned int8, with the largest magnitude as its scale's measure; see
/// [`super::pack::left_row_body`], whose bits it writes.
#[target_feature(enable = "avx512f,avx512bw")]
pub(super) fn uint8_row(values: &[f32], mut out: Row) -> f32 {
    let (whole, rest) = values.as_chunks::<64>();
    let load = |line: &[f32; 64], i: usize| {
        // SAFETY: sixteen values of the line.
        unsafe { _mm512_loadu_ps(line.as_ptr().add(16 * i)) }
    };
    let mut last = [0.0f32; 64];
    last[..rest.len()].copy_from_slice(rest);
    // Bits of absolute values are ordered like the values, with NaN the largest.
    let mut most = [_mm512_setzero_si512(); 4];
    let magnitude = _mm512_set1_epi32(0x7fff_ffff);
    for line in whole.iter().chain([&last]) {
        for (i, most) in most.iter_mut().enumerate() {
            let bits = _mm512_and_si512(_mm512_castps_si512(load(line, i)), magnitude);
            *most = _mm512_max_epu32(*most, bits);
        }
    }
    let most = _mm512_max_epu32(_mm512_max_epu32(most[0], most[1]), _mm512_max_epu32(most[2], most[3]));
    let largest = f32::from_bits(_mm512_reduce_max_epu32(most));
    let inverse = _mm512_set1_ps(if largest > 1e-30 { 127.0 / largest } else { 0.0 });
    let offset = _mm_set1_epi8(-128);
    let mut lines = whole.iter().chain((!rest.is_empty()).then_some(&last));
    for i in 0..out.count() {
        let line = lines.next().unwrap_or(&[0.0; 64]);
        let to = out.chunk::<[u8; 64]>(i).as_mut_ptr();
        for j in 0..4 {
            let rounded = _mm512_cvtps_epi32(_mm512_mul_ps(load(line, j), inverse));
            let bytes = _mm_xor_si128(_mm512_cvtsepi32_epi8(rounded), offset);
            // SAFETY: a chunk has 64 bytes.
            unsafe { _mm_storeu_si128(to.cast::<__m128i>().add(j), bytes) };
        }
    }
    largest
}

/// Two vectors of up to 32 values in all, rounded to bf16 and zero beyond them.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
fn bf16_line(values: &[f32]) -> __m512i {
    let mask = if values.len() >= 32 { u32::MAX } else { (1u32 << values.len()) - 1 };
    // SAFETY: masked loads touch only the values there are; both types are 512 bits.
    unsafe {
        let low = _mm512_maskz_loadu_ps(mask as u16, values.as_ptr());
        let high = _mm512_maskz_loadu_ps((mask >> 16) as u16, values.as_ptr().wrapping_add(16));
        std::mem::transmute::<__m512bh, __m512i>(_mm512_cvtne2ps_pbh(high, low))
    }
}

/// The columns of one tile in bf16; see [`super::pack::right_tile`].
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) fn bf16_columns(rows: &[&[f32]], columns: &mut Columns) {
    for (column, row) in columns.iter_mut().zip(rows) {
        // SAFETY: a column has 64 bytes.
        unsafe { _mm512_storeu_si512(column.as_mut_ptr().cast(), bf16_line(row)) };
    }
}

/// See [`super::pack::right_tile_across`]: 16 columns, depth across rows.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) fn bf16_across(rows: &[&[f32]], out: &mut [[u32; 16]]) {
    // The two rows take turns.
    let turns: [u16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * 16) as u16);
    // SAFETY: the array has 64 bytes.
    let turns = unsafe { _mm512_loadu_si512(turns.as_ptr().cast()) };
    for (g, out) in out.iter_mut().enumerate() {
        let load = |j: usize| {
            let row = rows.get(2 * g + j).copied().unwrap_or_default();
            let mask = if row.len() >= 16 { u16::MAX } else { (1u16 << row.len()) - 1 };
            // SAFETY: masked loads touch only the values there are.
            unsafe { _mm512_maskz_loadu_ps(mask, row.as_ptr()) }
        };
        let both = _mm512_cvtne2ps_pbh(load(1), load(0));
        // SAFETY: both types are 512 bits; a group has 64 bytes.
        unsafe {
            let both = _mm512_permutexvar_epi16(turns, std::mem::transmute::<__m512bh, __m512i>(both));
            _mm512_storeu_si512(out.as_mut_ptr().cast(), both);
        }
    }
}

/// See [`super::pack::strips_across`]: 16 columns in bf16.
///
/// # Safety
/// As there.
#[target_feature(enable = "avx512f,avx512bw,avx512bf16")]
pub(super) unsafe fn bf16_strips_across(
    rows: &[&[f32]],
    strips: impl Iterator<Item = (Range<usize>, *mut u8)>,
) {
    // The two rows take turns.
    let turns: [u16; 32] = std::array::from_fn(|i| (i / 2 + i % 2 * 16) as u16);
    // SAFETY: the array has 64 bytes.
    let turns = unsafe { _mm512_loadu_si512(turns.as_ptr().cast()) };
    for (columns, out) in strips {
        for (g, pair) in rows.chunks(2).enumerate() {
            let second = pair.get(1).map_or_else(|| _mm512_setzero_ps(), |row| strip(row, &columns));
            let both = _mm512_cvtne2ps_pbh(second, strip(pair[0], &columns));
            // SAFETY: both types are 512 bits; the group's 64 bytes are ours by the caller's promise.
            unsafe {
                let both = _mm512_permutexvar_epi16(turns, std::mem::transmute::<__m512bh, __m512i>(both));
                _mm512_stream_si512(out.add(64 * g).cast(), both);
            }
        }
    }
    _mm_sfence();
}

/// The same in f32.
///
/// # Safety
/// As there.
#[target_feature(enable = "avx512f")]
pub(super) unsafe fn f32_strips_across(
    rows: &[&[f32]],
    strips: impl Iterator<Item = (Range<usize>, *mut u8)>,
) {
    for (columns, out) in strips {
        for (g, row) in rows.iter().enumerate() {
            // SAFETY: the group's 64 bytes are ours by the caller's promise.
            unsafe { _mm512_stream_ps(out.add(64 * g).cast(), strip(row, &columns)) };
        }
    }
    _mm_sfence();
}

/// Up to 16 columns of a row, and zeros.
#[target_feature(enable = "avx512f")]
fn strip(row: &[f32], columns: &Range<usize>) -> __m512 {
    let values = &row[columns.clone()];
    let mask = ((1u32 << values.len().min(16)) - 1) as u16;
    // SAFETY: masked loads touch only the values there are.
    unsafe { _mm512_maskz_loadu_ps(mask, values.as_ptr()) }
}

/// `out[i][j] = columns[j][i]`.
#[target_feature(enable = "avx512f")]
pub(super) fn transpose(columns: &Columns, out: &mut Columns) {
    // SAFETY: each array has 64 bytes.
    let x: [__m512i; 16] = std::array::from_fn(|i| unsafe { _mm512_loadu_si512(columns[i].as_ptr().cast()) });
    let x = transpose_blocks!(
        x,
        16,
        _mm512_unpacklo_epi32,
        _mm512_unpackhi_epi32,
        _mm512_unpacklo_epi64,
        _mm512_unpackhi_epi64
    );
    // Then the 4 by 4 quarters: `x[4 q + j]` holds groups j, 4 + j, 8 + j and 12 + j of columns 4 q to 4 q + 3.
    for j in 0..4 {
        let (a, b, c, d) = (x[j], x[4 + j], x[8 + j], x[12 + j]);
        let (ab_even, ab_odd) = (_mm512_shuffle_i32x4::<0x88>(a, b), _mm512_shuffle_i32x4::<0xdd>(a, b));
        let (cd_even, cd_odd) = (_mm512_shuffle_i32x4::<0x88>(c, d), _mm512_shuffle_i32x4::<0xdd>(c, d));
        let rows = [
            (j, _mm512_shuffle_i32x4::<0x88>(ab_even, cd_even)),
            (4 + j, _mm512_shuffle_i32x4::<0x88>(ab_odd, cd_odd)),
            (8 + j, _mm512_shuffle_i32x4::<0xdd>(ab_even, cd_even)),
            (12 + j, _mm512_shuffle_i32x4::<0xdd>(ab_odd, cd_odd)),
        ];
        for (g, row) in rows {
            // SAFETY: each array has 64 bytes.
            unsafe { _mm512_storeu_si512(out[g].as_mut_ptr().cast(), row) };
        }
    }
}
