//! What is wrong with states.

use crate::doctor::Findings;
use crate::profile::{Dimension, Profile};
use crate::{History, Kind, Thresholds};

/// Dimensions that a sentence names; the others are counted.
const NAMED: usize = 4;

/// Factors that bring a value to the unit of the data, and what that says.
const UNITS: [(f64, &str); 6] = [
    (std::f64::consts::PI / 180.0, "degrees instead of radians"),
    (180.0 / std::f64::consts::PI, "radians instead of degrees"),
    (1e-3, "millimetres instead of metres"),
    (1e3, "metres instead of millimetres"),
    (1e-2, "0 to 100 instead of 0 to 1, or centimetres instead of metres"),
    (1e2, "0 to 1 instead of 0 to 100, or metres instead of centimetres"),
];

/// A state that the policy cannot know. `raw` is the robot's, `trained` the same in the units of the statistics.
pub(crate) fn outside(
    profile: &Profile,
    limits: &Thresholds,
    raw: &[f64],
    trained: &[f64],
    out: &mut Findings,
) {
    let far = |dimension: &Dimension, x: f64| {
        let deviations = dimension.deviations(x, limits.smallest_difference);
        deviations.is_some_and(|n| n > limits.state_deviations) && !dimension.was_seen(x)
    };
    let mut named = Vec::new();
    let mut bad: Vec<usize> = Vec::new();
    for (i, dimension) in profile.state.iter().enumerate() {
        let (Some(&x), Some(&own)) = (trained.get(i), raw.get(i)) else { break };
        let said = if let Some([low, high]) = dimension.own.filter(|[low, high]| {
            let margin = limits.range_margin * (high - low);
            !(low - margin..=high + margin).contains(&own)
        }) {
            format!("{} is {own:.4}, its range is {low} to {high}", dimension.name)
        } else if far(dimension, x) {
            let (mean, n) = (dimension.mean.unwrap_or(0.0), dimension.deviations(x, 0.0).unwrap_or(0.0));
            format!("{} is {x:.4}, {n:.0} standard deviations from {mean:.4}", dimension.name)
        } else {
            continue;
        };
        bad.push(i);
        if named.len() < NAMED {
            named.push(said);
        }
    }
    if bad.is_empty() {
        return;
    }
    let known = profile.state.iter().filter(|d| d.mean.is_some()).count();
    let more = match bad.len() - named.len() {
        0 => String::new(),
        n => format!(" and {n} more dimensions"),
    };
    let cause = match unit(profile, limits, &bad, raw, trained) {
        Some(unit) => format!("; probably {unit}"),
        None if 2 * bad.len() > known && known > 2 => {
            "; most dimensions are: probably the statistics, or the order of joints, of another robot".into()
        }
        None => String::new(),
    };
    let text = format!(
        "the state is far outside of what the policy was trained on: {}{more}{cause}",
        named.join(", ")
    );
    out.add(Kind::StateOutside, "state", text);
}

/// The unit that explains nearly all of the bad dimensions.
fn unit(
    profile: &Profile,
    limits: &Thresholds,
    bad: &[usize],
    raw: &[f64],
    trained: &[f64],
) -> Option<&'static str> {
    // A gripper in percent, by its own range.
    let percent = |&i: &usize| {
        let (dimension, x) = (&profile.state[i], raw[i]);
        dimension.own.is_some_and(|[_, high]| high == 1.0 && (1.5..=110.0).contains(&x))
    };
    if bad.iter().all(|i| percent(i) && profile.state[*i].gripper) {
        return Some("0 to 100 instead of 0 to 1");
    }
    // How far off a factor leaves the dimensions that have statistics.
    let rest: Vec<usize> = bad.iter().copied().filter(|i| profile.state[*i].own.is_none()).collect();
    if rest.is_empty() {
        return None;
    }
    let fit = |factor: f64| {
        let deviations: Vec<f64> = rest
            .iter()
            .filter_map(|&i| profile.state[i].deviations(trained[i] * factor, 0.0).or(Some(0.0)))
            .collect();
        let explained = deviations.iter().filter(|n| **n <= limits.state_deviations).count();
        let mean = deviations.iter().sum::<f64>() / deviations.len() as f64;
        (10 * explained >= 8 * deviations.len()).then_some(mean)
    };
    let fits = UNITS.iter().filter_map(|(factor, text)| Some((fit(*factor)?, *factor, *text)));
    // A smaller factor always brings values near a mean of zero, so the one nearest to 1 that explains wins.
    let nearest = |factor: f64| factor.ln().abs();
    fits.min_by(|a, b| nearest(a.1).total_cmp(&nearest(b.1))).map(|(_, _, text)| text)
}

/// A state that stays while the robot should move and pictures change.
pub(crate) fn constant(profile: &Profile, limits: &Thresholds, history: &History, out: &mut Findings) {
    if history.constant < limits.constant_requests || !commands_motion(profile, limits, history) {
        return;
    }
    let n = history.constant + 1;
    let zero = if history.state.iter().all(|x| *x == 0.0) { ", all zero," } else { "" };
    let text = format!(
        "the state{zero} has not changed for {n} requests, though pictures change and motion is commanded"
    );
    out.add(Kind::StateConstant, "state", text);
}

/// Whether the robot is wanted elsewhere: by the last chunk, or by those since the state stays.
fn commands_motion(profile: &Profile, limits: &Thresholds, history: &History) -> bool {
    let rows = history.chunk.chunks_exact(history.cols.max(1));
    let Some(middle) = rows.clone().nth(rows.len() / 2) else { return false };
    // A gripper that holds something never gets where it is told to go.
    let is_joint = |(d, _): &(usize, usize)| profile.actions.get(*d).is_some_and(|x| !x.gripper);
    let pairs = profile.pairs.iter().enumerate().filter_map(|(d, pair)| Some((d, (*pair)?)));
    let mut paired = pairs.filter(is_joint).peekable();
    let far = |d: usize, from: f64| match (middle.get(d), profile.actions.get(d)) {
        (Some(x), Some(dimension)) => (x - from).abs() > limits.frozen_motion * dimension.scale(),
        _ => false,
    };
    if paired.peek().is_some() {
        return paired.any(|(d, s)| history.state.get(s).is_some_and(|from| far(d, *from)));
    }
    // What actions mean is not known: one that stays may well say "stay here", and one that changes alone be a gripper
    // that holds something.
    let changes = profile.actions.iter().zip(&history.commanded).filter(|(dimension, [low, high])| {
        dimension.deviation.is_some() && high - low > limits.frozen_motion * dimension.scale()
    });
    changes.count() >= 2
}

/// Joints that move against their commands.
pub(crate) fn inverted(
    profile: &Profile,
    limits: &Thresholds,
    history: &mut History,
    now: &[f64],
    out: &mut Findings,
) {
    /// How much of the past counts at every request.
    const KEEP: f64 = 0.97;
    history.against.resize(profile.pairs.len(), [0.0; 2]);
    let rows = history.chunk.len() / history.cols.max(1);
    let last = rows.saturating_sub(1) * history.cols;
    for (d, pair) in profile.pairs.iter().enumerate() {
        let (Some(s), Some(dimension)) = (*pair, profile.actions.get(d)) else { continue };
        let (Some(begin), Some(end)) = (history.chunk.get(d), history.chunk.get(last + d)) else { continue };
        let (Some(before), Some(now)) = (history.state.get(s), now.get(s)) else { continue };
        // Which way the chunk goes, and which way the robot went: not where they are, for a mirrored state is
        // elsewhere than it says.
        let (command, motion) = ((end - begin) / dimension.scale(), (now - before) / dimension.scale());
        if command.abs() < 0.1 || motion.abs() < 0.05 {
            continue;
        }
        let [mut against, mut with] = history.against[d].map(|count| KEEP * count);
        *(if command * motion < 0.0 { &mut against } else { &mut with }) += 1.0;
        history.against[d] = [against, with];
        // With fading, `n` requests in a row sum up to less than `n`.
        let needed = (1.0 - KEEP.powi(limits.inverted_requests as i32)) / (1.0 - KEEP);
        if against >= needed && against > 9.0 * with {
            let name = &dimension.name;
            let text = format!(
                "{name} moves against its commands: it is probably inverted, in the state or in the action"
            );
            out.add(Kind::Inverted, name, text);
        }
    }
}
