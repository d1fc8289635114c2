//! A trained policy acts in its world on the simulator, and the CPU in f32 is asked the same questions.

mod common;

use std::path::Path;
use std::time::Instant;

use pi0_cpu::{Cpu, CpuOptions, Format};
use pi0_demo::actor::{Actor, Local};
use pi0_demo::episode::{self, Episode, Settings, View};
use pi0_demo::evaluate::{Condition, scene};
use pi0_demo::{Action, Outcome};
use pi0_device::{Agreement, Bound, Device, compare};
use pi0_model::{Checkpoint, Extent, Pi0};
use pi0_policy::{Policy, PolicyOptions};

/// As for tiny models end to end.
const ACTIONS: Bound = Bound { pcc: 0.999, relative_l2: 0.02, max_abs: f64::INFINITY };
/// The same with weights as bfp8.
const BFP8: Bound = Bound { pcc: 0.999, relative_l2: 0.05, max_abs: f64::INFINITY };

fn actor<D: Device + 'static>(device: D) -> Local {
    let directory = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo");
    let checkpoint = Checkpoint::open(&directory).unwrap();
    let policy = Policy::load(&directory, (&checkpoint.config).into(), &PolicyOptions::default()).unwrap();
    let model = Box::new(Pi0::load(device, checkpoint, Extent::Cache, &|_| ()).unwrap());
    Local { policy, model, steps: None }
}

/// Acts as `tensix` says, and keeps what both say.
struct Both {
    tensix: Local,
    cpu: Local,
    answers: [Vec<f32>; 2],
}

impl Actor for Both {
    fn act(&mut self, views: &[View], seed: u64) -> pi0_demo::Result<Vec<Vec<Action>>> {
        let chunks = self.tensix.act(views, seed)?;
        let expected = self.cpu.act(views, seed)?;
        for (answers, chunks) in self.answers.iter_mut().zip([&chunks, &expected]) {
            answers.extend(chunks.iter().flatten().flatten());
        }
        Ok(chunks)
    }
}

impl Both {
    fn agreement(&self) -> Agreement {
        compare(&self.answers[0], &self.answers[1])
    }
}

/// One episode; of more, set `PI0_TENSIX_EPISODES` to their number.
#[test]
fn a_trained_policy_acts_as_on_the_cpu() {
    let Some(device) = common::open() else { return };
    let cpu = Cpu::new(CpuOptions { format: Format::F32, ..CpuOptions::default() }).unwrap();
    let mut both = Both { tensix: actor(device), cpu: actor(cpu), answers: Default::default() };
    let episodes = std::env::var("PI0_TENSIX_EPISODES").map_or(1, |n| n.parse().unwrap());
    let (start, mut inferences, mut successes) = (Instant::now(), 0, 0);
    for seed in 0..episodes {
        let mut episode = [Episode::new(scene(seed, Condition::Normal))];
        let (outcome, times) =
            episode::run(&mut both, &mut episode, &Settings::DEFAULT, &mut |_, _| ()).unwrap();
        inferences += times.len();
        successes += u64::from(outcome[0] == Outcome::Success);
        println!("{}: {:?} after {} inferences", episode[0].instruction, outcome[0], times.len());
    }
    let agreement = both.agreement();
    let seconds = start.elapsed().as_secs_f64() / inferences as f64;
    println!("{successes} of {episodes} succeeded, {inferences} inferences of {seconds:.1} s: {agreement}");
    let bound = if common::bfp8() { BFP8 } else { ACTIONS };
    assert!(bound.holds(&agreement), "{agreement}");
}
