//! Reading the small files of a checkpoint, believing nothing in them.

use std::collections::BTreeMap;
use std::io::{Read, Seek, SeekFrom};
use std::marker::PhantomData;
use std::path::{Component, Path, PathBuf};

use pi0_model::{open_file, placeholder, plain_json};
use safetensors::{Dtype, SafeTensors, tensor::TensorInfo};
use serde::de::{Deserialize, DeserializeOwned, Deserializer, Error as _, MapAccess, Visitor};

use crate::{Error, Result};

/// Largest JSON or statistics file that is read.
const MAX_SMALL_FILE: u64 = 64 << 20;
/// Largest safetensors header, as in the safetensors library.
const MAX_HEADER: u64 = 100_000_000;

/// Reads a small file as a whole.
pub(crate) fn read_small(path: &Path) -> Result<Vec<u8>> {
    let read = |source| Error::Read { path: path.into(), source };
    let mut bytes = Vec::new();
    open_file(path).map_err(read)?.take(MAX_SMALL_FILE + 1).read_to_end(&mut bytes).map_err(read)?;
    if bytes.len() as u64 > MAX_SMALL_FILE {
        return Err(Error::format(path, format!("larger than {} MiB", MAX_SMALL_FILE >> 20)));
    }
    if let Some(what) = placeholder(&bytes) {
        return Err(Error::format(path, format!("it is {what}")));
    }
    Ok(bytes)
}

/// Reads a JSON file.
pub(crate) fn read_json<T: DeserializeOwned>(path: &Path) -> Result<T> {
    parse_json(path, &read_small(path)?)
}

/// Reads JSON, in which NaN is null; `path` is for errors.
pub(crate) fn parse_json<T: DeserializeOwned>(path: &Path, bytes: &[u8]) -> Result<T> {
    let plain = plain_json(bytes).map_err(|what| Error::format(path, format!("it {what}")))?;
    serde_json::from_slice(&plain).map_err(|error| Error::format(path, error))
}

/// `directory/name` for a name that comes from a file: it must stay inside.
pub(crate) fn inside(directory: &Path, name: &str, named_in: &Path) -> Result<PathBuf> {
    let path = Path::new(name);
    let plain = path.components().all(|part| matches!(part, Component::Normal(_) | Component::CurDir));
    if name.is_empty() || name.contains(['\0', '\\']) || !plain {
        return Err(Error::format(named_in, format!("{name:?} is not a plain relative path")));
    }
    Ok(directory.join(path))
}

/// A JSON object in the order of its file, without duplicates.
#[derive(Debug, Clone)]
pub(crate) struct Ordered<V>(pub Vec<(String, V)>);

impl<V> Default for Ordered<V> {
    fn default() -> Self {
        Self(Vec::new())
    }
}

impl<V> Ordered<V> {
    pub fn get(&self, key: &str) -> Option<&V> {
        self.0.iter().find(|(k, _)| k == key).map(|(_, v)| v)
    }
}

impl<'de, V: Deserialize<'de>> Deserialize<'de> for Ordered<V> {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        struct Object<V>(PhantomData<V>);
        impl<'de, V: Deserialize<'de>> Visitor<'de> for Object<V> {
            type Value = Ordered<V>;
            fn expecting(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str("an object")
            }
            fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<Ordered<V>, A::Error> {
                let mut entries: Ordered<V> = Ordered::default();
                while let Some((key, value)) = map.next_entry::<String, V>()? {
                    if entries.get(&key).is_some() {
                        return Err(A::Error::custom(format!("key {key:?} is there twice")));
                    }
                    entries.0.push((key, value));
                }
                Ok(entries)
            }
        }
        deserializer.deserialize_map(Object(PhantomData))
    }
}

/// Vectors by name, such as `observation.state.mean`.
pub(crate) type Vectors = BTreeMap<String, Vec<f64>>;

/// The vectors of a small safetensors file.
pub(crate) fn read_vectors(path: &Path) -> Result<Vectors> {
    parse_vectors(path, &read_small(path)?)
}

/// The vectors of a safetensors file, of whatever format of numbers; `path` is for errors.
pub(crate) fn parse_vectors(path: &Path, bytes: &[u8]) -> Result<Vectors> {
    let tensors = SafeTensors::deserialize(bytes).map_err(|error| Error::format(path, error))?;
    let values = |tensor: safetensors::tensor::TensorView<'_>| floats(tensor.dtype(), tensor.data());
    Ok(tensors.iter().filter_map(|(name, tensor)| Some((name.to_owned(), values(tensor)?))).collect())
}

/// The vectors whose names start with one of `prefixes`, out of a checkpoint of any size.
pub(crate) fn read_vectors_of(path: &Path, prefixes: &[&str]) -> Result<Vectors> {
    let read = |source| Error::Read { path: path.into(), source };
    let mut file = open_file(path).map_err(read)?;
    let mut length = [0; 8];
    file.read_exact(&mut length).map_err(read)?;
    let length = u64::from_le_bytes(length);
    if length > MAX_HEADER {
        return Err(Error::format(path, format!("the header would be {length} bytes long")));
    }
    let mut header = Vec::new();
    (&mut file).take(length).read_to_end(&mut header).map_err(read)?;
    let header: BTreeMap<String, serde_json::Value> = parse_json(path, &header)?;

    let mut vectors = Vectors::new();
    for (name, info) in header {
        if !prefixes.iter().any(|prefix| name.starts_with(prefix)) {
            continue;
        }
        let info: TensorInfo = serde_json::from_value(info).map_err(|error| Error::format(path, error))?;
        let (start, end) = info.data_offsets;
        let size = end.checked_sub(start).filter(|&size| size as u64 <= MAX_SMALL_FILE);
        let size =
            size.ok_or_else(|| Error::format(path, format!("tensor {name} has offsets {start}..{end}")))?;
        let at =
            (start as u64).checked_add(8 + length).ok_or_else(|| Error::format(path, "offset overflow"))?;
        let mut bytes = vec![0; size];
        file.seek(SeekFrom::Start(at)).and_then(|_| file.read_exact(&mut bytes)).map_err(read)?;
        if let Some(values) = floats(info.dtype, &bytes) {
            vectors.insert(name, values);
        }
    }
    Ok(vectors)
}

/// Numbers of any format; none for those that are no numbers of their own, such as packed ones.
fn floats(dtype: Dtype, bytes: &[u8]) -> Option<Vec<f64>> {
    fn each<const N: usize>(bytes: &[u8], value: impl Fn([u8; N]) -> f64) -> Vec<f64> {
        bytes.as_chunks::<N>().0.iter().map(|chunk| value(*chunk)).collect()
    }
    Some(match dtype {
        Dtype::F64 => each(bytes, f64::from_le_bytes),
        Dtype::F32 => each(bytes, |b| f64::from(f32::from_le_bytes(b))),
        Dtype::F16 => each(bytes, |b| half::f16::from_le_bytes(b).to_f64()),
        Dtype::BF16 => each(bytes, |b| half::bf16::from_le_bytes(b).to_f64()),
        Dtype::I64 => each(bytes, |b| i64::from_le_bytes(b) as f64),
        Dtype::U64 => each(bytes, |b| u64::from_le_bytes(b) as f64),
        Dtype::I32 => each(bytes, |b| f64::from(i32::from_le_bytes(b))),
        Dtype::U32 => each(bytes, |b| f64::from(u32::from_le_bytes(b))),
        Dtype::I16 => each(bytes, |b| f64::from(i16::from_le_bytes(b))),
        Dtype::U16 => each(bytes, |b| f64::from(u16::from_le_bytes(b))),
        Dtype::I8 => each(bytes, |[b]: [u8; 1]| f64::from(b as i8)),
        Dtype::U8 | Dtype::BOOL => each(bytes, |[b]: [u8; 1]| f64::from(b)),
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_from_files_stay_inside() {
        let (dir, file) = (Path::new("/m"), Path::new("f.json"));
        assert_eq!(inside(dir, "tokenizer/a.json", file).unwrap(), Path::new("/m/tokenizer/a.json"));
        for name in ["", "..", "../x", "a/../../x", "/etc/passwd", "a\\..\\b", "a\0b"] {
            assert!(inside(dir, name, file).is_err(), "{name:?}");
        }
    }

    #[test]
    fn objects_keep_their_order_and_refuse_duplicates() {
        let read = |json: &str| serde_json::from_str::<Ordered<u8>>(json);
        assert_eq!(read(r#"{"b":1,"a":2}"#).unwrap().0, [("b".into(), 1), ("a".into(), 2)]);
        assert!(read(r#"{"b":1,"b":2}"#).is_err());
        assert!(read("[]").is_err());
    }
}
