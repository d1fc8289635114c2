//! How far a result may be from the judge's: [`SAFETY`] times what a right device of the format is off by.
//!
//! What that is nobody measures on a device: the judge's own run with random roundings says it ([`Rounded`], where the
//! variances are derived from the number format, the depth of the sums and the sizes of the operands). One such run is a
//! draw `d` of the error, a right device's error `e` another one, and the variance of `e` is at most that of `d`, in
//! whatever order the device sums. With `ν` directions in which either may go, each alike, `|e|² / |d|²` has an
//! F-distribution of `ν` and `ν` degrees of freedom, or is smaller. That it is above `SAFETY²` has a probability of 4e-4
//! for `ν = 8`, 3e-7 for 16 and 6e-13 for 32. Results of fewer than [`VALUES`] values are drawn several times, and so are those
//! whose values move in groups ([`bounds_of_groups`]): else the largest difference, which one group may have alone, would be
//! held against a single draw of that group.
//!
//! [`Rounded`]: super::Rounded

use std::fmt;
use std::str::FromStr;

use pi0_device::{Agreement, Bound, HostTensor, compare};

use super::Outputs;

/// Where a device rounds.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Everything in f32.
    F32,
    /// The operands of matrix products and attention in bf16; sums and activations in f32, and so are the layers that
    /// the references keep in f32.
    Bf16,
    /// Weights and operands of linear layers in 8-bit integers with a scale for each row; the rest as for bf16.
    Int8,
    /// The operands of all matrix products cut off to 10 bits of mantissa, those of the layers that the references keep
    /// in f32 too; sums and activations in f32.
    Tf32,
    /// As for tf32, with the weights of linear layers and what they multiply in eight bits.
    Bfp8,
}

impl Format {
    /// Every format.
    pub const ALL: [Format; 5] = [Format::F32, Format::Bf16, Format::Int8, Format::Tf32, Format::Bfp8];

    /// The largest relative error of one rounding: half a unit in the last place; a whole one where digits are cut off.
    /// For int8 and bfp8, half a step of 127.
    pub fn unit(self) -> f64 {
        match self {
            Format::F32 => 2f64.powi(-24),
            Format::Bf16 => 2f64.powi(-9),
            Format::Tf32 => 2f64.powi(-10),
            Format::Int8 | Format::Bfp8 => 1.0 / 254.0,
        }
    }

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Format::F32 => "f32",
            Format::Bf16 => "bf16",
            Format::Int8 => "int8",
            Format::Tf32 => "tf32",
            Format::Bfp8 => "bfp8",
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Format {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        let known = || format!("{name:?} is no number format; known are f32, bf16, int8, tf32 and bfp8");
        Format::ALL.into_iter().find(|f| f.name() == name).ok_or_else(known)
    }
}

/// How many times as large as a draw an error may be.
pub const SAFETY: f64 = 4.0;

/// Values that the draws of one result should have together; where they move in groups, groups.
pub const VALUES: usize = 256;

/// Draws of one result at most.
const MOST: usize = 16;

/// What each of `want` must reach, where `draw(seed)` computes the same with random roundings. A result that no rounding
/// changes must be equal.
///
/// # Errors
/// Those of `draw`.
///
/// # Panics
/// If `draw` makes other results than `want`: both come of the same operations.
pub fn bounds<E>(
    want: &[(String, HostTensor)],
    draw: impl FnMut(u64) -> Result<Outputs, E>,
) -> Result<Vec<Bound>, E> {
    bounds_of_groups(want, 1, draw)
}

/// The same where one rounding may move up to `together` values alike, so that only as many times fewer directions are
/// left: attention, where one key may have nearly all the weight of a query and head, and the rounding of that weight is
/// the whole error of the head's values.
///
/// # Errors
/// Those of `draw`.
///
/// # Panics
/// As [`bounds`].
pub fn bounds_of_groups<E>(
    want: &[(String, HostTensor)],
    together: usize,
    mut draw: impl FnMut(u64) -> Result<Outputs, E>,
) -> Result<Vec<Bound>, E> {
    let mut draws: Vec<Vec<Agreement>> = vec![vec![]; want.len()];
    let mut wanted = 1;
    for seed in 0..MOST as u64 {
        if seed as usize >= wanted {
            break;
        }
        let drawn = draw(seed + 1)?;
        assert_eq!(drawn.len(), want.len(), "the judge gave other results the second time");
        for (((name, want), (_, drawn)), draws) in want.iter().zip(&drawn).zip(&mut draws) {
            assert_eq!(drawn.shape, want.shape, "{name}");
            let agreement = compare(&drawn.data, &want.data);
            if agreement.max_abs > 0.0 {
                wanted = wanted.max((VALUES * together).div_ceil(agreement.count));
            }
            draws.push(agreement);
        }
    }
    Ok(draws.iter().map(|draws| bound(draws)).collect())
}

/// What a result must reach whose draws were these: each as it compares with the wanted values.
pub fn bound(draws: &[Agreement]) -> Bound {
    let most = |f: fn(&Agreement) -> f64| draws.iter().map(f).fold(0.0, f64::max);
    let mean = draws.iter().map(|a| a.relative_l2.powi(2)).sum::<f64>() / draws.len() as f64;
    let relative_l2 = SAFETY * mean.sqrt();
    // An error of relative size r, orthogonal to the values, costs r² / 2 of correlation, and more where the values hardly
    // vary around their mean; sums of squares in f64 leave 1e-12.
    let lost = (SAFETY * SAFETY * most(|a| 1.0 - a.pcc)).max(relative_l2 * relative_l2).max(1e-12);
    Bound { pcc: 1.0 - lost, relative_l2, max_abs: SAFETY * most(|a| a.max_abs) }
}

#[cfg(test)]
mod tests {
    use std::convert::Infallible;

    use super::*;

    /// A query's head whose one key has all the weight: a rounding moves its 256 values alike, and nothing else does.
    #[test]
    fn values_that_move_together_are_drawn_as_often_as_they_are_groups() {
        let values: Vec<f32> = (0..2 * 256).map(|i| 1.0 + i as f32 / 512.0).collect();
        let named = |values: Vec<f32>| vec![(String::new(), HostTensor::new([2, 256], values))];
        let want = named(values.clone());
        // Both groups were nearly lucky in the first draw, and not in others.
        let off = |seed: u64| if seed == 1 { 1e-5 } else { 1e-3 };
        let draw = |seed| Ok::<_, Infallible>(named(values.iter().map(|x| x * (1.0 + off(seed))).collect()));
        let mut drawn = 0;
        let mut count = |seed| {
            drawn += 1;
            draw(seed)
        };
        let Ok(single) = bounds_of_groups(&want, 1, &mut count);
        let Ok(groups) = bounds_of_groups(&want, 256, &mut count);
        assert_eq!(drawn, 1 + MOST, "one draw of 512 values; of two groups as many as there may be");
        let usual = compare(&draw(7).unwrap_or_else(|e| match e {})[0].1.data, &values);
        assert!(!single[0].holds(&usual) && groups[0].holds(&usual), "{single:?} {groups:?}");
        assert_eq!(single[0].missed(&usual).len(), 2, "{:?}", single[0].missed(&usual));
    }
}
