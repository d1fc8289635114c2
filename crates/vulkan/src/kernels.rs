//! The compiled kernels and the pipelines made of them.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::sync::Arc;

use ash::vk;

use crate::error::{Result, VulkanError};
use crate::gpu::Gpu;
use crate::info::{GpuInfo, MatrixShape};

/// A kernel's binary, from `kernels/spv`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kernel {
    /// Products with f32 multiply-adds, by columns of a tile.
    Gemm64,
    Gemm16,
    /// Products on cooperative matrices, by columns of a tile.
    Matrix64(Units),
    Matrix16(Units),
    Norm,
    Pointwise,
    Embed,
    Rope,
    /// By the widest head.
    Attention32,
    Attention64,
    Attention128,
    Attention256,
}

/// Cooperative matrices that there are kernels for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Units {
    /// f16, 8 x 8 x 8, subgroups of 8.
    F16x8,
    /// f16, 16 x 16 x 16, subgroups of 32.
    F16x16,
    /// bf16, 16 x 16 x 16, subgroups of 32.
    Bf16x16,
}

impl Units {
    const ALL: [Units; 3] = [Units::Bf16x16, Units::F16x16, Units::F16x8];

    fn size(self) -> u32 {
        if self == Units::F16x8 { 8 } else { 16 }
    }

    /// Lanes that a subgroup must have.
    fn lanes(self) -> u32 {
        if self == Units::F16x8 { 8 } else { 32 }
    }

    pub(crate) fn is_f16(self) -> bool {
        self != Units::Bf16x16
    }

    /// The best that a GPU has; bf16 has range enough, and comes first.
    pub(crate) fn of(info: &GpuInfo) -> Option<Self> {
        let fits = |u: &Units| {
            let operands = if u.is_f16() { "f16" } else { "bf16" };
            let shape =
                |m: &MatrixShape| m.size == [u.size(); 3] && m.operands == operands && m.sums == "f32";
            let typed = if u.is_f16() { info.f16 } else { info.bf16.1 };
            let lanes = info.subgroup.0 <= u.lanes() && u.lanes() <= info.subgroup.1;
            typed && lanes && info.memory_model && info.matrices.iter().any(shape)
        };
        Units::ALL.into_iter().find(fits)
    }
}

macro_rules! spv {
    ($name:literal) => {
        include_bytes!(concat!("../kernels/spv/", $name, ".spv"))
    };
}

impl Kernel {
    /// File, number of bindings, words of push constants.
    fn parts(self) -> (&'static [u8], u32, u32) {
        match self {
            Kernel::Gemm64 => (spv!("gemm_64"), 15, 20),
            Kernel::Gemm16 => (spv!("gemm_16"), 15, 20),
            Kernel::Matrix64(Units::F16x8) => (spv!("matrix_64_f16_8"), 15, 20),
            Kernel::Matrix16(Units::F16x8) => (spv!("matrix_16_f16_8"), 15, 20),
            Kernel::Matrix64(Units::F16x16) => (spv!("matrix_64_f16_16"), 15, 20),
            Kernel::Matrix16(Units::F16x16) => (spv!("matrix_16_f16_16"), 15, 20),
            Kernel::Matrix64(Units::Bf16x16) => (spv!("matrix_64_bf16_16"), 15, 20),
            Kernel::Matrix16(Units::Bf16x16) => (spv!("matrix_16_bf16_16"), 15, 20),
            Kernel::Norm => (spv!("norm"), 5, 8),
            Kernel::Pointwise => (spv!("pointwise"), 5, 12),
            Kernel::Embed => (spv!("embed"), 3, 3),
            Kernel::Rope => (spv!("rope"), 4, 5),
            Kernel::Attention32 => (spv!("attention_32"), 9, 20),
            Kernel::Attention64 => (spv!("attention_64"), 9, 20),
            Kernel::Attention128 => (spv!("attention_128"), 9, 20),
            Kernel::Attention256 => (spv!("attention_256"), 9, 20),
        }
    }
}

impl Kernel {
    /// Name in reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kernel::Gemm64 | Kernel::Gemm16 => "product",
            Kernel::Matrix64(_) | Kernel::Matrix16(_) => "matrix product",
            Kernel::Norm => "norm",
            Kernel::Pointwise => "pointwise",
            Kernel::Embed => "embed",
            Kernel::Rope => "rope",
            Kernel::Attention32 | Kernel::Attention64 | Kernel::Attention128 | Kernel::Attention256 => {
                "attention"
            }
        }
    }

    /// Lanes that its subgroups must have, if that matters.
    fn lanes(self) -> Option<u32> {
        match self {
            Kernel::Matrix64(u) | Kernel::Matrix16(u) => Some(u.lanes()),
            _ => None,
        }
    }
}

/// A kernel with its specialization constants. All of them are always given: a driver is known that goes wrong where
/// some are not.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) struct Variant {
    pub(crate) kernel: Kernel,
    pub(crate) constants: [u32; 8],
}

/// Number of a pipeline of this device.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Pipeline(pub(crate) u32);

struct Layout {
    set: vk::DescriptorSetLayout,
    pipeline: vk::PipelineLayout,
}

struct Made {
    raw: vk::Pipeline,
    bindings: u32,
    kernel: Kernel,
}

/// Pipelines made so far; without a GPU only their numbers.
pub(crate) struct Pipelines {
    made: Vec<Made>,
    of: HashMap<Variant, u32>,
    /// By number of bindings.
    layouts: HashMap<u32, Layout>,
    gpu: Option<(Arc<Gpu>, vk::PipelineCache)>,
}

/// Bytes of push constants in every layout: what every device has.
const PUSH_BYTES: u32 = 128;

impl Pipelines {
    pub(crate) fn new(gpu: Option<&Arc<Gpu>>) -> Result<Self> {
        let cached = |gpu: &Arc<Gpu>| {
            // SAFETY: a plain creation.
            unsafe { gpu.raw.create_pipeline_cache(&vk::PipelineCacheCreateInfo::default(), None) }
                .map(|cache| (gpu.clone(), cache))
                .map_err(VulkanError::call("vkCreatePipelineCache"))
        };
        let gpu = gpu.map(cached).transpose()?;
        Ok(Self { made: vec![], of: HashMap::new(), layouts: HashMap::new(), gpu })
    }

    /// Pipelines made so far.
    pub(crate) fn count(&self) -> usize {
        self.made.len()
    }

    pub(crate) fn kernel(&self, pipeline: u32) -> Kernel {
        self.made[pipeline as usize].kernel
    }

    pub(crate) fn raw(&self, pipeline: u32) -> (vk::Pipeline, vk::PipelineLayout, vk::DescriptorSetLayout) {
        let made = &self.made[pipeline as usize];
        let layout = &self.layouts[&made.bindings];
        (made.raw, layout.pipeline, layout.set)
    }

    pub(crate) fn get(&mut self, variant: Variant) -> Result<Pipeline> {
        if let Some(&i) = self.of.get(&variant) {
            return Ok(Pipeline(i));
        }
        let (binary, bindings, push) = variant.kernel.parts();
        debug_assert!(push * 4 <= PUSH_BYTES);
        let mut raw = vk::Pipeline::null();
        if let Some((gpu, cache)) = self.gpu.clone() {
            let layout = match self.layouts.entry(bindings) {
                Entry::Occupied(known) => known.into_mut(),
                Entry::Vacant(new) => new.insert(layout(&gpu, bindings)?),
            };
            raw = pipeline(&gpu, cache, binary, variant, layout.pipeline)?;
        }
        self.made.push(Made { raw, bindings, kernel: variant.kernel });
        self.of.insert(variant, self.made.len() as u32 - 1);
        Ok(Pipeline(self.made.len() as u32 - 1))
    }
}

fn layout(gpu: &Gpu, bindings: u32) -> Result<Layout> {
    let list: Vec<_> = (0..bindings)
        .map(|i| {
            vk::DescriptorSetLayoutBinding::default()
                .binding(i)
                .descriptor_type(vk::DescriptorType::STORAGE_BUFFER)
                .descriptor_count(1)
                .stage_flags(vk::ShaderStageFlags::COMPUTE)
        })
        .collect();
    let info = vk::DescriptorSetLayoutCreateInfo::default().bindings(&list);
    // SAFETY: plain creations; the set's layout is destroyed if the second fails.
    unsafe {
        let raw = &gpu.raw;
        let set = raw
            .create_descriptor_set_layout(&info, None)
            .map_err(VulkanError::call("vkCreateDescriptorSetLayout"))?;
        let sets = [set];
        let ranges =
            [vk::PushConstantRange::default().stage_flags(vk::ShaderStageFlags::COMPUTE).size(PUSH_BYTES)];
        let info = vk::PipelineLayoutCreateInfo::default().set_layouts(&sets).push_constant_ranges(&ranges);
        match raw.create_pipeline_layout(&info, None) {
            Ok(pipeline) => Ok(Layout { set, pipeline }),
            Err(e) => {
                raw.destroy_descriptor_set_layout(set, None);
                Err(VulkanError::call("vkCreatePipelineLayout")(e))
            }
        }
    }
}

fn pipeline(
    gpu: &Gpu,
    cache: vk::PipelineCache,
    binary: &[u8],
    v: Variant,
    layout: vk::PipelineLayout,
) -> Result<vk::Pipeline> {
    let words: Vec<u32> =
        binary.chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect();
    let entries: Vec<_> = (0..8u32)
        .map(|i| vk::SpecializationMapEntry::default().constant_id(i).offset(4 * i).size(4))
        .collect();
    let constants =
        vk::SpecializationInfo::default().map_entries(&entries).data(bytemuck::cast_slice(&v.constants));
    let raw = &gpu.raw;
    // SAFETY: the words are the committed output of the compiler; the module is destroyed when the pipeline is made.
    unsafe {
        let module = raw
            .create_shader_module(&vk::ShaderModuleCreateInfo::default().code(&words), None)
            .map_err(VulkanError::call("vkCreateShaderModule"))?;
        let stage = vk::PipelineShaderStageCreateInfo::default()
            .stage(vk::ShaderStageFlags::COMPUTE)
            .module(module)
            .name(c"main")
            .specialization_info(&constants);
        let mut lanes = vk::PipelineShaderStageRequiredSubgroupSizeCreateInfo::default();
        let mut stage = stage;
        if let Some(count) = v.kernel.lanes() {
            stage = stage.flags(vk::PipelineShaderStageCreateFlags::REQUIRE_FULL_SUBGROUPS);
            // Where there is a choice; else all subgroups are of this size.
            if gpu.info.subgroup.0 != gpu.info.subgroup.1 {
                lanes = lanes.required_subgroup_size(count);
                stage = stage.push_next(&mut lanes);
            }
        }
        let info = [vk::ComputePipelineCreateInfo::default().stage(stage).layout(layout)];
        let made = raw.create_compute_pipelines(cache, &info, None);
        raw.destroy_shader_module(module, None);
        made.map(|list| list[0]).map_err(|(_, e)| VulkanError::call("vkCreateComputePipelines")(e))
    }
}

impl Drop for Pipelines {
    fn drop(&mut self) {
        let Some((gpu, cache)) = &self.gpu else { return };
        if gpu.abandoned() {
            return;
        }
        // SAFETY: no work is in flight, and recordings that name the pipelines are dropped before.
        unsafe {
            for m in &self.made {
                gpu.raw.destroy_pipeline(m.raw, None);
            }
            for l in self.layouts.values() {
                gpu.raw.destroy_pipeline_layout(l.pipeline, None);
                gpu.raw.destroy_descriptor_set_layout(l.set, None);
            }
            gpu.raw.destroy_pipeline_cache(*cache, None);
        }
    }
}
