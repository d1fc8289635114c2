//! A tape as a command buffer with memory of its own, ready to be submitted again and again.

use std::sync::Arc;

use ash::vk;

use crate::device::LaunchInfo;
use crate::error::{Result, VulkanError};
use crate::gpu::Gpu;
use crate::kernels::Pipelines;
use crate::memory::{Buffer, Memory, Region};
use crate::plan::{Plan, plan};
use crate::script::Script;
use crate::tape::{BINDINGS, Launch, Operand, Tape};

pub(crate) struct Recording {
    /// The tape's calls: what this recording is for.
    pub(crate) script: Arc<Script>,
    target: Option<Target>,
    commands: vk::CommandBuffer,
    descriptors: vk::DescriptorPool,
    fence: vk::Fence,
    /// Values that outlive a run, by their index on the tape.
    held: Vec<(u32, Arc<Region>)>,
    uploads: Option<Buffer>,
    readback: Option<Buffer>,
    /// A clock's value before the first launch and after each; none if nobody asked, or the queue has no clock.
    clock: Option<vk::QueryPool>,
    /// Bytes of activations.
    pub(crate) arena_bytes: u64,
    pub(crate) launches: usize,
    /// Before which launches a barrier stands.
    pub(crate) barriers: Vec<bool>,
    /// What its launches are, once somebody made the list.
    pub(crate) launched: Option<Arc<[LaunchInfo]>>,
    /// When it last ran, for forgetting the oldest.
    pub(crate) used: u64,
    _arena: Arc<Region>,
    gpu: Arc<Gpu>,
}

/// What is read back after a run: a value and the range of it, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Target {
    pub(crate) value: u32,
    pub(crate) start: u64,
    pub(crate) len: u64,
}

/// What to record beside the tape.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Manner {
    pub(crate) target: Option<Target>,
    /// Leaves out the barrier of that number, to try the checks.
    pub(crate) skip_barrier: Option<usize>,
    /// Takes the time of each launch.
    pub(crate) timestamps: bool,
}

impl Recording {
    /// Records `tape`, of whose values `held` outlive a run.
    pub(crate) fn new(
        gpu: &Arc<Gpu>,
        memory: &Arc<Memory>,
        pipelines: &Pipelines,
        tape: &Tape,
        held: &[u32],
        how: &Manner,
    ) -> Result<Self> {
        let target = how.target;
        let plan = plan(tape, held);
        let arena = memory.take(plan.size)?;
        let uploads = match tape.data.len() {
            0 => None,
            n => Some(Buffer::staging(gpu, n as u64)?),
        };
        let readback = target.map(|t| Buffer::readback(gpu, t.len.max(4))).transpose()?;
        let place =
            |v: u32| memory.part(&arena, plan.offsets[v as usize], tape.values[v as usize].bytes.max(16));
        let mut recording = Self {
            script: tape.script(),
            target,
            commands: gpu.commands()?,
            descriptors: vk::DescriptorPool::null(),
            fence: vk::Fence::null(),
            held: held.iter().map(|&v| (v, place(v))).collect(),
            uploads,
            readback,
            clock: None,
            arena_bytes: plan.size,
            launches: tape.launches.len(),
            barriers: plan.barriers.clone(),
            launched: None,
            used: 0,
            _arena: arena.clone(),
            gpu: gpu.clone(),
        };
        recording.fence = gpu.fence()?;
        if how.timestamps && gpu.clock.is_some() {
            let count = tape.launches.len() as u32 + 1;
            let info =
                vk::QueryPoolCreateInfo::default().query_type(vk::QueryType::TIMESTAMP).query_count(count);
            // SAFETY: a plain creation.
            let pool = unsafe { gpu.raw.create_query_pool(&info, None) };
            recording.clock = Some(pool.map_err(VulkanError::call("vkCreateQueryPool"))?);
        }
        recording.descriptors = recording.descriptor_pool(tape)?;
        let sets = recording.sets(pipelines, tape, &plan, &arena)?;
        let recorded = gpu.record(recording.commands, || {
            recording.fill(pipelines, tape, &plan, &arena, &sets, how);
        });
        recorded.map(|()| recording)
    }

    /// Whether this is the work of these calls, of which the same values are wanted, and nothing holds what its last run left.
    pub(crate) fn fits(&self, script: &Arc<Script>, held: &[u32], target: Option<Target>) -> bool {
        let same = Arc::ptr_eq(&self.script, script) || self.script.words == script.words;
        same && self.target == target
            && self.held.iter().map(|h| &h.0).eq(held)
            && self.held.iter().all(|(_, region)| Region::is_free(region))
    }

    /// Begins to run it with the tape's uploads.
    pub(crate) fn submit(&mut self, tape: &Tape) -> Result<()> {
        if let Some(uploads) = &mut self.uploads {
            uploads.write(0, &tape.data);
        }
        self.gpu.submit(self.commands, self.fence)
    }

    /// Waits for the end of what [`submit`](Self::submit) began.
    pub(crate) fn wait(&self) -> Result<()> {
        self.gpu.wait(self.fence)
    }

    /// Seconds of each launch of the last run; none if they were not measured.
    pub(crate) fn times(&self) -> Result<Vec<f64>> {
        let (Some(pool), Some(clock)) = (self.clock, self.gpu.clock) else { return Ok(vec![]) };
        let mut ticks = vec![0u64; self.launches + 1];
        let flags = vk::QueryResultFlags::TYPE_64 | vk::QueryResultFlags::WAIT;
        // SAFETY: the pool has as many queries, and the run that wrote them was waited for.
        unsafe { self.gpu.raw.get_query_pool_results(pool, 0, &mut ticks, flags) }
            .map_err(VulkanError::call("vkGetQueryPoolResults"))?;
        let passed = |w: &[u64]| (w[1].wrapping_sub(w[0]) & clock.mask) as f64 * clock.tick;
        Ok(ticks.windows(2).map(passed).collect())
    }

    /// Where a held value lies.
    pub(crate) fn region(&self, value: u32) -> Option<&Arc<Region>> {
        self.held.binary_search_by_key(&value, |h| h.0).ok().map(|i| &self.held[i].1)
    }

    /// What the last run brought back.
    pub(crate) fn result(&self, count: usize) -> Vec<f32> {
        self.readback.as_ref().map_or_else(Vec::new, |b| b.read(count))
    }

    fn descriptor_pool(&self, tape: &Tape) -> Result<vk::DescriptorPool> {
        let count: usize = tape.launches.iter().map(|l| l.count).sum();
        let sizes = [vk::DescriptorPoolSize {
            ty: vk::DescriptorType::STORAGE_BUFFER,
            descriptor_count: count.max(1) as u32,
        }];
        let info = vk::DescriptorPoolCreateInfo::default()
            .max_sets(tape.launches.len().max(1) as u32)
            .pool_sizes(&sizes);
        // SAFETY: a plain creation.
        unsafe { self.gpu.raw.create_descriptor_pool(&info, None) }
            .map_err(VulkanError::call("vkCreateDescriptorPool"))
    }

    fn sets(
        &self,
        pipelines: &Pipelines,
        tape: &Tape,
        plan: &Plan,
        arena: &Region,
    ) -> Result<Vec<vk::DescriptorSet>> {
        let mut sets = Vec::with_capacity(tape.launches.len());
        for launch in &tape.launches {
            let layouts = [pipelines.raw(launch.pipeline).2];
            let info = vk::DescriptorSetAllocateInfo::default()
                .descriptor_pool(self.descriptors)
                .set_layouts(&layouts);
            // SAFETY: the pool was made for exactly these sets.
            let set = unsafe { self.gpu.raw.allocate_descriptor_sets(&info) }
                .map_err(VulkanError::call("vkAllocateDescriptorSets"))?[0];
            self.write_set(set, launch, tape, plan, arena);
            sets.push(set);
        }
        Ok(sets)
    }

    fn write_set(&self, set: vk::DescriptorSet, launch: &Launch, tape: &Tape, plan: &Plan, arena: &Region) {
        let mut infos = [[vk::DescriptorBufferInfo::default()]; BINDINGS];
        for (info, operand) in infos.iter_mut().zip(&launch.operands[..launch.count]) {
            let (buffer, offset, range) = match *operand {
                Operand::Value(v) => {
                    let bytes = tape.values[v as usize].bytes.max(16);
                    (arena.buffer, arena.offset + plan.offsets[v as usize], bytes)
                }
                Operand::Outer(o) => {
                    let region = &tape.outer[o as usize];
                    (region.buffer, region.offset, region.size)
                }
            };
            *info = [vk::DescriptorBufferInfo { buffer, offset, range }];
        }
        let writes: Vec<_> = infos[..launch.count]
            .iter()
            .enumerate()
            .map(|(i, info)| {
                vk::WriteDescriptorSet::default()
                    .dst_set(set)
                    .dst_binding(i as u32)
                    .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
                    .buffer_info(info)
            })
            .collect();
        // SAFETY: the set is new, and the buffers outlive this recording.
        unsafe { self.gpu.raw.update_descriptor_sets(&writes, &[]) };
    }

    #[allow(clippy::too_many_arguments)]
    fn fill(
        &self,
        pipelines: &Pipelines,
        tape: &Tape,
        plan: &Plan,
        arena: &Region,
        sets: &[vk::DescriptorSet],
        how: &Manner,
    ) {
        let (raw, commands) = (&self.gpu.raw, self.commands);
        let note = |query: usize| {
            if let Some(pool) = self.clock {
                let end = vk::PipelineStageFlags::BOTTOM_OF_PIPE;
                // SAFETY: the pool has a query for each launch and one more, all reset first.
                unsafe { raw.cmd_write_timestamp(commands, end, pool, query as u32) };
            }
        };
        if let Some(pool) = self.clock {
            // SAFETY: as above.
            unsafe { raw.cmd_reset_query_pool(commands, pool, 0, self.launches as u32 + 1) };
        }
        if let Some(uploads) = &self.uploads {
            let copies: Vec<_> = tape
                .uploads
                .iter()
                .filter(|u| u.len > 0)
                .map(|u| vk::BufferCopy {
                    src_offset: u.start as u64,
                    dst_offset: arena.offset + plan.offsets[u.value as usize],
                    size: u.len as u64,
                })
                .collect();
            if !copies.is_empty() {
                // SAFETY: the ranges lie in both buffers, which live as long as this recording.
                unsafe { raw.cmd_copy_buffer(commands, uploads.raw, arena.buffer, &copies) };
            }
        }
        // The uploads are seen, and what earlier submissions wrote.
        self.gpu.barrier(commands, false);
        note(0);
        let mut barriers = 0;
        let mut bound = u32::MAX;
        for (i, ((launch, &set), &barrier)) in tape.launches.iter().zip(sets).zip(&plan.barriers).enumerate()
        {
            let (pipeline, layout, _) = pipelines.raw(launch.pipeline);
            if barrier {
                if how.skip_barrier != Some(barriers) {
                    self.gpu.barrier(commands, false);
                }
                barriers += 1;
            }
            let push: &[u8] = bytemuck::cast_slice(&launch.push[..launch.push_count]);
            // SAFETY: pipelines outlive recordings; the set names memory that this recording keeps.
            unsafe {
                if bound != launch.pipeline {
                    raw.cmd_bind_pipeline(commands, vk::PipelineBindPoint::COMPUTE, pipeline);
                    bound = launch.pipeline;
                }
                raw.cmd_bind_descriptor_sets(
                    commands,
                    vk::PipelineBindPoint::COMPUTE,
                    layout,
                    0,
                    &[set],
                    &[],
                );
                raw.cmd_push_constants(commands, layout, vk::ShaderStageFlags::COMPUTE, 0, push);
                raw.cmd_dispatch(commands, launch.groups[0], launch.groups[1], 1);
            }
            note(i + 1);
        }
        if let (Some(t), Some(readback)) = (how.target, &self.readback)
            && t.len > 0
        {
            let start = arena.offset + plan.offsets[t.value as usize] + t.start;
            let copy = [vk::BufferCopy { src_offset: start, dst_offset: 0, size: t.len }];
            self.gpu.barrier(commands, false);
            // SAFETY: as above.
            unsafe { raw.cmd_copy_buffer(commands, arena.buffer, readback.raw, &copy) };
            self.gpu.barrier(commands, true);
        }
    }
}

impl Drop for Recording {
    fn drop(&mut self) {
        if self.gpu.abandoned() {
            return;
        }
        // SAFETY: no run is in flight: each is waited for. Null handles are ignored.
        unsafe {
            self.gpu.raw.free_command_buffers(self.gpu.pool, &[self.commands]);
            self.gpu.raw.destroy_descriptor_pool(self.descriptors, None);
            self.gpu.raw.destroy_fence(self.fence, None);
            self.gpu.raw.destroy_query_pool(self.clock.unwrap_or_default(), None);
        }
    }
}
