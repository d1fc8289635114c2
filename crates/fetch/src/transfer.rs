//! One file over HTTP: in parts, going on after a cut, checked at the end.

use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::Path;

use sha1::Sha1;
use sha2::{Digest, Sha256};
use ureq::Agent;

use crate::{Error, Listener, Progress, Result, Settings, disk};

/// Longest answer that is a listing.
const MOST_LISTING: u64 = 32 << 20;
/// Bytes that count as progress before a connection is cut.
const PROGRESS: u64 = 64 << 10;
/// Times that a whole file is fetched before a wrong checksum is believed.
const WHOLE_ATTEMPTS: u32 = 2;

/// What a file must be, as its server lists it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Checksum {
    /// SHA-256, hexadecimal: the hub's large files.
    Sha256(String),
    /// Git's SHA-1 of the file behind a header with its length, hexadecimal: the hub's small files.
    GitBlob(String),
    /// CRC-32C: Google's storage.
    Crc32c(u32),
}

impl Checksum {
    /// Whether the file at `path` has it.
    fn holds(&self, path: &Path) -> Result<bool> {
        let fail = |e| Error::disk(path, e);
        let mut file = File::open(path).map_err(fail)?;
        let length = file.metadata().map_err(fail)?.len();
        let (mut sha256, mut sha1, mut crc) = (Sha256::new(), Sha1::new(), 0);
        sha1.update(format!("blob {length}\0"));
        let mut buffer = vec![0; 1 << 20];
        loop {
            let n = file.read(&mut buffer).map_err(fail)?;
            if n == 0 {
                break;
            }
            match self {
                Checksum::Sha256(_) => sha256.update(&buffer[..n]),
                Checksum::GitBlob(_) => sha1.update(&buffer[..n]),
                Checksum::Crc32c(_) => crc = crc32c::crc32c_append(crc, &buffer[..n]),
            }
        }
        Ok(match self {
            Checksum::Sha256(want) => hex(&sha256.finalize()) == want.to_ascii_lowercase(),
            Checksum::GitBlob(want) => hex(&sha1.finalize()) == want.to_ascii_lowercase(),
            Checksum::Crc32c(want) => crc == *want,
        })
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

/// A file to fetch.
#[derive(Debug, Clone)]
pub(crate) struct Remote {
    pub url: String,
    /// Its path in its folder.
    pub path: String,
    pub size: u64,
    pub checksum: Option<Checksum>,
}

/// Asks servers.
pub(crate) struct Client<'a> {
    agent: Agent,
    settings: &'a Settings,
    /// Sent to the first server alone, never to one that it points to.
    token: Option<&'a str>,
}

impl<'a> Client<'a> {
    pub fn new(settings: &'a Settings, endpoint: &str, token: Option<&'a str>) -> Self {
        let config = Agent::config_builder()
            .timeout_connect(Some(settings.answer))
            .timeout_recv_response(Some(settings.answer))
            .timeout_recv_body(Some(settings.part_time))
            .max_redirects(5)
            .http_status_as_error(false)
            // What begins encrypted stays so.
            .https_only(endpoint.starts_with("https://"))
            .user_agent(concat!("pi0/", env!("CARGO_PKG_VERSION")))
            .build();
        Self { agent: config.into(), settings, token }
    }

    fn get(&self, url: &str, range: Option<(u64, u64)>) -> std::result::Result<Answer, String> {
        let mut request = self.agent.get(url);
        if let Some((from, to)) = range {
            request = request.header("Range", format!("bytes={from}-{to}"));
        }
        if let Some(token) = self.token {
            request = request.header("Authorization", format!("Bearer {token}"));
        }
        let response = request.call().map_err(|e| e.to_string())?;
        let begins = response.headers().get("content-range").and_then(|v| v.to_str().ok());
        let begins = begins.and_then(|v| v.strip_prefix("bytes ")?.split('-').next()?.parse().ok());
        let status = response.status().as_u16();
        Ok(Answer { status, begins, body: Box::new(response.into_body().into_reader()) })
    }

    /// A small answer as a whole; tries again after failures.
    pub fn get_small(&self, url: &str) -> Result<Vec<u8>> {
        let mut patience = Patience::new(self.settings);
        loop {
            let failure = match self.get(url, None) {
                Ok(answer) if answer.status == 200 => {
                    let mut bytes = Vec::new();
                    match answer.body.take(MOST_LISTING + 1).read_to_end(&mut bytes) {
                        Ok(_) if bytes.len() as u64 > MOST_LISTING => {
                            return Err(Error::wrong(url, "the listing has no end"));
                        }
                        Ok(_) => return Ok(bytes),
                        Err(e) => e.to_string(),
                    }
                }
                Ok(answer) => refused(url, answer.status)?,
                Err(e) => e,
            };
            patience.failed(url, failure)?;
        }
    }

    /// Fetches `remote` to `path`. What lies in `partial` from an earlier time is kept.
    pub fn fetch(&self, remote: &Remote, partial: &Path, path: &Path, listener: &Listener<'_>) -> Result<()> {
        listener(Progress::File(&remote.path));
        disk::make_parent(partial)?;
        disk::make_parent(path)?;
        for attempt in 1.. {
            self.fetch_parts(remote, partial, listener)?;
            match &remote.checksum {
                Some(checksum) if !checksum.holds(partial)? => {
                    listener(Progress::Undone(remote.size));
                    fs::remove_file(partial).map_err(|e| Error::disk(partial, e))?;
                    if attempt >= WHOLE_ATTEMPTS {
                        let what = "what arrives has another checksum than the server lists for it";
                        return Err(Error::wrong(&remote.url, what));
                    }
                }
                _ => break,
            }
        }
        fs::rename(partial, path).map_err(|e| Error::disk(path, e))
    }

    fn fetch_parts(&self, remote: &Remote, partial: &Path, listener: &Listener<'_>) -> Result<()> {
        let url = &remote.url;
        let fail = |e| Error::disk(partial, e);
        let mut file =
            File::options().create(true).truncate(false).write(true).open(partial).map_err(fail)?;
        let mut done = file.metadata().map_err(fail)?.len();
        if done > remote.size {
            file.set_len(0).map_err(fail)?;
            done = 0;
        }
        let mut patience = Patience::new(self.settings);
        while done < remote.size {
            let last = remote.size.min(done + self.settings.part.max(1)) - 1;
            let answer = match self.get(url, Some((done, last))) {
                Ok(answer) => answer,
                Err(e) => {
                    patience.failed(url, e)?;
                    continue;
                }
            };
            let end = match (answer.status, answer.begins) {
                (206, Some(begins)) if begins == done => last + 1,
                (206, begins) => {
                    patience.failed(url, format!("byte {done} was asked for and {begins:?} came"))?;
                    continue;
                }
                // A server that knows no parts sends all of it.
                (200, _) => {
                    listener(Progress::Undone(done));
                    done = 0;
                    file.set_len(0).map_err(fail)?;
                    remote.size
                }
                (status, _) => {
                    let failure = refused(url, status)?;
                    patience.failed(url, failure)?;
                    continue;
                }
            };
            let before = done;
            file.seek(SeekFrom::Start(done)).map_err(fail)?;
            let failure = receive(answer.body, &mut file, &mut done, end, listener).map_err(fail)?;
            // A server that sends everything anew, or byte by byte, makes no progress.
            if answer.status == 206 && (done == end || done - before >= PROGRESS) {
                patience = Patience::new(self.settings);
            }
            if done < end {
                patience.failed(url, failure.unwrap_or_else(|| "the connection was cut".into()))?;
            }
        }
        file.sync_all().map_err(fail)
    }
}

/// Writes what comes up to byte `end` of the file. The outer error is the disk's, the inner one the network's.
fn receive(
    mut body: impl Read,
    file: &mut File,
    done: &mut u64,
    end: u64,
    listener: &Listener<'_>,
) -> std::io::Result<Option<String>> {
    let mut buffer = vec![0; 256 << 10];
    while *done < end {
        let room = buffer.len().min((end - *done) as usize);
        match body.read(&mut buffer[..room]) {
            Ok(0) => break,
            Ok(n) => {
                file.write_all(&buffer[..n])?;
                *done += n as u64;
                listener(Progress::Bytes(n as u64));
            }
            Err(e) => return Ok(Some(e.to_string())),
        }
    }
    Ok(None)
}

struct Answer {
    status: u16,
    /// First byte of a part, where it is one.
    begins: Option<u64>,
    body: Box<dyn Read>,
}

/// Counts failures without progress, and waits between them.
struct Patience<'a> {
    settings: &'a Settings,
    failures: u32,
}

impl<'a> Patience<'a> {
    fn new(settings: &'a Settings) -> Self {
        Self { settings, failures: 0 }
    }

    fn failed(&mut self, url: &str, what: String) -> Result<()> {
        self.failures += 1;
        if self.failures >= self.settings.attempts {
            let what = format!("{what} ({} attempts; what has arrived is kept for the next)", self.failures);
            return Err(Error::Transfer { url: url.into(), what });
        }
        std::thread::sleep(self.settings.pause * 2u32.pow((self.failures - 1).min(6)));
        Ok(())
    }
}

/// What an answer that is no success means: an error, or a reason to try again.
fn refused(url: &str, status: u16) -> Result<String> {
    let what = match status {
        408 | 425 | 429 | 500..=599 => return Ok(format!("the server answered {status}")),
        401 | 403 => {
            "not without leave: for a model that is private or asks for its licence to be accepted, accept it on its page \
             and set HF_TOKEN to a token of yours (https://huggingface.co/settings/tokens)"
        }
        404 => "no such thing: check the name and the revision",
        416 => "the file is shorter than the server lists it",
        _ => "that is not what was expected",
    };
    Err(Error::Status { url: url.into(), status, what: what.into() })
}
