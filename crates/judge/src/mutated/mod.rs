//! A device on which chosen operations go wrong the way that people get them wrong: what a dump is judged by
//! ([`crate::dump`]), and what a check must notice (`tests/mutants`).

pub mod mistakes;

use std::cell::{Cell, RefCell};
use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::ops::Range;
use std::rc::Rc;

use pi0_device::{
    Attention, Device, Error, HostTensor, KeyValue, MemoryMeter, Modulation, OpKind, Result, Span,
    WeightSource,
};

/// Packs something else.
pub type Repack = Rc<dyn Fn(&mut WeightSource)>;
/// Other positions for the rows of a call.
pub type Reposition = Rc<dyn Fn(&[u32]) -> Vec<u32>>;
/// Other spans and another scale for a call.
pub type Respan = Rc<dyn Fn(&mut Vec<Span>, &mut f32)>;

/// One thing that goes wrong, and where. A scope is the beginning of a module path without its denoising step, such as
/// `vision` or `suffix.layer2`; a weight is named by a part of its (first) tensor's name.
#[derive(Clone)]
pub enum Plant {
    /// A weight is packed from something else than the checkpoint says.
    Weight(String, Repack),
    /// The result of a linear layer is multiplied.
    ScaleLinear(String, f32),
    /// A norm is left out: its input goes on as it is.
    SkipNorm(String),
    /// One of the adaptive norms of each layer, or the last, is left out; its gate stays.
    SkipAdaptive(Adaptive),
    /// Rows are rotated otherwise.
    Rotate(String, mistakes::Rotation),
    /// Rows are rotated by other positions.
    Positions(String, Reposition),
    /// Attention is called with other spans or another scale.
    Attend(String, Respan),
    /// Attention rounds its logits and weights to bf16.
    RoundSoftmax(String),
    /// An activation is another function.
    Activation(OpKind, String, fn(&HostTensor) -> HostTensor),
    /// The residual behind a linear layer is not added.
    NoResidual(String),
    /// Token embeddings are multiplied by this beside their scale.
    ScaleEmbedding(f32),
    /// The first part of what is put together row by row is multiplied.
    ScaleFirstRows(String, f32),
    /// Adaptive norms take another table row by row: scale, shift and gate, `width` each.
    AdaTable(fn(&mut [f32], usize)),
    /// Gated residuals take another table.
    GateTable(fn(&mut [f32], usize)),
    /// Adaptive norms have another eps.
    AdaEps(f32),
    /// Adaptive norms take the drive of other rows.
    AdaRows(fn(&[u32]) -> Vec<u32>),
    /// The Euler step of rows is gated as that of other rows.
    StepRows(fn(&[u32]) -> Vec<u32>),
    /// The Euler step goes the other way or too far.
    Step(f32),
    /// Rows are put together in the other order, in exactly this scope.
    ReverseRows(String),
    /// A slice of this many rows begins one row early, or late where it cannot.
    SliceRows(usize),
    /// Rows of a cache are stored in other places.
    Store(fn(&mut [u32])),
    /// The result of one site, as [`Mutated::sites`] names it, is multiplied.
    ScaleSite(String, f32),
}

/// π0.5's adaptive norms, whose weights have no name on the device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Adaptive {
    /// Before attention.
    Attention,
    /// Before the MLP.
    Mlp,
    /// Behind the last layer.
    Final,
}

/// `D` with what [`plant`](Mutated::plant) plants. Base operations run, and those that store rows; what is tapped is kept
/// where somebody wants it.
pub struct Mutated<D: Device> {
    inner: D,
    plants: RefCell<Vec<Plant>>,
    /// Counts changes of the plants, so that weights know when theirs is out of date.
    generation: Cell<u64>,
    path: RefCell<Vec<String>>,
    last_linear: RefCell<String>,
    wanted: BTreeSet<String>,
    taps: RefCell<Vec<(String, HostTensor)>>,
    failed: RefCell<Option<Error>>,
    hits: Cell<usize>,
    watch: Option<Watch>,
}

/// Names the places where operations run.
#[derive(Default)]
struct Watch {
    /// Operations since the last linear layer.
    since: RefCell<Vec<OpKind>>,
    sites: RefCell<BTreeSet<String>>,
    /// Tables of modulations by what they hold, as the model taps them: a norm and a gate that read the same table belong
    /// to one site wherever they run.
    tables: RefCell<HashMap<u64, String>>,
}

/// A weight that can be packed otherwise.
pub struct MutatedWeight<W> {
    inner: W,
    source: WeightSource,
    name: String,
    changed: RefCell<Option<(u64, Rc<W>)>>,
}

/// The weight as it is or as it went wrong.
enum Picked<'a, W> {
    Right(&'a W),
    Wrong(Rc<W>),
}

impl<W> std::ops::Deref for Picked<'_, W> {
    type Target = W;
    fn deref(&self) -> &W {
        match self {
            Picked::Right(w) => w,
            Picked::Wrong(w) => w,
        }
    }
}

impl<D: Device> Mutated<D> {
    /// A device on which nothing is wrong yet. Of all that is tapped it keeps what is `wanted`, by the path without the
    /// denoising step 0.
    pub fn new(inner: D, wanted: BTreeSet<String>) -> Self {
        Self {
            inner,
            plants: RefCell::default(),
            generation: Cell::new(0),
            path: RefCell::default(),
            last_linear: RefCell::default(),
            wanted,
            taps: RefCell::default(),
            failed: RefCell::default(),
            hits: Cell::new(0),
            watch: None,
        }
    }

    /// The same, and it notes where operations run, for [`sites`](Self::sites) and [`Plant::ScaleSite`]. Taps are not kept.
    pub fn watched(inner: D) -> Self {
        Self { watch: Some(Watch::default()), ..Self::new(inner, BTreeSet::new()) }
    }

    /// Every place where an operation ran: `scope|op|weight or what came before`. None unless watched.
    pub fn sites(&self) -> Vec<String> {
        self.watch.iter().flat_map(|watch| watch.sites.borrow().clone()).collect()
    }

    /// How often plants took effect.
    pub fn hits(&self) -> usize {
        self.hits.get()
    }

    /// A module begins or ends: what ran before belongs to another.
    fn forget(&self) {
        self.last_linear.borrow_mut().clear();
        if let Some(watch) = &self.watch {
            watch.since.borrow_mut().clear();
        }
    }

    fn hit(&self) {
        self.hits.set(self.hits.get() + 1);
    }

    /// Passes the result of every operation: notes its site, and scales it where that is planted.
    fn at(&self, op: OpKind, weight: Option<&str>, y: D::Tensor) -> Result<D::Tensor> {
        let Some(watch) = &self.watch else { return Ok(y) };
        if op == OpKind::Linear {
            watch.since.borrow_mut().clear();
        }
        let key = match weight {
            Some(name) => name.to_owned(),
            None => {
                let count = watch.since.borrow().iter().filter(|o| **o == op).count();
                format!("{count} after {}", self.last_linear.borrow())
            }
        };
        watch.since.borrow_mut().push(op);
        self.at_key(watch, op, &key, y)
    }

    /// The same for an operation that a table of modulations drives.
    fn at_table(&self, op: OpKind, by: &Modulation<'_, D::Tensor>, y: D::Tensor) -> Result<D::Tensor> {
        let Some(watch) = &self.watch else { return Ok(y) };
        let known = watch.tables.borrow().get(&self.contents(by.table)?).cloned();
        match known {
            Some(key) => self.at_key(watch, op, &key, y),
            None => self.at(op, None, y),
        }
    }

    fn at_key(&self, watch: &Watch, op: OpKind, key: &str, y: D::Tensor) -> Result<D::Tensor> {
        let site = format!("{}|{op}|{key}", self.scope());
        let factor = self.find(|plant, _| match plant {
            Plant::ScaleSite(wanted, factor) if *wanted == site => Some(*factor),
            _ => None,
        });
        watch.sites.borrow_mut().insert(site);
        match factor {
            Some(factor) => self.times(&y, factor),
            None => Ok(y),
        }
    }

    fn contents(&self, x: &D::Tensor) -> Result<u64> {
        let mut hasher = DefaultHasher::new();
        self.inner.download(x)?.data.iter().for_each(|x| x.to_bits().hash(&mut hasher));
        Ok(hasher.finish())
    }

    /// From now on these go wrong, and nothing else.
    pub fn plant(&self, plants: Vec<Plant>) {
        *self.plants.borrow_mut() = plants;
        self.generation.set(self.generation.get() + 1);
    }

    /// What was tapped since the last call.
    pub fn take(&self) -> Result<Vec<(String, HostTensor)>> {
        let taps = std::mem::take(&mut *self.taps.borrow_mut());
        match self.failed.borrow_mut().take() {
            Some(e) => Err(e),
            None => Ok(taps),
        }
    }

    fn scope(&self) -> String {
        let path = self.path.borrow();
        let inner: Vec<_> = path.iter().filter(|m| !m.starts_with("step")).map(String::as_str).collect();
        inner.join(".")
    }

    /// The first answer that a plant gives here.
    fn find<T>(&self, pick: impl Fn(&Plant, &str) -> Option<T>) -> Option<T> {
        let plants = self.plants.borrow();
        if plants.is_empty() {
            return None;
        }
        let scope = self.scope();
        let found = plants.iter().find_map(|plant| pick(plant, &scope));
        if found.is_some() {
            self.hit();
        }
        found
    }

    fn weight<'a>(&self, w: &'a MutatedWeight<D::Weight>) -> Result<Picked<'a, D::Weight>> {
        let generation = self.generation.get();
        if let Some((made, weight)) = &*w.changed.borrow()
            && *made == generation
        {
            return Ok(Picked::Wrong(weight.clone()));
        }
        w.changed.replace(None);
        let mut source = None;
        for plant in self.plants.borrow().iter() {
            if let Plant::Weight(name, change) = plant
                && w.name.contains(name)
            {
                self.hit();
                change(source.get_or_insert_with(|| w.source.clone()));
            }
        }
        let Some(source) = source else { return Ok(Picked::Right(&w.inner)) };
        let weight = Rc::new(self.inner.prepare(&source)?);
        w.changed.replace(Some((generation, weight.clone())));
        Ok(Picked::Wrong(weight))
    }

    fn host(&self, x: &D::Tensor, f: impl FnOnce(HostTensor) -> HostTensor) -> Result<D::Tensor> {
        let y = f(self.inner.download(x)?);
        self.inner.upload(y.rows(), y.cols(), &y.data)
    }

    fn times(&self, x: &D::Tensor, factor: f32) -> Result<D::Tensor> {
        self.host(x, |mut x| {
            x.data.iter_mut().for_each(|x| *x *= factor);
            x
        })
    }

    fn activation(
        &self,
        op: OpKind,
        x: &D::Tensor,
        right: impl Fn(&D::Tensor) -> Result<D::Tensor>,
    ) -> Result<D::Tensor> {
        let wrong = self.find(|plant, here| match plant {
            Plant::Activation(kind, scope, wrong) if *kind == op && here.starts_with(scope) => Some(*wrong),
            _ => None,
        });
        let y = match wrong {
            Some(wrong) => self.host(x, |x| wrong(&x))?,
            None => right(x)?,
        };
        self.at(op, None, y)
    }

    fn skipped(&self, name: &str) -> bool {
        self.find(|plant, _| match plant {
            Plant::SkipNorm(wanted) if name.contains(wanted) => Some(()),
            _ => None,
        })
        .is_some()
    }

    /// Whether what was computed last goes on without its residual.
    fn residual_missing(&self) -> bool {
        self.find(|plant, _| match plant {
            Plant::NoResidual(after) if self.last_linear.borrow().contains(after) => Some(()),
            _ => None,
        })
        .is_some()
    }

    /// Runs `f` by a table whose rows `change` changed.
    fn with_table<T>(
        &self,
        by: &Modulation<'_, D::Tensor>,
        change: fn(&mut [f32], usize),
        f: impl FnOnce(&Modulation<'_, D::Tensor>) -> Result<T>,
    ) -> Result<T> {
        let mut table = self.inner.download(by.table)?;
        let width = table.cols() / 3;
        (0..table.rows()).for_each(|r| change(table.row_mut(r), width));
        let table = self.inner.upload(table.rows(), table.cols(), &table.data)?;
        f(&Modulation { table: &table, rows: by.rows })
    }
}

impl<D: Device> Device for Mutated<D> {
    type Tensor = D::Tensor;
    type Weight = MutatedWeight<D::Weight>;

    fn name(&self) -> &'static str {
        self.inner.name()
    }
    fn memory(&self) -> Option<MemoryMeter> {
        self.inner.memory()
    }
    fn shape(&self, x: &D::Tensor) -> [usize; 2] {
        self.inner.shape(x)
    }
    fn enter(&self, module: fmt::Arguments<'_>) {
        self.inner.enter(module);
        self.path.borrow_mut().push(module.to_string());
        self.forget();
    }
    fn exit(&self) {
        self.inner.exit();
        self.path.borrow_mut().pop();
        self.forget();
    }
    fn tap(&self, name: &str, x: &D::Tensor) {
        let keep_failure = |e| {
            self.failed.borrow_mut().get_or_insert(e);
        };
        if let Some(watch) = &self.watch
            && name.ends_with(".modulation")
        {
            match self.contents(x) {
                Ok(contents) => drop(watch.tables.borrow_mut().insert(contents, name.into())),
                Err(e) => return keep_failure(e),
            }
        }
        let path = self.path.borrow();
        let path = path.iter().map(String::as_str).chain([name]).collect::<Vec<_>>().join(".");
        if !self.wanted.contains(path.strip_prefix("step0.").unwrap_or(&path)) {
            return;
        }
        match self.inner.download(x) {
            Ok(t) => self.taps.borrow_mut().push((path, t)),
            Err(e) => keep_failure(e),
        }
    }
    fn upload(&self, rows: usize, cols: usize, data: &[f32]) -> Result<D::Tensor> {
        self.inner.upload(rows, cols, data)
    }
    fn download(&self, x: &D::Tensor) -> Result<HostTensor> {
        self.inner.download(x)
    }
    fn prepare(&self, source: &WeightSource) -> Result<MutatedWeight<D::Weight>> {
        // The two halves of one tensor are two layers.
        let half = match source {
            WeightSource::Linear { parts, .. } => parts[0].columns.as_ref().map_or(0, |c| c.start),
            _ => 0,
        };
        let name = format!("{}{}", source.name(), if half > 0 { "[time]" } else { "" });
        let inner = self.inner.prepare(source)?;
        Ok(MutatedWeight { inner, source: source.clone(), name, changed: RefCell::default() })
    }

    fn embed(&self, table: &MutatedWeight<D::Weight>, ids: &[u32], scale: f32) -> Result<D::Tensor> {
        let factor = self.find(|plant, _| match plant {
            Plant::ScaleEmbedding(factor) => Some(*factor),
            _ => None,
        });
        let y = self.inner.embed(&table.inner, ids, scale * factor.unwrap_or(1.0))?;
        self.at(OpKind::Embed, Some(&table.name), y)
    }
    fn linear(&self, x: &D::Tensor, weight: &MutatedWeight<D::Weight>) -> Result<D::Tensor> {
        self.last_linear.borrow_mut().clone_from(&weight.name);
        let y = self.inner.linear(x, &*self.weight(weight)?)?;
        let factor = self.find(|plant, _| match plant {
            Plant::ScaleLinear(name, factor) if weight.name.contains(name) => Some(*factor),
            _ => None,
        });
        let y = match factor {
            Some(factor) => self.times(&y, factor)?,
            None => y,
        };
        self.at(OpKind::Linear, Some(&weight.name), y)
    }
    fn layer_norm(&self, x: &D::Tensor, weight: &MutatedWeight<D::Weight>) -> Result<D::Tensor> {
        let y = match self.skipped(&weight.name) {
            true => x.clone(),
            false => self.inner.layer_norm(x, &*self.weight(weight)?)?,
        };
        self.at(OpKind::LayerNorm, Some(&weight.name), y)
    }
    fn rms_norm(&self, x: &D::Tensor, weight: &MutatedWeight<D::Weight>) -> Result<D::Tensor> {
        let y = match self.skipped(&weight.name) {
            true => x.clone(),
            false => self.inner.rms_norm(x, &*self.weight(weight)?)?,
        };
        self.at(OpKind::RmsNorm, Some(&weight.name), y)
    }
    fn ada_rms_norm(&self, x: &D::Tensor, by: &Modulation<'_, D::Tensor>) -> Result<D::Tensor> {
        let this = match (self.scope().contains("layer"), self.last_linear.borrow().contains("o_proj")) {
            (false, _) => Adaptive::Final,
            (true, true) => Adaptive::Mlp,
            (true, false) => Adaptive::Attention,
        };
        let skipped =
            |plant: &Plant, _: &str| matches!(plant, Plant::SkipAdaptive(a) if *a == this).then_some(());
        if self.find(skipped).is_some() {
            return self.at_table(OpKind::AdaRmsNorm, by, x.clone());
        }
        let rows = self.find(|plant, _| match plant {
            Plant::AdaRows(change) => Some(change(by.rows)),
            _ => None,
        });
        let driven = Modulation { table: by.table, rows: rows.as_deref().unwrap_or(by.rows) };
        let eps = self.find(|plant, _| match plant {
            Plant::AdaEps(eps) => Some(*eps),
            _ => None,
        });
        let change = self.find(|plant, _| match plant {
            Plant::AdaTable(change) => Some(*change),
            _ => None,
        });
        let y = match (change, eps) {
            (Some(change), _) => self.with_table(&driven, change, |by| self.inner.ada_rms_norm(x, by))?,
            (None, Some(eps)) => {
                let table = self.inner.download(by.table)?;
                self.host(x, |x| mistakes::adaptive_norm(x, &table, driven.rows, eps))?
            }
            (None, None) => self.inner.ada_rms_norm(x, &driven)?,
        };
        self.at_table(OpKind::AdaRmsNorm, by, y)
    }
    fn gated_add(&self, x: &D::Tensor, y: &D::Tensor, by: &Modulation<'_, D::Tensor>) -> Result<D::Tensor> {
        if self.residual_missing() {
            let nothing = self.times(x, 0.0)?;
            let z = self.inner.gated_add(&nothing, y, by)?;
            return self.at_table(OpKind::GatedAdd, by, z);
        }
        let rows = self.find(|plant, scope| match plant {
            Plant::StepRows(change) if scope.is_empty() => Some(change(by.rows)),
            _ => None,
        });
        let driven = Modulation { table: by.table, rows: rows.as_deref().unwrap_or(by.rows) };
        let change = self.find(|plant, scope| match plant {
            Plant::GateTable(change) if scope.starts_with("suffix") => Some(*change),
            _ => None,
        });
        let z = match change {
            Some(change) => self.with_table(&driven, change, |by| self.inner.gated_add(x, y, by))?,
            None => self.inner.gated_add(x, y, &driven)?,
        };
        self.at_table(OpKind::GatedAdd, by, z)
    }
    fn rope(&self, x: &D::Tensor, positions: &[u32], head_dim: usize) -> Result<D::Tensor> {
        let other = self.find(|plant, here| match plant {
            Plant::Positions(scope, f) if here.starts_with(scope) => Some(f.clone()),
            _ => None,
        });
        let moved = other.map(|f| f(positions));
        let positions = moved.as_deref().unwrap_or(positions);
        let rotation = self.find(|plant, here| match plant {
            Plant::Rotate(scope, rotation) if here.starts_with(scope) => Some(*rotation),
            _ => None,
        });
        // Masks give rows of padding before the first real one the position -1, which no device has.
        let below = positions.iter().any(|&p| i32::try_from(p).is_err());
        let y = match rotation.or(below.then_some(mistakes::Rotation::Right)) {
            Some(rotation) => self.host(x, |x| rotation.apply(x, positions, head_dim))?,
            None => self.inner.rope(x, positions, head_dim)?,
        };
        self.at(OpKind::Rope, None, y)
    }
    fn attention(
        &self,
        q: &D::Tensor,
        kv: &[KeyValue<'_, D::Tensor>],
        spec: &Attention<'_>,
    ) -> Result<D::Tensor> {
        let (mut spans, mut scale) = (spec.spans.to_vec(), spec.scale);
        let here = self.scope();
        for plant in self.plants.borrow().iter() {
            if let Plant::Attend(scope, change) = plant
                && here.starts_with(scope)
            {
                self.hit();
                change(&mut spans, &mut scale);
            }
        }
        let spec = Attention { spans: &spans, scale, ..*spec };
        let round = self.find(|plant, here| match plant {
            Plant::RoundSoftmax(scope) if here.starts_with(scope) => Some(()),
            _ => None,
        });
        if round.is_none() {
            return self.at(OpKind::Attention, None, self.inner.attention(q, kv, &spec)?);
        }
        let q = self.inner.download(q)?;
        let kv = kv
            .iter()
            .map(|part| Ok((self.inner.download(part.k)?, self.inner.download(part.v)?)))
            .collect::<Result<Vec<_>>>()?;
        let y = mistakes::rounded_attention(&q, &kv, &spec);
        self.at(OpKind::Attention, None, self.inner.upload(y.rows(), y.cols(), &y.data)?)
    }
    fn gelu(&self, x: &D::Tensor) -> Result<D::Tensor> {
        self.activation(OpKind::Gelu, x, |x| self.inner.gelu(x))
    }
    fn silu(&self, x: &D::Tensor) -> Result<D::Tensor> {
        self.activation(OpKind::Silu, x, |x| self.inner.silu(x))
    }
    fn geglu(&self, x: &D::Tensor) -> Result<D::Tensor> {
        self.activation(OpKind::Geglu, x, |x| self.inner.geglu(x))
    }
    fn add(&self, x: &D::Tensor, y: &D::Tensor) -> Result<D::Tensor> {
        let sum = match self.residual_missing() {
            // The layers put the residual first unless its rows repeat.
            true if self.inner.shape(x)[0] > self.inner.shape(y)[0] => x.clone(),
            true => y.clone(),
            false => self.inner.add(x, y)?,
        };
        self.at(OpKind::Add, None, sum)
    }
    fn add_scaled(&self, x: &D::Tensor, y: &D::Tensor, scale: f32) -> Result<D::Tensor> {
        let factor = self.find(|plant, _| match plant {
            Plant::Step(factor) => Some(*factor),
            _ => None,
        });
        let sum = self.inner.add_scaled(x, y, scale * factor.unwrap_or(1.0))?;
        self.at(OpKind::AddScaled, None, sum)
    }
    fn concat_rows(&self, parts: &[&D::Tensor]) -> Result<D::Tensor> {
        let factor = self.find(|plant, here| match plant {
            Plant::ScaleFirstRows(scope, factor) if here == scope => Some(*factor),
            _ => None,
        });
        let reversed = self.find(|plant, here| match plant {
            Plant::ReverseRows(scope) if here == scope => Some(()),
            _ => None,
        });
        let first = factor.map(|factor| self.times(parts[0], factor)).transpose()?;
        let mut all = parts.to_vec();
        if let Some(first) = &first {
            all[0] = first;
        }
        if reversed.is_some() {
            all.reverse();
        }
        self.at(OpKind::ConcatRows, None, self.inner.concat_rows(&all)?)
    }
    fn store_rows(&self, to: &mut D::Tensor, at: &[u32], x: &D::Tensor) -> Result<()> {
        let mut at = at.to_vec();
        let change = self.find(|plant, _| match plant {
            Plant::Store(change) => Some(*change),
            _ => None,
        });
        if let Some(change) = change {
            change(&mut at);
        }
        self.inner.store_rows(to, &at, x)
    }
    fn slice_rows(&self, x: &D::Tensor, range: Range<usize>) -> Result<D::Tensor> {
        let (len, rows) = (range.len(), self.inner.shape(x)[0]);
        let moved = self.find(|plant, _| match plant {
            Plant::SliceRows(wanted) if *wanted == len => Some(()),
            _ => None,
        });
        let range = match moved {
            Some(()) if range.start > 0 => range.start - 1..range.end - 1,
            Some(()) => (range.start + 1).min(rows - len)..(range.end + 1).min(rows),
            None => range,
        };
        self.at(OpKind::SliceRows, None, self.inner.slice_rows(x, range)?)
    }
    fn slice_cols(&self, x: &D::Tensor, range: Range<usize>) -> Result<D::Tensor> {
        self.at(OpKind::SliceCols, None, self.inner.slice_cols(x, range)?)
    }
}
