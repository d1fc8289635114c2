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

/// The largest value of a row and where it stands.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Largest {
    /// Its place; of equal values the first.
    pub at: usize,
    /// The value; NaN if the row holds anything but finite numbers, or nothing.
    pub value: f32,
}

impl Largest {
    /// Of one row.
    pub fn of(row: &[f32]) -> Self {
        let first = Largest { at: 0, value: row.first().copied().unwrap_or(f32::NAN) };
        let larger = |best: Self, (at, &value): (usize, &f32)| {
            if value > best.value { Self { at, value } } else { best }
        };
        let best = row.iter().enumerate().fold(first, larger);
        match row.iter().all(|x| x.is_finite()) {
            true => best,
            false => Self { value: f32::NAN, ..best },
        }
    }

    /// Of each row.
    pub fn of_rows(x: &HostTensor) -> Vec<Self> {
        (0..x.rows()).map(|i| Self::of(x.row(i))).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn of_equals_the_first_is_the_largest() {
        assert_eq!(Largest::of(&[1.0, 3.0, 3.0, 2.0]), Largest { at: 1, value: 3.0 });
        assert_eq!(Largest::of(&[f32::MIN, f32::MIN]), Largest { at: 0, value: f32::MIN });
        for row in [&[1.0, f32::NAN, 3.0][..], &[f32::INFINITY, 0.0], &[f32::NEG_INFINITY, 0.0], &[]] {
            assert!(Largest::of(row).value.is_nan(), "{row:?}");
        }
    }
}
