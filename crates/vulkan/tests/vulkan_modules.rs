//! Every module of both networks against the reference.

mod common;

use pi0_model::cases::Format;

/// Opens a device, or leaves the test.
macro_rules! device {
    ($open:expr) => {
        match $open {
            Some(device) => device,
            None => return,
        }
    };
}

/// Products in f32, with the thresholds of f32: the random networks are stored in bf16, which is exact on both sides.
mod multiply_adds {
    use super::*;
    pi0_model::module_tests!(device!(common::open()), Format::F32);
}

/// Products on cooperative matrices of f16, or bf16, with the thresholds of bf16.
mod matrices {
    use super::*;
    pi0_model::module_tests!(
        device!(common::open_all(pi0_vulkan::Format::Stored).into_iter().nth(1).map(|d| d.0)),
        Format::Bf16
    );
}

/// Dot products of 8-bit integers, with the thresholds of int8.
mod dots {
    use super::*;
    pi0_model::module_tests!(
        device!(common::open_all(pi0_vulkan::Format::Int8).into_iter().nth(1).map(|d| d.0)),
        Format::Int8
    );
}

/// Matrices of 8-bit integers, with the same.
mod matrices_of_integers {
    use super::*;
    pi0_model::module_tests!(
        device!(common::open_all(pi0_vulkan::Format::Int8).into_iter().nth(2).map(|d| d.0)),
        Format::Int8
    );
}
