//! Opens the device that the command line names. Only this crate knows them all.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};
use pi0_cpu::{Cpu, CpuOptions, Format, Isa};
use pi0_device::{Device, Reference};
use pi0_model::{ActionModel, Checkpoint, Extent, Pi0};
use pi0_tensix::{Tensix, TensixOptions};
use pi0_vulkan::{Vulkan, VulkanError, VulkanOptions};

use crate::output;
use crate::reopen::Reopening;

/// Where to run.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Device")]
pub struct DeviceArgs {
    /// Device to run on: cpu, reference (plain loops), tensix (Tenstorrent's simulator) or vulkan[:N] (a GPU by its
    /// number); `pi0 devices` lists what this machine offers
    #[arg(long, value_name = "NAME", default_value_t)]
    pub device: DeviceKind,
    /// Threads of the host CPU [default: the physical cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
    /// Number format of the weights: stored (bf16 where the checkpoint has bf16, and on Tensix), f32, bf16 or int8; on
    /// Tensix stored, bf16 or bfp8
    #[arg(long, value_name = "FORMAT", default_value_t)]
    pub dtype: Dtype,
    /// Instruction set on the CPU, to measure or test a lesser one [default: the fastest that the machine has]
    #[arg(long, value_name = "NAME")]
    pub isa: Option<Isa>,
    /// Columns and rows of Tensix cores to use, such as 8x7 [default: all that work]
    #[arg(long, value_name = "CxR", value_parser = parse_grid)]
    pub grid: Option<(usize, usize)>,
    /// Tenstorrent's libttsim.so [default: $TT_METAL_SIMULATOR]
    #[arg(long, value_name = "FILE")]
    pub simulator: Option<PathBuf>,
    /// What breaks the GPU that is opened first, to try what comes after: no command line can say it.
    #[arg(skip)]
    pub fault: Option<Fault>,
}

/// What breaks a GPU on purpose.
#[derive(Debug, Clone, Copy)]
pub enum Fault {
    /// The driver gives it up at the submission of this number, from 0.
    Lost(u64),
    /// Nothing ends from the submission of this number on.
    Hung(u64),
}

/// A number format of weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Dtype {
    /// Of the host's processor and of GPUs.
    Of(Format),
    /// Of Tensix: a sign and seven bits, and an exponent for every 16 values.
    Bfp8,
}

impl Default for Dtype {
    fn default() -> Self {
        Dtype::Of(Format::Stored)
    }
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Dtype::Of(format) => format.fmt(f),
            Dtype::Bfp8 => f.write_str("bfp8"),
        }
    }
}

impl FromStr for Dtype {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        if name == "bfp8" {
            return Ok(Dtype::Bfp8);
        }
        name.parse().map(Dtype::Of).map_err(|e| format!("{e}, and bfp8 on tensix"))
    }
}

impl Dtype {
    /// The format as hosts and GPUs know it; they do not know bfp8, which is refused before.
    pub fn of_host(self) -> Format {
        match self {
            Dtype::Of(format) => format,
            Dtype::Bfp8 => Format::Stored,
        }
    }
}

/// A kind of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum DeviceKind {
    /// The host's processor, with its widest instructions
    #[default]
    Cpu,
    /// Plain scalar loops: the slow, readable definition of every operation
    Reference,
    /// Tenstorrent Wormhole, on Tenstorrent's simulator
    Tensix,
    /// A GPU through Vulkan, by its number
    Vulkan(usize),
}

impl FromStr for DeviceKind {
    type Err = String;
    fn from_str(name: &str) -> Result<Self, String> {
        let number = match name.split_once(':') {
            Some(("vulkan", number)) => Some(number.parse().map_err(|_| {
                format!("{number:?} is no number of a GPU; pi0 devices lists them, such as vulkan:0")
            })?),
            _ => None,
        };
        Ok(match (name, number) {
            (_, Some(number)) => DeviceKind::Vulkan(number),
            ("cpu", _) => DeviceKind::Cpu,
            ("reference", _) => DeviceKind::Reference,
            ("tensix", _) => DeviceKind::Tensix,
            ("vulkan", _) => DeviceKind::Vulkan(0),
            _ => return Err("known are cpu, reference, tensix and vulkan[:N]".into()),
        })
    }
}

impl fmt::Display for DeviceKind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            DeviceKind::Vulkan(n) if *n > 0 => write!(f, "vulkan:{n}"),
            kind => f.write_str(kind.name()),
        }
    }
}

impl DeviceKind {
    /// Every kind, in the order that they are listed; of GPUs the first.
    pub const ALL: [DeviceKind; 4] =
        [DeviceKind::Cpu, DeviceKind::Reference, DeviceKind::Tensix, DeviceKind::Vulkan(0)];

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            DeviceKind::Cpu => "cpu",
            DeviceKind::Reference => "reference",
            DeviceKind::Tensix => "tensix",
            DeviceKind::Vulkan(_) => "vulkan",
        }
    }

    /// What this machine has of it, or why it cannot be used.
    pub fn probe(self, args: &DeviceArgs) -> Result<String, String> {
        match self {
            DeviceKind::Cpu => args.cpu().map(|d| d.describe()).map_err(|e| e.to_string()),
            DeviceKind::Reference => Ok("plain scalar loops, one thread".into()),
            DeviceKind::Tensix => args.tensix().map(|d| d.describe().to_string()).map_err(|e| e.to_string()),
            DeviceKind::Vulkan(n) => {
                let detail = |d: Vulkan| format!("{}; products of {}", d.info(), d.products());
                args.vulkan(n, false).map(detail).map_err(|e| e.to_string())
            }
        }
    }
}

impl DeviceArgs {
    /// The host's processor, as told.
    pub fn cpu(&self) -> Result<Cpu, pi0_cpu::CpuError> {
        Cpu::new(CpuOptions {
            isa: self.isa,
            threads: self.threads.map(usize::from),
            format: self.dtype.of_host(),
        })
    }

    /// Whether the device has weights of the format.
    fn check_dtype(&self) -> Result<()> {
        let tensix = self.device == DeviceKind::Tensix;
        match self.dtype {
            Dtype::Bfp8 if !tensix => {
                bail!(
                    "--dtype bfp8 is a format of --device tensix; {} has stored, f32, bf16 and int8",
                    self.device
                )
            }
            Dtype::Of(format @ (Format::F32 | Format::Int8)) if tensix => {
                bail!("--device tensix has no weights in {format}; it has stored, bf16 and bfp8")
            }
            _ => Ok(()),
        }
    }

    fn tensix(&self) -> Result<Tensix, pi0_tensix::OpenError> {
        Tensix::open(&TensixOptions {
            grid: self.grid,
            simulator: self.simulator.clone(),
            bfp8: self.dtype == Dtype::Bfp8,
            ..TensixOptions::default()
        })
    }

    /// A GPU, as told; `timestamps` has it time each launch.
    pub fn vulkan(&self, index: usize, timestamps: bool) -> Result<Vulkan, VulkanError> {
        let format = match self.dtype.of_host() {
            Format::Stored => pi0_vulkan::Format::Stored,
            Format::F32 => pi0_vulkan::Format::F32,
            Format::Bf16 => pi0_vulkan::Format::Bf16,
            Format::Int8 => pi0_vulkan::Format::Int8,
        };
        let (lose, hang) = match self.fault {
            Some(Fault::Lost(at)) => (Some(at), None),
            Some(Fault::Hung(at)) => (None, Some(at)),
            None => (None, None),
        };
        Vulkan::open(VulkanOptions { index, format, timestamps, lose, hang, ..VulkanOptions::default() })
    }
}

fn parse_grid(text: &str) -> Result<(usize, usize), String> {
    let sizes = text.split_once('x').and_then(|(c, r)| Some((c.parse().ok()?, r.parse().ok()?)));
    sizes.filter(|(c, r)| *c > 0 && *r > 0).ok_or_else(|| "wanted columns and rows, such as 8x7".into())
}

/// Something to do with a device of whatever type.
pub trait Visitor {
    /// Its result.
    type Output;

    /// Does it.
    fn visit<D: Device + 'static>(self, device: D) -> Result<Self::Output>;
}

/// Opens the device and hands it to `visitor`: the one place where a name becomes a type.
pub fn with_device<V: Visitor>(args: &DeviceArgs, visitor: V) -> Result<V::Output> {
    args.check_dtype()?;
    match args.device {
        DeviceKind::Cpu => visitor.visit(args.cpu()?),
        DeviceKind::Reference => visitor.visit(Reference),
        DeviceKind::Tensix => visitor.visit(args.tensix()?),
        DeviceKind::Vulkan(n) => visitor.visit(args.vulkan(n, false)?),
    }
}

/// A model on its device, and how long packing it took.
pub struct Loaded {
    /// The model.
    pub model: Box<dyn ActionModel>,
    /// Time from opening the device to the last packed weight.
    pub time: Duration,
}

/// Loads a checkpoint onto the device, with a progress bar. A device that is lost later is opened again.
pub fn load(args: &DeviceArgs, checkpoint: Checkpoint) -> Result<Loaded> {
    let start = Instant::now();
    let tick = progress_bars(&checkpoint)();
    let model = load_silently(args, checkpoint, &*tick)?;
    Ok(Loaded { model, time: start.elapsed() })
}

/// Loads a checkpoint onto the device. `progress` hears the bytes of each weight that is packed. A device that is lost
/// later is opened again.
pub fn load_silently(
    args: &DeviceArgs,
    checkpoint: Checkpoint,
    progress: &dyn Fn(u64),
) -> Result<Box<dyn ActionModel>> {
    let model = open(args, checkpoint.clone(), progress)?;
    Ok(match args.device {
        DeviceKind::Vulkan(_) => {
            let args = DeviceArgs { fault: None, ..args.clone() };
            let again = move || open(&args, checkpoint.clone(), &|_| ());
            Box::new(Reopening::new(model, Box::new(again)))
        }
        _ => model,
    })
}

fn open(args: &DeviceArgs, checkpoint: Checkpoint, progress: &dyn Fn(u64)) -> Result<Box<dyn ActionModel>> {
    struct Load<'a>(Checkpoint, &'a dyn Fn(u64));
    impl Visitor for Load<'_> {
        type Output = Box<dyn ActionModel>;
        fn visit<D: Device + 'static>(self, device: D) -> Result<Self::Output> {
            Ok(Box::new(Pi0::load(device, self.0, Extent::Cache, self.1)?))
        }
    }
    with_device(args, Load(checkpoint, progress))
}

/// Packs all weights on `device`, with a progress bar.
pub fn pack<D: Device>(device: D, checkpoint: Checkpoint, extent: Extent) -> Result<Pi0<D>> {
    let tick = progress_bars(&checkpoint)();
    Ok(Pi0::load(device, checkpoint, extent, &*tick)?)
}

/// A progress bar for each time that the weights of `checkpoint` are packed; it goes with the closure that it gives.
pub fn progress_bars(checkpoint: &Checkpoint) -> impl Fn() -> Box<dyn Fn(u64)> + use<> {
    let bytes = checkpoint.bytes_by_dtype().values().sum();
    move || {
        let bar = output::progress("loading", bytes);
        Box::new(move |packed| bar.inc(packed))
    }
}
