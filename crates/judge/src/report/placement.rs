//! Where the time goes, what runs where, and what to move next.

use pi0_device::Kind;

use super::html::{Cell, escape, figure, table};
use super::svg::{Bar, bars};
use crate::coverage::roadmap;
use crate::results::{CoverageResults, Row, Stage};

/// The sections made from `pi0 coverage`.
pub fn sections(c: &CoverageResults) -> String {
    time(c) + &placement(c) + &plan(c)
}

/// Pieces of bars: the kinds, then the moves.
fn piece_names() -> Vec<&'static str> {
    Kind::ALL.iter().map(|k| k.name()).chain(["upload", "download"]).collect()
}

fn time(c: &CoverageResults) -> String {
    let names = piece_names();
    // What takes no width would only be a name.
    let visible = |s: &&Stage| s.end - s.start >= 1e-3 * c.total_seconds;
    let rows: Vec<Bar> = c
        .stages
        .iter()
        .filter(visible)
        .map(|s| Bar {
            name: s.name.clone(),
            start: s.start * 1e3,
            pieces: s
                .kinds
                .iter()
                .map(|(kind, t)| (names.iter().position(|n| n == kind).unwrap_or(0), t * 1e3))
                .collect(),
            label: milliseconds((s.end - s.start) * 1e3),
        })
        .collect();
    let mut out = String::from("<section><h2>Where the time goes</h2>");
    out += &figure(
        "Stages of one inference that take a thousandth of it or more, by kind of operation",
        &bars("ms", &names, &rows),
    );
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
            label: format!("{}, {:.1} %", milliseconds(t), 100.0 * t / total),
        })
        .collect();
    out += &figure(
        "The same, summed by kind. A fused call counts as its linear layer",
        &bars("ms", &names, &rows),
    );
    out + "</section>"
}

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

fn plan(c: &CoverageResults) -> String {
    let mut out = String::from("<section><h2>What to move next</h2>");
    if c.roadmap.is_empty() {
        return out + "<p>Nothing: every operation runs on the device.</p></section>";
    }
    let rows: Vec<Vec<Cell>> = c
        .roadmap
        .iter()
        .map(|f| {
            let cells = roadmap::cells(f).into_iter().zip(roadmap::COLUMNS);
            let cell = |(text, column): (String, &str)| match column {
                "to move" | "known by" => Cell::Text(text),
                "priority" => {
                    Cell::Raw(format!("<span class=p-{}>{}</span>", text.to_lowercase(), escape(&text)))
                }
                _ => Cell::Number(text),
            };
            cells.map(cell).chain([Cell::text(f.modules.join(", "))]).collect()
        })
        .collect();
    let columns: Vec<&str> = roadmap::COLUMNS.into_iter().chain(["modules"]).collect();
    out += &table(&columns, &rows);
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

/// Three digits.
fn milliseconds(t: f64) -> String {
    let digits = if t < 1.0 { 3 } else { usize::from(t < 10.0) + usize::from(t < 100.0) };
    format!("{t:.digits$} ms")
}
