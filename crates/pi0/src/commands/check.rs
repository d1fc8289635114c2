//! `pi0 check`: is each module right on this device?

use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;
use pi0_cpu::{Cpu, CpuOptions};
use pi0_device::{Device, Dtype, Reference};
use pi0_judge::check::{self, Plan};
use pi0_judge::dump::{self, Dump};
use pi0_judge::host_ops;
use pi0_judge::results::{CheckResults, Environment, Results};
use pi0_model::Checkpoint;
use pi0_model::cases::Format;

use crate::device::{self, DeviceArgs, DeviceKind, Visitor};
use crate::output;
use crate::weights::WeightsArgs;

/// Run every module alone on a device and on the reference, compare, and say which one is at fault
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  pi0 check                                            # small random networks, in seconds
  pi0 check --mode standard --module gemma.expert
  pi0 check pi0_base --judge cpu --mode full           # a checkpoint's own weights
  pi0 check golden/b --against golden/b/mixed_masks_b2.outputs.safetensors --dtype f32
  pi0 check pi0_base --against dump.safetensors --html judgement.html    # is another implementation right?

The exit code is 0 only if everything passed.")]
pub struct Args {
    /// Checkpoint whose weights are used [default: small random networks]
    pub model: Option<PathBuf>,
    /// Only these modules, or those below a name such as gemma or gemma.expert
    #[arg(long = "module", value_name = "NAME", value_delimiter = ',')]
    pub modules: Vec<String>,
    /// List the modules and what they are made of
    #[arg(long)]
    pub list: bool,
    /// How much: seconds, a minute, or everything
    #[arg(long, value_enum, default_value_t)]
    pub mode: Mode,
    /// Also compare every intermediate with this golden file (NAME.outputs.safetensors, with NAME.inputs.safetensors
    /// beside it). Given the dump of another implementation (docs/python.md), judge that instead: compare it with the
    /// CPU device in f32, and say which known mistakes explain the differences
    #[arg(long, value_name = "FILE", requires = "model")]
    pub against: Option<PathBuf>,
    /// Write the judgement of a dump as one self-contained HTML page
    #[arg(long, value_name = "FILE", requires = "against")]
    pub html: Option<PathBuf>,
    /// Force operations to the host: kinds (linear, concat, …) or operations (rope, …)
    #[arg(long, value_name = "KIND", value_delimiter = ',')]
    pub host_ops: Vec<String>,
    /// Fail where the device lacks an operation instead of running it on the host
    #[arg(long)]
    pub strict: bool,
    /// Number format that the thresholds are for: f32, bf16, int8 or tf32 [default: the device's]
    #[arg(long, value_name = "FORMAT")]
    pub thresholds: Option<Format>,
    /// Who is right: plain loops in f64, or the CPU device in f32 where that takes too long
    #[arg(long, value_enum, default_value_t)]
    pub judge: Judge,
    /// Write the results as JSON to this file (`-` for standard output)
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// How much to check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Mode {
    /// Two networks of odd sizes; of a large checkpoint, the first layers
    #[default]
    Quick,
    /// Also one whose sizes are whole tiles; of a large checkpoint, first, middle and last layers
    Standard,
    /// Also 256 patches an image and ten steps; of a checkpoint, everything
    Full,
}

impl From<Mode> for check::Mode {
    fn from(mode: Mode) -> Self {
        match mode {
            Mode::Quick => Self::Quick,
            Mode::Standard => Self::Standard,
            Mode::Full => Self::Full,
        }
    }
}

/// Who is right.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum Judge {
    /// The scalar reference
    #[default]
    Reference,
    /// The CPU device in f32
    Cpu,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    if args.list {
        return output::print(&check::list());
    }
    if let (Some(model), Some(path)) = (&args.model, &args.against) {
        if dump::is_dump(path)? {
            return judge(args, model, path);
        }
        if args.html.is_some() {
            bail!(
                "--html draws the judgement of a dump, and {} is golden data; see pi0 report",
                path.display()
            );
        }
    }
    let results = results(args)?;
    match &args.json {
        Some(path) if path == Path::new("-") => {}
        _ => output::print(&check::table(&results))?,
    }
    let failure = check::failure(&results);
    if let Some(path) = &args.json {
        output::write_json(path, &Results::Check(results))?;
    }
    failure.map_or(Ok(()), |why| Err(anyhow!(why)))
}

/// Judges the dump of another implementation.
fn judge(args: &Args, model: &Path, path: &Path) -> Result<()> {
    let checkpoint = Checkpoint::open(model)?;
    let dump = Dump::read(path)?;
    let bars = device::progress_bars(&checkpoint);
    let verdict = dump::judge(exact_cpu()?, &checkpoint, &dump, args.thresholds, &bars)?;
    if args.json.as_deref() != Some(Path::new("-")) {
        output::print(&verdict.text())?;
    }
    if let Some(path) = &args.json {
        output::write_json(path, &verdict)?;
    }
    if let Some(path) = &args.html {
        let page = pi0_judge::report::judgement(&verdict);
        std::fs::write(path, page).with_context(|| format!("cannot write {}", path.display()))?;
    }
    verdict.failure().map_or(Ok(()), |why| Err(anyhow!(why)))
}

/// The CPU device in f32.
fn exact_cpu() -> Result<Cpu> {
    Ok(Cpu::new(CpuOptions::exact())?)
}

/// Does the checks.
pub fn results(args: &Args) -> Result<CheckResults> {
    let mode = check::Mode::from(args.mode);
    let checkpoint = args.model.as_deref().map(|dir| WeightsArgs::default().open(dir, None)).transpose()?;
    let selection = check::select(&args.modules, checkpoint.as_ref(), mode)?;
    if selection.shallow {
        eprintln!("the checkpoint is large: towers and the whole network are checked with --mode full");
    }
    let format = args.thresholds.unwrap_or_else(|| default_format(&args.device, checkpoint.as_ref()));
    let setups = mode.setups(checkpoint.as_ref())?;
    let forced = host_ops::parse_all(&args.host_ops)?;
    let detail = args.device.device.probe(&args.device).map_err(|why| anyhow!("{why}"))?;
    let plan = Plan {
        modules: selection.modules,
        setups,
        format,
        forced,
        strict: args.strict,
        against: args.against.clone().zip(checkpoint),
        mode,
        model: args.model.as_ref().map(|p| p.display().to_string()),
        environment: Environment::here(args.device.device.name(), detail),
    };
    device::with_device(&args.device, Run { plan, judge: args.judge })
}

/// Where this device rounds, unless told otherwise.
pub fn default_format(args: &DeviceArgs, checkpoint: Option<&Checkpoint>) -> Format {
    match args.device {
        DeviceKind::Reference => Format::F32,
        // A GPU's matrices round operands to bf16 or, less, to f16.
        DeviceKind::Cpu | DeviceKind::Vulkan(_) => match args.dtype.of_host() {
            pi0_cpu::Format::F32 => Format::F32,
            pi0_cpu::Format::Bf16 => Format::Bf16,
            pi0_cpu::Format::Int8 => Format::Int8,
            pi0_cpu::Format::Stored => {
                // The random networks are stored in bf16.
                let bf16 = checkpoint.is_none_or(|c| c.bytes_by_dtype().contains_key(&Dtype::Bf16));
                if bf16 { Format::Bf16 } else { Format::F32 }
            }
        },
        DeviceKind::Tensix if args.dtype == device::Dtype::Bfp8 => Format::Bfp8,
        DeviceKind::Tensix => Format::Tf32,
    }
}

struct Run {
    plan: Plan,
    judge: Judge,
}

impl Visitor for Run {
    type Output = CheckResults;

    fn visit<D: Device + 'static>(self, device: D) -> Result<CheckResults> {
        Ok(match self.judge {
            Judge::Reference => self.plan.run(device, &Reference)?,
            Judge::Cpu => self.plan.run(device, &exact_cpu()?)?,
        })
    }
}
