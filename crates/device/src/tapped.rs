//! A wrapper that keeps every named intermediate, for golden tests and dumps.

use std::cell::RefCell;
use std::fmt;

use crate::{Device, HostTensor, Result, forward};

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

    forward! { D.inner:
        name memory preferred shape on_host upload download prepare
        embed linear layer_norm rms_norm ada_rms_norm rope attention gelu silu geglu add add_scaled gated_add
        concat_rows slice_rows slice_cols
    }
}
