//! `pi0.judge`.

use std::path::PathBuf;

use pi0_cpu::{Cpu, CpuOptions};
use pi0_judge::dump::{self, Dump};
use pi0_judge::report;
use pi0_model::Checkpoint;
use pyo3::prelude::*;

use crate::errors::{self, Class};
use crate::worker::wait;

/// Judges the dump of an implementation. Gives the verdict as JSON, as text, and as a page.
#[pyfunction]
#[pyo3(signature = (model, dump, format=None))]
pub fn judge(
    py: Python<'_>,
    model: PathBuf,
    dump: PathBuf,
    format: Option<String>,
) -> PyResult<(String, String, String)> {
    let format = format.map(|name| name.parse()).transpose();
    let format = format.map_err(|why: String| Class::Option.raise(py, format!("format: {why}")))?;
    let (say, result) = std::sync::mpsc::channel();
    // In a thread of its own, so that Ctrl-C ends the wait.
    let work = move || {
        let done = || -> anyhow::Result<_> {
            let checkpoint = Checkpoint::open(&model)?;
            let dump = Dump::read(&dump)?;
            let device = Cpu::new(CpuOptions::exact())?;
            let verdict = dump::judge(device, &checkpoint, &dump, format, &pi0_judge::silent)?;
            Ok((serde_json::to_string(&verdict)?, verdict.text(), report::judgement(&verdict)))
        };
        drop(say.send(done()));
    };
    std::thread::Builder::new()
        .name("pi0-judge".into())
        .spawn(work)
        .map_err(|e| Class::Device.raise(py, format!("cannot start a thread: {e}")))?;
    match wait(py, &result)? {
        Some(Ok(done)) => Ok(done),
        Some(Err(e)) => Err(errors::of_any(py, &e)),
        None => Err(Class::Internal.raise(py, "the judge ended without a word, please report it")),
    }
}
