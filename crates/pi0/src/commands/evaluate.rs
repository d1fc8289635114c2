//! `pi0 evaluate`: a policy against recorded actions, chunk by chunk, before it moves a robot.

use std::io::Write as _;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, anyhow, bail};
use pi0_dataset::{Camera, Dataset, EpisodeErrors, EpisodeMeta, Ffmpeg, Frame, OpenLoop, Rename, Sums};
use pi0_doctor::{Kind, Summary};
use pi0_judge::report::frame;
use pi0_judge::report::html::{Cell, escape, facts, figure, table};
use pi0_judge::report::svg::{Bar, Series, bars, lines};
use pi0_model::{ActionModel, SampleOptions};
use pi0_policy::{Image, Observation, Policy};
use pi0_server::Examiner;
use serde::{Deserialize, Serialize};

use super::doctor::{self, ThresholdArgs};
use crate::device::{self, DeviceArgs};
use crate::output;
use crate::policy::PolicyArgs;
use crate::weights::WeightsArgs;

/// Compare a policy's actions with those recorded in a lerobot dataset
///
/// Runs the policy at every chunk of every episode, on the recorded pictures, state and task, and reports the error by
/// dimension, step of the chunk and episode, with what the doctor says of the data.
#[derive(clap::Args)]
#[command(after_help = "Examples:
  pi0 evaluate pi0_finetuned ~/.cache/huggingface/lerobot/me/pick --html pick.html
  pi0 evaluate models/demo recorded --episodes 10 --resume pick.jsonl --json -
Versions 2.0, 2.1 and 3.0 of the format are read; pictures in videos need an installed ffmpeg.")]
pub struct Args {
    /// Checkpoint directory, or an address (hf://, gs://)
    model: PathBuf,
    /// Dataset directory, with `meta/info.json`
    dataset: PathBuf,
    /// Evaluate the first N episodes only
    #[arg(long, value_name = "N")]
    episodes: Option<usize>,
    /// Frames between two chunks [default: the actions that a robot gets of each]
    #[arg(long, value_name = "N")]
    every: Option<usize>,
    /// A camera of the dataset under the policy's name of it, where the names differ; repeat for each
    #[arg(long = "camera", value_name = "DATASET=POLICY")]
    cameras: Vec<String>,
    /// Feature of the state [default: observation.state, or state]
    #[arg(long, value_name = "KEY")]
    state: Option<String>,
    /// Feature of the action [default: action, or actions]
    #[arg(long, value_name = "KEY")]
    action: Option<String>,
    /// What to do, instead of the dataset's tasks
    #[arg(long, value_name = "TEXT")]
    prompt: Option<String>,
    /// Write a page with plots to FILE
    #[arg(long, value_name = "FILE")]
    html: Option<PathBuf>,
    /// Write everything to FILE as JSON; `-` is standard output
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Keep each finished episode in FILE, and go on from there if it exists
    #[arg(long, value_name = "FILE")]
    resume: Option<PathBuf>,
    /// The program that decodes videos [default: ffmpeg of the search path]
    #[arg(long, value_name = "FILE")]
    ffmpeg: Option<PathBuf>,
    /// Chunks in one pass of the network
    #[arg(long, value_name = "N", default_value_t = 1, value_parser = clap::value_parser!(u16).range(1..=256))]
    batch: u16,
    /// Seed of the first chunk's noise; each further chunk takes the next
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Denoising steps [default: the checkpoint's, usually 10]
    #[arg(long, value_name = "N")]
    steps: Option<usize>,
    #[command(flatten)]
    thresholds: ThresholdArgs,
    #[command(flatten)]
    weights: WeightsArgs,
    #[command(flatten)]
    policy: PolicyArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

/// What must be the same for an evaluation to go on.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Setup {
    model: PathBuf,
    dataset: PathBuf,
    device: String,
    every: usize,
    seed: u64,
    steps: Option<usize>,
    prompt: Option<String>,
    /// Camera of the dataset, and the policy's name of it.
    cameras: Vec<(String, String)>,
}

/// One finished episode.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
struct Done {
    errors: EpisodeErrors,
    doctor: Summary,
}

/// Everything, for JSON.
#[derive(Debug, Serialize)]
struct Report {
    setup: Setup,
    fps: f64,
    action_names: Vec<String>,
    open_loop: OpenLoop,
    episodes: Vec<EpisodeErrors>,
    doctor: Summary,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let rename = Rename { state: args.state.clone(), action: args.action.clone() };
    let dataset = Dataset::open(&args.dataset, &rename)?;
    let checkpoint = args.weights.open(&args.model, args.policy.config.as_deref())?;
    let policy = args.policy.load(&checkpoint.directory, &checkpoint.config)?;
    // Before anything is read: a policy that can only refuse is of no use.
    policy.ready()?;
    let summary = policy.summary();
    let cameras = match_cameras(&dataset.cameras(), &policy, &args.cameras)?;
    let every = args.every.unwrap_or(summary.actions_per_chunk);
    if every == 0 {
        bail!("--every 0: at least one frame lies between two chunks");
    }
    let ffmpeg = Ffmpeg::find(args.ffmpeg.as_deref());
    if ffmpeg.is_none() && cameras.iter().any(|(camera, _)| camera.is_video) {
        match &args.ffmpeg {
            Some(program) => bail!("--ffmpeg {0}: it does not run (`{0} -version` fails)", program.display()),
            None => bail!("{}", Ffmpeg::MISSING),
        }
    }
    let most = args.episodes.unwrap_or(usize::MAX);
    let episodes: Vec<&EpisodeMeta> = dataset.episodes().iter().take(most).collect();
    if episodes.is_empty() {
        bail!("{}: no episodes to evaluate", args.dataset.display());
    }
    let setup = Setup {
        model: args.model.clone(),
        dataset: args.dataset.clone(),
        device: args.device.device.name().to_owned(),
        every,
        seed: args.seed,
        steps: args.steps,
        prompt: args.prompt.clone(),
        cameras: cameras.iter().map(|(camera, name)| (camera.key.clone(), name.clone())).collect(),
    };
    let mut log = Log::open(args.resume.as_deref(), &setup)?;
    let limits = args.thresholds.read()?;
    let mut examiner = Examiner::new(policy, &checkpoint.config, limits);
    // What is finished needs no network.
    let unfinished = episodes.iter().any(|meta| log.find(meta.index).is_none());
    let loaded = if unfinished { Some(device::load(&args.device, checkpoint)?) } else { None };

    let chunks = |meta: &EpisodeMeta| meta.length.div_ceil(every) as u64;
    let bar = output::counter("chunks", episodes.iter().map(|meta| chunks(meta)).sum());
    let mut done = Vec::new();
    let mut seed = args.seed;
    for meta in episodes {
        let finished = match (log.find(meta.index), &loaded) {
            (Some(finished), _) => finished,
            (None, Some(loaded)) => {
                let run =
                    Run { args, dataset: &dataset, cameras: &cameras, ffmpeg: ffmpeg.as_ref(), every, seed };
                let finished = run.episode(&*loaded.model, &mut examiner, meta)?;
                log.add(&finished)?;
                finished
            }
            (None, None) => bail!("no network for episode {}", meta.index),
        };
        // Every chunk has the noise that it would have without an interruption.
        seed = seed.wrapping_add(chunks(meta));
        bar.inc(chunks(meta));
        done.push(finished);
    }
    bar.finish_and_clear();

    let mut findings = Summary::default();
    done.iter().for_each(|done| findings.merge(&done.doctor));
    let episodes: Vec<EpisodeErrors> = done.into_iter().map(|done| done.errors).collect();
    let names = dataset.action_names();
    let names = (0..summary.action_width)
        .map(|d| names.get(d).cloned().unwrap_or_else(|| examiner.profile().actions[d].name.clone()));
    let report = Report {
        setup,
        fps: dataset.fps(),
        action_names: names.collect(),
        open_loop: OpenLoop::of(&episodes),
        episodes,
        doctor: findings,
    };
    if let Some(path) = &args.html {
        std::fs::write(path, page(&report)).with_context(|| format!("cannot write {}", path.display()))?;
    }
    if let Some(path) = &args.json {
        output::write_json(path, &report)?;
    }
    if args.json.as_deref() != Some(Path::new("-")) {
        output::print(&text(&report))?;
    }
    Ok(())
}

/// Each camera of the dataset that the policy looks through, with the policy's name of it.
fn match_cameras(cameras: &[Camera], policy: &Policy, given: &[String]) -> Result<Vec<(Camera, String)>> {
    let accepted: Vec<String> =
        policy.summary().cameras.into_iter().flat_map(|camera| camera.accepts).collect();
    let keys = || cameras.iter().map(|camera| camera.key.as_str()).collect::<Vec<_>>().join(", ");
    let mut explicit = Vec::new();
    for text in given {
        let Some((key, name)) = text.split_once('=') else {
            bail!("--camera {text}: wanted DATASET=POLICY, such as observation.images.top=base_0_rgb");
        };
        if !cameras.iter().any(|camera| camera.key == key) {
            bail!("--camera {text}: the dataset has no camera {key}; it has {}", keys());
        }
        if !accepted.iter().any(|known| known == name) {
            bail!("--camera {text}: the policy has no camera {name}; it has {}", accepted.join(", "));
        }
        explicit.push((key, name));
    }
    let found: Vec<(Camera, String)> = cameras
        .iter()
        .filter_map(|camera| {
            let key = camera.key.as_str();
            if let Some((_, name)) = explicit.iter().find(|(wanted, _)| *wanted == key) {
                return Some((camera.clone(), (*name).to_owned()));
            }
            let short = key.strip_prefix("observation.images.").or_else(|| key.strip_prefix("observation."));
            let names = [Some(key), short, key.rsplit('.').next()];
            let name = names.into_iter().flatten().find(|name| accepted.iter().any(|known| known == name))?;
            Some((camera.clone(), name.to_owned()))
        })
        .collect();
    match found.is_empty() {
        false => Ok(found),
        true => Err(anyhow!(
            "none of the dataset's cameras ({}) has the name of one of the policy's ({}): say which is which with \
             --camera DATASET=POLICY",
            keys(),
            accepted.join(", ")
        )),
    }
}

/// One episode's evaluation.
struct Run<'a> {
    args: &'a Args,
    dataset: &'a Dataset,
    cameras: &'a [(Camera, String)],
    ffmpeg: Option<&'a Ffmpeg>,
    every: usize,
    /// Of the episode's first chunk.
    seed: u64,
}

impl Run<'_> {
    fn episode(&self, model: &dyn ActionModel, examiner: &mut Examiner, meta: &EpisodeMeta) -> Result<Done> {
        let episode = self.dataset.episode(meta)?;
        let starts: Vec<usize> = (0..meta.length).step_by(self.every).collect();
        let mut pictures: Vec<(&str, std::vec::IntoIter<Frame>)> = Vec::new();
        for (camera, name) in self.cameras {
            let frames = self.dataset.pictures(meta, &episode, camera, &starts, self.ffmpeg)?;
            pictures.push((name, frames.into_iter()));
        }
        let mut errors = EpisodeErrors::new(meta.index, &episode.actions);
        let mut summary = Summary::default();
        for (at, batch) in starts.chunks(usize::from(self.args.batch)).enumerate() {
            let mut waiting = Vec::new();
            for &frame in batch {
                let task = episode.tasks[frame].as_deref().map(str::to_owned);
                let image = |(name, frames): &mut (&str, std::vec::IntoIter<Frame>)| {
                    let frame = frames.next()?;
                    Some(((*name).to_owned(), Image::rgb8(frame.rgb, frame.height, frame.width)))
                };
                let observation = Observation {
                    images: pictures.iter_mut().filter_map(image).collect(),
                    state: episode.states[frame].clone(),
                    prompt: self.args.prompt.clone().or(task),
                };
                let prepared = examiner.policy().preprocess(&observation);
                let prepared = prepared.with_context(|| format!("episode {}, frame {frame}", meta.index))?;
                waiting.push((frame, observation, prepared));
            }
            let inputs: Vec<_> = waiting.iter().map(|(_, _, prepared)| prepared.inputs.clone()).collect();
            let first = at as u64 * u64::from(self.args.batch);
            let options = SampleOptions { steps: self.args.steps, seed: self.seed.wrapping_add(first) };
            let chunks = model.sample_actions(&inputs, &options)?;
            for (chunk, (frame, observation, prepared)) in chunks.iter().zip(waiting) {
                let actions = examiner.policy().postprocess(&chunk.data, &prepared)?;
                let width = episode.actions[frame].len();
                if actions.cols != width {
                    bail!("the policy's actions have {} values, the dataset's {width}", actions.cols);
                }
                errors.add(actions.iter(), &episode.actions[frame..]);
                // Episodes lie far apart in time, so that the doctor takes none for the continuation of another.
                let time = 1e6 * meta.index as f64 + frame as f64 / self.dataset.fps();
                let examined = examiner.observation(&observation, &prepared, &chunk.data, 0.0, time)?;
                summary.add(&format!("episode {} frame {frame}", meta.index), &examined.findings);
            }
        }
        Ok(Done { errors, doctor: summary })
    }
}

/// Finished episodes on disk, one a line behind the setup.
struct Log {
    file: Option<std::fs::File>,
    done: Vec<Done>,
}

impl Log {
    fn open(path: Option<&Path>, setup: &Setup) -> Result<Self> {
        let Some(path) = path else { return Ok(Self { file: None, done: Vec::new() }) };
        let in_file = || format!("--resume {}", path.display());
        let text = match std::fs::read_to_string(path) {
            Ok(text) => text,
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => String::new(),
            Err(e) => return Err(e).with_context(in_file),
        };
        let mut lines = text.lines();
        let mut done = Vec::new();
        if let Some(first) = lines.next() {
            let then: Setup = serde_json::from_str(first).with_context(in_file)?;
            if then != *setup {
                bail!("{}: that was another evaluation: {then:?}; now it is {setup:?}", path.display());
            }
            // The last line may be cut, where the program was: that episode is evaluated again.
            done.extend(lines.map_while(|line| serde_json::from_str::<Done>(line).ok()));
        }
        let mut file = std::fs::File::create(path).with_context(in_file)?;
        writeln!(file, "{}", serde_json::to_string(setup)?).with_context(in_file)?;
        for done in &done {
            writeln!(file, "{}", serde_json::to_string(done)?).with_context(in_file)?;
        }
        Ok(Self { file: Some(file), done })
    }

    fn find(&self, episode: usize) -> Option<Done> {
        self.done.iter().find(|done| done.errors.episode == episode).cloned()
    }

    fn add(&mut self, done: &Done) -> Result<()> {
        if let Some(file) = &mut self.file {
            writeln!(file, "{}", serde_json::to_string(done)?).context("--resume: cannot write")?;
        }
        Ok(())
    }
}

const COLUMNS: [&str; 5] =
    ["mean error", "root mean square", "largest", "spread of the data", "error / spread"];

/// A line of numbers about a dimension; `deviation` is that of the recorded actions.
fn cells(sums: &Sums, deviation: f64) -> [String; 5] {
    let relative = sums.root_mean_square() / deviation;
    let relative = if relative.is_finite() { format!("{relative:.3}") } else { "–".into() };
    let [mean, square, largest] =
        [sums.mean(), sums.root_mean_square(), sums.largest].map(|x| format!("{x:.5}"));
    [mean, square, largest, format!("{deviation:.5}"), relative]
}

fn text(report: &Report) -> String {
    let all = &report.open_loop;
    let header: Vec<String> = ["dimension"].iter().chain(&COLUMNS).map(|s| (*s).to_owned()).collect();
    let rows = report.action_names.iter().zip(all.dimensions.iter().zip(&all.deviations));
    let rows = rows
        .map(|(name, (sums, deviation))| [name.clone()].into_iter().chain(cells(sums, *deviation)).collect());
    let mut out = output::table(&header, rows);
    let step = |at: usize| all.steps.get(at).map_or(0.0, Sums::mean);
    out += &format!(
        "\n{} chunks of {} episodes; mean error {:.5}; at the first step {:.5}, at the last {:.5}\n",
        all.chunks,
        report.episodes.len(),
        all.total.mean(),
        step(0),
        step(all.steps.len().saturating_sub(1))
    );
    let mut worst: Vec<&EpisodeErrors> = report.episodes.iter().collect();
    worst.sort_by(|a, b| b.total().mean().total_cmp(&a.total().mean()));
    let worst: Vec<String> =
        worst.iter().take(5).map(|e| format!("{} ({:.5})", e.episode, e.total().mean())).collect();
    out += &format!("worst episodes: {}\n\n", worst.join(", "));
    out + &doctor::table(&report.doctor, 1)
}

fn page(report: &Report) -> String {
    let all = &report.open_loop;
    let setup = &report.setup;
    let mut out = format!("<header><h1>Open loop: {}</h1>", escape(&setup.model.display().to_string()));
    let cameras: Vec<String> = setup.cameras.iter().map(|(key, name)| format!("{key} as {name}")).collect();
    out += &facts(&[
        ("dataset", format!("{}, {} frames a second", setup.dataset.display(), report.fps)),
        (
            "evaluated",
            format!(
                "{} chunks of {} episodes, one every {} frames",
                all.chunks,
                report.episodes.len(),
                setup.every
            ),
        ),
        ("cameras", cameras.join(", ")),
        ("device", format!("{}, seed {}", setup.device, setup.seed)),
        ("mean error", format!("{:.5} in the robot's units, all dimensions together", all.total.mean())),
    ]);
    out += "</header><section><h2>By dimension</h2>";
    let header: Vec<&str> = ["dimension"].into_iter().chain(COLUMNS).collect();
    let rows: Vec<Vec<Cell>> = report
        .action_names
        .iter()
        .zip(all.dimensions.iter().zip(&all.deviations))
        .map(|(name, (sums, deviation))| {
            [Cell::text(name)].into_iter().chain(cells(sums, *deviation).map(Cell::number)).collect()
        })
        .collect();
    out += &table(&header, &rows);
    let relative = |(sums, deviation): (&Sums, &f64)| {
        let relative = sums.root_mean_square() / deviation;
        if relative.is_finite() { relative } else { 0.0 }
    };
    let bar =
        |name: String, value: f64, label: String| Bar { name, start: 0.0, pieces: vec![(0, value)], label };
    let dimensions: Vec<Bar> = report
        .action_names
        .iter()
        .zip(all.dimensions.iter().zip(&all.deviations).map(relative))
        .map(|(name, value)| bar(name.clone(), value, format!("{value:.3}")))
        .collect();
    out +=
        &figure("Root mean square error as a share of the data's spread", &bars("", &["error"], &dimensions));
    out += "</section><section><h2>By step of the chunk</h2>";
    let points = |f: fn(&Sums) -> f64| all.steps.iter().enumerate().map(|(t, s)| (t as f64, f(s))).collect();
    let series = [
        Series { name: "mean error".into(), points: points(Sums::mean) },
        Series { name: "root mean square".into(), points: points(Sums::root_mean_square) },
    ];
    out += &figure("How the error grows along a chunk", &lines("step", "error", &series, None));
    out += "</section><section><h2>By episode</h2>";
    let mut episodes: Vec<&EpisodeErrors> = report.episodes.iter().collect();
    episodes.sort_by(|a, b| b.total().mean().total_cmp(&a.total().mean()));
    let worst: Vec<Bar> = episodes
        .iter()
        .take(30)
        .map(|e| bar(format!("episode {}", e.episode), e.total().mean(), format!("{:.5}", e.total().mean())))
        .collect();
    out += &figure("Mean error of the worst episodes, at most 30", &bars("", &["mean error"], &worst));
    out += "</section><section><h2>Doctor</h2>";
    let summary = &report.doctor;
    out += &format!("<p>{} observations, {} with findings.</p>", summary.requests, summary.with_findings);
    if !summary.lines.is_empty() {
        let rows: Vec<Vec<Cell>> = summary
            .lines
            .iter()
            .map(|line| {
                let remedy = Kind::remedy(line.kind);
                let kind = Cell::Mark(false, line.kind.name().into());
                let text = format!("{}; to do: {remedy}", line.text);
                vec![
                    kind,
                    Cell::text(text),
                    Cell::number(line.count.to_string()),
                    Cell::text(&line.first),
                    Cell::text(&line.last),
                ]
            })
            .collect();
        out += &table(&["finding", "what", "times", "first", "last"], &rows);
    }
    frame("π0 open loop", &(out + "</section>"))
}
