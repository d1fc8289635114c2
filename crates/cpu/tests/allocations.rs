//! Once warm, the denoising loop allocates nothing at all: no buffer, no handle, no list of shapes.

mod counting;

use pi0_cpu::{Cpu, CpuOptions, Format, Isa};
use pi0_model::{Clean, Config, Extent, Inputs, Kind, Pi0, Rtc, SampleOptions, synth};

/// One test, because the count is the whole program's. Of π0.5, one robot's first actions are known, so that the rows of a
/// step have two times.
#[test]
fn more_steps_allocate_no_more() -> Result<(), Box<dyn std::error::Error>> {
    check(Config::tiny())?;
    check(Config { rtc_training_max_delay: 4, ..Config::tiny().of_kind(Kind::Pi05) })
}

fn check(config: Config) -> Result<(), Box<dyn std::error::Error>> {
    let robot = |cameras: [bool; 2], tokens| Inputs {
        images: cameras.map(|on| on.then(|| vec![0.1; 3 * config.vision.image_size.pow(2)])).to_vec(),
        tokens: vec![1; tokens],
        state: if config.kind == Kind::Pi0 { vec![0.2; config.state_dim] } else { vec![] },
        ..Inputs::default()
    };
    let mut batch = [robot([true, false], 3), robot([false, true], 0)];
    if config.rtc_training_max_delay > 0 {
        let previous = vec![0.3; config.rtc_training_max_delay * config.action_dim];
        batch[0].rtc = Some(Rtc::Trained(Clean { previous, delay: 3 }));
    }
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
            // Times are embedded anew where there are other ones than in the inference before.
            let again = |steps| allocations(steps).and_then(|_| allocations(steps));
            let (two, three) = (again(2)?, again(3)?);
            assert!(cold > three && two > 0, "the count sees nothing");
            assert_eq!(two, three, "{isa}, {format}: a step allocates");
        }
    }
    Ok(())
}
