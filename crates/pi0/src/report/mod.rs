//! The report: one page of HTML with its charts inside, and nothing to fetch.

mod html;
mod page;
mod svg;

pub use page::{Report, page};
