//! Two results of `check` or `coverage` side by side: what got worse? The logic of `pi0 compare`.

use std::collections::{BTreeMap, BTreeSet};

use serde::Serialize;

use crate::results::{CheckResults, CoverageResults, Line, Results};
use crate::{Error, Result};

/// One thing that both results have an answer to.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Difference {
    /// Which.
    pub what: String,
    /// The answer before.
    pub before: String,
    /// The answer now.
    pub now: String,
    /// Whether that is worse.
    pub worse: bool,
}

/// Everything that either result knows. An error may grow by `factor`: rounding differs between processors.
///
/// # Errors
/// The results are of different commands.
pub fn differences(before: &Results, now: &Results, factor: f64) -> Result<Vec<Difference>> {
    match (before, now) {
        (Results::Check(a), Results::Check(b)) => Ok(checks(a, b, factor)),
        (Results::Coverage(a), Results::Coverage(b)) => Ok(coverages(a, b)),
        (a, b) => Err(Error::Option {
            option: "BEFORE NOW".into(),
            why: format!("results of pi0 {} and of pi0 {} cannot be compared", a.command(), b.command()),
        }),
    }
}

/// Rounding that is never a regression, beside the factor.
const NOISE: f64 = 1e-7;

fn checks(a: &CheckResults, b: &CheckResults, factor: f64) -> Vec<Difference> {
    // Keyed by place: passed, and the error.
    type Table = BTreeMap<String, (bool, Option<f64>)>;
    let collect = |r: &CheckResults| -> Table {
        let modules = r.modules.iter().map(|m| {
            let error = m.worst.as_ref().and_then(|l| l.relative_l2);
            (format!("{} ({})", m.module, m.setup), (m.passed, error))
        });
        let lines = |kind: &'static str, lines: &[Line]| -> Vec<_> {
            lines.iter().map(|l| (format!("{kind} {}", l.name), (l.passed, l.relative_l2))).collect()
        };
        modules.chain(lines("tap", &r.taps)).chain(lines("golden", &r.golden)).collect()
    };
    let alike = a.format == b.format && a.environment.device == b.environment.device;
    let (a, b) = (collect(a), collect(b));
    let show = |r: &(bool, Option<f64>)| {
        let error = r.1.map_or("no number".into(), |e| format!("{e:.1e}"));
        format!("{} {error}", if r.0 { "pass" } else { "FAIL" })
    };
    let mut list = Vec::new();
    for (what, before) in &a {
        let (now, worse) = match b.get(what) {
            None => ("missing".into(), true),
            Some(now) => {
                let grew = match (before.1, now.1) {
                    (Some(x), Some(y)) => alike && y > x * factor + NOISE,
                    (Some(_), None) => true,
                    _ => false,
                };
                (show(now), (before.0 && !now.0) || grew)
            }
        };
        list.push(Difference { what: what.clone(), before: show(before), now, worse });
    }
    for (what, now) in b.iter().filter(|(what, _)| !a.contains_key(*what)) {
        list.push(Difference { what: what.clone(), before: "missing".into(), now: show(now), worse: !now.0 });
    }
    list
}

fn coverages(a: &CoverageResults, b: &CoverageResults) -> Vec<Difference> {
    let collect = |r: &CoverageResults| -> BTreeMap<String, (u64, u64)> {
        let rows = r.rows.iter();
        rows.map(|r| (format!("{} {}", r.module, r.kind), (r.device.ops, r.host.ops))).collect()
    };
    let workload = Difference {
        what: "workload".into(),
        before: describe(a),
        now: describe(b),
        worse: describe(a) != describe(b),
    };
    let (a, b) = (collect(a), collect(b));
    let show = |(device, host): (u64, u64)| format!("{device} on device, {host} on host");
    let keys: BTreeSet<_> = a.keys().chain(b.keys()).collect();
    let row = |what: &String| {
        let (before, now) = (a.get(what).copied().unwrap_or((0, 0)), b.get(what).copied().unwrap_or((0, 0)));
        Difference { what: what.clone(), before: show(before), now: show(now), worse: now.1 > before.1 }
    };
    [workload].into_iter().chain(keys.into_iter().map(row)).collect()
}

fn describe(r: &CoverageResults) -> String {
    let w = &r.workload;
    format!("{}, {} robots, {} cameras, {} tokens, {} steps", w.model, w.batch, w.cameras, w.tokens, w.steps)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::results::{Environment, ModuleResult};

    fn result(passed: bool, error: Option<f64>) -> CheckResults {
        let line = Line {
            name: "out".into(),
            passed,
            pcc: Some(1.0),
            relative_l2: error,
            max_abs: None,
            worst_index: None,
            bound: 1e-5,
            error: None,
        };
        CheckResults {
            environment: Environment::here("cpu", String::new()),
            mode: "quick".into(),
            model: None,
            format: "f32".into(),
            passed,
            culprits: vec![],
            modules: vec![ModuleResult {
                module: "pi0".into(),
                setup: "odd".into(),
                passed,
                worst: Some(line.clone()),
                seconds: 0.0,
                judge_seconds: 0.0,
                host_ops: vec![],
                error: None,
                first_tap: None,
            }],
            taps: vec![line],
            golden: vec![],
        }
    }

    #[test]
    fn what_is_worse() {
        let before = result(true, Some(1e-6));
        let worse = |now: CheckResults| checks(&before, &now, 4.0).iter().filter(|d| d.worse).count();
        assert_eq!(worse(result(true, Some(1e-6))), 0);
        assert_eq!(worse(result(true, Some(3.9e-6))), 0);
        assert_eq!(worse(result(true, Some(5e-6))), 2);
        assert_eq!(worse(result(false, Some(1e-6))), 2);
        assert_eq!(worse(result(true, None)), 2);
        assert_eq!(worse(CheckResults { modules: vec![], ..result(true, Some(1e-7)) }), 1);
        // Another number format rounds otherwise; only its verdict counts.
        let bf16 = |passed| CheckResults { format: "bf16".into(), ..result(passed, Some(1e-2)) };
        assert_eq!((worse(bf16(true)), worse(bf16(false))), (0, 2));
    }
}
