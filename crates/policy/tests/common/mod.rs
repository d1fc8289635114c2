//! Small checkpoint directories, and observations for them.

#![allow(dead_code)] // each test program uses some of it

use std::path::PathBuf;

use pi0_model::Kind;
use pi0_policy::*;
use serde_json::{Value, json};

/// A directory that goes away with its test.
pub struct Dir(pub PathBuf);

impl Dir {
    pub fn new(name: &str) -> Self {
        let path = std::env::temp_dir().join(format!("pi0-policy-{}-{name}", std::process::id()));
        let _ = std::fs::remove_dir_all(&path);
        std::fs::create_dir_all(&path).unwrap();
        Self(path)
    }

    pub fn write(&self, name: &str, content: impl AsRef<[u8]>) -> &Self {
        let path = self.0.join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, content).unwrap();
        self
    }

    pub fn edit(&self, name: &str, edit: impl FnOnce(&mut Value)) -> &Self {
        let mut value = serde_json::from_slice(&std::fs::read(self.0.join(name)).unwrap()).unwrap();
        edit(&mut value);
        self.write(name, value.to_string())
    }

    pub fn load(&self, facts: ModelFacts, options: &PolicyOptions) -> Result<Policy> {
        Policy::load(&self.0, facts, options)
    }
}

impl Drop for Dir {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.0);
    }
}

pub const FACTS: ModelFacts = ModelFacts {
    horizon: 5,
    action_dim: 32,
    state_dim: 32,
    max_tokens: 48,
    image_size: 8,
    vocab_size: 300,
    kind: Kind::Pi0,
    chunk_known: true,
};
/// A π0-FAST network with the golden data's vocabulary.
pub const FAST: ModelFacts = ModelFacts { max_tokens: 200, vocab_size: 1713, kind: Kind::Pi0Fast, ..FACTS };
/// A π0.5 network of the same sizes.
pub const PI05: ModelFacts = ModelFacts { max_tokens: 200, kind: Kind::Pi05, ..FACTS };

pub const STATE: [f32; 3] = [0.5, -2.0, 3.0];
pub const MEAN: [f32; 3] = [0.25, 1.0, 3.0];
pub const STD: [f32; 3] = [0.5, 2.0, 0.1];

pub fn lerobot(name: &str) -> Dir {
    let dir = Dir::new(name);
    // As text, because the order of the cameras counts and `json!` sorts.
    let config = r#"{
        "type": "pi0", "chunk_size": 5, "n_action_steps": 4, "future_key": {"x": 1},
        "input_features": {
            "observation.images.top": {"type": "VISUAL", "shape": [3, 8, 8]},
            "observation.state": {"type": "STATE", "shape": [3]},
            "observation.images.left_wrist": {"type": "VISUAL", "shape": [3, 8, 8]}
        },
        "output_features": {"action": {"type": "ACTION", "shape": [3]}}
    }"#;
    dir.write("config.json", config);
    let spec = LerobotProcessors {
        kind: Kind::Pi0,
        cameras: vec!["observation.images.top".into(), "observation.images.left_wrist".into()],
        image_size: 8,
        max_tokens: 48,
        state: VectorStats::MeanStd { mean: MEAN.into(), std: STD.into() },
        action: VectorStats::MeanStd { mean: MEAN.into(), std: STD.into() },
        tokenizer: TINY_TOKENIZER.into(),
    };
    write_lerobot_processors(&dir.0, &spec).unwrap();
    dir
}

pub fn image(value: u8) -> Image {
    Image::rgb8(vec![value; 3 * 8 * 8], 8, 8)
}

pub fn observation(cameras: &[&str], state: &[f32]) -> Observation {
    Observation {
        images: cameras.iter().map(|key| (key.to_string(), image(255))).collect(),
        state: state.iter().map(|&x| f64::from(x)).collect(),
        prompt: Some("pick up the fork".into()),
    }
}

pub fn error<T: std::fmt::Debug>(result: Result<T>) -> String {
    let error = result.unwrap_err();
    error.to_string()
}

/// Why a policy that loads does not run. The words name options that exist.
pub fn not_ready(policy: &Policy) -> String {
    let error = policy.preprocess(&observation(&["top"], &STATE)).unwrap_err();
    assert!(!error.is_bad_observation(), "{error}");
    assert_eq!(policy.ready().unwrap_err().to_string(), error.to_string());
    assert!(!policy.summary().missing.is_empty());
    error.to_string()
}

/// A safetensors file of f32 vectors.
pub fn safetensors(vectors: &[(&str, [f32; 3])]) -> Vec<u8> {
    let mut header = serde_json::Map::new();
    let mut data = Vec::new();
    for (name, values) in vectors {
        let start = data.len();
        data.extend(values.iter().flat_map(|x| x.to_le_bytes()));
        header.insert(
            (*name).into(),
            json!({"dtype": "F32", "shape": [3], "data_offsets": [start, data.len()]}),
        );
    }
    let header = Value::Object(header).to_string().into_bytes();
    [(header.len() as u64).to_le_bytes().to_vec(), header, data].concat()
}

pub fn openpi(name: &str, assets: &[&str]) -> Dir {
    let dir = Dir::new(name);
    dir.write("config.json", r#"{"action_dim": 32, "action_horizon": 5, "precision": "bfloat16"}"#);
    dir.write("tokenizer.json", TINY_TOKENIZER);
    for asset in assets {
        let ramp = |n: usize, scale: f64| (0..n).map(|i| scale * (i as f64 + 1.0)).collect::<Vec<_>>();
        let stats = json!({"norm_stats": {
            "state": {"mean": ramp(14, 0.01), "std": ramp(14, 0.1), "q01": ramp(14, -1.0), "q99": ramp(14, 1.0)},
            "actions": {
                "mean": ramp(14, 0.02), "std": ramp(14, 0.2), "q01": ramp(14, -0.5), "q99": ramp(14, 1.5)
            },
        }});
        dir.write(&format!("assets/{asset}/norm_stats.json"), stats.to_string());
    }
    dir
}
