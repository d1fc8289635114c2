//! openpi's training configurations: what its Python code knows and a checkpoint's files do not say.
//!
//! Read in `src/openpi/training/config.py` and `training/misc/{roboarena,polaris}_config.py` of openpi.

use pi0_model::Kind;

use crate::robot::Robot;
use crate::{Error, Result};

/// A training configuration of openpi's.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OpenPiConfig {
    /// Its name upstream.
    pub name: &'static str,
    /// Whose transforms it uses.
    pub robot: Robot,
    /// Actions in a chunk.
    pub horizon: usize,
    /// Width of the network's actions and state.
    pub action_dim: usize,
    /// Longest prompt in tokens.
    pub max_tokens: usize,
    /// Folder below `assets/`.
    pub asset_id: &'static str,
    /// Whether joint actions are relative to the state.
    pub delta: bool,
    /// Whether ALOHA's joints and grippers are converted to π0's units.
    pub adapt_to_pi: bool,
    /// What to do when the observation does not say.
    pub default_prompt: Option<&'static str>,
    /// Where the runtime moves each arm before an episode, told to clients as metadata.
    pub reset_pose: Option<[f64; 6]>,
    /// Which network.
    pub kind: Kind,
    /// Of π0.5 and π0-FAST: whether the prompt holds the state (`discrete_state_input`).
    pub state_in_prompt: bool,
    /// π0-FAST: on the hub, the codec that it was trained with, where that is not the usual one.
    pub codec: Option<&'static str>,
}

const TROSSEN: OpenPiConfig = OpenPiConfig {
    name: "pi0_aloha",
    robot: Robot::Aloha,
    horizon: 50,
    action_dim: 32,
    max_tokens: 48,
    asset_id: "trossen",
    delta: true,
    adapt_to_pi: true,
    default_prompt: None,
    reset_pose: Some([0.0, -1.5, 1.5, 0.0, 0.0, 0.0]),
    kind: Kind::Pi0,
    state_in_prompt: false,
    codec: None,
};
const PEN: OpenPiConfig = OpenPiConfig { default_prompt: Some("uncap the pen"), reset_pose: None, ..TROSSEN };
const TUPPERWARE: &str = "open the tupperware and put the food on the plate";
const DROID: OpenPiConfig = OpenPiConfig {
    name: "pi0_droid",
    robot: Robot::Droid,
    horizon: 10,
    asset_id: "droid",
    delta: false,
    adapt_to_pi: false,
    reset_pose: None,
    ..TROSSEN
};
/// Joint positions rather than velocities: relative to the state in the network.
const DROID_POSITION: OpenPiConfig = OpenPiConfig { delta: true, ..DROID };
const LIBERO: OpenPiConfig = OpenPiConfig {
    name: "pi0_libero",
    robot: Robot::Libero,
    horizon: 50,
    asset_id: "physical-intelligence/libero",
    delta: true,
    ..DROID
};

/// The same with a π0.5 network, which reads 200 tokens and the state in the prompt.
const fn pi05(config: OpenPiConfig) -> OpenPiConfig {
    OpenPiConfig { kind: Kind::Pi05, max_tokens: 200, state_in_prompt: true, ..config }
}

/// The same with a π0-FAST network, which writes this robot's own actions, ten a chunk.
const fn fast(config: OpenPiConfig, action_dim: usize, max_tokens: usize) -> OpenPiConfig {
    OpenPiConfig { kind: Kind::Pi0Fast, horizon: 10, action_dim, max_tokens, state_in_prompt: true, ..config }
}

/// openpi's configurations, the plainest of each asset first.
pub const CONFIGS: [OpenPiConfig; 27] = [
    TROSSEN,
    OpenPiConfig { name: "pi05_aloha", ..pi05(TROSSEN) },
    OpenPiConfig { name: "pi0_aloha_towel", default_prompt: Some("fold the towel"), ..TROSSEN },
    OpenPiConfig { name: "pi0_aloha_tupperware", default_prompt: Some(TUPPERWARE), ..TROSSEN },
    OpenPiConfig { name: "pi0_aloha_pen_uncap", ..PEN },
    OpenPiConfig { name: "pi05_aloha_pen_uncap", ..pi05(PEN) },
    OpenPiConfig {
        name: "pi0_aloha_sim",
        asset_id: "lerobot/aloha_sim_transfer_cube_human",
        delta: false,
        default_prompt: Some("Transfer cube"),
        reset_pose: None,
        ..TROSSEN
    },
    DROID,
    OpenPiConfig { name: "pi05_droid", horizon: 15, ..pi05(DROID) },
    OpenPiConfig { name: "pi05_droid_finetune", horizon: 16, ..pi05(DROID) },
    OpenPiConfig { name: "pi05_full_droid_finetune", horizon: 16, ..pi05(DROID_POSITION) },
    OpenPiConfig { name: "paligemma_diffusion_droid", action_dim: 8, ..DROID },
    OpenPiConfig { name: "pi05_droid_jointpos", horizon: 15, ..pi05(DROID_POSITION) },
    OpenPiConfig { name: "pi05_droid_jointpos_polaris", horizon: 15, ..pi05(DROID_POSITION) },
    OpenPiConfig { name: "pi0_droid_jointpos_polaris", max_tokens: 100, ..DROID_POSITION },
    OpenPiConfig { name: "pi0_droid_jointpos_100k_polaris", max_tokens: 100, ..DROID_POSITION },
    LIBERO,
    OpenPiConfig { name: "pi0_libero_low_mem_finetune", ..LIBERO },
    OpenPiConfig { name: "pi05_libero", horizon: 10, delta: false, state_in_prompt: false, ..pi05(LIBERO) },
    OpenPiConfig { name: "pi0_fast_droid", ..fast(DROID, 8, 250) },
    OpenPiConfig { name: "pi0_fast_full_droid_finetune", horizon: 16, ..fast(DROID_POSITION, 8, 180) },
    OpenPiConfig { name: "pi0_fast_droid_jointpos_polaris", ..fast(DROID_POSITION, 8, 180) },
    OpenPiConfig { name: "paligemma_fast_droid", horizon: 15, ..fast(DROID, 8, 250) },
    OpenPiConfig {
        name: "paligemma_fast_specialist_droid",
        horizon: 15,
        codec: Some("KarlP/fast_droid_specialist"),
        ..fast(DROID, 8, 250)
    },
    OpenPiConfig { name: "pi0_fast_libero", ..fast(LIBERO, 7, 180) },
    OpenPiConfig { name: "pi0_fast_libero_low_mem_finetune", ..fast(LIBERO, 7, 180) },
    // Not in the configurations but in openpi's documentation (docs/norm_stats.md, examples/ur5).
    OpenPiConfig { name: "pi0_ur5", robot: Robot::Ur5, asset_id: "ur5e", ..LIBERO },
];

/// Those of the published DROID checkpoints. Files of the less usual ones, which move the arm to positions, look the same.
const PUBLISHED: [&str; 2] = ["pi0_droid", "pi05_droid"];

/// Configurations of openpi that write their actions in other ways than with FAST, and what each has instead.
const OTHER_CODECS: [(&str, &str); 3] = [
    ("paligemma_binning_droid", BINS),
    ("paligemma_binning_droid_jointpos", BINS),
    (
        "paligemma_vq_droid",
        "codes of a second neural network (FSQ), which openpi keeps apart from the weights",
    ),
];
const BINS: &str = "one of 256 bins for each value, as RT-2 and OpenVLA do";
/// Those on made-up data.
const DEBUG: [&str; 3] = ["debug", "debug_restore", "debug_pi05"];

impl OpenPiConfig {
    /// The configuration of that name.
    ///
    /// # Errors
    /// openpi has no such configuration, or it is one of another kind of network.
    pub fn named(name: &str) -> Result<Self> {
        if let Some(found) = CONFIGS.iter().find(|config| config.name == name) {
            return Ok(*found);
        }
        let why = if let Some((_, codec)) = OTHER_CODECS.iter().find(|(other, _)| *other == name) {
            format!("{name} writes its actions as {codec}; this program reads those of FAST alone")
        } else if DEBUG.contains(&name) {
            format!("{name} is trained on made-up data and drives no robot")
        } else {
            format!("openpi has no configuration {name:?}; known are {}", names(CONFIGS.iter()))
        };
        Err(Error::Option { option: "--config", why })
    }

    /// Whether both treat observations and actions alike, whatever their prompts and sizes.
    fn agrees(&self, other: &Self) -> bool {
        let meaning = |c: &Self| (c.robot, c.delta, c.adapt_to_pi, c.state_in_prompt);
        meaning(self) == meaning(other)
    }
}

/// `a, b, c`.
fn names<'a>(configs: impl Iterator<Item = &'a OpenPiConfig>) -> String {
    configs.map(|config| config.name).collect::<Vec<_>>().join(", ")
}

/// What the configurations of some assets say together.
pub(super) enum Verdict {
    /// The plainest of those that fit. They all mean the same, or a word says which ones do not.
    One(OpenPiConfig, Option<String>),
    /// They differ; their names, with what each makes of actions.
    Several(String),
    /// openpi has none.
    Unknown,
}

/// The configurations that may have made a checkpoint with these assets, this kind of network and this horizon. Where none
/// has the horizon, it tells nothing.
pub(super) fn of_asset(asset_id: &str, kind: Kind, horizon: Option<usize>) -> Verdict {
    let same = |config: &&OpenPiConfig| config.asset_id == asset_id && config.kind == kind;
    let mut found: Vec<_> = CONFIGS.iter().filter(same).collect();
    let exact = found.iter().any(|config| Some(config.horizon) == horizon);
    if exact {
        found.retain(|config| Some(config.horizon) == horizon);
    }
    let [first, rest @ ..] = found.as_slice() else { return Verdict::Unknown };
    let others: Vec<_> = rest.iter().filter(|config| !config.agrees(first)).copied().collect();
    let actions = |delta| if delta { "relative to the state" } else { "as they are" };
    let describe = |config: &&OpenPiConfig| format!("{} (actions {})", config.name, actions(config.delta));
    if others.is_empty() {
        Verdict::One(**first, None)
    } else if exact && PUBLISHED.contains(&first.name) {
        let note = format!(
            "taken for {}: its actions are used {}; --config says so if it is {}, whose are {}",
            first.name,
            actions(first.delta),
            names(others.iter().copied()).replace(", ", " or "),
            actions(!first.delta)
        );
        Verdict::One(**first, Some(note))
    } else {
        Verdict::Several(found.iter().map(describe).collect::<Vec<_>>().join(", "))
    }
}

/// The robot whose data these assets describe, from the ids of openpi's base models and configurations.
pub(super) fn robot_of_asset(asset_id: &str) -> Option<Robot> {
    match asset_id {
        "trossen_mobile" => Some(Robot::Aloha),
        other => CONFIGS.iter().find(|config| config.asset_id == other).map(|config| config.robot),
    }
}

/// Asset ids of openpi's base models that stand for robots of which there is no preset.
pub(super) const OTHER_ASSETS: [&str; 6] =
    ["franka", "ur5e_dual", "arx", "arx_mobile", "fibocom_mobile", "trossen_mobile"];

/// Asset ids that go with a robot, the likeliest first.
pub(super) fn assets_of_robot(robot: Robot) -> &'static [&'static str] {
    match robot {
        Robot::Aloha => &["trossen", "lerobot/aloha_sim_transfer_cube_human"],
        Robot::Droid => &["droid"],
        Robot::Libero => &["physical-intelligence/libero"],
        Robot::Ur5 => &["ur5e"],
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_unique_and_found() {
        for (i, config) in CONFIGS.iter().enumerate() {
            assert_eq!(OpenPiConfig::named(config.name).unwrap(), *config);
            assert!(CONFIGS[..i].iter().all(|other| other.name != config.name), "{}", config.name);
            assert_eq!(config.max_tokens == 200, config.kind == Kind::Pi05, "{}", config.name);
        }
        let refuse = |name: &str| OpenPiConfig::named(name).unwrap_err().to_string();
        assert!(refuse("paligemma_vq_droid").contains("a second neural network (FSQ)"));
        assert!(refuse("paligemma_binning_droid_jointpos").contains("one of 256 bins"));
        assert!(refuse("debug_pi05").contains("made-up data"));
        assert!(refuse("pi0_nothing").contains("known are pi0_aloha, pi05_aloha, "));
    }

    #[test]
    fn assets_tell_what_their_configurations_agree_on() {
        let verdict = |asset, kind, horizon| match of_asset(asset, kind, Some(horizon)) {
            Verdict::One(config, note) => config.name.to_owned() + &note.unwrap_or_default(),
            Verdict::Several(names) => names,
            Verdict::Unknown => "?".into(),
        };
        assert_eq!(verdict("trossen", Kind::Pi0, 50), "pi0_aloha");
        assert_eq!(verdict("trossen", Kind::Pi05, 7), "pi05_aloha");
        assert_eq!(verdict("physical-intelligence/libero", Kind::Pi0, 50), "pi0_libero");
        assert_eq!(verdict("physical-intelligence/libero", Kind::Pi05, 10), "pi05_libero");
        assert_eq!(verdict("me/mine", Kind::Pi05, 10), "?");
        // The same files may be of velocities or of positions.
        assert!(
            verdict("droid", Kind::Pi05, 15)
                .starts_with("pi05_droidtaken for pi05_droid: its actions are used as")
        );
        assert!(
            verdict("droid", Kind::Pi05, 15)
                .contains("pi05_droid_jointpos or pi05_droid_jointpos_polaris, whose")
        );
        assert!(verdict("droid", Kind::Pi0, 10).starts_with("pi0_droidtaken for pi0_droid"));
        assert!(verdict("droid", Kind::Pi0, 11).contains("pi0_droid_jointpos_polaris (actions relative"));
        // π0-FAST's files say no horizon.
        let fast = |asset| match of_asset(asset, Kind::Pi0Fast, None) {
            Verdict::One(config, _) => config.name.to_owned(),
            Verdict::Several(names) => names,
            Verdict::Unknown => "?".into(),
        };
        assert_eq!(fast("physical-intelligence/libero"), "pi0_fast_libero");
        assert!(fast("droid").contains("pi0_fast_droid (actions as they are), pi0_fast_full_droid_finetune"));
        assert!(verdict("droid", Kind::Pi05, 16).contains("pi05_full_droid_finetune (actions relative"));
    }
}
