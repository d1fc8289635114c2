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
pub(crate) mod list;
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

pub(crate) use attention::{ATTENDED, AttentionKernel, FIRST, LAST, MASKED};
pub(crate) use eltwise::{Eltwise, EltwiseOp};
#[cfg(test)]
pub(crate) use firmware::RESET_ADDRESSES;
pub(crate) use firmware::firmware;
pub(crate) use gather::{Columns, Gather, LINES, RowSource};
pub(crate) use math::PHASES;
pub(crate) use matmul::{Epilogue, Matmul, Sharing};
pub(crate) use noc::{Banks, IN_FLIGHT};
pub(crate) use norm::{NormForm, NormKernel};

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
    /// For each block of a weight the coordinates on NoC 0 at which this core reads it, and what is added to addresses there.
    pub(crate) const NEAR: u32 = 0x1_6080;
    /// The header of a command; see [`list`](super::list).
    pub(crate) const HEADER: u32 = 0x1_6100;
    /// What the dispatcher of command lists remembers.
    pub(crate) const LIST: u32 = 0x1_6140;
    /// On the first core: how often cores have finished a command.
    pub(crate) const ARRIVED: u32 = 0x1_6160;
    /// What a core last read there, and what was there before it came.
    pub(crate) const ARRIVED_NOW: u32 = 0x1_6170;
    /// See `ARRIVED_NOW`.
    pub(crate) const ARRIVED_BEFORE: u32 = 0x1_6180;
    /// On a core that sends to others: how often they have said that they are ready. 0 between kernels.
    pub(crate) const READY: u32 = 0x1_61A0;
    /// On a core that is sent to: what was at [`READY`] of the sender before it counted there, and behind it how many of
    /// its atomics had been answered when its kernel began.
    pub(crate) const READY_BEFORE: u32 = 0x1_61B0;
    /// The dispatcher in the firmware of `B`.
    pub(crate) const LIST_ENTRY: u32 = 0x400;
    /// Two words a ring: slots filled, slots freed. Zeroed with each launch.
    pub(crate) const COUNTERS: u32 = 0x1_61C0;
    /// Bytes of [`COUNTERS`].
    pub(crate) const COUNTER_BYTES: u32 = 0x80;
    /// The arguments of a launch.
    pub(crate) const ARGS: u32 = COUNTERS + COUNTER_BYTES;
    /// Where the loaded kernels begin, and the arguments end.
    pub(crate) const CODE: u32 = 0x2_8000;
    /// Where a kernel's data begin, and the loaded kernels end.
    pub(crate) const DATA: u32 = 0x6_0000;
    /// Words of arguments that a launch may have; the header of another command may follow.
    pub(crate) const ARG_WORDS: usize = ((CODE - ARGS - 64) / 4) as usize;
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

/// Programs of the vector unit, for the performance model.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum VectorProgram {
    /// An operation element by element.
    Eltwise(EltwiseOp),
    /// Taking the statistics of a norm, for each tile: the sum for the mean, or the squares.
    NormStatistics { sum: bool },
    /// Finishing them, for each row of tiles.
    NormFinish { centered: bool },
    /// Applying them, for each tile.
    NormApply(NormForm),
    /// The three passes of attention, for each key tile, key tile, and tile of values.
    Scores,
    /// See `Scores`.
    Exponentials,
    /// See `Scores`.
    Divide,
}

impl VectorProgram {
    /// Instructions that it executes, each a cycle: counted by running the emitted program.
    pub(crate) fn cycles(self) -> u64 {
        let mut a = Asm::new();
        let t = math::TILE_ROWS;
        match self {
            Self::Eltwise(EltwiseOp::Copy) => {}
            Self::Eltwise(EltwiseOp::Gelu) => sfpu::gelu(&mut a, 0),
            Self::Eltwise(EltwiseOp::Silu) => sfpu::silu(&mut a, 0),
            Self::Eltwise(EltwiseOp::Geglu) => sfpu::geglu(&mut a, 0, t),
            Self::Eltwise(EltwiseOp::Add) => sfpu::add_tiles(&mut a, 0, t),
            Self::Eltwise(EltwiseOp::AddScaled(s)) => sfpu::add_scaled(&mut a, 0, t, f32::from_bits(s)),
            Self::Eltwise(EltwiseOp::AddBoth) => sfpu::add_both(&mut a, 0, t, 2 * t),
            Self::Eltwise(EltwiseOp::GatedAdd) => sfpu::gated_add(&mut a, 0, t, 2 * t),
            Self::Eltwise(EltwiseOp::Rope) => sfpu::rotate_pairs(&mut a, 0, t, 2 * t, 3 * t),
            Self::NormStatistics { sum } => sfpu::stats_accumulate(&mut a, 0, t, sum),
            Self::NormFinish { centered } => {
                if centered {
                    sfpu::stats_mean(&mut a, t, 100);
                }
                sfpu::stats_inverse_deviation(&mut a, t, 100, 28, 1e-6);
            }
            Self::NormApply(form) => sfpu::normalize(&mut a, form, 0, t, 2 * t, 3 * t),
            Self::Scores => sfpu::softmax_scores(&mut a, 0, t, 0.1),
            Self::Exponentials => sfpu::softmax_exponentials(&mut a, 0, t),
            Self::Divide => sfpu::softmax_divide(&mut a, 0, t),
        }
        a.finish().map_or(0, |code| pushed(&code))
    }
}

/// Coprocessor instructions that a program pushes, which may loop but not depend on memory.
fn pushed(code: &[u32]) -> u64 {
    let (mut at, mut count, mut registers) = (0, 0, [0u32; 32]);
    while let Some(&w) = code.get(at) {
        at += 1;
        let (d, a, b) = ((w >> 7 & 31) as usize, (w >> 15 & 31) as usize, (w >> 20 & 31) as usize);
        match w & 0x7F {
            _ if w & 3 != 3 => count += 1,
            0x13 if d != 0 => registers[d] = registers[a].wrapping_add((w as i32 >> 20) as u32),
            0x63 if registers[a] != registers[b] => {
                // Loops branch backwards, by less than 4 KiB.
                let offset = (w >> 25 & 0x3F) << 5 | (w >> 8 & 15) << 1 | (w >> 7 & 1) << 11;
                at = (at - 1) - (4096 - offset as usize) / 4;
            }
            _ => {}
        }
    }
    count
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::Format;

    const L1: u32 = 1464 * 1024;
    const BANKS: Banks = Banks(12);

    /// Building a kernel checks every program for hazards.
    #[test]
    fn every_form_of_every_kernel_is_free_of_hazards() {
        use EltwiseOp::*;
        for op in [Copy, Gelu, Silu, Geglu, Add, AddScaled(0.3f32.to_bits()), AddBoth, GatedAdd, Rope] {
            for output in [Format::F32, Format::Bf16] {
                Eltwise { op, output, banks: BANKS }.build(L1).unwrap();
            }
        }
        for whole in [true, false] {
            Gather { whole, banks: BANKS }.build(L1).unwrap();
        }
        let blocks = [(1, 1, 1, 1), (1, 4, 1, 8), (2, 2, 4, 2), (4, 1, 8, 3), (1, 2, 3, 4)];
        for (rows, cols, panel_rows, panel_cols) in blocks {
            for epilogue in
                [Epilogue::None, Epilogue::Residual, Epilogue::Gelu, Epilogue::Silu, Epilogue::Geglu]
            {
                for (x, weight, bias, partial, output) in [
                    (Format::Bf16, Format::Bf16, true, true, Format::F32),
                    (Format::Bf16, Format::Bf16, true, true, Format::Bf16),
                    (Format::F32, Format::Bf16, false, false, Format::Bf16),
                    (Format::F32, Format::F32, true, false, Format::F32),
                    (Format::Bf16, Format::Bfp8, true, true, Format::Bf16),
                    (Format::F32, Format::Bfp8, false, false, Format::F32),
                ] {
                    if epilogue == Epilogue::Geglu && cols % 2 == 1 {
                        continue;
                    }
                    let smallest = Matmul::smallest([x, weight], bias, epilogue, output, BANKS);
                    for (shared, slots) in [(false, 2), (true, 2), (true, 3)] {
                        let sizes = Matmul {
                            rows,
                            cols,
                            panel_rows,
                            panel_cols,
                            chunk: 5,
                            partial,
                            shared,
                            slots,
                            ..smallest
                        };
                        sizes.build(L1).unwrap();
                    }
                }
            }
        }
        for width in [7, 72, 1152, 2048, 20_000] {
            for form in [NormForm::Layer, NormForm::Rms, NormForm::Ada] {
                for output in [Format::F32, Format::Bf16] {
                    for parts in if width == 2048 { vec![1, 2, 8] } else { vec![1] } {
                        let eps = 1e-6f32.to_bits();
                        NormKernel { width, eps, form, parts, output, banks: BANKS }.build(L1).unwrap();
                    }
                }
            }
        }
        for width in [1, 2, 3, 8] {
            for masked in [true, false] {
                for (q, kv) in [
                    (Format::F32, Format::F32),
                    (Format::F32, Format::Bf16),
                    (Format::Bf16, Format::F32),
                    (Format::Bf16, Format::Bf16),
                ] {
                    let scale = 0.125f32.to_bits();
                    let (keys, resident, banks) = (10, false, BANKS);
                    let alone = AttentionKernel { width, keys, masked, resident, scale, q, kv, banks };
                    alone.build(L1).unwrap();
                    if !masked {
                        AttentionKernel { resident: true, ..alone }.build(L1).unwrap();
                    }
                }
            }
        }
        for p in Processor::ALL {
            firmware(p).unwrap();
        }
    }

    #[test]
    fn what_does_not_fit_l1_is_an_error() {
        let form = NormForm::Layer;
        let norm = NormKernel { width: 72, eps: 0, form, parts: 1, output: Format::F32, banks: BANKS };
        let l1 = l1::DATA + 16 * 1024;
        let Err(Fault::L1Overflow { needed, available, .. }) = norm.build(l1) else { panic!("it fits") };
        assert!(needed > available && available == 16 * 1024, "{needed} of {available}");
    }

    #[test]
    fn the_memory_map_does_not_overlap() {
        let firmware_end = |p: Processor| l1::START[p as usize] + 4 * firmware(p).unwrap().len() as u32;
        let ends = Processor::ALL.map(firmware_end);
        assert!(ends.iter().zip(&l1::START[1..]).all(|(end, next)| end <= next));
        assert!(ends[4] <= l1::GO && l1::GO + 20 <= l1::BANKS && l1::BANKS + 12 * 8 <= l1::NEAR);
        const {
            assert!(l1::NEAR + 12 * 8 <= l1::HEADER);
            assert!(l1::HEADER + 64 <= l1::LIST && l1::LIST + 28 <= l1::ARRIVED);
            assert!(l1::ARRIVED_BEFORE + 16 <= l1::READY && l1::ARRIVED.is_multiple_of(16));
            assert!(l1::READY + 4 <= l1::READY_BEFORE && l1::READY.is_multiple_of(16));
            assert!(l1::READY_BEFORE + 8 <= l1::COUNTERS);
        }
        const { assert!(l1::ARGS < l1::CODE && l1::CODE < l1::DATA) };
    }
}
