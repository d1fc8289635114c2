//! Descriptions of arrays: Zarr 2 (`.zarray`) and Zarr 3 (`zarr.json`).

use std::path::Path;

use serde::Deserialize;
use serde_json::Value;

use crate::array::Dtype;
use crate::{Error, Result};

/// Most bytes of an array, and most chunks: π0's largest has 2.4 GB.
const MAX_BYTES: u64 = 1 << 40;
const MAX_CHUNKS: u64 = 1 << 20;
const MAX_AXES: usize = 16;
/// How much larger than its array a chunk may be: Zarr fills chunks up that reach past the array.
const MAX_PADDING: u64 = 16;

/// How an array lies in its store.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Layout {
    pub dtype: Dtype,
    pub shape: Vec<usize>,
    /// Of what is compressed as one: the inner chunks where there are shards.
    pub chunk: Vec<usize>,
    /// One value, repeated where a chunk is not stored. None where every chunk must be.
    pub fill: Option<Vec<u8>>,
    pub coding: Coding,
    pub keys: Keys,
    pub shards: Option<Shards>,
}

/// How the bytes of a chunk are stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Coding {
    pub zstd: bool,
    /// Whether a CRC-32C of the stored bytes follows them.
    pub checksum: bool,
}

/// How the key of a chunk is spelled.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Keys {
    /// `c` in front of the numbers.
    pub marked: bool,
    pub separator: char,
}

/// Several chunks in one value, with an index.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Shards {
    /// Shape of what one value holds.
    pub shape: Vec<usize>,
    /// Whether a CRC-32C follows the index.
    pub checksum: bool,
    /// Whether the index comes last.
    pub at_end: bool,
}

impl Shards {
    /// Chunks of a shard, along each axis.
    pub fn counts(&self, chunk: &[usize]) -> Vec<usize> {
        self.shape.iter().zip(chunk).map(|(s, c)| s / c).collect()
    }
}

impl Keys {
    /// The key of the value at these coordinates of the grid.
    pub fn of(&self, array: &str, at: &[usize]) -> String {
        let mut parts: Vec<String> = at.iter().map(usize::to_string).collect();
        if self.marked {
            parts.insert(0, "c".into());
        } else if parts.is_empty() {
            parts.push("0".into());
        }
        format!("{array}/{}", parts.join(&self.separator.to_string()))
    }
}

#[derive(Deserialize)]
struct Zarray {
    zarr_format: u64,
    shape: Vec<u64>,
    chunks: Vec<u64>,
    dtype: Value,
    compressor: Option<Compressor>,
    #[serde(default)]
    dimension_separator: Option<String>,
    #[serde(default)]
    fill_value: Value,
    #[serde(default)]
    filters: Option<Vec<Value>>,
    order: String,
}

#[derive(Deserialize)]
struct Compressor {
    id: String,
}

/// Reads a `.zarray`.
pub(crate) fn version2(json: &[u8], path: &Path) -> Result<Layout> {
    let z: Zarray = serde_json::from_slice(json).map_err(|e| Error::damaged(path, e.to_string()))?;
    let other = |what: String| Err(Error::unsupported(path, what));
    if z.zarr_format != 2 {
        return other(format!("Zarr format {} in a .zarray", z.zarr_format));
    }
    if z.order != "C" && z.shape.len() > 1 {
        return other(format!("order {:?} of axes, known is \"C\"", z.order));
    }
    if z.filters.is_some_and(|f| !f.is_empty()) {
        return other("Zarr filters".into());
    }
    let dtype = match z.dtype.as_str() {
        Some("<f4") => Dtype::F32,
        Some("<f2") => Dtype::F16,
        Some("bfloat16") => Dtype::Bf16,
        Some("<f8") => Dtype::Other("float64", 8),
        Some("<i4" | "<u4") => Dtype::Other("int32", 4),
        Some("<i8" | "<u8") => Dtype::Other("int64", 8),
        Some("|i1" | "|u1") => Dtype::Other("int8", 1),
        Some("|b1") => Dtype::Other("bool", 1),
        _ => return other(format!("the number format {}", z.dtype)),
    };
    let zstd = match &z.compressor {
        None => false,
        Some(c) if c.id == "zstd" => true,
        Some(c) => return other(format!("compression {:?}, known are zstd and none", c.id)),
    };
    let fill = if z.fill_value.is_null() { None } else { Some(fill(&z.fill_value, dtype, path)?) };
    let layout = Layout {
        dtype,
        shape: sizes(&z.shape, path)?,
        chunk: sizes(&z.chunks, path)?,
        fill,
        coding: Coding { zstd, checksum: false },
        keys: Keys { marked: false, separator: separator(z.dimension_separator.as_deref(), '.', path)? },
        shards: None,
    };
    checked(layout, path)
}

#[derive(Deserialize)]
struct ZarrJson {
    zarr_format: u64,
    node_type: String,
    shape: Vec<u64>,
    data_type: Value,
    chunk_grid: Named,
    #[serde(default)]
    chunk_key_encoding: Option<Named>,
    #[serde(default)]
    fill_value: Value,
    codecs: Vec<Named>,
}

#[derive(Deserialize)]
struct Named {
    name: String,
    #[serde(default)]
    configuration: Value,
}

/// Reads a `zarr.json`.
pub(crate) fn version3(json: &[u8], path: &Path) -> Result<Layout> {
    let z: ZarrJson = serde_json::from_slice(json).map_err(|e| Error::damaged(path, e.to_string()))?;
    let other = |what: String| Err(Error::unsupported(path, what));
    if z.zarr_format != 3 || z.node_type != "array" {
        return other(format!("a Zarr {} of type {:?} in a zarr.json", z.zarr_format, z.node_type));
    }
    let dtype = match z.data_type.as_str() {
        Some("float32") => Dtype::F32,
        Some("bfloat16") => Dtype::Bf16,
        Some("float16") => Dtype::F16,
        Some("float64") => Dtype::Other("float64", 8),
        Some("int32" | "uint32") => Dtype::Other("int32", 4),
        Some("int64" | "uint64") => Dtype::Other("int64", 8),
        Some("int8" | "uint8") => Dtype::Other("int8", 1),
        Some("bool") => Dtype::Other("bool", 1),
        _ => return other(format!("the number format {}", z.data_type)),
    };
    if z.chunk_grid.name != "regular" {
        return other(format!("a chunk grid {:?}", z.chunk_grid.name));
    }
    let outer = chunk_shape(&z.chunk_grid.configuration, path)?;
    let keys = match z.chunk_key_encoding {
        None => Keys { marked: true, separator: '/' },
        Some(k) => {
            let given = k.configuration.get("separator").and_then(Value::as_str);
            match k.name.as_str() {
                "default" => Keys { marked: true, separator: separator(given, '/', path)? },
                "v2" => Keys { marked: false, separator: separator(given, '.', path)? },
                name => return other(format!("chunk keys in the form {name:?}")),
            }
        }
    };
    let (coding, chunk, shards) = match z.codecs.as_slice() {
        [only] if only.name == "sharding_indexed" => {
            let c: Sharding = serde_json::from_value(only.configuration.clone())
                .map_err(|e| Error::damaged(path, format!("sharding_indexed: {e}")))?;
            let index = coding(&c.index_codecs, path)?;
            if index.zstd {
                return other("a compressed shard index".into());
            }
            let at_end = match c.index_location.as_deref() {
                None | Some("end") => true,
                Some("start") => false,
                Some(place) => return other(format!("a shard index at {place:?}")),
            };
            let shards = Shards { shape: sizes(&outer, path)?, checksum: index.checksum, at_end };
            (coding(&c.codecs, path)?, c.chunk_shape, Some(shards))
        }
        codecs => (coding(codecs, path)?, outer, None),
    };
    let layout = Layout {
        dtype,
        shape: sizes(&z.shape, path)?,
        chunk: sizes(&chunk, path)?,
        fill: Some(fill(&z.fill_value, dtype, path)?),
        coding,
        keys,
        shards,
    };
    checked(layout, path)
}

#[derive(Deserialize)]
struct Sharding {
    chunk_shape: Vec<u64>,
    codecs: Vec<Named>,
    index_codecs: Vec<Named>,
    #[serde(default)]
    index_location: Option<String>,
}

fn chunk_shape(configuration: &Value, path: &Path) -> Result<Vec<u64>> {
    let shape = configuration.get("chunk_shape").cloned().unwrap_or_default();
    serde_json::from_value(shape).map_err(|e| Error::damaged(path, format!("chunk_shape: {e}")))
}

/// `bytes`, then at most `zstd`, then at most `crc32c`.
fn coding(codecs: &[Named], path: &Path) -> Result<Coding> {
    let names: Vec<&str> = codecs.iter().map(|c| c.name.as_str()).collect();
    let coding = match names.as_slice() {
        ["bytes"] => Coding { zstd: false, checksum: false },
        ["bytes", "zstd"] => Coding { zstd: true, checksum: false },
        ["bytes", "crc32c"] => Coding { zstd: false, checksum: true },
        ["bytes", "zstd", "crc32c"] => Coding { zstd: true, checksum: true },
        _ => return Err(Error::unsupported(path, format!("the codecs {}", names.join(", ")))),
    };
    match codecs[0].configuration.get("endian").and_then(Value::as_str) {
        None | Some("little") => Ok(coding),
        Some(endian) => Err(Error::unsupported(path, format!("{endian}-endian numbers"))),
    }
}

fn separator(given: Option<&str>, default: char, path: &Path) -> Result<char> {
    match given {
        None => Ok(default),
        Some("/") => Ok('/'),
        Some(".") => Ok('.'),
        Some(other) => Err(Error::unsupported(path, format!("the separator {other:?} in chunk keys"))),
    }
}

fn sizes(sizes: &[u64], path: &Path) -> Result<Vec<usize>> {
    if sizes.len() > MAX_AXES {
        return Err(Error::unsupported(path, format!("{} axes", sizes.len())));
    }
    let one = |&n: &u64| usize::try_from(n).ok().filter(|&n| n as u64 <= MAX_BYTES);
    let all: Option<_> = sizes.iter().map(one).collect();
    all.ok_or_else(|| Error::damaged(path, format!("the sizes {sizes:?} are too large")))
}

/// The fill value as stored.
fn fill(value: &Value, dtype: Dtype, path: &Path) -> Result<Vec<u8>> {
    let x = match value {
        Value::Null | Value::Bool(false) => 0.0,
        Value::Number(n) => n.as_f64().unwrap_or(f64::NAN),
        Value::String(s) if s == "NaN" => f64::NAN,
        Value::String(s) if s == "Infinity" => f64::INFINITY,
        Value::String(s) if s == "-Infinity" => f64::NEG_INFINITY,
        other => return Err(Error::unsupported(path, format!("the fill value {other}"))),
    };
    match dtype {
        Dtype::F32 => Ok((x as f32).to_le_bytes().to_vec()),
        _ if x == 0.0 && x.is_sign_positive() => Ok(vec![0; dtype.size()]),
        // A bf16 is the upper half of an f32, where that half is all there is.
        Dtype::Bf16 if (x as f32).to_bits() & 0xFFFF == 0 => {
            Ok(((x as f32).to_bits() >> 16).to_le_bytes()[..2].to_vec())
        }
        _ => Err(Error::unsupported(path, format!("the fill value {value} of {}", dtype.name()))),
    }
}

/// The product, unless it is too large for an array.
fn product(mut sizes: impl Iterator<Item = usize>) -> Option<u64> {
    sizes.try_fold(1u64, |n, size| n.checked_mul(size as u64)).filter(|&n| n <= MAX_BYTES / 8)
}

/// Checks what reading relies on: axes that agree, no product that overflows, grids of a sane size.
fn checked(layout: Layout, path: &Path) -> Result<Layout> {
    let bad = |what: String| Error::damaged(path, what);
    let Layout { shape, chunk, .. } = &layout;
    if shape.len() != chunk.len() || layout.shards.as_ref().is_some_and(|s| s.shape.len() != chunk.len()) {
        return Err(bad(format!("chunks of shape {chunk:?} in an array of shape {shape:?}")));
    }
    if chunk.contains(&0) || product(chunk.iter().copied()).is_none() {
        return Err(bad(format!("chunks have the shape {chunk:?}")));
    }
    if product(shape.iter().copied()).is_none() {
        return Err(bad(format!("the array has the shape {shape:?}")));
    }
    // What is decoded at once is part of a chunk: padding must not make it much larger than the array.
    let [whole, one] = [shape, chunk].map(|sizes| sizes.iter().map(|&n| n as u64).product::<u64>());
    if one > MAX_PADDING * whole + (1 << 24) {
        return Err(bad(format!("chunks of {chunk:?} in an array of {shape:?}")));
    }
    let chunks = product(shape.iter().zip(chunk).map(|(s, c)| s.div_ceil(*c)));
    if chunks.is_none_or(|n| n > MAX_CHUNKS) {
        return Err(bad(format!("chunks of {chunk:?} in {shape:?}: more than {MAX_CHUNKS} of them")));
    }
    if let Some(shards) = &layout.shards {
        let whole = shards.shape.iter().zip(chunk).all(|(s, c)| *s > 0 && s.is_multiple_of(*c));
        let counts = whole.then(|| product(shards.counts(chunk).into_iter())).flatten();
        if counts.is_none_or(|n| n > MAX_CHUNKS) {
            return Err(bad(format!("shards of {:?} do not divide into chunks of {chunk:?}", shards.shape)));
        }
    }
    Ok(layout)
}
