//! Policy flags shared by the commands that translate observations and actions.

use std::path::{Path, PathBuf};

use anyhow::Result;
use pi0_model::Config;
use pi0_policy::{Policy, PolicyOptions};

/// What the checkpoint does not say, or what the user wants otherwise.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Policy")]
pub struct PolicyArgs {
    /// Robot whose keys and units are used: aloha, droid, libero, ur5, none (the checkpoint's own), auto
    #[arg(long, default_value = "auto")]
    pub robot: String,
    /// openpi training configuration, such as pi0_aloha_sim
    #[arg(long, value_name = "NAME")]
    pub config: Option<String>,
    /// Tokenizer file (tokenizer.json or a SentencePiece .model) [default: beside the checkpoint]
    #[arg(long, value_name = "FILE")]
    pub tokenizer: Option<PathBuf>,
    /// Folder below assets/ of an openpi checkpoint
    #[arg(long, value_name = "ID")]
    pub asset_id: Option<String>,
}

impl PolicyArgs {
    /// As the policy takes them.
    pub fn options(&self) -> Result<PolicyOptions> {
        Ok(PolicyOptions {
            robot: self.robot.parse()?,
            config: self.config.clone(),
            tokenizer: self.tokenizer.clone(),
            asset_id: self.asset_id.clone(),
            ..PolicyOptions::default()
        })
    }

    /// The policy of a checkpoint.
    pub fn load(&self, dir: &Path, config: &Config) -> Result<Policy> {
        Ok(Policy::load(dir, config.into(), &self.options()?)?)
    }
}
