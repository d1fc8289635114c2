//! `pi0 estimate`: what an inference takes on a device that is not here, on paper, and what bounds it.

use std::path::PathBuf;

use anyhow::Result;
use clap::ValueEnum;
use pi0_tensix::perf::{self, Chip, Model, PUBLISHED, Workload};
use serde_json::json;

use crate::output;

/// Estimate on paper what an inference takes on a device that is not here, and what bounds it
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  pi0 estimate --device tensix --chip n300\n  \
                  pi0 estimate --device tensix --model pi05 --cameras 3 --tokens 200 --steps 5\n\n\
                  An estimate is arithmetic, not a measurement: optimistic is what a chip's documentation promises, \
                  realistic what others have measured of its parts.")]
pub struct Args {
    /// The device
    #[arg(long, value_enum)]
    device: Target,
    /// The network, at its full size
    #[arg(long, value_enum, default_value_t)]
    model: Network,
    /// Pictures that the robot's cameras deliver
    #[arg(long, value_name = "N", default_value_t = 2, value_parser = clap::value_parser!(u16).range(0..=8))]
    cameras: u16,
    /// Tokens of the prompt
    #[arg(long, value_name = "N", default_value_t = 32, value_parser = clap::value_parser!(u16).range(1..=1024))]
    tokens: u16,
    /// Denoising steps
    #[arg(long, value_name = "N", default_value_t = 10, value_parser = clap::value_parser!(u16).range(1..=1000))]
    steps: u16,
    /// Tensix: the card; of an n300 one of its two chips
    #[arg(long, value_enum, default_value_t)]
    chip: Card,
    /// Write the estimate as JSON to this file (`-` for standard output)
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
}

/// A device that can be estimated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Target {
    /// Tenstorrent Wormhole
    Tensix,
}

/// A network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum Network {
    /// π0
    #[default]
    Pi0,
    /// π0.5
    Pi05,
}

/// A card.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, ValueEnum)]
enum Card {
    /// 72 cores
    #[default]
    N150,
    /// One of its two chips of 64 cores
    N300,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    match args.device {
        Target::Tensix => tensix(args),
    }
}

fn tensix(args: &Args) -> Result<()> {
    let chip = match args.chip {
        Card::N150 => Chip::N150,
        Card::N300 => Chip::N300,
    };
    let work = Workload {
        model: match args.model {
            Network::Pi0 => Model::Pi0,
            Network::Pi05 => Model::Pi05,
        },
        cameras: args.cameras.into(),
        tokens: args.tokens.into(),
        steps: args.steps.into(),
    };
    let e = perf::estimate(chip, &work);
    let (kernels, total) = (e.kernels(), e.total());
    if let Some(path) = &args.json {
        let line = |l: &perf::Line| {
            json!({
                "stage": l.stage, "kind": l.kind, "launches": l.launches, "bound": l.bound,
                "optimistic_ms": l.optimistic * 1e3, "realistic_ms": l.realistic * 1e3,
            })
        };
        let value = json!({
            "device": "tensix", "chip": chip.name(), "cores": chip.cores(),
            "cameras": args.cameras, "tokens": args.tokens, "steps": args.steps,
            "lines": e.lines.iter().map(line).collect::<Vec<_>>(),
            "launches": e.launch_count(),
            "launches_ms": e.launches.map(|s| s * 1e3),
            "kernels_ms": kernels.map(|s| s * 1e3),
            "total_ms": total.map(|s| s * 1e3),
        });
        return output::write_json(path, &value);
    }
    let ms = |s: f64| format!("{:.1}", s * 1e3);
    let mut rows: Vec<Vec<String>> = e
        .lines
        .iter()
        .map(|l| {
            let what = format!("{}, {}", l.stage, l.kind);
            vec![what, l.launches.to_string(), ms(l.optimistic), ms(l.realistic), l.bound.into()]
        })
        .collect();
    let sum = |what: &str, count: String, [low, high]: [f64; 2]| {
        vec![what.into(), count, ms(low), ms(high), String::new()]
    };
    rows.push(sum("kernels", e.launch_count().to_string(), kernels));
    rows.push(sum("launches", e.launch_count().to_string(), e.launches));
    rows.push(sum("sum", String::new(), total));
    let header = ["", "launches", "optimistic ms", "realistic ms", "bound by"].map(String::from);
    let published = PUBLISHED
        .iter()
        .map(|p| format!("  {:.0} ms: {} ({}; {})\n", p.milliseconds, p.what, p.accuracy, p.source));
    output::print(&format!(
        "{} on {} ({} cores): {} cameras, {} tokens, {} steps. On paper; nothing of this was measured on a card.\n\n\
         {}\nFloors: matrix units alone {} ms, every weight read once a use {} ms.\nMeasured by others:\n{}",
        match args.model {
            Network::Pi0 => "π0",
            Network::Pi05 => "π0.5",
        },
        chip.name(),
        chip.cores(),
        args.cameras,
        args.tokens,
        args.steps,
        output::table(&header, rows),
        ms(e.matrix),
        ms(e.weights),
        published.collect::<String>()
    ))
}
