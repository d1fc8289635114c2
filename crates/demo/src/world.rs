//! How the table moves: a gripper with four joints, things that can be touched, grasped, carried and dropped.

use crate::scene::{Scene, Verb, distance};

/// Seconds between two actions.
pub const DT: f32 = 0.1;

/// One action: how far the gripper moves along x, y and z in this step, and the opening that the fingers are told
/// to take, all in metres.
pub type Action = [f32; 4];

/// The gripper's joints, metres. Also the state that a policy sees.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Gripper {
    /// To the right.
    pub x: f32,
    /// Away from the robot.
    pub y: f32,
    /// Height of the fingertips above the table.
    pub z: f32,
    /// Distance between the fingers.
    pub opening: f32,
}

impl Gripper {
    /// Farthest that `x` and `y` go.
    pub const REACH: f32 = 0.14;
    /// Highest `z`.
    pub const TOP: f32 = 0.10;
    /// Widest opening.
    pub const OPEN: f32 = 0.06;
    /// Longest step along one axis.
    pub const STEP: f32 = 0.025;
    /// How much the opening changes in a step at most.
    pub const FINGER_STEP: f32 = 0.03;

    /// As a policy sees it: x, y, z, opening.
    pub fn state(&self) -> [f32; 4] {
        [self.x, self.y, self.z, self.opening]
    }

    pub(crate) fn xy(&self) -> [f32; 2] {
        [self.x, self.y]
    }
}

/// How an episode ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Outcome {
    /// The instruction was followed.
    Success,
    /// Another thing than the target was touched, or lies in the bowl.
    WrongObject,
    /// The time was over.
    Timeout,
}

/// A scene in motion.
#[derive(Debug, Clone, PartialEq)]
pub struct World {
    /// How it began. Objects that were moved are where [`World::objects`] says.
    pub scene: Scene,
    /// Centre of each object, metres, in the scene's order.
    pub objects: Vec<[f32; 2]>,
    /// The gripper now.
    pub gripper: Gripper,
    /// The object between the fingers, and where its centre is relative to them.
    pub held: Option<(usize, [f32; 2])>,
    /// Which objects lie in the bowl.
    pub in_bowl: Vec<bool>,
    /// First object that the closed fingers came down on.
    pub touched: Option<usize>,
    /// Steps taken.
    pub steps: usize,
}

impl World {
    /// Steps after which an episode is over.
    pub const LIMIT: usize = 80;
    /// Height of an object, metres.
    pub const OBJECT_HEIGHT: f32 = 0.025;
    /// Opening at which the fingers close on an object.
    const GRASPED: f32 = 2.0 * Scene::OBJECT;
    /// How far from the middle an object may be to be grasped, metres.
    const GRASP_RANGE: f32 = 0.013;
    /// Highest fingertips that still grasp, metres.
    const GRASP_HEIGHT: f32 = 0.016;
    /// Openings below this are a closed gripper, that touches.
    const CLOSED: f32 = 0.03;

    /// The beginning of an episode.
    pub fn new(scene: Scene) -> Self {
        let gripper = Gripper { x: scene.start[0], y: scene.start[1], z: 0.08, opening: Gripper::OPEN };
        Self {
            objects: scene.objects.iter().map(|object| object.at).collect(),
            in_bowl: vec![false; scene.objects.len()],
            gripper,
            held: None,
            touched: None,
            steps: 0,
            scene,
        }
    }

    /// Moves on by [`DT`]. Values out of range are cut, those that are no numbers count as none.
    pub fn step(&mut self, action: &Action) {
        let cut = |value: f32, limit: f32| if value.is_nan() { 0.0 } else { value.clamp(-limit, limit) };
        let g = &mut self.gripper;
        g.x = cut(g.x + cut(action[0], Gripper::STEP), Gripper::REACH);
        g.y = cut(g.y + cut(action[1], Gripper::STEP), Gripper::REACH);
        g.z = (g.z + cut(action[2], Gripper::STEP)).clamp(0.0, Gripper::TOP);
        let wish = if action[3].is_nan() { g.opening } else { action[3].clamp(0.0, Gripper::OPEN) };
        self.move_fingers(wish);
        self.touch();
        if let Some((index, [dx, dy])) = self.held {
            self.objects[index] = [self.gripper.x + dx, self.gripper.y + dy];
        }
        self.steps += 1;
    }

    fn move_fingers(&mut self, wish: f32) {
        let before = self.gripper.opening;
        let after = before + (wish - before).clamp(-Gripper::FINGER_STEP, Gripper::FINGER_STEP);
        self.gripper.opening = after;
        match self.held {
            Some(_) if after <= Self::GRASPED => self.gripper.opening = Self::GRASPED,
            Some((index, _)) => {
                self.held = None;
                let inside = distance(self.objects[index], self.scene.bowl) < Scene::BOWL - 0.008;
                self.in_bowl[index] = inside;
            }
            None if before > Self::GRASPED && after <= Self::GRASPED => {
                let near = |at: [f32; 2]| {
                    let (dx, dy) = (at[0] - self.gripper.x, at[1] - self.gripper.y);
                    dx.abs() < Self::GRASP_RANGE && dy.abs() < Self::GRASP_RANGE
                };
                let free = |index: &usize| !self.in_bowl[*index] && near(self.objects[*index]);
                let index = (0..self.objects.len()).find(free);
                if let (Some(index), true) = (index, self.gripper.z <= Self::GRASP_HEIGHT) {
                    let at = self.objects[index];
                    // The fingers close along x and so centre it there.
                    self.held = Some((index, [0.0, at[1] - self.gripper.y]));
                    self.gripper.opening = Self::GRASPED;
                }
            }
            None => {}
        }
    }

    /// Puts an object between the fingers, its centre this far along y from theirs.
    pub(crate) fn hold(&mut self, index: usize, offset: f32) {
        self.held = Some((index, [0.0, offset]));
        self.gripper.opening = Self::GRASPED;
        self.objects[index] = [self.gripper.x, self.gripper.y + offset];
    }

    /// Closed fingers stop on top of what lies below them.
    fn touch(&mut self) {
        let g = &mut self.gripper;
        if self.held.is_some() || g.opening >= Self::CLOSED || g.z > Self::OBJECT_HEIGHT {
            return;
        }
        let below =
            |index: &usize| !self.in_bowl[*index] && distance(self.objects[*index], [g.x, g.y]) < 0.02;
        if let Some(index) = (0..self.objects.len()).find(below) {
            g.z = Self::OBJECT_HEIGHT;
            self.touched.get_or_insert(index);
        }
    }

    /// Whether and how the episode is over. The target is object 0.
    pub fn outcome(&self) -> Option<Outcome> {
        let (target, others) = match self.scene.task.verb {
            Verb::Touch => (self.touched == Some(0), self.touched.is_some_and(|index| index != 0)),
            Verb::Put => (self.in_bowl[0], self.in_bowl[1..].contains(&true)),
        };
        match (target, others) {
            (_, true) => Some(Outcome::WrongObject),
            (true, false) => Some(Outcome::Success),
            _ if self.steps >= Self::LIMIT => Some(Outcome::Timeout),
            _ => None,
        }
    }

    /// Height of an object's lower side, metres.
    pub fn height(&self, index: usize) -> f32 {
        if self.held.is_some_and(|(held, _)| held == index) { self.gripper.z } else { 0.0 }
    }
}
