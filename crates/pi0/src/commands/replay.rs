//! `pi0 replay`: runs again what `pi0 serve --record` kept, and compares.

use std::path::PathBuf;

use anyhow::{Result, bail};
use pi0_server::{Replayed, Verdict, replay};

use crate::device::DeviceArgs;
use crate::output;
use crate::policy::PolicyArgs;
use crate::weights::WeightsArgs;

/// Run recorded requests again and report differences
///
/// Ends with an error if a result changed, or differs by more than the tolerance.
#[derive(clap::Args)]
#[command(after_help = "Example:\n  pi0 replay models/tiny /var/lib/pi0/requests --device reference")]
pub struct Args {
    /// Checkpoint directory that served the requests
    model: PathBuf,
    /// Directory of recordings
    recordings: PathBuf,
    /// Largest difference of an action's value that counts as the same
    #[arg(long, default_value_t = 1e-4, value_name = "X")]
    tolerance: f64,
    /// Denoising steps that the server used [default: the checkpoint's]
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    /// Prompt that the server used for observations that bring none
    #[arg(long, value_name = "TEXT")]
    default_prompt: Option<String>,
    #[command(flatten)]
    weights: WeightsArgs,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let served = super::serve::open(
        &args.model,
        &args.weights,
        &args.policy,
        args.default_prompt.clone(),
        &args.device,
    )?;
    // A reader that has gone away is no reason to stop comparing.
    let report = |replayed: &Replayed| drop(output::print(&line(replayed)));
    let all = replay(served, &args.recordings, args.steps, report)?;
    let differs = |r: &&Replayed| match r.verdict {
        Verdict::Actions { max_abs } => max_abs.is_nan() || max_abs > args.tolerance,
        Verdict::Changed { .. } => true,
        Verdict::SameFailure(_) | Verdict::NotRepeatable(_) => false,
    };
    let worst = all.iter().filter_map(|r| match r.verdict {
        Verdict::Actions { max_abs } => Some(max_abs),
        _ => None,
    });
    let (count, different) = (all.len(), all.iter().filter(differs).count());
    output::print(&format!(
        "{count} replayed, {different} differ, largest difference {:.3e}\n",
        worst.max_by(f64::total_cmp).unwrap_or(0.0)
    ))?;
    match different {
        0 => Ok(()),
        n => bail!("{n} of {count} recordings give something else now"),
    }
}

fn line(replayed: &Replayed) -> String {
    let verdict = match &replayed.verdict {
        Verdict::Actions { max_abs } => format!("actions, largest difference {max_abs:.3e}"),
        Verdict::SameFailure(text) => format!("same failure: {text}"),
        Verdict::NotRepeatable(text) => format!("not repeatable: {text}"),
        Verdict::Changed { then, now } => format!("CHANGED, then: {then}; now: {now}"),
    };
    let name = replayed.path.file_name().unwrap_or_default().to_string_lossy();
    format!("{name}  {verdict}\n")
}
