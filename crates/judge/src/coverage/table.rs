//! The results for a terminal.

use super::roadmap;
use crate::results::{CoverageResults, Ratio};
use crate::text;

fn ms(seconds: f64) -> String {
    format!("{:.2}", seconds * 1e3)
}

/// The results in words and tables.
pub fn table(r: &CoverageResults) -> String {
    let mut out = String::new();
    let header =
        ["module", "kind", "on device", "on host", "GFLOP", "MB", "device ms", "host ms", "transfer ms"];
    let rows = r.rows.iter().map(|row| {
        let (d, h) = (&row.device, &row.host);
        vec![
            row.module.clone(),
            row.kind.clone(),
            d.ops.to_string(),
            h.ops.to_string(),
            format!("{:.3}", (d.flop + h.flop) as f64 / 1e9),
            format!("{:.1}", (d.bytes + h.bytes) as f64 / 1e6),
            ms(d.seconds),
            ms(h.seconds),
            ms(h.transfer_seconds),
        ]
    });
    out += &text::table(&header.map(String::from), rows);

    out += "\n";
    let share = r.share();
    out += &format!(
        "coverage: {:.1} % of {} operations, {:.1} % of {:.2} GFLOP, {:.1} % of the operations' time; {} ms in all\n",
        100.0 * share.ops,
        share.total_ops,
        100.0 * share.flop,
        share.total_flop as f64 / 1e9,
        100.0 * share.time,
        ms(r.total_seconds)
    );
    if !r.transfers.is_empty() {
        out += "\n";
        let header = ["transfer", "module", "count", "MB", "ms"];
        let rows = r.transfers.iter().map(|t| {
            let size = format!("{:.3}", t.bytes as f64 / 1e6);
            vec![t.what.clone(), t.module.clone(), t.count.to_string(), size, ms(t.seconds)]
        });
        out += &text::table(&header.map(String::from), rows);
    }
    if !r.roadmap.is_empty() {
        out += "\n";
        let rows = r.roadmap.iter().map(|f| roadmap::cells(f).to_vec());
        out += &text::table(&roadmap::COLUMNS.map(String::from), rows);
    }
    if let Some(o) = &r.overhead {
        let percent = |ratio: &Ratio| {
            let [low, median, high] = [ratio.low, ratio.median, ratio.high].map(|x| 100.0 * x);
            format!("{median:+.2} % (95 % confidence: {low:+.2} to {high:+.2})")
        };
        out += &format!(
            "\ntracing {} records costs {}; two runs on the bare device, which records nothing, differ by {}; \
             {} of each in turn, {} ms\n",
            o.records,
            percent(&o.traced),
            percent(&o.control),
            o.rounds,
            ms(o.plain_seconds)
        );
    }
    if let Some(v) = &r.verified {
        out += &format!(
            "\nforced {} ms; predicted without {} ms, measured {} ms: {:+.1} %\n",
            ms(v.forced_seconds),
            ms(v.predicted_seconds),
            ms(v.measured_seconds),
            100.0 * v.error
        );
    }
    out
}
