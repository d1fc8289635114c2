//! `pi0 check`: is each module right on this device?

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use clap::ValueEnum;
use pi0_cpu::{Cpu, CpuOptions};
use pi0_device::{Device, Dtype, Fallback, OpKind, Reference, Tapped, Traced};
use pi0_model::cases::check::{Checked, Comparison, check, compare_taps, culprits};
use pi0_model::cases::{Format, LayerChoice, Module, Setup, bound};
use pi0_model::golden::{self, golden_taps, read_inputs, read_tensors};
use pi0_model::{Checkpoint, Extent, Pi0, SampleOptions};

use crate::device::{self, DeviceArgs, DeviceKind, Visitor};
use crate::results::{CheckResults, Environment, Line, ModuleResult, Results};
use crate::{host_ops, output};

/// Above this, judging a whole tower with plain loops takes minutes.
const LARGE: u64 = 100_000_000;

/// Rounding of the references that made the golden data, which counts beside the device's.
const GOLDEN_ROUNDING: f64 = 1e-5;

/// Run every module alone on a device and on the reference, compare, and say which one is at fault
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  pi0 check                                            # small random networks, in seconds
  pi0 check --mode standard --module gemma.expert
  pi0 check pi0_base --judge cpu --mode full           # a checkpoint's own weights
  pi0 check golden/b --against golden/b/mixed_masks_b2.outputs.safetensors --dtype f32

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
    /// beside it)
    #[arg(long, value_name = "FILE", requires = "model")]
    pub against: Option<PathBuf>,
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
        return output::print(&list());
    }
    let results = results(args)?;
    match &args.json {
        Some(path) if path == Path::new("-") => {}
        _ => output::print(&table(&results))?,
    }
    if let Some(path) = &args.json {
        output::write_json(path, &Results::Check(results.clone()))?;
    }
    verdict(&results)
}

/// An error that names what failed, if anything did.
fn verdict(results: &CheckResults) -> Result<()> {
    if results.passed {
        return Ok(());
    }
    let failed: BTreeSet<_> = results.modules.iter().filter(|m| !m.passed).map(|m| &m.module).collect();
    let golden = results.golden.iter().filter(|l| !l.passed).count();
    let taps = results.taps.iter().filter(|l| !l.passed).count();
    bail!(
        "{} modules, {taps} intermediates and {golden} golden tensors failed; at fault: {}",
        failed.len(),
        if results.culprits.is_empty() { "see above".into() } else { results.culprits.join(", ") }
    )
}

/// Does the checks.
pub fn results(args: &Args) -> Result<CheckResults> {
    let checkpoint = args.model.as_deref().map(Checkpoint::open).transpose()?;
    let mut modules = match args.modules.as_slice() {
        [] => Module::all(),
        names => named(names)?,
    };
    let large = checkpoint.as_ref().is_some_and(|c| c.parameters() > LARGE);
    if large && args.mode != Mode::Full && args.modules.is_empty() {
        modules.retain(|m| !m.is_deep());
        eprintln!("the checkpoint is large: towers and the whole network are checked with --mode full");
    }
    let format = args.thresholds.unwrap_or_else(|| default_format(&args.device, checkpoint.as_ref()));
    let setups = match (&checkpoint, args.mode) {
        (Some(c), mode) => {
            let layers = match mode {
                Mode::Full => LayerChoice::All,
                Mode::Standard => LayerChoice::Some,
                Mode::Quick => LayerChoice::First,
            };
            vec![Setup::of_checkpoint(c.clone(), layers)]
        }
        (None, Mode::Quick) => Setup::small()?,
        (None, Mode::Standard) => Setup::standard()?,
        (None, Mode::Full) => Setup::full()?,
    };
    let forced = args.host_ops.iter().map(|s| host_ops::parse(s).map_err(|e| anyhow!("--host-ops: {e}")));
    let forced = forced.collect::<Result<Vec<_>>>()?.concat();
    let detail = args.device.device.probe(&args.device).map_err(|why| anyhow!("{why}"))?;
    let environment = Environment::here(args.device.device.name(), detail);
    let run = Run { args, modules, setups, format, forced, environment, checkpoint };
    device::with_device(&args.device, run)
}

fn named(names: &[String]) -> Result<Vec<Module>> {
    let mut picked = Vec::new();
    for name in names {
        let found = Module::named(name);
        if found.is_empty() {
            bail!("--module {name}: there is no such module; see pi0 check --list");
        }
        picked.extend(found);
    }
    // In the order that parts come before what is made of them.
    Ok(Module::all().into_iter().filter(|m| picked.contains(m)).collect())
}

/// Where this device rounds, unless told otherwise.
pub fn default_format(args: &DeviceArgs, checkpoint: Option<&Checkpoint>) -> Format {
    match args.device {
        DeviceKind::Reference => Format::F32,
        DeviceKind::Cpu => match args.dtype {
            pi0_cpu::Format::F32 => Format::F32,
            pi0_cpu::Format::Bf16 => Format::Bf16,
            pi0_cpu::Format::Int8 => Format::Int8,
            pi0_cpu::Format::Stored => {
                // The random networks are stored in bf16.
                let bf16 = checkpoint.is_none_or(|c| c.bytes_by_dtype().contains_key(&Dtype::Bf16));
                if bf16 { Format::Bf16 } else { Format::F32 }
            }
        },
        DeviceKind::Tensix => Format::Tf32,
    }
}

struct Run<'a> {
    args: &'a Args,
    modules: Vec<Module>,
    setups: Vec<Setup>,
    format: Format,
    forced: Vec<OpKind>,
    environment: Environment,
    checkpoint: Option<Checkpoint>,
}

impl Visitor for Run<'_> {
    type Output = CheckResults;

    fn visit<D: Device + 'static>(self, device: D) -> Result<CheckResults> {
        match self.args.judge {
            Judge::Reference => self.judged(device, &Reference),
            Judge::Cpu => {
                let options = CpuOptions { format: pi0_cpu::Format::F32, ..CpuOptions::default() };
                self.judged(device, &Cpu::new(options)?)
            }
        }
    }
}

impl Run<'_> {
    fn judged<D: Device, J: Device>(self, device: D, judge: &J) -> Result<CheckResults> {
        let fallback = if self.args.strict { Fallback::Fail } else { Fallback::RunOnHost };
        let traced = Traced::new(device, Reference, fallback).force_to_host(self.forced.clone());
        let mut modules = Vec::new();
        let mut taps = Vec::new();
        let mut checked: Vec<Checked> = Vec::new();
        for setup in &self.setups {
            for &module in &self.modules {
                let done = check(&traced, judge, module, setup, self.format);
                let host: BTreeSet<_> =
                    traced.take().iter().filter(|r| r.on_host()).map(|r| r.op.name().to_string()).collect();
                modules.push(ModuleResult::new(&done, host.into_iter().collect()));
                checked.push(done);
            }
            if self.modules.contains(&Module::Pi0) {
                let lines = compare_taps(&traced, judge, Module::Pi0, setup, self.format)?;
                taps.extend(
                    lines
                        .iter()
                        .map(|c| Line { name: format!("{}: {}", setup.name, c.name), ..Line::new(c) }),
                );
                traced.take();
            }
        }
        let golden = match (&self.args.against, &self.checkpoint) {
            (Some(path), Some(checkpoint)) => against(&traced, path, checkpoint, self.format)?,
            _ => vec![],
        };
        let all = |lines: &[Line]| lines.iter().all(|l| l.passed);
        Ok(CheckResults {
            passed: modules.iter().all(|m| m.passed) && all(&taps) && all(&golden),
            environment: self.environment,
            mode: self.args.mode.to_possible_value().map_or(String::new(), |v| v.get_name().into()),
            model: self.args.model.as_ref().map(|p| p.display().to_string()),
            format: self.format.to_string(),
            culprits: culprits(&checked).into_iter().map(|m| m.name().into()).collect(),
            modules,
            taps,
            golden,
        })
    }
}

/// Every tensor of a golden file against the whole network on `device`.
fn against<D: Device>(device: &D, path: &Path, checkpoint: &Checkpoint, format: Format) -> Result<Vec<Line>> {
    let name = path.to_string_lossy();
    let inputs = name.strip_suffix(".outputs.safetensors").map(|stem| format!("{stem}.inputs.safetensors"));
    let inputs =
        inputs.with_context(|| format!("--against {name}: wanted a file NAME.outputs.safetensors"))?;
    let batch = read_inputs(Path::new(&inputs))?;
    let want = read_tensors(path)?;
    let model = Pi0::load(Tapped::new(device), checkpoint.clone(), Extent::Whole, &|_| ())?;
    let chunks = model.sample_actions(&batch, &SampleOptions::default())?;
    let c = model.config();
    let times = c.schedule.times(c.num_steps);
    let mut got = golden_taps(model.device().take()?, &batch, c, &times, c.max_tokens)?;
    let shape = [chunks.len(), c.horizon, c.action_dim];
    let actions = chunks.into_iter().flat_map(|a| a.data).collect();
    got.insert("actions".into(), pi0_device::HostTensor::new(shape, actions));
    let line = |(name, result): (String, Result<pi0_device::Agreement, String>)| {
        let mut bound = bound(Module::Pi0, format, c, &want[&name].data);
        let most = bound.relative_l2.max(GOLDEN_ROUNDING);
        bound.max_abs *= most / bound.relative_l2;
        bound.relative_l2 = most;
        Line::new(&Comparison { name, agreement: result, bound })
    };
    // A camera that no robot of the batch has was never computed.
    let compared = golden::compare_taps(&got, &want, &batch);
    Ok(compared.into_iter().filter(|(_, r)| !r.as_ref().is_ok_and(|a| a.count == 0)).map(line).collect())
}

fn list() -> String {
    let row = |m: Module| {
        let parts: Vec<_> = m.parts().into_iter().map(Module::name).collect();
        vec![m.name().to_string(), parts.join(", ")]
    };
    let width = Module::all().iter().map(|m| m.name().len()).max().unwrap_or(0);
    let line = |row: Vec<String>| format!("{:width$}  {}\n", row[0], row[1]).trim_end().to_string() + "\n";
    Module::all().into_iter().map(|m| line(row(m))).collect()
}

/// One line a module: the worst of its rounds.
fn table(results: &CheckResults) -> String {
    let header = ["module", "pcc", "relative L2", "max abs", "at", "threshold", "", "time", "on host"];
    let mut names: Vec<&str> = Vec::new();
    for m in &results.modules {
        if !names.contains(&m.module.as_str()) {
            names.push(&m.module);
        }
    }
    let mut text = output::table(&header.map(String::from), names.iter().map(|name| row(results, name)));
    let seconds: f64 = results.modules.iter().map(|m| m.seconds + m.judge_seconds).sum();
    for m in results.modules.iter().filter(|m| !m.passed) {
        let why =
            m.error.clone().or_else(|| m.first_tap.as_ref().map(|t| format!("first tap out of bounds: {t}")));
        text += &format!("{} ({}) failed; {}\n", m.module, m.setup, why.unwrap_or_default());
    }
    for (what, lines) in
        [("intermediates of the whole network", &results.taps), ("golden tensors", &results.golden)]
    {
        if lines.is_empty() {
            continue;
        }
        let failed: Vec<_> = lines.iter().filter(|l| !l.passed).collect();
        let worst = lines.iter().filter_map(|l| l.relative_l2).fold(0.0, f64::max);
        text += &format!(
            "{what}: {} of {} pass, worst relative L2 {worst:.1e}",
            lines.len() - failed.len(),
            lines.len()
        );
        if let Some(first) = failed.first() {
            let error = first.error.as_ref().map_or(String::new(), |e| format!(" ({e})"));
            text += &format!(", first to fail {}{error}", first.name);
        }
        text.push('\n');
    }
    let e = &results.environment;
    text + &format!("{} ({}), thresholds for {}, {seconds:.1} s\n", e.device, e.device_detail, results.format)
}

fn row(results: &CheckResults, name: &str) -> Vec<String> {
    let rounds: Vec<_> = results.modules.iter().filter(|m| m.module == name).collect();
    let strain = |m: &&&ModuleResult| {
        let strain = m.worst.as_ref().and_then(|l| Some(l.relative_l2? / l.bound.max(1e-300)));
        (!m.passed, strain.unwrap_or(f64::INFINITY))
    };
    let worst = rounds
        .iter()
        .max_by(|a, b| strain(a).partial_cmp(&strain(b)).unwrap_or(std::cmp::Ordering::Equal))
        .and_then(|m| m.worst.as_ref());
    let number = |x: Option<f64>| x.map_or("-".into(), |x| format!("{x:.1e}"));
    let passed = rounds.iter().all(|m| m.passed);
    let seconds: f64 = rounds.iter().map(|m| m.seconds).sum();
    let host: BTreeSet<&str> = rounds.iter().flat_map(|m| m.host_ops.iter().map(String::as_str)).collect();
    vec![
        name.to_string(),
        worst.and_then(|l| l.pcc).map_or("-".into(), |p| format!("{p:.8}")),
        number(worst.and_then(|l| l.relative_l2)),
        number(worst.and_then(|l| l.max_abs)),
        worst.and_then(|l| l.worst_index).map_or("-".into(), |i| i.to_string()),
        number(worst.map(|l| l.bound)),
        if passed { "pass" } else { "FAIL" }.into(),
        format!("{:.0} ms", seconds * 1e3),
        host.into_iter().collect::<Vec<_>>().join(" "),
    ]
}
