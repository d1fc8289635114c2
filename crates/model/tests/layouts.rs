//! Checkpoints in every layout of folders and names that programs write, and folders that hold none.

use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use half::bf16;
use pi0_model::{Checkpoint, Family, Kind, NamedConfig, OpenOptions, TimeSchedule};
use proptest::prelude::*;
use proptest::test_runner::TestRunner;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde_json::json;
use tempfile::TempDir;

fn tiny() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/tiny")
}

/// Name, format, shape and bytes.
type Stored = (String, Dtype, Vec<usize>, Vec<u8>);

fn stored() -> Vec<Stored> {
    let bytes = fs::read(tiny().join("model.safetensors")).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    file.iter().map(|(n, v)| (n.into(), v.dtype(), v.shape().to_vec(), v.data().to_vec())).collect()
}

fn write_file(path: &Path, tensors: &[Stored]) {
    let views: Vec<_> =
        tensors.iter().map(|t| (t.0.as_str(), TensorView::new(t.1, t.2.clone(), &t.3).unwrap())).collect();
    fs::write(path, safetensors::serialize(views, None).unwrap()).unwrap();
}

/// The configuration of the tiny policy in `dir`.
fn write_config(dir: &Path) {
    fs::create_dir_all(dir).unwrap();
    for name in ["config.json", "arch.json"] {
        fs::copy(tiny().join(name), dir.join(name)).unwrap();
    }
}

/// A whole policy in `dir`.
fn write_policy(dir: &Path) {
    write_config(dir);
    fs::copy(tiny().join("model.safetensors"), dir.join("model.safetensors")).unwrap();
}

fn folder() -> TempDir {
    tempfile::tempdir().unwrap()
}

fn error(dir: &Path) -> String {
    Checkpoint::open(dir).unwrap_err().to_string()
}

#[track_caller]
fn same_as_tiny(checkpoint: &Checkpoint) {
    let want = Checkpoint::open(&tiny()).unwrap();
    assert_eq!(checkpoint.tensors().count(), want.tensors().count());
    for (got, want) in checkpoint.tensors().zip(want.tensors()) {
        assert_eq!((got.bytes(), &got.shape), (want.bytes(), &want.shape), "{} and {}", got.name, want.name);
    }
}

#[test]
fn names_with_the_prefixes_of_wrappers_and_other_programs() {
    let rename = |f: &dyn Fn(&str) -> String| {
        let dir = folder();
        write_config(dir.path());
        let tensors: Vec<_> = stored().into_iter().map(|(n, d, s, b)| (f(&n), d, s, b)).collect();
        write_file(&dir.path().join("model.safetensors"), &tensors);
        same_as_tiny(&Checkpoint::open(dir.path()).unwrap_or_else(|e| panic!("{e}")));
    };
    rename(&|n| format!("_orig_mod.{n}"));
    rename(&|n| format!("module.policy._orig_mod.model.{n}"));
    rename(&|n| n.replace("vision_tower.vision_model.", "vision_tower."));
    // Transformers' own π0.
    rename(&|n| {
        let n = n.replace("paligemma_with_expert.gemma_expert.model.", "model.expert.");
        let n = n.replace("paligemma_with_expert.paligemma.model.", "model.");
        n.replace("paligemma_with_expert.paligemma.lm_head.", "lm_head.")
    });
}

#[test]
fn tensors_that_nothing_uses_are_left_out() {
    let dir = folder();
    write_config(dir.path());
    let mut tensors = stored();
    for name in [
        "paligemma_with_expert.gemma_expert.model.embed_tokens.weight",
        "paligemma_with_expert.paligemma.model.vision_tower.vision_model.embeddings.position_ids",
        "paligemma_with_expert.paligemma.model.language_model.layers.0.self_attn.rotary_emb.inv_freq",
        "paligemma_with_expert.paligemma.model.language_model.rotary_emb.original_inv_freq",
    ] {
        tensors.push((name.into(), Dtype::BF16, vec![1], vec![0; 2]));
    }
    write_file(&dir.path().join("model.safetensors"), &tensors);
    same_as_tiny(&Checkpoint::open(dir.path()).unwrap());
}

#[test]
fn shards_load_by_their_index() {
    let dir = folder();
    write_config(dir.path());
    let tensors = stored();
    let (first, second) = tensors.split_at(tensors.len() / 2);
    let files = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"];
    write_file(&dir.path().join(files[0]), first);
    write_file(&dir.path().join(files[1]), second);
    let map =
        |part: &[Stored], file: &str| part.iter().map(|t| (t.0.clone(), json!(file))).collect::<Vec<_>>();
    let write_index = |entries: Vec<(String, serde_json::Value)>| {
        let map: serde_json::Map<_, _> = entries.into_iter().collect();
        let index = json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string();
        fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    };
    let all = || [map(first, files[0]), map(second, files[1])].concat();
    write_index(all());
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    same_as_tiny(&checkpoint);
    assert!(checkpoint.origin.layout.contains("shards"));

    write_index([all(), vec![("x".into(), json!("../../secret"))]].concat());
    assert!(error(dir.path()).contains("not one beside it"));
    write_index([all(), vec![("x".into(), json!(files[0]))]].concat());
    assert!(error(dir.path()).contains("holds x, and it does not"));
    write_index(map(first, files[0]));
    assert!(error(dir.path()).contains("missing"));
    write_index(all());
    fs::remove_file(dir.path().join(files[1])).unwrap();
    assert!(error(dir.path()).contains("download that shard"));
}

#[test]
fn the_one_policy_in_a_folder_is_taken_and_several_are_listed() {
    for below in [
        "checkpoints/last/pretrained_model",
        "models--lerobot--pi0_base/snapshots/abc",
        "a/b",
        "snapshots/0f3",
    ] {
        let dir = folder();
        write_policy(&dir.path().join(below));
        let checkpoint = Checkpoint::open(dir.path()).unwrap();
        same_as_tiny(&checkpoint);
        assert_eq!(checkpoint.directory, dir.path().join(below));
        assert!(checkpoint.origin.notes[0].contains(below), "{:?}", checkpoint.origin.notes);
    }
    let dir = folder();
    write_policy(&dir.path().join("checkpoints/010000/pretrained_model"));
    write_policy(&dir.path().join("checkpoints/020000/pretrained_model"));
    let e = error(dir.path());
    assert!(e.contains("several policies") && e.contains("010000") && e.contains("020000"), "{e}");
    // What wrote the folder says which one counts.
    write_policy(&dir.path().join("checkpoints/last/pretrained_model"));
    for given in [dir.path().to_owned(), dir.path().join("checkpoints")] {
        assert!(Checkpoint::open(&given).unwrap().directory.ends_with("last/pretrained_model"));
    }
    let dir = folder();
    write_policy(&dir.path().join("snapshots/abc"));
    write_policy(&dir.path().join("snapshots/def"));
    assert!(error(dir.path()).contains("several policies"));
    fs::create_dir(dir.path().join("refs")).unwrap();
    fs::write(dir.path().join("refs/main"), "def\n").unwrap();
    assert!(Checkpoint::open(dir.path()).unwrap().directory.ends_with("snapshots/def"));
    // In a folder above as well.
    let above = folder();
    fs::rename(dir.path(), above.path().join("models--me--policy")).unwrap();
    fs::create_dir(dir.path()).unwrap();
    assert!(Checkpoint::open(above.path()).unwrap().directory.ends_with("snapshots/def"));
}

#[cfg(unix)]
#[test]
fn links_to_nothing_and_what_is_no_file_are_told() {
    for name in ["config.json", "arch.json", "model.safetensors", "policy_preprocessor.json"] {
        let dir = folder();
        write_policy(dir.path());
        let _ = fs::remove_file(dir.path().join(name));
        std::os::unix::fs::symlink("../blobs/0f3", dir.path().join(name)).unwrap();
        let e = error(dir.path());
        assert!(e.contains(name) && e.contains("blobs/0f3") && e.contains("fetch the model again"), "{e}");
    }
    for name in ["config.json", "arch.json", "model.safetensors"] {
        let dir = folder();
        write_policy(dir.path());
        fs::remove_file(dir.path().join(name)).unwrap();
        let _open = std::os::unix::net::UnixListener::bind(dir.path().join(name)).unwrap();
        let e = error(dir.path());
        assert!(e.contains(name) && e.contains("wanted a file"), "{e}");
    }
}

#[test]
fn folders_without_a_policy_say_what_they_are_and_what_to_do() {
    let said = |files: &[(&str, &str)]| {
        let dir = folder();
        for (name, text) in files {
            let path = dir.path().join(name);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, text).unwrap();
        }
        error(dir.path())
    };
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 14000000000\n";
    for (files, words) in [
        (
            &[("config.json", "{}"), ("model.safetensors", pointer)][..],
            &["git-lfs pointer", "git lfs pull"][..],
        ),
        (&[("config.json", "{}"), ("model.safetensors", "<!DOCTYPE html>")], &["web page"]),
        (&[("config.json", "{}"), ("pytorch_model.bin", "PK")], &["pytorch_model.bin", "safetensors.torch"]),
        (&[("config.json", "{}"), ("optimizer.pt", "PK")], &["no weights", "model.safetensors"]),
        (
            &[("adapter_config.json", r#"{"base_model_name_or_path": "lerobot/pi0_base"}"#)],
            &["lerobot/pi0_base", "--adapter"],
        ),
        (&[("params/_METADATA", "{}")], &["JAX checkpoint", "arrays are not there", "pi0 pull gs://"]),
        (
            &[("params/_METADATA", "{}"), ("params/params.x/.zarray", "{}")],
            &["no description of a tree", "tree_metadata"],
        ),
        (&[("params/x", "")], &["fetch it again"]),
        (&[("train_state/_METADATA", "{}")], &["training state"]),
        (&[("1999.orbax-checkpoint-tmp-7/params/_METADATA", "{}")], &["did not finish"]),
        (&[("blobs/abc", ""), ("refs/main", "abc")], &["hub cache"]),
        (&[("README.md", "")], &["holds no policy", "params"]),
    ] {
        let e = said(files);
        for word in words {
            assert!(e.contains(word), "{word:?} in {e}");
        }
    }
}

#[test]
fn openpis_own_training_in_pytorch_needs_no_configuration() {
    let dir = folder();
    write_policy(dir.path());
    let remove = |name: &str| fs::remove_file(dir.path().join(name)).unwrap();
    remove("config.json");
    assert!(error(dir.path()).contains("no config.json") && error(dir.path()).contains("--config NAME"));
    fs::write(dir.path().join("configs.json"), "{}").unwrap();
    assert!(error(dir.path()).contains("rename it"));
    remove("configs.json");
    fs::write(dir.path().join("metadata.pt"), "").unwrap();
    let checkpoint = Checkpoint::open(dir.path()).unwrap();
    same_as_tiny(&checkpoint);
    assert_eq!(
        (checkpoint.config.family, checkpoint.config.schedule),
        (Family::Openpi, TimeSchedule::Openpi)
    );
    assert_eq!((checkpoint.config.horizon, checkpoint.origin.sizes.as_str()), (16, "arch.json"));
    // Heads cannot be told from shapes.
    remove("arch.json");
    assert!(error(dir.path()).contains("--arch FILE"));
    let named = NamedConfig {
        name: "pi0_aloha".into(),
        kind: Kind::Pi0,
        horizon: 50,
        action_dim: 32,
        max_tokens: None,
    };
    let options = OpenOptions { arch: Some(tiny().join("arch.json")), named: Some(named), adapter: None };
    assert_eq!(Checkpoint::open_with(dir.path(), &options).unwrap().config.horizon, 16);
}

#[test]
fn a_configuration_of_adapters_says_that_they_were_left_behind() {
    let dir = folder();
    write_policy(dir.path());
    let config = json!({"action_dim": 32, "action_horizon": 16, "paligemma_variant": "gemma_2b_lora"});
    fs::write(dir.path().join("config.json"), config.to_string()).unwrap();
    let e = error(dir.path());
    assert!(e.contains("gemma_2b_lora") && e.contains("params") && e.contains("leaves behind"), "{e}");
}

const Q: &str = "paligemma_with_expert.gemma_expert.model.layers.0.self_attn.q_proj";

/// An adapter of one layer of rank 2 in `dir`.
fn write_adapter(dir: &Path, more: &serde_json::Value) {
    fs::create_dir_all(dir).unwrap();
    let mut config = json!({"peft_type": "LORA", "lora_alpha": 4, "r": 2, "base_model_name_or_path": "x"});
    config.as_object_mut().unwrap().extend(more.as_object().unwrap().clone());
    fs::write(dir.join("adapter_config.json"), config.to_string()).unwrap();
    let shape = stored().iter().find(|t| t.0 == format!("{Q}.weight")).unwrap().2.clone();
    let tensor = |leaf: &str, shape: Vec<usize>| {
        let values =
            (0..shape.iter().product::<usize>()).flat_map(|i| (i as f32 * 0.01).to_le_bytes()).collect();
        (format!("base_model.model.model.{Q}.{leaf}.weight"), Dtype::F32, shape, values)
    };
    let tensors = [tensor("lora_A", vec![2, shape[1]]), tensor("lora_B", vec![shape[0], 2])];
    write_file(&dir.join("adapter_model.safetensors"), &tensors);
}

#[test]
fn peft_adapters_are_added_in_f32() {
    let (dir, adapter) = (folder(), folder());
    write_policy(dir.path());
    let name = format!("{Q}.weight");
    let base: BTreeMap<_, _> = stored().into_iter().map(|t| (t.0, (t.2, t.3))).collect();
    let (shape, bytes) = &base[&name];
    let w: Vec<f64> = bytes.chunks_exact(2).map(|b| bf16::from_le_bytes([b[0], b[1]]).to_f64()).collect();
    for (more, scale) in [
        (json!({}), 2.0),
        (json!({"use_rslora": true}), 4.0 / 2.0f64.sqrt()),
        (json!({"alpha_pattern": {"self_attn.q_proj": 1.0}}), 0.5),
        (json!({"alpha_pattern": {"other": 1.0}}), 2.0),
    ] {
        write_adapter(adapter.path(), &more);
        let options = OpenOptions { adapter: Some(adapter.path().into()), ..OpenOptions::default() };
        let checkpoint = Checkpoint::open_with(dir.path(), &options).unwrap();
        let t = checkpoint.tensor(&name);
        assert_eq!((t.dtype, &t.shape), (pi0_device::Dtype::F32, shape));
        for (i, got) in t.to_f32().into_iter().enumerate() {
            let (row, col) = (i / shape[1], i % shape[1]);
            let value = |at: usize| f64::from(at as f32 * 0.01);
            let product: f64 = (0..2).map(|r| value(row * 2 + r) * value(r * shape[1] + col)).sum();
            assert_eq!(got, (w[i] + scale * product) as f32, "{more} {i}");
        }
        assert!(checkpoint.origin.notes[0].starts_with("1 adapters"));
    }
    // Beside the weights it counts as well.
    write_adapter(dir.path(), &json!({}));
    assert_eq!(Checkpoint::open(dir.path()).unwrap().tensor(&name).dtype, pi0_device::Dtype::F32);
    for (more, word) in [
        (json!({"use_dora": true}), "use_dora"),
        (json!({"peft_type": "IA3"}), "IA3"),
        (json!({"init_lora_weights": "pissa_niter_4"}), "pissa"),
        (json!({"alpha_pattern": {".*q_proj": 1.0}}), "alpha_pattern"),
        (json!({"lora_alpha": null}), "lora_alpha"),
        (json!({"lora_alpha": "x"}), "lora_alpha"),
        (json!({"r": 4}), "factors of rank 2, adapter_config.json says r 4"),
    ] {
        write_adapter(dir.path(), &more);
        let e = error(dir.path());
        assert!(e.contains(word) || e.contains("invalid type"), "{word}: {e}");
    }
    // As PEFT reads them.
    for more in
        [json!({"rank_pattern": null, "alpha_pattern": null}), json!({"r": 4, "rank_pattern": {"q_proj": 2}})]
    {
        write_adapter(dir.path(), &more);
        assert!(Checkpoint::open(dir.path()).is_ok(), "{more}");
    }
    write_adapter(dir.path(), &json!({}));
    let odd = |name: &str, shape: Vec<usize>| {
        (name.to_string(), Dtype::BF16, shape.clone(), vec![0; 2 * shape.iter().product::<usize>()])
    };
    for (tensors, word) in [
        (vec![odd("x.lora_A.weight", vec![2, 4])], "one factor of two"),
        (vec![odd("x.lora_A.weight", vec![2, 4]), odd("x.lora_B.weight", vec![4, 2])], "no such layer"),
        (
            vec![
                odd(&format!("{Q}.lora_A.weight"), vec![2, 4]),
                odd(&format!("{Q}.lora_B.weight"), vec![4, 2]),
            ],
            "factors",
        ),
        (vec![odd(&format!("{Q}.lora_magnitude_vector"), vec![2])], "merge it with PEFT"),
        (vec![odd("state_proj.weight", vec![2, 2])], "state_proj.weight has shape"),
        (vec![], "holds no factors"),
    ] {
        write_file(&dir.path().join("adapter_model.safetensors"), &tensors);
        assert!(error(dir.path()).contains(word), "{word}: {}", error(dir.path()));
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn no_index_and_no_adapter_panics(text in r#"\{("(weight_map|metadata|peft_type|lora_alpha|alpha_pattern)": ?(\{"[a-z./]{0,6}": ?("[a-z./]{0,8}"|-?[0-9]{1,20}|null)\}|"LORA"|-?[0-9]{1,20}|\[\]|null|1e999),?){0,4}\}"#) {
        let dir = folder();
        write_config(dir.path());
        fs::write(dir.path().join("model.safetensors.index.json"), &text).unwrap();
        prop_assert!(Checkpoint::open(dir.path()).is_err());
        write_policy(dir.path());
        fs::write(dir.path().join("adapter_config.json"), &text).unwrap();
        prop_assert!(Checkpoint::open(dir.path()).is_err());
    }
}

/// Any change of an index, of an adapter's configuration or of its weights: an error, or tensors that can be made.
#[test]
fn no_change_of_an_index_or_an_adapter_panics() {
    let (dir, adapter) = (folder(), folder());
    write_config(dir.path());
    write_file(&dir.path().join("a.safetensors"), &stored());
    let map: serde_json::Map<_, _> = stored().into_iter().map(|t| (t.0, json!("a.safetensors"))).collect();
    let index = json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string();
    fs::write(dir.path().join("model.safetensors.index.json"), index).unwrap();
    write_adapter(
        adapter.path(),
        &json!({"alpha_pattern": {"q_proj": 8}, "use_rslora": true, "bias": "none"}),
    );
    let files = [
        dir.path().join("model.safetensors.index.json"),
        adapter.path().join("adapter_config.json"),
        adapter.path().join("adapter_model.safetensors"),
    ];
    let whole = files.clone().map(|file| fs::read(file).unwrap());
    let options = OpenOptions { adapter: Some(adapter.path().into()), ..OpenOptions::default() };
    let open = || Checkpoint::open_with(dir.path(), &options);
    assert_eq!(open().unwrap().tensor(&format!("{Q}.weight")).dtype, pi0_device::Dtype::F32);
    let at = any::<prop::sample::Index>;
    let changes = prop::collection::vec((at(), any::<u8>()), 1..4);
    let change = (0..files.len(), changes, prop::option::weighted(0.2, at()));
    let config = ProptestConfig { failure_persistence: None, ..ProptestConfig::default() };
    let run = TestRunner::new(config).run(&change, |(which, changes, cut)| {
        let mut bytes = whole[which].clone();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        fs::write(&files[which], bytes).unwrap();
        if let Ok(checkpoint) = open() {
            checkpoint.tensors().for_each(|t| drop(t.fetch()));
        }
        fs::write(&files[which], &whole[which]).unwrap();
        Ok(())
    });
    run.unwrap();
}
