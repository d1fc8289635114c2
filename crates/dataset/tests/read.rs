//! A small dataset in two versions of the format; `make_fixtures.py` wrote them.

use std::fs;
use std::path::{Path, PathBuf};

use pi0_dataset::{Dataset, Rename};

fn fixture(version: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/data").join(version)
}

fn open(root: &Path) -> pi0_dataset::Result<Dataset> {
    Dataset::open(root, &Rename::default())
}

fn pixel(episode: usize, frame: usize, y: usize, x: usize, c: usize) -> u8 {
    (100 * episode + 10 * frame + 5 * y + 3 * x + 40 * c) as u8
}

#[test]
fn both_versions_hold_the_same() {
    for version in ["v21", "v30"] {
        let dataset = open(&fixture(version)).unwrap();
        assert_eq!(dataset.fps(), 10.0);
        assert_eq!(dataset.action_names(), ["go", "grip"]);
        let cameras = dataset.cameras();
        assert_eq!(
            (cameras.len(), cameras[0].key.as_str(), cameras[0].is_video),
            (1, "observation.images.top", false)
        );
        let lengths: Vec<usize> = dataset.episodes().iter().map(|episode| episode.length).collect();
        assert_eq!(lengths, [5, 3]);
        for meta in dataset.episodes() {
            let episode = dataset.episode(meta).unwrap();
            let e = meta.index as f64;
            for (frame, (state, action)) in episode.states.iter().zip(&episode.actions).enumerate() {
                assert_eq!(state, &[e, frame as f64, 0.5], "{version}");
                assert_eq!(action, &[frame as f64 / 8.0, e]);
            }
            let task = ["pick up the cup", "put it down"][meta.index];
            assert!(episode.tasks.iter().all(|said| said.as_deref() == Some(task)), "{:?}", episode.tasks);
            // In any order, and twice.
            let wanted = [2, 0, 2];
            let frames = dataset.pictures(meta, &episode, &cameras[0], &wanted, None).unwrap();
            for (frame, at) in frames.iter().zip(wanted) {
                assert_eq!((frame.height, frame.width), (6, 8));
                for (i, value) in frame.rgb.iter().enumerate() {
                    assert_eq!(*value, pixel(meta.index, at, i / 24, i / 3 % 8, i % 3), "{version} {at} {i}");
                }
            }
        }
    }
}

fn copy(from: &Path, to: &Path) {
    fs::create_dir_all(to).unwrap();
    for entry in fs::read_dir(from).unwrap() {
        let path = entry.unwrap().path();
        let target = to.join(path.file_name().unwrap());
        if path.is_dir() {
            copy(&path, &target);
        } else {
            fs::copy(&path, target).unwrap();
        }
    }
}

/// A copy of a fixture whose `meta/info.json` is changed.
fn changed(version: &str, from: &str, to: &str) -> tempfile::TempDir {
    let dir = tempfile::tempdir().unwrap();
    copy(&fixture(version), dir.path());
    let info = dir.path().join("meta/info.json");
    let text = fs::read_to_string(&info).unwrap();
    assert!(text.contains(from), "{text}");
    fs::write(&info, text.replace(from, to)).unwrap();
    dir
}

#[test]
fn mistakes_are_named() {
    for (from, to, word) in [
        ("\"v2.1\"", "\"v1.6\"", "version 1.6"),
        ("\"fps\": 10", "\"fps\": 0", "fps 0"),
        ("\"action\"", "\"torque\"", "torque"),
        ("data/chunk-", "../../etc/chunk-", "leaves the dataset"),
        ("{episode_index:06d}.parquet", "{secret}.parquet", "secret"),
        ("{episode_index:06d}.parquet", "{episode_index", "has no end"),
    ] {
        let dir = changed("v21", from, to);
        let error = open(dir.path()).unwrap_err().to_string();
        assert!(error.contains(word), "{word}: {error}");
    }
    let error = open(Path::new("/nowhere")).unwrap_err().to_string();
    assert!(error.contains("is it a lerobot dataset?"), "{error}");
    let rename = Rename { state: Some("joints".into()), action: None };
    let error = Dataset::open(&fixture("v30"), &rename).unwrap_err().to_string();
    assert!(error.contains("joints") && error.contains("observation.state"), "{error}");
}

#[test]
fn frames_that_meta_promises_must_be_there() {
    let dir = tempfile::tempdir().unwrap();
    copy(&fixture("v21"), dir.path());
    let episodes = dir.path().join("meta/episodes.jsonl");
    let text = fs::read_to_string(&episodes).unwrap().replace("\"length\": 5", "\"length\": 6");
    fs::write(&episodes, text).unwrap();
    let dataset = open(dir.path()).unwrap();
    let error = dataset.episode(&dataset.episodes()[0]).unwrap_err().to_string();
    assert!(error.contains("has 5 frames, meta says 6"), "{error}");
}

#[test]
fn numbers_beyond_belief_are_refused() {
    let dir = tempfile::tempdir().unwrap();
    copy(&fixture("v21"), dir.path());
    let episodes = dir.path().join("meta/episodes.jsonl");
    let text = fs::read_to_string(&episodes).unwrap();
    fs::write(&episodes, text.replace("\"length\": 5", "\"length\": 18446744073709551615")).unwrap();
    let error = open(dir.path()).unwrap_err().to_string();
    assert!(error.contains("not to be believed"), "{error}");
}

/// Whatever is in a file, reading it ends with a value or an error.
#[test]
fn damaged_files_are_errors() {
    let dir = tempfile::tempdir().unwrap();
    copy(&fixture("v21"), dir.path());
    let path = dir.path().join("data/chunk-000/episode_000000.parquet");
    let whole = fs::read(&path).unwrap();
    let mut failed = 0;
    for i in 0..200 {
        let mut bytes = whole.clone();
        if i % 4 == 0 {
            bytes.truncate(whole.len() * i / 200);
        } else {
            // Places and values without a pattern, the same in every run.
            let at = i * 7919 % bytes.len();
            bytes[at] ^= 1 << (i % 8);
        }
        fs::write(&path, bytes).unwrap();
        let dataset = open(dir.path()).unwrap();
        let meta = &dataset.episodes()[0];
        let read = dataset
            .episode(meta)
            .and_then(|episode| dataset.pictures(meta, &episode, &dataset.cameras()[0], &[0, 4], None));
        failed += usize::from(read.is_err());
    }
    assert!(failed > 50, "{failed}");
}
