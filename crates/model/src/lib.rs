//! π0, π0.5 and π0-FAST, one network written once, generic over the device.
//!
//! Start at [`Pi0::sample_actions`]; `answer.rs` is what π0-FAST does in place of denoising; [`siglip`] and [`gemma`] hold the layers, [`modulation`] what drives π0.5's norms,
//! [`layout`] says how a batch is packed, [`weights`] lists every tensor, [`Checkpoint`] reads them, [`golden`] names intermediates as the references do.

#![forbid(unsafe_code)]

mod answer;
pub mod cases;
mod checkpoint;
mod config;
mod error;
pub mod gemma;
pub mod golden;
mod inputs;
mod json;
pub mod layout;
pub mod modulation;
mod pi0;
mod propose;
mod rtc;
pub mod siglip;
pub mod synth;
pub mod weights;

pub use checkpoint::{Checkpoint, NamedConfig, OpenOptions, Origin};
pub use config::{AnswerConfig, BOS, Config, EOS, Family, GemmaConfig, Kind, TimeSchedule, VisionConfig};
pub use error::ModelError;
pub use gemma::Extent;
pub use inputs::{Inputs, SampleOptions};
pub use json::plain_json;
pub use pi0::{ActionModel, Pi0, PrefixCache, STEPS, Steps, patchify, time_embedding};
pub use pi0_orbax::{open_file, placeholder};
pub use rtc::{Clean, Guidance, GuidanceSchedule, Rtc};
