//! The allocator of device memory.
//!
//! Tensors are interleaved over all banks, tile by tile, so one range of addresses is reserved in every bank at
//! once and a single list of gaps suffices.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use crate::error::Fault;

/// Boundary of every allocation: what NoC transfers to and from DRAM need, and more.
const ALIGN: u64 = 64;

/// Free ranges of a bank, sorted, never touching.
#[derive(Debug)]
struct Gaps {
    gaps: Vec<(u64, u64)>,
    /// Freed while commands that may use them wait; a gap again once those have run.
    held: Vec<(u64, u64)>,
    /// Whether such commands wait.
    busy: bool,
    start: u64,
    end: u64,
}

impl Gaps {
    fn free(&mut self, start: u64, end: u64) {
        let gaps = &mut self.gaps;
        let at = gaps.partition_point(|gap| gap.0 < start);
        gaps.insert(at, (start, end));
        if at + 1 < gaps.len() && gaps[at + 1].0 == end {
            gaps[at].1 = gaps.remove(at + 1).1;
        }
        if at > 0 && gaps[at - 1].1 == start {
            gaps[at - 1].1 = gaps.remove(at).1;
        }
    }
}

/// Memory of a device. Cloning shares.
#[derive(Debug, Clone)]
pub(crate) struct Dram {
    gaps: Arc<Mutex<Gaps>>,
    banks: u64,
}

/// A range in every bank, free again when dropped.
#[derive(Debug)]
pub(crate) struct Region {
    dram: Dram,
    base: u64,
    bytes: u64,
}

impl Dram {
    /// `banks` banks with addresses `start..end` to give away.
    pub(crate) fn new(banks: usize, start: u64, end: u64) -> Self {
        let gaps = Gaps { gaps: vec![(start, end)], held: Vec::new(), busy: false, start, end };
        Self { gaps: Arc::new(Mutex::new(gaps)), banks: banks as u64 }
    }

    fn lock(&self) -> MutexGuard<'_, Gaps> {
        // The list is consistent between statements that can panic: there are none.
        self.gaps.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Room for `tiles` tiles of `tile_bytes`, interleaved.
    pub(crate) fn allocate(&self, tiles: usize, tile_bytes: usize) -> Result<Region, Fault> {
        let wanted = (tiles as u64).div_ceil(self.banks).max(1) * tile_bytes as u64;
        let wanted = wanted.next_multiple_of(ALIGN);
        let mut list = self.lock();
        let Some(at) = list.gaps.iter().position(|(start, end)| end - start >= wanted) else {
            let free = list.gaps.iter().map(|(start, end)| end - start).max().unwrap_or(0);
            return Err(Fault::DramFull { wanted, free, capacity: list.end - list.start });
        };
        let (base, end) = list.gaps[at];
        if end - base == wanted {
            list.gaps.remove(at);
        } else {
            list.gaps[at].0 = base + wanted;
        }
        drop(list);
        Ok(Region { dram: self.clone(), base, bytes: wanted })
    }

    /// Bytes in use over all banks.
    pub(crate) fn used(&self) -> u64 {
        let list = self.lock();
        let free: u64 = list.gaps.iter().chain(&list.held).map(|(start, end)| end - start).sum();
        (list.end - list.start - free) * self.banks
    }

    /// Says that commands wait which may use what is allocated now: what is freed from now on is not given away, so
    /// that the host may write to whatever it is given.
    pub(crate) fn hold(&self) {
        self.lock().busy = true;
    }

    /// Says that they have run.
    pub(crate) fn settle(&self) {
        let mut list = self.lock();
        list.busy = false;
        for (start, end) in std::mem::take(&mut list.held) {
            list.free(start, end);
        }
    }

    /// Bytes over all banks.
    pub(crate) fn capacity(&self) -> u64 {
        let list = self.lock();
        (list.end - list.start) * self.banks
    }
}

/// How the tiles of a weight lie: in as many blocks as there are banks, each of `span` tiles in a row in a bank of its own. A
/// core that computes neighbouring columns so reads one or two banks, and can be one that is near them.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Blocks {
    pub(crate) span: u32,
    /// The upper half of a tile's product with it is the tile's block.
    pub(crate) magic: u32,
}

impl Blocks {
    /// For so many tiles over so many banks.
    pub(crate) fn new(tiles: usize, banks: usize) -> Self {
        let span = tiles.div_ceil(banks).max(2) as u64;
        let magic = (1 << 32) / span + 1;
        // Too large by so much for a tile, in 2⁻³² of a block: nothing comes out wrong as long as that stays below a tile.
        let excess = span * magic - (1 << 32);
        if excess * span * (banks as u64) < 1 << 32 {
            return Blocks { span: span as u32, magic: magic as u32 };
        }
        let span = span.next_power_of_two();
        Blocks { span: span as u32, magic: ((1 << 32) / span) as u32 }
    }
}

impl Region {
    /// First address, the same in every bank.
    pub(crate) fn base(&self) -> u32 {
        self.base as u32
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        let mut list = self.dram.lock();
        let (start, end) = (self.base, self.base + self.bytes);
        if list.busy {
            list.held.push((start, end));
        } else {
            list.free(start, end);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tensors_take_turns_over_the_banks() {
        let dram = Dram::new(6, 0x10_0000, 0x20_0000);
        let a = dram.allocate(7, 4096).unwrap();
        assert_eq!((a.base(), dram.used()), (0x10_0000, 6 * 2 * 4096));
        let b = dram.allocate(1, 2048).unwrap();
        assert_eq!(b.base(), 0x10_0000 + 2 * 4096);
    }

    #[test]
    fn a_product_finds_the_block() {
        for tiles in (1..300).chain((300..2_000_000).step_by(9973)).chain([65_536, 226_000, 232_000]) {
            let b = Blocks::new(tiles, 12);
            assert!(12 * b.span as usize >= tiles);
            let places = (0..12).flat_map(|block| [block * b.span, (block + 1) * b.span - 1]);
            for t in places.chain([tiles as u32 - 1]) {
                assert_eq!(((u64::from(t) * u64::from(b.magic)) >> 32) as u32, t / b.span, "{t} of {b:?}");
            }
        }
    }

    #[test]
    fn dropping_merges_gaps_in_any_order() {
        let dram = Dram::new(2, 0, 1 << 20);
        for order in [[0, 1, 2, 3], [3, 2, 1, 0], [1, 3, 0, 2], [2, 0, 3, 1]] {
            let mut regions: Vec<_> = (1..5).map(|n| Some(dram.allocate(2 * n, 4096).unwrap())).collect();
            order.iter().for_each(|&i| regions[i] = None);
            assert_eq!(dram.used(), 0);
            assert_eq!(dram.lock().gaps, [(0, 1 << 20)]);
        }
    }

    #[test]
    fn what_waiting_commands_may_use_is_not_given_away() {
        let dram = Dram::new(1, 0, 1 << 16);
        let first = dram.allocate(1, 4096).unwrap();
        dram.hold();
        drop(first);
        assert_eq!(dram.used(), 0);
        let second = dram.allocate(1, 4096).unwrap();
        assert_eq!(second.base(), 4096);
        dram.settle();
        assert_eq!(dram.allocate(1, 4096).unwrap().base(), 0);
        drop(second);
        assert_eq!(dram.lock().gaps, [(0, 1 << 16)]);
    }

    #[test]
    fn a_thousand_rounds_leak_nothing() {
        let dram = Dram::new(6, 4096, 1 << 22);
        let kept = dram.allocate(5, 4096).unwrap();
        let used = dram.used();
        let mut window = std::collections::VecDeque::new();
        for i in 0..1000 {
            window.push_back(dram.allocate(1 + i % 17, 4096).unwrap());
            if window.len() > 7 {
                window.pop_front();
            }
        }
        drop(window);
        assert_eq!(dram.used(), used);
        drop(kept);
        assert_eq!(dram.used(), 0);
    }

    #[test]
    fn too_large_is_an_error_that_says_how_much_there_is() {
        let dram = Dram::new(6, 0, 1 << 20);
        let _half = dram.allocate(6 * 128, 4096).unwrap();
        let e = dram.allocate(6 * 129, 4096).unwrap_err();
        assert_eq!(e, Fault::DramFull { wanted: 129 << 12, free: 1 << 19, capacity: 1 << 20 });
        assert!(dram.allocate(6 * 128, 4096).is_ok(), "a failure must not change anything");
    }
}
