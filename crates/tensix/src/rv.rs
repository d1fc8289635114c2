//! A small RV32IM assembler for the five processors of a Tensix tile.
//!
//! Beside the RISC-V instructions that the kernels use it embeds Tensix coprocessor instructions ([`Insn`]) in
//! the instruction stream: the processors treat a word whose low two bits are not `11` as "rotate right by two
//! and push to the coprocessor", which stalls while the coprocessor's queue is full.
//!
//! Mistakes of a kernel author (an immediate out of range, an unbound label) are remembered and reported by
//! [`Asm::finish`], so that building blocks need not return results.

use crate::isa::Insn;

/// An integer register, by its ABI name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
#[repr(u8)]
#[allow(missing_docs)]
pub enum Reg {
    Zero = 0,
    Ra = 1,
    /// There is no stack and no C: these two are as good as any.
    Gp = 3,
    Tp = 4,
    T0 = 5,
    T1 = 6,
    T2 = 7,
    S0 = 8,
    S1 = 9,
    A0 = 10,
    A1 = 11,
    A2 = 12,
    A3 = 13,
    A4 = 14,
    A5 = 15,
    A6 = 16,
    A7 = 17,
    S2 = 18,
    S3 = 19,
    S4 = 20,
    S5 = 21,
    S6 = 22,
    S7 = 23,
    S8 = 24,
    S9 = 25,
    S10 = 26,
    S11 = 27,
    T3 = 28,
    T4 = 29,
    T5 = 30,
    T6 = 31,
}

impl Reg {
    fn n(self) -> u32 {
        self as u32
    }
}

/// A position in the code, bound before or after it is used.
#[derive(Debug, Clone, Copy)]
pub struct Label(usize);

/// What a kernel author got wrong.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AsmError {
    /// An immediate does not fit its field.
    #[error("word {at}: immediate {value} does not fit {field}")]
    Immediate {
        /// Word index of the instruction.
        at: usize,
        /// The value.
        value: i64,
        /// The field.
        field: &'static str,
    },
    /// A branch or jump to a label that was never bound.
    #[error("word {0}: its label was never bound")]
    Unbound(usize),
}

#[derive(Debug, Clone, Copy)]
enum Fixup {
    Branch,
    Jump,
}

/// An assembler: instructions are appended, labels resolved by [`finish`](Asm::finish).
#[derive(Debug, Default)]
pub struct Asm {
    code: Vec<u32>,
    labels: Vec<Option<usize>>,
    fixups: Vec<(usize, usize, Fixup)>,
    error: Option<AsmError>,
}

fn r_type(f7: u32, f3: u32, d: Reg, a: Reg, b: Reg) -> u32 {
    f7 << 25 | b.n() << 20 | a.n() << 15 | f3 << 12 | d.n() << 7 | 0x33
}

impl Asm {
    /// An empty program.
    pub fn new() -> Self {
        Self::default()
    }

    fn word(&mut self, w: u32) {
        self.code.push(w);
    }

    fn fail(&mut self, error: AsmError) {
        self.error.get_or_insert(error);
    }

    fn imm12(&mut self, value: i32) -> u32 {
        if !(-2048..2048).contains(&value) {
            self.fail(AsmError::Immediate { at: self.code.len(), value: value.into(), field: "12 bits" });
        }
        value as u32 & 0xFFF
    }

    fn i_type(&mut self, imm: i32, f3: u32, op: u32, d: Reg, a: Reg) {
        let imm = self.imm12(imm);
        self.word(imm << 20 | a.n() << 15 | f3 << 12 | d.n() << 7 | op);
    }

    /// A coprocessor instruction.
    pub fn tt(&mut self, insn: Insn) {
        self.word(insn.word().rotate_left(2));
    }

    /// `d = v`, in one or two instructions.
    pub fn li(&mut self, d: Reg, v: u32) {
        let low = ((v as i32) << 20) >> 20;
        let high = v.wrapping_sub(low as u32) >> 12;
        if high == 0 {
            return self.addi(d, Reg::Zero, low);
        }
        self.word(high << 12 | d.n() << 7 | 0x37);
        if low != 0 {
            self.addi(d, d, low);
        }
    }

    /// `d = a`.
    pub fn mv(&mut self, d: Reg, a: Reg) {
        self.addi(d, a, 0);
    }

    /// `d = a + i`.
    pub fn addi(&mut self, d: Reg, a: Reg, i: i32) {
        self.i_type(i, 0, 0x13, d, a);
    }

    /// `d = a + v` for any constant; clobbers `scratch` when `v` is large.
    pub fn add_const(&mut self, d: Reg, a: Reg, v: u32, scratch: Reg) {
        if v < 2048 {
            self.addi(d, a, v as i32);
        } else {
            self.li(scratch, v);
            self.add(d, a, scratch);
        }
    }

    /// `d = a & i`.
    pub fn andi(&mut self, d: Reg, a: Reg, i: i32) {
        self.i_type(i, 7, 0x13, d, a);
    }

    /// `d = a ^ i`.
    pub fn xori(&mut self, d: Reg, a: Reg, i: i32) {
        self.i_type(i, 4, 0x13, d, a);
    }

    /// `d = a << i`.
    pub fn slli(&mut self, d: Reg, a: Reg, i: u32) {
        self.i_type((i & 31) as i32, 1, 0x13, d, a);
    }

    /// `d = a >> i`, logical.
    pub fn srli(&mut self, d: Reg, a: Reg, i: u32) {
        self.i_type((i & 31) as i32, 5, 0x13, d, a);
    }

    /// `d = a + b`.
    pub fn add(&mut self, d: Reg, a: Reg, b: Reg) {
        self.word(r_type(0, 0, d, a, b));
    }

    /// `d = a - b`.
    pub fn sub(&mut self, d: Reg, a: Reg, b: Reg) {
        self.word(r_type(0x20, 0, d, a, b));
    }

    /// `d = a | b`.
    pub fn or(&mut self, d: Reg, a: Reg, b: Reg) {
        self.word(r_type(0, 6, d, a, b));
    }

    /// `d = a * b`, low half.
    pub fn mul(&mut self, d: Reg, a: Reg, b: Reg) {
        self.word(r_type(1, 0, d, a, b));
    }

    /// `d = (a * b) >> 32`, unsigned.
    pub fn mulhu(&mut self, d: Reg, a: Reg, b: Reg) {
        self.word(r_type(1, 3, d, a, b));
    }

    /// `d = [a + off]`.
    pub fn lw(&mut self, d: Reg, a: Reg, off: i32) {
        self.i_type(off, 2, 0x03, d, a);
    }

    /// `[a + off] = s`.
    pub fn sw(&mut self, s: Reg, a: Reg, off: i32) {
        let o = self.imm12(off);
        self.word((o >> 5) << 25 | s.n() << 20 | a.n() << 15 | 2 << 12 | (o & 31) << 7 | 0x23);
    }

    /// A label to bind later.
    pub fn label(&mut self) -> Label {
        self.labels.push(None);
        Label(self.labels.len() - 1)
    }

    /// Binds a label to this place.
    pub fn bind(&mut self, l: Label) {
        self.labels[l.0] = Some(self.code.len());
    }

    /// A label bound to this place.
    pub fn here(&mut self) -> Label {
        let l = self.label();
        self.bind(l);
        l
    }

    fn branch(&mut self, f3: u32, a: Reg, b: Reg, l: Label) {
        self.fixups.push((self.code.len(), l.0, Fixup::Branch));
        self.word(b.n() << 20 | a.n() << 15 | f3 << 12 | 0x63);
    }

    /// Branch if `a == b`; reaches 4 KiB.
    pub fn beq(&mut self, a: Reg, b: Reg, l: Label) {
        self.branch(0, a, b, l);
    }

    /// Branch if `a != b`; reaches 4 KiB.
    pub fn bne(&mut self, a: Reg, b: Reg, l: Label) {
        self.branch(1, a, b, l);
    }

    /// Branch if `a < b`, signed; reaches 4 KiB.
    pub fn blt(&mut self, a: Reg, b: Reg, l: Label) {
        self.branch(4, a, b, l);
    }

    /// Branch if `a >= b`, signed; reaches 4 KiB.
    pub fn bge(&mut self, a: Reg, b: Reg, l: Label) {
        self.branch(5, a, b, l);
    }

    /// Jump; reaches 1 MiB.
    pub fn j(&mut self, l: Label) {
        self.fixups.push((self.code.len(), l.0, Fixup::Jump));
        self.word(0x6F);
    }

    /// Call through a register: `ra = next; pc = a`.
    pub fn jalr(&mut self, a: Reg) {
        self.word(a.n() << 15 | Reg::Ra.n() << 7 | 0x67);
    }

    /// Return to `ra`.
    pub fn ret(&mut self) {
        self.word(Reg::Ra.n() << 15 | 0x67);
    }

    /// `do { body } while (--count != 0)` with the number of rounds, at least 1, in `count`.
    pub fn count_down(&mut self, count: Reg, body: impl FnOnce(&mut Asm)) {
        let top = self.here();
        let start = self.code.len();
        body(self);
        self.addi(count, count, -1);
        if self.code.len() - start < 1000 {
            self.bne(count, Reg::Zero, top);
        } else {
            // A conditional branch reaches 4 KiB only.
            let out = self.label();
            self.beq(count, Reg::Zero, out);
            self.j(top);
            self.bind(out);
        }
    }

    /// `body` `n` times, counted in `count`.
    pub fn repeat(&mut self, count: Reg, n: u32, body: impl FnOnce(&mut Asm)) {
        if n > 0 {
            self.li(count, n);
            self.count_down(count, body);
        }
    }

    /// Words of no meaning up to word `at`.
    pub fn pad_to(&mut self, at: u32) {
        if self.code.len() > at as usize {
            self.fail(AsmError::Immediate { at: self.code.len(), value: at.into(), field: "what is left" });
        }
        self.code.resize(at as usize, 0);
    }

    /// The finished code.
    pub fn finish(mut self) -> Result<Vec<u32>, AsmError> {
        for (at, label, kind) in std::mem::take(&mut self.fixups) {
            let Some(target) = self.labels[label] else {
                return Err(AsmError::Unbound(at));
            };
            let offset = (target as i64 - at as i64) * 4;
            let (reach, field) = match kind {
                Fixup::Branch => (4096, "a branch"),
                Fixup::Jump => (1 << 20, "a jump"),
            };
            if !(-reach..reach).contains(&offset) {
                self.fail(AsmError::Immediate { at, value: offset, field });
            }
            let u = offset as u32;
            self.code[at] |= match kind {
                Fixup::Branch => {
                    (u >> 12 & 1) << 31 | (u >> 5 & 0x3F) << 25 | (u >> 1 & 15) << 8 | (u >> 11 & 1) << 7
                }
                Fixup::Jump => {
                    (u >> 20 & 1) << 31
                        | (u >> 1 & 0x3FF) << 21
                        | (u >> 11 & 1) << 20
                        | (u >> 12 & 0xFF) << 12
                }
            };
        }
        match self.error {
            Some(e) => Err(e),
            None => Ok(self.code),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::isa;

    fn one(f: impl FnOnce(&mut Asm)) -> u32 {
        let mut a = Asm::new();
        f(&mut a);
        a.finish().unwrap()[0]
    }

    /// Words from the RISC-V specification's encodings (checked against binutils).
    #[test]
    fn instructions_encode_as_specified() {
        use Reg::*;
        assert_eq!(one(|a| a.addi(A0, A1, -1)), 0xFFF5_8513);
        assert_eq!(one(|a| a.add(A0, A1, A2)), 0x00C5_8533);
        assert_eq!(one(|a| a.sub(A0, A1, A2)), 0x40C5_8533);
        assert_eq!(one(|a| a.mul(A0, A1, A2)), 0x02C5_8533);
        assert_eq!(one(|a| a.mulhu(A0, A1, A2)), 0x02C5_B533);
        assert_eq!(one(|a| a.lw(T0, A0, 8)), 0x0085_2283);
        assert_eq!(one(|a| a.sw(T0, A0, 8)), 0x0055_2423);
        assert_eq!(one(|a| a.slli(A0, A0, 4)), 0x0045_1513);
        assert_eq!(one(|a| a.srli(A0, A0, 4)), 0x0045_5513);
        assert_eq!(one(|a| a.li(A0, 0x1234_5000)), 0x1234_5537);
        assert_eq!(one(|a| a.ret()), 0x0000_8067);
    }

    #[test]
    fn branches_reach_both_ways() {
        let mut a = Asm::new();
        let out = a.label();
        let top = a.here();
        a.beq(Reg::A0, Reg::Zero, out); // +12
        a.addi(Reg::A0, Reg::A0, -1);
        a.j(top); // -8
        a.bind(out);
        a.ret();
        assert_eq!(a.finish().unwrap(), [0x0005_0663, 0xFFF5_0513, 0xFF9F_F06F, 0x0000_8067]);
    }

    #[test]
    fn a_coprocessor_instruction_is_rotated_into_the_stream() {
        assert_eq!(one(|a| a.tt(isa::nop())), 0x0800_0000);
        assert_eq!(one(|a| a.tt(isa::stallwait(isa::Block::ALL, isa::Wait::MATH))) & 3, 0b10);
    }

    #[test]
    fn mistakes_are_reported() {
        let mut a = Asm::new();
        a.addi(Reg::A0, Reg::A0, 4000);
        assert!(matches!(a.finish(), Err(AsmError::Immediate { at: 0, value: 4000, .. })));
        let mut a = Asm::new();
        let l = a.label();
        a.j(l);
        assert_eq!(a.finish(), Err(AsmError::Unbound(0)));
        let mut a = Asm::new();
        let far = a.label();
        a.bne(Reg::A0, Reg::Zero, far);
        (0..2000).for_each(|_| a.mv(Reg::A0, Reg::A0));
        a.bind(far);
        assert!(matches!(a.finish(), Err(AsmError::Immediate { field: "a branch", .. })));
    }
}
