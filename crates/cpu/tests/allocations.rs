//! The denoising loop takes its memory from the device's pool: once warm, no step asks the system for any buffer.

use std::alloc::{GlobalAlloc, Layout, System};
use std::sync::atomic::{AtomicUsize, Ordering};

use pi0_cpu::{Cpu, CpuOptions, Format};
use pi0_model::{Config, Extent, Inputs, Pi0, SampleOptions, synth};

/// Bytes from which an allocation is a buffer: shapes, spans and handles are smaller, the activations of the tiny
/// model (an action chunk of `[16, 64]`) are not.
const BUFFER: usize = 4096;

static BUFFERS: AtomicUsize = AtomicUsize::new(0);

struct Counting;

// SAFETY: everything is passed on to the system's allocator.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        if layout.size() >= BUFFER {
            BUFFERS.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: passed on.
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        if layout.size() >= BUFFER {
            BUFFERS.fetch_add(1, Ordering::Relaxed);
        }
        // SAFETY: passed on.
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        // SAFETY: passed on.
        unsafe { System.dealloc(at, layout) }
    }
}

#[global_allocator]
static ALLOCATOR: Counting = Counting;

#[test]
fn more_steps_allocate_no_more_buffers() -> Result<(), Box<dyn std::error::Error>> {
    let config = Config::tiny();
    let inputs = Inputs {
        images: vec![Some(vec![0.1; 3 * config.vision.image_size.pow(2)])],
        tokens: vec![1, 2, 3],
        state: vec![0.2; config.state_dim],
        noise: None,
        guidance: None,
    };
    for format in [Format::F32, Format::Bf16, Format::Int8] {
        // One thread: which of several meets an operation first, and grows its scratch memory, is up to the system.
        let cpu = Cpu::new(CpuOptions { threads: Some(1), format, ..CpuOptions::default() })?;
        let model = Pi0::load(cpu, synth::checkpoint(&config, 1)?, Extent::Cache, &|_| ())?;
        let buffers = |steps| -> Result<usize, Box<dyn std::error::Error>> {
            let before = BUFFERS.load(Ordering::Relaxed);
            model.sample_actions(
                std::slice::from_ref(&inputs),
                &SampleOptions { steps: Some(steps), seed: 0 },
            )?;
            Ok(BUFFERS.load(Ordering::Relaxed) - before)
        };
        // The pool fills.
        let cold = buffers(6)?;
        buffers(3)?;
        let (three, six) = (buffers(3)?, buffers(6)?);
        assert!(three > 0, "patches alone are a buffer: the count sees nothing");
        assert!(cold > six, "{format}: the first inference fills the pool");
        assert_eq!(three, six, "{format}: a step allocates");
    }
    Ok(())
}
