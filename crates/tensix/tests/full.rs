//! π0 of its full widths on the simulator, one camera, against the CPU.

mod common;

use std::time::Instant;

use pi0_cpu::{Cpu, CpuOptions, Format};
use pi0_device::{Bound, Device, HostTensor, compare};
use pi0_model::cases::random_inputs;
use pi0_model::{Config, Extent, Pi0, SampleOptions, synth};

/// What a whole network must reach.
const ACTIONS: Bound = Bound { pcc: 0.99999, relative_l2: 0.005, max_abs: f64::INFINITY };
/// The same with weights as bfp8.
const BFP8: Bound = Bound { pcc: 0.999, relative_l2: 0.05, max_abs: f64::INFINITY };

fn actions<D: Device + 'static>(device: D, config: &Config) -> HostTensor {
    let model = Pi0::load(device, synth::checkpoint(config, 1).unwrap(), Extent::Cache, &|_| ()).unwrap();
    let batch = [random_inputs(config, 2, &[true, false, false], 12)];
    model.sample_actions(&batch, &SampleOptions::default()).unwrap().remove(0)
}

/// As many layers of each tower as `PI0_TENSIX_FULL` says, of 18 (the vision tower has half as many more); with all of
/// them it is the full network, and most of an hour or several, depending on the simulator.
#[test]
fn a_network_of_full_width_gives_one_chunk() {
    let Some(layers) = std::env::var_os("PI0_TENSIX_FULL") else {
        eprintln!("skipped: set PI0_TENSIX_FULL to a number of layers, such as 1");
        return;
    };
    let layers: usize =
        layers.to_str().and_then(|n| n.parse().ok()).filter(|n| (1..=18).contains(n)).unwrap();
    let Some(device) = common::open() else { return };
    let mut config = Config::full();
    (config.gemma.depth, config.expert.depth) = (layers, layers);
    config.vision.num_hidden_layers = layers + layers / 2;
    // The table stays on the host, and few of its rows are read.
    config.vocab_size = 2048;
    let start = Instant::now();
    let got = actions(device, &config);
    let seconds = start.elapsed().as_secs_f64();
    let cpu = Cpu::new(CpuOptions { format: Format::F32, ..CpuOptions::default() }).unwrap();
    let want = actions(cpu, &config);
    assert_eq!(got.shape, [50, 32]);
    let agreement = compare(&got.data, &want.data);
    println!("{layers} of 18 layers: one chunk after {seconds:.0} s, {agreement}");
    let bound = if common::bfp8() { BFP8 } else { ACTIONS };
    assert!(bound.holds(&agreement), "{agreement}");
}
