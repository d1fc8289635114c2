//! `pi0 serve` on a GPU that is lost, or hangs, while robots ask: from the client's socket to the driver's answer.
//!
//! Everything is what the command runs, in this process, so that the driver's answer can be made up: no software driver
//! loses its device.

#[path = "../../server/tests/common/checkpoint.rs"]
mod checkpoint;

use std::net::{SocketAddr, TcpStream};
use std::path::Path;
use std::time::{Duration, Instant};

use checkpoint::openpi_checkpoint;
use pi0_cli::device::{self, DeviceArgs, DeviceKind, Fault};
use pi0_cli::policy::PolicyArgs;
use pi0_cli::serve;
use pi0_cli::weights::WeightsArgs;
use pi0_model::Checkpoint;
use pi0_policy::Robot;
use pi0_server::{
    Bound, CancellationToken, Dtype, Limits, Map, NdArray, Settings, Value, decode, encode, runtime,
};
use pi0_vulkan::{Vulkan, VulkanOptions};
use tungstenite::{Message, WebSocket};

const HORIZON: usize = 12;

/// Whether there is a driver; else says that the test is skipped.
fn driver() -> bool {
    match Vulkan::open(VulkanOptions::default()) {
        Ok(_) => true,
        Err(e) => {
            assert!(std::env::var_os("PI0_REQUIRE_VULKAN").is_none(), "PI0_REQUIRE_VULKAN is set: {e}");
            eprintln!("skipped: {e}");
            false
        }
    }
}

fn args(fault: Option<Fault>) -> DeviceArgs {
    DeviceArgs { device: DeviceKind::Vulkan(0), fault, ..DeviceArgs::default() }
}

/// The first submission after the model has been loaded: how many that takes depends on the driver's memory.
fn first_inference(model: &Path) -> u64 {
    let loads = |at: u64| {
        let checkpoint = Checkpoint::open(model).unwrap();
        device::load_silently(&args(Some(Fault::Lost(at))), checkpoint, &|_| ()).is_ok()
    };
    let (mut fails, mut works) = (0, 1 << 14);
    assert!(!loads(fails) && loads(works));
    while fails + 1 < works {
        let at = (fails + works) / 2;
        *(if loads(at) { &mut works } else { &mut fails }) = at;
    }
    works
}

fn array(dtype: Dtype, shape: &[usize], data: Vec<u8>) -> Value {
    Value::Array(NdArray::new(dtype, shape.to_vec(), data.into()).unwrap())
}

/// An observation that brings its noise, so that its actions are known.
fn observation(seed: usize) -> Vec<u8> {
    let picture = |camera: usize| {
        let data = (0..3 * 224 * 224).map(|i: usize| (i * 31 / 7 + seed + camera) as u8).collect();
        array(Dtype::U8, &[3, 224, 224], data)
    };
    let noise = (0..HORIZON * 32).flat_map(|i| ((i * 37 + seed) as f32).sin().to_le_bytes()).collect();
    let cameras = ["cam_high", "cam_left_wrist", "cam_right_wrist"];
    let images = cameras.iter().enumerate().map(|(i, name)| ((*name).to_owned(), picture(i)));
    let observation = Value::Map(Map::from([
        ("state", Value::Array(NdArray::from_f64(vec![14], &[0.1; 14]).unwrap())),
        ("images", Value::Map(Map(images.collect()))),
        ("prompt", Value::Text("fold the towel".into())),
        ("pi0/noise", array(Dtype::F32, &[HORIZON, 32], noise)),
    ]));
    encode(&observation)
}

/// A robot's connection.
struct Client(WebSocket<TcpStream>);

impl Client {
    fn connect(address: SocketAddr) -> Self {
        // The server takes connections once the model is loaded.
        let start = Instant::now();
        let stream = loop {
            match TcpStream::connect(address) {
                Ok(stream) => break stream,
                Err(e) => assert!(start.elapsed() < Duration::from_secs(120), "{e}"),
            }
            std::thread::sleep(Duration::from_millis(20));
        };
        let (mut socket, _) = tungstenite::client(format!("ws://{address}/"), stream).unwrap();
        assert!(matches!(socket.read().unwrap(), Message::Binary(_)), "metadata comes first");
        Self(socket)
    }

    /// The actions, or what the server complains of.
    fn ask(&mut self, observation: &[u8]) -> Result<Vec<f64>, String> {
        self.0.send(Message::Binary(observation.to_vec().into())).unwrap();
        loop {
            match self.0.read().unwrap() {
                Message::Binary(frame) => {
                    let Value::Map(map) = decode(&frame, Limits::default()).unwrap() else { panic!() };
                    let Some(Value::Array(actions)) = map.get("actions") else { panic!("{map:?}") };
                    return Ok(actions.numbers().unwrap());
                }
                Message::Text(text) => return Err(text.to_string()),
                _ => {}
            }
        }
    }
}

/// Serves `model` on a device with this fault while `robots` ask.
fn served<T>(model: &Path, fault: Option<Fault>, robots: impl FnOnce(SocketAddr) -> T) -> T {
    let settings =
        Settings { host: "127.0.0.1".parse().unwrap(), port: 0, steps: Some(2), ..Settings::default() };
    let runtime = runtime().unwrap();
    let bound = runtime.block_on(async { Bound::new(settings) }).unwrap();
    let (address, stop) = (bound.address(), CancellationToken::new());
    let model = model.to_owned();
    let load = move || {
        let weights = WeightsArgs::default();
        let policy = PolicyArgs { robot: "auto".into(), ..PolicyArgs::default() };
        serve::open(&model, &weights, &policy, None, &args(fault))
    };
    let serving = runtime.spawn(bound.serve(load, stop.clone()));
    let result = robots(address);
    stop.cancel();
    runtime.block_on(serving).unwrap().expect("the server ends well");
    result
}

#[test]
fn a_robot_gets_the_error_and_all_go_on() {
    if !driver() {
        return;
    }
    let dir = openpi_checkpoint(Robot::Aloha, HORIZON);
    let observations: Vec<Vec<u8>> = (0..4).map(observation).collect();
    let want: Vec<Vec<f64>> = served(dir.path(), None, |address| {
        let mut robot = Client::connect(address);
        observations.iter().map(|o| robot.ask(o).unwrap()).collect()
    });
    let at = first_inference(dir.path());
    for (fault, word) in [(Fault::Lost(at), "was lost"), (Fault::Hung(at), "did not end")] {
        served(dir.path(), Some(fault), |address| {
            // Others wait while the first one's request breaks the device.
            let mut others: Vec<Client> = (0..3).map(|_| Client::connect(address)).collect();
            let error = Client::connect(address).ask(&observations[0]).unwrap_err();
            assert!(error.contains(word) && error.contains("opened again"), "{error}");
            let answers: Vec<Vec<f64>> = std::thread::scope(|scope| {
                let each = others.iter_mut().zip(&observations[1..]);
                let asked: Vec<_> = each.map(|(robot, o)| scope.spawn(move || robot.ask(o))).collect();
                asked.into_iter().map(|robot| robot.join().unwrap().expect("a whole device")).collect()
            });
            // They shared a batch, whose roundings in f16 are not those of a robot alone.
            for (got, want) in answers.iter().zip(&want[1..]) {
                let off: f64 = got.iter().zip(want).map(|(a, b)| (a - b).powi(2)).sum();
                let size: f64 = want.iter().map(|b| b * b).sum();
                assert!((off / size).sqrt() < 5e-3, "{fault:?}: {off} of {size}");
            }
            for (robot, (o, want)) in others.iter_mut().zip(observations.iter().zip(&want).skip(1)) {
                assert_eq!(&robot.ask(o).unwrap(), want, "{fault:?}");
            }
            // The one that got the error asks again, on a connection of its own.
            assert_eq!(Client::connect(address).ask(&observations[0]).unwrap(), want[0], "{fault:?}");
        });
    }
}
