//! Working out a policy from a checkpoint directory.

use std::path::Path;

use serde::Deserialize;

use crate::files::read_json;
use crate::options::PolicyOptions;
use crate::policy::{ModelFacts, Policy};
use crate::{Error, Result, lerobot, openpi};

/// What tells the families apart.
#[derive(Deserialize)]
struct Probe {
    #[serde(rename = "type")]
    kind: Option<String>,
}

pub(crate) fn load(directory: &Path, facts: ModelFacts, options: &PolicyOptions) -> Result<Policy> {
    if !directory.is_dir() {
        let why = if directory.exists() { "it is a file" } else { "it does not exist" };
        return Err(Error::NotACheckpoint { path: directory.into(), why: why.into() });
    }
    let config = directory.join("config.json");
    let kind = if config.is_file() { read_json::<Probe>(&config)?.kind } else { None };
    match kind.as_deref() {
        Some("pi0" | "pi05" | "pi0_fast") => lerobot::load(directory, facts, options),
        Some(other) => Err(Error::Unsupported {
            path: config,
            what: format!("a policy of type {other:?}"),
            advice: "this program runs pi0, pi05 and pi0_fast".into(),
        }),
        // openpi's converter writes no type, its training no config.json at all.
        None => openpi::load(directory, facts, options),
    }
}
