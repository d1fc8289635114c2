//! What the machine can do at most, measured here and now: the yardstick of every share.

use anyhow::Result;
use pi0_cpu::peak::Peaks;
use pi0_model::cases::Format;
use serde::{Deserialize, Serialize};

use crate::device::{DeviceArgs, DeviceKind};

/// Measured limits of the CPU, on the threads that the device uses.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Limits {
    /// GFLOP/s in f32.
    pub f32: Option<f64>,
    /// GFLOP/s of the fastest bf16 products.
    pub bf16: Option<f64>,
    /// GFLOP/s of bf16 dot products of vectors, where products of tiles or small matrices are faster.
    pub bf16_dot: Option<f64>,
    /// GOP/s of the fastest int8 products.
    pub int8: Option<f64>,
    /// GOP/s of int8 dot products of vectors, where products of tiles or small matrices are faster.
    pub int8_dot: Option<f64>,
    /// GB/s of reads.
    pub memory: f64,
}

impl Limits {
    /// Measures for a fraction of a second each. None where the device has no such measurements.
    pub fn measure(args: &DeviceArgs) -> Result<Option<Self>> {
        if args.device != DeviceKind::Cpu {
            return Ok(None);
        }
        // A device of its own: its threads end with it and do not disturb what is timed.
        let cpu = args.cpu()?;
        let p = Peaks::measure(&cpu);
        Ok(Some(Self {
            f32: p.f32,
            bf16: p.bf16(cpu.isa()),
            bf16_dot: p.bf16_dot,
            int8: p.int8_tiles.or(p.int8_dot),
            int8_dot: p.int8_dot,
            memory: p.memory,
        }))
    }

    /// The larger of each limit here and in `other`, measured at another time; and at least what operations did: GFLOP/s of
    /// products in `format`, and GB/s.
    pub fn or_more(self, other: &Self, format: Format, (gflops, gbs): (f64, f64)) -> Self {
        let more = |a: Option<f64>, b: Option<f64>| a.zip(b).map(|(a, b)| a.max(b)).or(a).or(b);
        let mut limits = Self {
            f32: more(self.f32, other.f32),
            bf16: more(self.bf16, other.bf16),
            bf16_dot: more(self.bf16_dot, other.bf16_dot),
            int8: more(self.int8, other.int8),
            int8_dot: more(self.int8_dot, other.int8_dot),
            memory: self.memory.max(other.memory).max(gbs),
        };
        let limit = match format {
            Format::F32 => &mut limits.f32,
            Format::Bf16 | Format::Tf32 => &mut limits.bf16,
            Format::Int8 | Format::Bfp8 => &mut limits.int8,
        };
        *limit = limit.map(|limit| limit.max(gflops));
        limits
    }

    /// The limit of products in `format`.
    pub fn of(&self, format: Format) -> Option<f64> {
        match format {
            Format::F32 => self.f32,
            Format::Bf16 | Format::Tf32 => self.bf16,
            Format::Int8 | Format::Bfp8 => self.int8,
        }
    }

    /// In words.
    pub fn text(&self) -> String {
        let tiles = |name, fastest: Option<f64>, dot: Option<f64>| (name, dot.filter(|_| fastest != dot));
        let rates = [
            ("f32", self.f32),
            ("bf16", self.bf16),
            tiles("(dot products alone)", self.bf16, self.bf16_dot),
            ("int8", self.int8),
            tiles("(dot products alone)", self.int8, self.int8_dot),
        ];
        let known = rates.iter().filter_map(|(name, rate)| Some(format!("{name} {:.0} GFLOP/s", (*rate)?)));
        format!("{}, memory {:.1} GB/s", known.collect::<Vec<_>>().join(", "), self.memory)
    }
}
