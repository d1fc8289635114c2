//! Device memory in blocks, handed out in regions; and memory that the host writes and reads.

use std::fmt;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use ash::vk;
use pi0_device::{Held, MemoryMeter};

use crate::error::{Result, VulkanError};
use crate::gpu::Gpu;

/// Every region begins at a multiple of it: the most that drivers want.
pub(crate) const ALIGNMENT: u64 = 256;
/// Blocks grow with what is held, up to this.
const LARGEST_BLOCK: u64 = 64 << 20;
const SMALLEST_BLOCK: u64 = 1 << 20;

/// A buffer with memory of its own.
pub(crate) struct Buffer {
    pub(crate) raw: vk::Buffer,
    memory: vk::DeviceMemory,
    /// Where the host sees it, if it does.
    pub(crate) mapped: Option<*mut u8>,
    pub(crate) size: u64,
    gpu: Arc<Gpu>,
}

// SAFETY: the pointer names memory that belongs to this buffer alone; access goes through `&mut` or a lock.
unsafe impl Send for Buffer {}
// SAFETY: as above.
unsafe impl Sync for Buffer {}

impl Buffer {
    /// Memory with one of `wanted`, the first that there is.
    pub(crate) fn new(gpu: &Arc<Gpu>, size: u64, wanted: &[vk::MemoryPropertyFlags]) -> Result<Self> {
        let usage = vk::BufferUsageFlags::STORAGE_BUFFER
            | vk::BufferUsageFlags::TRANSFER_SRC
            | vk::BufferUsageFlags::TRANSFER_DST;
        let info = vk::BufferCreateInfo::default().size(size).usage(usage);
        // SAFETY: a plain creation.
        let raw =
            unsafe { gpu.raw.create_buffer(&info, None) }.map_err(VulkanError::call("vkCreateBuffer"))?;
        // From here on, dropping gives back what was made.
        let mut buffer = Self { raw, memory: vk::DeviceMemory::null(), mapped: None, size, gpu: gpu.clone() };
        // SAFETY: the buffer was just made.
        let needs = unsafe { gpu.raw.get_buffer_memory_requirements(raw) };
        let kinds = &gpu.memory.memory_types[..gpu.memory.memory_type_count as usize];
        let fits = |want: vk::MemoryPropertyFlags| {
            let mut all = kinds.iter().enumerate();
            all.find(|(i, k)| needs.memory_type_bits >> i & 1 == 1 && k.property_flags.contains(want))
        };
        let Some((kind, flags)) = wanted.iter().find_map(|&want| Some((fits(want)?.0, want))) else {
            return Err(VulkanError::Lacks {
                device: gpu.info.name.clone(),
                what: format!("memory with {wanted:?}"),
            });
        };
        let info =
            vk::MemoryAllocateInfo::default().allocation_size(needs.size).memory_type_index(kind as u32);
        // SAFETY: the kind was reported for this buffer; binding comes once.
        unsafe {
            buffer.memory = gpu.raw.allocate_memory(&info, None).map_err(|e| match e {
                vk::Result::ERROR_OUT_OF_DEVICE_MEMORY | vk::Result::ERROR_OUT_OF_HOST_MEMORY => {
                    full(gpu.info.memory, size, 0)
                }
                e => VulkanError::call("vkAllocateMemory")(e),
            })?;
            gpu.raw
                .bind_buffer_memory(raw, buffer.memory, 0)
                .map_err(VulkanError::call("vkBindBufferMemory"))?;
            if flags.contains(vk::MemoryPropertyFlags::HOST_VISIBLE) {
                let at = gpu
                    .raw
                    .map_memory(buffer.memory, 0, vk::WHOLE_SIZE, vk::MemoryMapFlags::empty())
                    .map_err(VulkanError::call("vkMapMemory"))?;
                buffer.mapped = Some(at.cast());
            }
        }
        Ok(buffer)
    }

    /// For the host to write.
    pub(crate) fn staging(gpu: &Arc<Gpu>, size: u64) -> Result<Self> {
        Self::new(
            gpu,
            size,
            &[vk::MemoryPropertyFlags::HOST_VISIBLE | vk::MemoryPropertyFlags::HOST_COHERENT],
        )
    }

    /// For the host to read: cached, where there is such memory.
    pub(crate) fn readback(gpu: &Arc<Gpu>, size: u64) -> Result<Self> {
        let visible = vk::MemoryPropertyFlags::HOST_VISIBLE | vk::MemoryPropertyFlags::HOST_COHERENT;
        Self::new(gpu, size, &[visible | vk::MemoryPropertyFlags::HOST_CACHED, visible])
    }

    /// Writes where the host sees the buffer.
    pub(crate) fn write(&mut self, at: usize, data: &[u8]) {
        assert!(at + data.len() <= self.size as usize, "a write past the end of a buffer");
        let to = self.mapped.expect("a buffer for the host");
        // SAFETY: within the mapping, which belongs to this buffer; the device does not use it now.
        unsafe { std::ptr::copy_nonoverlapping(data.as_ptr(), to.add(at), data.len()) };
    }

    /// Reads `count` values where the host sees the buffer.
    pub(crate) fn read(&self, count: usize) -> Vec<f32> {
        assert!(count * 4 <= self.size as usize, "a read past the end of a buffer");
        let from = self.mapped.expect("a buffer for the host");
        let mut out = vec![0f32; count];
        // SAFETY: within the mapping; mappings are aligned to far more than a float.
        unsafe { std::ptr::copy_nonoverlapping(from.cast::<f32>(), out.as_mut_ptr(), count) };
        out
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        if self.gpu.abandoned() {
            return;
        }
        // SAFETY: no work is in flight: every submission is waited for. Null handles are ignored.
        unsafe {
            self.gpu.raw.destroy_buffer(self.raw, None);
            self.gpu.raw.free_memory(self.memory, None);
        }
    }
}

fn full(capacity: u64, wanted: u64, held: u64) -> VulkanError {
    let missing = (held + wanted).saturating_sub(capacity).max(1);
    VulkanError::OutOfMemory { wanted, held, capacity, missing, advice: String::new() }
}

/// A part of a block.
pub(crate) struct Region {
    pub(crate) id: u64,
    pub(crate) buffer: vk::Buffer,
    pub(crate) offset: u64,
    pub(crate) size: u64,
    /// Recordings that name it: they keep its memory, and read it only when asked to by somebody who holds it.
    keepers: AtomicUsize,
    /// The tape that named it last, and where it stands among that one's regions.
    pub(crate) slot: AtomicU64,
    owner: Owner,
}

impl Region {
    pub(crate) fn keep(&self) {
        self.keepers.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn let_go(&self) {
        self.keepers.fetch_sub(1, Ordering::Relaxed);
    }

    /// Whether nobody but `one` and recordings that keep it holds it.
    pub(crate) fn is_free(one: &Arc<Self>) -> bool {
        Arc::strong_count(one) == 1 + one.keepers.load(Ordering::Relaxed)
    }
}

enum Owner {
    Memory {
        memory: Arc<Memory>,
        block: u64,
    },
    /// A part of another region, which it keeps.
    Region(#[allow(dead_code)] Arc<Region>),
}

impl fmt::Debug for Region {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Region({}, {}..{})", self.id, self.offset, self.offset + self.size)
    }
}

impl Drop for Region {
    fn drop(&mut self) {
        if let Owner::Memory { memory, block } = &self.owner {
            memory.free(*block, self.offset, self.size);
        }
    }
}

struct Block {
    id: u64,
    /// None where there is no GPU behind.
    buffer: Option<Buffer>,
    size: u64,
    /// Free ranges in order: offset and size.
    free: Vec<(u64, u64)>,
    _held: Held,
}

/// All device memory of one device.
pub(crate) struct Memory {
    blocks: Mutex<Vec<Block>>,
    pub(crate) meter: MemoryMeter,
    /// Bytes that may be held, to try what happens at the end of memory.
    limit: u64,
    next: AtomicU64,
    /// None plans only.
    gpu: Option<Arc<Gpu>>,
}

impl Memory {
    /// Memory of `gpu`, at most `limit` bytes of it; without a GPU only the bookkeeping.
    pub(crate) fn new(gpu: Option<Arc<Gpu>>, limit: u64) -> Arc<Self> {
        Arc::new(Self {
            blocks: Mutex::default(),
            meter: MemoryMeter::default(),
            limit,
            next: AtomicU64::new(1),
            gpu,
        })
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Block>> {
        self.blocks.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn id(&self) -> u64 {
        self.next.fetch_add(1, Ordering::Relaxed)
    }

    /// Bytes of the device's memory that nothing here holds.
    pub(crate) fn left(&self) -> u64 {
        self.limit.saturating_sub(self.meter.bytes())
    }

    /// A region of `size` bytes or a little more, with arbitrary contents.
    pub(crate) fn take(self: &Arc<Self>, size: u64) -> Result<Arc<Region>> {
        let size = size.max(16).next_multiple_of(ALIGNMENT);
        let mut blocks = self.lock();
        for block in blocks.iter_mut() {
            if let Some(i) = block.free.iter().position(|&(_, free)| free >= size) {
                return Ok(self.cut(block, i, size));
            }
        }
        let held = self.meter.bytes();
        if held + size > self.limit {
            return Err(full(self.limit, size, held));
        }
        let roomy = (held / 8).next_multiple_of(ALIGNMENT).clamp(SMALLEST_BLOCK, LARGEST_BLOCK).max(size);
        let local = [vk::MemoryPropertyFlags::DEVICE_LOCAL];
        let sizes = if held + roomy > self.limit { [size, size] } else { [roomy, size] };
        let buffer = match &self.gpu {
            None => None,
            Some(gpu) => {
                let made = Buffer::new(gpu, sizes[0], &local).or_else(|e| match e {
                    VulkanError::OutOfMemory { .. } => Buffer::new(gpu, sizes[1], &local),
                    e => Err(e),
                });
                Some(made.map_err(|e| match e {
                    VulkanError::OutOfMemory { .. } => full(self.limit, size, held),
                    e => e,
                })?)
            }
        };
        let made = buffer.as_ref().map_or(sizes[0], |b| b.size);
        let _held = self.meter.hold(made as usize);
        let mut block = Block { id: self.id(), buffer, size: made, free: vec![(0, made)], _held };
        let region = self.cut(&mut block, 0, size);
        blocks.push(block);
        Ok(region)
    }

    fn cut(self: &Arc<Self>, block: &mut Block, i: usize, size: u64) -> Arc<Region> {
        let (offset, free) = block.free[i];
        if free == size {
            block.free.remove(i);
        } else {
            block.free[i] = (offset + size, free - size);
        }
        let owner = Owner::Memory { memory: self.clone(), block: block.id };
        let buffer = block.buffer.as_ref().map_or(vk::Buffer::null(), |b| b.raw);
        Arc::new(Region {
            id: self.id(),
            buffer,
            offset,
            size,
            keepers: AtomicUsize::new(0),
            slot: AtomicU64::new(u64::MAX),
            owner,
        })
    }

    /// A part of a region.
    pub(crate) fn part(&self, whole: &Arc<Region>, offset: u64, size: u64) -> Arc<Region> {
        debug_assert!(offset + size <= whole.size);
        let owner = Owner::Region(whole.clone());
        let (id, offset) = (self.id(), whole.offset + offset);
        Arc::new(Region {
            id,
            buffer: whole.buffer,
            offset,
            size,
            keepers: AtomicUsize::new(0),
            slot: AtomicU64::new(u64::MAX),
            owner,
        })
    }

    fn free(&self, block: u64, offset: u64, size: u64) {
        let mut blocks = self.lock();
        let Some(i) = blocks.iter().position(|b| b.id == block) else { return };
        let free = &mut blocks[i].free;
        let at = free.partition_point(|&(o, _)| o < offset);
        free.insert(at, (offset, size));
        if at + 1 < free.len() && free[at].0 + free[at].1 == free[at + 1].0 {
            free[at].1 += free[at + 1].1;
            free.remove(at + 1);
        }
        if at > 0 && free[at - 1].0 + free[at - 1].1 == free[at].0 {
            free[at - 1].1 += free[at].1;
            free.remove(at);
        }
        if blocks[i].free == [(0, blocks[i].size)] {
            blocks.remove(i);
        }
    }
}
