//! From a Python dictionary to the message that openpi's clients send, without copying arrays.
//!
//! What the keys mean, and which shapes and types are taken, is decided where the server decides it
//! ([`Translator`](pi0_server::Translator)), so that a robot may move its policy from one to the other.

use bytes::Bytes;
use numpy::{PyUntypedArray, PyUntypedArrayMethods};
use pi0_server::{Dtype, Limits, Map, NdArray, Value};
use pyo3::exceptions::PyException;
use pyo3::prelude::*;
use pyo3::types::{
    PyBool, PyByteArray, PyBytes, PyDict, PyFloat, PyInt, PyList, PyMapping, PyMemoryView, PyString, PyTuple,
};

use crate::arrays::numpy;
use crate::errors::Class;

/// The samples of an array, for as long as somebody reads them.
struct Samples {
    /// Keeps the memory alive.
    _owner: Py<PyUntypedArray>,
    start: *const u8,
    len: usize,
}

// SAFETY: the memory belongs to an array that `_owner` keeps alive, and is only read. (A thread that writes into an
// image while it is inferred from gets a torn image, as it does from numpy's own functions, which also give up the GIL.)
unsafe impl Send for Samples {}

impl AsRef<[u8]> for Samples {
    fn as_ref(&self) -> &[u8] {
        // SAFETY: numpy says that the array is contiguous, so its `len` bytes begin at `start`.
        unsafe { std::slice::from_raw_parts(self.start, self.len) }
    }
}

/// Reads an observation.
///
/// # Errors
/// An `ObservationError` that names the key.
pub fn message(observation: &Bound<'_, PyAny>) -> PyResult<Value> {
    let py = observation.py();
    if observation.cast::<PyMapping>().is_err() {
        let got = observation.get_type().name()?;
        return Err(Class::Observation.raise(py, format!("an observation is a dictionary, got {got}")));
    }
    let limits = Limits::default();
    let mut left = limits.values;
    value(observation, &mut Vec::new(), limits.depth, &mut left)
}

fn refuse(py: Python<'_>, path: &[String], why: &str) -> PyErr {
    let text = match path {
        [] => format!("the observation {why}"),
        path => format!("`{}` {why}", path.join("` in `")),
    };
    Class::Observation.raise(py, text)
}

fn value(x: &Bound<'_, PyAny>, path: &mut Vec<String>, depth: usize, left: &mut usize) -> PyResult<Value> {
    let py = x.py();
    *left = left.checked_sub(1).ok_or_else(|| refuse(py, path, "holds too many values"))?;
    if x.is_none() {
        return Ok(Value::Nil);
    }
    if let Ok(x) = x.cast::<PyBool>() {
        return Ok(Value::Bool(x.is_true()));
    }
    if let Ok(x) = x.cast::<PyString>() {
        // Lone surrogates have no UTF-8.
        return match x.to_cow() {
            Ok(text) => Ok(Value::Text(text.into_owned())),
            Err(_) => Err(refuse(py, path, "is a string that is no valid text")),
        };
    }
    if let Ok(array) = x.cast::<PyUntypedArray>() {
        return nd_array(array, path);
    }
    if x.is_exact_instance_of::<PyInt>() {
        let small = x.extract::<i64>().map(i128::from).or_else(|_| x.extract::<u64>().map(i128::from));
        return small.map(Value::Int).map_err(|_| refuse(py, path, "is an integer of more than 64 bits"));
    }
    if x.is_exact_instance_of::<PyFloat>() {
        return Ok(Value::Float(x.extract()?));
    }
    if let Ok(x) = x.cast::<PyBytes>() {
        return Ok(Value::Binary(Bytes::copy_from_slice(x.as_bytes())));
    }
    if x.cast::<PyByteArray>().is_ok() || x.cast::<PyMemoryView>().is_ok() {
        let copy = py.get_type::<PyBytes>().call1((x,))?;
        return Ok(Value::Binary(Bytes::copy_from_slice(copy.cast::<PyBytes>()?.as_bytes())));
    }
    let deeper = || depth.checked_sub(1).ok_or_else(|| refuse(py, path, "is nested too deep"));
    if x.cast::<PyDict>().is_ok()
        || x.cast::<PyMapping>().is_ok() && x.cast::<PyList>().is_err() && x.cast::<PyTuple>().is_err()
    {
        let depth = deeper()?;
        let mut entries = Vec::new();
        for item in x.cast::<PyMapping>()?.items()?.iter() {
            let (key, item): (Bound<'_, PyAny>, Bound<'_, PyAny>) = item.extract()?;
            let key = match (key.cast::<PyString>(), key.cast::<PyBytes>()) {
                // Not by `str`, where a signal's handler may run whose `KeyboardInterrupt` would be lost.
                (Ok(key), _) => {
                    let text =
                        key.to_cow().map_err(|_| refuse(py, path, "has a key that is no valid text"))?;
                    text.into_owned()
                }
                (_, Ok(key)) => String::from_utf8_lossy(key.as_bytes()).into_owned(),
                _ => {
                    return Err(refuse(
                        py,
                        path,
                        &format!("has a key of type {}, wanted str", key.get_type().name()?),
                    ));
                }
            };
            path.push(key.clone());
            entries.push((key, value(&item, path, depth, left)?));
            path.pop();
        }
        return Ok(Value::Map(Map(entries)));
    }
    if x.cast::<PyList>().is_ok() || x.cast::<PyTuple>().is_ok() {
        let depth = deeper()?;
        let items = x.try_iter()?.map(|item| value(&item?, path, depth, left));
        return Ok(Value::List(items.collect::<PyResult<_>>()?));
    }
    // numpy's scalars, torch's and JAX's arrays.
    let mut is_array = false;
    for name in ["__array__", "__array_interface__", "__dlpack__"] {
        is_array |= x
            .hasattr(name)
            .or_else(|e| if e.is_instance_of::<PyException>(py) { Ok(false) } else { Err(e) })?;
    }
    if !is_array {
        let got = x.get_type().name()?;
        return Err(refuse(py, path, &format!("is of type {got}, which an observation cannot hold")));
    }
    let made = numpy(py, "asarray")?.call1((x,));
    let made = made.or_else(|e| match e.is_instance_of::<PyException>(py) && x.hasattr("__dlpack__")? {
        true => numpy(py, "from_dlpack")?.call1((x,)),
        false => Err(e),
    });
    match made {
        Ok(array) => nd_array(array.cast::<PyUntypedArray>()?, path),
        // Ctrl-C is no fault of the array.
        Err(e) if !e.is_instance_of::<PyException>(py) => Err(e),
        Err(e) => Err(refuse(py, path, &format!("cannot be read as an array: {}", e.value(py)))),
    }
}

fn nd_array(array: &Bound<'_, PyUntypedArray>, path: &[String]) -> PyResult<Value> {
    let py = array.py();
    let spelled: String = array.dtype().as_any().getattr("str")?.extract()?;
    let dtype = Dtype::parse(&spelled)
        .map_err(|why| refuse(py, path, &format!("is an array of another kind: {why}")))?;
    let contiguous = match array.is_c_contiguous() {
        true => array.clone(),
        // Before anything is copied: numpy itself would try.
        false => numpy(py, "ascontiguousarray")?
            .call1((array,))
            .map_err(|e| refuse(py, path, &format!("cannot be copied: {}", e.value(py))))?
            .cast_into::<PyUntypedArray>()
            .map_err(PyErr::from)?,
    };
    let shape = array.shape().to_vec();
    let len = shape.iter().product::<usize>() * dtype.size;
    // SAFETY: the pointer is to a live array object; its field is only read.
    let start = unsafe { (*contiguous.as_array_ptr()).fields.data }.cast::<u8>().cast_const();
    let data = match len {
        0 => Bytes::new(),
        _ => Bytes::from_owner(Samples { _owner: contiguous.unbind(), start, len }),
    };
    NdArray::new(dtype, shape, data).map(Value::Array).map_err(|why| refuse(py, path, &why))
}
