//! Normalization as lerobot configures it: a mode and statistics for each feature.

use std::collections::HashMap;
use std::path::Path;

use serde::Deserialize;

use super::config::Feature;
use super::processors::Step;
use super::{ACTION, unsupported};
use crate::files::{Ordered, Vectors, inside, read_vectors};
use crate::pipeline::{Formula, Normalizer, Stats};
use crate::{Error, Result};

/// torch's default where a step does not say.
pub(super) const EPS: f64 = 1e-8;

#[derive(Deserialize)]
pub(super) struct NormalizerConfig {
    pub(super) eps: Option<f64>,
    #[serde(default)]
    pub(super) features: Ordered<Feature>,
    #[serde(default)]
    pub(super) norm_map: HashMap<String, String>,
    pub(super) normalize_observation_keys: Option<Vec<String>>,
}

impl NormalizerConfig {
    pub(super) fn mode(&self, kind: &str) -> &str {
        self.norm_map.get(kind).map_or("IDENTITY", |mode| mode)
    }

    pub(super) fn is_identity(&self, kind: &str) -> bool {
        self.mode(kind) == "IDENTITY"
    }
}

/// Statistics of a step, from its file.
pub(super) fn stats_of(directory: &Path, step: &Step, path: &Path) -> Result<Vectors> {
    match &step.state_file {
        Some(name) => read_vectors(&inside(directory, name, path)?),
        None => Ok(Vectors::new()),
    }
}

/// Images are never normalized in π0; a checkpoint that wants it would be run wrongly.
pub(super) fn refuse_visual(path: &Path, config: &NormalizerConfig, stats: &Vectors) -> Result<()> {
    let visual = config.features.0.iter().filter(|(_, feature)| feature.kind == "VISUAL");
    let mut with_stats = visual.filter(|(key, _)| stats.contains_key(&format!("{key}.mean")));
    if !config.is_identity("VISUAL") && with_stats.next().is_some() {
        let what = format!("{} normalization of images", config.mode("VISUAL"));
        return Err(unsupported(path, &what, "π0 takes them as they are"));
    }
    Ok(())
}

pub(super) fn normalizer(
    path: &Path,
    config: &NormalizerConfig,
    stats: &Vectors,
    key: &str,
    kind: &str,
) -> Result<Option<Normalizer>> {
    let eps = config.eps.unwrap_or(EPS);
    if !(0.0..1.0).contains(&eps) {
        return Err(Error::format(path, format!("eps is {eps}")));
    }
    make_normalizer(
        path,
        config.mode(kind),
        eps,
        key,
        |stat| stats.get(&format!("{key}.{stat}")),
        stats.keys(),
    )
}

/// The normalization of feature `key` in a mode, if there are statistics of it.
pub(super) fn make_normalizer<'a>(
    path: &Path,
    mode: &str,
    eps: f64,
    key: &str,
    stat: impl Fn(&str) -> Option<&'a Vec<f64>>,
    names: impl Iterator<Item = &'a String>,
) -> Result<Option<Normalizer>> {
    let (formula, [a, b]) = match mode {
        "IDENTITY" => return Ok(None),
        "MEAN_STD" => (Formula::LerobotMeanStd, ["mean", "std"]),
        "MIN_MAX" => (Formula::LerobotRange, ["min", "max"]),
        "QUANTILES" => (Formula::LerobotRange, ["q01", "q99"]),
        "QUANTILE10" => (Formula::LerobotRange, ["q10", "q90"]),
        other => {
            return Err(unsupported(
                path,
                &format!("normalization mode {other:?}"),
                "lerobot does not have it",
            ));
        }
    };
    // A name is `<feature>.<stat>`, split at the last dot.
    if !names.into_iter().any(|name| name.rsplit_once('.').is_some_and(|(feature, _)| feature == key)) {
        return Ok(None);
    }
    let missing = |stat: &str| Error::format(path, format!("{mode} normalization of {key} needs its {stat}"));
    let stats = Stats {
        a: stat(a).ok_or_else(|| missing(a))?.clone(),
        b: stat(b).ok_or_else(|| missing(b))?.clone(),
    };
    stats.check([a, b]).map_err(|why| Error::format(path, format!("statistics of {key}: {why}")))?;
    Ok(Some(Normalizer { formula, stats, eps }))
}

pub(super) fn fits(path: &Path, normalizer: &Normalizer, width: usize) -> Result<()> {
    match normalizer.needs_width() {
        Some(got) if got != width => Err(Error::format(
            path,
            format!("statistics of {ACTION} have {got} values, actions have {width}"),
        )),
        _ => Ok(()),
    }
}
