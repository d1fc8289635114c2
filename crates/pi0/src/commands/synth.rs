//! `pi0 synth`: a valid random checkpoint, so that anyone can measure without a download.

use std::path::{Path, PathBuf};
use std::time::Instant;

use anyhow::{Context, Result, bail};
use clap::ValueEnum;
use pi0_model::{Config, Kind, synth};
use pi0_policy::{
    LerobotProcessors, TINY_TOKENIZER, VectorStats, tiny_fast_tokenizer, write_lerobot_processors,
};

use crate::output;

/// Make a valid checkpoint with random weights, to test and measure without a download
#[derive(clap::Args)]
#[command(
    after_help = "Examples:\n  pi0 synth /tmp/pi0-tiny\n  pi0 synth /tmp/pi05-tiny --model pi05\n  pi0 synth /tmp/fast-tiny --model pi0-fast\n  \
                  pi0 synth /tmp/pi0-full --size full   # 7 GB"
)]
pub struct Args {
    /// Directory to make; must not hold a checkpoint yet
    dir: PathBuf,
    /// tiny: 1 million parameters; wide: the real widths with two layers a tower and 4096 tokens, 0.6 GB; full: the real
    /// sizes, 3.5 billion parameters, 7 GB
    #[arg(long, value_enum, default_value_t)]
    size: Size,
    /// Which network of the family
    #[arg(long, value_enum, default_value_t)]
    model: Network,
    /// The same seed makes the same weights on every machine
    #[arg(long, default_value_t = 0)]
    seed: u64,
}

/// Sizes of random checkpoints.
#[derive(Debug, Clone, Copy, Default, ValueEnum)]
pub enum Size {
    /// 1 million parameters.
    #[default]
    Tiny,
    /// The real widths, with two layers a tower and few tokens: what a device makes of large layers, in minutes.
    Wide,
    /// The real sizes: 3.5 billion parameters, 7 GB.
    Full,
}

impl Size {
    /// Name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Size::Tiny => "tiny",
            Size::Wide => "wide",
            Size::Full => "full",
        }
    }
}

/// Networks that can be made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, ValueEnum)]
pub enum Network {
    /// π0: the state is a row beside the actions.
    #[default]
    Pi0,
    /// π0.5: the state stands in the prompt, time drives the expert's norms.
    Pi05,
    /// π0-FAST: the state stands in the prompt, the language model writes the actions as tokens.
    #[value(name = "pi0-fast", alias = "pi0_fast")]
    Pi0Fast,
}

impl Network {
    /// As the model knows it.
    pub fn kind(self) -> Kind {
        match self {
            Network::Pi0 => Kind::Pi0,
            Network::Pi05 => Kind::Pi05,
            Network::Pi0Fast => Kind::Pi0Fast,
        }
    }
}

/// Cameras of a π0 checkpoint, and the joints of the robot that a random one pretends to be trained for.
const CAMERAS: [&str; 3] = ["base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb"];
const JOINTS: usize = 14;

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let start = Instant::now();
    let bytes = make(&args.dir, args.size, args.model.kind(), args.seed)?;
    let (parameters, seconds) = (bytes / 2, start.elapsed().as_secs_f64());
    output::print(&format!(
        "{}: {:.1} million parameters, {}, random with seed {}, in {seconds:.1} s\n",
        args.dir.display(),
        parameters as f64 / 1e6,
        output::size(bytes),
        args.seed
    ))
}

/// The real widths with two layers a tower.
fn wide() -> Config {
    let mut config = Config::full();
    (config.vision.num_hidden_layers, config.gemma.depth, config.expert.depth) = (2, 2, 2);
    Config { vocab_size: 4096, ..config }
}

/// Makes a checkpoint in `dir`, with a progress bar, and says how many bytes of weights it has.
pub fn make(dir: &Path, size: Size, kind: Kind, seed: u64) -> Result<u64> {
    let config = match size {
        Size::Tiny => Config::tiny(),
        Size::Wide => wide(),
        Size::Full => Config::full(),
    }
    .of_kind(kind);
    let fast = kind == Kind::Pi0Fast;
    let tokenizer = if fast { tiny_fast_tokenizer() } else { TINY_TOKENIZER.into() };
    let config = match (fast, size) {
        // As many entries as its tokenizer, of which the last stand for codes.
        (true, Size::Tiny) => Config { action_dim: JOINTS, vocab_size: 300 + 1024 + 128, ..config },
        (true, Size::Wide | Size::Full) => Config { action_dim: JOINTS, ..config },
        (false, _) => config,
    };
    let in_dir = || format!("cannot make a checkpoint in {}", dir.display());
    std::fs::create_dir_all(dir).with_context(in_dir)?;
    for file in ["model.safetensors", "config.json"] {
        if dir.join(file).exists() {
            bail!("{} already holds {file}; name a new directory", dir.display());
        }
    }
    config.write(dir, &CAMERAS, JOINTS, JOINTS).with_context(in_dir)?;
    let neutral = VectorStats::neutral(kind, JOINTS);
    write_lerobot_processors(
        dir,
        &LerobotProcessors {
            kind,
            cameras: CAMERAS.map(|c| format!("observation.images.{c}")).to_vec(),
            image_size: config.vision.image_size,
            max_tokens: config.max_tokens,
            state: neutral.clone(),
            action: neutral,
            tokenizer,
        },
    )?;
    let bytes = synth::weight_bytes(&config);
    let bar = output::progress("writing", bytes);
    synth::write_weights(&config, seed, dir, &|n| bar.inc(n))?;
    bar.finish_and_clear();
    Ok(bytes)
}
