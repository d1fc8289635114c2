//! Opens a checkpoint: maps `model.safetensors`, gives every tensor its canonical name, and checks names, shapes
//! and formats against the table of [`weights`](crate::weights) before anything is loaded.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pi0_device::{Bytes, Dtype, MappedFile, TensorSource};
use safetensors::SafeTensors;
use safetensors::tensor::Dtype as StoredDtype;

use crate::error::SHOWN;
use crate::weights::{EMBED, LM_HEAD, expected_tensors};
use crate::{Config, Kind, ModelError};

/// A checked checkpoint: its configuration and every tensor of the network, still in the mapped file.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// Sizes and schedule.
    pub config: Config,
    /// The weights file.
    pub path: PathBuf,
    tensors: BTreeMap<String, TensorSource>,
}

/// A tensor as stored, before its name is known to belong to the network.
struct Stored {
    original: String,
    dtype: StoredDtype,
    shape: Vec<usize>,
    range: std::ops::Range<usize>,
}

impl Checkpoint {
    /// Opens `dir`. Reads the configuration and the file's header; of the weights nothing is touched.
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        let path = dir.join("model.safetensors");
        if !dir.join("config.json").exists() || !path.exists() {
            // What is wrong with the directory, in the configuration's words.
            Config::load(dir, Kind::Pi0)?;
        }
        if dir.join("adapter_config.json").exists() && !path.exists() {
            return Err(ModelError::config(dir, "is a PEFT adapter; merge it into its base model first"));
        }
        let file = MappedFile::open(&path).map_err(|e| ModelError::Read { path: path.clone(), source: e })?;
        let stored = read_header(&file, &path)?;
        // Tensors of no network of the family are listed as missing and unexpected, under what the configuration says.
        let kind = Kind::of_tensors(stored.iter().map(|s| s.original.as_str()));
        let config = match kind {
            Some(kind) => Config::load(dir, kind)?,
            None => Config::load(dir, Kind::Pi0).or_else(|_| Config::load(dir, Kind::Pi05))?,
        };
        let tensors = check(&config, stored, &file).map_err(|faults| match faults {
            Faults::Refused(what) => ModelError::config(&path, what),
            Faults::Listed(faults) => ModelError::Tensors { path: path.clone(), faults },
        })?;
        Ok(Self { config, path, tensors })
    }

    /// Tensors that a program made, in the table's own names.
    pub fn from_tensors(config: Config, tensors: Vec<TensorSource>) -> Result<Self, ModelError> {
        let tensors: BTreeMap<_, _> = tensors.into_iter().map(|t| (t.name.clone(), t)).collect();
        let path = PathBuf::from("weights in memory");
        let faults: Vec<_> = expected_tensors(&config)
            .into_iter()
            .filter(|(name, shape)| tensors.get(name).is_none_or(|t| t.shape != *shape))
            .map(|(name, shape)| format!("{name} {shape:?} is missing or has another shape"))
            .collect();
        if faults.is_empty() {
            Ok(Self { config, path, tensors })
        } else {
            Err(ModelError::Tensors { path, faults })
        }
    }

    /// A tensor under its canonical name (openpi's, without prefix).
    ///
    /// # Panics
    /// If the network has no such tensor: opening checked that every one is there.
    pub fn tensor(&self, name: &str) -> TensorSource {
        self.tensors.get(name).unwrap_or_else(|| panic!("{name} is not in the table of weights")).clone()
    }

    /// All tensors of the network, by name.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorSource> {
        self.tensors.values()
    }

    /// Number of parameters.
    pub fn parameters(&self) -> u64 {
        self.tensors.values().map(|t| (t.bytes().len() / t.dtype.size()) as u64).sum()
    }

    /// Bytes stored, by format.
    pub fn bytes_by_dtype(&self) -> BTreeMap<Dtype, u64> {
        let mut bytes = BTreeMap::new();
        for t in self.tensors.values() {
            *bytes.entry(t.dtype).or_default() += t.bytes().len() as u64;
        }
        bytes
    }

    /// The first tensor that holds NaN or infinity, and where. Reads everything: for explaining a failure.
    pub fn find_not_finite(&self) -> Option<(String, usize)> {
        let mut chunk = vec![0.0; 1 << 16];
        for t in self.tensors.values() {
            let count = t.rows() * t.cols();
            for start in (0..count).step_by(chunk.len()) {
                let part = &mut chunk[..(count - start).min(1 << 16)];
                t.read(start, part);
                if let Some(i) = part.iter().position(|x| !x.is_finite()) {
                    return Some((t.name.clone(), start + i));
                }
            }
            t.release();
        }
        None
    }
}

/// Reads and checks a safetensors header: lengths, offsets, overlaps, formats.
fn read_header(file: &MappedFile, path: &Path) -> Result<Vec<Stored>, ModelError> {
    let damaged = |what: String| ModelError::Damaged { path: path.into(), what };
    let bytes = file.bytes();
    let tensors = SafeTensors::deserialize(bytes).map_err(|e| {
        let size = bytes.len();
        damaged(format!("{e} (the file has {size} bytes; if a download was cut short, fetch it again)"))
    })?;
    let base = bytes.as_ptr() as usize;
    Ok(tensors
        .iter()
        .map(|(name, view)| {
            let start = view.data().as_ptr() as usize - base;
            Stored {
                original: name.to_string(),
                dtype: view.dtype(),
                shape: view.shape().to_vec(),
                range: start..start + view.data().len(),
            }
        })
        .collect())
}

/// The name of the table for a stored name: prefixes stripped, older spellings replaced.
fn canonical(name: &str, kind: Kind) -> String {
    const P: &str = "paligemma_with_expert.paligemma.";
    let name = name.replace("._orig_mod", "");
    let mut name = name.strip_prefix("model.").unwrap_or(&name).to_string();
    // lerobot up to 0.3.
    for (old, new) in [
        ("language_model.lm_head.", "lm_head."),
        ("language_model.model.", "model.language_model."),
        ("vision_tower.", "model.vision_tower."),
        ("multi_modal_projector.", "model.multi_modal_projector."),
    ] {
        if let Some(rest) = name.strip_prefix(P).and_then(|n| n.strip_prefix(old)) {
            name = format!("{P}{new}{rest}");
            break;
        }
    }
    // Either network's time layers under the other's name.
    let (from, to) = match kind {
        Kind::Pi0 => ("time_mlp_", "action_time_mlp_"),
        Kind::Pi05 => ("action_time_mlp_", "time_mlp_"),
    };
    for side in ["in", "out"] {
        if let Some(rest) = name.strip_prefix(&format!("{from}{side}.")) {
            name = format!("{to}{side}.{rest}");
        }
    }
    name
}

/// Tensors that checkpoints carry and the network does not use.
fn unused(name: &str, kind: Kind) -> bool {
    name == "paligemma_with_expert.gemma_expert.lm_head.weight"
        // lerobot leaves these of π0 out when it loads π0.5.
        || kind == Kind::Pi05 && name.starts_with("state_proj.")
        || ["normalize_inputs.", "normalize_targets.", "unnormalize_outputs."]
            .iter()
            .any(|p| name.starts_with(p))
}

enum Faults {
    /// Another kind of checkpoint altogether.
    Refused(String),
    /// Every single fault.
    Listed(Vec<String>),
}

fn check(
    config: &Config,
    stored: Vec<Stored>,
    file: &Arc<MappedFile>,
) -> Result<BTreeMap<String, TensorSource>, Faults> {
    let names: Vec<String> = stored.iter().map(|s| canonical(&s.original, config.kind)).collect();
    let any = |part: &str| names.iter().any(|n| n.contains(part));
    let second_time = names.iter().find(|n| {
        let top = n.split('.').next().unwrap_or_default();
        top.contains("time") && !["time_mlp_in", "time_mlp_out"].contains(&top.trim_start_matches("action_"))
    });
    if let Some(name) = second_time {
        return Err(Faults::Refused(format!(
            "has {name}: a network with another time input (as distilled ones with two times), not one of {}",
            config.kind
        )));
    }
    if any("lora_") {
        return Err(Faults::Refused("holds LoRA factors; merge them into the weights first".into()));
    }
    if any("proprio_history_proj") {
        return Err(Faults::Refused("uses proprioceptive memory, which is not supported".into()));
    }

    let mut faults = Vec::new();
    let mut found: BTreeMap<String, Stored> = BTreeMap::new();
    let tied = !names.iter().any(|n| n == EMBED);
    for (name, s) in names.into_iter().zip(stored) {
        let name = match name.as_str() {
            LM_HEAD if tied => EMBED.to_string(),
            LM_HEAD => continue,
            _ if unused(&name, config.kind) => continue,
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
            StoredDtype::F32 => Dtype::F32,
            StoredDtype::BF16 => Dtype::Bf16,
            StoredDtype::F16 => Dtype::F16,
            other => {
                faults
                    .push(format!("{} is stored as {other:?}; F32, BF16 and F16 are supported", s.original));
                continue;
            }
        };
        if s.shape != shape {
            faults.push(format!("{} has shape {:?}, wanted {shape:?}", s.original, s.shape));
            continue;
        }
        match TensorSource::new(s.original, dtype, shape, Bytes::Mapped(file.clone(), s.range)) {
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
    if faults.is_empty() { Ok(tensors) } else { Err(Faults::Listed(faults)) }
}

/// `; nearest: NAME`, if one of `candidates` is alike.
fn nearest<'a>(name: &str, candidates: impl Iterator<Item = &'a String>) -> String {
    candidates
        .map(|c| (strsim::normalized_levenshtein(name, c), c))
        .filter(|(likeness, _)| *likeness > 0.8)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map_or(String::new(), |(_, c)| format!("; nearest: {c}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_spellings_lead_to_one_name() {
        let v = "paligemma_with_expert.paligemma.model.vision_tower.vision_model.post_layernorm.bias";
        for (stored, name) in [
            (v, v),
            ("model.paligemma_with_expert.paligemma.vision_tower.vision_model.post_layernorm.bias", v),
            (
                "model.paligemma_with_expert._orig_mod.paligemma.model.vision_tower.vision_model.post_layernorm.bias",
                v,
            ),
            ("model.paligemma_with_expert.paligemma.language_model.lm_head.weight", LM_HEAD),
            ("paligemma_with_expert.paligemma.language_model.model.embed_tokens.weight", EMBED),
            ("model.time_mlp_in.weight", "action_time_mlp_in.weight"),
            ("model.state_proj.bias", "state_proj.bias"),
        ] {
            assert_eq!(canonical(stored, Kind::Pi0), name);
        }
        assert_eq!(canonical("model.action_time_mlp_out.bias", Kind::Pi05), "time_mlp_out.bias");
    }
}
