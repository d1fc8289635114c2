//! One file a command: its arguments and what it does.

pub mod demo;
pub mod devices;
pub mod infer;
pub mod inspect;
pub mod synth;
