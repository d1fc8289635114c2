//! The reference's side of a judgement: the same inference, right or with mistakes made.

use std::collections::{BTreeMap, BTreeSet};

use pi0_device::{Device, HostTensor, Scope};
use pi0_model::golden::golden_taps;
use pi0_model::layout::Layout;
use pi0_model::{Checkpoint, Extent, Pi0};

use super::file::Dump;
use super::hypotheses::Variation;
use super::order::{PREFIX, Rank, STEPS, SUFFIX};
use crate::mutated::Mutated;
use crate::{Progress, Result};

/// The network on a device that makes mistakes on demand.
pub struct Subject<'a, D: Device> {
    model: Pi0<Mutated<D>>,
    dump: &'a Dump,
    /// What each robot starts from.
    noise: Vec<Option<Vec<f32>>>,
    steps: usize,
}

impl<'a, D: Device> Subject<'a, D> {
    /// Packs the weights.
    pub fn load(device: D, checkpoint: &Checkpoint, dump: &'a Dump, progress: Progress<'_>) -> Result<Self> {
        let last = checkpoint.config.gemma.depth - 1;
        let deep = |name: &String| {
            name == "prefix.norm"
                || name
                    .strip_prefix(&format!("prefix.layer{last}."))
                    .is_some_and(|rest| !["ln1", "k_cache", "v_cache"].contains(&rest))
        };
        let extent = if dump.taps.keys().any(deep) { Extent::Whole } else { Extent::Cache };
        let wanted = dump.taps.keys().flat_map(|name| of_golden(name)).collect::<BTreeSet<_>>();
        let tick = progress();
        let model = Pi0::load(Mutated::new(device, wanted), checkpoint.clone(), extent, &*tick)?;
        let taken = |name: &String| -> Option<usize> {
            let (step, what) = name.strip_prefix("step")?.split_once('.')?;
            ["v_t", "x_next", "time"].contains(&what).then(|| step.parse().ok())?
        };
        let seen = dump.taps.keys().filter_map(taken).max().map(|last| last + 1);
        let steps = dump.steps.unwrap_or_else(|| seen.unwrap_or(0).max(checkpoint.config.num_steps));
        let noise = dump.batch.iter().map(|i| i.noise.clone()).collect();
        Ok(Self { model, dump, noise, steps })
    }

    /// Denoising steps of the inference.
    pub fn steps(&self) -> usize {
        self.steps
    }

    /// From now on the inference starts from this, `[B, T, A]`.
    pub fn start_from(&mut self, noise: &[f32]) {
        let robots = self.noise.len();
        self.noise = noise.chunks_exact(noise.len() / robots).map(|n| Some(n.to_vec())).collect();
    }

    /// Runs the inference as far as `until` and gives what was tapped, by the golden names.
    pub fn run(&self, variation: &Variation, until: Rank) -> Result<BTreeMap<String, HostTensor>> {
        let (model, d, c) = (&self.model, self.model.device(), self.model.config());
        d.plant(variation.plants.clone());
        model.forget();
        let batch = variation.inputs(self.dump, &self.noise);
        let layout = Layout::new(c, &batch)?;
        let right = c.schedule.times(self.steps);
        let times = variation.times.map_or_else(|| right.clone(), |f| f(&right));
        let mut actions = None;
        let done = || -> Result<()> {
            let embs = model.embed_prefix(&batch, &layout)?;
            if until < (PREFIX, 1, 0) {
                return Ok(());
            }
            let prefix = model.prefix_cache(embs, &layout)?;
            if until.0 < SUFFIX {
                return Ok(());
            }
            let shared = model.prepare_steps(&batch, &layout, &times)?;
            let noise: Vec<f32> = batch.iter().flat_map(|i| i.noise.clone().unwrap_or_default()).collect();
            let dt = -1.0 / times.len() as f64;
            let mut x_t = d.upload(batch.len() * c.horizon, c.action_dim, &noise)?;
            let mut state_cache = None;
            let count = match until {
                (STEPS, step, _) => times.len().min(step.saturating_add(1) as usize),
                _ => 1,
            };
            for step in 0..count {
                let _scope = Scope::new(d, format_args!("step{step}"));
                if variation.recompute_state {
                    state_cache = None;
                }
                let v_t = model.denoise_step(&x_t, step, &shared, &prefix, &mut state_cache)?;
                d.tap("v_t", &v_t);
                x_t = d.add_scaled(&x_t, &v_t, dt as f32)?;
                d.tap("x_next", &x_t);
            }
            actions = Some(d.download(&x_t)?);
            Ok(())
        }();
        let taps = d.take();
        d.plant(vec![]);
        done?;
        let mut taps = golden_taps(taps?, &batch, c, &times, self.dump.padded_tokens)?;
        if let Some(x) = actions {
            taps.insert("actions".into(), HostTensor::new([batch.len(), c.horizon, c.action_dim], x.data));
        }
        Ok(taps)
    }
}

/// What the model calls a tap of the golden names, without the denoising step 0.
fn of_golden(name: &str) -> Vec<String> {
    if let Some((_, rest)) = name.strip_prefix("vision.cam").and_then(|rest| rest.split_once('.')) {
        return vec![format!("vision.{rest}")];
    }
    // Scale, shift and gate are parts of one table.
    for part in [".scale", ".shift", ".gate"] {
        if let Some(norm) = name.strip_suffix(part) {
            return vec![format!("{norm}.modulation")];
        }
    }
    match name.strip_prefix("step").and_then(|rest| rest.split_once('.')) {
        Some((_, what @ ("time" | "time_emb" | "cond"))) => {
            let known = if what == "cond" { "cond" } else { "time_emb" };
            vec![format!("suffix.{known}")]
        }
        Some(("0", what)) => vec![what.to_string()],
        _ => vec![name.to_string()],
    }
}
