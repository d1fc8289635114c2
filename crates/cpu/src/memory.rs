//! Aligned memory, and a pool that keeps it: the denoising loop allocates nothing after its first step.

use std::alloc::{Layout, alloc_zeroed, dealloc, handle_alloc_error};
use std::collections::BTreeMap;
use std::ops::{Deref, DerefMut};
use std::ptr::NonNull;
use std::sync::{Arc, Mutex, PoisonError};

/// Bytes of one huge page; larger blocks are aligned to it so that the system can use huge pages.
const HUGE: usize = 2 << 20;
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
        let align = if bytes >= 2 * HUGE { HUGE } else { LINE };
        let layout = Layout::from_size_align(bytes.max(LINE), align).expect("a block fits the address space");
        // SAFETY: the layout's size is not zero.
        let Some(start) = NonNull::new(unsafe { alloc_zeroed(layout) }) else { handle_alloc_error(layout) };
        #[cfg(target_os = "linux")]
        if align == HUGE {
            // SAFETY: the range is memory that we just allocated; advice changes no contents. Its failure only
            // means small pages.
            unsafe { libc::madvise(start.as_ptr().cast(), layout.size() / HUGE * HUGE, libc::MADV_HUGEPAGE) };
        }
        Self { start, layout }
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
        // SAFETY: allocated in `new` with this layout, freed once.
        unsafe { dealloc(self.as_ptr(), self.layout) };
    }
}

/// Keeps blocks for reuse. Cloning shares.
#[derive(Debug, Clone, Default)]
pub(crate) struct BlockPool(Arc<Mutex<BTreeMap<usize, Vec<Block>>>>);

impl BlockPool {
    /// A block of at least `bytes`; its contents are whatever the last user left.
    pub(crate) fn take(&self, bytes: usize) -> Pooled {
        let class = size_class(bytes);
        let kept = {
            let mut free = self.0.lock().unwrap_or_else(PoisonError::into_inner);
            free.get_mut(&class).and_then(Vec::pop)
        };
        Pooled { block: Some(kept.unwrap_or_else(|| Block::new(class))), home: self.clone() }
    }
}

/// Rounds up in steps of an eighth, so that similar sizes share blocks and little is wasted.
fn size_class(bytes: usize) -> usize {
    let bytes = bytes.max(1024);
    let step = (bytes.next_power_of_two() / 16).max(LINE);
    bytes.next_multiple_of(step)
}

/// A block that returns to its pool when dropped.
#[derive(Debug)]
pub(crate) struct Pooled {
    block: Option<Block>,
    home: BlockPool,
}

impl Deref for Pooled {
    type Target = Block;

    fn deref(&self) -> &Block {
        self.block.as_ref().expect("present until dropped")
    }
}

impl DerefMut for Pooled {
    fn deref_mut(&mut self) -> &mut Block {
        self.block.as_mut().expect("present until dropped")
    }
}

impl Drop for Pooled {
    fn drop(&mut self) {
        if let Some(block) = self.block.take() {
            let mut free = self.home.0.lock().unwrap_or_else(PoisonError::into_inner);
            free.entry(block.len()).or_default().push(block);
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_aligned_and_reused() {
        let pool = BlockPool::default();
        let first = pool.take(5000);
        let at = first.as_ptr();
        assert!(at.addr().is_multiple_of(LINE) && first.len() >= 5000 && first.len() < 5700);
        drop(first);
        assert_eq!(pool.take(5001).as_ptr(), at);
        assert!(pool.take(5 << 20).as_ptr().addr().is_multiple_of(HUGE));
    }
}
