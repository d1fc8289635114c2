//! The table of weights: every tensor of the network with its shape, and how layers ask for theirs.

use std::fmt::Display;
use std::ops::Range;
use std::sync::Arc;

use pi0_device::{Bytes, Device, LinearPart, NormKind, TensorSource, WeightSource};

use crate::{Checkpoint, Config, Kind, ModelError};

pub(crate) const VISION: &str = "paligemma_with_expert.paligemma.model.vision_tower.vision_model";
pub(crate) const PROJECTOR: &str = "paligemma_with_expert.paligemma.model.multi_modal_projector.linear";
pub(crate) const LANGUAGE: &str = "paligemma_with_expert.paligemma.model.language_model";
pub(crate) const EXPERT: &str = "paligemma_with_expert.gemma_expert.model";
/// The token embedding table.
pub const EMBED: &str = "paligemma_with_expert.paligemma.model.language_model.embed_tokens.weight";
/// Its alias, under which converted files usually hold it. Of π0-FAST it may be another matrix: the vocabulary head.
pub const LM_HEAD: &str = "paligemma_with_expert.paligemma.lm_head.weight";

/// Every tensor of the network: canonical name and shape.
pub fn expected_tensors(c: &Config) -> Vec<(String, Vec<usize>)> {
    let mut table = Vec::new();
    let mut put = |name: String, shape: &[usize]| table.push((name, shape.to_vec()));

    let v = &c.vision;
    let (h, m) = (v.hidden_size, v.intermediate_size);
    put(format!("{VISION}.embeddings.patch_embedding.weight"), &[h, 3, v.patch_size, v.patch_size]);
    put(format!("{VISION}.embeddings.patch_embedding.bias"), &[h]);
    put(format!("{VISION}.embeddings.position_embedding.weight"), &[v.patches(), h]);
    for i in 0..v.num_hidden_layers {
        let layer = format!("{VISION}.encoder.layers.{i}");
        let linears = [
            ("self_attn.q_proj", h, h),
            ("self_attn.k_proj", h, h),
            ("self_attn.v_proj", h, h),
            ("self_attn.out_proj", h, h),
            ("mlp.fc1", m, h),
            ("mlp.fc2", h, m),
        ];
        for (name, out, inputs) in linears {
            put(format!("{layer}.{name}.weight"), &[out, inputs]);
            put(format!("{layer}.{name}.bias"), &[out]);
        }
        for name in ["layer_norm1", "layer_norm2"] {
            put(format!("{layer}.{name}.weight"), &[h]);
            put(format!("{layer}.{name}.bias"), &[h]);
        }
    }
    put(format!("{VISION}.post_layernorm.weight"), &[h]);
    put(format!("{VISION}.post_layernorm.bias"), &[h]);
    put(format!("{PROJECTOR}.weight"), &[c.gemma.width, h]);
    put(format!("{PROJECTOR}.bias"), &[c.gemma.width]);

    put(EMBED.into(), &[c.vocab_size, c.gemma.width]);
    if c.answer.as_ref().is_some_and(|answer| !answer.tied) {
        put(LM_HEAD.into(), &[c.vocab_size, c.gemma.width]);
    }
    let towers = [(LANGUAGE, &c.gemma), (EXPERT, &c.expert)];
    for (tower, g) in towers.into_iter().take(if c.kind == Kind::Pi0Fast { 1 } else { 2 }) {
        let (w, q, kv) = (g.width, g.num_heads * g.head_dim, g.num_kv_heads * g.head_dim);
        for i in 0..g.depth {
            let layer = format!("{tower}.layers.{i}");
            let linears = [
                ("self_attn.q_proj", q, w),
                ("self_attn.k_proj", kv, w),
                ("self_attn.v_proj", kv, w),
                ("self_attn.o_proj", w, q),
                ("mlp.gate_proj", g.mlp_dim, w),
                ("mlp.up_proj", g.mlp_dim, w),
                ("mlp.down_proj", w, g.mlp_dim),
            ];
            for (name, out, inputs) in linears {
                put(format!("{layer}.{name}.weight"), &[out, inputs]);
            }
        }
        let norms = (0..g.depth).flat_map(|i| {
            ["input_layernorm", "post_attention_layernorm"].map(|norm| format!("{tower}.layers.{i}.{norm}"))
        });
        for norm in norms.chain([format!("{tower}.norm")]) {
            // The norms of π0.5's expert have no weight of their own: time drives them.
            if tower == EXPERT && c.kind == Kind::Pi05 {
                put(format!("{norm}.dense.weight"), &[3 * w, w]);
                put(format!("{norm}.dense.bias"), &[3 * w]);
            } else {
                put(format!("{norm}.weight"), &[w]);
            }
        }
    }

    if c.kind == Kind::Pi0Fast {
        return table;
    }
    let w = c.expert.width;
    let mut projections = vec![("action_in_proj", w, c.action_dim), ("action_out_proj", c.action_dim, w)];
    projections.extend(match c.kind {
        Kind::Pi0 => vec![
            ("state_proj", w, c.state_dim),
            ("action_time_mlp_in", w, 2 * w),
            ("action_time_mlp_out", w, w),
        ],
        Kind::Pi05 => vec![("time_mlp_in", w, w), ("time_mlp_out", w, w)],
        Kind::Pi0Fast => vec![],
    });
    for (name, out, inputs) in projections {
        put(format!("{name}.weight"), &[out, inputs]);
        put(format!("{name}.bias"), &[out]);
    }
    table
}

/// A place in the table, read like a directory: `weights.pp("self_attn").linear(&["q_proj"])`.
pub(crate) struct Weights<'a, D> {
    device: &'a D,
    checkpoint: &'a Checkpoint,
    /// Whose bytes progress counts.
    stored: &'a Checkpoint,
    progress: &'a dyn Fn(u64),
    prefix: String,
}

impl<'a, D: Device> Weights<'a, D> {
    /// The root. `progress` hears the bytes of each weight as it is packed.
    pub fn new(device: &'a D, checkpoint: &'a Checkpoint, progress: &'a dyn Fn(u64)) -> Self {
        Self { device, checkpoint, stored: checkpoint, progress, prefix: String::new() }
    }

    /// Progress hears the bytes of `stored`, the same checkpoint in other formats.
    pub fn counting(self, stored: &'a Checkpoint) -> Self {
        Self { stored, ..self }
    }

    /// The module `name` below this one.
    pub fn pp(&self, name: impl Display) -> Self {
        let dot = if self.prefix.is_empty() { "" } else { "." };
        Self { prefix: format!("{}{dot}{name}", self.prefix), ..*self }
    }

    fn name(&self, leaf: &str) -> String {
        let dot = if self.prefix.is_empty() { "" } else { "." };
        format!("{}{dot}{leaf}", self.prefix)
    }

    fn prepare(&self, source: WeightSource, stored: u64) -> Result<D::Weight, ModelError> {
        // What is poured is told when it has been.
        let later = source.tensors().any(TensorSource::pours);
        let weight = self.device.prepare(&source)?;
        if !later {
            (self.progress)(stored);
        }
        Ok(weight)
    }

    /// Linear layers without bias, stacked on their outputs.
    pub fn linear(&self, names: &[&str]) -> Result<D::Weight, ModelError> {
        self.linear_of(names, false, false, None)
    }

    /// Some rows of a matrix, in this order, as a linear layer without bias. All of them where none are named.
    pub fn rows(&self, full_name: &str, rows: Option<&[u32]>) -> Result<D::Weight, ModelError> {
        let all = self.checkpoint.tensor(full_name);
        let stored = all.byte_count() as u64;
        let weight = match rows {
            None => all,
            Some(rows) => {
                all.fetch()?;
                let bytes = all.cols() * all.dtype.size();
                let row = |&row: &u32| &all.bytes()[row as usize * bytes..][..bytes];
                let picked: Vec<u8> = rows.iter().flat_map(row).copied().collect();
                let shape = vec![rows.len(), all.cols()];
                TensorSource::new(all.name.clone(), all.dtype, shape, Bytes::Owned(Arc::new(picked)))?
            }
        };
        let parts = vec![LinearPart { weight, bias: None, columns: None }];
        self.prepare(WeightSource::Linear { parts, exact: false }, stored)
    }

    /// Linear layers with bias, stacked on their outputs.
    pub fn linear_bias(&self, names: &[&str]) -> Result<D::Weight, ModelError> {
        self.linear_of(names, true, false, None)
    }

    /// A linear layer that the references compute in f32. `columns` picks part of its inputs.
    pub fn linear_exact(
        &self,
        name: &str,
        bias: bool,
        columns: Option<Range<usize>>,
    ) -> Result<D::Weight, ModelError> {
        self.linear_of(&[name], bias, true, columns)
    }

    fn linear_of(
        &self,
        names: &[&str],
        bias: bool,
        exact: bool,
        columns: Option<Range<usize>>,
    ) -> Result<D::Weight, ModelError> {
        let mut stored = 0;
        let mut parts = Vec::new();
        for name in names {
            let full_name = self.name(&format!("{name}.weight"));
            let weight = self.checkpoint.tensor(&full_name);
            stored += self.stored.tensor(&full_name).byte_count() as u64;
            let [out, inputs] = [weight.shape[0], weight.shape[1..].iter().product()];
            parts.push(LinearPart {
                // A convolution whose stride is its size is a linear layer over its patches.
                weight: weight.reshaped(vec![out, inputs])?,
                bias: bias.then(|| self.checkpoint.tensor(&self.name(&format!("{name}.bias")))),
                columns: columns.clone(),
            });
        }
        self.prepare(WeightSource::Linear { parts, exact }, stored)
    }

    /// Layer norm, eps 1e-6.
    pub fn layer_norm(&self, name: &str) -> Result<D::Weight, ModelError> {
        let bias = Some(self.checkpoint.tensor(&self.name(&format!("{name}.bias"))));
        self.norm(NormKind::Layer, name, bias)
    }

    /// Gemma's RMS norm, eps 1e-6.
    pub fn rms_norm(&self, name: &str) -> Result<D::Weight, ModelError> {
        self.norm(NormKind::Rms, name, None)
    }

    fn norm(&self, kind: NormKind, name: &str, bias: Option<TensorSource>) -> Result<D::Weight, ModelError> {
        let weight = self.checkpoint.tensor(&self.name(&format!("{name}.weight")));
        let stored = weight.byte_count() as u64;
        self.prepare(WeightSource::Norm { kind, weight, bias, eps: 1e-6 }, stored)
    }

    /// The token embedding table. It stays where it is: few of its rows are read.
    pub fn embedding(&self, full_name: &str) -> Result<D::Weight, ModelError> {
        self.prepare(WeightSource::Embedding(self.checkpoint.tensor(full_name)), 0)
    }

    /// A matrix as an activation, such as the position embedding.
    pub fn upload(&self, name: &str) -> Result<D::Tensor, ModelError> {
        let t = self.checkpoint.tensor(&self.name(name));
        t.fetch()?;
        Ok(self.device.upload(t.rows(), t.cols(), &t.to_f32())?)
    }
}
