//! Requests that wait for the network: bounded, first come first served.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use pi0_device::HostTensor;
use pi0_model::Inputs;
use tokio::sync::oneshot;

use crate::Failure;

/// A request on its way to the network.
pub(crate) struct Job {
    pub inputs: Inputs,
    /// After this nobody wants the result.
    pub deadline: Instant,
    /// Closed when the client has gone.
    pub reply: oneshot::Sender<Result<Done, Failure>>,
}

/// What the network made of a job.
#[derive(Debug)]
pub(crate) struct Done {
    /// `[horizon, action_dim]`, normalized.
    pub actions: HostTensor,
    /// When the network began and ended.
    pub started: Instant,
    pub ended: Instant,
    /// Of the noise; means nothing if the job brought its own.
    pub seed: u64,
}

impl Job {
    fn wanted(&self, now: Instant) -> bool {
        !self.reply.is_closed() && now < self.deadline
    }
}

#[derive(Default)]
struct State {
    jobs: VecDeque<Job>,
    closed: bool,
}

pub(crate) struct Queue {
    state: Mutex<State>,
    filled: Condvar,
    limit: usize,
}

impl Queue {
    pub fn new(limit: usize) -> Self {
        Self { state: Mutex::default(), filled: Condvar::new(), limit }
    }

    /// A panic elsewhere leaves the queue as valid as it was: every change of it is a single step.
    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a job at the end. Jobs that nobody wants any more make room first.
    pub fn push(&self, job: Job) -> Result<(), Failure> {
        let mut state = self.lock();
        if state.closed {
            return Err(Failure::ShuttingDown);
        }
        if state.jobs.len() >= self.limit {
            let now = Instant::now();
            state.jobs.retain(|job| job.wanted(now));
        }
        if state.jobs.len() >= self.limit {
            return Err(Failure::Busy { waiting: state.jobs.len() });
        }
        state.jobs.push_back(job);
        self.filled.notify_one();
        Ok(())
    }

    /// Waits for work, then takes what is there, at most `most` jobs: whoever is alone never waits for company.
    /// `None` once the queue is closed and empty.
    pub fn take(&self, most: usize) -> Option<Vec<Job>> {
        let mut state = self.lock();
        loop {
            let now = Instant::now();
            let mut batch = Vec::new();
            while batch.len() < most
                && let Some(job) = state.jobs.pop_front()
            {
                if job.wanted(now) {
                    batch.push(job);
                }
            }
            if !batch.is_empty() {
                return Some(batch);
            }
            if state.closed {
                return None;
            }
            state = self.filled.wait(state).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Refuses new jobs; those that wait can still be taken.
    pub fn close(&self) {
        self.lock().closed = true;
        self.filled.notify_all();
    }

    /// Closes the queue and drops what waits: its clients hear that the server stops.
    pub fn abandon(&self) {
        self.close();
        self.lock().jobs.clear();
    }

    /// How many wait.
    pub fn len(&self) -> usize {
        self.lock().jobs.len()
    }
}

#[cfg(test)]
mod tests {
    use std::sync::Arc;
    use std::time::Duration;

    use super::*;

    type Reply = oneshot::Receiver<Result<Done, Failure>>;

    fn job(seconds: u64) -> (Job, Reply) {
        let (reply, receiver) = oneshot::channel();
        let now = Instant::now();
        let deadline = now + Duration::from_secs(seconds);
        (Job { inputs: Inputs::default(), deadline, reply }, receiver)
    }

    #[test]
    fn takes_what_is_there_up_to_the_limit() {
        let queue = Queue::new(8);
        let _kept: Vec<Reply> = (0..5)
            .map(|_| {
                let (job, receiver) = job(60);
                queue.push(job).unwrap();
                receiver
            })
            .collect();
        assert_eq!(queue.take(3).unwrap().len(), 3);
        assert_eq!(queue.take(3).unwrap().len(), 2);
    }

    #[test]
    fn a_full_queue_refuses_but_the_gone_make_room() {
        let queue = Queue::new(2);
        let (a, gone) = job(60);
        let (b, _kept) = job(60);
        queue.push(a).unwrap();
        queue.push(b).unwrap();
        assert_eq!(queue.push(job(60).0), Err(Failure::Busy { waiting: 2 }));
        drop(gone);
        let (c, _also) = job(60);
        queue.push(c).unwrap();
        assert_eq!(queue.take(9).unwrap().len(), 2);
    }

    #[test]
    fn the_expired_are_not_run() {
        let queue = Queue::new(2);
        let (late, receiver) = job(0);
        let (good, _kept) = job(60);
        queue.push(late).unwrap();
        queue.push(good).unwrap();
        assert_eq!(queue.take(9).unwrap().len(), 1);
        assert!(receiver.blocking_recv().is_err());
    }

    #[test]
    fn closing_finishes_what_waits() {
        let queue = Arc::new(Queue::new(2));
        let (a, _kept) = job(60);
        queue.push(a).unwrap();
        queue.close();
        assert_eq!(queue.push(job(60).0), Err(Failure::ShuttingDown));
        assert_eq!(queue.take(9).unwrap().len(), 1);
        assert!(queue.take(9).is_none());
    }

    #[test]
    fn closing_wakes_whoever_waits() {
        let queue = Arc::new(Queue::new(2));
        let waiter = std::thread::spawn({
            let queue = queue.clone();
            move || queue.take(1).is_none()
        });
        std::thread::sleep(Duration::from_millis(20));
        queue.close();
        assert!(waiter.join().unwrap());
    }
}
