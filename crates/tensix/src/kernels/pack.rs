//! Packing (T2): tiles from f32 in Dst to L1.

use super::math::{HALF_ROWS, SEM_DST, TILE_ROWS, formats};
use super::ring::{Cursor, Ring};
use super::unpack::{CONFIG, config, config_fence, number, sync};
use crate::isa::{self, Adc, Block, Wait};
use crate::layout::Format;
use crate::rv::{Asm, Reg};

/// First configuration word of each packer.
const PACKERS: [u32; 4] = [56, 84, 96, 124];
/// Dst row at which each packer starts.
const DST_OFFSET: u32 = 152;
const FACE_BYTES: u32 = 1024;

/// Once a kernel: each packer packs one face, as values of a format. The matrix unit must be told the same.
pub(super) fn init(a: &mut Asm, output: Format) {
    config(a, 8, 4 | 64 << 12); // strides of a datum and a row, in bytes
    config(a, 9, FACE_BYTES); // of a face
    config(a, 14, 1); // 32-bit Dst
    config(a, 16, 0);
    config(a, 20, 0xFFFF); // edge mask: keep all columns
    for (i, base) in (0u32..).zip(PACKERS) {
        config(a, 24 + i, 16 << 8); // rows of a face
        config(a, base, 0);
        config(a, base + 3, 0);
        config(a, DST_OFFSET + i, 16 * i);
        a.tt(isa::setc16(31 + i, 0)); // address modifiers: none
    }
    packers(a, output);
    a.tt(isa::setc16(0, 0));
    a.tt(isa::setadcxy_zero(Adc::PACKERS));
    a.tt(isa::setadczw_zero(Adc::PACKERS));
    a.tt(isa::setadcxx(Adc::PACKERS, 255, 0));
    config_fence(a);
}

/// What depends on the format: the faces' addresses, and the conversion.
fn packers(a: &mut Asm, output: Format) {
    let (face, format) = (output.tile_bytes() as u32 / 4, number(output));
    for (i, base) in (0u32..).zip(PACKERS) {
        // Packers 1 to 3 write relative to packer 0.
        config(a, base + 1, (face / 16 * i).wrapping_sub(1));
        config(a, base + 2, 1 | format << 4 | format << 8); // uncompressed, rounded on the way out of Dst
    }
}

/// Between two tiles: what follows is packed as values of another format. T1, whose word of configuration is changed too,
/// must have handed over a half of Dst before, so that its own start is past. Clobbers `t5`, `t6`.
pub(super) fn switch(a: &mut Asm, output: Format) {
    sync(a);
    config(a, 1, formats(output));
    packers(a, output);
    config_fence(a);
}

/// Points the packers at Dst row `row` and L1 address `addr`. Clobbers `t0` to `t2`, `t5`, `t6`.
fn point(a: &mut Asm, addr: Reg, row: Reg) {
    a.srli(Reg::T0, addr, 4);
    a.addi(Reg::T0, Reg::T0, -1);
    a.li(Reg::T1, 0x8000_0000); // the other packers' addresses are relative
    a.or(Reg::T0, Reg::T0, Reg::T1);
    sync(a);
    a.li(Reg::T6, CONFIG);
    a.sw(Reg::T0, Reg::T6, 4 * (PACKERS[0] + 1) as i32);
    a.mv(Reg::T1, row);
    a.li(Reg::T2, CONFIG + 4 * DST_OFFSET);
    for i in 0..4 {
        a.sw(Reg::T1, Reg::T2, 4 * i);
        a.addi(Reg::T1, Reg::T1, 16);
    }
    config_fence(a);
}

/// Packs tile slots `slots` of the next finished half of Dst into the ring, and gives the half back. `half` is
/// the half's first row (0 at the start) and is flipped.
pub(super) fn half(a: &mut Asm, ring: Ring, c: Cursor, half: Reg, slots: &[u32]) {
    a.tt(isa::semwait_zero(SEM_DST, Block::PACK.and(Block::TDMA).and(Block::SYNC)));
    for &slot in slots {
        ring.reserve(a, c);
        a.addi(Reg::T3, half, (slot * TILE_ROWS) as i32);
        point(a, c.addr, Reg::T3);
        a.tt(isa::pacr());
        a.tt(isa::stallwait(Block::SYNC, Wait::PACK));
        if slots.last() == Some(&slot) {
            a.tt(isa::semget(SEM_DST));
        }
        sync(a);
        ring.publish(a, c);
    }
    a.xori(half, half, HALF_ROWS as i32);
}

/// Packs tile slots `slots` of the next finished half to consecutive tiles from the L1 address in `addr`, which
/// ends behind them.
pub(super) fn half_to(a: &mut Asm, addr: Reg, half: Reg, slots: &[u32]) {
    a.tt(isa::semwait_zero(SEM_DST, Block::PACK.and(Block::TDMA).and(Block::SYNC)));
    for &slot in slots {
        a.addi(Reg::T3, half, (slot * TILE_ROWS) as i32);
        point(a, addr, Reg::T3);
        a.tt(isa::pacr());
        a.add_const(addr, addr, 4 * FACE_BYTES, Reg::T2);
    }
    a.tt(isa::stallwait(Block::SYNC, Wait::PACK));
    a.tt(isa::semget(SEM_DST));
    sync(a);
    a.xori(half, half, HALF_ROWS as i32);
}
