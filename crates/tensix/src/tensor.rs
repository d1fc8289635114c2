//! Tensors and weights in device memory.

use std::sync::{Arc, OnceLock};

use pi0_device::{NormKind, WeightSource};

use crate::dram::{Blocks, Region};
use crate::layout::{Format, TILE, tiles};

/// An activation: tiles in device memory, interleaved over the banks; a part of a larger one if it is a
/// slice. Cloning shares.
///
/// Rows that fill the last tile hold anything finite; columns that fill it hold zeros.
///
/// Where heads of an attention layer are not whole tiles, each may be stored in tiles of its own ([`Heads`]): what the
/// layer before produces so, attention reads and writes so, and the layer behind reads so. Every other operation takes
/// such a tensor apart first.
#[derive(Debug, Clone)]
pub struct Tensor {
    pub(crate) region: Arc<Region>,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// How its heads are stored, if each has tiles of its own.
    pub(crate) heads: Option<Heads>,
    /// How values are stored: f32, but bf16 where a linear layer with such weights comes next: behind norms, attention and
    /// activations. Every other operation takes f32 from it first.
    pub(crate) format: Format,
    /// Tiles in a row of tiles of the memory it lies in.
    pub(crate) pitch: usize,
    /// Index of its first tile there.
    pub(crate) first: usize,
}

impl Tensor {
    pub(crate) fn whole(region: Region, rows: usize, cols: usize) -> Self {
        Self {
            region: Arc::new(region),
            rows,
            cols,
            heads: None,
            format: Format::F32,
            pitch: tiles(cols),
            first: 0,
        }
    }

    /// Base address of the memory it lies in.
    pub(crate) fn base(&self) -> u32 {
        self.region.base()
    }

    /// Rows of tiles.
    pub(crate) fn tile_rows(&self) -> usize {
        tiles(self.rows)
    }

    /// Columns of tiles.
    pub(crate) fn tile_cols(&self) -> usize {
        tiles(self.stored_cols())
    }

    /// Columns as they are stored.
    pub(crate) fn stored_cols(&self) -> usize {
        self.heads.map_or(self.cols, |h| h.stored(self.cols))
    }

    /// The same memory, with whatever is stored as its columns.
    pub(crate) fn as_stored(&self) -> Self {
        Self { cols: self.stored_cols(), heads: None, ..self.clone() }
    }

    /// The same memory, whose columns are heads with tiles of their own.
    pub(crate) fn as_heads(&self, heads: Heads) -> Self {
        Self { cols: self.cols / heads.stored_width() * heads.width, heads: Some(heads), ..self.clone() }
    }

    /// Index of a tile in memory.
    pub(crate) fn tile(&self, row: usize, col: usize) -> u32 {
        (self.first + row * self.pitch + col) as u32
    }

    /// The part from `row` and `col` (multiples of the tile size), sharing memory.
    pub(crate) fn view(&self, row: usize, col: usize, rows: usize, cols: usize) -> Self {
        let first = self.first + row / TILE * self.pitch + col / TILE;
        Self {
            region: Arc::clone(&self.region),
            rows,
            cols,
            heads: None,
            format: self.format,
            pitch: self.pitch,
            first,
        }
    }
}

/// Heads that each begin at a tile, zeros behind them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Heads {
    /// Columns of a head.
    pub(crate) width: usize,
}

impl Heads {
    /// Columns that are stored for a head.
    pub(crate) fn stored_width(self) -> usize {
        tiles(self.width) * TILE
    }

    /// Columns that are stored for so many.
    pub(crate) fn stored(self, cols: usize) -> usize {
        cols / self.width * self.stored_width()
    }

    /// The column stored at a place; none for padding.
    pub(crate) fn column(self, stored: usize) -> Option<usize> {
        let (head, at) = (stored / self.stored_width(), stored % self.stored_width());
        (at < self.width).then_some(head * self.width + at)
    }

    /// Where a column is stored.
    pub(crate) fn place(self, col: usize) -> usize {
        col / self.width * self.stored_width() + col % self.width
    }
}

/// The side of a linear layer on which heads are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Side {
    Inputs,
    Outputs,
}

/// A weight as a kernel wants it.
#[derive(Debug)]
pub struct Weight {
    pub(crate) name: String,
    pub(crate) kind: WeightKind,
    /// Where a linear layer's values come from, to pack them again with heads that begin at tiles: only the call tells
    /// that there are such heads.
    pub(crate) source: Option<WeightSource>,
    /// What came of that.
    pub(crate) padded: OnceLock<(Side, Heads, LinearWeight)>,
}

#[derive(Debug)]
pub(crate) enum WeightKind {
    Linear(LinearWeight),
    Norm {
        kind: NormKind,
        width: usize,
        eps: f32,
        /// One row of tiles whose 32 rows are equal: what to multiply by.
        scale: Region,
        /// The same: what to add.
        bias: Option<Region>,
    },
    /// The table stays on the host.
    Embedding(WeightSource),
}

/// `x · Wᵀ`: tiles `[k][n]` of the transposed matrix, those of one output column behind each other.
#[derive(Debug)]
pub(crate) struct LinearWeight {
    pub(crate) region: Region,
    /// How its tiles, and their exponents, lie.
    pub(crate) blocks: Blocks,
    /// The exponents of bfp8.
    pub(crate) exponents: Option<Region>,
    pub(crate) format: Format,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    /// Tiles of one output column; one more than the inputs need where there is a bias.
    pub(crate) depth: usize,
    pub(crate) bias: bool,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn heads_are_stored_from_tile_to_tile() {
        let heads = Heads { width: 72 };
        assert_eq!((heads.stored_width(), heads.stored(1152)), (96, 1536));
        for col in 0..1152 {
            assert_eq!(heads.column(heads.place(col)), Some(col));
        }
        assert_eq!((0..1536).filter(|&at| heads.column(at).is_none()).count(), 16 * 24);
    }
}
