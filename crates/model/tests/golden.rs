//! Every module of every golden case, against lerobot's PyTorch: the first rung of the ladder.
//!
//! The cases in `golden/` are always checked; set `PI0_GOLDEN` to a directory that holds more (such as one made by
//! `golden/make_golden.py`) to check those too.

mod runs;

use std::path::{Path, PathBuf};

use pi0_device::{Bound, Device, HostTensor, Reference, Tapped};
use pi0_model::golden::{compare_taps, golden_taps, padded_tokens, read_inputs, read_tensors};
use pi0_model::{Clean, Extent, Kind, Pi0, Rtc, SampleOptions};

use runs::{checkpoint, family, inputs, meta, repository, runs};

/// The bound for intermediates; correlation to match.
const BOUND: Bound = Bound { pcc: 0.999_999_99, relative_l2: 1e-5, max_abs: 1e-4 };

/// Directories of a checkpoint and of its runs: those of the repository and those that `PI0_GOLDEN` names.
fn cases() -> Vec<(PathBuf, PathBuf)> {
    let root = repository();
    let mut cases = vec![
        (root.join("golden/b"), root.join("golden/b")),
        // The weights of case c are also the random policy of the first steps.
        (root.join("models/tiny"), root.join("golden/c")),
        (root.join("golden/d"), root.join("golden/d")),
        (root.join("golden/e"), root.join("golden/e")),
    ];
    let more = std::env::var_os("PI0_GOLDEN").map(PathBuf::from);
    if more.is_none() {
        eprintln!("skipped: golden cases outside the repository (set PI0_GOLDEN=DIR)");
    }
    if let Some(root) = more {
        let entries = std::fs::read_dir(&root).unwrap_or_else(|e| panic!("{}: {e}", root.display()));
        for case in entries.map(|e| e.unwrap().path()).filter(|p| p.join("meta.json").exists()) {
            let weights = match meta(&case)["weights_of"].as_str() {
                Some(other) => root.join(other),
                None => case.clone(),
            };
            // π0-FAST is another network.
            if meta(&case)["naming"].is_string() && family(&weights) != "pi0_fast" {
                cases.push((weights, case));
            }
        }
    }
    cases.sort();
    cases
}

fn load(case: &Path, extent: Extent) -> Pi0<Tapped<Reference>> {
    Pi0::load(Tapped::new(Reference), checkpoint(case), extent, &|_| ()).unwrap()
}

#[test]
fn every_tapped_module_of_every_case() {
    for (checkpoint, case) in cases() {
        let model = load(&checkpoint, Extent::Whole);
        for run in runs(&case) {
            let c = model.config();
            let batch = inputs(&case, &run, c);
            let want = read_tensors(&case.join(format!("{run}.outputs.safetensors"))).unwrap();
            model.device().take().unwrap();
            let actions = model.sample_actions(&batch, &SampleOptions::default()).unwrap();
            let times = c.schedule.times(c.num_steps);
            let taps = model.device().take().unwrap();
            let width = padded_tokens(&want, &batch, c);
            let mut got = golden_taps(taps, &batch, c, &times, width).unwrap();
            got.insert("actions".into(), stack(&actions));

            let (mut worst, mut faults) = (0.0f64, Vec::new());
            for (name, result) in compare_taps(&got, &want, &batch) {
                match result {
                    // A camera that no row of the batch has was never computed.
                    Ok(a) if a.count == 0 => {}
                    Ok(a) => {
                        worst = worst.max(a.relative_l2);
                        let actions = name == "actions" && a.max_abs > 1e-5;
                        if !BOUND.holds(&a) || actions {
                            faults.push(format!("{name}: {a}"));
                        }
                    }
                    Err(e) => faults.push(format!("{name} {e}")),
                }
            }
            println!("{} {run}: {} tensors, worst relative L2 {worst:.1e}", case.display(), want.len());
            assert!(faults.is_empty(), "{} {run}:\n{}", case.display(), faults.join("\n"));
        }
    }
}

#[test]
fn leaving_out_what_nothing_reads_changes_nothing() {
    let case = repository().join("golden/b");
    let batch = read_inputs(&case.join("mixed_masks_b2.inputs.safetensors")).unwrap();
    let options = SampleOptions { steps: Some(2), ..Default::default() };
    let whole = load(&case, Extent::Whole).sample_actions(&batch, &options).unwrap();
    let cache = load(&case, Extent::Cache).sample_actions(&batch, &options).unwrap();
    assert_eq!(whole, cache);
}

#[test]
fn a_robot_does_not_feel_its_neighbours() {
    let case = repository().join("golden/b");
    let model = load(&case, Extent::Cache);
    let batch = read_inputs(&case.join("mixed_masks_b2.inputs.safetensors")).unwrap();
    let options = SampleOptions { steps: Some(2), ..Default::default() };
    let together = model.sample_actions(&batch, &options).unwrap();
    for (inputs, want) in batch.iter().zip(together) {
        assert_eq!(model.sample_actions(std::slice::from_ref(inputs), &options).unwrap(), [want]);
    }
}

/// What time makes is computed once for a number of steps: the first inference, later ones, those after another number
/// of steps, and a model that was loaded for this number give the same bits.
#[test]
fn kept_modulations_change_nothing() {
    let case = repository().join("golden/d");
    let model = load(&case, Extent::Cache);
    let batch = inputs(&case, "cam3_short_b1", model.config());
    let run = |model: &Pi0<Tapped<Reference>>, steps| {
        let options = SampleOptions { steps: Some(steps), ..Default::default() };
        model.sample_actions(&batch, &options).unwrap()
    };
    let first: Vec<_> = [3, 10, 1].map(|steps| run(&model, steps)).into();
    // More numbers of steps than are kept.
    (20..25).for_each(|steps| drop(run(&model, steps)));
    assert_eq!([3, 10, 1].map(|steps| run(&model, steps)).as_slice(), first);
    let mut fresh = checkpoint(&case);
    fresh.config.num_steps = 3;
    let fresh = Pi0::load(Tapped::new(Reference), fresh, Extent::Cache, &|_| ()).unwrap();
    assert_eq!(run(&fresh, 3), first[0]);
    assert_ne!(first[0], first[1]);
}

/// Known actions come back as they were given, a robot beside one without any is not changed, and no delay is no
/// real-time chunking.
#[test]
fn known_actions_stay_and_do_not_touch_the_neighbour() {
    let case = repository().join("golden/d");
    let model = load(&case, Extent::Cache);
    let c = model.config();
    assert_eq!(c.kind, Kind::Pi05);
    let mut batch = inputs(&case, "rtc_trained_b2", c);
    let options = SampleOptions { steps: Some(2), ..Default::default() };
    let both = model.sample_actions(&batch, &options).unwrap();
    let Some(Rtc::Trained(clean)) = batch[0].rtc.clone() else { panic!("a trained run") };
    assert_eq!(both[0].data[..clean.delay * c.action_dim], *clean.rows(c.action_dim));
    batch[1].rtc = Some(Rtc::Trained(Clean { delay: 0, ..clean }));
    let mixed = model.sample_actions(&batch, &options).unwrap();
    assert_eq!(mixed[0], both[0]);
    batch[1].rtc = None;
    assert_eq!(model.sample_actions(&batch[1..], &options).unwrap()[0], mixed[1]);
    assert_ne!(mixed[1], both[1]);
    assert_eq!(model.device().name(), "reference");
}

fn stack(chunks: &[HostTensor]) -> HostTensor {
    let shape = [chunks.len(), chunks[0].shape[0], chunks[0].shape[1]];
    HostTensor::new(shape, chunks.iter().flat_map(|c| c.data.iter().copied()).collect())
}
