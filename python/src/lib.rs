//! The Rust side of the Python package `pi0`.
//!
//! `load` makes a [`Policy`](policy::Policy) whose network lives in a thread of its own ([`worker`]); calls from Python
//! translate their arguments with the GIL ([`observation`], [`arrays`]), give it up while anything is computed, and wake
//! now and then to hear of Ctrl-C.

mod arrays;
mod errors;
mod judge;
mod load;
mod model;
mod observation;
mod policy;
mod watch;
mod worker;

#[pyo3::pymodule]
mod _native {
    use std::ffi::OsString;

    use pyo3::prelude::*;

    #[pymodule_export]
    use crate::judge::judge;
    #[pymodule_export]
    use crate::load::load;
    #[pymodule_export]
    use crate::model::{Inputs, Model};
    #[pymodule_export]
    use crate::policy::Policy;

    /// The command line: `args` with the program's name first. Returns the exit code.
    #[pyfunction]
    fn main(py: Python<'_>, args: Vec<OsString>) -> u8 {
        py.detach(|| {
            // The simulator of `--device tensix` lives in a process of its own, which is this program again.
            pi0_cli::run_child_if_asked();
            pi0_cli::run(args)
        })
    }

    #[pymodule_init]
    fn init(m: &Bound<'_, PyModule>) -> PyResult<()> {
        m.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
