//! One array: its sizes, and reading it sub-array after sub-array into any order of axes.

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use crate::store::{Content, Store};
use crate::stream::Stream;
use crate::zarr::{self, Layout};
use crate::{Error, Result};

/// Bytes of a chunk that are decoded before they are put in their places: they stay in the second-level cache.
const BLOCK: usize = 256 << 10;
/// Rows of such a block where columns become rows: a cache line of the result is written as a whole.
const ROWS: usize = 16;

/// Number format of an array.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Dtype {
    /// IEEE 754, 32 bits.
    F32,
    /// The upper half of an f32.
    Bf16,
    /// IEEE 754, 16 bits.
    F16,
    /// A format that weights do not have: its name and bytes.
    Other(&'static str, usize),
}

impl Dtype {
    /// Bytes of a value.
    pub fn size(self) -> usize {
        match self {
            Dtype::F32 => 4,
            Dtype::Bf16 | Dtype::F16 => 2,
            Dtype::Other(_, size) => size,
        }
    }

    /// JAX's name.
    pub fn name(self) -> &'static str {
        match self {
            Dtype::F32 => "float32",
            Dtype::Bf16 => "bfloat16",
            Dtype::F16 => "float16",
            Dtype::Other(name, _) => name,
        }
    }
}

/// Makes values of half as many bytes of the first argument's.
pub type Round = fn(&[u8], &mut [u8]);

/// Where the chunks of a shard are: offsets and lengths.
type ShardIndex = Vec<(u64, u64)>;

/// A stored array. Opening one reads its description alone.
#[derive(Debug)]
pub struct Array {
    store: Arc<Store>,
    /// Its name in the store.
    name: String,
    layout: Layout,
    /// Of each shard that was read.
    indices: Mutex<HashMap<Vec<usize>, Arc<ShardIndex>>>,
}

impl Array {
    pub(crate) fn open(store: &Arc<Store>, name: &str) -> Result<Self> {
        let (two, three) = (format!("{name}/.zarray"), format!("{name}/zarr.json"));
        let layout = if let Some(json) = store.get_small(&two)? {
            zarr::version2(&json, &store.path(&two))?
        } else if let Some(json) = store.get_small(&three)? {
            zarr::version3(&json, &store.path(&three))?
        } else {
            let what = "the array is named and not stored; if a download was cut short, fetch it again";
            return Err(Error::damaged(&store.path(name), what));
        };
        Ok(Self { store: store.clone(), name: name.into(), layout, indices: Mutex::default() })
    }

    /// Number format.
    pub fn dtype(&self) -> Dtype {
        self.layout.dtype
    }

    /// Sizes, outermost first.
    pub fn shape(&self) -> &[usize] {
        &self.layout.shape
    }

    /// Sizes of what is compressed as one.
    pub fn chunk(&self) -> &[usize] {
        &self.layout.chunk
    }

    /// Bytes of all values, decoded.
    pub fn bytes(&self) -> u64 {
        self.layout.shape.iter().product::<usize>() as u64 * self.layout.dtype.size() as u64
    }

    /// The directory and the array's name in it, for messages.
    pub fn path(&self) -> PathBuf {
        self.store.path(&self.name)
    }

    /// All values in C order, little endian.
    pub fn read(self: &Arc<Self>) -> Result<Vec<u8>> {
        let mut out = buffer(self.bytes(), &self.path())?;
        Reader::new(self.clone()).read(&[], &c_strides(self.shape()), &mut out)?;
        Ok(out)
    }

    /// The chunk at these coordinates of the grid of chunks; none if it is not stored and has the fill value.
    fn content(&self, at: &[usize]) -> Result<(Option<Content>, PathBuf)> {
        let Some(shards) = &self.layout.shards else {
            let key = self.layout.keys.of(&self.name, at);
            let path = self.store.path(&key);
            return Ok((self.store.get(&key)?, path));
        };
        let counts = shards.counts(&self.layout.chunk);
        let shard: Vec<usize> = at.iter().zip(&counts).map(|(a, n)| a / n).collect();
        let key = self.layout.keys.of(&self.name, &shard);
        let path = self.store.path(&key);
        let Some(content) = self.store.get(&key)? else { return Ok((None, path)) };
        let total: usize = counts.iter().product();
        let index = {
            let mut indices = self.indices.lock().unwrap_or_else(PoisonError::into_inner);
            match indices.get(&shard) {
                Some(index) => index.clone(),
                None => {
                    let read = read_index(&content, total, shards.checksum, shards.at_end, &path)?;
                    indices.entry(shard).or_insert(Arc::new(read)).clone()
                }
            }
        };
        let inner = at.iter().zip(&counts).fold(0, |i, (a, n)| i * n + a % n);
        match index[inner] {
            (u64::MAX, u64::MAX) => Ok((None, path)),
            (offset, length) => Ok((Some(content.part(offset, length, &path)?), path)),
        }
    }
}

fn read_index(
    content: &Content,
    chunks: usize,
    checksum: bool,
    at_end: bool,
    path: &Path,
) -> Result<ShardIndex> {
    let size = 16 * chunks + if checksum { 4 } else { 0 };
    let at = if at_end { content.length().checked_sub(size as u64) } else { Some(0) };
    let at = at.ok_or_else(|| Error::damaged(path, "a shard is too short for its index"))?;
    // The index lies in the value, so it is no larger than a file.
    if size as u64 > content.length() {
        return Err(Error::damaged(path, "a shard is too short for its index"));
    }
    let mut bytes = vec![0; size];
    content.read_exact_at(&mut bytes, at, path)?;
    let (entries, tail) = bytes.split_at(16 * chunks);
    if checksum && crc32c::crc32c(entries).to_le_bytes() != tail {
        return Err(Error::damaged(path, "the checksum of a shard's index does not fit its bytes"));
    }
    let number = |b: &[u8]| u64::from_le_bytes([b[0], b[1], b[2], b[3], b[4], b[5], b[6], b[7]]);
    Ok(entries.chunks_exact(16).map(|e| (number(&e[..8]), number(&e[8..]))).collect())
}

/// Memory for `bytes` of zeros, or an error.
fn buffer(bytes: u64, path: &Path) -> Result<Vec<u8>> {
    let mut out = Vec::new();
    let size = usize::try_from(bytes).unwrap_or(usize::MAX);
    match out.try_reserve_exact(size) {
        Ok(()) => {
            out.resize(size, 0);
            Ok(out)
        }
        Err(_) => Err(Error::damaged(path, format!("{bytes} bytes do not fit into memory"))),
    }
}

/// Distances between neighbours along each axis where the last axis lies densest.
pub(crate) fn c_strides(shape: &[usize]) -> Vec<usize> {
    let mut strides = vec![1; shape.len()];
    for i in (1..shape.len()).rev() {
        strides[i - 1] = strides[i] * shape[i];
    }
    strides
}

/// An axis of the part of a chunk that is read.
#[derive(Debug, Clone, Copy)]
struct Axis {
    /// Length in the chunk, padding included.
    stored: usize,
    /// Length in the array.
    valid: usize,
    /// Distance of neighbours in the result, in values.
    stride: usize,
}

/// A chunk that is being read, or the absence of one.
enum Chunk {
    Stored(Box<Stream>),
    Fill,
}

/// Reads sub-arrays of an array. Each chunk is a stream: going forward through the leading axes decodes everything
/// once, going back begins the chunk anew.
pub struct Reader {
    array: Arc<Array>,
    chunks: HashMap<Vec<usize>, Chunk>,
    scratch: Vec<u8>,
}

impl std::fmt::Debug for Reader {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Reader").field("array", &self.array.name).finish_non_exhaustive()
    }
}

impl Reader {
    /// Reads nothing yet.
    pub fn new(array: Arc<Array>) -> Self {
        Self { array, chunks: HashMap::new(), scratch: Vec::new() }
    }

    /// The array.
    pub fn array(&self) -> &Arc<Array> {
        &self.array
    }

    /// Reads the sub-array at the leading coordinates `at`. Its value at `(i, j, …)` goes to place
    /// `i * strides[0] + j * strides[1] + …` of `out`, counted in values.
    ///
    /// # Panics
    /// If `at` lies outside the array, or `out` or `strides` are not those of the sub-array.
    pub fn read(&mut self, at: &[usize], strides: &[usize], out: &mut [u8]) -> Result<()> {
        let array = self.array.clone();
        let Layout { shape, chunk, dtype, .. } = &array.layout;
        let size = dtype.size();
        let rest = &shape[at.len()..];
        assert!(at.iter().zip(shape).all(|(i, n)| i < n), "{at:?} of {shape:?}");
        assert_eq!(strides.len(), rest.len(), "strides {strides:?} of {rest:?}");
        let values = rest.iter().product::<usize>();
        assert_eq!(out.len(), values * size, "bytes of {rest:?}");
        if values == 0 {
            return Ok(());
        }
        let last: usize = rest.iter().zip(strides).map(|(n, s)| (n - 1) * s).sum();
        assert!(last < values, "strides {strides:?} of {rest:?}");

        let inner = &chunk[at.len()..];
        let first: Vec<usize> = at.iter().zip(chunk).map(|(i, c)| i / c).collect();
        let local = at.iter().zip(chunk).fold(0u64, |n, (i, c)| n * *c as u64 + (i % c) as u64);
        let part = inner.iter().product::<usize>() as u64 * size as u64;
        let grid: Vec<usize> = rest.iter().zip(inner).map(|(n, c)| n.div_ceil(*c)).collect();
        for index in Indices::new(&grid) {
            let origin: Vec<usize> = index.iter().zip(inner).map(|(i, c)| i * c).collect();
            let axes = origin.iter().zip(inner).zip(rest).zip(strides);
            let axes: Vec<Axis> = axes
                .map(|(((o, c), n), &stride)| Axis { stored: *c, valid: *c.min(&(n - o)), stride })
                .collect();
            let base = origin.iter().zip(strides).map(|(o, s)| o * s).sum();
            let key: Vec<usize> = first.iter().chain(&index).copied().collect();
            self.read_chunk(&key, local * part, &axes, base, out)?;
        }
        Ok(())
    }

    /// Reads what one chunk holds of the sub-array at the leading coordinates `at`: the chunk whose coordinates along the
    /// other axes are `part`, in its own C order, with `round` from four bytes a value to two. Several readers may read
    /// the chunks of an array side by side, each some of them.
    ///
    /// # Panics
    /// If there is no such chunk, the chunks do not divide the array, or `out` is not as large as the part.
    pub fn read_part(
        &mut self,
        at: &[usize],
        part: &[usize],
        round: Option<Round>,
        out: &mut [u8],
    ) -> Result<()> {
        let (key, start, bytes) = self.place(at, part);
        assert_eq!(out.len(), if round.is_some() { bytes / 2 } else { bytes }, "bytes of a chunk's part");
        let Some(round) = round else {
            self.seek(&key, start)?.fill(out)?;
            self.leave(&key);
            return Ok(());
        };
        self.pieces(&key, start, bytes, BLOCK, &mut |from, block| {
            round(block, &mut out[from / 2..][..block.len() / 2]);
        })
    }

    /// The same in pieces of `unit` bytes, the last of which may be shorter: `take` hears where in the part each begins.
    ///
    /// # Panics
    /// If there is no such chunk, or the chunks do not divide the array.
    pub fn pour_part(
        &mut self,
        at: &[usize],
        part: &[usize],
        unit: usize,
        take: &mut dyn FnMut(usize, &[u8]),
    ) -> Result<()> {
        let (key, start, bytes) = self.place(at, part);
        self.pieces(&key, start, bytes, unit.max(1), take)
    }

    /// The key of a chunk, and of what it holds of a sub-array the first byte and the number of bytes.
    fn place(&self, at: &[usize], part: &[usize]) -> (Vec<usize>, u64, usize) {
        let Layout { shape, chunk, dtype, .. } = &self.array.layout;
        let whole = shape[at.len()..].iter().zip(&chunk[at.len()..]).zip(part);
        assert_eq!(at.len() + part.len(), shape.len(), "chunk {part:?} at {at:?} of {shape:?}");
        assert!(at.iter().zip(shape).all(|(i, n)| i < n), "{at:?} of {shape:?}");
        for ((n, c), p) in whole {
            assert!(n.is_multiple_of(*c) && p * c < *n, "chunk {part:?} at {at:?} of {shape:?} in {chunk:?}");
        }
        let bytes = chunk[at.len()..].iter().product::<usize>() * dtype.size();
        let key = at.iter().zip(chunk).map(|(i, c)| i / c).chain(part.iter().copied()).collect();
        let local = at.iter().zip(chunk).fold(0u64, |n, (i, c)| n * *c as u64 + (i % c) as u64);
        (key, local * bytes as u64, bytes)
    }

    /// Decodes `bytes` bytes of a chunk from `start` on, `unit` at a time.
    fn pieces(
        &mut self,
        key: &[usize],
        start: u64,
        bytes: usize,
        unit: usize,
        take: &mut dyn FnMut(usize, &[u8]),
    ) -> Result<()> {
        let source = self.seek(key, start)?;
        source.scratch.resize(source.scratch.len().max(unit.min(bytes)), 0);
        for from in (0..bytes).step_by(unit) {
            let block = &mut source.scratch[..unit.min(bytes - from)];
            source.chunk.fill(source.pattern, block)?;
            take(from, block);
        }
        self.leave(key);
        Ok(())
    }

    /// Reads the part of a chunk that starts at byte `start`.
    fn read_chunk(
        &mut self,
        key: &[usize],
        start: u64,
        axes: &[Axis],
        base: usize,
        out: &mut [u8],
    ) -> Result<()> {
        let size = self.array.layout.dtype.size();
        let mut source = self.seek(key, start)?;
        let axes = merged(axes);
        match size {
            1 => copy::<1>(&mut source, &axes, base, out)?,
            2 => copy::<2>(&mut source, &axes, base, out)?,
            4 => copy::<4>(&mut source, &axes, base, out)?,
            _ => copy::<8>(&mut source, &axes, base, out)?,
        }
        self.leave(key);
        Ok(())
    }

    /// The chunk at `key`, its next byte the one at `start`.
    fn seek(&mut self, key: &[usize], start: u64) -> Result<ChunkSource<'_>> {
        let layout = &self.array.layout;
        let length = layout.chunk.iter().product::<usize>() as u64 * layout.dtype.size() as u64;
        let fresh = match self.chunks.get(key) {
            Some(Chunk::Stored(stream)) => stream.position() > start,
            Some(Chunk::Fill) => false,
            None => true,
        };
        if fresh {
            let (content, path) = self.array.content(key)?;
            let chunk = match content {
                Some(content) => Chunk::Stored(Box::new(Stream::new(content, layout.coding, length, &path)?)),
                None if layout.fill.is_some() => Chunk::Fill,
                None => {
                    let what = "a chunk is not stored; if a download was cut short, fetch it again";
                    return Err(Error::damaged(&path, what));
                }
            };
            self.chunks.insert(key.into(), chunk);
        }
        self.scratch.resize(self.scratch.len().max(BLOCK), 0);
        let chunk = self.chunks.get_mut(key).expect("inserted above");
        if let Chunk::Stored(stream) = chunk {
            while stream.position() < start {
                let n = (start - stream.position()).min(BLOCK as u64) as usize;
                stream.fill(&mut self.scratch[..n])?;
            }
        }
        let pattern = self.array.layout.fill.as_deref().unwrap_or(&[]);
        Ok(ChunkSource { chunk, pattern, scratch: &mut self.scratch })
    }

    /// Forgets a chunk that was read to its end.
    fn leave(&mut self, key: &[usize]) {
        if matches!(self.chunks.get(key), Some(Chunk::Stored(stream)) if stream.is_over()) {
            self.chunks.remove(key);
        }
    }
}

/// A chunk, what it holds where it is not stored, and memory to decode it into.
struct ChunkSource<'a> {
    chunk: &'a mut Chunk,
    pattern: &'a [u8],
    scratch: &'a mut Vec<u8>,
}

impl Chunk {
    fn fill(&mut self, pattern: &[u8], out: &mut [u8]) -> Result<()> {
        match self {
            Chunk::Stored(stream) => stream.fill(out),
            Chunk::Fill => {
                for value in out.chunks_exact_mut(pattern.len()) {
                    value.copy_from_slice(pattern);
                }
                Ok(())
            }
        }
    }
}

impl ChunkSource<'_> {
    fn fill(&mut self, out: &mut [u8]) -> Result<()> {
        self.chunk.fill(self.pattern, out)
    }
}

/// The same axes in fewer: those of one value are left out, neighbours that lie one in the other are one axis.
fn merged(axes: &[Axis]) -> Vec<Axis> {
    let mut out: Vec<Axis> = Vec::with_capacity(axes.len());
    for &axis in axes.iter().rev() {
        match out.last_mut() {
            _ if axis.stored == 1 => {}
            Some(inner) if inner.valid == inner.stored && axis.stride == inner.stride * inner.stored => {
                inner.valid = axis.valid * inner.stored;
                inner.stored *= axis.stored;
            }
            _ => out.push(axis),
        }
    }
    out.reverse();
    while out.len() < 2 {
        out.insert(0, Axis { stored: 1, valid: 1, stride: 1 });
    }
    out
}

/// Decodes the part of a chunk that `axes` describe and puts its values, of `N` bytes each, in their places.
fn copy<const N: usize>(
    source: &mut ChunkSource<'_>,
    axes: &[Axis],
    base: usize,
    out: &mut [u8],
) -> Result<()> {
    let (outer, [rows, cols]) = axes.split_at(axes.len() - 2) else { unreachable!("two axes at least") };
    let width = cols.stored * N;
    let counts: Vec<usize> = outer.iter().map(|a| a.stored).collect();
    for index in Indices::new(&counts) {
        let valid = index.iter().zip(outer).all(|(i, a)| *i < a.valid);
        let base = base + index.iter().zip(outer).map(|(i, a)| i * a.stride).sum::<usize>();
        let (valid_rows, valid_cols) = if valid { (rows.valid, cols.valid) } else { (0, 0) };
        let dense = cols.stride == 1 && valid_cols == cols.stored;
        // Whole rows that lie densely in the result are decoded where they belong.
        let direct = if dense { valid_rows } else { 0 };
        for r in 0..direct {
            let to = (base + r * rows.stride) * N;
            source.fill(&mut out[to..to + width])?;
        }
        let step = (BLOCK / width).max(1).next_multiple_of(ROWS);
        for first in (direct..rows.stored).step_by(step) {
            // Padding and wide rows that go elsewhere pass through the scratch memory.
            let n = step.min(rows.stored - first);
            source.scratch.resize(source.scratch.len().max(n * width), 0);
            let block = &mut source.scratch[..n * width];
            source.chunk.fill(source.pattern, block)?;
            let used = n.min(valid_rows.saturating_sub(first));
            let place = base + first * rows.stride;
            let (values, _) = block.as_chunks::<N>();
            let (out, _) = out.as_chunks_mut::<N>();
            scatter(values, cols.stored, [used, valid_cols], place, [rows.stride, cols.stride], out);
        }
    }
    Ok(())
}

/// `out[place + r * strides[0] + c * strides[1]] = values[r * width + c]`, a cache line at a time where rows lie
/// densely in the result.
fn scatter<T: Copy>(
    values: &[T],
    width: usize,
    [rows, cols]: [usize; 2],
    place: usize,
    strides: [usize; 2],
    out: &mut [T],
) {
    if strides[0] != 1 {
        for r in 0..rows {
            for c in 0..cols {
                out[place + r * strides[0] + c * strides[1]] = values[r * width + c];
            }
        }
        return;
    }
    for first in (0..rows).step_by(ROWS) {
        let n = ROWS.min(rows - first);
        let values = &values[first * width..];
        for c in 0..cols {
            let start = place + first + c * strides[1];
            if let Some(line) = out[start..].first_chunk_mut::<ROWS>().filter(|_| n == ROWS) {
                *line = std::array::from_fn(|r| values[r * width + c]);
            } else {
                for (r, to) in out[start..start + n].iter_mut().enumerate() {
                    *to = values[r * width + c];
                }
            }
        }
    }
}

/// All coordinates of a grid in C order.
struct Indices<'a> {
    counts: &'a [usize],
    next: Option<Vec<usize>>,
}

impl<'a> Indices<'a> {
    fn new(counts: &'a [usize]) -> Self {
        let next = (!counts.contains(&0)).then(|| vec![0; counts.len()]);
        Self { counts, next }
    }
}

impl Iterator for Indices<'_> {
    type Item = Vec<usize>;

    fn next(&mut self) -> Option<Vec<usize>> {
        let current = self.next.take()?;
        let mut following = current.clone();
        for (i, n) in following.iter_mut().zip(self.counts).rev() {
            *i += 1;
            if *i < *n {
                self.next = Some(following);
                break;
            }
            *i = 0;
        }
        Some(current)
    }
}
