//! Whole directories: what is loaded, what goes in, what comes out.

mod common;

use std::path::Path;

use common::*;
use pi0_policy::*;
use serde_json::json;

// ---- lerobot ----

#[test]
fn lerobot_there_and_back() {
    let dir = lerobot("there-and-back");
    let policy = dir.load(FACTS, &PolicyOptions::default()).unwrap();
    let prepared = policy.preprocess(&observation(&["top"], &STATE)).unwrap();
    assert_eq!(prepared.warnings, []);

    let wanted: Vec<f32> = (0..3).map(|i| (STATE[i] - MEAN[i]) / (STD[i] + 1e-8)).collect();
    assert_eq!(prepared.inputs.state[..3], wanted);
    assert_eq!(prepared.inputs.state[3..], [0.0; 29]);
    // In the order of the file.
    assert_eq!(prepared.inputs.images, [Some(vec![1.0; 3 * 64]), None]);
    let tokenizer = Tokenizer::parse(Path::new("t.json"), TINY_TOKENIZER.as_bytes()).unwrap();
    let text = tokenizer.encode("pick up the fork\n").unwrap();
    assert_eq!(prepared.inputs.tokens, [&[2], &text[..]].concat());

    let raw: Vec<f32> = (0..5 * 32).map(|i| i as f32 / 100.0).collect();
    let actions = policy.postprocess(&raw, &prepared).unwrap();
    assert_eq!((actions.rows, actions.cols), (4, 3));
    let second: Vec<f64> = (0..3).map(|i| f64::from(raw[32 + i] * STD[i] + MEAN[i])).collect();
    assert_eq!(actions.iter().nth(1).unwrap(), second);
}

#[test]
fn lerobot_summary() {
    let dir = lerobot("summary");
    let summary = dir.load(FACTS, &PolicyOptions::default()).unwrap().summary();
    assert_eq!((summary.family, summary.robot), (Family::Lerobot, None));
    assert_eq!(summary.resize, Resize { filter: Filter::Torch, pad: Pad::Center });
    assert_eq!((summary.state.min, summary.state.max), (3, 3));
    let wanted = Normalization { kind: Formula::LerobotMeanStd, eps: 1e-8, dims: 3 };
    assert_eq!(
        (summary.state_normalization, summary.action_normalization),
        (Some(wanted.clone()), Some(wanted))
    );
    assert_eq!((summary.action_width, summary.actions_per_chunk, summary.max_tokens), (3, 4, 48));
    assert_eq!(summary.tokenizer.unwrap().vocabulary, 300);
    assert_eq!(summary.problems, Vec::<String>::new());
}

#[test]
fn lerobot_camera_names() {
    let dir = lerobot("camera-names");
    dir.edit("policy_preprocessor.json", |file| {
        file["steps"][0]["config"]["rename_map"] =
            json!({"observation.images.front": "observation.images.top"});
    });
    let policy = dir.load(FACTS, &PolicyOptions::default()).unwrap();
    for name in ["top", "observation.images.top", "front", "observation.images.front"] {
        let prepared = policy.preprocess(&observation(&[name], &STATE)).unwrap();
        assert!(prepared.inputs.images[0].is_some() && prepared.inputs.images[1].is_none(), "{name}");
    }
    let refuse = |cameras: &[&str]| error(policy.preprocess(&observation(cameras, &STATE)));
    assert_eq!(refuse(&["top", "front"]), "camera `front` is given twice");
    assert!(
        refuse(&["side"])
            .starts_with("unknown camera `side`; this policy knows `observation.images.top` and")
    );
    assert!(refuse(&[]).starts_with("the observation has no image"));
}

#[test]
fn lerobot_relative_actions() {
    let dir = lerobot("relative");
    dir.edit("policy_preprocessor.json", |file| {
        let names = json!(["shoulder.pos", "left_Gripper.pos"]);
        file["steps"][5]["config"] =
            json!({"enabled": true, "exclude_joints": ["gripper"], "action_names": names});
    });
    dir.edit("policy_postprocessor.json", |file| file["steps"][1]["config"]["enabled"] = true.into());
    let policy = dir.load(FACTS, &PolicyOptions::default()).unwrap();
    assert_eq!(policy.summary().relative_actions.as_deref(), Some("101"));
    let prepared = policy.preprocess(&observation(&["top"], &STATE)).unwrap();
    let actions = policy.postprocess(&[1.0; 5 * 32], &prepared).unwrap();
    // The raw state, not the normalized one.
    let wanted: Vec<f64> =
        (0..3).map(|i| f64::from(STD[i] + MEAN[i] + if i == 1 { 0.0 } else { STATE[i] })).collect();
    assert_eq!(actions.iter().next().unwrap(), wanted);
}

#[test]
fn lerobot_before_processor_files() {
    let dir = lerobot("old");
    std::fs::remove_file(dir.0.join("policy_preprocessor.json")).unwrap();
    dir.edit("config.json", |config| config["resize_imgs_with_padding"] = json!([8, 8]));
    let stats: [(&str, [f32; 3]); 4] = [
        ("normalize_inputs.buffer_observation_state.mean", MEAN),
        ("normalize_inputs.buffer_observation_state.std", STD),
        ("unnormalize_outputs.buffer_action.mean", MEAN),
        ("unnormalize_outputs.buffer_action.std", STD),
    ];
    dir.write("model.safetensors", safetensors(&stats));
    let policy = dir.load(FACTS, &PolicyOptions::default()).unwrap();
    let summary = policy.summary();
    assert_eq!((summary.family, summary.resize.pad), (Family::LerobotOld, Pad::TopLeft));
    assert!(summary.problems[0].starts_with("lerobot up to 0.3 plans 4 actions at a time"));
    let prepared = policy.preprocess(&observation(&["top"], &STATE)).unwrap();
    assert_eq!(prepared.inputs.state[1], (STATE[1] - MEAN[1]) / (STD[1] + 1e-8));
    assert_eq!(prepared.inputs.tokens.last(), Some(&108));

    // Statistics that training never set.
    let mut unset = stats;
    unset[0].1 = [f32::INFINITY; 3];
    dir.write("model.safetensors", safetensors(&unset));
    let policy = dir.load(FACTS, &PolicyOptions::default()).unwrap();
    assert!(not_ready(&policy).contains("mean[0] is inf; were the statistics never set?"));

    // None at all: can be looked at, not run.
    dir.write("model.safetensors", safetensors(&[]));
    let policy = dir.load(FACTS, &PolicyOptions::default()).unwrap();
    assert!(not_ready(&policy).contains("no statistics of observation.state (MEAN_STD)"));
}

#[test]
fn lerobot_files_that_lie() {
    let options = PolicyOptions::default();
    let before = "policy_preprocessor.json";
    for name in ["/etc/passwd", "../stats.safetensors", "a/../../b"] {
        let dir = lerobot("traversal");
        dir.edit(before, |file| file["steps"][6]["state_file"] = name.into());
        assert!(error(dir.load(FACTS, &options)).contains("not a plain relative path"), "{name}");
        let dir = lerobot("traversal");
        dir.edit(before, |file| file["steps"][3]["artifacts"]["tokenizer_name"] = name.into());
        assert!(error(dir.load(FACTS, &options)).contains("not a plain relative path"), "{name}");
    }

    let dir = lerobot("lies");
    let refuse = |wanted: &str| {
        let error = error(dir.load(FACTS, &options));
        assert!(error.contains(wanted), "{error}");
    };
    dir.edit(before, |file| file["steps"][1]["registry_name"] = "resize_processor".into());
    refuse(
        "the processor step \"resize_processor\" with {} is not supported; it is a step of somebody's own",
    );
    dir.edit(before, |file| file["steps"][1]["registry_name"] = "tokenizer_processor".into());
    refuse("2 steps called tokenizer_processor");
    dir.edit(before, |file| file["steps"] = json!({}));
    refuse("policy_preprocessor.json: invalid type");
    dir.write(before, "[".repeat(100_000));
    refuse("policy_preprocessor.json: ");
    dir.write(before, format!(r#"{{"steps": [{{"config": {}{}}}]}}"#, "[".repeat(300), "]".repeat(300)));
    refuse("recursion limit");
    dir.edit("config.json", |config| config["n_action_steps"] = json!(1e30));
    refuse("config.json: n_action_steps is 1e+30, wanted a whole number");
    dir.edit("config.json", |config| {
        config["type"] = json!("pi05");
        config["n_action_steps"] = 5.into();
    });
    refuse("says type \"pi05\", but the weights are those of a π0 network");
    dir.edit("config.json", |config| config["type"] = json!("act"));
    refuse("a policy of type \"act\" is not supported; this program runs pi0, pi05 and pi0_fast");
    let missing = Policy::load(&dir.0.join("none"), FACTS, &options);
    assert!(error(missing).contains("it does not exist"));
    let file = Policy::load(&dir.0.join("config.json"), FACTS, &options);
    assert!(error(file).contains("it is a file"));
}

#[test]
fn lerobot_sizes_must_fit_the_model() {
    let dir = lerobot("sizes");
    let narrow = ModelFacts { action_dim: 2, ..FACTS };
    assert!(
        error(dir.load(narrow, &PolicyOptions::default())).contains("actions have 3 values, the model has 2")
    );
    let narrow = ModelFacts { state_dim: 2, ..FACTS };
    assert!(
        error(dir.load(narrow, &PolicyOptions::default())).contains("state has 3 values, the model has 2")
    );
    dir.edit("config.json", |config| config["n_action_steps"] = 6.into());
    assert!(error(dir.load(FACTS, &PolicyOptions::default())).contains("n_action_steps is 6"));
}

#[test]
fn without_tokenizer_it_can_only_be_inspected() {
    let dir = lerobot("no-tokenizer");
    std::fs::remove_dir_all(dir.0.join("tokenizer")).unwrap();
    let policy = dir.load(FACTS, &PolicyOptions::default()).unwrap();
    assert!(policy.summary().problems[0].starts_with("no tokenizer: put tokenizer.json"));
    assert!(error(policy.preprocess(&observation(&["top"], &STATE))).starts_with("no tokenizer"));
    // Beside the checkpoint, or anywhere.
    dir.write("paligemma_tokenizer.model", include_bytes!("data/tiny.model"));
    assert!(dir.load(FACTS, &PolicyOptions::default()).unwrap().summary().tokenizer.is_some());
    let options = PolicyOptions { tokenizer: Some("/nowhere.json".into()), ..Default::default() };
    assert!(error(dir.load(FACTS, &options)).starts_with("cannot read /nowhere.json"));
}

// ---- bad observations ----

#[test]
fn bad_observations_are_named() {
    let dir = lerobot("bad");
    let policy = dir.load(FACTS, &PolicyOptions::default()).unwrap();
    let refuse = |edit: &dyn Fn(&mut Observation)| {
        let mut observation = observation(&["top"], &STATE);
        edit(&mut observation);
        let error = policy.preprocess(&observation).unwrap_err();
        assert!(error.is_bad_observation(), "{error}");
        error.to_string()
    };
    assert_eq!(refuse(&|o| o.state[1] = f64::NAN), "state[1] is NaN, which is not a finite f32");
    assert_eq!(refuse(&|o| o.state[2] = -f64::INFINITY), "state[2] is -inf, which is not a finite f32");
    assert!(refuse(&|o| o.state[0] = 1e300).contains("not a finite f32"));
    assert!(refuse(&|o| o.state[2] = 3e38).ends_with("after normalization"));
    assert_eq!(refuse(&|o| o.state.push(0.0)), "state has 4 values, but the checkpoint wants 3");
    assert_eq!(refuse(&|o| o.state.clear()), "state has 0 values, but the checkpoint wants 3");
    assert!(refuse(&|o| o.prompt = None).contains("no prompt"));

    let with = |image: Image| refuse(&|o| o.images[0].1 = image.clone());
    let array = |shape: [usize; 3], n| with(Image::array(Pixels::U8(vec![0; n].into()), shape));
    assert!(
        array([8, 8, 4], 256)
            .ends_with("shape is [8, 8, 4], wanted [height, width, 3] or [3, height, width]")
    );
    assert!(array([8, 8, 3], 5).contains("needs 192 samples, got 5"));
    assert!(array([0, 8, 3], 0).contains("0 x 8 pixels"));
    assert!(array([usize::MAX, usize::MAX, 3], 0).contains("each side must have"));
    assert!(array([1, 16384, 3], 3 * 16384).contains("too narrow"));
    assert!(with(Image::rgb32f(vec![255.0; 192], 8, 8)).contains("must lie in 0.0..=1.0, found 255"));
    assert!(with(Image::rgb32f(vec![f32::NAN; 192], 8, 8)).contains("found NaN"));
}

#[test]
fn bad_actions_do_not_reach_the_robot() {
    let dir = lerobot("bad-actions");
    let policy = dir.load(FACTS, &PolicyOptions::default()).unwrap();
    let prepared = policy.preprocess(&observation(&["top"], &STATE)).unwrap();
    let mut raw = vec![0.0; 5 * 32];
    assert!(error(policy.postprocess(&raw[1..], &prepared)).contains("wanted 5 x 32"));
    raw[33] = f32::NAN;
    assert_eq!(error(policy.postprocess(&raw, &prepared)), "actions: value 1 of step 1 is NaN");
}

#[test]
fn images_from_files() {
    let dir = Dir::new("images");
    let mut png = std::io::Cursor::new(Vec::new());
    let pixels = image::RgbImage::from_fn(5, 4, |x, y| image::Rgb([x as u8, y as u8, 9]));
    pixels.write_to(&mut png, image::ImageFormat::Png).unwrap();
    dir.write("a.png", png.get_ref()).write("b.png", &png.get_ref()[..60]).write("c.jpg", "no image");
    assert!(Image::open("top", &dir.0.join("a.png")).is_ok());
    let refuse = |name: &str| error(Image::open("top", &dir.0.join(name)));
    assert!(refuse("b.png").starts_with("image `top`: ") && refuse("b.png").contains("b.png"));
    assert!(refuse("c.jpg").ends_with("neither PNG nor JPEG"));
    // Of the last chunk, which says nothing, any part may be missing; of the others none.
    let png = png.get_ref();
    for cut in [1, 4, 11, 12] {
        let whole = Image::decode("top", png).unwrap();
        let short = Image::decode("top", &png[..png.len() - cut]).unwrap();
        match (whole.pixels(), short.pixels()) {
            (Pixels::U8(a), Pixels::U8(b)) => assert_eq!(a, b, "{cut} bytes cut off"),
            other => panic!("{other:?}"),
        }
    }
    for cut in [13, 16, 20, 40] {
        assert!(Image::decode("top", &png[..png.len() - cut]).is_err(), "{cut} bytes cut off");
    }
    assert!(refuse("d.png").starts_with("cannot read"));
}

// ---- openpi ----

fn chw() -> Image {
    Image::array(Pixels::U8(vec![0; 3 * 64].into()), [3, 8, 8])
}

#[test]
fn openpi_aloha_there_and_back() {
    let dir = openpi("aloha", &["trossen"]);
    let options = PolicyOptions { config: Some("pi0_aloha_towel".into()), ..Default::default() };
    let policy = dir.load(FACTS, &options).unwrap();
    let summary = policy.summary();
    assert_eq!((summary.robot, summary.asset_id.as_deref()), (Some(Robot::Aloha), Some("trossen")));
    assert_eq!(summary.relative_actions.as_deref(), Some("11111101111110"));
    assert_eq!(summary.default_prompt.as_deref(), Some("fold the towel"));
    assert_eq!(summary.reset_pose, Some([0.0, -1.5, 1.5, 0.0, 0.0, 0.0]));
    assert_eq!(summary.resize, Resize { filter: Filter::Pillow, pad: Pad::Center });

    let state = 0.5;
    let observation = Observation {
        images: vec![
            ("cam_low".into(), chw()),
            ("cam_right_wrist".into(), chw()),
            ("cam_high".into(), chw()),
        ],
        state: vec![state; 14],
        prompt: None,
    };
    let prepared = policy.preprocess(&observation).unwrap();
    assert_eq!(prepared.warnings, [Warning::CameraIgnored { key: "cam_low".into() }]);
    let black = || Some(vec![-1.0; 192]);
    assert_eq!(prepared.inputs.images, [black(), None, black()]);
    let gripper = -0.1400559217021429;
    let decoded = |i: usize| match i {
        6 | 13 => gripper,
        1 | 2 | 8 | 9 => -state,
        _ => state,
    };
    for i in 0..14 {
        let (mean, std) = (0.01 * (i as f64 + 1.0), 0.1 * (i as f64 + 1.0));
        let wanted = ((decoded(i) - mean) / (std + 1e-6)) as f32;
        assert!((prepared.inputs.state[i] - wanted).abs() <= 1e-6 * wanted.abs(), "{i}");
    }

    let actions = policy.postprocess(&[0.25; 5 * 32], &prepared).unwrap();
    assert_eq!((actions.rows, actions.cols), (5, 14));
    for (i, got) in actions.iter().nth(4).unwrap().iter().enumerate() {
        let (mean, std) = (0.02 * (i as f64 + 1.0), 0.2 * (i as f64 + 1.0));
        let action = 0.25 * (std + 1e-6) + mean;
        let wanted = match i {
            6 | 13 => (action + 0.5476 + 0.6213) / (1.4910 + 0.6213),
            1 | 2 | 8 | 9 => -(action - state),
            _ => action + state,
        };
        assert!((got - wanted).abs() < 1e-12, "{i}: {got} {wanted}");
    }
}

#[test]
fn openpi_aloha_demands_what_openpi_demands() {
    let policy = openpi("aloha-demands", &["trossen"]).load(FACTS, &PolicyOptions::default()).unwrap();
    let refuse = |images: Vec<(&str, Image)>, state: usize| {
        let images = images.into_iter().map(|(key, image)| (key.to_owned(), image)).collect();
        error(policy.preprocess(&Observation { images, state: vec![0.0; state], prompt: Some("x".into()) }))
    };
    assert_eq!(
        refuse(vec![("cam_left_wrist", chw())], 14),
        "camera `cam_high` is missing; got `cam_left_wrist`"
    );
    assert!(refuse(vec![("base_0_rgb", chw())], 14).starts_with("unknown camera `base_0_rgb`"));
    assert_eq!(refuse(vec![("cam_high", chw())], 8), "state has 8 values, but aloha wants 14");
    let hwc = Image::array(Pixels::U8(vec![0; 192].into()), [8, 8, 3]);
    assert!(refuse(vec![("cam_high", hwc)], 14).ends_with("shape is [8, 8, 3], wanted [3, height, width]"));
}

#[test]
fn openpi_droid_libero_and_ur5() {
    for (asset, robot, cameras, state, width, delta) in [
        (
            "droid",
            Robot::Droid,
            ["observation/exterior_image_1_left", "observation/wrist_image_left"],
            8,
            8,
            None,
        ),
        (
            "physical-intelligence/libero",
            Robot::Libero,
            ["observation/image", "observation/wrist_image"],
            8,
            7,
            Some("1111110"),
        ),
        ("ur5e", Robot::Ur5, ["base_rgb", "wrist_rgb"], 7, 7, Some("1111110")),
    ] {
        let dir = openpi(robot.name(), &[asset]);
        // DROID's assets are those of velocities and of positions.
        let config = (robot == Robot::Droid).then(|| "pi0_droid".to_owned());
        let policy = dir.load(FACTS, &PolicyOptions { config, ..Default::default() }).unwrap();
        let summary = policy.summary();
        assert_eq!((summary.robot, summary.asset_id.as_deref()), (Some(robot), Some(asset)));
        assert_eq!(summary.relative_actions.as_deref(), delta, "{robot}");
        let prepared = policy.preprocess(&observation(&cameras, &vec![0.5; state])).unwrap();
        assert!(prepared.inputs.images[1].is_some() && prepared.inputs.images[2].is_none());
        let actions = policy.postprocess(&[0.0; 160], &prepared).unwrap();
        assert_eq!((actions.rows, actions.cols), (5, width));
        let first = 0.02 + if delta.is_some() { 0.5 } else { 0.0 };
        assert!((actions.data[0] - first).abs() < 1e-12, "{robot}");
        // The gripper is absolute.
        assert!((actions.data[width - 1] - 0.02 * width as f64).abs() < 1e-12, "{robot}");
    }
}

#[test]
fn openpi_without_robot_takes_the_networks_names() {
    let dir = openpi("own", &["someone/own_data"]);
    let policy = dir.load(FACTS, &PolicyOptions::default()).unwrap();
    assert!(not_ready(&policy).contains("no robot is known for the assets someone/own_data: name"));
    let options = PolicyOptions { robot: RobotChoice::None, ..Default::default() };
    let policy = dir.load(FACTS, &options).unwrap();
    let prepared = policy.preprocess(&observation(&["base_0_rgb"], &[0.0; 6])).unwrap();
    let actions = policy.postprocess(&[1.0; 160], &prepared).unwrap();
    assert_eq!(actions.cols, 32);
    // Beyond the statistics: mean 0, deviation 1.
    assert_eq!(actions.data[31], 1.0 + 1e-6);
}

#[test]
fn openpi_choices() {
    let dir = openpi("choices", &["trossen", "droid", "deep/er/still"]);
    let with = |edit: &dyn Fn(&mut PolicyOptions)| {
        let mut options = PolicyOptions::default();
        edit(&mut options);
        dir.load(FACTS, &options)
    };
    assert_eq!(
        error(with(&|_| ())),
        "--asset-id: choose the statistics of one robot: deep/er/still, droid, trossen"
    );
    let id = |policy: Policy| policy.summary().asset_id.unwrap();
    assert_eq!(id(with(&|o| o.robot = RobotChoice::Preset(Robot::Droid)).unwrap()), "droid");
    assert_eq!(id(with(&|o| o.asset_id = Some("deep/er/still".into())).unwrap()), "deep/er/still");
    assert!(error(with(&|o| o.asset_id = Some("../x".into()))).contains("not a plain relative path"));
    assert!(
        error(with(&|o| o.asset_id = Some("nobody".into()))).contains("no assets/nobody/norm_stats.json")
    );
    assert!(error(with(&|o| o.config = Some("pi0_nothing".into()))).contains("known are pi0_aloha, "));
    assert!(
        error(with(&|o| o.config = Some("pi05_droid".into())))
            .contains("pi05_droid is of a π0.5 network, this is a π0")
    );
    let aloha = with(&|o| {
        o.robot = RobotChoice::Preset(Robot::Aloha);
        o.adapt_to_pi = Some(false);
        o.delta_actions = Some(false);
        o.filter = Some(Filter::Torch);
        o.pad = Some(Pad::Center3);
    });
    let summary = aloha.unwrap().summary();
    assert_eq!((summary.aloha_units, summary.relative_actions), (None, None));
    assert_eq!(summary.resize, Resize { filter: Filter::Torch, pad: Pad::Center3 });
    // A configuration of ten actions on a model of five.
    let droid = with(&|o| o.config = Some("pi0_droid".into())).unwrap();
    assert!(droid.summary().problems[0].contains("pi0_droid has 10 actions a chunk, the model 5"));
}

#[test]
fn openpi_statistics_that_lie() {
    let dir = openpi("stats", &["trossen"]);
    let say = |content: String| {
        dir.write("assets/trossen/norm_stats.json", content);
        let text = match dir.load(FACTS, &PolicyOptions::default()) {
            Err(error) => error.to_string(),
            Ok(policy) => not_ready(&policy),
        };
        assert!(text.contains("norm_stats.json: "), "{text}");
        text
    };
    let refuse = |content: String, wanted: &str| {
        let text = say(content);
        assert!(text.contains(wanted), "{text}");
    };
    let stats = |state: &str| {
        let actions = r#"{"mean": [0,0,0,0,0,0,0,0,0,0,0,0,0,0], "std": [1,1,1,1,1,1,1,1,1,1,1,1,1,1]}"#;
        format!(r#"{{"norm_stats": {{"state": {state}, "actions": {actions}}}}}"#)
    };
    refuse("".into(), "EOF");
    refuse("{}".into(), "holds no statistics");
    let wide = json!({"norm_stats": {"state": {"mean": vec![0; 14], "std": vec![1; 14]}}});
    refuse(wide.to_string(), "no action.mean");
    refuse(stats(r#"{"mean": [0, 1], "std": [1]}"#), "mean has 2 values, std has 1");
    refuse(stats(r#"{"mean": [], "std": []}"#), "mean has 0 values");
    refuse(stats(r#"{"mean": ["0"], "std": [1]}"#), "norm_stats.state.mean[0] is \"0\", not a number");
    refuse(stats(r#"{"mean": [1e999], "std": [1]}"#), "number out of range");
    refuse(stats(r#"{"mean": [1e300], "std": [1]}"#), "mean[0] is");
    refuse(stats(r#"{"mean": [NaN], "std": [1]}"#), "mean[0] is null or NaN");
    refuse(stats(r#"{"mean": [0, null], "std": [1, 1]}"#), "mean[1] is null or NaN");
    refuse(stats(r#"{"mean": [0], "std": [-1]}"#), "std[0] is negative");
    // Quantiles alone are no statistics for π0.
    refuse(
        stats(r#"{"q01": [0], "q99": [1]}"#),
        "no observation.state.mean (of observation.state it has obs",
    );
    refuse(stats(r#"{"q01": [0], "q99": [1]}"#), "--stats FILE names them");
    refuse(format!(r#"{{"x": {}"#, "[".repeat(100_000)), "recursion limit");
}
