//! The network on model tensors.

use std::sync::Arc;

use numpy::PyArrayDyn;
use pi0_model::{Clean, Config, Guidance, GuidanceSchedule, Kind, Rtc, SampleOptions};
use pi0_policy::Prepared;
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use crate::arrays::{array, floats, numpy};
use crate::errors::{self, Class};
use crate::worker::Worker;

/// What one robot sees, ready for the network: images `[3, H, W]` in -1..1 or None for an absent camera, the prompt's
/// tokens, the normalized state; optionally the starting noise `[horizon, action_dim]` and the previous chunk.
#[pyclass(module = "pi0")]
pub struct Inputs {
    inputs: pi0_model::Inputs,
    /// Where `preprocess` made it.
    prepared: Option<Prepared>,
}

impl Inputs {
    /// From an observation.
    pub fn of_prepared(mut prepared: Prepared) -> Self {
        Self { inputs: std::mem::take(&mut prepared.inputs), prepared: Some(prepared) }
    }

    /// What `postprocess` needs.
    pub fn prepared(&self, py: Python<'_>) -> PyResult<&Prepared> {
        self.prepared
            .as_ref()
            .ok_or_else(|| Class::Input.raise(py, "postprocess needs the inputs that preprocess gave"))
    }
}

#[pymethods]
impl Inputs {
    #[new]
    #[pyo3(signature = (images, tokens, state=None, noise=None))]
    fn new(
        py: Python<'_>,
        images: &Bound<'_, PyAny>,
        tokens: &Bound<'_, PyAny>,
        state: Option<&Bound<'_, PyAny>>,
        noise: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Self> {
        let mut all = Vec::new();
        for (i, image) in images.try_iter()?.enumerate() {
            let image = image?;
            all.push(match image.is_none() {
                true => None,
                false => {
                    let (shape, values) = floats(&format!("images[{i}]"), &image)?;
                    if shape.len() != 3 || shape[0] != 3 {
                        let why = format!("images[{i}] has shape {shape:?}, wanted [3, height, width]");
                        return Err(Class::Input.raise(py, why));
                    }
                    Some(values)
                }
            });
        }
        let inputs = pi0_model::Inputs {
            images: all,
            tokens: tokens_of(tokens)?,
            state: state.map(|s| Ok::<_, PyErr>(floats("state", s)?.1)).transpose()?.unwrap_or_default(),
            noise: noise.map(|n| Ok::<_, PyErr>(floats("noise", n)?.1)).transpose()?,
            ..Default::default()
        };
        Ok(Self { inputs, prepared: None })
    }

    /// Images `[3, H, W]`, None where a camera is absent. Copies.
    #[getter]
    fn images<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyList>> {
        let one = |image: &Option<Vec<f32>>| match image {
            None => Ok(py.None().into_bound(py)),
            Some(values) => {
                let side = ((values.len() / 3) as f64).sqrt() as usize;
                Ok::<_, PyErr>(array(py, &[3, side, side], values.clone())?.into_any())
            }
        };
        PyList::new(py, self.inputs.images.iter().map(one).collect::<PyResult<Vec<_>>>()?)
    }

    /// The prompt's tokens.
    #[getter]
    fn tokens<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArrayDyn<u32>>> {
        array(py, &[self.inputs.tokens.len()], self.inputs.tokens.clone())
    }

    /// The normalized state.
    #[getter]
    fn state<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
        array(py, &[self.inputs.state.len()], self.inputs.state.clone())
    }

    /// The starting noise, or None where it is drawn from a seed.
    #[getter]
    fn noise<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyArrayDyn<f32>>>> {
        self.inputs.noise.as_ref().map(|n| array(py, &[n.len()], n.clone())).transpose()
    }

    #[setter]
    fn set_noise(&mut self, noise: Option<&Bound<'_, PyAny>>) -> PyResult<()> {
        self.inputs.noise = noise.map(|n| Ok::<_, PyErr>(floats("noise", n)?.1)).transpose()?;
        Ok(())
    }

    /// Continues a chunk that is still being executed, as lerobot's guided real-time chunking does. `previous` is its
    /// unexecuted tail `[length, action_dim]` in the network's units, `delay` the actions that will be executed meanwhile.
    #[pyo3(signature = (previous, delay=0, execution_horizon=10, max_guidance_weight=10.0, schedule="linear"))]
    fn follow(
        &mut self,
        py: Python<'_>,
        previous: &Bound<'_, PyAny>,
        delay: usize,
        execution_horizon: usize,
        max_guidance_weight: f64,
        schedule: &str,
    ) -> PyResult<()> {
        let schedule = match schedule.to_ascii_lowercase().as_str() {
            "zeros" => GuidanceSchedule::Zeros,
            "ones" => GuidanceSchedule::Ones,
            "linear" => GuidanceSchedule::Linear,
            "exp" => GuidanceSchedule::Exp,
            _ => {
                let why = format!("schedule is {schedule:?}, wanted one of zeros, ones, linear, exp");
                return Err(Class::Input.raise(py, why));
            }
        };
        if !(max_guidance_weight.is_finite() && max_guidance_weight >= 0.0) {
            return Err(Class::Input.raise(py, "max_guidance_weight must be a number from 0"));
        }
        let previous = floats("previous", previous)?.1;
        let guidance =
            Guidance { previous, delay, execution_horizon, max_weight: max_guidance_weight, schedule };
        self.inputs.rtc = Some(Rtc::Guided(guidance));
        Ok(())
    }

    /// Writes on behind actions that are known already, as lerobot's trained real-time chunking does: the first `delay` of
    /// `previous` `[length, action_dim]`, in the network's units. For π0.5 checkpoints that learned it.
    fn continue_from(&mut self, previous: &Bound<'_, PyAny>, delay: usize) -> PyResult<()> {
        let previous = floats("previous", previous)?.1;
        self.inputs.rtc = Some(Rtc::Trained(Clean { previous, delay }));
        Ok(())
    }

    fn __repr__(&self) -> String {
        let cameras = self.inputs.images.iter().filter(|i| i.is_some()).count();
        format!(
            "Inputs({cameras} of {} cameras, {} tokens)",
            self.inputs.images.len(),
            self.inputs.tokens.len()
        )
    }
}

fn tokens_of(tokens: &Bound<'_, PyAny>) -> PyResult<Vec<u32>> {
    let py = tokens.py();
    let refuse = |e: PyErr| Class::Input.raise(py, format!("tokens cannot be read: {}", e.value(py)));
    let array = numpy(py, "asarray")?.call1((tokens,)).map_err(refuse)?;
    let kind: String = array.getattr("dtype")?.getattr("kind")?.extract()?;
    let empty = array.len()? == 0;
    if !empty && kind != "i" && kind != "u" {
        let dtype = array.getattr("dtype")?.str()?;
        return Err(Class::Input.raise(py, format!("tokens have dtype {dtype}, wanted whole numbers")));
    }
    let list: Vec<i64> = array.call_method0("tolist")?.extract().map_err(refuse)?;
    let token = |t: &i64| {
        u32::try_from(*t).map_err(|_| Class::Input.raise(py, format!("token {t}, wanted a number from 0")))
    };
    list.iter().map(token).collect()
}

/// The network, for model tensors: nothing is resized, tokenized or normalized here.
#[pyclass(frozen, module = "pi0")]
#[derive(Clone)]
pub struct Model {
    worker: Arc<Worker>,
    config: Arc<Config>,
    steps: Option<usize>,
    device: &'static str,
}

impl Model {
    pub fn new(worker: Arc<Worker>, config: Arc<Config>, steps: Option<usize>, device: &'static str) -> Self {
        Self { worker, config, steps, device }
    }

    /// Runs the network on `batch`; gives `[T, A]` for each.
    pub fn run(
        &self,
        py: Python<'_>,
        batch: Vec<pi0_model::Inputs>,
        seed: u64,
        steps: Option<usize>,
    ) -> PyResult<Vec<Vec<f32>>> {
        let options = SampleOptions { steps: steps.or(self.steps), seed };
        let done = self.worker.call(py, move |model| model.sample_actions(&batch, &options))?;
        let chunks = done.map_err(|e| errors::of_model(py, &e))?;
        Ok(chunks.into_iter().map(|chunk| chunk.data).collect())
    }
}

#[pymethods]
impl Model {
    /// Actions of each of `inputs`, `[B, horizon, action_dim]`, in the network's units; of π0-FAST the tokens of its answers,
    /// `[B, longest]`. Row `i` without noise of its own
    /// draws from `seed + i`.
    #[pyo3(signature = (inputs, *, seed=0, steps=None))]
    fn sample_actions<'py>(
        &self,
        py: Python<'py>,
        inputs: &Bound<'_, PyAny>,
        seed: u64,
        steps: Option<usize>,
    ) -> PyResult<Bound<'py, PyArrayDyn<f32>>> {
        let batch: Vec<pi0_model::Inputs> = match inputs.cast::<Inputs>() {
            Ok(one) => vec![one.borrow().inputs.clone()],
            Err(_) => {
                let one = |item: PyResult<Bound<'_, PyAny>>| {
                    let item = item?;
                    let one = item.cast::<Inputs>().map_err(|_| {
                        let got = item.get_type().name().map_or_else(|_| "?".into(), |n| n.to_string());
                        Class::Input.raise(py, format!("inputs are pi0.Inputs or a list of them, got {got}"))
                    })?;
                    Ok(one.borrow().inputs.clone())
                };
                inputs.try_iter()?.map(one).collect::<PyResult<_>>()?
            }
        };
        let robots = batch.len();
        let mut chunks = self.run(py, batch, seed, steps)?;
        if self.config.kind == Kind::Pi0Fast {
            // Answers: tokens, as many as the longest has, zeros behind the others.
            let longest = chunks.iter().map(Vec::len).max().unwrap_or(0);
            chunks.iter_mut().for_each(|answer| answer.resize(longest, 0.0));
            return array(py, &[robots, longest], chunks.concat());
        }
        array(py, &[robots, self.config.horizon, self.config.action_dim], chunks.concat())
    }

    /// Sizes of the network, as a dictionary.
    #[getter]
    fn config<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let c = &self.config;
        let dict = PyDict::new(py);
        dict.set_item("kind", c.kind.name())?;
        dict.set_item("horizon", c.horizon)?;
        dict.set_item("action_dim", c.action_dim)?;
        dict.set_item("state_dim", c.state_dim)?;
        dict.set_item("max_tokens", c.max_tokens)?;
        dict.set_item("num_steps", self.steps.unwrap_or(c.num_steps))?;
        dict.set_item("image_size", c.vision.image_size)?;
        dict.set_item("vocab_size", c.vocab_size)?;
        Ok(dict)
    }

    /// Name of the device.
    #[getter]
    fn device(&self) -> &'static str {
        self.device
    }

    fn __repr__(&self) -> String {
        format!("Model(device={:?}, horizon={})", self.device, self.config.horizon)
    }
}
