//! What operands must be to fit together: one check an operation, so that all devices refuse the same with the same
//! words. [`Attention::check`](crate::Attention::check) is the one for attention.

use std::ops::Range;

use crate::{Error, NormKind, OpKind, Result};

/// Rows and columns.
type Shape = [usize; 2];

fn must(holds: bool, op: OpKind, what: impl FnOnce() -> String) -> Result<()> {
    if holds { Ok(()) } else { Err(Error::shape(op, what())) }
}

/// As many values as the shape says.
pub fn upload([rows, cols]: Shape, values: usize) -> Result<()> {
    let fits = rows.checked_mul(cols) == Some(values);
    must(fits, OpKind::Upload, || format!("{values} values for [{rows}, {cols}]"))
}

/// Tokens that a table of `rows` has.
pub fn embed(ids: &[u32], rows: usize) -> Result<()> {
    match ids.iter().find(|&&id| id as usize >= rows) {
        Some(id) => Err(Error::shape(OpKind::Embed, format!("token {id} of a table of {rows}"))),
        None => Ok(()),
    }
}

/// As many columns as the layer has inputs.
pub fn linear(op: OpKind, [_, cols]: Shape, inputs: usize) -> Result<()> {
    must(cols == inputs, op, || format!("{cols} columns into a layer of {inputs} inputs"))
}

/// A weight of this norm, as wide as the rows.
pub fn norm(op: OpKind, [_, cols]: Shape, kind: NormKind, width: usize) -> Result<()> {
    let wanted = if op == OpKind::LayerNorm { NormKind::Layer } else { NormKind::Rms };
    must(kind == wanted, op, || format!("the weight belongs to a {kind:?} norm"))?;
    must(width == cols, op, || format!("{cols} columns, the weight has {width}"))
}

/// A table three times as wide as the rows, and one of its rows for each of them.
pub fn modulation(op: OpKind, [rows, cols]: Shape, table: Shape, picked: &[u32]) -> Result<()> {
    must(cols.checked_mul(3) == Some(table[1]), op, || {
        format!("{cols} columns, the table of modulations has {} (three times as many wanted)", table[1])
    })?;
    must(picked.len() == rows, op, || format!("{} rows of modulations named for {rows} rows", picked.len()))?;
    match picked.iter().find(|&&row| row as usize >= table[0]) {
        Some(row) => Err(Error::shape(op, format!("row {row} of a table of {} modulations", table[0]))),
        None => Ok(()),
    }
}

/// Equal shapes, and modulations that fit.
pub fn gated_add(x: Shape, y: Shape, table: Shape, picked: &[u32]) -> Result<()> {
    must(x == y, OpKind::GatedAdd, || format!("{x:?} and {y:?}"))?;
    modulation(OpKind::GatedAdd, x, table, picked)
}

/// Whole heads that can be halved, and a position a row.
pub fn rope([rows, cols]: Shape, positions: &[u32], head_dim: usize) -> Result<()> {
    let whole = head_dim > 0 && head_dim.is_multiple_of(2) && cols.is_multiple_of(head_dim);
    must(whole && positions.len() == rows, OpKind::Rope, || {
        format!("[{rows}, {cols}] in heads of {head_dim}, {} positions", positions.len())
    })
}

/// Two halves.
pub fn geglu([_, cols]: Shape) -> Result<()> {
    must(cols.is_multiple_of(2), OpKind::Geglu, || format!("{cols} columns cannot be halved"))
}

/// The rows of `y` repeat over those of `x`.
pub fn add(x: Shape, y: Shape) -> Result<()> {
    let fits = y[0] > 0 && x[1] == y[1] && x[0].is_multiple_of(y[0]);
    must(fits, OpKind::Add, || format!("{x:?} and {y:?}"))
}

/// Equal shapes.
pub fn add_scaled(x: Shape, y: Shape) -> Result<()> {
    must(x == y, OpKind::AddScaled, || format!("{x:?} and {y:?}"))
}

/// At least one part, all of one width.
pub fn concat_rows(parts: impl Iterator<Item = Shape> + Clone) -> Result<()> {
    let first = parts.clone().next();
    let fits = first.is_some_and(|first| parts.clone().all(|p| p[1] == first[1]));
    must(fits, OpKind::ConcatRows, || format!("{:?}", parts.collect::<Vec<_>>()))
}

/// A place among the rows of `to` for each row of `x`, in ascending order, and equal widths.
pub fn store_rows(to: Shape, at: &[u32], x: Shape) -> Result<()> {
    must(to[1] == x[1] && at.len() == x[0], OpKind::StoreRows, || {
        format!("{x:?} into {} places of {to:?}", at.len())
    })?;
    must(at.windows(2).all(|pair| pair[0] < pair[1]), OpKind::StoreRows, || {
        "places that do not ascend".into()
    })?;
    let fits = at.last().is_none_or(|&last| (last as usize) < to[0]);
    must(fits, OpKind::StoreRows, || format!("place {:?} of {} rows", at.last(), to[0]))
}

/// A range of the rows.
pub fn slice_rows([rows, _]: Shape, range: &Range<usize>) -> Result<()> {
    let fits = range.start <= range.end && range.end <= rows;
    must(fits, OpKind::SliceRows, || format!("rows {range:?} of {rows}"))
}

/// A range of the columns.
pub fn slice_cols([_, cols]: Shape, range: &Range<usize>) -> Result<()> {
    let fits = range.start <= range.end && range.end <= cols;
    must(fits, OpKind::SliceCols, || format!("columns {range:?} of {cols}"))
}
