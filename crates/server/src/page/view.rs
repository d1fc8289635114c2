//! One observation with its answer, as the page takes it.

use std::time::Duration;

use pi0_doctor::{Chunk, Doctor, Finding, History, Profile, Seen};
use pi0_policy::{Actions, Observation, Policy, Prepared};
use serde::Serialize;

use super::picture::Picture;

/// One observation with its answer, as the page shows it.
#[derive(Debug, Clone, Serialize)]
pub struct View {
    /// Whose it is, or which file.
    pub title: String,
    /// Requests of this robot so far.
    pub request: u64,
    /// What the robot was told to do.
    pub prompt: String,
    /// Tokens that the prompt takes, and may take.
    pub tokens: [usize; 2],
    /// Cameras of the network, in its order.
    pub pictures: Vec<PictureView>,
    /// The state.
    pub state: Vec<StateValue>,
    /// The chunk; none before the first answer.
    pub chunk: Option<ChunkView>,
    /// What the doctor says of this request.
    pub findings: Vec<FindingView>,
    /// Milliseconds by stage.
    pub times: Vec<(&'static str, f32)>,
}

/// A picture as the network gets it.
#[derive(Debug, Clone, Serialize)]
pub struct PictureView {
    /// The camera.
    pub name: String,
    /// Whether there is none: the network does not look there.
    pub masked: bool,
    /// A URL of the picture with its data, where it was encoded.
    pub src: Option<String>,
}

/// A value of the state.
#[derive(Debug, Clone, Serialize)]
pub struct StateValue {
    name: String,
    /// As the robot sent it.
    raw: f32,
    /// In the units of the statistics.
    trained: f32,
    /// As the network gets it, where it gets a number.
    normalized: Option<f32>,
    /// Where almost all of the training data lie.
    range: Option<[f32; 2]>,
}

/// A chunk with the one before.
#[derive(Debug, Clone, Serialize)]
pub struct ChunkView {
    names: Vec<String>,
    /// `[rows][cols]` in the robot's units.
    actions: Vec<Vec<f32>>,
    /// The chunk before; empty for the first.
    previous: Vec<Vec<f32>>,
    /// How many actions of the chunk before were executed until this request; none where nobody knows.
    executed: Option<usize>,
    /// Where almost all of the training data lie, for dimensions whose units are those of the statistics.
    range: Vec<Option<[f32; 2]>>,
    /// The robot's state in dimensions that mean the same: now.
    state: Vec<Option<f32>>,
}

/// A finding with what to do.
#[derive(Debug, Clone, Serialize)]
pub struct FindingView {
    #[serde(flatten)]
    finding: Finding,
    remedy: &'static str,
}

impl From<&Finding> for FindingView {
    fn from(finding: &Finding) -> Self {
        Self { finding: finding.clone(), remedy: finding.kind.remedy() }
    }
}

/// What is kept of a robot's last request, and what the doctor remembers of those before.
#[derive(Debug, Default)]
pub(crate) struct Latest {
    pub history: History,
    prompt: String,
    tokens: usize,
    masked: Vec<bool>,
    state: Vec<f64>,
    trained: Vec<f64>,
    normalized: Vec<f32>,
    actions: Vec<f64>,
    previous: Vec<f64>,
    cols: usize,
    executed: Option<usize>,
    answered: Option<f64>,
    /// Whether an action's dimension has the units of the statistics.
    plain: Vec<bool>,
    pub findings: Vec<Finding>,
    pub times: Vec<(&'static str, Duration)>,
}

/// An answer for the doctor and the page.
#[derive(Debug)]
pub(crate) struct Answered<'a> {
    actions: &'a Actions,
    /// The same in the units of the statistics.
    trained: Vec<f64>,
    /// What is wrong with the answer that they were read from, in words.
    malformed: String,
    latency: f64,
    time: f64,
}

impl<'a> Answered<'a> {
    /// What the network has returned just now, and the actions that it means; seconds that it took, and the time.
    pub fn of(policy: &Policy, network: &[f32], actions: &'a Actions, latency: f64, time: f64) -> Self {
        let malformed: Vec<String> = actions.warnings.iter().map(ToString::to_string).collect();
        let trained = policy.actions_as_trained(network);
        Self { actions, trained, malformed: malformed.join("; "), latency, time }
    }

    /// A recorded one, with what was said of it then.
    pub fn recorded(
        actions: &'a Actions,
        trained: Vec<f64>,
        malformed: String,
        latency: f64,
        time: f64,
    ) -> Self {
        Self { actions, trained, malformed, latency, time }
    }
}

impl Latest {
    /// Keeps an observation and has the doctor look at it. `unexecuted` is how many actions of its last chunk the robot
    /// says that it has not executed.
    pub fn observe(
        &mut self,
        doctor: &Doctor,
        policy: &Policy,
        observation: &Observation,
        prepared: &Prepared,
        unexecuted: Option<usize>,
        time: f64,
    ) -> Vec<Finding> {
        let seen = Seen::of(policy, observation, prepared, time);
        let findings = doctor.observe(&mut self.history, &seen);
        self.prompt = shortened(seen.prompt, 2000);
        self.tokens = prepared.inputs.tokens.len();
        self.masked.clear();
        self.masked.extend(prepared.inputs.images.iter().map(Option::is_none));
        self.state.clone_from(&observation.state);
        self.trained = seen.trained;
        self.normalized.clear();
        self.normalized.extend(prepared.inputs.state.iter().take(self.state.len()));
        let rows = self.actions.len() / self.cols.max(1);
        let rate = doctor.thresholds().control_hz.or(doctor.profile().rate);
        self.executed = match (unexecuted, rate, self.answered) {
            _ if rows == 0 => None,
            (Some(n), ..) => Some(rows.saturating_sub(n)),
            // An estimate: the robot executes from the answer to the next request.
            (None, Some(rate), Some(answered)) => {
                Some((((time - answered) * rate).max(0.0) as usize).min(rows))
            }
            _ => None,
        };
        self.findings.clone_from(&findings);
        findings
    }

    /// Keeps an answer and has the doctor look at it.
    pub fn answer(&mut self, doctor: &Doctor, answer: &Answered<'_>) -> Vec<Finding> {
        let Answered { actions, trained, malformed, latency, time } = answer;
        let chunk = Chunk {
            time: *time,
            rows: actions.rows,
            cols: actions.cols,
            actions: &actions.data,
            trained,
            latency: *latency,
            malformed,
        };
        let findings = doctor.answer(&mut self.history, &chunk);
        std::mem::swap(&mut self.previous, &mut self.actions);
        self.actions.clone_from(&actions.data);
        self.cols = actions.cols;
        self.answered = Some(*time);
        self.plain.clear();
        let first = actions.data.iter().zip(trained).take(actions.cols);
        self.plain.extend(first.map(|(a, b)| (a - b).abs() <= 1e-6 * a.abs().max(1.0)));
        self.findings.extend_from_slice(&findings);
        findings
    }

    /// For the page.
    pub fn view(&self, title: String, profile: &Profile, max_tokens: usize) -> View {
        let pictures = profile.cameras.iter().enumerate().map(|(i, camera)| PictureView {
            name: camera.name.clone(),
            masked: self.masked.get(i).copied().unwrap_or(true),
            src: None,
        });
        let state = self.state.iter().zip(&self.trained).enumerate().map(|(i, (raw, trained))| {
            let dimension = profile.state.get(i);
            StateValue {
                name: dimension.map_or_else(|| format!("dimension {i}"), |dimension| dimension.name.clone()),
                raw: *raw as f32,
                trained: *trained as f32,
                normalized: self.normalized.get(i).copied(),
                range: dimension.and_then(usual),
            }
        });
        View {
            title,
            request: self.history.requests(),
            prompt: self.prompt.clone(),
            tokens: [self.tokens, max_tokens],
            pictures: pictures.collect(),
            state: state.collect(),
            chunk: (!self.actions.is_empty()).then(|| self.chunk(profile)),
            findings: self.findings.iter().map(Into::into).collect(),
            times: self.times.iter().map(|(stage, time)| (*stage, 1e3 * time.as_secs_f32())).collect(),
        }
    }

    fn chunk(&self, profile: &Profile) -> ChunkView {
        let rows = |data: &[f64]| -> Vec<Vec<f32>> {
            let rows = data.chunks_exact(self.cols.max(1));
            rows.map(|row| row.iter().map(|x| *x as f32).collect()).collect()
        };
        let name =
            |d: usize| profile.actions.get(d).map_or_else(|| format!("dimension {d}"), |x| x.name.clone());
        let plain = |d: &usize| self.plain.get(*d) == Some(&true);
        ChunkView {
            names: (0..self.cols).map(name).collect(),
            actions: rows(&self.actions),
            previous: rows(&self.previous),
            executed: self.executed,
            range: (0..self.cols)
                .map(|d| Some(d).filter(plain).and_then(|d| profile.actions.get(d)).and_then(usual))
                .collect(),
            state: (0..self.cols)
                .map(|d| Some(*self.state.get(profile.pairs.get(d).copied().flatten()?)? as f32))
                .collect(),
        }
    }
}

/// The first characters of a text that may be of any length.
pub(super) fn shortened(text: &str, most: usize) -> String {
    match text.char_indices().nth(most) {
        Some((end, _)) => format!("{}…", &text[..end]),
        None => text.to_owned(),
    }
}

/// Where almost all of the data lie.
fn usual(dimension: &pi0_doctor::Dimension) -> Option<[f32; 2]> {
    let normal = || {
        let (mean, deviation) = (dimension.mean?, dimension.deviation?);
        Some([mean - 2.33 * deviation, mean + 2.33 * deviation])
    };
    dimension.usual.or(dimension.seen).or_else(normal).map(|range| range.map(|x| x as f32))
}

/// The network's image, `[3, size, size]`, as bytes. Bars of -3 are as black as those of -1.
pub(crate) fn network_picture(image: &[f32]) -> Option<Picture> {
    let plane = image.len() / 3;
    let size = plane.isqrt();
    if size == 0 || 3 * size * size != image.len() {
        return None;
    }
    let mut rgb = vec![0; 3 * plane];
    for (c, plane) in image.chunks_exact(plane).enumerate() {
        let out = rgb.iter_mut().skip(c).step_by(3);
        plane.iter().zip(out).for_each(|(x, out)| *out = (127.5 * (x + 1.0)).round() as u8);
    }
    Some(Picture { rgb, size: size as u32 })
}
