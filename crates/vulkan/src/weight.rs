//! Weights packed for the kernels.

use std::sync::Arc;

use half::{bf16, f16};
use pi0_device::{Dtype, LinearPart, NormKind, TensorSource, WeightSource};

use crate::device::Format;
use crate::kernels::{Unit, Units};
use crate::memory::Region;

/// How a matrix is stored, as the kernels number it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stored {
    F32 = 0,
    Bf16 = 1,
    /// 8-bit integers with a scale a row.
    Int8 = 2,
    F16 = 3,
}

impl Stored {
    pub(crate) fn bytes(self) -> usize {
        match self {
            Stored::F32 => 4,
            Stored::Bf16 | Stored::F16 => 2,
            Stored::Int8 => 1,
        }
    }
}

/// A weight on the device.
#[derive(Debug)]
pub enum Weight {
    /// `[out, in]`.
    Linear(Linear),
    /// `[width]` and, of a layer norm, a bias.
    Norm(NormWeight),
    /// An embedding table.
    Embedding(Table),
}

/// A linear layer.
#[derive(Debug)]
pub struct Linear {
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
    pub(crate) stored: Stored,
    /// Rows of `stride` bytes, padded with zeros.
    pub(crate) matrix: Arc<Region>,
    pub(crate) stride: usize,
    /// The bias `[out]`, then the scales `[out]`, as far as there are any.
    pub(crate) columns: Option<Arc<Region>>,
    pub(crate) bias: bool,
    /// What multiplies it; none for f32 multiply-adds.
    pub(crate) units: Option<Units>,
}

impl Linear {
    /// Whether each row has a scale.
    pub(crate) fn scaled(&self) -> bool {
        self.stored == Stored::Int8 || self.stored == Stored::F16 && self.units.is_some()
    }
}

/// A norm.
#[derive(Debug)]
pub struct NormWeight {
    pub(crate) kind: NormKind,
    pub(crate) width: usize,
    pub(crate) eps: f32,
    /// The weight, then the bias if it has one.
    pub(crate) values: Arc<Region>,
}

/// An embedding table: on the device where it fits, else read on the host row by row.
#[derive(Debug)]
pub struct Table {
    pub(crate) source: TensorSource,
    pub(crate) region: Option<Arc<Region>>,
    pub(crate) stored: Stored,
}

/// Inputs of a row are padded to this many, whole chunks of every kernel.
pub(crate) const INPUT_CHUNK: usize = 128;

/// A linear layer's shape and format before it is packed.
pub(crate) struct Packing<'a> {
    pub(crate) parts: &'a [LinearPart],
    pub(crate) outputs: usize,
    pub(crate) inputs: usize,
    pub(crate) stored: Stored,
    pub(crate) stride: usize,
    pub(crate) units: Option<Units>,
}

impl<'a> Packing<'a> {
    pub(crate) fn new(
        source: &WeightSource,
        parts: &'a [LinearPart],
        exact: bool,
        format: Format,
        units: Option<Units>,
    ) -> Self {
        let [outputs, inputs] = source.dims();
        let all = |dtype| parts.iter().all(|p| p.weight.dtype == dtype);
        let stored = match format {
            Format::F32 => Stored::F32,
            _ if exact => Stored::F32,
            Format::Int8 => Stored::Int8,
            Format::Bf16 => Stored::Bf16,
            Format::Stored if all(Dtype::Bf16) => Stored::Bf16,
            Format::Stored if all(Dtype::F16) => Stored::F16,
            Format::Stored => Stored::F32,
        };
        // What is f32 stays so. Where matrices take f16, wider numbers are brought to its range row by row.
        let units = units.filter(|_| stored != Stored::F32);
        let stored = match units {
            Some(u) if u.unit() == Unit::F16 && stored != Stored::Int8 => Stored::F16,
            _ => stored,
        };
        let stride = inputs.next_multiple_of(INPUT_CHUNK) * stored.bytes();
        Self { parts, outputs, inputs, stored, stride, units }
    }

    pub(crate) fn bytes(&self) -> usize {
        self.outputs * self.stride
    }

    /// The part that output `row` belongs to, and its row there.
    fn part(&self, mut row: usize) -> (&'a LinearPart, usize) {
        for part in self.parts {
            if row < part.outputs() {
                return (part, row);
            }
            row -= part.outputs();
        }
        unreachable!("the sum of the parts' outputs is the layer's")
    }

    /// Whether each row has a scale.
    pub(crate) fn scaled(&self) -> bool {
        self.stored == Stored::Int8 || self.stored == Stored::F16 && self.units.is_some()
    }

    /// The scale of each output row: of int8, and of f16 for matrices, where it is a power of two.
    pub(crate) fn scales(&self) -> Vec<f32> {
        if !self.scaled() {
            return vec![];
        }
        let halves = self.stored == Stored::F16;
        let mut row = vec![0.0; self.inputs];
        (0..self.outputs)
            .map(|i| {
                let (part, at) = self.part(i);
                part.read_row(at, &mut row);
                let largest = row.iter().fold(0f32, |m, x| m.max(x.abs()));
                match (largest > 0.0 && largest.is_finite(), halves) {
                    (false, _) => 1.0,
                    (true, false) => largest / 127.0,
                    // The largest value comes to between 256 and 512.
                    (true, true) => (largest.log2().floor() - 8.0).clamp(-100.0, 100.0).exp2(),
                }
            })
            .collect()
    }

    /// Biases, zero where a part has none; nothing if no part has any.
    pub(crate) fn biases(&self) -> Vec<f32> {
        if self.parts.iter().all(|p| p.bias.is_none()) {
            return vec![];
        }
        let mut all = Vec::with_capacity(self.outputs);
        for p in self.parts {
            match &p.bias {
                Some(b) => all.extend(b.to_f32()),
                None => all.resize(all.len() + p.outputs(), 0.0),
            }
        }
        all
    }

    /// Packs row `i`, `stride` bytes.
    pub(crate) fn row(&self, i: usize, scales: &[f32], values: &mut [f32], out: &mut [u8]) {
        let (part, at) = self.part(i);
        let same = matches!(
            (self.stored, part.weight.dtype),
            (Stored::F32, Dtype::F32) | (Stored::Bf16, Dtype::Bf16) | (Stored::F16, Dtype::F16)
        ) && (scales.is_empty() || self.stored != Stored::F16);
        out.fill(0);
        if same {
            let size = self.stored.bytes();
            let column = part.columns.as_ref().map_or(0, |c| c.start);
            let start = (at * part.weight.cols() + column) * size;
            let len = self.inputs * size;
            out[..len].copy_from_slice(&part.weight.bytes()[start..start + len]);
            return;
        }
        part.read_row(at, values);
        match self.stored {
            Stored::F32 => {
                out.chunks_exact_mut(4).zip(&*values).for_each(|(o, v)| o.copy_from_slice(&v.to_le_bytes()))
            }
            Stored::Bf16 => out
                .chunks_exact_mut(2)
                .zip(&*values)
                .for_each(|(o, v)| o.copy_from_slice(&bf16::from_f32(*v).to_le_bytes())),
            Stored::F16 => {
                let inv = scales.get(i).map_or(1.0, |s| 1.0 / s);
                out.chunks_exact_mut(2)
                    .zip(&*values)
                    .for_each(|(o, v)| o.copy_from_slice(&f16::from_f32(*v * inv).to_le_bytes()));
            }
            Stored::Int8 => {
                let inv = 1.0 / scales[i];
                out.iter_mut().zip(&*values).for_each(|(o, v)| {
                    *o = (v * inv).round().clamp(-127.0, 127.0) as i8 as u8;
                })
            }
        }
    }
}
