//! The π0 network, written once, generic over the device.

#![forbid(unsafe_code)]

mod inputs;

pub use inputs::{Inputs, SampleOptions};
