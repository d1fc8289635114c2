//! Every module of π0 on this device, against the reference, in each number format.

use pi0_cpu::{Cpu, CpuOptions, Format};

fn open(format: Format) -> Cpu {
    Cpu::new(CpuOptions { format, ..CpuOptions::default() }).unwrap()
}

mod f32 {
    pi0_model::module_tests!(super::open(super::Format::F32), pi0_model::cases::Format::F32);
}

mod bf16 {
    pi0_model::module_tests!(super::open(super::Format::Bf16), pi0_model::cases::Format::Bf16);
}

mod int8 {
    pi0_model::module_tests!(super::open(super::Format::Int8), pi0_model::cases::Format::Int8);
}
