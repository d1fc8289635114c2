//! A server of π0-FAST: `golden/f` in the policy of `golden/policy_fast`, whose observation it was taught to answer.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::*;
use pi0_server::{Dtype, Map, NdArray, Value};
use safetensors::SafeTensors;
use tempfile::TempDir;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden")
}

fn fast_checkpoint() -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let copy = |from: PathBuf, to: &str| {
        let to = dir.path().join(to);
        fs::create_dir_all(to.parent().unwrap()).unwrap();
        fs::copy(from, to).unwrap();
    };
    for entry in fs::read_dir(golden().join("policy_fast")).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            copy(path.clone(), path.file_name().unwrap().to_str().unwrap());
        }
    }
    for file in ["processor_config.json", "tokenizer.json"] {
        let name = format!("action_tokenizer/{file}");
        copy(golden().join("policy_fast").join(&name), &name);
    }
    copy(golden().join("tokens/tokenizer.json"), "tokenizer/tokenizer.json");
    for file in ["model.safetensors", "arch.json"] {
        copy(golden().join("f").join(file), file);
    }
    dir
}

/// The observation, and the actions that lerobot makes of it.
fn observation() -> (Value, Vec<f32>) {
    let bytes = fs::read(golden().join("policy_fast/e2e.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let floats = |name: &str| -> Vec<f32> {
        let data = file.tensor(name).unwrap().data().to_vec();
        data.as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    };
    let image = |i: usize| {
        let data = file.tensor(&format!("raw.image_{i}")).unwrap().data().to_vec();
        Value::Array(NdArray::new(Dtype::U8, vec![30, 40, 3], data.into()).unwrap())
    };
    let state: Vec<f64> = floats("raw.state").into_iter().map(f64::from).collect();
    let observation = Value::Map(Map::from([
        ("observation.images.front", image(0)),
        ("observation.images.wrist", image(1)),
        ("observation.state", Value::Array(NdArray::from_f64(vec![7], &state).unwrap())),
        ("task", Value::Text("Pick up the_red block\n".into())),
    ]));
    (observation, floats("actions"))
}

#[tokio::test(flavor = "multi_thread")]
async fn answers_become_actions_and_malformed_ones_are_told() {
    let (good, want) = observation();
    let server = Running::start(fast_checkpoint(), settings(), None).await;
    let mut client = server.client().await;
    let Reply::Actions(reply) = client.infer(&good).await else { panic!("an answer") };
    let Some(Value::Array(actions)) = reply.get("actions") else { panic!("actions") };
    assert_eq!(actions.shape, [10, 4]);
    let far = actions
        .numbers()
        .unwrap()
        .iter()
        .zip(&want)
        .map(|(a, b)| (a - f64::from(*b)).abs())
        .fold(0.0, f64::max);
    assert!(far < 1e-5, "{far}");
    assert!(reply.get("warnings").is_none());

    // Cut off after ten tokens, an answer has no end: what is missing is told, and the server goes on.
    let short =
        Running::start(fast_checkpoint(), pi0_server::Settings { steps: Some(10), ..settings() }, None).await;
    let mut other = short.client().await;
    let Reply::Actions(reply) = other.infer(&good).await else { panic!("an answer") };
    let Some(Value::List(warnings)) = reply.get("warnings") else { panic!("warnings: {reply:?}") };
    let Some(Value::Text(first)) = warnings.first() else { panic!("a text") };
    assert!(first.contains("of 10 tokens has no end mark"), "{first}");
    short.end().await;
    server.end().await;
}
