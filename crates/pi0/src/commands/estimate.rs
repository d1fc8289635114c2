//! `pi0 estimate`: what an inference takes on a device that is not here, on paper, and what bounds it.

use std::path::PathBuf;

use anyhow::{Result, anyhow, bail};
use clap::ValueEnum;
use pi0_cpu::Format;
use pi0_device::Device;
use pi0_model::cases::random_inputs;
use pi0_model::{Config, Extent, Pi0, SampleOptions, synth};
use pi0_tensix::perf::{self, Chip, Model, PUBLISHED, Workload};
use pi0_vulkan::paper::{Chip as Gpu, Line as Launches};
use pi0_vulkan::{Vulkan, VulkanOptions};
use serde_json::json;

use super::synth::Network;
use crate::device::Dtype;
use crate::output;

/// Estimate on paper what an inference takes on a device that is not here, and what bounds it
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  pi0 estimate --device tensix --chip n300\n  \
                  pi0 estimate --device tensix --model pi05 --cameras 3 --tokens 200 --steps 5\n  \
                  pi0 estimate --device vulkan --gpu rtx-4090 --dtype int8\n\n\
                  An estimate is arithmetic, not a measurement: optimistic is what a chip's documentation promises, \
                  realistic what others have measured of its parts.")]
pub struct Args {
    /// The device
    #[arg(long, value_enum)]
    device: Target,
    /// The network, at its full size
    #[arg(long, value_enum, default_value_t)]
    model: Network,
    /// Pictures that the robot's cameras deliver
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(0..=8))]
    cameras: u16,
    /// Tokens of the prompt
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    tokens: u16,
    /// Denoising steps; of π0-FAST the tokens of an answer
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
    steps: u16,
    /// Tensix: the card; of an n300 one of its two chips
    #[arg(long, value_enum, default_value_t)]
    chip: Card,
    /// Vulkan: the GPU, by its key or its maker's name: rtx-4090, rtx-5090, h100, agx-orin or rx-9070-xt
    #[arg(long, value_name = "NAME", required_if_eq("device", "vulkan"))]
    gpu: Option<String>,
    /// Number format of the weights. Vulkan: stored (the published models have bf16), f32, bf16 or int8; Tensix: stored,
    /// bf16 or bfp8
    #[arg(long, value_name = "FORMAT", default_value_t)]
    dtype: Dtype,
    /// Write the estimate as JSON to this file (`-` for standard output)
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A device that can be estimated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Target {
    /// Tenstorrent Wormhole
    Tensix,
    /// A GPU through Vulkan
    Vulkan,
}

/// A card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum Card {
    /// 72 cores
    #[default]
    N150,
    /// One of its two chips of 64 cores
    N300,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    match args.device {
        Target::Tensix => tensix(args),
        Target::Vulkan => vulkan(args),
    }
}

fn tensix(args: &Args) -> Result<()> {
    let chip = match args.chip {
        Card::N150 => Chip::N150,
        Card::N300 => Chip::N300,
    };
    let bfp8 = match args.dtype {
        Dtype::Bfp8 => true,
        Dtype::Of(Format::Stored | Format::Bf16) => false,
        Dtype::Of(other) => bail!("tensix has no weights in {other}; it has stored, bf16 and bfp8"),
    };
    let work = Workload {
        bfp8,
        model: match args.model {
            Network::Pi0 => Model::Pi0,
            Network::Pi05 => Model::Pi05,
            Network::Pi0Fast => {
                bail!("of π0-FAST on Tensix there is no estimate; of it on a GPU: --device vulkan")
            }
        },
        cameras: args.cameras.into(),
        tokens: args.tokens.into(),
        steps: args.steps.into(),
    };
    let e = perf::estimate(chip, &work);
    let (kernels, total) = (e.kernels(), e.total());
    if let Some(path) = &args.json {
        let line = |l: &perf::Line| {
            json!({
                "stage": l.stage, "kind": l.kind, "launches": l.launches, "bound": l.bound,
                "optimistic_ms": l.optimistic * 1e3, "realistic_ms": l.realistic * 1e3,
            })
        };
        let value = json!({
            "device": "tensix", "chip": chip.name(), "cores": chip.cores(),
            "cameras": args.cameras, "tokens": args.tokens, "steps": args.steps,
            "lines": e.lines.iter().map(line).collect::<Vec<_>>(),
            "launches": e.launch_count(),
            "launches_ms": e.launches.map(|s| s * 1e3),
            "kernels_ms": kernels.map(|s| s * 1e3),
            "total_ms": total.map(|s| s * 1e3),
        });
        return output::write_json(path, &value);
    }
    let ms = |s: f64| format!("{:.1}", s * 1e3);
    let mut rows: Vec<Vec<String>> = e
        .lines
        .iter()
        .map(|l| {
            let what = format!("{}, {}", l.stage, l.kind);
            vec![what, l.launches.to_string(), ms(l.optimistic), ms(l.realistic), l.bound.into()]
        })
        .collect();
    let sum = |what: &str, count: String, [low, high]: [f64; 2]| {
        vec![what.into(), count, ms(low), ms(high), String::new()]
    };
    rows.push(sum("kernels", e.launch_count().to_string(), kernels));
    rows.push(sum("launches", e.launch_count().to_string(), e.launches));
    rows.push(sum("sum", String::new(), total));
    let header = ["", "launches", "optimistic ms", "realistic ms", "bound by"].map(String::from);
    let published = PUBLISHED
        .iter()
        .map(|p| format!("  {:.0} ms: {} ({}; {})\n", p.milliseconds, p.what, p.accuracy, p.source));
    output::print(&format!(
        "{} on {} ({} cores): {} cameras, {} tokens, {} steps. On paper; nothing of this was measured on a card.\n\n\
         {}\nFloors: matrix units alone {} ms, every weight read once a use {} ms.\nMeasured by others:\n{}",
        args.model.kind().title(),
        chip.name(),
        chip.cores(),
        args.cameras,
        args.tokens,
        args.steps,
        output::table(&header, rows),
        ms(e.matrix),
        ms(e.weights),
        published.collect::<String>()
    ))
}

/// Writes the tape of an inference as the GPU would get it, without one, and prices its launches.
fn vulkan(args: &Args) -> Result<()> {
    let name = args.gpu.as_deref().unwrap_or_default();
    let Some(gpu) = Gpu::find(name) else {
        let known: Vec<_> = Gpu::ALL.iter().map(|g| g.key).collect();
        bail!(
            "the published rates of a GPU named {name:?} are not known here; known are {}",
            known.join(", ")
        );
    };
    let kind = args.model.kind();
    let config = Config::full().of_kind(kind);
    let format = args.dtype.to_string().parse().map_err(|e: String| anyhow!(e))?;
    let device = Vulkan::plan(gpu.info(), VulkanOptions { format, ..VulkanOptions::default() })?;
    let model = Pi0::load(device, synth::outline(&config)?, Extent::Cache, &|_| ())?;
    let bytes = || model.device().memory().map_or(0, |m| m.bytes());
    let weights = bytes();
    // What runs while the model loads is no part of an inference.
    model.device().launches();
    let batch = [random_inputs(&config, 0, &vec![true; args.cameras.into()], args.tokens.into())];
    let steps = Some(args.steps.into());
    model.sample_actions(&batch, &SampleOptions { steps, ..SampleOptions::default() })?;
    let (launches, all) = (model.device().launches(), bytes());
    let barriers = launches.iter().filter(|l| l.barrier).count();
    let e = gpu.estimate(&launches);
    let total = e.total();
    if let Some(path) = &args.json {
        let ms = |s: [f64; 3]| json!({ "floor": s[0] * 1e3, "good": s[1] * 1e3, "cautious": s[2] * 1e3 });
        let line = |l: &Launches| {
            json!({
                "stage": l.stage.name(), "kernel": l.kernel, "unit": l.unit.to_string(), "launches": l.launches,
                "flop": l.flop, "bytes": l.bytes, "ms": ms(l.seconds), "good_ms_bound_by_memory": l.by_bytes * 1e3,
            })
        };
        let each = |l: &pi0_vulkan::LaunchInfo| {
            json!({
                "stage": l.stage.name(), "kernel": l.kernel, "unit": l.unit.to_string(), "shape": l.shape,
                "flop": l.flop, "bytes": l.bytes, "workgroups": l.groups,
            })
        };
        let value = json!({
            "device": "vulkan", "gpu": gpu.name, "source": gpu.source, "model": kind.name(),
            "cameras": args.cameras, "tokens": args.tokens, "steps": args.steps,
            "launches": launches.len(), "barriers": barriers,
            "weight_bytes": weights, "memory_bytes": all,
            "lines": e.lines.iter().map(line).collect::<Vec<_>>(),
            "starts_ms": ms(e.starts), "total_ms": ms(total),
            "dispatches": launches.iter().map(each).collect::<Vec<_>>(),
        });
        return output::write_json(path, &value);
    }
    let ms = |s: f64| format!("{:.2}", s * 1e3);
    let mut rows: Vec<Vec<String>> = e
        .lines
        .iter()
        .map(|l| {
            let mut row = vec![
                format!("{}, {} in {}", l.stage.name(), l.kernel, l.unit),
                l.launches.to_string(),
                format!("{:.1}", l.flop as f64 / 1e9),
                format!("{:.1}", l.bytes as f64 / 1e6),
            ];
            row.extend(l.seconds.map(ms));
            row.push(format!("{:.0}%", 100.0 * l.by_bytes / l.seconds[1].max(1e-12)));
            row
        })
        .collect();
    let sum = |what: &str, count: usize, seconds: [f64; 3]| {
        let mut row = vec![what.to_string(), count.to_string(), String::new(), String::new()];
        row.extend(seconds.map(ms));
        row.push(String::new());
        row
    };
    rows.push(sum("starting the launches", launches.len(), e.starts));
    rows.push(sum("sum", launches.len(), total));
    let header = ["", "launches", "GFLOP", "MB", "floor ms", "good ms", "cautious ms", "bound by memory"];
    output::print(&format!(
        "{} on the {}: {} cameras, {} tokens, {} steps. An estimate from published rates; nothing of this was measured.\n\n\
         {}\n{}",
        kind.title(),
        gpu.name,
        args.cameras,
        args.tokens,
        args.steps,
        output::table(&header.map(String::from), rows),
        assumptions(&gpu, barriers, [weights, all]),
    ))
}

/// What the numbers rest on.
fn assumptions(gpu: &Gpu, barriers: usize, [weights, all]: [u64; 2]) -> String {
    let percent = |[low, high]: [f64; 2]| format!("{:.0} to {:.0} %", 100.0 * low, 100.0 * high);
    format!(
        "Published ({}): {} TFLOP/s of matrices, {} TOP/s in int8, {} TFLOP/s in f32, {} GB/s, {} GB.\n\
         These rates were read on pages that quote their maker, not in the original; a test holds them against processors,\n\
         clocks and the memory's bus.\n\
         Device memory: {} of weights and {} in all ({:.1} % more); {barriers} barriers.\n\
         Assumed: a launch takes the longer of its products and its bytes, each operand moved once between memory and\n\
         processors; cautious to good reach {} of the matrices' rate (what others report of Vulkan kernels), {} of the\n\
         bandwidth and {} of the f32 rate, and a launch costs {} to {} µs. Too few workgroups leave processors idle. What\n\
         tiles read again from caches is not counted, and no tile size was tuned on a GPU.\n",
        gpu.source,
        gpu.matrix,
        gpu.int8,
        gpu.f32,
        gpu.bandwidth,
        gpu.memory,
        output::size(weights),
        output::size(all),
        100.0 * (all as f64 - weights as f64) / weights.max(1) as f64,
        percent(gpu.share),
        percent(pi0_vulkan::paper::BANDWIDTH_SHARE),
        percent(pi0_vulkan::paper::F32_SHARE),
        gpu.launch[1],
        gpu.launch[0],
    )
}
