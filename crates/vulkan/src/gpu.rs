//! A logical device with one queue: submitting work and waiting for it.

use std::ffi::c_char;
use std::sync::Arc;
use std::sync::atomic::{AtomicU8, AtomicU64, Ordering};
use std::time::Duration;

use ash::{khr, vk};

use crate::device::VulkanOptions;
use crate::error::{Result, VulkanError};
use crate::info::{BF16_EXTENSION, Bf16Features, GpuInfo};
use crate::instance::Instance;

pub(crate) struct Gpu {
    pub(crate) raw: ash::Device,
    pub(crate) info: GpuInfo,
    pub(crate) memory: vk::PhysicalDeviceMemoryProperties,
    pub(crate) pool: vk::CommandPool,
    /// The queue's clock, if it has one.
    pub(crate) clock: Option<Clock>,
    queue: vk::Queue,
    /// Nanoseconds that a submission may take.
    timeout: AtomicU64,
    /// Submissions until the device is lost on purpose; 0 for never.
    lose: AtomicU64,
    /// Submissions until it hangs on purpose; 0 for never.
    hang: AtomicU64,
    /// 0 while it works, 1 lost, 2 hung.
    state: AtomicU8,
    pub(crate) instance: Arc<Instance>,
}

/// The clock of a queue.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Clock {
    /// Seconds of a tick.
    pub(crate) tick: f64,
    /// The bits that count.
    pub(crate) mask: u64,
}

impl Gpu {
    pub(crate) fn open(options: &VulkanOptions) -> Result<Arc<Self>> {
        let index = options.index;
        let instance = Instance::new()?;
        let gpus = instance.gpus()?;
        let Some(&gpu) = gpus.get(index) else {
            return Err(VulkanError::NoDevice { wanted: index, found: gpus.len() });
        };
        let info = GpuInfo::read(&instance, gpu);
        let lacks = |what: String| Err(VulkanError::Lacks { device: info.name.clone(), what });
        if info.api < (1, 3, 0) {
            return lacks(format!("Vulkan 1.3 (it has {}.{})", info.api.0, info.api.1));
        }
        if info.max_bindings < 15 || info.shared_bytes < 32 << 10 {
            return lacks("15 storage buffers in a kernel and 32 KiB of shared memory".into());
        }
        // SAFETY: queries of this instance's device.
        let (families, memory) = unsafe {
            let raw = &instance.raw;
            (
                raw.get_physical_device_queue_family_properties(gpu),
                raw.get_physical_device_memory_properties(gpu),
            )
        };
        // A family that only computes, if there is one: it does not share with the screen.
        let computes = |q: &vk::QueueFamilyProperties| q.queue_flags.contains(vk::QueueFlags::COMPUTE);
        let alone = |q: &vk::QueueFamilyProperties| !q.queue_flags.contains(vk::QueueFlags::GRAPHICS);
        let family = families.iter().position(|q| computes(q) && alone(q));
        let Some(family) = family.or_else(|| families.iter().position(computes)) else {
            return lacks("a queue for compute".into());
        };
        let clock = match families[family].timestamp_valid_bits {
            0 => None,
            bits => Some(Clock { tick: f64::from(info.tick) * 1e-9, mask: u64::MAX >> (64 - bits.min(64)) }),
        };
        let family = family as u32;
        let queues =
            [vk::DeviceQueueCreateInfo::default().queue_family_index(family).queue_priorities(&[1.0])];
        let matrices = !info.matrices.is_empty();
        let mut names: Vec<*const c_char> = vec![];
        if matrices {
            names.push(khr::cooperative_matrix::NAME.as_ptr());
        }
        if info.bf16.0 {
            names.push(BF16_EXTENSION.as_ptr());
        }
        // SAFETY: a query of this instance's device.
        let known = unsafe { instance.raw.enumerate_device_extension_properties(gpu) }.unwrap_or_default();
        let subset = khr::portability_subset::NAME;
        if known.iter().any(|e| e.extension_name_as_c_str() == Ok(subset)) {
            names.push(subset.as_ptr());
        }
        let mut f11 = vk::PhysicalDeviceVulkan11Features::default().storage_buffer16_bit_access(info.f16);
        let mut f12 = vk::PhysicalDeviceVulkan12Features::default()
            .shader_float16(info.f16)
            .shader_int8(info.int8)
            .vulkan_memory_model(info.memory_model)
            .vulkan_memory_model_device_scope(info.memory_model);
        let mut f13 = vk::PhysicalDeviceVulkan13Features::default()
            .shader_integer_dot_product(info.int8_dot.0)
            .subgroup_size_control(true)
            .compute_full_subgroups(true);
        let mut matrix =
            vk::PhysicalDeviceCooperativeMatrixFeaturesKHR::default().cooperative_matrix(matrices);
        let mut create = vk::DeviceCreateInfo::default()
            .queue_create_infos(&queues)
            .enabled_extension_names(&names)
            .push_next(&mut f11)
            .push_next(&mut f12)
            .push_next(&mut f13);
        if matrices {
            create = create.push_next(&mut matrix);
        }
        let mut bf16 = Bf16Features::new(info.bf16.1);
        if info.bf16.0 {
            bf16.p_next = create.p_next.cast_mut();
            create.p_next = std::ptr::from_ref(&bf16).cast();
        }
        // SAFETY: every extension and feature asked for was reported as present; the chain lives to the end.
        let raw = unsafe { instance.raw.create_device(gpu, &create, None) }
            .map_err(VulkanError::call("vkCreateDevice"))?;
        // SAFETY: the family has one queue, asked for above.
        let queue = unsafe { raw.get_device_queue(family, 0) };
        let pool = vk::CommandPoolCreateInfo::default()
            .queue_family_index(family)
            .flags(vk::CommandPoolCreateFlags::RESET_COMMAND_BUFFER);
        // SAFETY: the device was just made.
        let pool = match unsafe { raw.create_command_pool(&pool, None) } {
            Ok(pool) => pool,
            Err(e) => {
                // SAFETY: nothing else was made from it.
                unsafe { raw.destroy_device(None) };
                return Err(VulkanError::call("vkCreateCommandPool")(e));
            }
        };
        Ok(Arc::new(Self {
            raw,
            info,
            memory,
            pool,
            clock,
            queue,
            timeout: AtomicU64::new(nanoseconds(options.timeout)),
            lose: AtomicU64::new(options.lose.map_or(0, |n| n + 1)),
            hang: AtomicU64::new(options.hang.map_or(0, |n| n + 1)),
            state: AtomicU8::new(0),
            instance,
        }))
    }

    /// Whether work may still run that nobody waits for: then nothing that it uses may be given back.
    pub(crate) fn abandoned(&self) -> bool {
        self.state.load(Ordering::Relaxed) == 2
    }

    fn timeout(&self) -> Duration {
        Duration::from_nanos(self.timeout.load(Ordering::Relaxed))
    }

    pub(crate) fn set_timeout(&self, timeout: Duration) {
        self.timeout.store(nanoseconds(timeout), Ordering::Relaxed);
    }

    /// An error if the device was lost before.
    pub(crate) fn alive(&self) -> Result<()> {
        match self.state.load(Ordering::Relaxed) {
            0 => Ok(()),
            1 => Err(VulkanError::Lost("an earlier call".into())),
            _ => Err(VulkanError::Hung(self.timeout().as_secs())),
        }
    }

    pub(crate) fn commands(&self) -> Result<vk::CommandBuffer> {
        let info = vk::CommandBufferAllocateInfo::default().command_pool(self.pool).command_buffer_count(1);
        // SAFETY: the pool is this device's; callers hold the lock of its state.
        let made = unsafe { self.raw.allocate_command_buffers(&info) };
        Ok(made.map_err(VulkanError::call("vkAllocateCommandBuffers"))?[0])
    }

    /// Records what `f` says into `commands`.
    pub(crate) fn record(&self, commands: vk::CommandBuffer, f: impl FnOnce()) -> Result<()> {
        let info = vk::CommandBufferBeginInfo::default();
        // SAFETY: the buffer is not in use, since every submission is waited for.
        unsafe { self.raw.begin_command_buffer(commands, &info) }
            .map_err(VulkanError::call("vkBeginCommandBuffer"))?;
        f();
        // SAFETY: begun above.
        unsafe { self.raw.end_command_buffer(commands) }.map_err(VulkanError::call("vkEndCommandBuffer"))
    }

    pub(crate) fn fence(&self) -> Result<vk::Fence> {
        // SAFETY: a plain creation.
        unsafe { self.raw.create_fence(&vk::FenceCreateInfo::default(), None) }
            .map_err(VulkanError::call("vkCreateFence"))
    }

    pub(crate) fn submit(&self, commands: vk::CommandBuffer, fence: vk::Fence) -> Result<()> {
        self.alive()?;
        let is_now = |count: &AtomicU64| {
            let left = count.load(Ordering::Relaxed);
            count.store(left.saturating_sub(1), Ordering::Relaxed);
            left == 1
        };
        if is_now(&self.lose) {
            return Err(self.fallen(VulkanError::call("vkQueueSubmit")(vk::Result::ERROR_DEVICE_LOST)));
        }
        if is_now(&self.hang) {
            self.set_timeout(Duration::from_nanos(1));
        }
        let buffers = [commands];
        let submits = [vk::SubmitInfo::default().command_buffers(&buffers)];
        // SAFETY: the buffer is recorded and what it names is alive; callers hold the lock of the queue's owner.
        unsafe { self.raw.queue_submit(self.queue, &submits, fence) }
            .map_err(|e| self.fallen(VulkanError::call("vkQueueSubmit")(e)))
    }

    /// Waits for a submission, and makes its fence ready for the next.
    pub(crate) fn wait(&self, fence: vk::Fence) -> Result<()> {
        let nanoseconds = self.timeout.load(Ordering::Relaxed);
        // SAFETY: the fence is this device's.
        match unsafe { self.raw.wait_for_fences(&[fence], true, nanoseconds) } {
            Ok(()) => {}
            Err(vk::Result::TIMEOUT) => return Err(self.fallen(VulkanError::Hung(self.timeout().as_secs()))),
            Err(e) => return Err(self.fallen(VulkanError::call("vkWaitForFences")(e))),
        }
        // SAFETY: signalled, so no longer in use.
        unsafe { self.raw.reset_fences(&[fence]) }.map_err(VulkanError::call("vkResetFences"))
    }

    /// Remembers that the device is gone.
    fn fallen(&self, e: VulkanError) -> VulkanError {
        match e {
            VulkanError::Lost(_) => self.state.store(1, Ordering::Relaxed),
            VulkanError::Hung(_) => self.state.store(2, Ordering::Relaxed),
            _ => {}
        }
        e
    }

    /// All that was written before is seen by all that comes after.
    pub(crate) fn barrier(&self, commands: vk::CommandBuffer, host: bool) {
        let work = vk::PipelineStageFlags::COMPUTE_SHADER | vk::PipelineStageFlags::TRANSFER;
        let barrier = vk::MemoryBarrier::default()
            .src_access_mask(vk::AccessFlags::SHADER_WRITE | vk::AccessFlags::TRANSFER_WRITE)
            .dst_access_mask(match host {
                true => vk::AccessFlags::HOST_READ,
                false => {
                    vk::AccessFlags::SHADER_READ
                        | vk::AccessFlags::SHADER_WRITE
                        | vk::AccessFlags::TRANSFER_READ
                        | vk::AccessFlags::TRANSFER_WRITE
                }
            });
        let to = if host { vk::PipelineStageFlags::HOST } else { work };
        // SAFETY: the buffer is being recorded.
        unsafe {
            self.raw.cmd_pipeline_barrier(
                commands,
                work,
                to,
                vk::DependencyFlags::empty(),
                &[barrier],
                &[],
                &[],
            );
        }
    }
}

fn nanoseconds(time: Duration) -> u64 {
    u64::try_from(time.as_nanos()).unwrap_or(u64::MAX)
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if self.abandoned() {
            std::mem::forget(self.instance.clone());
            return;
        }
        // SAFETY: all that was made from the device holds an `Arc` of it and is gone.
        unsafe {
            let _ = self.raw.device_wait_idle();
            self.raw.destroy_command_pool(self.pool, None);
            self.raw.destroy_device(None);
        }
    }
}
