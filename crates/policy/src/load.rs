//! Working out a policy from a checkpoint directory.

use std::collections::HashMap;
use std::path::Path;

use serde::Deserialize;

use crate::files::{inside, read_json};
use crate::lerobot::{self, Processors, short_name};
use crate::observation::LayoutRule;
use crate::openpi::{self, NormStats, OpenPiConfig};
use crate::pipeline::{InputStep, OutputStep, StateLength};
use crate::policy::{Camera, ModelFacts, Policy, PolicyOptions, RobotChoice};
use crate::resize::{Filter, Pad, Resize};
use crate::robot::{AlohaUnits, OPENPI_CAMERAS, Robot};
use crate::summary::{Family, Origin};
use crate::tokenizer::{PromptFormat, TOKENIZER_FILES, Tokenizer};
use crate::{Error, Result};

/// What tells the families apart.
#[derive(Deserialize)]
struct Probe {
    #[serde(rename = "type")]
    kind: Option<String>,
}

pub(crate) fn load(directory: &Path, facts: ModelFacts, options: &PolicyOptions) -> Result<Policy> {
    if !directory.is_dir() {
        let why = if directory.exists() { "it is a file" } else { "it does not exist" };
        return Err(Error::NotACheckpoint { path: directory.into(), why: why.into() });
    }
    let config = directory.join("config.json");
    let kind = if config.is_file() { read_json::<Probe>(&config)?.kind } else { None };
    match kind.as_deref() {
        Some("pi0") => load_lerobot(directory, facts, options),
        Some(other) => Err(Error::Unsupported {
            path: config,
            what: format!("a policy of type {other:?}"),
            advice: "only pi0 is implemented".into(),
        }),
        None if directory.join("assets").is_dir() => load_openpi(directory, facts, options),
        None => Err(Error::NotACheckpoint {
            path: directory.into(),
            why: "neither a config.json of lerobot with a `type` nor openpi's folder `assets`".into(),
        }),
    }
}

// ---- openpi ----

fn load_openpi(directory: &Path, facts: ModelFacts, options: &PolicyOptions) -> Result<Policy> {
    let mut problems = Vec::new();
    let named = options.config.as_deref().map(openpi::config).transpose()?;
    let asset_id = choose_asset(directory, named, options)?;
    let config = named.or_else(|| openpi::config_of_asset(&asset_id));
    let robot = match options.robot {
        RobotChoice::Preset(robot) => Some(robot),
        RobotChoice::None => None,
        RobotChoice::Auto => config.map(|config| config.robot).or_else(|| openpi::robot_of_asset(&asset_id)),
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
    let mut ids = openpi::asset_ids(&assets)?;
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
        let id = openpi::assets_of_robot(robot).iter().find(|id| ids.iter().any(|other| other == *id));
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

fn aloha_units(adapt: bool, robot: Option<Robot>) -> Result<Option<AlohaUnits>> {
    match (adapt, robot) {
        (false, _) => Ok(None),
        (true, Some(Robot::Aloha)) => Ok(Some(AlohaUnits::OpenPi)),
        (true, _) => Err(Error::Option { option: "--adapt-to-pi", why: "only ALOHA is converted".into() }),
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

// ---- lerobot ----

fn load_lerobot(directory: &Path, facts: ModelFacts, options: &PolicyOptions) -> Result<Policy> {
    let path = directory.join("config.json");
    let config = lerobot::Config::open(&path)?;
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
    let new = directory.join(lerobot::PREPROCESSOR).is_file();
    let Processors { mut before, mut after, rename, tokenizer, relative_step, mut problems } = if new {
        lerobot::read_processors(directory, &config)?
    } else {
        lerobot::old_processors(directory, &config)?
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
    let (cameras, ignored) = lerobot_cameras(&path, &config, &rename, robot, &mut problems)?;
    let state = lerobot_state(&path, &config, &before, facts)?;
    if let Some(mask) = after.iter().find_map(|step| match step {
        OutputStep::AbsoluteF32(mask) => Some(mask),
        _ => None,
    }) {
        let last = mask.iter().rposition(|&on| on).map_or(0, |i| i + 1);
        if last > state.min {
            let why = format!("action value {} is relative to a state of {} values", last - 1, state.min);
            return Err(Error::format(directory.join(lerobot::PREPROCESSOR), why));
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
fn lerobot_cameras(
    path: &Path,
    config: &lerobot::Config,
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
fn lerobot_state(
    path: &Path,
    config: &lerobot::Config,
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

// ---- both ----

/// A policy but for the tokenizer and the options that both families share.
struct Parts<'a> {
    directory: &'a Path,
    facts: ModelFacts,
    robot: Option<Robot>,
    cameras: Vec<Camera>,
    ignored: Vec<String>,
    layout: LayoutRule,
    resize: Resize,
    state: StateLength,
    before: Vec<InputStep>,
    after: Vec<OutputStep>,
    rows: usize,
    cols: usize,
    default_prompt: Option<String>,
    tokenizer: Option<std::path::PathBuf>,
    origin: Origin,
}

impl Parts<'_> {
    fn build(mut self, options: &PolicyOptions) -> Result<Policy> {
        let tokenizer = find_tokenizer(self.directory, options, self.tokenizer.as_deref())?;
        match &tokenizer {
            None => self.origin.problems.push(Error::NoTokenizer { path: self.directory.into() }.to_string()),
            Some(tokenizer) if tokenizer.size() > self.facts.vocab_size => {
                self.origin.problems.push(format!(
                    "{} has {} entries, the model only {}",
                    tokenizer.path().display(),
                    tokenizer.size(),
                    self.facts.vocab_size
                ))
            }
            Some(_) => {}
        }
        let names = name_table(&self.cameras, &self.ignored);
        for (i, camera) in self.cameras.iter_mut().enumerate() {
            let mut mine = Vec::new();
            for name in camera.names.drain(..).filter(|name| names.get(name) == Some(&Some(i))) {
                if !mine.contains(&name) {
                    mine.push(name);
                }
            }
            camera.names = mine;
        }
        Ok(Policy {
            directory: self.directory.into(),
            facts: self.facts,
            robot: self.robot,
            cameras: self.cameras,
            layout: self.layout,
            resize: Resize {
                filter: options.filter.unwrap_or(self.resize.filter),
                pad: options.pad.unwrap_or(self.resize.pad),
            },
            state: self.state,
            before: self.before,
            after: self.after,
            rows: self.rows,
            cols: self.cols,
            default_prompt: options.default_prompt.clone().or(self.default_prompt),
            tokenizer,
            names,
            origin: self.origin,
        })
    }
}

/// Every name that means one camera. A name that could mean two means none, unless it is a camera's own.
fn name_table(cameras: &[Camera], ignored: &[String]) -> HashMap<String, Option<usize>> {
    let mut names: HashMap<String, Option<usize>> = HashMap::new();
    let mut ambiguous = Vec::new();
    for (i, camera) in cameras.iter().enumerate() {
        for name in &camera.names {
            if names.insert(name.clone(), Some(i)).is_some_and(|other| other != Some(i)) {
                ambiguous.push(name.clone());
            }
        }
    }
    for name in ambiguous {
        names.remove(&name);
    }
    for (i, camera) in cameras.iter().enumerate().filter(|(_, camera)| camera.names.contains(&camera.key)) {
        names.insert(camera.key.clone(), Some(i));
    }
    for name in ignored {
        names.entry(name.clone()).or_insert(None);
    }
    names
}

/// The tokenizer that was asked for, else the one that the checkpoint's files name, else one that lies beside.
fn find_tokenizer(
    directory: &Path,
    options: &PolicyOptions,
    artifact: Option<&Path>,
) -> Result<Option<Tokenizer>> {
    if let Some(path) = &options.tokenizer {
        return Tokenizer::open(path).map(Some);
    }
    let artifact = artifact.map(|folder| folder.join("tokenizer.json"));
    let beside = TOKENIZER_FILES.iter().map(|name| directory.join(name));
    artifact
        .into_iter()
        .chain(beside)
        .find(|file| file.is_file())
        .map(|file| Tokenizer::open(&file))
        .transpose()
}
