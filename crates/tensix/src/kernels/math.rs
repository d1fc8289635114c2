//! The matrix unit (T1), the halves of Dst, and the handshake with T0 for tiles unpacked into Dst.

use super::unpack::{TF32, config, config_fence, number};
use crate::isa::{self, Block, Wait};
use crate::layout::Format;
use crate::rv::{Asm, Reg};

/// Finished halves of Dst, T1 to T2.
pub(super) const SEM_DST: u32 = 1;
/// Halves of Dst that T0 may fill, T1 to T0.
pub(super) const SEM_FILL: u32 = 2;
/// Halves of Dst that T0 has filled, T0 to T1.
pub(super) const SEM_FILLED: u32 = 3;
/// Every semaphore with its maximum; all are 0 between kernels.
pub(super) const SEMAPHORES: [(u32, u32); 3] = [(SEM_DST, 2), (SEM_FILL, 1), (SEM_FILLED, 1)];

/// Rows of a tile in 32-bit Dst.
pub(super) const TILE_ROWS: u32 = 64;
/// Rows of half of 32-bit Dst: four tiles.
pub(super) const HALF_ROWS: u32 = 256;
/// First rows of the halves.
pub(super) const HALVES: [u32; 2] = [0, HALF_ROWS];

/// Fidelity phases of a matrix product: the multipliers take 5 bits of SrcA and 7 of SrcB at a time. The last phase adds
/// the low bits of the one times the low bits of the other.
pub(crate) const PHASES: u32 = 4;

const THREAD_MATH_OFFSET: u32 = 1;
const THREAD_ADDR_MOD_BASE: u32 = 2;

/// Once a kernel: f32 accumulation over TF32 sources, packed as values of a format.
pub(super) fn init(a: &mut Asm, output: Format) {
    config(a, 0, 0);
    config(a, 1, formats(output));
    config(a, 2, 0);
    config_fence(a);
    a.tt(isa::setc16(0, 0)); // configuration state 0
    a.tt(isa::setc16(THREAD_MATH_OFFSET, 0));
    a.tt(isa::setc16(THREAD_ADDR_MOD_BASE, 0));
    a.tt(isa::setc16(5, 0)); // releasing a source clears its validity
    a.tt(isa::setc16(6, 0)); // fidelity starts at phase 0
    for i in 0..4 {
        addr_mod(a, i, 0, 0, 0, 0);
    }
    // The vector unit's modifiers: stay, 2 rows on, 4 rows on.
    for (i, step) in [(4, 0), (5, 2), (6, 4), (7, 0)] {
        addr_mod(a, i, 0, 0, step, 0);
    }
    a.tt(isa::setrwc_zero(false, false));
    a.tt(isa::zeroacc_all());
    a.tt(isa::sfpencc_all());
}

/// Configuration word 1: f32 accumulation over TF32 sources; only the packers read the output's format.
pub(super) fn formats(output: Format) -> u32 {
    TF32 << 17 | TF32 << 21 | number(output) << 25 | 1 << 29 | 1 << 30
}

/// Address modifier `i`: steps of the SrcA, SrcB and Dst rows and of the fidelity phase.
fn addr_mod(a: &mut Asm, i: u32, src_a: u32, src_b: u32, dst: u32, phase: u32) {
    a.tt(isa::setc16(7 + 2 * i, src_a | src_b << 8));
    a.tt(isa::setc16(23 + i, dst | phase << 13));
    a.tt(isa::setc16(48 + i, 0));
}

/// A tile product recorded in the replay buffer.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Product {
    /// `A @ B`.
    Plain,
    /// `A @ Bᵀ`, with the faces of B transposed by the unpacker.
    Transposed,
}

impl Product {
    fn slot(self) -> u32 {
        match self {
            Product::Plain => 0,
            Product::Transposed => 16,
        }
    }
}

/// Selects the row steps of a product, once the matrix unit has drained.
pub(super) fn select(a: &mut Asm, product: Product) {
    a.tt(isa::stallwait(Block::CONFIG.and(Block::MATH), Wait::MATH));
    addr_mod(a, 1, 16, if product == Product::Transposed { 40 } else { 56 }, 0, 0);
}

/// Records one fidelity phase of a tile product in the replay buffer.
///
/// `D(2i+j) += A(2i+k) @ B(2k+j)` over faces, A in SrcB and B in SrcA, 8 rows `h` at a time. In the order
/// i, k, j, h the rows need only these steps (mod 64): 0: SrcB + 8; 1: SrcB - 8, SrcA + 16; 2: SrcB + 8,
/// SrcA + 16; 3: as 2, and the next phase. With B transposed the unpacker has transposed inside the faces and
/// the order is i, j, k, h, where step 1 takes SrcB back by 24.
pub(super) fn matmul_init(a: &mut Asm, product: Product) {
    let transposed = product == Product::Transposed;
    addr_mod(a, 0, 0, 8, 0, 0);
    addr_mod(a, 2, 16, 8, 0, 0);
    addr_mod(a, 3, 16, 8, 0, 1);
    select(a, product);
    a.tt(isa::replay_record(product.slot(), 16));
    for i in 0..2 {
        for outer in 0..2 {
            for inner in 0..2 {
                for h in 0..2 {
                    let j = if transposed { outer } else { inner };
                    let step = match (i, outer, inner, h) {
                        (1, 1, 1, 1) => 3,
                        (_, _, _, 0) => 0,
                        (_, 0, 1, 1) if transposed => 1,
                        (_, _, 0, 1) if !transposed => 1,
                        _ => 2,
                    };
                    a.tt(isa::mvmul((2 * i + j) * 16 + 8 * h, step));
                }
            }
        }
    }
}

/// Adds the product of the tiles in SrcB and SrcA to the tile of Dst at the math offset, and gives SrcA back,
/// SrcB too if `release_b`. Releasing starts the phases anew.
pub(super) fn matmul_tile(a: &mut Asm, product: Product, phases: u32, release_b: bool) {
    (0..phases).for_each(|_| a.tt(isa::replay(product.slot(), 16)));
    a.tt(isa::setrwc_zero(true, release_b));
}

/// The row of Dst to which the rows of instructions are added.
pub(super) fn dst_row(a: &mut Asm, row: u32) {
    a.tt(isa::setc16(THREAD_MATH_OFFSET, row));
}

/// Waits for a free half of Dst.
pub(super) fn acquire(a: &mut Asm) {
    a.tt(isa::semwait_max(SEM_DST, Block::MATH.and(Block::SFPU).and(Block::CONFIG).and(Block::SYNC)));
}

/// Hands a finished half to the packer.
pub(super) fn commit(a: &mut Asm) {
    a.tt(isa::stallwait(Block::SYNC, Wait::MATH.and(Wait::SFPU)));
    a.tt(isa::sempost(SEM_DST));
}

/// T1: lets T0 fill Dst, and waits until it has.
pub(super) fn fill(a: &mut Asm) {
    fill_start(a);
    fill_wait(a);
}

/// T1: lets T0 fill Dst once what came before has finished.
pub(super) fn fill_start(a: &mut Asm) {
    a.tt(isa::stallwait(Block::SYNC, Wait::MATH.and(Wait::SFPU)));
    a.tt(isa::sempost(SEM_FILL));
}

/// T1: waits until T0 has filled Dst.
pub(super) fn fill_wait(a: &mut Asm) {
    a.tt(isa::semwait_zero(SEM_FILLED, Block::MATH.and(Block::SFPU).and(Block::CONFIG).and(Block::SYNC)));
    a.tt(isa::semget(SEM_FILLED));
}

/// T0: waits until T1 lets it fill Dst.
pub(super) fn await_fill(a: &mut Asm) {
    a.tt(isa::semwait_zero(SEM_FILL, Block::UNPACK.and(Block::TDMA).and(Block::SYNC)));
}

/// T0: tells T1 that Dst is filled.
pub(super) fn filled(a: &mut Asm) {
    a.tt(isa::stallwait(Block::SYNC, Wait::UNPACK));
    a.tt(isa::semget(SEM_FILL));
    a.tt(isa::sempost(SEM_FILLED));
}

/// Marks the tile of Dst at `row` as zero for the matrix unit.
pub(super) fn zero_tile(a: &mut Asm, row: u32) {
    // 32-bit row r (a multiple of 8) starts at physical row 2 r.
    (0..TILE_ROWS / 8).for_each(|i| a.tt(isa::zeroacc_rows16(row / 8 + i)));
}

/// `body` for each of `count` items (at least 1), in the half of Dst that is next: it gets the half's first row.
/// `turn` (0 at the start of a kernel) remembers which half that is; `body` must leave both registers alone.
pub(super) fn each_half(a: &mut Asm, count: Reg, turn: Reg, mut body: impl FnMut(&mut Asm, u32)) {
    // Bodies may be longer than a branch reaches.
    let (top, first, second, next, out) = (a.here(), a.label(), a.label(), a.label(), a.label());
    a.beq(turn, Reg::Zero, first);
    a.j(second);
    a.bind(first);
    body(a, HALVES[0]);
    a.j(next);
    a.bind(second);
    body(a, HALVES[1]);
    a.bind(next);
    a.xori(turn, turn, 1);
    a.addi(count, count, -1);
    a.beq(count, Reg::Zero, out);
    a.j(top);
    a.bind(out);
}
