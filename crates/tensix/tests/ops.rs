//! Every operation on the simulator against the scalar reference, at odd sizes.

mod common;

use std::ops::Range;

use common::{check, open, open_with, put, random};
use pi0_device::{
    Activation, Attention, Dense, Device, KeyValue, Keys, LinearPart, Modulation, Norm, NormKind, Qkv,
    Reference, Span, TensorSource, WeightSource, dense, qkv,
};
use pi0_tensix::{Tensix, TensixOptions};

/// Runs the same expression on the device and on the reference, and compares.
macro_rules! both {
    ($device:expr, $what:expr, $bound:expr, $d:ident => $body:expr) => {{
        let got = {
            let $d: &Tensix = $device;
            let y = $body;
            $d.download(&y).expect("a download")
        };
        let want = {
            let $d = &Reference;
            let y = $body;
            $d.download(&y).expect("a download")
        };
        check(&$what, &got, &want, $bound.0, $bound.1)
    }};
}

/// Moves, and f32 arithmetic on the vector unit.
const EXACT: (f64, f64) = (1.0 - 1e-12, 0.0);
const F32: (f64, f64) = (0.999_999_999, 3e-6);
/// Products of TF32 activations with bf16 weights.
const BF16: (f64, f64) = (0.999_99, 4e-3);
/// Weights as bfp8.
const BFP8: (f64, f64) = (0.9999, 1.2e-2);
/// Attention: scores, probabilities and values in TF32, the result stored as bf16 (which alone is 1.7e-3).
const ATTENTION: (f64, f64) = (0.999_996, 3e-3);
/// Attention over what a norm and a projection have rounded to bf16 before.
const CHAIN: (f64, f64) = (0.999_98, 6e-3);
/// Products in TF32.
const TF32: (f64, f64) = (0.999_999, 2e-3);

fn source(name: &str, rows: usize, cols: usize, seed: u64, deviation: f32) -> TensorSource {
    TensorSource::from_f32(name, vec![rows, cols], &random(seed, rows, cols, deviation).data).unwrap()
}

fn vector(name: &str, n: usize, seed: u64, deviation: f32) -> TensorSource {
    TensorSource::from_f32(name, vec![n], &random(seed, 1, n, deviation).data).unwrap()
}

fn linear(inputs: usize, outputs: &[usize], bias: bool, exact: bool) -> WeightSource {
    let deviation = (inputs as f32).powf(-0.5);
    let parts = outputs.iter().enumerate().map(|(i, &out)| LinearPart {
        weight: source("w", out, inputs, 7 + i as u64, deviation),
        bias: bias.then(|| vector("b", out, 70 + i as u64, 1.0)),
        columns: None,
    });
    WeightSource::Linear { parts: parts.collect(), exact }
}

#[test]
fn moves_return_every_bit() {
    let Some(device) = open() else { return };
    for (rows, cols) in [(1, 1), (33, 70), (64, 32), (100, 200)] {
        let x = random(1, rows, cols, 1.0);
        both!(&device, format!("{rows}x{cols} up and down"), EXACT, d => put(d, &x));
    }
}

#[test]
fn pointwise() {
    let Some(device) = open() else { return };
    for (rows, cols) in [(1, 5), (40, 70), (65, 96)] {
        let (x, y) = (random(1, rows, cols, 2.0), random(2, rows, cols, 1.0));
        let name = |op: &str| format!("{op} {rows}x{cols}");
        both!(&device, name("gelu"), F32, d => d.gelu(&put(d, &x)).unwrap());
        both!(&device, name("silu"), F32, d => d.silu(&put(d, &x)).unwrap());
        both!(&device, name("add"), F32, d => d.add(&put(d, &x), &put(d, &y)).unwrap());
        both!(&device, name("add_scaled"), F32, d => d.add_scaled(&put(d, &x), &put(d, &y), -0.1).unwrap());
        if cols % 2 == 0 {
            both!(&device, name("geglu"), F32, d => d.geglu(&put(d, &x)).unwrap());
        }
    }
    for (rows, period) in [(96, 32), (48, 16), (50, 1)] {
        let (x, y) = (random(1, rows, 40, 2.0), random(2, period, 40, 1.0));
        both!(&device, format!("add {rows} rows, {period}"), F32, d => d.add(&put(d, &x), &put(d, &y)).unwrap());
    }
}

#[test]
fn shapes() {
    let Some(device) = open() else { return };
    let x = random(1, 70, 130, 1.0);
    for range in [0..32usize, 32..70, 1..51, 69..70] {
        let r: Range<usize> = range.clone();
        both!(&device, format!("rows {range:?}"), EXACT, d => d.slice_rows(&put(d, &x), r.clone()).unwrap());
    }
    for range in [0..64usize, 64..130, 18..36, 5..128, 100..101] {
        let r: Range<usize> = range.clone();
        both!(&device, format!("columns {range:?}"), EXACT, d => d.slice_cols(&put(d, &x), r.clone()).unwrap());
    }
    let parts = [random(2, 1, 40, 1.0), random(3, 50, 40, 1.0), random(4, 32, 40, 1.0)];
    both!(&device, "concat", EXACT, d => {
        let parts = parts.each_ref().map(|p| put(d, p));
        d.concat_rows(&parts.each_ref()).unwrap()
    });
    // A slice of a slice, used by an operation: what lies around a view must not leak into it.
    both!(&device, "gelu of views", F32, d => {
        let y = d.slice_cols(&put(d, &x), 32..96).unwrap();
        d.gelu(&d.slice_rows(&y, 32..50).unwrap()).unwrap()
    });
}

#[test]
fn linears() {
    let Some(device) = open() else { return };
    for (rows, inputs, outputs, bias) in [
        (1, 8, vec![3], true),
        (33, 70, vec![40, 9, 64], true),
        (64, 320, vec![128], false),
        (96, 32, vec![96], true),
    ] {
        let x = random(1, rows, inputs, 1.0);
        let w = linear(inputs, &outputs, bias, false);
        let name = format!("linear {rows}x{inputs} to {outputs:?}");
        both!(&device, name, BF16, d => d.linear(&put(d, &x), &d.prepare(&w).unwrap()).unwrap());
        let w = linear(inputs, &outputs, bias, true);
        let name = format!("exact linear {rows}x{inputs} to {outputs:?}");
        both!(&device, name, TF32, d => d.linear(&put(d, &x), &d.prepare(&w).unwrap()).unwrap());
    }
}

/// Weights of a sign and seven bits, 16 on an exponent.
#[test]
fn linears_of_bfp8() {
    let Some(device) = open_with(&TensixOptions { bfp8: true, ..TensixOptions::default() }) else { return };
    for (rows, inputs, outputs, bias) in [(1, 8, 3, true), (33, 1100, 130, true), (64, 320, 128, false)] {
        let x = random(1, rows, inputs, 1.0);
        let w = linear(inputs, &[outputs], bias, false);
        let name = format!("bfp8 linear {rows}x{inputs} to {outputs}");
        both!(&device, name, BFP8, d => d.linear(&put(d, &x), &d.prepare(&w).unwrap()).unwrap());
        let norm = WeightSource::Norm {
            kind: NormKind::Rms,
            weight: vector("w", inputs, 5, 0.3),
            bias: None,
            eps: 1e-6,
        };
        // Activations as bf16, and two phases.
        let name = format!("norm and bfp8 linear {rows}x{inputs} to {outputs}");
        both!(&device, name, BFP8, d => {
            let (x, norm, weight) = (put(d, &x), d.prepare(&norm).unwrap(), d.prepare(&w).unwrap());
            let call = Dense { norm: Some(Norm::Rms(&norm)), ..Dense::new(&x, &weight) };
            dense(d, &call).unwrap()
        });
    }
    // Not finite: bf16 can hold it, bfp8 cannot.
    let weight = TensorSource::from_f32("w", vec![1, 2], &[1.0, f32::INFINITY]).unwrap();
    let parts = vec![LinearPart { weight, bias: None, columns: None }];
    let error = device.prepare(&WeightSource::Linear { parts, exact: false }).expect_err("an error");
    assert!(error.to_string().contains("not finite"), "{error}");
}

/// Inputs beyond one chunk: partial sums go through L1.
#[test]
fn long_linears() {
    let Some(device) = open() else { return };
    for (rows, inputs, outputs, bias) in [(33, 1100, 130, true), (5, 2048, 64, false)] {
        let x = random(1, rows, inputs, 1.0);
        let w = linear(inputs, &[outputs], bias, false);
        let name = format!("linear {rows}x{inputs} to {outputs}");
        both!(&device, name, BF16, d => d.linear(&put(d, &x), &d.prepare(&w).unwrap()).unwrap());
    }
}

#[test]
fn dense_layers() {
    let Some(device) = open() else { return };
    for inputs in [70, 1100] {
        let (x, r) = (random(1, 50, inputs, 1.0), random(2, 50, 128, 3.0));
        let w = linear(inputs, &[64, 64], true, false);
        for activation in [None, Some(Activation::Gelu), Some(Activation::Silu), Some(Activation::Geglu)] {
            let name = format!("dense of {inputs}, {activation:?}");
            both!(&device, name, BF16, d => {
                let (x, w) = (put(d, &x), d.prepare(&w).unwrap());
                dense(d, &Dense { activation, ..Dense::new(&x, &w) }).unwrap()
            });
        }
        both!(&device, format!("dense of {inputs}, residual"), BF16, d => {
            let (x, w, r) = (put(d, &x), d.prepare(&w).unwrap(), put(d, &r));
            dense(d, &Dense { residual: Some(&r), ..Dense::new(&x, &w) }).unwrap()
        });
    }
}

/// What an activation stores as bf16, with partial sums (1100 inputs) and without, and each operation on it.
#[test]
fn what_activations_leave() {
    let Some(device) = open() else { return };
    for inputs in [70, 1100] {
        let (x, r) = (random(1, 50, inputs, 1.0), random(2, 50, 64, 1.0));
        let up = linear(inputs, &[64, 64], true, false);
        macro_rules! after {
            ($what:expr, $bound:expr, $d:ident, $h:ident => $then:expr) => {
                both!(&device, format!("behind GEGLU of {inputs}, {}", $what), $bound, $d => {
                    let (x, w) = (put($d, &x), $d.prepare(&up).unwrap());
                    let activation = Some(Activation::Geglu);
                    let $h = dense($d, &Dense { activation, ..Dense::new(&x, &w) }).unwrap();
                    $then.unwrap()
                })
            };
        }
        for exact in [false, true] {
            let down = linear(64, &[64], true, exact);
            after!(format!("dense, exact {exact}"), BF16, d, h => {
                let (w, r) = (d.prepare(&down).unwrap(), put(d, &r));
                dense(d, &Dense { residual: Some(&r), ..Dense::new(&h, &w) })
            });
        }
        after!("add", BF16, d, h => d.add(&put(d, &r), &h));
        after!("residual", BF16, d, h => {
            let w = d.prepare(&linear(inputs, &[64], false, false)).unwrap();
            dense(d, &Dense { residual: Some(&h), ..Dense::new(&put(d, &x), &w) })
        });
        after!("gelu", BF16, d, h => d.gelu(&h));
        after!("rows", BF16, d, h => d.slice_rows(&h, 3..40));
        after!("columns", BF16, d, h => d.slice_cols(&h, 32..60));
        after!("both", BF16, d, h => d.concat_rows(&[&h, &put(d, &r)]));
        after!("rope", BF16, d, h => d.rope(&h, &(0..50).collect::<Vec<_>>(), 32));
        // Scores of what is rounded already.
        after!("attention", (0.999_97, 8e-3), d, h => {
            let spans = [span(0..50, &[(0, 0..50)])];
            let spec = Attention { heads: 2, kv_heads: 2, head_dim: 32, scale: 0.2, spans: &spans };
            d.attention(&h, &[KeyValue { k: &h, v: &h }], &spec)
        });
    }
}

#[test]
fn norms() {
    let Some(device) = open() else { return };
    // The last ones do not fit a core's memory, and stream; the limits are near 2,800 and 4,200 columns.
    for (rows, cols) in [(1, 7), (33, 72), (64, 128), (40, 160), (3, 4001), (33, 9001)] {
        let mut x = random(1, rows, cols, 3.0);
        x.data.iter_mut().for_each(|v| *v += 2.0);
        let (weight, bias) = (vector("w", cols, 5, 0.3), vector("b", cols, 6, 0.5));
        let layer =
            WeightSource::Norm { kind: NormKind::Layer, weight: weight.clone(), bias: Some(bias), eps: 1e-6 };
        let rms = WeightSource::Norm { kind: NormKind::Rms, weight, bias: None, eps: 1e-6 };
        let name = |op: &str| format!("{op} {rows}x{cols}");
        both!(&device, name("layer_norm"), F32, d => d.layer_norm(&put(d, &x), &d.prepare(&layer).unwrap()).unwrap());
        both!(&device, name("rms_norm"), F32, d => d.rms_norm(&put(d, &x), &d.prepare(&rms).unwrap()).unwrap());
    }
}

/// Rows that share a row of the table, and rows that do not; the last width streams.
#[test]
fn adaptive_norms_and_gated_residuals() {
    let Some(device) = open() else { return };
    for (rows, cols) in [(1, 7), (33, 72), (70, 128), (33, 9001)] {
        let (x, y) = (random(1, rows, cols, 3.0), random(2, rows, cols, 1.0));
        let table = random(3, 5, 3 * cols, 0.5);
        let shared = vec![3; rows];
        let mixed: Vec<u32> = (0..rows as u32).map(|r| r * r % 5).collect();
        for picked in [&shared, &mixed] {
            let name = |op: &str| format!("{op} {rows}x{cols}, rows {:?}", &picked[..rows.min(3)]);
            // Twice: what was made of the table the first time is kept.
            for _ in 0..2 {
                both!(&device, name("ada_rms_norm"), F32, d => {
                    let table = put(d, &table);
                    let by = Modulation { table: &table, rows: picked };
                    d.ada_rms_norm(&put(d, &x), &by).unwrap();
                    d.ada_rms_norm(&put(d, &x), &by).unwrap()
                });
            }
            both!(&device, name("gated_add"), F32, d => {
                let table = put(d, &table);
                d.gated_add(&put(d, &x), &put(d, &y), &Modulation { table: &table, rows: picked }).unwrap()
            });
            if cols == 72 {
                let w = linear(cols, &[cols], false, false);
                both!(&device, name("dense"), BF16, d => {
                    let (table, x, y) = (put(d, &table), put(d, &x), put(d, &y));
                    let by = Modulation { table: &table, rows: picked };
                    let w = d.prepare(&w).unwrap();
                    let norm = Some(Norm::Ada(by));
                    dense(d, &Dense { norm, gate: Some(by), residual: Some(&y), ..Dense::new(&x, &w) }).unwrap()
                });
            }
        }
    }
    let (x, table) = (put(&device, &random(1, 4, 8, 1.0)), put(&device, &random(2, 2, 24, 1.0)));
    for rows in [&[0u32, 1, 0][..], &[0, 1, 0, 2]] {
        let by = Modulation { table: &table, rows };
        assert!(device.ada_rms_norm(&x, &by).is_err() && device.gated_add(&x, &x, &by).is_err());
    }
}

#[test]
fn ropes() {
    let Some(device) = open() else { return };
    for (rows, heads, head_dim) in [(33, 2, 64), (40, 3, 16), (20, 4, 48), (5, 2, 18), (34, 1, 256)] {
        let x = random(1, rows, heads * head_dim, 1.0);
        let positions: Vec<u32> = (0..rows as u32).map(|i| 3 * i + 1).collect();
        let name = format!("rope {rows} rows, {heads} heads of {head_dim}");
        both!(&device, name, F32, d => d.rope(&put(d, &x), &positions, head_dim).unwrap());
    }
}

#[test]
fn embeddings() {
    let Some(device) = open() else { return };
    let table = WeightSource::Embedding(source("table", 50, 72, 3, 1.0));
    both!(&device, "embed", F32, d => d.embed(&d.prepare(&table).unwrap(), &[3, 49, 0, 3], 6.5).unwrap());
    let weight = device.prepare(&table).unwrap();
    assert!(device.embed(&weight, &[50], 1.0).is_err(), "an id outside the table");
}

fn span(queries: Range<usize>, keys: &[(usize, Range<usize>)]) -> Span {
    let keys = keys.iter().map(|(part, rows)| Keys { part: *part, rows: rows.clone() }).collect();
    Span { queries, keys }
}

fn attend(
    device: &Tensix,
    what: &str,
    (heads, kv_heads, head_dim): (usize, usize, usize),
    queries: usize,
    parts: &[usize],
    spans: &[Span],
) {
    let q = random(1, queries, heads * head_dim, 1.0);
    let kv: Vec<_> = parts
        .iter()
        .zip(2..)
        .map(|(&n, s)| (random(s, n, kv_heads * head_dim, 1.0), random(s + 50, n, kv_heads * head_dim, 1.0)))
        .collect();
    let scale = (head_dim as f32).powf(-0.5);
    both!(device, what, ATTENTION, d => {
        let kv: Vec<_> = kv.iter().map(|(k, v)| (put(d, k), put(d, v))).collect();
        let kv: Vec<_> = kv.iter().map(|(k, v)| KeyValue { k, v }).collect();
        d.attention(&put(d, &q), &kv, &Attention { heads, kv_heads, head_dim, scale, spans }).unwrap()
    });
}

#[test]
fn attention_of_whole_tiles() {
    let Some(device) = open() else { return };
    attend(&device, "64 keys, 2 heads of 32", (2, 2, 32), 64, &[64], &[span(0..64, &[(0, 0..64)])]);
    attend(&device, "32 keys, heads of 256 on one", (2, 1, 256), 32, &[32], &[span(0..32, &[(0, 0..32)])]);
    let cameras = [span(0..32, &[(0, 0..32)]), span(32..96, &[(0, 32..96)])];
    attend(&device, "two cameras, heads of 72", (2, 2, 72), 96, &[96], &cameras);
}

/// A layer whose heads are not whole tiles, from the projection to the one behind attention; and each operation on
/// what lies between.
#[test]
fn heads_with_tiles_of_their_own() {
    let Some(device) = open() else { return };
    for (rows, heads, head_dim) in [(33, 2, 72), (64, 3, 18), (40, 2, 48)] {
        let width = heads * head_dim;
        let x = random(1, rows, 40, 1.0);
        let norm = WeightSource::Norm {
            kind: NormKind::Layer,
            weight: vector("w", 40, 5, 0.3),
            bias: Some(vector("b", 40, 6, 0.5)),
            eps: 1e-6,
        };
        let (up, down) = (linear(40, &[width; 3], true, false), linear(width, &[40], true, false));
        let spans = [span(0..rows, &[(0, 0..rows)])];
        let scale = (head_dim as f32).powf(-0.5);
        let spec = Attention { heads, kv_heads: heads, head_dim, scale, spans: &spans };
        macro_rules! layer {
            ($d:expr, $then:expr) => {{
                let (x, norm) = (put($d, &x), $d.prepare(&norm).unwrap());
                let weight = $d.prepare(&up).unwrap();
                let call = Qkv {
                    x: &x,
                    norm: Norm::Layer(&norm),
                    weight: &weight,
                    heads,
                    kv_heads: heads,
                    head_dim,
                    positions: None,
                    norm_tap: None,
                };
                let [q, k, v] = qkv($d, &call).unwrap();
                let a = $d.attention(&q, &[KeyValue { k: &k, v: &v }], &spec).unwrap();
                $then(&a, &q)
            }};
        }
        let name = |what: &str| format!("{heads} heads of {head_dim}, {what}");
        both!(&device, name("q"), BF16, d => layer!(d, |_, q: &_| d.slice_rows(q, 0..rows).unwrap()));
        both!(&device, name("attention"), BF16, d => layer!(d, |a: &_, _| d.slice_cols(a, 0..width).unwrap()));
        both!(&device, name("out"), BF16, d => layer!(d, |a: &_, _| {
            let (w, r) = (d.prepare(&down).unwrap(), put(d, &x));
            dense(d, &Dense { residual: Some(&r), ..Dense::new(a, &w) }).unwrap()
        }));
        both!(&device, name("add"), BF16, d => layer!(d, |a: &_, q: &_| d.add(a, q).unwrap()));
        both!(&device, name("rows of both"), BF16, d => layer!(d, |a: &_, q: &_| d.concat_rows(&[a, q]).unwrap()));
        both!(&device, name("gelu"), BF16, d => layer!(d, |a: &_, _| d.gelu(a).unwrap()));
    }
}

/// Keys and values that come out of a projection with positions are bf16 where heads are pairs of whole tiles (64), f32
/// where not (48); attention over both kinds, and parts of them, as the state's keys are.
#[test]
fn keys_and_values_of_a_projection() {
    let Some(device) = open() else { return };
    let (rows, heads, inputs) = (40, 2, 70);
    for head_dim in [64, 48] {
        let x = random(1, rows, inputs, 1.0);
        let earlier = random(2, 33, head_dim, 1.0);
        let norm = WeightSource::Norm {
            kind: NormKind::Rms,
            weight: vector("w", inputs, 5, 0.3),
            bias: None,
            eps: 1e-6,
        };
        let up = linear(inputs, &[heads * head_dim, head_dim, head_dim], false, false);
        let positions: Vec<u32> = (0..rows as u32).map(|i| 2 * i + 1).collect();
        let scale = (head_dim as f32).powf(-0.5);
        macro_rules! projected {
            ($d:expr, $then:expr) => {{
                let (x, norm, weight) = (put($d, &x), $d.prepare(&norm).unwrap(), $d.prepare(&up).unwrap());
                let call = Qkv {
                    x: &x,
                    norm: Norm::Rms(&norm),
                    weight: &weight,
                    heads,
                    kv_heads: 1,
                    head_dim,
                    positions: Some(&positions),
                    norm_tap: None,
                };
                let [q, k, v] = qkv($d, &call).unwrap();
                $then(&q, &k, &v)
            }};
        }
        let name = |what: &str| format!("heads of {head_dim}, {what}");
        both!(&device, name("k"), BF16, d => projected!(d, |_, k: &_, _| d.slice_rows(k, 0..rows).unwrap()));
        both!(&device, name("v"), BF16, d => projected!(d, |_, _, v: &_| d.slice_rows(v, 32..rows).unwrap()));
        both!(&device, name("few of k"), BF16, d => projected!(d, |_, k: &_, _| d.slice_rows(k, 3..39).unwrap()));
        both!(&device, name("attention"), CHAIN, d => projected!(d, |q: &_, k: &_, v: &_| {
            let spans = [span(0..rows, &[(0, 0..rows - 3)])];
            let spec = Attention { heads, kv_heads: 1, head_dim, scale, spans: &spans };
            d.attention(q, &[KeyValue { k, v }], &spec).unwrap()
        }));
        both!(&device, name("a first row, and f32"), CHAIN, d => projected!(d, |q: &_, k: &_, v: &_| {
            let spans = [span(0..rows, &[(0, 0..33), (1, 0..1), (2, 0..rows)])];
            let spec = Attention { heads, kv_heads: 1, head_dim, scale, spans: &spans };
            let first = [k, v].map(|t| d.slice_rows(t, 0..1).unwrap());
            let earlier = put(d, &earlier);
            let parts = [
                KeyValue { k: &earlier, v: &earlier },
                KeyValue { k: &first[0], v: &first[1] },
                KeyValue { k, v },
            ];
            d.attention(q, &parts, &spec).unwrap()
        }));
    }
}

#[test]
fn attention_of_ragged_spans() {
    let Some(device) = open() else { return };
    attend(&device, "37 of 40 keys", (2, 1, 64), 33, &[40], &[span(0..33, &[(0, 2..39)])]);
    // A suffix over a cached prefix: the state row sees the prefix and itself, the actions all.
    let suffix = [
        span(0..1, &[(0, 0..45), (1, 0..1)]),
        span(1..11, &[(0, 0..45), (1, 0..11)]),
        span(11..12, &[(0, 45..80), (1, 11..12)]),
        span(12..22, &[(0, 45..80), (1, 11..22)]),
    ];
    attend(&device, "suffix of two robots, heads of 48", (4, 1, 48), 22, &[80, 22], &suffix);
    attend(&device, "suffix of two robots, heads of 18", (4, 2, 18), 22, &[80, 22], &suffix);
}
