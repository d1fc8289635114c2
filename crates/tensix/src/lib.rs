//! π0 on Tenstorrent Wormhole, natively from Rust: a small runtime, and kernels assembled in-process.
//!
//! [`Tensix`] implements [`pi0_device::Device`]. Activations live in device memory as f32 tiles interleaved over
//! all banks, weights as bf16 (f32 where the model asks for exactness); products are accumulated in f32. The
//! device is Tenstorrent's own simulator, ttsim, which users get from Tenstorrent; nothing here has run on
//! silicon. See the crate's README for what is proven.

mod board;
mod cache;
mod device;
mod dram;
mod error;
mod hazards;
mod isa;
mod kernels;
mod layout;
mod ops;
pub mod perf;
mod rv;
mod tensor;
mod transport;

pub use board::BoardInfo;
pub use device::{Stats, Tensix, TensixOptions};
pub use error::{Fault, OpenError};
pub use kernels::Processor;
pub use tensor::{Tensor, Weight};
pub use transport::{TransportError, Xy, run_child_if_asked};
