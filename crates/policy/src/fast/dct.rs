//! The cosine transform of FAST: orthonormal DCT-II along time, and its inverse.

use std::f64::consts::{PI, SQRT_2};

/// `basis[k * steps + t]`: how much frequency `k` weighs at time `t`.
fn basis(steps: usize) -> Vec<f64> {
    let mut table = Vec::with_capacity(steps * steps);
    for k in 0..steps {
        // Of frequency 0 `sqrt(1 / steps)`, as scipy's library puts it together: where a coefficient lies halfway between two
        // whole numbers, its last bit decides.
        let factor = match k {
            0 => 2.0 * (0.5 / steps as f64).sqrt() * (SQRT_2 * 0.5),
            _ => (2.0 / steps as f64).sqrt(),
        };
        for t in 0..steps {
            // Reduced as whole numbers, so that the cosine gets a small argument.
            let turn = k * (2 * t + 1) % (4 * steps);
            table.push(factor * (PI * turn as f64 / (2 * steps) as f64).cos());
        }
    }
    table
}

/// Frequencies `[steps, dims]` of a chunk `[steps, dims]`.
pub(super) fn forward(chunk: &[f64], steps: usize, dims: usize) -> Vec<f64> {
    let basis = basis(steps);
    let mut out = vec![0.0; steps * dims];
    for (k, out) in out.chunks_exact_mut(dims.max(1)).enumerate() {
        for (row, weight) in chunk.chunks_exact(dims.max(1)).zip(&basis[k * steps..]) {
            out.iter_mut().zip(row).for_each(|(o, x)| *o += weight * x);
        }
    }
    out
}

/// The chunk `[steps, dims]` with these frequencies.
pub(super) fn inverse(frequencies: &[f64], steps: usize, dims: usize) -> Vec<f64> {
    let basis = basis(steps);
    let mut out = vec![0.0; steps * dims];
    for (t, out) in out.chunks_exact_mut(dims.max(1)).enumerate() {
        for (k, row) in frequencies.chunks_exact(dims.max(1)).enumerate() {
            let weight = basis[k * steps + t];
            out.iter_mut().zip(row).for_each(|(o, x)| *o += weight * x);
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn one_undoes_the_other() {
        for (steps, dims) in [(1, 3), (2, 1), (10, 4), (50, 7)] {
            let chunk: Vec<f64> = (0..steps * dims).map(|i| ((i * 37 % 101) as f64 / 50.0) - 1.0).collect();
            let back = inverse(&forward(&chunk, steps, dims), steps, dims);
            let far = chunk.iter().zip(&back).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
            assert!(far < 1e-14, "{steps} {far}");
        }
    }

    #[test]
    fn a_constant_is_its_first_frequency() {
        let frequencies = forward(&[3.0; 16], 16, 1);
        assert!((frequencies[0] - 12.0).abs() < 1e-14, "{frequencies:?}");
        assert!(frequencies[1..].iter().all(|x| x.abs() < 1e-14), "{frequencies:?}");
    }
}
