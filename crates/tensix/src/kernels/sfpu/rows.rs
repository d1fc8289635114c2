//! Programs that work along rows, which may be wider than a tile: statistics of norms, softmax.
//!
//! A tile of statistics at `stats`: group g of four rows (of eight) keeps one value a row in vector 4 g and
//! another in vector 4 g + 2; while accumulating, one for each lane.

use super::{
    L, L0, L1, L2, L3, L4, L5, L6, L7, MinusOne, NEXT_ROWS, ROW_VECTORS, STAY, add, constant, exp,
    inverse_sqrt, load, mad, minmax, mul, reciprocal, rotate, row_groups, store,
};
use crate::isa;
use crate::kernels::norm::NormForm;
use crate::rv::Asm;

/// Adds a value into all lanes of each row: `L[d]` = sum of `L[d]` over its row; clobbers `t`.
fn sum_lanes(a: &mut Asm, d: L, t: L) {
    for n in [1, 2, 4] {
        rotate(a, t, d, n);
        add(a, d, d, t);
    }
}

/// Both statistics = 0.
pub(in crate::kernels) fn stats_zero(a: &mut Asm, stats: u32) {
    row_groups(a, |a, o| {
        store(a, L::Zero, stats + o);
        a.tt(isa::sfpstore(L::Zero, NEXT_ROWS, stats + o + 2));
    });
}

/// Second statistic += `(x - first)²`, or first statistic += `x` if `sum`.
pub(in crate::kernels) fn stats_accumulate(a: &mut Asm, x: u32, stats: u32, sum: bool) {
    row_groups(a, |a, o| {
        for (d, v) in [L0, L1, L2, L3].into_iter().zip(ROW_VECTORS) {
            load(a, d, x + o + v);
        }
        load(a, L4, stats + o);
        if sum {
            add(a, L0, L0, L1);
            add(a, L2, L2, L3);
            add(a, L0, L0, L2);
            add(a, L4, L4, L0);
            a.tt(isa::sfpstore(L4, NEXT_ROWS, stats + o));
        } else {
            for d in [L0, L1, L2, L3] {
                a.tt(isa::sfpmad(d, L4, MinusOne, d));
            }
            load(a, L5, stats + o + 2);
            for d in [L0, L1, L2, L3] {
                mad(a, L5, d, d, L5);
            }
            a.tt(isa::sfpstore(L5, NEXT_ROWS, stats + o + 2));
        }
    });
}

/// First statistic = its row sum times `1 / n`: the mean.
pub(in crate::kernels) fn stats_mean(a: &mut Asm, stats: u32, n: u32) {
    row_groups(a, |a, o| {
        load(a, L0, stats + o);
        sum_lanes(a, L0, L1);
        constant(a, L2, 1.0 / n as f32);
        mul(a, L0, L0, L2);
        a.tt(isa::sfpstore(L0, NEXT_ROWS, stats + o));
    });
}

/// Second statistic = `1 / sqrt((its row sum - padding * first²) / n + eps)`: what `padding` columns of zeros
/// added to the sum of `(x - first)²` is taken out.
pub(in crate::kernels) fn stats_inverse_deviation(a: &mut Asm, stats: u32, n: u32, padding: u32, eps: f32) {
    row_groups(a, |a, o| {
        load(a, L1, stats + o + 2);
        sum_lanes(a, L1, L2);
        if padding > 0 {
            load(a, L0, stats + o);
            mul(a, L2, L0, L0);
            constant(a, L3, -(padding as f32));
            mad(a, L1, L2, L3, L1);
        }
        constant(a, L3, 1.0 / n as f32);
        constant(a, L4, eps);
        mad(a, L1, L1, L3, L4);
        inverse_sqrt(a, L2, L1);
        a.tt(isa::sfpstore(L2, NEXT_ROWS, stats + o + 2));
    });
}

/// `(x - first) * second * weight` and what the form adds, to x's tile.
pub(in crate::kernels) fn normalize(a: &mut Asm, form: NormForm, x: u32, weight: u32, bias: u32, stats: u32) {
    row_groups(a, |a, o| {
        load(a, L6, stats + o);
        load(a, L7, stats + o + 2);
        for (i, v) in ROW_VECTORS.into_iter().enumerate() {
            load(a, L0, x + o + v);
            mad(a, L0, L6, MinusOne, L0);
            load(a, L1, weight + o + v);
            mul(a, L0, L0, L7);
            if form != NormForm::Rms {
                load(a, L2, bias + o + v);
            }
            match form {
                NormForm::Layer => mad(a, L0, L0, L1, L2),
                NormForm::Rms => mul(a, L0, L0, L1),
                NormForm::Ada => {
                    add(a, L2, L2, L0);
                    mad(a, L0, L0, L1, L2);
                }
            }
            let step = if i == 3 { NEXT_ROWS } else { STAY };
            a.tt(isa::sfpstore(L0, step, x + o + v));
        }
    });
}

// ---- softmax: first statistic = row maximum, second = row sum of exponentials -------------------------------

/// What no score is below.
const FLOOR: f32 = -1.0e35;

/// First statistic = [`FLOOR`], second = 0.
pub(in crate::kernels) fn softmax_start(a: &mut Asm, stats: u32) {
    constant(a, L0, FLOOR);
    row_groups(a, |a, o| {
        store(a, L0, stats + o);
        a.tt(isa::sfpstore(L::Zero, NEXT_ROWS, stats + o + 2));
    });
}

/// `x = x * scale`, first statistic = its maximum so far.
pub(in crate::kernels) fn softmax_scores(a: &mut Asm, x: u32, stats: u32, scale: f32) {
    row_groups(a, |a, o| {
        load(a, L4, stats + o);
        constant(a, L5, scale);
        for v in ROW_VECTORS {
            load(a, L0, x + o + v);
            mul(a, L0, L0, L5);
            store(a, L0, x + o + v);
            minmax(a, L0, L4);
        }
        a.tt(isa::sfpstore(L4, NEXT_ROWS, stats + o));
    });
}

/// First statistic = its maximum over the row.
pub(in crate::kernels) fn softmax_maximum(a: &mut Asm, stats: u32) {
    row_groups(a, |a, o| {
        load(a, L5, stats + o);
        for n in [1, 2, 4] {
            rotate(a, L4, L5, n);
            minmax(a, L4, L5);
        }
        a.tt(isa::sfpstore(L5, NEXT_ROWS, stats + o));
    });
}

/// `2^13 + 1`: a product with it takes a value apart after 10 bits of its mantissa (Dekker).
const SPLIT: f32 = 8193.0;

/// `x = exp(x - first)`, rounded to the 10 bits of mantissa that the matrix unit reads, second statistic += it: what is
/// multiplied with the values then sums to what they are divided by.
pub(in crate::kernels) fn softmax_exponentials(a: &mut Asm, x: u32, stats: u32) {
    row_groups(a, |a, o| {
        for (i, v) in ROW_VECTORS.into_iter().enumerate() {
            load(a, L0, x + o + v);
            load(a, L1, stats + o);
            mad(a, L0, L1, MinusOne, L0);
            exp(a);
            constant(a, L1, SPLIT);
            mul(a, L1, L0, L1);
            mad(a, L2, L0, MinusOne, L1);
            mad(a, L0, L2, MinusOne, L1);
            store(a, L0, x + o + v);
            load(a, L6, stats + o + 2);
            add(a, L6, L6, L0);
            let step = if i == 3 { NEXT_ROWS } else { STAY };
            a.tt(isa::sfpstore(L6, step, stats + o + 2));
        }
    });
}

/// Second statistic = 1 / its row sum.
pub(in crate::kernels) fn softmax_inverse_sum(a: &mut Asm, stats: u32) {
    row_groups(a, |a, o| {
        load(a, L5, stats + o + 2);
        sum_lanes(a, L5, L4);
        reciprocal(a, L4, L5);
        a.tt(isa::sfpstore(L4, NEXT_ROWS, stats + o + 2));
    });
}

/// `x = x * second`.
pub(in crate::kernels) fn softmax_divide(a: &mut Asm, x: u32, stats: u32) {
    row_groups(a, |a, o| {
        load(a, L4, stats + o + 2);
        for (i, v) in ROW_VECTORS.into_iter().enumerate() {
            load(a, L0, x + o + v);
            mul(a, L0, L0, L4);
            let step = if i == 3 { NEXT_ROWS } else { STAY };
            a.tt(isa::sfpstore(L0, step, x + o + v));
        }
    });
}
