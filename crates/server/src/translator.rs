//! From a message to the network's inputs.

use bytes::Bytes;
use pi0_model::{Config, Guidance};
use pi0_policy::{Policy, Prepared};

use crate::decode::decode;
use crate::request::{RequestReader, Rtc};
use crate::value::Value;
use crate::{Failure, Limits};

/// What turns messages into network inputs, with or without a server around it.
pub struct Translator {
    policy: Policy,
    reader: RequestReader,
    limits: Limits,
    /// Padded width of an action.
    action_dim: usize,
    /// Actions in a chunk.
    horizon: usize,
}

impl Translator {
    /// For the messages of one policy; `limits` are those of frames.
    pub fn new(policy: Policy, config: &Config, limits: Limits) -> Self {
        let (action_dim, horizon) = (config.action_dim, config.horizon);
        Self { reader: RequestReader::new(&policy), policy, limits, action_dim, horizon }
    }

    /// The policy.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Decodes and preprocesses a frame.
    ///
    /// # Errors
    /// The client's fault, in words.
    pub fn prepare(&self, frame: &Bytes) -> Result<Prepared, Failure> {
        self.prepare_message(&decode(frame, self.limits).map_err(Failure::bad)?)
    }

    /// Preprocesses a decoded observation.
    ///
    /// # Errors
    /// The client's fault, in words.
    pub fn prepare_message(&self, message: &Value) -> Result<Prepared, Failure> {
        let request = self.reader.read(message)?;
        let mut prepared = self.policy.preprocess(&request.observation).map_err(Failure::bad)?;
        for warning in &prepared.warnings {
            tracing::debug!(%warning, "observation");
        }
        if let Some(noise) = request.noise {
            let wanted = self.horizon * self.action_dim;
            if noise.len() != wanted || noise.iter().any(|x| !x.is_finite()) {
                let (rows, cols) = (self.horizon, self.action_dim);
                let got = noise.len();
                let why = format!("`pi0/noise` has {got} values, wanted {rows} x {cols} finite ones");
                return Err(Failure::bad(why));
            }
            prepared.inputs.noise = Some(noise);
        }
        if let Some(rtc) = request.rtc {
            prepared.inputs.rtc = Some(pi0_model::Rtc::Guided(self.guidance(rtc, &prepared)?));
        }
        Ok(prepared)
    }

    fn guidance(&self, rtc: Rtc, prepared: &Prepared) -> Result<Guidance, Failure> {
        let rows = rtc.previous.len() / rtc.cols.max(1);
        if rows > self.horizon {
            let horizon = self.horizon;
            return Err(Failure::bad(format!("`rtc/previous` has {rows} actions, a chunk has {horizon}")));
        }
        let previous = self
            .policy
            .normalize_actions(&rtc.previous, rtc.cols, prepared)
            .map_err(|e| Failure::bad(format!("`rtc/previous`: {e}")))?;
        Ok(Guidance {
            previous,
            delay: rtc.delay,
            execution_horizon: rtc.execution_horizon,
            max_weight: rtc.max_weight,
            schedule: rtc.schedule,
        })
    }
}
