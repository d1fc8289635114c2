//! A server of π0-FAST: `golden/f` in the policy of `golden/policy_fast`, whose observation it was taught to answer.

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use common::*;
use pi0_doctor::Kind;
use pi0_server::{Dtype, Examiner, Map, NdArray, Settings, Value, Verdict, recordings, replay};
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

/// What a reply says of the network's answer.
fn complaint(reply: &Map) -> Option<&Map> {
    let Some(Value::List(warnings)) = reply.get("pi0/warnings") else { return None };
    warnings.iter().find_map(|warning| match warning {
        Value::Map(map) if map.get("kind") == Some(&text("answer_malformed")) => Some(map),
        _ => None,
    })
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
    assert!(complaint(&reply).is_none(), "{reply:?}");

    server.end().await;

    // Cut off after ten tokens, an answer has no end: what is missing is told, and the server goes on.
    let kept = tempfile::tempdir().unwrap();
    let cut = |folder: &str, strict: Vec<Kind>| Settings {
        steps: Some(10),
        record: Some(kept.path().join(folder)),
        strict,
        ..settings()
    };
    let short = Running::start(fast_checkpoint(), cut("told", Vec::new()), None).await;
    let mut client = short.client().await;
    for count in [1, 2] {
        let Reply::Actions(reply) = client.infer(&good).await else { panic!("an answer") };
        let finding = complaint(&reply).unwrap_or_else(|| panic!("{reply:?}"));
        let Some(Value::Text(words)) = finding.get("text") else { panic!("{finding:?}") };
        assert!(words.contains("of 10 tokens has no end mark"), "{words}");
        assert_eq!(finding.get("count"), Some(&Value::Int(count)));
    }
    assert_eq!(short.metric("pi0_warnings_total{kind=\"answer_malformed\"}").await, 2.0);
    drop(client);
    short.end().await;

    // The one option that makes findings errors makes this one too, for the request that asked.
    let strict = Running::start(fast_checkpoint(), cut("refused", vec![Kind::AnswerMalformed]), None).await;
    let mut client = strict.client().await;
    let Reply::Error(words, _) = client.infer(&good).await else { panic!("an error") };
    assert!(words.contains("--strict: answer_malformed") && words.contains("no end mark"), "{words}");
    strict.end().await;

    // A recording says what was said then, without a network; and all of it can be run again.
    let dir = fast_checkpoint();
    let served = load(dir.path(), None);
    let mut examiner = Examiner::new(served.policy, served.model.config(), settings().doctor);
    let (_, path) = recordings(&kept.path().join("told")).unwrap().remove(0);
    let examined = examiner.open(&path).unwrap();
    assert!(examined.findings.iter().any(|finding| finding.kind == Kind::AnswerMalformed));
    for folder in ["told", "refused"] {
        let mut verdicts = Vec::new();
        let served = load(dir.path(), None);
        let folder = kept.path().join(folder);
        replay(served, &folder, Some(10), settings().doctor, |one| verdicts.push(one.verdict.clone()))
            .unwrap();
        assert!(!verdicts.is_empty());
        for verdict in verdicts {
            let same = match &verdict {
                Verdict::Actions { max_abs } => *max_abs == 0.0,
                Verdict::SameFailure(words) => words.contains("answer_malformed"),
                _ => false,
            };
            assert!(same, "{verdict:?}");
        }
    }
}
