//! `pi0 doctor`: what is wrong with recorded observations and answers.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};
use pi0_doctor::{Kind, Line, Summary, Thresholds};
use pi0_server::{Examiner, Settings, View, document, recordings};

use crate::output;
use crate::policy::PolicyArgs;
use crate::weights::WeightsArgs;

/// Say what is wrong with the observations and actions of a recording
///
/// Runs no network: it looks at the recorded answers. Ends with an error if something was found.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  pi0 doctor pi0_aloha /var/lib/pi0/requests
  pi0 doctor models/tiny requests --html doctor.html --allow camera_missing,latency
Every finding, its threshold, cause and remedy: docs/doctor.md")]
pub struct Args {
    /// Checkpoint directory that served the requests
    model: PathBuf,
    /// Directory of recordings, as `pi0 serve --record` writes them
    recordings: PathBuf,
    /// Findings that are no error, separated by commas
    #[arg(long, value_name = "KINDS", value_delimiter = ',')]
    allow: Vec<Kind>,
    /// Prompt that the server used for observations that bring none
    #[arg(long, value_name = "TEXT")]
    default_prompt: Option<String>,
    /// Write the summary to FILE as JSON; `-` is standard output
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    #[command(flatten)]
    html: HtmlArgs,
    #[command(flatten)]
    thresholds: ThresholdArgs,
    #[command(flatten)]
    weights: WeightsArgs,
    #[command(flatten)]
    policy: PolicyArgs,
}

/// Where to write the page, and how much of it.
#[derive(Debug, Clone, clap::Args)]
pub struct HtmlArgs {
    /// Write a page that shows every observation with its answer to FILE
    #[arg(long, value_name = "FILE")]
    pub html: Option<PathBuf>,
    /// Most observations in the page: those with new findings, the others evenly spaced
    #[arg(long, value_name = "N", default_value_t = 200)]
    pub html_most: usize,
}

/// The limits of the doctor.
#[derive(Debug, Clone, clap::Args)]
pub struct ThresholdArgs {
    /// Settings file whose table [doctor] holds the thresholds
    #[arg(long, value_name = "FILE.toml")]
    pub thresholds: Option<PathBuf>,
}

impl ThresholdArgs {
    /// The thresholds of the file, or the defaults.
    pub fn read(&self) -> Result<Thresholds> {
        let Some(path) = &self.thresholds else { return Ok(Thresholds::default()) };
        let settings = Settings::open(path)?;
        settings.check().with_context(|| path.display().to_string())?;
        Ok(settings.doctor)
    }
}

/// Keeps views for a page: at most so many, those with news rather than others.
pub struct Album {
    args: HtmlArgs,
    views: Vec<(usize, View)>,
    every: usize,
    met: usize,
    news: usize,
}

impl Album {
    /// An empty one; it keeps nothing where no page is wanted. `total` views are expected.
    pub fn new(args: &HtmlArgs, total: usize) -> Self {
        let every = total.div_ceil((args.html_most / 2).max(1)).max(1);
        Self { args: args.clone(), views: Vec::new(), every, met: 0, news: 0 }
    }

    /// Offers a view. `view` is asked only if it is kept.
    pub fn offer(&mut self, news: bool, view: impl FnOnce() -> Option<View>) {
        let number = self.met;
        self.met += 1;
        if self.args.html.is_none() {
            return;
        }
        let news = news && self.news < self.args.html_most / 2;
        if (news || number.is_multiple_of(self.every))
            && let Some(view) = view()
        {
            self.news += usize::from(news);
            self.views.push((number, view));
        }
    }

    /// Writes the page.
    pub fn write(self, title: &str) -> Result<()> {
        let Some(path) = &self.args.html else { return Ok(()) };
        let total = self.met;
        let views: Vec<View> = self
            .views
            .into_iter()
            .map(|(number, mut view)| {
                view.title = format!("{}, observation {} of {total}", view.title, number + 1);
                view
            })
            .collect();
        write_page(path, title, &views)
    }
}

/// Writes a page of views, readable by its owner only: it shows what cameras saw.
pub fn write_page(path: &Path, title: &str, views: &[View]) -> Result<()> {
    std::fs::write(path, document(title, views)).with_context(|| format!("cannot write {}", path.display()))
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let checkpoint = args.weights.open(&args.model, args.policy.config.as_deref())?;
    let mut options = args.policy.options()?;
    options.default_prompt.clone_from(&args.default_prompt);
    let config = &checkpoint.config;
    let policy = pi0_policy::Policy::load(&checkpoint.directory, config.into(), &options)?;
    let found = recordings(&args.recordings)?;
    if found.is_empty() {
        bail!("{}: holds no recordings", args.recordings.display());
    }
    let mut examiner = Examiner::new(policy, config, args.thresholds.read()?);
    let (mut summary, mut album) = (Summary::default(), Album::new(&args.html, found.len()));
    let mut robots = BTreeSet::new();
    for (number, path) in found {
        let examined = examiner.open(&path)?;
        robots.insert(examined.client);
        summary.add(&number.to_string(), &examined.findings);
        album.offer(examined.findings.iter().any(|finding| finding.news), || examined.view_with_pictures());
    }
    album.write(&args.recordings.display().to_string())?;
    if robots.contains(&None) {
        eprintln!(
            "note: recordings of an earlier version do not say which robot they are of: all are taken for one robot's"
        );
    }
    if let Some(path) = &args.json {
        output::write_json(path, &summary)?;
    }
    if args.json.as_deref() != Some(Path::new("-")) {
        output::print(&table(&summary, robots.len()))?;
    }
    verdict(&summary, &args.allow)
}

/// An error if something was found that is not allowed.
pub fn verdict(summary: &Summary, allow: &[Kind]) -> Result<()> {
    let kinds: BTreeSet<Kind> = summary.lines.iter().map(|line| line.kind).collect();
    let bad: Vec<&str> = kinds.iter().filter(|kind| !allow.contains(kind)).map(|kind| kind.name()).collect();
    match bad.is_empty() {
        true => Ok(()),
        false => bail!("the doctor found {}", bad.join(", ")),
    }
}

/// The findings as a table, each with its words below.
pub fn table(summary: &Summary, robots: usize) -> String {
    let plural = if robots == 1 { "robot" } else { "robots" };
    let mut out = format!(
        "{} requests of {robots} {plural}, {} with findings\n",
        summary.requests, summary.with_findings
    );
    for line in &summary.lines {
        let Line { kind, count, first, last, text, .. } = line;
        let share = 100.0 * *count as f64 / summary.requests.max(1) as f64;
        out += &format!("\n{kind}  {count} times ({share:.1} %), first in {first}, last in {last}\n");
        out += &format!("  {text}\n  to do: {}\n", kind.remedy());
    }
    out
}
