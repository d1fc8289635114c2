//! `assets/ID/norm_stats.json`: which of them are this robot's.

use std::path::{Path, PathBuf};

use super::configs::{OTHER_ASSETS, OpenPiConfig, assets_of_robot, robot_of_asset};
use crate::files::inside;
use crate::options::{PolicyOptions, RobotChoice};
use crate::statistics::Statistics;
use crate::{Error, Result};

const FILE: &str = "norm_stats.json";

/// Statistics, or why there are none.
pub(super) struct Found {
    pub statistics: Option<Statistics>,
    /// Folder below `assets/`.
    pub asset_id: Option<String>,
    pub missing: String,
}

impl Found {
    /// For messages: whose statistics these are.
    pub fn name(&self) -> String {
        match (&self.asset_id, &self.statistics) {
            (Some(id), _) => format!("the assets {id}"),
            (None, Some(statistics)) => format!("the statistics in {}", statistics.path.display()),
            (None, None) => "a checkpoint without statistics".into(),
        }
    }
}

/// The statistics that the caller names, else those in a folder of `assets/`, else a `norm_stats.json` that lies in
/// `assets/` itself or beside the weights.
pub(super) fn find(directory: &Path, named: Option<OpenPiConfig>, options: &PolicyOptions) -> Result<Found> {
    let some = |path: &Path, asset_id| {
        let statistics = Statistics::open(path)?;
        Ok(Found { statistics: Some(statistics), asset_id, missing: String::new() })
    };
    if let Some(path) = &options.stats {
        if options.asset_id.is_some() {
            let why = "--stats names the statistics already".into();
            return Err(Error::Option { option: "--asset-id", why });
        }
        return some(path, None);
    }
    let (assets, beside) = (directory.join("assets"), directory.join(FILE));
    if assets.join(FILE).is_file() && options.asset_id.is_none() && asset_ids(&assets)?.is_empty() {
        return some(&assets.join(FILE), None);
    }
    if assets.is_dir() {
        let id = choose(&assets, named, options)?;
        return some(&assets.join(&id).join(FILE), Some(id));
    }
    if let Some(id) = &options.asset_id {
        return Err(none_of(id, &[]));
    }
    if beside.is_file() {
        return some(&beside, None);
    }
    let missing = format!(
        "{} has no folder `assets`: openpi's converter to PyTorch leaves it behind; copy it from the JAX checkpoint",
        directory.display()
    );
    Ok(Found { statistics: None, asset_id: None, missing })
}

/// The assets that were asked for, else those of the configuration or the robot, else the only ones, unless they are
/// another robot's.
fn choose(assets: &Path, named: Option<OpenPiConfig>, options: &PolicyOptions) -> Result<String> {
    let mut ids = asset_ids(assets)?;
    let has = |id: &str| ids.iter().any(|other| other == id);
    if let Some(id) = &options.asset_id {
        inside(assets, id, assets)?;
        return if has(id) { Ok(id.clone()) } else { Err(none_of(id, &ids)) };
    }
    if let Some(config) = named.filter(|config| has(config.asset_id)) {
        return Ok(config.asset_id.into());
    }
    if let (None, RobotChoice::Preset(robot)) = (named, options.robot)
        && let Some(id) = assets_of_robot(robot).iter().find(|id| has(id))
    {
        return Ok((*id).into());
    }
    match ids.as_slice() {
        [] => Err(Error::format(assets, format!("no folder in it has a {FILE}"))),
        [id] => {
            let known = robot_of_asset(id).is_some() || OTHER_ASSETS.contains(&id.as_str());
            match (named, options.robot) {
                // Those of another configuration, maybe of another robot.
                (Some(config), _) if known => Err(none_of(config.asset_id, &ids)),
                (None, RobotChoice::Preset(robot)) if known && robot_of_asset(id) != Some(robot) => {
                    Err(none_of(assets_of_robot(robot)[0], &ids))
                }
                _ => Ok(ids.remove(0)),
            }
        }
        _ => match named {
            Some(config) => Err(none_of(config.asset_id, &ids)),
            None => {
                let why = format!("choose the statistics of one robot: {}", ids.join(", "));
                Err(Error::Option { option: "--asset-id", why })
            }
        },
    }
}

fn none_of(id: &str, ids: &[String]) -> Error {
    let have = if ids.is_empty() { "no statistics".into() } else { ids.join(", ") };
    let why = format!(
        "no assets/{id}/{FILE}; the checkpoint has {have}: name one with --asset-id, or a file with --stats"
    );
    Error::Option { option: "--asset-id", why }
}

/// Asset ids below `assets/`: the folders, maybe nested, that hold a `norm_stats.json`. Sorted.
fn asset_ids(assets: &Path) -> Result<Vec<String>> {
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
            if name == FILE && !id.is_empty() {
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
