//! The thread pool: workers that wait a moment for the next operation before they sleep, because operations
//! follow each other within microseconds.
//!
//! Robots' computers run other programs, too, and any thread may lose its core for milliseconds. So tasks are small and
//! each thread takes the next one when it has time; an operation is over when its tasks are, whichever threads ran them, and
//! waits for no thread that took none.

use std::any::Any;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind, resume_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

/// How long a worker watches for work before it sleeps.
const WATCH: Duration = Duration::from_micros(100);

/// How long the calling thread watches for the end of the others' last tasks before it sleeps: then the system can give
/// its core to one of them that lost its own.
const PATIENCE: Duration = Duration::from_micros(50);

/// Runs the tasks of one operation on all threads; the calling thread is one of them.
pub(crate) struct Threads {
    state: Arc<State>,
    workers: Vec<JoinHandle<()>>,
    /// One operation at a time.
    gate: Mutex<()>,
}

type Task<'a> = dyn Fn(usize) + Sync + 'a;

struct State {
    /// The number of the operation in the upper half, a change of which announces work, and the next task to claim in
    /// the lower: a claim for an operation that is over fails.
    next: AtomicU64,
    job: Mutex<Option<Job>>,
    /// Tasks of the operation that have ended.
    done: AtomicUsize,
    sleep: Mutex<()>,
    /// Workers that sleep, until there is work.
    sleepers: AtomicUsize,
    wake: Condvar,
    /// Whether the caller sleeps, until all tasks have ended.
    waiting: AtomicBool,
    ended: Condvar,
    stop: AtomicBool,
    /// What the first task that panicked had to say.
    panic: Mutex<Option<Box<dyn Any + Send>>>,
}

#[derive(Clone, Copy)]
struct Job {
    operation: u32,
    /// Alive as long as a task of the operation is left to claim or has not ended.
    task: *const Task<'static>,
    count: u32,
}

// SAFETY: the task is `Sync`, so any thread may call it; when it may be called, its field says.
unsafe impl Send for Job {}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    // Nothing is left half done where a panic could poison a lock.
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Threads {
    /// A pool of `count` threads in all, the caller included.
    pub(crate) fn new(count: usize) -> std::io::Result<Self> {
        let state = Arc::new(State {
            next: AtomicU64::new(0),
            job: Mutex::new(None),
            done: AtomicUsize::new(0),
            sleep: Mutex::new(()),
            sleepers: AtomicUsize::new(0),
            wake: Condvar::new(),
            waiting: AtomicBool::new(false),
            ended: Condvar::new(),
            stop: AtomicBool::new(false),
            panic: Mutex::new(None),
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
    ///
    /// # Panics
    /// If a task does, after all others have run.
    pub(crate) fn run(&self, count: usize, task: &Task<'_>) {
        if self.workers.is_empty() || count <= 1 {
            (0..count).for_each(task);
            return;
        }
        let _one = lock(&self.gate);
        let state = &*self.state;
        let count = u32::try_from(count).expect("fewer tasks than 2^32");
        let operation = ((state.next.load(Ordering::Relaxed) >> 32) as u32).wrapping_add(1);
        // Only the lifetime changes, and only in name: see `Job`.
        let task = std::ptr::from_ref(task);
        // SAFETY: pointers to the same trait object, but for its lifetime.
        let task = unsafe { std::mem::transmute::<*const Task<'_>, *const Task<'static>>(task) };
        let job = Job { operation, task, count };
        state.done.store(0, Ordering::Relaxed);
        *lock(&state.job) = Some(job);
        state.announce(operation);
        state.take_part(job);
        state.await_end(count as usize);
        *lock(&state.job) = None;
        let panic = lock(&state.panic).take();
        if let Some(panic) = panic {
            resume_unwind(panic);
        }
    }

    /// Splits `0..total` into runs of at least `grain` and calls `task` with each.
    pub(crate) fn split(&self, total: usize, grain: usize, task: impl Fn(Range<usize>) + Sync) {
        let most = if self.workers.is_empty() { 1 } else { self.count() * 4 };
        let pieces = (total / grain.max(1)).clamp(1, most);
        self.run(pieces, &|i| task(share(total, i, pieces)));
    }
}

/// Part `i` of `0..count` in `of` parts as even as can be.
pub(crate) fn share(count: usize, i: usize, of: usize) -> Range<usize> {
    count * i / of..count * (i + 1) / of
}

impl Drop for Threads {
    fn drop(&mut self) {
        self.state.stop.store(true, Ordering::SeqCst);
        let operation = (self.state.next.load(Ordering::Relaxed) >> 32) as u32;
        self.state.announce(operation.wrapping_add(1));
        for worker in self.workers.drain(..) {
            // A worker catches every panic of a task, so joining cannot fail.
            let _ = worker.join();
        }
    }
}

impl State {
    fn announce(&self, operation: u32) {
        self.next.store(u64::from(operation) << 32, Ordering::SeqCst);
        if self.sleepers.load(Ordering::SeqCst) > 0 {
            let _held = lock(&self.sleep);
            self.wake.notify_all();
        }
    }

    /// The next task of an operation, if one is left.
    fn claim(&self, job: Job) -> Option<usize> {
        let mine = |next: u64| (next >> 32) as u32 == job.operation && (next as u32) < job.count;
        let claim = |next| mine(next).then_some(next + 1);
        let before = self.next.fetch_update(Ordering::AcqRel, Ordering::Acquire, claim);
        before.ok().map(|next| next as u32 as usize)
    }

    /// Runs tasks of an operation as long as some are left.
    fn take_part(&self, job: Job) {
        while let Some(i) = self.claim(job) {
            // SAFETY: task `i` is claimed and has not ended, and `run` returns only when all have.
            let task = unsafe { &*job.task };
            if let Err(panic) = catch_unwind(AssertUnwindSafe(|| task(i))) {
                lock(&self.panic).get_or_insert(panic);
            }
            let done = self.done.fetch_add(1, Ordering::SeqCst) + 1;
            if done == job.count as usize && self.waiting.load(Ordering::SeqCst) {
                let _held = lock(&self.sleep);
                self.ended.notify_all();
            }
        }
    }

    /// Waits until `count` tasks have ended.
    fn await_end(&self, count: usize) {
        let ended = || self.done.load(Ordering::SeqCst) == count;
        if watch(PATIENCE, ended) {
            return;
        }
        let mut held = lock(&self.sleep);
        self.waiting.store(true, Ordering::SeqCst);
        while !ended() {
            held = self.ended.wait(held).unwrap_or_else(PoisonError::into_inner);
        }
        self.waiting.store(false, Ordering::SeqCst);
    }

    fn work(&self) {
        let mut seen = 0;
        loop {
            seen = self.await_change(seen);
            if self.stop.load(Ordering::SeqCst) {
                return;
            }
            // Over already, if it was a short one.
            let job = *lock(&self.job);
            if let Some(job) = job {
                seen = job.operation;
                self.take_part(job);
            }
        }
    }

    /// Waits until the operation is another than `seen`, and says which.
    fn await_change(&self, seen: u32) -> u32 {
        let now = || (self.next.load(Ordering::SeqCst) >> 32) as u32;
        if !watch(WATCH, || now() != seen) {
            let mut held = lock(&self.sleep);
            self.sleepers.fetch_add(1, Ordering::SeqCst);
            while now() == seen {
                held = self.wake.wait(held).unwrap_or_else(PoisonError::into_inner);
            }
            self.sleepers.fetch_sub(1, Ordering::SeqCst);
        }
        now()
    }
}

/// Looks for `what` for a while, without sleeping; whether it came.
fn watch(length: Duration, what: impl Fn() -> bool) -> bool {
    let start = Instant::now();
    loop {
        for _ in 0..64 {
            if what() {
                return true;
            }
            std::hint::spin_loop();
        }
        if start.elapsed() >= length {
            return false;
        }
    }
}

/// The number of physical cores that this process may use, as far as the system tells: those of its affinity mask, of
/// whatever kind, each once, and no more than its control group grants the time of.
pub(crate) fn physical_cores() -> usize {
    let logical = std::thread::available_parallelism().map_or(1, |n| n.get());
    let siblings = |cpu: &usize| {
        let path = format!("/sys/devices/system/cpu/cpu{cpu}/topology/thread_siblings_list");
        std::fs::read_to_string(path).ok()
    };
    let cores: Option<std::collections::HashSet<String>> = allowed().iter().map(siblings).collect();
    cores.filter(|cores| !cores.is_empty()).map_or(logical, |cores| cores.len().min(logical))
}

/// The logical processors that this thread may run on; none where the system does not tell.
pub(crate) fn allowed() -> Vec<usize> {
    #[cfg(target_os = "linux")]
    {
        // SAFETY: all zeros is an empty set.
        let mut set: libc::cpu_set_t = unsafe { std::mem::zeroed() };
        // SAFETY: the set is as large as said; 0 is the calling thread.
        let told = unsafe { libc::sched_getaffinity(0, size_of::<libc::cpu_set_t>(), &mut set) } == 0;
        let is_in = |&cpu: &usize| {
            // SAFETY: below `CPU_SETSIZE`.
            told && unsafe { libc::CPU_ISSET(cpu, &set) }
        };
        (0..libc::CPU_SETSIZE as usize).filter(is_in).collect()
    }
    #[cfg(not(target_os = "linux"))]
    Vec::new()
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
    fn an_operation_waits_for_no_thread_that_has_no_task() {
        let pool = Threads::new(3).unwrap();
        let start = Instant::now();
        // One thread keeps another operation's worth of time; the other tasks must not wait for it, and it must be waited
        // for.
        let slow = AtomicUsize::new(0);
        pool.run(20, &|i| {
            if i == 0 {
                std::thread::sleep(Duration::from_millis(50));
            }
            slow.fetch_add(1, Ordering::SeqCst);
        });
        assert_eq!(slow.into_inner(), 20);
        assert!(start.elapsed() >= Duration::from_millis(50));
        // Many short operations, of which sleeping workers miss some.
        let sum = AtomicUsize::new(0);
        for round in 0..2000 {
            if round % 500 == 0 {
                std::thread::sleep(2 * WATCH);
            }
            pool.run(2, &|i| {
                sum.fetch_add(i + 1, Ordering::Relaxed);
            });
        }
        assert_eq!(sum.into_inner(), 6000);
    }

    #[test]
    fn cores_are_those_that_the_process_may_use() {
        let cores = physical_cores();
        assert!(cores >= 1 && cores <= std::thread::available_parallelism().unwrap().get());
    }

    #[test]
    fn a_panic_reaches_the_caller_and_the_pool_survives() {
        let pool = Threads::new(3).unwrap();
        let caught = catch_unwind(AssertUnwindSafe(|| pool.run(50, &|i| assert!(i != 20, "task {i}"))));
        let message = caught.unwrap_err().downcast::<String>().unwrap();
        assert_eq!(*message, "task 20");
        let sum = AtomicUsize::new(0);
        pool.run(10, &|i| {
            sum.fetch_add(i, Ordering::Relaxed);
        });
        assert_eq!(sum.into_inner(), 45);
    }
}
