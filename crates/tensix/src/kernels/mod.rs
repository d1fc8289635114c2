//! Kernels: programs for the five processors of a Tensix tile, assembled in-process.
//!
//! Roles, the same in every kernel: `B` reads from DRAM over NoC 0, `T0` unpacks from L1, `T1` computes, `T2`
//! packs to L1, `NC` writes to DRAM over NoC 1. They meet in L1 [`Ring`]s. Shapes that matter to the code are
//! baked in; addresses and work lists come as arguments with each launch, so that a loaded kernel runs again
//! without being touched.

mod attention;
mod eltwise;
mod firmware;
mod gather;
mod matmul;
mod noc;
mod norm;
mod pack;
mod ring;
mod sfpu;
mod unpack;

mod math;

use crate::error::Fault;
use crate::hazards;
use crate::rv::{Asm, Reg};

pub(crate) use attention::{AttentionKernel, MASKED};
pub(crate) use eltwise::{Eltwise, EltwiseOp};
pub(crate) use firmware::firmware;
pub(crate) use gather::{Columns, Gather, RowSource};
pub(crate) use matmul::{Epilogue, Matmul};
pub(crate) use noc::Banks;
pub(crate) use norm::NormKernel;

/// The five processors of a tile, in the order of mailboxes and reset bits.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Processor {
    /// Reader.
    B,
    /// Unpacker.
    T0,
    /// Math.
    T1,
    /// Packer.
    T2,
    /// Writer.
    Nc,
}

impl Processor {
    /// All five.
    pub const ALL: [Processor; 5] = [Self::B, Self::T0, Self::T1, Self::T2, Self::Nc];

    /// Its name in messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::B => "B (reader)",
            Self::T0 => "T0 (unpack)",
            Self::T1 => "T1 (math)",
            Self::T2 => "T2 (pack)",
            Self::Nc => "NC (writer)",
        }
    }
}

/// The memory map of L1, the same on every core.
pub(crate) mod l1 {
    /// Addresses at which the processors start, with the firmware there.
    pub(crate) const START: [u32; 5] = [0, 0x6000, 0xA000, 0xE000, 0x12000];
    /// One word a processor: the address of the program to run, zeroed by the processor when done.
    pub(crate) const GO: u32 = 0x1_6000;
    /// For each DRAM bank its coordinates on NoC 0 and NoC 1, as address words.
    pub(crate) const BANKS: u32 = 0x1_6020;
    /// Two words a ring: slots filled, slots freed. Zeroed with each launch.
    pub(crate) const COUNTERS: u32 = 0x1_6180;
    /// Bytes of [`COUNTERS`].
    pub(crate) const COUNTER_BYTES: u32 = 0x80;
    /// The arguments of a launch.
    pub(crate) const ARGS: u32 = COUNTERS + COUNTER_BYTES;
    /// Where the loaded kernels begin, and the arguments end.
    pub(crate) const CODE: u32 = 0x2_8000;
    /// Where a kernel's data begin, and the loaded kernels end.
    pub(crate) const DATA: u32 = 0x6_0000;
    /// Words of arguments that a launch may have.
    pub(crate) const ARG_WORDS: usize = ((CODE - ARGS) / 4) as usize;
}

/// A kernel: code for each processor (none: not used) and how much L1 it needs.
#[derive(Debug)]
pub(crate) struct Kernel {
    pub(crate) name: String,
    pub(crate) code: [Vec<u32>; 5],
}

/// Hands out L1 data space and checks that it suffices.
#[derive(Debug)]
pub(crate) struct L1Plan {
    next: u32,
    end: u32,
}

impl L1Plan {
    pub(crate) fn new(l1_bytes: u32) -> Self {
        Self { next: l1::DATA, end: l1_bytes }
    }

    /// Bytes left.
    pub(crate) fn left(&self) -> u32 {
        self.end.saturating_sub(self.next)
    }

    /// `bytes` at a 64-byte boundary. Overflow is reported by [`finish`](Self::finish).
    pub(crate) fn take(&mut self, bytes: u32) -> u32 {
        let at = self.next;
        self.next = at.saturating_add(bytes).saturating_add(63) & !63;
        at
    }

    fn finish(&self, kernel: &str) -> Result<(), Fault> {
        if self.next > self.end {
            return Err(Fault::L1Overflow {
                kernel: kernel.to_owned(),
                needed: self.next - l1::DATA,
                available: self.end - l1::DATA,
            });
        }
        Ok(())
    }
}

/// Assembles the five programs, checks them for hazards and the plan for overflow.
fn build(name: String, plan: &L1Plan, programs: [Option<Asm>; 5]) -> Result<Kernel, Fault> {
    plan.finish(&name)?;
    let mut code: [Vec<u32>; 5] = Default::default();
    for ((processor, program), code) in Processor::ALL.into_iter().zip(programs).zip(&mut code) {
        let Some(mut program) = program else { continue };
        program.ret();
        *code = program.finish().map_err(|e| Fault::Kernel {
            kernel: name.clone(),
            processor,
            what: e.to_string(),
        })?;
        if let Some(hazard) = hazards::check(code).first() {
            return Err(Fault::Kernel { kernel: name.clone(), processor, what: hazard.to_string() });
        }
    }
    Ok(Kernel { name, code })
}

/// `d` = argument word `index`.
fn arg(a: &mut Asm, d: Reg, index: u32) {
    a.li(d, l1::ARGS);
    a.lw(d, d, 4 * index as i32);
}
