//! Floating-point operations of each op, as counted in reports: a multiply and an add are two.

use crate::{Attention, OpKind};

/// A linear layer of `[rows, inputs]` to `[rows, outputs]`.
pub fn linear(rows: usize, inputs: usize, outputs: usize) -> u64 {
    2 * rows as u64 * inputs as u64 * outputs as u64
}

/// Both products of attention; the softmax is small beside them and not counted.
pub fn attention(spec: &Attention<'_>) -> u64 {
    let pairs: u64 = spec.spans.iter().map(|s| (s.queries.len() * s.key_count()) as u64).sum();
    4 * pairs * (spec.heads * spec.head_dim) as u64
}

/// Operations on each value of a `[rows, cols]` result; 0 for those that only move data.
pub fn pointwise(op: OpKind, [rows, cols]: [usize; 2]) -> u64 {
    let each = match op {
        OpKind::LayerNorm => 7,
        OpKind::RmsNorm => 4,
        OpKind::AdaRmsNorm => 5,
        OpKind::Rope => 3,
        OpKind::Gelu => 9,
        OpKind::Silu => 4,
        OpKind::Geglu => 10,
        OpKind::Embed | OpKind::Add => 1,
        OpKind::AddScaled | OpKind::GatedAdd => 2,
        _ => 0,
    };
    each * rows as u64 * cols as u64
}
