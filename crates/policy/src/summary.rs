//! What a policy worked out, for `pi0 inspect` and for clients.

use std::path::PathBuf;

use serde::Serialize;

use crate::fast::ReplyForm;
use crate::observation::Resize;
use crate::pipeline::{Formula, Normalizer, OPENPI_EPS};
use crate::pipeline::{InputStep, OutputStep, StateLength};
use crate::policy::Policy;
use crate::prompt::{PromptFormat, StateText};
use crate::robot::{AlohaUnits, Robot};

/// Where a checkpoint comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Family {
    /// lerobot 0.4 or later, with processor files.
    Lerobot,
    /// lerobot up to 0.3, statistics among the weights; also a directory without processors.
    LerobotOld,
    /// openpi, converted to PyTorch.
    Openpi,
}

/// Everything a policy does, in print.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Summary {
    /// Origin of the checkpoint.
    pub family: Family,
    /// openpi's training configuration, where one applies.
    pub config: Option<String>,
    /// openpi's assets, where they apply.
    pub asset_id: Option<String>,
    /// The file of the statistics.
    pub statistics: Option<PathBuf>,
    /// Whose keys and units are used.
    pub robot: Option<Robot>,
    /// Cameras in the network's order.
    pub cameras: Vec<CameraSummary>,
    /// Side of the network's image, and how images get there.
    pub image_size: usize,
    /// Interpolation and bars.
    pub resize: Resize,
    /// Length of the state.
    pub state: StateLength,
    /// Vectors whose concatenation is the state, where the robot names them.
    pub state_parts: Vec<(&'static str, usize)>,
    /// Names under which the state may come, where no robot names its parts.
    pub state_names: Vec<String>,
    /// Of the state; none: as it comes.
    pub state_normalization: Option<Normalization>,
    /// Of the actions; none: as the network gives them.
    pub action_normalization: Option<Normalization>,
    /// Conversion of ALOHA's joints and grippers.
    pub aloha_units: Option<AlohaUnits>,
    /// Action dimensions that are relative to the state, `1` or `0` each; none: all absolute.
    pub relative_actions: Option<String>,
    /// π0-FAST's codec; none: its answers cannot be read, or the network is another.
    pub action_tokenizer: Option<ActionTokenizerSummary>,
    /// The tokenizer; none: no prompt can be read.
    pub tokenizer: Option<TokenizerSummary>,
    /// How the prompt becomes text.
    pub prompt_format: PromptFormat,
    /// How the prompt holds the state; none: it does not.
    pub state_in_prompt: Option<StateText>,
    /// Longest prompt in tokens.
    pub max_tokens: usize,
    /// What to do when the observation does not say.
    pub default_prompt: Option<String>,
    /// Values of one action.
    pub action_width: usize,
    /// Actions returned of each chunk.
    pub actions_per_chunk: usize,
    /// Where a client moves each arm before it starts, in ALOHA's units.
    pub reset_pose: Option<[f64; 6]>,
    /// What must be settled before the policy runs, each with the options that do.
    pub missing: Vec<String>,
    /// What may make the policy useless or wrong.
    pub problems: Vec<String>,
}

/// π0-FAST's codec in print.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct ActionTokenizerSummary {
    /// Its folder.
    pub path: PathBuf,
    /// Codes.
    pub codes: usize,
    /// Actions of a chunk, and values of an action.
    pub chunk: [usize; 2],
    /// Whose way answers are read in.
    pub form: ReplyForm,
}

/// A camera in print.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct CameraSummary {
    /// The checkpoint's name.
    pub key: String,
    /// All names under which an image may come.
    pub accepts: Vec<String>,
    /// Whether an observation without it is refused.
    pub required: bool,
}

/// A normalization in print.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Normalization {
    /// The formula.
    pub kind: Formula,
    /// Its epsilon.
    pub eps: f64,
    /// Dimensions that have statistics.
    pub dims: usize,
}

/// A tokenizer in print.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TokenizerSummary {
    /// The file.
    pub path: PathBuf,
    /// Entries of its vocabulary.
    pub vocabulary: usize,
    /// The id that opens every prompt.
    pub bos: u32,
}

impl Normalization {
    fn of(normalizer: &Normalizer) -> Self {
        let eps = match normalizer.formula {
            Formula::OpenPiZScore | Formula::OpenPiQuantile => OPENPI_EPS,
            Formula::LerobotMeanStd | Formula::LerobotRange => normalizer.eps,
        };
        Self { kind: normalizer.formula, eps, dims: normalizer.width() }
    }
}

/// What the summary cannot read off the policy.
#[derive(Debug, Clone)]
pub(crate) struct Origin {
    pub family: Family,
    pub config: Option<String>,
    pub asset_id: Option<String>,
    pub statistics: Option<PathBuf>,
    pub reset_pose: Option<[f64; 6]>,
    pub problems: Vec<String>,
}

impl Summary {
    pub(crate) fn of(policy: &Policy) -> Self {
        let Origin { family, config, asset_id, statistics, reset_pose, problems } = policy.origin.clone();
        let before = |f: fn(&InputStep) -> Option<Normalization>| policy.before.iter().find_map(f);
        let (prompt_format, max_tokens) = policy
            .before
            .iter()
            .find_map(|step| match step {
                InputStep::Tokenize(format, limit) => Some((*format, *limit)),
                _ => None,
            })
            .unwrap_or((PromptFormat::Verbatim, policy.facts.max_tokens));
        Self {
            family,
            config,
            asset_id,
            statistics,
            robot: policy.robot,
            cameras: policy
                .cameras
                .iter()
                .map(|camera| CameraSummary {
                    key: camera.key.clone(),
                    accepts: camera.names.clone(),
                    required: camera.required,
                })
                .collect(),
            image_size: policy.facts.image_size,
            resize: policy.resize,
            state: policy.state.clone(),
            state_parts: policy.robot.map_or_else(Vec::new, |robot| robot.state().to_vec()),
            state_names: policy.state_names.clone(),
            state_normalization: before(|step| match step {
                InputStep::Normalize(normalizer) => Some(Normalization::of(normalizer)),
                _ => None,
            }),
            action_normalization: policy.after.iter().find_map(|step| match step {
                OutputStep::Unnormalize(normalizer) => Some(Normalization::of(normalizer)),
                _ => None,
            }),
            aloha_units: policy.after.iter().find_map(|step| match step {
                OutputStep::Aloha(units) => Some(*units),
                _ => None,
            }),
            relative_actions: policy.after.iter().find_map(|step| match step {
                OutputStep::Absolute(mask) | OutputStep::AbsoluteF32(mask) => {
                    Some(mask.iter().map(|&on| if on { '1' } else { '0' }).collect())
                }
                _ => None,
            }),
            action_tokenizer: policy.replies.as_ref().map(|reader| ActionTokenizerSummary {
                path: reader.codec().directory().to_owned(),
                codes: reader.codec().size(),
                chunk: [reader.steps, reader.dims],
                form: reader.form(),
            }),
            tokenizer: policy.tokenizer.as_ref().map(|tokenizer| TokenizerSummary {
                path: tokenizer.path().to_owned(),
                vocabulary: tokenizer.size(),
                bos: tokenizer.bos(),
            }),
            prompt_format,
            state_in_prompt: policy.before.iter().find_map(|step| match step {
                InputStep::StateText(text) => Some(*text),
                _ => None,
            }),
            max_tokens,
            default_prompt: policy.default_prompt.clone(),
            action_width: policy.cols,
            actions_per_chunk: policy.rows,
            reset_pose,
            missing: policy.missing.clone(),
            problems,
        }
    }
}
