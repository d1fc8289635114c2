//! Flags of the commands that open a checkpoint.

use std::cell::RefCell;
use std::path::{Path, PathBuf};

use anyhow::Result;
use pi0_fetch::{Address, Progress, Settings};
use pi0_model::{Checkpoint, NamedConfig, OpenOptions};

use crate::output;

/// What the user says of the weights.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Weights")]
pub struct WeightsArgs {
    /// Sizes of a shrunk network, where no arch.json lies beside the weights
    #[arg(long, value_name = "FILE")]
    pub arch: Option<PathBuf>,
    /// Folder of a PEFT adapter (LoRA) to add to the weights
    #[arg(long, value_name = "DIR")]
    pub adapter: Option<PathBuf>,
}

impl WeightsArgs {
    /// Opens the checkpoint of a command line; `config` is the training configuration that it names. What was found
    /// in another folder than the one that was given is told.
    pub fn open(&self, model: &Path, config: Option<&str>) -> Result<Checkpoint> {
        let named = config.and_then(|name| pi0_policy::CONFIGS.iter().find(|c| c.name == name));
        let options = OpenOptions {
            arch: self.arch.clone(),
            adapter: self.adapter.clone(),
            named: named.map(|c| NamedConfig {
                name: c.name.into(),
                kind: c.kind,
                horizon: c.horizon,
                action_dim: c.action_dim,
                max_tokens: Some(c.max_tokens),
            }),
        };
        let model = resolve(model)?;
        let checkpoint = Checkpoint::open_with(&model, &options)?;
        for note in &checkpoint.origin.notes {
            eprintln!("{note}");
        }
        Ok(checkpoint)
    }
}

/// The folder of a model: the path itself, or where the files at its address are once they are fetched.
pub fn resolve(model: &Path) -> Result<PathBuf> {
    match model.to_str().map(Address::parse).transpose()?.flatten() {
        Some(address) => fetch(&address),
        None => Ok(model.to_owned()),
    }
}

/// Fetches what is not there yet, with a progress bar.
pub fn fetch(address: &Address) -> Result<PathBuf> {
    let bar = RefCell::new(None::<indicatif::ProgressBar>);
    let listener = |progress: Progress<'_>| match progress {
        Progress::Total(bytes) => *bar.borrow_mut() = Some(output::progress("fetching", bytes)),
        Progress::File(_) => {}
        Progress::Bytes(n) => bar.borrow().iter().for_each(|bar| bar.inc(n)),
        Progress::Undone(n) => {
            bar.borrow().iter().for_each(|bar| bar.set_position(bar.position().saturating_sub(n)))
        }
        Progress::Note(text) => eprintln!("{text}"),
    };
    let directory = pi0_fetch::fetch(address, &Settings::from_env(), &listener)?;
    bar.take().iter().for_each(indicatif::ProgressBar::finish_and_clear);
    Ok(directory)
}
