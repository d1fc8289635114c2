//! Unpacking (T0): L1 to the sources of the matrix unit, or straight to Dst.

use crate::isa::{self, Adc, Block, Wait};
use crate::rv::{Asm, Reg};

/// Tensix backend configuration, as the processors see it.
pub(super) const CONFIG: u32 = 0xFFEF_0000;
/// This thread's coprocessor registers.
const GPRS: u32 = 0xFFE0_0000;
/// A store and a load at offset 4 wait until the coprocessor has finished all that this thread pushed.
const PC_BUFFER: u32 = 0xFFE8_0000;

/// Data formats by their number in the hardware.
pub(super) const FP32: u32 = 0;
pub(super) const TF32: u32 = 4;
pub(super) const BF16: u32 = 5;

/// Base address registers of the two unpackers, in 16-byte units, minus one.
const BASE_A: u32 = 64;
const BASE_B: u32 = 104;
/// Where unpacker 0 writes, in datums; 64 is row 0.
const DEST_A: u32 = 72;
const THREAD_SRCA_OVERRIDE: u32 = 3;

// Coprocessor registers of thread 0, one aligned group.
pub(super) const G_A: u32 = 4;
pub(super) const G_B: u32 = 5;
const G_A_STEP: u32 = 6;
const G_B_STEP: u32 = 7;
const G_A_BACK: u32 = 8;

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
    /// SrcA, from tiles of a format (bf16 or f32); f32 keeps 10 bits of mantissa.
    SrcA { bf16: bool, transpose: bool },
    /// Dst, f32 bit by bit.
    Dst,
}

/// Once a kernel.
pub(super) fn init(a: &mut Asm) {
    for section in [0, 40] {
        config(a, 53 + section, 4 << 16 | 1); // tile descriptor: 4 faces
        config(a, BASE_A + section, 0);
    }
    config(a, 52 + 40, 256 << 16 | 1 << 4 | FP32);
    config(a, 60 + 40, TF32 | 2 << 4);
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

/// Sets what unpacker 0 does; unpacker 1 always fills SrcB with TF32 from f32 tiles.
pub(super) fn target(a: &mut Asm, target: Target) {
    sync(a);
    let (input, output, transpose, to_dst) = match target {
        Target::SrcA { bf16: true, transpose } => (BF16, BF16, transpose, false),
        Target::SrcA { bf16: false, transpose } => (FP32, TF32, transpose, false),
        Target::Dst => (FP32, FP32, false, true),
    };
    config(a, 52, 256 << 16 | 1 << 4 | input);
    config(a, 60, output | 2 << 4 | u32::from(transpose) << 8);
    config(a, 61, 0x000F_000F | u32::from(to_dst) << 4);
    config(a, DEST_A, 64);
    a.tt(isa::setc16(THREAD_SRCA_OVERRIDE, if to_dst { 0 } else { 4 }));
    config_fence(a);
}

/// Sets coprocessor registers from processor registers, after everything pushed has finished.
pub(super) fn set_gprs(a: &mut Asm, gprs: &[(u32, Reg)]) {
    sync(a);
    a.li(Reg::T6, GPRS);
    for &(gpr, reg) in gprs {
        a.sw(reg, Reg::T6, 4 * gpr as i32);
    }
    config_fence(a);
}

/// Steps, in bytes, by which [`src_a`] and [`src_b`] advance, and by which [`rewind_a`] goes back.
/// Clobbers `t0` to `t2`.
pub(super) fn set_steps(a: &mut Asm, a_bytes: u32, b_bytes: u32, a_back: u32) {
    a.li(Reg::T0, a_bytes >> 4);
    a.li(Reg::T1, b_bytes >> 4);
    a.li(Reg::T2, (a_back >> 4).wrapping_neg());
    set_gprs(a, &[(G_A_STEP, Reg::T0), (G_B_STEP, Reg::T1), (G_A_BACK, Reg::T2)]);
}

fn advance_and_unpack(a: &mut Asm, unpacker: u32, base: u32, gpr: u32, step: u32) {
    a.tt(isa::stallwait(Block::CONFIG.and(Block::TDMA), Wait::UNPACK.and(Wait::THCON)));
    a.tt(isa::wrcfg(gpr, base));
    a.tt(isa::adddmareg(gpr, gpr, step)); // also the instruction that WRCFG needs before its consumer
    a.tt(isa::unpacr(unpacker, true));
}

/// The tile at `G_A` to SrcA, and a step on.
pub(super) fn src_a(a: &mut Asm) {
    advance_and_unpack(a, 0, BASE_A, G_A, G_A_STEP);
}

/// The tile at `G_B` to SrcB, and a step on.
pub(super) fn src_b(a: &mut Asm) {
    advance_and_unpack(a, 1, BASE_B, G_B, G_B_STEP);
}

/// `G_A` back to where the current group began.
pub(super) fn rewind_a(a: &mut Asm) {
    a.tt(isa::stallwait(Block::TDMA, Wait::THCON));
    a.tt(isa::adddmareg(G_A, G_A, G_A_BACK));
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
