//! Runs recorded requests again and compares: how a user files a bug and a developer finds it.

use std::path::{Path, PathBuf};

use pi0_doctor::Thresholds;
use pi0_model::SampleOptions;
use pi0_policy::Actions;

use crate::decode::{Limits, decode};
use crate::examine::{Examined, Examiner};
use crate::record::{Recording, recordings};
use crate::server::Served;
use crate::translator::Translator;
use crate::value::Value;
use crate::{Error, Failure};

/// What a recording says now.
#[derive(Debug, Clone, PartialEq)]
pub enum Verdict {
    /// The same actions, up to this largest difference.
    Actions {
        /// Largest absolute difference of a value, in the robot's units.
        max_abs: f64,
    },
    /// It failed then as now, with the same words.
    SameFailure(String),
    /// It failed then for a reason that lay in the moment: load, time, shutdown.
    NotRepeatable(String),
    /// Something else came.
    Changed {
        /// What was recorded.
        then: String,
        /// What came.
        now: String,
    },
}

/// One replayed recording.
#[derive(Debug, Clone)]
pub struct Replayed {
    /// The recording.
    pub path: PathBuf,
    /// What came of it.
    pub verdict: Verdict,
    /// What the doctor says of it and of its answer now.
    pub examined: Examined,
}

/// Replays all recordings of a directory, the oldest first, one at a time; `report` hears of each. The doctor looks at each
/// with these thresholds.
///
/// # Errors
/// The directory cannot be read or holds no recording; a damaged recording is an error too.
pub fn replay(
    served: Served,
    dir: &Path,
    steps: Option<usize>,
    thresholds: Thresholds,
    mut report: impl FnMut(&Replayed),
) -> Result<(), Error> {
    let Served { model, policy } = served;
    let mut examiner = Examiner::new(policy, model.config(), thresholds);
    let found = recordings(dir)?;
    if found.is_empty() {
        return Err(Error::file(dir, "holds no recordings"));
    }
    for (_, path) in found {
        let recording = Recording::open(&path)?;
        let seed = recording.outcome.as_ref().map_or(0, |(seed, _)| *seed);
        let now = run(&*model, examiner.translator(), &recording, &SampleOptions { steps, seed });
        let answer = now.as_ref().ok().map(|(network, actions)| (network.as_slice(), actions));
        let examined = examiner.look(&recording, answer);
        let then = recording.outcome.as_ref().map(|(_, reply)| reply);
        let verdict = match (then, now) {
            (Ok(reply), Ok((_, actions))) => compare(reply, &[actions.rows, actions.cols], &actions.data),
            (Ok(_), Err(now)) => Verdict::Changed { then: "actions".into(), now: now.to_string() },
            (Err((kind, text)), _) if ["busy", "expired", "shutting_down"].contains(&kind.as_str()) => {
                Verdict::NotRepeatable(text.clone())
            }
            // What `--strict` refused is refused again where the same is found.
            (Err((kind, text)), Ok(_)) if kind == "strict" && examined.has_what_refused(text) => {
                Verdict::SameFailure(text.clone())
            }
            (Err((_, text)), Err(now)) if *text == now.to_string() => Verdict::SameFailure(text.clone()),
            (Err((_, text)), Err(now)) => Verdict::Changed { then: text.clone(), now: now.to_string() },
            (Err((_, text)), Ok(_)) => Verdict::Changed { then: text.clone(), now: "actions".into() },
        };
        report(&Replayed { path, verdict, examined });
    }
    Ok(())
}

fn run(
    model: &dyn pi0_model::ActionModel,
    translator: &Translator,
    recording: &Recording,
    options: &SampleOptions,
) -> Result<(Vec<f32>, Actions), Failure> {
    let prepared = translator.prepare(&recording.request)?.prepared;
    let chunks = model
        .sample_actions(std::slice::from_ref(&prepared.inputs), options)
        .map_err(|e| Failure::Model(e.to_string()))?;
    let chunk = chunks.first().ok_or_else(|| Failure::Model("the model returned nothing".into()))?;
    let actions = translator.policy().postprocess(&chunk.data, &prepared);
    let actions = actions.map_err(|e| Failure::Model(e.to_string()))?;
    Ok((chunk.data.clone(), actions))
}

fn compare(reply: &bytes::Bytes, shape: &[usize], now: &[f64]) -> Verdict {
    let message = decode(reply, Limits::default());
    let then = match &message {
        Ok(Value::Map(map)) => match map.get("actions") {
            Some(Value::Array(array)) => array.numbers().map(|values| (&array.shape, values)),
            _ => None,
        },
        _ => None,
    };
    match then {
        Some((then_shape, then)) if *then_shape == shape => {
            let differences = then.iter().zip(now).map(|(a, b)| (a - b).abs());
            Verdict::Actions { max_abs: differences.max_by(f64::total_cmp).unwrap_or(0.0) }
        }
        Some((then_shape, _)) => {
            Verdict::Changed { then: format!("actions {then_shape:?}"), now: format!("actions {shape:?}") }
        }
        None => Verdict::Changed { then: "a reply without actions".into(), now: "actions".into() },
    }
}
