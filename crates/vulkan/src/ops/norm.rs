//! Norms, and the statistics of rows for products that do the rest.

use pi0_device::{Error, NormKind, OpKind, flops, operands};

use super::folded;
use crate::device::{State, Vulkan};
use crate::error::Result;
use crate::kernels::Kernel;
use crate::tape::Builder;
use crate::tensor::Tensor;
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

/// As the kernels number them.
pub(crate) fn number(kind: NormKind) -> u32 {
    match kind {
        NormKind::Layer => 1,
        NormKind::Rms => 2,
    }
}

impl Vulkan {
    pub(crate) fn norm(&self, op: OpKind, x: &Tensor, weight: &Weight) -> pi0_device::Result<Tensor> {
        let n = norm_weight(op, x, weight)?;
        self.write(|s| {
            let y = self.tensor(s, x.rows, x.cols)?;
            if x.rows * x.cols > 0 {
                let pipeline = s.pipeline(Kernel::Norm, &[number(n.kind), 0])?;
                let words = [x.rows, x.cols, x.offset, x.stride].map(|v| v as u32);
                Builder::new(&mut s.tape, pipeline, folded(x.rows))
                    .reads(x)?
                    .reads_region(&n.values)
                    .nothing()
                    .nothing()
                    .writes(&y.value)?
                    .push(&words)
                    .push(&[n.eps.to_bits(), n.width as u32, 0, 0])
                    .flop(flops::pointwise(op, [x.rows, x.cols]))
                    .launch();
            }
            Ok(y)
        })
    }

    /// Mean and 1 / deviation of each row; of an RMS norm the mean is 0.
    pub(crate) fn statistics(&self, s: &mut State, x: &Tensor, number: u32, eps: f32) -> Result<Tensor> {
        let y = self.tensor(s, x.rows, 2)?;
        let pipeline = s.pipeline(Kernel::Norm, &[number, 1])?;
        let words = [x.rows, x.cols, x.offset, x.stride].map(|v| v as u32);
        Builder::new(&mut s.tape, pipeline, folded(x.rows))
            .reads(x)?
            .nothing()
            .nothing()
            .nothing()
            .writes(&y.value)?
            .push(&words)
            .push(&[eps.to_bits(), 0, 0, 0])
            .flop(3 * (x.rows * x.cols) as u64)
            .launch();
        Ok(y)
    }
}
