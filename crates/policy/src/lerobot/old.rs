//! lerobot up to 0.3, which had the steps in code and the statistics among the weights; also a checkpoint whose processor
//! files are missing.

use std::path::Path;

use super::normalization::{EPS, normalizer};
use super::processors::Reader;
use super::{ACTION, STATE, unsupported};
use crate::Result;
use crate::files::{Vectors, read_vectors_of};
use crate::pipeline::{InputStep, OutputStep};
use crate::prompt::PromptFormat;
use crate::robot::{AlohaUnits, Robot};
use crate::statistics::Statistics;

impl Reader<'_> {
    /// The steps as code had them.
    pub fn old(&mut self, directory: &Path) -> Result<()> {
        let config = self.config;
        let kept = buffers(&directory.join("model.safetensors"))?;
        let statistics = self.given.clone().or(kept);
        let units = config.adapt_to_pi_aloha.then_some(AlohaUnits::Lerobot);
        let path = directory.join("config.json");
        let width = self.action_width(&path, None, statistics.as_ref())?;

        self.out.before.extend(units.map(InputStep::Aloha));
        // lerobot itself refuses to run this; in openpi, from which such checkpoints come, it means:
        let delta = config.use_delta_joint_actions_aloha.then(|| Robot::Aloha.delta_mask());
        if let Some(mask) = &delta {
            if mask.len() != width {
                let what = format!("use_delta_joint_actions_aloha with actions of {width} values");
                return Err(unsupported(&path, &what, "ALOHA's have 14"));
            }
            self.out.before.push(InputStep::Reference);
        }
        if !config.state_in_prompt() {
            self.out.before.push(InputStep::NewLine);
        }
        let made = normalizer(&path, config.mode("STATE"), EPS, STATE, statistics.as_ref())?;
        self.normalize(STATE, made, InputStep::Normalize, |out| &mut out.before);
        if config.state_in_prompt() {
            self.state_text();
        }
        self.out.before.push(InputStep::Tokenize(PromptFormat::Verbatim, config.max_tokens()));

        self.out.after.push(OutputStep::Crop(width));
        let made = normalizer(&path, config.mode("ACTION"), EPS, ACTION, statistics.as_ref())?;
        self.normalize(ACTION, made, OutputStep::Unnormalize, |out| &mut out.after);
        self.out.after.extend(delta.map(OutputStep::AbsoluteF32));
        self.out.after.extend(units.map(OutputStep::Aloha));
        self.out.statistics = [statistics.clone(), statistics];
        Ok(())
    }
}

/// Statistics among the weights. Their names keep the feature's, with `_` for `.`; the way back would be ambiguous, so
/// only the two that count are looked for.
fn buffers(weights: &Path) -> Result<Option<Statistics>> {
    let buffers = [
        ("normalize_inputs.buffer_observation_state.", STATE),
        ("unnormalize_outputs.buffer_action.", ACTION),
    ];
    if !weights.is_file() {
        return Ok(None);
    }
    let found = read_vectors_of(weights, &buffers.map(|(prefix, _)| prefix))?;
    let vectors: Vectors = found
        .into_iter()
        .filter_map(|(name, values)| {
            let (prefix, key) = buffers.iter().find(|(prefix, _)| name.starts_with(prefix))?;
            Some((format!("{key}.{}", &name[prefix.len()..]), values))
        })
        .collect();
    Ok((!vectors.is_empty()).then(|| Statistics::processed(weights, vectors)))
}
