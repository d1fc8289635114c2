//! The base operations that a call stands for, and their work.

use crate::{Activation, Dense, OpKind, Qkv, flops};

/// A base operation inside a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Part {
    /// Which.
    pub op: OpKind,
    /// Its floating-point operations; see [`flops`].
    pub flop: u64,
}

/// What a call is: beside the shapes, all that its parts and their work depend on.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Form {
    /// A move, or a base operation other than attention.
    Base(OpKind),
    Attention {
        flop: u64,
    },
    Dense {
        norm: Option<OpKind>,
        activation: Option<Activation>,
        residual: bool,
        gated: bool,
    },
    Qkv {
        norm: OpKind,
        /// Width of q.
        queries: usize,
        rotated: bool,
    },
    /// Rows put in their places: what it saves is putting all of them together.
    StoreRows,
}

impl Form {
    pub(crate) fn op(self) -> OpKind {
        match self {
            Form::Base(op) => op,
            Form::Attention { .. } => OpKind::Attention,
            Form::Dense { .. } => OpKind::Dense,
            Form::Qkv { .. } => OpKind::Qkv,
            Form::StoreRows => OpKind::StoreRows,
        }
    }

    /// The base operations that this call stands for, in order.
    fn ops(self) -> Vec<OpKind> {
        match self {
            Form::Base(_) | Form::Attention { .. } => vec![self.op()],
            Form::Dense { norm, activation, residual, gated } => {
                let activation = activation.map(|a| match a {
                    Activation::Gelu => OpKind::Gelu,
                    Activation::Silu => OpKind::Silu,
                    Activation::Geglu => OpKind::Geglu,
                });
                let add = if gated { OpKind::GatedAdd } else { OpKind::Add };
                let residual = residual.then_some(add);
                norm.into_iter().chain([OpKind::Linear]).chain(activation).chain(residual).collect()
            }
            Form::StoreRows => vec![OpKind::ConcatRows],
            Form::Qkv { norm, rotated, .. } => {
                let split = [norm, OpKind::Linear].into_iter().chain([OpKind::SliceCols; 3]);
                split.chain([OpKind::Rope; 2].into_iter().take(if rotated { 2 } else { 0 })).collect()
            }
        }
    }

    /// The same with their work, given the shapes of the operands (the first is `x`, that of a weight `[out, in]`) and
    /// of the result.
    pub(crate) fn parts(self, operands: &[[usize; 2]], result: [usize; 2]) -> Vec<Part> {
        let x = operands.first().copied().unwrap_or_default();
        let [out, inputs] = operands.get(1).copied().unwrap_or_default();
        // One rotation of q and one of k; their FLOP go by their widths.
        let mut rotated = match self {
            Form::Qkv { queries, .. } => [queries, out.saturating_sub(queries) / 2],
            _ => [result[1]; 2],
        }
        .into_iter();
        let mut flop = |op| match (self, op) {
            (Form::Attention { flop }, _) => flop,
            (_, OpKind::Linear) => flops::linear(x[0], inputs, out),
            (_, OpKind::Rope) => flops::pointwise(op, [x[0], rotated.next().unwrap_or(0)]),
            (_, OpKind::LayerNorm | OpKind::RmsNorm | OpKind::AdaRmsNorm) => flops::pointwise(op, x),
            _ => flops::pointwise(op, result),
        };
        self.ops().into_iter().map(|op| Part { op, flop: flop(op) }).collect()
    }
}

impl<T, W> Dense<'_, T, W> {
    pub(crate) fn form(&self) -> Form {
        Form::Dense {
            norm: self.norm.as_ref().map(|n| n.op()),
            activation: self.activation,
            residual: self.residual.is_some(),
            gated: self.gate.is_some(),
        }
    }

    /// The base operations that this call stands for, in order.
    pub fn parts(&self) -> Vec<OpKind> {
        self.form().ops()
    }
}

impl<T, W> Qkv<'_, T, W> {
    pub(crate) fn form(&self) -> Form {
        Form::Qkv {
            norm: self.norm.op(),
            queries: self.heads * self.head_dim,
            rotated: self.positions.is_some(),
        }
    }

    /// The base operations that this call stands for, in order.
    pub fn parts(&self) -> Vec<OpKind> {
        self.form().ops()
    }
}
