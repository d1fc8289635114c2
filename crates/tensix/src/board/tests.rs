use super::*;
use crate::isa;
use crate::kernels::RESET_ADDRESSES;
use crate::rv::{Asm, Reg};
use crate::transport::{self, TransportError};

fn open(timeout: Duration) -> Option<Board> {
    open_with(timeout, false)
}

fn open_with(timeout: Duration, lists: bool) -> Option<Board> {
    let Some(library) = std::env::var_os("TT_METAL_SIMULATOR").filter(|v| !v.is_empty()) else {
        eprintln!("skipped: set TT_METAL_SIMULATOR to Tenstorrent's libttsim.so for Wormhole");
        return None;
    };
    let transport = transport::spawn(library.as_ref(), Duration::from_secs(60)).unwrap();
    Some(Board::open(transport, Some((2, 2)), Some(lists), timeout).unwrap())
}

fn kernel(name: &str, t1: impl FnOnce(&mut Asm)) -> Kernel {
    let mut a = Asm::new();
    t1(&mut a);
    a.ret();
    let mut code: [Vec<u32>; 5] = Default::default();
    code[Processor::T1 as usize] = a.finish().unwrap();
    Kernel { name: name.into(), code }
}

fn load(board: &mut Board, kernel: Kernel) -> (Loaded, bool) {
    board.load(kernel).unwrap()
}

/// The third of four commands never ends on the second core.
#[test]
fn a_hung_command_is_named() {
    let Some(mut board) = open_with(Duration::from_secs(2), true) else { return };
    let (harmless, _) = load(&mut board, kernel("harmless", |_| ()));
    let (stuck, _) = load(
        &mut board,
        kernel("stuck", |a| {
            let forever = a.here();
            a.li(Reg::T0, l1::ARGS);
            a.lw(Reg::T0, Reg::T0, 0);
            a.bne(Reg::T0, Reg::Zero, forever);
        }),
    );
    for _ in 0..2 {
        board.launch(&harmless, &[(0, vec![]), (1, vec![]), (2, vec![]), (3, vec![])]).unwrap();
    }
    board.launch(&stuck, &[(0, vec![0]), (1, vec![1])]).unwrap();
    board.launch(&harmless, &[(0, vec![])]).unwrap();
    let fault = board.run_lists().unwrap_err();
    let Fault::Hung { kernel, .. } = &fault else { panic!("{fault}") };
    assert_eq!(&kernel[..], "stuck");
}

#[test]
fn a_hung_kernel_is_named_with_its_core_and_processor() {
    let Some(mut board) = open(Duration::from_secs(2)) else { return };
    // Core 0 returns at once, core 3 never.
    let (loaded, _) = load(
        &mut board,
        kernel("stuck", |a| {
            let forever = a.here();
            a.li(Reg::T0, l1::ARGS);
            a.lw(Reg::T0, Reg::T0, 0);
            a.bne(Reg::T0, Reg::Zero, forever);
        }),
    );
    let fault = board.launch(&loaded, &[(0, vec![0]), (3, vec![1])]).unwrap_err();
    let Fault::Hung { kernel, core, processors, .. } = &fault else { panic!("{fault}") };
    assert_eq!((&kernel[..], &core[..], &processors[..]), ("stuck", "(1, 1)", "T1 (math)"));
    assert_eq!(board.launch(&loaded, &[(0, vec![0])]).unwrap_err(), fault, "its use has ended");
}

#[test]
fn an_abort_of_the_simulator_is_an_error_with_its_message() {
    let Some(mut board) = open(Duration::from_secs(60)) else { return };
    // The semaphore's maximum is 2.
    let (loaded, _) = load(&mut board, kernel("post", |a| (0..3).for_each(|_| a.tt(isa::sempost(1)))));
    let fault = board.launch(&loaded, &[(1, vec![])]).unwrap_err();
    let Fault::Transport(TransportError::Stopped(message)) = &fault else { panic!("{fault}") };
    assert!(message.contains("ERROR: NonContractualBehavior"), "{message}");
    assert_eq!(board.launch(&loaded, &[(1, vec![])]).unwrap_err(), fault);
}

#[test]
fn code_memory_starts_over_when_full() {
    let Some(mut board) = open(Duration::from_secs(60)) else { return };
    // Each takes a third of the memory and leaves its number at the start of the arguments.
    let make = |n: u32| {
        kernel("fill", |a| {
            a.li(Reg::T0, l1::ARGS);
            a.li(Reg::T1, n);
            a.sw(Reg::T1, Reg::T0, 0);
            let words = (l1::DATA - l1::CODE) as usize / 4 / 3 - 64;
            let end = a.label();
            a.j(end);
            (0..words).for_each(|_| a.mv(Reg::T0, Reg::T0));
            a.bind(end);
        })
    };
    for n in 0..8 {
        let (loaded, kept) = load(&mut board, make(n));
        assert_eq!(kept, n == 0 || n % 3 != 0, "kernel {n}");
        for _ in 0..2 {
            board.launch(&loaded, &[(2, vec![99])]).unwrap();
            board.pending.read(board.tile(2), l1::ARGS.into(), 4);
            assert_eq!(word(board.flush().unwrap()), n);
        }
    }
}

/// As tt-metal leaves a card: processors other than B start at addresses of its own, and semaphores are not 0.
#[test]
fn cores_that_others_have_used_start_all_the_same() {
    let Some(mut board) = open(Duration::from_secs(60)) else { return };
    let (spoil, _) = load(
        &mut board,
        kernel("spoil", |a| {
            a.li(Reg::T0, 0xFFEF_0000 + 4 * RESET_ADDRESSES.start);
            for (i, value) in [0x5000, 0x5000, 0x5000, 7, 0x5000, 1].into_iter().enumerate() {
                a.li(Reg::T1, value);
                a.sw(Reg::T1, Reg::T0, 4 * i as i32);
            }
            a.tt(isa::sempost(1));
        }),
    );
    let everywhere: Vec<_> = (0..4).map(|core| (core, vec![])).collect();
    board.launch(&spoil, &everywhere).unwrap();
    // Nobody knows that these cores are ours.
    board.cores.iter_mut().for_each(|c| *c = Core::default());
    board.reset_everything().unwrap();
    let (again, _) = load(
        &mut board,
        kernel("again", |a| {
            a.li(Reg::T0, l1::ARGS);
            a.li(Reg::T1, 77);
            a.sw(Reg::T1, Reg::T0, 0);
            a.tt(isa::sempost(1));
            a.tt(isa::sempost(1)); // a third one would be too many
        }),
    );
    board.launch(&again, &everywhere).unwrap();
    for core in 0..4 {
        board.pending.read(board.tile(core), l1::ARGS.into(), 4);
        assert_eq!(word(board.flush().unwrap()), 77);
    }
}
