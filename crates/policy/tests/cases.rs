//! Checkpoints as users have them: each of these was refused, misread or silently misused once.

mod common;

use common::*;
use pi0_policy::*;
use serde_json::{Value, json};

const BEFORE: &str = "policy_preprocessor.json";
const AFTER: &str = "policy_postprocessor.json";
const STATS: [&str; 2] = [
    "policy_preprocessor_step_6_normalizer_processor.safetensors",
    "policy_postprocessor_step_0_unnormalizer_processor.safetensors",
];

fn auto(dir: &Dir) -> Policy {
    dir.load(FACTS, &PolicyOptions::default()).unwrap()
}

/// Loads and runs, and normalizes as `lerobot` says.
fn runs(policy: &Policy) {
    policy.ready().unwrap();
    let prepared = policy.preprocess(&observation(&["top"], &STATE)).unwrap();
    let wanted: Vec<f32> = (0..3).map(|i| (STATE[i] - MEAN[i]) / (STD[i] + 1e-8)).collect();
    assert_eq!(prepared.inputs.state[..3], wanted);
    let actions = policy.postprocess(&[1.0; 5 * 32], &prepared).unwrap();
    let wanted: Vec<f64> = (0..3).map(|i| f64::from(STD[i] + MEAN[i])).collect();
    assert_eq!(actions.iter().next().unwrap(), wanted);
}

/// Keeps the data of statistics under other names.
fn rename_stats(dir: &Dir, prefix: &str) {
    for name in STATS {
        let stats: Vec<(String, [f32; 3])> = [
            ("observation.state.mean", MEAN),
            ("observation.state.std", STD),
            ("action.mean", MEAN),
            ("action.std", STD),
        ]
        .map(|(name, values)| (format!("{prefix}{name}"), values))
        .into();
        let stats: Vec<_> = stats.iter().map(|(name, values)| (name.as_str(), *values)).collect();
        dir.write(name, safetensors(&stats));
    }
}

/// lerobot 0.5.1 called the step otherwise.
#[test]
fn delta_actions_are_relative_actions() {
    for enabled in [false, true] {
        let dir = lerobot(&format!("delta-{enabled}"));
        dir.edit(BEFORE, |file| {
            file["steps"][5]["registry_name"] = "delta_actions_processor".into();
            file["steps"][5]["config"]["enabled"] = enabled.into();
        });
        dir.edit(AFTER, |file| file["steps"][1]["config"]["enabled"] = enabled.into());
        let policy = auto(&dir);
        assert_eq!(policy.summary().relative_actions.is_some(), enabled);
        if !enabled {
            runs(&policy);
        }
    }
}

/// The bars of lerobot 0.4, which its files do not tell from 0.5.0, can be had, and are asked for where they matter.
#[test]
fn bars_of_older_lerobots() {
    let dir = lerobot("bars");
    let drop_relative = |file: &mut Value| {
        let names = ["relative_actions_processor", "absolute_actions_processor"];
        file["steps"]
            .as_array_mut()
            .unwrap()
            .retain(|step| names.iter().all(|n| step["registry_name"] != *n));
    };
    dir.edit(BEFORE, drop_relative).edit(AFTER, drop_relative);
    // Square cameras have no bars.
    let policy = auto(&dir);
    runs(&policy);
    assert!(policy.summary().problems[0].contains("--lerobot-version 0.4"));
    dir.edit("config.json", |config| {
        config["input_features"]["observation.images.top"]["shape"] = json!([3, 6, 8]);
    });
    assert!(not_ready(&auto(&dir)).contains("say --lerobot-version 0.4 or 0.5"));
    let pad = |options: PolicyOptions| {
        let policy = dir.load(FACTS, &options).unwrap();
        policy.ready().unwrap();
        policy.summary().resize.pad
    };
    let version = |v| PolicyOptions { lerobot_version: Some(v), ..Default::default() };
    assert_eq!(pad(version(LerobotVersion::V0_4)), Pad::Center3);
    assert_eq!(pad(version(LerobotVersion::V0_5)), Pad::Center);
    assert_eq!(pad(PolicyOptions { pad: Some(Pad::Center3), ..Default::default() }), Pad::Center3);
    // Where the files do tell, nobody may say otherwise.
    let told = lerobot("bars-told").load(FACTS, &version(LerobotVersion::V0_4));
    assert!(error(told).contains("--lerobot-version: its files tell: lerobot 0.5.1 or later"));
}

/// Statistics under the names of a data set, in processor files of other names, in any format.
#[test]
fn statistics_under_other_names() {
    let dir = lerobot("prefixed");
    rename_stats(&dir, "so100.buffer.");
    runs(&auto(&dir));

    // Of two data sets, nobody knows which.
    let stats: Vec<(String, [f32; 3])> = ["a", "b"]
        .iter()
        .flat_map(|set| {
            ["observation.state.mean", "observation.state.std"]
                .map(|name| (format!("{set}.{name}"), if name.ends_with("std") { STD } else { MEAN }))
        })
        .collect();
    let stats: Vec<_> = stats.iter().map(|(name, values)| (name.as_str(), *values)).collect();
    dir.write(STATS[0], safetensors(&stats));
    let text = not_ready(&auto(&dir));
    assert!(
        text.contains("several could be observation.state.mean") && text.contains("--stats FILE"),
        "{text}"
    );

    for [before, after] in [
        ["preprocessor_config.json", "postprocessor_config.json"],
        ["robot_preprocessor.json", "robot_postprocessor.json"],
    ] {
        let dir = lerobot("migrated");
        std::fs::rename(dir.0.join(BEFORE), dir.0.join(before)).unwrap();
        std::fs::rename(dir.0.join(AFTER), dir.0.join(after)).unwrap();
        let policy = auto(&dir);
        assert_eq!(policy.summary().family, Family::Lerobot);
        runs(&policy);
    }
    // An image processor's file of that name is no policy's.
    let dir = lerobot("not-ours");
    std::fs::remove_file(dir.0.join(BEFORE)).unwrap();
    dir.write("preprocessor_config.json", r#"{"image_mean": [0.5]}"#);
    assert!(not_ready(&auto(&dir)).contains("no statistics of observation.state"));
}

#[test]
fn statistics_in_any_format() {
    let dir = lerobot("formats");
    // Exact in all of them.
    let (mean, std) = ([-2.0, 0.0, 3.0], [1.0, 2.0, 4.0]);
    type Encode = fn(f32) -> Vec<u8>;
    let formats: [(&str, Encode); 7] = [
        ("F16", |x| half::f16::from_f32(x).to_le_bytes().into()),
        ("BF16", |x| half::bf16::from_f32(x).to_le_bytes().into()),
        ("F64", |x| f64::from(x).to_le_bytes().into()),
        ("I64", |x| (x as i64).to_le_bytes().into()),
        ("I32", |x| (x as i32).to_le_bytes().into()),
        ("I16", |x| (x as i16).to_le_bytes().into()),
        ("I8", |x| (x as i8).to_le_bytes().into()),
    ];
    for (dtype, encode) in formats {
        let vectors = [
            ("observation.state.mean", mean),
            ("observation.state.std", std),
            ("action.mean", mean),
            ("action.std", std),
        ];
        let mut header = serde_json::Map::new();
        let mut data = Vec::new();
        for (name, values) in vectors {
            let start = data.len();
            data.extend(values.iter().flat_map(|&x| encode(x)));
            let offsets = [start, data.len()];
            header.insert(name.into(), json!({"dtype": dtype, "shape": [3], "data_offsets": offsets}));
        }
        let header = Value::Object(header).to_string().into_bytes();
        let file = [(header.len() as u64).to_le_bytes().to_vec(), header, data].concat();
        dir.write(STATS[0], &file).write(STATS[1], &file);
        let prepared = auto(&dir).preprocess(&observation(&["top"], &STATE)).unwrap();
        assert_eq!(prepared.inputs.state[..3], [2.5 / (1.0 + 1e-8), -2.0 / (2.0 + 1e-8), 0.0], "{dtype}");
    }
}

/// No statistics, no guess: but statistics can be named, in whatever file they are, or done without.
#[test]
fn statistics_that_are_named() {
    let dir = lerobot("no-stats");
    let strip = |file: &mut Value| {
        for step in file["steps"].as_array_mut().unwrap() {
            step.as_object_mut().unwrap().remove("state_file");
        }
    };
    dir.edit(BEFORE, strip).edit(AFTER, strip);
    let policy = auto(&dir);
    let text = not_ready(&policy);
    for word in
        ["no statistics of observation.state (MEAN_STD)", "--stats FILE", "meta/stats.json", "--raw-units"]
    {
        assert!(text.contains(word), "{word} in {text}");
    }
    let stats = json!({"mean": MEAN, "std": STD});
    let set = Dir::new("data-set");
    set.write("meta/stats.json", json!({"observation.state": stats, "action": stats}).to_string());
    set.write(
        "norm_stats/norm_stats.json",
        json!({"norm_stats": {"state": stats, "actions": stats}}).to_string(),
    );
    let other = lerobot("other-stats");
    for file in [
        set.0.clone(),
        set.0.join("meta/stats.json"),
        set.0.join("norm_stats"),
        other.0.join(BEFORE),
        other.0.join(STATS[0]),
    ] {
        let options = PolicyOptions { stats: Some(file.clone()), ..Default::default() };
        let policy = dir.load(FACTS, &options).unwrap();
        runs(&policy);
        let used = policy.summary().statistics.unwrap();
        assert!(used.starts_with(&set.0) || used.starts_with(&other.0), "{}", used.display());
    }
    let raw = PolicyOptions { raw_units: true, ..Default::default() };
    let policy = dir.load(FACTS, &raw).unwrap();
    assert!(policy.summary().problems[0].starts_with("runs on raw units, as asked: "));
    let prepared = policy.preprocess(&observation(&["top"], &STATE)).unwrap();
    assert_eq!(prepared.inputs.state[..3], STATE);
    assert!(error(other.load(FACTS, &raw)).starts_with("--raw-units: the checkpoint has statistics"));
    // Of another robot.
    let wrong = json!({"mean": [0.0], "std": [1.0]});
    let wide = json!({"mean": [0.0, 0.0], "std": [1.0, 1.0]});
    for (state, action, words) in [
        (&wide, &stats, "the state has 3 values, its statistics 2"),
        (&stats, &wide, "statistics of action have 2 values, actions have 3"),
        (&json!({"q01": [0.0]}), &wrong, "no observation.state.mean"),
    ] {
        set.write("meta/stats.json", json!({"observation.state": state, "action": action}).to_string());
        let options = PolicyOptions { stats: Some(set.0.clone()), ..Default::default() };
        let text = match dir.load(FACTS, &options) {
            Ok(policy) => not_ready(&policy),
            Err(error) => error.to_string(),
        };
        assert!(text.contains(words), "{text}");
    }
    let nowhere = PolicyOptions { stats: Some("/nowhere".into()), ..Default::default() };
    assert!(error(dir.load(FACTS, &nowhere)).contains("cannot read /nowhere"));
}

/// Without the step that normalizes nothing runs unless asked for, whatever statistics there are.
#[test]
fn a_step_that_was_taken_out_is_missed() {
    for (file, name) in [(BEFORE, "normalizer_processor"), (AFTER, "unnormalizer_processor")] {
        let dir = lerobot("no-step");
        dir.edit(file, |file| file["steps"].as_array_mut().unwrap().retain(|s| s["registry_name"] != name));
        let text = not_ready(&auto(&dir));
        assert!(text.contains(&format!("has no step {name}")) && text.contains("--raw-units"), "{text}");
        let raw = PolicyOptions { raw_units: true, ..Default::default() };
        dir.load(FACTS, &raw).unwrap().ready().unwrap();
    }
}

/// Numbers that are none are named, as lerobot refuses them; what Python and editors leave in JSON is read.
#[test]
fn configurations_as_people_have_them() {
    for (key, value) in [
        ("n_action_steps", json!(null)),
        ("empty_cameras", json!(-1)),
        ("n_obs_steps", json!(1.5)),
        ("max_state_dim", json!("many")),
    ] {
        let dir = lerobot("numbers");
        dir.edit("config.json", |config| config[key] = value.clone());
        let text = error(dir.load(FACTS, &PolicyOptions::default()));
        assert!(text.contains(&format!("{key} is {value}, wanted a whole number")), "{text}");
    }
    let dir = lerobot("bytes");
    for file in ["config.json", BEFORE, AFTER] {
        let text = std::fs::read_to_string(dir.0.join(file)).unwrap();
        dir.write(file, format!("\u{feff}{}", text.replacen('{', "{\"lr\": NaN, ", 1)));
    }
    runs(&auto(&dir));
    let utf16: Vec<u8> =
        [0xff, 0xfe].into_iter().chain("{}".encode_utf16().flat_map(u16::to_le_bytes)).collect();
    dir.write(BEFORE, utf16);
    assert!(error(dir.load(FACTS, &PolicyOptions::default())).contains("UTF-16"));
}

/// A base model has no statistics and states only its padding: those of a data set say how many values count.
#[test]
fn a_base_model_takes_a_data_sets_statistics() {
    let dir = lerobot("base");
    dir.edit("config.json", |config| {
        config["type"] = "pi05".into();
        config["input_features"]["observation.state"]["shape"] = json!([32]);
        config["output_features"]["action"]["shape"] = json!([32]);
    });
    dir.edit(BEFORE, |file| {
        let steps = file["steps"].as_array_mut().unwrap();
        steps.retain(|step| step["registry_name"] != "pi0_new_line_processor");
        let normalizer = steps.len() - 1;
        steps.swap(2, normalizer);
        steps[2] = json!({"registry_name": "normalizer_processor", "config": {
            "features": {}, "norm_map": {"STATE": "QUANTILES", "ACTION": "QUANTILES"}}});
        steps
            .insert(3, json!({"registry_name": "pi05_prepare_state_tokenizer_processor_step", "config": {}}));
        let tokenizer = steps.iter().position(|s| s["registry_name"] == "tokenizer_processor").unwrap();
        let tokenizer = steps.remove(tokenizer);
        steps.insert(4, tokenizer);
        steps[4]["config"]["max_length"] = 200.into();
    });
    dir.edit(AFTER, |file| {
        file["steps"][0] = json!({"registry_name": "unnormalizer_processor", "config": {
            "features": {}, "norm_map": {"STATE": "QUANTILES", "ACTION": "QUANTILES"}}});
    });
    let policy = dir.load(PI05, &PolicyOptions::default()).unwrap();
    assert!(not_ready(&policy).contains("no statistics of observation.state (QUANTILES)"));
    let set = Dir::new("base-set");
    let load = |stats: Value| {
        set.write("meta/stats.json", json!({"observation.state": stats, "action": stats}).to_string());
        dir.load(PI05, &PolicyOptions { stats: Some(set.0.clone()), ..Default::default() })
    };
    let policy = load(json!({"q01": [-1.0, -4.0, 3.0], "q99": [1.0, 0.0, 3.0]})).unwrap();
    policy.ready().unwrap();
    let summary = policy.summary();
    assert_eq!((summary.action_width, summary.state.max), (3, 3));
    assert!(
        summary.problems[0].starts_with("dimensions [2] of observation.state never moved"),
        "{:?}",
        summary.problems
    );
    // 0.5 is bin 192; -2 lies in the middle; the third is where it always was.
    let prepared = policy.preprocess(&observation(&["top"], &STATE)).unwrap();
    let tokenizer = Tokenizer::parse(std::path::Path::new("t.json"), TINY_TOKENIZER.as_bytes()).unwrap();
    let wanted = tokenizer.encode("Task: pick up the fork, State: 192 128 0;\nAction: ").unwrap();
    assert_eq!(prepared.inputs.tokens, [&[2], &wanted[..]].concat());
    let actions = policy.postprocess(&[0.5; 160], &prepared).unwrap();
    assert_eq!(actions.cols, 3);
    assert_eq!(actions.data[..2], [0.5, -1.0]);
    // A task that leaves no room for the state.
    let mut long = observation(&["top"], &STATE);
    long.prompt = Some("fold the towel and ".repeat(30));
    let error = policy.preprocess(&long).unwrap_err();
    assert!(error.is_bad_observation() && error.to_string().contains("would be cut off"), "{error}");

    for (stats, words) in [
        (json!({"mean": [0, 0, 0], "std": [1, 1, 1]}), "no observation.state.q01"),
        (json!({"q01": [0, 0, 0], "q99": [1, null, 1]}), "q99[1] is null or NaN"),
        (
            json!({"q01": [0, 1, 0], "q99": [1, 0, 1]}),
            "q01[1] is 1, above q99[1], which is 0: are they swapped?",
        ),
        (json!({"q01": [0, 1, 0], "q99": [0, 1, 0]}), "equal in every dimension: were they never computed?"),
        (json!({"q01": [0, 0, 0], "q99": [1, 1]}), "q01 has 3 values, q99 has 2"),
    ] {
        let text = not_ready(&load(stats).unwrap());
        assert!(text.contains(words), "{text}");
    }
}

/// One meaning for each name: what lerobot's renaming makes of it.
#[test]
fn renaming_is_lerobots() {
    let rename = |name: &str, map: Value| {
        let dir = lerobot(name);
        dir.edit(BEFORE, |file| file["steps"][0]["config"]["rename_map"] = map);
        dir
    };
    let (top, left) = ("observation.images.top", "observation.images.left_wrist");
    let swapped = auto(&rename("swap", json!({top: left, left: top})));
    let both = Observation {
        images: vec![("top".into(), image(0)), (left.into(), image(255))],
        ..observation(&[], &STATE)
    };
    let prepared = swapped.preprocess(&both).unwrap();
    assert_eq!(prepared.inputs.images, [Some(vec![1.0; 192]), Some(vec![-1.0; 192])]);

    let policy =
        auto(&rename("undeclared", json!({"observation.images.side": "observation.images.wrist_0_rgb"})));
    assert!(policy.summary().problems[0].contains("images of observation.images.side are dropped"));
    let prepared = policy.preprocess(&observation(&["top", "side"], &STATE)).unwrap();
    let to = "observation.images.wrist_0_rgb".to_owned();
    assert_eq!(prepared.warnings, [Warning::CameraRenamed { key: "side".into(), to }]);
    let text = error(policy.preprocess(&observation(&["side"], &STATE)));
    assert!(
        text.starts_with("of the images given, `side`, none is one that this policy looks through"),
        "{text}"
    );

    let policy = auto(&rename("qpos", json!({"observation.qpos": "observation.state"})));
    let names = policy.summary().state_names;
    assert!(
        ["state", "observation.state", "observation.qpos", "qpos"]
            .iter()
            .all(|n| names.contains(&n.to_string()))
    );
    // A name that is short already is one name.
    let names = auto(&rename("short", json!({"qpos": "observation.state"}))).summary().state_names;
    assert_eq!(names.iter().filter(|name| *name == "qpos").count(), 1, "{names:?}");
}

/// ALOHA's cameras on a checkpoint without them.
#[test]
fn a_robot_whose_cameras_do_not_fit() {
    let dir = lerobot("so100");
    let options = PolicyOptions { robot: RobotChoice::Preset(Robot::Aloha), ..Default::default() };
    let policy = dir.load(FACTS, &options).unwrap();
    let text = error(policy.preprocess(&observation(&["cam_high"], &STATE)));
    assert!(
        text.contains("of the images given, `cam_high`, none is one")
            && text.contains("`observation.images.top`")
    );
    let missing = "the checkpoint has no camera for the robot's cam_high";
    assert!(policy.summary().problems.iter().any(|p| p == missing));
}

#[test]
fn null_features_are_those_of_the_processors() {
    let dir = lerobot("null");
    dir.edit("config.json", |config| {
        config["input_features"] = Value::Null;
        config["output_features"] = Value::Null;
    });
    let policy = auto(&dir);
    runs(&policy);
    assert_eq!(policy.summary().cameras.len(), 2);
}

#[test]
fn actions_in_parts_are_joined() {
    let dir = lerobot("parts");
    let parts = |gripper: usize| {
        let features = json!({"action.arm": {"type": "ACTION", "shape": [2]},
                              "action.gripper": {"type": "ACTION", "shape": [gripper]}});
        dir.edit("config.json", |config| config["output_features"] = features);
        dir.load(FACTS, &PolicyOptions::default())
    };
    let policy = parts(1).unwrap();
    runs(&policy);
    assert!(policy.summary().problems[0].contains("returned joined: action.arm [2], action.gripper [1]"));
    assert!(
        error(parts(3)).contains("come in parts, action.arm [2], action.gripper [3], but are normalized")
    );
}

#[test]
fn old_configurations_keep_their_meaning() {
    let dir = lerobot("old-delta");
    std::fs::remove_file(dir.0.join(BEFORE)).unwrap();
    let (state, action) = ("normalize_inputs.buffer_observation_state", "unnormalize_outputs.buffer_action");
    let vectors =
        [(state, "mean", 0.5f32), (state, "std", 2.0), (action, "mean", 0.25), (action, "std", 4.0)];
    let vectors = vectors.map(|(buffer, stat, value)| (format!("{buffer}.{stat}"), [value; 14]));
    let mut header = serde_json::Map::new();
    let mut data: Vec<u8> = Vec::new();
    for (name, values) in &vectors {
        let start = data.len();
        data.extend(values.iter().flat_map(|x| x.to_le_bytes()));
        header.insert(
            name.clone(),
            json!({"dtype": "F32", "shape": [14], "data_offsets": [start, data.len()]}),
        );
    }
    let header = Value::Object(header).to_string().into_bytes();
    dir.write("model.safetensors", [(header.len() as u64).to_le_bytes().to_vec(), header, data].concat());
    dir.edit("config.json", |config| {
        config["resize_imgs_with_padding"] = json!([8, 8]);
        config["use_delta_joint_actions_aloha"] = true.into();
        config["n_action_steps"] = 2.into();
        config["input_features"]["observation.state"]["shape"] = json!([14]);
        config["output_features"]["action"]["shape"] = json!([14]);
    });
    let policy = auto(&dir);
    let summary = policy.summary();
    assert_eq!(summary.relative_actions.as_deref(), Some("11111101111110"));
    assert!(summary.problems[0].contains("plans 2 actions at a time (n_action_steps), this program the 5"));
    let prepared = policy.preprocess(&observation(&["top"], &[3.0; 14])).unwrap();
    let actions = policy.postprocess(&[0.0; 160], &prepared).unwrap();
    assert_eq!((actions.rows, actions.data[0], actions.data[6]), (2, 3.25, 0.25));
    // ALOHA's mask on another robot.
    dir.edit("config.json", |config| config["output_features"]["action"]["shape"] = json!([7]));
    assert!(
        error(dir.load(FACTS, &PolicyOptions::default()))
            .contains("use_delta_joint_actions_aloha with actions of 7")
    );
}

#[test]
fn steps_of_somebodys_own_are_named() {
    let dir = lerobot("custom");
    for (name, words) in [
        ("image_crop_resize_processor", "crops images and stretches them"),
        ("my_step", "a step of somebody's own"),
    ] {
        dir.edit(BEFORE, |file| {
            file["steps"][1] = json!({"registry_name": name, "config": {"resize_size": [224, 224]}});
        });
        let text = error(dir.load(FACTS, &PolicyOptions::default()));
        assert!(text.contains(name) && text.contains(words) && text.contains("resize_size"), "{text}");
    }
    let memory = lerobot("memory");
    memory.edit("config.json", |config| config["use_visual_memory"] = true.into());
    assert!(
        error(memory.load(FACTS, &PolicyOptions::default())).contains("use_visual_memory is not supported")
    );
}

#[test]
fn a_cut_off_jpeg_is_refused() {
    let mut jpeg = std::io::Cursor::new(Vec::new());
    let pixels =
        image::RgbImage::from_fn(64, 48, |x, y| image::Rgb([(x * 4) as u8, (y * 5) as u8, (x * y) as u8]));
    pixels.write_to(&mut jpeg, image::ImageFormat::Jpeg).unwrap();
    let jpeg = jpeg.into_inner();
    Image::decode("top", &jpeg).unwrap();
    for length in [jpeg.len() - 1, jpeg.len() - 2, jpeg.len() * 2 / 3] {
        assert!(error(Image::decode("top", &jpeg[..length])).contains("end marker is missing"), "{length}");
    }
    // What follows the end does not matter.
    Image::decode("top", &[&jpeg[..], b"trailer"].concat()).unwrap();
}

// ---- openpi ----

fn named(config: &str) -> PolicyOptions {
    PolicyOptions { config: Some(config.into()), ..Default::default() }
}

/// Whether actions are relative, units converted, the state in the prompt: with assets of somebody's own, nobody knows.
#[test]
fn openpi_asks_what_its_files_do_not_say() {
    let dir = openpi("asks", &["me/my_aloha_towel"]);
    let aloha = PolicyOptions { robot: RobotChoice::Preset(Robot::Aloha), ..Default::default() };
    let text = not_ready(&dir.load(FACTS, &aloha).unwrap());
    for word in [
        "the assets me/my_aloha_towel do not say",
        "--delta-actions true or false",
        "--adapt-to-pi true",
        "--config",
    ] {
        assert!(text.contains(word), "{word} in {text}");
    }
    assert!(not_ready(&auto(&dir)).contains("no robot is known for the assets me/my_aloha_towel"));
    let relative = |options: PolicyOptions| {
        let policy = dir.load(FACTS, &options).unwrap();
        policy.ready().unwrap();
        policy.summary().relative_actions.is_some()
    };
    assert!(relative(named("pi0_aloha")));
    assert!(!relative(named("pi0_aloha_sim")));
    let answered =
        |delta| PolicyOptions { delta_actions: Some(delta), adapt_to_pi: Some(true), ..aloha.clone() };
    assert!(relative(answered(true)) && !relative(answered(false)));

    let pi05 = dir.load(PI05, &answered(true)).unwrap();
    assert!(not_ready(&pi05).contains("--state-in-prompt true, openpi's default"));
    let options = PolicyOptions { state_in_prompt: Some(false), ..answered(true) };
    dir.load(PI05, &options).unwrap().ready().unwrap();
    assert!(error(dir.load(FACTS, &options)).contains("--state-in-prompt: only π0.5"));
}

/// π0.5 of DROID: velocities, positions relative to the state, or both possible.
#[test]
fn openpi_droid_of_velocities_and_of_positions() {
    let dir = openpi("droid-kinds", &["droid"]);
    let facts = |horizon| ModelFacts { horizon, ..PI05 };
    let policy = dir.load(facts(15), &PolicyOptions::default()).unwrap();
    policy.ready().unwrap();
    assert_eq!(policy.summary().config.as_deref(), Some("pi05_droid"));
    assert!(policy.summary().problems[0].contains("--config says so if it is pi05_droid_jointpos"));
    let policy = dir.load(facts(15), &named("pi05_droid_jointpos_polaris")).unwrap();
    assert_eq!(policy.summary().relative_actions.as_deref(), Some("11111110"));
    let policy = dir.load(facts(16), &PolicyOptions::default()).unwrap();
    let text = policy.ready().unwrap_err().to_string();
    assert!(
        text.contains("may belong to pi05_droid_finetune (actions as they are), pi05_full_droid_finetune"),
        "{text}"
    );
    for (config, relative) in [("pi05_droid_finetune", false), ("pi05_full_droid_finetune", true)] {
        let policy = dir.load(facts(16), &named(config)).unwrap();
        policy.ready().unwrap();
        assert_eq!(policy.summary().relative_actions.is_some(), relative);
    }
}

#[test]
fn openpi_pi05_reads_quantiles_and_the_state_in_the_prompt() {
    let dir = openpi("pi05", &["trossen"]);
    let policy = dir.load(PI05, &PolicyOptions::default()).unwrap();
    let summary = policy.summary();
    assert_eq!(summary.config.as_deref(), Some("pi05_aloha"));
    assert_eq!(summary.state_normalization.as_ref().unwrap().kind, Formula::OpenPiQuantile);
    assert_eq!(
        summary.state_in_prompt,
        Some(StateText { form: StateForm::Pi05, rounding: Rounding::F64, pad: 0 })
    );
    assert_eq!(summary.max_tokens, 200);
    let image = Image::array(Pixels::U8(vec![0; 192].into()), [3, 8, 8]);
    let observation = Observation {
        images: vec![("cam_high".into(), image)],
        state: vec![0.0; 14],
        prompt: Some("x".into()),
    };
    let prepared = policy.preprocess(&observation).unwrap();
    // Zero lies in the middle of the quantiles; the gripper of ALOHA's 0 is below them.
    let bins: Vec<_> = (0..14)
        .map(|i| match i {
            6 => "108",
            13 => "118",
            _ => "127",
        })
        .collect();
    let tokenizer = Tokenizer::parse(std::path::Path::new("t.json"), TINY_TOKENIZER.as_bytes()).unwrap();
    let text = format!("Task: x, State: {};\nAction: ", bins.join(" "));
    assert_eq!(prepared.inputs.tokens, [&[2], &tokenizer.encode(&text).unwrap()[..]].concat(), "{text}");

    let libero = openpi("pi05-libero", &["physical-intelligence/libero"]);
    let summary = libero.load(PI05, &PolicyOptions::default()).unwrap().summary();
    assert_eq!((summary.config.as_deref(), summary.state_in_prompt), (Some("pi05_libero"), None));
    assert_eq!((summary.prompt_format, summary.relative_actions), (PromptFormat::OpenPi, None));
}

#[test]
fn openpi_without_assets() {
    // What openpi's converter leaves.
    let dir = openpi("no-assets", &[]);
    let policy = dir.load(FACTS, &named("pi0_aloha")).unwrap();
    let text = not_ready(&policy);
    assert!(
        text.contains("openpi's converter to PyTorch leaves it behind; copy it")
            && text.contains("--stats FILE")
    );
    // What openpi's training leaves: no config.json.
    let trained = openpi("trained", &["trossen"]);
    std::fs::remove_file(trained.0.join("config.json")).unwrap();
    trained.load(FACTS, &named("pi0_aloha")).unwrap().ready().unwrap();
    // Statistics beside the weights.
    let source = trained.0.join("assets/trossen/norm_stats.json");
    dir.write("norm_stats.json", std::fs::read(&source).unwrap());
    dir.load(FACTS, &named("pi0_aloha")).unwrap().ready().unwrap();
    assert!(not_ready(&auto(&dir)).contains("no robot is known for the statistics in"));
    // Or elsewhere.
    let elsewhere = openpi("elsewhere", &[]);
    let options = PolicyOptions { stats: Some(source), ..named("pi0_aloha") };
    elsewhere.load(FACTS, &options).unwrap().ready().unwrap();
    // A data set's are of raw actions, which this policy does not normalize.
    let set = Dir::new("openpi-set");
    let stats = json!({"mean": vec![0.0; 14], "std": vec![1.0; 14]});
    set.write("meta/stats.json", json!({"observation.state": stats, "action": stats}).to_string());
    let options = PolicyOptions { stats: Some(set.0.clone()), ..named("pi0_aloha") };
    let text = error(elsewhere.load(FACTS, &options));
    assert!(text.starts_with("--stats: ") && text.contains("actions relative to the state"), "{text}");
}

#[test]
fn openpi_statistics_of_another_robot() {
    let dir = openpi("another", &["trossen"]);
    let text = error(dir.load(FACTS, &named("pi0_droid")));
    assert!(
        text.contains(
            "no assets/droid/norm_stats.json; the checkpoint has trossen: name one with --asset-id"
        )
    );
    let droid = PolicyOptions { robot: RobotChoice::Preset(Robot::Droid), ..Default::default() };
    assert!(error(dir.load(FACTS, &droid)).contains("no assets/droid/norm_stats.json"));
    let clash = PolicyOptions { robot: RobotChoice::Preset(Robot::Droid), ..named("pi0_aloha") };
    assert!(error(dir.load(FACTS, &clash)).contains("droid contradicts --config pi0_aloha"));
    // A real configuration of openpi.
    let libero = openpi("libero-low-mem", &["physical-intelligence/libero"]);
    libero.load(FACTS, &named("pi0_libero_low_mem_finetune")).unwrap().ready().unwrap();
}

/// Python writes NaN and editors byte order marks; nothing of it stops what is certain.
#[test]
fn openpi_statistics_as_python_writes_them() {
    let dir = openpi("python", &["trossen"]);
    let path = "assets/trossen/norm_stats.json";
    let text = std::fs::read_to_string(dir.0.join(path)).unwrap();
    let inner = text.strip_prefix(r#"{"norm_stats":"#).unwrap().strip_suffix('}').unwrap().to_owned();
    for good in [format!("\u{feff}{text}"), inner, text.replacen("\"q01\":[", "\"q01\":[NaN,", 1)] {
        dir.write(path, good);
        auto(&dir).ready().unwrap();
    }
    dir.write(path, text.replacen("\"mean\":[", "\"mean\":[NaN,", 1));
    let policy = auto(&dir);
    assert!(policy.ready().unwrap_err().to_string().contains("mean has 15 values, std has 14"));
}
