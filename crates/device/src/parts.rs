//! The base operations that a call stands for, and their work.

use smallvec::SmallVec;

use crate::{Activation, Dense, OpKind, Qkv, flops};

/// A base operation inside a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Which.
    pub op: OpKind,
    /// Its floating-point operations; see [`flops`].
    pub flop: u64,
}

/// The parts of one call: a slice, inline up to the seven of [`Qkv`].
pub type Parts = SmallVec<[Part; 7]>;

/// Shapes of the operands of one call: a slice, inline up to those of attention over three blocks of keys.
pub type Shapes = SmallVec<[[usize; 2]; 7]>;

impl<T, W> Dense<'_, T, W> {
    /// The base operations that this call stands for, in order.
    pub fn parts(&self) -> impl Iterator<Item = OpKind> + use<T, W> {
        let activation = self.activation.map(|a| match a {
            Activation::Gelu => OpKind::Gelu,
            Activation::Silu => OpKind::Silu,
            Activation::Geglu => OpKind::Geglu,
        });
        let norm = self.norm.as_ref().map(|n| n.op());
        let residual = self.residual.map(|_| OpKind::Add);
        norm.into_iter().chain([OpKind::Linear]).chain(activation).chain(residual)
    }

    /// The same with their work, given the shapes of `x`, of the weight and of the result.
    pub(crate) fn work(&self, x: [usize; 2], [out, inputs]: [usize; 2], result: [usize; 2]) -> Parts {
        let flop = |op| match op {
            OpKind::Linear => flops::linear(x[0], inputs, out),
            OpKind::LayerNorm | OpKind::RmsNorm => flops::pointwise(op, x),
            _ => flops::pointwise(op, result),
        };
        self.parts().map(|op| Part { op, flop: flop(op) }).collect()
    }
}

impl<T, W> Qkv<'_, T, W> {
    /// The base operations that this call stands for, in order.
    pub fn parts(&self) -> impl Iterator<Item = OpKind> + use<T, W> {
        let ropes = if self.positions.is_some() { 2 } else { 0 };
        [self.norm.op(), OpKind::Linear]
            .into_iter()
            .chain([OpKind::SliceCols; 3])
            .chain(std::iter::repeat_n(OpKind::Rope, ropes))
    }

    /// The same with their work, given the shapes of `x` and of the weight.
    pub(crate) fn work(&self, x: [usize; 2], [out, inputs]: [usize; 2]) -> Parts {
        // One rotation of q and one of k; their FLOP go by their widths.
        let mut heads = [self.heads, self.kv_heads].into_iter();
        let mut flop = |op| match op {
            OpKind::Linear => flops::linear(x[0], inputs, out),
            OpKind::Rope => flops::pointwise(op, [x[0], heads.next().unwrap_or(0) * self.head_dim]),
            _ => flops::pointwise(op, x),
        };
        self.parts().map(|op| Part { op, flop: flop(op) }).collect()
    }
}
