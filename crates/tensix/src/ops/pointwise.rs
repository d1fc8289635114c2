//! Operations element by element.

use pi0_device::{Error, OpKind, Result};

use super::failed;
use crate::device::{Key, Tensix};
use crate::kernels::{Eltwise, EltwiseOp};
use crate::layout::TILE;
use crate::tensor::Tensor;

impl Tensix {
    /// Runs `operation` on a list of output tiles (row, column), with the base address of each input and the
    /// input tiles that `inputs` gives for an output tile.
    pub(super) fn eltwise(
        &self,
        op: OpKind,
        operation: EltwiseOp,
        y: &Tensor,
        bases: &[u32],
        inputs: impl Fn(usize, usize) -> Vec<u32>,
    ) -> Result<()> {
        let mut head = vec![y.base()];
        head.extend(bases);
        let columns = y.tile_cols();
        let items: Vec<Vec<u32>> = (0..y.tile_rows() * columns)
            .map(|i| {
                let (r, c) = (i / columns, i % columns);
                let mut item = vec![y.tile(r, c)];
                item.extend(inputs(r, c));
                item
            })
            .collect();
        let key = Eltwise { op: operation, output: y.format, banks: self.banks };
        self.run(Key::Eltwise(key), &head, &items).map_err(failed(op))
    }

    pub(super) fn unary(&self, op: OpKind, operation: EltwiseOp, x: &Tensor) -> Result<Tensor> {
        let y = self.tensor(x.rows, x.cols).map_err(failed(op))?;
        self.eltwise(op, operation, &y, &[x.base()], |r, c| vec![x.tile(r, c)])?;
        Ok(y)
    }

    pub(super) fn geglu_op(&self, x: &Tensor) -> Result<Tensor> {
        let op = OpKind::Geglu;
        if !x.cols.is_multiple_of(2) {
            return Err(Error::shape(op, format!("{} columns have no halves", x.cols)));
        }
        let half = x.cols / 2;
        let up = self.slice_cols_op(x, half..x.cols)?;
        let y = self.tensor(x.rows, half).map_err(failed(op))?;
        // Where the left half ends inside a tile, that tile goes on with columns of the right half; there the
        // padding of `up` is zero, and so is the product.
        self.eltwise(op, EltwiseOp::Geglu, &y, &[x.base(), up.base()], |r, c| {
            vec![x.tile(r, c), up.tile(r, c)]
        })?;
        Ok(y)
    }

    pub(super) fn add_op(&self, x: &Tensor, y: &Tensor) -> Result<Tensor> {
        let op = OpKind::Add;
        if x.cols != y.cols || y.rows == 0 || !x.rows.is_multiple_of(y.rows) {
            let what = format!("{}x{} and {}x{}", x.rows, x.cols, y.rows, y.cols);
            return Err(Error::shape(op, what));
        }
        let repeated;
        let y = if x.rows == y.rows || y.rows.is_multiple_of(TILE) {
            y
        } else {
            repeated = self.repeat_rows(op, y, x.rows)?;
            &repeated
        };
        let z = self.tensor(x.rows, x.cols).map_err(failed(op))?;
        let period = y.tile_rows();
        self.eltwise(op, EltwiseOp::Add, &z, &[x.base(), y.base()], |r, c| {
            vec![x.tile(r, c), y.tile(r % period, c)]
        })?;
        Ok(z)
    }

    pub(super) fn add_scaled_op(&self, x: &Tensor, y: &Tensor, scale: f32) -> Result<Tensor> {
        let op = OpKind::AddScaled;
        if (x.rows, x.cols) != (y.rows, y.cols) {
            let what = format!("{}x{} and {}x{}", x.rows, x.cols, y.rows, y.cols);
            return Err(Error::shape(op, what));
        }
        let z = self.tensor(x.rows, x.cols).map_err(failed(op))?;
        let operation = EltwiseOp::AddScaled(scale.to_bits());
        self.eltwise(op, operation, &z, &[x.base(), y.base()], |r, c| vec![x.tile(r, c), y.tile(r, c)])?;
        Ok(z)
    }
}
