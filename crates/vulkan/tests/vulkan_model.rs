//! Whole networks against the references' own results.

mod common;
#[allow(dead_code)] // not all of it is wanted here
#[path = "../../model/tests/runs/mod.rs"]
mod runs;

use pi0_device::{Bound, Device, compare};
use pi0_model::golden::{read_inputs, read_tensors};
use pi0_model::{Checkpoint, Extent, Pi0, SampleOptions};

/// What ten steps of flow matching must reach, with products in f32.
const ACTIONS: Bound = Bound { pcc: 0.999_999, relative_l2: 1e-5, max_abs: f64::INFINITY };
/// With operands of products rounded to f16.
const ROUNDED: Bound = Bound { pcc: 0.9999, relative_l2: 1e-2, max_abs: f64::INFINITY };

/// Runs the network in `weights` on a run of `case`, twice, with products in f32 and on matrices.
fn end_to_end(weights: &str, case: &str, run: &str) {
    for (device, _) in common::open_all(pi0_vulkan::Format::Stored) {
        on(&device, weights, case, run);
    }
}

fn on(device: &pi0_vulkan::Vulkan, weights: &str, case: &str, run: &str) {
    let bound = if device.products() == pi0_vulkan::Unit::F32 { ACTIONS } else { ROUNDED };
    let checkpoint = Checkpoint::open(&runs::repository().join(weights)).unwrap();
    let model = Pi0::load(device, checkpoint, Extent::Cache, &|_| ()).unwrap();
    let batch =
        read_inputs(&runs::repository().join(case).join(format!("{run}.inputs.safetensors"))).unwrap();
    let want = &read_tensors(&runs::repository().join(case).join(format!("{run}.outputs.safetensors")))
        .unwrap()["actions"];
    let start = std::time::Instant::now();
    let actions = model.sample_actions(&batch, &SampleOptions::default()).unwrap();
    let first = start.elapsed();
    let again = model.sample_actions(&batch, &SampleOptions::default()).unwrap();
    println!("{case} {run}: {first:?}, then {:?}; {:?}", start.elapsed() - first, device.stats());
    println!("device memory: {} bytes", device.memory().unwrap().bytes());
    assert_eq!(actions, again, "a replay gives the same bits");
    let data: Vec<f32> = actions.iter().flat_map(|a| a.data.iter().copied()).collect();
    let agreement = compare(&data, &want.data);
    println!("{case} {run} by {}: {agreement}", device.products());
    assert!(bound.holds(&agreement), "{case} {run}: {agreement}");
}

#[test]
fn two_robots_with_masked_cameras() {
    end_to_end("golden/b", "golden/b", "mixed_masks_b2");
}

#[test]
fn one_robot_of_openpi() {
    end_to_end("models/tiny", "golden/c", "cam2_short_b1");
}

#[test]
fn two_robots_of_pi05() {
    end_to_end("golden/d", "golden/d", "mixed_masks_b2");
}
