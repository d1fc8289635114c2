//! The part of lerobot's `config.json` that matters to a policy.

use std::collections::HashMap;
use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use super::{ACTION, IMAGES, STATE};
use crate::Result;
use crate::files::{Ordered, read_json};

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
pub(super) fn forty_eight() -> usize {
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

    pub(super) fn mode(&self, kind: &str) -> &str {
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
