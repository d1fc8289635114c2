//! Rotary position embedding from a table of sines and cosines that grows as positions are met.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use crate::math::{fma, per_isa};

/// Positions beyond this are computed each time: no prompt is so long, and a table must not eat memory.
const MOST_KEPT: usize = 1 << 14;

/// `[positions][cos of head_dim / 2, sin of head_dim / 2]`.
pub(crate) type Table = Arc<Vec<f32>>;

/// The tables of each head width.
#[derive(Debug, Default)]
pub(crate) struct Tables(RwLock<HashMap<usize, Table>>);

impl Tables {
    /// A table that covers the kept ones of `positions`.
    pub(crate) fn covering(&self, positions: &[u32], head_dim: usize) -> Table {
        let most = positions.iter().copied().max().map_or(0, |p| p as usize);
        let wanted = (most + 1).min(MOST_KEPT);
        {
            let tables = self.0.read().unwrap_or_else(PoisonError::into_inner);
            if let Some(t) = tables.get(&head_dim)
                && t.len() >= wanted * head_dim
            {
                return Arc::clone(t);
            }
        }
        let rows = wanted.next_power_of_two().max(64);
        let table: Table = Arc::new((0..rows).flat_map(|p| angles(p as u32, head_dim)).collect());
        self.0.write().unwrap_or_else(PoisonError::into_inner).insert(head_dim, Arc::clone(&table));
        table
    }
}

/// Cosines, then sines, of one position; frequency and angle in f32 as the references have them.
fn angles(position: u32, head_dim: usize) -> Vec<f32> {
    let angle = |i: usize| {
        let inv_freq = 1.0 / 10000f32.powf((2 * i) as f32 / head_dim as f32);
        position as f32 * inv_freq
    };
    let half = 0..head_dim / 2;
    half.clone().map(|i| angle(i).cos()).chain(half.map(|i| angle(i).sin())).collect()
}

#[inline(always)]
fn rotate_body<const FMA: bool>(x: &[f32], angles: &[f32], head_dim: usize, out: &mut [f32]) {
    let half = head_dim / 2;
    let (cos, sin) = angles.split_at(half);
    for (x, out) in x.chunks_exact(head_dim).zip(out.chunks_exact_mut(head_dim)) {
        let ((a, b), (out_a, out_b)) = (x.split_at(half), out.split_at_mut(half));
        for i in 0..half {
            out_a[i] = fma::<FMA>(a[i], cos[i], -b[i] * sin[i]);
            out_b[i] = fma::<FMA>(b[i], cos[i], a[i] * sin[i]);
        }
    }
}

per_isa! {
    fn rotate(x: &[f32], angles: &[f32], head_dim: usize, out: &mut [f32]) = rotate_body
}

/// Rotates one row of whole heads.
pub(crate) fn rotate_row(
    isa: crate::Isa,
    table: &Table,
    position: u32,
    head_dim: usize,
    x: &[f32],
    out: &mut [f32],
) {
    let at = position as usize;
    match table.get(at * head_dim..(at + 1) * head_dim) {
        Some(kept) => rotate(isa, x, kept, head_dim, out),
        None => rotate(isa, x, &angles(position, head_dim), head_dim, out),
    }
}
