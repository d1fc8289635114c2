//! A wrapper that records what ran where, and runs on a host device what the device lacks, when asked.
//!
//! Coverage, fallbacks and roadmaps are folds over these records; nothing else knows what a device supports.

mod modules;
mod probe;
mod tape;

use std::cell::{Cell, OnceCell, RefCell};
use std::fmt;
use std::ops::Range;
use std::time::{Duration, Instant};

use crate::device::{compose_dense, compose_qkv};
use crate::parts::Form;
use crate::record::{Fusion, Place, Record};
use crate::{
    Attention, Dense, Device, Error, HostTensor, KeyValue, Largest, Modulation, OpKind, Qkv, Result,
    WeightSource, flops, forward,
};
use tape::{Extra, Outcome, Tape};

/// What to do with an operation that the device refuses as `Unsupported`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Fallback {
    /// Return the error: a slow path must not hide. The default for releases and benchmarks.
    #[default]
    Fail,
    /// Download the operands, run on the host device, upload the result, and record all of it.
    RunOnHost,
}

/// Runs on `D`, records every call, and may fall back to `H`.
pub struct Traced<D: Device, H: Device> {
    device: D,
    host: H,
    fallback: Fallback,
    forced: Vec<OpKind>,
    probing: Cell<bool>,
    tape: RefCell<Tape>,
    fusions: RefCell<Vec<Fusion>>,
}

/// A weight on either side.
pub struct TracedWeight<D, H> {
    device: Result<D>,
    /// Of the source.
    dims: [usize; 2],
    /// Apart, so that a call on the device meets nothing but what it needs.
    host: Box<HostWeight<H>>,
}

/// Packed only when a fallback needs it.
struct HostWeight<H> {
    source: WeightSource,
    packed: OnceCell<H>,
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
        let (forced, probing, fusions) = Default::default();
        Self { device, host, fallback, forced, probing, tape: RefCell::new(Tape::new()), fusions }
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

    /// The records since the last call. What an inference needs to record is kept, so that the next one need not ask
    /// for memory.
    pub fn take(&self) -> Vec<Record> {
        self.tape.borrow_mut().take()
    }

    /// The fused calls that were composed, while [probing](Self::probe), since the last call.
    pub fn take_fusions(&self) -> Vec<Fusion> {
        self.fusions.take()
    }

    /// The traced device.
    pub fn device(&self) -> &D {
        &self.device
    }

    fn host_weight<'w>(&self, w: &'w W<D, H>) -> Result<&'w H::Weight> {
        let HostWeight { source, packed } = &*w.host;
        if packed.get().is_none() {
            let _ = packed.set(self.host.prepare(source)?);
        }
        Ok(packed.get().expect("set above"))
    }

    /// Runs a base operation on the device, or on the host if it must and may.
    fn run(
        &self,
        form: Form,
        operands: impl IntoIterator<Item = [usize; 2]>,
        on_device: impl Fn(&D) -> Result<D::Tensor>,
        on_host: impl FnOnce(&H, &mut Ferry<'_, D, H>) -> Result<H::Tensor>,
    ) -> Result<D::Tensor> {
        let op = form.op();
        let device_time = self.probed(|| on_device(&self.device), |y| y)?;
        let forced = self.forced.contains(&op);
        if !forced {
            let start = Instant::now();
            match on_device(&self.device) {
                Err(e) if e.is_unsupported() && self.fallback == Fallback::RunOnHost => {}
                Err(e) => return Err(e),
                Ok(y) => {
                    let (end, result) = (Instant::now(), self.device.shape(&y));
                    let (place, extra) = match self.device.on_host(op) {
                        // By design: the result was uploaded, in a part of the time that only the device knows.
                        true => {
                            let transfer_bytes = 4 * (result[0] * result[1]) as u64;
                            (Place::Host, Some(Extra { transfer_bytes, ..Extra::default() }))
                        }
                        false => (Place::Device, timed_apart(device_time)),
                    };
                    self.record(form, operands, Outcome { start, end, result, place }, extra);
                    return Ok(y);
                }
            }
        }
        let start = Instant::now();
        let mut ferry = Ferry { traced: self, time: Duration::ZERO, bytes: 0 };
        let y = on_host(&self.host, &mut ferry)?;
        let y = ferry.up(&y)?;
        let extra = Extra { transfer_time: ferry.time, transfer_bytes: ferry.bytes, device_time };
        let (end, result) = (Instant::now(), self.device.shape(&y));
        let place = if forced { Place::Forced } else { Place::Host };
        self.record(form, operands, Outcome { start, end, result, place }, Some(extra));
        Ok(y)
    }

    fn record(
        &self,
        form: Form,
        operands: impl IntoIterator<Item = [usize; 2]>,
        outcome: Outcome,
        extra: Option<Extra>,
    ) {
        let mut tape = self.tape.borrow_mut();
        operands.into_iter().for_each(|shape| tape.operand(shape));
        tape.push(form, outcome, extra);
    }

    fn pointwise(
        &self,
        op: OpKind,
        x: &D::Tensor,
        on_device: impl Fn(&D) -> Result<D::Tensor>,
        on_host: impl FnOnce(&H, &H::Tensor) -> Result<H::Tensor>,
    ) -> Result<D::Tensor> {
        self.run(Form::Base(op), [self.shape(x)], on_device, |h, f| on_host(h, &f.down(x)?))
    }

    fn move_record(&self, op: OpKind, start: Instant, result: [usize; 2]) {
        let end = Instant::now();
        let extra = Extra {
            transfer_time: end - start,
            transfer_bytes: 4 * (result[0] * result[1]) as u64,
            device_time: None,
        };
        let outcome = Outcome { start, end, result, place: Place::Device };
        self.tape.borrow_mut().push(Form::Base(op), outcome, Some(extra));
    }
}

/// What the record of a call on the device has beside the rest, if that was timed apart too.
fn timed_apart(device_time: Option<Duration>) -> Option<Extra> {
    device_time.map(|_| Extra { device_time, ..Extra::default() })
}

impl<D: Device, H: Device> Device for Traced<D, H> {
    type Tensor = D::Tensor;
    type Weight = W<D, H>;

    forward! { D.device: name memory preferred shape on_host tap }

    fn enter(&self, module: fmt::Arguments<'_>) {
        self.device.enter(module);
        self.tape.borrow_mut().enter(module);
    }
    fn exit(&self) {
        self.device.exit();
        self.tape.borrow_mut().exit();
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
    fn largest(&self, x: &D::Tensor) -> Result<Vec<Largest>> {
        let start = Instant::now();
        let found = self.device.largest(x)?;
        self.move_record(OpKind::Download, start, [found.len(), 2]);
        Ok(found)
    }
    fn prepare(&self, source: &WeightSource) -> Result<Self::Weight> {
        let device = match self.device.prepare(source) {
            Err(e) if e.is_unsupported() && self.fallback == Fallback::RunOnHost => Err(e),
            Err(e) => return Err(e),
            packed => packed,
        };
        let host = Box::new(HostWeight { source: source.unfetched(), packed: OnceCell::new() });
        Ok(TracedWeight { device, dims: source.dims(), host })
    }

    fn embed(&self, table: &Self::Weight, ids: &[u32], scale: f32) -> Result<D::Tensor> {
        self.run(
            Form::Base(OpKind::Embed),
            [[1, ids.len()]],
            |d| d.embed(table.device()?, ids, scale),
            |h, _| h.embed(self.host_weight(table)?, ids, scale),
        )
    }
    fn linear(&self, x: &D::Tensor, weight: &Self::Weight) -> Result<D::Tensor> {
        self.run(
            Form::Base(OpKind::Linear),
            [self.shape(x), weight.dims],
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
    fn ada_rms_norm(&self, x: &D::Tensor, by: &Modulation<'_, D::Tensor>) -> Result<D::Tensor> {
        self.run(
            Form::Base(OpKind::AdaRmsNorm),
            [self.shape(x), self.shape(by.table)],
            |d| d.ada_rms_norm(x, by),
            |h, f| h.ada_rms_norm(&f.down(x)?, &Modulation { table: &f.down(by.table)?, rows: by.rows }),
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
        let kv_shapes = kv.iter().flat_map(|p| [self.shape(p.k), self.shape(p.v)]);
        self.run(
            Form::Attention { flop: flops::attention(spec) },
            [self.shape(q)].into_iter().chain(kv_shapes),
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
            Form::Base(OpKind::Add),
            [self.shape(x), self.shape(y)],
            |d| d.add(x, y),
            |h, f| h.add(&f.down(x)?, &f.down(y)?),
        )
    }
    fn add_scaled(&self, x: &D::Tensor, y: &D::Tensor, scale: f32) -> Result<D::Tensor> {
        self.run(
            Form::Base(OpKind::AddScaled),
            [self.shape(x), self.shape(y)],
            |d| d.add_scaled(x, y, scale),
            |h, f| h.add_scaled(&f.down(x)?, &f.down(y)?, scale),
        )
    }
    fn gated_add(&self, x: &D::Tensor, y: &D::Tensor, by: &Modulation<'_, D::Tensor>) -> Result<D::Tensor> {
        self.run(
            Form::Base(OpKind::GatedAdd),
            [self.shape(x), self.shape(y), self.shape(by.table)],
            |d| d.gated_add(x, y, by),
            |h, f| {
                let by = Modulation { table: &f.down(by.table)?, rows: by.rows };
                h.gated_add(&f.down(x)?, &f.down(y)?, &by)
            },
        )
    }
    fn concat_rows(&self, parts: &[&D::Tensor]) -> Result<D::Tensor> {
        self.run(
            Form::Base(OpKind::ConcatRows),
            parts.iter().map(|p| self.shape(p)),
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
        if !self.forced.is_empty() {
            self.refuse_forced(OpKind::Dense, call.parts(), fused, apart, |y| y)?;
        }
        let device_time = self.probed(fused, |y| y)?;
        let start = Instant::now();
        let y = self.device.dense(&inner)?;
        let end = Instant::now();
        let outcome = Outcome { start, end, result: self.shape(&y), place: Place::Device };
        let (x, weight, extra) = (self.shape(call.x), call.weight.dims, timed_apart(device_time));
        let residual = call.residual.map(|r| self.shape(r));
        self.record(call.form(), [x, weight].into_iter().chain(residual), outcome, extra);
        Ok(y)
    }

    fn qkv(&self, call: &Qkv<'_, D::Tensor, Self::Weight>) -> Result<[D::Tensor; 3]> {
        let inner = call.with_inner(|w| w.device())?;
        let (fused, apart) = (|| self.device.qkv(&inner), || compose_qkv(&self.device, &inner));
        // v is computed last, if there is an order.
        if !self.forced.is_empty() {
            self.refuse_forced(OpKind::Qkv, call.parts(), fused, apart, |[_, _, v]| v)?;
        }
        let device_time = self.probed(fused, |[_, _, v]| v)?;
        let start = Instant::now();
        let y = self.device.qkv(&inner)?;
        let end = Instant::now();
        let (x, weight) = (self.shape(call.x), call.weight.dims);
        let outcome = Outcome { start, end, result: [x[0], weight[0]], place: Place::Device };
        self.record(call.form(), [x, weight], outcome, timed_apart(device_time));
        Ok(y)
    }

    /// Not probed: a second call would find its rows in their places.
    fn store_rows(&self, to: &mut D::Tensor, at: &[u32], x: &D::Tensor) -> Result<()> {
        if self.forced.contains(&OpKind::ConcatRows) {
            let op = OpKind::StoreRows;
            return Err(Error::unsupported(
                self.name(),
                op,
                format!("{} is forced to the host", OpKind::ConcatRows),
            ));
        }
        let start = Instant::now();
        self.device.store_rows(to, at, x)?;
        let end = Instant::now();
        let x = self.shape(x);
        self.record(Form::StoreRows, [x], Outcome { start, end, result: x, place: Place::Device }, None);
        Ok(())
    }
}

impl<D, H> TracedWeight<D, H> {
    fn device(&self) -> Result<&D> {
        self.device.as_ref().map_err(Clone::clone)
    }
}
