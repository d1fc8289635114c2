//! `pi0 devices`: what this machine offers, and why the rest is missing.

use std::path::Path;

use anyhow::Result;
use pi0_cpu::Isa;
use serde::Serialize;

use crate::device::{DeviceArgs, DeviceKind};
use crate::output;

/// List the devices of this machine, and why the others are missing
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  pi0 devices --verbose\n  pi0 devices --json -")]
pub struct Args {
    /// Also tell what was looked for, what was found, and what to install or set
    #[arg(long, short)]
    verbose: bool,
    /// Write the list as JSON to this file (`-` for standard output)
    #[arg(long, value_name = "FILE")]
    json: Option<std::path::PathBuf>,
}

/// One device of this machine.
#[derive(Debug, Serialize)]
struct Found {
    name: String,
    available: bool,
    /// What it is, or why it cannot be used.
    detail: String,
    checks: Vec<Look>,
}

/// Something that was looked for.
#[derive(Debug, Serialize)]
struct Look {
    what: String,
    found: bool,
    /// What was found, or what to do about it.
    detail: String,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let list: Vec<Found> = DeviceKind::ALL.into_iter().flat_map(find).collect();
    if let Some(path) = &args.json {
        return output::write_json(path, &list);
    }
    fn line(f: &Found) -> (&str, String) {
        match f.available {
            true => (&f.name, f.detail.clone()),
            false => (&f.name, format!("not available: {}", f.detail)),
        }
    }
    if !args.verbose {
        return output::print(&output::facts(&list.iter().map(line).collect::<Vec<_>>()));
    }
    let text = list.iter().map(|f| {
        let (name, detail) = line(f);
        let checks = f
            .checks
            .iter()
            .map(|c| format!("  {} {}: {}\n", if c.found { "found  " } else { "missing" }, c.what, c.detail));
        format!("{name}: {detail}\n{}", checks.collect::<String>())
    });
    output::print(&text.collect::<Vec<_>>().join("\n"))
}

/// One kind of device; of GPUs each.
fn find(kind: DeviceKind) -> Vec<Found> {
    let found = |name: String, available, detail, checks| Found { name, available, detail, checks };
    if let DeviceKind::Vulkan(_) = kind {
        return match pi0_vulkan::list() {
            Err(e) => vec![found(kind.to_string(), false, e.to_string(), vec![])],
            Ok(list) => {
                let gpu = |(n, g): (usize, &pi0_vulkan::GpuInfo)| {
                    found(format!("vulkan:{n}"), true, g.to_string(), graphics(g))
                };
                list.iter().enumerate().map(gpu).collect()
            }
        };
    }
    let probe = kind.probe(&DeviceArgs::default());
    let available = probe.is_ok();
    let (Ok(detail) | Err(detail)) = probe;
    let checks = match kind {
        DeviceKind::Cpu => processor(),
        DeviceKind::Reference => vec![],
        DeviceKind::Tensix => tenstorrent(),
        DeviceKind::Vulkan(_) => unreachable!("listed above"),
    };
    vec![found(kind.to_string(), available, detail, checks)]
}

/// What a GPU needs to have, and what makes it fast.
fn graphics(g: &pi0_vulkan::GpuInfo) -> Vec<Look> {
    let (major, minor, _) = g.api;
    let new = g.api >= (1, 3, 0);
    let advice = if new { "" } else { "; 1.3 is needed, a newer driver may have it" };
    let enough = g.memory > 8_000_000_000;
    let memory =
        if enough { "" } else { "; the full model needs 8 GB in bf16, half of that with --dtype int8" };
    vec![
        look("Vulkan", new, format!("{major}.{minor}{advice}")),
        look("memory", enough, format!("{}{memory}", output::size(g.memory))),
        look(
            "a GPU",
            !g.software,
            if g.software { "this is software: right, and slow" } else { "not software" },
        ),
    ]
}

fn look(what: &str, found: bool, detail: impl Into<String>) -> Look {
    Look { what: what.into(), found, detail: detail.into() }
}

/// Instruction sets of this architecture, threads and memory.
fn processor() -> Vec<Look> {
    let mut checks: Vec<Look> = Isa::ALL
        .into_iter()
        .filter(|isa| isa.is_native())
        .map(|isa| {
            let detail = match (isa.is_present(), isa) {
                (true, _) => "kernels for it are used where nothing faster is present",
                (false, Isa::Amx) => {
                    "needs Sapphire Rapids or later and Linux 5.16; products are slower without"
                }
                (false, _) => "this processor, or the virtual machine's model of it, does not offer it",
            };
            look(&format!("instructions {isa}"), isa.is_present(), detail)
        })
        .collect();
    let threads = std::thread::available_parallelism().map_or(1, usize::from);
    checks.push(look("threads", true, format!("{threads}; set --threads N to use fewer")));
    let memory = std::fs::read_to_string("/proc/meminfo").ok().and_then(|text| {
        let line = text.lines().find_map(|l| l.strip_prefix("MemAvailable:"))?;
        line.trim().strip_suffix(" kB")?.trim().parse::<u64>().ok()
    });
    if let Some(kilobytes) = memory {
        let enough = kilobytes > 8_000_000;
        let advice =
            if enough { "" } else { "; the full model needs 8 GB in bf16, half of that with --dtype int8" };
        checks.push(look("memory", enough, format!("{} free{advice}", output::size(kilobytes * 1000))));
    }
    checks
}

/// The simulator, and cards.
fn tenstorrent() -> Vec<Look> {
    let variable = std::env::var("TT_METAL_SIMULATOR").ok().filter(|v| !v.is_empty());
    let named = match &variable {
        Some(path) => look("variable TT_METAL_SIMULATOR", true, path.clone()),
        None => {
            let advice = "set it to Tenstorrent's libttsim.so for Wormhole, or give --simulator FILE";
            look("variable TT_METAL_SIMULATOR", false, advice)
        }
    };
    let mut checks = vec![named];
    if let Some(path) = &variable {
        let there = Path::new(path).is_file();
        let detail = if there { "a file" } else { "there is no such file; build or download ttsim first" };
        checks.push(look(path, there, detail));
    }
    let card = Path::new("/dev/tenstorrent/0");
    let detail = match card.exists() {
        true => "a card with Tenstorrent's kernel driver",
        false => "no card, or tt-kmd is not loaded (install it from Tenstorrent, then modprobe tenstorrent)",
    };
    checks.push(look("/dev/tenstorrent/0", card.exists(), detail));
    checks
}
