//! `epilogue(x · W (+ bias)) (+ residual)`: panels of output tiles, streamed along the inputs.
//!
//! A core computes a panel of `panel_rows x panel_cols` output tiles. Tiles of x and of the weight are fetched a
//! chunk of inputs at a time and used by all blocks of the panel; a block of `rows x cols` (at most four) tiles
//! accumulates in half of Dst. Between chunks the partial sums wait in L1, as f32: that is what makes panels
//! larger than Dst, and so DRAM traffic small.
//!
//! The bias is one more tile of inputs: the weight holds it, split into three bf16 parts, in the rows that a
//! constant tile of ones selects. A residual is where the partial sums start.
//!
//! Cores whose panels have the same rows may share x: see [`sharing`].

mod reader;
mod sharing;

use super::math::{self, Product, TILE_ROWS};
pub(crate) use sharing::Sharing;

use super::noc::{Banks, F32_SHIFT, IN_FLIGHT, Noc, write_slot};
use super::ring::{Cursor, Ring, wait_at_least};
use super::{Kernel, L1Plan, arg, build, l1, pack, sfpu, unpack};
use crate::error::Fault;
use crate::layout::{EXPONENT_BYTES, Format};
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
    /// `gelu(even columns of tiles) * odd columns of tiles`.
    Geglu,
}

/// The kernel. Arguments: number of panels; base addresses of output, x, weight; tiles between rows of x; tiles
/// along the inputs; base addresses of the ones, of the residual and of the weight's exponents; tiles of a block of the
/// weight, and the number that divides by them ([`Blocks`](crate::dram::Blocks)); what a core must know to share, if x is shared
/// ([`Sharing`]); then for each panel the first tile of x, the first tile of each column of the weight, and, block by
/// block, the output tiles and the residual's tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Matmul {
    /// Rows and columns of tiles of a block.
    pub(crate) rows: u32,
    pub(crate) cols: u32,
    /// Rows and columns of tiles of a panel.
    pub(crate) panel_rows: u32,
    pub(crate) panel_cols: u32,
    /// Tiles along the inputs that are fetched at once.
    pub(crate) chunk: u32,
    /// Chunks that L1 holds.
    pub(crate) slots: u32,
    /// Whether the inputs take more than one chunk.
    pub(crate) partial: bool,
    /// Whether one core reads x for all.
    pub(crate) shared: bool,
    pub(crate) x: Format,
    pub(crate) weight: Format,
    pub(crate) bias: bool,
    pub(crate) epilogue: Epilogue,
    /// How the result is stored; partial sums stay f32.
    pub(crate) output: Format,
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
const EXPONENTS: u32 = 8;
const SPAN: u32 = 9;
const MAGIC: u32 = 10;
/// How many words every core's arguments begin with; what a core must know to share comes next.
const HEAD: u32 = 11;

const INPUTS: Cursor = Cursor { count: Reg::A2, addr: Reg::A0 };
const RESIDUALS: Cursor = Cursor { count: Reg::A6, addr: Reg::A5 };
const F32_BYTES: u32 = 1 << F32_SHIFT;

struct Plan {
    inputs: Ring,
    /// The partial sums, which start as the residual: handed from the reader to the unpacker.
    sums: Ring,
    output: Ring,
}

/// Counter of blocks whose partial sums the packer has stored.
const STORED: u32 = l1::COUNTERS + 8 * 3;

impl Matmul {
    /// The smallest of its kind, which fits any layer.
    pub(crate) fn smallest(
        [x, weight]: [Format; 2],
        bias: bool,
        epilogue: Epilogue,
        output: Format,
        banks: Banks,
    ) -> Self {
        Matmul {
            rows: 1,
            cols: 1,
            panel_rows: 1,
            panel_cols: 1,
            chunk: 1,
            slots: 2,
            partial: false,
            shared: false,
            x,
            weight,
            bias,
            epilogue,
            output,
            banks,
        }
    }

    /// Tiles of a block.
    fn tiles(&self) -> u32 {
        self.rows * self.cols
    }

    /// Blocks of a panel.
    fn blocks(&self) -> u32 {
        self.panel_rows / self.rows * (self.panel_cols / self.cols)
    }

    /// Fidelity phases. Of a bf16 value only one bit is left for the low part of SrcB, and three for that of SrcA: what the
    /// fourth phase adds is at most 2⁻¹² of a product, and 5e-5 of it on average, far below the values' own rounding. With
    /// weights of seven bits the third one's 2⁻⁸ of an activation is as far below theirs.
    pub(crate) fn phases(&self) -> u32 {
        match (self.x, self.weight) {
            (Format::Bf16, Format::Bf16) => math::PHASES - 1,
            (Format::Bf16, Format::Bfp8) => math::PHASES - 2,
            _ => math::PHASES,
        }
    }

    /// Slots of Dst that are stored.
    pub(crate) fn stored(&self) -> Vec<u32> {
        let step = if self.epilogue == Epilogue::Geglu { 2 } else { 1 };
        (0..self.tiles()).step_by(step).collect()
    }

    fn residual(&self) -> bool {
        self.epilogue == Epilogue::Residual
    }

    fn x_shift(&self) -> u32 {
        self.x.tile_bytes().ilog2()
    }

    fn weight_shift(&self) -> u32 {
        self.weight.tile_bytes().ilog2()
    }

    /// Bytes of the weight in a chunk.
    fn weight_bytes(&self) -> u32 {
        self.panel_cols / self.cols * self.weight_block_bytes()
    }

    /// Bytes of exponents before the values of a column of blocks in a chunk.
    fn exponent_bytes(&self) -> u32 {
        if self.weight == Format::Bfp8 { self.chunk * self.cols * EXPONENT_BYTES as u32 } else { 0 }
    }

    /// Bytes of x in a chunk: those of one row of blocks.
    fn x_block_bytes(&self) -> u32 {
        (self.chunk * self.rows) << self.x_shift()
    }

    /// Bytes of x in a chunk.
    fn x_bytes(&self) -> u32 {
        (self.chunk * self.panel_rows) << self.x_shift()
    }

    /// Bytes of the weight in a chunk: those of one column of blocks.
    fn weight_block_bytes(&self) -> u32 {
        ((self.chunk * self.cols) << self.weight_shift()) + self.exponent_bytes()
    }

    /// Index of the first output tile in an item.
    fn outputs_at(&self) -> u32 {
        1 + self.panel_cols
    }

    /// Index of the first of the residual's tiles.
    fn residuals_at(&self) -> u32 {
        self.outputs_at() + self.blocks() * self.stored().len() as u32
    }

    /// Words of arguments of a panel.
    pub(crate) fn item_words(&self) -> u32 {
        let residual = if self.residual() { self.blocks() * self.tiles() } else { 0 };
        self.residuals_at() + residual
    }

    /// Address of the first panel's arguments.
    fn items_at(&self) -> u32 {
        l1::ARGS + 4 * (HEAD + if self.shared { Sharing::WORDS } else { 0 })
    }

    /// Bytes of L1 that the kernel's buffers take.
    pub(crate) fn l1_bytes(&self) -> u32 {
        let chunk = self.x_bytes() + self.weight_bytes();
        self.slots * chunk + self.sums_bytes() + self.output_slots() * self.output_bytes() + 4 * 64
    }

    fn output_bytes(&self) -> u32 {
        self.output.tile_bytes() as u32
    }

    /// Whether the packers change their format between partial sums and results.
    fn switches(&self) -> bool {
        self.partial && self.output != Format::F32
    }

    /// Two blocks, one of them being packed, and what is on its way to memory.
    fn output_slots(&self) -> u32 {
        2 * self.tiles() + IN_FLIGHT
    }

    fn sums_bytes(&self) -> u32 {
        let kept = self.residual() || self.partial;
        if kept { (self.blocks() * self.tiles()) << F32_SHIFT } else { 0 }
    }

    pub(crate) fn build(&self, l1_bytes: u32) -> Result<Kernel, Fault> {
        let mut plan = L1Plan::new(l1_bytes);
        let chunk = self.x_bytes() + self.weight_bytes();
        let p = Plan {
            inputs: Ring::new(&mut plan, 0, chunk, self.slots),
            sums: Ring::new(&mut plan, 1, self.sums_bytes(), 1),
            output: Ring::new(&mut plan, 2, self.output_bytes(), self.output_slots()),
        };
        let programs = [self.reader(&p), self.unpacker(&p), self.math(), self.packer(&p), self.writer(&p)];
        let name = format!(
            "matmul of {}x{} tiles in blocks of {}x{} ({:?}{})",
            self.panel_rows,
            self.panel_cols,
            self.rows,
            self.cols,
            self.epilogue,
            if self.shared { ", shared" } else { "" }
        );
        build(name, &plan, programs.map(Some))
    }

    /// `n` = tiles of the next chunk, of the `left` that remain.
    fn chunk_size(&self, a: &mut Asm, n: Reg, left: Reg) {
        let whole = a.label();
        a.li(n, self.chunk);
        a.bge(left, n, whole);
        a.mv(n, left);
        a.bind(whole);
    }

    fn unpacker(&self, p: &Plan) -> Asm {
        // First row of the half of Dst that is next, stored blocks to wait for, and by how many that grows with a
        // block: none in the first chunk.
        const HALF: Reg = Reg::S6;
        const TARGET: Reg = Reg::S7;
        const LATER: Reg = Reg::S8;
        let mut t0 = Asm::new();
        unpack::init(&mut t0, self.x);
        if self.weight == Format::Bfp8 {
            unpack::groups(&mut t0, self.chunk * self.cols);
        }
        unpack::target(&mut t0, self.sources());
        p.inputs.start(&mut t0, INPUTS);
        p.sums.start(&mut t0, RESIDUALS);
        t0.li(HALF, 0);
        t0.li(TARGET, 0);
        arg(&mut t0, Reg::S3, 0);
        t0.count_down(Reg::S3, |a| {
            if self.residual() {
                p.sums.await_filled(a, RESIDUALS);
            }
            a.li(LATER, 0);
            arg(a, Reg::S4, DEPTH);
            let chunk = a.here();
            self.chunk_size(a, Reg::S5, Reg::S4);
            a.sub(Reg::S4, Reg::S4, Reg::S5);
            p.inputs.await_filled(a, INPUTS);
            unpack::units(a, Reg::A1, INPUTS.addr);
            a.li(Reg::A4, p.sums.base);
            a.repeat(Reg::S9, self.panel_rows / self.rows, |a| {
                unpack::units(a, Reg::A3, INPUTS.addr);
                a.add_const(Reg::A3, Reg::A3, self.x_bytes() >> 4, Reg::T0);
                a.repeat(Reg::S10, self.panel_cols / self.cols, |a| {
                    self.fill(a, HALF, TARGET, LATER);
                    a.xori(HALF, HALF, math::HALF_ROWS as i32);
                    unpack::point(a, Reg::A3, Reg::A1);
                    a.mv(Reg::S11, Reg::S5);
                    a.count_down(Reg::S11, |a| {
                        for row in 0..self.rows {
                            unpack::src_b(a);
                            (0..self.cols).for_each(|_| unpack::src_a(a));
                            if row + 1 < self.rows {
                                unpack::repeat_a(a);
                            }
                        }
                        if self.rows > 1 {
                            unpack::next_group_a(a, self.cols);
                        }
                    });
                    a.add_const(Reg::A3, Reg::A3, self.weight_block_bytes() >> 4, Reg::T0);
                });
                a.add_const(Reg::A1, Reg::A1, self.x_block_bytes() >> 4, Reg::T0);
            });
            unpack::sync(a);
            p.inputs.release(a, INPUTS);
            a.li(LATER, 1);
            a.bne(Reg::S4, Reg::Zero, chunk);
            if self.residual() {
                p.sums.release(a, RESIDUALS);
            }
        });
        t0
    }

    fn sources(&self) -> unpack::Target {
        unpack::Target::SrcA { from: self.weight, transpose: false }
    }

    /// T0: puts the partial sums of the block at `a4` into Dst, where there are any, and goes to the next.
    fn fill(&self, a: &mut Asm, half: Reg, target: Reg, later: Reg) {
        if self.sums_bytes() == 0 {
            return;
        }
        let none = a.label();
        if !self.residual() {
            a.beq(later, Reg::Zero, none);
        }
        unpack::target(a, unpack::Target::Dst);
        a.add(target, target, later);
        wait_at_least(a, STORED, target);
        math::await_fill(a);
        a.mv(Reg::A7, Reg::A4);
        for i in 0..self.tiles() {
            a.addi(Reg::T3, half, (i * TILE_ROWS) as i32);
            unpack::to_dst(a, Reg::A7, Reg::T3);
            a.add_const(Reg::A7, Reg::A7, F32_BYTES, Reg::T2);
        }
        math::filled(a);
        unpack::leave_dst(a, self.sources());
        a.bind(none);
        a.add_const(Reg::A4, Reg::A4, self.tiles() << F32_SHIFT, Reg::T2);
    }

    fn math(&self) -> Asm {
        const FIRST: Reg = Reg::S7;
        let mut t1 = Asm::new();
        math::init(&mut t1, self.first_packed());
        math::matmul_init(&mut t1, Product::Plain);
        sfpu::init(&mut t1);
        arg(&mut t1, Reg::S3, 0);
        t1.li(Reg::S5, 0);
        t1.count_down(Reg::S3, |a| {
            a.li(FIRST, 1);
            arg(a, Reg::S4, DEPTH);
            let chunk = a.here();
            self.chunk_size(a, Reg::S6, Reg::S4);
            a.sub(Reg::S4, Reg::S4, Reg::S6);
            a.li(Reg::S8, self.blocks());
            math::each_half(a, Reg::S8, Reg::S5, |a, half| {
                math::acquire(a);
                self.start_sums(a, half, FIRST);
                a.mv(Reg::S11, Reg::S6);
                a.count_down(Reg::S11, |a| {
                    for row in 0..self.rows {
                        for col in 0..self.cols {
                            math::dst_row(a, half + (row * self.cols + col) * TILE_ROWS);
                            math::matmul_tile(a, Product::Plain, self.phases(), col + 1 == self.cols);
                        }
                    }
                });
                self.finish_sums(a, half);
                math::commit(a);
            });
            a.li(FIRST, 0);
            let out = a.label();
            a.beq(Reg::S4, Reg::Zero, out);
            a.j(chunk);
            a.bind(out);
        });
        unpack::sync(&mut t1);
        t1
    }

    /// T1: zeros in the first chunk, else what T0 puts there.
    fn start_sums(&self, a: &mut Asm, half: u32, first: Reg) {
        let zeros = |a: &mut Asm| (0..self.tiles()).for_each(|i| math::zero_tile(a, half + i * TILE_ROWS));
        if self.residual() {
            math::fill(a);
        } else if self.partial {
            let (fill, on) = (a.label(), a.label());
            a.beq(first, Reg::Zero, fill);
            zeros(a);
            a.j(on);
            a.bind(fill);
            math::fill(a);
            a.bind(on);
        } else {
            zeros(a);
        }
    }

    /// T1: the activation, after the last chunk (`s4` is 0).
    fn finish_sums(&self, a: &mut Asm, half: u32) {
        if matches!(self.epilogue, Epilogue::None | Epilogue::Residual) {
            return;
        }
        let more = a.label();
        a.bne(Reg::S4, Reg::Zero, more);
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
        a.bind(more);
    }

    fn packer(&self, p: &Plan) -> Asm {
        const HALF: Reg = Reg::S6;
        const COUNT: Reg = Reg::S7;
        let all: Vec<u32> = (0..self.tiles()).collect();
        let mut t2 = Asm::new();
        pack::init(&mut t2, self.first_packed());
        p.output.start(&mut t2, INPUTS);
        t2.li(HALF, 0);
        t2.li(COUNT, 0);
        arg(&mut t2, Reg::S3, 0);
        t2.count_down(Reg::S3, |a| {
            arg(a, Reg::S4, DEPTH);
            let chunk = a.here();
            self.chunk_size(a, Reg::S5, Reg::S4);
            a.sub(Reg::S4, Reg::S4, Reg::S5);
            if self.switches() {
                // The last of several chunks: T1 has handed over the sums of those before.
                let sums = a.label();
                a.bne(Reg::S4, Reg::Zero, sums);
                pack::switch(a, self.output);
                a.bind(sums);
            }
            a.li(Reg::S9, p.sums.base);
            a.repeat(Reg::S8, self.blocks(), |a| {
                if !self.partial {
                    return pack::half(a, p.output, INPUTS, HALF, &self.stored());
                }
                let (last, on) = (a.label(), a.label());
                a.beq(Reg::S4, Reg::Zero, last);
                pack::half_to(a, Reg::S9, HALF, &all);
                a.addi(COUNT, COUNT, 1);
                a.li(Reg::T6, STORED);
                a.sw(COUNT, Reg::T6, 0);
                a.j(on);
                a.bind(last);
                pack::half(a, p.output, INPUTS, HALF, &self.stored());
                a.bind(on);
            });
            a.bne(Reg::S4, Reg::Zero, chunk);
            if self.switches() {
                pack::switch(a, Format::F32);
            }
        });
        // The next kernel configures the packers anew.
        unpack::sync(&mut t2);
        t2
    }

    /// The format in which the packers start.
    fn first_packed(&self) -> Format {
        if self.partial { Format::F32 } else { self.output }
    }

    fn writer(&self, p: &Plan) -> Asm {
        let mut nc = Asm::new();
        Noc::Write.init(&mut nc, self.banks);
        p.output.start(&mut nc, INPUTS);
        nc.li(Reg::S2, self.items_at());
        arg(&mut nc, Reg::S3, 0);
        arg(&mut nc, Reg::A4, OUTPUT);
        if self.shared {
            self.start_sending(&mut nc, p);
        }
        nc.count_down(Reg::S3, |a| {
            if self.shared {
                self.send(a, p);
            }
            a.add_const(Reg::S4, Reg::S2, 4 * self.outputs_at(), Reg::T0);
            a.repeat(Reg::S5, self.blocks() * self.stored().len() as u32, |a| {
                p.output.await_filled(a, INPUTS);
                a.lw(Reg::A3, Reg::S4, 0);
                a.addi(Reg::S4, Reg::S4, 4);
                write_slot(a, p.output, INPUTS, Reg::A3, Reg::A4);
            });
            a.add_const(Reg::S2, Reg::S2, 4 * self.item_words(), Reg::T0);
        });
        Noc::Write.wait(&mut nc);
        if self.shared {
            self.stop_sending(&mut nc);
        }
        nc
    }
}
