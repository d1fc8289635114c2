//! The page, section by section.

use std::fmt::Write as _;

use super::accuracy::{self, module_passed, names};
use super::html::escape;
use super::placement;
use crate::results::{CheckResults, CoverageResults, Environment};

const STYLE: &str = include_str!("style.css");

/// The whole page: results of `pi0 check` and of `pi0 coverage`, and whatever sections the caller adds.
pub fn page(check: Option<&CheckResults>, coverage: Option<&CoverageResults>, more: &[String]) -> String {
    let mut out = open("π0 device report");
    out += &header(check, coverage);
    if let Some(check) = check {
        out += &accuracy::sections(check);
    }
    if let Some(coverage) = coverage {
        out += &placement::sections(coverage);
    }
    out += &more.concat();
    out + CLOSE
}

/// A page around sections: style and all, nothing to fetch.
pub fn frame(title: &str, sections: &str) -> String {
    open(title) + sections + CLOSE
}

/// The beginning of a page.
pub(super) fn open(title: &str) -> String {
    let mut out = String::from("<!doctype html><html lang=en><head><meta charset=utf-8>");
    out += "<meta name=viewport content='width=device-width,initial-scale=1'>";
    let _ = write!(out, "<title>{}</title><style>{STYLE}</style></head><body><main>", escape(title));
    out
}

/// The end of a page.
pub(super) const CLOSE: &str = "</main></body></html>\n";

fn header(check: Option<&CheckResults>, coverage: Option<&CoverageResults>) -> String {
    let place = check.map(|c| &c.environment).or(coverage.map(|c| &c.environment));
    let device = place.map_or("no device", |e| e.device.as_str());
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
    if let Some(e) = place {
        out += &environment(e, check, coverage);
    }
    out + "</header>"
}

pub(super) fn tile(value: &str, what: &str, good: Option<bool>) -> String {
    let class = match good {
        Some(true) => " good",
        Some(false) => " bad",
        None => "",
    };
    format!("<div class='tile{class}'><b>{}</b><span>{}</span></div>", escape(value), escape(what))
}

fn environment(e: &Environment, check: Option<&CheckResults>, coverage: Option<&CoverageResults>) -> String {
    let mut rows = vec![
        ("device", format!("{}: {}", e.device, e.device_detail)),
        ("host", format!("{}, {}", e.processor, e.system)),
        ("program", format!("pi0 {}, commit {}", e.version, e.commit.as_deref().unwrap_or("unknown"))),
        ("made", date(e.time)),
    ];
    if !e.optimized {
        rows.push(("warning", "built without optimization: times mean nothing".into()));
    }
    if let Some(c) = check {
        let model = c.model.as_deref().unwrap_or("small random networks");
        rows.push(("checked", format!("{model}, mode {}, thresholds for {}", c.mode, c.format)));
    }
    if let Some(c) = coverage {
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
    super::html::facts(&rows)
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn dates() {
        assert_eq!(date(0), "1970-01-01 00:00 UTC");
        assert_eq!(date(951_827_696), "2000-02-29 12:34 UTC");
        assert_eq!(date(1_795_392_000), "2026-11-23 00:00 UTC");
    }
}
