//! Layers of π0 while other programs want the processor, too: how much slower than alone.
//!
//! `cargo bench -p pi0-cpu --bench busy -- [--format f32|bf16|int8] [--threads N] [--others N] [--rounds N]`
//!
//! A round is two layers of the prefix and forty of the expert. Quiet and busy rounds take turns. While it is busy, so many
//! other threads do nothing but count, and the system shares the cores among all: of two cores, with two threads and one
//! other, between four thirds and one and a half are ours, and 1.33 to 1.5 times the time is fair. What the system grants
//! here and now is measured beside it: as many threads as ours, none of which ever waits for another, each time a round's
//! length. No division of work into tasks can do better.

use std::hint::black_box;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use pi0_cpu::{Cpu, CpuOptions, Format, Tensor, Weight};
use pi0_device::{
    Activation, Dense, Device, Dtype, Error, LinearPart, Reference, TensorSource, WeightSource, compare,
    dense,
};

/// Rows, inputs, outputs of each part, activation; and how often a round runs it.
type Layer = (usize, usize, &'static [usize], Option<Activation>, usize);

const LAYERS: [Layer; 7] = [
    (524, 2048, &[2048, 256, 256], None, 2),
    (524, 2048, &[16384, 16384], Some(Activation::Geglu), 2),
    (524, 16384, &[2048], None, 2),
    (51, 1024, &[2048, 256, 256], None, 40),
    (51, 2048, &[1024], None, 40),
    (51, 1024, &[4096, 4096], Some(Activation::Geglu), 40),
    (51, 4096, &[1024], None, 40),
];

struct Options {
    format: Format,
    threads: Option<usize>,
    others: usize,
    rounds: usize,
}

fn options() -> Result<Options, String> {
    let mut o = Options { format: Format::Int8, threads: None, others: 1, rounds: 9 };
    let mut args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    while let Some(arg) = args.next() {
        let value = args.next().ok_or_else(|| format!("{arg} wants a value"))?;
        let number = || value.parse::<usize>().map_err(|e| format!("{arg} {value}: {e}"));
        match arg.as_str() {
            "--format" => o.format = value.parse()?,
            "--threads" => o.threads = Some(number()?),
            "--others" => o.others = number()?,
            "--rounds" => o.rounds = number()?.max(1),
            _ => return Err(format!("unknown option {arg}")),
        }
    }
    Ok(o)
}

/// Uniform values around zero.
fn values(n: usize, mut state: u64) -> Vec<f32> {
    let mut next = || {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
    };
    (0..n).map(|_| next()).collect()
}

struct Prepared {
    x: Tensor,
    weight: Weight,
    activation: Option<Activation>,
    calls: usize,
}

impl Prepared {
    /// One layer, which gives what the reference gives.
    fn new(cpu: &Cpu, (rows, inputs, outputs, activation, calls): Layer) -> Result<Self, Error> {
        let scale = 2.0 / (inputs as f32).sqrt();
        let part = |(i, &n): (usize, &usize)| {
            let narrow = |x: &f32| ((x * scale).to_bits() >> 16) as u16;
            let bytes: Vec<u8> =
                values(n * inputs, i as u64 + 1).iter().flat_map(|x| narrow(x).to_le_bytes()).collect();
            let bytes = pi0_device::Bytes::Owned(bytes.into());
            let weight = TensorSource::new("layer", Dtype::Bf16, vec![n, inputs], bytes)?;
            Ok(LinearPart { weight, bias: None, columns: None })
        };
        let parts = outputs.iter().enumerate().map(part).collect::<Result<_, Error>>()?;
        let source = WeightSource::Linear { parts, exact: false };
        let data = values(rows * inputs, 99);
        let (x, weight) = (cpu.upload(rows, inputs, &data)?, cpu.prepare(&source)?);
        let y = cpu.download(&cpu.dense(&Dense { activation, ..Dense::new(&x, &weight) })?)?;
        // The reference is slow: one row suffices.
        let r = Reference;
        let (last, packed) = (r.upload(1, inputs, &data[(rows - 1) * inputs..])?, r.prepare(&source)?);
        let want = dense(&r, &Dense { activation, ..Dense::new(&last, &packed) })?;
        let agreement = compare(y.row(rows - 1), &want.data);
        assert!(agreement.relative_l2 < 0.05, "{rows} x {inputs}: {agreement}");
        Ok(Self { x, weight, activation, calls })
    }
}

fn round(cpu: &Cpu, layers: &[Prepared]) -> Result<Duration, Error> {
    let start = Instant::now();
    for Prepared { x, weight, activation, calls } in layers {
        for _ in 0..*calls {
            black_box(cpu.dense(&Dense { activation: *activation, ..Dense::new(x, weight) })?);
        }
    }
    Ok(start.elapsed())
}

/// Counts on each of so many threads for so long, without waiting for anything: all steps together.
fn count(threads: usize, length: Duration) -> f64 {
    let counts = std::thread::scope(|scope| {
        let counting = || {
            let (start, mut count) = (Instant::now(), 0u64);
            while start.elapsed() < length {
                (0..1000).for_each(|_| count = black_box(count + 1));
            }
            count
        };
        let threads: Vec<_> = (0..threads).map(|_| scope.spawn(counting)).collect();
        threads.into_iter().map(|thread| thread.join().expect("it counts")).sum::<u64>()
    });
    counts as f64
}

/// Runs `what` beside so many threads that do nothing but count.
fn beside<R>(others: usize, what: impl FnOnce() -> R) -> R {
    let stop = AtomicBool::new(false);
    std::thread::scope(|scope| {
        for _ in 0..others {
            scope.spawn(|| {
                let mut count = 0u64;
                while !stop.load(Ordering::Relaxed) {
                    count = black_box(count + 1);
                }
            });
        }
        // Until the system has spread them.
        std::thread::sleep(Duration::from_millis(20));
        let result = what();
        stop.store(true, Ordering::Relaxed);
        result
    })
}

fn median(mut times: Vec<Duration>) -> f64 {
    times.sort();
    times[times.len() / 2].as_secs_f64() * 1e3
}

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let o = options()?;
    let cpu = Cpu::new(CpuOptions { threads: o.threads, format: o.format, ..CpuOptions::default() })?;
    let layers = LAYERS.into_iter().map(|layer| Prepared::new(&cpu, layer)).collect::<Result<Vec<_>, _>>()?;
    round(&cpu, &layers)?;
    let (mut quiet, mut busy, mut granted) = (Vec::new(), Vec::new(), Vec::new());
    for _ in 0..o.rounds {
        quiet.push(round(&cpu, &layers)?);
        busy.push(beside(o.others, || round(&cpu, &layers))?);
        let length = *quiet.last().expect("pushed above");
        let alone = count(cpu.threads(), length);
        granted.push(alone / beside(o.others, || count(cpu.threads(), length)));
    }
    granted.sort_by(f64::total_cmp);
    let (quiet, busy) = (median(quiet), median(busy));
    println!(
        "{}: {quiet:.1} ms alone, {busy:.1} ms beside others ({}), {:.2} times as long; threads that never wait {:.2} times",
        cpu.describe(),
        o.others,
        busy / quiet,
        granted[granted.len() / 2]
    );
    Ok(())
}
