//! What the caller wants otherwise than a checkpoint says, or what it does not say.

use std::path::{Path, PathBuf};

use crate::observation::{Filter, Pad};
use crate::robot::Robot;
use crate::{Error, Result};

/// Whose keys and units an observation has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum RobotChoice {
    /// The one that the checkpoint suggests, if any.
    #[default]
    Auto,
    /// Nobody's: the checkpoint's own keys, no transform.
    None,
    /// This one's.
    Preset(Robot),
}

impl std::str::FromStr for RobotChoice {
    type Err = Error;

    fn from_str(name: &str) -> Result<Self> {
        match name {
            "auto" => Ok(RobotChoice::Auto),
            "none" => Ok(RobotChoice::None),
            _ => match Robot::ALL.into_iter().find(|robot| robot.name() == name) {
                Some(robot) => Ok(RobotChoice::Preset(robot)),
                None => {
                    let why = format!("{name:?} is none of aloha, droid, libero, ur5, none, auto");
                    Err(Error::Option { option: "--robot", why })
                }
            },
        }
    }
}

/// What the caller wants otherwise than the checkpoint says, or what it does not say.
#[derive(Debug, Clone, Default)]
pub struct PolicyOptions {
    /// Robot preset.
    pub robot: RobotChoice,
    /// Name of an openpi training configuration, such as `pi0_aloha_sim`; see [`CONFIGS`](crate::CONFIGS).
    pub config: Option<String>,
    /// A tokenizer file, or a directory with one.
    pub tokenizer: Option<PathBuf>,
    /// Folder below `assets/` of an openpi checkpoint.
    pub asset_id: Option<String>,
    /// Statistics instead of the checkpoint's: openpi's `norm_stats.json`, a lerobot data set or its `meta/stats.json`, a
    /// processor file or its safetensors.
    pub stats: Option<PathBuf>,
    /// Run on raw units where statistics are missing.
    pub raw_units: bool,
    /// For observations without prompt.
    pub default_prompt: Option<String>,
    /// Interpolation of images.
    pub filter: Option<Filter>,
    /// Bars of letterboxed images.
    pub pad: Option<Pad>,
    /// Whether ALOHA's joints and grippers are converted to π0's; by default where openpi or the checkpoint does.
    pub adapt_to_pi: Option<bool>,
    /// Whether joint actions are relative to the state; by default what openpi's configuration says.
    pub delta_actions: Option<bool>,
    /// Whether π0.5's prompt holds the state; by default what openpi's configuration says.
    pub state_in_prompt: Option<bool>,
    /// Which lerobot wrote the checkpoint, where its files do not tell.
    pub lerobot_version: Option<LerobotVersion>,
    /// Folder of π0-FAST's codec.
    pub action_tokenizer: Option<PathBuf>,
}

/// Releases of lerobot that write the same files and mean different things by them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LerobotVersion {
    /// 0.4.0 to 0.4.4: bars of letterboxed images are -3, π0.5 pads the state in the prompt to 32 dimensions.
    V0_4,
    /// 0.5 and later: bars are -1, the state is not padded.
    V0_5,
}

impl PolicyOptions {
    /// Refuses options that mean something for lerobot's checkpoints alone.
    pub(crate) fn only_for_lerobot(&self, directory: &Path) -> Result<()> {
        match self.lerobot_version {
            Some(_) => {
                let why = format!("{} is openpi's", directory.display());
                Err(Error::Option { option: "--lerobot-version", why })
            }
            None => Ok(()),
        }
    }

    /// Refuses options that mean something for openpi's checkpoints alone.
    pub(crate) fn only_for_openpi(&self, directory: &Path) -> Result<()> {
        let given = [
            (self.config.is_some(), "--config"),
            (self.asset_id.is_some(), "--asset-id"),
            (self.delta_actions.is_some(), "--delta-actions"),
            (self.state_in_prompt.is_some(), "--state-in-prompt"),
        ];
        match given.into_iter().find(|(given, _)| *given) {
            Some((_, option)) => {
                let why = format!(
                    "only openpi checkpoints leave this open; {} is lerobot's and says it in its files",
                    directory.display()
                );
                Err(Error::Option { option, why })
            }
            None => Ok(()),
        }
    }

    /// The complaint where raw units were asked for and are not needed.
    pub(crate) fn needless_raw_units(&self) -> Error {
        let why = "the checkpoint has statistics; without them its actions would mean nothing".into();
        Error::Option { option: "--raw-units", why }
    }
}
