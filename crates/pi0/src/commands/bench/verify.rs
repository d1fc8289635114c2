//! Checks what is about to be timed.

use std::path::Path;
use std::time::Instant;

use anyhow::{Context, Result, bail};
use pi0_device::{Agreement, Bound, Device, HostTensor, OpKind, Reference, Traced, compare};
use pi0_model::cases::{Format, Rounded, bounds};
use pi0_model::golden::read_tensors;
use pi0_model::{Checkpoint, Extent, Inputs, Kind, Pi0, SampleOptions};
use serde::{Deserialize, Serialize};

use super::audit::{Audited, Finding, Findings};

/// A model that can be traced and audited.
pub type Model<D> = Pi0<Traced<Audited<D>, Reference>>;

/// Up to this many operations, the reference runs the whole inference: some ten seconds of scalar loops.
const WHOLE: u64 = 10_000_000_000;

/// Correlation that actions must reach in any number format: where rounding alone could cost more, it is too coarse.
const LEAST_PCC: f64 = 0.995;

/// How the actions were checked, and what was found.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Verdict {
    /// Against what.
    pub method: Method,
    /// One line for what was compared: the actions, or each kind of operation.
    pub compared: Vec<Compared>,
    /// Seconds spent.
    pub seconds: f64,
}

/// What the actions were checked against.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Method {
    /// Stored actions.
    Golden,
    /// The reference's own inference.
    Reference,
    /// The reference on sampled rows of each operation.
    Operations,
}

/// Results against what they should be.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Compared {
    /// The actions, or the kind of operation.
    pub what: String,
    /// Results compared.
    pub count: usize,
    /// Correlation of the worst.
    pub pcc: f64,
    /// Its relative L2.
    pub relative_l2: f64,
    /// Its largest absolute difference.
    pub max_abs: f64,
    /// Relative L2 allowed.
    pub bound: f64,
    /// Whether every measure is within its bound.
    pub passed: bool,
    /// What is out of its bound, in words.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub missed: Vec<String>,
    /// Module of the worst operation.
    pub module: Option<String>,
}

impl Compared {
    fn new(what: &str, count: usize, a: &Agreement, bound: &Bound, module: Option<String>) -> Self {
        Self {
            what: what.into(),
            count,
            pcc: a.pcc,
            relative_l2: a.relative_l2,
            max_abs: a.max_abs,
            bound: bound.relative_l2,
            passed: bound.holds(a),
            missed: bound.missed(a),
            module,
        }
    }
}

/// What a check needs beside the model.
pub struct Subject<'a> {
    /// The model's weights.
    pub checkpoint: &'a Checkpoint,
    /// The inputs that will be timed.
    pub batch: &'a [Inputs],
    /// How to sample.
    pub options: &'a SampleOptions,
    /// The coarsest rounding of the device.
    pub format: Format,
    /// Stored actions, if given.
    pub golden: Option<&'a Path>,
    /// What the device computed.
    pub actions: &'a [HostTensor],
    /// Operations of that inference.
    pub flop: u64,
}

/// Checks the actions in the strongest way that takes seconds; an error if they are wrong.
pub fn verify<D: Device>(model: &Model<D>, subject: &Subject<'_>) -> Result<Verdict> {
    let start = Instant::now();
    // A rounding may choose another token, and what follows is another answer: its operations are checked.
    let writes = subject.checkpoint.config.kind == Kind::Pi0Fast;
    let (method, compared) = match subject.golden {
        Some(_) if writes => {
            bail!("--golden holds actions; answers of π0-FAST are compared by pi0 check --against")
        }
        Some(path) => (Method::Golden, vec![against_golden(subject, path)?]),
        None if subject.flop <= WHOLE && !writes => (Method::Reference, vec![against_reference(subject)?]),
        None => (Method::Operations, operations(model, subject)?),
    };
    if let Some(c) = compared.iter().find(|c| !c.passed) {
        let place = c.module.as_ref().map_or(String::new(), |m| format!(" in {m}"));
        bail!("wrong {}{place}: {}; nothing was timed", c.what, c.missed.join("; "));
    }
    Ok(Verdict { method, compared, seconds: start.elapsed().as_secs_f64() })
}

/// The actions of a whole batch, one after the other.
pub fn flat(actions: &[HostTensor]) -> Vec<f32> {
    actions.iter().flat_map(|a| a.data.iter().copied()).collect()
}

fn whole(subject: &Subject<'_>, want: &[f32]) -> Result<Compared> {
    let got = flat(subject.actions);
    if got.len() != want.len() {
        bail!("{} action values to compare with {}", got.len(), want.len());
    }
    // An error of relative size r, orthogonal to the values, costs r² / 2 of correlation.
    let least =
        Bound { pcc: LEAST_PCC, relative_l2: (2.0 * (1.0 - LEAST_PCC)).sqrt(), max_abs: f64::INFINITY };
    let bound = if subject.flop > WHOLE { least } else { of_roundings(subject, want)? };
    let bound = Bound { pcc: bound.pcc.max(least.pcc), ..bound };
    Ok(Compared::new("actions", 1, &compare(&got, want), &bound, None))
}

/// How far off the reference is with the roundings of the subject's format.
fn of_roundings(subject: &Subject<'_>, want: &[f32]) -> Result<Bound> {
    let named = |values: Vec<f32>| vec![("actions".to_string(), HostTensor::new([values.len()], values))];
    let draw = |seed| -> Result<_> {
        let device = Rounded::new(Reference, subject.format, seed);
        let model = Pi0::load(device, subject.checkpoint.clone(), Extent::Cache, &|_| ())?;
        Ok(named(flat(&model.sample_actions(subject.batch, subject.options)?)))
    };
    Ok(bounds(&named(want.to_vec()), draw)?[0])
}

fn against_golden(subject: &Subject<'_>, path: &Path) -> Result<Compared> {
    let tensors = read_tensors(path)?;
    let want = tensors.get("actions").with_context(|| format!("{} holds no actions", path.display()))?;
    whole(subject, &want.data)
}

fn against_reference(subject: &Subject<'_>) -> Result<Compared> {
    let model = Pi0::load(Reference, subject.checkpoint.clone(), Extent::Cache, &|_| ())?;
    whole(subject, &flat(&model.sample_actions(subject.batch, subject.options)?))
}

/// Runs the inference again, every operation checked on sampled rows, and sees that it gives the same actions.
fn operations<D: Device>(model: &Model<D>, subject: &Subject<'_>) -> Result<Vec<Compared>> {
    let run = || model.sample_actions(subject.batch, subject.options);
    let (again, findings) = model.device().device().audit(in_two_steps, subject.format, run);
    model.device().take();
    same(&flat(&again?), &flat(subject.actions))?;
    if findings.is_empty() {
        bail!("no operation could be checked");
    }
    Ok(summary(&findings))
}

/// Vision, prefix and the two forms of a denoising step: the first with the state rows, and the later ones, which do
/// the same with other numbers.
fn in_two_steps(module: &str) -> bool {
    !module.starts_with("step") || module.starts_with("step0.") || module.starts_with("step1.")
}

fn summary(findings: &Findings) -> Vec<Compared> {
    let line = |(op, f): (&OpKind, &Finding)| {
        Compared::new(op.name(), f.count, &f.worst, &f.bound, Some(f.module.clone()))
    };
    findings.iter().map(line).collect()
}

/// An error unless two inferences on the same device gave the same bits: no device here sums in an order left to chance.
pub fn same(got: &[f32], want: &[f32]) -> Result<()> {
    if got.len() != want.len() || got.iter().zip(want).any(|(a, b)| a.to_bits() != b.to_bits()) {
        bail!("the same inputs gave other actions the second time: {}", compare(got, want));
    }
    Ok(())
}
