//! Where weights come from: tensors in a mapped file or in memory, in the number format they were stored in.

use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::{Arc, OnceLock};

use half::{bf16, f16};

use crate::{Error, Result};

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

    /// The name used in safetensors headers.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "F32",
            Dtype::Bf16 => "BF16",
            Dtype::F16 => "F16",
        }
    }
}

/// A file mapped read-only. Pages are read when touched and can be given back.
#[derive(Debug)]
pub struct MappedFile {
    map: memmap2::Mmap,
}

impl MappedFile {
    /// Maps the whole of `path`.
    ///
    /// The file must not be cut short while it is mapped: the system ends a process that reads a page that is
    /// no longer there. Checkpoints are replaced by renaming, which is safe.
    #[allow(unsafe_code)]
    pub fn open(path: &Path) -> std::io::Result<Arc<Self>> {
        let file = File::open(path)?;
        // SAFETY: the map is private to this struct and only ever read as bytes, for which every bit pattern is
        // valid; a change of the file by another process changes weights, not memory safety of typed data.
        let map = unsafe { memmap2::Mmap::map(&file)? };
        Ok(Arc::new(Self { map }))
    }

    /// The file's bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Gives the whole pages inside `range` back to the system; reading them again brings them back.
    #[allow(unsafe_code)]
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        {
            const PAGE: usize = 4096;
            let (start, end) = (range.start.next_multiple_of(PAGE), range.end / PAGE * PAGE);
            if start < end {
                // SAFETY: the map is file-backed, shared and read-only, so discarded pages are read again from
                // the file; nothing can be lost. Failure only means that memory is freed later.
                let _ = unsafe {
                    self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start)
                };
            }
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

/// Bytes that a tensor is read from: part of a mapped file, memory, or a maker of them. Cloning shares.
#[derive(Debug, Clone)]
pub enum Bytes {
    /// A range of a mapped file.
    Mapped(Arc<MappedFile>, Range<usize>),
    /// Bytes in memory, for weights made by a program.
    Owned(Arc<Vec<u8>>),
    /// Bytes that are made when they are first wanted, and live as long as this value and its clones.
    Lazy(Lazy),
}

/// Makes bytes that would be wasteful to keep: those of a compressed file, or of weights with adapters added.
pub trait MakeBytes: std::fmt::Debug + Send + Sync {
    /// How many there are.
    fn count(&self) -> usize;

    /// Makes them, or says why they cannot be had.
    fn make(&self) -> std::result::Result<Vec<u8>, String>;
}

/// A maker, and what it made.
#[derive(Debug, Clone)]
pub struct Lazy {
    maker: Arc<dyn MakeBytes>,
    made: OnceLock<Arc<Vec<u8>>>,
}

impl Lazy {
    /// Nothing made yet.
    pub fn new(maker: Arc<dyn MakeBytes>) -> Self {
        Self { maker, made: OnceLock::new() }
    }
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
}

impl TensorSource {
    /// A tensor over `bytes`, which must be as long as `shape` and `dtype` say.
    pub fn new(name: impl Into<String>, dtype: Dtype, shape: Vec<usize>, bytes: Bytes) -> Result<Self> {
        let source = Self { name: name.into(), dtype, shape, bytes };
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

    fn error(&self, what: String) -> Error {
        Error::Source { name: self.name.clone(), what }
    }

    /// The stored bytes, little-endian values in C order. Not necessarily aligned.
    ///
    /// # Panics
    /// If they have to be made, [`fetch`](Self::fetch) was not called before, and making them fails.
    pub fn bytes(&self) -> &[u8] {
        match &self.bytes {
            Bytes::Mapped(file, range) => &file.bytes()[range.clone()],
            Bytes::Owned(data) => data,
            Bytes::Lazy(lazy) => {
                self.fetch().unwrap_or_else(|e| panic!("{e}"));
                lazy.made.get().map_or(&[], |made| made)
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
        if let Bytes::Lazy(lazy) = &self.bytes
            && lazy.made.get().is_none()
        {
            let made = lazy.maker.make().map_err(|what| self.error(what))?;
            if made.len() != lazy.maker.count() {
                return Err(self.error(format!("{} bytes were made", made.len())));
            }
            // Another thread may have been faster; its bytes are the same.
            let _ = lazy.made.set(Arc::new(made));
        }
        Ok(())
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
        Self::new(self.name.clone(), self.dtype, shape, self.bytes.clone())
    }

    /// Rows, when the last dimension is the row's width.
    pub fn rows(&self) -> usize {
        self.shape.split_last().map_or(1, |(_, outer)| outer.iter().product())
    }

    /// The last dimension.
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Reads values `start..start + out.len()` (in C order) as f32, exactly.
    ///
    /// # Panics
    /// If the range lies outside the tensor.
    pub fn read(&self, start: usize, out: &mut [f32]) {
        let size = self.dtype.size();
        let bytes = &self.bytes()[start * size..(start + out.len()) * size];
        match self.dtype {
            Dtype::F32 => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(4)) {
                    *o = f32::from_le_bytes([b[0], b[1], b[2], b[3]]);
                }
            }
            Dtype::Bf16 => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *o = bf16::from_le_bytes([b[0], b[1]]).to_f32();
                }
            }
            Dtype::F16 => {
                for (o, b) in out.iter_mut().zip(bytes.chunks_exact(2)) {
                    *o = f16::from_le_bytes([b[0], b[1]]).to_f32();
                }
            }
        }
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

    fn check_shapes(&self) -> Result<()> {
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
