//! How often it succeeds, and whether it really looks and listens.

use crate::actor::Actor;
use crate::episode::{self, Episode, Eye, Settings};
use crate::scene::{Scene, Split, Task};
use crate::{Outcome, Result, Rng, World, expert};

/// What is different from normal.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Condition {
    /// Nothing: new seeds, targets as in training.
    Normal,
    /// Targets that training never asked for.
    HeldOut,
    /// The instruction names another thing on the table; success is judged by the true one.
    WrongInstruction,
    /// The joints are those of another scene, as they are there after as many steps of the expert.
    AnotherState,
    /// A camera is off.
    Without(Eye),
}

impl Condition {
    /// All of them.
    pub const ALL: [Condition; 6] = [
        Condition::Normal,
        Condition::HeldOut,
        Condition::WrongInstruction,
        Condition::AnotherState,
        Condition::Without(Eye::Top),
        Condition::Without(Eye::Wrist),
    ];

    /// For a table.
    pub fn name(self) -> &'static str {
        match self {
            Condition::Normal => "unseen scenes",
            Condition::HeldOut => "held-out targets",
            Condition::WrongInstruction => "wrong instruction",
            Condition::AnotherState => "another scene's state",
            Condition::Without(Eye::Top) => "without top camera",
            Condition::Without(Eye::Wrist) => "without wrist camera",
        }
    }
}

/// Seeds of training episodes have their high half set; these never do.
pub fn scene(seed: u64, condition: Condition) -> Scene {
    let split = if condition == Condition::HeldOut { Split::HeldOut } else { Split::Train };
    Scene::random(&mut Rng::new(seed & 0xffff_ffff), split)
}

/// Counts of outcomes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
#[allow(missing_docs)]
pub struct Score {
    pub episodes: usize,
    pub successes: usize,
    pub wrong_object: usize,
    pub timeouts: usize,
}

impl Score {
    /// Counts.
    pub fn of(outcomes: &[Outcome]) -> Self {
        let count = |wanted| outcomes.iter().filter(|&&outcome| outcome == wanted).count();
        Self {
            episodes: outcomes.len(),
            successes: count(Outcome::Success),
            wrong_object: count(Outcome::WrongObject),
            timeouts: count(Outcome::Timeout),
        }
    }

    /// Share of successes; 0 of none.
    pub fn rate(&self) -> f64 {
        self.successes as f64 / self.episodes.max(1) as f64
    }

    /// Wilson's interval of the success rate at 95 %.
    pub fn interval(&self) -> (f64, f64) {
        let (n, p, z) = (self.episodes.max(1) as f64, self.rate(), 1.959_964);
        let middle = p + z * z / (2.0 * n);
        let spread = z * (p * (1.0 - p) / n + z * z / (4.0 * n * n)).sqrt();
        let scale = 1.0 + z * z / n;
        (((middle - spread) / scale).max(0.0), ((middle + spread) / scale).min(1.0))
    }
}

/// The joints at every step of the expert's way through a scene.
fn states(scene: Scene) -> Vec<[f32; 4]> {
    let mut world = World::new(scene);
    let mut states = vec![world.gripper.state()];
    while world.outcome().is_none() {
        world.step(&expert::act(&world));
        states.push(world.gripper.state());
    }
    states
}

/// Runs episodes with seeds from `seed` on under a condition.
pub fn evaluate(
    actor: &mut dyn Actor,
    condition: Condition,
    seed: u64,
    episodes: usize,
    settings: &Settings,
) -> Result<Score> {
    let mut settings = settings.clone();
    if let Condition::Without(eye) = condition {
        settings.without = Some(eye);
    }
    let begin = |i: usize| {
        let seed = seed.wrapping_add(i as u64);
        let scene = scene(seed, condition);
        let wrong = Task { target: scene.objects[1].kind, ..scene.task };
        let episode = Episode::new(scene);
        match condition {
            Condition::WrongInstruction => episode.told(&wrong),
            Condition::AnotherState => episode.feeling(states(self::scene(seed.wrapping_add(1), condition))),
            _ => episode,
        }
    };
    let mut outcomes = Vec::new();
    // Side by side, but not so many that activations fill the memory.
    for start in (0..episodes).step_by(32) {
        let mut batch: Vec<_> = (start..(start + 32).min(episodes)).map(begin).collect();
        outcomes.extend(episode::run(actor, &mut batch, &settings, &mut |_, _| ())?.0);
    }
    Ok(Score::of(&outcomes))
}
