//! Tiny models end to end on the simulator, module by module, against lerobot's PyTorch.

mod common;

use std::path::{Path, PathBuf};
use std::time::Instant;

use pi0_device::{Bound, Fallback, HostTensor, Record, Reference, Tapped, Traced, compare};
use pi0_model::golden::{compare_taps, golden_taps, padded_tokens, read_inputs, read_tensors};
use pi0_model::{Checkpoint, Extent, Pi0, SampleOptions};

/// What ten steps of flow matching must reach; and every intermediate, with the rounding of all before it.
const ACTIONS: Bound = Bound { pcc: 0.9999, relative_l2: 0.01, max_abs: f64::INFINITY };
/// The same with weights as bfp8, where intermediates are only told.
const BFP8: Bound = Bound { pcc: 0.999, relative_l2: 0.05, max_abs: f64::INFINITY };
/// The velocities of a step, which the actions are the sum of.
const STEP: Bound = Bound { pcc: 0.999, relative_l2: 0.03, max_abs: f64::INFINITY };
const MODULE: Bound = Bound { pcc: 0.9995, relative_l2: 0.03, max_abs: f64::INFINITY };

fn repository(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").join(path)
}

/// How much of a run is on the device, as fractions of its base operations and of their FLOP.
///
/// Moves between host and device are no operations.
fn coverage(records: &[Record]) -> (f64, f64) {
    let (mut all, mut on_device) = ((0, 0), (0, 0));
    for record in records {
        for part in record.parts.iter().filter(|p| p.op.kind().is_some()) {
            all = (all.0 + 1, all.1 + part.flop);
            if !record.on_host() {
                on_device = (on_device.0 + 1, on_device.1 + part.flop);
            }
        }
    }
    println!("on the device: {} of {} operations, {} of {} FLOP", on_device.0, all.0, on_device.1, all.1);
    (f64::from(on_device.0) / f64::from(all.0), on_device.1 as f64 / all.1 as f64)
}

/// The actions of all robots as one tensor.
fn together(actions: &[HostTensor]) -> HostTensor {
    let shape = [actions.len(), actions[0].shape[0], actions[0].shape[1]];
    HostTensor::new(shape, actions.iter().flat_map(|a| a.data.iter().copied()).collect())
}

/// Runs the network in `weights` on a run of `case`, layer by layer and fused.
fn end_to_end(weights: &Path, case: &Path, run: &str) {
    let Some(device) = common::open() else { return };
    let start = Instant::now();
    let checkpoint = Checkpoint::open(weights).unwrap();
    let traced = Traced::new(device, Reference, Fallback::RunOnHost);
    let model = Pi0::load(Tapped::new(&traced), checkpoint, Extent::Whole, &|_| ()).unwrap();
    let batch = read_inputs(&case.join(format!("{run}.inputs.safetensors"))).unwrap();
    let want = read_tensors(&case.join(format!("{run}.outputs.safetensors"))).unwrap();
    let actions = model.sample_actions(&batch, &SampleOptions::default()).unwrap();
    let c = model.config();
    let taps = model.device().take().unwrap();
    let width = padded_tokens(&want, &batch, c);
    let mut got = golden_taps(taps, &batch, c, &c.schedule.times(c.num_steps), width).unwrap();
    got.insert("actions".into(), together(&actions));

    let mut faults = Vec::new();
    let (ops, flop) = coverage(&traced.take());
    println!(
        "{} {run}: {:.2} % of operations and {:.4} % of FLOP on the device",
        case.display(),
        100.0 * ops,
        100.0 * flop
    );
    if ops < 0.95 || flop < 0.999 {
        faults.push(format!("only {ops} of operations and {flop} of FLOP are on the device"));
    }
    // Taps compose every layer from base operations; what robots get is computed by the fused ones.
    let checkpoint = Checkpoint::open(weights).unwrap();
    let fused = Pi0::load(&traced, checkpoint, Extent::Whole, &|_| ()).unwrap();
    let fused = together(&fused.sample_actions(&batch, &SampleOptions::default()).unwrap());
    assert_eq!(fused.shape, want["actions"].shape);
    let a = compare(&fused.data, &want["actions"].data);
    println!("{} {run} actions, fused: {a}", case.display());
    if !(if common::bfp8() { BFP8 } else { ACTIONS }).holds(&a) {
        faults.push(format!("actions, fused: {a}"));
    }
    for (name, result) in compare_taps(&got, &want, &batch) {
        match result {
            Ok(a) if a.count == 0 => {}
            Ok(a) => {
                println!("{} {run} {name}: {a}", case.display());
                let bound = match &name[..] {
                    "actions" => ACTIONS,
                    step if step.starts_with("step") => STEP,
                    _ => MODULE,
                };
                if !common::bfp8() && !bound.holds(&a) {
                    faults.push(format!("{name}: {a}"));
                }
            }
            Err(e) => faults.push(format!("{name} {e}")),
        }
    }
    println!("{} {run}: {:.1} s", case.display(), start.elapsed().as_secs_f64());
    assert!(faults.is_empty(), "{} {run}:\n{}", case.display(), faults.join("\n"));
}

#[test]
fn case_b_two_robots_with_masks() {
    let case = repository("golden/b");
    end_to_end(&case, &case, "mixed_masks_b2");
}

#[test]
fn case_c_pictures_of_real_size() {
    end_to_end(&repository("models/tiny"), &repository("golden/c"), "cam2_short_b1");
}

/// π0.5: three cameras, and two robots with masks; a checkpoint of the other code base.
#[test]
fn cases_d_and_e_of_pi05() {
    for (case, run) in [("d", "cam3_short_b1"), ("d", "mixed_masks_b2"), ("e", "cam2_short_b1")] {
        let case = repository("golden").join(case);
        end_to_end(&case, &case, run);
    }
}

#[test]
fn more_cases() {
    let Some(root) = std::env::var_os("PI0_GOLDEN") else {
        eprintln!("skipped: golden cases outside the repository (set PI0_GOLDEN=DIR)");
        return;
    };
    let mut inputs: Vec<_> = std::fs::read_dir(root)
        .unwrap()
        .flat_map(|case| std::fs::read_dir(case.unwrap().path()).into_iter().flatten())
        .map(|file| file.unwrap().path())
        .collect();
    inputs.sort();
    for path in inputs {
        let name = path.file_name().unwrap().to_string_lossy().into_owned();
        let (Some(run), Some(case)) = (name.strip_suffix(".inputs.safetensors"), path.parent()) else {
            continue;
        };
        // Real-time chunking is guided by the host, and the language model of π0-FAST answers with tokens: other tests.
        let arch = std::fs::read_to_string(case.join("arch.json")).unwrap_or_default();
        if !run.starts_with("rtc_") && !arch.contains("fast") && case.join("model.safetensors").is_file() {
            end_to_end(case, case, run);
        }
    }
}
