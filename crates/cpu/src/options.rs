//! How to open the device.

use std::fmt;
use std::str::FromStr;

use crate::Isa;

/// Number format of packed linear weights. Those marked `exact` are always f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// bf16 where the checkpoint stores bf16, else f32.
    #[default]
    Stored,
    /// f32.
    F32,
    /// bf16, rounded to nearest even; multiplied with activations in bf16 where the processor has such products, and
    /// summed in f32.
    Bf16,
    /// int8 with a scale for each output; multiplied with activations in int8 with a scale for each row.
    Int8,
}

impl Format {
    /// The name used on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Format::Stored => "stored",
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
        [Format::Stored, Format::F32, Format::Bf16, Format::Int8]
            .into_iter()
            .find(|f| f.name() == name)
            .ok_or_else(|| format!("no format is called {name}; there are stored, f32, bf16 and int8"))
    }
}

/// What [`Cpu::new`](crate::Cpu::new) may be told.
#[derive(Debug, Clone, Default)]
pub struct CpuOptions {
    /// Instruction set; the fastest that is present when none.
    pub isa: Option<Isa>,
    /// Threads in all; the physical cores when none.
    pub threads: Option<usize>,
    /// Number format of packed weights.
    pub format: Format,
}

impl CpuOptions {
    /// For who is right: all arithmetic in f32. Weights stored in bf16 stay so, half the memory, on the fastest instruction set
    /// that widens them exactly instead of rounding what they are multiplied with.
    pub fn exact() -> Self {
        let isa = Isa::available().into_iter().rev().find(|isa| !isa.multiplies_bf16());
        Self { isa, ..Self::default() }
    }
}

/// Why the device does not open.
#[derive(Debug, thiserror::Error)]
pub enum CpuError {
    /// The processor or the system lacks the instruction set asked for.
    #[error("this machine has no {wanted}; it has {}", .present.iter().map(|i| i.name()).collect::<Vec<_>>().join(", "))]
    Isa {
        /// What was asked for.
        wanted: Isa,
        /// What there is.
        present: Vec<Isa>,
    },
    /// Threads could not be started.
    #[error("cannot start {count} threads: {source}")]
    Threads {
        /// How many were asked for.
        count: usize,
        /// What the system says.
        source: std::io::Error,
    },
}
