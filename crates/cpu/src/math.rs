//! Scalar functions without branches, which the compiler turns into vectors of whatever width a loop is
//! compiled for, and the macro that compiles a loop once for each instruction set.
//!
//! `FMA` says whether a fused multiply-add is one instruction; elsewhere it would be a slow library call.

/// Defines `fn name(isa, args…)`, which runs `body::<FMA>(args…)` compiled for the widest vectors of `isa`. The
/// body is `#[inline(always)]`. The caller passes only instruction sets that are present ([`Cpu::new`] checks).
///
/// [`Cpu::new`]: crate::Cpu::new
macro_rules! per_isa {
    ($(#[$attr:meta])* $vis:vis fn $name:ident($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $body:ident) => {
        $(#[$attr])*
        #[allow(clippy::too_many_arguments)]
        $vis fn $name(isa: $crate::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    $body::<true>($($arg),*)
                }
                #[target_feature(enable = "avx2,fma")]
                #[allow(clippy::too_many_arguments)]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    $body::<true>($($arg),*)
                }
                use $crate::Isa;
                match isa {
                    Isa::Avx512 | Isa::Avx512Vnni | Isa::Avx512Bf16 | Isa::Amx => {
                        // SAFETY: the device's instruction set was found present when it was opened.
                        return unsafe { avx512($($arg),*) };
                    }
                    // SAFETY: as above.
                    Isa::Avx2 | Isa::Avx2Vnni => return unsafe { avx2($($arg),*) },
                    Isa::Portable | Isa::Neon | Isa::NeonDot | Isa::NeonBf16 => {}
                }
            }
            let _ = isa;
            $body::<{ cfg!(target_arch = "aarch64") }>($($arg),*)
        }
    };
}
pub(crate) use per_isa;

/// `a * b + c`.
#[inline(always)]
pub(crate) fn fma<const FMA: bool>(a: f32, b: f32, c: f32) -> f32 {
    if FMA { a.mul_add(b, c) } else { a * b + c }
}

/// 1.5 * 2^23: adding it rounds to an integer that sits in the low bits.
pub(crate) const MAGIC: f32 = 12_582_912.0;

/// Highest first, the polynomial of this degree with `1` at 0 that is nearest to `e^x` for `x` within ± ln 2 / 2: to 9.2e-8
/// relative.
const EXP: [f32; 6] = [0.008_290_315, 0.041_897_93, 0.166_676_36, 0.499_991_5, 0.999_999_7, 1.0];

/// `e^x` to about 2e-7 relative, between `e^-87` and `e^88`, where it stays constant. NaN stays NaN.
#[inline(always)]
pub(crate) fn exp<const FMA: bool>(x: f32) -> f32 {
    // Comparisons instead of `clamp`, whose assertions cost, and `max`, which would drop NaN.
    let x = if x < -87.0 { -87.0 } else { x };
    let x = if x > 88.0 { 88.0 } else { x };
    let shifted = fma::<FMA>(x, std::f32::consts::LOG2_E, MAGIC);
    let n = shifted - MAGIC;
    // ln 2 in two pieces: the first has few bits, so its product with n is exact.
    let r = fma::<FMA>(n, -0.693_359_4, x);
    let r = fma::<FMA>(n, 2.121_944_4e-4, r);
    let mut p = EXP[0];
    for &c in &EXP[1..] {
        p = fma::<FMA>(p, r, c);
    }
    let exponent = shifted.to_bits().wrapping_sub(MAGIC.to_bits()).wrapping_add(127) << 23;
    p * f32::from_bits(exponent)
}

/// Highest first, the polynomial of this degree with 1 at 0 that is nearest to `2^x` for `x` within a half: to 9.2e-8
/// relative.
#[expect(clippy::approx_constant, reason = "fitted together with the others, and not ln 2")]
pub(crate) const EXP2: [f32; 6] =
    [1.326_472_7e-3, 9.671_513e-3, 5.550_733_6e-2, 0.240_222_42, 0.693_147, 1.0];

/// `x / (1 + 2^u)`, the power to about 2e-7 relative, between `2^-126` and `2^127`, where it stays constant.
#[inline(always)]
fn logistic<const FMA: bool>(x: f32, u: f32) -> f32 {
    // Comparisons as in `exp`.
    let u = if u < -126.0 { -126.0 } else { u };
    let u = if u > 127.0 { 127.0 } else { u };
    let shifted = u + MAGIC;
    let r = u - (shifted - MAGIC);
    let mut p = EXP2[0];
    for &c in &EXP2[1..] {
        p = fma::<FMA>(p, r, c);
    }
    // The whole number sits in the low bits, and the exponent takes it. What becomes of NaN does not matter: so is `x`.
    x / (1.0 + f32::from_bits(p.to_bits().wrapping_add(shifted.to_bits() << 23)))
}

/// Of [`gelu`], in powers of two: -2 sqrt(2/π) log2(e), and 0.044715 times that.
pub(crate) const GELU: [f32; 2] = [-2.302_208_2, -0.102_943_24];

/// `0.5 x (1 + tanh(sqrt(2/π) (x + 0.044715 x³)))`, as `x` times a logistic function.
#[inline(always)]
pub(crate) fn gelu<const FMA: bool>(x: f32) -> f32 {
    logistic::<FMA>(x, x * fma::<FMA>(x * x, GELU[1], GELU[0]))
}

/// `x / (1 + e^-x)`.
#[inline(always)]
pub(crate) fn silu<const FMA: bool>(x: f32) -> f32 {
    logistic::<FMA>(x, x * -std::f32::consts::LOG2_E)
}

/// Sums `f(x[i], i)` in 32 lanes, then pairwise: the order depends only on the length.
#[inline(always)]
pub(crate) fn sum_by(x: &[f32], f: impl Fn(f32) -> f32) -> f32 {
    const LANES: usize = 32;
    let mut lanes = [0.0f32; LANES];
    let chunks = x.chunks_exact(LANES);
    let rest = chunks.remainder();
    for chunk in chunks {
        for i in 0..LANES {
            lanes[i] += f(chunk[i]);
        }
    }
    for (lane, &x) in lanes.iter_mut().zip(rest) {
        *lane += f(x);
    }
    sum_lanes(lanes)
}

/// The sum of a power of two of lanes, halves on halves.
#[inline(always)]
pub(crate) fn sum_lanes<const LANES: usize>(mut lanes: [f32; LANES]) -> f32 {
    let mut width = LANES / 2;
    while width > 0 {
        for i in 0..width {
            lanes[i] += lanes[i + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// Rounds to the nearest bf16, ties to even. NaN stays NaN.
#[inline(always)]
pub(crate) fn to_bf16(x: f32) -> u16 {
    let bits = x.to_bits();
    let rounded = bits.wrapping_add(0x7fff + ((bits >> 16) & 1)) >> 16;
    let quiet = (bits >> 16) | 0x40;
    (if x.is_nan() { quiet } else { rounded }) as u16
}

/// The value of a bf16.
#[inline(always)]
pub(crate) fn from_bf16(x: u16) -> f32 {
    f32::from_bits(u32::from(x) << 16)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn exp_is_close_and_keeps_nan() {
        for i in -87_000..88_000 {
            let x = i as f32 / 1000.0;
            let want = f64::from(x).exp();
            for got in [exp::<true>(x), exp::<false>(x)] {
                assert!((f64::from(got) / want - 1.0).abs() < 3e-7, "exp({x}) = {got}, wanted {want}");
            }
        }
        assert!(exp::<true>(f32::NAN).is_nan() && gelu::<true>(f32::NAN).is_nan());
        assert!(exp::<true>(-1000.0) < 2e-38 && exp::<true>(1000.0) > 1e38);
    }

    #[test]
    fn activations_are_close_far_out_too() {
        for i in -4000..4000 {
            let x = i as f32 / 100.0;
            let d = f64::from(x);
            let want =
                0.5 * d * (1.0 + ((2.0 / std::f64::consts::PI).sqrt() * (d + 0.044715 * d * d * d)).tanh());
            assert!((f64::from(gelu::<true>(x)) - want).abs() < 1e-6 * (1.0 + d.abs()), "gelu({x})");
            let want = d / (1.0 + (-d).exp());
            assert!((f64::from(silu::<true>(x)) - want).abs() < 1e-6 * (1.0 + d.abs()), "silu({x})");
        }
    }

    #[test]
    fn bf16_rounds_to_even() {
        for (x, want) in
            [(1.0, 0x3f80), (1.0 + 1.0 / 256.0, 0x3f80), (1.0 + 3.0 / 256.0, 0x3f82), (-2.0, 0xc000)]
        {
            assert_eq!(to_bf16(x), want, "{x}");
        }
        assert!(from_bf16(to_bf16(f32::NAN)).is_nan());
        assert!(from_bf16(to_bf16(f32::MAX)).is_infinite());
    }

    #[test]
    fn sums_cover_every_value() {
        for n in [0, 1, 31, 32, 33, 100] {
            let x: Vec<f32> = (0..n).map(|i| i as f32).collect();
            assert_eq!(sum_by(&x, |x| 2.0 * x), (n * n.max(1) - n) as f32);
        }
    }
}
