//! The server as its clients see it, with the real network on the host.

mod common;

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use common::checkpoint::{openpi_checkpoint, pi05_checkpoint, tiny_copy};
use common::*;
use futures_util::{SinkExt, StreamExt};
use pi0_model::ModelError;
use pi0_policy::Robot;
use pi0_server::{Dtype, Map, NdArray, Settings, Value, Verdict};
use tokio::io::AsyncWriteExt;
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::{Error as WsError, Message};

const HORIZON: usize = 12;

async fn start(settings: Settings, hook: Option<Hook>) -> Running {
    Running::start(openpi_checkpoint(Robot::Aloha, HORIZON), settings, hook).await
}

/// Holds every inference while it is shut, and counts those that began.
#[derive(Clone, Default)]
struct Gate {
    shut: Arc<AtomicBool>,
    began: Arc<AtomicUsize>,
}

impl Gate {
    fn hook(&self) -> Hook {
        let gate = self.clone();
        Arc::new(move |_| {
            gate.began.fetch_add(1, Ordering::SeqCst);
            while gate.shut.load(Ordering::SeqCst) {
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok(())
        })
    }

    fn shut(&self) {
        self.shut.store(true, Ordering::SeqCst);
    }

    fn open(&self) {
        self.shut.store(false, Ordering::SeqCst);
    }

    /// Waits until so many inferences have begun in all.
    async fn began(&self, count: usize) {
        while self.began.load(Ordering::SeqCst) < count {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
    }
}

/// Waits until a metric is what is wanted.
async fn until(server: &Running, metric: &str, wanted: f64) {
    let start = Instant::now();
    while server.metric(metric).await != wanted {
        assert!(start.elapsed() < Duration::from_secs(60), "{metric} is not {wanted}");
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
}

const QUEUE: &str = "pi0_queue_depth";

fn frame(observation: &Value) -> Message {
    Message::Binary(pi0_server::encode(observation).into())
}

fn float(map: &Map, key: &str, inner: &str) -> Option<f64> {
    let Some(Value::Map(map)) = map.get(key) else { panic!("no {key} in {map:?}") };
    match map.get(inner) {
        None => None,
        Some(Value::Float(x)) => Some(*x),
        other => panic!("{inner} must be a float: {other:?}"),
    }
}

fn refused(reply: Reply, words: &[&str]) {
    let Reply::Error(text, Some(close)) = reply else { panic!("{reply:?}") };
    for word in words {
        assert!(text.contains(word), "{word:?} is missing in {text:?}");
    }
    assert_eq!(u16::from(close.code), 1011);
    assert_eq!(close.reason, "Internal server error. Traceback included in previous frame.");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_protocol_is_openpis() {
    let server = start(settings(), None).await;
    let mut client = server.client().await;
    let mut pose = b"\x81\xaareset_pose\x96\0\xcb\xbf\xf8\0\0\0\0\0\0\xcb\x3f\xf8\0\0\0\0\0\0".to_vec();
    pose.extend([0, 0, 0]);
    assert_eq!(client.metadata, pose);
    for round in 0..3 {
        let Reply::Actions(reply) = client.infer(&aloha(1)).await else { panic!() };
        let keys: Vec<&str> = reply.iter().map(|(key, _)| key).collect();
        assert_eq!(keys, ["actions", "policy_timing", "server_timing"]);
        let actions = actions(&reply);
        assert_eq!(actions.shape, [HORIZON, 14]);
        assert!(actions.numbers().unwrap().iter().all(|x| x.is_finite()));
        let model = float(&reply, "policy_timing", "infer_ms").unwrap();
        let infer = float(&reply, "server_timing", "infer_ms").unwrap();
        assert!(0.0 < model && model <= infer, "{model} {infer}");
        let total = float(&reply, "server_timing", "prev_total_ms");
        assert_eq!(total.is_some(), round > 0);
    }
    assert_eq!(server.get("/healthz").await, ("HTTP/1.1 200 OK".into(), "OK\n".into()));
    assert_eq!(server.get("/readyz").await.0, "HTTP/1.1 200 OK");
    assert_eq!(server.metric("pi0_requests_total{outcome=\"ok\"}").await, 3.0);
    assert_eq!(server.metric("pi0_connections").await, 1.0);
    assert!(server.get("/metrics").await.1.contains("pi0_stage_seconds_count{stage=\"inference\"} 3"));
    // Any other path is for websockets.
    assert!(server.get("/any").await.0.starts_with("HTTP/1.1 4"));
    drop(client);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn served_actions_are_those_of_the_model() {
    let server = start(settings(), None).await;
    let observation = with(aloha(3), "pi0/noise", noise(HORIZON, 3));
    let served = server.client().await.actions(&observation).await.numbers().unwrap();

    let direct = load(server.dir.path(), None);
    let images = ["cam_high", "cam_left_wrist", "cam_right_wrist"].iter().enumerate().map(|(i, name)| {
        let Value::Array(array) = image([3, 224, 224], 3 + i) else { panic!() };
        let pixels = pi0_policy::Pixels::U8(array.data);
        ((*name).to_owned(), pi0_policy::Image::array(pixels, [3, 224, 224]))
    });
    let mut prepared = direct
        .policy
        .preprocess(&pi0_policy::Observation {
            images: images.collect(),
            state: vec![0.03; 14],
            prompt: Some("Transfer cube".into()),
        })
        .unwrap();
    let Value::Array(given) = noise(HORIZON, 3) else { panic!() };
    prepared.inputs.noise = given.floats();
    let chunk = direct.model.sample_actions(&[prepared.inputs.clone()], &Default::default()).unwrap();
    let wanted = direct.policy.postprocess(&chunk[0].data, &prepared).unwrap().data;
    assert_eq!(served, wanted);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn mistakes_are_told_and_end_only_their_own_connection() {
    let server = start(settings(), None).await;
    let mut witness = server.client().await;
    let images = |value: Value| with(without(aloha(0), "images"), "images", value);
    let floats = |x: f64| {
        let data = vec![x; 3 * 4 * 4];
        Value::Array(NdArray::from_f64(vec![3, 4, 4], &data).unwrap())
    };
    let cases: Vec<(Value, &[&str])> = vec![
        (Value::Int(3), &["dictionary", "an integer"]),
        (Value::Map(Map::default()), &["`images`", "nothing"]),
        (without(aloha(0), "images"), &["lacks `images`", "`state`", "`prompt`"]),
        (without(aloha(0), "state"), &["lacks `state`", "`images`"]),
        (without(aloha(0), "prompt"), &["prompt"]),
        (images(Value::Int(1)), &["`images` is an integer"]),
        (images(Value::Map([("cam_higher", image([3, 4, 4], 0))].into())), &["cam_higher", "cam_high"]),
        (images(Value::Map([("cam_left_wrist", image([3, 4, 4], 0))].into())), &["cam_high"]),
        (images(Value::Map([("cam_high", image([4, 4, 3], 0))].into())), &["cam_high", "[4, 4, 3]"]),
        (images(Value::Map([("cam_high", Value::Nil)].into())), &["cam_high", "nothing", "wanted"]),
        (images(Value::Map([("cam_high", vector(&[0.0]))].into())), &["cam_high", "<f8 [1]"]),
        (images(Value::Map([("cam_high", floats(200.0))].into())), &["cam_high", "200"]),
        (with(without(aloha(0), "state"), "state", vector(&[0.0; 7])), &["`state` has 7 values", "14"]),
        (with(without(aloha(0), "state"), "state", vector(&[f64::NAN; 14])), &["NaN"]),
        (with(without(aloha(0), "state"), "state", text("x")), &["`state` is a string"]),
        (with(without(aloha(0), "prompt"), "prompt", Value::Int(1)), &["`prompt` is an integer"]),
        (with(aloha(0), "pi0/noise", noise(HORIZON - 1, 0)), &["pi0/noise", "12 x 32"]),
        (with(aloha(0), "pi0/noize", Value::Int(1)), &["pi0/noize"]),
        (with(aloha(0), "rtc/prev", Value::Int(1)), &["rtc/prev", "rtc/previous"]),
        (with(aloha(0), "rtc/delay", Value::Int(-1)), &["rtc/delay"]),
        (with(aloha(0), &format!("rtc/{}", "x\n".repeat(100_000)), Value::Nil), &["rtc/x\u{fffd}x", "…"]),
        (with(aloha(0), "rtc/schedule", text("cubic")), &["rtc/schedule", "linear"]),
        (with(aloha(0), "rtc/previous", vector(&[1.0])), &["rtc/previous", "[actions, width]"]),
        (with(aloha(0), "rtc/mode", text("both")), &["rtc/mode", "guided or trained"]),
    ];
    for (observation, words) in cases {
        refused(server.client().await.infer(&observation).await, words);
    }
    for message in [
        Message::Text("hello".into()),
        Message::Binary(bytes::Bytes::from_static(b"\xc1")),
        Message::Binary(bytes::Bytes::new()),
    ] {
        let mut client = server.client().await;
        client.send(message).await;
        refused(client.receive().await, &["message"]);
    }
    assert_eq!(witness.actions(&aloha(0)).await.shape, [HORIZON, 14]);
    assert_eq!(server.metric("pi0_requests_total{outcome=\"bad_request\"}").await, 27.0);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn unknown_keys_and_openpis_leniencies_pass() {
    let server = start(settings(), None).await;
    let mut client = server.client().await;
    let fixed = |o: Value| with(o, "pi0/noise", noise(HORIZON, 0));
    let wanted = client.actions(&fixed(aloha(0))).await;
    let bytes_prompt = Value::Binary(bytes::Bytes::from_static(b"Transfer cube"));
    let list = Value::List(vec![Value::Float(0.0); 14]);
    // Floats that `trunc(255 x)` takes back to the same bytes.
    let floats = |size: usize| {
        let Value::Map(map) = aloha(0) else { panic!() };
        let Some(Value::Map(images)) = map.get("images") else { panic!() };
        let images = images.iter().map(|(name, image)| {
            let Value::Array(array) = image else { panic!() };
            let values = array.data.iter().map(|&b| (f64::from(b) + 0.5) / 255.5);
            let (dtype, data) = match size {
                4 => (Dtype::F32, values.flat_map(|x| (x as f32).to_le_bytes()).collect()),
                _ => (Dtype::F64, values.flat_map(f64::to_le_bytes).collect()),
            };
            (name.to_owned(), Value::Array(NdArray::new(dtype, array.shape.clone(), data).unwrap()))
        });
        with(without(aloha(0), "images"), "images", Value::Map(Map(images.collect())))
    };
    for same in [
        with(aloha(0), "episode", Value::Int(4)),
        with(without(aloha(0), "prompt"), "prompt", bytes_prompt),
        with(without(aloha(0), "state"), "state", list),
        floats(4),
        floats(8),
    ] {
        assert_eq!(client.actions(&fixed(same)).await, wanted);
    }
    // cam_low is ignored; a wrist camera may be missing.
    let images = [("cam_high", image([3, 224, 224], 0)), ("cam_low", image([3, 9, 9], 0))];
    let fewer = with(without(aloha(0), "images"), "images", Value::Map(images.into()));
    assert_ne!(client.actions(&fixed(fewer)).await, wanted);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn pings_are_answered_and_leaving_is_noticed_during_inference() {
    let gate = Gate::default();
    let server = start(Settings { max_batch: 1, max_queue: 1, ..settings() }, Some(gate.hook())).await;
    gate.shut();
    let mut running = server.client().await;
    running.send(frame(&aloha(0))).await;
    gate.began(1).await;
    running.send(Message::Ping(bytes::Bytes::from_static(b"are you there"))).await;
    let pong = tokio::time::timeout(Duration::from_secs(30), running.socket.next()).await.unwrap();
    assert_eq!(pong.unwrap().unwrap(), Message::Pong(bytes::Bytes::from_static(b"are you there")));

    // One runs, one may wait. It leaves, and its place is free again.
    let mut waiting = server.client().await;
    waiting.send(frame(&aloha(0))).await;
    until(&server, QUEUE, 1.0).await;
    refused(server.client().await.infer(&aloha(0)).await, &["busy", "1 requests wait"]);
    drop(waiting);
    until(&server, "pi0_requests_total{outcome=\"cancelled\"}", 1.0).await;
    let mut next = server.client().await;
    next.send(frame(&aloha(0))).await;
    until(&server, "pi0_stage_seconds_count{stage=\"prepare\"}", 4.0).await;
    gate.open();
    assert!(matches!(running.receive().await, Reply::Actions(_)));
    assert!(matches!(next.receive().await, Reply::Actions(_)));
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_request_that_takes_too_long_is_refused() {
    let gate = Gate::default();
    let limits = Settings { request_timeout: Duration::from_secs(3), ..settings() };
    let server = start(limits, Some(gate.hook())).await;
    gate.shut();
    refused(server.client().await.infer(&aloha(0)).await, &["3.0 s"]);
    gate.open();
    // The next one is served, once the network is free.
    assert!(matches!(server.client().await.infer(&aloha(0)).await, Reply::Actions(_)));
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_panic_or_failure_of_the_network_hits_only_the_request_to_blame() {
    let gate = Gate::default();
    // The state tells which request is to blame.
    let hook: Hook = {
        let wait = gate.hook();
        Arc::new(move |batch| {
            wait(batch)?;
            if batch.iter().any(|inputs| inputs.state[0] > 10.0) {
                panic!("a defect");
            }
            match batch.iter().position(|inputs| inputs.state[0] < -10.0) {
                Some(row) => Err(ModelError::Input { row, what: "a fault".into() }),
                None => Ok(()),
            }
        })
    };
    let server = start(settings(), Some(hook)).await;
    let state = |x: f64| with(without(aloha(0), "state"), "state", vector(&[x; 14]));
    // The first request holds the network, so that the others meet in one batch.
    gate.shut();
    let mut first = server.client().await;
    first.send(frame(&state(0.0))).await;
    gate.began(1).await;
    let mut clients = Vec::new();
    for x in [0.1, 50.0, 0.2, -50.0] {
        let mut client = server.client().await;
        client.send(frame(&state(x))).await;
        clients.push((x, client));
    }
    until(&server, QUEUE, 4.0).await;
    gate.open();
    assert!(matches!(first.receive().await, Reply::Actions(_)));
    for (x, mut client) in clients {
        match (x, client.receive().await) {
            (50.0, reply) => refused(reply, &["internal error", "a defect"]),
            (-50.0, reply) => refused(reply, &["inference failed", "a fault"]),
            (_, reply) => assert!(matches!(reply, Reply::Actions(_)), "{x}: {reply:?}"),
        }
    }
    assert_eq!(server.metric("pi0_batch_size_count").await, 2.0);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn requests_that_meet_share_a_pass_and_get_their_own_results() {
    let gate = Gate::default();
    let server = start(Settings { max_batch: 4, ..settings() }, Some(gate.hook())).await;
    let observation = |i: usize| with(aloha(i), "pi0/noise", noise(HORIZON, i));
    let mut alone = Vec::new();
    for i in 0..6 {
        alone.push(server.client().await.actions(&observation(i)).await.numbers().unwrap());
    }
    gate.began(6).await;
    gate.shut();
    let mut clients = Vec::new();
    for i in 0..6 {
        let mut client = server.client().await;
        client.send(frame(&observation(i))).await;
        clients.push(client);
        if i == 0 {
            gate.began(7).await;
        }
    }
    until(&server, QUEUE, 5.0).await;
    gate.open();
    for (client, wanted) in clients.iter_mut().zip(&alone) {
        let Reply::Actions(reply) = client.receive().await else { panic!() };
        let got = actions(&reply).numbers().unwrap();
        let worst = got.iter().zip(wanted).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
        assert!(worst < 1e-4, "{worst}");
    }
    // Six alone, then the first of the others, then four, then one.
    gate.began(9).await;
    assert_eq!(server.metric("pi0_batch_size_bucket{le=\"3.0\"}").await, 8.0);
    assert_eq!(server.metric("pi0_batch_size_bucket{le=\"4.0\"}").await, 9.0);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn doors_keys_and_limits() {
    let keys = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(keys.path(), "secret\n").unwrap();
    let limits = Settings {
        api_key_file: Some(keys.path().into()),
        max_connections: 2,
        max_message_bytes: 1 << 20,
        ..settings()
    };
    let server = start(limits, None).await;
    for key in [None, Some("wrong")] {
        match Client::connect(server.address, key).await {
            Err(WsError::Http(response)) => assert_eq!(response.status(), 401),
            other => panic!("{:?}", other.map(|c| c.metadata)),
        }
    }
    assert_eq!(server.metric("pi0_connections_refused_total{reason=\"api_key\"}").await, 2.0);
    // Probes need no key.
    assert_eq!(server.get("/healthz").await.0, "HTTP/1.1 200 OK");

    let mut first = Client::connect(server.address, Some("secret")).await.unwrap();
    let second = Client::connect(server.address, Some("secret")).await.unwrap();
    match Client::connect(server.address, Some("secret")).await {
        Err(WsError::Http(response)) => assert_eq!(response.status(), 503),
        other => panic!("{:?}", other.map(|c| c.metadata)),
    }
    drop(second);
    until(&server, "pi0_connections", 1.0).await;
    let mut third = Client::connect(server.address, Some("secret")).await.unwrap();
    assert!(matches!(third.infer(&aloha(0)).await, Reply::Actions(_)));

    let large = Value::Binary(vec![0; (1 << 20) + 1].into());
    match first.infer(&large).await {
        Reply::Error(text, Some(close)) => {
            assert!(text.contains("too large: Message too long: 104"), "{text}");
            assert_eq!(u16::from(close.code), 1009);
            assert!(close.reason.starts_with("the observation is too large: "), "{}", close.reason);
        }
        // The client may still be sending when the server closes.
        Reply::Lost(_) => {}
        other => panic!("{other:?}"),
    }
    assert!(matches!(third.infer(&aloha(0)).await, Reply::Actions(_)));
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn metrics_tell_what_the_device_holds() {
    let server = start(settings(), None).await;
    let held = async || server.metric("pi0_device_memory_bytes").await;
    // Weights first: packed in the stored format with little padding, but for the embeddings, which stay in the file.
    let stored = std::fs::metadata(server.dir.path().join("model.safetensors")).unwrap().len() as f64;
    let weights = held().await;
    assert!(0.8 * stored < weights && weights < 3.0 * stored, "{weights} bytes for {stored} stored ones");
    // Then buffers too, as many as the largest batch needs, and no more of them for more of the same.
    let mut client = server.client().await;
    let mut after = Vec::new();
    for _ in 0..6 {
        client.actions(&aloha(0)).await;
        after.push(held().await);
    }
    assert!(after[0] > weights + 1e6, "{after:?}");
    assert_eq!(after[2], after[5], "{after:?}");
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_client_that_answers_no_ping_is_dropped() {
    let server = start(Settings { ping_interval: Duration::from_millis(100), ..settings() }, None).await;
    // A client that is polled answers pings and stays.
    let mut alive = server.client().await;
    let _silent = server.client().await;
    let alive = tokio::spawn(async move {
        let end = tokio::time::timeout(Duration::from_secs(1), async {
            while let Some(Ok(Message::Ping(_))) = alive.socket.next().await {
                // The library answers with the next write.
                alive.socket.flush().await.unwrap();
            }
        });
        assert!(end.await.is_err(), "dropped");
        alive
    });
    let mut alive = alive.await.unwrap();
    assert_eq!(server.metric("pi0_connections").await, 1.0);
    assert!(matches!(alive.infer(&aloha(0)).await, Reply::Actions(_)));
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_flood_of_pings_is_cut_off_and_delays_nobody() {
    let server = start(settings(), None).await;
    let mut client = server.client().await;
    let wanted = client.actions(&with(aloha(0), "pi0/noise", noise(HORIZON, 0))).await;
    // Reads none of the pongs, and never pauses.
    let mut stream = server.client().await.socket.into_inner();
    let pings = [&[0x89, 0x80 | 125][..], &[0; 4], &[7; 125]].concat().repeat(500);
    let flood = tokio::spawn(async move { while stream.write_all(&pings).await.is_ok() {} });
    tokio::time::timeout(Duration::from_secs(30), flood).await.expect("it goes on").unwrap();
    until(&server, "pi0_connections", 1.0).await;
    // So many pings as a careful client may send are welcome.
    for _ in 0..500 {
        client.send(Message::Ping(bytes::Bytes::new())).await;
    }
    assert_eq!(client.actions(&with(aloha(0), "pi0/noise", noise(HORIZON, 0))).await, wanted);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn stopping_loses_no_accepted_request() {
    let gate = Gate::default();
    let server = start(settings(), Some(gate.hook())).await;
    let mut idle = server.client().await;
    gate.shut();
    let mut clients = Vec::new();
    for i in 0..5 {
        let mut client = server.client().await;
        client.send(frame(&aloha(i))).await;
        clients.push(client);
        gate.began(1).await;
    }
    until(&server, QUEUE, 4.0).await;
    server.stop.cancel();
    let Reply::Closed(Some(close)) = idle.receive().await else { panic!() };
    assert_eq!(u16::from(close.code), 1001);
    // Nobody new comes in.
    let start = Instant::now();
    while TcpStream::connect(server.address).await.is_ok() {
        assert!(start.elapsed() < Duration::from_secs(5));
        tokio::time::sleep(Duration::from_millis(5)).await;
    }
    gate.open();
    for mut client in clients {
        assert!(matches!(client.receive().await, Reply::Actions(_)));
        let Reply::Closed(Some(close)) = client.receive().await else { panic!() };
        assert_eq!(u16::from(close.code), 1001);
    }
    server.task.await.unwrap().unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_chunk_can_continue_the_last_one() {
    let server = start(settings(), None).await;
    let mut client = server.client().await;
    let first = client.actions(&with(aloha(0), "pi0/noise", noise(HORIZON, 0))).await.numbers().unwrap();
    // Four actions of the chunk have been executed; two more will be while the next is computed.
    let tail = &first[4 * 14..];
    let previous = Value::Array(NdArray::from_f64(vec![HORIZON - 4, 14], tail).unwrap());
    let next = with(aloha(0), "pi0/noise", noise(HORIZON, 99));
    let free = client.actions(&next).await.numbers().unwrap();
    let guided = with(with(next.clone(), "rtc/previous", previous), "rtc/delay", Value::Int(2));
    let guided = client.actions(&guided).await.numbers().unwrap();
    let distance = |chunk: &[f64], rows: std::ops::Range<usize>| {
        let range = rows.start * 14..rows.end * 14;
        let squares = chunk[range.clone()].iter().zip(&tail[range]).map(|(a, b)| (a - b).powi(2));
        squares.sum::<f64>().sqrt()
    };
    let (before, after) = (distance(&free, 0..2), distance(&guided, 0..2));
    assert!(after < 0.1 * before, "the delay's actions are kept: {after} of {before}");
    assert!(distance(&guided, 2..6) < distance(&free, 2..6));
    // The first chunk of an episode has nothing to continue.
    let empty = Value::Array(NdArray::from_f64(vec![0, 14], &[]).unwrap());
    let none = client.actions(&with(next, "rtc/previous", empty)).await.numbers().unwrap();
    assert_eq!(none, free);
    server.end().await;
}

/// An observation for [`pi05_checkpoint`].
fn front(seed: usize) -> Value {
    Value::Map(Map::from([
        ("observation.images.front", image([30, 40, 3], seed)),
        ("observation.images.wrist", image([30, 40, 3], seed + 1)),
        ("observation.state", vector(&[0.1, -0.2, 0.3, -0.4, 0.5, -0.6, 0.7])),
        ("task", text("pick up the fork")),
    ]))
}

#[tokio::test(flavor = "multi_thread")]
async fn a_checkpoint_that_learned_it_continues_a_chunk_exactly() {
    let server = Running::start(pi05_checkpoint(), settings(), None).await;
    let mut client = server.client().await;
    let first = client.actions(&with(front(0), "pi0/noise", noise(10, 0))).await;
    assert_eq!(first.shape, [8, 6]);
    let first = first.numbers().unwrap();
    let tail = |from: usize| {
        let rows = 8 - from;
        Value::Array(NdArray::from_f64(vec![rows, 6], &first[from * 6..]).unwrap())
    };
    let next = with(front(1), "pi0/noise", noise(10, 9));
    let rtc = |from: usize, delay: i128| {
        with(with(next.clone(), "rtc/previous", tail(from)), "rtc/delay", Value::Int(delay))
    };
    let free = client.actions(&next).await.numbers().unwrap();
    // By default as it was trained: the delay's actions come back as they were.
    let trained = client.actions(&rtc(2, 3)).await.numbers().unwrap();
    let far = |a: &[f64], b: &[f64]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f64::max);
    // A dimension whose statistics are equal comes back to a millionth of itself.
    assert!(far(&trained[..18], &first[12..30]) < 1e-5, "{}", far(&trained[..18], &first[12..30]));
    assert!(far(&free[..18], &first[12..30]) > 0.01 && far(&trained[18..], &free[18..]) > 0.0);
    let named = client.actions(&with(rtc(2, 3), "rtc/mode", text("trained"))).await.numbers().unwrap();
    assert_eq!(named, trained);
    let guided = client.actions(&with(rtc(2, 3), "rtc/mode", text("guided"))).await.numbers().unwrap();
    assert_ne!(guided, trained);
    assert_eq!(client.actions(&rtc(2, 0)).await.numbers().unwrap(), free);
    for (observation, words) in [
        (rtc(0, 7), &["`rtc/delay` is 7", "at most 6", "guided"][..]),
        (rtc(6, 3), &["`rtc/previous` has 2 actions", "delay` of 3"]),
        (
            with(rtc(2, 3), "rtc/previous", Value::Array(NdArray::from_f64(vec![4, 7], &[0.0; 28]).unwrap())),
            &["6 values"],
        ),
        (
            with(
                rtc(2, 3),
                "rtc/previous",
                Value::Array(NdArray::from_f64(vec![4, 6], &[f64::NAN; 24]).unwrap()),
            ),
            &["NaN"],
        ),
        (
            with(
                without(front(0), "observation.state"),
                "observation.state",
                vector(&[0.0, f64::NAN, 0.0, 0.0, 0.0, 0.0, 0.0]),
            ),
            &["NaN"],
        ),
        (with(without(front(0), "task"), "task", text(&"pick up ".repeat(200))), &["would be cut off"]),
    ] {
        refused(server.client().await.infer(&observation).await, words);
    }
    server.end().await;

    // Another checkpoint did not learn it.
    let server = start(settings(), None).await;
    let previous = Value::Array(NdArray::from_f64(vec![2, 14], &[0.0; 28]).unwrap());
    let trained = with(with(aloha(0), "rtc/previous", previous), "rtc/mode", text("trained"));
    refused(server.client().await.infer(&trained).await, &["did not learn", "guided"]);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn keys_mean_what_the_checkpoints_renaming_makes_of_them() {
    let observation = |camera: &str, state: &str| {
        Value::Map(Map::from([
            (camera, image([24, 32, 3], 0)),
            (state, vector(&[0.1; 14])),
            ("task", text("fold")),
            ("pi0/noise", noise(16, 0)),
        ]))
    };
    let dir = tiny_copy("policy_preprocessor.json", |file| {
        file["steps"][0]["config"]["rename_map"] = serde_json::json!({
            "observation.qpos": "observation.state",
            "observation.images.top": "observation.images.base_0_rgb",
            "observation.images.side": "observation.images.nobody",
        });
    });
    let server = Running::start(dir, settings(), None).await;
    let mut client = server.client().await;
    let own = client.actions(&observation("observation.images.base_0_rgb", "observation.state")).await;
    for (camera, state) in
        [("observation.images.top", "observation.qpos"), ("top", "qpos"), ("base_0_rgb", "state")]
    {
        assert_eq!(client.actions(&observation(camera, state)).await, own, "{camera} {state}");
    }
    // A camera that the checkpoint drops is no reason to refuse the others.
    let both = with(observation("top", "state"), "observation.images.side", image([24, 32, 3], 7));
    assert_eq!(client.actions(&both).await, own);
    for (observation, words) in [
        (
            observation("observation.images.base_0_rbg", "state"),
            &["unknown camera `observation.images.base_0_rbg`"][..],
        ),
        (
            with(observation("top", "state"), "base_1_rgb", image([24, 32, 3], 7)),
            &["unknown camera `base_1_rgb`"],
        ),
        (
            observation("observation.images.side", "state"),
            &["of the images given, `observation.images.side`, none"],
        ),
        (
            with(observation("top", "state"), "observation.qpos", vector(&[0.1; 14])),
            &["given twice, as `state` and as"],
        ),
        (without(observation("top", "state"), "state"), &["lacks `state`"]),
    ] {
        refused(server.client().await.infer(&observation).await, words);
    }
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn what_was_recorded_replays_without_a_difference() {
    let recordings = tempfile::tempdir().unwrap();
    let server = start(Settings { record: Some(recordings.path().into()), ..settings() }, None).await;
    let mut client = server.client().await;
    for i in 0..3 {
        client.actions(&aloha(i)).await;
    }
    refused(client.infer(&without(aloha(0), "state")).await, &["state"]);
    assert_eq!(server.metric("pi0_recordings_lost_total").await, 0.0);
    let dir = server.dir.clone();
    server.end().await;

    let replay = |dir: &std::path::Path| {
        let mut all = Vec::new();
        let limits = settings().doctor;
        pi0_server::replay(load(dir, None), recordings.path(), None, limits, |r| all.push(r.clone()))
            .unwrap();
        all
    };
    let verdicts: Vec<Verdict> = replay(dir.path()).into_iter().map(|r| r.verdict).collect();
    assert_eq!(verdicts[..3], [const { Verdict::Actions { max_abs: 0.0 } }; 3]);
    assert!(matches!(&verdicts[3], Verdict::SameFailure(text) if text.contains("`state`")));

    // Another model gives other actions, and that is seen.
    std::fs::remove_dir_all(dir.path().join("assets")).unwrap();
    let other = openpi_checkpoint(Robot::Aloha, HORIZON + 1);
    let changed = replay(other.path());
    assert!(matches!(&changed[0].verdict, Verdict::Changed { then, .. } if then.contains("12")));
}
