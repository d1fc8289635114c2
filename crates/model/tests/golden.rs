//! Every module of every golden case, against lerobot's PyTorch: the first rung of the ladder.
//!
//! The cases in `golden/` are always checked; set `PI0_GOLDEN` to a directory that holds more (such as one made by
//! `golden/make_golden.py`) to check those too.

use std::path::{Path, PathBuf};

use pi0_device::{Bound, HostTensor, Reference, Tapped};
use pi0_model::golden::{compare_taps, golden_taps, read_inputs, read_tensors};
use pi0_model::{Checkpoint, Extent, Pi0, SampleOptions};

/// The bound for intermediates; correlation to match.
const BOUND: Bound = Bound { pcc: 0.999_999_99, relative_l2: 1e-5, max_abs: 1e-4 };

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// Directories of a checkpoint and of its runs: those of the repository and those that `PI0_GOLDEN` names.
fn cases() -> Vec<(PathBuf, PathBuf)> {
    let root = repository();
    let mut cases = vec![
        (root.join("golden/b"), root.join("golden/b")),
        // The weights of case c are also the random policy of the first steps.
        (root.join("models/tiny"), root.join("golden/c")),
    ];
    let more = std::env::var_os("PI0_GOLDEN").map(PathBuf::from);
    if more.is_none() {
        eprintln!("skipped: golden cases outside the repository (set PI0_GOLDEN=DIR)");
    }
    if let Some(root) = more {
        let entries = std::fs::read_dir(&root).unwrap_or_else(|e| panic!("{}: {e}", root.display()));
        let dirs = entries.map(|e| e.unwrap().path()).filter(|p| p.join("model.safetensors").exists());
        cases.extend(dirs.map(|p| (p.clone(), p)));
    }
    cases.sort();
    cases
}

/// Names of the runs of a case.
fn runs(case: &Path) -> Vec<String> {
    let files = std::fs::read_dir(case).unwrap().map(|e| e.unwrap().file_name().into_string().unwrap());
    let mut runs: Vec<_> =
        files.filter_map(|f| Some(f.strip_suffix(".inputs.safetensors")?.to_string())).collect();
    runs.sort();
    runs
}

fn load(case: &Path, extent: Extent) -> Pi0<Tapped<Reference>> {
    Pi0::load(Tapped::new(Reference), Checkpoint::open(case).unwrap(), extent, &|_| ()).unwrap()
}

#[test]
fn every_tapped_module_of_every_case() {
    for (checkpoint, case) in cases() {
        let model = load(&checkpoint, Extent::Whole);
        for run in runs(&case) {
            let batch = read_inputs(&case.join(format!("{run}.inputs.safetensors"))).unwrap();
            let want = read_tensors(&case.join(format!("{run}.outputs.safetensors"))).unwrap();
            let actions = model.sample_actions(&batch, &SampleOptions::default()).unwrap();
            let c = model.config();
            let times = c.schedule.times(c.num_steps);
            let taps = model.device().take().unwrap();
            let mut got = golden_taps(taps, &batch, c, &times, c.max_tokens).unwrap();
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

fn stack(chunks: &[HostTensor]) -> HostTensor {
    let shape = [chunks.len(), chunks[0].shape[0], chunks[0].shape[1]];
    HostTensor::new(shape, chunks.iter().flat_map(|c| c.data.iter().copied()).collect())
}
