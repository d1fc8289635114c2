//! The reference with one planted error.

use std::cell::{Cell, RefCell};
use std::collections::HashMap;
use std::fmt;
use std::ops::Range;
use std::sync::Arc;

use pi0_device::{
    Attention, Device, HostTensor, KeyValue, Modulation, OpKind, Reference, ReferenceWeight, Result, Span,
    WeightSource,
};

type Tensor = Arc<HostTensor>;

/// What goes wrong, and where.
pub enum Plant {
    /// The weight whose (first) tensor's name contains this is packed wrong.
    Weight(&'static str, fn(&mut WeightSource)),
    /// Rotation goes wrong in modules below this scope.
    Rope(&'static str, fn(&Tensor, &[u32], usize) -> Result<Tensor>),
    /// Attention is called with other spans or another scale below this scope.
    Attention(&'static str, fn(&mut Vec<Span>, &mut f32)),
    /// An activation is another function below this scope.
    Activation(OpKind, &'static str, fn(&Tensor) -> Result<Tensor>),
    /// The residual behind the linear layer with this in its name is not added.
    Residual(&'static str),
    /// Token embeddings take another scale.
    EmbedScale(f32),
    /// Rows are put together in another order below this scope.
    Concat(&'static str),
    /// Rows of a cache are stored in other places.
    Store(fn(&mut Vec<u32>)),
    /// A slice of this many rows begins one row early, or late where it cannot.
    SliceRows(usize),
    /// Adaptive norms below this scope.
    Ada(&'static str, fn(&Tensor, &Modulation<'_, Tensor>) -> Result<Tensor>),
    /// Gated residuals below this scope; `""` for the Euler step alone.
    Gated(&'static str, fn(&Tensor, &Tensor, &Modulation<'_, Tensor>) -> Result<Tensor>),
    /// The Euler step is this much longer.
    Step(f32),
    /// The result of one site (as [`Mutant::sites`] names it) is multiplied by 1.01.
    Scale(String),
}

/// A weight that remembers its name.
pub struct Named {
    inner: ReferenceWeight,
    name: String,
}

/// [`Reference`] with a [`Plant`].
pub struct Mutant {
    plant: Option<Plant>,
    path: RefCell<Vec<String>>,
    /// Name of the weight that the last linear layer read, and the ops of each kind since.
    last_linear: RefCell<String>,
    since: RefCell<Vec<OpKind>>,
    sites: RefCell<Vec<String>>,
    /// Tables of modulations by their address, as the model taps them: a norm and a gate that read the same table
    /// belong to one site wherever they run.
    tables: RefCell<HashMap<usize, String>>,
    /// How often the plant took effect.
    pub hits: Cell<usize>,
}

impl Mutant {
    pub fn new(plant: Option<Plant>) -> Self {
        Self {
            plant,
            path: RefCell::default(),
            last_linear: RefCell::default(),
            since: RefCell::default(),
            sites: RefCell::default(),
            tables: RefCell::default(),
            hits: Cell::new(0),
        }
    }

    /// Every place where an operation ran: `scope|op|weight or what came before`.
    pub fn sites(&self) -> Vec<String> {
        let mut sites = self.sites.borrow().clone();
        sites.sort();
        sites.dedup();
        sites
    }

    /// The scope without its denoising step.
    fn scope(&self) -> String {
        let path = self.path.borrow();
        let inner: Vec<_> = path.iter().filter(|m| !m.starts_with("step")).map(String::as_str).collect();
        inner.join(".")
    }

    fn below(&self, scope: &str) -> bool {
        let hit = self.scope().starts_with(scope);
        self.hits.set(self.hits.get() + usize::from(hit));
        hit
    }

    /// Passes the result of every operation: notes its site, and scales it where that is the plant.
    fn at(&self, op: OpKind, weight: Option<&Named>, y: Tensor) -> Result<Tensor> {
        if op == OpKind::Linear {
            *self.last_linear.borrow_mut() = weight.map_or(String::new(), |w| w.name.clone());
            self.since.borrow_mut().clear();
        }
        let key = match weight {
            Some(w) => w.name.clone(),
            None => {
                let count = self.since.borrow().iter().filter(|o| **o == op).count();
                format!("{count} after {}", self.last_linear.borrow())
            }
        };
        self.since.borrow_mut().push(op);
        self.at_key(op, &key, y)
    }

    /// The same for an operation that a table of modulations drives.
    fn at_table(&self, op: OpKind, by: &Modulation<'_, Tensor>, y: Tensor) -> Result<Tensor> {
        let known = self.tables.borrow().get(&(Arc::as_ptr(by.table) as usize)).cloned();
        match known {
            Some(key) => self.at_key(op, &key, y),
            None => self.at(op, None, y),
        }
    }

    fn at_key(&self, op: OpKind, key: &str, y: Tensor) -> Result<Tensor> {
        let site = format!("{}|{op}|{key}", self.scope());
        let scaled = matches!(&self.plant, Some(Plant::Scale(s)) if *s == site);
        self.sites.borrow_mut().push(site);
        if !scaled {
            return Ok(y);
        }
        self.hits.set(self.hits.get() + 1);
        Ok(map(&y, |x| x * 1.01))
    }
}

/// `f` of every value.
pub fn map(x: &Tensor, f: impl Fn(f32) -> f32) -> Tensor {
    Arc::new(HostTensor::new(x.shape.clone(), x.data.iter().map(|&x| f(x)).collect()))
}

impl Device for Mutant {
    type Tensor = Tensor;
    type Weight = Named;

    fn name(&self) -> &'static str {
        "mutant"
    }
    fn shape(&self, x: &Tensor) -> [usize; 2] {
        Reference.shape(x)
    }
    fn enter(&self, module: fmt::Arguments<'_>) {
        self.path.borrow_mut().push(module.to_string());
        self.last_linear.borrow_mut().clear();
        self.since.borrow_mut().clear();
    }
    fn exit(&self) {
        self.path.borrow_mut().pop();
        self.last_linear.borrow_mut().clear();
        self.since.borrow_mut().clear();
    }
    fn tap(&self, name: &str, x: &Tensor) {
        if name.ends_with(".modulation") {
            self.tables.borrow_mut().insert(Arc::as_ptr(x) as usize, name.into());
        }
    }
    fn upload(&self, rows: usize, cols: usize, data: &[f32]) -> Result<Tensor> {
        Reference.upload(rows, cols, data)
    }
    fn download(&self, x: &Tensor) -> Result<HostTensor> {
        Reference.download(x)
    }
    fn prepare(&self, source: &WeightSource) -> Result<Named> {
        let mut source = source.clone();
        // The two halves of one tensor are two layers.
        let half = match &source {
            WeightSource::Linear { parts, .. } => parts[0].columns.as_ref().map_or(0, |c| c.start),
            _ => 0,
        };
        let name = format!("{}{}", source.name(), if half > 0 { "[time]" } else { "" });
        if let Some(Plant::Weight(wanted, change)) = &self.plant
            && name.contains(wanted)
        {
            change(&mut source);
            self.hits.set(self.hits.get() + 1);
        }
        Ok(Named { inner: Reference.prepare(&source)?, name })
    }

    fn embed(&self, table: &Named, ids: &[u32], scale: f32) -> Result<Tensor> {
        let scale = match self.plant {
            Some(Plant::EmbedScale(wrong)) => {
                self.hits.set(self.hits.get() + 1);
                wrong
            }
            _ => scale,
        };
        self.at(OpKind::Embed, Some(table), Reference.embed(&table.inner, ids, scale)?)
    }
    fn linear(&self, x: &Tensor, weight: &Named) -> Result<Tensor> {
        self.at(OpKind::Linear, Some(weight), Reference.linear(x, &weight.inner)?)
    }
    fn layer_norm(&self, x: &Tensor, weight: &Named) -> Result<Tensor> {
        self.at(OpKind::LayerNorm, Some(weight), Reference.layer_norm(x, &weight.inner)?)
    }
    fn rms_norm(&self, x: &Tensor, weight: &Named) -> Result<Tensor> {
        self.at(OpKind::RmsNorm, Some(weight), Reference.rms_norm(x, &weight.inner)?)
    }
    fn ada_rms_norm(&self, x: &Tensor, by: &Modulation<'_, Tensor>) -> Result<Tensor> {
        let y = match &self.plant {
            Some(Plant::Ada(scope, wrong)) if self.below(scope) => wrong(x, by)?,
            _ => Reference.ada_rms_norm(x, by)?,
        };
        self.at_table(OpKind::AdaRmsNorm, by, y)
    }
    fn gated_add(&self, x: &Tensor, y: &Tensor, by: &Modulation<'_, Tensor>) -> Result<Tensor> {
        let here = |scope: &str| if scope.is_empty() { self.scope().is_empty() } else { self.below(scope) };
        let z = match &self.plant {
            Some(Plant::Gated(scope, wrong)) if here(scope) => {
                self.hits.set(self.hits.get() + 1);
                wrong(x, y, by)?
            }
            _ => Reference.gated_add(x, y, by)?,
        };
        self.at_table(OpKind::GatedAdd, by, z)
    }
    fn rope(&self, x: &Tensor, positions: &[u32], head_dim: usize) -> Result<Tensor> {
        let y = match &self.plant {
            Some(Plant::Rope(scope, wrong)) if self.below(scope) => wrong(x, positions, head_dim)?,
            _ => Reference.rope(x, positions, head_dim)?,
        };
        self.at(OpKind::Rope, None, y)
    }
    fn attention(&self, q: &Tensor, kv: &[KeyValue<'_, Tensor>], spec: &Attention<'_>) -> Result<Tensor> {
        let (mut spans, mut scale) = (spec.spans.to_vec(), spec.scale);
        if let Some(Plant::Attention(scope, change)) = &self.plant
            && self.below(scope)
        {
            change(&mut spans, &mut scale);
        }
        let y = Reference.attention(q, kv, &Attention { spans: &spans, scale, ..*spec })?;
        self.at(OpKind::Attention, None, y)
    }
    fn gelu(&self, x: &Tensor) -> Result<Tensor> {
        self.activation(OpKind::Gelu, x, |x| Reference.gelu(x))
    }
    fn silu(&self, x: &Tensor) -> Result<Tensor> {
        self.activation(OpKind::Silu, x, |x| Reference.silu(x))
    }
    fn geglu(&self, x: &Tensor) -> Result<Tensor> {
        self.activation(OpKind::Geglu, x, |x| Reference.geglu(x))
    }
    fn add(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        let sum = match &self.plant {
            Some(Plant::Residual(after)) if self.last_linear.borrow().contains(after) => {
                self.hits.set(self.hits.get() + 1);
                // The layers put the residual first unless its rows repeat.
                if x.rows() > y.rows() { x.clone() } else { y.clone() }
            }
            _ => Reference.add(x, y)?,
        };
        self.at(OpKind::Add, None, sum)
    }
    fn add_scaled(&self, x: &Tensor, y: &Tensor, scale: f32) -> Result<Tensor> {
        let scale = match self.plant {
            Some(Plant::Step(factor)) => {
                self.hits.set(self.hits.get() + 1);
                scale * factor
            }
            _ => scale,
        };
        self.at(OpKind::AddScaled, None, Reference.add_scaled(x, y, scale)?)
    }
    fn concat_rows(&self, parts: &[&Tensor]) -> Result<Tensor> {
        let mut parts = parts.to_vec();
        if let Some(Plant::Concat(scope)) = &self.plant
            && self.scope() == *scope
        {
            self.hits.set(self.hits.get() + 1);
            parts.reverse();
        }
        self.at(OpKind::ConcatRows, None, Reference.concat_rows(&parts)?)
    }
    fn store_rows(&self, to: &mut Tensor, at: &[u32], x: &Tensor) -> Result<()> {
        let mut at = at.to_vec();
        if let Some(Plant::Store(change)) = &self.plant {
            self.hits.set(self.hits.get() + 1);
            change(&mut at);
        }
        Reference.store_rows(to, &at, x)
    }
    fn slice_rows(&self, x: &Tensor, range: Range<usize>) -> Result<Tensor> {
        let mut range = range;
        if matches!(self.plant, Some(Plant::SliceRows(rows)) if rows == range.len()) {
            self.hits.set(self.hits.get() + 1);
            range = if range.start > 0 {
                range.start - 1..range.end - 1
            } else {
                (range.start + 1).min(x.rows() - range.len())..(range.end + 1).min(x.rows())
            };
        }
        self.at(OpKind::SliceRows, None, Reference.slice_rows(x, range)?)
    }
    fn slice_cols(&self, x: &Tensor, range: Range<usize>) -> Result<Tensor> {
        self.at(OpKind::SliceCols, None, Reference.slice_cols(x, range)?)
    }
}

impl Mutant {
    fn activation(
        &self,
        op: OpKind,
        x: &Tensor,
        right: impl Fn(&Tensor) -> Result<Tensor>,
    ) -> Result<Tensor> {
        let y = match &self.plant {
            Some(Plant::Activation(kind, scope, wrong)) if *kind == op && self.below(scope) => wrong(x)?,
            _ => right(x)?,
        };
        self.at(op, None, y)
    }
}
