//! The Hugging Face Hub, into the hub's own cache: `models--OWNER--NAME/{blobs,refs,snapshots/COMMIT}`.

use std::fs;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::address::{encoded, is_path};
use crate::transfer::{Checksum, Client, Remote};
use crate::{Error, Listener, Progress, Result, Settings, disk};

const MOST_FILES: usize = 20_000;

#[derive(Deserialize)]
struct Model {
    sha: String,
    #[serde(default)]
    siblings: Vec<Sibling>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Sibling {
    rfilename: String,
    size: Option<u64>,
    blob_id: Option<String>,
    lfs: Option<Lfs>,
}

#[derive(Deserialize)]
struct Lfs {
    sha256: String,
    size: u64,
}

/// Files that a policy does not need: other programs' weights, states of training, pictures.
fn needed(path: &str) -> bool {
    let lower = path.to_ascii_lowercase();
    let ends = [
        ".bin",
        ".pt",
        ".pth",
        ".ckpt",
        ".pkl",
        ".onnx",
        ".msgpack",
        ".h5",
        ".gguf",
        ".mp4",
        ".png",
        ".jpg",
        ".gif",
        ".zip",
        ".tar",
        ".gz",
        ".gitattributes",
    ];
    let folders = ["train_state/", "training_state/", "wandb/", ".git/"];
    !ends.iter().any(|end| lower.ends_with(end))
        && !folders.iter().any(|folder| lower.starts_with(folder) || lower.contains(&format!("/{folder}")))
}

pub(crate) fn fetch(
    repository: &str,
    revision: &str,
    settings: &Settings,
    listener: &Listener<'_>,
) -> Result<PathBuf> {
    let root = settings.hub_cache.join(format!("models--{}", repository.replace('/', "--")));
    let reference = root.join("refs").join(revision);
    if settings.offline {
        let commit =
            fs::read_to_string(&reference).map_or(revision.to_owned(), |commit| commit.trim().into());
        let snapshot = root.join("snapshots").join(commit);
        let address = format!("hf://{repository}@{revision}");
        return if snapshot.is_dir() { Ok(snapshot) } else { Err(Error::Offline { address, cache: root }) };
    }
    let client = Client::new(settings, &settings.hub, settings.token.as_deref());
    let url = format!("{}/api/models/{repository}/revision/{}?blobs=true", settings.hub, encoded(revision));
    let (commit, files) = files(&client.get_small(&url)?, &url, repository, settings)?;
    let snapshot = root.join("snapshots").join(&commit);
    let mut wanted: Vec<(PathBuf, Remote)> =
        files.into_iter().map(|(blob, remote)| (root.join("blobs").join(blob), remote)).collect();
    wanted.retain(|(_, remote)| !snapshot.join(&remote.path).exists());
    fs::create_dir_all(&root).map_err(|e| Error::disk(&root, e))?;
    let locks = settings.hub_cache.join(".locks").join(root.file_name().unwrap_or_default());
    let _lock = disk::lock(&locks.join("pi0.lock"), listener)?;
    // Another process may have fetched some meanwhile.
    wanted.retain(|(_, remote)| !snapshot.join(&remote.path).exists());
    let left = |(blob, remote): &(PathBuf, Remote)| {
        let have = [blob.clone(), partial(blob)].iter().find_map(|p| Some(p.metadata().ok()?.len()));
        remote.size.saturating_sub(have.unwrap_or(0))
    };
    let total = wanted.iter().fold(0u64, |n, file| n.saturating_add(left(file)));
    disk::check_room(&root, total, "HF_HOME")?;
    listener(Progress::Total(total));
    for (blob, remote) in &wanted {
        if !blob.exists() {
            client.fetch(remote, &partial(blob), blob, listener)?;
        }
        link(blob, &snapshot.join(&remote.path), remote)?;
    }
    fs::create_dir_all(&snapshot).map_err(|e| Error::disk(&snapshot, e))?;
    disk::write(&reference, commit.as_bytes())?;
    Ok(snapshot)
}

/// What the hub's answer says of a repository: the commit, and of each file that a policy needs its name among the
/// blobs and where it is.
fn files(
    answer: &[u8],
    url: &str,
    repository: &str,
    settings: &Settings,
) -> Result<(String, Vec<(String, Remote)>)> {
    let model: Model = serde_json::from_slice(answer)
        .map_err(|e| Error::wrong(url, format!("the answer is not the hub's: {e}")))?;
    if model.sha.len() < 7 || !model.sha.bytes().all(|b| b.is_ascii_hexdigit()) {
        return Err(Error::wrong(url, format!("the commit {:?} is none", model.sha)));
    }
    if model.siblings.len() > MOST_FILES {
        return Err(Error::wrong(url, format!("{} files", model.siblings.len())));
    }
    let mut files = Vec::new();
    for file in model.siblings.into_iter().filter(|file| needed(&file.rfilename)) {
        if !is_path(&file.rfilename) {
            return Err(Error::wrong(url, format!("the file name {:?} leaves its folder", file.rfilename)));
        }
        let (name, size, checksum) = match (file.lfs, file.blob_id, file.size) {
            (Some(lfs), _, _) => (lfs.sha256.clone(), lfs.size, Checksum::Sha256(lfs.sha256)),
            (None, Some(id), Some(size)) => (id.clone(), size, Checksum::GitBlob(id)),
            _ => return Err(Error::wrong(url, format!("{} has no size and checksum", file.rfilename))),
        };
        if !(name.len() >= 40 && name.bytes().all(|b| b.is_ascii_hexdigit())) {
            return Err(Error::wrong(url, format!("the checksum {name:?} is none")));
        }
        let url = format!("{}/{repository}/resolve/{}/{}", settings.hub, model.sha, encoded(&file.rfilename));
        files.push((name, Remote { url, path: file.rfilename, size, checksum: Some(checksum) }));
    }
    Ok((model.sha, files))
}

fn partial(blob: &Path) -> PathBuf {
    let mut name = blob.file_name().unwrap_or_default().to_owned();
    name.push(".incomplete");
    blob.with_file_name(name)
}

/// Puts a blob into a snapshot: a relative link where there are links, else the file itself.
fn link(blob: &Path, path: &Path, remote: &Remote) -> Result<()> {
    disk::make_parent(path)?;
    if path.exists() {
        return Ok(());
    }
    #[cfg(unix)]
    {
        // From snapshots/COMMIT/a/b up to the folder that has `blobs` as well.
        let up = "../".repeat(remote.path.matches('/').count() + 2);
        let name = blob.file_name().unwrap_or_default().to_string_lossy();
        let target = format!("{up}blobs/{name}");
        // A link that leads nowhere is in the way of a right one.
        if path.symlink_metadata().is_ok() {
            fs::remove_file(path).map_err(|e| Error::disk(path, e))?;
        }
        std::os::unix::fs::symlink(target, path).map_err(|e| Error::disk(path, e))
    }
    #[cfg(not(unix))]
    {
        let _ = remote;
        fs::copy(blob, path).map(drop).map_err(|e| Error::disk(path, e))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::address::is_path;

    proptest! {
        #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

        /// Whatever the hub answers: an error, or files that stay inside under names that are checksums.
        #[test]
        fn any_answer(answer in crate::lies::answers(include_bytes!("../tests/data/hub.json"))) {
            let settings = Settings::from_env();
            if let Ok((commit, files)) = files(&answer, "http://hub", "lerobot/pi0_base", &settings) {
                prop_assert!(commit.len() >= 7 && commit.bytes().all(|b| b.is_ascii_hexdigit()));
                for (blob, remote) in files {
                    prop_assert!(is_path(&remote.path) && blob.len() >= 40, "{:?}", remote.path);
                    prop_assert!(blob.bytes().all(|b| b.is_ascii_hexdigit()) && remote.checksum.is_some());
                }
            }
        }
    }
}
