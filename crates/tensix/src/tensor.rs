//! Tensors and weights in device memory.

use std::sync::Arc;

use pi0_device::{NormKind, WeightSource};

use crate::dram::Region;
use crate::layout::{Format, TILE, tiles};

/// An activation: f32 tiles in device memory, interleaved over the banks; a part of a larger one if it is a
/// slice. Cloning shares.
///
/// Rows that fill the last tile hold anything finite; columns that fill it hold zeros.
#[derive(Debug, Clone)]
pub struct Tensor {
    pub(crate) region: Arc<Region>,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// Tiles in a row of tiles of the memory it lies in.
    pub(crate) pitch: usize,
    /// Index of its first tile there.
    pub(crate) first: usize,
}

impl Tensor {
    pub(crate) fn whole(region: Region, rows: usize, cols: usize) -> Self {
        Self { region: Arc::new(region), rows, cols, pitch: tiles(cols), first: 0 }
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
        tiles(self.cols)
    }

    /// Index of a tile in memory.
    pub(crate) fn tile(&self, row: usize, col: usize) -> u32 {
        (self.first + row * self.pitch + col) as u32
    }

    /// The part from `row` and `col` (multiples of the tile size), sharing memory.
    pub(crate) fn view(&self, row: usize, col: usize, rows: usize, cols: usize) -> Self {
        let first = self.first + row / TILE * self.pitch + col / TILE;
        Self { region: Arc::clone(&self.region), rows, cols, pitch: self.pitch, first }
    }
}

/// A weight as a kernel wants it.
#[derive(Debug)]
pub struct Weight {
    pub(crate) name: String,
    pub(crate) kind: WeightKind,
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
    pub(crate) format: Format,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    /// Tiles of one output column; one more than the inputs need where there is a bias.
    pub(crate) depth: usize,
    pub(crate) bias: bool,
}
