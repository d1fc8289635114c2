//! Linear layers, alone and with what comes after them.

use pi0_device::{Activation, Dense, Error, LinearPart, Norm, NormKind, OpKind, Result};

use super::{failed, wrong_weight};
use crate::device::{Key, Tensix};
use crate::kernels::{Epilogue, Matmul};
use crate::layout::{Format, TILE, bf16_bits, bf16_value, push_tile, tiles};
use crate::tensor::{LinearWeight, Tensor, Weight, WeightKind};

/// Three bf16 numbers whose sum is `v` exactly (unless the least of it underflows).
fn split(v: f32) -> [f32; 3] {
    let mut rest = v;
    [(); 3].map(|()| {
        let part = bf16_value(bf16_bits(rest));
        rest -= part;
        part
    })
}

impl Tensix {
    /// Packs `Wᵀ`, and the bias as one more row of tiles.
    pub(super) fn pack_linear(&self, parts: &[LinearPart], exact: bool) -> Result<LinearWeight> {
        let format = if exact { Format::F32 } else { Format::Bf16 };
        let inputs = parts.first().map_or(0, LinearPart::inputs);
        let outputs: usize = parts.iter().map(LinearPart::outputs).sum();
        let bias = parts.iter().any(|p| p.bias.is_some());
        let depth = tiles(inputs) + usize::from(bias);
        let biases: Vec<[f32; 3]> = if bias {
            let read = |p: &LinearPart| p.bias.as_ref().map_or(vec![0.0; p.outputs()], |b| b.to_f32());
            parts.iter().flat_map(read).map(split).collect()
        } else {
            Vec::new()
        };
        let rows: Vec<(&LinearPart, usize)> =
            parts.iter().flat_map(|p| (0..p.outputs()).map(move |i| (p, i))).collect();
        let mut bytes = Vec::with_capacity(tiles(outputs) * depth * format.tile_bytes());
        let mut block = vec![0.0f32; TILE * inputs];
        for (n, rows) in rows.chunks(TILE).enumerate() {
            for (out, (part, i)) in block.chunks_exact_mut(inputs).zip(rows) {
                part.read_row(*i, out);
            }
            for k in 0..tiles(inputs) {
                push_tile(&mut bytes, format, |r, c| {
                    let input = k * TILE + r;
                    if input < inputs && c < rows.len() { block[c * inputs + input] } else { 0.0 }
                });
            }
            if bias {
                push_tile(&mut bytes, format, |r, c| match biases.get(n * TILE + c) {
                    Some(parts) if r < 3 => parts[r],
                    _ => 0.0,
                });
            }
        }
        let region = self.region(&bytes, format).map_err(failed(OpKind::Prepare))?;
        Ok(LinearWeight { region, format, inputs, outputs, depth, bias })
    }

    /// `epilogue(x · Wᵀ + b)`; a residual (of the result's shape) is the epilogue that adds it.
    pub(super) fn linear_op(
        &self,
        op: OpKind,
        x: &Tensor,
        weight: &Weight,
        activation: Option<Activation>,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let WeightKind::Linear(w) = &weight.kind else {
            return Err(wrong_weight(op, weight));
        };
        if w.inputs != x.cols {
            return Err(Error::shape(op, format!("{} columns, a weight of {} inputs", x.cols, w.inputs)));
        }
        let epilogue = match (activation, residual) {
            (None, None) => Epilogue::None,
            (None, Some(_)) => Epilogue::Residual,
            (Some(Activation::Gelu), None) => Epilogue::Gelu,
            (Some(Activation::Silu), None) => Epilogue::Silu,
            _ => return Err(Error::unsupported(super::NAME, op, "this epilogue of a linear layer")),
        };
        let y = self.tensor(x.rows, w.outputs).map_err(failed(op))?;
        let (rows, cols) = (y.tile_rows(), y.tile_cols());
        let (block_rows, block_cols) = block(rows, cols, w.format, self.cores());
        let key = Matmul {
            rows: block_rows as u32,
            cols: block_cols as u32,
            chunk: w.depth.min(8) as u32,
            weight: w.format,
            bias: w.bias,
            epilogue,
            banks: self.banks,
        };
        let head = [
            y.base(),
            x.base(),
            w.region.base(),
            x.pitch as u32,
            w.depth as u32,
            self.constants().map_err(failed(op))?.ones,
            residual.map_or(0, Tensor::base),
        ];
        // Blocks that share columns of the weight are neighbours.
        let mut items = Vec::new();
        for c in (0..cols).step_by(block_cols) {
            for r in (0..rows).step_by(block_rows) {
                let mut item = vec![x.tile(r, 0), (c * w.depth) as u32];
                for tensor in [Some(&y), residual].into_iter().flatten() {
                    for i in 0..block_rows * block_cols {
                        item.push(tensor.tile(r + i / block_cols, c + i % block_cols));
                    }
                }
                items.push(item);
            }
        }
        self.run(Key::Matmul(key), &head, &items).map_err(failed(op))?;
        Ok(y)
    }

    /// The forms of a dense layer that save something here: an activation or a residual of the product.
    pub(super) fn dense_op(&self, call: &Dense<'_, Tensor, Weight>) -> Result<Tensor> {
        let op = OpKind::Dense;
        let refuse = |why: &str| Err(Error::unsupported(super::NAME, op, why));
        if call.norm_tap.is_some() || call.branch_tap.is_some() {
            return refuse("taps inside a fused layer");
        }
        let WeightKind::Linear(w) = &call.weight.kind else {
            return Err(wrong_weight(op, call.weight));
        };
        let fits = |r: &Tensor| r.rows == call.x.rows && r.cols == w.outputs;
        match (call.activation, call.residual) {
            (None, None) | (Some(Activation::Gelu | Activation::Silu), None) => {}
            (None, Some(r)) if fits(r) => {}
            _ => return refuse("this combination of activation and residual"),
        }
        let normed = match call.norm {
            None => None,
            Some(Norm::Layer(w)) => Some(self.norm(op, NormKind::Layer, call.x, w)?),
            Some(Norm::Rms(w)) => Some(self.norm(op, NormKind::Rms, call.x, w)?),
        };
        let x = normed.as_ref().unwrap_or(call.x);
        self.linear_op(op, x, call.weight, call.activation, call.residual)
    }
}

/// Rows and columns of tiles that a core computes at once: at most four tiles, dividing the result evenly, so
/// that the slower of matrix unit and memory is busy shortest.
fn block(rows: usize, cols: usize, weight: Format, cores: usize) -> (usize, usize) {
    /// Cycles of a tile product in four phases.
    const PRODUCT: usize = 64;
    /// Bytes that one core gets from DRAM in a cycle when all ask.
    const SHARE: usize = 5;
    let cost = |&(r, c): &(usize, usize)| {
        let rounds = (rows / r * (cols / c)).div_ceil(cores);
        let bytes = r * Format::F32.tile_bytes() + c * weight.tile_bytes();
        (rounds * (r * c * PRODUCT).max(bytes / SHARE), bytes)
    };
    let shapes = [(1, 1), (1, 2), (2, 1), (1, 4), (2, 2), (4, 1), (1, 3), (3, 1)];
    let fitting = shapes.into_iter().filter(|&(r, c)| rows % r == 0 && cols % c == 0);
    fitting.min_by_key(cost).unwrap_or((1, 1))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_bias_is_split_without_loss() {
        for v in [0.0f32, 1.0, -3.1415927, 1.0e-3, 123456.79, -7.7e10] {
            let parts = split(v);
            assert_eq!(parts.iter().map(|&p| f64::from(p)).sum::<f64>(), f64::from(v), "{v}");
            assert!(parts.iter().all(|&p| p.to_bits() & 0xFFFF == 0));
        }
    }

    #[test]
    fn blocks_divide_the_result() {
        for rows in 1..30 {
            for cols in [1, 2, 3, 5, 36, 64, 135, 512] {
                let (r, c) = block(rows, cols, Format::Bf16, 64);
                assert!(rows % r == 0 && cols % c == 0 && r * c <= 4, "{rows}x{cols}: {r}x{c}");
            }
        }
        let (r, c) = block(26, 512, Format::Bf16, 64);
        assert_eq!(r * c, 4);
    }
}
