//! Bytes of tensors: in mapped files, in memory, or made when they are wanted.

use std::fs::File;
use std::ops::{Deref, DerefMut, Range};
use std::path::Path;
use std::sync::{Arc, OnceLock};

/// A file mapped read-only. Pages are read when touched and can be given back.
#[derive(Debug)]
pub struct MappedFile {
    map: memmap2::Mmap,
}

impl MappedFile {
    /// Maps the whole of `path`.
    ///
    /// The file must not be cut short while it is mapped: the system ends a process that reads a page that is
    /// no longer there. Checkpoints are replaced by renaming, which is safe.
    #[allow(unsafe_code)]
    pub fn open(path: &Path) -> std::io::Result<Arc<Self>> {
        let file = File::open(path)?;
        // SAFETY: the map is private to this struct and only ever read as bytes, for which every bit pattern is
        // valid; a change of the file by another process changes weights, not memory safety of typed data.
        let map = unsafe { memmap2::Mmap::map(&file)? };
        Ok(Arc::new(Self { map }))
    }

    /// The file's bytes.
    pub fn bytes(&self) -> &[u8] {
        &self.map
    }

    /// Gives the whole pages inside `range` back to the system; reading them again brings them back.
    #[allow(unsafe_code)]
    pub fn release(&self, range: Range<usize>) {
        #[cfg(unix)]
        {
            const PAGE: usize = 4096;
            let (start, end) = (range.start.next_multiple_of(PAGE), range.end / PAGE * PAGE);
            if start < end {
                // SAFETY: the map is file-backed, shared and read-only, so discarded pages are read again from
                // the file; nothing can be lost. Failure only means that memory is freed later.
                let _ = unsafe {
                    self.map.unchecked_advise_range(memmap2::UncheckedAdvice::DontNeed, start, end - start)
                };
            }
        }
        #[cfg(not(unix))]
        let _ = range;
    }
}

/// Memory for the bytes of a tensor that is made: zero at first. What is large comes straight from the system, in huge
/// pages where it has them, since touching a gigabyte in small ones costs as much as decompressing it.
#[derive(Debug)]
pub struct Buffer {
    memory: Memory,
    count: usize,
}

#[derive(Debug)]
enum Memory {
    Small(Vec<u8>),
    Large(memmap2::MmapMut),
}

impl Buffer {
    /// From so many bytes on memory is mapped.
    const LARGE: usize = 1 << 20;

    /// `count` zeros; none where there is no such memory.
    pub fn zeroed(count: usize) -> Option<Self> {
        if count < Self::LARGE {
            return Some(vec![0; count].into());
        }
        let map = memmap2::MmapOptions::new().len(count).map_anon().ok()?;
        // Advice changes no contents, and its failure only means small pages.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        Some(Self { memory: Memory::Large(map), count })
    }

    /// How many bytes it can hold.
    pub fn capacity(&self) -> usize {
        match &self.memory {
            Memory::Small(bytes) => bytes.len(),
            Memory::Large(map) => map.len(),
        }
    }

    /// The same memory for `count` bytes, with whatever its last user left there.
    ///
    /// # Panics
    /// If it cannot hold as many.
    pub fn with_count(mut self, count: usize) -> Self {
        assert!(count <= self.capacity(), "{count} bytes in memory for {}", self.capacity());
        self.count = count;
        self
    }
}

impl Default for Buffer {
    fn default() -> Self {
        Vec::new().into()
    }
}

impl From<Vec<u8>> for Buffer {
    fn from(bytes: Vec<u8>) -> Self {
        Self { count: bytes.len(), memory: Memory::Small(bytes) }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        match &self.memory {
            Memory::Small(bytes) => &bytes[..self.count],
            Memory::Large(map) => &map[..self.count],
        }
    }
}

impl DerefMut for Buffer {
    fn deref_mut(&mut self) -> &mut [u8] {
        match &mut self.memory {
            Memory::Small(bytes) => &mut bytes[..self.count],
            Memory::Large(map) => &mut map[..self.count],
        }
    }
}

/// Bytes that a tensor is read from: part of a mapped file, memory, or a maker of them. Cloning shares.
#[derive(Debug, Clone)]
pub enum Bytes {
    /// A range of a mapped file.
    Mapped(Arc<MappedFile>, Range<usize>),
    /// Bytes in memory, for weights made by a program.
    Owned(Arc<Vec<u8>>),
    /// Bytes that are made when they are first wanted, and live as long as this value and its clones.
    Lazy(Lazy),
}

/// Takes the bytes of a tensor piece by piece, on the threads of whoever makes them: what is packed while it is still in a
/// processor's cache passes through memory once.
pub trait Sink: std::fmt::Debug + Send + Sync {
    /// How many bytes it takes at once. Pieces begin at multiples of that, counted from the beginning of the matrix that
    /// they lie in (see [`Order::Columns`](crate::Order::Columns)), and only what ends such a run may be shorter.
    fn unit(&self) -> usize;

    /// Bytes of the tensor from place `at` on. Pieces come once each, in any order and from several threads at once.
    fn take(&self, at: usize, bytes: &[u8]);

    /// Nothing more comes: everything was taken, or here is why not.
    fn end(&self, result: std::result::Result<(), String>);
}

/// Makes bytes that would be wasteful to keep: those of a compressed file, or of weights with adapters added.
pub trait MakeBytes: std::fmt::Debug + Send + Sync {
    /// How many there are.
    fn count(&self) -> usize;

    /// Makes them, or says why they cannot be had.
    fn make(&self) -> std::result::Result<Buffer, String>;

    /// Whether it can [`pour`](Self::pour) now.
    fn pours(&self) -> bool {
        false
    }

    /// Makes them when there is time, and hands them to `sink` instead. Returns at once, or when it is done.
    fn pour(&self, sink: Arc<dyn Sink>) {
        sink.end(Err("these bytes are made as a whole".into()));
    }

    /// Gets the memory of what it made when nobody needs it any more, to use it again.
    fn take_back(&self, buffer: Buffer) {
        drop(buffer);
    }
}

/// A maker, and what it made.
#[derive(Debug, Clone)]
pub struct Lazy {
    pub(crate) maker: Arc<dyn MakeBytes>,
    made: OnceLock<Arc<Made>>,
}

/// What was made, to be given back to its maker.
#[derive(Debug)]
struct Made {
    buffer: Buffer,
    maker: Arc<dyn MakeBytes>,
}

impl Drop for Made {
    fn drop(&mut self) {
        self.maker.take_back(std::mem::take(&mut self.buffer));
    }
}

impl Lazy {
    /// Whether its maker can hand them to a [`Sink`], and has not made them yet.
    pub(crate) fn pours(&self) -> bool {
        self.made.get().is_none() && self.maker.pours()
    }

    /// Nothing made yet.
    pub fn new(maker: Arc<dyn MakeBytes>) -> Self {
        Self { maker, made: OnceLock::new() }
    }

    /// The bytes, if they were made.
    pub(crate) fn get(&self) -> Option<&[u8]> {
        self.made.get().map(|made| &*made.buffer)
    }

    /// Makes them unless they are there.
    pub(crate) fn fetch(&self) -> std::result::Result<(), String> {
        if self.made.get().is_none() {
            let buffer = self.maker.make()?;
            if buffer.len() != self.maker.count() {
                return Err(format!("{} bytes were made", buffer.len()));
            }
            // Another thread may have been faster; its bytes are the same.
            let _ = self.made.set(Arc::new(Made { buffer, maker: self.maker.clone() }));
        }
        Ok(())
    }
}
