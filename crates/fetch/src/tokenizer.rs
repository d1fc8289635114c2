//! The tokenizer beside the weights: few checkpoints carry it.

use std::path::Path;

use crate::transfer::{Checksum, Client, Remote};
use crate::{Error, Listener, Progress, Result, Settings, bucket};

/// Names under which a policy looks for a tokenizer beside its weights.
const NAMES: [&str; 5] = [
    "tokenizer.json",
    "tokenizer.model",
    "paligemma_tokenizer.model",
    "tokenizer/tokenizer.json",
    "tokenizer/tokenizer.model",
];
/// openpi's, public.
const BUCKET: &str = "big_vision";
const OBJECT: &str = "paligemma_tokenizer.model";
/// Google's own, behind its licence.
const GATED: &str = "google/paligemma-3b-pt-224";

/// Fetches PaliGemma's tokenizer into `directory` unless one is there. A failure is told and no more: the weights are
/// there, and a tokenizer can be given by hand.
pub(crate) fn put_beside(directory: &Path, settings: &Settings, listener: &Listener<'_>) -> Result<()> {
    if settings.offline || NAMES.iter().any(|name| directory.join(name).exists()) {
        return Ok(());
    }
    let Err(public) = from_bucket(directory, settings, listener) else { return Ok(()) };
    let Err(gated) = from_hub(directory, settings, listener) else { return Ok(()) };
    let why = match gated {
        Error::Status { status: 401 | 403, .. } => format!(
            "Google's own is gated: accept its licence at https://huggingface.co/{GATED} and set HF_TOKEN to a token of yours"
        ),
        other => other.to_string(),
    };
    listener(Progress::Note(format!(
        "no tokenizer could be fetched, give one with --tokenizer FILE. openpi's: {public}. {why}"
    )));
    Ok(())
}

fn from_bucket(directory: &Path, settings: &Settings, listener: &Listener<'_>) -> Result<()> {
    let remote = bucket::object(BUCKET, OBJECT, settings)?.ok_or_else(|| Error::Address {
        address: format!("gs://{BUCKET}/{OBJECT}"),
        what: "it is not there".into(),
    })?;
    let client = Client::new(settings, &settings.storage, None);
    let path = directory.join(OBJECT);
    client.fetch(&remote, &directory.join(format!("{OBJECT}.incomplete")), &path, listener)
}

fn from_hub(directory: &Path, settings: &Settings, listener: &Listener<'_>) -> Result<()> {
    let client = Client::new(settings, &settings.hub, settings.token.as_deref());
    let url = format!("{}/api/models/{GATED}/tree/main", settings.hub);
    let files: Vec<serde_json::Value> = serde_json::from_slice(&client.get_small(&url)?)
        .map_err(|e| Error::wrong(&url, format!("the answer is not the hub's: {e}")))?;
    let name = "tokenizer.json";
    let file = files.iter().find(|f| f["path"] == name);
    let file = file.ok_or_else(|| Error::wrong(&url, "it lists no tokenizer.json"))?;
    let sha = file["lfs"]["oid"].as_str().map(|s| Checksum::Sha256(s.into()));
    let git = file["oid"].as_str().map(|s| Checksum::GitBlob(s.into()));
    let remote = Remote {
        url: format!("{}/{GATED}/resolve/main/{name}", settings.hub),
        path: name.into(),
        size: file["size"]
            .as_u64()
            .filter(|&n| n < 1 << 30)
            .ok_or_else(|| Error::wrong(&url, "it lists no size"))?,
        checksum: sha.or(git),
    };
    client.fetch(&remote, &directory.join("tokenizer.json.incomplete"), &directory.join(name), listener)
}
