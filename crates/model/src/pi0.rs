//! π0, π0.5 and π0-FAST: images, prompt and state in, a chunk of actions out. The names are openpi's.
//!
//! π0 and π0.5 differ in how state and time reach the action expert, [`Conditioning`], and in nothing else. π0-FAST has no
//! expert: the language model itself goes on behind the prompt ([`crate::answer`]).
//!
//! Shapes: B robots, R packed prefix rows, T horizon, A action_dim, W the expert's width, N steps.

use std::sync::{Arc, Mutex, OnceLock, PoisonError};

use pi0_device::{Dense, Device, HostTensor, MemoryMeter, Modulation, Norm, Scope, Span, dense};
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::SeedableRng;
use rand_distr::{Distribution, StandardNormal};

use crate::answer::Answer;
use crate::gemma::{Extent, Gemma, LayerCache, Norms};
use crate::layout::Layout;
use crate::modulation::{Drive, ModulationCache, Modulations};
use crate::siglip::SigLip;
use crate::weights::{EMBED, EXPERT, LANGUAGE, PROJECTOR, VISION, Weights};
use crate::{Checkpoint, Config, Inputs, Kind, ModelError, Rtc, SampleOptions};

/// Whether nothing reads this tensor of the language model where only its keys and values count: see
/// [`Extent::Cache`].
fn unread(name: &str, depth: usize) -> bool {
    let Some(rest) = name.strip_prefix(LANGUAGE) else { return false };
    let last = rest.strip_prefix(&format!(".layers.{}.", depth - 1));
    let read = ["input_layernorm", "self_attn.k_proj", "self_attn.v_proj"];
    rest.starts_with(".norm.") || last.is_some_and(|leaf| !read.iter().any(|read| leaf.starts_with(read)))
}

/// The network on a device.
pub struct Pi0<D: Device> {
    device: D,
    checkpoint: Checkpoint,
    vision: SigLip<D>,
    projector: D::Weight,
    pub(crate) embed_tokens: D::Weight,
    pub(crate) language: Gemma<D>,
    tail: Tail<D>,
    /// The first weight that is NaN or infinite, if any; looked for when a result first is.
    bad_weight: OnceLock<Option<(String, usize)>>,
}

/// What makes actions of the prefix.
enum Tail<D: Device> {
    /// π0 and π0.5 denoise them.
    Expert(Expert<D>),
    /// π0-FAST writes them as tokens.
    Answer(Answer<D>),
}

/// The action expert and what stands around it.
struct Expert<D: Device> {
    tower: Gemma<D>,
    conditioning: Conditioning<D>,
    action_in_proj: D::Weight,
    action_out_proj: D::Weight,
}

/// How state and time reach the action expert.
enum Conditioning<D: Device> {
    /// π0: the state is a row before the actions, and time is mixed into every action row.
    Rows {
        state_proj: D::Weight,
        /// The half of `action_time_mlp_in` that reads the action.
        action_mlp_in: D::Weight,
        /// The half that reads the time, with the bias: one row a step, for all actions.
        time_mlp_in: D::Weight,
        action_time_mlp_out: D::Weight,
        /// The times of the last inference, embedded: they are the same from one to the next.
        embedded: Mutex<Option<Embedded>>,
    },
    /// π0.5: the state stands in the prompt, and time drives the expert's norms.
    Norms(ModulationCache<D>),
}

/// Times, and [`time_embedding`] of them.
struct Embedded {
    times: Vec<f32>,
    rows: Vec<f32>,
}

/// A network of the family on some device, where it no longer matters which: what a command or a server holds.
pub trait ActionModel {
    /// Sizes and schedule.
    fn config(&self) -> &Config;

    /// One chunk of actions `[T, A]` for each input, still normalized; of π0-FAST the tokens `[1, n]` of the answer that
    /// they are to be read from.
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
pub struct Steps<D: Device> {
    /// Positions of the state rows, if any, then of the action rows.
    positions: Vec<u32>,
    first_spans: Vec<Span>,
    later_spans: Vec<Span>,
    pub(crate) condition: Condition<D>,
    /// Where some actions are known and must stay as they are.
    known: Option<Known<D>>,
}

/// State and time of all steps, as [`Conditioning`] has them.
pub(crate) enum Condition<D: Device> {
    Rows {
        /// The time half of the first suffix layer, `[N, W]`.
        times: D::Tensor,
        /// `[B, W]`.
        states: D::Tensor,
    },
    Norms {
        modulations: Arc<Modulations<D>>,
        /// For each step, and in it for each action row, a row of the modulations: `[N, B T]`.
        rows: Vec<u32>,
    },
}

/// Euler steps that leave known actions as they are.
struct Known<D: Device> {
    /// As modulations `[2, 3 A]` of which only the gates are read: how far a step goes in a free row and in a known one.
    steps: D::Tensor,
    /// For each action row, which of the two it is.
    rows: Vec<u32>,
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
        let whole = extent == Extent::Whole || c.kind == Kind::Pi0Fast;
        let loading = checkpoint.preferring(&device.preferred())?;
        let reading = loading.read_ahead(|name| whole || !unread(name, c.gemma.depth));
        let w = Weights::new(&device, &loading, progress).counting(&checkpoint);
        let vision = SigLip::load(&c.vision, &w.pp(VISION))?;
        let projector = w.linear_bias(&[PROJECTOR])?;
        let of_prefix = if whole { Extent::Whole } else { extent };
        let language = Gemma::load(&c.gemma, &w.pp(LANGUAGE), Norms::Rms, of_prefix)?;
        let tail = match c.kind {
            Kind::Pi0 | Kind::Pi05 => Tail::Expert(Expert::load(&device, &loading, &w)?),
            Kind::Pi0Fast => Tail::Answer(Answer::load(c, &w, extent)?),
        };
        if let Some(reading) = &reading {
            reading.finish(progress)?;
        }
        // Last: where it is decompressed, that takes as long as much of the rest.
        let embed_tokens = w.embedding(EMBED)?;
        let bad_weight = OnceLock::new();
        Ok(Self { vision, projector, embed_tokens, language, tail, bad_weight, device, checkpoint })
    }

    /// Sizes and schedule.
    pub fn config(&self) -> &Config {
        &self.checkpoint.config
    }

    /// The device that the weights are on.
    pub fn device(&self) -> &D {
        &self.device
    }

    /// One chunk of actions `[T, A]` for each input, still normalized; of π0-FAST the tokens `[1, n]` of the answer that
    /// they are to be read from.
    pub fn sample_actions(
        &self,
        batch: &[Inputs],
        options: &SampleOptions,
    ) -> Result<Vec<HostTensor>, ModelError> {
        let (d, c) = (&self.device, self.config());
        if let Tail::Answer(answer) = &self.tail {
            return self.write_answers(answer, batch, options);
        }
        let layout = Layout::new(c, batch)?;
        let times = c.schedule.times(check_steps(options.steps.unwrap_or(c.num_steps))?);

        let embs = self.embed_prefix(batch, &layout)?;
        let prefix = self.prefix_cache(embs, &layout)?;
        let steps = self.prepare_steps(batch, &layout, &times)?;

        let mut noise = Vec::new();
        for (row, inputs) in batch.iter().enumerate() {
            let start = noise.len();
            match &inputs.noise {
                Some(given) => noise.extend(given),
                None => {
                    noise.extend(draw_noise(options.seed.wrapping_add(row as u64), c.horizon * c.action_dim))
                }
            }
            if let Some(Rtc::Trained(clean)) = &inputs.rtc {
                let known = clean.rows(c.action_dim);
                noise[start..start + known.len()].copy_from_slice(known);
            }
        }
        let dt = -1.0 / times.len() as f64;
        let mut x_t = d.upload(batch.len() * c.horizon, c.action_dim, &noise)?;
        let mut state_cache = None;
        for step in 0..times.len() {
            let _scope = Scope::new(d, format_args!("step{step}"));
            let mut v_t = self.denoise_step(&x_t, step, &steps, &prefix, &mut state_cache)?;
            d.tap("v_t", &v_t);
            if batch.iter().any(|i| matches!(i.rtc, Some(Rtc::Guided(_)))) {
                v_t = self.guide(batch, &x_t, &v_t, 1.0 + step as f64 * dt)?;
                d.tap("v_guided", &v_t);
            }
            x_t = match &steps.known {
                None => d.add_scaled(&x_t, &v_t, dt as f32)?,
                Some(Known { steps: table, rows }) => d.gated_add(&x_t, &v_t, &Modulation { table, rows })?,
            };
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
        let last = c.last_of_prompt();
        let tokens: Vec<u32> = batch.iter().flat_map(|i| i.tokens.iter().copied().chain(last)).collect();
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
        let out = self.language.forward(d, embs, &positions, &[], &spans, None, |layer| cache.push(layer))?;
        if let (Some(out), Some(Norm::Rms(norm))) = (out, self.language.norm(d, None)) {
            d.tap("norm", &d.rms_norm(&out, norm)?);
        }
        Ok(PrefixCache(cache))
    }

    /// What all steps share: state and time as the network takes them, positions and spans.
    pub fn prepare_steps(
        &self,
        batch: &[Inputs],
        layout: &Layout,
        times: &[f32],
    ) -> Result<Steps<D>, ModelError> {
        let (d, c) = (&self.device, self.config());
        let condition = match &self.expert()?.conditioning {
            Conditioning::Rows { state_proj, time_mlp_in, embedded, .. } => {
                let _scope = Scope::new(d, format_args!("suffix"));
                let states: Vec<f32> = batch.iter().flat_map(|i| i.state.iter().copied()).collect();
                let states = d.linear(&d.upload(batch.len(), c.state_dim, &states)?, state_proj)?;
                d.tap("state_emb", &states);
                let width = c.expert.width;
                let mut kept = embedded.lock().unwrap_or_else(PoisonError::into_inner);
                if kept.as_ref().is_none_or(|kept| kept.times != times) {
                    let rows = time_embedding(times, width, c.min_period, c.max_period);
                    *kept = Some(Embedded { times: times.to_vec(), rows });
                }
                let rows = &kept.as_ref().expect("made above").rows;
                let embedded = d.upload(times.len(), width, rows)?;
                d.tap("time_emb", &embedded);
                Condition::Rows { times: d.linear(&embedded, time_mlp_in)?, states }
            }
            Conditioning::Norms(cache) => {
                let modulations = cache.get(d, &self.checkpoint, times)?;
                let _scope = Scope::new(d, format_args!("suffix"));
                modulations.tap(d);
                // Known actions are at time 0, the last row.
                let (last, known) = (times.len() as u32, known_rows(batch, layout));
                let mut rows = Vec::with_capacity(times.len() * known.len());
                for step in 0..last {
                    rows.extend(known.iter().map(|&k| if k == 1 { last } else { step }));
                }
                Condition::Norms { modulations, rows }
            }
        };
        let rows = known_rows(batch, layout);
        let known = if rows.contains(&1) {
            let mut table = vec![0.0; 2 * 3 * c.action_dim];
            table[2 * c.action_dim..3 * c.action_dim].fill((-1.0 / times.len() as f64) as f32);
            Some(Known { steps: d.upload(2, 3 * c.action_dim, &table)?, rows })
        } else {
            None
        };
        Ok(Steps {
            positions: layout.suffix_positions(),
            first_spans: layout.first_step_spans(),
            later_spans: layout.later_step_spans(),
            condition,
            known,
        })
    }

    /// Forgets what is kept between inferences, which follows from the time alone: for whoever changes what the device
    /// computes meanwhile.
    pub fn forget(&self) {
        if let Tail::Expert(Expert { conditioning: Conditioning::Norms(cache), .. }) = &self.tail {
            cache.clear();
        }
    }

    /// Noisy actions `[B T, A]` at one step's time, embedded: `[B T, W]`.
    pub(crate) fn embed_suffix(
        &self,
        x_t: &D::Tensor,
        step: usize,
        steps: &Steps<D>,
    ) -> Result<D::Tensor, ModelError> {
        let (d, expert) = (&self.device, self.expert()?);
        let action_emb = d.linear(x_t, &expert.action_in_proj)?;
        d.tap("action_emb", &action_emb);
        let (Conditioning::Rows { action_mlp_in, action_time_mlp_out, .. }, Condition::Rows { times, .. }) =
            (&expert.conditioning, &steps.condition)
        else {
            return Ok(action_emb);
        };
        let time = d.slice_rows(times, step..step + 1)?;
        let h = dense(d, &Dense { residual: Some(&time), ..Dense::new(&action_emb, action_mlp_in) })?;
        d.tap("time_mlp_in", &h);
        let embs = d.linear(&d.silu(&h)?, action_time_mlp_out)?;
        d.tap("time_mlp_out", &embs);
        Ok(embs)
    }

    /// The velocity `v_t` `[B T, A]`. Of π0 the first step also runs the state rows and leaves their keys and values,
    /// which no later step changes, in `state_cache`.
    pub fn denoise_step(
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
        let states = match &steps.condition {
            Condition::Norms { modulations, rows } => {
                d.tap("embs", &actions);
                let count = d.shape(&actions)[0];
                let drive = Some(Drive { modulations, rows: &rows[step * count..(step + 1) * count] });
                let (positions, spans) = (&steps.positions, &steps.first_spans);
                let out =
                    self.expert()?.tower.forward(d, actions, positions, &[&prefix.0], spans, drive, drop)?;
                return self.velocity(out, drive);
            }
            Condition::Rows { states, .. } => states,
        };
        let robots = d.shape(states)[0];
        if let Some(states) = state_cache {
            let (positions, cached) = (&steps.positions[robots..], [&*prefix.0, states]);
            let out = self.expert()?.tower.forward(
                d,
                actions,
                positions,
                &cached,
                &steps.later_spans,
                None,
                drop,
            )?;
            return self.velocity(out, None);
        }
        let embs = d.concat_rows(&[states, &actions])?;
        d.tap("embs", &embs);
        let mut layers = Vec::with_capacity(prefix.0.len());
        let keep = |layer| layers.push(layer);
        let (positions, spans) = (&steps.positions, &steps.first_spans);
        let out = self.expert()?.tower.forward(d, embs, positions, &[&prefix.0], spans, None, keep)?;
        let v_t = self.velocity(out, None)?;
        let states = |l: &LayerCache<D>| {
            Ok(LayerCache { k: d.slice_rows(&l.k, 0..robots)?, v: d.slice_rows(&l.v, 0..robots)? })
        };
        *state_cache = Some(layers.iter().map(states).collect::<Result<_, ModelError>>()?);
        Ok(d.slice_rows(&v_t, robots..d.shape(&v_t)[0])?)
    }

    /// What the expert's last layer leaves, as velocities: `action_out_proj(norm(out))`.
    fn velocity(&self, out: Option<D::Tensor>, drive: Option<Drive<'_, D>>) -> Result<D::Tensor, ModelError> {
        let out = out.expect("the expert is loaded whole");
        let expert = self.expert()?;
        let norm = expert.tower.norm(&self.device, drive);
        let call = Dense { norm, norm_tap: Some("norm"), ..Dense::new(&out, &expert.action_out_proj) };
        Ok(dense(&self.device, &call)?)
    }

    /// Pulls the velocities of guided robots towards their previous chunks; on the host, where it is cheap.
    fn guide(
        &self,
        batch: &[Inputs],
        x_t: &D::Tensor,
        v_t: &D::Tensor,
        t: f64,
    ) -> Result<D::Tensor, ModelError> {
        let d = &self.device;
        let (x, mut v) = (d.download(x_t)?, d.download(v_t)?);
        let chunk = x.data.len() / batch.len();
        for ((inputs, x), v) in
            batch.iter().zip(x.data.chunks_exact(chunk)).zip(v.data.chunks_exact_mut(chunk))
        {
            if let Some(Rtc::Guided(guidance)) = &inputs.rtc {
                guidance.apply(x, v, t, self.config().action_dim);
            }
        }
        Ok(d.upload(v.rows(), v.cols(), &v.data)?)
    }

    /// Makes sure that a result means something.
    pub(crate) fn check_finite(&self, data: &[f32]) -> Result<(), ModelError> {
        if data.iter().all(|x| x.is_finite()) {
            return Ok(());
        }
        // Once: reading gigabytes for every request that is out of all proportion would stop a server.
        let bad_weight = self.bad_weight.get_or_init(|| self.checkpoint.find_not_finite().ok().flatten());
        Err(ModelError::NotFinite(match bad_weight {
            Some((name, i)) => format!("the weight {name} holds NaN or infinity at index {i}"),
            None => {
                "all weights are finite; sums overflowed, so the state, the noise or the previous chunk is \
                     out of all proportion"
                    .into()
            }
        }))
    }

    /// What denoises.
    fn expert(&self) -> Result<&Expert<D>, ModelError> {
        match &self.tail {
            Tail::Expert(expert) => Ok(expert),
            Tail::Answer(_) => {
                Err(ModelError::Call("π0-FAST has no action expert: it denoises nothing".into()))
            }
        }
    }

    /// What writes answers.
    pub(crate) fn answer(&self) -> Result<&Answer<D>, ModelError> {
        match &self.tail {
            Tail::Answer(answer) => Ok(answer),
            Tail::Expert(_) => Err(ModelError::Call(format!("{} writes no answers", self.config().kind))),
        }
    }

    /// Splits the batch, after making sure that the result means something.
    fn finish(&self, x: HostTensor) -> Result<Vec<HostTensor>, ModelError> {
        let c = self.config();
        self.check_finite(&x.data)?;
        let chunk = |data: &[f32]| HostTensor::new([c.horizon, c.action_dim], data.to_vec());
        Ok(x.data.chunks_exact(c.horizon * c.action_dim).map(chunk).collect())
    }
}

impl<D: Device> Expert<D> {
    fn load(device: &D, checkpoint: &Checkpoint, w: &Weights<'_, D>) -> Result<Self, ModelError> {
        let c = &checkpoint.config;
        let width = c.expert.width;
        let (norms, conditioning) = match c.kind {
            Kind::Pi05 => {
                let cache = ModulationCache::new();
                cache.get(device, checkpoint, &c.schedule.times(c.num_steps))?;
                (Norms::Adaptive, Conditioning::Norms(cache))
            }
            _ => {
                let mlp_in = |bias, columns| w.linear_exact("action_time_mlp_in", bias, Some(columns));
                let rows = Conditioning::Rows {
                    state_proj: w.linear_exact("state_proj", true, None)?,
                    action_mlp_in: mlp_in(false, 0..width)?,
                    time_mlp_in: mlp_in(true, width..2 * width)?,
                    action_time_mlp_out: w.linear_exact("action_time_mlp_out", true, None)?,
                    embedded: Mutex::default(),
                };
                (Norms::Rms, rows)
            }
        };
        Ok(Self {
            tower: Gemma::load(&c.expert, &w.pp(EXPERT), norms, Extent::Whole)?,
            conditioning,
            action_in_proj: w.linear_exact("action_in_proj", true, None)?,
            action_out_proj: w.linear_exact("action_out_proj", true, None)?,
        })
    }
}

/// For each action row 1 where the action is known already (trained real-time chunking), 0 elsewhere.
fn known_rows(batch: &[Inputs], layout: &Layout) -> Vec<u32> {
    let mut rows = vec![0; batch.len() * layout.horizon];
    for (inputs, rows) in batch.iter().zip(rows.chunks_exact_mut(layout.horizon)) {
        if let Some(Rtc::Trained(clean)) = &inputs.rtc {
            rows[..clean.delay].fill(1);
        }
    }
    rows
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
