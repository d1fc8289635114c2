//! The one table of thresholds: how far each module may be from the judge, by number format.
//!
//! A bound is a unit roundoff times a growth that belongs to the module: how many such errors its result carries, in
//! root mean square. The growths are three to four times what was measured (`docs/accuracy.md`).

use std::fmt;
use std::str::FromStr;

use pi0_device::Bound;

use super::{Module, Part};
use crate::Config;

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
}

impl Format {
    /// Every format.
    pub const ALL: [Format; 4] = [Format::F32, Format::Bf16, Format::Int8, Format::Tf32];

    /// The largest relative error of one rounding: half a unit in the last place; a whole one where digits are cut off.
    /// For int8, half a step of 127.
    pub fn unit(self) -> f64 {
        match self {
            Format::F32 => 2f64.powi(-24),
            Format::Bf16 => 2f64.powi(-9),
            Format::Tf32 => 2f64.powi(-10),
            Format::Int8 => 1.0 / 254.0,
        }
    }

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Format::F32 => "f32",
            Format::Bf16 => "bf16",
            Format::Int8 => "int8",
            Format::Tf32 => "tf32",
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
        let known = || format!("{name:?} is no number format; known are f32, bf16, int8 and tf32");
        Format::ALL.into_iter().find(|f| f.name() == name).ok_or_else(known)
    }
}

/// Errors that a module's result carries.
struct Growth {
    /// Of rounding to f32.
    f32: f64,
    /// Of rounding the operands of products, beside those.
    products: f64,
    /// Of cutting off the operands of all products, beside those.
    cut: f64,
}

/// The growth of a module; of one made of layers, in proportion to their number.
fn growth(module: Module, config: &Config) -> Growth {
    use Module::*;
    let (vision, language) = (config.vision.num_hidden_layers, config.gemma.depth);
    let (layers, (f32, products, cut)) = match module {
        Positions => (1, (0.0, 0.0, 0.0)),
        TimeEmbedding => (1, (8.0, 0.0, 2.0)),
        Modulations => (1, (12.0, 0.0, 4.0)),
        Masks => (1, (15.0, 5.0, 8.0)),
        PatchEmbedding => (1, (25.0, 0.0, 2.0)),
        VisionAttention => (1, (12.0, 5.0, 4.0)),
        VisionMlp => (1, (8.0, 5.0, 2.0)),
        VisionBlock => (1, (15.0, 8.0, 5.0)),
        Projector => (1, (10.0, 6.0, 2.0)),
        VisionTower | Prefix => (vision, (15.0, 5.0, 4.0)),
        Gemma(_, Part::RmsNorm) => (1, (5.0, 0.0, 0.0)),
        Gemma(_, Part::GatedAdd) => (1, (3.0, 0.0, 0.0)),
        Gemma(_, Part::Rope) => (1, (4.0, 0.0, 0.0)),
        Gemma(_, Part::Attention) => (1, (20.0, 12.0, 8.0)),
        Gemma(_, Part::Mlp) => (1, (8.0, 6.0, 2.0)),
        Gemma(_, Part::Block) => (1, (22.0, 14.0, 32.0)),
        Gemma(_, Part::Stack) => (language, (30.0, 14.0, 12.0)),
        Suffix => (1, (14.0, 0.0, 5.0)),
        Denoise => (language, (40.0, 10.0, 12.0)),
        PaliGemma => (vision + language, (12.0, 5.0, 3.0)),
        Pi0 => (vision + language, (10.0, 3.0, 2.5)),
    };
    let layers = layers as f64;
    Growth { f32: layers * f32, products: layers * products, cut: layers * cut }
}

/// What `module` of a network of these sizes must reach in `format`, where the wanted values are `want`.
pub fn bound(module: Module, format: Format, config: &Config, want: &[f32]) -> Bound {
    let growth = growth(module, config);
    let rounding = growth.f32 * Format::F32.unit();
    let relative_l2 = match format {
        Format::F32 => rounding,
        Format::Bf16 | Format::Int8 => rounding + growth.products * format.unit(),
        Format::Tf32 => rounding + growth.cut * format.unit(),
    };
    let largest = want.iter().fold(0.0f64, |m, &x| m.max(f64::from(x).abs()));
    Bound {
        // An error of relative size r, orthogonal to the values, costs r² / 2 of correlation.
        pcc: 1.0 - (2.0 * relative_l2).powi(2).max(1e-12),
        relative_l2,
        max_abs: 4.0 * relative_l2 * largest,
    }
}
