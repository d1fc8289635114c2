//! Kernels in plain Rust, for every processor; the compiler makes vectors of what the target has.

use super::{Kernel, Left, Operands, Packed, nothing};
use crate::math::{fma, from_bf16};

const ROWS: usize = 4;
const STRIP: usize = 8;
const COLUMNS: usize = 2 * STRIP;
const FMA: bool = cfg!(target_arch = "aarch64");

const KERNEL: Kernel = Kernel {
    max_rows: ROWS,
    row_align: 1,
    strip: STRIP,
    group: 4,
    left: Left::F32,
    packed: Packed::F32,
    block: 64,
    step: 64,
    resident: None,
    fetches: false,
    tails: false,
    micro: f32_micro,
    enter: nothing,
    leave: nothing,
};

pub(super) static F32: Kernel = KERNEL;
pub(super) static BF16_AS_F32: Kernel =
    Kernel { packed: Packed::Bf16, block: 32, step: 32, micro: bf16_micro, ..KERNEL };
pub(super) static INT8: Kernel =
    Kernel { left: Left::Int8, packed: Packed::Int8, block: 32, step: 32, micro: int8_micro, ..KERNEL };

/// Runs `step(depth group, rows)` over slices of the operands.
///
/// # Safety
/// As [`super::Micro`], for left values `L`, right values `R` and sums `S`.
#[inline(always)]
unsafe fn run<L: Copy, R: Copy, S: Copy + Default, const GROUP: usize>(
    (rows, tiles, first): (usize, usize, bool),
    (Operands { left, right, .. }, sums): (Operands, *mut f32),
    multiply_add: impl Fn(L, R, S) -> S,
) {
    let depth = 64 / size_of::<R>();
    // SAFETY: the caller promises these lengths and 64-byte alignment; any bits are valid values.
    let (left, right, sums) = unsafe {
        (
            std::slice::from_raw_parts(left.cast::<L>(), tiles * rows * depth),
            std::slice::from_raw_parts(right.cast::<R>(), tiles * COLUMNS * depth),
            std::slice::from_raw_parts_mut(sums.cast::<S>(), ROWS * COLUMNS),
        )
    };
    let mut acc = [[S::default(); COLUMNS]; ROWS];
    if !first {
        for (a, s) in acc.iter_mut().zip(sums.chunks_exact(COLUMNS)) {
            a.copy_from_slice(s);
        }
    }
    for (l, r) in left.chunks_exact(rows * depth).zip(right.chunks_exact(COLUMNS * depth)) {
        let (r0, r1) = r.split_at(STRIP * depth);
        for (g, (r0, r1)) in r0.chunks_exact(STRIP * GROUP).zip(r1.chunks_exact(STRIP * GROUP)).enumerate() {
            for (row, acc) in acc.iter_mut().enumerate().take(rows) {
                for j in 0..GROUP {
                    let x = l[row * depth + g * GROUP + j];
                    for c in 0..STRIP {
                        acc[c] = multiply_add(x, r0[c * GROUP + j], acc[c]);
                        acc[STRIP + c] = multiply_add(x, r1[c * GROUP + j], acc[STRIP + c]);
                    }
                }
            }
        }
    }
    for (a, s) in acc.iter().zip(sums.chunks_exact_mut(COLUMNS)) {
        s.copy_from_slice(a);
    }
}

unsafe fn f32_micro(rows: usize, tiles: usize, operands: Operands, sums: *mut f32, first: bool) {
    // SAFETY: forwarded from the caller.
    unsafe { run::<f32, f32, f32, 1>((rows, tiles, first), (operands, sums), fma::<FMA>) }
}

unsafe fn bf16_micro(rows: usize, tiles: usize, operands: Operands, sums: *mut f32, first: bool) {
    // SAFETY: forwarded from the caller.
    unsafe {
        run::<f32, u16, f32, 2>((rows, tiles, first), (operands, sums), |x, w, s| {
            fma::<FMA>(x, from_bf16(w), s)
        })
    }
}

unsafe fn int8_micro(rows: usize, tiles: usize, operands: Operands, sums: *mut f32, first: bool) {
    // SAFETY: forwarded from the caller.
    unsafe {
        run::<i8, i8, i32, 4>((rows, tiles, first), (operands, sums), |x, w, s| {
            s + i32::from(x) * i32::from(w)
        })
    }
}
