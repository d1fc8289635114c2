//! How the host reaches a device: tile memories through the NoC, and the ARC management processor.
//!
//! Accesses are queued in a [`Batch`] and executed together, because each exchange with the simulator's process
//! costs more than the accesses themselves.

mod child;
#[cfg(feature = "silicon")]
pub(crate) mod silicon;
mod ttsim;

pub use child::{run_child_if_asked, spawn};

/// NoC coordinates of a tile, as the host addresses it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Xy {
    /// Column.
    pub x: u8,
    /// Row.
    pub y: u8,
}

impl std::fmt::Display for Xy {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "({}, {})", self.x, self.y)
    }
}

/// Why a device could not be reached, or stopped answering.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum TransportError {
    /// The simulator's process could not be started.
    #[error("cannot start the simulator's process {program}: {why}")]
    Spawn {
        /// The program.
        program: String,
        /// The system's message.
        why: String,
    },
    /// The library could not be loaded, or is not the simulator.
    #[error("cannot use {library} as the simulator: {why}")]
    Library {
        /// Its path.
        library: String,
        /// What is wrong.
        why: String,
    },
    /// The simulator ended its process, as it does on any error.
    #[error("the simulator stopped: {0}")]
    Stopped(String),
    /// A card cannot be used, or failed.
    #[error("the card: {0}")]
    Card(String),
    /// No answer came in time.
    #[error("the simulator did not answer within {0} s")]
    Silent(u64),
}

/// Accesses waiting to be executed, in order.
#[derive(Debug, Default)]
pub struct Batch {
    bytes: Vec<u8>,
    reply_bytes: usize,
}

/// The accesses of a batch.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Access<'a> {
    /// Reads bytes of a tile.
    TileRead { tile: Xy, addr: u64, len: usize },
    /// Writes bytes of a tile.
    TileWrite { tile: Xy, addr: u64, data: &'a [u8] },
    /// Reads a word of the ARC's address space, by BAR offset.
    ArcRead { offset: u64 },
    /// Writes a word of the ARC's address space.
    ArcWrite { offset: u64, value: u32 },
    /// Reads a word of PCI configuration space.
    ConfigRead { offset: u64 },
    /// Lets simulated time pass.
    Tick { clocks: u64 },
    /// Reads bytes of a tile once all of them are zero, or so many clocks have been waited in the batch. Where time passes by
    /// itself they are read at once.
    TileAwait { tile: Xy, addr: u64, len: usize, clocks: u64 },
}

impl Batch {
    fn push(&mut self, kind: u8, tile: Xy, addr: u64, len: usize) {
        self.bytes.extend([kind, tile.x, tile.y]);
        self.bytes.extend(addr.to_le_bytes());
        self.bytes.extend((len as u32).to_le_bytes());
    }

    /// Queues a read of `len` bytes.
    pub fn read(&mut self, tile: Xy, addr: u64, len: usize) {
        self.push(0, tile, addr, len);
        self.reply_bytes += len;
    }

    /// Queues a write.
    pub fn write(&mut self, tile: Xy, addr: u64, data: &[u8]) {
        self.push(1, tile, addr, data.len());
        self.bytes.extend(data);
    }

    /// Queues a read of an ARC word.
    pub fn arc_read(&mut self, offset: u64) {
        self.push(2, Xy { x: 0, y: 0 }, offset, 0);
        self.reply_bytes += 4;
    }

    /// Queues a write of an ARC word.
    pub fn arc_write(&mut self, offset: u64, value: u32) {
        self.push(3, Xy { x: 0, y: 0 }, offset, value as usize);
    }

    /// Queues a read of a PCI configuration word.
    pub fn config_read(&mut self, offset: u64) {
        self.push(4, Xy { x: 0, y: 0 }, offset, 0);
        self.reply_bytes += 4;
    }

    /// Queues the passing of simulated time.
    pub fn tick(&mut self, clocks: u64) {
        self.push(5, Xy { x: 0, y: 0 }, clocks, 0);
    }

    /// Queues a read of `len` bytes as soon as all are zero; on a simulator time passes until then, but no more than
    /// `clocks` in the whole batch. On a card they are read as they are.
    pub fn await_zero(&mut self, tile: Xy, addr: u64, len: usize, clocks: u64) {
        self.push(6, tile, addr, len);
        self.bytes.extend(clocks.to_le_bytes());
        self.reply_bytes += len;
    }

    /// Bytes queued.
    pub fn len(&self) -> usize {
        self.bytes.len()
    }

    /// Whether nothing is queued.
    pub fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }
}

/// Takes the next access off an encoded batch; `None` at its end, or where it is malformed.
pub(crate) fn decode<'a>(bytes: &mut &'a [u8]) -> Option<Access<'a>> {
    let (head, rest) = bytes.split_at_checked(15)?;
    let tile = Xy { x: head[1], y: head[2] };
    let addr = u64::from_le_bytes(head[3..11].try_into().ok()?);
    let len = u32::from_le_bytes(head[11..15].try_into().ok()?);
    *bytes = rest;
    Some(match head[0] {
        0 => Access::TileRead { tile, addr, len: len as usize },
        1 => {
            let (data, rest) = rest.split_at_checked(len as usize)?;
            *bytes = rest;
            Access::TileWrite { tile, addr, data }
        }
        2 => Access::ArcRead { offset: addr },
        3 => Access::ArcWrite { offset: addr, value: len },
        4 => Access::ConfigRead { offset: addr },
        5 => Access::Tick { clocks: addr },
        6 => {
            let (clocks, rest) = rest.split_first_chunk()?;
            *bytes = rest;
            Access::TileAwait { tile, addr, len: len as usize, clocks: u64::from_le_bytes(*clocks) }
        }
        _ => return None,
    })
}

/// A way to reach one device.
pub trait Transport: Send {
    /// Executes a batch in order and returns the bytes of its reads, one after the other.
    fn run(&mut self, batch: Batch) -> Result<Vec<u8>, TransportError>;

    /// What it is, for messages.
    fn name(&self) -> &'static str;

    /// Whether time passes only when the host says so, and idle processors cost the host time.
    fn simulated(&self) -> bool;
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn batches_decode_to_what_was_queued() {
        let (tile, data) = (Xy { x: 18, y: 25 }, [1u8, 2, 3]);
        let mut batch = Batch::default();
        batch.write(tile, 0xFFB1_21B0, &data);
        batch.read(tile, 1 << 33, 20);
        batch.arc_write(7, 0xDEAD_BEEF);
        batch.arc_read(8);
        batch.config_read(0x10);
        batch.tick(1 << 40);
        batch.await_zero(tile, 0x1_6000, 20, 1 << 16);
        assert_eq!(batch.reply_bytes, 48);
        let mut bytes = &batch.bytes[..];
        let got: Vec<_> = std::iter::from_fn(|| decode(&mut bytes)).collect();
        let want = [
            Access::TileWrite { tile, addr: 0xFFB1_21B0, data: &data },
            Access::TileRead { tile, addr: 1 << 33, len: 20 },
            Access::ArcWrite { offset: 7, value: 0xDEAD_BEEF },
            Access::ArcRead { offset: 8 },
            Access::ConfigRead { offset: 0x10 },
            Access::Tick { clocks: 1 << 40 },
            Access::TileAwait { tile, addr: 0x1_6000, len: 20, clocks: 1 << 16 },
        ];
        assert_eq!(got, want);
        assert!(bytes.is_empty());
        // Cut short anywhere, it neither panics nor yields more.
        for cut in 0..batch.bytes.len() {
            let mut bytes = &batch.bytes[..cut];
            assert!(std::iter::from_fn(|| decode(&mut bytes)).count() < want.len());
        }
    }
}
