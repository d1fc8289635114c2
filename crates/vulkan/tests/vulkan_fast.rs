//! π0-FAST: the references' own tokens, and decoding as a few recordings that are replayed.
//!
//! Case f of the repository; with `PI0_GOLDEN=DIR` all cases of π0-FAST there too.

mod common;
#[allow(dead_code)] // not all of it is wanted here
#[path = "../../model/tests/runs/mod.rs"]
mod runs;

use std::path::{Path, PathBuf};

use common::open_all;
use pi0_device::{Device, OpKind};
use pi0_model::golden::read_tensors;
use pi0_model::{Checkpoint, EOS, Extent, Inputs, OpenOptions, Pi0, SampleOptions};
use pi0_vulkan::{Format, Vulkan};
use runs::{family, inputs, meta, repository};

/// `|` in the vocabulary of the golden data.
const BAR: u32 = 377;

fn cases() -> Vec<PathBuf> {
    let mut cases = vec![repository().join("golden/f")];
    let Some(root) = std::env::var_os("PI0_GOLDEN") else {
        eprintln!("skipped: golden cases outside the repository (set PI0_GOLDEN=DIR)");
        return cases;
    };
    let entries = std::fs::read_dir(root).unwrap().map(|e| e.unwrap().path());
    let fast = |case: &PathBuf| {
        case.join("meta.json").exists() && case.join("arch.json").exists() && family(case) == "pi0_fast"
    };
    cases.extend(entries.filter(fast));
    cases.sort();
    cases
}

fn is_openpi(case: &Path) -> bool {
    meta(case)["flavour"] == "openpi"
}

/// The end mark of a case's answers.
fn end(case: &Path) -> u32 {
    if is_openpi(case) { EOS } else { BAR }
}

fn open(case: &Path) -> Checkpoint {
    let arch = Some(case.join("arch.json"));
    let mut checkpoint = Checkpoint::open_with(case, &OpenOptions { arch, ..Default::default() }).unwrap();
    if is_openpi(case) {
        checkpoint.config.answer.as_mut().unwrap().tied = true;
    }
    checkpoint
}

fn load<'a>(device: &'a Vulkan, case: &Path) -> Pi0<&'a Vulkan> {
    Pi0::load(device, open(case), Extent::Cache, &|_| ()).unwrap()
}

fn batch(case: &Path, run: &str, model: &Pi0<&Vulkan>) -> Vec<Inputs> {
    let end = Some(end(case));
    inputs(case, run, model.config()).into_iter().map(|input| Inputs { end, ..input }).collect()
}

/// A robot's own tokens: while others go on, the references go on with it too.
fn own(tokens: &[f32], end: u32) -> Vec<f32> {
    let last = tokens.iter().position(|&t| t as u32 == end).map_or(tokens.len(), |at| at + 1);
    let filled = tokens[..last].iter().rposition(|&t| t != 0.0).map_or(0, |at| at + 1);
    tokens[..filled].to_vec()
}

#[test]
fn tokens_are_those_of_the_references() {
    for (device, _) in open_all(Format::Stored) {
        for case in cases() {
            let model = load(&device, &case);
            for run in runs::runs(&case) {
                let batch = batch(&case, &run, &model);
                let said = meta(&case)["runs"].as_array().unwrap().iter().find(|r| r["name"] == run).cloned();
                let steps = said.unwrap()["steps"].as_u64().map(|n| n as usize);
                let options = SampleOptions { steps, ..Default::default() };
                let what = format!("{} {run} by {}", case.display(), device.products());
                let want = &read_tensors(&case.join(format!("{run}.outputs.safetensors"))).unwrap()["tokens"];
                let answers = model.sample_actions(&batch, &options).unwrap();
                for (row, got) in answers.iter().enumerate() {
                    assert_eq!(got.data, own(want.row(row), end(&case)), "{what}, robot {row}");
                }
                println!("{what}: {} tokens", answers.iter().map(|a| a.data.len()).sum::<usize>());
            }
        }
        // Nothing was done on the host: an operation that the device lacks would have been an error.
        assert!(!device.on_host(OpKind::Embed));
    }
}

/// However long an answer is, it is a recording of the prompt, one of the first token (which sees nothing written) and one
/// of any other, for each number of robots that still write.
#[test]
fn tokens_replay_one_recording() {
    let case = repository().join("golden/f");
    for (device, _) in open_all(Format::Stored) {
        let model = load(&device, &case);
        let both = batch(&case, "mixed_masks_b2", &model);
        let options = SampleOptions::default();
        let mut held = vec![];
        for robots in [&both[..1], &both[..]] {
            let before = device.stats();
            let first = model.sample_actions(robots, &options).unwrap();
            let recorded = device.stats();
            println!("{} robots: {recorded:?}", robots.len());
            let longest = first.iter().map(|a| a.data.len()).max().unwrap();
            assert!(longest > 10, "{longest} tokens");
            // Two robots end at different times: then one writes on alone.
            let most = if robots.len() == 1 { 3 } else { 4 };
            let new = recorded.recorded - before.recorded;
            assert!(new <= most, "{new} recordings");
            assert_eq!(new + recorded.replayed - before.replayed, longest as u64);
            assert_eq!(
                model.sample_actions(robots, &options).unwrap(),
                first,
                "a replay gives the same tokens"
            );
            let again = device.stats();
            assert_eq!(again.recorded, recorded.recorded);
            assert_eq!(again.replayed - recorded.replayed, longest as u64);
            held.push(device.memory().unwrap().bytes());
        }
        // What was recorded stays, and nothing grows from answer to answer.
        for _ in 0..3 {
            model.sample_actions(&both, &options).unwrap();
        }
        assert_eq!(device.memory().unwrap().bytes(), held[1]);
    }
}
