//! Norms, and the statistics of rows for products that do the rest.

use std::sync::Arc;

use pi0_device::{ADA_EPS, Error, Modulation, Norm, NormKind, OpKind, flops, operands};

use super::{Op, folded};
use crate::device::{State, Vulkan};
use crate::error::Result;
use crate::kernels::Kernel;
use crate::tape::Builder;
use crate::tensor::{Tensor, Value};
use crate::weight::{NormWeight, Weight};

/// The weight of a norm that fits `x`.
pub(crate) fn norm_weight<'a>(
    op: OpKind,
    x: &Tensor,
    weight: &'a Weight,
) -> pi0_device::Result<&'a NormWeight> {
    match weight {
        Weight::Norm(n) => operands::norm(op, [x.rows, x.cols], n.kind, n.width).map(|()| n),
        _ => Err(Error::shape(op, "the weight is not a norm's")),
    }
}

/// Rows whose statistics a workgroup finds.
const STATISTICS_ROWS: usize = 16;

/// A norm and what drives it.
#[derive(Clone, Copy)]
pub(crate) enum Before<'a> {
    Plain(&'a NormWeight),
    Ada(Modulation<'a, Tensor>),
}

impl<'a> Before<'a> {
    /// The norm that a call wants before its product.
    pub(crate) fn new(x: &Tensor, norm: Norm<'a, Tensor, Weight>) -> pi0_device::Result<Self> {
        match norm {
            Norm::Layer(w) | Norm::Rms(w) => norm_weight(norm.op(), x, w).map(Before::Plain),
            Norm::Ada(by) => {
                let table = [by.table.rows, by.table.cols];
                operands::modulation(OpKind::AdaRmsNorm, [x.rows, x.cols], table, by.rows)?;
                Ok(Before::Ada(by))
            }
        }
    }

    /// As the kernels number them.
    pub(crate) fn number(self) -> u32 {
        match self {
            Before::Plain(n) if n.kind == NormKind::Layer => 1,
            Before::Plain(_) => 2,
            Before::Ada(_) => 3,
        }
    }

    pub(crate) fn eps(self) -> f32 {
        match self {
            Before::Plain(n) => n.eps,
            Before::Ada(_) => ADA_EPS,
        }
    }
}

impl Vulkan {
    pub(crate) fn ada_norm(&self, s: &mut State, x: &Tensor, by: &Modulation<'_, Tensor>) -> Result<Tensor> {
        let rows = s.integers(by.rows)?;
        let mut key = s.key(Op::AdaNorm);
        s.tape.tensor(&mut key, x);
        s.tape.tensor(&mut key, by.table);
        s.tape.name(&mut key, &rows);
        let [y] = s.call(key, |s| {
            let y = self.value(s, x.rows, x.cols)?;
            if x.rows * x.cols > 0 {
                let pipeline = s.pipeline(Kernel::Norm, &[3, 0])?;
                let words = [x.rows, x.cols, x.offset, x.stride].map(|v| v as u32);
                Builder::new(&mut s.tape, pipeline, folded(x.rows))
                    .reads(x)?
                    .nothing()
                    .reads(by.table)?
                    .reads_value(&rows)?
                    .writes(&y)?
                    .push(&words)
                    .push(&[ADA_EPS.to_bits(), 0, by.table.offset as u32, by.table.stride as u32])
                    .shape([x.rows, x.cols, 0])
                    .flop(flops::pointwise(OpKind::AdaRmsNorm, [x.rows, x.cols]))
                    .launch();
            }
            Ok([y])
        })?;
        Ok(Tensor::whole(y, x.rows, x.cols))
    }

    pub(crate) fn norm(&self, op: OpKind, x: &Tensor, weight: &Weight) -> pi0_device::Result<Tensor> {
        let n = norm_weight(op, x, weight)?;
        let launch = |s: &mut State| -> Result<[Arc<Value>; 1]> {
            let y = self.value(s, x.rows, x.cols)?;
            if x.rows * x.cols > 0 {
                let pipeline = s.pipeline(Kernel::Norm, &[Before::Plain(n).number(), 0])?;
                let words = [x.rows, x.cols, x.offset, x.stride].map(|v| v as u32);
                Builder::new(&mut s.tape, pipeline, folded(x.rows))
                    .reads(x)?
                    .reads_region(&n.values)
                    .nothing()
                    .nothing()
                    .writes(&y)?
                    .push(&words)
                    .push(&[n.eps.to_bits(), n.width as u32, 0, 0])
                    .shape([x.rows, x.cols, 0])
                    .flop(flops::pointwise(op, [x.rows, x.cols]))
                    .launch();
            }
            Ok([y])
        };
        self.write(|s| {
            let mut key = s.key(Op::Norm);
            s.tape.tensor(&mut key, x);
            key.region(&n.values);
            let [y] = s.call(key, launch)?;
            Ok(Tensor::whole(y, x.rows, x.cols))
        })
    }

    /// Mean and 1 / deviation of each row, within a call; of an RMS norm the mean is 0.
    pub(crate) fn statistics(&self, s: &mut State, x: &Tensor, norm: Before<'_>) -> Result<Tensor> {
        let y = Tensor::whole(self.value(s, x.rows, 2)?, x.rows, 2);
        let pipeline = s.pipeline(Kernel::Norm, &[norm.number(), 1])?;
        let words = [x.rows, x.cols, x.offset, x.stride].map(|v| v as u32);
        Builder::new(&mut s.tape, pipeline, folded(x.rows.div_ceil(STATISTICS_ROWS)))
            .reads(x)?
            .nothing()
            .nothing()
            .nothing()
            .writes(&y.value)?
            .push(&words)
            .push(&[norm.eps().to_bits(), 0, 0, 0])
            .shape([x.rows, x.cols, 0])
            .flop(3 * (x.rows * x.cols) as u64)
            .launch();
        Ok(y)
    }
}
