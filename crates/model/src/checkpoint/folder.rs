//! Finds the policy in a folder: the folder itself, or the one below that holds it.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use super::stored::{INDEX, WHOLE};
use crate::ModelError;
use crate::config::read_json;

/// How deep policies are looked for: `models--X/snapshots/REV`, `config/experiment/step`, `checkpoints/N/pretrained_model`.
const DEPTH: usize = 4;
/// Entries that are looked at.
const MOST_ENTRIES: usize = 20_000;

/// Where a policy's weights are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Weights {
    /// One safetensors file.
    Whole(PathBuf),
    /// Shards, by their index.
    Shards(PathBuf),
    /// A `params` directory of Orbax.
    Orbax(PathBuf),
}

/// A policy's folder and its weights.
#[derive(Debug)]
pub(super) struct Found {
    /// The folder with the configuration, the statistics and the tokenizer.
    pub directory: PathBuf,
    pub weights: Weights,
}

/// The weights that lie in `dir` itself.
fn here(dir: &Path) -> Option<Found> {
    let directory = dir.to_path_buf();
    let (whole, index, params) = (dir.join(WHOLE), dir.join(INDEX), dir.join("params"));
    if whole.exists() {
        Some(Found { directory, weights: Weights::Whole(whole) })
    } else if index.exists() {
        Some(Found { directory, weights: Weights::Shards(index) })
    } else if params.is_dir() && pi0_orbax::is_params(&params) {
        Some(Found { directory, weights: Weights::Orbax(params) })
    } else {
        None
    }
}

/// The one policy in `dir`.
pub(super) fn find(dir: &Path) -> Result<Found, ModelError> {
    if !dir.is_dir() {
        let what =
            if dir.exists() { "is a file; give the directory that holds it" } else { "does not exist" };
        return Err(ModelError::config(dir, what));
    }
    if let Some(found) = here(dir) {
        return Ok(found);
    }
    // The arrays themselves: their folder's parent is the checkpoint.
    if dir.file_name().is_some_and(|name| name == "params") && pi0_orbax::is_params(dir) {
        let directory = dir.parent().filter(|p| !p.as_os_str().is_empty()).unwrap_or(Path::new(".."));
        return Ok(Found { directory: directory.into(), weights: Weights::Orbax(dir.into()) });
    }
    if let Some(found) = chosen(dir) {
        return Ok(found);
    }
    let mut below = below(dir)?;
    match below.len() {
        1 => Ok(below.remove(0)),
        0 => Err(ModelError::config(dir, nothing(dir))),
        n => {
            let shown =
                below.iter().take(20).map(|f| format!("\n  {}", f.directory.display())).collect::<String>();
            let more = if n > 20 { format!("\n  … and {} more", n - 20) } else { String::new() };
            Err(ModelError::config(dir, format!("holds several policies; give one of them:{shown}{more}")))
        }
    }
}

/// The one of several in `dir` that counts, where what wrote the folder says so.
fn chosen(dir: &Path) -> Option<Found> {
    let lasts = ["checkpoints/last/pretrained_model", "last/pretrained_model"];
    lasts.iter().find_map(|last| here(&dir.join(last))).or_else(|| {
        let refs = Some(dir.join("refs/main")).filter(|refs| refs.is_file())?;
        let revision = std::fs::read_to_string(refs).ok()?;
        // A commit's name, and nothing that leads elsewhere.
        let revision = revision.trim();
        let plain = !revision.is_empty() && revision.bytes().all(|b| b.is_ascii_alphanumeric());
        plain.then(|| here(&dir.join("snapshots").join(revision)))?
    })
}

/// All policies below `dir`, each once, in order.
fn below(dir: &Path) -> Result<Vec<Found>, ModelError> {
    let mut found = Vec::new();
    let mut seen = BTreeSet::new();
    let mut level = vec![dir.to_path_buf()];
    let mut entries = 0;
    for _ in 0..DEPTH {
        let mut next = Vec::new();
        for folder in level {
            let read = |e| ModelError::Read { path: folder.clone(), source: e };
            let mut folders: Vec<PathBuf> = Vec::new();
            for entry in folder.read_dir().map_err(read)? {
                entries += 1;
                if entries > MOST_ENTRIES {
                    let what = "holds too much to look for a policy in it; give the policy's own folder";
                    return Err(ModelError::config(dir, what));
                }
                let path = entry.map_err(read)?.path();
                let name = path.file_name().map(|n| n.to_string_lossy().into_owned()).unwrap_or_default();
                // Optimizers' states, saves that were not finished, hidden folders, the hub's own.
                let passed = name.starts_with('.')
                    || name.contains("orbax-checkpoint-tmp")
                    || ["train_state", "training_state", "blobs", "refs", "params"].contains(&name.as_str());
                if !passed && path.is_dir() {
                    folders.push(path);
                }
            }
            folders.sort();
            for path in folders {
                // `last` and the like are links to folders that are listed as well.
                let real = path.canonicalize().unwrap_or_else(|_| path.clone());
                if !seen.insert(real) {
                    continue;
                }
                match here(&path).or_else(|| chosen(&path)) {
                    Some(policy) => found.push(policy),
                    None => next.push(path),
                }
            }
        }
        level = next;
    }
    Ok(found)
}

/// What a folder without weights is, and what to do.
fn nothing(dir: &Path) -> String {
    let has = |name: &str| dir.join(name).exists();
    if has("adapter_config.json") {
        let base = read_json(&dir.join("adapter_config.json")).ok();
        let base = base.as_ref().and_then(|json| json.get("base_model_name_or_path")?.as_str());
        let base = base.map_or(String::new(), |name| format!(" of {name}"));
        return format!(
            "is a PEFT adapter{base}, not a whole model: give the base model's folder and this one with --adapter"
        );
    }
    let pickled = dir.read_dir().into_iter().flatten().flatten().take(1000).find(|entry| {
        let name = entry.file_name().to_string_lossy().to_lowercase();
        let weights =
            ["bin", "pt", "pth", "ckpt", "pkl"].iter().any(|end| name.ends_with(&format!(".{end}")));
        weights
            && !["optimizer", "metadata", "training_args", "scheduler", "rng_state"]
                .iter()
                .any(|o| name.contains(o))
    });
    if let Some(file) = pickled {
        let file = file.file_name().to_string_lossy().into_owned();
        return format!(
            "holds {file}, weights in Python's pickle format, which can run code when it is opened; write them as \
             {WHOLE} where you trust them: python -c \"import torch, safetensors.torch as s; w = torch.load('{file}', \
             map_location='cpu', weights_only=True); s.save_file({{k: v.contiguous().clone() for k, v in w.items()}}, \
             '{WHOLE}')\""
        );
    }
    if let Some(what) = dangling(dir).or_else(|| other_names(dir)) {
        return what;
    }
    if has("train_state") {
        return "holds a training state and no params: of an openpi step the folder `params` is what inference reads"
            .into();
    }
    if has("params") {
        return "has a folder `params` in which Orbax wrote nothing that can be read (no _METADATA, no manifest.ocdbt): \
                if a download was cut short, fetch it again"
            .into();
    }
    if has("blobs") || has("refs") {
        return "is a hub cache without a snapshot that holds weights: download the model again".into();
    }
    let cut = dir.read_dir().into_iter().flatten().flatten().take(1000).any(|entry| {
        let name = entry.file_name().to_string_lossy().into_owned();
        name.contains("orbax-checkpoint-tmp")
    });
    if cut {
        return "holds a save that Orbax did not finish (…orbax-checkpoint-tmp…), and no other".into();
    }
    let here = if has("config.json") { "has a config.json and no weights" } else { "holds no policy" };
    format!(
        "{here}: wanted {WHOLE}, {INDEX} with its shards, or `params` as openpi's JAX programs write it, here or in one \
         folder below"
    )
}

/// A link to weights that are not there.
fn dangling(dir: &Path) -> Option<String> {
    dangling_of(dir, &|name| [WHOLE, INDEX].contains(&name))
}

/// A link to something that is not there, among the files of `dir` whose names are `wanted`: what a download leaves that was
/// cut, or of which a part was deleted.
fn dangling_of(dir: &Path, wanted: &dyn Fn(&str) -> bool) -> Option<String> {
    let paths = dir.read_dir().into_iter().flatten().flatten().take(1000).map(|entry| entry.path());
    let link = |path: &PathBuf| {
        path.file_name().and_then(|name| name.to_str()).is_some_and(wanted)
            && path.is_symlink()
            && !path.exists()
    };
    let link = paths.filter(link).min()?;
    let (name, target) = (link.file_name()?.to_string_lossy().into_owned(), link.read_link().ok()?);
    Some(format!(
        "has {name}, which is a link to {}, and that is not there: the download was not finished or was deleted; fetch the \
         model again",
        target.display()
    ))
}

/// Fails where a description or the statistics of the policy in `dir` are links to something that is not there: the rest
/// would be read as another layout.
pub(super) fn check_links(dir: &Path) -> Result<(), ModelError> {
    match dangling_of(dir, &|name| name.ends_with(".json") || name.ends_with(".safetensors")) {
        Some(what) => Err(ModelError::config(dir, what)),
        None => Ok(()),
    }
}

/// Weights under another name than programs of the family give them.
fn other_names(dir: &Path) -> Option<String> {
    let entries = dir.read_dir().into_iter().flatten().flatten().take(1000);
    let names = entries.map(|entry| entry.file_name().to_string_lossy().into_owned());
    // Statistics of a processor and adapters are safetensors as well.
    let weights = |name: &String| {
        name.ends_with(".safetensors") && !name.contains("processor") && !name.starts_with("adapter_")
    };
    let mut names: Vec<_> = names.filter(weights).collect();
    names.sort();
    let first = names.first()?;
    Some(if first.contains("-of-") {
        format!("has shards such as {first} and no {INDEX}, which says what is in them: download it as well")
    } else {
        format!("has {} and no {WHOLE}: if that is the whole of the weights, rename it", names.join(", "))
    })
}
