//! Is every module right, and how errors grow.

use super::html::{Cell, escape, figure, table};
use super::svg::{Series, gauge, lines};
use crate::results::{CheckResults, Line};

/// Every module once.
pub fn names(c: &CheckResults) -> Vec<&str> {
    c.modules.iter().fold(Vec::new(), |mut seen, m| {
        if !seen.contains(&m.module.as_str()) {
            seen.push(&m.module);
        }
        seen
    })
}

/// Whether a module passed in every round.
pub fn module_passed(c: &CheckResults, name: &str) -> bool {
    c.modules.iter().filter(|m| m.module == name).all(|m| m.passed)
}

/// The sections made from `pi0 check`.
pub fn sections(c: &CheckResults) -> String {
    let mut out = String::from("<section><h2>Is every module right?</h2>");
    if !c.culprits.is_empty() {
        out += &format!(
            "<p class=alert>At fault: <b>{}</b>. The other failures contain these.</p>",
            escape(&c.culprits.join(", "))
        );
    }
    let number = |x: Option<f64>| x.map_or("–".into(), |x| format!("{x:.1e}"));
    let rows: Vec<Vec<Cell>> = names(c)
        .into_iter()
        .map(|name| {
            let rounds: Vec<_> = c.modules.iter().filter(|m| m.module == name).collect();
            let strain = |l: &&Line| l.relative_l2.map_or(f64::INFINITY, |r| r / l.bound.max(1e-300));
            let lines = rounds.iter().filter_map(|m| m.worst.as_ref());
            let worst = lines.max_by(|a, b| {
                (!a.passed, strain(a))
                    .partial_cmp(&(!b.passed, strain(b)))
                    .unwrap_or(std::cmp::Ordering::Equal)
            });
            let passed = module_passed(c, name);
            let why = rounds.iter().find(|m| !m.passed).map(|m| {
                m.error.clone().or(m.first_tap.as_ref().map(|t| format!("first: {t}"))).unwrap_or_default()
            });
            vec![
                Cell::text(name),
                Cell::number(worst.and_then(|l| l.pcc).map_or("–".into(), |p| format!("{p:.8}"))),
                Cell::number(number(worst.and_then(|l| l.relative_l2))),
                Cell::number(number(worst.map(|l| l.bound))),
                Cell::Raw(worst.map_or(String::new(), |l| {
                    gauge(l.relative_l2.unwrap_or(f64::MAX), l.bound.max(1e-300))
                })),
                Cell::number(number(worst.and_then(|l| l.max_abs))),
                Cell::number(format!("{:.0} ms", 1e3 * rounds.iter().map(|m| m.seconds).sum::<f64>())),
                Cell::Mark(passed, why.map_or("pass".into(), |w| format!("FAIL {w}"))),
            ]
        })
        .collect();
    out += &table(
        &["module", "PCC", "relative L2", "threshold", "six decades up to it", "max abs", "time", "verdict"],
        &rows,
    );
    out += "</section>";

    // The round with the most taps has the deepest towers.
    let setup = |l: &Line| l.name.split(": ").next().unwrap_or_default().to_string();
    let mut rounds: Vec<(String, usize)> = Vec::new();
    for l in &c.taps {
        match rounds.iter_mut().find(|(name, _)| *name == setup(l)) {
            Some((_, n)) => *n += 1,
            None => rounds.push((setup(l), 1)),
        }
    }
    let Some((round, _)) = rounds.into_iter().max_by_key(|(_, n)| *n) else { return out };
    let taps: Vec<_> = c.taps.iter().filter(|l| setup(l) == round).collect();
    let bound = taps.first().map(|l| l.bound);
    let layers = |measure: fn(&Line) -> Option<f64>| {
        let series = [
            ("vision", "vision.layer", ".out"),
            ("language model", "prefix.layer", ".k_cache"),
            ("action expert, first step", "step0.suffix.layer", ".out"),
        ];
        let series = series.map(|(name, start, end)| numbered(&taps, name, start, end, measure));
        series.into_iter().filter(|s| !s.points.is_empty()).collect::<Vec<_>>()
    };
    let steps = [("velocity v_t", ".v_t"), ("actions x", ".x_next")]
        .map(|(name, end)| numbered(&taps, name, "step", end, |l| l.relative_l2));
    out += &format!(
        "<section><h2>How errors grow</h2><p>The whole network on the weights and inputs <i>{}</i>, operation by operation.</p><div class=charts>",
        escape(&round)
    );
    out += &figure(
        "Correlation by layer: what is missing to 1",
        &lines("layer", "1 − PCC", &layers(|l| l.pcc.map(|p| 1.0 - p)), None),
    );
    out += &figure(
        "Error through the towers",
        &lines("layer", "relative L2", &layers(|l| l.relative_l2), bound),
    );
    out += &figure("Error through the denoising steps", &lines("step", "relative L2", &steps, bound));
    out + "</div></section>"
}

/// Points of the taps `{start}{number}{end}`.
fn numbered(
    taps: &[&Line],
    name: &str,
    start: &str,
    end: &str,
    measure: impl Fn(&Line) -> Option<f64>,
) -> Series {
    let point = |l: &&Line| {
        let tap = l.name.split(": ").nth(1)?;
        let number: f64 = tap.strip_prefix(start)?.strip_suffix(end)?.parse().ok()?;
        Some((number, measure(l)?.max(0.0)))
    };
    Series { name: name.into(), points: taps.iter().filter_map(point).collect() }
}
