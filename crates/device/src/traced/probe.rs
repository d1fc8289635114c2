//! Timing the device apart from the inference, on the same operands; the results are thrown away.

use std::time::{Duration, Instant};

use super::Traced;
use crate::record::Fusion;
use crate::{Device, Error, OpKind, Result};

/// From here on a call is long: waking a device takes a tenth of it at most.
const LONG: Duration = Duration::from_millis(5);

impl<D: Device, H: Device> Traced<D, H> {
    /// How long the device takes for `f` in its stride, if it can at all; none unless asked to
    /// [probe](Traced::probe).
    pub(super) fn probed<T>(
        &self,
        f: impl Fn() -> Result<T>,
        result: impl Fn(&T) -> &D::Tensor,
    ) -> Result<Option<Duration>> {
        if self.probing.get() { self.time_on_device(f, result) } else { Ok(None) }
    }

    /// The same in any case. After work of the host a device's threads sleep, its clocks are low and its caches hold
    /// other things; in an inference that stays on the device they are not. So the second call counts. Only where the
    /// first was long is it taken instead: waking is lost in it, and a second call would find large weights in caches
    /// that cannot hold those of a whole model.
    #[cold]
    fn time_on_device<T>(
        &self,
        f: impl Fn() -> Result<T>,
        result: impl Fn(&T) -> &D::Tensor,
    ) -> Result<Option<Duration>> {
        // One row waits for all, and costs little to move.
        let wait = |y: &T| -> Result<()> {
            let y = result(y);
            match self.device.slice_rows(y, 0..1) {
                Ok(row) => self.device.download(&row)?,
                Err(_) => self.device.download(y)?,
            };
            Ok(())
        };
        let timed = || -> Result<Duration> {
            let start = Instant::now();
            let y = f()?;
            wait(&y)?;
            let waited = start.elapsed();
            // Now that it is there, waiting again costs the move alone.
            let start = Instant::now();
            wait(&y)?;
            Ok(waited.saturating_sub(start.elapsed()))
        };
        match timed() {
            Ok(first) if first >= LONG => Ok(Some(first)),
            Ok(_) => timed().map(Some),
            Err(e) if e.is_unsupported() => Ok(None),
            Err(e) => Err(e),
        }
    }

    /// Where parts of a fused operation are forced to the host: measures, if asked to, what fusing them is worth, and
    /// refuses the call, so that it is composed.
    #[cold]
    pub(super) fn refuse_forced<T>(
        &self,
        op: OpKind,
        parts: Vec<OpKind>,
        fused: impl Fn() -> Result<T>,
        apart: impl Fn() -> Result<T>,
        result: impl Fn(&T) -> &D::Tensor,
    ) -> Result<()> {
        let mut forced: Vec<OpKind> = parts.into_iter().filter(|p| self.forced.contains(p)).collect();
        forced.sort();
        forced.dedup();
        let Some(first) = forced.first() else { return Ok(()) };
        let refused = Error::unsupported(self.name(), op, format!("{first} is forced to the host"));
        if let Some(fused) = self.probed(fused, &result)?
            && let Some(apart) = self.probed(apart, &result)?
        {
            self.fusions.borrow_mut().push(Fusion { op, forced, apart, fused });
        }
        Err(refused)
    }
}
