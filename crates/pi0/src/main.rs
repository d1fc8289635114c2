//! `pi0`: π0 from checkpoint to actions on whatever hardware there is.

#![forbid(unsafe_code)]

mod commands;
mod device;
mod output;
mod policy;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

#[derive(Parser)]
#[command(name = "pi0", version, about, max_term_width = 110)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    Demo(Box<commands::demo::Args>),
    Infer(Box<commands::infer::Args>),
    Inspect(commands::inspect::Args),
    Synth(commands::synth::Args),
    Devices(commands::devices::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let done = match cli.command {
        Command::Demo(args) => commands::demo::run(&args),
        Command::Infer(args) => commands::infer::run(&args),
        Command::Inspect(args) => commands::inspect::run(&args),
        Command::Synth(args) => commands::synth::run(&args),
        Command::Devices(args) => commands::devices::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}
