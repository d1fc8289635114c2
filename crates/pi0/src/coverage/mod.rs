//! Coverage: folds over the records of a real run. Nothing here knows what a device supports.

mod fold;
pub mod roadmap;

pub use fold::{Probe, fallbacks, median, rows, stages, transfers};
