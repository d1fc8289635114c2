//! Checkpoints of openpi: a configuration of its Python code and the statistics in `assets/`.
//!
//! The files do not say whether actions are relative to the state, whether ALOHA's units are converted, whether π0.5's
//! prompt holds the state. Where the assets are those of openpi's own configurations these tell, if they agree;
//! otherwise the caller is asked.

mod assets;
mod configs;

use std::path::Path;

use configs::Verdict;
pub use configs::{CONFIGS, OpenPiConfig};

use pi0_model::Kind;

use crate::assemble::{Answers, Parts};
use crate::fast::{ReplyForm, SKIPPED};
use crate::observation::{Filter, LayoutRule, Pad, Resize};
use crate::options::{PolicyOptions, RobotChoice};
use crate::pipeline::{Formula, InputStep, Normalizer, OPENPI_EPS, OutputStep, StateLength};
use crate::policy::{Camera, ModelFacts, Policy};
use crate::prompt::{PromptFormat, Rounding, StateForm, StateText};
use crate::robot::{OPENPI_CAMERAS, Robot, aloha_units};
use crate::statistics::{ACTION, Counted, Gaps, STATE};
use crate::summary::{Family, Origin};
use crate::{Error, Result};

pub(crate) fn load(directory: &Path, mut facts: ModelFacts, options: &PolicyOptions) -> Result<Policy> {
    let mut problems = Vec::new();
    let mut gaps = Gaps::default();
    options.only_for_lerobot(directory)?;
    let named = options.config.as_deref().map(OpenPiConfig::named).transpose()?;
    if let Some(config) = named {
        fits(config, facts, options.robot)?;
    }
    let found = assets::find(directory, named, options)?;
    let verdict = match (named, found.asset_id.as_deref()) {
        (Some(config), _) => Verdict::One(config, None),
        (None, Some(id)) => configs::of_asset(id, facts.kind, facts.chunk_known.then_some(facts.horizon)),
        (None, None) => Verdict::Unknown,
    };
    let known = match &verdict {
        Verdict::One(config, note) => {
            let note = note.clone().filter(|_| options.delta_actions.is_none());
            problems.extend(note.map(|note| format!("{}: {note}", found.name())));
            Some(*config)
        }
        Verdict::Several(_) | Verdict::Unknown => None,
    };
    let fast = facts.kind == Kind::Pi0Fast;
    if !facts.chunk_known {
        match known {
            Some(config) => (facts.horizon, facts.action_dim) = (config.horizon, config.action_dim),
            None => gaps.ask(format!(
                "openpi's π0-FAST checkpoints do not say how many actions of how many values they write: name the \
                 configuration (--config, such as {}) or give the sizes with --arch",
                CONFIGS.iter().filter(|c| c.kind == Kind::Pi0Fast).map(|c| c.name).collect::<Vec<_>>().join(", ")
            )),
        }
    }
    let robot = match options.robot {
        RobotChoice::Preset(robot) => Some(robot),
        RobotChoice::None => None,
        RobotChoice::Auto => known
            .map(|config| config.robot)
            .or_else(|| found.asset_id.as_deref().and_then(configs::robot_of_asset)),
    };
    if robot.is_none() && options.robot == RobotChoice::Auto {
        gaps.ask(format!(
            "no robot is known for {}: name the configuration it was trained with (--config), or the robot (--robot \
             aloha, droid, libero or ur5; none for the network's own keys, without any transform)",
            found.name()
        ));
    }
    // Codes of one codec are codes of another as well, and move the robot elsewhere: nothing would show it.
    if let Some((config, codec)) = named.and_then(|config| Some((config, config.codec?)))
        && options.action_tokenizer.is_none()
    {
        gaps.ask(format!(
            "{} writes its actions with a codec of its own, {codec} on the hub: name its folder with --action-tokenizer",
            config.name
        ));
    }
    if let Some(config) = named.filter(|config| config.horizon != facts.horizon) {
        let why =
            format!("{} has {} actions a chunk, the model {}", config.name, config.horizon, facts.horizon);
        problems.push(why);
    }
    // Another robot than the configuration's has neither its prompt nor its actions.
    let config = known.filter(|config| robot == Some(config.robot));
    let choices = Choices::of(config, robot, facts, options, &verdict, &found.name(), &mut gaps)?;

    let units = aloha_units(choices.adapt_to_pi, robot)?;
    let delta = robot.filter(|_| choices.delta);
    if let Some(statistics) = found.statistics.as_ref().filter(|s| s.counted == Counted::Raw)
        && (units.is_some() || delta.is_some())
    {
        let why = format!(
            "{} describes what the robot recorded, but this policy normalizes {}; openpi's scripts/compute_norm_stats.py \
             writes the statistics of that",
            statistics.path.display(),
            if delta.is_some() { "actions relative to the state" } else { "joints in π0's units" }
        );
        return Err(Error::Option { option: "--stats", why });
    }
    let (formula, stats) = match facts.kind {
        Kind::Pi05 | Kind::Pi0Fast => (Formula::OpenPiQuantile, ["q01", "q99"]),
        Kind::Pi0 => (Formula::OpenPiZScore, ["mean", "std"]),
    };
    let mut normalizer = |key: &str| {
        let made = match &found.statistics {
            Some(statistics) => statistics.normalizer(key, formula, stats, OPENPI_EPS).map_err(|why| {
                format!("{why}; {} of openpi is trained on {} and {}", facts.kind, stats[0], stats[1])
            }),
            None => Err(found.missing.clone()),
        };
        gaps.fill(key, made, options.raw_units, &mut problems)
    };
    let (state_stats, action_stats) = (normalizer(STATE), normalizer(ACTION));
    if options.raw_units && state_stats.is_some() && action_stats.is_some() {
        return Err(options.needless_raw_units());
    }
    widths(&action_stats, robot, facts, &found)?;

    let mut before = Vec::new();
    before.extend(units.map(InputStep::Aloha));
    before.extend(state_stats.clone().map(InputStep::Normalize));
    if delta.is_some() {
        before.push(match &state_stats {
            Some(stats) => InputStep::ReferenceBack(stats.clone()),
            None => InputStep::Reference,
        });
    }
    let mut format = PromptFormat::OpenPi;
    if fast || facts.kind == Kind::Pi05 && choices.state_in_prompt {
        let form = if fast { StateForm::FastOpenPi } else { StateForm::Pi05 };
        before.push(InputStep::StateText(StateText { form, rounding: Rounding::F64, pad: 0 }));
        format = PromptFormat::Verbatim;
    }
    before.push(InputStep::Tokenize(format, facts.max_tokens));
    let mut after: Vec<OutputStep> = action_stats.into_iter().map(OutputStep::Unnormalize).collect();
    after.extend(delta.map(|robot| OutputStep::Absolute(robot.delta_mask())));
    let cols = robot.map_or(facts.action_dim, |robot| robot.action_width().min(facts.action_dim));
    after.push(OutputStep::Crop(cols));
    after.extend(units.map(OutputStep::Aloha));

    let (cameras, ignored) = cameras(robot, fast);
    let widest = state_stats.map_or(facts.state_dim, |stats| facts.state_dim.min(stats.width()));
    let state = match robot {
        Some(robot) => {
            StateLength { min: robot.state_width(), max: robot.state_width(), source: robot.name().into() }
        }
        None => StateLength { min: 1, max: widest, source: "the checkpoint's normalization".into() },
    };
    if state.max > widest {
        let why =
            format!("{} has a state of {} values, {} only {widest}", state.source, state.max, found.name());
        return Err(Error::Option { option: "--robot", why });
    }
    Parts {
        directory,
        facts,
        robot,
        cameras,
        ignored,
        layout: if robot == Some(Robot::Aloha) { LayoutRule::ChannelsFirst } else { LayoutRule::Guess },
        resize: Resize { filter: Filter::Pillow, pad: Pad::Center },
        state,
        state_names: ["state", "observation/state", STATE].map(str::to_owned).into(),
        before,
        after,
        rows: facts.horizon,
        cols,
        answers: fast.then_some(Answers {
            form: ReplyForm::OpenPi,
            skipped: SKIPPED,
            size: [facts.horizon, facts.action_dim],
            codec: None,
        }),
        // openpi's masks of these two are all true, and what they lack is black.
        black: fast && matches!(robot, Some(Robot::Droid | Robot::Libero)),
        default_prompt: config.and_then(|config| config.default_prompt).map(str::to_owned),
        tokenizer: None,
        gaps,
        statistics: [found.statistics.clone(), found.statistics.clone()],
        origin: Origin {
            family: Family::Openpi,
            config: config.map(|config| config.name.into()),
            asset_id: found.asset_id,
            statistics: found.statistics.map(|statistics| statistics.path),
            reset_pose: config.and_then(|config| config.reset_pose),
            problems,
        },
    }
    .build(options)
}

/// Whether a configuration that was named can be that of this network and robot.
fn fits(config: OpenPiConfig, facts: ModelFacts, robot: RobotChoice) -> Result<()> {
    let refuse = |option, why| Err(Error::Option { option, why });
    if config.kind != facts.kind {
        let (wanted, got) = (config.kind, facts.kind);
        return refuse("--config", format!("{} is of a {wanted} network, this is a {got}", config.name));
    }
    match robot {
        RobotChoice::Preset(robot) if robot != config.robot => refuse(
            "--robot",
            format!("{robot} contradicts --config {}, which is for {}", config.name, config.robot),
        ),
        _ => Ok(()),
    }
}

/// What openpi's code decides for each configuration.
struct Choices {
    delta: bool,
    adapt_to_pi: bool,
    state_in_prompt: bool,
}

impl Choices {
    /// From the options, else from the configuration; what neither says is asked for.
    fn of(
        config: Option<OpenPiConfig>,
        robot: Option<Robot>,
        facts: ModelFacts,
        options: &PolicyOptions,
        verdict: &Verdict,
        assets: &str,
        gaps: &mut Gaps,
    ) -> Result<Self> {
        if options.delta_actions == Some(true) && robot.is_none() {
            let why = "only a robot preset knows which dimensions are joints".into();
            return Err(Error::Option { option: "--delta-actions", why });
        }
        if options.state_in_prompt.is_some() && facts.kind != Kind::Pi05 {
            let why = "only π0.5 may or may not read the state in the prompt".into();
            return Err(Error::Option { option: "--state-in-prompt", why });
        }
        let mut open = Vec::new();
        // Without a robot there are no transforms, so only the prompt is open.
        let mut choose = |given: Option<bool>, matters: bool, known: Option<bool>, question| {
            given.or(known).unwrap_or_else(|| {
                if matters {
                    open.push(question);
                }
                false
            })
        };
        let choices = Self {
            delta: choose(
                options.delta_actions,
                robot.is_some(),
                config.map(|c| c.delta),
                "whether actions are relative to the state (--delta-actions true or false)",
            ),
            adapt_to_pi: choose(
                options.adapt_to_pi,
                robot == Some(Robot::Aloha),
                config.map(|c| c.adapt_to_pi),
                "whether ALOHA's joints and grippers are converted to π0's units (--adapt-to-pi true, openpi's default, \
                 or false)",
            ),
            state_in_prompt: choose(
                options.state_in_prompt,
                facts.kind == Kind::Pi05,
                config.map(|c| c.state_in_prompt),
                "whether the prompt holds the state (--state-in-prompt true, openpi's default, or false as in pi05_libero)",
            ),
        };
        if let (false, Verdict::Several(names)) = (open.is_empty(), verdict) {
            gaps.ask(format!("{assets} may belong to {names}: name the right one with --config"));
        } else if !open.is_empty() {
            gaps.ask(format!(
                "{assets} do not say {}; name the configuration of openpi that it was trained with (--config, such as \
                 {}) or answer each",
                open.join(", nor "),
                match facts.kind {
                    Kind::Pi0 => "pi0_aloha",
                    Kind::Pi05 => "pi05_aloha",
                    Kind::Pi0Fast => "pi0_fast_droid",
                }
            ));
        }
        Ok(choices)
    }
}

/// Statistics of the actions must be those of this robot.
fn widths(
    actions: &Option<Normalizer>,
    robot: Option<Robot>,
    facts: ModelFacts,
    found: &assets::Found,
) -> Result<()> {
    let Some((actions, statistics)) = actions.as_ref().zip(found.statistics.as_ref()) else { return Ok(()) };
    let got = actions.width();
    if got > facts.action_dim {
        let why = format!("statistics of {got} action values, the model has {}", facts.action_dim);
        return Err(Error::format(&statistics.path, why));
    }
    match robot.filter(|robot| robot.action_width() > got) {
        Some(robot) => {
            let why = format!(
                "{robot} has actions of {} values, {} only {got}",
                robot.action_width(),
                found.name()
            );
            Err(Error::Option { option: "--robot", why })
        }
        None => Ok(()),
    }
}

/// openpi's three cameras under the robot's names, or their own; and those it ignores.
///
/// π0-FAST's of DROID are two of the base and then the wrist's; the second is black.
fn cameras(robot: Option<Robot>, fast: bool) -> (Vec<Camera>, Vec<(String, Option<String>)>) {
    let theirs = robot.map_or(&[][..], Robot::cameras);
    let droid = fast && robot == Some(Robot::Droid);
    let keys = if droid { ["base_0_rgb", "base_1_rgb", "wrist_0_rgb"] } else { OPENPI_CAMERAS };
    let place = |slot: usize| if droid && slot == 1 { 2 } else { slot };
    let camera = |(slot, key): (usize, &&str)| {
        let camera = theirs.iter().find(|camera| camera.slot.map(place) == Some(slot));
        let name = camera.map(|camera| camera.key).or(robot.is_none().then_some(*key));
        Camera {
            key: (*key).into(),
            names: name.into_iter().map(str::to_owned).collect(),
            required: camera.is_some_and(|camera| camera.required),
        }
    };
    let ignored = theirs
        .iter()
        .filter(|camera| camera.slot.is_none())
        .map(|camera| (camera.key.into(), None))
        .collect();
    (keys.iter().enumerate().map(camera).collect(), ignored)
}
