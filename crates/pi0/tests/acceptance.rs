//! `pi0 serve` and its real clients in Python: openpi-client, unmodified, and gym-aloha in a closed loop.
//!
//! And our own demo as one, which needs nothing.
//!
//! `PI0_PYTHON` names a Python with the packages (see `examples/`); without them a test says that it was skipped.

#[path = "../../server/tests/common/checkpoint.rs"]
mod checkpoint;

use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};

use checkpoint::openpi_checkpoint;
use pi0_policy::Robot;
use tempfile::TempDir;

/// A Python that imports `module`; says why there is none.
fn python(module: &str) -> Option<PathBuf> {
    let python = PathBuf::from(std::env::var_os("PI0_PYTHON").unwrap_or("python3".into()));
    let found = Command::new(&python).args(["-c", &format!("import {module}")]).output();
    if found.is_ok_and(|output| output.status.success()) {
        return Some(python);
    }
    eprintln!("skipped: {} cannot import {module}; set PI0_PYTHON", python.display());
    None
}

/// `pi0 serve` in a process of its own; ended when dropped.
struct Server {
    child: Child,
    port: u16,
    /// What it serves, if it goes with it.
    dir: Option<TempDir>,
}

impl Server {
    fn start(robot: Robot, horizon: usize, flags: &[&str]) -> Self {
        let dir = openpi_checkpoint(robot, horizon);
        let mut server = Self::of(dir.path(), flags);
        server.dir = Some(dir);
        server
    }

    /// Serves this checkpoint.
    fn of(model: &Path, flags: &[&str]) -> Self {
        let mut child = Command::new(env!("CARGO_BIN_EXE_pi0"))
            .arg("serve")
            .arg(model)
            .args(["--host", "127.0.0.1", "--port", "0", "--log-format", "json"])
            .args(flags)
            .env("RUST_LOG", "info")
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines();
        let mut seen = String::new();
        let port = loop {
            let Some(Ok(line)) = lines.next() else { panic!("the server ended:\n{seen}") };
            if let Some((_, rest)) = line.split_once("\"address\":\"127.0.0.1:") {
                break rest.split_once('"').unwrap().0.parse().unwrap();
            }
            seen += &(line + "\n");
        };
        // A full pipe would stop the server.
        std::thread::spawn(move || lines.for_each(drop));
        Self { child, port, dir: None }
    }

    fn run(&self, python: &Path, script: &str, flags: &[&str]) {
        let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../examples").join(script);
        let output = Command::new(python)
            .arg(&script)
            .args(flags)
            .args(["--port", &self.port.to_string()])
            .env_remove("PYTHONPATH")
            .output()
            .unwrap();
        let (out, err) = (String::from_utf8_lossy(&output.stdout), String::from_utf8_lossy(&output.stderr));
        assert!(output.status.success(), "{}:\n{out}\n{err}", script.display());
        eprintln!("{out}");
    }

    /// Ends it as an operator does; it must end well.
    #[cfg(unix)]
    fn end(mut self) {
        let pid = self.child.id().to_string();
        assert!(Command::new("kill").args(["-TERM", &pid]).status().unwrap().success());
        assert!(self.child.wait().unwrap().success());
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

fn accept(robot: Robot, horizon: usize) {
    let Some(python) = python("openpi_client.websocket_client_policy") else { return };
    let keys = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(keys.path(), "k\n").unwrap();
    let server = Server::start(robot, horizon, &["--api-key-file", keys.path().to_str().unwrap()]);
    let horizon = horizon.to_string();
    server.run(&python, "openpi_robot.py", &[robot.name(), "--api-key", "k", "--horizon", &horizon]);
    #[cfg(unix)]
    server.end();
}

#[test]
fn openpi_client_drives_aloha() {
    accept(Robot::Aloha, 50);
}

#[test]
fn openpi_client_drives_droid() {
    accept(Robot::Droid, 10);
}

#[test]
fn openpi_client_drives_libero() {
    accept(Robot::Libero, 50);
}

#[test]
fn gym_aloha_closes_the_loop() {
    let Some(python) = python("gym_aloha, openpi_client") else { return };
    let recordings = tempfile::tempdir().unwrap();
    let record = recordings.path().to_str().unwrap();
    let prompt = ["--default-prompt", "Transfer cube"];
    let server = Server::start(Robot::Aloha, 50, &[&prompt[..], &["--record", record]].concat());
    server.run(&python, "gym_aloha_loop.py", &["--steps", "25"]);
    #[cfg(unix)]
    server.end();

    let same = openpi_checkpoint(Robot::Aloha, 50);
    let output = Command::new(env!("CARGO_BIN_EXE_pi0"))
        .arg("replay")
        .args([same.path(), recordings.path()])
        .args(prompt)
        .output()
        .unwrap();
    let told = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success() && told.contains("3 replayed, 0 differ"), "{told}");
}

/// The world here, the policy behind the protocol; several robots at once for the report.
#[test]
fn the_demo_drives_a_server() {
    let model = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo");
    let keys = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(keys.path(), "secret\n").unwrap();
    let keys = keys.path().to_str().unwrap();
    let server = Server::of(&model, &["--api-key-file", keys]);
    let url = format!("ws://127.0.0.1:{}", server.port);
    let demo = |flags: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_pi0"))
            .args(["demo", "--server", &url])
            .args(flags)
            .output()
            .unwrap();
        let text = |bytes| String::from_utf8(bytes).unwrap();
        (output.status.success(), text(output.stdout), text(output.stderr))
    };
    let (well, out, err) = demo(&["--api-key-file", keys, "--render", "none", "--episodes", "3"]);
    assert!(well && out.contains("of 3, "), "{out}\n{err}");
    let (well, out, err) = demo(&["--api-key-file", keys, "--report", "-", "--episodes", "2"]);
    assert!(well && out.contains("\"successes\""), "{out}\n{err}");
    let (well, _, err) = demo(&["--render", "none"]);
    assert!(!well && err.contains("--api-key-file"), "{err}");
    let (well, _, err) = demo(&["--dtype", "int8"]);
    assert!(!well && err.contains("cannot be used with"), "{err}");
    #[cfg(unix)]
    server.end();
    let (well, _, err) = demo(&["--api-key-file", keys, "--render", "none"]);
    assert!(!well && err.contains("pi0 serve"), "{err}");
}
