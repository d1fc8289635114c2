//! What goes into the network and what comes out, in the model's own units.

use crate::Rtc;

/// What one robot sees, ready for the network: preprocessed, normalized, tokenized. A batch is a slice of these.
///
/// There is no padding: an absent camera is `None` and only real tokens are listed, so nothing is computed for
/// what is not there.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Inputs {
    /// One entry a camera, in the model's order: `[3, height, width]` in `[-1, 1]`, or `None` where the camera is
    /// masked.
    pub images: Vec<Option<Vec<f32>>>,
    /// The prompt's tokens with BOS and newline, without padding.
    pub tokens: Vec<u32>,
    /// Normalized, padded with zeros to the model's state width. π0.5 reads the state in its prompt and not this, which
    /// may then be empty.
    pub state: Vec<f32>,
    /// Starting noise `[horizon, action_dim]`; drawn from the seed of [`SampleOptions`] when absent.
    pub noise: Option<Vec<f32>>,
    /// π0-FAST: the token that ends an answer, which is its last one; EOS when none.
    pub end: Option<u32>,
    /// Real-time chunking: continue the chunk that is still being executed.
    pub rtc: Option<Rtc>,
}

/// How to sample.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct SampleOptions {
    /// Euler steps, or of π0-FAST most tokens of an answer; the checkpoint's default when none.
    pub steps: Option<usize>,
    /// Seed of the starting noise, for inputs that bring none, or of the tokens drawn at a temperature. Row `i` of a batch
    /// draws from `seed + i`.
    pub seed: u64,
}
