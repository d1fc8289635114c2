//! From a decoded message to an observation: whose keys, which shapes, and openpi's leniencies.

use pi0_model::GuidanceSchedule;
use pi0_policy::{Filter, Image, Observation, Pixels, Policy, Robot};

use crate::Failure;
use crate::value::{Kind, Map, NdArray, Value};

/// A request in words of the policy.
#[derive(Debug)]
pub(crate) struct Request {
    pub observation: Observation,
    /// Starting noise, `[horizon, action_dim]`, checked by the model.
    pub noise: Option<Vec<f32>>,
    pub rtc: Option<Rtc>,
}

/// Real-time chunking, as the client asks for it.
#[derive(Debug, PartialEq)]
pub(crate) struct Rtc {
    /// None: what the checkpoint was trained for.
    pub mode: Option<RtcMode>,
    /// The actions of the last chunk that are not executed yet, `[rows, cols]`, as this server returned them.
    pub previous: Vec<f64>,
    pub cols: usize,
    pub delay: usize,
    pub execution_horizon: usize,
    pub max_weight: f64,
    pub schedule: GuidanceSchedule,
}

/// How the last chunk is continued.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum RtcMode {
    Guided,
    Trained,
}

/// Reads requests for one policy.
#[derive(Debug)]
pub(crate) struct RequestReader {
    robot: Option<Robot>,
    /// Names of cameras and of the state, for checkpoints without a robot.
    cameras: Vec<String>,
    state: Vec<String>,
    /// openpi turns floats into bytes first; lerobot does not.
    bytes_first: bool,
}

impl RequestReader {
    pub fn new(policy: &Policy) -> Self {
        let summary = policy.summary();
        Self {
            robot: policy.robot(),
            cameras: policy.image_names().map(str::to_owned).collect(),
            state: summary.state_names,
            bytes_first: summary.resize.filter == Filter::Pillow,
        }
    }

    /// Reads a message. Keys that nobody knows are ignored, as openpi does, but for those below `pi0/` and `rtc/`.
    pub fn read(&self, message: &Value) -> Result<Request, Failure> {
        let Value::Map(map) = message else {
            return Err(Failure::bad(format!("an observation is a dictionary, got {}", message.describe())));
        };
        let observation = Observation {
            images: match self.robot {
                Some(Robot::Aloha) => self.image_map(map)?,
                Some(robot) => {
                    let keys = robot.cameras().iter().map(|camera| camera.key);
                    self.images(keys.filter_map(|key| Some((key, map.get(key)?))))?
                }
                None => self.own_images(map)?,
            },
            state: match self.robot {
                Some(robot) => preset_state(map, robot)?,
                None => self.own_state(map)?,
            },
            prompt: prompt(map, if self.robot.is_some() { &["prompt"] } else { &["prompt", "task"] })?,
        };
        let noise = match map.get("pi0/noise") {
            None => None,
            Some(Value::Array(array)) => {
                Some(array.floats().ok_or_else(|| wrong("pi0/noise", &map.0, "floats"))?)
            }
            Some(_) => return Err(wrong("pi0/noise", &map.0, "an array of floats [horizon, action_dim]")),
        };
        if let Some((key, _)) = map.iter().find(|(key, _)| key.starts_with("pi0/") && *key != "pi0/noise") {
            return Err(Failure::bad(format!("unknown key `{key}`; of `pi0/` there is only `pi0/noise`")));
        }
        Ok(Request { observation, noise, rtc: rtc(map)? })
    }

    fn image_map(&self, map: &Map) -> Result<Vec<(String, Image)>, Failure> {
        match map.get("images") {
            Some(Value::Map(images)) => self.images(images.iter()),
            Some(_) => Err(wrong("images", &map.0, "a dictionary of camera and image")),
            None => Err(missing("images", map)),
        }
    }

    /// For a checkpoint without a robot: a dictionary `images`, or images under the cameras' own names. What looks like
    /// an image and belongs to no camera is handed on too: the policy refuses it by name.
    fn own_images(&self, map: &Map) -> Result<Vec<(String, Image)>, Failure> {
        let looks = |value: &Value| matches!(value, Value::Array(array) if array.shape.len() == 3 && (array.dtype.kind, array.dtype.size) == (Kind::Uint, 1));
        let is_image = |(key, value): &(&str, &Value)| {
            self.cameras.iter().any(|name| name == key)
                || key.starts_with("observation.image")
                || looks(value)
        };
        match map.get("images") {
            Some(_) => self.image_map(map),
            None => self.images(map.iter().filter(is_image)),
        }
    }

    fn own_state(&self, map: &Map) -> Result<Vec<f64>, Failure> {
        let given: Vec<_> = self.state.iter().filter(|name| map.get(name).is_some()).collect();
        match given.as_slice() {
            [name] => numbers(map, name),
            [] => Err(missing(self.state.first().map_or("state", String::as_str), map)),
            [one, other, ..] => {
                Err(Failure::bad(format!("the state is given twice, as `{one}` and as `{other}`")))
            }
        }
    }

    fn images<'a>(
        &self,
        entries: impl Iterator<Item = (&'a str, &'a Value)>,
    ) -> Result<Vec<(String, Image)>, Failure> {
        entries.map(|(key, value)| Ok((key.to_owned(), self.image(key, value)?))).collect()
    }

    fn image(&self, key: &str, value: &Value) -> Result<Image, Failure> {
        const WANTED: &str = "an array of |u1 (0..=255) or floats (0..=1) with three dimensions";
        let refuse = || Failure::bad(format!("image `{key}` is {}, wanted {WANTED}", value.describe()));
        let Value::Array(array) = value else { return Err(refuse()) };
        let shape: [usize; 3] = array.shape.as_slice().try_into().map_err(|_| refuse())?;
        let pixels = match (array.dtype.kind, array.dtype.size) {
            (Kind::Uint, 1) => Pixels::U8(array.data.clone()),
            // In f64 `trunc(255 x)` differs from f32 by one now and then, so it is done here.
            (Kind::Float, 8) if self.bytes_first => Pixels::U8(bytes_of_floats(key, array)?.into()),
            (Kind::Float, _) => Pixels::F32(array.floats().ok_or_else(refuse)?.into()),
            _ => return Err(refuse()),
        };
        Ok(Image::array(pixels, shape))
    }
}

fn bytes_of_floats(key: &str, array: &NdArray) -> Result<Vec<u8>, Failure> {
    let values = array.numbers().unwrap_or_default();
    let convert = |x: f64| match (-1e-3..=1.001).contains(&x) {
        true => Ok((255.0 * x) as u8),
        false => Err(Failure::bad(format!("image `{key}`: float samples must lie in 0.0..=1.0, found {x}"))),
    };
    values.into_iter().map(convert).collect()
}

fn missing(key: &str, map: &Map) -> Failure {
    const MOST: usize = 12;
    let mut keys: Vec<String> = map.iter().take(MOST).map(|(key, _)| format!("`{key:.64}`")).collect();
    if map.0.len() > MOST {
        keys.push("…".into());
    }
    let got = if keys.is_empty() { "nothing".into() } else { keys.join(", ") };
    Failure::bad(format!("the observation lacks `{key}`; it has {got}"))
}

fn wrong(key: &str, entries: &[(String, Value)], wanted: &str) -> Failure {
    let got = entries.iter().rev().find(|(name, _)| name == key).map(|(_, value)| value.describe());
    Failure::bad(format!("`{key}` is {}, wanted {wanted}", got.unwrap_or_default()))
}

/// The numbers under `key`: an array of one dimension, a list, or a single number.
fn numbers(map: &Map, key: &str) -> Result<Vec<f64>, Failure> {
    let value = map.get(key).ok_or_else(|| missing(key, map))?;
    let numbers = match value {
        Value::Array(array) if array.shape.len() <= 1 => array.numbers(),
        Value::List(items) => items.iter().map(Value::number).collect(),
        Value::Int(_) | Value::Float(_) => value.number().map(|x| vec![x]),
        _ => None,
    };
    numbers.ok_or_else(|| wrong(key, &map.0, "numbers in one dimension"))
}

fn preset_state(map: &Map, robot: Robot) -> Result<Vec<f64>, Failure> {
    let mut state = Vec::with_capacity(robot.state_width());
    for (key, length) in robot.state() {
        let part = numbers(map, key)?;
        if part.len() != *length {
            let got = part.len();
            return Err(Failure::bad(format!("`{key}` has {got} values, {robot} has {length}")));
        }
        state.extend(part);
    }
    Ok(state)
}

fn prompt(map: &Map, keys: &[&str]) -> Result<Option<String>, Failure> {
    let Some(key) = keys.iter().find(|key| map.get(key).is_some()) else { return Ok(None) };
    let text = match map.get(key) {
        None | Some(Value::Nil) => return Ok(None),
        Some(Value::Text(text)) => Some(text.clone()),
        Some(Value::Binary(bytes)) => String::from_utf8(bytes.to_vec()).ok(),
        Some(Value::Array(array)) => array.text(),
        Some(_) => None,
    };
    text.map(Some).ok_or_else(|| wrong(key, &map.0, "a string"))
}

const RTC: [&str; 6] = [
    "rtc/mode",
    "rtc/previous",
    "rtc/delay",
    "rtc/execution_horizon",
    "rtc/max_guidance_weight",
    "rtc/schedule",
];
const MODES: &str = "guided or trained";

fn rtc(map: &Map) -> Result<Option<Rtc>, Failure> {
    if let Some((key, _)) = map.iter().find(|(key, _)| key.starts_with("rtc/") && !RTC.contains(key)) {
        return Err(Failure::bad(format!("unknown key `{key}`; known are {}", RTC.join(", "))));
    }
    let count = |key: &str, default: usize| match map.get(key) {
        None => Ok(default),
        Some(Value::Int(n)) => usize::try_from(*n).map_err(|_| wrong(key, &map.0, "a count")),
        Some(_) => Err(wrong(key, &map.0, "an integer")),
    };
    let max_weight = match map.get("rtc/max_guidance_weight") {
        None => 10.0,
        Some(value) => match value.number() {
            Some(x) if x.is_finite() && x >= 0.0 => x,
            _ => return Err(wrong("rtc/max_guidance_weight", &map.0, "a number from 0")),
        },
    };
    let schedule = match map.get("rtc/schedule") {
        None => GuidanceSchedule::default(),
        Some(Value::Text(name)) => match name.to_ascii_lowercase().as_str() {
            "zeros" => GuidanceSchedule::Zeros,
            "ones" => GuidanceSchedule::Ones,
            "linear" => GuidanceSchedule::Linear,
            "exp" => GuidanceSchedule::Exp,
            _ => return Err(Failure::bad(format!("`rtc/schedule` is {name:?}, wanted {SCHEDULES}"))),
        },
        Some(_) => return Err(wrong("rtc/schedule", &map.0, SCHEDULES)),
    };
    let mode = match map.get("rtc/mode") {
        None | Some(Value::Nil) => None,
        Some(Value::Text(name)) => match name.to_ascii_lowercase().as_str() {
            "guided" => Some(RtcMode::Guided),
            "trained" => Some(RtcMode::Trained),
            _ => return Err(Failure::bad(format!("`rtc/mode` is {name:?}, wanted {MODES}"))),
        },
        Some(_) => return Err(wrong("rtc/mode", &map.0, MODES)),
    };
    let (delay, execution_horizon) = (count("rtc/delay", 0)?, count("rtc/execution_horizon", 10)?);
    let (previous, cols) = match map.get("rtc/previous") {
        // The first chunk has nothing to follow.
        None | Some(Value::Nil) => return Ok(None),
        Some(Value::Array(array)) => match (array.shape.as_slice(), array.numbers()) {
            ([0, _], _) => return Ok(None),
            ([_, cols], Some(values)) => (values, *cols),
            _ => return Err(wrong("rtc/previous", &map.0, "numbers [actions, width]")),
        },
        Some(_) => return Err(wrong("rtc/previous", &map.0, "an array [actions, width]")),
    };
    Ok(Some(Rtc { mode, previous, cols, delay, execution_horizon, max_weight, schedule }))
}

const SCHEDULES: &str = "one of zeros, ones, linear, exp";
