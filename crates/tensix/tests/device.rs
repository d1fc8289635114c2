//! The device as a whole: opening, errors, harvested grids, repetition.

mod common;

use std::path::{Path, PathBuf};

use common::{open, open_with, put, random};
use pi0_device::{
    Attention, Device, Error, KeyValue, Keys, LinearPart, Modulation, NormKind, Span, TensorSource,
    WeightSource,
};
use pi0_tensix::{Fault, OpenError, Tensix, TensixOptions, TransportError};

#[test]
fn it_describes_itself() {
    let Some(device) = open() else { return };
    let info = device.describe();
    println!("{info}");
    assert_eq!((info.arch, info.transport), ("Wormhole B0", "ttsim"));
    assert_eq!(info.usable_grid, (8, 10 - info.harvested_rows));
    assert_eq!(info.grid, info.usable_grid);
    assert!(info.dram_bytes == 12 << 30 && info.l1_bytes == 1464 * 1024);
}

#[test]
fn a_file_that_is_no_simulator_is_an_error() {
    let attempt = |path: PathBuf| {
        let options = TensixOptions { simulator: Some(path), ..Default::default() };
        match Tensix::open(&options) {
            Err(OpenError::Fault(Fault::Transport(e @ TransportError::Library { .. }))) => e.to_string(),
            Err(e) => panic!("{e}"),
            Ok(_) => panic!("it opened"),
        }
    };
    assert!(attempt("/nowhere/libttsim.so".into()).contains("no such file"));
    let no_library = attempt(Path::new(env!("CARGO_MANIFEST_DIR")).join("Cargo.toml"));
    assert!(no_library.contains("Cargo.toml"), "{no_library}");
    // A library of another kind.
    let libm = ["/lib/x86_64-linux-gnu/libm.so.6", "/lib/aarch64-linux-gnu/libm.so.6", "/lib64/libm.so.6"];
    if let Some(libm) = libm.into_iter().map(PathBuf::from).find(|p| p.exists()) {
        assert!(attempt(libm).contains("not a ttsim library"));
    }
}

/// The variable that names the simulator cannot be taken away inside this process: the test runs itself without it.
#[test]
#[cfg(not(feature = "silicon"))]
fn without_a_simulator_there_is_no_device() {
    const SIMULATOR: &str = "TT_METAL_SIMULATOR";
    if std::env::var_os(SIMULATOR).is_some() {
        let this = "without_a_simulator_there_is_no_device";
        let mut again = std::process::Command::new(std::env::current_exe().unwrap());
        let output = again.args([this, "--exact"]).env_remove(SIMULATOR).output().unwrap();
        let printed = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success() && printed.contains("1 passed"), "{printed}");
        return;
    }
    let error = Tensix::open(&TensixOptions::default()).err().expect("no device");
    assert_eq!(error, OpenError::NoDevice);
    assert!(error.to_string().contains("set TT_METAL_SIMULATOR"), "{error}");
}

#[test]
fn a_tensor_too_large_for_the_device_is_an_error_and_harms_nothing() {
    let Some(device) = open() else { return };
    let x = put(&device, &random(1, 32, 8192, 1.0));
    let used = device.stats().dram_used;
    // One more copy than all of the memory could hold.
    let copies = device.dram_capacity() as usize / (32 * 8192 * 4) + 1;
    let error = device.concat_rows(&vec![&x; copies]).unwrap_err();
    assert!(matches!(error, Error::Failed { .. }), "{error}");
    assert!(error.to_string().contains("out of device memory"), "{error}");
    assert_eq!(device.stats().dram_used, used);
    assert!(device.gelu(&x).is_ok());
}

#[test]
fn what_does_not_fit_a_core_is_unsupported_and_harms_nothing() {
    let Some(device) = open() else { return };
    // The scores of 32 queries stay in L1: 4 KiB for each 32 keys.
    let keys = 9000;
    let (q, kv) = (put(&device, &random(1, 1, 32, 1.0)), put(&device, &random(2, keys, 32, 1.0)));
    let attend = |keys| {
        let spans = [Span { queries: 0..1, keys: vec![Keys { part: 0, rows: 0..keys }] }];
        let spec = Attention { heads: 1, kv_heads: 1, head_dim: 32, scale: 0.2, spans: &spans };
        device.attention(&q, &[KeyValue { k: &kv, v: &kv }], &spec)
    };
    let error = attend(keys).unwrap_err();
    assert!(error.is_unsupported() && error.to_string().contains("bytes of L1"), "{error}");
    assert!(attend(6900).is_ok());
}

#[test]
fn a_grid_larger_than_the_device_is_an_error() {
    if open().is_none() {
        return;
    }
    for grid in [(9, 8), (8, 11), (0, 1)] {
        match Tensix::open(&TensixOptions { grid: Some(grid), ..Default::default() }) {
            Err(OpenError::Grid { wanted, .. }) => assert_eq!(wanted, grid),
            Err(e) => panic!("{e}"),
            Ok(_) => panic!("{grid:?} opened"),
        }
    }
}

/// A layer of everything: norm-free, but linear, attention, rope, gather and vector kernels.
fn block(device: &Tensix) -> Vec<f32> {
    let (rows, width) = (75, 96);
    let x = random(1, rows, width, 1.0);
    let part = |seed, out, inputs| LinearPart {
        weight: TensorSource::from_f32("w", vec![out, inputs], &random(seed, out, inputs, 0.1).data).unwrap(),
        bias: Some(TensorSource::from_f32("b", vec![out], &random(seed + 9, 1, out, 1.0).data).unwrap()),
        columns: None,
    };
    let qkv =
        WeightSource::Linear { parts: (0..3).map(|i| part(3 + i, width, width)).collect(), exact: false };
    let up = WeightSource::Linear { parts: vec![part(20, 256, width)], exact: false };
    let (qkv, up) = (device.prepare(&qkv).unwrap(), device.prepare(&up).unwrap());
    let positions: Vec<u32> = (0..rows as u32).collect();
    let x = put(device, &x);
    let y = device.linear(&x, &qkv).unwrap();
    let [q, k, v] = [0, 1, 2].map(|i| device.slice_cols(&y, i * width..(i + 1) * width).unwrap());
    let q = device.rope(&q, &positions, 24).unwrap();
    let spans = [Span { queries: 0..rows, keys: vec![Keys { part: 0, rows: 0..rows }] }];
    let spec = Attention { heads: 4, kv_heads: 4, head_dim: 24, scale: 0.2, spans: &spans };
    let a = device.attention(&q, &[KeyValue { k: &k, v: &v }], &spec).unwrap();
    let h = device.add_scaled(&x, &a, 0.5).unwrap();
    let h = device.geglu(&device.linear(&h, &up).unwrap()).unwrap();
    device.download(&h).unwrap().data
}

#[test]
fn every_grid_and_every_run_gives_the_same_bits() {
    let Some(device) = open_with(&TensixOptions { grid: Some((8, 8)), ..Default::default() }) else { return };
    let want = block(&device);
    assert!(want.iter().any(|&v| v != 0.0));
    assert_eq!(block(&device), want, "a second run");
    for grid in [(8, 7), (3, 2), (1, 1)] {
        let harvested = open_with(&TensixOptions { grid: Some(grid), ..Default::default() }).unwrap();
        assert_eq!(harvested.describe().grid, grid);
        assert_eq!(block(&harvested), want, "{grid:?}");
    }
}

/// Keys and values that stay in a core's memory, by heads and rows of queries of two robots, and where they do not.
#[test]
fn keys_that_stay_give_the_same_bits_on_every_grid() {
    let (rows, heads, width) = (192, 6, 64);
    fn attend<D: Device>(device: &D, rows: usize, heads: usize, width: usize) -> pi0_device::HostTensor {
        let tensor = |seed, rows, cols| put(device, &random(seed, rows, cols, 1.0));
        let (q, k, v) =
            (tensor(1, rows, heads * width), tensor(2, 256, 2 * width), tensor(3, 256, 2 * width));
        let of = |robot: usize| Span {
            queries: 96 * robot..96 * (robot + 1),
            keys: vec![Keys { part: 0, rows: 128 * robot..128 * (robot + 1) }],
        };
        let spans = [of(0), of(1)];
        let spec = Attention { heads, kv_heads: 2, head_dim: width, scale: 0.125, spans: &spans };
        device.download(&device.attention(&q, &[KeyValue { k: &k, v: &v }], &spec).unwrap()).unwrap()
    }
    let Some(device) = open() else { return };
    let want = attend(&device, rows, heads, width);
    let reference = attend(&pi0_device::Reference, rows, heads, width);
    common::check("keys that stay", &want, &reference, 0.999_99, 4e-3);
    for grid in [(8, 7), (3, 2), (1, 1)] {
        let harvested = open_with(&TensixOptions { grid: Some(grid), ..Default::default() }).unwrap();
        assert!(attend(&harvested, rows, heads, width) == want, "{grid:?}");
    }
}

/// Rows that several cores share, each with a part of the result.
#[test]
fn norms_give_the_same_bits_on_every_grid() {
    let norms = |device: &Tensix| {
        let (rows, cols) = (51, 1024);
        let x = put(device, &random(1, rows, cols, 2.0));
        let vector =
            |seed| TensorSource::from_f32("w", vec![cols], &random(seed, 1, cols, 1.0).data).unwrap();
        let table = put(device, &random(5, 2, 3 * cols, 0.5));
        let mut results = Vec::new();
        for (kind, bias) in [(NormKind::Layer, Some(vector(3))), (NormKind::Rms, None)] {
            let norm = WeightSource::Norm { kind, weight: vector(2), bias, eps: 1e-6 };
            let norm = device.prepare(&norm).unwrap();
            let y = match kind {
                NormKind::Layer => device.layer_norm(&x, &norm),
                NormKind::Rms => device.rms_norm(&x, &norm),
            };
            results.push(device.download(&y.unwrap()).unwrap());
        }
        for rows in [vec![1; rows], (0..rows as u32).map(|r| r % 2).collect()] {
            let by = Modulation { table: &table, rows: &rows };
            results.push(device.download(&device.ada_rms_norm(&x, &by).unwrap()).unwrap());
        }
        results
    };
    let Some(device) = open_with(&TensixOptions { grid: Some((1, 1)), ..Default::default() }) else { return };
    let want = norms(&device);
    for grid in [(8, 10), (3, 2), (2, 1)] {
        let device = open_with(&TensixOptions { grid: Some(grid), ..Default::default() }).unwrap();
        assert!(norms(&device) == want, "{grid:?}");
    }
}

#[test]
fn a_thousand_launches_leak_nothing() {
    let Some(device) = open() else { return };
    let x = put(&device, &random(1, 40, 40, 1.0));
    let first = device.gelu(&x).unwrap();
    let (before, want) = (device.stats(), device.download(&first).unwrap());
    for _ in 0..1000 {
        let y = device.gelu(&x).unwrap();
        drop(device.slice_rows(&y, 0..10).unwrap());
    }
    let after = device.stats();
    assert_eq!(device.download(&device.gelu(&x).unwrap()).unwrap(), want);
    assert_eq!(after.launches - before.launches, 1000);
    assert_eq!((after.kernels, after.dram_used), (before.kernels, before.dram_used));
}

#[test]
fn bad_operands_are_errors_and_harm_nothing() {
    let Some(device) = open() else { return };
    let (x, y) = (put(&device, &random(1, 40, 40, 1.0)), put(&device, &random(2, 7, 33, 1.0)));
    let shape = |r: Result<_, Error>| assert!(matches!(r, Err(Error::Shape { .. })), "{:?}", r.err());
    shape(device.add(&x, &y));
    shape(device.add_scaled(&x, &y, 1.0));
    shape(device.geglu(&y));
    shape(device.rope(&x, &[0; 40], 7));
    shape(device.rope(&x, &[0; 3], 8));
    shape(device.concat_rows(&[&x, &y]));
    shape(device.concat_rows(&[]));
    shape(device.slice_rows(&x, 30..41));
    shape(device.slice_cols(&x, 5..5));
    shape(device.upload(2, 2, &[1.0; 3]));
    assert!(device.gelu(&x).is_ok());
}

/// Recorded, and run when somebody asks: the same bits as one by one, on any grid.
#[test]
fn command_lists_give_the_same_bits() {
    let Some(device) = open_with(&TensixOptions { grid: Some((3, 2)), ..Default::default() }) else { return };
    let want = block(&device);
    assert_eq!((device.stats().starts, device.stats().list_bytes), (0, 0));
    for grid in [(3, 2), (1, 1), (4, 4)] {
        let options = TensixOptions { grid: Some(grid), command_lists: Some(true), ..Default::default() };
        let listed = open_with(&options).unwrap();
        assert_eq!(block(&listed), want, "{grid:?}");
        assert_eq!(listed.stats().starts, 1, "one start for the whole layer");
        assert!(listed.stats().list_bytes > 0);
    }
}

/// What was recorded last time is in device memory already; memory that waiting commands use is not given away.
#[test]
fn a_second_inference_writes_no_commands() {
    let options = TensixOptions { grid: Some((2, 2)), command_lists: Some(true), ..Default::default() };
    let Some(device) = open_with(&options) else { return };
    let (x, y) = (put(&device, &random(1, 70, 70, 1.0)), put(&device, &random(2, 70, 70, 1.0)));
    let infer = |noise: u64| {
        let mut h = device.gelu(&x).unwrap();
        for _ in 0..5 {
            h = device.add_scaled(&h, &y, 0.5).unwrap();
            h = device.silu(&h).unwrap();
            // An upload in the midst of it.
            h = device.add(&h, &put(&device, &random(noise, 70, 70, 1.0))).unwrap();
        }
        device.download(&h).unwrap()
    };
    let first = infer(7);
    let before = device.stats();
    assert_eq!(before.starts, 1);
    assert_ne!(infer(8), first);
    assert_eq!(infer(7), first);
    let after = device.stats();
    assert_eq!((after.list_bytes, after.dram_used), (before.list_bytes, before.dram_used));
    assert_eq!((after.starts, after.launches), (3, 3 * before.launches));
    for _ in 0..300 {
        infer(9);
    }
    assert_eq!(device.stats().dram_used, before.dram_used);
}
