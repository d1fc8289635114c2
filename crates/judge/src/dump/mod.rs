//! Is another implementation right? The logic of `pi0 check MODEL --against DUMP`.
//!
//! A dump holds one inference of whatever implementation: what went in, and intermediates under the golden names. The
//! same inputs go through the reference; each intermediate is compared, and where they part, known mistakes are made on
//! the reference one after the other ([`Mutated`](crate::mutated::Mutated)). The one that makes the difference vanish is the
//! cause; if a difference remains, the search goes on from there.

mod file;
mod hypotheses;
mod order;
mod reference;
mod search;
#[cfg(test)]
mod tests;
mod verdict;

pub use file::{Dump, is_dump};
pub use search::judge;
pub use verdict::{Cause, Tap, Verdict};
