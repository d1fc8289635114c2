//! Measures a traced inference.

use std::time::{Duration, Instant};

use pi0_device::{Device, Fallback, OpKind, Record, Traced};
use pi0_model::{Checkpoint, Extent, Inputs, Pi0, SampleOptions};

use super::Probe;
use crate::results::{CoverageResults, Environment, Overhead, Ratio, Share, Verified, Workload};
use crate::{Progress, Result};

/// Rounds of `--overhead`: as many as fit into the time given.
const MOST_ROUNDS: usize = 300;
const LEAST_ROUNDS: usize = 8;

/// An inference to trace, and how.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The network.
    pub checkpoint: Checkpoint,
    /// Its inputs.
    pub batch: Vec<Inputs>,
    /// Operations forced off the device.
    pub forced: Vec<OpKind>,
    /// Whether to run without the force too.
    pub verify: bool,
    /// How long to measure what tracing costs, if at all.
    pub overhead: Option<Duration>,
    /// What is run, for the record; also the number of runs and of steps.
    pub workload: Workload,
    /// Machine and device, for the record.
    pub environment: Environment,
}

/// A model whose device is traced.
type Subject<'d, D, H> = Pi0<Traced<&'d D, &'d H>>;

impl Plan {
    fn load<'d, D: Device, H: Device>(
        &self,
        device: &'d D,
        host: &'d H,
        forced: &[OpKind],
        progress: Progress<'_>,
    ) -> Result<Subject<'d, D, H>> {
        let traced = Traced::new(device, host, Fallback::RunOnHost).force_to_host(forced.to_vec());
        let model = Pi0::load(traced, self.checkpoint.clone(), Extent::Cache, &*progress())?;
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
    fn cost<D: Device, H: Device>(
        &self,
        device: &D,
        subject: &Subject<'_, D, H>,
        long: Duration,
        progress: Progress<'_>,
    ) -> Result<Overhead> {
        let bare = Pi0::load(device, self.checkpoint.clone(), Extent::Cache, &*progress())?;
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
        let began = Instant::now();
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
            plain_seconds: super::median(times.iter().map(|t| t[1]).collect()).unwrap_or_default(),
            traced: ratio(0, 1),
            control: ratio(2, 1),
        })
    }

    /// Runs it on `device`, with what that lacks on `host`.
    pub fn run<D: Device, H: Device>(
        self,
        device: &D,
        host: &H,
        progress: Progress<'_>,
    ) -> Result<CoverageResults> {
        let subject = self.load(device, host, &self.forced, progress)?;
        let free = match self.verify {
            true => Some(self.load(device, host, &[], progress)?),
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

        let rows = super::rows(&records);
        let (items, savings) = super::fallbacks(&records, &probes);
        let sum = |f: fn(&Share) -> u64| {
            (rows.iter().map(|r| f(&r.device)).sum::<u64>(), rows.iter().map(|r| f(&r.host)).sum::<u64>())
        };
        let (on_device, on_host) = sum(|s| s.ops);
        let verified = free_times.get(free_times.len() / 2).map(|&measured| {
            let predicted = super::roadmap::predicted(total, &items, &savings);
            Verified {
                forced_seconds: total,
                predicted_seconds: predicted,
                measured_seconds: measured,
                error: predicted / measured - 1.0,
            }
        });
        let overhead = self.overhead.map(|long| self.cost(device, &subject, long, progress)).transpose()?;
        Ok(CoverageResults {
            overhead,
            roadmap: super::roadmap::roadmap(total, on_device + on_host, on_device, items, &savings),
            transfers: super::transfers(&records),
            stages: super::stages(&records),
            total_seconds: total,
            rows,
            verified,
            environment: self.environment,
            workload: self.workload,
        })
    }
}
