//! `pi0 coverage`: what runs on the device, what on the host, and what moving it would give.

use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Result, anyhow, bail};
use pi0_cpu::{Cpu, CpuOptions};
use pi0_device::{Device, Fallback, OpKind, Record, Reference, Traced};
use pi0_model::cases::random_inputs;
use pi0_model::{Checkpoint, Config, Extent, Inputs, Pi0, SampleOptions, synth};

use crate::coverage::{self, Probe, roadmap};
use crate::device::{self, DeviceArgs, DeviceKind, Visitor};
use crate::results::{CoverageResults, Environment, Overhead, Ratio, Results, Share, Verified, Workload};
use crate::{host_ops, output};

/// Trace a real inference: what ran on the device and on the host, and what to move next
#[derive(Debug, Clone, clap::Args)]
#[command(after_help = "Examples:
  pi0 coverage
  pi0 coverage pi0_base --device tensix --steps 1
  pi0 coverage --host-ops linear,concat --verify       # is the prediction true?")]
pub struct Args {
    /// Checkpoint to run [default: a random one of a million parameters]
    pub model: Option<PathBuf>,
    /// Robots in the batch
    #[arg(long, default_value_t = 1, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=256))]
    pub batch: u16,
    /// Images of each robot
    #[arg(long, default_value_t = 2, value_name = "N", value_parser = clap::value_parser!(u8).range(1..=8))]
    pub cameras: u8,
    /// Tokens of each prompt [default: as many as fit]
    #[arg(long, value_name = "N")]
    pub tokens: Option<usize>,
    /// Denoising steps [default: the checkpoint's, usually 10]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub steps: Option<u16>,
    /// Inferences to measure; the median is reported
    #[arg(long, default_value_t = 3, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1000))]
    pub runs: u16,
    /// Force operations to the host: kinds (linear, concat, …) or operations (rope, …)
    #[arg(long, value_name = "KIND", value_delimiter = ',')]
    pub host_ops: Vec<String>,
    /// Run again without the force and compare with the prediction
    #[arg(long, requires = "host_ops")]
    pub verify: bool,
    /// Also measure what the trace costs, against runs on the bare device
    #[arg(long, conflicts_with = "host_ops")]
    pub overhead: bool,
    /// Measure that for so long; large networks need more for a narrow interval
    #[arg(long, default_value_t = 20, requires = "overhead", value_name = "N", value_parser = clap::value_parser!(u16).range(1..=3600))]
    pub overhead_seconds: u16,
    /// Write the results as JSON to this file (`-` for standard output)
    #[arg(long, value_name = "FILE")]
    pub json: Option<PathBuf>,
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let results = results(args)?;
    match &args.json {
        Some(path) if path == Path::new("-") => {}
        _ => output::print(&table(&results))?,
    }
    match &args.json {
        Some(path) => output::write_json(path, &Results::Coverage(results)),
        None => Ok(()),
    }
}

/// Measures.
pub fn results(args: &Args) -> Result<CoverageResults> {
    let (name, checkpoint) = match &args.model {
        Some(path) => (path.display().to_string(), Checkpoint::open(path)?),
        None => ("random, 1 million parameters".into(), synth::checkpoint(&Config::tiny(), 5)?),
    };
    let c = &checkpoint.config;
    let tokens = args.tokens.unwrap_or(c.max_tokens);
    if tokens > c.max_tokens {
        bail!("--tokens {tokens}: the model takes at most {}", c.max_tokens);
    }
    let steps = args.steps.map_or(c.num_steps, usize::from);
    let cameras = vec![true; usize::from(args.cameras)];
    let batch = (0..u64::from(args.batch)).map(|i| random_inputs(c, i, &cameras, tokens)).collect();
    let forced = args.host_ops.iter().map(|s| host_ops::parse(s).map_err(|e| anyhow!("--host-ops: {e}")));
    let forced = forced.collect::<Result<Vec<_>>>()?.concat();
    let detail = args.device.device.probe(&args.device).map_err(|why| anyhow!("{why}"))?;
    // What a device lacks runs on the CPU; what the CPU lacks (or is forced off it), on the reference.
    let host = match args.device.device {
        DeviceKind::Cpu | DeviceKind::Reference => "reference",
        _ => "cpu",
    };
    let workload = Workload {
        model: name,
        batch: args.batch.into(),
        cameras: args.cameras.into(),
        tokens,
        steps,
        runs: args.runs.into(),
        forced: forced.iter().map(|op| op.name().to_string()).collect(),
        host: host.into(),
    };
    let environment = Environment::here(args.device.device.name(), detail);
    device::with_device(&args.device, Run { args, checkpoint, batch, forced, workload, environment })
}

/// Rounds of `--overhead`: as many as fit into the time given.
const MOST_ROUNDS: usize = 300;
const LEAST_ROUNDS: usize = 8;

struct Run<'a> {
    args: &'a Args,
    checkpoint: Checkpoint,
    batch: Vec<Inputs>,
    forced: Vec<OpKind>,
    workload: Workload,
    environment: Environment,
}

impl Visitor for Run<'_> {
    type Output = CoverageResults;

    fn visit<D: Device + 'static>(self, device: D) -> Result<CoverageResults> {
        match self.workload.host.as_str() {
            "cpu" => self.measure(&device, &Cpu::new(CpuOptions::default())?),
            _ => self.measure(&device, &Reference),
        }
    }
}

/// A model whose device is traced.
type Subject<'d, D, H> = Pi0<Traced<&'d D, &'d H>>;

impl Run<'_> {
    fn load<'d, D: Device, H: Device>(
        &self,
        device: &'d D,
        host: &'d H,
        forced: &[OpKind],
    ) -> Result<Subject<'d, D, H>> {
        let traced = Traced::new(device, host, Fallback::RunOnHost).force_to_host(forced.to_vec());
        let model = device::pack(traced, self.checkpoint.clone(), Extent::Cache)?;
        // The first run packs weights for the host, and warms everything up.
        self.sample(&model)?;
        Ok(model)
    }

    fn options(&self) -> SampleOptions {
        SampleOptions { steps: Some(self.workload.steps), ..Default::default() }
    }

    /// One inference: its time and its records.
    fn sample<D: Device, H: Device>(&self, model: &Subject<'_, D, H>) -> Result<(f64, Vec<Record>)> {
        model.device().take();
        let start = Instant::now();
        model.sample_actions(&self.batch, &self.options())?;
        let time = start.elapsed().as_secs_f64();
        Ok((time, model.device().take()))
    }

    /// What the trace costs: the same inference traced, on the bare device, and there again as a control, in turn and
    /// in changing order, so that what else the machine does meets all alike. Each is timed in its stride, right after
    /// one that does not count: the traced network and the bare one have weights and code of their own, and what ran
    /// last finds them in the caches.
    fn overhead<D: Device, H: Device>(&self, device: &D, subject: &Subject<'_, D, H>) -> Result<Overhead> {
        let bare = device::pack(device, self.checkpoint.clone(), Extent::Cache)?;
        let traced = || -> Result<(f64, usize)> {
            let (time, records) = self.sample(subject)?;
            Ok((time, records.len()))
        };
        let plain = || -> Result<(f64, usize)> {
            let start = Instant::now();
            bare.sample_actions(&self.batch, &self.options())?;
            Ok((start.elapsed().as_secs_f64(), 0))
        };
        let (mut times, mut records) = (Vec::new(), 0);
        let (began, long) = (Instant::now(), Duration::from_secs(self.args.overhead_seconds.into()));
        while times.len() < MOST_ROUNDS && (times.len() < LEAST_ROUNDS || began.elapsed() < long) {
            let mut round = [0.0; 3];
            for turn in 0..3 {
                let which = (times.len() + turn) % 3;
                for _in_stride in [false, true] {
                    let (time, taken) = if which == 0 { traced()? } else { plain()? };
                    round[which] = time;
                    records = records.max(taken);
                }
            }
            times.push(round);
        }
        let ratio = |a: usize, b: usize| Ratio::of(times.iter().map(|t| t[a] / t[b] - 1.0).collect());
        Ok(Overhead {
            rounds: times.len(),
            records,
            plain_seconds: coverage::median(times.iter().map(|t| t[1]).collect()).unwrap_or_default(),
            traced: ratio(0, 1),
            control: ratio(2, 1),
        })
    }

    fn measure<D: Device, H: Device>(self, device: &D, host: &H) -> Result<CoverageResults> {
        let subject = self.load(device, host, &self.forced)?;
        let free = match self.args.verify {
            true => Some(self.load(device, host, &[])?),
            false => None,
        };
        let (mut runs, mut probes, mut free_times) = (Vec::new(), Vec::new(), Vec::new());
        // One after the other, so that what else the machine does meets all alike.
        for _ in 0..self.workload.runs {
            runs.push(self.sample(&subject)?);
            if !self.forced.is_empty() {
                subject.device().probe(true);
                let (_, records) = self.sample(&subject)?;
                subject.device().probe(false);
                probes.push(Probe { records, fusions: subject.device().take_fusions() });
            }
            if let Some(free) = &free {
                free_times.push(self.sample(free)?.0);
            }
        }
        runs.sort_by(|a, b| a.0.total_cmp(&b.0));
        free_times.sort_by(f64::total_cmp);
        let (total, records) = runs.swap_remove(runs.len() / 2);

        let rows = coverage::rows(&records);
        let (items, savings) = coverage::fallbacks(&records, &probes);
        let sum = |f: fn(&Share) -> u64| {
            (rows.iter().map(|r| f(&r.device)).sum::<u64>(), rows.iter().map(|r| f(&r.host)).sum::<u64>())
        };
        let (on_device, on_host) = sum(|s| s.ops);
        let verified = free_times.get(free_times.len() / 2).map(|&measured| {
            let predicted = roadmap::predicted(total, &items, &savings);
            Verified {
                forced_seconds: total,
                predicted_seconds: predicted,
                measured_seconds: measured,
                error: predicted / measured - 1.0,
            }
        });
        let overhead = self.args.overhead.then(|| self.overhead(device, &subject)).transpose()?;
        Ok(CoverageResults {
            overhead,
            roadmap: roadmap::roadmap(total, on_device + on_host, on_device, items, &savings),
            transfers: coverage::transfers(&records),
            stages: coverage::stages(&records),
            total_seconds: total,
            rows,
            verified,
            environment: self.environment,
            workload: self.workload,
        })
    }
}

fn ms(seconds: f64) -> String {
    format!("{:.2}", seconds * 1e3)
}

fn table(r: &CoverageResults) -> String {
    let mut text = String::new();
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
    text += &output::table(&header.map(String::from), rows);

    text += "\n";
    let share = r.share();
    text += &format!(
        "coverage: {:.1} % of {} operations, {:.1} % of {:.2} GFLOP, {:.1} % of the operations' time; {} ms in all\n",
        100.0 * share.ops,
        share.total_ops,
        100.0 * share.flop,
        share.total_flop as f64 / 1e9,
        100.0 * share.time,
        ms(r.total_seconds)
    );
    if !r.transfers.is_empty() {
        text += "\n";
        let header = ["transfer", "module", "count", "MB", "ms"];
        let rows = r.transfers.iter().map(|t| {
            let size = format!("{:.3}", t.bytes as f64 / 1e6);
            vec![t.what.clone(), t.module.clone(), t.count.to_string(), size, ms(t.seconds)]
        });
        text += &output::table(&header.map(String::from), rows);
    }
    if !r.roadmap.is_empty() {
        text += "\n";
        let rows = r.roadmap.iter().map(|f| roadmap::cells(f).to_vec());
        text += &output::table(&roadmap::COLUMNS.map(String::from), rows);
    }
    if let Some(o) = &r.overhead {
        let percent = |ratio: &Ratio| {
            let [low, median, high] = [ratio.low, ratio.median, ratio.high].map(|x| 100.0 * x);
            format!("{median:+.2} % (95 % confidence: {low:+.2} to {high:+.2})")
        };
        text += &format!(
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
        text += &format!(
            "\nforced {} ms; predicted without {} ms, measured {} ms: {:+.1} %\n",
            ms(v.forced_seconds),
            ms(v.predicted_seconds),
            ms(v.measured_seconds),
            100.0 * v.error
        );
    }
    text
}
