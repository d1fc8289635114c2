//! The thread that owns the network: takes what waits, runs it as one batch, survives whatever happens in it.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::time::Instant;

use pi0_device::HostTensor;
use pi0_model::{ActionModel, Inputs, SampleOptions};

use crate::Failure;
use crate::metrics::Metrics;
use crate::queue::{Done, Job, Queue};

/// How the network is run.
#[derive(Debug, Clone, Copy)]
pub(crate) struct EngineOptions {
    pub max_batch: usize,
    pub steps: Option<usize>,
    /// Of the first request's noise; each further request takes the next.
    pub seed: u64,
}

/// Runs batches until the queue is closed and empty.
pub(crate) fn run(model: &dyn ActionModel, queue: &Queue, options: EngineOptions, metrics: &Metrics) {
    let mut seed = options.seed;
    while let Some(jobs) = queue.take(options.max_batch) {
        metrics.batch_size.observe(jobs.len() as f64);
        let next = seed.wrapping_add(jobs.len() as u64);
        run_batch(model, jobs, options.steps, seed, metrics);
        seed = next;
    }
}

fn run_batch(
    model: &dyn ActionModel,
    mut jobs: Vec<Job>,
    steps: Option<usize>,
    seed: u64,
    metrics: &Metrics,
) {
    let inputs: Vec<Inputs> = jobs.iter_mut().map(|job| std::mem::take(&mut job.inputs)).collect();
    let started = Instant::now();
    let results = sample(model, &inputs, steps, seed);
    let ended = Instant::now();
    metrics.stage("inference", ended - started);
    match results {
        Ok(chunks) => {
            for (row, (job, actions)) in jobs.into_iter().zip(chunks).enumerate() {
                answer(job, Ok((actions, started, ended)), seed.wrapping_add(row as u64));
            }
        }
        Err(failure) if jobs.len() == 1 => {
            jobs.into_iter().for_each(|job| answer(job, Err(failure.clone()), seed));
        }
        // One of them is to blame; the others must not suffer, so each runs alone.
        Err(failure) => {
            tracing::warn!(%failure, batch = jobs.len(), "a batch failed, its requests run one by one");
            for (row, (job, inputs)) in jobs.into_iter().zip(inputs).enumerate() {
                let seed = seed.wrapping_add(row as u64);
                let started = Instant::now();
                let result = sample(model, &[inputs], steps, seed);
                let ended = Instant::now();
                let result = result.map(|chunks| chunks.into_iter().next());
                answer(
                    job,
                    result.and_then(|chunk| match chunk {
                        Some(actions) => Ok((actions, started, ended)),
                        None => Err(Failure::Model("the model returned nothing".into())),
                    }),
                    seed,
                );
            }
        }
    }
}

fn answer(job: Job, result: Result<(HostTensor, Instant, Instant), Failure>, seed: u64) {
    let result = result.map(|(actions, started, ended)| Done { actions, started, ended, seed });
    // An error means that the client has gone: nobody is left to tell.
    let _ = job.reply.send(result);
}

/// One call of the network, with panics turned into failures.
fn sample(
    model: &dyn ActionModel,
    inputs: &[Inputs],
    steps: Option<usize>,
    seed: u64,
) -> Result<Vec<HostTensor>, Failure> {
    let call = || model.sample_actions(inputs, &SampleOptions { steps, seed });
    // The network is read-only but for caches that a device keeps; a device that breaks goes on failing, which
    // metrics show, while others recover.
    let chunks = match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|e| Failure::Model(e.to_string()))?,
        Err(payload) => return Err(Failure::panic(&*payload)),
    };
    match chunks.len() == inputs.len() {
        true => Ok(chunks),
        false => Err(Failure::Model(format!("{} results for {} inputs", chunks.len(), inputs.len()))),
    }
}
