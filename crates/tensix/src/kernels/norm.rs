//! Layer norm and RMS norm: a row of tiles stays in L1 while its statistics are taken, in f32, and applied.

use super::math::{self, HALF_ROWS, TILE_ROWS};
use super::noc::{Banks, F32_SHIFT, Noc};
use super::ring::{Cursor, Ring};
use super::{Kernel, L1Plan, arg, build, l1, pack, sfpu, unpack};
use crate::error::Fault;
use crate::layout::{TILE, tiles};
use crate::rv::{Asm, Reg};

/// The kernel. Arguments: number of rows of tiles; base addresses of output, x, scale and bias; then for each
/// row of tiles the first tile of the output and of x.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct NormKernel {
    /// Columns.
    pub(crate) width: u32,
    /// `eps`, as bits.
    pub(crate) eps: u32,
    /// Layer norm: subtract the mean, add a bias.
    pub(crate) centered: bool,
    pub(crate) banks: Banks,
}

const HEAD: u32 = 5;
const ITEM: i32 = 8;

/// The statistics' tile, and the tile they are taken from: slots of Dst that are never stored.
const STATS: u32 = 3 * TILE_ROWS;
const WORK: u32 = HALF_ROWS + 3 * TILE_ROWS;

const ROW: Cursor = Cursor { count: Reg::A2, addr: Reg::A0 };
const AFFINE: Cursor = Cursor { count: Reg::A6, addr: Reg::A5 };

impl NormKernel {
    fn columns(&self) -> u32 {
        tiles(self.width as usize) as u32
    }

    /// Tiles of scale and bias at each column.
    fn affine(&self) -> u32 {
        1 + u32::from(self.centered)
    }

    pub(crate) fn build(&self, l1_bytes: u32) -> Result<Kernel, Fault> {
        let mut plan = L1Plan::new(l1_bytes);
        let row_bytes = self.columns() << F32_SHIFT;
        let affine = Ring::new(&mut plan, 0, self.affine() * row_bytes, 1);
        let output = Ring::new(&mut plan, 2, 1 << F32_SHIFT, 4);
        // Two rows if they fit, so that the next is fetched during the current one.
        let depth = if plan.left() >= 2 * row_bytes { 2 } else { 1 };
        let row = Ring::new(&mut plan, 1, row_bytes, depth);
        let programs = [
            self.reader(affine, row),
            self.unpacker(affine, row),
            self.math(),
            self.packer(output),
            self.writer(output),
        ];
        let kind = if self.centered { "layer" } else { "rms" };
        build(format!("{kind} norm of {} columns", self.width), &plan, programs.map(Some))
    }

    fn reader(&self, affine: Ring, row: Ring) -> Asm {
        let mut b = Asm::new();
        Noc::Read.init(&mut b, self.banks);
        affine.start(&mut b, AFFINE);
        row.start(&mut b, ROW);
        let fetch_row = |a: &mut Asm| {
            // Tiles from index `a3` of the tensor at `a4` to `a1`.
            a.repeat(Reg::S4, self.columns(), |a| {
                Noc::Read.tile(a, Reg::A3, Reg::A4, Reg::A1, F32_SHIFT);
                a.addi(Reg::A3, Reg::A3, 1);
                a.add_const(Reg::A1, Reg::A1, 1 << F32_SHIFT, Reg::T5);
            });
        };
        b.mv(Reg::A1, AFFINE.addr);
        for i in 0..self.affine() {
            arg(&mut b, Reg::A4, 3 + i);
            b.li(Reg::A3, 0);
            fetch_row(&mut b);
        }
        Noc::Read.wait(&mut b);
        affine.publish(&mut b, AFFINE);
        b.li(Reg::S2, l1::ARGS + 4 * HEAD);
        arg(&mut b, Reg::S3, 0);
        b.count_down(Reg::S3, |a| {
            row.reserve(a, ROW);
            a.mv(Reg::A1, ROW.addr);
            a.lw(Reg::A3, Reg::S2, 4);
            arg(a, Reg::A4, 2);
            fetch_row(a);
            Noc::Read.wait(a);
            row.publish(a, ROW);
            a.addi(Reg::S2, Reg::S2, ITEM);
        });
        b
    }

    fn unpacker(&self, affine: Ring, row: Ring) -> Asm {
        let mut t0 = Asm::new();
        unpack::init(&mut t0);
        unpack::target(&mut t0, unpack::Target::Dst);
        affine.start(&mut t0, AFFINE);
        row.start(&mut t0, ROW);
        affine.await_filled(&mut t0, AFFINE);
        t0.li(Reg::S6, 0);
        arg(&mut t0, Reg::S3, 0);
        t0.count_down(Reg::S3, |a| {
            row.await_filled(a, ROW);
            for _ in 0..self.affine() {
                // Statistics: a pass for the mean if centered, one for the squares.
                a.mv(Reg::A1, ROW.addr);
                a.repeat(Reg::S4, self.columns(), |a| {
                    math::await_fill(a);
                    a.li(Reg::A3, WORK);
                    unpack::to_dst(a, Reg::A1, Reg::A3);
                    math::filled(a);
                    a.add_const(Reg::A1, Reg::A1, 1 << F32_SHIFT, Reg::T2);
                });
            }
            a.mv(Reg::A1, ROW.addr);
            a.mv(Reg::A4, AFFINE.addr);
            a.repeat(Reg::S4, self.columns(), |a| {
                math::await_fill(a);
                a.mv(Reg::A3, Reg::S6);
                unpack::to_dst(a, Reg::A1, Reg::A3);
                a.mv(Reg::A7, Reg::A4);
                for i in 0..self.affine() {
                    a.addi(Reg::A3, Reg::S6, ((1 + i) * TILE_ROWS) as i32);
                    unpack::to_dst(a, Reg::A7, Reg::A3);
                    a.add_const(Reg::A7, Reg::A7, self.columns() << F32_SHIFT, Reg::T2);
                }
                math::filled(a);
                a.add_const(Reg::A1, Reg::A1, 1 << F32_SHIFT, Reg::T2);
                a.add_const(Reg::A4, Reg::A4, 1 << F32_SHIFT, Reg::T2);
                a.xori(Reg::S6, Reg::S6, HALF_ROWS as i32);
            });
            unpack::sync(a);
            row.release(a, ROW);
        });
        t0
    }

    fn math(&self) -> Asm {
        let padding = self.columns() * TILE as u32 - self.width;
        let mut t1 = Asm::new();
        math::init(&mut t1);
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
            if self.centered {
                pass(a, true);
                sfpu::run(a, |a| sfpu::stats_mean(a, STATS, self.width));
            }
            pass(a, false);
            let padding = if self.centered { padding } else { 0 };
            let eps = f32::from_bits(self.eps);
            sfpu::run(a, |a| sfpu::stats_inverse_deviation(a, STATS, self.width, padding, eps));
            a.li(Reg::S4, self.columns());
            math::each_half(a, Reg::S4, Reg::S5, |a, half| {
                math::acquire(a);
                math::fill(a);
                let bias = self.centered.then_some(half + 2 * TILE_ROWS);
                sfpu::run(a, |a| sfpu::normalize(a, half, half + TILE_ROWS, bias, STATS));
                math::commit(a);
            });
        });
        unpack::sync(&mut t1);
        t1
    }

    fn packer(&self, output: Ring) -> Asm {
        let mut t2 = Asm::new();
        pack::init(&mut t2);
        output.start(&mut t2, ROW);
        t2.li(Reg::S4, 0);
        arg(&mut t2, Reg::S3, 0);
        t2.count_down(Reg::S3, |a| {
            a.repeat(Reg::S5, self.columns(), |a| pack::half(a, output, ROW, Reg::S4, &[0]));
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
            a.repeat(Reg::S4, self.columns(), |a| {
                output.await_filled(a, ROW);
                Noc::Write.tile(a, Reg::A3, Reg::A4, ROW.addr, F32_SHIFT);
                Noc::Write.wait(a);
                output.release(a, ROW);
                a.addi(Reg::A3, Reg::A3, 1);
            });
            a.addi(Reg::S2, Reg::S2, ITEM);
        });
        nc
    }
}
