//! The checkpoint in `models/demo`, in its world.

use std::path::{Path, PathBuf};

use pi0_cpu::{Cpu, CpuOptions};
use pi0_demo::actor::Local;
use pi0_demo::episode::Settings;
use pi0_demo::evaluate::{Condition, Score, evaluate};
use pi0_demo::{Kind, Task, Verb};
use pi0_model::{Checkpoint, Extent, Pi0};
use pi0_policy::{Policy, PolicyOptions, PromptFormat, Tokenizer};

fn directory() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo")
}

fn load() -> Local {
    let checkpoint = Checkpoint::open(&directory()).unwrap();
    let policy = Policy::load(&directory(), (&checkpoint.config).into(), &PolicyOptions::default()).unwrap();
    let device = Cpu::new(CpuOptions::default()).unwrap();
    let model = Box::new(Pi0::load(device, checkpoint, Extent::Cache, &|_| ()).unwrap());
    Local { policy, model, steps: None }
}

#[test]
fn every_instruction_has_its_words() {
    let config = Checkpoint::open(&directory()).unwrap().config;
    let tokenizer = Tokenizer::open(&directory()).unwrap();
    assert_eq!(tokenizer.size(), config.vocab_size);
    for target in Kind::all() {
        for verb in [Verb::Touch, Verb::Put] {
            let prompt = format!("{}\n", Task { verb, target });
            let mut warnings = Vec::new();
            let ids = PromptFormat::Verbatim
                .tokens(&tokenizer, &prompt, config.max_tokens, config.vocab_size, &mut warnings)
                .unwrap();
            assert_eq!((ids[0], *ids.last().unwrap()), (2, 4), "{prompt}: BOS first, the newline last");
            assert!(!ids.contains(&3), "{prompt}: {ids:?} has an unknown word");
            assert!(warnings.is_empty(), "{prompt}: {warnings:?}");
        }
    }
}

#[test]
fn it_acts_and_it_listens() {
    let mut actor = load();
    let mut score =
        |condition| -> Score { evaluate(&mut actor, condition, 0, 32, &Settings::DEFAULT).unwrap() };
    let (normal, wrong) = (score(Condition::Normal), score(Condition::WrongInstruction));
    assert!(normal.rate() >= 0.9, "{normal:?}");
    assert!(wrong.rate() <= 0.2, "{wrong:?}");
}

/// Slow in a debug build: set `PI0_DEMO_EPISODES` to the number of episodes, such as 200.
#[test]
fn it_succeeds_as_often_as_reported() {
    let Some(episodes) = std::env::var("PI0_DEMO_EPISODES").ok().and_then(|n| n.parse().ok()) else {
        eprintln!("skipped: PI0_DEMO_EPISODES is not set");
        return;
    };
    let score = evaluate(&mut load(), Condition::Normal, 0, episodes, &Settings::DEFAULT).unwrap();
    eprintln!("{score:?}, interval {:?}", score.interval());
    // models/demo/README.md: all of 200.
    assert!(score.interval().1 >= 0.99, "{score:?}");
}
