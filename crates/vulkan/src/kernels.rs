//! The compiled kernels and the pipelines made of them.

use std::collections::HashMap;
use std::sync::Arc;

use ash::vk;

use crate::error::{Result, VulkanError};
use crate::gpu::Gpu;

/// A kernel's binary, from `kernels/spv`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Kernel {
    Gemm64,
    Gemm16,
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
}

pub(crate) struct Pipelines {
    made: Vec<Made>,
    of: HashMap<Variant, u32>,
    /// By number of bindings.
    layouts: HashMap<u32, Layout>,
    cache: vk::PipelineCache,
    gpu: Arc<Gpu>,
}

/// Bytes of push constants in every layout: what every device has.
const PUSH_BYTES: u32 = 128;

impl Pipelines {
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Result<Self> {
        // SAFETY: a plain creation.
        let cache = unsafe { gpu.raw.create_pipeline_cache(&vk::PipelineCacheCreateInfo::default(), None) }
            .map_err(VulkanError::call("vkCreatePipelineCache"))?;
        Ok(Self { made: vec![], of: HashMap::new(), layouts: HashMap::new(), cache, gpu: gpu.clone() })
    }

    /// Pipelines made so far.
    pub(crate) fn count(&self) -> usize {
        self.made.len()
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
        if !self.layouts.contains_key(&bindings) {
            let layout = self.layout(bindings)?;
            self.layouts.insert(bindings, layout);
        }
        let raw = self.pipeline(binary, variant, self.layouts[&bindings].pipeline)?;
        self.made.push(Made { raw, bindings });
        self.of.insert(variant, self.made.len() as u32 - 1);
        Ok(Pipeline(self.made.len() as u32 - 1))
    }

    fn layout(&self, bindings: u32) -> Result<Layout> {
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
            let raw = &self.gpu.raw;
            let set = raw
                .create_descriptor_set_layout(&info, None)
                .map_err(VulkanError::call("vkCreateDescriptorSetLayout"))?;
            let sets = [set];
            let ranges = [vk::PushConstantRange::default()
                .stage_flags(vk::ShaderStageFlags::COMPUTE)
                .size(PUSH_BYTES)];
            let info =
                vk::PipelineLayoutCreateInfo::default().set_layouts(&sets).push_constant_ranges(&ranges);
            match raw.create_pipeline_layout(&info, None) {
                Ok(pipeline) => Ok(Layout { set, pipeline }),
                Err(e) => {
                    raw.destroy_descriptor_set_layout(set, None);
                    Err(VulkanError::call("vkCreatePipelineLayout")(e))
                }
            }
        }
    }

    fn pipeline(&self, binary: &[u8], v: Variant, layout: vk::PipelineLayout) -> Result<vk::Pipeline> {
        let words: Vec<u32> =
            binary.chunks_exact(4).map(|c| u32::from_le_bytes([c[0], c[1], c[2], c[3]])).collect();
        let entries: Vec<_> = (0..8u32)
            .map(|i| vk::SpecializationMapEntry::default().constant_id(i).offset(4 * i).size(4))
            .collect();
        let constants =
            vk::SpecializationInfo::default().map_entries(&entries).data(bytemuck::cast_slice(&v.constants));
        let raw = &self.gpu.raw;
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
            let info = [vk::ComputePipelineCreateInfo::default().stage(stage).layout(layout)];
            let made = raw.create_compute_pipelines(self.cache, &info, None);
            raw.destroy_shader_module(module, None);
            made.map(|list| list[0]).map_err(|(_, e)| VulkanError::call("vkCreateComputePipelines")(e))
        }
    }
}

impl Drop for Pipelines {
    fn drop(&mut self) {
        if self.gpu.abandoned() {
            return;
        }
        // SAFETY: no work is in flight, and recordings that name the pipelines are dropped before.
        unsafe {
            for m in &self.made {
                self.gpu.raw.destroy_pipeline(m.raw, None);
            }
            for l in self.layouts.values() {
                self.gpu.raw.destroy_pipeline_layout(l.pipeline, None);
                self.gpu.raw.destroy_descriptor_set_layout(l.set, None);
            }
            self.gpu.raw.destroy_pipeline_cache(self.cache, None);
        }
    }
}
