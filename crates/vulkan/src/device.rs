//! [`Vulkan`], the device: the tape, running it, and the trait.

use std::collections::VecDeque;
use std::fmt;
use std::ops::Range;
use std::str::FromStr;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pi0_device::{
    Attention, Dense, Device, HostTensor, KeyValue, Largest, MemoryMeter, Modulation, OpKind, Qkv,
    WeightSource, operands,
};

use crate::error::{Result, VulkanError};
use crate::gpu::Gpu;
use crate::info::GpuInfo;
use crate::kernels::{Kernel, Pipeline, Pipelines, Unit, Units, Variant};
use crate::memory::{Buffer, Memory, Region};
use crate::ops::{Angles, Op};
use crate::plan::{Plan, plan};
use crate::recording::{Manner, Recording, Target};
use crate::script::{Key, Script};
use crate::staging::Ring;
use crate::tape::{Launch, Tape};
use crate::tensor::{Place, Tensor, Value};
use crate::weight::{Linear, NormWeight, Packing, Stored, Table, Weight};

pub(crate) const NAME: &str = "vulkan";

/// Launches after which a tape is run though nothing was downloaded, so that no submission takes too long.
const LONGEST_TAPE: usize = 8192;

/// Runs kept for whoever asks for their launches: as many as the tokens of a long answer.
const RUNS_KEPT: usize = 1024;

/// Number format of packed weights.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// As the checkpoint has them.
    #[default]
    Stored,
    /// All in f32.
    F32,
    /// bf16, and f32 where the references keep it.
    Bf16,
    /// 8-bit integers with a scale for each row, and f32 where the references keep it.
    Int8,
}

impl FromStr for Format {
    type Err = String;
    fn from_str(name: &str) -> std::result::Result<Self, String> {
        Ok(match name {
            "stored" => Format::Stored,
            "f32" => Format::F32,
            "bf16" => Format::Bf16,
            "int8" => Format::Int8,
            _ => return Err(format!("{name:?} is no number format; known are stored, f32, bf16 and int8")),
        })
    }
}

/// What products may run on, other than those that the references keep in f32.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Products {
    /// The fastest that the driver has: cooperative matrices, which round their operands to bf16 or f16, or for weights in
    /// 8 bits to 8 bits; else dot products of 8-bit integers; else f32 multiply-adds. Attention too, unless all is f32.
    #[default]
    Best,
    /// These, of those that the driver has ([`Units::all_of`]), even where it emulates them or has faster ones; f32
    /// multiply-adds where it does not have them. Attention too, if they are matrices of floats.
    Only(Units),
    /// f32 multiply-adds.
    MultiplyAdds,
}

/// How to open a device.
#[derive(Debug, Clone)]
pub struct VulkanOptions {
    /// Which GPU, from 0, in the order of [`list`](crate::list).
    pub index: usize,
    /// Number format of packed weights.
    pub format: Format,
    /// How long one submission may take before the device counts as hung.
    pub timeout: Duration,
    /// Recordings kept: one for each shape of input, such as a number of cameras and tokens.
    pub shapes: usize,
    /// Bytes of device memory to use at most; all of it if none.
    pub memory: Option<u64>,
    /// Measures each launch with the GPU's own clock; see [`Vulkan::launches`]. It costs some time of its own.
    pub timestamps: bool,
    /// What products may run on.
    pub products: Products,
    /// Leaves out the barrier of this number in each recording: to prove that the validation layer would see it.
    #[doc(hidden)]
    pub skip_barrier: Option<usize>,
    /// The submission of this number, from 0, fails as if the driver had given the device up: no software driver does.
    #[doc(hidden)]
    pub lose: Option<u64>,
    /// From the submission of this number on the device counts as hung: nothing ends in a nanosecond.
    #[doc(hidden)]
    pub hang: Option<u64>,
}

impl Default for VulkanOptions {
    fn default() -> Self {
        Self {
            index: 0,
            format: Format::Stored,
            timeout: Duration::from_secs(600),
            shapes: 8,
            memory: None,
            timestamps: false,
            products: Products::Best,
            skip_barrier: None,
            lose: None,
            hang: None,
        }
    }
}

/// What a device has done and holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Tapes recorded as command buffers.
    pub recorded: u64,
    /// Runs of a recording made before.
    pub replayed: u64,
    /// Recordings kept.
    pub kept: usize,
    /// Kernel launches of the last run.
    pub launches: usize,
    /// Barriers of the last run.
    pub barriers: usize,
    /// Bytes of activations of the last run.
    pub arena_bytes: u64,
    /// Pipelines made.
    pub pipelines: usize,
    /// Host work of all runs, from a tape's first operation to its submission: writing it, finding its recording (or
    /// making it), bringing the uploads, and what the caller does between operations.
    pub host: Duration,
    /// How long the host waited for the device, in all.
    pub waited: Duration,
}

/// The part of an inference that a launch belongs to, by the module entered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Default)]
pub enum Stage {
    /// Images to image tokens.
    Vision,
    /// Image and prompt tokens through the language model.
    Prefix,
    /// State, noise and time through the action expert, all steps; of π0-FAST the answer's tokens.
    Denoise,
    /// Anything else.
    #[default]
    Other,
}

impl Stage {
    /// Its name in tables.
    pub fn name(self) -> &'static str {
        match self {
            Stage::Vision => "vision",
            Stage::Prefix => "prefix",
            Stage::Denoise => "denoise",
            Stage::Other => "other",
        }
    }

    fn of(module: &str) -> Self {
        match module {
            "vision" => Stage::Vision,
            "prefix" => Stage::Prefix,
            m if m == "suffix" || m.starts_with("step") => Stage::Denoise,
            _ => Stage::Other,
        }
    }
}

/// One launch of a kernel, for reports and estimates.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct LaunchInfo {
    /// The part of an inference.
    pub stage: Stage,
    /// Which kind of kernel.
    pub kernel: &'static str,
    /// What multiplies.
    pub unit: Unit,
    /// Rows and columns; of products rows, inputs and outputs; of attention query rows, key rows and columns.
    pub shape: [u32; 3],
    /// Floating-point operations; a multiply and an add are two.
    pub flop: u64,
    /// Bytes read and written if each operand moves once.
    pub bytes: u64,
    /// Workgroups.
    pub groups: u64,
    /// Whether it waits at a barrier for what was launched before.
    pub barrier: bool,
    /// Seconds until it ended since the launch before ended, with [`VulkanOptions::timestamps`].
    pub seconds: Option<f64>,
}

/// A GPU as a device.
pub struct Vulkan {
    state: Mutex<State>,
    pub(crate) memory: Arc<Memory>,
    /// None for a device that only plans.
    gpu: Option<Arc<Gpu>>,
    info: GpuInfo,
    /// What multiplies the weights; none for f32 multiply-adds.
    units: Option<Units>,
    /// What multiplies in attention, likewise.
    pub(crate) attention: Option<Units>,
    options: VulkanOptions,
    /// Whether some embedding table is read on the host.
    host_tables: AtomicBool,
}

/// All that changes. Fields drop in this order.
pub(crate) struct State {
    pub(crate) tape: Tape,
    recordings: Vec<Recording>,
    pipelines: Pipelines,
    ring: Option<Ring>,
    pub(crate) angles: Vec<Angles>,
    runs: u64,
    stats: Stats,
    /// Runs that nobody asked for yet: their launches and, if they were timed, the seconds of each.
    launched: VecDeque<(Arc<[LaunchInfo]>, Vec<f64>)>,
    /// Modules entered and not left.
    depth: usize,
    /// When the first operation was written on this tape.
    began: Option<Instant>,
    /// Of a device that only plans: the tapes that it would have recorded.
    planned: Vec<Planned>,
    /// The words of a call, in memory that all of them use.
    key: Key,
}

/// What a recording would be.
struct Planned {
    script: Arc<Script>,
    held: Vec<u32>,
    target: Option<Target>,
    plan: Arc<Plan>,
    arena: Arc<Region>,
    launches: Arc<[LaunchInfo]>,
}

impl State {
    /// The key of a call of this operation, to be completed and given to [`call`](Self::call).
    pub(crate) fn key(&mut self, op: Op) -> Key {
        let mut key = std::mem::take(&mut self.key);
        key.0.clear();
        key.0.push(op as u32);
        key
    }

    /// Does a call: notes that it goes on with what is followed, or has it written. It makes `N` values first, which it
    /// gives, and maybe others for itself.
    pub(crate) fn call<const N: usize>(
        &mut self,
        key: Key,
        write: impl FnOnce(&mut Self) -> Result<[Arc<Value>; N]>,
    ) -> Result<[Arc<Value>; N]> {
        // The one that ran last is likeliest to run again.
        let scripts = self.recordings.iter().rev().map(|r| &r.script);
        let scripts = scripts.chain(self.planned.iter().map(|p| &p.script));
        if let Some(first) = self.tape.follow(&key, scripts) {
            self.key = key;
            return Ok(std::array::from_fn(|i| self.tape.values[first + i].clone()));
        }
        self.tape.unfollow();
        let done = write(self);
        match &done {
            Ok(_) => self.tape.note(&key),
            Err(_) => self.tape.tear(),
        }
        self.key = key;
        done
    }

    /// A value with these bytes.
    pub(crate) fn upload(&mut self, bytes: &[u8]) -> Result<Arc<Value>> {
        let mut key = self.key(Op::Upload);
        key.sizes([bytes.len()]);
        let [value] = self.call(key, |s| Ok([s.tape.value(bytes.len() as u64)]))?;
        self.tape.bring(self.tape.values.len() as u32 - 1, bytes);
        Ok(value)
    }

    /// A value with these integers; the same one for the same integers.
    pub(crate) fn integers(&mut self, data: &[u32]) -> Result<Arc<Value>> {
        if let Some(same) = self.tape.same_integers(data) {
            return Ok(same);
        }
        let value = self.upload(bytemuck::cast_slice(data))?;
        self.tape.share(&value);
        Ok(value)
    }

    fn note(&mut self, launches: Arc<[LaunchInfo]>, times: Vec<f64>) {
        if self.launched.len() == RUNS_KEPT {
            self.launched.pop_front();
        }
        self.launched.push_back((launches, times));
    }

    pub(crate) fn pipeline(&mut self, kernel: Kernel, constants: &[u32]) -> Result<Pipeline> {
        let mut all = [0; 8];
        all[..constants.len()].copy_from_slice(constants);
        self.pipelines.get(Variant { kernel, constants: all })
    }
}

impl Vulkan {
    /// Opens a GPU.
    pub fn open(options: VulkanOptions) -> Result<Self> {
        let gpu = Gpu::open(&options)?;
        let device = Self::new(gpu.info.clone(), Some(gpu.clone()), options)?;
        gpu.instance.complaint()?;
        Ok(device)
    }

    /// A device that writes tapes as a GPU like `info` would get them, computes nothing, and gives zeros: for estimates.
    pub fn plan(info: GpuInfo, options: VulkanOptions) -> Result<Self> {
        Self::new(info, None, options)
    }

    fn new(info: GpuInfo, gpu: Option<Arc<Gpu>>, options: VulkanOptions) -> Result<Self> {
        let memory = Memory::new(gpu.clone(), options.memory.unwrap_or(info.memory));
        let state = State {
            tape: Tape::default(),
            recordings: vec![],
            pipelines: Pipelines::new(gpu.as_ref())?,
            ring: None,
            angles: vec![],
            runs: 0,
            stats: Stats::default(),
            launched: VecDeque::new(),
            depth: 0,
            began: None,
            planned: vec![],
            key: Key::default(),
        };
        let eight = options.format == Format::Int8;
        let units = match options.products {
            Products::Best if eight => Units::of_integers(&info).or(Units::of_floats(&info)),
            Products::Best => Units::of_floats(&info),
            Products::Only(units) => Some(units).filter(|u| Units::all_of(&info, eight).contains(u)),
            Products::MultiplyAdds => None,
        };
        let attention = match options.products {
            _ if options.format == Format::F32 => None,
            Products::Best => Units::of_floats(&info),
            Products::Only(_) if !eight => units,
            _ => None,
        };
        let host_tables = AtomicBool::new(false);
        Ok(Self { state: Mutex::new(state), memory, gpu, info, units, attention, options, host_tables })
    }

    /// Launches since the last call, in their order, of any number of runs; after very many the oldest are forgotten.
    pub fn launches(&self) -> Vec<LaunchInfo> {
        let runs = std::mem::take(&mut self.lock().launched);
        let of = |(launches, times): &(Arc<[LaunchInfo]>, Vec<f64>)| {
            let time = |(i, l): (usize, &LaunchInfo)| LaunchInfo { seconds: times.get(i).copied(), ..*l };
            launches.iter().enumerate().map(time).collect::<Vec<_>>()
        };
        runs.iter().flat_map(of).collect()
    }

    /// What the GPU offers.
    pub fn info(&self) -> &GpuInfo {
        &self.info
    }

    /// What multiplies the weights that the references do not keep in f32.
    pub fn products(&self) -> Unit {
        self.units().map_or(Unit::F32, Units::unit)
    }

    /// The same, with the size of its matrices; none for f32 multiply-adds.
    pub fn units(&self) -> Option<Units> {
        self.units.filter(|_| self.options.format != Format::F32)
    }

    /// How long a submission may take from now on before the device counts as hung.
    pub fn set_timeout(&self, timeout: Duration) {
        if let Some(gpu) = &self.gpu {
            gpu.set_timeout(timeout);
        }
    }

    /// Number format of packed weights.
    pub fn format(&self) -> Format {
        self.options.format
    }

    /// What the device has done and holds.
    pub fn stats(&self) -> Stats {
        let s = self.lock();
        Stats { kept: s.recordings.len(), pipelines: s.pipelines.count(), ..s.stats }
    }

    fn alive(&self) -> Result<()> {
        self.gpu.as_ref().map_or(Ok(()), |gpu| gpu.alive())
    }

    pub(crate) fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while the lock is held could only come from a bug; a tape half written is no known one.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// A value's bytes must be bound at once.
    pub(crate) fn bytes(&self, rows: usize, cols: usize) -> Result<u64> {
        let most = self.info.max_binding.min(u64::from(u32::MAX));
        match (rows as u64).checked_mul(cols as u64).and_then(|n| n.checked_mul(4)) {
            Some(bytes) if bytes <= most => Ok(bytes),
            bytes => Err(VulkanError::TooLarge { wanted: bytes.unwrap_or(u64::MAX), most }),
        }
    }

    /// A new value of a call on the tape.
    pub(crate) fn value(&self, s: &mut State, rows: usize, cols: usize) -> Result<Arc<Value>> {
        Ok(s.tape.value(self.bytes(rows, cols)?))
    }

    /// A tensor without elements.
    pub(crate) fn empty(&self, s: &mut State, rows: usize, cols: usize) -> Result<Tensor> {
        let mut key = s.key(Op::Empty);
        key.sizes([rows, cols]);
        let [value] = s.call(key, |s| Ok([self.value(s, rows, cols)?]))?;
        Ok(Tensor::whole(value, rows, cols))
    }

    /// Runs what writes on the tape, and the tape where it has grown long.
    pub(crate) fn write<T>(&self, f: impl FnOnce(&mut State) -> Result<T>) -> pi0_device::Result<T> {
        let mut s = self.lock();
        self.alive()?;
        if s.began.is_none() {
            s.began = Some(Instant::now());
        }
        let done = f(&mut s)?;
        if s.tape.mark().launches >= LONGEST_TAPE {
            self.run(&mut s, None, true)?;
        }
        Ok(done)
    }

    /// Runs the tape; returns the values of `target`. `again` says that the same tape may come again, so that its
    /// recording is kept.
    fn run(&self, s: &mut State, target: Option<Target>, again: bool) -> Result<Vec<f32>> {
        let result = self.try_run(s, target, again);
        s.began = None;
        match &result {
            // What was held was given its place.
            Ok(_) => s.tape.clear(|_| None),
            Err(e) => s.tape.fail(&e.to_string()),
        }
        result
    }

    fn try_run(&self, s: &mut State, target: Option<Target>, again: bool) -> Result<Vec<f32>> {
        let held = s.tape.held();
        s.runs += 1;
        let again = again && !s.tape.is_torn();
        let Some(gpu) = &self.gpu else { return self.planned(s, held, target, again) };
        let known = s
            .tape
            .followed()
            .and_then(|script| s.recordings.iter().position(|r| r.fits(script, &held, target)));
        if known.is_none() {
            s.tape.unfollow();
        }
        let mut recording = match known {
            Some(at) => {
                s.stats.replayed += 1;
                s.recordings.swap_remove(at)
            }
            None => {
                while again && s.recordings.len() >= self.options.shapes.max(1) {
                    let ages = s.recordings.iter().enumerate().map(|(i, r)| (r.used, i));
                    let (_, oldest) = ages.min().expect("there is one");
                    s.recordings.swap_remove(oldest);
                }
                let how = Manner {
                    target,
                    skip_barrier: self.options.skip_barrier,
                    timestamps: self.options.timestamps,
                };
                let new = || Recording::new(gpu, &self.memory, &s.pipelines, &s.tape, &held, &how);
                let made = match new() {
                    // Older recordings make room.
                    Err(VulkanError::OutOfMemory { .. }) if !s.recordings.is_empty() => {
                        s.recordings.clear();
                        new()?
                    }
                    made => made?,
                };
                s.stats.recorded += u64::from(again);
                made
            }
        };
        recording.used = s.runs;
        recording.submit(&s.tape)?;
        s.stats.host += s.began.map_or(Duration::ZERO, |began| began.elapsed());
        let start = Instant::now();
        recording.wait()?;
        s.stats.waited += start.elapsed();
        gpu.instance.complaint()?;
        let launches =
            recording.launched.get_or_insert_with(|| summary(&s.pipelines, &s.tape, &recording.barriers));
        let (launches, times) = (launches.clone(), recording.times()?);
        s.note(launches, times);
        s.stats.launches = recording.launches;
        s.stats.barriers = recording.barriers.iter().filter(|b| **b).count();
        s.stats.arena_bytes = recording.arena_bytes;
        for &v in &held {
            let region = recording.region(v).expect("held values have a place").clone();
            s.tape.values[v as usize].set(Place::Ready(region));
        }
        let result = recording.result(target.map_or(0, |t| t.len as usize / 4));
        if again {
            s.recordings.push(recording);
        }
        Ok(result)
    }

    /// What a run would be, without a GPU.
    fn planned(
        &self,
        s: &mut State,
        held: Vec<u32>,
        target: Option<Target>,
        again: bool,
    ) -> Result<Vec<f32>> {
        let fits = |p: &Planned, script: &Arc<Script>| {
            let same = Arc::ptr_eq(&p.script, script) || p.script.words == script.words;
            same && p.held == held && p.target == target
        };
        let known = s.tape.followed().and_then(|script| s.planned.iter().find(|p| fits(p, script)));
        let known = known.map(|p| (p.plan.clone(), p.arena.clone(), p.launches.clone()));
        let was_known = known.is_some();
        let (plan, arena, launches) = match known {
            Some(known) => known,
            None => {
                s.tape.unfollow();
                let plan = Arc::new(plan(&s.tape, &held));
                let arena = self.memory.take(plan.size)?;
                let launches = summary(&s.pipelines, &s.tape, &plan.barriers);
                (plan, arena, launches)
            }
        };
        for &v in &held {
            let value = &s.tape.values[v as usize];
            let region = self.memory.part(&arena, plan.offsets[v as usize], value.bytes);
            value.set(Place::Ready(region));
        }
        s.stats.host += s.began.map_or(Duration::ZERO, |began| began.elapsed());
        s.note(launches.clone(), vec![]);
        match was_known {
            true => s.stats.replayed += 1,
            false => s.stats.recorded += u64::from(again),
        }
        s.stats.launches = launches.len();
        s.stats.barriers = plan.barriers.iter().filter(|b| **b).count();
        s.stats.arena_bytes = plan.size;
        if again && !was_known {
            s.planned.truncate(self.options.shapes.max(1) - 1);
            let script = s.tape.script();
            s.planned.insert(0, Planned { script, held, target, plan, arena, launches });
        }
        Ok(vec![0.0; target.map_or(0, |t| t.len as usize / 4)])
    }

    /// Reads what is there already.
    fn fetch(&self, region: &Region, start: u64, len: u64) -> Result<Vec<f32>> {
        let Some(gpu) = &self.gpu else { return Ok(vec![0.0; len as usize / 4]) };
        let to = Buffer::readback(gpu, len.max(4))?;
        let (commands, fence) = (gpu.commands()?, gpu.fence()?);
        let copy = [ash::vk::BufferCopy { src_offset: region.offset + start, dst_offset: 0, size: len }];
        let done = gpu
            .record(commands, || {
                // What earlier submissions wrote there is seen.
                gpu.barrier(commands, false);
                // SAFETY: the range lies in the region; both buffers live until the copy was waited for.
                unsafe { gpu.raw.cmd_copy_buffer(commands, region.buffer, to.raw, &copy) };
                gpu.barrier(commands, true);
            })
            .and_then(|()| gpu.submit(commands, fence))
            .and_then(|()| gpu.wait(fence))
            .and_then(|()| gpu.instance.complaint());
        // SAFETY: waited for, or never submitted.
        unsafe {
            gpu.raw.free_command_buffers(gpu.pool, &[commands]);
            gpu.raw.destroy_fence(fence, None);
        }
        done.map(|()| to.read(len as usize / 4))
    }

    fn read(&self, x: &Tensor) -> Result<HostTensor> {
        let (start, len) = (4 * x.offset as u64, 4 * x.span() as u64);
        let mut s = self.lock();
        self.alive()?;
        let span = match x.value.place() {
            _ if len == 0 => vec![],
            Place::Ready(region) => self.fetch(&region, start, len)?,
            Place::Lost(why) => return Err(VulkanError::NeverComputed(why)),
            Place::Pending(number, value) if number == s.tape.number => {
                self.run(&mut s, Some(Target { value, start, len }), true)?
            }
            Place::Pending(..) => return Err(VulkanError::NeverComputed("its tape is gone".into())),
        };
        let data = match x.stride == x.cols {
            true => span,
            false => span.chunks(x.stride).flat_map(|row| row[..x.cols].iter().copied()).collect(),
        };
        Ok(HostTensor::new([x.rows, x.cols], data))
    }

    /// Brings bytes to a region of their own.
    pub(crate) fn store(
        &self,
        s: &mut State,
        size: usize,
        fill: impl FnMut(usize, &mut [u8]),
    ) -> Result<Arc<Region>> {
        let most = self.info.max_binding;
        if size as u64 > most {
            return Err(VulkanError::TooLarge { wanted: size as u64, most });
        }
        let region = self.memory.take(size as u64)?;
        let Some(gpu) = &self.gpu else { return Ok(region) };
        if s.ring.is_none() {
            s.ring = Some(Ring::new(gpu)?);
        }
        let ring = s.ring.as_mut().expect("made above");
        ring.send(&region, size, fill)?;
        // Launches come in later submissions, which wait for the copy by their order and its barrier.
        Ok(region)
    }

    pub(crate) fn store_f32(&self, s: &mut State, data: &[f32]) -> Result<Arc<Region>> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        self.store(s, bytes.len(), |start, out| out.copy_from_slice(&bytes[start..start + out.len()]))
    }

    fn pack(&self, source: &WeightSource) -> Result<Weight> {
        let mut s = self.lock();
        self.alive()?;
        // What stands between weights, such as π0.5's modulations, is done once and never again: it must not become
        // part of the first inference's tape.
        if !s.tape.is_blank() {
            self.run(&mut s, None, false)?;
        }
        let s = &mut *s;
        let weight = match source {
            WeightSource::Linear { parts, exact } => {
                let p = Packing::new(source, parts, *exact, self.options.format, self.units);
                let bias = parts.iter().any(|p| p.bias.is_some());
                let (scales, mut columns) = match (&self.gpu, p.scaled()) {
                    (Some(_), _) => (p.scales(), p.biases()),
                    // Of a plan only the sizes count.
                    (None, true) => (vec![1.0; p.outputs], vec![]),
                    (None, false) => (vec![], if bias { vec![0.0; p.outputs] } else { vec![] }),
                };
                if !scales.is_empty() {
                    columns.resize(p.outputs, 0.0);
                    columns.extend(&scales);
                }
                let (mut values, mut row) = (vec![0.0; p.inputs], vec![0u8; p.stride]);
                let matrix = self.store(s, p.bytes(), |start, out| {
                    let mut at = 0;
                    while at < out.len() {
                        let (i, skip) = ((start + at) / p.stride, (start + at) % p.stride);
                        p.row(i, &scales, &mut values, &mut row);
                        let n = (p.stride - skip).min(out.len() - at);
                        out[at..at + n].copy_from_slice(&row[skip..skip + n]);
                        at += n;
                    }
                })?;
                let columns = if columns.is_empty() { None } else { Some(self.store_f32(s, &columns)?) };
                let Packing { outputs, inputs, stored, stride, units, .. } = p;
                Weight::Linear(Linear { outputs, inputs, stored, matrix, stride, columns, bias, units })
            }
            WeightSource::Norm { kind, weight, bias, eps } => {
                let width = weight.cols();
                let mut values = if self.gpu.is_some() { weight.to_f32() } else { vec![0.0; width] };
                match bias {
                    Some(b) if self.gpu.is_some() => values.extend(b.to_f32()),
                    _ => values.resize(2 * width, 0.0),
                }
                let values = self.store_f32(s, &values)?;
                Weight::Norm(NormWeight { kind: *kind, width, eps: *eps, values })
            }
            WeightSource::Embedding(source) => Weight::Embedding(self.table(s, source)?),
        };
        Ok(weight)
    }

    /// A table goes to the device where a quarter of what is left of its memory holds it and a kernel can bind it.
    fn table(&self, s: &mut State, source: &pi0_device::TensorSource) -> Result<Table> {
        let stored = match source.dtype {
            pi0_device::Dtype::F32 => Stored::F32,
            pi0_device::Dtype::Bf16 => Stored::Bf16,
            pi0_device::Dtype::F16 => Stored::F16,
        };
        let row = source.cols() * stored.bytes();
        let stride = row.next_multiple_of(4);
        let size = source.rows() as u64 * stride as u64;
        let region = if size <= self.info.max_binding && size <= self.memory.left() / 4 {
            let bytes = if self.gpu.is_some() { source.bytes() } else { &[] };
            let copy = |start: usize, out: &mut [u8]| {
                if stride == row {
                    return out.copy_from_slice(&bytes[start..start + out.len()]);
                }
                for (i, o) in (start..).zip(out) {
                    *o = if i % stride < row { bytes[i / stride * row + i % stride] } else { 0 };
                }
            };
            Some(self.store(s, size as usize, copy)?)
        } else {
            self.host_tables.store(true, Ordering::Relaxed);
            None
        };
        // What is on the device need not be kept on the host.
        let source = if region.is_some() { source.unfetched() } else { source.clone() };
        Ok(Table { source, region, stored })
    }

    /// What to say beside "out of memory" while weights are packed.
    fn advise(&self, e: VulkanError) -> VulkanError {
        let advice = match self.options.format {
            Format::F32 => "; weights in bf16 take half (--dtype bf16), in 8 bits a quarter (--dtype int8)",
            Format::Stored | Format::Bf16 => "; weights in 8 bits take half (--dtype int8)",
            Format::Int8 => "; this is the smallest format, so this GPU is too small for the model",
        };
        match e {
            VulkanError::OutOfMemory { wanted, held, capacity, missing, .. } => {
                VulkanError::OutOfMemory { wanted, held, capacity, missing, advice: advice.into() }
            }
            e => e,
        }
    }
}

impl fmt::Debug for Vulkan {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "Vulkan({})", self.info)
    }
}

impl Drop for Vulkan {
    fn drop(&mut self) {
        self.lock().tape.fail("its device was closed");
    }
}

fn summary(pipelines: &Pipelines, tape: &Tape, barriers: &[bool]) -> Arc<[LaunchInfo]> {
    let info = |(l, &barrier): (&Launch, &bool)| LaunchInfo {
        stage: l.stage,
        kernel: pipelines.kernel(l.pipeline).name(),
        unit: pipelines.kernel(l.pipeline).unit(),
        shape: l.shape,
        seconds: None,
        flop: l.flop,
        bytes: l.bytes,
        groups: u64::from(l.groups[0]) * u64::from(l.groups[1]),
        barrier,
    };
    tape.launches.iter().zip(barriers).map(info).collect()
}

/// What the lookup in a table on the host gives.
fn looked_up(table: &Table, ids: &[u32], scale: f32) -> Vec<f32> {
    let cols = table.source.cols();
    let mut out = vec![0.0; ids.len() * cols];
    for (&id, row) in ids.iter().zip(out.chunks_exact_mut(cols.max(1))) {
        table.source.read(id as usize * cols, row);
        row.iter_mut().for_each(|x| *x *= scale);
    }
    out
}

impl Device for Vulkan {
    type Tensor = Tensor;
    type Weight = Weight;

    fn name(&self) -> &'static str {
        NAME
    }

    /// Blocks of device memory: weights, and the activations of every recording kept.
    fn memory(&self) -> Option<MemoryMeter> {
        Some(self.memory.meter.clone())
    }

    fn shape(&self, x: &Tensor) -> [usize; 2] {
        [x.rows, x.cols]
    }

    fn enter(&self, module: fmt::Arguments<'_>) {
        let mut s = self.lock();
        if s.depth == 0 {
            s.tape.stage = Stage::of(&module.to_string());
        }
        s.depth += 1;
    }

    fn exit(&self) {
        let mut s = self.lock();
        s.depth = s.depth.saturating_sub(1);
        if s.depth == 0 {
            s.tape.stage = Stage::Other;
        }
    }

    fn on_host(&self, op: OpKind) -> bool {
        op == OpKind::Embed && self.host_tables.load(Ordering::Relaxed)
    }

    fn upload(&self, rows: usize, cols: usize, data: &[f32]) -> pi0_device::Result<Tensor> {
        operands::upload([rows, cols], data.len())?;
        self.bytes(rows, cols)?;
        self.write(|s| Ok(Tensor::whole(s.upload(bytemuck::cast_slice(data))?, rows, cols)))
    }

    fn download(&self, x: &Tensor) -> pi0_device::Result<HostTensor> {
        Ok(self.read(x)?)
    }

    fn largest(&self, x: &Tensor) -> pi0_device::Result<Vec<Largest>> {
        // Places come back as f32, which counts to 2^24.
        if x.rows == 0 || x.cols == 0 || x.cols > 1 << 24 {
            return Ok(Largest::of_rows(&self.read(x)?));
        }
        let found = self.write(|s| self.largest_values(s, x))?;
        let found = self.read(&found)?;
        Ok(found.data.chunks_exact(2).map(|f| Largest { at: f[0] as usize, value: f[1] }).collect())
    }

    fn prepare(&self, source: &WeightSource) -> pi0_device::Result<Weight> {
        // Without a GPU nothing reads what weights hold.
        if self.gpu.is_some() {
            source.check()?;
        }
        let packed = self.pack(source).map_err(|e| self.advise(e))?;
        // What stays on the host is read from its pages.
        if !matches!(&packed, Weight::Embedding(t) if t.region.is_none()) {
            source.release();
        }
        Ok(packed)
    }

    fn embed(&self, table: &Weight, ids: &[u32], scale: f32) -> pi0_device::Result<Tensor> {
        let Weight::Embedding(table) = table else {
            return Err(pi0_device::Error::shape(OpKind::Embed, "the weight is not a table"));
        };
        operands::embed(ids, table.source.rows())?;
        match &table.region {
            Some(region) => self.write(|s| self.embed_on_device(s, table, region, ids, scale)),
            None if self.gpu.is_none() => {
                self.upload(ids.len(), table.source.cols(), &vec![0.0; ids.len() * table.source.cols()])
            }
            None => self.upload(ids.len(), table.source.cols(), &looked_up(table, ids, scale)),
        }
    }

    fn linear(&self, x: &Tensor, weight: &Weight) -> pi0_device::Result<Tensor> {
        self.dense_layer(OpKind::Linear, &Dense::new(x, weight))
    }

    fn layer_norm(&self, x: &Tensor, weight: &Weight) -> pi0_device::Result<Tensor> {
        self.norm(OpKind::LayerNorm, x, weight)
    }

    fn rms_norm(&self, x: &Tensor, weight: &Weight) -> pi0_device::Result<Tensor> {
        self.norm(OpKind::RmsNorm, x, weight)
    }

    fn ada_rms_norm(&self, x: &Tensor, by: &Modulation<'_, Tensor>) -> pi0_device::Result<Tensor> {
        operands::modulation(OpKind::AdaRmsNorm, self.shape(x), self.shape(by.table), by.rows)?;
        self.write(|s| self.ada_norm(s, x, by))
    }

    fn rope(&self, x: &Tensor, positions: &[u32], head_dim: usize) -> pi0_device::Result<Tensor> {
        operands::rope(self.shape(x), positions, head_dim)?;
        self.write(|s| self.rotated(s, x, positions, head_dim))
    }

    fn attention(
        &self,
        q: &Tensor,
        kv: &[KeyValue<'_, Tensor>],
        spec: &Attention<'_>,
    ) -> pi0_device::Result<Tensor> {
        spec.check(|t| self.shape(t), q, kv)?;
        self.attend(q, kv, spec)
    }

    fn gelu(&self, x: &Tensor) -> pi0_device::Result<Tensor> {
        self.write(|s| self.each(s, OpKind::Gelu, x, x.cols))
    }

    fn silu(&self, x: &Tensor) -> pi0_device::Result<Tensor> {
        self.write(|s| self.each(s, OpKind::Silu, x, x.cols))
    }

    fn geglu(&self, x: &Tensor) -> pi0_device::Result<Tensor> {
        operands::geglu(self.shape(x))?;
        self.write(|s| self.each(s, OpKind::Geglu, x, x.cols / 2))
    }

    fn add(&self, x: &Tensor, y: &Tensor) -> pi0_device::Result<Tensor> {
        operands::add(self.shape(x), self.shape(y))?;
        self.write(|s| self.sum(s, x, y, 1.0))
    }

    fn add_scaled(&self, x: &Tensor, y: &Tensor, scale: f32) -> pi0_device::Result<Tensor> {
        operands::add_scaled(self.shape(x), self.shape(y))?;
        self.write(|s| self.sum(s, x, y, scale))
    }

    fn gated_add(&self, x: &Tensor, y: &Tensor, by: &Modulation<'_, Tensor>) -> pi0_device::Result<Tensor> {
        operands::gated_add(self.shape(x), self.shape(y), self.shape(by.table), by.rows)?;
        self.write(|s| self.gated_sum(s, x, y, by))
    }

    fn concat_rows(&self, parts: &[&Tensor]) -> pi0_device::Result<Tensor> {
        operands::concat_rows(parts.iter().map(|p| self.shape(p)))?;
        self.write(|s| self.below_each_other(s, parts))
    }

    fn store_rows(&self, to: &mut Tensor, at: &[u32], x: &Tensor) -> pi0_device::Result<()> {
        operands::store_rows(self.shape(to), at, self.shape(x))?;
        self.write(|s| self.stored(s, to, at, x))
    }

    fn slice_rows(&self, x: &Tensor, range: Range<usize>) -> pi0_device::Result<Tensor> {
        operands::slice_rows(self.shape(x), &range)?;
        Ok(Tensor { rows: range.len(), offset: x.offset + range.start * x.stride, ..x.clone() })
    }

    fn slice_cols(&self, x: &Tensor, range: Range<usize>) -> pi0_device::Result<Tensor> {
        operands::slice_cols(self.shape(x), &range)?;
        Ok(Tensor { cols: range.len(), offset: x.offset + range.start, ..x.clone() })
    }

    fn dense(&self, call: &Dense<'_, Tensor, Weight>) -> pi0_device::Result<Tensor> {
        self.dense_layer(OpKind::Dense, call)
    }

    fn qkv(&self, call: &Qkv<'_, Tensor, Weight>) -> pi0_device::Result<[Tensor; 3]> {
        self.qkv_layer(call)
    }
}
