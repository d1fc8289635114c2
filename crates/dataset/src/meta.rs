//! A dataset's directory: what there is, and where.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::rc::Rc;

use serde::Deserialize;
use serde_json::Value;

use crate::table::{Table, columns, image_bytes, index, number, text, vector};
use crate::video::Ffmpeg;
use crate::{Error, Result};

/// The part of `meta/info.json` that matters here.
#[derive(Debug, Deserialize)]
struct Info {
    codebase_version: String,
    fps: f64,
    #[serde(default = "thousand")]
    chunks_size: usize,
    data_path: String,
    video_path: Option<String>,
    features: serde_json::Map<String, Value>,
}

fn thousand() -> usize {
    1000
}

/// Where the dataset's own names differ from lerobot's.
#[derive(Debug, Clone, Default)]
pub struct Rename {
    /// The feature of the state, else `observation.state` or `state`.
    pub state: Option<String>,
    /// The feature of the action, else `action` or `actions`.
    pub action: Option<String>,
}

/// A camera of a dataset.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Camera {
    /// Its feature.
    pub key: String,
    /// Whether its frames are in videos.
    pub is_video: bool,
}

/// An episode as `meta/` describes it.
#[derive(Debug, Clone, PartialEq)]
pub struct EpisodeMeta {
    /// Its number.
    pub index: usize,
    /// Its frames.
    pub length: usize,
    data: PathBuf,
    /// By camera: the file, and where in it the episode begins, in seconds.
    videos: BTreeMap<String, (PathBuf, f64)>,
}

/// The numbers of an episode.
#[derive(Debug, Clone, PartialEq)]
pub struct Episode {
    /// Its number.
    pub index: usize,
    /// `[frames][width]`.
    pub states: Vec<Vec<f64>>,
    /// `[frames][width]`.
    pub actions: Vec<Vec<f64>>,
    /// What to do, at every frame.
    pub tasks: Vec<Option<Rc<str>>>,
    /// Positions of the frames in the data file.
    rows: Vec<usize>,
}

/// A picture, `[height, width, 3]` of bytes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Samples.
    pub rgb: Vec<u8>,
}

/// A dataset on disk.
#[derive(Debug)]
pub struct Dataset {
    root: PathBuf,
    info: Info,
    state: String,
    action: String,
    tasks: BTreeMap<usize, Rc<str>>,
    episodes: Vec<EpisodeMeta>,
    /// The last data file: version 3 keeps many episodes in one.
    numbers: RefCell<Option<(PathBuf, Rc<Vec<Numbers>>)>>,
}

/// One row of a data file.
#[derive(Debug)]
struct Numbers {
    episode: usize,
    frame: usize,
    task: Option<usize>,
    state: Vec<f64>,
    action: Vec<f64>,
}

impl Dataset {
    /// Reads `meta/`. Nothing else is read yet.
    ///
    /// # Errors
    /// It is no dataset of a version that is known, or has neither state nor action.
    pub fn open(root: &Path, rename: &Rename) -> Result<Self> {
        let path = root.join("meta").join("info.json");
        let bytes =
            std::fs::read(&path).map_err(|e| Error::file(&path, format!("{e}; is it a lerobot dataset?")))?;
        let info: Info = serde_json::from_slice(&bytes).map_err(|e| Error::file(&path, e))?;
        if !(info.fps.is_finite() && info.fps > 0.0) || info.chunks_size == 0 {
            return Err(Error::file(&path, format!("fps {}, chunks_size {}", info.fps, info.chunks_size)));
        }
        let feature = |wanted: &Option<String>, usual: [&str; 2], what: &str| {
            let names: Vec<&str> = wanted.as_deref().map_or(usual.to_vec(), |name| vec![name]);
            let found = names.iter().find(|name| info.features.contains_key(**name));
            found.map(|name| (*name).to_owned()).ok_or_else(|| {
                let have: Vec<&str> = info.features.keys().map(String::as_str).collect();
                let have = have.join(", ");
                Error::Missing(format!(
                    "the dataset has no {what} called {}; it has {have}",
                    names.join(" or ")
                ))
            })
        };
        let state = feature(&rename.state, ["observation.state", "state"], "state")?;
        let action = feature(&rename.action, ["action", "actions"], "action")?;
        let version = info.codebase_version.trim_start_matches('v').to_owned();
        let mut dataset = Self {
            root: root.to_owned(),
            info,
            state,
            action,
            tasks: BTreeMap::new(),
            episodes: Vec::new(),
            numbers: RefCell::default(),
        };
        match version.split_once('.').map(|(major, _)| major) {
            Some("2") => dataset.read_version_2()?,
            Some("3") => dataset.read_version_3()?,
            _ => {
                let why =
                    format!("version {version}; 2.0, 2.1 and 3.0 can be read, convert others with lerobot");
                return Err(Error::file(&path, why));
            }
        }
        dataset.episodes.sort_by_key(|episode| episode.index);
        Ok(dataset)
    }

    /// Frames a second.
    pub fn fps(&self) -> f64 {
        self.info.fps
    }

    /// All episodes, by number.
    pub fn episodes(&self) -> &[EpisodeMeta] {
        &self.episodes
    }

    /// All cameras, in the order of the file.
    pub fn cameras(&self) -> Vec<Camera> {
        let kind = |feature: &Value| feature.get("dtype").and_then(Value::as_str).map(str::to_owned);
        let camera = |(key, feature): (&String, &Value)| {
            let kind = kind(feature)?;
            ["image", "video"]
                .contains(&kind.as_str())
                .then(|| Camera { key: key.clone(), is_video: kind == "video" })
        };
        self.info.features.iter().filter_map(camera).collect()
    }

    /// Names of the action's dimensions, where the dataset tells them.
    pub fn action_names(&self) -> Vec<String> {
        let names = self.info.features.get(&self.action).and_then(|feature| feature.get("names"));
        // A list, or lists by the name of a group.
        let list = |value: &Value| -> Vec<String> {
            value.as_array().into_iter().flatten().filter_map(Value::as_str).map(str::to_owned).collect()
        };
        match names {
            Some(Value::Object(groups)) => groups.values().flat_map(list).collect(),
            Some(other) => list(other),
            None => Vec::new(),
        }
    }

    fn read_version_2(&mut self) -> Result<()> {
        for line in self.lines("tasks.jsonl")? {
            if let (Some(at), Some(task)) =
                (whole(&line, "task_index"), line.get("task").and_then(Value::as_str))
            {
                self.tasks.insert(at, task.into());
            }
        }
        for line in self.lines("episodes.jsonl")? {
            let (Some(index), Some(length)) = (whole(&line, "episode_index"), whole(&line, "length")) else {
                let path = self.root.join("meta").join("episodes.jsonl");
                return Err(Error::file(&path, format!("an episode without number or length: {line}")));
            };
            let chunk = index / self.info.chunks_size;
            let fill = |pattern: &str, key: &str| {
                self.place(pattern, &[("episode_chunk", chunk), ("episode_index", index)], key)
            };
            let data = fill(&self.info.data_path, "")?;
            let mut videos = BTreeMap::new();
            for camera in self.cameras().into_iter().filter(|camera| camera.is_video) {
                let path = fill(self.video_pattern()?, &camera.key)?;
                videos.insert(camera.key, (path, 0.0));
            }
            self.add(EpisodeMeta { index, length, data, videos })?;
        }
        Ok(())
    }

    fn read_version_3(&mut self) -> Result<()> {
        let path = self.root.join("meta").join("tasks.parquet");
        // The task is pandas' index, whose column has a name of pandas' choice.
        let names = columns(&path)?;
        let task = names.iter().find(|name| *name != "task_index").map_or("task", |name| name);
        let table = Table::read(&path, &["task_index", task], |_| true)?;
        for row in 0..table.len() {
            if let (Some(at), Some(task)) = (index(table.at(row, 0)), text(table.at(row, 1))) {
                self.tasks.insert(at, task.into());
            }
        }
        let mut files = Vec::new();
        collect(&self.root.join("meta").join("episodes"), &mut files)?;
        files.sort();
        let videos: Vec<String> =
            self.cameras().into_iter().filter(|camera| camera.is_video).map(|camera| camera.key).collect();
        let fixed = ["episode_index", "length", "data/chunk_index", "data/file_index"].map(str::to_owned);
        let of_video = ["chunk_index", "file_index", "from_timestamp"];
        let per_video = videos.iter().flat_map(|key| of_video.map(|column| format!("videos/{key}/{column}")));
        let wanted: Vec<String> = fixed.into_iter().chain(per_video).collect();
        let wanted: Vec<&str> = wanted.iter().map(String::as_str).collect();
        for path in files {
            let table = Table::read(&path, &wanted, |_| true)?;
            for row in 0..table.len() {
                let count = |column: usize| {
                    let lacks = || Error::file(&path, format!("row {row} has no {}", wanted[column]));
                    index(table.at(row, column)).ok_or_else(lacks)
                };
                let place = |pattern: &str, column: usize, key: &str| {
                    let values = [("chunk_index", count(column)?), ("file_index", count(column + 1)?)];
                    self.place(pattern, &values, key)
                };
                let mut files = BTreeMap::new();
                for (i, key) in videos.iter().enumerate() {
                    let first = 4 + 3 * i;
                    let from = number(table.at(row, first + 2)).unwrap_or(0.0);
                    files.insert(key.clone(), (place(self.video_pattern()?, first, key)?, from));
                }
                let data = place(&self.info.data_path, 2, "")?;
                self.add(EpisodeMeta { index: count(0)?, length: count(1)?, data, videos: files })?;
            }
        }
        Ok(())
    }

    fn add(&mut self, episode: EpisodeMeta) -> Result<()> {
        /// A year at 30 frames a second.
        const LONGEST: usize = 1_000_000_000;
        let EpisodeMeta { index, length, .. } = episode;
        if length > LONGEST || index > LONGEST {
            let why = format!("episode {index} has {length} frames: these numbers are not to be believed");
            return Err(Error::file(&self.root.join("meta"), why));
        }
        self.episodes.push(episode);
        Ok(())
    }

    fn video_pattern(&self) -> Result<&str> {
        let missing =
            || Error::Missing("meta/info.json has features of type video, but no video_path".into());
        self.info.video_path.as_deref().ok_or_else(missing)
    }

    fn lines(&self, name: &str) -> Result<Vec<Value>> {
        let path = self.root.join("meta").join(name);
        let text = std::fs::read_to_string(&path).map_err(|e| Error::file(&path, e))?;
        let lines = text.lines().filter(|line| !line.trim().is_empty());
        lines.map(|line| serde_json::from_str(line).map_err(|e| Error::file(&path, e))).collect()
    }

    /// Fills a pattern of Python's `str.format`, such as `data/chunk-{chunk_index:03d}/file.parquet`.
    fn place(&self, pattern: &str, values: &[(&str, usize)], key: &str) -> Result<PathBuf> {
        let wrong = |why: String| Error::file(&self.root.join("meta").join("info.json"), why);
        let mut out = String::new();
        let mut rest = pattern;
        while let Some((before, after)) = rest.split_once('{') {
            let Some((field, behind)) = after.split_once('}') else {
                return Err(wrong(format!("the pattern {pattern:?} has no end")));
            };
            out += before;
            let (name, format) = field.split_once(':').unwrap_or((field, ""));
            let value = values.iter().find(|(known, _)| *known == name);
            match (name, value) {
                ("video_key", _) => out += key,
                (_, Some((_, value))) => {
                    let width =
                        format.trim_end_matches('d').trim_start_matches('0').parse().unwrap_or(0).min(20);
                    out += &format!("{value:0width$}");
                }
                _ => return Err(wrong(format!("the pattern {pattern:?} has the unknown field {name:?}"))),
            }
            rest = behind;
        }
        out += rest;
        let path = Path::new(&out);
        // What a dataset names lies in it.
        let inside = path.components().all(|part| matches!(part, std::path::Component::Normal(_)));
        match inside && out.len() < 4096 {
            true => Ok(self.root.join(path)),
            false => Err(wrong(format!("{out:?} leaves the dataset"))),
        }
    }

    /// The numbers of an episode.
    ///
    /// # Errors
    /// Its file cannot be read, or lacks frames that `meta/` promises.
    pub fn episode(&self, meta: &EpisodeMeta) -> Result<Episode> {
        let numbers = self.numbers(&meta.data)?;
        let mut rows: Vec<usize> =
            (0..numbers.len()).filter(|&row| numbers[row].episode == meta.index).collect();
        rows.sort_by_key(|&row| numbers[row].frame);
        if rows.len() != meta.length {
            let why = format!("episode {} has {} frames, meta says {}", meta.index, rows.len(), meta.length);
            return Err(Error::file(&meta.data, why));
        }
        let of = |row: &usize| &numbers[*row];
        Ok(Episode {
            index: meta.index,
            states: rows.iter().map(|row| of(row).state.clone()).collect(),
            actions: rows.iter().map(|row| of(row).action.clone()).collect(),
            tasks: rows.iter().map(|row| self.tasks.get(&of(row).task?).cloned()).collect(),
            rows,
        })
    }

    fn numbers(&self, path: &Path) -> Result<Rc<Vec<Numbers>>> {
        if let Some((kept, numbers)) = &*self.numbers.borrow()
            && kept == path
        {
            return Ok(numbers.clone());
        }
        let wanted = ["episode_index", "frame_index", "task_index", &self.state, &self.action];
        let table = Table::read(path, &wanted, |_| true)?;
        let row = |row: usize| {
            let lacks = |column: usize| Error::file(path, format!("row {row} has no {}", wanted[column]));
            let width = |column: usize| {
                let values =
                    vector(table.at(row, column)).filter(|values| values.iter().all(|x| x.is_finite()));
                let why =
                    || Error::file(path, format!("{} of row {row} is no vector of numbers", wanted[column]));
                values.ok_or_else(why)
            };
            Ok(Numbers {
                episode: index(table.at(row, 0)).ok_or_else(|| lacks(0))?,
                frame: index(table.at(row, 1)).ok_or_else(|| lacks(1))?,
                task: index(table.at(row, 2)),
                state: width(3)?,
                action: width(4)?,
            })
        };
        let numbers: Rc<Vec<Numbers>> = Rc::new((0..table.len()).map(row).collect::<Result<_>>()?);
        *self.numbers.borrow_mut() = Some((path.to_owned(), numbers.clone()));
        Ok(numbers)
    }

    /// Some frames of an episode, of one camera. `ffmpeg` is needed for videos only.
    ///
    /// # Errors
    /// A file cannot be read or decoded, or has fewer frames.
    pub fn pictures(
        &self,
        meta: &EpisodeMeta,
        episode: &Episode,
        camera: &Camera,
        frames: &[usize],
        ffmpeg: Option<&Ffmpeg>,
    ) -> Result<Vec<Frame>> {
        if !camera.is_video {
            return self.images(meta, episode, camera, frames);
        }
        let Some((path, from)) = meta.videos.get(&camera.key) else {
            return Err(Error::Missing(format!("episode {} has no video of {}", meta.index, camera.key)));
        };
        let ffmpeg = ffmpeg.ok_or_else(|| Error::Video(Ffmpeg::MISSING.into()))?;
        ffmpeg.frames(path, *from, self.info.fps, frames)
    }

    fn images(
        &self,
        meta: &EpisodeMeta,
        episode: &Episode,
        camera: &Camera,
        frames: &[usize],
    ) -> Result<Vec<Frame>> {
        let rows: Vec<usize> = frames.iter().filter_map(|frame| episode.rows.get(*frame).copied()).collect();
        let table = Table::read(&meta.data, &[&camera.key], |row| rows.contains(&row))?;
        // The table keeps the order of the file.
        let mut order = rows.clone();
        order.sort_unstable();
        order.dedup();
        let decode = |row: &usize| {
            let at = order.binary_search(row).ok().filter(|at| *at < table.len());
            let bytes = at.and_then(|at| image_bytes(table.at(at, 0)));
            let why = |why: String| Error::file(&meta.data, format!("{} of row {row}: {why}", camera.key));
            let bytes = bytes.ok_or_else(|| why("no bytes of an image".into()))?;
            let rgb = image::load_from_memory(bytes).map_err(|e| why(e.to_string()))?.into_rgb8();
            let (width, height) = rgb.dimensions();
            Ok(Frame { height: height as usize, width: width as usize, rgb: rgb.into_raw() })
        };
        rows.iter().map(decode).collect()
    }
}

fn whole(line: &Value, key: &str) -> Option<usize> {
    line.get(key).and_then(Value::as_u64).and_then(|n| usize::try_from(n).ok())
}

/// All parquet files below a directory.
fn collect(dir: &Path, out: &mut Vec<PathBuf>) -> Result<()> {
    for entry in std::fs::read_dir(dir).map_err(|e| Error::file(dir, e))? {
        let path = entry.map_err(|e| Error::file(dir, e))?.path();
        if path.is_dir() {
            collect(&path, out)?;
        } else if path.extension().is_some_and(|extension| extension == "parquet") {
            out.push(path);
        }
    }
    Ok(())
}
