//! Rotary position embedding from a table of sines and cosines that grows as positions are met.

use std::collections::HashMap;
use std::sync::{Arc, PoisonError, RwLock};

use crate::math::{fma, per_isa};

/// Positions beyond this are computed each time: no prompt is so long, and a table must not eat memory.
const MOST_KEPT: usize = 1 << 14;

/// `[positions][cos of head_dim / 2, sin of head_dim / 2]`.
type Table = Arc<Vec<f32>>;

/// The tables of each head width.
#[derive(Debug, Default)]
pub(crate) struct Tables(RwLock<HashMap<usize, Table>>);

impl Tables {
    /// A table that covers the kept ones of `positions`.
    fn covering(&self, positions: &[u32], head_dim: usize) -> Table {
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
fn rotate_body<const FMA: bool>(heads: &mut [f32], angles: &[f32]) {
    let half = angles.len() / 2;
    let (cos, sin) = angles.split_at(half);
    for head in heads.chunks_exact_mut(angles.len()) {
        let (a, b) = head.split_at_mut(half);
        for i in 0..half {
            let (x, y) = (a[i], b[i]);
            a[i] = fma::<FMA>(x, cos[i], -y * sin[i]);
            b[i] = fma::<FMA>(y, cos[i], x * sin[i]);
        }
    }
}

per_isa! {
    fn rotate(heads: &mut [f32], angles: &[f32]) = rotate_body
}

/// The positions of rows, and their angles.
pub(crate) struct Rope<'a> {
    table: Table,
    positions: &'a [u32],
    pub(crate) head_dim: usize,
}

impl<'a> Rope<'a> {
    /// Of rows at `positions`.
    pub(crate) fn new(tables: &Tables, positions: &'a [u32], head_dim: usize) -> Self {
        Self { table: tables.covering(positions, head_dim), positions, head_dim }
    }

    /// Rotates whole heads of row `row`.
    pub(crate) fn rotate(&self, isa: crate::Isa, row: usize, heads: &mut [f32]) {
        let (position, dim) = (self.positions[row], self.head_dim);
        let at = position as usize;
        match self.table.get(at * dim..(at + 1) * dim) {
            Some(kept) => rotate(isa, heads, kept),
            None => rotate(isa, heads, &angles(position, dim)),
        }
    }
}
