//! Command lists in device memory: what the host has recorded since it last waited, started with one GO a core.

use std::sync::Arc;

use super::{
    BANK_BYTES as BANK, BANK_COUNT, BANKS, Board, CHANNELS, Loaded, address_mid, bank_place, word, words,
};
use crate::error::Fault;
use crate::kernels::list::{HEADER_BYTES, LEFT, state};
use crate::kernels::{Processor, l1};

/// Bytes of a core's list.
const LIST_BYTES: usize = 4 << 20;
/// Most cores whose lists lie in one bank: 80 over twelve.
const LISTS_A_BANK: u64 = 7;
/// Bytes at the end of each bank that lists take.
pub(super) const BANK_BYTES: u64 = LISTS_A_BANK * LIST_BYTES as u64;
/// Lists are compared with what is in memory, and written, in pieces of this size.
const PIECE: usize = 256;

/// What the host waits for while lists run, where no kernel can be named.
pub(super) const LIST: &str = "a command list";

/// The lists of all cores.
#[derive(Debug)]
pub(super) struct Lists {
    cores: Vec<CoreList>,
    /// The kernels recorded and not yet run.
    recorded: Vec<Arc<str>>,
    /// Bytes of lists written to device memory.
    written: u64,
    /// Times that the cores were started.
    starts: u64,
}

#[derive(Debug, Default)]
struct CoreList {
    /// What is in device memory.
    there: Vec<u8>,
    /// What is recorded, which begins at byte `start` of the list.
    recorded: Vec<u8>,
    start: usize,
}

impl Lists {
    pub(super) fn new(cores: usize) -> Self {
        let cores = (0..cores).map(|_| CoreList::default()).collect();
        Self { cores, recorded: Vec::new(), written: 0, starts: 0 }
    }

    /// The next recording begins where the lists begin: an inference like the last one then finds its own commands.
    fn rewind(&mut self) {
        self.cores.iter_mut().for_each(|c| c.start = 0);
    }
}

/// Bank of a core's list, and its address there, without the channel's offset.
fn place(core: usize) -> (usize, u64) {
    (core % BANK_COUNT, BANK - BANK_BYTES + (core / BANK_COUNT * LIST_BYTES) as u64)
}

/// A command of a kernel with these entries.
fn record(entries: [u32; 5], args: &[u32]) -> Vec<u8> {
    let bytes = (4 * args.len()).next_multiple_of(HEADER_BYTES);
    let mut out = words(&[bytes as u32]);
    out.extend(words(&entries));
    out.resize(HEADER_BYTES, 0);
    out.extend(words(args));
    out.resize(HEADER_BYTES + bytes, 0);
    out
}

impl CoreList {
    /// The pieces of the recording that are not in memory yet, by their place in the list; they count as there from
    /// now on.
    fn fresh(&mut self) -> Vec<(usize, Vec<u8>)> {
        let end = self.start + self.recorded.len();
        if self.there.len() < end {
            self.there.resize(end, 0xFF);
        }
        let mut out: Vec<(usize, Vec<u8>)> = Vec::new();
        for (i, piece) in self.recorded.chunks(PIECE).enumerate() {
            let at = self.start + i * PIECE;
            let there = &mut self.there[at..at + piece.len()];
            if there == piece {
                continue;
            }
            there.copy_from_slice(piece);
            match out.last_mut() {
                Some((from, data)) if *from + data.len() == at => data.extend(piece),
                _ => out.push((at, piece.to_vec())),
            }
        }
        out
    }
}

impl Board {
    /// Whether kernels wait for [`run_lists`](Self::run_lists).
    pub(crate) fn has_recorded(&self) -> bool {
        self.lists.as_ref().is_some_and(|l| !l.recorded.is_empty())
    }

    /// Bytes of lists written to device memory so far, and how often the cores were started.
    pub(crate) fn list_stats(&self) -> (u64, u64) {
        self.lists.as_ref().map_or((0, 0), |l| (l.written, l.starts))
    }

    /// Adds a kernel to the lists of all cores.
    pub(super) fn enqueue(&mut self, loaded: &Loaded, work: &[(usize, Vec<u32>)]) -> Result<(), Fault> {
        // Cores run nothing while commands are recorded, so code may be written.
        self.prepare(loaded, &(0..self.cores.len()).collect::<Vec<_>>())?;
        let mut records = vec![record([0; 5], &[]); self.cores.len()];
        for (core, args) in work {
            records[*core] = record(loaded.entries(), args);
        }
        let Some(lists) = &self.lists else { return Ok(()) };
        // What would be the next header is read with the last arguments.
        let full =
            |(c, r): (&CoreList, &Vec<u8>)| c.start + c.recorded.len() + r.len() + HEADER_BYTES > LIST_BYTES;
        if lists.cores.iter().zip(&records).any(full) {
            self.run_lists()?;
            self.rewind_lists();
        }
        if let Some(lists) = &mut self.lists {
            for (list, record) in lists.cores.iter_mut().zip(records) {
                list.recorded.extend(record);
            }
            lists.recorded.push(loaded.name.clone());
        }
        Ok(())
    }

    /// Says that what comes next may be what came after the last time this was said.
    pub(crate) fn rewind_lists(&mut self) {
        if let Some(lists) = &mut self.lists {
            lists.rewind();
        }
    }

    /// Runs what was recorded, and waits for it.
    pub(crate) fn run_lists(&mut self) -> Result<(), Fault> {
        if !self.has_recorded() {
            return Ok(());
        }
        let Some(mut lists) = self.lists.take() else { return Ok(()) };
        let count = lists.cores.len();
        let meeting = address_mid(self.tile(0));
        for (core, list) in lists.cores.iter_mut().enumerate() {
            let (bank, address) = place(core);
            let (xy, channel) = bank_place(bank);
            for (at, data) in list.fresh() {
                lists.written += data.len() as u64;
                self.pending.write(xy, channel + address + at as u64, &data);
            }
            let group = BANKS[bank / CHANNELS];
            let from = [
                (channel + address + list.start as u64) as u32,
                address_mid(group[(core + bank % CHANNELS) % group.len()]),
            ];
            let state = state(from, lists.recorded.len() as u32, count as u32, meeting);
            self.pending.write(self.tile(core), l1::LIST.into(), &words(&state));
            list.start += list.recorded.len();
            list.recorded.clear();
        }
        lists.starts += 1;
        self.lists = Some(lists);
        // The answer to the read comes when all that was written has arrived.
        self.pending.write(self.tile(0), l1::ARRIVED.into(), &0u32.to_le_bytes());
        self.pending.read(self.tile(0), l1::ARRIVED.into(), 4);
        self.flush()?;
        for core in 0..count {
            self.pending.write(self.tile(core), l1::GO.into(), &l1::LIST_ENTRY.to_le_bytes());
        }
        self.wait(LIST, (0..count).collect(), &Processor::ALL)?;
        if let Some(lists) = &mut self.lists {
            lists.recorded.clear();
        }
        Ok(())
    }

    /// The kernel of the lists that a core is at.
    pub(super) fn listed(&mut self, core: usize) -> Result<Option<Arc<str>>, Fault> {
        if !self.has_recorded() {
            return Ok(None);
        }
        self.pending.read(self.tile(core), u64::from(l1::LIST) + LEFT as u64, 4);
        let left = word(self.flush()?) as usize;
        let recorded = self.lists.iter().flat_map(|l| &l.recorded);
        Ok(recorded.rev().nth(left.saturating_sub(1)).cloned())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_changed_is_written() {
        let mut list = CoreList::default();
        let mut bytes: Vec<u8> = (0..1000u32).map(|i| (i % 251) as u8).collect();
        list.recorded = bytes.clone();
        assert_eq!(list.fresh(), [(0, bytes.clone())]);
        assert!(list.fresh().is_empty(), "the same again");
        bytes[300] ^= 1;
        bytes[990] ^= 1;
        list.recorded = bytes.clone();
        assert_eq!(list.fresh(), [(256, bytes[256..512].to_vec()), (768, bytes[768..].to_vec())]);
        // Behind the first recording.
        list.start = 1000;
        list.recorded = bytes.clone();
        assert_eq!(list.fresh(), [(1000, bytes)]);
    }

    #[test]
    fn records_say_how_long_they_are() {
        let r = record([1, 2, 3, 4, 5], &[7; 17]);
        assert_eq!(r.len(), HEADER_BYTES + 128);
        assert_eq!(r[..8], [128, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(record([0; 5], &[]).len(), HEADER_BYTES);
    }

    #[test]
    fn lists_of_all_cores_have_their_place() {
        let mut places: Vec<_> = (0..80).map(place).collect();
        places.sort_unstable();
        let apart = places.windows(2).all(|w| w[0].0 != w[1].0 || w[0].1 + LIST_BYTES as u64 <= w[1].1);
        assert!(apart && places.iter().all(|(_, at)| at + LIST_BYTES as u64 <= BANK));
    }
}
