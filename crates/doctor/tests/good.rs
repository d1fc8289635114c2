//! A false alarm is worse than silence: what is right raises nothing.

mod common;

use common::Rig;
use pi0_demo::episode::{Episode, Eye, Settings};
use pi0_demo::{Rng, Scene, Split};
use pi0_device::HostTensor;
use pi0_doctor::{Chunk, Doctor, History, Profile, Seen, Thresholds};
use pi0_policy::{Image, Observation};

/// The shipped policies for the demo world.
const MODELS: [&str; 2] = ["demo", "demo-pi05"];

#[test]
fn good_observations_raise_nothing() {
    for mut rig in Rig::all() {
        let findings = rig.run(400, |_, _| ());
        assert!(findings.is_empty(), "{}: {:#?}", rig.name, findings[0]);
    }
}

/// The ten thousand; the default is quick.
#[test]
fn the_demo_world_raises_nothing() {
    let count = std::env::var("PI0_DOCTOR_GOOD").map_or(300, |text| text.parse().expect("a number"));
    eprintln!("{count} observations; set PI0_DOCTOR_GOOD for more");
    for model in MODELS {
        let mut rig = Rig::shipped(model, 7);
        for i in 0..count {
            let sample = rig.sample();
            let findings = rig.look(&sample);
            assert!(findings.is_empty(), "{model}, observation {i}: {findings:#?}");
        }
    }
}

/// The shipped policies themselves in the closed loop, their own chunks judged.
#[test]
fn the_demo_policies_raise_nothing() {
    let count: usize = std::env::var("PI0_DOCTOR_POLICY").map_or(40, |text| text.parse().expect("a number"));
    eprintln!("{count} observations; set PI0_DOCTOR_POLICY for more");
    MODELS.iter().for_each(|model| closed_loop(model, count));
}

fn closed_loop(model: &str, count: usize) {
    let dir = std::path::Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models").join(model);
    let checkpoint = pi0_model::Checkpoint::open(&dir).unwrap();
    let policy = pi0_policy::Policy::load(&dir, (&checkpoint.config).into(), &Default::default()).unwrap();
    let device = pi0_cpu::Cpu::new(pi0_cpu::CpuOptions { threads: Some(1), ..Default::default() }).unwrap();
    let model = pi0_model::Pi0::load(device, checkpoint, pi0_model::Extent::Cache, &|_| ()).unwrap();
    let model: Box<dyn pi0_model::ActionModel> = Box::new(model);
    let doctor = Doctor::new(Profile::of(&policy), Thresholds::default());
    let (mut history, mut rng, mut time) = (History::default(), Rng::new(11), 0.0);
    let mut episode = Episode::new(Scene::random(&mut rng, Split::Train));
    for i in 0..count {
        if episode.world.outcome().is_some() {
            episode = Episode::new(Scene::random(&mut rng, Split::Train));
        }
        let view = episode.view(&Settings::DEFAULT);
        let image = |(eye, frame): &(Eye, pi0_demo::render::Frame)| {
            (eye.key().to_owned(), Image::rgb8(frame.rgb.clone(), frame.height, frame.width))
        };
        let observation = Observation {
            images: view.images.iter().map(image).collect(),
            state: view.state.map(f64::from).to_vec(),
            prompt: Some(view.prompt),
        };
        let prepared = policy.preprocess(&observation).unwrap();
        let mut findings = doctor.observe(&mut history, &Seen::of(&policy, &observation, &prepared, time));
        let options = pi0_model::SampleOptions { steps: None, seed: i as u64 };
        let chunks: Vec<HostTensor> =
            model.sample_actions(std::slice::from_ref(&prepared.inputs), &options).unwrap();
        let actions = policy.postprocess(&chunks[0].data, &prepared).unwrap();
        let trained = policy.actions_as_trained(&chunks[0].data);
        findings.extend(doctor.answer(
            &mut history,
            &Chunk {
                time,
                rows: actions.rows,
                cols: actions.cols,
                actions: &actions.data,
                trained: &trained,
                latency: 0.05,
                malformed: "",
            },
        ));
        assert!(findings.is_empty(), "observation {i}: {findings:#?}");
        for row in actions.iter() {
            if episode.world.outcome().is_none() {
                episode.world.step(&pi0_demo::actor::action(row).unwrap());
            }
        }
        time += 0.4;
    }
}

/// Robots stand still, wait for people, and start anew.
#[test]
fn pauses_and_new_episodes_raise_nothing() {
    for mut rig in Rig::all() {
        let (name, cols) = (rig.name, rig.policy.summary().action_width);
        let mut held: Option<Vec<f64>> = None;
        let findings = rig.run(200, |i, sample| {
            // A robot that waits: it is told to stay and stays, cameras go on.
            match i % 100 {
                50 => held = Some(sample.observation.state.clone()),
                80 => held = None,
                _ => {}
            }
            if let Some(state) = &held {
                sample.observation.state.clone_from(state);
                sample.truth.clone_from(state);
                for row in sample.actions.chunks_exact_mut(cols) {
                    match name {
                        "aloha" => row.copy_from_slice(state),
                        "droid" => (0..7).for_each(|d| row[d] = 0.0),
                        _ => row[..cols - 1].fill(0.0),
                    }
                }
            }
            if i % 100 == 99 {
                sample.pause = 30.0;
                sample.observation.prompt = Some("pick up the green block".into());
            }
        });
        assert!(findings.is_empty(), "{name}: {:#?}", findings[0]);
    }
}

/// One frame lost, one frame black while a camera starts, is told once; one repeated request is not told at all.
#[test]
fn once_is_no_habit() {
    for mut rig in Rig::all() {
        rig.run(10, |_, _| ());
        let sample = rig.sample();
        assert!(rig.look(&sample).is_empty());
        let again = rig.look(&sample);
        assert!(again.is_empty(), "{}: {again:#?}", rig.name);
        let findings = rig.run(20, |_, _| ());
        assert!(findings.is_empty(), "{}: {:#?}", rig.name, findings[0]);
    }
}
