//! Writes the processor files of a lerobot checkpoint, for checkpoints made here.

use std::collections::BTreeMap;
use std::path::Path;

use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

use crate::lerobot::{ACTION, POSTPROCESSOR, PREPROCESSOR, STATE};
use crate::{Error, Result};

/// A `tokenizer.json` of 300 entries laid out like PaliGemma's: PAD 0, EOS 1, BOS 2, newline 108, bytes for whatever
/// it does not know. Made by `tests/make_fixtures.py`.
pub const TINY_TOKENIZER: &str = include_str!("../../tests/data/tiny.json");

/// Statistics of one vector.
#[derive(Debug, Clone, PartialEq)]
pub struct MeanStd {
    /// Means.
    pub mean: Vec<f32>,
    /// Standard deviations, as many.
    pub std: Vec<f32>,
}

/// What the processor files say.
#[derive(Debug, Clone)]
pub struct LerobotProcessors {
    /// Camera features such as `observation.images.top`, in order.
    pub cameras: Vec<String>,
    /// Side of the camera images in the features' shapes.
    pub image_size: usize,
    /// Longest prompt in tokens.
    pub max_tokens: usize,
    /// Of the state.
    pub state: MeanStd,
    /// Of the actions.
    pub action: MeanStd,
    /// Content of `tokenizer/tokenizer.json`, such as [`TINY_TOKENIZER`].
    pub tokenizer: String,
}

/// Writes `policy_preprocessor.json`, `policy_postprocessor.json`, their statistics and `tokenizer/tokenizer.json`
/// into an existing directory, as lerobot 0.5 and later lay them out.
pub fn write_lerobot_processors(directory: &Path, spec: &LerobotProcessors) -> Result<()> {
    let image = json!({"type": "VISUAL", "shape": [3, spec.image_size, spec.image_size]});
    let mut features: serde_json::Map<String, Value> =
        spec.cameras.iter().map(|key| (key.clone(), image.clone())).collect();
    let action = json!({"type": "ACTION", "shape": [spec.action.mean.len()]});
    features.insert(STATE.into(), json!({"type": "STATE", "shape": [spec.state.mean.len()]}));
    features.insert(ACTION.into(), action.clone());
    let norm_map = json!({"VISUAL": "IDENTITY", "STATE": "MEAN_STD", "ACTION": "MEAN_STD"});

    let before_stats = "policy_preprocessor_step_6_normalizer_processor.safetensors";
    let before = json!({"name": "policy_preprocessor", "steps": [
        {"registry_name": "rename_observations_processor", "config": {"rename_map": {}}},
        {"registry_name": "to_batch_processor", "config": {}},
        {"registry_name": "pi0_new_line_processor", "config": {}},
        {"registry_name": "tokenizer_processor", "artifacts": {"tokenizer_name": "tokenizer"}, "config": {
            "max_length": spec.max_tokens, "task_key": "task", "padding_side": "right", "padding": "max_length",
            "truncation": true}},
        {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": null}},
        {"registry_name": "relative_actions_processor", "config": {
            "enabled": false, "exclude_joints": ["gripper"], "action_names": null}},
        {"registry_name": "normalizer_processor", "state_file": before_stats, "config": {
            "eps": 1e-8, "features": features, "norm_map": norm_map}},
    ]});
    let after_stats = "policy_postprocessor_step_0_unnormalizer_processor.safetensors";
    let after = json!({"name": "policy_postprocessor", "steps": [
        {"registry_name": "unnormalizer_processor", "state_file": after_stats, "config": {
            "eps": 1e-8, "features": {ACTION: action}, "norm_map": norm_map}},
        {"registry_name": "absolute_actions_processor", "config": {"enabled": false}},
        {"registry_name": "device_processor", "config": {"device": "cpu", "float_dtype": null}},
    ]});

    let stats = [(STATE, &spec.state), (ACTION, &spec.action)];
    write(&directory.join(PREPROCESSOR), format!("{before:#}\n").as_bytes())?;
    write(&directory.join(POSTPROCESSOR), format!("{after:#}\n").as_bytes())?;
    write_stats(&directory.join(before_stats), &stats)?;
    write_stats(&directory.join(after_stats), &stats)?;
    let folder = directory.join("tokenizer");
    std::fs::create_dir_all(&folder).map_err(|source| Error::Write { path: folder.clone(), source })?;
    write(&folder.join("tokenizer.json"), spec.tokenizer.as_bytes())
}

fn write_stats(path: &Path, stats: &[(&str, &MeanStd)]) -> Result<()> {
    let bytes = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let vectors: BTreeMap<String, Vec<u8>> = stats
        .iter()
        .flat_map(|(key, stats)| {
            [(format!("{key}.mean"), bytes(&stats.mean)), (format!("{key}.std"), bytes(&stats.std))]
        })
        .collect();
    let views = vectors
        .iter()
        .map(|(name, bytes)| Ok((name, TensorView::new(Dtype::F32, vec![bytes.len() / 4], bytes)?)))
        .collect::<Result<Vec<_>, safetensors::SafeTensorError>>();
    let file = views.and_then(|views| safetensors::serialize(views, None));
    write(path, &file.map_err(|error| Error::format(path, error))?)
}

fn write(path: &Path, bytes: &[u8]) -> Result<()> {
    std::fs::write(path, bytes).map_err(|source| Error::Write { path: path.into(), source })
}
