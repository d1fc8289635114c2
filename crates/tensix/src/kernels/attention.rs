//! Attention of one query head over the keys that a row of query tiles sees: scores, softmax and the sum over
//! values without leaving the core.
//!
//! An item is 32 query rows of one head. Three passes over its key tiles: scores to a strip in L1, with the row
//! maxima; exponentials back to the strip, with the row sums; products with the values. A mask is one more tile
//! of the contraction over the head's columns: the identity beside the queries, the transposed mask beside the
//! keys.
//!
//! Where no mask is needed and they fit, keys and values stay in L1 while a core's items see the same ones: the rows of
//! queries of one head, and all heads on the same keys.

use super::math::{self, HALF_ROWS, Product, TILE_ROWS};
use super::noc::{Banks, F32_SHIFT, Noc, WRITE_SLOTS, write_slot};
use super::ring::{Cursor, Ring, wait_at_least};
use super::{Kernel, L1Plan, arg, build, l1, pack, sfpu, unpack};
use crate::error::Fault;
use crate::layout::Format;
use crate::rv::{Asm, Reg};

/// The kernel. Arguments: number of items; base addresses of output, queries, masks and identity; then the items:
/// number of key tiles, first tile of the output and of the queries, whether it is the [`FIRST`] and the [`LAST`] in a row
/// that sees these keys, and for each key tile the base addresses of keys and values, their first tiles, and the mask's
/// tile.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct AttentionKernel {
    /// Columns of tiles of a head.
    pub(crate) width: u32,
    /// Most key tiles that an item has.
    pub(crate) keys: u32,
    pub(crate) masked: bool,
    /// Whether keys and values stay from item to item.
    pub(crate) resident: bool,
    /// Factor of the scores, as bits.
    pub(crate) scale: u32,
    /// How queries are stored, and the identity.
    pub(crate) q: Format,
    /// How keys, values and masks are stored.
    pub(crate) kv: Format,
    pub(crate) banks: Banks,
}

/// How the result is stored: only a linear layer reads it, whose matrix unit keeps little more.
pub(crate) const ATTENDED: Format = Format::Bf16;

/// What a mask adds to a score (before the scale) that must not count: finite, so that no infinity ever meets
/// another.
pub(crate) const MASKED: f32 = -1.0e30;

// Words of an item: before its keys, and for each key tile.
const ITEM_WORDS: u32 = 4;
const KEY_WORDS: u32 = 5;
/// Where an item says which of those with the same keys it is: bits.
const TURN: i32 = 12;
/// The keys must be fetched.
pub(crate) const FIRST: u32 = 1;
/// The keys are not needed any more.
pub(crate) const LAST: u32 = 2;

const HEAD: u32 = 5;
const STATS: u32 = 3 * TILE_ROWS;
/// Columns of tiles of the values that accumulate at once; the fourth slot of Dst holds the statistics.
const GROUP: u32 = 3;

const QUERIES: Cursor = Cursor { count: Reg::A2, addr: Reg::A0 };
const KEYS: Cursor = Cursor { count: Reg::A6, addr: Reg::A5 };
/// The values' ring continues the registers of the keys' ring in other processors' programs.
const VALUES: Cursor = Cursor { count: Reg::S6, addr: Reg::S7 };

struct Plan {
    queries: Ring,
    keys: Ring,
    values: Ring,
    output: Ring,
    /// Scores, then exponentials: a tile for each key tile.
    strip: u32,
    /// Counts tiles stored to the strip, by the packer.
    strip_ring: Ring,
}

impl AttentionKernel {
    /// Tiles of the contraction of queries and keys.
    fn depth(&self) -> u32 {
        self.width + u32::from(self.masked)
    }

    /// `log2` of the bytes of a tile of keys, values or masks.
    fn kv_shift(&self) -> u32 {
        self.kv.tile_bytes().ilog2()
    }

    /// `log2` of the bytes of a tile of queries.
    fn q_shift(&self) -> u32 {
        self.q.tile_bytes().ilog2()
    }

    /// Fidelity phases of the scores; see [`Matmul::phases`](super::Matmul::phases).
    fn phases(&self) -> u32 {
        if (self.q, self.kv) == (Format::Bf16, Format::Bf16) { math::PHASES - 1 } else { math::PHASES }
    }

    /// Where tiles of keys and values go.
    fn sources(&self, transpose: bool) -> unpack::Target {
        unpack::Target::SrcA { from: self.kv, transpose }
    }

    /// Tiles of keys, and of values, that a slot of their rings holds.
    fn slot_tiles(&self) -> (u32, u32) {
        if self.resident { (self.keys * self.width, self.keys * self.width) } else { (self.depth(), GROUP) }
    }

    /// Bytes of L1 that the kernel's buffers take.
    pub(crate) fn l1_bytes(&self) -> u32 {
        let mut plan = L1Plan::new(u32::MAX);
        self.plan(&mut plan);
        u32::MAX - l1::DATA - plan.left()
    }

    /// First column and number of columns of each group.
    fn groups(&self) -> Vec<(u32, u32)> {
        (0..self.width).step_by(GROUP as usize).map(|d| (d, GROUP.min(self.width - d))).collect()
    }

    pub(crate) fn build(&self, l1_bytes: u32) -> Result<Kernel, Fault> {
        let mut plan = L1Plan::new(l1_bytes);
        let p = self.plan(&mut plan);
        let programs = [self.reader(&p), self.unpacker(&p), self.math(), self.packer(&p), self.writer(&p)];
        let name = format!("attention of heads {} tiles wide, up to {} key tiles", self.width, self.keys);
        build(name, &plan, programs.map(Some))
    }

    fn plan(&self, plan: &mut L1Plan) -> Plan {
        let (keys, values) = self.slot_tiles();
        let (key_slots, value_slots) = if self.resident { (1, 1) } else { (2, 3) };
        let p = Plan {
            queries: Ring::new(plan, 0, self.depth() << self.q_shift(), 2),
            keys: Ring::new(plan, 1, keys << self.kv_shift(), key_slots),
            values: Ring::new(plan, 2, values << self.kv_shift(), value_slots),
            output: Ring::new(plan, 3, ATTENDED.tile_bytes() as u32, WRITE_SLOTS),
            strip: 0,
            strip_ring: Ring::new(plan, 4, self.keys << F32_SHIFT, 1),
        };
        Plan { strip: p.strip_ring.base, ..p }
    }

    /// Runs `body` for each item, with the item's address in `s2` and its number of key tiles in `s5`.
    fn items(&self, a: &mut Asm, body: impl FnOnce(&mut Asm)) {
        a.li(Reg::S2, l1::ARGS + 4 * HEAD);
        arg(a, Reg::S3, 0);
        a.count_down(Reg::S3, |a| {
            a.lw(Reg::S5, Reg::S2, 0);
            body(a);
            a.lw(Reg::S5, Reg::S2, 0);
            a.li(Reg::T0, 4 * KEY_WORDS);
            a.mul(Reg::T0, Reg::T0, Reg::S5);
            a.add(Reg::S2, Reg::S2, Reg::T0);
            a.addi(Reg::S2, Reg::S2, 4 * ITEM_WORDS as i32);
        });
    }

    fn reader(&self, p: &Plan) -> Asm {
        let mut b = Asm::new();
        Noc::Read.init(&mut b, self.banks);
        p.queries.start(&mut b, QUERIES);
        p.keys.start(&mut b, KEYS);
        p.values.start(&mut b, VALUES);
        let kv_shift = self.kv_shift();
        self.items(&mut b, |a| {
            p.queries.reserve(a, QUERIES);
            a.mv(Reg::A1, QUERIES.addr);
            a.lw(Reg::A3, Reg::S2, 8);
            arg(a, Reg::A4, 2);
            fetch(a, self.width, self.q_shift());
            if self.masked {
                a.li(Reg::A3, 0);
                arg(a, Reg::A4, 4);
                fetch(a, 1, self.q_shift());
            }
            Noc::Read.wait(a);
            p.queries.publish(a, QUERIES);

            if self.resident {
                return self.read_resident(a, p);
            }
            // Each key's entry, from `t3`; nothing that fetches touches that register.
            a.addi(Reg::T3, Reg::S2, 4 * ITEM_WORDS as i32);
            a.mv(Reg::S4, Reg::S5);
            a.count_down(Reg::S4, |a| {
                p.keys.reserve(a, KEYS);
                a.mv(Reg::A1, KEYS.addr);
                a.lw(Reg::A4, Reg::T3, 0);
                a.lw(Reg::A3, Reg::T3, 8);
                fetch(a, self.width, kv_shift);
                if self.masked {
                    arg(a, Reg::A4, 3);
                    a.lw(Reg::A3, Reg::T3, 16);
                    fetch(a, 1, kv_shift);
                }
                Noc::Read.wait(a);
                p.keys.publish(a, KEYS);
                a.addi(Reg::T3, Reg::T3, 4 * KEY_WORDS as i32);
            });
            for (column, n) in self.groups() {
                a.addi(Reg::T3, Reg::S2, 4 * ITEM_WORDS as i32);
                a.mv(Reg::S4, Reg::S5);
                a.count_down(Reg::S4, |a| {
                    p.values.reserve(a, VALUES);
                    a.mv(Reg::A1, VALUES.addr);
                    a.lw(Reg::A4, Reg::T3, 4);
                    a.lw(Reg::A3, Reg::T3, 12);
                    a.addi(Reg::A3, Reg::A3, column as i32);
                    fetch(a, n, kv_shift);
                    Noc::Read.wait(a);
                    p.values.publish(a, VALUES);
                    a.addi(Reg::T3, Reg::T3, 4 * KEY_WORDS as i32);
                });
            }
        });
        b
    }

    /// B: all keys and all values of an item, if those of the item before are not the same.
    fn read_resident(&self, a: &mut Asm, p: &Plan) {
        let (there, kv_shift) = (a.label(), self.kv_shift());
        a.lw(Reg::T0, Reg::S2, TURN);
        a.andi(Reg::T0, Reg::T0, FIRST as i32);
        a.beq(Reg::T0, Reg::Zero, there);
        for (ring, cursor, base, tile) in [(p.keys, KEYS, 0, 8), (p.values, VALUES, 4, 12)] {
            ring.reserve(a, cursor);
            a.mv(Reg::A1, cursor.addr);
            a.addi(Reg::T3, Reg::S2, 4 * ITEM_WORDS as i32);
            a.mv(Reg::S4, Reg::S5);
            a.count_down(Reg::S4, |a| {
                a.lw(Reg::A4, Reg::T3, base);
                a.lw(Reg::A3, Reg::T3, tile);
                fetch(a, self.width, kv_shift);
                a.addi(Reg::T3, Reg::T3, 4 * KEY_WORDS as i32);
            });
            Noc::Read.wait(a);
            ring.publish(a, cursor);
        }
        a.bind(there);
    }

    /// T0: `then` if an item is the first, or the last, of those that see the same keys; always, if keys do not stay.
    fn at_turn(&self, a: &mut Asm, which: u32, then: impl FnOnce(&mut Asm)) {
        let other = a.label();
        if self.resident {
            a.lw(Reg::T0, Reg::S2, TURN);
            a.andi(Reg::T0, Reg::T0, which as i32);
            a.beq(Reg::T0, Reg::Zero, other);
        }
        then(a);
        a.bind(other);
    }

    fn unpacker(&self, p: &Plan) -> Asm {
        const F32_BYTES: u32 = 1 << F32_SHIFT;
        // Tiles of the strip that must have been stored; grows over the whole launch.
        const STORED: Reg = Reg::S8;
        const HALF: Reg = Reg::S9;
        let mut t0 = Asm::new();
        unpack::init(&mut t0, self.q);
        p.queries.start(&mut t0, QUERIES);
        p.keys.start(&mut t0, KEYS);
        p.values.start(&mut t0, VALUES);
        t0.li(STORED, 0);
        t0.li(HALF, 0);
        let stored = wait_at_least;
        let count = l1::COUNTERS + 8 * 4;
        self.items(&mut t0, |a| {
            if self.q != Format::F32 {
                unpack::source_b(a, self.q);
            }
            unpack::target(a, self.sources(true));
            p.queries.await_filled(a, QUERIES);
            if self.resident {
                self.at_turn(a, FIRST, |a| p.keys.await_filled(a, KEYS));
                unpack::units(a, Reg::A3, KEYS.addr);
            }
            a.mv(Reg::S4, Reg::S5);
            a.count_down(Reg::S4, |a| {
                unpack::units(a, Reg::A1, QUERIES.addr);
                if !self.resident {
                    p.keys.await_filled(a, KEYS);
                    unpack::units(a, Reg::A3, KEYS.addr);
                }
                unpack::point(a, Reg::A3, Reg::A1);
                a.repeat(Reg::S11, self.depth(), |a| {
                    unpack::src_b(a);
                    unpack::src_a(a);
                });
                unpack::sync(a);
                if self.resident {
                    a.add_const(Reg::A3, Reg::A3, self.width << (self.kv_shift() - 4), Reg::T5);
                } else {
                    p.keys.release(a, KEYS);
                }
            });
            if self.resident {
                self.at_turn(a, LAST, |a| p.keys.release(a, KEYS));
            }
            p.queries.release(a, QUERIES);

            unpack::target(a, unpack::Target::Dst);
            // Exponentials go to half after half; the scores took as many halves before.
            a.andi(Reg::T0, Reg::S5, 1);
            a.slli(Reg::T0, Reg::T0, HALF_ROWS.ilog2());
            flip_by(a, HALF, Reg::T0);
            a.li(Reg::A1, p.strip);
            a.mv(Reg::S4, Reg::S5);
            a.count_down(Reg::S4, |a| {
                a.addi(STORED, STORED, 1);
                stored(a, count, STORED);
                math::await_fill(a);
                unpack::to_dst(a, Reg::A1, HALF);
                math::filled(a);
                a.add_const(Reg::A1, Reg::A1, F32_BYTES, Reg::T2);
                a.xori(HALF, HALF, HALF_ROWS as i32);
            });

            unpack::leave_dst(a, self.sources(false));
            if self.q != Format::F32 {
                // The exponentials.
                unpack::source_b(a, Format::F32);
            }
            // All exponentials first: the values of the first group need the last one anyway before the second.
            a.add(STORED, STORED, Reg::S5);
            if self.resident {
                self.at_turn(a, FIRST, |a| p.values.await_filled(a, VALUES));
            }
            for (column, n) in self.groups() {
                if self.resident {
                    unpack::units(a, Reg::A3, VALUES.addr);
                    a.add_const(Reg::A3, Reg::A3, column << (self.kv_shift() - 4), Reg::T5);
                }
                a.li(Reg::A1, (p.strip >> 4) - 1);
                a.mv(Reg::S4, Reg::S5);
                a.count_down(Reg::S4, |a| {
                    // The exponential of this key tile has been stored when all but those after it have.
                    a.sub(Reg::A4, STORED, Reg::S4);
                    a.addi(Reg::A4, Reg::A4, 1);
                    stored(a, count, Reg::A4);
                    if !self.resident {
                        p.values.await_filled(a, VALUES);
                        unpack::units(a, Reg::A3, VALUES.addr);
                    }
                    unpack::point(a, Reg::A3, Reg::A1);
                    unpack::src_b(a);
                    (0..n).for_each(|_| unpack::src_a(a));
                    unpack::sync(a);
                    if self.resident {
                        a.add_const(Reg::A3, Reg::A3, self.width << (self.kv_shift() - 4), Reg::T5);
                    } else {
                        p.values.release(a, VALUES);
                    }
                    a.addi(Reg::A1, Reg::A1, (F32_BYTES >> 4) as i32);
                });
                a.xori(HALF, HALF, HALF_ROWS as i32);
            }
            if self.resident {
                self.at_turn(a, LAST, |a| p.values.release(a, VALUES));
            }
        });
        t0
    }

    fn math(&self) -> Asm {
        const TURN: Reg = Reg::S6;
        let scale = f32::from_bits(self.scale);
        let mut t1 = Asm::new();
        math::init(&mut t1, Format::F32);
        math::matmul_init(&mut t1, Product::Plain);
        math::matmul_init(&mut t1, Product::Transposed);
        sfpu::init(&mut t1);
        t1.li(TURN, 0);
        self.items(&mut t1, |a| {
            math::select(a, Product::Transposed);
            sfpu::run(a, |a| sfpu::softmax_start(a, STATS));
            a.mv(Reg::S4, Reg::S5);
            math::each_half(a, Reg::S4, TURN, |a, half| {
                math::acquire(a);
                math::zero_tile(a, half);
                math::dst_row(a, half);
                a.repeat(Reg::S11, self.depth(), |a| {
                    math::matmul_tile(a, Product::Transposed, self.phases(), true)
                });
                sfpu::run(a, |a| sfpu::softmax_scores(a, half, STATS, scale));
                math::commit(a);
            });
            sfpu::run(a, |a| sfpu::softmax_maximum(a, STATS));
            a.mv(Reg::S4, Reg::S5);
            math::each_half(a, Reg::S4, TURN, |a, half| {
                math::acquire(a);
                math::fill(a);
                sfpu::run(a, |a| sfpu::softmax_exponentials(a, half, STATS));
                math::commit(a);
            });
            sfpu::run(a, |a| sfpu::softmax_inverse_sum(a, STATS));
            math::select(a, Product::Plain);
            for (_, n) in self.groups() {
                a.li(Reg::S11, 1);
                math::each_half(a, Reg::S11, TURN, |a, half| {
                    math::acquire(a);
                    let slots = (0..n).map(|i| half + i * TILE_ROWS);
                    slots.clone().for_each(|row| math::zero_tile(a, row));
                    a.mv(Reg::S4, Reg::S5);
                    a.count_down(Reg::S4, |a| {
                        for (i, row) in (1..).zip(slots.clone()) {
                            math::dst_row(a, row);
                            math::matmul_tile(a, Product::Plain, math::PHASES, i == n);
                        }
                    });
                    sfpu::run(a, |a| slots.clone().for_each(|row| sfpu::softmax_divide(a, row, STATS)));
                    math::commit(a);
                });
            }
        });
        unpack::sync(&mut t1);
        t1
    }

    fn packer(&self, p: &Plan) -> Asm {
        const HALF: Reg = Reg::S6;
        const STORED: Reg = Reg::S8;
        let mut t2 = Asm::new();
        pack::init(&mut t2, Format::F32);
        p.output.start(&mut t2, QUERIES);
        t2.li(HALF, 0);
        t2.li(STORED, 0);
        self.items(&mut t2, |a| {
            for _pass in ["scores", "exponentials"] {
                a.li(Reg::A1, p.strip);
                a.mv(Reg::S4, Reg::S5);
                a.count_down(Reg::S4, |a| {
                    pack::half_to(a, Reg::A1, HALF, &[0]);
                    a.addi(STORED, STORED, 1);
                    a.li(Reg::T6, l1::COUNTERS + 8 * 4);
                    a.sw(STORED, Reg::T6, 0);
                });
            }
            pack::switch(a, ATTENDED);
            for (_, n) in self.groups() {
                let slots: Vec<u32> = (0..n).collect();
                pack::half(a, p.output, QUERIES, HALF, &slots);
            }
            pack::switch(a, Format::F32);
        });
        // The next kernel configures the packers anew.
        unpack::sync(&mut t2);
        t2
    }

    fn writer(&self, p: &Plan) -> Asm {
        let mut nc = Asm::new();
        Noc::Write.init(&mut nc, self.banks);
        p.output.start(&mut nc, QUERIES);
        arg(&mut nc, Reg::A4, 1);
        self.items(&mut nc, |a| {
            a.lw(Reg::A3, Reg::S2, 4);
            a.repeat(Reg::S4, self.width, |a| {
                p.output.await_filled(a, QUERIES);
                write_slot(a, p.output, QUERIES, Reg::A3, Reg::A4);
                a.addi(Reg::A3, Reg::A3, 1);
            });
        });
        Noc::Write.wait(&mut nc);
        nc
    }
}

/// `half ^= by`.
fn flip_by(a: &mut Asm, half: Reg, by: Reg) {
    // Both are 0 or `HALF_ROWS`: the sum is 0, that, or twice that.
    a.add(half, half, by);
    a.andi(half, half, HALF_ROWS as i32);
}

/// B: `n` tiles of `1 << shift` bytes from index `a3` of the tensor at `a4` to `a1`; both end behind them.
fn fetch(a: &mut Asm, n: u32, shift: u32) {
    a.repeat(Reg::S11, n, |a| {
        Noc::Read.tile(a, Reg::A3, Reg::A4, Reg::A1, shift);
        a.addi(Reg::A3, Reg::A3, 1);
        a.add_const(Reg::A1, Reg::A1, 1 << shift, Reg::T5);
    });
}
