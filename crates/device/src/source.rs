//! Where weights come from: tensors in a mapped file or in memory, in the number format they were stored in.

use std::ops::Range;
use std::sync::Arc;

use half::{bf16, f16};

use crate::{Bytes, Error, Lazy, Result, Sink};

/// Number format of a stored tensor.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Dtype {
    F32,
    Bf16,
    F16,
}

impl Dtype {
    /// Bytes of one value.
    pub fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 | Dtype::F16 => 2,
        }
    }

    /// Values of this format, little endian, as f32, exactly: as many as there are places for.
    pub fn decode(self, bytes: &[u8], out: &mut [f32]) {
        match self {
            Dtype::F32 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *o = f32::from_le_bytes(*b);
                }
            }
            Dtype::Bf16 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *o = bf16::from_le_bytes(*b).to_f32();
                }
            }
            Dtype::F16 => {
                for (o, b) in out.iter_mut().zip(bytes.as_chunks().0) {
                    *o = f16::from_le_bytes(*b).to_f32();
                }
            }
        }
    }

    /// The name used in safetensors headers.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "F32",
            Dtype::Bf16 => "BF16",
            Dtype::F16 => "F16",
        }
    }
}

/// How the values of a matrix `[out, in]` lie in its bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Order {
    /// Output after output: C order, as PyTorch stores a matrix.
    #[default]
    Rows,
    /// Input after input, as JAX stores one: `[splits, groups, in / splits, out / groups]`. A matrix that is stored in
    /// several chunks, or by heads, is several matrices one behind the other.
    Columns {
        /// Parts of the inputs.
        splits: usize,
        /// Parts of the outputs.
        groups: usize,
    },
}

/// A stored tensor: name, format, shape and where its bytes are. Cloning shares.
#[derive(Debug, Clone)]
pub struct TensorSource {
    /// Full name in the file, for messages.
    pub name: String,
    /// How the values are stored.
    pub dtype: Dtype,
    /// Sizes, outermost first.
    pub shape: Vec<usize>,
    bytes: Bytes,
    order: Order,
}

impl TensorSource {
    /// A tensor over `bytes`, which must be as long as `shape` and `dtype` say.
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: Vec<usize>, bytes: Bytes) -> Result<Self> {
        let source = Self { name: name.into(), dtype, shape, bytes, order: Order::Rows };
        let wanted = source
            .shape
            .iter()
            .try_fold(dtype.size(), |n, &d| n.checked_mul(d))
            .ok_or_else(|| source.error("sizes overflow".into()))?;
        let got = match &source.bytes {
            Bytes::Mapped(file, range) if range.end > file.bytes().len() || range.start > range.end => {
                return Err(source.error(format!("bytes {range:?} lie outside the file")));
            }
            _ => source.byte_count(),
        };
        if got != wanted {
            let what =
                format!("{got} bytes for shape {:?} in {}, wanted {wanted}", source.shape, dtype.name());
            return Err(source.error(what));
        }
        Ok(source)
    }

    /// An f32 tensor in memory.
    pub fn from_f32(name: impl Into<String>, shape: Vec<usize>, data: &[f32]) -> Result<Self> {
        Self::new(name, Dtype::F32, shape, Bytes::Owned(Arc::new(bytemuck::cast_slice(data).to_vec())))
    }

    /// The same bytes, which lie in this order.
    pub fn in_order(mut self, order: Order) -> Result<Self> {
        if let Order::Columns { splits, groups } = order {
            let even = |n: usize, parts: usize| parts > 0 && n.is_multiple_of(parts);
            if !matches!(self.shape[..], [out, inputs] if even(out, groups) && even(inputs, splits)) {
                let what = format!("{splits} parts of inputs and {groups} of outputs, of {:?}", self.shape);
                return Err(self.error(what));
            }
        }
        self.order = order;
        Ok(self)
    }

    /// How the values lie in the bytes.
    pub fn order(&self) -> Order {
        self.order
    }

    fn error(&self, what: String) -> Error {
        Error::Source { name: self.name.clone(), what }
    }

    /// The stored bytes, little-endian values in their [`order`](Self::order). Not necessarily aligned.
    ///
    /// # Panics
    /// If they have to be made, [`fetch`](Self::fetch) was not called before, and making them fails.
    pub fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped(file, range) => &file.bytes()[range.clone()],
            Bytes::Owned(data) => data,
            Bytes::Lazy(lazy) => {
                self.fetch().unwrap_or_else(|e| panic!("{e}"));
                lazy.get().unwrap_or_default()
            }
        }
    }

    /// Number of stored bytes. Makes none.
    pub fn byte_count(&self) -> usize {
        match &self.bytes {
            Bytes::Mapped(_, range) => range.len(),
            Bytes::Owned(data) => data.len(),
            Bytes::Lazy(lazy) => lazy.maker.count(),
        }
    }

    /// Number of values.
    pub fn count(&self) -> usize {
        self.byte_count() / self.dtype.size()
    }

    /// Makes bytes that have to be made; nothing for others. They are kept as long as this tensor and its clones.
    pub fn fetch(&self) -> Result<()> {
        match &self.bytes {
            Bytes::Lazy(lazy) => lazy.fetch().map_err(|what| self.error(what)),
            _ => Ok(()),
        }
    }

    /// Whether its bytes, not made yet, can be handed to a [`Sink`] while they are made.
    pub fn pours(&self) -> bool {
        matches!(&self.bytes, Bytes::Lazy(lazy) if lazy.pours())
    }

    /// Hands the bytes to `sink` while they are made, in their [`order`](Self::order); see [`pours`](Self::pours).
    pub fn pour(&self, sink: Arc<dyn Sink>) {
        match &self.bytes {
            Bytes::Lazy(lazy) => lazy.maker.pour(sink),
            _ => sink.end(Err("these bytes are there as a whole".into())),
        }
    }

    /// The same tensor without bytes that were made for it.
    pub fn unfetched(&self) -> Self {
        match &self.bytes {
            Bytes::Lazy(lazy) => Self { bytes: Bytes::Lazy(Lazy::new(lazy.maker.clone())), ..self.clone() },
            _ => self.clone(),
        }
    }

    /// Whether its bytes take no memory that the system cannot have back: those of a mapped file.
    pub fn is_mapped(&self) -> bool {
        matches!(self.bytes, Bytes::Mapped(..))
    }

    /// The same bytes under another shape of as many values.
    pub fn reshaped(&self, shape: Vec<usize>) -> Result<Self> {
        if self.order != Order::Rows && shape != self.shape {
            return Err(self.error(format!("its columns lie together and do not fit {shape:?}")));
        }
        Self::new(self.name.clone(), self.dtype, shape, self.bytes.clone())?.in_order(self.order)
    }

    /// Rows, when the last dimension is the row's width.
    pub fn rows(&self) -> usize {
        self.shape.split_last().map_or(1, |(_, outer)| outer.iter().product())
    }

    /// The last dimension.
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Where value `(row, col)` lies, counted in values.
    fn position(&self, row: usize, col: usize) -> usize {
        match self.order {
            Order::Rows => row * self.cols() + col,
            Order::Columns { splits, groups } => {
                let (inputs, outputs) = (self.cols() / splits, self.rows() / groups);
                let part = col / inputs * groups + row / outputs;
                (part * inputs + col % inputs) * outputs + row % outputs
            }
        }
    }

    /// Reads values `start..start + out.len()` (in C order, whatever the order of the bytes) as f32, exactly.
    ///
    /// # Panics
    /// If the range lies outside the tensor.
    pub fn read(&self, start: usize, out: &mut [f32]) {
        if self.order == Order::Rows {
            return self.decode(start, out);
        }
        let cols = self.cols();
        for (i, value) in (start..).zip(out) {
            self.decode(self.position(i / cols, i % cols), std::slice::from_mut(value));
        }
    }

    /// Reads values that lie together from place `start` on.
    fn decode(&self, start: usize, out: &mut [f32]) {
        let size = self.dtype.size();
        let bytes = &self.bytes()[start * size..(start + out.len()) * size];
        self.dtype.decode(bytes, out);
    }

    /// All values as f32.
    pub fn to_f32(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.count()];
        self.read(0, &mut out);
        out
    }

    /// Tells the system that these bytes will not be read again soon. Whoever packed them calls this.
    pub fn release(&self) {
        if let Bytes::Mapped(file, range) = &self.bytes {
            file.release(range.clone());
        }
    }
}

/// Rounds f32, little endian, to half as many bytes of bf16: to the nearest, ties to even; NaN stays NaN.
pub type Round = fn(&[u8], &mut [u8]);

/// In which form a device packs weights fastest. A reader that makes bytes (see [`MakeBytes`](crate::MakeBytes)) may give
/// them so; whatever it gives, the packed weight is the same.
#[derive(Debug, Clone, Copy, Default)]
pub struct Preferred {
    /// Matrices of linear layers in [`Order::Columns`], where they are stored so.
    pub columns: bool,
    /// f32 matrices of linear layers that are not exact are rounded to bf16, by this function.
    pub layers: Option<Round>,
    /// Token embedding tables are.
    pub table: Option<Round>,
    /// Matrices of linear layers that are not exact are taken piece by piece, as they are stored and in
    /// [`Order::Columns`]; see [`TensorSource::pour`]. A device that does has them ready when they are first used.
    pub pieces: bool,
}

/// What [`Device::prepare`](crate::Device::prepare) packs. Cloning shares the bytes.
#[derive(Debug, Clone)]
pub enum WeightSource {
    /// A linear layer; the outputs of its parts stand side by side.
    Linear {
        /// One or more matrices of equal input width, such as q, k and v, or gate and up.
        parts: Vec<LinearPart>,
        /// The references compute this layer in f32 even when the rest is bf16 (patch embedding, action, state
        /// and time projections). A device with a more exact format uses it here.
        exact: bool,
    },
    /// A normalization.
    Norm {
        /// Which one.
        kind: NormKind,
        /// `[width]`.
        weight: TensorSource,
        /// `[width]`; layer norm only.
        bias: Option<TensorSource>,
        /// Added to the variance or mean square.
        eps: f32,
    },
    /// An embedding table `[vocabulary, width]`: large, of which few rows are ever read.
    Embedding(TensorSource),
}

/// Which normalization a weight belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum NormKind {
    /// With mean and bias.
    Layer,
    /// Gemma's, with `1 + w`.
    Rms,
}

/// One matrix of a linear layer.
#[derive(Debug, Clone)]
pub struct LinearPart {
    /// `[out, in]`.
    pub weight: TensorSource,
    /// `[out]`.
    pub bias: Option<TensorSource>,
    /// The columns (inputs) of `weight` that this layer uses; all of them if none.
    pub columns: Option<Range<usize>>,
}

impl LinearPart {
    /// Number of outputs.
    pub fn outputs(&self) -> usize {
        self.weight.rows()
    }

    /// Number of inputs.
    pub fn inputs(&self) -> usize {
        self.columns.as_ref().map_or(self.weight.cols(), |c| c.len())
    }

    /// Reads output row `i` (its used columns) as f32.
    pub fn read_row(&self, i: usize, out: &mut [f32]) {
        let start = self.columns.as_ref().map_or(0, |c| c.start);
        self.weight.read(i * self.weight.cols() + start, out);
    }
}

impl WeightSource {
    /// The name of the (first) tensor, for messages.
    pub fn name(&self) -> &str {
        match self {
            WeightSource::Linear { parts, .. } => parts.first().map_or("", |p| &p.weight.name),
            WeightSource::Norm { weight, .. } => &weight.name,
            WeightSource::Embedding(table) => &table.name,
        }
    }

    /// Outputs and inputs of a linear layer; rows and width of a table; 1 and width of a norm.
    pub fn dims(&self) -> [usize; 2] {
        match self {
            WeightSource::Linear { parts, .. } => {
                [parts.iter().map(LinearPart::outputs).sum(), parts.first().map_or(0, LinearPart::inputs)]
            }
            WeightSource::Norm { weight, .. } => [1, weight.cols()],
            WeightSource::Embedding(table) => [table.rows(), table.cols()],
        }
    }

    /// Checks that the parts fit together, and fetches what has to be made, so that devices need not. Every device
    /// calls this first.
    pub fn check(&self) -> Result<()> {
        self.check_shapes()?;
        self.tensors().try_for_each(TensorSource::fetch)
    }

    /// Checks that the parts fit together, and fetches nothing.
    pub fn check_shapes(&self) -> Result<()> {
        let bad = |t: &TensorSource, what: &str| {
            Err(Error::Source { name: t.name.clone(), what: format!("{what}; its shape is {:?}", t.shape) })
        };
        match self {
            WeightSource::Linear { parts, .. } => {
                let Some(first) = parts.first() else {
                    return Err(Error::Source {
                        name: String::new(),
                        what: "a linear layer without parts".into(),
                    });
                };
                for p in parts {
                    if p.weight.shape.len() != 2 || p.outputs() == 0 || p.inputs() == 0 {
                        return bad(&p.weight, "wanted a matrix [out, in]");
                    }
                    if p.columns.as_ref().is_some_and(|c| c.end > p.weight.cols()) {
                        return bad(&p.weight, "a column range reaches past its width");
                    }
                    if p.inputs() != first.inputs() {
                        return bad(&p.weight, "its input width differs from its neighbours'");
                    }
                    if let Some(b) = &p.bias
                        && b.shape != [p.outputs()]
                    {
                        return bad(b, "the bias does not fit its weight");
                    }
                }
                Ok(())
            }
            WeightSource::Norm { weight, bias, .. } => {
                if weight.shape.len() != 1 {
                    return bad(weight, "wanted a vector");
                }
                match bias {
                    Some(b) if b.shape != weight.shape => bad(b, "the bias does not fit its weight"),
                    _ => Ok(()),
                }
            }
            WeightSource::Embedding(t) if t.shape.len() != 2 => bad(t, "wanted a matrix"),
            WeightSource::Embedding(_) => Ok(()),
        }
    }

    /// Its tensors.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorSource> {
        let (parts, others): (&[LinearPart], [Option<&TensorSource>; 2]) = match self {
            WeightSource::Linear { parts, .. } => (parts, [None, None]),
            WeightSource::Norm { weight, bias, .. } => (&[], [Some(weight), bias.as_ref()]),
            WeightSource::Embedding(table) => (&[], [Some(table), None]),
        };
        let of_parts = parts.iter().flat_map(|p| [Some(&p.weight), p.bias.as_ref()]);
        of_parts.chain(others).flatten()
    }

    /// The same without bytes that were made for it; see [`TensorSource::unfetched`].
    pub fn unfetched(&self) -> Self {
        let mut source = self.clone();
        match &mut source {
            WeightSource::Linear { parts, .. } => {
                for p in parts {
                    p.weight = p.weight.unfetched();
                    p.bias = p.bias.as_ref().map(TensorSource::unfetched);
                }
            }
            WeightSource::Norm { weight, bias, .. } => {
                *weight = weight.unfetched();
                *bias = bias.as_ref().map(TensorSource::unfetched);
            }
            WeightSource::Embedding(table) => *table = table.unfetched(),
        }
        source
    }

    /// Gives the pages of all tensors back to the system; see [`TensorSource::release`].
    pub fn release(&self) {
        self.tensors().for_each(TensorSource::release);
    }
}
