//! Writes operands in the layouts of the kernels.

use super::{Kernel, Left, Packed};
use crate::math::{per_isa, to_bf16};

/// The place of one row in a left panel: its chunk of each depth tile.
pub(crate) struct Row {
    start: *mut u8,
    chunk: usize,
    step: usize,
    count: usize,
}

impl Row {
    /// `count` chunks of `chunk` bytes, `step` bytes apart.
    ///
    /// # Safety
    /// The chunks lie within an allocation, aligned to 4 bytes, and are used through nothing else while this lives.
    pub(crate) unsafe fn new(start: *mut u8, chunk: usize, step: usize, count: usize) -> Self {
        Self { start, chunk, step, count }
    }

    #[inline(always)]
    fn chunk<T: bytemuck::Pod>(&mut self, i: usize) -> &mut [T] {
        assert!(i < self.count);
        // SAFETY: chunk `i` is ours alone by the promise made to `new`; any bits are a `T`.
        let bytes = unsafe { std::slice::from_raw_parts_mut(self.start.add(i * self.step), self.chunk) };
        bytemuck::cast_slice_mut(bytes)
    }

    /// Fills each chunk from as many values; the last may have fewer and is completed with zeros.
    #[inline(always)]
    fn fill<T: bytemuck::Pod>(&mut self, values: &[f32], convert: impl Fn(f32) -> T) {
        let depth = self.chunk / size_of::<T>();
        let chunks = values.chunks_exact(depth);
        let rest = chunks.remainder();
        let full = chunks.len();
        for (i, values) in chunks.enumerate() {
            self.chunk::<T>(i).iter_mut().zip(values).for_each(|(o, &x)| *o = convert(x));
        }
        for i in full..self.count {
            let out = self.chunk::<T>(i);
            out.fill(T::zeroed());
            if i == full {
                out.iter_mut().zip(rest).for_each(|(o, &x)| *o = convert(x));
            }
        }
    }
}

/// Writes one row of a left panel, multiplied by `factor`. Chunks beyond the values are filled with zeros. Returns
/// the scale of an integer row, else 1.
#[inline(always)]
pub(crate) fn left_row_body<const FMA: bool>(left: Left, factor: f32, values: &[f32], mut out: Row) -> f32 {
    match left {
        Left::F32 => out.fill(values, |x| x * factor),
        Left::Bf16 => out.fill(values, |x| to_bf16(x * factor)),
        Left::Int8 | Left::Uint8 => {
            let offset = if left == Left::Uint8 { 128 } else { 0 };
            // Bits of absolute values are ordered like the values, with NaN the largest.
            let largest = f32::from_bits(values.iter().fold(0, |m, x| m.max(x.to_bits() & 0x7fff_ffff)));
            let inverse = if largest > 1e-30 { 127.0 / largest } else { 0.0 };
            out.fill(values, |x| quantize(x * inverse).wrapping_add(offset) as u8);
            return largest / 127.0 * factor;
        }
    }
    1.0
}

/// Rounds to the nearest integer, ties to even; the argument lies within ±127 or is NaN.
#[inline(always)]
fn quantize(x: f32) -> i32 {
    const MAGIC: f32 = 12_582_912.0;
    (x + MAGIC).to_bits() as i32
}

per_isa! {
    /// See [`left_row_body`].
    pub(crate) fn left_row(left: Left, factor: f32, values: &[f32], out: Row) -> f32 = left_row_body
}

/// One depth tile of one strip of a right panel from f32 rows: column `c` of the strip holds `rows[c]`, which all have
/// at most `depth` values; missing rows and values are zero. Integers are `row * inverse_scale`, rounded.
pub(crate) fn right_tile(kernel: &Kernel, rows: &[&[f32]], inverse_scales: &[f32], out: &mut [u8]) {
    let group = kernel.packed.group();
    let at = |c: usize, k: usize| (k / group * kernel.strip + c) * group + k % group;
    out.fill(0);
    match kernel.packed {
        Packed::F32 => {
            let out: &mut [f32] = bytemuck::cast_slice_mut(out);
            for (c, row) in rows.iter().enumerate() {
                row.iter().enumerate().for_each(|(k, &x)| out[at(c, k)] = x);
            }
        }
        Packed::Bf16 => {
            let out: &mut [u16] = bytemuck::cast_slice_mut(out);
            for (c, row) in rows.iter().enumerate() {
                row.iter().enumerate().for_each(|(k, &x)| out[at(c, k)] = to_bf16(x));
            }
        }
        Packed::Int8 => {
            let out: &mut [i8] = bytemuck::cast_slice_mut(out);
            for (c, row) in rows.iter().enumerate() {
                row.iter()
                    .enumerate()
                    .for_each(|(k, &x)| out[at(c, k)] = quantize(x * inverse_scales[c]) as i8);
            }
        }
    }
}

/// The same where depth runs across rows: `rows[k]` holds value `k` of every column of the strip.
pub(crate) fn right_tile_across(kernel: &Kernel, rows: &[&[f32]], out: &mut [u8]) {
    let (group, strip) = (kernel.packed.group(), kernel.strip);
    out.fill(0);
    for (k, row) in rows.iter().enumerate() {
        let at = |c: usize| (k / group * strip + c) * group + k % group;
        match kernel.packed {
            Packed::F32 => {
                let out: &mut [f32] = bytemuck::cast_slice_mut(out);
                row.iter().enumerate().for_each(|(c, &x)| out[at(c)] = x);
            }
            Packed::Bf16 => {
                let out: &mut [u16] = bytemuck::cast_slice_mut(out);
                row.iter().enumerate().for_each(|(c, &x)| out[at(c)] = to_bf16(x));
            }
            Packed::Int8 => unreachable!("keys and values are not integers"),
        }
    }
}
