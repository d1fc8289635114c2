//! Rotary position embedding: angles computed on the host, where sines are exact, and kept on the device.

use std::sync::Arc;

use pi0_device::{OpKind, flops};

use super::{EACH, Op, folded};
use crate::device::{State, Vulkan};
use crate::error::Result;
use crate::kernels::Kernel;
use crate::memory::Region;
use crate::script::Key;
use crate::tape::{Builder, Tape};
use crate::tensor::{Tensor, Value};

/// Positions of the first table; it doubles when more are asked for.
const POSITIONS: usize = 1024;
/// Positions from which on a call brings its own angles.
const MOST_POSITIONS: usize = 1 << 15;

/// Cosine and sine for every position below a number.
pub(crate) struct Angles {
    half: usize,
    positions: usize,
    region: Arc<Region>,
}

/// Where a call's angles are, and the row of each of its rows.
pub(crate) enum Turn {
    Kept(Arc<Region>, Arc<Value>),
    Brought(Arc<Value>, Arc<Value>),
}

/// Cosine and sine of `position` at each pair of a head, as the references compute them, in f32.
fn angles(positions: impl Iterator<Item = u32>, half: usize) -> Vec<f32> {
    let frequencies: Vec<f32> = (0..half).map(|i| 1.0 / 10000f32.powf(i as f32 / half as f32)).collect();
    let mut out = Vec::new();
    for p in positions {
        for f in &frequencies {
            let (sine, cosine) = (p as f32 * f).sin_cos();
            out.extend([cosine, sine]);
        }
    }
    out
}

impl Vulkan {
    pub(crate) fn turn(&self, s: &mut State, positions: &[u32], half: usize) -> Result<Turn> {
        let most = positions.iter().max().map_or(0, |&p| p as usize + 1);
        if most > MOST_POSITIONS {
            let own = angles(positions.iter().copied(), half);
            let own = s.upload(bytemuck::cast_slice(&own))?;
            let rows: Vec<u32> = (0..positions.len() as u32).collect();
            return Ok(Turn::Brought(own, s.integers(&rows)?));
        }
        let known = s.angles.iter().position(|a| a.half == half);
        let at = match known {
            Some(i) if s.angles[i].positions >= most => i,
            known => {
                let count = most.next_power_of_two().max(POSITIONS);
                let region = self.store_f32(s, &angles(0..count as u32, half))?;
                let new = Angles { half, positions: count, region };
                match known {
                    Some(i) => s.angles[i] = new,
                    None => s.angles.push(new),
                }
                known.unwrap_or(s.angles.len() - 1)
            }
        };
        let region = s.angles[at].region.clone();
        Ok(Turn::Kept(region, s.integers(positions)?))
    }

    pub(crate) fn rotated(
        &self,
        s: &mut State,
        x: &Tensor,
        positions: &[u32],
        head_dim: usize,
    ) -> Result<Tensor> {
        let turn = self.turn(s, positions, head_dim / 2)?;
        let mut key = s.key(Op::Rope);
        s.tape.tensor(&mut key, x);
        key.sizes([head_dim]);
        turn.name(&s.tape, &mut key);
        let [y] = s.call(key, |s| {
            let y = self.value(s, x.rows, x.cols)?;
            if x.rows * x.cols > 0 {
                let pipeline = s.pipeline(Kernel::Rope, &[])?;
                let words = [x.rows, x.cols, x.offset, x.stride, head_dim / 2].map(|v| v as u32);
                let grid = folded((x.rows * x.cols / 2).div_ceil(EACH));
                Builder::new(&mut s.tape, pipeline, grid)
                    .reads(x)?
                    .turns(&turn)?
                    .writes(&y)?
                    .push(&words)
                    .shape([x.rows, x.cols, 0])
                    .flop(flops::pointwise(OpKind::Rope, [x.rows, x.cols]))
                    .launch();
            }
            Ok([y])
        })?;
        Ok(Tensor::whole(y, x.rows, x.cols))
    }
}

impl Turn {
    /// Its words in a key.
    pub(crate) fn name(&self, tape: &Tape, key: &mut Key) {
        match self {
            Turn::Kept(angles, rows) => {
                key.region(angles);
                tape.name(key, rows);
            }
            Turn::Brought(angles, rows) => {
                tape.name(key, angles);
                tape.name(key, rows);
            }
        }
    }
}

impl Builder<'_> {
    /// Angles, and the row of each row.
    pub(crate) fn turns(self, turn: &Turn) -> Result<Self> {
        match turn {
            Turn::Kept(angles, rows) => {
                let moved = angles.size.min(2 * rows.bytes * 64);
                Ok(self.reads_some(angles, moved).reads_value(rows)?)
            }
            Turn::Brought(angles, rows) => self.reads_value(angles)?.reads_value(rows),
        }
    }
}
