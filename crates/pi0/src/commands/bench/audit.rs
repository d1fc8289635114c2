//! Checks every operation of a real inference against the reference, on a few rows of each.
//!
//! The reference needs an hour for a full-size inference, but every operation computes each of its rows from the same
//! row of its operand. So while one inference runs on the device, each operation's result is downloaded, and the
//! reference computes two of its rows from the device's own operands: every weight, kernel and shape is seen, in
//! seconds. What no single operation shows, the wiring, is the golden tests' part.

use std::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::fmt;
use std::ops::Range;
use std::rc::Rc;
use std::sync::Arc;

use pi0_device::{
    Agreement, Attention, Bound, Dense, Device, HostTensor, KeyValue, Modulation, Norm, OpKind, Qkv,
    Reference, Result, Span, WeightSource, compare, dense, forward, qkv,
};
use pi0_model::cases::{Format, Rounded, bounds_of_groups};

/// Runs on `D`, and while told to, checks what it runs.
pub struct Audited<D> {
    inner: D,
    audit: RefCell<Option<Audit>>,
}

/// A weight, and where it came from.
pub struct AuditedWeight<W> {
    source: WeightSource,
    packed: W,
}

/// What the checks found, by kind of operation.
pub type Findings = BTreeMap<OpKind, Finding>;

/// The checks of one kind of operation.
#[derive(Debug, Clone)]
pub struct Finding {
    /// Results checked.
    pub count: usize,
    /// The one that strained its bound most; NaN does so most of all.
    pub worst: Agreement,
    /// What it had to reach.
    pub bound: Bound,
    /// The module where it was.
    pub module: String,
}

impl Finding {
    /// To rank by: out of bounds, then relative L2 over its bound.
    fn strain(&self) -> (bool, f64) {
        let (is, most) = (self.worst.relative_l2, self.bound.relative_l2);
        let strain = match is {
            _ if is.is_nan() => f64::INFINITY,
            0.0 => 0.0,
            _ => is / most,
        };
        (!self.bound.holds(&self.worst), strain)
    }
}

struct Audit {
    wanted: fn(&str) -> bool,
    format: Format,
    modules: Vec<String>,
    checks: usize,
    findings: Findings,
}

type Rows = Arc<HostTensor>;

impl<D: Device> Audited<D> {
    /// Wraps `inner`, checking nothing yet.
    pub fn new(inner: D) -> Self {
        Self { inner, audit: RefCell::default() }
    }

    /// Runs `work`, checking every operation in the modules whose path `wanted` accepts, for what a device of `format`
    /// may be off by.
    pub fn audit<T>(
        &self,
        wanted: fn(&str) -> bool,
        format: Format,
        work: impl FnOnce() -> T,
    ) -> (T, Findings) {
        let audit = Audit { wanted, format, modules: Vec::new(), checks: 0, findings: Findings::new() };
        *self.audit.borrow_mut() = Some(audit);
        let done = work();
        let findings = self.audit.borrow_mut().take().map(|a| a.findings).unwrap_or_default();
        (done, findings)
    }

    /// The rows to check of a result of `rows` rows: the last one, where tails are, and one that moves about. And the
    /// format.
    fn sample(&self, rows: usize) -> Option<(Vec<usize>, Format)> {
        let mut audit = self.audit.borrow_mut();
        let audit = audit.as_mut().filter(|a| rows > 0 && (a.wanted)(&a.modules.join(".")))?;
        audit.checks += 1;
        let mut picked = vec![audit.checks.wrapping_mul(7919) % rows, rows - 1];
        picked.dedup();
        Some((picked, audit.format))
    }

    /// Compares `y` with what `want` says of the sampled rows.
    fn check(
        &self,
        op: OpKind,
        y: &D::Tensor,
        want: impl Fn(&Judge<'_>, &[usize]) -> Result<Rows>,
    ) -> Result<()> {
        self.check_all(op, std::slice::from_ref(y), 1, |judge, rows| Ok(vec![want(judge, rows)?]))
    }

    /// The same for an operation of several results, of whose values one rounding may move `together` alike.
    fn check_all(
        &self,
        op: OpKind,
        results: &[D::Tensor],
        together: usize,
        want: impl Fn(&Judge<'_>, &[usize]) -> Result<Vec<Rows>>,
    ) -> Result<()> {
        let Some((rows, format)) = self.sample(self.inner.shape(&results[0])[0]) else { return Ok(()) };
        let weights = RefCell::default();
        let judged = |device| -> Result<Vec<(String, HostTensor)>> {
            let judge = Judge { device, weights: &weights, next: Cell::new(0) };
            let results = want(&judge, &rows)?;
            Ok(results.into_iter().map(|y| (String::new(), HostTensor::clone(&y))).collect())
        };
        let want = judged(Rounded::exact(Reference))?;
        let draw = |seed| judged(Rounded::new(Reference, format, seed));
        let bounds = bounds_of_groups(&want, together, draw)?;
        for ((y, (_, want)), bound) in results.iter().zip(&want).zip(bounds) {
            self.record(op, &*self.pick(y, &rows)?, want, bound);
        }
        Ok(())
    }

    fn record(&self, op: OpKind, got: &HostTensor, want: &HostTensor, bound: Bound) {
        let worst = compare(&got.data, &want.data);
        let mut audit = self.audit.borrow_mut();
        let Some(audit) = audit.as_mut() else { return };
        let found = Finding { count: 1, worst, bound, module: audit.modules.join(".") };
        let Some(known) = audit.findings.get_mut(&op) else {
            audit.findings.insert(op, found);
            return;
        };
        known.count += 1;
        if found.strain() > known.strain() {
            *known = Finding { count: known.count, ..found };
        }
    }

    /// Some rows of a tensor, on the host.
    fn pick(&self, x: &D::Tensor, rows: &[usize]) -> Result<Rows> {
        let x = self.inner.download(x)?;
        Ok(pick(&x, rows))
    }
}

fn pick(x: &HostTensor, rows: &[usize]) -> Rows {
    let data = rows.iter().flat_map(|&r| x.row(r).iter().copied()).collect();
    Arc::new(HostTensor::new([rows.len(), x.cols()], data))
}

/// The reference, with the roundings of a format or without, and the weights that one operation reads: packed once for
/// all its runs, each of which asks for the same ones in the same order.
struct Judge<'a> {
    device: Rounded<Reference>,
    weights: &'a RefCell<Vec<Rc<JudgeWeight>>>,
    next: Cell<usize>,
}

type JudgeWeight = <Rounded<Reference> as Device>::Weight;

impl Judge<'_> {
    fn weight(&self, source: &WeightSource) -> Result<Rc<JudgeWeight>> {
        let i = self.next.replace(self.next.get() + 1);
        if let Some(known) = self.weights.borrow().get(i) {
            return Ok(known.clone());
        }
        // Of its own, so that bytes that are made for it are not kept.
        let source = source.unfetched();
        let weight = Rc::new(self.device.prepare(&source)?);
        source.release();
        self.weights.borrow_mut().push(weight.clone());
        Ok(weight)
    }
}

fn picked_positions(positions: &[u32], rows: &[usize]) -> Vec<u32> {
    rows.iter().map(|&r| positions[r]).collect()
}

impl<D: Device> Device for Audited<D> {
    type Tensor = D::Tensor;
    type Weight = AuditedWeight<D::Weight>;

    forward! { D.inner: name memory preferred shape on_host tap upload download largest store_rows }

    fn enter(&self, module: fmt::Arguments<'_>) {
        self.inner.enter(module);
        if let Some(audit) = self.audit.borrow_mut().as_mut() {
            audit.modules.push(module.to_string());
        }
    }
    fn exit(&self) {
        self.inner.exit();
        if let Some(audit) = self.audit.borrow_mut().as_mut() {
            audit.modules.pop();
        }
    }
    fn prepare(&self, source: &WeightSource) -> Result<Self::Weight> {
        Ok(AuditedWeight { packed: self.inner.prepare(source)?, source: source.unfetched() })
    }

    fn embed(&self, table: &Self::Weight, ids: &[u32], scale: f32) -> Result<D::Tensor> {
        let y = self.inner.embed(&table.packed, ids, scale)?;
        self.check(OpKind::Embed, &y, |judge, rows| {
            judge.device.embed(judge.weight(&table.source)?.as_ref(), &picked_positions(ids, rows), scale)
        })?;
        Ok(y)
    }
    fn linear(&self, x: &D::Tensor, w: &Self::Weight) -> Result<D::Tensor> {
        let y = self.inner.linear(x, &w.packed)?;
        self.check(OpKind::Linear, &y, |judge, rows| {
            judge.device.linear(&self.pick(x, rows)?, judge.weight(&w.source)?.as_ref())
        })?;
        Ok(y)
    }
    fn layer_norm(&self, x: &D::Tensor, w: &Self::Weight) -> Result<D::Tensor> {
        let y = self.inner.layer_norm(x, &w.packed)?;
        self.check(OpKind::LayerNorm, &y, |judge, rows| {
            judge.device.layer_norm(&self.pick(x, rows)?, judge.weight(&w.source)?.as_ref())
        })?;
        Ok(y)
    }
    fn rms_norm(&self, x: &D::Tensor, w: &Self::Weight) -> Result<D::Tensor> {
        let y = self.inner.rms_norm(x, &w.packed)?;
        self.check(OpKind::RmsNorm, &y, |judge, rows| {
            judge.device.rms_norm(&self.pick(x, rows)?, judge.weight(&w.source)?.as_ref())
        })?;
        Ok(y)
    }
    fn ada_rms_norm(&self, x: &D::Tensor, by: &Modulation<'_, D::Tensor>) -> Result<D::Tensor> {
        let y = self.inner.ada_rms_norm(x, by)?;
        self.check(OpKind::AdaRmsNorm, &y, |judge, rows| {
            let by = SampledBy::new(self, *by, rows)?;
            judge.device.ada_rms_norm(&self.pick(x, rows)?, &by.modulation())
        })?;
        Ok(y)
    }
    fn rope(&self, x: &D::Tensor, positions: &[u32], head_dim: usize) -> Result<D::Tensor> {
        let y = self.inner.rope(x, positions, head_dim)?;
        self.check(OpKind::Rope, &y, |judge, rows| {
            judge.device.rope(&self.pick(x, rows)?, &picked_positions(positions, rows), head_dim)
        })?;
        Ok(y)
    }
    fn attention(
        &self,
        q: &D::Tensor,
        kv: &[KeyValue<'_, D::Tensor>],
        spec: &Attention<'_>,
    ) -> Result<D::Tensor> {
        let y = self.inner.attention(q, kv, spec)?;
        self.check_all(OpKind::Attention, std::slice::from_ref(&y), spec.head_dim, |judge, rows| {
            let keys = |row: usize| spec.spans.iter().find(|s| s.queries.contains(&row)).map(|s| &s.keys);
            let spans: Vec<_> = rows
                .iter()
                .enumerate()
                .map(|(i, &r)| Span { queries: i..i + 1, keys: keys(r).cloned().unwrap_or_default() })
                .collect();
            let down = |x| self.inner.download(x).map(Arc::new);
            let kv: Vec<_> = kv.iter().map(|p| Ok((down(p.k)?, down(p.v)?))).collect::<Result<_>>()?;
            let kv: Vec<_> = kv.iter().map(|(k, v)| KeyValue { k, v }).collect();
            let spec = Attention { spans: &spans, ..*spec };
            Ok(vec![judge.device.attention(&self.pick(q, rows)?, &kv, &spec)?])
        })?;
        Ok(y)
    }
    fn gelu(&self, x: &D::Tensor) -> Result<D::Tensor> {
        let y = self.inner.gelu(x)?;
        self.check(OpKind::Gelu, &y, |judge, rows| judge.device.gelu(&self.pick(x, rows)?))?;
        Ok(y)
    }
    fn silu(&self, x: &D::Tensor) -> Result<D::Tensor> {
        let y = self.inner.silu(x)?;
        self.check(OpKind::Silu, &y, |judge, rows| judge.device.silu(&self.pick(x, rows)?))?;
        Ok(y)
    }
    fn geglu(&self, x: &D::Tensor) -> Result<D::Tensor> {
        let y = self.inner.geglu(x)?;
        self.check(OpKind::Geglu, &y, |judge, rows| judge.device.geglu(&self.pick(x, rows)?))?;
        Ok(y)
    }
    fn add(&self, x: &D::Tensor, y: &D::Tensor) -> Result<D::Tensor> {
        let z = self.inner.add(x, y)?;
        self.check(OpKind::Add, &z, |judge, rows| {
            judge.device.add(&self.pick(x, rows)?, &self.pick(y, &repeated(rows, self.shape(y)[0]))?)
        })?;
        Ok(z)
    }
    fn add_scaled(&self, x: &D::Tensor, y: &D::Tensor, scale: f32) -> Result<D::Tensor> {
        let z = self.inner.add_scaled(x, y, scale)?;
        self.check(OpKind::AddScaled, &z, |judge, rows| {
            judge.device.add_scaled(&self.pick(x, rows)?, &self.pick(y, rows)?, scale)
        })?;
        Ok(z)
    }
    fn gated_add(&self, x: &D::Tensor, y: &D::Tensor, by: &Modulation<'_, D::Tensor>) -> Result<D::Tensor> {
        let z = self.inner.gated_add(x, y, by)?;
        self.check(OpKind::GatedAdd, &z, |judge, rows| {
            let by = SampledBy::new(self, *by, rows)?;
            judge.device.gated_add(&self.pick(x, rows)?, &self.pick(y, rows)?, &by.modulation())
        })?;
        Ok(z)
    }
    fn concat_rows(&self, parts: &[&D::Tensor]) -> Result<D::Tensor> {
        let y = self.inner.concat_rows(parts)?;
        self.check(OpKind::ConcatRows, &y, |judge, rows| {
            let down = |x: &&D::Tensor| self.inner.download(x).map(Arc::new);
            let parts: Vec<_> = parts.iter().map(down).collect::<Result<_>>()?;
            Ok(pick(&*judge.device.concat_rows(&parts.iter().collect::<Vec<_>>())?, rows))
        })?;
        Ok(y)
    }
    fn slice_rows(&self, x: &D::Tensor, range: Range<usize>) -> Result<D::Tensor> {
        let y = self.inner.slice_rows(x, range.clone())?;
        self.check(OpKind::SliceRows, &y, |_, rows| {
            self.pick(x, &rows.iter().map(|r| range.start + r).collect::<Vec<_>>())
        })?;
        Ok(y)
    }
    fn slice_cols(&self, x: &D::Tensor, range: Range<usize>) -> Result<D::Tensor> {
        let y = self.inner.slice_cols(x, range.clone())?;
        self.check(OpKind::SliceCols, &y, |judge, rows| {
            judge.device.slice_cols(&self.pick(x, rows)?, range.clone())
        })?;
        Ok(y)
    }

    fn dense(&self, call: &Dense<'_, D::Tensor, Self::Weight>) -> Result<D::Tensor> {
        let y = self.inner.dense(&call.with_inner(|w| Ok(&w.packed))?)?;
        self.check(OpKind::Dense, &y, |judge, rows| {
            let norm = SampledNorm::new(self, judge, call.norm, rows)?;
            let gate = call.gate.map(|by| SampledBy::new(self, by, rows)).transpose()?;
            // The longer operand's rows are the result's; those of the shorter repeat.
            let part = |x: &D::Tensor| self.pick(x, &repeated(rows, self.shape(x)[0]));
            let (x, residual) = (part(call.x)?, call.residual.map(part).transpose()?);
            let weight = judge.weight(&call.weight.source)?;
            let sampled = Dense {
                norm: norm.of(call.norm),
                activation: call.activation,
                gate: gate.as_ref().map(SampledBy::modulation),
                residual: residual.as_ref(),
                ..Dense::new(&x, &weight)
            };
            dense(&judge.device, &sampled)
        })?;
        Ok(y)
    }

    fn qkv(&self, call: &Qkv<'_, D::Tensor, Self::Weight>) -> Result<[D::Tensor; 3]> {
        let y = self.inner.qkv(&call.with_inner(|w| Ok(&w.packed))?)?;
        self.check_all(OpKind::Qkv, &y, 1, |judge, rows| {
            let norm = SampledNorm::new(self, judge, Some(call.norm), rows)?;
            let positions = call.positions.map(|p| picked_positions(p, rows));
            let weight = judge.weight(&call.weight.source)?;
            let sampled = Qkv {
                x: &self.pick(call.x, rows)?,
                norm: norm.of(Some(call.norm)).expect("it has one"),
                weight: &weight,
                heads: call.heads,
                kv_heads: call.kv_heads,
                head_dim: call.head_dim,
                positions: positions.as_deref(),
                norm_tap: None,
            };
            qkv(&judge.device, &sampled).map(Vec::from)
        })?;
        Ok(y)
    }
}

/// Modulations of some rows, on the reference.
struct SampledBy {
    table: Rows,
    rows: Vec<u32>,
}

impl SampledBy {
    fn new<D: Device>(d: &Audited<D>, by: Modulation<'_, D::Tensor>, rows: &[usize]) -> Result<Self> {
        let table = Arc::new(d.inner.download(by.table)?);
        Ok(Self { table, rows: picked_positions(by.rows, rows) })
    }

    fn modulation(&self) -> Modulation<'_, Rows> {
        Modulation { table: &self.table, rows: &self.rows }
    }
}

/// What a norm goes by, on the reference: its weight, or the modulations of some rows.
struct SampledNorm {
    weight: Option<Rc<JudgeWeight>>,
    by: Option<SampledBy>,
}

impl SampledNorm {
    fn new<D: Device>(
        d: &Audited<D>,
        judge: &Judge<'_>,
        norm: Option<Norm<'_, D::Tensor, <Audited<D> as Device>::Weight>>,
        rows: &[usize],
    ) -> Result<Self> {
        let weight = norm.and_then(|n| n.weight()).map(|w| judge.weight(&w.source)).transpose()?;
        let by = match norm {
            Some(Norm::Ada(by)) => Some(SampledBy::new(d, by, rows)?),
            _ => None,
        };
        Ok(Self { weight, by })
    }

    /// The same kind of norm over what was sampled.
    fn of<T, W>(&self, norm: Option<Norm<'_, T, W>>) -> Option<Norm<'_, Rows, JudgeWeight>> {
        let weight = || &**self.weight.as_ref().expect("it was sampled");
        Some(match norm? {
            Norm::Layer(_) => Norm::Layer(weight()),
            Norm::Rms(_) => Norm::Rms(weight()),
            Norm::Ada(_) => Norm::Ada(self.by.as_ref().expect("it was sampled").modulation()),
        })
    }
}

/// Rows of an operand whose `rows` rows repeat.
fn repeated(picked: &[usize], rows: usize) -> Vec<usize> {
    picked.iter().map(|p| p % rows).collect()
}

#[cfg(test)]
mod tests {
    use pi0_device::{LinearPart, TensorSource};

    use super::*;

    /// The reference with the last column of every product off by a hundredth.
    struct Off(Reference);

    impl Device for Off {
        type Tensor = Rows;
        type Weight = <Reference as Device>::Weight;

        fn name(&self) -> &'static str {
            "off"
        }

        forward! { Reference.0: shape upload download prepare gelu }

        fn linear(&self, x: &Rows, w: &Self::Weight) -> Result<Rows> {
            let mut y = HostTensor::clone(&*Reference.linear(x, w)?);
            let end = y.cols() - 1;
            (0..y.rows()).for_each(|r| y.row_mut(r)[end] *= 1.01);
            Ok(Arc::new(y))
        }
    }

    #[test]
    fn a_wrong_operation_is_found_and_only_while_auditing() {
        let d = Audited::new(Off(Reference));
        let weight = TensorSource::from_f32("w", vec![3, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]).unwrap();
        let parts = vec![LinearPart { weight, bias: None, columns: None }];
        let w = d.prepare(&WeightSource::Linear { parts, exact: false }).unwrap();
        let x = d.upload(5, 2, &[0.5; 10]).unwrap();
        let work = || {
            for module in ["kept", "left"] {
                d.enter(format_args!("{module}"));
                d.gelu(&d.linear(&x, &w).unwrap()).unwrap();
                d.exit();
            }
        };
        work();
        let ((), findings) = d.audit(|m| m == "kept", Format::F32, work);
        assert_eq!(findings.keys().copied().collect::<Vec<_>>(), [OpKind::Linear, OpKind::Gelu]);
        let linear = &findings[&OpKind::Linear];
        assert_eq!((linear.count, linear.module.as_str()), (1, "kept"));
        assert!(!linear.bound.holds(&linear.worst) && linear.bound.relative_l2 < 1e-5, "{:?}", linear.bound);
        assert!((0.005..0.01).contains(&linear.worst.relative_l2), "{}", linear.worst);
        assert_eq!(findings[&OpKind::Gelu].worst.max_abs, 0.0);
    }
}
