//! AMX: tiles of 16 rows of 64 bytes. Four tiles hold sums of 32 rows by 32 columns, two hold left operands, two
//! right ones. Intrinsics are not stable, so these are a few lines of assembly.

use std::arch::asm;

use super::{Kernel, Left, Operands, Packed, Resident};

pub(super) static BF16: Kernel = Kernel {
    max_rows: 32,
    row_align: 16,
    strip: 16,
    group: 4,
    left: Left::Bf16,
    packed: Packed::Bf16,
    block: 64,
    step: 8,
    resident: Some(Resident { percent: 58, deep_block: 16 }),
    fetches: false,
    tails: false,
    micro: bf16_micro,
    enter,
    leave,
};
pub(super) static INT8: Kernel = Kernel { left: Left::Int8, packed: Packed::Int8, micro: int8_micro, ..BF16 };

/// The operand of `ldtilecfg`: all eight tiles 16 rows of 64 bytes.
#[repr(C, align(64))]
struct TileConfig {
    palette: u8,
    start_row: u8,
    reserved: [u8; 14],
    bytes_per_row: [u16; 16],
    rows: [u8; 16],
}

static CONFIG: TileConfig = {
    let (mut bytes_per_row, mut rows) = ([0; 16], [0; 16]);
    let mut i = 0;
    while i < 8 {
        (bytes_per_row[i], rows[i]) = (64, 16);
        i += 1;
    }
    TileConfig { palette: 1, start_row: 0, reserved: [0; 14], bytes_per_row, rows }
};

pub(super) fn enter() {
    // SAFETY: AMX was found present and granted when the device was opened; the configuration is valid. Tiles are
    // used by no code but this module's, so nothing else is disturbed.
    unsafe {
        asm!(
            "ldtilecfg [{}]", in(reg) &raw const CONFIG, options(nostack, readonly, preserves_flags),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
        );
    }
}

pub(super) fn leave() {
    // SAFETY: as in `enter`.
    unsafe {
        asm!(
            "tilerelease", options(nostack, nomem, preserves_flags),
            out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
            out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
        );
    }
}

/// Keeps the thread's tiles configured while it lives.
pub(crate) struct Tiles(());

impl Tiles {
    /// AMX must be present and granted.
    pub(crate) fn enter() -> Self {
        enter();
        Self(())
    }
}

impl Drop for Tiles {
    fn drop(&mut self) {
        leave();
    }
}

/// 32 rows by 32 columns take four products and four loads for each depth tile. The processor overlaps them best in
/// the order below, found by measuring orders: each operand is loaded a product before its first use, and the product
/// of the second rows and first columns waits for the next round. Meanwhile the coming right panel is fetched.
macro_rules! micro {
    ($name:ident, $dot:literal) => {
        unsafe fn $name(rows: usize, tiles: usize, operands: Operands, sums: *mut f32, first: bool) {
            let Operands { left, right, next, lines, .. } = operands;
            if rows > 16 {
                // SAFETY: the addresses touched are those of the operands as the caller promises them, and fetching
                // is harmless at any address; tiles are configured (`enter`).
                unsafe {
                    asm!(
                        "test {first:e}, {first:e}",
                        "jnz 2f",
                        "tileloadd tmm0, [{sums} + {wide}]",
                        "tileloadd tmm1, [{sums} + {wide} + 64]",
                        "tileloadd tmm2, [{sums} + {wide} + 2048]",
                        "tileloadd tmm3, [{sums} + {wide} + 2112]",
                        "jmp 3f",
                        "2:",
                        "tilezero tmm0",
                        "tilezero tmm1",
                        "tilezero tmm2",
                        "tilezero tmm3",
                        "3:",
                        "tileloadd tmm4, [{left} + {line}]",
                        "jmp 5f",
                        "4:",
                        "tileloadd tmm4, [{left} + {line}]",
                        concat!($dot, " tmm2, tmm5, tmm6"),
                        "5:",
                        "tileloadd tmm7, [{right} + {line} + 1024]",
                        "tileloadd tmm5, [{left} + {line} + 1024]",
                        concat!($dot, " tmm1, tmm4, tmm7"),
                        "tileloadd tmm6, [{right} + {line}]",
                        concat!($dot, " tmm3, tmm5, tmm7"),
                        concat!($dot, " tmm0, tmm4, tmm6"),
                        "mov {some}, {lines}",
                        "6:",
                        "prefetcht1 [{next}]",
                        "add {next}, 64",
                        "dec {some}",
                        "jnz 6b",
                        "add {left}, 2048",
                        "add {right}, 2048",
                        "dec {tiles}",
                        "jnz 4b",
                        concat!($dot, " tmm2, tmm5, tmm6"),
                        "tilestored [{sums} + {wide}], tmm0",
                        "tilestored [{sums} + {wide} + 64], tmm1",
                        "tilestored [{sums} + {wide} + 2048], tmm2",
                        "tilestored [{sums} + {wide} + 2112], tmm3",
                        first = in(reg) u32::from(first),
                        left = inout(reg) left => _,
                        right = inout(reg) right => _,
                        next = inout(reg) next => _,
                        lines = in(reg) lines,
                        some = out(reg) _,
                        tiles = inout(reg) tiles => _,
                        sums = in(reg) sums,
                        line = in(reg) 64usize,
                        wide = in(reg) 128usize,
                        options(nostack),
                        out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                        out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                    );
                }
            } else {
                // SAFETY: as above; one tile of rows.
                unsafe {
                    asm!(
                        "test {first:e}, {first:e}",
                        "jnz 2f",
                        "tileloadd tmm0, [{sums} + {wide}]",
                        "tileloadd tmm1, [{sums} + {wide} + 64]",
                        "jmp 3f",
                        "2:",
                        "tilezero tmm0",
                        "tilezero tmm1",
                        "3:",
                        "tileloadd tmm4, [{left} + {line}]",
                        "tileloadd tmm6, [{right} + {line}]",
                        concat!($dot, " tmm0, tmm4, tmm6"),
                        "tileloadd tmm7, [{right} + {line} + 1024]",
                        concat!($dot, " tmm1, tmm4, tmm7"),
                        "mov {some}, {lines}",
                        "6:",
                        "prefetcht1 [{next}]",
                        "add {next}, 64",
                        "dec {some}",
                        "jnz 6b",
                        "add {left}, 1024",
                        "add {right}, 2048",
                        "dec {tiles}",
                        "jnz 3b",
                        "tilestored [{sums} + {wide}], tmm0",
                        "tilestored [{sums} + {wide} + 64], tmm1",
                        first = in(reg) u32::from(first),
                        left = inout(reg) left => _,
                        right = inout(reg) right => _,
                        next = inout(reg) next => _,
                        lines = in(reg) lines,
                        some = out(reg) _,
                        tiles = inout(reg) tiles => _,
                        sums = in(reg) sums,
                        line = in(reg) 64usize,
                        wide = in(reg) 128usize,
                        options(nostack),
                        out("tmm0") _, out("tmm1") _, out("tmm4") _, out("tmm6") _, out("tmm7") _,
                    );
                }
            }
        }
    };
}

micro!(bf16_micro, "tdpbf16ps");
micro!(int8_micro, "tdpbssd");
