//! SigLIP So400m/14: images to patch tokens.
//!
//! Shapes: N images, S = (image / patch)² patches of each, H hidden, F intermediate.

use pi0_device::{Activation, Attention, Dense, Device, KeyValue, Keys, Norm, Qkv, Scope, Span, dense, qkv};

use crate::weights::Weights;
use crate::{ModelError, VisionConfig};

/// The vision tower.
pub struct SigLip<D: Device> {
    config: VisionConfig,
    patch_embedding: D::Weight,
    /// `[S, H]`.
    position_embedding: D::Tensor,
    layers: Vec<SigLipLayer<D>>,
    post_layernorm: D::Weight,
}

/// One encoder layer: attention and MLP, each after a layer norm and around a residual.
pub struct SigLipLayer<D: Device> {
    heads: usize,
    head_dim: usize,
    layer_norm1: D::Weight,
    qkv: D::Weight,
    out_proj: D::Weight,
    layer_norm2: D::Weight,
    fc1: D::Weight,
    fc2: D::Weight,
}

impl<D: Device> SigLip<D> {
    pub(crate) fn load(config: &VisionConfig, w: &Weights<'_, D>) -> Result<Self, ModelError> {
        let layer = |i| SigLipLayer::load(config, &w.pp("encoder.layers").pp(i));
        Ok(Self {
            config: config.clone(),
            patch_embedding: w.pp("embeddings").linear_exact("patch_embedding", true, None)?,
            position_embedding: w.upload("embeddings.position_embedding.weight")?,
            layers: (0..config.num_hidden_layers).map(layer).collect::<Result<_, _>>()?,
            post_layernorm: w.layer_norm("post_layernorm")?,
        })
    }

    /// The tower and the projector behind it: patches `[N S, 3 P²]` to image tokens `[N S, width]`.
    pub fn forward(
        &self,
        d: &D,
        patches: &D::Tensor,
        projector: &D::Weight,
    ) -> pi0_device::Result<D::Tensor> {
        let _scope = Scope::new(d, format_args!("vision"));
        let mut x = self.embed(d, patches)?;
        let spans = image_spans(d.shape(&x)[0], self.config.patches());
        for (i, layer) in self.layers.iter().enumerate() {
            let _scope = Scope::new(d, format_args!("layer{i}"));
            x = layer.forward(d, &x, &spans)?;
            d.tap("out", &x);
        }
        self.project(d, &x, projector)
    }

    /// `projector(post_layernorm(x))`: `[N S, H]` to image tokens `[N S, width]`.
    pub(crate) fn project(
        &self,
        d: &D,
        x: &D::Tensor,
        projector: &D::Weight,
    ) -> pi0_device::Result<D::Tensor> {
        let tokens = dense(
            d,
            &Dense {
                norm: Some(Norm::Layer(&self.post_layernorm)),
                norm_tap: Some("post_ln"),
                ..Dense::new(x, projector)
            },
        )?;
        d.tap("projector", &tokens);
        Ok(tokens)
    }

    /// Patches `[N S, 3 P²]` to embedded patches with their positions `[N S, H]`.
    pub fn embed(&self, d: &D, patches: &D::Tensor) -> pi0_device::Result<D::Tensor> {
        let x = dense(
            d,
            &Dense {
                residual: Some(&self.position_embedding),
                branch_tap: Some("patch_conv"),
                ..Dense::new(patches, &self.patch_embedding)
            },
        )?;
        d.tap("embeddings", &x);
        Ok(x)
    }

    /// The encoder layers.
    pub fn layers(&self) -> &[SigLipLayer<D>] {
        &self.layers
    }
}

/// Every patch of an image sees every patch of the same image.
pub fn image_spans(rows: usize, patches: usize) -> Vec<Span> {
    let images = (0..rows).step_by(patches).map(|start| start..start + patches);
    images.map(|rows| Span { queries: rows.clone(), keys: vec![Keys { part: 0, rows }] }).collect()
}

impl<D: Device> SigLipLayer<D> {
    pub(crate) fn load(c: &VisionConfig, w: &Weights<'_, D>) -> Result<Self, ModelError> {
        Ok(Self {
            heads: c.num_attention_heads,
            head_dim: c.head_dim(),
            layer_norm1: w.layer_norm("layer_norm1")?,
            qkv: w.pp("self_attn").linear_bias(&["q_proj", "k_proj", "v_proj"])?,
            out_proj: w.pp("self_attn").linear_bias(&["out_proj"])?,
            layer_norm2: w.layer_norm("layer_norm2")?,
            fc1: w.pp("mlp").linear_bias(&["fc1"])?,
            fc2: w.pp("mlp").linear_bias(&["fc2"])?,
        })
    }

    /// `x` `[N S, H]` to the same.
    pub fn forward(&self, d: &D, x: &D::Tensor, spans: &[Span]) -> pi0_device::Result<D::Tensor> {
        let x = self.attention(d, x, spans)?;
        self.mlp(d, &x)
    }

    /// `x + out_proj(attention(layer_norm1(x)))`.
    pub fn attention(&self, d: &D, x: &D::Tensor, spans: &[Span]) -> pi0_device::Result<D::Tensor> {
        let (heads, head_dim) = (self.heads, self.head_dim);
        let [q, k, v] = qkv(
            d,
            &Qkv {
                x,
                norm: Norm::Layer(&self.layer_norm1),
                weight: &self.qkv,
                heads,
                kv_heads: heads,
                head_dim,
                positions: None,
                norm_tap: Some("ln1"),
            },
        )?;
        let scale = (head_dim as f32).powf(-0.5);
        let spec = Attention { heads, kv_heads: heads, head_dim, scale, spans };
        let a = d.attention(&q, &[KeyValue { k: &k, v: &v }], &spec)?;
        dense(d, &Dense { residual: Some(x), branch_tap: Some("attn"), ..Dense::new(&a, &self.out_proj) })
    }

    /// `x + fc2(gelu(fc1(layer_norm2(x))))`.
    pub fn mlp(&self, d: &D, x: &D::Tensor) -> pi0_device::Result<D::Tensor> {
        let h = dense(
            d,
            &Dense {
                norm: Some(Norm::Layer(&self.layer_norm2)),
                activation: Some(Activation::Gelu),
                norm_tap: Some("ln2"),
                ..Dense::new(x, &self.fc1)
            },
        )?;
        dense(d, &Dense { residual: Some(x), branch_tap: Some("mlp"), ..Dense::new(&h, &self.fc2) })
    }
}
