//! `pi0 report`: check, coverage and benchmarks as one page.

use std::path::PathBuf;

use anyhow::{Context, Result};
use clap::Parser as _;
use pi0_judge::results::Results;

use crate::commands::{check, coverage};
use crate::device::DeviceArgs;
use crate::output;
use crate::report::Report;

/// Write accuracy, coverage, timing and roadmap as one self-contained HTML page
#[derive(clap::Args)]
#[command(after_help = "Examples:
  pi0 report --html report.html                        # runs a quick check and a coverage trace
  pi0 report --html report.html --check check.json --coverage coverage.json --bench bench.json")]
pub struct Args {
    /// Checkpoint to check and trace [default: random ones]
    model: Option<PathBuf>,
    /// The page to write
    #[arg(long, value_name = "FILE")]
    html: PathBuf,
    /// Results of `pi0 check --json` instead of running it
    #[arg(long, value_name = "FILE")]
    check: Option<PathBuf>,
    /// Results of `pi0 coverage --json` instead of running it
    #[arg(long, value_name = "FILE")]
    coverage: Option<PathBuf>,
    /// Results of `pi0 bench --json` to include; repeat for more
    #[arg(long, value_name = "FILE")]
    bench: Vec<PathBuf>,
    /// Also write everything as JSON to this file (`-` for standard output)
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
}

/// The arguments of the commands that a report runs, with their defaults.
#[derive(clap::Parser)]
struct Defaults {
    #[command(flatten)]
    check: check::Args,
}

#[derive(clap::Parser)]
struct CoverageDefaults {
    #[command(flatten)]
    coverage: coverage::Args,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    // Given results stand alone: nothing is run beside them.
    let given = args.check.is_some() || args.coverage.is_some();
    let check = match &args.check {
        Some(path) => Some(Results::read_check(path)?),
        None if given => None,
        None => {
            let defaults = Defaults::try_parse_from(["pi0"])?.check;
            Some(check::results(&check::Args {
                model: args.model.clone(),
                device: args.device.clone(),
                ..defaults
            })?)
        }
    };
    let coverage = match &args.coverage {
        Some(path) => Some(Results::read_coverage(path)?),
        None if given => None,
        None => {
            let defaults = CoverageDefaults::try_parse_from(["pi0"])?.coverage;
            let args = coverage::Args { model: args.model.clone(), device: args.device.clone(), ..defaults };
            Some(coverage::results(&args)?)
        }
    };
    let bench = args.bench.iter().map(|path| {
        let text =
            std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&text)
            .with_context(|| format!("{} holds no results of pi0 bench", path.display()))
    });
    let report = Report { check, coverage, bench: bench.collect::<Result<_>>()? };
    std::fs::write(&args.html, report.page())
        .with_context(|| format!("cannot write {}", args.html.display()))?;
    if let Some(path) = &args.json {
        output::write_json(path, &report)?;
    }
    eprintln!("wrote {}", args.html.display());
    Ok(())
}
