//! Why a server does not start, and why a request fails.

use std::path::{Path, PathBuf};

/// Why a server does not start or ends.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file cannot be read, written or understood.
    #[error("{}: {why}", path.display())]
    File {
        /// The file or directory.
        path: PathBuf,
        /// The reason.
        why: String,
    },
    /// A setting makes no sense.
    #[error("{name}: {why}")]
    Setting {
        /// Its name in the settings file.
        name: &'static str,
        /// What is wrong.
        why: &'static str,
    },
    /// The address cannot be used.
    #[error("cannot listen on {address}: {why}")]
    Listen {
        /// The address.
        address: std::net::SocketAddr,
        /// The system's reason.
        why: std::io::Error,
    },
    /// The system refuses threads, timers or signals.
    #[error("cannot start: {0}")]
    System(std::io::Error),
    /// The inference thread broke.
    #[error("the inference thread broke; see the log")]
    Engine,
    /// Requests were still running when the time to stop was over.
    #[error("{0} connections did not finish in time and were cut off")]
    CutOff(usize),
}

impl Error {
    pub(crate) fn file(path: &Path, why: impl ToString) -> Self {
        Self::File { path: path.into(), why: why.to_string() }
    }
}

/// Why a request has no result. The text is sent to the client.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
#[non_exhaustive]
pub enum Failure {
    /// The client's fault.
    #[error("{0}")]
    BadRequest(String),
    /// The message is larger than the server takes, and was not read.
    #[error("{0}")]
    TooLarge(String),
    /// The doctor found what the operator does not allow.
    #[error("{begins}{0}", begins = Failure::STRICT)]
    Strict(String),
    /// Too many wait already.
    #[error("the server is busy: {waiting} requests wait already; try again later or another replica")]
    Busy {
        /// How many wait.
        waiting: usize,
    },
    /// It took too long.
    #[error("no result within {0:.1} s; the server is overloaded or the model too slow for this limit")]
    Expired(f64),
    /// The network or its device failed.
    #[error("inference failed: {0}")]
    Model(String),
    /// A defect in the server; it goes on.
    #[error("internal error, please report it: {0}")]
    Panic(String),
    /// The server stops.
    #[error("the server is shutting down")]
    ShuttingDown,
}

impl Failure {
    /// All labels in metrics.
    pub(crate) const KINDS: [&'static str; 7] =
        ["bad_request", "busy", "expired", "model", "panic", "shutting_down", "strict"];

    /// How the words of [`Failure::Strict`] begin; the kind of finding and a colon follow.
    pub(crate) const STRICT: &'static str = "refused by --strict: ";

    /// The label in metrics.
    pub fn kind(&self) -> &'static str {
        let [bad_request, busy, expired, model, panic, shutting_down, strict] = Self::KINDS;
        match self {
            Failure::BadRequest(_) | Failure::TooLarge(_) => bad_request,
            Failure::Strict(_) => strict,
            Failure::Busy { .. } => busy,
            Failure::Expired(_) => expired,
            Failure::Model(_) => model,
            Failure::Panic(_) => panic,
            Failure::ShuttingDown => shutting_down,
        }
    }

    /// The words may quote the client: they are shortened and kept to one line, for they go into the log.
    pub(crate) fn bad(why: impl ToString) -> Self {
        const MOST: usize = 1000;
        let why = why.to_string();
        let mut chars = why.chars().map(|c| if c.is_control() { '\u{fffd}' } else { c });
        let mut text: String = chars.by_ref().take(MOST).collect();
        if chars.next().is_some() {
            text.push('…');
        }
        Self::BadRequest(text)
    }

    /// What a caught panic said.
    pub(crate) fn panic(payload: &(dyn std::any::Any + Send)) -> Self {
        let text = payload.downcast_ref::<&str>().map(|s| (*s).to_owned());
        let text = text.or_else(|| payload.downcast_ref::<String>().cloned());
        Self::Panic(text.unwrap_or_else(|| "no message".into()))
    }
}
