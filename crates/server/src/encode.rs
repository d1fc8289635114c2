//! From values to the bytes that Python's openpi-client writes and reads.

use rmp::encode as write;

use crate::value::{Map, NdArray, Value};

/// Encodes a value, each number in its shortest form. The keys that mark an array are of type `bytes`, since
/// openpi-client looks for exactly those.
pub fn encode(value: &Value) -> Vec<u8> {
    let mut out = Vec::with_capacity(size_hint(value));
    put(&mut out, value);
    out
}

fn size_hint(value: &Value) -> usize {
    match value {
        Value::Text(text) => 5 + text.len(),
        Value::Binary(data) => 5 + data.len(),
        Value::Array(array) => 64 + array.data.len(),
        Value::List(items) => 5 + items.iter().map(size_hint).sum::<usize>(),
        Value::Map(map) => 5 + map.iter().map(|(key, value)| 5 + key.len() + size_hint(value)).sum::<usize>(),
        _ => 9,
    }
}

/// Lengths beyond msgpack's 32 bits cannot be sent by any transport we have; they are cut, not wrapped.
fn length(n: usize) -> u32 {
    u32::try_from(n).unwrap_or(u32::MAX)
}

// Writing to a vector cannot fail, so the results below say nothing.

fn put(out: &mut Vec<u8>, value: &Value) {
    match value {
        Value::Nil => drop(write::write_nil(out)),
        Value::Bool(x) => drop(write::write_bool(out, *x)),
        Value::Int(x) => match (i64::try_from(*x), u64::try_from(*x)) {
            (Ok(x), _) => drop(write::write_sint(out, x)),
            (_, Ok(x)) => drop(write::write_uint(out, x)),
            _ => drop(write::write_f64(out, *x as f64)),
        },
        Value::Float(x) => drop(write::write_f64(out, *x)),
        Value::Text(text) => drop(write::write_str(out, text)),
        Value::Binary(data) => drop(write::write_bin(out, data)),
        Value::List(items) => {
            drop(write::write_array_len(out, length(items.len())));
            items.iter().for_each(|item| put(out, item));
        }
        Value::Map(map) => put_map(out, map),
        Value::Array(array) => put_array(out, array),
    }
}

fn put_map(out: &mut Vec<u8>, map: &Map) {
    drop(write::write_map_len(out, length(map.0.len())));
    for (key, value) in map.iter() {
        drop(write::write_str(out, key));
        put(out, value);
    }
}

fn put_array(out: &mut Vec<u8>, array: &NdArray) {
    drop(write::write_map_len(out, 4));
    drop(write::write_bin(out, b"__ndarray__"));
    drop(write::write_bool(out, true));
    drop(write::write_bin(out, b"data"));
    drop(write::write_bin(out, &array.data));
    drop(write::write_bin(out, b"dtype"));
    drop(write::write_str(out, &array.dtype.to_string()));
    drop(write::write_bin(out, b"shape"));
    drop(write::write_array_len(out, length(array.shape.len())));
    for &size in &array.shape {
        drop(write::write_uint(out, size as u64));
    }
}
