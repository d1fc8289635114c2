//! Whatever is in a file, reading it ends with a value or an error.

use std::path::Path;

use proptest::prelude::*;
use serde_json::{Value, json};

use crate::files::{parse_json, parse_vectors};
use crate::pipeline::{Formula, OPENPI_EPS};
use crate::statistics::{ACTION, STATE, Statistics};
use crate::{PolicyOptions, TINY_TOKENIZER, Tokenizer, lerobot};

const TINY_MODEL: &[u8] = include_bytes!("../tests/data/tiny.model");

/// JSON of keys that the readers look for, with values that they do not expect.
fn any_json() -> impl Strategy<Value = Value> {
    let leaf = prop_oneof![
        Just(Value::Null),
        any::<bool>().prop_map(Value::from),
        any::<i64>().prop_map(Value::from),
        prop_oneof![Just(1e308), Just(-0.0), any::<f64>()].prop_map(Value::from),
        "[a-z./]{0,12}".prop_map(Value::from),
        prop::sample::select(&WORDS[..]).prop_map(Value::from),
    ];
    leaf.prop_recursive(6, 64, 8, |inner| {
        prop_oneof![
            prop::collection::vec(inner.clone(), 0..6).prop_map(Value::from),
            prop::collection::hash_map(prop::sample::select(&WORDS[..]), inner, 0..8).prop_map(|map| map
                .into_iter()
                .map(|(key, value)| (key.to_owned(), value))
                .collect::<Value>()),
        ]
    })
}

const WORDS: [&str; 36] = [
    "norm_stats",
    "state",
    "actions",
    "mean",
    "std",
    "q01",
    "q99",
    "steps",
    "registry_name",
    "config",
    "state_file",
    "artifacts",
    "tokenizer_name",
    "rename_map",
    "max_length",
    "features",
    "norm_map",
    "eps",
    "type",
    "shape",
    "VISUAL",
    "STATE",
    "ACTION",
    "MEAN_STD",
    "enabled",
    "exclude_joints",
    "action_names",
    "normalizer_processor",
    "unnormalizer_processor",
    "tokenizer_processor",
    "relative_actions_processor",
    "absolute_actions_processor",
    "observation.state",
    "action",
    "delta_actions_processor",
    "pi05_prepare_state_tokenizer_processor_step",
];

/// A file with some bytes changed, and maybe cut.
fn damaged(file: &'static [u8]) -> impl Strategy<Value = Vec<u8>> {
    let changes = prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 0..6);
    (changes, prop::option::of(any::<prop::sample::Index>())).prop_map(|(changes, cut)| {
        let mut bytes = file.to_vec();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(file.len()));
        }
        bytes
    })
}

fn processors(before: &[u8], after: &[u8]) {
    let config = json!({"output_features": {"action": {"type": "ACTION", "shape": [3]}}});
    let config = serde_json::from_value(config).unwrap();
    let options = PolicyOptions::default();
    let mut reader = lerobot::Reader::new(&config, &options).unwrap();
    let path = Path::new("/nowhere/at/all.json");
    let _ = reader.before(path, before);
    let _ = reader.after(path, after);
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn processor_files(value in any_json(), step in any_json(), name in prop::sample::select(&WORDS[27..32])) {
        let bytes = value.to_string().into_bytes();
        processors(&bytes, &bytes);
        // A step that is known by name, with any configuration.
        let step = json!({"steps": [{"registry_name": name, "config": step}]}).to_string().into_bytes();
        processors(&step, &step);
        let _ = parse_json::<lerobot::Config>(Path::new("x"), &bytes);
    }

    #[test]
    fn norm_stats(value in any_json(), vectors in any::<[Vec<f64>; 4]>()) {
        let path = Path::new("norm_stats.json");
        let _ = Statistics::parse(path, value.to_string().as_bytes());
        let [a, b, c, d] = vectors;
        let stats = json!({"norm_stats": {"state": {"mean": a, "std": b}, "actions": {"mean": c, "std": d}}});
        let stats = Statistics::parse(path, stats.to_string().as_bytes()).unwrap();
        for key in [STATE, ACTION] {
            for (formula, names) in
                [(Formula::OpenPiZScore, ["mean", "std"]), (Formula::LerobotRange, ["mean", "std"])]
            {
                if let Ok(normalizer) = stats.normalizer(key, formula, names, OPENPI_EPS) {
                    normalizer.forward(&mut [1.0; 40]);
                    normalizer.inverse(&mut [1.0; 40]);
                }
            }
        }
    }

    #[test]
    fn bytes(bytes in prop::collection::vec(any::<u8>(), 0..200)) {
        processors(&bytes, &bytes);
        let _ = Statistics::parse(Path::new("x"), &bytes);
        let _ = parse_vectors(Path::new("x"), &bytes);
        let _ = Tokenizer::parse(Path::new("x.model"), &bytes);
        let _ = crate::Image::decode("x", &bytes);
    }

    #[test]
    fn sentencepiece_models(bytes in damaged(TINY_MODEL), text in ".{0,40}") {
        if let Ok(tokenizer) = Tokenizer::parse(Path::new("x.model"), &bytes) {
            let _ = tokenizer.encode(&text);
        }
    }

    #[test]
    fn tokenizer_json(bytes in damaged(TINY_TOKENIZER.as_bytes()), text in ".{0,40}") {
        if let Ok(tokenizer) = Tokenizer::parse(Path::new("x.json"), &bytes) {
            let _ = tokenizer.encode(&text);
        }
    }

    /// Both encoders give the same ids, and never a control id, for any text.
    #[test]
    fn any_text(text in ".{0,60}|[ a-z_\\n<>]{0,80}") {
        let json = Tokenizer::parse(Path::new("x.json"), TINY_TOKENIZER.as_bytes()).unwrap();
        let model = Tokenizer::parse(Path::new("x.model"), TINY_MODEL).unwrap();
        prop_assert_eq!(json.encode(&text).unwrap(), model.encode(&text).unwrap());
    }
}
