//! How much memory a device holds, told to whoever watches it.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

/// Counts the bytes that a device holds: weights, activations, and what it keeps for reuse. Cloning shares the count,
/// so that another thread can watch.
#[derive(Debug, Clone, Default)]
pub struct MemoryMeter(Arc<AtomicU64>);

impl MemoryMeter {
    /// Bytes held now.
    pub fn bytes(&self) -> u64 {
        self.0.load(Ordering::Relaxed)
    }

    /// Counts `bytes` for as long as the result lives.
    pub fn hold(&self, bytes: usize) -> Held {
        let bytes = bytes as u64;
        self.0.fetch_add(bytes, Ordering::Relaxed);
        Held { meter: self.clone(), bytes }
    }
}

/// A share of a [`MemoryMeter`], kept beside the memory that it stands for and given back with it.
#[derive(Debug)]
pub struct Held {
    meter: MemoryMeter,
    bytes: u64,
}

impl Drop for Held {
    fn drop(&mut self) {
        self.meter.0.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_dropped_no_longer_counts() {
        let meter = MemoryMeter::default();
        let watcher = meter.clone();
        let (a, b) = (meter.hold(100), meter.hold(20));
        assert_eq!(watcher.bytes(), 120);
        drop(a);
        assert_eq!(watcher.bytes(), 20);
        drop(b);
        assert_eq!(watcher.bytes(), 0);
    }
}
