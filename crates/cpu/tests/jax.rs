//! A JAX checkpoint comes in the form that the processor packs fastest, and means the same as in any other.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use pi0_cpu::{Cpu, CpuOptions, Format, Isa};
use pi0_device::{Bytes, TensorSource};
use pi0_model::golden::read_inputs;
use pi0_model::{Checkpoint, Extent, Pi0, SampleOptions};

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/orbax")
}

/// The same tensors in memory, in C order and as they are stored.
fn plain(checkpoint: &Checkpoint) -> Checkpoint {
    let names = checkpoint.names().map(str::to_owned);
    let tensors = names.map(|name| {
        let t = checkpoint.tensor(&name).unfetched();
        let bytes = Bytes::Owned(Arc::new(t.bytes().to_vec()));
        TensorSource::new(name, t.dtype, t.shape.clone(), bytes).unwrap()
    });
    Checkpoint::from_tensors(checkpoint.config.clone(), tensors.collect()).unwrap()
}

#[test]
fn actions_are_those_of_the_same_weights_in_rows() {
    // With adapters, in several chunks an array, and with norms that time drives.
    for (name, run) in [("pi0_base", "pi0"), ("pi0_lora", "pi0"), ("deep", "pi0"), ("pi05_base", "pi05")] {
        let arch = golden().join("pi0_base/arch.json");
        let options = pi0_model::OpenOptions {
            arch: (!golden().join(name).join("arch.json").exists()).then_some(arch),
            ..Default::default()
        };
        let checkpoint = Checkpoint::open_with(&golden().join(name), &options).unwrap();
        let inputs = read_inputs(&golden().join(format!("{run}.inputs.safetensors"))).unwrap();
        let rows = plain(&checkpoint);
        for isa in Isa::available() {
            for format in [Format::F32, Format::Bf16, Format::Int8, Format::Stored] {
                let actions = |checkpoint: &Checkpoint| {
                    let cpu = Cpu::new(CpuOptions { isa: Some(isa), threads: Some(2), format }).unwrap();
                    let model = Pi0::load(cpu, checkpoint.clone(), Extent::Cache, &|_| ()).unwrap();
                    model.sample_actions(&inputs, &SampleOptions::default()).unwrap()[0].data.clone()
                };
                assert!(actions(&checkpoint) == actions(&rows), "{name} {isa} {format}");
            }
        }
    }
}
