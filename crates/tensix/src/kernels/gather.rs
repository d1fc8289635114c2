//! Moving rows and columns: each output tile is put together from rows of other tensors, under any permutation
//! of columns, bit by bit. Tiles that move whole are copied whole.

use super::eltwise::writer;
use super::noc::{Banks, F32_SHIFT, Noc, WRITE_SLOTS};
use super::ring::{Cursor, Ring};
use super::{Kernel, L1Plan, arg, build, l1};
use crate::error::Fault;
use crate::layout::TILE;
use crate::rv::{Asm, Reg};

/// Which of the two forms.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Gather {
    /// Whole tiles only.
    pub(crate) whole: bool,
    pub(crate) banks: Banks,
}

/// Most source lines (64-byte rows of a face) that one output row may come from.
pub(crate) const LINES: usize = 8;
/// Bytes of such a line.
const LINE: usize = 64;
/// The offset in a row's scratch lines that reads as zero.
const ZERO: u32 = (LINES * LINE) as u32;
const ROW_SCRATCH: u32 = ZERO + LINE as u32;

/// Where an output row comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct RowSource {
    /// Base address of the tensor.
    pub(crate) base: u32,
    /// Index of the first tile of its row of tiles.
    pub(crate) tile: u32,
    /// Row within the tile.
    pub(crate) row: usize,
}

/// The columns of an output tile: for each the column of the source, or none for zero.
pub(crate) type Columns = [Option<usize>; TILE];

impl Gather {
    pub(crate) const HEAD_WORDS: usize = 2;
    const LINE_COUNT_AT: usize = 1;
    const ROWS_AT: usize = 2;
    const LINES_AT: usize = Self::ROWS_AT + 3 * TILE;
    const COLUMNS_AT: usize = Self::LINES_AT + 2 * LINES;
    const ITEM_WORDS: usize = Self::COLUMNS_AT + TILE;

    /// The list item that copies a tile.
    pub(crate) fn whole_item(output: u32, base: u32, tile: u32) -> Vec<u32> {
        vec![output, base, tile]
    }

    /// The list item of an output tile; none if its columns come from more than [`LINES`] lines.
    pub(crate) fn item(output: u32, rows: &[RowSource; TILE], columns: &Columns) -> Option<Vec<u32>> {
        let mut lines: Vec<usize> = Vec::new();
        let mut offsets = [ZERO; TILE];
        for (column, offset) in columns.iter().zip(&mut offsets) {
            let Some(column) = column else { continue };
            let line = column / 16;
            let at = lines.iter().position(|&l| l == line).unwrap_or_else(|| {
                lines.push(line);
                lines.len() - 1
            });
            *offset = (at * LINE + column % 16 * 4) as u32;
        }
        if lines.len() > LINES {
            return None;
        }
        // A tile of zeros alone reads a line too, since loops run at least once.
        if lines.is_empty() {
            lines.push(0);
        }
        let mut item = vec![output, lines.len() as u32];
        for r in rows {
            item.extend([r.base, r.tile, (r.row / 16 * 2048 + r.row % 16 * LINE) as u32]);
        }
        lines.resize(LINES, 0);
        item.extend(lines.iter().flat_map(|line| [(line / 2) as u32, (line % 2 * 1024) as u32]));
        item.extend(offsets);
        Some(item)
    }

    fn item_words(&self) -> usize {
        if self.whole { 3 } else { Self::ITEM_WORDS }
    }

    pub(crate) fn build(&self, l1_bytes: u32) -> Result<Kernel, Fault> {
        let item = 4 * self.item_words() as i32;
        let list = l1::ARGS + 4 * Self::HEAD_WORDS as u32;
        let mut plan = L1Plan::new(l1_bytes);
        let ring = Ring::new(&mut plan, 0, 1 << F32_SHIFT, WRITE_SLOTS);
        let scratch = plan.take(ROW_SCRATCH * TILE as u32);
        let c = Cursor { count: Reg::A2, addr: Reg::A0 };

        let mut b = Asm::new();
        Noc::Read.init(&mut b, self.banks);
        ring.start(&mut b, c);
        if !self.whole {
            b.li(Reg::S3, scratch + ZERO);
            b.repeat(Reg::S4, TILE as u32, |a| {
                a.sw(Reg::Zero, Reg::S3, 0);
                a.addi(Reg::S3, Reg::S3, ROW_SCRATCH as i32);
            });
        }
        b.li(Reg::S2, list);
        arg(&mut b, Reg::S3, 0);
        b.count_down(Reg::S3, |a| {
            ring.reserve(a, c);
            if self.whole {
                a.lw(Reg::A4, Reg::S2, 4);
                a.lw(Reg::A3, Reg::S2, 8);
                Noc::Read.tile(a, Reg::A3, Reg::A4, c.addr, F32_SHIFT);
                Noc::Read.wait(a);
            } else {
                fetch_lines(a, scratch);
                place_columns(a, scratch, c.addr);
            }
            ring.publish(a, c);
            a.addi(Reg::S2, Reg::S2, item);
        });

        let nc = writer(self.banks, ring, list, item);
        let name = if self.whole { "copy tiles" } else { "gather rows" };
        build(name.into(), &plan, [Some(b), None, None, None, Some(nc)])
    }
}

/// Reads the lines of all 32 rows of the item at `s2` into scratch memory.
fn fetch_lines(a: &mut Asm, scratch: u32) {
    a.mv(Reg::S4, Reg::S2);
    a.li(Reg::A1, scratch);
    a.repeat(Reg::S5, TILE as u32, |a| {
        a.lw(Reg::A4, Reg::S4, 4 * Gather::ROWS_AT as i32);
        a.lw(Reg::A5, Reg::S4, 4 * Gather::ROWS_AT as i32 + 4);
        a.lw(Reg::A6, Reg::S4, 4 * Gather::ROWS_AT as i32 + 8);
        a.mv(Reg::S6, Reg::S2);
        a.mv(Reg::S7, Reg::A1);
        a.lw(Reg::S11, Reg::S2, 4 * Gather::LINE_COUNT_AT as i32);
        a.count_down(Reg::S11, |a| {
            let at = 4 * Gather::LINES_AT as i32;
            a.lw(Reg::A3, Reg::S6, at);
            a.add(Reg::A3, Reg::A3, Reg::A5);
            Noc::Read.tile_address(a, Reg::A3, Reg::A4, F32_SHIFT);
            a.add(Reg::T0, Reg::T0, Reg::A6);
            a.lw(Reg::T5, Reg::S6, at + 4);
            a.add(Reg::T0, Reg::T0, Reg::T5);
            Noc::Read.transfer(a, Reg::S7, LINE as u32);
            a.addi(Reg::S7, Reg::S7, LINE as i32);
            a.addi(Reg::S6, Reg::S6, 8);
        });
        a.addi(Reg::A1, Reg::A1, ROW_SCRATCH as i32);
        a.addi(Reg::S4, Reg::S4, 12);
    });
    Noc::Read.wait(a);
}

/// Copies each word of the output tile from its row's scratch lines.
fn place_columns(a: &mut Asm, scratch: u32, output: Reg) {
    a.li(Reg::A1, scratch);
    a.mv(Reg::A3, output);
    a.repeat(Reg::S4, 2, |a| {
        a.repeat(Reg::S5, 16, |a| {
            for column in 0..TILE {
                a.lw(Reg::T0, Reg::S2, 4 * (Gather::COLUMNS_AT + column) as i32);
                a.add(Reg::T0, Reg::T0, Reg::A1);
                a.lw(Reg::T0, Reg::T0, 0);
                a.sw(Reg::T0, Reg::A3, (column / 16 * 1024 + column % 16 * 4) as i32);
            }
            a.addi(Reg::A1, Reg::A1, ROW_SCRATCH as i32);
            a.addi(Reg::A3, Reg::A3, LINE as i32);
        });
        // The lower faces follow both upper ones.
        a.addi(Reg::A3, Reg::A3, 1024);
    });
}
