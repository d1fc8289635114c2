//! Loads a checkpoint on the processor and says how long that took.
//!
//!     cargo run --release -p pi0-cpu --example load -- DIR [f32|bf16|int8|stored]

use std::path::PathBuf;
use std::time::Instant;

use pi0_cpu::{Cpu, CpuOptions, Format};
use pi0_model::{Checkpoint, Extent, Pi0};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let dir = PathBuf::from(args.next().ok_or("wanted the checkpoint")?);
    let format = args.next().map_or(Ok(Format::Stored), |name| name.parse())?;
    let device = Cpu::new(CpuOptions { format, ..CpuOptions::default() })?;
    let checkpoint = Checkpoint::open(&dir)?;
    let start = Instant::now();
    let model = Pi0::load(device, checkpoint, Extent::Cache, &|_| ())?;
    println!("{:.2} s", start.elapsed().as_secs_f64());
    drop(model);
    Ok(())
}
