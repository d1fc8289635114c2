//! The host's work for a replayed inference of full size: how long it takes to write the tape again, to find that it is a
//! known one and to bring its uploads. Nothing is submitted, so no GPU is needed; the layers have their real widths.
//!
//!     cargo bench -p pi0-vulkan --bench host
//!
//! `--runs N` for another number than 1,000.

use std::time::{Duration, Instant};

use pi0_model::cases::random_inputs;
use pi0_model::{Config, Extent, Kind, Pi0, SampleOptions, patchify, synth};
use pi0_vulkan::paper::Chip;
use pi0_vulkan::{Vulkan, VulkanOptions};

fn main() {
    let args: Vec<String> = std::env::args().collect();
    let runs = args.iter().position(|a| a == "--runs").and_then(|i| args.get(i + 1));
    let runs = runs.map_or(1000, |n| n.parse().expect("--runs takes a number"));
    let chip = Chip::find("rtx-4090").expect("a known GPU");
    println!(
        "milliseconds: least, median and 99th hundredth of {runs} runs; two cameras, 48 tokens, ten steps"
    );
    println!("{:18} {:>24} {:>24} {:>24} {:>9}", "", "tape", "pictures into patches", "all", "launches");
    for kind in [Kind::Pi0, Kind::Pi05] {
        let config = Config::full().of_kind(kind);
        let device = Vulkan::plan(chip.info(), VulkanOptions::default()).expect("a plan needs no GPU");
        let weights = synth::outline(&config).expect("an outline of the full size");
        let model = Pi0::load(device, weights, Extent::Cache, &|_| ()).expect("an outline loads");
        let batch = [random_inputs(&config, 0, &[true, true], 48)];
        let options = SampleOptions::default();
        let run = || model.sample_actions(&batch, &options).expect("a plan runs");
        (0..5).for_each(|_| drop(run()));
        let recorded = model.device().stats().recorded;
        let mut times = [const { Vec::new() }; 3];
        for _ in 0..runs {
            let (before, start) = (model.device().stats().host, Instant::now());
            run();
            times[2].push(start.elapsed());
            times[0].push(model.device().stats().host - before);
            let (layout, start) =
                (pi0_model::layout::Layout::new(&config, &batch).expect("a layout"), Instant::now());
            std::hint::black_box(patchify(&batch, &layout, &config));
            times[1].push(start.elapsed());
        }
        let stats = model.device().stats();
        assert_eq!(stats.recorded, recorded, "every run replays");
        let [tape, patches, all] = times.map(|mut t: Vec<Duration>| {
            t.sort();
            let ms = |d: Duration| d.as_secs_f64() * 1e3;
            format!("{:7.3} {:7.3} {:7.3}", ms(t[0]), ms(t[t.len() / 2]), ms(t[t.len() * 99 / 100]))
        });
        println!("{:18} {tape:>24} {patches:>24} {all:>24} {:9}", format!("{kind:?}"), stats.launches);
    }
}
