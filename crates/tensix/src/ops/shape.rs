//! Operations that move rows and columns: views where tiles allow, else gathered bit by bit.

use std::ops::Range;

use pi0_device::{Error, OpKind, Result};

use super::failed;
use crate::device::{Key, Tensix};
use crate::kernels::{Columns, Gather, RowSource};
use crate::layout::TILE;
use crate::tensor::Tensor;

impl Tensix {
    /// A tensor of `rows` and `cols` whose row `r` is row `source(r)` of a tensor, with its columns chosen by
    /// `column` (none: zero).
    pub(super) fn gather<'a>(
        &self,
        op: OpKind,
        rows: usize,
        cols: usize,
        source: impl Fn(usize) -> (&'a Tensor, usize),
        column: impl Fn(usize) -> Option<usize>,
    ) -> Result<Tensor> {
        let y = self.tensor(rows, cols).map_err(failed(op))?;
        let straight = (0..cols).all(|c| column(c) == Some(c));
        let (mut whole, mut pieces) = (Vec::new(), Vec::new());
        for r in 0..y.tile_rows() {
            // Rows beyond the last repeat it: what fills a tile must only be finite.
            let of = |i: usize| source((r * TILE + i).min(rows - 1));
            let (first, start) = of(0);
            let aligned = straight
                && start.is_multiple_of(TILE)
                && (1..TILE.min(rows - r * TILE)).all(|i| {
                    let (tensor, row) = of(i);
                    tensor.base() == first.base() && tensor.first == first.first && row == start + i
                });
            if aligned {
                for c in 0..y.tile_cols() {
                    let tile = first.tile(start / TILE, c);
                    whole.push(Gather::whole_item(y.tile(r, c), first.base(), tile));
                }
                continue;
            }
            let sources: [RowSource; TILE] = std::array::from_fn(|i| {
                let (tensor, row) = of(i);
                RowSource { base: tensor.base(), tile: tensor.tile(row / TILE, 0), row: row % TILE }
            });
            for c in 0..y.tile_cols() {
                let columns: Columns = std::array::from_fn(|i| {
                    let at = c * TILE + i;
                    if at < cols { column(at) } else { None }
                });
                let item = Gather::item(y.tile(r, c), &sources, &columns).ok_or_else(|| {
                    Error::unsupported(super::NAME, op, "columns of a tile come from too many places")
                })?;
                pieces.push(item);
            }
        }
        for (whole, items) in [(true, whole), (false, pieces)] {
            let key = Gather { whole, banks: self.banks };
            self.run(Key::Gather(key), &[y.base()], &items).map_err(failed(op))?;
        }
        Ok(y)
    }

    /// `x` repeated until it has `rows` rows.
    pub(super) fn repeat_rows(&self, op: OpKind, x: &Tensor, rows: usize) -> Result<Tensor> {
        self.gather(op, rows, x.cols, |r| (x, r % x.rows), Some)
    }

    pub(super) fn concat_rows_op(&self, parts: &[&Tensor]) -> Result<Tensor> {
        let op = OpKind::ConcatRows;
        let Some((first, rest)) = parts.split_first() else {
            return Err(Error::shape(op, "no parts"));
        };
        if let Some(other) = rest.iter().find(|p| p.cols != first.cols) {
            return Err(Error::shape(op, format!("{} columns and {}", first.cols, other.cols)));
        }
        if rest.is_empty() {
            return Ok((*first).clone());
        }
        let rows: Vec<(usize, usize)> =
            parts.iter().enumerate().flat_map(|(i, p)| (0..p.rows).map(move |r| (i, r))).collect();
        self.gather(op, rows.len(), first.cols, |r| (parts[rows[r].0], rows[r].1), Some)
    }

    pub(super) fn slice_rows_op(&self, x: &Tensor, range: Range<usize>) -> Result<Tensor> {
        let op = OpKind::SliceRows;
        if range.is_empty() || range.end > x.rows {
            return Err(Error::shape(op, format!("rows {range:?} of {}", x.rows)));
        }
        if x.heads.is_none() && range.start.is_multiple_of(TILE) {
            return Ok(x.view(range.start, 0, range.len(), x.cols));
        }
        let x = &*self.plain(op, x)?;
        self.gather(op, range.len(), x.cols, |r| (x, range.start + r), Some)
    }

    pub(super) fn slice_cols_op(&self, x: &Tensor, range: Range<usize>) -> Result<Tensor> {
        let op = OpKind::SliceCols;
        if range.is_empty() || range.end > x.cols {
            return Err(Error::shape(op, format!("columns {range:?} of {}", x.cols)));
        }
        // A view must not have other columns in its last tile: they would not be zero.
        let whole =
            range.start.is_multiple_of(TILE) && (range.end.is_multiple_of(TILE) || range.end == x.cols);
        if x.heads.is_none() && whole {
            return Ok(x.view(0, range.start, x.rows, range.len()));
        }
        let x = &*self.plain(op, x)?;
        self.gather(op, x.rows, range.len(), |r| (x, r), |c| Some(range.start + c))
    }
}
