//! Element by element: up to four tiles into Dst bit by bit, a program of the vector unit, one tile out.

use super::math::{self, TILE_ROWS};
use super::noc::{Banks, F32_SHIFT, Noc, WRITE_SLOTS, write_slot};
use super::ring::{Cursor, Ring};
use super::{Kernel, L1Plan, arg, build, l1, pack, sfpu, unpack};
use crate::error::Fault;
use crate::layout::Format;
use crate::rv::{Asm, Reg};

/// What is computed from the input tiles.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum EltwiseOp {
    /// `x`, perhaps stored in another format.
    Copy,
    /// `gelu(x)`.
    Gelu,
    /// `silu(x)`.
    Silu,
    /// `gelu(gate) * up`.
    Geglu,
    /// `x + y`.
    Add,
    /// `x + scale * y`, the scale as bits.
    AddScaled(u32),
    /// `x + (y + z)`.
    AddBoth,
    /// `x + gate * y`.
    GatedAdd,
    /// `x * cos + turned * sin`.
    Rope,
}

impl EltwiseOp {
    /// Number of inputs.
    pub(crate) fn inputs(self) -> usize {
        match self {
            Self::Copy | Self::Gelu | Self::Silu => 1,
            Self::Geglu | Self::Add | Self::AddScaled(_) => 2,
            Self::AddBoth | Self::GatedAdd => 3,
            Self::Rope => 4,
        }
    }
}

/// The kernel of an operation. Arguments: number of items; base address of the output and of each input; then
/// for each item the tile index of the output and of each input.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Eltwise {
    pub(crate) op: EltwiseOp,
    /// How the result is stored.
    pub(crate) output: Format,
    pub(crate) banks: Banks,
}

const DEPTH: u32 = 4;

impl Eltwise {
    /// Words of arguments before the list, and for each item.
    pub(crate) fn arg_words(&self) -> (usize, usize) {
        (2 + self.op.inputs(), 1 + self.op.inputs())
    }

    pub(crate) fn build(&self, l1_bytes: u32) -> Result<Kernel, Fault> {
        let inputs = self.op.inputs() as u32;
        let (head, item) = self.arg_words();
        let (list, item) = (l1::ARGS + 4 * head as u32, 4 * item as i32);
        let mut plan = L1Plan::new(l1_bytes);
        let input = Ring::new(&mut plan, 0, inputs << F32_SHIFT, DEPTH);
        let output = Ring::new(&mut plan, 1, self.output.tile_bytes() as u32, WRITE_SLOTS);

        let c = Cursor { count: Reg::A2, addr: Reg::A0 };
        let mut b = Asm::new();
        Noc::Read.init(&mut b, self.banks);
        input.start(&mut b, c);
        b.li(Reg::S2, list);
        arg(&mut b, Reg::S3, 0);
        b.count_down(Reg::S3, |a| {
            input.reserve(a, c);
            a.mv(Reg::A1, c.addr);
            for i in 0..inputs {
                a.lw(Reg::A3, Reg::S2, 4 + 4 * i as i32);
                arg(a, Reg::A4, 2 + i);
                Noc::Read.tile(a, Reg::A3, Reg::A4, Reg::A1, F32_SHIFT);
                a.add_const(Reg::A1, Reg::A1, 1 << F32_SHIFT, Reg::T2);
            }
            Noc::Read.wait(a);
            input.publish(a, c);
            a.addi(Reg::S2, Reg::S2, item);
        });

        let mut t0 = Asm::new();
        unpack::init(&mut t0, Format::F32);
        unpack::target(&mut t0, unpack::Target::Dst);
        input.start(&mut t0, c);
        arg(&mut t0, Reg::S3, 0);
        t0.li(Reg::S4, 0);
        t0.count_down(Reg::S3, |a| {
            input.await_filled(a, c);
            math::await_fill(a);
            a.mv(Reg::A1, c.addr);
            for i in 0..inputs {
                a.addi(Reg::A3, Reg::S4, (i * TILE_ROWS) as i32);
                unpack::to_dst(a, Reg::A1, Reg::A3);
                a.add_const(Reg::A1, Reg::A1, 1 << F32_SHIFT, Reg::T2);
            }
            math::filled(a);
            unpack::sync(a);
            input.release(a, c);
            a.xori(Reg::S4, Reg::S4, math::HALF_ROWS as i32);
        });
        unpack::leave_dst(&mut t0, unpack::Target::IDLE);

        let mut t1 = Asm::new();
        math::init(&mut t1, self.output);
        sfpu::init(&mut t1);
        arg(&mut t1, Reg::S3, 0);
        t1.li(Reg::S4, 0);
        math::each_half(&mut t1, Reg::S3, Reg::S4, |a, half| {
            math::acquire(a);
            math::fill(a);
            let [x, y, z, w] = [0, 1, 2, 3].map(|i| half + i * TILE_ROWS);
            sfpu::run(a, |a| match self.op {
                EltwiseOp::Copy => {}
                EltwiseOp::Gelu => sfpu::gelu(a, x),
                EltwiseOp::Silu => sfpu::silu(a, x),
                EltwiseOp::Geglu => sfpu::geglu(a, x, y),
                EltwiseOp::Add => sfpu::add_tiles(a, x, y),
                EltwiseOp::AddScaled(bits) => sfpu::add_scaled(a, x, y, f32::from_bits(bits)),
                EltwiseOp::AddBoth => sfpu::add_both(a, x, y, z),
                EltwiseOp::GatedAdd => sfpu::gated_add(a, x, y, z),
                EltwiseOp::Rope => sfpu::rotate_pairs(a, x, y, z, w),
            });
            math::commit(a);
        });
        unpack::sync(&mut t1);

        let mut t2 = Asm::new();
        pack::init(&mut t2, self.output);
        output.start(&mut t2, c);
        t2.li(Reg::S4, 0);
        arg(&mut t2, Reg::S3, 0);
        t2.count_down(Reg::S3, |a| pack::half(a, output, c, Reg::S4, &[0]));

        let nc = writer(self.banks, output, list, item);
        build(format!("{:?}", self.op), &plan, [Some(b), Some(t0), Some(t1), Some(t2), Some(nc)])
    }
}

/// Writes tile after tile of `ring` to the tile index at the start of each list item; argument 0 is the number
/// of items, argument 1 the output's base.
pub(super) fn writer(banks: Banks, ring: Ring, list: u32, item: i32) -> Asm {
    let c = Cursor { count: Reg::A2, addr: Reg::A0 };
    let mut nc = Asm::new();
    Noc::Write.init(&mut nc, banks);
    ring.start(&mut nc, c);
    nc.li(Reg::S2, list);
    arg(&mut nc, Reg::S3, 0);
    arg(&mut nc, Reg::A4, 1);
    nc.count_down(Reg::S3, |a| {
        ring.await_filled(a, c);
        a.lw(Reg::A3, Reg::S2, 0);
        write_slot(a, ring, c, Reg::A3, Reg::A4);
        a.addi(Reg::S2, Reg::S2, item);
    });
    Noc::Write.wait(&mut nc);
    nc
}
