//! The simulator in a process of its own.
//!
//! It ends its process on any error: then the socket closes, and the error carries what the simulator printed.
//! The child is this program itself where `main` calls [`run_child_if_asked`], else the helper `pi0-ttsim`
//! beside it. Its standard input is a socket for batches and replies; what the simulator prints is collected.

use std::io::{Read, Write};
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread::JoinHandle;
use std::time::Duration;

use super::ttsim::TtSim;
use super::{Batch, Transport, TransportError};

/// Set for the child: the library to serve.
const CHILD: &str = "PI0_TTSIM_CHILD";
/// Names the helper program where it is neither this program nor beside it.
const HELPER: &str = "PI0_TTSIM_HELPER";

/// Whether this program serves as its own child.
static SELF_SERVES: AtomicBool = AtomicBool::new(false);

/// Serves the simulator and never returns if this process was started for that; else notes that this program
/// can do so. Call it first in `main`.
pub fn run_child_if_asked() {
    let Some(library) = std::env::var_os(CHILD) else {
        SELF_SERVES.store(true, Ordering::Relaxed);
        return;
    };
    let code = match serve(Path::new(&library)) {
        Ok(()) => 0,
        Err(e) => {
            eprintln!("{e}");
            1
        }
    };
    std::process::exit(code);
}

/// Answers batches until the parent closes the socket.
fn serve(library: &Path) -> std::io::Result<()> {
    let mut socket = UnixStream::from(std::io::stdin().as_fd().try_clone_to_owned()?);
    let mut sim = match TtSim::open(library) {
        Ok(sim) => {
            send(&mut socket, b"ready")?;
            sim
        }
        Err(why) => return send(&mut socket, why.as_bytes()),
    };
    while let Some(batch) = receive(&mut socket)? {
        let reply = sim.execute(&batch);
        send(&mut socket, &reply)?;
    }
    Ok(())
}

fn send(socket: &mut UnixStream, message: &[u8]) -> std::io::Result<()> {
    socket.write_all(&(message.len() as u32).to_le_bytes())?;
    socket.write_all(message)
}

/// The next message; none once the other side has closed.
fn receive(socket: &mut UnixStream) -> std::io::Result<Option<Vec<u8>>> {
    let mut len = [0; 4];
    match socket.read_exact(&mut len) {
        Err(e) if e.kind() == std::io::ErrorKind::UnexpectedEof => return Ok(None),
        done => done?,
    }
    let mut message = vec![0; u32::from_le_bytes(len) as usize];
    socket.read_exact(&mut message)?;
    Ok(Some(message))
}

/// The program to start as the child.
fn helper() -> Result<PathBuf, TransportError> {
    if let Some(path) = std::env::var_os(HELPER) {
        return Ok(path.into());
    }
    let me = std::env::current_exe()
        .map_err(|e| TransportError::Spawn { program: "this program".into(), why: e.to_string() })?;
    if SELF_SERVES.load(Ordering::Relaxed) {
        return Ok(me);
    }
    // Test programs lie in `deps/`, beside `examples/`.
    let beside = me.ancestors().skip(1).take(2).map(|dir| dir.join("examples/pi0-ttsim"));
    beside.into_iter().find(|p| p.is_file()).ok_or_else(|| TransportError::Spawn {
        program: "pi0-ttsim".into(),
        why: format!("not found beside {}; name it in {HELPER}", me.display()),
    })
}

struct ChildSim {
    child: Child,
    socket: Option<UnixStream>,
    printed: Vec<JoinHandle<String>>,
    /// Why it no longer answers.
    dead: Option<TransportError>,
    patience: Duration,
}

/// Starts the simulator in `library`. A single batch may take `patience`.
pub fn spawn(library: &Path, patience: Duration) -> Result<Box<dyn Transport>, TransportError> {
    let bad_library = |why: String| TransportError::Library { library: library.display().to_string(), why };
    if !library.is_file() {
        return Err(bad_library("no such file".into()));
    }
    let program = helper()?;
    let failed = |e: std::io::Error| TransportError::Spawn {
        program: program.display().to_string(),
        why: e.to_string(),
    };
    let (ours, theirs) = UnixStream::pair().map_err(failed)?;
    ours.set_read_timeout(Some(patience)).map_err(failed)?;
    let mut child = Command::new(&program)
        .env(CHILD, library)
        .stdin(Stdio::from(OwnedFd::from(theirs)))
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .map_err(failed)?;
    let printed = [
        child.stdout.take().map(|s| std::thread::spawn(move || collect(s))),
        child.stderr.take().map(|s| std::thread::spawn(move || collect(s))),
    ];
    let printed = printed.into_iter().flatten().collect();
    let mut sim = ChildSim { child, socket: Some(ours), printed, dead: None, patience };
    match sim.receive()? {
        ready if ready == b"ready" => Ok(Box::new(sim)),
        why => Err(bad_library(String::from_utf8_lossy(&why).into_owned())),
    }
}

/// The last lines of what a stream carries.
fn collect(mut stream: impl Read) -> String {
    const KEEP: usize = 4096;
    let (mut tail, mut buffer) = (Vec::new(), [0; 4096]);
    while let Ok(n @ 1..) = stream.read(&mut buffer) {
        tail.extend(&buffer[..n]);
        tail.drain(..tail.len().saturating_sub(KEEP));
    }
    String::from_utf8_lossy(&tail).into_owned()
}

impl ChildSim {
    fn receive(&mut self) -> Result<Vec<u8>, TransportError> {
        let Some(socket) = &mut self.socket else {
            return Err(self.ended(None));
        };
        match receive(socket) {
            Ok(Some(reply)) => Ok(reply),
            Ok(None) => Err(self.ended(None)),
            Err(e) => Err(self.ended(Some(e))),
        }
    }

    /// Ends the child and says why it stopped.
    fn ended(&mut self, error: Option<std::io::Error>) -> TransportError {
        if let Some(dead) = &self.dead {
            return dead.clone();
        }
        self.socket = None;
        let silent = error.as_ref().is_some_and(|e| {
            matches!(e.kind(), std::io::ErrorKind::WouldBlock | std::io::ErrorKind::TimedOut)
        });
        if silent {
            // It computes and will not notice the closed socket. Killing an ended child fails harmlessly.
            let _ = self.child.kill();
        }
        let status = self.child.wait();
        let printed: String =
            self.printed.drain(..).filter_map(|t| t.join().ok()).collect::<Vec<_>>().join("\n");
        let dead = if silent {
            TransportError::Silent(self.patience.as_secs())
        } else {
            let line = printed.lines().rev().find(|l| l.contains("ERROR"));
            let line = line.or_else(|| printed.lines().rev().find(|l| !l.trim().is_empty()));
            TransportError::Stopped(match (line, status) {
                (Some(line), _) => line.trim().to_owned(),
                (None, Ok(status)) => status.to_string(),
                (None, Err(e)) => e.to_string(),
            })
        };
        self.dead = Some(dead.clone());
        dead
    }
}

impl Transport for ChildSim {
    fn run(&mut self, batch: Batch) -> Result<Vec<u8>, TransportError> {
        let sent = match &mut self.socket {
            Some(socket) => send(socket, &batch.bytes),
            None => return Err(self.ended(None)),
        };
        if let Err(e) = sent {
            return Err(self.ended(Some(e)));
        }
        let reply = self.receive()?;
        if reply.len() != batch.reply_bytes {
            return Err(self.ended(None));
        }
        Ok(reply)
    }

    fn name(&self) -> &'static str {
        "ttsim"
    }

    fn simulated(&self) -> bool {
        true
    }
}

impl Drop for ChildSim {
    fn drop(&mut self) {
        // Closing the socket ends the child; one that is still computing is ended by force.
        self.socket = None;
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}
