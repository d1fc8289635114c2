//! The modules of π0 with random weights, on the simulator against the scalar reference: at the sizes for which
//! others have published numbers, and (opt-in) one layer of each tower at its real size.

mod common;

use common::{check, open, put, random};
use pi0_device::{
    Activation, Attention, Dense, Device, HostTensor, KeyValue, Keys, LinearPart, Norm, NormKind, Qkv,
    Reference, Result, Span, TensorSource, WeightSource, dense, qkv,
};

/// Sizes of a transformer layer.
#[derive(Clone, Copy)]
struct Sizes {
    width: usize,
    mlp: usize,
    heads: usize,
    kv_heads: usize,
    head_dim: usize,
    /// Layer norm, biases and GELU, without positions; else Gemma's layer.
    vision: bool,
}

const SIGLIP_SMALL: Sizes =
    Sizes { width: 256, mlp: 1024, heads: 8, kv_heads: 8, head_dim: 32, vision: true };
const GEMMA_SMALL: Sizes =
    Sizes { width: 256, mlp: 1024, heads: 4, kv_heads: 1, head_dim: 64, vision: false };
const SIGLIP: Sizes = Sizes { width: 1152, mlp: 4304, heads: 16, kv_heads: 16, head_dim: 72, vision: true };
const GEMMA: Sizes = Sizes { width: 2048, mlp: 16384, heads: 8, kv_heads: 1, head_dim: 256, vision: false };
const EXPERT: Sizes = Sizes { width: 1024, mlp: 4096, heads: 8, kv_heads: 1, head_dim: 256, vision: false };

fn tensor(shape: &[usize], seed: u64, deviation: f32) -> TensorSource {
    let n = shape.iter().product();
    TensorSource::from_f32("random", shape.to_vec(), &random(seed, 1, n, deviation).data).unwrap()
}

/// A linear layer whose outputs vary as its inputs do.
fn linear(inputs: usize, outputs: &[usize], bias: bool, seed: u64) -> WeightSource {
    let deviation = (inputs as f32).powf(-0.5);
    let part = |(&n, seed): (&usize, u64)| LinearPart {
        weight: tensor(&[n, inputs], seed, deviation),
        bias: bias.then(|| tensor(&[n], seed + 100, 0.1)),
        columns: None,
    };
    WeightSource::Linear { parts: outputs.iter().zip(seed..).map(part).collect(), exact: false }
}

struct Layer<D: Device> {
    sizes: Sizes,
    norm1: D::Weight,
    qkv: D::Weight,
    out: D::Weight,
    norm2: D::Weight,
    up: D::Weight,
    down: D::Weight,
}

impl<D: Device> Layer<D> {
    fn new(d: &D, s: Sizes) -> Result<Self> {
        let norm = |seed| WeightSource::Norm {
            kind: if s.vision { NormKind::Layer } else { NormKind::Rms },
            weight: tensor(&[s.width], seed, 0.2),
            bias: s.vision.then(|| tensor(&[s.width], seed + 1, 0.2)),
            eps: 1e-6,
        };
        let (q, kv) = (s.heads * s.head_dim, s.kv_heads * s.head_dim);
        let up: &[usize] = if s.vision { &[s.mlp] } else { &[s.mlp, s.mlp] };
        Ok(Self {
            sizes: s,
            norm1: d.prepare(&norm(1))?,
            qkv: d.prepare(&linear(s.width, &[q, kv, kv], s.vision, 10))?,
            out: d.prepare(&linear(q, &[s.width], s.vision, 20))?,
            norm2: d.prepare(&norm(30))?,
            up: d.prepare(&linear(s.width, up, s.vision, 40))?,
            down: d.prepare(&linear(s.mlp, &[s.width], s.vision, 50))?,
        })
    }

    fn norm<'a>(&self, weight: &'a D::Weight) -> Norm<'a, D::Tensor, D::Weight> {
        if self.sizes.vision { Norm::Layer(weight) } else { Norm::Rms(weight) }
    }

    /// `x + out(attention(norm(x)))`, or without `x`; `earlier` are keys and values that every row sees too.
    fn attention(
        &self,
        d: &D,
        x: &D::Tensor,
        groups: usize,
        earlier: Option<&(D::Tensor, D::Tensor)>,
        residual: bool,
    ) -> Result<D::Tensor> {
        let Sizes { heads, kv_heads, head_dim, vision, .. } = self.sizes;
        let rows = d.shape(x)[0];
        let positions: Vec<u32> = (0..rows as u32).map(|p| p + 7).collect();
        let [q, k, v] = qkv(
            d,
            &Qkv {
                x,
                norm: self.norm(&self.norm1),
                weight: &self.qkv,
                heads,
                kv_heads,
                head_dim,
                positions: (!vision).then_some(&positions[..]),
                norm_tap: None,
            },
        )?;
        let mut parts = vec![KeyValue { k: &k, v: &v }];
        parts.extend(earlier.map(|(k, v)| KeyValue { k, v }));
        let spans: Vec<Span> = (0..groups)
            .map(|g| {
                let own = g * rows / groups..(g + 1) * rows / groups;
                let mut keys = vec![Keys { part: 0, rows: own.clone() }];
                keys.extend(earlier.map(|(k, _)| Keys { part: 1, rows: 0..d.shape(k)[0] }));
                Span { queries: own, keys }
            })
            .collect();
        let scale = (head_dim as f32).powf(-0.5);
        let a = d.attention(&q, &parts, &Attention { heads, kv_heads, head_dim, scale, spans: &spans })?;
        dense(d, &Dense { residual: residual.then_some(x), ..Dense::new(&a, &self.out) })
    }

    /// `x + down(activation(up(norm(x))))`, or without `x`.
    fn mlp(&self, d: &D, x: &D::Tensor, residual: bool) -> Result<D::Tensor> {
        let activation = Some(if self.sizes.vision { Activation::Gelu } else { Activation::Geglu });
        let norm = Some(self.norm(&self.norm2));
        let h = dense(d, &Dense { norm, activation, ..Dense::new(x, &self.up) })?;
        dense(d, &Dense { residual: residual.then_some(x), ..Dense::new(&h, &self.down) })
    }
}

/// What of a layer is run.
#[derive(Clone, Copy, Debug)]
enum Module {
    Attention,
    Mlp,
    Block,
}

fn run<D: Device>(
    d: &D,
    s: Sizes,
    module: Module,
    (rows, groups, earlier): (usize, usize, usize),
) -> Result<HostTensor> {
    let layer = Layer::new(d, s)?;
    let x = put(d, &random(77, rows, s.width, 1.0));
    let cache = |seed| put(d, &random(seed, earlier, s.kv_heads * s.head_dim, 1.0));
    let earlier = (earlier > 0).then(|| (cache(78), cache(79)));
    let y = match module {
        Module::Attention => layer.attention(d, &x, groups, earlier.as_ref(), false)?,
        Module::Mlp => layer.mlp(d, &x, false)?,
        Module::Block => {
            let x = layer.attention(d, &x, groups, earlier.as_ref(), true)?;
            layer.mlp(d, &x, true)?
        }
    };
    d.download(&y)
}

/// Compares one module; `shape` is rows, groups of rows that see each other, and earlier keys.
fn compare(what: &str, s: Sizes, module: Module, shape: (usize, usize, usize), pcc: f64, relative_l2: f64) {
    let Some(device) = open() else { return };
    let got = run(&device, s, module, shape).unwrap();
    let want = run(&Reference, s, module, shape).unwrap();
    check(&format!("{what} {module:?}"), &got, &want, pcc, relative_l2);
}

/// The published sizes: hidden 256, 8 heads, sequence 32, batch 2.
#[test]
fn siglip_modules() {
    let shape = (64, 2, 0);
    compare("SigLIP 256", SIGLIP_SMALL, Module::Attention, shape, 0.9999, 0.01);
    compare("SigLIP 256", SIGLIP_SMALL, Module::Mlp, shape, 0.99999, 0.01);
    compare("SigLIP 256", SIGLIP_SMALL, Module::Block, shape, 0.9999, 0.01);
}

#[test]
fn gemma_modules() {
    let shape = (50, 1, 45);
    compare("Gemma 256", GEMMA_SMALL, Module::Attention, shape, 0.9999, 0.01);
    compare("Gemma 256", GEMMA_SMALL, Module::Mlp, shape, 0.9999, 0.01);
    compare("Gemma 256", GEMMA_SMALL, Module::Block, shape, 0.9999, 0.01);
}

fn real_sizes() -> bool {
    let asked = std::env::var_os("PI0_TENSIX_REAL_SIZES").is_some();
    if !asked {
        eprintln!("skipped: layers of real sizes take minutes (set PI0_TENSIX_REAL_SIZES=1)");
    }
    asked
}

#[test]
fn siglip_layer_of_real_size() {
    if real_sizes() {
        compare("SigLIP layer, 256 rows", SIGLIP, Module::Block, (256, 1, 0), 0.9995, 0.02);
    }
}

#[test]
fn gemma_layer_of_real_size() {
    if real_sizes() {
        compare("Gemma 2B layer, 32 rows over 40 keys", GEMMA, Module::Block, (32, 1, 40), 0.9995, 0.02);
    }
}

#[test]
fn expert_layer_of_real_size() {
    if real_sizes() {
        compare("expert layer, 51 rows over 100 keys", EXPERT, Module::Block, (51, 1, 100), 0.9995, 0.02);
    }
}
