//! Loads a checkpoint on the processor and says how long that took.
//!
//!     cargo run --release -p pi0-cpu --example load -- DIR [f32|bf16|int8|stored [ADAPTER]]
//!
//! With a number of gigabytes instead of DIR it touches as much fresh memory, on as many threads as there are cores: what the
//! system takes to give what a loaded model needs.
//!
//!     cargo run --release -p pi0-cpu --example load -- 6.4

use std::path::PathBuf;
use std::time::Instant;

use pi0_cpu::{Cpu, CpuOptions, Format};
use pi0_device::Buffer;
use pi0_model::{Checkpoint, Extent, OpenOptions, Pi0};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let dir = args.next().ok_or("wanted the checkpoint")?;
    if let Ok(gigabytes) = dir.parse::<f64>() {
        return touch(gigabytes);
    }
    let format = args.next().map_or(Ok(Format::Stored), |name| name.parse())?;
    let device = Cpu::new(CpuOptions { format, ..CpuOptions::default() })?;
    let options = OpenOptions { adapter: args.next().map(PathBuf::from), ..OpenOptions::default() };
    let checkpoint = Checkpoint::open_with(&PathBuf::from(dir), &options)?;
    let start = Instant::now();
    let model = Pi0::load(device, checkpoint, Extent::Cache, &|_| ())?;
    println!("{:.2} s{}", start.elapsed().as_secs_f64(), private());
    drop(model);
    Ok(())
}

/// What the process holds and held at most, where the system tells.
fn private() -> String {
    let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
    let of = |name: &str| {
        let line = status.lines().find_map(|line| line.strip_prefix(name));
        line.and_then(|rest| rest.split_whitespace().next()?.parse::<f64>().ok())
    };
    match (of("RssAnon:"), of("VmHWM:")) {
        (Some(now), Some(most)) => {
            format!(", holds {:.2} GB, at most {:.2} GB", now * 1024.0 / 1e9, most * 1024.0 / 1e9)
        }
        _ => String::new(),
    }
}

fn touch(gigabytes: f64) -> Result<(), Box<dyn std::error::Error>> {
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    let start = Instant::now();
    let parts: Option<Vec<Buffer>> = std::thread::scope(|scope| {
        let part = || {
            let mut memory = Buffer::zeroed((gigabytes * 1e9) as usize / threads)?;
            memory.iter_mut().step_by(4096).for_each(|byte| *byte = 1);
            Some(memory)
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(part)).collect();
        threads.into_iter().map(|thread| thread.join().ok().flatten()).collect()
    });
    parts.ok_or("there is no such memory")?;
    let seconds = start.elapsed().as_secs_f64();
    println!("{gigabytes} GB touched in {seconds:.2} s, {:.2} GB/s", gigabytes / seconds);
    Ok(())
}
