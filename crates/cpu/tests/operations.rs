//! Every operation against the scalar reference, on every instruction set of this machine and in every format.

use std::convert::Infallible;
use std::sync::Arc;

use pi0_cpu::{Cpu, CpuOptions, Format, Isa};
use pi0_device::{
    Activation, Attention, Bound, Dense, Device, Dtype, HostTensor, KeyValue, Keys, LinearPart, Modulation,
    Norm, NormKind, Qkv, Reference, Span, TensorSource, WeightSource, compare, dense, qkv,
};
use pi0_model::cases::{self, Rounded};

const FORMATS: [Format; 3] = [Format::F32, Format::Bf16, Format::Int8];

/// What the results of `run` must reach in `format`, as close as that format's roundings allow.
fn bounds(
    format: Format,
    want: &[Arc<HostTensor>],
    run: impl Fn(&Rounded<Reference>) -> Vec<Arc<HostTensor>>,
) -> Vec<Bound> {
    let rounds = match format {
        Format::Stored | Format::F32 => cases::Format::F32,
        Format::Bf16 => cases::Format::Bf16,
        Format::Int8 => cases::Format::Int8,
    };
    let named = |all: &[Arc<HostTensor>]| -> cases::Outputs {
        all.iter().enumerate().map(|(i, t)| (i.to_string(), HostTensor::clone(t))).collect()
    };
    let draw = |seed| Ok::<_, Infallible>(named(&run(&Rounded::new(Reference, rounds, seed))));
    let Ok(bounds) = cases::bounds(&named(want), draw);
    bounds
}

/// Numbers around zero, the same each time: a product of uniform values has a long tail, as activations have.
struct Numbers(u64);

impl Numbers {
    fn uniform(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 40) as f32 / (1u64 << 23) as f32) - 1.0
    }

    fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.uniform() + self.uniform() * self.uniform()).collect()
    }

    fn tensor(&mut self, shape: &[usize], scale: f32) -> TensorSource {
        let data: Vec<_> = self.values(shape.iter().product()).iter().map(|x| x * scale).collect();
        TensorSource::from_f32("test", shape.to_vec(), &data).unwrap()
    }

    fn linear(&mut self, outputs: &[usize], inputs: usize, bias: bool) -> WeightSource {
        let scale = 1.0 / (inputs as f32).sqrt();
        let parts = outputs
            .iter()
            .map(|&n| LinearPart {
                weight: self.tensor(&[n, inputs], scale),
                bias: bias.then(|| self.tensor(&[n], 0.5)),
                columns: None,
            })
            .collect();
        WeightSource::Linear { parts, exact: false }
    }

    fn norm(&mut self, kind: NormKind, width: usize) -> WeightSource {
        let bias = (kind == NormKind::Layer).then(|| self.tensor(&[width], 0.3));
        WeightSource::Norm { kind, weight: self.tensor(&[width], 0.3), bias, eps: 1e-6 }
    }
}

fn devices(format: Format) -> Vec<Cpu> {
    let open =
        |isa, threads| Cpu::new(CpuOptions { isa: Some(isa), threads: Some(threads), format }).unwrap();
    Isa::available().into_iter().enumerate().map(|(i, isa)| open(isa, 1 + i % 3)).collect()
}

#[track_caller]
fn agree(what: &str, cpu: &Cpu, got: &pi0_cpu::Tensor, want: &<Reference as Device>::Tensor, bound: Bound) {
    let got = cpu.download(got).unwrap();
    assert_eq!(got.shape, want.shape, "{what} on {cpu:?}");
    let agreement = compare(&got.data, &want.data);
    assert!(bound.holds(&agreement), "{what} on {cpu:?}: {agreement}");
}

#[test]
fn linear_of_odd_sizes() {
    let mut n = Numbers(1);
    let shapes = [
        (1, 1, vec![1]),
        (2, 3, vec![5]),
        (7, 33, vec![17, 40]),
        (15, 64, vec![16, 16]),
        (17, 65, vec![15, 15]),
        (16, 128, vec![32]),
        (33, 100, vec![8, 3, 3]),
        (51, 256, vec![96]),
        (50, 1100, vec![31, 31]),
        (97, 72, vec![130]),
        (29, 2100, vec![64, 1]),
        // More row panels than are few, with depth in several steps, and in blocks.
        (165, 600, vec![70]),
        (150, 2100, vec![33]),
    ];
    fn run<D: Device>(d: &D, x: &[f32], inputs: usize, source: &WeightSource) -> D::Tensor {
        d.linear(&d.upload(x.len() / inputs, inputs, x).unwrap(), &d.prepare(source).unwrap()).unwrap()
    }
    for (rows, inputs, outputs) in shapes {
        let (source, x) = (n.linear(&outputs, inputs, rows % 2 == 1), n.values(rows * inputs));
        let want = [run(&Reference, &x, inputs, &source)];
        for format in FORMATS {
            let bound = bounds(format, &want, |d| vec![run(d, &x, inputs, &source)])[0];
            for d in devices(format) {
                let got = run(&d, &x, inputs, &source);
                agree(&format!("{rows} x {inputs} x {outputs:?}"), &d, &got, &want[0], bound);
            }
        }
    }
}

#[test]
fn dense_in_every_form() {
    let mut n = Numbers(2);
    let (rows, inputs) = (38, 90);
    let x = n.values(rows * inputs);
    let norms = [None, Some(NormKind::Layer), Some(NormKind::Rms)];
    let activations = [None, Some(Activation::Gelu), Some(Activation::Silu), Some(Activation::Geglu)];
    for (norm, activation) in norms.into_iter().flat_map(|n| activations.map(|a| (n, a))) {
        for (outputs, residual_rows) in
            [(vec![45, 45], 19), (vec![90], 38), (vec![64, 64], 0), (vec![20], 76)]
        {
            let source = n.linear(&outputs, inputs, norm.is_some());
            let norm_source = norm.map(|kind| n.norm(kind, inputs));
            let total: usize = outputs.iter().sum();
            let width = if activation == Some(Activation::Geglu) { total / 2 } else { total };
            let residual = n.values(residual_rows * width);
            fn run<D: Device>(
                d: &D,
                (x, rows, inputs): (&[f32], usize, usize),
                (source, norm): (&WeightSource, Option<&WeightSource>),
                activation: Option<Activation>,
                (residual, width): (&[f32], usize),
            ) -> D::Tensor {
                let (x, weight) = (d.upload(rows, inputs, x).unwrap(), d.prepare(source).unwrap());
                let residual = (!residual.is_empty())
                    .then(|| d.upload(residual.len() / width, width, residual).unwrap());
                let norm_weight = norm.map(|n| d.prepare(n).unwrap());
                let norm = norm.zip(norm_weight.as_ref()).map(|(source, w)| match source {
                    WeightSource::Norm { kind: NormKind::Layer, .. } => Norm::Layer(w),
                    _ => Norm::Rms(w),
                });
                let call = Dense { norm, activation, residual: residual.as_ref(), ..Dense::new(&x, &weight) };
                dense(d, &call).unwrap()
            }
            let (x, sources) = ((x.as_slice(), rows, inputs), (&source, norm_source.as_ref()));
            let want = [run(&Reference, x, sources, activation, (&residual, width))];
            for format in FORMATS {
                let draw = |d: &_| vec![run(d, x, sources, activation, (&residual, width))];
                let bound = bounds(format, &want, draw)[0];
                for d in devices(format) {
                    let got = run(&d, x, sources, activation, (&residual, width));
                    let what = format!("{norm:?} {activation:?} {outputs:?} residual {residual_rows}");
                    agree(&what, &d, &got, &want[0], bound);
                }
            }
        }
    }
}

#[test]
fn qkv_splits_and_rotates() {
    let mut n = Numbers(3);
    let geometries =
        [(8, 1, 32, false), (4, 2, 6, false), (3, 3, 18, true), (4, 1, 64, false), (2, 2, 64, true)];
    for (heads, kv_heads, head_dim, fused) in geometries {
        // More row panels than are few, where each head is several panels of columns.
        let (rows, inputs) = (if head_dim == 64 { 150 } else { 21 }, 70);
        let (q, kv) = (heads * head_dim, kv_heads * head_dim);
        let outputs = if fused { vec![q + 2 * kv] } else { vec![q, kv, kv] };
        let (source, norm) = (n.linear(&outputs, inputs, true), n.norm(NormKind::Rms, inputs));
        let x = n.values(rows * inputs);
        let positions: Vec<u32> = (0..rows as u32).map(|i| i * i * 97).collect();
        fn run<D: Device>(
            d: &D,
            x: (&[f32], usize, usize),
            (weight, norm): (&WeightSource, &WeightSource),
            (heads, kv_heads, head_dim): (usize, usize, usize),
            positions: Option<&[u32]>,
        ) -> [D::Tensor; 3] {
            let (weight, norm) = (d.prepare(weight).unwrap(), d.prepare(norm).unwrap());
            let x = d.upload(x.1, x.2, x.0).unwrap();
            let call = Qkv {
                x: &x,
                norm: Norm::Rms(&norm),
                weight: &weight,
                heads,
                kv_heads,
                head_dim,
                positions,
                norm_tap: None,
            };
            qkv(d, &call).unwrap()
        }
        for positions in [None, Some(positions.as_slice())] {
            let (x, sources, geometry) =
                ((x.as_slice(), rows, inputs), (&source, &norm), (heads, kv_heads, head_dim));
            let want = run(&Reference, x, sources, geometry, positions);
            for format in FORMATS {
                let bounds = bounds(format, &want, |d| run(d, x, sources, geometry, positions).into());
                for d in devices(format) {
                    let got = run(&d, x, sources, geometry, positions);
                    for (i, ((got, want), bound)) in got.iter().zip(&want).zip(&bounds).enumerate() {
                        agree(&format!("part {i} of {geometry:?}"), &d, got, want, *bound);
                    }
                }
            }
        }
    }
}

/// What the layers of π0.5 are called with.
struct Driven {
    rows: usize,
    inputs: usize,
    /// Of the layer's result.
    width: usize,
    geglu: bool,
    source: WeightSource,
    x: Vec<f32>,
    residual: Vec<f32>,
    /// Of the norm and of the gate.
    tables: [Vec<f32>; 2],
    picked: [Vec<u32>; 2],
}

impl Driven {
    const TIMES: usize = 7;

    fn new(n: &mut Numbers, rows: usize, inputs: usize, outputs: &[usize], geglu: bool) -> Self {
        let width = if geglu { outputs[0] } else { outputs.iter().sum() };
        // In no order, and not every row.
        let picked = |step: usize| (0..rows).map(|i| (i * i * step % Self::TIMES) as u32).collect();
        Self {
            rows,
            inputs,
            width,
            geglu,
            source: n.linear(outputs, inputs, rows.is_multiple_of(2)),
            x: n.values(rows * inputs),
            residual: n.values(rows * width),
            tables: [n.values(Self::TIMES * 3 * inputs), n.values(Self::TIMES * 3 * width)],
            picked: [picked(5), picked(3)],
        }
    }

    /// The layer fused, and its parts one after the other.
    fn dense<D: Device>(&self, d: &D) -> [Vec<f32>; 2] {
        let up = |cols: usize, data: &[f32]| d.upload(data.len() / cols, cols, data).unwrap();
        let (x, residual) = (up(self.inputs, &self.x), up(self.width, &self.residual));
        let tables = [up(3 * self.inputs, &self.tables[0]), up(3 * self.width, &self.tables[1])];
        let [norm, gate] = [0, 1].map(|i| Modulation { table: &tables[i], rows: &self.picked[i] });
        let weight = d.prepare(&self.source).unwrap();
        let activation = self.geglu.then_some(Activation::Geglu);
        let (norm, gate) = (Norm::Ada(norm), Some(gate));
        let call = Dense {
            norm: Some(norm),
            activation,
            gate,
            residual: Some(&residual),
            ..Dense::new(&x, &weight)
        };
        let fused = dense(d, &call).unwrap();
        let Norm::Ada(norm) = norm else { unreachable!() };
        let mut y = d.linear(&d.ada_rms_norm(&x, &norm).unwrap(), &weight).unwrap();
        if self.geglu {
            y = d.geglu(&y).unwrap();
        }
        let parts = d.gated_add(&residual, &y, &gate.unwrap()).unwrap();
        [fused, parts].map(|y| d.download(&y).unwrap().data)
    }

    /// The same of projections to q, k and v, one head each.
    fn qkv<D: Device>(&self, d: &D) -> [Vec<f32>; 2] {
        let x = d.upload(self.rows, self.inputs, &self.x).unwrap();
        let table = d.upload(Self::TIMES, 3 * self.inputs, &self.tables[0]).unwrap();
        let by = Modulation { table: &table, rows: &self.picked[0] };
        let (weight, norm, head_dim) = (d.prepare(&self.source).unwrap(), Norm::Ada(by), self.width / 3);
        let call = Qkv {
            x: &x,
            norm,
            weight: &weight,
            heads: 1,
            kv_heads: 1,
            head_dim,
            positions: None,
            norm_tap: None,
        };
        let fused = qkv(d, &call).unwrap();
        let y = d.linear(&d.ada_rms_norm(&x, &by).unwrap(), &weight).unwrap();
        let parts = [0, 1, 2].map(|i| d.slice_cols(&y, i * head_dim..(i + 1) * head_dim).unwrap());
        [fused, parts].map(|all| all.iter().flat_map(|y| d.download(y).unwrap().data).collect())
    }
}

/// π0.5's layers, with tails of panels, strips and depth. Fused, they give the same bits as their parts.
#[test]
fn adaptive_norms_and_gates() {
    let mut n = Numbers(9);
    let shapes = [
        (1, 40, vec![40], false),
        (23, 90, vec![90], false),
        (51, 64, vec![17, 17, 17], false),
        (70, 100, vec![33, 33], true),
        (150, 600, vec![32, 32, 32], false),
    ];
    for (rows, inputs, outputs, geglu) in shapes {
        let case = Driven::new(&mut n, rows, inputs, &outputs, geglu);
        let of_heads = outputs.len() == 3;
        fn both<D: Device>(case: &Driven, d: &D, of_heads: bool) -> Vec<[Vec<f32>; 2]> {
            [case.dense(d)].into_iter().chain(of_heads.then(|| case.qkv(d))).collect()
        }
        let fused = |results: Vec<[Vec<f32>; 2]>| -> Vec<_> {
            results.into_iter().map(|[fused, _]| Arc::new(HostTensor::new([fused.len()], fused))).collect()
        };
        let want = fused(both(&case, &Reference, of_heads));
        for format in FORMATS {
            let bounds = bounds(format, &want, |d| fused(both(&case, d, of_heads)));
            for d in devices(format) {
                for (i, [fused, parts]) in both(&case, &d, of_heads).iter().enumerate() {
                    let (agreement, what) = (compare(fused, &want[i].data), ["dense", "qkv"][i]);
                    assert!(bounds[i].holds(&agreement), "{what} {outputs:?} on {d:?}: {agreement}");
                    assert!(fused == parts, "{what} {outputs:?} on {d:?}: fused and in parts differ");
                }
            }
        }
    }
    // What does not fit is refused, and not composed.
    let d = Cpu::new(CpuOptions::default()).unwrap();
    let (x, w) = (d.upload(2, 8, &[0.5; 16]).unwrap(), d.prepare(&n.linear(&[8], 8, false)).unwrap());
    let table = d.upload(3, 24, &[0.1; 72]).unwrap();
    let with = |rows| Modulation { table: &table, rows };
    let gated = Dense { gate: Some(with(&[0, 2])), residual: Some(&x), ..Dense::new(&x, &w) };
    assert!(d.dense(&gated).is_ok());
    let one = d.slice_rows(&x, 0..1).unwrap();
    let wrong = [
        Dense { gate: Some(with(&[0, 3])), ..gated },
        Dense { gate: Some(with(&[0])), ..gated },
        Dense { residual: None, ..gated },
        Dense { residual: Some(&one), ..gated },
        Dense { norm: Some(Norm::Ada(with(&[3, 0]))), ..gated },
        Dense { norm: Some(Norm::Ada(Modulation { table: &x, rows: &[0, 0] })), ..gated },
    ];
    for (i, call) in wrong.iter().enumerate() {
        let refused = d.dense(call).unwrap_err();
        assert!(!refused.is_unsupported(), "{i}: {refused}");
    }
}

#[test]
fn attention_over_ragged_spans() {
    let mut n = Numbers(4);
    let keys = |part: usize, rows: std::ops::Range<usize>| Keys { part, rows };
    let span = |queries: std::ops::Range<usize>, keys: Vec<Keys>| Span { queries, keys };
    let cases = [
        // Heads, key heads, width, rows of each part, spans.
        (2, 2, 72, vec![64], vec![span(0..64, vec![keys(0, 0..64)])]),
        (8, 1, 32, vec![600], vec![span(0..40, vec![keys(0, 1..600)])]),
        (
            8,
            1,
            256,
            vec![300, 53],
            vec![
                span(0..1, vec![keys(0, 0..290), keys(1, 0..1)]),
                span(1..51, vec![keys(0, 0..290), keys(1, 0..51)]),
                span(51..53, vec![keys(0, 290..300), keys(1, 51..53)]),
            ],
        ),
        (
            4,
            2,
            8,
            vec![7, 9],
            vec![span(0..5, vec![keys(1, 3..9), keys(0, 2..3)]), span(5..6, vec![keys(0, 6..7)])],
        ),
        (3, 3, 5, vec![1030], vec![span(0..17, vec![keys(0, 5..1030)])]),
        (2, 1, 16, vec![257], vec![span(0..33, vec![keys(0, 0..257)])]),
    ];
    for (heads, kv_heads, head_dim, parts, spans) in cases {
        let rows = spans.last().unwrap().queries.end;
        let q: Vec<_> = n.values(rows * heads * head_dim).iter().map(|x| 2.0 * x).collect();
        let kv: Vec<_> = parts
            .iter()
            .map(|&rows| (rows, n.values(rows * kv_heads * head_dim), n.values(rows * kv_heads * head_dim)))
            .collect();
        let spec =
            Attention { heads, kv_heads, head_dim, scale: (head_dim as f32).powf(-0.5), spans: &spans };
        fn run<D: Device>(
            d: &D,
            q: &[f32],
            kv: &[(usize, Vec<f32>, Vec<f32>)],
            spec: &Attention<'_>,
        ) -> D::Tensor {
            let (width, kv_width) = (spec.heads * spec.head_dim, spec.kv_heads * spec.head_dim);
            let q = d.upload(q.len() / width, width, q).unwrap();
            let up = |rows: usize, x: &[f32]| d.upload(rows, kv_width, x).unwrap();
            let kv: Vec<_> = kv.iter().map(|(rows, k, v)| (up(*rows, k), up(*rows, v))).collect();
            let parts: Vec<_> = kv.iter().map(|(k, v)| KeyValue { k, v }).collect();
            d.attention(&q, &parts, spec).unwrap()
        }
        let want = [run(&Reference, &q, &kv, &spec)];
        for format in [Format::F32, Format::Bf16] {
            let bound = bounds(format, &want, |d| vec![run(d, &q, &kv, &spec)])[0];
            for d in devices(format) {
                let got = run(&d, &q, &kv, &spec);
                agree(&format!("attention {heads} {kv_heads} {head_dim}"), &d, &got, &want[0], bound);
            }
        }
    }
}

#[test]
fn the_rest() {
    let mut n = Numbers(5);
    let (rows, cols) = (12, 70);
    let (x, y) = (n.values(rows * cols), n.values(4 * cols));
    let norms = [n.norm(NormKind::Layer, cols), n.norm(NormKind::Rms, cols)];
    let table = WeightSource::Embedding(n.tensor(&[9, 11], 1.0));
    let positions: Vec<u32> = (0..rows as u32).map(|i| i * 1500).collect();
    fn run<D: Device>(
        d: &D,
        x: &[f32],
        y: &[f32],
        norms: &[WeightSource; 2],
        table: &WeightSource,
        positions: &[u32],
    ) -> Vec<D::Tensor> {
        let (x, y) = (d.upload(12, 70, x).unwrap(), d.upload(4, 70, y).unwrap());
        let [layer, rms] = [0, 1].map(|i| d.prepare(&norms[i]).unwrap());
        let view = d.slice_rows(&d.slice_cols(&x, 3..50).unwrap(), 2..9).unwrap();
        vec![
            d.layer_norm(&x, &layer).unwrap(),
            d.rms_norm(&x, &rms).unwrap(),
            d.rope(&x, positions, 14).unwrap(),
            d.gelu(&x).unwrap(),
            d.silu(&view).unwrap(),
            d.geglu(&x).unwrap(),
            d.add(&x, &y).unwrap(),
            d.add_scaled(&x, &x, -0.3).unwrap(),
            d.concat_rows(&[&y, &x, &d.slice_rows(&y, 1..1).unwrap(), &y]).unwrap(),
            d.slice_rows(&x, 3..12).unwrap(),
            d.embed(&d.prepare(table).unwrap(), &[8, 0, 3, 3], 1.5).unwrap(),
            view,
        ]
    }
    let want = run(&Reference, &x, &y, &norms, &table, &positions);
    let bounds = bounds(Format::F32, &want, |d| run(d, &x, &y, &norms, &table, &positions));
    for d in devices(Format::F32) {
        let got = run(&d, &x, &y, &norms, &table, &positions);
        for (i, ((got, want), bound)) in got.iter().zip(&want).zip(&bounds).enumerate() {
            agree(&format!("operation {i}"), &d, got, want, *bound);
        }
    }
}

#[test]
fn stored_bf16_keeps_its_bits_and_columns_select() {
    let mut n = Numbers(6);
    let (rows, inputs, outputs) = (19, 130, 37);
    // Small integers and halves: exact in bf16, and so is every sum in f32.
    let mut exact =
        |count: usize| -> Vec<f32> { n.values(count).iter().map(|x| (x * 4.0).round() / 2.0).collect() };
    let (w, x) = (exact(outputs * (inputs + 7)), exact(rows * inputs));
    let bytes: Vec<u8> = w.iter().flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes()).collect();
    let bytes = pi0_device::Bytes::Owned(bytes.into());
    let weight = TensorSource::new("w", Dtype::Bf16, vec![outputs, inputs + 7], bytes).unwrap();
    for exact in [false, true] {
        let part = LinearPart { weight: weight.clone(), bias: None, columns: Some(3..3 + inputs) };
        let source = WeightSource::Linear { parts: vec![part], exact };
        let r = Reference;
        let want = r.linear(&r.upload(rows, inputs, &x).unwrap(), &r.prepare(&source).unwrap()).unwrap();
        for format in [Format::Stored, Format::Bf16, Format::F32] {
            for d in devices(format) {
                let got =
                    d.linear(&d.upload(rows, inputs, &x).unwrap(), &d.prepare(&source).unwrap()).unwrap();
                assert_eq!(d.download(&got).unwrap().data, want.data, "{d:?} exact {exact}");
            }
        }
    }
}

#[test]
fn threads_change_no_bit() {
    let mut n = Numbers(7);
    let (rows, inputs) = (100, 1500);
    let (source, x) = (n.linear(&[200, 200], inputs, false), n.values(rows * inputs));
    for format in [Format::F32, Format::Bf16, Format::Int8] {
        for isa in Isa::available() {
            let results: Vec<_> = [1, 2, 7]
                .map(|threads| {
                    let d = Cpu::new(CpuOptions { isa: Some(isa), threads: Some(threads), format }).unwrap();
                    let (x, w) = (d.upload(rows, inputs, &x).unwrap(), d.prepare(&source).unwrap());
                    let y = dense(&d, &Dense { activation: Some(Activation::Geglu), ..Dense::new(&x, &w) })
                        .unwrap();
                    d.download(&y).unwrap().data
                })
                .into();
            assert!(results.windows(2).all(|w| w[0] == w[1]), "{isa} {format}");
        }
    }
}

#[test]
fn misuse_is_an_error() {
    let d = Cpu::new(CpuOptions::default()).unwrap();
    let mut n = Numbers(8);
    let w = d.prepare(&n.linear(&[8], 6, false)).unwrap();
    let norm = d.prepare(&n.norm(NormKind::Rms, 5)).unwrap();
    let x = d.upload(2, 5, &[0.0; 10]).unwrap();
    assert!(d.linear(&x, &w).is_err() && d.linear(&x, &norm).is_err() && d.rms_norm(&x, &w).is_err());
    assert!(d.layer_norm(&x, &norm).is_err() && d.geglu(&x).is_err() && d.rope(&x, &[0, 1], 5).is_err());
    assert!(
        d.slice_rows(&x, 1..3).is_err() && d.slice_cols(&x, 4..6).is_err() && d.concat_rows(&[]).is_err()
    );
    assert!(d.upload(3, 3, &[0.0; 8]).is_err() && d.embed(&w, &[0], 1.0).is_err());
    let empty = d.slice_rows(&x, 1..1).unwrap();
    assert_eq!(d.shape(&d.rms_norm(&empty, &norm).unwrap()), [0, 5]);
    #[cfg(target_arch = "x86_64")]
    assert!(Cpu::new(CpuOptions { isa: Some(Isa::Neon), ..Default::default() }).is_err());
}
