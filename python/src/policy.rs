//! The policy: an openpi `BasePolicy`.

use std::ffi::CString;
use std::hash::{BuildHasher, Hasher};
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use numpy::PyArrayDyn;
use pi0_policy::{Actions, Prepared, Warning};
use pi0_server::{Failure, Ready, Translator, Value};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use crate::arrays::{array, floats};
use crate::errors::{self, Class};
use crate::model::{Inputs, Model};
use crate::observation::message;
use crate::watch::{Seen, Watch};

/// Observation in, actions in the robot's units out. Takes and gives what openpi's policies do.
#[pyclass(frozen, module = "pi0")]
pub struct Policy {
    model: Model,
    translator: Arc<Translator>,
    watch: Watch,
    /// Of the next inference's noise.
    seed: AtomicU64,
}

impl Policy {
    pub fn new(model: Model, translator: Translator, watch: Watch, seed: Option<u64>) -> Self {
        // A number that differs from start to start.
        let chance = || std::collections::hash_map::RandomState::new().build_hasher().finish();
        Self { model, translator: Arc::new(translator), watch, seed: seed.unwrap_or_else(chance).into() }
    }

    fn prepare(&self, py: Python<'_>, observation: &Bound<'_, PyAny>) -> PyResult<Ready> {
        let message = message(observation)?;
        let ready = py.detach(|| self.translator.ready(&message)).map_err(|e| match e {
            Failure::BadRequest(text) => Class::Observation.raise(py, text),
            other => Class::Internal.raise(py, other.to_string()),
        })?;
        warn(py, &ready.prepared.warnings)?;
        Ok(ready)
    }

    /// The reply to one observation: actions, and what the doctor says. `seen` is what it said of the observation, `start`
    /// when the call began.
    fn reply<'py>(
        &self,
        py: Python<'py>,
        chunk: &[f32],
        prepared: &Prepared,
        mut seen: Seen,
        start: Instant,
    ) -> PyResult<Bound<'py, PyDict>> {
        let actions = self.finish(py, chunk, prepared)?;
        let policy = self.translator.policy();
        py.detach(|| self.watch.answer(policy, &mut seen, chunk, &actions, start.elapsed()));
        self.watch.allow(py, &seen)?;
        let reply = PyDict::new(py);
        reply.set_item("actions", array(py, &[actions.rows, actions.cols], actions.data)?)?;
        if let Some(warnings) = seen.warnings(py)? {
            reply.set_item("pi0/warnings", warnings)?;
        }
        Ok(reply)
    }

    fn finish(&self, py: Python<'_>, chunk: &[f32], prepared: &Prepared) -> PyResult<Actions> {
        let done = py.detach(|| self.translator.policy().postprocess(chunk, prepared));
        let actions = done.map_err(|e| errors::of_policy(py, &e))?;
        warn(py, &actions.warnings)?;
        Ok(actions)
    }
}

/// Tells what the policy has to say, of an observation or of π0-FAST's answer.
fn warn(py: Python<'_>, warnings: &[Warning]) -> PyResult<()> {
    if warnings.is_empty() {
        return Ok(());
    }
    let class = py.import("pi0._errors")?.getattr("ObservationWarning")?;
    for warning in warnings {
        // No text of ours holds a zero; one that did would lose its warning.
        let text = CString::new(warning.to_string()).unwrap_or_default();
        PyErr::warn(py, &class, &text, 2)?;
    }
    Ok(())
}

#[pymethods]
impl Policy {
    /// Actions for one observation: `{"actions": [T, A], "policy_timing": {"infer_ms": …}}`, and `pi0/warnings` where the
    /// doctor finds something.
    #[pyo3(signature = (observation, *, noise=None, seed=None, steps=None))]
    fn infer<'py>(
        &self,
        py: Python<'py>,
        observation: &Bound<'_, PyAny>,
        noise: Option<&Bound<'_, PyAny>>,
        seed: Option<u64>,
        steps: Option<usize>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let start = Instant::now();
        let Ready { observation, mut prepared, .. } = self.prepare(py, observation)?;
        let seen = py.detach(|| self.watch.observe(self.translator.policy(), &observation, &prepared));
        self.watch.allow(py, &seen)?;
        if let Some(noise) = noise {
            prepared.inputs.noise = Some(floats("noise", noise)?.1);
        }
        let inputs = std::mem::take(&mut prepared.inputs);
        let seed = seed.unwrap_or_else(|| self.seed.fetch_add(1, Ordering::Relaxed));
        let model_start = Instant::now();
        let chunk = self.model.run(py, vec![inputs], seed, steps)?.concat();
        let model_time = model_start.elapsed();
        let reply = self.reply(py, &chunk, &prepared, seen, start)?;
        let timing = PyDict::new(py);
        timing.set_item("infer_ms", model_time.as_secs_f64() * 1e3)?;
        timing.set_item("total_ms", start.elapsed().as_secs_f64() * 1e3)?;
        reply.set_item("policy_timing", timing)?;
        Ok(reply)
    }

    /// Actions for several observations in one pass of the network, a dictionary for each.
    #[pyo3(signature = (observations, *, seed=None, steps=None))]
    fn infer_batch<'py>(
        &self,
        py: Python<'py>,
        observations: &Bound<'_, PyAny>,
        seed: Option<u64>,
        steps: Option<usize>,
    ) -> PyResult<Bound<'py, PyList>> {
        let begin = Instant::now();
        let prepare = |item: PyResult<Bound<'_, PyAny>>| -> PyResult<(Prepared, Seen)> {
            let Ready { observation, prepared, .. } = self.prepare(py, &item?)?;
            let seen = py.detach(|| self.watch.observe(self.translator.policy(), &observation, &prepared));
            self.watch.allow(py, &seen)?;
            Ok((prepared, seen))
        };
        let mut all: Vec<_> = observations.try_iter()?.map(prepare).collect::<PyResult<_>>()?;
        if all.is_empty() {
            return Ok(PyList::empty(py));
        }
        let batch: Vec<_> = all.iter_mut().map(|(p, _)| std::mem::take(&mut p.inputs)).collect();
        let seed = seed.unwrap_or_else(|| self.seed.fetch_add(batch.len() as u64, Ordering::Relaxed));
        let start = Instant::now();
        let chunks = self.model.run(py, batch, seed, steps)?;
        let ms = start.elapsed().as_secs_f64() * 1e3;
        let replies = PyList::empty(py);
        for (chunk, (prepared, seen)) in chunks.iter().zip(all) {
            let reply = self.reply(py, chunk, &prepared, seen, begin)?;
            let timing = PyDict::new(py);
            timing.set_item("infer_ms", ms)?;
            reply.set_item("policy_timing", timing)?;
            replies.append(reply)?;
        }
        Ok(replies)
    }

    /// From an observation to the network's inputs.
    fn preprocess(&self, py: Python<'_>, observation: &Bound<'_, PyAny>) -> PyResult<Inputs> {
        Ok(Inputs::of_prepared(self.prepare(py, observation)?.prepared))
    }

    /// From the network's actions `[horizon, action_dim]` to the robot's. `inputs` are those that they were made from:
    /// relative actions refer to their state.
    fn postprocess<'py>(
        &self,
        py: Python<'py>,
        actions: &Bound<'_, PyAny>,
        inputs: &Inputs,
    ) -> PyResult<Bound<'py, PyArrayDyn<f64>>> {
        let (_, values) = floats("actions", actions)?;
        let actions = self.finish(py, &values, inputs.prepared(py)?)?;
        array(py, &[actions.rows, actions.cols], actions.data)
    }

    /// Forgets nothing, because nothing is kept: each inference stands alone.
    fn reset(&self) {}

    /// The network alone.
    #[getter]
    fn model(&self) -> Model {
        self.model.clone()
    }

    /// What openpi's server tells its clients.
    #[getter]
    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let dict = PyDict::new(py);
        let Value::Map(map) = pi0_server::metadata(&self.translator.policy().summary()) else {
            return Ok(dict);
        };
        for (key, value) in map.iter() {
            if let Value::List(items) = value {
                let number = |v: &Value| match v {
                    Value::Int(x) => Ok((*x as i64).into_pyobject(py)?.into_any()),
                    other => Ok::<_, PyErr>(other.number().unwrap_or(f64::NAN).into_pyobject(py)?.into_any()),
                };
                dict.set_item(
                    key,
                    PyList::new(py, items.iter().map(number).collect::<PyResult<Vec<_>>>()?)?,
                )?;
            }
        }
        Ok(dict)
    }

    /// What the checkpoint and the options came to, as JSON.
    fn _summary(&self, py: Python<'_>) -> PyResult<String> {
        let summary = self.translator.policy().summary();
        serde_json::to_string(&summary).map_err(|e| Class::Internal.raise(py, e.to_string()))
    }

    fn __repr__(&self) -> String {
        let summary = self.translator.policy().summary();
        let robot = summary.robot.map_or_else(|| "none".to_string(), |r| r.to_string());
        format!("Policy(robot={robot:?}, {} actions of {})", summary.actions_per_chunk, summary.action_width)
    }
}
