//! One Wormhole chip: where its cores and memory banks are, and how kernels are loaded and run.

mod discovery;
mod lists;
mod near;

pub(crate) use near::Near;

use std::collections::HashSet;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::error::{Fault, OpenError};
use crate::kernels::{Kernel, Processor, firmware, l1};
use crate::transport::{Batch, Transport, Xy};

/// Coordinates of the first core in the translated system, where rows that do not work come last.
const FIRST_CORE: u8 = 18;
const COLUMNS: usize = 8;
const ROWS: usize = 10;
/// Bytes of a core's memory.
const L1_BYTES: u32 = 1464 * 1024;
/// The DRAM tiles, in groups of three. Each tile of a group reaches both of its channels, 2 GiB; a network
/// interface delivers less than they do, so cores take turns over the three.
const BANKS: [[Xy; 3]; 6] = [
    [xy(0, 0), xy(0, 1), xy(0, 11)],
    [xy(0, 5), xy(0, 6), xy(0, 7)],
    [xy(5, 0), xy(5, 1), xy(5, 11)],
    [xy(5, 2), xy(5, 9), xy(5, 10)],
    [xy(5, 3), xy(5, 4), xy(5, 8)],
    [xy(5, 5), xy(5, 6), xy(5, 7)],
];
/// Channels behind each group of tiles; the second one's bytes follow the first one's.
const CHANNELS: usize = 2;
const BANK_COUNT: usize = BANKS.len() * CHANNELS;
const BANK_BYTES: u64 = 1 << 30;
/// The lowest addresses are left to the board's own firmware.
const BANK_START: u64 = 1 << 20;
/// NoC 1 counts from the opposite corner.
const NOC_SIZE: (u8, u8) = (10, 12);

/// Resets of the five processors, in a debug register of each core.
const SOFT_RESET: u64 = 0xFFB1_21B0;
const RESET_ALL: u32 = 1 << 11 | 7 << 12 | 1 << 18;
const RESET_B: u32 = 1 << 11;
/// Everything that the register resets: the units of the coprocessor too, whatever ran before left in them. The
/// simulator knows the processors alone.
const RESET_WHOLE: u32 = (1 << 23) - 1;

/// What a device is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct BoardInfo {
    /// `ttsim`, or the driver of a card.
    pub transport: &'static str,
    /// Architecture.
    pub arch: &'static str,
    /// Board id from telemetry; 0 if not reported.
    pub board_id: u64,
    /// Firmware bundle from telemetry; 0 if not reported.
    pub firmware: u32,
    /// Clock of the cores in MHz from telemetry; 0 if not reported.
    pub clock: u32,
    /// Rows of cores that are fused off.
    pub harvested_rows: usize,
    /// Columns and rows of cores that work.
    pub usable_grid: (usize, usize),
    /// Columns and rows in use.
    pub grid: (usize, usize),
    /// Bytes of device memory.
    pub dram_bytes: u64,
    /// Number of banks.
    pub dram_banks: usize,
    /// Bytes of memory of each core.
    pub l1_bytes: u32,
}

impl std::fmt::Display for BoardInfo {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let (columns, rows) = self.grid;
        write!(
            f,
            "{} through {}: board {:016x}, firmware {:08x}, {} MHz, grid {columns}x{rows} of {}x{} ({} rows harvested), \
             {} GiB DRAM in {} banks, {} KiB L1 a core",
            self.arch,
            self.transport,
            self.board_id,
            self.firmware,
            self.clock,
            self.usable_grid.0,
            self.usable_grid.1,
            self.harvested_rows,
            self.dram_bytes >> 30,
            self.dram_banks,
            self.l1_bytes >> 10
        )
    }
}

/// A core's state as the host knows it.
#[derive(Debug, Default)]
struct Core {
    /// Kernels in its code memory, by identity.
    loaded: HashSet<usize>,
    /// Whether its firmware is in memory, and running.
    prepared: bool,
    running: bool,
}

/// A kernel with its place in code memory, the same on every core.
#[derive(Debug)]
pub(crate) struct Loaded {
    id: usize,
    base: u32,
    kernel: Kernel,
    name: Arc<str>,
}

impl Loaded {
    /// Where each processor's program begins; 0 where there is none.
    fn entries(&self) -> [u32; 5] {
        let mut entry = self.base;
        self.kernel.code.each_ref().map(|code| {
            let at = if code.is_empty() { 0 } else { entry };
            entry += 4 * code.len() as u32;
            at
        })
    }
}

pub(crate) struct Board {
    transport: Box<dyn Transport>,
    pending: Batch,
    info: BoardInfo,
    cores: Vec<Core>,
    near: Near,
    firmware: [Vec<u32>; 5],
    next_id: usize,
    next_code: u32,
    timeout: Duration,
    fault: Option<Fault>,
    lists: Option<lists::Lists>,
}

const fn xy(x: u8, y: u8) -> Xy {
    Xy { x, y }
}

fn words(w: &[u32]) -> Vec<u8> {
    w.iter().flat_map(|w| w.to_le_bytes()).collect()
}

/// A tile that reaches a bank, and where the bank begins there.
fn bank_place(bank: usize) -> (Xy, u64) {
    (BANKS[bank / CHANNELS][0], (bank % CHANNELS) as u64 * BANK_BYTES)
}

/// The bank of a block of a weight: the first channels of all groups, then the second ones, so that the two halves of a
/// GEGLU layer's columns lie in the same group.
fn block_bank(block: usize) -> usize {
    block % BANKS.len() * CHANNELS + block / BANKS.len()
}

/// Coordinates as the upper half of a NoC address.
fn address_mid(t: Xy) -> u32 {
    u32::from(t.x) << 4 | u32::from(t.y) << 10
}

/// Columns and rows of cores.
pub(crate) type Grid = (usize, usize);

fn core_at((column, row): (usize, usize)) -> Xy {
    Xy { x: FIRST_CORE + column as u8, y: FIRST_CORE + row as u8 }
}

/// The coordinates of the core in a column and row of the grid, as the upper half of an address on NoC 0.
pub(crate) fn core_address(place: (usize, usize)) -> u32 {
    address_mid(core_at(place))
}

/// The rectangle of all cores from `first` to `last` (column and row of the grid), as the upper half of an address on
/// NoC 1, which counts from the last.
pub(crate) fn rectangle_address(first: (usize, usize), last: (usize, usize)) -> u32 {
    address_mid(core_at(last)) << 12 | address_mid(core_at(first))
}

impl Board {
    /// Takes a device over. `grid` limits it to so many columns and rows; `lists` says whether kernels are put into
    /// command lists, where it is not left to the device.
    pub(crate) fn open(
        transport: Box<dyn Transport>,
        grid: Option<(usize, usize)>,
        lists: Option<bool>,
        timeout: Duration,
    ) -> Result<Self, OpenError> {
        let mut firmwares: [Vec<u32>; 5] = Default::default();
        for (p, f) in Processor::ALL.into_iter().zip(&mut firmwares) {
            *f = firmware(p)?;
        }
        let info = BoardInfo {
            transport: transport.name(),
            arch: "Wormhole B0",
            board_id: 0,
            firmware: 0,
            clock: 0,
            harvested_rows: 0,
            usable_grid: (COLUMNS, ROWS),
            grid: (0, 0),
            dram_bytes: BANK_BYTES * BANK_COUNT as u64,
            dram_banks: BANK_COUNT,
            l1_bytes: L1_BYTES,
        };
        let mut board = Self {
            transport,
            pending: Batch::default(),
            info,
            cores: Vec::new(),
            near: Near::new((0, 0), 0),
            firmware: firmwares,
            next_id: 0,
            next_code: l1::CODE,
            timeout,
            fault: None,
            lists: None,
        };
        board.discover(grid)?;
        board.reset_everything()?;
        // Cores that wait for others cost the simulator as much as cores that compute.
        if lists.unwrap_or(!board.transport.simulated()) {
            board.lists = Some(lists::Lists::new(board.cores.len()));
        }
        Ok(board)
    }

    /// Holds every core that works in reset, used or not: others may have left programs running.
    fn reset_everything(&mut self) -> Result<(), Fault> {
        let mask = if self.transport.simulated() { RESET_ALL } else { RESET_WHOLE };
        let (columns, rows) = self.info.usable_grid;
        for (x, y) in (0..rows as u8).flat_map(|y| (0..columns as u8).map(move |x| (x, y))) {
            let tile = Xy { x: FIRST_CORE + x, y: FIRST_CORE + y };
            self.pending.write(tile, SOFT_RESET, &mask.to_le_bytes());
            // Then the processors alone: units that stay in reset would never compute.
            self.pending.write(tile, SOFT_RESET, &RESET_ALL.to_le_bytes());
        }
        self.flush().map(|_| ())
    }

    pub(crate) fn near(&self) -> &Near {
        &self.near
    }

    pub(crate) fn info(&self) -> &BoardInfo {
        &self.info
    }

    /// Addresses of a bank that tensors may use.
    pub(crate) fn bank_range(&self) -> (u64, u64) {
        let lists = if self.lists.is_some() { lists::BANK_BYTES } else { 0 };
        (BANK_START, BANK_BYTES - lists)
    }

    fn place(&self, core: usize) -> (usize, usize) {
        (core % self.info.grid.0, core / self.info.grid.0)
    }

    fn tile(&self, core: usize) -> Xy {
        core_at(self.place(core))
    }

    // ---- transfers ----

    fn run(&mut self, batch: Batch) -> Result<Vec<u8>, Fault> {
        if let Some(fault) = &self.fault {
            return Err(fault.clone());
        }
        self.transport.run(batch).map_err(|e| self.broken(e.into()))
    }

    /// Remembers why the device is of no more use.
    fn broken(&mut self, fault: Fault) -> Fault {
        self.fault = Some(fault.clone());
        fault
    }

    fn flush(&mut self) -> Result<Vec<u8>, Fault> {
        let batch = std::mem::take(&mut self.pending);
        if batch.is_empty() {
            return Ok(Vec::new());
        }
        self.run(batch)
    }

    /// Writes tiles of a tensor at `base` of every bank, from tile index 0.
    pub(crate) fn write_tiles(&mut self, base: u32, tile_bytes: usize, tiles: &[u8]) -> Result<(), Fault> {
        const CHUNK: usize = 8 << 20;
        for bank in 0..BANK_COUNT {
            let (xy, start) = bank_place(bank);
            let own: Vec<u8> =
                tiles.chunks(tile_bytes).skip(bank).step_by(BANK_COUNT).flatten().copied().collect();
            for (i, part) in own.chunks(CHUNK).enumerate() {
                self.pending.write(xy, start + u64::from(base) + (i * CHUNK) as u64, part);
                if self.pending.len() > CHUNK {
                    self.flush()?;
                }
            }
        }
        self.flush().map(|_| ())
    }

    /// Writes a weight at `base` of every bank, so many bytes to each.
    pub(crate) fn write_blocks(&mut self, base: u32, block_bytes: usize, tiles: &[u8]) -> Result<(), Fault> {
        const CHUNK: usize = 8 << 20;
        for (block, own) in tiles.chunks(block_bytes).enumerate() {
            let (xy, start) = bank_place(block_bank(block));
            for (i, part) in own.chunks(CHUNK).enumerate() {
                self.pending.write(xy, start + u64::from(base) + (i * CHUNK) as u64, part);
                if self.pending.len() > CHUNK {
                    self.flush()?;
                }
            }
        }
        self.flush().map(|_| ())
    }

    /// Reads tiles `range` of a tensor at `base` of every bank.
    pub(crate) fn read_tiles(
        &mut self,
        base: u32,
        tile_bytes: usize,
        tiles: impl ExactSizeIterator<Item = usize>,
    ) -> Result<Vec<u8>, Fault> {
        self.run_lists()?;
        for t in tiles {
            let (xy, start) = bank_place(t % BANK_COUNT);
            let addr = start + u64::from(base) + (t / BANK_COUNT * tile_bytes) as u64;
            self.pending.read(xy, addr, tile_bytes);
        }
        self.flush()
    }

    // ---- kernels ----

    /// Gives a kernel its place in the code memory of all cores. When that is full, it starts over, and kernels
    /// made before must not be run again: `false` says so.
    pub(crate) fn load(&mut self, kernel: Kernel) -> Result<(Loaded, bool), Fault> {
        let bytes: usize = kernel.code.iter().map(|c| c.len() * 4).sum();
        let fresh = self.next_code as usize + bytes > l1::DATA as usize;
        if fresh {
            self.run_lists()?;
            self.next_code = l1::CODE;
            self.cores.iter_mut().for_each(|c| c.loaded.clear());
        }
        let base = self.next_code;
        self.next_code = (base + bytes as u32).next_multiple_of(64);
        self.next_id += 1;
        let name = kernel.name.as_str().into();
        Ok((Loaded { id: self.next_id, base, kernel, name }, !fresh))
    }

    /// Runs a kernel on some cores, each with its arguments, and waits for all of them; or puts it into the command
    /// lists.
    pub(crate) fn launch(&mut self, loaded: &Loaded, work: &[(usize, Vec<u32>)]) -> Result<(), Fault> {
        if self.lists.is_some() {
            return self.enqueue(loaded, work);
        }
        self.prepare(loaded, &work.iter().map(|(core, _)| *core).collect::<Vec<_>>())?;
        let go = loaded.entries();
        let counters = [0u8; l1::COUNTER_BYTES as usize];
        for (core, args) in work {
            let mut data = counters.to_vec();
            data.extend(words(args));
            self.pending.write(self.tile(*core), l1::COUNTERS.into(), &data);
        }
        for (core, _) in work {
            self.pending.write(self.tile(*core), l1::GO.into(), &words(&go));
        }
        self.wait(&loaded.kernel.name, work.iter().map(|(core, _)| *core).collect(), &Processor::ALL)
    }

    /// Brings cores up with the kernel in memory.
    ///
    /// Code is only ever written while a core is held in reset, which also empties its instruction caches.
    fn prepare(&mut self, loaded: &Loaded, cores: &[usize]) -> Result<(), Fault> {
        let used: HashSet<usize> = cores.iter().copied().collect();
        if self.transport.simulated() {
            // Cores that idle cost the simulator as much as cores that compute.
            for core in (0..self.cores.len()).filter(|c| !used.contains(c)) {
                if std::mem::take(&mut self.cores[core].running) {
                    self.pending.write(self.tile(core), SOFT_RESET, &RESET_ALL.to_le_bytes());
                }
            }
        }
        let (mut started, mut strange) = (Vec::new(), Vec::new());
        for &core in cores {
            let tile = self.tile(core);
            let state = &self.cores[core];
            if state.running && state.loaded.contains(&loaded.id) {
                continue;
            }
            self.pending.write(tile, SOFT_RESET, &RESET_ALL.to_le_bytes());
            if !self.cores[core].prepared {
                for (start, code) in l1::START.into_iter().zip(&self.firmware) {
                    self.pending.write(tile, start.into(), &words(code));
                }
                let banks: [[u32; 2]; BANK_COUNT] = std::array::from_fn(|bank| {
                    let group = BANKS[bank / CHANNELS];
                    let b = group[(core + bank % CHANNELS) % group.len()];
                    let mirrored = Xy { x: NOC_SIZE.0 - 1 - b.x, y: NOC_SIZE.1 - 1 - b.y };
                    [address_mid(b), address_mid(mirrored)]
                });
                self.pending.write(tile, l1::BANKS.into(), &words(banks.as_flattened()));
                let near = self.near.tiles(core);
                let near: [[u32; 2]; BANK_COUNT] = std::array::from_fn(|block| {
                    let (_, channel) = bank_place(block_bank(block));
                    [address_mid(near[block % near.len()]), channel as u32]
                });
                self.pending.write(tile, l1::NEAR.into(), &words(near.as_flattened()));
                self.pending.write(tile, l1::READY.into(), &0u32.to_le_bytes());
                self.cores[core].prepared = true;
                strange.push(core);
            }
            if self.cores[core].loaded.insert(loaded.id) {
                let code: Vec<u32> = loaded.kernel.code.iter().flatten().copied().collect();
                self.pending.write(tile, loaded.base.into(), &words(&code));
            }
            // The firmware clears these words once it is up.
            self.pending.write(tile, l1::GO.into(), &words(&[1; 5]));
            started.push(core);
        }
        // On a core that is not ours yet B goes first.
        for &core in &strange {
            self.pending.write(self.tile(core), SOFT_RESET, &(RESET_ALL & !RESET_B).to_le_bytes());
        }
        self.wait("firmware of B", strange, &[Processor::B])?;
        for &core in &started {
            self.pending.write(self.tile(core), SOFT_RESET, &0u32.to_le_bytes());
            self.cores[core].running = true;
        }
        self.wait("firmware", started, &Processor::ALL)
    }

    /// Waits until the first of the processors of the cores, those of `awaited`, have cleared their GO words.
    fn wait(&mut self, kernel: &str, mut cores: Vec<usize>, awaited: &[Processor]) -> Result<(), Fault> {
        /// Clocks that the simulator may take at once: tenths of a second, so that the time limit is seen.
        const CLOCKS: u64 = 1 << 14;
        let start = Instant::now();
        while !cores.is_empty() {
            for &core in &cores {
                let tile = self.tile(core);
                self.pending.await_zero(tile, l1::GO.into(), 4 * awaited.len(), CLOCKS);
            }
            let reply = self.flush()?;
            let state: Vec<Vec<u32>> = reply
                .chunks_exact(4 * awaited.len())
                .map(|go| go.chunks_exact(4).map(word).collect())
                .collect();
            let busy = |go: &Vec<u32>| go.iter().any(|&w| w != 0);
            let stuck = cores.iter().zip(&state).find(|(_, go)| busy(go));
            if let Some((core, go)) = stuck
                && start.elapsed() > self.timeout
            {
                let waiting = awaited.iter().zip(go).filter(|(_, w)| **w != 0);
                let processors: Vec<&str> = waiting.map(|(p, _)| p.name()).collect();
                let (column, row) = self.place(*core);
                let kernel = match kernel {
                    lists::LIST => self.listed(*core)?.unwrap_or_else(|| kernel.into()),
                    _ => kernel.into(),
                };
                let fault = Fault::Hung {
                    kernel: kernel.to_string(),
                    core: format!("({column}, {row})"),
                    processors: processors.join(", "),
                    seconds: self.timeout.as_secs(),
                };
                return Err(self.broken(fault));
            }
            cores = cores.into_iter().zip(&state).filter(|(_, go)| busy(go)).map(|(core, _)| core).collect();
        }
        Ok(())
    }
}

impl Drop for Board {
    /// Leaves no program running on a card, whatever happened; the simulator ends with its process.
    fn drop(&mut self) {
        if self.transport.simulated() {
            return;
        }
        let mut batch = Batch::default();
        for core in 0..self.cores.len() {
            batch.write(self.tile(core), SOFT_RESET, &RESET_ALL.to_le_bytes());
        }
        // A card that does not answer cannot be helped.
        let _ = self.transport.run(batch);
    }
}

fn word(bytes: impl AsRef<[u8]>) -> u32 {
    bytes.as_ref().first_chunk().map_or(0, |b| u32::from_le_bytes(*b))
}

#[cfg(test)]
mod tests;
