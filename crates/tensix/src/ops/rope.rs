//! Rotary position embedding.

use pi0_device::{Error, OpKind, Result};

use super::failed;
use crate::device::Tensix;
use crate::kernels::EltwiseOp;
use crate::layout::{Format, TILE};
use crate::tensor::Tensor;

/// What tables of cosines and sines are made from.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Angles {
    positions: Vec<u32>,
    head_dim: usize,
    cols: usize,
    /// Whether the columns from the second head on do not turn; else the heads are alike.
    still: bool,
}

impl Tensix {
    pub(super) fn rope_op(&self, x: &Tensor, positions: &[u32], head_dim: usize) -> Result<Tensor> {
        let op = OpKind::Rope;
        if head_dim == 0 || !head_dim.is_multiple_of(2) || !x.cols.is_multiple_of(head_dim) {
            return Err(Error::shape(op, format!("{} columns in heads of {head_dim}", x.cols)));
        }
        if positions.len() != x.rows {
            return Err(Error::shape(op, format!("{} positions for {} rows", positions.len(), x.rows)));
        }
        let half = head_dim / 2;
        let y = self.tensor(x.rows, x.cols).map_err(failed(op))?;
        if half.is_multiple_of(TILE) {
            self.turn(op, x, positions, head_dim, x.cols, &y)?;
        } else {
            let angles = Angles { positions: positions.to_vec(), head_dim, cols: x.cols, still: false };
            let tables = self.angles.get(angles, |a| self.tables(a))?;
            let [cos, sin] = &*tables;
            let turned = self.gather(
                op,
                x.rows,
                x.cols,
                |r| (x, r),
                |c| Some(if c % head_dim < half { c + half } else { c - half }),
            )?;
            let bases = [x.base(), turned.base(), cos.base(), sin.base()];
            self.eltwise(op, EltwiseOp::Rope, &y, &bases, |r, c| {
                vec![x.tile(r, c), turned.tile(r, c), cos.tile(r, c), sin.tile(r, c)]
            })?;
        }
        Ok(y)
    }

    /// `x` as bf16, with its first `turning` columns turned, in heads that are pairs of whole tiles.
    pub(super) fn turned(
        &self,
        op: OpKind,
        x: &Tensor,
        positions: &[u32],
        head_dim: usize,
        turning: usize,
    ) -> Result<Tensor> {
        if positions.len() != x.rows {
            return Err(Error::shape(op, format!("{} positions for {} rows", positions.len(), x.rows)));
        }
        let y = self.tensor_of(x.rows, x.cols, Format::Bf16).map_err(failed(op))?;
        self.turn(op, x, positions, head_dim, turning, &y)?;
        Ok(y)
    }

    /// Turns the first `turning` columns of `x`, in heads whose halves are whole tiles, and takes the rest as it is.
    fn turn(
        &self,
        op: OpKind,
        x: &Tensor,
        positions: &[u32],
        head_dim: usize,
        turning: usize,
        y: &Tensor,
    ) -> Result<()> {
        // The other of each pair is half a head away: whole tiles. Behind the angles of a head are those of one that does
        // not turn.
        let angles = Angles { positions: positions.to_vec(), head_dim, cols: 2 * head_dim, still: true };
        let tables = self.angles.get(angles, |a| self.tables(a))?;
        let [cos, sin] = &*tables;
        let (width, half) = (head_dim / TILE, head_dim / 2 / TILE);
        self.eltwise(op, EltwiseOp::Rope, y, &[x.base(), x.base(), cos.base(), sin.base()], |r, c| {
            let at = c % width;
            let other = if at < half { c + half } else { c - half };
            let angle = if c * TILE < turning { at } else { width + at };
            vec![x.tile(r, c), x.tile(r, other), cos.tile(r, angle), sin.tile(r, angle)]
        })
    }

    /// Cosines, and sines with the sign of the other of each pair, `[rows, cols]`.
    fn tables(&self, angles: &Angles) -> Result<[Tensor; 2]> {
        let Angles { ref positions, head_dim, cols, still } = *angles;
        let half = head_dim / 2;
        let rates: Vec<f32> = (0..half).map(|i| 10000f32.powf(-2.0 * i as f32 / head_dim as f32)).collect();
        let (mut cos, mut sin) = (Vec::new(), Vec::new());
        for &p in positions {
            for c in 0..cols {
                let i = c % head_dim;
                let angle = if still && c >= head_dim { 0.0 } else { p as f32 * rates[i % half] };
                cos.push(angle.cos());
                sin.push(if i < half { -angle.sin() } else { angle.sin() });
            }
        }
        let put = |data: &[f32]| self.put(positions.len(), cols, data).map_err(failed(OpKind::Rope));
        Ok([put(&cos)?, put(&sin)?])
    }
}
