//! Programs for the vector unit (T1): 32 lanes of f32, 4 rows by 8 columns of Dst.
//!
//! A tile is 32 vectors, at rows 0, 2, 4 … 62 from its first (bit 1 selects the odd columns). `L0` to `L7` are
//! free; [`init`] loads the constant registers. Multiply-adds, swaps and rotations take two cycles and nothing
//! interlocks, so each is followed by an `SFPNOP` unless the next instruction is independent; the hazard checker
//! verifies that.

mod rows;

pub(super) use rows::{
    normalize, softmax_divide, softmax_exponentials, softmax_inverse_sum, softmax_maximum, softmax_scores,
    softmax_start, stats_accumulate, stats_inverse_deviation, stats_mean, stats_zero,
};

use super::math::TILE_ROWS;
use crate::isa::{self, Block, Imm, L, Wait};
use crate::rv::{Asm, Reg};

use L::{L0, L1, L2, L3, L4, L5, L6, L7, MinusOne, One};

const LOG2E: L = L::C0;
/// `1.5 * 2^23 + 127`: adding it rounds to an integer, in the low mantissa bits, with the exponent's bias added.
const MAGIC: L = L::C1;
const MINUS_MAGIC: L = L::C2;

/// Address modifiers of loads and stores, while the vector unit's set is selected.
const STAY: u32 = 0;
const NEXT_VECTOR: u32 = 1;
const NEXT_ROWS: u32 = 2;

/// Loops of the vector unit count here.
const COUNT: Reg = Reg::S9;

/// Offsets of the four vectors that make up four rows of a tile.
const ROW_VECTORS: [u32; 4] = [0, 2, 16, 18];

fn nop(a: &mut Asm) {
    a.tt(isa::sfpnop());
}

fn constant(a: &mut Asm, d: L, v: f32) {
    let bits = v.to_bits();
    if bits & 0xFFFF == 0 {
        a.tt(isa::sfploadi(d, Imm::Bf16, bits >> 16));
    } else {
        bits_constant(a, d, bits);
    }
}

fn bits_constant(a: &mut Asm, d: L, bits: u32) {
    a.tt(isa::sfploadi(d, Imm::Low, bits & 0xFFFF));
    a.tt(isa::sfploadi(d, Imm::High, bits >> 16));
}

fn mad(a: &mut Asm, d: L, x: L, y: L, z: L) {
    a.tt(isa::sfpmad(d, x, y, z));
    nop(a);
}

fn mul(a: &mut Asm, d: L, x: L, y: L) {
    a.tt(isa::sfpmul(d, x, y));
    nop(a);
}

fn add(a: &mut Asm, d: L, x: L, y: L) {
    a.tt(isa::sfpadd(d, x, y));
    nop(a);
}

fn minmax(a: &mut Asm, low: L, high: L) {
    a.tt(isa::sfpswap_minmax(low, high));
    nop(a);
}

/// `d` = `s` rotated by `n` lanes within each row.
fn rotate(a: &mut Asm, d: L, s: L, n: u32) {
    a.tt(isa::sfpror(d, s));
    nop(a);
    for _ in 1..n {
        a.tt(isa::sfpror(d, d));
        nop(a);
    }
}

fn load(a: &mut Asm, d: L, row: u32) {
    a.tt(isa::sfpload(d, STAY, row));
}

fn store(a: &mut Asm, s: L, row: u32) {
    a.tt(isa::sfpstore(s, STAY, row));
}

/// Loads the constant registers. Once a kernel; clobbers `L0`.
pub(super) fn init(a: &mut Asm) {
    a.tt(isa::sfpconfig_default(MinusOne));
    for (register, v) in
        [(LOG2E, std::f32::consts::LOG2_E), (MAGIC, 12_583_039.0), (MINUS_MAGIC, -12_583_039.0)]
    {
        constant(a, L0, v);
        a.tt(isa::sfpconfig(register));
    }
}

/// Runs a program on the vector unit: waits for the matrix unit, selects the vector unit's address modifiers and
/// absolute rows, and undoes that after.
pub(super) fn run(a: &mut Asm, body: impl FnOnce(&mut Asm)) {
    let units = Block::SFPU.and(Block::CONFIG).and(Block::MATH);
    a.tt(isa::stallwait(units, Wait::MATH));
    a.tt(isa::setc16(2, 1));
    a.tt(isa::setc16(1, 0));
    a.tt(isa::setrwc_zero(false, false));
    body(a);
    a.tt(isa::stallwait(units, Wait::SFPU));
    a.tt(isa::setc16(2, 0));
    a.tt(isa::setrwc_zero(false, false));
}

/// For each vector of a tile: `inputs` (rows of tiles) are loaded to `L0`, `L1` …, `f` runs, and `L0` is stored
/// to the tile at `output`.
fn map(a: &mut Asm, inputs: &[u32], output: u32, f: impl FnOnce(&mut Asm)) {
    a.tt(isa::setrwc_zero(false, false));
    a.repeat(COUNT, TILE_ROWS / 2, |a| {
        for (&row, d) in inputs.iter().zip([L0, L1, L2, L3]) {
            load(a, d, row);
        }
        f(a);
        a.tt(isa::sfpstore(L0, NEXT_VECTOR, output));
    });
}

/// For each group of four rows: `f` with the offset to add to rows. It must end with a store of modifier
/// [`NEXT_ROWS`].
fn row_groups(a: &mut Asm, mut f: impl FnMut(&mut Asm, u32)) {
    for half in [0, 32] {
        a.tt(isa::setrwc_zero(false, false));
        a.repeat(COUNT, 4, |a| f(a, half));
    }
}

/// `L0 = exp(L0)`, for any finite argument; clobbers `L1` to `L5`.
///
/// `exp(x) = 2^n * 2^f` with `n` the integer nearest to `x log2 e`.
fn exp(a: &mut Asm) {
    constant(a, L1, -86.0);
    minmax(a, L1, L0); // L0 = max(x, -86)
    constant(a, L1, 80.0);
    minmax(a, L0, L1); // L0 = min(x, 80)
    mad(a, L1, L0, LOG2E, MAGIC);
    mul(a, L4, L0, LOG2E);
    mad(a, L2, L1, One, MINUS_MAGIC); // n
    mad(a, L3, L2, MinusOne, L4); // f
    a.tt(isa::sfpshft(L1, 23)); // 2^n
    constant(a, L0, 0.001_333_355_8);
    for c in [0.009_618_129, 0.055_504_11, 0.240_226_5, std::f32::consts::LN_2, 1.0f32] {
        constant(a, L5, c);
        mad(a, L0, L0, L3, L5);
    }
    mul(a, L0, L0, L1);
}

/// `d = 1 / x` for normal positive `x`, by three Newton steps; clobbers `L6`, `L7`.
fn reciprocal(a: &mut Asm, d: L, x: L) {
    bits_constant(a, L6, 0x7EF3_11C7);
    a.tt(isa::sfpmov(d, x));
    a.tt(isa::sfpisub(d, L6));
    a.tt(isa::sfpneg(L6, x));
    for _ in 0..3 {
        constant(a, L7, 2.0);
        mad(a, L7, L6, d, L7);
        mul(a, d, d, L7);
    }
}

/// `d = 1 / sqrt(x)` for normal positive `x`, by three Newton steps; clobbers `L5` to `L7`.
fn inverse_sqrt(a: &mut Asm, d: L, x: L) {
    bits_constant(a, L6, 0x5F37_59DF);
    a.tt(isa::sfpmov(d, x));
    a.tt(isa::sfpshft(d, -1));
    a.tt(isa::sfpisub(d, L6));
    constant(a, L7, -0.5);
    mul(a, L6, x, L7);
    for _ in 0..3 {
        mul(a, L5, d, d);
        constant(a, L7, 1.5);
        mad(a, L7, L6, L5, L7);
        mul(a, d, d, L7);
    }
}

/// `L0 = x / (1 + exp(L0))`, with `x` loaded again from `row`.
fn gated(a: &mut Asm, row: u32) {
    exp(a);
    add(a, L0, L0, One);
    reciprocal(a, L1, L0);
    load(a, L0, row);
    mul(a, L0, L0, L1);
}

/// `L0 = gelu(L0)` where `row` holds the argument. As `x * sigmoid(2 sqrt(2/π) (x + 0.044715 x³))`, which is
/// the tanh form exactly.
fn gelu_vector(a: &mut Asm, row: u32) {
    mul(a, L1, L0, L0);
    constant(a, L2, -0.071_354_82);
    constant(a, L3, -1.595_769);
    mad(a, L1, L1, L2, L3);
    mul(a, L0, L0, L1);
    gated(a, row);
}

/// `gelu` of the tile at `row`, in place.
pub(super) fn gelu(a: &mut Asm, row: u32) {
    map(a, &[row], row, |a| gelu_vector(a, row));
}

/// `silu` of the tile at `row`, in place.
pub(super) fn silu(a: &mut Asm, row: u32) {
    map(a, &[row], row, |a| {
        mul(a, L0, L0, MinusOne);
        gated(a, row);
    });
}

/// `gelu(gate) * up`, to the gate's tile.
pub(super) fn geglu(a: &mut Asm, gate: u32, up: u32) {
    map(a, &[gate], gate, |a| {
        gelu_vector(a, gate);
        load(a, L1, up);
        mul(a, L0, L0, L1);
    });
}

/// `x + y`, to x's tile.
pub(super) fn add_tiles(a: &mut Asm, x: u32, y: u32) {
    map(a, &[x, y], x, |a| add(a, L0, L0, L1));
}

/// `x + (y + z)`, to x's tile.
pub(super) fn add_both(a: &mut Asm, x: u32, y: u32, z: u32) {
    map(a, &[x, y, z], x, |a| {
        add(a, L1, L1, L2);
        add(a, L0, L0, L1);
    });
}

/// `x + scale * y`, to x's tile.
pub(super) fn add_scaled(a: &mut Asm, x: u32, y: u32, scale: f32) {
    map(a, &[x, y], x, |a| {
        constant(a, L2, scale);
        mad(a, L0, L1, L2, L0);
    });
}

/// `x + gate * y`, to x's tile.
pub(super) fn gated_add(a: &mut Asm, x: u32, y: u32, gate: u32) {
    map(a, &[x, y, gate], x, |a| mad(a, L0, L1, L2, L0));
}

/// `x * cos + turned * sin`, to x's tile.
pub(super) fn rotate_pairs(a: &mut Asm, x: u32, turned: u32, cos: u32, sin: u32) {
    map(a, &[x, turned, cos, sin], x, |a| {
        mul(a, L0, L0, L2);
        mad(a, L0, L1, L3, L0);
    });
}
