//! Prompts of openpi and lerobot, token by token, and a whole π0.5 policy of lerobot, from camera images to actions. Data
//! in `golden/`, made by running both.

mod common;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use common::*;
use pi0_device::Reference;
use pi0_model::{Checkpoint, Extent, Pi0, SampleOptions};
use pi0_policy::*;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};

/// What a golden policy saw.
fn observation(said: &Value, file: &SafeTensors<'_>, state: &[f32]) -> Observation {
    let images = said["cameras"].as_array().unwrap().iter().enumerate().map(|(i, name)| {
        let data = file.tensor(&format!("raw.image_{i}")).unwrap().data().to_vec();
        (name.as_str().unwrap().to_owned(), Image::rgb8(data, 30, 40))
    });
    Observation {
        images: images.collect(),
        state: state.iter().copied().map(f64::from).collect(),
        prompt: Some(said["prompt"].as_str().unwrap().into()),
    }
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden").join(name)
}

fn read(name: &str) -> Value {
    serde_json::from_slice(&std::fs::read(golden(name)).unwrap()).unwrap()
}

/// One prompt with one state.
struct Case(Value);

impl Case {
    fn all() -> Vec<Case> {
        let cases: Vec<Case> =
            read("tokens/prompts.json").as_array().unwrap().iter().cloned().map(Case).collect();
        assert_eq!(cases.len(), 18);
        cases
    }

    fn name(&self) -> &str {
        self.0["name"].as_str().unwrap()
    }

    fn task(&self) -> &str {
        self.0["task"].as_str().unwrap()
    }

    /// JSON has no name for NaN and infinity.
    fn state(&self) -> Vec<f64> {
        let value = |x: &Value| x.as_f64().unwrap_or_else(|| x.as_str().unwrap().parse().unwrap());
        self.0["state"].as_array().unwrap().iter().map(value).collect()
    }

    fn ids(&self, family: &str, form: &str) -> Vec<u32> {
        let ids = self.0[family][form].as_array().unwrap();
        ids.iter().map(|id| id.as_u64().unwrap() as u32).collect()
    }
}

fn tokenizers() -> [Tokenizer; 2] {
    ["tokenizer.model", "tokenizer.json"].map(|name| Tokenizer::open(&golden("tokens").join(name)).unwrap())
}

fn tokens(tokenizer: &Tokenizer, format: PromptFormat, text: &str, limit: usize) -> Vec<u32> {
    format.tokens(tokenizer, text, limit, 1713, &mut Vec::new()).unwrap()
}

#[test]
fn openpis_prompts() {
    let text = StateText { form: StateForm::Pi05, rounding: Rounding::F64, pad: 0 };
    for (case, tokenizer) in Case::all().iter().flat_map(|c| tokenizers().map(|t| (Case(c.0.clone()), t))) {
        let (name, task) = (case.name(), case.task());
        let state = text.write(task, &case.state());
        let pi05 = tokens(&tokenizer, PromptFormat::Verbatim, &state, 200);
        assert_eq!(pi05, case.ids("openpi", "pi05"), "{name}");
        let fast = StateText { form: StateForm::FastOpenPi, ..text }.write(task, &case.state());
        let fast = tokens(&tokenizer, PromptFormat::Verbatim, &fast, 250);
        assert_eq!(fast, case.ids("openpi", "pi0_fast"), "{name}");
        let plain = |limit| tokens(&tokenizer, PromptFormat::OpenPi, task, limit);
        assert_eq!(plain(48), case.ids("openpi", "pi0"), "{name}");
        assert_eq!(plain(200), case.ids("openpi", "pi05_no_state"), "{name}: discrete_state_input=False");
    }
}

#[test]
fn lerobots_prompts() {
    let text = StateText { form: StateForm::Pi05, rounding: Rounding::F32, pad: 0 };
    for (case, tokenizer) in Case::all().iter().flat_map(|c| tokenizers().map(|t| (Case(c.0.clone()), t))) {
        let (name, task) = (case.name(), case.task());
        let state = text.write(task, &case.state());
        assert_eq!(state, case.0["lerobot"]["pi05_text"].as_str().unwrap(), "{name}");
        // lerobot's tokenizer makes control ids of `<bos>` in a user's text; here text stays text, as in openpi.
        let family = if name.starts_with("markers/") { "openpi" } else { "lerobot" };
        let pi05 = tokens(&tokenizer, PromptFormat::Verbatim, &state, 200);
        assert_eq!(pi05, case.ids(family, "pi05"), "{name}");
        let fast = StateText { form: StateForm::FastLerobot, ..text }.write(task, &case.state());
        assert_eq!(fast, case.0["lerobot"]["pi0_fast_text"].as_str().unwrap(), "{name}");
        let fast = tokens(&tokenizer, PromptFormat::Verbatim, &fast, 200);
        if family == "lerobot" {
            assert_eq!(fast, case.ids(family, "pi0_fast"), "{name}");
        }
        let line = if task.ends_with('\n') { task.to_owned() } else { format!("{task}\n") };
        let pi0 = tokens(&tokenizer, PromptFormat::Verbatim, &line, 48);
        assert_eq!(pi0, case.ids(family, "pi0"), "{name}");
    }
}

/// The same through whole policies, whose statistics leave values as they are.
#[test]
fn policies_write_these_prompts() {
    let openpi = |pi05: bool, width: usize, options: &PolicyOptions| {
        let dir = Dir::new(&format!("golden-openpi-{width}"));
        dir.write("config.json", r#"{"action_horizon": 5}"#);
        let half = (2.0 - 1e-6) / 2.0;
        let stats = |n: usize| json!({"mean": vec![0.0; n], "std": vec![1.0 - 1e-6; n], "q01": vec![-half; n], "q99": vec![half; n]});
        let file = json!({"state": stats(width), "actions": stats(7)}).to_string();
        dir.write("norm_stats.json", file);
        let facts = ModelFacts { vocab_size: 1713, ..if pi05 { PI05 } else { FACTS } };
        dir.load(facts, options).unwrap()
    };
    let options = |state_in_prompt| PolicyOptions {
        robot: RobotChoice::None,
        tokenizer: Some(golden("tokens/tokenizer.model")),
        state_in_prompt,
        ..Default::default()
    };
    let mut seen = 0;
    for case in Case::all() {
        let (name, state) = (case.name(), case.state());
        if state.is_empty() || state.iter().any(|x| !x.is_finite()) {
            continue;
        }
        let observation = Observation {
            images: vec![("base_0_rgb".into(), image(0))],
            state,
            prompt: Some(case.task().into()),
        };
        let width = observation.state.len();
        let plain = openpi(true, width, &options(Some(false))).preprocess(&observation).unwrap();
        assert_eq!(plain.inputs.tokens, case.ids("openpi", "pi05_no_state"), "{name}");
        let pi0 = openpi(false, width, &options(None)).preprocess(&observation).unwrap();
        assert_eq!(pi0.inputs.tokens, case.ids("openpi", "pi0"), "{name}");

        let pi05 = openpi(true, width, &options(Some(true))).preprocess(&observation);
        if case.ids("openpi", "pi05").len() == 200 {
            let error = pi05.unwrap_err();
            assert!(error.is_bad_observation(), "{error}");
            assert!(error.to_string().contains("the state, which comes last, would be cut off"), "{error}");
        } else if !["/edges", "/f64_f32", "/zeros32"].iter().any(|edges| name.ends_with(edges)) {
            // On the edges the normalization itself rounds.
            assert_eq!(pi05.unwrap().inputs.tokens, case.ids("openpi", "pi05"), "{name}");
            seen += 1;
        }
    }
    assert_eq!(seen, 11);
}

/// lerobot's policy directory: raw images, state and task to tokens, images and actions.
#[test]
fn a_pi05_policy_of_lerobot_end_to_end() {
    let said = read("policy_pi05/e2e.json");
    let bytes = std::fs::read(golden("policy_pi05/e2e.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let floats = |name: &str| -> Vec<f32> {
        let tensor = file.tensor(name).unwrap();
        assert_eq!(tensor.dtype(), Dtype::F32);
        tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    };
    let far = |got: &[f64], wanted: &[f32]| -> f64 {
        assert_eq!(got.len(), wanted.len());
        got.iter().zip(wanted).map(|(a, b)| (a - f64::from(*b)).abs()).fold(0.0, f64::max)
    };

    let checkpoint = Checkpoint::open(&golden("d")).unwrap();
    let tokenizer = Some(golden("tokens/tokenizer.json"));
    let options = PolicyOptions { tokenizer, ..Default::default() };
    let policy =
        Policy::load(&golden("policy_pi05"), ModelFacts::from(&checkpoint.config), &options).unwrap();
    policy.ready().unwrap();
    let summary = policy.summary();
    assert_eq!(
        summary.state_in_prompt,
        Some(StateText { form: StateForm::Pi05, rounding: Rounding::F32, pad: 0 })
    );
    assert_eq!(summary.state_normalization.unwrap().kind, Formula::LerobotRange);
    let [state, action, tokenizer] = summary.problems.as_slice() else { panic!("{:?}", summary.problems) };
    assert!(state.starts_with("dimensions [2] of observation.state never moved in training"), "{state}");
    assert!(action.starts_with("dimensions [2] of action never moved in training"), "{action}");
    assert!(tokenizer.contains("has 1713 entries, the model only 560"), "{tokenizer}");

    let observation = observation(&said, &file, &floats("raw.state"));
    let mut prepared = policy.preprocess(&observation).unwrap();
    let mask = floats("processed.token_mask");
    let valid: Vec<u32> = floats("processed.tokens")
        .iter()
        .zip(mask)
        .filter(|(_, on)| *on != 0.0)
        .map(|(id, _)| *id as u32)
        .collect();
    assert_eq!(prepared.inputs.tokens, valid, "{}", said["text"]);
    let state: Vec<f64> = prepared.inputs.state[..7].iter().map(|&x| f64::from(x)).collect();
    assert_eq!(far(&state, &floats("processed.state")), 0.0);
    assert_eq!(prepared.inputs.images.len(), 3);
    assert!(prepared.inputs.images[2].is_none());
    for (i, image) in prepared.inputs.images.iter().take(2).enumerate() {
        let image: Vec<f64> = image.as_ref().unwrap().iter().map(|&x| f64::from(x)).collect();
        let far = far(&image, &floats(&format!("processed.image_{i}")));
        assert!(far <= 2e-6, "image {i}: {far}");
    }

    prepared.inputs.noise = Some(floats("noise"));
    let model = Pi0::load(Reference, checkpoint, Extent::Whole, &|_| ()).unwrap();
    let inputs = std::slice::from_ref(&prepared.inputs);
    let chunk = &model.sample_actions(inputs, &SampleOptions::default()).unwrap()[0];
    let actions = policy.postprocess(&chunk.data, &prepared).unwrap();
    assert_eq!((actions.rows, actions.cols), (8, 6));
    let wanted = floats("actions");
    let far = far(&actions.data, &wanted[..8 * 6]);
    assert!(far <= 1e-5, "{far}");
    println!("actions within {far:.1e}");
}

/// What lerobot 0.4 and later ones make of the same files.
#[test]
fn a_pi05_policy_of_an_older_lerobot_asks_which() {
    let dir = Dir::new("golden-version");
    for entry in std::fs::read_dir(golden("policy_pi05")).unwrap() {
        let path = entry.unwrap().path();
        dir.write(path.file_name().unwrap().to_str().unwrap(), std::fs::read(&path).unwrap());
    }
    dir.edit("policy_preprocessor.json", |file| {
        file["steps"].as_array_mut().unwrap().retain(|s| s["registry_name"] != "relative_actions_processor");
    });
    dir.edit("policy_postprocessor.json", |file| {
        file["steps"].as_array_mut().unwrap().retain(|s| s["registry_name"] != "absolute_actions_processor");
    });
    dir.edit("config.json", |config| config["n_action_steps"] = 5.into());
    let facts = ModelFacts { vocab_size: 1713, ..PI05 };
    let load = |lerobot_version| {
        let tokenizer = Some(golden("tokens/tokenizer.json"));
        dir.load(facts, &PolicyOptions { tokenizer, lerobot_version, ..Default::default() }).unwrap()
    };
    let error = load(None).ready().unwrap_err().to_string();
    assert!(
        error.contains("bars of letterboxed images (-3 in 0.4, -1 in 0.5) and the state in the prompt"),
        "{error}"
    );
    assert!(error.contains("--lerobot-version 0.4 or 0.5"), "{error}");
    let states: BTreeMap<_, _> =
        [(LerobotVersion::V0_4, (32, Pad::Center3)), (LerobotVersion::V0_5, (0, Pad::Center))]
            .into_iter()
            .map(|(version, wanted)| {
                let policy = load(Some(version));
                policy.ready().unwrap();
                let summary = policy.summary();
                assert_eq!((summary.state_in_prompt.unwrap().pad, summary.resize.pad), wanted);
                (wanted.0, summary)
            })
            .collect();
    assert_eq!(states.len(), 2);
}

/// lerobot's π0-FAST policy directory: raw images, state and task to a prompt, the answer to actions.
#[test]
fn a_fast_policy_of_lerobot_end_to_end() {
    let said = read("policy_fast/e2e.json");
    let bytes = std::fs::read(golden("policy_fast/e2e.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let floats = |name: &str| -> Vec<f32> {
        let tensor = file.tensor(name).unwrap();
        tensor.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect()
    };
    let checkpoint = Checkpoint::open(&golden("f")).unwrap();
    let facts = ModelFacts::from(&checkpoint.config);
    let tokenizer = Some(golden("tokens/tokenizer.json"));
    let options = PolicyOptions { tokenizer, ..Default::default() };
    let policy = Policy::load(&golden("policy_fast"), facts, &options).unwrap();
    policy.ready().unwrap();
    let summary = policy.summary();
    let text = StateText { form: StateForm::FastLerobot, rounding: Rounding::F32, pad: 0 };
    assert_eq!(summary.state_in_prompt, Some(text));
    assert_eq!(summary.state_normalization.unwrap().kind, Formula::LerobotMeanStd);
    let codec = summary.action_tokenizer.unwrap();
    assert_eq!((codec.codes, codec.chunk), (160, [10, 4]));
    assert_eq!(codec.form, ReplyForm::Lerobot { checked: true });

    let observation = observation(&said, &file, &floats("raw.state"));
    let prepared = policy.preprocess(&observation).unwrap();
    let mask = floats("processed.token_mask");
    let tokens = floats("processed.tokens");
    let valid: Vec<u32> =
        tokens.iter().zip(mask).filter(|(_, on)| *on != 0.0).map(|(id, _)| *id as u32).collect();
    assert_eq!(prepared.inputs.tokens, valid, "{}", said["text"]);
    assert_eq!(prepared.inputs.end, Some(377));

    let model = Pi0::load(Reference, checkpoint, Extent::Cache, &|_| ()).unwrap();
    let inputs = std::slice::from_ref(&prepared.inputs);
    let answer = &model.sample_actions(inputs, &SampleOptions::default()).unwrap()[0];
    let far = |got: &[f64], wanted: &[f32]| {
        assert_eq!(got.len(), wanted.len());
        got.iter().zip(wanted).map(|(a, b)| (a - f64::from(*b)).abs()).fold(0.0, f64::max)
    };
    let reply = policy.read_answer(&answer.data).unwrap();
    assert_eq!((reply.shape, reply.faults.as_slice()), ([10, 4], [].as_slice()));
    let chunk = far(&reply.actions, &floats("actions.model"));
    let actions = policy.postprocess(&answer.data, &prepared).unwrap();
    assert_eq!((actions.rows, actions.cols, actions.warnings.as_slice()), (10, 4, [].as_slice()));
    let far = far(&actions.data, &floats("actions"));
    assert!(chunk <= 1e-6 && far <= 1e-6, "{chunk} {far}");
    println!("actions within {far:.1e}");

    // An answer without its last codes is told.
    let mut short = answer.data.clone();
    short.truncate(short.len() - 3);
    let told = policy.postprocess(&short, &prepared).unwrap().warnings;
    let words: Vec<_> = told.iter().map(ToString::to_string).collect();
    assert!(words[0].contains("has no end mark") && words[1].contains("coefficients"), "{words:?}");
    // No word of an answer at all.
    let error = policy.postprocess(&[5.0, 6.0], &prepared).unwrap_err();
    assert!(error.to_string().contains("and not with \"Action: \""), "{error}");
    assert!(
        policy.postprocess(&[0.5], &prepared).is_err() && policy.postprocess(&[-1.0], &prepared).is_err()
    );
}

#[test]
fn a_fast_policy_without_its_codec_is_not_ready() {
    let dir = Dir::new("golden-fast");
    for entry in std::fs::read_dir(golden("policy_fast")).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            dir.write(path.file_name().unwrap().to_str().unwrap(), std::fs::read(&path).unwrap());
        }
    }
    let facts = ModelFacts { action_dim: 4, horizon: 10, ..FAST };
    let tokenizer = Some(golden("tokens/tokenizer.json"));
    let options = PolicyOptions { tokenizer, ..Default::default() };
    let error = dir.load(facts, &options).unwrap().ready().unwrap_err();
    assert!(matches!(error, Error::NoActionTokenizer { .. }), "{error}");
    let with = |codec: &str| PolicyOptions { action_tokenizer: Some(golden(codec)), ..options.clone() };
    dir.load(facts, &with("tokens/fast_narrow")).unwrap().ready().unwrap();
    // Another kind of file, and a vocabulary without places for codes.
    assert!(dir.load(facts, &with("tokens")).unwrap_err().to_string().contains("processor_config.json"));
    let other = PolicyOptions { tokenizer: None, ..with("tokens/fast_narrow") };
    dir.write("tokenizer.json", TINY_TOKENIZER);
    let error = dir.load(facts, &other).unwrap_err().to_string();
    assert!(error.contains("not Gemma's"), "{error}");
    // The codec of π0-FAST means nothing for the others.
    let facts = ModelFacts { horizon: 10, ..PI05 };
    let error = Policy::load(&golden("policy_pi05"), facts, &with("tokens/fast_narrow")).unwrap_err();
    assert!(error.to_string().contains("only π0-FAST"), "{error}");
}

/// openpi's π0-FAST: quantiles, the task in lower case, cameras that are black and not masked.
#[test]
fn a_fast_policy_of_openpi() {
    let dir = Dir::new("golden-fast-openpi");
    let stats = |n: usize| json!({"mean": vec![0.0; n], "std": vec![1.0; n], "q01": vec![-1.0; n], "q99": vec![1.0; n]});
    dir.write("norm_stats.json", json!({"state": stats(8), "actions": stats(8)}).to_string());
    dir.write("params/x", "");
    let facts = ModelFacts { chunk_known: false, vocab_size: 1712, ..FAST };
    let options = PolicyOptions {
        config: Some("pi0_fast_droid".into()),
        tokenizer: Some(golden("tokens/tokenizer.model")),
        action_tokenizer: Some(golden("tokens/fast_narrow")),
        ..Default::default()
    };
    let policy = dir.load(facts, &options).unwrap();
    policy.ready().unwrap();
    let summary = policy.summary();
    assert_eq!(summary.action_tokenizer.as_ref().unwrap().chunk, [10, 8]);
    assert_eq!((summary.actions_per_chunk, summary.action_width, summary.max_tokens), (10, 8, 200));
    let keys: Vec<_> =
        summary.cameras.iter().map(|c| (c.key.as_str(), c.accepts.first().map(String::as_str))).collect();
    let exterior = Some("observation/exterior_image_1_left");
    let wrist = Some("observation/wrist_image_left");
    assert_eq!(keys, [("base_0_rgb", exterior), ("base_1_rgb", None), ("wrist_0_rgb", wrist)]);
    let observation = Observation {
        images: [exterior, wrist].map(|name| (name.unwrap().to_owned(), image(200))).into(),
        state: vec![0.0; 8],
        prompt: Some("Put it\nDown_there ".into()),
    };
    let prepared = policy.preprocess(&observation).unwrap();
    assert!(prepared.inputs.images[1].as_ref().unwrap().iter().all(|x| *x == -1.0));
    assert!(prepared.inputs.images[2].as_ref().unwrap().iter().any(|x| *x > 0.0));
    let tokenizer = Tokenizer::open(&golden("tokens/tokenizer.model")).unwrap();
    let bins = ["127"; 8].join(" ");
    let text = format!("Task: put it\ndown there, State: {bins};\n");
    assert_eq!(prepared.inputs.tokens[1..], tokenizer.encode(&text).unwrap());
    assert_eq!(prepared.inputs.end, Some(1));
    // The others of its DROID: relative joint positions, another length, another codec.
    let named = |name: &str, codec: bool| {
        let action_tokenizer = options.action_tokenizer.clone().filter(|_| codec);
        let options = PolicyOptions { config: Some(name.into()), action_tokenizer, ..options.clone() };
        dir.load(facts, &options).unwrap()
    };
    let relative = named("pi0_fast_droid_jointpos_polaris", true).summary();
    assert_eq!(relative.relative_actions.as_deref(), Some("11111110"));
    assert_eq!((relative.actions_per_chunk, relative.action_width), (10, 8));
    let longer = named("paligemma_fast_droid", true).summary();
    assert_eq!((longer.actions_per_chunk, longer.relative_actions), (15, None));
    named("paligemma_fast_specialist_droid", true).ready().unwrap();
    let error = named("paligemma_fast_specialist_droid", false).ready().unwrap_err().to_string();
    assert!(
        error.contains("KarlP/fast_droid_specialist on the hub: name its folder with --action-tokenizer"),
        "{error}"
    );
    // Without a configuration nobody knows the chunk.
    let nameless = PolicyOptions { config: None, ..options };
    let error = dir.load(facts, &nameless).unwrap().ready().unwrap_err().to_string();
    assert!(error.contains("--config, such as pi0_fast_droid, pi0_fast_full_droid_finetune"), "{error}");
}
