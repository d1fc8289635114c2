//! Coverage: folds over the records of a real run. Nothing here knows what a device supports.

mod fold;
mod measure;
pub mod roadmap;
mod table;

pub use fold::{Probe, fallbacks, median, rows, stages, transfers};
pub use measure::Plan;
pub use table::table;
