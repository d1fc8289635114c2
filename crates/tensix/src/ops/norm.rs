//! Norms, and what drives the adaptive ones.

use std::sync::Arc;

use pi0_device::{ADA_EPS, Error, Modulation, NormKind, OpKind, Result, operands};

use super::{failed, wrong_weight};
use crate::device::{Key, Tensix};
use crate::kernels::{EltwiseOp, NormForm, NormKernel};
use crate::layout::{Format, TILE};
use crate::perf::{self, Machine};
use crate::tensor::{Tensor, Weight, WeightKind};

/// Which columns of a table of modulations.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    Scale,
    Shift,
    Gate,
}

/// What a row of tiles whose 32 rows are equal was made of: a part of a row of a table. Holds on to the table, so that
/// another one never has its place.
#[derive(Debug)]
pub(crate) struct Modulated {
    table: Tensor,
    row: u32,
    part: Part,
}

impl PartialEq for Modulated {
    fn eq(&self, other: &Self) -> bool {
        let place = |m: &Self| (m.row, m.part, m.table.first, m.table.pitch, m.table.cols);
        place(self) == place(other) && Arc::ptr_eq(&self.table.region, &other.table.region)
    }
}

/// A part of the modulations of an activation's rows.
struct Rows {
    tensor: Tensor,
    /// One row of tiles serves all.
    shared: bool,
}

impl Rows {
    /// Index of the tile for a row and column of tiles of the activation.
    fn tile(&self, row: usize, col: usize) -> u32 {
        self.tensor.tile(if self.shared { 0 } else { row }, col)
    }
}

impl Tensix {
    pub(super) fn norm(
        &self,
        op: OpKind,
        wanted: NormKind,
        x: &Tensor,
        weight: &Weight,
        output: Format,
    ) -> Result<Tensor> {
        let WeightKind::Norm { kind, width, eps, scale, bias } = &weight.kind else {
            return Err(wrong_weight(op, weight));
        };
        if *kind != wanted {
            return Err(wrong_weight(op, weight));
        }
        if *width != x.cols {
            return Err(Error::shape(op, format!("{} columns, a weight of {width}", x.cols)));
        }
        let form = if wanted == NormKind::Layer { NormForm::Layer } else { NormForm::Rms };
        let affine = [scale.base(), bias.as_ref().map_or(0, |b| b.base())];
        let key = NormKernel {
            width: *width as u32,
            eps: eps.to_bits(),
            form,
            parts: 1,
            output,
            banks: self.banks,
        };
        self.run_norm(op, key, x, affine, |_| 0)
    }

    pub(super) fn ada_rms_norm_op(
        &self,
        op: OpKind,
        x: &Tensor,
        by: &Modulation<'_, Tensor>,
        output: Format,
    ) -> Result<Tensor> {
        operands::modulation(op, [x.rows, x.cols], [by.table.rows, by.table.cols], by.rows)?;
        let [scale, shift] = [Part::Scale, Part::Shift].map(|part| self.modulation(op, by, part));
        let (scale, shift) = (scale?, shift?);
        let affine = [scale.tensor.base(), shift.tensor.base()];
        let (width, eps) = (x.cols as u32, ADA_EPS.to_bits());
        let key = NormKernel { width, eps, form: NormForm::Ada, parts: 1, output, banks: self.banks };
        self.run_norm(op, key, x, affine, |r| scale.tile(r, 0))
    }

    /// `x + gate * y`.
    pub(super) fn gated_add_op(
        &self,
        op: OpKind,
        x: &Tensor,
        y: &Tensor,
        by: &Modulation<'_, Tensor>,
    ) -> Result<Tensor> {
        operands::gated_add([x.rows, x.cols], [y.rows, y.cols], [by.table.rows, by.table.cols], by.rows)?;
        let gate = self.modulation(op, by, Part::Gate)?;
        let z = self.tensor(x.rows, x.cols).map_err(failed(op))?;
        let bases = [x.base(), y.base(), gate.tensor.base()];
        self.eltwise(op, EltwiseOp::GatedAdd, &z, &bases, |r, c| {
            vec![x.tile(r, c), y.tile(r, c), gate.tile(r, c)]
        })?;
        Ok(z)
    }

    /// Runs the kernel; `affine` are the base addresses of scale and bias, `row` the first tile of both for a row of
    /// tiles.
    fn run_norm(
        &self,
        op: OpKind,
        key: NormKernel,
        x: &Tensor,
        affine: [u32; 2],
        row: impl Fn(usize) -> u32,
    ) -> Result<Tensor> {
        let y = self.tensor_of(x.rows, x.cols, key.output).map_err(failed(op))?;
        let head = [y.base(), x.base(), affine[0], affine[1]];
        let (rows, cols) = (x.tile_rows(), x.tile_cols());
        let parts = perf::norm_parts(&Machine::on_grid(self.grid()), rows, cols, key.form, key.output);
        let parted = NormKernel { parts: parts as u32, ..key };
        let key = if parted.resident(self.l1_room()) { parted } else { key };
        let columns = cols / key.parts as usize;
        let item = |r: usize, c: usize| {
            let before = (c * Format::F32.tile_bytes()) as u32;
            vec![y.tile(r, c), x.tile(r, 0), row(r) + c as u32, before]
        };
        let parts = (0..cols).step_by(columns);
        let items: Vec<_> = (0..rows).flat_map(|r| parts.clone().map(move |c| (r, c))).collect();
        let items: Vec<_> = items.into_iter().map(|(r, c)| item(r, c)).collect();
        self.run(Key::Norm(key), &head, &items).map_err(failed(op))?;
        Ok(y)
    }

    /// A part of the modulations of every row. Where all rows take the same one, as the robots of a batch do in a
    /// denoising step, it is made once and kept.
    fn modulation(&self, op: OpKind, by: &Modulation<'_, Tensor>, part: Part) -> Result<Rows> {
        let (table, width) = (&*self.plain(op, by.table)?, by.table.cols / 3);
        let column = |c: usize| Some(part as usize * width + c);
        let (&first, rest) = by.rows.split_first().ok_or_else(|| Error::shape(op, "no rows"))?;
        if rest.iter().all(|&row| row == first) {
            let key = Modulated { table: table.clone(), row: first, part };
            let made = self
                .modulations
                .get(key, |key| self.gather(op, TILE, width, |_| (table, key.row as usize), column))?;
            return Ok(Rows { tensor: (*made).clone(), shared: true });
        }
        let tensor = self.gather(op, by.rows.len(), width, |r| (table, by.rows[r] as usize), column)?;
        Ok(Rows { tensor, shared: false })
    }
}
