//! What a checkpoint tells of the data it was trained on, beyond what its normalization needs; and an observation in the
//! units of those statistics. For `pi0-doctor`, which judges by them.

use std::collections::BTreeMap;

use crate::pipeline::{Formula, InputStep, Normalizer, OutputStep};
use crate::policy::{Camera, Meaning};
use crate::statistics::{ACTION, STATE, Statistics};
use crate::{Error, Observation, Pixels, Policy, Prepared, Result};

/// What was measured of one vector, each a value a dimension; empty where nobody says.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct VectorStatistics {
    /// Means.
    pub mean: Vec<f64>,
    /// Standard deviations.
    pub std: Vec<f64>,
    /// Smallest values.
    pub min: Vec<f64>,
    /// Largest values.
    pub max: Vec<f64>,
    /// Values that one in a hundred is below.
    pub q01: Vec<f64>,
    /// Values that one in a hundred is above.
    pub q99: Vec<f64>,
}

impl VectorStatistics {
    /// What normalization and file know of `key`. The file counts in the units of the normalization that was made of it;
    /// without one it may describe others, so nothing is taken.
    fn of(normalizer: &Normalizer, statistics: Option<&Statistics>, key: &str) -> Self {
        let read = |stat: &str| {
            let values = statistics?.find(key, stat).ok()?;
            let fits = values.len() == normalizer.width() && values.iter().all(|x| x.is_finite());
            fits.then(|| values.clone())
        };
        let mut all = Self::default();
        let (a, b) = (&normalizer.stats.a, &normalizer.stats.b);
        match normalizer.formula {
            Formula::OpenPiZScore | Formula::LerobotMeanStd => {
                (all.mean, all.std) = (a.clone(), b.clone());
            }
            Formula::OpenPiQuantile => (all.q01, all.q99) = (a.clone(), b.clone()),
            // Minimum and maximum, or quantiles, of which there are two kinds: the file tells.
            Formula::LerobotRange => {}
        }
        let own = [
            ("mean", &mut all.mean),
            ("std", &mut all.std),
            ("min", &mut all.min),
            ("max", &mut all.max),
            ("q01", &mut all.q01),
            ("q99", &mut all.q99),
        ];
        for (stat, own) in own {
            if own.is_empty() {
                *own = read(stat).unwrap_or_default();
            }
        }
        if all.std.iter().any(|x| *x < 0.0) {
            (all.mean, all.std) = Default::default();
        }
        all
    }

    /// Dimensions that anything is known of.
    pub fn width(&self) -> usize {
        let all = [&self.mean, &self.std, &self.min, &self.max, &self.q01, &self.q99];
        all.into_iter().map(Vec::len).max().unwrap_or(0)
    }
}

/// What is known of the data that a policy was trained on.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct TrainingData {
    /// Of the state, in the units of [`Policy::state_as_trained`].
    pub state: VectorStatistics,
    /// Of the actions, in the units of [`Policy::actions_as_trained`].
    pub actions: VectorStatistics,
    /// Mean red, green and blue in 0 to 1, by the checkpoint's name of the camera.
    pub colours: BTreeMap<String, [f64; 3]>,
}

impl TrainingData {
    /// Gathers it. `state` and `actions` hold the statistics that the steps were made of.
    pub(crate) fn of(
        before: &[InputStep],
        after: &[OutputStep],
        cameras: &[Camera],
        state: Option<&Statistics>,
        actions: Option<&Statistics>,
    ) -> Self {
        let normalize = before.iter().find_map(|step| match step {
            InputStep::Normalize(normalizer) => Some(VectorStatistics::of(normalizer, state, STATE)),
            _ => None,
        });
        let unnormalize = after.iter().find_map(|step| match step {
            OutputStep::Unnormalize(normalizer) => Some(VectorStatistics::of(normalizer, actions, ACTION)),
            _ => None,
        });
        let colour = |camera: &Camera| {
            let mean: [f64; 3] = state?.find(&camera.key, "mean").ok()?.as_slice().try_into().ok()?;
            mean.iter().all(|x| (0.0..=1.0).contains(x)).then(|| (camera.key.clone(), mean))
        };
        Self {
            state: normalize.unwrap_or_default(),
            actions: unnormalize.unwrap_or_default(),
            colours: cameras.iter().filter_map(colour).collect(),
        }
    }
}

/// A camera's image as it came, its shape checked.
#[derive(Debug, Clone, Copy)]
pub struct Picture<'a> {
    /// Samples.
    pub pixels: &'a Pixels,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Distances in samples between neighbouring channels, rows and columns.
    pub strides: [usize; 3],
}

impl Policy {
    /// What is known of the data that the policy was trained on.
    pub fn training_data(&self) -> &TrainingData {
        &self.data
    }

    /// A state in the units of the statistics: joints and grippers as the checkpoint knows them.
    pub fn state_as_trained(&self, state: &[f64]) -> Vec<f64> {
        let mut state = state.to_vec();
        for step in &self.before {
            match step {
                InputStep::Aloha(units) => units.decode_state(&mut state),
                InputStep::Normalize(_) => break,
                _ => {}
            }
        }
        state
    }

    /// What the network returned, `[horizon, action_dim]` or the tokens of an answer, in the units of the statistics:
    /// `[rows, cols]` of [`Actions`](crate::Actions), but before relative actions become absolute and robots' units apply.
    /// Nothing of an answer from which no action may be read.
    pub fn actions_as_trained(&self, actions: &[f32]) -> Vec<f64> {
        let rows: Vec<Vec<f64>> = if self.writes_tokens() {
            let Ok(reply) = self.read_answer(actions) else { return Vec::new() };
            reply.actions.chunks_exact(reply.shape[1]).map(<[f64]>::to_vec).collect()
        } else {
            let rows = actions.chunks_exact(self.facts.action_dim.max(1));
            rows.map(|row| row.iter().map(|&x| f64::from(x)).collect()).collect()
        };
        let mut out = Vec::with_capacity(self.rows * self.cols);
        for mut action in rows.into_iter().take(self.rows) {
            for step in &self.after {
                match step {
                    OutputStep::Crop(width) => action.truncate(*width),
                    OutputStep::Unnormalize(normalizer) => normalizer.inverse(&mut action),
                    _ => {}
                }
            }
            action.resize(self.cols, 0.0);
            out.extend(action);
        }
        out
    }

    /// Actions as a robot got them, `[rows, cols]`, in the units of the statistics: what
    /// [`actions_as_trained`](Self::actions_as_trained) gives, of a recording. `prepared` is the observation that they
    /// answered.
    ///
    /// # Errors
    /// The width is not that of this policy's actions.
    pub fn recorded_as_trained(&self, actions: &[f64], cols: usize, prepared: &Prepared) -> Result<Vec<f64>> {
        if cols != self.cols || !actions.len().is_multiple_of(cols.max(1)) {
            let (got, wanted) = (actions.len(), self.cols);
            return Err(Error::Actions(format!("actions have {wanted} values, got {got} in rows of {cols}")));
        }
        let mut out = actions.to_vec();
        for action in out.chunks_exact_mut(cols.max(1)) {
            for step in self.after.iter().rev() {
                match step {
                    OutputStep::Crop(_) | OutputStep::Unnormalize(_) => {}
                    robot => robot.undo(action, &prepared.reference),
                }
            }
        }
        Ok(out)
    }

    /// The images of an observation by camera of the network, in the network's order; none where there is none, or
    /// none of a shape that [`preprocess`](Self::preprocess) takes.
    pub fn pictures<'a>(&self, observation: &'a Observation) -> Vec<Option<Picture<'a>>> {
        let mut out = vec![None; self.cameras.len()];
        for (key, image) in &observation.images {
            if let Some(&Meaning::Camera(camera)) = self.names.get(key)
                && let Ok(view) = image.shaped(key, self.layout)
            {
                let (height, width, strides) = (view.height, view.width, view.strides());
                out[camera] = Some(Picture { pixels: view.pixels, height, width, strides });
            }
        }
        out
    }

    /// The prompt that an observation is served with.
    pub fn prompt<'a>(&'a self, observation: &'a Observation) -> &'a str {
        observation.prompt.as_deref().or(self.default_prompt.as_deref()).unwrap_or_default()
    }
}
