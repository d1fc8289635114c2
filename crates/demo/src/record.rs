//! Training samples: what the cameras see at some moment of an episode, and what the expert would do next.
//!
//! Episodes are disturbed on purpose: the gripper is pushed, starts low, closed or with the target in hand, so that
//! the policy also learns the way back.

use std::collections::HashMap;
use std::path::Path;

use safetensors::{Dtype, tensor::TensorView};

use crate::render::Camera;
use crate::scene::{Kind, Verb, distance};
use crate::{Gripper, Rng, Scene, Split, World, expert, render};

/// What to record.
#[derive(Debug, Clone)]
pub struct Recording {
    /// Samples in the file.
    pub samples: usize,
    /// Seed of the first episode; the others count up from it in a space of their own.
    pub seed: u64,
    /// Pixels along a side of the images.
    pub image_size: usize,
    /// Actions in a chunk.
    pub horizon: usize,
    /// Share of an episode's moments that are kept once the target is found, in hand or within 4 cm. Before, it is
    /// [`KEEP`]. A smaller one asks more often which thing is meant, and less often how to grasp it.
    pub keep_found: f32,
}

/// Cannot write.
#[derive(Debug, thiserror::Error)]
#[error("cannot write {path}: {source}")]
pub struct WriteError {
    path: String,
    source: safetensors::SafeTensorError,
}

/// Share of an episode's moments that are kept: neighbours resemble each other.
pub const KEEP: f32 = 0.25;

/// Writes a safetensors file: `top` and `wrist` U8 `[N, size, size, 3]`, `state` F32 `[N, 4]`, `actions` F32
/// `[N, horizon, 4]`, `instruction` I32 `[N]`; the metadata's `instructions` is a JSON list that the last refers to.
///
/// Beside these, what a picture shows, for training the eyes: `kinds` I32 `[N, 3]`, colour and shape of the objects
/// by their place in [`Kind::all`](crate::scene::Kind::all), the target first; `places` F32 `[N, 2, 3, 2]`, where
/// top and wrist camera see their centres, as shares of width and height, outside of 0 to 1 when they do not.
pub fn write(path: &Path, recording: &Recording) -> Result<(), WriteError> {
    let mut samples = Samples::default();
    let mut episode = recording.seed << 32;
    while samples.count < recording.samples {
        samples.episode(recording, &mut Rng::new(episode));
        episode += 1;
    }
    samples.write(path, recording)
}

#[derive(Default)]
struct Samples {
    count: usize,
    top: Vec<u8>,
    wrist: Vec<u8>,
    state: Vec<f32>,
    actions: Vec<f32>,
    instruction: Vec<i32>,
    kinds: Vec<i32>,
    places: Vec<f32>,
    instructions: Vec<String>,
    known: HashMap<String, i32>,
}

impl Samples {
    fn episode(&mut self, recording: &Recording, rng: &mut Rng) {
        let mut world = World::new(Scene::random(rng, Split::Train));
        disturb_start(&mut world, rng);
        let noise = rng.pick(&[0.0, 0.003, 0.006]);
        let (mut push, mut pushed) = ([0.0; 4], 0);
        while world.outcome().is_none() && self.count < recording.samples {
            let found = world.held.is_some() || distance(world.gripper.xy(), world.objects[0]) < 0.04;
            if rng.chance(if found { recording.keep_found } else { KEEP }) {
                self.keep(&world, recording);
            }
            let mut action = expert::act(&world);
            if pushed == 0 && rng.chance(0.05) {
                let mut speed = || rng.between(-Gripper::STEP, Gripper::STEP);
                push = [speed(), speed(), speed(), 0.0];
                push[3] = if rng.chance(0.4) { rng.between(0.0, Gripper::OPEN) } else { -1.0 };
                pushed = 1 + rng.below(4);
            }
            if pushed > 0 {
                pushed -= 1;
                let opening = if push[3] < 0.0 { action[3] } else { push[3] };
                action = [push[0], push[1], push[2], opening];
            }
            for value in &mut action[..3] {
                *value += noise * rng.normal();
            }
            world.step(&action);
        }
    }

    fn keep(&mut self, world: &World, recording: &Recording) {
        self.count += 1;
        self.top.extend(render::top(world, recording.image_size).rgb);
        self.wrist.extend(render::wrist(world, recording.image_size).rgb);
        self.state.extend(world.gripper.state());
        self.actions.extend(expert::chunk(world, recording.horizon).into_iter().flatten());
        for object in &world.scene.objects {
            self.kinds.extend(Kind::all().position(|kind| kind == object.kind).map(|at| at as i32));
        }
        for camera in [Camera::top(), Camera::wrist(&world.gripper)] {
            for (index, &[x, y]) in world.objects.iter().enumerate() {
                let z = world.height(index) + World::OBJECT_HEIGHT;
                self.places.extend(camera.project([x, y, z], 1).0);
            }
        }
        let task = world.scene.task.to_string();
        let next = self.instructions.len() as i32;
        let id = *self.known.entry(task.clone()).or_insert(next);
        if id == next {
            self.instructions.push(task);
        }
        self.instruction.push(id);
    }

    fn write(&self, path: &Path, recording: &Recording) -> Result<(), WriteError> {
        let (n, side) = (self.count, recording.image_size);
        let floats = |values: &[f32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let (state, actions) = (floats(&self.state), floats(&self.actions));
        let ints = |values: &[i32]| values.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let (instruction, kinds, places) = (ints(&self.instruction), ints(&self.kinds), floats(&self.places));
        let image = vec![n, side, side, 3];
        let tensors = [
            ("top", Dtype::U8, image.clone(), &self.top),
            ("wrist", Dtype::U8, image, &self.wrist),
            ("state", Dtype::F32, vec![n, 4], &state),
            ("actions", Dtype::F32, vec![n, recording.horizon, 4], &actions),
            ("instruction", Dtype::I32, vec![n], &instruction),
            ("kinds", Dtype::I32, vec![n, Scene::OBJECTS], &kinds),
            ("places", Dtype::F32, vec![n, 2, Scene::OBJECTS, 2], &places),
        ];
        let list = serde_json::Value::from(self.instructions.clone()).to_string();
        let metadata = HashMap::from([("instructions".to_owned(), list)]);
        let views = tensors
            .into_iter()
            .map(|(name, dtype, shape, data)| Ok((name, TensorView::new(dtype, shape, data)?)))
            .collect::<Result<Vec<_>, _>>();
        views
            .and_then(|views| safetensors::serialize_to_file(views, Some(metadata), path))
            .map_err(|source| WriteError { path: path.display().to_string(), source })
    }
}

/// Half of the episodes begin as they will when the policy acts, the others anywhere.
fn disturb_start(world: &mut World, rng: &mut Rng) {
    if rng.chance(0.45) {
        return;
    }
    let g = &mut world.gripper;
    g.x = rng.between(-0.13, 0.13);
    g.y = rng.between(-0.13, 0.13);
    g.z = rng.between(0.005, Gripper::TOP);
    g.opening = if rng.chance(0.5) { Gripper::OPEN } else { rng.between(0.0, Gripper::OPEN) };
    if rng.chance(0.4) {
        // Near the target, where the last centimetre is decided.
        g.x = world.objects[0][0] + 0.025 * rng.normal().clamp(-2.0, 2.0);
        g.y = world.objects[0][1] + 0.025 * rng.normal().clamp(-2.0, 2.0);
    }
    if world.scene.task.verb == Verb::Put && rng.chance(0.3) {
        world.hold(0, 0.01 * rng.normal().clamp(-1.0, 1.0));
    }
}
