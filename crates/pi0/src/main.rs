//! The program `pi0`.

#![forbid(unsafe_code)]

use std::process::ExitCode;

fn main() -> ExitCode {
    // The simulator of `--device tensix` lives in a process of its own, which is this program again.
    pi0_cli::run_child_if_asked();
    pi0_cli::run(std::env::args_os()).into()
}
