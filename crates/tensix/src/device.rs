//! The device: options, state, and how operations launch kernels.

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};
use std::time::Duration;

use crate::board::{Board, BoardInfo, Grid, Loaded, Near};
use crate::cache::Cache;
use crate::dram::{Blocks, Dram, Region};
use crate::error::{Fault, OpenError};
use crate::kernels::{AttentionKernel, Banks, Eltwise, Gather, Kernel, Matmul, NormKernel, l1};
use crate::layout::{Format, from_tiles, push_tile, tiles, to_tiles};
use crate::ops::{Angles, Modulated, Narrowed, Plan, PlanKey};
use crate::perf::{LinearPlan, LinearTiles};
use crate::tensor::Tensor;
use crate::transport::{self, Transport};

/// How to open a device.
#[derive(Debug, Clone, Default)]
pub struct TensixOptions {
    /// Limits the device to so many columns and rows of cores; all that work if none.
    pub grid: Option<(usize, usize)>,
    /// Tenstorrent's `libttsim.so`; `TT_METAL_SIMULATOR` if none.
    pub simulator: Option<PathBuf>,
    /// Whether kernels are recorded in command lists in device memory and run when the host must wait, instead of one
    /// by one; if not told, on cards only, since the simulator pays for every core that waits. Same bits either way.
    pub command_lists: Option<bool>,
    /// Whether the weights of linear layers that need not be exact are stored as bfp8 (a sign and seven bits, and an exponent for
    /// every 16 values) instead of bf16: half of the memory and of what is read of it.
    pub bfp8: bool,
    /// How long a kernel may take before it counts as hung; ten minutes if none, since simulated time is slow.
    pub timeout: Option<Duration>,
}

/// What a device has done and holds.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Stats {
    /// Kernels run.
    pub launches: u64,
    /// Kernels assembled and loaded.
    pub kernels: u64,
    /// Bytes of device memory in use.
    pub dram_used: u64,
    /// Bytes of command lists written to the device: nothing more for an inference like the last one.
    pub list_bytes: u64,
    /// Times that cores were started on their command lists.
    pub starts: u64,
    /// Kernels in which one core read for others what all of them need.
    pub shared: u64,
}

/// A Wormhole device.
pub struct Tensix {
    state: Mutex<State>,
    pub(crate) dram: Dram,
    pub(crate) banks: Banks,
    /// How weights that need not be exact are stored.
    pub(crate) weights: Format,
    info: BoardInfo,
    near: Near,
    constants: OnceLock<Constants>,
    pub(crate) angles: Cache<Angles, [Tensor; 2]>,
    pub(crate) plans: Cache<PlanKey, Plan>,
    pub(crate) modulations: Cache<Modulated, Tensor>,
    pub(crate) narrowed: Cache<Narrowed, Tensor>,
    pub(crate) sizes: Cache<(LinearTiles, Matmul), LinearPlan>,
}

/// Tables of angles and plans of attention that are kept: every layer of a tower needs the same.
const KEPT: usize = 8;
/// Scales, shifts and gates that are kept as tiles: at full size 37 norms have 10 steps' worth of each, 128 KiB apiece.
const KEPT_MODULATIONS: usize = 3 * 37 * 12;

/// Keys and values in bf16 of what came as f32: those of two layers of few parts.
const KEPT_NARROWED: usize = 8;
/// Sizes of kernels that are kept: a network has a dozen forms of layers.
const KEPT_SIZES: usize = 64;

/// Constant tiles in device memory.
pub(crate) struct Constants {
    /// Base address of a tile with ones in its first three columns, which select the rows of a bias.
    pub(crate) ones: u32,
    /// The same as bf16.
    pub(crate) ones_bf16: u32,
    /// Base address of the identity.
    pub(crate) identity: u32,
    /// The same as bf16.
    pub(crate) identity_bf16: u32,
    _regions: [Region; 4],
}

struct State {
    board: Board,
    kernels: HashMap<Key, Loaded>,
    stats: Stats,
}

/// Everything a kernel's code depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Key {
    Eltwise(Eltwise),
    Gather(Gather),
    Matmul(Matmul),
    Norm(NormKernel),
    Attention(AttentionKernel),
}

impl Key {
    fn build(&self, l1_bytes: u32) -> Result<Kernel, Fault> {
        match self {
            Key::Eltwise(k) => k.build(l1_bytes),
            Key::Gather(k) => k.build(l1_bytes),
            Key::Matmul(k) => k.build(l1_bytes),
            Key::Norm(k) => k.build(l1_bytes),
            Key::Attention(k) => k.build(l1_bytes),
        }
    }
}

impl Tensix {
    /// Opens the simulator that the options or the environment name; without one, and in a build with the feature
    /// `silicon`, the first card.
    pub fn open(options: &TensixOptions) -> Result<Self, OpenError> {
        let timeout = options.timeout.unwrap_or(Duration::from_secs(600));
        let board =
            Board::open(Self::connect(options, timeout)?, options.grid, options.command_lists, timeout)?;
        let (info, near) = (board.info().clone(), board.near().clone());
        let (start, end) = board.bank_range();
        let state = State { board, kernels: HashMap::new(), stats: Stats::default() };
        Ok(Self {
            state: Mutex::new(state),
            dram: Dram::new(info.dram_banks, start, end),
            banks: Banks(info.dram_banks as u32),
            weights: if options.bfp8 { Format::Bfp8 } else { Format::Bf16 },
            info,
            near,
            constants: OnceLock::new(),
            angles: Cache::new(KEPT),
            plans: Cache::new(KEPT),
            modulations: Cache::new(KEPT_MODULATIONS),
            narrowed: Cache::new(KEPT_NARROWED),
            sizes: Cache::new(KEPT_SIZES),
        })
    }

    fn connect(options: &TensixOptions, timeout: Duration) -> Result<Box<dyn Transport>, OpenError> {
        let named = options
            .simulator
            .clone()
            .or_else(|| std::env::var_os("TT_METAL_SIMULATOR").filter(|v| !v.is_empty()).map(PathBuf::from));
        if let Some(library) = named {
            // The library answers between slices of simulated time, each far shorter than a kernel's time limit.
            let patience = timeout + Duration::from_secs(30);
            return Ok(transport::spawn(&library, patience).map_err(Fault::Transport)?);
        }
        #[cfg(feature = "silicon")]
        if let Some(card) = transport::silicon::open().map_err(Fault::Transport)? {
            return Ok(card);
        }
        Err(OpenError::NoDevice)
    }

    /// What the device is.
    pub fn describe(&self) -> &BoardInfo {
        &self.info
    }

    /// What it has done and holds.
    pub fn stats(&self) -> Stats {
        let state = self.lock();
        let (list_bytes, starts) = state.board.list_stats();
        Stats { dram_used: self.dram.used(), list_bytes, starts, ..state.stats }
    }

    /// Bytes of device memory that tensors and weights may take.
    pub fn dram_capacity(&self) -> u64 {
        self.dram.capacity()
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        // A panic while the lock is held could only come from a bug; the board remembers its own faults.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    // ---- memory ----

    /// Room for tiles. Where there is none, what waiting commands hold is waited for.
    fn allocate(&self, count: usize, format: Format) -> Result<Region, Fault> {
        self.allocate_bytes(count, format.tile_bytes())
    }

    fn allocate_bytes(&self, count: usize, bytes: usize) -> Result<Region, Fault> {
        let room = self.dram.allocate(count, bytes);
        let mut state = self.lock();
        if room.is_ok() || !state.board.has_recorded() {
            return room;
        }
        state.board.run_lists()?;
        self.dram.settle();
        self.dram.allocate(count, bytes)
    }

    /// An uninitialized tensor.
    pub(crate) fn tensor(&self, rows: usize, cols: usize) -> Result<Tensor, Fault> {
        self.tensor_of(rows, cols, Format::F32)
    }

    /// The same with values of another format.
    pub(crate) fn tensor_of(&self, rows: usize, cols: usize, format: Format) -> Result<Tensor, Fault> {
        let region = self.allocate(tiles(rows) * tiles(cols), format)?;
        Ok(Tensor { format, ..Tensor::whole(region, rows, cols) })
    }

    /// Memory with tiles in it.
    pub(crate) fn region(&self, data: &[u8], format: Format) -> Result<Region, Fault> {
        let region = self.allocate(data.len() / format.tile_bytes(), format)?;
        self.lock().board.write_tiles(region.base(), format.tile_bytes(), data)?;
        Ok(region)
    }

    /// Memory with tiles of so many bytes, or what belongs to them, in blocks.
    pub(crate) fn in_blocks(&self, data: &[u8], bytes: usize, blocks: Blocks) -> Result<Region, Fault> {
        let region = self.allocate_bytes(blocks.span as usize * self.info.dram_banks, bytes)?;
        self.lock().board.write_blocks(region.base(), bytes * blocks.span as usize, data)?;
        Ok(region)
    }

    pub(crate) fn put(&self, rows: usize, cols: usize, data: &[f32]) -> Result<Tensor, Fault> {
        Ok(Tensor::whole(self.region(&to_tiles(data, rows, cols, Format::F32), Format::F32)?, rows, cols))
    }

    pub(crate) fn get(&self, x: &Tensor) -> Result<Vec<f32>, Fault> {
        let (rows, cols) = (x.tile_rows(), x.tile_cols());
        let order: Vec<usize> = (0..rows * cols).map(|i| x.tile(i / cols, i % cols) as usize).collect();
        let mut state = self.lock();
        let bytes = state.board.read_tiles(x.base(), Format::F32.tile_bytes(), order.into_iter())?;
        state.board.rewind_lists();
        drop(state);
        self.dram.settle();
        Ok(from_tiles(&bytes, x.rows, x.cols, cols))
    }

    /// The constant tiles, uploaded when first asked for.
    pub(crate) fn constants(&self) -> Result<&Constants, Fault> {
        if let Some(constants) = self.constants.get() {
            return Ok(constants);
        }
        let tile = |format, value: fn(usize, usize) -> bool| {
            let mut bytes = Vec::new();
            push_tile(&mut bytes, format, |r, c| f32::from(u8::from(value(r, c))));
            self.region(&bytes, format)
        };
        let ones = |_, c| c < 3;
        let identity = |r, c| r == c;
        let regions = [
            tile(Format::F32, ones)?,
            tile(Format::Bf16, ones)?,
            tile(Format::F32, identity)?,
            tile(Format::Bf16, identity)?,
        ];
        let [ones, ones_bf16, identity, identity_bf16] = regions.each_ref().map(Region::base);
        let constants = Constants { ones, ones_bf16, identity, identity_bf16, _regions: regions };
        Ok(self.constants.get_or_init(|| constants))
    }

    // ---- kernels ----

    /// Bytes of L1 of a core that a kernel's buffers may take.
    pub(crate) fn l1_room(&self) -> u32 {
        self.info.l1_bytes - l1::DATA
    }

    /// Which cores are near which banks.
    pub(crate) fn near(&self) -> &Near {
        &self.near
    }

    /// Columns and rows of cores in use.
    pub(crate) fn grid(&self) -> Grid {
        self.info.grid
    }

    /// Runs a kernel over a list of items, spread evenly over the cores.
    ///
    /// The arguments of a core are the number of its items, `head`, and the items. What an item computes does
    /// not depend on the core it is on, so any grid gives the same bits.
    pub(crate) fn run(&self, key: Key, head: &[u32], items: &[Vec<u32>]) -> Result<(), Fault> {
        let Some(item_words) = items.iter().map(Vec::len).max() else { return Ok(()) };
        let room = (l1::ARG_WORDS - 1 - head.len()) / item_words.max(1);
        let cores = self.info.grid.0 * self.info.grid.1;
        for round in items.chunks(room * cores) {
            let each = round.len().div_ceil(cores);
            let work: Vec<(usize, Vec<u32>)> = round
                .chunks(each)
                .enumerate()
                .map(|(core, own)| {
                    let mut args = vec![own.len() as u32];
                    args.extend(head);
                    args.extend(own.iter().flatten());
                    (core, args)
                })
                .collect();
            self.run_on(key, &work)?;
        }
        Ok(())
    }

    /// Runs a kernel on given cores, each with its arguments.
    pub(crate) fn run_on(&self, key: Key, work: &[(usize, Vec<u32>)]) -> Result<(), Fault> {
        let mut state = self.lock();
        let State { board, kernels, stats } = &mut *state;
        if !kernels.contains_key(&key) {
            let kernel = key.build(board.info().l1_bytes)?;
            let (loaded, kept) = board.load(kernel)?;
            if !kept {
                kernels.clear();
            }
            kernels.insert(key, loaded);
            stats.kernels += 1;
        }
        board.launch(&kernels[&key], work)?;
        stats.launches += 1;
        stats.shared += u64::from(matches!(key, Key::Matmul(k) if k.shared));
        if board.has_recorded() {
            self.dram.hold();
        }
        Ok(())
    }
}
