//! The processor files of lerobot 0.4 and later, whose steps are executed as they are listed.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::config::{Config, Feature, of_kind};
use super::normalization::{NormalizerConfig, normalizer};
use super::{ACTION, POSTPROCESSOR, PREPROCESSOR, STATE, unsupported};
use crate::files::{Ordered, inside, parse_json, read_small, read_vectors};
use crate::options::{LerobotVersion, PolicyOptions};
use crate::pipeline::{InputStep, Normalizer, OutputStep};
use crate::prompt::{PromptFormat, Rounding, StateForm, StateText};
use crate::statistics::{Counted, Gaps, Statistics};
use crate::{Error, Result};

/// The two files of a checkpoint; some tools and releases gave them other names.
const FILES: [[&str; 2]; 3] = [
    [PREPROCESSOR, POSTPROCESSOR],
    ["robot_preprocessor.json", "robot_postprocessor.json"],
    ["preprocessor_config.json", "postprocessor_config.json"],
];

/// What the checkpoint's files ask for.
#[derive(Debug, Default)]
pub(crate) struct Processors {
    pub before: Vec<InputStep>,
    pub after: Vec<OutputStep>,
    /// Robot's name of a feature to the checkpoint's.
    pub rename: Vec<(String, String)>,
    /// Where the tokenizer is, if the files say so.
    pub tokenizer: Option<PathBuf>,
    /// Where π0-FAST's codec is, if the files say so.
    pub codec: Option<PathBuf>,
    /// Written by lerobot 0.5.1 or later, as the step for relative actions tells.
    pub relative_step: bool,
    /// Cameras of the normalizing step.
    pub visual: Vec<(String, Feature)>,
    /// The statistics that normalize the state and the actions.
    pub statistics: [Option<Statistics>; 2],
    pub gaps: Gaps,
    pub problems: Vec<String>,
}

#[derive(Deserialize)]
struct File {
    steps: Vec<Step>,
}

#[derive(Deserialize)]
struct Step {
    registry_name: Option<String>,
    class: Option<String>,
    #[serde(default)]
    config: Value,
    state_file: Option<String>,
    #[serde(default)]
    artifacts: BTreeMap<String, String>,
}

impl Step {
    fn name(&self) -> &str {
        self.registry_name.as_deref().or(self.class.as_deref()).unwrap_or("without a name")
    }

    fn config<T: serde::de::DeserializeOwned>(&self, file: &Path) -> Result<T> {
        let config =
            if self.config.is_null() { Value::Object(Default::default()) } else { self.config.clone() };
        let said = |error| Error::format(file, format!("step {}: {error}", self.name()));
        serde_json::from_value(config).map_err(said)
    }

    /// Its statistics, if it names a file of them.
    fn statistics(&self, path: &Path) -> Result<Option<Statistics>> {
        let Some(name) = &self.state_file else { return Ok(None) };
        let file = inside(path.parent().unwrap_or(Path::new("")), name, path)?;
        Ok(Some(Statistics::processed(&file, read_vectors(&file)?)))
    }

    /// A step that lerobot's π0 and π0.5 do not have.
    fn refuse(&self, path: &Path) -> Error {
        let name = self.name();
        let does = match name {
            "image_crop_resize_processor" => "it crops images and stretches them to another size",
            "observation_processor" => "it turns a simulator's observation into lerobot's",
            "hil_serl_processor" | "gym_hil_adapter_processor" => "it belongs to reinforcement learning",
            "joint_velocity_processor" => "it appends joint velocities to the state",
            "motor_current_processor" => "it appends motor currents to the state",
            _ => "it is a step of somebody's own, whose code is not in the checkpoint",
        };
        let mut config = self.config.to_string();
        if let Some((end, _)) = config.char_indices().nth(200) {
            config.truncate(end);
        }
        let what = format!("the processor step {name:?} with {config}");
        let advice = format!(
            "{does}; do it to the observations before they are sent, and take the step out of the file"
        );
        unsupported(path, &what, &advice)
    }
}

#[derive(Deserialize)]
struct RenameConfig {
    #[serde(default)]
    rename_map: Ordered<String>,
}

#[derive(Deserialize)]
struct TokenizerConfig {
    max_length: Option<usize>,
    padding_side: Option<String>,
}

#[derive(Deserialize)]
struct RelativeConfig {
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

/// The processor files of a directory, if it has them: `[before, after]` the network.
pub(super) fn find(directory: &Path) -> Option<[PathBuf; 2]> {
    let paths = FILES.map(|names| names.map(|name| directory.join(name)));
    // Under the other names there may be files of other libraries: a processor has steps and tokenizes.
    let is_ours = |path: &Path| {
        let file = read_small(path).and_then(|bytes| parse_json::<File>(path, &bytes));
        file.is_ok_and(|file| file.steps.iter().any(|step| step.name() == "tokenizer_processor"))
    };
    let [usual, others @ ..] = paths;
    if usual[0].is_file() {
        return Some(usual);
    }
    others.into_iter().find(|[before, _]| before.is_file() && is_ours(before))
}

/// lerobot writes the step always, for no normalization too (with the mode IDENTITY): somebody took it out.
fn without(path: &Path, step: &str) -> String {
    format!("{} has no step {step}_processor", path.display())
}

/// Reads the steps of a checkpoint.
pub(crate) struct Reader<'a> {
    pub config: &'a Config,
    options: &'a PolicyOptions,
    /// Statistics that the caller names, instead of the checkpoint's.
    pub given: Option<Statistics>,
    relative: Option<RelativeConfig>,
    normalized: bool,
    pub out: Processors,
}

impl<'a> Reader<'a> {
    pub fn new(config: &'a Config, options: &'a PolicyOptions) -> Result<Self> {
        let given = options.stats.as_deref().map(Statistics::open).transpose()?;
        Ok(Self { config, options, given, relative: None, normalized: false, out: Processors::default() })
    }

    /// Reads both processor files.
    pub fn files(&mut self, [before, after]: &[PathBuf; 2]) -> Result<()> {
        self.before(before, &read_small(before)?)?;
        self.after(after, &read_small(after)?)
    }

    /// The steps before the network.
    pub fn before(&mut self, path: &Path, bytes: &[u8]) -> Result<()> {
        let file: File = parse_json(path, bytes)?;
        let directory = path.parent().unwrap_or(Path::new(""));
        for step in &file.steps {
            match step.name() {
                "to_batch_processor" | "device_processor" => {}
                "rename_observations_processor" => {
                    self.out.rename.extend(step.config::<RenameConfig>(path)?.rename_map.0);
                }
                "pi0_new_line_processor" | "smolvla_new_line_processor" => {
                    self.out.before.push(InputStep::NewLine);
                }
                "pi05_prepare_state_tokenizer_processor_step"
                | "pi0_fast_prepare_state_tokenizer_processor_step" => self.state_text(),
                // For training; here it only says where the codec is.
                "action_tokenizer_processor" if self.config.is_fast() => {
                    if let Some(folder) = step.artifacts.get("action_tokenizer_name") {
                        self.out.codec = Some(inside(directory, folder, path)?);
                    }
                }
                "tokenizer_processor" => {
                    let config: TokenizerConfig = step.config(path)?;
                    if config.padding_side.is_some_and(|side| side != "right") {
                        let advice = "π0 is trained with padding on the right";
                        return Err(unsupported(path, "padding on the left", advice));
                    }
                    if let Some(folder) = step.artifacts.get("tokenizer_name") {
                        self.out.tokenizer = Some(inside(directory, folder, path)?);
                    }
                    let limit = config.max_length.unwrap_or_else(|| self.config.max_tokens());
                    self.out.before.push(InputStep::Tokenize(PromptFormat::Verbatim, limit));
                }
                // The first name is that of 0.5.1.
                "delta_actions_processor" | "relative_actions_processor" => {
                    self.out.relative_step = true;
                    self.out.before.push(InputStep::Reference);
                    self.relative = Some(step.config(path)?);
                }
                "normalizer_processor" => self.normalizer_step(path, step)?,
                _ => return Err(step.refuse(path)),
            }
        }
        if !file.steps.iter().any(|step| step.name() == "normalizer_processor") {
            self.normalize(STATE, Some(Err(without(path, "normalizer"))), InputStep::Normalize, |out| {
                &mut out.before
            });
        }
        let tokenizers =
            self.out.before.iter().filter(|step| matches!(step, InputStep::Tokenize(..))).count();
        if tokenizers != 1 {
            let why = format!("{tokenizers} steps called tokenizer_processor, wanted one");
            return Err(Error::format(path, why));
        }
        Ok(())
    }

    fn normalizer_step(&mut self, path: &Path, step: &Step) -> Result<()> {
        let config: NormalizerConfig = step.config(path)?;
        let kept = step.statistics(path)?;
        config.refuse_visual(path, kept.as_ref())?;
        let visual = of_kind(&config.features, "VISUAL");
        self.out.visual.extend(visual.map(|(key, feature)| (key.clone(), feature.clone())));
        let keys = config.normalize_observation_keys.as_ref();
        if keys.is_some_and(|keys| keys.iter().all(|key| key != STATE)) {
            self.out.problems.push("the state is not normalized: the step leaves it out".into());
            return Ok(());
        }
        // Without the feature, lerobot's step leaves the state alone although there are statistics.
        let listed = config.features.get(STATE).is_some();
        let statistics = self.given.clone().or(kept.filter(|_| listed));
        let mode = config.mode("STATE");
        let made = normalizer(path, mode, config.eps(path)?, STATE, statistics.as_ref())?;
        self.normalize(STATE, made, InputStep::Normalize, |out| &mut out.before);
        self.out.statistics[0] = statistics;
        Ok(())
    }

    /// Adds a normalization, if there is to be one, or the gap where it is missing.
    pub fn normalize<T>(
        &mut self,
        key: &str,
        made: Option<Result<Normalizer, String>>,
        step: impl Fn(Normalizer) -> T,
        list: impl Fn(&mut Processors) -> &mut Vec<T>,
    ) {
        let Some(made) = made else { return };
        let normalizer = self.out.gaps.fill(key, made, self.options.raw_units, &mut self.out.problems);
        self.normalized |= normalizer.is_some();
        if let Some(normalizer) = normalizer {
            list(&mut self.out).push(step(normalizer));
        }
    }

    /// The text of π0.5 or π0-FAST with the state. lerobot saves the step without its settings, so it always holds the state.
    pub fn state_text(&mut self) {
        let pad = match self.options.lerobot_version {
            Some(LerobotVersion::V0_4) => self.config.max_state_dim,
            Some(LerobotVersion::V0_5) | None => 0,
        };
        let form = if self.config.is_fast() { StateForm::FastLerobot } else { StateForm::Pi05 };
        self.out.before.push(InputStep::StateText(StateText { form, rounding: Rounding::F32, pad }));
    }

    /// The steps behind the network.
    pub fn after(&mut self, path: &Path, bytes: &[u8]) -> Result<()> {
        let file: File = parse_json(path, bytes)?;
        let unnormalizer = file.steps.iter().find(|step| step.name() == "unnormalizer_processor");
        let kept = unnormalizer.map(|step| step.statistics(path)).transpose()?.flatten();
        let statistics = self.given.clone().or(kept);
        let normalizer_config = unnormalizer.map(|step| step.config::<NormalizerConfig>(path)).transpose()?;
        let feature =
            normalizer_config.as_ref().and_then(|config| config.features.get(ACTION)?.shape.first().copied());
        let width = self.action_width(path, feature, statistics.as_ref())?;
        self.out.after.push(OutputStep::Crop(width));
        let mut absolute = false;
        for step in &file.steps {
            match step.name() {
                "to_batch_processor" | "device_processor" => {}
                "unnormalizer_processor" => {
                    let config: NormalizerConfig = step.config(path)?;
                    let mode = config.mode("ACTION");
                    let made = normalizer(path, mode, config.eps(path)?, ACTION, statistics.as_ref())?;
                    if let Some(Ok(made)) = &made {
                        fits(path, made, width)?;
                    }
                    self.normalize(ACTION, made, OutputStep::Unnormalize, |out| &mut out.after);
                }
                "absolute_actions_processor" => {
                    absolute = step.config::<AbsoluteConfig>(path)?.enabled;
                    if absolute {
                        let relative = self.relative.as_ref().ok_or_else(|| {
                            let why =
                                "absolute_actions_processor has no relative_actions_processor to follow";
                            Error::format(path, why)
                        })?;
                        self.out.after.push(OutputStep::AbsoluteF32(relative.mask(width)));
                    }
                }
                _ => return Err(step.refuse(path)),
            }
        }
        if unnormalizer.is_none() {
            let made = Some(Err(without(path, "unnormalizer")));
            self.normalize(ACTION, made, OutputStep::Unnormalize, |out| &mut out.after);
        }
        self.out.statistics[1] = statistics;
        if self.relative.as_ref().is_some_and(|relative| relative.enabled) && !absolute {
            self.out.problems.push(
                "actions stay relative to the state: the postprocessor does not make them absolute".into(),
            );
        }
        if absolute && self.given.as_ref().is_some_and(|given| given.counted == Counted::Raw) {
            self.out.problems.push(
                "actions are relative to the state: the statistics given must be of relative actions, which a \
                 data set's are only where they were recomputed for that"
                    .into(),
            );
        }
        Ok(())
    }

    /// Values of one action, from `config.json`, else from the step's feature, else from the statistics.
    pub fn action_width(
        &mut self,
        path: &Path,
        feature: Option<usize>,
        statistics: Option<&Statistics>,
    ) -> Result<usize> {
        let counted = statistics.and_then(|statistics| statistics.width(ACTION));
        let given = counted.filter(|_| self.given.is_some());
        let parts = self.config.split_actions();
        if !parts.is_empty() {
            let sum = parts.iter().map(|(_, width)| width).sum();
            let names: Vec<_> = parts.iter().map(|(name, width)| format!("{name} [{width}]")).collect();
            let names = names.join(", ");
            if [feature, counted].into_iter().flatten().any(|width| width != sum) {
                let why =
                    format!("actions come in parts, {names}, but are normalized as another number of values");
                return Err(Error::format(path, why));
            }
            self.out.problems.push(format!("actions come in parts and are returned joined: {names}"));
            return Ok(sum);
        }
        let stated = self.config.action_width();
        // A base model states only its padding.
        let padding = stated == Some(self.config.max_action_dim);
        Ok(given
            .filter(|_| padding)
            .or(stated)
            .or(feature)
            .or(counted.filter(|&width| width > 1))
            .unwrap_or(self.config.max_action_dim))
    }

    /// What was read.
    ///
    /// # Errors
    /// Raw units were asked for and nothing lacks statistics.
    pub fn done(self) -> Result<Processors> {
        let raw = self.out.problems.iter().any(|problem| problem.starts_with("runs on raw units"));
        match self.options.raw_units && self.normalized && !raw {
            true => Err(self.options.needless_raw_units()),
            false => Ok(self.out),
        }
    }
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

/// lerobot's statistics must fit, unless they are a single value.
pub(super) fn fits(path: &Path, normalizer: &Normalizer, width: usize) -> Result<()> {
    match normalizer.needs_width() {
        Some(got) if got != width => Err(Error::format(
            path,
            format!("statistics of {ACTION} have {got} values, actions have {width}"),
        )),
        _ => Ok(()),
    }
}
