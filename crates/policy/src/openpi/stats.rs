//! `assets/ID/norm_stats.json`: openpi's statistics.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::files::{parse_json, read_small};
use crate::pipeline::{Formula, Normalizer, OPENPI_EPS, Stats};
use crate::{Error, Result};

/// Normalizations of one asset.
#[derive(Debug, Clone)]
pub(crate) struct NormStats {
    pub state: Normalizer,
    pub actions: Normalizer,
}

#[derive(Deserialize)]
struct NormStatsFile {
    norm_stats: BTreeMap<String, NormStatsEntry>,
}

#[derive(Deserialize)]
struct NormStatsEntry {
    mean: Vec<f64>,
    std: Vec<f64>,
}

impl NormStats {
    pub fn open(path: &Path) -> Result<Self> {
        Self::parse(path, &read_small(path)?)
    }

    /// Reads a `norm_stats.json` for π0, which uses z-scores; `path` is for errors.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        let mut file: NormStatsFile = parse_json(path, bytes)?;
        let mut take = |key: &str| {
            let entry = file.norm_stats.remove(key);
            let entry = entry.ok_or_else(|| Error::format(path, format!("norm_stats has no `{key}`")))?;
            let stats = Stats { a: entry.mean, b: entry.std };
            stats
                .check(["mean", "std"])
                .map_err(|why| Error::format(path, format!("norm_stats.{key}: {why}")))?;
            Ok(Normalizer { formula: Formula::OpenPiZScore, stats, eps: OPENPI_EPS })
        };
        Ok(Self { state: take("state")?, actions: take("actions")? })
    }
}

/// Asset ids below `assets/`: the folders, maybe nested, that hold a `norm_stats.json`. Sorted.
pub(crate) fn asset_ids(assets: &Path) -> Result<Vec<String>> {
    const DEPTH: usize = 4;
    const LIMIT: usize = 4096;
    let mut ids = Vec::new();
    let mut visit: Vec<(PathBuf, String, usize)> = vec![(assets.to_owned(), String::new(), 0)];
    let mut seen = 0;
    while let Some((folder, id, depth)) = visit.pop() {
        let read = |source| Error::Read { path: folder.clone(), source };
        for entry in folder.read_dir().map_err(read)? {
            let entry = entry.map_err(read)?;
            seen += 1;
            if seen > LIMIT {
                return Err(Error::format(assets, format!("more than {LIMIT} entries")));
            }
            let (path, Ok(name)) = (entry.path(), entry.file_name().into_string()) else { continue };
            if name == "norm_stats.json" && !id.is_empty() {
                ids.push(id.clone());
            } else if depth < DEPTH && path.is_dir() {
                let id = if id.is_empty() { name } else { format!("{id}/{name}") };
                visit.push((path, id, depth + 1));
            }
        }
    }
    ids.sort();
    Ok(ids)
}
