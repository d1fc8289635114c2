//! Normalization as lerobot configures it: a mode for each kind of features.

use std::collections::HashMap;
use std::path::Path;

use serde::Deserialize;

use super::config::{Feature, of_kind};
use super::unsupported;
use crate::files::Ordered;
use crate::pipeline::{Formula, Normalizer};
use crate::statistics::Statistics;
use crate::{Error, Result};

/// torch's default where a step does not say.
pub(super) const EPS: f64 = 1e-8;

/// A normalizing step.
#[derive(Deserialize)]
pub(super) struct NormalizerConfig {
    eps: Option<f64>,
    #[serde(default)]
    pub features: Ordered<Feature>,
    #[serde(default)]
    norm_map: HashMap<String, String>,
    pub normalize_observation_keys: Option<Vec<String>>,
}

impl NormalizerConfig {
    pub fn mode(&self, kind: &str) -> &str {
        self.norm_map.get(kind).map_or("IDENTITY", |mode| mode)
    }

    pub fn eps(&self, path: &Path) -> Result<f64> {
        match self.eps.unwrap_or(EPS) {
            eps if (0.0..1.0).contains(&eps) => Ok(eps),
            eps => Err(Error::format(path, format!("eps is {eps}"))),
        }
    }

    /// Images are never normalized in π0; a checkpoint that wants it would be run wrongly.
    pub fn refuse_visual(&self, path: &Path, statistics: Option<&Statistics>) -> Result<()> {
        let mode = self.mode("VISUAL");
        let with_stats =
            |key: &String| statistics.is_some_and(|s| s.vectors.contains_key(&format!("{key}.mean")));
        if mode != "IDENTITY" && of_kind(&self.features, "VISUAL").any(|(key, _)| with_stats(key)) {
            let what = format!("{mode} normalization of images");
            return Err(unsupported(path, &what, "π0 takes them as they are"));
        }
        Ok(())
    }
}

/// The normalization of `key` in a mode: none for the identity; within, a sentence where statistics are missing.
pub(super) fn normalizer(
    path: &Path,
    mode: &str,
    eps: f64,
    key: &str,
    statistics: Option<&Statistics>,
) -> Result<Option<Result<Normalizer, String>>> {
    let (formula, names) = match mode {
        "IDENTITY" => return Ok(None),
        "MEAN_STD" => (Formula::LerobotMeanStd, ["mean", "std"]),
        "MIN_MAX" => (Formula::LerobotRange, ["min", "max"]),
        "QUANTILES" => (Formula::LerobotRange, ["q01", "q99"]),
        "QUANTILE10" => (Formula::LerobotRange, ["q10", "q90"]),
        other => {
            let what = format!("normalization mode {other:?}");
            return Err(unsupported(path, &what, "lerobot does not have it"));
        }
    };
    let made = match statistics {
        Some(statistics) => statistics.normalizer(key, formula, names, eps),
        None => Err(format!("the checkpoint has no statistics of {key} ({mode})")),
    };
    Ok(Some(made))
}
