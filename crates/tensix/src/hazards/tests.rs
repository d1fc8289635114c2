use super::*;
use crate::isa::*;
use crate::kernels::l1;
use crate::rv::{Asm, Reg};

fn rules(program: impl FnOnce(&mut Asm)) -> Vec<Rule> {
    let mut a = Asm::new();
    program(&mut a);
    a.ret();
    let mut rules: Vec<_> = check(&a.finish().unwrap()).into_iter().map(|h| h.rule).collect();
    rules.dedup();
    rules
}

fn tt(insns: &[Insn]) -> Vec<Rule> {
    rules(|a| insns.iter().for_each(|&i| a.tt(i)))
}

const CONFIG: u32 = 0xFFEF_0000;

/// A store to configuration, with or without the processor waiting for the coprocessor before.
fn store(a: &mut Asm, sync: bool) {
    if sync {
        a.li(Reg::T6, 0xFFE8_0000);
        a.sw(Reg::Zero, Reg::T6, 4);
        a.lw(Reg::T5, Reg::T6, 4);
    }
    a.li(Reg::T6, CONFIG);
    a.sw(Reg::T5, Reg::T6, 64 * 4);
}

#[test]
fn vector_results_are_late() {
    let late = [
        sfpmad(L::L0, L::L1, L::L2, L::L3),
        sfpmul(L::L0, L::L1, L::L2),
        sfpadd(L::L0, L::L1, L::L2),
        sfpror(L::L0, L::L1),
        sfpswap_minmax(L::L0, L::L1),
    ];
    for first in late {
        for second in [sfpstore(L::L0, 0, 0), sfpmov(L::L5, L::L0), sfpmul(L::L4, L::L0, L::L3)] {
            assert_eq!(tt(&[first, second]), [Rule::VectorLatency], "{:08x}", first.word());
            assert_eq!(tt(&[first, sfpnop(), second]), []);
        }
        assert_eq!(tt(&[first, sfpmul(L::L4, L::L2, L::L3)]), [], "independent");
    }
}

#[test]
fn a_hazard_across_the_end_of_a_loop_is_seen() {
    let body = |nop: bool| {
        move |a: &mut Asm| {
            a.repeat(Reg::S3, 4, |a| {
                a.tt(sfpstore(L::L0, 0, 0));
                a.tt(sfpmul(L::L0, L::L1, L::L2));
                if nop {
                    a.tt(sfpnop());
                }
            });
        }
    };
    assert_eq!(rules(body(false)), [Rule::VectorLatency]);
    assert_eq!(rules(body(true)), []);
}

#[test]
fn configuration_written_by_wrcfg_is_late() {
    assert_eq!(tt(&[wrcfg(4, 64), unpacr(0, true)]), [Rule::ConfigLatency]);
    assert_eq!(tt(&[wrcfg(4, 64), nop(), unpacr(0, true)]), []);
}

#[test]
fn vector_loads_wait_for_the_matrix_unit() {
    let wait = stallwait(Block::SFPU, Wait::MATH);
    let load = sfpload(L::L0, 0, 0);
    assert_eq!(tt(&[mvmul(0, 0), load]), [Rule::LoadAfterMath]);
    assert_eq!(tt(&[mvmul(0, 0), nop(), load]), [Rule::LoadAfterMath]);
    assert_eq!(tt(&[mvmul(0, 0), wait, load]), []);
    assert_eq!(tt(&[mvmul(0, 0), nop(), nop(), nop(), load]), []);
    // Played back from the replay buffer it is the same instruction.
    let played = [replay_record(3, 1), mvmul(0, 0), nop(), nop(), nop(), replay(3, 1), load];
    assert_eq!(tt(&played), [Rule::LoadAfterMath]);
}

#[test]
fn the_matrix_unit_waits_for_vector_stores() {
    let wait = stallwait(Block::MATH, Wait::SFPU);
    assert_eq!(tt(&[sfpstore(L::L0, 0, 0), mvmul(0, 0)]), [Rule::MathAfterStore]);
    assert_eq!(tt(&[sfpstore(L::L0, 0, 0), wait, mvmul(0, 0)]), []);
}

#[test]
fn semaphores_change_after_the_work() {
    for (work, wait) in [
        (unpacr(0, false), Wait::UNPACK),
        (pacr(), Wait::PACK),
        (mvmul(0, 0), Wait::MATH.and(Wait::SFPU)),
        (sfpstore(L::L0, 0, 0), Wait::MATH.and(Wait::SFPU)),
    ] {
        for change in [sempost(1), semget(1)] {
            assert_eq!(tt(&[work, change]), [Rule::EarlySemaphore], "{:08x}", work.word());
            assert_eq!(tt(&[work, stallwait(Block::SYNC, wait), change]), []);
            let other = stallwait(Block::SYNC, Wait::RISCV);
            assert_eq!(tt(&[work, other, change]), [Rule::EarlySemaphore], "a wait for something else");
        }
    }
}

#[test]
fn stores_of_the_processor_are_awaited() {
    let program = |fence: bool| {
        move |a: &mut Asm| {
            store(a, false);
            if fence {
                a.tt(stallwait(Block::ALL, Wait::RISCV));
            }
            a.tt(unpacr(0, true));
        }
    };
    assert_eq!(rules(program(false)), [Rule::StoreNotAwaited]);
    assert_eq!(rules(program(true)), []);
}

#[test]
fn stores_of_the_processor_wait_for_what_was_pushed() {
    let program = |sync: bool| {
        move |a: &mut Asm| {
            a.tt(pacr());
            store(a, sync);
            a.tt(stallwait(Block::ALL, Wait::RISCV));
        }
    };
    assert_eq!(rules(program(false)), [Rule::StoreTooEarly]);
    assert_eq!(rules(program(true)), []);
}

#[test]
fn scalar_results_are_awaited() {
    let wait = stallwait(Block::CONFIG.and(Block::TDMA), Wait::THCON.and(Wait::UNPACK));
    assert_eq!(tt(&[adddmareg(4, 4, 6), wrcfg(4, 64)]), [Rule::ScalarLatency]);
    assert_eq!(tt(&[adddmareg(4, 4, 6), wait, wrcfg(4, 64)]), []);
    assert_eq!(tt(&[adddmareg(4, 4, 6), adddmareg(4, 4, 8)]), [Rule::ScalarLatency]);
}

#[test]
fn configuration_of_a_working_unpacker_stays() {
    let wait = stallwait(Block::CONFIG, Wait::UNPACK);
    assert_eq!(tt(&[unpacr(0, true), wrcfg(4, 64)]), [Rule::ConfigInUse]);
    assert_eq!(tt(&[unpacr(0, true), wait, wrcfg(4, 64)]), []);
}

#[test]
fn a_wait_is_not_replaced_before_it_was_obeyed() {
    let first = stallwait(Block::MATH, Wait::SFPU);
    let second = semwait_zero(1, Block::MATH.and(Block::SYNC));
    assert_eq!(tt(&[semwait_zero(2, Block::MATH), second]), [Rule::LostWait]);
    assert_eq!(tt(&[first, second]), [Rule::LostWait]);
    assert_eq!(tt(&[stallwait(Block::MATH.and(Block::SYNC), Wait::SFPU), second]), []);
    assert_eq!(tt(&[first, setrwc_zero(false, false), second]), []);
}

#[test]
fn dst_is_left_before_the_next_source_and_the_end() {
    let (to_dst, to_src) = (setc16(3, 0), setc16(3, 4));
    let (fill, dummy, source) = (unpacr(0, false), unpacr(0, false), unpacr_next(0));
    assert_eq!(tt(&[to_dst, fill]), [Rule::DstNotLeft], "at the end");
    assert_eq!(tt(&[to_dst, fill, to_src, source]), [Rule::DstNotLeft]);
    assert_eq!(tt(&[to_dst, fill, to_src, unpacr_next(1), dummy, source]), []);
    assert_eq!(tt(&[to_dst, fill, fill, to_src, dummy]), []);
    assert_eq!(tt(&[to_src, source, source]), []);
    // On one of two ways.
    let branch = rules(|a| {
        a.tt(to_dst);
        let skip = a.label();
        a.beq(Reg::S3, Reg::Zero, skip);
        a.tt(fill);
        a.bind(skip);
        a.tt(to_src);
        a.tt(source);
    });
    assert_eq!(branch, [Rule::DstNotLeft]);
}

/// A command to the network interface that reads (0) or writes (1), as the kernels give it.
fn command(a: &mut Asm, noc: u32, control: u32, bytes: u32, local: u32) {
    a.li(Reg::S0, 0xFFB2_0000 + (noc << 16));
    let busy = a.here();
    a.lw(Reg::T5, Reg::S0, 0x28);
    a.bne(Reg::T5, Reg::Zero, busy);
    a.li(Reg::A1, local);
    a.sw(Reg::A1, Reg::S0, 0);
    a.li(Reg::T5, control);
    a.sw(Reg::T5, Reg::S0, 0x1C);
    a.li(Reg::T2, bytes);
    a.sw(Reg::T2, Reg::S0, 0x20);
    a.li(Reg::T5, 1);
    a.sw(Reg::T5, Reg::S0, 0x28);
}

/// Waits for a word.
fn spin(a: &mut Asm, address: u32) {
    a.li(Reg::T6, address);
    let spin = a.here();
    a.lw(Reg::T5, Reg::T6, 0);
    a.blt(Reg::T5, Reg::S3, spin);
}

fn count(a: &mut Asm, counter: u32) {
    a.li(Reg::T6, l1::COUNTERS + 4 * counter);
    a.sw(Reg::S3, Reg::T6, 0);
}

const READ: u32 = 1 << 4;
const WRITE: u32 = 1 << 1 | 1 << 4;
const SIGNAL: u32 = 1 | 1 << 4;
const MULTICAST: u32 = WRITE | 1 << 5 | 1 << 7 | 1 << 8 | 4 << 13;
const LINKED: u32 = MULTICAST | 1 << 6;
const READS: u32 = 0xFFB2_0208;
const ATOMICS: u32 = 0xFFB2_0200;
const ACKS: u32 = 0xFFB3_0204;
const DATA: u32 = l1::DATA;
/// The word that is multicast to say how much has been sent.
const COUNT: u32 = l1::COUNTERS + 40;

/// A step of a handshake, by what it is called in a test.
type Step = fn(&mut Asm);

/// What a sender does for two chunks, one of two packets.
const SENDER: [(&str, Step); 12] = [
    ("ready", |a| spin(a, l1::READY)),
    ("first", |a| command(a, 1, LINKED, 8192, DATA)),
    ("second", |a| command(a, 1, MULTICAST, 2048, DATA)),
    ("acks", |a| spin(a, ACKS)),
    ("sent", |a| count(a, 9)),
    ("count", |a| command(a, 1, MULTICAST, 4, COUNT)),
    ("ready again", |a| spin(a, l1::READY)),
    ("third", |a| command(a, 1, MULTICAST, 2048, DATA)),
    ("acks again", |a| spin(a, ACKS)),
    ("store", |a| count(a, 10)),
    ("count again", |a| command(a, 1, MULTICAST, 4, COUNT)),
    ("end", |a| spin(a, ACKS)),
];

/// What a receiver does for two chunks.
const RECEIVER: [(&str, Step); 11] = [
    ("reserve", |a| spin(a, l1::COUNTERS + 4)),
    ("signal", |a| command(a, 0, SIGNAL, 4, 0)),
    ("read", |a| command(a, 0, READ, 2048, DATA)),
    ("reads", |a| spin(a, READS)),
    ("arrived", |a| spin(a, COUNT)),
    ("publish", |a| count(a, 0)),
    ("reserve again", |a| spin(a, l1::COUNTERS + 4)),
    ("signal again", |a| command(a, 0, SIGNAL, 4, 0)),
    ("arrived again", |a| spin(a, COUNT)),
    ("publish again", |a| count(a, 0)),
    ("end", |a| spin(a, ATOMICS)),
];

/// The rules that are broken if a step is left out, and perhaps another one put in its place.
fn without(steps: &[(&str, Step)], name: &str, instead: Option<Step>) -> Vec<Rule> {
    assert!(name.is_empty() || steps.iter().any(|(n, _)| *n == name), "{name}");
    let mut found = rules(|a| {
        for (n, step) in steps {
            if *n != name {
                step(a);
            } else if let Some(instead) = instead {
                instead(a);
            }
        }
    });
    found.sort_unstable();
    found.dedup();
    found
}

#[test]
fn senders_wait_for_receivers_and_acknowledgements() {
    let sender = |name, instead| without(&SENDER, name, instead);
    assert_eq!(sender("", None), []);
    assert_eq!(sender("ready", None), [Rule::NotReady]);
    assert_eq!(sender("ready again", None), [Rule::NotReady], "each chunk anew");
    assert_eq!(sender("acks", None), [Rule::EarlyCount, Rule::CountBeforeData, Rule::Unlinked]);
    assert_eq!(sender("acks again", None), [Rule::EarlyCount, Rule::CountBeforeData]);
    assert_eq!(
        sender("acks", Some(|a| spin(a, READS))),
        [Rule::EarlyCount, Rule::CountBeforeData, Rule::Unlinked]
    );
    assert_eq!(sender("end", None), [Rule::Unfinished]);
    // The count that the network still reads.
    let both: Step = |a| {
        command(a, 1, MULTICAST, 4, COUNT);
        count(a, 10);
    };
    assert_eq!(sender("count", Some(both)), [Rule::EarlyCount]);
}

#[test]
fn packets_of_a_piece_are_linked_and_nothing_is_between_them() {
    let sender = |name, instead| without(&SENDER, name, instead);
    assert_eq!(sender("first", Some(|a| command(a, 1, MULTICAST, 8192, DATA))), [Rule::Unlinked]);
    let open = sender("second", Some(|a| command(a, 1, LINKED, 2048, DATA)));
    assert_eq!(open, [Rule::LinkLeftOpen], "the last one is linked to nothing");
    let waits: Step = |a| {
        command(a, 1, LINKED, 8192, DATA);
        spin(a, l1::READY);
    };
    assert_eq!(sender("first", Some(waits)), [Rule::Unlinked, Rule::LinkLeftOpen]);
    let writes: Step = |a| {
        command(a, 1, LINKED, 8192, DATA);
        command(a, 1, WRITE, 2048, DATA);
    };
    assert!(sender("first", Some(writes)).contains(&Rule::LinkLeftOpen));
}

#[test]
fn receivers_are_ready_when_they_say_so_and_use_what_has_arrived() {
    let receiver = |name, instead| without(&RECEIVER, name, instead);
    assert_eq!(receiver("", None), []);
    assert_eq!(receiver("reserve", None), [Rule::SignalTooEarly]);
    assert_eq!(receiver("reserve again", None), [Rule::SignalTooEarly]);
    assert_eq!(receiver("arrived", None), [Rule::NotReceived]);
    assert_eq!(receiver("arrived again", None), [Rule::NotReceived]);
    assert_eq!(receiver("reads", None), [Rule::EarlyCount, Rule::Unfinished]);
    assert_eq!(receiver("end", None), [Rule::Unfinished]);
}

#[test]
fn writes_are_awaited_before_a_program_returns() {
    assert_eq!(rules(|a| command(a, 1, WRITE, 2048, DATA)), [Rule::Unfinished]);
    let waits = rules(|a| {
        command(a, 1, WRITE, 2048, DATA);
        spin(a, ACKS);
    });
    assert_eq!(waits, []);
}
