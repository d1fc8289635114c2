//! `pi0 devices`: what this machine offers, and why the rest is missing.

use anyhow::Result;

use crate::device::{DeviceArgs, DeviceKind};
use crate::output;

/// List the devices of this machine, and why the others are missing
#[derive(clap::Args)]
#[command(after_help = "Example:\n  pi0 devices --json -")]
pub struct Args {
    /// Write the list as JSON to this file (`-` for standard output)
    #[arg(long, value_name = "FILE")]
    json: Option<std::path::PathBuf>,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let probes = DeviceKind::ALL.map(|kind| (kind, kind.probe(&DeviceArgs::default())));
    if let Some(path) = &args.json {
        let list: Vec<_> = probes
            .iter()
            .map(|(kind, probe)| {
                let (available, detail) = match probe {
                    Ok(what) => (true, what),
                    Err(why) => (false, why),
                };
                serde_json::json!({"name": kind.name(), "available": available, "detail": detail})
            })
            .collect();
        return output::write_json(path, &list);
    }
    let line = |(kind, probe): &(DeviceKind, Result<String, String>)| match probe {
        Ok(what) => (kind.name(), what.clone()),
        Err(why) => (kind.name(), format!("not available: {why}")),
    };
    output::print(&output::facts(&probes.iter().map(line).collect::<Vec<_>>()))
}
