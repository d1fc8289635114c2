//! Everything between a robot and the π0 network: images, state and prompt to the network's inputs, the network's
//! outputs to actions, as openpi and lerobot do it for the checkpoint at hand.
//!
//! [`Policy::load`] works out from a checkpoint directory what to do; [`Policy::preprocess`] and
//! [`Policy::postprocess`] do it; [`Policy::summary`] tells what was worked out.

#![forbid(unsafe_code)]

mod error;
mod files;
mod lerobot;
mod load;
mod normalize;
mod observation;
mod openpi;
mod pipeline;
mod policy;
mod previous;
mod resize;
mod robot;
#[cfg(test)]
mod robustness;
mod sentencepiece;
mod summary;
mod tokenizer;
mod writer;

pub use error::{Error, Result, Warning};
pub use normalize::Formula;
pub use observation::{Image, Layout, MAX_SIDE, Observation, Pixels};
pub use openpi::{CONFIGS, OpenPiConfig};
pub use pipeline::StateLength;
pub use policy::{Actions, ModelFacts, Policy, PolicyOptions, Prepared, RobotChoice};
pub use resize::{Filter, Pad, Resize};
pub use robot::{AlohaUnits, OPENPI_CAMERAS, Robot, RobotCamera};
pub use summary::{CameraSummary, Family, Normalization, Summary, TokenizerSummary};
pub use tokenizer::{PromptFormat, TOKENIZER_FILES, Tokenizer};
pub use writer::{LerobotProcessors, MeanStd, TINY_TOKENIZER, write_lerobot_processors};
