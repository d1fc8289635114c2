//! Writes operands in the layouts of the kernels.

use std::ops::Range;

use pi0_device::Round;

use super::{Kernel, Left, Packed};
use crate::Isa;
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

    /// Number of chunks.
    pub(super) fn count(&self) -> usize {
        self.count
    }

    #[inline(always)]
    pub(super) fn chunk<T: bytemuck::Pod>(&mut self, i: usize) -> &mut [T] {
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
        Left::Int8 | Left::Uint8 | Left::Int16 => {
            // Bits of absolute values are ordered like the values, with NaN the largest.
            let largest = f32::from_bits(values.iter().fold(0, |m, x| m.max(x.to_bits() & 0x7fff_ffff)));
            let inverse = if largest > 1e-30 { 127.0 / largest } else { 0.0 };
            if left == Left::Int16 {
                out.fill(values, |x| quantize(x * inverse) as i16);
                for i in 0..out.count() {
                    out.chunk::<[i16; 4]>(i).iter_mut().for_each(|four| four.swap(1, 2));
                }
            } else {
                let offset = if left == Left::Uint8 { 128 } else { 0 };
                out.fill(values, |x| quantize(x * inverse).wrapping_add(offset) as u8);
            }
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
    fn any_left_row(left: Left, factor: f32, values: &[f32], out: Row) -> f32 = left_row_body
}

/// See [`left_row_body`].
pub(crate) fn left_row(isa: Isa, left: Left, factor: f32, values: &[f32], out: Row) -> f32 {
    #[cfg(target_arch = "x86_64")]
    if left == Left::Bf16 && isa >= Isa::Avx512Bf16 {
        // SAFETY: the device's instruction set was found present when it was opened.
        unsafe { super::avx512::bf16_row(factor, values, out) };
        return 1.0;
    }
    #[cfg(target_arch = "x86_64")]
    if left == Left::Uint8 && isa >= Isa::Avx512 {
        // SAFETY: as above.
        return unsafe { super::avx512::uint8_row(values, out) } / 127.0 * factor;
    }
    any_left_row(isa, left, factor, values, out)
}

/// Groups of one depth tile: neighbours in depth that share 4 bytes, whatever their format.
pub(super) const GROUPS: usize = 16;
/// Columns of the widest strip.
const STRIP: usize = 16;

/// The groups of each column of a strip.
pub(super) type Columns = [[u32; GROUPS]; STRIP];

/// Writes `columns[c][group]` where a right panel wants it: by group, then by column.
fn transpose(isa: Isa, kernel: &Kernel, columns: &Columns, out: &mut [u8]) {
    let strip = kernel.strip;
    let out: &mut [u32] = bytemuck::cast_slice_mut(out);
    let (rows, _) = out.as_chunks_mut::<STRIP>();
    match <&mut Columns>::try_from(rows) {
        #[cfg(target_arch = "x86_64")]
        // SAFETY: the device's instruction set was found present when it was opened.
        Ok(out) if strip == STRIP && isa >= Isa::Avx512 => unsafe { super::avx512::transpose(columns, out) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        _ if strip == 8 && isa >= Isa::Avx2 => unsafe { super::avx2::transpose(columns, out) },
        _ => {
            let _ = isa;
            match kernel.group {
                8 => spread::<2>(columns, strip, out),
                _ => spread::<1>(columns, strip, out),
            }
        }
    }
}

/// The same for groups of `WORDS` times 4 bytes.
fn spread<const WORDS: usize>(columns: &Columns, strip: usize, out: &mut [u32]) {
    for (g, out) in out.as_chunks_mut::<WORDS>().0.chunks_exact_mut(strip).enumerate() {
        for (out, column) in out.iter_mut().zip(columns) {
            out.copy_from_slice(&column[g * WORDS..][..WORDS]);
        }
    }
}

#[inline(always)]
fn right_columns_body<const FMA: bool>(
    packed: Packed,
    rows: &[&[f32]],
    inverse_scales: &[f32],
    columns: &mut Columns,
) {
    for (c, (column, row)) in columns.iter_mut().zip(rows).enumerate() {
        let mut values = [0.0f32; 64];
        values[..row.len()].copy_from_slice(row);
        match packed {
            Packed::F32 => {
                for g in 0..GROUPS {
                    column[g] = values[g].to_bits();
                }
            }
            Packed::Bf16 => {
                let column: &mut [u16] = bytemuck::cast_slice_mut(column);
                column.iter_mut().zip(&values).for_each(|(o, &x)| *o = to_bf16(x));
            }
            Packed::Int8 => {
                let column: &mut [u8] = bytemuck::cast_slice_mut(column);
                let inverse = inverse_scales[c];
                column.iter_mut().zip(&values).for_each(|(o, &x)| *o = quantize(x * inverse) as u8);
            }
        }
    }
}

per_isa! {
    fn any_right_columns(packed: Packed, rows: &[&[f32]], inverse_scales: &[f32], columns: &mut Columns) = right_columns_body
}

fn right_columns(isa: Isa, packed: Packed, rows: &[&[f32]], inverse_scales: &[f32], columns: &mut Columns) {
    #[cfg(target_arch = "x86_64")]
    if packed == Packed::Bf16 && isa >= Isa::Avx512Bf16 {
        // SAFETY: the device's instruction set was found present when it was opened.
        return unsafe { super::avx512::bf16_columns(rows, columns) };
    }
    any_right_columns(isa, packed, rows, inverse_scales, columns);
}

/// One depth tile of one strip of a right panel from f32 rows: column `c` of the strip holds `rows[c]`, which have at
/// most a tile's depth of values; missing rows and values are zero. Integers are `row * inverse_scale`, rounded.
pub(crate) fn right_tile(isa: Isa, kernel: &Kernel, rows: &[&[f32]], inverse_scales: &[f32], out: &mut [u8]) {
    let mut columns = [[0; GROUPS]; STRIP];
    right_columns(isa, kernel.packed, rows, inverse_scales, &mut columns);
    transpose(isa, kernel, &columns, out);
}

/// The same from at most 64 stored bytes of each column, which have the packed format already.
pub(crate) fn copy_tile(isa: Isa, kernel: &Kernel, rows: &[&[u8]], out: &mut [u8]) {
    let mut columns = [[0; GROUPS]; STRIP];
    for (column, row) in columns.iter_mut().zip(rows) {
        let bytes: &mut [u8] = bytemuck::cast_slice_mut(column);
        match <&[u8; 4 * GROUPS]>::try_from(*row) {
            Ok(row) => bytes.copy_from_slice(row),
            Err(_) => bytes[..row.len()].copy_from_slice(row),
        }
    }
    transpose(isa, kernel, &columns, out);
}

/// Two neighbours in depth.
#[inline(always)]
fn pair(first: u16, second: u16) -> u32 {
    u32::from(first) | u32::from(second) << 16
}

#[inline(always)]
fn right_tile_across_body<const FMA: bool>(kernel: &Kernel, rows: &[&[f32]], out: &mut [u8]) {
    match kernel.packed {
        Packed::F32 => across(kernel, rows, |x, _: Option<f32>| x.to_bits(), out),
        _ => across(kernel, rows, |x, y| pair(to_bf16(x), y.map_or(0, to_bf16)), out),
    }
}

#[inline(always)]
fn copy_tile_across_body<const FMA: bool>(kernel: &Kernel, rows: &[&[[u8; 2]]], out: &mut [u8]) {
    across(kernel, rows, |x, y| pair(u16::from_le_bytes(x), y.map_or(0, u16::from_le_bytes)), out);
}

#[inline(always)]
fn across<T: Copy>(kernel: &Kernel, rows: &[&[T]], word: impl Fn(T, Option<T>) -> u32, out: &mut [u8]) {
    match kernel.group {
        8 => across_groups::<2, T>(kernel, rows, word, out),
        _ => across_groups::<1, T>(kernel, rows, word, out),
    }
}

/// For groups of `WORDS` times 4 bytes; `word` makes one of a value, or of two neighbours in depth.
#[inline(always)]
fn across_groups<const WORDS: usize, T: Copy>(
    kernel: &Kernel,
    rows: &[&[T]],
    make: impl Fn(T, Option<T>) -> u32,
    out: &mut [u8],
) {
    let out: &mut [u32] = bytemuck::cast_slice_mut(out);
    let values = 4 / kernel.packed.size();
    for (g, out) in out.as_chunks_mut::<WORDS>().0.chunks_exact_mut(kernel.strip).enumerate() {
        for word in 0..WORDS {
            let row = |j: usize| rows.get((g * WORDS + word) * values + j).copied().unwrap_or_default();
            let first = row(0);
            if first.len() < kernel.strip {
                out.iter_mut().for_each(|o| o[word] = 0);
            }
            let out = out.iter_mut().map(|o| &mut o[word]).zip(first);
            match row(1) {
                second if values == 2 && !second.is_empty() => {
                    out.zip(second).for_each(|((o, &x), &y)| *o = make(x, Some(y)));
                }
                _ => out.for_each(|(o, &x)| *o = make(x, None)),
            }
        }
    }
}

per_isa! {
    fn any_right_tile_across(kernel: &Kernel, rows: &[&[f32]], out: &mut [u8]) = right_tile_across_body
}

/// The same as [`right_tile`] where depth runs across rows: `rows[k]` holds value `k` of every column of the strip. `out`
/// may be a part of a tile, of whole groups. Integers are not made so.
pub(crate) fn right_tile_across(isa: Isa, kernel: &Kernel, rows: &[&[f32]], out: &mut [u8]) {
    #[cfg(target_arch = "x86_64")]
    if kernel.packed == Packed::Bf16 && kernel.strip == STRIP && isa >= Isa::Avx512Bf16 {
        let groups: &mut [u32] = bytemuck::cast_slice_mut(out);
        // SAFETY: the device's instruction set was found present when it was opened.
        return unsafe { super::avx512::bf16_across(rows, groups.as_chunks_mut::<STRIP>().0) };
    }
    any_right_tile_across(isa, kernel, rows, out);
}

/// The same for many strips of whole rows at once, which looks at no strip anew and writes past the caches: each strip is its
/// columns of the rows, and where its groups go. False, and nothing done, if there is no such way for this kernel.
///
/// # Safety
/// Where each strip goes are as many bytes as the groups of the rows take, aligned to a cache line, which nobody else uses
/// meanwhile.
pub(crate) unsafe fn strips_across(
    isa: Isa,
    kernel: &Kernel,
    rows: &[&[f32]],
    strips: impl Iterator<Item = (Range<usize>, *mut u8)>,
) -> bool {
    #[cfg(target_arch = "x86_64")]
    if kernel.strip == STRIP && kernel.group == 4 {
        match kernel.packed {
            Packed::Bf16 if isa >= Isa::Avx512Bf16 => {
                // SAFETY: the device's instruction set was found present when it was opened; the rest is the caller's
                // promise.
                unsafe { super::avx512::bf16_strips_across(rows, strips) };
                return true;
            }
            Packed::F32 if isa >= Isa::Avx512 => {
                // SAFETY: as above.
                unsafe { super::avx512::f32_strips_across(rows, strips) };
                return true;
            }
            _ => {}
        }
    }
    let _ = (isa, kernel, rows, strips);
    false
}

#[inline(always)]
fn largest_across_body<const FMA: bool>(rows: &[&[f32]], largest: &mut [f32; STRIP]) {
    for row in rows {
        for (most, x) in largest.iter_mut().zip(whole(row)) {
            *most = if x.abs() > *most { x.abs() } else { *most };
        }
    }
}

per_isa! {
    /// The largest magnitudes of columns, of which each row holds a value; those of rows before are in `largest`.
    pub(crate) fn largest_across(rows: &[&[f32]], largest: &mut [f32; STRIP]) = largest_across_body
}

/// Up to as many values as a strip has columns, and zeros.
#[inline(always)]
fn whole(row: &[f32]) -> [f32; STRIP] {
    row.first_chunk().copied().unwrap_or_else(|| {
        let mut values = [0.0; STRIP];
        values[..row.len()].copy_from_slice(row);
        values
    })
}

#[inline(always)]
fn int8_across_body<const FMA: bool>(
    kernel: &Kernel,
    rows: &[&[f32]],
    inverse_scales: &[f32; STRIP],
    out: &mut [u8],
    sums: &mut [i32; STRIP],
) {
    match kernel.group {
        8 => int8_groups::<2>(kernel, rows, inverse_scales, out, sums),
        _ => int8_groups::<1>(kernel, rows, inverse_scales, out, sums),
    }
}

#[inline(always)]
fn int8_groups<const WORDS: usize>(
    kernel: &Kernel,
    rows: &[&[f32]],
    inverse_scales: &[f32; STRIP],
    out: &mut [u8],
    sums: &mut [i32; STRIP],
) {
    let out: &mut [u32] = bytemuck::cast_slice_mut(out);
    for (g, out) in out.as_chunks_mut::<WORDS>().0.chunks_exact_mut(kernel.strip).enumerate() {
        for word in 0..WORDS {
            let mut words = [0u32; STRIP];
            for j in 0..4 {
                let row = rows.get((g * WORDS + word) * 4 + j).copied().unwrap_or_default();
                let values = whole(row);
                for c in 0..STRIP {
                    let value = quantize(values[c] * inverse_scales[c]) as i8;
                    sums[c] += i32::from(value);
                    words[c] |= u32::from(value as u8) << (8 * j);
                }
            }
            out.iter_mut().zip(words).for_each(|(out, made)| out[word] = made);
        }
    }
}

per_isa! {
    /// Like [`right_tile_across`], of integers `value * inverse_scale`, rounded, whose sums of each column are added to `sums`.
    pub(crate) fn int8_across(kernel: &Kernel, rows: &[&[f32]], inverse_scales: &[f32; STRIP], out: &mut [u8], sums: &mut [i32; STRIP]) = int8_across_body
}

per_isa! {
    fn any_copy_tile_across(kernel: &Kernel, rows: &[&[[u8; 2]]], out: &mut [u8]) = copy_tile_across_body
}

/// The same from stored bf16, little endian, for a kernel that packs that.
pub(crate) fn copy_tile_across(isa: Isa, kernel: &Kernel, rows: &[&[[u8; 2]]], out: &mut [u8]) {
    any_copy_tile_across(isa, kernel, rows, out);
}

#[inline(always)]
fn round_body<const FMA: bool>(from: &[u8], to: &mut [u8]) {
    for (from, to) in from.as_chunks().0.iter().zip(to.as_chunks_mut().0) {
        *to = to_bf16(f32::from_le_bytes(*from)).to_le_bytes();
    }
}

per_isa! {
    fn round(from: &[u8], to: &mut [u8]) = round_body
}

/// Rounds stored f32 to stored bf16, with the instructions of `isa`.
pub(crate) fn rounding(isa: Isa) -> Round {
    match isa {
        Isa::Avx512 | Isa::Avx512Vnni | Isa::Avx512Bf16 | Isa::Amx => |from, to| round(Isa::Avx512, from, to),
        Isa::Avx2 | Isa::Avx2Vnni => |from, to| round(Isa::Avx2, from, to),
        Isa::Portable | Isa::Neon | Isa::NeonDot | Isa::NeonBf16 => |from, to| round(Isa::Portable, from, to),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn kernels() -> impl Iterator<Item = (Isa, Packed)> {
        let formats = [Packed::F32, Packed::Bf16, Packed::Int8];
        Isa::available().into_iter().flat_map(move |isa| formats.map(|packed| (isa, packed)))
    }

    #[test]
    fn every_instruction_set_packs_the_same_bits() {
        let value = |i: usize| ((i * 7919 % 2003) as f32 - 1000.0) / 37.0;
        for (columns, depth) in [(16, 32), (16, 64), (3, 32), (16, 5), (11, 31)] {
            for (isa, packed) in kernels() {
                let kernel = Kernel::of(isa, packed);
                let (columns, depth) = (columns.min(kernel.strip), depth.min(packed.depth()));
                let data: Vec<Vec<f32>> =
                    (0..columns).map(|c| (0..depth).map(|k| value(c * 67 + k)).collect()).collect();
                let rows: Vec<&[f32]> = data.iter().map(Vec::as_slice).collect();
                let mut want = vec![0; kernel.right_tile() / 2];
                let mut stored = Vec::new();
                for (c, row) in rows.iter().enumerate() {
                    let bytes = |x: &f32| match packed {
                        Packed::F32 => x.to_le_bytes().to_vec(),
                        Packed::Bf16 => to_bf16(*x).to_le_bytes().to_vec(),
                        Packed::Int8 => vec![(x * 2.5).round_ties_even() as i32 as u8],
                    };
                    let row: Vec<_> = row.iter().map(bytes).collect();
                    for (k, bytes) in row.iter().enumerate() {
                        want[kernel.place_in_strip(c, k)..][..bytes.len()].copy_from_slice(bytes);
                    }
                    stored.push(row.concat());
                }
                let mut out = vec![0xaa; want.len()];
                right_tile(isa, kernel, &rows, &[2.5; STRIP], &mut out);
                assert!(out == want, "{isa} {packed:?} {columns} columns, depth {depth}");
                let stored: Vec<&[u8]> = stored.iter().map(Vec::as_slice).collect();
                out.fill(0xaa);
                copy_tile(isa, kernel, &stored, &mut out);
                assert!(out == want, "{isa} {packed:?} {columns} columns, depth {depth}, stored");
            }
        }
    }

    #[test]
    fn depth_across_rows_packs_the_same_bits() {
        for (depth, columns) in [(32, 16), (31, 16), (14, 16), (5, 16), (32, 3), (1, 0)] {
            for (isa, packed) in kernels().filter(|(_, packed)| *packed != Packed::Int8) {
                let kernel = Kernel::of(isa, packed);
                let (columns, depth) = (columns.min(kernel.strip), depth.min(packed.depth()));
                let data: Vec<Vec<f32>> = (0..depth)
                    .map(|k| (0..columns).map(|c| (k * 31 + c * 7) as f32 / 9.1 - 20.0).collect())
                    .collect();
                let rows: Vec<&[f32]> = data.iter().map(Vec::as_slice).collect();
                let mut want = vec![0; kernel.right_tile() / 2];
                for (k, c) in (0..depth).flat_map(|k| (0..columns).map(move |c| (k, c))) {
                    let bytes = match packed {
                        Packed::F32 => rows[k][c].to_le_bytes().to_vec(),
                        _ => to_bf16(rows[k][c]).to_le_bytes().to_vec(),
                    };
                    want[kernel.place_in_strip(c, k)..][..bytes.len()].copy_from_slice(&bytes);
                }
                let mut out = vec![0xaa; want.len()];
                right_tile_across(isa, kernel, &rows, &mut out);
                assert!(out == want, "{isa} {packed:?} depth {depth}, {columns} columns");
                if packed == Packed::Bf16 {
                    let bytes: Vec<u8> = data.iter().flatten().flat_map(|x| x.to_le_bytes()).collect();
                    let mut stored = vec![0; bytes.len() / 2];
                    rounding(isa)(&bytes, &mut stored);
                    let rows: Vec<_> = stored.as_chunks().0.chunks(columns.max(1)).collect();
                    out.fill(0xaa);
                    copy_tile_across(isa, kernel, &rows, &mut out);
                    assert!(out == want, "{isa} stored, depth {depth}, {columns} columns");
                }
            }
        }
    }

    #[test]
    fn left_rows_of_int8_have_the_same_bits() {
        for n in [1usize, 63, 64, 65, 130, 200] {
            // Halves between two integers among them, the largest at an end, a row of zeros.
            for values in [
                (0..n).map(|i| (i as f32 - 17.5) * 0.5).collect::<Vec<_>>(),
                (0..n).map(|i| if i + 1 == n { 127.0 } else { (i % 40) as f32 + 0.5 }).collect(),
                vec![0.0; n],
            ] {
                let chunks = n.div_ceil(64) + 1;
                let largest = values.iter().fold(0.0f32, |m, x| m.max(x.abs()));
                let inverse = if largest > 0.0 { 127.0 / largest } else { 0.0 };
                for isa in Isa::available() {
                    let mut out = vec![0xaau8; chunks * 128];
                    // SAFETY: the chunks lie within `out`, every second one.
                    let row = unsafe { Row::new(out.as_mut_ptr(), 64, 128, chunks) };
                    assert_eq!(left_row(isa, Left::Uint8, 0.5, &values, row), largest / 127.0 * 0.5);
                    // What stands beyond the values is multiplied by zeros.
                    for (k, x) in values.iter().enumerate() {
                        let want = ((x * inverse).round_ties_even() as i32 + 128) as u8;
                        assert_eq!(out[k / 64 * 128 + k % 64], want, "{isa} {n} at {k}");
                    }
                    let others = out.as_chunks::<64>().0.iter().skip(1).step_by(2);
                    assert!(others.flatten().all(|&x| x == 0xaa), "{isa} {n}");
                }
            }
        }
    }

    #[test]
    fn left_rows_of_bf16_have_the_same_bits() {
        for n in [1usize, 15, 16, 31, 32, 33, 100] {
            let values: Vec<f32> = (0..n).map(|i| (i as f32 - 17.3) * 0.713).collect();
            let chunks = n.div_ceil(32) + 1;
            for isa in Isa::available() {
                let mut out = vec![0xaaaa_u16; chunks * 64];
                // SAFETY: the chunks lie within `out`, every second one.
                let row = unsafe { Row::new(out.as_mut_ptr().cast(), 64, 128, chunks) };
                left_row(isa, Left::Bf16, 0.5, &values, row);
                for (i, got) in out.iter().enumerate() {
                    let k = i / 64 * 32 + i % 64;
                    let want = match values.get(k) {
                        _ if i % 64 >= 32 => 0xaaaa,
                        Some(x) => to_bf16(x * 0.5),
                        None => 0,
                    };
                    assert_eq!(*got, want, "{isa} {n} at {i}");
                }
            }
        }
    }
}
