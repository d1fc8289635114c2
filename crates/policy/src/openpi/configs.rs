//! openpi's training configurations: what its Python code knows and a checkpoint's files do not say.

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
