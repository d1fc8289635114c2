//! Checkpoints of openpi, converted to PyTorch: what its Python code knows and the files do not say.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use serde::Deserialize;

use crate::files::{parse_json, read_small};
use crate::normalize::{Formula, Normalizer, OPENPI_EPS, Stats};
use crate::robot::Robot;
use crate::{Error, Result};

/// A training configuration of openpi's that has a published checkpoint.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OpenPiConfig {
    /// Its name upstream.
    pub name: &'static str,
    /// Whose transforms it uses.
    pub robot: Robot,
    /// Actions in a chunk.
    pub horizon: usize,
    /// Folder below `assets/`.
    pub asset_id: &'static str,
    /// Whether joint actions are relative to the state.
    pub delta: bool,
    /// What to do when the observation does not say.
    pub default_prompt: Option<&'static str>,
    /// Where the runtime moves each arm before an episode, told to clients as metadata.
    pub reset_pose: Option<[f64; 6]>,
    /// A π0.5 model.
    pub pi05: bool,
}

const TROSSEN: OpenPiConfig = OpenPiConfig {
    name: "pi0_aloha",
    robot: Robot::Aloha,
    horizon: 50,
    asset_id: "trossen",
    delta: true,
    default_prompt: None,
    reset_pose: Some([0.0, -1.5, 1.5, 0.0, 0.0, 0.0]),
    pi05: false,
};
const DROID: OpenPiConfig = OpenPiConfig {
    name: "pi0_droid",
    robot: Robot::Droid,
    horizon: 10,
    asset_id: "droid",
    delta: false,
    default_prompt: None,
    reset_pose: None,
    pi05: false,
};
const LIBERO: OpenPiConfig = OpenPiConfig {
    name: "pi0_libero",
    robot: Robot::Libero,
    horizon: 50,
    asset_id: "physical-intelligence/libero",
    delta: true,
    ..DROID
};
const PEN: OpenPiConfig = OpenPiConfig { default_prompt: Some("uncap the pen"), reset_pose: None, ..TROSSEN };
const TUPPERWARE: &str = "open the tupperware and put the food on the plate";

/// openpi's inference configurations, the plainest of each asset first.
pub const CONFIGS: [OpenPiConfig; 13] = [
    TROSSEN,
    OpenPiConfig { name: "pi05_aloha", pi05: true, ..TROSSEN },
    OpenPiConfig { name: "pi0_aloha_towel", default_prompt: Some("fold the towel"), ..TROSSEN },
    OpenPiConfig { name: "pi0_aloha_tupperware", default_prompt: Some(TUPPERWARE), ..TROSSEN },
    OpenPiConfig { name: "pi0_aloha_pen_uncap", ..PEN },
    OpenPiConfig { name: "pi05_aloha_pen_uncap", pi05: true, ..PEN },
    OpenPiConfig {
        name: "pi0_aloha_sim",
        asset_id: "lerobot/aloha_sim_transfer_cube_human",
        delta: false,
        default_prompt: Some("Transfer cube"),
        reset_pose: None,
        ..TROSSEN
    },
    DROID,
    OpenPiConfig { name: "pi05_droid", horizon: 15, pi05: true, ..DROID },
    OpenPiConfig { name: "pi05_droid_finetune", horizon: 16, pi05: true, ..DROID },
    OpenPiConfig { name: "pi05_full_droid_finetune", horizon: 16, delta: true, pi05: true, ..DROID },
    LIBERO,
    OpenPiConfig { name: "pi05_libero", horizon: 10, delta: false, pi05: true, ..LIBERO },
];

/// The configuration of that name.
pub(crate) fn config(name: &str) -> Result<OpenPiConfig> {
    let Some(found) = CONFIGS.iter().find(|config| config.name == name) else {
        let known: Vec<_> = CONFIGS.iter().filter(|config| !config.pi05).map(|config| config.name).collect();
        let why = format!("openpi has no configuration {name:?}; known are {}", known.join(", "));
        return Err(Error::Option { option: "--config", why });
    };
    if found.pi05 {
        let why = format!("{name} is a π0.5 configuration; only π0 is implemented");
        return Err(Error::Option { option: "--config", why });
    }
    Ok(*found)
}

/// The plainest π0 configuration that uses these assets.
pub(crate) fn config_of_asset(asset_id: &str) -> Option<OpenPiConfig> {
    CONFIGS.iter().find(|config| config.asset_id == asset_id && !config.pi05).copied()
}

/// The robot whose data these assets describe, from the ids of openpi's base model.
pub(crate) fn robot_of_asset(asset_id: &str) -> Option<Robot> {
    match asset_id {
        "trossen" | "trossen_mobile" => Some(Robot::Aloha),
        "ur5e" => Some(Robot::Ur5),
        other => config_of_asset(other).map(|config| config.robot),
    }
}

/// Asset ids that go with a robot, the likeliest first.
pub(crate) fn assets_of_robot(robot: Robot) -> &'static [&'static str] {
    match robot {
        Robot::Aloha => &["trossen", "lerobot/aloha_sim_transfer_cube_human"],
        Robot::Droid => &["droid"],
        Robot::Libero => &["physical-intelligence/libero"],
        Robot::Ur5 => &["ur5e"],
    }
}

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
