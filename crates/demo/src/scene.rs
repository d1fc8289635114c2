//! What lies on the table, and what is to be done with it.

use std::fmt;
use std::str::FromStr;

use crate::Rng;

/// Half the side of the square table, metres.
pub const TABLE: f32 = 0.15;

/// A colour that instructions name.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Color {
    Red,
    Green,
    Blue,
    Yellow,
    Purple,
}

impl Color {
    /// All of them.
    pub const ALL: [Color; 5] = [Color::Red, Color::Green, Color::Blue, Color::Yellow, Color::Purple];

    /// Its word.
    pub fn name(self) -> &'static str {
        match self {
            Color::Red => "red",
            Color::Green => "green",
            Color::Blue => "blue",
            Color::Yellow => "yellow",
            Color::Purple => "purple",
        }
    }

    /// Red, green and blue in `0..=1`.
    pub fn rgb(self) -> [f32; 3] {
        match self {
            Color::Red => [0.86, 0.16, 0.14],
            Color::Green => [0.16, 0.66, 0.24],
            Color::Blue => [0.13, 0.35, 0.88],
            Color::Yellow => [0.97, 0.80, 0.10],
            Color::Purple => [0.60, 0.20, 0.72],
        }
    }
}

/// A shape that instructions name. All are as wide and as high as each other.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub enum Shape {
    Block,
    Disc,
    Cross,
    Wedge,
}

impl Shape {
    /// All of them.
    pub const ALL: [Shape; 4] = [Shape::Block, Shape::Disc, Shape::Cross, Shape::Wedge];

    /// Its word.
    pub fn name(self) -> &'static str {
        match self {
            Shape::Block => "block",
            Shape::Disc => "disc",
            Shape::Cross => "cross",
            Shape::Wedge => "wedge",
        }
    }
}

/// Colour and shape: what tells one thing on the table from another.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub struct Kind {
    pub color: Color,
    pub shape: Shape,
}

impl Kind {
    /// Targets that no training episode has; they lie on the table there, but never as the target.
    pub const HELD_OUT: [Kind; 4] = [
        Kind { color: Color::Red, shape: Shape::Cross },
        Kind { color: Color::Green, shape: Shape::Wedge },
        Kind { color: Color::Blue, shape: Shape::Block },
        Kind { color: Color::Yellow, shape: Shape::Disc },
    ];

    /// All of them.
    pub fn all() -> impl Iterator<Item = Kind> {
        Color::ALL
            .into_iter()
            .flat_map(|color| Shape::ALL.into_iter().map(move |shape| Kind { color, shape }))
    }

    /// Whether training episodes have it as their target.
    pub fn held_out(self) -> bool {
        Self::HELD_OUT.contains(&self)
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{} {}", self.color.name(), self.shape.name())
    }
}

/// What to do with the target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Verb {
    /// Bring the closed fingers down on it, and on nothing else before.
    Touch,
    /// Put it into the bowl, and nothing else.
    Put,
}

/// An instruction.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[allow(missing_docs)]
pub struct Task {
    pub verb: Verb,
    pub target: Kind,
}

impl fmt::Display for Task {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.verb {
            Verb::Touch => write!(f, "touch the {}", self.target),
            Verb::Put => write!(f, "put the {} in the bowl", self.target),
        }
    }
}

impl FromStr for Task {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let tasks = Kind::all().flat_map(|target| [Verb::Touch, Verb::Put].map(|verb| Task { verb, target }));
        let wanted = text.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase();
        tasks.into_iter().find(|task| task.to_string() == wanted).ok_or_else(|| {
            let list = |words: Vec<&str>| words.join(", ");
            format!(
                "{text:?} is no instruction of this world; say \"touch the COLOR SHAPE\" or \"put the COLOR SHAPE in \
                 the bowl\" with one of {} and one of {}",
                list(Color::ALL.map(Color::name).to_vec()),
                list(Shape::ALL.map(Shape::name).to_vec()),
            )
        })
    }
}

/// Which targets a scene may have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Split {
    /// Those of training.
    Train,
    /// Those that training never asked for.
    HeldOut,
}

/// A thing on the table.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Object {
    /// Colour and shape.
    pub kind: Kind,
    /// Centre on the table, metres.
    pub at: [f32; 2],
}

/// The beginning of an episode.
#[derive(Debug, Clone, PartialEq)]
pub struct Scene {
    /// What to do.
    pub task: Task,
    /// Three things, no two alike; the first is the target.
    pub objects: Vec<Object>,
    /// Centre of the bowl, metres.
    pub bowl: [f32; 2],
    /// Where the gripper waits, metres.
    pub start: [f32; 2],
}

impl Scene {
    /// Half the width of every object, metres.
    pub const OBJECT: f32 = 0.022;
    /// Outer radius of the bowl, metres.
    pub const BOWL: f32 = 0.042;
    /// Things on the table, the bowl aside.
    pub const OBJECTS: usize = 3;

    /// A random scene of a split.
    pub fn random(rng: &mut Rng, split: Split) -> Self {
        let held_out = split == Split::HeldOut;
        let targets: Vec<_> = Kind::all().filter(|kind| kind.held_out() == held_out).collect();
        let verb = rng.pick(&[Verb::Touch, Verb::Put]);
        let task = Task { verb, target: rng.pick(&targets) };
        Self::of_task(rng, task)
    }

    /// A random scene with this task.
    pub fn of_task(rng: &mut Rng, task: Task) -> Self {
        let kinds = Self::kinds(rng, task.target);
        loop {
            if let Some((objects, bowl)) = Self::place(rng, &kinds) {
                let start = [rng.between(-0.1, 0.1), rng.between(-0.1, 0.1)];
                return Self { task, objects, bowl, start };
            }
        }
    }

    /// The target and others that often share its colour or its shape, so that neither word alone will do.
    fn kinds(rng: &mut Rng, target: Kind) -> Vec<Kind> {
        let mut kinds = vec![target];
        while kinds.len() < Self::OBJECTS {
            let mut kind = Kind { color: rng.pick(&Color::ALL), shape: rng.pick(&Shape::ALL) };
            match rng.below(3) {
                0 => kind.color = target.color,
                1 => kind.shape = target.shape,
                _ => {}
            }
            if !kinds.contains(&kind) {
                kinds.push(kind);
            }
        }
        kinds
    }

    /// Places without overlap; none if this try had no room.
    fn place(rng: &mut Rng, kinds: &[Kind]) -> Option<(Vec<Object>, [f32; 2])> {
        let bowl = [rng.between(-0.095, 0.095), rng.between(-0.095, 0.095)];
        let mut objects: Vec<Object> = Vec::new();
        for &kind in kinds {
            let at = [rng.between(-0.115, 0.115), rng.between(-0.115, 0.115)];
            let free = distance(at, bowl) > 0.078 && objects.iter().all(|o| distance(at, o.at) > 0.058);
            if !free {
                return None;
            }
            objects.push(Object { kind, at });
        }
        Some((objects, bowl))
    }
}

pub(crate) fn distance(a: [f32; 2], b: [f32; 2]) -> f32 {
    let (dx, dy) = (a[0] - b[0], a[1] - b[1]);
    (dx * dx + dy * dy).sqrt()
}
