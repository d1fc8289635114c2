//! The last steps of loading, alike in both families: the tokenizer, the names of the cameras, the caller's options.

use std::collections::HashMap;
use std::path::{Path, PathBuf};

use crate::fast::{FastCodec, ReplyForm, ReplyReader};
use crate::observation::{LayoutRule, Resize};
use crate::options::PolicyOptions;
use crate::pipeline::{InputStep, OutputStep, StateLength};
use crate::policy::{Camera, Meaning, ModelFacts, Policy};
use crate::prompt::{TOKENIZER_FILES, Tokenizer};
use crate::robot::Robot;
use crate::statistics::{Gaps, Statistics};
use crate::summary::Origin;
use crate::training::TrainingData;
use crate::{Error, Result};

/// A policy but for the tokenizer and the options that both families share.
pub(crate) struct Parts<'a> {
    pub directory: &'a Path,
    pub facts: ModelFacts,
    pub robot: Option<Robot>,
    pub cameras: Vec<Camera>,
    /// Names of cameras that are not looked through, with what the checkpoint renames them to.
    pub ignored: Vec<(String, Option<String>)>,
    pub layout: LayoutRule,
    pub resize: Resize,
    pub state: StateLength,
    pub state_names: Vec<String>,
    pub before: Vec<InputStep>,
    pub after: Vec<OutputStep>,
    pub rows: usize,
    pub cols: usize,
    pub default_prompt: Option<String>,
    pub tokenizer: Option<PathBuf>,
    /// How answers of π0-FAST are read.
    pub answers: Option<Answers>,
    /// Whether cameras that send nothing are black images and not masked.
    pub black: bool,
    pub gaps: Gaps,
    /// What the normalization of the state and that of the actions were made of.
    pub statistics: [Option<Statistics>; 2],
    pub origin: Origin,
}

/// How answers of π0-FAST are read.
pub(crate) struct Answers {
    pub form: ReplyForm,
    /// Ids behind the codes.
    pub skipped: usize,
    /// Steps and dimensions of a chunk.
    pub size: [usize; 2],
    /// The codec's folder, where the checkpoint names it.
    pub codec: Option<PathBuf>,
}

impl Answers {
    /// The codec that was asked for, else the one that the checkpoint's files name, else one that lies beside.
    fn reader(
        self,
        directory: &Path,
        options: &PolicyOptions,
        tokenizer: &Tokenizer,
    ) -> Result<Option<ReplyReader>> {
        let beside = CODEC_FOLDERS.iter().map(|name| directory.join(name));
        let folder = match &options.action_tokenizer {
            Some(folder) => Some(folder.clone()),
            None => self
                .codec
                .into_iter()
                .chain(beside)
                .find(|folder| folder.join("processor_config.json").is_file()),
        };
        let Some(folder) = folder else { return Ok(None) };
        let codec = FastCodec::open(&folder)?;
        ReplyReader::new(codec, self.form, tokenizer, self.skipped, self.size).map(Some)
    }
}

/// Folders in which a checkpoint may carry π0-FAST's codec.
const CODEC_FOLDERS: [&str; 2] = ["action_tokenizer", "fast"];

impl Parts<'_> {
    pub fn build(mut self, options: &PolicyOptions) -> Result<Policy> {
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
        let fast = self.answers.is_some();
        if options.action_tokenizer.is_some() && !fast {
            let why = "only π0-FAST writes its actions as tokens".into();
            return Err(Error::Option { option: "--action-tokenizer", why });
        }
        let replies = match (self.answers, &tokenizer) {
            (Some(answers), Some(tokenizer)) => answers.reader(self.directory, options, tokenizer)?,
            _ => None,
        };
        if fast && replies.is_none() && tokenizer.is_some() {
            let missing = Error::NoActionTokenizer { path: self.directory.into() };
            self.origin.problems.push(missing.to_string());
        }
        let names = name_table(&self.cameras, &self.ignored);
        for (i, camera) in self.cameras.iter_mut().enumerate() {
            let mut mine = Vec::new();
            for name in camera.names.drain(..).filter(|name| names.get(name) == Some(&Meaning::Camera(i))) {
                if !mine.contains(&name) {
                    mine.push(name);
                }
            }
            camera.names = mine;
        }
        let [state, actions] = self.statistics.each_ref().map(Option::as_ref);
        let data = TrainingData::of(&self.before, &self.after, &self.cameras, state, actions);
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
            replies,
            black: self.black,
            names,
            state_names: self.state_names,
            missing: self.gaps.sentences(),
            data,
            origin: self.origin,
        })
    }
}

/// What every name means. A name that could mean two cameras means none, unless it is a camera's own.
fn name_table(cameras: &[Camera], ignored: &[(String, Option<String>)]) -> HashMap<String, Meaning> {
    let mut names: HashMap<String, Meaning> = HashMap::new();
    let mut ambiguous = Vec::new();
    for (i, camera) in cameras.iter().enumerate() {
        for name in &camera.names {
            let meaning = Meaning::Camera(i);
            if names.insert(name.clone(), meaning.clone()).is_some_and(|other| other != meaning) {
                ambiguous.push(name.clone());
            }
        }
    }
    for name in ambiguous {
        names.remove(&name);
    }
    for (i, camera) in cameras.iter().enumerate().filter(|(_, camera)| camera.names.contains(&camera.key)) {
        names.insert(camera.key.clone(), Meaning::Camera(i));
    }
    for (name, to) in ignored {
        let meaning = to.clone().map_or(Meaning::Ignored, Meaning::Renamed);
        names.entry(name.clone()).or_insert(meaning);
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
