//! Reads what an implementation wrote down of one inference.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use half::{bf16, f16};
use pi0_device::{HostTensor, OpKind, Part, Place, Record};
use pi0_model::Inputs;
use pi0_model::cases::Format;
use safetensors::SafeTensors;
use safetensors::tensor::{Dtype, TensorView};
use serde::Deserialize;

use crate::{Error, Result};

/// What stands before the names of inputs in a file that holds inputs and taps.
const INPUTS: &str = "inputs.";

/// One inference of some implementation: what went in, and every intermediate that it wrote down.
#[derive(Debug, Clone)]
pub struct Dump {
    /// The file.
    pub path: PathBuf,
    /// What went in, without what was masked.
    pub batch: Vec<Inputs>,
    /// The same with every image and token taken as real, as an implementation sees it that drops the masks.
    pub unmasked: Vec<Inputs>,
    /// Columns of the padded prompts.
    pub padded_tokens: usize,
    /// Intermediates by the golden names.
    pub taps: BTreeMap<String, HostTensor>,
    /// Where the implementation rounds, if it says so.
    pub format: Option<Format>,
    /// Denoising steps, if it says so.
    pub steps: Option<usize>,
    /// Who made it, if it says so.
    pub source: Option<String>,
    /// What ran where, if it says so.
    pub records: Vec<Record>,
}

/// An operation as a dump tells of it.
#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Ran {
    op: String,
    module: String,
    #[serde(default)]
    place: RanAt,
    #[serde(default)]
    seconds: f64,
    #[serde(default)]
    transfer_seconds: f64,
    #[serde(default)]
    transfer_bytes: u64,
    #[serde(default)]
    bytes: u64,
    #[serde(default)]
    flop: u64,
}

#[derive(Deserialize, Default)]
#[serde(rename_all = "lowercase")]
enum RanAt {
    #[default]
    Device,
    Host,
}

/// Whether a file is such a dump rather than golden outputs with their inputs beside them.
pub fn is_dump(path: &Path) -> Result<bool> {
    let bytes = read(path)?;
    let file = SafeTensors::deserialize(&bytes).map_err(|e| wrong(path, e.to_string()))?;
    Ok(file.names().iter().any(|n| n.starts_with(INPUTS)))
}

fn read(path: &Path) -> Result<Vec<u8>> {
    std::fs::read(path).map_err(|source| Error::Read { path: path.into(), source })
}

fn wrong(path: &Path, what: impl Into<String>) -> Error {
    Error::Results { path: path.into(), what: what.into() }
}

impl Dump {
    /// Reads a dump: a safetensors file of taps with their inputs as `inputs.*`, or `NAME.outputs.safetensors` with
    /// `NAME.inputs.safetensors` beside it.
    pub fn read(path: &Path) -> Result<Self> {
        let bytes = read(path)?;
        let file = SafeTensors::deserialize(&bytes).map_err(|e| wrong(path, e.to_string()))?;
        let (_, header) = SafeTensors::read_metadata(&bytes).map_err(|e| wrong(path, e.to_string()))?;
        let meta = header.metadata().clone().unwrap_or_default();
        let mut all = BTreeMap::new();
        for (name, view) in file.tensors() {
            all.insert(
                name.clone(),
                values(&view).map_err(|why| wrong(path, format!("holds {name} {why}")))?,
            );
        }
        let mut inputs: BTreeMap<String, HostTensor> = BTreeMap::new();
        all.retain(|name, t| match name.strip_prefix(INPUTS) {
            Some(rest) => {
                inputs.insert(rest.to_string(), std::mem::take(t));
                false
            }
            None => true,
        });
        if inputs.is_empty() {
            let name = path.to_string_lossy();
            let Some(stem) = name.strip_suffix(".outputs.safetensors") else {
                let what = "holds no inputs (inputs.tokens and so on); a dump needs what went in";
                return Err(wrong(path, what));
            };
            let beside = PathBuf::from(format!("{stem}.inputs.safetensors"));
            let bytes = read(&beside)?;
            let file = SafeTensors::deserialize(&bytes).map_err(|e| wrong(&beside, e.to_string()))?;
            for (name, view) in file.tensors() {
                inputs.insert(
                    name.clone(),
                    values(&view).map_err(|why| wrong(&beside, format!("holds {name} {why}")))?,
                );
            }
        }
        let (batch, unmasked, padded_tokens) = batches(inputs).map_err(|what| wrong(path, what))?;
        let format = match meta.get("format").map(String::as_str) {
            None | Some("") => None,
            Some(name) => {
                Some(name.parse().map_err(|why: String| wrong(path, format!("says format: {why}")))?)
            }
        };
        let steps = match meta.get("num_steps") {
            None => None,
            Some(n) => Some(n.parse().map_err(|_| wrong(path, format!("says num_steps: {n:?}")))?),
        };
        let records = match meta.get("records") {
            None => vec![],
            Some(json) => records(json).map_err(|why| wrong(path, format!("says records: {why}")))?,
        };
        let source = meta.get("source").cloned();
        Ok(Self {
            path: path.into(),
            batch,
            unmasked,
            padded_tokens,
            taps: all,
            format,
            steps,
            source,
            records,
        })
    }
}

/// Any real or whole numbers as f32.
fn values(view: &TensorView<'_>) -> std::result::Result<HostTensor, String> {
    fn each<const N: usize>(data: &[u8], f: impl Fn([u8; N]) -> f32) -> Vec<f32> {
        data.as_chunks::<N>().0.iter().map(|&b| f(b)).collect()
    }
    let data = view.data();
    let values = match view.dtype() {
        Dtype::F32 => each(data, f32::from_le_bytes),
        Dtype::F64 => each(data, |b| f64::from_le_bytes(b) as f32),
        Dtype::F16 => each(data, |b| f16::from_le_bytes(b).to_f32()),
        Dtype::BF16 => each(data, |b| bf16::from_le_bytes(b).to_f32()),
        Dtype::U8 | Dtype::BOOL => data.iter().map(|&b| f32::from(b)).collect(),
        Dtype::I8 => data.iter().map(|&b| f32::from(b as i8)).collect(),
        Dtype::I32 => each(data, |b| i32::from_le_bytes(b) as f32),
        Dtype::U32 => each(data, |b| u32::from_le_bytes(b) as f32),
        Dtype::I64 => each(data, |b| i64::from_le_bytes(b) as f32),
        other => return Err(format!("in {other:?}, wanted real or whole numbers")),
    };
    Ok(HostTensor::new(view.shape(), values))
}

type Batches = (Vec<Inputs>, Vec<Inputs>, usize);

/// The inputs of each robot, with masks heeded and with masks dropped.
fn batches(mut named: BTreeMap<String, HostTensor>) -> std::result::Result<Batches, String> {
    let tokens = named.remove("tokens").ok_or("holds no inputs.tokens")?;
    // One robot may come without the dimension of the batch.
    let robots = if tokens.shape.len() < 2 { 1 } else { tokens.shape[0] };
    if robots == 0 || !tokens.data.len().is_multiple_of(robots) {
        return Err(format!("holds tokens of shape {:?}", tokens.shape));
    }
    let width = tokens.data.len() / robots;
    let mut images = Vec::new();
    while let Some(image) = named.remove(&format!("image_{}", images.len())) {
        images.push(image);
    }
    let sized = |name: &str, t: &HostTensor, wanted: usize| match t.data.len() == wanted {
        true => Ok(()),
        false => Err(format!("holds inputs.{name} of shape {:?} for {robots} robots", t.shape)),
    };
    let ones = |count: usize| HostTensor::new([count], vec![1.0; count]);
    let image_mask = named.remove("image_mask").unwrap_or_else(|| ones(robots * images.len()));
    let token_mask = named.remove("token_mask").unwrap_or_else(|| ones(robots * width));
    sized("image_mask", &image_mask, robots * images.len())?;
    sized("token_mask", &token_mask, robots * width)?;
    let (state, noise) = (named.remove("state"), named.remove("noise"));
    for (i, t) in images.iter().chain(&state).chain(&noise).enumerate() {
        if !t.data.len().is_multiple_of(robots) {
            return Err(format!("holds input {i} of shape {:?} for {robots} robots", t.shape));
        }
    }
    let part = |t: &HostTensor, b: usize| {
        let n = t.data.len() / robots;
        t.data[b * n..(b + 1) * n].to_vec()
    };
    let make = |masks: bool| -> std::result::Result<Vec<Inputs>, String> {
        let robot = |b: usize| {
            let heeded = |mask: f32| !masks || mask != 0.0;
            let token = |t: f32| match t {
                t if t >= 0.0 && t.fract() == 0.0 => Ok(t as u32),
                t => Err(format!("holds the token {t}")),
            };
            let row = (b * width..(b + 1) * width).filter(|&i| heeded(token_mask.data[i]));
            Ok(Inputs {
                images: (0..images.len())
                    .map(|c| heeded(image_mask.data[b * images.len() + c]).then(|| part(&images[c], b)))
                    .collect(),
                tokens: row.map(|i| token(tokens.data[i])).collect::<std::result::Result<_, String>>()?,
                state: state.as_ref().map_or_else(Vec::new, |s| part(s, b)),
                noise: noise.as_ref().map(|n| part(n, b)),
                ..Inputs::default()
            })
        };
        (0..robots).map(robot).collect()
    };
    Ok((make(true)?, make(false)?, width))
}

fn records(json: &str) -> std::result::Result<Vec<Record>, String> {
    let all: Vec<Ran> = serde_json::from_str(json).map_err(|e| e.to_string())?;
    let mut start = 0.0;
    let seconds = |s: f64| Duration::try_from_secs_f64(s).map_err(|e| e.to_string());
    all.into_iter()
        .map(|ran| {
            let op = OpKind::BASE.into_iter().find(|op| op.name() == ran.op).ok_or_else(|| {
                let known = OpKind::BASE.map(OpKind::name).join(", ");
                format!("{:?} is no operation; known are {known}", ran.op)
            })?;
            let time = ran.seconds + ran.transfer_seconds;
            let record = Record {
                op,
                parts: vec![Part { op, flop: ran.flop }],
                module: ran.module.into(),
                shapes: vec![],
                result: [0, 0],
                place: match ran.place {
                    RanAt::Device => Place::Device,
                    RanAt::Host => Place::Host,
                },
                start: seconds(start)?,
                time: seconds(time)?,
                transfer_time: seconds(ran.transfer_seconds)?,
                transfer_bytes: ran.transfer_bytes,
                bytes: ran.bytes,
                device_time: None,
            };
            start += time;
            Ok(record)
        })
        .collect()
}
