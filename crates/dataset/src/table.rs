//! Columns of parquet files.

use std::fs::File;
use std::path::Path;
use std::sync::Arc;

use parquet::file::reader::{FileReader, SerializedFileReader};
use parquet::record::{Field, Row};
use parquet::schema::types::Type;

use crate::{Error, Result};

/// Rows of a file with the columns that were asked for, in that order. A column that the file lacks is null.
pub(crate) struct Table {
    /// `[rows][columns]`.
    rows: Vec<Vec<Field>>,
}

impl Table {
    /// Reads columns of the rows that `keep` wants, by their position in the file.
    pub fn read(path: &Path, columns: &[&str], keep: impl Fn(usize) -> bool) -> Result<Self> {
        let wrong = |e: parquet::errors::ParquetError| match e.to_string() {
            text if text.contains("feature") || text.contains("ompression") => {
                Error::file(path, format!("{text}; files compressed by snappy or not at all can be read"))
            }
            text => Error::file(path, text),
        };
        let file = File::open(path).map_err(|e| Error::file(path, e))?;
        let reader = SerializedFileReader::new(file).map_err(wrong)?;
        let schema = reader.metadata().file_metadata().schema();
        let fields: Vec<Arc<Type>> =
            schema.get_fields().iter().filter(|field| columns.contains(&field.name())).cloned().collect();
        let projection =
            Type::group_type_builder(schema.name()).with_fields(fields).build().map_err(wrong)?;
        let mut rows = Vec::new();
        for (i, row) in reader.get_row_iter(Some(projection)).map_err(wrong)?.enumerate() {
            let row = row.map_err(wrong)?;
            if keep(i) {
                rows.push(pick(row, columns));
            }
        }
        Ok(Self { rows })
    }

    /// How many rows there are.
    pub fn len(&self) -> usize {
        self.rows.len()
    }

    /// A value.
    pub fn at(&self, row: usize, column: usize) -> &Field {
        &self.rows[row][column]
    }
}

fn pick(row: Row, columns: &[&str]) -> Vec<Field> {
    let mut picked = vec![Field::Null; columns.len()];
    for (name, value) in row.into_columns() {
        if let Some(at) = columns.iter().position(|column| *column == name) {
            picked[at] = value;
        }
    }
    picked
}

/// Names of all columns of a file.
pub(crate) fn columns(path: &Path) -> Result<Vec<String>> {
    let file = File::open(path).map_err(|e| Error::file(path, e))?;
    let reader = SerializedFileReader::new(file).map_err(|e| Error::file(path, e))?;
    let schema = reader.metadata().file_metadata().schema();
    Ok(schema.get_fields().iter().map(|field| field.name().to_owned()).collect())
}

/// A number of any type.
pub(crate) fn number(field: &Field) -> Option<f64> {
    Some(match field {
        Field::Bool(x) => f64::from(u8::from(*x)),
        Field::Byte(x) => f64::from(*x),
        Field::Short(x) => f64::from(*x),
        Field::Int(x) => f64::from(*x),
        Field::Long(x) => *x as f64,
        Field::UByte(x) => f64::from(*x),
        Field::UShort(x) => f64::from(*x),
        Field::UInt(x) => f64::from(*x),
        Field::ULong(x) => *x as f64,
        Field::Float16(x) => f64::from(*x),
        Field::Float(x) => f64::from(*x),
        Field::Double(x) => *x,
        _ => return None,
    })
}

/// A count or an index.
pub(crate) fn index(field: &Field) -> Option<usize> {
    number(field).filter(|x| *x >= 0.0 && x.fract() == 0.0 && *x < 9e15).map(|x| x as usize)
}

/// A vector; a number is one of length 1.
pub(crate) fn vector(field: &Field) -> Option<Vec<f64>> {
    match field {
        Field::ListInternal(list) => list.elements().iter().map(number).collect(),
        other => number(other).map(|x| vec![x]),
    }
}

/// A string.
pub(crate) fn text(field: &Field) -> Option<&str> {
    match field {
        Field::Str(text) => Some(text),
        Field::Bytes(bytes) => std::str::from_utf8(bytes.data()).ok(),
        _ => None,
    }
}

/// The encoded bytes of an image, which is stored as `{bytes, path}`.
pub(crate) fn image_bytes(field: &Field) -> Option<&[u8]> {
    let Field::Group(row) = field else { return None };
    row.get_column_iter().find_map(|(name, value)| match (name.as_str(), value) {
        ("bytes", Field::Bytes(bytes)) => Some(bytes.data()),
        _ => None,
    })
}
