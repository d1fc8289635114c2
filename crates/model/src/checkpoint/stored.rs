//! Tensors as files hold them: one safetensors file, or shards with an index.

use std::collections::BTreeMap;
use std::path::Path;

use pi0_device::{Bytes, Dtype, MappedFile};
use pi0_orbax::placeholder;
use safetensors::SafeTensors;
use safetensors::tensor::Dtype as StoredDtype;
use serde::Deserialize;

use crate::ModelError;
use crate::config::read_json;

/// A tensor as stored, before its name is known to belong to the network.
pub(super) struct Stored {
    /// Its name in the file.
    pub original: String,
    /// The name of the table.
    pub name: String,
    /// Its format, or the name of one that no device reads.
    pub dtype: Result<Dtype, String>,
    pub shape: Vec<usize>,
    pub bytes: Bytes,
}

/// Name of the file with the whole of the weights.
pub(super) const WHOLE: &str = "model.safetensors";
/// Name of the file that says which shard holds which tensor.
pub(super) const INDEX: &str = "model.safetensors.index.json";

/// The tensors of one file.
pub(super) fn read_file(path: &Path) -> Result<Vec<Stored>, ModelError> {
    let read = |e| ModelError::Read { path: path.into(), source: e };
    let file = pi0_orbax::open_file(path).and_then(|_| MappedFile::open(path)).map_err(read)?;
    let bytes = file.bytes();
    if let Some(what) = placeholder(bytes) {
        return Err(ModelError::config(path, format!("is {what}")));
    }
    let tensors = SafeTensors::deserialize(bytes).map_err(|e| {
        let size = bytes.len();
        let what = format!("{e} (the file has {size} bytes; if a download was cut short, fetch it again)");
        ModelError::Damaged { path: path.into(), what }
    })?;
    let base = bytes.as_ptr() as usize;
    let one = |(name, view): (&str, safetensors::tensor::TensorView<'_>)| {
        let start = view.data().as_ptr() as usize - base;
        Stored {
            original: name.into(),
            name: super::names::canonical(name),
            dtype: match view.dtype() {
                StoredDtype::F32 => Ok(Dtype::F32),
                StoredDtype::BF16 => Ok(Dtype::Bf16),
                StoredDtype::F16 => Ok(Dtype::F16),
                other => Err(format!("{other:?}")),
            },
            shape: view.shape().to_vec(),
            bytes: Bytes::Mapped(file.clone(), start..start + view.data().len()),
        }
    };
    Ok(tensors.iter().map(one).collect())
}

#[derive(Deserialize)]
struct Index {
    weight_map: BTreeMap<String, String>,
}

/// The tensors of all shards that an index names.
pub(super) fn read_shards(index_path: &Path) -> Result<Vec<Stored>, ModelError> {
    let fail = |what: String| ModelError::config(index_path, what);
    let index: Index = serde_json::from_value(read_json(index_path)?).map_err(|e| fail(e.to_string()))?;
    let mut shards: BTreeMap<&str, Vec<&str>> = BTreeMap::new();
    for (tensor, file) in &index.weight_map {
        shards.entry(file).or_default().push(tensor);
    }
    let mut all = Vec::with_capacity(index.weight_map.len());
    for (file, tensors) in shards {
        let plain = !file.is_empty() && !file.contains(['/', '\\', '\0']) && !matches!(file, "." | "..");
        if !plain {
            return Err(fail(format!("names the file {file:?}, which is not one beside it")));
        }
        let path = index_path.with_file_name(file);
        if !path.exists() {
            return Err(fail(format!("names {file}, which is not there: download that shard as well")));
        }
        let mut stored: BTreeMap<String, Stored> =
            read_file(&path)?.into_iter().map(|s| (s.original.clone(), s)).collect();
        for tensor in tensors {
            let found = stored.remove(tensor);
            all.push(found.ok_or_else(|| fail(format!("says that {file} holds {tensor}, and it does not")))?);
        }
    }
    Ok(all)
}
