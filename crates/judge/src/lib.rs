//! What is right on a device, what runs where, and what to move next: the logic of `pi0 check`, `coverage`, `compare`
//! and `report`, for whoever drives it.
//!
//! [`check`] runs modules on a device and on a judge, [`coverage`] folds the records of a traced inference into tables
//! and a roadmap, [`dump`] judges what another implementation wrote down, [`mutated`] makes mistakes on purpose, [`compare`]
//! sets two results side by side, [`report`] draws them as one page, and [`results`] is what they write to JSON. Nothing here knows a device by name.

#![forbid(unsafe_code)]

pub mod check;
pub mod compare;
pub mod coverage;
pub mod dump;
mod error;
pub mod host_ops;
pub mod mutated;
pub mod report;
pub mod results;
pub mod text;

pub use error::{Error, Result};

/// Called before each set of weights is packed; what it returns hears the bytes of each weight, and is dropped when all
/// are packed.
pub type Progress<'a> = &'a dyn Fn() -> Box<dyn Fn(u64)>;

/// A [`Progress`] that shows nothing.
pub fn silent() -> Box<dyn Fn(u64)> {
    Box::new(|_| ())
}
