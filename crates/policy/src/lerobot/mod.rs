//! Checkpoints of lerobot: `config.json` and the processor files, or what took their place up to 0.3.

mod config;
mod normalization;
mod old;
mod processors;
mod writer;

use std::path::Path;

pub(crate) use config::Config;
#[cfg(test)]
pub(crate) use processors::Reader;
pub use writer::{
    LerobotProcessors, TINY_CODEC, TINY_TOKENIZER, VectorStats, tiny_fast_tokenizer, write_lerobot_processors,
};

use crate::assemble::{Answers, Parts};
use crate::fast::ReplyForm;
use crate::observation::{Filter, LayoutRule, Pad, Resize};
use crate::options::{LerobotVersion, PolicyOptions, RobotChoice};
use crate::pipeline::{InputStep, OutputStep, StateLength};
use crate::policy::{Camera, ModelFacts, Policy};
use crate::robot::{OPENPI_CAMERAS, Robot, aloha_units};
use crate::statistics::{ACTION, STATE};
use crate::summary::{Family, Origin};
use crate::{Error, Result};

/// File names of the processors.
const PREPROCESSOR: &str = "policy_preprocessor.json";
const POSTPROCESSOR: &str = "policy_postprocessor.json";

const IMAGES: &str = "observation.images.";

fn unsupported(path: &Path, what: &str, advice: &str) -> Error {
    Error::Unsupported { path: path.into(), what: what.into(), advice: advice.into() }
}

/// Short names under which a feature's image may come: without `observation.images.`, `observation.image.` or
/// `observation.`.
fn short_name(key: &str) -> &str {
    let prefixes = [IMAGES, "observation.image.", "observation."];
    prefixes.iter().find_map(|prefix| key.strip_prefix(prefix)).unwrap_or(key)
}

pub(crate) fn load(directory: &Path, facts: ModelFacts, options: &PolicyOptions) -> Result<Policy> {
    let path = directory.join("config.json");
    let config = Config::open(&path)?;
    options.only_for_openpi(directory)?;
    if config.kind != facts.kind.name() {
        let why =
            format!("says type {:?}, but the weights are those of a {} network", config.kind, facts.kind);
        return Err(Error::format(path, why));
    }
    let files = processors::find(directory);
    let mut reader = processors::Reader::new(&config, options)?;
    match &files {
        Some(files) => reader.files(files)?,
        None => reader.old(directory)?,
    }
    let processors::Processors {
        mut before,
        mut after,
        rename,
        tokenizer,
        codec,
        relative_step,
        visual,
        statistics,
        mut gaps,
        mut problems,
    } = reader.done()?;
    let path_of_statistics = statistics[0].as_ref().map(|statistics| statistics.path.clone());
    for step in &mut before {
        if let InputStep::Tokenize(_, limit) = step {
            *limit = (*limit).min(facts.max_tokens);
        }
    }

    let robot = match options.robot {
        RobotChoice::Preset(robot) => Some(robot),
        RobotChoice::Auto | RobotChoice::None => None,
    };
    if let Some(units) = aloha_units(options.adapt_to_pi.unwrap_or(false), robot)? {
        before.insert(0, InputStep::Aloha(units));
        after.push(OutputStep::Aloha(units));
    }
    let cols = after.iter().find_map(|step| match step {
        OutputStep::Crop(width) => Some(*width),
        _ => None,
    });
    let cols = cols.unwrap_or(facts.action_dim);
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
    let old = files.is_none() && config.resize_imgs_with_padding.is_some();
    if old && config.n_action_steps < facts.horizon {
        problems.push(format!(
            "lerobot up to 0.3 plans {} actions at a time (n_action_steps), this program the {} it was trained on, of \
             which it returns the first {}",
            config.n_action_steps, facts.horizon, config.n_action_steps
        ));
    }
    // Features of the normalizing step stand in where `config.json` has none.
    let shapes: Vec<_> = match config::of_kind(&config.input_features, "VISUAL").next() {
        Some(_) => config::of_kind(&config.input_features, "VISUAL")
            .map(|(key, feature)| (key.clone(), feature.clone()))
            .collect(),
        None => visual,
    };
    let keys = config.with_empty_cameras(shapes.iter().map(|(key, _)| key.clone()).collect());
    let (cameras, ignored) = cameras(&path, keys, &rename, robot, &mut problems)?;
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

    let pad = match options.lerobot_version {
        _ if old => Pad::TopLeft,
        Some(LerobotVersion::V0_4) => Pad::Center3,
        Some(LerobotVersion::V0_5) | None => Pad::Center,
    };
    if relative_step || old {
        if options.lerobot_version.is_some() {
            let tells = if old { "0.3 or earlier" } else { "0.5.1 or later" };
            let why = format!("its files tell: lerobot {tells}");
            return Err(Error::Option { option: "--lerobot-version", why });
        }
    } else if options.lerobot_version.is_none() {
        let bars = options.pad.is_none() && shapes.iter().any(|(_, feature)| !is_square(feature));
        let padded = config.state_in_prompt() && state.max < config.max_state_dim;
        let mut differ = Vec::new();
        if bars {
            differ.push("the bars of letterboxed images (-3 in 0.4, -1 in 0.5)");
        }
        if padded {
            differ.push("the state in the prompt (filled up to 32 dimensions in 0.4)");
        }
        if !differ.is_empty() {
            gaps.ask(format!(
                "its files were written by lerobot 0.4 or 0.5.0, which differ in {}: say --lerobot-version 0.4 or 0.5",
                differ.join(" and ")
            ));
        } else if options.pad.is_none() {
            problems.push(
                "written by lerobot 0.4 or 0.5.0; images that are not square get bars of -1, as in 0.5: \
                 --lerobot-version 0.4 gives those of 0.4, which are -3"
                    .into(),
            );
        }
    }
    let state_names = state_names(&rename);
    if state_names.is_empty() {
        problems.push(format!("no observation has a state: {STATE} is renamed to something else"));
    }
    Parts {
        directory,
        facts,
        robot,
        cameras,
        ignored,
        layout: LayoutRule::Guess,
        resize: Resize { filter: Filter::Torch, pad },
        state,
        state_names,
        before,
        after,
        rows: config.n_action_steps,
        cols,
        default_prompt: None,
        tokenizer,
        answers: config.is_fast().then_some(Answers {
            form: ReplyForm::Lerobot { checked: config.validate_action_token_prefix },
            skipped: config.fast_skip_tokens,
            size: [config.n_action_steps, cols],
            codec,
        }),
        black: false,
        gaps,
        statistics,
        origin: Origin {
            family: if files.is_some() { Family::Lerobot } else { Family::LerobotOld },
            config: None,
            asset_id: None,
            statistics: path_of_statistics,
            reset_pose: None,
            problems,
        },
    }
    .build(options)
}

fn is_square(feature: &config::Feature) -> bool {
    matches!(feature.shape.as_slice(), [_, height, width] if height == width)
}

/// What lerobot's renaming makes of a key; keys that it does not list stay.
fn renamed<'a>(rename: &'a [(String, String)], key: &'a str) -> &'a str {
    rename.iter().find(|(from, _)| from == key).map_or(key, |(_, to)| to)
}

/// Keys under which an observation may bring the state: all that renaming turns into lerobot's.
fn state_names(rename: &[(String, String)]) -> Vec<String> {
    let own = ["state", STATE, "observation/state"];
    let mut names: Vec<String> = Vec::new();
    if renamed(rename, STATE) == STATE {
        names.extend(own.map(str::to_owned));
    }
    for (from, _) in rename.iter().filter(|(_, to)| to == STATE) {
        for name in [from.as_str(), short_name(from)] {
            if !names.iter().any(|other| other == name) {
                names.push(name.to_owned());
            }
        }
    }
    names
}

/// Cameras, and names of others with what they are renamed to.
type Cameras = (Vec<Camera>, Vec<(String, Option<String>)>);

/// The checkpoint's cameras under all their names: their own, short, renamed and the robot's. A name means what
/// lerobot's renaming makes of it, so a swapped pair swaps.
fn cameras(
    path: &Path,
    keys: Vec<String>,
    rename: &[(String, String)],
    robot: Option<Robot>,
    problems: &mut Vec<String>,
) -> Result<Cameras> {
    if keys.is_empty() {
        return Err(Error::format(path, "input_features has no camera (type VISUAL)"));
    }
    let sources = rename.iter().map(|(from, _)| from);
    let mut cameras: Vec<Camera> = keys
        .iter()
        .map(|key| {
            let from = keys.iter().chain(sources.clone()).filter(|from| renamed(rename, from) == key);
            let names = from.flat_map(|from| [from.clone(), short_name(from).to_owned()]).collect();
            Camera { key: key.clone(), names, required: false }
        })
        .collect();
    let mut ignored = Vec::new();
    for (from, to) in rename.iter().filter(|(_, to)| !keys.contains(to) && to != STATE) {
        let image = |key: &String| key.starts_with(IMAGES) || key.starts_with("observation.image");
        if image(from) || image(to) || keys.contains(from) {
            ignored.extend([from.as_str(), short_name(from)].map(|name| (name.to_owned(), Some(to.clone()))));
            problems.push(format!("images of {from} are dropped: it is renamed to {to}, which is no camera"));
        }
    }
    for camera in cameras.iter().filter(|camera| camera.names.is_empty()) {
        problems.push(format!("no image can reach the camera {}: its name is renamed away", camera.key));
    }
    for camera in robot.map_or(&[][..], Robot::cameras) {
        let Some(slot) = camera.slot else {
            ignored.push((camera.key.to_owned(), None));
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
                ignored.push((camera.key.to_owned(), None));
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
    let stated = config.state_width().filter(|&width| width != config.max_state_dim);
    if let (Some(needed), Some(stated)) = (needed, stated)
        && needed != stated
    {
        let why = format!("the state has {stated} values, its statistics {needed}");
        return Err(Error::format(path, why));
    }
    match needed.or(stated) {
        Some(width) if width == 0 || width > facts.state_dim => Err(Error::format(
            path,
            format!("the state has {width} values, the model has {}", facts.state_dim),
        )),
        Some(width) => Ok(StateLength { min: width, max: width, source: "the checkpoint".into() }),
        None => Ok(StateLength { min: 1, max: facts.state_dim, source: "the model".into() }),
    }
}
