//! Policy flags shared by the commands that translate observations and actions.

use std::path::{Path, PathBuf};

use anyhow::{Result, bail};
use pi0_model::{Checkpoint, Config};
use pi0_policy::{Filter, LerobotVersion, Pad, Policy, PolicyOptions};

use crate::device::DeviceKind;

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
    /// Statistics to normalize with, instead of the checkpoint's: openpi's norm_stats.json, a lerobot data set or its
    /// meta/stats.json, a processor file
    #[arg(long, value_name = "FILE")]
    pub stats: Option<PathBuf>,
    /// Run without normalization where statistics are missing
    #[arg(long)]
    pub raw_units: bool,
    /// Whether joint actions are relative to the state (openpi) [default: as the configuration says]
    #[arg(long, value_name = "true|false")]
    pub delta_actions: Option<bool>,
    /// Whether ALOHA's joints and grippers are converted to π0's units [default: as the configuration says]
    #[arg(long, value_name = "true|false")]
    pub adapt_to_pi: Option<bool>,
    /// Whether π0.5's prompt holds the state (openpi) [default: as the configuration says]
    #[arg(long, value_name = "true|false")]
    pub state_in_prompt: Option<bool>,
    /// The lerobot that wrote the checkpoint, where its files do not tell
    #[arg(long, value_name = "VERSION", value_enum)]
    pub lerobot_version: Option<Version>,
    /// π0-FAST: folder of the codec (processor_config.json and tokenizer.json of physical-intelligence/fast) [default:
    /// action_tokenizer/ beside the checkpoint]
    #[arg(long, value_name = "DIR")]
    pub action_tokenizer: Option<PathBuf>,
    /// π0-FAST: draw tokens at this temperature; 0 takes the likeliest [default: as the checkpoint says, else 0]
    #[arg(long, value_name = "T")]
    pub temperature: Option<f32>,
    /// π0-FAST: choose among the tokens of valid answers alone. Valid answers are the same, and take a fifth less to write;
    /// what would have been malformed becomes something else
    #[arg(long)]
    pub answer_tokens: bool,
    /// π0-FAST: guess up to N tokens from earlier answers and read them in one pass with the last; the answer is the same,
    /// and often earlier. 0 for none [default: 3 on the CPU, where results do not depend on what is computed beside them,
    /// else 0]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u8).range(0..=7))]
    pub speculate: Option<u8>,
    /// Bars of images that are not square [default: as the checkpoint was trained]
    #[arg(long, value_enum)]
    pub pad: Option<Bars>,
    /// Interpolation of images [default: as the checkpoint was trained]
    #[arg(long, value_enum)]
    pub filter: Option<Interpolation>,
}

/// See [`LerobotVersion`].
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum Version {
    /// 0.4.0 to 0.4.4
    #[value(name = "0.4")]
    V0_4,
    /// 0.5.0 and later
    #[value(name = "0.5")]
    V0_5,
}

/// See [`Pad`].
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum Bars {
    /// Black on both sides: openpi, lerobot 0.5 and later
    Center,
    /// -3 on both sides: lerobot 0.4
    #[value(name = "center-3")]
    Center3,
    /// Black, on top and left: lerobot up to 0.3
    #[value(name = "topleft")]
    TopLeft,
}

/// See [`Filter`].
#[derive(Debug, Clone, Copy, clap::ValueEnum)]
pub enum Interpolation {
    /// Antialiased: openpi
    Pillow,
    /// Four neighbours: lerobot
    Torch,
}

impl PolicyArgs {
    /// As the policy takes them.
    pub fn options(&self) -> Result<PolicyOptions> {
        Ok(PolicyOptions {
            robot: self.robot.parse()?,
            config: self.config.clone(),
            tokenizer: self.tokenizer.clone(),
            asset_id: self.asset_id.clone(),
            stats: self.stats.clone(),
            raw_units: self.raw_units,
            default_prompt: None,
            filter: self.filter.map(|filter| match filter {
                Interpolation::Pillow => Filter::Pillow,
                Interpolation::Torch => Filter::Torch,
            }),
            pad: self.pad.map(|bars| match bars {
                Bars::Center => Pad::Center,
                Bars::Center3 => Pad::Center3,
                Bars::TopLeft => Pad::TopLeft,
            }),
            adapt_to_pi: self.adapt_to_pi,
            delta_actions: self.delta_actions,
            state_in_prompt: self.state_in_prompt,
            action_tokenizer: self.action_tokenizer.clone(),
            lerobot_version: self.lerobot_version.map(|version| match version {
                Version::V0_4 => LerobotVersion::V0_4,
                Version::V0_5 => LerobotVersion::V0_5,
            }),
        })
    }

    /// Tells the network what these flags say of its answers.
    pub fn answer(&self, checkpoint: &mut Checkpoint, policy: &Policy, device: DeviceKind) -> Result<()> {
        let Some(answer) = &mut checkpoint.config.answer else {
            match (self.temperature, self.answer_tokens, self.speculate) {
                (Some(_), ..) => bail!("--temperature: only π0-FAST draws tokens"),
                (_, true, _) => bail!("--answer-tokens: only π0-FAST writes tokens"),
                (.., Some(_)) => bail!("--speculate: only π0-FAST writes tokens"),
                _ => return Ok(()),
            }
        };
        if let Some(temperature) = self.temperature {
            if !temperature.is_finite() || temperature < 0.0 {
                bail!("--temperature is {temperature}, wanted a number from 0");
            }
            answer.temperature = temperature;
        }
        answer.speculate = match self.speculate {
            Some(n) if n > 0 && answer.temperature > 0.0 => {
                bail!(
                    "--speculate guesses likeliest tokens; at a temperature of {} they are drawn",
                    answer.temperature
                )
            }
            Some(n) => usize::from(n),
            // Four rows still take hardly longer than one: docs/fast.md.
            None if device == DeviceKind::Cpu => 3,
            None => 0,
        };
        if self.answer_tokens {
            answer.only = Some(policy.answer_tokens()?);
        }
        Ok(())
    }

    /// The policy of a checkpoint.
    pub fn load(&self, dir: &Path, config: &Config) -> Result<Policy> {
        Ok(Policy::load(dir, config.into(), &self.options()?)?)
    }
}
