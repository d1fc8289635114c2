//! Products, with all that stands before and behind them in one launch.

use std::sync::Arc;

use pi0_device::{Activation, Dense, Error, Modulation, OpKind, Qkv, flops, operands};

use super::Op;
use super::norm::Before;
use super::rope::Turn;
use crate::device::{NAME, State, Vulkan};
use crate::error::Result;
use crate::kernels::Kernel;
use crate::tape::Builder;
use crate::tensor::{Tensor, Value};
use crate::weight::{Linear, Weight};

/// Rows of a workgroup.
const ROWS: usize = 64;
/// Up to so many rows a product computes the statistics of its norm itself.
const FEW_ROWS: usize = ROWS;
/// Layers with fewer outputs than this get narrow workgroups that split the depth, which fill a GPU when there are few
/// rows. The choice must not depend on the rows: sums would take another order, and a robot's actions would depend on
/// its neighbours in a batch.
const WIDE: usize = 4096;

/// A product and its surroundings.
struct Product<'a> {
    x: &'a Tensor,
    norm: Option<Before<'a>>,
    weight: &'a Linear,
    activation: Option<Activation>,
    gate: Option<Modulation<'a, Tensor>>,
    residual: Option<&'a Tensor>,
    /// Width of half a head and angles of the first heads.
    turn: Option<(usize, usize, &'a Turn)>,
}

/// As the kernels number them.
fn activation_number(activation: Option<Activation>) -> u32 {
    match activation {
        None => 0,
        Some(Activation::Gelu) => 1,
        Some(Activation::Silu) => 2,
        Some(Activation::Geglu) => 3,
    }
}

fn linear_weight<'a>(op: OpKind, x: &Tensor, weight: &'a Weight) -> pi0_device::Result<&'a Linear> {
    match weight {
        Weight::Linear(w) => operands::linear(op, [x.rows, x.cols], w.inputs).map(|()| w),
        _ => Err(Error::shape(op, "the weight is not a linear layer's")),
    }
}

impl Vulkan {
    pub(crate) fn dense_layer(
        &self,
        op: OpKind,
        call: &Dense<'_, Tensor, Weight>,
    ) -> pi0_device::Result<Tensor> {
        let weight = linear_weight(op, call.x, call.weight)?;
        let norm = call.norm.map(|n| Before::new(call.x, n)).transpose()?;
        let geglu = call.activation == Some(Activation::Geglu);
        if geglu {
            operands::geglu([call.x.rows, weight.outputs])?;
        }
        let width = if geglu { weight.outputs / 2 } else { weight.outputs };
        if let Some(r) = call.residual {
            let rows = call.x.rows;
            if r.cols == width && r.rows > rows {
                return Err(Error::unsupported(NAME, op, "a residual with more rows than the layer"));
            }
            if r.rows == 0 || r.cols != width || !rows.is_multiple_of(r.rows) {
                let what = format!("a residual [{}, {}] of [{rows}, {width}]", r.rows, r.cols);
                return Err(Error::shape(op, what));
            }
        }
        if let Some(by) = &call.gate {
            let Some(r) = call.residual else {
                return Err(Error::shape(op, "a gate without a residual"));
            };
            let table = [by.table.rows, by.table.cols];
            operands::gated_add([r.rows, r.cols], [call.x.rows, width], table, by.rows)?;
        }
        let product = Product {
            x: call.x,
            norm,
            weight,
            activation: call.activation,
            gate: call.gate,
            residual: call.residual,
            turn: None,
        };
        self.write(|s| {
            let [y] = self.product(s, &product, [width])?;
            Ok(Tensor::whole(y, call.x.rows, width))
        })
    }

    pub(crate) fn qkv_layer(&self, call: &Qkv<'_, Tensor, Weight>) -> pi0_device::Result<[Tensor; 3]> {
        let weight = linear_weight(OpKind::Qkv, call.x, call.weight)?;
        let norm = Before::new(call.x, call.norm)?;
        let (queries, kv) = (call.heads * call.head_dim, call.kv_heads * call.head_dim);
        if weight.outputs != queries + 2 * kv {
            let what = format!("{} outputs for q, k and v of {queries}, {kv} and {kv}", weight.outputs);
            return Err(Error::shape(OpKind::Qkv, what));
        }
        let rows = call.x.rows;
        if let Some(positions) = call.positions {
            operands::rope([rows, queries], positions, call.head_dim)?;
        }
        self.write(|s| {
            let turn = match call.positions {
                Some(positions) if rows > 0 => Some(self.turn(s, positions, call.head_dim / 2)?),
                _ => None,
            };
            let turn = turn.as_ref().map(|t| (call.head_dim / 2, call.heads + call.kv_heads, t));
            let product = Product {
                x: call.x,
                norm: Some(norm),
                weight,
                activation: None,
                gate: None,
                residual: None,
                turn,
            };
            let [q, k, v] = self.product(s, &product, [queries, kv, kv])?;
            Ok([Tensor::whole(q, rows, queries), Tensor::whole(k, rows, kv), Tensor::whole(v, rows, kv)])
        })
    }

    /// A product whose results stand side by side, of these widths: one, or three.
    fn product<const N: usize>(
        &self,
        s: &mut State,
        p: &Product<'_>,
        widths: [usize; N],
    ) -> Result<[Arc<Value>; N]> {
        let ada = match p.norm {
            Some(Before::Ada(by)) => Some((by, s.integers(by.rows)?)),
            _ => None,
        };
        let gate = match p.gate {
            Some(by) => Some((by, s.integers(by.rows)?)),
            None => None,
        };
        let mut key = s.key(Op::Product);
        s.tape.tensor(&mut key, p.x);
        key.region(&p.weight.matrix);
        key.words(&[p.norm.map_or(0, Before::number), activation_number(p.activation)]);
        key.sizes(widths);
        if let Some(Before::Plain(n)) = p.norm {
            key.region(&n.values);
        }
        for (by, rows) in ada.iter().chain(&gate) {
            s.tape.tensor(&mut key, by.table);
            s.tape.name(&mut key, rows);
        }
        key.words(&[u32::from(gate.is_some()), u32::from(p.residual.is_some())]);
        if let Some(residual) = p.residual {
            s.tape.tensor(&mut key, residual);
        }
        if let Some((half, groups, turn)) = p.turn {
            key.sizes([half, groups]);
            turn.name(&s.tape, &mut key);
        }
        s.call(key, |s| self.launch_product(s, p, widths, &ada, &gate))
    }

    #[allow(clippy::type_complexity)] // modulations with their rows
    fn launch_product<const N: usize>(
        &self,
        s: &mut State,
        p: &Product<'_>,
        widths: [usize; N],
        ada: &Option<(Modulation<'_, Tensor>, Arc<Value>)>,
        gate: &Option<(Modulation<'_, Tensor>, Arc<Value>)>,
    ) -> Result<[Arc<Value>; N]> {
        let (x, w) = (p.x, p.weight);
        for width in widths {
            self.bytes(x.rows, width)?;
        }
        let outputs = widths.map(|width| s.tape.value(4 * (x.rows * width) as u64));
        if x.rows == 0 {
            return Ok(outputs);
        }
        let stats = match p.norm {
            Some(n) if x.rows > FEW_ROWS => Some(self.statistics(s, x, n)?),
            _ => None,
        };
        let geglu = p.activation == Some(Activation::Geglu);
        let row_tiles = x.rows.div_ceil(ROWS);
        let (kernel, columns) = match (w.outputs >= WIDE, w.units) {
            (true, None) => (Kernel::Gemm64, 64),
            (false, None) => (Kernel::Gemm16, 16),
            (true, Some(units)) => (Kernel::Matrix64(units), 64),
            (false, Some(units)) => (Kernel::Matrix16(units), 16),
        };
        // Columns stand in groups of two halves.
        let half = match p.turn {
            Some((half, ..)) => half,
            None if geglu => w.outputs / 2,
            None => columns / 2,
        };
        let column_tiles = w.outputs.div_ceil(2 * half) * half.div_ceil(columns / 2);
        let constants = [
            p.norm.map_or(0, Before::number),
            u32::from(stats.is_some()),
            activation_number(p.activation),
            u32::from(p.residual.is_some()),
            u32::from(gate.is_some()),
            u32::from(w.bias),
            w.stored as u32,
            u32::from(w.scaled()),
        ];
        let pipeline = s.pipeline(kernel, &constants)?;
        // Workgroups that run together share columns of the weight, the larger operand.
        let grid = [row_tiles as u32, column_tiles as u32];
        let mut b = Builder::new(&mut s.tape, pipeline, grid).reads(x)?.reads_region(&w.matrix);
        b = match &w.columns {
            Some(columns) => b.reads_region(columns),
            None => b.nothing(),
        };
        b = match p.norm {
            Some(Before::Plain(n)) => b.reads_region(&n.values),
            _ => b.nothing(),
        };
        b = match &stats {
            Some(stats) => b.reads(stats)?,
            None => b.nothing(),
        };
        b = b.modulated(ada)?;
        b = match p.residual {
            Some(r) => b.reads(r)?,
            None => b.nothing(),
        };
        b = b.modulated(gate)?;
        b = match p.turn {
            Some((_, _, turn)) => b.turns(turn)?,
            None => b.nothing().nothing(),
        };
        // The kernels have three results; what is not there is the first.
        for i in 0..3 {
            b = b.writes(outputs.get(i).unwrap_or(&outputs[0]))?;
        }
        let split1 = widths[0];
        let split2 = split1 + widths.get(1).copied().unwrap_or(0);
        let (r_offset, r_stride, r_rows) = p.residual.map_or((0, 0, 1), |r| (r.offset, r.stride, r.rows));
        let scale_offset = w.outputs;
        let groups = p.turn.map_or(0, |(_, groups, _)| groups);
        let words = [
            x.rows,
            w.outputs,
            w.inputs,
            x.offset,
            x.stride,
            w.stride / 16,
            half,
            r_offset,
            r_stride,
            r_rows,
            split1,
            split2,
            groups,
            gate.as_ref().map_or(0, |(by, _)| by.table.offset + 2 * split1),
            gate.as_ref().map_or(0, |(by, _)| by.table.stride),
            ada.as_ref().map_or(0, |(by, _)| by.table.offset),
            ada.as_ref().map_or(0, |(by, _)| by.table.stride),
        ]
        .map(|v| v as u32);
        b.push(&words)
            .push(&[p.norm.map_or(0.0, Before::eps).to_bits(), w.inputs as u32, scale_offset as u32])
            .shape([x.rows, w.inputs, w.outputs])
            .flop(flops::linear(x.rows, w.inputs, w.outputs))
            .launch();
        Ok(outputs)
    }
}

impl Builder<'_> {
    /// A table of modulations and which of its rows each row takes.
    fn modulated(self, by: &Option<(Modulation<'_, Tensor>, Arc<Value>)>) -> Result<Self> {
        match by {
            Some((by, rows)) => self.reads(by.table)?.reads_value(rows),
            None => Ok(self.nothing().nothing()),
        }
    }
}
