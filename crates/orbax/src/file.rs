//! Files that are read at offsets, shared by everything that points into them.

use std::collections::HashMap;
use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, Weak};

use crate::{Error, Result};

/// A file open for reading at any offset, by any thread.
#[derive(Debug)]
pub(crate) struct Source {
    path: PathBuf,
    file: File,
    length: u64,
}

/// Opens a file of a checkpoint. A pipe or a device among them would keep its reader waiting, so it is refused; whoever means
/// one names it below `/dev`, as shells do.
pub fn open_file(path: &Path) -> std::io::Result<File> {
    let kind = std::fs::metadata(path)?.file_type();
    let what = match kind {
        _ if kind.is_file() || path.starts_with("/dev") => return File::open(path),
        _ if kind.is_dir() => "it is a folder, wanted a file",
        _ => "it is a pipe, a socket or a device, wanted a file",
    };
    Err(std::io::Error::new(std::io::ErrorKind::InvalidInput, what))
}

impl Source {
    pub fn open(path: &Path) -> Result<Self> {
        let read = |e| Error::read(path, e);
        let file = open_file(path).map_err(read)?;
        let length = file.metadata().map_err(read)?.len();
        Ok(Self { path: path.into(), length, file })
    }

    pub fn length(&self) -> u64 {
        self.length
    }

    /// Fails unless `offset..offset + length` lies in the file: what a cut download shows first.
    pub fn check(&self, offset: u64, length: u64) -> Result<()> {
        match offset.checked_add(length) {
            Some(end) if end <= self.length => Ok(()),
            _ => {
                let what = format!(
                    "{length} bytes at {offset} are wanted and the file has {}; \
                     if a download was cut short, fetch it again",
                    self.length
                );
                Err(Error::damaged(&self.path, what))
            }
        }
    }

    pub fn read_exact_at(&self, out: &mut [u8], offset: u64) -> Result<()> {
        self.check(offset, out.len() as u64)?;
        read_exact_at(&self.file, out, offset).map_err(|e| Error::read(&self.path, e))
    }
}

#[cfg(unix)]
fn read_exact_at(file: &File, out: &mut [u8], offset: u64) -> std::io::Result<()> {
    std::os::unix::fs::FileExt::read_exact_at(file, out, offset)
}

#[cfg(windows)]
fn read_exact_at(file: &File, mut out: &mut [u8], mut offset: u64) -> std::io::Result<()> {
    while !out.is_empty() {
        let n = std::os::windows::fs::FileExt::seek_read(file, out, offset)?;
        if n == 0 {
            return Err(std::io::ErrorKind::UnexpectedEof.into());
        }
        out = &mut out[n..];
        offset += n as u64;
    }
    Ok(())
}

/// Files by path, each open at most once, and only while someone reads it.
#[derive(Debug, Default)]
pub(crate) struct Files(Mutex<HashMap<PathBuf, Weak<Source>>>);

impl Files {
    pub fn open(&self, path: &Path) -> Result<Arc<Source>> {
        let mut open = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(source) = open.get(path).and_then(Weak::upgrade) {
            return Ok(source);
        }
        let source = Arc::new(Source::open(path)?);
        open.insert(path.into(), Arc::downgrade(&source));
        Ok(source)
    }
}

/// Reads a whole file of at most `limit` bytes.
pub(crate) fn read_small(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let source = Source::open(path)?;
    if source.length > limit {
        return Err(Error::damaged(path, format!("it is larger than {limit} bytes")));
    }
    let mut bytes = vec![0; source.length as usize];
    source.read_exact_at(&mut bytes, 0)?;
    Ok(bytes)
}
