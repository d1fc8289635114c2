//! Says what is wrong with a robot's observations and a policy's actions: since when, how often, in plain words, and
//! what to do.
//!
//! The costliest mistakes around a policy are silent: a frozen camera, a state in degrees, statistics of another robot.
//! [`Doctor`] knows the checkpoint ([`Profile`]) and the limits ([`Thresholds`]); a [`History`] per robot remembers
//! what came before. [`Doctor::observe`] looks at each observation, [`Doctor::answer`] at each chunk. Nothing here
//! reads files, clocks or the network, and every finding is a claim about data that the caller brought:
//! where two explanations are possible, nothing is claimed. `docs/doctor.md` lists all findings.

#![forbid(unsafe_code)]

mod actions;
mod doctor;
mod finding;
mod history;
mod pictures;
mod profile;
mod state;
mod summary;
mod thresholds;

pub use doctor::{Chunk, Doctor, Seen};
pub use finding::{Finding, Kind, UnknownKind};
pub use history::History;
pub use profile::{Camera, Dimension, Profile};
pub use summary::{Line, Summary};
pub use thresholds::Thresholds;
