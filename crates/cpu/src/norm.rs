//! Layer norm, RMS norm and adaptive RMS norm of one row.

use pi0_device::{ADA_EPS, NormKind};

use crate::math::{fma, per_isa, sum_by};

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
    pub(crate) fn norm_row(kind: NormKind, eps: f32, weight: &[f32], bias: &[f32], x: &[f32], out: &mut [f32]) = norm_body
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
    pub(crate) fn ada_norm_row(modulation: &[f32], x: &[f32], out: &mut [f32]) = ada_norm_body
}
