//! Errors of the model: what was wrong, where, what to do.

use std::path::{Path, PathBuf};

use pi0_device::Error as DeviceError;

/// What can go wrong between a checkpoint and its actions.
#[derive(Debug, thiserror::Error)]
pub enum ModelError {
    /// A file could not be read.
    #[error("cannot read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// The system's reason.
        source: std::io::Error,
    },
    /// A configuration file that does not describe a network we can run.
    #[error("{} {what}", path.display())]
    Config {
        /// The file or directory.
        path: PathBuf,
        /// What is wrong with it; continues the sentence that the path begins.
        what: String,
    },
    /// `model.safetensors` is damaged.
    #[error("{} is damaged: {what}", path.display())]
    Damaged {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        what: String,
    },
    /// The tensors are not those of the network that `config.json` describes; every fault is listed.
    #[error("{} does not fit its configuration:{}", path.display(), list(faults))]
    Tensors {
        /// The file.
        path: PathBuf,
        /// One line a fault.
        faults: Vec<String>,
    },
    /// One input of a batch is wrong.
    #[error("input {row}: {what}")]
    Input {
        /// Index in the batch.
        row: usize,
        /// What came and what was wanted.
        what: String,
    },
    /// The whole call is wrong.
    #[error("{0}")]
    Call(String),
    /// The network produced NaN or infinity.
    #[error("the network's result is not finite: {0}")]
    NotFinite(String),
    /// The device failed or refused.
    #[error(transparent)]
    Device(#[from] DeviceError),
}

impl ModelError {
    pub(crate) fn config(path: &Path, what: impl Into<String>) -> Self {
        Self::Config { path: path.into(), what: what.into() }
    }
}

/// Faults that a message lists; the rest are counted.
pub(crate) const SHOWN: usize = 40;

fn list(faults: &[String]) -> String {
    let mut text: String = faults.iter().take(SHOWN).map(|f| format!("\n  {f}")).collect();
    if faults.len() > SHOWN {
        text += &format!("\n  … and {} more", faults.len() - SHOWN);
    }
    text
}
