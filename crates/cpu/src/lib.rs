//! π0 on the host's processor.
//!
//! The instruction set is chosen once, when the device opens. Weights are packed once, in the layout and number
//! format of that instruction set's kernels ([`Format`]); activations are f32 between operations. Results do not
//! depend on the number of threads.
//!
//! ```
//! # use pi0_cpu::{Cpu, CpuOptions};
//! # use pi0_device::Device;
//! let cpu = Cpu::new(CpuOptions::default())?;
//! let x = cpu.upload(1, 2, &[1.0, -2.0])?;
//! assert_eq!(cpu.download(&cpu.add(&x, &x)?)?.data, [2.0, -4.0]);
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod attention;
mod caches;
mod device;
mod epilogue;
mod few;
mod isa;
mod kernels;
mod math;
mod matmul;
mod memory;
mod norm;
mod options;
pub mod peak;
mod pour;
mod rope;
mod softmax;
mod tensor;
mod threads;
mod weight;

pub use device::Cpu;
pub use isa::Isa;
pub use options::{CpuError, CpuOptions, Format};
pub use tensor::Tensor;
pub use weight::{Linear, NormWeight, Weight};
