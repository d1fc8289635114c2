//! `pi0 compare`: two results of `check` or `coverage`, so that what got worse fails.

use std::path::PathBuf;

use anyhow::{Result, bail};
use pi0_judge::compare::{Difference, differences};
use pi0_judge::results::Results;

use crate::output;

/// Compare two results of `pi0 check --json` or `pi0 coverage --json`; fail if the second is worse
#[derive(clap::Args)]
#[command(after_help = "Example:
  pi0 check --dtype f32 --json now.json && pi0 compare baselines/check-cpu-f32.json now.json

Worse is: a module that no longer passes or is missing, an error that grew by more than the factor, an operation
that moved to the host. Between different devices or number formats errors differ by nature and are only shown. Times
are never judged.")]
pub struct Args {
    /// Results before
    before: PathBuf,
    /// Results now
    now: PathBuf,
    /// How much an error may grow: rounding differs between processors
    #[arg(long, value_name = "N", default_value_t = 4.0, value_parser = parse_factor)]
    factor: f64,
    /// Write the differences as JSON to this file (`-` for standard output)
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

fn parse_factor(text: &str) -> Result<f64, String> {
    match text.parse() {
        Ok(factor) if factor >= 1.0 => Ok(factor),
        _ => Err("wanted a number from 1".into()),
    }
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let differences = differences(&Results::read(&args.before)?, &Results::read(&args.now)?, args.factor)?;
    if let Some(path) = &args.json {
        output::write_json(path, &differences)?;
    }
    if args.json.as_deref() != Some(std::path::Path::new("-")) {
        let changed: Vec<_> = differences.iter().filter(|d| d.before != d.now).collect();
        let header = ["", "before", "now", ""].map(String::from);
        let row = |d: &&Difference| {
            vec![d.what.clone(), d.before.clone(), d.now.clone(), if d.worse { "WORSE" } else { "" }.into()]
        };
        if !changed.is_empty() {
            output::print(&output::table(&header, changed.iter().map(row)))?;
        }
        output::print(&format!("{} compared, {} differ\n", differences.len(), changed.len()))?;
    }
    match differences.iter().filter(|d| d.worse).count() {
        0 => Ok(()),
        n => bail!("{n} got worse"),
    }
}
