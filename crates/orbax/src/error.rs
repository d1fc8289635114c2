//! What can be wrong with a checkpoint, and where.

use std::path::{Path, PathBuf};

/// Result of reading a checkpoint.
pub type Result<T> = std::result::Result<T, Error>;

/// Why a checkpoint could not be read.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read or written.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file that is there and wrong: cut short, changed, or never valid.
    #[error("{} is damaged: {what}", path.display())]
    Damaged {
        /// The file, and the array in it where one is concerned.
        path: PathBuf,
        /// What is wrong.
        what: String,
    },
    /// A form of the format that is not read here.
    #[error("{}: {what}", path.display())]
    Unsupported {
        /// The file or array.
        path: PathBuf,
        /// Which form.
        what: String,
    },
    /// A directory that holds no checkpoint.
    #[error("{} {what}", path.display())]
    NotOrbax {
        /// The directory.
        path: PathBuf,
        /// Why; continues the sentence that the path begins.
        what: String,
    },
}

impl Error {
    pub(crate) fn read(path: &Path, source: std::io::Error) -> Self {
        Self::Read { path: path.into(), source }
    }

    pub(crate) fn damaged(path: &Path, what: impl Into<String>) -> Self {
        Self::Damaged { path: path.into(), what: what.into() }
    }

    pub(crate) fn unsupported(path: &Path, what: impl Into<String>) -> Self {
        Self::Unsupported { path: path.into(), what: what.into() }
    }
}
