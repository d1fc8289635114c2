//! Twenty-one mistakes, one of each kind, on four shapes of observations: each is found and named, and nothing else is.

mod common;

use common::{COLOURS, EXECUTED, HORIZON, Rig, Sample, kinds, photo};
use pi0_doctor::{Doctor, Finding, Kind, Thresholds};
use pi0_policy::{Image, Pixels};

/// Runs good samples, then changed ones, on every robot. `change` gets the number of the changed sample.
fn plant(
    wanted: Kind,
    count: usize,
    mut change: impl FnMut(&Rig, usize, &mut Sample),
) -> Vec<(&'static str, Finding)> {
    let mut found = Vec::new();
    for rig in Rig::all() {
        found.extend(plant_on(rig, wanted, count, &mut change));
    }
    found
}

fn plant_on(
    mut rig: Rig,
    wanted: Kind,
    count: usize,
    change: &mut dyn FnMut(&Rig, usize, &mut Sample),
) -> Option<(&'static str, Finding)> {
    let good = rig.run(15, |_, _| ());
    assert!(good.is_empty(), "{}, before: {:#?}", rig.name, good[0]);
    let mut all = Vec::new();
    for i in 0..count {
        let mut sample = rig.sample();
        change(&rig, i, &mut sample);
        all.extend(rig.look(&sample));
    }
    assert_eq!(kinds(&all), [wanted], "{}: {all:#?}", rig.name);
    let last = all.pop()?;
    assert!(!last.text.is_empty() && last.since > 15 && last.count >= 1, "{last:?}");
    Some((rig.name, last))
}

fn says(found: &[(&'static str, Finding)], words: &str) {
    for (robot, finding) in found {
        assert!(finding.text.contains(words), "{robot}: {words:?} is missing in {:?}", finding.text);
    }
}

/// The shape of an image as its robot sends it.
fn shape(rig: &Rig) -> [usize; 3] {
    match rig.name {
        "aloha" => [3, 48, 64],
        "droid" => [45, 80, 3],
        "demo" => [56, 56, 3],
        _ => [64, 64, 3],
    }
}

fn flat(shape: [usize; 3], value: u8) -> Image {
    Image::array(Pixels::U8(vec![value; shape.iter().product()].into()), shape)
}

#[test]
fn image_black() {
    let found =
        plant(Kind::ImageBlack, 1, |rig, _, sample| sample.observation.images[1].1 = flat(shape(rig), 0));
    says(&found, "is black");
    plant(Kind::ImageBlack, 2, |rig, i, sample| {
        sample.observation.images[0].1 = flat(shape(rig), 3 + i as u8)
    });
}

#[test]
fn image_constant() {
    let found = plant(Kind::ImageConstant, 1, |rig, _, s| s.observation.images[0].1 = flat(shape(rig), 128));
    says(&found, "128, 128, 128");
}

#[test]
fn image_frozen() {
    let mut first = None;
    let found = plant(Kind::ImageFrozen, 12, |_, i, sample| {
        if i == 0 {
            first = Some(sample.observation.images[0].clone());
        }
        sample.observation.images[0] = first.clone().unwrap();
    });
    says(&found, "is frozen");
}

#[test]
fn image_equal() {
    let found = plant(Kind::ImageEqual, 1, |_, _, sample| {
        sample.observation.images[1].1 = sample.observation.images[0].1.clone();
    });
    says(&found, "show the same picture");
}

#[test]
fn image_bars() {
    let found = plant(Kind::ImageBars, 1, |rig, i, sample| {
        let wide = if rig.name == "aloha" { [3, 20, 90] } else { [20, 90, 3] };
        sample.observation.images[0].1 = photo(wide, 0, i);
    });
    says(&found, "90 x 20");
}

#[test]
fn image_range() {
    // Floats in 0 to 1 made bytes.
    let found = plant(Kind::ImageRange, 1, |rig, _, sample| {
        let shape = shape(rig);
        let bytes: Vec<u8> = (0..shape.iter().product()).map(|i: usize| (i * 7 % 3 / 2) as u8).collect();
        sample.observation.images[0].1 = Image::array(Pixels::U8(bytes.into()), shape);
    });
    says(&found, "0 and 1 only");
    // Divided by 255 twice.
    let found = plant(Kind::ImageRange, 1, |rig, _, sample| {
        let shape = shape(rig);
        let floats: Vec<f32> =
            (0..shape.iter().product()).map(|i: usize| (i % 200) as f32 / 255.0 / 255.0).collect();
        sample.observation.images[0].1 = Image::array(Pixels::F32(floats.into()), shape);
    });
    says(&found, "divided by 255 twice");
}

fn with_colours(rig: Rig) -> Rig {
    rig.with_profile(|profile| {
        profile.cameras.iter_mut().zip(COLOURS).for_each(|(camera, colour)| camera.colour = Some(colour));
    })
}

/// Robots whose pictures have known colours, and their training data the same.
fn coloured() -> Vec<Rig> {
    let mut rigs = Rig::all();
    rigs.remove(0);
    rigs.into_iter().map(with_colours).collect()
}

#[test]
fn colours_of_the_training_data_raise_nothing() {
    for mut rig in coloured() {
        let findings = rig.run(100, |_, _| ());
        assert!(findings.is_empty(), "{}: {:#?}", rig.name, findings[0]);
    }
}

/// The demo world's own means, measured here.
fn demo_colours() -> Rig {
    let mut rig = Rig::demo(5);
    let mut sums = [[0.0; 3]; 2];
    for _ in 0..40 {
        let sample = rig.sample();
        for (sum, (_, image)) in sums.iter_mut().zip(&sample.observation.images) {
            let data = bytes(image);
            (0..3).for_each(|c| {
                let channel = data.iter().skip(c).step_by(3);
                sum[c] +=
                    channel.map(|x| f64::from(*x)).sum::<f64>() / (data.len() / 3) as f64 / 255.0 / 40.0;
            });
        }
    }
    Rig::demo(6).with_profile(|profile| {
        profile.cameras.iter_mut().zip(sums).for_each(|(camera, colour)| camera.colour = Some(colour));
    })
}

/// The samples of an image of bytes.
fn bytes(image: &Image) -> Vec<u8> {
    let Pixels::U8(data) = image.pixels() else { panic!("bytes wanted") };
    data.to_vec()
}

fn swap_red_and_blue(image: &mut Image, shape: [usize; 3]) {
    let mut data = bytes(image);
    if shape[0] == 3 {
        let n = shape[1] * shape[2];
        let (red, rest) = data.split_at_mut(n);
        red.swap_with_slice(&mut rest[n..]);
    } else {
        data.chunks_exact_mut(3).for_each(|pixel| pixel.swap(0, 2));
    }
    *image = Image::array(Pixels::U8(data.into()), shape);
}

#[test]
fn colours_swapped() {
    for mut rig in coloured().into_iter().chain([demo_colours()]) {
        let shape = shape(&rig);
        let all = rig.run(40, |_, sample| {
            sample.observation.images.iter_mut().for_each(|(_, image)| swap_red_and_blue(image, shape));
        });
        assert_eq!(kinds(&all), [Kind::ColoursSwapped], "{}: {all:#?}", rig.name);
        assert!(all.iter().all(|finding| finding.text.contains("red and blue")));
        assert!(all[0].since >= 10);
    }
}

#[test]
fn cameras_swapped() {
    for mut rig in coloured().into_iter().chain([demo_colours()]) {
        let all = rig.run(40, |_, sample| {
            let (a, b) = sample.observation.images.split_at_mut(1);
            std::mem::swap(&mut a[0].1, &mut b[0].1);
        });
        assert_eq!(kinds(&all), [Kind::CamerasSwapped], "{}: {all:#?}", rig.name);
    }
}

#[test]
fn camera_missing() {
    for rig in Rig::all() {
        // ALOHA and the demo run without a wrist camera; DROID and LIBERO refuse.
        let wanted = if ["demo", "aloha"].contains(&rig.name) { Kind::CameraMissing } else { Kind::Refused };
        let (_, last) = plant_on(rig, wanted, 2, &mut |_, _, sample| {
            sample.observation.images.truncate(1);
        })
        .unwrap();
        assert!(last.text.contains("wrist"), "{last:?}");
    }
}

#[test]
fn state_outside() {
    let found = plant(Kind::StateOutside, 1, |rig, _, sample| {
        let radians = if rig.name == "demo" {
            0..0
        } else if rig.name == "libero" {
            3..6
        } else {
            0..6
        };
        if rig.name == "demo" {
            sample.observation.state.iter_mut().for_each(|x| *x *= 1000.0);
        }
        for x in &mut sample.observation.state[radians] {
            // Nowhere near zero, where all units agree.
            *x = (x.abs() + 0.3) * 180.0 / std::f64::consts::PI;
        }
    });
    for (robot, finding) in found {
        let unit = if robot == "demo" { "millimetres" } else { "degrees" };
        assert!(finding.text.contains(unit), "{robot}: {}", finding.text);
    }
}

#[test]
fn grippers_in_percent() {
    for rig in [Rig::smooth(pi0_policy::Robot::Aloha), Rig::smooth(pi0_policy::Robot::Droid)] {
        let gripper = if rig.name == "aloha" { 13 } else { 7 };
        let (_, last) = plant_on(rig, Kind::StateOutside, 1, &mut |_, _, sample| {
            sample.observation.state[gripper] = 60.0;
        })
        .unwrap();
        assert!(last.text.contains("0 to 100 instead of 0 to 1"), "{last:?}");
    }
}

#[test]
fn statistics_of_another_robot() {
    for rig in Rig::all() {
        let rig = rig.with_profile(|profile| {
            for (i, dimension) in profile.state.iter_mut().enumerate() {
                dimension.own = None;
                dimension.mean = Some(if i % 2 == 0 { -7.3 } else { 9.1 });
                dimension.deviation = Some(0.05 + 0.01 * i as f64);
            }
        });
        let mut rig = rig;
        let all = rig.run(1, |_, _| ());
        assert_eq!(kinds(&all), [Kind::StateOutside], "{}", rig.name);
        assert!(all[0].text.contains("another robot"), "{}", all[0].text);
    }
}

#[test]
fn state_constant() {
    for mut rig in Rig::all() {
        let mut first = None;
        // Motion is commanded all the while, relative to where the robot is believed to be.
        let all = rig.run(60, |_, sample| {
            let state: &Vec<f64> = first.get_or_insert_with(|| sample.observation.state.clone());
            sample.observation.state.clone_from(state);
        });
        assert!(kinds(&all).contains(&Kind::StateConstant), "{}: {all:#?}", rig.name);
        assert!(
            kinds(&all).iter().all(|kind| [Kind::StateConstant, Kind::ActionsJump].contains(kind)),
            "{all:#?}"
        );
    }
}

#[test]
fn refused() {
    let found = plant(Kind::Refused, 1, |_, _, sample| sample.observation.state[2] = f64::NAN);
    says(&found, "NaN");
}

#[test]
fn prompt_cut() {
    let found =
        plant(Kind::PromptCut, 1, |_, _, s| s.observation.prompt = Some("pick up the block ".repeat(40)));
    says(&found, "was cut");
}

#[test]
fn prompt_empty() {
    plant(Kind::PromptEmpty, 1, |_, _, sample| sample.observation.prompt = Some(" ".into()));
}

/// Only π0-FAST writes answers; what is wrong with one comes in the words of who read it.
#[test]
fn answer_malformed() {
    let found = plant(Kind::AnswerMalformed, 1, |_, _, s| s.malformed = "the answer has no end mark".into());
    says(&found, "no end mark");
}

#[test]
fn actions_saturated() {
    let found = plant(Kind::ActionsSaturated, 6, |rig, _, sample| {
        let cols = sample.actions.len() / if rig.name == "demo" { 4 } else { HORIZON };
        let profile = rig.doctor.profile();
        let prepared = rig.policy.preprocess(&sample.observation).unwrap();
        let mut network = rig.policy.normalize_actions(&sample.actions, cols, &prepared).unwrap();
        let limit = |d: usize| {
            let dimension = &profile.actions[d];
            let (mean, deviation) = (dimension.mean.unwrap(), dimension.deviation.unwrap());
            // What the network returns for the upper limit.
            (dimension.usual.map_or(2.33 * deviation, |[_, high]| high - mean) / deviation) as f32
        };
        let width = network.len() / (sample.actions.len() / cols);
        for row in network.chunks_exact_mut(width) {
            (0..cols).filter(|d| !profile.actions[*d].gripper).for_each(|d| row[d] = limit(d));
        }
        network.resize(rig.policy.summary().actions_per_chunk.max(HORIZON) * width, 0.0);
        let rows = sample.actions.len() / cols;
        let horizon = if rig.name == "demo" { 8 } else { HORIZON };
        network.truncate(horizon * width);
        let actions = rig.policy.postprocess(&network, &prepared).unwrap();
        sample.actions = actions.data[..rows * cols].to_vec();
    });
    says(&found, "stay at the limits");
}

#[test]
fn actions_outside() {
    let found = plant(Kind::ActionsOutside, 1, |rig, _, sample| {
        let scale = rig.doctor.profile().actions[1].deviation.unwrap();
        let cols = rig.policy.summary().action_width;
        sample.actions[2 * cols + 1] += 30.0 * scale;
    });
    says(&found, "of step 2");
}

#[test]
fn actions_jump() {
    let found = plant(Kind::ActionsJump, 6, |rig, i, sample| {
        let cols = rig.policy.summary().action_width;
        let sign = if i % 2 == 0 { 1.0 } else { -1.0 };
        for (at, x) in sample.actions.iter_mut().enumerate() {
            let (d, dimension) = (at % cols, &rig.doctor.profile().actions[at % cols]);
            let (mean, deviation) = (dimension.mean.unwrap(), dimension.deviation.unwrap());
            // A jump between chunks, nothing within them; ALOHA's actions are around its state.
            let around = if rig.name == "aloha" { sample.truth[d] } else { mean };
            *x = around + sign * 1.2 * deviation;
        }
    });
    says(&found, "jump");
}

#[test]
fn inverted() {
    // Only where actions and state are known to mean the same.
    for (robot, d) in [(pi0_policy::Robot::Aloha, 13), (pi0_policy::Robot::Droid, 7)] {
        for in_state in [false, true] {
            let rig = Rig::smooth(robot);
            let cols = robot.action_width();
            let (_, last) = plant_on(rig, Kind::Inverted, 300, &mut |_, _, sample| {
                if in_state {
                    sample.observation.state[d] = 1.0 - sample.observation.state[d];
                } else {
                    sample.actions.chunks_exact_mut(cols).for_each(|row| row[d] = 1.0 - row[d]);
                }
            })
            .unwrap();
            assert!(last.text.contains("gripper") && last.count > 5, "{last:?}");
        }
    }
}

#[test]
fn latency() {
    for rig in Rig::all() {
        let thresholds = Thresholds { control_hz: Some(50.0), ..Thresholds::default() };
        let mut rig = rig;
        rig.doctor = Doctor::new(rig.doctor.profile().clone(), thresholds);
        let (_, last) = plant_on(rig, Kind::Latency, 1, &mut |_, _, sample| sample.latency = 0.4).unwrap();
        assert!(last.text.contains("has to wait"), "{last:?}");
    }
}

#[test]
fn repeated() {
    let mut first: Option<Sample> = None;
    let mut robot = "";
    let found = plant(Kind::Repeated, 8, |rig, _, sample| {
        if robot != rig.name {
            (robot, first) = (rig.name, None);
        }
        let copy = |s: &Sample| Sample {
            observation: s.observation.clone(),
            actions: s.actions.clone(),
            truth: s.truth.clone(),
            malformed: s.malformed.clone(),
            ..*s
        };
        let kept = first.get_or_insert_with(|| copy(sample));
        *sample = copy(kept);
    });
    says(&found, "the same observation again");
}

/// Since when, how often, and when to tell.
#[test]
fn findings_are_counted_and_told_rarely() {
    let mut rig = Rig::smooth(pi0_policy::Robot::Libero);
    rig.run(5, |_, _| ());
    let all = rig.run(1000, |_, sample| sample.observation.prompt = Some(String::new()));
    assert_eq!(all.len(), 1000);
    assert_eq!((all[999].since, all[999].count), (6, 1000));
    let told = all.iter().filter(|finding| finding.news).count();
    let minutes = 1000.0 * EXECUTED as f64 / 50.0 / 60.0;
    assert_eq!(told, minutes.ceil() as usize);
    assert!((all[999].for_seconds - 999.0 * EXECUTED as f64 / 50.0).abs() < 0.2);
    // Gone for long, it is news again.
    rig.run(100, |_, _| ());
    let again = rig.run(1, |_, sample| sample.observation.prompt = Some(String::new()));
    assert_eq!((again[0].count, again[0].news), (1, true));
}

#[test]
fn thresholds_are_read_and_checked() {
    let read: Thresholds = toml::from_str("state_deviations = 4.0\ncontrol_hz = 30.0").unwrap();
    assert_eq!(
        (read.state_deviations, read.control_hz, read.black),
        (4.0, Some(30.0), Thresholds::default().black)
    );
    assert!(toml::from_str::<Thresholds>("state_deviation = 4.0").is_err());
    assert_eq!(Thresholds::default().check(), Ok(()));
    assert_eq!(Thresholds { state_deviations: 0.0, ..read }.check(), Err("state_deviations"));
    assert_eq!(Thresholds { bars: f64::NAN, ..read }.check(), Err("bars"));
}
