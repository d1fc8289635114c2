//! Everything that can be set, with its default; also the form of the settings file.

use std::net::{IpAddr, Ipv4Addr};
use std::path::{Path, PathBuf};
use std::time::Duration;

use pi0_doctor::{Kind, Thresholds};
use pi0_model::STEPS;
use serde::Deserialize;

use crate::{Error, Limits};

/// How to serve. In TOML, each field is a key of the same name; durations are in seconds.
#[derive(Debug, Clone, PartialEq, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Settings {
    /// Address to listen on.
    pub host: IpAddr,
    /// Port to listen on; 0 takes a free one.
    pub port: u16,
    /// File of accepted API keys, one a line; without it every client is served.
    pub api_key_file: Option<PathBuf>,
    /// Most websocket clients at once.
    pub max_connections: usize,
    /// Largest message of a client, in bytes.
    pub max_message_bytes: usize,
    /// Most dictionaries and lists within each other in a message.
    pub max_depth: usize,
    /// Most values in a message, the elements of arrays not counted.
    pub max_values: usize,
    /// Most requests in one pass of the network.
    pub max_batch: usize,
    /// Most requests that wait for the network; more are refused.
    pub max_queue: usize,
    /// A request that has no result after this time is refused.
    #[serde(rename = "request_timeout_s", deserialize_with = "seconds")]
    pub request_timeout: Duration,
    /// Pause between pings; a client silent for two such pauses is dropped.
    #[serde(rename = "ping_interval_s", deserialize_with = "seconds")]
    pub ping_interval: Duration,
    /// A client that does not take its reply in this time is dropped.
    #[serde(rename = "write_timeout_s", deserialize_with = "seconds")]
    pub write_timeout: Duration,
    /// Time for accepted requests to finish after a signal to stop.
    #[serde(rename = "shutdown_timeout_s", deserialize_with = "seconds")]
    pub shutdown_timeout: Duration,
    /// Euler steps of the network; the checkpoint's default when none.
    pub steps: Option<usize>,
    /// Seed of the first request's noise; by chance when none.
    pub seed: Option<u64>,
    /// Directory that requests and replies are written to.
    pub record: Option<PathBuf>,
    /// Most bytes in that directory; the oldest recordings go first.
    pub record_max_bytes: u64,
    /// Whether `GET /` shows what the policy sees.
    pub page: bool,
    /// Most viewers of that page at once.
    pub max_viewers: usize,
    /// Findings of the doctor that refuse a request, or withhold its answer.
    pub strict: Vec<Kind>,
    /// From where on something is a finding.
    pub doctor: Thresholds,
}

impl Default for Settings {
    fn default() -> Self {
        let limits = Limits::default();
        Self {
            host: IpAddr::V4(Ipv4Addr::UNSPECIFIED),
            port: 8000,
            api_key_file: None,
            max_connections: 256,
            max_message_bytes: 64 << 20,
            max_depth: limits.depth,
            max_values: limits.values,
            max_batch: 8,
            max_queue: 64,
            request_timeout: Duration::from_secs(120),
            ping_interval: Duration::from_secs(20),
            write_timeout: Duration::from_secs(20),
            shutdown_timeout: Duration::from_secs(30),
            steps: None,
            seed: None,
            record: None,
            record_max_bytes: 1 << 30,
            page: true,
            max_viewers: 16,
            strict: Vec::new(),
            doctor: Thresholds::default(),
        }
    }
}

impl Settings {
    /// Reads a settings file.
    ///
    /// # Errors
    /// When it cannot be read or has an unknown key or a wrong value.
    pub fn open(path: &Path) -> Result<Self, Error> {
        let text = std::fs::read_to_string(path).map_err(|e| Error::file(path, e))?;
        toml::from_str(&text).map_err(|e| Error::file(path, e))
    }

    /// Checks what types cannot.
    ///
    /// # Errors
    /// Names the setting.
    pub fn check(&self) -> Result<(), Error> {
        let counts = [
            ("max_connections", self.max_connections),
            ("max_message_bytes", self.max_message_bytes),
            ("max_depth", self.max_depth),
            ("max_values", self.max_values),
            ("max_batch", self.max_batch),
            ("max_queue", self.max_queue),
            ("max_viewers", self.max_viewers),
        ];
        let times = [
            ("request_timeout_s", self.request_timeout),
            ("ping_interval_s", self.ping_interval),
            ("write_timeout_s", self.write_timeout),
        ];
        let zero = counts.iter().find(|(_, n)| *n == 0).map(|(name, _)| *name);
        match zero.or(times.iter().find(|(_, t)| t.is_zero()).map(|(name, _)| *name)) {
            Some(name) => Err(Error::Setting { name, why: "0 makes no sense" }),
            None if self.doctor.check().is_err() => {
                let name = self.doctor.check().err().unwrap_or_default();
                Err(Error::Setting { name, why: "of [doctor]: must be a positive number" })
            }
            // Each level of nesting takes stack.
            None if self.max_depth > 128 => Err(Error::Setting { name: "max_depth", why: "at most 128" }),
            None if self.steps.is_some_and(|steps| !STEPS.contains(&steps)) => {
                Err(Error::Setting { name: "steps", why: "from 1 to 1000 make sense, 10 is usual" })
            }
            None => Ok(()),
        }
    }

    pub(crate) fn limits(&self) -> Limits {
        Limits { depth: self.max_depth, values: self.max_values }
    }
}

fn seconds<'de, D: serde::Deserializer<'de>>(from: D) -> Result<Duration, D::Error> {
    let seconds = f64::deserialize(from)?;
    Duration::try_from_secs_f64(seconds).map_err(serde::de::Error::custom)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn write(text: &str) -> Result<Settings, Error> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), text).unwrap();
        Settings::open(file.path())
    }

    #[test]
    fn a_file_overrides_defaults() {
        let s = write("port = 9\nmax_batch = 2\nrequest_timeout_s = 0.5\nhost = \"::1\"").unwrap();
        assert_eq!((s.port, s.max_batch, s.request_timeout), (9, 2, Duration::from_millis(500)));
        assert_eq!(s.max_queue, Settings::default().max_queue);
        s.check().unwrap();
    }

    #[test]
    fn mistakes_are_named() {
        for (text, word) in [
            ("prot = 9", "prot"),
            ("port = 70000", "port"),
            ("request_timeout_s = -1.0", "request_timeout_s"),
            ("host = \"here\"", "host"),
            ("strict = [\"image_blue\"]", "image_blue"),
            ("[doctor]\nblak = 3.0", "blak"),
        ] {
            let error = write(text).unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
        for (text, word) in [
            ("max_batch = 0", "max_batch"),
            ("steps = 0", "steps"),
            ("steps = 1001", "steps"),
            ("max_depth = 129", "max_depth"),
            ("doctor.state_deviations = 0.0", "state_deviations"),
        ] {
            let error = write(text).unwrap().check().unwrap_err().to_string();
            assert!(error.contains(word), "{error}");
        }
    }
}
