//! Who acts: the network on some device here, or a server elsewhere.

use pi0_model::{ActionModel, SampleOptions};
use pi0_policy::{Observation, Policy};

use crate::{Action, Error, Result};

/// Answers observations with chunks of actions, one for each.
pub trait Actor {
    /// The chunks, in the world's units. `seed` starts the sampling noise.
    fn act(&mut self, observations: &[Observation], seed: u64) -> Result<Vec<Vec<Action>>>;
}

/// The network in this process.
pub struct Local {
    /// Preprocessing, tokens, normalization.
    pub policy: Policy,
    /// The network on its device.
    pub model: Box<dyn ActionModel>,
    /// Euler steps; the checkpoint's when none.
    pub steps: Option<usize>,
}

impl Actor for Local {
    fn act(&mut self, observations: &[Observation], seed: u64) -> Result<Vec<Vec<Action>>> {
        let prepared: Vec<_> =
            observations.iter().map(|o| self.policy.preprocess(o)).collect::<pi0_policy::Result<_>>()?;
        let inputs: Vec<_> = prepared.iter().map(|p| p.inputs.clone()).collect();
        let chunks = self.model.sample_actions(&inputs, &SampleOptions { steps: self.steps, seed })?;
        let chunk = |(chunk, prepared): (&pi0_device::HostTensor, _)| {
            let actions = self.policy.postprocess(&chunk.data, prepared)?;
            actions.iter().map(action).collect()
        };
        chunks.iter().zip(&prepared).map(chunk).collect()
    }
}

/// Four numbers are an action of this world.
pub(crate) fn action(row: &[f64]) -> Result<Action> {
    match *row {
        [x, y, z, opening] => Ok([x as f32, y as f32, z as f32, opening as f32]),
        _ => Err(Error::ActionWidth(row.len())),
    }
}
