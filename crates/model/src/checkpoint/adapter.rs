//! PEFT adapters: `W + scale · B A`, added in f32 when a weight is loaded.

use std::collections::{BTreeMap, BTreeSet};
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use pi0_device::{Buffer, Bytes, Dtype, Lazy, MakeBytes, TensorSource};
use serde::{Deserialize, Deserializer};
use serde_json::Value;

use super::{names, stored};
use crate::config::read_json;
use crate::{Kind, ModelError};

/// Name of an adapter's configuration.
pub(super) const CONFIG: &str = "adapter_config.json";
const WEIGHTS: &str = "adapter_model.safetensors";
/// What older releases of PEFT wrote instead.
const PICKLED: &str = "adapter_model.bin";

#[derive(Deserialize)]
struct AdapterConfig {
    peft_type: Option<String>,
    #[serde(default)]
    lora_alpha: Option<f64>,
    /// Rank, where no pattern says otherwise.
    #[serde(default)]
    r: Option<f64>,
    #[serde(default)]
    rank_pattern: Value,
    #[serde(default, deserialize_with = "or_none")]
    alpha_pattern: BTreeMap<String, f64>,
    #[serde(default)]
    use_rslora: bool,
    #[serde(default)]
    use_dora: bool,
    #[serde(default)]
    fan_in_fan_out: bool,
    #[serde(default)]
    init_lora_weights: Value,
}

/// PEFT reads `null` as no pattern.
fn or_none<'de, D: Deserializer<'de>>(from: D) -> Result<BTreeMap<String, f64>, D::Error> {
    Ok(Option::deserialize(from)?.unwrap_or_default())
}

impl AdapterConfig {
    /// The rank of every module, where one is said.
    fn rank(&self) -> Option<f64> {
        let patterns = self.rank_pattern.as_object().is_some_and(|patterns| !patterns.is_empty());
        self.r.filter(|_| !patterns)
    }

    /// What an adapter does that is not done here.
    fn unsupported(&self) -> Option<String> {
        let kind = self.peft_type.as_deref().unwrap_or("none");
        if !kind.eq_ignore_ascii_case("lora") {
            return Some(format!("is of the kind {kind}; LoRA is supported"));
        }
        for (on, what) in [(self.use_dora, "use_dora"), (self.fan_in_fan_out, "fan_in_fan_out")] {
            if on {
                return Some(format!(
                    "sets {what}, which is not supported; merge it with PEFT (merge_and_unload)"
                ));
            }
        }
        // These change the base weights when training begins.
        let start = self.init_lora_weights.as_str().unwrap_or_default().to_lowercase();
        if ["pissa", "olora", "loftq", "corda"].iter().any(|s| start.starts_with(s)) {
            return Some(format!(
                "was started with {start}, which changes the base as well; merge it with PEFT (merge_and_unload)"
            ));
        }
        None
    }

    /// What the product of a module's factors is multiplied with. Patterns are the ends of modules' names.
    fn scale(&self, module: &str, rank: usize) -> Option<f64> {
        let mut special = self.alpha_pattern.iter().filter(|(key, _)| {
            module == key.as_str()
                || module.strip_suffix(key.as_str()).is_some_and(|rest| rest.ends_with('.'))
        });
        let alpha = special.next().map(|(_, alpha)| *alpha).or(self.lora_alpha)?;
        let rank = if self.use_rslora { (rank as f64).sqrt() } else { rank as f64 };
        Some(alpha / rank)
    }
}

/// A module's factors while they are collected.
#[derive(Default)]
struct Pair {
    module: String,
    a: Option<TensorSource>,
    b: Option<TensorSource>,
}

/// Adds the adapter in `dir` to the weights; the names of those that it changes.
pub(super) fn add(
    tensors: &mut BTreeMap<String, TensorSource>,
    dir: &Path,
    kind: Kind,
) -> Result<BTreeSet<String>, ModelError> {
    let path = dir.join(CONFIG);
    let config: AdapterConfig =
        serde_json::from_value(read_json(&path)?).map_err(|e| ModelError::config(&path, e.to_string()))?;
    if let Some(what) = config.unsupported() {
        return Err(ModelError::config(&path, what));
    }
    // Keys of patterns are regular expressions; plain names are all that is certain.
    let odd =
        config.alpha_pattern.keys().find(|k| k.contains(['*', '+', '(', '[', '|', '^', '$', '\\', '?']));
    if let Some(key) = odd {
        return Err(ModelError::config(&path, format!("has the alpha_pattern {key:?}; merge it with PEFT")));
    }
    let path = dir.join(WEIGHTS);
    if !path.exists() && dir.join(PICKLED).exists() {
        let what = format!(
            "has {PICKLED}, weights in Python's pickle format, and no {WEIGHTS}: save the adapter again with PEFT \
             (save_pretrained, safe_serialization=True)"
        );
        return Err(ModelError::config(dir, what));
    }
    let mut pairs: BTreeMap<String, Pair> = BTreeMap::new();
    let mut whole = Vec::new();
    let mut faults = Vec::new();
    for s in stored::read_file(&path)? {
        let dtype = match s.dtype {
            Ok(dtype) => dtype,
            Err(other) => {
                faults.push(format!("{} is stored as {other}; F32, BF16 and F16 are supported", s.original));
                continue;
            }
        };
        let source = TensorSource::new(s.original.clone(), dtype, s.shape, s.bytes)?;
        let factor = ["lora_A", "lora_B"]
            .into_iter()
            .find_map(|f| Some((f, s.original.split_once(&format!(".{f}"))?.0)));
        match factor {
            Some((factor, module)) => {
                let name = names::of_kind(names::canonical(&format!("{module}.weight")), kind);
                let pair = pairs.entry(name).or_default();
                pair.module = module.into();
                let slot = if factor == "lora_A" { &mut pair.a } else { &mut pair.b };
                if slot.replace(source).is_some() {
                    faults.push(format!("{} is there twice", s.original));
                }
            }
            None if s.original.contains("lora_") => {
                faults.push(format!("{} is no factor of a linear layer; merge it with PEFT", s.original));
            }
            None => whole.push((names::of_kind(s.name, kind), source)),
        }
    }
    let mut changed = BTreeSet::new();
    for (name, pair) in pairs {
        let (Some(a), Some(b)) = (pair.a, pair.b) else {
            faults.push(format!("{} has one factor of two", pair.module));
            continue;
        };
        let Some(base) = tensors.get(&name) else {
            faults.push(format!("{}: the network has no such layer", pair.module));
            continue;
        };
        let [out, inputs] = [base.shape[0], base.shape[1..].iter().product()];
        let fits = matches!((&a.shape[..], &b.shape[..]), ([r, i], [o, s]) if (*i, *o) == (inputs, out) && r == s && *r > 0);
        if !fits {
            faults.push(format!(
                "{}: factors {:?} and {:?} of {:?}",
                pair.module, a.shape, b.shape, base.shape
            ));
            continue;
        }
        if let Some(rank) = config.rank().filter(|rank| *rank != a.shape[0] as f64) {
            faults.push(format!("{}: factors of rank {}, {CONFIG} says r {rank}", pair.module, a.shape[0]));
            continue;
        }
        let Some(scale) = config.scale(&pair.module, a.shape[0]) else {
            return Err(ModelError::config(&dir.join(CONFIG), "has no lora_alpha"));
        };
        let merged = Arc::new(Merged { base: base.clone(), a, b, scale });
        let shape = base.shape.clone();
        let source = TensorSource::new(base.name.clone(), Dtype::F32, shape, Bytes::Lazy(Lazy::new(merged)))?;
        tensors.insert(name.clone(), source);
        changed.insert(name);
    }
    // Modules that were trained as a whole.
    for (name, source) in whole {
        match tensors.get(&name) {
            Some(base) if base.shape == source.shape => {
                tensors.insert(name.clone(), source);
                changed.insert(name);
            }
            Some(base) => {
                faults.push(format!("{} has shape {:?}, wanted {:?}", source.name, source.shape, base.shape));
            }
            None if names::unused(&name, kind) => {}
            None => faults.push(format!("{}: the network has no such tensor", source.name)),
        }
    }
    if faults.is_empty() && changed.is_empty() {
        faults
            .push("it holds no factors (lora_A, lora_B) and no modules that were trained as a whole".into());
    }
    if faults.is_empty() { Ok(changed) } else { Err(ModelError::Tensors { path, faults }) }
}

/// A weight and what is added to it.
#[derive(Debug)]
struct Merged {
    base: TensorSource,
    a: TensorSource,
    b: TensorSource,
    scale: f64,
}

impl MakeBytes for Merged {
    fn count(&self) -> usize {
        self.base.count() * Dtype::F32.size()
    }

    fn make(&self) -> Result<Buffer, String> {
        let base = self.base.unfetched();
        base.fetch().map_err(|e| e.to_string())?;
        let (rank, inputs) = (self.a.rows(), self.a.cols());
        let a: Vec<f64> = self.a.to_f32().into_iter().map(f64::from).collect();
        let b = self.b.to_f32();
        let mut out = Buffer::zeroed(self.count())
            .ok_or_else(|| format!("{} bytes do not fit into memory", self.count()))?;
        let threads = std::thread::available_parallelism().map_or(1, usize::from);
        let rows = b.len() / rank;
        let each = rows.div_ceil(threads).max(1);
        let part = |first: usize, b: &[f32], out: &mut [u8]| {
            let mut row = vec![0.0f32; inputs];
            for (i, (factors, out)) in
                (first..).zip(b.chunks_exact(rank).zip(out.chunks_exact_mut(4 * inputs)))
            {
                base.read(i * inputs, &mut row);
                add_product(&mut row, factors, &a, 0..inputs, self.scale);
                for (out, x) in out.chunks_exact_mut(4).zip(&row) {
                    out.copy_from_slice(&x.to_le_bytes());
                }
            }
        };
        std::thread::scope(|scope| {
            let parts = b.chunks(each * rank).zip(out.chunks_mut(4 * each * inputs)).enumerate();
            for (n, (b, out)) in parts {
                let part = &part;
                scope.spawn(move || part(n * each, b, out));
            }
        });
        base.release();
        Ok(out)
    }
}

/// Values of a row that are summed up side by side.
const LANES: usize = 16;

/// `row += scale · factors · matrix`, of whose columns `columns` count; summed in f64 and rounded once.
pub(super) fn add_product(
    row: &mut [f32],
    factors: &[f32],
    matrix: &[f64],
    columns: Range<usize>,
    scale: f64,
) {
    let width = matrix.len() / factors.len().max(1);
    for (i, values) in row.chunks_mut(LANES).enumerate() {
        let mut sums = [0.0f64; LANES];
        let at = columns.start + i * LANES;
        for (&factor, line) in factors.iter().zip(matrix.chunks_exact(width.max(1))) {
            let factor = f64::from(factor);
            let line = &line[at..at + values.len()];
            match line.first_chunk::<LANES>() {
                Some(line) => sums.iter_mut().zip(line).for_each(|(sum, x)| *sum += factor * x),
                None => sums.iter_mut().zip(line).for_each(|(sum, x)| *sum += factor * x),
            }
        }
        for (value, sum) in values.iter_mut().zip(sums) {
            *value = (f64::from(*value) + scale * sum) as f32;
        }
    }
}
