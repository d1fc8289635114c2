//! What the tests share: a device, if there is any, and numbers.
#![allow(dead_code)]

pub use pi0_device::Bound;
use pi0_device::{Device, HostTensor, LinearPart, NormKind, Reference, TensorSource, WeightSource, compare};
use pi0_vulkan::{Format, Products, Unit, Units, Vulkan, VulkanError, VulkanOptions};

/// Kernels in f32 differ from the reference by the rounding of f32 sums.
pub const F32: Bound = Bound { pcc: 0.999_999, relative_l2: 2e-6, max_abs: 2e-4 };
/// Weights rounded to 8 bits of precision.
pub const BF16: Bound = Bound { pcc: 0.999_99, relative_l2: 5e-3, max_abs: 0.06 };
/// Weights rounded to 127 steps of their row's largest value.
pub const INT8: Bound = Bound { pcc: 0.999_5, relative_l2: 2.5e-2, max_abs: 0.5 };

/// Opens the first GPU; without any the test is skipped, unless `PI0_REQUIRE_VULKAN` is set.
pub fn open_with(options: VulkanOptions) -> Option<Vulkan> {
    match Vulkan::open(options) {
        Ok(device) => Some(device),
        Err(e @ (VulkanError::NoLoader(_) | VulkanError::NoDriver | VulkanError::Lacks { .. })) => {
            assert!(std::env::var_os("PI0_REQUIRE_VULKAN").is_none(), "PI0_REQUIRE_VULKAN is set: {e}");
            eprintln!("skipped: {e}");
            None
        }
        Err(e) => panic!("{e}"),
    }
}

/// Operands of products rounded to 11 bits of precision: each product is off by up to 2^-11, and the errors average out.
pub const F16: Bound = Bound { pcc: 0.999_999, relative_l2: 1e-3, max_abs: 0.02 };

/// Operands of products rounded to bf16, 8 bits of precision: eight times as far off.
pub const ROUNDED: Bound = Bound { pcc: 0.999_95, relative_l2: 8e-3, max_abs: 0.16 };

/// Products in f32.
pub fn open() -> Option<Vulkan> {
    open_with(VulkanOptions { products: Products::MultiplyAdds, ..Default::default() })
}

/// Everything that products can run on here: f32 multiply-adds first, then dot products and cooperative matrices where the
/// format and the driver have them, also those that the device would not choose; each with how far products may be off.
pub fn open_all(format: Format) -> Vec<(Vulkan, Bound)> {
    let options = |products| VulkanOptions { products, format, ..Default::default() };
    let Some(first) = open_with(options(Products::MultiplyAdds)) else { return vec![] };
    let units = match format {
        Format::F32 => vec![],
        _ => Units::all_of(first.info(), format == Format::Int8),
    };
    let others = units.iter().filter_map(|&u| open_with(options(Products::Only(u))));
    let devices: Vec<Vulkan> = [first].into_iter().chain(others).collect();
    let wanted = match format {
        Format::F32 => 1,
        Format::Int8 => 3,
        Format::Stored | Format::Bf16 => 2,
    };
    if devices.len() < wanted {
        let complaint = format!("{:?} has not all that products can run on", devices[0]);
        assert!(
            std::env::var_os("PI0_REQUIRE_MATRICES").is_none(),
            "PI0_REQUIRE_MATRICES is set, and {complaint}"
        );
        eprintln!("skipped in part: {complaint}");
    }
    let bound = |device: &Vulkan| match (format, device.products()) {
        (Format::Int8, _) => INT8,
        (Format::F32, _) | (_, Unit::F32) => F32,
        (_, Unit::Bf16) => ROUNDED,
        _ => F16,
    };
    let all = devices.into_iter().map(|d| {
        let bound = bound(&d);
        println!("{format:?}: products of {}", d.units().map_or("f32".into(), |u| u.to_string()));
        (d, bound)
    });
    all.collect()
}

/// Numbers around zero, the same each time.
pub struct Numbers(pub u64);

impl Numbers {
    pub fn uniform(&mut self) -> f32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        ((self.0 >> 40) as f32 / (1u64 << 23) as f32) - 1.0
    }

    pub fn values(&mut self, n: usize) -> Vec<f32> {
        (0..n).map(|_| self.uniform() + self.uniform() * self.uniform()).collect()
    }

    pub fn host(&mut self, rows: usize, cols: usize) -> HostTensor {
        HostTensor::new([rows, cols], self.values(rows * cols))
    }

    pub fn tensor(&mut self, shape: &[usize], scale: f32) -> TensorSource {
        let data: Vec<_> = self.values(shape.iter().product()).iter().map(|x| x * scale).collect();
        TensorSource::from_f32("test", shape.to_vec(), &data).unwrap()
    }

    pub fn linear(&mut self, outputs: &[usize], inputs: usize, bias: bool) -> WeightSource {
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

    pub fn norm(&mut self, kind: NormKind, width: usize) -> WeightSource {
        let bias = (kind == NormKind::Layer).then(|| self.tensor(&[width], 0.3));
        WeightSource::Norm { kind, weight: self.tensor(&[width], 0.3), bias, eps: 1e-6 }
    }
}

/// Brings rows to a device.
pub fn put<D: Device>(d: &D, t: &HostTensor) -> D::Tensor {
    d.upload(t.rows(), t.cols(), &t.data).unwrap()
}

/// A computation that any device can do.
pub trait Work {
    fn run<D: Device>(&self, d: &D) -> pi0_device::Result<Vec<D::Tensor>>;
}

/// Does it on the device and on the reference and compares.
#[track_caller]
pub fn agree(what: &str, device: &Vulkan, work: &impl Work, bound: Bound) {
    let got = work.run(device).unwrap_or_else(|e| panic!("{what}: {e}"));
    let want = work.run(&Reference).unwrap();
    for (i, (got, want)) in got.iter().zip(&want).enumerate() {
        let got = device.download(got).unwrap_or_else(|e| panic!("{what}: {e}"));
        assert_eq!(got.shape, want.shape, "{what}, result {i}");
        let agreement = compare(&got.data, &want.data);
        assert!(bound.holds(&agreement), "{what}, result {i}: {agreement}");
    }
}
