//! A wrapper that keeps every named intermediate, for golden tests and dumps.

use std::cell::RefCell;
use std::fmt;
use std::ops::Range;

use crate::{Attention, Device, HostTensor, KeyValue, MemoryMeter, OpKind, Result, WeightSource};

/// Runs on `D` and downloads whatever the model taps, under `module.module.name`.
///
/// It refuses the fused operations, so that the model's layers are composed from base operations and every
/// intermediate exists.
pub struct Tapped<D> {
    inner: D,
    state: RefCell<State>,
}

#[derive(Default)]
struct State {
    modules: Vec<String>,
    taps: Vec<(String, HostTensor)>,
    failed: Option<crate::Error>,
}

impl<D: Device> Tapped<D> {
    /// Listens to `inner`.
    pub fn new(inner: D) -> Self {
        Self { inner, state: RefCell::default() }
    }

    /// The taps since the last call, in the order they were made; or the first download that failed.
    pub fn take(&self) -> Result<Vec<(String, HostTensor)>> {
        let mut state = self.state.borrow_mut();
        let taps = std::mem::take(&mut state.taps);
        match state.failed.take() {
            Some(e) => Err(e),
            None => Ok(taps),
        }
    }
}

impl<D: Device> Device for Tapped<D> {
    type Tensor = D::Tensor;
    type Weight = D::Weight;

    fn tap(&self, name: &str, x: &D::Tensor) {
        let downloaded = self.inner.download(x);
        let mut state = self.state.borrow_mut();
        match downloaded {
            Ok(t) => {
                let path =
                    state.modules.iter().map(String::as_str).chain([name]).collect::<Vec<_>>().join(".");
                state.taps.push((path, t));
            }
            Err(e) => state.failed = state.failed.take().or(Some(e)),
        }
    }
    fn enter(&self, module: fmt::Arguments<'_>) {
        self.inner.enter(module);
        self.state.borrow_mut().modules.push(module.to_string());
    }
    fn exit(&self) {
        self.inner.exit();
        self.state.borrow_mut().modules.pop();
    }

    fn name(&self) -> &'static str {
        self.inner.name()
    }
    fn memory(&self) -> Option<MemoryMeter> {
        self.inner.memory()
    }
    fn shape(&self, x: &D::Tensor) -> [usize; 2] {
        self.inner.shape(x)
    }
    fn on_host(&self, op: OpKind) -> bool {
        self.inner.on_host(op)
    }
    fn upload(&self, rows: usize, cols: usize, data: &[f32]) -> Result<D::Tensor> {
        self.inner.upload(rows, cols, data)
    }
    fn download(&self, x: &D::Tensor) -> Result<HostTensor> {
        self.inner.download(x)
    }
    fn prepare(&self, source: &WeightSource) -> Result<D::Weight> {
        self.inner.prepare(source)
    }
    fn embed(&self, table: &D::Weight, ids: &[u32], scale: f32) -> Result<D::Tensor> {
        self.inner.embed(table, ids, scale)
    }
    fn linear(&self, x: &D::Tensor, weight: &D::Weight) -> Result<D::Tensor> {
        self.inner.linear(x, weight)
    }
    fn layer_norm(&self, x: &D::Tensor, weight: &D::Weight) -> Result<D::Tensor> {
        self.inner.layer_norm(x, weight)
    }
    fn rms_norm(&self, x: &D::Tensor, weight: &D::Weight) -> Result<D::Tensor> {
        self.inner.rms_norm(x, weight)
    }
    fn rope(&self, x: &D::Tensor, positions: &[u32], head_dim: usize) -> Result<D::Tensor> {
        self.inner.rope(x, positions, head_dim)
    }
    fn attention(
        &self,
        q: &D::Tensor,
        kv: &[KeyValue<'_, D::Tensor>],
        spec: &Attention<'_>,
    ) -> Result<D::Tensor> {
        self.inner.attention(q, kv, spec)
    }
    fn gelu(&self, x: &D::Tensor) -> Result<D::Tensor> {
        self.inner.gelu(x)
    }
    fn silu(&self, x: &D::Tensor) -> Result<D::Tensor> {
        self.inner.silu(x)
    }
    fn geglu(&self, x: &D::Tensor) -> Result<D::Tensor> {
        self.inner.geglu(x)
    }
    fn add(&self, x: &D::Tensor, y: &D::Tensor) -> Result<D::Tensor> {
        self.inner.add(x, y)
    }
    fn add_scaled(&self, x: &D::Tensor, y: &D::Tensor, scale: f32) -> Result<D::Tensor> {
        self.inner.add_scaled(x, y, scale)
    }
    fn concat_rows(&self, parts: &[&D::Tensor]) -> Result<D::Tensor> {
        self.inner.concat_rows(parts)
    }
    fn slice_rows(&self, x: &D::Tensor, range: Range<usize>) -> Result<D::Tensor> {
        self.inner.slice_rows(x, range)
    }
    fn slice_cols(&self, x: &D::Tensor, range: Range<usize>) -> Result<D::Tensor> {
        self.inner.slice_cols(x, range)
    }
}
