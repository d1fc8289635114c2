//! The thread that owns the network: it takes one call after the other, from whichever Python thread, and whoever waits
//! for it hears of Ctrl-C.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::mpsc::{Receiver, RecvTimeoutError, Sender, channel};
use std::time::Duration;

use pi0_model::ActionModel;
use pyo3::prelude::*;

use crate::errors::Class;

/// How long a waiting thread sleeps before it looks for signals.
const LOOK: Duration = Duration::from_millis(50);

type Job = Box<dyn FnOnce(&dyn ActionModel) + Send>;

/// A network in its own thread. The thread ends, and the network with it, when this is dropped and nothing runs.
pub struct Worker {
    jobs: Sender<Job>,
}

/// What the thread says while it loads.
pub enum Event {
    /// So many more bytes of weights are packed.
    Packed(u64),
    /// It is done.
    Loaded(anyhow::Result<()>),
}

impl Worker {
    /// Starts to load.
    ///
    /// # Errors
    /// The system has no thread left.
    pub fn start(
        load: impl FnOnce(&dyn Fn(u64)) -> anyhow::Result<Box<dyn ActionModel>> + Send + 'static,
    ) -> std::io::Result<(Self, Receiver<Event>)> {
        let (jobs, queue) = channel::<Job>();
        let (say, events) = channel();
        std::thread::Builder::new().name("pi0".into()).spawn(move || {
            // Nobody listening any more means that the caller gave up.
            let packed = |bytes| drop(say.send(Event::Packed(bytes)));
            let model = match catch_unwind(AssertUnwindSafe(|| load(&packed))) {
                Ok(Ok(model)) => model,
                Ok(Err(e)) => return drop(say.send(Event::Loaded(Err(e)))),
                Err(_) => {
                    let e = anyhow::anyhow!("internal error while loading, please report it");
                    return drop(say.send(Event::Loaded(Err(e))));
                }
            };
            drop(say.send(Event::Loaded(Ok(()))));
            for job in queue {
                job(&*model);
            }
        })?;
        Ok((Self { jobs }, events))
    }

    /// Runs `call` on the network and waits, without the GIL. A call that Ctrl-C interrupts runs to its end unheard.
    pub fn call<T: Send + 'static>(
        &self,
        py: Python<'_>,
        call: impl FnOnce(&dyn ActionModel) -> T + Send + 'static,
    ) -> PyResult<T> {
        let (reply, result) = channel();
        let job = move |model: &dyn ActionModel| {
            let done = catch_unwind(AssertUnwindSafe(|| call(model)));
            drop(reply.send(done));
        };
        let gone = || Class::Internal.raise(py, "the network's thread has ended, please report it");
        self.jobs.send(Box::new(job)).map_err(|_| gone())?;
        match wait(py, &result)? {
            Some(Ok(value)) => Ok(value),
            Some(Err(panic)) => {
                let text = panic.downcast_ref::<&str>().map(|s| (*s).to_string());
                let text = text.or_else(|| panic.downcast_ref::<String>().cloned()).unwrap_or_default();
                Err(Class::Internal.raise(py, format!("internal error, please report it: {text}")))
            }
            None => Err(gone()),
        }
    }
}

/// The next message, or none when nobody can send one any more. Waits without the GIL.
///
/// # Errors
/// Whatever a signal's handler raises: `KeyboardInterrupt`.
pub fn wait<T: Send>(py: Python<'_>, messages: &Receiver<T>) -> PyResult<Option<T>> {
    // A receiver may be moved to the thread that waits but not shared with it, and it is not: this thread waits.
    struct Here<'a, T>(&'a Receiver<T>);
    // SAFETY: `Python::detach` runs its closure on this very thread, so nothing crosses between threads.
    unsafe impl<T> Send for Here<'_, T> {}
    impl<T> Here<'_, T> {
        fn next(&self) -> Result<T, RecvTimeoutError> {
            self.0.recv_timeout(LOOK)
        }
    }
    loop {
        let here = Here(messages);
        match py.detach(move || here.next()) {
            Ok(message) => return Ok(Some(message)),
            Err(RecvTimeoutError::Timeout) => py.check_signals()?,
            Err(RecvTimeoutError::Disconnected) => return Ok(None),
        }
    }
}
