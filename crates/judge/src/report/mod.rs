//! The report: one page of HTML with its charts inside, and nothing to fetch.

mod accuracy;
pub mod html;
mod judgement;
mod page;
mod placement;
pub mod svg;

pub use judgement::page as judgement;
pub use page::{frame, page};
