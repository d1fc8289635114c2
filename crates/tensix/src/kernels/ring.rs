//! Rings of L1 slots between two processors: the producer counts slots filled, the consumer slots freed.

use super::{L1Plan, l1};
use crate::rv::{Asm, Reg};

/// A ring of `depth` slots at `base`.
#[derive(Debug, Clone, Copy)]
pub(super) struct Ring {
    index: u32,
    pub(super) base: u32,
    pub(super) slot_bytes: u32,
    depth: u32,
}

/// A processor's place in a ring: how many slots it has passed, and the address of its current slot.
#[derive(Debug, Clone, Copy)]
pub(super) struct Cursor {
    pub(super) count: Reg,
    pub(super) addr: Reg,
}

impl Ring {
    /// Ring number `index` (its counters), with its slots taken from `plan`.
    pub(super) fn new(plan: &mut L1Plan, index: u32, slot_bytes: u32, depth: u32) -> Self {
        Self { index, base: plan.take(slot_bytes * depth), slot_bytes, depth }
    }

    fn filled(&self) -> u32 {
        l1::COUNTERS + 8 * self.index
    }

    fn freed(&self) -> u32 {
        self.filled() + 4
    }

    /// Sets a cursor to the start; counters are zero at launch.
    pub(super) fn start(&self, a: &mut Asm, c: Cursor) {
        a.li(c.count, 0);
        a.li(c.addr, self.base);
    }

    /// Producer: waits until the current slot is free. Clobbers `t4` to `t6`.
    pub(super) fn reserve(&self, a: &mut Asm, c: Cursor) {
        a.addi(Reg::T4, c.count, 1 - self.depth as i32);
        wait_at_least(a, self.freed(), Reg::T4);
    }

    /// Producer: hands the current slot over and goes to the next.
    pub(super) fn publish(&self, a: &mut Asm, c: Cursor) {
        self.pass(a, c, self.filled());
    }

    /// Consumer: waits until the current slot is filled.
    pub(super) fn await_filled(&self, a: &mut Asm, c: Cursor) {
        a.addi(Reg::T4, c.count, 1);
        wait_at_least(a, self.filled(), Reg::T4);
    }

    /// Consumer: frees the current slot and goes to the next.
    pub(super) fn release(&self, a: &mut Asm, c: Cursor) {
        self.pass(a, c, self.freed());
    }

    fn pass(&self, a: &mut Asm, c: Cursor, counter: u32) {
        self.skip(a, c);
        a.li(Reg::T6, counter);
        a.sw(c.count, Reg::T6, 0);
    }

    /// Consumer: frees all slots that it has passed but the last `kept`. Clobbers `t4`, `t6`.
    pub(super) fn release_all_but(&self, a: &mut Asm, c: Cursor, kept: u32) {
        let none = a.label();
        a.addi(Reg::T4, c.count, -(kept as i32));
        a.bge(Reg::Zero, Reg::T4, none);
        a.li(Reg::T6, self.freed());
        a.sw(Reg::T4, Reg::T6, 0);
        a.bind(none);
    }

    /// Goes to the next slot, and tells nobody.
    pub(super) fn skip(&self, a: &mut Asm, c: Cursor) {
        a.addi(c.count, c.count, 1);
        a.add_const(c.addr, c.addr, self.slot_bytes, Reg::T6);
        let inside = a.label();
        a.li(Reg::T6, self.base + self.slot_bytes * self.depth);
        a.bne(c.addr, Reg::T6, inside);
        a.li(c.addr, self.base);
        a.bind(inside);
    }
}

/// Spins until the (signed) word at `addr` is at least `value`. Clobbers `t5`, `t6`.
pub(super) fn wait_at_least(a: &mut Asm, addr: u32, value: Reg) {
    a.li(Reg::T6, addr);
    let spin = a.here();
    a.lw(Reg::T5, Reg::T6, 0);
    a.blt(Reg::T5, value, spin);
}
