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

/// Groups of one depth tile: neighbours in depth that share 4 bytes, whatever their format.
const GROUPS: usize = 16;
/// Columns of the widest strip.
const STRIP: usize = 16;

/// Writes `columns[c][group]` where a right panel wants it: by group, then by column.
#[inline(always)]
fn transpose(columns: &[[u32; GROUPS]; STRIP], strip: usize, out: &mut [u8]) {
    let out: &mut [u32] = bytemuck::cast_slice_mut(out);
    if strip == STRIP {
        let (out, _) = out.as_chunks_mut::<STRIP>();
        for (g, out) in out.iter_mut().enumerate() {
            for c in 0..STRIP {
                out[c] = columns[c][g];
            }
        }
    } else {
        for (g, out) in out.chunks_exact_mut(strip).enumerate() {
            for (out, column) in out.iter_mut().zip(columns) {
                *out = column[g];
            }
        }
    }
}

#[inline(always)]
fn right_tile_body<const FMA: bool>(
    kernel: &Kernel,
    rows: &[&[f32]],
    inverse_scales: &[f32],
    out: &mut [u8],
) {
    let mut columns = [[0u32; GROUPS]; STRIP];
    for (c, (column, row)) in columns.iter_mut().zip(rows).enumerate() {
        let mut values = [0.0f32; 64];
        values[..row.len()].copy_from_slice(row);
        match kernel.packed {
            Packed::F32 => {
                for g in 0..GROUPS {
                    column[g] = values[g].to_bits();
                }
            }
            Packed::Bf16 => {
                for g in 0..GROUPS {
                    column[g] = pair(values[2 * g], values[2 * g + 1]);
                }
            }
            Packed::Int8 => {
                for g in 0..GROUPS {
                    let byte = |j: usize| quantize(values[4 * g + j] * inverse_scales[c]) as u8;
                    column[g] = u32::from_le_bytes([byte(0), byte(1), byte(2), byte(3)]);
                }
            }
        }
    }
    transpose(&columns, kernel.strip, out);
}

/// Two neighbours in depth.
#[inline(always)]
fn pair(first: f32, second: f32) -> u32 {
    u32::from(to_bf16(first)) | u32::from(to_bf16(second)) << 16
}

#[inline(always)]
fn right_tile_across_body<const FMA: bool>(kernel: &Kernel, rows: &[&[f32]], out: &mut [u8]) {
    let out: &mut [u32] = bytemuck::cast_slice_mut(out);
    let group = kernel.packed.group();
    for (g, out) in out.chunks_exact_mut(kernel.strip).enumerate() {
        let row = |j: usize| rows.get(g * group + j).copied().unwrap_or_default();
        let first = row(0);
        if first.len() < kernel.strip {
            out.fill(0);
        }
        match kernel.packed {
            Packed::F32 => out.iter_mut().zip(first).for_each(|(o, x)| *o = x.to_bits()),
            _ if row(1).is_empty() => out.iter_mut().zip(first).for_each(|(o, &x)| *o = pair(x, 0.0)),
            _ => out.iter_mut().zip(first).zip(row(1)).for_each(|((o, &x), &y)| *o = pair(x, y)),
        }
    }
}

#[inline(always)]
fn copy_tile_body<const FMA: bool>(strip: usize, rows: &[&[u8]], out: &mut [u8]) {
    let mut columns = [[0u32; GROUPS]; STRIP];
    for (column, row) in columns.iter_mut().zip(rows) {
        let mut bytes = [0; 4 * GROUPS];
        bytes[..row.len()].copy_from_slice(row);
        for (g, b) in bytes.as_chunks::<4>().0.iter().enumerate() {
            column[g] = u32::from_le_bytes(*b);
        }
    }
    transpose(&columns, strip, out);
}

per_isa! {
    /// One depth tile of one strip of a right panel from f32 rows: column `c` of the strip holds `rows[c]`, which
    /// have at most a tile's depth of values; missing rows and values are zero. Integers are
    /// `row * inverse_scale`, rounded.
    pub(crate) fn right_tile(kernel: &Kernel, rows: &[&[f32]], inverse_scales: &[f32], out: &mut [u8]) = right_tile_body
}
per_isa! {
    /// The same where depth runs across rows: `rows[k]` holds value `k` of every column of the strip. Keys and
    /// values of attention are never integers.
    pub(crate) fn right_tile_across(kernel: &Kernel, rows: &[&[f32]], out: &mut [u8]) = right_tile_across_body
}
per_isa! {
    /// The same from at most 64 stored bytes of each column, which have the packed format already.
    pub(crate) fn copy_tile(strip: usize, rows: &[&[u8]], out: &mut [u8]) = copy_tile_body
}
