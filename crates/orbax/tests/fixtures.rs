//! Checkpoints that Orbax wrote, against what was in them, bit for bit.
//!
//! Those in `golden/orbax` are always read; set `PI0_ORBAX` to a directory with a `cases.json` and more of them, as
//! `golden/orbax/README.md` describes, to read those too.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use pi0_orbax::{Dtype, Reader, Tree};

/// Format, shape and CRC-32C of the bytes of each array.
type Truth = BTreeMap<String, (String, Vec<usize>, u32)>;

fn golden() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../golden/orbax")
}

fn code(dtype: Dtype) -> &'static str {
    match dtype {
        Dtype::F32 => "F32",
        Dtype::Bf16 => "BF16",
        Dtype::F16 => "F16",
        Dtype::Other(name, _) => name,
    }
}

fn compare(params: &Path, truth: &Truth) {
    let tree = Tree::open(params).unwrap_or_else(|e| panic!("{e}"));
    let names: Vec<_> = tree.arrays.keys().collect();
    assert_eq!(names, truth.keys().collect::<Vec<_>>(), "{}", params.display());
    for (name, array) in &tree.arrays {
        let bytes = array.read().unwrap_or_else(|e| panic!("{name}: {e}"));
        let got = (code(array.dtype()).to_string(), array.shape().to_vec(), crc32c::crc32c(&bytes));
        assert_eq!(got, truth[name], "{name} in {}", params.display());
    }
}

/// The upper halves of f32s.
fn upper(from: &[u8], to: &mut [u8]) {
    for (from, to) in from.chunks_exact(4).zip(to.chunks_exact_mut(2)) {
        to.copy_from_slice(&from[2..]);
    }
}

/// Reads every chunk by itself, below each index of the first axis and all at once, and compares with the whole.
/// How many chunks there were.
fn parts(params: &Path) -> usize {
    let mut count = 0;
    for (name, array) in &Tree::open(params).unwrap().arrays {
        let (shape, chunk, size) = (array.shape(), array.chunk(), array.dtype().size());
        if shape.iter().zip(chunk).any(|(n, c)| !n.is_multiple_of(*c)) {
            continue;
        }
        let whole = array.read().unwrap();
        for leading in 0..=shape.len().min(1) {
            let (outer, inner) = shape.split_at(leading);
            let grid: Vec<usize> = inner.iter().zip(&chunk[leading..]).map(|(n, c)| n / c).collect();
            let values: usize = chunk[leading..].iter().product();
            let mut reader = Reader::new(array.clone());
            for (index, number) in (0..outer.iter().product())
                .flat_map(|i: usize| (0..grid.iter().product()).map(move |n: usize| (i, n)))
            {
                let mut part = vec![0; grid.len()];
                let mut rest = number;
                for (p, n) in part.iter_mut().zip(&grid).rev() {
                    (*p, rest) = (rest % n, rest / n);
                }
                let at = if leading == 0 { vec![] } else { vec![index] };
                let mut got = vec![0; values * size];
                reader.read_part(&at, &part, None, &mut got).unwrap_or_else(|e| panic!("{name}: {e}"));
                // Value by value from the whole.
                let mut want = Vec::with_capacity(got.len());
                for value in 0..values {
                    let (mut rest, mut place, mut stride) = (value, 0, 1);
                    for ((n, c), p) in inner.iter().zip(&chunk[leading..]).zip(&part).rev() {
                        place += (p * c + rest % c) * stride;
                        (rest, stride) = (rest / c, stride * n);
                    }
                    want.extend_from_slice(&whole[(index * stride + place) * size..][..size]);
                }
                assert!(got == want, "{name} at {at:?}, chunk {part:?}");
                if size == 4 {
                    let (mut half, mut rounded) = (vec![0; 2 * values], vec![0; 2 * values]);
                    upper(&want, &mut half);
                    reader.read_part(&at, &part, Some(upper), &mut rounded).unwrap();
                    assert!(half == rounded, "{name} at {at:?}, chunk {part:?}");
                }
                count += 1;
            }
        }
    }
    count
}

#[test]
fn chunks_are_read_by_themselves() {
    let chunks: Vec<usize> = ["deep", "missing_chunks", "pi05_base", "pi0_base", "pi0_lora"]
        .map(|n| parts(&golden().join(n).join("params")))
        .into();
    assert!(chunks.iter().all(|n| *n > 60), "{chunks:?}");
}

#[test]
fn every_fixture_is_read_bit_for_bit() {
    let text = std::fs::read_to_string(golden().join("truth.json")).unwrap();
    let truths: BTreeMap<String, Truth> = serde_json::from_str(&text).unwrap();
    assert_eq!(truths.len(), 5);
    for (name, truth) in truths {
        compare(&golden().join(name).join("params"), &truth);
    }
}

/// The tensors of a safetensors file.
fn safetensors(path: &Path) -> Truth {
    let bytes = std::fs::read(path).unwrap();
    let length = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
    let (header, data) = bytes[8..].split_at(length);
    let header: BTreeMap<String, serde_json::Value> = serde_json::from_slice(header).unwrap();
    let one = |(name, v): (String, serde_json::Value)| {
        let sizes = |key: &str| serde_json::from_value::<Vec<usize>>(v[key].clone()).unwrap();
        let range = sizes("data_offsets");
        let sum = crc32c::crc32c(&data[range[0]..range[1]]);
        (name, (v["dtype"].as_str().unwrap().to_string(), sizes("shape"), sum))
    };
    header.into_iter().filter(|(name, _)| name != "__metadata__").map(one).collect()
}

#[test]
fn the_fixtures_that_are_not_in_the_repository() {
    let Some(root) = std::env::var_os("PI0_ORBAX").map(PathBuf::from) else {
        eprintln!("skipped: Orbax fixtures outside the repository (set PI0_ORBAX=DIR)");
        return;
    };
    let cases = std::fs::read_to_string(root.join("cases.json")).unwrap();
    let cases: Vec<BTreeMap<String, serde_json::Value>> = serde_json::from_str(&cases).unwrap();
    assert!(!cases.is_empty());
    for case in cases {
        let file = |key: &str| root.join(case[key].as_str().unwrap());
        compare(&file("params"), &safetensors(&file("truth_jax")));
        println!("{} equal", case["name"]);
    }
    // The merged database lost: the union of what the processes wrote.
    let temporary = tempfile::tempdir().unwrap();
    let params = root.join("train_fast_two_hosts/1999/params");
    if params.is_dir() {
        for name in ["_METADATA", "ocdbt.process_0", "ocdbt.process_1"] {
            copy(&params.join(name), &temporary.path().join(name));
        }
        compare(temporary.path(), &safetensors(&root.join("truth/pf.f32.jax.safetensors")));
    }
}

fn copy(from: &Path, to: &Path) {
    if from.is_file() {
        std::fs::write(to, std::fs::read(from).unwrap()).unwrap();
        return;
    }
    std::fs::create_dir_all(to).unwrap();
    for entry in from.read_dir().unwrap() {
        let entry = entry.unwrap();
        copy(&entry.path(), &to.join(entry.file_name()));
    }
}

#[test]
fn without_the_merged_manifest_the_databases_of_the_processes_are_read() {
    let text = std::fs::read_to_string(golden().join("truth.json")).unwrap();
    let truths: BTreeMap<String, Truth> = serde_json::from_str(&text).unwrap();
    let temporary = tempfile::tempdir().unwrap();
    let params = golden().join("pi0_base/params");
    for name in ["_METADATA", "ocdbt.process_0"] {
        copy(&params.join(name), &temporary.path().join(name));
    }
    compare(temporary.path(), &truths["pi0_base"]);
}

#[test]
fn sub_arrays_come_in_any_order_of_axes() {
    let tree = Tree::open(&golden().join("deep/params")).unwrap();
    let array = &tree.arrays["PaliGemma/llm/layers/attn/q_einsum/w"];
    let (whole, size) = (array.read().unwrap(), array.dtype().size());
    let [layers, heads, depth, width] = array.shape()[..] else { panic!("{:?}", array.shape()) };
    let mut reader = Reader::new(array.clone());
    // Forward through the layers, then back to the first.
    for layer in (0..layers).chain([0]) {
        let mut out = vec![0; heads * depth * width * size];
        reader.read(&[layer], &[depth * width, 1, depth], &mut out).unwrap();
        for (h, d, w) in
            (0..heads).flat_map(|h| (0..depth).flat_map(move |d| (0..width).map(move |w| (h, d, w))))
        {
            let from = (((layer * heads + h) * depth + d) * width + w) * size;
            let to = ((h * width + w) * depth + d) * size;
            assert_eq!(out[to..to + size], whole[from..from + size], "{layer} {h} {d} {w}");
        }
    }
}
