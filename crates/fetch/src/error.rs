//! What can go wrong between an address and its files.

use std::path::{Path, PathBuf};

/// Result of fetching.
pub type Result<T> = std::result::Result<T, Error>;

/// Why something was not fetched, and what to do.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The address is not one.
    #[error("{address}: {what}")]
    Address {
        /// What was given.
        address: String,
        /// What is wrong with it.
        what: String,
    },
    /// The network must not be used, and the files are not there.
    #[error("{address} is not in {}, and HF_HUB_OFFLINE is set", cache.display())]
    Offline {
        /// What was asked for.
        address: String,
        /// The cache.
        cache: PathBuf,
    },
    /// The server refused.
    #[error("{url}: the server answered {status}: {what}")]
    Status {
        /// What was asked for.
        url: String,
        /// HTTP's number.
        status: u16,
        /// What it means here, and what to do.
        what: String,
    },
    /// The connection failed, time after time.
    #[error("{url}: {what}")]
    Transfer {
        /// What was asked for.
        url: String,
        /// What happened.
        what: String,
    },
    /// The server sent something that cannot be right.
    #[error("{url}: {what}")]
    Wrong {
        /// What was asked for.
        url: String,
        /// What is wrong with it.
        what: String,
    },
    /// A file could not be written or read.
    #[error("{}: {source}", path.display())]
    Disk {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The files do not fit on the disk.
    #[error("{} has room for {free} bytes and {needed} are to be fetched; make room, or choose another place: {variable}", path.display())]
    NoRoom {
        /// Where they would go.
        path: PathBuf,
        /// Bytes to fetch.
        needed: u64,
        /// Bytes free.
        free: u64,
        /// The environment variable that names the place.
        variable: &'static str,
    },
}

impl Error {
    pub(crate) fn disk(path: &Path, source: std::io::Error) -> Self {
        Self::Disk { path: path.into(), source }
    }

    pub(crate) fn wrong(url: &str, what: impl Into<String>) -> Self {
        Self::Wrong { url: url.into(), what: what.into() }
    }
}
