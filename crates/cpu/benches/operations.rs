//! The operations beside linear layers at the sizes of π0; each result is checked before it is timed.
//!
//! `cargo bench -p pi0-cpu --bench operations`

use std::sync::LazyLock;

use divan::Bencher;
use divan::counter::{BytesCount, ItemsCount};
use pi0_cpu::{Cpu, CpuOptions, Format, Tensor};
use pi0_device::{
    Attention, Device, Dtype, HostTensor, KeyValue, Keys, LinearPart, NormKind, Reference, Span,
    TensorSource, WeightSource, compare,
};

static CPU: LazyLock<Cpu> = LazyLock::new(|| {
    Cpu::new(CpuOptions { format: Format::Bf16, ..Default::default() }).expect("threads start")
});

fn main() {
    println!("{}", CPU.describe());
    divan::main();
}

/// Uniform values around zero.
fn values(n: usize, mut state: u64) -> Vec<f32> {
    (0..n)
        .map(|_| {
            state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

fn upload<D: Device>(d: &D, rows: usize, cols: usize, seed: u64) -> D::Tensor {
    d.upload(rows, cols, &values(rows * cols, seed)).expect("sizes fit")
}

fn check(got: &Tensor, rows: usize, want: &HostTensor, most: f64) {
    let got = CPU.download(got).expect("a host tensor");
    let agreement = compare(&got.data[..rows * got.cols()], &want.data[..rows * got.cols()]);
    assert!(agreement.relative_l2 < most, "{agreement}");
}

/// Heads, key heads, head width, queries and keys of one span, number of spans.
#[divan::bench(args = [(16, 16, 72, 256, 256, 3), (8, 1, 256, 788, 788, 1), (8, 1, 256, 51, 839, 1)])]
fn attention(
    bencher: Bencher,
    (heads, kv_heads, dim, queries, keys, count): (usize, usize, usize, usize, usize, usize),
) {
    let spans: Vec<_> = (0..count)
        .map(|i| Span {
            queries: i * queries..(i + 1) * queries,
            keys: vec![Keys { part: 0, rows: i * keys..(i + 1) * keys }],
        })
        .collect();
    let q = upload(&*CPU, count * queries, heads * dim, 1);
    let (k, v) =
        (upload(&*CPU, count * keys, kv_heads * dim, 2), upload(&*CPU, count * keys, kv_heads * dim, 3));
    let spec = Attention { heads, kv_heads, head_dim: dim, scale: (dim as f32).powf(-0.5), spans: &spans };
    let run = || CPU.attention(&q, &[KeyValue { k: &k, v: &v }], &spec).expect("shapes fit");
    // The reference is slow: four rows of the first span suffice.
    let r = Reference;
    let (host, k_host, v_host) = (
        upload(&r, count * queries, heads * dim, 1),
        upload(&r, count * keys, kv_heads * dim, 2),
        upload(&r, count * keys, kv_heads * dim, 3),
    );
    let few = [Span { queries: 0..4, keys: spans[0].keys.clone() }];
    let want = r
        .slice_rows(&host, 0..4)
        .and_then(|q| {
            r.attention(&q, &[KeyValue { k: &k_host, v: &v_host }], &Attention { spans: &few, ..spec })
        })
        .expect("shapes fit");
    check(&run(), 4, &want, 2e-2);
    bencher.counter(ItemsCount::new(pi0_device::flops::attention(&spec))).bench(run);
}

/// Few query rows, as many for each robot, that all see the same keys, which come from memory: so many caches of them that
/// none stays in the processor's.
#[divan::bench(args = [(1, 1, 855), (1, 4, 855), (4, 1, 855), (8, 1, 855)])]
fn attention_of_few(bencher: Bencher, (rows, robots, keys): (usize, usize, usize)) {
    let (heads, dim) = (8, 256);
    let spans: Vec<_> = (0..robots)
        .flat_map(|b| {
            let rows = b * rows..(b + 1) * rows;
            rows.map(move |q| Span {
                queries: q..q + 1,
                keys: vec![Keys { part: 0, rows: b * keys..(b + 1) * keys }],
            })
        })
        .collect();
    let q = upload(&*CPU, robots * rows, heads * dim, 1);
    let host = |seed| upload(&Reference, robots * keys, dim, seed);
    let bytes = robots * keys * dim * size_of::<f32>() * 2;
    let caches: Vec<_> = (0..(160_usize << 20).div_ceil(bytes))
        .map(|_| [2, 3].map(|seed| upload(&*CPU, robots * keys, dim, seed)))
        .collect();
    let spec = Attention { heads, kv_heads: 1, head_dim: dim, scale: (dim as f32).powf(-0.5), spans: &spans };
    let attend = |[k, v]: &[Tensor; 2]| CPU.attention(&q, &[KeyValue { k, v }], &spec).expect("shapes fit");
    let r = Reference;
    let (k, v) = (host(2), host(3));
    let want = r
        .attention(&upload(&r, robots * rows, heads * dim, 1), &[KeyValue { k: &k, v: &v }], &spec)
        .expect("shapes fit");
    check(&attend(&caches[0]), robots * rows, &want, 1e-5);
    let mut turns = caches.iter().cycle();
    bencher.counter(BytesCount::new(bytes)).bench_local(|| attend(turns.next().expect("there is one")));
}

#[divan::bench(args = [(768, 1152), (788, 2048), (51, 1024)])]
fn rms_norm(bencher: Bencher, (rows, cols): (usize, usize)) {
    let weight = TensorSource::from_f32("norm", vec![cols], &values(cols, 5)).expect("sizes fit");
    let source = WeightSource::Norm { kind: NormKind::Rms, weight, bias: None, eps: 1e-6 };
    let (w, x) = (CPU.prepare(&source).expect("a norm"), upload(&*CPU, rows, cols, 1));
    let r = Reference;
    let want =
        r.rms_norm(&upload(&r, rows, cols, 1), &r.prepare(&source).expect("a norm")).expect("shapes fit");
    let run = || CPU.rms_norm(&x, &w).expect("shapes fit");
    check(&run(), rows, &want, 1e-5);
    bencher.counter(BytesCount::new(rows * cols * 8)).bench(run);
}

#[divan::bench(args = [(788, 2048), (51, 2048)])]
fn rope(bencher: Bencher, (rows, cols): (usize, usize)) {
    let positions: Vec<u32> = (0..rows as u32).collect();
    let x = upload(&*CPU, rows, cols, 1);
    let r = Reference;
    let want = r.rope(&upload(&r, rows, cols, 1), &positions, 256).expect("shapes fit");
    let run = || CPU.rope(&x, &positions, 256).expect("shapes fit");
    check(&run(), rows, &want, 1e-5);
    bencher.counter(BytesCount::new(rows * cols * 8)).bench(run);
}

/// Packing of a weight stored in bf16.
#[divan::bench(args = [(2048, 16384), (16384, 2048), (1024, 4096)])]
fn prepare(bencher: Bencher, (inputs, outputs): (usize, usize)) {
    let bytes: Vec<u8> =
        values(inputs * outputs, 1).iter().flat_map(|x| ((x.to_bits() >> 16) as u16).to_le_bytes()).collect();
    let bytes = pi0_device::Bytes::Owned(bytes.into());
    let weight = TensorSource::new("w", Dtype::Bf16, vec![outputs, inputs], bytes).expect("sizes fit");
    let source =
        WeightSource::Linear { parts: vec![LinearPart { weight, bias: None, columns: None }], exact: false };
    bencher.counter(BytesCount::new(inputs * outputs * 2)).bench(|| CPU.prepare(&source).expect("packs"));
}
