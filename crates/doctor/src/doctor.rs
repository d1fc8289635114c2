//! The order of the checks.

use std::hash::{DefaultHasher, Hash, Hasher};

use pi0_policy::{Observation, Picture, Policy, Prepared, Warning};

use crate::{Finding, History, Kind, Profile, Thresholds, actions, pictures, state};

/// Looks at observations and chunks.
#[derive(Debug, Clone)]
pub struct Doctor {
    profile: Profile,
    thresholds: Thresholds,
}

/// An observation as the doctor sees it.
#[derive(Debug, Clone)]
pub struct Seen<'a> {
    /// Seconds on any clock that does not go back.
    pub time: f64,
    /// By camera of the network.
    pub pictures: Vec<Option<Picture<'a>>>,
    /// As the robot sent it.
    pub state: &'a [f64],
    /// The same in the units of the statistics.
    pub trained: Vec<f64>,
    /// The prompt that is used.
    pub prompt: &'a str,
    /// Tokens of the whole prompt and those that were kept, where it was cut.
    pub cut: Option<(usize, usize)>,
}

impl<'a> Seen<'a> {
    /// An observation that a policy has prepared.
    pub fn of(policy: &'a Policy, observation: &'a Observation, prepared: &Prepared, time: f64) -> Self {
        let cut = prepared.warnings.iter().find_map(|warning| match warning {
            Warning::PromptTruncated { tokens, kept } => Some((*tokens, *kept)),
            _ => None,
        });
        Self {
            time,
            pictures: policy.pictures(observation),
            state: &observation.state,
            trained: policy.state_as_trained(&observation.state),
            prompt: policy.prompt(observation),
            cut,
        }
    }
}

/// A chunk as the doctor sees it.
#[derive(Debug, Clone, Copy)]
pub struct Chunk<'a> {
    /// Seconds on the clock of [`Seen::time`].
    pub time: f64,
    /// Steps.
    pub rows: usize,
    /// Values of a step.
    pub cols: usize,
    /// In the robot's units, `[rows, cols]`.
    pub actions: &'a [f64],
    /// In the units of the statistics, `[rows, cols]`.
    pub trained: &'a [f64],
    /// Seconds from the request to the answer.
    pub latency: f64,
    /// What is wrong with the answer that the actions were read from, in words (π0-FAST); empty where nothing is.
    pub malformed: &'a str,
}

impl Chunk<'_> {
    pub(crate) fn trained_rows(&self) -> impl Iterator<Item = &[f64]> {
        self.trained.chunks_exact(self.cols.max(1)).take(self.rows)
    }
}

/// Where checks put what they find.
#[derive(Default)]
pub(crate) struct Findings {
    found: Vec<(Kind, String, String)>,
}

impl Findings {
    pub fn add(&mut self, kind: Kind, subject: &str, text: String) {
        self.found.push((kind, subject.to_owned(), text));
    }

    pub fn has(&self, kind: Kind) -> bool {
        self.found.iter().any(|(found, ..)| *found == kind)
    }

    fn enter(self, history: &mut History, time: f64, thresholds: &Thresholds) -> Vec<Finding> {
        let again = thresholds.tell_again_s;
        self.found
            .into_iter()
            .map(|(kind, subject, text)| history.find(kind, &subject, text, time, again))
            .collect()
    }
}

impl Doctor {
    /// A doctor for a checkpoint.
    pub fn new(profile: Profile, thresholds: Thresholds) -> Self {
        Self { profile, thresholds }
    }

    /// What is known of the checkpoint.
    pub fn profile(&self) -> &Profile {
        &self.profile
    }

    /// The limits.
    pub fn thresholds(&self) -> &Thresholds {
        &self.thresholds
    }

    /// Looks at an observation, and remembers it.
    pub fn observe(&self, history: &mut History, seen: &Seen<'_>) -> Vec<Finding> {
        let (profile, limits) = (&self.profile, &self.thresholds);
        let mut out = Findings::default();
        history.continues = self.continues(history, seen);
        if !history.continues {
            (history.against, history.jumps) = (Vec::new(), 0);
        }
        let change = pictures::observe(profile, limits, history, &seen.pictures, &seen.trained, &mut out);
        let same_state = history.requests > 0 && same(&history.state, seen.state);
        history.repeated = if same_state && change.all_same { history.repeated.saturating_add(1) } else { 0 };
        history.constant = if same_state && change.any_new { history.constant.saturating_add(1) } else { 0 };
        if history.repeated >= limits.repeated_requests {
            let n = history.repeated + 1;
            let text =
                format!("the client sends the same observation again, {n} times by now: pictures and state");
            out.add(Kind::Repeated, "observation", text);
        } else if history.repeated == 0 {
            pictures::frozen(profile, limits, history, &seen.trained, &mut out);
        }
        state::outside(profile, limits, seen.state, &seen.trained, &mut out);
        state::constant(profile, limits, history, &mut out);
        if history.continues {
            state::inverted(profile, limits, history, seen.state, &mut out);
        }
        if seen.prompt.trim().is_empty() {
            out.add(Kind::PromptEmpty, "prompt", "the prompt is empty".into());
        }
        if let Some((tokens, kept)) = seen.cut {
            let text = format!("the prompt was cut: it has {tokens} tokens, the model takes {kept}");
            out.add(Kind::PromptCut, "prompt", text);
        }
        history.requests += 1;
        history.time = Some(seen.time);
        history.prompt = Some(hash(seen.prompt));
        history.state.clear();
        history.state.extend_from_slice(seen.state);
        history.trained.clone_from(&seen.trained);
        out.enter(history, seen.time, limits)
    }

    /// An observation that was refused, with the reason: it changes nothing that is remembered.
    pub fn refuse(&self, history: &mut History, why: &str, time: f64) -> Finding {
        history.requests += 1;
        let text = format!("the observation was refused: {why}");
        history.find(Kind::Refused, "observation", text, time, self.thresholds.tell_again_s)
    }

    /// Looks at the chunk that answers the last observation, and remembers it.
    pub fn answer(&self, history: &mut History, chunk: &Chunk<'_>) -> Vec<Finding> {
        let (profile, limits) = (&self.profile, &self.thresholds);
        let mut out = Findings::default();
        if !chunk.malformed.is_empty() {
            out.add(Kind::AnswerMalformed, "answer", chunk.malformed.to_owned());
        }
        actions::saturated(profile, limits, history, chunk, &mut out);
        actions::outside(profile, limits, chunk, &mut out);
        actions::jump(profile, limits, history, chunk, &mut out);
        actions::late(profile, limits, chunk, &mut out);
        if history.constant == 0 || history.commanded.len() != chunk.cols {
            history.commanded.clear();
            history.commanded.resize(chunk.cols, [f64::INFINITY, f64::NEG_INFINITY]);
        }
        for row in chunk.actions.chunks_exact(chunk.cols.max(1)) {
            for ([low, high], x) in history.commanded.iter_mut().zip(row) {
                (*low, *high) = (low.min(*x), high.max(*x));
            }
        }
        history.chunk.clear();
        history.chunk.extend_from_slice(chunk.actions);
        history.cols = chunk.cols;
        out.enter(history, chunk.time, limits)
    }

    /// Whether an observation goes on where the last one was: the same task, soon after, the robot not far away.
    fn continues(&self, history: &History, seen: &Seen<'_>) -> bool {
        const FAR: f64 = 3.0;
        let limits = &self.thresholds;
        let soon = history.time.is_some_and(|time| seen.time - time <= limits.episode_gap_s);
        let pairs = self.profile.state.iter().zip(&history.trained).zip(&seen.trained);
        let moved = pairs.map(|((dimension, then), now)| (now - then).abs() / dimension.scale());
        soon && history.prompt == Some(hash(seen.prompt)) && moved.fold(0.0, f64::max) < FAR
    }
}

fn hash(text: &str) -> u64 {
    let mut hasher = DefaultHasher::new();
    text.hash(&mut hasher);
    hasher.finish()
}

/// The same, bit for bit.
fn same(a: &[f64], b: &[f64]) -> bool {
    a.len() == b.len() && a.iter().zip(b).all(|(a, b)| a.to_bits() == b.to_bits())
}
