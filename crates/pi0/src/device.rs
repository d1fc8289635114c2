//! Opens the device that the command line names. Only this crate knows them all.

use std::time::{Duration, Instant};

use anyhow::Result;
use clap::ValueEnum;
use pi0_device::{Device, Reference};
use pi0_model::{ActionModel, Checkpoint, Extent, Pi0};

use crate::output;

/// Where to run.
#[derive(Debug, Clone, Default, clap::Args)]
#[command(next_help_heading = "Device")]
pub struct DeviceArgs {
    /// Device to run on; `pi0 devices` lists what this machine offers
    #[arg(long, value_enum, default_value_t)]
    pub device: DeviceKind,
    /// Threads of the host CPU [default: the physical cores]
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u16).range(1..=1024))]
    pub threads: Option<u16>,
}

/// A kind of device.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
pub enum DeviceKind {
    /// Plain scalar loops: the slow, readable definition of every operation
    #[default]
    Reference,
}

impl DeviceKind {
    /// Every kind, in the order that they are listed.
    pub const ALL: [DeviceKind; 1] = [DeviceKind::Reference];

    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            DeviceKind::Reference => "reference",
        }
    }

    /// What this machine has of it, or why it cannot be used.
    pub fn probe(self, _args: &DeviceArgs) -> Result<String, String> {
        match self {
            DeviceKind::Reference => Ok("plain scalar f32, one thread".into()),
        }
    }
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
    match args.device {
        DeviceKind::Reference => visitor.visit(Reference),
    }
}

/// A model on its device, and how long packing it took.
pub struct Loaded {
    /// The model.
    pub model: Box<dyn ActionModel>,
    /// Time from opening the device to the last packed weight.
    pub time: Duration,
}

/// Loads a checkpoint onto the device, with a progress bar.
pub fn load(args: &DeviceArgs, checkpoint: Checkpoint) -> Result<Loaded> {
    struct Load(Checkpoint);
    impl Visitor for Load {
        type Output = Box<dyn ActionModel>;
        fn visit<D: Device + 'static>(self, device: D) -> Result<Self::Output> {
            Ok(Box::new(pack(device, self.0, Extent::Cache)?))
        }
    }
    let start = Instant::now();
    let model = with_device(args, Load(checkpoint))?;
    Ok(Loaded { model, time: start.elapsed() })
}

/// Packs all weights on `device`, with a progress bar.
pub fn pack<D: Device>(device: D, checkpoint: Checkpoint, extent: Extent) -> Result<Pi0<D>> {
    let bytes = checkpoint.bytes_by_dtype().values().sum();
    let bar = output::progress("loading", bytes);
    let model = Pi0::load(device, checkpoint, extent, &|packed| bar.inc(packed))?;
    bar.finish_and_clear();
    Ok(model)
}
