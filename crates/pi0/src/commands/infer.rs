//! `pi0 infer`: one observation in, one chunk of actions out.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, anyhow, bail};
use npyz::WriterBuilder;
use pi0_device::{Device, HostTensor, Tapped};
use pi0_doctor::{Kind as Finding, Thresholds};
use pi0_model::golden::{golden_taps, read_inputs, read_previous_chunk, write_tensors};
use pi0_model::{Checkpoint, Clean, Extent, Guidance, GuidanceSchedule, Inputs, Kind, Rtc, SampleOptions};
use pi0_policy::{Actions, Image, Observation, Policy};
use pi0_server::Examiner;

use crate::device::{self, DeviceArgs, Visitor};
use crate::output;
use crate::policy::PolicyArgs;
use crate::weights::WeightsArgs;

/// Turn images, state and a prompt into a chunk of actions
#[derive(clap::Args)]
#[command(after_help = "Examples:
  pi0 infer models/tiny --image base_0_rgb=samples/aloha_top.png --state 0,0,0,0,0,0,0,0,0,0,0,0,0,0 \\
      --prompt 'Transfer cube'
  pi0 infer pi0_base --robot aloha --image cam_high=high.png --state 0,0,0,0,0,0,0,0,0,0,0,0,0,0 \\
      --prompt 'fold the towel' --out actions.npy
  pi0 infer golden/b --inputs run.inputs.safetensors --output actions.safetensors --dump taps.safetensors
  pi0 infer golden/d --inputs golden/d/rtc_trained_b1.inputs.safetensors --output actions.safetensors \\
      --rtc trained --delay 3")]
pub struct Args {
    /// Checkpoint: a folder of lerobot's or of openpi's, JAX (with `params`) or PyTorch
    model: PathBuf,
    /// Camera image, PNG or JPEG; repeat for each camera. A camera left out is masked
    #[arg(long = "image", value_name = "NAME=FILE", conflicts_with = "inputs")]
    images: Vec<String>,
    /// The robot's state in its own units, separated by commas
    #[arg(long, value_name = "X,Y,…", allow_hyphen_values = true, conflicts_with = "inputs")]
    state: Option<String>,
    /// What to do
    #[arg(long, value_name = "TEXT", conflicts_with = "inputs")]
    prompt: Option<String>,
    /// Write the actions to FILE.json or FILE.npy instead of printing a table
    #[arg(long, value_name = "FILE", conflicts_with = "inputs")]
    out: Option<PathBuf>,
    /// Write a page that shows what the policy sees, what it answers and what the doctor says
    #[arg(long, value_name = "FILE", conflicts_with = "inputs")]
    html: Option<PathBuf>,
    /// Findings of the doctor that are errors, separated by commas (docs/doctor.md); of --inputs answer_malformed alone
    #[arg(long, value_name = "KINDS", value_delimiter = ',')]
    strict: Vec<Finding>,
    /// Read model tensors instead of images, state and prompt; named as in the golden data
    #[arg(long, value_name = "FILE", requires = "output")]
    inputs: Option<PathBuf>,
    /// Write the tensor `actions` here; of π0-FAST also `tokens`, and `actions` if --tokenizer and --action-tokenizer are
    /// known
    #[arg(long, value_name = "FILE", requires = "inputs")]
    output: Option<PathBuf>,
    /// Also write every intermediate here, under the golden names
    #[arg(long, value_name = "FILE", requires = "inputs")]
    dump: Option<PathBuf>,
    #[command(flatten)]
    chunking: Chunking,
    /// Seed of the starting noise, or of π0-FAST's tokens at a temperature
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Denoising steps [default: the checkpoint's, usually 10]; of π0-FAST most tokens of an answer [256]
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    #[command(flatten)]
    weights: WeightsArgs,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Real-time chunking of `--inputs`.
#[derive(clap::Args)]
#[command(next_help_heading = "Real-time chunking")]
struct Chunking {
    /// Continue the previous chunk, tensor `prev_chunk` of --inputs: [n, a], or [B, n, a] for a batch; normalized
    #[arg(long, value_name = "MODE", value_enum, requires = "inputs", requires = "delay")]
    rtc: Option<Mode>,
    /// Actions of the previous chunk that are executed during this inference
    #[arg(long, value_name = "N", requires = "rtc")]
    delay: Option<usize>,
    /// Actions over which guided chunks are tied together [default: 10]
    #[arg(long, value_name = "N", requires = "rtc")]
    execution_horizon: Option<usize>,
    /// How the tie of guided chunks weakens after the delay [default: linear]
    #[arg(long, value_enum, requires = "rtc")]
    schedule: Option<Schedule>,
    /// Largest weight of the correction of guided chunks [default: 10]
    #[arg(long, value_name = "W", requires = "rtc")]
    max_guidance: Option<f64>,
}

/// How the previous chunk is continued.
#[derive(Debug, Clone, Copy, PartialEq, clap::ValueEnum)]
enum Mode {
    /// Pulled towards it; any checkpoint
    Guided,
    /// Written behind its next actions; π0.5 checkpoints that learned it
    Trained,
}

/// See [`GuidanceSchedule`].
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
enum Schedule {
    /// Straight
    Linear,
    /// Faster at first
    Exp,
    /// Not at all up to the execution horizon
    Ones,
    /// At once
    Zeros,
}

impl Chunking {
    /// Adds the previous chunk to a batch that was read from `file`.
    fn apply(&self, file: &Path, batch: &mut [Inputs], action_dim: usize) -> Result<()> {
        let previous = read_previous_chunk(file, batch.len(), action_dim)?;
        let Some(mode) = self.rtc else {
            if previous.is_some() {
                eprintln!("warning: {} holds prev_chunk, which only --rtc reads", file.display());
            }
            return Ok(());
        };
        let previous = previous.with_context(|| {
            format!("{} has no tensor prev_chunk [rows, width], which --rtc continues", file.display())
        })?;
        let guided_only = [
            (self.execution_horizon.is_some(), "--execution-horizon"),
            (self.schedule.is_some(), "--schedule"),
            (self.max_guidance.is_some(), "--max-guidance"),
        ];
        if let (Mode::Trained, Some((_, option))) = (mode, guided_only.iter().find(|(given, _)| *given)) {
            bail!("{option} means something for --rtc guided alone");
        }
        let delay = self.delay.unwrap_or(0);
        let max_weight = self.max_guidance.unwrap_or(10.0);
        if !max_weight.is_finite() || max_weight < 0.0 {
            bail!("--max-guidance is {max_weight}, wanted a number from 0");
        }
        for (inputs, previous) in batch.iter_mut().zip(previous) {
            inputs.rtc = Some(match mode {
                Mode::Trained => Rtc::Trained(Clean { previous, delay }),
                Mode::Guided => Rtc::Guided(Guidance {
                    previous,
                    delay,
                    execution_horizon: self.execution_horizon.unwrap_or(10),
                    max_weight,
                    schedule: match self.schedule {
                        None | Some(Schedule::Linear) => GuidanceSchedule::Linear,
                        Some(Schedule::Exp) => GuidanceSchedule::Exp,
                        Some(Schedule::Ones) => GuidanceSchedule::Ones,
                        Some(Schedule::Zeros) => GuidanceSchedule::Zeros,
                    },
                }),
            });
        }
        Ok(())
    }
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    match (&args.inputs, &args.output) {
        (Some(inputs), Some(output)) => run_tensors(args, inputs, output),
        _ => run_observation(args),
    }
}

fn run_observation(args: &Args) -> Result<()> {
    let format = args.out.as_deref().map(Format::of).transpose()?;
    let mut checkpoint = args.open()?;
    let policy = args.policy.load(&checkpoint.directory, &checkpoint.config)?;
    let observation = Observation {
        images: args.images.iter().map(|s| parse_image(s)).collect::<Result<_>>()?,
        state: parse_state(args.state.as_deref())?,
        prompt: args.prompt.clone(),
    };
    // Before the weights are packed, so that a wrong argument answers at once.
    let prepared = policy.preprocess(&observation)?;
    for problem in policy.summary().problems {
        eprintln!("warning: {problem}");
    }
    for w in &prepared.warnings {
        eprintln!("warning: {w}");
    }
    args.policy.answer(&mut checkpoint, &policy, args.device.device)?;
    let loaded = device::load(&args.device, checkpoint)?;
    let start = Instant::now();
    let spinner = output::spinner("thinking");
    let chunks = loaded.model.sample_actions(std::slice::from_ref(&prepared.inputs), &args.options())?;
    let time = start.elapsed();
    drop(spinner);
    let actions = policy.postprocess(&chunks[0].data, &prepared)?;
    let mut examiner = Examiner::new(policy, loaded.model.config(), Thresholds::default());
    let examined = examiner.observation(&observation, &prepared, &chunks[0].data, time.as_secs_f64(), 0.0)?;
    // That one answer took long says nothing about a server; the prompt was judged above.
    let quiet = [Finding::Latency, Finding::PromptCut, Finding::PromptEmpty];
    for finding in examined.findings.iter().filter(|finding| !quiet.contains(&finding.kind)) {
        eprintln!("warning: {}", finding.sentence());
    }
    if let Some(path) = &args.html {
        let views: Vec<_> = examined.view_with_pictures().into_iter().collect();
        super::doctor::write_page(path, &args.model.display().to_string(), &views)?;
    }
    if let Some(finding) = examined.findings.iter().find(|finding| args.strict.contains(&finding.kind)) {
        bail!("refused by --strict: {}: {}", finding.kind, finding.sentence());
    }
    match (&args.out, format) {
        (Some(path), Some(format)) => format.write(path, &actions)?,
        _ => output::print(&table(&actions))?,
    }
    eprintln!(
        "{} actions of {} values in {:.2} s, loading took {:.2} s",
        actions.rows,
        actions.cols,
        time.as_secs_f64(),
        loaded.time.as_secs_f64()
    );
    if examiner.policy().writes_tokens() {
        let tokens = chunks[0].data.len();
        eprintln!(
            "the answer has {tokens} tokens, {:.1} a second, prompt included",
            tokens as f64 / time.as_secs_f64()
        );
    }
    Ok(())
}

fn run_tensors(args: &Args, inputs: &Path, output: &Path) -> Result<()> {
    if let Some(kind) = args.strict.iter().find(|kind| **kind != Finding::AnswerMalformed) {
        bail!("--strict {kind}: of model tensors only {} can be found", Finding::AnswerMalformed);
    }
    let mut batch = read_inputs(inputs)?;
    let mut checkpoint = args.open()?;
    args.chunking.apply(inputs, &mut batch, checkpoint.config.action_dim)?;
    let reader = match checkpoint.config.kind {
        Kind::Pi0Fast => Some(Answers::find(args, &mut checkpoint, &mut batch)?),
        Kind::Pi0 | Kind::Pi05 => None,
    };
    let limit = args.steps.or(checkpoint.config.answer.as_ref().map(|answer| answer.max_tokens));
    let options = args.options();
    let _spinner = output::spinner("thinking");
    let actions = match &args.dump {
        None => device::load(&args.device, checkpoint)?.model.sample_actions(&batch, &options)?,
        Some(path) => {
            let dump = Dump { checkpoint, batch: &batch, options: &options };
            let (actions, taps) = device::with_device(&args.device, dump)?;
            write_tensors(path, &taps)?;
            actions
        }
    };
    if let Some(reader) = reader {
        let strict = args.strict.contains(&Finding::AnswerMalformed);
        return Ok(write_tensors(output, &reader.tensors(&actions, limit.unwrap_or_default(), strict)?)?);
    }
    let shape = [actions.len(), actions[0].shape[0], actions[0].shape[1]];
    let data = actions.into_iter().flat_map(|a| a.data).collect();
    write_tensors(output, &BTreeMap::from([("actions".to_string(), HostTensor::new(shape, data))]))?;
    Ok(())
}

/// What reads the answers of π0-FAST where model tensors go in.
struct Answers {
    /// None where tokenizer or codec are not known: then tokens are all there is.
    policy: Option<Policy>,
}

impl Answers {
    /// Looks for tokenizer and codec, and tells the batch where an answer ends.
    fn find(args: &Args, checkpoint: &mut Checkpoint, batch: &mut [Inputs]) -> Result<Self> {
        let policy = args.policy.load(&checkpoint.directory, &checkpoint.config)?;
        let end = match policy.answer_end() {
            Ok(end) => end,
            Err(e) => {
                eprintln!("warning: {e}; tokens are written, and no actions; an answer ends with <eos>");
                return Ok(Self { policy: None });
            }
        };
        batch.iter_mut().for_each(|inputs| inputs.end = end);
        args.policy.answer(checkpoint, &policy, args.device.device)?;
        Ok(Self { policy: Some(policy) })
    }

    /// `tokens` `[B, limit]`, zeros behind each answer's end, and `actions` `[B, T, A]`, normalized. A malformed answer is
    /// told, or with `strict` an error.
    fn tensors(
        &self,
        answers: &[HostTensor],
        limit: usize,
        strict: bool,
    ) -> Result<BTreeMap<String, HostTensor>> {
        let mut tokens = HostTensor::zeros([answers.len(), limit]);
        let (mut actions, mut chunk) = (Vec::new(), [0; 2]);
        for (i, answer) in answers.iter().enumerate() {
            tokens.row_mut(i)[..answer.data.len()].copy_from_slice(&answer.data);
            let Some(policy) = &self.policy else { continue };
            let reply = policy.read_answer(&answer.data).with_context(|| format!("answer {i}"))?;
            if strict && !reply.faults.is_empty() {
                let faults: Vec<String> = reply.faults.iter().map(ToString::to_string).collect();
                bail!("refused by --strict: {}: answer {i}: {}", Finding::AnswerMalformed, faults.join("; "));
            }
            for fault in &reply.faults {
                eprintln!("warning: answer {i}: {fault}");
            }
            chunk = reply.shape;
            actions.extend(reply.actions.iter().map(|&x| x as f32));
        }
        let mut tensors = BTreeMap::from([("tokens".to_string(), tokens)]);
        if self.policy.is_some() {
            let shape = [answers.len(), chunk[0], chunk[1]];
            tensors.insert("actions".into(), HostTensor::new(shape, actions));
        }
        Ok(tensors)
    }
}

/// Runs the whole network, layer by layer, and keeps every intermediate.
struct Dump<'a> {
    checkpoint: Checkpoint,
    batch: &'a [pi0_model::Inputs],
    options: &'a SampleOptions,
}

impl Visitor for Dump<'_> {
    type Output = (Vec<HostTensor>, BTreeMap<String, HostTensor>);

    fn visit<D: Device + 'static>(self, device: D) -> Result<Self::Output> {
        let config = self.checkpoint.config.clone();
        let model = device::pack(Tapped::new(device), self.checkpoint, Extent::Whole)?;
        let actions = model.sample_actions(self.batch, self.options)?;
        let times = config.schedule.times(self.options.steps.unwrap_or(config.num_steps));
        let taps = golden_taps(model.device().take()?, self.batch, &config, &times, config.max_tokens)?;
        Ok((actions, taps))
    }
}

impl Args {
    fn open(&self) -> Result<Checkpoint> {
        self.weights.open(&self.model, self.policy.config.as_deref())
    }

    fn options(&self) -> SampleOptions {
        SampleOptions { steps: self.steps, seed: self.seed }
    }
}

/// `NAME=FILE`.
fn parse_image(text: &str) -> Result<(String, Image)> {
    let Some((name, file)) = text.split_once('=').filter(|(name, file)| !name.is_empty() && !file.is_empty())
    else {
        bail!("--image {text}: wanted NAME=FILE, such as base_0_rgb=top.png");
    };
    Ok((name.to_string(), Image::open(name, Path::new(file))?))
}

fn parse_state(text: Option<&str>) -> Result<Vec<f64>> {
    let Some(text) = text else { return Ok(Vec::new()) };
    let number = |s: &str| s.trim().parse().map_err(|_| anyhow!("--state: {:?} is not a number", s.trim()));
    text.split(',').map(number).collect()
}

/// File formats of `--out`, told by the ending.
#[derive(Clone, Copy)]
enum Format {
    Json,
    Npy,
}

impl Format {
    fn of(path: &Path) -> Result<Self> {
        match path.extension().and_then(|e| e.to_str()) {
            Some("json") => Ok(Format::Json),
            Some("npy") => Ok(Format::Npy),
            _ => bail!("--out {}: the name must end in .json or .npy", path.display()),
        }
    }

    fn write(self, path: &Path, actions: &Actions) -> Result<()> {
        match self {
            Format::Json => output::write_json(path, &actions.iter().collect::<Vec<_>>()),
            Format::Npy => {
                let in_file = || format!("cannot write {}", path.display());
                let file = std::fs::File::create(path).with_context(in_file)?;
                let shape = [actions.rows as u64, actions.cols as u64];
                let mut writer = npyz::WriteOptions::new()
                    .default_dtype()
                    .shape(&shape)
                    .writer(std::io::BufWriter::new(file))
                    .begin_nd()
                    .with_context(in_file)?;
                writer.extend(actions.data.iter().map(|&x| x as f32)).with_context(in_file)?;
                writer.finish().with_context(in_file)
            }
        }
    }
}

fn table(actions: &Actions) -> String {
    let header: Vec<_> =
        ["step".to_string()].into_iter().chain((0..actions.cols).map(|c| c.to_string())).collect();
    let row = |(i, row): (usize, &[f64])| {
        let values = row.iter().map(|x| format!("{x:.4}"));
        [i.to_string()].into_iter().chain(values).collect()
    };
    output::table(&header, actions.iter().enumerate().map(row))
}
