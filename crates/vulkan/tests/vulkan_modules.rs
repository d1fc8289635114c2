//! Every module of the network against the reference, with the thresholds of f32: products are summed in f32, and the
//! random networks are stored in bf16, which is exact on both sides.

mod common;

use pi0_model::cases::Format;

macro_rules! device {
    () => {
        match common::open() {
            Some(device) => device,
            None => return,
        }
    };
}

pi0_model::module_tests!(device!(), Format::F32);
