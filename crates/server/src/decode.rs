//! From a frame to values, without copying arrays.

use std::fmt;

use bytes::Bytes;
use rmp::Marker;

use crate::value::{Dtype, Kind, Map, NdArray, Value};

/// What a message may cost before it is refused. Its size in bytes is limited where it is received.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Limits {
    /// Dictionaries and lists within each other.
    pub depth: usize,
    /// Values in all. One byte of a message can become a value of some sixty bytes.
    pub values: usize,
}

impl Default for Limits {
    fn default() -> Self {
        Self { depth: 16, values: 1 << 16 }
    }
}

/// Largest number of dimensions of an array, as in numpy 1.
const MAX_RANK: usize = 32;

/// Why a frame is no message.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("{}at byte {at}: {why}", Place(.path))]
pub struct DecodeError {
    /// Keys that lead to the place, the outermost first.
    pub path: Vec<String>,
    /// Where in the frame.
    pub at: usize,
    /// What is wrong.
    pub why: String,
}

struct Place<'a>(&'a [String]);

impl fmt::Display for Place<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 {
            [] => f.write_str("not a msgpack message, "),
            path => write!(f, "`{}` ", path.join("` → `")),
        }
    }
}

/// Decodes a whole frame.
///
/// # Errors
/// When the frame is cut short or has bytes left over, breaks a limit, or holds what no policy takes: extension
/// types, keys that are not strings, arrays of objects.
pub fn decode(frame: &Bytes, limits: Limits) -> Result<Value, DecodeError> {
    let mut reader = Reader { frame, at: 0, values: limits.values };
    let value = reader.value(limits.depth)?;
    match frame.len() - reader.at {
        0 => Ok(value),
        left => Err(reader.error(format!("{left} bytes follow the message"))),
    }
}

struct Reader<'a> {
    frame: &'a Bytes,
    at: usize,
    /// How many more may come.
    values: usize,
}

type Result<T, E = DecodeError> = std::result::Result<T, E>;

impl Reader<'_> {
    fn error(&self, why: impl Into<String>) -> DecodeError {
        DecodeError { path: Vec::new(), at: self.at, why: why.into() }
    }

    fn take(&mut self, length: usize) -> Result<Bytes> {
        let left = self.frame.len() - self.at;
        if length > left {
            return Err(self.error(format!("{length} bytes are announced, {left} are left")));
        }
        self.at += length;
        Ok(self.frame.slice(self.at - length..self.at))
    }

    fn number<const N: usize>(&mut self) -> Result<[u8; N]> {
        let bytes = self.frame[self.at..].first_chunk::<N>().copied();
        let bytes = bytes.ok_or_else(|| self.error("the message is cut short"))?;
        self.at += N;
        Ok(bytes)
    }

    /// A length of one, two or four bytes.
    fn length(&mut self, width: u8) -> Result<usize> {
        Ok(match width {
            1 => usize::from(u8::from_be_bytes(self.number()?)),
            2 => usize::from(u16::from_be_bytes(self.number()?)),
            _ => u32::from_be_bytes(self.number()?) as usize,
        })
    }

    fn text(&mut self, length: usize) -> Result<String> {
        let bytes = self.take(length)?;
        match std::str::from_utf8(&bytes) {
            Ok(text) => Ok(text.to_owned()),
            Err(_) => Err(self.error("a string is not UTF-8")),
        }
    }

    fn value(&mut self, depth: usize) -> Result<Value> {
        let Some(values) = self.values.checked_sub(1) else {
            return Err(self.error("the message holds too many values"));
        };
        self.values = values;
        let marker = Marker::from_u8(u8::from_be_bytes(self.number()?));
        Ok(match marker {
            Marker::Null => Value::Nil,
            Marker::True => Value::Bool(true),
            Marker::False => Value::Bool(false),
            Marker::FixPos(n) => Value::Int(n.into()),
            Marker::FixNeg(n) => Value::Int(n.into()),
            Marker::U8 => Value::Int(u8::from_be_bytes(self.number()?).into()),
            Marker::U16 => Value::Int(u16::from_be_bytes(self.number()?).into()),
            Marker::U32 => Value::Int(u32::from_be_bytes(self.number()?).into()),
            Marker::U64 => Value::Int(u64::from_be_bytes(self.number()?).into()),
            Marker::I8 => Value::Int(i8::from_be_bytes(self.number()?).into()),
            Marker::I16 => Value::Int(i16::from_be_bytes(self.number()?).into()),
            Marker::I32 => Value::Int(i32::from_be_bytes(self.number()?).into()),
            Marker::I64 => Value::Int(i64::from_be_bytes(self.number()?).into()),
            Marker::F32 => Value::Float(f32::from_be_bytes(self.number()?).into()),
            Marker::F64 => Value::Float(f64::from_be_bytes(self.number()?)),
            Marker::FixStr(_) | Marker::Str8 | Marker::Str16 | Marker::Str32 => {
                let length = self.string_length(marker)?;
                Value::Text(self.text(length)?)
            }
            Marker::Bin8 | Marker::Bin16 | Marker::Bin32 => {
                let length = self.string_length(marker)?;
                Value::Binary(self.take(length)?)
            }
            Marker::FixArray(n) => self.list(n.into(), depth)?,
            Marker::Array16 => {
                let n = self.length(2)?;
                self.list(n, depth)?
            }
            Marker::Array32 => {
                let n = self.length(4)?;
                self.list(n, depth)?
            }
            Marker::FixMap(n) => self.map(n.into(), depth)?,
            Marker::Map16 => {
                let n = self.length(2)?;
                self.map(n, depth)?
            }
            Marker::Map32 => {
                let n = self.length(4)?;
                self.map(n, depth)?
            }
            other => return Err(self.error(format!("msgpack's {other:?} is not accepted"))),
        })
    }

    /// Length of a string or of binary data behind its marker.
    fn string_length(&mut self, marker: Marker) -> Result<usize> {
        match marker {
            Marker::FixStr(n) => Ok(n.into()),
            Marker::Str8 | Marker::Bin8 => self.length(1),
            Marker::Str16 | Marker::Bin16 => self.length(2),
            Marker::Str32 | Marker::Bin32 => self.length(4),
            _ => Err(self.error("a key is not a string")),
        }
    }

    /// Refuses early what cannot be there, so that nothing is allocated for it.
    fn check_count(&self, count: usize, depth: usize) -> Result<usize> {
        if count > self.values || count > self.frame.len() - self.at {
            return Err(self.error(format!("{count} values are announced, more than can follow")));
        }
        depth.checked_sub(1).ok_or_else(|| self.error("the message is nested too deeply"))
    }

    fn list(&mut self, count: usize, depth: usize) -> Result<Value> {
        let depth = self.check_count(count, depth)?;
        let mut items = Vec::with_capacity(count);
        for i in 0..count {
            items.push(self.value(depth).map_err(|e| e.within(format!("{i}")))?);
        }
        Ok(Value::List(items))
    }

    fn map(&mut self, count: usize, depth: usize) -> Result<Value> {
        let depth = self.check_count(count, depth)?;
        let start = self.at;
        let mut entries = Vec::with_capacity(count);
        for _ in 0..count {
            let marker = Marker::from_u8(u8::from_be_bytes(self.number()?));
            let length = self.string_length(marker)?;
            let key = self.text(length)?;
            let value = self.value(depth).map_err(|e| e.within(key.clone()))?;
            entries.push((key, value));
        }
        let map = Map(entries);
        let numpy = match (map.get("__ndarray__"), map.get("__npgeneric__")) {
            (Some(_), _) => array(&map),
            (None, Some(_)) => scalar(&map),
            (None, None) => return Ok(Value::Map(map)),
        };
        numpy.map_err(|why| DecodeError { path: Vec::new(), at: start, why })
    }
}

impl DecodeError {
    fn within(mut self, key: String) -> Self {
        self.path.insert(0, key);
        self
    }
}

fn dtype(map: &Map) -> Result<Dtype, String> {
    match map.get("dtype") {
        Some(Value::Text(text)) => Dtype::parse(text),
        Some(Value::Binary(text)) => Dtype::parse(&String::from_utf8_lossy(text)),
        _ => Err("a numpy value lacks its `dtype`".into()),
    }
}

fn array(map: &Map) -> Result<Value, String> {
    let dtype = dtype(map)?;
    let Some(Value::List(sizes)) = map.get("shape") else {
        return Err("a numpy array lacks its `shape`".into());
    };
    if sizes.len() > MAX_RANK {
        return Err(format!("an array of {} dimensions; at most {MAX_RANK} are accepted", sizes.len()));
    }
    let size = |value: &Value| match value {
        Value::Int(n) => usize::try_from(*n).ok(),
        _ => None,
    };
    let shape: Option<Vec<usize>> = sizes.iter().map(size).collect();
    let shape = shape.ok_or("the `shape` of a numpy array holds something else than sizes")?;
    let Some(Value::Binary(data)) = map.get("data") else {
        return Err("a numpy array lacks its `data`".into());
    };
    NdArray::new(dtype, shape, data.clone()).map(Value::Array)
}

fn scalar(map: &Map) -> Result<Value, String> {
    let dtype = dtype(map)?;
    match (dtype.kind, map.get("data")) {
        (Kind::Bool, Some(Value::Bool(x))) => Ok(Value::Bool(*x)),
        (Kind::Int | Kind::Uint, Some(Value::Int(x))) => Ok(Value::Int(*x)),
        (Kind::Float, Some(Value::Float(x))) => Ok(Value::Float(*x)),
        (Kind::Float, Some(Value::Int(x))) => Ok(Value::Float(*x as f64)),
        (Kind::Unicode, Some(Value::Text(x))) => Ok(Value::Text(x.clone())),
        (Kind::Ascii, Some(Value::Binary(x))) => Ok(Value::Binary(x.clone())),
        (_, Some(data)) => Err(format!("a numpy scalar of type {dtype} holds {}", data.describe())),
        (_, None) => Err("a numpy scalar lacks its `data`".into()),
    }
}
