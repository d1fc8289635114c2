//! `x · W (+ bias)`, then an epilogue, then `+ residual`: blocks of output tiles, streamed along the inputs.
//!
//! A block of `rows x cols` output tiles accumulates in half of Dst while the next block's first tiles are
//! fetched. The bias is one more tile of inputs: the weight holds it, split into three bf16 parts, in the rows
//! that a constant tile of ones selects. A residual is put into Dst first, bit by bit, and accumulated onto.

use super::math::{self, Product, TILE_ROWS};
use super::noc::{Banks, F32_SHIFT, Noc};
use super::ring::{Cursor, Ring};
use super::{Kernel, L1Plan, arg, build, l1, pack, sfpu, unpack};
use crate::error::Fault;
use crate::layout::Format;
use crate::rv::{Asm, Reg};

/// What happens to a finished product before it is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Epilogue {
    /// Nothing.
    None,
    /// The residual is added.
    Residual,
    /// `gelu`.
    Gelu,
    /// `silu`.
    Silu,
    /// `gelu(even columns of tiles) * odd columns of tiles`: the weight's halves interleaved.
    Geglu,
}

/// The kernel. Arguments: number of blocks; base addresses of output, x, weight; tiles between rows of x; tiles
/// along the inputs; base addresses of the ones and of the residual; then for each block the first tile of x,
/// the first of the weight, the output tiles, and the residual's tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Matmul {
    pub(crate) rows: u32,
    pub(crate) cols: u32,
    /// Tiles along the inputs that are fetched at once.
    pub(crate) chunk: u32,
    pub(crate) weight: Format,
    pub(crate) bias: bool,
    pub(crate) epilogue: Epilogue,
    pub(crate) banks: Banks,
}

// Arguments.
const OUTPUT: u32 = 1;
const X: u32 = 2;
const WEIGHT: u32 = 3;
const PITCH: u32 = 4;
const DEPTH: u32 = 5;
const ONES: u32 = 6;
const RESIDUAL: u32 = 7;
const HEAD: u32 = 8;

const INPUTS: Cursor = Cursor { count: Reg::A2, addr: Reg::A0 };
const RESIDUALS: Cursor = Cursor { count: Reg::A6, addr: Reg::A5 };

struct Rings {
    inputs: Ring,
    residual: Ring,
    output: Ring,
}

impl Matmul {
    fn tiles(&self) -> u32 {
        self.rows * self.cols
    }

    /// Slots of Dst that are stored.
    fn stored(&self) -> Vec<u32> {
        let step = if self.epilogue == Epilogue::Geglu { 2 } else { 1 };
        (0..self.tiles()).step_by(step).collect()
    }

    fn residual(&self) -> bool {
        self.epilogue == Epilogue::Residual
    }

    fn weight_shift(&self) -> u32 {
        self.weight.tile_bytes().ilog2()
    }

    /// Bytes of the x tiles of a chunk.
    fn x_bytes(&self) -> u32 {
        (self.chunk * self.rows) << F32_SHIFT
    }

    fn item_words(&self) -> u32 {
        let residual = if self.residual() { self.tiles() } else { 0 };
        2 + self.stored().len() as u32 + residual
    }

    pub(crate) fn build(&self, l1_bytes: u32) -> Result<Kernel, Fault> {
        let mut plan = L1Plan::new(l1_bytes);
        let slot = self.x_bytes() + ((self.chunk * self.cols) << self.weight_shift());
        let rings = Rings {
            inputs: Ring::new(&mut plan, 0, slot, 2),
            residual: Ring::new(&mut plan, 1, self.tiles() << F32_SHIFT, 2 * u32::from(self.residual())),
            output: Ring::new(&mut plan, 2, 1 << F32_SHIFT, 2 * self.tiles()),
        };
        let programs = [
            self.reader(&rings),
            self.unpacker(&rings),
            self.math(),
            self.packer(&rings),
            self.writer(&rings),
        ];
        build(format!("{self:?}"), &plan, programs.map(Some))
    }

    /// `s5` = tiles of the next chunk, of the `s4` that remain.
    fn chunk_size(&self, a: &mut Asm) {
        let whole = a.label();
        a.li(Reg::S5, self.chunk);
        a.bge(Reg::S4, Reg::S5, whole);
        a.mv(Reg::S5, Reg::S4);
        a.bind(whole);
    }

    fn reader(&self, rings: &Rings) -> Asm {
        let mut b = Asm::new();
        Noc::Read.init(&mut b, self.banks);
        rings.inputs.start(&mut b, INPUTS);
        rings.residual.start(&mut b, RESIDUALS);
        b.li(Reg::S2, l1::ARGS + 4 * HEAD);
        arg(&mut b, Reg::S3, 0);
        b.count_down(Reg::S3, |a| {
            if self.residual() {
                self.read_residual(a, rings);
            }
            a.lw(Reg::S6, Reg::S2, 0);
            a.lw(Reg::S7, Reg::S2, 4);
            arg(a, Reg::S4, DEPTH);
            let chunk = a.here();
            self.chunk_size(a);
            rings.inputs.reserve(a, INPUTS);
            a.mv(Reg::A1, INPUTS.addr);
            a.add_const(Reg::T3, INPUTS.addr, self.x_bytes(), Reg::T5);
            a.mv(Reg::S11, Reg::S5);
            a.count_down(Reg::S11, |a| self.read_step(a));
            Noc::Read.wait(a);
            rings.inputs.publish(a, INPUTS);
            a.bne(Reg::S4, Reg::Zero, chunk);
            a.addi(Reg::S2, Reg::S2, 4 * self.item_words() as i32);
        });
        b
    }

    fn read_residual(&self, a: &mut Asm, rings: &Rings) {
        rings.residual.reserve(a, RESIDUALS);
        a.mv(Reg::A1, RESIDUALS.addr);
        arg(a, Reg::A4, RESIDUAL);
        for i in 0..self.tiles() {
            a.lw(Reg::A3, Reg::S2, 4 * (2 + self.tiles() + i) as i32);
            Noc::Read.tile(a, Reg::A3, Reg::A4, Reg::A1, F32_SHIFT);
            a.add_const(Reg::A1, Reg::A1, 1 << F32_SHIFT, Reg::T5);
        }
        Noc::Read.wait(a);
        rings.residual.publish(a, RESIDUALS);
    }

    /// Reads the tiles of x (to `a1`) and of the weight (to `t3`) at one place along the inputs.
    fn read_step(&self, a: &mut Asm) {
        a.mv(Reg::A3, Reg::S6);
        arg(a, Reg::A4, X);
        arg(a, Reg::T4, PITCH);
        if self.bias {
            let inside = a.label();
            a.addi(Reg::T5, Reg::S4, -1);
            a.bne(Reg::T5, Reg::Zero, inside);
            arg(a, Reg::A4, ONES);
            a.li(Reg::A3, 0);
            a.li(Reg::T4, 0);
            a.bind(inside);
        }
        for _ in 0..self.rows {
            Noc::Read.tile(a, Reg::A3, Reg::A4, Reg::A1, F32_SHIFT);
            a.add(Reg::A3, Reg::A3, Reg::T4);
            a.add_const(Reg::A1, Reg::A1, 1 << F32_SHIFT, Reg::T5);
        }
        a.mv(Reg::A3, Reg::S7);
        arg(a, Reg::A4, WEIGHT);
        arg(a, Reg::T4, DEPTH);
        for _ in 0..self.cols {
            Noc::Read.tile(a, Reg::A3, Reg::A4, Reg::T3, self.weight_shift());
            a.add(Reg::A3, Reg::A3, Reg::T4);
            a.add_const(Reg::T3, Reg::T3, 1 << self.weight_shift(), Reg::T5);
        }
        a.addi(Reg::S6, Reg::S6, 1);
        a.addi(Reg::S7, Reg::S7, 1);
        a.addi(Reg::S4, Reg::S4, -1);
    }

    fn unpacker(&self, rings: &Rings) -> Asm {
        let sources = unpack::Target::SrcA { bf16: self.weight == Format::Bf16, transpose: false };
        let weight_bytes = 1 << self.weight_shift();
        let mut t0 = Asm::new();
        unpack::init(&mut t0);
        unpack::target(&mut t0, sources);
        unpack::set_steps(&mut t0, weight_bytes, 1 << F32_SHIFT, self.cols * weight_bytes);
        rings.inputs.start(&mut t0, INPUTS);
        rings.residual.start(&mut t0, RESIDUALS);
        t0.li(Reg::S6, 0);
        arg(&mut t0, Reg::S3, 0);
        t0.count_down(Reg::S3, |a| {
            if self.residual() {
                unpack::target(a, unpack::Target::Dst);
                rings.residual.await_filled(a, RESIDUALS);
                math::await_fill(a);
                a.mv(Reg::A1, RESIDUALS.addr);
                for i in 0..self.tiles() {
                    a.addi(Reg::A3, Reg::S6, (i * TILE_ROWS) as i32);
                    unpack::to_dst(a, Reg::A1, Reg::A3);
                    a.add_const(Reg::A1, Reg::A1, 1 << F32_SHIFT, Reg::T2);
                }
                math::filled(a);
                unpack::target(a, sources);
                rings.residual.release(a, RESIDUALS);
                a.xori(Reg::S6, Reg::S6, math::HALF_ROWS as i32);
            }
            arg(a, Reg::S4, DEPTH);
            let chunk = a.here();
            self.chunk_size(a);
            a.sub(Reg::S4, Reg::S4, Reg::S5);
            rings.inputs.await_filled(a, INPUTS);
            unpack::units(a, Reg::A1, INPUTS.addr);
            a.add_const(Reg::A3, Reg::A1, self.x_bytes() >> 4, Reg::T0);
            unpack::set_gprs(a, &[(unpack::G_B, Reg::A1), (unpack::G_A, Reg::A3)]);
            a.count_down(Reg::S5, |a| {
                for row in 0..self.rows {
                    unpack::src_b(a);
                    (0..self.cols).for_each(|_| unpack::src_a(a));
                    if row + 1 < self.rows {
                        unpack::rewind_a(a);
                    }
                }
            });
            unpack::sync(a);
            rings.inputs.release(a, INPUTS);
            a.bne(Reg::S4, Reg::Zero, chunk);
        });
        t0
    }

    fn math(&self) -> Asm {
        let mut t1 = Asm::new();
        math::init(&mut t1);
        math::matmul_init(&mut t1, Product::Plain);
        sfpu::init(&mut t1);
        arg(&mut t1, Reg::S3, 0);
        t1.li(Reg::S5, 0);
        math::each_half(&mut t1, Reg::S3, Reg::S5, |a, half| {
            math::acquire(a);
            if self.residual() {
                math::fill(a);
            } else {
                (0..self.tiles()).for_each(|i| math::zero_tile(a, half + i * TILE_ROWS));
            }
            arg(a, Reg::S4, DEPTH);
            a.count_down(Reg::S4, |a| {
                for row in 0..self.rows {
                    for col in 0..self.cols {
                        math::dst_row(a, half + (row * self.cols + col) * TILE_ROWS);
                        math::matmul_tile(a, Product::Plain, col + 1 == self.cols);
                    }
                }
            });
            if !matches!(self.epilogue, Epilogue::None | Epilogue::Residual) {
                sfpu::run(a, |a| {
                    for slot in self.stored() {
                        let at = half + slot * TILE_ROWS;
                        match self.epilogue {
                            Epilogue::Gelu => sfpu::gelu(a, at),
                            Epilogue::Silu => sfpu::silu(a, at),
                            _ => sfpu::geglu(a, at, at + TILE_ROWS),
                        }
                    }
                });
            }
            math::commit(a);
        });
        unpack::sync(&mut t1);
        t1
    }

    fn packer(&self, rings: &Rings) -> Asm {
        let mut t2 = Asm::new();
        pack::init(&mut t2);
        rings.output.start(&mut t2, INPUTS);
        t2.li(Reg::S4, 0);
        arg(&mut t2, Reg::S3, 0);
        t2.count_down(Reg::S3, |a| pack::half(a, rings.output, INPUTS, Reg::S4, &self.stored()));
        t2
    }

    fn writer(&self, rings: &Rings) -> Asm {
        let mut nc = Asm::new();
        Noc::Write.init(&mut nc, self.banks);
        rings.output.start(&mut nc, INPUTS);
        nc.li(Reg::S2, l1::ARGS + 4 * HEAD);
        arg(&mut nc, Reg::S3, 0);
        arg(&mut nc, Reg::A4, OUTPUT);
        nc.count_down(Reg::S3, |a| {
            for i in 0..self.stored().len() {
                rings.output.await_filled(a, INPUTS);
                a.lw(Reg::A3, Reg::S2, 4 * (2 + i) as i32);
                Noc::Write.tile(a, Reg::A3, Reg::A4, INPUTS.addr, F32_SHIFT);
                Noc::Write.wait(a);
                rings.output.release(a, INPUTS);
            }
            a.addi(Reg::S2, Reg::S2, 4 * self.item_words() as i32);
        });
        nc
    }
}
