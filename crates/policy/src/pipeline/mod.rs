//! What happens to state, prompt and actions, one step after the other. Both families of checkpoints come down to
//! such a list: lerobot writes it into files, openpi keeps it in code.

mod normalize;
mod previous;

use serde::Serialize;

pub use normalize::{Formula, Normalizer, OPENPI_EPS, Stats};

use crate::prompt::{PromptFormat, StateText, Tokenizer};
use crate::robot::AlohaUnits;
use crate::{Error, Result, Warning};

/// A step before the network.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum InputStep {
    /// ALOHA's state in π0's units.
    Aloha(AlohaUnits),
    /// Ends the prompt with a newline, unless it has one.
    NewLine,
    /// π0.5: the prompt becomes a text that holds the state as it is now.
    StateText(StateText),
    /// The prompt as at most so many tokens.
    Tokenize(PromptFormat, usize),
    /// Relative actions refer to the state as it is now.
    Reference,
    /// Relative actions refer to the state as it is now, brought back through this normalization: openpi.
    ReferenceBack(Normalizer),
    /// The state in the network's units.
    Normalize(Normalizer),
}

/// A step behind the network, on one action.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum OutputStep {
    /// Keeps the first dimensions.
    Crop(usize),
    /// From the network's units.
    Unnormalize(Normalizer),
    /// Adds the reference state where true.
    Absolute(Vec<bool>),
    /// The same in f32, as lerobot computes.
    AbsoluteF32(Vec<bool>),
    /// From π0's units to ALOHA's.
    Aloha(AlohaUnits),
}

/// State and prompt on their way through the input steps.
#[derive(Debug, Default)]
pub(crate) struct Transition {
    pub state: Vec<f64>,
    pub prompt: String,
    pub tokens: Vec<u32>,
    /// Whether the prompt holds the state.
    pub state_in_prompt: bool,
    /// What relative actions are relative to.
    pub reference: Vec<f64>,
    pub warnings: Vec<Warning>,
}

impl Transition {
    /// Runs the steps. `vocabulary` is the model's.
    pub fn run(&mut self, steps: &[InputStep], tokenizer: &Tokenizer, vocabulary: usize) -> Result<()> {
        for step in steps {
            match step {
                InputStep::Aloha(units) => units.decode_state(&mut self.state),
                InputStep::NewLine if self.prompt.ends_with('\n') => {}
                InputStep::NewLine => self.prompt.push('\n'),
                InputStep::StateText(text) => {
                    finite(&self.state, true)?;
                    if self.prompt.trim().is_empty() {
                        self.warnings.push(Warning::PromptEmpty);
                    }
                    self.prompt = text.write(&self.prompt, &self.state);
                    self.state_in_prompt = true;
                }
                InputStep::Tokenize(format, limit) => {
                    let before = self.warnings.len();
                    self.tokens =
                        format.tokens(tokenizer, &self.prompt, *limit, vocabulary, &mut self.warnings)?;
                    // The state stands at the end: upstream cuts it off and plans blindly.
                    let cut = self.warnings[before..].iter().find_map(|warning| match warning {
                        Warning::PromptTruncated { tokens, kept } => Some((*tokens, *kept)),
                        _ => None,
                    });
                    if let Some((tokens, limit)) = cut.filter(|_| self.state_in_prompt) {
                        return Err(Error::PromptTooLong { tokens, limit });
                    }
                }
                InputStep::Reference => self.reference = self.state.clone(),
                InputStep::ReferenceBack(normalizer) => {
                    self.reference = self.state.clone();
                    normalizer.inverse(&mut self.reference);
                }
                InputStep::Normalize(normalizer) => {
                    if normalizer.needs_width().is_some_and(|width| width != self.state.len()) {
                        let wanted = format!("its normalization has {}", normalizer.width());
                        return Err(Error::StateLength { got: self.state.len(), wanted });
                    }
                    normalizer.forward(&mut self.state);
                }
            }
        }
        Ok(())
    }
}

/// Runs the output steps on one action.
pub(crate) fn run_outputs(steps: &[OutputStep], action: &mut Vec<f64>, reference: &[f64]) {
    for step in steps {
        match step {
            OutputStep::Crop(width) => action.truncate(*width),
            OutputStep::Unnormalize(normalizer) => normalizer.inverse(action),
            OutputStep::Absolute(mask) => {
                for ((x, state), _) in action.iter_mut().zip(reference).zip(mask).filter(|(_, on)| **on) {
                    *x += state;
                }
            }
            OutputStep::AbsoluteF32(mask) => {
                for ((x, state), _) in action.iter_mut().zip(reference).zip(mask).filter(|(_, on)| **on) {
                    *x = f64::from(*x as f32 + *state as f32);
                }
            }
            OutputStep::Aloha(units) => units.encode_action(action),
        }
    }
}

/// Length of the state that a policy takes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct StateLength {
    /// The one length, or the smallest.
    pub min: usize,
    /// The one length, or the largest.
    pub max: usize,
    /// Who says so.
    pub source: String,
}

impl StateLength {
    /// Checks the length of a state, and that it holds finite f32.
    pub(crate) fn check(&self, state: &[f64]) -> Result<()> {
        if !(self.min..=self.max).contains(&state.len()) {
            let Self { min, max, source } = self;
            let range = if min == max { format!("{max}") } else { format!("{min} to {max}") };
            return Err(Error::StateLength { got: state.len(), wanted: format!("{source} wants {range}") });
        }
        finite(state, false)
    }
}

/// Refuses NaN, infinity and what becomes infinite in f32.
pub(crate) fn finite(state: &[f64], normalized: bool) -> Result<()> {
    match state.iter().position(|x| !(*x as f32).is_finite()) {
        Some(index) => Err(Error::StateValue { index, value: state[index], normalized }),
        None => Ok(()),
    }
}
