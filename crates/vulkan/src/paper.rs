//! What launches take on a GPU that is not here, on paper: from their work and the GPU's published rates.
//!
//! An estimate and no measurement: none of these kernels has been timed on a GPU. A launch takes as long as the slower of
//! its products and its bytes, and what one launch costs more than the next. Three cases, so that no number is believed
//! too much: the *floor* takes the published rates whole and launches for free; *good* and *cautious* take shares of them
//! that others' kernels of this kind reach ([`Chip`] names them), and charge each launch.

use crate::device::{LaunchInfo, Stage};
use crate::info::{GpuInfo, MatrixShape};
use crate::kernels::Unit;

/// A GPU by its published rates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Chip {
    /// Name on the command line.
    pub key: &'static str,
    /// Its maker's name for it.
    pub name: &'static str,
    /// Dense TFLOP/s of matrices of f16 or bf16 with sums in f32.
    pub matrix: f64,
    /// Dense TOP/s of matrices of 8-bit integers.
    pub int8: f64,
    /// TFLOP/s of multiply-adds in f32.
    pub f32: f64,
    /// GB/s of its memory.
    pub bandwidth: f64,
    /// GB of its memory.
    pub memory: u64,
    /// Processors (SM, compute units): workgroups that run side by side at least.
    pub processors: u64,
    /// Whether its usual driver has matrices of bf16.
    pub bf16: bool,
    /// Share of `matrix` that Vulkan kernels of others reach at some 500 rows: cautious, good.
    pub share: [f64; 2],
    /// Microseconds of a dependent launch in a recorded command buffer: cautious, good.
    pub launch: [f64; 2],
    /// Where the rates stand.
    pub source: &'static str,
}

const AMD_LAUNCH: [f64; 2] = [1.2, 0.85];
const NVIDIA_LAUNCH: [f64; 2] = [1.5, 1.0];

/// Share of the bandwidth, cautious and good: what streaming kernels of others reach.
pub const BANDWIDTH_SHARE: [f64; 2] = [0.8, 0.9];
/// Share of f32 multiply-adds, cautious and good: an assumption, nobody measured such kernels for us.
pub const F32_SHARE: [f64; 2] = [0.3, 0.6];
/// Dot products of four 8-bit integers do four times the work of an f32 multiply-add in one instruction.
const DOT: f64 = 4.0;

impl Chip {
    /// Every GPU that is known here.
    pub const ALL: [Chip; 5] = [
        Chip {
            key: "rtx-4090",
            name: "NVIDIA GeForce RTX 4090",
            matrix: 165.2,
            int8: 660.6,
            f32: 82.6,
            bandwidth: 1008.0,
            memory: 24,
            processors: 128,
            bf16: true,
            share: [0.55, 0.80],
            launch: NVIDIA_LAUNCH,
            source: "NVIDIA, Ada GPU architecture white paper: FP16 with FP32 accumulate and INT8, both dense",
        },
        Chip {
            key: "rtx-5090",
            name: "NVIDIA GeForce RTX 5090",
            matrix: 209.5,
            int8: 838.0,
            f32: 104.8,
            bandwidth: 1792.0,
            memory: 32,
            processors: 170,
            bf16: true,
            share: [0.55, 0.80],
            launch: NVIDIA_LAUNCH,
            source: "NVIDIA, RTX Blackwell GPU architecture white paper: FP16 with FP32 accumulate and INT8, both dense",
        },
        Chip {
            key: "h100",
            name: "NVIDIA H100 SXM",
            matrix: 989.4,
            int8: 1978.9,
            f32: 66.9,
            bandwidth: 3350.0,
            memory: 80,
            processors: 132,
            bf16: true,
            // Vulkan's matrices reach the older of Hopper's two kinds of matrix instructions.
            share: [0.30, 0.45],
            launch: NVIDIA_LAUNCH,
            source: "NVIDIA, Hopper architecture white paper and H100 data sheet, without sparsity",
        },
        Chip {
            key: "agx-orin",
            name: "NVIDIA Jetson AGX Orin 64 GB",
            matrix: 42.5,
            int8: 85.0,
            f32: 5.3,
            bandwidth: 204.8,
            memory: 64,
            processors: 16,
            // JetPack 6's driver has none.
            bf16: false,
            share: [0.60, 0.75],
            launch: [3.0, 1.5],
            source: "NVIDIA, Jetson AGX Orin series technical brief: 170 sparse INT8 TOPS, so 85 dense, and f16 half of it",
        },
        Chip {
            key: "rx-9070-xt",
            name: "AMD Radeon RX 9070 XT",
            matrix: 194.6,
            int8: 389.3,
            f32: 48.7,
            bandwidth: 640.0,
            memory: 16,
            processors: 64,
            bf16: true,
            share: [0.60, 0.80],
            launch: AMD_LAUNCH,
            source: "AMD, Radeon RX 9070 XT specifications: matrix FP16 and INT8, dense",
        },
    ];

    /// The GPU of this name: the key, or a driver's name for it.
    pub fn find(name: &str) -> Option<Chip> {
        let plain = |s: &str| s.to_lowercase().replace([' ', '-', '_'], "");
        let wanted = plain(name);
        let is =
            |c: &&Chip| plain(c.key) == wanted || (wanted.contains(&plain(c.key)) && !longer(c.key, &wanted));
        Self::ALL.iter().find(is).copied()
    }

    /// TFLOP/s that the unit has on paper.
    pub fn peak(&self, unit: Unit) -> f64 {
        match unit {
            Unit::F32 => self.f32,
            Unit::F16 | Unit::Bf16 => self.matrix,
            Unit::Int8 => self.int8,
            Unit::Int8Dot => DOT * self.f32,
        }
    }

    /// What its driver would say, as far as a plan depends on it.
    pub fn info(&self) -> GpuInfo {
        let shape = |operands, depth, sums| MatrixShape { size: [16, 16, depth], operands, sums };
        let mut matrices = vec![shape("f16", 16, "f32"), shape("s8", 32, "s32"), shape("s8", 16, "s32")];
        if self.bf16 {
            matrices.push(shape("bf16", 16, "f32"));
        }
        GpuInfo {
            name: self.name.into(),
            driver: "none: on paper".into(),
            api: (1, 3, 0),
            software: false,
            memory: self.memory * 1_000_000_000,
            subgroup: (32, 32),
            matrices,
            bf16: (self.bf16, self.bf16),
            f16: true,
            int8: true,
            int8_dot: (true, true),
            processors: Some(self.processors as u32),
            max_binding: u64::from(u32::MAX),
            memory_model: true,
            subgroup_choice: true,
            tick: 1.0,
            max_bindings: 16,
            shared_bytes: 32 << 10,
        }
    }

    /// Seconds of one launch.
    fn seconds(&self, l: &LaunchInfo, case: Case) -> f64 {
        let (flop, bytes) =
            (l.flop as f64 / (self.peak(l.unit) * 1e12), l.bytes as f64 / (self.bandwidth * 1e9));
        let Some(i) = case.index() else { return flop.max(bytes) };
        // Few workgroups leave processors idle; half of them draw all of the bandwidth.
        let filled = |processors: f64| (l.groups as f64 / processors).min(1.0);
        let share = match l.unit {
            Unit::F32 | Unit::Int8Dot => F32_SHARE[i],
            _ => self.share[i],
        };
        let processors = self.processors as f64;
        let flop = flop / share / filled(processors);
        let bytes = bytes / BANDWIDTH_SHARE[i] / filled(processors / 2.0);
        flop.max(bytes)
    }

    /// Prices the launches of an inference.
    pub fn estimate(&self, launches: &[LaunchInfo]) -> Estimate {
        let mut lines: Vec<Line> = vec![];
        for l in launches {
            let at = lines.iter().position(|o| (o.stage, o.kernel, o.unit) == (l.stage, l.kernel, l.unit));
            let at = at.unwrap_or_else(|| {
                let (stage, kernel, unit) = (l.stage, l.kernel, l.unit);
                let new = Line {
                    stage,
                    kernel,
                    unit,
                    launches: 0,
                    flop: 0,
                    bytes: 0,
                    seconds: [0.0; 3],
                    by_bytes: 0.0,
                };
                lines.push(new);
                lines.len() - 1
            });
            let line = &mut lines[at];
            line.launches += 1;
            line.flop += l.flop;
            line.bytes += l.bytes;
            for (sum, case) in line.seconds.iter_mut().zip(Case::ALL) {
                *sum += self.seconds(l, case);
            }
            let ideal = l.flop as f64 / self.peak(l.unit) / 1e12;
            if l.bytes as f64 / self.bandwidth / 1e9 > ideal {
                line.by_bytes += self.seconds(l, Case::Good);
            }
        }
        lines.sort_by_key(|l| (l.stage, l.kernel, l.unit));
        let starts = Case::ALL.map(|case| match case.index() {
            None => 0.0,
            Some(i) => launches.len() as f64 * self.launch[i] * 1e-6,
        });
        Estimate { lines, starts }
    }
}

/// Whether `name` goes on after `key` so that it is another product, such as "RTX 4090 Laptop" or "H100 PCIe".
fn longer(key: &str, name: &str) -> bool {
    let key = key.replace('-', "");
    let rest = name.find(&key).map_or("", |at| &name[at + key.len()..]);
    ["laptop", "max", "d", "ti", "super", "pcie", "nvl", "gre"].iter().any(|other| rest.starts_with(other))
}

/// How much of the published rates is reached.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Case {
    /// All, and launches are free.
    Floor,
    /// What good kernels of others reach.
    Good,
    /// What plain ones do.
    Cautious,
}

impl Case {
    /// All, in the order of the numbers.
    pub const ALL: [Case; 3] = [Case::Floor, Case::Good, Case::Cautious];

    fn index(self) -> Option<usize> {
        match self {
            Case::Floor => None,
            Case::Good => Some(1),
            Case::Cautious => Some(0),
        }
    }
}

/// Launches of one kind in one stage.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Line {
    /// The part of the inference.
    pub stage: Stage,
    /// Which kind of kernel.
    pub kernel: &'static str,
    /// What multiplies.
    pub unit: Unit,
    /// How many.
    pub launches: usize,
    /// Floating-point operations.
    pub flop: u64,
    /// Bytes, each operand moved once.
    pub bytes: u64,
    /// Seconds, without what starting them costs: [`Case::ALL`].
    pub seconds: [f64; 3],
    /// Of the good case's seconds, those of launches that memory bounds.
    pub by_bytes: f64,
}

/// An inference, priced.
#[derive(Debug, Clone, PartialEq)]
pub struct Estimate {
    /// By stage and kind.
    pub lines: Vec<Line>,
    /// Seconds that starting the launches costs: [`Case::ALL`].
    pub starts: [f64; 3],
}

impl Estimate {
    /// Seconds in all: [`Case::ALL`].
    pub fn total(&self) -> [f64; 3] {
        let sum = |i: usize| self.lines.iter().map(|l| l.seconds[i]).sum::<f64>() + self.starts[i];
        [sum(0), sum(1), sum(2)]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn launch(flop: u64, bytes: u64, groups: u64) -> LaunchInfo {
        LaunchInfo {
            stage: Stage::Prefix,
            kernel: "product",
            unit: Unit::Bf16,
            shape: [1, 1, 1],
            flop,
            bytes,
            groups,
            barrier: true,
            seconds: None,
        }
    }

    #[test]
    fn the_slower_of_products_and_bytes_counts() {
        let chip = Chip::find("NVIDIA GeForce RTX 4090").unwrap();
        // 10 ms of products and 1 ms of bytes, then the other way round.
        let work = |ms: f64| ((chip.matrix * 1e9 * ms) as u64, (chip.bandwidth * 1e6 * ms) as u64);
        let (flop, bytes) = (work(10.0), work(1.0));
        let [floor, good, cautious] = chip.estimate(&[launch(flop.0, bytes.1, 1000)]).total();
        assert!((floor - 0.010).abs() < 1e-6 && (good - 0.010 / 0.8 - 1e-6).abs() < 1e-6, "{floor} {good}");
        assert!(cautious > good);
        let e = chip.estimate(&[launch(bytes.0, flop.1, 1000)]);
        assert!((e.total()[0] - 0.010).abs() < 1e-6);
        assert_eq!(e.lines[0].by_bytes, e.lines[0].seconds[1]);
        // Half as many workgroups as processors take twice the time.
        let half = chip.estimate(&[launch(flop.0, 0, 64)]).lines[0].seconds[1];
        assert!((half - 2.0 * 0.010 / 0.8).abs() < 1e-6, "{half}");
    }

    /// The makers also say what the rates are made of: processors, clocks and work a cycle; wires and bits a second.
    #[test]
    fn rates_are_those_of_the_chips_parts() {
        // GHz for f32 and for matrices; multiply-adds a cycle and processor in f32, of matrices in f16, in int8; bits of
        // the memory's bus and Gbit/s of each.
        let parts = [
            ("rtx-4090", [2.52, 2.52], [128.0, 256.0, 1024.0], [384.0, 21.0]),
            ("rtx-5090", [2.407, 2.407], [128.0, 256.0, 1024.0], [512.0, 28.0]),
            ("h100", [1.98, 1.83], [128.0, 2048.0, 4096.0], [5120.0, 5.23]),
            ("agx-orin", [1.3, 1.3], [128.0, 1024.0, 2048.0], [256.0, 6.4]),
            ("rx-9070-xt", [2.97, 2.97], [128.0, 512.0, 1024.0], [256.0, 20.0]),
        ];
        assert_eq!(parts.len(), Chip::ALL.len());
        for (key, [clock, matrix_clock], [f32, f16, int8], [bits, rate]) in parts {
            let chip = Chip::find(key).unwrap();
            let all = |clock: f64, each: f64| 2.0 * each * chip.processors as f64 * clock / 1e3;
            for (published, made) in [
                (chip.f32, all(clock, f32)),
                (chip.matrix, all(matrix_clock, f16)),
                (chip.int8, all(matrix_clock, int8)),
                (chip.bandwidth, bits * rate / 8.0),
            ] {
                assert!((published / made - 1.0).abs() < 5e-3, "{key}: {published} and {made}");
            }
        }
    }

    #[test]
    fn names_of_drivers_and_of_the_command_line() {
        for c in Chip::ALL {
            assert_eq!(Chip::find(c.key), Some(c));
            assert!(c.share[0] <= c.share[1] && c.launch[0] >= c.launch[1]);
        }
        assert_eq!(Chip::find("AMD Radeon RX 9070 XT (RADV GFX1201)").unwrap().key, "rx-9070-xt");
        assert_eq!(Chip::find("NVIDIA H100 80GB HBM3").unwrap().key, "h100");
        for other in
            ["NVIDIA GeForce RTX 4090 Laptop GPU", "NVIDIA GeForce RTX 4080", "llvmpipe", "NVIDIA H100 PCIe"]
        {
            assert_eq!(Chip::find(other), None, "{other}");
        }
    }
}
