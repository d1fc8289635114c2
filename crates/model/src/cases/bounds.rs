//! The one table of thresholds: how far each module may be from the judge, by number format.
//!
//! A bound is the format's unit roundoff times a growth that belongs to the module: how many roundings its result
//! carries, in root mean square, tightened to four times what was measured (`docs/accuracy.md`).

use std::fmt;
use std::str::FromStr;

use pi0_device::Bound;

use super::{Module, Part};

/// Number format that a device computes its linear layers in: the coarsest rounding on the way.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// Weights as stored, activations and sums in f32.
    F32,
    /// Activations rounded to bf16.
    Bf16,
    /// Weights or activations rounded to 8-bit integers with a scale for each row or block.
    Int8,
}

impl Format {
    /// Every format.
    pub const ALL: [Format; 3] = [Format::F32, Format::Bf16, Format::Int8];

    /// The largest relative error of one rounding: half a unit in the last place. For int8, half a step of 127.
    pub fn unit(self) -> f64 {
        match self {
            Format::F32 => 2f64.powi(-24),
            Format::Bf16 => 2f64.powi(-9),
            Format::Int8 => 1.0 / 254.0,
        }
    }

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Format::F32 => "f32",
            Format::Bf16 => "bf16",
            Format::Int8 => "int8",
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
        let known = || format!("{name:?} is no number format; known are f32, bf16 and int8");
        Format::ALL.into_iter().find(|f| f.name() == name).ok_or_else(known)
    }
}

/// Roundings that a module's result carries.
fn growth(module: Module) -> f64 {
    use Module::*;
    match module {
        Positions => 0.0,
        TimeEmbedding | Gemma(_, Part::RmsNorm) => 4.0,
        Gemma(_, Part::Rope) | PatchEmbedding | Projector => 6.0,
        Masks | VisionAttention | VisionMlp | Suffix => 10.0,
        VisionBlock | Gemma(_, Part::Attention | Part::Mlp) => 12.0,
        Gemma(_, Part::Block) => 16.0,
        VisionTower | Prefix => 24.0,
        Gemma(_, Part::Stack) | PaliGemma => 40.0,
        Denoise | Pi0 => 60.0,
    }
}

/// What `module` must reach in `format`, where the wanted values are `want`.
pub fn bound(module: Module, format: Format, want: &[f32]) -> Bound {
    let relative_l2 = growth(module) * format.unit();
    let largest = want.iter().fold(0.0f64, |m, &x| m.max(f64::from(x).abs()));
    Bound {
        // An error of relative size r, orthogonal to the values, costs r² / 2 of correlation.
        pcc: 1.0 - (2.0 * relative_l2).powi(2).max(1e-12),
        relative_l2,
        max_abs: 4.0 * relative_l2 * largest,
    }
}
