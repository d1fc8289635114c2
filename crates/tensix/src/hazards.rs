//! A static checker of emitted programs: the waits that the ISA documentation demands and neither the hardware
//! nor the simulator enforces. Every kernel passes through it before it is loaded.
//!
//! It follows the control flow of the RISC-V code and keeps, for each place, what may still be in flight there:
//! a set that only grows until nothing changes. Each rule cites the page of the ISA documentation it comes from.

mod network;

use std::collections::HashMap;
use std::fmt;

use crate::isa::{Block, Insn, Wait, op};

use network::{Event, Network, Observer};

/// What can go wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Rule {
    /// The instruction after a two-cycle vector instruction reads its result (SFPMAD, SFPSHFT2).
    VectorLatency,
    /// The instruction after `WRCFG` uses configuration (WRCFG).
    ConfigLatency,
    /// `SFPLOAD` within three instructions of the matrix unit's write to Dst, without a wait (SFPLOAD).
    LoadAfterMath,
    /// The matrix unit or a packer reads Dst while vector stores are in flight (STALLWAIT, condition C14).
    MathAfterStore,
    /// A semaphore changes while the work it stands for is in flight (SEMPOST, SEMGET).
    EarlySemaphore,
    /// Configuration or registers stored by the processor are used without waiting for them
    /// (BackendConfiguration, danger one).
    StoreNotAwaited,
    /// The processor stores configuration or registers while pushed instructions may still use the old ones
    /// (BackendConfiguration, danger two).
    StoreTooEarly,
    /// A coprocessor register is read while the scalar unit still computes it (ADDDMAREG).
    ScalarLatency,
    /// `WRCFG` changes an unpacker's configuration while it works (UNPACR).
    ConfigInUse,
    /// Nothing was unpacked to SrcA between the last tile to Dst and the next for the matrix unit, or the end (erratum
    /// TEN-3868 of tt-llk).
    DstNotLeft,
    /// `SEMWAIT` replaces a wait that nothing has obeyed yet (STALLWAIT: one wait is latched).
    LostWait,
    /// A counter is stored while what it counts is still on its way over the network (NoC: transfers go on while the
    /// processor does; only their responses say that they have ended), or while the network reads it.
    EarlyCount,
    /// A core multicasts before it has waited for the receivers to be ready: their slot may be in use.
    NotReady,
    /// The count of what was multicast goes out before the data have been acknowledged.
    CountBeforeData,
    /// Packets of one piece of data are not linked, or the piece before is not acknowledged: broadcasts may overlap.
    Unlinked,
    /// Something is awaited, done or ended between linked packets, whose path stays reserved meanwhile.
    LinkLeftOpen,
    /// A receiver says that it is ready before it has waited for the slot to be free.
    SignalTooEarly,
    /// A receiver hands a slot on without having waited for what it said that it was ready for.
    NotReceived,
    /// The program returns while transfers are on their way.
    Unfinished,
}

/// A rule broken at a word of a program.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Hazard {
    pub(crate) rule: Rule,
    pub(crate) at: usize,
    pub(crate) insn: u32,
}

impl fmt::Display for Hazard {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "hazard {:?} at word {} (instruction {:08x})", self.rule, self.at, self.insn)
    }
}

/// Thread register with `SRCA_SET_SetOvrdWithAddr`.
const SRCA_SET: u32 = 3;

/// Instructions that the matrix unit needs to have executed since it wrote Dst.
const LOAD_DISTANCE: u8 = 3;

/// What may be in flight at a place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct State {
    /// Vector registers that the last instruction will only have written after the next.
    late: u16,
    /// The last instruction was `WRCFG`.
    wrcfg: bool,
    /// Instructions since the matrix unit wrote Dst.
    since_math: u8,
    stores: bool,
    unpack: bool,
    pack: bool,
    math: bool,
    /// Stores of the processor not yet awaited.
    riscv: bool,
    /// Coprocessor registers being computed.
    scalar: u64,
    /// Instructions that use configuration, since the processor last waited for the coprocessor.
    consumers: bool,
    /// A latched wait that the next `SEMWAIT` would replace.
    replaceable: bool,
    /// The classes that this wait holds back.
    latched: u32,
    /// Unpacker 0 is set to Dst; and it has unpacked there since it last unpacked to SrcA.
    to_dst: bool,
    in_dst: bool,
    network: Network,
}

impl State {
    const START: State = State {
        late: 0,
        wrcfg: false,
        since_math: LOAD_DISTANCE,
        stores: false,
        unpack: false,
        pack: false,
        math: false,
        riscv: false,
        scalar: 0,
        consumers: false,
        replaceable: false,
        latched: 0,
        to_dst: false,
        in_dst: false,
        network: Network::START,
    };

    fn join(self, o: State) -> State {
        State {
            late: self.late | o.late,
            wrcfg: self.wrcfg | o.wrcfg,
            since_math: self.since_math.min(o.since_math),
            stores: self.stores | o.stores,
            unpack: self.unpack | o.unpack,
            pack: self.pack | o.pack,
            math: self.math | o.math,
            riscv: self.riscv | o.riscv,
            scalar: self.scalar | o.scalar,
            consumers: self.consumers | o.consumers,
            replaceable: self.replaceable | o.replaceable,
            latched: self.latched | o.latched,
            to_dst: self.to_dst | o.to_dst,
            in_dst: self.in_dst | o.in_dst,
            network: self.network.join(o.network),
        }
    }

    /// The coprocessor has finished all that was pushed.
    fn synced(&mut self) {
        let State { riscv, to_dst, in_dst, network, .. } = *self;
        *self = State { riscv, to_dst, in_dst, network, ..State::START };
    }
}

/// The classes of an instruction, as bits of a block mask.
fn class(i: Insn) -> u32 {
    match i.opcode() {
        op::UNPACR => Block::UNPACK.0 | Block::TDMA.0,
        op::PACR => Block::PACK.0 | Block::TDMA.0,
        op::ADDDMAREG => 0x20 | Block::TDMA.0,
        op::SETADCXX | op::SETADCXY | op::SETADCZW | op::ADDRCRZW => Block::TDMA.0,
        op::SEMINIT | op::SEMPOST | op::SEMGET | op::SEMWAIT => Block::SYNC.0,
        op::WRCFG | op::SETC16 => Block::CONFIG.0,
        op::ZEROACC | op::MVMUL | op::SETRWC => Block::MATH.0,
        op::STALLWAIT => Block::ALL.0,
        0x70..=0x94 => Block::SFPU.0,
        _ => 0,
    }
}

/// Vector registers that an instruction reads.
fn reads(i: Insn) -> u16 {
    let reg = |high: u32| 1u16 << i.field(high, high - 3);
    match i.opcode() {
        op::SFPSTORE => reg(23),
        op::SFPMAD | op::SFPADD | op::SFPMUL => reg(19) | reg(15) | reg(11),
        // Shifts and integer adds change their destination; a swap reads both.
        op::SFPIADD | op::SFPSHFT | op::SFPSWAP => reg(11) | reg(7),
        op::SFPMOV | op::SFPSHFT2 => reg(11),
        op::SFPCONFIG => 1,
        _ => 0,
    }
}

/// Vector registers that an instruction writes a cycle late.
fn writes_late(i: Insn) -> u16 {
    match i.opcode() {
        op::SFPMAD | op::SFPADD | op::SFPMUL | op::SFPSHFT2 => 1 << i.field(7, 4),
        op::SFPSWAP => 1 << i.field(7, 4) | 1 << i.field(11, 8),
        _ => 0,
    }
}

fn uses_config(i: Insn) -> bool {
    matches!(i.opcode(), op::UNPACR | op::PACR | op::MVMUL | op::ZEROACC | op::SFPLOAD | op::SFPSTORE)
}

/// Executes a coprocessor instruction on the state.
fn step(s: &mut State, i: Insn, mut report: impl FnMut(Rule)) {
    if reads(i) & s.late != 0 {
        report(Rule::VectorLatency);
    }
    if s.wrcfg && uses_config(i) {
        report(Rule::ConfigLatency);
    }
    if s.riscv && (uses_config(i) || matches!(i.opcode(), op::WRCFG | op::ADDDMAREG)) {
        report(Rule::StoreNotAwaited);
    }
    if i.opcode() == op::SEMWAIT && s.replaceable {
        report(Rule::LostWait);
    }
    s.late = writes_late(i);
    s.wrcfg = false;
    s.since_math = (s.since_math + 1).min(LOAD_DISTANCE);
    if class(i) & s.latched != 0 {
        (s.replaceable, s.latched) = (false, 0);
    }
    s.consumers |= uses_config(i);
    match i.opcode() {
        op::MVMUL | op::ZEROACC => {
            if s.stores {
                report(Rule::MathAfterStore);
            }
            s.math = true;
            s.since_math = 0;
        }
        op::SFPLOAD if s.since_math < LOAD_DISTANCE => report(Rule::LoadAfterMath),
        op::SFPSTORE => (s.stores, s.math) = (true, true),
        op::UNPACR => {
            s.unpack = true;
            let flips = i.field(6, 6) == 1;
            if i.field(23, 23) == 0 {
                if flips && s.in_dst {
                    report(Rule::DstNotLeft);
                }
                s.in_dst = s.to_dst;
            }
        }
        // Thread register 3 is 0 while unpacker 0 is set to Dst (SRCA_SET_SetOvrdWithAddr).
        op::SETC16 if i.field(23, 16) == SRCA_SET => s.to_dst = i.field(15, 0) == 0,
        op::PACR => {
            if s.stores {
                report(Rule::MathAfterStore);
            }
            s.pack = true;
        }
        op::SEMPOST | op::SEMGET if s.unpack || s.pack || s.math => report(Rule::EarlySemaphore),
        op::ADDDMAREG => {
            if s.scalar & (1 << i.field(5, 0) | 1 << i.field(11, 6)) != 0 {
                report(Rule::ScalarLatency);
            }
            s.scalar |= 1 << i.field(17, 12);
        }
        op::WRCFG => {
            if s.scalar & 1 << i.field(21, 16) != 0 {
                report(Rule::ScalarLatency);
            }
            if s.unpack {
                report(Rule::ConfigInUse);
            }
            s.wrcfg = true;
        }
        op::STALLWAIT => stall(s, i),
        op::SEMWAIT => latch(s, i.field(23, 15)),
        _ => {}
    }
}

fn latch(s: &mut State, block: u32) {
    s.latched = block;
    s.replaceable = block & Block::SYNC.0 == 0;
}

/// A wait ends what it waits for, as far as it holds back those who would notice.
fn stall(s: &mut State, i: Insn) {
    let (block, wait) = (i.field(23, 15), i.field(14, 0));
    latch(s, block);
    let holds = |b: Block| block & b.0 != 0;
    let awaits = |w: Wait| wait & w.0 == w.0;
    if awaits(Wait::UNPACK) && (holds(Block::SYNC) || holds(Block::CONFIG)) {
        s.unpack = false;
    }
    if awaits(Wait::PACK) && holds(Block::SYNC) {
        s.pack = false;
    }
    if awaits(Wait::MATH) && holds(Block::SFPU) {
        s.since_math = LOAD_DISTANCE;
    }
    if awaits(Wait::SFPU) && (holds(Block::MATH) || holds(Block::SYNC)) {
        s.stores = false;
    }
    if awaits(Wait::MATH.and(Wait::SFPU)) && holds(Block::SYNC) {
        s.math = false;
    }
    if awaits(Wait::RISCV) && block == Block::ALL.0 {
        s.riscv = false;
    }
    if awaits(Wait::THCON) && (holds(Block::CONFIG) || holds(Block::TDMA)) {
        s.scalar = 0;
    }
}

/// A word of a program.
enum Word {
    /// Coprocessor instructions that it executes: one, or those it plays back.
    Push(Vec<Insn>),
    /// The processor stores to configuration or coprocessor registers.
    Store,
    /// The processor waits for the coprocessor.
    Sync,
    /// Something of the network, or of the counters by which processors and cores tell each other about it.
    Network(Event),
    /// The program returns.
    Return,
    Other,
}

/// What each word does, with recorded instructions taken out and played back, and constant addresses known.
fn words(code: &[u32]) -> Vec<Word> {
    let mut recorded: HashMap<u32, Insn> = HashMap::new();
    let mut recording: Option<(u32, u32)> = None;
    let mut constants = [None::<u32>; 32];
    let mut observer = Observer::default();
    let mut out = Vec::with_capacity(code.len());
    for (at, &w) in code.iter().enumerate() {
        if w & 3 != 3 {
            let i = Insn::from_word(w.rotate_right(2));
            out.push(Word::Push(if let Some((slot, left)) = recording {
                recorded.insert(slot, i);
                recording = (left > 1).then(|| (slot + 1, left - 1));
                Vec::new()
            } else if i.opcode() == op::REPLAY {
                let (slot, count) = (i.field(18, 14), i.field(9, 4));
                if i.field(0, 0) == 1 {
                    recording = Some((slot, count));
                    Vec::new()
                } else {
                    (slot..slot + count).filter_map(|s| recorded.get(&s).copied()).collect()
                }
            } else {
                vec![i]
            }));
            continue;
        }
        let (rd, rs1) = ((w >> 7 & 31) as usize, (w >> 15 & 31) as usize);
        let immediate = (w as i32 >> 20) as u32;
        let region = |base: Option<u32>, offset: u32| base.map(|b| b.wrapping_add(offset) >> 16);
        let mut word = Word::Other;
        match w & 0x7F {
            0x23 => {
                let offset = ((w as i32 >> 25) << 5) as u32 | (w >> 7 & 31);
                let to = constants[rs1].map(|b| b.wrapping_add(offset));
                if matches!(region(constants[rs1], 0), Some(0xFFEF | 0xFFE0)) {
                    word = Word::Store;
                } else if let Some(event) =
                    to.and_then(|to| observer.store(to, constants[(w >> 20 & 31) as usize]))
                {
                    word = Word::Network(event);
                }
            }
            0x03 => {
                let from = constants[rs1].map(|b| b.wrapping_add(immediate));
                // Again and again, until the branch behind it goes on.
                let spins = code.get(at + 1).is_some_and(|b| b & 0x7F == 0x63)
                    && at + 1 < code.len()
                    && successors(code, at + 1).contains(&at);
                if region(constants[rs1], immediate) == Some(0xFFE8) {
                    word = Word::Sync;
                } else if let Some(from) = from.filter(|_| spins) {
                    word = Word::Network(Event::Await(from));
                }
                constants[rd] = None;
            }
            0x67 if rd == 0 => word = Word::Return,
            0x37 => constants[rd] = Some(w & 0xFFFF_F000),
            0x13 if w >> 12 & 7 == 0 => {
                let base = if rs1 == 0 { Some(0) } else { constants[rs1] };
                constants[rd] = base.map(|b| b.wrapping_add(immediate));
            }
            0x13 | 0x33 => constants[rd] = None,
            _ => {}
        }
        constants[0] = None;
        out.push(word);
    }
    out
}

/// Where the processor may go after word `at`.
fn successors(code: &[u32], at: usize) -> Vec<usize> {
    let w = code[at];
    let to = |offset: i32| (at as i64 + i64::from(offset) / 4) as usize;
    match w & 0x7F {
        0x63 if w & 3 == 3 => {
            let offset = (w as i32 >> 31) << 12
                | ((w >> 7 & 1) << 11 | (w >> 25 & 0x3F) << 5 | (w >> 8 & 15) << 1) as i32;
            vec![at + 1, to(offset)]
        }
        0x6F if w & 3 == 3 => {
            let offset = (w as i32 >> 31) << 20
                | ((w >> 12 & 0xFF) << 12 | (w >> 20 & 1) << 11 | (w >> 21 & 0x3FF) << 1) as i32;
            vec![to(offset)]
        }
        0x67 if w & 3 == 3 => Vec::new(),
        _ => vec![at + 1],
    }
}

/// Every rule that a program breaks, in order.
pub(crate) fn check(code: &[u32]) -> Vec<Hazard> {
    let words = words(code);
    let mut before: Vec<Option<State>> = vec![None; code.len()];
    let mut found: Vec<Hazard> = Vec::new();
    let mut work = Vec::new();
    if let Some(first) = before.first_mut() {
        *first = Some(State::START);
        work.push(0);
    }
    while let Some(at) = work.pop() {
        let Some(mut state) = before[at] else { continue };
        let mut report = |rule, insn| {
            let hazard = Hazard { rule, at, insn };
            if !found.contains(&hazard) {
                found.push(hazard);
            }
        };
        match &words[at] {
            Word::Push(insns) => {
                insns.iter().for_each(|&i| step(&mut state, i, |rule| report(rule, i.word())))
            }
            Word::Store => {
                if state.consumers {
                    report(Rule::StoreTooEarly, code[at]);
                }
                state.riscv = true;
            }
            Word::Sync => state.synced(),
            Word::Network(event) => state.network.step(*event, |rule| report(rule, code[at])),
            Word::Return => {
                state.network.end(|rule| report(rule, code[at]));
                if state.in_dst {
                    report(Rule::DstNotLeft, code[at]);
                }
            }
            Word::Other => {}
        }
        for next in successors(code, at).into_iter().filter(|&n| n < code.len()) {
            let joined = before[next].map_or(state, |s| s.join(state));
            if before[next] != Some(joined) {
                before[next] = Some(joined);
                work.push(next);
            }
        }
    }
    found.sort_by_key(|h| (h.at, h.rule));
    found
}

#[cfg(test)]
mod tests;
