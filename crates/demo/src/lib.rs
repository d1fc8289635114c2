//! A deterministic tabletop world for π0: coloured objects, a gripper, two cameras, instructions in words.
//!
//! [`Scene`] draws what lies on the table and what to do, [`World`] moves it, [`render`] shows it, [`expert`] solves
//! it, [`record`] writes what the expert did for training. [`episode`] closes the loop with a policy, [`evaluate`]
//! counts how often it succeeds.

#![forbid(unsafe_code)]

pub mod actor;
pub mod animation;
pub mod episode;
mod error;
pub mod evaluate;
pub mod expert;
pub mod film;
mod font;
pub mod record;
pub mod render;
mod rng;
mod scene;
mod world;

pub use error::{Error, Result};
pub use rng::Rng;
pub use scene::{Color, Kind, Object, Scene, Shape, Split, TABLE, Task, Verb};
pub use world::{Action, DT, Gripper, Outcome, World};
