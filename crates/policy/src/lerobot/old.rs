//! lerobot up to 0.3, which had the steps in code and the statistics among the weights.

use std::path::Path;

use super::config::Config;
use super::processors::Processors;
use super::stats::{EPS, fits, make_normalizer};
use super::{ACTION, POSTPROCESSOR, PREPROCESSOR, STATE};
use crate::Result;
use crate::files::{Vectors, read_vectors_of};
use crate::pipeline::{InputStep, OutputStep};
use crate::prompt::PromptFormat;
use crate::robot::AlohaUnits;

/// The steps of lerobot up to 0.3, which had them in code and the statistics among the weights; also those of a
/// directory without processors.
pub(crate) fn old_processors(directory: &Path, config: &Config) -> Result<Processors> {
    let mut out = Processors::default();
    let weights = directory.join("model.safetensors");
    let buffers = if weights.is_file() {
        read_vectors_of(&weights, &["normalize_inputs.buffer_", "unnormalize_outputs.buffer_"])?
    } else {
        Vectors::new()
    };
    let units = config.adapt_to_pi_aloha.then_some(AlohaUnits::Lerobot);
    // Names keep the feature's, with `_` for `.`; resolved from the feature, because the way back is ambiguous.
    let normalizer = |module: &str, key: &str, kind: &str| {
        let prefix = format!("{module}.buffer_{}.", key.replace('.', "_"));
        let stats: Vectors = buffers
            .iter()
            .filter_map(|(name, values)| {
                Some((format!("{key}.{}", name.strip_prefix(&prefix)?), values.clone()))
            })
            .collect();
        let stat = |stat: &str| stats.get(&format!("{key}.{stat}"));
        make_normalizer(&weights, config.mode(kind), EPS, key, stat, stats.keys())
    };

    out.before.extend(units.map(InputStep::Aloha));
    out.before.push(InputStep::NewLine);
    out.before.push(InputStep::Tokenize(PromptFormat::Verbatim, config.tokenizer_max_length));
    match normalizer("normalize_inputs", STATE, "STATE")? {
        Some(normalizer) => out.before.push(InputStep::Normalize(normalizer)),
        None => {
            out.problems.push(format!("the state is not normalized: neither {PREPROCESSOR} nor statistics"))
        }
    }
    out.after.push(OutputStep::Crop(config.action_width()));
    match normalizer("unnormalize_outputs", ACTION, "ACTION")? {
        Some(normalizer) => {
            fits(&weights, &normalizer, config.action_width())?;
            out.after.push(OutputStep::Unnormalize(normalizer));
        }
        None => out
            .problems
            .push(format!("actions stay in the network's units: neither {POSTPROCESSOR} nor statistics")),
    }
    out.after.extend(units.map(OutputStep::Aloha));
    Ok(out)
}
