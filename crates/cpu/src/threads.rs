//! The thread pool: workers that wait a moment for the next operation before they sleep, because operations
//! follow each other within microseconds.

use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a worker watches for work before it sleeps.
const WATCH: Duration = Duration::from_micros(100);

/// Runs the tasks of one operation on all threads; the calling thread is one of them.
pub(crate) struct Threads {
    state: Arc<State>,
    workers: Vec<JoinHandle<()>>,
    /// One operation at a time.
    gate: Mutex<()>,
}

type Task<'a> = dyn Fn(usize) + Sync + 'a;

struct State {
    /// Counts operations; a change announces work.
    epoch: AtomicU64,
    job: Mutex<Option<Job>>,
    /// The next task to claim.
    next: AtomicUsize,
    /// Workers that have not finished the current operation.
    busy: AtomicUsize,
    sleepers: AtomicUsize,
    sleep: Mutex<()>,
    wake: Condvar,
    stop: AtomicBool,
    panicked: AtomicBool,
}

#[derive(Clone, Copy)]
struct Job {
    task: &'static Task<'static>,
    count: usize,
}

impl Threads {
    /// A pool of `count` threads in all, the caller included.
    pub(crate) fn new(count: usize) -> std::io::Result<Self> {
        let state = Arc::new(State {
            epoch: AtomicU64::new(0),
            job: Mutex::new(None),
            next: AtomicUsize::new(0),
            busy: AtomicUsize::new(0),
            sleepers: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            wake: Condvar::new(),
            stop: AtomicBool::new(false),
            panicked: AtomicBool::new(false),
        });
        let workers = (1..count.max(1))
            .map(|i| {
                let state = Arc::clone(&state);
                std::thread::Builder::new().name(format!("pi0-cpu-{i}")).spawn(move || state.work())
            })
            .collect::<Result<_, _>>()?;
        Ok(Self { state, workers, gate: Mutex::new(()) })
    }

    /// Threads in all, the caller included.
    pub(crate) fn count(&self) -> usize {
        self.workers.len() + 1
    }

    /// Calls `task` once for each of `0..count`, on any thread and in any order, and waits for all.
    pub(crate) fn run(&self, count: usize, task: &Task<'_>) {
        if self.workers.is_empty() || count <= 1 {
            (0..count).for_each(task);
            return;
        }
        let _one = self.gate.lock().unwrap_or_else(PoisonError::into_inner);
        let state = &*self.state;
        // SAFETY: only the lifetime changes. Workers call the task only between the epoch's change and their
        // decrement of `busy`, and this function returns or unwinds only after `busy` is zero.
        let task_for_workers = unsafe { std::mem::transmute::<&Task<'_>, &'static Task<'static>>(task) };
        *state.job.lock().unwrap_or_else(PoisonError::into_inner) =
            Some(Job { task: task_for_workers, count });
        state.next.store(0, Ordering::Relaxed);
        state.busy.store(self.workers.len(), Ordering::Relaxed);
        state.epoch.fetch_add(1, Ordering::SeqCst);
        state.wake_sleepers();
        let mine = catch_unwind(AssertUnwindSafe(|| state.claim(task, count)));
        let mut spins = 0u32;
        while state.busy.load(Ordering::Acquire) > 0 {
            spins += 1;
            // A worker may have lost its processor to someone else: let it run.
            if spins.is_multiple_of(1024) { std::thread::yield_now() } else { std::hint::spin_loop() }
        }
        let theirs = state.panicked.swap(false, Ordering::Relaxed);
        match mine {
            Err(panic) => resume_unwind(panic),
            Ok(()) => assert!(!theirs, "a worker thread panicked"),
        }
    }

    /// Splits `0..total` into runs of at least `grain` and calls `task` with each.
    pub(crate) fn split(&self, total: usize, grain: usize, task: impl Fn(std::ops::Range<usize>) + Sync) {
        let most = if self.workers.is_empty() { 1 } else { self.count() * 4 };
        let pieces = (total / grain.max(1)).clamp(1, most);
        self.run(pieces, &|i| task(total * i / pieces..total * (i + 1) / pieces));
    }
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        self.state.epoch.fetch_add(1, Ordering::SeqCst);
        self.state.wake_sleepers();
        for worker in self.workers.drain(..) {
            // A worker catches every panic of a task, so joining cannot fail.
            let _ = worker.join();
        }
    }
}

impl State {
    fn wake_sleepers(&self) {
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            let _held = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
            self.wake.notify_all();
        }
    }

    fn claim(&self, task: &Task<'_>, count: usize) {
        loop {
            let i = self.next.fetch_add(1, Ordering::Relaxed);
            if i >= count {
                return;
            }
            task(i);
        }
    }

    fn work(&self) {
        let mut seen = 0;
        loop {
            self.await_change(seen);
            seen += 1;
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            let job = *self.job.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some(Job { task, count }) = job
                && catch_unwind(AssertUnwindSafe(|| self.claim(task, count))).is_err()
            {
                self.panicked.store(true, Ordering::Relaxed);
            }
            self.busy.fetch_sub(1, Ordering::Release);
        }
    }

    fn await_change(&self, seen: u64) {
        let start = Instant::now();
        while start.elapsed() < WATCH {
            for _ in 0..64 {
                if self.epoch.load(Ordering::SeqCst) != seen {
                    return;
                }
                std::hint::spin_loop();
            }
        }
        let mut held = self.sleep.lock().unwrap_or_else(PoisonError::into_inner);
        self.sleepers.fetch_add(1, Ordering::SeqCst);
        while self.epoch.load(Ordering::SeqCst) == seen {
            held = self.wake.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
        self.sleepers.fetch_sub(1, Ordering::SeqCst);
    }
}

/// The number of physical cores that this process may use, as far as the system tells.
pub(crate) fn physical_cores() -> usize {
    let logical = std::thread::available_parallelism().map_or(1, |n| n.get());
    let Ok(text) = std::fs::read_to_string("/proc/cpuinfo") else { return logical };
    let (mut cores, mut package) = (std::collections::HashSet::new(), "");
    for line in text.lines() {
        match line.split_once(':').map(|(k, v)| (k.trim(), v.trim())) {
            Some(("physical id", id)) => package = id,
            Some(("core id", id)) => {
                cores.insert((package, id));
            }
            _ => {}
        }
    }
    if cores.is_empty() { logical } else { cores.len().min(logical) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_runs_once() {
        for threads in [1, 2, 5] {
            let pool = Threads::new(threads).unwrap();
            for count in [0, 1, 3, 100, 1000] {
                let ran: Vec<_> = (0..count).map(|_| AtomicUsize::new(0)).collect();
                pool.run(count, &|i| {
                    ran[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(ran.iter().all(|r| r.load(Ordering::Relaxed) == 1));
            }
            std::thread::sleep(2 * WATCH);
            let covered = AtomicUsize::new(0);
            pool.split(1001, 10, |r| {
                covered.fetch_add(r.len(), Ordering::Relaxed);
            });
            assert_eq!(covered.into_inner(), 1001);
        }
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_survives() {
        let pool = Threads::new(3).unwrap();
        let caught = catch_unwind(AssertUnwindSafe(|| pool.run(50, &|i| assert!(i != 20))));
        assert!(caught.is_err());
        let sum = AtomicUsize::new(0);
        pool.run(10, &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }
}
