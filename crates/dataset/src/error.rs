//! What can be wrong with a dataset.

use std::path::{Path, PathBuf};

/// A dataset cannot be read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file cannot be read or holds something else than it should.
    #[error("{}: {why}", path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// The reason.
        why: String,
    },
    /// The dataset lacks what is needed.
    #[error("{0}")]
    Missing(String),
    /// Videos cannot be decoded.
    #[error("{0}")]
    Video(String),
}

/// The result of reading.
pub type Result<T> = std::result::Result<T, Error>;

impl Error {
    pub(crate) fn file(path: &Path, why: impl ToString) -> Self {
        Self::File { path: path.into(), why: why.to_string() }
    }
}
