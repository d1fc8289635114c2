//! What a tape was asked for, call by call, so that the same work is known again without being written again.
//!
//! A call's key is a few words that decide everything it launches: the operation, its operands by their index on the tape or
//! by the id of their region, weights by the ids of theirs, shapes and constants. Two tapes whose calls have equal keys are
//! the same launches on the same memory. So a tape that begins like one that was recorded writes no launches: it compares
//! keys, and where they part it goes on from the launches of the recorded one.

use std::sync::Arc;

use crate::memory::Region;
use crate::tape::Launch;

/// The words of one call.
#[derive(Debug, Default)]
pub(crate) struct Key(pub(crate) Vec<u32>);

impl Key {
    pub(crate) fn words(&mut self, words: &[u32]) {
        self.0.extend_from_slice(words);
    }

    pub(crate) fn sizes<const N: usize>(&mut self, sizes: [usize; N]) {
        self.0.extend_from_slice(&sizes.map(|n| n as u32));
    }

    /// A region by its id, which no other one ever has.
    pub(crate) fn region(&mut self, region: &Region) {
        self.0.extend_from_slice(&[region.id as u32, (region.id >> 32) as u32]);
    }
}

/// How far a tape was when a call ended.
#[derive(Debug, Clone, Copy, Default)]
pub(crate) struct Mark {
    pub(crate) words: usize,
    pub(crate) values: usize,
    pub(crate) launches: usize,
    pub(crate) outer: usize,
}

/// All calls of a tape.
#[derive(Default)]
pub(crate) struct Script {
    /// Of each call the number of its words, then these.
    pub(crate) words: Vec<u32>,
    pub(crate) marks: Vec<Mark>,
    /// Bytes of each value.
    pub(crate) values: Vec<u64>,
    pub(crate) launches: Vec<Launch>,
    /// Regions that were there before, which the launches name.
    pub(crate) outer: Vec<Arc<Region>>,
}

impl Script {
    /// The same calls, kept by a recording: it keeps the memory of the regions, which does not count as use.
    pub(crate) fn kept(
        words: Vec<u32>,
        marks: Vec<Mark>,
        values: Vec<u64>,
        launches: Vec<Launch>,
        outer: &[Arc<Region>],
    ) -> Arc<Self> {
        let outer = outer.iter().inspect(|region| region.keep()).cloned().collect();
        Arc::new(Self { words, marks, values, launches, outer })
    }

    /// Whether the call that begins at this word has this key.
    pub(crate) fn has(&self, at: usize, key: &Key) -> bool {
        let n = key.0.len();
        self.words.get(at) == Some(&(n as u32)) && self.words[at + 1..at + 1 + n] == key.0[..]
    }
}

impl Drop for Script {
    fn drop(&mut self) {
        self.outer.iter().for_each(|region| region.let_go());
    }
}
