//! Element by element, and rows below each other.

use std::sync::Arc;

use pi0_device::{Modulation, OpKind, flops};

use super::{EACH, Op, folded};
use crate::device::{State, Vulkan};
use crate::error::Result;
use crate::kernels::Kernel;
use crate::memory::Region;
use crate::tape::Builder;
use crate::tensor::{Tensor, Value};
use crate::weight::Table;

/// As the kernel numbers them.
const SUM: u32 = 3;
const GATED: u32 = 4;
const COPY: u32 = 5;
const SCATTER: u32 = 6;

impl Vulkan {
    /// GELU, SiLU or GEGLU.
    pub(crate) fn each(&self, s: &mut State, op: OpKind, x: &Tensor, cols: usize) -> Result<Tensor> {
        let number = match op {
            OpKind::Gelu => 0,
            OpKind::Silu => 1,
            _ => 2,
        };
        let mut key = s.key(Op::Each);
        s.tape.tensor(&mut key, x);
        key.words(&[number, cols as u32]);
        let [y] = s.call(key, |s| {
            let y = self.value(s, x.rows, cols)?;
            let flop = flops::pointwise(op, [x.rows, cols]);
            self.elements(s, number, x, None, [x.rows, cols], (&*y, 0), 0.0, flop)?;
            Ok([y])
        })?;
        Ok(Tensor::whole(y, x.rows, cols))
    }

    /// `x + scale * y`, the rows of `y` repeated.
    pub(crate) fn sum(&self, s: &mut State, x: &Tensor, y: &Tensor, scale: f32) -> Result<Tensor> {
        let mut key = s.key(Op::Sum);
        s.tape.tensor(&mut key, x);
        s.tape.tensor(&mut key, y);
        key.words(&[scale.to_bits()]);
        let [z] = s.call(key, |s| {
            let z = self.value(s, x.rows, x.cols)?;
            let flop = flops::pointwise(OpKind::AddScaled, [x.rows, x.cols]);
            self.elements(s, SUM, x, Some(y), [x.rows, x.cols], (&*z, 0), scale, flop)?;
            Ok([z])
        })?;
        Ok(Tensor::whole(z, x.rows, x.cols))
    }

    /// `x + gate * y`.
    pub(crate) fn gated_sum(
        &self,
        s: &mut State,
        x: &Tensor,
        y: &Tensor,
        by: &Modulation<'_, Tensor>,
    ) -> Result<Tensor> {
        let (rows, cols) = (x.rows, x.cols);
        let picked = s.integers(by.rows)?;
        let mut key = s.key(Op::GatedSum);
        for t in [x, y, by.table] {
            s.tape.tensor(&mut key, t);
        }
        s.tape.name(&mut key, &picked);
        let [z] = s.call(key, |s| {
            let z = self.value(s, rows, cols)?;
            if rows * cols == 0 {
                return Ok([z]);
            }
            let pipeline = s.pipeline(Kernel::Pointwise, &[GATED])?;
            let gate = by.table.offset + 2 * cols;
            let words =
                [rows, cols, x.offset, x.stride, y.offset, y.stride, rows, gate, by.table.stride, 0, cols];
            Builder::new(&mut s.tape, pipeline, folded((rows * cols).div_ceil(EACH)))
                .reads(x)?
                .reads(y)?
                .reads(by.table)?
                .reads_value(&picked)?
                .writes(&z)?
                .push(&words.map(|v| v as u32))
                .push(&[0])
                .shape([rows, cols, 0])
                .flop(flops::pointwise(OpKind::GatedAdd, [rows, cols]))
                .launch();
            Ok([z])
        })?;
        Ok(Tensor::whole(z, rows, cols))
    }

    pub(crate) fn below_each_other(&self, s: &mut State, parts: &[&Tensor]) -> Result<Tensor> {
        let (rows, cols) = (parts.iter().map(|p| p.rows).sum(), parts[0].cols);
        let mut key = s.key(Op::Copy);
        for x in parts {
            s.tape.tensor(&mut key, x);
        }
        let [z] = s.call(key, |s| {
            let z = self.value(s, rows, cols)?;
            let mut row = 0;
            for x in parts {
                self.elements(s, COPY, x, None, [x.rows, cols], (&*z, row * cols), 0.0, 0)?;
                row += x.rows;
            }
            Ok([z])
        })?;
        Ok(Tensor::whole(z, rows, cols))
    }

    /// Row `i` of `x` in the place of row `at[i]` of `to`: where it lies, if nothing else holds those values.
    pub(crate) fn stored(&self, s: &mut State, to: &mut Tensor, at: &[u32], x: &Tensor) -> Result<()> {
        let (rows, cols) = (x.rows, x.cols);
        if rows * cols == 0 {
            return Ok(());
        }
        if s.tape.is_shared(&to.value) {
            *to = self.below_each_other(s, &[&*to])?;
        }
        let picked = s.integers(at)?;
        let mut key = s.key(Op::Store);
        s.tape.tensor(&mut key, to);
        s.tape.name(&mut key, &picked);
        s.tape.tensor(&mut key, x);
        s.call(key, |s| {
            let pipeline = s.pipeline(Kernel::Pointwise, &[SCATTER])?;
            let words =
                [rows, cols, x.offset, x.stride, 0, 0, 1, 0, 0, to.offset, to.stride].map(|v| v as u32);
            Builder::new(&mut s.tape, pipeline, folded((rows * cols).div_ceil(EACH)))
                .reads(x)?
                .nothing()
                .nothing()
                .reads_value(&picked)?
                .writes(&to.value)?
                .push(&words)
                .push(&[0])
                .shape([rows, cols, 0])
                .moved(2 * 4 * (rows * cols) as u64)
                .launch();
            Ok([])
        })?;
        s.tape.changes(&to.value);
        Ok(())
    }

    /// Of each row the place of its largest value, the first of equals, and that value: `[rows, 2]`.
    pub(crate) fn largest_values(&self, s: &mut State, x: &Tensor) -> Result<Tensor> {
        let mut key = s.key(Op::Largest);
        s.tape.tensor(&mut key, x);
        let [y] = s.call(key, |s| {
            let y = self.value(s, x.rows, 2)?;
            let pipeline = s.pipeline(Kernel::Largest, &[])?;
            Builder::new(&mut s.tape, pipeline, folded(x.rows))
                .reads(x)?
                .writes(&y)?
                .push(&[x.rows, x.cols, x.offset, x.stride].map(|v| v as u32))
                .shape([x.rows, x.cols, 0])
                .flop((x.rows * x.cols) as u64)
                .launch();
            Ok([y])
        })?;
        Ok(Tensor::whole(y, x.rows, 2))
    }

    /// Launches what goes element by element, within a call, into `z` of as many columns, from its element `at` on.
    #[allow(clippy::too_many_arguments)]
    fn elements(
        &self,
        s: &mut State,
        number: u32,
        x: &Tensor,
        y: Option<&Tensor>,
        [rows, cols]: [usize; 2],
        (z, at): (&Value, usize),
        scale: f32,
        flop: u64,
    ) -> Result<()> {
        if rows * cols == 0 {
            return Ok(());
        }
        let pipeline = s.pipeline(Kernel::Pointwise, &[number])?;
        let mut b = Builder::new(&mut s.tape, pipeline, folded((rows * cols).div_ceil(EACH))).reads(x)?;
        b = match y {
            Some(y) => b.reads(y)?,
            None => b.nothing(),
        };
        let (y_offset, y_stride, y_rows) = y.map_or((0, 0, 1), |y| (y.offset, y.stride, y.rows));
        let words =
            [rows, cols, x.offset, x.stride, y_offset, y_stride, y_rows, 0, 0, at, cols].map(|v| v as u32);
        b.nothing()
            .nothing()
            .writes(z)?
            .push(&words)
            .push(&[scale.to_bits()])
            .shape([rows, cols, 0])
            .flop(flop)
            .launch();
        Ok(())
    }

    pub(crate) fn embed_on_device(
        &self,
        s: &mut State,
        table: &Table,
        region: &Arc<Region>,
        ids: &[u32],
        scale: f32,
    ) -> Result<Tensor> {
        let (rows, cols) = (ids.len(), table.source.cols());
        let picked = s.integers(ids)?;
        let mut key = s.key(Op::Embed);
        key.region(region);
        s.tape.name(&mut key, &picked);
        key.sizes([rows]);
        key.words(&[scale.to_bits()]);
        let [y] = s.call(key, |s| {
            let y = self.value(s, rows, cols)?;
            if rows * cols > 0 {
                let pipeline = s.pipeline(Kernel::Embed, &[table.stored as u32])?;
                Builder::new(&mut s.tape, pipeline, folded((rows * cols).div_ceil(EACH)))
                    .reads_region(region)
                    .reads_value(&picked)?
                    .writes(&y)?
                    .push(&[rows as u32, cols as u32, scale.to_bits()])
                    .shape([rows, cols, 0])
                    .flop((rows * cols) as u64)
                    .moved((rows * cols * (4 + table.stored.bytes())) as u64)
                    .launch();
            }
            Ok([y])
        })?;
        Ok(Tensor::whole(y, rows, cols))
    }
}
