//! Packs matrices while their bytes are made, piece by piece, on the threads that make them: out of the cache into the
//! weight, without a buffer in between. The weight waits for that when it is first used.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use pi0_device::{Dtype, Error, LinearPart, Order, Result, Sink};

use crate::Isa;
use crate::kernels::{Kernel, Packed, pack};
use crate::memory::Block;
use crate::weight::{Linear, Origin, as_floats, pack_rows};

/// Bytes of a piece: it should stay in the second-level cache beside what a decoder needs.
const PIECE: usize = 256 << 10;

/// A weight that other threads fill.
#[derive(Debug)]
pub(crate) struct Filling {
    /// The first matrix, for messages.
    name: String,
    state: Mutex<State>,
    changed: Condvar,
    /// Whether it is whole: seen without taking the lock.
    whole: AtomicBool,
}

#[derive(Debug)]
struct State {
    /// Matrices that are not there yet.
    left: usize,
    failed: Option<String>,
}

impl Filling {
    /// Waits until every matrix is packed.
    pub(crate) fn wait(&self) -> Result<()> {
        if self.whole.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        while state.left > 0 {
            state = self.changed.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
        match &state.failed {
            None => Ok(()),
            Some(what) => Err(Error::Source { name: self.name.clone(), what: what.clone() }),
        }
    }

    /// One matrix less is missing.
    fn ended(&self, result: std::result::Result<(), String>) {
        let mut state = self.state.lock().unwrap_or_else(PoisonError::into_inner);
        state.left = state.left.saturating_sub(1);
        if let Err(what) = result {
            state.failed.get_or_insert(what);
        }
        if state.left == 0 {
            self.whole.store(state.failed.is_none(), Ordering::Release);
            self.changed.notify_all();
        }
    }
}

/// Inputs whose values lie together in a packed tile.
fn group(kernel: &Kernel) -> usize {
    kernel.group / kernel.packed.size()
}

/// Whether these matrices can be packed so: all of them are made in pieces, their columns lie together, and neither strips
/// nor groups of inputs are cut by the parts in which they lie.
pub(crate) fn possible(parts: &[LinearPart], kernel: &Kernel) -> bool {
    kernel.packed != Packed::Int8
        && parts.iter().all(|p| {
            let w = &p.weight;
            let Order::Columns { splits, groups } = w.order() else { return false };
            let (inputs, outputs) = (w.cols() / splits, w.rows() / groups);
            w.pours()
                && p.columns.is_none()
                && (splits == 1 && groups == 1 || inputs.is_multiple_of(group(kernel)))
                && (groups == 1 || outputs.is_multiple_of(kernel.strip))
        })
}

/// Has every matrix poured into `linear`.
pub(crate) fn start(parts: &[LinearPart], origins: &[Origin<'_>], linear: &Linear, isa: Isa) -> Arc<Filling> {
    let filling = Arc::new(Filling {
        name: parts.first().map_or(String::new(), |p| p.weight.name.clone()),
        state: Mutex::new(State { left: parts.len(), failed: None }),
        changed: Condvar::new(),
        whole: AtomicBool::new(false),
    });
    let sinks: Vec<_> = parts.iter().map(|part| Matrix::new(part, origins, linear, isa, &filling)).collect();
    for (part, sink) in parts.iter().zip(sinks) {
        part.weight.pour(Arc::new(sink));
    }
    filling
}

/// A strip of a matrix.
#[derive(Debug, Clone, Copy)]
struct Place {
    /// Its number in the packed weight.
    strip: usize,
    /// Its first column among those that lie together, and how many it has.
    column: usize,
    count: usize,
}

/// Where one matrix goes.
struct Matrix {
    isa: Isa,
    kernel: &'static Kernel,
    dtype: Dtype,
    /// The weight's memory, which lives as long as anybody writes to it.
    right: Arc<Block>,
    filling: Arc<Filling>,
    /// Depth tiles of a panel.
    tiles: usize,
    /// Inputs that lie one behind the other, and outputs that lie together, as [`Order::Columns`] has them.
    inputs: usize,
    outputs: usize,
    groups: usize,
    /// The strips of each group of outputs.
    places: Vec<Vec<Place>>,
}

impl std::fmt::Debug for Matrix {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Matrix").field("of", &self.filling.name).finish_non_exhaustive()
    }
}

impl Matrix {
    fn new(
        part: &LinearPart,
        origins: &[Origin<'_>],
        linear: &Linear,
        isa: Isa,
        filling: &Arc<Filling>,
    ) -> Self {
        let w = &part.weight;
        let (splits, groups) = match w.order() {
            Order::Columns { splits, groups } => (splits, groups),
            Order::Rows => (1, 1),
        };
        let outputs = w.rows() / groups;
        let mut places = vec![Vec::new(); groups];
        for (strip, o) in origins.iter().enumerate().filter(|(_, o)| std::ptr::eq(o.part, part)) {
            if o.strip.count > 0 {
                let place = Place { strip, column: o.row % outputs, count: o.strip.count };
                places[o.row / outputs].push(place);
            }
        }
        Self {
            isa,
            kernel: linear.kernel,
            dtype: w.dtype,
            right: linear.right.clone(),
            filling: filling.clone(),
            tiles: linear.tiles(),
            inputs: w.cols() / splits,
            outputs,
            groups,
            places,
        }
    }

    /// Bytes of the outputs of one input that lie together.
    fn row(&self) -> usize {
        self.outputs * self.dtype.size()
    }

    /// Packs `rows`, neighbouring inputs from `input` on of one depth tile, of one group of outputs.
    fn put(&self, input: usize, group_of_outputs: usize, rows: &[&[u8]]) {
        let (kernel, depth) = (self.kernel, self.kernel.depth());
        let (tile, half) = (kernel.right_tile(), kernel.right_tile() / 2);
        let line = kernel.strip * kernel.group;
        let first = input % depth / group(kernel) * line;
        let bytes = rows.len().div_ceil(group(kernel)) * line;
        let size = self.dtype.size();
        let places = &self.places[group_of_outputs];
        let start = |place: &Place| {
            let start =
                (place.strip / 2 * self.tiles + input / depth) * tile + place.strip % 2 * half + first;
            assert!(first + bytes <= half && start + bytes <= self.right.len());
            // SAFETY: inside the block.
            unsafe { self.right.as_ptr().add(start) }
        };
        let mut floats: [&[f32]; 64] = [&[]; 64];
        let floats = &mut floats[..rows.len()];
        if self.dtype == Dtype::F32 && as_floats(rows, floats) {
            let strips = places.iter().map(|p| (p.column..p.column + p.count, start(p)));
            // SAFETY: these inputs of these strips come once, so nobody else writes there, and nobody reads before the
            // filling is whole; tiles and groups are whole cache lines.
            if unsafe { pack::strips_across(self.isa, kernel, floats, strips) } {
                return;
            }
        }
        let mut columns: [&[u8]; 64] = [&[]; 64];
        for place in places {
            for (column, row) in columns.iter_mut().zip(rows) {
                *column = &row[place.column * size..][..place.count * size];
            }
            // SAFETY: as above.
            let out = unsafe { std::slice::from_raw_parts_mut(start(place), bytes) };
            pack_rows(self.isa, kernel, self.dtype, &columns[..rows.len()], out);
        }
    }
}

impl Sink for Matrix {
    fn unit(&self) -> usize {
        let (depth, group) = (self.kernel.depth(), group(self.kernel));
        let rows = (PIECE / self.row().max(1)).min(depth) / group * group;
        rows.max(group) * self.row()
    }

    fn take(&self, at: usize, bytes: &[u8]) {
        let (row, depth) = (self.row(), self.kernel.depth());
        let (first, count) = (at / row, bytes.len() / row);
        let mut done = 0;
        while done < count {
            let (matrix, inner) = ((first + done) / self.inputs, (first + done) % self.inputs);
            let input = matrix / self.groups * self.inputs + inner;
            let n = (count - done).min(self.inputs - inner).min(depth - input % depth);
            let mut rows: [&[u8]; 64] = [&[]; 64];
            for (rows, bytes) in rows.iter_mut().zip(bytes[done * row..][..n * row].chunks_exact(row)) {
                *rows = bytes;
            }
            self.put(input, matrix % self.groups, &rows[..n]);
            done += n;
        }
    }

    fn end(&self, result: std::result::Result<(), String>) {
        self.filling.ended(result);
    }
}
