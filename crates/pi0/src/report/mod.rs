//! The report: one page of HTML with its charts inside, and nothing to fetch.

mod accuracy;
mod html;
mod page;
mod placement;
mod speed;
mod svg;

pub use page::{Report, page};
