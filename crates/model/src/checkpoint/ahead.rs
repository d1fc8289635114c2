//! Reads lazily stored tensors before they are asked for, on threads of its own, so that decompression and packing go
//! on side by side. Bounded: what was read and not yet fetched waits in little memory.

use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use pi0_device::{Buffer, MakeBytes, Order, Preferred, Round};

/// Bytes that wait to be fetched, of all tensors but those that stay in memory anyway.
const WAITING: usize = 300 << 20;
/// Bytes of memory that nobody uses and that is kept for the next tensors.
const KEPT: usize = 160 << 20;
/// Memory below this size is not worth keeping.
const SMALL: usize = 1 << 20;
/// More threads than this do not help: one reads about a gigabyte a second.
const MOST_THREADS: usize = 8;

/// Tensors in the order in which a model loads them.
pub(super) trait Tensors: Send + Sync + std::fmt::Debug {
    /// How many there are.
    fn count(&self) -> usize;
    /// Bytes of one in this form.
    fn bytes(&self, index: usize, form: Form) -> usize;
    /// The stream that it comes from: only one tensor of a stream is read at a time, in order.
    fn stream(&self, index: usize) -> usize;
    /// Whether it stays in memory once it is read, like the embedding table.
    fn stays(&self, index: usize) -> bool;
    /// The form that comes nearest to what a device prefers, and the order of the bytes in it.
    fn form(&self, index: usize, preferred: &Preferred) -> (Form, Order) {
        let _ = (index, preferred);
        (Form::default(), Order::Rows)
    }
    /// Reads one into memory of its size, whose contents may be anything.
    fn read(&self, index: usize, form: Form, into: Buffer) -> Result<Buffer, String>;
}

/// In which form a tensor is wanted, of those it can have.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Form {
    /// As it is stored, columns together, rather than in C order.
    pub columns: bool,
    /// From f32 to bf16.
    pub round: Option<Round>,
}

impl Form {
    /// Whether bytes of one form are bytes of the other.
    fn fits(self, other: Self) -> bool {
        (self.columns, self.round.is_some()) == (other.columns, other.round.is_some())
    }
}

/// Where a tensor is.
#[derive(Debug)]
enum Slot {
    Stored,
    Reading,
    Waiting(Buffer, Form),
    Failed(String),
    Fetched,
}

#[derive(Debug, Default)]
struct State {
    slots: Vec<Slot>,
    /// Of each tensor that will be asked for, in which form.
    wanted: Vec<Option<Form>>,
    /// Streams that a thread reads.
    busy: Vec<bool>,
    /// Bytes that are waiting or being read ahead.
    ahead: usize,
    /// Users that want tensors read ahead.
    users: usize,
    /// Memory that was given back.
    kept: Vec<Buffer>,
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
            wanted: vec![Some(Form::default()); n],
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
    pub fn tensor(self: &Arc<Self>, index: usize, form: Form) -> Arc<dyn MakeBytes> {
        Arc::new(Tensor { ahead: self.clone(), index, form })
    }

    /// The tensors themselves.
    pub fn tensors(&self) -> &dyn Tensors {
        &*self.tensors
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    fn wait<'a>(&'a self, state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        self.changed.wait(state).unwrap_or_else(PoisonError::into_inner)
    }

    /// Reads ahead until the result is dropped, all that `wanted` says of the tensors' numbers.
    pub fn start(self: &Arc<Self>, wanted: Vec<Option<Form>>) -> Reading {
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

    /// The next tensor to read and its form, if one may be read now.
    fn next(&self, state: &State) -> Option<(usize, Form)> {
        (0..state.slots.len()).find_map(|i| {
            let form = state.wanted[i]?;
            let room = state.ahead == 0 || state.ahead + self.counted(i, form) <= WAITING;
            let free = matches!(state.slots[i], Slot::Stored) && !state.busy[self.tensors.stream(i)];
            (free && room).then_some((i, form))
        })
    }

    /// What a tensor that waits takes of the room for those.
    fn counted(&self, index: usize, form: Form) -> usize {
        if self.tensors.stays(index) { 0 } else { self.tensors.bytes(index, form) }
    }

    /// One thread's work.
    fn work(&self) {
        let mut state = self.lock();
        while state.users > 0 {
            let Some((i, form)) = self.next(&state) else {
                state = self.wait(state);
                continue;
            };
            let stream = self.tensors.stream(i);
            state.slots[i] = Slot::Reading;
            state.busy[stream] = true;
            state.ahead += self.counted(i, form);
            drop(state);
            let read = self.read(i, form);
            state = self.lock();
            state.busy[stream] = false;
            state.slots[i] = match read {
                Ok(buffer) => Slot::Waiting(buffer, form),
                Err(what) => Slot::Failed(what),
            };
            self.changed.notify_all();
        }
    }

    /// Memory of `count` bytes: some that was given back, if it is not much too large.
    fn buffer(&self, count: usize) -> Option<Buffer> {
        if count >= SMALL {
            let kept = &mut self.lock().kept;
            let fits = |b: &Buffer| (count..=count.saturating_mul(2)).contains(&b.capacity());
            let best = (0..kept.len()).filter(|&i| fits(&kept[i])).min_by_key(|&i| kept[i].capacity());
            if let Some(i) = best {
                return Some(kept.swap_remove(i).with_count(count));
            }
        }
        Buffer::zeroed(count)
    }

    fn read(&self, index: usize, form: Form) -> Result<Buffer, String> {
        let count = self.tensors.bytes(index, form);
        let buffer = self.buffer(count).ok_or_else(|| format!("{count} bytes do not fit into memory"))?;
        self.tensors.read(index, form, buffer)
    }

    /// Keeps memory for the next tensors, as long as anybody reads ahead.
    fn take_back(&self, buffer: Buffer) {
        if buffer.capacity() < SMALL {
            return;
        }
        let mut state = self.lock();
        let kept: usize = state.kept.iter().map(Buffer::capacity).sum();
        if state.users > 0 && kept + buffer.capacity() <= KEPT {
            state.kept.push(buffer);
        } else {
            // Freeing takes a while and holds nobody up.
            drop(state);
            drop(buffer);
        }
    }

    fn fetch(&self, index: usize, form: Form) -> Result<Buffer, String> {
        let stream = self.tensors.stream(index);
        let mut state = self.lock();
        loop {
            let busy = state.busy[stream];
            match &mut state.slots[index] {
                Slot::Waiting(buffer, as_read) => {
                    let (buffer, as_read) = (std::mem::take(buffer), *as_read);
                    state.slots[index] = Slot::Fetched;
                    state.ahead -= self.counted(index, as_read);
                    self.changed.notify_all();
                    if as_read.fits(form) {
                        return Ok(buffer);
                    }
                }
                Slot::Failed(what) => return Err(what.clone()),
                Slot::Stored | Slot::Fetched if !busy => break,
                _ => state = self.wait(state),
            }
        }
        state.busy[stream] = true;
        state.slots[index] = Slot::Fetched;
        drop(state);
        let read = self.read(index, form);
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
                if matches!(slot, Slot::Waiting(..) | Slot::Reading) {
                    *slot = Slot::Stored;
                }
            }
            state.busy.fill(false);
            state.ahead = 0;
            state.kept.clear();
        }
    }
}

#[derive(Debug)]
struct Tensor {
    ahead: Arc<Ahead>,
    index: usize,
    form: Form,
}

impl MakeBytes for Tensor {
    fn count(&self) -> usize {
        self.ahead.tensors.bytes(self.index, self.form)
    }

    fn make(&self) -> Result<Buffer, String> {
        self.ahead.fetch(self.index, self.form)
    }

    fn take_back(&self, buffer: Buffer) {
        self.ahead.take_back(buffer);
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
        size: usize,
        reads: AtomicUsize,
        fresh: AtomicUsize,
    }

    impl Tensors for Numbers {
        fn count(&self) -> usize {
            60
        }
        fn bytes(&self, _: usize, form: Form) -> usize {
            if form.round.is_some() { self.size / 2 } else { self.size }
        }
        fn stream(&self, index: usize) -> usize {
            index % 3
        }
        fn stays(&self, index: usize) -> bool {
            index == 7
        }
        fn read(&self, index: usize, form: Form, mut into: Buffer) -> Result<Buffer, String> {
            assert_eq!(into.len(), self.bytes(index, form));
            self.reads.fetch_add(1, Ordering::Relaxed);
            self.fresh.fetch_add(usize::from(into[1] == 0), Ordering::Relaxed);
            if index == self.bad {
                return Err("gone".into());
            }
            (into[0], into[1]) = (index as u8, 1);
            Ok(into)
        }
    }

    fn numbers(bad: usize, size: usize) -> Arc<Numbers> {
        Arc::new(Numbers { bad, size, reads: AtomicUsize::new(0), fresh: AtomicUsize::new(0) })
    }

    impl Tensors for Arc<Numbers> {
        fn count(&self) -> usize {
            (**self).count()
        }
        fn bytes(&self, index: usize, form: Form) -> usize {
            (**self).bytes(index, form)
        }
        fn stream(&self, index: usize) -> usize {
            (**self).stream(index)
        }
        fn stays(&self, index: usize) -> bool {
            (**self).stays(index)
        }
        fn read(&self, index: usize, form: Form, into: Buffer) -> Result<Buffer, String> {
            (**self).read(index, form, into)
        }
    }

    /// Three of them fill the room; only their first pages are ever touched.
    const LARGE: usize = WAITING / 3;

    fn ahead(numbers: &Arc<Numbers>) -> Arc<Ahead> {
        Ahead::new(Box::new(numbers.clone()))
    }

    #[test]
    fn every_tensor_comes_once_in_any_order() {
        for order in
            [(0..60).collect::<Vec<_>>(), (0..60).rev().collect(), (0..60).map(|i| i * 7 % 60).collect()]
        {
            let ahead = ahead(&numbers(100, LARGE));
            let reading = ahead.start(vec![Some(Form::default()); 60]);
            for i in order {
                assert_eq!(ahead.fetch(i, Form::default()).unwrap()[0], i as u8);
            }
            drop(reading);
            // Without threads, and again.
            assert_eq!(ahead.fetch(5, Form::default()).unwrap()[0], 5);
        }
    }

    #[test]
    fn what_is_not_wanted_is_not_read_and_failures_reach_who_asks() {
        let ahead = ahead(&numbers(4, LARGE));
        let reading = ahead.start((0..60).map(|i| (i < 6).then(Form::default)).collect());
        for i in [0, 1, 2, 3, 5] {
            assert_eq!(ahead.fetch(i, Form::default()).unwrap()[0], i as u8);
        }
        assert_eq!(ahead.fetch(4, Form::default()).unwrap_err(), "gone");
        drop(reading);
        let state = ahead.lock();
        assert!(state.slots[6..].iter().all(|s| matches!(s, Slot::Stored)));
        assert_eq!((state.ahead, state.users), (0, 0));
    }

    #[test]
    fn leaving_early_leaves_nothing_behind() {
        let ahead = ahead(&numbers(100, LARGE));
        drop(ahead.start(vec![Some(Form::default()); 60]));
        let state = ahead.lock();
        assert!(state.slots.iter().all(|s| matches!(s, Slot::Stored)) && state.kept.is_empty());
    }

    #[test]
    fn memory_is_used_again() {
        let numbers = numbers(100, 2 << 20);
        let ahead = ahead(&numbers);
        let reading = ahead.start((0..60).map(|i| (i < 12).then(Form::default)).collect());
        for i in 0..60 {
            let tensor = Tensor { ahead: ahead.clone(), index: i, form: Form::default() };
            tensor.take_back(tensor.make().unwrap());
        }
        drop(reading);
        let [reads, fresh] = [&numbers.reads, &numbers.fresh].map(|n| n.load(Ordering::Relaxed));
        assert!(reads == 60 && fresh <= 13, "{fresh} of {reads} in new memory");
        assert!(ahead.lock().kept.is_empty());
    }

    #[test]
    fn another_form_than_was_read_ahead_is_read_anew() {
        let half = Form { round: Some(|_, _| {}), columns: false };
        let numbers = numbers(100, 2 << 20);
        let ahead = ahead(&numbers);
        let reading = ahead.start(vec![Some(Form::default()); 60]);
        for i in 0..60 {
            let buffer = ahead.fetch(i, half).unwrap();
            assert_eq!((buffer[0], buffer.len()), (i as u8, 1 << 20));
        }
        drop(reading);
        assert_eq!(ahead.lock().ahead, 0);
    }
}
