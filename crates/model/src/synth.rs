//! Random checkpoints: valid, well scaled, of any size, so that anyone can test and measure without a download.
//!
//! A weight depends on the seed, its tensor's name and its index alone. The scales keep activations near one and
//! attention far from uniform, as in the golden data.

use std::borrow::Cow;
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use half::bf16;
use pi0_device::{Buffer, Bytes, Dtype, Lazy, MakeBytes, TensorSource};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use safetensors::tensor::{Dtype as StoredDtype, View};

use crate::weights::expected_tensors;
use crate::{Checkpoint, Config, ModelError};

/// Values drawn from one random stream: the unit of parallel work.
const CHUNK: usize = 1 << 20;

/// Writes `model.safetensors` with bf16 weights into `dir`, under the names that lerobot writes. `progress` hears the
/// bytes made.
pub fn write_weights(
    config: &Config,
    seed: u64,
    dir: &Path,
    progress: &(dyn Fn(u64) + Sync),
) -> Result<(), ModelError> {
    let path = dir.join("model.safetensors");
    let tensors = expected_tensors(config)
        .into_iter()
        .map(|(name, shape)| (format!("model.{name}"), Random { seed, name, shape, progress }));
    let metadata = [("format".to_string(), "pt".to_string())].into();
    safetensors::serialize_to_file(tensors, Some(metadata), &path).map_err(|e| match e {
        safetensors::SafeTensorError::IoError(source) => ModelError::Read { path: path.clone(), source },
        other => ModelError::config(&path, other.to_string()),
    })
}

/// Bytes that [`write_weights`] makes.
pub fn weight_bytes(config: &Config) -> u64 {
    expected_tensors(config).iter().map(|(_, shape)| 2 * shape.iter().product::<usize>() as u64).sum()
}

/// The same weights in memory, for tests of small networks.
pub fn checkpoint(config: &Config, seed: u64) -> Result<Checkpoint, ModelError> {
    let tensor = |(name, shape): (String, Vec<usize>)| {
        let random = Random { seed, name: name.clone(), shape: shape.clone(), progress: &|_| () };
        TensorSource::new(name, Dtype::Bf16, shape, Bytes::Owned(Arc::new(random.generate())))
    };
    let tensors = expected_tensors(config).into_iter().map(tensor).collect::<Result<_, _>>()?;
    Checkpoint::from_tensors(config.clone(), tensors)
}

/// Tensors of the right shapes in bf16 that hold zeros, made only if something reads them: to plan an inference of any
/// size without its weights.
pub fn outline(config: &Config) -> Result<Checkpoint, ModelError> {
    let tensor = |(name, shape): (String, Vec<usize>)| {
        let zeros = Zeros(2 * shape.iter().product::<usize>());
        TensorSource::new(name, Dtype::Bf16, shape, Bytes::Lazy(Lazy::new(Arc::new(zeros))))
    };
    let tensors = expected_tensors(config).into_iter().map(tensor).collect::<Result<_, _>>()?;
    Checkpoint::from_tensors(config.clone(), tensors)
}

/// As many zeros.
#[derive(Debug)]
struct Zeros(usize);

impl MakeBytes for Zeros {
    fn count(&self) -> usize {
        self.0
    }
    fn make(&self) -> Result<Buffer, String> {
        Ok(vec![0; self.0].into())
    }
}

/// A tensor whose values are made when they are written.
struct Random<'a> {
    seed: u64,
    name: String,
    shape: Vec<usize>,
    progress: &'a (dyn Fn(u64) + Sync),
}

impl View for Random<'_> {
    fn dtype(&self) -> StoredDtype {
        StoredDtype::BF16
    }
    fn shape(&self) -> &[usize] {
        &self.shape
    }
    fn data(&self) -> Cow<'_, [u8]> {
        self.generate().into()
    }
    fn data_len(&self) -> usize {
        2 * self.shape.iter().product::<usize>()
    }
}

impl Random<'_> {
    fn generate(&self) -> Vec<u8> {
        let (mean, deviation) = scale(&self.name, &self.shape);
        let stream = fnv1a(&self.name) ^ self.seed.wrapping_mul(0x9E37_79B9_7F4A_7C15);
        let mut bytes = vec![0; self.data_len()];
        let chunks: Vec<_> = bytes.chunks_mut(2 * CHUNK).map(std::sync::Mutex::new).collect();
        let next = AtomicU64::new(0);
        let work = || {
            loop {
                let i = next.fetch_add(1, Ordering::Relaxed);
                let Some(chunk) = chunks.get(i as usize) else { return };
                let mut chunk = chunk.lock().expect("no other thread takes this chunk");
                let mut rng = ChaCha8Rng::seed_from_u64(stream);
                rng.set_stream(i);
                fill(&mut chunk, &mut rng, mean, deviation);
                (self.progress)(chunk.len() as u64);
            }
        };
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(chunks.len());
        std::thread::scope(|s| {
            for _ in 1..threads {
                s.spawn(work);
            }
            work();
        });
        drop(chunks);
        if self.name.ends_with("norm.dense.bias") {
            open_gates(&mut bytes);
        }
        bytes
    }
}

/// Adds a half to the last third of a bias of scale, shift and gate: with gates around zero no layer would do anything.
fn open_gates(bytes: &mut [u8]) {
    let gates = bytes.len() / 2 / 3 * 2;
    for pair in bytes[2 * gates..].chunks_exact_mut(2) {
        let value = bf16::from_le_bytes([pair[0], pair[1]]).to_f32() + 0.5;
        pair.copy_from_slice(&bf16::from_f32(value).to_le_bytes());
    }
}

/// Uniform values of the given mean and standard deviation, from sixteen random bits each.
fn fill(bytes: &mut [u8], rng: &mut ChaCha8Rng, mean: f32, deviation: f32) {
    rng.fill_bytes(bytes);
    let step = deviation * 12f32.sqrt() / 65536.0;
    for pair in bytes.chunks_exact_mut(2) {
        let bits = u16::from_le_bytes([pair[0], pair[1]]);
        let value = mean + (f32::from(bits) - 32767.5) * step;
        pair.copy_from_slice(&bf16::from_f32(value).to_le_bytes());
    }
}

fn fnv1a(text: &str) -> u64 {
    text.bytes().fold(0xCBF2_9CE4_8422_2325, |h, b| (h ^ u64::from(b)).wrapping_mul(0x100_0000_01B3))
}

/// Mean and standard deviation of a tensor's values.
fn scale(name: &str, shape: &[usize]) -> (f32, f32) {
    let leaf = name.rsplit('.').nth(1).unwrap_or_default();
    let norm = leaf.contains("norm");
    // The dense layer of an adaptive norm. Modest, for scales enter attention's logits twice.
    let adaptive = name.contains("norm.dense.");
    if name.ends_with(".bias") {
        return (0.0, if norm || adaptive { 0.2 } else { 0.1 });
    }
    if norm {
        // Layer norms multiply by w, Gemma's by 1 + w.
        return if name.contains("vision") { (1.0, 0.2) } else { (0.0, 0.3) };
    }
    let fan_in = shape[1..].iter().product::<usize>() as f32;
    let gain = match leaf {
        // Tokens well apart, so that rounding does not choose between them.
        "lm_head" => 4.0,
        "dense" => 0.3,
        "position_embedding" => return (0.0, 0.5),
        "patch_embedding" => 1.7,
        "q_proj" | "k_proj" | "action_time_mlp_out" => 1.6,
        "action_time_mlp_in" | "time_mlp_in" => 1.5,
        "time_mlp_out" => 2.2,
        "fc1" | "gate_proj" => 1.3,
        "out_proj" | "fc2" => 0.9,
        "o_proj" => 0.8,
        "down_proj" => 0.7,
        _ => 1.0,
    };
    (0.0, gain / fan_in.sqrt())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::Kind;

    #[test]
    fn written_weights_load_and_depend_on_the_seed() {
        let config = Config { horizon: 5, ..Config::tiny() };
        let dir = tempfile::tempdir().unwrap();
        config.write(dir.path(), &["top"], 14, 14).unwrap();
        let made = AtomicU64::new(0);
        let count = |n| {
            made.fetch_add(n, Ordering::Relaxed);
        };
        write_weights(&config, 7, dir.path(), &count).unwrap();
        assert_eq!(made.load(Ordering::Relaxed), weight_bytes(&config));
        let read = Checkpoint::open(dir.path()).unwrap();
        assert_eq!(read.config, config);
        assert_eq!(2 * read.parameters(), weight_bytes(&config));
        assert_eq!(read.find_not_finite().unwrap(), None);
        let (same, other) = (checkpoint(&config, 7).unwrap(), checkpoint(&config, 8).unwrap());
        let name = "state_proj.weight";
        assert_eq!(read.tensor(name).bytes(), same.tensor(name).bytes());
        assert_ne!(read.tensor(name).bytes(), other.tensor(name).bytes());
        let values = read.tensor(crate::weights::EMBED).to_f32();
        let variance = values.iter().map(|x| f64::from(x * x)).sum::<f64>() / values.len() as f64;
        assert!((variance * 128.0 - 1.0).abs() < 0.05, "{variance}");
    }

    #[test]
    fn gates_are_open() {
        let made = checkpoint(&Config::tiny().of_kind(Kind::Pi05), 7).unwrap();
        let bias = made.tensor("paligemma_with_expert.gemma_expert.model.norm.dense.bias").to_f32();
        let mean = |part: &[f32]| part.iter().sum::<f32>() / part.len() as f32;
        let parts: Vec<f32> = bias.chunks_exact(64).map(mean).collect();
        assert!(parts.len() == 3 && parts[0].abs() < 0.1 && parts[1].abs() < 0.1, "{parts:?}");
        assert!((parts[2] - 0.5).abs() < 0.1, "{parts:?}");
    }
}
