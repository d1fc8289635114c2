//! Working out a policy from a checkpoint directory.

use std::path::Path;

use serde::Deserialize;

use crate::files::read_json;
use crate::policy::{ModelFacts, Policy, PolicyOptions};
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
        Some("pi0") => lerobot::load(directory, facts, options),
        Some(other) => Err(Error::Unsupported {
            path: config,
            what: format!("a policy of type {other:?}"),
            advice: "only pi0 is implemented".into(),
        }),
        None if directory.join("assets").is_dir() => openpi::load(directory, facts, options),
        None => Err(Error::NotACheckpoint {
            path: directory.into(),
            why: "neither a config.json of lerobot with a `type` nor openpi's folder `assets`".into(),
        }),
    }
}
