//! What can go wrong between opening a device and finishing a kernel.

use crate::kernels::Processor;
use crate::transport::TransportError;

/// A device that cannot be opened.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum OpenError {
    /// Nothing names a simulator, and there is no card that this build could use.
    #[error(
        "no Tenstorrent device: set TT_METAL_SIMULATOR to Tenstorrent's libttsim.so for Wormhole (cards need a \
         build with the feature `silicon`, and are unproven)"
    )]
    NoDevice,
    /// The device cannot be reached, or failed while it was started.
    #[error(transparent)]
    Fault(#[from] Fault),
    /// Another kind of device answers.
    #[error("not a Wormhole: PCI id {0:08x} (wanted 401e1e52)")]
    NotWormhole(u32),
    /// The card's network counts its rows as they are made, with broken ones among them.
    #[error(
        "the card does not translate coordinates: its firmware is too old, update it with Tenstorrent's tools"
    )]
    NoTranslation,
    /// A memory controller has failed.
    #[error(
        "the card's memory is not trained (status {0:#x}): power it off and on, then check it with tt-smi"
    )]
    MemoryNotTrained(u32),
    /// The grid asked for does not fit the device.
    #[error("a grid of {}x{} was asked for, the device has {}x{}", wanted.0, wanted.1, usable.0, usable.1)]
    Grid {
        /// Columns and rows asked for.
        wanted: (usize, usize),
        /// Columns and rows that work.
        usable: (usize, usize),
    },
}

/// A failure of an open device. All but [`DramFull`](Fault::DramFull) and [`L1Overflow`](Fault::L1Overflow) end
/// its use: later calls return the same error.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Fault {
    /// The device no longer answers.
    #[error(transparent)]
    Transport(#[from] TransportError),
    /// A tensor does not fit the device's memory.
    #[error(
        "out of device memory: {wanted} bytes a bank wanted, {free} free in the largest gap of {capacity}"
    )]
    DramFull {
        /// Bytes wanted in each bank.
        wanted: u64,
        /// The largest gap.
        free: u64,
        /// Bytes of a bank.
        capacity: u64,
    },
    /// A kernel's buffers do not fit a core's memory.
    #[error("{kernel} needs {needed} bytes of L1, {available} are available")]
    L1Overflow {
        /// The kernel.
        kernel: String,
        /// Bytes needed.
        needed: u32,
        /// Bytes there are.
        available: u32,
    },
    /// A kernel did not finish in time.
    #[error("{kernel} hangs: core {core} waits in {processors} after {seconds} s")]
    Hung {
        /// The kernel.
        kernel: String,
        /// The first core that did not finish, as column and row of the grid.
        core: String,
        /// Its processors that did not finish.
        processors: String,
        /// How long the host waited.
        seconds: u64,
    },
    /// A kernel that was not assembled as it must be: a bug.
    #[error("{kernel}, {}: {what}", processor.name())]
    Kernel {
        /// The kernel.
        kernel: String,
        /// The processor whose program is at fault.
        processor: Processor,
        /// What is wrong.
        what: String,
    },
    /// The management processor answered a message with an error.
    #[error("the ARC processor refused message {code:#x} with {exit:#x}")]
    ArcRefused {
        /// The message.
        code: u8,
        /// Its exit code.
        exit: u16,
    },
    /// All ones come back from the card.
    #[error("the card has fallen off the bus: reset it (tt-smi -r) or power it off and on")]
    Gone,
    /// The management processor did not answer a message.
    #[error("the ARC processor did not answer message {0:#x}")]
    Arc(u8),
}
