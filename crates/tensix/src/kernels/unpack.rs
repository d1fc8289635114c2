//! Unpacking (T0): L1 to the sources of the matrix unit, or straight to Dst.

use crate::isa::{self, Adc, Block, Wait};
use crate::layout::Format;
use crate::rv::{Asm, Reg};

/// Tensix backend configuration, as the processors see it.
pub(super) const CONFIG: u32 = 0xFFEF_0000;
/// A store and a load at offset 4 wait until the coprocessor has finished all that this thread pushed.
const PC_BUFFER: u32 = 0xFFE8_0000;

/// Data formats by their number in the hardware.
pub(super) const FP32: u32 = 0;
pub(super) const TF32: u32 = 4;
pub(super) const BF16: u32 = 5;
pub(super) const BFP8: u32 = 6;

/// The number of a format of tiles.
pub(super) fn number(format: Format) -> u32 {
    match format {
        Format::F32 => FP32,
        Format::Bf16 => BF16,
        Format::Bfp8 => BFP8,
    }
}

/// Base address registers of the two unpackers, in 16-byte units, minus one.
const BASE_A: u32 = 64;
const BASE_B: u32 = 104;
/// Where unpacker 0 writes, in datums; 64 is row 0.
const DEST_A: u32 = 72;
const THREAD_SRCA_OVERRIDE: u32 = 3;

/// Stores a constant to a configuration word. Clobbers `t5`, `t6`.
pub(super) fn config(a: &mut Asm, index: u32, value: u32) {
    a.li(Reg::T6, CONFIG + 4 * index);
    a.li(Reg::T5, value);
    a.sw(Reg::T5, Reg::T6, 0);
}

/// What is pushed from here on sees the configuration and register stores before.
pub(super) fn config_fence(a: &mut Asm) {
    a.tt(isa::stallwait(Block::ALL, Wait::RISCV));
}

/// Waits until the coprocessor has finished everything that this thread pushed. Clobbers `t5`, `t6`.
pub(super) fn sync(a: &mut Asm) {
    a.li(Reg::T6, PC_BUFFER);
    a.sw(Reg::Zero, Reg::T6, 4);
    a.lw(Reg::T5, Reg::T6, 4);
    a.andi(Reg::T5, Reg::T5, 0);
}

/// What unpacker 0 delivers.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Target {
    /// SrcA, from tiles of a format; f32 keeps 10 bits of mantissa.
    SrcA { from: Format, transpose: bool },
    /// Dst, f32 bit by bit.
    Dst,
}

impl Target {
    /// A source, where nothing will be unpacked any more.
    pub(super) const IDLE: Target = Target::SrcA { from: Format::Bf16, transpose: false };
}

/// Once a kernel. `src_b` is the format of the tiles for SrcB, where f32 keeps 10 bits of mantissa.
pub(super) fn init(a: &mut Asm, src_b: Format) {
    for section in [0, 40] {
        // Tile descriptor: a step of the Z counter is a whole tile, 4 faces of 256 values.
        config(a, 53 + section, 1 << 16 | 4);
        config(a, BASE_A + section, 0);
    }
    source_b_format(a, src_b);
    config(a, 61 + 40, 0x000F_000F);
    config(a, 41, 1 << 8); // unpacker 0 adds the context's destination address
    config(a, 45, 512); // unused strides must still be aligned
    config(a, 47, 512);
    config(a, 74, 256 | 256 << 16);
    a.tt(isa::setc16(39, 0)); // context 0
    a.tt(isa::setadcxy_zero(Adc::UNPACKERS));
    a.tt(isa::setadczw_zero(Adc::UNPACKERS));
    a.tt(isa::setadcxx(Adc::UNPACKERS, 1023, 0)); // after SETADCXY, which zeroes X
    config_fence(a);
}

fn source_b_format(a: &mut Asm, format: Format) {
    let delivered = if format == Format::F32 { TF32 } else { number(format) };
    config(a, 52 + 40, 256 << 16 | 1 << 4 | number(format));
    config(a, 60 + 40, delivered | 2 << 4);
}

/// Sets from which format unpacker 1 fills SrcB.
pub(super) fn source_b(a: &mut Asm, format: Format) {
    sync(a);
    source_b_format(a, format);
    config_fence(a);
}

/// After [`init`], for bfp8 to SrcA: tiles come in groups of so many, whose exponents lie before all their values. At most
/// 255.
pub(super) fn groups(a: &mut Asm, tiles: u32) {
    config(a, 53, tiles << 16 | 4);
    config_fence(a);
}

/// Sets what unpacker 0 does; unpacker 1 always fills SrcB.
pub(super) fn target(a: &mut Asm, target: Target) {
    sync(a);
    let (input, output, transpose, to_dst) = match target {
        Target::SrcA { from: Format::F32, transpose } => (FP32, TF32, transpose, false),
        Target::SrcA { from, transpose } => (number(from), number(from), transpose, false),
        Target::Dst => (FP32, FP32, false, true),
    };
    config(a, 52, 256 << 16 | 1 << 4 | input);
    config(a, 60, output | 2 << 4 | u32::from(transpose) << 8);
    config(a, 61, 0x000F_000F | u32::from(to_dst) << 4);
    config(a, DEST_A, 64);
    a.tt(isa::setc16(THREAD_SRCA_OVERRIDE, if to_dst { 0 } else { 4 }));
    a.tt(isa::setadczw_zero(Adc::UNPACKERS));
    config_fence(a);
}

/// Leaves Dst for a source: `next`. After the last tile to Dst, and before anything else, one must be unpacked to SrcA,
/// or the unpacker may go wrong (erratum TEN-3868); it is given to nobody.
pub(super) fn leave_dst(a: &mut Asm, next: Target) {
    target(a, next);
    a.tt(isa::unpacr(0, false));
}

/// Points the unpackers at tiles in L1 (in [`units`]) from which [`src_a`] and [`src_b`] go on, tile by tile: at most 256.
/// Clobbers `t5`, `t6`.
pub(super) fn point(a: &mut Asm, src_a: Reg, src_b: Reg) {
    sync(a);
    a.li(Reg::T6, CONFIG);
    a.sw(src_a, Reg::T6, 4 * BASE_A as i32);
    a.sw(src_b, Reg::T6, 4 * BASE_B as i32);
    a.tt(isa::setadczw_zero(Adc::UNPACKERS));
    config_fence(a);
}

/// The next tile to SrcA.
pub(super) fn src_a(a: &mut Asm) {
    a.tt(isa::unpacr_next(0));
}

/// The next tile to SrcB.
pub(super) fn src_b(a: &mut Asm) {
    a.tt(isa::unpacr_next(1));
}

/// The next tile for SrcA is again the first of the current group.
pub(super) fn repeat_a(a: &mut Asm) {
    a.tt(isa::addrcrzw(0, 0));
}

/// A group of `tiles` tiles for SrcA ends.
pub(super) fn next_group_a(a: &mut Asm, tiles: u32) {
    a.tt(isa::addrcrzw(0, tiles));
}

/// `d = (addr >> 4) - 1`, the form in which unpackers and packers take addresses.
pub(super) fn units(a: &mut Asm, d: Reg, addr: Reg) {
    a.srli(d, addr, 4);
    a.addi(d, d, -1);
}

/// The f32 tile at `addr` to the 64 rows of Dst from `row`, with unpacker 0 set to Dst. Clobbers `t0`, `t1`,
/// `t5`, `t6`.
pub(super) fn to_dst(a: &mut Asm, addr: Reg, row: Reg) {
    units(a, Reg::T0, addr);
    a.slli(Reg::T1, row, 4);
    a.addi(Reg::T1, Reg::T1, 64);
    sync(a);
    a.li(Reg::T6, CONFIG);
    a.sw(Reg::T0, Reg::T6, 4 * BASE_A as i32);
    a.sw(Reg::T1, Reg::T6, 4 * DEST_A as i32);
    config_fence(a);
    a.tt(isa::unpacr(0, false));
}
