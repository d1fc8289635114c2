//! OCDBT: an immutable B+tree of keys and values in a directory of files.
//!
//! `manifest.ocdbt` names the root of the newest version; nodes name data files, offsets and lengths. A path in a node
//! may have a base: nodes found there name their files relative to it. That is how Orbax' merged database points into
//! the databases of the writing processes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::block::{Cursor, MAX_BLOCK, Magic, unwrap};
use crate::file::{Files, read_small};
use crate::{Error, Result};

/// Most entries of a database, and most nodes of its tree: a real checkpoint has a few hundred entries.
const MAX_ENTRIES: usize = 1 << 20;
const MAX_NODES: usize = 1 << 16;
/// Most bytes of all decoded nodes.
const MAX_DECODED: u64 = 512 << 20;

/// Name of the file that everything starts from.
pub const MANIFEST: &str = "manifest.ocdbt";

/// Where a value is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Value {
    /// In the node itself.
    Inline(Arc<[u8]>),
    /// In a data file.
    File {
        /// The file.
        path: PathBuf,
        /// First byte.
        offset: u64,
        /// Number of bytes.
        length: u64,
    },
}

/// Keys of the newest version of a database.
#[derive(Debug, Clone)]
pub struct Database {
    /// Sorted bytewise.
    pub entries: BTreeMap<String, Value>,
    /// Nodes of the tree.
    pub nodes: usize,
    /// Levels below the root.
    pub height: u8,
}

/// A data file, and what paths in the nodes found there are relative to.
#[derive(Debug, Clone)]
struct DataFile {
    path: String,
    base: String,
}

/// A block somewhere in a data file.
struct Place<'a> {
    file: &'a DataFile,
    offset: u64,
    length: u64,
}

/// What the manifest says of a version.
struct Root {
    file: Option<DataFile>,
    offset: u64,
    length: u64,
    height: u8,
    keys: u64,
}

impl Database {
    /// Reads the tree of the newest version in `directory`.
    pub fn open(directory: &Path) -> Result<Self> {
        let path = directory.join(MANIFEST);
        let root = match manifest(&path)? {
            Some(root) => root,
            None => {
                let newest = newest_numbered(directory)?;
                manifest(&newest)?.ok_or_else(|| {
                    Error::damaged(&newest, "a numbered manifest says that the manifest is elsewhere")
                })?
            }
        };
        let mut walk = Walk { directory, files: Files::default(), entries: Vec::new(), nodes: 0, decoded: 0 };
        if let Some(file) = &root.file {
            walk.node(&Place { file, offset: root.offset, length: root.length }, root.height, &[])?;
        }
        let Walk { entries, nodes, .. } = walk;
        if entries.len() as u64 != root.keys {
            let what = format!("the manifest counts {} keys, the tree has {}", root.keys, entries.len());
            return Err(Error::damaged(&path, what));
        }
        Ok(Self { entries: entries.into_iter().collect(), nodes, height: root.height })
    }
}

/// `manifest.` and sixteen hexadecimal digits, the largest.
fn newest_numbered(directory: &Path) -> Result<PathBuf> {
    let read = |e| Error::read(directory, e);
    let mut newest: Option<String> = None;
    for entry in directory.read_dir().map_err(read)? {
        let Ok(name) = entry.map_err(read)?.file_name().into_string() else { continue };
        let digits = name.strip_prefix("manifest.").filter(|d| d.len() == 16);
        if digits.is_some_and(|d| d.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))) {
            newest = newest.max(Some(name));
        }
    }
    let name = newest.ok_or_else(|| {
        Error::damaged(&directory.join(MANIFEST), "it refers to numbered manifests and there is none")
    })?;
    Ok(directory.join(name))
}

/// The root of the newest version; none if numbered manifests beside this one have it.
fn manifest(path: &Path) -> Result<Option<Root>> {
    let body = unwrap(&read_small(path, MAX_BLOCK)?, Magic::Manifest, path)?;
    let mut c = Cursor::new(&body, path);
    c.take(16)?; // an id of the database
    let kind = c.varint()?;
    c.varints(2)?; // limits that writers keep to
    c.u8()?; // arity of the tree of versions
    match c.varint()? {
        0 => {}
        1 => drop(c.take(4)?), // zstd's level
        other => return Err(Error::unsupported(path, format!("compression {other}"))),
    }
    match kind {
        0 => {}
        1 => {
            c.done()?;
            return Ok(None);
        }
        other => return Err(Error::unsupported(path, format!("a manifest of kind {other}"))),
    }
    let files = data_files(&mut c, "")?;
    let root = newest_version(&mut c, &files)?;
    // Older versions, in nodes of their own: generation, file, offset, length, count, time, height.
    let n = c.count()?;
    c.varints(5 * n)?;
    c.take(9 * n as u64)?;
    c.done()?;
    root.map(Some).ok_or_else(|| Error::damaged(path, "it has no version"))
}

/// Of the versions in the manifest the one of the largest generation.
fn newest_version(c: &mut Cursor<'_>, files: &[DataFile]) -> Result<Option<Root>> {
    let n = c.count()?;
    let generations = c.varints(n)?;
    let heights = c.take(n as u64)?;
    let [ids, offsets, lengths, keys] = [c.varints(n)?, c.varints(n)?, c.varints(n)?, c.varints(n)?];
    c.varints(2 * n)?; // bytes of the tree and of its values
    c.take(8 * n as u64)?; // times
    let Some(i) = (0..n).max_by_key(|&i| generations[i]) else { return Ok(None) };
    let file = match (offsets[i], lengths[i]) {
        (u64::MAX, u64::MAX) if keys[i] == 0 => None,
        _ => Some(file_of(files, ids[i], c)?.clone()),
    };
    Ok(Some(Root { file, offset: offsets[i], length: lengths[i], height: heights[i], keys: keys[i] }))
}

fn file_of<'a>(files: &'a [DataFile], id: u64, c: &Cursor<'_>) -> Result<&'a DataFile> {
    let file = usize::try_from(id).ok().and_then(|id| files.get(id));
    file.ok_or_else(|| c.error(format!("file {id} of {}", files.len())))
}

/// The table of data files in front of every node; `base` is where its own block was found.
fn data_files(c: &mut Cursor<'_>, base: &str) -> Result<Vec<DataFile>> {
    let n = c.count()?;
    let (paths, columns) = c.prefixed(n, 1)?;
    let bases = &columns[0];
    let mut files = Vec::with_capacity(n);
    for (path, &own) in paths.iter().zip(bases) {
        let text = std::str::from_utf8(path).map_err(|_| c.error("a file name is not UTF-8"))?;
        let head = usize::try_from(own).ok().and_then(|own| text.get(..own));
        let head = head.ok_or_else(|| c.error(format!("the base of {text:?} has {own} bytes")))?;
        let full = format!("{base}{text}");
        let plain = |part: &str| !matches!(part, "" | "." | "..");
        // The file of an empty version has no name.
        if !full.is_empty() && (full.contains(['\\', '\0', ':']) || !full.split('/').all(plain)) {
            return Err(c.error(format!("the file name {full:?} leaves the database")));
        }
        files.push(DataFile { path: full, base: format!("{base}{head}") });
    }
    Ok(files)
}

struct Walk<'a> {
    directory: &'a Path,
    files: Files,
    entries: Vec<(String, Value)>,
    nodes: usize,
    decoded: u64,
}

impl Walk<'_> {
    /// Reads a node and everything below it. Heights fall by one a level, so there are no cycles.
    fn node(&mut self, place: &Place<'_>, height: u8, prefix: &[u8]) -> Result<()> {
        let path = self.directory.join(&place.file.path);
        let source = self.files.open(&path)?;
        source.check(place.offset, place.length)?;
        self.nodes += 1;
        if place.length > MAX_BLOCK || self.nodes > MAX_NODES {
            return Err(Error::damaged(&path, "the tree is too large"));
        }
        let mut raw = vec![0; place.length as usize];
        source.read_exact_at(&mut raw, place.offset)?;
        let body = unwrap(&raw, Magic::Node, &path)?;
        drop((raw, source));
        self.decoded += body.len() as u64;
        if self.decoded > MAX_DECODED {
            return Err(Error::damaged(&path, format!("the tree has more than {MAX_DECODED} bytes")));
        }
        let mut c = Cursor::new(&body, &path);
        let stored = c.u8()?;
        if stored != height {
            return Err(c.error(format!("a node of height {stored} where {height} was wanted")));
        }
        let files = data_files(&mut c, &place.file.base)?;
        let n = c.count()?;
        if height == 0 {
            self.leaf(&mut c, n, &files, prefix)
        } else {
            self.inner(&mut c, n, &files, height, prefix)
        }
    }

    fn inner(
        &mut self,
        c: &mut Cursor<'_>,
        n: usize,
        files: &[DataFile],
        height: u8,
        prefix: &[u8],
    ) -> Result<()> {
        let (keys, columns) = c.prefixed(n, 1)?;
        let [ids, offsets, lengths] = [c.varints(n)?, c.varints(n)?, c.varints(n)?];
        c.varints(3 * n)?; // statistics of what is below
        c.done()?;
        for i in 0..n {
            let common = usize::try_from(columns[0][i]).ok().and_then(|common| keys[i].get(..common));
            let common = common.ok_or_else(|| c.error("a child shares more than its key"))?;
            let file = file_of(files, ids[i], c)?;
            let below = [prefix, common].concat();
            self.node(&Place { file, offset: offsets[i], length: lengths[i] }, height - 1, &below)?;
        }
        Ok(())
    }

    fn leaf(&mut self, c: &mut Cursor<'_>, n: usize, files: &[DataFile], prefix: &[u8]) -> Result<()> {
        let (keys, _) = c.prefixed(n, 0)?;
        let (lengths, kinds) = (c.varints(n)?, c.varints(n)?);
        if let Some(kind) = kinds.iter().find(|&&kind| kind > 1) {
            return Err(c.error(format!("a value of kind {kind}")));
        }
        let far = kinds.iter().filter(|&&kind| kind == 1).count();
        let (ids, offsets) = (c.varints(far)?, c.varints(far)?);
        let mut places = ids.into_iter().zip(offsets);
        if self.entries.len() + n > MAX_ENTRIES {
            return Err(c.error(format!("the database has more than {MAX_ENTRIES} keys")));
        }
        for ((key, length), kind) in keys.iter().zip(lengths).zip(kinds) {
            let value = match kind {
                0 => Value::Inline(c.take(length)?.into()),
                _ => {
                    let (id, offset) = places.next().ok_or_else(|| c.error("a value has no place"))?;
                    let path = self.directory.join(&file_of(files, id, c)?.path);
                    Value::File { path, offset, length }
                }
            };
            let key = String::from_utf8([prefix, key].concat()).map_err(|_| c.error("a key is not UTF-8"))?;
            if self.entries.last().is_some_and(|(last, _)| *last >= key) {
                return Err(c.error(format!("the key {key:?} is out of order")));
            }
            self.entries.push((key, value));
        }
        c.done()
    }
}
