//! The operations of [`pi0_device::Device`], each a check of its operands and a list of work for a kernel.

mod attention;
mod linear;
mod norm;
mod pointwise;
mod product;
mod rope;
mod shape;

pub(crate) use attention::{Narrowed, Plan, PlanKey};
pub(crate) use norm::Modulated;
pub(crate) use rope::Angles;

use std::ops::Range;
use std::sync::OnceLock;

use pi0_device::{
    Attention, Dense, Device, Error, HostTensor, KeyValue, Modulation, NormKind, OpKind, Qkv, Result,
    WeightSource,
};

use crate::device::Tensix;
use crate::error::Fault;
use crate::kernels::EltwiseOp;
use crate::layout::{Format, tiles};
use crate::tensor::{Tensor, Weight, WeightKind};

const NAME: &str = "tensix";

/// A fault as an error of operation `op`. What does not fit a core's memory is not supported; the rest is a
/// failure of the device.
fn failed(op: OpKind) -> impl Fn(Fault) -> Error {
    move |fault| match fault {
        Fault::L1Overflow { .. } => Error::unsupported(NAME, op, fault.to_string()),
        other => Error::Failed { device: NAME, what: format!("{op}: {other}") },
    }
}

fn wrong_weight(op: OpKind, weight: &Weight) -> Error {
    Error::shape(op, format!("{} is a weight of another operation", weight.name))
}

impl Device for Tensix {
    type Tensor = Tensor;
    type Weight = Weight;

    fn name(&self) -> &'static str {
        NAME
    }

    fn shape(&self, x: &Tensor) -> [usize; 2] {
        [x.rows, x.cols]
    }

    /// The token embedding table is far larger than what is ever read of it.
    fn on_host(&self, op: OpKind) -> bool {
        op == OpKind::Embed
    }

    fn upload(&self, rows: usize, cols: usize, data: &[f32]) -> Result<Tensor> {
        if data.len() != rows * cols || data.is_empty() {
            return Err(Error::shape(OpKind::Upload, format!("{} values for {rows}x{cols}", data.len())));
        }
        self.put(rows, cols, data).map_err(failed(OpKind::Upload))
    }

    fn download(&self, x: &Tensor) -> Result<HostTensor> {
        let x = &*self.plain(OpKind::Download, x)?;
        Ok(HostTensor::new([x.rows, x.cols], self.get(x).map_err(failed(OpKind::Download))?))
    }

    fn prepare(&self, source: &WeightSource) -> Result<Weight> {
        source.check()?;
        let kind = match source {
            WeightSource::Linear { parts, exact } => {
                WeightKind::Linear(self.pack_linear(parts, *exact, None)?)
            }
            WeightSource::Norm { kind, weight, bias, eps } => {
                let width = weight.cols();
                let mut scale = weight.to_f32();
                if *kind == NormKind::Rms {
                    scale.iter_mut().for_each(|w| *w += 1.0);
                }
                let bias = match (kind, bias) {
                    (NormKind::Rms, _) => None,
                    (NormKind::Layer, Some(b)) => Some(self.pack_row(&b.to_f32())?),
                    (NormKind::Layer, None) => Some(self.pack_row(&vec![0.0; width])?),
                };
                WeightKind::Norm { kind: *kind, width, eps: *eps, scale: self.pack_row(&scale)?, bias }
            }
            WeightSource::Embedding(_) => WeightKind::Embedding(source.clone()),
        };
        if !matches!(kind, WeightKind::Embedding(_)) {
            source.release();
        }
        let again = matches!(source, WeightSource::Linear { exact: false, .. }).then(|| source.unfetched());
        Ok(Weight { name: source.name().to_owned(), kind, source: again, padded: OnceLock::new() })
    }

    fn embed(&self, table: &Weight, ids: &[u32], scale: f32) -> Result<Tensor> {
        let WeightKind::Embedding(WeightSource::Embedding(source)) = &table.kind else {
            return Err(wrong_weight(OpKind::Embed, table));
        };
        let (rows, width) = (source.rows(), source.cols());
        if let Some(id) = ids.iter().find(|&&id| id as usize >= rows) {
            return Err(Error::shape(OpKind::Embed, format!("id {id} in a table of {rows} rows")));
        }
        if ids.is_empty() {
            return Err(Error::shape(OpKind::Embed, "no ids"));
        }
        let mut data = vec![0.0; ids.len() * width];
        for (row, &id) in data.chunks_exact_mut(width).zip(ids) {
            source.read(id as usize * width, row);
            row.iter_mut().for_each(|v| *v *= scale);
        }
        self.put(ids.len(), width, &data).map_err(failed(OpKind::Embed))
    }

    fn linear(&self, x: &Tensor, weight: &Weight) -> Result<Tensor> {
        self.linear_op(OpKind::Linear, x, weight, None, None)
    }

    fn layer_norm(&self, x: &Tensor, weight: &Weight) -> Result<Tensor> {
        self.norm(
            OpKind::LayerNorm,
            NormKind::Layer,
            &*self.plain(OpKind::LayerNorm, x)?,
            weight,
            Format::F32,
        )
    }

    fn rms_norm(&self, x: &Tensor, weight: &Weight) -> Result<Tensor> {
        self.norm(OpKind::RmsNorm, NormKind::Rms, &*self.plain(OpKind::RmsNorm, x)?, weight, Format::F32)
    }

    fn ada_rms_norm(&self, x: &Tensor, by: &Modulation<'_, Tensor>) -> Result<Tensor> {
        self.ada_rms_norm_op(OpKind::AdaRmsNorm, &*self.plain(OpKind::AdaRmsNorm, x)?, by, Format::F32)
    }

    fn rope(&self, x: &Tensor, positions: &[u32], head_dim: usize) -> Result<Tensor> {
        self.rope_op(&*self.plain(OpKind::Rope, x)?, positions, head_dim)
    }

    fn attention(&self, q: &Tensor, kv: &[KeyValue<'_, Tensor>], spec: &Attention<'_>) -> Result<Tensor> {
        self.attention_op(q, kv, spec)
    }

    fn gelu(&self, x: &Tensor) -> Result<Tensor> {
        self.unary(OpKind::Gelu, EltwiseOp::Gelu, &*self.plain(OpKind::Gelu, x)?)
    }

    fn silu(&self, x: &Tensor) -> Result<Tensor> {
        self.unary(OpKind::Silu, EltwiseOp::Silu, &*self.plain(OpKind::Silu, x)?)
    }

    fn geglu(&self, x: &Tensor) -> Result<Tensor> {
        self.geglu_op(&*self.plain(OpKind::Geglu, x)?)
    }

    fn add(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        let op = OpKind::Add;
        self.add_op(&*self.plain(op, x)?, &*self.plain(op, y)?)
    }

    fn add_scaled(&self, x: &Tensor, y: &Tensor, scale: f32) -> Result<Tensor> {
        let op = OpKind::AddScaled;
        self.add_scaled_op(&*self.plain(op, x)?, &*self.plain(op, y)?, scale)
    }

    fn gated_add(&self, x: &Tensor, y: &Tensor, by: &Modulation<'_, Tensor>) -> Result<Tensor> {
        let op = OpKind::GatedAdd;
        self.gated_add_op(op, &*self.plain(op, x)?, &*self.plain(op, y)?, by)
    }

    fn concat_rows(&self, parts: &[&Tensor]) -> Result<Tensor> {
        let plain = parts.iter().map(|x| self.plain(OpKind::ConcatRows, x)).collect::<Result<Vec<_>>>()?;
        self.concat_rows_op(&plain.iter().map(|x| &**x).collect::<Vec<_>>())
    }

    fn slice_rows(&self, x: &Tensor, range: Range<usize>) -> Result<Tensor> {
        self.slice_rows_op(x, range)
    }

    fn slice_cols(&self, x: &Tensor, range: Range<usize>) -> Result<Tensor> {
        self.slice_cols_op(x, range)
    }

    fn dense(&self, call: &Dense<'_, Tensor, Weight>) -> Result<Tensor> {
        self.dense_op(call)
    }

    fn qkv(&self, call: &Qkv<'_, Tensor, Weight>) -> Result<[Tensor; 3]> {
        self.qkv_op(call)
    }
}

impl Tensix {
    /// A vector as a row of tiles with 32 equal rows.
    fn pack_row(&self, data: &[f32]) -> Result<crate::dram::Region> {
        use crate::layout::{TILE, push_tile};
        let mut bytes = Vec::with_capacity(tiles(data.len()) * Format::F32.tile_bytes());
        for t in 0..tiles(data.len()) {
            push_tile(&mut bytes, Format::F32, |_, c| data.get(t * TILE + c).copied().unwrap_or(0.0));
        }
        self.region(&bytes, Format::F32).map_err(failed(OpKind::Prepare))
    }
}
