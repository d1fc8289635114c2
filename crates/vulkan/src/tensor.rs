//! Activations: views of values that the tape computes, or that are there already.

use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::memory::Region;

/// A matrix on the device, or one that the device will compute. Cloning shares.
#[derive(Debug, Clone)]
pub struct Tensor {
    pub(crate) value: Arc<Value>,
    pub(crate) rows: usize,
    pub(crate) cols: usize,
    /// Of its first element in the value, in elements.
    pub(crate) offset: usize,
    /// From row to row, in elements.
    pub(crate) stride: usize,
}

impl Tensor {
    pub(crate) fn whole(value: Arc<Value>, rows: usize, cols: usize) -> Self {
        Self { value, rows, cols, offset: 0, stride: cols }
    }

    /// Elements from the first to behind the last.
    pub(crate) fn span(&self) -> usize {
        if self.rows == 0 || self.cols == 0 { 0 } else { (self.rows - 1) * self.stride + self.cols }
    }
}

/// Memory that operations write once.
#[derive(Debug)]
pub(crate) struct Value {
    pub(crate) bytes: u64,
    /// The tape and the index that it began with.
    born: Option<(u64, u32)>,
    /// Whether its place is another one by now.
    moved: AtomicBool,
    place: Mutex<Place>,
}

/// Where a value is.
#[derive(Debug, Clone)]
pub(crate) enum Place {
    /// On the tape of this number, at this index.
    Pending(u64, u32),
    /// In memory.
    Ready(Arc<Region>),
    /// Nowhere: the tape that would have computed it failed.
    Lost(String),
}

impl Value {
    pub(crate) fn new(bytes: u64, place: Place) -> Arc<Self> {
        let born = match place {
            Place::Pending(tape, index) => Some((tape, index)),
            _ => None,
        };
        Arc::new(Self { bytes, born, moved: AtomicBool::new(false), place: Mutex::new(place) })
    }

    /// Becomes a value of another tape.
    pub(crate) fn renew(&mut self, bytes: u64, place: Place) {
        self.bytes = bytes;
        self.born = match place {
            Place::Pending(tape, index) => Some((tape, index)),
            _ => None,
        };
        *self.moved.get_mut() = false;
        *self.place.get_mut().unwrap_or_else(PoisonError::into_inner) = place;
    }

    /// Its index on the tape of this number, if it is still there: asked for every operand.
    pub(crate) fn pending(&self, tape: u64) -> Option<u32> {
        let (born, index) = self.born?;
        (born == tape && !self.moved.load(Ordering::Acquire)).then_some(index)
    }

    fn lock(&self) -> MutexGuard<'_, Place> {
        self.place.lock().unwrap_or_else(PoisonError::into_inner)
    }

    pub(crate) fn place(&self) -> Place {
        self.lock().clone()
    }

    pub(crate) fn set(&self, place: Place) {
        let mut now = self.lock();
        *now = place;
        self.moved.store(true, Ordering::Release);
    }
}
