//! Robots that do everything right, until a test says otherwise.
#![allow(dead_code)] // each test file uses its share

use std::collections::BTreeMap;
use std::f64::consts::TAU;
use std::path::Path;
use std::sync::{Mutex, PoisonError};

use pi0_demo::episode::{Episode, Eye, Settings};
use pi0_demo::{Outcome, Rng, Scene, Split, expert};
use pi0_doctor::{Chunk, Doctor, Finding, History, Kind, Profile, Seen, Thresholds};
use pi0_policy::{
    Image, ModelFacts, Observation, Pixels, Policy, PolicyOptions, Robot, RobotChoice, TINY_TOKENIZER,
};
use serde_json::json;
use tempfile::TempDir;

pub const HORIZON: usize = 16;
/// Steps that are executed before the next observation.
pub const EXECUTED: usize = 8;

/// An observation with the chunk that answers it, in the robot's units.
pub struct Sample {
    pub observation: Observation,
    pub actions: Vec<f64>,
    pub latency: f64,
    /// Seconds since the last one.
    pub pause: f64,
    /// Where the robot is, whatever it says: what relative actions refer to.
    pub truth: Vec<f64>,
    /// What is wrong with the answer that the actions were read from.
    pub malformed: String,
}

/// A robot with its policy and doctor.
pub struct Rig {
    pub name: &'static str,
    pub policy: Policy,
    pub doctor: Doctor,
    pub history: History,
    source: Source,
    horizon: usize,
    time: f64,
    _dir: Option<TempDir>,
}

enum Source {
    Smooth { robot: Robot, step: usize },
    Demo { rng: Box<Rng>, episode: Box<Episode> },
}

impl Rig {
    /// All shapes of observations.
    pub fn all() -> Vec<Self> {
        vec![
            Self::demo(1),
            Self::smooth(Robot::Aloha),
            Self::smooth(Robot::Droid),
            Self::smooth(Robot::Libero),
        ]
    }

    /// The demo world, the statistics of its shipped π0, and its expert.
    pub fn demo(seed: u64) -> Self {
        Self::shipped("demo", seed)
    }

    /// The same with another shipped policy for that world.
    pub fn shipped(model: &str, seed: u64) -> Self {
        let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models").join(model);
        let checkpoint = pi0_model::Checkpoint::open(&dir).unwrap();
        let policy = Policy::load(&dir, (&checkpoint.config).into(), &PolicyOptions::default()).unwrap();
        let mut rng = Rng::new(seed);
        let episode = Box::new(Episode::new(Scene::random(&mut rng, Split::Train)));
        Self::new("demo", policy, Source::Demo { rng: Box::new(rng), episode }, None)
    }

    /// A robot of openpi's on smooth paths, with the statistics of those.
    pub fn smooth(robot: Robot) -> Self {
        let dir = tempfile::tempdir().unwrap();
        let policy = load(dir.path(), robot, statistics(robot));
        Self::new(robot.name(), policy, Source::Smooth { robot, step: 0 }, Some(dir))
    }

    fn new(name: &'static str, policy: Policy, source: Source, dir: Option<TempDir>) -> Self {
        let profile = Profile::of(&policy);
        let doctor = Doctor::new(profile, Thresholds::default());
        let horizon = if name == "demo" { 8 } else { HORIZON };
        Self { name, policy, doctor, history: History::default(), source, horizon, time: 100.0, _dir: dir }
    }

    /// Judges by another profile.
    pub fn with_profile(mut self, change: impl FnOnce(&mut Profile)) -> Self {
        let mut profile = self.doctor.profile().clone();
        change(&mut profile);
        self.doctor = Doctor::new(profile, *self.doctor.thresholds());
        self
    }

    /// The next good sample.
    pub fn sample(&mut self) -> Sample {
        match &mut self.source {
            Source::Smooth { robot, step } => {
                let sample = smooth(*robot, *step);
                *step += EXECUTED;
                sample
            }
            Source::Demo { rng, episode } => demo(rng, episode),
        }
    }

    /// Has the doctor look at a sample.
    pub fn look(&mut self, sample: &Sample) -> Vec<Finding> {
        self.time += sample.pause;
        let prepared = match self.policy.preprocess(&sample.observation) {
            Ok(prepared) => prepared,
            Err(why) => return vec![self.doctor.refuse(&mut self.history, &why.to_string(), self.time)],
        };
        let seen = Seen::of(&self.policy, &sample.observation, &prepared, self.time);
        let mut findings = self.doctor.observe(&mut self.history, &seen);
        let cols = self.policy.summary().action_width;
        // The network says the same of relative actions, whatever the robot believes to be.
        let truth = Observation { state: sample.truth.clone(), ..sample.observation.clone() };
        let truth = self.policy.preprocess(&truth).unwrap();
        let mut network = self.policy.normalize_actions(&sample.actions, cols, &truth).unwrap();
        let trained = self.policy.actions_as_trained(&network);
        let rows = sample.actions.len() / cols;
        network.resize(self.horizon * network.len() / rows, 0.0);
        let mut actions = self.policy.postprocess(&network, &prepared).unwrap().data;
        actions.truncate(rows * cols);
        findings.extend(self.doctor.answer(
            &mut self.history,
            &Chunk {
                time: self.time + sample.latency,
                rows,
                cols,
                actions: &actions,
                trained: &trained,
                latency: sample.latency,
                malformed: &sample.malformed,
            },
        ));
        findings
    }

    /// Looks at good samples, each changed; returns all findings.
    pub fn run(&mut self, count: usize, mut change: impl FnMut(usize, &mut Sample)) -> Vec<Finding> {
        let mut all = Vec::new();
        for i in 0..count {
            let mut sample = self.sample();
            change(i, &mut sample);
            all.extend(self.look(&sample));
        }
        all
    }
}

/// `norm_stats.json` of a robot on smooth paths; worked out once for all tests of a process.
fn statistics(robot: Robot) -> serde_json::Value {
    static KNOWN: Mutex<BTreeMap<&str, serde_json::Value>> = Mutex::new(BTreeMap::new());
    let mut known = KNOWN.lock().unwrap_or_else(PoisonError::into_inner);
    known.entry(robot.name()).or_insert_with(|| measure(robot)).clone()
}

fn measure(robot: Robot) -> serde_json::Value {
    let dir = tempfile::tempdir().unwrap();
    let identity = |width: usize| json!({"mean": vec![0.0; width], "std": vec![1.0; width]});
    let both = json!({"state": identity(robot.state_width()), "actions": identity(robot.action_width())});
    // With an identity for statistics, a policy tells what the data are in the units of statistics.
    let first = load(dir.path(), robot, both);
    let (mut states, mut actions) = (Vec::new(), Vec::new());
    let mut observation = smooth(robot, 0).observation;
    for step in (0..4000).step_by(3) {
        let sample = steps(robot, step);
        observation.state.clone_from(&sample.0);
        let prepared = first.preprocess(&observation).unwrap();
        states.push(first.state_as_trained(&sample.0));
        let network = first.normalize_actions(&sample.1, robot.action_width(), &prepared).unwrap();
        let trained = first.actions_as_trained(&network);
        actions.extend(trained.chunks_exact(robot.action_width()).map(<[f64]>::to_vec));
    }
    json!({"state": moments(&states), "actions": moments(&actions)})
}

/// The kinds that were found, each once.
pub fn kinds(findings: &[Finding]) -> Vec<Kind> {
    let mut kinds: Vec<Kind> = findings.iter().map(|finding| finding.kind).collect();
    kinds.sort();
    kinds.dedup();
    kinds
}

fn load(dir: &Path, robot: Robot, norm_stats: serde_json::Value) -> Policy {
    let asset = match robot {
        Robot::Aloha => "trossen",
        Robot::Droid => "droid",
        Robot::Libero => "physical-intelligence/libero",
        Robot::Ur5 => "ur5e",
    };
    let assets = dir.join("assets").join(asset);
    std::fs::create_dir_all(&assets).unwrap();
    std::fs::write(assets.join("norm_stats.json"), json!({ "norm_stats": norm_stats }).to_string()).unwrap();
    std::fs::write(dir.join("tokenizer.json"), TINY_TOKENIZER).unwrap();
    let facts = ModelFacts {
        horizon: HORIZON,
        action_dim: 32,
        state_dim: 32,
        max_tokens: 48,
        image_size: 32,
        vocab_size: 257_152,
        kind: pi0_model::Kind::Pi0,
        chunk_known: true,
    };
    let options = PolicyOptions {
        robot: RobotChoice::Preset(robot),
        // LIBERO's actions are differences already, DROID's velocities.
        delta_actions: Some(robot == Robot::Aloha),
        adapt_to_pi: (robot == Robot::Aloha).then_some(true),
        ..PolicyOptions::default()
    };
    Policy::load(dir, facts, &options).unwrap()
}

fn moments(rows: &[Vec<f64>]) -> serde_json::Value {
    let n = rows.len() as f64;
    let column = |f: &dyn Fn(usize) -> f64| (0..rows[0].len()).map(f).collect::<Vec<f64>>();
    let mean = column(&|i| rows.iter().map(|row| row[i]).sum::<f64>() / n);
    let std = column(&|i| (rows.iter().map(|row| (row[i] - mean[i]).powi(2)).sum::<f64>() / n).sqrt());
    let quantile = |i: usize, q: f64| {
        let mut values: Vec<f64> = rows.iter().map(|row| row[i]).collect();
        values.sort_by(f64::total_cmp);
        values[(q * (n - 1.0)) as usize]
    };
    let (q01, q99) = (column(&|i| quantile(i, 0.01)), column(&|i| quantile(i, 0.99)));
    json!({"mean": mean, "std": std, "q01": q01, "q99": q99})
}

/// The robot's state at a step, of 50 a second.
fn path(robot: Robot, step: usize) -> Vec<f64> {
    let t = step as f64 / 50.0;
    let wave = |i: usize| (TAU * (0.05 + 0.013 * i as f64) * t + i as f64).sin();
    (0..robot.state_width())
        .map(|i| match (robot, i) {
            (Robot::Aloha, 6 | 13) | (Robot::Droid, 7) => 0.5 + 0.45 * wave(i),
            (Robot::Libero, 0..3) => 0.2 * wave(i),
            (Robot::Libero, 6) => 0.02 + 0.02 * wave(6),
            (Robot::Libero, 7) => -0.02 - 0.02 * wave(6),
            _ => 0.4 * (i as f64).sin() + 0.5 * wave(i),
        })
        .collect()
}

/// The state at a step, and the actions from there on.
fn steps(robot: Robot, step: usize) -> (Vec<f64>, Vec<f64>) {
    let state = path(robot, step);
    let mut actions = Vec::new();
    for k in 1..=HORIZON {
        let (now, next) = (path(robot, step + k - 1), path(robot, step + k));
        let velocity = |i: usize| 50.0 * (next[i] - now[i]);
        actions.extend((0..robot.action_width()).map(|i| match (robot, i) {
            (Robot::Droid, 0..7) => velocity(i),
            (Robot::Libero, 0..6) => velocity(i),
            (Robot::Libero, _) => {
                if velocity(6) > 0.0 {
                    -1.0
                } else {
                    1.0
                }
            }
            _ => next[i],
        }));
    }
    (state, actions)
}

fn smooth(robot: Robot, step: usize) -> Sample {
    let (state, actions) = steps(robot, step);
    let shape = match robot {
        Robot::Aloha => [3, 48, 64],
        Robot::Droid => [45, 80, 3],
        _ => [64, 64, 3],
    };
    let cameras = robot.cameras().iter().filter(|camera| camera.slot.is_some());
    let images = cameras.enumerate().map(|(i, camera)| (camera.key.to_owned(), photo(shape, i, step)));
    let observation =
        Observation { images: images.collect(), state, prompt: Some("pick up the red block".into()) };
    let truth = observation.state.clone();
    let malformed = String::new();
    Sample { observation, actions, latency: 0.05, pause: EXECUTED as f64 / 50.0, truth, malformed }
}

/// Mean colours of the cameras.
pub const COLOURS: [[f64; 3]; 3] = [[0.55, 0.45, 0.35], [0.25, 0.30, 0.40], [0.35, 0.30, 0.20]];

/// A picture with structure that moves, and noise.
pub fn photo(shape: [usize; 3], camera: usize, step: usize) -> Image {
    let planar = shape[0] == 3;
    let (height, width) = if planar { (shape[1], shape[2]) } else { (shape[0], shape[1]) };
    let mut data = vec![0; 3 * height * width];
    for (y, x, c) in (0..height).flat_map(|y| (0..width).flat_map(move |x| (0..3).map(move |c| (y, x, c)))) {
        let structure = ((x as f64 / 7.0 + step as f64 / 9.0).sin() + (y as f64 / 5.0).cos()) * 0.1;
        let hash =
            (x + 131 * y + 17389 * c + 7919 * step + 31 * camera).wrapping_mul(2_654_435_761) >> 7 & 15;
        let value = COLOURS[camera][c] + structure + hash as f64 / 255.0 - 7.5 / 255.0;
        let at = if planar { (c * height + y) * width + x } else { (y * width + x) * 3 + c };
        data[at] = (255.0 * value).clamp(0.0, 255.0) as u8;
    }
    Image::array(Pixels::U8(data.into()), shape)
}

fn demo(rng: &mut Rng, episode: &mut Episode) -> Sample {
    if episode.world.outcome().is_some_and(|outcome| outcome != Outcome::Timeout) || episode.world.steps > 60
    {
        *episode = Episode::new(Scene::random(rng, Split::Train));
    }
    let view = episode.view(&Settings::DEFAULT);
    let chunk = expert::chunk(&episode.world, 8);
    for action in &chunk[..4] {
        if episode.world.outcome().is_none() {
            episode.world.step(action);
        }
    }
    let image = |(eye, frame): &(Eye, pi0_demo::render::Frame)| {
        (eye.key().to_owned(), Image::rgb8(frame.rgb.clone(), frame.height, frame.width))
    };
    let state = view.state.map(f64::from).to_vec();
    Sample {
        truth: state.clone(),
        observation: Observation {
            images: view.images.iter().map(image).collect(),
            state,
            prompt: Some(view.prompt),
        },
        // A policy returns four of its eight actions; the doctor sees what is returned.
        actions: chunk.iter().take(4).flatten().map(|x| f64::from(*x)).collect(),
        latency: 0.05,
        pause: 0.4,
        malformed: String::new(),
    }
}
