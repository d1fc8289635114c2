//! Is each module right on this device? The logic of `pi0 check`.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use pi0_device::{Agreement, Device, Fallback, HostTensor, OpKind, Reference, Tapped, Traced};
use pi0_model::cases::check::{Checked, Comparison, check, compare_taps, culprits};
use pi0_model::cases::{Format, LayerChoice, Module, Rounded, Setup, bound};
use pi0_model::golden::{self, golden_taps, padded_tokens, read_inputs, read_tensors};
use pi0_model::{Checkpoint, EOS, Extent, Inputs, Kind, Pi0, SampleOptions};

use crate::results::{CheckResults, Environment, Line, ModuleResult};
use crate::{Error, Result, text};

/// Above this, judging a whole tower with plain loops takes minutes.
const LARGE: u64 = 100_000_000;

/// Rounding of the references that made the golden data, which counts beside the device's: what two of them may differ by
/// (`golden/README.md`).
const GOLDEN_ROUNDING: f64 = 1e-5;

/// How much to check.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Mode {
    /// Two networks of odd sizes; of a large checkpoint, the first layers.
    #[default]
    Quick,
    /// Also one whose sizes are whole tiles; of a large checkpoint, first, middle and last layers.
    Standard,
    /// Also 256 patches an image and ten steps; of a checkpoint, everything.
    Full,
}

impl Mode {
    /// Its name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Mode::Quick => "quick",
            Mode::Standard => "standard",
            Mode::Full => "full",
        }
    }

    /// Weights and inputs to check on: the checkpoint's, or small random networks.
    pub fn setups(self, checkpoint: Option<&Checkpoint>) -> Result<Vec<Setup>> {
        Ok(match (checkpoint, self) {
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
        })
    }
}

/// Which modules to check.
#[derive(Debug, Clone)]
pub struct Selection {
    /// In the order that parts come before what is made of them.
    pub modules: Vec<Module>,
    /// Whether towers and the whole network were left out because the checkpoint is large.
    pub shallow: bool,
}

/// The modules of these names and below them; without names, all that the checkpoint's size allows in this mode.
pub fn select(names: &[String], checkpoint: Option<&Checkpoint>, mode: Mode) -> Result<Selection> {
    if !names.is_empty() {
        return Ok(Selection { modules: named(names)?, shallow: false });
    }
    let large = checkpoint.is_some_and(|c| c.parameters() > LARGE);
    let shallow = large && mode != Mode::Full;
    let modules = Module::of_family().into_iter().filter(|m| !shallow || !m.is_deep()).collect();
    Ok(Selection { modules, shallow })
}

fn named(names: &[String]) -> Result<Vec<Module>> {
    let mut picked = Vec::new();
    for name in names {
        let found = Module::named(name);
        if found.is_empty() {
            let why = "there is no such module; see pi0 check --list".into();
            return Err(Error::Option { option: format!("--module {name}"), why });
        }
        picked.extend(found);
    }
    Ok(Module::of_family().into_iter().filter(|m| picked.contains(m)).collect())
}

/// What to check, and how.
#[derive(Debug, Clone)]
pub struct Plan {
    /// Which modules.
    pub modules: Vec<Module>,
    /// On what.
    pub setups: Vec<Setup>,
    /// Number format that the thresholds are for.
    pub format: Format,
    /// Operations forced off the device.
    pub forced: Vec<OpKind>,
    /// Whether an operation that the device lacks fails rather than runs on the host.
    pub strict: bool,
    /// Golden outputs to compare the whole network with, and the checkpoint that they belong to.
    pub against: Option<(PathBuf, Checkpoint)>,
    /// How much, for the record.
    pub mode: Mode,
    /// The checkpoint's name, for the record.
    pub model: Option<String>,
    /// Machine and device, for the record.
    pub environment: Environment,
}

impl Plan {
    /// Runs every module on `device` and on `judge`.
    pub fn run<D: Device, J: Device>(self, device: D, judge: &J) -> Result<CheckResults> {
        let fallback = if self.strict { Fallback::Fail } else { Fallback::RunOnHost };
        let traced = Traced::new(device, Reference, fallback).force_to_host(self.forced);
        let mut modules = Vec::new();
        let mut taps = Vec::new();
        let mut checked: Vec<Checked> = Vec::new();
        for setup in &self.setups {
            let has = Module::all(setup.config().kind);
            for &module in self.modules.iter().filter(|m| has.contains(m)) {
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
        let golden = match &self.against {
            Some((path, checkpoint)) => against(&traced, path, checkpoint, self.format)?,
            None => vec![],
        };
        let all = |lines: &[Line]| lines.iter().all(|l| l.passed);
        Ok(CheckResults {
            passed: modules.iter().all(|m| m.passed) && all(&taps) && all(&golden),
            environment: self.environment,
            mode: self.mode.name().into(),
            model: self.model,
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
    let inputs = inputs.ok_or_else(|| Error::Option {
        option: format!("--against {name}"),
        why: "wanted a file NAME.outputs.safetensors".into(),
    })?;
    let batch = read_inputs(Path::new(&inputs))?;
    let want = comparable(checkpoint, read_tensors(path)?);
    let got = whole_taps(device, checkpoint, &batch, &want)?;
    // What the format's roundings do to each intermediate; on the device itself where plain loops would take an hour.
    let rounded = match checkpoint.parameters() > LARGE {
        true => whole_taps(&Rounded::new(device, format, 1), checkpoint, &batch, &want)?,
        false => whole_taps(&Rounded::new(Reference, format, 1), checkpoint, &batch, &want)?,
    };
    let base = if checkpoint.parameters() > LARGE { &got } else { &want };
    let draws: BTreeMap<_, _> = golden::compare_taps(&rounded, base, &batch).into_iter().collect();
    let line = |(name, result): (String, std::result::Result<Agreement, String>)| {
        let draw = draws.get(&name).and_then(|d| d.as_ref().ok());
        let mut bound = bound(draw.map_or(&[], std::slice::from_ref));
        if bound.relative_l2 < GOLDEN_ROUNDING {
            let largest = want[&name].data.iter().fold(0.0, |m: f64, &x| m.max(f64::from(x).abs()));
            bound.max_abs = bound.max_abs.max(10.0 * GOLDEN_ROUNDING * largest);
            bound.relative_l2 = GOLDEN_ROUNDING;
            bound.pcc = bound.pcc.min(1.0 - GOLDEN_ROUNDING.powi(2));
        }
        Line::new(&Comparison { name, agreement: result, bound })
    };
    // A camera that no robot of the batch has was never computed.
    let compared = golden::compare_taps(&got, &want, &batch);
    Ok(compared.into_iter().filter(|(_, r)| !r.as_ref().is_ok_and(|a| a.count == 0)).map(line).collect())
}

/// Every intermediate of the whole network on `device`, and the actions, as the golden data names and shapes them.
fn whole_taps<D: Device>(
    device: &D,
    checkpoint: &Checkpoint,
    batch: &[Inputs],
    want: &BTreeMap<String, HostTensor>,
) -> Result<BTreeMap<String, HostTensor>> {
    let model = Pi0::load(Tapped::new(device), checkpoint.clone(), Extent::Whole, &|_| ())?;
    let chunks = model.sample_actions(batch, &SampleOptions::default())?;
    let c = model.config();
    let times = c.schedule.times(c.num_steps);
    let mut taps = golden_taps(model.device().take()?, batch, c, &times, padded_tokens(want, batch, c))?;
    match (c.kind, want.get("tokens")) {
        (Kind::Pi0Fast, None) => {}
        (Kind::Pi0Fast, Some(golden)) => drop(taps.insert("tokens".into(), as_far_as(&chunks, golden))),
        (Kind::Pi0 | Kind::Pi05, _) => {
            let shape = [chunks.len(), c.horizon, c.action_dim];
            let actions = chunks.into_iter().flat_map(|a| a.data).collect();
            taps.insert("actions".into(), HostTensor::new(shape, actions));
        }
    }
    Ok(taps)
}

/// What of golden outputs the network itself makes: of π0-FAST not the actions, which a codec reads.
fn comparable(
    checkpoint: &Checkpoint,
    mut want: BTreeMap<String, HostTensor>,
) -> BTreeMap<String, HostTensor> {
    if checkpoint.config.kind == Kind::Pi0Fast {
        want.retain(|name, _| name != "actions" && !name.starts_with("top."));
        if let Some(golden) = want.get_mut("tokens") {
            // Behind `<eos>` the references go on only while others in the batch do.
            for i in 0..golden.rows() {
                let row = golden.row_mut(i);
                let end = row.iter().position(|t| *t == EOS as f32).map_or(row.len(), |at| at + 1);
                row[end..].fill(0.0);
            }
        }
    }
    want
}

/// Answers as one tensor, as far as the golden ones go: no tokenizer says here where an answer ends, so the network goes on.
fn as_far_as(answers: &[HostTensor], golden: &HostTensor) -> HostTensor {
    let mut all = HostTensor::zeros(golden.shape.clone());
    for (i, answer) in answers.iter().enumerate().take(golden.rows()) {
        let wanted = golden.row(i).iter().rposition(|t| *t != 0.0).map_or(0, |last| last + 1);
        let count = wanted.min(answer.data.len());
        all.row_mut(i)[..count].copy_from_slice(&answer.data[..count]);
    }
    all
}

/// What failed and what is at fault, in one sentence; nothing if all passed.
pub fn failure(results: &CheckResults) -> Option<String> {
    if results.passed {
        return None;
    }
    let failed: BTreeSet<_> = results.modules.iter().filter(|m| !m.passed).map(|m| &m.module).collect();
    let golden = results.golden.iter().filter(|l| !l.passed).count();
    let taps = results.taps.iter().filter(|l| !l.passed).count();
    Some(format!(
        "{} modules, {taps} intermediates and {golden} golden tensors failed; at fault: {}",
        failed.len(),
        if results.culprits.is_empty() { "see above".into() } else { results.culprits.join(", ") }
    ))
}

/// Every module and what it is made of.
pub fn list() -> String {
    let row = |m: Module| {
        let parts: Vec<_> = m.parts().into_iter().map(Module::name).collect();
        vec![m.name().to_string(), parts.join(", ")]
    };
    let width = Module::of_family().iter().map(|m| m.name().len()).max().unwrap_or(0);
    let line = |row: Vec<String>| format!("{:width$}  {}\n", row[0], row[1]).trim_end().to_string() + "\n";
    Module::of_family().into_iter().map(|m| line(row(m))).collect()
}

/// One line a module: the worst of its rounds.
pub fn table(results: &CheckResults) -> String {
    let header = ["module", "pcc", "relative L2", "max abs", "at", "threshold", "", "time", "on host"];
    let mut names: Vec<&str> = Vec::new();
    for m in &results.modules {
        if !names.contains(&m.module.as_str()) {
            names.push(&m.module);
        }
    }
    let mut out = text::table(&header.map(String::from), names.iter().map(|name| row(results, name)));
    let seconds: f64 = results.modules.iter().map(|m| m.seconds + m.judge_seconds).sum();
    for m in results.modules.iter().filter(|m| !m.passed) {
        let why =
            m.error.clone().or_else(|| m.first_tap.as_ref().map(|t| format!("first tap out of bounds: {t}")));
        out += &format!("{} ({}) failed; {}\n", m.module, m.setup, why.unwrap_or_default());
    }
    for (what, lines) in
        [("intermediates of the whole network", &results.taps), ("golden tensors", &results.golden)]
    {
        if lines.is_empty() {
            continue;
        }
        let failed: Vec<_> = lines.iter().filter(|l| !l.passed).collect();
        let worst = lines.iter().filter_map(|l| l.relative_l2).fold(0.0, f64::max);
        out += &format!(
            "{what}: {} of {} pass, worst relative L2 {worst:.1e}",
            lines.len() - failed.len(),
            lines.len()
        );
        if let Some(first) = failed.first() {
            let error = first.error.as_ref().map_or(String::new(), |e| format!(" ({e})"));
            out += &format!(", first to fail {}{error}", first.name);
        }
        out.push('\n');
    }
    let e = &results.environment;
    out + &format!("{} ({}), thresholds for {}, {seconds:.1} s\n", e.device, e.device_detail, results.format)
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
