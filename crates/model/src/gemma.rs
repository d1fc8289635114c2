//! Gemma: the language model that reads the prefix, and the action expert, which is the same with its own
//! weights. The norms of π0.5's expert are adaptive: time drives them ([`crate::modulation`]).
//!
//! Shapes: R packed rows, W width, Q = heads · head_dim, C = kv_heads · head_dim, F mlp_dim.

use std::iter::once;

use pi0_device::{
    Activation, Attention, Dense, Device, KeyValue, Modulation, Norm, Qkv, Result, Scope, Span, dense, qkv,
};
use smallvec::SmallVec;

use crate::modulation::Drive;
use crate::weights::Weights;
use crate::{GemmaConfig, ModelError};

/// A stack of layers and the norm behind them.
pub struct Gemma<D: Device> {
    layers: Vec<GemmaLayer<D>>,
    /// Absent where nothing reads the last layer's output.
    norm: Option<TowerNorm<D>>,
}

/// A norm of a tower.
pub enum TowerNorm<D: Device> {
    /// Its weight says how the rows are scaled.
    Rms(D::Weight),
    /// It has no weight: each call brings what drives it.
    Adaptive,
}

/// Whether a tower's norms have weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Norms {
    /// Yes: the language model, and π0's expert.
    Rms,
    /// No: π0.5's expert.
    Adaptive,
}

impl<D: Device> TowerNorm<D> {
    fn load(w: &Weights<'_, D>, name: &str, norms: Norms) -> std::result::Result<Self, ModelError> {
        Ok(match norms {
            Norms::Rms => Self::Rms(w.rms_norm(name)?),
            Norms::Adaptive => Self::Adaptive,
        })
    }

    /// As the norm of a fused layer; `by` is what drives it where it is adaptive.
    ///
    /// # Panics
    /// If an adaptive norm gets nothing to drive it: [`Pi0`](crate::Pi0) drives the towers that it loads so.
    fn of<'a>(&'a self, by: Option<Modulation<'a, D::Tensor>>) -> Norm<'a, D::Tensor, D::Weight> {
        match self {
            Self::Rms(weight) => Norm::Rms(weight),
            Self::Adaptive => Norm::Ada(by.expect("an adaptive tower is driven")),
        }
    }
}

/// Keys (after rotation) and values of one layer, `[R, C]` each.
pub struct LayerCache<D: Device> {
    /// Keys.
    pub k: D::Tensor,
    /// Values.
    pub v: D::Tensor,
}

impl<D: Device> LayerCache<D> {
    /// As an operand of attention.
    pub fn key_value(&self) -> KeyValue<'_, D::Tensor> {
        KeyValue { k: &self.k, v: &self.v }
    }
}

/// Rows after a layer (nothing where [`Extent::Cache`] ends), and its keys and values.
pub type Output<D> = (Option<<D as Device>::Tensor>, LayerCache<D>);

/// How much of a tower to load.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Extent {
    /// All of it.
    Whole,
    /// Up to the keys and values of the last layer: all that is read of the prefix.
    Cache,
}

/// One layer.
pub struct GemmaLayer<D: Device> {
    config: GemmaConfig,
    input_layernorm: TowerNorm<D>,
    body: Body<D>,
}

/// What drives both norms of one layer and gates their branches; nothing in a tower whose norms have weights.
pub type LayerDrive<'a, T> = Option<[Modulation<'a, T>; 2]>;

enum Body<D: Device> {
    Whole(Whole<D>),
    /// The last prefix layer, of which only keys and values are read.
    Cache {
        kv: D::Weight,
    },
}

/// The weights of a whole layer, beside its first norm.
pub(crate) struct Whole<D: Device> {
    qkv: D::Weight,
    o_proj: D::Weight,
    post_attention_layernorm: TowerNorm<D>,
    gate_up: D::Weight,
    down_proj: D::Weight,
}

impl<D: Device> Gemma<D> {
    pub(crate) fn load(
        config: &GemmaConfig,
        w: &Weights<'_, D>,
        norms: Norms,
        extent: Extent,
    ) -> std::result::Result<Self, ModelError> {
        let last = config.depth - 1;
        let layer = |i| {
            let extent = if i == last { extent } else { Extent::Whole };
            GemmaLayer::load(config, &w.pp("layers").pp(i), norms, extent)
        };
        Ok(Self {
            layers: (0..config.depth).map(layer).collect::<std::result::Result<_, _>>()?,
            norm: (extent == Extent::Whole).then(|| TowerNorm::load(w, "norm", norms)).transpose()?,
        })
    }

    /// Runs all layers over `x` `[R, W]`. `cached` holds, for each layer, parts 1, 2 … of its attention; part 0
    /// is its own keys and values, which `keep` gets. `drive` drives adaptive norms. Returns the last layer's output
    /// before the final norm (nothing for [`Extent::Cache`]).
    #[allow(clippy::too_many_arguments)] // a layer's seven, all different
    pub fn forward(
        &self,
        d: &D,
        x: D::Tensor,
        positions: &[u32],
        cached: &[&[LayerCache<D>]],
        spans: &[Span],
        drive: Option<Drive<'_, D>>,
        mut keep: impl FnMut(LayerCache<D>),
    ) -> Result<Option<D::Tensor>> {
        let mut x = Some(x);
        for (i, layer) in self.layers.iter().enumerate() {
            let _scope = Scope::new(d, format_args!("layer{i}"));
            let Some(rows) = x else { break };
            let earlier: SmallVec<[_; 2]> = cached.iter().map(|part| part[i].key_value()).collect();
            let drive = drive.map(|drive| drive.layer(d, i));
            let (next, cache) = layer.forward(d, &rows, positions, &earlier, spans, drive)?;
            d.tap("k_cache", &cache.k);
            d.tap("v_cache", &cache.v);
            if let Some(next) = &next {
                d.tap("out", next);
            }
            keep(cache);
            x = next;
        }
        Ok(x)
    }

    /// Runs all layers over `x` `[R, W]`, of the last one only `picked` rows behind their keys and values, each with its
    /// span of `last_spans`: where nothing reads the others.
    #[allow(clippy::too_many_arguments)] // all different
    pub fn forward_to(
        &self,
        d: &D,
        mut x: D::Tensor,
        positions: &[u32],
        spans: &[Span],
        picked: &[usize],
        last_spans: &[Span],
        mut keep: impl FnMut(LayerCache<D>),
    ) -> Result<Option<D::Tensor>> {
        for (i, layer) in self.layers.iter().enumerate() {
            let _scope = Scope::new(d, format_args!("layer{i}"));
            let (next, cache) = match &layer.body {
                Body::Whole(w) if i + 1 == self.layers.len() => {
                    let [q, k, v] = layer.qkv(d, &x, w, positions, None)?;
                    let (q, x) = (pick_rows(d, &q, picked)?, pick_rows(d, &x, picked)?);
                    let cache = LayerCache { k, v };
                    let x = layer.attend(d, &x, &q, w, &cache, &[], last_spans, None)?;
                    (Some(layer.mlp(d, &x, w, None)?), cache)
                }
                _ => layer.forward(d, &x, positions, &[], spans, None)?,
            };
            keep(cache);
            match next {
                Some(next) => x = next,
                None => return Ok(None),
            }
        }
        Ok(Some(x))
    }

    /// The final norm alone; `None` for [`Extent::Cache`]. `drive` as for [`forward`](Self::forward).
    pub fn norm<'a>(&'a self, d: &D, drive: Option<Drive<'a, D>>) -> Option<Norm<'a, D::Tensor, D::Weight>> {
        let norm = self.norm.as_ref()?;
        Some(norm.of(drive.map(|drive| drive.last(d))))
    }

    /// The layers.
    pub fn layers(&self) -> &[GemmaLayer<D>] {
        &self.layers
    }
}

impl<D: Device> GemmaLayer<D> {
    pub(crate) fn load(
        config: &GemmaConfig,
        w: &Weights<'_, D>,
        norms: Norms,
        extent: Extent,
    ) -> std::result::Result<Self, ModelError> {
        let attn = w.pp("self_attn");
        Ok(Self {
            config: config.clone(),
            input_layernorm: TowerNorm::load(w, "input_layernorm", norms)?,
            body: match extent {
                Extent::Cache => Body::Cache { kv: attn.linear(&["k_proj", "v_proj"])? },
                Extent::Whole => Body::Whole(Whole {
                    qkv: attn.linear(&["q_proj", "k_proj", "v_proj"])?,
                    o_proj: attn.linear(&["o_proj"])?,
                    post_attention_layernorm: TowerNorm::load(w, "post_attention_layernorm", norms)?,
                    gate_up: w.pp("mlp").linear(&["gate_proj", "up_proj"])?,
                    down_proj: w.pp("mlp").linear(&["down_proj"])?,
                }),
            },
        })
    }

    /// The weights that [`attention`](Self::attention) and [`mlp`](Self::mlp) read; none in a layer cut down to its
    /// keys and values.
    pub(crate) fn whole(&self) -> Option<&Whole<D>> {
        match &self.body {
            Body::Whole(w) => Some(w),
            Body::Cache { .. } => None,
        }
    }

    /// `x` `[R, W]` to the same, with this layer's keys and values.
    pub fn forward(
        &self,
        d: &D,
        x: &D::Tensor,
        positions: &[u32],
        cached: &[KeyValue<'_, D::Tensor>],
        spans: &[Span],
        drive: LayerDrive<'_, D::Tensor>,
    ) -> Result<Output<D>> {
        let [first, second] = split(drive);
        match &self.body {
            Body::Cache { kv } => Ok((None, self.keys_values(d, x, kv, positions, first)?)),
            Body::Whole(w) => {
                let (x, cache) = self.attention(d, x, w, positions, cached, spans, first)?;
                Ok((Some(self.mlp(d, &x, w, second)?), cache))
            }
        }
    }

    /// `x + gate * o_proj(attention(input_layernorm(x)))`; without `by` there is no gate.
    #[allow(clippy::too_many_arguments)] // all different
    pub(crate) fn attention(
        &self,
        d: &D,
        x: &D::Tensor,
        w: &Whole<D>,
        positions: &[u32],
        cached: &[KeyValue<'_, D::Tensor>],
        spans: &[Span],
        by: Option<Modulation<'_, D::Tensor>>,
    ) -> Result<(D::Tensor, LayerCache<D>)> {
        let [q, k, v] = self.qkv(d, x, w, positions, by)?;
        let cache = LayerCache { k, v };
        let out = self.attend(d, x, &q, w, &cache, cached, spans, by)?;
        Ok((out, cache))
    }

    /// Queries, keys and values of `input_layernorm(x)`, turned.
    fn qkv(
        &self,
        d: &D,
        x: &D::Tensor,
        w: &Whole<D>,
        positions: &[u32],
        by: Option<Modulation<'_, D::Tensor>>,
    ) -> Result<[D::Tensor; 3]> {
        let GemmaConfig { num_heads: heads, num_kv_heads: kv_heads, head_dim, .. } = self.config;
        qkv(
            d,
            &Qkv {
                x,
                norm: self.input_layernorm.of(by),
                weight: &w.qkv,
                heads,
                kv_heads,
                head_dim,
                positions: Some(positions),
                norm_tap: Some("ln1"),
            },
        )
    }

    /// `x + gate * o_proj(attention(q))`.
    #[allow(clippy::too_many_arguments)] // all different
    fn attend(
        &self,
        d: &D,
        x: &D::Tensor,
        q: &D::Tensor,
        w: &Whole<D>,
        cache: &LayerCache<D>,
        cached: &[KeyValue<'_, D::Tensor>],
        spans: &[Span],
        by: Option<Modulation<'_, D::Tensor>>,
    ) -> Result<D::Tensor> {
        let GemmaConfig { num_heads: heads, num_kv_heads: kv_heads, head_dim, .. } = self.config;
        let a = {
            let parts: SmallVec<[_; 3]> = once(cache.key_value()).chain(cached.iter().copied()).collect();
            let scale = (head_dim as f32).powf(-0.5);
            d.attention(q, &parts, &Attention { heads, kv_heads, head_dim, scale, spans })?
        };
        let out =
            Dense { gate: by, residual: Some(x), branch_tap: Some("attn"), ..Dense::new(&a, &w.o_proj) };
        dense(d, &out)
    }

    /// `x + gate * down_proj(geglu(gate_up(post_attention_layernorm(x))))`; without `by` there is no gate.
    pub(crate) fn mlp(
        &self,
        d: &D,
        x: &D::Tensor,
        w: &Whole<D>,
        by: Option<Modulation<'_, D::Tensor>>,
    ) -> Result<D::Tensor> {
        let h = dense(
            d,
            &Dense {
                norm: Some(w.post_attention_layernorm.of(by)),
                activation: Some(Activation::Geglu),
                norm_tap: Some("ln2"),
                ..Dense::new(x, &w.gate_up)
            },
        )?;
        let out =
            Dense { gate: by, residual: Some(x), branch_tap: Some("mlp"), ..Dense::new(&h, &w.down_proj) };
        dense(d, &out)
    }

    fn keys_values(
        &self,
        d: &D,
        x: &D::Tensor,
        kv: &D::Weight,
        positions: &[u32],
        by: Option<Modulation<'_, D::Tensor>>,
    ) -> Result<LayerCache<D>> {
        let norm = Some(self.input_layernorm.of(by));
        let y = dense(d, &Dense { norm, norm_tap: Some("ln1"), ..Dense::new(x, kv) })?;
        let width = self.config.num_kv_heads * self.config.head_dim;
        let k = d.slice_cols(&y, 0..width)?;
        Ok(LayerCache {
            k: d.rope(&k, positions, self.config.head_dim)?,
            v: d.slice_cols(&y, width..2 * width)?,
        })
    }
}

/// These rows of `x`, in this order.
pub(crate) fn pick_rows<D: Device>(d: &D, x: &D::Tensor, rows: &[usize]) -> Result<D::Tensor> {
    let slices =
        rows.iter().map(|&row| d.slice_rows(x, row..row + 1)).collect::<Result<SmallVec<[_; 8]>>>()?;
    match slices.as_slice() {
        [one] => Ok(one.clone()),
        many => d.concat_rows(&many.iter().collect::<SmallVec<[_; 8]>>()),
    }
}

/// What drives each of the two norms.
pub(crate) fn split<T>(drive: LayerDrive<'_, T>) -> [Option<Modulation<'_, T>>; 2] {
    drive.map_or([None, None], |[first, second]| [Some(first), Some(second)])
}
