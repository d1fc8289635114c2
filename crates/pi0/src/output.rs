//! What people see: tables, progress bars, files.

use std::io::{ErrorKind, Write};
use std::path::Path;

use anyhow::{Context, Result};
use indicatif::{ProgressBar, ProgressStyle};
pub use pi0_judge::text::table;

/// Prints to standard output. A reader that has gone away (`pi0 … | head`) is no error.
pub fn print(text: &str) -> Result<()> {
    match std::io::stdout().write_all(text.as_bytes()) {
        Err(e) if e.kind() != ErrorKind::BrokenPipe => Err(e).context("cannot write to standard output"),
        _ => Ok(()),
    }
}

/// Two columns: what, and its value.
pub fn facts(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.chars().count()).max().unwrap_or(0);
    rows.iter().map(|(name, value)| format!("{name:width$}  {value}\n")).collect()
}

/// A progress bar over bytes on standard error; silent where that is no terminal.
pub fn progress(what: &str, bytes: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {bytes}/{total_bytes} {eta}");
    let bar = ProgressBar::new(bytes).with_message(what.to_string());
    style.map_or(bar.clone(), |style| bar.with_style(style))
}

/// A spinner with the time so far on standard error, until it is dropped; silent where that is no terminal.
pub fn spinner(what: &str) -> Spinner {
    let bar = ProgressBar::new_spinner().with_message(what.to_string());
    let bar = match ProgressStyle::with_template("{spinner} {msg} {elapsed}") {
        Ok(style) => bar.with_style(style),
        Err(_) => bar,
    };
    bar.enable_steady_tick(std::time::Duration::from_millis(200));
    Spinner(bar)
}

/// See [`spinner`].
pub struct Spinner(ProgressBar);

impl Drop for Spinner {
    fn drop(&mut self) {
        self.0.finish_and_clear();
    }
}

/// `7.0 GB`, `812 MB`, `3 kB`.
pub fn size(bytes: u64) -> String {
    match bytes {
        1_000_000_000.. => format!("{:.1} GB", bytes as f64 / 1e9),
        1_000_000.. => format!("{:.1} MB", bytes as f64 / 1e6),
        _ => format!("{} kB", bytes.div_ceil(1000)),
    }
}

/// Writes JSON for machines; `-` is standard output.
pub fn write_json(path: &Path, value: &impl serde::Serialize) -> Result<()> {
    let text = serde_json::to_string_pretty(value)? + "\n";
    if path == Path::new("-") {
        return print(&text);
    }
    std::fs::write(path, text).with_context(|| format!("cannot write {}", path.display()))
}

/// A progress bar over a number of things on standard error; silent where that is no terminal.
pub fn counter(what: &str, count: u64) -> ProgressBar {
    let style = ProgressStyle::with_template("{msg} {wide_bar} {pos}/{len} {eta}");
    let bar = ProgressBar::new(count).with_message(what.to_string());
    style.map_or(bar.clone(), |style| bar.with_style(style))
}
