//! `pi0 coverage`: what runs on the device, what on the host, and what moving it would give.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Result, anyhow, bail};
use pi0_cpu::{Cpu, CpuOptions};
use pi0_device::{Device, Reference};
use pi0_judge::coverage::{self, Plan};
use pi0_judge::host_ops;
use pi0_judge::results::{CoverageResults, Environment, Results, Workload};
use pi0_model::cases::random_inputs;
use pi0_model::{Config, synth};

use crate::commands::synth::Network;
use crate::device::{self, DeviceArgs, DeviceKind, Visitor};
use crate::output;
use crate::weights::WeightsArgs;

/// Trace a real inference: what ran on the device and on the host, and what to move next
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  pi0 coverage
  pi0 coverage pi0_base --device tensix --steps 1
  pi0 coverage --host-ops linear,concat --verify       # is the prediction true?")]
pub struct Args {
    /// Checkpoint to run [default: a random one of a million parameters]
    pub model: Option<PathBuf>,
    /// Without a checkpoint: which network the random one is
    #[arg(long, value_enum, default_value_t, conflicts_with = "model", value_name = "NETWORK")]
    pub kind: Network,
    /// Robots in the batch
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub batch: u16,
    /// Images of each robot
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=8))]
    pub cameras: u8,
    /// Tokens of each prompt [default: as many as fit]
    #[arg(long, value_name = "N")]
    pub tokens: Option<usize>,
    /// Denoising steps [default: the checkpoint's, usually 10]; of π0-FAST most tokens of an answer [30]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub steps: Option<u16>,
    /// Inferences to measure; the median is reported
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub runs: u16,
    /// Force operations to the host: kinds (linear, concat, …) or operations (rope, …)
    #[arg(long, value_name = "KIND", value_delimiter = ',')]
    pub host_ops: Vec<String>,
    /// Run again without the force and compare with the prediction
    #[arg(long, requires = "host_ops")]
    pub verify: bool,
    /// Also measure what the trace costs, against runs on the bare device
    #[arg(long, conflicts_with = "host_ops")]
    pub overhead: bool,
    /// Measure that for so long; large networks need more for a narrow interval
    #[arg(long, default_value_t = 20, requires = "overhead", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=3600))]
    pub overhead_seconds: u16,
    /// Write the results as JSON to this file (`-` for standard output)
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let results = results(args)?;
    match &args.json {
        Some(path) if path == Path::new("-") => {}
        _ => output::print(&coverage::table(&results))?,
    }
    match &args.json {
        Some(path) => output::write_json(path, &Results::Coverage(results)),
        None => Ok(()),
    }
}

/// Measures.
pub fn results(args: &Args) -> Result<CoverageResults> {
    let (name, checkpoint) = match &args.model {
        Some(path) => (path.display().to_string(), WeightsArgs::default().open(path, None)?),
        None => {
            let name = match args.kind {
                Network::Pi0 => "random, 1 million parameters",
                Network::Pi05 => "random π0.5, 1 million parameters",
                Network::Pi0Fast => "random π0-FAST, 1 million parameters",
            };
            (name.into(), synth::checkpoint(&Config::tiny().of_kind(args.kind.kind()), 5)?)
        }
    };
    let c = &checkpoint.config;
    let tokens = args.tokens.unwrap_or(c.max_tokens);
    if tokens > c.max_tokens {
        bail!("--tokens {tokens}: the model takes at most {}", c.max_tokens);
    }
    // A few dozen tokens are an answer; that of random weights never ends.
    let usual = if c.answer.is_some() { 30 } else { c.num_steps };
    let steps = args.steps.map_or(usual, usize::from);
    let cameras = vec![true; usize::from(args.cameras)];
    let batch = (0..u64::from(args.batch)).map(|i| random_inputs(c, i, &cameras, tokens)).collect();
    let forced = host_ops::parse_all(&args.host_ops)?;
    let detail = args.device.device.probe(&args.device).map_err(|why| anyhow!("{why}"))?;
    // What a device lacks runs on the CPU; what the CPU lacks (or is forced off it), on the reference.
    let host = match args.device.device {
        DeviceKind::Cpu | DeviceKind::Reference => "reference",
        _ => "cpu",
    };
    let workload = Workload {
        model: name,
        batch: args.batch.into(),
        cameras: args.cameras.into(),
        tokens,
        steps,
        runs: args.runs.into(),
        forced: forced.iter().map(|op| op.name().to_string()).collect(),
        host: host.into(),
    };
    let plan = Plan {
        checkpoint,
        batch,
        forced,
        verify: args.verify,
        overhead: args.overhead.then(|| Duration::from_secs(args.overhead_seconds.into())),
        workload,
        environment: Environment::here(args.device.device.name(), detail),
    };
    device::with_device(&args.device, Run(plan))
}

struct Run(Plan);

impl Visitor for Run {
    type Output = CoverageResults;

    fn visit<D: Device + 'static>(self, device: D) -> Result<CoverageResults> {
        let bar = device::progress_bars(&self.0.checkpoint);
        Ok(match self.0.workload.host.as_str() {
            "cpu" => self.0.run(&device, &Cpu::new(CpuOptions::default())?, &bar)?,
            _ => self.0.run(&device, &Reference, &bar)?,
        })
    }
}
