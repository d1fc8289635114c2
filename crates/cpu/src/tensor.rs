//! Activations: rows of f32 in a pooled block. Slices are views.

use crate::memory::Pooled;

/// A matrix of f32 on the host. Cloning and slicing share the memory, which returns to the device's pool when
/// the last view is dropped.
#[derive(Debug, Clone)]
pub struct Tensor {
    block: Pooled,
    /// Index of the first value in the block.
    start: usize,
    rows: usize,
    cols: usize,
    /// Values from one row to the next.
    stride: usize,
}

impl Tensor {
    /// A whole block as `[rows, cols]`.
    pub(crate) fn new(block: Pooled, rows: usize, cols: usize) -> Self {
        assert!(rows * cols * size_of::<f32>() <= block.len());
        Self { block, start: 0, rows, cols, stride: cols }
    }

    /// Number of rows.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// Number of columns.
    pub fn cols(&self) -> usize {
        self.cols
    }

    /// Row `i`.
    #[inline]
    pub fn row(&self, i: usize) -> &[f32] {
        assert!(i < self.rows, "row {i} of {}", self.rows);
        let at = self.start + i * self.stride;
        &self.block.values::<f32>(at + self.cols)[at..]
    }

    /// Its memory, to write, if no other tensor shares it: the values of its first `rows` rows and those between.
    pub(crate) fn values_mut(&mut self) -> Option<&mut [f32]> {
        let count = self.start + self.rows * self.stride;
        let block = self.block.alone()?;
        let count = count.min(block.len() / size_of::<f32>());
        Some(&mut block.values_mut::<f32>(count)[self.start..])
    }

    /// Values from one row to the next.
    pub(crate) fn stride(&self) -> usize {
        self.stride
    }

    /// A view of some rows and columns, which must lie inside.
    pub(crate) fn view(&self, rows: std::ops::Range<usize>, cols: std::ops::Range<usize>) -> Self {
        assert!(rows.start <= rows.end && rows.end <= self.rows);
        assert!(cols.start <= cols.end && cols.end <= self.cols);
        Self {
            block: self.block.clone(),
            start: self.start + rows.start * self.stride + cols.start,
            rows: rows.len(),
            cols: cols.len(),
            stride: self.stride,
        }
    }
}
