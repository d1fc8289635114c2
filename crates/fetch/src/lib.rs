//! Fetches checkpoints: `hf://OWNER/NAME[@REVISION]` from the Hugging Face Hub, `gs://BUCKET/PREFIX` from a public bucket
//! of Google's, such as openpi's.
//!
//! Nothing here is called unless such an address was given. Files land where the projects' own programs keep them (the
//! hub's cache, openpi's cache), so that neither fetches twice. A transfer that was cut goes on where it ended; every file
//! is checked against the checksum that the server lists; processes that want the same files wait for each other.

#![forbid(unsafe_code)]

mod address;
mod bucket;
mod disk;
mod error;
mod hub;
#[cfg(test)]
mod lies;
mod settings;
mod tokenizer;
mod transfer;

use std::path::PathBuf;

pub use address::Address;
pub use error::{Error, Result};
pub use settings::Settings;

/// What is going on, for people who wait.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Progress<'a> {
    /// Everything that will be fetched, in bytes, less what is there already.
    Total(u64),
    /// This file is next.
    File(&'a str),
    /// So many bytes more have arrived.
    Bytes(u64),
    /// Bytes that arrived were wrong or are not needed, and are fetched again.
    Undone(u64),
    /// Something that should be known.
    Note(String),
}

/// Hears of progress.
pub type Listener<'a> = dyn Fn(Progress<'_>) + 'a;

/// Fetches what is at `address` and is not there yet, and the tokenizer beside it; returns the folder.
pub fn fetch(address: &Address, settings: &Settings, listener: &Listener<'_>) -> Result<PathBuf> {
    let directory = match address {
        Address::Hub { repository, revision } => hub::fetch(repository, revision, settings, listener)?,
        Address::Bucket { bucket, prefix } => bucket::fetch(bucket, prefix, settings, listener)?,
    };
    tokenizer::put_beside(&directory, settings, listener)?;
    Ok(directory)
}
