//! Checkpoints of openpi, converted to PyTorch: a configuration of its Python code and the statistics in `assets/`.

mod configs;
mod stats;

use std::path::Path;

pub(crate) use stats::NormStats;

use crate::assemble::Parts;
use crate::files::inside;
use crate::observation::{Filter, LayoutRule, Pad, Resize};
use crate::pipeline::{InputStep, OutputStep, StateLength};
use crate::policy::{Camera, ModelFacts, Policy, PolicyOptions, RobotChoice};
use crate::prompt::PromptFormat;
use crate::robot::{OPENPI_CAMERAS, Robot, aloha_units};
use crate::summary::{Family, Origin};
use crate::{Error, Result};

pub use configs::{CONFIGS, OpenPiConfig};
use stats::asset_ids;

pub(crate) fn load(directory: &Path, facts: ModelFacts, options: &PolicyOptions) -> Result<Policy> {
    let mut problems = Vec::new();
    let named = options.config.as_deref().map(configs::config).transpose()?;
    let asset_id = choose_asset(directory, named, options)?;
    let config = named.or_else(|| configs::config_of_asset(&asset_id));
    let robot = match options.robot {
        RobotChoice::Preset(robot) => Some(robot),
        RobotChoice::None => None,
        RobotChoice::Auto => config.map(|config| config.robot).or_else(|| configs::robot_of_asset(&asset_id)),
    };
    // Another robot than the configuration's has neither its prompt nor its actions.
    let config = config.filter(|config| robot == Some(config.robot));
    if robot.is_none() && options.robot == RobotChoice::Auto {
        problems.push(format!("no robot is known for the assets {asset_id}: name one with --robot"));
    }
    if let Some(config) = named.filter(|config| config.horizon != facts.horizon) {
        let why =
            format!("{} has {} actions a chunk, the model {}", config.name, config.horizon, facts.horizon);
        problems.push(why);
    }

    let path = directory.join("assets").join(&asset_id).join("norm_stats.json");
    let stats = NormStats::open(&path)?;
    if stats.actions.width() > facts.action_dim {
        let why = format!(
            "statistics of {} action values, the model has {}",
            stats.actions.width(),
            facts.action_dim
        );
        return Err(Error::format(path, why));
    }

    let adapt = options.adapt_to_pi.unwrap_or(robot == Some(Robot::Aloha));
    let units = aloha_units(adapt, robot)?;
    let delta = match (options.delta_actions, robot) {
        (Some(true), None) => {
            let why = "only a robot preset knows which dimensions are joints".into();
            return Err(Error::Option { option: "--delta-actions", why });
        }
        (Some(choice), robot) => robot.filter(|_| choice),
        (None, Some(robot)) if config.map_or(robot == Robot::Ur5, |config| config.delta) => Some(robot),
        (None, _) => None,
    };

    let mut before = Vec::new();
    before.extend(units.map(InputStep::Aloha));
    before.push(InputStep::Normalize(stats.state.clone()));
    if delta.is_some() {
        before.push(InputStep::ReferenceBack(stats.state.clone()));
    }
    before.push(InputStep::Tokenize(PromptFormat::OpenPi, facts.max_tokens));
    let mut after = vec![OutputStep::Unnormalize(stats.actions)];
    after.extend(delta.map(|robot| OutputStep::Absolute(robot.delta_mask())));
    let cols = robot.map_or(facts.action_dim, |robot| robot.action_width().min(facts.action_dim));
    after.push(OutputStep::Crop(cols));
    after.extend(units.map(OutputStep::Aloha));

    let (cameras, ignored) = openpi_cameras(robot);
    let widest = facts.state_dim.min(stats.state.width());
    let state = match robot {
        Some(robot) => {
            StateLength { min: robot.state_width(), max: robot.state_width(), source: robot.name().into() }
        }
        None => StateLength { min: 1, max: widest, source: "the checkpoint's normalization".into() },
    };
    if state.max > widest {
        let why = format!(
            "{} has a state of {} values, this checkpoint's {asset_id} only {widest}",
            state.source, state.max
        );
        return Err(Error::Option { option: "--robot", why });
    }
    let default = config.and_then(|config| config.default_prompt);
    Parts {
        directory,
        facts,
        robot,
        cameras,
        ignored,
        layout: if robot == Some(Robot::Aloha) { LayoutRule::ChannelsFirst } else { LayoutRule::Guess },
        resize: Resize { filter: Filter::Pillow, pad: Pad::Center },
        state,
        before,
        after,
        rows: facts.horizon,
        cols,
        default_prompt: default.map(str::to_owned),
        tokenizer: None,
        origin: Origin {
            family: Family::Openpi,
            config: config.map(|config| config.name.into()),
            asset_id: Some(asset_id),
            reset_pose: config.and_then(|config| config.reset_pose),
            problems,
        },
    }
    .build(options)
}

/// The assets that were asked for, else those of the configuration or the robot, else the only ones.
fn choose_asset(directory: &Path, named: Option<OpenPiConfig>, options: &PolicyOptions) -> Result<String> {
    let assets = directory.join("assets");
    let mut ids = asset_ids(&assets)?;
    if let Some(id) = &options.asset_id {
        inside(&assets, id, &assets)?;
        return if ids.contains(id) { Ok(id.clone()) } else { Err(no_asset(id, &ids)) };
    }
    if let Some(config) = named.filter(|config| ids.iter().any(|id| id == config.asset_id)) {
        return Ok(config.asset_id.into());
    }
    if ids.len() == 1 {
        return Ok(ids.remove(0));
    }
    if let Some(config) = named {
        return Err(no_asset(config.asset_id, &ids));
    }
    if let RobotChoice::Preset(robot) = options.robot {
        let id = configs::assets_of_robot(robot).iter().find(|id| ids.iter().any(|other| other == *id));
        if let Some(id) = id {
            return Ok((*id).into());
        }
    }
    if ids.is_empty() {
        return Err(Error::format(assets, "no folder in it has a norm_stats.json"));
    }
    let why = format!("choose the statistics of one robot: {}", ids.join(", "));
    Err(Error::Option { option: "--asset-id", why })
}

fn no_asset(id: &str, ids: &[String]) -> Error {
    let have = if ids.is_empty() { "no statistics".into() } else { ids.join(", ") };
    Error::Option {
        option: "--asset-id",
        why: format!("no assets/{id}/norm_stats.json; the checkpoint has {have}"),
    }
}

/// openpi's three cameras under the robot's names, or their own; and those it ignores.
fn openpi_cameras(robot: Option<Robot>) -> (Vec<Camera>, Vec<String>) {
    let theirs = robot.map_or(&[][..], Robot::cameras);
    let camera = |(slot, key): (usize, &&str)| {
        let camera = theirs.iter().find(|camera| camera.slot == Some(slot));
        let name = camera.map(|camera| camera.key).or(robot.is_none().then_some(*key));
        Camera {
            key: (*key).into(),
            names: name.into_iter().map(str::to_owned).collect(),
            required: camera.is_some_and(|camera| camera.required),
        }
    };
    let ignored =
        theirs.iter().filter(|camera| camera.slot.is_none()).map(|camera| camera.key.into()).collect();
    (OPENPI_CAMERAS.iter().enumerate().map(camera).collect(), ignored)
}
