//! What people compute by mistake, on the host.

use half::bf16;
use pi0_device::{Attention, HostTensor, LinearPart, NormKind, TensorSource, WeightSource};

/// A wrong rotary embedding.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Rotation {
    /// As it should be; of rows whose position is before the first, too.
    Right,
    /// Neighbours `(2i, 2i + 1)` in place of `(i, i + head_dim / 2)`.
    Neighbours,
    /// The other way round.
    Backwards,
    /// Not at all.
    None,
    /// Periods up to 1,000,000 in place of 10,000, as other models have.
    LongPeriods,
    /// Frequencies of all but the first pair one too high: `2 (i + 1)` in place of `2 i`.
    NextFrequency,
}

impl Rotation {
    /// Rotates whole heads. Positions below 0 are written in two's complement.
    pub fn apply(self, mut x: HostTensor, positions: &[u32], dim: usize) -> HostTensor {
        let half = dim / 2;
        let base = if self == Rotation::LongPeriods { 1e6f32 } else { 1e4 };
        for (r, &position) in positions.iter().enumerate() {
            for head in x.row_mut(r).chunks_exact_mut(dim) {
                for i in 0..half {
                    let pair = if self == Rotation::NextFrequency { i + 1 } else { i };
                    let (mut sin, cos) =
                        (position as i32 as f32 / base.powf((2 * pair) as f32 / dim as f32)).sin_cos();
                    if self == Rotation::Backwards {
                        sin = -sin;
                    }
                    let (first, second) =
                        if self == Rotation::Neighbours { (2 * i, 2 * i + 1) } else { (i, i + half) };
                    let (a, b) = (head[first], head[second]);
                    if self != Rotation::None {
                        (head[first], head[second]) = (a * cos - b * sin, b * cos + a * sin);
                    }
                }
            }
        }
        x
    }
}

/// Attention whose logits, exponentials and weights are rounded to bf16.
pub fn rounded_attention(
    q: &HostTensor,
    kv: &[(HostTensor, HostTensor)],
    spec: &Attention<'_>,
) -> HostTensor {
    let round = |x: f32| bf16::from_f32(x).to_f32();
    let dim = spec.head_dim;
    let mut out = HostTensor::zeros([q.rows(), q.cols()]);
    for span in spec.spans {
        let keys: Vec<(usize, usize)> =
            span.keys.iter().flat_map(|k| k.rows.clone().map(|row| (k.part, row))).collect();
        for row in span.queries.clone() {
            for head in 0..spec.heads {
                let kv_cols = head / (spec.heads / spec.kv_heads) * dim;
                let query = &q.row(row)[head * dim..(head + 1) * dim];
                let dot = |k: &[f32]| query.iter().zip(k).map(|(a, b)| a * b).sum::<f32>();
                let logits: Vec<f32> = keys
                    .iter()
                    .map(|&(p, k)| round(dot(&kv[p].0.row(k)[kv_cols..kv_cols + dim]) * spec.scale))
                    .collect();
                let max = logits.iter().copied().fold(f32::NEG_INFINITY, f32::max);
                let exps: Vec<f32> = logits.iter().map(|l| (l - max).exp()).collect();
                let sum: f32 = exps.iter().sum();
                for (&(p, k), e) in keys.iter().zip(&exps) {
                    let weight = round(e / sum);
                    let value = &kv[p].1.row(k)[kv_cols..kv_cols + dim];
                    let to = &mut out.row_mut(row)[head * dim..(head + 1) * dim];
                    to.iter_mut().zip(value).for_each(|(o, v)| *o += weight * v);
                }
            }
        }
    }
    out
}

/// An adaptive norm with another eps: rows of `table` hold scale, shift and gate, and `rows` says which drives which.
pub fn adaptive_norm(mut x: HostTensor, table: &HostTensor, rows: &[u32], eps: f32) -> HostTensor {
    let width = x.cols();
    for (r, &picked) in rows.iter().enumerate() {
        let drive = table.row(picked as usize);
        let mean = x.row(r).iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / width as f64;
        let inverse = (1.0 / (mean + f64::from(eps)).sqrt()) as f32;
        for (i, y) in x.row_mut(r).iter_mut().enumerate() {
            *y = *y * inverse * (1.0 + drive[i]) + drive[width + i];
        }
    }
    x
}

fn map(x: &HostTensor, f: impl Fn(f32) -> f32) -> HostTensor {
    HostTensor::new(x.shape.clone(), x.data.iter().map(|&x| f(x)).collect())
}

fn silu(x: f32) -> f32 {
    x / (1.0 + (-x).exp())
}

fn tanh_gelu(x: f32) -> f32 {
    let inner = (2.0 / std::f32::consts::PI).sqrt() * (x + 0.044_715 * x * x * x);
    0.5 * x * (1.0 + inner.tanh())
}

/// `x / 2 (1 + erf(x / √2))`, erf by its series: differs from the tanh form by up to 5e-4.
fn exact_gelu(x: f32) -> f32 {
    let z = f64::from(x) / std::f64::consts::SQRT_2;
    let erf = if z.abs() > 4.0 {
        z.signum()
    } else {
        let (mut term, mut sum) = (z, z);
        for n in 1..80 {
            term *= -z * z / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    };
    (0.5 * f64::from(x) * (1.0 + erf)) as f32
}

/// `f(left) * right` of each row's halves.
fn gated(x: &HostTensor, f: fn(f32) -> f32) -> HostTensor {
    let n = x.cols() / 2;
    let rows = (0..x.rows()).flat_map(|r| x.row(r)[..n].iter().zip(&x.row(r)[n..]));
    let data = rows.map(|(&gate, &up)| f(gate) * up).collect();
    HostTensor::new([x.rows(), n], data)
}

/// The exact GELU for the tanh form.
pub fn gelu_exact(x: &HostTensor) -> HostTensor {
    map(x, exact_gelu)
}

/// SiLU for GELU or for SiLU's place.
pub fn silu_of(x: &HostTensor) -> HostTensor {
    map(x, silu)
}

/// GELU in SiLU's place.
pub fn gelu_of(x: &HostTensor) -> HostTensor {
    map(x, tanh_gelu)
}

/// No activation.
pub fn identity(x: &HostTensor) -> HostTensor {
    x.clone()
}

/// `silu(gate) * up`.
pub fn gate_silu(x: &HostTensor) -> HostTensor {
    gated(x, silu)
}

/// `gelu(gate) * up` with the exact GELU.
pub fn gate_exact(x: &HostTensor) -> HostTensor {
    gated(x, exact_gelu)
}

fn changed(t: &TensorSource, data: &[f32]) -> TensorSource {
    // The sizes are those of `t`, so there is nothing to refuse.
    TensorSource::from_f32(t.name.clone(), t.shape.clone(), data).unwrap_or_else(|_| t.clone())
}

fn parts(w: &mut WeightSource) -> &mut [LinearPart] {
    match w {
        WeightSource::Linear { parts, .. } => parts,
        _ => &mut [],
    }
}

/// The part of a linear weight whose tensor's name contains `name` is read in the wrong order: for a square matrix, its
/// transpose.
pub fn transposed(name: String) -> impl Fn(&mut WeightSource) {
    move |w| {
        for part in parts(w).iter_mut().filter(|p| p.weight.name.contains(&name)) {
            let [out, inputs] = [part.weight.rows(), part.weight.cols()];
            let data = part.weight.to_f32();
            let data: Vec<f32> =
                (0..out).flat_map(|o| (0..inputs).map(move |i| i * out + o)).map(|at| data[at]).collect();
            part.weight = changed(&part.weight, &data);
        }
    }
}

/// The part of a linear weight whose tensor's name contains `name` has no bias.
pub fn without_bias(name: String) -> impl Fn(&mut WeightSource) {
    move |w| {
        parts(w).iter_mut().filter(|p| p.weight.name.contains(&name)).for_each(|p| p.bias = None);
    }
}

/// Two parts of a linear weight change places.
pub fn swapped(a: usize, b: usize) -> impl Fn(&mut WeightSource) {
    move |w| {
        let parts = parts(w);
        // Only where the places fit.
        if parts.len() > a.max(b) && parts[a].outputs() == parts[b].outputs() {
            parts.swap(a, b);
        }
    }
}

/// Both halves of the columns of `action_time_mlp_in` change places: time before action.
pub fn other_half(w: &mut WeightSource) {
    for part in parts(w) {
        if let Some(columns) = &part.columns {
            let width = columns.len();
            part.columns = Some(if columns.start == 0 { width..2 * width } else { 0..width });
        }
    }
}

/// A norm scales by its weight less this; RMS norms scale by `1 + w` in Gemma and by `w` elsewhere.
pub fn norm_less_one(w: &mut WeightSource) {
    if let WeightSource::Norm { kind: NormKind::Rms, weight, .. } = w {
        let data: Vec<f32> = weight.to_f32().into_iter().map(|w| w - 1.0).collect();
        *weight = changed(weight, &data);
    }
}

/// A norm's epsilon is 1e-5.
pub fn norm_eps(w: &mut WeightSource) {
    if let WeightSource::Norm { eps, .. } = w {
        *eps = 1e-5;
    }
}
