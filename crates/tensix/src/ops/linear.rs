//! Linear layers, alone and with what comes after them.

use std::borrow::Cow;

use pi0_device::{
    Activation, Dense, Device, Error, LinearPart, Norm, NormKind, OpKind, Qkv, Result, TensorSource,
    WeightSource,
};

use super::product::Product;
use super::{failed, wrong_weight};
use crate::device::{Key, Tensix};
use crate::dram::Blocks;
use crate::kernels::{EltwiseOp, Epilogue, Matmul};
use crate::layout::{
    EXPONENT_BYTES, Format, SHARED, TILE, bf16_bits, bf16_value, bfp8_value, push_bfp8_tile, push_tile,
    tiles, to_bfp8, to_tf32,
};
use crate::perf;
use crate::tensor::{Heads, LinearWeight, Side, Tensor, Weight, WeightKind};

/// Tiles of a weight as they are packed.
struct Packed {
    format: Format,
    bytes: Vec<u8>,
    exponents: Vec<u8>,
    /// Whether all values could be stored.
    finite: bool,
}

impl Packed {
    fn new(format: Format, tiles: usize) -> Self {
        let bytes = Vec::with_capacity(tiles * format.tile_bytes());
        Packed { format, bytes, exponents: Vec::new(), finite: true }
    }

    fn push(&mut self, value: impl Fn(usize, usize) -> f32) {
        match self.format {
            Format::Bfp8 => self.finite &= push_bfp8_tile(&mut self.bytes, &mut self.exponents, value),
            Format::F32 => push_tile(&mut self.bytes, self.format, |r, c| to_tf32(value(r, c))),
            format => push_tile(&mut self.bytes, format, value),
        }
    }

    /// Three rows of a tile whose sum is `row`: exactly in bf16 (unless the least part underflows), to 2⁻²⁰ of the largest of
    /// 16 values in bfp8. The other formats hold it in one.
    fn split(&self, row: [f32; TILE]) -> [[f32; TILE]; 3] {
        let mut rest = row;
        [(); 3].map(|()| {
            let mut part = rest.map(|v| bf16_value(bf16_bits(v)));
            if self.format == Format::Bfp8 {
                for (part, rest) in part.chunks_exact_mut(SHARED).zip(rest.chunks_exact(SHARED)) {
                    if let Some((exponent, bytes)) = rest.first_chunk().and_then(to_bfp8) {
                        part.iter_mut().zip(bytes).for_each(|(p, b)| *p = bfp8_value(exponent, b));
                    }
                }
            }
            rest.iter_mut().zip(part).for_each(|(rest, part)| *rest -= part);
            part
        })
    }
}

impl Tensix {
    /// Packs `Wᵀ`, and the bias as one more row of tiles. `heads` are heads that begin at tiles, on one side.
    pub(super) fn pack_linear(
        &self,
        parts: &[LinearPart],
        exact: bool,
        heads: Option<(Side, Heads)>,
    ) -> Result<LinearWeight> {
        let format = if exact { Format::F32 } else { self.weights };
        let inputs = parts.first().map_or(0, LinearPart::inputs);
        let rows: Vec<(&LinearPart, usize)> =
            parts.iter().flat_map(|p| (0..p.outputs()).map(move |i| (p, i))).collect();
        // For each place the input or output that is stored there.
        let places = |side: Side, n: usize| -> Vec<Option<usize>> {
            match heads {
                Some((s, heads)) if s == side => (0..heads.stored(n)).map(|at| heads.column(at)).collect(),
                _ => (0..n).map(Some).collect(),
            }
        };
        let (ins, outs) = (places(Side::Inputs, inputs), places(Side::Outputs, rows.len()));
        let bias = parts.iter().any(|p| p.bias.is_some());
        let depth = tiles(ins.len()) + usize::from(bias);
        let biases: Vec<f32> = if bias {
            let read = |p: &LinearPart| p.bias.as_ref().map_or(vec![0.0; p.outputs()], |b| b.to_f32());
            parts.iter().flat_map(read).collect()
        } else {
            Vec::new()
        };
        let mut packed = Packed::new(format, tiles(outs.len()) * depth);
        let mut block = vec![0.0f32; TILE * inputs];
        for outs in outs.chunks(TILE) {
            for (row, out) in block.chunks_exact_mut(inputs).zip(outs) {
                match out {
                    Some(out) => rows[*out].0.read_row(rows[*out].1, row),
                    None => row.fill(0.0),
                }
            }
            for ins in ins.chunks(TILE) {
                packed.push(|r, c| match ins.get(r) {
                    Some(Some(input)) if c < outs.len() => block[c * inputs + input],
                    _ => 0.0,
                });
            }
            if bias {
                let parts = packed.split(std::array::from_fn(|c| match outs.get(c) {
                    Some(Some(out)) => biases[*out],
                    _ => 0.0,
                }));
                packed.push(|r, c| parts.get(r).map_or(0.0, |part| part[c]));
            }
        }
        if !packed.finite {
            let what =
                "a linear layer has a weight that is not finite, which bfp8 cannot hold; use bf16 weights";
            return Err(Error::Failed { device: super::NAME, what: what.into() });
        }
        let blocks = Blocks::new(tiles(outs.len()) * depth, self.banks.0 as usize);
        let store =
            |bytes: &[u8], of_tile| self.in_blocks(bytes, of_tile, blocks).map_err(failed(OpKind::Prepare));
        let region = store(&packed.bytes, format.tile_bytes())?;
        let exponents = match format {
            Format::Bfp8 => Some(store(&packed.exponents, EXPONENT_BYTES)?),
            _ => None,
        };
        let (inputs, outputs) = (ins.len(), outs.len());
        Ok(LinearWeight { region, blocks, exponents, format, inputs, outputs, depth, bias })
    }

    /// The weight with heads that begin at tiles, packed when first asked for; none if it cannot be had.
    fn padded_weight<'a>(
        &self,
        weight: &'a Weight,
        side: Side,
        heads: Heads,
    ) -> Result<Option<&'a LinearWeight>> {
        if weight.padded.get().is_none()
            && let Some(source) = &weight.source
            && let source = source.unfetched()
            && let WeightSource::Linear { parts, exact } = &source
        {
            source.tensors().try_for_each(TensorSource::fetch)?;
            let packed = self.pack_linear(parts, *exact, Some((side, heads)))?;
            source.release();
            // Another thread may have been faster; its weight is the same.
            let _ = weight.padded.set((side, heads, packed));
        }
        let fits = weight.padded.get().filter(|(s, h, _)| (*s, *h) == (side, heads));
        Ok(fits.map(|(_, _, packed)| packed))
    }

    /// `x` in f32: each tile times the identity, which changes no value.
    pub(super) fn in_f32<'a>(&self, op: OpKind, x: &'a Tensor) -> Result<Cow<'a, Tensor>> {
        if x.format == Format::F32 {
            return Ok(Cow::Borrowed(x));
        }
        let y = self.tensor(x.rows, x.stored_cols()).map_err(failed(op))?;
        let formats = [x.format, Format::Bf16];
        let k = Matmul::smallest(formats, false, Epilogue::None, y.format, self.banks);
        let constants = self.constants().map_err(failed(op))?;
        let one = Blocks::new(1, self.banks.0 as usize);
        let (pitch, identity, ones) = (x.pitch as u32, constants.identity_bf16, constants.ones_bf16);
        let head = [y.base(), x.base(), identity, pitch, 1, ones, 0, 0, one.span, one.magic];
        let places = (0..y.tile_rows()).flat_map(|r| (0..y.tile_cols()).map(move |c| (r, c)));
        let items: Vec<_> = places.map(|(r, c)| vec![x.tile(r, c), 0, y.tile(r, c)]).collect();
        self.run(Key::Matmul(k), &head, &items).map_err(failed(op))?;
        Ok(Cow::Owned(match x.heads {
            Some(heads) => y.as_heads(heads),
            None => y,
        }))
    }

    /// `x` in f32 with its columns side by side.
    pub(super) fn plain<'a>(&self, op: OpKind, x: &'a Tensor) -> Result<Cow<'a, Tensor>> {
        let x = self.in_f32(op, x)?;
        let Some(heads) = x.heads else { return Ok(x) };
        let stored = x.as_stored();
        let plain = self.gather(op, x.rows, x.cols, |r| (&stored, r), |c| Some(heads.place(c)))?;
        Ok(Cow::Owned(plain))
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
        let WeightKind::Linear(plain) = &weight.kind else {
            return Err(wrong_weight(op, weight));
        };
        if plain.inputs != x.cols {
            return Err(Error::shape(op, format!("{} columns, a weight of {} inputs", x.cols, plain.inputs)));
        }
        if let Some(heads) = x.heads
            && let Some(padded) = self.padded_weight(weight, Side::Inputs, heads)?
        {
            return self.linear_with(op, &x.as_stored(), padded, activation, residual);
        }
        if x.heads.is_none() && x.format == plain.format.of_activations() {
            return self.linear_with(op, x, plain, activation, residual);
        }
        self.linear_with(op, &*self.plain(op, x)?, plain, activation, residual)
    }

    fn linear_with(
        &self,
        op: OpKind,
        x: &Tensor,
        w: &LinearWeight,
        activation: Option<Activation>,
        residual: Option<&Tensor>,
    ) -> Result<Tensor> {
        let epilogue = match (activation, residual) {
            (None, None) => Epilogue::None,
            (None, Some(_)) => Epilogue::Residual,
            (Some(Activation::Gelu), None) => Epilogue::Gelu,
            (Some(Activation::Silu), None) => Epilogue::Silu,
            (Some(Activation::Geglu), None) if w.outputs.is_multiple_of(2 * TILE) => Epilogue::Geglu,
            _ => return Err(Error::unsupported(super::NAME, op, "this epilogue of a linear layer")),
        };
        let outputs = if epilogue == Epilogue::Geglu { w.outputs / 2 } else { w.outputs };
        // Behind an activation comes a layer like this one, which multiplies bf16 as well.
        let output = if activation.is_some() { w.format.of_activations() } else { Format::F32 };
        let plain = matches!(epilogue, Epilogue::None | Epilogue::Residual);
        let parts = if plain { perf::parts_of_inputs(w.depth, w.bias) } else { 1 };
        if parts > 1 {
            return self.linear_in_parts(op, x, w, residual, parts);
        }
        let y = self.tensor_of(x.rows, outputs, output).map_err(failed(op))?;
        let product = Product { x, w, residual, epilogue, parts, y: &y };
        let plan = self.plan(&product).map_err(failed(op))?;
        self.multiply(&product, &plan).map_err(failed(op))?;
        Ok(y)
    }

    /// The products of two parts of the inputs, and their sum.
    fn linear_in_parts(
        &self,
        op: OpKind,
        x: &Tensor,
        w: &LinearWeight,
        residual: Option<&Tensor>,
        parts: usize,
    ) -> Result<Tensor> {
        let rows = x.tile_rows();
        let apart = self.tensor(parts * rows * TILE, w.outputs).map_err(failed(op))?;
        let product = Product { x, w, residual: None, epilogue: Epilogue::None, parts, y: &apart };
        let plan = self.plan(&product).map_err(failed(op))?;
        self.multiply(&product, &plan).map_err(failed(op))?;
        let y = self.tensor(x.rows, w.outputs).map_err(failed(op))?;
        let both = |r, c| vec![apart.tile(r, c), apart.tile(r + rows, c)];
        match residual {
            None => self.eltwise(op, EltwiseOp::Add, &y, &[apart.base(); 2], both)?,
            Some(residual) => {
                let bases = [residual.base(), apart.base(), apart.base()];
                self.eltwise(op, EltwiseOp::AddBoth, &y, &bases, |r, c| {
                    [vec![residual.tile(r, c)], both(r, c)].concat()
                })?;
            }
        }
        Ok(y)
    }

    /// The forms of a dense layer that save something here: an activation or a residual of the product.
    pub(super) fn dense_op(&self, call: &Dense<'_, Tensor, Weight>) -> Result<Tensor> {
        let op = OpKind::Dense;
        let refuse = |why: &str| Err(Error::unsupported(super::NAME, op, why));
        let WeightKind::Linear(w) = &call.weight.kind else {
            return Err(wrong_weight(op, call.weight));
        };
        let fits = |r: &Tensor| r.rows == call.x.rows && r.cols == w.outputs;
        match (call.activation, call.residual) {
            (_, None) if call.gate.is_some() => return refuse("a gate without a residual"),
            (None, None) | (Some(Activation::Gelu | Activation::Silu), None) => {}
            (Some(Activation::Geglu), None) if w.outputs.is_multiple_of(2 * TILE) => {}
            (None, Some(r)) if fits(r) => {}
            _ => return refuse("this combination of activation and residual"),
        }
        let residual = call.residual.map(|r| self.plain(op, r)).transpose()?;
        let residual = residual.as_deref();
        let normed = call.norm.map(|norm| self.normed(op, norm, call.x, w)).transpose()?;
        let x = normed.as_ref().unwrap_or(call.x);
        if let (Some(gate), Some(residual)) = (&call.gate, residual) {
            let branch = self.linear_op(op, x, call.weight, None, None)?;
            return self.gated_add_op(op, residual, &branch, gate);
        }
        self.linear_op(op, x, call.weight, call.activation, residual)
    }

    /// A norm whose result is stored as the weights behind it want it: the matrix unit multiplies no better.
    fn normed(
        &self,
        op: OpKind,
        norm: Norm<'_, Tensor, Weight>,
        x: &Tensor,
        behind: &LinearWeight,
    ) -> Result<Tensor> {
        let output = behind.format.of_activations();
        let x = &*self.plain(op, x)?;
        match norm {
            Norm::Layer(w) => self.norm(op, NormKind::Layer, x, w, output),
            Norm::Rms(w) => self.norm(op, NormKind::Rms, x, w, output),
            Norm::Ada(by) => self.ada_rms_norm_op(op, x, &by, output),
        }
    }

    /// The norm's result goes to the projection as bf16. Heads that are not whole tiles, and do not turn, get tiles of
    /// their own, so that no column ever moves; where they are whole tiles the split is a view.
    pub(super) fn qkv_op(&self, call: &Qkv<'_, Tensor, Weight>) -> Result<[Tensor; 3]> {
        let op = OpKind::Qkv;
        let WeightKind::Linear(plain) = &call.weight.kind else {
            return Err(wrong_weight(op, call.weight));
        };
        let (q, kv) = (call.heads * call.head_dim, call.kv_heads * call.head_dim);
        if call.head_dim == 0 || plain.outputs != q + 2 * kv || plain.inputs != call.x.cols {
            return Err(self.lacks(op));
        }
        let normed = |w: &LinearWeight| self.normed(op, call.norm, call.x, w);
        if call.head_dim.is_multiple_of(TILE) {
            let y = self.linear_with(op, &normed(plain)?, plain, None, None)?;
            let part = |start, cols| y.view(0, start, y.rows, cols);
            let Some(positions) = call.positions else {
                return Ok([part(0, q), part(q, kv), part(q + kv, kv)]);
            };
            if !call.head_dim.is_multiple_of(2 * TILE) {
                let turn = |x: Tensor| self.rope_op(&x, positions, call.head_dim);
                return Ok([turn(part(0, q))?, turn(part(q, kv))?, part(q + kv, kv)]);
            }
            // As bf16, which is what attention reads again and again.
            let turned = self.turned(OpKind::Rope, &y, positions, call.head_dim, q + kv)?;
            let part = |start, cols| turned.view(0, start, y.rows, cols);
            return Ok([part(0, q), part(q, kv), part(q + kv, kv)]);
        }
        let heads = Heads { width: call.head_dim };
        let padded = match call.positions {
            None => self.padded_weight(call.weight, Side::Outputs, heads)?,
            Some(_) => None,
        };
        let w = padded.ok_or_else(|| self.lacks(op))?;
        let y = self.linear_with(op, &normed(w)?, w, None, None)?;
        let (q, kv) = (heads.stored(q), heads.stored(kv));
        let part = |start, cols| y.view(0, start, y.rows, cols).as_heads(heads);
        Ok([part(0, q), part(q, kv), part(q + kv, kv)])
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::layout::in_tile;

    #[test]
    fn a_bias_is_split_without_loss() {
        let row = std::array::from_fn(|i| {
            [0.0f32, 1.0, -3.1712345, 1.0e-3, 123456.79, -7.7e10][i % 6] * if i < 16 { 1.0 } else { 0.37 }
        });
        for format in [Format::Bf16, Format::Bfp8] {
            let parts = Packed::new(format, 0).split(row);
            for (c, v) in row.into_iter().enumerate() {
                let sum = parts.iter().map(|p| f64::from(p[c])).sum::<f64>();
                let near = if format == Format::Bfp8 { 7.7e10 * 2f64.powi(-20) } else { 0.0 };
                assert!((sum - f64::from(v)).abs() <= near, "{format:?} {v} {sum}");
            }
            // Each part is what the tile will hold.
            let mut packed = Packed::new(format, 1);
            packed.push(|r, c| parts.get(r).map_or(0.0, |p| p[c]));
            let mut again = Packed::new(format, 1);
            again.push(|r, c| match (format, r) {
                (_, 3..) => 0.0,
                (Format::Bfp8, _) => {
                    let at = in_tile(r, c);
                    bfp8_value(packed.exponents[at / SHARED], packed.bytes[at])
                }
                _ => parts[r][c],
            });
            assert_eq!((again.bytes, again.exponents), (packed.bytes, packed.exponents));
        }
    }
}
