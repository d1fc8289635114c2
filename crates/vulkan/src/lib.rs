//! π0 on any GPU that has Vulkan, from one set of kernels.
//!
//! [`Vulkan`] implements [`pi0_device::Device`]. Operations are not run when they are called: they are written on a
//! [tape](tape) of kernel launches. A tape that begins like one that ran before is only compared with it, call by call;
//! when a result is downloaded, a known one is replayed as the command buffer that was recorded for it, with memory planned
//! once.
//!
//! The loader is looked for at run time, so that a program starts where there is no Vulkan. The kernels are Slang,
//! compiled ahead; `kernels/build.sh` rebuilds them. See `docs/gpu.md` for what is proven where.

mod device;
mod error;
mod gpu;
mod info;
mod instance;
mod kernels;
mod measure;
mod memory;
mod ops;
pub mod paper;
mod plan;
mod recording;
mod script;
mod staging;
mod tape;
mod tensor;
mod weight;

pub use device::{Format, LaunchInfo, Products, Stage, Stats, Vulkan, VulkanOptions};
pub use error::VulkanError;
pub use info::{GpuInfo, MatrixShape, list};
pub use kernels::{Unit, Units};
pub use tensor::Tensor;
pub use weight::Weight;
