//! Checkpoints of lerobot: `config.json` and the processor files, or what took their place up to 0.3.

mod config;
mod old;
mod processors;
mod stats;
mod writer;

use std::path::Path;

pub(crate) use config::Config;
use config::short_name;
pub(crate) use processors::Processors;
#[cfg(test)]
pub(crate) use processors::{read_after, read_before};
pub use writer::{LerobotProcessors, TINY_TOKENIZER, VectorStats, write_lerobot_processors};

use crate::assemble::Parts;
use crate::observation::{Filter, LayoutRule, Pad, Resize};
use crate::pipeline::{InputStep, OutputStep, StateLength};
use crate::policy::{Camera, ModelFacts, Policy, PolicyOptions, RobotChoice};
use crate::robot::{OPENPI_CAMERAS, Robot, aloha_units};
use crate::summary::{Family, Origin};
use crate::{Error, Result};

/// File names of the processors.
pub(crate) const PREPROCESSOR: &str = "policy_preprocessor.json";
pub(crate) const POSTPROCESSOR: &str = "policy_postprocessor.json";

pub(crate) const STATE: &str = "observation.state";
pub(crate) const ACTION: &str = "action";
const IMAGES: &str = "observation.images.";

fn unsupported(path: &Path, what: &str, advice: &str) -> Error {
    Error::Unsupported { path: path.into(), what: what.into(), advice: advice.into() }
}

pub(crate) fn load(directory: &Path, facts: ModelFacts, options: &PolicyOptions) -> Result<Policy> {
    let path = directory.join("config.json");
    let config = Config::open(&path)?;
    for (given, option) in [
        (options.config.is_some(), "--config"),
        (options.asset_id.is_some(), "--asset-id"),
        (options.delta_actions.is_some(), "--delta-actions"),
    ] {
        if given {
            let why =
                format!("only openpi checkpoints leave this open; {} is lerobot's", directory.display());
            return Err(Error::Option { option, why });
        }
    }
    let new = directory.join(PREPROCESSOR).is_file();
    let Processors { mut before, mut after, rename, tokenizer, relative_step, mut problems } = if new {
        processors::read_processors(directory, &config)?
    } else {
        old::old_processors(directory, &config)?
    };
    for step in &mut before {
        if let InputStep::Tokenize(_, limit) = step {
            *limit = (*limit).min(facts.max_tokens);
        }
    }

    let old = !new && config.resize_imgs_with_padding.is_some();
    if new && !relative_step && options.pad.is_none() {
        problems.push(
            "written by lerobot 0.4, which fills the bars of letterboxed images with -3, later versions with -1: \
             --pad center-3 if it was trained with 0.4 on images that are not square"
                .into(),
        );
    }

    let robot = match options.robot {
        RobotChoice::Preset(robot) => Some(robot),
        RobotChoice::Auto | RobotChoice::None => None,
    };
    if let Some(units) = aloha_units(options.adapt_to_pi.unwrap_or(false), robot)? {
        before.insert(0, InputStep::Aloha(units));
        after.push(OutputStep::Aloha(units));
    }
    let cols = config.action_width();
    if cols == 0 || cols > facts.action_dim {
        return Err(Error::format(
            path,
            format!("actions have {cols} values, the model has {}", facts.action_dim),
        ));
    }
    if config.n_action_steps == 0 || config.n_action_steps > facts.horizon {
        let why = format!("n_action_steps is {}, the model plans {}", config.n_action_steps, facts.horizon);
        return Err(Error::format(path, why));
    }
    let (cameras, ignored) = cameras(&path, &config, &rename, robot, &mut problems)?;
    let state = state_length(&path, &config, &before, facts)?;
    if let Some(mask) = after.iter().find_map(|step| match step {
        OutputStep::AbsoluteF32(mask) => Some(mask),
        _ => None,
    }) {
        let last = mask.iter().rposition(|&on| on).map_or(0, |i| i + 1);
        if last > state.min {
            let why = format!("action value {} is relative to a state of {} values", last - 1, state.min);
            return Err(Error::format(directory.join(PREPROCESSOR), why));
        }
    }
    Parts {
        directory,
        facts,
        robot,
        cameras,
        ignored,
        layout: LayoutRule::Guess,
        resize: Resize { filter: Filter::Torch, pad: if old { Pad::TopLeft } else { Pad::Center } },
        state,
        before,
        after,
        rows: config.n_action_steps,
        cols,
        default_prompt: None,
        tokenizer,
        origin: Origin {
            family: if new { Family::Lerobot } else { Family::LerobotOld },
            config: None,
            asset_id: None,
            reset_pose: None,
            problems,
        },
    }
    .build(options)
}

/// The checkpoint's cameras under all their names: their own, short, renamed and the robot's.
fn cameras(
    path: &Path,
    config: &Config,
    rename: &[(String, String)],
    robot: Option<Robot>,
    problems: &mut Vec<String>,
) -> Result<(Vec<Camera>, Vec<String>)> {
    let keys = config.cameras();
    if keys.is_empty() {
        return Err(Error::format(path, "input_features has no camera (type VISUAL)"));
    }
    let mut cameras: Vec<Camera> = keys
        .into_iter()
        .map(|key| {
            let mut names = vec![key.clone(), short_name(&key).to_owned()];
            let renamed = rename.iter().filter(|(_, to)| *to == key);
            names.extend(renamed.flat_map(|(from, _)| [from.clone(), short_name(from).to_owned()]));
            Camera { key, names, required: false }
        })
        .collect();
    let mut ignored = Vec::new();
    for camera in robot.map_or(&[][..], Robot::cameras) {
        let Some(slot) = camera.slot else {
            ignored.push(camera.key.to_owned());
            continue;
        };
        let plain = camera.key.rsplit('/').next().unwrap_or(camera.key);
        let fits = |name: &str| [OPENPI_CAMERAS[slot], camera.key, plain].contains(&name);
        match cameras.iter_mut().find(|other| fits(short_name(&other.key))) {
            Some(other) => {
                other.names.insert(0, camera.key.into());
                other.required = camera.required;
            }
            None => {
                ignored.push(camera.key.to_owned());
                problems.push(format!("the checkpoint has no camera for the robot's {}", camera.key));
            }
        }
    }
    Ok((cameras, ignored))
}

/// The statistics' width if there are any, else that of the feature, unless it is only padding.
fn state_length(
    path: &Path,
    config: &Config,
    before: &[InputStep],
    facts: ModelFacts,
) -> Result<StateLength> {
    let needed = before.iter().find_map(|step| match step {
        InputStep::Normalize(normalizer) => normalizer.needs_width(),
        _ => None,
    });
    let width = needed.or(config.state_width().filter(|&width| width != facts.state_dim));
    match width {
        Some(width) if width == 0 || width > facts.state_dim => Err(Error::format(
            path,
            format!("the state has {width} values, the model has {}", facts.state_dim),
        )),
        Some(width) => Ok(StateLength { min: width, max: width, source: "the checkpoint".into() }),
        None => Ok(StateLength { min: 1, max: facts.state_dim, source: "the model".into() }),
    }
}
