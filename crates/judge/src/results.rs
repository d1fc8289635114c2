//! What `check` and `coverage` find out, as it is written to JSON and read back by `report` and `compare`.

use std::path::Path;

use pi0_model::cases::check::{Checked, Comparison};
use serde::{Deserialize, Serialize};

use crate::{Error, Result};

/// The results of one command.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(tag = "command", rename_all = "lowercase")]
#[allow(clippy::large_enum_variant)] // one of each exists
pub enum Results {
    /// Of `pi0 check`.
    Check(CheckResults),
    /// Of `pi0 coverage`.
    Coverage(CoverageResults),
}

impl Results {
    /// Reads what `--json` wrote.
    pub fn read(path: &Path) -> Result<Self> {
        let text =
            std::fs::read_to_string(path).map_err(|source| Error::Read { path: path.into(), source })?;
        serde_json::from_str(&text)
            .map_err(|e| Self::wrong(path, format!("holds no results of pi0 check or pi0 coverage: {e}")))
    }

    fn wrong(path: &Path, what: String) -> Error {
        Error::Results { path: path.into(), what }
    }

    /// The name of the command.
    pub fn command(&self) -> &'static str {
        match self {
            Results::Check(_) => "check",
            Results::Coverage(_) => "coverage",
        }
    }

    /// Reads the results of `pi0 check`.
    pub fn read_check(path: &Path) -> Result<CheckResults> {
        match Self::read(path)? {
            Results::Check(check) => Ok(check),
            other => {
                Err(Self::wrong(path, format!("holds results of pi0 {}, wanted pi0 check", other.command())))
            }
        }
    }

    /// Reads the results of `pi0 coverage`.
    pub fn read_coverage(path: &Path) -> Result<CoverageResults> {
        match Self::read(path)? {
            Results::Coverage(coverage) => Ok(coverage),
            other => Err(Self::wrong(
                path,
                format!("holds results of pi0 {}, wanted pi0 coverage", other.command()),
            )),
        }
    }
}

/// Where results come from.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Environment {
    /// Version of this program.
    pub version: String,
    /// The commit it was built from.
    pub commit: Option<String>,
    /// Unoptimized programs measure nothing.
    pub optimized: bool,
    /// Operating system and architecture.
    pub system: String,
    /// The host's processor.
    pub processor: String,
    /// Name of the device.
    pub device: String,
    /// What was found of it: instruction set, threads, grid, board.
    pub device_detail: String,
    /// Seconds since 1970, UTC.
    pub time: u64,
}

impl Environment {
    /// This program on this machine with this device.
    pub fn here(device: &str, device_detail: String) -> Self {
        let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
        Self {
            version: env!("CARGO_PKG_VERSION").into(),
            commit: option_env!("PI0_COMMIT").map(str::to_string),
            optimized: !cfg!(debug_assertions),
            system: format!("{} {}", std::env::consts::OS, std::env::consts::ARCH),
            processor: processor(),
            device: device.into(),
            device_detail,
            time: since.map_or(0, |d| d.as_secs()),
        }
    }
}

/// The processor's name and count, as Linux tells them.
fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let name = info.lines().find_map(|l| l.strip_prefix("model name")?.split_once(": "));
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    format!("{}, {threads} threads", name.map_or("unknown processor", |(_, name)| name))
}

/// Results of `pi0 check`.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CheckResults {
    /// Where they come from.
    pub environment: Environment,
    /// quick, standard or full.
    pub mode: String,
    /// The checkpoint; small random networks if none.
    pub model: Option<String>,
    /// Number format that the thresholds are for.
    pub format: String,
    /// Whether everything passed.
    pub passed: bool,
    /// Modules that failed though all that they are made of passed.
    pub culprits: Vec<String>,
    /// Each module on each set of weights and inputs.
    pub modules: Vec<ModuleResult>,
    /// Every intermediate of the whole network.
    pub taps: Vec<Line>,
    /// Every golden tensor, with `--against`.
    pub golden: Vec<Line>,
}

/// Result of one module.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct ModuleResult {
    /// Dotted name.
    pub module: String,
    /// Name of the weights and inputs.
    pub setup: String,
    /// Whether every output is within its bound.
    pub passed: bool,
    /// The output that strains its bound most.
    pub worst: Option<Line>,
    /// Seconds on the device, packing of weights included.
    pub seconds: f64,
    /// Seconds of the judge.
    pub judge_seconds: f64,
    /// Operations that the device lacks or that were forced off it.
    pub host_ops: Vec<String>,
    /// Why it could not run.
    pub error: Option<String>,
    /// First intermediate out of bounds.
    pub first_tap: Option<String>,
}

/// One tensor against what it should be. Measures that are no number are left out.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// Name of the output, tap or golden tensor.
    pub name: String,
    /// Whether it is within its bound.
    pub passed: bool,
    /// Pearson correlation.
    pub pcc: Option<f64>,
    /// Relative L2.
    pub relative_l2: Option<f64>,
    /// Largest absolute difference.
    pub max_abs: Option<f64>,
    /// Where that is.
    pub worst_index: Option<usize>,
    /// Largest relative L2 that passes.
    pub bound: f64,
    /// Why it could not be compared.
    pub error: Option<String>,
}

impl Line {
    /// From a comparison.
    pub fn new(c: &Comparison) -> Self {
        let finite = |x: f64| x.is_finite().then_some(x);
        let a = c.agreement.as_ref();
        Self {
            name: c.name.clone(),
            passed: c.passed(),
            pcc: a.ok().and_then(|a| finite(a.pcc)),
            relative_l2: a.ok().and_then(|a| finite(a.relative_l2)),
            max_abs: a.ok().and_then(|a| finite(a.max_abs)),
            worst_index: a.ok().map(|a| a.worst_index),
            bound: c.bound.relative_l2,
            error: match a {
                Err(e) => Some(e.clone()),
                Ok(a) if a.relative_l2.is_nan() => Some("NaN or infinity".into()),
                Ok(_) => None,
            },
        }
    }
}

impl ModuleResult {
    /// From a check, during which these operations ran on the host.
    pub fn new(c: &Checked, host_ops: Vec<String>) -> Self {
        Self {
            module: c.module.name().into(),
            setup: c.setup.clone(),
            passed: c.passed(),
            worst: c.worst().map(Line::new),
            seconds: c.time.as_secs_f64(),
            judge_seconds: c.judge_time.as_secs_f64(),
            host_ops,
            error: c.error.clone(),
            first_tap: c.first_tap.clone(),
        }
    }
}

/// Results of `pi0 coverage`. Times are seconds of one inference, the median of several.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct CoverageResults {
    /// Where they come from.
    pub environment: Environment,
    /// What ran.
    pub workload: Workload,
    /// The whole inference.
    pub total_seconds: f64,
    /// Operations by module and kind.
    pub rows: Vec<Row>,
    /// Moves across the bus.
    pub transfers: Vec<Transfer>,
    /// What runs on the host, and what moving it would give.
    pub roadmap: Vec<Fallback>,
    /// Stages of the inference in order.
    pub stages: Vec<Stage>,
    /// The prediction against a run without forced operations.
    pub verified: Option<Verified>,
    /// What tracing costs.
    pub overhead: Option<Overhead>,
}

/// What the trace costs.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Overhead {
    /// How often each was measured.
    pub rounds: usize,
    /// Calls recorded in one inference.
    pub records: usize,
    /// Median time on the bare device.
    pub plain_seconds: f64,
    /// With the trace against without.
    pub traced: Ratio,
    /// Without against without: what the method cannot tell from nothing.
    pub control: Ratio,
}

/// How two times measured in turn relate, less 1.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Ratio {
    /// Of all pairs.
    pub median: f64,
    /// Lower end of the median's 95 % confidence interval.
    pub low: f64,
    /// Upper end.
    pub high: f64,
}

impl Ratio {
    /// From at least one pair. The interval is that of order statistics: it assumes no distribution.
    pub fn of(mut pairs: Vec<f64>) -> Self {
        pairs.sort_by(f64::total_cmp);
        let (n, last) = (pairs.len() as f64, pairs.len() - 1);
        let reach = 0.98 * n.sqrt();
        let at = |rank: f64| pairs[(rank.max(0.0) as usize).min(last)];
        Self {
            median: (pairs[last / 2] + pairs[pairs.len() / 2]) / 2.0,
            low: at((n / 2.0 - reach).floor() - 1.0),
            high: at((n / 2.0 + reach).ceil()),
        }
    }
}

/// The inference that was measured.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Workload {
    /// The checkpoint, or the size of a random one.
    pub model: String,
    /// Robots.
    pub batch: usize,
    /// Images of each robot.
    pub cameras: usize,
    /// Tokens of each prompt.
    pub tokens: usize,
    /// Denoising steps.
    pub steps: usize,
    /// Inferences measured.
    pub runs: usize,
    /// Operations forced to the host.
    pub forced: Vec<String>,
    /// The device that fallbacks run on.
    pub host: String,
}

/// Base operations of one kind in one module.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Row {
    /// Module without layer and step numbers, such as `suffix.layer`.
    pub module: String,
    /// Kind of operation.
    pub kind: String,
    /// On the device.
    pub device: Share,
    /// On the host.
    pub host: Share,
}

/// An amount of work.
#[derive(Debug, Clone, Copy, Default, PartialEq, Serialize, Deserialize)]
pub struct Share {
    /// Base operations.
    pub ops: u64,
    /// Floating-point operations.
    pub flop: u64,
    /// Bytes of operands and results.
    pub bytes: u64,
    /// Time without transfers. A fused call counts where its linear layer does.
    pub seconds: f64,
    /// Time of transfers that fallbacks need.
    pub transfer_seconds: f64,
    /// Bytes of those transfers.
    pub transfer_bytes: u64,
}

/// Moves of one sort in one module.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Transfer {
    /// `upload`, `download`, or the operation whose fallback moves.
    pub what: String,
    /// Module without layer and step numbers.
    pub module: String,
    /// How often.
    pub count: u64,
    /// How much.
    pub bytes: u64,
    /// How long.
    pub seconds: f64,
}

/// One operation that runs on the host.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Fallback {
    /// The base operation.
    pub op: String,
    /// Modules it runs in.
    pub modules: Vec<String>,
    /// How often.
    pub count: u64,
    /// Time on the host.
    pub host_seconds: f64,
    /// Time of its transfers.
    pub transfer_seconds: f64,
    /// Time that operations on the device lose because this one ran on the host before them.
    pub disturbance_seconds: f64,
    /// Time that the device would take.
    pub device_seconds: f64,
    /// How that is known.
    pub basis: String,
    /// Whole inference if this alone moved.
    pub speedup: f64,
    /// Whole inference if this and all above moved.
    pub cumulative_speedup: f64,
    /// Share of base operations on the device by then.
    pub coverage: f64,
    /// HIGH, MEDIUM or LOW.
    pub priority: String,
}

/// A stage of the inference.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Stage {
    /// `vision`, `prefix`, `suffix`, `step0` …
    pub name: String,
    /// Start of its first operation.
    pub start: f64,
    /// End of its last.
    pub end: f64,
    /// Time by kind of operation; `upload` and `download` beside the kinds.
    pub kinds: Vec<(String, f64)>,
}

/// A prediction and what became of it.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Verified {
    /// Median time of an inference with operations forced to the host.
    pub forced_seconds: f64,
    /// What the roadmap predicts for an inference without.
    pub predicted_seconds: f64,
    /// Median time of an inference without.
    pub measured_seconds: f64,
    /// `predicted / measured - 1`.
    pub error: f64,
}

/// How much of an inference is on the device.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Coverage {
    /// Of base operations, 0 to 1.
    pub ops: f64,
    /// Of floating-point operations.
    pub flop: f64,
    /// Of the operations' time, transfers of fallbacks counted against.
    pub time: f64,
    /// All base operations.
    pub total_ops: u64,
    /// All floating-point operations.
    pub total_flop: u64,
}

impl CoverageResults {
    /// Overall coverage.
    pub fn share(&self) -> Coverage {
        let sum = |f: &dyn Fn(&Row) -> f64| self.rows.iter().map(f).sum::<f64>();
        let part = |device: f64, host: f64| if device + host > 0.0 { device / (device + host) } else { 0.0 };
        let busy = |s: &Share| s.seconds + s.transfer_seconds;
        Coverage {
            ops: part(sum(&|r| r.device.ops as f64), sum(&|r| r.host.ops as f64)),
            flop: part(sum(&|r| r.device.flop as f64), sum(&|r| r.host.flop as f64)),
            time: part(sum(&|r| busy(&r.device)), sum(&|r| busy(&r.host))),
            total_ops: self.rows.iter().map(|r| r.device.ops + r.host.ops).sum(),
            total_flop: self.rows.iter().map(|r| r.device.flop + r.host.flop).sum(),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_interval_of_a_median() {
        // Of 100 values in order, the 40th and the 61st (Conover, Practical Nonparametric Statistics).
        let r = Ratio::of((1..=100).rev().map(f64::from).collect());
        assert_eq!((r.low, r.median, r.high), (40.0, 50.5, 61.0));
        assert_eq!(Ratio::of(vec![0.5]), Ratio { median: 0.5, low: 0.5, high: 0.5 });
    }
}
