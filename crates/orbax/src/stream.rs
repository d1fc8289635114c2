//! One stored chunk, decoded from its beginning to its end.

use std::path::{Path, PathBuf};

use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};

use crate::store::Content;
use crate::zarr::Coding;
use crate::{Error, Result};

/// Stored bytes that are read at once, at most.
const PART: usize = 256 << 10;

/// Bytes of a zstd frame's header, at most.
const HEADER: usize = 18;

/// A chunk that is being decoded.
pub(crate) struct Stream {
    /// What errors call it.
    path: PathBuf,
    content: Content,
    coding: Coding,
    /// End of what is encoded; a checksum may follow.
    end: u64,
    /// Stored bytes that were read.
    read: u64,
    checksum: u32,
    buffer: Vec<u8>,
    /// Bytes of the buffer that were read, and of those the ones that were used.
    filled: usize,
    used: usize,
    decoder: Option<Decoder<'static>>,
    /// How many stored bytes the decoder wants next: a block as a whole, which it then need not copy.
    wanted: usize,
    /// Whether the zstd frame is over.
    over: bool,
    /// Decoded bytes that were handed out, of `length`.
    position: u64,
    length: u64,
}

impl Stream {
    /// Starts at the beginning of `content`, which must decode to `length` bytes.
    pub fn new(content: Content, coding: Coding, length: u64, path: &Path) -> Result<Self> {
        let tail = if coding.checksum { 4 } else { 0 };
        let end = content.length().checked_sub(tail);
        let end = end.ok_or_else(|| Error::damaged(path, "a chunk is too short for its checksum"))?;
        if !coding.zstd && end != length {
            return Err(Error::damaged(path, format!("a chunk has {end} bytes, wanted {length}")));
        }
        let decoder = coding.zstd.then(Decoder::new).transpose().map_err(|e| Error::read(path, e))?;
        // Of a large frame first its header alone, so that blocks come one by one.
        let wanted = if coding.zstd && end > PART as u64 { HEADER } else { PART };
        Ok(Self {
            path: path.into(),
            content,
            coding,
            end,
            read: 0,
            checksum: 0,
            buffer: Vec::new(),
            filled: 0,
            used: 0,
            decoder,
            wanted,
            over: false,
            position: 0,
            length,
        })
    }

    /// Decoded bytes that were handed out so far.
    pub fn position(&self) -> u64 {
        self.position
    }

    /// Whether everything was handed out.
    pub fn is_over(&self) -> bool {
        self.position == self.length
    }

    /// Reads the next stored bytes, if any are left.
    fn refill(&mut self) -> Result<()> {
        let n = (self.end - self.read).min(self.wanted.clamp(1, PART) as u64);
        self.buffer.resize(self.buffer.len().max(n as usize), 0);
        (self.filled, self.used) = (n as usize, 0);
        let part = &mut self.buffer[..n as usize];
        self.content.read_exact_at(part, self.read, &self.path)?;
        self.read += n;
        if self.coding.checksum && n > 0 {
            self.checksum = crc32c::crc32c_append(self.checksum, part);
            if self.read == self.end {
                let mut stored = [0; 4];
                self.content.read_exact_at(&mut stored, self.end, &self.path)?;
                if u32::from_le_bytes(stored) != self.checksum {
                    return Err(Error::damaged(&self.path, "the checksum of a chunk does not fit its bytes"));
                }
            }
        }
        Ok(())
    }

    /// Fills `out` with the next decoded bytes.
    pub fn fill(&mut self, out: &mut [u8]) -> Result<()> {
        if self.position + out.len() as u64 > self.length {
            return Err(Error::damaged(&self.path, "more is read of a chunk than it has"));
        }
        let mut done = 0;
        while done < out.len() {
            if self.used == self.filled && self.read < self.end {
                self.refill()?;
            }
            done += self.decode(&mut out[done..])?;
        }
        self.position += out.len() as u64;
        if self.position == self.length { self.finish() } else { Ok(()) }
    }

    /// Decodes some bytes: at least one, or an error.
    fn decode(&mut self, out: &mut [u8]) -> Result<usize> {
        let input = &self.buffer[self.used..self.filled];
        let Some(decoder) = &mut self.decoder else {
            let n = input.len().min(out.len());
            out[..n].copy_from_slice(&input[..n]);
            self.used += n;
            return if n > 0 { Ok(n) } else { Err(Error::damaged(&self.path, "a chunk ends early")) };
        };
        if self.over {
            let what = format!("a chunk decodes to less than its {} bytes", self.length);
            return Err(Error::damaged(&self.path, what));
        }
        let (mut input, mut output) = (InBuffer::around(input), OutBuffer::around(out));
        let more = decoder
            .run(&mut input, &mut output)
            .map_err(|e| Error::damaged(&self.path, format!("a chunk cannot be decompressed: {e}")))?;
        let (used, made) = (input.pos(), output.pos());
        self.used += used;
        self.wanted = more;
        self.over = more == 0;
        if made == 0 && !self.over && self.used == self.filled && self.read == self.end {
            return Err(Error::damaged(&self.path, "the zstd stream of a chunk ends early"));
        }
        Ok(made)
    }

    /// After the last byte: nothing may follow, and the checksum has been seen.
    fn finish(&mut self) -> Result<()> {
        while self.decoder.is_some() && !self.over {
            if self.used == self.filled && self.read < self.end {
                self.refill()?;
            }
            if self.decode(&mut [0])? > 0 {
                let what = format!("a chunk decodes to more than its {} bytes", self.length);
                return Err(Error::damaged(&self.path, what));
            }
        }
        if self.used < self.filled || self.read < self.end {
            return Err(Error::damaged(&self.path, "bytes follow the data of a chunk"));
        }
        // Neither the decoder's window nor the buffer is needed any more.
        self.buffer = Vec::new();
        (self.filled, self.used) = (0, 0);
        self.decoder = None;
        Ok(())
    }
}
