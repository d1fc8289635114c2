//! What each processor runs between kernels: wait for a program's address, call it, report.

use super::{Processor, l1};
use crate::error::Fault;
use crate::isa;
use crate::rv::{Asm, Reg};

use super::list;
use super::math::SEMAPHORES;
use super::unpack::CONFIG;

/// Configuration words with the addresses at which T0, T1 and T2 start and whether they are obeyed, and the same of NC.
pub(crate) const RESET_ADDRESSES: std::ops::Range<u32> = 158..164;

/// The firmware of a processor.
///
/// At start it clears its GO word, which tells the host that it is up. The program called may use every
/// register; it returns through `ra`.
pub(crate) fn firmware(processor: Processor) -> Result<Vec<u32>, Fault> {
    let mut a = Asm::new();
    if processor == Processor::B {
        // Always starts at 0, unlike the others: what ran before may have told them to start elsewhere, which no reset
        // undoes and only a processor can. The host lets B start alone for that.
        a.li(Reg::T0, CONFIG + 4 * RESET_ADDRESSES.start);
        for i in 0..RESET_ADDRESSES.len() as i32 {
            a.sw(Reg::Zero, Reg::T0, 4 * i);
        }
    }
    if processor == Processor::T1 {
        // Before any other thread's program can run: the host starts none until all five are up.
        for (sem, max) in SEMAPHORES {
            a.tt(isa::seminit(sem, 0, max));
        }
    }
    let go = l1::GO + 4 * processor as u32;
    let done = a.here();
    a.li(Reg::T0, go);
    a.sw(Reg::Zero, Reg::T0, 0);
    let idle = a.here();
    a.lw(Reg::T1, Reg::T0, 0);
    a.beq(Reg::T1, Reg::Zero, idle);
    a.jalr(Reg::T1);
    a.j(done);
    if processor == Processor::B {
        a.pad_to(l1::LIST_ENTRY / 4);
        list::dispatcher(&mut a);
    }
    a.finish().map_err(|e| Fault::Kernel { kernel: "firmware".into(), processor, what: e.to_string() })
}
