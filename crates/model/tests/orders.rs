//! Bounds hold for any order of summation: the reference in f32, with sums forwards, backwards, in pairs and in blocks, with
//! and without fused multiply-add, and with operands in bf16 and int8, passes every module's bound.

use std::sync::Arc;

use pi0_device::{
    ADA_EPS, Attention, Device, HostTensor, KeyValue, Modulation, NormKind, Reference, ReferenceWeight,
    Result, WeightSource, forward,
};
use pi0_model::cases::check::{check_against, wanted};
use pi0_model::cases::{Format, Module, Setup};

type Tensor = Arc<HostTensor>;

/// In which order a sum is added up.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Order {
    Forwards,
    Backwards,
    Pairs,
    /// Blocks of so many, forwards in each, and then the blocks.
    Blocks(usize),
    /// So many lanes that each take every so manyeth term, and then the lanes: vector registers.
    Lanes(usize),
}

/// The reference with every sum in f32.
struct Ordered {
    order: Order,
    fma: bool,
    format: Format,
    /// What does not sum.
    rest: Reference,
}

impl Ordered {
    /// `Σ a b`, of as many terms as `a` has; `b` may be all ones.
    fn dot(&self, a: &[f32], b: &[f32]) -> f32 {
        let step = |sum: f32, (a, b): (&f32, &f32)| if self.fma { a.mul_add(*b, sum) } else { sum + a * b };
        let run = |a: &[f32], b: &[f32]| a.iter().zip(b).fold(0.0, step);
        match self.order {
            Order::Forwards => run(a, b),
            Order::Backwards => a.iter().zip(b).rev().fold(0.0, step),
            Order::Pairs if a.len() <= 2 => run(a, b),
            Order::Pairs => {
                let half = a.len() / 2;
                self.dot(&a[..half], &b[..half]) + self.dot(&a[half..], &b[half..])
            }
            Order::Blocks(size) => {
                a.chunks(size).zip(b.chunks(size)).map(|(a, b)| run(a, b)).fold(0.0, |s, x| s + x)
            }
            Order::Lanes(lanes) => {
                let mut sums = vec![0.0; lanes];
                for (a, b) in a.chunks(lanes).zip(b.chunks(lanes)) {
                    sums.iter_mut().zip(a.iter().zip(b)).for_each(|(sum, pair)| *sum = step(*sum, pair));
                }
                sums.iter().fold(0.0, |s, x| s + x)
            }
        }
    }

    fn sum(&self, x: &[f32]) -> f32 {
        self.dot(x, &vec![1.0; x.len()])
    }

    /// A row as an operand of a product: rounded, and for int8 its integers and their scale.
    fn operand(&self, row: &[f32], exact: bool, attention: bool) -> (Vec<f32>, f32) {
        match self.format {
            Format::Int8 if !exact && !attention => {
                let scale = row.iter().fold(0.0f32, |m, x| m.max(x.abs())).max(1e-30) / 127.0;
                (row.iter().map(|x| (x / scale).round_ties_even()).collect(), scale)
            }
            Format::Bf16 | Format::Int8 if !exact => {
                let round = |x: &f32| {
                    let bits = x.to_bits();
                    f32::from_bits((bits + 0x7fff + (bits >> 16 & 1)) & 0xffff_0000)
                };
                (row.iter().map(round).collect(), 1.0)
            }
            _ => (row.to_vec(), 1.0),
        }
    }
}

/// A weight, and whether its layer is exact.
struct Weight {
    inner: ReferenceWeight,
    exact: bool,
}

fn rows(y: &[usize; 2], mut f: impl FnMut(usize, &mut [f32])) -> Tensor {
    let mut out = HostTensor::zeros(*y);
    (0..y[0]).for_each(|r| f(r, out.row_mut(r)));
    Arc::new(out)
}

impl Device for Ordered {
    type Tensor = Tensor;
    type Weight = Weight;

    fn name(&self) -> &'static str {
        "ordered"
    }
    fn shape(&self, x: &Tensor) -> [usize; 2] {
        [x.rows(), x.cols()]
    }
    fn upload(&self, rows: usize, cols: usize, data: &[f32]) -> Result<Tensor> {
        Reference.upload(rows, cols, data)
    }
    fn download(&self, x: &Tensor) -> Result<HostTensor> {
        Reference.download(x)
    }
    fn prepare(&self, source: &WeightSource) -> Result<Weight> {
        let exact = matches!(source, WeightSource::Linear { exact: true, .. });
        Ok(Weight { inner: Reference.prepare(source)?, exact })
    }

    forward! { Reference.rest: rope gelu silu geglu add add_scaled gated_add concat_rows slice_rows slice_cols }

    fn embed(&self, table: &Weight, ids: &[u32], scale: f32) -> Result<Tensor> {
        Reference.embed(&table.inner, ids, scale)
    }

    fn linear(&self, x: &Tensor, weight: &Weight) -> Result<Tensor> {
        let ReferenceWeight::Linear { weight: w, bias } = &weight.inner else { panic!("a linear layer") };
        let w: Vec<_> = (0..w.rows()).map(|i| self.operand(w.row(i), weight.exact, false)).collect();
        Ok(rows(&[x.rows(), w.len()], |r, out| {
            let (x, x_scale) = self.operand(x.row(r), weight.exact, false);
            for ((out, (w, scale)), bias) in out.iter_mut().zip(&w).zip(bias) {
                *out = self.dot(&x, w) * (x_scale * scale) + bias;
            }
        }))
    }

    fn layer_norm(&self, x: &Tensor, weight: &Weight) -> Result<Tensor> {
        self.norm(x, weight)
    }
    fn rms_norm(&self, x: &Tensor, weight: &Weight) -> Result<Tensor> {
        self.norm(x, weight)
    }
    fn ada_rms_norm(&self, x: &Tensor, by: &Modulation<'_, Tensor>) -> Result<Tensor> {
        let width = x.cols();
        Ok(rows(&[x.rows(), width], |r, out| {
            let (row, drive) = (x.row(r), by.table.row(by.rows[r] as usize));
            let inverse = 1.0 / (self.dot(row, row) / width as f32 + ADA_EPS).sqrt();
            for (i, out) in out.iter_mut().enumerate() {
                *out = row[i] * inverse * (1.0 + drive[i]) + drive[width + i];
            }
        }))
    }

    fn attention(&self, q: &Tensor, kv: &[KeyValue<'_, Tensor>], spec: &Attention<'_>) -> Result<Tensor> {
        let (dim, group) = (spec.head_dim, spec.heads / spec.kv_heads);
        let round = |row: &[f32]| self.operand(row, false, true).0;
        let mut out = HostTensor::zeros([q.rows(), q.cols()]);
        for span in spec.spans {
            let keys: Vec<_> =
                span.keys.iter().flat_map(|k| k.rows.clone().map(|row| (k.part, row))).collect();
            for head in 0..spec.heads {
                let columns = head / group * dim..(head / group + 1) * dim;
                let of = |values: bool| -> Vec<Vec<f32>> {
                    let row = |&(p, row): &(usize, usize)| {
                        let t = if values { kv[p].v } else { kv[p].k };
                        round(&t.row(row)[columns.clone()])
                    };
                    keys.iter().map(row).collect()
                };
                let (k, v) = (of(false), of(true));
                for row in span.queries.clone() {
                    let query = round(&q.row(row)[head * dim..(head + 1) * dim]);
                    let logits: Vec<f32> = k.iter().map(|k| self.dot(&query, k) * spec.scale).collect();
                    let most = logits.iter().copied().fold(f32::MIN, f32::max);
                    let weights: Vec<f32> = logits.iter().map(|l| (l - most).exp()).collect();
                    let (sum, weights) = (self.sum(&weights), round(&weights));
                    for (i, out) in out.row_mut(row)[head * dim..(head + 1) * dim].iter_mut().enumerate() {
                        let column: Vec<f32> = v.iter().map(|v| v[i]).collect();
                        *out = self.dot(&weights, &column) / sum;
                    }
                }
            }
        }
        Ok(Arc::new(out))
    }
}

impl Ordered {
    fn norm(&self, x: &Tensor, weight: &Weight) -> Result<Tensor> {
        let ReferenceWeight::Norm { kind, weight: w, bias, eps } = &weight.inner else { panic!("a norm") };
        let n = x.cols() as f32;
        Ok(rows(&[x.rows(), x.cols()], |r, out| {
            let row = x.row(r);
            let mean = if *kind == NormKind::Layer { self.sum(row) / n } else { 0.0 };
            let centred: Vec<f32> = row.iter().map(|x| x - mean).collect();
            let inverse = 1.0 / (self.dot(&centred, &centred) / n + eps).sqrt();
            let one = if *kind == NormKind::Rms { 1.0 } else { 0.0 };
            for (i, out) in out.iter_mut().enumerate() {
                *out = centred[i] * inverse * (one + w[i]) + bias[i];
            }
        }))
    }
}

#[test]
fn every_order_of_summation_passes_every_bound() {
    let mut orders = vec![Order::Forwards, Order::Backwards, Order::Pairs];
    orders.extend([8, 16, 32, 64].map(Order::Blocks));
    orders.extend([8, 16, 32].map(Order::Lanes));
    let mut strain = Vec::new();
    for setup in Setup::small().unwrap() {
        for format in [Format::F32, Format::Bf16, Format::Int8] {
            for module in Module::all(setup.config().kind) {
                let want = wanted(&Reference, module, &setup, format);
                for (&order, fma) in orders.iter().flat_map(|o| [(o, false), (o, true)]) {
                    // Where operands are rounded, their rounding hides the order.
                    if format != Format::F32 && (fma || !matches!(order, Order::Forwards | Order::Blocks(16)))
                    {
                        continue;
                    }
                    let device = Ordered { order, fma, format, rest: Reference };
                    let done = check_against(&device, want.as_ref(), module, &setup);
                    assert!(done.passed(), "{} {format} {order:?} fma {fma}: {}", setup.name, done.summary());
                    strain.push(done.worst().map_or(0.0, |w| w.strain()));
                }
            }
        }
    }
    // A bound that nothing comes near would see nothing.
    let most = strain.iter().copied().fold(0.0, f64::max);
    println!("{} checks, the nearest at {most:.2} of its bound", strain.len());
    assert!(most > 0.2, "{most}");
}
