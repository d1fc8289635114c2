//! From where on something is a finding.

use serde::{Deserialize, Serialize};

/// The limits, with their defaults. In TOML, each field is a key of the same name.
#[derive(Debug, Clone, Copy, PartialEq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Thresholds {
    /// An image is black when none of its sampled values is above this, of 255.
    pub black: f64,
    /// An image is constant when its sampled values deviate less than this in each channel, of 255.
    pub constant: f64,
    /// Share of the network's image that may be bars.
    pub bars: f64,
    /// Consecutive unchanged images that are frozen.
    pub frozen_requests: u32,
    /// How far the state must have moved meanwhile, in standard deviations of a dimension.
    pub frozen_motion: f64,
    /// Consecutive repetitions of an observation that are told.
    pub repeated_requests: u32,
    /// Images before anything is said about colours.
    pub colour_images: u32,
    /// How much nearer the colours must be to the explanation with a swap: a share of the distance without.
    pub colour_ratio: f64,
    /// Differences of mean colours below this, of 1, prove nothing.
    pub colour_difference: f64,
    /// Standard deviations from the mean that a state may have.
    pub state_deviations: f64,
    /// Absolute differences from the mean below this are never told, whatever the deviation of the data was.
    pub smallest_difference: f64,
    /// How far a robot's own range (a gripper's 0 to 1) may be left, as a share of it.
    pub range_margin: f64,
    /// Consecutive states that are the same, bit for bit, while pictures change.
    pub constant_requests: u32,
    /// Share of a chunk's steps at a limit of the data that saturates a dimension.
    pub saturated_share: f64,
    /// Consecutive chunks.
    pub saturated_chunks: u32,
    /// Standard deviations from the mean that an action may have.
    pub action_deviations: f64,
    /// How far a chunk may begin from every step of the last one, in standard deviations.
    pub jump_deviations: f64,
    /// And how many times the largest step within the chunks.
    pub jump_steps: f64,
    /// Of the last eight chunks of an episode, how many must have begun so.
    pub jump_chunks: u32,
    /// Requests that move against the command before that is told.
    pub inverted_requests: u32,
    /// Seconds without a request after which a new episode begins.
    pub episode_gap_s: f64,
    /// Actions a second that the robot executes; without it the robot's usual rate, where it has one.
    pub control_hz: Option<f64>,
    /// Seconds after which a finding that lasts is told again in the log.
    pub tell_again_s: f64,
}

impl Default for Thresholds {
    fn default() -> Self {
        Self {
            black: 8.0,
            constant: 1.0,
            bars: 0.55,
            frozen_requests: 3,
            frozen_motion: 0.5,
            repeated_requests: 3,
            colour_images: 10,
            colour_ratio: 0.4,
            colour_difference: 0.05,
            state_deviations: 6.0,
            smallest_difference: 1e-3,
            range_margin: 0.5,
            constant_requests: 10,
            saturated_share: 0.9,
            saturated_chunks: 6,
            action_deviations: 8.0,
            jump_deviations: 1.0,
            jump_steps: 4.0,
            jump_chunks: 3,
            inverted_requests: 12,
            episode_gap_s: 10.0,
            control_hz: None,
            tell_again_s: 60.0,
        }
    }
}

impl Thresholds {
    /// Checks what types cannot; names the first that makes no sense.
    pub fn check(&self) -> Result<(), &'static str> {
        let positive = [
            ("constant", self.constant),
            ("colour_ratio", self.colour_ratio),
            ("state_deviations", self.state_deviations),
            ("action_deviations", self.action_deviations),
            ("saturated_share", self.saturated_share),
            ("jump_deviations", self.jump_deviations),
            ("control_hz", self.control_hz.unwrap_or(1.0)),
        ];
        let from_zero = [
            ("black", self.black),
            ("bars", self.bars),
            ("frozen_motion", self.frozen_motion),
            ("colour_difference", self.colour_difference),
            ("smallest_difference", self.smallest_difference),
            ("range_margin", self.range_margin),
            ("jump_steps", self.jump_steps),
            ("episode_gap_s", self.episode_gap_s),
            ("tell_again_s", self.tell_again_s),
        ];
        let bad = |(_, x): &&(&'static str, f64), least: f64| !(x.is_finite() && *x >= least);
        let found = positive.iter().find(|entry| bad(entry, f64::MIN_POSITIVE));
        match found.or(from_zero.iter().find(|entry| bad(entry, 0.0))) {
            Some((name, _)) => Err(name),
            None => Ok(()),
        }
    }
}
