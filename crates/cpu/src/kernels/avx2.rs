//! AVX2 with FMA: two strips of 8 columns and up to 6 rows fill 12 of the 16 registers with sums.

use std::arch::x86_64::*;

use super::pack::{Columns, GROUPS};
use super::{Kernel, Left, Operands, Packed, nothing};

const MAX_ROWS: usize = 6;

const KERNEL: Kernel = Kernel {
    max_rows: MAX_ROWS,
    row_align: 1,
    strip: 8,
    group: 4,
    left: Left::F32,
    packed: Packed::F32,
    block: 32,
    step: 16,
    resident: None,
    fetches: false,
    tails: false,
    micro: f32_micro,
    enter: nothing,
    leave: nothing,
};

pub(super) static F32: Kernel = KERNEL;
pub(super) static BF16_AS_F32: Kernel =
    Kernel { packed: Packed::Bf16, block: 16, micro: bf16_as_f32_micro, ..KERNEL };
pub(super) static INT8_AS_INT16: Kernel =
    Kernel { left: Left::Int16, packed: Packed::Int8, block: 16, micro: int8_as_int16_micro, ..KERNEL };
/// Processors with this instruction have first-level caches of 48 KB, which hold longer steps of a right panel.
pub(super) static INT8_DOT: Kernel =
    Kernel { left: Left::Uint8, packed: Packed::Int8, step: 32, micro: int8_dot_micro, ..KERNEL };

/// Defines the loop over depth of one kernel and the [`super::Micro`] that picks its number of rows.
///
/// The right operand is multiplied in as many parts as `$part` prepares from one register of 8 columns of a group;
/// `$step` combines a sum, 4 bytes of the left operand in every lane, and a part. `$passing` says that the right operand
/// mostly passes by, from the second-level cache, and is fetched ahead: keys and values.
macro_rules! kernel {
    ($micro:ident, $name:ident, $features:literal, $zero:ident, $load:ident, $store:ident, $passing:literal, [$($part:expr),+], $step:expr) => {
        #[target_feature(enable = $features)]
        unsafe fn $name<const ROWS: usize>(
            tiles: usize,
            mut left: *const u8,
            mut right: *const u8,
            sums: *mut f32,
            first: bool,
        ) {
            const PARTS: usize = [$(stringify!($part)),+].len();
            // Bytes of one row of the left operand's depth tile.
            const CHUNK: usize = GROUPS * PARTS * 4;
            let mut acc = [[$zero(); 2]; ROWS];
            // SAFETY: all addresses lie within the operands, whose lengths and alignment the caller promises.
            unsafe {
                if !first {
                    for (r, acc) in acc.iter_mut().enumerate() {
                        acc[0] = $load(sums.add(r * 16).cast());
                        acc[1] = $load(sums.add(r * 16 + 8).cast());
                    }
                }
                for _ in 0..tiles {
                    for g in 0..GROUPS {
                        if $passing {
                            _mm_prefetch::<_MM_HINT_T0>(right.wrapping_add(g * 64 + 2048).cast());
                        }
                        let mut x = left.add(g * PARTS * 4);
                        $({
                            // Read anew for each part: no register is left to keep it in.
                            let w0 = $part(right.add(g * 32).cast::<__m256i>().read_volatile());
                            let w1 = $part(right.add(512 + g * 32).cast::<__m256i>().read_volatile());
                            for (r, acc) in acc.iter_mut().enumerate() {
                                let x = _mm256_set1_epi32(x.add(r * CHUNK).cast::<i32>().read());
                                acc[0] = $step(acc[0], x, w0);
                                acc[1] = $step(acc[1], x, w1);
                            }
                            x = x.add(4);
                        })+
                        let _ = x;
                    }
                    left = left.add(ROWS * CHUNK);
                    right = right.add(1024);
                }
                for (r, acc) in acc.iter().enumerate() {
                    $store(sums.add(r * 16).cast(), acc[0]);
                    $store(sums.add(r * 16 + 8).cast(), acc[1]);
                }
            }
        }

        by_rows!($micro, $name, 1 2 3 4 5 6);
    };
}

kernel!(
    f32_micro,
    f32_rows,
    "avx2,fma",
    _mm256_setzero_ps,
    _mm256_load_ps,
    _mm256_store_ps,
    true,
    [|w| _mm256_castsi256_ps(w)],
    |acc, x, w| _mm256_fmadd_ps(_mm256_castsi256_ps(x), w, acc)
);

kernel!(
    bf16_as_f32_micro,
    bf16_as_f32_rows,
    "avx2,fma",
    _mm256_setzero_ps,
    _mm256_load_ps,
    _mm256_store_ps,
    false,
    [
        |w| _mm256_castsi256_ps(_mm256_slli_epi32::<16>(w)),
        |w| _mm256_castsi256_ps(_mm256_and_si256(w, _mm256_set1_epi32(0xffff_0000_u32 as i32)))
    ],
    |acc, x, w| _mm256_fmadd_ps(_mm256_castsi256_ps(x), w, acc)
);

kernel!(
    int8_as_int16_micro,
    int8_as_int16_rows,
    "avx2,fma",
    _mm256_setzero_si256,
    _mm256_load_si256,
    _mm256_store_si256,
    false,
    // The even and the odd bytes of each group, widened: two products of neighbours, each without overflow.
    [|w| _mm256_srai_epi16::<8>(_mm256_slli_epi16::<8>(w)), |w| _mm256_srai_epi16::<8>(w)],
    |mut acc: __m256i, x: __m256i, w: __m256i| {
        // As written: the compiler would regroup the additions and run out of registers.
        std::arch::asm!(
            "vpmaddwd {t}, {x}, {w}", "vpaddd {acc}, {acc}, {t}",
            t = out(ymm_reg) _, acc = inout(ymm_reg) acc, x = in(ymm_reg) x, w = in(ymm_reg) w,
            options(pure, nomem, nostack, preserves_flags),
        );
        acc
    }
);

kernel!(
    int8_dot_micro,
    int8_dot_rows,
    "avx2,avxvnni",
    _mm256_setzero_si256,
    _mm256_load_si256,
    _mm256_store_si256,
    false,
    [|w| w],
    |acc, x, w| _mm256_dpbusd_avx_epi32(acc, x, w)
);

/// `out[i][j] = columns[j][i]` of the first 8 columns.
#[target_feature(enable = "avx2")]
pub(super) fn transpose(columns: &Columns, out: &mut [u32]) {
    let (out, _) = out.as_chunks_mut::<8>();
    for (half, out) in out.chunks_exact_mut(8).enumerate().take(GROUPS / 8) {
        let x: [__m256i; 8] = std::array::from_fn(|c| {
            let groups = &columns[c][half * 8..][..8];
            // SAFETY: these are 32 bytes.
            unsafe { _mm256_loadu_si256(groups.as_ptr().cast()) }
        });
        let x = transpose_blocks!(
            x,
            8,
            _mm256_unpacklo_epi32,
            _mm256_unpackhi_epi32,
            _mm256_unpacklo_epi64,
            _mm256_unpackhi_epi64
        );
        // `x[4 q + j]` holds groups j and 4 + j of columns 4 q to 4 q + 3.
        for j in 0..4 {
            let (low, high) = (x[j], x[4 + j]);
            // SAFETY: each row has 32 bytes.
            unsafe {
                _mm256_storeu_si256(out[j].as_mut_ptr().cast(), _mm256_permute2x128_si256::<0x20>(low, high));
                _mm256_storeu_si256(
                    out[4 + j].as_mut_ptr().cast(),
                    _mm256_permute2x128_si256::<0x31>(low, high),
                );
            }
        }
    }
}
