//! The world by itself: the same everywhere, solvable, and drawn as it was when the policy was trained.

use std::collections::HashSet;

use pi0_demo::episode::{Episode, Settings};
use pi0_demo::record::{KEEP, Recording, write};
use pi0_demo::{Gripper, Kind, Outcome, Rng, Scene, Split, Task, Verb, World, expert, render};

fn world(seed: u64) -> World {
    World::new(Scene::random(&mut Rng::new(seed), Split::Train))
}

fn solve(world: &mut World) -> Outcome {
    loop {
        world.step(&expert::act(world));
        if let Some(outcome) = world.outcome() {
            return outcome;
        }
    }
}

/// FNV-1a.
fn hash(bytes: &[u8]) -> u64 {
    bytes.iter().fold(0xcbf2_9ce4_8422_2325, |h, &b| (h ^ u64::from(b)).wrapping_mul(0x0100_0000_01b3))
}

#[test]
fn the_expert_always_succeeds() {
    let mut longest = 0;
    for seed in 0..2000 {
        let split = if seed % 5 == 0 { Split::HeldOut } else { Split::Train };
        let mut world = World::new(Scene::random(&mut Rng::new(seed), split));
        assert_eq!(solve(&mut world), Outcome::Success, "seed {seed}: {world:?}");
        longest = longest.max(world.steps);
    }
    assert!(longest < World::LIMIT / 2, "{longest} steps");
}

#[test]
fn a_seed_is_an_episode() {
    let (mut a, mut b) = (world(7), world(7));
    assert_eq!(solve(&mut a), solve(&mut b));
    assert_eq!(a, b);
    assert_eq!(render::wrist(&a, 56), render::wrist(&b, 56));
    assert_ne!(world(8).scene, world(7).scene);
}

/// Scenes, dynamics, expert and renderer at once: the shipped policy knows no others.
#[test]
fn recordings_are_what_the_policy_was_trained_on() {
    let file = tempfile::NamedTempFile::new().unwrap();
    let recording = Recording { samples: 20, seed: 5, image_size: 56, horizon: 8, keep_found: KEEP };
    write(file.path(), &recording).unwrap();
    let bytes = std::fs::read(file.path()).unwrap();
    let tensors = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    for (name, expected) in [
        ("top", 0xb059_55b7_87e1_a548),
        ("wrist", 0x1d04_5236_eb08_e030),
        ("state", 0xf03d_931d_6978_ea10),
        ("actions", 0x1cee_b975_4ed7_dfb2),
    ] {
        assert_eq!(hash(tensors.tensor(name).unwrap().data()), expected, "{name}");
    }
}

#[test]
fn held_out_targets_are_never_asked_for_in_training() {
    let kinds = |split| -> HashSet<String> {
        (0..3000).map(|seed| Scene::random(&mut Rng::new(seed), split).task.target.to_string()).collect()
    };
    let (train, held_out) = (kinds(Split::Train), kinds(Split::HeldOut));
    assert!(train.is_disjoint(&held_out));
    assert_eq!((train.len(), held_out.len()), (16, 4));
}

#[test]
fn instructions_can_be_read_back() {
    for target in Kind::all() {
        for verb in [Verb::Touch, Verb::Put] {
            let task = Task { verb, target };
            assert_eq!(task.to_string().parse(), Ok(task));
        }
    }
    assert!("Put  the RED block in the bowl".parse::<Task>().is_ok());
    let why = "eat the red block".parse::<Task>().unwrap_err();
    assert!(why.contains("wedge") && why.contains("purple"), "{why}");
}

/// What another scene's state is, when an evaluation tells a policy of it.
#[test]
fn a_policy_is_told_of_the_joints_that_are_asked_for() {
    let episode = Episode::new(world(3).scene);
    let mut told = episode.clone().feeling(vec![[0.1, 0.0, 0.05, 0.06], [0.2, 0.0, 0.05, 0.06]]);
    assert_eq!(episode.view(&Settings::DEFAULT).state, episode.world.gripper.state());
    let mut states = Vec::new();
    for _ in 0..3 {
        states.push(told.view(&Settings::DEFAULT).state[0]);
        told.world.step(&[0.0, 0.0, 0.0, 0.0]);
    }
    assert_eq!(states, [0.1, 0.2, 0.2], "one row a step, then the last");
    assert_eq!(told.view(&Settings::DEFAULT).images[0].1, render::top(&told.world, 56));
}

#[test]
fn the_wrong_thing_is_no_success() {
    let put = (0..).map(world).find(|w| w.scene.task.verb == Verb::Put).unwrap();
    let mut wrong = put.clone();
    wrong.scene.task.target = wrong.scene.objects[1].kind;
    wrong.scene.objects.swap(0, 1);
    wrong.objects.swap(0, 1);
    assert_eq!(solve(&mut wrong), Outcome::Success);
    // The same motion in the world that asks for the other thing.
    let (mut guide, mut judged) = (wrong.clone(), put);
    guide = World::new(guide.scene);
    while judged.outcome().is_none() {
        let action = expert::act(&guide);
        guide.step(&action);
        judged.step(&action);
    }
    assert_eq!(judged.outcome(), Some(Outcome::WrongObject));
}

#[test]
fn no_action_breaks_the_world() {
    let mut world = world(1);
    let values = [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, 1e30, -1e30, 0.0];
    let mut rng = Rng::new(5);
    for _ in 0..World::LIMIT {
        world.step(&[0; 4].map(|_: i32| rng.pick(&values)));
        let Gripper { x, y, z, opening } = world.gripper;
        assert!(x.abs() <= Gripper::REACH && y.abs() <= Gripper::REACH, "{x} {y}");
        assert!(
            (0.0..=Gripper::TOP).contains(&z) && (0.0..=Gripper::OPEN).contains(&opening),
            "{z} {opening}"
        );
    }
    assert!(world.outcome().is_some());
}
