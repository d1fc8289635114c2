//! Tile layout: a matrix is cut into 32x32 tiles, row by row; a tile holds four 16x16 faces (top left, top
//! right, bottom left, bottom right), each row-major. The hardware computes on nothing else.

/// Rows and columns of a tile.
pub const TILE: usize = 32;
/// Values in a tile.
pub const TILE_VALUES: usize = TILE * TILE;

/// How the values of a tile are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Format {
    /// 4 KiB a tile.
    F32,
    /// 2 KiB a tile.
    Bf16,
    /// For weights: a sign and seven bits a value, 1 KiB a tile, and an exponent for every 16 values of a row of a face, which
    /// lie apart: 64 bytes a tile.
    Bfp8,
}

/// Values that share an exponent, and bytes of the exponents of a tile.
pub const SHARED: usize = 16;
/// See [`SHARED`].
pub const EXPONENT_BYTES: usize = TILE_VALUES / SHARED;

impl Format {
    /// Bytes of a tile.
    pub const fn tile_bytes(self) -> usize {
        match self {
            Format::F32 => 4 * TILE_VALUES,
            Format::Bf16 => 2 * TILE_VALUES,
            Format::Bfp8 => TILE_VALUES,
        }
    }

    /// The same with the exponents that lie apart.
    pub const fn whole_tile_bytes(self) -> usize {
        match self {
            Format::Bfp8 => TILE_VALUES + EXPONENT_BYTES,
            other => other.tile_bytes(),
        }
    }

    /// How activations are stored that meet weights of this format.
    pub const fn of_activations(self) -> Format {
        match self {
            Format::Bfp8 => Format::Bf16,
            other => other,
        }
    }
}

/// Number of tiles that cover `n` rows or columns.
pub const fn tiles(n: usize) -> usize {
    n.div_ceil(TILE)
}

/// Index of element `(row, col)` inside a tile.
pub const fn in_tile(row: usize, col: usize) -> usize {
    (row / 16 * 2 + col / 16) * 256 + (row % 16) * 16 + col % 16
}

/// Rounds to bf16, to nearest, ties to even; NaN stays NaN.
pub fn bf16_bits(x: f32) -> u16 {
    let bits = x.to_bits();
    if x.is_nan() {
        return (bits >> 16) as u16 | 0x40;
    }
    ((bits + 0x7FFF + (bits >> 16 & 1)) >> 16) as u16
}

/// Rounds to TF32 (10 bits of mantissa), to nearest, ties to even: what the matrix unit reads of an f32 then is the nearest it
/// can hold, where otherwise it cuts off and everything comes out a little too small.
pub fn to_tf32(x: f32) -> f32 {
    const CUT: u32 = (1 << 13) - 1;
    let bits = x.to_bits();
    if !x.is_finite() {
        return x;
    }
    f32::from_bits((bits + CUT / 2 + (bits >> 13 & 1)) & !CUT)
}

/// The value of a bf16.
pub fn bf16_value(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// 16 values as an exponent and signs with magnitudes: each is `m / 64 * 2^(exponent - 127)`, rounded to nearest. None if a
/// value is not finite.
pub fn to_bfp8(values: &[f32; SHARED]) -> Option<(u8, [u8; SHARED])> {
    let largest = values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
    if !values.iter().all(|v| v.is_finite()) {
        return None;
    }
    let with = |exponent: u8| {
        let scale = 2f64.powi(6 + 127 - i32::from(exponent));
        values.map(|v| (f64::from(v.abs()) * scale).round_ties_even() as u32)
    };
    // The largest magnitude has its first bit set, unless the exponent is as small as can be.
    let mut exponent = (largest.to_bits() >> 23).max(1) as u8;
    if with(exponent).iter().any(|&m| m > 127) {
        exponent = exponent.saturating_add(1);
    }
    let magnitudes = with(exponent).map(|m| m.min(127) as u8);
    let mut bytes = [0; SHARED];
    for ((byte, m), v) in bytes.iter_mut().zip(magnitudes).zip(values) {
        // A negative zero would be read as minus infinity.
        *byte = if m == 0 { 0 } else { u8::from(v.is_sign_negative()) << 7 | m };
    }
    Some((exponent, bytes))
}

/// The value of a sign and magnitude with an exponent.
pub fn bfp8_value(exponent: u8, byte: u8) -> f32 {
    let value = f64::from(byte & 0x7F) / 64.0 * 2f64.powi(i32::from(exponent) - 127);
    (if byte & 0x80 == 0 { value } else { -value }) as f32
}

/// Writes one tile as bfp8, appended to `out`, and its exponents, appended to `exponents`. False if a value is not finite.
pub fn push_bfp8_tile(
    out: &mut Vec<u8>,
    exponents: &mut Vec<u8>,
    value: impl Fn(usize, usize) -> f32,
) -> bool {
    for (face_row, face_col) in [(0, 0), (0, 16), (16, 0), (16, 16)] {
        for row in 0..16 {
            let values = std::array::from_fn(|col| value(face_row + row, face_col + col));
            let Some((exponent, bytes)) = to_bfp8(&values) else { return false };
            exponents.push(exponent);
            out.extend(bytes);
        }
    }
    true
}

/// Writes one tile of f32 or bf16 (bfp8 has [a function of its own](push_bfp8_tile)): `value(row, col)` for each of its 1024 elements, appended to `out`.
pub fn push_tile(out: &mut Vec<u8>, format: Format, value: impl Fn(usize, usize) -> f32) {
    let start = out.len();
    out.resize(start + format.tile_bytes(), 0);
    let tile = &mut out[start..];
    for row in 0..TILE {
        for col in 0..TILE {
            let (i, v) = (in_tile(row, col), value(row, col));
            match format {
                Format::F32 => tile[4 * i..4 * i + 4].copy_from_slice(&v.to_le_bytes()),
                Format::Bf16 => tile[2 * i..2 * i + 2].copy_from_slice(&bf16_bits(v).to_le_bytes()),
                Format::Bfp8 => {}
            }
        }
    }
}

/// Row-major values to tiles; what lies outside the matrix is zero.
///
/// # Panics
/// If `data` is not `rows * cols` long.
pub fn to_tiles(data: &[f32], rows: usize, cols: usize, format: Format) -> Vec<u8> {
    assert_eq!(data.len(), rows * cols, "{rows}x{cols} over {} values", data.len());
    let mut out = Vec::with_capacity(tiles(rows) * tiles(cols) * format.tile_bytes());
    for tile_row in 0..tiles(rows) {
        for tile_col in 0..tiles(cols) {
            push_tile(&mut out, format, |r, c| {
                let (r, c) = (tile_row * TILE + r, tile_col * TILE + c);
                if r < rows && c < cols { data[r * cols + c] } else { 0.0 }
            });
        }
    }
    out
}

/// f32 tiles, `tile_cols` of them in each row of tiles, to the row-major values of their upper left
/// `rows x cols` part.
///
/// # Panics
/// If there are fewer tiles than that part needs.
pub fn from_tiles(bytes: &[u8], rows: usize, cols: usize, tile_cols: usize) -> Vec<f32> {
    let mut out = Vec::with_capacity(rows * cols);
    for row in 0..rows {
        for col in 0..cols {
            let tile = row / TILE * tile_cols + col / TILE;
            let at = tile * Format::F32.tile_bytes() + 4 * in_tile(row % TILE, col % TILE);
            out.push(f32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]));
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn block_floats_are_as_near_as_seven_bits_allow() {
        let mut state = 7u32;
        for scale in [1.0f32, 3e-20, 7e30, 1e-38] {
            let values: [f32; SHARED] = std::array::from_fn(|_| {
                state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
                (state as i32 as f32 / 2f32.powi(31)) * scale
            });
            let (exponent, bytes) = to_bfp8(&values).unwrap();
            let largest = values.iter().fold(0.0f32, |m, v| m.max(v.abs()));
            for (v, byte) in values.into_iter().zip(bytes) {
                let error = (f64::from(bfp8_value(exponent, byte)) - f64::from(v)).abs();
                // Below that, exponents end.
                let bound = (f64::from(largest) / 127.0).max(2f64.powi(-133));
                assert!(error <= bound, "{v} as {byte:02x} of {exponent}");
            }
        }
        // What is representable stays; the largest magnitude may carry into the exponent; nothing is a negative zero.
        let mut values = [0.0; SHARED];
        values[..6].copy_from_slice(&[1.0, -0.5, 127.0 / 64.0, -1.0 / 64.0, -0.001, -0.0]);
        let (exponent, bytes) = to_bfp8(&values).unwrap();
        assert_eq!((exponent, &bytes[..6]), (127, &[64, 0x80 | 32, 127, 0x81, 0, 0][..]));
        values[0] = 1.999;
        let (exponent, bytes) = to_bfp8(&values).unwrap();
        assert_eq!((exponent, bytes[0], bytes[2]), (128, 64, 64));
        assert_eq!(to_bfp8(&[0.0; SHARED]).unwrap().1, [0; SHARED]);
        values[9] = f32::NAN;
        assert!(to_bfp8(&values).is_none());
        values[9] = f32::INFINITY;
        assert!(to_bfp8(&values).is_none());
    }

    #[test]
    fn the_nearest_of_ten_bits() {
        let step = 2f32.powi(-10);
        for (x, want) in [
            (1.0, 1.0),
            (1.0 + 0.4 * step, 1.0),
            (1.0 + 0.5 * step, 1.0),
            (1.0 + 0.6 * step, 1.0 + step),
            (-1.0 - 1.5 * step, -1.0 - 2.0 * step),
            (2.0 - 0.1 * step, 2.0),
            (0.0, 0.0),
            (f32::INFINITY, f32::INFINITY),
        ] {
            assert_eq!(to_tf32(x), want, "{x}");
        }
        assert!(to_tf32(f32::NAN).is_nan());
    }

    #[test]
    fn faces_lie_in_order() {
        assert_eq!(in_tile(0, 0), 0);
        assert_eq!(in_tile(0, 15), 15);
        assert_eq!(in_tile(1, 0), 16);
        assert_eq!(in_tile(0, 16), 256);
        assert_eq!(in_tile(16, 0), 512);
        assert_eq!(in_tile(31, 31), 1023);
        let mut seen = [false; TILE_VALUES];
        for r in 0..TILE {
            for c in 0..TILE {
                assert!(!std::mem::replace(&mut seen[in_tile(r, c)], true));
            }
        }
    }

    #[test]
    fn odd_sizes_return_and_are_padded_with_zeros() {
        for (rows, cols) in [(1, 1), (32, 32), (33, 65), (31, 97), (64, 5)] {
            let data: Vec<f32> = (0..rows * cols).map(|i| 1.0 + i as f32).collect();
            let bytes = to_tiles(&data, rows, cols, Format::F32);
            assert_eq!(bytes.len(), tiles(rows) * tiles(cols) * 4096);
            assert_eq!(from_tiles(&bytes, rows, cols, tiles(cols)), data);
            let all = from_tiles(&bytes, tiles(rows) * TILE, tiles(cols) * TILE, tiles(cols));
            assert_eq!(all.iter().filter(|&&v| v != 0.0).count(), rows * cols);
        }
    }

    #[test]
    fn bf16_rounds_to_nearest_even() {
        for (x, want) in [
            (1.0f32, 1.0f32),
            (1.003_906_3, 1.0),      // half way, even below
            (1.011_718_8, 1.015625), // half way, even above
            (-3.17, -3.171875),
            (f32::INFINITY, f32::INFINITY),
        ] {
            assert_eq!(bf16_value(bf16_bits(x)), want, "{x}");
        }
        assert!(bf16_value(bf16_bits(f32::NAN)).is_nan());
        // A NaN whose payload is only in the lower half must not become infinity.
        assert!(bf16_value(bf16_bits(f32::from_bits(0x7F80_0001))).is_nan());
    }
}
