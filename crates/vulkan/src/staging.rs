//! Weights on their way to the device: the host fills one half of a ring while the device copies the other.

use std::sync::Arc;

use ash::vk;

use crate::error::Result;
use crate::gpu::Gpu;
use crate::memory::{Buffer, Region};

/// Bytes of one half.
const HALF: usize = 4 << 20;

struct Half {
    buffer: Buffer,
    commands: vk::CommandBuffer,
    fence: vk::Fence,
    /// Where its bytes are on their way to: it must not be given back before they have arrived.
    target: Option<Arc<Region>>,
}

/// The ring.
pub(crate) struct Ring {
    halves: [Half; 2],
    next: usize,
    gpu: Arc<Gpu>,
}

impl Ring {
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        let half = || -> Result<Half> {
            let buffer = Buffer::staging(gpu, HALF as u64)?;
            Ok(Half { buffer, commands: gpu.commands()?, fence: gpu.fence()?, target: None })
        };
        Ok(Self { halves: [half()?, half()?], next: 0, gpu: gpu.clone() })
    }

    /// Copies `size` bytes to `region`; `fill(start, out)` writes those from `start` on.
    pub(crate) fn send(
        &mut self,
        region: &Arc<Region>,
        size: usize,
        mut fill: impl FnMut(usize, &mut [u8]),
    ) -> Result<()> {
        let mut start = 0;
        let mut bytes = vec![0u8; HALF.min(size)];
        while start < size {
            let count = HALF.min(size - start);
            let bytes = &mut bytes[..count];
            fill(start, bytes);
            let gpu = self.gpu.clone();
            let half = &mut self.halves[self.next];
            if half.target.is_some() {
                gpu.wait(half.fence)?;
                half.target = None;
            }
            half.buffer.write(0, bytes);
            let (from, to) = (half.buffer.raw, region.buffer);
            let copy = [vk::BufferCopy {
                src_offset: 0,
                dst_offset: region.offset + start as u64,
                size: count as u64,
            }];
            gpu.record(half.commands, || {
                // SAFETY: both ranges lie within their buffers, which live until the copy has been waited for.
                unsafe { gpu.raw.cmd_copy_buffer(half.commands, from, to, &copy) };
                gpu.barrier(half.commands, false);
            })?;
            gpu.submit(half.commands, half.fence)?;
            half.target = Some(region.clone());
            self.next = 1 - self.next;
            start += count;
        }
        Ok(())
    }

    /// Waits until all that was sent has arrived.
    pub(crate) fn finish(&mut self) -> Result<()> {
        for half in &mut self.halves {
            if half.target.is_some() {
                self.gpu.wait(half.fence)?;
                half.target = None;
            }
        }
        Ok(())
    }
}

impl Drop for Ring {
    fn drop(&mut self) {
        if self.gpu.abandoned() || self.finish().is_err() {
            return;
        }
        for half in &self.halves {
            // SAFETY: waited for above; command buffers go with their pool.
            unsafe { self.gpu.raw.destroy_fence(half.fence, None) };
        }
    }
}
