//! `pi0 bench` on the small model: what it reports, and that it times nothing that is wrong.

use std::path::{Path, PathBuf};

use assert_cmd::Command;
use assert_cmd::assert::Assert;
use serde_json::Value;

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

fn bench(args: &[&str], input: &str) -> Assert {
    let mut command = Command::cargo_bin("pi0").unwrap();
    command.current_dir(root()).arg("bench").args(args).write_stdin(input).assert()
}

fn text(bytes: &[u8]) -> String {
    String::from_utf8(bytes.to_vec()).unwrap()
}

#[test]
fn stages_add_up_to_the_whole_and_memory_is_known() {
    let args = "models/tiny --cameras 1 --tokens 5 --steps 2 --repeat 2 --json -";
    let done = bench(&args.split(' ').collect::<Vec<_>>(), "").success();
    let r: Value = serde_json::from_slice(&done.get_output().stdout).unwrap();
    assert_eq!(r["inputs"], serde_json::json!({"batch": 1, "images": 1, "tokens": 5, "steps": 2}));
    assert_eq!(r["verdict"]["method"], "reference");
    let number = |v: &Value| v.as_f64().unwrap();
    let sum = |list: &Value, key: &str| list.as_array().unwrap().iter().map(|l| number(&l[key])).sum::<f64>();
    let total = number(&r["total"]["flop"]);
    assert!(total > 1e8);
    assert_eq!(sum(&r["stages"], "flop"), total);
    assert_eq!(sum(&r["operations"], "flop"), total);
    assert!(r["stages"].as_array().unwrap().iter().all(|s| number(&s["ms"]["min"]) > 0.0));
    assert!(number(&r["limits"]["memory"]) > 0.1);
    if cfg!(target_os = "linux") {
        assert!(number(&r["memory_running"]) > 1e6);
        assert!(number(&r["first_action"]) >= number(&r["load"]));
    }
}

#[test]
fn stored_actions_are_written_checked_and_refused_when_wrong() {
    let dir = tempfile::tempdir().unwrap();
    let file = dir.path().join("actions.safetensors");
    let path = file.to_str().unwrap();
    let args = |flag, cameras| {
        ["models/tiny", "--cameras", cameras, "--steps", "1", "--repeat", "1", "--dtype", "f32", flag, path]
    };
    let first = text(&bench(&args("--output", "1"), "").success().get_output().stdout);
    assert!(first.contains("against the reference's") && first.contains("denoise"), "{first}");
    bench(&args("--golden", "1"), "").success();
    let refused = text(&bench(&args("--golden", "2"), "").failure().get_output().stderr);
    assert!(refused.contains("wrong actions") && refused.contains("nothing was timed"), "{refused}");
}

#[test]
fn on_demand_answers_each_line_with_seconds() {
    let args = "models/tiny --cameras 1 --steps 1 --on-demand";
    let out = text(&bench(&args.split(' ').collect::<Vec<_>>(), "\n\n").success().get_output().stdout);
    let lines: Vec<_> = out.lines().take(3).collect();
    assert_eq!(lines[0], "ready");
    assert!(lines[1..].iter().all(|l| l.parse::<f64>().is_ok_and(|s| s > 0.0)), "{out}");
    assert!(out.contains("2 timed inferences"), "{out}");
    let none = text(&bench(&args.split(' ').collect::<Vec<_>>(), "").failure().get_output().stderr);
    assert!(none.contains("asked for no inference"), "{none}");
}
