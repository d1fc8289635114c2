//! Checkpoints of every layout and number format, and every way in which one can be broken.

use std::path::Path;

use pi0_device::{Dtype, Reference, TensorSource};
use pi0_model::weights::{EMBED, LM_HEAD};
use pi0_model::{
    Checkpoint, Config, Extent, Family, GemmaConfig, Inputs, Kind, ModelError, Pi0, SampleOptions,
    VisionConfig, synth,
};
use proptest::prelude::*;
use safetensors::tensor::{Dtype as StoredDtype, TensorView};
use tempfile::TempDir;

/// The smallest network that has every kind of tensor.
fn config() -> Config {
    let gemma = GemmaConfig { width: 8, mlp_dim: 6, depth: 1, num_heads: 2, num_kv_heads: 1, head_dim: 4 };
    Config {
        vision: VisionConfig {
            hidden_size: 6,
            intermediate_size: 5,
            num_hidden_layers: 1,
            num_attention_heads: 2,
            image_size: 4,
            patch_size: 2,
        },
        expert: GemmaConfig { width: 4, ..gemma.clone() },
        gemma,
        vocab_size: 11,
        action_dim: 3,
        state_dim: 3,
        horizon: 2,
        ..Config::full()
    }
}

/// A stored tensor: name, format, shape, bytes.
type Stored = (String, StoredDtype, Vec<usize>, Vec<u8>);

fn stored() -> Vec<Stored> {
    let checkpoint = synth::checkpoint(&config(), 1).unwrap();
    let one = |t: &TensorSource| (t.name.clone(), StoredDtype::BF16, t.shape.clone(), t.bytes().to_vec());
    checkpoint.tensors().map(one).collect()
}

fn write(tensors: &[Stored]) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    config().write(dir.path(), &["top"], 3, 3).unwrap();
    let views: Vec<_> =
        tensors.iter().map(|t| (t.0.as_str(), TensorView::new(t.1, t.2.clone(), &t.3).unwrap())).collect();
    std::fs::write(dir.path().join("model.safetensors"), safetensors::serialize(views, None).unwrap())
        .unwrap();
    dir
}

fn open(tensors: &[Stored]) -> Result<Checkpoint, ModelError> {
    Checkpoint::open(write(tensors).path())
}

fn renamed(f: impl Fn(&str) -> String) -> Vec<Stored> {
    stored().into_iter().map(|(n, d, s, b)| (f(&n), d, s, b)).collect()
}

fn faults(tensors: &[Stored]) -> Vec<String> {
    match open(tensors) {
        Err(ModelError::Tensors { faults, .. }) => faults,
        other => panic!("{other:?}"),
    }
}

#[test]
fn every_layout_of_names_loads_the_same_tensors() {
    const P: &str = "paligemma_with_expert.paligemma.";
    let want = open(&stored()).unwrap();
    let old = |n: &str| {
        let n = n.replace(&format!("{P}model.language_model."), &format!("{P}language_model.model."));
        let n = n.replace(&format!("{P}model.vision_tower."), &format!("{P}vision_tower."));
        let n = n.replace(&format!("{P}model.multi_modal_projector."), &format!("{P}multi_modal_projector."));
        format!("model.{n}")
    };
    let tied = |n: &str| if n == EMBED { LM_HEAD.to_string() } else { n.to_string() };
    let old_tied = |n: &str| match n {
        EMBED => format!("model.{P}language_model.lm_head.weight"),
        n => old(n),
    };
    for layout in [
        renamed(|n| format!("model.{n}")),
        renamed(|n| format!("model._orig_mod.{n}").replace("model._orig_mod", "model")),
        renamed(|n| n.replace("paligemma_with_expert.", "paligemma_with_expert._orig_mod.")),
        renamed(tied),
        renamed(old),
        renamed(old_tied),
        renamed(|n| n.replace("action_time_mlp", "time_mlp")),
    ] {
        let got = open(&layout).unwrap();
        for (a, b) in got.tensors().zip(want.tensors()) {
            assert_eq!((a.bytes(), &a.shape), (b.bytes(), &b.shape), "{} and {}", a.name, b.name);
        }
    }
}

#[test]
fn of_both_embeddings_only_embed_tokens_counts() {
    let mut tensors = stored();
    let (_, dtype, shape, bytes) = tensors.iter().find(|t| t.0 == EMBED).unwrap().clone();
    tensors.push((LM_HEAD.into(), dtype, shape, vec![0; bytes.len()]));
    tensors.push(("paligemma_with_expert.gemma_expert.lm_head.weight".into(), dtype, vec![1], vec![0; 2]));
    tensors.push((
        "normalize_inputs.buffer_observation_state.mean".into(),
        StoredDtype::F32,
        vec![1],
        vec![0; 4],
    ));
    assert_eq!(open(&tensors).unwrap().tensor(EMBED).bytes(), bytes);
}

#[test]
fn formats_mix() {
    let mut tensors = stored();
    for (i, (_, dtype, _, bytes)) in tensors.iter_mut().enumerate() {
        let values = bytes.chunks_exact(2).map(|b| half::bf16::from_le_bytes([b[0], b[1]]).to_f32());
        match i % 3 {
            0 => (*dtype, *bytes) = (StoredDtype::F32, values.flat_map(f32::to_le_bytes).collect()),
            1 => {
                let halves = values.flat_map(|x| half::f16::from_f32(x).to_le_bytes()).collect();
                (*dtype, *bytes) = (StoredDtype::F16, halves);
            }
            _ => {}
        }
    }
    let (mixed, plain) = (open(&tensors).unwrap(), open(&stored()).unwrap());
    assert_eq!(mixed.bytes_by_dtype().into_keys().collect::<Vec<_>>(), [Dtype::F32, Dtype::Bf16, Dtype::F16]);
    for (a, b) in mixed.tensors().zip(plain.tensors()) {
        let close = a.to_f32().iter().zip(b.to_f32()).all(|(a, b)| (a - b).abs() < 1e-3);
        assert!(close, "{}", a.name);
    }
}

#[test]
fn all_faults_are_listed_at_once_with_the_nearest_name() {
    let mut tensors = renamed(|n| n.replace("layers.0.mlp.up_proj", "layers.0.mlp.up_porj"));
    tensors.retain(|t| t.0 != "state_proj.bias");
    let i = tensors.iter().position(|t| t.0 == "action_in_proj.weight").unwrap();
    tensors[i].2 = vec![3, 4];
    let j = tensors.iter().position(|t| t.0 == "action_out_proj.bias").unwrap();
    tensors[j].1 = StoredDtype::I16;
    let text = faults(&tensors).join("\n");
    for part in [
        "action_in_proj.weight has shape [3, 4], wanted [4, 3]",
        "action_out_proj.bias is stored as I16",
        "missing state_proj.bias [4]",
        "unexpected paligemma_with_expert.gemma_expert.model.layers.0.mlp.up_porj.weight [6, 4]; \
         nearest: paligemma_with_expert.gemma_expert.model.layers.0.mlp.up_proj.weight",
    ] {
        assert!(text.contains(part), "{part:?} in\n{text}");
    }
}

#[test]
fn two_names_of_one_tensor_are_a_fault() {
    let mut tensors = stored();
    let mut twin = tensors[0].clone();
    twin.0 = format!("model.{}", twin.0);
    tensors.push(twin);
    assert!(faults(&tensors)[0].contains("the same tensor"));
}

#[test]
fn other_kinds_of_checkpoints_are_refused_by_name() {
    let mut lora = stored();
    lora.push(("q_proj.lora_A.weight".into(), StoredDtype::BF16, vec![1], vec![0; 2]));
    let mut memory = stored();
    memory.push(("proprio_history_proj.weight".into(), StoredDtype::BF16, vec![1], vec![0; 2]));
    for (tensors, word) in [(lora, "LoRA"), (memory, "memory")] {
        let e = open(&tensors).unwrap_err().to_string();
        assert!(e.contains(word), "{e}");
    }
}

/// π0.5 is told by its tensors: openpi's configuration does not say, lerobot's must not contradict.
#[test]
fn pi05_is_told_by_its_tensors() {
    let pi05 = config().of_kind(Kind::Pi05);
    let made = synth::checkpoint(&pi05, 1).unwrap();
    let mut tensors: Vec<Stored> = made
        .tensors()
        .map(|t| (t.name.clone(), StoredDtype::BF16, t.shape.clone(), t.bytes().to_vec()))
        .collect();
    let e = open(&tensors).unwrap_err().to_string();
    assert!(e.contains("config.json") && e.contains("\"pi0\"") && e.contains("π0.5"), "{e}");

    // What lerobot's loader forgives: π0's names of the time layers, a state projection that nothing reads.
    for (name, ..) in &mut tensors {
        *name = format!("model.{}", name.replace("time_mlp_", "action_time_mlp_"));
    }
    tensors.push(("model.state_proj.weight".into(), StoredDtype::BF16, vec![1], vec![0; 2]));
    let dir = write(&tensors);
    let openpi = r#"{"action_dim": 3, "action_horizon": 2, "precision": "bfloat16"}"#;
    std::fs::write(dir.path().join("config.json"), openpi).unwrap();
    let arch = std::fs::read_to_string(dir.path().join("arch.json")).unwrap();
    std::fs::write(dir.path().join("arch.json"), arch.replace("\"max_tokens\": 48", "\"max_tokens\": 200"))
        .unwrap();
    let read = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(
        (read.config.kind, read.config.family, read.config.max_tokens),
        (Kind::Pi05, Family::Openpi, 200)
    );
    for (a, b) in read.tensors().zip(made.tensors()) {
        assert_eq!(a.bytes(), b.bytes(), "{} and {}", a.name, b.name);
    }

    // A second time input is not this network.
    tensors.push(("model.target_time_mlp_in.weight".into(), StoredDtype::BF16, vec![4, 4], vec![0; 32]));
    let dir = write(&tensors);
    std::fs::write(dir.path().join("config.json"), openpi).unwrap();
    std::fs::write(dir.path().join("arch.json"), arch).unwrap();
    let e = Checkpoint::open(dir.path()).unwrap_err().to_string();
    assert!(e.contains("target_time_mlp_in") && e.contains("time"), "{e}");
}

#[test]
fn openpi_directories_load_with_their_own_schedule() {
    let dir = write(&stored());
    let openpi =
        r#"{"action_dim": 3, "action_horizon": 2, "paligemma_variant": "gemma_2b", "precision": "bfloat16"}"#;
    std::fs::write(dir.path().join("config.json"), openpi).unwrap();
    assert_eq!(Checkpoint::open(dir.path()).unwrap().config.family, Family::Openpi);
}

#[test]
fn missing_and_misplaced_files_say_what_to_do() {
    let dir = write(&stored());
    let error = |path: &Path| Checkpoint::open(path).unwrap_err().to_string();
    assert!(error(&dir.path().join("model.safetensors")).contains("is a file; give the directory"));
    assert!(error(&dir.path().join("nowhere")).contains("does not exist"));
    std::fs::write(dir.path().join("arch.json"), "{}").unwrap();
    assert!(error(dir.path()).contains("arch.json"));
    std::fs::write(dir.path().join("config.json"), "{").unwrap();
    assert!(error(dir.path()).contains("not valid JSON"));
    std::fs::remove_file(dir.path().join("config.json")).unwrap();
    assert!(error(dir.path()).contains("config.json"));
    let dir = write(&stored());
    std::fs::remove_file(dir.path().join("model.safetensors")).unwrap();
    assert!(error(dir.path()).contains("model.safetensors"));
}

fn inputs() -> Inputs {
    Inputs { images: vec![Some(vec![0.5; 48])], tokens: vec![2, 5], state: vec![0.1; 3], ..Inputs::default() }
}

#[test]
fn a_weight_that_is_not_a_number_is_named() {
    let mut tensors = stored();
    let down = "paligemma_with_expert.gemma_expert.model.layers.0.mlp.down_proj.weight";
    let bytes = &mut tensors.iter_mut().find(|t| t.0 == down).unwrap().3;
    bytes[10..12].copy_from_slice(&half::bf16::NAN.to_le_bytes());
    let model = Pi0::load(Reference, open(&tensors).unwrap(), Extent::Cache, &|_| ()).unwrap();
    let e = model.sample_actions(&[inputs()], &SampleOptions::default()).unwrap_err().to_string();
    assert!(e.contains(down) && e.contains("index 5"), "{e}");
}

#[test]
fn steps_and_batches_out_of_range_are_errors() {
    let model = Pi0::load(Reference, open(&stored()).unwrap(), Extent::Cache, &|_| ()).unwrap();
    for steps in [0, 1001] {
        let options = SampleOptions { steps: Some(steps), seed: 0 };
        assert!(
            model.sample_actions(&[inputs()], &options).unwrap_err().to_string().contains("denoising steps")
        );
    }
    assert!(model.sample_actions(&[], &SampleOptions::default()).is_err());
    let no_prompt = Inputs { tokens: vec![], ..inputs() };
    let actions = model.sample_actions(&[no_prompt], &SampleOptions::default()).unwrap();
    assert_eq!(actions[0].shape, [2, 3]);
}

/// A valid file, to be damaged.
fn valid_file() -> Vec<u8> {
    std::fs::read(write(&stored()).path().join("model.safetensors")).unwrap()
}

fn open_bytes(bytes: &[u8]) -> Result<Checkpoint, ModelError> {
    let dir = tempfile::tempdir().unwrap();
    config().write(dir.path(), &["top"], 3, 3).unwrap();
    std::fs::write(dir.path().join("model.safetensors"), bytes).unwrap();
    Checkpoint::open(dir.path())
}

/// The file with its header replaced.
fn with_header(header: &str) -> Vec<u8> {
    let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
    bytes.extend(header.as_bytes());
    bytes.extend([0; 64]);
    bytes
}

#[test]
fn damaged_files_are_errors() {
    let file = valid_file();
    let mut long_header = file.clone();
    long_header[..8].copy_from_slice(&u64::MAX.to_le_bytes());
    for bytes in [
        &file[..0],
        &file[..7],
        &file[..100],
        &file[..file.len() - 1],
        &long_header,
        &with_header("not json"),
        &with_header(r#"{"a": {"dtype": "F32", "shape": [16], "data_offsets": [0, 64]}, "a": 1}"#),
        &with_header(r#"{"a": {"dtype": "F32", "shape": [8], "data_offsets": [0, 64]}}"#),
        &with_header(r#"{"a": {"dtype": "F99", "shape": [16], "data_offsets": [0, 64]}}"#),
        &with_header(
            r#"{"a": {"dtype": "F32", "shape": [18446744073709551615, 4], "data_offsets": [0, 64]}}"#,
        ),
        &with_header(r#"{"a": {"dtype": "F32", "shape": [16], "data_offsets": [64, 0]}}"#),
        &with_header(concat!(
            r#"{"a": {"dtype": "U8", "shape": [40], "data_offsets": [0, 40]},"#,
            r#" "b": {"dtype": "U8", "shape": [40], "data_offsets": [24, 64]}}"#
        )),
    ] {
        let e = open_bytes(bytes).unwrap_err();
        assert!(matches!(e, ModelError::Damaged { .. } | ModelError::Read { .. }), "{e}");
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_damage_to_the_header_panics(
        position in 0usize..4096,
        byte in any::<u8>(),
        cut in prop::option::of(0usize..4096),
    ) {
        let mut file = valid_file();
        let position = position % file.len();
        file[position] = byte;
        if let Some(cut) = cut {
            file.truncate(cut);
        }
        // Whatever opens also loads and runs: to finite actions or to an error.
        if let Ok(checkpoint) = open_bytes(&file) {
            let model = Pi0::load(Reference, checkpoint, Extent::Cache, &|_| ()).unwrap();
            let _ = model.sample_actions(&[inputs()], &SampleOptions { steps: Some(1), seed: 0 });
        }
    }

    #[test]
    fn no_configuration_panics(text in r#"\{("(type|chunk_size|image_resolution|min_period|action_horizon)": ?("pi0"|-?[0-9]{1,20}|\[[0-9, ]*\]|null|1e999),?){0,4}\}"#) {
        let dir = tempfile::tempdir().unwrap();
        std::fs::write(dir.path().join("config.json"), &text).unwrap();
        let _ = Config::load(dir.path(), Kind::Pi0);
    }
}
