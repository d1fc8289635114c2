//! lerobot checkpoints: `config.json` and the processor files, whose steps are executed as they are listed.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use crate::files::{
    Ordered, Vectors, inside, parse_json, read_json, read_small, read_vectors, read_vectors_of,
};
use crate::normalize::{Formula, Normalizer, Stats};
use crate::pipeline::{InputStep, OutputStep};
use crate::robot::AlohaUnits;
use crate::tokenizer::PromptFormat;
use crate::{Error, Result};

/// File names of the processors.
pub(crate) const PREPROCESSOR: &str = "policy_preprocessor.json";
pub(crate) const POSTPROCESSOR: &str = "policy_postprocessor.json";

pub(crate) const STATE: &str = "observation.state";
pub(crate) const ACTION: &str = "action";
const IMAGES: &str = "observation.images.";
/// torch's default where a step does not say.
const EPS: f64 = 1e-8;

/// The part of `config.json` that matters here, with lerobot's defaults.
#[derive(Debug, Deserialize)]
pub(crate) struct Config {
    #[serde(default = "fifty")]
    pub n_action_steps: usize,
    #[serde(default = "thirty_two")]
    pub max_action_dim: usize,
    #[serde(default = "forty_eight")]
    pub tokenizer_max_length: usize,
    #[serde(default)]
    pub empty_cameras: usize,
    #[serde(default)]
    pub input_features: Ordered<Feature>,
    #[serde(default)]
    pub output_features: Ordered<Feature>,
    #[serde(default)]
    pub normalization_mapping: HashMap<String, String>,
    /// Up to 0.3.
    #[serde(default)]
    pub adapt_to_pi_aloha: bool,
    /// Up to 0.3: its presence tells the layout.
    pub resize_imgs_with_padding: Option<Value>,
}

fn fifty() -> usize {
    50
}
fn thirty_two() -> usize {
    32
}
fn forty_eight() -> usize {
    48
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Feature {
    #[serde(rename = "type")]
    pub kind: String,
    pub shape: Vec<usize>,
}

impl Config {
    pub fn open(path: &Path) -> Result<Self> {
        read_json(path)
    }

    /// Camera features in order, lerobot's empty ones behind.
    pub fn cameras(&self) -> Vec<String> {
        let visual = self.input_features.0.iter().filter(|(_, feature)| feature.kind == "VISUAL");
        let mut keys: Vec<String> = visual.map(|(key, _)| key.clone()).collect();
        for i in 0..self.empty_cameras.min(MAX_EMPTY) {
            let key = format!("{IMAGES}empty_camera_{i}");
            if !keys.contains(&key) {
                keys.push(key);
            }
        }
        keys
    }

    /// Length of the state, where it is stated.
    pub fn state_width(&self) -> Option<usize> {
        self.input_features.get(STATE).and_then(|feature| feature.shape.first().copied())
    }

    /// Length of an action.
    pub fn action_width(&self) -> usize {
        let stated = self.output_features.get(ACTION).and_then(|feature| feature.shape.first().copied());
        stated.unwrap_or(self.max_action_dim)
    }

    fn mode(&self, kind: &str) -> &str {
        self.normalization_mapping
            .get(kind)
            .map_or(if kind == "VISUAL" { "IDENTITY" } else { "MEAN_STD" }, |mode| mode)
    }
}

/// More empty cameras than this are taken for a mistake.
const MAX_EMPTY: usize = 16;

/// Short names under which a feature's image may come: without `observation.images.` or `observation.`.
pub(crate) fn short_name(key: &str) -> &str {
    key.strip_prefix(IMAGES).or_else(|| key.strip_prefix("observation.")).unwrap_or(key)
}

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

#[derive(Deserialize)]
struct NormalizerConfig {
    eps: Option<f64>,
    #[serde(default)]
    features: Ordered<Feature>,
    #[serde(default)]
    norm_map: HashMap<String, String>,
    normalize_observation_keys: Option<Vec<String>>,
}

impl NormalizerConfig {
    fn mode(&self, kind: &str) -> &str {
        self.norm_map.get(kind).map_or("IDENTITY", |mode| mode)
    }

    fn is_identity(&self, kind: &str) -> bool {
        self.mode(kind) == "IDENTITY"
    }
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

fn unsupported(path: &Path, what: &str, advice: &str) -> Error {
    Error::Unsupported { path: path.into(), what: what.into(), advice: advice.into() }
}

fn unknown_step(path: &Path, name: &str) -> Error {
    unsupported(path, &format!("the processor step {name:?}"), "π0 checkpoints of lerobot do not have it")
}

/// Statistics of a step, from its file.
fn stats_of(directory: &Path, step: &Step, path: &Path) -> Result<Vectors> {
    match &step.state_file {
        Some(name) => read_vectors(&inside(directory, name, path)?),
        None => Ok(Vectors::new()),
    }
}

/// Images are never normalized in π0; a checkpoint that wants it would be run wrongly.
fn refuse_visual(path: &Path, config: &NormalizerConfig, stats: &Vectors) -> Result<()> {
    let visual = config.features.0.iter().filter(|(_, feature)| feature.kind == "VISUAL");
    let mut with_stats = visual.filter(|(key, _)| stats.contains_key(&format!("{key}.mean")));
    if !config.is_identity("VISUAL") && with_stats.next().is_some() {
        let what = format!("{} normalization of images", config.mode("VISUAL"));
        return Err(unsupported(path, &what, "π0 takes them as they are"));
    }
    Ok(())
}

fn normalizer(
    path: &Path,
    config: &NormalizerConfig,
    stats: &Vectors,
    key: &str,
    kind: &str,
) -> Result<Option<Normalizer>> {
    let eps = config.eps.unwrap_or(EPS);
    if !(0.0..1.0).contains(&eps) {
        return Err(Error::format(path, format!("eps is {eps}")));
    }
    make_normalizer(
        path,
        config.mode(kind),
        eps,
        key,
        |stat| stats.get(&format!("{key}.{stat}")),
        stats.keys(),
    )
}

/// The normalization of feature `key` in a mode, if there are statistics of it.
fn make_normalizer<'a>(
    path: &Path,
    mode: &str,
    eps: f64,
    key: &str,
    stat: impl Fn(&str) -> Option<&'a Vec<f64>>,
    names: impl Iterator<Item = &'a String>,
) -> Result<Option<Normalizer>> {
    let (formula, [a, b]) = match mode {
        "IDENTITY" => return Ok(None),
        "MEAN_STD" => (Formula::LerobotMeanStd, ["mean", "std"]),
        "MIN_MAX" => (Formula::LerobotRange, ["min", "max"]),
        "QUANTILES" => (Formula::LerobotRange, ["q01", "q99"]),
        "QUANTILE10" => (Formula::LerobotRange, ["q10", "q90"]),
        other => {
            return Err(unsupported(
                path,
                &format!("normalization mode {other:?}"),
                "lerobot does not have it",
            ));
        }
    };
    // A name is `<feature>.<stat>`, split at the last dot.
    if !names.into_iter().any(|name| name.rsplit_once('.').is_some_and(|(feature, _)| feature == key)) {
        return Ok(None);
    }
    let missing = |stat: &str| Error::format(path, format!("{mode} normalization of {key} needs its {stat}"));
    let stats = Stats {
        a: stat(a).ok_or_else(|| missing(a))?.clone(),
        b: stat(b).ok_or_else(|| missing(b))?.clone(),
    };
    stats.check([a, b]).map_err(|why| Error::format(path, format!("statistics of {key}: {why}")))?;
    Ok(Some(Normalizer { formula, stats, eps }))
}

fn fits(path: &Path, normalizer: &Normalizer, width: usize) -> Result<()> {
    match normalizer.needs_width() {
        Some(got) if got != width => Err(Error::format(
            path,
            format!("statistics of {ACTION} have {got} values, actions have {width}"),
        )),
        _ => Ok(()),
    }
}

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
