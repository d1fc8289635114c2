//! What is known of a checkpoint and its robot.

use pi0_policy::{Family, Policy, Robot, VectorStatistics};

/// What the doctor judges by.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Profile {
    /// Cameras of the network, in its order.
    pub cameras: Vec<Camera>,
    /// Of the state, in the units of the statistics.
    pub state: Vec<Dimension>,
    /// Of the actions, in the units of the statistics.
    pub actions: Vec<Dimension>,
    /// For each dimension of the actions, in the robot's units: the dimension of the state that it moves, where the two
    /// are known to mean the same.
    pub pairs: Vec<Option<usize>>,
    /// Actions of a chunk.
    pub actions_per_chunk: usize,
    /// Actions a second that this robot usually executes.
    pub rate: Option<f64>,
}

/// A camera of the network.
#[derive(Debug, Clone, PartialEq)]
pub struct Camera {
    /// The name to tell people: the robot's, if it has one.
    pub name: String,
    /// Whether the policy was surely trained with it.
    pub expected: bool,
    /// Mean red, green and blue of the training data, in 0 to 1.
    pub colour: Option<[f64; 3]>,
}

/// One value of a state or an action.
#[derive(Debug, Clone, PartialEq)]
pub struct Dimension {
    /// What people call it.
    pub name: String,
    /// Whether it is known to be a gripper.
    pub gripper: bool,
    /// Mean of the data, where known.
    pub mean: Option<f64>,
    /// Standard deviation of the data; estimated from quantiles where only they are known.
    pub deviation: Option<f64>,
    /// Smallest and largest value of the data.
    pub seen: Option<[f64; 2]>,
    /// Where almost all of the data lie: 1 and 99 percent.
    pub usual: Option<[f64; 2]>,
    /// The range in the robot's own units, where the robot defines one.
    pub own: Option<[f64; 2]>,
}

impl Dimension {
    /// Distance from the mean in standard deviations. None where that is unknown, or where the distance is so small that
    /// it says nothing.
    pub(crate) fn deviations(&self, x: f64, smallest: f64) -> Option<f64> {
        let distance = (x - self.mean?).abs();
        (distance > smallest).then(|| distance / self.deviation.unwrap_or(0.0).max(1e-9))
    }

    /// Whether the data had values as far out, or nearly.
    pub(crate) fn was_seen(&self, x: f64) -> bool {
        self.seen.is_some_and(|[low, high]| {
            let margin = 0.1 * (high - low);
            (low - margin..=high + margin).contains(&x)
        })
    }

    /// A length that counts as a motion, where no deviation is known.
    pub(crate) fn scale(&self) -> f64 {
        self.deviation.filter(|deviation| *deviation > 1e-9).unwrap_or(1.0)
    }
}

impl Profile {
    /// Works out from a policy what can be judged.
    pub fn of(policy: &Policy) -> Self {
        let summary = policy.summary();
        let statistics = policy.training_data();
        let lists_cameras = summary.family != Family::Openpi;
        let cameras = summary
            .cameras
            .iter()
            .map(|camera| Camera {
                name: camera.accepts.first().unwrap_or(&camera.key).clone(),
                expected: camera.required
                    || (lists_cameras && !camera.key.contains("empty_camera") && !camera.accepts.is_empty()),
                colour: statistics.colours.get(&camera.key).copied(),
            })
            .collect();
        let robot = summary.robot;
        let state_width = summary.state.max.min(64);
        let own = |i: usize| {
            let gripper = match robot {
                // Grippers are 0, closed, to 1, open; DROID's the other way round.
                Some(Robot::Aloha) => i == 6 || i == 13,
                Some(Robot::Droid) => i == 7,
                _ => false,
            };
            gripper.then_some([0.0, 1.0])
        };
        let state_known = statistics.state.width().max(robot.map_or(0, Robot::state_width));
        let state = (0..state_width.min(state_known.max(summary.state.min)))
            .map(|i| Dimension { own: own(i), ..dimension(&statistics.state, i, state_name(robot, i)) })
            .collect();
        let actions = (0..summary.action_width)
            .map(|i| dimension(&statistics.actions, i, action_name(robot, i)))
            .collect();
        // LIBERO's actions are differences, its gripper has two joints; of UR5 and lerobot's own names nothing is sure.
        let paired = match robot {
            Some(Robot::Aloha) => 14,
            Some(Robot::Droid) => 8,
            _ => 0,
        };
        // DROID's policies, but for one, act in velocities; its gripper is a position.
        let is_paired = |i: usize| i < paired && (robot != Some(Robot::Droid) || i == 7);
        Self {
            cameras,
            state,
            actions,
            pairs: (0..summary.action_width).map(|i| is_paired(i).then_some(i)).collect(),
            actions_per_chunk: summary.actions_per_chunk,
            rate: match robot {
                Some(Robot::Aloha) => Some(50.0),
                Some(Robot::Droid) => Some(15.0),
                _ => None,
            },
        }
    }
}

fn dimension(statistics: &VectorStatistics, i: usize, (name, gripper): (String, bool)) -> Dimension {
    let at = |values: &[f64]| values.get(i).copied();
    let range = |low: &[f64], high: &[f64]| Some([at(low)?, at(high)?]).filter(|[low, high]| low <= high);
    let seen = range(&statistics.min, &statistics.max);
    let usual = range(&statistics.q01, &statistics.q99);
    let middle = |[low, high]: [f64; 2]| 0.5 * (low + high);
    // Between the quantiles of a normal distribution lie 4.65 deviations; a bounded one has more.
    let deviation =
        usual.map(|[low, high]| (high - low) / 4.65).or(seen.map(|[low, high]| (high - low) / 6.0));
    Dimension {
        name,
        gripper,
        mean: at(&statistics.mean).or(usual.map(middle)).or(seen.map(middle)),
        deviation: at(&statistics.std).or(deviation),
        seen,
        usual,
        own: None,
    }
}

/// What people call a dimension of the state, and whether it is a gripper.
fn state_name(robot: Option<Robot>, i: usize) -> (String, bool) {
    match (robot, i) {
        (Some(Robot::Libero), 6 | 7) => (format!("finger {}", i - 6), true),
        (Some(Robot::Libero), _) => end_effector(i),
        _ => joint_name(robot, i),
    }
}

/// The same of the actions.
fn action_name(robot: Option<Robot>, i: usize) -> (String, bool) {
    match (robot, i) {
        (Some(Robot::Libero), 6) => ("gripper".into(), true),
        (Some(Robot::Libero), _) => end_effector(i),
        _ => joint_name(robot, i),
    }
}

fn end_effector(i: usize) -> (String, bool) {
    let name = ["x", "y", "z", "rotation x", "rotation y", "rotation z"].get(i);
    (name.map_or_else(|| format!("dimension {i}"), |name| (*name).into()), false)
}

fn joint_name(robot: Option<Robot>, i: usize) -> (String, bool) {
    const ALOHA: [&str; 6] = ["waist", "shoulder", "elbow", "forearm", "wrist", "wrist rotation"];
    match (robot, i) {
        (Some(Robot::Aloha), 0..14) => {
            let side = if i < 7 { "left" } else { "right" };
            match ALOHA.get(i % 7) {
                Some(joint) => (format!("{side} {joint}"), false),
                None => (format!("{side} gripper"), true),
            }
        }
        (Some(Robot::Droid), 7) | (Some(Robot::Ur5), 6) => ("gripper".into(), true),
        (Some(Robot::Droid | Robot::Ur5), _) => (format!("joint {i}"), false),
        _ => (format!("dimension {i}"), false),
    }
}
