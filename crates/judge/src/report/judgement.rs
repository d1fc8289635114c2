//! The judgement of another implementation as a page.

use super::html::{Cell, escape, facts, figure, table};
use super::page::{CLOSE, open, tile};
use super::placement;
use super::svg::{Series, gauge, lines};
use crate::dump::{Cause, Tap, Verdict};

/// The whole page.
pub fn page(v: &Verdict) -> String {
    let mut out = open("π0 judgement") + "<header><h1>Is this π0?</h1><div class=tiles>";
    let agree = v.taps.iter().filter(|t| t.line.passed).count();
    let what = format!("intermediates agree: {}", if v.passed { "all right" } else { "FAIL" });
    out += &tile(&format!("{agree} of {}", v.taps.len()), &what, Some(v.passed));
    if !v.causes.is_empty() {
        out += &tile(&v.causes.len().to_string(), "known mistakes found", Some(false));
    }
    if let Some(c) = &v.coverage {
        let share = c.share();
        let what = format!("of {} operations on the device", share.total_ops);
        out += &tile(&format!("{:.1} %", 100.0 * share.ops), &what, None);
    }
    out += "</div>";
    let source = v.source.clone().unwrap_or_else(|| "unknown".into());
    out += &facts(&[
        ("dump", format!("{}, made by {source}", v.dump)),
        ("checkpoint", v.model.clone()),
        ("tolerances for", format!("{}, {} steps", v.format, v.steps)),
    ]);
    out += "</header>";
    out += &causes(v);
    out += &taps(v);
    if let Some(c) = &v.coverage {
        out += &placement::sections(c);
    }
    out + CLOSE
}

fn causes(v: &Verdict) -> String {
    let mut out = String::from("<section><h2>What is wrong</h2>");
    if v.passed {
        return out + "<p>Nothing that shows: every intermediate agrees with the reference.</p></section>";
    }
    if let Some(first) = &v.first {
        out += &format!("<p class=alert>First to differ: <b>{}</b>.</p>", escape(first));
    }
    let row = |c: &Cause| {
        let or: String = c.or.iter().map(|other| format!("; or: {other}")).collect();
        let lean = if c.within_tolerance { " (within the tolerance, by its direction)" } else { "" };
        vec![
            Cell::text(&c.name),
            Cell::text(format!("{}{lean}{or}", c.what)),
            Cell::text(&c.at),
            Cell::number(format!("{:.1e}", c.before)),
            Cell::number(format!("{:.1e}", c.after)),
        ]
    };
    if !v.causes.is_empty() {
        let header =
            ["mistake", "what is done, and what the network wants", "shows at", "differs by", "with it made"];
        out += &table(&header, &v.causes.iter().map(row).collect::<Vec<_>>());
        out += "<p class=note>Each mistake was made on the reference; the difference that is left is in the last column.</p>";
    }
    if let Some(rest) = &v.unexplained {
        out += &format!("<p>No known mistake explains the difference at <b>{}</b>.</p>", escape(rest));
    }
    out += &v.notes.iter().map(|n| format!("<p class=alert>{}</p>", escape(n))).collect::<String>();
    out + "</section>"
}

fn taps(v: &Verdict) -> String {
    let number = |x: Option<f64>| x.map_or("–".into(), |x| format!("{x:.1e}"));
    let row = |t: &Tap| {
        let l = &t.line;
        vec![
            Cell::text(&l.name),
            Cell::number(l.pcc.map_or("–".into(), |p| format!("{p:.6}"))),
            Cell::number(number(l.relative_l2)),
            Cell::number(number(Some(l.bound))),
            Cell::Raw(gauge(l.relative_l2.unwrap_or(f64::MAX), l.bound.max(1e-300))),
            Cell::number(number(l.max_abs)),
            Cell::number(number(t.explained_l2)),
            Cell::text(t.place.clone().unwrap_or_default()),
            Cell::Mark(
                l.passed,
                l.error.clone().unwrap_or_else(|| if l.passed { "ok" } else { "FAIL" }.into()),
            ),
        ]
    };
    let points = |f: fn(&Tap) -> Option<f64>| -> Vec<(f64, f64)> {
        v.taps.iter().enumerate().filter_map(|(i, t)| Some((i as f64, f(t)?))).collect()
    };
    let mut series =
        vec![Series { name: "against the reference".into(), points: points(|t| t.line.relative_l2) }];
    if !v.causes.is_empty() {
        let name = "with the mistakes made on the reference".into();
        series.push(Series { name, points: points(|t| t.explained_l2) });
    }
    let bound = v.taps.first().map(|t| t.line.bound);
    let mut out = String::from("<section><h2>Every intermediate, in the order that they are made</h2>");
    out += &figure("How the difference grows", &lines("intermediate", "relative L2", &series, bound));
    let header = [
        "intermediate",
        "PCC",
        "relative L2",
        "tolerance",
        "six decades up to it",
        "max abs",
        "L2 explained",
        "ran on",
        "verdict",
    ];
    out += &table(&header, &v.taps.iter().map(row).collect::<Vec<_>>());
    out + "</section>"
}
