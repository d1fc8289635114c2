//! π0-FAST: actions as tokens. [`codec`] turns a chunk into codes and back, [`reply`] finds the codes in what the network
//! wrote.

mod codec;
mod dct;
mod reply;
#[cfg(test)]
mod tests;

pub use codec::{Damage, Decoded, FastCodec, Precision};
pub(crate) use reply::SKIPPED;
pub use reply::{Became, Reply, ReplyFault, ReplyForm, ReplyReader};
