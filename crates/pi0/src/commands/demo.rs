//! `pi0 demo`: the trained tiny π0 or π0.5 in its tabletop world.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, anyhow};
use clap::ValueEnum;
use indicatif::ProgressBar;
use pi0_demo::actor::{Actor, Local};
use pi0_demo::episode::{self, Episode, Settings};
use pi0_demo::evaluate::{Condition, Score, evaluate, scene};
use pi0_demo::render::Frame;
use pi0_demo::{Outcome, Rng, Scene, Task, animation, film};
use pi0_policy::{Policy, PolicyOptions};
use serde::Serialize;

use crate::device::{self, DeviceArgs};
use crate::output;
use crate::remote::Remote;
use crate::weights::WeightsArgs;

/// Watch a tiny trained policy act on a simulated table: it sees two cameras, reads the instruction, moves a gripper
#[derive(clap::Args)]
#[command(after_help = "Examples:
  pi0 demo
  pi0 demo --instruction 'put the red block in the bowl' --render terminal
  pi0 demo --episodes 200 --render none --dtype int8
  pi0 demo --report report.json
  pi0 demo models/demo-pi05   a π0.5, which reads its joints in the prompt
  pi0 serve models/demo   and, elsewhere,   pi0 demo --server ws://robot-server:8000")]
pub struct Args {
    /// Checkpoint directory [default: models/demo, here or where this program was built]
    model: Option<PathBuf>,
    /// What to do, such as \"put the red block in the bowl\" or \"touch the green disc\" [default: another each time]
    #[arg(long, value_name = "TEXT")]
    instruction: Option<String>,
    /// Episodes to run
    #[arg(long, value_name = "N", default_value_t = 20, value_parser = clap::value_parser!(u32).range(1..=100_000))]
    episodes: u32,
    /// Seed of the first scene; the others follow
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// How to show the episodes; gif and png show the first six
    #[arg(long, value_enum, default_value_t)]
    render: Render,
    /// Folder for pictures
    #[arg(long, value_name = "DIR", default_value = "demo")]
    out: PathBuf,
    /// Instead of showing episodes, measure success on unseen scenes, held-out targets, with a wrong instruction, with
    /// the joints of another scene and without each camera, --episodes of each; - is standard output
    #[arg(long, value_name = "FILE.json", conflicts_with_all = ["instruction", "render", "out"])]
    report: Option<PathBuf>,
    /// Denoising steps [default: the checkpoint's]
    #[arg(long, value_name = "N", conflicts_with = "server")]
    steps: Option<usize>,
    /// Ask the policy behind this server instead of running it here: openpi's protocol, as `pi0 serve` speaks it
    #[arg(long, value_name = "ws://HOST:PORT", conflicts_with_all = ["model", "DeviceArgs"])]
    server: Option<String>,
    /// File whose first line is the server's API key
    #[arg(long, value_name = "FILE", requires = "server")]
    api_key_file: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
}

/// How to show episodes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum Render {
    /// An animation, DIR/demo.gif
    #[default]
    Gif,
    /// Every frame, DIR/EPISODE-STEP.png
    Png,
    /// Coloured characters, as it happens
    Terminal,
    /// Not at all
    None,
}

/// Episodes that pictures are made of.
const FILMED: usize = 6;

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let task = args.instruction.as_deref().map(str::parse::<Task>).transpose().map_err(|why| anyhow!(why))?;
    let settings = Settings { seed: args.seed, ..Settings::DEFAULT };
    let (mut actor, settings): (Box<dyn Actor>, _) = match &args.server {
        Some(url) => (Box::new(Remote::connect(url, args.api_key_file.as_deref())?), settings),
        None => {
            let (local, image_size) = load(args)?;
            (Box::new(local), Settings { image_size, ..settings })
        }
    };
    match &args.report {
        Some(file) => report(args, file, actor.as_mut(), &settings),
        None => show(args, task, actor.as_mut(), &settings),
    }
}

/// The network on a device of this machine, and the side of its pictures.
fn load(args: &Args) -> Result<(Local, usize)> {
    let directory = model_directory(args.model.as_deref())?;
    let checkpoint = WeightsArgs::default().open(&directory, None)?;
    let (image_size, parameters) = (checkpoint.config.vision.image_size, checkpoint.parameters());
    let policy = Policy::load(&checkpoint.directory, (&checkpoint.config).into(), &PolicyOptions::default())?;
    let loaded = device::load(&args.device, checkpoint)?;
    eprintln!(
        "{}: {:.2} million parameters, loaded in {:.2} s",
        directory.display(),
        parameters as f64 / 1e6,
        loaded.time.as_secs_f64()
    );
    Ok((Local { policy, model: loaded.model, steps: args.steps }, image_size))
}

/// The checkpoint that came with the program, unless the user names another.
fn model_directory(named: Option<&Path>) -> Result<PathBuf> {
    if let Some(named) = named {
        return Ok(named.to_owned());
    }
    let built = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo");
    let found = [PathBuf::from("models/demo"), built].into_iter().find(|dir| dir.is_dir());
    found.context("no models/demo here; run it in the repository, or name a checkpoint directory")
}

fn show(args: &Args, task: Option<Task>, actor: &mut dyn Actor, settings: &Settings) -> Result<()> {
    if matches!(args.render, Render::Gif | Render::Png) {
        std::fs::create_dir_all(&args.out)
            .with_context(|| format!("cannot create {}", args.out.display()))?;
    }
    let quiet = args.render == Render::Terminal;
    let bar = if quiet { ProgressBar::hidden() } else { ProgressBar::new(args.episodes.into()) };
    let (mut outcomes, mut times, mut film) = (Vec::new(), Vec::new(), Vec::new());
    for index in 0..args.episodes as usize {
        let seed = args.seed.wrapping_add(index as u64);
        let scene = match task {
            Some(task) => Scene::of_task(&mut Rng::new(seed & 0xffff_ffff), task),
            None => scene(seed, Condition::Normal),
        };
        let mut episodes = [Episode::new(scene)];
        let filmed = index < FILMED && matches!(args.render, Render::Gif | Render::Png);
        let mut watch = |_: usize, episode: &Episode| {
            if filmed {
                film.push((index, episode.world.steps, film::draw(episode)));
            }
            if quiet {
                let up = if episode.world.steps > 0 { film::TERMINAL_LINES } else { 0 };
                let rewind = if up > 0 { format!("\x1b[{up}A") } else { String::new() };
                // A terminal that has gone away is found out at the end.
                let _ = output::print(&(rewind + &film::terminal(episode)));
                std::thread::sleep(Duration::from_millis(100));
            }
        };
        let (outcome, mut took) = episode::run(actor, &mut episodes, settings, &mut watch)?;
        outcomes.extend(outcome);
        times.append(&mut took);
        let (told, steps) = (&episodes[0].instruction, episodes[0].world.steps);
        let line = format!("{:3}  {told:38} {} after {steps} steps", index + 1, said(outcomes[index]));
        bar.suspend(|| eprintln!("{line}"));
        bar.inc(1);
    }
    bar.finish_and_clear();
    match args.render {
        Render::Gif => write_gif(&args.out.join("demo.gif"), film)?,
        Render::Png => write_pngs(&args.out, &film)?,
        Render::Terminal | Render::None => {}
    }
    let score = Score::of(&outcomes);
    output::print(&output::facts(&[("success", rate(&score)), ("latency of a chunk", latency(&mut times))]))
}

fn said(outcome: Outcome) -> &'static str {
    match outcome {
        Outcome::Success => "success",
        Outcome::WrongObject => "wrong object",
        Outcome::Timeout => "out of time",
    }
}

/// `19 of 20, 95 % (76 to 99)`.
fn rate(score: &Score) -> String {
    let (low, high) = score.interval();
    format!(
        "{} of {}, {:.1} % (95 % interval {:.1} to {:.1})",
        score.successes,
        score.episodes,
        100.0 * score.rate(),
        100.0 * low,
        100.0 * high
    )
}

fn latency(times: &mut [Duration]) -> String {
    times.sort_unstable();
    let at =
        |share: usize| times.get(times.len() * share / 100).copied().unwrap_or_default().as_secs_f64() * 1e3;
    format!("{:.1} ms median, {:.1} ms in 95 % of {} inferences", at(50), at(95), times.len())
}

fn write_gif(path: &Path, film: Vec<(usize, usize, Frame)>) -> Result<()> {
    let last = |i: usize| film.get(i + 1).is_none_or(|next| next.0 != film[i].0);
    let delays: Vec<u16> = (0..film.len()).map(|i| if last(i) { 120 } else { 10 }).collect();
    let frames: Vec<_> = film.into_iter().zip(delays).map(|((_, _, frame), delay)| (frame, delay)).collect();
    let file = std::fs::File::create(path).with_context(|| format!("cannot write {}", path.display()))?;
    animation::write_gif(std::io::BufWriter::new(file), &frames)?;
    eprintln!("wrote {}", path.display());
    Ok(())
}

fn write_pngs(directory: &Path, film: &[(usize, usize, Frame)]) -> Result<()> {
    for (index, step, frame) in film {
        let path = directory.join(format!("{:02}-{step:03}.png", index + 1));
        let (width, height) = (frame.width as u32, frame.height as u32);
        image::save_buffer(&path, &frame.rgb, width, height, image::ColorType::Rgb8)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    eprintln!("wrote {} pictures to {}", film.len(), directory.display());
    Ok(())
}

/// A line of the report.
#[derive(Serialize)]
struct Line {
    condition: &'static str,
    episodes: usize,
    successes: usize,
    rate: f64,
    low: f64,
    high: f64,
    wrong_object: usize,
    out_of_time: usize,
}

fn report(args: &Args, file: &Path, actor: &mut dyn Actor, settings: &Settings) -> Result<()> {
    let mut lines = Vec::new();
    let bar = ProgressBar::new(Condition::ALL.len() as u64);
    for condition in Condition::ALL {
        let score = evaluate(actor, condition, args.seed, args.episodes as usize, settings)?;
        bar.suspend(|| eprintln!("{:22} {}", condition.name(), rate(&score)));
        bar.inc(1);
        let (low, high) = score.interval();
        lines.push(Line {
            condition: condition.name(),
            episodes: score.episodes,
            successes: score.successes,
            rate: score.rate(),
            low,
            high,
            wrong_object: score.wrong_object,
            out_of_time: score.timeouts,
        });
    }
    bar.finish_and_clear();
    output::write_json(file, &lines)
}
