//! What a machine must be able to do to run π0, and how to prove that it does.
//!
//! - [`Device`]: the moves and the operations; a new device implements this trait and nothing else.
//! - [`Reference`]: the plain scalar definition of every operation, the judge of every other device.
//! - [`Traced`]: a wrapper that records what ran where, and falls back to a host device when asked.
//! - [`Tapped`]: a wrapper that keeps every named intermediate.
//! - [`compare()`]: Pearson correlation, relative L2, max abs and the worst index; NaN always fails.

#![deny(unsafe_code)]

mod borrowed;
mod bytes;
mod compare;
mod device;
mod error;
pub mod flops;
mod forward;
mod host;
mod memory;
pub mod operands;
mod parts;
mod record;
mod reference;
mod source;
mod tapped;
mod traced;

pub use bytes::{Buffer, Bytes, Lazy, MakeBytes, MappedFile, Sink};
pub use compare::{Agreement, Bound, compare};
pub use device::{
    ADA_EPS, Activation, Attention, Dense, Device, KeyValue, Keys, Modulation, Norm, OpKind, Qkv, Scope,
    Span, dense, qkv, store_rows,
};
pub use error::{Error, Result};
pub use host::{HostTensor, Largest};
pub use memory::{Held, MemoryMeter};
pub use parts::Part;
pub use record::{Fusion, Kind, Place, Record};
pub use reference::{Reference, ReferenceWeight};
pub use source::{Dtype, LinearPart, NormKind, Order, Preferred, Round, TensorSource, WeightSource};
pub use tapped::Tapped;
pub use traced::{Fallback, Traced, TracedWeight};
