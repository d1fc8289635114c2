//! What is wrong with chunks.

use crate::doctor::{Chunk, Findings};
use crate::profile::Profile;
use crate::{History, Kind, Thresholds};

/// How near to a limit of the data counts as being at it, as a share of half the range.
const AT_LIMIT: f64 = 0.97;

/// Dimensions at the limits of the data for most of several chunks.
pub(crate) fn saturated(
    profile: &Profile,
    limits: &Thresholds,
    history: &mut History,
    chunk: &Chunk<'_>,
    out: &mut Findings,
) {
    history.saturated.resize(profile.actions.len(), 0);
    let (mut judged, mut stuck) = (0, Vec::new());
    for (d, dimension) in profile.actions.iter().enumerate() {
        let (Some(mean), Some(deviation)) = (dimension.mean, dimension.deviation) else { continue };
        // Where only mean and deviation are known, 1 and 99 percent of a normal distribution.
        let [low, high] = dimension.usual.unwrap_or([mean - 2.33 * deviation, mean + 2.33 * deviation]);
        let half = 0.5 * (high - low);
        // Some dimensions live at their limits, such as grippers that are open or closed.
        let middle = 0.5 * (low + high);
        if dimension.gripper || deviation > 0.8 * half || (mean - middle).abs() > 0.7 * half || half < 1e-9 {
            continue;
        }
        judged += 1;
        let at_limit = chunk.trained_rows().filter(|row| (row[d] - middle).abs() >= AT_LIMIT * half).count();
        let is_stuck = at_limit as f64 >= limits.saturated_share * chunk.rows as f64;
        let times = &mut history.saturated[d];
        *times = if is_stuck { times.saturating_add(1) } else { 0 };
        if *times >= limits.saturated_chunks {
            stuck.push(dimension.name.as_str());
        }
    }
    if stuck.len() >= 2 && 2 * stuck.len() > judged {
        let text = format!(
            "actions stay at the limits of what the policy was trained on: {} for {} chunks",
            stuck.join(", "),
            limits.saturated_chunks
        );
        out.add(Kind::ActionsSaturated, "actions", text);
    }
}

/// Values that no training data had.
pub(crate) fn outside(profile: &Profile, limits: &Thresholds, chunk: &Chunk<'_>, out: &mut Findings) {
    let mut worst: Option<(f64, usize, usize, f64)> = None;
    for (t, row) in chunk.trained_rows().enumerate() {
        for (d, (dimension, &x)) in profile.actions.iter().zip(row).enumerate() {
            if let Some(n) = dimension.deviations(x, limits.smallest_difference)
                && n > limits.action_deviations
                && !dimension.was_seen(x)
                && worst.is_none_or(|(most, ..)| n > most)
            {
                worst = Some((n, t, d, x));
            }
        }
    }
    if let Some((n, t, d, x)) = worst {
        let name = &profile.actions[d].name;
        let text = format!(
            "actions are far outside of what the policy was trained on: {name} of step {t} is {x:.4}, {n:.0} standard deviations from the mean"
        );
        out.add(Kind::ActionsOutside, "actions", text);
    }
}

/// A chunk that begins nowhere on the one before.
pub(crate) fn jump(
    profile: &Profile,
    limits: &Thresholds,
    history: &mut History,
    chunk: &Chunk<'_>,
    out: &mut Findings,
) {
    if !history.continues || history.cols != chunk.cols || history.chunk.is_empty() || chunk.cols < 2 {
        return;
    }
    // One in seven dimensions may do what it wants: grippers jump.
    let free = chunk.cols.div_ceil(7);
    let mut squares = vec![0.0; chunk.cols];
    let mut between = |a: &[f64], b: &[f64]| {
        for (d, square) in squares.iter_mut().enumerate() {
            let scale = profile.actions.get(d).map_or(1.0, |dimension| dimension.scale());
            *square = ((a[d] - b[d]) / scale).powi(2);
        }
        squares.sort_by(f64::total_cmp);
        let kept = &squares[..chunk.cols - free];
        (kept.iter().sum::<f64>() / kept.len() as f64).sqrt()
    };
    let old: Vec<&[f64]> = history.chunk.chunks_exact(chunk.cols).collect();
    let new: Vec<&[f64]> = chunk.actions.chunks_exact(chunk.cols).collect();
    let Some(first) = new.first() else { return };
    let gap = old.iter().map(|step| between(step, first)).fold(f64::INFINITY, f64::min);
    let step = |steps: &[&[f64]], between: &mut dyn FnMut(&[f64], &[f64]) -> f64| {
        steps.windows(2).map(|pair| between(pair[0], pair[1])).fold(0.0, f64::max)
    };
    let largest = step(&old, &mut between).max(step(&new, &mut between));
    let jumps = gap > limits.jump_deviations && gap > limits.jump_steps * largest;
    history.jumps = history.jumps << 1 | u8::from(jumps);
    // Once is nothing: the robot was reset, or somebody moved it.
    if jumps && history.jumps.count_ones() >= limits.jump_chunks {
        let text = format!(
            "chunks jump: this one begins {gap:.1} standard deviations away from every step of the last one, whose largest step is {largest:.2}"
        );
        out.add(Kind::ActionsJump, "actions", text);
    }
}

/// An answer that came too late to be of use.
pub(crate) fn late(profile: &Profile, limits: &Thresholds, chunk: &Chunk<'_>, out: &mut Findings) {
    let Some(rate) = limits.control_hz.or(profile.rate) else { return };
    let lasts = chunk.rows as f64 / rate;
    if chunk.latency > lasts {
        let text = format!(
            "the answer took {:.2} s, its {} actions last {lasts:.2} s at {rate} a second: the robot has to wait",
            chunk.latency, chunk.rows
        );
        out.add(Kind::Latency, "latency", text);
    }
}
