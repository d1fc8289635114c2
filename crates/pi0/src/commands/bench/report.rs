//! The result of a benchmark, for people and for machines.

use pi0_device::{HostTensor, Record};
use pi0_model::{Config, Inputs};
use serde::{Deserialize, Serialize};

use super::launches::{LAUNCH_COLUMNS, Launches};
use super::limits::Limits;
use super::measure::{Line, Spread, Tables, Timed, bytes};
use super::verify::{Method, Verdict};
use crate::output;

/// Columns of the table of stages; times are milliseconds.
pub const STAGE_COLUMNS: [&str; 9] =
    ["stage", "ms", "min", "spread", "GFLOP", "GFLOP/s", "of peak", "MB", "GB/s"];

/// Columns of the table of operations.
pub const OPERATION_COLUMNS: [&str; 11] =
    ["operation", "rows", "calls", "ms", "min", "spread", "GFLOP", "GFLOP/s", "of peak", "MB", "GB/s"];

/// Everything that `pi0 bench` finds out.
#[derive(Debug, Serialize, Deserialize)]
pub struct Report {
    /// The checkpoint.
    pub model: String,
    /// The processor's name.
    pub processor: String,
    /// Device, instruction set, threads and format in words.
    pub device: String,
    /// What went in.
    pub inputs: Shape,
    /// How fast π0-FAST writes.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub answer: Option<Answer>,
    /// How the actions were checked.
    pub verdict: Verdict,
    /// From the start of the process to the first actions, seconds.
    pub first_action: Option<f64>,
    /// Packing all weights, seconds.
    pub load: f64,
    /// The first inference, seconds.
    pub first_inference: f64,
    /// Peak private memory while loading, bytes.
    pub memory_loading: Option<u64>,
    /// Peak private memory of an inference, bytes.
    pub memory_running: Option<u64>,
    /// The machine's own limits.
    pub limits: Option<Limits>,
    /// Timed inferences.
    pub repeat: usize,
    /// Launch by launch, on a GPU.
    #[serde(default)]
    pub launches: Option<Launches>,
    /// Where the time goes.
    #[serde(flatten)]
    pub tables: Tables,
}

/// The sizes of a batch.
#[derive(Debug, Serialize, Deserialize)]
pub struct Shape {
    /// Robots.
    pub batch: usize,
    /// Images in all.
    pub images: usize,
    /// Prompt tokens in all.
    pub tokens: usize,
    /// Denoising steps, or of π0-FAST most tokens of an answer.
    pub steps: usize,
}

impl Shape {
    /// Of a batch, for a network that is told so many steps or none.
    pub fn of(batch: &[Inputs], config: &Config, steps: Option<usize>) -> Self {
        Self {
            batch: batch.len(),
            images: batch.iter().flat_map(|i| &i.images).flatten().count(),
            tokens: batch.iter().map(|i| i.tokens.len()).sum(),
            steps: steps
                .unwrap_or(config.answer.as_ref().map_or(config.num_steps, |answer| answer.max_tokens)),
        }
    }
}

/// How fast π0-FAST writes, the first token aside: that comes with the prompt.
#[derive(Debug, Serialize, Deserialize)]
pub struct Answer {
    /// Tokens of all robots.
    pub tokens: usize,
    /// Passes through the network, each for a token of every robot that still writes, and for guesses.
    pub passes: usize,
    /// Milliseconds of a pass, the choice of its tokens included.
    pub ms: Spread,
    /// Tokens a second at the median.
    pub tokens_per_second: f64,
    /// GB/s of weights and activations, each read and written once a pass, at the median.
    pub gbs: f64,
    /// Share of what the machine reads from memory.
    pub share: Option<f64>,
}

impl Answer {
    /// From timed inferences, of which each operation's module tells the pass; none of a network that denoises.
    pub fn of(
        config: &Config,
        answers: &[HostTensor],
        runs: &[Timed],
        weight_bytes: usize,
        memory: Option<f64>,
    ) -> Option<Self> {
        config.answer.as_ref()?;
        let later = |r: &&Record| r.module.starts_with("step") && r.module.split('.').next() != Some("step0");
        let first = runs.first()?;
        let mut modules: Vec<&str> =
            first.records.iter().filter(later).filter_map(|r| r.module.split('.').next()).collect();
        modules.dedup();
        let passes = modules.len();
        let seconds = |run: &Timed| {
            let start = run.records.iter().find(|r| later(r))?.start;
            let last = run.records.iter().rfind(|r| later(r))?;
            Some((last.start + last.time).saturating_sub(start).as_secs_f64())
        };
        let seconds = runs.iter().map(seconds).collect::<Option<Vec<_>>>()?;
        let median = Spread::of(seconds.clone()).median;
        let bytes: u64 = first.records.iter().filter(later).map(|r| bytes(r, weight_bytes)).sum();
        let tokens: usize = answers.iter().map(HostTensor::cols).sum();
        let gbs = bytes as f64 / median / 1e9;
        Some(Self {
            tokens,
            passes,
            ms: Spread::of(seconds.iter().map(|s| 1e3 * s / passes as f64).collect()),
            tokens_per_second: (tokens - answers.len()) as f64 / median,
            gbs,
            share: memory.map(|memory| gbs / memory),
        })
    }

    /// In words.
    pub fn text(&self) -> String {
        let share = self.share.map_or(String::new(), |s| format!(", {:.0} % of the memory's", 100.0 * s));
        format!(
            "{} tokens in {} passes; {:.2} ms a pass, {:.1} tokens a second, {:.1} GB/s{share}",
            self.tokens, self.passes, self.ms.median, self.tokens_per_second, self.gbs
        )
    }
}

impl Report {
    /// For people.
    pub fn text(&self) -> String {
        let (stages, operations) = (self.stages(), self.operations());
        let header = |columns: &[&str]| columns.iter().map(|c| c.to_string()).collect::<Vec<_>>();
        let text = format!(
            "{}\n{}\n\n{}\n{}",
            output::facts(&self.facts()),
            self.runs(),
            output::table(&header(&STAGE_COLUMNS), stages),
            output::table(&header(&OPERATION_COLUMNS), operations)
        );
        // On a GPU these tables are the host's side, of which launches are written and nothing is run.
        let Some(launches) = &self.launches else { return text };
        let table = output::table(&header(&LAUNCH_COLUMNS), launches.cells());
        format!("{text}\nOn the GPU, by its own clock:\n\n{}\n{table}", output::facts(&launches.facts()))
    }

    /// How the times were taken.
    pub fn runs(&self) -> String {
        let runs = count(self.repeat, "timed inference");
        format!("{runs}; times are medians, spread is (max - min) / median")
    }

    /// What ran, and all that is no table.
    pub fn facts(&self) -> Vec<(&'static str, String)> {
        let i = &self.inputs;
        let inputs = format!(
            "{}: {}, {}, {}",
            count(i.batch, "robot"),
            count(i.images, "image"),
            count(i.tokens, "prompt token"),
            count(i.steps, if self.answer.is_some() { "token at most" } else { "denoising step" })
        );
        let memory = |bytes: Option<u64>| {
            bytes.map_or("unknown".into(), |b| format!("{:.2} GiB", b as f64 / f64::from(1 << 30)))
        };
        let mut facts = vec![
            ("model", self.model.clone()),
            ("machine", self.processor.clone()),
            ("device", self.device.clone()),
            ("inputs", inputs),
            ("checked", self.checked()),
            ("loading", format!("{:.2} s", self.load)),
            ("first inference", format!("{:.3} s", self.first_inference)),
        ];
        facts.extend(
            self.first_action.map(|s| ("first action", format!("{s:.2} s after the process started"))),
        );
        let (loading, running) = (memory(self.memory_loading), memory(self.memory_running));
        facts.push(("private memory", format!("at most {loading} loading, {running} running")));
        facts.extend(self.limits.as_ref().map(|l| ("limits", l.text())));
        facts.extend(self.answer.as_ref().map(|a| ("answer", a.text())));
        facts
    }

    /// Cells of the stages and the total, under [`STAGE_COLUMNS`].
    pub fn stages(&self) -> Vec<Vec<String>> {
        let lines = self.tables.stages.iter().chain([&self.tables.total]);
        lines.map(|l| cells(&l.name, None, l)).collect()
    }

    /// Cells of the operations, under [`OPERATION_COLUMNS`].
    pub fn operations(&self) -> Vec<Vec<String>> {
        let name = |l: &Line| format!("{} {}", l.stage.map_or("", |s| s.name()), l.name);
        self.tables.operations.iter().map(|l| cells(&name(l), Some(l), l)).collect()
    }

    fn checked(&self) -> String {
        let v = &self.verdict;
        let worst = v.compared.iter().max_by(|a, b| a.relative_l2.total_cmp(&b.relative_l2));
        let worst = worst.map_or(String::new(), |w| {
            let place = w.module.as_ref().map_or(String::new(), |m| format!(" in {m}"));
            format!("worst {}{place}: relative L2 {:.1e}, pcc {:.6}", w.what, w.relative_l2, w.pcc)
        });
        let results = v.compared.iter().map(|c| c.count).sum();
        let how = match v.method {
            Method::Golden => "the actions against the stored ones".into(),
            Method::Reference => "the actions against the reference's".into(),
            Method::Operations => {
                format!("{} of a whole inference against the reference", count(results, "operation"))
            }
        };
        format!("{how} in {:.1} s; {worst}", v.seconds)
    }
}

/// One row of a table; the operation's rows and calls where `operation` is given.
fn cells(name: &str, operation: Option<&Line>, l: &Line) -> Vec<String> {
    let Spread { median, min, .. } = l.ms;
    let mut cells = vec![name.to_string()];
    if let Some(l) = operation {
        cells.push(l.rows.map_or(String::new(), |r| r.to_string()));
        cells.push(l.calls.to_string());
    }
    let or_blank = |is: bool, text: String| if is { text } else { String::new() };
    cells.extend([
        format!("{median:.2}"),
        format!("{min:.2}"),
        format!("{:.1}%", 100.0 * l.ms.relative()),
        or_blank(l.flop > 0, format!("{:.2}", l.flop as f64 / 1e9)),
        or_blank(l.flop > 0, format!("{:.1}", l.gflops)),
        or_blank(l.flop > 0, l.share.map_or(String::new(), |s| format!("{:.1}%", 100.0 * s))),
        format!("{:.1}", l.bytes as f64 / 1e6),
        format!("{:.2}", l.gbs),
    ]);
    cells
}

fn count(n: usize, what: &str) -> String {
    match n {
        1 => format!("{n} {what}"),
        // The first word is what there are several of.
        _ => match what.split_once(" at ") {
            Some((what, rest)) => format!("{n} {what}s at {rest}"),
            None => format!("{n} {what}s"),
        },
    }
}
