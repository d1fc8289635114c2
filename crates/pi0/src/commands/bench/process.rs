//! What the system knows of this process and machine: time since its start, private memory, the processor's name.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

/// Samples this process's private memory until it is dropped.
pub struct MemoryWatch {
    stop: Arc<AtomicBool>,
    peak: Arc<AtomicU64>,
    thread: Option<JoinHandle<()>>,
}

impl MemoryWatch {
    /// Starts sampling every few milliseconds. Where the system does not tell, the peak stays unknown.
    pub fn start() -> Self {
        let (stop, peak) = (Arc::new(AtomicBool::new(false)), Arc::new(AtomicU64::new(0)));
        let (told, seen) = (stop.clone(), peak.clone());
        let thread = std::thread::Builder::new().name("memory".into()).spawn(move || {
            while !told.load(Ordering::Relaxed) {
                let Some(now) = private_memory() else { return };
                seen.fetch_max(now, Ordering::Relaxed);
                std::thread::sleep(Duration::from_millis(10));
            }
        });
        Self { stop, peak, thread: thread.ok() }
    }

    /// The highest private memory since the last call, in bytes.
    pub fn take_peak(&self) -> Option<u64> {
        let now = private_memory()?;
        Some(self.peak.swap(0, Ordering::Relaxed).max(now))
    }
}

impl Drop for MemoryWatch {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}

/// Resident memory that no file backs: what the process costs beside the page cache.
fn private_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let kilobytes = |name: &str| -> Option<u64> {
        let line = status.lines().find(|l| l.starts_with(name))?;
        line[name.len()..].trim_end_matches("kB").trim().parse().ok()
    };
    Some(1024 * (kilobytes("RssAnon:")? + kilobytes("RssShmem:")?))
}

/// Time since the system started this process, to a hundredth of a second.
pub fn age() -> Option<Duration> {
    let seconds = |text: &str| text.parse::<f64>().ok();
    let uptime = std::fs::read_to_string("/proc/uptime").ok()?;
    let stat = std::fs::read_to_string("/proc/self/stat").ok()?;
    // The second field, in parentheses, may hold blanks. The start is field 22, in ticks of 1/100 s on Linux.
    let start = seconds(stat.rsplit_once(')')?.1.split_whitespace().nth(19)?)? / 100.0;
    Duration::try_from_secs_f64(seconds(uptime.split_whitespace().next()?)? - start).ok()
}

/// The processor, in its maker's words.
pub fn processor() -> String {
    let info = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
    let field = |name: &str| {
        let line = info.lines().find(|l| l.starts_with(name))?;
        Some(line.split_once(':')?.1.trim().to_string())
    };
    let model = field("cpu family").zip(field("model")).map(|(f, m)| format!(", family {f} model {m}"));
    field("model name").map_or_else(|| std::env::consts::ARCH.into(), |n| n + &model.unwrap_or_default())
}
