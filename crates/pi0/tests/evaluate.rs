//! `pi0 evaluate` and `pi0 doctor`; the first also against Python, on a dataset that lerobot wrote:
//! `PI0_LEROBOT=python cargo test -p pi0 --release --test evaluate` with a Python that has what lerobot_dataset.py needs, and
//! an installed ffmpeg. `PI0_EPISODES=50` for all fifty.

use std::collections::HashMap;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use pi0_demo::{Rng, Scene, Split, World, expert, render};
use safetensors::{Dtype, tensor::TensorView};

fn repository() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..")
}

/// The expert's episodes, as raw arrays.
fn record(dir: &Path, episodes: usize) {
    for episode in 0..episodes {
        let mut world = World::new(Scene::random(&mut Rng::new(500 + episode as u64), Split::Train));
        let (mut top, mut wrist, mut state, mut actions) = (vec![], vec![], vec![], vec![]);
        while world.outcome().is_none() {
            top.extend(render::top(&world, 56).rgb);
            wrist.extend(render::wrist(&world, 56).rgb);
            state.extend(world.gripper.state());
            let action = expert::act(&world);
            actions.extend(action);
            world.step(&action);
        }
        let n = state.len() / 4;
        let floats = |x: &[f32]| x.iter().flat_map(|x| x.to_le_bytes()).collect::<Vec<u8>>();
        let (state, actions) = (floats(&state), floats(&actions));
        let view = |dtype, shape, data| TensorView::new(dtype, shape, data).unwrap();
        let tensors = [
            ("top", view(Dtype::U8, vec![n, 56, 56, 3], &top)),
            ("wrist", view(Dtype::U8, vec![n, 56, 56, 3], &wrist)),
            ("state", view(Dtype::F32, vec![n, 4], &state)),
            ("actions", view(Dtype::F32, vec![n, 4], &actions)),
        ];
        let task = HashMap::from([("task".to_owned(), world.scene.task.to_string())]);
        let path = dir.join(format!("episode_{episode:03}.safetensors"));
        safetensors::serialize_to_file(tensors, Some(task), &path).unwrap();
    }
}

/// The dataset of the reader's tests, whose numbers are plain: states `[episode, frame, 0.5]`, actions
/// `[frame / 8, episode]`, pictures of 8 x 6.
const SMALL: &str = "crates/dataset/tests/data/v30";
const TASKS: [&str; 2] = ["pick up the cup", "put it down"];

/// The shipped policy with the statistics of the small dataset, so that it has its widths.
fn on_small(command: &str) -> Command {
    let mut pi0 = pi0();
    pi0.current_dir(repository()).args([command, "models/demo", "--stats", SMALL]);
    pi0
}

/// What `pi0 infer` answers to a frame of the small dataset.
fn infer(dir: &Path, episode: usize, frame: usize, seed: usize) -> Vec<Vec<f64>> {
    let value = |i: usize| (100 * episode + 10 * frame + 5 * (i / 24) + i / 3 % 8 * 3 + 40 * (i % 3)) as u8;
    let picture = image::RgbImage::from_raw(8, 6, (0..144).map(value).collect()).unwrap();
    let (png, json) = (dir.join("picture.png"), dir.join("actions.json"));
    picture.save(&png).unwrap();
    let (image, state) = (format!("base_0_rgb={}", png.display()), format!("{episode},{frame},0.5"));
    succeed(
        on_small("infer")
            .args(["--image", &image, "--state", &state, "--prompt", TASKS[episode]])
            .args(["--seed", &seed.to_string(), "--out"])
            .arg(&json),
    );
    serde_json::from_slice(&std::fs::read(json).unwrap()).unwrap()
}

#[test]
fn errors_are_those_of_single_answers() {
    let dir = tempfile::tempdir().unwrap();
    let (json, html, log) = (dir.path().join("o.json"), dir.path().join("o.html"), dir.path().join("log"));
    let evaluate = |more: &[&str]| {
        let mut command = on_small("evaluate");
        command.args([SMALL, "--camera", "observation.images.top=base_0_rgb", "--seed", "3"]).args(more);
        succeed(command.arg("--json").arg(&json).arg("--html").arg(&html));
        serde_json::from_slice::<serde_json::Value>(&std::fs::read(&json).unwrap()).unwrap()
    };
    let report = evaluate(&[]);
    // Every four actions: frames 0 and 4 of five, 0 of three.
    let (mut absolute, mut first_step) = ([0.0; 2], 0.0);
    for (seed, (episode, frame)) in [(3, (0, 0)), (4, (0, 4)), (5, (1, 0))] {
        let length = [5, 3][episode];
        for (t, action) in infer(dir.path(), episode, frame, seed).iter().enumerate().take(length - frame) {
            let recorded = [(frame + t) as f64 / 8.0, episode as f64];
            let errors = [0, 1].map(|d| (action[d] - recorded[d]).abs());
            (0..2).for_each(|d| absolute[d] += errors[d]);
            first_step += if t == 0 { errors[0] + errors[1] } else { 0.0 };
        }
    }
    let all = &report["open_loop"];
    assert_eq!((&all["chunks"], &all["total"]["count"]), (&3.into(), &16.into()));
    let near = |got: &serde_json::Value, wanted: f64| {
        let got = got.as_f64().unwrap();
        assert!((got - wanted).abs() <= 1e-9 * wanted.abs(), "{got}, wanted {wanted}");
    };
    (0..2).for_each(|d| near(&all["dimensions"][d]["absolute"], absolute[d]));
    near(&all["steps"][0]["absolute"], first_step);
    assert_eq!(report["action_names"], serde_json::json!(["go", "grip"]));
    // The wrist camera that the policy knows is not in the data.
    let findings = report["doctor"]["lines"].as_array().unwrap();
    let missing = findings.iter().find(|line| line["kind"] == "camera_missing").unwrap();
    assert_eq!((&missing["count"], &missing["first"]), (&3.into(), &"episode 0 frame 0".into()));
    let page = std::fs::read_to_string(&html).unwrap();
    assert!(page.contains("By step of the chunk") && page.contains("camera_missing"));

    // Interrupted and gone on with, it is the same; with another seed it is another evaluation.
    let resume = ["--resume", log.to_str().unwrap()];
    evaluate(&[&resume[..], &["--episodes", "1"]].concat());
    assert_eq!(evaluate(&resume), report);
    let text = std::fs::read_to_string(&log).unwrap();
    std::fs::write(&log, &text[..text.len() - 40]).unwrap();
    assert_eq!(evaluate(&resume), report);
    let other = [SMALL, "--camera", "observation.images.top=base_0_rgb", "--seed", "4"];
    assert!(complaint(on_small("evaluate").args(other).args(resume)).contains("another evaluation"));
}

/// What a failing call says; it never panics.
fn complaint(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(!output.status.success() && !text.contains("panicked"), "{command:?}: {text}");
    text
}

#[test]
fn mistakes_are_explained() {
    for (dataset, options, word) in [
        ("crates", &[][..], "is it a lerobot dataset?"),
        (SMALL, &[], "say which is which with --camera DATASET=POLICY"),
        (SMALL, &["--camera", "top"], "wanted DATASET=POLICY"),
        (SMALL, &["--camera", "top=base_0_rgb"], "the dataset has no camera top"),
        (SMALL, &["--camera", "observation.images.top=head"], "the policy has no camera head"),
        (SMALL, &["--state", "joints"], "no state called joints"),
        (SMALL, &["--camera", "observation.images.top=base_0_rgb", "--every", "0"], "--every 0"),
        (SMALL, &["--camera", "observation.images.top=base_0_rgb", "--episodes", "0"], "no episodes"),
    ] {
        let text = complaint(on_small("evaluate").arg(dataset).args(options));
        assert!(text.contains(word), "{options:?}: {text}");
    }
    // A policy for another robot.
    let mut command = pi0();
    command.current_dir(repository()).args(["evaluate", "models/demo", SMALL]);
    let text = complaint(command.args(["--camera", "observation.images.top=base_0_rgb"]));
    assert!(text.contains("episode 0, frame 0") && text.contains("state"), "{text}");
    let mut command = pi0();
    let text = complaint(command.current_dir(repository()).args(["doctor", "models/demo", "crates"]));
    assert!(text.contains("holds no recordings"), "{text}");
}

/// Videos need a decoder; what is missing is said before anything is loaded.
#[test]
fn videos_without_ffmpeg_are_refused_in_words() {
    let dir = tempfile::tempdir().unwrap();
    let data = dir.path().join("data");
    std::fs::create_dir_all(data.join("meta")).unwrap();
    for file in ["info.json", "episodes.jsonl", "tasks.jsonl"] {
        let from = repository().join("crates/dataset/tests/data/v21/meta").join(file);
        std::fs::copy(from, data.join("meta").join(file)).unwrap();
    }
    let info = data.join("meta/info.json");
    let text = std::fs::read_to_string(&info).unwrap();
    std::fs::write(&info, text.replace("\"dtype\": \"image\"", "\"dtype\": \"video\"")).unwrap();
    let evaluate = || {
        let mut command = on_small("evaluate");
        command.arg(&data).args(["--camera", "observation.images.top=base_0_rgb"]);
        command
    };
    let text = complaint(evaluate().env("PATH", dir.path()));
    assert!(text.contains("no ffmpeg was found") && text.contains("--ffmpeg"), "{text}");
    let text = complaint(evaluate().args(["--ffmpeg", "/nowhere/ffmpeg"]));
    assert!(text.contains("--ffmpeg /nowhere/ffmpeg: it does not run"), "{text}");
}

/// The world's own robot, served and recorded: nothing is wrong with it, and with another checkpoint there is.
#[test]
fn a_recording_is_examined() {
    let dir = tempfile::tempdir().unwrap();
    let (recording, page) = (dir.path().join("requests"), dir.path().join("page.html"));
    let server = Server::start(&repository().join("models/demo"), Some(&recording));
    let mut demo = pi0();
    demo.current_dir(dir.path()).args(["demo", "--server", &format!("ws://{}", server.1)]);
    succeed(demo.args(["--episodes", "2", "--render", "none"]));
    drop(server);
    let doctor = |more: &[&str]| {
        let mut command = pi0();
        command.current_dir(repository()).args(["doctor", "models/demo"]).arg(&recording).args(more);
        command
    };
    let text = succeed(&mut doctor(&["--html", page.to_str().unwrap()]));
    assert!(text.contains("of 1 robot, 0 with findings"), "{text}");
    let html = std::fs::read_to_string(&page).unwrap();
    assert!(html.contains("data:image/png;base64,") && html.contains("left_wrist_0_rgb"));
    // Limits that nothing keeps: an error, unless it is allowed.
    let limits = dir.path().join("limits.toml");
    std::fs::write(&limits, "[doctor]\nstate_deviations = 0.001\n").unwrap();
    let strict = ["--thresholds", limits.to_str().unwrap()];
    assert!(complaint(&mut doctor(&strict)).contains("the doctor found state_outside"));
    let allowed = succeed(&mut doctor(&[&strict[..], &["--allow", "state_outside", "--json", "-"]].concat()));
    let summary: serde_json::Value = serde_json::from_str(&allowed).unwrap();
    assert_eq!(summary["lines"][0]["kind"], "state_outside");
    std::fs::write(&limits, "[doctor]\nblak = 1.0\n").unwrap();
    assert!(complaint(&mut doctor(&strict)).contains("blak"));
    // The same requests again, in a page.
    let mut replay = pi0();
    replay.current_dir(repository()).args(["replay", "models/demo"]).arg(&recording);
    assert!(succeed(replay.arg("--html").arg(&page)).contains("0 differ"));
    assert!(std::fs::read_to_string(&page).unwrap().contains("data:image/png;base64,"));
}

fn succeed(command: &mut Command) -> String {
    let output = command.output().unwrap();
    let text = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{command:?}: {text}");
    String::from_utf8_lossy(&output.stdout).into_owned()
}

fn pi0() -> Command {
    Command::new(env!("CARGO_BIN_EXE_pi0"))
}

/// A server that ends with the test.
struct Server(std::process::Child, String);

impl Server {
    fn start(model: &Path, record: Option<&Path>) -> Self {
        let mut command = pi0();
        command.args(["serve", "--host", "127.0.0.1", "--port", "0", "--seed", "0"]).arg(model);
        command.args(record.map(|dir| ["--record".as_ref(), dir.as_os_str()]).into_iter().flatten());
        let mut child = command.stderr(Stdio::piped()).spawn().unwrap();
        let mut lines = BufReader::new(child.stderr.take().unwrap()).lines().map_while(Result::ok);
        let line = lines.find(|line| line.contains("listening")).expect("a server that listens");
        std::thread::spawn(move || lines.for_each(drop));
        let address = line.split("address=").nth(1).unwrap().split_whitespace().next().unwrap().to_owned();
        Self(child, address)
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

#[test]
fn the_numbers_are_those_of_python() {
    let Ok(python) = std::env::var("PI0_LEROBOT") else {
        eprintln!("skipped: set PI0_LEROBOT to a Python that has lerobot 0.6.1; see lerobot_dataset.py");
        return;
    };
    let episodes = std::env::var("PI0_EPISODES").map_or(3, |n| n.parse().expect("a number"));
    let dir = tempfile::tempdir().unwrap();
    let (raw, data) = (dir.path().join("raw"), dir.path().join("data"));
    std::fs::create_dir(&raw).unwrap();
    record(&raw, episodes);
    let script = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/lerobot_dataset.py");
    let run = |arguments: &[&std::ffi::OsStr]| {
        succeed(Command::new(&python).arg(&script).args(arguments).env("HF_HUB_OFFLINE", "1"));
    };
    run(&["write".as_ref(), raw.as_ref(), data.as_ref()]);

    let model = repository().join("models/demo");
    let (json, html, log) =
        (dir.path().join("ours.json"), dir.path().join("ours.html"), dir.path().join("log"));
    let evaluate = |more: &[&str]| {
        let mut command = pi0();
        command.arg("evaluate").arg(&model).arg(&data).args(more);
        command.arg("--json").arg(&json).arg("--html").arg(&html).arg("--resume").arg(&log);
        succeed(&mut command);
        serde_json::from_str::<serde_json::Value>(&std::fs::read_to_string(&json).unwrap()).unwrap()
    };
    // Interrupted after an episode and gone on with, it is the same as without.
    evaluate(&["--episodes", "1"]);
    let ours = evaluate(&[]);
    std::fs::remove_file(&log).unwrap();
    assert_eq!(evaluate(&[]), ours);
    assert_eq!(ours["doctor"]["lines"].as_array().unwrap().len(), 0, "{}", ours["doctor"]);
    assert!(std::fs::read_to_string(&html).unwrap().contains("By step of the chunk"));

    let server = Server::start(&model, None);
    let every = ours["setup"]["every"].to_string();
    let theirs = dir.path().join("theirs.json");
    let url = format!("ws://{}", server.1);
    run(&["evaluate".as_ref(), data.as_ref(), url.as_ref(), every.as_ref(), theirs.as_ref()]);
    let theirs: serde_json::Value = serde_json::from_str(&std::fs::read_to_string(&theirs).unwrap()).unwrap();
    let all = &ours["open_loop"];
    assert_eq!(all["chunks"], theirs["chunks"]);
    let mean =
        |sums: &serde_json::Value| sums["absolute"].as_f64().unwrap() / sums["count"].as_f64().unwrap();
    let square = |sums: &serde_json::Value| {
        (sums["squares"].as_f64().unwrap() / sums["count"].as_f64().unwrap()).sqrt()
    };
    let mut worst: f64 = 0.0;
    let mut near = |what: &str, ours: f64, theirs: &serde_json::Value| {
        let theirs = theirs.as_f64().unwrap();
        let off = (ours - theirs).abs() / theirs.abs().max(1e-9);
        worst = worst.max(off);
        assert!(off < 1e-3, "{what}: {ours} here, {theirs} in Python");
    };
    for d in 0..4 {
        let sums = &all["dimensions"][d];
        near("mean of a dimension", mean(sums), &theirs["dimensions"][d][0]);
        near("root mean square of a dimension", square(sums), &theirs["dimensions"][d][1]);
        near("deviation", all["deviations"][d].as_f64().unwrap(), &theirs["deviations"][d]);
    }
    let steps = all["steps"].as_array().unwrap();
    assert_eq!(steps.len(), theirs["steps"].as_array().unwrap().len());
    for (t, sums) in steps.iter().enumerate() {
        near("mean of a step", mean(sums), &theirs["steps"][t]);
    }
    for (e, episode) in ours["episodes"].as_array().unwrap().iter().enumerate() {
        let sum = |key: &str| -> f64 {
            episode["dimensions"].as_array().unwrap().iter().map(|sums| sums[key].as_f64().unwrap()).sum()
        };
        near("mean of an episode", sum("absolute") / sum("count"), &theirs["episodes"][e]);
    }
    eprintln!(
        "{episodes} episodes, {} chunks: mean errors {:?}, largest relative difference to Python {worst:.1e}",
        all["chunks"],
        all["dimensions"].as_array().unwrap().iter().map(mean).collect::<Vec<_>>()
    );
}
