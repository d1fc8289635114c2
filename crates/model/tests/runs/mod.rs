//! The runs of golden cases: inputs as `meta.json` sets them, and checkpoints on the golden data's schedule. Also for the
//! tests of devices.

use std::path::{Path, PathBuf};

use pi0_model::golden::{read_inputs, read_previous_chunk};
use pi0_model::{Checkpoint, Clean, Config, Guidance, GuidanceSchedule, Inputs, Rtc};
use serde_json::Value;

/// The root of the repository; `PI0_REPOSITORY` where the tests run elsewhere than they were built, as scripts/gpu-check.sh
/// has them.
pub fn repository() -> PathBuf {
    match std::env::var_os("PI0_REPOSITORY") {
        Some(root) => root.into(),
        None => Path::new(env!("CARGO_MANIFEST_DIR")).join("../.."),
    }
}

fn json(path: &Path) -> Value {
    serde_json::from_str(&std::fs::read_to_string(path).unwrap()).unwrap()
}

/// What `meta.json` says of a case.
pub fn meta(case: &Path) -> Value {
    json(&case.join("meta.json"))
}

fn run_meta(case: &Path, run: &str) -> Value {
    meta(case)["runs"].as_array().unwrap().iter().find(|r| r["name"] == run).unwrap().clone()
}

/// The network that the weights belong to.
pub fn family(weights: &Path) -> String {
    json(&weights.join("arch.json"))["family"].as_str().unwrap_or("pi0").to_string()
}

/// The inputs of a run, with the previous chunk of one with real-time chunking, as `meta.json` sets it.
pub fn inputs(case: &Path, run: &str, c: &Config) -> Vec<Inputs> {
    let path = case.join(format!("{run}.inputs.safetensors"));
    let mut batch = read_inputs(&path).unwrap();
    let Some(previous) = read_previous_chunk(&path, batch.len(), c.action_dim).unwrap() else { return batch };
    let rtc = &run_meta(case, run)["rtc"];
    let number = |key: &str| rtc[key].as_u64().unwrap() as usize;
    let delay = number("inference_delay");
    for (inputs, previous) in batch.iter_mut().zip(previous) {
        inputs.rtc = Some(match rtc["mode"].as_str().unwrap() {
            "trained" => Rtc::Trained(Clean { previous, delay }),
            _ => Rtc::Guided(Guidance {
                previous,
                delay,
                execution_horizon: number("execution_horizon"),
                max_weight: rtc["max_guidance_weight"].as_f64().unwrap(),
                schedule: match rtc["prefix_attention_schedule"].as_str().unwrap() {
                    "ZEROS" => GuidanceSchedule::Zeros,
                    "ONES" => GuidanceSchedule::Ones,
                    "LINEAR" => GuidanceSchedule::Linear,
                    "EXP" => GuidanceSchedule::Exp,
                    other => panic!("{other}"),
                },
            }),
        });
    }
    batch
}

/// openpi's configuration has one schedule and lerobot's another; the golden data always follows lerobot's.
#[allow(dead_code)] // not of every test that includes this
pub fn checkpoint(case: &Path) -> Checkpoint {
    let mut checkpoint = Checkpoint::open(case).unwrap();
    checkpoint.config.schedule = pi0_model::TimeSchedule::Lerobot;
    checkpoint
}

/// Names of the runs of a case.
pub fn runs(case: &Path) -> Vec<String> {
    let files = std::fs::read_dir(case).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut runs: Vec<_> =
        files.filter_map(|f| Some(f.strip_suffix(".inputs.safetensors")?.to_string())).collect();
    runs.sort();
    runs
}
