//! Reads lazily stored tensors on threads of its own: some before they are asked for, so that decompression and packing go on
//! side by side, and some piece by piece into the device's hands, which packs them at once. Bounded: what was read and not
//! yet fetched waits in little memory.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread::JoinHandle;

use pi0_device::{Buffer, Error, MakeBytes, Order, Preferred, Round, Sink};

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
    /// Its name, for messages.
    fn name(&self, index: usize) -> &str;
    /// How many chunks of it can be poured side by side.
    fn chunks(&self, index: usize) -> usize;
    /// The stream that a chunk comes from: only one chunk of a stream is read at a time, in order. Where a tensor is read as
    /// a whole, the first counts.
    fn stream(&self, index: usize, chunk: usize) -> usize;
    /// Whether it stays in memory once it is read, like the embedding table.
    fn stays(&self, index: usize) -> bool;
    /// The form that comes nearest to what a device prefers, and the order of the bytes in it.
    fn form(&self, index: usize, preferred: &Preferred) -> (Form, Order) {
        let _ = (index, preferred);
        (Form::default(), Order::Rows)
    }
    /// Reads one into memory of its size, whose contents may be anything.
    fn read(&self, index: usize, form: Form, into: Buffer) -> Result<Buffer, String>;
    /// Hands a chunk of one, whose form has `pieces`, to a sink.
    fn pour(&self, index: usize, chunk: usize, sink: &dyn Sink) -> Result<(), String>;
}

/// In which form a tensor is wanted, of those it can have.
#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Form {
    /// As it is stored, columns together, rather than in C order.
    pub columns: bool,
    /// From f32 to bf16.
    pub round: Option<Round>,
    /// It will be poured, and is not read before.
    pub pieces: bool,
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
    Pouring(Pouring),
    Waiting(Buffer, Form),
    Failed(String),
    Fetched,
}

/// A tensor on its way into a sink.
#[derive(Debug)]
struct Pouring {
    sink: Arc<dyn Sink>,
    /// Of each chunk, whether it was begun.
    begun: Vec<bool>,
    /// Chunks that are being read.
    open: usize,
    failed: Option<String>,
}

impl Pouring {
    /// Whether nothing more will be handed over.
    fn is_over(&self) -> bool {
        self.open == 0 && (self.failed.is_some() || self.begun.iter().all(|b| *b))
    }
}

/// What a thread does next.
enum Task {
    Read(usize, Form),
    Pour { index: usize, chunk: usize, sink: Arc<dyn Sink> },
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
    /// Tensors that are being poured, and bytes of those that were since somebody last asked.
    pouring: usize,
    poured: u64,
    /// The first tensor whose pouring failed, and why.
    failed: Option<(usize, String)>,
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
        let last = |i| (0..tensors.chunks(i).max(1)).map(|chunk| tensors.stream(i, chunk)).max();
        let streams = (0..n).filter_map(last).max().map_or(0, |stream| stream + 1);
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

    /// What to do next, if anything may be done now.
    fn next(&self, state: &State) -> Option<Task> {
        let free = |index, chunk| !state.busy[self.tensors.stream(index, chunk)];
        (0..state.slots.len()).find_map(|i| {
            let form = state.wanted[i]?;
            match &state.slots[i] {
                Slot::Pouring(pouring) if pouring.failed.is_none() => {
                    let chunk = (0..pouring.begun.len()).find(|&c| !pouring.begun[c] && free(i, c))?;
                    Some(Task::Pour { index: i, chunk, sink: pouring.sink.clone() })
                }
                Slot::Stored if !form.pieces && free(i, 0) => {
                    let room = state.ahead == 0 || state.ahead + self.counted(i, form) <= WAITING;
                    room.then_some(Task::Read(i, form))
                }
                _ => None,
            }
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
            state = match self.next(&state) {
                Some(task) => self.run(task, state),
                None => self.wait(state),
            };
        }
    }

    fn run<'a>(&'a self, task: Task, mut state: MutexGuard<'a, State>) -> MutexGuard<'a, State> {
        match task {
            Task::Read(i, form) => {
                let stream = self.tensors.stream(i, 0);
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
            }
            Task::Pour { index, chunk, sink } => {
                let stream = self.tensors.stream(index, chunk);
                state.busy[stream] = true;
                if let Slot::Pouring(pouring) = &mut state.slots[index] {
                    pouring.begun[chunk] = true;
                    pouring.open += 1;
                }
                drop(state);
                let pour = || self.tensors.pour(index, chunk, &*sink);
                let poured =
                    catch_unwind(AssertUnwindSafe(pour)).unwrap_or_else(|_| Err("a thread panicked".into()));
                state = self.lock();
                state.busy[stream] = false;
                self.poured(&mut state, index, poured);
            }
        }
        self.changed.notify_all();
        state
    }

    /// A chunk of tensor `index` was handed over, or could not be.
    fn poured(&self, state: &mut State, index: usize, result: Result<(), String>) {
        let bytes = self.tensors.bytes(index, Form::default()) as u64;
        let Slot::Pouring(pouring) = &mut state.slots[index] else { return };
        pouring.open -= 1;
        if let Err(what) = result {
            pouring.failed.get_or_insert(what);
        }
        if pouring.is_over() {
            let result = pouring.failed.take().map_or(Ok(()), Err);
            if let Err(what) = &result {
                state.failed.get_or_insert((index, what.clone()));
            }
            pouring.sink.end(result);
            state.slots[index] = Slot::Fetched;
            state.pouring -= 1;
            state.poured += bytes;
        }
    }

    /// Whether a tensor would be poured.
    fn pours(&self, index: usize) -> bool {
        let state = self.lock();
        state.users > 0
            && state.wanted[index].is_some_and(|form| form.pieces)
            && matches!(state.slots[index], Slot::Stored)
    }

    /// Pours a tensor when there is time.
    fn pour(&self, index: usize, sink: Arc<dyn Sink>) {
        if !self.pours(index) {
            return sink.end(Err("these bytes are made as a whole".into()));
        }
        let mut state = self.lock();
        let begun = vec![false; self.tensors.chunks(index)];
        state.slots[index] = Slot::Pouring(Pouring { sink, begun, open: 0, failed: None });
        state.pouring += 1;
        drop(state);
        self.changed.notify_all();
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
        let stream = self.tensors.stream(index, 0);
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

impl Reading {
    /// Waits until everything that is to be poured was; `progress` hears the bytes of each tensor, as they are stored.
    pub(crate) fn finish(&self, progress: &dyn Fn(u64)) -> Result<(), Error> {
        let mut state = self.ahead.lock();
        loop {
            let poured = std::mem::take(&mut state.poured);
            if poured > 0 {
                drop(state);
                progress(poured);
                state = self.ahead.lock();
                continue;
            }
            if state.pouring == 0 {
                break;
            }
            // Where no thread could be started, this one does it.
            state = match self.ahead.next(&state).filter(|_| self.threads.is_empty()) {
                Some(task) => self.ahead.run(task, state),
                None => self.ahead.wait(state),
            };
        }
        match state.failed.take() {
            Some((index, what)) => Err(Error::Source { name: self.ahead.tensors.name(index).into(), what }),
            None => Ok(()),
        }
    }
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
                if let Slot::Pouring(pouring) = slot {
                    pouring.sink.end(Err("loading was given up".into()));
                }
                if matches!(slot, Slot::Waiting(..) | Slot::Reading | Slot::Pouring(_)) {
                    *slot = Slot::Stored;
                }
            }
            state.busy.fill(false);
            (state.ahead, state.pouring, state.poured, state.failed) = (0, 0, 0, None);
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

    fn pours(&self) -> bool {
        self.form.pieces && self.ahead.pours(self.index)
    }

    fn pour(&self, sink: Arc<dyn Sink>) {
        self.ahead.pour(self.index, sink);
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
        fn name(&self, _: usize) -> &str {
            "number"
        }
        fn chunks(&self, _: usize) -> usize {
            2
        }
        fn stream(&self, index: usize, chunk: usize) -> usize {
            index % 3 + 3 * chunk
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
        fn pour(&self, index: usize, chunk: usize, sink: &dyn Sink) -> Result<(), String> {
            if index == self.bad && chunk == 1 {
                return Err("gone".into());
            }
            assert!(index != self.bad + 1, "as asked");
            sink.take(chunk, &[index as u8]);
            Ok(())
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
        fn name(&self, index: usize) -> &str {
            (**self).name(index)
        }
        fn chunks(&self, index: usize) -> usize {
            (**self).chunks(index)
        }
        fn stream(&self, index: usize, chunk: usize) -> usize {
            (**self).stream(index, chunk)
        }
        fn pour(&self, index: usize, chunk: usize, sink: &dyn Sink) -> Result<(), String> {
            (**self).pour(index, chunk, sink)
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

    /// Counts pieces, and keeps how it ended.
    #[derive(Debug, Default)]
    struct Count(Mutex<(usize, Vec<Result<(), String>>)>);

    impl Sink for Count {
        fn unit(&self) -> usize {
            1
        }
        fn take(&self, _: usize, _: &[u8]) {
            self.0.lock().unwrap().0 += 1;
        }
        fn end(&self, result: Result<(), String>) {
            self.0.lock().unwrap().1.push(result);
        }
    }

    #[test]
    fn what_is_poured_comes_once_and_failures_are_told() {
        let pieces = Form { pieces: true, ..Form::default() };
        let ahead = ahead(&numbers(20, 2 << 20));
        let reading = ahead.start(vec![Some(pieces); 60]);
        let sinks: Vec<_> = (0..60).map(|_| Arc::new(Count::default())).collect();
        let tensor = |index| Tensor { ahead: ahead.clone(), index, form: pieces };
        for (i, sink) in sinks.iter().enumerate() {
            assert!(tensor(i).pours());
            tensor(i).pour(sink.clone());
            assert!(!tensor(i).pours(), "once");
        }
        let told = Mutex::new(0);
        let e = reading.finish(&|bytes| *told.lock().unwrap() += bytes).unwrap_err().to_string();
        assert!(e.contains("number"), "{e}");
        assert_eq!(*told.lock().unwrap(), 60 * (2 << 20));
        for (i, sink) in sinks.iter().enumerate() {
            let state = sink.0.lock().unwrap();
            let failed = i == 20 || i == 21;
            assert_eq!(state.1.len(), 1, "{i} ends once");
            assert_eq!((state.1[0].is_err(), failed || state.0 == 2), (failed, true), "{i}");
        }
        drop(reading);
        // Without threads nothing is poured, and nobody waits.
        assert!(!tensor(3).pours());
        let sink = Arc::new(Count::default());
        tensor(3).pour(sink.clone());
        assert!(sink.0.lock().unwrap().1[0].is_err());
        // Given up, everything ends.
        let reading = ahead.start(vec![Some(pieces); 60]);
        let sinks: Vec<_> = (0..60).map(|_| Arc::new(Count::default())).collect();
        sinks
            .iter()
            .enumerate()
            .filter(|(i, _)| tensor(*i).pours())
            .for_each(|(i, s)| tensor(i).pour(s.clone()));
        drop(reading);
        assert!(sinks.iter().all(|sink| sink.0.lock().unwrap().1.len() <= 1));
        assert_eq!(ahead.lock().pouring, 0);
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
        let half = Form { round: Some(|_, _| {}), ..Form::default() };
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
