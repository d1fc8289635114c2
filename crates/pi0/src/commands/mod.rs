//! One file a command: its arguments and what it does.

pub mod bench;
pub mod check;
pub mod compare;
pub mod coverage;
pub mod demo;
pub mod devices;
pub mod doctor;
pub mod estimate;
pub mod evaluate;
pub mod infer;
pub mod inspect;
pub mod pull;
pub mod replay;
pub mod report;
pub mod serve;
pub mod synth;
