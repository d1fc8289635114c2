//! Layer norm, RMS norm and its adaptive form: a row of tiles stays in L1 while its statistics are taken, in f32, and applied. One
//! that is too wide for that is read again for each pass, tile by tile; the arithmetic and its order are the same.
//!
//! Where there are fewer rows than cores, several cores take the statistics of a whole row, each for itself, and apply them
//! to a part of it.

use super::math::{self, HALF_ROWS, TILE_ROWS};
use super::noc::{Banks, F32_SHIFT, Noc, WRITE_SLOTS, write_slot};
use super::ring::{Cursor, Ring};
use super::{Kernel, L1Plan, arg, build, l1, pack, sfpu, unpack};
use crate::error::Fault;
use crate::layout::{Format, TILE, tiles};
use crate::rv::{Asm, Reg};

/// Which norm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum NormForm {
    /// `(x - mean) / deviation * scale + bias`, scale and bias the same for all rows.
    Layer,
    /// `x / root mean square * scale`.
    Rms,
    /// `x / root mean square * (1 + scale) + bias`; each row of tiles has its own scale and bias.
    Ada,
}

impl NormForm {
    /// Whether the mean is taken out: one more pass over the row.
    pub(crate) fn centered(self) -> bool {
        self == NormForm::Layer
    }

    /// Tiles of scale and bias at each column.
    pub(crate) fn affine(self) -> u32 {
        if self == NormForm::Rms { 1 } else { 2 }
    }

    fn name(self) -> &'static str {
        match self {
            NormForm::Layer => "layer",
            NormForm::Rms => "rms",
            NormForm::Ada => "adaptive rms",
        }
    }
}

/// The kernel. Arguments: number of items; base addresses of output, x, scale and bias; then for each item, a row of tiles or
/// a part of one, the first tile of the output, of the row of x, and of scale and bias, and the bytes of the row before the
/// part.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct NormKernel {
    /// Columns.
    pub(crate) width: u32,
    /// `eps`, as bits.
    pub(crate) eps: u32,
    pub(crate) form: NormForm,
    /// Parts of a row, which divide its columns of tiles.
    pub(crate) parts: u32,
    /// How the result is stored: as bf16 where only a linear layer with such weights reads it.
    pub(crate) output: Format,
    pub(crate) banks: Banks,
}

const HEAD: u32 = 5;
const ITEM: i32 = 16;
/// Where an item says how far into the row its part is.
const PART: i32 = 12;

/// The statistics' tile, and the tile they are taken from: slots of Dst that are never stored.
const STATS: u32 = 3 * TILE_ROWS;
const WORK: u32 = HALF_ROWS + 3 * TILE_ROWS;

/// Slots of the ring through which a wide row streams.
const STREAM_DEPTH: u32 = 8;

const ROW: Cursor = Cursor { count: Reg::A2, addr: Reg::A0 };
const AFFINE: Cursor = Cursor { count: Reg::A6, addr: Reg::A5 };

/// How a row of tiles gets to the unpacker.
#[derive(Debug, Clone, Copy)]
enum Input {
    /// It stays in L1 for all passes, and scale and bias for all rows that share them.
    Resident { affine: Ring, row: Ring },
    /// Tile by tile, anew for each pass; in the last one with its tiles of scale and bias behind it.
    Streamed(Ring),
}

impl NormKernel {
    fn columns(&self) -> u32 {
        tiles(self.width as usize) as u32
    }

    /// Tiles of scale and bias at each column.
    fn affine(&self) -> u32 {
        self.form.affine()
    }

    /// Columns of tiles of an item's result.
    fn out_columns(&self) -> u32 {
        self.columns() / self.parts
    }

    /// Whether each item brings its own scale and bias.
    fn own_affine(&self) -> bool {
        self.form == NormForm::Ada || self.parts > 1
    }

    /// Whether a row stays in L1, as a row of which there are parts must.
    pub(crate) fn resident(&self, l1_room: u32) -> bool {
        let row = u64::from(self.columns()) << F32_SHIFT;
        let affine = u64::from(self.affine() * self.out_columns()) << F32_SHIFT;
        let output = u64::from(WRITE_SLOTS) * self.output.tile_bytes() as u64;
        row + affine + output + 64 <= u64::from(l1_room)
    }

    /// Passes that take statistics: one for the mean if centered, one for the squares.
    fn statistics(&self) -> u32 {
        1 + u32::from(self.form.centered())
    }

    pub(crate) fn build(&self, l1_bytes: u32) -> Result<Kernel, Fault> {
        let mut plan = L1Plan::new(l1_bytes);
        let output = Ring::new(&mut plan, 2, self.output.tile_bytes() as u32, WRITE_SLOTS);
        let row_bytes = u64::from(self.columns()) << F32_SHIFT;
        let affine_bytes = u64::from(self.affine() * self.out_columns()) << F32_SHIFT;
        // Rings begin at multiples of 64 bytes, and their tiles end there.
        let input = if affine_bytes + row_bytes <= u64::from(plan.left()) {
            let affine = Ring::new(&mut plan, 0, affine_bytes as u32, 1);
            // Two rows if they fit, so that the next is fetched during the current one.
            let depth = if u64::from(plan.left()) >= 2 * row_bytes { 2 } else { 1 };
            Input::Resident { affine, row: Ring::new(&mut plan, 1, row_bytes as u32, depth) }
        } else {
            Input::Streamed(Ring::new(&mut plan, 1, (1 + self.affine()) << F32_SHIFT, STREAM_DEPTH))
        };
        let (reader, unpacker) = match input {
            Input::Resident { affine, row } => (self.reader(affine, row), self.unpacker(affine, row)),
            Input::Streamed(ring) => (self.stream_reader(ring), self.stream_unpacker(ring)),
        };
        let programs = [reader, unpacker, self.math(), self.packer(output), self.writer(output)];
        build(format!("{} norm of {} columns", self.form.name(), self.width), &plan, programs.map(Some))
    }

    fn reader(&self, affine: Ring, row: Ring) -> Asm {
        let mut b = Asm::new();
        Noc::Read.init(&mut b, self.banks);
        affine.start(&mut b, AFFINE);
        row.start(&mut b, ROW);
        let fetch = |a: &mut Asm, columns: u32| {
            // Tiles from index `a3` of the tensor at `a4` to `a1`.
            a.repeat(Reg::S4, columns, |a| {
                Noc::Read.tile(a, Reg::A3, Reg::A4, Reg::A1, F32_SHIFT);
                a.addi(Reg::A3, Reg::A3, 1);
                a.add_const(Reg::A1, Reg::A1, 1 << F32_SHIFT, Reg::T5);
            });
        };
        let fetch_affine = |a: &mut Asm| {
            affine.reserve(a, AFFINE);
            a.mv(Reg::A1, AFFINE.addr);
            for i in 0..self.affine() {
                arg(a, Reg::A4, 3 + i);
                a.lw(Reg::A3, Reg::S2, 8);
                fetch(a, self.out_columns());
            }
            Noc::Read.wait(a);
            affine.publish(a, AFFINE);
        };
        b.li(Reg::S2, l1::ARGS + 4 * HEAD);
        arg(&mut b, Reg::S3, 0);
        if !self.own_affine() {
            fetch_affine(&mut b);
        }
        b.count_down(Reg::S3, |a| {
            if self.own_affine() {
                fetch_affine(a);
            }
            row.reserve(a, ROW);
            a.mv(Reg::A1, ROW.addr);
            a.lw(Reg::A3, Reg::S2, 4);
            arg(a, Reg::A4, 2);
            fetch(a, self.columns());
            Noc::Read.wait(a);
            row.publish(a, ROW);
            a.addi(Reg::S2, Reg::S2, ITEM);
        });
        b
    }

    fn unpacker(&self, affine: Ring, row: Ring) -> Asm {
        let mut t0 = Asm::new();
        unpack::init(&mut t0, Format::F32);
        unpack::target(&mut t0, unpack::Target::Dst);
        affine.start(&mut t0, AFFINE);
        row.start(&mut t0, ROW);
        if !self.own_affine() {
            affine.await_filled(&mut t0, AFFINE);
        }
        t0.li(Reg::S2, l1::ARGS + 4 * HEAD);
        t0.li(Reg::S6, 0);
        arg(&mut t0, Reg::S3, 0);
        t0.count_down(Reg::S3, |a| {
            if self.own_affine() {
                affine.await_filled(a, AFFINE);
            }
            row.await_filled(a, ROW);
            for _ in 0..self.statistics() {
                a.mv(Reg::A1, ROW.addr);
                a.repeat(Reg::S4, self.columns(), |a| {
                    math::await_fill(a);
                    a.li(Reg::A3, WORK);
                    unpack::to_dst(a, Reg::A1, Reg::A3);
                    math::filled(a);
                    a.add_const(Reg::A1, Reg::A1, 1 << F32_SHIFT, Reg::T2);
                });
            }
            a.lw(Reg::A1, Reg::S2, PART);
            a.add(Reg::A1, Reg::A1, ROW.addr);
            a.mv(Reg::A4, AFFINE.addr);
            a.repeat(Reg::S4, self.out_columns(), |a| {
                math::await_fill(a);
                a.mv(Reg::A3, Reg::S6);
                unpack::to_dst(a, Reg::A1, Reg::A3);
                a.mv(Reg::A7, Reg::A4);
                for i in 0..self.affine() {
                    a.addi(Reg::A3, Reg::S6, ((1 + i) * TILE_ROWS) as i32);
                    unpack::to_dst(a, Reg::A7, Reg::A3);
                    a.add_const(Reg::A7, Reg::A7, self.out_columns() << F32_SHIFT, Reg::T2);
                }
                math::filled(a);
                a.add_const(Reg::A1, Reg::A1, 1 << F32_SHIFT, Reg::T2);
                a.add_const(Reg::A4, Reg::A4, 1 << F32_SHIFT, Reg::T2);
                a.xori(Reg::S6, Reg::S6, HALF_ROWS as i32);
            });
            unpack::sync(a);
            row.release(a, ROW);
            if self.own_affine() {
                affine.release(a, AFFINE);
            }
            a.addi(Reg::S2, Reg::S2, ITEM);
        });
        unpack::leave_dst(&mut t0, unpack::Target::IDLE);
        t0
    }

    fn stream_reader(&self, ring: Ring) -> Asm {
        let mut b = Asm::new();
        Noc::Read.init(&mut b, self.banks);
        ring.start(&mut b, ROW);
        b.li(Reg::S2, l1::ARGS + 4 * HEAD);
        arg(&mut b, Reg::S3, 0);
        b.count_down(Reg::S3, |a| {
            for pass in 0..=self.statistics() {
                let with_affine = if pass == self.statistics() { self.affine() } else { 0 };
                a.lw(Reg::A3, Reg::S2, 4);
                a.lw(Reg::A6, Reg::S2, 8);
                a.repeat(Reg::S4, self.columns(), |a| {
                    ring.reserve(a, ROW);
                    arg(a, Reg::A4, 2);
                    Noc::Read.tile(a, Reg::A3, Reg::A4, ROW.addr, F32_SHIFT);
                    for i in 0..with_affine {
                        arg(a, Reg::A4, 3 + i);
                        a.add_const(Reg::A1, ROW.addr, (1 + i) << F32_SHIFT, Reg::T5);
                        Noc::Read.tile(a, Reg::A6, Reg::A4, Reg::A1, F32_SHIFT);
                    }
                    Noc::Read.wait(a);
                    ring.publish(a, ROW);
                    a.addi(Reg::A3, Reg::A3, 1);
                    a.addi(Reg::A6, Reg::A6, 1);
                });
            }
            a.addi(Reg::S2, Reg::S2, ITEM);
        });
        b
    }

    fn stream_unpacker(&self, ring: Ring) -> Asm {
        let mut t0 = Asm::new();
        unpack::init(&mut t0, Format::F32);
        unpack::target(&mut t0, unpack::Target::Dst);
        ring.start(&mut t0, ROW);
        t0.li(Reg::S6, 0);
        arg(&mut t0, Reg::S3, 0);
        t0.count_down(Reg::S3, |a| {
            for _ in 0..self.statistics() {
                a.repeat(Reg::S4, self.columns(), |a| {
                    ring.await_filled(a, ROW);
                    math::await_fill(a);
                    a.li(Reg::A3, WORK);
                    unpack::to_dst(a, ROW.addr, Reg::A3);
                    math::filled(a);
                    unpack::sync(a);
                    ring.release(a, ROW);
                });
            }
            a.repeat(Reg::S4, self.columns(), |a| {
                ring.await_filled(a, ROW);
                math::await_fill(a);
                a.mv(Reg::A3, Reg::S6);
                unpack::to_dst(a, ROW.addr, Reg::A3);
                for i in 1..=self.affine() {
                    a.add_const(Reg::A7, ROW.addr, i << F32_SHIFT, Reg::T2);
                    a.addi(Reg::A3, Reg::S6, (i * TILE_ROWS) as i32);
                    unpack::to_dst(a, Reg::A7, Reg::A3);
                }
                math::filled(a);
                unpack::sync(a);
                ring.release(a, ROW);
                a.xori(Reg::S6, Reg::S6, HALF_ROWS as i32);
            });
        });
        unpack::leave_dst(&mut t0, unpack::Target::IDLE);
        t0
    }

    fn math(&self) -> Asm {
        let padding = self.columns() * TILE as u32 - self.width;
        let mut t1 = Asm::new();
        math::init(&mut t1, self.output);
        sfpu::init(&mut t1);
        t1.li(Reg::S5, 0);
        arg(&mut t1, Reg::S3, 0);
        t1.count_down(Reg::S3, |a| {
            sfpu::run(a, |a| sfpu::stats_zero(a, STATS));
            let pass = |a: &mut Asm, sum: bool| {
                a.repeat(Reg::S4, self.columns(), |a| {
                    math::fill(a);
                    sfpu::run(a, |a| sfpu::stats_accumulate(a, WORK, STATS, sum));
                });
            };
            if self.form.centered() {
                pass(a, true);
                sfpu::run(a, |a| sfpu::stats_mean(a, STATS, self.width));
            }
            pass(a, false);
            let padding = if self.form.centered() { padding } else { 0 };
            let eps = f32::from_bits(self.eps);
            sfpu::run(a, |a| sfpu::stats_inverse_deviation(a, STATS, self.width, padding, eps));
            a.li(Reg::S4, self.out_columns());
            math::each_half(a, Reg::S4, Reg::S5, |a, half| {
                math::acquire(a);
                math::fill(a);
                sfpu::run(a, |a| {
                    sfpu::normalize(a, self.form, half, half + TILE_ROWS, half + 2 * TILE_ROWS, STATS)
                });
                math::commit(a);
            });
        });
        unpack::sync(&mut t1);
        t1
    }

    fn packer(&self, output: Ring) -> Asm {
        let mut t2 = Asm::new();
        pack::init(&mut t2, self.output);
        output.start(&mut t2, ROW);
        t2.li(Reg::S4, 0);
        arg(&mut t2, Reg::S3, 0);
        t2.count_down(Reg::S3, |a| {
            a.repeat(Reg::S5, self.out_columns(), |a| pack::half(a, output, ROW, Reg::S4, &[0]));
        });
        t2
    }

    fn writer(&self, output: Ring) -> Asm {
        let mut nc = Asm::new();
        Noc::Write.init(&mut nc, self.banks);
        output.start(&mut nc, ROW);
        nc.li(Reg::S2, l1::ARGS + 4 * HEAD);
        arg(&mut nc, Reg::S3, 0);
        arg(&mut nc, Reg::A4, 1);
        nc.count_down(Reg::S3, |a| {
            a.lw(Reg::A3, Reg::S2, 0);
            a.repeat(Reg::S4, self.out_columns(), |a| {
                output.await_filled(a, ROW);
                write_slot(a, output, ROW, Reg::A3, Reg::A4);
                a.addi(Reg::A3, Reg::A3, 1);
            });
            a.addi(Reg::S2, Reg::S2, ITEM);
        });
        Noc::Write.wait(&mut nc);
        nc
    }
}
