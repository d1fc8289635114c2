//! The part of lerobot's `config.json` that matters to a policy.

use std::collections::HashMap;
use std::path::Path;

use serde::{Deserialize, Deserializer};
use serde_json::{Map, Value};

use super::{ACTION, IMAGES, STATE, unsupported};
use crate::files::{Ordered, parse_json, read_small};
use crate::{Error, Result};

/// With lerobot's defaults.
#[derive(Debug, Deserialize)]
pub(crate) struct Config {
    /// `pi0`, `pi05` or `pi0_fast`.
    #[serde(rename = "type", default)]
    pub kind: String,
    #[serde(default = "fifty")]
    pub n_action_steps: usize,
    #[serde(default = "thirty_two")]
    pub max_action_dim: usize,
    #[serde(default = "thirty_two")]
    pub max_state_dim: usize,
    tokenizer_max_length: Option<usize>,
    #[serde(default)]
    pub empty_cameras: usize,
    #[serde(default, deserialize_with = "or_default")]
    pub input_features: Ordered<Feature>,
    #[serde(default, deserialize_with = "or_default")]
    pub output_features: Ordered<Feature>,
    #[serde(default, deserialize_with = "or_default")]
    normalization_mapping: HashMap<String, String>,
    #[serde(default = "one")]
    n_obs_steps: usize,
    #[serde(default)]
    use_visual_memory: bool,
    #[serde(default)]
    use_proprioceptive_memory: bool,
    /// π0-FAST: ids behind those that stand for codes.
    #[serde(default = "skipped")]
    pub fast_skip_tokens: usize,
    /// π0-FAST: whether an answer that does not begin with `Action:` is refused.
    #[serde(default = "yes")]
    pub validate_action_token_prefix: bool,
    /// Up to 0.3.
    #[serde(default)]
    pub adapt_to_pi_aloha: bool,
    /// Up to 0.3, which refused to run it; set in checkpoints converted from openpi.
    #[serde(default)]
    pub use_delta_joint_actions_aloha: bool,
    /// Up to 0.3: its presence tells the layout.
    pub resize_imgs_with_padding: Option<Value>,
}

/// Names a number that is none: of these lerobot reads neither `null` nor fractions.
fn check_numbers(path: &Path, json: &Map<String, Value>) -> Result<()> {
    const NUMBERS: [&str; 7] = [
        "n_action_steps",
        "max_action_dim",
        "max_state_dim",
        "tokenizer_max_length",
        "empty_cameras",
        "n_obs_steps",
        "fast_skip_tokens",
    ];
    match NUMBERS.iter().find_map(|key| Some((key, json.get(*key).filter(|v| v.as_u64().is_none())?))) {
        Some((key, value)) => {
            let why =
                format!("{key} is {value}, wanted a whole number; without the line lerobot's default counts");
            Err(Error::format(path, why))
        }
        None => Ok(()),
    }
}

/// `null` is as good as nothing.
fn or_default<'de, D: Deserializer<'de>, T: Deserialize<'de> + Default>(from: D) -> Result<T, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

fn one() -> usize {
    1
}
fn fifty() -> usize {
    50
}
fn skipped() -> usize {
    crate::fast::SKIPPED
}
fn yes() -> bool {
    true
}
fn thirty_two() -> usize {
    32
}

#[derive(Debug, Clone, Deserialize)]
pub(crate) struct Feature {
    #[serde(rename = "type")]
    pub kind: String,
    #[serde(default, deserialize_with = "or_default")]
    pub shape: Vec<usize>,
}

impl Feature {
    fn is(&self, kind: &str) -> bool {
        self.kind == kind
    }

    /// The first size, the length of a vector.
    fn length(&self) -> Option<usize> {
        self.shape.first().copied()
    }
}

/// Features of one kind, in order.
pub(super) fn of_kind<'a>(
    features: &'a Ordered<Feature>,
    kind: &'a str,
) -> impl Iterator<Item = (&'a String, &'a Feature)> {
    features.0.iter().filter(move |(_, feature)| feature.is(kind)).map(|(key, feature)| (key, feature))
}

/// More empty cameras than this are taken for a mistake.
const MAX_EMPTY: usize = 16;

impl Config {
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = read_small(path)?;
        check_numbers(path, &parse_json(path, &bytes)?)?;
        let config: Self = parse_json(path, &bytes)?;
        let trained = |what: &str| Err(unsupported(path, what, "the network here sees one moment"));
        if config.use_visual_memory {
            return trained("use_visual_memory");
        }
        if config.use_proprioceptive_memory {
            return trained("use_proprioceptive_memory");
        }
        if config.n_obs_steps > 1 {
            return trained(&format!("n_obs_steps of {}", config.n_obs_steps));
        }
        Ok(config)
    }

    pub fn is_pi05(&self) -> bool {
        self.kind == "pi05"
    }

    pub fn is_fast(&self) -> bool {
        self.kind == "pi0_fast"
    }

    /// Whether the prompt holds the state.
    pub fn state_in_prompt(&self) -> bool {
        self.is_pi05() || self.is_fast()
    }

    /// Longest prompt in tokens.
    pub fn max_tokens(&self) -> usize {
        self.tokenizer_max_length.unwrap_or(if self.state_in_prompt() { 200 } else { 48 })
    }

    /// Adds lerobot's empty cameras to the others.
    pub fn with_empty_cameras(&self, mut keys: Vec<String>) -> Vec<String> {
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
        self.input_features.get(STATE).and_then(Feature::length)
    }

    /// Length of the feature `action`, where it is stated.
    pub fn action_width(&self) -> Option<usize> {
        self.output_features.get(ACTION).and_then(Feature::length)
    }

    /// Features that together are the action, where none is called `action`.
    pub fn split_actions(&self) -> Vec<(&str, usize)> {
        match self.output_features.get(ACTION) {
            Some(_) => Vec::new(),
            None => of_kind(&self.output_features, "ACTION")
                .map(|(key, feature)| (key.as_str(), feature.length().unwrap_or(0)))
                .collect(),
        }
    }

    /// Normalization of a kind of features where no processor says it.
    pub fn mode(&self, kind: &str) -> &str {
        let default = match kind {
            "VISUAL" => "IDENTITY",
            _ if self.is_pi05() => "QUANTILES",
            _ => "MEAN_STD",
        };
        self.normalization_mapping.get(kind).map_or(default, |mode| mode)
    }
}
