//! `pi0.load`: the options of the command line, under the same names.

use std::path::PathBuf;
use std::sync::Arc;

use anyhow::Context;
use clap::Parser;
use pi0_cli::device::{self, DeviceArgs};
use pi0_cli::policy::PolicyArgs;
use pi0_cli::weights::WeightsArgs;
use pi0_server::{Limits, Translator};
use pyo3::prelude::*;

use crate::errors::{self, Class};
use crate::model::Model;
use crate::policy::Policy;
use crate::watch::Watch;
use crate::worker::{Event, Worker, wait};

/// What the command line takes for a policy on a device.
#[derive(Parser)]
#[command(no_binary_name = true, disable_help_flag = true)]
struct Options {
    model: PathBuf,
    #[arg(long)]
    default_prompt: Option<String>,
    #[arg(long)]
    steps: Option<usize>,
    #[arg(long)]
    seed: Option<u64>,
    #[arg(long, value_delimiter = ',')]
    strict: Vec<pi0_doctor::Kind>,
    #[command(flatten)]
    weights: WeightsArgs,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

impl Options {
    fn parse(py: Python<'_>, args: Vec<String>) -> PyResult<Self> {
        Self::try_parse_from(args).map_err(|e| {
            // The first paragraph says what is wrong; usage lines are those of a command.
            let text = e.to_string();
            let text = text.split("\n\n").next().unwrap_or_default();
            Class::Option.raise(py, text.trim_start_matches("error: ").trim_end())
        })
    }
}

/// Loads a checkpoint onto a device. `args` is the model and the options as flags; `progress` is called with bytes packed
/// and bytes in all.
#[pyfunction]
pub fn load(py: Python<'_>, args: Vec<String>, progress: Option<Bound<'_, PyAny>>) -> PyResult<Policy> {
    let options = Options::parse(py, args)?;
    let opened = py.detach(|| -> anyhow::Result<_> {
        let checkpoint = options.weights.open(&options.model, options.policy.config.as_deref())?;
        let mut policy = options.policy.options()?;
        policy.default_prompt = options.default_prompt.clone();
        let policy = pi0_policy::Policy::load(&checkpoint.directory, (&checkpoint.config).into(), &policy)?;
        Ok((checkpoint, policy))
    });
    let (checkpoint, policy) = opened.map_err(|e| errors::of_any(py, &e))?;
    let config = checkpoint.config.clone();
    let bytes: u64 = checkpoint.bytes_by_dtype().values().sum();
    let (name, place) = (options.model.display().to_string(), options.device.device.name());
    let args = options.device.clone();
    let load = move |packed: &dyn Fn(u64)| {
        device::load_silently(&args, checkpoint, packed)
            .with_context(|| format!("cannot load {name} on {place}"))
    };
    let (worker, events) =
        Worker::start(load).map_err(|e| Class::Device.raise(py, format!("cannot start a thread: {e}")))?;
    let mut done = 0;
    loop {
        match wait(py, &events)? {
            Some(Event::Packed(more)) => {
                done += more;
                if let Some(progress) = &progress {
                    progress.call1((done, bytes))?;
                }
            }
            Some(Event::Loaded(Ok(()))) => break,
            Some(Event::Loaded(Err(e))) => return Err(errors::of_any(py, &e)),
            None => return Err(Class::Internal.raise(py, "loading ended without a word, please report it")),
        }
    }
    let watch = Watch::new(&policy, options.strict);
    let translator = Translator::new(policy, &config, Limits::default());
    let model = Model::new(Arc::new(worker), Arc::new(config), options.steps, place);
    Ok(Policy::new(model, translator, watch, options.seed))
}
