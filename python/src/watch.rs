//! The doctor's look at single observations and their answers.
//!
//! Which robot an observation is of, nobody says here: calls of several may be mixed. So each is looked at alone, and what
//! only a sequence shows (a frozen picture, chunks that jump) is left to the server, which knows its connections.

use std::time::Duration;

use pi0_doctor::{Chunk, Doctor, Finding, History, Kind, Profile, Thresholds};
use pi0_policy::{Actions, Observation, Policy, Prepared};
use pyo3::prelude::*;
use pyo3::types::{PyDict, PyList};

use crate::errors::Class;

/// A doctor, and the findings that are errors.
pub struct Watch {
    doctor: Doctor,
    strict: Vec<Kind>,
}

/// What was found of one observation so far.
pub struct Seen {
    history: History,
    findings: Vec<Finding>,
}

impl Watch {
    pub fn new(policy: &Policy, strict: Vec<Kind>) -> Self {
        Self { doctor: Doctor::new(Profile::of(policy), Thresholds::default()), strict }
    }

    /// Looks at an observation.
    pub fn observe(&self, policy: &Policy, observation: &Observation, prepared: &Prepared) -> Seen {
        let mut history = History::default();
        let seen = pi0_doctor::Seen::of(policy, observation, prepared, 0.0);
        let findings = self.doctor.observe(&mut history, &seen);
        Seen { history, findings }
    }

    /// Looks at its answer, which came after `time`.
    pub fn answer(
        &self,
        policy: &Policy,
        seen: &mut Seen,
        network: &[f32],
        actions: &Actions,
        time: Duration,
    ) {
        let malformed: Vec<String> = actions.warnings.iter().map(ToString::to_string).collect();
        let latency = time.as_secs_f64();
        let chunk = Chunk {
            time: latency,
            rows: actions.rows,
            cols: actions.cols,
            actions: &actions.data,
            trained: &policy.actions_as_trained(network),
            latency,
            malformed: &malformed.join("; "),
        };
        seen.findings.extend(self.doctor.answer(&mut seen.history, &chunk));
    }

    /// An exception where something was found that is not allowed.
    pub fn allow(&self, py: Python<'_>, seen: &Seen) -> PyResult<()> {
        match seen.findings.iter().find(|finding| self.strict.contains(&finding.kind)) {
            Some(finding) => {
                let text = format!("refused by strict: {}: {}", finding.kind, finding.sentence());
                Err(Class::Strict.raise(py, text))
            }
            None => Ok(()),
        }
    }
}

impl Seen {
    /// The findings as the server's replies have them, but for what only a sequence has; none where there are none.
    pub fn warnings<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyList>>> {
        if self.findings.is_empty() {
            return Ok(None);
        }
        let list = PyList::empty(py);
        for finding in &self.findings {
            let entry = PyDict::new(py);
            entry.set_item("kind", finding.kind.name())?;
            entry.set_item("subject", &finding.subject)?;
            entry.set_item("text", &finding.text)?;
            entry.set_item("remedy", finding.kind.remedy())?;
            list.append(entry)?;
        }
        Ok(Some(list))
    }
}
