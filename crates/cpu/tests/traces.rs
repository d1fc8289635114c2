//! A trace costs no memory traffic: once warm, an inference that is recorded allocates exactly as often as one that is
//! not.

mod counting;

use pi0_cpu::{Cpu, CpuOptions};
use pi0_device::{Device, Fallback, Reference, Traced};
use pi0_model::{Config, Extent, Inputs, Pi0, SampleOptions, synth};

type Outcome<T> = Result<T, Box<dyn std::error::Error>>;

/// The small network, with two robots that see two cameras each.
fn load<D: Device>(device: D) -> Outcome<Pi0<D>> {
    Ok(Pi0::load(device, synth::checkpoint(&Config::tiny(), 1)?, Extent::Cache, &|_| ())?)
}

/// Allocations of one inference.
fn allocations<D: Device>(model: &Pi0<D>) -> Outcome<usize> {
    let config = model.config();
    let image = Some(vec![0.1; 3 * config.vision.image_size.pow(2)]);
    let robot = Inputs {
        images: vec![image.clone(), image],
        tokens: vec![1, 2, 3],
        state: vec![0.2; config.state_dim],
        ..Inputs::default()
    };
    let batch = [robot.clone(), robot];
    let before = counting::allocations();
    model.sample_actions(&batch, &SampleOptions { steps: None, seed: 0 })?;
    Ok(counting::allocations() - before)
}

#[test]
fn recording_allocates_nothing() -> Outcome<()> {
    // One thread: which of several meets an operation first, and grows its scratch memory, is up to the system.
    let cpu = Cpu::new(CpuOptions { threads: Some(1), ..CpuOptions::default() })?;
    // With the fused operations, and with all of them composed.
    same(&cpu)?;
    same(Plain(&cpu))
}

fn same<D: Device + Copy>(device: D) -> Outcome<()> {
    let bare = load(device)?;
    let traced = load(Traced::new(device, Reference, Fallback::Fail))?;
    // The pool fills, and so do the modules and the room for records. Loading is recorded as well.
    allocations(&bare)?;
    traced.device().take();
    let cold = allocations(&traced)?;
    let first = traced.device().take();
    let (without, with) = (allocations(&bare)?, allocations(&traced)?);
    let again = traced.device().take();
    assert!(cold > without, "the count sees nothing");
    assert_eq!(again.len(), first.len());
    assert_eq!(with, without, "with and without a trace of {} records", again.len());
    Ok(())
}

/// Runs on `D`, but fuses nothing.
#[derive(Clone, Copy)]
struct Plain<D>(D);

impl<D: Device> Device for Plain<D> {
    type Tensor = D::Tensor;
    type Weight = D::Weight;

    pi0_device::forward! { D.0:
        name memory preferred shape on_host lacks upload download prepare
        embed linear layer_norm rms_norm ada_rms_norm rope attention gelu silu geglu add add_scaled gated_add
        concat_rows slice_rows slice_cols
    }
}
