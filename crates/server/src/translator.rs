//! From a message to the network's inputs.

use std::collections::HashSet;
use std::sync::Mutex;

use bytes::Bytes;
use pi0_model::{Clean, Config, Guidance, Rtc};
use pi0_policy::{Observation, Policy, Prepared, Warning};

use crate::decode::decode;
use crate::request::{self, RequestReader, RtcMode};
use crate::value::Value;
use crate::{Failure, Limits};

/// What turns messages into network inputs, with or without a server around it.
pub struct Translator {
    policy: Policy,
    reader: RequestReader,
    limits: Limits,
    config: Config,
    max_tokens: usize,
    warned: Warned,
}

/// A request, ready for the network.
#[derive(Debug)]
pub struct Ready {
    /// As the robot sent it.
    pub observation: Observation,
    /// As the network takes it.
    pub prepared: Prepared,
    /// How many actions of the last chunk the robot has not executed, where it says so.
    pub unexecuted: Option<usize>,
}

/// Warnings that were logged. A robot repeats its mistake many times a second; the log says each once.
#[derive(Debug, Default)]
struct Warned(Mutex<HashSet<String>>);

impl Warned {
    fn say(&self, warning: &Warning) {
        /// Their words may quote clients: no more are kept, and told apart, than this.
        const MOST: usize = 256;
        // Whose text the client chooses anew each time would fill the log.
        let each_time = matches!(warning, Warning::PromptTruncated { .. } | Warning::PromptEmpty);
        let text = warning.to_string();
        let Ok(mut said) = self.0.lock() else { return };
        if !each_time && said.len() < MOST && said.insert(text.clone()) {
            tracing::warn!(warning = text, "observation");
        } else {
            tracing::debug!(warning = text, "observation");
        }
    }
}

impl Translator {
    /// For the messages of one policy; `limits` are those of frames.
    pub fn new(policy: Policy, config: &Config, limits: Limits) -> Self {
        let (reader, config, warned) = (RequestReader::new(&policy), config.clone(), Warned::default());
        let max_tokens = policy.summary().max_tokens;
        Self { policy, reader, limits, config, max_tokens, warned }
    }

    /// The policy.
    pub fn policy(&self) -> &Policy {
        &self.policy
    }

    /// Tokens of the longest prompt.
    pub(crate) fn max_tokens(&self) -> usize {
        self.max_tokens
    }

    /// Decodes and preprocesses a frame.
    pub(crate) fn prepare(&self, frame: &Bytes) -> Result<Ready, Failure> {
        self.ready(&decode(frame, self.limits).map_err(Failure::bad)?)
    }

    /// Preprocesses a decoded observation.
    ///
    /// # Errors
    /// The client's fault, in words.
    pub fn ready(&self, message: &Value) -> Result<Ready, Failure> {
        let request = self.reader.read(message)?;
        let mut prepared = self.policy.preprocess(&request.observation).map_err(Failure::bad)?;
        for warning in &prepared.warnings {
            self.warned.say(warning);
        }
        if let Some(noise) = request.noise {
            let (rows, cols) = (self.config.horizon, self.config.action_dim);
            if noise.len() != rows * cols || noise.iter().any(|x| !x.is_finite()) {
                let got = noise.len();
                let why = format!("`pi0/noise` has {got} values, wanted {rows} x {cols} finite ones");
                return Err(Failure::bad(why));
            }
            prepared.inputs.noise = Some(noise);
        }
        let unexecuted = request.rtc.as_ref().map(|rtc| rtc.previous.len() / rtc.cols.max(1));
        if let Some(rtc) = request.rtc {
            prepared.inputs.rtc = Some(self.rtc(rtc, &prepared)?);
        }
        Ok(Ready { observation: request.observation, prepared, unexecuted })
    }

    /// Real-time chunking in the network's units, checked against what the checkpoint learned.
    fn rtc(&self, rtc: request::Rtc, prepared: &Prepared) -> Result<Rtc, Failure> {
        let Config { horizon, rtc_training_max_delay: longest, .. } = self.config;
        let default = if longest > 0 { RtcMode::Trained } else { RtcMode::Guided };
        let mode = rtc.mode.unwrap_or(default);
        let refuse = |why: String| Err(Failure::bad(why));
        let rows = rtc.previous.len() / rtc.cols.max(1);
        let delay = rtc.delay;
        if rows > horizon {
            return refuse(format!("`rtc/previous` has {rows} actions, a chunk has {horizon}"));
        }
        if mode == RtcMode::Trained {
            if longest == 0 {
                return refuse(
                    "`rtc/mode` is trained, which this checkpoint did not learn; guided needs no training"
                        .into(),
                );
            }
            if delay > longest {
                return refuse(format!(
                    "`rtc/delay` is {delay}; this checkpoint learned to continue after at most {longest} actions \
                     (`rtc/mode` guided takes any delay)"
                ));
            }
            if delay > rows {
                return refuse(format!(
                    "`rtc/previous` has {rows} actions, fewer than the `rtc/delay` of {delay}"
                ));
            }
        }
        let previous = self
            .policy
            .normalize_actions(&rtc.previous, rtc.cols, prepared)
            .map_err(|e| Failure::bad(format!("`rtc/previous`: {e}")))?;
        Ok(match mode {
            RtcMode::Trained => Rtc::Trained(Clean { previous, delay }),
            RtcMode::Guided => Rtc::Guided(Guidance {
                previous,
                delay,
                execution_horizon: rtc.execution_horizon,
                max_weight: rtc.max_weight,
                schedule: rtc.schedule,
            }),
        })
    }
}
