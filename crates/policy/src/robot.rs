//! What each robot sends and wants back, and the units in which π0 knows it.

use serde::Serialize;

use crate::{Error, Result};

/// A robot with a place in openpi.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Robot {
    /// Two Trossen arms, 6 joints and a gripper each; also its simulation.
    Aloha,
    /// A Franka arm of the DROID data set.
    Droid,
    /// The LIBERO simulation benchmark.
    Libero,
    /// A Universal Robots UR5; in openpi only as documentation.
    Ur5,
}

/// The network's three cameras in openpi, in order.
pub const OPENPI_CAMERAS: [&str; 3] = ["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"];

/// A camera of a robot.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct RobotCamera {
    /// The robot's name of it.
    pub key: &'static str,
    /// Index into [`OPENPI_CAMERAS`]; none for a camera that openpi accepts and ignores.
    pub slot: Option<usize>,
    /// Whether openpi refuses an observation without it.
    pub required: bool,
}

const fn camera(key: &'static str, slot: usize, required: bool) -> RobotCamera {
    RobotCamera { key, slot: Some(slot), required }
}

impl Robot {
    /// All of them.
    pub const ALL: [Robot; 4] = [Robot::Aloha, Robot::Droid, Robot::Libero, Robot::Ur5];

    /// `aloha`, `droid`, `libero` or `ur5`.
    pub fn name(self) -> &'static str {
        match self {
            Robot::Aloha => "aloha",
            Robot::Droid => "droid",
            Robot::Libero => "libero",
            Robot::Ur5 => "ur5",
        }
    }

    /// Its cameras.
    pub fn cameras(self) -> &'static [RobotCamera] {
        match self {
            Robot::Aloha => {
                const LOW: RobotCamera = RobotCamera { key: "cam_low", slot: None, required: false };
                const {
                    &[
                        camera("cam_high", 0, true),
                        camera("cam_left_wrist", 1, false),
                        camera("cam_right_wrist", 2, false),
                        LOW,
                    ]
                }
            }
            Robot::Droid => {
                const {
                    &[
                        camera("observation/exterior_image_1_left", 0, true),
                        camera("observation/wrist_image_left", 1, true),
                    ]
                }
            }
            Robot::Libero => {
                const { &[camera("observation/image", 0, true), camera("observation/wrist_image", 1, true)] }
            }
            Robot::Ur5 => const { &[camera("base_rgb", 0, true), camera("wrist_rgb", 1, true)] },
        }
    }

    /// The vectors whose concatenation is the state, by the names in the robot's observation, with their lengths.
    pub fn state(self) -> &'static [(&'static str, usize)] {
        match self {
            Robot::Aloha => &[("state", 14)],
            Robot::Droid => &[("observation/joint_position", 7), ("observation/gripper_position", 1)],
            Robot::Libero => &[("observation/state", 8)],
            Robot::Ur5 => &[("joints", 6), ("gripper", 1)],
        }
    }

    /// Length of the state.
    pub fn state_width(self) -> usize {
        self.state().iter().map(|(_, length)| length).sum()
    }

    /// Length of one action.
    pub fn action_width(self) -> usize {
        match self {
            Robot::Aloha => 14,
            Robot::Droid => 8,
            Robot::Libero | Robot::Ur5 => 7,
        }
    }

    /// Which dimensions are relative to the state where a checkpoint was trained on relative joint actions: the
    /// joints, not the grippers.
    pub fn delta_mask(self) -> Vec<bool> {
        let joints: &[usize] = match self {
            Robot::Aloha => &[6, 6],
            Robot::Droid => &[7],
            Robot::Libero | Robot::Ur5 => &[6],
        };
        joints.iter().flat_map(|&n| std::iter::repeat_n(true, n).chain([false])).collect()
    }
}

impl std::fmt::Display for Robot {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.name())
    }
}

/// Between the ALOHA of its makers and the one that π0 was trained on: other joint directions, grippers in radians.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum AlohaUnits {
    /// openpi.
    OpenPi,
    /// lerobot up to 0.3, whose gripper range was measured on another arm.
    Lerobot,
}

/// Direction of each ALOHA joint in π0's frame.
const FLIP: [f64; 14] = [1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0, 1.0, -1.0, -1.0, 1.0, 1.0, 1.0, 1.0];
const GRIPPERS: [usize; 2] = [6, 13];

/// Gripper opening in metres, closed and open (`PUPPET_GRIPPER_POSITION_*`).
const OPENING: [f64; 2] = [0.01844, 0.05800];
/// Lengths in metres of Interbotix' gripper: arm and horn.
const ARM: f64 = 0.036;
const HORN: f64 = 0.022;
/// Gripper joint in radians, closed and open (`PUPPET_GRIPPER_JOINT_*`).
const JOINT: [f64; 2] = [-0.6213, 1.4910];

fn normalize(x: f64, [low, high]: [f64; 2]) -> f64 {
    (x - low) / (high - low)
}

fn unnormalize(x: f64, [low, high]: [f64; 2]) -> f64 {
    x * (high - low) + low
}

impl AlohaUnits {
    /// π0's gripper range in radians.
    fn range(self) -> [f64; 2] {
        match self {
            AlohaUnits::OpenPi => [0.5476, 1.6296],
            AlohaUnits::Lerobot => [0.4, 1.5],
        }
    }

    /// A state as ALOHA sends it to π0's units, in place.
    pub fn decode_state(self, state: &mut [f64]) {
        for (x, flip) in state.iter_mut().zip(FLIP) {
            *x *= flip;
        }
        for gripper in GRIPPERS {
            if let Some(x) = state.get_mut(gripper) {
                let opening = unnormalize(*x, OPENING);
                let sine = (HORN.powi(2) + opening.powi(2) - ARM.powi(2)) / (2.0 * HORN * opening);
                *x = normalize(sine.clamp(-1.0, 1.0).asin(), self.range());
            }
        }
    }

    /// An action of π0 to what ALOHA takes, in place.
    pub fn encode_action(self, action: &mut [f64]) {
        for (x, flip) in action.iter_mut().zip(FLIP) {
            *x *= flip;
        }
        for gripper in GRIPPERS {
            if let Some(x) = action.get_mut(gripper) {
                let angle = match self {
                    // openpi leaves the scale: the model's actions are in radians.
                    AlohaUnits::OpenPi => *x + self.range()[0],
                    AlohaUnits::Lerobot => unnormalize(*x, self.range()),
                };
                *x = normalize(angle, JOINT);
            }
        }
    }
}

impl AlohaUnits {
    /// The inverse of [`encode_action`](Self::encode_action), in place.
    pub fn decode_action(self, action: &mut [f64]) {
        for (x, flip) in action.iter_mut().zip(FLIP) {
            *x *= flip;
        }
        for gripper in GRIPPERS {
            if let Some(x) = action.get_mut(gripper) {
                let angle = unnormalize(*x, JOINT);
                *x = match self {
                    AlohaUnits::OpenPi => angle - self.range()[0],
                    AlohaUnits::Lerobot => normalize(angle, self.range()),
                };
            }
        }
    }
}

/// The units to convert, if any are.
pub(crate) fn aloha_units(adapt: bool, robot: Option<Robot>) -> Result<Option<AlohaUnits>> {
    match (adapt, robot) {
        (false, _) => Ok(None),
        (true, Some(Robot::Aloha)) => Ok(Some(AlohaUnits::OpenPi)),
        (true, _) => Err(Error::Option { option: "--adapt-to-pi", why: "only ALOHA is converted".into() }),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn near(got: f64, wanted: f64) {
        assert!((got - wanted).abs() <= 1e-15 * wanted.abs().max(1.0), "{got:?}, wanted {wanted:?}");
    }

    #[test]
    fn aloha_grippers_match_openpi() {
        let golden = [(0.0, -1.0798655475132917), (0.5, -0.1400559217021429), (1.0, 0.945652797407483)];
        for (x, wanted) in golden {
            let mut state = [x; 14];
            AlohaUnits::OpenPi.decode_state(&mut state);
            near(state[6], wanted);
            near(state[13], wanted);
            assert_eq!(state[..6], [x, -x, -x, x, x, x]);
        }
        for (x, wanted) in [(0.0, 0.5533778345878898), (1.0, 1.0267954362543197)] {
            let mut action = [x; 14];
            AlohaUnits::OpenPi.encode_action(&mut action);
            near(action[6], wanted);
            near(action[13], wanted);
            assert_eq!(action[7..13], [x, -x, -x, x, x, x]);
        }
    }

    #[test]
    fn old_lerobot_has_another_range() {
        let mut state = [0.5; 14];
        AlohaUnits::Lerobot.decode_state(&mut state);
        // The angle from openpi's golden value, in the other range.
        let angle = -0.1400559217021429 * (1.6296 - 0.5476) + 0.5476;
        assert!((state[6] - (angle - 0.4) / 1.1).abs() < 1e-12);
        let mut action = [0.5; 14];
        AlohaUnits::Lerobot.encode_action(&mut action);
        assert!((action[13] - (1.1 * 0.5 + 0.4 + 0.6213) / 2.1123).abs() < 1e-12);
    }

    #[test]
    fn masks_are_openpis() {
        let ones = |mask: Vec<bool>| mask.iter().map(|&m| if m { '1' } else { '0' }).collect::<String>();
        assert_eq!(ones(Robot::Aloha.delta_mask()), "11111101111110");
        assert_eq!(ones(Robot::Droid.delta_mask()), "11111110");
        assert_eq!(ones(Robot::Libero.delta_mask()), "1111110");
        assert_eq!(ones(Robot::Ur5.delta_mask()), "1111110");
    }

    #[test]
    fn widths() {
        let widths = Robot::ALL.map(|robot| (robot.state_width(), robot.action_width()));
        assert_eq!(widths, [(14, 14), (8, 8), (8, 7), (7, 7)]);
    }
}
