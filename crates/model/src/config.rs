//! Sizes of the network, read from a checkpoint's `config.json` and, for shrunk models, `arch.json` beside it.

use std::fs;
use std::io::Read;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use crate::ModelError;

/// All sizes of a network of the π0 family and how it is sampled.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Config {
    /// Which network of the family.
    pub kind: Kind,
    /// Which code base wrote the checkpoint.
    pub family: Family,
    /// SigLIP.
    pub vision: VisionConfig,
    /// The language model that reads images and prompt.
    pub gemma: GemmaConfig,
    /// The action expert; π0-FAST has none, and this repeats the language model.
    pub expert: GemmaConfig,
    /// Rows of the token embedding table.
    pub vocab_size: usize,
    /// Width of one action.
    pub action_dim: usize,
    /// Width of the state.
    pub state_dim: usize,
    /// Actions in one chunk.
    pub horizon: usize,
    /// Longest prompt, in tokens.
    pub max_tokens: usize,
    /// Euler steps unless the caller says otherwise.
    pub num_steps: usize,
    /// How the time of each step is computed.
    pub schedule: TimeSchedule,
    /// Shortest period of the time embedding.
    pub min_period: f64,
    /// Longest period of the time embedding.
    pub max_period: f64,
    /// Real-time chunking: the longest delay that the checkpoint was trained to continue a chunk after; 0 where it
    /// was not (lerobot's `rtc_training_max_delay`).
    pub rtc_training_max_delay: usize,
    /// How π0-FAST writes its answer; none of the networks that denoise.
    pub answer: Option<AnswerConfig>,
}

/// How π0-FAST writes an answer.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct AnswerConfig {
    /// Most tokens of an answer.
    pub max_tokens: usize,
    /// 0 takes the likeliest token, more draws one after dividing the logits by it.
    pub temperature: f32,
    /// Whether a second BOS ends the prompt, as in lerobot.
    pub second_bos: bool,
    /// Positions left out between the prompt and the answer: openpi leaves out one.
    pub skipped_positions: usize,
    /// Whether the token embedding is the vocabulary head as well.
    pub tied: bool,
    /// The only tokens to choose from, in ascending order; none for all. What is written instead of another token that
    /// would have been likelier is no answer that the references give.
    pub only: Option<Vec<u32>>,
    /// Tokens at most, seven or fewer, that are guessed from earlier answers and read in one pass with the last one; 0 for
    /// none. Several robots share them. Of an answer that takes the likeliest tokens nothing changes but the time, on devices
    /// where a row's result does not depend on the rows beside it.
    pub speculate: usize,
    /// Whether chunk and action have their true sizes here; openpi's checkpoints do not say them.
    pub sizes_known: bool,
}

/// The token that opens a prompt, and in lerobot's π0-FAST ends it.
pub const BOS: u32 = 2;
/// The token that ends what a language model writes.
pub const EOS: u32 = 1;

impl AnswerConfig {
    /// With the defaults of a family.
    pub fn of_family(family: Family) -> Self {
        let lerobot = family == Family::Lerobot;
        Self {
            max_tokens: 256,
            temperature: 0.0,
            second_bos: lerobot,
            skipped_positions: usize::from(!lerobot),
            tied: !lerobot,
            only: None,
            speculate: 0,
            sizes_known: lerobot,
        }
    }
}

/// A network of the π0 family. The tensors of a checkpoint say which it is; of its configuration only lerobot's does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Kind {
    /// The state is a row of the suffix, and time is mixed into the action rows.
    Pi0,
    /// The state stands in the prompt, and time drives the norms of the action expert.
    Pi05,
    /// The state stands in the prompt, and the language model writes the actions as tokens.
    #[serde(rename = "pi0_fast")]
    Pi0Fast,
}

impl Kind {
    /// Name on the command line and in lerobot's `type`.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Pi0 => "pi0",
            Kind::Pi05 => "pi05",
            Kind::Pi0Fast => "pi0_fast",
        }
    }

    /// Name for people.
    pub fn title(self) -> &'static str {
        match self {
            Kind::Pi0 => "π0",
            Kind::Pi05 => "π0.5",
            Kind::Pi0Fast => "π0-FAST",
        }
    }

    /// Longest prompt unless a configuration says otherwise.
    pub(crate) fn max_tokens(self) -> usize {
        match self {
            Kind::Pi0 => 48,
            Kind::Pi05 | Kind::Pi0Fast => 200,
        }
    }

    /// Whether the state is a row beside the actions; else it stands in the prompt, if anywhere.
    pub fn reads_state(self) -> bool {
        self == Kind::Pi0
    }

    /// Every member of the family.
    pub const ALL: [Kind; 3] = [Kind::Pi0, Kind::Pi05, Kind::Pi0Fast];

    /// Which network has tensors of these names; none where they are no policy of this family.
    pub(crate) fn of_tensors<'a>(mut names: impl Iterator<Item = &'a str> + Clone) -> Option<Self> {
        let expert = |name: &str| name.contains("gemma_expert.model.");
        // First, since lerobot takes a π0.5 that still carries π0's state projection.
        if names.clone().any(|name| expert(name) && name.ends_with("norm.dense.weight")) {
            return Some(Kind::Pi05);
        }
        let of_pi0 =
            |name: &str| name.ends_with("state_proj.weight") || expert(name) && name.ends_with("norm.weight");
        if names.clone().any(of_pi0) {
            return Some(Kind::Pi0);
        }
        // The whole of PaliGemma and nothing else.
        let other = |name: &str| expert(name) || name.contains("action_") || name.contains("time_mlp");
        let language = |name: &str| name.contains("language_model.layers.0.");
        let fast = names.clone().any(language) && !names.any(other);
        fast.then_some(Kind::Pi0Fast)
    }
}

impl std::fmt::Display for Kind {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.title())
    }
}

/// The code base that a checkpoint comes from: it decides names, schedule and preprocessing.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Family {
    /// Hugging Face lerobot.
    Lerobot,
    /// Physical Intelligence's openpi, converted to PyTorch.
    Openpi,
}

/// How the time of Euler step `k` of `n` is computed. The highest frequency of the time embedding turns a
/// difference of 1e-7 into one of 1e-4 in the actions.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum TimeSchedule {
    /// `f32(1 - k / n)` from f64.
    Lerobot,
    /// `-1 / n` added `k` times in f32.
    Openpi,
}

impl TimeSchedule {
    /// Time of every step.
    pub fn times(self, steps: usize) -> Vec<f32> {
        let dt = -1.0 / steps as f64;
        match self {
            TimeSchedule::Lerobot => (0..steps).map(|k| (1.0 + k as f64 * dt) as f32).collect(),
            TimeSchedule::Openpi => {
                let add = |t: &f32| Some(t + dt as f32);
                std::iter::successors(Some(1.0f32), add).take(steps).collect()
            }
        }
    }
}

/// Sizes of the vision tower.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // Hugging Face's names
pub struct VisionConfig {
    pub hidden_size: usize,
    pub intermediate_size: usize,
    pub num_hidden_layers: usize,
    pub num_attention_heads: usize,
    pub image_size: usize,
    pub patch_size: usize,
}

impl VisionConfig {
    /// Tokens of one image.
    pub fn patches(&self) -> usize {
        (self.image_size / self.patch_size).pow(2)
    }

    /// Values of one patch: three channels.
    pub fn patch_values(&self) -> usize {
        3 * self.patch_size * self.patch_size
    }

    /// Width of one attention head.
    pub fn head_dim(&self) -> usize {
        self.hidden_size / self.num_attention_heads
    }
}

/// Sizes of a Gemma tower.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[allow(missing_docs)] // openpi's names
pub struct GemmaConfig {
    pub width: usize,
    pub mlp_dim: usize,
    pub depth: usize,
    pub num_heads: usize,
    pub num_kv_heads: usize,
    pub head_dim: usize,
}

impl GemmaConfig {
    fn variant(name: &str) -> Option<Self> {
        let (width, mlp_dim) = match name {
            "gemma_2b" => (2048, 16384),
            "gemma_300m" => (1024, 4096),
            _ => return None,
        };
        Some(Self { width, mlp_dim, depth: 18, num_heads: 8, num_kv_heads: 1, head_dim: 256 })
    }
}

/// `arch.json`: the true sizes of a shrunk model, which `config.json` has no words for.
#[derive(Debug, Serialize, Deserialize)]
struct Arch {
    /// `pi05` or `pi0_fast`; absent for π0.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    family: Option<String>,
    vision: VisionConfig,
    gemma: GemmaConfig,
    /// All but π0-FAST have it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    expert: Option<GemmaConfig>,
    vocab_size: usize,
    action_dim: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    state_dim: Option<usize>,
    horizon: usize,
    max_tokens: usize,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    num_steps: Option<usize>,
    /// Of π0-FAST.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    max_decoding_steps: Option<usize>,
}

impl Config {
    /// The published π0: 3.5 billion parameters.
    pub fn full() -> Self {
        Self {
            kind: Kind::Pi0,
            family: Family::Lerobot,
            vision: VisionConfig {
                hidden_size: 1152,
                intermediate_size: 4304,
                num_hidden_layers: 27,
                num_attention_heads: 16,
                image_size: 224,
                patch_size: 14,
            },
            gemma: GemmaConfig::variant("gemma_2b").expect("known"),
            expert: GemmaConfig::variant("gemma_300m").expect("known"),
            vocab_size: 257_152,
            action_dim: 32,
            state_dim: 32,
            horizon: 50,
            max_tokens: 48,
            num_steps: 10,
            schedule: TimeSchedule::Lerobot,
            min_period: 4e-3,
            max_period: 4.0,
            rtc_training_max_delay: 0,
            answer: None,
        }
    }

    /// The same sizes as another network of the family, with its usual prompt.
    pub fn of_kind(self, kind: Kind) -> Self {
        let answer = (kind == Kind::Pi0Fast).then(|| AnswerConfig::of_family(self.family));
        let expert = if answer.is_some() { self.gemma.clone() } else { self.expert.clone() };
        Self { kind, max_tokens: kind.max_tokens(), answer, expert, ..self }
    }

    /// The token behind the prompt, if there is one.
    pub fn last_of_prompt(&self) -> Option<u32> {
        self.answer.as_ref().is_some_and(|answer| answer.second_bos).then_some(BOS)
    }

    /// A network of the same shape that runs in milliseconds.
    pub fn tiny() -> Self {
        let gemma = |width, mlp_dim| GemmaConfig {
            width,
            mlp_dim,
            depth: 3,
            num_heads: 8,
            num_kv_heads: 1,
            head_dim: 32,
        };
        Self {
            vision: VisionConfig {
                hidden_size: 72,
                intermediate_size: 216,
                num_hidden_layers: 3,
                num_attention_heads: 4,
                image_size: 224,
                patch_size: 14,
            },
            gemma: gemma(128, 384),
            expert: gemma(64, 192),
            vocab_size: 512,
            horizon: 16,
            ..Self::full()
        }
    }

    /// Reads `config.json` and, if present, `arch.json` of a checkpoint directory. `kind` is what its tensors say.
    pub fn load(dir: &Path, kind: Kind) -> Result<Self, ModelError> {
        if !dir.is_dir() {
            let what =
                if dir.exists() { "is a file; give the directory that holds it" } else { "does not exist" };
            return Err(ModelError::config(dir, what));
        }
        let path = dir.join("config.json");
        let Value::Object(json) = read_json(&path)? else {
            return Err(ModelError::config(&path, "is not a JSON object"));
        };
        let mut config = Self::from_json(&json, kind).map_err(|what| ModelError::config(&path, what))?;
        let arch_path = dir.join("arch.json");
        if arch_path.exists() {
            config.read_arch(&arch_path)?;
        }
        config.check().map_err(|what| ModelError::config(dir, what))?;
        Ok(config)
    }

    /// Takes the sizes of an `arch.json`.
    pub(crate) fn read_arch(&mut self, path: &Path) -> Result<(), ModelError> {
        let arch: Arch =
            serde_json::from_value(read_json(path)?).map_err(|e| ModelError::config(path, e.to_string()))?;
        if let Some(family) = arch.family.as_deref().filter(|f| *f != self.kind.name()) {
            return Err(ModelError::config(path, contradiction(family, self.kind)));
        }
        let expert = arch.expert.is_some() && arch.state_dim.is_some() && arch.num_steps.is_some();
        if self.kind != Kind::Pi0Fast && !expert {
            let what = format!("lacks expert, state_dim or num_steps, which {} has", self.kind);
            return Err(ModelError::config(path, what));
        }
        self.apply(arch);
        Ok(())
    }

    fn from_json(json: &Map<String, Value>, kind: Kind) -> Result<Self, String> {
        let variant = |key: &str, default: &str| {
            let name = match json.get(key) {
                None => default,
                Some(Value::String(name)) => name,
                Some(other) => return Err(format!("{key} is {other}, wanted a name such as {default:?}")),
            };
            if let Some(base) = name.strip_suffix("_lora") {
                return Err(format!(
                    "{key} is {name:?}: trained as adapters, which openpi's converter to PyTorch leaves behind, so \
                     these are the weights before training. Give the JAX checkpoint itself (the folder with `params`): \
                     its adapters are added at load. If these weights have them merged in, write {base:?} here"
                ));
            }
            GemmaConfig::variant(name)
                .ok_or_else(|| format!("{key} is {name:?}; known are gemma_2b and gemma_300m"))
        };
        let number = |key: &str, default: usize| match json.get(key) {
            None => Ok(default),
            Some(Value::Null) => Err(no_value(key, &default)),
            Some(v) => match v.as_u64() {
                Some(n) if n <= 1 << 20 => Ok(n as usize),
                _ => Err(format!("{key} is {v}, wanted a whole number")),
            },
        };
        let real = |key: &str, default: f64| match json.get(key) {
            None => Ok(default),
            Some(Value::Null) => Err(no_value(key, &default)),
            Some(v) => v
                .as_f64()
                .filter(|x| *x > 0.0)
                .ok_or_else(|| format!("{key} is {v}, wanted a number above 0")),
        };
        let full = Self::full().of_kind(kind);
        let gemma = variant("paligemma_variant", "gemma_2b")?;
        let expert = match kind {
            Kind::Pi0Fast => gemma.clone(),
            Kind::Pi0 | Kind::Pi05 => variant("action_expert_variant", "gemma_300m")?,
        };
        match json.get("type").and_then(Value::as_str) {
            Some(name) if name == kind.name() => {}
            Some(name @ ("pi0" | "pi05" | "pi0_fast")) => return Err(contradiction(name, kind)),
            Some(other) => {
                return Err(format!(
                    "describes a policy of type {other:?}; this program runs pi0, pi05 and pi0_fast"
                ));
            }
            None if json.contains_key("action_horizon") => {
                if json.get("pi05").and_then(Value::as_bool).is_some_and(|pi05| pi05 != (kind == Kind::Pi05))
                {
                    return Err(contradiction(if kind == Kind::Pi05 { "pi0" } else { "pi05" }, kind));
                }
                let action_dim = number("action_dim", 32)?;
                let answer = full
                    .answer
                    .clone()
                    .map(|_| AnswerConfig { sizes_known: true, ..AnswerConfig::of_family(Family::Openpi) });
                return Ok(Self {
                    family: Family::Openpi,
                    answer,
                    gemma,
                    expert,
                    action_dim,
                    state_dim: action_dim,
                    horizon: number("action_horizon", 50)?,
                    schedule: TimeSchedule::Openpi,
                    ..full
                });
            }
            None => {
                return Err("has neither \"type\" (lerobot) nor \"action_horizon\" (openpi); \
                            is this a π0 checkpoint?"
                    .into());
            }
        }
        let image_size = match json.get("image_resolution").or_else(|| json.get("resize_imgs_with_padding")) {
            None | Some(Value::Null) => full.vision.image_size,
            Some(v) => match v.as_array().map(|a| a.iter().map(Value::as_u64).collect::<Vec<_>>()).as_deref()
            {
                Some([Some(h), Some(w)]) if h == w && *h <= 4096 => *h as usize,
                _ => return Err(format!("image resolution {v}, wanted two equal sizes")),
            },
        };
        let flag = |key: &str| match json.get(key) {
            None | Some(Value::Null) => Ok(false),
            Some(Value::Bool(on)) => Ok(*on),
            Some(v) => Err(format!("{key} is {v}, wanted true or false")),
        };
        for (key, what) in [
            ("use_visual_memory", "a memory of earlier images"),
            ("use_proprioceptive_memory", "a memory of earlier states"),
        ] {
            if flag(key)? {
                return Err(format!("sets {key}: the policy reads {what}, which this program does not run"));
            }
        }
        let horizon = number("chunk_size", 50)?;
        let max_delay = number("rtc_training_max_delay", 0)?;
        if max_delay > 0 && (kind != Kind::Pi05 || max_delay >= horizon) {
            return Err(format!(
                "rtc_training_max_delay is {max_delay}; only π0.5 is trained so, and for less than a chunk of {horizon}"
            ));
        }
        let answer = match kind {
            Kind::Pi0 | Kind::Pi05 => None,
            Kind::Pi0Fast => {
                let temperature = json.get("temperature").and_then(Value::as_f64).unwrap_or(0.0) as f32;
                if !temperature.is_finite() || temperature < 0.0 {
                    return Err(format!("temperature is {temperature}, wanted a number from 0"));
                }
                let max_tokens = number("max_decoding_steps", 256)?;
                Some(AnswerConfig { max_tokens, temperature, ..AnswerConfig::of_family(Family::Lerobot) })
            }
        };
        // π0-FAST writes the robot's own actions, the others pad them.
        let own_width = json.get("output_features").and_then(|f| f["action"]["shape"][0].as_u64());
        let action_dim =
            match own_width.filter(|width| kind == Kind::Pi0Fast && (1..=1 << 20).contains(width)) {
                Some(width) => width as usize,
                None => number("max_action_dim", 32)?,
            };
        // Releases up to 0.3 (which have this key) added dt in f32, as openpi does.
        let old = json.contains_key("resize_imgs_with_padding");
        Ok(Self {
            vision: VisionConfig { image_size, ..full.vision },
            gemma,
            expert,
            action_dim,
            answer,
            state_dim: number("max_state_dim", 32)?,
            horizon,
            max_tokens: number("tokenizer_max_length", full.max_tokens)?,
            num_steps: number("num_inference_steps", number("num_steps", 10)?)?,
            schedule: if old { TimeSchedule::Openpi } else { TimeSchedule::Lerobot },
            min_period: real("min_period", 4e-3)?,
            max_period: real("max_period", 4.0)?,
            rtc_training_max_delay: max_delay,
            ..full
        })
    }

    fn apply(&mut self, arch: Arch) {
        let Arch {
            family: _,
            vision,
            gemma,
            expert,
            vocab_size,
            action_dim,
            state_dim,
            horizon,
            max_tokens,
            num_steps,
            max_decoding_steps,
        } = arch;
        let answer = self.answer.clone().map(|answer| AnswerConfig {
            max_tokens: max_decoding_steps.unwrap_or(answer.max_tokens),
            sizes_known: true,
            ..answer
        });
        *self = Self {
            vision,
            // Of π0-FAST there is none.
            expert: expert.unwrap_or(gemma.clone()),
            gemma,
            vocab_size,
            action_dim,
            state_dim: state_dim.unwrap_or(self.state_dim),
            horizon,
            max_tokens,
            num_steps: num_steps.unwrap_or(self.num_steps),
            answer,
            ..self.clone()
        };
    }

    /// Writes `config.json` and `arch.json` as lerobot and the golden program do, with these cameras.
    pub fn write(
        &self,
        dir: &Path,
        cameras: &[&str],
        robot_state: usize,
        robot_action: usize,
    ) -> std::io::Result<()> {
        let size = self.vision.image_size;
        let mut inputs = Map::new();
        for name in cameras {
            let feature = serde_json::json!({"type": "VISUAL", "shape": [3, size, size]});
            inputs.insert(format!("observation.images.{name}"), feature);
        }
        inputs
            .insert("observation.state".into(), serde_json::json!({"type": "STATE", "shape": [robot_state]}));
        let normalization = match self.kind {
            Kind::Pi0 | Kind::Pi0Fast => "MEAN_STD",
            Kind::Pi05 => "QUANTILES",
        };
        let mut config = serde_json::json!({
            "type": self.kind.name(),
            "input_features": inputs,
            "output_features": {"action": {"type": "ACTION", "shape": [robot_action]}},
            "normalization_mapping": {"VISUAL": "IDENTITY", "STATE": normalization, "ACTION": normalization},
            "paligemma_variant": "gemma_2b",
            "action_expert_variant": "gemma_300m",
            "dtype": "bfloat16",
            "chunk_size": self.horizon,
            "n_action_steps": self.horizon,
            "max_state_dim": self.state_dim,
            "max_action_dim": self.action_dim,
            "num_inference_steps": self.num_steps,
            "min_period": self.min_period,
            "max_period": self.max_period,
            "image_resolution": [size, size],
            "empty_cameras": 0,
            "tokenizer_max_length": self.max_tokens,
        });
        if self.kind == Kind::Pi05 {
            config["rtc_training_max_delay"] = self.rtc_training_max_delay.into();
        }
        if let (Some(answer), Some(config)) = (&self.answer, config.as_object_mut()) {
            // What lerobot's class does not have.
            ["num_inference_steps", "min_period", "max_period"]
                .iter()
                .for_each(|key| drop(config.remove(*key)));
            let more = serde_json::json!({
                "max_decoding_steps": answer.max_tokens,
                "temperature": answer.temperature,
                "max_action_tokens": 256,
                "fast_skip_tokens": 128,
                "validate_action_token_prefix": true,
                "use_kv_cache": true,
                "text_tokenizer_name": "google/paligemma-3b-pt-224",
                "action_tokenizer_name": "lerobot/fast-action-tokenizer",
            });
            config.extend(more.as_object().cloned().unwrap_or_default());
        }
        fs::write(dir.join("config.json"), serde_json::to_string_pretty(&config)?)?;
        let full =
            Self { rtc_training_max_delay: self.rtc_training_max_delay, ..Self::full().of_kind(self.kind) };
        if *self != full {
            let arch = Arch {
                family: (self.kind != Kind::Pi0).then(|| self.kind.name().into()),
                vision: self.vision.clone(),
                gemma: self.gemma.clone(),
                expert: self.answer.is_none().then(|| self.expert.clone()),
                vocab_size: self.vocab_size,
                action_dim: self.action_dim,
                state_dim: self.answer.is_none().then_some(self.state_dim),
                horizon: self.horizon,
                max_tokens: self.max_tokens,
                num_steps: self.answer.is_none().then_some(self.num_steps),
                max_decoding_steps: self.answer.as_ref().map(|answer| answer.max_tokens),
            };
            fs::write(dir.join("arch.json"), serde_json::to_string_pretty(&arch)?)?;
        }
        Ok(())
    }

    /// Checks what the layers rely on.
    pub(crate) fn check(&self) -> Result<(), String> {
        let (v, g, e) = (&self.vision, &self.gemma, &self.expert);
        let positive = [
            v.hidden_size,
            v.intermediate_size,
            v.num_hidden_layers,
            v.num_attention_heads,
            v.patch_size,
            g.width,
            g.mlp_dim,
            g.depth,
            g.num_heads,
            g.num_kv_heads,
            g.head_dim,
            e.width,
            e.mlp_dim,
            self.vocab_size,
            self.action_dim,
            self.state_dim,
            self.horizon,
            self.max_tokens,
            self.num_steps,
        ];
        let whole = |n: usize, by: usize| n.is_multiple_of(by);
        if let Some(n) = positive.iter().find(|n| **n == 0 || **n > 1 << 20) {
            return Err(format!("a size is {n}"));
        }
        if v.num_hidden_layers.max(g.depth) > 1000 || self.horizon > 10_000 {
            return Err("more than 1000 layers or 10000 actions".into());
        }
        if v.image_size == 0 || v.image_size > 4096 || !whole(v.image_size, v.patch_size) {
            return Err(format!("images of {} do not divide into patches of {}", v.image_size, v.patch_size));
        }
        if !whole(v.hidden_size, v.num_attention_heads) {
            return Err(format!("vision width {} over {} heads", v.hidden_size, v.num_attention_heads));
        }
        if let Some(answer) = self.answer.as_ref().filter(|a| !(1..=4096).contains(&a.max_tokens)) {
            return Err(format!("answers of {} tokens; from 1 to 4096 make sense", answer.max_tokens));
        }
        if !whole(g.head_dim, 2) || !whole(g.num_heads, g.num_kv_heads) || !whole(e.width, 2) {
            return Err("odd head_dim or expert width, or query heads that key heads do not divide".into());
        }
        let expert = self.kind != Kind::Pi0Fast;
        if expert
            && (e.depth, e.num_heads, e.num_kv_heads, e.head_dim)
                != (g.depth, g.num_heads, g.num_kv_heads, g.head_dim)
        {
            return Err(
                "the action expert must have the language model's depth and heads: it reads its keys".into(),
            );
        }
        Ok(())
    }
}

/// A configuration of one network beside the tensors of another.
fn contradiction(declared: &str, kind: Kind) -> String {
    format!(
        "says {declared:?}, but the tensors beside it are those of {kind}; which of the two files is the right one?"
    )
}

/// What is said of a number that is null or NaN, which lerobot reads no more than this.
fn no_value(key: &str, default: &dyn std::fmt::Display) -> String {
    format!("{key} is null or NaN: write the number, or take the line out for lerobot's default, {default}")
}

/// Reads a JSON file. Deep nesting and other damage come back as errors.
pub(crate) fn read_json(path: &Path) -> Result<Value, ModelError> {
    let read = |e| ModelError::Read { path: path.into(), source: e };
    let mut bytes = Vec::new();
    pi0_orbax::open_file(path).and_then(|mut file| file.read_to_end(&mut bytes)).map_err(read)?;
    if let Some(what) = pi0_orbax::placeholder(&bytes) {
        return Err(ModelError::config(path, format!("is {what}")));
    }
    let plain = crate::plain_json(&bytes).map_err(|what| ModelError::config(path, what))?;
    serde_json::from_slice(&plain).map_err(|e| ModelError::config(path, format!("is not valid JSON: {e}")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn schedules_start_at_one_and_differ_in_the_last_bits() {
        let (a, b) = (TimeSchedule::Lerobot.times(10), TimeSchedule::Openpi.times(10));
        assert_eq!((a.len(), a[0], b[0]), (10, 1.0, 1.0));
        assert_eq!(a[7], 0.3f32);
        assert!(a != b && a.iter().zip(&b).all(|(a, b)| (a - b).abs() < 3e-7), "{a:?} {b:?}");
    }

    #[test]
    fn openpi_and_lerobot_are_told_apart() {
        let parse = |s: &str| {
            Config::from_json(serde_json::from_str::<Value>(s).unwrap().as_object().unwrap(), Kind::Pi0)
        };
        let openpi = parse(r#"{"action_dim": 32, "action_horizon": 10, "precision": "bfloat16"}"#).unwrap();
        assert_eq!(
            (openpi.family, openpi.horizon, openpi.schedule),
            (Family::Openpi, 10, TimeSchedule::Openpi)
        );
        let lerobot = parse(r#"{"type": "pi0", "chunk_size": 16}"#).unwrap();
        assert_eq!(
            (lerobot.family, lerobot.horizon, lerobot.schedule),
            (Family::Lerobot, 16, TimeSchedule::Lerobot)
        );
        let old =
            parse(r#"{"type": "pi0", "resize_imgs_with_padding": [224, 224], "num_steps": 5}"#).unwrap();
        assert_eq!((old.schedule, old.num_steps), (TimeSchedule::Openpi, 5));
        for (json, word) in [
            (r#"{"type": "pi05"}"#, "pi05"),
            (r#"{"type": "pi0_fast"}"#, "π0"),
            (r#"{"type": "pi0", "use_visual_memory": true}"#, "use_visual_memory"),
            (r#"{"type": "pi0", "rtc_training_max_delay": 3}"#, "rtc_training_max_delay"),
            (r#"{"type": "act"}"#, "act"),
            ("{}", "neither"),
            (r#"{"type": "pi0", "chunk_size": -1}"#, "chunk_size"),
            (r#"{"type": "pi0", "paligemma_variant": "gemma_7b"}"#, "gemma_7b"),
            (r#"{"type": "pi0", "image_resolution": [224]}"#, "resolution"),
        ] {
            let e = parse(json).unwrap_err();
            assert!(e.contains(word), "{json}: {e}");
        }
    }
}
