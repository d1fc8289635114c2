//! The closed loop: look, ask for a chunk, carry out its first part, look again.

use std::time::{Duration, Instant};

use crate::actor::Actor;
use crate::render::{self, Frame};
use crate::{Action, Error, Outcome, Result, Scene, Task, World};

/// A camera of this world, by the network's name for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Eye {
    /// `base_0_rgb`, above the table.
    Top,
    /// `left_wrist_0_rgb`, at the gripper.
    Wrist,
}

impl Eye {
    /// Both.
    pub const ALL: [Eye; 2] = [Eye::Top, Eye::Wrist];

    /// The network's name.
    pub fn key(self) -> &'static str {
        match self {
            Eye::Top => "base_0_rgb",
            Eye::Wrist => "left_wrist_0_rgb",
        }
    }
}

/// All that a policy gets: what the robot sees and feels, and what it was told.
#[derive(Debug, Clone, PartialEq)]
pub struct View {
    /// Pictures of the cameras that are on.
    pub images: Vec<(Eye, Frame)>,
    /// The gripper's joints: x, y, z, opening in metres.
    pub state: [f32; 4],
    /// The instruction.
    pub prompt: String,
}

/// How episodes are run.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Pixels along a side of the images that the policy gets.
    pub image_size: usize,
    /// Actions of a chunk that are carried out before the next look.
    pub execute: usize,
    /// A camera that is switched off.
    pub without: Option<Eye>,
    /// Seed of the sampling noise.
    pub seed: u64,
}

impl Settings {
    /// As the policy was trained: 56 pixels, half a chunk.
    pub const DEFAULT: Settings = Settings { image_size: 56, execute: 4, without: None, seed: 0 };
}

/// An episode under way.
#[derive(Debug, Clone)]
pub struct Episode {
    /// The world now.
    pub world: World,
    /// What the policy is told, which is the scene's task unless somebody wants to know whether it listens.
    pub instruction: String,
    /// The joints that the policy is told of at each step, the last one from then on; those of the world when none.
    pub felt: Vec<[f32; 4]>,
    /// The chunk that is being carried out, and how far.
    pub plan: Vec<Action>,
    /// Actions of the plan that were carried out.
    pub done: usize,
}

impl Episode {
    /// The beginning.
    pub fn new(scene: Scene) -> Self {
        let instruction = scene.task.to_string();
        Self { instruction, world: World::new(scene), felt: Vec::new(), plan: Vec::new(), done: 0 }
    }

    /// With another instruction than the one that success is judged by.
    pub fn told(self, task: &Task) -> Self {
        Self { instruction: task.to_string(), ..self }
    }

    /// With other joints than the world's, one row for each step: to find out whether the policy reads them.
    pub fn feeling(self, states: Vec<[f32; 4]>) -> Self {
        Self { felt: states, ..self }
    }

    /// What the policy gets now.
    pub fn view(&self, settings: &Settings) -> View {
        let size = settings.image_size;
        let picture = |eye: Eye| match eye {
            Eye::Top => render::top(&self.world, size),
            Eye::Wrist => render::wrist(&self.world, size),
        };
        let eyes = Eye::ALL.into_iter().filter(|eye| Some(*eye) != settings.without);
        View {
            images: eyes.map(|eye| (eye, picture(eye))).collect(),
            state: self.felt_now(),
            prompt: self.instruction.clone(),
        }
    }

    fn felt_now(&self) -> [f32; 4] {
        let told = self.felt.get(self.world.steps).or(self.felt.last());
        told.copied().unwrap_or_else(|| self.world.gripper.state())
    }

    fn needs_plan(&self, settings: &Settings) -> bool {
        self.done >= settings.execute.min(self.plan.len())
    }
}

/// Runs episodes side by side to their end. `watch` sees each episode (by its position) before every action and after
/// the last one. Returns the outcomes and the time that each round of inference took, for all unfinished episodes
/// together.
pub fn run(
    actor: &mut dyn Actor,
    episodes: &mut [Episode],
    settings: &Settings,
    watch: &mut dyn FnMut(usize, &Episode),
) -> Result<(Vec<Outcome>, Vec<Duration>)> {
    let mut times = Vec::new();
    loop {
        let open: Vec<usize> =
            (0..episodes.len()).filter(|&i| episodes[i].world.outcome().is_none()).collect();
        if open.is_empty() {
            break;
        }
        let waiting: Vec<usize> =
            open.iter().copied().filter(|&i| episodes[i].needs_plan(settings)).collect();
        if !waiting.is_empty() {
            let views: Vec<_> = waiting.iter().map(|&i| episodes[i].view(settings)).collect();
            let start = Instant::now();
            let chunks = actor.act(&views, settings.seed.wrapping_add((times.len() as u64) << 20))?;
            times.push(start.elapsed());
            if chunks.len() != waiting.len() || chunks.iter().any(Vec::is_empty) {
                return Err(Error::Answers { got: chunks.len(), wanted: waiting.len() });
            }
            for (&i, chunk) in waiting.iter().zip(chunks) {
                (episodes[i].plan, episodes[i].done) = (chunk, 0);
            }
        }
        for i in open {
            watch(i, &episodes[i]);
            let episode = &mut episodes[i];
            episode.world.step(&episode.plan[episode.done]);
            episode.done += 1;
            if episode.world.outcome().is_some() {
                watch(i, episode);
            }
        }
    }
    Ok((episodes.iter().map(|e| e.world.outcome().unwrap_or(Outcome::Timeout)).collect(), times))
}
