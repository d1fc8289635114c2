//! Decompresses every chunk of a checkpoint and does nothing with it: what loading is measured against. Each thread reads a
//! block as zstd asks for it into one small buffer, and decompresses into another, again and again.
//!
//!     cargo run --release -p pi0-orbax --example decode -- DIR/params [THREADS]

use std::collections::BTreeMap;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Instant;

use pi0_orbax::ocdbt::{Database, Value};
use zstd::stream::raw::{Decoder, InBuffer, Operation, OutBuffer};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let params = PathBuf::from(args.next().ok_or("wanted the params directory")?);
    let threads = args.next().map_or(Ok(2), |n| n.parse())?;
    let database = Database::open(&params)?;
    let files: BTreeMap<&Path, std::fs::File> = database
        .entries
        .values()
        .filter_map(|value| match value {
            Value::File { path, .. } => Some(path.as_path()),
            Value::Inline(_) => None,
        })
        .map(|path| Ok((path, std::fs::File::open(path)?)))
        .collect::<std::io::Result<_>>()?;
    // The largest first, so that no thread waits long for the other at the end.
    let mut chunks: Vec<(&Path, u64, u64)> = database
        .entries
        .iter()
        .filter_map(|(key, value)| match value {
            Value::File { path, offset, length } if !key.ends_with(".zarray") => {
                Some((path.as_path(), *offset, *length))
            }
            _ => None,
        })
        .collect();
    chunks.sort_by_key(|chunk| chunk.2);
    let (stored, decoded) = (AtomicU64::new(0), AtomicU64::new(0));
    let queue = Mutex::new(chunks);
    let start = Instant::now();
    std::thread::scope(|scope| {
        for _ in 0..threads {
            scope.spawn(|| {
                let (mut input, mut output) = (vec![0; 256 << 10], vec![0; 256 << 10]);
                loop {
                    let Some((path, offset, length)) = queue.lock().expect("no thread panics").pop() else {
                        return;
                    };
                    let mut decoder = Decoder::new().expect("memory for a decoder");
                    let (mut read, mut made, mut wanted) = (0, 0, 18);
                    while read < length {
                        let n = ((length - read) as usize).min(input.len()).min(wanted);
                        files[path].read_exact_at(&mut input[..n], offset + read).expect("the file is whole");
                        let mut source = InBuffer::around(&input[..n]);
                        while source.pos() < n {
                            let mut sink = OutBuffer::around(output.as_mut_slice());
                            wanted = decoder.run(&mut source, &mut sink).expect("a zstd stream").max(1);
                            made += sink.pos() as u64;
                        }
                        read += n as u64;
                    }
                    stored.fetch_add(length, Ordering::Relaxed);
                    decoded.fetch_add(made, Ordering::Relaxed);
                }
            });
        }
    });
    let seconds = start.elapsed().as_secs_f64();
    let [stored, decoded] = [stored, decoded].map(|n| n.into_inner() as f64 / 1e9);
    println!(
        "{stored:.2} GB to {decoded:.2} GB in {seconds:.2} s on {threads} threads, {:.2} GB/s",
        decoded / seconds
    );
    Ok(())
}
