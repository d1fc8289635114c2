//! A checkpoint as openpi converts them, for any robot, around the tiny network that lies in `models/tiny`.
#![allow(dead_code)] // each test that includes it uses its share

use std::fs;
use std::path::{Path, PathBuf};

use pi0_policy::{Robot, TINY_TOKENIZER};
use serde_json::{Value, json};
use tempfile::TempDir;

/// `models/tiny` of this repository.
pub fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny")
}

/// Writes an openpi checkpoint of `robot` that plans `horizon` actions. It lives as long as the result.
pub fn openpi_checkpoint(robot: Robot, horizon: usize) -> TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let arch = fs::read_to_string(tiny().join("arch.json")).expect("models/tiny/arch.json");
    let mut arch: Value = serde_json::from_str(&arch).expect("JSON");
    arch["horizon"] = json!(horizon);
    let config = json!({
        "action_dim": 32, "action_horizon": horizon, "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m", "precision": "bfloat16"
    });
    let asset = match robot {
        Robot::Aloha => "trossen",
        Robot::Droid => "droid",
        Robot::Libero => "physical-intelligence/libero",
        Robot::Ur5 => "ur5e",
    };
    let stats = |width: usize| {
        let value = |f: fn(f64) -> f64| (0..width).map(|i| f(i as f64)).collect::<Vec<f64>>();
        json!({"mean": value(|i| 0.1 * i.sin()), "std": value(|i| 0.8 + 0.02 * i)})
    };
    let norm = json!({"norm_stats": {
        "state": stats(robot.state_width()), "actions": stats(robot.action_width())
    }});
    let assets = dir.path().join("assets").join(asset);
    fs::create_dir_all(&assets).expect("a directory");
    for (path, text) in [
        (dir.path().join("arch.json"), arch.to_string()),
        (dir.path().join("config.json"), config.to_string()),
        (dir.path().join("tokenizer.json"), TINY_TOKENIZER.to_owned()),
        (assets.join("norm_stats.json"), norm.to_string()),
    ] {
        fs::write(path, text).expect("a file");
    }
    fs::copy(tiny().join("model.safetensors"), dir.path().join("model.safetensors")).expect("a copy");
    dir
}

/// A π0.5 checkpoint of lerobot that learned real-time chunking, for delays of up to six actions: the network of
/// `golden/d` in the policy of `golden/policy_pi05`.
pub fn pi05_checkpoint() -> TempDir {
    let golden = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden");
    let dir = tempfile::tempdir().expect("a temporary directory");
    let copy = |from: PathBuf, to: &str| {
        let to = dir.path().join(to);
        fs::create_dir_all(to.parent().expect("a folder")).expect("a directory");
        fs::copy(from, to).expect("a copy");
    };
    for entry in fs::read_dir(golden.join("policy_pi05")).expect("golden/policy_pi05") {
        let path = entry.expect("an entry").path();
        copy(path.clone(), path.file_name().and_then(|name| name.to_str()).expect("a name"));
    }
    copy(golden.join("tokens/tokenizer.json"), "tokenizer/tokenizer.json");
    copy(golden.join("d/model.safetensors"), "model.safetensors");
    copy(golden.join("d/arch.json"), "arch.json");
    let path = dir.path().join("config.json");
    let mut config: Value = serde_json::from_slice(&fs::read(&path).expect("config.json")).expect("JSON");
    config["rtc_training_max_delay"] = json!(6);
    fs::write(path, config.to_string()).expect("a file");
    dir
}

/// A copy of `models/tiny`, which is lerobot's and of no robot, with a changed file.
pub fn tiny_copy(name: &str, edit: impl FnOnce(&mut Value)) -> TempDir {
    let dir = tempfile::tempdir().expect("a temporary directory");
    let mut folders = vec![(tiny(), dir.path().to_owned())];
    while let Some((from, to)) = folders.pop() {
        fs::create_dir_all(&to).expect("a directory");
        for entry in fs::read_dir(from).expect("models/tiny") {
            let (path, to) = entry.map(|e| (e.path(), to.join(e.file_name()))).expect("an entry");
            match path.is_dir() {
                true => folders.push((path, to)),
                false => drop(fs::copy(path, to).expect("a copy")),
            }
        }
    }
    let path = dir.path().join(name);
    let mut value: Value = serde_json::from_slice(&fs::read(&path).expect("a file")).expect("JSON");
    edit(&mut value);
    fs::write(path, value.to_string()).expect("a file");
    dir
}
