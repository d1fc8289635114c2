//! Between a robot's units and the network's: z-scores and ranges, each in the arithmetic of its origin.

use serde::Serialize;

/// Statistics of one vector, one value a dimension.
#[derive(Debug, Clone, PartialEq)]
pub struct Stats {
    /// Means, or the values that map to -1.
    pub a: Vec<f64>,
    /// Standard deviations, or the values that map to 1.
    pub b: Vec<f64>,
}

impl Stats {
    /// Says what is wrong with statistics of these names.
    pub(crate) fn check(&self, [a, b]: [&str; 2]) -> Result<(), String> {
        if self.a.is_empty() || self.a.len() != self.b.len() {
            return Err(format!("{a} has {} values, {b} has {}", self.a.len(), self.b.len()));
        }
        for (name, values) in [(a, &self.a), (b, &self.b)] {
            if let Some(i) = values.iter().position(|x| !(*x as f32).is_finite()) {
                let value = if values[i].is_nan() { "null or NaN".into() } else { values[i].to_string() };
                return Err(format!("{name}[{i}] is {value}; were the statistics never set?"));
            }
        }
        if b == "std" {
            return match self.b.iter().position(|x| *x < 0.0) {
                Some(i) => Err(format!("std[{i}] is negative")),
                None => Ok(()),
            };
        }
        if let Some(i) = self.a.iter().zip(&self.b).position(|(low, high)| low > high) {
            let (low, high) = (self.a[i], self.b[i]);
            return Err(format!("{a}[{i}] is {low}, above {b}[{i}], which is {high}: are they swapped?"));
        }
        match self.a == self.b {
            true => Err(format!("{a} and {b} are equal in every dimension: were they never computed?")),
            false => Ok(()),
        }
    }
}

/// The formula. With a = mean or low, b = standard deviation or high:
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Formula {
    /// `(x - a) / (b + 1e-6)` and its inverse, in f64.
    OpenPiZScore,
    /// `(x - a) / (b - a + 1e-6) * 2 - 1` and its inverse, in f64.
    OpenPiQuantile,
    /// `(x - a) / (b + eps)`; back `x * b + a`, without eps. In f32.
    LerobotMeanStd,
    /// `2 (x - a) / d - 1` with `d = b - a`, or eps where that is 0; back `(x + 1) d / 2 + a`. In f32.
    LerobotRange,
}

/// Epsilon of openpi, where it always applies.
pub const OPENPI_EPS: f64 = 1e-6;

/// A normalization of one vector, state or action.
#[derive(Debug, Clone, PartialEq)]
pub struct Normalizer {
    /// How.
    pub formula: Formula,
    /// Per dimension.
    pub stats: Stats,
    /// Of lerobot's formulas; openpi's have their own.
    pub eps: f64,
}

impl Normalizer {
    /// Dimensions that have statistics.
    pub fn width(&self) -> usize {
        self.stats.a.len()
    }

    /// The only width that the formula takes, if there is one: lerobot's statistics must fit, unless they are a
    /// single value; openpi's are cut or padded.
    pub fn needs_width(&self) -> Option<usize> {
        match self.formula {
            Formula::OpenPiZScore | Formula::OpenPiQuantile => None,
            Formula::LerobotMeanStd | Formula::LerobotRange => Some(self.width()).filter(|&width| width > 1),
        }
    }

    /// Dimensions whose low and high statistics are equal. Of deviations lerobot and openpi add an epsilon in time.
    pub(crate) fn still(&self) -> Vec<usize> {
        match self.formula {
            Formula::OpenPiZScore | Formula::LerobotMeanStd => Vec::new(),
            Formula::OpenPiQuantile | Formula::LerobotRange => {
                let equal = |&i: &usize| self.stats.a[i] == self.stats.b[i];
                (0..self.width()).filter(equal).collect()
            }
        }
    }

    /// Statistics of dimension `i`. Beyond the last one openpi pads with mean 0 and deviation 1; lerobot's single
    /// values broadcast.
    fn at(&self, i: usize) -> Option<(f64, f64)> {
        let Stats { a, b } = &self.stats;
        match self.formula {
            _ if i < a.len() => Some((a[i], b[i])),
            Formula::OpenPiZScore => Some((0.0, 1.0)),
            Formula::LerobotMeanStd | Formula::LerobotRange if a.len() == 1 => Some((a[0], b[0])),
            _ => None,
        }
    }

    /// Robot's units to the network's, in place. Dimensions without statistics stay.
    pub fn forward(&self, x: &mut [f64]) {
        for (i, x) in x.iter_mut().enumerate() {
            let Some((a, b)) = self.at(i) else { continue };
            *x = match self.formula {
                Formula::OpenPiZScore => (*x - a) / (b + OPENPI_EPS),
                Formula::OpenPiQuantile => (*x - a) / (b - a + OPENPI_EPS) * 2.0 - 1.0,
                Formula::LerobotMeanStd => {
                    let (x, a, b) = (*x as f32, a as f32, b as f32);
                    f64::from((x - a) / (b + self.eps as f32))
                }
                Formula::LerobotRange => {
                    let (x, a, d) = (*x as f32, a as f32, self.span(a, b));
                    f64::from(2.0 * (x - a) / d - 1.0)
                }
            };
        }
    }

    /// The network's units to the robot's, in place. Dimensions without statistics stay.
    pub fn inverse(&self, x: &mut [f64]) {
        for (i, x) in x.iter_mut().enumerate() {
            let Some((a, b)) = self.at(i) else { continue };
            *x = match self.formula {
                Formula::OpenPiZScore => *x * (b + OPENPI_EPS) + a,
                Formula::OpenPiQuantile => (*x + 1.0) / 2.0 * (b - a + OPENPI_EPS) + a,
                Formula::LerobotMeanStd => f64::from(*x as f32 * b as f32 + a as f32),
                Formula::LerobotRange => f64::from((*x as f32 + 1.0) * self.span(a, b) / 2.0 + a as f32),
            };
        }
    }

    fn span(&self, a: f64, b: f64) -> f32 {
        let span = b as f32 - a as f32;
        if span == 0.0 { self.eps as f32 } else { span }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn normalizer(formula: Formula, a: &[f64], b: &[f64]) -> Normalizer {
        Normalizer { formula, stats: Stats { a: a.into(), b: b.into() }, eps: 1e-8 }
    }

    fn both(n: &Normalizer, x: &[f64]) -> (Vec<f64>, Vec<f64>) {
        let (mut forward, mut inverse) = (x.to_vec(), x.to_vec());
        n.forward(&mut forward);
        n.inverse(&mut inverse);
        (forward, inverse)
    }

    #[test]
    fn openpi_has_its_epsilon_both_ways() {
        let (forward, inverse) = both(&normalizer(Formula::OpenPiZScore, &[1.0], &[0.0]), &[2.0]);
        assert_eq!(forward, [1.0 / 1e-6]);
        assert_eq!(inverse, [2.0 * 1e-6 + 1.0]);
        let (forward, inverse) = both(&normalizer(Formula::OpenPiQuantile, &[1.0], &[3.0]), &[2.0]);
        assert_eq!(forward, [1.0 / (2.0 + 1e-6) * 2.0 - 1.0]);
        assert_eq!(inverse, [1.5 * (2.0 + 1e-6) + 1.0]);
    }

    #[test]
    fn lerobot_has_it_forward_only_and_computes_in_f32() {
        let (forward, inverse) = both(&normalizer(Formula::LerobotMeanStd, &[1.0], &[0.0]), &[1.5]);
        assert_eq!(forward, [f64::from(0.5f32 / 1e-8f32)]);
        assert_eq!(inverse, [1.0]);
        let (forward, inverse) = both(&normalizer(Formula::LerobotMeanStd, &[0.1], &[0.3]), &[0.7]);
        assert_eq!(forward, [f64::from((0.7f32 - 0.1) / (0.3 + 1e-8))]);
        assert_eq!(inverse, [f64::from(0.7f32 * 0.3 + 0.1)]);
    }

    #[test]
    fn lerobot_ranges_use_epsilon_only_for_an_empty_range() {
        let (forward, inverse) =
            both(&normalizer(Formula::LerobotRange, &[1.0, 5.0], &[3.0, 5.0]), &[2.0, 5.0]);
        assert_eq!(forward, [0.0, -1.0]);
        assert_eq!(inverse[0], 4.0);
        assert!((inverse[1] - 5.0).abs() < 1e-6);
    }

    /// openpi slices statistics to the data going in, and pads them coming out: quantiles pass the rest through.
    #[test]
    fn openpi_tolerates_other_widths() {
        let z = normalizer(Formula::OpenPiZScore, &[1.0, 7.0, 8.0], &[2.0, 1.0, 1.0]);
        assert_eq!(both(&z, &[3.0]).0, [2.0 / (2.0 + 1e-6)]);
        let z = normalizer(Formula::OpenPiZScore, &[1.0], &[2.0]);
        assert_eq!(both(&z, &[3.0, 5.0]).1, [3.0 * (2.0 + 1e-6) + 1.0, 5.0 * (1.0 + 1e-6)]);
        let q = normalizer(Formula::OpenPiQuantile, &[0.0], &[1.0]);
        assert_eq!(both(&q, &[0.0, 5.0]).1[1], 5.0);
    }
}
