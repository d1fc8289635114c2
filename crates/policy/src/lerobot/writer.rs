//! Writes the processor files of a lerobot checkpoint, for checkpoints made here.

use std::collections::BTreeMap;
use std::path::Path;

use pi0_model::Kind;
use safetensors::{Dtype, tensor::TensorView};
use serde_json::{Value, json};

use super::{ACTION, POSTPROCESSOR, PREPROCESSOR, STATE};
use crate::fast::SKIPPED;
use crate::{Error, Result};

/// A `tokenizer.json` of 300 entries laid out like PaliGemma's: PAD 0, EOS 1, BOS 2, newline 108, bytes for whatever
/// it does not know. Made by `tests/make_fixtures.py`.
pub const TINY_TOKENIZER: &str = include_str!("../../tests/data/tiny.json");

/// A codec of π0-FAST for chunks of few small motions, `processor_config.json` and `tokenizer.json`: the one of the golden
/// data. Made by `golden/make_tokens.py` with the published class.
pub const TINY_CODEC: [&str; 2] = [
    include_str!("../../tests/data/tiny_codec/processor_config.json"),
    include_str!("../../tests/data/tiny_codec/tokenizer.json"),
];

/// Statistics of one vector, as its kind of network is normalized by.
#[derive(Debug, Clone, PartialEq)]
#[allow(missing_docs)] // as many values in both
pub enum VectorStats {
    /// Means and standard deviations: π0, π0-FAST.
    MeanStd { mean: Vec<f32>, std: Vec<f32> },
    /// The first and the 99th percentile: π0.5.
    Quantiles { q01: Vec<f32>, q99: Vec<f32> },
}

impl VectorStats {
    /// Statistics of `kind` that change nothing: of values around 0 with deviation 1, or between -1 and 1.
    pub fn neutral(kind: Kind, width: usize) -> Self {
        match kind {
            Kind::Pi0 | Kind::Pi0Fast => Self::MeanStd { mean: vec![0.0; width], std: vec![1.0; width] },
            Kind::Pi05 => Self::Quantiles { q01: vec![-1.0; width], q99: vec![1.0; width] },
        }
    }

    fn named(&self) -> [(&'static str, &[f32]); 2] {
        match self {
            Self::MeanStd { mean, std } => [("mean", mean), ("std", std)],
            Self::Quantiles { q01, q99 } => [("q01", q01), ("q99", q99)],
        }
    }

    fn width(&self) -> usize {
        self.named()[0].1.len()
    }

    /// lerobot's name of the normalization.
    fn mode(&self) -> &'static str {
        match self {
            Self::MeanStd { .. } => "MEAN_STD",
            Self::Quantiles { .. } => "QUANTILES",
        }
    }
}

/// What the processor files say.
#[derive(Debug, Clone)]
pub struct LerobotProcessors {
    /// Which network the files are for: π0.5 and π0-FAST have the state in their prompt.
    pub kind: Kind,
    /// Camera features such as `observation.images.top`, in order.
    pub cameras: Vec<String>,
    /// Side of the camera images in the features' shapes.
    pub image_size: usize,
    /// Longest prompt in tokens.
    pub max_tokens: usize,
    /// Of the state.
    pub state: VectorStats,
    /// Of the actions.
    pub action: VectorStats,
    /// Content of `tokenizer/tokenizer.json`, such as [`TINY_TOKENIZER`].
    pub tokenizer: String,
}

/// Writes `policy_preprocessor.json`, `policy_postprocessor.json`, their statistics `tokenizer/tokenizer.json` and, for
/// π0-FAST, `action_tokenizer/` into an existing directory, as lerobot 0.5 and later lay them out.
pub fn write_lerobot_processors(directory: &Path, spec: &LerobotProcessors) -> Result<()> {
    let image = json!({"type": "VISUAL", "shape": [3, spec.image_size, spec.image_size]});
    let mut features: serde_json::Map<String, Value> =
        spec.cameras.iter().map(|key| (key.clone(), image.clone())).collect();
    let action = json!({"type": "ACTION", "shape": [spec.action.width()]});
    features.insert(STATE.into(), json!({"type": "STATE", "shape": [spec.state.width()]}));
    features.insert(ACTION.into(), action.clone());
    let norm_map = json!({"VISUAL": "IDENTITY", "STATE": spec.state.mode(), "ACTION": spec.action.mode()});

    let step = |name: &str, config: Value| json!({"registry_name": name, "config": config});
    let mut tokenize = step(
        "tokenizer_processor",
        json!({"max_length": spec.max_tokens, "task_key": "task", "padding_side": "right",
            "padding": "max_length", "truncation": true}),
    );
    tokenize["artifacts"] = json!({"tokenizer_name": "tokenizer"});
    let device = step("device_processor", json!({"device": "cpu", "float_dtype": null}));
    let relative = step(
        "relative_actions_processor",
        json!({"enabled": false, "exclude_joints": ["gripper"], "action_names": null}),
    );
    let normalize =
        step("normalizer_processor", json!({"eps": 1e-8, "features": features, "norm_map": norm_map}));
    let mut steps = vec![
        step("rename_observations_processor", json!({"rename_map": {}})),
        step("to_batch_processor", json!({})),
    ];
    // π0.5 writes the normalized state into the prompt, so it normalizes first.
    let normalizer = match spec.kind {
        Kind::Pi0 => {
            steps.extend([step("pi0_new_line_processor", json!({})), tokenize, device, relative, normalize]);
            6
        }
        Kind::Pi05 => {
            let write_state = step("pi05_prepare_state_tokenizer_processor_step", json!({}));
            steps.extend([relative, normalize, write_state, tokenize, device]);
            3
        }
        Kind::Pi0Fast => {
            let write_state = step("pi0_fast_prepare_state_tokenizer_processor_step", json!({}));
            let mut codes = step(
                "action_tokenizer_processor",
                json!({"max_action_tokens": 256, "fast_skip_tokens": SKIPPED, "allow_truncation": true}),
            );
            codes["artifacts"] = json!({"action_tokenizer_name": "action_tokenizer"});
            steps.extend([relative, normalize, write_state, tokenize, codes, device]);
            3
        }
    };
    let before_stats = format!("policy_preprocessor_step_{normalizer}_normalizer_processor.safetensors");
    steps[normalizer]["state_file"] = before_stats.as_str().into();
    let before = json!({"name": "policy_preprocessor", "steps": steps});
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
    write_stats(&directory.join(&before_stats), &stats)?;
    write_stats(&directory.join(after_stats), &stats)?;
    let folder = directory.join("tokenizer");
    std::fs::create_dir_all(&folder).map_err(|source| Error::Write { path: folder.clone(), source })?;
    write(&folder.join("tokenizer.json"), spec.tokenizer.as_bytes())?;
    if spec.kind == Kind::Pi0Fast {
        let folder = directory.join("action_tokenizer");
        std::fs::create_dir_all(&folder).map_err(|source| Error::Write { path: folder.clone(), source })?;
        let [settings, bpe] = TINY_CODEC;
        write(&folder.join("processor_config.json"), settings.as_bytes())?;
        write(&folder.join("tokenizer.json"), bpe.as_bytes())?;
    }
    Ok(())
}

/// The vocabulary of [`TINY_TOKENIZER`] with PaliGemma's last entries behind it, `<loc0000>` to `<seg127>`, which π0-FAST
/// writes its actions with.
pub fn tiny_fast_tokenizer() -> String {
    let mut file: Value = serde_json::from_str(TINY_TOKENIZER).expect("the tokenizer is JSON");
    let vocabulary = file["model"]["vocab"].as_object_mut().expect("the tokenizer has a vocabulary");
    let mut added = Vec::new();
    let names = (0..1024).map(|i| format!("<loc{i:04}>")).chain((0..128).map(|i| format!("<seg{i:03}>")));
    for name in names {
        let id = vocabulary.len();
        added.push(json!({"id": id, "content": name, "single_word": false, "lstrip": false, "rstrip": false,
            "normalized": false, "special": false}));
        vocabulary.insert(name, id.into());
    }
    file["added_tokens"].as_array_mut().expect("the tokenizer has added tokens").extend(added);
    file.to_string()
}

fn write_stats(path: &Path, stats: &[(&str, &VectorStats)]) -> Result<()> {
    let bytes = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
    let vectors: BTreeMap<String, Vec<u8>> = stats
        .iter()
        .flat_map(|(key, stats)| stats.named().map(|(name, values)| (format!("{key}.{name}"), bytes(values))))
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
