//! Command lists: what lets the host start many kernels at once.
//!
//! Each core has a list in device memory, one record a kernel, whether it takes part in it or not: a header and the
//! arguments. Its `B` processor brings a record into L1 where the host would have written it, starts the other four,
//! runs its own program, waits for the four and then for all other cores, and goes on with the next record. Cores meet
//! at a counter in the first one's L1: each adds itself by an atomic increment once its kernel has finished, with all
//! its writes acknowledged, and reads the counter until all are there.
//!
//! What the next record needs from memory is under way while the cores meet: with the arguments of a record comes the header
//! of the one behind it, so that one transfer, of a length that is known, brings all that is missing. The counters of the
//! rings are zeroed after the meeting only, since a core that sends to many may write to those of a core that takes no part.

use super::noc::Noc;
use super::{Processor, l1};
use crate::rv::{Asm, Reg};

/// Bytes of a header: the bytes of the arguments behind it, a multiple of this; then for each processor the address of
/// its program, or 0.
pub(crate) const HEADER_BYTES: usize = 64;
/// Words of it that mean something.
const HEADER_WORDS: i32 = 6;

/// Words at [`l1::LIST`], written by the host with each start.
pub(crate) const STATE_WORDS: usize = 6;
/// Address of the first record, then of what is fetched next, and the coordinates of its bank.
const NEXT: i32 = 0;
const PLACE: i32 = 4;
/// Records left.
pub(crate) const LEFT: i32 = 8;
/// Arrivals at the counter before the next record may start.
const DUE: i32 = 12;
/// Cores that meet, and the coordinates of the one with the counter.
const CORES: i32 = 16;
const MEETING: i32 = 20;
/// Where the firmware called from; behind what the host writes.
const CALLER: i32 = 24;

/// The words at [`l1::LIST`] of a core whose first record is at `address` (two address words).
pub(crate) fn state(address: [u32; 2], records: u32, cores: u32, meeting: u32) -> [u32; STATE_WORDS] {
    [address[0], address[1], records, 0, cores, meeting]
}

/// The program of `B`. What it must remember while kernels run is in L1, since they may use every register.
pub(super) fn dispatcher(a: &mut Asm) {
    a.li(Reg::S2, l1::LIST);
    a.sw(Reg::Ra, Reg::S2, CALLER);
    Noc::Read.begin(a);
    a.lw(Reg::T0, Reg::S2, NEXT);
    a.lw(Reg::T1, Reg::S2, PLACE);
    a.addi(Reg::T2, Reg::T0, HEADER_BYTES as i32);
    a.sw(Reg::T2, Reg::S2, NEXT);
    a.li(Reg::A0, l1::HEADER);
    Noc::Read.transfer(a, Reg::A0, HEADER_BYTES as u32);
    Noc::Read.wait(a);
    fetch(a);
    Noc::Read.wait(a);

    let next = a.here();
    a.li(Reg::A0, l1::HEADER);
    a.li(Reg::T0, l1::COUNTERS);
    a.repeat(Reg::T1, l1::COUNTER_BYTES / 4, |a| {
        a.sw(Reg::Zero, Reg::T0, 0);
        a.addi(Reg::T0, Reg::T0, 4);
    });
    let others = [Processor::T0, Processor::T1, Processor::T2, Processor::Nc].map(|p| 4 * p as i32);
    a.li(Reg::T0, l1::GO);
    for at in others {
        a.lw(Reg::T1, Reg::A0, 4 + at);
        a.sw(Reg::T1, Reg::T0, at);
    }
    let idle = a.label();
    a.lw(Reg::T2, Reg::A0, 4);
    a.beq(Reg::T2, Reg::Zero, idle);
    a.jalr(Reg::T2);
    a.bind(idle);
    a.li(Reg::T0, l1::GO);
    for at in others {
        let busy = a.here();
        a.lw(Reg::T1, Reg::T0, at);
        a.bne(Reg::T1, Reg::Zero, busy);
    }

    // Meet the other cores.
    Noc::Read.begin(a);
    a.li(Reg::S2, l1::LIST);
    a.li(Reg::T0, l1::ARRIVED);
    a.lw(Reg::T1, Reg::S2, MEETING);
    a.li(Reg::A0, l1::ARRIVED_BEFORE);
    Noc::Read.start_increment(a, Reg::A0, Reg::S11);
    // The next record, if there is one: its header came behind the arguments.
    let last = a.label();
    a.lw(Reg::T0, Reg::S2, LEFT);
    a.addi(Reg::T1, Reg::Zero, 1);
    a.beq(Reg::T0, Reg::T1, last);
    a.li(Reg::A0, l1::HEADER);
    a.lw(Reg::T0, Reg::A0, 0);
    a.li(Reg::T1, l1::ARGS);
    a.add(Reg::T1, Reg::T1, Reg::T0);
    for word in 0..HEADER_WORDS {
        a.lw(Reg::T0, Reg::T1, 4 * word);
        a.sw(Reg::T0, Reg::A0, 4 * word);
    }
    fetch(a);
    a.bind(last);
    a.lw(Reg::S3, Reg::S2, DUE);
    a.lw(Reg::T1, Reg::S2, CORES);
    a.add(Reg::S3, Reg::S3, Reg::T1);
    a.sw(Reg::S3, Reg::S2, DUE);
    a.li(Reg::A0, l1::ARRIVED_NOW);
    let meet = a.here();
    a.li(Reg::T0, l1::ARRIVED);
    a.lw(Reg::T1, Reg::S2, MEETING);
    Noc::Read.transfer(a, Reg::A0, 4);
    Noc::Read.wait(a);
    a.lw(Reg::T0, Reg::A0, 0);
    a.blt(Reg::T0, Reg::S3, meet);
    Noc::Read.await_increment(a, Reg::S11);

    a.lw(Reg::T0, Reg::S2, LEFT);
    a.addi(Reg::T0, Reg::T0, -1);
    a.sw(Reg::T0, Reg::S2, LEFT);
    a.bne(Reg::T0, Reg::Zero, next);
    a.lw(Reg::Ra, Reg::S2, CALLER);
    a.ret();
}

/// Starts to bring the arguments of the record whose header is at [`l1::HEADER`], and the header behind them. `s2` is the
/// list. Clobbers `a1`, `s3` to `s7`, `t0` to `t2`, `t5`.
fn fetch(a: &mut Asm) {
    const PIECE: u32 = 8192;
    const { assert!(l1::ARGS + 4 * l1::ARG_WORDS as u32 + HEADER_BYTES as u32 <= l1::CODE) };
    // From `s4`: `s3` bytes are left.
    a.li(Reg::T0, l1::HEADER);
    a.lw(Reg::S3, Reg::T0, 0);
    a.addi(Reg::S3, Reg::S3, HEADER_BYTES as i32);
    a.lw(Reg::S4, Reg::S2, NEXT);
    a.lw(Reg::S5, Reg::S2, PLACE);
    a.li(Reg::S6, l1::ARGS);
    a.li(Reg::S7, PIECE);
    let (piece, whole) = (a.here(), a.label());
    a.mv(Reg::A1, Reg::S7);
    a.bge(Reg::S3, Reg::S7, whole);
    a.mv(Reg::A1, Reg::S3);
    a.bind(whole);
    a.mv(Reg::T0, Reg::S4);
    a.mv(Reg::T1, Reg::S5);
    Noc::Read.transfer_bytes(a, Reg::S6, Reg::A1);
    a.add(Reg::S4, Reg::S4, Reg::A1);
    a.add(Reg::S6, Reg::S6, Reg::A1);
    a.sub(Reg::S3, Reg::S3, Reg::A1);
    a.bne(Reg::S3, Reg::Zero, piece);
    a.sw(Reg::S4, Reg::S2, NEXT);
}
