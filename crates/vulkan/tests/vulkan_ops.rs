//! Every operation against the scalar reference, at sizes around those of the kernels' tiles.

mod common;

use common::{BF16, F32, Numbers, Work, agree, open, open_all, put};
use pi0_device::{
    Activation, Attention, Dense, Device, HostTensor, KeyValue, Keys, Largest, Modulation, Norm, NormKind,
    Qkv, Result, Span, TensorSource, WeightSource,
};
use pi0_vulkan::Format;

/// Rows around the tile of 64, and those of an inference.
const ROWS: [usize; 7] = [1, 7, 51, 53, 63, 64, 65];

struct Layer<'a> {
    x: HostTensor,
    norm: Option<&'a WeightSource>,
    weight: &'a WeightSource,
    activation: Option<Activation>,
    residual: Option<HostTensor>,
}

impl Work for Layer<'_> {
    fn run<D: Device>(&self, d: &D) -> Result<Vec<D::Tensor>> {
        let (x, weight) = (put(d, &self.x), d.prepare(self.weight)?);
        let norm = self.norm.map(|n| d.prepare(n)).transpose()?;
        let norm = norm.as_ref().map(|w| match self.norm {
            Some(WeightSource::Norm { kind: NormKind::Layer, .. }) => Norm::Layer(w),
            _ => Norm::Rms(w),
        });
        let residual = self.residual.as_ref().map(|r| put(d, r));
        let call = Dense {
            norm,
            activation: self.activation,
            residual: residual.as_ref(),
            ..Dense::new(&x, &weight)
        };
        Ok(vec![pi0_device::dense(d, &call)?])
    }
}

#[test]
fn products_of_all_sizes_and_formats() {
    for (format, (device, bound)) in [Format::F32, Format::Bf16, Format::Int8]
        .into_iter()
        .flat_map(|format| open_all(format).into_iter().map(move |d| (format, d)))
    {
        // The reference's weights are not rounded to bf16.
        let bound = if format == Format::Bf16 { BF16 } else { bound };
        let mut n = Numbers(1);
        for (i, &rows) in ROWS.iter().enumerate() {
            for (inputs, outputs) in [(64, vec![64]), (65, vec![15, 18]), (33, vec![127, 1]), (200, vec![65])]
            {
                let weight = n.linear(&outputs, inputs, i % 2 == 0);
                let x = n.host(rows, inputs);
                let layer = Layer { x, norm: None, weight: &weight, activation: None, residual: None };
                agree(
                    &format!("{rows} x {inputs} x {outputs:?} in {format:?} by {}", device.products()),
                    &device,
                    &layer,
                    bound,
                );
            }
        }
    }
}

#[test]
fn many_columns_take_wide_tiles() {
    for (device, bound) in open_all(Format::Stored) {
        let mut n = Numbers(3);
        let weight = half_linear(&mut n, pi0_device::Dtype::Bf16, 6145, 150);
        let norm = n.norm(NormKind::Rms, 147);
        for rows in [3, 64, 70] {
            let x = n.host(rows, 147);
            let layer = Layer { x, norm: Some(&norm), weight: &weight, activation: None, residual: None };
            agree(&format!("{rows} rows by {}", device.products()), &device, &layer, bound);
        }
    }
}

/// Rows far larger and smaller than f16 can hold, and weights too.
#[test]
fn what_f16_cannot_hold_is_scaled() {
    for (device, bound) in open_all(Format::Stored) {
        let mut n = Numbers(11);
        let weight = half_linear(&mut n, pi0_device::Dtype::Bf16, 70, 150);
        for scale in [1e-6f32, 3e5, 1e12] {
            let mut x = n.host(9, 147);
            x.data.iter_mut().for_each(|v| *v *= scale);
            let layer = Layer { x, norm: None, weight: &weight, activation: None, residual: None };
            let bound = common::Bound { max_abs: f64::INFINITY, ..bound };
            agree(&format!("values of {scale} by {}", device.products()), &device, &layer, bound);
        }
    }
}

/// A linear layer stored in 16 bits.
fn half_linear(n: &mut Numbers, dtype: pi0_device::Dtype, outputs: usize, inputs: usize) -> WeightSource {
    let bytes = n.values(outputs * inputs).into_iter().flat_map(|v| match dtype {
        pi0_device::Dtype::Bf16 => half::bf16::from_f32(v * 0.1).to_le_bytes(),
        _ => half::f16::from_f32(v * 0.1).to_le_bytes(),
    });
    let bytes = pi0_device::Bytes::Owned(std::sync::Arc::new(bytes.collect()));
    let weight = TensorSource::new("half", dtype, vec![outputs, inputs], bytes).unwrap();
    let part = |columns| pi0_device::LinearPart { weight: weight.clone(), bias: None, columns };
    WeightSource::Linear { parts: vec![part(Some(3..inputs))], exact: false }
}

#[test]
fn sixteen_bits_as_they_are_stored() {
    for (device, bound) in open_all(Format::Stored) {
        let mut n = Numbers(4);
        for dtype in [pi0_device::Dtype::Bf16, pi0_device::Dtype::F16] {
            for rows in ROWS {
                let weight = half_linear(&mut n, dtype, 77, 270);
                let x = n.host(rows, 267);
                let layer = Layer { x, norm: None, weight: &weight, activation: None, residual: None };
                agree(&format!("{rows} rows, {dtype:?} by {}", device.products()), &device, &layer, bound);
            }
        }
    }
}

#[test]
fn dense_in_every_form() {
    let Some(device) = open() else { return };
    every_form(&device, &[38, 66], &[None, Some(1), Some(2)], F32);
}

/// The same on matrices: weights of 8 bits there, so that their scales are seen too.
#[test]
fn dense_in_every_form_on_matrices() {
    for (device, bound) in open_all(Format::Int8).into_iter().skip(1) {
        every_form(&device, &[66], &[Some(2)], bound);
    }
}

fn every_form(
    device: &pi0_vulkan::Vulkan,
    all_rows: &[usize],
    repeats: &[Option<usize>],
    bound: common::Bound,
) {
    let mut n = Numbers(2);
    let inputs = 90;
    let norms = [None, Some(n.norm(NormKind::Layer, inputs)), Some(n.norm(NormKind::Rms, inputs))];
    let activations = [None, Some(Activation::Gelu), Some(Activation::Silu), Some(Activation::Geglu)];
    for &rows in all_rows {
        for norm in &norms {
            for activation in activations {
                for &repeat in repeats {
                    let outputs = [34, 34];
                    let width = if activation == Some(Activation::Geglu) { 34 } else { 68 };
                    let weight = n.linear(&outputs, inputs, rows == 38);
                    let residual = repeat.map(|r| n.host(rows / r, width));
                    let x = n.host(rows, inputs);
                    let layer = Layer { x, norm: norm.as_ref(), weight: &weight, activation, residual };
                    let what = format!("{rows} rows, norm {}, {activation:?}, {repeat:?}", norm.is_some());
                    agree(&format!("{what} by {}", device.products()), device, &layer, bound);
                }
            }
        }
    }
}

struct Projection {
    x: HostTensor,
    norm: WeightSource,
    weight: WeightSource,
    heads: [usize; 3],
    positions: Option<Vec<u32>>,
}

impl Work for Projection {
    fn run<D: Device>(&self, d: &D) -> Result<Vec<D::Tensor>> {
        let (x, norm, weight) = (put(d, &self.x), d.prepare(&self.norm)?, d.prepare(&self.weight)?);
        let [heads, kv_heads, head_dim] = self.heads;
        let norm = Norm::Rms(&norm);
        let positions = self.positions.as_deref();
        let call = Qkv { x: &x, norm, weight: &weight, heads, kv_heads, head_dim, positions, norm_tap: None };
        Ok(pi0_device::qkv(d, &call)?.to_vec())
    }
}

#[test]
fn projections_turn_their_heads() {
    // The reference's weights are not rounded to bf16.
    open_all(Format::Bf16).iter().for_each(|(device, _)| projections(device, BF16));
}

fn projections(device: &pi0_vulkan::Vulkan, bound: common::Bound) {
    let mut n = Numbers(5);
    for rows in [1, 51, 65] {
        for (heads, kv_heads, head_dim) in [(8, 1, 32), (4, 2, 14), (3, 3, 20), (2, 1, 128)] {
            for turned in [true, false] {
                let inputs = 60;
                let positions = turned.then(|| (0..rows as u32).map(|i| i * 13 % 700).collect());
                let work = Projection {
                    x: n.host(rows, inputs),
                    norm: n.norm(NormKind::Rms, inputs),
                    weight: n.linear(
                        &[heads * head_dim, kv_heads * head_dim, kv_heads * head_dim],
                        inputs,
                        false,
                    ),
                    heads: [heads, kv_heads, head_dim],
                    positions,
                };
                agree(&format!("{rows} rows, {heads} heads of {head_dim}, {turned}"), device, &work, bound);
            }
        }
    }
}

struct Attend {
    q: HostTensor,
    kv: Vec<(HostTensor, HostTensor)>,
    heads: [usize; 3],
    spans: Vec<Span>,
}

impl Work for Attend {
    fn run<D: Device>(&self, d: &D) -> Result<Vec<D::Tensor>> {
        let [heads, kv_heads, head_dim] = self.heads;
        let kv: Vec<_> = self.kv.iter().map(|(k, v)| (put(d, k), put(d, v))).collect();
        let kv: Vec<_> = kv.iter().map(|(k, v)| KeyValue { k, v }).collect();
        let scale = (head_dim as f32).powf(-0.5);
        let spec = Attention { heads, kv_heads, head_dim, scale, spans: &self.spans };
        Ok(vec![d.attention(&put(d, &self.q), &kv, &spec)?])
    }
}

/// The layers of π0.5's expert: adaptive norms before, gates behind.
struct Modulated {
    x: HostTensor,
    table: HostTensor,
    rows: Vec<u32>,
    up: WeightSource,
    down: WeightSource,
}

impl Work for Modulated {
    fn run<D: Device>(&self, d: &D) -> Result<Vec<D::Tensor>> {
        let (x, table) = (put(d, &self.x), put(d, &self.table));
        // A view of the table, as a layer takes its part of all layers' modulations.
        let table = d.slice_cols(&table, 5..5 + 3 * self.x.cols())?;
        let by = Modulation { table: &table, rows: &self.rows };
        let (up, down) = (d.prepare(&self.up)?, d.prepare(&self.down)?);
        let norm = Some(Norm::Ada(by));
        let activation = Some(Activation::Geglu);
        let h = pi0_device::dense(d, &Dense { norm, activation, ..Dense::new(&x, &up) })?;
        let residual = Some(&x);
        let y = pi0_device::dense(d, &Dense { gate: Some(by), residual, ..Dense::new(&h, &down) })?;
        Ok(vec![h, y, d.ada_rms_norm(&x, &by)?, d.gated_add(&x, &d.gelu(&x)?, &by)?])
    }
}

#[test]
fn modulated_layers() {
    let Some(device) = open() else { return };
    modulated(&device, &ROWS, F32);
    for (device, bound) in open_all(Format::Int8).into_iter().skip(1) {
        modulated(&device, &[51, 65], bound);
    }
}

fn modulated(device: &pi0_vulkan::Vulkan, rows: &[usize], bound: common::Bound) {
    let mut n = Numbers(10);
    for &rows in rows {
        let (width, inner) = (40, 27);
        let work = Modulated {
            x: n.host(rows, width),
            table: n.host(10, 3 * width + 8),
            rows: (0..rows as u32).map(|i| i / 3 % 10).collect(),
            up: n.linear(&[inner, inner], width, false),
            down: n.linear(&[width], inner, false),
        };
        agree(&format!("{rows} rows"), device, &work, bound);
    }
}

#[test]
fn attention_over_spans_and_parts() {
    open_all(Format::Stored).iter().for_each(|(device, bound)| attention(device, *bound));
}

fn attention(device: &pi0_vulkan::Vulkan, bound: common::Bound) {
    let mut n = Numbers(6);
    for (heads, kv_heads, head_dim) in
        [(8, 1, 32), (4, 2, 14), (3, 3, 72), (2, 1, 128), (8, 1, 256), (1, 1, 1)]
    {
        for parts in [1, 3, 5] {
            let keys = [70, 1, 33, 5, 64];
            let kv = (0..parts)
                .map(|i| (n.host(keys[i], kv_heads * head_dim), n.host(keys[i], kv_heads * head_dim)))
                .collect();
            let run = |part: usize, rows: std::ops::Range<usize>| Keys { part, rows };
            let last = parts - 1;
            let spans = vec![
                Span { queries: 0..1, keys: vec![run(0, 0..1)] },
                Span { queries: 1..20, keys: vec![run(0, 3..64), run(last, 0..keys[last]), run(0, 4..4)] },
                Span { queries: 20..53, keys: (0..parts).map(|i| run(i, 0..keys[i])).collect() },
            ];
            let q = n.host(53, heads * head_dim);
            let work = Attend { q, kv, heads: [heads, kv_heads, head_dim], spans };
            let what =
                format!("{heads}/{kv_heads} heads of {head_dim}, {parts} parts by {}", device.products());
            agree(&what, device, &work, bound);
        }
    }
}

/// Of few queries the keys are cut into parts, which a launch joins: around the numbers that decide how many, beside spans
/// that stay whole. A span's bits do not depend on the others.
#[test]
fn attention_of_few_rows_joins_parts_of_the_keys() {
    for (device, bound) in open_all(Format::Stored) {
        let mut n = Numbers(61);
        for (heads, kv_heads, head_dim) in [(8, 1, 32), (4, 2, 14), (3, 3, 72), (8, 1, 256)] {
            for (queries, keys) in
                [(1, 127), (1, 128), (7, 129), (51, 512), (51, 513), (50, 611), (64, 200), (65, 300)]
            {
                let heads = [heads, kv_heads, head_dim];
                let host = |n: &mut Numbers, rows| n.host(rows, kv_heads * head_dim);
                let kv = vec![
                    (host(&mut n, keys - 3), host(&mut n, keys - 3)),
                    (host(&mut n, 5), host(&mut n, 5)),
                ];
                let run = |part: usize, rows: std::ops::Range<usize>| Keys { part, rows };
                let cut = |first| Span {
                    queries: first..first + queries,
                    keys: vec![run(1, 1..4), run(0, 0..keys - 3)],
                };
                let q = n.host(queries + 3, heads[0] * head_dim);
                let (whole, few) = (|at| Span { queries: at..at + 3, keys: vec![run(0, 2..30)] }, cut(0));
                let spans = vec![few.clone(), whole(queries)];
                let work = Attend { q: q.clone(), kv: kv.clone(), heads, spans };
                let what = format!("{heads:?}, {queries} rows, {keys} keys by {}", device.products());
                agree(&what, &device, &work, bound);
                let rows = |q: HostTensor, spans: Vec<Span>| {
                    let work = Attend { q, kv: kv.clone(), heads, spans };
                    device.download(&work.run(&device).unwrap()[0]).unwrap().data
                };
                let (first, last) = q.data.split_at(queries * q.cols());
                let part = |data: &[f32]| HostTensor::new([data.len() / q.cols(), q.cols()], data.to_vec());
                let both = rows(q.clone(), vec![few.clone(), whole(queries)]);
                let alone = [rows(part(first), vec![few]), rows(part(last), vec![whole(0)])].concat();
                assert_eq!(both, alone, "{what}");
            }
        }
    }
}

#[test]
fn large_scores_do_not_overflow() {
    let Some(device) = open() else { return };
    let mut n = Numbers(7);
    let mut q = n.host(9, 32);
    q.data.iter_mut().for_each(|v| *v *= 300.0);
    let kv = vec![(n.host(40, 32), n.host(40, 32))];
    let spans = vec![Span { queries: 0..9, keys: vec![Keys { part: 0, rows: 0..40 }] }];
    let work = Attend { q, kv, heads: [1, 1, 32], spans };
    agree("scores of hundreds", &device, &work, common::Bound { relative_l2: 2e-5, ..F32 });
}

struct Small {
    x: HostTensor,
    y: HostTensor,
    table: WeightSource,
    norms: [WeightSource; 2],
    ids: Vec<u32>,
    positions: Vec<u32>,
}

impl Work for Small {
    fn run<D: Device>(&self, d: &D) -> Result<Vec<D::Tensor>> {
        let (x, y) = (put(d, &self.x), put(d, &self.y));
        let rows = self.x.rows();
        let layer = d.prepare(&self.norms[0])?;
        let rms = d.prepare(&self.norms[1])?;
        let view = d.slice_cols(&d.slice_rows(&x, 0..rows.div_ceil(2))?, 6..16)?;
        Ok(vec![
            d.embed(&d.prepare(&self.table)?, &self.ids, 1.5)?,
            d.layer_norm(&x, &layer)?,
            d.rms_norm(&x, &rms)?,
            d.rope(&x, &self.positions, 6)?,
            d.gelu(&x)?,
            d.silu(&x)?,
            d.geglu(&x)?,
            d.add(&x, &y)?,
            d.add_scaled(&x, &d.gelu(&x)?, -0.1)?,
            d.concat_rows(&[&x, &y, &x])?,
            d.slice_rows(&x, 0..0)?,
            // Operations of views.
            view.clone(),
            d.gelu(&view)?,
            d.geglu(&view)?,
            d.rope(&view, &self.positions[..rows.div_ceil(2)], 10)?,
            d.add(&d.slice_cols(&x, 1..11)?, &d.slice_cols(&y, 8..18)?)?,
            d.concat_rows(&[&view, &d.slice_cols(&y, 2..12)?])?,
        ])
    }
}

#[test]
fn everything_else_with_views() {
    let Some(device) = open() else { return };
    let mut n = Numbers(8);
    for rows in ROWS {
        let cols = 18;
        let work = Small {
            x: n.host(rows, cols),
            y: n.host(if rows % 3 == 0 { rows / 3 } else { 1 }, cols),
            table: WeightSource::Embedding(n.tensor(&[29, 7], 1.0)),
            norms: [n.norm(NormKind::Layer, cols), n.norm(NormKind::Rms, cols)],
            ids: (0..rows as u32).map(|i| i * 5 % 29).collect(),
            positions: (0..rows as u32).map(|i| i * i).collect(),
        };
        let empty = |got: &HostTensor| got.data.is_empty();
        let got = work.run(&device).unwrap();
        let want = work.run(&pi0_device::Reference).unwrap();
        for (i, (got, want)) in got.iter().zip(&want).enumerate() {
            let got = device.download(got).unwrap();
            if empty(want) {
                assert!(empty(&got));
                continue;
            }
            let agreement = pi0_device::compare(&got.data, &want.data);
            assert!(F32.holds(&agreement), "{rows} rows, result {i}: {agreement}");
        }
    }
}

#[test]
fn far_positions_bring_their_own_angles() {
    let Some(device) = open() else { return };
    struct Far(HostTensor);
    impl Work for Far {
        fn run<D: Device>(&self, d: &D) -> Result<Vec<D::Tensor>> {
            let x = put(d, &self.0);
            Ok(vec![d.rope(&x, &[0, 3000, 70_000], 8)?, d.rope(&x, &[5, 32_767, 40_000], 8)?])
        }
    }
    agree("far positions", &device, &Far(Numbers(9).host(3, 16)), F32);
}

/// Rows stored where they lie: on a tape and after it ran, and never into what somebody else still holds.
struct Store {
    to: HostTensor,
    x: HostTensor,
    at: Vec<u32>,
    /// Downloads between the steps, so that they stand on tapes of their own.
    apart: bool,
}

impl Work for Store {
    fn run<D: Device>(&self, d: &D) -> Result<Vec<D::Tensor>> {
        let pause = |t: &D::Tensor| if self.apart { d.download(t).map(drop) } else { Ok(()) };
        let mut to = put(d, &self.to);
        pause(&to)?;
        // What read before the rows changed sees the old ones, what reads after it the new ones.
        let before = d.gelu(&to)?;
        let x = put(d, &self.x);
        pause(&before)?;
        pi0_device::store_rows(d, &mut to, &self.at, &x)?;
        let after = d.gelu(&to)?;
        pause(&after)?;
        // Held twice: the other one keeps its rows.
        let held = to.clone();
        let twice = d.add(&x, &x)?;
        pi0_device::store_rows(d, &mut to, &self.at, &twice)?;
        pause(&to)?;
        // A part of itself, as columns of a wider matrix.
        let wide = put(d, &self.to);
        let mut part = d.slice_cols(&wide, 0..self.to.cols())?;
        pi0_device::store_rows(d, &mut part, &self.at, &d.slice_rows(&wide, 0..self.at.len())?)?;
        pi0_device::store_rows(d, &mut part, &[], &d.slice_rows(&wide, 0..0)?)?;
        Ok(vec![before, after, held, to, part, wide])
    }
}

#[test]
fn rows_are_stored_in_their_places() {
    let Some(device) = open() else { return };
    let mut n = Numbers(12);
    for apart in [false, true] {
        for (rows, cols, at) in
            [(1, 1, vec![0]), (7, 33, vec![0, 3, 6]), (300, 65, (0..300).step_by(7).collect())]
        {
            let x = n.host(at.len(), cols);
            let work = Store { to: n.host(rows, cols), x, at, apart };
            agree(&format!("{rows} x {cols}, apart {apart}"), &device, &work, F32);
        }
    }
    let (mut to, x) = (put(&device, &n.host(4, 3)), put(&device, &n.host(2, 3)));
    for at in [&[0, 4][..], &[1, 0], &[1]] {
        assert!(device.store_rows(&mut to, at, &x).is_err(), "{at:?}");
    }
}

#[test]
fn the_largest_of_each_row_is_found_on_the_device() {
    let Some(device) = open() else { return };
    let mut n = Numbers(13);
    for (rows, cols) in [(1, 1), (3, 2), (1, 255), (2, 256), (5, 257), (2, 70_001)] {
        let x = n.host(rows, cols);
        let y = put(&device, &x);
        assert_eq!(device.largest(&y).unwrap(), Largest::of_rows(&x), "{rows} x {cols}");
        if cols > 2 {
            let part = device.slice_cols(&y, 1..cols).unwrap();
            let rows: Vec<_> = (0..rows).map(|i| Largest::of(&x.row(i)[1..])).collect();
            assert_eq!(device.largest(&part).unwrap(), rows);
        }
    }
    // Of equals the first, whichever threads see them.
    for places in [[700, 3], [3, 700], [256, 512], [0, 999]] {
        let mut row = vec![-1.0; 1000];
        places.iter().for_each(|&at| row[at] = 2.5);
        let found = device.largest(&put(&device, &HostTensor::new([1, 1000], row))).unwrap();
        assert_eq!(found, [Largest { at: places[0].min(places[1]), value: 2.5 }]);
    }
    for bad in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
        let mut x = n.host(2, 600);
        x.data[599] = bad;
        let found = device.largest(&put(&device, &x)).unwrap();
        assert!(found[0].value.is_nan() && found[1] == Largest::of(x.row(1)), "{bad}: {found:?}");
    }
    assert!(device.largest(&put(&device, &HostTensor::new([0, 5], vec![]))).unwrap().is_empty());
}
