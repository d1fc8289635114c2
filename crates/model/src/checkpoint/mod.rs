//! Opens a checkpoint, whichever program wrote it: finds the policy's folder, gives every tensor its canonical name, and
//! checks names, shapes and formats against the table of [`weights`](crate::weights) before anything is loaded.

mod adapter;
mod ahead;
mod check;
mod folder;
mod jax;
mod names;
mod sizes;
mod stored;

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use pi0_device::{Bytes, Dtype, Lazy, Preferred, TensorSource};

use self::ahead::{Ahead, Form, Reading};
use self::folder::{Found, Weights};
use crate::weights::{EMBED, LM_HEAD, expected_tensors};
use crate::{Config, Kind, ModelError};

/// A checked checkpoint: its configuration and every tensor of the network, still in its file.
#[derive(Debug, Clone)]
pub struct Checkpoint {
    /// Sizes and schedule.
    pub config: Config,
    /// The weights: a file, an index of shards, or a `params` directory.
    pub path: PathBuf,
    /// The folder with the configuration, the statistics and the tokenizer: the one that was given, or one below it.
    pub directory: PathBuf,
    /// Where everything was found.
    pub origin: Origin,
    tensors: BTreeMap<String, TensorSource>,
    /// Where tensors are decompressed.
    compressed: Option<Compressed>,
}

/// Tensors that are decompressed when they are wanted.
#[derive(Debug, Clone)]
struct Compressed {
    /// Their names in the order of loading.
    order: Arc<Vec<String>>,
    ahead: Arc<Ahead>,
    /// Of each, the form in which it is wanted.
    forms: Vec<Form>,
    /// Those to which a PEFT adapter is added, which wants them as they are.
    adapted: BTreeSet<String>,
}

/// What was found where: for people.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Origin {
    /// How the weights are stored.
    pub layout: String,
    /// Where sizes, horizon and the like come from.
    pub sizes: String,
    /// What should be known besides, such as which of several folders was taken.
    pub notes: Vec<String>,
}

/// What the user says of a checkpoint.
#[derive(Debug, Clone, Default)]
pub struct OpenOptions {
    /// Sizes of a shrunk network, instead of an `arch.json` beside the weights.
    pub arch: Option<PathBuf>,
    /// A PEFT adapter to add to the weights.
    pub adapter: Option<PathBuf>,
    /// The training configuration that was named: what it says counts where the checkpoint says nothing.
    pub named: Option<NamedConfig>,
}

/// What a training configuration of openpi's says of the network.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedConfig {
    /// Its name.
    pub name: String,
    /// Which network of the family.
    pub kind: Kind,
    /// Actions in one chunk.
    pub horizon: usize,
    /// Width of an action, where the tensors do not show it: of π0-FAST.
    pub action_dim: usize,
    /// Longest prompt, in tokens; none for the network's usual one.
    pub max_tokens: Option<usize>,
}

impl Checkpoint {
    /// Opens the policy in `dir`. Reads the configuration and names and shapes of the tensors; of the weights nothing is
    /// touched.
    pub fn open(dir: &Path) -> Result<Self, ModelError> {
        Self::open_with(dir, &OpenOptions::default())
    }

    /// The same, with what the user says of it.
    pub fn open_with(dir: &Path, options: &OpenOptions) -> Result<Self, ModelError> {
        let Found { directory, weights } = folder::find(dir)?;
        folder::check_links(&directory)?;
        let mut origin = Origin::default();
        if directory != dir {
            origin.notes.push(format!("the policy is {}", directory.display()));
        }
        let (path, stored, heads, ahead) = match weights {
            Weights::Whole(path) => (path.clone(), stored::read_file(&path)?, None, None),
            Weights::Shards(path) => (path.clone(), stored::read_shards(&path)?, None, None),
            Weights::Orbax(path) => {
                let (stored, heads, ahead) = jax::open(&path)?;
                origin.layout = "JAX (Orbax)".into();
                (path, stored, Some(heads), Some(ahead))
            }
        };
        if origin.layout.is_empty() {
            let shards = path.file_name().is_some_and(|name| name == stored::INDEX);
            origin.layout = if shards { "safetensors, in shards" } else { "safetensors" }.into();
        }
        let kind = Kind::of_tensors(stored.iter().map(|s| s.name.as_str()));
        let config_path = directory.join("config.json");
        let mut config = if heads.is_none() && config_path.exists() {
            origin.sizes = "config.json".into();
            if directory.join("arch.json").exists() {
                origin.sizes += " and arch.json";
            }
            // Tensors of no network of the family are listed as missing and unexpected, under what the configuration says.
            match kind {
                Some(kind) => Config::load(&directory, kind)?,
                None => Config::load(&directory, Kind::Pi0)
                    .or_else(|_| Config::load(&directory, Kind::Pi05))
                    .or_else(|_| Config::load(&directory, Kind::Pi0Fast))?,
            }
        } else {
            let kind = kind.ok_or_else(|| {
                let what = "has the tensors of no policy that this program runs (π0, π0.5, π0-FAST)";
                ModelError::config(&path, what)
            })?;
            without_config(&directory, kind, &stored, heads, options, &mut origin)?
        };
        if let Some(arch) = &options.arch {
            config.read_arch(arch)?;
            origin.sizes = format!("{}, given with --arch", arch.display());
            config.check().map_err(|what| ModelError::config(arch, what))?;
        }
        if let Some(answer) = &mut config.answer {
            let stored = |name: &str| stored.iter().any(|s| s.name == name);
            answer.tied = !(stored(EMBED) && stored(LM_HEAD));
        }
        let mut compressed = ahead.map(|ahead| {
            let order =
                stored.iter().take(ahead.count()).map(|s| names::of_kind(s.name.clone(), config.kind));
            let forms = vec![Form::default(); ahead.count()];
            Compressed { order: Arc::new(order.collect()), ahead, forms, adapted: BTreeSet::new() }
        });
        let mut tensors = check::check(&config, stored, &path)?;
        let beside = directory.join(adapter::CONFIG).exists().then(|| directory.clone());
        if let Some(adapter) = options.adapter.clone().or(beside) {
            let changed = adapter::add(&mut tensors, &adapter, config.kind)?;
            let count = changed.len();
            if let Some(compressed) = &mut compressed {
                compressed.adapted = changed;
            }
            origin.notes.push(format!("{count} adapters of {} are added to the weights", adapter.display()));
        }
        Ok(Self { config, path, directory, origin, tensors, compressed })
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
            let (directory, origin) =
                (PathBuf::new(), Origin { layout: "memory".into(), ..Origin::default() });
            Ok(Self { config, path, directory, origin, tensors, compressed: None })
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

    /// Names of all tensors of the network.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.tensors.keys().map(String::as_str)
    }

    /// All tensors of the network, by name.
    pub fn tensors(&self) -> impl Iterator<Item = &TensorSource> {
        self.tensors.values()
    }

    /// The same checkpoint, where compressed tensors come in the form that a device packs fastest.
    pub(crate) fn preferring(&self, preferred: &Preferred) -> Result<Self, ModelError> {
        let mut formed = self.clone();
        let Some(compressed) = formed.compressed.as_mut() else { return Ok(formed) };
        let adapted = &compressed.adapted;
        for (index, name) in compressed.order.iter().enumerate().filter(|(_, name)| !adapted.contains(*name))
        {
            let (form, order) = compressed.ahead.tensors().form(index, preferred);
            let Some(t) = formed.tensors.get_mut(name) else { continue };
            let dtype = if form.round.is_some() { Dtype::Bf16 } else { t.dtype };
            let bytes = Bytes::Lazy(Lazy::new(compressed.ahead.tensor(index, form)));
            *t = TensorSource::new(t.name.clone(), dtype, t.shape.clone(), bytes)?.in_order(order)?;
            compressed.forms[index] = form;
        }
        Ok(formed)
    }

    /// Decompresses tensors on threads of its own as long as the result lives, in the order of loading; none where
    /// they lie in their files as they are. `wanted` says of a name whether it will be loaded.
    pub(crate) fn read_ahead(&self, wanted: impl Fn(&str) -> bool) -> Option<Reading> {
        let compressed = self.compressed.as_ref()?;
        let used = |name: &String| self.tensors.contains_key(name) && wanted(name);
        let forms = compressed.order.iter().zip(&compressed.forms);
        Some(compressed.ahead.start(forms.map(|(name, form)| used(name).then_some(*form)).collect()))
    }

    /// Number of parameters.
    pub fn parameters(&self) -> u64 {
        self.tensors.values().map(|t| t.count() as u64).sum()
    }

    /// Bytes of the values, by format.
    pub fn bytes_by_dtype(&self) -> BTreeMap<Dtype, u64> {
        let mut bytes = BTreeMap::new();
        for t in self.tensors.values() {
            *bytes.entry(t.dtype).or_default() += t.byte_count() as u64;
        }
        bytes
    }

    /// The first tensor that holds NaN or infinity, and where. Reads everything: for explaining a failure.
    pub fn find_not_finite(&self) -> Result<Option<(String, usize)>, ModelError> {
        let mut chunk = vec![0.0; 1 << 16];
        let _reading = self.read_ahead(|_| true);
        for t in self.in_order() {
            let t = t.unfetched();
            t.fetch()?;
            let count = t.rows() * t.cols();
            for start in (0..count).step_by(chunk.len()) {
                let part = &mut chunk[..(count - start).min(1 << 16)];
                t.read(start, part);
                if let Some(i) = part.iter().position(|x| !x.is_finite()) {
                    return Ok(Some((t.name.clone(), start + i)));
                }
            }
            t.release();
        }
        Ok(None)
    }

    /// The tensors in the order in which they are cheapest to read.
    fn in_order(&self) -> Vec<&TensorSource> {
        match &self.compressed {
            Some(c) => c.order.iter().filter_map(|name| self.tensors.get(name)).collect(),
            None => self.tensors.values().collect(),
        }
    }
}

/// The configuration of a checkpoint that has none: sizes from the tensors, the rest from what the user names.
fn without_config(
    directory: &Path,
    kind: Kind,
    stored: &[stored::Stored],
    heads: Option<sizes::Heads>,
    options: &OpenOptions,
    origin: &mut Origin,
) -> Result<Config, ModelError> {
    let arch = directory.join("arch.json");
    let told = options.arch.is_some() || options.named.is_some();
    if heads.is_none() {
        if directory.join("configs.json").exists() {
            let what = "has a configs.json and no config.json: if that is the configuration, rename it";
            return Err(ModelError::config(directory, what));
        }
        // openpi's own training in PyTorch leaves these and no configuration.
        let openpi =
            ["assets", "metadata.pt", "optimizer.pt"].iter().any(|name| directory.join(name).exists());
        if !openpi && !told {
            let what = "has weights and no config.json; if openpi wrote it, name its configuration with --config NAME, \
                        else fetch config.json as well";
            return Err(ModelError::config(directory, what));
        }
    }
    let arch = Some(arch).filter(|arch| arch.exists());
    let known = arch.is_some() || options.arch.is_some();
    let mut config =
        sizes::of_tensors(kind, stored, heads, known).map_err(|what| ModelError::config(directory, what))?;
    let rest = if let Some(named) = &options.named {
        if named.kind != kind {
            let what =
                format!("has the tensors of {kind}; {} is a configuration of {}", named.name, named.kind);
            return Err(ModelError::config(directory, what));
        }
        config.horizon = named.horizon;
        config.max_tokens = named.max_tokens.unwrap_or(config.max_tokens);
        if let Some(answer) = &mut config.answer {
            config.action_dim = named.action_dim;
            answer.sizes_known = true;
        }
        format!("from --config {}", named.name)
    } else {
        "as the published models have them; --config NAME or --arch FILE say otherwise".into()
    };
    origin.sizes = match &config.answer {
        Some(answer) if !answer.sizes_known => {
            "the tensors; of the actions' number and width nothing is known".into()
        }
        _ => format!("the tensors; {} actions and {} tokens {rest}", config.horizon, config.max_tokens),
    };
    if let Some(arch) = arch.filter(|_| options.arch.is_none()) {
        config.read_arch(&arch)?;
        origin.sizes = "arch.json".into();
    }
    if options.arch.is_none() {
        config.check().map_err(|what| ModelError::config(directory, what))?;
    }
    Ok(config)
}
