//! What a chip is, asked of its management processor (ARC).

use std::time::{Duration, Instant};

use super::{BANKS, Board, COLUMNS, Core, Near, ROWS, word};
use crate::error::{Fault, OpenError};
use crate::transport::Batch;

/// PCI device and vendor id.
const WORMHOLE: u32 = 0x401E_1E52;
/// The ARC processor's registers and memory, as offsets in BAR 0.
const ARC_RESET_UNIT: u64 = 0x1FF3_0000;
const ARC_MEMORY: u64 = 0x1FE8_0000;
const ARC_MEMORY_ADDRESS: u64 = 0x1000_0000;
const MESSAGE_DEASSERT_RISCV_RESET: u8 = 0xBA;
const MESSAGE_BUSY_CLOCK: u8 = 0x52;
const MESSAGE_HARVESTED_ROWS: u8 = 0x57;
/// Configuration of the network interface of a DRAM tile, and the bit that says that it translates coordinates.
const NIU_CONFIG: u64 = 0x1_000A_0100;
const TRANSLATION: u32 = 1 << 14;
/// Bit of the ARC's control register that it clears when it takes a message.
const TRIGGER: u32 = 1 << 16;
/// How long the clock may take to rise, and MHz at which it counts as risen.
const CLOCK_PATIENCE: Duration = Duration::from_secs(1);
const CLOCK_RISEN: u32 = 900;
/// Telemetry tags.
const TAG_BOARD_ID_HIGH: u16 = 1;
const TAG_BOARD_ID_LOW: u16 = 2;
const TAG_CLOCK: u16 = 14;
const TAG_MEMORY: u16 = 22;
const TAG_FIRMWARE_BUNDLE: u16 = 28;

impl Board {
    /// Learns what the device is and wakes its cores.
    pub(super) fn discover(&mut self, grid: Option<(usize, usize)>) -> Result<(), OpenError> {
        let mut batch = Batch::default();
        batch.config_read(0);
        let id = word(&self.run(batch)?);
        if id != WORMHOLE {
            return Err(OpenError::NotWormhole(id));
        }
        self.arc_message(MESSAGE_DEASSERT_RISCV_RESET)?;
        self.arc_message(MESSAGE_BUSY_CLOCK)?;
        let harvested_rows = self.arc_message(MESSAGE_HARVESTED_ROWS)?;
        let harvested = harvested_rows.count_ones() as usize;
        let tag = |telemetry: &[(u16, u32)], tag| {
            telemetry.iter().find(|(t, _)| *t == tag).map_or(0, |(_, value)| *value)
        };
        let mut telemetry = self.telemetry()?;
        // The clock rises while the ARC answers other questions.
        let start = Instant::now();
        while (1..CLOCK_RISEN).contains(&tag(&telemetry, TAG_CLOCK)) && start.elapsed() < CLOCK_PATIENCE {
            telemetry = self.telemetry()?;
        }
        self.info.clock = tag(&telemetry, TAG_CLOCK);
        let memory = tag(&telemetry, TAG_MEMORY);
        if memory != 0 && !trained(memory) {
            return Err(OpenError::MemoryNotTrained(memory));
        }
        // The simulator always translates, and does not have the register.
        if !self.transport.simulated() {
            let mut batch = Batch::default();
            batch.read(BANKS[0][0], NIU_CONFIG, 4);
            if word(&self.run(batch)?) & TRANSLATION == 0 {
                return Err(OpenError::NoTranslation);
            }
        }
        let usable = (COLUMNS, ROWS.saturating_sub(harvested));
        let wanted = grid.unwrap_or(usable);
        if wanted.0 == 0 || wanted.1 == 0 || wanted.0 > usable.0 || wanted.1 > usable.1 {
            return Err(OpenError::Grid { wanted, usable });
        }
        self.info.board_id = u64::from(tag(&telemetry, TAG_BOARD_ID_HIGH)) << 32
            | u64::from(tag(&telemetry, TAG_BOARD_ID_LOW));
        self.info.firmware = tag(&telemetry, TAG_FIRMWARE_BUNDLE);
        self.info.harvested_rows = harvested;
        self.info.usable_grid = usable;
        self.info.grid = wanted;
        self.cores.resize_with(wanted.0 * wanted.1, Core::default);
        self.near = Near::new(wanted, harvested_rows);
        Ok(())
    }

    fn arc_words(&mut self, offsets: &[u64]) -> Result<Vec<u32>, Fault> {
        let mut batch = Batch::default();
        offsets.iter().for_each(|&o| batch.arc_read(o));
        Ok(self.run(batch)?.chunks_exact(4).map(word).collect())
    }

    /// Sends a message through the scratch registers; its answer.
    fn arc_message(&mut self, code: u8) -> Result<u32, Fault> {
        let scratch = |i: u64| ARC_RESET_UNIT + 0x60 + 4 * i;
        let control = ARC_RESET_UNIT + 0x100;
        let start = Instant::now();
        // An earlier message, of this program or another, may not have been taken yet.
        let state = loop {
            let state = self.arc_words(&[control])?[0];
            if state == u32::MAX {
                return Err(self.broken(Fault::Gone));
            }
            if state & TRIGGER == 0 {
                break state;
            }
            if start.elapsed() > self.timeout {
                return Err(self.broken(Fault::Arc(code)));
            }
        };
        let mut batch = Batch::default();
        batch.arc_write(scratch(3), 0);
        batch.arc_write(scratch(5), 0xAA00 | u32::from(code));
        batch.arc_write(control, state | TRIGGER);
        self.run(batch)?;
        while start.elapsed() < self.timeout {
            let [answer, value] = self.arc_words(&[scratch(5), scratch(3)])?[..] else { break };
            if answer == u32::MAX {
                return Err(self.broken(Fault::ArcRefused { code, exit: u16::MAX }));
            }
            if answer & 0xFFFF == u32::from(code) {
                let exit = (answer >> 16) as u16;
                return if exit == 0 {
                    Ok(value)
                } else {
                    Err(self.broken(Fault::ArcRefused { code, exit }))
                };
            }
            let mut batch = Batch::default();
            batch.tick(16);
            self.run(batch)?;
        }
        Err(self.broken(Fault::Arc(code)))
    }

    /// Telemetry as tags and values; empty where the firmware publishes none.
    fn telemetry(&mut self) -> Result<Vec<(u16, u32)>, Fault> {
        let at = self.arc_words(&[ARC_RESET_UNIT + 0x1D0, ARC_RESET_UNIT + 0x1D4])?;
        let memory = |a: u32| u64::from(a).checked_sub(ARC_MEMORY_ADDRESS).map(|a| ARC_MEMORY + a);
        let (Some(table), Some(values)) = (memory(at[0]), memory(at[1])) else { return Ok(Vec::new()) };
        let count = self.arc_words(&[table + 4])?[0].min(256);
        let entries: Vec<u64> = (0..u64::from(count)).map(|i| table + 8 + 4 * i).collect();
        let entries = self.arc_words(&entries)?;
        let places: Vec<u64> = entries.iter().map(|e| values + 4 * u64::from(e >> 16)).collect();
        Ok(entries.iter().map(|&e| e as u16).zip(self.arc_words(&places)?).collect())
    }
}

/// Whether the status of the six memory controllers says that all are trained: in two bits each (trained, failed), or
/// in older firmware in four (2 passed, 3 skipped).
fn trained(status: u32) -> bool {
    let pairs = (0..6).all(|i| status >> (2 * i) & 3 == 1);
    let nibbles = (0..6).all(|i| matches!(status >> (4 * i) & 15, 2 | 3));
    pairs || nibbles
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn memory_is_trained_if_all_controllers_say_so() {
        for good in [0x555, 0x22_2222, 0x23_2222] {
            assert!(trained(good), "{good:x}");
        }
        for bad in [0x554, 0x55D, 0x557, 0x22_2212, 0x2222, 0x1] {
            assert!(!trained(bad), "{bad:x}");
        }
    }
}
