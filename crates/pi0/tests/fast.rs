//! π0-FAST on the command line.

use std::path::{Path, PathBuf};
use std::process::Output;

use assert_cmd::Command;
use safetensors::SafeTensors;
use serde_json::Value;

fn pi0(args: &[&str]) -> Output {
    Command::cargo_bin("pi0").unwrap().args(args).output().unwrap()
}

fn ok(args: &[&str]) -> String {
    let out = pi0(args);
    assert!(out.status.success(), "{args:?}: {}", String::from_utf8_lossy(&out.stderr));
    String::from_utf8(out.stdout).unwrap()
}

fn fails(args: &[&str]) -> String {
    let out = pi0(args);
    assert!(!out.status.success(), "{args:?}");
    String::from_utf8(out.stderr).unwrap()
}

fn golden(name: &str) -> String {
    let root: PathBuf = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden");
    root.join(name).to_str().unwrap().to_owned()
}

fn tensor(path: &Path, name: &str) -> (Vec<usize>, Vec<f32>) {
    let bytes = std::fs::read(path).unwrap();
    let file = SafeTensors::deserialize(&bytes).unwrap();
    let view = file.tensor(name).unwrap();
    let values = view.data().as_chunks::<4>().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
    (view.shape().to_vec(), values)
}

/// Model tensors in, tokens and actions out, as the golden data has them.
#[test]
fn answers_of_the_golden_data() {
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out.safetensors");
    let (model, inputs) = (golden("f"), golden("f/mixed_masks_b2.inputs.safetensors"));
    let base = ["infer", &model, "--inputs", &inputs, "--output", out.to_str().unwrap(), "--dtype", "f32"];
    let (tokenizer, codec) = (golden("tokens/tokenizer.json"), golden("tokens/fast_narrow"));
    let known = ["--tokenizer", &tokenizer, "--action-tokenizer", &codec];
    let want = |name: &str| tensor(Path::new(&golden("f/mixed_masks_b2.outputs.safetensors")), name);
    for more in [&[][..], &["--answer-tokens"], &["--speculate", "0"]] {
        ok(&[&base[..], &known, more].concat());
        let ((shape, tokens), (_, wanted)) = (tensor(&out, "tokens"), want("tokens"));
        assert_eq!(shape, [2, 40]);
        for (got, want) in tokens.chunks(40).zip(wanted.chunks(40)) {
            let end = got.iter().position(|t| *t == 377.0).unwrap();
            assert_eq!(got[..=end], want[..=end]);
            assert!(got[end + 1..].iter().all(|t| *t == 0.0));
        }
        let ((shape, actions), (_, wanted)) = (tensor(&out, "actions"), want("actions"));
        assert_eq!(shape, [2, 10, 4]);
        let far = actions.iter().zip(&wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far <= 1e-6, "{far}");
    }
    // Without the codec there are tokens alone, and a word about it.
    let told = pi0(&[&base[..], &["--tokenizer", &tokenizer]].concat());
    let told = String::from_utf8(told.stderr).unwrap();
    assert!(told.contains("--action-tokenizer"), "{told}");
    assert_eq!(tensor(&out, "tokens").0, [2, 40]);
    for (more, words) in [
        (&["--steps", "0"][..], "answers of 0 tokens"),
        (&["--temperature=-1"], "--temperature is -1"),
        (&["--temperature", "1", "--speculate", "3"], "at a temperature of 1 they are drawn"),
        (&["--steps", "3", "--strict", "answer_malformed"], "no end mark"),
        (&["--strict", "image_black"], "of model tensors only answer_malformed"),
    ] {
        let told = fails(&[&base[..], &known, more].concat());
        assert!(told.contains(words), "{told}");
    }
}

/// A random checkpoint writes nonsense, which is told.
#[test]
fn a_random_checkpoint_is_whole() {
    let dir = tempfile::tempdir().unwrap();
    let model = dir.path().join("fast");
    let model = model.to_str().unwrap();
    ok(&["synth", model, "--model", "pi0-fast"]);
    let facts = ok(&["inspect", model]);
    for words in ["π0-FAST", "up to 256 tokens", "160 codes for 16 x 14, read as lerobot does"] {
        assert!(facts.contains(words), "{facts}");
    }
    assert!(!facts.contains("problem:") && !facts.contains("action expert"), "{facts}");
    let image = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../samples/aloha_top.png");
    let image = format!("base_0_rgb={}", image.display());
    let state = ["0"; 14].join(",");
    let infer = ["infer", model, "--image", &image, "--state", &state, "--prompt", "fold", "--steps", "8"];
    let told = fails(&infer);
    assert!(told.contains("the network's answer begins with"), "{told}");
    // From the codes alone it still writes no `Action: `.
    let told = fails(&[&infer[..], &["--answer-tokens", "--temperature", "2"]].concat());
    assert!(told.contains("and not with \"Action: \""), "{told}");

    let bench = ["bench", model, "--cameras", "1", "--tokens", "9", "--steps", "6", "--repeat", "2"];
    // The second time the answer is known: five more tokens in passes of up to four.
    let guessed = ok(&[&bench[..], &["--json", "-", "--speculate", "3"]].concat());
    let guessed: Value = serde_json::from_str(&guessed).unwrap();
    assert_eq!((&guessed["answer"]["tokens"], &guessed["answer"]["passes"]), (&6.into(), &2.into()));
    let results: Value = serde_json::from_str(&ok(&[&bench[..], &["--json", "-"]].concat())).unwrap();
    assert_eq!((&results["answer"]["tokens"], &results["answer"]["passes"]), (&6.into(), &5.into()));
    assert!(results["answer"]["tokens_per_second"].as_f64().unwrap() > 0.0);
    assert_eq!(results["verdict"]["method"], "operations");
    let covered: Value =
        serde_json::from_str(&ok(&["coverage", model, "--device", "cpu", "--steps", "3", "--json", "-"]))
            .unwrap();
    assert!(covered["rows"].as_array().is_some_and(|rows| !rows.is_empty()), "{covered}");
}

#[test]
fn its_modules_are_checked() {
    let table = ok(&["check", "--dtype", "f32", "--module", "answer"]);
    for module in ["answer.head", "answer.tokens", "answer.prompt"] {
        assert!(table.contains(module), "{table}");
    }
    assert!(!table.contains("FAIL"), "{table}");
    let out = golden("f/mixed_masks_b2.outputs.safetensors");
    let table = ok(&["check", &golden("f"), "--dtype", "f32", "--module", "answer.head", "--against", &out]);
    // The logits of every step and the tokens; the table names only what fails.
    assert!(table.contains("golden tensors: 7 of 7 pass"), "{table}");
}
