//! Everything between a robot and the π0 network: images, state and prompt to the network's inputs, the network's
//! outputs to actions, as openpi and lerobot do it for the checkpoint at hand.
//!
//! Where to look: `openpi/` and `lerobot/` hold what each family of checkpoints says and means; both come down to a
//! list of steps, which `pipeline/` runs (`load.rs` tells the families apart, `assemble.rs` does what is alike in both).
//! `statistics.rs` finds what they normalize with. `observation/` turns images into the network's, `prompt/` words into
//! tokens; `fast/` is π0-FAST's codec.
//!
//! [`Policy::load`] works out from a checkpoint directory what to do; [`Policy::preprocess`] and
//! [`Policy::postprocess`] do it; [`Policy::summary`] tells what was worked out.

#![forbid(unsafe_code)]

mod assemble;
mod error;
mod fast;
mod files;
mod lerobot;
mod load;
mod observation;
mod openpi;
mod options;
mod pipeline;
mod policy;
mod prompt;
mod robot;
#[cfg(test)]
mod robustness;
mod statistics;
mod summary;
mod training;

pub use error::{Error, Result, Warning};
pub use fast::{Became, Damage, Decoded, FastCodec, Precision, Reply, ReplyFault, ReplyForm, ReplyReader};
pub use lerobot::{
    LerobotProcessors, TINY_CODEC, TINY_TOKENIZER, VectorStats, tiny_fast_tokenizer, write_lerobot_processors,
};
pub use observation::{Filter, Image, Layout, MAX_SIDE, Observation, Pad, Pixels, Resize};
pub use openpi::{CONFIGS, OpenPiConfig};
pub use options::{LerobotVersion, PolicyOptions, RobotChoice};
pub use pipeline::{Formula, StateLength};
pub use policy::{Actions, ModelFacts, Policy, Prepared};
pub use prompt::{PromptFormat, Rounding, StateForm, StateText, TOKENIZER_FILES, Tokenizer};
pub use robot::{AlohaUnits, OPENPI_CAMERAS, Robot, RobotCamera};
pub use summary::{ActionTokenizerSummary, CameraSummary, Family, Normalization, Summary, TokenizerSummary};
pub use training::{Picture, TrainingData, VectorStatistics};
