//! π0: images, prompt and state in, a chunk of actions out. The names are openpi's.
//!
//! Shapes: B robots, R packed prefix rows, T horizon, A action_dim, W the expert's width.

use std::sync::OnceLock;

use pi0_device::{Dense, Device, HostTensor, MemoryMeter, Norm, Scope, Span, dense};
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, StandardNormal};

use crate::gemma::{Extent, Gemma, LayerCache};
use crate::layout::Layout;
use crate::siglip::SigLip;
use crate::weights::{EMBED, EXPERT, LANGUAGE, PROJECTOR, VISION, Weights};
use crate::{Checkpoint, Config, Inputs, ModelError, SampleOptions};

/// The network on a device.
pub struct Pi0<D: Device> {
    device: D,
    checkpoint: Checkpoint,
    vision: SigLip<D>,
    projector: D::Weight,
    embed_tokens: D::Weight,
    language: Gemma<D>,
    expert: Gemma<D>,
    state_proj: D::Weight,
    action_in_proj: D::Weight,
    /// The half of `action_time_mlp_in` that reads the action.
    action_mlp_in: D::Weight,
    /// The half that reads the time, with the bias: one row a step, for all actions.
    time_mlp_in: D::Weight,
    action_time_mlp_out: D::Weight,
    action_out_proj: D::Weight,
    /// The first weight that is NaN or infinite, if any; looked for when a result first is.
    bad_weight: OnceLock<Option<(String, usize)>>,
}

/// A π0 on some device, where it no longer matters which: what a command or a server holds.
pub trait ActionModel {
    /// Sizes and schedule.
    fn config(&self) -> &Config;

    /// One chunk of actions `[T, A]` for each input, still normalized.
    fn sample_actions(
        &self,
        batch: &[Inputs],
        options: &SampleOptions,
    ) -> Result<Vec<HostTensor>, ModelError>;

    /// The count of the bytes that the device holds, where it keeps one.
    fn memory(&self) -> Option<MemoryMeter> {
        None
    }
}

impl<D: Device> ActionModel for Pi0<D> {
    fn config(&self) -> &Config {
        self.config()
    }

    fn sample_actions(
        &self,
        batch: &[Inputs],
        options: &SampleOptions,
    ) -> Result<Vec<HostTensor>, ModelError> {
        self.sample_actions(batch, options)
    }

    fn memory(&self) -> Option<MemoryMeter> {
        self.device.memory()
    }
}

/// What the denoising steps read of the prefix: each layer's keys and values.
pub struct PrefixCache<D: Device>(pub Vec<LayerCache<D>>);

/// What stays the same in all steps of one inference.
pub(crate) struct Steps<D: Device> {
    /// Positions of the state rows, then of the action rows.
    positions: Vec<u32>,
    first_spans: Vec<Span>,
    later_spans: Vec<Span>,
    /// The time half of the first suffix layer, `[steps, W]`.
    times: D::Tensor,
    /// `[B, W]`.
    pub(crate) states: D::Tensor,
}

impl<D: Device> Pi0<D> {
    /// Packs all weights on `device`. `progress` hears the bytes packed with each weight.
    ///
    /// [`Extent::Cache`] leaves out what nothing reads: the last prefix layer behind its keys and values, and the
    /// prefix's final norm. [`Extent::Whole`] has them, for comparison with the references.
    pub fn load(
        device: D,
        checkpoint: Checkpoint,
        extent: Extent,
        progress: &dyn Fn(u64),
    ) -> Result<Self, ModelError> {
        let c = &checkpoint.config;
        let w = Weights::new(&device, &checkpoint, progress);
        let width = c.expert.width;
        let vision = SigLip::load(&c.vision, &w.pp(VISION))?;
        let projector = w.linear_bias(&[PROJECTOR])?;
        let embed_tokens = w.embedding(EMBED)?;
        let language = Gemma::load(&c.gemma, &w.pp(LANGUAGE), extent)?;
        let expert = Gemma::load(&c.expert, &w.pp(EXPERT), Extent::Whole)?;
        let state_proj = w.linear_exact("state_proj", true, None)?;
        let action_in_proj = w.linear_exact("action_in_proj", true, None)?;
        let action_mlp_in = w.linear_exact("action_time_mlp_in", false, Some(0..width))?;
        let time_mlp_in = w.linear_exact("action_time_mlp_in", true, Some(width..2 * width))?;
        let action_time_mlp_out = w.linear_exact("action_time_mlp_out", true, None)?;
        let action_out_proj = w.linear_exact("action_out_proj", true, None)?;
        Ok(Self {
            vision,
            projector,
            embed_tokens,
            language,
            expert,
            state_proj,
            action_in_proj,
            action_mlp_in,
            time_mlp_in,
            action_time_mlp_out,
            action_out_proj,
            bad_weight: OnceLock::new(),
            device,
            checkpoint,
        })
    }

    /// Sizes and schedule.
    pub fn config(&self) -> &Config {
        &self.checkpoint.config
    }

    /// The device that the weights are on.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// One chunk of actions `[T, A]` for each input, still normalized.
    pub fn sample_actions(
        &self,
        batch: &[Inputs],
        options: &SampleOptions,
    ) -> Result<Vec<HostTensor>, ModelError> {
        let (d, c) = (&self.device, self.config());
        let layout = Layout::new(c, batch)?;
        let times = c.schedule.times(check_steps(options.steps.unwrap_or(c.num_steps))?);

        let embs = self.embed_prefix(batch, &layout)?;
        let prefix = self.prefix_cache(embs, &layout)?;
        let steps = self.prepare_steps(batch, &layout, &times)?;

        let mut noise = Vec::new();
        for (row, inputs) in batch.iter().enumerate() {
            match &inputs.noise {
                Some(given) => noise.extend(given),
                None => {
                    noise.extend(draw_noise(options.seed.wrapping_add(row as u64), c.horizon * c.action_dim))
                }
            }
        }
        let dt = (-1.0 / times.len() as f64) as f32;
        let mut x_t = d.upload(batch.len() * c.horizon, c.action_dim, &noise)?;
        let mut state_cache = None;
        for (step, &t) in times.iter().enumerate() {
            let _scope = Scope::new(d, format_args!("step{step}"));
            let mut v_t = self.denoise_step(&x_t, step, &steps, &prefix, &mut state_cache)?;
            d.tap("v_t", &v_t);
            if batch.iter().any(|i| i.guidance.is_some()) {
                v_t = self.guide(batch, &x_t, &v_t, t)?;
            }
            x_t = d.add_scaled(&x_t, &v_t, dt)?;
            d.tap("x_next", &x_t);
        }
        self.finish(d.download(&x_t)?)
    }

    /// Image tokens and prompt tokens of the whole batch, packed: `[R, width]`.
    pub fn embed_prefix(&self, batch: &[Inputs], layout: &Layout) -> Result<D::Tensor, ModelError> {
        let (d, c) = (&self.device, self.config());
        let patches = patchify(batch, layout, c);
        let patches = d.upload(layout.images.len() * layout.patches, c.vision.patch_values(), &patches)?;
        let images = self.vision.forward(d, &patches, &self.projector)?;
        let _scope = Scope::new(d, format_args!("prefix"));
        let tokens: Vec<u32> = batch.iter().flat_map(|i| i.tokens.iter().copied()).collect();
        let embs = match tokens.as_slice() {
            [] => images,
            tokens => {
                let text = d.embed(&self.embed_tokens, tokens, (c.gemma.width as f32).sqrt())?;
                d.concat_rows(&[&images, &text])?
            }
        };
        d.tap("embs", &embs);
        Ok(embs)
    }

    /// Runs the language model over the prefix and keeps its keys and values.
    pub fn prefix_cache(&self, embs: D::Tensor, layout: &Layout) -> Result<PrefixCache<D>, ModelError> {
        let d = &self.device;
        let _scope = Scope::new(d, format_args!("prefix"));
        let (positions, spans) = (layout.prefix_positions(), layout.prefix_spans());
        let mut cache = Vec::with_capacity(self.language.layers().len());
        let out = self.language.forward(d, embs, &positions, &[], &spans, |layer| cache.push(layer))?;
        if let (Some(out), Some(norm)) = (out, self.language.norm()) {
            d.tap("norm", &d.rms_norm(&out, norm)?);
        }
        Ok(PrefixCache(cache))
    }

    /// What all steps share: state rows, the time half of the suffix's first layer, positions and spans.
    pub(crate) fn prepare_steps(
        &self,
        batch: &[Inputs],
        layout: &Layout,
        times: &[f32],
    ) -> Result<Steps<D>, ModelError> {
        let (d, c) = (&self.device, self.config());
        let _scope = Scope::new(d, format_args!("suffix"));
        let states: Vec<f32> = batch.iter().flat_map(|i| i.state.iter().copied()).collect();
        let states = d.linear(&d.upload(batch.len(), c.state_dim, &states)?, &self.state_proj)?;
        d.tap("state_emb", &states);
        let width = c.expert.width;
        let embedded = time_embedding(times, width, c.min_period, c.max_period);
        let embedded = d.upload(times.len(), width, &embedded)?;
        d.tap("time_emb", &embedded);
        Ok(Steps {
            positions: layout.suffix_positions(),
            first_spans: layout.first_step_spans(),
            later_spans: layout.later_step_spans(),
            times: d.linear(&embedded, &self.time_mlp_in)?,
            states,
        })
    }

    /// Noisy actions `[B T, A]` at one step's time, embedded: `[B T, W]`.
    pub(crate) fn embed_suffix(
        &self,
        x_t: &D::Tensor,
        step: usize,
        steps: &Steps<D>,
    ) -> Result<D::Tensor, ModelError> {
        let d = &self.device;
        let action_emb = d.linear(x_t, &self.action_in_proj)?;
        d.tap("action_emb", &action_emb);
        let time = d.slice_rows(&steps.times, step..step + 1)?;
        let h = dense(d, &Dense { residual: Some(&time), ..Dense::new(&action_emb, &self.action_mlp_in) })?;
        d.tap("time_mlp_in", &h);
        let embs = d.linear(&d.silu(&h)?, &self.action_time_mlp_out)?;
        d.tap("time_mlp_out", &embs);
        Ok(embs)
    }

    /// The velocity `v_t` `[B T, A]`. The first step also runs the state rows and leaves their keys and values, which
    /// no later step changes, in `state_cache`.
    pub(crate) fn denoise_step(
        &self,
        x_t: &D::Tensor,
        step: usize,
        steps: &Steps<D>,
        prefix: &PrefixCache<D>,
        state_cache: &mut Option<Vec<LayerCache<D>>>,
    ) -> Result<D::Tensor, ModelError> {
        let d = &self.device;
        let _scope = Scope::new(d, format_args!("suffix"));
        let actions = self.embed_suffix(x_t, step, steps)?;
        let robots = d.shape(&steps.states)[0];
        if let Some(states) = state_cache {
            let (positions, cached) = (&steps.positions[robots..], [&*prefix.0, states]);
            let out = self.expert.forward(d, actions, positions, &cached, &steps.later_spans, drop)?;
            return self.velocity(out);
        }
        let embs = d.concat_rows(&[&steps.states, &actions])?;
        d.tap("embs", &embs);
        let mut layers = Vec::with_capacity(prefix.0.len());
        let keep = |layer| layers.push(layer);
        let out = self.expert.forward(d, embs, &steps.positions, &[&prefix.0], &steps.first_spans, keep)?;
        let v_t = self.velocity(out)?;
        let states = |l: &LayerCache<D>| {
            Ok(LayerCache { k: d.slice_rows(&l.k, 0..robots)?, v: d.slice_rows(&l.v, 0..robots)? })
        };
        *state_cache = Some(layers.iter().map(states).collect::<Result<_, ModelError>>()?);
        Ok(d.slice_rows(&v_t, robots..d.shape(&v_t)[0])?)
    }

    /// What the expert's last layer leaves, as velocities: `action_out_proj(norm(out))`.
    fn velocity(&self, out: Option<D::Tensor>) -> Result<D::Tensor, ModelError> {
        let out = out.expect("the expert is loaded whole");
        let norm = self.expert.norm().map(Norm::Rms);
        let call = Dense { norm, norm_tap: Some("norm"), ..Dense::new(&out, &self.action_out_proj) };
        Ok(dense(&self.device, &call)?)
    }

    /// Pulls the velocities of guided robots towards their previous chunks; on the host, where it is cheap.
    fn guide(
        &self,
        batch: &[Inputs],
        x_t: &D::Tensor,
        v_t: &D::Tensor,
        t: f32,
    ) -> Result<D::Tensor, ModelError> {
        let d = &self.device;
        let (x, mut v) = (d.download(x_t)?, d.download(v_t)?);
        let chunk = x.data.len() / batch.len();
        for ((inputs, x), v) in
            batch.iter().zip(x.data.chunks_exact(chunk)).zip(v.data.chunks_exact_mut(chunk))
        {
            if let Some(guidance) = &inputs.guidance {
                guidance.apply(x, v, t, self.config().action_dim);
            }
        }
        Ok(d.upload(v.rows(), v.cols(), &v.data)?)
    }

    /// Splits the batch, after making sure that the result means something.
    fn finish(&self, x: HostTensor) -> Result<Vec<HostTensor>, ModelError> {
        let c = self.config();
        if x.data.iter().any(|x| !x.is_finite()) {
            // Once: reading gigabytes for every request that is out of all proportion would stop a server.
            let bad_weight = self.bad_weight.get_or_init(|| self.checkpoint.find_not_finite());
            return Err(ModelError::NotFinite(match bad_weight {
                Some((name, i)) => format!("the weight {name} holds NaN or infinity at index {i}"),
                None => "all weights are finite; sums overflowed, so the state, the noise or the previous chunk is \
                         out of all proportion"
                    .into(),
            }));
        }
        let chunk = |data: &[f32]| HostTensor::new([c.horizon, c.action_dim], data.to_vec());
        Ok(x.data.chunks_exact(c.horizon * c.action_dim).map(chunk).collect())
    }
}

/// Numbers of denoising steps that make sense.
pub const STEPS: std::ops::RangeInclusive<usize> = 1..=1000;

fn check_steps(steps: usize) -> Result<usize, ModelError> {
    match STEPS.contains(&steps) {
        true => Ok(steps),
        false => {
            Err(ModelError::Call(format!("{steps} denoising steps; from 1 to 1000 make sense, 10 is usual")))
        }
    }
}

/// Standard normal noise, the same for the same seed on every machine.
fn draw_noise(seed: u64, count: usize) -> Vec<f32> {
    StandardNormal.sample_iter(ChaCha12Rng::seed_from_u64(seed)).take(count).collect()
}

/// For each of `times` a row `[width]`: sines, then cosines, at `width / 2` periods from `min_period` to `max_period`,
/// computed in f64.
pub fn time_embedding(times: &[f32], width: usize, min_period: f64, max_period: f64) -> Vec<f32> {
    let half = width / 2;
    let mut rows = vec![0.0; times.len() * 2 * half];
    for i in 0..half {
        let fraction = if half > 1 { i as f64 / (half - 1) as f64 } else { 0.0 };
        let period = min_period * (max_period / min_period).powf(fraction);
        for (row, &t) in times.iter().enumerate() {
            let (sin, cos) = (f64::from(t) * std::f64::consts::TAU / period).sin_cos();
            rows[row * 2 * half + i] = sin as f32;
            rows[row * 2 * half + half + i] = cos as f32;
        }
    }
    rows
}

/// The patches of all present images, row-major, each as `[3, P, P]` flattened: `[N S, 3 P²]`.
pub fn patchify(batch: &[Inputs], layout: &Layout, c: &Config) -> Vec<f32> {
    let (size, p) = (c.vision.image_size, c.vision.patch_size);
    let mut rows = Vec::with_capacity(layout.images.len() * layout.patches * c.vision.patch_values());
    for &(robot, camera) in &layout.images {
        let image = batch[robot].images[camera].as_ref().expect("the layout lists present images");
        for (py, px) in (0..size / p).flat_map(|y| (0..size / p).map(move |x| (y * p, x * p))) {
            for (channel, y) in (0..3).flat_map(|channel| (0..p).map(move |y| (channel, y))) {
                let start = (channel * size + py + y) * size + px;
                rows.extend_from_slice(&image[start..start + p]);
            }
        }
    }
    rows
}
