//! Weights in the layout of the kernel that will read them.

use std::ops::Range;
use std::sync::Arc;

use pi0_device::{
    Bytes, Dtype, Held, LinearPart, MemoryMeter, NormKind, Order, Result, TensorSource, WeightSource,
};

use crate::kernels::{Kernel, Left, Packed, pack};
use crate::math::to_bf16;
use crate::memory::{Block, Shared};
use crate::pour::{self, Filling};
use crate::threads::Threads;
use crate::{Format, Isa};

/// A packed weight.
#[derive(Debug)]
pub enum Weight {
    #[doc(hidden)]
    Linear(Linear),
    #[doc(hidden)]
    Norm(NormWeight),
    /// Read row by row, from the mapped file where there is one.
    #[doc(hidden)]
    Embedding { table: TensorSource, _held: Option<Held> },
}

/// A normalization's weight in f32.
#[derive(Debug)]
pub struct NormWeight {
    pub(crate) kind: NormKind,
    /// For an RMS norm `1 + w`.
    pub(crate) weight: Vec<f32>,
    pub(crate) bias: Vec<f32>,
    pub(crate) eps: f32,
    pub(crate) _held: Held,
}

/// A packed linear layer.
///
/// Its output columns are cut into strips, each within one part. A right panel of the kernel has two strips:
/// neighbours, or, where there are two equal parts (gate and up), the same strip of both, so that one tile of sums
/// holds what GEGLU multiplies.
#[derive(Debug)]
pub struct Linear {
    pub(crate) kernel: &'static Kernel,
    pub(crate) inputs: usize,
    pub(crate) outputs: usize,
    pub(crate) strips: Vec<Strip>,
    /// Whether the two strips of a panel belong to two equal parts.
    pub(crate) paired: bool,
    /// `[panels][depth tiles][2 strips]…`, see [`crate::kernels`].
    pub(crate) right: Arc<Block>,
    /// Where other threads may still fill it.
    pub(crate) filling: Option<Arc<Filling>>,
    /// Of each column in strip order, zero where a strip is not full.
    pub(crate) bias: Vec<f32>,
    /// Whether any part has a bias.
    pub(crate) biased: bool,
    /// Integers only: scale of each column in strip order.
    pub(crate) scales: Vec<f32>,
    /// Unsigned left operands only: what their offset adds to each column's sum.
    pub(crate) offsets: Vec<i32>,
    pub(crate) _held: Held,
}

/// Up to a strip's width of neighbouring output columns.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Strip {
    /// First output column.
    pub(crate) column: usize,
    /// Number of columns; 0 for one that only fills a panel.
    pub(crate) count: usize,
}

impl Linear {
    /// Panels of two strips.
    pub(crate) fn panels(&self) -> usize {
        self.strips.len() / 2
    }

    /// Whether every panel holds neighbouring columns, as many as it can.
    pub(crate) fn whole_panels(&self) -> bool {
        let width = self.kernel.strip;
        self.strips.iter().enumerate().all(|(i, s)| (s.column, s.count) == (i * width, width))
    }

    /// Waits until it is filled.
    pub(crate) fn ready(&self) -> Result<()> {
        self.filling.as_ref().map_or(Ok(()), |filling| filling.wait())
    }

    /// Depth tiles of a panel.
    pub(crate) fn tiles(&self) -> usize {
        self.kernel.tiles(self.inputs)
    }
}

/// Where a strip's values come from.
#[derive(Clone, Copy)]
pub(crate) struct Origin<'a> {
    pub part: &'a LinearPart,
    /// First output row of the part.
    pub row: usize,
    pub strip: Strip,
}

impl<'a> Origin<'a> {
    /// The strips of all parts in the order of the layout.
    fn list(parts: &'a [LinearPart], width: usize) -> (Vec<Origin<'a>>, bool) {
        let mut of_parts = Vec::with_capacity(parts.len());
        let mut column = 0;
        for part in parts {
            let n = part.outputs();
            let strips: Vec<_> = (0..n)
                .step_by(width)
                .map(|row| Origin {
                    part,
                    row,
                    strip: Strip { column: column + row, count: width.min(n - row) },
                })
                .collect();
            of_parts.push(strips);
            column += n;
        }
        let paired = matches!(parts, [a, b] if a.outputs() == b.outputs());
        let mut all = match (paired, of_parts.as_slice()) {
            (true, [a, b]) => a.iter().zip(b).flat_map(|(&a, &b)| [a, b]).collect(),
            _ => of_parts.concat(),
        };
        if !all.len().is_multiple_of(2)
            && let Some(&last) = all.last()
        {
            all.push(Origin { strip: Strip { column: 0, count: 0 }, ..last });
        }
        (all, paired)
    }

    /// The stored bytes of row `c` of the strip.
    fn bytes(&self, c: usize) -> &'a [u8] {
        let (w, size) = (&self.part.weight, self.part.weight.dtype.size());
        let start = (self.row + c) * w.cols() + self.part.columns.as_ref().map_or(0, |r| r.start);
        &w.bytes()[start * size..(start + self.part.inputs()) * size]
    }
}

/// A strip of a matrix whose columns lie together: for each input, the values of the strip's columns in a row.
struct Across<'a> {
    bytes: &'a [u8],
    /// Place of the strip's first value in the first part of the inputs, in bytes.
    start: usize,
    /// Bytes of the strip's values of one input.
    width: usize,
    /// Bytes from one input to the next.
    stride: usize,
    /// Inputs of one part, and bytes from one part to the next.
    inputs: usize,
    part: usize,
    /// The inputs of the matrix that the layer uses.
    first: usize,
}

impl<'a> Across<'a> {
    /// None if the columns of `origin` do not lie together.
    fn of(origin: &Origin<'a>) -> Option<Self> {
        let w = &origin.part.weight;
        let Order::Columns { splits, groups } = w.order() else { return None };
        let size = w.dtype.size();
        let (inputs, outputs) = (w.cols() / splits, w.rows() / groups);
        let (group, column, count) = (origin.row / outputs, origin.row % outputs, origin.strip.count);
        (column + count <= outputs).then(|| Self {
            bytes: w.bytes(),
            start: (group * inputs * outputs + column) * size,
            width: count * size,
            stride: outputs * size,
            inputs,
            part: groups * inputs * outputs * size,
            first: origin.part.columns.as_ref().map_or(0, |c| c.start),
        })
    }

    /// The strip's values of one of the layer's inputs.
    fn row(&self, input: usize) -> &'a [u8] {
        let input = self.first + input;
        let at = self.start + input / self.inputs * self.part + input % self.inputs * self.stride;
        &self.bytes[at..at + self.width]
    }

    /// Those of up to 64 inputs, as many of `rows` as `span` is long.
    fn rows<'r>(&self, span: Range<usize>, rows: &'r mut [&'a [u8]; 64]) -> &'r [&'a [u8]] {
        let (first, count) = (self.first + span.start, span.len());
        if first / self.inputs == (first + count - 1) / self.inputs {
            let mut at = self.start + first / self.inputs * self.part + first % self.inputs * self.stride;
            for row in &mut rows[..count] {
                *row = &self.bytes[at..at + self.width];
                at += self.stride;
            }
        } else {
            rows.iter_mut().zip(span).for_each(|(row, input)| *row = self.row(input));
        }
        &rows[..count]
    }
}

impl Across<'_> {
    /// The strip's values of up to 64 inputs in f32, where they lie if memory allows.
    fn floats(&self, span: Range<usize>, dtype: Dtype, then: impl FnOnce(&[&[f32]])) {
        let mut rows: [&[u8]; 64] = [&[]; 64];
        with_floats(self.rows(span, &mut rows), dtype, then);
    }
}

/// Strips that are packed together where columns lie together: their values of one input fill whole cache lines.
const TOGETHER: usize = 16;

/// Packs a source whose shapes were checked, on all threads, and gives its pages back; or leaves that to the threads that
/// make its bytes. `meter` counts what was packed.
pub(crate) fn pack(
    source: &WeightSource,
    format: Format,
    isa: Isa,
    threads: &Threads,
    meter: &MemoryMeter,
) -> Result<Weight> {
    if let WeightSource::Linear { parts, exact } = source {
        let kernel = Kernel::of(isa, packed(parts, *exact, format));
        if pour::possible(parts, kernel) {
            return pour_linear(parts, isa, kernel, meter).map(Weight::Linear);
        }
    }
    source.check()?;
    let weight = match source {
        WeightSource::Linear { parts, exact } => {
            let kernel = Kernel::of(isa, packed(parts, *exact, format));
            Weight::Linear(pack_linear(parts, isa, kernel, threads, meter))
        }
        WeightSource::Norm { kind, weight, bias, eps } => {
            let one = if *kind == NormKind::Rms { 1.0 } else { 0.0 };
            Weight::Norm(NormWeight {
                kind: *kind,
                weight: weight.to_f32().iter().map(|w| w + one).collect(),
                bias: bias.as_ref().map_or_else(|| vec![0.0; weight.cols()], TensorSource::to_f32),
                eps: *eps,
                _held: meter.hold(2 * weight.cols() * size_of::<f32>()),
            })
        }
        WeightSource::Embedding(table) if table.is_mapped() => {
            Weight::Embedding { table: table.clone(), _held: None }
        }
        WeightSource::Embedding(table) => {
            let narrow = matches!(format, Format::Bf16 | Format::Int8) && table.dtype == Dtype::F32;
            let table = if narrow { narrowed(table, threads)? } else { table.clone() };
            Weight::Embedding { _held: Some(meter.hold(table.byte_count())), table }
        }
    };
    source.release();
    Ok(weight)
}

/// The format of a linear layer's weight.
fn packed(parts: &[LinearPart], exact: bool, format: Format) -> Packed {
    let stored = |dtype| parts.iter().all(|p| p.weight.dtype == dtype);
    match format {
        _ if exact => Packed::F32,
        Format::F32 => Packed::F32,
        Format::Bf16 => Packed::Bf16,
        Format::Int8 => Packed::Int8,
        Format::Stored if stored(Dtype::Bf16) => Packed::Bf16,
        Format::Stored => Packed::F32,
    }
}

/// A table that has to be kept in memory, in the format that the layers compute with.
fn narrowed(table: &TensorSource, threads: &Threads) -> Result<TensorSource> {
    const PART: usize = 1 << 16;
    let count = table.count();
    let mut bytes = vec![0u8; 2 * count];
    let at = Shared::new(bytes.as_mut_ptr());
    threads.run(count.div_ceil(PART), &|i| {
        let (start, n) = (i * PART, PART.min(count - i * PART));
        let mut values = vec![0.0f32; n];
        table.read(start, &mut values);
        // SAFETY: part `i` alone writes these bytes, inside the vector.
        let out = unsafe { std::slice::from_raw_parts_mut(at.get().add(2 * start), 2 * n) };
        for (out, x) in out.chunks_exact_mut(2).zip(values) {
            out.copy_from_slice(&to_bf16(x).to_le_bytes());
        }
    });
    TensorSource::new(table.name.clone(), Dtype::Bf16, table.shape.clone(), Bytes::Owned(bytes.into()))
}

/// A linear layer whose weight is zero, and where its strips come from.
fn empty_linear<'a>(
    parts: &'a [LinearPart],
    kernel: &'static Kernel,
    meter: &MemoryMeter,
) -> (Linear, Vec<Origin<'a>>) {
    let inputs = parts.first().map_or(0, LinearPart::inputs);
    let (origins, paired) = Origin::list(parts, kernel.strip);
    let columns = origins.len() * kernel.strip;
    let mut bias = vec![0.0; columns];
    for (o, bias) in origins.iter().zip(bias.chunks_exact_mut(kernel.strip)) {
        if let Some(b) = &o.part.bias {
            b.read(o.row, &mut bias[..o.strip.count]);
        }
    }
    let right = Arc::new(Block::new(origins.len() / 2 * kernel.tiles(inputs) * kernel.right_tile()));
    let scales = vec![0.0; if kernel.packed == Packed::Int8 { columns } else { 0 }];
    let offsets = vec![0; if kernel.left == Left::Uint8 { columns } else { 0 }];
    let bytes = right.len() + size_of::<f32>() * (bias.len() + scales.len() + offsets.len());
    let linear = Linear {
        kernel,
        inputs,
        outputs: parts.iter().map(LinearPart::outputs).sum(),
        strips: origins.iter().map(|o| o.strip).collect(),
        paired,
        right,
        filling: None,
        biased: parts.iter().any(|p| p.bias.is_some()),
        bias,
        scales,
        offsets,
        _held: meter.hold(bytes),
    };
    (linear, origins)
}

/// A linear layer that is filled by the threads that make its matrices' bytes.
fn pour_linear(
    parts: &[LinearPart],
    isa: Isa,
    kernel: &'static Kernel,
    meter: &MemoryMeter,
) -> Result<Linear> {
    parts.iter().filter_map(|p| p.bias.as_ref()).try_for_each(TensorSource::fetch)?;
    let (mut linear, origins) = empty_linear(parts, kernel, meter);
    linear.filling = Some(pour::start(parts, &origins, &linear, isa));
    Ok(linear)
}

fn pack_linear(
    parts: &[LinearPart],
    isa: Isa,
    kernel: &'static Kernel,
    threads: &Threads,
    meter: &MemoryMeter,
) -> Linear {
    let (mut linear, origins) = empty_linear(parts, kernel, meter);
    let (inputs, tiles) = (linear.inputs, linear.tiles());
    let (right, scales, offsets) = (&linear.right, &mut linear.scales, &mut linear.offsets);
    let (at_right, at_scales, at_offsets) =
        (Shared::new(right.as_ptr()), Shared::new(scales.as_mut_ptr()), Shared::new(offsets.as_mut_ptr()));
    let (scaled, offset) = (scales.len() / origins.len(), offsets.len() / origins.len());
    let (step, half) = (kernel.right_tile(), kernel.right_tile() / 2);
    // SAFETY: strip `i` alone writes this half of its panel's tiles, inside the block.
    let tile = |i: usize, t: usize| unsafe {
        let start = i / 2 * tiles * step + i % 2 * half;
        std::slice::from_raw_parts_mut(at_right.get().add(start + t * step), half)
    };
    // SAFETY: strip `i` alone writes its columns, inside the vectors.
    let columns = |i: usize| unsafe {
        (
            std::slice::from_raw_parts_mut(at_scales.get().add(i * scaled), scaled),
            std::slice::from_raw_parts_mut(at_offsets.get().add(i * offset), offset),
        )
    };
    let one = |i: usize| {
        let (scales, offsets) = columns(i);
        pack_strip(isa, &origins[i], kernel, |t| tile(i, t), scales, offsets);
    };
    let across: Option<Vec<Across<'_>>> = origins.iter().map(Across::of).collect();
    match across {
        Some(across) => threads.run(origins.len().div_ceil(TOGETHER), &|block| {
            let strips = block * TOGETHER..origins.len().min((block + 1) * TOGETHER);
            let spans = (0..tiles).map(|t| (t, t * kernel.depth()..inputs.min((t + 1) * kernel.depth())));
            if kernel.packed != Packed::Int8 {
                for (t, span) in spans {
                    for i in strips.clone() {
                        let dtype = origins[i].part.weight.dtype;
                        pack_across(isa, &across[i], dtype, kernel, span.clone(), tile(i, t));
                    }
                }
                return;
            }
            // Scales first; what was read for them is still in a cache when it is read again.
            let mut largest = [[0.0f32; 16]; TOGETHER];
            for (_, span) in spans.clone() {
                for (i, largest) in strips.clone().zip(&mut largest) {
                    let dtype = origins[i].part.weight.dtype;
                    across[i].floats(span.clone(), dtype, |rows| pack::largest_across(isa, rows, largest));
                }
            }
            let inverse = largest.map(|strip| strip.map(inverse));
            let mut sums = [[0i32; 16]; TOGETHER];
            for (t, span) in spans {
                for ((i, inverse), sums) in strips.clone().zip(&inverse).zip(&mut sums) {
                    let (dtype, out) = (origins[i].part.weight.dtype, tile(i, t));
                    across[i].floats(span.clone(), dtype, |rows| {
                        pack::int8_across(isa, kernel, rows, inverse, out, sums);
                    });
                }
            }
            for ((i, largest), sums) in strips.zip(largest).zip(sums) {
                let (scales, offsets) = columns(i);
                let count = origins[i].strip.count;
                scales[..count].iter_mut().zip(largest).for_each(|(scale, largest)| *scale = largest / 127.0);
                offsets.iter_mut().zip(sums).take(count).for_each(|(offset, sum)| *offset = 128 * sum);
            }
        }),
        None => threads.run(origins.len(), &one),
    }
    linear
}

fn pack_strip<'a>(
    isa: Isa,
    origin: &Origin<'_>,
    kernel: &Kernel,
    tile: impl Fn(usize) -> &'a mut [u8],
    scales: &mut [f32],
    offsets: &mut [i32],
) {
    let (inputs, depth, count) = (origin.part.inputs(), kernel.depth(), origin.strip.count);
    let weight = &origin.part.weight;
    if kernel.packed == Packed::Bf16 && weight.dtype == Dtype::Bf16 && weight.order() == Order::Rows {
        // The common case at full size needs no arithmetic: pairs of values change places.
        let rows: Vec<_> = (0..count).map(|c| origin.bytes(c)).collect();
        for t in 0..kernel.tiles(inputs) {
            let mut slices: [&[u8]; 16] = [&[]; 16];
            for (slice, row) in slices.iter_mut().zip(&rows) {
                *slice = &row[t * 2 * depth..row.len().min((t + 1) * 2 * depth)];
            }
            pack::copy_tile(isa, kernel, &slices[..count], tile(t));
        }
        return;
    }
    let mut values = vec![0.0; count * inputs];
    let across = Across::of(origin);
    if let Some(across) = &across {
        let mut row = [0.0; 16];
        for k in 0..inputs {
            weight.dtype.decode(across.row(k), &mut row);
            for (c, x) in row[..count].iter().enumerate() {
                values[c * inputs + k] = *x;
            }
        }
    }
    let mut inverses = [0.0f32; 16];
    for (c, row) in values.chunks_exact_mut(inputs).enumerate() {
        if across.is_none() {
            origin.part.read_row(origin.row + c, row);
        }
        if kernel.packed == Packed::Int8 {
            let largest = row.iter().fold(0.0f32, |m, x| if x.abs() > m { x.abs() } else { m });
            scales[c] = largest / 127.0;
            inverses[c] = inverse(largest);
        }
    }
    let rows: Vec<_> = values.chunks_exact(inputs).collect();
    for t in 0..kernel.tiles(inputs) {
        let span = t * depth..inputs.min((t + 1) * depth);
        let slices: Vec<_> = rows.iter().map(|r| &r[span.clone()]).collect();
        let out = tile(t);
        pack::right_tile(isa, kernel, &slices, &inverses, out);
        for (c, offset) in offsets.iter_mut().enumerate().take(count) {
            let column = (0..depth).map(|k| (k / 4 * kernel.strip + c) * 4 + k % 4);
            *offset += 128 * column.map(|at| i32::from(out[at] as i8)).sum::<i32>();
        }
    }
}

/// What values of a column are multiplied by to become integers, by their largest magnitude.
fn inverse(largest: f32) -> f32 {
    if largest > 1e-30 { 127.0 / largest } else { 0.0 }
}

/// One depth tile of a strip whose columns lie together; not for integers.
fn pack_across(
    isa: Isa,
    across: &Across<'_>,
    dtype: Dtype,
    kernel: &Kernel,
    span: Range<usize>,
    out: &mut [u8],
) {
    let mut rows: [&[u8]; 64] = [&[]; 64];
    pack_rows(isa, kernel, dtype, across.rows(span, &mut rows), out);
}

/// Rows of f32 where they lie, if memory and byte order allow.
pub(crate) fn as_floats<'a>(rows: &[&'a [u8]], floats: &mut [&'a [f32]]) -> bool {
    let one = |(row, floats): (&&'a [u8], &mut &'a [f32])| {
        bytemuck::try_cast_slice(row).map(|values| *floats = values).is_ok()
    };
    cfg!(target_endian = "little") && rows.iter().zip(floats).all(one)
}

/// Some inputs of a strip, each with the strip's values as stored, into the groups of a depth tile; not for integers.
pub(crate) fn pack_rows(isa: Isa, kernel: &Kernel, dtype: Dtype, rows: &[&[u8]], out: &mut [u8]) {
    if kernel.packed == Packed::Bf16 && dtype == Dtype::Bf16 {
        let mut pairs: [&[[u8; 2]]; 64] = [&[]; 64];
        pairs.iter_mut().zip(rows).for_each(|(pairs, row)| *pairs = row.as_chunks().0);
        return pack::copy_tile_across(isa, kernel, &pairs[..rows.len()], out);
    }
    with_floats(rows, dtype, |rows| pack::right_tile_across(isa, kernel, rows, out));
}

/// A strip's values in f32, where they lie if memory allows.
fn with_floats(rows: &[&[u8]], dtype: Dtype, then: impl FnOnce(&[&[f32]])) {
    let mut floats: [&[f32]; 64] = [&[]; 64];
    let mut values;
    if !(dtype == Dtype::F32 && as_floats(rows, &mut floats)) {
        values = [[0.0f32; 16]; 64];
        for ((floats, values), row) in floats.iter_mut().zip(&mut values).zip(rows) {
            dtype.decode(row, values);
            *floats = &values[..row.len() / dtype.size()];
        }
    }
    then(&floats[..rows.len()]);
}

#[cfg(test)]
mod tests {
    use pi0_device::{Buffer, Lazy, MakeBytes, Sink};

    use super::*;

    /// A matrix as rows and as columns that lie together, in any number of parts.
    fn both(out: usize, inputs: usize, splits: usize, groups: usize, dtype: Dtype) -> [TensorSource; 2] {
        let value = |o: usize, i: usize| (((o * 7919 + i * 104_729) % 4001) as f32 - 2000.0) / 61.0;
        let (ins, outs) = (inputs / splits, out / groups);
        let rows = (0..out).flat_map(|o| (0..inputs).map(move |i| (o, i)));
        let parts = (0..splits).flat_map(|s| (0..groups).map(move |g| (s, g)));
        let columns = parts.flat_map(|(s, g)| {
            (0..ins).flat_map(move |i| (0..outs).map(move |o| (g * outs + o, s * ins + i)))
        });
        let bytes = |places: Vec<(usize, usize)>| -> Vec<u8> {
            let one = |(o, i)| match dtype {
                Dtype::F32 => value(o, i).to_le_bytes().to_vec(),
                Dtype::Bf16 => to_bf16(value(o, i)).to_le_bytes().to_vec(),
                // Powers of two and values between them, by their upper bytes.
                Dtype::F16 => vec![0, 0x3C + ((o + i) % 4) as u8],
            };
            places.into_iter().flat_map(one).collect()
        };
        let source = |places| {
            TensorSource::new("w", dtype, vec![out, inputs], Bytes::Owned(bytes(places).into())).unwrap()
        };
        [
            source(rows.collect()),
            source(columns.collect()).in_order(Order::Columns { splits, groups }).unwrap(),
        ]
    }

    #[test]
    fn columns_that_lie_together_pack_to_the_same_bits() {
        let (threads, meter) = (Threads::new(2).unwrap(), MemoryMeter::default());
        let shapes = [
            (vec![(96, 130, 1, 1), (96, 130, 2, 1)], "two equal parts"),
            (vec![(64, 64, 2, 2), (32, 64, 1, 2), (32, 64, 4, 1)], "three parts"),
            (vec![(600, 70, 1, 3)], "many strips"),
            (vec![(24, 40, 1, 3)], "heads narrower than a strip"),
            (vec![(5, 3, 1, 1)], "less than a tile"),
        ];
        for (shapes, what) in shapes {
            for stored in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
                for isa in Isa::available() {
                    for packed in [Packed::F32, Packed::Bf16, Packed::Int8] {
                        let pick = |which: usize, range: Option<Range<usize>>| {
                            let parts: Vec<LinearPart> = shapes
                                .iter()
                                .map(|&(out, inputs, splits, groups)| LinearPart {
                                    weight: both(out, inputs, splits, groups, stored)[which].clone(),
                                    bias: None,
                                    columns: range.clone(),
                                })
                                .collect();
                            pack_linear(&parts, isa, Kernel::of(isa, packed), &threads, &meter)
                        };
                        for range in [None, Some(1..3)] {
                            let (rows, columns) = (pick(0, range.clone()), pick(1, range));
                            let bytes = |l: &Linear| l.right.values::<u8>(l.right.len()).to_vec();
                            assert!(
                                bytes(&rows) == bytes(&columns),
                                "{isa} {packed:?} of {stored:?}, {what}"
                            );
                            assert_eq!((rows.scales, rows.offsets), (columns.scales, columns.offsets));
                        }
                    }
                }
            }
        }
    }

    /// Hands its bytes over in pieces, the last first, on a thread of its own.
    #[derive(Debug)]
    struct Pieces {
        bytes: Vec<u8>,
        /// Bytes of one matrix, in which pieces begin anew.
        matrix: usize,
        fails: bool,
    }

    impl MakeBytes for Pieces {
        fn count(&self) -> usize {
            self.bytes.len()
        }

        fn make(&self) -> std::result::Result<Buffer, String> {
            Ok(self.bytes.clone().into())
        }

        fn pours(&self) -> bool {
            true
        }

        fn pour(&self, sink: Arc<dyn Sink>) {
            let (bytes, matrix, fails) = (self.bytes.clone(), self.matrix, self.fails);
            std::thread::spawn(move || {
                for (m, bytes) in bytes.chunks(matrix).enumerate().rev() {
                    for (i, piece) in bytes.chunks(sink.unit()).enumerate().rev() {
                        sink.take(m * matrix + i * sink.unit(), piece);
                    }
                }
                sink.end(if fails { Err("gone".into()) } else { Ok(()) });
            });
        }
    }

    #[test]
    fn what_is_poured_packs_to_the_same_bits() {
        let (threads, meter) = (Threads::new(2).unwrap(), MemoryMeter::default());
        for shapes in [
            vec![(96, 130, 1, 1), (96, 130, 1, 1)],
            vec![(64, 64, 2, 2), (32, 64, 1, 2), (32, 64, 4, 1)],
            vec![(4112, 96, 2, 1)],
            vec![(600, 71, 1, 1)],
            vec![(5, 3, 1, 1)],
        ] {
            for (stored, packed) in [Dtype::F32, Dtype::Bf16, Dtype::F16]
                .iter()
                .flat_map(|stored| [Packed::F32, Packed::Bf16].map(|packed| (*stored, packed)))
            {
                for isa in Isa::available() {
                    let kernel = Kernel::of(isa, packed);
                    let parts = |pieces: Option<bool>| -> Vec<LinearPart> {
                        let part = |&(out, inputs, splits, groups): &(usize, usize, usize, usize)| {
                            let weight = both(out, inputs, splits, groups, stored)[1].clone();
                            let matrix = weight.byte_count() / splits / groups;
                            let weight = match pieces {
                                None => weight,
                                Some(fails) => {
                                    let made = Pieces { bytes: weight.bytes().to_vec(), matrix, fails };
                                    let bytes = Bytes::Lazy(Lazy::new(Arc::new(made)));
                                    TensorSource::new("w", stored, weight.shape.clone(), bytes)
                                        .unwrap()
                                        .in_order(weight.order())
                                        .unwrap()
                                }
                            };
                            LinearPart { weight, bias: None, columns: None }
                        };
                        shapes.iter().map(part).collect()
                    };
                    let want = pack_linear(&parts(None), isa, kernel, &threads, &meter);
                    let poured = parts(Some(false));
                    assert!(pour::possible(&poured, kernel), "{isa} {packed:?} of {stored:?}, {shapes:?}");
                    let got = pour_linear(&poured, isa, kernel, &meter).unwrap();
                    got.ready().unwrap();
                    let bytes = |l: &Linear| l.right.values::<u8>(l.right.len()).to_vec();
                    assert!(bytes(&want) == bytes(&got), "{isa} {packed:?} of {stored:?}, {shapes:?}");
                    let failed = pour_linear(&parts(Some(true)), isa, kernel, &meter).unwrap();
                    assert!(failed.ready().unwrap_err().to_string().contains("gone"));
                }
            }
        }
        // Heads narrower than a strip are cut by it: such a matrix is made as a whole.
        let made = Pieces { bytes: vec![0; 24 * 40 * 4], matrix: 8 * 40 * 4, fails: false };
        let weight =
            TensorSource::new("w", Dtype::F32, vec![24, 40], Bytes::Lazy(Lazy::new(Arc::new(made)))).unwrap();
        let weight = weight.in_order(Order::Columns { splits: 1, groups: 3 }).unwrap();
        let narrow = [LinearPart { weight, bias: None, columns: None }];
        for isa in Isa::available() {
            let kernel = Kernel::of(isa, Packed::F32);
            assert_eq!(pour::possible(&narrow, kernel), kernel.strip <= 8, "{isa}");
        }
    }

    #[test]
    fn rounding_is_the_packing_of_bf16() {
        let odd = [f32::NAN, f32::INFINITY, -0.0, 1.0 + 1.0 / 256.0, 1.0 + 3.0 / 256.0, f32::MAX, -3.3e-5];
        let values: Vec<f32> = (0..1000).map(|i| i as f32 / 77.7 - 5.0).chain(odd).collect();
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let want: Vec<u8> = values.iter().flat_map(|&x| to_bf16(x).to_le_bytes()).collect();
        for isa in Isa::available() {
            let mut got = vec![0; want.len()];
            pack::rounding(isa)(&bytes, &mut got);
            assert!(got == want, "{isa}");
        }
    }
}
