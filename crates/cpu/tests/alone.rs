//! A row's result has the same bits whatever rows are computed beside it: what a robot's actions, and π0-FAST's guesses,
//! rely on.

use pi0_cpu::{Cpu, CpuOptions, Format, Isa, Tensor};
use pi0_device::{
    Activation, Attention, Dense, Device, KeyValue, Keys, LinearPart, Norm, NormKind, Span, TensorSource,
    WeightSource,
};
use pi0_model::{AnswerConfig, Config, Extent, Family, Inputs, Kind, Pi0, SampleOptions, synth};

fn values(n: usize, seed: u64) -> Vec<f32> {
    let mut state = seed;
    let next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    std::iter::repeat_with(next).take(n).collect()
}

fn devices() -> impl Iterator<Item = (String, Cpu)> {
    let formats = [Format::F32, Format::Bf16, Format::Int8];
    Isa::available().into_iter().flat_map(move |isa| {
        formats.map(|format| {
            let cpu = Cpu::new(CpuOptions { isa: Some(isa), threads: Some(2), format }).unwrap();
            (format!("{isa} {format}"), cpu)
        })
    })
}

fn bits(cpu: &Cpu, x: &Tensor) -> Vec<u32> {
    cpu.download(x).unwrap().data.iter().map(|x| x.to_bits()).collect()
}

#[test]
fn products() {
    for (name, cpu) in devices() {
        // Depth in one block and in several, odd widths.
        for (inputs, outputs) in [(70, 96), (1100, 200), (4600, 64)] {
            let matrix =
                TensorSource::from_f32("w", vec![outputs, inputs], &values(outputs * inputs, 3)).unwrap();
            let part = LinearPart { weight: matrix, bias: None, columns: None };
            let weight = cpu.prepare(&WeightSource::Linear { parts: vec![part], exact: false }).unwrap();
            let scale = TensorSource::from_f32("n", vec![inputs], &values(inputs, 4)).unwrap();
            let source = WeightSource::Norm { kind: NormKind::Rms, weight: scale, bias: None, eps: 1e-6 };
            let norm = cpu.prepare(&source).unwrap();
            let data = values(17 * inputs, 5);
            let run = |rows: std::ops::Range<usize>| {
                let x = &data[rows.start * inputs..rows.end * inputs];
                let x = cpu.upload(rows.len(), inputs, x).unwrap();
                let (norm, activation) = (Some(Norm::Rms(&norm)), Some(Activation::Gelu));
                bits(&cpu, &cpu.dense(&Dense { norm, activation, ..Dense::new(&x, &weight) }).unwrap())
            };
            let alone: Vec<_> = (0..17).map(|row| run(row..row + 1)).collect();
            for rows in [0..2, 0..4, 3..8, 0..8, 8..17, 0..17] {
                assert!(
                    run(rows.clone()) == alone[rows.clone()].concat(),
                    "{name} {inputs} {outputs} {rows:?}"
                );
            }
        }
    }
}

/// Rows that each see one key more than the one before, as tokens read together do, some keys behind others' tensors.
#[test]
fn attention() {
    let (heads, dim, before, new) = (8, 64, 150, 8);
    for (name, cpu) in devices() {
        let up = |rows: usize, heads: usize, seed| {
            cpu.upload(rows, heads * dim, &values(rows * heads * dim, seed)).unwrap()
        };
        let (q, k, v) = (up(new, heads, 1), up(before, 1, 2), up(before, 1, 3));
        let (own_k, own_v) = (up(new, 1, 4), up(new, 1, 5));
        let run = |spans: &[Span], q: &Tensor| {
            let kv = [KeyValue { k: &own_k, v: &own_v }, KeyValue { k: &k, v: &v }];
            let spec = Attention { heads, kv_heads: 1, head_dim: dim, scale: 0.1, spans };
            bits(&cpu, &cpu.attention(q, &kv, &spec).unwrap())
        };
        let keys = |row| vec![Keys { part: 1, rows: 0..before }, Keys { part: 0, rows: 0..row + 1 }];
        let spans: Vec<_> = (0..new).map(|row| Span { queries: row..row + 1, keys: keys(row) }).collect();
        let together = run(&spans, &q);
        let alone = (0..new).flat_map(|row| {
            run(&[Span { queries: 0..1, keys: keys(row) }], &cpu.slice_rows(&q, row..row + 1).unwrap())
        });
        assert!(together == alone.collect::<Vec<_>>(), "{name}");
    }
}

/// Guessed tokens change no answer, in any number format on any instruction set.
#[test]
fn answers() {
    let c = Config::tiny().of_kind(Kind::Pi0Fast);
    let mut c = Config { family: Family::Openpi, answer: Some(AnswerConfig::of_family(Family::Openpi)), ..c };
    let image = |seed| Some(values(3 * c.vision.image_size.pow(2), seed));
    let inputs = |seed, tokens| Inputs { images: vec![image(seed), None], tokens, ..Inputs::default() };
    let batch = [inputs(1, vec![2, 9, 17, 30]), inputs(2, vec![2, 5])];
    let options = SampleOptions { steps: Some(9), seed: 0 };
    for (name, _) in devices().map(|(name, _)| (name, ())) {
        let write = |c: &Config| {
            let (_, cpu) = devices().find(|(found, _)| *found == name).unwrap();
            let model = Pi0::load(cpu, synth::checkpoint(c, 1).unwrap(), Extent::Cache, &|_| ()).unwrap();
            // Each robot alone, then both, then the first again: its own answer is known, and the other's.
            let runs = [&batch[..1], &batch[1..], &batch[..], &batch[..1]];
            runs.map(|batch| model.sample_actions(batch, &options).unwrap())
        };
        c.answer.as_mut().unwrap().speculate = 0;
        let want = write(&c);
        c.answer.as_mut().unwrap().speculate = 7;
        assert_eq!(write(&c), want, "{name}");
    }
}
