//! `pi0 bench`: how fast this machine runs π0, checked before it is timed.

mod audit;
pub mod launches;
mod limits;
mod measure;
mod process;
pub mod report;
mod verify;

use std::collections::BTreeMap;
use std::io::Write as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use pi0_device::{Device, Fallback, HostTensor, Reference, Traced};
use pi0_model::cases::Format;
use pi0_model::golden::{read_inputs, write_tensors};
use pi0_model::{Checkpoint, Config, Extent, Inputs, Kind, SampleOptions};
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use audit::Audited;
use limits::Limits;
use measure::{Timed, fastest_read, tables};
use process::MemoryWatch;
use report::{Answer, Report, Shape};
use verify::{Model, Subject, flat, same, verify};

use super::check::default_format;
use super::synth::{self, Network, Size};
use crate::device::{self, DeviceArgs, DeviceKind, Visitor};
use crate::output;
use crate::weights::WeightsArgs;

/// Measure loading and inference, after checking the result: time, work, bytes and memory, stage by stage
#[derive(clap::Args)]
#[command(after_help = "Examples:
  pi0 bench models/tiny
  pi0 bench --synth full --dtype bf16 --cameras 2 --tokens 12 --json result.json
  pi0 bench --synth full --kind pi05 --cameras 3 --tokens 80 --steps 5
  pi0 bench --synth full --kind pi0-fast --cameras 3 --tokens 80 --steps 40 --dtype bf16
  pi0 bench pi0_base --inputs run.inputs.safetensors --golden actions.safetensors")]
pub struct Args {
    /// Checkpoint: a folder of lerobot's or of openpi's, JAX (with `params`) or PyTorch
    #[arg(required_unless_present = "synth", conflicts_with = "synth")]
    model: Option<PathBuf>,
    /// Use a random checkpoint of this size, made on first use and kept in the user's cache folder; full takes 7 GB
    #[arg(long, value_enum, value_name = "SIZE")]
    synth: Option<Size>,
    /// Which network the random checkpoint is
    #[arg(long, value_enum, value_name = "NETWORK", requires = "synth", default_value_t)]
    kind: Network,
    /// Cameras that each robot has
    #[arg(long, value_name = "N", default_value_t = 3, value_parser = clap::value_parser!(u8).range(1..=8))]
    cameras: u8,
    /// Prompt tokens of each robot
    #[arg(long, value_name = "N", default_value_t = 20)]
    tokens: usize,
    /// Robots in one inference
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    batch: u16,
    /// Read the inputs from this file instead of drawing them; named as in the golden data
    #[arg(long, value_name = "FILE", conflicts_with_all = ["cameras", "tokens", "batch"])]
    inputs: Option<PathBuf>,
    /// Check against the tensor `actions` of this file instead of computing a reference
    #[arg(long, value_name = "FILE")]
    golden: Option<PathBuf>,
    /// Write the tensor `actions` here
    #[arg(long, value_name = "FILE")]
    output: Option<PathBuf>,
    /// Denoising steps [default: the checkpoint's, usually 10]; of π0-FAST most tokens of an answer [256]
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// π0-FAST: guess up to N tokens from earlier answers. Here these are the same inference's, so that all guesses are
    /// right: what is measured is passes of 1 + N rows, and that they say the same
    #[arg(long, value_name = "N", default_value_t = 0, value_parser = clap::value_parser!(u8).range(0..=7))]
    speculate: u8,
    /// Timed inferences
    #[arg(long, value_name = "N", default_value_t = 5, value_parser = clap::value_parser!(u16).range(1..=10_000))]
    repeat: u16,
    /// Time one inference for each line read from standard input, answering with its seconds, to alternate with other
    /// programs; `--repeat` is ignored
    #[arg(long)]
    on_demand: bool,
    /// Write everything as JSON to this file (`-` for standard output, instead of the tables)
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(flatten)]
    weights: WeightsArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let making = Instant::now();
    let dir = match (&args.model, args.synth) {
        (Some(dir), _) => dir.clone(),
        (None, Some(size)) => cached(size, args.kind.kind())?,
        (None, None) => bail!("name a checkpoint or --synth"),
    };
    let making = making.elapsed();
    let mut checkpoint = args.weights.open(&dir, None)?;
    match &mut checkpoint.config.answer {
        Some(answer) => answer.speculate = usize::from(args.speculate),
        None if args.speculate > 0 => bail!("--speculate: only π0-FAST writes tokens"),
        None => {}
    }
    let batch = match &args.inputs {
        Some(path) => read_inputs(path)?,
        None => (0..args.batch).map(|i| robot(&checkpoint.config, args, u64::from(i))).collect(),
    };
    let bench = Bench { args, dir: &dir, checkpoint, batch: &batch, making };
    let options = SampleOptions { steps: args.steps, seed: 0 };
    let again = bench.checkpoint.clone();
    let (mut report, actions) = device::with_device(&args.device, bench)?;
    if let DeviceKind::Vulkan(index) = args.device.device {
        let repeat = usize::from(args.repeat);
        report.launches = Some(launches::measure(&args.device, index, &again, &batch, &options, repeat)?);
    }
    if let Some(path) = &args.output {
        // Answers of π0-FAST need not be of one length.
        let cols = actions.iter().map(HostTensor::cols).max().unwrap_or(0);
        let rows = actions.iter().map(HostTensor::rows).max().unwrap_or(0);
        let mut all = HostTensor::zeros([actions.len(), rows, cols]);
        for (i, one) in actions.iter().enumerate() {
            (0..one.rows()).for_each(|r| all.row_mut(i * rows + r)[..one.cols()].copy_from_slice(one.row(r)));
        }
        let actions = all;
        write_tensors(path, &BTreeMap::from([("actions".to_string(), actions)]))?;
    }
    match &args.json {
        Some(path) if path == Path::new("-") => output::write_json(path, &report),
        Some(path) => {
            output::write_json(path, &report)?;
            output::print(&report.text())
        }
        None => output::print(&report.text()),
    }
}

/// The random checkpoint of `size` in the user's cache, made if it is not there.
fn cached(size: Size, kind: Kind) -> Result<PathBuf> {
    let var = |name| std::env::var_os(name).filter(|v| !v.is_empty()).map(PathBuf::from);
    let cache = var("XDG_CACHE_HOME").or_else(|| Some(var("HOME")?.join(".cache")));
    let cache = cache.context("neither XDG_CACHE_HOME nor HOME says where to keep the random checkpoint")?;
    let network = if kind == Kind::Pi0 { String::new() } else { format!("{}-", kind.name()) };
    let dir = cache.join("pi0").join(format!("synth-{network}{}-seed-0", size.name()));
    if !dir.exists() {
        // Made aside and renamed, so that an interruption leaves no half checkpoint under the final name.
        let aside = dir.with_extension(format!("partial-{}", std::process::id()));
        eprintln!("making a random checkpoint in {}", dir.display());
        let done = synth::make(&aside, size, kind, 0).and_then(|_| {
            std::fs::rename(&aside, &dir).with_context(|| format!("cannot make {}", dir.display()))
        });
        if done.is_err() {
            let _ = std::fs::remove_dir_all(&aside);
        }
        done?;
    }
    Ok(dir)
}

/// Random inputs of one robot.
fn robot(c: &Config, args: &Args, seed: u64) -> Inputs {
    let mut rng = ChaCha12Rng::seed_from_u64(seed);
    // Uniform in [-1, 1].
    let mut draw = |n: usize| (0..n).map(|_| rng.next_u32() as f32 / 2f32.powi(31) - 1.0).collect::<Vec<_>>();
    let images = (0..args.cameras).map(|_| Some(draw(3 * c.vision.image_size.pow(2)))).collect();
    let state = draw(c.state_dim);
    let tokens = (0..args.tokens).map(|_| rng.next_u32() % c.vocab_size as u32).collect();
    Inputs { images, tokens, state, ..Inputs::default() }
}

/// Everything known before the device is open.
struct Bench<'a> {
    args: &'a Args,
    dir: &'a Path,
    checkpoint: Checkpoint,
    batch: &'a [Inputs],
    /// Time spent making the checkpoint, which is no part of the first action.
    making: Duration,
}

impl Visitor for Bench<'_> {
    type Output = (Report, Vec<HostTensor>);

    fn visit<D: Device + 'static>(self, device: D) -> Result<Self::Output> {
        let Self { args, checkpoint, batch, .. } = &self;
        let options = SampleOptions { steps: args.steps, seed: 0 };
        let format = default_format(&args.device, Some(checkpoint));

        let watch = MemoryWatch::start();
        let start = Instant::now();
        let traced = Traced::new(Audited::new(device), Reference, Fallback::Fail);
        let model: Model<D> = device::pack(traced, checkpoint.clone(), Extent::Cache)?;
        let load = start.elapsed();
        let memory_loading = watch.take_peak();
        let first = timed(&model, batch, &options)?;
        let first_action = process::age().map(|age| age.saturating_sub(self.making).as_secs_f64());
        let memory_running = watch.take_peak();
        drop(watch);

        let (first, actions) = first;
        let subject = Subject {
            checkpoint,
            batch,
            options: &options,
            format,
            golden: args.golden.as_deref(),
            actions: &actions,
            flop: first.records.iter().map(|r| r.flop()).sum(),
        };
        let verdict = verify(&model, &subject)?;
        let before = Limits::measure(&args.device)?;
        let mut runs = Vec::new();
        let mut next = || -> Result<Duration> {
            let (run, again) = timed(&model, batch, &options)?;
            same(&flat(&again), &flat(&actions))?;
            let wall = run.wall;
            runs.push(run);
            Ok(wall)
        };
        if args.on_demand {
            on_demand(next)?;
        } else {
            (0..args.repeat).try_for_each(|_| next().map(|_| ()))?;
        }
        if runs.is_empty() {
            bail!("standard input asked for no inference");
        }
        let mut tables = tables(&runs, weight_bytes(format));
        // Clocks and neighbours change meanwhile: the machine can do what it did at any time, and what any operation did.
        let after = Limits::measure(&args.device)?;
        let did = (tables.fastest(), fastest_read(&runs, weight_bytes(format)));
        let limits = before.zip(after).map(|(before, after)| before.or_more(&after, format, did));
        tables.measure_by(limits.as_ref().and_then(|l| l.of(format)));
        let memory = limits.as_ref().map(|l| l.memory);
        let answer = Answer::of(&checkpoint.config, &actions, &runs, weight_bytes(format), memory);
        let report = Report {
            model: self.dir.display().to_string(),
            processor: process::processor(),
            device: args.device.device.probe(&args.device).unwrap_or_else(|e| e),
            inputs: Shape::of(batch, &checkpoint.config, options.steps),
            answer,
            verdict,
            first_action,
            load: load.as_secs_f64(),
            first_inference: first.wall.as_secs_f64(),
            memory_loading,
            memory_running,
            limits,
            repeat: runs.len(),
            launches: None,
            tables,
        };
        Ok((report, actions))
    }
}

/// Runs `next` for each line of standard input. The answer `ready` says that loading and checking are over.
fn on_demand(mut next: impl FnMut() -> Result<Duration>) -> Result<()> {
    let mut out = std::io::stdout().lock();
    writeln!(out, "ready").and_then(|()| out.flush()).context("cannot answer")?;
    for line in std::io::stdin().lines() {
        line.context("cannot read standard input")?;
        let seconds = next()?.as_secs_f64();
        writeln!(out, "{seconds:.6}").and_then(|()| out.flush()).context("cannot answer")?;
    }
    Ok(())
}

/// One inference and its records.
fn timed<D: Device>(
    model: &Model<D>,
    batch: &[Inputs],
    options: &SampleOptions,
) -> Result<(Timed, Vec<HostTensor>)> {
    let start = Instant::now();
    let actions = model.sample_actions(batch, options)?;
    Ok((Timed { wall: start.elapsed(), records: model.device().take() }, actions))
}

/// Bytes of one packed weight.
fn weight_bytes(format: Format) -> usize {
    match format {
        Format::F32 => 4,
        Format::Bf16 | Format::Tf32 => 2,
        Format::Int8 | Format::Bfp8 => 1,
    }
}
