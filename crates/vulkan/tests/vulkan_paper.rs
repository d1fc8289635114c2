//! The full sizes on paper: what a GPU would be asked for needs none to be written down.

use pi0_device::Device;
use pi0_model::cases::random_inputs;
use pi0_model::{Config, Extent, Kind, Pi0, SampleOptions, synth};
use pi0_vulkan::paper::Chip;
use pi0_vulkan::{Format, Stats, Vulkan, VulkanOptions};

/// Plans an inference of full size: what it is, and bytes of weights and in all.
fn plan(chip: Chip, kind: Kind, format: Format, cameras: usize, tokens: usize) -> (Stats, [u64; 2]) {
    let config = Config::full().of_kind(kind);
    let device = Vulkan::plan(chip.info(), VulkanOptions { format, ..Default::default() }).unwrap();
    let model = Pi0::load(device, synth::outline(&config).unwrap(), Extent::Cache, &|_| ()).unwrap();
    let bytes = || model.device().memory().unwrap().bytes();
    let weights = bytes();
    let tokens = tokens.min(config.max_tokens);
    let batch = [random_inputs(&config, 0, &vec![true; cameras], tokens)];
    let run = || {
        let before = model.device().stats().host;
        model.sample_actions(&batch, &SampleOptions::default()).unwrap();
        model.device().stats().host - before
    };
    run();
    let stats = model.device().stats();
    println!("host, writing and planning the tape again: {:?}", (0..5).map(|_| run()).min().unwrap());
    (stats, [weights, bytes()])
}

/// At most 1,600 launches, and memory for a tenth more than the weights.
#[test]
fn launches_and_memory_of_full_sizes() {
    let chip = Chip::find("rtx-4090").unwrap();
    for kind in [Kind::Pi0, Kind::Pi05] {
        for format in [Format::Stored, Format::Int8] {
            for (cameras, tokens) in [(1, 16), (2, 48), (3, 200)] {
                let (stats, [weights, all]) = plan(chip, kind, format, cameras, tokens);
                let more = 100.0 * (all as f64 / weights as f64 - 1.0);
                println!(
                    "{kind:?} {format:?}, {cameras} cameras, {tokens} tokens: {} launches, {} barriers, weights {weights}, \
                     arena {}, in all {all} bytes, {more:.1} % more",
                    stats.launches, stats.barriers, stats.arena_bytes
                );
                assert!(stats.launches <= 1600, "{} launches", stats.launches);
                assert!(more <= 10.0, "{more} % more than the weights");
            }
        }
    }
}

/// What follows a tape that ran before, wholly or half way, comes to what a device does that has seen nothing.
#[test]
fn what_is_followed_is_what_would_be_written() {
    let chip = Chip::find("rtx-4090").unwrap();
    for kind in [Kind::Pi0, Kind::Pi05] {
        let config = Config::full().of_kind(kind);
        let load = || {
            let device =
                Vulkan::plan(chip.info(), VulkanOptions { shapes: 3, ..Default::default() }).unwrap();
            Pi0::load(device, synth::outline(&config).unwrap(), Extent::Cache, &|_| ()).unwrap()
        };
        // Prompts of another length part late, other cameras at once, other steps in the middle.
        let cases =
            [(2, 20, 3), (2, 21, 3), (1, 20, 3), (2, 20, 2), (2, 20, 3), (2, 21, 3), (2, 20, 2), (2, 20, 3)];
        let run = |model: &Pi0<Vulkan>, (cameras, tokens, steps): (usize, usize, usize)| {
            let present: Vec<bool> = (0..3).map(|i| i < cameras).collect();
            let batch = [random_inputs(&config, 0, &present, tokens)];
            model.device().launches();
            // π0.5 was loaded for its own number of steps; for another it would first make other modulations.
            let steps = (kind == Kind::Pi0).then_some(steps);
            let options = SampleOptions { steps, ..Default::default() };
            model.sample_actions(&batch, &options).unwrap();
            let stats = model.device().stats();
            let launches = model.device().launches();
            assert!(launches.len() > 400);
            (launches, stats.launches, stats.barriers, stats.arena_bytes)
        };
        let seasoned = load();
        for case in cases {
            let (got, want) = (run(&seasoned, case), run(&load(), case));
            assert!(got == want, "{kind:?}, {case:?}");
        }
        let stats = seasoned.device().stats();
        assert!(stats.replayed >= 2, "{stats:?}");
    }
}
