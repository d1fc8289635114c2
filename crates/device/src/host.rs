//! A matrix in host memory.

/// A row-major f32 tensor in host memory: what crosses the border of a device.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct HostTensor {
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    /// Values in C order; `shape` multiplied out is their number.
    pub data: Vec<f32>,
}

impl HostTensor {
    /// A tensor of `shape` over `data`.
    ///
    /// # Panics
    /// If the sizes do not multiply to the number of values: a bug in the caller, not a property of its input.
    pub fn new(shape: impl Into<Vec<usize>>, data: Vec<f32>) -> Self {
        let shape = shape.into();
        assert_eq!(shape.iter().product::<usize>(), data.len(), "shape {shape:?} over {} values", data.len());
        Self { shape, data }
    }

    /// All zeros.
    pub fn zeros(shape: impl Into<Vec<usize>>) -> Self {
        let shape = shape.into();
        let n = shape.iter().product();
        Self { shape, data: vec![0.0; n] }
    }

    /// Number of rows when the last dimension is taken as the row's width.
    pub fn rows(&self) -> usize {
        self.data.len().checked_div(self.cols()).unwrap_or(0)
    }

    /// The last dimension.
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(0)
    }

    /// Row `i`, the last dimension.
    pub fn row(&self, i: usize) -> &[f32] {
        let c = self.cols();
        &self.data[i * c..(i + 1) * c]
    }

    /// Row `i`, to write.
    pub fn row_mut(&mut self, i: usize) -> &mut [f32] {
        let c = self.cols();
        &mut self.data[i * c..(i + 1) * c]
    }
}
