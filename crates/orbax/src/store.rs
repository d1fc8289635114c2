//! Where keys and values are: a database, several, or a directory of files.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::file::{Files, Source};
use crate::ocdbt::{Database, MANIFEST, Value};
use crate::{Error, Result};

/// Largest value that is read as a whole: the description of an array.
const MAX_SMALL: u64 = 1 << 20;

/// Keys and their values.
#[derive(Debug)]
pub(crate) struct Store {
    directory: PathBuf,
    kind: Kind,
    files: Files,
}

#[derive(Debug)]
enum Kind {
    /// The first that has a key counts.
    Databases(Vec<Database>),
    /// A file a key.
    Directory,
}

/// Bytes of a value.
#[derive(Debug, Clone)]
pub(crate) enum Content {
    Memory(Arc<[u8]>),
    File { source: Arc<Source>, offset: u64, length: u64 },
}

impl Content {
    pub fn length(&self) -> u64 {
        match self {
            Content::Memory(bytes) => bytes.len() as u64,
            Content::File { length, .. } => *length,
        }
    }

    /// Reads `out.len()` bytes at `at`, which lie inside.
    pub fn read_exact_at(&self, out: &mut [u8], at: u64, path: &Path) -> Result<()> {
        let end = at.checked_add(out.len() as u64).filter(|&end| end <= self.length());
        if end.is_none() {
            return Err(Error::damaged(path, format!("{} bytes at {at} of {}", out.len(), self.length())));
        }
        match self {
            Content::Memory(bytes) => {
                out.copy_from_slice(&bytes[at as usize..at as usize + out.len()]);
                Ok(())
            }
            Content::File { source, offset, .. } => source.read_exact_at(out, offset + at),
        }
    }

    /// The part `at..at + length`.
    pub fn part(self, at: u64, length: u64, path: &Path) -> Result<Self> {
        if at.checked_add(length).is_none_or(|end| end > self.length()) {
            return Err(Error::damaged(path, format!("{length} bytes at {at} of {}", self.length())));
        }
        Ok(match self {
            Content::Memory(bytes) => Content::Memory(bytes[at as usize..(at + length) as usize].into()),
            Content::File { source, offset, .. } => Content::File { source, offset: offset + at, length },
        })
    }
}

impl Store {
    /// Opens the store of the directory that holds the arrays.
    pub fn open(directory: &Path) -> Result<Self> {
        let kind = if directory.join(MANIFEST).exists() {
            Kind::Databases(vec![Database::open(directory)?])
        } else {
            // Of some copies only the databases of the writing processes are left: their union is the checkpoint.
            let processes = processes(directory)?;
            if processes.is_empty() {
                Kind::Directory
            } else {
                Kind::Databases(processes.iter().map(|p| Database::open(p)).collect::<Result<_>>()?)
            }
        };
        Ok(Self { directory: directory.into(), kind, files: Files::default() })
    }

    /// Names of arrays: what the keys of their descriptions begin with.
    pub fn arrays(&self) -> Result<Vec<String>> {
        let mut names: Vec<String> = match &self.kind {
            Kind::Databases(databases) => {
                let keys = databases.iter().flat_map(|d| d.entries.keys());
                let name = |key: &String| {
                    let (name, leaf) = key.rsplit_once('/')?;
                    matches!(leaf, ".zarray" | "zarr.json").then(|| name.to_owned())
                };
                keys.filter_map(name).collect()
            }
            Kind::Directory => {
                let read = |e| Error::read(&self.directory, e);
                let mut names = Vec::new();
                for entry in self.directory.read_dir().map_err(read)? {
                    let path = entry.map_err(read)?.path();
                    let described = [".zarray", "zarr.json"].iter().any(|leaf| path.join(leaf).is_file());
                    if let Some(name) = path.file_name().and_then(|n| n.to_str()).filter(|_| described) {
                        names.push(name.to_owned());
                    }
                }
                names
            }
        };
        names.sort();
        names.dedup();
        Ok(names)
    }

    /// Whether it is a directory in which no array lies: of a checkpoint only the description is there.
    pub fn is_empty(&self) -> Result<bool> {
        Ok(matches!(self.kind, Kind::Directory) && self.arrays()?.is_empty())
    }

    /// Bytes of all values as stored.
    pub fn bytes(&self) -> Result<u64> {
        match &self.kind {
            Kind::Databases(databases) => {
                let values = databases.iter().flat_map(|d| d.entries.values());
                let length = |v: &Value| match v {
                    Value::Inline(bytes) => bytes.len() as u64,
                    Value::File { length, .. } => *length,
                };
                Ok(values.fold(0, |n, v| n.saturating_add(length(v))))
            }
            Kind::Directory => bytes_below(&self.directory, 0),
        }
    }

    /// The value of `key`, if there is one.
    pub fn get(&self, key: &str) -> Result<Option<Content>> {
        match &self.kind {
            Kind::Databases(databases) => {
                let value = databases.iter().find_map(|d| d.entries.get(key));
                value.map(|v| self.content(v)).transpose()
            }
            Kind::Directory => {
                let plain = |part: &str| !matches!(part, "" | "." | "..");
                if !key.split('/').all(plain) || key.contains(['\\', '\0']) {
                    return Err(Error::damaged(
                        &self.directory,
                        format!("the name {key:?} leaves the directory"),
                    ));
                }
                let path = self.directory.join(key);
                if !path.is_file() {
                    return Ok(None);
                }
                let source = self.files.open(&path)?;
                let length = source.length();
                Ok(Some(Content::File { source, offset: 0, length }))
            }
        }
    }

    fn content(&self, value: &Value) -> Result<Content> {
        Ok(match value {
            Value::Inline(bytes) => Content::Memory(bytes.clone()),
            Value::File { path, offset, length } => {
                let source = self.files.open(path)?;
                source.check(*offset, *length)?;
                Content::File { source, offset: *offset, length: *length }
            }
        })
    }

    /// A small value as a whole.
    pub fn get_small(&self, key: &str) -> Result<Option<Vec<u8>>> {
        let Some(content) = self.get(key)? else { return Ok(None) };
        let path = self.path(key);
        if content.length() > MAX_SMALL {
            return Err(Error::damaged(&path, format!("{} bytes describe an array", content.length())));
        }
        let mut bytes = vec![0; content.length() as usize];
        content.read_exact_at(&mut bytes, 0, &path)?;
        Ok(Some(bytes))
    }

    /// What errors call the value of `key`: the directory and the key.
    pub fn path(&self, key: &str) -> PathBuf {
        self.directory.join(key)
    }
}

/// `ocdbt.process_*` that are databases, sorted.
fn processes(directory: &Path) -> Result<Vec<PathBuf>> {
    let read = |e| Error::read(directory, e);
    let mut found = Vec::new();
    for entry in directory.read_dir().map_err(read)? {
        let path = entry.map_err(read)?.path();
        let named =
            path.file_name().and_then(|n| n.to_str()).is_some_and(|n| n.starts_with("ocdbt.process_"));
        if named && path.join(MANIFEST).is_file() {
            found.push(path);
        }
    }
    found.sort();
    Ok(found)
}

/// Bytes of the files in `directory` and below.
fn bytes_below(directory: &Path, depth: usize) -> Result<u64> {
    const DEPTH: usize = 24;
    let read = |e| Error::read(directory, e);
    let mut total = 0u64;
    for entry in directory.read_dir().map_err(read)? {
        let entry = entry.map_err(read)?;
        let kind = entry.file_type().map_err(read)?;
        if kind.is_dir() && depth < DEPTH {
            total = total.saturating_add(bytes_below(&entry.path(), depth + 1)?);
        } else if !kind.is_dir() {
            total = total.saturating_add(std::fs::metadata(entry.path()).map_err(read)?.len());
        }
    }
    Ok(total)
}
