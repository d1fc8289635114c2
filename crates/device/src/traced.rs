//! A wrapper that records what ran where, and runs on a host device what the device lacks, when asked.
//!
//! Coverage, fallbacks and roadmaps are folds over these records; nothing else knows what a device supports.

use std::cell::{Cell, OnceCell, RefCell};
use std::fmt;
use std::ops::Range;
use std::time::{Duration, Instant};

use smallvec::smallvec;

use crate::device::{compose_dense, compose_qkv};
use crate::modules::Modules;
use crate::record::{Fusion, Place, Record};
use crate::{
    Attention, Dense, Device, HostTensor, KeyValue, OpKind, Part, Parts, Qkv, Result, Shapes, WeightSource,
    flops, forward,
};

/// What to do with an operation that the device refuses as `Unsupported`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fallback {
    /// Return the error: a slow path must not hide. The default for releases and benchmarks.
    #[default]
    Fail,
    /// Download the operands, run on the host device, upload the result, and record all of it.
    RunOnHost,
}

/// From here on a call is long: waking a device takes a tenth of it at most.
const LONG: Duration = Duration::from_millis(5);

/// Runs on `D`, records every call, and may fall back to `H`.
pub struct Traced<D: Device, H: Device> {
    device: D,
    host: H,
    fallback: Fallback,
    forced: Vec<OpKind>,
    probing: Cell<bool>,
    began: Instant,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    modules: Modules,
    records: Vec<Record>,
    fusions: Vec<Fusion>,
}

/// A weight on either side, packed for the host only when a fallback needs it.
pub struct TracedWeight<D, H> {
    source: WeightSource,
    /// Of the source.
    dims: [usize; 2],
    device: Result<D>,
    host: OnceCell<H>,
}

/// A call, what it stands for, and its operands.
struct Call {
    op: OpKind,
    parts: Parts,
    shapes: Shapes,
}

/// How a call went, beside its time.
struct Outcome {
    result: [usize; 2],
    place: Place,
    /// Time and bytes of moves.
    moved: (Duration, u64),
    device_time: Option<Duration>,
}

impl Outcome {
    fn on_device(result: [usize; 2], device_time: Option<Duration>) -> Self {
        Self { result, place: Place::Device, moved: (Duration::ZERO, 0), device_time }
    }

    /// By the device, but on the host: the result was uploaded, in a part of the time that only the device knows.
    fn on_host_by_design(result: [usize; 2]) -> Self {
        let moved = (Duration::ZERO, 4 * (result[0] * result[1]) as u64);
        Self { place: Place::Host, moved, ..Self::on_device(result, None) }
    }
}

/// Measures the moves of one fallback.
struct Ferry<'a, D: Device, H: Device> {
    traced: &'a Traced<D, H>,
    time: Duration,
    bytes: u64,
}

impl<D: Device, H: Device> Ferry<'_, D, H> {
    fn down(&mut self, x: &D::Tensor) -> Result<H::Tensor> {
        let start = Instant::now();
        let t = self.traced.device.download(x)?;
        let on_host = self.traced.host.upload(t.rows(), t.cols(), &t.data);
        self.time += start.elapsed();
        self.bytes += 4 * t.data.len() as u64;
        on_host
    }

    fn up(&mut self, x: &H::Tensor) -> Result<D::Tensor> {
        let t = self.traced.host.download(x)?;
        let start = Instant::now();
        let on_device = self.traced.device.upload(t.rows(), t.cols(), &t.data);
        self.time += start.elapsed();
        self.bytes += 4 * t.data.len() as u64;
        on_device
    }
}

type W<D, H> = TracedWeight<<D as Device>::Weight, <H as Device>::Weight>;

impl<D: Device, H: Device> Traced<D, H> {
    /// Traces `device`; `host` serves fallbacks and forced operations.
    pub fn new(device: D, host: H, fallback: Fallback) -> Self {
        let (forced, probing) = (Vec::new(), Cell::new(false));
        Self { device, host, fallback, forced, probing, began: Instant::now(), state: RefCell::default() }
    }

    /// Forces these operations to the host, to measure what having them on the device is worth. A fused
    /// operation that contains one of them is composed.
    pub fn force_to_host(mut self, ops: Vec<OpKind>) -> Self {
        self.forced = ops;
        self
    }

    /// From now on (or no longer) also times each operation on the device apart from the inference, on the same
    /// operands, to learn its [`device_time`](Record::device_time); and each fused call that was composed because of
    /// the force, to learn what its [fusion](Fusion) saves. The results are thrown away.
    pub fn probe(&self, on: bool) {
        self.probing.set(on);
    }

    /// The records since the last call. Their room is kept, so that the next inference need not ask for it.
    pub fn take(&self) -> Vec<Record> {
        self.state.borrow_mut().records.drain(..).collect()
    }

    /// The fused calls that were composed, while [probing](Self::probe), since the last call.
    pub fn take_fusions(&self) -> Vec<Fusion> {
        std::mem::take(&mut self.state.borrow_mut().fusions)
    }

    /// The traced device.
    pub fn device(&self) -> &D {
        &self.device
    }

    fn host_weight<'w>(&self, w: &'w W<D, H>) -> Result<&'w H::Weight> {
        if w.host.get().is_none() {
            let _ = w.host.set(self.host.prepare(&w.source)?);
        }
        Ok(w.host.get().expect("set above"))
    }

    fn push(&self, call: Call, start: Instant, time: Duration, outcome: Outcome) {
        let Outcome { result, place, moved, device_time } = outcome;
        let values = |s: &[usize; 2]| 4 * (s[0] * s[1]) as u64;
        let mut state = self.state.borrow_mut();
        let module = state.modules.path();
        state.records.push(Record {
            bytes: call.shapes.iter().map(values).sum::<u64>() + values(&result),
            op: call.op,
            parts: call.parts,
            module,
            shapes: call.shapes,
            result,
            place,
            start: start - self.began,
            time,
            transfer_time: moved.0,
            transfer_bytes: moved.1,
            device_time,
        });
    }

    /// Runs a base operation on the device, or on the host if it must and may.
    fn run(
        &self,
        op: OpKind,
        shapes: Shapes,
        flop: impl FnOnce([usize; 2]) -> u64,
        on_device: impl Fn(&D) -> Result<D::Tensor>,
        on_host: impl FnOnce(&H, &mut Ferry<'_, D, H>) -> Result<H::Tensor>,
    ) -> Result<D::Tensor> {
        let call = |result| Call { op, parts: smallvec![Part { op, flop: flop(result) }], shapes };
        let forced = self.forced.contains(&op);
        let device_time = self.probed(|| on_device(&self.device), |y| y)?;
        if !forced {
            let start = Instant::now();
            match on_device(&self.device) {
                Err(e) if e.is_unsupported() && self.fallback == Fallback::RunOnHost => {}
                Err(e) => return Err(e),
                Ok(y) => {
                    let time = start.elapsed();
                    let result = self.device.shape(&y);
                    let outcome = match self.device.on_host(op) {
                        true => Outcome::on_host_by_design(result),
                        false => Outcome::on_device(result, device_time),
                    };
                    self.push(call(result), start, time, outcome);
                    return Ok(y);
                }
            }
        }
        let start = Instant::now();
        let mut ferry = Ferry { traced: self, time: Duration::ZERO, bytes: 0 };
        let y = on_host(&self.host, &mut ferry)?;
        let y = ferry.up(&y)?;
        let place = if forced { Place::Forced } else { Place::Host };
        let moved = (ferry.time, ferry.bytes);
        let result = self.device.shape(&y);
        self.push(call(result), start, start.elapsed(), Outcome { result, place, moved, device_time });
        Ok(y)
    }

    /// How long the device takes for `f` in its stride, if it can at all. After work of the host its threads sleep, its
    /// clocks are low and its caches hold other things; in an inference that stays on the device they are not. So the
    /// second call counts. Only where the first was long is it taken instead: waking is lost in it, and a second call
    /// would find large weights in caches that cannot hold those of a whole model.
    fn time_on_device<T>(
        &self,
        f: impl Fn() -> Result<T>,
        result: impl Fn(&T) -> &D::Tensor,
    ) -> Result<Option<Duration>> {
        // One row waits for all, and costs little to move.
        let wait = |y: &T| -> Result<()> {
            let y = result(y);
            match self.device.slice_rows(y, 0..1) {
                Ok(row) => self.device.download(&row)?,
                Err(_) => self.device.download(y)?,
            };
            Ok(())
        };
        let timed = || -> Result<Duration> {
            let start = Instant::now();
            let y = f()?;
            wait(&y)?;
            let waited = start.elapsed();
            // Now that it is there, waiting again costs the move alone.
            let start = Instant::now();
            wait(&y)?;
            Ok(waited.saturating_sub(start.elapsed()))
        };
        match timed() {
            Ok(first) if first >= LONG => Ok(Some(first)),
            Ok(_) => timed().map(Some),
            Err(e) if e.is_unsupported() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// The same, while probing.
    fn probed<T>(
        &self,
        f: impl Fn() -> Result<T>,
        result: impl Fn(&T) -> &D::Tensor,
    ) -> Result<Option<Duration>> {
        if self.probing.get() { self.time_on_device(f, result) } else { Ok(None) }
    }

    /// Where parts of a fused operation are forced to the host: measures, if asked to, what fusing them is worth, and
    /// refuses the call, so that it is composed.
    fn refuse_forced<T>(
        &self,
        op: OpKind,
        parts: impl Iterator<Item = OpKind>,
        fused: impl Fn() -> Result<T>,
        apart: impl Fn() -> Result<T>,
        result: impl Fn(&T) -> &D::Tensor,
    ) -> Result<()> {
        let mut forced: Vec<OpKind> = parts.filter(|p| self.forced.contains(p)).collect();
        forced.sort();
        forced.dedup();
        let Some(first) = forced.first() else { return Ok(()) };
        let refused = crate::Error::unsupported(self.name(), op, format!("{first} is forced to the host"));
        if self.probing.get()
            && let Some(fused) = self.time_on_device(fused, &result)?
            && let Some(apart) = self.time_on_device(apart, &result)?
        {
            self.state.borrow_mut().fusions.push(Fusion { op, forced, apart, fused });
        }
        Err(refused)
    }

    fn pointwise(
        &self,
        op: OpKind,
        x: &D::Tensor,
        on_device: impl Fn(&D) -> Result<D::Tensor>,
        on_host: impl FnOnce(&H, &H::Tensor) -> Result<H::Tensor>,
    ) -> Result<D::Tensor> {
        self.run(
            op,
            smallvec![self.shape(x)],
            |r| flops::pointwise(op, r),
            on_device,
            |h, f| on_host(h, &f.down(x)?),
        )
    }

    fn move_record(&self, op: OpKind, start: Instant, shape: [usize; 2]) {
        let time = start.elapsed();
        let moved = (time, 4 * (shape[0] * shape[1]) as u64);
        let call = Call { op, parts: smallvec![Part { op, flop: 0 }], shapes: smallvec![] };
        self.push(call, start, time, Outcome { moved, ..Outcome::on_device(shape, None) });
    }
}

impl<D: Device, H: Device> Device for Traced<D, H> {
    type Tensor = D::Tensor;
    type Weight = W<D, H>;

    forward! { D.device: name memory shape on_host tap }

    fn enter(&self, module: fmt::Arguments<'_>) {
        self.device.enter(module);
        self.state.borrow_mut().modules.enter(module);
    }
    fn exit(&self) {
        self.device.exit();
        self.state.borrow_mut().modules.exit();
    }

    fn upload(&self, rows: usize, cols: usize, data: &[f32]) -> Result<D::Tensor> {
        let start = Instant::now();
        let y = self.device.upload(rows, cols, data)?;
        self.move_record(OpKind::Upload, start, [rows, cols]);
        Ok(y)
    }
    fn download(&self, x: &D::Tensor) -> Result<HostTensor> {
        let start = Instant::now();
        let y = self.device.download(x)?;
        self.move_record(OpKind::Download, start, [y.rows(), y.cols()]);
        Ok(y)
    }
    fn prepare(&self, source: &WeightSource) -> Result<Self::Weight> {
        let device = match self.device.prepare(source) {
            Err(e) if e.is_unsupported() && self.fallback == Fallback::RunOnHost => Err(e),
            Err(e) => return Err(e),
            packed => packed,
        };
        Ok(TracedWeight { dims: source.dims(), source: source.clone(), device, host: OnceCell::new() })
    }

    fn embed(&self, table: &Self::Weight, ids: &[u32], scale: f32) -> Result<D::Tensor> {
        self.run(
            OpKind::Embed,
            smallvec![[1, ids.len()]],
            |r| flops::pointwise(OpKind::Embed, r),
            |d| d.embed(table.device()?, ids, scale),
            |h, _| h.embed(self.host_weight(table)?, ids, scale),
        )
    }
    fn linear(&self, x: &D::Tensor, weight: &Self::Weight) -> Result<D::Tensor> {
        let [out, inputs] = weight.dims;
        self.run(
            OpKind::Linear,
            smallvec![self.shape(x), [out, inputs]],
            |[rows, _]| flops::linear(rows, inputs, out),
            |d| d.linear(x, weight.device()?),
            |h, f| h.linear(&f.down(x)?, self.host_weight(weight)?),
        )
    }
    fn layer_norm(&self, x: &D::Tensor, weight: &Self::Weight) -> Result<D::Tensor> {
        self.pointwise(
            OpKind::LayerNorm,
            x,
            |d| d.layer_norm(x, weight.device()?),
            |h, x| h.layer_norm(x, self.host_weight(weight)?),
        )
    }
    fn rms_norm(&self, x: &D::Tensor, weight: &Self::Weight) -> Result<D::Tensor> {
        self.pointwise(
            OpKind::RmsNorm,
            x,
            |d| d.rms_norm(x, weight.device()?),
            |h, x| h.rms_norm(x, self.host_weight(weight)?),
        )
    }
    fn rope(&self, x: &D::Tensor, positions: &[u32], head_dim: usize) -> Result<D::Tensor> {
        self.pointwise(
            OpKind::Rope,
            x,
            |d| d.rope(x, positions, head_dim),
            |h, x| h.rope(x, positions, head_dim),
        )
    }
    fn attention(
        &self,
        q: &D::Tensor,
        kv: &[KeyValue<'_, D::Tensor>],
        spec: &Attention<'_>,
    ) -> Result<D::Tensor> {
        let mut shapes: Shapes = smallvec![self.shape(q)];
        shapes.extend(kv.iter().flat_map(|p| [self.shape(p.k), self.shape(p.v)]));
        self.run(
            OpKind::Attention,
            shapes,
            |_| flops::attention(spec),
            |d| d.attention(q, kv, spec),
            |h, f| {
                let q = f.down(q)?;
                let kv: Vec<_> =
                    kv.iter().map(|p| Ok((f.down(p.k)?, f.down(p.v)?))).collect::<Result<_>>()?;
                let kv: Vec<_> = kv.iter().map(|(k, v)| KeyValue { k, v }).collect();
                h.attention(&q, &kv, spec)
            },
        )
    }
    fn gelu(&self, x: &D::Tensor) -> Result<D::Tensor> {
        self.pointwise(OpKind::Gelu, x, |d| d.gelu(x), |h, x| h.gelu(x))
    }
    fn silu(&self, x: &D::Tensor) -> Result<D::Tensor> {
        self.pointwise(OpKind::Silu, x, |d| d.silu(x), |h, x| h.silu(x))
    }
    fn geglu(&self, x: &D::Tensor) -> Result<D::Tensor> {
        self.pointwise(OpKind::Geglu, x, |d| d.geglu(x), |h, x| h.geglu(x))
    }
    fn add(&self, x: &D::Tensor, y: &D::Tensor) -> Result<D::Tensor> {
        self.run(
            OpKind::Add,
            smallvec![self.shape(x), self.shape(y)],
            |r| flops::pointwise(OpKind::Add, r),
            |d| d.add(x, y),
            |h, f| h.add(&f.down(x)?, &f.down(y)?),
        )
    }
    fn add_scaled(&self, x: &D::Tensor, y: &D::Tensor, scale: f32) -> Result<D::Tensor> {
        self.run(
            OpKind::AddScaled,
            smallvec![self.shape(x), self.shape(y)],
            |r| flops::pointwise(OpKind::AddScaled, r),
            |d| d.add_scaled(x, y, scale),
            |h, f| h.add_scaled(&f.down(x)?, &f.down(y)?, scale),
        )
    }
    fn concat_rows(&self, parts: &[&D::Tensor]) -> Result<D::Tensor> {
        self.run(
            OpKind::ConcatRows,
            parts.iter().map(|p| self.shape(p)).collect(),
            |_| 0,
            |d| d.concat_rows(parts),
            |h, f| {
                let parts = parts.iter().map(|p| f.down(p)).collect::<Result<Vec<_>>>()?;
                h.concat_rows(&parts.iter().collect::<Vec<_>>())
            },
        )
    }
    fn slice_rows(&self, x: &D::Tensor, range: Range<usize>) -> Result<D::Tensor> {
        let on_host = range.clone();
        self.pointwise(
            OpKind::SliceRows,
            x,
            |d| d.slice_rows(x, range.clone()),
            |h, x| h.slice_rows(x, on_host),
        )
    }
    fn slice_cols(&self, x: &D::Tensor, range: Range<usize>) -> Result<D::Tensor> {
        let on_host = range.clone();
        self.pointwise(
            OpKind::SliceCols,
            x,
            |d| d.slice_cols(x, range.clone()),
            |h, x| h.slice_cols(x, on_host),
        )
    }

    fn dense(&self, call: &Dense<'_, D::Tensor, Self::Weight>) -> Result<D::Tensor> {
        let inner = call.with_inner(|w| w.device())?;
        let (fused, apart) = (|| self.device.dense(&inner), || compose_dense(&self.device, &inner));
        self.refuse_forced(OpKind::Dense, call.parts(), fused, apart, |y| y)?;
        let device_time = self.probed(fused, |y| y)?;
        let start = Instant::now();
        let y = self.device.dense(&inner)?;
        let time = start.elapsed();
        let (x, weight, result) = (self.shape(call.x), call.weight.dims, self.shape(&y));
        let mut shapes: Shapes = smallvec![x, weight];
        shapes.extend(call.residual.map(|r| self.shape(r)));
        let record = Call { op: OpKind::Dense, parts: call.work(x, weight, result), shapes };
        self.push(record, start, time, Outcome::on_device(result, device_time));
        Ok(y)
    }

    fn qkv(&self, call: &Qkv<'_, D::Tensor, Self::Weight>) -> Result<[D::Tensor; 3]> {
        let inner = call.with_inner(|w| w.device())?;
        let (fused, apart) = (|| self.device.qkv(&inner), || compose_qkv(&self.device, &inner));
        // v is computed last, if there is an order.
        self.refuse_forced(OpKind::Qkv, call.parts(), fused, apart, |[_, _, v]| v)?;
        let device_time = self.probed(fused, |[_, _, v]| v)?;
        let start = Instant::now();
        let y = self.device.qkv(&inner)?;
        let time = start.elapsed();
        let (x, weight) = (self.shape(call.x), call.weight.dims);
        let record = Call { op: OpKind::Qkv, parts: call.work(x, weight), shapes: smallvec![x, weight] };
        self.push(record, start, time, Outcome::on_device([x[0], weight[0]], device_time));
        Ok(y)
    }
}

impl<D, H> TracedWeight<D, H> {
    fn device(&self) -> Result<&D> {
        self.device.as_ref().map_err(Clone::clone)
    }
}
