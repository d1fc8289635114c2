//! A scripted expert. It looks at the world as it is, not at what it did before, so it also recovers.

use crate::scene::{Verb, distance};
use crate::{Action, Gripper, World};

/// Height at which it travels, metres.
const TRAVEL: f32 = 0.08;
/// Farthest sideways step, metres.
const PACE: f32 = 0.022;

/// The next action.
pub fn act(world: &World) -> Action {
    let g = &world.gripper;
    match world.scene.task.verb {
        Verb::Touch if world.touched == Some(0) => [0.0; 4],
        Verb::Touch => {
            // The fingers close on the way, before they are low enough to catch anything.
            let floor = if g.opening < 0.03 && world.held.is_none() { 0.02 } else { 0.055 };
            approach(g, world.objects[0], (0.008, 0.035), (floor, TRAVEL), 0.0)
        }
        Verb::Put if world.in_bowl[0] => [0.0, 0.0, 0.0, Gripper::OPEN],
        Verb::Put if world.held.is_some_and(|(index, _)| index == 0) => {
            let mut action = approach(g, world.scene.bowl, (0.012, 0.06), (0.045, TRAVEL), 0.0);
            if distance(g.xy(), world.scene.bowl) < 0.014 && g.z < 0.056 {
                action[3] = Gripper::OPEN;
            }
            action
        }
        Verb::Put => {
            // Straddling fingers must be open before they come down.
            let floor = if g.opening > 0.052 { 0.006 } else { 0.055 };
            let mut action = approach(g, world.objects[0], (0.007, 0.035), (floor, TRAVEL), Gripper::OPEN);
            if distance(g.xy(), world.objects[0]) < 0.007 && g.z < 0.013 && g.opening > 0.052 {
                action[3] = 0.0;
            }
            action
        }
    }
}

/// Towards a place: down only near it (within `near.1`, all the way within `near.0`), sideways only as fast as the
/// height allows.
fn approach(g: &Gripper, to: [f32; 2], near: (f32, f32), height: (f32, f32), opening: f32) -> Action {
    let far = distance(g.xy(), to);
    let outside = ((far - near.0) / (near.1 - near.0)).clamp(0.0, 1.0);
    let z = height.0 + (height.1 - height.0) * outside;
    let clear = (1.0 - (z - g.z - 0.01).max(0.0) / 0.05).clamp(0.15, 1.0);
    let pace = clear * if far * 0.8 > PACE { PACE / far } else { 0.8 };
    let dz = (z - g.z).clamp(-Gripper::STEP, Gripper::STEP);
    [(to[0] - g.x) * pace, (to[1] - g.y) * pace, dz, opening]
}

/// The next `horizon` actions, if nothing disturbs them.
pub fn chunk(world: &World, horizon: usize) -> Vec<Action> {
    let mut world = world.clone();
    (0..horizon)
        .map(|_| {
            let action = act(&world);
            world.step(&action);
            action
        })
        .collect()
}
