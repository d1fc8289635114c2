//! What the tests on the simulator share; each uses a part of it.

#![allow(dead_code)]

use pi0_device::{Agreement, Bound, Device, HostTensor, compare};
use pi0_tensix::{Tensix, TensixOptions};

/// Opens the device, or says that the test is skipped.
pub fn open() -> Option<Tensix> {
    // A few cores: the simulator pays for all that wait for each other.
    let lists = std::env::var_os("PI0_TENSIX_LISTS").is_some();
    open_with(&TensixOptions {
        grid: lists.then_some((4, 2)),
        command_lists: lists.then_some(true),
        bfp8: bfp8(),
        ..TensixOptions::default()
    })
}

/// Whether weights are bfp8, as the variable `PI0_TENSIX_BFP8` asks the tests `model` and `demo` for.
pub fn bfp8() -> bool {
    std::env::var_os("PI0_TENSIX_BFP8").is_some()
}

/// The same with options.
pub fn open_with(options: &TensixOptions) -> Option<Tensix> {
    if std::env::var_os("TT_METAL_SIMULATOR").is_none_or(|v| v.is_empty()) {
        eprintln!("skipped: set TT_METAL_SIMULATOR to Tenstorrent's libttsim.so for Wormhole");
        return None;
    }
    Some(Tensix::open(options).expect("TT_METAL_SIMULATOR names a simulator that works"))
}

/// Deterministic values, roughly normal with the given standard deviation.
pub fn random(seed: u64, rows: usize, cols: usize, deviation: f32) -> HostTensor {
    let mut state = seed.wrapping_mul(0x9E37_79B9_7F4A_7C15) | 1;
    let mut uniform = move || {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        (state >> 40) as f32 / (1u64 << 24) as f32
    };
    let normal = |_| ((0..12).map(|_| uniform()).sum::<f32>() - 6.0) * deviation;
    HostTensor::new([rows, cols], (0..rows * cols).map(normal).collect())
}

/// Brings a host tensor to a device.
pub fn put<D: Device>(d: &D, x: &HostTensor) -> D::Tensor {
    d.upload(x.rows(), x.cols(), &x.data).expect("an upload")
}

/// Compares results and asserts a bound on correlation and relative L2.
pub fn check(what: &str, got: &HostTensor, want: &HostTensor, pcc: f64, relative_l2: f64) -> Agreement {
    assert_eq!(got.shape, want.shape, "{what}");
    let agreement = compare(&got.data, &want.data);
    println!("{what}: {agreement}");
    let bound = Bound { pcc, relative_l2, max_abs: f64::INFINITY };
    assert!(bound.holds(&agreement), "{what}: {agreement}, wanted pcc {pcc}, relative L2 {relative_l2}");
    agreement
}
