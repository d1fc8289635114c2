//! Every way in which a checkpoint can be broken is an error, in bounded time and memory.

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use pi0_orbax::writer::{Options, Writer};
use pi0_orbax::{Dtype, Error, Tree};
use proptest::prelude::*;
use tempfile::TempDir;

/// The values of a test array: no two neighbours are alike.
fn values(n: usize) -> Vec<u8> {
    (0..n as u32).flat_map(|i| (i.wrapping_mul(0x9E37_79B9) >> 8).to_le_bytes()).collect()
}

/// Writes arrays of f32 in chunks, and returns what they hold.
fn write(dir: &Path, options: Options, arrays: &[(&str, Vec<usize>, Vec<usize>)]) -> Vec<Vec<u8>> {
    let mut writer = Writer::create(dir, options).unwrap();
    let mut all = Vec::new();
    for (name, shape, chunk) in arrays {
        let whole = values(shape.iter().product());
        let mut one = |at: &[usize], out: &mut dyn Write| {
            // Walks the chunk, padding included.
            let count: usize = chunk.iter().product();
            for i in 0..count {
                let (mut rest, mut inside, mut place, mut step) = (i, true, 0, 1);
                for axis in (0..shape.len()).rev() {
                    let x = at[axis] * chunk[axis] + rest % chunk[axis];
                    rest /= chunk[axis];
                    inside &= x < shape[axis];
                    place += x * step;
                    step *= shape[axis];
                }
                let value = if inside { &whole[4 * place..4 * place + 4] } else { &[0xEE; 4] };
                out.write_all(value)?;
            }
            Ok(())
        };
        writer.array(name, Dtype::F32, shape, chunk, &mut one).unwrap();
        all.push(whole);
    }
    writer.finish().unwrap();
    all
}

/// A checkpoint of two arrays in several chunks, some in the tree and some in files, with inner nodes.
fn small(inline: usize) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    let options = Options { inline, fanout: 3, ..Options::default() };
    let arrays = [("a/w", vec![3, 5, 7], vec![2, 5, 3]), ("b", vec![10], vec![4]), ("c", vec![], vec![])];
    write(dir.path(), options, &arrays);
    dir
}

/// Opens and reads everything.
fn read(dir: &Path) -> Result<Vec<Vec<u8>>, Error> {
    let tree = Tree::open(dir)?;
    tree.arrays.values().map(|a| a.read()).collect()
}

fn files(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in dir.read_dir().unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() { found.extend(files(&path)) } else { found.push(path) }
    }
    found.sort();
    found
}

#[test]
fn what_is_written_is_read() {
    let arrays = [
        ("m/x", vec![3, 5, 7], vec![2, 5, 3]),
        ("m/y", vec![64, 48], vec![64, 48]),
        ("m/z", vec![2, 33, 40], vec![1, 17, 40]),
        ("n", vec![], vec![]),
        ("o", vec![1000], vec![300]),
    ];
    for options in [
        Options::default(),
        Options { value: true, fanout: 2, inline: 0, ..Options::default() },
        Options { level: None, file_size: 100, ..Options::default() },
        Options { level: Some(19), inline: 1 << 20, fanout: 4, ..Options::default() },
    ] {
        let dir = tempfile::tempdir().unwrap();
        let want = write(dir.path(), options, &arrays);
        assert_eq!(read(dir.path()).unwrap(), want);
        // The names can be had from the keys as well.
        fs::remove_file(dir.path().join("_METADATA")).unwrap();
        assert_eq!(read(dir.path()).unwrap(), want);
    }
}

#[test]
fn every_flipped_byte_of_the_tree_is_noticed() {
    let dir = small(120);
    for name in ["manifest.ocdbt", "d/tree"] {
        let path = dir.path().join(name);
        let bytes = fs::read(&path).unwrap();
        for i in 0..bytes.len() {
            let mut damaged = bytes.clone();
            damaged[i] ^= 0x10;
            fs::write(&path, damaged).unwrap();
            assert!(read(dir.path()).is_err(), "byte {i} of {name}");
        }
        for length in (0..bytes.len()).step_by(7) {
            fs::write(&path, &bytes[..length]).unwrap();
            assert!(read(dir.path()).is_err(), "{name} cut to {length}");
        }
        fs::write(&path, bytes).unwrap();
    }
    read(dir.path()).unwrap();
}

#[test]
fn cut_and_missing_data_files_say_that_a_download_was_cut() {
    let dir = small(0);
    let data = files(&dir.path().join("ocdbt.process_0")).remove(0);
    let bytes = fs::read(&data).unwrap();
    for length in (0..bytes.len()).step_by(7) {
        fs::write(&data, &bytes[..length]).unwrap();
        let e = read(dir.path()).unwrap_err().to_string();
        assert!(e.contains("fetch it again") && e.contains("ocdbt.process_0"), "{e}");
    }
    fs::remove_file(&data).unwrap();
    assert!(matches!(read(dir.path()).unwrap_err(), Error::Read { .. }));
}

/// Puts the checksum and the length of a block right again, so that what it says is believed.
fn resealed(mut block: Vec<u8>) -> Vec<u8> {
    let length = block.len() as u64;
    block[4..12].copy_from_slice(&length.to_le_bytes());
    let end = block.len() - 4;
    let sum = crc32c::crc32c(&block[..end]);
    block[end..].copy_from_slice(&sum.to_le_bytes());
    block
}

/// A block with this body, not compressed.
fn block(magic: u32, body: &[u8]) -> Vec<u8> {
    let mut out = magic.to_be_bytes().to_vec();
    out.extend([0; 8]);
    out.extend([0, 0]);
    out.extend(body);
    out.extend([0; 4]);
    resealed(out)
}

/// A manifest whose root, of `height`, is the file `path` as a whole.
fn manifest(path: &str, length: usize, height: u8, keys: u8) -> Vec<u8> {
    let mut body = vec![0; 16];
    body.extend([0, 0, 0, 4, 0]);
    body.extend([1, path.len() as u8, 0]);
    body.extend(path.as_bytes());
    body.extend([1, 1, height, 0, 0]);
    let mut n = length;
    while n >= 0x80 {
        body.push(n as u8 | 0x80);
        n >>= 7;
    }
    body.push(n as u8);
    body.extend([keys, 0, 0]);
    body.extend([0; 8]);
    body.push(0);
    block(0x0CDB_3A2A, &body)
}

/// A directory with such a manifest and the file `root`.
fn forged(root: &[u8], height: u8, keys: u8) -> TempDir {
    let dir = tempfile::tempdir().unwrap();
    fs::write(dir.path().join("root"), root).unwrap();
    fs::write(dir.path().join("manifest.ocdbt"), manifest("root", root.len(), height, keys)).unwrap();
    dir
}

fn refused(dir: &TempDir, word: &str) {
    let e = Tree::open(dir.path()).unwrap_err().to_string();
    assert!(e.contains(word), "{word:?} in {e}");
}

/// A node of `height` with `n` children that are all the file `path` at 0, `length` long.
fn node(height: u8, path: &str, length: u8, n: u8) -> Vec<u8> {
    let mut body = vec![height, 1, path.len() as u8, 0];
    body.extend(path.as_bytes());
    body.push(n);
    body.extend(vec![0; usize::from(n) - 1]);
    body.extend(vec![1; usize::from(n)]);
    body.extend(vec![1; usize::from(n)]);
    body.extend((0..n).map(|i| b'a' + i));
    body.extend(vec![0; 2 * usize::from(n)]);
    body.extend(vec![length; usize::from(n)]);
    body.extend(vec![0; 3 * usize::from(n)]);
    block(0x0CDB_20DE, &body)
}

#[test]
fn cycles_and_explosions_end() {
    // A node that is its own child.
    let probe = node(9, "root", 0, 4).len() as u8;
    refused(&forged(&node(9, "root", probe, 4), 9, 1), "height");
    // Twenty levels, each with four children that are the same node: 4^20 paths.
    let dir = tempfile::tempdir().unwrap();
    for level in 1..=20u8 {
        let below = format!("n{:02}", level - 1);
        let length = if level == 1 { leaf(&[]).len() as u8 } else { node(2, "n00", 0, 4).len() as u8 };
        fs::write(dir.path().join(format!("n{level:02}")), node(level, &below, length, 4)).unwrap();
    }
    fs::write(dir.path().join("n00"), leaf(&[])).unwrap();
    let length = node(20, "n19", 0, 4).len();
    fs::write(dir.path().join("manifest.ocdbt"), manifest("n20", length, 20, 1)).unwrap();
    refused(&dir, "too large");
}

/// A leaf with these inline values.
fn leaf(entries: &[(&str, &[u8])]) -> Vec<u8> {
    let mut body = vec![0, 0, entries.len() as u8];
    body.extend(entries.iter().skip(1).map(|_| 0));
    body.extend(entries.iter().map(|e| e.0.len() as u8));
    entries.iter().for_each(|e| body.extend(e.0.as_bytes()));
    for e in entries {
        let n = e.1.len();
        if n < 128 { body.push(n as u8) } else { body.extend([(n & 127) as u8 | 128, (n >> 7) as u8]) }
    }
    body.extend(entries.iter().map(|_| 0));
    entries.iter().for_each(|e| body.extend(e.1));
    block(0x0CDB_20DE, &body)
}

#[test]
fn names_stay_inside_the_directory() {
    for path in ["../root", "/etc/passwd", "a/../../b", "a\\b", "./x", "a//b"] {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("manifest.ocdbt"), manifest(path, 50, 0, 1)).unwrap();
        refused(&dir, "leaves the database");
    }
    let dir = tempfile::tempdir().unwrap();
    let metadata = r#"{"tree_metadata": {"x": {"key_metadata": [{"key": "params"}, {"key": "../../etc"}]}}}"#;
    fs::write(dir.path().join("_METADATA"), metadata).unwrap();
    refused(&dir, "arrays are not there");
    fs::create_dir(dir.path().join("params.x")).unwrap();
    fs::write(dir.path().join("params.x/.zarray"), "{}").unwrap();
    refused(&dir, "leaves the directory");
}

#[test]
fn counts_that_nobody_could_have_written_are_refused() {
    let huge = [0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x01];
    let body = [&[0u8, 0][..], &huge].concat();
    refused(&forged(&block(0x0CDB_20DE, &body), 0, 1), "entries in");
    let body = [&[0u8, 0][..], &[0xFF; 11]].concat();
    refused(&forged(&block(0x0CDB_20DE, &body), 0, 1), "64 bits");
    refused(&forged(&leaf(&[("b", b""), ("a", b"")]), 0, 2), "out of order");
    refused(&forged(&leaf(&[("a", b"")]), 0, 2), "counts 2 keys");
    refused(&forged(&leaf(&[("a", b"")]), 1, 1), "height");
}

#[test]
fn descriptions_that_cannot_be_are_refused() {
    let zarray = |shape: &str, chunks: &str, more: &str| {
        format!(
            r#"{{"zarr_format":2,"shape":{shape},"chunks":{chunks},"dtype":"<f4","order":"C","fill_value":0.0{more}}}"#
        )
    };
    let plain = r#","compressor":{"id":"zstd"}"#;
    for (json, word) in [
        (zarray("[18446744073709551615]", "[1]", plain), "too large"),
        (zarray("[1000000000000,1000000000000]", "[1,1]", plain), "shape"),
        (zarray("[1000000000]", "[1]", plain), "more than"),
        (zarray("[4]", "[0]", plain), "chunks"),
        (zarray("[4]", "[1000000000000]", plain), "chunks"),
        (zarray("[4]", "[2,2]", plain), "chunks"),
        (zarray("[-1]", "[1]", plain), "invalid value"),
        (zarray("[1000000,40000]", "[1000000,40000]", plain), "are stored"),
        (zarray("[4]", "[4]", r#","compressor":{"id":"blosc"}"#), "blosc"),
        (zarray("[4]", "[4]", r#","filters":[{"id":"delta"}]"#), "filters"),
        (zarray("[4]", "[4]", plain).replace("<f4", ">f4"), ">f4"),
        (zarray("[2,2]", "[2,2]", plain).replace("\"C\"", "\"F\""), "order"),
        ("{".into(), "EOF"),
        ("[]".into(), "invalid"),
    ] {
        let dir = forged(&leaf(&[("params.x/.zarray", json.as_bytes())]), 0, 1);
        refused(&dir, word);
    }
}

#[test]
fn a_chunk_is_as_long_as_its_description_says() {
    let json = br#"{"zarr_format":2,"shape":[64],"chunks":[64],"dtype":"<f4","order":"C","fill_value":null,"compressor":{"id":"zstd"}}"#;
    let error = |chunk: &[u8]| {
        let dir = forged(&leaf(&[("params.x/.zarray", json), ("params.x/0", chunk)]), 0, 2);
        read(dir.path()).unwrap_err().to_string()
    };
    let packed = |n: usize| zstd::bulk::compress(&values(n)[..4 * n], 1).unwrap();
    assert!(error(&packed(63)).contains("less than its 256 bytes"));
    assert!(error(&packed(65)).contains("more than its 256 bytes"));
    assert!(error(&packed(64)[..100]).contains("ends early"));
    assert!(error(&[packed(64), vec![0]].concat()).contains("follow"));
    assert!(error(b"not a frame").contains("decompressed"));
    let dir = forged(&leaf(&[("params.x/.zarray", json)]), 0, 1);
    assert!(read(dir.path()).unwrap_err().to_string().contains("not stored"));
    // A bomb: a gigabyte of zeros in a few kilobytes is not even begun.
    let bomb = zstd::bulk::compress(&vec![0; 1 << 20], 19).unwrap();
    assert!(error(&bomb).contains("more than its 256 bytes"));
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    /// Any change of any file, blocks sealed again so that their contents are believed: an error or some values.
    #[test]
    fn no_damage_panics(
        file in any::<prop::sample::Index>(),
        changes in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..4),
        cut in prop::option::of(any::<prop::sample::Index>()),
        seal in any::<bool>(),
    ) {
        let dir = plain();
        let all = files(dir.path());
        let path = &all[file.index(all.len())];
        let mut bytes = fs::read(path).unwrap();
        for (at, byte) in changes {
            let at = at.index(bytes.len());
            bytes[at] = byte;
        }
        if let Some(cut) = cut {
            bytes.truncate(cut.index(bytes.len()));
        }
        let name = path.file_name().unwrap().to_str().unwrap();
        if seal && (name == "root" || name == "manifest.ocdbt") && bytes.len() > 20 {
            bytes = resealed(bytes);
        }
        fs::write(path, bytes).unwrap();
        let _ = read(dir.path());
    }

    /// Nor does any description of an array.
    #[test]
    fn no_description_panics(
        shape in prop::collection::vec(0u64..20, 0..4),
        chunks in prop::collection::vec(0u64..20, 0..4),
        text in "[a-z0-9<>|\"{}:,]{0,12}",
    ) {
        let json = format!(
            r#"{{"zarr_format":2,"shape":{shape:?},"chunks":{chunks:?},"dtype":"<f4","order":"C","fill_value":1.5,"compressor":null}}"#
        );
        let dir = forged(&leaf(&[("params.x/.zarray", json.as_bytes())]), 0, 1);
        let _ = read(dir.path());
        let json = json.replace("null", &text);
        let dir = forged(&leaf(&[("params.x/.zarray", json.as_bytes())]), 0, 1);
        let _ = read(dir.path());
    }
}

/// One array in a database whose blocks are not compressed.
fn plain() -> TempDir {
    let json = br#"{"zarr_format":2,"shape":[3,4],"chunks":[2,4],"dtype":"<f4","order":"C","fill_value":null,"compressor":{"id":"zstd"}}"#;
    let chunk = zstd::bulk::compress(&values(8), 1).unwrap();
    let entries: [(&str, &[u8]); 3] =
        [("params.x/.zarray", json), ("params.x/0.0", &chunk), ("params.x/1.0", &chunk)];
    forged(&leaf(&entries), 0, 3)
}
