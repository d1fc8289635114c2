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
#[derive(Debug, Clone, PartialEq, Serialize)]
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
        let hidden = || hidden_gpus(Path::new("/"), &|name| std::env::var(name).ok());
        return match pi0_vulkan::list() {
            Err(e) => vec![found(kind.to_string(), false, e.to_string(), hidden())],
            Ok(list) => {
                let hidden = if list.iter().all(|g| g.software) { hidden() } else { vec![] };
                let gpu = |(n, g): (usize, &pi0_vulkan::GpuInfo)| {
                    let checks = graphics(g).into_iter().chain(hidden.iter().cloned()).collect();
                    found(format!("vulkan:{n}"), true, g.to_string(), checks)
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
            if g.software { "this is software, no GPU: right, and slow" } else { "not software" },
        ),
    ]
}

/// Where Vulkan shows no GPU, or only software: signs of one that it does not see, and what hides it. `root` is the root of
/// the file system.
fn hidden_gpus(root: &Path, variable: &dyn Fn(&str) -> Option<String>) -> Vec<Look> {
    let is_there = |path: &str| root.join(path.trim_start_matches('/')).exists();
    let mut looks = vec![];
    let capabilities = variable("NVIDIA_DRIVER_CAPABILITIES");
    if is_there("/dev/nvidiactl") {
        let graphics = |list: &String| list.split(',').any(|c| matches!(c.trim(), "all" | "graphics"));
        let advice = match &capabilities {
            Some(list) if !graphics(list) => format!(
                "a GPU of NVIDIA's, but this container has only its capabilities {list}: start it with \
                 NVIDIA_DRIVER_CAPABILITIES=all, or add graphics"
            ),
            _ => "a GPU of NVIDIA's that Vulkan does not see: install the Vulkan part of its driver (libnvidia-gl); a \
                  container needs the graphics capability (NVIDIA_DRIVER_CAPABILITIES=all)"
                .into(),
        };
        looks.push(look("/dev/nvidiactl", true, advice));
    }
    if is_there("/dev/dri/renderD128") {
        let advice = "a GPU that Vulkan does not see: install its driver (mesa-vulkan-drivers for AMD and Intel), and let \
                      this user open it (group render)";
        looks.push(look("/dev/dri/renderD128", true, advice));
    }
    for name in ["VK_DRIVER_FILES", "VK_ICD_FILENAMES"] {
        let Some(list) = variable(name).filter(|list| !list.is_empty()) else { continue };
        // Relative names are found from where the program runs, which is no part of a test's root.
        let missing: Vec<_> =
            list.split(':').filter(|file| file.starts_with('/') && !is_there(file)).collect();
        let advice = match missing.as_slice() {
            [] => format!("{list}: no other driver is looked for; unset it to see them"),
            missing => format!("there is no {}; unset it, or name the driver's file", missing.join(", ")),
        };
        looks.push(look(&format!("variable {name}"), missing.is_empty(), advice));
    }
    if looks.is_empty() {
        looks.push(look(
            "a GPU's device file",
            false,
            "neither /dev/nvidiactl nor /dev/dri/renderD128 is there",
        ));
    }
    looks
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_hides_a_gpu_is_named() {
        let root = tempfile::tempdir().unwrap();
        let looks = |variables: &[(&str, &str)]| {
            let variable = |name: &str| Some(variables.iter().find(|v| v.0 == name)?.1.to_string());
            hidden_gpus(root.path(), &variable)
        };
        let says = |looks: &[Look], words: &[&str]| {
            for word in words {
                assert!(looks.iter().any(|l| l.detail.contains(word)), "{word}: {looks:?}");
            }
        };
        says(&looks(&[]), &["neither /dev/nvidiactl"]);
        let missing = looks(&[("VK_DRIVER_FILES", "/etc/none.json")]);
        assert!(!missing[0].found);
        says(&missing, &["there is no /etc/none.json"]);
        std::fs::create_dir_all(root.path().join("dev/dri")).unwrap();
        for device in ["dev/nvidiactl", "dev/dri/renderD128", "dev/dri/driver.json"] {
            std::fs::write(root.path().join(device), "").unwrap();
        }
        says(
            &looks(&[("VK_ICD_FILENAMES", "/dev/dri/driver.json")]),
            &["no other driver", "libnvidia-gl", "group render"],
        );
        let capabilities = |list| looks(&[("NVIDIA_DRIVER_CAPABILITIES", list)]);
        says(&capabilities("compute,utility"), &["only its capabilities compute,utility"]);
        says(&capabilities("compute,graphics,utility"), &["libnvidia-gl"]);
    }
}
