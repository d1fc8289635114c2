//! The scalar definitions against values worked out by hand, and their answers to operands that do not fit.

use pi0_device::{
    Activation, Attention, Dense, Device, Dtype, HostTensor, KeyValue, Keys, LinearPart, Modulation, Norm,
    NormKind, OpKind, Qkv, Reference, Span, TensorSource, WeightSource, dense, qkv,
};

const D: Reference = Reference;
type T = <Reference as Device>::Tensor;
type W = <Reference as Device>::Weight;

fn up(rows: usize, cols: usize, data: &[f32]) -> T {
    D.upload(rows, cols, data).unwrap()
}

fn source(shape: &[usize], data: &[f32]) -> TensorSource {
    TensorSource::from_f32("w", shape.to_vec(), data).unwrap()
}

/// Shape `[out, in]`, values and bias of a part of a linear layer.
type Part<'a> = (&'a [usize], &'a [f32], Option<&'a [f32]>);

fn linear(parts: &[Part<'_>]) -> W {
    let part = |(shape, data, bias): &Part<'_>| LinearPart {
        weight: source(shape, data),
        bias: bias.map(|b| source(&[b.len()], b)),
        columns: None,
    };
    D.prepare(&WeightSource::Linear { parts: parts.iter().map(part).collect(), exact: false }).unwrap()
}

fn norm(kind: NormKind, weight: &[f32], bias: Option<&[f32]>) -> W {
    let weight = source(&[weight.len()], weight);
    let bias = bias.map(|b| source(&[b.len()], b));
    D.prepare(&WeightSource::Norm { kind, weight, bias, eps: 0.0 }).unwrap()
}

#[track_caller]
fn close(got: &HostTensor, shape: [usize; 2], want: &[f32]) {
    assert_eq!(got.shape, shape);
    let far = got.data.iter().zip(want).any(|(g, w)| (g - w).abs() > 1e-6 * (1.0 + w.abs()));
    assert!(!far && got.data.len() == want.len(), "{:?} is not {want:?}", got.data);
}

#[test]
fn linear_layers_stack_their_parts() {
    let x = up(2, 2, &[1.0, 2.0, 3.0, 4.0]);
    let w = linear(&[(&[1, 2], &[1.0, 10.0], Some(&[0.5])), (&[2, 2], &[1.0, 0.0, 0.0, -1.0], None)]);
    close(&D.linear(&x, &w).unwrap(), [2, 3], &[21.5, 1.0, -2.0, 43.5, 3.0, -4.0]);
}

#[test]
fn a_linear_layer_can_read_some_columns_of_its_weight() {
    let part = LinearPart { weight: source(&[1, 4], &[1.0, 2.0, 3.0, 4.0]), bias: None, columns: Some(1..3) };
    let w = D.prepare(&WeightSource::Linear { parts: vec![part], exact: true }).unwrap();
    close(&D.linear(&up(1, 2, &[1.0, 10.0]), &w).unwrap(), [1, 1], &[32.0]);
}

#[test]
fn norms() {
    let x = up(1, 4, &[1.0, 2.0, 3.0, 6.0]);
    let layer = norm(NormKind::Layer, &[1.0, 1.0, 2.0, 1.0], Some(&[0.0, 1.0, 0.0, 0.0]));
    let s = 3.5f32.sqrt();
    close(&D.layer_norm(&x, &layer).unwrap(), [1, 4], &[-2.0 / s, 1.0 - 1.0 / s, 0.0, 3.0 / s]);
    let rms = norm(NormKind::Rms, &[0.0, 0.0, 1.0, -1.0], None);
    let s = 12.5f32.sqrt();
    close(&D.rms_norm(&x, &rms).unwrap(), [1, 4], &[1.0 / s, 2.0 / s, 6.0 / s, 0.0]);
    assert!(D.rms_norm(&x, &layer).is_err() && D.layer_norm(&x, &rms).is_err(), "the kinds are not mixed up");
}

#[test]
fn rope_turns_pairs_half_a_head_apart() {
    // Two heads of four: pairs (0, 2) by the position, (1, 3) by a hundredth of it.
    let x = up(1, 8, &[1.0, 1.0, 0.0, 0.0, 0.0, 0.0, 1.0, 1.0]);
    let (s, c, s2, c2) = (3f32.sin(), 3f32.cos(), 0.03f32.sin(), 0.03f32.cos());
    close(&D.rope(&x, &[3], 4).unwrap(), [1, 8], &[c, c2, s, s2, -s, -s2, c, c2]);
    close(&D.rope(&x, &[0], 4).unwrap(), [1, 8], &x.data);
}

/// Two query heads of width one over one key head.
fn attend(spans: &[Span], q: &T, parts: &[(T, T)]) -> pi0_device::Result<T> {
    let kv: Vec<_> = parts.iter().map(|(k, v)| KeyValue { k, v }).collect();
    D.attention(q, &kv, &Attention { heads: 2, kv_heads: 1, head_dim: 1, scale: 2.0, spans })
}

fn keys(part: usize, rows: std::ops::Range<usize>) -> Keys {
    Keys { part, rows }
}

#[test]
fn attention_sees_the_keys_of_its_span_and_no_others() {
    let q = up(2, 2, &[0.0, 0.5, 1.0, 0.0]);
    let first = (up(2, 1, &[0.0, 100.0]), up(2, 1, &[1.0, 99.0]));
    let second = (up(1, 1, &[1.0]), up(1, 1, &[3.0]));
    let spans = [
        Span { queries: 0..1, keys: vec![keys(0, 0..1), keys(1, 0..1)] },
        Span { queries: 1..2, keys: vec![keys(1, 0..1)] },
    ];
    // Row 0: logits 0, 0 for head 0 and 0, 2 * 0.5 * 1 for head 1, over the values 1 and 3.
    let e = 1f32.exp();
    let got = attend(&spans, &q, &[first, second]).unwrap();
    close(&got, [2, 2], &[2.0, (1.0 + 3.0 * e) / (1.0 + e), 3.0, 3.0]);
}

#[test]
fn attention_survives_huge_logits() {
    let q = up(1, 2, &[1e4, -1e4]);
    let kv = (up(2, 1, &[1e4, -1e4]), up(2, 1, &[5.0, 7.0]));
    let spans = [Span { queries: 0..1, keys: vec![keys(0, 0..2)] }];
    close(&attend(&spans, &q, &[kv]).unwrap(), [1, 2], &[5.0, 7.0]);
}

#[test]
fn spans_must_cover_every_row_once_and_see_something() {
    let q = up(2, 2, &[0.0; 4]);
    let kv = || (up(2, 1, &[0.0; 2]), up(2, 1, &[0.0; 2]));
    let span = |queries, keys| Span { queries, keys };
    for bad in [
        vec![],
        vec![span(0..1, vec![keys(0, 0..1)])],
        vec![span(1..2, vec![keys(0, 0..1)]), span(0..1, vec![keys(0, 0..1)])],
        vec![span(0..3, vec![keys(0, 0..1)])],
        vec![span(0..2, vec![])],
        vec![span(0..2, vec![keys(0, 1..1)])],
        vec![span(0..2, vec![keys(0, 0..3)])],
        vec![span(0..2, vec![keys(1, 0..1)])],
    ] {
        assert!(attend(&bad, &q, &[kv()]).is_err(), "{bad:?}");
    }
}

#[test]
fn activations() {
    let x = up(1, 4, &[0.0, 1.0, -1.0, 30.0]);
    close(&D.gelu(&x).unwrap(), [1, 4], &[0.0, 0.841_192, -0.158_808, 30.0]);
    close(&D.silu(&x).unwrap(), [1, 4], &[0.0, 0.731_058_6, -0.268_941_4, 30.0]);
    close(&D.geglu(&x).unwrap(), [1, 2], &[0.0, 0.841_192 * 30.0]);
}

#[test]
fn sums_repeat_the_rows_of_the_shorter() {
    let (x, y) = (up(4, 1, &[1.0, 2.0, 3.0, 4.0]), up(2, 1, &[10.0, 20.0]));
    close(&D.add(&x, &y).unwrap(), [4, 1], &[11.0, 22.0, 13.0, 24.0]);
    close(&D.add_scaled(&x, &x, -0.5).unwrap(), [4, 1], &[0.5, 1.0, 1.5, 2.0]);
    assert!(D.add(&x, &up(3, 1, &[0.0; 3])).is_err());
    assert!(D.add_scaled(&x, &y, 1.0).is_err());
}

#[test]
fn rows_and_columns_are_put_together_and_taken_apart() {
    let (x, y) = (up(2, 2, &[1.0, 2.0, 3.0, 4.0]), up(1, 2, &[5.0, 6.0]));
    let both = D.concat_rows(&[&x, &y]).unwrap();
    close(&both, [3, 2], &[1.0, 2.0, 3.0, 4.0, 5.0, 6.0]);
    close(&D.slice_rows(&both, 1..3).unwrap(), [2, 2], &[3.0, 4.0, 5.0, 6.0]);
    close(&D.slice_cols(&both, 1..2).unwrap(), [3, 1], &[2.0, 4.0, 6.0]);
    assert!(D.slice_rows(&both, 2..4).is_err() && D.slice_cols(&both, 0..3).is_err());
    assert!(D.concat_rows(&[]).is_err() && D.concat_rows(&[&x, &up(1, 1, &[0.0])]).is_err());
}

#[test]
fn embeddings_are_looked_up_and_scaled() {
    let table =
        D.prepare(&WeightSource::Embedding(source(&[3, 2], &[0.0, 1.0, 2.0, 3.0, 4.0, 5.0]))).unwrap();
    close(&D.embed(&table, &[2, 0], 2.0).unwrap(), [2, 2], &[8.0, 10.0, 0.0, 2.0]);
    assert!(D.embed(&table, &[3], 1.0).is_err());
}

#[test]
fn dense_is_norm_linear_activation_residual() {
    let x = up(1, 2, &[3.0, 4.0]);
    let rms = norm(NormKind::Rms, &[0.0, 0.0], None);
    let w = linear(&[(&[2, 2], &[1.0, 0.0, 0.0, 1.0], Some(&[0.0, 1.0]))]);
    let s = 12.5f32.sqrt();
    let call = Dense {
        norm: Some(Norm::Rms(&rms)),
        activation: Some(Activation::Silu),
        residual: Some(&x),
        ..Dense::new(&x, &w)
    };
    let silu = |x: f32| x / (1.0 + (-x).exp());
    close(&dense(&D, &call).unwrap(), [1, 2], &[3.0 + silu(3.0 / s), 4.0 + silu(4.0 / s + 1.0)]);
    assert_eq!(call.parts(), [OpKind::RmsNorm, OpKind::Linear, OpKind::Silu, OpKind::Add]);
}

/// Two rows of scale, shift and gate, two columns each.
const TABLE: [f32; 12] = [0.5, -1.0, 0.1, 0.2, 2.0, 3.0, 0.0, 1.0, -0.1, -0.2, -1.0, 0.5];

#[test]
fn adaptive_norms_and_gates_take_the_row_they_are_told() {
    let x = up(3, 2, &[3.0, 4.0, 6.0, 8.0, 0.0, 1.0]);
    let table = up(2, 6, &TABLE);
    let rows = [1, 0, 1];
    let by = Modulation { table: &table, rows: &rows };
    let (s, t) = (12.5f32.sqrt(), 0.5f32.sqrt());
    let want = [3.0 / s - 0.1, 8.0 / s - 0.2, 1.5 * 3.0 / s + 0.1, 0.2, -0.1, 2.0 / t - 0.2];
    close(&D.ada_rms_norm(&x, &by).unwrap(), [3, 2], &want);
    let y = up(3, 2, &[1.0, 1.0, 10.0, 10.0, 2.0, 2.0]);
    close(&D.gated_add(&x, &y, &by).unwrap(), [3, 2], &[2.0, 4.5, 26.0, 38.0, -2.0, 2.0]);

    // As parts of a dense layer.
    let w = linear(&[(&[2, 2], &[1.0, 0.0, 0.0, 1.0], Some(&[0.0, 1.0]))]);
    let call = Dense { norm: Some(Norm::Ada(by)), gate: Some(by), residual: Some(&y), ..Dense::new(&x, &w) };
    let branch = [want[0], want[1] + 1.0, want[2], want[3] + 1.0, want[4], want[5] + 1.0];
    let gates = [-1.0, 0.5, 2.0, 3.0, -1.0, 0.5];
    let want: Vec<f32> = (0..6).map(|i| y.data[i] + gates[i] * branch[i]).collect();
    close(&dense(&D, &call).unwrap(), [3, 2], &want);
    assert_eq!(call.parts(), [OpKind::AdaRmsNorm, OpKind::Linear, OpKind::GatedAdd]);
    assert!(dense(&D, &Dense { residual: None, ..call }).is_err());

    for rows in [&[0, 1][..], &[0, 1, 2]] {
        let by = Modulation { table: &table, rows };
        assert!(D.ada_rms_norm(&x, &by).is_err() && D.gated_add(&x, &y, &by).is_err());
    }
    assert!(D.ada_rms_norm(&up(3, 1, &[0.0; 3]), &by).is_err());
    assert!(D.gated_add(&x, &up(1, 2, &[0.0; 2]), &by).is_err());
}

#[test]
fn qkv_splits_and_turns() {
    let x = up(1, 1, &[2.0]);
    let rms = norm(NormKind::Rms, &[0.0], None);
    let w =
        linear(&[(&[2, 1], &[1.0, 0.0], None), (&[2, 1], &[0.0, 1.0], None), (&[2, 1], &[5.0, 6.0], None)]);
    let call = Qkv {
        x: &x,
        norm: Norm::Rms(&rms),
        weight: &w,
        heads: 1,
        kv_heads: 1,
        head_dim: 2,
        positions: Some(&[1]),
        norm_tap: None,
    };
    let [q, k, v] = qkv(&D, &call).unwrap();
    let (s, c) = 1f32.sin_cos();
    close(&q, [1, 2], &[c, s]);
    close(&k, [1, 2], &[-s, c]);
    close(&v, [1, 2], &[5.0, 6.0]);
}

#[test]
fn stored_formats_read_exactly() {
    let values = [1.0f32, -0.5, 65504.0, 0.0];
    let bf16: Vec<u8> = values.iter().flat_map(|&x| half::bf16::from_f32(x).to_le_bytes()).collect();
    let f16: Vec<u8> = values.iter().flat_map(|&x| half::f16::from_f32(x).to_le_bytes()).collect();
    for (dtype, bytes, last) in [(Dtype::Bf16, bf16, 65536.0), (Dtype::F16, f16, 65504.0)] {
        let bytes = pi0_device::Bytes::Owned(std::sync::Arc::new(bytes));
        let t = TensorSource::new("t", dtype, vec![2, 2], bytes.clone()).unwrap();
        assert_eq!(t.to_f32(), [1.0, -0.5, last, 0.0]);
        assert!(TensorSource::new("t", dtype, vec![5], bytes.clone()).is_err());
        assert!(TensorSource::new("t", dtype, vec![usize::MAX, 2], bytes).is_err());
    }
}

#[test]
fn weights_whose_parts_do_not_fit_are_refused() {
    let part = |shape: &[usize], bias: Option<usize>| LinearPart {
        weight: source(shape, &vec![0.0; shape.iter().product()]),
        bias: bias.map(|n| source(&[n], &vec![0.0; n])),
        columns: None,
    };
    for parts in [
        vec![],
        vec![part(&[4], None)],
        vec![part(&[2, 2], Some(3))],
        vec![part(&[2, 2], None), part(&[2, 3], None)],
        vec![LinearPart { columns: Some(1..3), ..part(&[2, 2], None) }],
    ] {
        assert!(D.prepare(&WeightSource::Linear { parts, exact: false }).is_err());
    }
    let weight = source(&[2], &[0.0; 2]);
    let bias = Some(source(&[3], &[0.0; 3]));
    assert!(D.prepare(&WeightSource::Norm { kind: NormKind::Layer, weight, bias, eps: 0.0 }).is_err());
    assert!(D.upload(2, 2, &[0.0; 3]).is_err() && D.upload(usize::MAX, 2, &[]).is_err());
}
