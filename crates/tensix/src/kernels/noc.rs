//! NoC transfers by the data movement processors, and the addresses of interleaved tiles.
//!
//! Registers that these blocks own: `s0` network interface, `s1` this core's coordinates, `s8` to `s10` bank
//! arithmetic, `a7` responses due. Scratch: `t0` to `t2`, `t5`.

use super::ring::{Cursor, Ring};
use super::{arg, l1};
use crate::rv::{Asm, Reg};

/// Which network; reads go over 0, writes over 1.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Noc {
    Read,
    Write,
}

/// DRAM banks that tensors are interleaved over: tile `t` lies in bank `t % banks`, slot `t / banks`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Banks(pub(crate) u32);

impl Banks {
    /// The upper half of the product with it is a division.
    fn magic(self) -> u32 {
        (u64::from(u32::MAX) / u64::from(self.0) + 1) as u32
    }
}

// Offsets in the network interface's command buffer.
const TARGET_LOW: i32 = 0x00;
const TARGET_MID: i32 = 0x04;
const RETURN_LOW: i32 = 0x0C;
const RETURN_MID: i32 = 0x10;
const PACKET_TAG: i32 = 0x18;
const CONTROL: i32 = 0x1C;
const LENGTH: i32 = 0x20;
/// What an atomic adds.
const DATA: i32 = 0x24;
const START: i32 = 0x28;
const NODE_ID: i32 = 0x2C;
const ATOMIC_RESPONSES: i32 = 0x200;
const WRITE_ACKS: i32 = 0x204;
const READ_RESPONSES: i32 = 0x208;

impl Noc {
    fn base(self) -> u32 {
        match self {
            Noc::Read => 0xFFB2_0000,
            Noc::Write => 0xFFB3_0000,
        }
    }

    fn counter(self) -> i32 {
        match self {
            Noc::Read => READ_RESPONSES,
            Noc::Write => WRITE_ACKS,
        }
    }

    /// What a packet is: a read, or a write on a static virtual channel (with many writers the dynamic ones collapse to
    /// a fraction of what DRAM takes); answered in either case.
    fn control(self) -> i32 {
        const WRITE: i32 = 1 << 1;
        const ANSWERED: i32 = 1 << 4;
        const STATIC_CHANNEL: i32 = 1 << 7;
        match self {
            Noc::Read => ANSWERED,
            Noc::Write => WRITE | ANSWERED | STATIC_CHANNEL,
        }
    }

    /// Loads the registers that the other blocks use.
    pub(super) fn init(self, a: &mut Asm, banks: Banks) {
        self.begin(a);
        a.li(Reg::S8, banks.magic());
        a.li(Reg::S9, banks.0);
        a.li(Reg::S10, l1::BANKS + if self == Noc::Read { 0 } else { 4 });
    }

    /// Loads those that transfers between given addresses use.
    pub(super) fn begin(self, a: &mut Asm) {
        a.li(Reg::S0, self.base());
        a.lw(Reg::S1, Reg::S0, NODE_ID);
        a.slli(Reg::S1, Reg::S1, 20); // 12 coordinate bits,
        a.srli(Reg::S1, Reg::S1, 16); // above 4 bits of address
        a.lw(Reg::A7, Reg::S0, self.counter());
    }

    /// Waits until every transfer issued has been answered.
    pub(super) fn wait(self, a: &mut Asm) {
        let spin = a.here();
        a.lw(Reg::T5, Reg::S0, self.counter());
        a.bne(Reg::T5, Reg::A7, spin);
    }

    /// `t0`, `t1` = low and high address words of tile `tile` of the tensor at `base`, with tiles of
    /// `1 << shift` bytes. Clobbers `t5`.
    pub(super) fn tile_address(self, a: &mut Asm, tile: Reg, base: Reg, shift: u32) {
        a.mulhu(Reg::T0, tile, Reg::S8); // slot
        a.mul(Reg::T1, Reg::T0, Reg::S9);
        a.sub(Reg::T1, tile, Reg::T1); // bank
        a.andi(Reg::T5, Reg::T1, 1); // its channel: the second one's bytes follow the first one's
        a.slli(Reg::T5, Reg::T5, 30);
        a.slli(Reg::T1, Reg::T1, 3);
        a.add(Reg::T1, Reg::T1, Reg::S10);
        a.lw(Reg::T1, Reg::T1, 0);
        a.slli(Reg::T0, Reg::T0, shift);
        a.add(Reg::T0, Reg::T0, base);
        a.add(Reg::T0, Reg::T0, Reg::T5);
    }

    /// Starts a transfer of `bytes` (at most 8192) between the remote address in `t0`, `t1` and `local`.
    /// Clobbers `t2`, `t5`.
    pub(super) fn transfer(self, a: &mut Asm, local: Reg, bytes: u32) {
        a.li(Reg::T2, bytes);
        self.transfer_bytes(a, local, Reg::T2);
    }

    /// The same with their number in a register.
    pub(super) fn transfer_bytes(self, a: &mut Asm, local: Reg, bytes: Reg) {
        Self::ready(a);
        let ((from_low, from_mid), (to_low, to_mid)) = match self {
            Noc::Read => ((Reg::T0, Reg::T1), (local, Reg::S1)),
            Noc::Write => ((local, Reg::S1), (Reg::T0, Reg::T1)),
        };
        a.sw(from_low, Reg::S0, TARGET_LOW);
        a.sw(from_mid, Reg::S0, TARGET_MID);
        a.sw(to_low, Reg::S0, RETURN_LOW);
        a.sw(to_mid, Reg::S0, RETURN_MID);
        a.sw(Reg::Zero, Reg::S0, PACKET_TAG);
        a.addi(Reg::T5, Reg::Zero, self.control());
        a.sw(Reg::T5, Reg::S0, CONTROL);
        a.sw(bytes, Reg::S0, LENGTH);
        a.addi(Reg::T5, Reg::Zero, 1);
        a.sw(Reg::T5, Reg::S0, START);
        a.addi(Reg::A7, Reg::A7, 1);
    }

    /// Waits until the network interface takes a command.
    fn ready(a: &mut Asm) {
        let busy = a.here();
        a.lw(Reg::T5, Reg::S0, START);
        a.bne(Reg::T5, Reg::Zero, busy);
    }

    /// Starts to add 1 to the word of another core's L1 at the address in `t0` (a multiple of 16), `t1`. What was there
    /// before goes to `local`; `before` is what [`await_increment`](Self::await_increment) needs. Clobbers `t5`.
    pub(super) fn start_increment(self, a: &mut Asm, local: Reg, before: Reg) {
        a.lw(before, Reg::S0, ATOMIC_RESPONSES);
        self.add_one(a, local);
    }

    /// Waits until that is done. Clobbers `t5`.
    pub(super) fn await_increment(self, a: &mut Asm, before: Reg) {
        let wait = a.here();
        a.lw(Reg::T5, Reg::S0, ATOMIC_RESPONSES);
        a.beq(Reg::T5, before, wait);
    }

    fn add_one(self, a: &mut Asm, local: Reg) {
        const ATOMIC: i32 = 1;
        const ANSWERED: i32 = 1 << 4;
        const INCREMENT_32_BITS: u32 = 1 << 12 | 31 << 2;
        Self::ready(a);
        a.sw(Reg::T0, Reg::S0, TARGET_LOW);
        a.sw(Reg::T1, Reg::S0, TARGET_MID);
        a.sw(local, Reg::S0, RETURN_LOW);
        a.sw(Reg::S1, Reg::S0, RETURN_MID);
        a.sw(Reg::Zero, Reg::S0, PACKET_TAG);
        a.addi(Reg::T5, Reg::Zero, ATOMIC | ANSWERED);
        a.sw(Reg::T5, Reg::S0, CONTROL);
        a.li(Reg::T5, INCREMENT_32_BITS);
        a.sw(Reg::T5, Reg::S0, LENGTH);
        a.addi(Reg::T5, Reg::Zero, 1);
        a.sw(Reg::T5, Reg::S0, DATA);
        a.sw(Reg::T5, Reg::S0, START);
    }

    /// Tells another core that this one is ready: adds 1 to [`l1::READY`] of the core at the address in `t1`, and does not
    /// wait. A program that does this must [`await_signals`](Self::await_signals) before it returns. Clobbers `t0`, `t2`,
    /// `t5`.
    pub(super) fn signal(self, a: &mut Asm) {
        a.li(Reg::T0, l1::READY);
        a.li(Reg::T2, l1::READY_BEFORE);
        self.add_one(a, Reg::T2);
    }

    /// Remembers how many atomics have been answered. Clobbers `t0`, `t5`.
    pub(super) fn start_signals(self, a: &mut Asm) {
        a.li(Reg::T0, l1::READY_BEFORE);
        a.lw(Reg::T5, Reg::S0, ATOMIC_RESPONSES);
        a.sw(Reg::T5, Reg::T0, 4);
    }

    /// Waits until `count` signals have been answered. Clobbers `t0`, `t5`.
    pub(super) fn await_signals(self, a: &mut Asm, count: Reg) {
        a.li(Reg::T0, l1::READY_BEFORE);
        a.lw(Reg::T0, Reg::T0, 4);
        a.add(Reg::T0, Reg::T0, count);
        let spin = a.here();
        a.lw(Reg::T5, Reg::S0, ATOMIC_RESPONSES);
        a.bne(Reg::T5, Reg::T0, spin);
    }

    /// Writes `bytes` (at most 8192) at `local` to the same place on all other cores of a rectangle, whose address word is
    /// in `rectangle` and whose acknowledgements, one a core, are in `acks`. If `linked`, the next packet is one of these
    /// too, and goes the way that this one has reserved. Clobbers `t2`, `t5`.
    pub(super) fn multicast(
        self,
        a: &mut Asm,
        local: Reg,
        bytes: u32,
        rectangle: Reg,
        acks: Reg,
        linked: bool,
    ) {
        /// A write to many; answered; static; over a path that is reserved before anything leaves, which is what keeps
        /// broadcasts from blocking each other half way. Virtual channel 4 is one of those for broadcasts.
        const BROADCAST: u32 = 1 << 1 | 1 << 4 | 1 << 5 | 1 << 7 | 1 << 8 | 4 << 13;
        const LINKED: u32 = 1 << 6;
        a.li(Reg::T2, bytes);
        Self::ready(a);
        a.sw(local, Reg::S0, TARGET_LOW);
        a.sw(Reg::S1, Reg::S0, TARGET_MID);
        a.sw(local, Reg::S0, RETURN_LOW);
        a.sw(rectangle, Reg::S0, RETURN_MID);
        a.sw(Reg::Zero, Reg::S0, PACKET_TAG);
        a.li(Reg::T5, BROADCAST | if linked { LINKED } else { 0 });
        a.sw(Reg::T5, Reg::S0, CONTROL);
        a.sw(Reg::T2, Reg::S0, LENGTH);
        a.addi(Reg::T5, Reg::Zero, 1);
        a.sw(Reg::T5, Reg::S0, START);
        a.add(Reg::A7, Reg::A7, acks);
    }

    /// From here on tiles are those of a weight, in [`blocks`](crate::dram::Blocks); `span` and `magic` are arguments.
    pub(super) fn enter_blocks(self, a: &mut Asm, span: u32, magic: u32) {
        arg(a, Reg::S8, magic);
        arg(a, Reg::S9, span);
    }

    /// From here on they are interleaved again.
    pub(super) fn leave_blocks(self, a: &mut Asm, banks: Banks) {
        a.li(Reg::S8, banks.magic());
        a.li(Reg::S9, banks.0);
    }

    /// Starts the transfer of a tile in blocks. Clobbers `t0` to `t2`, `t5`.
    pub(super) fn block_tile(self, a: &mut Asm, tile: Reg, base: Reg, local: Reg, shift: u32) {
        const NEAR: i32 = (l1::NEAR - l1::BANKS) as i32;
        a.mulhu(Reg::T1, tile, Reg::S8); // block
        a.mul(Reg::T0, Reg::T1, Reg::S9);
        a.sub(Reg::T0, tile, Reg::T0); // tile in it
        a.slli(Reg::T1, Reg::T1, 3);
        a.add(Reg::T1, Reg::T1, Reg::S10);
        a.lw(Reg::T5, Reg::T1, NEAR + 4);
        a.lw(Reg::T1, Reg::T1, NEAR);
        a.slli(Reg::T0, Reg::T0, shift);
        a.add(Reg::T0, Reg::T0, base);
        a.add(Reg::T0, Reg::T0, Reg::T5);
        self.transfer(a, local, 1 << shift);
    }

    /// Starts the transfer of one whole tile.
    pub(super) fn tile(self, a: &mut Asm, tile: Reg, base: Reg, local: Reg, shift: u32) {
        self.tile_address(a, tile, base, shift);
        self.transfer(a, local, 1 << shift);
    }
}

/// Writes that may be under way while the next one is prepared.
pub(crate) const IN_FLIGHT: u32 = 4;
/// Slots of a ring of tiles that are written.
pub(super) const WRITE_SLOTS: u32 = 2 * IN_FLIGHT;

/// Writes the tile in the current slot of a ring to tile `tile` of the tensor at `base`, and goes to the next slot. A
/// slot is free once its write has been acknowledged; writes leave in order, so the oldest slots are those. A program
/// that does this must [`wait`](Noc::wait) before it returns.
pub(super) fn write_slot(a: &mut Asm, ring: Ring, c: Cursor, tile: Reg, base: Reg) {
    Noc::Write.tile(a, tile, base, c.addr, ring.slot_bytes.ilog2());
    ring.skip(a, c);
    let spin = a.here();
    a.lw(Reg::T5, Reg::S0, Noc::Write.counter());
    a.sub(Reg::T5, Reg::A7, Reg::T5);
    a.addi(Reg::T6, Reg::Zero, IN_FLIGHT as i32);
    a.blt(Reg::T6, Reg::T5, spin);
    ring.release_all_but(a, c, IN_FLIGHT);
}

/// `log2` of the bytes of an f32 tile.
pub(super) const F32_SHIFT: u32 = 12;
