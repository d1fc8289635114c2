//! `pi0`: π0 from checkpoint to actions on whatever hardware there is.

#![forbid(unsafe_code)]

mod commands;
mod device;
mod output;
mod policy;
mod remote;
mod reopen;
mod report;
mod weights;

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
    Bench(Box<commands::bench::Args>),
    Inspect(commands::inspect::Args),
    Pull(commands::pull::Args),
    Synth(commands::synth::Args),
    Devices(commands::devices::Args),
    Estimate(commands::estimate::Args),
    Check(Box<commands::check::Args>),
    Coverage(Box<commands::coverage::Args>),
    Compare(commands::compare::Args),
    Report(Box<commands::report::Args>),
    Serve(Box<commands::serve::Args>),
    Replay(Box<commands::replay::Args>),
}

fn main() -> ExitCode {
    // The simulator of `--device tensix` lives in a process of its own, which is this program again.
    pi0_tensix::run_child_if_asked();
    let cli = Cli::parse();
    let done = match cli.command {
        Command::Demo(args) => commands::demo::run(&args),
        Command::Infer(args) => commands::infer::run(&args),
        Command::Bench(args) => commands::bench::run(&args),
        Command::Inspect(args) => commands::inspect::run(&args),
        Command::Pull(args) => commands::pull::run(&args),
        Command::Synth(args) => commands::synth::run(&args),
        Command::Devices(args) => commands::devices::run(&args),
        Command::Estimate(args) => commands::estimate::run(&args),
        Command::Check(args) => commands::check::run(&args),
        Command::Coverage(args) => commands::coverage::run(&args),
        Command::Compare(args) => commands::compare::run(&args),
        Command::Report(args) => commands::report::run(&args),
        Command::Serve(args) => commands::serve::run(*args),
        Command::Replay(args) => commands::replay::run(&args),
    };
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(e) => {
            eprintln!("error: {e:#}");
            ExitCode::FAILURE
        }
    }
}
