//! What a GPU does launch by launch, by its own clock: the calls of an inference only write a tape, so the host's clock
//! says nothing of them.

use anyhow::Result;
use pi0_device::Device;
use pi0_model::{Checkpoint, Extent, Inputs, SampleOptions};
use pi0_vulkan::paper::Chip;
use pi0_vulkan::{LaunchInfo, Stage};
use serde::{Deserialize, Serialize};

use super::measure::Spread;
use crate::device::{self, DeviceArgs};
use crate::output;

/// Columns of the table; times are milliseconds.
pub const LAUNCH_COLUMNS: [&str; 11] =
    ["launches", "shape", "count", "ms", "spread", "GFLOP", "TFLOP/s", "of peak", "MB", "GB/s", "of memory"];

/// Launches of one inference on a GPU, each timed by the GPU.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Launches {
    /// How many.
    pub count: usize,
    /// Barriers between them.
    pub barriers: usize,
    /// From the first launch's start to the last one's end, milliseconds; none where the GPU has no clock.
    pub gpu: Option<Spread>,
    /// Host work of one replayed inference from its first operation to the submission, milliseconds: the model's and the
    /// tape's, comparison and uploads.
    pub host: Spread,
    /// Microseconds of one more launch that does nothing and waits for the one before.
    pub launch_cost: f64,
    /// GB/s of a copy in device memory, reads and writes together.
    pub bandwidth: f64,
    /// GPU whose published rates the shares of the peak are of, if it is known.
    pub chip: Option<String>,
    /// Bytes of device memory: weights, and in all while running.
    pub memory: [u64; 2],
    /// By stage, kernel and shape, the longest first.
    pub lines: Vec<Line>,
}

/// Launches of one kind and shape.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Line {
    /// Stage and kernel.
    pub name: String,
    /// Rows and columns; of products rows, inputs and outputs; of attention query rows, key rows and columns.
    pub shape: [u32; 3],
    /// Launches.
    pub count: usize,
    /// Milliseconds of all of them.
    pub ms: Option<Spread>,
    /// Floating-point operations.
    pub flop: u64,
    /// Bytes, each operand moved once.
    pub bytes: u64,
    /// Share of the published peak.
    pub share: Option<f64>,
    /// Share of the measured bandwidth.
    pub memory_share: Option<f64>,
}

/// Loads the model once more, with the GPU's clock, and runs it `repeat` times.
pub fn measure(
    args: &DeviceArgs,
    index: usize,
    checkpoint: &Checkpoint,
    batch: &[Inputs],
    options: &SampleOptions,
    repeat: usize,
) -> Result<Launches> {
    // On a device of its own, whose memory is no part of what is measured below.
    let yardstick = args.vulkan(index, false)?;
    let (launch_cost, bandwidth) = (yardstick.launch_cost()? * 1e6, yardstick.bandwidth()? / 1e9);
    drop(yardstick);
    let bare = args.vulkan(index, false)?;
    // Host work without the clock, which adds some; both runs are warm.
    let model = device::pack(bare, checkpoint.clone(), Extent::Cache)?;
    let held = |d: &pi0_vulkan::Vulkan| d.memory().map_or(0, |m| m.bytes());
    let weights = held(model.device());
    let mut host = vec![];
    for round in 0..=repeat {
        let before = model.device().stats().host;
        model.sample_actions(batch, options)?;
        if round > 0 {
            host.push((model.device().stats().host - before).as_secs_f64() * 1e3);
        }
    }
    let memory = [weights, held(model.device())];
    drop(model);
    let model = device::pack(args.vulkan(index, true)?, checkpoint.clone(), Extent::Cache)?;
    let mut runs: Vec<Vec<LaunchInfo>> = vec![];
    for round in 0..=repeat {
        model.sample_actions(batch, options)?;
        let launches = model.device().launches();
        if round > 0 {
            runs.push(launches);
        }
    }
    let chip = Chip::find(&model.device().info().name);
    let seconds = |run: &Vec<LaunchInfo>| run.iter().map(|l| l.seconds).sum::<Option<f64>>();
    let gpu = runs.iter().map(seconds).collect::<Option<Vec<_>>>();
    Ok(Launches {
        count: runs[0].len(),
        barriers: runs[0].iter().filter(|l| l.barrier).count(),
        gpu: gpu.map(|s| Spread::of(s.iter().map(|s| s * 1e3).collect())),
        host: Spread::of(host),
        launch_cost,
        bandwidth,
        chip: chip.map(|c| c.name.to_string()),
        memory,
        lines: lines(&runs, chip, bandwidth),
    })
}

fn lines(runs: &[Vec<LaunchInfo>], chip: Option<Chip>, bandwidth: f64) -> Vec<Line> {
    let key = |l: &LaunchInfo| (l.stage, l.kernel, l.unit, l.shape);
    let mut keys: Vec<_> = vec![];
    for l in &runs[0] {
        if !keys.contains(&key(l)) {
            keys.push(key(l));
        }
    }
    let line = |k: &(Stage, _, _, _)| {
        let of = |run: &Vec<LaunchInfo>| run.iter().filter(|l| key(l) == *k).copied().collect::<Vec<_>>();
        let one = of(&runs[0]);
        let ms = runs.iter().map(|run| of(run).iter().map(|l| l.seconds).sum::<Option<f64>>());
        let ms = ms.collect::<Option<Vec<_>>>().map(|s| Spread::of(s.iter().map(|s| s * 1e3).collect()));
        let (flop, bytes) =
            (one.iter().map(|l| l.flop).sum::<u64>(), one.iter().map(|l| l.bytes).sum::<u64>());
        let rate = |work: u64| ms.filter(|ms| ms.median > 0.0).map(|ms| work as f64 / ms.median / 1e6);
        Line {
            name: format!("{} {} {}", k.0.name(), k.1, k.2),
            shape: k.3,
            count: one.len(),
            ms,
            flop,
            bytes,
            share: chip.and_then(|c| Some(rate(flop)? / 1e3 / c.peak(k.2))),
            memory_share: rate(bytes).map(|r| r / bandwidth),
        }
    };
    let mut lines: Vec<_> = keys.iter().map(line).collect();
    let ms = |l: &Line| l.ms.map_or(0.0, |ms| ms.median);
    lines.sort_by(|a, b| ms(b).total_cmp(&ms(a)));
    lines
}

impl Launches {
    /// All that is no table.
    pub fn facts(&self) -> Vec<(&'static str, String)> {
        let [weights, all] = self.memory.map(|b| b as f64);
        let gpu =
            self.gpu.map_or("the GPU has no clock".into(), |s| format!("{:.2} ms on the GPU", s.median));
        vec![
            ("launches", format!("{} and {} barriers: {gpu}", self.count, self.barriers)),
            ("host", format!("{:.3} ms to write, find and submit the recorded inference", self.host.median)),
            ("empty launch", format!("{:.2} µs after the one before", self.launch_cost)),
            ("copies", format!("{:.1} GB/s, read and written", self.bandwidth)),
            (
                "device memory",
                format!(
                    "{} of weights and {} in all, {:.1} % more",
                    output::size(self.memory[0]),
                    output::size(self.memory[1]),
                    100.0 * (all - weights) / weights.max(1.0)
                ),
            ),
            (
                "peak",
                self.chip.as_ref().map_or("this GPU's published rates are not known here".into(), |c| {
                    format!("shares are of the published rates of the {c}")
                }),
            ),
        ]
    }

    /// Cells under [`LAUNCH_COLUMNS`].
    pub fn cells(&self) -> Vec<Vec<String>> {
        let percent = |share: Option<f64>| share.map_or(String::new(), |s| format!("{:.1}%", 100.0 * s));
        let cells = |l: &Line| {
            let shape: Vec<String> = l.shape.iter().filter(|n| **n > 0).map(u32::to_string).collect();
            let rate = |work: u64, unit: f64| {
                let per = l.ms.filter(|ms| ms.median > 0.0).map(|ms| work as f64 / ms.median * 1e3 / unit);
                per.filter(|r| *r > 0.0).map_or(String::new(), |r| format!("{r:.2}"))
            };
            vec![
                l.name.clone(),
                shape.join("x"),
                l.count.to_string(),
                l.ms.map_or(String::new(), |ms| format!("{:.3}", ms.median)),
                l.ms.map_or(String::new(), |ms| format!("{:.1}%", 100.0 * ms.relative())),
                format!("{:.2}", l.flop as f64 / 1e9),
                rate(l.flop, 1e12),
                percent(l.share),
                format!("{:.1}", l.bytes as f64 / 1e6),
                rate(l.bytes, 1e9),
                percent(l.memory_share),
            ]
        };
        self.lines.iter().map(cells).collect()
    }
}

#[cfg(test)]
mod tests {
    use pi0_vulkan::Unit;

    use super::*;

    #[test]
    fn launches_of_a_shape_become_a_line_and_its_shares() {
        let launch = |shape, seconds| LaunchInfo {
            stage: Stage::Prefix,
            kernel: "product",
            unit: Unit::Bf16,
            shape,
            flop: 2_000_000_000,
            bytes: 1_000_000,
            groups: 1,
            barrier: true,
            seconds: Some(seconds),
        };
        let run = vec![launch([1, 2, 3], 1e-3), launch([4, 5, 6], 5e-3), launch([1, 2, 3], 1e-3)];
        let chip = Chip::find("rtx-4090").unwrap();
        let lines = lines(&[run.clone(), run], Some(chip), 1.0);
        assert_eq!(
            (lines.len(), lines[0].shape, lines[1].count, lines[1].flop),
            (2, [4, 5, 6], 2, 4_000_000_000)
        );
        // 4 GFLOP in 2 ms are 2 TFLOP/s, and 2 MB in 2 ms 1 GB/s.
        assert!((lines[1].share.unwrap() - 2.0 / chip.matrix).abs() < 1e-9);
        assert!((lines[1].memory_share.unwrap() - 1.0).abs() < 1e-9);
    }
}
