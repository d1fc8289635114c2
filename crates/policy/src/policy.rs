//! A checkpoint's policy: everything between a robot and the network, worked out from the checkpoint's directory.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use pi0_model::{Config, Inputs, Kind};

use crate::fast::{Reply, ReplyForm, ReplyReader};
use crate::observation::{LayoutRule, Resize};
use crate::options::PolicyOptions;
use crate::pipeline::{InputStep, OutputStep, StateLength, Transition, finite, run_outputs};
use crate::prompt::Tokenizer;
use crate::robot::Robot;
use crate::summary::{Origin, Summary};
use crate::training::TrainingData;
use crate::{Error, Observation, Result, Warning, load};

/// What the policy must know of the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ModelFacts {
    /// Actions in a chunk.
    pub horizon: usize,
    /// Padded width of an action.
    pub action_dim: usize,
    /// Padded width of the state.
    pub state_dim: usize,
    /// Longest prompt in tokens.
    pub max_tokens: usize,
    /// Side of the square image.
    pub image_size: usize,
    /// Rows of the token embedding.
    pub vocab_size: usize,
    /// Which network of the family.
    pub kind: Kind,
    /// Whether horizon and width of an action are this network's: openpi's π0-FAST checkpoints do not say them.
    pub chunk_known: bool,
}

impl From<&Config> for ModelFacts {
    fn from(c: &Config) -> Self {
        Self {
            horizon: c.horizon,
            action_dim: c.action_dim,
            state_dim: c.state_dim,
            max_tokens: c.max_tokens,
            image_size: c.vision.image_size,
            vocab_size: c.vocab_size,
            kind: c.kind,
            chunk_known: c.answer.as_ref().is_none_or(|answer| answer.sizes_known),
        }
    }
}

/// A camera of the network.
#[derive(Debug, Clone)]
pub(crate) struct Camera {
    /// The checkpoint's name.
    pub key: String,
    /// The names under which its image may come; the first is the one to tell people.
    pub names: Vec<String>,
    pub required: bool,
}

/// What a name of an image means.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Meaning {
    /// A camera of the network.
    Camera(usize),
    /// One that the robot has and the policy does not look through.
    Ignored,
    /// One that the checkpoint renames to this, which is no camera of it.
    Renamed(String),
}

/// A policy, ready to translate.
#[derive(Debug)]
pub struct Policy {
    pub(crate) directory: PathBuf,
    pub(crate) facts: ModelFacts,
    pub(crate) robot: Option<Robot>,
    pub(crate) cameras: Vec<Camera>,
    pub(crate) layout: LayoutRule,
    pub(crate) resize: Resize,
    pub(crate) state: StateLength,
    pub(crate) before: Vec<InputStep>,
    pub(crate) after: Vec<OutputStep>,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    pub(crate) default_prompt: Option<String>,
    pub(crate) tokenizer: Option<Tokenizer>,
    /// π0-FAST: what reads its answers; none while the codec is missing.
    pub(crate) replies: Option<ReplyReader>,
    /// Whether cameras that send nothing are black images, which the network looks at, and not masked.
    pub(crate) black: bool,
    /// What each name of an image means.
    pub(crate) names: HashMap<String, Meaning>,
    /// Names under which the state may come, where no robot names its parts.
    pub(crate) state_names: Vec<String>,
    /// What must be settled before it runs, each with the options that do.
    pub(crate) missing: Vec<String>,
    pub(crate) data: TrainingData,
    pub(crate) origin: Origin,
}

/// An observation, ready for the network.
#[derive(Debug, Clone)]
pub struct Prepared {
    /// For the network.
    pub inputs: Inputs,
    /// For the user.
    pub warnings: Vec<Warning>,
    /// The state that relative actions refer to, for [`Policy::postprocess`].
    pub(crate) reference: Vec<f64>,
}

/// A chunk of actions in the robot's units.
#[derive(Debug, Clone, PartialEq)]
pub struct Actions {
    /// Time steps.
    pub rows: usize,
    /// Values of one action.
    pub cols: usize,
    /// `[rows, cols]`. Where upstream computes in f32, these are f32 values.
    pub data: Vec<f64>,
    /// What the robot's people should know of them.
    pub warnings: Vec<Warning>,
}

impl Actions {
    /// One action after the other.
    pub fn iter(&self) -> impl Iterator<Item = &[f64]> {
        self.data.chunks_exact(self.cols.max(1))
    }
}

impl Policy {
    /// Works out from a checkpoint directory, lerobot's or openpi's, what to do with its observations and actions.
    ///
    /// A missing tokenizer is no error here, so that a checkpoint can be inspected; [`preprocess`](Self::preprocess)
    /// refuses.
    pub fn load(directory: &Path, facts: ModelFacts, options: &PolicyOptions) -> Result<Self> {
        load::load(directory, facts, options)
    }

    /// What was worked out, for people and for JSON.
    pub fn summary(&self) -> Summary {
        Summary::of(self)
    }

    /// The robot whose keys and units are used.
    pub fn robot(&self) -> Option<Robot> {
        self.robot
    }

    /// All names under which images may come, those of cameras that are not looked through too.
    pub fn image_names(&self) -> impl Iterator<Item = &str> {
        self.names.keys().map(String::as_str)
    }

    /// Whether the policy can run, and if not, what has to be settled first.
    ///
    /// # Errors
    /// [`Error::NotReady`], [`Error::NoTokenizer`] or [`Error::NoActionTokenizer`], as [`preprocess`](Self::preprocess) would say for any observation.
    pub fn ready(&self) -> Result<()> {
        if !self.missing.is_empty() {
            return Err(Error::NotReady(self.missing.clone()));
        }
        self.tokenizer()?;
        self.replies().map(drop)
    }

    /// What reads the answers of π0-FAST; none of the other networks.
    fn replies(&self) -> Result<Option<&ReplyReader>> {
        match &self.replies {
            None if self.facts.kind == Kind::Pi0Fast => {
                Err(Error::NoActionTokenizer { path: self.directory.clone() })
            }
            reader => Ok(reader.as_ref()),
        }
    }

    /// Whether the network writes its actions as tokens: π0-FAST.
    pub fn writes_tokens(&self) -> bool {
        self.facts.kind == Kind::Pi0Fast
    }

    /// π0-FAST: the token that ends an answer; none of the other networks.
    ///
    /// # Errors
    /// Tokenizer or codec are missing.
    pub fn answer_end(&self) -> Result<Option<u32>> {
        let tokenizer = self.tokenizer()?;
        self.replies()?.map(|reader| reader.end(tokenizer)).transpose()
    }

    /// π0-FAST: the normalized chunk that an answer stands for.
    ///
    /// # Errors
    /// As [`postprocess`](Self::postprocess).
    pub fn read_answer(&self, answer: &[f32]) -> Result<Reply> {
        let reader = self.replies()?.ok_or_else(|| Error::Actions("the network writes no answers".into()))?;
        let token = |&x: &f32| {
            let id = x as u32;
            (id as f32 == x)
                .then_some(id)
                .ok_or_else(|| Error::Actions(format!("{x} is no token of an answer")))
        };
        let answer = answer.iter().map(token).collect::<Result<Vec<_>>>()?;
        let mut reply = reader.read(&answer, self.tokenizer()?)?;
        // lerobot's tensors are f32 from here on.
        if reader.form() != ReplyForm::OpenPi {
            reply.actions.iter_mut().for_each(|x| *x = f64::from(*x as f32));
        }
        Ok(reply)
    }

    /// π0-FAST: the tokens of which a valid answer is made, in ascending order.
    ///
    /// # Errors
    /// The network is another, or the codec is missing.
    pub fn answer_tokens(&self) -> Result<Vec<u32>> {
        match self.replies()? {
            Some(reader) => reader.ids(self.tokenizer()?),
            None => {
                Err(Error::Option { option: "--answer-tokens", why: "only π0-FAST writes tokens".into() })
            }
        }
    }

    fn tokenizer(&self) -> Result<&Tokenizer> {
        self.tokenizer.as_ref().ok_or_else(|| Error::NoTokenizer { path: self.directory.clone() })
    }

    /// From what the robot sees to what the network takes.
    ///
    /// # Errors
    /// The checkpoint does not say enough to run ([`ready`](Self::ready)), or something is wrong with the observation.
    pub fn preprocess(&self, observation: &Observation) -> Result<Prepared> {
        if !self.missing.is_empty() {
            return Err(Error::NotReady(self.missing.clone()));
        }
        let mut warnings = Vec::new();
        let sources = self.match_cameras(observation, &mut warnings)?;
        self.state.check(&observation.state)?;
        let prompt = observation.prompt.as_ref().or(self.default_prompt.as_ref()).ok_or(Error::NoPrompt)?;
        let tokenizer = self.tokenizer()?;

        let mut transition =
            Transition { state: observation.state.clone(), prompt: prompt.clone(), ..Transition::default() };
        transition.run(&self.before, tokenizer, self.facts.vocab_size)?;
        finite(&transition.state, true)?;
        warnings.append(&mut transition.warnings);
        let mut state: Vec<f32> = transition.state.iter().map(|&x| x as f32).collect();
        state.resize(self.facts.state_dim, 0.0);

        let end = self.answer_end()?;
        let image = |source: &Option<usize>| -> Result<Option<Vec<f32>>> {
            let Some((key, image)) = source.map(|i| &observation.images[i]) else {
                return Ok(self.black.then(|| vec![-1.0; 3 * self.facts.image_size.pow(2)]));
            };
            self.resize.apply(key, image, self.layout, self.facts.image_size).map(Some)
        };
        let images = sources.iter().map(image).collect::<Result<_>>()?;
        let inputs = Inputs { images, tokens: transition.tokens, state, end, ..Inputs::default() };
        Ok(Prepared { inputs, warnings, reference: transition.reference })
    }

    /// From what the network returns, `[horizon, action_dim]` or, of π0-FAST, the tokens of an answer, to what the robot
    /// takes.
    ///
    /// # Errors
    /// An action is not finite, or no action may be read from the network's answer. One that is malformed otherwise is
    /// told in [`Actions::warnings`].
    pub fn postprocess(&self, actions: &[f32], prepared: &Prepared) -> Result<Actions> {
        let ModelFacts { horizon, action_dim, .. } = self.facts;
        if self.writes_tokens() {
            let reply = self.read_answer(actions)?;
            let rows = reply.actions.chunks_exact(reply.shape[1]).map(<[f64]>::to_vec);
            let warnings = reply.faults.into_iter().map(Warning::Reply).collect();
            return self.finish(rows, prepared, warnings);
        }
        if actions.len() != horizon * action_dim {
            let why = format!("got {} values, wanted {horizon} x {action_dim}", actions.len());
            return Err(Error::Actions(why));
        }
        let rows = actions.chunks_exact(action_dim).map(|row| row.iter().map(|&x| f64::from(x)).collect());
        self.finish(rows, prepared, Vec::new())
    }

    /// Normalized actions in the robot's units.
    fn finish(
        &self,
        rows: impl Iterator<Item = Vec<f64>>,
        prepared: &Prepared,
        warnings: Vec<Warning>,
    ) -> Result<Actions> {
        let mut data = Vec::with_capacity(self.rows * self.cols);
        for (t, mut action) in rows.take(self.rows).enumerate() {
            run_outputs(&self.after, &mut action, &prepared.reference);
            if let Some(i) = action.iter().position(|x| !x.is_finite()) {
                return Err(Error::Actions(format!("value {i} of step {t} is {}", action[i])));
            }
            data.extend(action);
        }
        Ok(Actions { rows: self.rows, cols: self.cols, data, warnings })
    }

    /// For each camera of the network, the position of its image in the observation.
    fn match_cameras(
        &self,
        observation: &Observation,
        warnings: &mut Vec<Warning>,
    ) -> Result<Vec<Option<usize>>> {
        let known = || self.cameras.iter().filter_map(|camera| camera.names.first().cloned()).collect();
        let mut sources = vec![None; self.cameras.len()];
        for (i, (key, _)) in observation.images.iter().enumerate() {
            match self.names.get(key) {
                Some(&Meaning::Camera(camera)) if sources[camera].is_some() => {
                    return Err(Error::DuplicateCamera { key: key.clone() });
                }
                Some(&Meaning::Camera(camera)) => sources[camera] = Some(i),
                Some(Meaning::Ignored) => warnings.push(Warning::CameraIgnored { key: key.clone() }),
                Some(Meaning::Renamed(to)) => {
                    warnings.push(Warning::CameraRenamed { key: key.clone(), to: to.clone() })
                }
                None => return Err(Error::UnknownCamera { key: key.clone(), known: known() }),
            }
        }
        if sources.iter().all(Option::is_none) {
            let got: Vec<_> = observation.images.iter().map(|(key, _)| key.clone()).collect();
            return Err(match got.is_empty() {
                true => Error::NoCameras { known: known() },
                false => Error::NoKnownCamera { got, known: known() },
            });
        }
        for (camera, source) in self.cameras.iter().zip(&sources) {
            let name = camera.names.first().unwrap_or(&camera.key);
            if source.is_none() && camera.required {
                let got = observation.images.iter().map(|(key, _)| key.clone()).collect();
                return Err(Error::MissingCamera { key: name.clone(), got });
            }
        }
        Ok(sources)
    }
}
