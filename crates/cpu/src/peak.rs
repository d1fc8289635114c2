//! What this machine can do at most: multiplications on registers alone, and reads from memory. Kernels are judged
//! by their share of it. Each measurement takes a fraction of a second on all threads of a device.

use std::time::{Duration, Instant};

use crate::memory::{Block, Shared, fetch};
use crate::{Cpu, Isa};

/// How long one measurement lasts.
const LENGTH: Duration = Duration::from_millis(150);
/// Bytes that are read to measure memory: more than any cache holds.
const MEMORY: usize = 1 << 30;

/// The measured limits of a machine, all threads of the device together. None where the instructions are absent.
#[derive(Debug, Clone, Copy, Default, PartialEq)]
pub struct Peaks {
    /// Fused multiply-add in f32 with the widest vectors, GFLOP/s.
    pub f32: Option<f64>,
    /// Dot products of bf16 vectors (AVX-512, NEON), GFLOP/s.
    pub bf16_dot: Option<f64>,
    /// Dot products of int8 vectors (VNNI, NEON), GOP/s.
    pub int8_dot: Option<f64>,
    /// Products of bf16 matrices in registers (AMX tiles, NEON), GFLOP/s.
    pub bf16_tiles: Option<f64>,
    /// Products of int8 matrices in registers (AMX tiles, NEON), GOP/s.
    pub int8_tiles: Option<f64>,
    /// Reads of memory, GB/s.
    pub memory: f64,
}

impl Peaks {
    /// Measures on all threads of `cpu`, for its instruction set and all lesser ones.
    pub fn measure(cpu: &Cpu) -> Self {
        let has = |isa: Isa| isa <= cpu.isa() && isa.is_present();
        let rate = |present: bool, burst: fn() -> u64| present.then(|| rate(cpu, burst));
        #[cfg(target_arch = "x86_64")]
        {
            Self {
                f32: if has(Isa::Avx512) {
                    rate(true, x86::f32_avx512)
                } else {
                    rate(has(Isa::Avx2), x86::f32_avx2)
                },
                bf16_dot: rate(has(Isa::Avx512Bf16), x86::bf16_dot),
                int8_dot: if has(Isa::Avx512Vnni) {
                    rate(true, x86::int8_dot_512)
                } else {
                    rate(cpu.isa() == Isa::Avx2Vnni, x86::int8_dot_256)
                },
                bf16_tiles: rate(has(Isa::Amx), x86::bf16_tiles),
                int8_tiles: rate(has(Isa::Amx), x86::int8_tiles),
                memory: memory(cpu),
            }
        }
        #[cfg(target_arch = "aarch64")]
        {
            Self {
                f32: rate(has(Isa::Neon), aarch64::f32),
                bf16_dot: rate(has(Isa::NeonBf16), aarch64::bf16_dot),
                int8_dot: rate(has(Isa::NeonDot), aarch64::int8_dot),
                bf16_tiles: rate(has(Isa::NeonBf16), aarch64::bf16_matrix),
                int8_tiles: rate(has(Isa::NeonBf16), aarch64::int8_matrix),
                memory: memory(cpu),
            }
        }
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        {
            let _ = (has, rate);
            Self { memory: memory(cpu), ..Self::default() }
        }
    }

    /// The limit of the fastest bf16 products that `isa` has; f32 where it has none.
    pub fn bf16(&self, isa: Isa) -> Option<f64> {
        match isa {
            Isa::Amx | Isa::NeonBf16 => self.bf16_tiles,
            Isa::Avx512Bf16 => self.bf16_dot,
            _ => self.f32,
        }
    }
}

/// Billions of operations a second: `burst` does some and returns their number. The best burst of each thread
/// counts, because other users of the machine only make bursts longer.
fn rate(cpu: &Cpu, burst: fn() -> u64) -> f64 {
    let threads = cpu.threads();
    let rates: Vec<_> = (0..threads).map(|_| std::sync::Mutex::new(0.0f64)).collect();
    cpu.on_each_thread(&|i| {
        let (start, mut best) = (Instant::now(), 0.0f64);
        while start.elapsed() < LENGTH {
            let begin = Instant::now();
            let operations = burst();
            best = best.max(operations as f64 / begin.elapsed().as_secs_f64());
        }
        *rates[i].lock().unwrap_or_else(std::sync::PoisonError::into_inner) = best / 1e9;
    });
    rates.into_iter().map(|r| r.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)).sum()
}

/// GB/s of reads, all threads together: the best pass of three in each way to read.
fn memory(cpu: &Cpu) -> f64 {
    let block = Block::new(MEMORY);
    let start = Shared::new(block.as_ptr());
    const PIECE: usize = 4 << 20;
    let pieces = MEMORY / PIECE;
    // Written first: pages never touched are all the same page of zeros.
    cpu.in_parallel(pieces, &|i| {
        // SAFETY: piece `i` lies within the block and has one thread.
        unsafe { std::slice::from_raw_parts_mut(start.get().add(i * PIECE), PIECE) }.fill(i as u8);
    });
    let mut best = f64::INFINITY;
    for ahead in AHEAD.into_iter().flat_map(|ahead| [ahead; 3]) {
        let begin = Instant::now();
        cpu.in_parallel(pieces, &|i| {
            let words = &block.values::<u64>(MEMORY / 8)[i * PIECE / 8..(i + 1) * PIECE / 8];
            std::hint::black_box(read(cpu.isa(), words, ahead));
        });
        best = best.min(begin.elapsed().as_secs_f64());
    }
    MEMORY as f64 / best / 1e9
}

/// How many bytes ahead of its use memory is asked for: not at all, and as far as kernels do, past the end of a page of
/// 4 KB, where the processor's own prefetching stops.
const AHEAD: [usize; 3] = [0, 4096, 8192];

#[inline(always)]
fn read_body<const FMA: bool>(words: &[u64], ahead: usize) -> u64 {
    const LINES: usize = 4;
    let mut lanes = [0u64; 8 * LINES];
    let (chunks, _) = words.as_chunks::<{ 8 * LINES }>();
    for chunk in chunks {
        if ahead > 0 {
            (0..LINES).for_each(|line| fetch(chunk.as_ptr().wrapping_byte_add(ahead + line * 64)));
        }
        for (lane, word) in lanes.iter_mut().zip(chunk) {
            *lane ^= word;
        }
    }
    lanes.iter().fold(0, |a, b| a ^ b)
}

crate::math::per_isa! {
    fn read(words: &[u64], ahead: usize) -> u64 = read_body
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::asm;
    use std::arch::x86_64::*;
    use std::hint::black_box;

    use crate::kernels::Tiles;

    const ROUNDS: usize = 20_000;

    /// What a tile is filled with: bits that toggle, because multiplying zeros takes less power and so runs faster.
    static VALUES: [u16; 512] = {
        let (mut values, mut i) = ([0; 512], 0);
        while i < 512 {
            values[i] = 0x3f00 | (i as u16).wrapping_mul(40503) >> 8;
            i += 1;
        }
        values
    };

    /// Defines a burst of `ROUNDS` times 12 independent sums; the operands are opaque to the compiler, and its sums
    /// stay in registers.
    macro_rules! burst {
        ($name:ident, $inner:ident, $features:literal, $operations:literal, $zero:expr, $value:expr, $step:expr) => {
            pub(super) fn $name() -> u64 {
                #[target_feature(enable = $features)]
                fn $inner() {
                    let (mut acc, a) = ([$zero; 12], black_box($value));
                    for _ in 0..ROUNDS {
                        for acc in &mut acc {
                            *acc = $step(*acc, a);
                        }
                    }
                    black_box(acc);
                }
                // SAFETY: `Peaks::measure` calls this only where the instructions are present.
                unsafe { $inner() };
                (ROUNDS * 12 * $operations) as u64
            }
        };
    }

    burst!(f32_avx512, f32_512, "avx512f", 32, _mm512_setzero_ps(), _mm512_set1_ps(1.1), |acc, a| {
        _mm512_fmadd_ps(a, a, acc)
    });
    burst!(f32_avx2, f32_256, "avx2,fma", 16, _mm256_setzero_ps(), _mm256_set1_ps(1.1), |acc, a| {
        _mm256_fmadd_ps(a, a, acc)
    });
    burst!(
        bf16_dot,
        bf16_512,
        "avx512f,avx512bf16",
        64,
        _mm512_setzero_ps(),
        _mm512_set1_ps(1.1),
        |acc, a| {
            // SAFETY: both types are 512 bits, and any bits are bf16 values.
            let a = unsafe { std::mem::transmute::<__m512, __m512bh>(a) };
            _mm512_dpbf16_ps(acc, a, a)
        }
    );
    burst!(
        int8_dot_256,
        int8_256,
        "avx2,avxvnni",
        64,
        _mm256_setzero_si256(),
        _mm256_set1_epi8(101),
        |acc, a| { _mm256_dpbusd_avx_epi32(acc, a, a) }
    );
    burst!(
        int8_dot_512,
        int8_512,
        "avx512f,avx512vnni",
        128,
        _mm512_setzero_si512(),
        _mm512_set1_epi8(101),
        |acc, a| { _mm512_dpbusd_epi32(acc, a, a) }
    );

    macro_rules! tiles {
        ($name:ident, $dot:literal, $operations:literal) => {
            pub(super) fn $name() -> u64 {
                let _tiles = Tiles::enter();
                // SAFETY: tiles are configured; `Peaks::measure` calls this only where they are present. The
                // values fill a tile.
                unsafe {
                    asm!(
                        "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                        "tileloadd tmm4, [{values} + {line}]",
                        "tileloadd tmm5, [{values} + {line}]",
                        "tileloadd tmm6, [{values} + {line}]",
                        "tileloadd tmm7, [{values} + {line}]",
                        "2:",
                        concat!($dot, " tmm0, tmm4, tmm6"),
                        concat!($dot, " tmm1, tmm4, tmm7"),
                        concat!($dot, " tmm2, tmm5, tmm6"),
                        concat!($dot, " tmm3, tmm5, tmm7"),
                        "dec {rounds}",
                        "jnz 2b",
                        rounds = inout(reg) ROUNDS => _,
                        values = in(reg) VALUES.as_ptr(),
                        line = in(reg) 64usize,
                        options(nostack, readonly),
                        out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                        out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    );
                }
                (ROUNDS * 4 * $operations) as u64
            }
        };
    }

    tiles!(bf16_tiles, "tdpbf16ps", 16_384);
    tiles!(int8_tiles, "tdpbssd", 32_768);
}

#[cfg(target_arch = "aarch64")]
mod aarch64 {
    use std::arch::aarch64::*;
    use std::arch::asm;
    use std::hint::black_box;

    const ROUNDS: usize = 20_000;
    /// Independent sums: enough for four pipelines with a latency of four cycles and more.
    const SUMS: usize = 24;

    /// Defines a burst of `ROUNDS` times `SUMS` instructions, on bits that toggle as those of numbers do. The
    /// instruction is assembly, because most of these have no stable intrinsic.
    macro_rules! burst {
        ($name:ident, $features:literal, $operations:literal, $value:expr, $text:literal) => {
            pub(super) fn $name() -> u64 {
                #[target_feature(enable = $features)]
                fn run() {
                    let (mut acc, a) = ([vdupq_n_f32(0.0); SUMS], black_box($value));
                    for _ in 0..ROUNDS {
                        for acc in &mut acc {
                            // SAFETY: the instruction works on these registers alone.
                            unsafe {
                                asm!(
                                    $text, acc = inout(vreg) *acc, a = in(vreg) a,
                                    options(pure, nomem, nostack),
                                );
                            }
                        }
                    }
                    black_box(acc);
                }
                // SAFETY: `Peaks::measure` calls this only where the instructions are present.
                unsafe { run() };
                (ROUNDS * SUMS * $operations) as u64
            }
        };
    }

    burst!(f32, "neon", 8, vdupq_n_f32(1.1), "fmla {acc:v}.4s, {a:v}.4s, {a:v}.4s");
    burst!(bf16_dot, "neon,bf16", 16, vdupq_n_f32(1.1), "bfdot {acc:v}.4s, {a:v}.8h, {a:v}.8h");
    burst!(bf16_matrix, "neon,bf16", 32, vdupq_n_f32(1.1), "bfmmla {acc:v}.4s, {a:v}.8h, {a:v}.8h");
    burst!(int8_dot, "neon,dotprod", 32, vdupq_n_s8(101), "sdot {acc:v}.4s, {a:v}.16b, {a:v}.16b");
    burst!(int8_matrix, "neon,i8mm", 64, vdupq_n_s8(101), "smmla {acc:v}.4s, {a:v}.16b, {a:v}.16b");
}
