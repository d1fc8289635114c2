//! The doctor's look at recordings: what the server would have said, and what the page would have shown.

use std::collections::BTreeMap;
use std::path::Path;

use pi0_doctor::{Doctor, Finding, Kind, Profile, Thresholds};
use pi0_model::Config;
use pi0_policy::{Actions, Policy};

use crate::decode::{Limits, decode};
use crate::page::{Answered, Latest, View, network_picture};
use crate::record::Recording;
use crate::translator::Translator;
use crate::value::{Map, Value};
use crate::{Error, Failure};

/// What the doctor says of a recording.
#[derive(Debug, Clone)]
pub struct Examined {
    /// Everything it found, about the observation and about the answer.
    pub findings: Vec<Finding>,
    /// The page, without pictures; none where the observation was refused.
    pub view: Option<View>,
    /// Which robot it was; none in recordings of earlier versions.
    pub client: Option<u64>,
    inputs: Option<pi0_model::Inputs>,
}

impl Examined {
    /// Whether the finding is here for which `--strict` refused the request, in these words.
    pub(crate) fn has_what_refused(&self, words: &str) -> bool {
        let kind = words.strip_prefix(Failure::STRICT).and_then(|rest| rest.split(':').next());
        self.findings.iter().any(|finding| Some(finding.kind.name()) == kind)
    }

    /// The page with pictures, as the network gets them.
    pub fn view_with_pictures(&self) -> Option<View> {
        let mut view = self.view.clone()?;
        let images = self.inputs.as_ref().map_or(&[][..], |inputs| &inputs.images);
        for (picture, image) in view.pictures.iter_mut().zip(images) {
            picture.src = image.as_deref().and_then(network_picture).and_then(|picture| picture.url());
        }
        Some(view)
    }
}

/// Looks at recordings one after the other, and remembers each robot.
pub struct Examiner {
    translator: Translator,
    doctor: Doctor,
    robots: BTreeMap<Option<u64>, Latest>,
}

impl Examiner {
    /// For recordings of requests to a server of this policy. `config` is the network's.
    pub fn new(policy: Policy, config: &Config, thresholds: Thresholds) -> Self {
        let doctor = Doctor::new(Profile::of(&policy), thresholds);
        // Whether a message is within limits was decided when it was recorded.
        let limits = Limits { depth: 128, values: usize::MAX };
        let translator = Translator::new(policy, config, limits);
        Self { translator, doctor, robots: BTreeMap::new() }
    }

    /// What is known of the checkpoint.
    pub fn profile(&self) -> &Profile {
        self.doctor.profile()
    }

    /// The policy.
    pub fn policy(&self) -> &Policy {
        self.translator.policy()
    }

    pub(crate) fn translator(&self) -> &Translator {
        &self.translator
    }

    /// Looks at a recording and the answer that it holds.
    ///
    /// # Errors
    /// The file is no recording.
    pub fn open(&mut self, path: &Path) -> Result<Examined, Error> {
        Ok(self.look(&Recording::open(path)?, None))
    }

    /// Looks at a recording. `actions` is another answer than the one that it holds: what the network returned, and
    /// the same in the robot's units.
    pub(crate) fn look(&mut self, recording: &Recording, actions: Option<(&[f32], &Actions)>) -> Examined {
        let latest = self.robots.entry(recording.client).or_default();
        let client = recording.client;
        let ready = match self.translator.prepare(&recording.request) {
            Ok(ready) => ready,
            Err(failure) => {
                let finding = self.doctor.refuse(&mut latest.history, &failure.to_string(), recording.time);
                return Examined { findings: vec![finding], view: None, client, inputs: None };
            }
        };
        let policy = self.translator.policy();
        latest.observe(
            &self.doctor,
            policy,
            &ready.observation,
            &ready.prepared,
            ready.unexecuted,
            recording.time,
        );
        let reply =
            recording.outcome.as_ref().ok().and_then(|(_, reply)| decode(reply, Limits::default()).ok());
        let reply = match &reply {
            Some(Value::Map(map)) => Some(map),
            _ => None,
        };
        let latency = reply.and_then(latency).unwrap_or(0.0);
        // The recording was written when the answer was ready.
        let time = recording.time;
        let then = reply.and_then(recorded_actions);
        let answer = match (actions, &then) {
            (Some((network, actions)), _) => Some(Answered::of(policy, network, actions, latency, time)),
            (None, Some(actions)) => {
                let trained = policy.recorded_as_trained(&actions.data, actions.cols, &ready.prepared);
                let malformed = reply.and_then(recorded_complaint).unwrap_or_default();
                trained.ok().map(|trained| Answered::recorded(actions, trained, malformed, latency, time))
            }
            (None, None) => None,
        };
        if let Some(answer) = answer {
            latest.answer(&self.doctor, &answer);
        }
        latest.times = vec![("total", std::time::Duration::try_from_secs_f64(latency).unwrap_or_default())];
        let title = client.map_or_else(|| "recording".to_owned(), |client| format!("robot {client}"));
        let view = latest.view(title, self.doctor.profile(), self.translator.max_tokens());
        let findings = latest.findings.clone();
        Examined { findings, view: Some(view), client, inputs: Some(ready.prepared.inputs) }
    }

    /// Looks at an observation that is no message, and its answer, as those of one robot.
    ///
    /// # Errors
    /// The actions have another shape than the policy's.
    pub fn observation(
        &mut self,
        observation: &pi0_policy::Observation,
        prepared: &pi0_policy::Prepared,
        network: &[f32],
        latency: f64,
        time: f64,
    ) -> Result<Examined, Failure> {
        let latest = self.robots.entry(None).or_default();
        let policy = self.translator.policy();
        latest.observe(&self.doctor, policy, observation, prepared, None, time);
        let actions = policy.postprocess(network, prepared).map_err(|e| Failure::Model(e.to_string()))?;
        latest.answer(&self.doctor, &Answered::of(policy, network, &actions, latency, time));
        latest.times = vec![("total", std::time::Duration::try_from_secs_f64(latency).unwrap_or_default())];
        let view = latest.view("observation".into(), self.doctor.profile(), self.translator.max_tokens());
        let findings = latest.findings.clone();
        Ok(Examined { findings, view: Some(view), client: None, inputs: Some(prepared.inputs.clone()) })
    }
}

/// Seconds from the request to the answer, as the reply says.
fn latency(reply: &Map) -> Option<f64> {
    match reply.get("server_timing") {
        Some(Value::Map(timing)) => timing.get("infer_ms").and_then(Value::number).map(|ms| 1e-3 * ms),
        _ => None,
    }
}

fn recorded_actions(reply: &Map) -> Option<Actions> {
    let Some(Value::Array(array)) = reply.get("actions") else { return None };
    let &[rows, cols] = array.shape.as_slice() else { return None };
    Some(Actions { rows, cols, data: array.numbers()?, warnings: Vec::new() })
}

/// What was said then of the answer that the actions were read from.
fn recorded_complaint(reply: &Map) -> Option<String> {
    let Some(Value::List(findings)) = reply.get("pi0/warnings") else { return None };
    findings.iter().find_map(|finding| {
        let Value::Map(finding) = finding else { return None };
        match (finding.get("kind"), finding.get("text")) {
            (Some(Value::Text(kind)), Some(Value::Text(text))) if kind == Kind::AnswerMalformed.name() => {
                Some(text.clone())
            }
            _ => None,
        }
    })
}
