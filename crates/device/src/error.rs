//! Errors of a device: what it cannot do, what it was given wrong, what broke.

use crate::OpKind;

/// Result of a device call.
pub type Result<T> = std::result::Result<T, Error>;

/// What can go wrong on a device.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Error {
    /// The device lacks this operation, shape or format. Returned before any work is done, so the caller may
    /// compose the operation from others or run it elsewhere.
    #[error("{device} does not support {op}: {why}")]
    Unsupported {
        /// The device's name.
        device: &'static str,
        /// The operation.
        op: OpKind,
        /// What exactly is missing.
        why: String,
    },
    /// Operands that do not fit together: a fault of the caller.
    #[error("{op}: {what}")]
    Shape {
        /// The operation.
        op: OpKind,
        /// Which sizes came and which were wanted.
        what: String,
    },
    /// A stored tensor that cannot be read or used as asked.
    #[error("tensor {name}: {what}")]
    Source {
        /// The tensor's name in its file.
        name: String,
        /// What is wrong with it.
        what: String,
    },
    /// The device itself failed, such as for want of memory.
    #[error("{device}: {what}")]
    Failed {
        /// The device's name.
        device: &'static str,
        /// What happened, and what to do.
        what: String,
    },
    /// The device is gone, with all that it held: it was reset, unplugged, or hangs. Only opening it again helps.
    #[error("{device}: {what}")]
    Lost {
        /// The device's name.
        device: &'static str,
        /// What happened.
        what: String,
    },
}

impl Error {
    /// An [`Error::Unsupported`].
    pub fn unsupported(device: &'static str, op: OpKind, why: impl Into<String>) -> Self {
        Self::Unsupported { device, op, why: why.into() }
    }

    /// An [`Error::Shape`].
    pub fn shape(op: OpKind, what: impl Into<String>) -> Self {
        Self::Shape { op, what: what.into() }
    }

    /// Whether the caller may try another way (compose, or run on the host).
    pub fn is_unsupported(&self) -> bool {
        matches!(self, Self::Unsupported { .. })
    }
}
