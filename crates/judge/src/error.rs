//! Errors of the judge.

use std::path::PathBuf;

use pi0_model::ModelError;

/// What can go wrong beside a verdict that is not good: that is a result.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A file of results holds something else.
    #[error("{} {what}", path.display())]
    Results {
        /// The file.
        path: PathBuf,
        /// What it holds and what was wanted; continues the sentence that the path begins.
        what: String,
    },
    /// An option of the caller's names what does not exist or cannot be.
    #[error("{option}: {why}")]
    Option {
        /// The option, as the command line spells it.
        option: String,
        /// What is wrong, and which values there are.
        why: String,
    },
    /// The network or its files.
    #[error(transparent)]
    Model(#[from] ModelError),
}

impl From<pi0_device::Error> for Error {
    fn from(e: pi0_device::Error) -> Self {
        Error::Model(e.into())
    }
}

/// A result of the judge.
pub type Result<T> = std::result::Result<T, Error>;
