//! How alike two results are. Correlation alone is blind to scale and offset, so every bound asserts three
//! measures, and NaN fails each of them.

use std::fmt;

/// How `got` relates to `want`.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Agreement {
    /// Pearson correlation. Where the wanted values do not vary it says nothing, and is 1 if `relative_l2` is
    /// below 1e-3, else 0.
    pub pcc: f64,
    /// `|got - want| / |want|`, Euclidean norms; infinite if only `want` is zero.
    pub relative_l2: f64,
    /// Largest absolute difference; NaN if any value on either side is not a number.
    pub max_abs: f64,
    /// Where the largest difference (or the first NaN) is, as an index in C order.
    pub worst_index: usize,
    /// Values compared.
    pub count: usize,
}

/// What an [`Agreement`] must reach.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Bound {
    /// Least correlation.
    pub pcc: f64,
    /// Largest relative L2.
    pub relative_l2: f64,
    /// Largest absolute difference.
    pub max_abs: f64,
}

impl Bound {
    /// Whether the agreement is within the bound. False for NaN and for an empty comparison.
    pub fn holds(&self, a: &Agreement) -> bool {
        a.count > 0 && a.pcc >= self.pcc && a.relative_l2 <= self.relative_l2 && a.max_abs <= self.max_abs
    }

    /// Each measure that is out of its bound, in words.
    pub fn missed(&self, a: &Agreement) -> Vec<String> {
        // A comparison with NaN holds nothing.
        let held = [a.pcc >= self.pcc, a.relative_l2 <= self.relative_l2, a.max_abs <= self.max_abs];
        let words = [
            format!("PCC {:.8}, at least {:.8}", a.pcc, self.pcc),
            format!("relative L2 {:.2e}, at most {:.2e}", a.relative_l2, self.relative_l2),
            format!("max abs {:.2e}, at most {:.2e}", a.max_abs, self.max_abs),
        ];
        words.into_iter().zip(held).filter(|(_, held)| !held).map(|(words, _)| words).collect()
    }
}

impl fmt::Display for Agreement {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { pcc, relative_l2, max_abs, worst_index, .. } = self;
        write!(f, "pcc {pcc:.8} relative L2 {relative_l2:.2e} max abs {max_abs:.2e} at {worst_index}")
    }
}

/// Compares two equally long lists of values, in f64.
///
/// # Panics
/// If the lengths differ: shapes are compared before values.
pub fn compare(got: &[f32], want: &[f32]) -> Agreement {
    assert_eq!(got.len(), want.len(), "compare: {} values against {}", got.len(), want.len());
    let n = got.len() as f64;
    let (mut max_abs, mut worst_index) = (0.0f64, 0);
    let (mut diff2, mut want2) = (0.0f64, 0.0f64);
    let (mut sum_g, mut sum_w) = (0.0f64, 0.0f64);
    for (i, (&g, &w)) in got.iter().zip(want).enumerate() {
        let (g, w) = (f64::from(g), f64::from(w));
        let d = (g - w).abs();
        // `inf - inf` is NaN too: an overflow on both sides is no agreement.
        if d.is_nan() {
            return Agreement {
                pcc: f64::NAN,
                relative_l2: f64::NAN,
                max_abs: f64::NAN,
                worst_index: i,
                count: got.len(),
            };
        }
        if d > max_abs {
            (max_abs, worst_index) = (d, i);
        }
        diff2 += d * d;
        want2 += w * w;
        sum_g += g;
        sum_w += w;
    }
    let (mean_g, mean_w) = (sum_g / n, sum_w / n);
    let (mut cov, mut var_g, mut var_w) = (0.0f64, 0.0f64, 0.0f64);
    for (&g, &w) in got.iter().zip(want) {
        let (g, w) = (f64::from(g) - mean_g, f64::from(w) - mean_w);
        cov += g * w;
        var_g += g * g;
        var_w += w * w;
    }
    let relative_l2 = if diff2 == 0.0 { 0.0 } else { (diff2 / want2).sqrt() };
    // "Does not vary" up to rounding of the mean itself.
    let constant = var_w <= 1e-14 * want2;
    let pcc = match constant {
        true => f64::from(u8::from(relative_l2 < 1e-3)),
        false if var_g == 0.0 => 0.0,
        false => cov / (var_g.sqrt() * var_w.sqrt()),
    };
    Agreement { pcc, relative_l2, max_abs, worst_index, count: got.len() }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIGHT: Bound = Bound { pcc: 0.999, relative_l2: 1e-3, max_abs: 1e-2 };

    #[test]
    fn equal_values_agree() {
        let a = compare(&[1.0, -2.0, 3.0], &[1.0, -2.0, 3.0]);
        assert!(TIGHT.holds(&a) && a.max_abs == 0.0 && (a.pcc - 1.0).abs() < 1e-12, "{a}");
    }

    #[test]
    fn scale_and_offset_pass_correlation_but_not_the_bound() {
        let want = [1.0, 2.0, 3.0, 4.0];
        for got in [want.map(|x| x * 1.1), want.map(|x| x + 0.5)] {
            let a = compare(&got, &want);
            assert!(a.pcc > 0.9999 && !TIGHT.holds(&a), "{a}");
        }
    }

    #[test]
    fn constant_output_fails() {
        let a = compare(&[2.5; 4], &[1.0, 2.0, 3.0, 4.0]);
        assert!(a.pcc == 0.0 && !TIGHT.holds(&a));
        assert!(TIGHT.holds(&compare(&[0.7; 4], &[0.7; 4])));
        assert!(!TIGHT.holds(&compare(&[0.8; 4], &[0.7; 4])));
    }

    #[test]
    fn nan_infinity_and_nothing_fail() {
        let loose = Bound { pcc: -1.0, relative_l2: f64::INFINITY, max_abs: f64::INFINITY };
        for (got, want) in
            [(f32::NAN, 1.0), (1.0, f32::NAN), (f32::NAN, f32::NAN), (f32::INFINITY, f32::INFINITY)]
        {
            let a = compare(&[0.0, got], &[0.0, want]);
            assert!(!loose.holds(&a) && a.worst_index == 1, "{got} {want}: {a}");
        }
        assert!(!loose.holds(&compare(&[], &[])));
    }

    #[test]
    fn worst_index_is_found() {
        assert_eq!(compare(&[1.0, 2.0, 9.0, 4.0], &[1.0, 2.5, 3.0, 4.0]).worst_index, 2);
    }
}
