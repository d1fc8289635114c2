//! Aligned memory, and a pool that keeps it: once warm, the denoising loop allocates nothing.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::collections::{BTreeMap, VecDeque};
use std::ops::Deref;
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pi0_device::{Held, MemoryMeter};

/// Bytes of one huge page; larger blocks are aligned to it so that the system can use huge pages.
const HUGE: usize = 2 << 20;
/// Bytes that every page size of Linux divides.
#[cfg(target_os = "linux")]
const PAGE: usize = 64 << 10;
/// Bytes of one cache line, and of the widest vector register.
const LINE: usize = 64;

/// Zeroed memory aligned to a cache line, or to a huge page when large.
#[derive(Debug)]
pub(crate) struct Block {
    start: NonNull<u8>,
    layout: Layout,
}

// SAFETY: a block owns its memory alone, like a `Box<[u8]>`.
unsafe impl Send for Block {}
// SAFETY: shared access only reads, or goes through pointers whose users keep their own discipline.
unsafe impl Sync for Block {}

impl Block {
    pub(crate) fn new(bytes: usize) -> Self {
        let align = if bytes >= HUGE { HUGE } else { LINE };
        let layout = Layout::from_size_align(bytes.max(LINE), align).expect("a block fits the address space");
        let Some(start) = Self::allocate(layout) else { handle_alloc_error(layout) };
        Self { start, layout }
    }

    /// Whether memory comes straight from the system. The allocator's own zeroing would touch every page, on one
    /// thread and before the system could be asked for huge ones; a mapping is zero until whoever fills it touches it.
    fn mapped(layout: Layout) -> bool {
        cfg!(target_os = "linux") && layout.align() == HUGE
    }

    #[cfg(target_os = "linux")]
    fn allocate(layout: Layout) -> Option<NonNull<u8>> {
        if !Self::mapped(layout) {
            // SAFETY: the layout's size is not zero.
            return NonNull::new(unsafe { alloc_zeroed(layout) });
        }
        // One huge page more, to have an aligned start; what is too much is given back.
        let wanted = layout.size().next_multiple_of(PAGE);
        let (access, kind) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
        // SAFETY: a new mapping at an address of the system's choice disturbs nothing.
        let raw = unsafe { libc::mmap(std::ptr::null_mut(), wanted + HUGE, access, kind, -1, 0) };
        if raw == libc::MAP_FAILED {
            return None;
        }
        let before = raw.addr().next_multiple_of(HUGE) - raw.addr();
        // SAFETY: all of it lies in the new mapping, which nobody else knows; the parts given back are whole pages
        // outside of the block. Advice changes no contents, and its failure only means small pages.
        unsafe {
            let start = raw.byte_add(before);
            if before > 0 {
                libc::munmap(raw, before);
            }
            libc::munmap(start.byte_add(wanted), HUGE - before);
            libc::madvise(start, layout.size() / HUGE * HUGE, libc::MADV_HUGEPAGE);
            NonNull::new(start.cast())
        }
    }

    #[cfg(not(target_os = "linux"))]
    fn allocate(layout: Layout) -> Option<NonNull<u8>> {
        // SAFETY: the layout's size is not zero.
        NonNull::new(unsafe { alloc_zeroed(layout) })
    }

    pub(crate) fn len(&self) -> usize {
        self.layout.size()
    }

    pub(crate) fn as_ptr(&self) -> *mut u8 {
        self.start.as_ptr()
    }

    /// The first `count` values of a plain type.
    pub(crate) fn values<T: bytemuck::AnyBitPattern>(&self, count: usize) -> &[T] {
        assert!(count * size_of::<T>() <= self.len() && align_of::<T>() <= LINE);
        // SAFETY: in bounds and aligned by the assertion, initialized since allocation, and any bits are a `T`.
        unsafe { std::slice::from_raw_parts(self.as_ptr().cast(), count) }
    }

    /// The first `count` values of a plain type, to write.
    pub(crate) fn values_mut<T: bytemuck::Pod>(&mut self, count: usize) -> &mut [T] {
        assert!(count * size_of::<T>() <= self.len() && align_of::<T>() <= LINE);
        // SAFETY: as in `values`, and `&mut self` makes the access exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.as_ptr().cast(), count) }
    }
}

impl Drop for Block {
    fn drop(&mut self) {
        #[cfg(target_os = "linux")]
        if Self::mapped(self.layout) {
            // SAFETY: these are the pages that `allocate` kept, given back once.
            unsafe { libc::munmap(self.as_ptr().cast(), self.layout.size().next_multiple_of(PAGE)) };
            return;
        }
        // SAFETY: allocated in `new` with this layout, freed once.
        unsafe { dealloc(self.as_ptr(), self.layout) };
    }
}

/// What the pool may hold, as a multiple of what was ever in use at once.
const STAGES: usize = 3;

/// Keeps blocks for reuse, within bounds ([`STAGES`]). Cloning shares.
#[derive(Debug, Clone)]
pub(crate) struct BlockPool(Arc<Pool>);

#[derive(Debug)]
struct Pool {
    state: Mutex<State>,
    meter: MemoryMeter,
}

/// A block, and its share of the device's count. Kept blocks keep the counter of their handles as well, so that taking
/// one again allocates nothing at all.
type Counted = Arc<(Block, Held)>;

#[derive(Debug, Default)]
struct State {
    /// By size; of each size the one that came back last is taken first. With each the time it came back.
    free: BTreeMap<usize, VecDeque<(u64, Counted)>>,
    free_bytes: usize,
    used_bytes: usize,
    /// The largest `used_bytes` so far.
    most_used: usize,
    clock: u64,
}

impl State {
    /// The smallest block that is kept for `class`, unless most of it would lie idle.
    fn reuse(&mut self, class: usize) -> Option<Counted> {
        let kept = self.free.range_mut(class..=2 * class).find(|(_, blocks)| !blocks.is_empty());
        let (_, counted) = kept?.1.pop_back()?;
        self.free_bytes -= counted.0.len();
        Some(counted)
    }

    /// Takes out what came back longest ago, as much as is too much. Batches come in many sizes: without a bound, each
    /// would leave its blocks for ever. The stages of an inference (vision, prefix, denoising) each have sizes of their
    /// own, and inferences of one size should find the blocks of all three again.
    fn surplus(&mut self) -> Vec<Counted> {
        let mut surplus = Vec::new();
        while self.free_bytes + self.used_bytes > STAGES * self.most_used {
            let oldest = self.free.iter().filter_map(|(size, blocks)| Some((blocks.front()?.0, *size))).min();
            let Some((_, size)) = oldest else { break };
            surplus
                .extend(self.free.get_mut(&size).and_then(VecDeque::pop_front).map(|(_, counted)| counted));
            self.free_bytes -= size;
        }
        surplus
    }
}

impl BlockPool {
    /// An empty pool whose blocks, in use or kept, `meter` counts.
    pub(crate) fn new(meter: MemoryMeter) -> Self {
        Self(Arc::new(Pool { state: Mutex::default(), meter }))
    }

    /// Bytes of the device that this pool serves.
    pub(crate) fn meter(&self) -> &MemoryMeter {
        &self.0.meter
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.0.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A block of at least `bytes`; its contents are whatever the last user left.
    pub(crate) fn take(&self, bytes: usize) -> Pooled {
        let class = size_class(bytes);
        let (kept, surplus) = {
            let mut state = self.lock();
            let kept = state.reuse(class);
            state.used_bytes += kept.as_ref().map_or(class, |counted| counted.0.len());
            state.most_used = state.most_used.max(state.used_bytes);
            (kept, state.surplus())
        };
        // Freed before more is asked for, and without holding up others.
        drop(surplus);
        let counted = kept.unwrap_or_else(|| Arc::new((Block::new(class), self.0.meter.hold(class))));
        Pooled { counted: Some(counted), home: self.clone() }
    }

    fn put_back(&self, counted: Counted) {
        let size = counted.0.len();
        let mut state = self.lock();
        // Every handle goes while the pool is locked, so that exactly one of them is the last.
        if Arc::strong_count(&counted) > 1 {
            return drop(counted);
        }
        state.used_bytes -= size;
        state.free_bytes += size;
        state.clock += 1;
        let now = state.clock;
        state.free.entry(size).or_default().push_back((now, counted));
    }
}

/// Rounds up in steps of an eighth, so that similar sizes share blocks and little is wasted.
fn size_class(bytes: usize) -> usize {
    let bytes = bytes.max(1024);
    let step = (bytes.next_power_of_two() / 16).max(LINE);
    bytes.next_multiple_of(step)
}

/// A handle to a block. Cloning shares the block, which returns to its pool with the last handle.
#[derive(Debug, Clone)]
pub(crate) struct Pooled {
    counted: Option<Counted>,
    home: BlockPool,
}

impl Pooled {
    /// The block, to write, if this is its only handle.
    pub(crate) fn alone(&mut self) -> Option<&mut Block> {
        Some(&mut self.counted.as_mut().and_then(Arc::get_mut)?.0)
    }

    /// The block, to write, by its only handle.
    pub(crate) fn block_mut(&mut self) -> &mut Block {
        let counted = self.counted.as_mut().and_then(Arc::get_mut);
        &mut counted.expect("nobody else has a handle").0
    }
}

impl Deref for Pooled {
    type Target = Block;

    fn deref(&self) -> &Block {
        &self.counted.as_ref().expect("present until dropped").0
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        if let Some(counted) = self.counted.take() {
            self.home.put_back(counted);
        }
    }
}

/// A pointer that may cross threads. Whoever dereferences it says why no two threads touch the same place.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Shared<T>(*mut T);

// SAFETY: the pointer itself is a number; each dereference carries its own reason.
unsafe impl<T> Send for Shared<T> {}
// SAFETY: as above.
unsafe impl<T> Sync for Shared<T> {}

impl<T> Shared<T> {
    pub(crate) fn new(pointer: *mut T) -> Self {
        Self(pointer)
    }

    /// The pointer; a method, so that closures capture the whole wrapper.
    pub(crate) fn get(self) -> *mut T {
        self.0
    }
}

/// Asks for the cache line at an address, which a later instruction will read. Any address will do.
#[inline(always)]
pub(crate) fn fetch<T>(address: *const T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: every x86-64 processor has this instruction, which changes nothing but the caches.
    unsafe {
        std::arch::x86_64::_mm_prefetch::<{ std::arch::x86_64::_MM_HINT_T0 }>(address.cast());
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Asks for all cache lines of some values.
pub(crate) fn fetch_all(values: &[f32]) {
    values.chunks(LINE / size_of::<f32>()).for_each(|line| fetch(line.as_ptr()));
    values.last().into_iter().for_each(|last| fetch(last));
}

/// Asks for a line that will be written, whoever holds it now.
#[inline(always)]
pub(crate) fn fetch_to_write<T>(address: *mut T) {
    #[cfg(target_arch = "x86_64")]
    // SAFETY: a hint, which changes nothing but the caches; processors that do not know it do nothing.
    unsafe {
        std::arch::asm!("prefetchw [{}]", in(reg) address, options(nostack, preserves_flags));
    }
    #[cfg(not(target_arch = "x86_64"))]
    let _ = address;
}

/// Has the processor look up where some bytes lie, page by page, all at once so that the lookups overlap. A loop that comes
/// to a page it has not seen waits for the lookup, even where it only fetches ahead, because no instruction retires before
/// its address is known; and a lookup takes long in a virtual machine, whose host may map in small pages what the guest
/// holds in huge ones. Any address will do.
pub(crate) fn look_up(start: *const u8, bytes: usize) {
    const SMALLEST_PAGE: usize = 4 << 10;
    (0..bytes).step_by(SMALLEST_PAGE).for_each(|at| fetch(start.wrapping_add(at)));
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_aligned_and_reused() {
        let pool = BlockPool::new(MemoryMeter::default());
        let first = pool.take(5000);
        let at = first.as_ptr();
        assert!(at.addr().is_multiple_of(LINE) && first.len() >= 5000 && first.len() < 5700);
        drop(first);
        assert_eq!(pool.take(5001).as_ptr(), at);
        assert!(pool.take(5 << 20).as_ptr().addr().is_multiple_of(HUGE));
    }
    #[test]
    fn all_sizes_together_stay_within_bounds() {
        let meter = MemoryMeter::default();
        let pool = BlockPool::new(meter.clone());
        let most = 1 << 20;
        drop(pool.take(most));
        let most = size_class(most) as u64;
        // Sizes of which none serves the next, as batches of many sizes make them.
        let sizes: Vec<_> = (0..15).map(|i| 100_000 + i * 30_000).collect();
        assert!(sizes.iter().sum::<usize>() > STAGES * (1 << 20));
        for size in sizes {
            drop(pool.take(size));
            assert!(meter.bytes() <= STAGES as u64 * most, "{} bytes are kept", meter.bytes());
        }
        // What is used again and again stays.
        let [a, b] = [0, 1].map(|_| pool.take(300_000).as_ptr());
        assert_eq!(a, b);
        let held = pool.take(700_000);
        let counted = meter.bytes();
        drop(pool);
        drop(held);
        assert!(counted >= 700_000 && meter.bytes() == 0);
    }
}
