//! π0-FAST against its references: lerobot's in case f, openpi's in case g. Prompt, first logits, tokens.
//!
//! Case f is always checked; set `PI0_GOLDEN` to a directory with more (f, g, made by `golden/make_fast.py`) to check those too.

mod runs;

use std::path::{Path, PathBuf};

use pi0_device::{Bound, Device, HostTensor, Reference, Tapped};
use pi0_model::golden::{compare_taps, golden_taps, padded_tokens, read_tensors};
use pi0_model::{
    AnswerConfig, Checkpoint, Config, EOS, Extent, Family, Inputs, Kind, OpenOptions, Pi0, SampleOptions,
    synth,
};

use runs::{family, inputs, meta, repository, runs};

/// `|` in the vocabulary of the golden data.
const BAR: u32 = 377;

/// The bound for logits is absolute, 2e-5.
const BOUND: Bound = Bound { pcc: 0.999_999_99, relative_l2: 1e-5, max_abs: 1e-4 };

fn cases() -> Vec<PathBuf> {
    let mut cases = vec![repository().join("golden/f")];
    let Some(root) = std::env::var_os("PI0_GOLDEN").map(PathBuf::from) else {
        eprintln!("skipped: golden cases outside the repository (set PI0_GOLDEN=DIR)");
        return cases;
    };
    let entries = std::fs::read_dir(&root).unwrap_or_else(|e| panic!("{}: {e}", root.display()));
    let fast = |case: &PathBuf| {
        case.join("meta.json").exists() && case.join("arch.json").exists() && family(case) == "pi0_fast"
    };
    cases.extend(entries.map(|e| e.unwrap().path()).filter(fast));
    cases.sort();
    cases
}

fn open(case: &Path) -> Checkpoint {
    let arch = Some(case.join("arch.json"));
    let mut checkpoint = Checkpoint::open_with(case, &OpenOptions { arch, ..Default::default() }).unwrap();
    assert_eq!(checkpoint.config.kind, Kind::Pi0Fast);
    let openpi = meta(case)["flavour"] == "openpi";
    assert_eq!(checkpoint.config.family == Family::Openpi, openpi);
    if openpi {
        // Written under lerobot's names, both matrices, which are the same.
        checkpoint.config.answer.as_mut().unwrap().tied = true;
    }
    checkpoint
}

fn load(case: &Path, extent: Extent) -> Pi0<Tapped<Reference>> {
    Pi0::load(Tapped::new(Reference), open(case), extent, &|_| ()).unwrap()
}

fn ends(case: &Path) -> u32 {
    if meta(case)["flavour"] == "openpi" { EOS } else { BAR }
}

fn batch(case: &Path, run: &str, c: &Config) -> Vec<Inputs> {
    let end = Some(ends(case));
    inputs(case, run, c).into_iter().map(|input| Inputs { end, ..input }).collect()
}

/// Steps of a run: the references go on until the longest answer has ended.
fn options(case: &Path, run: &str) -> SampleOptions {
    let runs = meta(case)["runs"].clone();
    let said = runs.as_array().unwrap().iter().find(|r| r["name"] == run).unwrap()["steps"].as_u64();
    SampleOptions { steps: said.map(|n| n as usize), ..Default::default() }
}

/// A robot's answer up to its own end: while others go on, the references go on with it too.
fn answer(tokens: &[f32], end: u32) -> Vec<f32> {
    let own = tokens.iter().position(|&t| t as u32 == end).map_or(tokens.len(), |at| at + 1);
    let mut own = tokens[..own].to_vec();
    while own.last() == Some(&0.0) {
        own.pop();
    }
    own
}

#[test]
fn prompt_logits_and_tokens() {
    for case in cases() {
        let model = load(&case, Extent::Whole);
        for run in runs(&case) {
            let c = model.config();
            let batch = batch(&case, &run, c);
            let mut want = read_tensors(&case.join(format!("{run}.outputs.safetensors"))).unwrap();
            model.device().take().unwrap();
            let answers = model.sample_actions(&batch, &options(&case, &run)).unwrap();
            let taps = model.device().take().unwrap();
            let width = padded_tokens(&want, &batch, c);
            let mut got = golden_taps(taps, &batch, c, &[], width).unwrap();

            let tokens = want.remove("tokens").unwrap();
            for (row, got) in answers.iter().enumerate() {
                assert_eq!(got.data, answer(tokens.row(row), ends(&case)), "{} {run} {row}", case.display());
            }
            // What the codec makes of them is the policy's.
            want.remove("actions");
            let (ids, values) = (want.remove("top.ids").unwrap(), want.remove("top.values").unwrap());
            want.retain(|name, _| !name.starts_with("vision."));
            got.retain(|name, _| want.contains_key(name));
            if batch.len() == 1 {
                best_of_each_step(&model, &answers[0], &batch, &ids, &values);
            }
            let mut worst = 0.0f64;
            for (name, result) in compare_taps(&got, &want, &batch) {
                let a = result.unwrap_or_else(|e| panic!("{} {run} {name} {e}", case.display()));
                worst = worst.max(a.relative_l2);
                let logits = name.ends_with("logits") && a.max_abs > 2e-5;
                assert!(BOUND.holds(&a) && !logits, "{} {run} {name}: {a}", case.display());
            }
            println!("{} {run}: {} tensors, worst relative L2 {worst:.1e}", case.display(), want.len());
        }
    }
}

/// The eight best logits of every step.
fn best_of_each_step(
    model: &Pi0<Tapped<Reference>>,
    answer: &HostTensor,
    batch: &[Inputs],
    ids: &HostTensor,
    values: &HostTensor,
) {
    model.device().take().unwrap();
    let steps = answer.data.len();
    model.sample_actions(batch, &SampleOptions { steps: Some(steps), ..Default::default() }).unwrap();
    let taps = model.device().take().unwrap();
    let logits: Vec<_> = taps.iter().filter(|(name, _)| name.ends_with(".logits")).collect();
    assert_eq!(logits.len(), steps);
    for (step, (_, logits)) in logits.iter().enumerate() {
        for (&id, &value) in ids.row(step).iter().zip(values.row(step)) {
            let got = logits.row(0)[id as usize];
            assert!((got - value).abs() <= 1e-4, "step {step}: {got} {value}");
        }
    }
}

/// Of the prompt's last layer only the last rows are read.
#[test]
fn leaving_out_what_nothing_reads_changes_nothing() {
    let case = repository().join("golden/f");
    let run = &runs(&case)[0];
    let (whole, cut) = (load(&case, Extent::Whole), load(&case, Extent::Cache));
    let batch = batch(&case, run, whole.config());
    let options = SampleOptions::default();
    let logits = |model: &Pi0<Tapped<Reference>>| {
        model.device().take().unwrap();
        let answers = model.sample_actions(&batch, &options).unwrap();
        let taps = model.device().take().unwrap();
        let logits: Vec<_> = taps.into_iter().filter(|(name, _)| name.ends_with("logits")).collect();
        (answers, logits)
    };
    assert_eq!(logits(&whole), logits(&cut));
}

/// What one robot writes does not depend on who stands beside it, nor on when the others end.
#[test]
fn a_robot_does_not_feel_its_neighbours() {
    let case = repository().join("golden/f");
    let model = load(&case, Extent::Cache);
    let batch = batch(&case, "mixed_masks_b2", model.config());
    let options = SampleOptions::default();
    let three = [batch[0].clone(), batch[1].clone(), batch[0].clone()];
    let together = model.sample_actions(&three, &options).unwrap();
    assert_ne!(together[0].data.len(), together[1].data.len(), "they end at different times");
    for (inputs, want) in three.iter().zip(together) {
        assert_eq!(model.sample_actions(std::slice::from_ref(inputs), &options).unwrap(), [want]);
    }
}

/// With the tokens of a valid answer alone to choose from, a valid answer is the same, and the head is a fraction.
#[test]
fn the_answers_own_tokens_are_enough_for_a_valid_answer() {
    let case = repository().join("golden/f");
    let mut checkpoint = open(&case);
    // Codes 0 to 159 go down from 1583.
    let mut only: Vec<u32> = (1424..=1583).chain([278, 355, 350, BAR, EOS]).collect();
    only.sort_unstable();
    checkpoint.config.answer.as_mut().unwrap().only = Some(only);
    let few = Pi0::load(Reference, checkpoint, Extent::Cache, &|_| ()).unwrap();
    let all = load(&case, Extent::Cache);
    let batch = batch(&case, "mixed_masks_b2", all.config());
    let options = SampleOptions::default();
    let want = all.sample_actions(&batch, &options).unwrap();
    assert_eq!(few.sample_actions(&batch, &options).unwrap(), want);
}

#[test]
fn temperature_draws_and_a_seed_repeats() {
    let case = repository().join("golden/f");
    let mut checkpoint = open(&case);
    checkpoint.config.answer.as_mut().unwrap().temperature = 4.0;
    let model = Pi0::load(Reference, checkpoint, Extent::Cache, &|_| ()).unwrap();
    let batch = batch(&case, "mixed_masks_b2", model.config());
    let run = |seed, batch: &[Inputs]| {
        model.sample_actions(batch, &SampleOptions { steps: Some(6), seed }).unwrap()
    };
    assert_eq!(run(1, &batch), run(1, &batch));
    assert_ne!(run(1, &batch), run(2, &batch));
    // Row 1 of a batch draws from the next seed.
    assert_eq!(run(2, &batch[1..])[0], run(1, &batch)[1]);
}

fn tiny(family: Family) -> Config {
    let c = Config::tiny().of_kind(Kind::Pi0Fast);
    Config { family, answer: Some(AnswerConfig::of_family(family)), ..c }
}

fn some(c: &Config) -> Inputs {
    let image = (0..3 * c.vision.image_size.pow(2)).map(|i| (i % 89) as f32 / 44.0 - 1.0).collect();
    Inputs { images: vec![Some(image), None], tokens: vec![2, 9, 17, 30], ..Inputs::default() }
}

/// openpi leaves a position out behind the prompt and ties the head to the embedding; lerobot ends the prompt with a BOS.
#[test]
fn the_families_differ() {
    let taps = |family| {
        let c = tiny(family);
        let model =
            Pi0::load(Tapped::new(Reference), synth::checkpoint(&c, 1).unwrap(), Extent::Whole, &|_| ())
                .unwrap();
        model.sample_actions(&[some(&c)], &SampleOptions { steps: Some(2), seed: 0 }).unwrap();
        model.device().take().unwrap()
    };
    let rows =
        |taps: &[(String, HostTensor)]| taps.iter().find(|(name, _)| name == "prefix.embs").unwrap().1.rows();
    let (lerobot, openpi) = (taps(Family::Lerobot), taps(Family::Openpi));
    assert_eq!((rows(&lerobot), rows(&openpi)), (256 + 5, 256 + 4));
    // The same network with and without the position left out: the first token is the same, its keys are turned further.
    let keys = |skipped| {
        let mut c = tiny(Family::Openpi);
        c.answer.as_mut().unwrap().skipped_positions = skipped;
        let model =
            Pi0::load(Tapped::new(Reference), synth::checkpoint(&c, 1).unwrap(), Extent::Whole, &|_| ())
                .unwrap();
        model.sample_actions(&[some(&c)], &SampleOptions { steps: Some(2), seed: 0 }).unwrap();
        let taps = model.device().take().unwrap();
        let of = |name: &str| taps.iter().find(|(n, _)| n == name).unwrap().1.clone();
        (of("step0.answer.logits"), of("step1.answer.layer0.k_cache"), of("step1.answer.layer0.v_cache"))
    };
    let (with, without) = (keys(1), keys(0));
    assert_eq!(with.0, without.0);
    assert_eq!(with.2, without.2);
    let raw = |position: u32| {
        // Turning forward by one more position turns the one into the other.
        let k = Reference.upload(1, 32, &without.1.data).unwrap();
        Reference.download(&Reference.rope(&k, &[position], 32).unwrap()).unwrap()
    };
    let far = raw(1).data.iter().zip(&with.1.data).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(far < 1e-4, "{far}");
    assert_ne!(with.1, without.1);
}

#[test]
fn bad_calls_are_named() {
    let c = tiny(Family::Lerobot);
    let model = Pi0::load(Reference, synth::checkpoint(&c, 1).unwrap(), Extent::Cache, &|_| ()).unwrap();
    let says = |inputs: Inputs, steps, word: &str| {
        let e = model.sample_actions(&[inputs], &SampleOptions { steps, seed: 0 }).unwrap_err().to_string();
        assert!(e.contains(word), "{e} should say {word}");
    };
    says(some(&c), Some(0), "answers of 0 tokens");
    says(some(&c), Some(5000), "answers of 5000 tokens");
    says(Inputs { tokens: vec![2; 201], ..some(&c) }, None, "201 tokens");
    says(Inputs { tokens: vec![512], ..some(&c) }, None, "token 512");
    says(Inputs { end: Some(512), ..some(&c) }, None, "ends with token 512");
    says(Inputs { images: vec![None, None], ..some(&c) }, None, "every camera is masked");
    let rtc = Some(pi0_model::Rtc::Trained(pi0_model::Clean { previous: vec![], delay: 0 }));
    says(Inputs { rtc, ..some(&c) }, None, "real-time chunking");
    assert!(model.sample_actions(&[], &SampleOptions::default()).is_err());
    // A prompt of nothing is odd, and answered.
    let one = SampleOptions { steps: Some(1), seed: 0 };
    let answer = model.sample_actions(&[Inputs { tokens: vec![], ..some(&c) }], &one).unwrap();
    assert_eq!(answer[0].shape, [1, 1]);
    for only in [vec![], vec![512]] {
        let mut c = c.clone();
        c.answer.as_mut().unwrap().only = Some(only);
        let e =
            Pi0::load(Reference, synth::checkpoint(&c, 1).unwrap(), Extent::Cache, &|_| ()).err().unwrap();
        assert!(e.to_string().contains("to choose from"), "{e}");
    }
}

/// A written checkpoint is read back as what it is.
#[test]
fn a_written_checkpoint_opens() {
    let c = tiny(Family::Lerobot);
    let dir = tempfile::tempdir().unwrap();
    c.write(dir.path(), &["top"], 14, c.action_dim).unwrap();
    synth::write_weights(&c, 7, dir.path(), &|_| ()).unwrap();
    let read = Checkpoint::open(dir.path()).unwrap();
    assert_eq!(read.config, c);
    assert!(
        read.tensor(pi0_model::weights::LM_HEAD).bytes() != read.tensor(pi0_model::weights::EMBED).bytes()
    );
}

/// Guessed tokens change how many passes an answer takes and nothing of what it says: with nothing to guess from, with
/// guesses that are all right, and with those from other robots' answers; at every limit, and beside robots that end at
/// other times.
#[test]
fn guesses_change_no_token() {
    for case in cases() {
        let plain = load(&case, Extent::Cache);
        for speculate in [1, 3, 7] {
            let mut checkpoint = open(&case);
            checkpoint.config.answer.as_mut().unwrap().speculate = speculate;
            let model = Pi0::load(Tapped::new(Reference), checkpoint, Extent::Cache, &|_| ()).unwrap();
            let write = |model: &Pi0<Tapped<Reference>>, batch: &[Inputs], options: &SampleOptions| {
                model.device().take().unwrap();
                let answers = model.sample_actions(batch, options).unwrap();
                let taps = model.device().take().unwrap();
                (answers, taps.iter().filter(|(name, _)| name.ends_with("answer.logits")).count())
            };
            let mut wrong = false;
            for run in runs(&case) {
                let c = model.config();
                let batch = batch(&case, &run, c);
                let options = options(&case, &run);
                let (want, passes) = write(&plain, &batch, &options);
                let (got, fewer) = write(&model, &batch, &options);
                assert_eq!(got, want, "{} {run}", case.display());
                assert!(fewer <= passes);
                wrong |= fewer == passes;
                // The same again: the robots' own answers are among those to guess from.
                let (again, fewest) = write(&model, &batch, &options);
                assert_eq!(again, want, "{} {run} again", case.display());
                let longest = want.iter().map(HostTensor::cols).max().unwrap();
                assert_eq!(longest, passes, "a pass a token without guesses");
                if longest > 4 && batch.len() == 1 {
                    assert!(fewest < passes, "{fewest} of {passes} passes");
                }
                for limit in [1, 2, 3, 5, longest.saturating_sub(1).max(1)] {
                    let options = SampleOptions { steps: Some(limit), ..options.clone() };
                    assert_eq!(
                        write(&model, &batch, &options).0,
                        write(&plain, &batch, &options).0,
                        "{limit}"
                    );
                }
            }
            assert!(wrong, "some answer had nothing to guess from");
        }
    }
}

/// What is drawn by chance is drawn the same way: nothing is guessed.
#[test]
fn with_a_temperature_nothing_is_guessed() {
    let c = tiny(Family::Lerobot);
    let draw = |speculate| {
        let mut c = c.clone();
        let answer = c.answer.as_mut().unwrap();
        (answer.temperature, answer.speculate) = (1.0, speculate);
        let model = Pi0::load(Reference, synth::checkpoint(&c, 1).unwrap(), Extent::Cache, &|_| ()).unwrap();
        let options = SampleOptions { steps: Some(6), seed: 5 };
        [(); 2].map(|()| model.sample_actions(&[some(&c), some(&c)], &options).unwrap())
    };
    assert_eq!(draw(7), draw(0));
}
