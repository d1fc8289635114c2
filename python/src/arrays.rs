//! Numbers in and out of Python.

use numpy::{PyArray1, PyArrayDyn, PyArrayMethods, PyReadonlyArrayDyn};
use pyo3::prelude::*;
use pyo3::sync::PyOnceLock;

use crate::errors::Class;

/// A function of numpy.
pub fn numpy<'py>(py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyAny>> {
    static NUMPY: PyOnceLock<Py<PyModule>> = PyOnceLock::new();
    NUMPY.get_or_try_init(py, || Ok::<_, PyErr>(py.import("numpy")?.unbind()))?.bind(py).getattr(name)
}

/// Shape and values of anything that numpy reads as real numbers: arrays, lists, torch's tensors on the host.
///
/// # Errors
/// An `InputError` that names `what`.
pub fn floats(what: &str, value: &Bound<'_, PyAny>) -> PyResult<(Vec<usize>, Vec<f32>)> {
    let py = value.py();
    let refuse =
        |e: PyErr| Class::Input.raise(py, format!("{what} cannot be read as numbers: {}", e.value(py)));
    let array = numpy(py, "asarray")?.call1((value,)).map_err(refuse)?;
    let kind: String = array.getattr("dtype")?.getattr("kind")?.extract()?;
    if !["f", "i", "u", "b"].contains(&kind.as_str()) {
        let dtype = array.getattr("dtype")?.str()?;
        return Err(Class::Input.raise(py, format!("{what} has dtype {dtype}, wanted real numbers")));
    }
    let array = numpy(py, "ascontiguousarray")?.call1((array, "f4")).map_err(refuse)?;
    let array: PyReadonlyArrayDyn<'_, f32> = array.extract()?;
    let view = array.as_array();
    let values = match view.as_slice() {
        Some(values) => values.to_vec(),
        None => view.iter().copied().collect(),
    };
    Ok((view.shape().to_vec(), values))
}

/// An array that takes over the values.
pub fn array<'py, T: numpy::Element>(
    py: Python<'py>,
    shape: &[usize],
    values: Vec<T>,
) -> PyResult<Bound<'py, PyArrayDyn<T>>> {
    PyArray1::from_vec(py, values).reshape(shape)
}
