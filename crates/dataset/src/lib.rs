//! Reads lerobot datasets of versions 2.0, 2.1 and 3.0, and compares a policy's actions with recorded ones.
//!
//! [`Dataset::open`] reads what `meta/` says, [`Dataset::episode`] the numbers of an episode, [`Dataset::pictures`]
//! some of its frames: from the parquet files where they are images, through an installed `ffmpeg` where they are
//! videos. [`OpenLoop`] adds up errors by dimension, step of the chunk and episode; it knows no policy.

#![forbid(unsafe_code)]

mod error;
mod meta;
mod openloop;
mod table;
mod video;

pub use error::{Error, Result};
pub use meta::{Camera, Dataset, Episode, EpisodeMeta, Frame, Rename};
pub use openloop::{EpisodeErrors, OpenLoop, Sums};
pub use video::Ffmpeg;
