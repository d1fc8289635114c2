//! Who acts: the network on some device here, or a server elsewhere.

use pi0_model::{ActionModel, SampleOptions};
use pi0_policy::{Image, Observation, Policy};

use crate::episode::{Eye, View};
use crate::render::Frame;
use crate::{Action, Error, Result};

/// Answers views with chunks of actions, one for each.
pub trait Actor {
    /// The chunks, in the world's units. `seed` starts the sampling noise.
    fn act(&mut self, views: &[View], seed: u64) -> Result<Vec<Vec<Action>>>;
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
    fn act(&mut self, views: &[View], seed: u64) -> Result<Vec<Vec<Action>>> {
        let prepare = |view: &View| self.policy.preprocess(&observation(view));
        let prepared: Vec<_> = views.iter().map(prepare).collect::<pi0_policy::Result<_>>()?;
        let inputs: Vec<_> = prepared.iter().map(|p| p.inputs.clone()).collect();
        let chunks = self.model.sample_actions(&inputs, &SampleOptions { steps: self.steps, seed })?;
        let chunk = |(chunk, prepared): (&pi0_device::HostTensor, _)| {
            let actions = self.policy.postprocess(&chunk.data, prepared)?;
            actions.iter().map(action).collect()
        };
        chunks.iter().zip(&prepared).map(chunk).collect()
    }
}

/// As the policy takes it.
pub fn observation(view: &View) -> Observation {
    let image = |(eye, frame): &(Eye, Frame)| {
        (eye.key().to_owned(), Image::rgb8(frame.rgb.clone(), frame.height, frame.width))
    };
    Observation {
        images: view.images.iter().map(image).collect(),
        state: view.state.map(f64::from).to_vec(),
        prompt: Some(view.prompt.clone()),
    }
}

/// Four numbers are an action of this world.
pub fn action(row: &[f64]) -> Result<Action> {
    match *row {
        [x, y, z, opening] => Ok([x as f32, y as f32, z as f32, opening as f32]),
        _ => Err(Error::ActionWidth(row.len())),
    }
}
