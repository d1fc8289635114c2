//! The page, section by section.

use std::fmt::Write as _;

use pi0_device::Kind;
use serde::Serialize;

use super::html::{Cell, escape, table};
use super::svg::{Bar, Series, bars, gauge, lines};
use crate::results::{CheckResults, CoverageResults, Environment, Line, Row};

/// What the page is made of.
#[derive(Debug, Clone, Serialize)]
pub struct Report {
    /// Results of `pi0 check`.
    pub check: Option<CheckResults>,
    /// Results of `pi0 coverage`.
    pub coverage: Option<CoverageResults>,
    /// Results of `pi0 bench`, as they were written.
    pub bench: Vec<serde_json::Value>,
}

const STYLE: &str = include_str!("style.css");

/// The whole page.
pub fn page(report: &Report) -> String {
    let mut out = String::from("<!doctype html><html lang=en><head><meta charset=utf-8>");
    out += "<meta name=viewport content='width=device-width,initial-scale=1'><title>π0 device report</title>";
    let _ = write!(out, "<style>{STYLE}</style></head><body><main>");
    out += &header(report);
    if let Some(check) = &report.check {
        out += &accuracy(check);
    }
    if let Some(coverage) = &report.coverage {
        out += &time(coverage);
        out += &placement(coverage);
        out += &plan(coverage);
    }
    for bench in &report.bench {
        out += &format!("<section><h2>Benchmark</h2>{}</section>", json(bench));
    }
    out + "</main></body></html>\n"
}

fn header(report: &Report) -> String {
    let check = report.check.as_ref();
    let coverage = report.coverage.as_ref();
    let environment = check.map(|c| &c.environment).or(coverage.map(|c| &c.environment));
    let device = environment.map_or("no device", |e| e.device.as_str());
    let mut out = format!("<header><h1>π0 on {}</h1>", escape(device));
    out += "<div class=tiles>";
    if let Some(c) = check {
        let modules = names(c);
        let failed = modules.iter().filter(|m| !module_passed(c, m)).count();
        let word = if c.passed { "all pass" } else { "FAIL" };
        out += &tile(
            &format!("{} of {}", modules.len() - failed, modules.len()),
            &format!("modules right: {word}"),
            Some(c.passed),
        );
    }
    if let Some(c) = coverage {
        let share = c.share();
        let percent = |x: f64| format!("{:.1} %", 100.0 * x);
        out += &tile(&percent(share.ops), &format!("of {} operations on the device", share.total_ops), None);
        out += &tile(
            &percent(share.flop),
            &format!("of {:.2} GFLOP on the device", share.total_flop as f64 / 1e9),
            None,
        );
        out += &tile(&percent(share.time), "of the operations' time on the device", None);
        out += &tile(&format!("{:.1} ms", c.total_seconds * 1e3), "one inference, traced", None);
    }
    out += "</div>";
    if let Some(e) = environment {
        out += &facts(e, report);
    }
    out + "</header>"
}

fn tile(value: &str, what: &str, good: Option<bool>) -> String {
    let class = match good {
        Some(true) => " good",
        Some(false) => " bad",
        None => "",
    };
    format!("<div class='tile{class}'><b>{}</b><span>{}</span></div>", escape(value), escape(what))
}

fn facts(e: &Environment, report: &Report) -> String {
    let mut rows = vec![
        ("device", format!("{}: {}", e.device, e.device_detail)),
        ("host", format!("{}, {}", e.processor, e.system)),
        ("program", format!("pi0 {}, commit {}", e.version, e.commit.as_deref().unwrap_or("unknown"))),
        ("made", date(e.time)),
    ];
    if !e.optimized {
        rows.push(("warning", "built without optimization: times mean nothing".into()));
    }
    if let Some(c) = &report.check {
        let model = c.model.as_deref().unwrap_or("small random networks");
        rows.push(("checked", format!("{model}, mode {}, thresholds for {}", c.mode, c.format)));
    }
    if let Some(c) = &report.coverage {
        let w = &c.workload;
        let mut what = format!(
            "{}: {} robot(s), {} camera(s), {} tokens, {} steps; median of {}; host: {}",
            w.model, w.batch, w.cameras, w.tokens, w.steps, w.runs, w.host
        );
        if !w.forced.is_empty() {
            what += &format!("; forced to the host: {}", w.forced.join(", "));
        }
        rows.push(("measured", what));
    }
    let line = |(k, v): &(&str, String)| format!("<dt>{k}</dt><dd>{}</dd>", escape(v));
    format!("<dl>{}</dl>", rows.iter().map(line).collect::<String>())
}

/// `2026-11-23 00:15 UTC`, from seconds since 1970 (Howard Hinnant's civil-from-days).
fn date(seconds: u64) -> String {
    let (days, rest) = (seconds / 86400, seconds % 86400);
    let z = days + 719_468;
    let (era, doe) = (z / 146_097, z % 146_097);
    let yoe = (doe - doe / 1460 + doe / 36524 - doe / 146_096) / 365;
    let doy = doe - (365 * yoe + yoe / 4 - yoe / 100);
    let mp = (5 * doy + 2) / 153;
    let (day, month) = (doy - (153 * mp + 2) / 5 + 1, if mp < 10 { mp + 3 } else { mp - 9 });
    let year = yoe + era * 400 + u64::from(month <= 2);
    format!("{year}-{month:02}-{day:02} {:02}:{:02} UTC", rest / 3600, rest % 3600 / 60)
}

fn names(c: &CheckResults) -> Vec<&str> {
    c.modules.iter().fold(Vec::new(), |mut seen, m| {
        if !seen.contains(&m.module.as_str()) {
            seen.push(&m.module);
        }
        seen
    })
}

fn module_passed(c: &CheckResults, name: &str) -> bool {
    c.modules.iter().filter(|m| m.module == name).all(|m| m.passed)
}

// ---- accuracy ----

fn accuracy(c: &CheckResults) -> String {
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

fn figure(title: &str, chart: &str) -> String {
    format!("<figure><figcaption>{}</figcaption>{chart}</figure>", escape(title))
}

// ---- time ----

/// Pieces of bars: the kinds, then the moves.
fn piece_names() -> Vec<&'static str> {
    Kind::ALL.iter().map(|k| k.name()).chain(["upload", "download"]).collect()
}

fn time(c: &CoverageResults) -> String {
    let names = piece_names();
    let rows: Vec<Bar> = c
        .stages
        .iter()
        .map(|s| Bar {
            name: s.name.clone(),
            start: s.start * 1e3,
            pieces: s
                .kinds
                .iter()
                .map(|(kind, t)| (names.iter().position(|n| n == kind).unwrap_or(0), t * 1e3))
                .collect(),
            label: format!("{:.1} ms", (s.end - s.start) * 1e3),
        })
        .collect();
    let mut out = String::from("<section><h2>Where the time goes</h2>");
    out += &figure("Stages of one inference, by kind of operation", &bars("ms", &names, &rows));
    let mut kinds: Vec<(usize, f64)> = (0..names.len()).map(|i| (i, 0.0)).collect();
    for (kind, t) in c.stages.iter().flat_map(|s| &s.kinds) {
        if let Some(i) = names.iter().position(|n| n == kind) {
            kinds[i].1 += t * 1e3;
        }
    }
    kinds.retain(|(_, t)| *t > 0.0);
    kinds.sort_by(|a, b| b.1.total_cmp(&a.1));
    let total = c.total_seconds * 1e3;
    let rows: Vec<Bar> = kinds
        .into_iter()
        .map(|(i, t)| Bar {
            name: names[i].into(),
            start: 0.0,
            pieces: vec![(i, t)],
            label: format!("{t:.1} ms, {:.0} %", 100.0 * t / total),
        })
        .collect();
    out += &figure(
        "The same, summed by kind. A fused call counts as its linear layer",
        &bars("ms", &names, &rows),
    );
    out + "</section>"
}

// ---- placement ----

fn placement(c: &CoverageResults) -> String {
    let pieces = ["on the device", "on the host", "transfers of fallbacks"];
    let modules = c.rows.iter().fold(Vec::<&str>::new(), |mut seen, r| {
        if !seen.contains(&r.module.as_str()) {
            seen.push(&r.module);
        }
        seen
    });
    let bar = |name: &str, rows: Vec<&Row>| {
        let sum = |f: fn(&Row) -> f64| 1e3 * rows.iter().map(|r| f(r)).sum::<f64>();
        let ops = |f: fn(&Row) -> u64| rows.iter().map(|r| f(r)).sum::<u64>();
        let (device, all) = (ops(|r| r.device.ops), ops(|r| r.device.ops + r.host.ops));
        Bar {
            name: name.into(),
            start: 0.0,
            pieces: vec![
                (0, sum(|r| r.device.seconds + r.device.transfer_seconds)),
                (1, sum(|r| r.host.seconds)),
                (2, sum(|r| r.host.transfer_seconds)),
            ],
            label: format!("{device} of {all} ops"),
        }
    };
    let by_module: Vec<Bar> =
        modules.iter().map(|m| bar(m, c.rows.iter().filter(|r| r.module == *m).collect())).collect();
    let by_kind: Vec<Bar> = Kind::ALL
        .iter()
        .map(|k| bar(k.name(), c.rows.iter().filter(|r| r.kind == k.name()).collect()))
        .filter(|b| !b.label.ends_with(" 0 ops"))
        .collect();
    let mut out = String::from("<section><h2>What runs where</h2>");
    out += &figure("By module", &bars("ms", &pieces, &by_module));
    out += &figure("By kind of operation", &bars("ms", &pieces, &by_kind));
    let rows: Vec<Vec<Cell>> = c
        .transfers
        .iter()
        .map(|t| {
            let module = if t.module.is_empty() { "outside" } else { &t.module };
            vec![
                Cell::text(&t.what),
                Cell::text(module),
                Cell::number(t.count.to_string()),
                Cell::number(format!("{:.3}", t.bytes as f64 / 1e6)),
                Cell::number(format!("{:.3}", t.seconds * 1e3)),
            ]
        })
        .collect();
    out += "<h3>Transfers across the bus</h3>";
    out + &table(&["what", "module", "count", "MB", "ms"], &rows) + "</section>"
}

// ---- roadmap ----

fn plan(c: &CoverageResults) -> String {
    let mut out = String::from("<section><h2>What to move next</h2>");
    if c.roadmap.is_empty() {
        return out + "<p>Nothing: every operation runs on the device.</p></section>";
    }
    let ms = |s: f64| Cell::number(format!("{:.2}", s * 1e3));
    let rows: Vec<Vec<Cell>> = c
        .roadmap
        .iter()
        .map(|f| {
            vec![
                Cell::text(&f.op),
                Cell::Raw(format!(
                    "<span class=p-{}>{}</span>",
                    f.priority.to_lowercase(),
                    escape(&f.priority)
                )),
                Cell::number(f.count.to_string()),
                ms(f.host_seconds),
                ms(f.transfer_seconds),
                ms(f.device_seconds),
                Cell::text(&f.basis),
                Cell::number(format!("{:.2}×", f.speedup)),
                Cell::number(format!("{:.2}×", f.cumulative_speedup)),
                Cell::number(format!("{:.1} %", 100.0 * f.coverage)),
                Cell::text(f.modules.join(", ")),
            ]
        })
        .collect();
    out += &table(
        &[
            "operation",
            "priority",
            "calls",
            "host ms",
            "transfer ms",
            "device ms",
            "known by",
            "alone",
            "with all above",
            "coverage",
            "modules",
        ],
        &rows,
    );
    let steps: Vec<Bar> = [("now".to_string(), 1.0)]
        .into_iter()
        .chain(c.roadmap.iter().map(|f| (format!("+ {}", f.op), f.cumulative_speedup)))
        .map(|(name, speedup)| {
            let time = 1e3 * c.total_seconds / speedup;
            Bar { name, start: 0.0, pieces: vec![(0, time)], label: format!("{time:.1} ms, {speedup:.2}×") }
        })
        .collect();
    out += &figure(
        "Predicted time of an inference after each move",
        &bars("ms", &["time of an inference"], &steps),
    );
    if let Some(v) = &c.verified {
        out += &format!(
            "<p>Prediction for an inference without the force: {:.2} ms. Measured: {:.2} ms ({:+.1} %).</p>",
            v.predicted_seconds * 1e3,
            v.measured_seconds * 1e3,
            100.0 * v.error
        );
    }
    out + "</section>"
}

// ---- whatever a benchmark wrote ----

/// Objects as lists of facts, lists of objects as tables.
fn json(value: &serde_json::Value) -> String {
    use serde_json::Value;
    let plain = |v: &Value| match v {
        Value::String(s) => s.clone(),
        Value::Number(n) => match (n.as_i64(), n.as_f64()) {
            (None, Some(x)) => format!("{x:.4}"),
            _ => n.to_string(),
        },
        Value::Array(items) if items.len() > 8 => format!("{} values", items.len()),
        other => other.to_string(),
    };
    match value {
        Value::Array(items) if items.iter().all(Value::is_object) && !items.is_empty() => {
            let header: Vec<&str> =
                items[0].as_object().into_iter().flatten().map(|(k, _)| k.as_str()).collect();
            let cell = |v: &Value| if v.is_number() { Cell::Number(plain(v)) } else { Cell::Text(plain(v)) };
            let row = |item: &Value| header.iter().map(|h| cell(&item[h])).collect();
            table(&header, &items.iter().map(row).collect::<Vec<_>>())
        }
        Value::Object(map) => {
            let nested =
                |v: &Value| v.as_array().is_some_and(|a| a.iter().any(Value::is_object)) || v.is_object();
            let facts: String = map
                .iter()
                .filter(|(_, v)| !nested(v))
                .map(|(k, v)| format!("<dt>{}</dt><dd>{}</dd>", escape(k), escape(&plain(v))))
                .collect();
            let rest: String = map
                .iter()
                .filter(|(_, v)| nested(v))
                .map(|(k, v)| format!("<h3>{}</h3>{}", escape(k), json(v)))
                .collect();
            format!("<dl>{facts}</dl>{rest}")
        }
        other => format!("<p>{}</p>", escape(&plain(other))),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(date(0), "1970-01-01 00:00 UTC");
        assert_eq!(date(951_827_696), "2000-02-29 12:34 UTC");
        assert_eq!(date(1_795_392_000), "2026-11-23 00:00 UTC");
    }

    #[test]
    fn a_page_fetches_nothing() {
        let bench = vec![serde_json::json!({"median_ms": 12.5, "ops": [{"op": "<linear>", "ms": 3}]})];
        let html = page(&Report { check: None, coverage: None, bench });
        assert!(html.contains("&lt;linear&gt;") && html.contains("12.5"));
        for word in ["http:", "https:", "<script", "<link", "@import", "url("] {
            assert!(!html.contains(word), "{word}");
        }
    }
}
