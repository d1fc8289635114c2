//! The reader of a product: residuals once, then tiles of x and of the weight, a chunk of inputs at a time.

use super::{
    DEPTH, EXPONENTS, F32_BYTES, INPUTS, MAGIC, Matmul, ONES, PITCH, Plan, RESIDUAL, RESIDUALS, SPAN, WEIGHT,
    X,
};
use crate::kernels::arg;
use crate::kernels::noc::{F32_SHIFT, Noc};
use crate::layout::{EXPONENT_BYTES, Format};
use crate::rv::{Asm, Reg};

impl Matmul {
    pub(super) fn reader(&self, p: &Plan) -> Asm {
        let mut b = Asm::new();
        Noc::Read.init(&mut b, self.banks);
        p.inputs.start(&mut b, INPUTS);
        p.sums.start(&mut b, RESIDUALS);
        if self.shared {
            Noc::Read.start_signals(&mut b);
        }
        b.li(Reg::S2, self.items_at());
        arg(&mut b, Reg::S3, 0);
        b.count_down(Reg::S3, |a| {
            if self.residual() {
                self.read_residual(a, p);
            }
            a.lw(Reg::S6, Reg::S2, 0);
            arg(a, Reg::S4, DEPTH);
            let chunk = a.here();
            self.chunk_size(a, Reg::S5, Reg::S4);
            p.inputs.reserve(a, INPUTS);
            if self.shared {
                self.read_or_receive(a);
            } else {
                self.read_x(a);
                self.read_weight(a);
                Noc::Read.wait(a);
            }
            p.inputs.publish(a, INPUTS);
            a.add(Reg::S6, Reg::S6, Reg::S5);
            a.sub(Reg::S4, Reg::S4, Reg::S5);
            a.bne(Reg::S4, Reg::Zero, chunk);
            a.add_const(Reg::S2, Reg::S2, 4 * self.item_words(), Reg::T0);
        });
        if self.shared {
            self.await_signals(&mut b);
        }
        b
    }

    fn read_residual(&self, a: &mut Asm, p: &Plan) {
        p.sums.reserve(a, RESIDUALS);
        a.mv(Reg::A1, RESIDUALS.addr);
        arg(a, Reg::A4, RESIDUAL);
        a.add_const(Reg::Gp, Reg::S2, 4 * self.residuals_at(), Reg::T0);
        a.repeat(Reg::S11, self.blocks() * self.tiles(), |a| {
            a.lw(Reg::A3, Reg::Gp, 0);
            a.addi(Reg::Gp, Reg::Gp, 4);
            Noc::Read.tile(a, Reg::A3, Reg::A4, Reg::A1, F32_SHIFT);
            a.add_const(Reg::A1, Reg::A1, F32_BYTES, Reg::T5);
        });
        Noc::Read.wait(a);
        p.sums.publish(a, RESIDUALS);
    }

    /// Reads `s5` tiles along the inputs of every row of x, from tile `s6`: for each row of blocks, for each
    /// place along the inputs, the block's rows.
    pub(super) fn read_x(&self, a: &mut Asm) {
        a.mv(Reg::Gp, INPUTS.addr);
        a.mv(Reg::Tp, Reg::S6);
        arg(a, Reg::T6, PITCH);
        a.repeat(Reg::S7, self.panel_rows / self.rows, |a| {
            a.mv(Reg::A1, Reg::Gp);
            a.mv(Reg::T3, Reg::Tp);
            a.mv(Reg::S11, Reg::S5);
            a.count_down(Reg::S11, |a| {
                a.mv(Reg::A3, Reg::T3);
                arg(a, Reg::A4, X);
                a.mv(Reg::T4, Reg::T6);
                if self.bias {
                    // The last place of the last chunk.
                    let inside = a.label();
                    a.bne(Reg::S4, Reg::S5, inside);
                    a.addi(Reg::T5, Reg::S11, -1);
                    a.bne(Reg::T5, Reg::Zero, inside);
                    arg(a, Reg::A4, ONES);
                    a.li(Reg::A3, 0);
                    a.li(Reg::T4, 0);
                    a.bind(inside);
                }
                for _ in 0..self.rows {
                    Noc::Read.tile(a, Reg::A3, Reg::A4, Reg::A1, self.x_shift());
                    a.add(Reg::A3, Reg::A3, Reg::T4);
                    a.add_const(Reg::A1, Reg::A1, 1 << self.x_shift(), Reg::T5);
                }
                a.addi(Reg::T3, Reg::T3, 1);
            });
            (0..self.rows).for_each(|_| a.add(Reg::Tp, Reg::Tp, Reg::T6));
            a.add_const(Reg::Gp, Reg::Gp, self.x_block_bytes(), Reg::T5);
        });
    }

    /// The same for the columns of the weight, at the same places.
    pub(super) fn read_weight(&self, a: &mut Asm) {
        Noc::Read.enter_blocks(a, SPAN, MAGIC);
        a.add_const(Reg::Gp, INPUTS.addr, self.x_bytes(), Reg::T5);
        a.addi(Reg::Tp, Reg::S2, 4);
        arg(a, Reg::A4, WEIGHT);
        let bfp8 = self.weight == Format::Bfp8;
        if bfp8 {
            arg(a, Reg::T6, EXPONENTS);
        }
        a.repeat(Reg::S7, self.panel_cols / self.cols, |a| {
            a.add_const(Reg::A1, Reg::Gp, self.exponent_bytes(), Reg::T5);
            a.mv(Reg::T4, Reg::Gp);
            arg(a, Reg::T3, DEPTH);
            a.sub(Reg::T3, Reg::T3, Reg::S4);
            a.mv(Reg::S11, Reg::S5);
            a.count_down(Reg::S11, |a| {
                for col in 0..self.cols {
                    a.lw(Reg::A3, Reg::Tp, 4 * col as i32);
                    a.add(Reg::A3, Reg::A3, Reg::T3);
                    Noc::Read.block_tile(a, Reg::A3, Reg::A4, Reg::A1, self.weight_shift());
                    a.add_const(Reg::A1, Reg::A1, 1 << self.weight_shift(), Reg::T5);
                    if bfp8 {
                        Noc::Read.block_tile(a, Reg::A3, Reg::T6, Reg::T4, EXPONENT_BYTES.ilog2());
                        a.addi(Reg::T4, Reg::T4, EXPONENT_BYTES as i32);
                    }
                }
                a.addi(Reg::T3, Reg::T3, 1);
            });
            a.addi(Reg::Tp, Reg::Tp, 4 * self.cols as i32);
            a.add_const(Reg::Gp, Reg::Gp, self.weight_block_bytes(), Reg::T5);
        });
        Noc::Read.leave_blocks(a, self.banks);
    }
}
