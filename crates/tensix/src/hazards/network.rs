//! The part of the checker that follows transfers over the network, and the handshake of cores that multicast.
//!
//! What it knows of a program: commands to a network interface whose control word is a constant, loops that load one
//! constant address until a branch goes on, and stores to the counters in L1. That is how the building blocks of the
//! kernels are written.

use super::Rule;
use crate::kernels::l1;

// Offsets in a network interface.
const TARGET_LOW: u32 = 0x00;
const CONTROL: u32 = 0x1C;
const LENGTH: u32 = 0x20;
const START: u32 = 0x28;
const ATOMIC_RESPONSES: u32 = 0x200;
const WRITE_ACKS: u32 = 0x204;
const READ_RESPONSES: u32 = 0x208;
// Bits of the control word.
const ATOMIC: u32 = 1;
const WRITE: u32 = 1 << 1;
const BROADCAST: u32 = 1 << 5;
const LINKED: u32 = 1 << 6;
/// A broadcast so short is a count, not data.
const COUNT_BYTES: u32 = 16;

/// What a word of a program does.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Event {
    /// Starts a command with this control word, so many bytes, if that is known, and from this local address.
    Start { control: u32, bytes: Option<u32>, local: Option<u32> },
    /// Waits until the word at this address satisfies the program.
    Await(u32),
    /// Stores to a counter.
    Count(u32),
}

/// Sees stores as they come in a program.
#[derive(Debug, Default)]
pub(super) struct Observer {
    control: Option<u32>,
    bytes: Option<u32>,
    local: Option<u32>,
}

fn is_interface(address: u32) -> bool {
    matches!(address >> 16, 0xFFB2 | 0xFFB3)
}

fn is_counter(address: u32) -> bool {
    (l1::COUNTERS..l1::COUNTERS + l1::COUNTER_BYTES).contains(&address)
}

impl Observer {
    /// A store of a value, if it is a constant, to an address.
    pub(super) fn store(&mut self, to: u32, value: Option<u32>) -> Option<Event> {
        if is_counter(to) {
            return Some(Event::Count(to));
        }
        if !is_interface(to) {
            return None;
        }
        match to & 0xFFFF {
            TARGET_LOW => self.local = value,
            CONTROL => self.control = value,
            LENGTH => self.bytes = value,
            START => {
                let (bytes, local) = (self.bytes, self.local);
                return self.control.map(|control| Event::Start { control, bytes, local });
            }
            _ => {}
        }
        None
    }
}

/// What may be on its way at a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Network {
    reads: bool,
    writes: bool,
    atomics: bool,
    /// Data have been multicast and not acknowledged.
    data: bool,
    /// Where the count was multicast from that has not been acknowledged; 0 if none.
    count: u32,
    /// The last packet was linked to the next.
    linked: bool,
    /// The receivers have been awaited since the last count went out.
    ready: bool,
    /// A counter has been awaited since one was stored.
    reserved: bool,
    /// The sender has been told that this core is ready, and has not been awaited.
    signalled: bool,
}

impl Network {
    pub(super) const START: Self = Network {
        reads: false,
        writes: false,
        atomics: false,
        data: false,
        count: 0,
        linked: false,
        ready: false,
        reserved: false,
        signalled: false,
    };

    pub(super) fn join(self, o: Self) -> Self {
        Network {
            reads: self.reads | o.reads,
            writes: self.writes | o.writes,
            atomics: self.atomics | o.atomics,
            data: self.data | o.data,
            count: self.count.max(o.count),
            linked: self.linked | o.linked,
            ready: self.ready & o.ready,
            reserved: self.reserved & o.reserved,
            signalled: self.signalled | o.signalled,
        }
    }

    pub(super) fn step(&mut self, event: Event, mut report: impl FnMut(Rule)) {
        match event {
            Event::Start { control, bytes, local } if control & BROADCAST != 0 => {
                if bytes.is_some_and(|n| n <= COUNT_BYTES) {
                    if self.data {
                        report(Rule::CountBeforeData);
                    }
                    self.count = local.unwrap_or(u32::MAX);
                    self.ready = false;
                } else {
                    if !self.ready {
                        report(Rule::NotReady);
                    }
                    if self.data && !self.linked {
                        report(Rule::Unlinked);
                    }
                    self.data = true;
                }
                self.linked = control & LINKED != 0;
            }
            Event::Start { control, .. } => {
                self.close_link(&mut report);
                if control & ATOMIC != 0 {
                    if !self.reserved {
                        report(Rule::SignalTooEarly);
                    }
                    (self.atomics, self.signalled) = (true, true);
                } else if control & WRITE != 0 {
                    self.writes = true;
                } else {
                    self.reads = true;
                }
            }
            // The interface takes one command after the other.
            Event::Await(from) if is_interface(from) && from & 0xFFFF == START => {}
            Event::Await(from) => {
                self.close_link(&mut report);
                match (is_interface(from), from & 0xFFFF) {
                    (true, READ_RESPONSES) => self.reads = false,
                    (true, WRITE_ACKS) => (self.writes, self.data, self.count) = (false, false, 0),
                    (true, ATOMIC_RESPONSES) => self.atomics = false,
                    _ if from == l1::READY => self.ready = true,
                    _ if is_counter(from) => (self.reserved, self.signalled) = (true, false),
                    _ => {}
                }
            }
            Event::Count(to) => {
                if self.reads || self.data || self.count == to {
                    report(Rule::EarlyCount);
                }
                if self.signalled {
                    report(Rule::NotReceived);
                }
                self.reserved = false;
            }
        }
    }

    fn close_link(&mut self, report: &mut impl FnMut(Rule)) {
        if std::mem::take(&mut self.linked) {
            report(Rule::LinkLeftOpen);
        }
    }

    /// The program returns.
    pub(super) fn end(&mut self, mut report: impl FnMut(Rule)) {
        self.close_link(&mut report);
        if self.reads || self.writes || self.atomics || self.data || self.count != 0 {
            report(Rule::Unfinished);
        }
    }
}
