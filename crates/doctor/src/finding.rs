//! What can be wrong.

use serde::{Deserialize, Serialize};

/// A kind of finding: the label in metrics, and what `--strict` takes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
pub enum Kind {
    /// An image is black.
    ImageBlack,
    /// All pixels of an image are alike.
    ImageConstant,
    /// An image stays the same, byte for byte, while the state moves.
    ImageFrozen,
    /// Two cameras show the same, byte for byte.
    ImageEqual,
    /// Most of the network's image would be bars.
    ImageBars,
    /// Samples lie in a range that is probably wrong.
    ImageRange,
    /// Red and blue are probably swapped.
    ColoursSwapped,
    /// Two cameras are probably swapped.
    CamerasSwapped,
    /// A camera that the policy was trained with is missing.
    CameraMissing,
    /// The state is far outside of what the policy was trained on.
    StateOutside,
    /// The state stays the same while pictures change and motion is commanded.
    StateConstant,
    /// The observation was refused: NaN in the state, a wrong shape, an unknown camera.
    Refused,
    /// The prompt was cut.
    PromptCut,
    /// The prompt is empty.
    PromptEmpty,
    /// An answer of π0-FAST is not what it should be, and its actions are what could be made of it.
    AnswerMalformed,
    /// Most actions lie at the limits of what the policy was trained on.
    ActionsSaturated,
    /// Actions are far outside of what the policy was trained on.
    ActionsOutside,
    /// A chunk does not continue the one before.
    ActionsJump,
    /// The robot moves against what it is told.
    Inverted,
    /// An answer takes longer than its chunk lasts.
    Latency,
    /// The same observation again.
    Repeated,
}

impl Kind {
    /// All of them.
    pub const ALL: [Kind; 21] = [
        Kind::ImageBlack,
        Kind::ImageConstant,
        Kind::ImageFrozen,
        Kind::ImageEqual,
        Kind::ImageBars,
        Kind::ImageRange,
        Kind::ColoursSwapped,
        Kind::CamerasSwapped,
        Kind::CameraMissing,
        Kind::StateOutside,
        Kind::StateConstant,
        Kind::Refused,
        Kind::PromptCut,
        Kind::PromptEmpty,
        Kind::AnswerMalformed,
        Kind::ActionsSaturated,
        Kind::ActionsOutside,
        Kind::ActionsJump,
        Kind::Inverted,
        Kind::Latency,
        Kind::Repeated,
    ];

    /// Its name in metrics, settings and replies.
    pub fn name(self) -> &'static str {
        match self {
            Kind::ImageBlack => "image_black",
            Kind::ImageConstant => "image_constant",
            Kind::ImageFrozen => "image_frozen",
            Kind::ImageEqual => "image_equal",
            Kind::ImageBars => "image_bars",
            Kind::ImageRange => "image_range",
            Kind::ColoursSwapped => "colours_swapped",
            Kind::CamerasSwapped => "cameras_swapped",
            Kind::CameraMissing => "camera_missing",
            Kind::StateOutside => "state_outside",
            Kind::StateConstant => "state_constant",
            Kind::Refused => "refused",
            Kind::PromptCut => "prompt_cut",
            Kind::PromptEmpty => "prompt_empty",
            Kind::AnswerMalformed => "answer_malformed",
            Kind::ActionsSaturated => "actions_saturated",
            Kind::ActionsOutside => "actions_outside",
            Kind::ActionsJump => "actions_jump",
            Kind::Inverted => "inverted",
            Kind::Latency => "latency",
            Kind::Repeated => "repeated",
        }
    }

    /// What to do about it.
    pub fn remedy(self) -> &'static str {
        match self {
            Kind::ImageBlack => "check the camera's cover, exposure and driver",
            Kind::ImageConstant => "check the camera's driver: a picture of the world is never of one colour",
            Kind::ImageFrozen => "restart the camera's driver; the client sends an old picture",
            Kind::ImageEqual => "give each key the picture of its own camera",
            Kind::ImageBars => "crop the picture to a shape nearer to a square, as the training data were",
            Kind::ImageRange => "send bytes in 0 to 255, or floats in 0 to 1",
            Kind::ColoursSwapped => "convert BGR to RGB before sending (OpenCV delivers BGR)",
            Kind::CamerasSwapped => "swap the two keys in the client",
            Kind::CameraMissing => "send it, or expect a policy that works with less than it learned with",
            Kind::StateOutside => {
                "check units, the order of joints, and that the statistics are this robot's"
            }
            Kind::StateConstant => {
                "read the joints anew for every observation, and check that the robot is enabled"
            }
            Kind::Refused => "correct the observation as the message says",
            Kind::PromptCut => "shorten the prompt",
            Kind::PromptEmpty => "say what to do: `prompt` in the observation, or --default-prompt",
            Kind::AnswerMalformed => {
                "do not execute what was made of it; check pictures and prompt, --action-tokenizer, and that --steps leaves \
                 an answer room"
            }
            Kind::ActionsSaturated => {
                "check the state and the pictures; the policy sees what it does not know"
            }
            Kind::ActionsOutside => {
                "check the state and that the statistics belong to this checkpoint; do not execute"
            }
            Kind::ActionsJump => {
                "execute more of a chunk, or send `rtc/previous` so that the new chunk continues the old one"
            }
            Kind::Inverted => {
                "turn the sign, or 0 and 1, of this dimension around, in the state or in the action"
            }
            Kind::Latency => "use fewer steps, another device or smaller batches, or ask earlier",
            Kind::Repeated => "read cameras and joints anew for every observation",
        }
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// No kind has this name.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnknownKind(String);

impl std::fmt::Display for UnknownKind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let known: Vec<&str> = Kind::ALL.iter().map(|kind| kind.name()).collect();
        write!(f, "{:?} is no finding; known are {}", self.0, known.join(", "))
    }
}

impl std::error::Error for UnknownKind {}

impl std::str::FromStr for Kind {
    type Err = UnknownKind;

    fn from_str(name: &str) -> Result<Self, UnknownKind> {
        Kind::ALL.into_iter().find(|kind| kind.name() == name).ok_or_else(|| UnknownKind(name.into()))
    }
}

/// Something that is wrong with the latest observation or chunk of a robot.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Finding {
    /// What kind of thing.
    pub kind: Kind,
    /// The camera or dimension; empty where it is about all of them.
    pub subject: String,
    /// What is wrong, in a sentence without a full stop.
    pub text: String,
    /// The first request of this robot that had it, counted from 1.
    pub since: u64,
    /// Seconds since then.
    pub for_seconds: f64,
    /// How many requests had it.
    pub count: u64,
    /// Whether it should be told now: it is new, or was last told a while ago.
    #[serde(skip)]
    pub news: bool,
}

impl Finding {
    /// Everything in one line.
    pub fn sentence(&self) -> String {
        let often = match self.count {
            1 => String::new(),
            n => format!(" ({n} times since request {})", self.since),
        };
        format!("{}{often}: {}", self.text, self.kind.remedy())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_read_back() {
        for kind in Kind::ALL {
            assert_eq!(kind.name().parse(), Ok(kind));
            assert_eq!(Kind::ALL.iter().filter(|other| other.name() == kind.name()).count(), 1);
        }
        let error = "image_blue".parse::<Kind>().unwrap_err().to_string();
        assert!(error.contains("image_blue") && error.contains("image_black"), "{error}");
    }
}
