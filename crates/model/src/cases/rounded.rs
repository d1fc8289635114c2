//! A device that rounds as a number format does, at random: one draw of the errors that a right device may have.
//!
//! Each operation runs on the device inside, and its result (and, where products round them, its operands) get random
//! errors whose variances follow from the number format, the depth of the sums and the sizes of the operands alone. They
//! are those of plain loops in the given format: fused operations round less. Errors spread through the rest of a module
//! as they would on a device, because the module itself carries them on. (Monte Carlo arithmetic, after D. S. Parker.)
//!
//! *What is rounded twice is rounded alike.* A device packs a weight once, and every row, step and robot meets the same
//! rounded weight; a row of keys is rounded alike whenever it is read. So the error of an operand is drawn from its own value
//! and place: ten denoising steps do not average it out, neither here nor on a device.
//!
//! *One rounding* to nearest is off by at most `u` relative to the value; its variance is at most `u² / 3` (uniform), with
//! mean 0. Cutting off is off by at most twice as much, always towards zero.
//!
//! *A sum* of `K` terms, added in any tree, rounds each inner node `S`: its error has variance `u²/3 · Σ S²`. The order has
//! nothing to do with the values, so each node is taken as the sum of a random choice of the terms. Terms of mean `m` and variance
//! `s²`, added one after the other, have `E Σ S² = Σ (k² m² + k s²) ≈ K³ m² / 3 + K² s² / 2`, at most `K / 2` times the
//! expected square of the whole sum, `K² m² + K s²`; every other tree has smaller nodes. So a sum's error has at most the
//! variance `u²/3 · K/2 · E[sum²]`, whatever its order. `E[sum²]` is taken as the larger of the sum's own square and that
//! of terms that do not know each other, `|x|² |w|² / K`. (One term that outweighs all others and comes first makes it
//! `K` in place of `K / 2`: 1.4 times the error, of the 4 times that a bound allows.)

use std::cell::Cell;

use pi0_device::{
    Attention, Device, Dtype, HostTensor, KeyValue, LinearPart, Modulation, NormKind, Result, TensorSource,
    WeightSource, forward,
};

use super::Format;

/// Largest relative error of a rounding to f32, and its variance.
const UNIT: f64 = 1.0 / (1u64 << 24) as f64;
const VARIANCE: f64 = UNIT * UNIT / 3.0;

/// Roundings that an elementary function (exponential, tanh, sine, root, quotient) may be off by: 4 units in the last
/// place, what OpenCL and Vulkan ask of `exp` of small numbers (3) and of quotients (2.5), rounded up.
const FUNCTION: f64 = 8.0;

/// Runs on `D` and adds random errors; see the module's words.
pub struct Rounded<D> {
    inner: D,
    /// None adds none.
    format: Option<Format>,
    seed: u64,
    state: Cell<u64>,
}

/// A weight of the device inside, and its sizes.
pub struct RoundedWeight<W> {
    packed: W,
    sizes: Sizes,
}

enum Sizes {
    /// `rounded`: `packed` has the errors of an operand already.
    Linear {
        exact: bool,
        rounded: bool,
        inputs: usize,
        rows: Vec<WeightRow>,
    },
    Norm {
        kind: NormKind,
        weight: Vec<f32>,
        eps: f32,
    },
    /// Whether a device may keep it in a narrower format than it is stored in.
    Table {
        narrowed: bool,
    },
}

/// One output of a linear layer.
#[derive(Clone, Copy)]
struct WeightRow {
    /// Sum of squares.
    squares: f64,
    largest: f64,
}

/// How the operands of products are rounded.
#[derive(Clone, Copy)]
enum Operands {
    /// Not at all beyond f32.
    Kept,
    /// To nearest, off by at most this much relative to the value.
    Nearest(f64),
    /// Cut off, by at most this much relative to the value.
    Cut(f64),
    /// To so many steps of a row's largest value.
    Steps(f64),
}

impl Operands {
    fn of(format: Format, exact: bool, attention: bool) -> Self {
        match format {
            Format::F32 => Operands::Kept,
            Format::Tf32 => Operands::Cut(format.unit()),
            Format::Bfp8 if exact => Operands::Cut(Format::Tf32.unit()),
            Format::Bf16 | Format::Int8 if exact => Operands::Kept,
            Format::Int8 | Format::Bfp8 if !attention => Operands::Steps(127.0),
            Format::Bf16 | Format::Int8 | Format::Bfp8 => Operands::Nearest(Format::Bf16.unit()),
        }
    }

    /// Variance that the rounding of a weight's row gives a product with `x` of these squares.
    fn of_weight(self, row: WeightRow, inputs: usize, x_squares: f64) -> f64 {
        match self {
            Operands::Kept => 0.0,
            Operands::Nearest(u) | Operands::Cut(u) => u * u / 3.0 * x_squares * row.squares / inputs as f64,
            Operands::Steps(steps) => (row.largest / steps).powi(2) / 12.0 * x_squares,
        }
    }
}

/// Steps of splitmix64, whose words are random enough for any of this.
const GOLDEN: u64 = 0x9e37_79b9_7f4a_7c15;

fn mix(z: u64) -> u64 {
    let z = (z ^ z >> 30).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    let z = (z ^ z >> 27).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ z >> 31
}

/// Between -1 and 1.
fn uniform(bits: u64) -> f64 {
    (bits >> 11) as f64 / (1u64 << 52) as f64 - 1.0
}

fn squares(x: &[f32]) -> f64 {
    x.iter().map(|&x| f64::from(x).powi(2)).sum()
}

fn largest(x: &[f32]) -> f64 {
    x.iter().fold(0.0, |most: f64, &x| most.max(f64::from(x).abs()))
}

impl<D: Device> Rounded<D> {
    /// Errors as `format` has them; another `seed`, another draw.
    pub fn new(inner: D, format: Format, seed: u64) -> Self {
        let seed = mix(seed.wrapping_mul(GOLDEN));
        Self { inner, format: Some(format), seed, state: Cell::new(seed) }
    }

    /// Adds no errors: the same type, for whoever needs both.
    pub fn exact(inner: D) -> Self {
        Self { inner, format: None, seed: 0, state: Cell::new(0) }
    }

    /// 64 random bits.
    fn bits(&self) -> u64 {
        let state = self.state.get().wrapping_add(GOLDEN);
        self.state.set(state);
        mix(state)
    }

    /// Of variance 1, nearly normal: the sum of four.
    fn normal(&self) -> f64 {
        let bits = self.bits();
        let sum: f64 = (0..4).map(|i| (bits >> (16 * i) & 0xffff) as f64 / 32_768.0 - 1.0).sum();
        sum * 0.75f64.sqrt()
    }

    /// Adds an error of this variance to a value.
    fn disturb(&self, x: &mut f32, variance: f64) {
        *x = (f64::from(*x) + variance.sqrt() * self.normal()) as f32;
    }

    /// Rounds a row of an operand: the same values at the same places alike, in every call.
    fn round(&self, operands: Operands, row: &mut [f32]) {
        let step = match operands {
            Operands::Kept => return,
            Operands::Steps(steps) => largest(row) / steps,
            _ => 0.0,
        };
        for (i, x) in row.iter_mut().enumerate() {
            let value = f64::from(*x);
            let uniform = uniform(mix(u64::from(x.to_bits()) << 32 ^ i as u64 ^ self.seed));
            *x = match operands {
                Operands::Kept => return,
                Operands::Nearest(u) => value * (1.0 + u * uniform),
                Operands::Cut(u) => value * (1.0 - u * (1.0 + uniform) / 2.0),
                Operands::Steps(_) => value + step / 2.0 * uniform,
            } as f32;
        }
    }

    /// A linear layer's weights with the errors of operands, and its biases.
    fn rounded(&self, operands: Operands, parts: &[LinearPart]) -> Result<Vec<LinearPart>> {
        let one = |part: &LinearPart| {
            let (rows, cols) = (part.outputs(), part.inputs());
            let mut data = vec![0.0; rows * cols];
            for (i, row) in data.chunks_exact_mut(cols.max(1)).enumerate() {
                part.read_row(i, row);
                self.round(operands, row);
            }
            let weight = TensorSource::from_f32(part.weight.name.clone(), vec![rows, cols], &data)?;
            Ok(LinearPart { weight, bias: part.bias.clone(), columns: None })
        };
        parts.iter().map(one).collect()
    }

    fn down(&self, x: &D::Tensor) -> Result<HostTensor> {
        self.inner.download(x)
    }

    fn up(&self, x: &HostTensor) -> Result<D::Tensor> {
        self.inner.upload(x.rows(), x.cols(), &x.data)
    }

    /// Each row of a result, to which `f` adds errors.
    fn each_row(&self, y: &D::Tensor, mut f: impl FnMut(usize, &mut [f32])) -> Result<D::Tensor> {
        if self.format.is_none() {
            return Ok(y.clone());
        }
        let mut y = self.down(y)?;
        (0..y.rows()).for_each(|r| f(r, y.row_mut(r)));
        self.up(&y)
    }

    /// An operand of an elementwise function, off by two roundings: the function's own scaling of its argument.
    fn argument(&self, x: &D::Tensor, columns: impl Fn(usize) -> usize) -> Result<D::Tensor> {
        self.each_row(x, |_, row| {
            let end = columns(row.len());
            row[..end].iter_mut().for_each(|x| self.disturb(x, 2.0 * VARIANCE * f64::from(*x).powi(2)));
        })
    }

    /// A function of each value and, beside its own error, that of `1 + tanh` where the two cancel: half a rounding of
    /// the value itself.
    fn function(&self, x: &D::Tensor, f: impl Fn(&D::Tensor) -> Result<D::Tensor>) -> Result<D::Tensor> {
        let y = f(&self.argument(x, |cols| cols)?)?;
        let x = self.down(x)?;
        self.each_row(&y, |r, row| {
            for (y, &x) in row.iter_mut().zip(x.row(r)) {
                let (own, cancelled) = (FUNCTION * f64::from(*y), f64::from(x) / 2.0);
                self.disturb(y, VARIANCE * (own * own + cancelled * cancelled));
            }
        })
    }

    /// A norm's result: the mean of the squares is a sum over the row, whose error all of the row shares; then a root, a
    /// quotient and two products, and a sum with what `shift` says.
    fn normed(&self, y: &D::Tensor, shift: impl Fn(usize, usize) -> f64) -> Result<D::Tensor> {
        self.each_row(y, |r, row| {
            // The root halves the sum's error.
            let of_row = VARIANCE * (row.len() as f64 / 8.0 + FUNCTION * FUNCTION);
            let shared = of_row.sqrt() * self.normal();
            for (c, y) in row.iter_mut().enumerate() {
                let value = f64::from(*y);
                let product = value - shift(r, c);
                *y = (value + shared * product) as f32;
                self.disturb(y, VARIANCE * (4.0 * product * product + value * value));
            }
        })
    }
}

fn sizes(source: &WeightSource, rounded: bool) -> Sizes {
    match source {
        WeightSource::Linear { parts, exact } => {
            let mut rows = Vec::new();
            for part in parts {
                let mut row = vec![0.0; part.inputs()];
                for i in 0..part.outputs() {
                    part.read_row(i, &mut row);
                    rows.push(WeightRow { squares: squares(&row), largest: largest(&row) });
                }
            }
            Sizes::Linear {
                exact: *exact,
                rounded,
                inputs: parts.first().map_or(0, LinearPart::inputs),
                rows,
            }
        }
        WeightSource::Norm { kind, weight, eps, .. } => {
            Sizes::Norm { kind: *kind, weight: weight.to_f32(), eps: *eps }
        }
        WeightSource::Embedding(table) => Sizes::Table { narrowed: table.dtype == Dtype::F32 },
    }
}

impl<D: Device> Device for Rounded<D> {
    type Tensor = D::Tensor;
    type Weight = RoundedWeight<D::Weight>;

    forward! { D.inner:
        name shape tap enter exit upload download largest
        concat_rows slice_rows slice_cols store_rows
    }

    fn prepare(&self, source: &WeightSource) -> Result<Self::Weight> {
        let (WeightSource::Linear { parts, exact }, Some(format)) = (source, self.format) else {
            return Ok(RoundedWeight { packed: self.inner.prepare(source)?, sizes: sizes(source, false) });
        };
        let operands = Operands::of(format, *exact, false);
        if let Operands::Kept = operands {
            return Ok(RoundedWeight { packed: self.inner.prepare(source)?, sizes: sizes(source, true) });
        }
        let parts = self.rounded(operands, parts)?;
        let packed = self.inner.prepare(&WeightSource::Linear { parts, exact: *exact })?;
        Ok(RoundedWeight { packed, sizes: sizes(source, true) })
    }

    fn embed(&self, table: &Self::Weight, ids: &[u32], scale: f32) -> Result<D::Tensor> {
        let y = self.inner.embed(&table.packed, ids, scale)?;
        let operands = match (self.format, &table.sizes) {
            (Some(Format::Bf16 | Format::Int8), Sizes::Table { narrowed: true }) => {
                Operands::Nearest(Format::Bf16.unit())
            }
            _ => Operands::Kept,
        };
        self.each_row(&y, |_, row| {
            self.round(operands, row);
            row.iter_mut().for_each(|y| self.disturb(y, VARIANCE * f64::from(*y).powi(2)))
        })
    }

    fn linear(&self, x: &D::Tensor, weight: &Self::Weight) -> Result<D::Tensor> {
        let (Some(format), Sizes::Linear { exact, rounded, inputs, rows }) = (self.format, &weight.sizes)
        else {
            return self.inner.linear(x, &weight.packed);
        };
        let operands = Operands::of(format, *exact, false);
        let given = self.down(x)?;
        let operand = self.each_row(x, |_, row| self.round(operands, row))?;
        let y = self.inner.linear(&operand, &weight.packed)?;
        // A weight that several draws share has no errors of its own; each product gets them instead.
        let of_weight = if *rounded { Operands::Kept } else { operands };
        // Sum, product, bias, and a scale or two.
        let roundings = *inputs as f64 / 2.0 + 4.0;
        self.each_row(&y, |r, row| {
            let x_squares = squares(given.row(r));
            for (y, w) in row.iter_mut().zip(rows) {
                if let Operands::Cut(u) = of_weight {
                    *y = (f64::from(*y) * (1.0 - u / 2.0)) as f32;
                }
                let expected = f64::from(*y).powi(2).max(x_squares * w.squares / *inputs as f64);
                self.disturb(
                    y,
                    VARIANCE * roundings * expected + of_weight.of_weight(*w, *inputs, x_squares),
                );
            }
        })
    }

    fn layer_norm(&self, x: &D::Tensor, weight: &Self::Weight) -> Result<D::Tensor> {
        let y = self.inner.layer_norm(x, &weight.packed)?;
        let Sizes::Norm { weight, eps, kind: NormKind::Layer } = &weight.sizes else { return Ok(y) };
        let (y, x) = (self.normed(&y, |_, _| 0.0)?, self.down(x)?);
        // The mean is a sum as well, and what it is off by shifts the row; so does the rounding of each difference.
        self.each_row(&y, |r, row| {
            let n = row.len() as f64;
            let mean = x.row(r).iter().map(|&x| f64::from(x)).sum::<f64>() / n;
            let variance = x.row(r).iter().map(|&x| (f64::from(x) - mean).powi(2)).sum::<f64>() / n;
            let inverse = 1.0 / (variance + f64::from(*eps)).sqrt();
            let of_mean = VARIANCE * (n / 2.0 + 1.0) * (mean * mean + variance / n);
            let shift = of_mean.sqrt() * self.normal() * inverse;
            for (y, &w) in row.iter_mut().zip(weight) {
                *y = (f64::from(*y) + shift * f64::from(w)) as f32;
            }
        })
    }

    fn rms_norm(&self, x: &D::Tensor, weight: &Self::Weight) -> Result<D::Tensor> {
        self.normed(&self.inner.rms_norm(x, &weight.packed)?, |_, _| 0.0)
    }

    fn ada_rms_norm(&self, x: &D::Tensor, by: &Modulation<'_, D::Tensor>) -> Result<D::Tensor> {
        let y = self.inner.ada_rms_norm(x, by)?;
        let table = self.down(by.table)?;
        let width = self.shape(x)[1];
        self.normed(&y, |r, c| f64::from(table.row(by.rows[r] as usize)[width + c]))
    }

    /// Angles are defined in f32, and their rounding is no error; sines, cosines and products round.
    fn rope(&self, x: &D::Tensor, positions: &[u32], head_dim: usize) -> Result<D::Tensor> {
        let y = self.inner.rope(x, positions, head_dim)?;
        self.each_row(&y, |_, row| {
            for head in row.chunks_exact_mut(head_dim) {
                let (first, second) = head.split_at_mut(head_dim / 2);
                for (a, b) in first.iter_mut().zip(second) {
                    let pair = f64::from(*a).powi(2) + f64::from(*b).powi(2);
                    let variance = VARIANCE * (FUNCTION * FUNCTION + 2.0) * pair;
                    self.disturb(a, variance);
                    self.disturb(b, variance);
                }
            }
        })
    }

    fn attention(
        &self,
        q: &D::Tensor,
        kv: &[KeyValue<'_, D::Tensor>],
        spec: &Attention<'_>,
    ) -> Result<D::Tensor> {
        let Some(format) = self.format else { return self.inner.attention(q, kv, spec) };
        let operands = Operands::of(format, false, true);
        // A logit is a sum over a head, rounded, scaled, and its distance to the largest one rounded.
        let logit = VARIANCE * (spec.head_dim as f64 / 2.0 + 4.0);
        // Of a query each value apart: terms that do not know each other. Of a key the whole row: those that do.
        let q = self.each_row(q, |_, row| {
            self.round(operands, row);
            row.iter_mut().for_each(|x| self.disturb(x, logit * f64::from(*x).powi(2)));
        })?;
        let keys = |k: &D::Tensor| {
            self.each_row(k, |_, row| {
                self.round(operands, row);
                for head in row.chunks_exact_mut(spec.head_dim) {
                    let shared = logit.sqrt() * self.normal();
                    head.iter_mut().for_each(|x| *x = (f64::from(*x) * (1.0 + shared)) as f32);
                }
            })
        };
        // The exponential of each logit and its rounding as an operand: as if its value were off by as much.
        let values = |v: &D::Tensor| {
            self.each_row(v, |_, row| {
                self.round(operands, row);
                self.round(operands, row);
                row.iter_mut().for_each(|x| self.disturb(x, VARIANCE * (FUNCTION * f64::from(*x)).powi(2)));
            })
        };
        let kv: Vec<_> = kv.iter().map(|part| Ok((keys(part.k)?, values(part.v)?))).collect::<Result<_>>()?;
        let kv: Vec<_> = kv.iter().map(|(k, v)| KeyValue { k, v }).collect();
        let y = self.inner.attention(&q, &kv, spec)?;
        // The sums over the keys, of the values and of the exponentials, and the quotient.
        self.each_row(&y, |r, row| {
            let span = spec.spans.iter().find(|s| s.queries.contains(&r));
            let roundings = span.map_or(0, |s| s.key_count()) as f64 + FUNCTION * FUNCTION;
            for head in row.chunks_exact_mut(spec.head_dim) {
                let typical = squares(head) / head.len() as f64;
                for y in head {
                    self.disturb(y, VARIANCE * roundings * f64::from(*y).powi(2).max(typical));
                }
            }
        })
    }

    fn gelu(&self, x: &D::Tensor) -> Result<D::Tensor> {
        self.function(x, |x| self.inner.gelu(x))
    }

    fn silu(&self, x: &D::Tensor) -> Result<D::Tensor> {
        self.function(x, |x| self.inner.silu(x))
    }

    fn geglu(&self, x: &D::Tensor) -> Result<D::Tensor> {
        let y = self.inner.geglu(&self.argument(x, |cols| cols / 2)?)?;
        let x = self.down(x)?;
        self.each_row(&y, |r, row| {
            let (gate, up) = x.row(r).split_at(row.len());
            for ((y, &g), &u) in row.iter_mut().zip(gate).zip(up) {
                let (own, cancelled) = ((FUNCTION + 1.0) * f64::from(*y), f64::from(g) * f64::from(u) / 2.0);
                self.disturb(y, VARIANCE * (own * own + cancelled * cancelled));
            }
        })
    }

    fn add(&self, x: &D::Tensor, y: &D::Tensor) -> Result<D::Tensor> {
        let sum = self.inner.add(x, y)?;
        self.each_row(&sum, |_, row| {
            row.iter_mut().for_each(|z| self.disturb(z, VARIANCE * f64::from(*z).powi(2)));
        })
    }

    fn add_scaled(&self, x: &D::Tensor, y: &D::Tensor, scale: f32) -> Result<D::Tensor> {
        let (sum, y) = (self.inner.add_scaled(x, y, scale)?, self.down(y)?);
        self.each_row(&sum, |r, row| {
            for (z, &y) in row.iter_mut().zip(y.row(r)) {
                let product = f64::from(scale) * f64::from(y);
                self.disturb(z, VARIANCE * (f64::from(*z).powi(2) + product * product));
            }
        })
    }

    fn gated_add(&self, x: &D::Tensor, y: &D::Tensor, by: &Modulation<'_, D::Tensor>) -> Result<D::Tensor> {
        let (sum, y, table) = (self.inner.gated_add(x, y, by)?, self.down(y)?, self.down(by.table)?);
        self.each_row(&sum, |r, row| {
            let gates = &table.row(by.rows[r] as usize)[2 * row.len()..];
            for ((z, &y), &g) in row.iter_mut().zip(y.row(r)).zip(gates) {
                let product = f64::from(g) * f64::from(y);
                self.disturb(z, VARIANCE * (f64::from(*z).powi(2) + product * product));
            }
        })
    }
}
