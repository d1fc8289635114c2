//! What a message can hold: msgpack's values and numpy's arrays.

use std::fmt;

use bytes::Bytes;

/// A decoded msgpack value. Binary data and arrays are slices of the frame that they came in.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    /// `None`.
    Nil,
    /// Also a numpy bool.
    Bool(bool),
    /// Wide enough for every integer of msgpack; also a numpy integer.
    Int(i128),
    /// Also a numpy float.
    Float(f64),
    /// `str`, also a numpy string.
    Text(String),
    /// `bytes`.
    Binary(Bytes),
    /// A list or tuple.
    List(Vec<Value>),
    /// A dictionary.
    Map(Map),
    /// A numpy array.
    Array(NdArray),
}

impl Value {
    /// What it is, for messages: `an array of |u1 [224, 224, 3]`.
    pub fn describe(&self) -> String {
        match self {
            Value::Nil => "nothing".into(),
            Value::Bool(_) => "a bool".into(),
            Value::Int(_) => "an integer".into(),
            Value::Float(_) => "a float".into(),
            Value::Text(_) => "a string".into(),
            Value::Binary(_) => "bytes".into(),
            Value::List(items) => format!("a list of {}", items.len()),
            Value::Map(_) => "a dictionary".into(),
            Value::Array(array) => format!("an array of {} {:?}", array.dtype, array.shape),
        }
    }

    /// A number, be it an integer, a float or an array of one number.
    pub fn number(&self) -> Option<f64> {
        match self {
            Value::Int(x) => Some(*x as f64),
            Value::Float(x) => Some(*x),
            Value::Array(array) if array.len() == 1 => array.numbers()?.first().copied(),
            _ => None,
        }
    }
}

/// A dictionary with string keys, in the order of the message. Keys of type `bytes` count as strings.
#[derive(Debug, Clone, PartialEq, Default)]
pub struct Map(pub Vec<(String, Value)>);

impl Map {
    /// The value of `key`; of several the last, as in Python.
    pub fn get(&self, key: &str) -> Option<&Value> {
        self.0.iter().rev().find(|(name, _)| name == key).map(|(_, value)| value)
    }

    /// Keys and values.
    pub fn iter(&self) -> impl Iterator<Item = (&str, &Value)> {
        self.0.iter().map(|(key, value)| (key.as_str(), value))
    }
}

impl<K: Into<String>, const N: usize> From<[(K, Value); N]> for Map {
    fn from(entries: [(K, Value); N]) -> Self {
        Self(entries.into_iter().map(|(key, value)| (key.into(), value)).collect())
    }
}

/// The kinds of numpy types that may travel. Objects, records, complex numbers and dates may not.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Kind {
    /// `b`.
    Bool,
    /// `i`.
    Int,
    /// `u`.
    Uint,
    /// `f`.
    Float,
    /// `U`: UTF-32.
    Unicode,
    /// `S`.
    Ascii,
}

/// A numpy type, such as `<f4`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Dtype {
    /// Its kind.
    pub kind: Kind,
    /// Bytes of one element.
    pub size: usize,
    /// Whether elements are big-endian.
    pub big: bool,
}

impl Dtype {
    /// `|u1`.
    pub const U8: Dtype = Dtype { kind: Kind::Uint, size: 1, big: false };
    /// `<f4`.
    pub const F32: Dtype = Dtype { kind: Kind::Float, size: 4, big: false };
    /// `<f8`.
    pub const F64: Dtype = Dtype { kind: Kind::Float, size: 8, big: false };

    /// Reads numpy's `dtype.str`, or one of the names that numpy's `dtype()` takes: `uint8`, `float64`, `d`.
    ///
    /// # Errors
    /// A sentence, for types that may not travel.
    pub fn parse(text: &str) -> Result<Self, String> {
        let refuse = || format!("numpy type {text:?} is not accepted; send bool, integers or floats");
        if let Some((kind, size)) = named(text) {
            return Ok(Self { kind, size, big: false });
        }
        let (order, rest) = match text.as_bytes() {
            [order @ (b'<' | b'>' | b'|' | b'='), ..] => (*order, &text[1..]),
            _ => (b'=', text),
        };
        let (Some(kind), Some(size)) = (rest.get(..1), rest.get(1..)) else { return Err(refuse()) };
        if size.len() > 6 || size.is_empty() || !size.bytes().all(|c| c.is_ascii_digit()) {
            return Err(refuse());
        }
        let size: usize = size.parse().map_err(|_| refuse())?;
        let (kind, size) = match (kind, size) {
            ("b", 1) => (Kind::Bool, 1),
            ("i", 1 | 2 | 4 | 8) => (Kind::Int, size),
            ("u", 1 | 2 | 4 | 8) => (Kind::Uint, size),
            ("f", 2 | 4 | 8) => (Kind::Float, size),
            ("U", _) => (Kind::Unicode, 4 * size),
            ("S", _) => (Kind::Ascii, size),
            _ => return Err(refuse()),
        };
        Ok(Self { kind, size, big: order == b'>' })
    }
}

/// numpy's names of its types, and their letters.
fn named(name: &str) -> Option<(Kind, usize)> {
    Some(match name {
        "bool" | "bool_" | "?" => (Kind::Bool, 1),
        "int8" | "byte" | "b" => (Kind::Int, 1),
        "int16" | "short" | "h" => (Kind::Int, 2),
        "int32" | "intc" | "i" => (Kind::Int, 4),
        "int64" | "int" | "int_" | "longlong" | "l" | "q" => (Kind::Int, 8),
        "uint8" | "ubyte" | "B" => (Kind::Uint, 1),
        "uint16" | "ushort" | "H" => (Kind::Uint, 2),
        "uint32" | "uintc" | "I" => (Kind::Uint, 4),
        "uint64" | "uint" | "ulonglong" | "L" | "Q" => (Kind::Uint, 8),
        "float16" | "half" | "e" => (Kind::Float, 2),
        "float32" | "single" | "f" => (Kind::Float, 4),
        "float64" | "float" | "double" | "d" => (Kind::Float, 8),
        _ => return None,
    })
}

impl fmt::Display for Dtype {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (kind, size) = match self.kind {
            Kind::Bool => ('b', 1),
            Kind::Int => ('i', self.size),
            Kind::Uint => ('u', self.size),
            Kind::Float => ('f', self.size),
            Kind::Unicode => ('U', self.size / 4),
            Kind::Ascii => ('S', self.size),
        };
        let order = match self.big {
            _ if self.size == 1 || self.kind == Kind::Ascii => '|',
            true => '>',
            false => '<',
        };
        write!(f, "{order}{kind}{size}")
    }
}

/// A numpy array in C order. Cloning shares its data.
#[derive(Debug, Clone, PartialEq)]
pub struct NdArray {
    /// Type of the elements.
    pub dtype: Dtype,
    /// Sizes, outermost first; none for a single element.
    pub shape: Vec<usize>,
    /// As many bytes as type and shape say.
    pub data: Bytes,
}

impl NdArray {
    /// An array over `data`.
    ///
    /// # Errors
    /// A sentence, when the length of `data` is not what type and shape say.
    pub fn new(dtype: Dtype, shape: Vec<usize>, data: Bytes) -> Result<Self, String> {
        let wanted = shape.iter().try_fold(dtype.size, |n, &d| n.checked_mul(d));
        if wanted != Some(data.len()) {
            let wanted = wanted.map_or("too many to count".into(), |n| n.to_string());
            let got = data.len();
            return Err(format!("an array of {dtype} {shape:?} needs {wanted} bytes, {got} came"));
        }
        Ok(Self { dtype, shape, data })
    }

    /// `[rows, cols]` of f64, as the values of a row-major slice.
    pub fn from_f64(shape: Vec<usize>, values: &[f64]) -> Result<Self, String> {
        Self::new(Dtype::F64, shape, values.iter().flat_map(|x| x.to_le_bytes()).collect())
    }

    /// Number of elements. Strings of no length may claim to be more than can be counted.
    pub fn len(&self) -> usize {
        self.shape.iter().fold(1, |n: usize, &d| n.saturating_mul(d))
    }

    /// Whether there are none.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// All elements as f64; none for an array of strings. Integers beyond 2⁵³ are rounded.
    pub fn numbers(&self) -> Option<Vec<f64>> {
        Some(match (self.dtype.kind, self.dtype.size) {
            (Kind::Bool | Kind::Uint, 1) => self.data.iter().map(|&b| f64::from(b)).collect(),
            (Kind::Int, 1) => self.data.iter().map(|&b| f64::from(b as i8)).collect(),
            (Kind::Int, 2) => self.elements(|b| f64::from(i16::from_le_bytes(b))),
            (Kind::Int, 4) => self.elements(|b| f64::from(i32::from_le_bytes(b))),
            (Kind::Int, 8) => self.elements(|b| i64::from_le_bytes(b) as f64),
            (Kind::Uint, 2) => self.elements(|b| f64::from(u16::from_le_bytes(b))),
            (Kind::Uint, 4) => self.elements(|b| f64::from(u32::from_le_bytes(b))),
            (Kind::Uint, 8) => self.elements(|b| u64::from_le_bytes(b) as f64),
            (Kind::Float, 2) => self.elements(|b| half::f16::from_le_bytes(b).to_f64()),
            (Kind::Float, 4) => self.elements(|b| f64::from(f32::from_le_bytes(b))),
            (Kind::Float, 8) => self.elements(f64::from_le_bytes),
            _ => return None,
        })
    }

    /// All elements of a float array as f32, rounded.
    pub fn floats(&self) -> Option<Vec<f32>> {
        Some(match (self.dtype.kind, self.dtype.size) {
            (Kind::Float, 2) => self.elements(|b| half::f16::from_le_bytes(b).to_f32()),
            (Kind::Float, 4) => self.elements(f32::from_le_bytes),
            (Kind::Float, 8) => self.elements(|b| f64::from_le_bytes(b) as f32),
            _ => return None,
        })
    }

    /// The only string of an array of strings.
    pub fn text(&self) -> Option<String> {
        if self.len() != 1 {
            return None;
        }
        match self.dtype.kind {
            Kind::Unicode => {
                let codes = self.elements::<4, u32>(u32::from_le_bytes);
                let text: Option<String> = codes.into_iter().map(char::from_u32).collect();
                text.map(|text| text.trim_end_matches('\0').to_owned())
            }
            Kind::Ascii => {
                let text = String::from_utf8(self.data.to_vec()).ok()?;
                Some(text.trim_end_matches('\0').to_owned())
            }
            _ => None,
        }
    }

    /// Calls `read` with the bytes of each element, the least significant first.
    fn elements<const N: usize, T>(&self, read: impl Fn([u8; N]) -> T) -> Vec<T> {
        let (chunks, _) = self.data.as_chunks::<N>();
        let swap = |mut bytes: [u8; N]| {
            bytes.reverse();
            bytes
        };
        match self.dtype.big {
            false => chunks.iter().map(|&b| read(b)).collect(),
            true => chunks.iter().map(|&b| read(swap(b))).collect(),
        }
    }
}
