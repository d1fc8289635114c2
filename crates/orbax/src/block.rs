//! The blocks of an OCDBT database (manifests and nodes) and the numbers in them.

use std::path::Path;

use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};

use crate::{Error, Result};

/// Largest block, as stored and decoded: Orbax limits its nodes to 100,000,000 bytes.
pub(crate) const MAX_BLOCK: u64 = 128 << 20;

/// What kind of block is expected.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Magic {
    Manifest,
    Node,
}

impl Magic {
    pub fn number(self) -> u32 {
        match self {
            Magic::Manifest => 0x0CDB_3A2A,
            Magic::Node => 0x0CDB_20DE,
        }
    }
}

/// The body of a block: header and checksum verified, decompressed. `path` is for errors.
pub(crate) fn unwrap(raw: &[u8], magic: Magic, path: &Path) -> Result<Vec<u8>> {
    let bad = |what: String| Error::damaged(path, what);
    if let Some(what) = crate::placeholder(raw) {
        return Err(bad(format!("it is {what}")));
    }
    if raw.len() < 18 {
        return Err(bad(format!("a block of {} bytes is too short", raw.len())));
    }
    let (content, checksum) = raw.split_at(raw.len() - 4);
    let number = u32::from_be_bytes([content[0], content[1], content[2], content[3]]);
    if number != magic.number() {
        return Err(bad(format!(
            "a block begins with {number:08x}, wanted {:08x} ({magic:?})",
            magic.number()
        )));
    }
    let mut cursor = Cursor::new(&content[4..], path);
    let length = cursor.u64()?;
    if length != raw.len() as u64 {
        return Err(bad(format!("a block says that it has {length} bytes and has {}", raw.len())));
    }
    let stored = u32::from_le_bytes([checksum[0], checksum[1], checksum[2], checksum[3]]);
    if crc32c::crc32c(content) != stored {
        return Err(bad("the checksum of a block does not fit its bytes".into()));
    }
    let (version, compression) = (cursor.varint()?, cursor.varint()?);
    if version != 0 {
        return Err(Error::unsupported(path, format!("block version {version}, known is 0")));
    }
    match compression {
        0 => Ok(cursor.rest().to_vec()),
        1 => unzstd(cursor.rest(), path),
        other => Err(Error::unsupported(path, format!("block compression {other}, known are none and zstd"))),
    }
}

/// Decodes one zstd frame of at most [`MAX_BLOCK`] bytes, with or without its size in its header.
pub(crate) fn unzstd(frame: &[u8], path: &Path) -> Result<Vec<u8>> {
    let bad = |e: std::io::Error| Error::damaged(path, format!("zstd: {e}"));
    let mut decoder = Decoder::new().map_err(bad)?;
    let mut input = InBuffer::around(frame);
    let mut out = Vec::new();
    let mut part = vec![0; (1 << 17).min(frame.len().saturating_mul(16) + 64)];
    loop {
        let mut output = OutBuffer::around(part.as_mut_slice());
        let more = decoder.run(&mut input, &mut output).map_err(bad)?;
        let (made, used) = (output.pos(), input.pos());
        out.extend_from_slice(&part[..made]);
        if out.len() as u64 > MAX_BLOCK {
            return Err(Error::damaged(path, format!("a block decodes to more than {MAX_BLOCK} bytes")));
        }
        match more {
            0 if used == frame.len() => return Ok(out),
            0 => return Err(Error::damaged(path, "bytes follow the zstd frame of a block")),
            _ if made == 0 && used == frame.len() => {
                return Err(Error::damaged(path, "the zstd frame of a block ends early"));
            }
            _ => {}
        }
    }
}

/// Names and columns of numbers that belong to them.
pub(crate) type Table = (Vec<Vec<u8>>, Vec<Vec<u64>>);

/// Reads numbers one after another.
pub(crate) struct Cursor<'a> {
    bytes: &'a [u8],
    path: &'a Path,
}

impl<'a> Cursor<'a> {
    pub fn new(bytes: &'a [u8], path: &'a Path) -> Self {
        Self { bytes, path }
    }

    pub fn error(&self, what: impl Into<String>) -> Error {
        Error::damaged(self.path, what)
    }

    pub fn rest(&self) -> &'a [u8] {
        self.bytes
    }

    pub fn take(&mut self, n: u64) -> Result<&'a [u8]> {
        if n > self.bytes.len() as u64 {
            return Err(
                self.error(format!("a block ends early: {n} bytes wanted, {} left", self.bytes.len()))
            );
        }
        let (taken, rest) = self.bytes.split_at(n as usize);
        self.bytes = rest;
        Ok(taken)
    }

    pub fn u8(&mut self) -> Result<u8> {
        Ok(self.take(1)?[0])
    }

    pub fn u64(&mut self) -> Result<u64> {
        let b = self.take(8)?;
        Ok(u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]))
    }

    /// Unsigned LEB128 of up to 64 bits.
    pub fn varint(&mut self) -> Result<u64> {
        let mut value = 0u64;
        for shift in (0..64).step_by(7) {
            let byte = self.u8()?;
            let part = u64::from(byte & 0x7F);
            if shift == 63 && part > 1 {
                break;
            }
            value |= part << shift;
            if byte < 0x80 {
                return Ok(value);
            }
        }
        Err(self.error("a number has more than 64 bits"))
    }

    /// A count of things of which each takes at least one byte.
    pub fn count(&mut self) -> Result<usize> {
        let n = self.varint()?;
        if n > self.bytes.len() as u64 {
            return Err(self.error(format!("{n} entries in {} bytes", self.bytes.len())));
        }
        Ok(n as usize)
    }

    pub fn varints(&mut self, n: usize) -> Result<Vec<u64>> {
        (0..n).map(|_| self.varint()).collect()
    }

    /// `n` strings that share beginnings: lengths of what is shared with the one before, lengths of the rest, then
    /// `more` columns of numbers, then the rests.
    pub fn prefixed(&mut self, n: usize, more: usize) -> Result<Table> {
        const TOTAL: u64 = 64 << 20;
        let mut shared = self.varints(n.saturating_sub(1))?;
        shared.insert(0, 0);
        let lengths = self.varints(n)?;
        let columns = (0..more).map(|_| self.varints(n)).collect::<Result<_>>()?;
        let mut strings: Vec<Vec<u8>> = Vec::with_capacity(n);
        let mut total = 0u64;
        for (shared, length) in shared.into_iter().zip(lengths) {
            let before = strings.last().map_or(&[][..], Vec::as_slice);
            if shared > before.len() as u64 {
                return Err(self.error("a name shares more with its neighbour than that has"));
            }
            total = total.saturating_add(shared).saturating_add(length);
            if total > TOTAL {
                return Err(self.error("the names of a block are longer than 64 MiB"));
            }
            let mut string = before[..shared as usize].to_vec();
            string.extend_from_slice(self.take(length)?);
            strings.push(string);
        }
        Ok((strings, columns))
    }

    pub fn done(&self) -> Result<()> {
        match self.bytes.len() {
            0 => Ok(()),
            n => Err(self.error(format!("{n} bytes are left at the end of a block"))),
        }
    }
}
