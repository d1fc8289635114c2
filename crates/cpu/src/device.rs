//! [`Cpu`], the device.

use std::fmt;
use std::ops::Range;
use std::sync::atomic::{AtomicBool, Ordering};

use pi0_device::{
    Activation, Attention, Dense, Device, Error, HostTensor, KeyValue, MemoryMeter, Modulation, Norm, OpKind,
    Preferred, Qkv, Result, WeightSource, operands,
};

use crate::caches;
use crate::epilogue::{Finish, Rotate, Target};
use crate::kernels::{Kernel, Left, Packed, pack};
use crate::math::{fma, gelu, per_isa, silu};
use crate::matmul::Engine;
use crate::memory::{BlockPool, Pooled, Shared};
use crate::norm::RowNorm;
use crate::rope::{Rope, Tables};
use crate::threads::{Threads, physical_cores};
use crate::weight::{self, Linear, NormWeight};
use crate::{CpuError, CpuOptions, Format, Isa, Tensor, Weight};

/// The host's processor as a device.
pub struct Cpu {
    engine: Engine,
    format: Format,
    angles: Tables,
    /// Whether attention multiplies in bf16: asked for, or some stored weight is.
    bf16_attention: AtomicBool,
}

/// Values that one thread should have to work on before another is worth waking.
const GRAIN: usize = 1 << 14;

/// Values of a result that is written past the caches.
const STREAM: usize = 4 << 20;

impl Cpu {
    /// Opens the device and starts its threads.
    pub fn new(options: CpuOptions) -> std::result::Result<Self, CpuError> {
        let isa = options.isa.unwrap_or_else(Isa::detect);
        if !isa.is_present() {
            return Err(CpuError::Isa { wanted: isa, present: Isa::available() });
        }
        let count = options.threads.unwrap_or_else(physical_cores).max(1);
        let threads = Threads::new(count).map_err(|source| CpuError::Threads { count, source })?;
        let engine = Engine {
            isa,
            threads,
            pool: BlockPool::new(MemoryMeter::default()),
            second_level: caches::second_level(),
            third_level: caches::third_level(),
        };
        let bf16 = matches!(options.format, Format::Bf16 | Format::Int8);
        Ok(Self { engine, format: options.format, angles: Tables::default(), bf16_attention: bf16.into() })
    }

    /// The instruction set in use.
    pub fn isa(&self) -> Isa {
        self.engine.isa
    }

    /// Threads in use.
    pub fn threads(&self) -> usize {
        self.engine.threads.count()
    }

    /// Number format of packed weights.
    pub fn format(&self) -> Format {
        self.format
    }

    /// Instruction set, threads and format in words.
    pub fn describe(&self) -> String {
        format!("{} with {} threads, weights in {}", self.isa(), self.threads(), self.format)
    }

    /// Calls `task` on each thread once, with the thread's number.
    pub(crate) fn on_each_thread(&self, task: &(dyn Fn(usize) + Sync)) {
        // Threads wait for each other, so that none takes two tasks.
        let barrier = std::sync::Barrier::new(self.threads());
        self.engine.threads.run(self.threads(), &|i| {
            barrier.wait();
            task(i);
        });
    }

    /// Calls `task` for each of `0..count` on all threads.
    pub(crate) fn in_parallel(&self, count: usize, task: &(dyn Fn(usize) + Sync)) {
        self.engine.threads.run(count, task);
    }

    /// Memory for `[rows, cols]`; its contents are arbitrary.
    fn block(&self, rows: usize, cols: usize) -> Pooled {
        self.engine.pool.take(rows * cols * size_of::<f32>())
    }

    /// A new tensor whose row `i` is written by `row(i, out)`, on as many threads as it is worth.
    fn rows(&self, rows: usize, cols: usize, row: impl Fn(usize, &mut [f32]) + Sync) -> Tensor {
        let block = self.block(rows, cols);
        let out = Shared::new(block.as_ptr().cast::<f32>());
        self.engine.threads.split(rows, GRAIN / cols.max(1) + 1, |range| {
            for i in range {
                // SAFETY: the block holds `rows` rows, and each has one thread.
                row(i, unsafe { std::slice::from_raw_parts_mut(out.get().add(i * cols), cols) });
            }
        });
        Tensor::new(block, rows, cols)
    }

    /// A new tensor from each row of `x` alone.
    fn map(&self, x: &Tensor, f: impl Fn(&[f32], &mut [f32]) + Sync) -> Tensor {
        self.rows(x.rows(), x.cols(), |i, out| f(x.row(i), out))
    }

    fn norm(&self, x: &Tensor, norm: Norm<'_, Tensor, Weight>) -> Result<Tensor> {
        let (norm, isa) = (row_norm(x, norm)?, self.isa());
        Ok(self.rows(x.rows(), x.cols(), |i, out| norm.apply(isa, i, x.row(i), out)))
    }

    /// A multiplication into one tensor, of a call whose operands are checked.
    fn multiply(
        &self,
        call: &Dense<'_, Tensor, Weight>,
        norm: Option<RowNorm<'_>>,
        weight: &Linear,
    ) -> Tensor {
        let Dense { x, activation, residual, gate, .. } = *call;
        let width = if activation == Some(Activation::Geglu) { weight.outputs / 2 } else { weight.outputs };
        let block = self.block(x.rows(), width);
        let target = Target { columns: (0, width), out: Shared::new(block.as_ptr().cast()) };
        self.engine.matmul(
            x,
            norm,
            weight,
            &Finish {
                activation,
                residual,
                gate,
                targets: &[target],
                streamed: x.rows() * width > STREAM,
                rotate: None,
            },
        );
        Tensor::new(block, x.rows(), width)
    }

    fn unsupported(&self, op: OpKind, why: &str) -> Error {
        Error::unsupported(self.name(), op, why)
    }
}

impl fmt::Debug for Cpu {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Cpu({})", self.describe())
    }
}

fn linear_weight<'a>(op: OpKind, x: &Tensor, weight: &'a Weight) -> Result<&'a Linear> {
    match weight {
        Weight::Linear(w) => {
            operands::linear(op, [x.rows(), x.cols()], w.inputs)?;
            w.ready().map(|()| w)
        }
        _ => Err(Error::shape(op, "the weight is not a linear layer's")),
    }
}

fn norm_weight<'a>(op: OpKind, x: &Tensor, weight: &'a Weight) -> Result<&'a NormWeight> {
    match weight {
        Weight::Norm(n) => operands::norm(op, [x.rows(), x.cols()], n.kind, n.weight.len()).map(|()| n),
        _ => Err(Error::shape(op, "the weight is not a norm's")),
    }
}

/// A norm of `x`, its operands checked.
fn row_norm<'a>(x: &Tensor, norm: Norm<'a, Tensor, Weight>) -> Result<RowNorm<'a>> {
    let op = norm.op();
    match norm {
        Norm::Layer(weight) | Norm::Rms(weight) => norm_weight(op, x, weight).map(RowNorm::Weighted),
        Norm::Ada(by) => {
            operands::modulation(op, [x.rows(), x.cols()], [by.table.rows(), by.table.cols()], by.rows)?;
            Ok(RowNorm::Driven(by))
        }
    }
}

#[inline(always)]
fn activate_body<const FMA: bool>(kind: Activation, x: &[f32], out: &mut [f32]) {
    match kind {
        Activation::Gelu => out.iter_mut().zip(x).for_each(|(o, &x)| *o = gelu::<FMA>(x)),
        Activation::Silu => out.iter_mut().zip(x).for_each(|(o, &x)| *o = silu::<FMA>(x)),
        Activation::Geglu => {
            let (gate, up) = x.split_at(out.len());
            out.iter_mut().zip(gate).zip(up).for_each(|((o, &g), &u)| *o = gelu::<FMA>(g) * u);
        }
    }
}

#[inline(always)]
fn add_scaled_body<const FMA: bool>(x: &[f32], y: &[f32], scale: f32, out: &mut [f32]) {
    out.iter_mut().zip(x).zip(y).for_each(|((o, &x), &y)| *o = fma::<FMA>(scale, y, x));
}

#[inline(always)]
fn gated_add_body<const FMA: bool>(x: &[f32], y: &[f32], gate: &[f32], out: &mut [f32]) {
    for (((o, &x), &y), &g) in out.iter_mut().zip(x).zip(y).zip(gate) {
        *o = fma::<FMA>(g, y, x);
    }
}

per_isa! {
    /// The same bits as `add_scaled` with this scale: a robot without gates does not feel a neighbour that has some.
    fn gated_add(x: &[f32], y: &[f32], gate: &[f32], out: &mut [f32]) = gated_add_body
}
per_isa! {
    fn activate(kind: Activation, x: &[f32], out: &mut [f32]) = activate_body
}
per_isa! {
    fn add_scaled(x: &[f32], y: &[f32], scale: f32, out: &mut [f32]) = add_scaled_body
}

impl Device for Cpu {
    type Tensor = Tensor;
    type Weight = Weight;

    fn name(&self) -> &'static str {
        "cpu"
    }

    /// Packed weights and the pool's blocks, without each thread's scratch memory and the mapped checkpoint, which
    /// embeddings are read from.
    fn memory(&self) -> Option<MemoryMeter> {
        Some(self.engine.pool.meter().clone())
    }

    fn shape(&self, x: &Tensor) -> [usize; 2] {
        [x.rows(), x.cols()]
    }

    fn upload(&self, rows: usize, cols: usize, data: &[f32]) -> Result<Tensor> {
        operands::upload([rows, cols], data.len())?;
        Ok(self.rows(rows, cols, |i, out| out.copy_from_slice(&data[i * cols..(i + 1) * cols])))
    }

    fn download(&self, x: &Tensor) -> Result<HostTensor> {
        let data = (0..x.rows()).flat_map(|i| x.row(i).iter().copied()).collect();
        Ok(HostTensor::new([x.rows(), x.cols()], data))
    }

    fn prepare(&self, source: &WeightSource) -> Result<Weight> {
        source.check_shapes()?;
        let meter = self.engine.pool.meter();
        let weight = weight::pack(source, self.format, self.isa(), &self.engine.threads, meter)?;
        if matches!(&weight, Weight::Linear(l) if l.kernel.packed != Packed::F32) {
            self.bf16_attention.store(true, Ordering::Relaxed);
        }
        Ok(weight)
    }

    fn preferred(&self) -> Preferred {
        let round = pack::rounding(self.isa());
        Preferred {
            columns: true,
            layers: (self.format == Format::Bf16).then_some(round),
            table: matches!(self.format, Format::Bf16 | Format::Int8).then_some(round),
            pieces: self.format != Format::Int8,
        }
    }

    fn embed(&self, table: &Weight, ids: &[u32], scale: f32) -> Result<Tensor> {
        let Weight::Embedding { table, .. } = table else {
            return Err(Error::shape(OpKind::Embed, "the weight is not a table"));
        };
        operands::embed(ids, table.rows())?;
        let cols = table.cols();
        Ok(self.rows(ids.len(), cols, |i, out| {
            table.read(ids[i] as usize * cols, out);
            out.iter_mut().for_each(|x| *x *= scale);
        }))
    }

    fn linear(&self, x: &Tensor, weight: &Weight) -> Result<Tensor> {
        let linear = linear_weight(OpKind::Linear, x, weight)?;
        Ok(self.multiply(&Dense::new(x, weight), None, linear))
    }

    fn layer_norm(&self, x: &Tensor, weight: &Weight) -> Result<Tensor> {
        self.norm(x, Norm::Layer(weight))
    }

    fn rms_norm(&self, x: &Tensor, weight: &Weight) -> Result<Tensor> {
        self.norm(x, Norm::Rms(weight))
    }

    fn ada_rms_norm(&self, x: &Tensor, by: &Modulation<'_, Tensor>) -> Result<Tensor> {
        self.norm(x, Norm::Ada(*by))
    }

    fn rope(&self, x: &Tensor, positions: &[u32], head_dim: usize) -> Result<Tensor> {
        operands::rope(self.shape(x), positions, head_dim)?;
        let rope = Rope::new(&self.angles, positions, head_dim);
        Ok(self.rows(x.rows(), x.cols(), |i, out| {
            out.copy_from_slice(x.row(i));
            rope.rotate(self.isa(), i, out);
        }))
    }

    fn attention(&self, q: &Tensor, kv: &[KeyValue<'_, Tensor>], spec: &Attention<'_>) -> Result<Tensor> {
        spec.check(|t| self.shape(t), q, kv)?;
        if crate::few::suits(spec) {
            return Ok(crate::few::attention(&self.engine, q, kv, spec));
        }
        let kernel = match Kernel::of(self.isa(), Packed::Bf16) {
            bf16 if bf16.left == Left::Bf16 && self.bf16_attention.load(Ordering::Relaxed) => bf16,
            _ => Kernel::of(self.isa(), Packed::F32),
        };
        Ok(crate::attention::attention(&self.engine, kernel, q, kv, spec))
    }

    fn gelu(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.map(x, |x, out| activate(self.isa(), Activation::Gelu, x, out)))
    }

    fn silu(&self, x: &Tensor) -> Result<Tensor> {
        Ok(self.map(x, |x, out| activate(self.isa(), Activation::Silu, x, out)))
    }

    fn geglu(&self, x: &Tensor) -> Result<Tensor> {
        operands::geglu(self.shape(x))?;
        let isa = self.isa();
        Ok(self.rows(x.rows(), x.cols() / 2, |i, out| activate(isa, Activation::Geglu, x.row(i), out)))
    }

    fn add(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        operands::add(self.shape(x), self.shape(y))?;
        Ok(self.rows(x.rows(), x.cols(), |i, out| {
            add_scaled(self.isa(), x.row(i), y.row(i % y.rows()), 1.0, out);
        }))
    }

    fn add_scaled(&self, x: &Tensor, y: &Tensor, scale: f32) -> Result<Tensor> {
        operands::add_scaled(self.shape(x), self.shape(y))?;
        let isa = self.isa();
        Ok(self.rows(x.rows(), x.cols(), |i, out| add_scaled(isa, x.row(i), y.row(i), scale, out)))
    }

    fn gated_add(&self, x: &Tensor, y: &Tensor, by: &Modulation<'_, Tensor>) -> Result<Tensor> {
        operands::gated_add(self.shape(x), self.shape(y), self.shape(by.table), by.rows)?;
        let (isa, cols) = (self.isa(), x.cols());
        Ok(self.rows(x.rows(), cols, |i, out| {
            gated_add(isa, x.row(i), y.row(i), &by.table.row(by.rows[i] as usize)[2 * cols..], out);
        }))
    }

    fn concat_rows(&self, parts: &[&Tensor]) -> Result<Tensor> {
        operands::concat_rows(parts.iter().map(|p| self.shape(p)))?;
        let cols = parts[0].cols();
        let rows = parts.iter().map(|p| p.rows()).sum();
        Ok(self.rows(rows, cols, |mut i, out| {
            for part in parts {
                if i < part.rows() {
                    return out.copy_from_slice(part.row(i));
                }
                i -= part.rows();
            }
        }))
    }

    fn store_rows(&self, to: &mut Tensor, at: &[u32], x: &Tensor) -> Result<()> {
        operands::store_rows(self.shape(to), at, self.shape(x))?;
        if to.values_mut().is_none() {
            *to = self.map(to, |row, out| out.copy_from_slice(row));
        }
        let (stride, cols) = (to.stride(), to.cols());
        let values = to.values_mut().expect("a tensor of its own");
        for (i, &at) in at.iter().enumerate() {
            values[at as usize * stride..][..cols].copy_from_slice(x.row(i));
        }
        Ok(())
    }

    fn slice_rows(&self, x: &Tensor, range: Range<usize>) -> Result<Tensor> {
        operands::slice_rows(self.shape(x), &range)?;
        Ok(x.view(range, 0..x.cols()))
    }

    fn slice_cols(&self, x: &Tensor, range: Range<usize>) -> Result<Tensor> {
        operands::slice_cols(self.shape(x), &range)?;
        Ok(x.view(0..x.rows(), range))
    }

    fn dense(&self, call: &Dense<'_, Tensor, Weight>) -> Result<Tensor> {
        let weight = linear_weight(OpKind::Dense, call.x, call.weight)?;
        let norm = call.norm.map(|norm| row_norm(call.x, norm)).transpose()?;
        let geglu = call.activation == Some(Activation::Geglu);
        if geglu && !weight.paired {
            return Err(self.unsupported(OpKind::Dense, "GEGLU of a weight that is not two equal parts"));
        }
        let width = if geglu { weight.outputs / 2 } else { weight.outputs };
        if let Some(r) = call.residual {
            let [rows, cols] = self.shape(r);
            if cols == width && rows > call.x.rows() {
                return Err(self.unsupported(OpKind::Dense, "a residual with more rows than the layer"));
            }
            if rows == 0 || cols != width || !call.x.rows().is_multiple_of(rows) {
                let what = format!("a residual {:?} of [{}, {width}]", self.shape(r), call.x.rows());
                return Err(Error::shape(OpKind::Dense, what));
            }
        }
        if let Some(by) = &call.gate {
            let Some(residual) = call.residual else {
                return Err(Error::shape(OpKind::Dense, "a gate without a residual"));
            };
            let branch = [call.x.rows(), width];
            operands::gated_add(self.shape(residual), branch, self.shape(by.table), by.rows)?;
        }
        Ok(self.multiply(call, norm, weight))
    }

    fn qkv(&self, call: &Qkv<'_, Tensor, Weight>) -> Result<[Tensor; 3]> {
        let weight = linear_weight(OpKind::Qkv, call.x, call.weight)?;
        let norm = row_norm(call.x, call.norm)?;
        let (q_end, kv) = (call.heads * call.head_dim, call.kv_heads * call.head_dim);
        let bounds = [(0, q_end), (q_end, q_end + kv), (q_end + kv, q_end + 2 * kv)];
        if weight.outputs != q_end + 2 * kv {
            let what = format!("{} outputs for q, k and v of {q_end}, {kv} and {kv}", weight.outputs);
            return Err(Error::shape(OpKind::Qkv, what));
        }
        let inside = |s: &weight::Strip| {
            bounds.iter().any(|b| b.0 <= s.column && s.column + s.count <= b.1) || s.count == 0
        };
        if !weight.strips.iter().all(inside) {
            return Err(self.unsupported(OpKind::Qkv, "heads that share a strip of columns"));
        }
        let rows = call.x.rows();
        let blocks = bounds.map(|(start, end)| self.block(rows, end - start));
        let mut targets = [Target { columns: (0, 0), out: Shared::new(std::ptr::null_mut()) }; 3];
        for ((target, columns), block) in targets.iter_mut().zip(bounds).zip(&blocks) {
            *target = Target { columns, out: Shared::new(block.as_ptr().cast()) };
        }
        if let Some(positions) = call.positions {
            operands::rope([rows, q_end], positions, call.head_dim)?;
        }
        // Heads of other widths do not end with a panel of columns; they are rotated afterwards.
        let with_panels = weight.whole_panels() && call.head_dim.is_multiple_of(weight.kernel.columns());
        let (at_once, afterwards) = if with_panels { (call.positions, None) } else { (None, call.positions) };
        let rope = at_once.map(|positions| Rope::new(&self.angles, positions, call.head_dim));
        let rotate = rope.as_ref().map(|rope| Rotate { rope, until: q_end + kv });
        self.engine.matmul(
            call.x,
            Some(norm),
            weight,
            &Finish {
                activation: None,
                residual: None,
                gate: None,
                targets: &targets,
                streamed: false,
                rotate,
            },
        );
        let [q, k, v] = blocks;
        let mut q = Tensor::new(q, rows, q_end);
        let mut k = Tensor::new(k, rows, kv);
        if let Some(positions) = afterwards {
            q = self.rope(&q, positions, call.head_dim)?;
            k = self.rope(&k, positions, call.head_dim)?;
        }
        Ok([q, k, Tensor::new(v, rows, kv)])
    }
}
