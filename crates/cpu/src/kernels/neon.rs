//! NEON: two strips of 8 columns and up to 6 rows fill 24 of the 32 registers with sums. Instructions whose intrinsics
//! are not stable are one line of assembly each, so that the compiler still chooses their order and registers.

use std::arch::aarch64::*;
use std::arch::asm;

use super::{Kernel, Left, Operands, Packed, nothing};

const KERNEL: Kernel = Kernel {
    max_rows: 6,
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
    Kernel { max_rows: 4, packed: Packed::Bf16, block: 16, micro: bf16_as_f32_micro, ..KERNEL };
pub(super) static INT8_AS_INT16: Kernel =
    Kernel { max_rows: 4, left: Left::Int8, packed: Packed::Int8, micro: int8_as_int16_micro, ..KERNEL };
pub(super) static INT8_DOT: Kernel =
    Kernel { left: Left::Int8, packed: Packed::Int8, micro: int8_dot_micro, ..KERNEL };
pub(super) static BF16_MATRIX: Kernel =
    Kernel { group: 8, left: Left::Bf16, packed: Packed::Bf16, micro: bf16_matrix_micro, ..KERNEL };
pub(super) static INT8_MATRIX: Kernel =
    Kernel { group: 8, left: Left::Int8, packed: Packed::Int8, micro: int8_matrix_micro, ..KERNEL };

/// Columns of a right panel, and its bytes for one depth tile.
const COLUMNS: usize = 16;
const RIGHT_TILE: usize = 64 * COLUMNS;

/// Defines the loop over depth of a kernel whose registers of sums hold 4 columns of a row.
///
/// `$left` reads a row's values of one group (`$chunk` bytes hold 16 of them), `$right` prepares a register of the
/// right operand, 4 columns of one group, and `$step` adds their products to a sum.
macro_rules! kernel {
    (
        $name:ident, $features:literal, $zero:expr, $load:ident, $store:ident, $scalar:ty, $chunk:literal,
        $left:expr, $right:expr, $step:expr
    ) => {
        #[target_feature(enable = $features)]
        unsafe fn $name<const ROWS: usize>(
            tiles: usize,
            mut left: *const u8,
            mut right: *const u8,
            sums: *mut f32,
            first: bool,
        ) {
            const GROUPS: usize = 16;
            let sums = sums.cast::<$scalar>();
            let mut acc = [[$zero; 4]; ROWS];
            // SAFETY: all addresses lie within the operands, whose lengths the caller promises.
            unsafe {
                if !first {
                    for (r, acc) in acc.iter_mut().enumerate() {
                        for (c, acc) in acc.iter_mut().enumerate() {
                            *acc = $load(sums.add(r * COLUMNS + 4 * c));
                        }
                    }
                }
                for _ in 0..tiles {
                    for g in 0..GROUPS {
                        let w = [0, 1, 2, 3].map(|c| {
                            let at = c / 2 * (RIGHT_TILE / 2) + g * 32 + c % 2 * 16;
                            $right(right.add(at))
                        });
                        for (r, acc) in acc.iter_mut().enumerate() {
                            let x = $left(left.add(r * $chunk + g * ($chunk / GROUPS)));
                            for (acc, w) in acc.iter_mut().zip(w) {
                                *acc = $step(*acc, x, w);
                            }
                        }
                    }
                    left = left.add(ROWS * $chunk);
                    right = right.add(RIGHT_TILE);
                }
                for (r, acc) in acc.into_iter().enumerate() {
                    for (c, acc) in acc.into_iter().enumerate() {
                        $store(sums.add(r * COLUMNS + 4 * c), acc);
                    }
                }
            }
        }
    };
}

kernel!(
    f32_rows,
    "neon",
    vdupq_n_f32(0.0),
    vld1q_f32,
    vst1q_f32,
    f32,
    64,
    |x: *const u8| x.cast::<f32>().read(),
    |w: *const u8| vld1q_f32(w.cast()),
    |acc, x, w| vfmaq_n_f32(acc, w, x)
);
by_rows!(f32_micro, f32_rows, 1 2 3 4 5 6);

kernel!(
    bf16_as_f32_rows,
    "neon",
    vdupq_n_f32(0.0),
    vld1q_f32,
    vst1q_f32,
    f32,
    128,
    |x: *const u8| [x.cast::<f32>().read(), x.cast::<f32>().add(1).read()],
    |w: *const u8| {
        let w = vld1q_u32(w.cast());
        let (even, odd) = (vshlq_n_u32::<16>(w), vandq_u32(w, vdupq_n_u32(0xffff_0000)));
        [vreinterpretq_f32_u32(even), vreinterpretq_f32_u32(odd)]
    },
    |acc, x: [f32; 2], w: [float32x4_t; 2]| vfmaq_n_f32(vfmaq_n_f32(acc, w[0], x[0]), w[1], x[1])
);
by_rows!(bf16_as_f32_micro, bf16_as_f32_rows, 1 2 3 4);

kernel!(
    int8_as_int16_rows,
    "neon",
    vdupq_n_s32(0),
    vld1q_s32,
    vst1q_s32,
    i32,
    64,
    |x: *const u8| vreinterpretq_s8_s32(vld1q_dup_s32(x.cast())),
    |w: *const u8| vld1q_s8(w.cast()),
    // Values lie within ±127, so that two products fit in 16 bits.
    |acc, x, w| {
        let (low, high) = (vmull_s8(vget_low_s8(w), vget_low_s8(x)), smull2(w, x));
        vpadalq_s16(acc, vpaddq_s16(low, high))
    }
);
by_rows!(int8_as_int16_micro, int8_as_int16_rows, 1 2 3 4);

kernel!(
    int8_dot_rows,
    "neon,dotprod",
    vdupq_n_s32(0),
    vld1q_s32,
    vst1q_s32,
    i32,
    64,
    // Any 4 bytes, which nothing interprets as a number.
    |x: *const u8| x.cast::<f32>().read(),
    |w: *const u8| vld1q_s8(w.cast()),
    sdot
);
by_rows!(int8_dot_micro, int8_dot_rows, 1 2 3 4 5 6);

/// Products of the upper halves. The intrinsic would be one of the lower halves, of a copy for which registers lack: the
/// compiler sees that both halves of `x` are the same.
#[inline]
#[target_feature(enable = "neon")]
fn smull2(w: int8x16_t, x: int8x16_t) -> int16x8_t {
    let products;
    // SAFETY: the instruction works on these registers alone.
    unsafe {
        asm!(
            "smull2 {products:v}.8h, {w:v}.16b, {x:v}.16b",
            products = lateout(vreg) products, w = in(vreg) w, x = in(vreg) x,
            options(pure, nomem, nostack, preserves_flags),
        );
    }
    products
}

/// Defines an instruction that adds products of `x` and `w` to sums.
macro_rules! add_products {
    ($(#[$about:meta])* $name:ident, $features:literal, $acc:ty, $x:ty, $w:ty, $text:literal) => {
        $(#[$about])*
        #[inline]
        #[target_feature(enable = $features)]
        fn $name(mut acc: $acc, x: $x, w: $w) -> $acc {
            // SAFETY: the instruction is present where this function may be called, and works on these registers
            // alone.
            unsafe {
                asm!(
                    $text,
                    acc = inout(vreg) acc, x = in(vreg) x, w = in(vreg) w,
                    options(pure, nomem, nostack, preserves_flags),
                );
            }
            acc
        }
    };
}

add_products!(
    /// Adds to each of 4 columns the dot product of its 4 values with the 4 values in the bits of `x`.
    sdot, "neon,dotprod", int32x4_t, f32, int8x16_t, "sdot {acc:v}.4s, {w:v}.16b, {x:v}.4b[0]"
);
add_products!(
    /// Adds the products of two rows of `x` with two columns of `w`, 8 bytes of each, to a matrix of 2 by 2 sums. Sums
    /// are rounded to odd, and subnormal numbers are taken for zero.
    bfmmla, "neon,bf16", uint64x2_t, uint64x2_t, uint64x2_t, "bfmmla {acc:v}.4s, {x:v}.8h, {w:v}.8h"
);
add_products!(
    /// The same for int8, exactly.
    smmla, "neon,i8mm", uint64x2_t, uint64x2_t, uint64x2_t, "smmla {acc:v}.4s, {x:v}.16b, {w:v}.16b"
);

/// Defines the loop over depth of a kernel whose registers of sums hold 2 rows of 2 columns. The last of an odd number
/// of rows is multiplied twice, and kept once.
macro_rules! matrix_kernel {
    ($name:ident, $features:literal, $step:ident) => {
        #[target_feature(enable = $features)]
        unsafe fn $name<const ROWS: usize>(
            tiles: usize,
            mut left: *const u8,
            mut right: *const u8,
            sums: *mut f32,
            first: bool,
        ) {
            const CHUNK: usize = 64;
            const PAIRS: usize = KERNEL.max_rows / 2;
            let sums = sums.cast::<u64>();
            let rows = |pair: usize| (2 * pair, (2 * pair + 1).min(ROWS - 1));
            // Where 4 columns of a row start, in units of 2 sums.
            let at = |row: usize, four: usize| (row * COLUMNS + 4 * four) / 2;
            let mut acc = [[vdupq_n_u64(0); COLUMNS / 2]; PAIRS];
            // SAFETY: all addresses lie within the operands, whose lengths the caller promises.
            unsafe {
                if !first {
                    for (pair, acc) in acc.iter_mut().enumerate().take(ROWS.div_ceil(2)) {
                        let (one, two) = rows(pair);
                        for (four, acc) in acc.as_chunks_mut::<2>().0.iter_mut().enumerate() {
                            let (a, b) =
                                (vld1q_u64(sums.add(at(one, four))), vld1q_u64(sums.add(at(two, four))));
                            *acc = [vzip1q_u64(a, b), vzip2q_u64(a, b)];
                        }
                    }
                }
                for _ in 0..tiles {
                    for g in (0..CHUNK).step_by(8) {
                        let mut x = [vdupq_n_u64(0); PAIRS];
                        for (pair, x) in x.iter_mut().enumerate().take(ROWS.div_ceil(2)) {
                            let (one, two) = rows(pair);
                            let (a, b) = (left.add(one * CHUNK + g), left.add(two * CHUNK + g));
                            *x = vcombine_u64(vld1_u64(a.cast()), vld1_u64(b.cast()));
                        }
                        for c in 0..COLUMNS / 2 {
                            let w =
                                vld1q_u64(right.add(c / 4 * (RIGHT_TILE / 2) + g * 8 + c % 4 * 16).cast());
                            for (acc, x) in acc.iter_mut().zip(x).take(ROWS.div_ceil(2)) {
                                acc[c] = $step(acc[c], x, w);
                            }
                        }
                    }
                    left = left.add(ROWS * CHUNK);
                    right = right.add(RIGHT_TILE);
                }
                for (pair, acc) in acc.iter().enumerate().take(ROWS.div_ceil(2)) {
                    let (one, two) = rows(pair);
                    for (four, acc) in acc.as_chunks::<2>().0.iter().enumerate() {
                        vst1q_u64(sums.add(at(one, four)), vzip1q_u64(acc[0], acc[1]));
                        if two > one {
                            vst1q_u64(sums.add(at(two, four)), vzip2q_u64(acc[0], acc[1]));
                        }
                    }
                }
            }
        }
    };
}

matrix_kernel!(bf16_matrix_rows, "neon,bf16", bfmmla);
by_rows!(bf16_matrix_micro, bf16_matrix_rows, 1 2 3 4 5 6);
matrix_kernel!(int8_matrix_rows, "neon,i8mm", smmla);
by_rows!(int8_matrix_micro, int8_matrix_rows, 1 2 3 4 5 6);
