//! Whole inferences of π0.5 against lerobot's PyTorch, in each number format: golden cases d and e, with and without
//! real-time chunking. Cases of π0: `crates/model/tests/golden.rs` on the reference, and every module on this device.

#[path = "../../model/tests/runs/mod.rs"]
#[allow(dead_code)] // what only the model's own tests need
mod runs;

use pi0_cpu::{Cpu, CpuOptions, Format, Isa};
use pi0_device::compare;
use pi0_model::golden::read_tensors;
use pi0_model::{Extent, Pi0, SampleOptions};

/// How far from f32 openpi's own bf16 is, in PyTorch 2.11 (`golden/make_golden.py verify --impl openpi --exact-time
/// --precision bfloat16 --tol 9`): the largest difference of the actions of case d, of its runs with real-time chunking,
/// and of case e.
fn of_bf16(case: &str, run: &str) -> f64 {
    match case {
        "d" if run.starts_with("rtc") => 0.053,
        "d" => 0.078,
        _ => 0.097,
    }
}

#[test]
fn actions_of_pi05_agree_with_the_references() {
    for case in ["d", "e"] {
        let dir = runs::repository().join("golden").join(case);
        for isa in Isa::available() {
            for format in [Format::F32, Format::Bf16, Format::Int8] {
                let cpu = Cpu::new(CpuOptions { isa: Some(isa), threads: None, format }).unwrap();
                let model = Pi0::load(cpu, runs::checkpoint(&dir), Extent::Cache, &|_| ()).unwrap();
                // Every run on the fastest instruction set; one of each kind on the others.
                let all = isa == Isa::detect();
                let runs = runs::runs(&dir).into_iter();
                for run in runs.filter(|run| all || !run.starts_with("rtc") || run == "rtc_trained_b2") {
                    let batch = runs::inputs(&dir, &run, model.config());
                    let want = read_tensors(&dir.join(format!("{run}.outputs.safetensors"))).unwrap();
                    let got = model.sample_actions(&batch, &SampleOptions::default()).unwrap();
                    let got: Vec<f32> = got.into_iter().flat_map(|chunk| chunk.data).collect();
                    let agreement = compare(&got, &want["actions"].data);
                    let close = match format {
                        Format::F32 => agreement.max_abs <= 1e-4,
                        Format::Bf16 => agreement.max_abs <= of_bf16(case, &run),
                        _ => agreement.pcc >= 0.995,
                    };
                    println!("{case} {run} {isa} {format}: {agreement}");
                    assert!(close, "{case} {run} {isa} {format}: {agreement}");
                }
            }
        }
    }
}
