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
}

impl Format {
    /// Bytes of a tile.
    pub const fn tile_bytes(self) -> usize {
        match self {
            Format::F32 => 4 * TILE_VALUES,
            Format::Bf16 => 2 * TILE_VALUES,
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

/// The value of a bf16.
pub fn bf16_value(bits: u16) -> f32 {
    f32::from_bits(u32::from(bits) << 16)
}

/// Writes one tile: `value(row, col)` for each of its 1024 elements, appended to `out`.
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
