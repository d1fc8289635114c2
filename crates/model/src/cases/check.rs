//! Runs modules on a device and on a judge, compares, and finds where a fault begins.

use std::time::{Duration, Instant};

use pi0_device::{Agreement, Bound, Device, HostTensor, Tapped, compare};

use super::{Format, Module, Outputs, Rounded, Setup, bounds};
use crate::ModelError;

/// One tensor against what it should be.
#[derive(Debug, Clone)]
pub struct Comparison {
    /// Name of the output or tap.
    pub name: String,
    /// How it relates, or why that has no answer.
    pub agreement: Result<Agreement, String>,
    /// What it must reach.
    pub bound: Bound,
}

/// What a module must give, and how closely.
#[derive(Debug, Clone)]
pub struct Wanted {
    /// Its results.
    pub outputs: Outputs,
    /// For each what a device must reach.
    pub bounds: Vec<Bound>,
}

impl Comparison {
    fn new(name: &str, got: Option<&HostTensor>, want: &HostTensor, bound: Bound) -> Self {
        let agreement = match got {
            None => Err("was not produced".into()),
            Some(got) if got.shape != want.shape => {
                Err(format!("has shape {:?}, wanted {:?}", got.shape, want.shape))
            }
            Some(got) => Ok(compare(&got.data, &want.data)),
        };
        Self { name: name.into(), agreement, bound }
    }

    /// Whether it is within its bound.
    pub fn passed(&self) -> bool {
        self.agreement.as_ref().is_ok_and(|a| self.bound.holds(a))
    }

    /// Relative L2 over its bound, to rank by; infinite for what cannot be compared.
    pub fn strain(&self) -> f64 {
        match &self.agreement {
            Ok(a) if a.relative_l2.is_nan() => f64::INFINITY,
            // A bound of zero means equal.
            Ok(a) if a.relative_l2 == 0.0 => 0.0,
            Ok(a) => a.relative_l2 / self.bound.relative_l2,
            Err(_) => f64::INFINITY,
        }
    }
}

/// The result of one module.
#[derive(Debug, Clone)]
pub struct Checked {
    /// Which.
    pub module: Module,
    /// Name of the [`Setup`].
    pub setup: String,
    /// Each output of the module.
    pub outputs: Vec<Comparison>,
    /// Why the module could not run at all.
    pub error: Option<String>,
    /// Time on the device, packing of weights included.
    pub time: Duration,
    /// Time of the judge.
    pub judge_time: Duration,
    /// After a failure, the first intermediate that is out of bounds when the layers are run op by op, or why there
    /// is none.
    pub first_tap: Option<String>,
}

impl Checked {
    /// Whether every output is within its bound.
    pub fn passed(&self) -> bool {
        self.error.is_none() && !self.outputs.is_empty() && self.outputs.iter().all(Comparison::passed)
    }

    /// The output that strains its bound most.
    pub fn worst(&self) -> Option<&Comparison> {
        // A failure by correlation or max abs alone outranks any pass.
        let rank = |c: &Comparison| (!c.passed(), c.strain());
        self.outputs.iter().max_by(|a, b| rank(a).partial_cmp(&rank(b)).unwrap_or(std::cmp::Ordering::Equal))
    }

    /// One line for messages.
    pub fn summary(&self) -> String {
        let name = self.module.name();
        let tap = self.first_tap.as_ref().map_or(String::new(), |t| format!("; first tap: {t}"));
        match (&self.error, self.worst()) {
            (Some(e), _) => format!("{name} failed: {e}"),
            (None, None) => format!("{name} gave nothing"),
            (None, Some(c)) => {
                let verdict = if self.passed() { "ok" } else { "FAIL" };
                let how = c.agreement.as_ref().map_or_else(Clone::clone, ToString::to_string);
                format!("{name} {verdict} {}: {how}, bound {:.1e}{tap}", c.name, c.bound.relative_l2)
            }
        }
    }
}

/// What `module` must give, by a definition of its own where it has one, else by the judge; and how closely a device of
/// `format` must give it, by the judge with that format's roundings.
pub fn wanted<J: Device>(
    judge: &J,
    module: Module,
    setup: &Setup,
    format: Format,
) -> Result<Wanted, ModelError> {
    let outputs = match module.expected(setup)? {
        Some(known) => known,
        None => module.run(judge, setup)?,
    };
    let bounds = bounds(&outputs, |seed| module.run(&Rounded::new(judge, format, seed), setup))?;
    Ok(Wanted { outputs, bounds })
}

/// Runs `module` alone on `d` and on `judge` and compares. Where it fails, runs it again op by op to find the first
/// intermediate that is wrong.
pub fn check<D: Device, J: Device>(
    d: &D,
    judge: &J,
    module: Module,
    setup: &Setup,
    format: Format,
) -> Checked {
    let start = Instant::now();
    let want = wanted(judge, module, setup, format);
    let judge_time = start.elapsed();
    let mut done = check_against(d, want.as_ref(), module, setup);
    done.judge_time = judge_time;
    if done.error.is_none() && !done.passed() {
        done.first_tap = Some(match first_divergence(d, judge, want.as_ref().ok(), module, setup, format) {
            Ok(Some(tap)) => tap,
            Ok(None) => "none, op by op it is right: the fault is in a fused operation".into(),
            Err(e) => format!("unknown: {e}"),
        });
    }
    done
}

/// Runs `module` on `d` and compares with what [`wanted`] gave.
pub fn check_against<D: Device>(
    d: &D,
    want: Result<&Wanted, &ModelError>,
    module: Module,
    setup: &Setup,
) -> Checked {
    let start = Instant::now();
    let got = module.run(d, setup);
    let time = start.elapsed();
    let (outputs, error) = match (got, want) {
        (Ok(got), Ok(want)) => (compare_all(&got, want), None),
        (Err(e), _) => (vec![], Some(e.to_string())),
        (_, Err(e)) => (vec![], Some(format!("the judge: {e}"))),
    };
    let (setup, judge_time, first_tap) = (setup.name.clone(), Duration::ZERO, None);
    Checked { module, setup, outputs, error, time, judge_time, first_tap }
}

fn compare_all(got: &Outputs, want: &Wanted) -> Vec<Comparison> {
    let find = |name: &str| got.iter().find(|(n, _)| n == name).map(|(_, t)| t);
    let wanted = want.outputs.iter().zip(&want.bounds);
    wanted.map(|((name, want), bound)| Comparison::new(name, find(name), want, *bound)).collect()
}

/// Every intermediate of `module` on both devices, op by op, in the order that the model makes them. The outputs
/// come last.
pub fn compare_taps<D: Device, J: Device>(
    d: &D,
    judge: &J,
    module: Module,
    setup: &Setup,
    format: Format,
) -> Result<Vec<Comparison>, ModelError> {
    let (got, want) = (taps(d, module, setup)?, taps(judge, module, setup)?);
    let bounds = bounds(&want, |seed| taps(&Rounded::new(judge, format, seed), module, setup))?;
    // Names repeat where a module runs more than once, so taps are matched by their order.
    let line = |(i, ((name, want), bound)): (usize, (&(String, HostTensor), Bound))| {
        let got = got.get(i).filter(|(n, _)| n == name).map(|(_, t)| t);
        Comparison::new(name, got, want, bound)
    };
    Ok(want.iter().zip(bounds).enumerate().map(line).collect())
}

/// Every intermediate, and the outputs behind them.
fn taps<D: Device>(d: &D, module: Module, setup: &Setup) -> Result<Outputs, ModelError> {
    let tapped = Tapped::new(d);
    let outputs = module.run(&tapped, setup)?;
    let mut all = tapped.take()?;
    all.extend(outputs);
    Ok(all)
}

fn first_divergence<D: Device, J: Device>(
    d: &D,
    judge: &J,
    want: Option<&Wanted>,
    module: Module,
    setup: &Setup,
    format: Format,
) -> Result<Option<String>, ModelError> {
    // Judged by definitions of their own, of which the output is the only tap.
    if let (Some(_), Some(want)) = (module.expected(setup)?, want) {
        let outputs = compare_all(&module.run(d, setup)?, want);
        return Ok(outputs.into_iter().find(|c| !c.passed()).map(|c| c.name));
    }
    let lines = compare_taps(d, judge, module, setup, format)?;
    Ok(lines.into_iter().find(|c| !c.passed()).map(|c| c.name))
}

/// The modules at fault: those that failed though all that they are made of passed.
pub fn culprits(results: &[Checked]) -> Vec<Module> {
    let failed = |m: Module| results.iter().any(|r| r.module == m && !r.passed());
    let mut found: Vec<Module> =
        results.iter().map(|r| r.module).filter(|m| failed(*m) && !any_part(*m, &failed)).collect();
    found.sort();
    found.dedup();
    found
}

fn any_part(module: Module, failed: &impl Fn(Module) -> bool) -> bool {
    module.parts().into_iter().any(|p| failed(p) || any_part(p, failed))
}
