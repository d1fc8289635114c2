//! The trait that a machine implements to run π0.
//!
//! Shapes. Every activation is a matrix `[rows, cols]` of f32 meaning (a device may store it otherwise). The
//! rows of all robots of a batch, all cameras and all tokens stand below each other *packed*: a masked camera
//! or a padded token has no row. So no operation knows of batches or masks, except attention, whose
//! [`Span`]s say which query rows see which key rows.
//!
//! Operations come in two layers. The *base* operations are the ones a device needs; each is `Unsupported`
//! until implemented. The *fused* ones, [`Device::dense`], [`Device::qkv`] and [`Device::store_rows`], are the chances to
//! be fast: where a device lacks one, the free functions [`dense`], [`qkv`] and [`store_rows`] compose it from base
//! operations. The model calls the free functions, so it never forks.

use std::fmt;
use std::ops::Range;

use crate::{Error, HostTensor, Largest, MemoryMeter, Preferred, Result, WeightSource, operands};

/// A machine that can hold matrices and multiply them.
///
/// Operations may enqueue and return; only [`download`](Device::download) waits. They take `&self`: a device
/// that needs mutable state keeps it behind a cell.
pub trait Device {
    /// An activation, `[rows, cols]`, wherever it lives. Cloning shares.
    type Tensor: Clone;
    /// A weight, packed once in this device's own layout and number format.
    type Weight;

    /// Short name for messages and reports, such as `cpu`.
    fn name(&self) -> &'static str;

    /// Rows and columns of a tensor.
    fn shape(&self, x: &Self::Tensor) -> [usize; 2];

    // ---- move ----

    /// Brings a matrix from the host; `data` is row-major, `rows * cols` long.
    fn upload(&self, rows: usize, cols: usize, data: &[f32]) -> Result<Self::Tensor>;

    /// Brings a matrix to the host, waiting for whatever must run first.
    fn download(&self, x: &Self::Tensor) -> Result<HostTensor>;

    /// Of each row the largest value and where it stands: all that a greedy choice wants of its logits. A device may find it
    /// where the rows lie, instead of bringing them to the host.
    fn largest(&self, x: &Self::Tensor) -> Result<Vec<Largest>> {
        self.download(x).map(|x| Largest::of_rows(&x))
    }

    /// Packs a weight from the checkpoint. Called once per weight, before any inference.
    fn prepare(&self, source: &WeightSource) -> Result<Self::Weight>;

    // ---- base operations: layers ----

    /// Rows `ids` of an embedding table `[vocabulary, width]`, times `scale`: `[ids.len(), width]`.
    fn embed(&self, table: &Self::Weight, ids: &[u32], scale: f32) -> Result<Self::Tensor> {
        let _ = (table, ids, scale);
        Err(self.lacks(OpKind::Embed))
    }

    /// `x · Wᵀ + b`: `[rows, in]` to `[rows, out]`. The outputs of a weight of several parts stand side by side.
    fn linear(&self, x: &Self::Tensor, weight: &Self::Weight) -> Result<Self::Tensor> {
        let _ = (x, weight);
        Err(self.lacks(OpKind::Linear))
    }

    /// `(x - mean) / sqrt(variance + eps) * w + b` over each row.
    fn layer_norm(&self, x: &Self::Tensor, weight: &Self::Weight) -> Result<Self::Tensor> {
        let _ = (x, weight);
        Err(self.lacks(OpKind::LayerNorm))
    }

    /// `x / sqrt(mean(x²) + eps) * (1 + w)` over each row: Gemma's form.
    fn rms_norm(&self, x: &Self::Tensor, weight: &Self::Weight) -> Result<Self::Tensor> {
        let _ = (x, weight);
        Err(self.lacks(OpKind::RmsNorm))
    }

    /// `x / sqrt(mean(x²) + 1e-6) * (1 + scale) + shift` over each row: the adaptive norm of π0.5's expert. Row `i` of
    /// `x` takes scale and shift from row `by.rows[i]` of the table.
    fn ada_rms_norm(&self, x: &Self::Tensor, by: &Modulation<'_, Self::Tensor>) -> Result<Self::Tensor> {
        let _ = (x, by);
        Err(self.lacks(OpKind::AdaRmsNorm))
    }

    /// Rotary position embedding over whole heads: of each head the pair `(i, i + head_dim / 2)` turns by
    /// `positions[row] * 10000^(-2i / head_dim)`. `x` is `[rows, heads * head_dim]`.
    fn rope(&self, x: &Self::Tensor, positions: &[u32], head_dim: usize) -> Result<Self::Tensor> {
        let _ = (x, positions, head_dim);
        Err(self.lacks(OpKind::Rope))
    }

    /// `softmax(q · kᵀ * scale) · v` for each head, over the keys that `spec.spans` give each query row.
    ///
    /// `q` is `[queries, heads * head_dim]`; each part of `kv` has k and v `[keys, kv_heads * head_dim]`. Query
    /// head `h` reads key head `h / (heads / kv_heads)`. The result has the shape of `q`.
    fn attention(
        &self,
        q: &Self::Tensor,
        kv: &[KeyValue<'_, Self::Tensor>],
        spec: &Attention<'_>,
    ) -> Result<Self::Tensor> {
        let _ = (q, kv, spec);
        Err(self.lacks(OpKind::Attention))
    }

    // ---- base operations: element by element ----

    /// `0.5 x (1 + tanh(sqrt(2/π) (x + 0.044715 x³)))`.
    fn gelu(&self, x: &Self::Tensor) -> Result<Self::Tensor> {
        let _ = x;
        Err(self.lacks(OpKind::Gelu))
    }

    /// `x / (1 + exp(-x))`.
    fn silu(&self, x: &Self::Tensor) -> Result<Self::Tensor> {
        let _ = x;
        Err(self.lacks(OpKind::Silu))
    }

    /// `gelu(left half) * right half` of each row: `[rows, 2 n]` to `[rows, n]`.
    fn geglu(&self, x: &Self::Tensor) -> Result<Self::Tensor> {
        let _ = x;
        Err(self.lacks(OpKind::Geglu))
    }

    /// `x + y`, where row `i` of `x` takes row `i % rows(y)` of `y`; `rows(y)` divides `rows(x)`.
    fn add(&self, x: &Self::Tensor, y: &Self::Tensor) -> Result<Self::Tensor> {
        let _ = (x, y);
        Err(self.lacks(OpKind::Add))
    }

    /// `x + scale * y`, of equal shapes.
    fn add_scaled(&self, x: &Self::Tensor, y: &Self::Tensor, scale: f32) -> Result<Self::Tensor> {
        let _ = (x, y, scale);
        Err(self.lacks(OpKind::AddScaled))
    }

    /// `x + gate * y`, of equal shapes; row `i` takes its gate from row `by.rows[i]` of the table.
    fn gated_add(
        &self,
        x: &Self::Tensor,
        y: &Self::Tensor,
        by: &Modulation<'_, Self::Tensor>,
    ) -> Result<Self::Tensor> {
        let _ = (x, y, by);
        Err(self.lacks(OpKind::GatedAdd))
    }

    // ---- base operations: shape ----

    /// The rows of all `parts`, in order; all of one width.
    fn concat_rows(&self, parts: &[&Self::Tensor]) -> Result<Self::Tensor> {
        let _ = parts;
        Err(self.lacks(OpKind::ConcatRows))
    }

    /// Rows `range` of `x`.
    fn slice_rows(&self, x: &Self::Tensor, range: Range<usize>) -> Result<Self::Tensor> {
        let _ = (x, range);
        Err(self.lacks(OpKind::SliceRows))
    }

    /// Columns `range` of `x`.
    fn slice_cols(&self, x: &Self::Tensor, range: Range<usize>) -> Result<Self::Tensor> {
        let _ = (x, range);
        Err(self.lacks(OpKind::SliceCols))
    }

    // ---- fused operations: call them through the free functions `dense`, `qkv` and `store_rows` ----

    /// Norm, linear, activation and residual in one pass; see [`Dense`]. An implementation may refuse some
    /// forms with `Unsupported`.
    fn dense(&self, call: &Dense<'_, Self::Tensor, Self::Weight>) -> Result<Self::Tensor> {
        let _ = call;
        Err(self.lacks(OpKind::Dense))
    }

    /// Norm, fused projection, split and rotation in one pass; see [`Qkv`].
    fn qkv(&self, call: &Qkv<'_, Self::Tensor, Self::Weight>) -> Result<[Self::Tensor; 3]> {
        let _ = call;
        Err(self.lacks(OpKind::Qkv))
    }

    /// Row `i` of `x` takes the place of row `at[i]` of `to`, where it lies if nobody else holds `to`: what a cache of keys
    /// and values needs that grows with each token. `at` ascends. Call it through the free function [`store_rows`].
    fn store_rows(&self, to: &mut Self::Tensor, at: &[u32], x: &Self::Tensor) -> Result<()> {
        let _ = (to, at, x);
        Err(self.lacks(OpKind::StoreRows))
    }

    // ---- for readers and observers: nothing that computes ----

    /// In which form weights are packed fastest, for readers that make their bytes anyway.
    fn preferred(&self) -> Preferred {
        Preferred::default()
    }

    /// The count of the bytes that this device holds, where it keeps one.
    fn memory(&self) -> Option<MemoryMeter> {
        None
    }

    /// Offers a named intermediate to whoever listens ([`Tapped`](crate::Tapped)).
    fn tap(&self, name: &str, x: &Self::Tensor) {
        let _ = (name, x);
    }

    /// Whether the device has the host do `op`, by design, and uploads the result: such as the lookup in an embedding
    /// table of a gigabyte of which few rows are ever read. Records say so.
    fn on_host(&self, op: OpKind) -> bool {
        let _ = op;
        false
    }

    /// Enters a module, so that records and taps know their path. Use [`Scope`].
    fn enter(&self, module: fmt::Arguments<'_>) {
        let _ = module;
    }

    /// Leaves the module entered last.
    fn exit(&self) {}

    /// The error of an operation that is not implemented.
    fn lacks(&self, op: OpKind) -> Error {
        Error::unsupported(self.name(), op, "not implemented on this device")
    }
}

/// The operations of a [`Device`], as they are named in records and messages.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
#[allow(missing_docs)] // the names are those of the trait's methods
pub enum OpKind {
    Upload,
    Download,
    Prepare,
    Embed,
    Linear,
    LayerNorm,
    RmsNorm,
    AdaRmsNorm,
    Rope,
    Attention,
    Gelu,
    Silu,
    Geglu,
    Add,
    AddScaled,
    GatedAdd,
    ConcatRows,
    SliceRows,
    SliceCols,
    Dense,
    Qkv,
    StoreRows,
}

impl OpKind {
    /// Every base operation: what a complete device implements beside the moves.
    pub const BASE: [OpKind; 16] = [
        OpKind::Embed,
        OpKind::Linear,
        OpKind::LayerNorm,
        OpKind::RmsNorm,
        OpKind::AdaRmsNorm,
        OpKind::Rope,
        OpKind::Attention,
        OpKind::Gelu,
        OpKind::Silu,
        OpKind::Geglu,
        OpKind::Add,
        OpKind::AddScaled,
        OpKind::GatedAdd,
        OpKind::ConcatRows,
        OpKind::SliceRows,
        OpKind::SliceCols,
    ];

    /// The method's name, such as `layer_norm`.
    pub fn name(self) -> &'static str {
        match self {
            OpKind::Upload => "upload",
            OpKind::Download => "download",
            OpKind::Prepare => "prepare",
            OpKind::Embed => "embed",
            OpKind::Linear => "linear",
            OpKind::LayerNorm => "layer_norm",
            OpKind::RmsNorm => "rms_norm",
            OpKind::AdaRmsNorm => "ada_rms_norm",
            OpKind::Rope => "rope",
            OpKind::Attention => "attention",
            OpKind::Gelu => "gelu",
            OpKind::Silu => "silu",
            OpKind::Geglu => "geglu",
            OpKind::Add => "add",
            OpKind::AddScaled => "add_scaled",
            OpKind::GatedAdd => "gated_add",
            OpKind::ConcatRows => "concat_rows",
            OpKind::SliceRows => "slice_rows",
            OpKind::SliceCols => "slice_cols",
            OpKind::Dense => "dense",
            OpKind::Qkv => "qkv",
            OpKind::StoreRows => "store_rows",
        }
    }
}

impl fmt::Display for OpKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A non-linearity after a [`Dense`] layer's linear part.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Activation {
    /// [`Device::gelu`].
    Gelu,
    /// [`Device::silu`].
    Silu,
    /// [`Device::geglu`]: halves the width.
    Geglu,
}

/// What drives adaptive norms and gated residuals: rows of scale, shift and gate, and which of them each row of an
/// activation takes. Rows that share a time share a row of the table.
#[derive(Debug)]
pub struct Modulation<'a, T> {
    /// `[M, 3 W]`: scale (without the 1), shift and gate stand side by side, `W` columns each.
    pub table: &'a T,
    /// For each row of the activation a row of the table.
    pub rows: &'a [u32],
}

impl<T> Clone for Modulation<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for Modulation<'_, T> {}

/// What is added to the mean square of an adaptive norm's row.
pub const ADA_EPS: f32 = 1e-6;

/// The normalization before a [`Dense`] or [`Qkv`] layer.
#[derive(Debug)]
pub enum Norm<'a, T, W> {
    /// [`Device::layer_norm`].
    Layer(&'a W),
    /// [`Device::rms_norm`].
    Rms(&'a W),
    /// [`Device::ada_rms_norm`].
    Ada(Modulation<'a, T>),
}

impl<T, W> Clone for Norm<'_, T, W> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T, W> Copy for Norm<'_, T, W> {}

impl<'a, T, W> Norm<'a, T, W> {
    /// The norm's weight, where it has one of its own.
    pub fn weight(&self) -> Option<&'a W> {
        match self {
            Norm::Layer(w) | Norm::Rms(w) => Some(w),
            Norm::Ada(_) => None,
        }
    }

    /// The same norm with the weight inside the present one.
    pub fn with_inner<V>(&self, inner: impl Fn(&'a W) -> Result<&'a V>) -> Result<Norm<'a, T, V>> {
        Ok(match self {
            Norm::Layer(w) => Norm::Layer(inner(w)?),
            Norm::Rms(w) => Norm::Rms(inner(w)?),
            Norm::Ada(by) => Norm::Ada(*by),
        })
    }

    /// The base operation that this norm is.
    pub fn op(&self) -> OpKind {
        match self {
            Norm::Layer(_) => OpKind::LayerNorm,
            Norm::Rms(_) => OpKind::RmsNorm,
            Norm::Ada(_) => OpKind::AdaRmsNorm,
        }
    }
}

/// `residual + gate * activation(linear(norm(x)))`, each of norm, activation, gate and residual optional.
pub struct Dense<'a, T, W> {
    /// `[rows, in]`.
    pub x: &'a T,
    /// Applied to `x` first.
    pub norm: Option<Norm<'a, T, W>>,
    /// The linear layer.
    pub weight: &'a W,
    /// Applied to the linear layer's result.
    pub activation: Option<Activation>,
    /// Multiplies what comes before the residual, which must be present and of equal shape; see
    /// [`Device::gated_add`].
    pub gate: Option<Modulation<'a, T>>,
    /// Added last, under the row rule of [`Device::add`].
    pub residual: Option<&'a T>,
    /// Tap of the norm's result.
    pub norm_tap: Option<&'a str>,
    /// Tap of the result before gate and residual.
    pub branch_tap: Option<&'a str>,
}

impl<'a, T, W> Dense<'a, T, W> {
    /// A bare linear layer; add the rest with the struct update syntax.
    pub fn new(x: &'a T, weight: &'a W) -> Self {
        Self {
            x,
            norm: None,
            weight,
            activation: None,
            gate: None,
            residual: None,
            norm_tap: None,
            branch_tap: None,
        }
    }

    /// The same call with the weights inside the present ones, as a wrapper of a device passes it on.
    pub fn with_inner<V>(&self, inner: impl Fn(&'a W) -> Result<&'a V>) -> Result<Dense<'a, T, V>> {
        Ok(Dense {
            x: self.x,
            norm: self.norm.map(|n| n.with_inner(&inner)).transpose()?,
            weight: inner(self.weight)?,
            activation: self.activation,
            gate: self.gate,
            residual: self.residual,
            norm_tap: self.norm_tap,
            branch_tap: self.branch_tap,
        })
    }
}

impl<T, W> Clone for Dense<'_, T, W> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T, W> Copy for Dense<'_, T, W> {}

/// `q, k, v` of one attention layer: a norm, one linear layer whose weight holds the parts q, k and v, and the
/// rotation of q and k.
pub struct Qkv<'a, T, W> {
    /// `[rows, in]`.
    pub x: &'a T,
    /// Applied to `x` first.
    pub norm: Norm<'a, T, W>,
    /// Parts q `[heads * head_dim, in]`, k and v `[kv_heads * head_dim, in]`.
    pub weight: &'a W,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// One position a row for [`Device::rope`]; none in the vision tower.
    pub positions: Option<&'a [u32]>,
    /// Tap of the norm's result.
    pub norm_tap: Option<&'a str>,
}

impl<'a, T, W> Qkv<'a, T, W> {
    /// The same call with the weights inside the present ones, as a wrapper of a device passes it on.
    pub fn with_inner<V>(&self, inner: impl Fn(&'a W) -> Result<&'a V>) -> Result<Qkv<'a, T, V>> {
        Ok(Qkv {
            x: self.x,
            norm: self.norm.with_inner(&inner)?,
            weight: inner(self.weight)?,
            heads: self.heads,
            kv_heads: self.kv_heads,
            head_dim: self.head_dim,
            positions: self.positions,
            norm_tap: self.norm_tap,
        })
    }
}

impl<T, W> Clone for Qkv<'_, T, W> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T, W> Copy for Qkv<'_, T, W> {}

/// One block of keys and values, such as the cached prefix or the suffix's own.
#[derive(Debug)]
pub struct KeyValue<'a, T> {
    /// `[rows, kv_heads * head_dim]`, after rotation.
    pub k: &'a T,
    /// `[rows, kv_heads * head_dim]`.
    pub v: &'a T,
}

impl<T> Clone for KeyValue<'_, T> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<T> Copy for KeyValue<'_, T> {}

/// The geometry of one attention call.
#[derive(Debug, Clone, Copy)]
pub struct Attention<'a> {
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head.
    pub head_dim: usize,
    /// Factor of the logits, `head_dim^-0.5`.
    pub scale: f32,
    /// In order of their query rows, which they cover without gap or overlap.
    pub spans: &'a [Span],
}

/// Query rows that see the same keys.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Span {
    /// Rows of q.
    pub queries: Range<usize>,
    /// The keys that each of these rows attends to; at least one row of keys.
    pub keys: Vec<Keys>,
}

/// A run of key rows in one of the parts of an attention call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Keys {
    /// Index into the parts.
    pub part: usize,
    /// Rows of that part.
    pub rows: Range<usize>,
}

impl Span {
    /// Number of keys that each query row of this span sees.
    pub fn key_count(&self) -> usize {
        self.keys.iter().map(|k| k.rows.len()).sum()
    }
}

impl Attention<'_> {
    /// Checks the geometry against the operands, so that devices need not. Every device calls this first; `shape`
    /// tells a tensor's rows and columns.
    pub fn check<T>(&self, shape: impl Fn(&T) -> [usize; 2], q: &T, kv: &[KeyValue<'_, T>]) -> Result<()> {
        let q = shape(q);
        let fail = |what: String| Err(Error::shape(OpKind::Attention, what));
        if self.kv_heads == 0 || self.heads == 0 || !self.heads.is_multiple_of(self.kv_heads) {
            return fail(format!("{} query heads over {} key heads", self.heads, self.kv_heads));
        }
        let (width, kv_width) = (self.heads * self.head_dim, self.kv_heads * self.head_dim);
        if self.head_dim == 0 || q[1] != width {
            return fail(format!("q has {} columns, wanted {} heads of {}", q[1], self.heads, self.head_dim));
        }
        for (i, part) in kv.iter().enumerate() {
            let (k, v) = (shape(part.k), shape(part.v));
            if k != v || k[1] != kv_width {
                return fail(format!("part {i} has k {k:?} and v {v:?}, wanted {kv_width} columns in both"));
            }
        }
        let mut next = 0;
        for s in self.spans {
            if s.queries.start != next || s.queries.end <= next {
                return fail(format!("span of rows {:?} where row {next} was due", s.queries));
            }
            next = s.queries.end;
            if s.key_count() == 0 {
                return fail(format!("rows {:?} see no key", s.queries));
            }
            for k in &s.keys {
                let rows = kv.get(k.part).map_or(0, |part| shape(part.k)[0]);
                if k.rows.start > k.rows.end || k.rows.end > rows {
                    return fail(format!("keys {:?} of part {} with {rows} rows", k.rows, k.part));
                }
            }
        }
        if next != q[0] {
            return fail(format!("spans cover {next} of {} rows", q[0]));
        }
        Ok(())
    }
}

/// Keeps a module entered while it lives: `let _scope = Scope::new(d, format_args!("layer{i}"));`.
pub struct Scope<'a, D: Device + ?Sized>(&'a D);

impl<'a, D: Device + ?Sized> Scope<'a, D> {
    /// Enters `module` on `d`.
    pub fn new(d: &'a D, module: fmt::Arguments<'_>) -> Self {
        d.enter(module);
        Self(d)
    }
}

impl<D: Device + ?Sized> Drop for Scope<'_, D> {
    fn drop(&mut self) {
        self.0.exit();
    }
}

/// Runs a [`Dense`] layer: fused where the device can, else composed from its base operations.
pub fn dense<D: Device + ?Sized>(d: &D, call: &Dense<'_, D::Tensor, D::Weight>) -> Result<D::Tensor> {
    match d.dense(call) {
        Err(e) if e.is_unsupported() => compose_dense(d, call),
        done => done,
    }
}

/// A [`Dense`] layer from its base operations.
pub(crate) fn compose_dense<D: Device + ?Sized>(
    d: &D,
    call: &Dense<'_, D::Tensor, D::Weight>,
) -> Result<D::Tensor> {
    let normed = normed(d, call.norm, call.x, call.norm_tap)?;
    let mut y = d.linear(normed.as_ref().unwrap_or(call.x), call.weight)?;
    y = match call.activation {
        None => y,
        Some(Activation::Gelu) => d.gelu(&y)?,
        Some(Activation::Silu) => d.silu(&y)?,
        Some(Activation::Geglu) => d.geglu(&y)?,
    };
    if let Some(name) = call.branch_tap {
        d.tap(name, &y);
    }
    match call.residual {
        None if call.gate.is_some() => Err(Error::shape(OpKind::Dense, "a gate without a residual")),
        None => Ok(y),
        Some(r) if call.gate.is_some() => d.gated_add(r, &y, &call.gate.expect("checked")),
        // The longer operand first: the rows of the other repeat.
        Some(r) if d.shape(r)[0] < d.shape(&y)[0] => d.add(&y, r),
        Some(r) => d.add(r, &y),
    }
}

/// Runs a [`Qkv`] layer: fused where the device can, else composed from its base operations.
pub fn qkv<D: Device + ?Sized>(d: &D, call: &Qkv<'_, D::Tensor, D::Weight>) -> Result<[D::Tensor; 3]> {
    match d.qkv(call) {
        Err(e) if e.is_unsupported() => compose_qkv(d, call),
        done => done,
    }
}

/// A [`Qkv`] layer from its base operations.
pub(crate) fn compose_qkv<D: Device + ?Sized>(
    d: &D,
    call: &Qkv<'_, D::Tensor, D::Weight>,
) -> Result<[D::Tensor; 3]> {
    let h = normed(d, Some(call.norm), call.x, call.norm_tap)?;
    let y = d.linear(h.as_ref().unwrap_or(call.x), call.weight)?;
    let (q_end, kv) = (call.heads * call.head_dim, call.kv_heads * call.head_dim);
    let mut q = d.slice_cols(&y, 0..q_end)?;
    let mut k = d.slice_cols(&y, q_end..q_end + kv)?;
    let v = d.slice_cols(&y, q_end + kv..q_end + 2 * kv)?;
    if let Some(positions) = call.positions {
        q = d.rope(&q, positions, call.head_dim)?;
        k = d.rope(&k, positions, call.head_dim)?;
    }
    Ok([q, k, v])
}

/// Runs [`Device::store_rows`] where the device can, else puts the rows together anew.
pub fn store_rows<D: Device + ?Sized>(d: &D, to: &mut D::Tensor, at: &[u32], x: &D::Tensor) -> Result<()> {
    match d.store_rows(to, at, x) {
        Err(e) if e.is_unsupported() => compose_store_rows(d, to, at, x),
        done => done,
    }
}

/// Stored rows from base operations: the runs between them, and they, below each other.
pub(crate) fn compose_store_rows<D: Device + ?Sized>(
    d: &D,
    to: &mut D::Tensor,
    at: &[u32],
    x: &D::Tensor,
) -> Result<()> {
    operands::store_rows(d.shape(to), at, d.shape(x))?;
    let (rows, mut parts, mut next, mut i) = (d.shape(to)[0], Vec::new(), 0, 0);
    while i < at.len() {
        let (start, first) = (at[i] as usize, i);
        if next < start {
            parts.push(d.slice_rows(to, next..start)?);
        }
        while i < at.len() && at[i] as usize == start + i - first {
            i += 1;
        }
        parts.push(d.slice_rows(x, first..i)?);
        next = start + i - first;
    }
    if next < rows && !parts.is_empty() {
        parts.push(d.slice_rows(to, next..rows)?);
    }
    if !parts.is_empty() {
        *to = d.concat_rows(&parts.iter().collect::<Vec<_>>())?;
    }
    Ok(())
}

fn normed<D: Device + ?Sized>(
    d: &D,
    norm: Option<Norm<'_, D::Tensor, D::Weight>>,
    x: &D::Tensor,
    tap: Option<&str>,
) -> Result<Option<D::Tensor>> {
    let h = match norm {
        None => return Ok(None),
        Some(Norm::Layer(w)) => d.layer_norm(x, w)?,
        Some(Norm::Rms(w)) => d.rms_norm(x, w)?,
        Some(Norm::Ada(by)) => d.ada_rms_norm(x, &by)?,
    };
    if let Some(name) = tap {
        d.tap(name, &h);
    }
    Ok(Some(h))
}
