//! Writes a checkpoint in the form of openpi's published ones: Zarr 2 in OCDBT, one writing process, a merged manifest.
//! For tests and measurements; training programs write theirs with Orbax.

use std::fs::{self, File};
use std::io::{self, BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::json;

use crate::Dtype;
use crate::block::Magic;

/// How to write.
#[derive(Debug, Clone)]
pub struct Options {
    /// Level of zstd; none stores chunks as they are.
    pub level: Option<i32>,
    /// Whether every array lies one level down, under `value`, as arrays of a training state do.
    pub value: bool,
    /// Bytes after which a new data file begins.
    pub file_size: u64,
    /// Values up to this size lie in the tree itself.
    pub inline: usize,
    /// Entries of a node: more make the tree deeper.
    pub fanout: usize,
}

impl Default for Options {
    /// As Orbax writes.
    fn default() -> Self {
        Self { level: Some(1), value: false, file_size: 2 << 30, inline: 1024, fanout: 1 << 20 }
    }
}

/// Writes the chunk at these coordinates of the grid, all of it.
pub type WriteChunk<'a> = dyn FnMut(&[usize], &mut dyn Write) -> io::Result<()> + 'a;

/// A checkpoint that is being written.
pub struct Writer {
    directory: PathBuf,
    options: Options,
    data: BufWriter<File>,
    files: usize,
    /// Bytes in the last data file.
    size: u64,
    entries: Vec<(String, Stored)>,
    metadata: serde_json::Map<String, serde_json::Value>,
}

enum Stored {
    Inline(Vec<u8>),
    File { file: usize, offset: u64, length: u64 },
}

/// A child or a root: where it is and how many keys it has.
struct Node {
    first: String,
    offset: u64,
    length: u64,
    keys: u64,
}

fn data_path(directory: &Path, file: usize) -> PathBuf {
    directory.join(format!("ocdbt.process_0/d/{file:032x}"))
}

impl Writer {
    /// Begins a checkpoint in the directory `params`, which is made.
    pub fn create(params: &Path, options: Options) -> io::Result<Self> {
        fs::create_dir_all(params.join("ocdbt.process_0/d"))?;
        fs::create_dir_all(params.join("d"))?;
        let data = BufWriter::new(File::create(data_path(params, 0))?);
        let metadata = serde_json::Map::new();
        Ok(Self { directory: params.into(), options, data, files: 1, size: 0, entries: Vec::new(), metadata })
    }

    /// Writes an array. `values` is asked for each chunk.
    pub fn array(
        &mut self,
        path: &str,
        dtype: Dtype,
        shape: &[usize],
        chunk: &[usize],
        values: &mut WriteChunk<'_>,
    ) -> io::Result<()> {
        let mut parts: Vec<&str> = ["params"].into_iter().chain(path.split('/')).collect();
        if self.options.value {
            parts.push("value");
        }
        let name = parts.join(".");
        let keys: Vec<_> = parts.iter().map(|p| json!({"key": p, "key_type": 2})).collect();
        let value = json!({"value_type": "jax.Array", "skip_deserialize": false, "write_shape": chunk});
        self.metadata.insert(name.clone(), json!({"key_metadata": keys, "value_metadata": value}));
        let format = match dtype {
            Dtype::F32 => "<f4",
            Dtype::F16 => "<f2",
            Dtype::Bf16 => "bfloat16",
            Dtype::Other(name, _) => name,
        };
        let zarray = json!({
            "zarr_format": 2, "shape": shape, "chunks": chunk, "dtype": format, "order": "C", "filters": null,
            "fill_value": null, "dimension_separator": ".",
            "compressor": self.options.level.map(|level| json!({"id": "zstd", "level": level})),
        });
        self.put(format!("{name}/.zarray"), zarray.to_string().as_bytes())?;
        let grid: Vec<usize> = shape.iter().zip(chunk).map(|(n, c)| n.div_ceil(*c)).collect();
        let mut at = vec![0; grid.len()];
        loop {
            let spelled: Vec<_> = at.iter().map(usize::to_string).collect();
            let key = if at.is_empty() { "0".into() } else { spelled.join(".") };
            self.chunk(format!("{name}/{key}"), &mut |out| values(&at, out))?;
            let Some(axis) = (0..at.len()).rev().find(|&i| at[i] + 1 < grid[i]) else { return Ok(()) };
            at[axis] += 1;
            at[axis + 1..].fill(0);
        }
    }

    fn chunk(
        &mut self,
        key: String,
        values: &mut dyn FnMut(&mut dyn Write) -> io::Result<()>,
    ) -> io::Result<()> {
        if self.size >= self.options.file_size {
            self.data.flush()?;
            self.data = BufWriter::new(File::create(data_path(&self.directory, self.files))?);
            (self.files, self.size) = (self.files + 1, 0);
        }
        let mut counted = Counted { inner: &mut self.data, bytes: 0, head: Vec::new() };
        match self.options.level {
            None => values(&mut counted)?,
            Some(level) => {
                let mut encoder = zstd::stream::write::Encoder::new(&mut counted, level)?;
                values(&mut encoder)?;
                encoder.finish()?;
            }
        }
        let Counted { bytes, head, .. } = counted;
        let stored = if bytes <= self.options.inline as u64 {
            Stored::Inline(head)
        } else {
            Stored::File { file: self.files - 1, offset: self.size, length: bytes }
        };
        self.size += bytes;
        self.entries.push((key, stored));
        Ok(())
    }

    fn put(&mut self, key: String, bytes: &[u8]) -> io::Result<()> {
        let stored = if bytes.len() <= self.options.inline {
            Stored::Inline(bytes.to_vec())
        } else {
            self.data.write_all(bytes)?;
            self.size += bytes.len() as u64;
            let offset = self.size - bytes.len() as u64;
            Stored::File { file: self.files - 1, offset, length: bytes.len() as u64 }
        };
        self.entries.push((key, stored));
        Ok(())
    }

    /// Writes the tree and its manifest.
    pub fn finish(mut self) -> io::Result<()> {
        self.data.flush()?;
        self.entries.sort_by(|a, b| a.0.cmp(&b.0));
        let entries = std::mem::take(&mut self.entries);
        let mut tree = Vec::new();
        let mut level = Vec::new();
        for part in entries.chunks(self.options.fanout.max(2)) {
            let block = block(Magic::Node, &self.leaf(part))?;
            let first = part[0].0.clone();
            let (offset, length) = (tree.len() as u64, block.len() as u64);
            level.push(Node { first, offset, length, keys: part.len() as u64 });
            tree.extend(block);
        }
        let mut height = 0;
        while level.len() > 1 {
            height += 1;
            let mut above = Vec::new();
            for part in level.chunks(self.options.fanout.max(2)) {
                let block = block(Magic::Node, &inner(part, height))?;
                let (offset, length) = (tree.len() as u64, block.len() as u64);
                let keys = part.iter().map(|n| n.keys).sum();
                above.push(Node { first: part[0].first.clone(), offset, length, keys });
                tree.extend(block);
            }
            level = above;
        }
        fs::write(self.directory.join("d/tree"), &tree)?;
        fs::write(
            self.directory.join("manifest.ocdbt"),
            block(Magic::Manifest, &manifest(level.first(), height))?,
        )?;
        let metadata = json!({
            "tree_metadata": self.metadata, "use_zarr3": false,
            "store_array_data_equal_to_fill_value": true, "custom_metadata": null,
        });
        fs::write(self.directory.join("_METADATA"), metadata.to_string())
    }

    fn leaf(&self, entries: &[(String, Stored)]) -> Vec<u8> {
        let mut out = vec![0];
        let files: Vec<String> = (0..self.files).map(|f| format!("ocdbt.process_0/d/{f:032x}")).collect();
        put_files(&mut out, &files, "ocdbt.process_0/".len());
        put(&mut out, entries.len() as u64);
        put_names(&mut out, entries.iter().map(|e| e.0.as_str()), &[]);
        for (_, stored) in entries {
            put(
                &mut out,
                match stored {
                    Stored::Inline(bytes) => bytes.len() as u64,
                    Stored::File { length, .. } => *length,
                },
            );
        }
        entries.iter().for_each(|(_, s)| put(&mut out, u64::from(matches!(s, Stored::File { .. }))));
        let far = || {
            entries.iter().filter_map(|(_, s)| match s {
                Stored::File { file, offset, .. } => Some((*file as u64, *offset)),
                Stored::Inline(_) => None,
            })
        };
        far().for_each(|(file, _)| put(&mut out, file));
        far().for_each(|(_, offset)| put(&mut out, offset));
        for (_, stored) in entries {
            if let Stored::Inline(bytes) = stored {
                out.extend(bytes);
            }
        }
        out
    }
}

fn inner(children: &[Node], height: u8) -> Vec<u8> {
    let mut out = vec![height];
    put_files(&mut out, &["d/tree".into()], 0);
    put(&mut out, children.len() as u64);
    put_names(&mut out, children.iter().map(|c| c.first.as_str()), &vec![0; children.len()]);
    put_places(&mut out, children);
    put_statistics(&mut out, children);
    out
}

fn manifest(root: Option<&Node>, height: u8) -> Vec<u8> {
    let mut out = vec![0x5A; 16];
    for number in [0, 1024, 100_000_000] {
        put(&mut out, number);
    }
    out.push(4);
    put(&mut out, 1);
    out.extend(0i32.to_le_bytes());
    let nodes = root.map_or(&[][..], std::slice::from_ref);
    put_files(&mut out, &["d/tree".into()], 0);
    put(&mut out, nodes.len() as u64);
    nodes.iter().for_each(|_| put(&mut out, 1));
    out.extend(nodes.iter().map(|_| height));
    put_places(&mut out, nodes);
    put_statistics(&mut out, nodes);
    nodes.iter().for_each(|_| out.extend(1u64.to_le_bytes()));
    put(&mut out, 0);
    out
}

/// Columns of file (the first), offset, length.
fn put_places(out: &mut Vec<u8>, nodes: &[Node]) {
    nodes.iter().for_each(|_| put(out, 0));
    nodes.iter().for_each(|n| put(out, n.offset));
    nodes.iter().for_each(|n| put(out, n.length));
}

/// Columns of keys, bytes of the tree, bytes of values; nobody needs the latter two.
fn put_statistics(out: &mut Vec<u8>, nodes: &[Node]) {
    nodes.iter().for_each(|n| put(out, n.keys));
    nodes.iter().for_each(|n| put(out, n.length));
    nodes.iter().for_each(|_| put(out, 0));
}

fn put(out: &mut Vec<u8>, mut number: u64) {
    while number >= 0x80 {
        out.push(number as u8 | 0x80);
        number >>= 7;
    }
    out.push(number as u8);
}

fn put_files(out: &mut Vec<u8>, files: &[String], base: usize) {
    put(out, files.len() as u64);
    put_names(out, files.iter().map(String::as_str), &vec![base as u64; files.len()]);
}

/// Names without shared beginnings, and a column between their lengths and their bytes.
fn put_names<'a>(out: &mut Vec<u8>, names: impl Iterator<Item = &'a str> + Clone, column: &[u64]) {
    names.clone().skip(1).for_each(|_| put(out, 0));
    names.clone().for_each(|n| put(out, n.len() as u64));
    column.iter().for_each(|&n| put(out, n));
    names.for_each(|n| out.extend(n.as_bytes()));
}

fn block(magic: Magic, body: &[u8]) -> io::Result<Vec<u8>> {
    let body = zstd::bulk::compress(body, 1)?;
    let mut out = magic.number().to_be_bytes().to_vec();
    out.extend((18 + body.len() as u64).to_le_bytes());
    out.extend([0, 1]);
    out.extend(body);
    out.extend(crc32c::crc32c(&out).to_le_bytes());
    Ok(out)
}

/// Counts what is written, and keeps the beginning of it.
struct Counted<W> {
    inner: W,
    bytes: u64,
    head: Vec<u8>,
}

impl<W: Write> Write for Counted<W> {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let n = self.inner.write(bytes)?;
        self.bytes += n as u64;
        let room = (1 << 20) - self.head.len();
        self.head.extend(&bytes[..n.min(room)]);
        Ok(n)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.inner.flush()
    }
}
