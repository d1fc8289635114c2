//! How time drives the norms of π0.5's expert.
//!
//! One vector a step, `cond`, comes of the time alone; each of the expert's norms has a dense layer that makes scale,
//! shift and gate of it (the adaRMS of the paper, openpi's `Dense_0`). So all of a checkpoint's modulations for a number
//! of steps are computed once and kept: at full size 11 x 37 x 3,072 numbers in place of 117 million parameters in
//! every step. The dense layers are packed for that and let go again.
//!
//! Shapes: N steps, M = N + 1 times, W the expert's width.

use std::sync::{Arc, Mutex, PoisonError};

use pi0_device::{Device, Modulation, Scope};

use crate::weights::{EXPERT, Weights};
use crate::{Checkpoint, ModelError, time_embedding};

/// Scale, shift and gate of every norm at every step's time.
pub struct Modulations<D: Device> {
    /// What the tables were made of, row for row, by the golden data's names; for whoever listens. `[M, W]` each.
    made_of: Vec<(&'static str, D::Tensor)>,
    /// Of each layer the norms before attention and before the MLP: `[M, 3 W]` each. Row `k` belongs to step `k`; the
    /// last one to time 0, which clean actions have (trained real-time chunking).
    layers: Vec<[D::Tensor; 2]>,
    /// The final norm, whose gate nothing reads.
    last: D::Tensor,
}

/// The vector that drives the norms at each of `times`, and what it is made of, by the golden data's names: `[M, W]`
/// each, `cond` last.
pub(crate) fn condition<D: Device>(
    d: &D,
    checkpoint: &Checkpoint,
    times: &[f32],
) -> Result<[(&'static str, D::Tensor); 4], ModelError> {
    let c = &checkpoint.config;
    let w = Weights::new(d, checkpoint, &|_| ());
    let _scope = Scope::new(d, format_args!("modulations"));
    let embedded = time_embedding(times, c.expert.width, c.min_period, c.max_period);
    let time_emb = d.upload(times.len(), c.expert.width, &embedded)?;
    let time_mlp_in = d.linear(&time_emb, &w.linear_exact("time_mlp_in", true, None)?)?;
    let time_mlp_out = d.linear(&d.silu(&time_mlp_in)?, &w.linear_exact("time_mlp_out", true, None)?)?;
    let cond = d.silu(&time_mlp_out)?;
    Ok([("time_emb", time_emb), ("time_mlp_in", time_mlp_in), ("time_mlp_out", time_mlp_out), ("cond", cond)])
}

impl<D: Device> Modulations<D> {
    /// Computes them for steps at `times`.
    pub fn new(d: &D, checkpoint: &Checkpoint, times: &[f32]) -> Result<Self, ModelError> {
        let times: Vec<f32> = times.iter().copied().chain([0.0]).collect();
        let made_of = condition(d, checkpoint, &times)?;
        let [.., (_, cond)] = &made_of;
        let expert = Weights::new(d, checkpoint, &|_| ()).pp(EXPERT);
        let _scope = Scope::new(d, format_args!("modulations"));
        // Read from the checkpoint, multiplied and let go, one after the other.
        let table = |norm: String| -> Result<D::Tensor, ModelError> {
            Ok(d.linear(cond, &expert.pp(norm).linear_exact("dense", true, None)?)?)
        };
        let layers = (0..checkpoint.config.expert.depth)
            .map(|i| {
                let [first, second] = ["input_layernorm", "post_attention_layernorm"]
                    .map(|norm| table(format!("layers.{i}.{norm}")));
                Ok([first?, second?])
            })
            .collect::<Result<_, ModelError>>()?;
        let last = table("norm".into())?;
        Ok(Self { made_of: made_of.into(), layers, last })
    }

    /// Given tables, `[M, 3 W]` each.
    pub(crate) fn of_tables(layers: Vec<[D::Tensor; 2]>, last: D::Tensor) -> Self {
        Self { made_of: vec![], layers, last }
    }

    /// Offers what the tables were made of.
    pub(crate) fn tap(&self, d: &D) {
        self.made_of.iter().for_each(|(name, rows)| d.tap(name, rows));
    }

    /// Every table: of each layer's two norms, then of the final one.
    pub fn tables(&self) -> impl Iterator<Item = &D::Tensor> {
        self.layers.iter().flatten().chain([&self.last])
    }
}

/// What drives an adaptive tower in one call.
pub struct Drive<'a, D: Device> {
    /// The tables.
    pub modulations: &'a Modulations<D>,
    /// For each row of the call a row of the tables.
    pub rows: &'a [u32],
}

impl<D: Device> Clone for Drive<'_, D> {
    fn clone(&self) -> Self {
        *self
    }
}
impl<D: Device> Copy for Drive<'_, D> {}

impl<'a, D: Device> Drive<'a, D> {
    /// Of both norms of layer `i`.
    pub(crate) fn layer(self, d: &D, i: usize) -> [Modulation<'a, D::Tensor>; 2] {
        let tables = &self.modulations.layers[i];
        d.tap("ln1.modulation", &tables[0]);
        d.tap("ln2.modulation", &tables[1]);
        [0, 1].map(|norm| Modulation { table: &tables[norm], rows: self.rows })
    }

    /// Of the final norm.
    pub(crate) fn last(self, d: &D) -> Modulation<'a, D::Tensor> {
        d.tap("norm.modulation", &self.modulations.last);
        Modulation { table: &self.modulations.last, rows: self.rows }
    }
}

/// The modulations of the numbers of steps asked for last.
pub(crate) struct ModulationCache<D: Device>(Mutex<Vec<Arc<Modulations<D>>>>);

/// Rows of tables that are kept, over all numbers of steps: at full size 450 KB a row.
const KEPT_ROWS: usize = 64;

impl<D: Device> ModulationCache<D> {
    pub(crate) fn new() -> Self {
        Self(Mutex::default())
    }

    /// Drops them all.
    pub(crate) fn clear(&self) {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).clear();
    }

    /// Those for steps at `times`, computed unless they are kept.
    pub(crate) fn get(
        &self,
        d: &D,
        checkpoint: &Checkpoint,
        times: &[f32],
    ) -> Result<Arc<Modulations<D>>, ModelError> {
        let rows = |m: &Modulations<D>| d.shape(&m.last)[0];
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        // A checkpoint has one schedule, so the number of steps says which times.
        if let Some(at) = kept.iter().position(|m| rows(m) == times.len() + 1) {
            kept[..=at].rotate_right(1);
            return Ok(kept[0].clone());
        }
        let made = Arc::new(Modulations::new(d, checkpoint, times)?);
        kept.insert(0, made.clone());
        let mut total = 0;
        kept.retain(|m| {
            total += rows(m);
            total <= KEPT_ROWS
        });
        Ok(made)
    }
}
