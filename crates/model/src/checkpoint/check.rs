//! Checks stored tensors against the table of weights: all faults at once.

use std::collections::BTreeMap;
use std::path::Path;

use pi0_device::TensorSource;

use super::names;
use super::stored::Stored;
use crate::error::SHOWN;
use crate::weights::{EMBED, LM_HEAD, expected_tensors};
use crate::{Config, ModelError};

/// The network's tensors by name.
pub(super) fn check(
    config: &Config,
    stored: Vec<Stored>,
    path: &Path,
) -> Result<BTreeMap<String, TensorSource>, ModelError> {
    let refused = |what: &str| Err(ModelError::config(path, what));
    let any = |part: &str| stored.iter().any(|s| s.name.contains(part));
    let second_time = stored.iter().find(|s| {
        let top = s.name.split('.').next().unwrap_or_default();
        top.contains("time") && !["time_mlp_in", "time_mlp_out"].contains(&top.trim_start_matches("action_"))
    });
    if let Some(s) = second_time {
        return refused(&format!(
            "has {}: a network with another time input (as distilled ones with two times), not one of {}",
            s.name, config.kind
        ));
    }
    if any("lora_") {
        return refused(
            "holds LoRA factors among the weights, and how strongly they count stands nowhere: merge them where \
             they were trained (PEFT: merge_and_unload), or give base and adapter apart with --adapter DIR",
        );
    }
    if any("proprio_history_proj") {
        return refused("uses proprioceptive memory, which is not supported");
    }

    let mut faults = Vec::new();
    let mut found: BTreeMap<String, Stored> = BTreeMap::new();
    let tied = !stored.iter().any(|s| s.name == EMBED);
    for s in stored {
        let name = names::of_kind(s.name.clone(), config.kind);
        let name = match name.as_str() {
            LM_HEAD if tied => EMBED.to_string(),
            LM_HEAD if config.answer.as_ref().is_none_or(|answer| answer.tied) => continue,
            _ if names::unused(&name, config.kind) => continue,
            _ => name,
        };
        if let Some(twin) = found.get(&name) {
            faults.push(format!("{} and {} are the same tensor, {name}", twin.original, s.original));
        }
        found.insert(name, s);
    }
    let expected = expected_tensors(config);
    let mut tensors = BTreeMap::new();
    let mut missing = Vec::new();
    for (name, shape) in expected {
        let Some(s) = found.remove(&name) else {
            missing.push((name, shape));
            continue;
        };
        let dtype = match s.dtype {
            Ok(dtype) => dtype,
            Err(other) => {
                faults.push(format!("{} is stored as {other}; F32, BF16 and F16 are supported", s.original));
                continue;
            }
        };
        if s.shape != shape {
            faults.push(format!("{} has shape {:?}, wanted {shape:?}", s.original, s.shape));
            continue;
        }
        match TensorSource::new(s.original, dtype, shape, s.bytes) {
            Ok(t) => drop(tensors.insert(name, t)),
            Err(e) => faults.push(e.to_string()),
        }
    }
    // Likeness is costly, and only so many faults are shown.
    for (i, (name, shape)) in missing.iter().enumerate() {
        let near = if i < SHOWN { nearest(name, found.keys()) } else { String::new() };
        faults.push(format!("missing {name} {shape:?}{near}"));
    }
    for (i, (name, s)) in found.iter().enumerate() {
        let near = if i < SHOWN { nearest(name, missing.iter().map(|(n, _)| n)) } else { String::new() };
        faults.push(format!("unexpected {} {:?}{near}", s.original, s.shape));
    }
    if faults.is_empty() { Ok(tensors) } else { Err(ModelError::Tensors { path: path.into(), faults }) }
}

/// `; nearest: NAME`, if one of `candidates` is alike.
fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a String>) -> String {
    candidates
        .map(|c| (strsim::normalized_levenshtein(name, c), c))
        .filter(|(likeness, _)| *likeness > 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map_or(String::new(), |(_, c)| format!("; nearest: {c}"))
}
