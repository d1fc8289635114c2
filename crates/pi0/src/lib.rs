//! `pi0`, π0 from checkpoint to actions on whatever hardware there is, as a library: what its binary and the Python
//! package share.

#![forbid(unsafe_code)]

mod commands;
pub mod device;
mod output;
pub mod policy;
mod remote;
pub mod reopen;
mod report;
pub mod weights;

use std::ffi::OsString;

use clap::{Parser, Subcommand};
pub use commands::serve;
pub use pi0_tensix::run_child_if_asked;

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
    Doctor(Box<commands::doctor::Args>),
    Evaluate(Box<commands::evaluate::Args>),
}

/// Runs the command line `args`, the program's name first, and gives its exit code. Results go to standard output,
/// complaints to standard error.
pub fn run(args: impl IntoIterator<Item = OsString>) -> u8 {
    let cli = match Cli::try_parse_from(args) {
        Ok(cli) => cli,
        // Also `--help` and `--version`, which print and succeed.
        Err(e) => {
            let _ = e.print();
            return u8::try_from(e.exit_code()).unwrap_or(2);
        }
    };
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
        Command::Doctor(args) => commands::doctor::run(&args),
        Command::Evaluate(args) => commands::evaluate::run(&args),
    };
    match done {
        Ok(()) => 0,
        Err(e) => {
            eprintln!("error: {}", told(&e));
            1
        }
    }
}

/// An error and what was behind it, each once: most errors say that themselves.
fn told(error: &anyhow::Error) -> String {
    let mut text = error.to_string();
    for cause in error.chain().skip(1).map(ToString::to_string) {
        if !text.contains(&cause) {
            text = format!("{text}: {cause}");
        }
    }
    text
}
