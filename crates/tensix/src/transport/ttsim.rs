//! Tenstorrent's simulator, loaded at run time: one Wormhole behind PCI configuration space and BAR 0.
//!
//! The library is a process-wide singleton and ends the process on any error, so this runs in a child process
//! only ([`super::child`]).

use std::ffi::c_void;
use std::path::Path;

use libloading::Library;

use super::{Access, Xy, decode};

/// The 16 MiB window used for tile accesses: entry 166 of the TLB configuration, at this offset of BAR 0.
const WINDOW: u64 = 0x0B00_0000;
const WINDOW_BYTES: u64 = 16 << 20;
const WINDOW_CONFIG: u64 = 0x1FC0_0000 + 8 * 166;

type Read = unsafe extern "C" fn(u64, *mut c_void, u32);
type Write = unsafe extern "C" fn(u64, *const c_void, u32);
type Clock = unsafe extern "C" fn(u32);
type ConfigRead = unsafe extern "C" fn(u32, u32) -> u32;

pub(super) struct TtSim {
    read: Read,
    write: Write,
    clock: Clock,
    config_read: ConfigRead,
    bar0: u64,
    window: Option<(Xy, u64)>,
    _library: Library,
}

impl TtSim {
    /// Loads and starts the simulator.
    pub(super) fn open(path: &Path) -> Result<Self, String> {
        // SAFETY: loading runs the library's initializers; the caller vouches for the file by naming it, as for
        // any program it starts. The signatures are those of the library's documented C interface, and the
        // function pointers are kept no longer than the library.
        let mut sim = unsafe {
            let library = Library::new(path).map_err(|e| e.to_string())?;
            let missing = |e: libloading::Error| format!("not a ttsim library: {e}");
            let init = *library.get::<unsafe extern "C" fn()>(b"libttsim_init\0").map_err(missing)?;
            let sim = Self {
                read: *library.get::<Read>(b"libttsim_pci_mem_rd_bytes\0").map_err(missing)?,
                write: *library.get::<Write>(b"libttsim_pci_mem_wr_bytes\0").map_err(missing)?,
                clock: *library.get::<Clock>(b"libttsim_clock\0").map_err(missing)?,
                config_read: *library.get::<ConfigRead>(b"libttsim_pci_config_rd32\0").map_err(missing)?,
                bar0: 0,
                window: None,
                _library: library,
            };
            init();
            sim
        };
        let (low, high) = (sim.config(0x10), sim.config(0x14));
        sim.bar0 = u64::from(high) << 32 | u64::from(low & !0xF);
        Ok(sim)
    }

    fn config(&mut self, offset: u32) -> u32 {
        // SAFETY: the documented signature; device 0 always exists, other offsets end the process.
        unsafe { (self.config_read)(0, offset) }
    }

    fn bar_read(&mut self, offset: u64, out: &mut [u8]) {
        // SAFETY: `out` is valid for writes of its length, which fits 32 bits because batches do.
        unsafe { (self.read)(self.bar0 + offset, out.as_mut_ptr().cast(), out.len() as u32) }
    }

    fn bar_write(&mut self, offset: u64, data: &[u8]) {
        // SAFETY: `data` is valid for reads of its length, which fits 32 bits because batches do.
        unsafe { (self.write)(self.bar0 + offset, data.as_ptr().cast(), data.len() as u32) }
    }

    /// Points the window at the 16 MiB of `tile` that hold `addr`; the BAR offset of `addr`, and how many bytes
    /// of the window follow it.
    fn point(&mut self, tile: Xy, addr: u64) -> (u64, usize) {
        let page = addr / WINDOW_BYTES;
        if self.window != Some((tile, page)) {
            // Address bits, target coordinates, and strict ordering.
            let entry = page | u64::from(tile.x) << 12 | u64::from(tile.y) << 18 | 1 << 38;
            self.bar_write(WINDOW_CONFIG, &entry.to_le_bytes());
            self.window = Some((tile, page));
        }
        let within = addr % WINDOW_BYTES;
        (WINDOW + within, (WINDOW_BYTES - within) as usize)
    }

    /// Appends bytes of a tile.
    fn tile_read(&mut self, reply: &mut Vec<u8>, tile: Xy, mut addr: u64, mut len: usize) {
        while len > 0 {
            let (offset, room) = self.point(tile, addr);
            let (n, at) = (len.min(room), reply.len());
            reply.resize(at + n, 0);
            self.bar_read(offset, &mut reply[at..]);
            (addr, len) = (addr + n as u64, len - n);
        }
    }

    fn tick(&mut self, clocks: u64) {
        // SAFETY: the documented signature.
        unsafe { (self.clock)(clocks as u32) }
    }

    /// Executes an encoded batch; the bytes of its reads.
    pub(super) fn execute(&mut self, mut batch: &[u8]) -> Vec<u8> {
        /// Clocks between two looks at what is awaited.
        const STEP: u64 = 16;
        let (mut reply, mut waited) = (Vec::new(), 0);
        while let Some(access) = decode(&mut batch) {
            match access {
                Access::TileRead { tile, addr, len } => self.tile_read(&mut reply, tile, addr, len),
                Access::TileAwait { tile, addr, len, clocks } => {
                    let at = reply.len();
                    self.tile_read(&mut reply, tile, addr, len);
                    while waited < clocks && reply[at..].iter().any(|b| *b != 0) {
                        self.tick(STEP);
                        waited += STEP;
                        reply.truncate(at);
                        self.tile_read(&mut reply, tile, addr, len);
                    }
                }
                Access::TileWrite { tile, mut addr, mut data } => {
                    while !data.is_empty() {
                        let (offset, room) = self.point(tile, addr);
                        let (now, later) = data.split_at(data.len().min(room));
                        self.bar_write(offset, now);
                        (addr, data) = (addr + now.len() as u64, later);
                    }
                }
                Access::ArcRead { offset } => {
                    let at = reply.len();
                    reply.resize(at + 4, 0);
                    self.bar_read(offset, &mut reply[at..]);
                }
                Access::ArcWrite { offset, value } => self.bar_write(offset, &value.to_le_bytes()),
                Access::ConfigRead { offset } => reply.extend(self.config(offset as u32).to_le_bytes()),
                Access::Tick { clocks } => self.tick(clocks),
            }
        }
        reply
    }
}
