//! x read once for many cores: one core, the sender, reads it from DRAM and multicasts it to all others of a rectangle.
//!
//! All cores of a group work on panels of the same rows, chunk by chunk in step, each on columns of its own. For each
//! chunk a receiver's `B` says to the sender, by an atomic increment over NoC 0, that its slot is free, reads its own part
//! of the weight, and waits until the sender's count of chunks has arrived. The sender's `B` reads x and its own part of the
//! weight; its `NC` waits until x is there and all receivers are ready, multicasts x over NoC 1 to the same slot of all,
//! in packets of one linked transaction, waits until every receiver has acknowledged all of it, and multicasts the new
//! count.
//!
//! Why nothing can wait in a circle: a rectangle has one sender and rectangles do not touch, so no two broadcasts meet;
//! nothing is awaited between the first and the last packet of a linked transaction; and a chunk is sent when all have
//! freed its slot, which asks for earlier chunks only, and for outputs written only where the sender's `NC` has nothing
//! left to send before. The hazard checker holds every program to the order of these steps.

use super::{HEAD, INPUTS, Matmul, Plan};
use crate::kernels::noc::Noc;
use crate::kernels::ring::{Cursor, wait_at_least};
use crate::kernels::{arg, l1};
use crate::rv::{Asm, Reg};

/// What a core must know to share: words behind the head of its arguments.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Sharing {
    /// Coordinates of the sender on NoC 0, as an address word.
    pub(crate) sender: u32,
    /// On the sender the cores that it waits for; 0 on others.
    pub(crate) receivers: u32,
    /// The rectangle's corners on NoC 1, as an address word.
    pub(crate) rectangle: u32,
    /// The other cores in it, each of which acknowledges what is sent.
    pub(crate) acks: u32,
    /// Chunks of a panel.
    pub(crate) chunks: u32,
}

// Arguments.
const SENDER: u32 = HEAD;
const RECEIVERS: u32 = HEAD + 1;
const RECTANGLE: u32 = HEAD + 2;
const ACKS: u32 = HEAD + 3;
const CHUNKS: u32 = HEAD + 4;

/// Chunks of x that the sender's `B` has read, for its `NC`; chunks that its `NC` has sent, for its `B`.
const READ: u32 = l1::COUNTERS + 8 * 4;
const SENT: u32 = READ + 4;
/// Chunks that have arrived. The sender's own word is where the count is multicast from.
const ARRIVED: u32 = l1::COUNTERS + 8 * 5;

/// `NC` of the sender: chunks sent, and the slot of the next; how many to send before outputs are written.
const SENDING: Cursor = Cursor { count: Reg::S6, addr: Reg::A5 };
const TARGET: Reg = Reg::S7;

/// The largest packet.
const PACKET: u32 = 8192;

impl Sharing {
    pub(super) const WORDS: u32 = 5;

    /// In the order of the arguments.
    pub(crate) fn words(&self) -> [u32; Self::WORDS as usize] {
        [self.sender, self.receivers, self.rectangle, self.acks, self.chunks]
    }
}

impl Matmul {
    /// `B`: fills the current slot, which is free.
    pub(super) fn read_or_receive(&self, a: &mut Asm) {
        let (receive, done) = (a.label(), a.label());
        arg(a, Reg::T0, RECEIVERS);
        a.beq(Reg::T0, Reg::Zero, receive);
        // Free for this core's unpacker; and sent?
        a.addi(Reg::T4, INPUTS.count, 1 - self.slots as i32);
        wait_at_least(a, SENT, Reg::T4);
        self.read_x(a);
        self.read_weight(a);
        Noc::Read.wait(a);
        a.addi(Reg::T4, INPUTS.count, 1);
        a.li(Reg::T6, READ);
        a.sw(Reg::T4, Reg::T6, 0);
        a.j(done);

        a.bind(receive);
        arg(a, Reg::T1, SENDER);
        Noc::Read.signal(a);
        self.read_weight(a);
        Noc::Read.wait(a);
        a.addi(Reg::T4, INPUTS.count, 1);
        wait_at_least(a, ARRIVED, Reg::T4);
        a.bind(done);
    }

    /// `B`, at its end: every signal of a receiver has been taken.
    pub(super) fn await_signals(&self, a: &mut Asm) {
        let receiver = a.label();
        arg(a, Reg::T0, RECEIVERS);
        a.mv(Reg::T4, INPUTS.count);
        a.beq(Reg::T0, Reg::Zero, receiver);
        a.li(Reg::T4, 0);
        a.bind(receiver);
        Noc::Read.await_signals(a, Reg::T4);
    }

    /// Chunks of the next panel that are sent before this one's outputs are written, so that cores need not wait for each
    /// other's writes. A residual is in the way: reading the next one waits for outputs.
    fn ahead(&self) -> u32 {
        u32::from(!self.residual())
    }

    /// `NC`, at its start.
    pub(super) fn start_sending(&self, a: &mut Asm, p: &Plan) {
        p.inputs.start(a, SENDING);
        a.li(TARGET, self.ahead());
    }

    /// `NC`, before it writes the outputs of a panel, of which `s3` are left: sends the panel's chunks, if this core is the
    /// sender.
    pub(super) fn send(&self, a: &mut Asm, p: &Plan) {
        let (done, more) = (a.label(), a.label());
        arg(a, Reg::T0, RECEIVERS);
        a.beq(Reg::T0, Reg::Zero, done);
        arg(a, Reg::T0, CHUNKS);
        a.add(TARGET, TARGET, Reg::T0);
        a.addi(Reg::T0, Reg::Zero, 1);
        a.bne(Reg::S3, Reg::T0, more);
        a.addi(TARGET, TARGET, -(self.ahead() as i32));
        a.bind(more);
        let next = a.here();
        a.bge(SENDING.count, TARGET, done);
        a.addi(Reg::T4, SENDING.count, 1);
        wait_at_least(a, READ, Reg::T4);
        arg(a, Reg::T0, RECEIVERS);
        a.mul(Reg::T4, Reg::T4, Reg::T0);
        wait_at_least(a, l1::READY, Reg::T4);

        arg(a, Reg::Gp, RECTANGLE);
        arg(a, Reg::Tp, ACKS);
        a.mv(Reg::A1, SENDING.addr);
        // All but the last packet are linked to the next.
        let last = match self.x_bytes() % PACKET {
            0 => PACKET,
            rest => rest,
        };
        a.repeat(Reg::S11, (self.x_bytes() - last) / PACKET, |a| {
            Noc::Write.multicast(a, Reg::A1, PACKET, Reg::Gp, Reg::Tp, true);
            a.add_const(Reg::A1, Reg::A1, PACKET, Reg::T5);
        });
        Noc::Write.multicast(a, Reg::A1, last, Reg::Gp, Reg::Tp, false);
        Noc::Write.wait(a);
        p.inputs.skip(a, SENDING);
        a.li(Reg::T6, SENT);
        a.sw(SENDING.count, Reg::T6, 0);

        // The network interface must read what was stored.
        a.li(Reg::A1, ARRIVED);
        a.sw(SENDING.count, Reg::A1, 0);
        let stored = a.here();
        a.lw(Reg::T5, Reg::A1, 0);
        a.bne(Reg::T5, SENDING.count, stored);
        Noc::Write.multicast(a, Reg::A1, 4, Reg::Gp, Reg::Tp, false);
        a.j(next);
        a.bind(done);
    }

    /// `NC`, at its end: nobody is ready for more. All signals have arrived, since all chunks were sent.
    pub(super) fn stop_sending(&self, a: &mut Asm) {
        let none = a.label();
        arg(a, Reg::T0, RECEIVERS);
        a.beq(Reg::T0, Reg::Zero, none);
        a.li(Reg::T0, l1::READY);
        a.sw(Reg::Zero, Reg::T0, 0);
        a.bind(none);
    }
}
