//! Weights and inputs that the cases run on: small and random, or a checkpoint's own.

use pi0_device::{Device, HostTensor};
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use rand_distr::{Distribution, StandardNormal};

use crate::layout::Layout;
use crate::{Checkpoint, Clean, Config, GemmaConfig, Inputs, Kind, ModelError, Rtc, VisionConfig, synth};

/// Which layers of a tower the cases of single layers run.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerChoice {
    /// Every one.
    All,
    /// The first, the middle and the last.
    Some,
    /// The first.
    First,
}

/// What all cases of one round share.
#[derive(Debug, Clone)]
pub struct Setup {
    /// Names the round in reports.
    pub name: String,
    /// Sizes and weights.
    pub checkpoint: Checkpoint,
    /// The robots.
    pub batch: Vec<Inputs>,
    /// Denoising steps, or of π0-FAST tokens.
    pub steps: usize,
    /// Layers that run alone.
    pub layers: LayerChoice,
}

impl Setup {
    /// The rounds that take milliseconds: odd sizes with three robots of different masks, and several key heads.
    pub fn small() -> Result<Vec<Self>, ModelError> {
        let robots = [([true, true], 4), ([false, true], 1), ([true, false], 0)];
        let grouped = GemmaConfig { num_kv_heads: 2, ..odd().gemma };
        let expert = GemmaConfig { num_kv_heads: 2, ..odd().expert };
        let grouped = Config { gemma: grouped, expert, ..odd() };
        Ok(vec![
            Self::random("odd", odd(), &robots, 3)?,
            Self::random("grouped", grouped, &[([true, true], 11)], 2)?,
            Self::pi05_odd()?,
            Self::random("pi0-FAST odd", odd().of_kind(Kind::Pi0Fast), &robots, 4)?,
        ])
    }

    /// π0.5 of odd sizes, with a robot whose first actions are known already.
    fn pi05_odd() -> Result<Self, ModelError> {
        let config = Config { rtc_training_max_delay: 3, ..odd() };
        let config = Config { kind: Kind::Pi05, ..config };
        let robots = [([true, true], 12), ([false, true], 3)];
        let mut setup = Self::random("pi05 odd", config, &robots, 3)?;
        let previous = rows("previous", 2, setup.config().action_dim).data;
        setup.batch[1].rtc = Some(Rtc::Trained(Clean { previous, delay: 2 }));
        Ok(setup)
    }

    /// [`small`](Self::small), and two whose sizes are whole tiles.
    pub fn standard() -> Result<Vec<Self>, ModelError> {
        let mut all = Self::small()?;
        let robots = [([true, false], 9), ([true, true], 32)];
        all.push(Self::random("even", even(), &robots, 4)?);
        all.push(Self::random("pi05 even", Config { kind: Kind::Pi05, ..even() }, &robots, 4)?);
        all.push(Self::random("pi0-FAST even", even().of_kind(Kind::Pi0Fast), &robots, 9)?);
        Ok(all)
    }

    /// [`standard`](Self::standard), and the network of the golden data: 256 patches an image, ten steps.
    pub fn full() -> Result<Vec<Self>, ModelError> {
        let mut all = Self::standard()?;
        all.push(Self::random("tiny", Config::tiny(), &[([true, true], 48), ([false, true], 17)], 10)?);
        let pi05 = Config::tiny().of_kind(Kind::Pi05);
        all.push(Self::random("pi05 tiny", pi05, &[([true, true], 120), ([false, true], 41)], 10)?);
        let fast = Config::tiny().of_kind(Kind::Pi0Fast);
        all.push(Self::random("pi0-FAST tiny", fast, &[([true, true], 120), ([false, true], 41)], 20)?);
        Ok(all)
    }

    /// A checkpoint's own weights under random inputs: one robot with one of two cameras and a short prompt.
    pub fn of_checkpoint(checkpoint: Checkpoint, layers: LayerChoice) -> Self {
        let c = &checkpoint.config;
        let batch = vec![random_inputs(c, 0, &[true, false], c.max_tokens.min(7))];
        let steps = if layers == LayerChoice::All { c.num_steps } else { 2 };
        Self { name: "checkpoint".into(), batch, steps, layers, checkpoint }
    }

    fn random(
        name: &str,
        config: Config,
        robots: &[([bool; 2], usize)],
        steps: usize,
    ) -> Result<Self, ModelError> {
        let batch = robots
            .iter()
            .enumerate()
            .map(|(i, (cameras, tokens))| random_inputs(&config, i as u64, cameras, *tokens))
            .collect();
        let checkpoint = synth::checkpoint(&config, 5)?;
        Ok(Self { name: name.into(), checkpoint, batch, steps, layers: LayerChoice::All })
    }

    /// Sizes.
    pub fn config(&self) -> &Config {
        &self.checkpoint.config
    }

    /// How the batch is packed.
    pub fn layout(&self) -> Result<Layout, ModelError> {
        Layout::new(self.config(), &self.batch)
    }

    /// Times of the steps.
    pub fn times(&self) -> Vec<f32> {
        self.config().schedule.times(self.steps)
    }

    /// Indices of the layers that run alone.
    pub fn layer_indices(&self, depth: usize) -> Vec<usize> {
        let mut picked = match self.layers {
            LayerChoice::All => (0..depth).collect(),
            LayerChoice::Some => vec![0, depth / 2, depth - 1],
            LayerChoice::First => vec![0],
        };
        picked.dedup();
        picked
    }
}

/// No size is a multiple of another or of a tile; one key head, as in π0.
fn odd() -> Config {
    let gemma = |width, mlp_dim| GemmaConfig {
        width,
        mlp_dim,
        depth: 2,
        num_heads: 4,
        num_kv_heads: 1,
        head_dim: 14,
    };
    Config {
        vision: VisionConfig {
            hidden_size: 45,
            intermediate_size: 83,
            num_hidden_layers: 2,
            num_attention_heads: 3,
            image_size: 42,
            patch_size: 14,
        },
        gemma: gemma(51, 77),
        expert: gemma(38, 53),
        vocab_size: 97,
        action_dim: 7,
        state_dim: 11,
        horizon: 5,
        max_tokens: 13,
        ..Config::full()
    }
}

/// Every size is a multiple of a tile of 32.
fn even() -> Config {
    let gemma = |width, mlp_dim| GemmaConfig {
        width,
        mlp_dim,
        depth: 3,
        num_heads: 4,
        num_kv_heads: 1,
        head_dim: 32,
    };
    Config {
        vision: VisionConfig {
            hidden_size: 64,
            intermediate_size: 128,
            num_hidden_layers: 3,
            num_attention_heads: 2,
            image_size: 128,
            patch_size: 16,
        },
        gemma: gemma(128, 256),
        expert: gemma(64, 192),
        vocab_size: 128,
        horizon: 32,
        max_tokens: 32,
        ..Config::full()
    }
}

/// One robot's random inputs, with the cameras that are present and the number of tokens given.
pub fn random_inputs(c: &Config, seed: u64, cameras: &[bool], tokens: usize) -> Inputs {
    let mut rng = ChaCha12Rng::seed_from_u64(1000 + seed);
    let mut normal = |n: usize| -> Vec<f32> { StandardNormal.sample_iter(&mut rng).take(n).collect() };
    let size = 3 * c.vision.image_size.pow(2);
    let image = |x: Vec<f32>| x.into_iter().map(|x: f32| (0.5 * x).clamp(-1.0, 1.0)).collect();
    let images = cameras.iter().map(|present| present.then(|| image(normal(size)))).collect();
    let (state, noise) = (normal(c.state_dim), Some(normal(c.horizon * c.action_dim)));
    // The first and the last row of the table, and random ones between.
    let mut token = |i: usize| match i {
        0 => 0,
        1 => c.vocab_size as u32 - 1,
        _ => (rng.next_u64() % c.vocab_size as u64) as u32,
    };
    Inputs { images, tokens: (0..tokens).map(&mut token).collect(), state, noise, ..Inputs::default() }
}

/// Brings rows to a device.
pub(super) fn upload<D: Device>(d: &D, t: &HostTensor) -> Result<D::Tensor, ModelError> {
    Ok(d.upload(t.rows(), t.cols(), &t.data)?)
}

/// Random rows whose sizes differ by powers of ten, so that a norm's eps shows, and a scale that is off in one row.
/// `tag` names the stream.
pub(super) fn rows(tag: &str, rows: usize, cols: usize) -> HostTensor {
    let seed = tag.bytes().fold(17u64, |h, b| h.wrapping_mul(31).wrapping_add(u64::from(b)));
    let mut normal = StandardNormal.sample_iter(ChaCha12Rng::seed_from_u64(seed));
    let mut t = HostTensor::zeros([rows, cols]);
    for r in 0..rows {
        let size: f32 = [1.0, 1e-3, 3.0, 0.1][r % 4];
        t.row_mut(r).iter_mut().zip(&mut normal).for_each(|(x, n): (_, f32)| *x = size * n);
    }
    t
}
