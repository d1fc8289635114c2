//! What a GPU offers.

use std::ffi::{CStr, c_void};
use std::fmt;

use ash::{amd, khr, nv, vk};

use crate::error::Result;
use crate::instance::Instance;

/// A product of small matrices that a subgroup does at once.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MatrixShape {
    /// Rows, columns and depth.
    pub size: [u32; 3],
    /// Operands, such as `f16`.
    pub operands: &'static str,
    /// Sums, such as `f32`.
    pub sums: &'static str,
}

/// One GPU as its driver describes it.
#[derive(Debug, Clone)]
pub struct GpuInfo {
    /// Name of the GPU.
    pub name: String,
    /// Name and version of the driver.
    pub driver: String,
    /// Version of Vulkan.
    pub api: (u32, u32, u32),
    /// Whether it is the host's processor that pretends.
    pub software: bool,
    /// Bytes of the largest device-local heap.
    pub memory: u64,
    /// Least and largest number of lanes of a subgroup.
    pub subgroup: (u32, u32),
    /// Shapes of cooperative matrices at subgroup scope.
    pub matrices: Vec<MatrixShape>,
    /// bf16 as a type of kernels, and in cooperative matrices.
    pub bf16: (bool, bool),
    /// f16 arithmetic and storage.
    pub f16: bool,
    /// 8-bit integers as a type of kernels.
    pub int8: bool,
    /// Dot products of four 8-bit integers: supported, and accelerated.
    pub int8_dot: (bool, bool),
    /// Processors (NVIDIA's SMs, AMD's compute units), where the driver tells.
    pub processors: Option<u32>,
    /// Largest buffer that a kernel can see, in bytes.
    pub max_binding: u64,
    pub(crate) memory_model: bool,
    /// Whether kernels can ask for a subgroup size.
    pub(crate) subgroup_choice: bool,
    /// Nanoseconds of a tick of the clock.
    pub(crate) tick: f32,
    pub(crate) max_bindings: u32,
    pub(crate) shared_bytes: u32,
}

/// `VkPhysicalDeviceShaderBfloat16FeaturesKHR`, which is newer than the bindings.
#[repr(C)]
#[derive(Clone, Copy)]
pub(crate) struct Bf16Features {
    s_type: i32,
    pub(crate) p_next: *mut c_void,
    kind: vk::Bool32,
    dot_product: vk::Bool32,
    cooperative_matrix: vk::Bool32,
}

/// `VK_COMPONENT_TYPE_BFLOAT16_KHR`.
const COMPONENT_BF16: i32 = 1_000_141_000;
pub(crate) const BF16_EXTENSION: &CStr = c"VK_KHR_shader_bfloat16";

impl Bf16Features {
    pub(crate) fn new(on: bool) -> Self {
        let on = u32::from(on);
        let p_next = std::ptr::null_mut();
        Self { s_type: 1_000_141_000, p_next, kind: on, dot_product: 0, cooperative_matrix: on }
    }
}

fn component(kind: vk::ComponentTypeKHR) -> &'static str {
    match kind {
        vk::ComponentTypeKHR::FLOAT16 => "f16",
        vk::ComponentTypeKHR::FLOAT32 => "f32",
        vk::ComponentTypeKHR::SINT8 => "s8",
        vk::ComponentTypeKHR::UINT8 => "u8",
        vk::ComponentTypeKHR::SINT32 => "s32",
        vk::ComponentTypeKHR::UINT32 => "u32",
        k if k.as_raw() == COMPONENT_BF16 => "bf16",
        _ => "other",
    }
}

impl GpuInfo {
    pub(crate) fn read(instance: &Instance, gpu: vk::PhysicalDevice) -> Self {
        let raw = &instance.raw;
        // SAFETY: a query of a physical device of this instance.
        let extensions = unsafe { raw.enumerate_device_extension_properties(gpu) }.unwrap_or_default();
        let has = |name: &CStr| extensions.iter().any(|e| e.extension_name_as_c_str() == Ok(name));
        let mut p11 = vk::PhysicalDeviceVulkan11Properties::default();
        let mut p12 = vk::PhysicalDeviceVulkan12Properties::default();
        let mut p13 = vk::PhysicalDeviceVulkan13Properties::default();
        let mut p2 = vk::PhysicalDeviceProperties2::default();
        // SAFETY: as above.
        let version = unsafe { raw.get_physical_device_properties(gpu) }.api_version;
        // Older devices do not know the structures; the loader leaves them as they are.
        p2 = p2.push_next(&mut p11).push_next(&mut p12);
        if version >= vk::API_VERSION_1_3 {
            p2 = p2.push_next(&mut p13);
        }
        // SAFETY: as above; the chained structures live to the end of the function.
        unsafe { raw.get_physical_device_properties2(gpu, &mut p2) };
        let p = p2.properties;
        let processors = processors(raw, gpu, has);
        let mut f11 = vk::PhysicalDeviceVulkan11Features::default();
        let mut f12 = vk::PhysicalDeviceVulkan12Features::default();
        let mut f13 = vk::PhysicalDeviceVulkan13Features::default();
        let mut matrix = vk::PhysicalDeviceCooperativeMatrixFeaturesKHR::default();
        let mut bf16 = Bf16Features::new(false);
        let mut f2 = vk::PhysicalDeviceFeatures2::default().push_next(&mut f11).push_next(&mut f12);
        if version >= vk::API_VERSION_1_3 {
            f2 = f2.push_next(&mut f13);
        }
        if has(khr::cooperative_matrix::NAME) {
            f2 = f2.push_next(&mut matrix);
        }
        if has(BF16_EXTENSION) {
            bf16.p_next = f2.p_next;
            f2.p_next = std::ptr::from_mut(&mut bf16).cast();
        }
        // SAFETY: as above.
        unsafe { raw.get_physical_device_features2(gpu, &mut f2) };
        let mut matrices = Vec::new();
        if matrix.cooperative_matrix == vk::TRUE {
            let api = khr::cooperative_matrix::Instance::new(&instance.entry, raw);
            // SAFETY: the extension is there.
            let shapes = unsafe { api.get_physical_device_cooperative_matrix_properties(gpu) };
            for s in shapes.unwrap_or_default() {
                if s.scope == vk::ScopeKHR::SUBGROUP && s.a_type == s.b_type && s.c_type == s.result_type {
                    let (operands, sums) = (component(s.a_type), component(s.c_type));
                    matrices.push(MatrixShape { size: [s.m_size, s.n_size, s.k_size], operands, sums });
                }
            }
        }
        // SAFETY: as above.
        let memory = unsafe { raw.get_physical_device_memory_properties(gpu) };
        let heaps = &memory.memory_heaps[..memory.memory_heap_count as usize];
        let local = heaps.iter().filter(|h| h.flags.contains(vk::MemoryHeapFlags::DEVICE_LOCAL));
        let text = |c: std::result::Result<&CStr, _>| c.map_or(String::new(), |c| c.to_string_lossy().into());
        let driver = [text(p12.driver_name_as_c_str()), text(p12.driver_info_as_c_str())].join(" ");
        let (least, most) = (p13.min_subgroup_size, p13.max_subgroup_size);
        let on = |b: vk::Bool32| b == vk::TRUE;
        let dot = p13.integer_dot_product4x8_bit_packed_signed_accelerated;
        Self {
            name: text(p.device_name_as_c_str()),
            driver: driver.trim().to_string(),
            api: (
                vk::api_version_major(version),
                vk::api_version_minor(version),
                vk::api_version_patch(version),
            ),
            software: p.device_type == vk::PhysicalDeviceType::CPU,
            memory: local.map(|h| h.size).max().unwrap_or(0),
            subgroup: if least == 0 { (p11.subgroup_size, p11.subgroup_size) } else { (least, most) },
            matrices,
            bf16: (on(bf16.kind), on(bf16.cooperative_matrix)),
            f16: on(f12.shader_float16) && on(f11.storage_buffer16_bit_access),
            int8: on(f12.shader_int8),
            int8_dot: (on(f13.shader_integer_dot_product), on(dot)),
            processors,
            max_binding: u64::from(p.limits.max_storage_buffer_range),
            memory_model: on(f12.vulkan_memory_model),
            subgroup_choice: p13.required_subgroup_size_stages.contains(vk::ShaderStageFlags::COMPUTE),
            tick: p.limits.timestamp_period,
            max_bindings: p.limits.max_per_stage_descriptor_storage_buffers,
            shared_bytes: p.limits.max_compute_shared_memory_size,
        }
    }
}

/// How many processors a GPU has, by the two extensions that tell.
fn processors(raw: &ash::Instance, gpu: vk::PhysicalDevice, has: impl Fn(&CStr) -> bool) -> Option<u32> {
    let mut sm = vk::PhysicalDeviceShaderSMBuiltinsPropertiesNV::default();
    let mut core = vk::PhysicalDeviceShaderCoreProperties2AMD::default();
    let mut p2 = vk::PhysicalDeviceProperties2::default();
    if has(nv::shader_sm_builtins::NAME) {
        p2 = p2.push_next(&mut sm);
    }
    if has(amd::shader_core_properties2::NAME) {
        p2 = p2.push_next(&mut core);
    }
    // SAFETY: a query of a physical device of this instance; the chained structures are known to its driver and outlive
    // the call.
    unsafe { raw.get_physical_device_properties2(gpu, &mut p2) };
    [sm.shader_sm_count, core.active_compute_unit_count].into_iter().find(|&n| n > 0)
}

impl fmt::Display for GpuInfo {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (major, minor, patch) = self.api;
        write!(f, "{}, {}, Vulkan {major}.{minor}.{patch}, ", self.name, self.driver)?;
        write!(f, "{:.1} GB", self.memory as f64 / 1e9)?;
        if self.software {
            write!(f, " of the host: software, no GPU")?;
        }
        if let Some(processors) = self.processors {
            write!(f, ", {processors} processors")?;
        }
        match self.subgroup {
            (a, b) if a == b => write!(f, ", subgroups of {a}")?,
            (a, b) => write!(f, ", subgroups of {a} to {b}")?,
        }
        let mut shapes: Vec<String> = self
            .matrices
            .iter()
            .map(|m| format!("{}x{}x{} {}-{}", m.size[0], m.size[1], m.size[2], m.operands, m.sums))
            .collect();
        shapes.dedup();
        match shapes.as_slice() {
            [] => write!(f, ", no matrices")?,
            shapes => write!(f, ", matrices {}", shapes.join(" "))?,
        }
        let has = |b| if b { "yes" } else { "no" };
        write!(f, ", f16 {}, bf16 {}, ", has(self.f16), has(self.bf16.0))?;
        let dot = match self.int8_dot {
            (true, true) => "yes",
            (true, false) => "emulated",
            _ => "no",
        };
        write!(f, "int8 dot products {dot}")
    }
}

/// Every GPU of this machine that Vulkan drives, in the order of their numbers.
pub fn list() -> Result<Vec<GpuInfo>> {
    let instance = Instance::new()?;
    Ok(instance.gpus()?.into_iter().map(|gpu| GpuInfo::read(&instance, gpu)).collect())
}
