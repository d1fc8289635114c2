//! Every module of the network as a case that runs alone, on any device, with the same weights and inputs.
//!
//! [`check`](check::check) runs one on a device and on a judge and compares; [`culprits`](check::culprits) tells which
//! modules are at fault when several fail. A device crate stamps the whole list into its tests with one line:
//!
//! ```no_run
//! # use pi0_device::Reference as Cpu;
//! pi0_model::module_tests!(Cpu, pi0_model::cases::Format::F32);
//! ```

mod answer;
mod bounds;
pub mod check;
mod inputs;
mod layers;
mod padded;
mod rounded;
mod whole;

use pi0_device::{Device, HostTensor};

pub use bounds::{Format, SAFETY, VALUES, bound, bounds, bounds_of_groups};
pub use inputs::{LayerChoice, Setup, random_inputs};
pub use rounded::{Rounded, RoundedWeight};

use crate::{Kind, ModelError};

/// Named results of one module.
pub type Outputs = Vec<(String, HostTensor)>;

/// A module of the network.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Module {
    /// Sines and cosines of every step's time, and what reads them first: π0's half layer, or π0.5's time network.
    TimeEmbedding,
    /// Scale, shift and gate of every norm of π0.5's expert at every step's time.
    Modulations,
    /// Positions of the packed rows, against those of the padded definition.
    Positions,
    /// Attention over random rows under every mask of an inference, against the padded definition.
    Masks,
    /// Patches to embedded patches with their positions.
    PatchEmbedding,
    /// One vision layer's attention half.
    VisionAttention,
    /// One vision layer's MLP half.
    VisionMlp,
    /// One vision layer.
    VisionBlock,
    /// Patches to image tokens.
    VisionTower,
    /// The last vision norm and the projection to the language model's width.
    Projector,
    /// A part of one of the two Gemma towers.
    Gemma(Tower, Part),
    /// Images and prompt to embedded prefix rows.
    Prefix,
    /// State, noisy actions and time to embedded suffix rows.
    Suffix,
    /// Denoising steps over a given prefix cache: the first, and one that reuses its state rows.
    Denoise,
    /// π0-FAST: rows of the language model to logits.
    AnswerHead,
    /// π0-FAST: tokens of an answer, one after the other, over a given prefix cache; robots end one by one.
    AnswerTokens,
    /// Images and prompt to the prefix cache.
    PaliGemma,
    /// π0-FAST: images and prompt to the rows that the answer is the continuation of.
    AnswerPrompt,
    /// The whole network.
    Pi0,
}

/// Which of the two Gemma towers.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Tower {
    /// The language model over images and prompt.
    Prefix,
    /// The action expert over state and actions.
    Expert,
}

/// A part of a Gemma tower.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Part {
    /// Both norms of a layer, and the final one; of π0.5's expert the adaptive ones.
    RmsNorm,
    /// The gated residual of π0.5's expert.
    GatedAdd,
    /// Rotary position embedding at the tower's positions.
    Rope,
    /// A layer's attention half, with its keys and values.
    Attention,
    /// A layer's MLP half.
    Mlp,
    /// One layer.
    Block,
    /// All layers and the final norm.
    Stack,
}

const fn gemma(tower: Tower) -> [Module; 7] {
    [
        Module::Gemma(tower, Part::RmsNorm),
        Module::Gemma(tower, Part::GatedAdd),
        Module::Gemma(tower, Part::Rope),
        Module::Gemma(tower, Part::Attention),
        Module::Gemma(tower, Part::Mlp),
        Module::Gemma(tower, Part::Block),
        Module::Gemma(tower, Part::Stack),
    ]
}

impl Module {
    /// Every module of a network, parts before what is made of them.
    pub fn all(kind: Kind) -> Vec<Module> {
        Self::of_family().into_iter().filter(|m| m.belongs(kind)).collect()
    }

    /// Whether a network has this module.
    fn belongs(self, kind: Kind) -> bool {
        use Module::*;
        match self {
            Modulations | Gemma(_, Part::GatedAdd) => kind == Kind::Pi05,
            AnswerHead | AnswerTokens | AnswerPrompt => kind == Kind::Pi0Fast,
            // The masks and positions of states and actions; an answer's are judged by its tokens.
            TimeEmbedding | Positions | Masks | Suffix | Denoise | Gemma(Tower::Expert, _) => {
                kind != Kind::Pi0Fast
            }
            _ => true,
        }
    }

    /// Every module of any network of the family.
    pub fn of_family() -> Vec<Module> {
        use Module::*;
        let mut all = vec![
            TimeEmbedding,
            Modulations,
            Positions,
            Masks,
            PatchEmbedding,
            VisionAttention,
            VisionMlp,
            VisionBlock,
            Projector,
            VisionTower,
        ];
        all.extend(gemma(Tower::Prefix).into_iter().filter(|m| *m != Gemma(Tower::Prefix, Part::GatedAdd)));
        all.extend(gemma(Tower::Expert));
        all.extend([Prefix, Suffix, Denoise, AnswerHead, AnswerTokens, PaliGemma, AnswerPrompt, Pi0]);
        all
    }

    /// Dotted name, such as `gemma.prefix.mlp`.
    pub fn name(self) -> &'static str {
        use Module::*;
        match self {
            TimeEmbedding => "common.time_embedding",
            Modulations => "common.modulations",
            Positions => "common.positions",
            Masks => "attention.masks",
            PatchEmbedding => "siglip.patch_embedding",
            VisionAttention => "siglip.attention",
            VisionMlp => "siglip.mlp",
            VisionBlock => "siglip.block",
            VisionTower => "siglip.tower",
            Projector => "projector",
            Gemma(Tower::Prefix, part) => match part {
                Part::RmsNorm => "gemma.prefix.rms_norm",
                Part::GatedAdd => "gemma.prefix.gated_add",
                Part::Rope => "gemma.prefix.rope",
                Part::Attention => "gemma.prefix.attention",
                Part::Mlp => "gemma.prefix.mlp",
                Part::Block => "gemma.prefix.block",
                Part::Stack => "gemma.prefix.stack",
            },
            Gemma(Tower::Expert, part) => match part {
                Part::RmsNorm => "gemma.expert.rms_norm",
                Part::GatedAdd => "gemma.expert.gated_add",
                Part::Rope => "gemma.expert.rope",
                Part::Attention => "gemma.expert.attention",
                Part::Mlp => "gemma.expert.mlp",
                Part::Block => "gemma.expert.block",
                Part::Stack => "gemma.expert.stack",
            },
            Prefix => "prefix",
            Suffix => "suffix",
            Denoise => "denoise",
            AnswerHead => "answer.head",
            AnswerTokens => "answer.tokens",
            AnswerPrompt => "answer.prompt",
            PaliGemma => "paligemma",
            Pi0 => "pi0",
        }
    }

    /// The modules that a name means: one, or all below a dotted prefix such as `gemma` or `gemma.expert`.
    pub fn named(name: &str) -> Vec<Module> {
        let below = |m: &Module| {
            m.name() == name || m.name().strip_prefix(name).is_some_and(|rest| rest.starts_with('.'))
        };
        Module::of_family().into_iter().filter(below).collect()
    }

    /// The modules that this one is made of. When one of them fails, this one fails for it.
    pub fn parts(self) -> Vec<Module> {
        use Module::*;
        match self {
            TimeEmbedding | Positions | Masks | PatchEmbedding | VisionMlp | Projector => vec![],
            Modulations => vec![TimeEmbedding],
            VisionAttention => vec![Masks],
            VisionBlock => vec![VisionAttention, VisionMlp],
            VisionTower => vec![PatchEmbedding, VisionBlock, Projector],
            Gemma(_, Part::RmsNorm | Part::GatedAdd) => vec![],
            Gemma(_, Part::Rope) => vec![Positions],
            Gemma(t, Part::Attention) => {
                vec![Gemma(t, Part::RmsNorm), Gemma(t, Part::GatedAdd), Gemma(t, Part::Rope), Masks]
            }
            Gemma(t, Part::Mlp) => vec![Gemma(t, Part::RmsNorm), Gemma(t, Part::GatedAdd)],
            Gemma(t, Part::Block) => vec![Gemma(t, Part::Attention), Gemma(t, Part::Mlp)],
            Gemma(t, Part::Stack) => vec![Gemma(t, Part::Block)],
            Prefix => vec![VisionTower],
            Suffix => vec![TimeEmbedding],
            Denoise => vec![Suffix, Modulations, Gemma(Tower::Expert, Part::Stack)],
            PaliGemma => vec![Prefix, Gemma(Tower::Prefix, Part::Stack)],
            AnswerHead => vec![Gemma(Tower::Prefix, Part::RmsNorm)],
            AnswerTokens => vec![Gemma(Tower::Prefix, Part::Stack)],
            AnswerPrompt => vec![PaliGemma],
            Pi0 => vec![PaliGemma, Denoise, AnswerHead, AnswerTokens, AnswerPrompt],
        }
    }

    /// Whether this module runs many layers: a tower, or more.
    pub fn is_deep(self) -> bool {
        use Module::*;
        matches!(
            self,
            VisionTower
                | Gemma(_, Part::Stack)
                | Prefix
                | Suffix
                | Denoise
                | AnswerTokens
                | AnswerPrompt
                | PaliGemma
                | Pi0
        )
    }

    /// Runs this module alone on `d`.
    pub fn run<D: Device>(self, d: &D, setup: &Setup) -> Result<Outputs, ModelError> {
        use Module::*;
        match self {
            Positions => padded::positions(d, setup),
            Masks => padded::attention(d, setup),
            PatchEmbedding => layers::patch_embedding(d, setup),
            VisionAttention | VisionMlp | VisionBlock => layers::vision(d, setup, self),
            Projector => layers::projector(d, setup),
            VisionTower => layers::vision_tower(d, setup),
            Gemma(tower, part) => layers::gemma(d, setup, tower, part),
            TimeEmbedding => whole::time_embedding(d, setup),
            Modulations => whole::modulations(d, setup),
            Prefix => whole::prefix(d, setup),
            Suffix => whole::suffix(d, setup),
            Denoise => whole::denoise(d, setup),
            AnswerHead => answer::head(d, setup),
            AnswerTokens => answer::tokens(d, setup),
            AnswerPrompt => answer::prompt(d, setup),
            PaliGemma => whole::paligemma(d, setup),
            Pi0 if setup.config().kind == Kind::Pi0Fast => answer::whole(d, setup),
            Pi0 => whole::pi0(d, setup),
        }
    }

    /// What the module must give, where that is known from a definition of its own rather than from the judge.
    pub fn expected(self, setup: &Setup) -> Result<Option<Outputs>, ModelError> {
        match self {
            Module::Positions => padded::expected_positions(setup).map(Some),
            Module::Masks => padded::expected_attention(setup).map(Some),
            _ => Ok(None),
        }
    }
}

/// Stamps every module into a device crate's tests: `module_tests!(EXPRESSION_THAT_OPENS_IT, FORMAT)`.
#[macro_export]
macro_rules! module_tests {
    ($open:expr, $format:expr) => {
        #[test]
        fn every_module_agrees_with_the_reference() {
            let device = $open;
            for setup in $crate::cases::Setup::small().unwrap() {
                for module in $crate::cases::Module::all(setup.config().kind) {
                    let done = $crate::cases::check::check(
                        &device,
                        &::pi0_device::Reference,
                        module,
                        &setup,
                        $format,
                    );
                    let line = done.summary();
                    println!("{} {line}", setup.name);
                    assert!(done.passed(), "{} {line}", setup.name);
                }
            }
        }
    };
}
