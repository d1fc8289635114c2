//! A card, through Tenstorrent's kernel driver and its maintained Rust interface.
//!
//! **Unproven**: this was compiled, never run. No card was at hand.

use std::fs::File;

use luwen_kmd::tlb::Ordering;
use luwen_kmd::{PciDevice, PossibleTlbAllocation, Power, Tlb};

use super::{Access, Batch, Transport, TransportError, Xy, decode};

/// Bytes of the window through which tiles are reached; the driver allocates it.
const WINDOW_BYTES: u64 = 16 << 20;

struct Card {
    device: PciDevice,
    window: PossibleTlbAllocation,
    /// Held while the card is ours: another of our processes cannot open it meanwhile.
    _lock: File,
}

/// Opens the first card.
pub(crate) fn open() -> Result<Option<Box<dyn Transport>>, TransportError> {
    let Some(&id) = PciDevice::scan().first() else { return Ok(None) };
    let path = format!("/dev/tenstorrent/{id}");
    let lock = File::open(&path).map_err(|e| TransportError::Card(format!("{path}: {e}")))?;
    lock.try_lock().map_err(|e| TransportError::Card(format!("{path} is in use by another process: {e}")))?;
    let device = PciDevice::open(id).map_err(|e| TransportError::Card(e.to_string()))?;
    if !device.arch.is_wormhole() {
        return Err(TransportError::Card(format!("card {id} is {:?}, not a Wormhole", device.arch)));
    }
    // The driver starts a card for a program that knows of power states with everything off.
    device.set_power_state(Power::High).map_err(|e| TransportError::Card(e.to_string()))?;
    let window = device.allocate_tlb(WINDOW_BYTES).map_err(|e| TransportError::Card(e.to_string()))?;
    Ok(Some(Box::new(Card { device, window: PossibleTlbAllocation::Allocation(window), _lock: lock })))
}

/// The window's target. Strict order: arguments must arrive before the word that starts a kernel.
fn target(tile: Xy, addr: u64) -> Tlb {
    Tlb { local_offset: addr, x_end: tile.x, y_end: tile.y, ordering: Ordering::STRICT, ..Tlb::default() }
}

impl Card {
    fn access(&mut self, access: Access<'_>, reply: &mut Vec<u8>) -> Result<(), String> {
        match access {
            Access::TileRead { tile, addr, len } | Access::TileAwait { tile, addr, len, .. } => {
                let at = reply.len();
                reply.resize(at + len, 0);
                let out = &mut reply[at..];
                self.device.noc_read(&self.window, target(tile, addr), out).map_err(|e| e.to_string())
            }
            Access::TileWrite { tile, addr, data } => {
                self.device.noc_write(&self.window, target(tile, addr), data).map_err(|e| e.to_string())
            }
            Access::ArcRead { offset } => {
                let word = self.device.read32(offset as u32).map_err(|e| e.to_string())?;
                reply.extend(word.to_le_bytes());
                Ok(())
            }
            Access::ArcWrite { offset, value } => {
                self.device.write32(offset as u32, value).map_err(|e| e.to_string())
            }
            Access::ConfigRead { offset } => {
                let at = reply.len();
                reply.resize(at + 4, 0);
                self.device.read_cfg(offset as u32, &mut reply[at..]).map_err(|e| e.to_string())
            }
            // Time passes by itself.
            Access::Tick { .. } => Ok(()),
        }
    }
}

impl Transport for Card {
    fn run(&mut self, batch: Batch) -> Result<Vec<u8>, TransportError> {
        let mut reply = Vec::with_capacity(batch.reply_bytes);
        let mut bytes = &batch.bytes[..];
        while let Some(access) = decode(&mut bytes) {
            self.access(access, &mut reply).map_err(TransportError::Card)?;
        }
        Ok(reply)
    }

    fn name(&self) -> &'static str {
        "the kernel driver (unproven)"
    }

    fn simulated(&self) -> bool {
        false
    }
}
