//! Reads lazily stored tensors before they are asked for, on threads of its own, so that decompression and packing go
//! on side by side. Bounded: what was read and not yet fetched waits in little memory.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use pi0_device::MakeBytes;

/// Bytes that wait to be fetched, of all tensors but those that stay in memory anyway.
const WAITING: usize = 300 << 20;
/// More threads than this do not help: one reads about a gigabyte a second.
const MOST_THREADS: usize = 8;

/// Tensors in the order in which a model loads them.
pub(super) trait Tensors: Send + Sync + std::fmt::Debug {
    /// How many there are.
    fn count(&self) -> usize;
    /// Bytes of one.
    fn bytes(&self, index: usize) -> usize;
    /// The stream that it comes from: only one tensor of a stream is read at a time, in order.
    fn stream(&self, index: usize) -> usize;
    /// Whether it stays in memory once it is read, like the embedding table.
    fn stays(&self, index: usize) -> bool;
    /// Reads one.
    fn read(&self, index: usize) -> Result<Vec<u8>, String>;
}

/// Where a tensor is.
#[derive(Debug)]
enum Slot {
    Stored,
    Reading,
    Waiting(Vec<u8>),
    Failed(String),
    Fetched,
}

#[derive(Debug, Default)]
struct State {
    slots: Vec<Slot>,
    /// Of each tensor, whether it will be asked for.
    wanted: Vec<bool>,
    /// Streams that a thread reads.
    busy: Vec<bool>,
    /// Bytes that are waiting or being read ahead.
    ahead: usize,
    /// Users that want tensors read ahead.
    users: usize,
}

/// The tensors of a checkpoint and the threads that read them ahead.
#[derive(Debug)]
pub(super) struct Ahead {
    tensors: Box<dyn Tensors>,
    state: Mutex<State>,
    changed: Condvar,
}

impl Ahead {
    pub fn new(tensors: Box<dyn Tensors>) -> Arc<Self> {
        let n = tensors.count();
        let streams = (0..n).map(|i| tensors.stream(i) + 1).max().unwrap_or(0);
        let state = State {
            slots: (0..n).map(|_| Slot::Stored).collect(),
            wanted: vec![true; n],
            busy: vec![false; streams],
            ..State::default()
        };
        Arc::new(Self { tensors, state: Mutex::new(state), changed: Condvar::new() })
    }

    /// Number of tensors.
    pub fn count(&self) -> usize {
        self.tensors.count()
    }

    /// A tensor, as devices read it.
    pub fn tensor(self: &Arc<Self>, index: usize) -> Arc<dyn MakeBytes> {
        Arc::new(Tensor { ahead: self.clone(), index })
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&'a self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads ahead until the result is dropped, all that `wanted` says of the tensors' numbers.
    pub fn start(self: &Arc<Self>, wanted: Vec<bool>) -> Reading {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(MOST_THREADS);
        {
            let mut state = self.lock();
            state.users += 1;
            state.wanted = wanted;
        }
        let work = || {
            let ahead = self.clone();
            let builder = std::thread::Builder::new().name("pi0-read".into());
            builder.spawn(move || ahead.work()).ok()
        };
        Reading { ahead: self.clone(), threads: (0..threads).filter_map(|_| work()).collect() }
    }

    /// The next tensor to read, if one may be read now.
    fn next(&self, state: &State) -> Option<usize> {
        (0..state.slots.len()).find(|&i| {
            let room =
                self.tensors.stays(i) || state.ahead == 0 || state.ahead + self.tensors.bytes(i) <= WAITING;
            matches!(state.slots[i], Slot::Stored)
                && state.wanted[i]
                && !state.busy[self.tensors.stream(i)]
                && room
        })
    }

    fn counted(&self, index: usize) -> usize {
        if self.tensors.stays(index) { 0 } else { self.tensors.bytes(index) }
    }

    /// One thread's work.
    fn work(&self) {
        let mut state = self.lock();
        while state.users > 0 {
            let Some(i) = self.next(&state) else {
                state = self.wait(state);
                continue;
            };
            let stream = self.tensors.stream(i);
            state.slots[i] = Slot::Reading;
            state.busy[stream] = true;
            state.ahead += self.counted(i);
            drop(state);
            let read = self.tensors.read(i);
            state = self.lock();
            state.busy[stream] = false;
            state.slots[i] = match read {
                Ok(bytes) => Slot::Waiting(bytes),
                Err(what) => Slot::Failed(what),
            };
            self.changed.notify_all();
        }
    }

    fn fetch(&self, index: usize) -> Result<Vec<u8>, String> {
        let stream = self.tensors.stream(index);
        let mut state = self.lock();
        loop {
            let busy = state.busy[stream];
            match &mut state.slots[index] {
                Slot::Waiting(bytes) => {
                    let bytes = std::mem::take(bytes);
                    state.slots[index] = Slot::Fetched;
                    state.ahead -= self.counted(index);
                    self.changed.notify_all();
                    return Ok(bytes);
                }
                Slot::Failed(what) => return Err(what.clone()),
                Slot::Stored | Slot::Fetched if !busy => break,
                _ => state = self.wait(state),
            }
        }
        state.busy[stream] = true;
        state.slots[index] = Slot::Fetched;
        drop(state);
        let read = self.tensors.read(index);
        self.lock().busy[stream] = false;
        self.changed.notify_all();
        read
    }
}

/// Reads ahead as long as it lives.
pub(crate) struct Reading {
    ahead: Arc<Ahead>,
    threads: Vec<JoinHandle<()>>,
}

impl Drop for Reading {
    fn drop(&mut self) {
        self.ahead.lock().users -= 1;
        self.ahead.changed.notify_all();
        for thread in self.threads.drain(..) {
            // A thread that panicked has said so itself; whoever wanted its tensor reads it anew.
            let _ = thread.join();
        }
        // What nobody fetched would lie there for as long as the model.
        let mut state = self.ahead.lock();
        if state.users == 0 {
            for slot in &mut state.slots {
                if matches!(slot, Slot::Waiting(_) | Slot::Reading) {
                    *slot = Slot::Stored;
                }
            }
            state.busy.fill(false);
            state.ahead = 0;
        }
    }
}

#[derive(Debug)]
struct Tensor {
    ahead: Arc<Ahead>,
    index: usize,
}

impl MakeBytes for Tensor {
    fn count(&self) -> usize {
        self.ahead.tensors.bytes(self.index)
    }

    fn make(&self) -> Result<Vec<u8>, String> {
        self.ahead.fetch(self.index)
    }
}

#[cfg(test)]
mod tests {
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    /// Tensors of three streams; the one numbered `bad` cannot be read.
    #[derive(Debug)]
    struct Numbers {
        bad: usize,
        reads: AtomicUsize,
    }

    impl Tensors for Numbers {
        fn count(&self) -> usize {
            60
        }
        fn bytes(&self, _: usize) -> usize {
            // Three of them fill the room.
            WAITING / 3
        }
        fn stream(&self, index: usize) -> usize {
            index % 3
        }
        fn stays(&self, index: usize) -> bool {
            index == 7
        }
        fn read(&self, index: usize) -> Result<Vec<u8>, String> {
            self.reads.fetch_add(1, Ordering::Relaxed);
            if index == self.bad { Err("gone".into()) } else { Ok(vec![index as u8]) }
        }
    }

    fn numbers(bad: usize) -> Arc<Ahead> {
        Ahead::new(Box::new(Numbers { bad, reads: AtomicUsize::new(0) }))
    }

    #[test]
    fn every_tensor_comes_once_in_any_order() {
        for order in
            [(0..60).collect::<Vec<_>>(), (0..60).rev().collect(), (0..60).map(|i| i * 7 % 60).collect()]
        {
            let ahead = numbers(100);
            let reading = ahead.start(vec![true; 60]);
            for i in order {
                assert_eq!(ahead.fetch(i).unwrap(), [i as u8]);
            }
            drop(reading);
            // Without threads, and again.
            assert_eq!(ahead.fetch(5).unwrap(), [5]);
        }
    }

    #[test]
    fn what_is_not_wanted_is_not_read_and_failures_reach_who_asks() {
        let ahead = numbers(4);
        let reading = ahead.start((0..60).map(|i| i < 6).collect());
        for i in [0, 1, 2, 3, 5] {
            assert_eq!(ahead.fetch(i).unwrap(), [i as u8]);
        }
        assert_eq!(ahead.fetch(4).unwrap_err(), "gone");
        drop(reading);
        let state = ahead.lock();
        assert!(state.slots[6..].iter().all(|s| matches!(s, Slot::Stored)));
        assert_eq!((state.ahead, state.users), (0, 0));
    }

    #[test]
    fn leaving_early_leaves_nothing_behind() {
        let ahead = numbers(100);
        drop(ahead.start(vec![true; 60]));
        assert!(ahead.lock().slots.iter().all(|s| matches!(s, Slot::Stored)));
    }
}
