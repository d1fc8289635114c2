//! A borrowed device is a device: wrappers such as [`Tapped`](crate::Tapped) can listen to one that someone else owns.

use std::fmt;
use std::ops::Range;

use crate::{
    Attention, Dense, Device, Error, HostTensor, KeyValue, MemoryMeter, OpKind, Qkv, Result, WeightSource,
};

impl<D: Device> Device for &D {
    type Tensor = D::Tensor;
    type Weight = D::Weight;

    fn name(&self) -> &'static str {
        (**self).name()
    }
    fn memory(&self) -> Option<MemoryMeter> {
        (**self).memory()
    }
    fn shape(&self, x: &D::Tensor) -> [usize; 2] {
        (**self).shape(x)
    }
    fn on_host(&self, op: OpKind) -> bool {
        (**self).on_host(op)
    }
    fn upload(&self, rows: usize, cols: usize, data: &[f32]) -> Result<D::Tensor> {
        (**self).upload(rows, cols, data)
    }
    fn download(&self, x: &D::Tensor) -> Result<HostTensor> {
        (**self).download(x)
    }
    fn prepare(&self, source: &WeightSource) -> Result<D::Weight> {
        (**self).prepare(source)
    }
    fn embed(&self, table: &D::Weight, ids: &[u32], scale: f32) -> Result<D::Tensor> {
        (**self).embed(table, ids, scale)
    }
    fn linear(&self, x: &D::Tensor, weight: &D::Weight) -> Result<D::Tensor> {
        (**self).linear(x, weight)
    }
    fn layer_norm(&self, x: &D::Tensor, weight: &D::Weight) -> Result<D::Tensor> {
        (**self).layer_norm(x, weight)
    }
    fn rms_norm(&self, x: &D::Tensor, weight: &D::Weight) -> Result<D::Tensor> {
        (**self).rms_norm(x, weight)
    }
    fn rope(&self, x: &D::Tensor, positions: &[u32], head_dim: usize) -> Result<D::Tensor> {
        (**self).rope(x, positions, head_dim)
    }
    fn attention(
        &self,
        q: &D::Tensor,
        kv: &[KeyValue<'_, D::Tensor>],
        spec: &Attention<'_>,
    ) -> Result<D::Tensor> {
        (**self).attention(q, kv, spec)
    }
    fn gelu(&self, x: &D::Tensor) -> Result<D::Tensor> {
        (**self).gelu(x)
    }
    fn silu(&self, x: &D::Tensor) -> Result<D::Tensor> {
        (**self).silu(x)
    }
    fn geglu(&self, x: &D::Tensor) -> Result<D::Tensor> {
        (**self).geglu(x)
    }
    fn add(&self, x: &D::Tensor, y: &D::Tensor) -> Result<D::Tensor> {
        (**self).add(x, y)
    }
    fn add_scaled(&self, x: &D::Tensor, y: &D::Tensor, scale: f32) -> Result<D::Tensor> {
        (**self).add_scaled(x, y, scale)
    }
    fn concat_rows(&self, parts: &[&D::Tensor]) -> Result<D::Tensor> {
        (**self).concat_rows(parts)
    }
    fn slice_rows(&self, x: &D::Tensor, range: Range<usize>) -> Result<D::Tensor> {
        (**self).slice_rows(x, range)
    }
    fn slice_cols(&self, x: &D::Tensor, range: Range<usize>) -> Result<D::Tensor> {
        (**self).slice_cols(x, range)
    }
    fn dense(&self, call: &Dense<'_, D::Tensor, D::Weight>) -> Result<D::Tensor> {
        (**self).dense(call)
    }
    fn qkv(&self, call: &Qkv<'_, D::Tensor, D::Weight>) -> Result<[D::Tensor; 3]> {
        (**self).qkv(call)
    }
    fn tap(&self, name: &str, x: &D::Tensor) {
        (**self).tap(name, x);
    }
    fn enter(&self, module: fmt::Arguments<'_>) {
        (**self).enter(module);
    }
    fn exit(&self) {
        (**self).exit();
    }
    fn lacks(&self, op: OpKind) -> Error {
        (**self).lacks(op)
    }
}
