//! The inner loops of matrix multiplication, one set for each instruction set and number format.
//!
//! Every kernel multiplies a panel of a few rows ("left", activations) with a panel of two *strips* of columns
//! ("right", weights) into a tile of f32 or i32 sums. Layouts, in units of the *depth tile* of `depth` values
//! (16 f32, 32 bf16 or 64 int8: one cache line):
//!
//! - left panel: `[depth tiles][rows][depth]`, rows filled up to a multiple of `row_align`;
//! - right panel: `[depth tiles][2 strips][depth / group][strip columns][group]`, where the neighbours in depth that
//!   one instruction sums lie together: a `group` of 4 bytes (1 f32, 2 bf16, 4 int8) for dot products and plain
//!   multiplications, 8 bytes for products of small matrices in vector registers;
//! - tile: `[rows][2 * strip]`.
//!
//! This is the layout of AMX tiles; AVX-512 reads the same one.

/// Defines a [`Micro`] that picks the variant of `$inner` with the right number of rows.
#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
macro_rules! by_rows {
    ($name:ident, $inner:ident, $($rows:literal)*) => {
        unsafe fn $name(rows: usize, tiles: usize, operands: Operands, sums: *mut f32, first: bool) {
            type Inner = unsafe fn(usize, *const u8, *const u8, *mut f32, bool);
            const VARIANTS: &[Inner] = &[$($inner::<$rows>),*];
            // SAFETY: forwarded from the caller, `rows` among it.
            unsafe { VARIANTS[rows - 1](tiles, operands.left, operands.right, sums, first) }
        }
    };
}

/// Transposes the 4 by 4 blocks of 4 bytes that 4 neighbours of `$count` registers have in each 16 bytes: pairs of
/// registers, then pairs of pairs.
#[cfg(target_arch = "x86_64")]
macro_rules! transpose_blocks {
    ($x:ident, $count:literal, $low32:ident, $high32:ident, $low64:ident, $high64:ident) => {{
        let y: [_; $count] = std::array::from_fn(|i| {
            let (a, b) = ($x[i & !1], $x[i | 1]);
            if i & 1 == 0 { $low32(a, b) } else { $high32(a, b) }
        });
        std::array::from_fn::<_, $count, _>(|i| {
            let (a, b) = (y[i & !3 | i >> 1 & 1], y[i & !3 | i >> 1 & 1 | 2]);
            if i & 1 == 0 { $low64(a, b) } else { $high64(a, b) }
        })
    }};
}

#[cfg(target_arch = "x86_64")]
mod amx;
#[cfg(target_arch = "x86_64")]
mod avx2;
#[cfg(target_arch = "x86_64")]
mod avx512;
#[cfg(target_arch = "aarch64")]
mod neon;
pub(crate) mod pack;
mod portable;

use crate::Isa;

#[cfg(target_arch = "x86_64")]
pub(crate) use amx::Tiles;

/// Number format of packed weights, and of packed keys and values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Packed {
    F32,
    Bf16,
    Int8,
}

impl Packed {
    /// Bytes of one value.
    pub(crate) fn size(self) -> usize {
        match self {
            Packed::F32 => 4,
            Packed::Bf16 => 2,
            Packed::Int8 => 1,
        }
    }

    /// Values of one depth tile.
    pub(crate) fn depth(self) -> usize {
        64 / self.size()
    }
}

/// Number format of the left operand.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Left {
    F32,
    Bf16,
    /// Signed, times a scale for each row.
    Int8,
    /// The same plus 128: some dot products take the left operand unsigned.
    Uint8,
    /// The same as [`Left::Int8`] in 16 bits, of each four neighbours the even two first: pairs to multiply with pairs
    /// of widened weights.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    Int16,
}

impl Left {
    /// Bytes of one value.
    pub(crate) fn size(self) -> usize {
        match self {
            Left::F32 => 4,
            Left::Bf16 => 2,
            Left::Int8 | Left::Uint8 => 1,
            Left::Int16 => 2,
        }
    }

    /// Whether rows are integers times a scale.
    pub(crate) fn integer(self) -> bool {
        matches!(self, Left::Int8 | Left::Uint8 | Left::Int16)
    }

    /// Where value `k` of a row lies in a chunk, counted in values.
    #[cfg(test)]
    fn place(self, k: usize) -> usize {
        if self == Left::Int16 { k / 4 * 4 + [0, 2, 1, 3][k % 4] } else { k }
    }
}

/// Adds `left · right` over `tiles` depth tiles into a tile of sums, which starts at zero if `first`.
///
/// # Safety
/// The instruction set is present and `enter` was called on this thread. `rows` is in `1..=max_rows`. `left` and
/// `right` hold `tiles` depth tiles of the layouts above, `left` with `rows` filled up to `row_align`; `sums` holds
/// `[max_rows][2 * strip]` values of 4 bytes, initialized unless `first`. All are aligned to 64 bytes.
pub(crate) type Micro = unsafe fn(rows: usize, tiles: usize, operands: Operands, sums: *mut f32, first: bool);

/// The addresses that a [`Micro`] reads.
#[derive(Clone, Copy)]
pub(crate) struct Operands {
    pub(crate) left: *const u8,
    pub(crate) right: *const u8,
    /// What a later call will read: a kernel whose loads the processor does not foresee fetches from here on as many
    /// cache lines for each depth tile, at least one unless it [`fetches`](Kernel::fetches). Any address will do.
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub(crate) next: *const u8,
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub(crate) lines: usize,
    /// Groups of 4 bytes in depth that are multiplied of one more depth tile: none unless the kernel has
    /// [`tails`](Kernel::tails).
    #[cfg_attr(not(target_arch = "x86_64"), allow(dead_code))]
    pub(crate) tail: usize,
}

/// One way to multiply.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) max_rows: usize,
    pub(crate) row_align: usize,
    /// Columns of one strip; a right panel has two.
    pub(crate) strip: usize,
    /// Bytes of the right operand's neighbours in depth that lie together: 4 or 8.
    pub(crate) group: usize,
    pub(crate) left: Left,
    pub(crate) packed: Packed,
    /// Depth tiles whose operands should stay in the second-level cache.
    pub(crate) block: usize,
    /// Depth tiles of a right panel that all row panels should use while they are in the first-level cache.
    pub(crate) step: usize,
    /// None for a kernel slow enough to read its operands from further away.
    pub(crate) resident: Option<Resident>,
    /// Whether the loop asks by itself for what follows in the right operand, so that it needs telling only of another
    /// panel, and takes no line to fetch for an answer.
    pub(crate) fetches: bool,
    /// Whether the loop can end within a depth tile.
    pub(crate) tails: bool,
    pub(crate) micro: Micro,
    /// Prepares the calling thread, and undoes it.
    pub(crate) enter: fn(),
    pub(crate) leave: fn(),
}

/// What should stay in the second-level cache while the weight passes by.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Resident {
    /// The left operand's share of it, or that of sums where depth comes in several blocks.
    pub(crate) percent: usize,
    /// Depth tiles of a block then, in which the left operand is a small guest.
    pub(crate) deep_block: usize,
}

impl Kernel {
    /// The kernel of an instruction set for a weight format.
    pub(crate) fn of(isa: Isa, packed: Packed) -> &'static Kernel {
        Self::native(isa, packed).unwrap_or(match packed {
            Packed::F32 => &portable::F32,
            Packed::Bf16 => &portable::BF16_AS_F32,
            Packed::Int8 => &portable::INT8,
        })
    }

    #[cfg(target_arch = "x86_64")]
    fn native(isa: Isa, packed: Packed) -> Option<&'static Kernel> {
        Some(match (isa, packed) {
            (Isa::Amx, Packed::Bf16) => &amx::BF16,
            (Isa::Amx, Packed::Int8) => &amx::INT8,
            (Isa::Avx512Bf16, Packed::Bf16) => &avx512::BF16_DOT,
            (Isa::Avx512Vnni | Isa::Avx512Bf16, Packed::Int8) => &avx512::INT8_DOT,
            (Isa::Avx512 | Isa::Avx512Vnni | Isa::Avx512Bf16 | Isa::Amx, Packed::F32) => &avx512::F32,
            (Isa::Avx512 | Isa::Avx512Vnni, Packed::Bf16) => &avx512::BF16_AS_F32,
            (Isa::Avx512, Packed::Int8) => &avx512::INT8_AS_INT16,
            (Isa::Avx2 | Isa::Avx2Vnni, Packed::F32) => &avx2::F32,
            (Isa::Avx2 | Isa::Avx2Vnni, Packed::Bf16) => &avx2::BF16_AS_F32,
            (Isa::Avx2, Packed::Int8) => &avx2::INT8_AS_INT16,
            (Isa::Avx2Vnni, Packed::Int8) => &avx2::INT8_DOT,
            _ => return None,
        })
    }

    #[cfg(target_arch = "aarch64")]
    fn native(isa: Isa, packed: Packed) -> Option<&'static Kernel> {
        Some(match (isa, packed) {
            (Isa::Neon | Isa::NeonDot | Isa::NeonBf16, Packed::F32) => &neon::F32,
            (Isa::Neon | Isa::NeonDot, Packed::Bf16) => &neon::BF16_AS_F32,
            (Isa::Neon, Packed::Int8) => &neon::INT8_AS_INT16,
            (Isa::NeonDot, Packed::Int8) => &neon::INT8_DOT,
            (Isa::NeonBf16, Packed::Bf16) => &neon::BF16_MATRIX,
            (Isa::NeonBf16, Packed::Int8) => &neon::INT8_MATRIX,
            _ => return None,
        })
    }

    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    fn native(_: Isa, _: Packed) -> Option<&'static Kernel> {
        None
    }

    /// Values of one depth tile.
    pub(crate) fn depth(&self) -> usize {
        self.packed.depth()
    }

    /// Columns of one right panel.
    pub(crate) fn columns(&self) -> usize {
        2 * self.strip
    }

    /// Depth tiles that hold `inputs` values.
    pub(crate) fn tiles(&self, inputs: usize) -> usize {
        inputs.div_ceil(self.depth())
    }

    /// Bytes of one depth tile of a right panel.
    pub(crate) fn right_tile(&self) -> usize {
        self.columns() * self.depth() * self.packed.size()
    }

    /// Bytes of one tile of sums.
    pub(crate) fn tile(&self) -> usize {
        self.max_rows * self.columns() * size_of::<f32>()
    }

    /// Bytes of one row of one depth tile of a left panel.
    pub(crate) fn left_chunk(&self) -> usize {
        self.depth() * self.left.size()
    }

    /// Where value `k` of column `column` lies in one depth tile of a strip, in bytes.
    #[cfg(test)]
    fn place_in_strip(&self, column: usize, k: usize) -> usize {
        let byte = k * self.packed.size();
        (byte / self.group * self.strip + column) * self.group + byte % self.group
    }

    /// The depth tiles of a product of this depth and what is multiplied of one more: all of it, unless the kernel ends
    /// within it.
    pub(crate) fn depth_of(&self, inputs: usize) -> (usize, usize) {
        match self.tails {
            true => (inputs / self.depth(), (inputs % self.depth()).div_ceil(4 / self.packed.size())),
            false => (self.tiles(inputs), 0),
        }
    }

    /// How `rows` rows divide into panels.
    pub(crate) fn panels(&self, rows: usize) -> Panels {
        Panels { rows, count: rows.div_ceil(self.max_rows), max: self.max_rows, align: self.row_align }
    }
}

/// The division of rows into panels: as even as possible, or full panels where rows must be aligned.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Panels {
    rows: usize,
    pub(crate) count: usize,
    max: usize,
    align: usize,
}

impl Panels {
    /// First row of panel `i`; of the panel after the last, the number of rows.
    pub(crate) fn start(&self, i: usize) -> usize {
        if self.align > 1 {
            return (i * self.max).min(self.rows);
        }
        let (each, more) = (self.rows / self.count, self.rows % self.count);
        i * each + i.min(more)
    }

    /// Rows of panel `i`.
    pub(crate) fn len(&self, i: usize) -> usize {
        self.start(i + 1) - self.start(i)
    }

    /// Rows of panel `i`, filled up.
    pub(crate) fn padded(&self, i: usize) -> usize {
        self.len(i).next_multiple_of(self.align)
    }

    /// The panel of a row.
    fn of_row(&self, row: usize) -> usize {
        if self.align > 1 {
            return row / self.max;
        }
        let (each, more) = (self.rows / self.count, self.rows % self.count);
        let longer = more * (each + 1);
        if row < longer { row / (each + 1) } else { more + (row - longer) / each }
    }

    /// The place of a row in a packed left operand.
    ///
    /// # Safety
    /// `start` is a left operand of these panels with `row_bytes` bytes a row, in chunks of `chunk` bytes; nothing
    /// else uses this row meanwhile.
    pub(crate) unsafe fn place(
        &self,
        row: usize,
        start: *mut u8,
        chunk: usize,
        row_bytes: usize,
    ) -> pack::Row {
        let panel = self.of_row(row);
        let first = self.start(panel);
        // SAFETY: a panel holds `row_bytes` for each of its rows, in which the chunks of its rows take turns.
        unsafe {
            let at = start.add(first * row_bytes + (row - first) * chunk);
            pack::Row::new(at, chunk, self.padded(panel) * chunk, row_bytes / chunk)
        }
    }

    /// Rows of all panels, filled up.
    pub(crate) fn total(&self) -> usize {
        self.rows.next_multiple_of(self.align)
    }
}

/// For kernels that need no preparation of the thread.
fn nothing() {}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::math::to_bf16;
    use crate::memory::Block;

    /// Value `k` of row or column `i`, whose first is all extremes: as many bits as the format has. Every sum of such
    /// products is exact in f32.
    fn value(packed: Packed, seed: usize, i: usize, k: usize) -> i32 {
        let value = if i == 0 { -127 } else { ((i * 31 + k * 17 + seed) * 7919 % 255) as i32 - 127 };
        if packed == Packed::Int8 { value } else { 2 * value + 1 }
    }

    fn write(value: i32, format: Left, out: &mut [u8]) {
        match format {
            Left::F32 => out.copy_from_slice(&(value as f32).to_le_bytes()),
            Left::Bf16 => out.copy_from_slice(&to_bf16(value as f32).to_le_bytes()),
            Left::Int8 => out[0] = value as i8 as u8,
            Left::Uint8 => out[0] = (value + 128) as u8,
            Left::Int16 => out.copy_from_slice(&(value as i16).to_le_bytes()),
        }
    }

    #[test]
    fn depth_may_end_within_a_tile() {
        for (isa, packed) in Isa::available()
            .iter()
            .flat_map(|&isa| [Packed::F32, Packed::Bf16, Packed::Int8].map(|p| (isa, p)))
        {
            let kernel = Kernel::of(isa, packed);
            for rows in [1, kernel.max_rows - 1, kernel.max_rows] {
                let padded = rows.next_multiple_of(kernel.row_align);
                let (chunk, half) = (kernel.left_chunk(), kernel.right_tile() / 2);
                // Ones in the first values of the second tile, garbage behind them: small, so that all sums are exact.
                let inputs = kernel.depth() + 2 * (4 / packed.size());
                let (tiles, tail) = kernel.depth_of(inputs);
                let depth = if kernel.tails { 2 * kernel.depth() } else { inputs };
                let (mut left, mut right) =
                    (Block::new(2 * padded * chunk), Block::new(2 * kernel.right_tile()));
                let size = packed.size();
                let format = [Left::Int8, Left::Bf16, Left::Bf16, Left::F32][size - 1];
                for k in 0..depth {
                    for r in 0..rows {
                        let at = (k / kernel.depth() * padded + r) * chunk
                            + kernel.left.place(k % kernel.depth()) * kernel.left.size();
                        let bytes = left.values_mut::<u8>(2 * padded * chunk);
                        write(1, kernel.left, &mut bytes[at..at + kernel.left.size()]);
                    }
                    for c in 0..kernel.columns() {
                        let start = (2 * (k / kernel.depth()) + c / kernel.strip) * half;
                        let at = start + kernel.place_in_strip(c % kernel.strip, k % kernel.depth());
                        write(1, format, &mut right.values_mut::<u8>(2 * kernel.right_tile())[at..at + size]);
                    }
                }
                let mut sums = Block::new(kernel.tile());
                let (left, right) = (left.as_ptr().cast_const(), right.as_ptr().cast_const());
                (kernel.enter)();
                // SAFETY: the instruction set is present and entered; the operands hold two depth tiles of the kernel's
                // layouts, the sums one tile, and blocks are aligned.
                unsafe {
                    let operands = Operands { left, right, next: right, lines: 1, tail };
                    (kernel.micro)(rows, tiles, operands, sums.as_ptr().cast(), true);
                }
                (kernel.leave)();
                let each = if kernel.left == Left::Uint8 { 129 } else { 1 };
                for &sum in &sums.values_mut::<u32>(kernel.tile() / 4)[..rows * kernel.columns()] {
                    let got =
                        if packed == Packed::Int8 { sum as usize } else { f32::from_bits(sum) as usize };
                    assert_eq!(got, inputs * each, "{isa} {packed:?}, {rows} rows");
                }
            }
        }
    }

    #[test]
    fn every_kernel_sums_exactly_what_it_should() {
        for (isa, packed) in Isa::available()
            .iter()
            .flat_map(|&isa| [Packed::F32, Packed::Bf16, Packed::Int8].map(|p| (isa, p)))
        {
            let kernel = Kernel::of(isa, packed);
            let (depth, columns, size) = (kernel.depth(), kernel.columns(), packed.size());
            const TILES: usize = 3;
            let right_format = match packed {
                Packed::F32 => Left::F32,
                Packed::Bf16 => Left::Bf16,
                Packed::Int8 => Left::Int8,
            };
            let mut right = Block::new(TILES * kernel.right_tile());
            let bytes = right.values_mut::<u8>(TILES * kernel.right_tile());
            for (k, c) in (0..TILES * depth).flat_map(|k| (0..columns).map(move |c| (k, c))) {
                let (strip, column) = (c / kernel.strip, c % kernel.strip);
                let start = (2 * (k / depth) + strip) * kernel.right_tile() / 2;
                let at = start + kernel.place_in_strip(column, k % depth);
                write(value(packed, 2, c, k), right_format, &mut bytes[at..at + size]);
            }
            for rows in 1..=kernel.max_rows {
                let padded = rows.next_multiple_of(kernel.row_align);
                let (chunk, size) = (kernel.left_chunk(), kernel.left.size());
                let mut left = Block::new(TILES * padded * chunk);
                let bytes = left.values_mut::<u8>(TILES * padded * chunk);
                for (r, k) in (0..rows).flat_map(|r| (0..TILES * depth).map(move |k| (r, k))) {
                    let at = (k / depth * padded + r) * chunk + kernel.left.place(k % depth) * size;
                    write(value(packed, 1, r, k), kernel.left, &mut bytes[at..at + size]);
                }
                let mut sums = Block::new(kernel.tile());
                (kernel.enter)();
                // The first depth tile alone, then the others on top of it.
                for (tile, tiles) in [(0, 1), (1, TILES - 1)] {
                    // SAFETY: the instruction set is present and entered; the operands hold as many depth tiles of
                    // the kernel's layouts, the sums one tile, and blocks are aligned.
                    unsafe {
                        let right = right.as_ptr().add(tile * kernel.right_tile()).cast_const();
                        let left = left.as_ptr().add(tile * padded * chunk).cast_const();
                        let operands = Operands { left, right, next: right, lines: 1, tail: 0 };
                        (kernel.micro)(rows, tiles, operands, sums.as_ptr().cast(), tile == 0);
                    }
                }
                (kernel.leave)();
                let sums = sums.values_mut::<u32>(kernel.tile() / 4);
                for (r, c) in (0..rows).flat_map(|r| (0..columns).map(move |c| (r, c))) {
                    let offset = if kernel.left == Left::Uint8 { 128 } else { 0 };
                    let want: i32 = (0..TILES * depth)
                        .map(|k| (value(packed, 1, r, k) + offset) * value(packed, 2, c, k))
                        .sum();
                    let got = match packed {
                        Packed::Int8 => sums[r * columns + c] as i32,
                        _ => f32::from_bits(sums[r * columns + c]) as i32,
                    };
                    assert_eq!(got, want, "{isa} {packed:?}, row {r} of {rows}, column {c}");
                }
            }
        }
    }
}
