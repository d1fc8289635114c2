//! What the doctor remembers of one robot.

use std::collections::BTreeMap;

use crate::{Finding, Kind};

/// What came before, of one robot. Its size depends on the checkpoint alone: a few kilobytes.
#[derive(Debug, Clone, Default)]
pub struct History {
    /// Observations so far.
    pub(crate) requests: u64,
    /// When the last one came, in the caller's seconds.
    pub(crate) time: Option<f64>,
    /// Of the last prompt, which may be of any length.
    pub(crate) prompt: Option<u64>,
    pub(crate) cameras: Vec<CameraHistory>,
    /// The last state, in the robot's units and in those of the statistics.
    pub(crate) state: Vec<f64>,
    pub(crate) trained: Vec<f64>,
    /// Consecutive repetitions of the whole observation, and of the state while pictures change.
    pub(crate) repeated: u32,
    pub(crate) constant: u32,
    /// The last chunk in the robot's units, `[rows, cols]`, and its width.
    pub(crate) chunk: Vec<f64>,
    pub(crate) cols: usize,
    /// Smallest and largest value of each dimension, of all chunks since the state is the same.
    pub(crate) commanded: Vec<[f64; 2]>,
    /// Whether the observation that is answered now continues the episode of that chunk.
    pub(crate) continues: bool,
    /// Which of the last eight chunks of the episode jumped, a bit each.
    pub(crate) jumps: u8,
    /// Consecutive chunks that a dimension of the action spent at its limits.
    pub(crate) saturated: Vec<u32>,
    /// Requests that moved against the command and with it, for each dimension of the action; older ones fade.
    pub(crate) against: Vec<[f64; 2]>,
    ledger: BTreeMap<(Kind, String), Entry>,
}

/// What is remembered of a camera.
#[derive(Debug, Clone, Default)]
pub(crate) struct CameraHistory {
    /// Of samples of the last image; none where there was no image.
    pub print: Option<u64>,
    /// Of all of it, only where the samples were those of the image before.
    pub whole: Option<u64>,
    /// Images before the last one that equal it.
    pub same: u32,
    /// The state, in the units of the statistics, when the first of these came.
    pub since: Vec<f64>,
    /// Sums of the mean colours, and how many.
    pub colour: [f64; 3],
    pub images: u32,
}

#[derive(Debug, Clone)]
struct Entry {
    since: u64,
    since_time: f64,
    count: u64,
    last: u64,
    told: Option<f64>,
}

/// Requests without a finding after which it counts as a new one.
const FORGET: u64 = 60;

impl History {
    /// Observations so far.
    pub fn requests(&self) -> u64 {
        self.requests
    }

    /// Enters a finding of the current request.
    pub(crate) fn find(&mut self, kind: Kind, subject: &str, text: String, time: f64, again: f64) -> Finding {
        let now = self.requests;
        let fresh = Entry { since: now, since_time: time, count: 0, last: now, told: None };
        let entry = self.ledger.entry((kind, subject.to_owned())).or_insert_with(|| fresh.clone());
        if now.saturating_sub(entry.last) > FORGET {
            *entry = fresh;
        }
        entry.count += 1;
        entry.last = now;
        let news = entry.told.is_none_or(|told| time - told >= again);
        if news {
            entry.told = Some(time);
        }
        Finding {
            kind,
            subject: subject.to_owned(),
            text,
            since: entry.since,
            for_seconds: (time - entry.since_time).max(0.0),
            count: entry.count,
            news,
        }
    }
}
