//! Layer norm, RMS norm and adaptive RMS norm of one row.

use pi0_device::{ADA_EPS, Modulation, NormKind};

use crate::Isa;
use crate::math::{fma, per_isa, sum_by};
use crate::tensor::Tensor;
use crate::weight::NormWeight;

/// A norm whose operands are checked.
#[derive(Clone, Copy)]
pub(crate) enum RowNorm<'a> {
    /// Of a weight of its own.
    Weighted(&'a NormWeight),
    /// Adaptive: each row of an activation has a row of modulations.
    Driven(Modulation<'a, Tensor>),
}

impl RowNorm<'_> {
    /// Normalizes `x`, row `i` of an activation.
    pub(crate) fn apply(&self, isa: Isa, i: usize, x: &[f32], out: &mut [f32]) {
        match self {
            Self::Weighted(n) => norm_row(isa, n.kind, n.eps, &n.weight, &n.bias, x, out),
            Self::Driven(by) => ada_norm_row(isa, by.table.row(by.rows[i] as usize), x, out),
        }
    }
}

#[inline(always)]
fn norm_body<const FMA: bool>(
    kind: NormKind,
    eps: f32,
    weight: &[f32],
    bias: &[f32],
    x: &[f32],
    out: &mut [f32],
) {
    let n = x.len() as f32;
    match kind {
        NormKind::Layer => {
            let mean = sum_by(x, |x| x) / n;
            let variance = sum_by(x, |x| (x - mean) * (x - mean)) / n;
            let inverse = 1.0 / (variance + eps).sqrt();
            for (((o, &x), &w), &b) in out.iter_mut().zip(x).zip(weight).zip(bias) {
                *o = fma::<FMA>((x - mean) * inverse, w, b);
            }
        }
        NormKind::Rms => {
            let inverse = 1.0 / (sum_by(x, |x| x * x) / n + eps).sqrt();
            for ((o, &x), &w) in out.iter_mut().zip(x).zip(weight) {
                *o = x * inverse * w;
            }
        }
    }
}

per_isa! {
    /// Normalizes a row; the weight of an RMS norm has its 1 added already.
    fn norm_row(kind: NormKind, eps: f32, weight: &[f32], bias: &[f32], x: &[f32], out: &mut [f32]) = norm_body
}

#[inline(always)]
fn ada_norm_body<const FMA: bool>(modulation: &[f32], x: &[f32], out: &mut [f32]) {
    let inverse = 1.0 / (sum_by(x, |x| x * x) / x.len() as f32 + ADA_EPS).sqrt();
    let (scale, rest) = modulation.split_at(x.len());
    for (((o, &x), &scale), &shift) in out.iter_mut().zip(x).zip(scale).zip(rest) {
        *o = fma::<FMA>(x * inverse, 1.0 + scale, shift);
    }
}

per_isa! {
    /// Normalizes a row by a row of modulations: scale, shift, gate.
    fn ada_norm_row(modulation: &[f32], x: &[f32], out: &mut [f32]) = ada_norm_body
}
