//! The compiled kernels and the pipelines made of them.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::fmt;
use std::hash::{BuildHasherDefault, Hasher};
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
    /// Products on what is faster, by columns of a tile.
    Matrix64(Units),
    Matrix16(Units),
    Norm,
    Pointwise,
    Embed,
    Largest,
    Rope,
    /// By the widest head.
    Attention32,
    Attention64,
    Attention128,
    Attention256,
    /// On matrices of f16 or bf16, by the widest head.
    AttentionMatrix128(Units),
    AttentionMatrix256(Units),
    /// Joins what attention found for parts of the keys.
    AttentionJoin,
}

/// Whatever multiplies faster than f32 multiply-adds, and has kernels for it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Units {
    /// Matrices of f16, 8 x 8 x 8, subgroups of 8.
    F16x8,
    /// Matrices of f16, 16 x 16 x 16, subgroups of 32.
    F16x16,
    /// Matrices of bf16, 16 x 16 x 16, subgroups of 32.
    Bf16x16,
    /// Matrices of 8-bit integers, 8 x 8 x 8, subgroups of 8.
    S8x8,
    /// Matrices of 8-bit integers, 16 x 16 x 16, subgroups of 32.
    S8x16,
    /// Matrices of 8-bit integers, 16 x 16 x 32, subgroups of 32.
    S8x32,
    /// Dot products of four 8-bit integers, any subgroups.
    Dot,
}

/// What multiplies: the numbers that go into products.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Unit {
    /// Multiply-adds in f32.
    F32,
    /// Matrices of f16.
    F16,
    /// Matrices of bf16.
    Bf16,
    /// Matrices of 8-bit integers.
    Int8,
    /// Dot products of 8-bit integers.
    Int8Dot,
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Unit::F32 => "f32",
            Unit::F16 => "f16",
            Unit::Bf16 => "bf16",
            Unit::Int8 => "int8",
            Unit::Int8Dot => "int8 dot",
        })
    }
}

impl fmt::Display for Units {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match (self, self.size()) {
            (Units::Dot, _) => write!(f, "{}", self.unit()),
            (_, [m, n, k]) => write!(f, "{} {m}x{n}x{k}", self.unit()),
        }
    }
}

impl Units {
    /// For weights of 16 bits, the best first: bf16 has range enough.
    const FLOATS: [Units; 3] = [Units::Bf16x16, Units::F16x16, Units::F16x8];
    const INTEGERS: [Units; 3] = [Units::S8x32, Units::S8x16, Units::S8x8];

    /// Rows, columns and depth of a matrix.
    fn size(self) -> [u32; 3] {
        match self {
            Units::F16x8 | Units::S8x8 => [8, 8, 8],
            Units::F16x16 | Units::Bf16x16 | Units::S8x16 => [16, 16, 16],
            Units::S8x32 => [16, 16, 32],
            Units::Dot => [1, 1, 4],
        }
    }

    /// Lanes that a subgroup must have, if that matters.
    fn lanes(self) -> Option<u32> {
        match self {
            Units::F16x8 | Units::S8x8 => Some(8),
            Units::F16x16 | Units::Bf16x16 | Units::S8x16 | Units::S8x32 => Some(32),
            Units::Dot => None,
        }
    }

    /// Everything that a GPU has for weights of 8 bits, or of 16: dot products first, then matrices, the best first.
    pub fn all_of(info: &GpuInfo, eight: bool) -> Vec<Self> {
        let dot = (eight && info.int8_dot.0).then_some(Units::Dot);
        let matrices = if eight { Units::INTEGERS } else { Units::FLOATS };
        dot.into_iter().chain(matrices.into_iter().filter(|u| u.fits(info))).collect()
    }

    /// The numbers that go into its products.
    pub fn unit(self) -> Unit {
        match self {
            Units::F16x8 | Units::F16x16 => Unit::F16,
            Units::Bf16x16 => Unit::Bf16,
            Units::S8x8 | Units::S8x16 | Units::S8x32 => Unit::Int8,
            Units::Dot => Unit::Int8Dot,
        }
    }

    fn fits(self, info: &GpuInfo) -> bool {
        let (operands, sums, typed) = match self.unit() {
            Unit::F16 => ("f16", "f32", info.f16),
            Unit::Bf16 => ("bf16", "f32", info.bf16.1),
            _ => ("s8", "s32", info.int8),
        };
        let shape = |m: &MatrixShape| m.size == self.size() && m.operands == operands && m.sums == sums;
        let lanes = self.lanes().is_none_or(|lanes| match info.subgroup {
            (a, b) if a == b => a == lanes,
            (a, b) => info.subgroup_choice && a <= lanes && lanes <= b,
        });
        typed && lanes && info.memory_model && info.matrices.iter().any(shape)
    }

    /// The best that a GPU has for weights of 16 bits.
    pub(crate) fn of_floats(info: &GpuInfo) -> Option<Self> {
        Units::FLOATS.into_iter().find(|u| u.fits(info))
    }

    /// The best that a GPU has for weights of 8 bits: matrices, else dot products that it does not emulate.
    pub(crate) fn of_integers(info: &GpuInfo) -> Option<Self> {
        let dot = (info.int8_dot == (true, true)).then_some(Units::Dot);
        Units::INTEGERS.into_iter().find(|u| u.fits(info)).or(dot)
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
            Kernel::Matrix64(Units::F16x16) => (spv!("matrix_64_f16_16"), 15, 20),
            Kernel::Matrix64(Units::Bf16x16) => (spv!("matrix_64_bf16_16"), 15, 20),
            Kernel::Matrix64(Units::S8x8) => (spv!("matrix_64_s8_8"), 15, 20),
            Kernel::Matrix64(Units::S8x16) => (spv!("matrix_64_s8_16"), 15, 20),
            Kernel::Matrix64(Units::S8x32) => (spv!("matrix_64_s8_32"), 15, 20),
            Kernel::Matrix64(Units::Dot) => (spv!("dot_64"), 15, 20),
            Kernel::Matrix16(Units::F16x8) => (spv!("matrix_16_f16_8"), 15, 20),
            Kernel::Matrix16(Units::F16x16) => (spv!("matrix_16_f16_16"), 15, 20),
            Kernel::Matrix16(Units::Bf16x16) => (spv!("matrix_16_bf16_16"), 15, 20),
            Kernel::Matrix16(Units::S8x8) => (spv!("matrix_16_s8_8"), 15, 20),
            Kernel::Matrix16(Units::S8x16) => (spv!("matrix_16_s8_16"), 15, 20),
            Kernel::Matrix16(Units::S8x32) => (spv!("matrix_16_s8_32"), 15, 20),
            Kernel::Matrix16(Units::Dot) => (spv!("dot_16"), 15, 20),
            Kernel::Norm => (spv!("norm"), 5, 8),
            Kernel::Pointwise => (spv!("pointwise"), 5, 12),
            Kernel::Embed => (spv!("embed"), 3, 3),
            Kernel::Largest => (spv!("largest"), 2, 4),
            Kernel::Rope => (spv!("rope"), 4, 5),
            Kernel::Attention32 => (spv!("attention_32"), 9, 20),
            Kernel::Attention64 => (spv!("attention_64"), 9, 20),
            Kernel::Attention128 => (spv!("attention_128"), 9, 20),
            Kernel::Attention256 => (spv!("attention_256"), 9, 20),
            Kernel::AttentionMatrix128(Units::Bf16x16) => (spv!("attention_128_bf16_16"), 9, 20),
            Kernel::AttentionMatrix256(Units::Bf16x16) => (spv!("attention_256_bf16_16"), 9, 20),
            Kernel::AttentionMatrix128(Units::F16x16) => (spv!("attention_128_f16_16"), 9, 20),
            Kernel::AttentionMatrix256(Units::F16x16) => (spv!("attention_256_f16_16"), 9, 20),
            Kernel::AttentionJoin => (spv!("attention_join"), 3, 6),
            // Others are never chosen: `Units::of_floats` names one of these three.
            Kernel::AttentionMatrix128(_) => (spv!("attention_128_f16_8"), 9, 20),
            Kernel::AttentionMatrix256(_) => (spv!("attention_256_f16_8"), 9, 20),
        }
    }
}

impl Kernel {
    /// Name in reports.
    pub(crate) fn name(self) -> &'static str {
        match self {
            Kernel::Gemm64 | Kernel::Gemm16 | Kernel::Matrix64(_) | Kernel::Matrix16(_) => "product",
            Kernel::Norm => "norm",
            Kernel::Pointwise => "pointwise",
            Kernel::Embed => "embed",
            Kernel::Largest => "largest",
            Kernel::Rope => "rope",
            Kernel::Attention32 | Kernel::Attention64 | Kernel::Attention128 | Kernel::Attention256 => {
                "attention"
            }
            Kernel::AttentionMatrix128(_) | Kernel::AttentionMatrix256(_) => "attention",
            Kernel::AttentionJoin => "attention join",
        }
    }

    /// What multiplies.
    pub(crate) fn unit(self) -> Unit {
        match self {
            Kernel::Matrix64(u) | Kernel::Matrix16(u) => u.unit(),
            Kernel::AttentionMatrix128(u) | Kernel::AttentionMatrix256(u) => u.unit(),
            _ => Unit::F32,
        }
    }

    /// Lanes that its subgroups must have, if that matters.
    fn lanes(self) -> Option<u32> {
        match self {
            Kernel::Matrix64(u) | Kernel::Matrix16(u) => u.lanes(),
            Kernel::AttentionMatrix128(u) | Kernel::AttentionMatrix256(u) => u.lanes(),
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
    of: HashMap<Variant, u32, BuildHasherDefault<Fold>>,
    /// By number of bindings.
    layouts: HashMap<u32, Layout>,
    gpu: Option<(Arc<Gpu>, vk::PipelineCache)>,
}

/// A plain hash for keys that no stranger chooses: each launch looks its pipeline up.
#[derive(Default)]
struct Fold(u64);

impl Hasher for Fold {
    fn finish(&self) -> u64 {
        self.0
    }

    fn write(&mut self, bytes: &[u8]) {
        for word in bytes.chunks(8) {
            let mut all = [0; 8];
            all[..word.len()].copy_from_slice(word);
            self.write_u64(u64::from_le_bytes(all));
        }
    }

    fn write_u64(&mut self, word: u64) {
        self.0 = (self.0.rotate_left(5) ^ word).wrapping_mul(0x517c_c1b7_2722_0a95);
    }
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
        Ok(Self { made: vec![], of: HashMap::default(), layouts: HashMap::new(), gpu })
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
