//! `pi0 serve`: openpi's policy server.

use std::io::IsTerminal;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result};
use clap::ValueEnum;
use pi0_doctor::Kind;
use pi0_server::{Bound, Served, Settings, runtime, stop_on_signal};
use tracing_subscriber::EnvFilter;

use crate::device::{self, DeviceArgs};
use crate::policy::PolicyArgs;
use crate::weights::WeightsArgs;

/// Serve robots over openpi's websocket protocol, until SIGTERM or ctrl-c
#[derive(clap::Args)]
#[command(after_help = "Examples:
  pi0 serve models/tiny
  pi0 serve pi0_aloha_sim --default-prompt 'Transfer cube' --port 8000
  pi0 serve pi0_base --robot aloha --api-key-file keys.txt --record /var/lib/pi0/requests
  pi0 serve pi0_base --robot aloha --strict image_black,state_outside
Open http://HOST:8000/ in a browser to see what the policy sees, and what the doctor says of it.
Any path is the websocket; GET /healthz, /readyz and /metrics are for machines.
RUST_LOG sets what is logged, such as RUST_LOG=debug.")]
pub struct Args {
    /// Checkpoint: a folder of lerobot's or of openpi's, JAX (with `params`) or PyTorch
    pub model: PathBuf,
    /// Address to listen on [default: 0.0.0.0]
    #[arg(long, value_name = "ADDRESS")]
    pub host: Option<IpAddr>,
    /// Port to listen on; 0 takes a free one and logs it [default: 8000]
    #[arg(long)]
    pub port: Option<u16>,
    /// File of API keys, one a line; clients without one of them are refused
    #[arg(long, value_name = "FILE")]
    pub api_key_file: Option<PathBuf>,
    /// Prompt for observations that bring none
    #[arg(long, value_name = "TEXT")]
    pub default_prompt: Option<String>,
    /// Keep requests and replies in this directory, for `pi0 replay`
    #[arg(long, value_name = "DIR")]
    pub record: Option<PathBuf>,
    /// Most requests in one pass of the network [default: 8]
    #[arg(long, value_name = "N")]
    pub max_batch: Option<usize>,
    /// Most requests that wait; more are refused [default: 64]
    #[arg(long, value_name = "N")]
    pub max_queue: Option<usize>,
    /// Most clients at once [default: 256]
    #[arg(long, value_name = "N")]
    pub max_connections: Option<usize>,
    /// A request without a result after this many seconds is refused [default: 120]
    #[arg(long, value_name = "SECONDS", value_parser = parse_seconds)]
    pub request_timeout: Option<Duration>,
    /// Denoising steps [default: the checkpoint's, usually 10]; of π0-FAST most tokens of an answer [256]
    #[arg(long, value_name = "N")]
    pub steps: Option<usize>,
    /// Seed of the first request's noise [default: by chance]
    #[arg(long)]
    pub seed: Option<u64>,
    /// Do not show what the policy sees at GET /
    #[arg(long)]
    pub no_page: bool,
    /// Findings of the doctor that refuse a request or withhold its answer, separated by commas (docs/doctor.md)
    #[arg(long, value_name = "KINDS", value_delimiter = ',')]
    pub strict: Vec<Kind>,
    /// How to log
    #[arg(long, value_enum, default_value_t)]
    pub log_format: LogFormat,
    /// What the user says of the weights
    #[command(flatten)]
    pub weights: WeightsArgs,
    /// What the user says of the policy
    #[command(flatten)]
    pub policy: PolicyArgs,
    /// Where to run
    #[command(flatten)]
    pub device: DeviceArgs,
}

/// Form of a line of the log.
#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub enum LogFormat {
    /// For people
    #[default]
    Text,
    /// For machines: an object a line
    Json,
}

fn parse_seconds(text: &str) -> Result<Duration, String> {
    let seconds: f64 = text.parse().map_err(|_| "wanted a number of seconds")?;
    Duration::try_from_secs_f64(seconds).map_err(|e| e.to_string())
}

/// Runs the command.
pub fn run(mut args: Args) -> Result<()> {
    start_log(args.log_format);
    let settings = settings(&mut args)?;
    runtime()?.block_on(async {
        let bound = Bound::new(settings)?;
        let stop = stop_on_signal()?;
        let load = move || load(&args);
        // `{:#}` keeps the causes of what the model's loading said.
        bound.serve(load, stop).await.map_err(|e| match e {
            pi0_server::ServeError::Load(e) => e,
            other => anyhow::Error::new(other),
        })
    })
}

/// The settings file, if one is named, with the flags on top.
fn settings(args: &mut Args) -> Result<Settings> {
    // `--config` names a settings file or, as in the other commands, a configuration of openpi's; the file can name
    // neither robot nor configuration, so nobody needs both.
    let is_file = |name: &String| Path::new(name).extension().is_some_and(|e| e.eq_ignore_ascii_case("toml"));
    let mut s = match args.policy.config.take_if(|name| is_file(name)) {
        Some(file) => Settings::open(Path::new(&file))?,
        None => Settings::default(),
    };
    fn put<T: Clone>(setting: &mut T, flag: &Option<T>) {
        if let Some(value) = flag {
            setting.clone_from(value);
        }
    }
    put(&mut s.host, &args.host);
    put(&mut s.port, &args.port);
    put(&mut s.max_batch, &args.max_batch);
    put(&mut s.max_queue, &args.max_queue);
    put(&mut s.max_connections, &args.max_connections);
    put(&mut s.request_timeout, &args.request_timeout);
    s.api_key_file = args.api_key_file.clone().or(s.api_key_file);
    s.record = args.record.clone().or(s.record);
    s.page &= !args.no_page;
    s.strict.extend(&args.strict);
    s.steps = args.steps.or(s.steps);
    s.seed = args.seed.or(s.seed);
    Ok(s)
}

/// Loads model and policy, in the thread that will run them.
fn load(args: &Args) -> Result<Served> {
    let served = open(&args.model, &args.weights, &args.policy, args.default_prompt.clone(), &args.device)?;
    for problem in served.policy.summary().problems {
        tracing::warn!(problem, "checkpoint");
    }
    Ok(served)
}

/// A checkpoint with its policy, on its device.
pub fn open(
    model: &Path,
    weights: &WeightsArgs,
    policy: &PolicyArgs,
    default_prompt: Option<String>,
    device: &DeviceArgs,
) -> Result<Served> {
    let mut checkpoint = weights.open(model, policy.config.as_deref())?;
    let mut options = policy.options()?;
    options.default_prompt = default_prompt;
    let args = policy;
    let policy = pi0_policy::Policy::load(&checkpoint.directory, (&checkpoint.config).into(), &options)?;
    // Before the weights are packed: a server that can only refuse is of no use.
    policy.ready()?;
    args.answer(&mut checkpoint, &policy, device.device)?;
    let loaded = device::load(device, checkpoint)
        .with_context(|| format!("cannot load {} on {}", model.display(), device.device.name()))?;
    tracing::info!(seconds = loaded.time.as_secs_f64(), device = device.device.name(), "model loaded");
    Ok(Served { model: loaded.model, policy })
}

fn start_log(format: LogFormat) {
    let filter = EnvFilter::try_from_default_env().unwrap_or_else(|_| EnvFilter::new("info"));
    let log = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal());
    match format {
        LogFormat::Text => log.init(),
        LogFormat::Json => log.json().init(),
    }
}
