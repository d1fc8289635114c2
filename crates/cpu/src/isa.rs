//! Which instructions this processor has. Chosen once, when the device opens.

use std::fmt;
use std::str::FromStr;

/// An instruction set with its own kernels, from the plainest to the fastest.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Isa {
    /// Rust without processor-specific instructions; the compiler uses what every processor of the target has.
    Portable,
    /// AArch64 with its fused multiply-add.
    Neon,
    /// The same with int8 dot products (FEAT_DotProd): Cortex-A76, Neoverse N1, Apple M1 and later.
    NeonDot,
    /// The same with products of small bf16 and int8 matrices (FEAT_BF16, FEAT_I8MM): Neoverse N2 and V1, Apple M2
    /// and later.
    NeonBf16,
    /// AVX2 with FMA.
    Avx2,
    /// The same with int8 dot products (AVX-VNNI): Alder Lake, Zen 5 and later.
    Avx2Vnni,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// The same with int8 dot products (AVX512-VNNI): Cascade Lake, Ice Lake, Tiger Lake.
    Avx512Vnni,
    /// The same with bf16 dot products as well: Zen 4, Cooper Lake and later.
    Avx512Bf16,
    /// The same and AMX tiles for bf16 and int8: Sapphire Rapids and later.
    Amx,
}

impl Isa {
    /// All of them.
    pub const ALL: [Isa; 10] = [
        Isa::Portable,
        Isa::Neon,
        Isa::NeonDot,
        Isa::NeonBf16,
        Isa::Avx2,
        Isa::Avx2Vnni,
        Isa::Avx512,
        Isa::Avx512Vnni,
        Isa::Avx512Bf16,
        Isa::Amx,
    ];

    /// The fastest one that this processor and system allow.
    pub fn detect() -> Isa {
        Self::available().last().copied().unwrap_or(Isa::Portable)
    }

    /// Every one that this processor and system allow, slowest first.
    pub fn available() -> Vec<Isa> {
        Self::ALL.into_iter().filter(|isa| isa.is_present()).collect()
    }

    /// Whether processors of this architecture can have it.
    pub fn is_native(self) -> bool {
        match self {
            Isa::Portable => true,
            Isa::Neon | Isa::NeonDot | Isa::NeonBf16 => cfg!(target_arch = "aarch64"),
            Isa::Avx2 | Isa::Avx2Vnni | Isa::Avx512 | Isa::Avx512Vnni | Isa::Avx512Bf16 | Isa::Amx => {
                cfg!(target_arch = "x86_64")
            }
        }
    }

    /// Whether this processor and system allow it.
    #[cfg(target_arch = "x86_64")]
    pub fn is_present(self) -> bool {
        use std::arch::is_x86_feature_detected as has;
        let avx2 = || has!("avx2") && has!("fma");
        let avx512 = || avx2() && has!("avx512f") && has!("avx512bw") && has!("avx512dq") && has!("avx512vl");
        let vnni = || avx512() && has!("avx512vnni");
        let bf16 = || vnni() && has!("avx512bf16");
        match self {
            Isa::Portable => true,
            Isa::Neon | Isa::NeonDot | Isa::NeonBf16 => false,
            Isa::Avx2 => avx2(),
            Isa::Avx2Vnni => avx2() && has!("avxvnni"),
            Isa::Avx512 => avx512(),
            Isa::Avx512Vnni => vnni(),
            Isa::Avx512Bf16 => bf16(),
            Isa::Amx => bf16() && amx_granted(),
        }
    }

    /// Whether this processor and system allow it.
    #[cfg(target_arch = "aarch64")]
    pub fn is_present(self) -> bool {
        use std::arch::is_aarch64_feature_detected as has;
        let dot = || has!("neon") && has!("dotprod");
        match self {
            Isa::Portable => true,
            Isa::Neon => has!("neon"),
            Isa::NeonDot => dot(),
            Isa::NeonBf16 => dot() && has!("bf16") && has!("i8mm"),
            _ => false,
        }
    }

    /// Whether this processor and system allow it.
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    pub fn is_present(self) -> bool {
        self == Isa::Portable
    }

    /// Whether weights in bf16 are multiplied with activations in bf16.
    pub fn multiplies_bf16(self) -> bool {
        matches!(self, Isa::NeonBf16 | Isa::Avx512Bf16 | Isa::Amx)
    }

    /// The name used on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Isa::Portable => "portable",
            Isa::Neon => "neon",
            Isa::NeonDot => "neon-dot",
            Isa::NeonBf16 => "neon-bf16",
            Isa::Avx2 => "avx2",
            Isa::Avx2Vnni => "avx2-vnni",
            Isa::Avx512 => "avx512",
            Isa::Avx512Vnni => "avx512-vnni",
            Isa::Avx512Bf16 => "avx512-bf16",
            Isa::Amx => "amx",
        }
    }
}

impl fmt::Display for Isa {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl FromStr for Isa {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        Self::ALL.into_iter().find(|isa| isa.name() == name).ok_or_else(|| {
            let names: Vec<_> = Self::ALL.iter().map(|isa| isa.name()).collect();
            format!("no instruction set is called {name}; there are {}", names.join(", "))
        })
    }
}

/// Whether the processor has AMX tiles, bf16 and int8, and the system lets this process use them. Asked once.
#[cfg(target_arch = "x86_64")]
fn amx_granted() -> bool {
    use std::sync::LazyLock;
    static GRANTED: LazyLock<bool> = LazyLock::new(|| {
        const BF16: u32 = 1 << 22;
        const TILE: u32 = 1 << 24;
        const INT8: u32 = 1 << 25;
        #[allow(unused_unsafe)] // safe functions since Rust 1.94
        // SAFETY: `cpuid` exists on every x86-64 processor; leaf 7 is read only if leaf 0 says it is there.
        let features = unsafe {
            match std::arch::x86_64::__cpuid(0).eax {
                0..=6 => 0,
                _ => std::arch::x86_64::__cpuid_count(7, 0).edx,
            }
        };
        features & (BF16 | TILE | INT8) == BF16 | TILE | INT8 && request_tiles()
    });
    *GRANTED
}

/// Linux gives the large tile registers only to processes that ask for them; other systems are not supported.
#[cfg(target_arch = "x86_64")]
fn request_tiles() -> bool {
    #[cfg(target_os = "linux")]
    {
        const ARCH_REQ_XCOMP_PERM: libc::c_long = 0x1023;
        const XFEATURE_XTILEDATA: libc::c_long = 18;
        // SAFETY: this call takes two numbers, touches no memory of ours, and fails on a kernel without it.
        unsafe { libc::syscall(libc::SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0 }
    }
    #[cfg(not(target_os = "linux"))]
    false
}
