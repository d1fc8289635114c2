//! Serves π0 to robots: openpi's websocket protocol, many clients, one model.

#![forbid(unsafe_code)]

mod decode;
mod encode;
mod value;

pub use decode::{DecodeError, Limits, decode};
pub use encode::encode;
pub use value::{Dtype, Kind, Map, NdArray, Value};
