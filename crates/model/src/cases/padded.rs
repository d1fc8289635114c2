//! Positions and masks by the references' definition, over padded rows: an independent word on how a batch is packed.
//!
//! The references pad every robot to all cameras and the longest prompt, count positions as `cumsum(mask) - 1`, and
//! let a row attend to the valid rows whose block is not later than its own: blocks are the whole prefix, the state (of
//! π0), the actions.

use pi0_device::{Attention, Device, HostTensor, KeyValue};

use super::inputs::{rows, upload};
use super::{Outputs, Setup};
use crate::siglip::image_spans;
use crate::{GemmaConfig, Inputs, Kind, ModelError};

/// One robot's padded rows: what each is and which packed row holds it.
struct Padded {
    /// Block of each row: 0 prefix, 1 state, 2 actions.
    block: Vec<usize>,
    /// Packed row of each padded one that is valid: of the prefix for block 0, of the first suffix otherwise.
    packed: Vec<Option<usize>>,
}

impl Padded {
    /// `cumsum(mask) - 1`.
    fn positions(&self) -> Vec<usize> {
        let mut count = 0;
        let next = |p: &Option<usize>| {
            count += usize::from(p.is_some());
            count.saturating_sub(1)
        };
        self.packed.iter().map(next).collect()
    }

    /// Padded rows that `row` attends to.
    fn seen_by(&self, row: usize) -> Vec<usize> {
        (0..self.block.len())
            .filter(|&k| self.packed[k].is_some() && self.block[k] <= self.block[row])
            .collect()
    }
}

/// Pads every robot of the batch. Packed rows are counted off one by one: all images, then all prompts; all
/// states, then all actions.
fn pad(setup: &Setup) -> Vec<Padded> {
    let c = setup.config();
    let robots = setup.batch.len();
    let mut next = 0;
    let mut count = |valid: bool| {
        next += usize::from(valid);
        valid.then(|| next - 1)
    };
    let images = |i: &Inputs| -> Vec<bool> {
        i.images.iter().flat_map(|image| vec![image.is_some(); c.vision.patches()]).collect()
    };
    let image_rows: Vec<Vec<_>> =
        setup.batch.iter().map(|i| images(i).into_iter().map(&mut count).collect()).collect();
    let token_rows: Vec<Vec<_>> =
        setup.batch.iter().map(|i| (0..c.max_tokens).map(|t| count(t < i.tokens.len())).collect()).collect();
    (0..robots)
        .map(|robot| {
            let mut packed = [image_rows[robot].clone(), token_rows[robot].clone()].concat();
            let mut block = vec![0; packed.len()];
            let states = if c.kind == Kind::Pi0 { robots } else { 0 };
            if states > 0 {
                packed.push(Some(robot));
                block.push(1);
            }
            packed.extend((0..c.horizon).map(|t| Some(states + robot * c.horizon + t)));
            block.resize(packed.len(), 2);
            Padded { block, packed }
        })
        .collect()
}

/// Positions of prefix and suffix rows, through the device as a matrix of one column.
pub(super) fn positions<D: Device>(d: &D, setup: &Setup) -> Result<Outputs, ModelError> {
    let layout = setup.layout()?;
    let column = |name: &str, positions: Vec<u32>| {
        let values: Vec<f32> = positions.iter().map(|&p| p as f32).collect();
        Ok::<_, ModelError>((name.to_string(), d.download(&d.upload(values.len(), 1, &values)?)?))
    };
    Ok(vec![column("prefix", layout.prefix_positions())?, column("suffix", layout.suffix_positions())?])
}

pub(super) fn expected_positions(setup: &Setup) -> Result<Outputs, ModelError> {
    let padded = pad(setup);
    let column = |name: &str, prefix: bool| {
        let mut rows: Vec<(usize, f32)> = Vec::new();
        for robot in &padded {
            for ((position, packed), block) in robot.positions().iter().zip(&robot.packed).zip(&robot.block) {
                if let (Some(packed), true) = (packed, (*block == 0) == prefix) {
                    rows.push((*packed, *position as f32));
                }
            }
        }
        rows.sort_by_key(|(packed, _)| *packed);
        let values: Vec<f32> = rows.into_iter().map(|(_, position)| position).collect();
        (name.to_string(), HostTensor::new([values.len(), 1], values))
    };
    Ok(vec![column("prefix", true), column("suffix", false)])
}

/// Random q, k and v of one attention.
struct Qkv {
    q: HostTensor,
    k: HostTensor,
    v: HostTensor,
}

impl Qkv {
    /// Even rows: their sizes would only make the softmax a maximum.
    fn new(tag: &str, count: usize, heads: usize, kv_heads: usize, dim: usize) -> Self {
        let random = |what: &str, heads: usize| {
            let mut t = rows(&format!("{tag}.{what}"), count, heads * dim);
            for r in 0..count {
                let size = t.row(r).iter().map(|x| x * x).sum::<f32>().sqrt() / (t.cols() as f32).sqrt();
                t.row_mut(r).iter_mut().for_each(|x| *x /= size.max(1e-6));
            }
            t
        };
        Self { q: random("q", heads), k: random("k", kv_heads), v: random("v", kv_heads) }
    }
}

struct Operands {
    vision: Qkv,
    prefix: Qkv,
    suffix: Qkv,
}

fn operands(setup: &Setup) -> Result<Operands, ModelError> {
    let (layout, v) = (setup.layout()?, &setup.config().vision);
    let GemmaConfig { num_heads, num_kv_heads, head_dim, .. } = setup.config().gemma;
    let gemma = |tag, count| Qkv::new(tag, count, num_heads, num_kv_heads, head_dim);
    let images = layout.images.len() * layout.patches;
    Ok(Operands {
        vision: Qkv::new("vision", images, v.num_attention_heads, v.num_attention_heads, v.head_dim()),
        prefix: gemma("prefix", layout.prefix_rows()),
        suffix: gemma("suffix", layout.states() + layout.batch() * layout.horizon),
    })
}

/// Attention as the network calls it in the vision tower, the prefix, the first step and a later one.
pub(super) fn attention<D: Device>(d: &D, setup: &Setup) -> Result<Outputs, ModelError> {
    let (layout, v) = (setup.layout()?, &setup.config().vision);
    let Operands { vision, prefix, suffix } = operands(setup)?;
    let states = layout.states();
    let GemmaConfig { num_heads: heads, num_kv_heads: kv_heads, head_dim, .. } = setup.config().gemma;
    let scale = (head_dim as f32).powf(-0.5);
    let (all, first, later) = (layout.prefix_spans(), layout.first_step_spans(), layout.later_step_spans());
    let gemma = |spans| Attention { heads, kv_heads, head_dim, scale, spans };
    let mut outputs = Outputs::new();
    let mut run = |name: &str, q: &D::Tensor, kv: &[(&D::Tensor, &D::Tensor)], spec: &Attention<'_>| {
        let kv: Vec<_> = kv.iter().map(|&(k, v)| KeyValue { k, v }).collect();
        outputs.push((name.to_string(), d.download(&d.attention(q, &kv, spec)?)?));
        Ok::<_, ModelError>(())
    };

    let [q, k, x] = [upload(d, &vision.q)?, upload(d, &vision.k)?, upload(d, &vision.v)?];
    let (heads, head_dim) = (v.num_attention_heads, v.head_dim());
    let spans = image_spans(vision.q.rows(), layout.patches);
    let scale = (head_dim as f32).powf(-0.5);
    run("vision", &q, &[(&k, &x)], &Attention { heads, kv_heads: heads, head_dim, scale, spans: &spans })?;

    let [q, k, x] = [upload(d, &prefix.q)?, upload(d, &prefix.k)?, upload(d, &prefix.v)?];
    run("prefix", &q, &[(&k, &x)], &gemma(&all))?;
    let [q, sk, sv] = [upload(d, &suffix.q)?, upload(d, &suffix.k)?, upload(d, &suffix.v)?];
    run("first step", &q, &[(&sk, &sv), (&k, &x)], &gemma(&first))?;
    if states == 0 {
        // All steps are alike.
        return Ok(outputs);
    }

    let part = |t: &HostTensor, rows: std::ops::Range<usize>| {
        let cols = t.cols();
        Ok::<_, ModelError>(d.upload(rows.len(), cols, &t.data[rows.start * cols..rows.end * cols])?)
    };
    let actions = states..suffix.q.rows();
    let [q, ak, av] =
        [part(&suffix.q, actions.clone())?, part(&suffix.k, actions.clone())?, part(&suffix.v, actions)?];
    let (states_k, states_v) = (part(&suffix.k, 0..states)?, part(&suffix.v, 0..states)?);
    let parts = [(&ak, &av), (&k, &x), (&states_k, &states_v)];
    run("later step", &q, &parts, &gemma(&later))?;
    Ok(outputs)
}

pub(super) fn expected_attention(setup: &Setup) -> Result<Outputs, ModelError> {
    let (layout, v) = (setup.layout()?, &setup.config().vision);
    let Operands { vision, prefix, suffix } = operands(setup)?;

    // Patches see the patches of their own image.
    let mut images = HostTensor::zeros([vision.q.rows(), vision.q.cols()]);
    let heads = (v.num_attention_heads, v.num_attention_heads, v.head_dim());
    for row in 0..vision.q.rows() {
        let first = row / layout.patches * layout.patches;
        let seen: Vec<_> =
            (first..first + layout.patches).map(|k| (vision.k.row(k), vision.v.row(k))).collect();
        attend(vision.q.row(row), &seen, heads, images.row_mut(row));
    }

    let mut of_prefix = HostTensor::zeros([prefix.q.rows(), prefix.q.cols()]);
    let mut of_suffix = HostTensor::zeros([suffix.q.rows(), suffix.q.cols()]);
    let GemmaConfig { num_heads, num_kv_heads, head_dim, .. } = setup.config().gemma;
    for robot in pad(setup) {
        let side = |row: usize| if robot.block[row] == 0 { &prefix } else { &suffix };
        for (row, packed) in robot.packed.iter().enumerate() {
            let Some(packed) = *packed else { continue };
            let keys = robot.seen_by(row).into_iter().filter_map(|k| Some((side(k), robot.packed[k]?)));
            let seen: Vec<_> = keys.map(|(qkv, k)| (qkv.k.row(k), qkv.v.row(k))).collect();
            let out = if robot.block[row] == 0 { &mut of_prefix } else { &mut of_suffix };
            let heads = (num_heads, num_kv_heads, head_dim);
            attend(side(row).q.row(packed), &seen, heads, out.row_mut(packed));
        }
    }
    let states = layout.states();
    let later = HostTensor::new(
        [of_suffix.rows() - states, of_suffix.cols()],
        of_suffix.data[states * of_suffix.cols()..].to_vec(),
    );
    let mut outputs =
        vec![("vision".into(), images), ("prefix".into(), of_prefix), ("first step".into(), of_suffix)];
    outputs.extend((states > 0).then(|| ("later step".into(), later)));
    Ok(outputs)
}

/// One query row over the keys it sees, in f64: `softmax(q · k / sqrt(dim)) · v` for each head.
fn attend(
    q: &[f32],
    seen: &[(&[f32], &[f32])],
    (heads, kv_heads, dim): (usize, usize, usize),
    out: &mut [f32],
) {
    for head in 0..heads {
        let kv = head * kv_heads / heads * dim;
        let logit = |k: &[f32]| -> f64 {
            let products = (0..dim).map(|i| f64::from(q[head * dim + i]) * f64::from(k[kv + i]));
            products.sum::<f64>() / (dim as f64).sqrt()
        };
        let weights: Vec<f64> = seen.iter().map(|(k, _)| logit(k).exp()).collect();
        let sum: f64 = weights.iter().sum();
        for i in 0..dim {
            let mix = seen.iter().zip(&weights).map(|((_, v), w)| f64::from(v[kv + i]) * w);
            out[head * dim + i] = (mix.sum::<f64>() / sum) as f32;
        }
    }
}
