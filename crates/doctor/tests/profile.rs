//! What is known of a checkpoint, from its files.

mod common;

use std::path::Path;

use common::Rig;
use pi0_doctor::Profile;
use pi0_policy::{Policy, PolicyOptions, Robot};

/// A safetensors file of vectors.
fn safetensors(vectors: &[(&str, &[f32])]) -> Vec<u8> {
    let (mut header, mut data) = (serde_json::Map::new(), Vec::new());
    for (name, values) in vectors {
        let start = data.len();
        data.extend(values.iter().flat_map(|x| x.to_le_bytes()));
        let entry =
            serde_json::json!({"dtype": "F32", "shape": [values.len()], "data_offsets": [start, data.len()]});
        header.insert((*name).to_owned(), entry);
    }
    let header = serde_json::Value::from(header).to_string();
    [&(header.len() as u64).to_le_bytes(), header.as_bytes(), &data].concat()
}

/// The demo's checkpoint with other statistics.
fn lerobot(vectors: &[(&str, &[f32])]) -> Profile {
    let demo = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../models/demo");
    let dir = tempfile::tempdir().unwrap();
    for entry in std::fs::read_dir(&demo).unwrap() {
        let path = entry.unwrap().path();
        let name = path.file_name().unwrap().to_owned();
        let text = name.to_string_lossy().into_owned();
        if text.ends_with("normalizer_processor.safetensors") {
            std::fs::write(dir.path().join(name), safetensors(vectors)).unwrap();
        } else if text.ends_with(".json") {
            std::fs::copy(&path, dir.path().join(name)).unwrap();
        }
    }
    let checkpoint = pi0_model::Checkpoint::open(&demo).unwrap();
    Profile::of(&Policy::load(dir.path(), (&checkpoint.config).into(), &PolicyOptions::default()).unwrap())
}

#[test]
fn a_checkpoint_of_lerobots_tells_extremes_quantiles_and_colours() {
    let own: [(&str, &[f32]); 4] = [
        ("observation.state.mean", &[0.0, 1.0, 2.0, 3.0]),
        ("observation.state.std", &[1.0; 4]),
        ("action.mean", &[0.0; 4]),
        ("action.std", &[2.0; 4]),
    ];
    let more: [(&str, &[f32]); 6] = [
        ("observation.state.min", &[-1.0; 4]),
        ("observation.state.max", &[5.0; 4]),
        ("action.q01", &[-3.0; 4]),
        ("action.q99", &[4.0; 4]),
        ("observation.images.base_0_rgb.mean", &[0.5, 0.25, 0.125]),
        // No mean of colours: those of a picture in 0 to 255.
        ("observation.images.left_wrist_0_rgb.mean", &[120.0, 110.0, 100.0]),
    ];
    let profile = lerobot(&[&own[..], &more[..]].concat());
    assert_eq!(profile.state[2].mean, Some(2.0));
    assert_eq!(profile.state[2].seen, Some([-1.0, 5.0]));
    assert_eq!(profile.state[2].usual, None);
    assert_eq!(profile.actions[1].usual, Some([-3.0, 4.0]));
    assert_eq!((profile.actions[1].deviation, profile.actions[1].seen), (Some(2.0), None));
    assert_eq!(profile.cameras[0].colour, Some([0.5, 0.25, 0.125]));
    assert_eq!(profile.cameras[1].colour, None);
    assert!(profile.cameras.iter().all(|camera| camera.expected));
    // As it is shipped: nothing but means and deviations.
    let plain = lerobot(&own);
    assert_eq!((plain.state[2].seen, plain.actions[1].usual, plain.cameras[0].colour), (None, None, None));
    assert!(plain.pairs.iter().all(Option::is_none));
}

#[test]
fn robots_of_openpis_have_names_grippers_and_rates() {
    let rig = Rig::smooth(Robot::Aloha);
    let profile = rig.doctor.profile();
    assert_eq!(profile.state[13].name, "right gripper");
    assert_eq!(profile.state[6].own, Some([0.0, 1.0]));
    assert!(profile.actions[6].gripper && !profile.actions[5].gripper);
    assert!(profile.state[0].usual.is_some(), "quantiles beside the z-score's statistics");
    assert_eq!((profile.rate, profile.pairs[4]), (Some(50.0), Some(4)));
    // ALOHA's wrist cameras are optional in openpi: the simulation has none.
    assert_eq!(
        profile.cameras.iter().map(|camera| camera.expected).collect::<Vec<_>>(),
        [true, false, false]
    );
    let rig = Rig::smooth(Robot::Droid);
    assert_eq!(rig.doctor.profile().pairs, [None, None, None, None, None, None, None, Some(7)]);
}
