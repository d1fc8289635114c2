//! `pi0 replay`: runs again what `pi0 serve --record` kept, and compares.

use std::path::PathBuf;

use anyhow::{Result, bail};
use pi0_server::{Replayed, Verdict, replay};

use super::doctor::{Album, HtmlArgs, ThresholdArgs};
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
    html: HtmlArgs,
    #[command(flatten)]
    thresholds: ThresholdArgs,
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
    let total = pi0_server::recordings(&args.recordings)?.len();
    let mut album = Album::new(&args.html, total);
    let (mut count, mut different, mut worst) = (0, 0, 0.0f64);
    let report = |replayed: &Replayed| {
        count += 1;
        match replayed.verdict {
            Verdict::Actions { max_abs } => {
                different += usize::from(max_abs.is_nan() || max_abs > args.tolerance);
                worst = if max_abs.total_cmp(&worst).is_gt() { max_abs } else { worst };
            }
            Verdict::Changed { .. } => different += 1,
            Verdict::SameFailure(_) | Verdict::NotRepeatable(_) => {}
        }
        let examined = &replayed.examined;
        album.offer(examined.findings.iter().any(|finding| finding.news), || examined.view_with_pictures());
        // A reader that has gone away is no reason to stop comparing.
        drop(output::print(&line(replayed)));
    };
    replay(served, &args.recordings, args.steps, args.thresholds.read()?, report)?;
    album.write(&args.recordings.display().to_string())?;
    output::print(&format!("{count} replayed, {different} differ, largest difference {worst:.3e}\n"))?;
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
