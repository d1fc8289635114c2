//! A deterministic tabletop world for π0: coloured objects, a gripper, two cameras, instructions in words.
//!
//! [`Scene`] draws what lies on the table and what to do, [`World`] moves it, [`render`] shows it, [`expert`] solves
//! it, [`record`] writes what the expert did for training.

#![forbid(unsafe_code)]

pub mod expert;
pub mod record;
pub mod render;
mod rng;
mod scene;
mod world;

#[cfg(test)]
mod tests;

pub use rng::Rng;
pub use scene::{Color, Kind, Object, Scene, Shape, Split, TABLE, Task, Verb};
pub use world::{Action, DT, Gripper, Outcome, World};
