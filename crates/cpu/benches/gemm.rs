//! Linear layers at the sizes of π0, each checked before it is timed, against the peak measured in the same run. As in an
//! inference the weight comes from memory: several copies of it, more than caches hold, take turns.
//!
//! `cargo bench -p pi0-cpu --bench gemm -- [--isa NAME] [--format f32|bf16|int8] [--threads N] [--rows M,M…]
//! [--only NAME] [--megabytes N]`, the last the size of all copies together, 0 for one that may stay in a cache.

use std::time::{Duration, Instant};

use pi0_cpu::peak::Peaks;
use pi0_cpu::{Cpu, CpuOptions, Format, Isa};
use pi0_device::{
    Activation, Dense, Device, Dtype, LinearPart, Reference, TensorSource, WeightSource, compare,
};

/// Name, inputs, outputs of each part, activation.
type Layer = (&'static str, usize, &'static [usize], Option<Activation>);

const LAYERS: [Layer; 11] = [
    ("vision qkv", 1152, &[1152, 1152, 1152], None),
    ("vision out", 1152, &[1152], None),
    ("vision fc1", 1152, &[4304], Some(Activation::Gelu)),
    ("vision fc2", 4304, &[1152], None),
    ("prefix qkv", 2048, &[2048, 256, 256], None),
    ("prefix gate up", 2048, &[16384, 16384], Some(Activation::Geglu)),
    ("prefix down", 16384, &[2048], None),
    ("expert qkv", 1024, &[2048, 256, 256], None),
    ("expert out", 2048, &[1024], None),
    ("expert gate up", 1024, &[4096, 4096], Some(Activation::Geglu)),
    ("expert down", 4096, &[1024], None),
];

fn rows_of(layer: &str) -> &'static [usize] {
    match layer.split(' ').next() {
        Some("vision") => &[256, 768],
        Some("prefix") => &[532, 788, 816],
        _ => &[50, 51, 204],
    }
}

struct Options {
    isa: Option<Isa>,
    format: Format,
    threads: Option<usize>,
    rows: Vec<usize>,
    only: Option<String>,
    megabytes: usize,
}

fn options() -> Result<Options, String> {
    let mut o =
        Options { isa: None, format: Format::Bf16, threads: None, rows: vec![], only: None, megabytes: 160 };
    let mut args = std::env::args().skip(1);
    while let Some(arg) = args.next() {
        if arg == "--bench" {
            continue;
        }
        let value = args.next().ok_or_else(|| format!("{arg} wants a value"))?;
        let number = |v: &str| v.parse::<usize>().map_err(|e| format!("{arg} {v}: {e}"));
        match arg.as_str() {
            "--isa" => o.isa = Some(value.parse()?),
            "--format" => o.format = value.parse()?,
            "--threads" => o.threads = Some(number(&value)?),
            "--rows" => o.rows = value.split(',').map(number).collect::<Result<_, _>>()?,
            "--only" => o.only = Some(value),
            "--megabytes" => o.megabytes = number(&value)?,
            _ => return Err(format!("unknown option {arg}")),
        }
    }
    Ok(o)
}

/// Uniform values around zero.
fn values(n: usize, seed: u64) -> impl Iterator<Item = f32> {
    let mut state = seed;
    (0..n).map(move |_| {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    })
}

fn source(inputs: usize, outputs: &[usize]) -> Result<WeightSource, pi0_device::Error> {
    let scale = 2.0 / (inputs as f32).sqrt();
    let part = |(i, &n): (usize, &usize)| {
        let bytes: Vec<u8> = values(n * inputs, i as u64 + 1)
            .flat_map(|x| (((x * scale).to_bits() >> 16) as u16).to_le_bytes())
            .collect();
        let bytes = pi0_device::Bytes::Owned(bytes.into());
        let weight = TensorSource::new("bench", Dtype::Bf16, vec![n, inputs], bytes)?;
        Ok(LinearPart { weight, bias: None, columns: None })
    };
    let parts = outputs.iter().enumerate().map(part).collect::<Result<_, pi0_device::Error>>()?;
    Ok(WeightSource::Linear { parts, exact: false })
}

/// Shortest time of a call, over half a second or at least five calls.
fn time(mut call: impl FnMut()) -> Duration {
    let (start, mut best, mut calls) = (Instant::now(), Duration::MAX, 0);
    while calls < 5 || start.elapsed() < Duration::from_millis(300) {
        let begin = Instant::now();
        call();
        best = best.min(begin.elapsed());
        calls += 1;
    }
    best
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let o = options()?;
    let cpu = Cpu::new(CpuOptions { isa: o.isa, threads: o.threads, format: o.format })?;
    let peaks = Peaks::measure(&cpu);
    println!("{}: {peaks:.0?}", cpu.describe());
    let peak = match (o.format, cpu.isa()) {
        (Format::F32, _) => peaks.f32,
        (Format::Int8, Isa::Amx | Isa::NeonBf16) => peaks.int8_tiles,
        (Format::Int8, Isa::Avx2Vnni | Isa::Avx512Vnni | Isa::Avx512Bf16 | Isa::NeonDot) => peaks.int8_dot,
        (_, isa) => peaks.bf16(isa),
    };
    println!(
        "| layer | shape | ms | GFLOP/s | share of peak | weights GB/s | relative L2 |\n|---|---|---|---|---|---|---|"
    );
    for (name, inputs, outputs, activation) in LAYERS {
        if o.only.as_ref().is_some_and(|only| !name.contains(only.as_str())) {
            continue;
        }
        let source = source(inputs, outputs)?;
        let total: usize = outputs.iter().sum();
        let bytes = match o.format {
            Format::F32 => 4,
            Format::Int8 => 1,
            _ => 2,
        };
        let copies = (o.megabytes << 20).div_ceil(inputs * total * bytes).max(1);
        let weights = (0..copies).map(|_| cpu.prepare(&source)).collect::<Result<Vec<_>, _>>()?;
        let weight = &weights[0];
        for &rows in if o.rows.is_empty() { rows_of(name) } else { &o.rows } {
            let data: Vec<f32> = values(rows * inputs, 99).collect();
            let x = cpu.upload(rows, inputs, &data)?;
            let call = Dense { activation, ..Dense::new(&x, weight) };
            let y = cpu.download(&cpu.dense(&call)?)?;
            // The reference is slow: one row suffices, since rows share code but for their place in a panel.
            let row = rows - 1;
            let want = {
                let r = Reference;
                let x = r.upload(1, inputs, &data[row * inputs..])?;
                pi0_device::dense(&r, &Dense { activation, ..Dense::new(&x, &r.prepare(&source)?) })?
            };
            let agreement = compare(y.row(row), &want.data);
            if agreement.relative_l2.is_nan() || agreement.relative_l2 > 0.05 {
                return Err(format!("{name}: {agreement}").into());
            }
            let mut turns = weights.iter().cycle();
            let seconds = time(|| {
                let weight = turns.next().expect("there is one");
                drop(cpu.dense(&Dense { weight, ..call }));
            })
            .as_secs_f64();
            let gflops = 2e-9 * (rows * inputs * total) as f64 / seconds;
            println!(
                "| {name} | {rows} x {inputs} x {total} | {:.3} | {gflops:.0} | {:.1} % | {:.1} | {:.1e} |",
                seconds * 1e3,
                100.0 * gflops / peak.unwrap_or(f64::NAN),
                (inputs * total * bytes) as f64 / seconds / 1e9,
                agreement.relative_l2,
            );
        }
    }
    Ok(())
}
