//! What a GPU does at most with the plainest launches, measured here and now: yardsticks for reports.

use std::time::Instant;

use pi0_device::Device;

use crate::device::Vulkan;
use crate::tensor::Tensor;

/// Runs of each chain, of which the fastest counts.
const ROUNDS: usize = 5;
/// Values of the rows that are copied to measure memory: beyond any cache.
const VALUES: u64 = 64 << 20;

impl Vulkan {
    /// Seconds that one more launch takes which does next to nothing and depends on the one before.
    pub fn launch_cost(&self) -> pi0_device::Result<f64> {
        let chain = |launches: usize| {
            let mut x = self.upload(1, 1, &[0.0])?;
            for _ in 0..launches {
                x = self.add(&x, &x)?;
            }
            Ok(x)
        };
        Ok(self.difference(&chain, 500, 2500)? / 2000.0)
    }

    /// Bytes a second that a copy reads and writes.
    pub fn bandwidth(&self) -> pi0_device::Result<f64> {
        let room = self.memory.left() / 16;
        let values = VALUES.min(room).min(self.info().max_binding / 4) as usize;
        let rows = (values >> 16).max(1).next_power_of_two() / 2;
        let chain = |copies: usize| {
            // Grows on the device: little to upload.
            let mut x = self.upload(1, 1 << 16, &vec![1.0; 1 << 16])?;
            while x.rows < rows {
                x = self.concat_rows(&[&x, &x])?;
            }
            for _ in 0..copies {
                x = self.concat_rows(&[&x])?;
            }
            self.slice_rows(&x, 0..1)
        };
        let bytes = 2 * 4 * (rows.max(1) << 16) as u64;
        Ok(12.0 * bytes as f64 / self.difference(&chain, 4, 16)?)
    }

    /// Seconds that the longer of two chains takes more than the shorter.
    fn difference(
        &self,
        chain: &dyn Fn(usize) -> pi0_device::Result<Tensor>,
        short: usize,
        long: usize,
    ) -> pi0_device::Result<f64> {
        let time = |length: usize| {
            let mut best = f64::INFINITY;
            // The first records.
            for round in 0..=ROUNDS {
                let x = chain(length)?;
                let start = Instant::now();
                self.download(&x)?;
                if round > 0 {
                    best = best.min(start.elapsed().as_secs_f64());
                }
            }
            Ok::<_, pi0_device::Error>(best)
        };
        // A difference below what the host's clock tells apart is none.
        Ok((time(long)? - time(short)?).max(1e-9))
    }
}
