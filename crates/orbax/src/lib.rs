//! Checkpoints that JAX programs write with Orbax, read without JAX, Orbax or TensorStore.
//!
//! - [`Tree`]: the arrays of a `params` directory by their JAX paths, such as `PaliGemma/llm/layers/mlp/linear`.
//! - [`Array`]: sizes and format of one array; nothing of its values is read before a [`Reader`] asks.
//! - [`Reader`]: decompresses the chunks of an array as streams, sub-array after sub-array, into any order of axes.
//! - [`ocdbt`]: the key-value database (an immutable B+tree) that Orbax keeps arrays in.
//! - [`writer`]: writes such a checkpoint, for tests and measurements.
//!
//! The formats: TensorStore's documentation of OCDBT (<https://google.github.io/tensorstore/kvstore/ocdbt/>) and the
//! specifications of Zarr 2 and 3 (<https://zarr-specs.readthedocs.io>).
//!
//! Nothing in a file is believed: lengths, counts, depths and products of sizes are bounded, names stay inside the
//! directory, and every fault is an [`Error`] that names the file.

#![forbid(unsafe_code)]

mod array;
mod block;
mod error;
mod file;
pub mod ocdbt;
mod placeholder;
mod store;
mod stream;
mod tree;
pub mod writer;
mod zarr;

pub use array::{Array, Dtype, Reader, Round};
pub use error::{Error, Result};
pub use file::open_file;
pub use placeholder::placeholder;
pub use tree::{Tree, is_params};
