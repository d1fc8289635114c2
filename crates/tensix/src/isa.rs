//! Typed encoders of the Tensix coprocessor instructions that the kernels use (Wormhole).
//!
//! Field positions, opcodes and semantics: Tenstorrent's public ISA documentation, `WormholeB0/TensixTile/
//! TensixCoprocessor`. The opcode is bits 31:24.

/// One coprocessor instruction. Its opcode is below `0xC0`, which makes the word embeddable in RISC-V code.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Insn(u32);

impl Insn {
    const fn new(opcode: u32, fields: u32) -> Self {
        Self(opcode << 24 | fields & 0x00FF_FFFF)
    }

    /// The 32-bit word.
    pub const fn word(self) -> u32 {
        self.0
    }

    /// The instruction of a word, for checkers.
    pub const fn from_word(word: u32) -> Self {
        Self(word)
    }

    /// Bits 31:24.
    pub const fn opcode(self) -> u32 {
        self.0 >> 24
    }

    /// Bits `high:low`.
    pub const fn field(self, high: u32, low: u32) -> u32 {
        (self.0 >> low) & ((2 << (high - low)) - 1)
    }
}

/// Opcodes, for checkers.
#[allow(missing_docs)]
pub mod op {
    #[cfg(test)]
    pub const NOP: u32 = 0x02;
    pub const REPLAY: u32 = 0x04;
    pub const ZEROACC: u32 = 0x10;
    pub const MVMUL: u32 = 0x26;
    pub const SETRWC: u32 = 0x37;
    pub const PACR: u32 = 0x41;
    pub const UNPACR: u32 = 0x42;
    pub const SETADCXY: u32 = 0x51;
    pub const SETADCZW: u32 = 0x54;
    pub const ADDRCRZW: u32 = 0x56;
    pub const ADDDMAREG: u32 = 0x58;
    pub const SETADCXX: u32 = 0x5E;
    pub const SFPLOAD: u32 = 0x70;
    pub const SFPLOADI: u32 = 0x71;
    pub const SFPSTORE: u32 = 0x72;
    pub const SFPIADD: u32 = 0x79;
    pub const SFPSHFT: u32 = 0x7A;
    pub const SFPMOV: u32 = 0x7C;
    pub const SFPMAD: u32 = 0x84;
    pub const SFPADD: u32 = 0x85;
    pub const SFPMUL: u32 = 0x86;
    pub const SFPENCC: u32 = 0x8A;
    pub const SFPNOP: u32 = 0x8F;
    pub const SFPCONFIG: u32 = 0x91;
    pub const SFPSWAP: u32 = 0x92;
    pub const SFPSHFT2: u32 = 0x94;
    pub const STALLWAIT: u32 = 0xA2;
    pub const SEMINIT: u32 = 0xA3;
    pub const SEMPOST: u32 = 0xA4;
    pub const SEMGET: u32 = 0xA5;
    pub const SEMWAIT: u32 = 0xA6;
    pub const WRCFG: u32 = 0xB0;
    pub const SETC16: u32 = 0xB2;
}

/// Does nothing for a cycle.
#[cfg(test)]
pub const fn nop() -> Insn {
    Insn::new(op::NOP, 0)
}

/// Records the next `count` instructions of this thread from slot `index` of the replay buffer.
pub const fn replay_record(index: u32, count: u32) -> Insn {
    Insn::new(op::REPLAY, index << 14 | count << 4 | 1)
}

/// Plays `count` recorded instructions back.
pub const fn replay(index: u32, count: u32) -> Insn {
    Insn::new(op::REPLAY, index << 14 | count << 4)
}

// ---- synchronization ---------------------------------------------------------------------------------------

/// Which instruction classes a wait holds back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Block(pub u32);

impl Block {
    /// Miscellaneous, mover, scalar unit, packer and unpacker instructions.
    pub const TDMA: Block = Block(1);
    /// Semaphore instructions.
    pub const SYNC: Block = Block(2);
    /// Packer instructions.
    pub const PACK: Block = Block(4);
    /// Unpacker instructions.
    pub const UNPACK: Block = Block(8);
    /// Matrix unit instructions.
    pub const MATH: Block = Block(0x40);
    /// Configuration instructions.
    pub const CONFIG: Block = Block(0x80);
    /// Vector unit instructions.
    pub const SFPU: Block = Block(0x100);
    /// All.
    pub const ALL: Block = Block(0x1FF);

    /// Both.
    pub const fn and(self, other: Block) -> Block {
        Block(self.0 | other.0)
    }
}

/// What a wait waits for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Wait(pub u32);

impl Wait {
    /// The scalar unit has nothing outstanding for this thread (C0).
    pub const THCON: Wait = Wait(1);
    /// Both unpackers are idle for this thread (C1, C2).
    pub const UNPACK: Wait = Wait(6);
    /// All four packers are idle (C3 to C6).
    pub const PACK: Wait = Wait(0x78);
    /// The matrix unit has drained (C7).
    pub const MATH: Wait = Wait(0x80);
    /// Stores of the RISC-V processor to GPRs and configuration have been processed (C13).
    pub const RISCV: Wait = Wait(0x2000);
    /// The vector unit has drained (C14).
    pub const SFPU: Wait = Wait(0x4000);

    /// Both.
    pub const fn and(self, other: Wait) -> Wait {
        Wait(self.0 | other.0)
    }
}

/// Holds `block` back until `wait` is met.
pub const fn stallwait(block: Block, wait: Wait) -> Insn {
    Insn::new(op::STALLWAIT, block.0 << 15 | wait.0)
}

/// Sets a semaphore's value and maximum.
pub const fn seminit(sem: u32, value: u32, max: u32) -> Insn {
    Insn::new(op::SEMINIT, max << 20 | value << 16 | 1 << (sem + 2))
}

/// Semaphore += 1.
pub const fn sempost(sem: u32) -> Insn {
    Insn::new(op::SEMPOST, 1 << (sem + 2))
}

/// Semaphore -= 1.
pub const fn semget(sem: u32) -> Insn {
    Insn::new(op::SEMGET, 1 << (sem + 2))
}

/// Holds `block` back while the semaphore is 0.
pub const fn semwait_zero(sem: u32, block: Block) -> Insn {
    Insn::new(op::SEMWAIT, block.0 << 15 | 1 << (sem + 2) | 1)
}

/// Holds `block` back while the semaphore is at its maximum.
pub const fn semwait_max(sem: u32, block: Block) -> Insn {
    Insn::new(op::SEMWAIT, block.0 << 15 | 1 << (sem + 2) | 2)
}

// ---- configuration -----------------------------------------------------------------------------------------

/// Writes a thread-specific configuration register.
pub const fn setc16(index: u32, value: u32) -> Insn {
    Insn::new(op::SETC16, index << 16 | (value & 0xFFFF))
}

/// Writes a shared configuration word from a general purpose register of the coprocessor.
#[cfg(test)]
pub const fn wrcfg(gpr: u32, index: u32) -> Insn {
    Insn::new(op::WRCFG, gpr << 16 | index)
}

/// `gpr[result] = gpr[left] + gpr[right]`.
#[cfg(test)]
pub const fn adddmareg(result: u32, left: u32, right: u32) -> Insn {
    Insn::new(op::ADDDMAREG, result << 12 | right << 6 | left)
}

// ---- address counters, unpackers, packers ------------------------------------------------------------------

/// Which address counters an instruction means.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Adc(pub u32);

impl Adc {
    /// Those of both unpackers.
    pub const UNPACKERS: Adc = Adc(3);
    /// Those of the packers.
    pub const PACKERS: Adc = Adc(4);
}

/// X counters: first and last datum of a transfer.
pub const fn setadcxx(which: Adc, last: u32, first: u32) -> Insn {
    Insn::new(op::SETADCXX, which.0 << 21 | last << 10 | first)
}

/// Zeroes the X and Y counters of both channels.
pub const fn setadcxy_zero(which: Adc) -> Insn {
    Insn::new(op::SETADCXY, which.0 << 21 | 0xF)
}

/// Zeroes the Z and W counters of both channels.
pub const fn setadczw_zero(which: Adc) -> Insn {
    Insn::new(op::SETADCZW, which.0 << 21 | 0xF)
}

/// Carriage return of an unpacker's Z counter on the L1 side: its start moves `by` on (at most 7), and the counter is
/// set to that.
pub const fn addrcrzw(unpacker: u32, by: u32) -> Insn {
    Insn::new(op::ADDRCRZW, 1 << (21 + unpacker) | by << 6 | 1)
}

/// Unpacks a transfer: unpacker 0 to SrcA or Dst, unpacker 1 to SrcB, in multi-context mode. `flip` hands the
/// filled Src bank to the matrix unit.
pub const fn unpacr(unpacker: u32, flip: bool) -> Insn {
    // Bit 0 is set by every compiler-made stream, though the documentation gives it no meaning.
    Insn::new(op::UNPACR, unpacker << 23 | 1 << 7 | (flip as u32) << 6 | 1)
}

/// [`unpacr`] with a flip, and the Z counter on the L1 side goes on by 1.
pub const fn unpacr_next(unpacker: u32) -> Insn {
    Insn::new(op::UNPACR, unpacr(unpacker, true).0 | 1 << 15)
}

/// Packs with all four packers, and ends the output so that the next one starts at a fresh address.
pub const fn pacr() -> Insn {
    Insn::new(op::PACR, 15 << 8 | 1)
}

// ---- matrix unit -------------------------------------------------------------------------------------------

/// `Dst[8x16] += SrcB[8x16] @ SrcA[16x16]`.
pub const fn mvmul(dst_row: u32, addr_mod: u32) -> Insn {
    Insn::new(op::MVMUL, addr_mod << 15 | dst_row)
}

/// Marks 16 physical rows of Dst undefined, which the matrix unit reads as zero.
pub const fn zeroacc_rows16(block: u32) -> Insn {
    Insn::new(op::ZEROACC, 1 << 19 | block)
}

/// Marks all of Dst undefined.
pub const fn zeroacc_all() -> Insn {
    Insn::new(op::ZEROACC, 3 << 19)
}

/// Zeroes the row counters and the fidelity phase, and gives SrcA and SrcB banks back to the unpackers.
pub const fn setrwc_zero(release_a: bool, release_b: bool) -> Insn {
    Insn::new(op::SETRWC, (release_b as u32) << 23 | (release_a as u32) << 22 | 0xF)
}

// ---- vector unit -------------------------------------------------------------------------------------------

/// A vector register: `L0` to `L7` are general, the others constants.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum L {
    L0 = 0,
    L1 = 1,
    L2 = 2,
    L3 = 3,
    L4 = 4,
    L5 = 5,
    L6 = 6,
    L7 = 7,
    /// Always 0.
    Zero = 9,
    /// Always 1.
    One = 10,
    /// -1, after [`sfpconfig_default`] of 11.
    MinusOne = 11,
    /// Programmable.
    C0 = 12,
    /// Programmable.
    C1 = 13,
    /// Programmable.
    C2 = 14,
}

impl L {
    const fn n(self) -> u32 {
        self as u32
    }
}

/// `SFPLOAD`/`SFPSTORE` mode for f32 in Dst.
const FP32: u32 = 3;

/// Loads 4 rows x 8 even (or, with bit 1 of `row`, odd) columns of f32 from Dst.
pub const fn sfpload(d: L, addr_mod: u32, row: u32) -> Insn {
    Insn::new(op::SFPLOAD, d.n() << 20 | FP32 << 16 | addr_mod << 14 | row)
}

/// Stores what [`sfpload`] loads.
pub const fn sfpstore(s: L, addr_mod: u32, row: u32) -> Insn {
    Insn::new(op::SFPSTORE, s.n() << 20 | FP32 << 16 | addr_mod << 14 | row)
}

/// Immediate forms of `SFPLOADI`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum Imm {
    /// The upper half of an f32, the lower half zero.
    Bf16 = 0,
    /// Replaces the upper half.
    High = 8,
    /// Replaces the lower half.
    Low = 10,
}

/// Loads 16 bits into every lane.
pub const fn sfploadi(d: L, form: Imm, imm: u32) -> Insn {
    Insn::new(op::SFPLOADI, d.n() << 20 | (form as u32) << 16 | (imm & 0xFFFF))
}

const fn mad_form(opcode: u32, d: L, a: L, b: L, c: L) -> Insn {
    Insn::new(opcode, a.n() << 16 | b.n() << 12 | c.n() << 8 | d.n() << 4)
}

/// `d = a * b + c`; two cycles.
pub const fn sfpmad(d: L, a: L, b: L, c: L) -> Insn {
    mad_form(op::SFPMAD, d, a, b, c)
}

/// `d = a * b`; two cycles.
pub const fn sfpmul(d: L, a: L, b: L) -> Insn {
    mad_form(op::SFPMUL, d, a, b, L::Zero)
}

/// `d = b + c`; two cycles.
pub const fn sfpadd(d: L, b: L, c: L) -> Insn {
    mad_form(op::SFPADD, d, L::One, b, c)
}

/// `d = c`.
pub const fn sfpmov(d: L, c: L) -> Insn {
    Insn::new(op::SFPMOV, c.n() << 8 | d.n() << 4)
}

/// `d = -c`.
pub const fn sfpneg(d: L, c: L) -> Insn {
    Insn::new(op::SFPMOV, c.n() << 8 | d.n() << 4 | 1)
}

/// Shifts the bits of `d`: left if positive, right (logical) if negative.
pub const fn sfpshft(d: L, by: i32) -> Insn {
    Insn::new(op::SFPSHFT, (by as u32 & 0xFFF) << 12 | d.n() << 4 | 1)
}

/// `d = c - d` on integers; the lane flags stay.
pub const fn sfpisub(d: L, c: L) -> Insn {
    Insn::new(op::SFPIADD, c.n() << 8 | d.n() << 4 | 2 | 4)
}

/// `low = min(low, high)` and `high = max(low, high)`; two cycles.
pub const fn sfpswap_minmax(low: L, high: L) -> Insn {
    Insn::new(op::SFPSWAP, high.n() << 8 | low.n() << 4 | 1)
}

/// `d = c` rotated right by a lane within each row of 8 lanes; two cycles.
pub const fn sfpror(d: L, c: L) -> Insn {
    Insn::new(op::SFPSHFT2, c.n() << 8 | d.n() << 4 | 3)
}

/// Copies `L0` into constant register `11..=14`.
pub const fn sfpconfig(dest: L) -> Insn {
    Insn::new(op::SFPCONFIG, dest.n() << 4)
}

/// Restores the default of constant register 11.
pub const fn sfpconfig_default(dest: L) -> Insn {
    Insn::new(op::SFPCONFIG, dest.n() << 4 | 1)
}

/// Enables all lanes, unconditionally.
pub const fn sfpencc_all() -> Insn {
    Insn::new(op::SFPENCC, 3 << 12 | 10)
}

/// Does nothing on the vector unit for a cycle.
pub const fn sfpnop() -> Insn {
    Insn::new(op::SFPNOP, 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Words composed by hand from the encoding diagrams of the ISA documentation.
    #[test]
    fn golden_words() {
        let cases = [
            ("NOP", nop(), 0x0200_0000u32),
            ("REPLAY load, index 2, count 16", replay_record(2, 16), 0x0400_8101),
            ("REPLAY play, index 0, count 16", replay(0, 16), 0x0400_0100),
            ("STALLWAIT B1, C7|C14", stallwait(Block::SYNC, Wait::MATH.and(Wait::SFPU)), 0xA201_4080),
            ("SEMINIT sem 1, value 0, max 2", seminit(1, 0, 2), 0xA320_0008),
            ("SEMPOST sem 1", sempost(1), 0xA400_0008),
            ("SEMGET sem 2", semget(2), 0xA500_0010),
            ("SEMWAIT sem 1 while zero, B2", semwait_zero(1, Block::PACK), 0xA602_0009),
            ("SEMWAIT sem 1 while max, B6", semwait_max(1, Block::MATH), 0xA620_000A),
            ("SETC16 index 1, 256", setc16(1, 256), 0xB201_0100),
            ("WRCFG gpr 5, index 64", wrcfg(5, 64), 0xB005_0040),
            ("ADDDMAREG 4 = 4 + 6", adddmareg(4, 4, 6), 0x5800_4184),
            ("SETADCXX both unpackers, 1023..0", setadcxx(Adc::UNPACKERS, 1023, 0), 0x5E6F_FC00),
            ("SETADCXY packers, all zero", setadcxy_zero(Adc::PACKERS), 0x5180_000F),
            ("SETADCZW packers, all zero", setadczw_zero(Adc::PACKERS), 0x5480_000F),
            ("UNPACR 1, multi-context, flip", unpacr(1, true), 0x4280_00C1),
            ("UNPACR 0, flip, next", unpacr_next(0), 0x4200_80C1),
            ("ADDRCRZW unpacker 0, z by 4", addrcrzw(0, 4), 0x5620_0101),
            ("PACR all packers, last", pacr(), 0x4100_0F01),
            ("MVMUL dst 24, mod 2", mvmul(24, 2), 0x2601_0018),
            ("ZEROACC mode 1 (16 rows), 9", zeroacc_rows16(9), 0x1008_0009),
            ("ZEROACC mode 3 (all)", zeroacc_all(), 0x1018_0000),
            ("SETRWC flip both, zero all", setrwc_zero(true, true), 0x37C0_000F),
            ("SFPLOAD L3, fp32, mod 1, row 18", sfpload(L::L3, 1, 18), 0x7033_4012),
            ("SFPSTORE L3, fp32, mod 2, row 18", sfpstore(L::L3, 2, 18), 0x7233_8012),
            ("SFPLOADI L1, low, 0x11C7", sfploadi(L::L1, Imm::Low, 0x11C7), 0x711A_11C7),
            ("SFPMAD 0 = 1 * 2 + 3", sfpmad(L::L0, L::L1, L::L2, L::L3), 0x8401_2300),
            ("SFPMUL 4 = 1 * 2 + L9", sfpmul(L::L4, L::L1, L::L2), 0x8601_2940),
            ("SFPADD 4 = L10 * 1 + 2", sfpadd(L::L4, L::L1, L::L2), 0x850A_1240),
            ("SFPMOV 2 = 1", sfpmov(L::L2, L::L1), 0x7C00_0120),
            ("SFPMOV 2 = -1", sfpneg(L::L2, L::L1), 0x7C00_0121),
            ("SFPSHFT 1 by -1", sfpshft(L::L1, -1), 0x7AFF_F011),
            ("SFPIADD 1 = 6 - 1", sfpisub(L::L1, L::L6), 0x7900_0616),
            ("SFPSWAP min 4, max 5", sfpswap_minmax(L::L4, L::L5), 0x9200_0541),
            ("SFPSHFT2 4 = ror 5", sfpror(L::L4, L::L5), 0x9400_0543),
            ("SFPCONFIG C1", sfpconfig(L::C1), 0x9100_00D0),
            ("SFPENCC", sfpencc_all(), 0x8A00_300A),
            ("SFPNOP", sfpnop(), 0x8F00_0000),
        ];
        for (what, insn, word) in cases {
            assert_eq!(insn.word(), word, "{what}: {:08x}", insn.word());
            assert!(insn.word() < 0xC000_0000, "{what} cannot be embedded");
        }
    }
}
