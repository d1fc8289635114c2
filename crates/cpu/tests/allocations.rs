//! Once warm, the denoising loop allocates nothing at all: no buffer, no handle, no list of shapes.

mod counting;

use pi0_cpu::{Cpu, CpuOptions, Format, Isa};
use pi0_model::{Config, Extent, Inputs, Pi0, SampleOptions, synth};

#[test]
fn more_steps_allocate_no_more() -> Result<(), Box<dyn std::error::Error>> {
    let config = Config::tiny();
    let robot = |cameras: [bool; 2], tokens| Inputs {
        images: cameras.map(|on| on.then(|| vec![0.1; 3 * config.vision.image_size.pow(2)])).to_vec(),
        tokens: vec![1; tokens],
        state: vec![0.2; config.state_dim],
        noise: None,
        rtc: None,
    };
    let batch = [robot([true, false], 3), robot([false, true], 0)];
    for isa in Isa::available() {
        for format in [Format::F32, Format::Bf16, Format::Int8] {
            // One thread: which of several meets an operation first, and grows its scratch memory, is up to the system.
            let cpu = Cpu::new(CpuOptions { isa: Some(isa), threads: Some(1), format })?;
            let model = Pi0::load(cpu, synth::checkpoint(&config, 1)?, Extent::Cache, &|_| ())?;
            let allocations = |steps| -> Result<usize, Box<dyn std::error::Error>> {
                let before = counting::allocations();
                model.sample_actions(&batch, &SampleOptions { steps: Some(steps), seed: 0 })?;
                Ok(counting::allocations() - before)
            };
            // The pool fills, and its lists grow as long as they need to be.
            let cold = allocations(3)?;
            for steps in [2, 3, 2] {
                allocations(steps)?;
            }
            let (two, three) = (allocations(2)?, allocations(3)?);
            assert!(cold > three && two > 0, "the count sees nothing");
            assert_eq!(two, three, "{isa}, {format}: a step allocates");
        }
    }
    Ok(())
}
