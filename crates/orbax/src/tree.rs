//! The tree of arrays that an Orbax checkpoint is.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use serde::Deserialize;

use crate::file::read_small;
use crate::ocdbt::MANIFEST;
use crate::store::Store;
use crate::{Array, Error, Result};

const METADATA: &str = "_METADATA";
/// Largest `_METADATA`: real ones have tens of kilobytes.
const MAX_METADATA: u64 = 64 << 20;
/// What a checkpoint may decode to, compared with what is stored: weights hardly compress.
const MAX_RATIO: u64 = 100;
const MAX_FREE: u64 = 256 << 20;

/// The arrays of a `params` directory, by their paths in the program that wrote it.
#[derive(Debug, Clone)]
pub struct Tree {
    /// The directory with the arrays.
    pub path: PathBuf,
    /// Paths without the leading `params` and a closing `value`, parts joined by `/`.
    pub arrays: BTreeMap<String, Arc<Array>>,
}

#[derive(Deserialize)]
struct Metadata {
    tree_metadata: BTreeMap<String, Entry>,
}

#[derive(Deserialize)]
struct Entry {
    key_metadata: Vec<Key>,
    #[serde(default)]
    value_metadata: ValueMetadata,
}

#[derive(Deserialize)]
struct Key {
    key: serde_json::Value,
}

#[derive(Deserialize, Default)]
struct ValueMetadata {
    #[serde(default)]
    skip_deserialize: bool,
}

/// Whether `directory` looks like what Orbax writes for one tree.
pub fn is_params(directory: &Path) -> bool {
    let here = |dir: &Path| dir.join(METADATA).is_file() || dir.join(MANIFEST).is_file();
    here(directory) || ["state", "pytree"].iter().any(|below| here(&directory.join(below))) || {
        let mut entries = directory.read_dir().into_iter().flatten().flatten().take(10_000);
        entries.any(|e| {
            let name = e.file_name().to_string_lossy().into_owned();
            (name.starts_with("ocdbt.process_") && e.path().join(MANIFEST).is_file())
                || (name.starts_with("params.")
                    && [".zarray", "zarr.json"].iter().any(|leaf| e.path().join(leaf).is_file()))
        })
    }
}

impl Tree {
    /// Opens a `params` directory: the names, sizes and formats of its arrays.
    pub fn open(params: &Path) -> Result<Self> {
        if !params.is_dir() {
            let what = "is no directory".to_owned();
            return Err(Error::NotOrbax { path: params.into(), what });
        }
        // Orbax' newer interface puts the tree one level down.
        let here = |dir: &PathBuf| dir.join(METADATA).is_file() || dir.join(MANIFEST).is_file();
        let below = ["state", "pytree"].map(|name| params.join(name));
        let path = match below.into_iter().find(here) {
            Some(below) if !here(&params.to_owned()) => below,
            _ => params.to_owned(),
        };
        let store = Arc::new(Store::open(&path)?);
        let file = path.join(METADATA);
        if file.is_file() && store.is_empty()? {
            let what = "belongs to a JAX checkpoint (Orbax) whose arrays are not there: beside _METADATA lies neither \
                        manifest.ocdbt with its data nor a folder for each array; fetch the whole checkpoint again (for \
                        openpi's own: pi0 pull gs://openpi-assets/checkpoints/NAME)"
                .to_owned();
            return Err(Error::NotOrbax { path, what });
        }
        let mut leaves = if file.is_file() { named(&file)? } else { keyed(&store)? };
        leaves.retain(|(_, parts)| parts.first().is_some_and(|p| p == "params") && parts.len() > 1);
        if leaves.is_empty() {
            let what = "holds no tree of arrays under `params`; wanted what Orbax writes: _METADATA and \
                        manifest.ocdbt, or a directory for each array"
                .to_owned();
            return Err(Error::NotOrbax { path, what });
        }
        // An attention layer is called `value` as well: only where all paths end so is it a wrapper of arrays.
        let wrapped =
            leaves.iter().all(|(_, parts)| parts.len() > 2 && parts.last().is_some_and(|p| p == "value"));
        let mut arrays = BTreeMap::new();
        for (name, mut parts) in leaves {
            if wrapped {
                parts.pop();
            }
            let array = Arc::new(Array::open(&store, &name)?);
            if arrays.insert(parts[1..].join("/"), array).is_some() {
                return Err(Error::damaged(&file, format!("{name} is there twice")));
            }
        }
        check_size(&path, &store, &arrays)?;
        Ok(Self { path, arrays })
    }
}

/// Refuses what could not have been written: files that would decode to far more than weights do.
fn check_size(path: &Path, store: &Store, arrays: &BTreeMap<String, Arc<Array>>) -> Result<()> {
    let decoded = arrays.values().fold(0u64, |n, a| n.saturating_add(a.bytes()));
    if decoded <= MAX_FREE {
        return Ok(());
    }
    let stored = store.bytes()?;
    if decoded / MAX_RATIO > stored {
        let what = format!(
            "its arrays would have {decoded} bytes and {stored} are stored; \
             if a download was cut short, fetch it again"
        );
        return Err(Error::damaged(path, what));
    }
    Ok(())
}

/// Stored names and paths as `_METADATA` has them.
fn named(file: &Path) -> Result<Vec<(String, Vec<String>)>> {
    let json = read_small(file, MAX_METADATA)?;
    let metadata: Metadata = serde_json::from_slice(&json).map_err(|e| {
        let what = format!(
            "it is no description of a tree by Orbax: {e}; if a download was cut short, fetch it again"
        );
        Error::damaged(file, what)
    })?;
    let mut leaves = Vec::with_capacity(metadata.tree_metadata.len());
    for entry in metadata.tree_metadata.into_values() {
        if entry.value_metadata.skip_deserialize {
            continue;
        }
        let part = |key: Key| match key.key {
            serde_json::Value::String(s) => s,
            other => other.to_string(),
        };
        let parts: Vec<String> = entry.key_metadata.into_iter().map(part).collect();
        leaves.push((parts.join("."), parts));
    }
    Ok(leaves)
}

/// The same from the store's keys.
fn keyed(store: &Store) -> Result<Vec<(String, Vec<String>)>> {
    let split = |name: String| {
        let parts = name.split('.').map(str::to_owned).collect();
        (name, parts)
    };
    Ok(store.arrays()?.into_iter().map(split).collect())
}
