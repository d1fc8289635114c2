//! Statistics of state and actions, from whichever file holds them: openpi's `norm_stats.json`, a lerobot data set's
//! `meta/stats.json`, the files of lerobot's processors.

use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::files::{Vectors, inside, parse_json, parse_vectors, read_small};
use crate::pipeline::{Formula, Normalizer, Stats};
use crate::{Error, Result};

/// lerobot's names of the two vectors that are normalized; openpi's `state` and `actions` are kept under them too.
pub(crate) const STATE: &str = "observation.state";
pub(crate) const ACTION: &str = "action";

/// What to do where statistics are missing.
pub(crate) const REMEDY: &str = "--stats FILE names them (openpi's norm_stats.json, a lerobot data set or its \
                                 meta/stats.json, a processor file); --raw-units runs without";

/// Who counted, and thus in whose units.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Counted {
    /// openpi: after its transforms, on what the network sees.
    Transformed,
    /// A data set: what the robot recorded.
    Raw,
    /// lerobot's processors: what their steps pass on.
    Processed,
}

/// Vectors such as `observation.state.mean`, with NaN where the file says null.
#[derive(Debug, Clone)]
pub(crate) struct Statistics {
    /// Where they come from.
    pub path: PathBuf,
    pub counted: Counted,
    pub vectors: Vectors,
}

impl Statistics {
    /// Reads a file, or finds it in a folder: a data set, or one with a `norm_stats.json`.
    pub fn open(path: &Path) -> Result<Self> {
        const IN_FOLDERS: [&str; 4] =
            ["norm_stats.json", "meta/stats.json", "stats.json", "policy_preprocessor.json"];
        if !path.is_dir() {
            return Self::parse(path, &read_small(path)?);
        }
        let file = IN_FOLDERS.iter().map(|name| path.join(name)).find(|file| file.is_file());
        let file = file.ok_or_else(|| {
            Error::format(path, format!("no statistics in it: none of {}", IN_FOLDERS.join(", ")))
        })?;
        Self::parse(&file, &read_small(&file)?)
    }

    /// Reads the content of a file; `path` is for errors and tells safetensors by its ending.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        if path.extension().is_some_and(|extension| extension == "safetensors") {
            return Ok(Self::processed(path, parse_vectors(path, bytes)?));
        }
        let root: Map<String, Value> = parse_json(path, bytes)?;
        if let Some(steps) = root.get("steps") {
            return Self::of_steps(path, steps);
        }
        let (inner, at) = match root.get("norm_stats") {
            Some(Value::Object(inner)) => (inner, "norm_stats."),
            Some(_) => return Err(Error::format(path, "norm_stats is no object")),
            None => (&root, ""),
        };
        let (counted, names) = match inner.contains_key("state") || inner.contains_key("actions") {
            true => (Counted::Transformed, [("state", STATE), ("actions", ACTION)]),
            false => (Counted::Raw, [(STATE, STATE), (ACTION, ACTION)]),
        };
        if names.iter().all(|(name, _)| !inner.contains_key(*name)) {
            let why = "holds no statistics: neither openpi's norm_stats (`state`, `actions`), nor those of a \
                       lerobot data set (`observation.state`, `action`), nor a processor's steps";
            return Err(Error::format(path, why));
        }
        let mut vectors = Vectors::new();
        for (name, key) in names {
            let Some(entry) = inner.get(name) else { continue };
            let entry = entry
                .as_object()
                .ok_or_else(|| Error::format(path, format!("{at}{name} is no object of statistics")))?;
            for (stat, values) in entry {
                let read = |why| Error::format(path, format!("{at}{name}.{stat}{why}"));
                if let Some(values) = vector(values).map_err(read)? {
                    vectors.insert(format!("{key}.{stat}"), values);
                }
            }
        }
        // Nothing is normalized with the colours of images; they tell cameras apart.
        for (name, entry) in inner.iter().filter(|(name, _)| name.starts_with("observation.image")) {
            if let Some(mean) = entry.get("mean").and_then(colour) {
                vectors.insert(format!("{name}.mean"), mean);
            }
        }
        Ok(Self { path: path.into(), counted, vectors })
    }

    /// Those of a processor's step.
    pub fn processed(path: &Path, vectors: Vectors) -> Self {
        Self { path: path.into(), counted: Counted::Processed, vectors }
    }

    /// From the file that the normalizing step of a processor file names.
    fn of_steps(path: &Path, steps: &Value) -> Result<Self> {
        let steps = steps.as_array().map_or(&[][..], Vec::as_slice);
        let normalizes = |step: &&Value| {
            ["normalizer_processor", "unnormalizer_processor"]
                .iter()
                .any(|name| step.get("registry_name").and_then(Value::as_str) == Some(*name))
        };
        let file = steps.iter().find(normalizes).and_then(|step| step.get("state_file")?.as_str());
        let file = file.ok_or_else(|| Error::format(path, "no step in it names a file of statistics"))?;
        let file = inside(path.parent().unwrap_or(Path::new("")), file, path)?;
        Ok(Self::processed(&file, parse_vectors(&file, &read_small(&file)?)?))
    }

    /// Number of values of `key`'s statistics, if there are any.
    pub fn width(&self, key: &str) -> Option<usize> {
        ["mean", "q01", "min", "q10"].iter().find_map(|stat| self.find(key, stat).ok()).map(Vec::len)
    }

    /// The normalization of `key` with these two statistics.
    ///
    /// # Errors
    /// A sentence: which statistics are missing, or make no sense.
    pub fn normalizer(
        &self,
        key: &str,
        formula: Formula,
        names: [&str; 2],
        eps: f64,
    ) -> Result<Normalizer, String> {
        let at = |why: String| format!("{}: {why}", self.path.display());
        let [a, b] = names.map(|name| self.find(key, name));
        let stats = match (a, b) {
            (Ok(a), Ok(b)) => Stats { a: a.clone(), b: b.clone() },
            (Err(why), _) | (_, Err(why)) => return Err(at(why)),
        };
        stats.check(names).map_err(|why| at(format!("statistics of {key}: {why}")))?;
        Ok(Normalizer { formula, stats, eps })
    }

    /// A vector under its own name, or under the only name that ends with it: some tools put the data set's name in
    /// front (`so100.buffer.observation.state.mean`).
    pub fn find(&self, key: &str, stat: &str) -> Result<&Vec<f64>, String> {
        let name = format!("{key}.{stat}");
        if let Some(values) = self.vectors.get(&name) {
            return Ok(values);
        }
        let suffix = format!(".{name}");
        let found: Vec<_> = self.vectors.iter().filter(|(name, _)| name.ends_with(&suffix)).collect();
        match found.as_slice() {
            [(_, values)] => Ok(values),
            [] => {
                let others: Vec<_> =
                    self.vectors.keys().filter(|name| name.contains(key)).map(String::as_str).collect();
                let have = if others.is_empty() {
                    "nothing".into()
                } else {
                    others[..others.len().min(8)].join(", ")
                };
                Err(format!("no {name} (of {key} it has {have})"))
            }
            several => {
                let names: Vec<_> = several.iter().map(|(name, _)| name.as_str()).collect();
                Err(format!("several could be {name}: {}", names.join(", ")))
            }
        }
    }
}

/// A list of numbers, NaN where null; none for what is no vector, such as the statistics of images.
fn vector(values: &Value) -> Result<Option<Vec<f64>>, String> {
    let number = |(i, value): (usize, &Value)| match value {
        Value::Null => Ok(f64::NAN),
        Value::Number(number) => number.as_f64().ok_or_else(|| format!("[{i}] is {number}")),
        Value::Bool(_) | Value::String(_) => Err(format!("[{i}] is {value}, not a number")),
        Value::Array(_) | Value::Object(_) => Err(format!("[{i}] is no number")),
    };
    match values {
        Value::Array(items) if items.iter().any(Value::is_array) => Ok(None),
        Value::Array(items) => items.iter().enumerate().map(number).collect::<Result<_, _>>().map(Some),
        Value::Number(_) => number((0, values)).map(|x| Some(vec![x])),
        _ => Ok(None),
    }
}

/// A data set's mean red, green and blue, `[[[r]], [[g]], [[b]]]`.
fn colour(value: &Value) -> Option<Vec<f64>> {
    let channel = |value: &Value| value.get(0)?.get(0)?.as_f64();
    value.as_array().filter(|channels| channels.len() == 3)?.iter().map(channel).collect()
}

/// What a checkpoint does not say and nobody may guess. A policy with gaps can be inspected but does not run.
#[derive(Debug, Clone, Default, PartialEq)]
pub(crate) struct Gaps {
    /// Statistics that are missing or wrong.
    statistics: Vec<String>,
    /// Questions, each with the options that answer it.
    questions: Vec<String>,
}

impl Gaps {
    /// A normalization of `key`, or a gap; with `raw` a word about it instead.
    pub fn fill(
        &mut self,
        key: &str,
        normalizer: Result<Normalizer, String>,
        raw: bool,
        problems: &mut Vec<String>,
    ) -> Option<Normalizer> {
        match normalizer {
            Ok(normalizer) => {
                let still = normalizer.still();
                if !still.is_empty() {
                    problems.push(format!(
                        "dimensions {still:?} of {key} never moved in training: their low and high statistics are equal, \
                         so the smallest deviation becomes a huge one"
                    ));
                }
                Some(normalizer)
            }
            Err(why) if raw => {
                problems.push(format!("runs on raw units, as asked: {why}"));
                None
            }
            Err(why) => {
                self.statistics.push(why);
                None
            }
        }
    }

    /// Asks something.
    pub fn ask(&mut self, question: String) {
        self.questions.push(question);
    }

    /// All of it in sentences.
    pub fn sentences(mut self) -> Vec<String> {
        self.statistics.dedup();
        let statistics = (!self.statistics.is_empty())
            .then(|| format!("no statistics to normalize with: {}; {REMEDY}", self.statistics.join("; ")));
        statistics.into_iter().chain(self.questions).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn parse(text: &str) -> Result<Statistics> {
        Statistics::parse(Path::new("stats.json"), text.as_bytes())
    }

    #[test]
    fn every_form_is_read() {
        let wrapped = r#"{"norm_stats": {"state": {"mean": [1, null]}, "actions": {"std": [2.5]}}}"#;
        let bare = "\u{feff}{\"state\": {\"mean\": [1, NaN]}, \"actions\": {\"std\": [2.5]}}";
        for text in [wrapped, bare] {
            let stats = parse(text).unwrap();
            assert_eq!(stats.counted, Counted::Transformed);
            assert!(stats.vectors["observation.state.mean"][1].is_nan());
            assert_eq!(stats.vectors["action.std"], [2.5]);
        }
        let dataset = r#"{"observation.state": {"q01": [0], "q99": [1], "count": [7]}, "action": {"min": [-Infinity]},
                          "observation.images.top": {"mean": [[[0.5]], [[0.25]], [[1]]]},
                          "observation.images.depth": {"mean": [[[0.5]]]}, "x": 3}"#;
        let stats = parse(dataset).unwrap();
        assert_eq!(stats.counted, Counted::Raw);
        assert_eq!(stats.width("observation.state"), Some(1));
        assert!(stats.vectors["action.min"][0].is_nan());
        assert_eq!(stats.vectors["observation.images.top.mean"], [0.5, 0.25, 1.0]);
        assert!(!stats.vectors.contains_key("observation.images.depth.mean"));
        for (text, word) in [
            ("{}", "holds no statistics"),
            ("[]", "invalid type"),
            (r#"{"norm_stats": []}"#, "norm_stats is no object"),
            (r#"{"state": 1}"#, "state is no object"),
            (
                r#"{"norm_stats": {"state": {"mean": ["0"]}}}"#,
                "norm_stats.state.mean[0] is \"0\", not a number",
            ),
            (r#"{"steps": [{"registry_name": "normalizer_processor"}]}"#, "no step in it names a file"),
            (
                r#"{"steps": [{"registry_name": "normalizer_processor", "state_file": "../x"}]}"#,
                "plain relative",
            ),
        ] {
            let error = parse(text).unwrap_err().to_string();
            assert!(error.contains(word), "{text}: {error}");
        }
    }

    #[test]
    fn a_prefix_is_read_where_it_is_the_only_one() {
        let vectors = |names: &[&str]| names.iter().map(|name| (name.to_string(), vec![1.0])).collect();
        let one = Statistics::processed(
            Path::new("x"),
            vectors(&["so100.buffer.observation.state.mean", "so100.buffer.observation.state.std"]),
        );
        let make = |s: &Statistics| s.normalizer(STATE, Formula::LerobotMeanStd, ["mean", "std"], 1e-8);
        assert!(make(&one).is_ok());
        let two = Statistics::processed(
            Path::new("x"),
            vectors(&["a.observation.state.mean", "b.observation.state.mean", "a.observation.state.std"]),
        );
        assert!(make(&two).unwrap_err().contains("several could be observation.state.mean: a.obs"));
        let none = Statistics::processed(Path::new("x"), vectors(&["observation.state.q01"]));
        assert_eq!(
            make(&none).unwrap_err(),
            "x: no observation.state.mean (of observation.state it has observation.state.q01)"
        );
    }
}
