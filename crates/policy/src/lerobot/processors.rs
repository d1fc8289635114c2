//! The processor files of lerobot 0.4 and later, whose steps are executed as they are listed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::config::{Config, forty_eight};
use super::stats::{NormalizerConfig, fits, normalizer, refuse_visual, stats_of};
use super::{ACTION, POSTPROCESSOR, PREPROCESSOR, STATE, unsupported};
use crate::files::{Ordered, inside, parse_json, read_small};
use crate::pipeline::{InputStep, OutputStep};
use crate::prompt::PromptFormat;
use crate::{Error, Result};

/// What the checkpoint's files ask for.
#[derive(Debug, Default)]
pub(crate) struct Processors {
    pub before: Vec<InputStep>,
    pub after: Vec<OutputStep>,
    /// Robot's name of a feature to the checkpoint's.
    pub rename: Vec<(String, String)>,
    /// Where the tokenizer is, if the files say so.
    pub tokenizer: Option<PathBuf>,
    /// Written by lerobot 0.5 or later, as the relative step tells.
    pub relative_step: bool,
    pub problems: Vec<String>,
}

#[derive(Deserialize)]
struct File {
    steps: Vec<Step>,
}

#[derive(Deserialize)]
pub(super) struct Step {
    registry_name: Option<String>,
    class: Option<String>,
    #[serde(default)]
    config: Value,
    pub(super) state_file: Option<String>,
    #[serde(default)]
    artifacts: BTreeMap<String, String>,
}

impl Step {
    fn name(&self) -> &str {
        self.registry_name.as_deref().or(self.class.as_deref()).unwrap_or("without a name")
    }

    pub(super) fn config<T: serde::de::DeserializeOwned>(&self, file: &Path) -> Result<T> {
        let config =
            if self.config.is_null() { Value::Object(Default::default()) } else { self.config.clone() };
        let said = |error| Error::format(file, format!("step {}: {error}", self.name()));
        serde_json::from_value(config).map_err(said)
    }
}

#[derive(Deserialize)]
struct RenameConfig {
    #[serde(default)]
    rename_map: Ordered<String>,
}

#[derive(Deserialize)]
struct TokenizerConfig {
    #[serde(default = "forty_eight")]
    max_length: usize,
    padding_side: Option<String>,
}

#[derive(Deserialize)]
pub(crate) struct RelativeConfig {
    #[serde(default)]
    enabled: bool,
    #[serde(default)]
    exclude_joints: Vec<String>,
    action_names: Option<Vec<String>>,
}

#[derive(Deserialize)]
struct AbsoluteConfig {
    #[serde(default)]
    enabled: bool,
}

/// Reads both processor files.
pub(crate) fn read_processors(directory: &Path, config: &Config) -> Result<Processors> {
    let mut processors = Processors::default();
    let before = directory.join(PREPROCESSOR);
    let relative = read_before(&before, &read_small(&before)?, &mut processors)?;
    let after = directory.join(POSTPROCESSOR);
    read_after(&after, &read_small(&after)?, config, relative.as_ref(), &mut processors)?;
    Ok(processors)
}

pub(crate) fn read_before(path: &Path, bytes: &[u8], out: &mut Processors) -> Result<Option<RelativeConfig>> {
    let file: File = parse_json(path, bytes)?;
    let directory = path.parent().unwrap_or(Path::new(""));
    let mut relative = None;
    for step in &file.steps {
        match step.name() {
            "to_batch_processor" | "device_processor" => {}
            "rename_observations_processor" => {
                out.rename.extend(step.config::<RenameConfig>(path)?.rename_map.0);
            }
            "pi0_new_line_processor" | "smolvla_new_line_processor" => out.before.push(InputStep::NewLine),
            "tokenizer_processor" => {
                let config: TokenizerConfig = step.config(path)?;
                if config.padding_side.is_some_and(|side| side != "right") {
                    return Err(unsupported(
                        path,
                        "padding on the left",
                        "π0 is trained with padding on the right",
                    ));
                }
                if let Some(folder) = step.artifacts.get("tokenizer_name") {
                    out.tokenizer = Some(inside(directory, folder, path)?);
                }
                out.before.push(InputStep::Tokenize(PromptFormat::Verbatim, config.max_length));
            }
            "relative_actions_processor" => {
                out.relative_step = true;
                out.before.push(InputStep::Reference);
                relative = Some(step.config::<RelativeConfig>(path)?);
            }
            "normalizer_processor" => {
                let config: NormalizerConfig = step.config(path)?;
                let stats = stats_of(directory, step, path)?;
                refuse_visual(path, &config, &stats)?;
                let keys = config.normalize_observation_keys.as_ref();
                let wanted = keys.is_none_or(|keys| keys.iter().any(|key| key == STATE));
                match normalizer(path, &config, &stats, STATE, "STATE")? {
                    Some(normalizer) if wanted && config.features.get(STATE).is_some() => {
                        out.before.push(InputStep::Normalize(normalizer));
                    }
                    _ if config.is_identity("STATE") => {}
                    _ => out
                        .problems
                        .push("the state is not normalized: the checkpoint has no statistics of it".into()),
                }
            }
            "pi05_prepare_state_tokenizer_processor_step" => {
                return Err(unsupported(path, "a π0.5 policy", "only π0 is implemented"));
            }
            other => return Err(unknown_step(path, other)),
        }
    }
    let tokenizers = out.before.iter().filter(|step| matches!(step, InputStep::Tokenize(..))).count();
    if tokenizers != 1 {
        return Err(Error::format(
            path,
            format!("{tokenizers} steps called tokenizer_processor, wanted one"),
        ));
    }
    Ok(relative)
}

pub(crate) fn read_after(
    path: &Path,
    bytes: &[u8],
    config: &Config,
    relative: Option<&RelativeConfig>,
    out: &mut Processors,
) -> Result<()> {
    let file: File = parse_json(path, bytes)?;
    let directory = path.parent().unwrap_or(Path::new(""));
    let width = config.action_width();
    out.after.push(OutputStep::Crop(width));
    let mut absolute = false;
    for step in &file.steps {
        match step.name() {
            "to_batch_processor" | "device_processor" => {}
            "unnormalizer_processor" => {
                let stats = stats_of(directory, step, path)?;
                let config: NormalizerConfig = step.config(path)?;
                match normalizer(path, &config, &stats, ACTION, "ACTION")? {
                    Some(normalizer) => {
                        fits(path, &normalizer, width)?;
                        out.after.push(OutputStep::Unnormalize(normalizer));
                    }
                    None if config.is_identity("ACTION") => {}
                    None => out.problems.push(
                        "actions stay in the network's units: the checkpoint has no statistics of them"
                            .into(),
                    ),
                }
            }
            "absolute_actions_processor" => {
                absolute = step.config::<AbsoluteConfig>(path)?.enabled;
                if absolute {
                    let relative = relative.ok_or_else(|| {
                        Error::format(
                            path,
                            "absolute_actions_processor has no relative_actions_processor to follow",
                        )
                    })?;
                    out.after.push(OutputStep::AbsoluteF32(relative.mask(width)));
                }
            }
            other => return Err(unknown_step(path, other)),
        }
    }
    if relative.is_some_and(|relative| relative.enabled) && !absolute {
        out.problems
            .push("actions stay relative to the state: the postprocessor does not make them absolute".into());
    }
    Ok(())
}

impl RelativeConfig {
    /// Which of `width` dimensions are relative: all but those whose name contains an excluded one.
    fn mask(&self, width: usize) -> Vec<bool> {
        let excluded: Vec<String> = self
            .exclude_joints
            .iter()
            .filter(|name| !name.is_empty())
            .map(|name| name.to_lowercase())
            .collect();
        let names = self.action_names.as_deref().unwrap_or_default();
        let relative = |name: &String| {
            let name = name.to_lowercase();
            !excluded.iter().any(|token| name.contains(token.as_str()))
        };
        (0..width).map(|i| names.get(i).is_none_or(relative)).collect()
    }
}

fn unknown_step(path: &Path, name: &str) -> Error {
    unsupported(path, &format!("the processor step {name:?}"), "π0 checkpoints of lerobot do not have it")
}
