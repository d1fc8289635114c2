//! The living definition of every operation: plain loops over f32 values, sums in f64 so that the judge's own
//! rounding does not count. Slow, and meant to be read.

use std::ops::Range;
use std::sync::Arc;

use crate::{
    ADA_EPS, Attention, Device, Error, HostTensor, KeyValue, Modulation, NormKind, OpKind, Result,
    TensorSource, WeightSource, operands,
};

/// The scalar device.
#[derive(Debug, Clone, Copy, Default)]
pub struct Reference;

/// A weight unpacked to f32.
#[derive(Debug, Clone)]
pub enum ReferenceWeight {
    /// `[out, in]` and its bias.
    #[allow(missing_docs)]
    Linear { weight: HostTensor, bias: Vec<f32> },
    /// `[width]` each.
    #[allow(missing_docs)]
    Norm { kind: NormKind, weight: Vec<f32>, bias: Vec<f32>, eps: f32 },
    /// Read row by row when needed.
    Embedding(TensorSource),
}

type Tensor = Arc<HostTensor>;

fn matrix(rows: usize, cols: usize, data: Vec<f32>) -> Result<Tensor> {
    Ok(Arc::new(HostTensor::new([rows, cols], data)))
}

fn map(x: &HostTensor, f: impl Fn(f32) -> f32) -> Result<Tensor> {
    matrix(x.rows(), x.cols(), x.data.iter().map(|&x| f(x)).collect())
}

fn gelu(x: f32) -> f32 {
    let x = f64::from(x);
    let inner = (2.0 / std::f64::consts::PI).sqrt() * (x + 0.044715 * x * x * x);
    (0.5 * x * (1.0 + inner.tanh())) as f32
}

fn dot(a: &[f32], b: &[f32]) -> f64 {
    a.iter().zip(b).map(|(&a, &b)| f64::from(a) * f64::from(b)).sum()
}

impl Reference {
    fn norm(&self, op: OpKind, x: &HostTensor, w: &ReferenceWeight) -> Result<Tensor> {
        let ReferenceWeight::Norm { kind, weight, bias, eps } = w else {
            return Err(Error::shape(op, "the weight is not a norm's"));
        };
        operands::norm(op, [x.rows(), x.cols()], *kind, weight.len())?;
        let mut out = Vec::with_capacity(x.data.len());
        for r in 0..x.rows() {
            let row = x.row(r);
            let n = row.len() as f64;
            match kind {
                NormKind::Layer => {
                    let mean = row.iter().map(|&x| f64::from(x)).sum::<f64>() / n;
                    let var = row.iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
                    let inv = 1.0 / (var + f64::from(*eps)).sqrt();
                    let normed = row.iter().map(|&x| (f64::from(x) - mean) * inv);
                    out.extend(
                        normed
                            .zip(weight.iter().zip(bias))
                            .map(|(x, (&w, &b))| (x * f64::from(w) + f64::from(b)) as f32),
                    );
                }
                NormKind::Rms => {
                    let inv = 1.0 / (dot(row, row) / n + f64::from(*eps)).sqrt();
                    out.extend(
                        row.iter()
                            .zip(weight)
                            .map(|(&x, &w)| (f64::from(x) * inv * (1.0 + f64::from(w))) as f32),
                    );
                }
            }
        }
        matrix(x.rows(), x.cols(), out)
    }
}

impl Device for Reference {
    type Tensor = Tensor;
    type Weight = ReferenceWeight;

    fn name(&self) -> &'static str {
        "reference"
    }

    fn shape(&self, x: &Tensor) -> [usize; 2] {
        [x.rows(), x.cols()]
    }

    fn upload(&self, rows: usize, cols: usize, data: &[f32]) -> Result<Tensor> {
        operands::upload([rows, cols], data.len())?;
        matrix(rows, cols, data.to_vec())
    }

    fn download(&self, x: &Tensor) -> Result<HostTensor> {
        Ok((**x).clone())
    }

    fn prepare(&self, source: &WeightSource) -> Result<ReferenceWeight> {
        source.check()?;
        Ok(match source {
            WeightSource::Linear { parts, .. } => {
                let [out, cols] = source.dims();
                let mut weight = HostTensor::zeros([out, cols]);
                let mut bias = Vec::with_capacity(out);
                let mut row = 0;
                for p in parts {
                    for i in 0..p.outputs() {
                        p.read_row(i, weight.row_mut(row));
                        row += 1;
                    }
                    match &p.bias {
                        Some(b) => bias.extend(b.to_f32()),
                        None => bias.resize(row, 0.0),
                    }
                }
                ReferenceWeight::Linear { weight, bias }
            }
            WeightSource::Norm { kind, weight, bias, eps } => ReferenceWeight::Norm {
                kind: *kind,
                bias: bias.as_ref().map_or_else(|| vec![0.0; weight.cols()], TensorSource::to_f32),
                weight: weight.to_f32(),
                eps: *eps,
            },
            WeightSource::Embedding(table) => ReferenceWeight::Embedding(table.clone()),
        })
    }

    fn embed(&self, table: &ReferenceWeight, ids: &[u32], scale: f32) -> Result<Tensor> {
        let ReferenceWeight::Embedding(table) = table else {
            return Err(Error::shape(OpKind::Embed, "the weight is not a table"));
        };
        operands::embed(ids, table.rows())?;
        let mut out = vec![0.0; ids.len() * table.cols()];
        for (&id, row) in ids.iter().zip(out.chunks_exact_mut(table.cols())) {
            table.read(id as usize * table.cols(), row);
            row.iter_mut().for_each(|x| *x *= scale);
        }
        matrix(ids.len(), table.cols(), out)
    }

    fn linear(&self, x: &Tensor, weight: &ReferenceWeight) -> Result<Tensor> {
        let ReferenceWeight::Linear { weight, bias } = weight else {
            return Err(Error::shape(OpKind::Linear, "the weight is not a linear layer's"));
        };
        operands::linear(OpKind::Linear, self.shape(x), weight.cols())?;
        let mut out = Vec::with_capacity(x.rows() * weight.rows());
        for r in 0..x.rows() {
            for (o, &b) in bias.iter().enumerate() {
                out.push((dot(x.row(r), weight.row(o)) + f64::from(b)) as f32);
            }
        }
        matrix(x.rows(), weight.rows(), out)
    }

    fn layer_norm(&self, x: &Tensor, weight: &ReferenceWeight) -> Result<Tensor> {
        self.norm(OpKind::LayerNorm, x, weight)
    }

    fn rms_norm(&self, x: &Tensor, weight: &ReferenceWeight) -> Result<Tensor> {
        self.norm(OpKind::RmsNorm, x, weight)
    }

    fn ada_rms_norm(&self, x: &Tensor, by: &Modulation<'_, Tensor>) -> Result<Tensor> {
        operands::modulation(OpKind::AdaRmsNorm, self.shape(x), self.shape(by.table), by.rows)?;
        let width = x.cols();
        let mut out = Vec::with_capacity(x.data.len());
        for (r, &picked) in by.rows.iter().enumerate() {
            let (row, drive) = (x.row(r), by.table.row(picked as usize));
            let inv = 1.0 / (dot(row, row) / width as f64 + f64::from(ADA_EPS)).sqrt();
            let drive = drive[..width].iter().zip(&drive[width..2 * width]);
            out.extend(row.iter().zip(drive).map(|(&x, (&scale, &shift))| {
                (f64::from(x) * inv * (1.0 + f64::from(scale)) + f64::from(shift)) as f32
            }));
        }
        matrix(x.rows(), width, out)
    }

    fn rope(&self, x: &Tensor, positions: &[u32], head_dim: usize) -> Result<Tensor> {
        operands::rope(self.shape(x), positions, head_dim)?;
        let half = head_dim / 2;
        let mut out = (**x).clone();
        for (r, &position) in positions.iter().enumerate() {
            for head in out.row_mut(r).chunks_exact_mut(head_dim) {
                for i in 0..half {
                    // The references compute the frequency and the angle in f32.
                    let inv_freq = 1.0 / 10000f32.powf((2 * i) as f32 / head_dim as f32);
                    let (sin, cos) = (position as f32 * inv_freq).sin_cos();
                    let (a, b) = (head[i], head[i + half]);
                    head[i] = a * cos - b * sin;
                    head[i + half] = b * cos + a * sin;
                }
            }
        }
        Ok(Arc::new(out))
    }

    fn attention(&self, q: &Tensor, kv: &[KeyValue<'_, Tensor>], spec: &Attention<'_>) -> Result<Tensor> {
        spec.check(|t| self.shape(t), q, kv)?;
        let dim = spec.head_dim;
        let mut out = HostTensor::zeros([q.rows(), q.cols()]);
        for span in spec.spans {
            let keys: Vec<(usize, usize)> =
                span.keys.iter().flat_map(|k| k.rows.clone().map(|row| (k.part, row))).collect();
            for row in span.queries.clone() {
                for head in 0..spec.heads {
                    let cols = head * dim..(head + 1) * dim;
                    let kv_head = head / (spec.heads / spec.kv_heads);
                    let kv_cols = kv_head * dim..(kv_head + 1) * dim;
                    let query = &q.row(row)[cols.clone()];
                    let logits: Vec<f64> = keys
                        .iter()
                        .map(|&(p, k)| dot(query, &kv[p].k.row(k)[kv_cols.clone()]) * f64::from(spec.scale))
                        .collect();
                    let max = logits.iter().copied().fold(f64::NEG_INFINITY, f64::max);
                    let weights: Vec<f64> = logits.iter().map(|l| (l - max).exp()).collect();
                    let sum: f64 = weights.iter().sum();
                    for (i, o) in out.row_mut(row)[cols].iter_mut().enumerate() {
                        let column = kv_cols.start + i;
                        let value = |&(p, k): &(usize, usize)| f64::from(kv[p].v.row(k)[column]);
                        *o = (keys.iter().map(value).zip(&weights).map(|(v, w)| v * w).sum::<f64>() / sum)
                            as f32;
                    }
                }
            }
        }
        Ok(Arc::new(out))
    }

    fn gelu(&self, x: &Tensor) -> Result<Tensor> {
        map(x, gelu)
    }

    fn silu(&self, x: &Tensor) -> Result<Tensor> {
        map(x, |x| (f64::from(x) / (1.0 + (-f64::from(x)).exp())) as f32)
    }

    fn geglu(&self, x: &Tensor) -> Result<Tensor> {
        operands::geglu(self.shape(x))?;
        let n = x.cols() / 2;
        let halves = (0..x.rows()).flat_map(|r| x.row(r)[..n].iter().zip(&x.row(r)[n..]));
        matrix(x.rows(), n, halves.map(|(&gate, &up)| gelu(gate) * up).collect())
    }

    fn add(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        operands::add(self.shape(x), self.shape(y))?;
        let repeated = y.data.iter().cycle();
        matrix(x.rows(), x.cols(), x.data.iter().zip(repeated).map(|(x, y)| x + y).collect())
    }

    fn add_scaled(&self, x: &Tensor, y: &Tensor, scale: f32) -> Result<Tensor> {
        operands::add_scaled(self.shape(x), self.shape(y))?;
        matrix(x.rows(), x.cols(), x.data.iter().zip(&y.data).map(|(x, y)| x + scale * y).collect())
    }

    fn gated_add(&self, x: &Tensor, y: &Tensor, by: &Modulation<'_, Tensor>) -> Result<Tensor> {
        operands::gated_add(self.shape(x), self.shape(y), self.shape(by.table), by.rows)?;
        let width = x.cols();
        let gates = by.rows.iter().flat_map(|&row| &by.table.row(row as usize)[2 * width..]);
        matrix(x.rows(), width, x.data.iter().zip(&y.data).zip(gates).map(|((x, y), g)| x + g * y).collect())
    }

    fn concat_rows(&self, parts: &[&Tensor]) -> Result<Tensor> {
        operands::concat_rows(parts.iter().map(|p| self.shape(p)))?;
        matrix(
            parts.iter().map(|p| p.rows()).sum(),
            parts[0].cols(),
            parts.iter().flat_map(|p| p.data.iter().copied()).collect(),
        )
    }

    fn store_rows(&self, to: &mut Tensor, at: &[u32], x: &Tensor) -> Result<()> {
        operands::store_rows(self.shape(to), at, self.shape(x))?;
        let cols = x.cols();
        let to = Arc::make_mut(to);
        for (i, &at) in at.iter().enumerate() {
            to.data[at as usize * cols..][..cols].copy_from_slice(x.row(i));
        }
        Ok(())
    }

    fn slice_rows(&self, x: &Tensor, range: Range<usize>) -> Result<Tensor> {
        operands::slice_rows(self.shape(x), &range)?;
        let cols = x.cols();
        matrix(range.len(), cols, x.data[range.start * cols..range.end * cols].to_vec())
    }

    fn slice_cols(&self, x: &Tensor, range: Range<usize>) -> Result<Tensor> {
        operands::slice_cols(self.shape(x), &range)?;
        let rows = (0..x.rows()).flat_map(|r| x.row(r)[range.clone()].iter().copied());
        matrix(x.rows(), range.len(), rows.collect())
    }
}
