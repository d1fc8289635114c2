//! Fetching from servers on this machine that are well, and from ones that drop, truncate, stall, redirect and lie.

use std::collections::{BTreeMap, HashMap};
use std::io::{BufRead, BufReader, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use pi0_fetch::{Address, Error, Progress, Settings, fetch};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

/// What a server does with a request for a file.
#[derive(Debug, Clone, Copy, PartialEq)]
enum Mood {
    Well,
    /// Hangs up after so many bytes of a part, so many times in all.
    Cut {
        after: usize,
        times: usize,
    },
    /// Sends one byte and then nothing.
    Stall,
    /// Knows no parts of files.
    Whole,
    /// Knows no parts, and hangs up in the middle of everything.
    WholeAndCut,
    /// Sends another part than was asked for.
    OtherPart,
    /// Sends other bytes than those listed.
    Lie,
    /// Sends them the first time only.
    LieOnce,
    /// Answers 503 so many times.
    Busy(usize),
    /// Refuses.
    Refuse(u16),
    /// Points to another server.
    Redirect(u16),
    /// Points to itself for ever.
    Loop,
}

/// One request.
#[derive(Debug, Clone)]
struct Request {
    path: String,
    headers: HashMap<String, String>,
}

/// A server: files by path, and what it was asked.
struct Server {
    port: u16,
    asked: Arc<Mutex<Vec<Request>>>,
}

impl Server {
    fn start(files: BTreeMap<String, Vec<u8>>, mood: Mood) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let port = listener.local_addr().unwrap().port();
        let asked = Arc::new(Mutex::new(Vec::new()));
        let (log, counts) = (asked.clone(), Arc::new(Mutex::new(0usize)));
        std::thread::spawn(move || {
            for stream in listener.incoming().flatten() {
                let (files, log, counts) = (files.clone(), log.clone(), counts.clone());
                std::thread::spawn(move || drop(answer(stream, &files, mood, &log, &counts, port)));
            }
        });
        Self { port, asked }
    }

    fn url(&self) -> String {
        format!("http://127.0.0.1:{}", self.port)
    }

    fn asked(&self, part: &str) -> Vec<Request> {
        self.asked.lock().unwrap().iter().filter(|r| r.path.contains(part)).cloned().collect()
    }
}

fn answer(
    mut stream: TcpStream,
    files: &BTreeMap<String, Vec<u8>>,
    mood: Mood,
    log: &Mutex<Vec<Request>>,
    counts: &Mutex<usize>,
    port: u16,
) -> std::io::Result<()> {
    let mut reader = BufReader::new(stream.try_clone()?);
    let mut line = String::new();
    reader.read_line(&mut line)?;
    let path = line.split(' ').nth(1).unwrap_or_default().to_string();
    let mut headers = HashMap::new();
    loop {
        let mut line = String::new();
        if reader.read_line(&mut line)? == 0 || line.trim().is_empty() {
            break;
        }
        if let Some((name, value)) = line.split_once(':') {
            headers.insert(name.to_lowercase(), value.trim().to_string());
        }
    }
    let range = headers.get("range").cloned();
    log.lock().unwrap().push(Request { path: path.clone(), headers });
    let Some(body) = files.get(&path) else {
        return write!(stream, "HTTP/1.1 404 Not Found\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
    };
    let range = range.and_then(|r| {
        let (from, to) = r.strip_prefix("bytes=")?.split_once('-')?;
        Some((from.parse::<usize>().ok()?, to.parse::<usize>().ok()?))
    });
    let count = {
        let mut counts = counts.lock().unwrap();
        *counts += usize::from(range.is_some());
        *counts
    };
    // Listings are always answered well.
    let mood = if range.is_some() { mood } else { Mood::Well };
    let mut body = body.clone();
    match mood {
        Mood::Refuse(status) => {
            return write!(stream, "HTTP/1.1 {status} No\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
        Mood::Busy(times) if count <= times => {
            return write!(stream, "HTTP/1.1 503 Busy\r\nContent-Length: 0\r\nConnection: close\r\n\r\n");
        }
        Mood::Redirect(port) => {
            return write!(
                stream,
                "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:{port}{path}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            );
        }
        Mood::Loop => {
            return write!(
                stream,
                "HTTP/1.1 302 Found\r\nLocation: http://127.0.0.1:{port}{path}\r\nContent-Length: 0\r\nConnection: close\r\n\r\n"
            );
        }
        Mood::Lie => body[0] ^= 1,
        Mood::LieOnce if count == 1 => body[0] ^= 1,
        _ => {}
    }
    let (from, to) = match (range, mood) {
        (Some((from, to)), Mood::OtherPart) => (from + 1, to.min(body.len() - 1)),
        (Some((from, to)), _) => (from, to.min(body.len() - 1)),
        (None, _) => (0, body.len().saturating_sub(1)),
    };
    if range.is_some() && !matches!(mood, Mood::Whole | Mood::WholeAndCut) {
        body = body.get(from..=to).unwrap_or_default().to_vec();
        write!(stream, "HTTP/1.1 206 Partial\r\nContent-Range: bytes {from}-{to}/*\r\n")?;
    } else {
        write!(stream, "HTTP/1.1 200 OK\r\n")?;
    }
    write!(stream, "Content-Length: {}\r\nConnection: close\r\n\r\n", body.len())?;
    match mood {
        Mood::Cut { after, times } if count <= times => stream.write_all(&body[..after.min(body.len())]),
        Mood::WholeAndCut => stream.write_all(&body[..body.len() / 2]),
        Mood::Stall => {
            stream.write_all(&body[..1])?;
            std::thread::sleep(Duration::from_secs(20));
            Ok(())
        }
        _ => stream.write_all(&body),
    }
}

fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|b| format!("{b:02x}")).collect()
}

fn base64(bytes: [u8; 4]) -> String {
    const DIGITS: &[u8] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let n = u64::from(u32::from_be_bytes(bytes)) << 4;
    let digits: String = (0..6).rev().map(|i| DIGITS[(n >> (6 * i) & 63) as usize] as char).collect();
    format!("{digits}==")
}

fn weights() -> Vec<u8> {
    (0..300_000u32).flat_map(|i| i.wrapping_mul(2_654_435_761).to_le_bytes()).collect()
}

const COMMIT: &str = "0123456789abcdef0123456789abcdef01234567";

/// A hub with one model of two files, and other programs' weights that nobody needs.
fn hub() -> BTreeMap<String, Vec<u8>> {
    let (config, weights) = (b"{\"type\": \"pi0\"}".to_vec(), weights());
    let id = hex(&sha1_of(&config));
    let listing = format!(
        r#"{{"sha": "{COMMIT}", "siblings": [
            {{"rfilename": "config.json", "size": {}, "blobId": "{id}"}},
            {{"rfilename": "a/model.safetensors", "size": 134, "blobId": "00", "lfs": {{"sha256": "{}", "size": {}}}}},
            {{"rfilename": "tokenizer.json", "size": {}, "blobId": "{id}"}},
            {{"rfilename": "pytorch_model.bin", "size": 9, "blobId": "{id}"}}]}}"#,
        config.len(),
        hex(&Sha256::digest(&weights)),
        weights.len(),
        config.len(),
    );
    let file = |path: &str| format!("/lerobot/pi0_base/resolve/{COMMIT}/{path}");
    BTreeMap::from([
        ("/api/models/lerobot/pi0_base/revision/main?blobs=true".into(), listing.into_bytes()),
        (file("config.json"), config.clone()),
        (file("tokenizer.json"), config),
        (file("a/model.safetensors"), weights),
    ])
}

fn sha1_of(content: &[u8]) -> Vec<u8> {
    use sha1::Sha1;
    let mut sha = Sha1::new();
    sha.update(format!("blob {}\0", content.len()));
    sha.update(content);
    sha.finalize().to_vec()
}

/// A bucket with a checkpoint in `checkpoints/pi0_x` and the tokenizer in another bucket.
fn bucket() -> BTreeMap<String, Vec<u8>> {
    let mut files = BTreeMap::new();
    let mut list = |bucket: &str, prefix: &str, objects: &[(&str, Vec<u8>)]| {
        let items: Vec<_> = objects
            .iter()
            .map(|(name, bytes)| {
                let sum = base64(crc32c::crc32c(bytes).to_be_bytes());
                format!(r#"{{"name": "{name}", "size": "{}", "crc32c": "{sum}"}}"#, bytes.len())
            })
            .collect();
        let fields = "&fields=items(name,size,crc32c),nextPageToken";
        let page = |items: &[String], more: &str| {
            format!(r#"{{"items": [{}]{more}}}"#, items.join(",")).into_bytes()
        };
        let address = format!("/storage/v1/b/{bucket}/o?prefix={prefix}{fields}");
        if items.len() > 1 {
            files.insert(address.clone(), page(&items[..1], r#", "nextPageToken": "a+b""#));
            files.insert(format!("{address}&pageToken=a%2Bb"), page(&items[1..], ""));
        } else {
            files.insert(address, page(&items, ""));
        }
        for (name, bytes) in objects {
            files.insert(format!("/{bucket}/{name}"), bytes.clone());
        }
    };
    list(
        "openpi-assets",
        "checkpoints/pi0_x/",
        &[
            ("checkpoints/pi0_x/", vec![]),
            ("checkpoints/pi0_x/assets/trossen/norm_stats.json", b"{}".to_vec()),
            ("checkpoints/pi0_x/params/d/0a", weights()),
            ("checkpoints/pi0_x/params/commit_success.txt", vec![]),
            ("checkpoints/pi0_x/train_state/d/1", vec![1; 10]),
        ],
    );
    list("big_vision", "paligemma_tokenizer.model", &[("paligemma_tokenizer.model", b"pieces".to_vec())]);
    files
}

fn settings(server: &Server, home: &Path) -> Settings {
    Settings {
        hub: server.url(),
        hub_cache: home.join("hub"),
        token: None,
        offline: false,
        storage: server.url(),
        openpi_cache: home.join("openpi"),
        part: 200_000,
        answer: Duration::from_secs(5),
        part_time: Duration::from_secs(1),
        attempts: 4,
        pause: Duration::from_millis(1),
    }
}

fn model() -> Address {
    Address::parse("hf://lerobot/pi0_base").unwrap().unwrap()
}

fn checkpoint() -> Address {
    Address::parse("gs://openpi-assets/checkpoints/pi0_x").unwrap().unwrap()
}

fn quietly(address: &Address, settings: &Settings) -> Result<std::path::PathBuf, Error> {
    fetch(address, settings, &|_| ())
}

fn home() -> TempDir {
    tempfile::tempdir().unwrap()
}

#[test]
fn the_hubs_cache_looks_as_the_hubs_own_program_makes_it() {
    let (server, home) = (Server::start(hub(), Mood::Well), home());
    let heard = Mutex::new((0u64, 0u64));
    let listener = |p: Progress<'_>| match p {
        Progress::Total(n) => heard.lock().unwrap().0 += n,
        Progress::Bytes(n) => heard.lock().unwrap().1 += n,
        _ => {}
    };
    let directory = fetch(&model(), &settings(&server, home.path()), &listener).unwrap();
    let root = home.path().join("hub/models--lerobot--pi0_base");
    assert_eq!(directory, root.join("snapshots").join(COMMIT));
    assert_eq!(std::fs::read(directory.join("a/model.safetensors")).unwrap(), weights());
    assert_eq!(std::fs::read_to_string(root.join("refs/main")).unwrap(), COMMIT);
    assert!(root.join("blobs").join(hex(&Sha256::digest(weights()))).is_file());
    assert!(!directory.join("pytorch_model.bin").exists());
    let (total, arrived) = *heard.lock().unwrap();
    // Both small files are one blob, counted twice and fetched once.
    assert!(total >= arrived && arrived >= weights().len() as u64, "{total} {arrived}");
    // Parts were asked for, and nothing is asked for twice.
    assert_eq!(server.asked("a/model.safetensors").len(), weights().len().div_ceil(200_000));
    let before = server.asked("resolve").len();
    assert_eq!(quietly(&model(), &settings(&server, home.path())).unwrap(), directory);
    assert_eq!(server.asked("resolve").len(), before);
    // Without the network the same folder, and an error for what is not there.
    let offline =
        Settings { offline: true, hub: "http://127.0.0.1:1".into(), ..settings(&server, home.path()) };
    assert_eq!(quietly(&model(), &offline).unwrap(), directory);
    let other = Address::parse("hf://a/b").unwrap().unwrap();
    assert!(matches!(quietly(&other, &offline).unwrap_err(), Error::Offline { .. }));
}

#[test]
fn a_bucket_becomes_a_folder_with_a_tokenizer_beside() {
    let (server, home) = (Server::start(bucket(), Mood::Well), home());
    let directory = quietly(&checkpoint(), &settings(&server, home.path())).unwrap();
    assert_eq!(directory, home.path().join("openpi/openpi-assets/checkpoints/pi0_x"));
    assert_eq!(std::fs::read(directory.join("params/d/0a")).unwrap(), weights());
    assert_eq!(std::fs::read(directory.join("params/commit_success.txt")).unwrap(), b"");
    assert_eq!(std::fs::read(directory.join("paligemma_tokenizer.model")).unwrap(), b"pieces");
    assert!(!directory.join("train_state").exists());
    let asked = server.asked("").len();
    quietly(&checkpoint(), &settings(&server, home.path())).unwrap();
    assert_eq!(server.asked("").len(), asked, "what is whole asks nobody");
    let missing = Address::parse("gs://openpi-assets/checkpoints/pi0_y").unwrap().unwrap();
    assert!(quietly(&missing, &settings(&server, home.path())).is_err());
}

#[test]
fn cut_and_busy_transfers_go_on_where_they_ended() {
    for mood in [Mood::Cut { after: 100_000, times: 8 }, Mood::Busy(2), Mood::Whole, Mood::LieOnce] {
        let (server, home) = (Server::start(hub(), mood), home());
        let directory =
            quietly(&model(), &settings(&server, home.path())).unwrap_or_else(|e| panic!("{mood:?}: {e}"));
        assert_eq!(std::fs::read(directory.join("a/model.safetensors")).unwrap(), weights(), "{mood:?}");
    }
    // Another run goes on as well: what the first left is not fetched again.
    let home = home();
    let broken = Server::start(hub(), Mood::Cut { after: 70_000, times: usize::MAX });
    let patient = Settings { part: 100_000, attempts: 1, ..settings(&broken, home.path()) };
    assert!(matches!(quietly(&model(), &patient).unwrap_err(), Error::Transfer { .. }));
    let server = Server::start(hub(), Mood::Well);
    quietly(&model(), &settings(&server, home.path())).unwrap();
    let first = &server.asked("a/model.safetensors")[0];
    assert!(first.headers["range"].starts_with("bytes=70000-"), "{first:?}");
}

#[test]
fn servers_that_never_deliver_are_given_up_in_bounded_time() {
    for (mood, words) in [
        (Mood::Stall, &["attempts"][..]),
        (Mood::WholeAndCut, &["attempts"]),
        (Mood::OtherPart, &["was asked for"]),
        (Mood::Lie, &["another checksum"]),
        (Mood::Busy(usize::MAX), &["503", "attempts"]),
        (Mood::Loop, &["attempts"]),
        (Mood::Refuse(404), &["404", "check the name"]),
        (Mood::Refuse(401), &["401", "HF_TOKEN"]),
        (Mood::Refuse(418), &["418"]),
    ] {
        let (server, home) = (Server::start(hub(), mood), home());
        let start = Instant::now();
        let e = quietly(&model(), &settings(&server, home.path())).unwrap_err().to_string();
        assert!(words.iter().all(|w| e.contains(w)), "{mood:?}: {e}");
        assert!(start.elapsed() < Duration::from_secs(15), "{mood:?} took {:?}", start.elapsed());
        assert!(server.asked("").len() < 40, "{mood:?} asked {} times", server.asked("").len());
        // Nothing half fetched looks whole.
        assert!(!home.path().join("hub/models--lerobot--pi0_base/refs/main").exists());
    }
}

#[test]
fn a_token_goes_to_the_hub_and_no_further() {
    let storage = Server::start(hub(), Mood::Well);
    let (server, home) = (Server::start(hub(), Mood::Redirect(storage.port)), home());
    let settings = Settings { token: Some("hf_secret".into()), ..settings(&server, home.path()) };
    quietly(&model(), &settings).unwrap();
    assert!(server.asked("").iter().all(|r| r.headers["authorization"] == "Bearer hf_secret"));
    let passed_on = storage.asked("");
    assert!(!passed_on.is_empty() && passed_on.iter().all(|r| !r.headers.contains_key("authorization")));
}

#[test]
fn listings_that_lie_are_refused() {
    let address = "/api/models/lerobot/pi0_base/revision/main?blobs=true";
    let sha = "0".repeat(64);
    let of = |name: &str, size: &str, sha: &str, commit: &str| {
        format!(
            r#"{{"sha": "{commit}", "siblings": [{{"rfilename": "{name}", "lfs": {{"sha256": "{sha}", "size": {size}}}}}]}}"#
        )
    };
    for (listing, word) in [
        (of("../../x", "1", &sha, COMMIT), "leaves its folder"),
        (of("/etc/x", "1", &sha, COMMIT), "leaves its folder"),
        (of("a", "1", "../../../../../../../../../../../etc/passwd_and_so_on", COMMIT), "checksum"),
        (of("a", "1", &sha, "../../x"), "commit"),
        (of("a", "-1", &sha, COMMIT), "not the hub's"),
        (of("a", "9000000000000000000", &sha, COMMIT), "room"),
        ("[]".into(), "not the hub's"),
        ("{".into(), "not the hub's"),
        (" ".repeat(33 << 20), "no end"),
    ] {
        let (server, home) =
            (Server::start(BTreeMap::from([(address.into(), listing.into_bytes())]), Mood::Well), home());
        let e = quietly(&model(), &settings(&server, home.path())).unwrap_err().to_string();
        assert!(e.contains(word), "{word}: {e}");
    }
    let page = |item: &str| {
        let address = "/storage/v1/b/openpi-assets/o?prefix=checkpoints/pi0_x/&fields=items(name,size,crc32c),nextPageToken";
        BTreeMap::from([(address.to_string(), format!(r#"{{"items": [{item}]}}"#).into_bytes())])
    };
    for (item, word) in [
        (r#"{"name": "checkpoints/pi0_x/../../x", "size": "1", "crc32c": "4waSgw=="}"#, "leaves its folder"),
        (r#"{"name": "other", "size": "1", "crc32c": "4waSgw=="}"#, "not asked for"),
        (r#"{"name": "checkpoints/pi0_x/a", "size": "-1", "crc32c": "4waSgw=="}"#, "size"),
        (r#"{"name": "checkpoints/pi0_x/a", "size": "1"}"#, "no checksum"),
        (r#"{"name": "checkpoints/pi0_x/a", "size": "1", "crc32c": "4wa"}"#, "no checksum"),
        ("", "nothing is there"),
    ] {
        let (server, home) = (Server::start(page(item), Mood::Well), home());
        let e = quietly(&checkpoint(), &settings(&server, home.path())).unwrap_err().to_string();
        assert!(e.contains(word), "{word}: {e}");
    }
}

#[test]
fn without_a_tokenizer_the_gated_one_is_explained() {
    let mut files = bucket();
    files.retain(|path, _| !path.contains("big_vision"));
    let (server, home) = (Server::start(files, Mood::Well), home());
    let notes = Mutex::new(String::new());
    let listener = |p: Progress<'_>| {
        if let Progress::Note(text) = p {
            *notes.lock().unwrap() += &text;
        }
    };
    fetch(&checkpoint(), &settings(&server, home.path()), &listener).unwrap();
    let notes = notes.into_inner().unwrap();
    assert!(notes.contains("--tokenizer FILE"), "{notes}");
}

#[test]
fn processes_that_want_the_same_wait_for_each_other() {
    let (server, home) = (Server::start(hub(), Mood::Well), home());
    let settings = settings(&server, home.path());
    let directories: Vec<_> = std::thread::scope(|scope| {
        let threads: Vec<_> = (0..4).map(|_| scope.spawn(|| quietly(&model(), &settings).unwrap())).collect();
        threads.into_iter().map(|t| t.join().unwrap()).collect()
    });
    assert!(directories.iter().all(|d| *d == directories[0]));
    assert_eq!(server.asked("a/model.safetensors").len(), weights().len().div_ceil(200_000));
}
