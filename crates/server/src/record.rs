//! Recordings: each request and its outcome in a file of its own, the newest of them within a bound.

use std::collections::VecDeque;
use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};
use std::sync::mpsc::{Receiver, SyncSender, TrySendError, sync_channel};
use std::sync::{Mutex, PoisonError};
use std::thread::JoinHandle;
use std::time::{SystemTime, UNIX_EPOCH};

use bytes::Bytes;
use prometheus_client::metrics::counter::Counter;

use crate::decode::{Limits, decode};
use crate::encode::encode;
use crate::value::{Map, Value};
use crate::{Error, Failure};

/// Ending of a recording's name.
const SUFFIX: &str = "pi0rec";

/// Recordings on their way to the disk; more are lost rather than waited for.
const BACKLOG: usize = 64;

/// A request and what came of it.
#[derive(Debug, Clone, PartialEq)]
pub struct Recording {
    /// The client's message.
    pub request: Bytes,
    /// Seed of the noise and reply, or the failure's kind and text.
    pub outcome: Result<(u64, Bytes), (String, String)>,
    /// When it was written, in seconds since 1970.
    pub time: f64,
    /// Number of the connection that it came by; none in recordings of earlier versions.
    pub client: Option<u64>,
}

impl Recording {
    fn encode(&self) -> Vec<u8> {
        let mut entries = vec![
            ("pi0_recording".to_owned(), Value::Int(1)),
            ("time".to_owned(), Value::Float(self.time)),
            ("request".to_owned(), Value::Binary(self.request.clone())),
        ];
        entries.extend(self.client.map(|client| ("client".to_owned(), Value::Int(client.into()))));
        match &self.outcome {
            Ok((seed, reply)) => entries.extend([
                ("seed".to_owned(), Value::Int((*seed).into())),
                ("reply".to_owned(), Value::Binary(reply.clone())),
            ]),
            Err((kind, text)) => entries.extend([
                ("failure".to_owned(), Value::Text(kind.clone())),
                ("error".to_owned(), Value::Text(text.clone())),
            ]),
        }
        encode(&Value::Map(Map(entries)))
    }

    /// Reads a recording.
    ///
    /// # Errors
    /// The file cannot be read or is no recording.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let bytes = Bytes::from(fs::read(path).map_err(|e| Error::file(path, e))?);
        let wrong = || Error::file(path, "not a recording of `pi0 serve --record`");
        let message = decode(&bytes, Limits::default()).map_err(|_| wrong())?;
        let Value::Map(map) = message else { return Err(wrong()) };
        let text = |key: &str| match map.get(key) {
            Some(Value::Text(text)) => Some(text.clone()),
            _ => None,
        };
        let (Some(Value::Int(1)), Some(Value::Binary(request)), Some(Value::Float(time))) =
            (map.get("pi0_recording"), map.get("request"), map.get("time"))
        else {
            return Err(wrong());
        };
        let outcome = match (map.get("seed"), map.get("reply")) {
            (Some(Value::Int(seed)), Some(Value::Binary(reply))) => {
                Ok((u64::try_from(*seed).map_err(|_| wrong())?, reply.clone()))
            }
            _ => Err((text("failure").ok_or_else(wrong)?, text("error").ok_or_else(wrong)?)),
        };
        let client = match map.get("client") {
            Some(Value::Int(client)) => u64::try_from(*client).ok(),
            _ => None,
        };
        Ok(Self { request: request.clone(), outcome, time: *time, client })
    }
}

/// Recordings in a directory with their numbers, the oldest first.
///
/// # Errors
/// The directory cannot be read.
pub fn recordings(dir: &Path) -> Result<Vec<(u64, PathBuf)>, Error> {
    let mut found = Vec::new();
    for entry in fs::read_dir(dir).map_err(|e| Error::file(dir, e))? {
        let path = entry.map_err(|e| Error::file(dir, e))?.path();
        let number = path.file_stem().and_then(|stem| stem.to_str()).and_then(|stem| stem.parse().ok());
        if let Some(number) = number
            && path.extension().is_some_and(|extension| extension == SUFFIX)
        {
            found.push((number, path));
        }
    }
    found.sort();
    Ok(found)
}

/// Writes recordings in a thread of its own.
pub(crate) struct Recorder {
    sender: Mutex<Option<SyncSender<Recording>>>,
    thread: Mutex<Option<JoinHandle<()>>>,
    lost: Counter,
}

impl Recorder {
    /// Records into `dir`, which is made if need be; what is there counts towards `max_bytes`.
    pub fn open(dir: &Path, max_bytes: u64) -> Result<Self, Error> {
        fs::create_dir_all(dir).map_err(|e| Error::file(dir, e))?;
        let mut shelf = Shelf { dir: dir.into(), max_bytes, files: VecDeque::new(), bytes: 0, next: 0 };
        for (number, path) in recordings(dir)? {
            let size = fs::metadata(&path).map_err(|e| Error::file(&path, e))?.len();
            shelf.bytes += size;
            shelf.next = number + 1;
            shelf.files.push_back((path, size));
        }
        let (sender, receiver) = sync_channel(BACKLOG);
        let lost = Counter::default();
        let thread = std::thread::Builder::new().name("record".into()).spawn({
            let lost = lost.clone();
            move || shelf.fill(&receiver, &lost)
        });
        let thread = Mutex::new(Some(thread.map_err(Error::System)?));
        Ok(Self { sender: Mutex::new(Some(sender)), thread, lost })
    }

    /// Counts what could not be recorded.
    pub fn lost(&self) -> Counter {
        self.lost.clone()
    }

    pub fn record(&self, client: u64, request: Bytes, outcome: Result<(u64, Bytes), &Failure>) {
        let outcome = outcome.map_err(|failure| (failure.kind().to_owned(), failure.to_string()));
        let time = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0.0, |t| t.as_secs_f64());
        let sender = self.sender.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(sender) = &*sender
            && let Err(TrySendError::Full(_) | TrySendError::Disconnected(_)) =
                sender.try_send(Recording { request, outcome, time, client: Some(client) })
        {
            self.lost.inc();
        }
    }

    /// Waits until everything is written. Later requests are not recorded.
    pub fn close(&self) {
        self.sender.lock().unwrap_or_else(PoisonError::into_inner).take();
        if let Some(thread) = self.thread.lock().unwrap_or_else(PoisonError::into_inner).take() {
            // Its panic, if any, has been printed.
            let _ = thread.join();
        }
    }
}

/// The directory as the writing thread knows it.
struct Shelf {
    dir: PathBuf,
    max_bytes: u64,
    files: VecDeque<(PathBuf, u64)>,
    bytes: u64,
    next: u64,
}

impl Shelf {
    fn fill(mut self, recordings: &Receiver<Recording>, lost: &Counter) {
        for recording in recordings {
            if let Err(error) = self.add(&recording.encode()) {
                lost.inc();
                tracing::warn!(%error, "cannot record a request");
            }
        }
    }

    fn add(&mut self, bytes: &[u8]) -> Result<(), Error> {
        let size = bytes.len() as u64;
        let path = self.dir.join(format!("{:012}.{SUFFIX}", self.next));
        if size > self.max_bytes {
            return Err(Error::file(&path, format!("{size} bytes are more than all may have")));
        }
        while self.bytes + size > self.max_bytes
            && let Some((oldest, size)) = self.files.pop_front()
        {
            fs::remove_file(&oldest).map_err(|e| Error::file(&oldest, e))?;
            self.bytes -= size;
        }
        // A reader must never find half a recording.
        let unfinished = path.with_extension("part");
        write(&unfinished, bytes).map_err(|e| Error::file(&unfinished, e))?;
        fs::rename(&unfinished, &path).map_err(|e| Error::file(&path, e))?;
        self.next += 1;
        self.bytes += size;
        self.files.push_back((path, size));
        Ok(())
    }
}

/// Writes a file that only its owner may read: it shows what a robot's cameras saw.
fn write(path: &Path, bytes: &[u8]) -> std::io::Result<()> {
    let mut options = fs::OpenOptions::new();
    options.write(true).create(true).truncate(true);
    #[cfg(unix)]
    std::os::unix::fs::OpenOptionsExt::mode(&mut options, 0o600);
    options.open(path)?.write_all(bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn recordings_are_read_back() {
        let dir = tempfile::tempdir().unwrap();
        let recorder = Recorder::open(dir.path(), 1 << 20).unwrap();
        recorder.record(9, Bytes::from_static(b"abc"), Ok((u64::MAX, Bytes::from_static(b"reply"))));
        recorder.record(9, Bytes::from_static(b"def"), Err(&Failure::BadRequest("no".into())));
        recorder.close();
        let found = recordings(dir.path()).unwrap();
        assert_eq!(found.iter().map(|(n, _)| *n).collect::<Vec<_>>(), [0, 1]);
        let [a, b] = [0, 1].map(|i: usize| Recording::open(&found[i].1).unwrap());
        assert_eq!((a.client, b.client), (Some(9), Some(9)));
        assert_eq!((&a.request[..], a.outcome), (&b"abc"[..], Ok((u64::MAX, Bytes::from_static(b"reply")))));
        assert_eq!(b.outcome, Err(("bad_request".into(), "no".into())));
        assert_eq!(recorder.lost.get(), 0);
    }

    #[test]
    fn the_oldest_go_and_numbers_go_on() {
        let dir = tempfile::tempdir().unwrap();
        let request = Bytes::from(vec![0; 1000]);
        for round in 0..3 {
            let recorder = Recorder::open(dir.path(), 3500).unwrap();
            for _ in 0..4 {
                recorder.record(9, request.clone(), Ok((0, Bytes::new())));
            }
            recorder.close();
            let numbers: Vec<u64> = recordings(dir.path()).unwrap().iter().map(|(n, _)| *n).collect();
            let last = 4 * round + 3;
            assert_eq!(numbers, [last - 2, last - 1, last]);
        }
    }

    #[test]
    fn other_files_are_left_alone_and_refused() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("notes.txt"), "x").unwrap();
        let bad = dir.path().join("000000000005.pi0rec");
        fs::write(&bad, "x").unwrap();
        assert_eq!(recordings(dir.path()).unwrap().len(), 1);
        assert!(Recording::open(&bad).is_err());
        let recorder = Recorder::open(dir.path(), 1000).unwrap();
        recorder.record(9, Bytes::from_static(b"abc"), Ok((0, Bytes::new())));
        recorder.close();
        assert!(dir.path().join("000000000006.pi0rec").is_file() && dir.path().join("notes.txt").is_file());
    }
}
