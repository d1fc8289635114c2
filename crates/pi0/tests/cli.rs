//! The command line as a new user meets it: the main job, the files it writes, and every usual mistake.

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use pi0_model::golden::{compare_taps, read_inputs, read_tensors};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// `pi0` in the root of the repository.
fn pi0(args: &[&str]) -> Command {
    let mut command = Command::cargo_bin("pi0").unwrap();
    command.current_dir(root()).args(args);
    command
}

fn stdout(args: &[&str]) -> String {
    String::from_utf8(pi0(args).assert().success().get_output().stdout.clone()).unwrap()
}

/// What a failing call says; it never panics.
fn complaint(args: &[&str]) -> String {
    let assert = pi0(args).assert().failure();
    let text = String::from_utf8(assert.get_output().stderr.clone()).unwrap();
    assert!(!text.contains("panicked"), "{args:?}: {text}");
    text
}

const STATE: &str = "0,-0.96,1.16,0,-0.3,0,0,0,-0.96,1.16,0,-0.3,0,0";
const MAIN_JOB: [&str; 10] = [
    "infer",
    "models/tiny",
    "--image",
    "base_0_rgb=samples/aloha_top.png",
    "--image",
    "left_wrist_0_rgb=samples/aloha_left_wrist.png",
    "--state",
    STATE,
    "--prompt",
    "Transfer cube",
];

/// The main job with the value after `flag` replaced; without the pair where `value` is none.
fn main_job(flag: &str, value: Option<&'static str>) -> Vec<&'static str> {
    let i = MAIN_JOB.iter().position(|a| *a == flag).unwrap();
    let mut args = MAIN_JOB.to_vec();
    match value {
        Some(value) => args[i + 1] = value,
        None => drop(args.drain(i..i + 2)),
    }
    args
}

#[test]
fn images_state_and_prompt_become_actions() {
    let table = stdout(&MAIN_JOB);
    let rows: Vec<Vec<f64>> =
        table.lines().skip(1).map(|l| l.split_whitespace().map(|x| x.parse().unwrap()).collect()).collect();
    assert_eq!((rows.len(), rows[0].len()), (16, 15), "{table}");
    assert_eq!(table, stdout(&MAIN_JOB), "the same call gives the same actions");
    // Everything that the policy sees matters.
    for (flag, value) in [
        ("--prompt", "Fold the towel"),
        ("--state", "0,0,0,0,0,0,0,0,0,0,0,0,0,1"),
        ("--image", "base_0_rgb=samples/aloha_left_wrist.png"),
    ] {
        assert_ne!(table, stdout(&main_job(flag, Some(value))), "{flag}");
    }
    let seeded = [&MAIN_JOB[..], &["--seed", "1"]].concat();
    assert_ne!(table, stdout(&seeded));
}

#[test]
fn actions_are_written_as_json_and_npy() {
    let dir = tempfile::tempdir().unwrap();
    let (json, npy) = (dir.path().join("a.json"), dir.path().join("a.npy"));
    for path in [&json, &npy] {
        pi0(&[&MAIN_JOB[..], &["--out", path.to_str().unwrap()]].concat()).assert().success();
    }
    let rows: Vec<Vec<f64>> = serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap();
    let bytes = std::fs::read(npy).unwrap();
    let array = npyz::NpyFile::new(&bytes[..]).unwrap();
    assert_eq!(array.shape(), [16, 14]);
    let values: Vec<f32> = array.into_vec().unwrap();
    for (a, b) in rows.iter().flatten().zip(values) {
        assert_eq!(*a as f32, b);
    }
}

#[test]
fn tensors_in_tensors_out_with_every_intermediate() {
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name).to_str().unwrap().to_string();
    let run = root().join("golden/b/mixed_masks_b2");
    let inputs = format!("{}.inputs.safetensors", run.display());
    let (output, dump) = (path("actions.safetensors"), path("taps.safetensors"));
    let device = ["--device", "reference", "--output", &output, "--dump", &dump];
    pi0(&[&["infer", "golden/b", "--inputs", &inputs][..], &device].concat()).assert().success();
    let want = read_tensors(&run.with_extension("outputs.safetensors")).unwrap();
    let actions = &read_tensors(Path::new(&output)).unwrap()["actions"];
    assert_eq!(actions.shape, want["actions"].shape);
    let far = actions.data.iter().zip(&want["actions"].data).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(far <= 1e-5, "{far}");

    let mut taps = read_tensors(Path::new(&dump)).unwrap();
    taps.insert("actions".into(), actions.clone());
    let batch = read_inputs(Path::new(&inputs)).unwrap();
    for (name, result) in compare_taps(&taps, &want, &batch) {
        let a = result.unwrap_or_else(|e| panic!("{name} {e}"));
        assert!(a.count == 0 || a.relative_l2 < 1e-5, "{name}: {a}");
    }
}

#[test]
fn inspect_tells_what_a_checkpoint_is() {
    let text = stdout(&["inspect", "models/tiny", "--values"]);
    for word in ["1.2 million", "BF16", "base_0_rgb", "14 values", "tokenizer.json", "memory"] {
        assert!(text.contains(word), "{word} in\n{text}");
    }
    let json: serde_json::Value =
        serde_json::from_str(&stdout(&["inspect", "models/tiny", "--json", "-"])).unwrap();
    assert_eq!((json["variant"].as_str(), json["config"]["horizon"].as_u64()), (Some("pi0"), Some(16)));
}

#[test]
fn synthesized_checkpoints_run() {
    let dir = tempfile::tempdir().unwrap();
    let made = dir.path().join("made");
    let made = made.to_str().unwrap();
    pi0(&["synth", made, "--seed", "3"]).assert().success();
    let mut args = MAIN_JOB.to_vec();
    args[1] = made;
    assert_eq!(stdout(&args).lines().count(), 17);
    assert!(complaint(&["synth", made]).contains("already holds"));
}

#[test]
fn devices_are_listed_with_the_reason_for_the_missing() {
    let list: serde_json::Value = serde_json::from_str(&stdout(&["devices", "--json", "-"])).unwrap();
    let names: Vec<_> = list.as_array().unwrap().iter().map(|d| d["name"].as_str().unwrap()).collect();
    assert_eq!(names[..2], ["cpu", "reference"]);
    assert!(list.as_array().unwrap().iter().all(|d| !d["detail"].as_str().unwrap().is_empty()));
}

#[test]
fn mistakes_are_explained() {
    let cases: Vec<(Vec<&str>, &str)> = vec![
        (main_job("--state", Some("1,2")), "state has 2 values"),
        (main_job("--state", Some("1,x")), "not a number"),
        (main_job("--state", Some("NaN,0,0,0,0,0,0,0,0,0,0,0,0,0")), "NaN"),
        (main_job("--state", None), "state"),
        (main_job("--prompt", None), "prompt"),
        (main_job("--image", Some("samples/aloha_top.png")), "NAME=FILE"),
        (main_job("--image", Some("tail=samples/aloha_top.png")), "unknown camera `tail`"),
        (main_job("--image", Some("base_0_rgb=nowhere.png")), "nowhere.png"),
        (main_job("--image", Some("base_0_rgb=README.md")), "base_0_rgb"),
        ([&MAIN_JOB[..], &["--steps", "0"]].concat(), "denoising steps"),
        ([&MAIN_JOB[..], &["--out", "actions.txt"]].concat(), ".json or .npy"),
        ([&MAIN_JOB[..], &["--robot", "toaster"]].concat(), "toaster"),
        ([&MAIN_JOB[..], &["--device", "toaster"]].concat(), "known are cpu"),
        (vec!["infer", "models/tiny", "--prompt", "x", "--state", STATE], "no image"),
        (vec!["infer", "nowhere"], "does not exist"),
        (vec!["infer", "README.md"], "is a file"),
        (vec!["infer", "samples"], "holds no policy"),
        (vec!["infer", "models/tiny", "--inputs", "README.md", "--output", "/dev/null"], "damaged"),
        (vec!["inspect", "golden"], "several policies"),
        (vec!["frobnicate"], "unrecognized subcommand"),
    ];
    for (args, word) in cases {
        let text = complaint(&args);
        assert!(text.contains(word), "{args:?} should say {word:?}:\n{text}");
    }
}

#[test]
fn a_broken_checkpoint_is_explained() {
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(root().join("models/tiny")).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, dir.path().join(path.file_name().unwrap())).unwrap();
        }
    }
    let weights = dir.path().join("model.safetensors");
    let bytes = std::fs::read(&weights).unwrap();
    std::fs::write(&weights, &bytes[..bytes.len() / 2]).unwrap();
    let text = complaint(&["inspect", dir.path().to_str().unwrap()]);
    assert!(text.contains("damaged") && text.contains("fetch it again"), "{text}");
}

/// A copy of a checkpoint of the repository with a changed file.
fn copy_of(checkpoint: &str, file: &str, edit: impl FnOnce(&mut serde_json::Value)) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    let mut folders = vec![(root().join(checkpoint), dir.path().to_owned())];
    while let Some((from, to)) = folders.pop() {
        std::fs::create_dir_all(&to).unwrap();
        for entry in std::fs::read_dir(from).unwrap().map(Result::unwrap) {
            let to = to.join(entry.file_name());
            match entry.path().is_dir() {
                true => folders.push((entry.path(), to)),
                false => drop(std::fs::copy(entry.path(), to).unwrap()),
            }
        }
    }
    let path = dir.path().join(file);
    let mut value = serde_json::from_slice(&std::fs::read(&path).unwrap()).unwrap();
    edit(&mut value);
    std::fs::write(path, value.to_string()).unwrap();
    dir
}

/// Without statistics a checkpoint can be looked at; running it takes statistics, or a word.
#[test]
fn without_statistics_nothing_runs_unasked() {
    let strip = |file: &mut serde_json::Value| {
        for step in file["steps"].as_array_mut().unwrap() {
            step.as_object_mut().unwrap().remove("state_file");
        }
    };
    let dir = copy_of("models/tiny", "policy_preprocessor.json", strip);
    let model = dir.path().to_str().unwrap();
    let assert = pi0(&["inspect", model]).assert().failure();
    let text = String::from_utf8(assert.get_output().stdout.clone()).unwrap();
    assert!(
        text.contains("missing: no statistics to normalize with: the checkpoint has no statistics of obs"),
        "{text}"
    );
    let job = |more: &[&str]| {
        let mut args = MAIN_JOB.map(str::to_owned).to_vec();
        args[1] = model.to_owned();
        args.extend(more.iter().map(|s| s.to_string()));
        args
    };
    let refused = job(&[]);
    let text = complaint(&refused.iter().map(String::as_str).collect::<Vec<_>>());
    assert!(text.contains("--stats FILE") && text.contains("--raw-units"), "{text}");
    let serve = complaint(&["serve", model, "--port", "0"]);
    assert!(serve.contains("does not run as it is"), "{serve}");
    // The untouched file of the original.
    let stats = root().join("models/tiny/policy_preprocessor.json");
    let given = job(&["--stats", stats.to_str().unwrap()]);
    let given = given.iter().map(String::as_str).collect::<Vec<_>>();
    assert_eq!(stdout(&given), stdout(&MAIN_JOB));
    stdout(&["inspect", model, "--stats", stats.to_str().unwrap()]);
    // The network of models/tiny is normalized with mean 0 and deviation 1.
    let raw = job(&["--raw-units"]);
    assert_eq!(stdout(&raw.iter().map(String::as_str).collect::<Vec<_>>()), stdout(&MAIN_JOB));
    assert!(
        complaint(&[&MAIN_JOB[..], &["--raw-units"]].concat()).contains("--raw-units: the checkpoint has")
    );
}

/// Real-time chunking on the command line gives lerobot's actions, and refuses what makes no sense.
#[test]
fn chunks_continue_the_previous_one() {
    let dir = tempfile::tempdir().unwrap();
    let output = dir.path().join("actions.safetensors").to_str().unwrap().to_string();
    let call = |run: &str, more: &[&'static str]| -> Vec<String> {
        let inputs = root().join(format!("golden/d/{run}.inputs.safetensors"));
        let base = ["infer", "golden/d", "--device", "reference", "--output", &output, "--inputs"];
        let mut args: Vec<String> = base.iter().map(|s| s.to_string()).collect();
        args.push(inputs.to_str().unwrap().into());
        args.extend(more.iter().map(|s| s.to_string()));
        args
    };
    let runs: [(&str, &[&'static str]); 3] = [
        ("rtc_trained_b1", &["--rtc", "trained", "--delay", "3"]),
        ("rtc_linear_b1", &["--rtc", "guided", "--delay", "3"]),
        ("rtc_ones_b1", &["--rtc", "guided", "--schedule", "ones"]),
    ];
    let meta = std::fs::read(root().join("golden/d/meta.json")).unwrap();
    let meta: serde_json::Value = serde_json::from_slice(&meta).unwrap();
    for (run, options) in runs {
        let rtc = &meta["runs"].as_array().unwrap().iter().find(|r| r["name"] == run).unwrap()["rtc"];
        let mut args = call(run, options);
        if !options.contains(&"--delay") {
            args.extend(["--delay".into(), rtc["inference_delay"].to_string()]);
        }
        if options.contains(&"guided") {
            args.extend(["--execution-horizon".into(), rtc["execution_horizon"].to_string()]);
            args.extend(["--max-guidance".into(), rtc["max_guidance_weight"].to_string()]);
        }
        pi0(&args.iter().map(String::as_str).collect::<Vec<_>>()).assert().success();
        let wanted = read_tensors(&root().join(format!("golden/d/{run}.outputs.safetensors"))).unwrap();
        let actions = &read_tensors(Path::new(&output)).unwrap()["actions"];
        let far =
            actions.data.iter().zip(&wanted["actions"].data).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
        assert!(far <= 1e-5, "{run}: {far}");
    }
    let refusals: [(&str, &[&'static str], &str); 6] = [
        ("rtc_trained_b1", &["--rtc", "trained"], "--delay"),
        ("rtc_trained_b1", &["--rtc", "trained", "--delay", "7"], "at most 6"),
        ("rtc_trained_b1", &["--rtc", "trained", "--delay", "3", "--schedule", "exp"], "--rtc guided alone"),
        ("rtc_trained_b1", &["--rtc", "guided", "--delay", "3", "--max-guidance", "NaN"], "--max-guidance"),
        ("cam3_short_b1", &["--rtc", "trained", "--delay", "3"], "no tensor prev_chunk"),
        ("cam3_short_b1", &["--rtc", "free", "--delay", "3"], "guided"),
    ];
    for (run, options, word) in refusals {
        let args = call(run, options);
        let text = complaint(&args.iter().map(String::as_str).collect::<Vec<_>>());
        assert!(text.contains(word), "{options:?}: {text}");
    }
}

/// Every option that a message of the policy names exists.
#[test]
fn options_in_messages_exist() {
    let help = stdout(&["infer", "--help"]);
    let mut files = vec![root().join("crates/policy/src")];
    let mut named = std::collections::BTreeSet::new();
    while let Some(path) = files.pop() {
        if path.is_dir() {
            files.extend(std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path()));
            continue;
        }
        let text = std::fs::read_to_string(path).unwrap();
        for (at, _) in text.match_indices("--") {
            let name = text[at + 2..].split(|c: char| !c.is_ascii_lowercase() && c != '-').next().unwrap();
            if name.len() > 1 {
                named.insert(format!("--{}", name.trim_end_matches('-')));
            }
        }
    }
    assert!(named.len() > 8, "{named:?}");
    for option in named {
        assert!(help.contains(&option), "{option}");
    }
}

#[test]
fn help_has_examples() {
    for command in ["infer", "inspect", "synth", "devices"] {
        assert!(stdout(&[command, "--help"]).contains("Example"), "{command}");
    }
}
