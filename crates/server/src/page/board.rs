//! The robots that are connected, the latency of the last minutes, the last errors.

use std::collections::{BTreeMap, VecDeque};
use std::ops::Deref;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use pi0_doctor::{Doctor, Finding};
use pi0_model::Inputs;
use pi0_policy::{Actions, Observation, Policy, Prepared};
use tokio::sync::{OnceCell, Semaphore};

use super::view::{Answered, Latest, network_picture, shortened};

/// How many of a robot's last requests its rate is measured over.
const RATE_OVER: usize = 20;
/// Shortest time between two pictures that are kept of a robot.
const PICTURE_PAUSE: Duration = Duration::from_millis(200);
/// A bucket of the latency chart, and how many there are: five minutes.
const BUCKET: Duration = Duration::from_secs(5);
const BUCKETS: usize = 60;
/// Errors that are kept.
const ERRORS: usize = 20;
/// Stages of the latency chart.
pub(crate) const STAGES: [&str; 5] = ["prepare", "queue", "inference", "finish", "total"];

/// Where a request's time went, in the order of [`STAGES`].
type Times = [Duration; STAGES.len()];

/// A panic elsewhere leaves what is shown as valid as it was.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Pictures of one observation, encoded once for all viewers.
pub(crate) struct Pictures {
    pub taken: Instant,
    /// As the network gets them: what they are made into is no work for a robot's request.
    cameras: Vec<Option<Vec<f32>>>,
    urls: OnceCell<Vec<Option<String>>>,
}

impl Pictures {
    /// The pictures by camera. They are encoded by one thread at a time, so that those who wait for it never take more
    /// than one from the robots.
    pub async fn urls(self: &Arc<Self>, encoding: &Semaphore) -> &[Option<String>] {
        let encode = async || {
            let _turn = encoding.acquire().await;
            let this = self.clone();
            let work =
                move || this.cameras.iter().map(|image| network_picture(image.as_deref()?)?.url()).collect();
            tokio::task::spawn_blocking(work).await.unwrap_or_default()
        };
        self.urls.get_or_init(encode).await
    }
}

/// What is kept of one robot.
pub(crate) struct Client {
    pub id: u64,
    pub peer: String,
    board: Arc<Board>,
    latest: Mutex<Latest>,
    seen: Mutex<Pace>,
    pictures: Mutex<Option<Arc<Pictures>>>,
    watchers: AtomicUsize,
    /// Grows with everything that a viewer could want to know.
    version: AtomicU64,
}

/// When a robot's last requests came.
#[derive(Default)]
struct Pace {
    times: VecDeque<Instant>,
}

impl Client {
    /// Has the doctor look at an observation; keeps its pictures if somebody looks.
    pub fn observe(
        &self,
        doctor: &Doctor,
        policy: &Policy,
        observation: &Observation,
        prepared: &Prepared,
        unexecuted: Option<usize>,
    ) -> Vec<Finding> {
        let time = self.board.seconds();
        let findings = lock(&self.latest).observe(doctor, policy, observation, prepared, unexecuted, time);
        let now = Instant::now();
        let mut pace = lock(&self.seen);
        pace.times.push_back(now);
        if pace.times.len() > RATE_OVER {
            pace.times.pop_front();
        }
        drop(pace);
        if self.watchers.load(Ordering::Relaxed) > 0 {
            self.keep_pictures(&prepared.inputs, now);
        }
        self.version.fetch_add(1, Ordering::Relaxed);
        findings
    }

    fn keep_pictures(&self, inputs: &Inputs, now: Instant) {
        let last = lock(&self.pictures).as_ref().map(|kept| kept.taken);
        if last.is_some_and(|taken| now.saturating_duration_since(taken) < PICTURE_PAUSE) {
            return;
        }
        let cameras = inputs.images.clone();
        *lock(&self.pictures) = Some(Arc::new(Pictures { taken: now, cameras, urls: OnceCell::new() }));
    }

    /// Has the doctor look at an answer.
    pub fn answer(
        &self,
        doctor: &Doctor,
        policy: &Policy,
        network: &[f32],
        actions: &Actions,
        latency: Duration,
    ) -> Vec<Finding> {
        let answer = Answered::of(policy, network, actions, latency.as_secs_f64(), self.board.seconds());
        lock(&self.latest).answer(doctor, &answer)
    }

    /// All findings of the request that was just answered, and where its time went.
    pub fn finish(&self, times: Times) -> Vec<Finding> {
        let mut latest = lock(&self.latest);
        latest.times = STAGES.into_iter().zip(times).collect();
        let findings = latest.findings.clone();
        drop(latest);
        self.board.time(times);
        self.version.fetch_add(1, Ordering::Relaxed);
        findings
    }

    /// Has the doctor note that an observation was refused.
    pub fn refuse(&self, doctor: &Doctor, why: &str) -> Finding {
        let time = self.board.seconds();
        let mut latest = lock(&self.latest);
        let finding = doctor.refuse(&mut latest.history, &shortened(why, 500), time);
        latest.findings = vec![finding.clone()];
        finding
    }

    /// Uses what is kept.
    pub fn latest<T>(&self, read: impl FnOnce(&Latest) -> T) -> T {
        read(&lock(&self.latest))
    }

    /// The last pictures.
    pub fn pictures(&self) -> Option<Arc<Pictures>> {
        lock(&self.pictures).clone()
    }

    /// Changes whenever there is something new to show.
    pub fn version(&self) -> u64 {
        self.version.load(Ordering::Relaxed)
    }

    /// Requests a second over the last ones; 0 when none came for ten seconds.
    pub fn rate(&self) -> f64 {
        let pace = lock(&self.seen);
        let (Some(first), Some(last)) = (pace.times.front(), pace.times.back()) else { return 0.0 };
        let span = (*last - *first).as_secs_f64();
        let recent = last.elapsed() < Duration::from_secs(10);
        if recent && span > 0.0 { (pace.times.len() - 1) as f64 / span } else { 0.0 }
    }
}

/// Keeps pictures coming while it lives.
pub(crate) struct Watch(Arc<Client>);

impl Watch {
    pub fn new(client: Arc<Client>) -> Self {
        client.watchers.fetch_add(1, Ordering::Relaxed);
        Self(client)
    }
}

impl Deref for Watch {
    type Target = Arc<Client>;

    fn deref(&self) -> &Arc<Client> {
        &self.0
    }
}

impl Drop for Watch {
    fn drop(&mut self) {
        if self.0.watchers.fetch_sub(1, Ordering::Relaxed) == 1 {
            // Nobody looks: nothing is kept.
            *lock(&self.0.pictures) = None;
        }
    }
}

/// A client on the board, for as long as it is connected.
pub(crate) struct Registered(Arc<Client>);

impl Registered {
    /// For work that may outlast the connection.
    pub fn share(&self) -> Arc<Client> {
        self.0.clone()
    }
}

impl Deref for Registered {
    type Target = Client;

    fn deref(&self) -> &Client {
        &self.0
    }
}

impl Drop for Registered {
    fn drop(&mut self) {
        lock(&self.0.board.clients).remove(&self.0.id);
    }
}

/// An error as it is shown.
#[derive(Clone)]
pub(crate) struct Trouble {
    pub time: f64,
    pub peer: String,
    pub kind: &'static str,
    pub text: String,
}

/// Mean times of one bucket.
#[derive(Clone, Copy, Default)]
pub(crate) struct Bucket {
    pub number: u64,
    pub count: u32,
    pub sums: [f64; STAGES.len()],
}

/// Everything that the page shows.
pub(crate) struct Board {
    start: Instant,
    next: AtomicU64,
    clients: Mutex<BTreeMap<u64, Arc<Client>>>,
    buckets: Mutex<VecDeque<Bucket>>,
    errors: Mutex<VecDeque<Trouble>>,
    /// One encodes at a time.
    pub encoding: Semaphore,
    /// Places for viewers.
    pub viewers: Arc<Semaphore>,
}

impl Board {
    pub fn new(max_viewers: usize) -> Arc<Self> {
        Arc::new(Self {
            start: Instant::now(),
            next: AtomicU64::new(1),
            clients: Mutex::default(),
            buckets: Mutex::default(),
            errors: Mutex::default(),
            encoding: Semaphore::new(1),
            viewers: Arc::new(Semaphore::new(max_viewers)),
        })
    }

    /// Enters a client that has connected.
    pub fn register(self: &Arc<Self>, peer: String) -> Registered {
        let id = self.next.fetch_add(1, Ordering::Relaxed);
        let client = Arc::new(Client {
            id,
            peer,
            board: self.clone(),
            latest: Mutex::default(),
            seen: Mutex::default(),
            pictures: Mutex::default(),
            watchers: AtomicUsize::new(0),
            version: AtomicU64::new(0),
        });
        lock(&self.clients).insert(id, client.clone());
        Registered(client)
    }

    /// Seconds since the server began.
    pub fn seconds(&self) -> f64 {
        self.start.elapsed().as_secs_f64()
    }

    /// All clients, in the order in which they came.
    pub fn clients(&self) -> Vec<Arc<Client>> {
        lock(&self.clients).values().cloned().collect()
    }

    fn time(&self, times: Times) {
        let number = self.start.elapsed().as_secs() / BUCKET.as_secs();
        let mut buckets = lock(&self.buckets);
        if buckets.back().is_none_or(|last| last.number != number) {
            buckets.push_back(Bucket { number, ..Bucket::default() });
            if buckets.len() > BUCKETS {
                buckets.pop_front();
            }
        }
        if let Some(last) = buckets.back_mut() {
            last.count += 1;
            last.sums.iter_mut().zip(times).for_each(|(sum, time)| *sum += time.as_secs_f64());
        }
    }

    /// Mean times of the last five minutes; moments without requests are left out.
    pub fn buckets(&self) -> (u64, Vec<Bucket>) {
        let now = self.start.elapsed().as_secs() / BUCKET.as_secs();
        let fresh = |bucket: &&Bucket| now.saturating_sub(bucket.number) < BUCKETS as u64;
        (now, lock(&self.buckets).iter().filter(fresh).copied().collect())
    }

    /// Keeps an error.
    pub fn trouble(&self, peer: &str, kind: &'static str, text: &str) {
        let text = shortened(text, 500);
        let trouble = Trouble { time: self.seconds(), peer: peer.to_owned(), kind, text };
        let mut errors = lock(&self.errors);
        errors.push_back(trouble);
        if errors.len() > ERRORS {
            errors.pop_front();
        }
    }

    /// The last errors, the newest first.
    pub fn errors(&self) -> Vec<Trouble> {
        lock(&self.errors).iter().rev().cloned().collect()
    }
}

/// Seconds of a bucket.
pub(crate) const BUCKET_SECONDS: u64 = BUCKET.as_secs();
