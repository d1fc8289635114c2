//! Folds the records of timed inferences into stages and operations.

use std::time::Duration;

use pi0_device::{OpKind, Part, Record};
use serde::{Deserialize, Serialize};

/// The parts of an inference.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Stage {
    /// Images to image tokens.
    Vision,
    /// Image and prompt tokens through the language model.
    Prefix,
    /// State, noise and time through the action expert, all steps; of π0-FAST all tokens of the answer.
    Denoise,
    /// Between operations: cutting images into patches, noise, bookkeeping; and the moves to and from the device.
    Host,
}

impl Stage {
    /// All, in order.
    pub const ALL: [Stage; 4] = [Stage::Vision, Stage::Prefix, Stage::Denoise, Stage::Host];

    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Vision => "vision",
            Stage::Prefix => "prefix",
            Stage::Denoise => "denoise",
            Stage::Host => "host",
        }
    }

    fn of(r: &Record) -> Self {
        let first = r.module.split('.').next().unwrap_or_default();
        match first {
            "vision" => Stage::Vision,
            "prefix" => Stage::Prefix,
            _ if first == "suffix" || first.starts_with("step") => Stage::Denoise,
            _ => Stage::Host,
        }
    }
}

/// What an operation is, as one line of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Key {
    stage: Stage,
    op: String,
    rows: usize,
    /// `[out, in]` of the weight.
    weight: Option<[usize; 2]>,
}

impl Key {
    fn of(r: &Record) -> Self {
        let weight = matches!(r.op, OpKind::Linear | OpKind::Dense | OpKind::Qkv).then(|| r.shapes[1]);
        let name = |p: &Part| p.op.name();
        let op = match r.op {
            // The parts say more than the word: `rms_norm+linear+geglu`.
            OpKind::Dense => r.parts.iter().map(name).collect::<Vec<_>>().join("+"),
            op => op.name().into(),
        };
        Self { stage: Stage::of(r), op, rows: r.result[0], weight }
    }
}

/// Work and time of one kind of operation, a stage or everything, in one inference.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Line {
    /// The stage it belongs to; none for the total.
    pub stage: Option<Stage>,
    /// The operation and its weight; the stage's name for a whole stage.
    pub name: String,
    /// Rows of the result.
    pub rows: Option<usize>,
    /// Calls in one inference.
    pub calls: usize,
    /// Milliseconds in one inference.
    pub ms: Spread,
    /// Floating-point operations needed.
    pub flop: u64,
    /// GFLOP/s at the median.
    pub gflops: f64,
    /// Share of the machine's measured peak for the weights' number format.
    pub share: Option<f64>,
    /// Weights, each read once a call in its packed format, and activations, read and written once as f32.
    pub bytes: u64,
    /// GB/s of these at the median.
    pub gbs: f64,
}

/// Statistics of one quantity over the repeats.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
pub struct Spread {
    /// The middle one; the mean of the middle two.
    pub median: f64,
    /// The smallest.
    pub min: f64,
    /// The largest.
    pub max: f64,
}

impl Spread {
    /// Of at least one value.
    pub fn of(mut values: Vec<f64>) -> Self {
        values.sort_by(f64::total_cmp);
        let n = values.len();
        let median = (values[(n - 1) / 2] + values[n / 2]) / 2.0;
        Self { median, min: values[0], max: values[n - 1] }
    }

    /// Largest minus smallest, as a share of the median.
    pub fn relative(&self) -> f64 {
        (self.max - self.min) / self.median
    }
}

/// One timed inference.
pub struct Timed {
    /// All of it.
    pub wall: Duration,
    /// Its operations.
    pub records: Vec<Record>,
}

/// The lines of the tables.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Tables {
    /// The whole inference.
    pub total: Line,
    /// Its stages.
    pub stages: Vec<Line>,
    /// Its operations, the longest of each stage first.
    pub operations: Vec<Line>,
}

impl Tables {
    /// GFLOP/s of the fastest operation.
    pub fn fastest(&self) -> f64 {
        self.operations.iter().map(|line| line.gflops).fold(0.0, f64::max)
    }

    /// Says of every line which share of `peak`, GFLOP/s, it reached.
    pub fn measure_by(&mut self, peak: Option<f64>) {
        let lines = self.stages.iter_mut().chain(&mut self.operations).chain([&mut self.total]);
        lines.for_each(|line| line.share = peak.map(|p| line.gflops / p));
    }
}

/// Work of one line, and its time in each repeat.
struct Sum {
    key: Key,
    calls: usize,
    flop: u64,
    bytes: u64,
    ms: Vec<f64>,
}

/// Sums up the repeats, which all ran the same operations; one value of a packed weight takes `weight_bytes`. Shares are
/// unknown yet.
pub fn tables(runs: &[Timed], weight_bytes: usize) -> Tables {
    let mut sums: Vec<Sum> = Vec::new();
    for (i, run) in runs.iter().enumerate() {
        for r in &run.records {
            let key = Key::of(r);
            let at = sums.iter().position(|s| s.key == key).unwrap_or_else(|| {
                sums.push(Sum { key, calls: 0, flop: 0, bytes: 0, ms: vec![0.0; runs.len()] });
                sums.len() - 1
            });
            let sum = &mut sums[at];
            sum.ms[i] += milliseconds(r.time);
            if i == 0 {
                sum.calls += 1;
                sum.flop += r.flop();
                sum.bytes += bytes(r, weight_bytes);
            }
        }
    }
    let line = |stage, name: String, parts: &[&Sum], ms: Vec<f64>| {
        let rows = match parts {
            [one] => Some(one.key.rows),
            _ => None,
        };
        let (flop, bytes) = (parts.iter().map(|s| s.flop).sum(), parts.iter().map(|s| s.bytes).sum());
        let ms = Spread::of(ms);
        let gflops = flop as f64 / ms.median / 1e6;
        Line {
            stage,
            name,
            rows,
            calls: parts.iter().map(|s| s.calls).sum(),
            ms,
            flop,
            gflops,
            share: None,
            bytes,
            gbs: bytes as f64 / ms.median / 1e6,
        }
    };
    let walls: Vec<f64> = runs.iter().map(|r| milliseconds(r.wall)).collect();
    let stage = |stage| {
        let parts: Vec<_> = sums.iter().filter(|s| s.key.stage == stage).collect();
        let mut ms: Vec<f64> = (0..runs.len()).map(|i| parts.iter().map(|s| s.ms[i]).sum()).collect();
        if stage == Stage::Host {
            // What no operation accounts for.
            let inside = |i: usize| sums.iter().map(|s| s.ms[i]).sum::<f64>();
            ms.iter_mut().enumerate().for_each(|(i, ms)| *ms += walls[i] - inside(i));
        }
        line(Some(stage), stage.name().into(), &parts, ms)
    };
    let stages: Vec<_> = Stage::ALL.into_iter().map(stage).collect();
    let mut operations: Vec<_> = sums
        .iter()
        .map(|s| {
            let weight = s.key.weight.map_or(String::new(), |[out, inputs]| format!(" {inputs}>{out}"));
            line(Some(s.key.stage), format!("{}{weight}", s.key.op), &[s], s.ms.clone())
        })
        .collect();
    operations.sort_by(|a, b| a.stage.cmp(&b.stage).then(b.ms.median.total_cmp(&a.ms.median)));
    Tables { total: line(None, "total".into(), &sums.iter().collect::<Vec<_>>(), walls), stages, operations }
}

fn milliseconds(t: Duration) -> f64 {
    t.as_secs_f64() * 1e3
}

/// Bytes that the operation must read and write: a record counts all as f32, but weights are packed.
pub fn bytes(r: &Record, weight_bytes: usize) -> u64 {
    let weight = Key::of(r).weight.map_or(0, |[out, inputs]| (out * inputs) as u64);
    r.bytes - 4 * weight + weight_bytes as u64 * weight
}

/// Bytes of an operation that no cache holds: its weight comes from memory.
const FROM_MEMORY: u64 = 64 << 20;

/// GB/s of the fastest product whose weight no cache holds, 0 where there is none.
pub fn fastest_read(runs: &[Timed], weight_bytes: usize) -> f64 {
    let products = |r: &&Record| r.flop() > 0 && Key::of(r).weight.is_some();
    let records = runs.iter().flat_map(|run| &run.records).filter(products);
    let read = records.map(|r| (bytes(r, weight_bytes), r.time.as_secs_f64()));
    let large = read.filter(|&(bytes, seconds)| bytes >= FROM_MEMORY && seconds > 0.0);
    large.map(|(bytes, seconds)| bytes as f64 / seconds / 1e9).fold(0.0, f64::max)
}

#[cfg(test)]
mod tests {
    use pi0_device::{Device, Fallback, Reference, Traced};

    use super::*;

    #[test]
    fn the_middle_of_even_and_odd_counts() {
        let s = Spread::of(vec![4.0, 1.0, 3.0, 2.0]);
        assert_eq!((s.median, s.min, s.max, s.relative()), (2.5, 1.0, 4.0, 1.2));
        assert_eq!(Spread::of(vec![5.0, 1.0, 3.0]).median, 3.0);
    }

    #[test]
    fn records_become_stages_that_add_up() {
        let d = Traced::new(Reference, Reference, Fallback::Fail);
        let run = || {
            let x = d.upload(2, 3, &[1.0; 6]).unwrap();
            for module in ["vision", "step0"] {
                d.enter(format_args!("{module}"));
                d.gelu(&x).unwrap();
                d.add(&x, &x).unwrap();
                d.exit();
            }
            Timed { wall: Duration::from_secs(1), records: d.take() }
        };
        let mut t = tables(&[run(), run()], 2);
        assert_eq!(fastest_read(&[run()], 2), 0.0, "what no weight is read for says nothing of memory");
        t.measure_by(Some(t.fastest()));
        let shares: Vec<f64> = t.operations.iter().filter_map(|o| o.share).collect();
        assert_eq!(shares.iter().copied().fold(0.0, f64::max), 1.0, "{shares:?}");
        assert_eq!(t.stages.iter().map(|s| s.calls).collect::<Vec<_>>(), [2, 0, 2, 1]);
        assert_eq!(t.stages.iter().map(|s| s.flop).sum::<u64>(), t.total.flop);
        assert_eq!(t.total.flop, 2 * (9 + 1) * 6);
        // Of one run: the shortest times of two need not be of the same one.
        let alone = tables(&[run()], 2);
        let sum: f64 = alone.stages.iter().map(|s| s.ms.min).sum();
        assert!((sum - 1000.0).abs() < 0.01, "{sum} ms of 1000");
        let gelu = t.operations.iter().find(|o| o.name == "gelu").unwrap();
        assert_eq!((gelu.rows, gelu.calls, gelu.bytes), (Some(2), 1, 48));
    }
}
