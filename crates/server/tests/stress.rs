//! Load and malice. Quick by default; the full amounts, whose results stand in `docs/serving.md`, by environment:
//! `PI0_SOAK=50000`, `PI0_FUZZ=100000`, `PI0_OVERHEAD=1000`.

mod common;

use std::collections::BTreeMap;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use common::checkpoint::openpi_checkpoint;
use common::*;
use pi0_policy::Robot;
use pi0_server::{Map, Settings, Value, encode};
use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};
use tokio_tungstenite::tungstenite::Message;

const HORIZON: usize = 10;

/// One test at a time: they measure the process.
static ALONE: tokio::sync::Mutex<()> = tokio::sync::Mutex::const_new(());

async fn start(settings: Settings) -> Running {
    Running::start(openpi_checkpoint(Robot::Aloha, HORIZON), settings, None).await
}

/// Resident memory of this process, server and clients alike, in MiB.
async fn resident(server: &Running) -> f64 {
    server.metric("process_resident_memory_bytes").await / f64::from(1 << 20)
}

fn median(mut values: Vec<f64>) -> [f64; 3] {
    values.sort_by(f64::total_cmp);
    [values.len() / 2, values.len() * 99 / 100, values.len() - 1].map(|i| values[i])
}

/// An ALOHA with so many cameras.
fn cameras(count: usize, seed: usize) -> Value {
    let Value::Map(map) = aloha(seed) else { panic!() };
    let Some(Value::Map(images)) = map.get("images") else { panic!() };
    let images = Value::Map(Map(images.0[..count].to_vec()));
    with(without(Value::Map(map), "images"), "images", images)
}

#[tokio::test(flavor = "multi_thread")]
async fn overhead() {
    let _alone = ALONE.lock().await;
    let requests = amount("PI0_OVERHEAD", 30);
    let server = start(settings()).await;
    let mut client = server.client().await;
    let frame = Bytes::from(encode(&aloha(1)));
    let (mut overheads, mut models, mut last) = (Vec::new(), Vec::new(), None);
    for i in 0..requests + 10 {
        client.send(Message::Binary(frame.clone())).await;
        let Reply::Actions(reply) = client.receive().await else { panic!() };
        let part = |key, inner| match reply.get(key) {
            Some(Value::Map(map)) => map.get(inner).and_then(Value::number),
            _ => None,
        };
        // From receive to send, told with the next reply.
        let total = part("server_timing", "prev_total_ms");
        if let (Some(total), Some(model), true) = (total, last, i > 10) {
            overheads.push(total - model);
            models.push(model);
        }
        last = part("policy_timing", "infer_ms");
    }
    let [middle, p99, worst] = median(overheads);
    println!(
        "overhead of {} requests, three cameras of 224x224 ({} bytes): median {middle:.3} ms, p99 {p99:.3} ms, \
         max {worst:.3} ms; network {:.3} ms",
        models.len(),
        frame.len(),
        median(models)[0]
    );
    if std::env::var_os("PI0_OVERHEAD").is_some() {
        assert!(middle < 1.0, "the target is 1 ms");
    }
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn soak() {
    let _alone = ALONE.lock().await;
    const CLIENTS: usize = 32;
    let requests = amount("PI0_SOAK", 64);
    // One step of the network's ten: the server is tried here, and shall have much to do.
    let server = start(Settings { steps: Some(1), ..settings() }).await;
    let done = Arc::new(AtomicUsize::new(0));
    let began = Instant::now();
    let mut clients = Vec::new();
    for c in 0..CLIENTS {
        let (mut client, done) = (server.client().await, done.clone());
        clients.push(tokio::spawn(async move {
            let frame = Bytes::from(encode(&cameras(1 + c % 3, c)));
            let mut times = Vec::new();
            while done.fetch_add(1, Ordering::SeqCst) < requests {
                let sent = Instant::now();
                client.send(Message::Binary(frame.clone())).await;
                let Reply::Actions(reply) = client.receive().await else { panic!("an error") };
                assert_eq!(actions(&reply).shape, [HORIZON, 14]);
                times.push(sent.elapsed().as_secs_f64() * 1e3);
            }
            times
        }));
    }
    // The first fifth warms up.
    while done.load(Ordering::SeqCst) < requests / 5 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let warm = resident(&server).await;
    let mut times = Vec::new();
    for client in clients {
        times.extend(client.await.unwrap());
    }
    let (seconds, end) = (began.elapsed().as_secs_f64(), resident(&server).await);
    let [middle, p99, worst] = median(times);
    let batches = server.metric("pi0_batch_size_count").await;
    println!(
        "soak: {requests} requests of {CLIENTS} clients in {seconds:.1} s ({:.0}/s, {:.2} a batch), latency median \
         {middle:.1} ms, p99 {p99:.1} ms, max {worst:.1} ms; resident {warm:.1} MiB warm, {end:.1} MiB at the end",
        requests as f64 / seconds,
        requests as f64 / batches
    );
    assert_eq!(server.metric("pi0_requests_total{outcome=\"ok\"}").await, requests as f64);
    if std::env::var_os("PI0_SOAK").is_some() {
        assert!(end < warm + 32.0, "memory grew from {warm} to {end} MiB");
    }
    server.end().await;
}

/// A good message, damaged.
fn damage(good: &[u8], random: &mut ChaCha8Rng) -> Vec<u8> {
    let mut below = |n: usize| (random.next_u64() % n.max(1) as u64) as usize;
    let mut frame = good.to_vec();
    // What is not an image is at the ends: that is where most damage goes.
    let place = |n: usize, end: usize| match n % 3 {
        0 => end % good.len(),
        1 => end % 200,
        _ => good.len() - 1 - end % 200,
    };
    match below(6) {
        0 => frame.truncate(below(good.len())),
        1 => {
            for _ in 0..=below(4) {
                let at = place(below(3), below(usize::MAX));
                frame[at] = below(256) as u8;
            }
        }
        2 => {
            let at = place(below(3), below(usize::MAX));
            frame[at] ^= 1 << below(8);
        }
        3 => {
            let at = place(below(3), below(usize::MAX));
            frame.splice(at..at, (0..=below(9)).map(|i| (i * 0x51) as u8 | 0x80));
        }
        4 => {
            let at = place(below(3), below(usize::MAX));
            frame.drain(at..(at + 1 + below(16)).min(good.len()));
        }
        _ => frame = (0..below(300)).map(|_| below(256) as u8).collect(),
    }
    frame
}

#[tokio::test(flavor = "multi_thread")]
async fn fuzz() {
    let _alone = ALONE.lock().await;
    const CLIENTS: usize = 8;
    let frames = amount("PI0_FUZZ", 300);
    let server = Arc::new(start(Settings { steps: Some(1), ..settings() }).await);
    let stop = Arc::new(AtomicBool::new(false));

    // Somebody with good requests all the while.
    let witness = tokio::spawn({
        let (server, stop) = (server.clone(), stop.clone());
        async move {
            let mut client = server.client().await;
            let observation = with(cameras(1, 0), "pi0/noise", noise(HORIZON, 0));
            let wanted = client.actions(&observation).await;
            let mut served = 0;
            while !stop.load(Ordering::SeqCst) {
                assert_eq!(client.actions(&observation).await, wanted);
                served += 1;
                tokio::time::sleep(Duration::from_millis(20)).await;
            }
            served
        }
    });

    let done = Arc::new(AtomicUsize::new(0));
    let mut senders = Vec::new();
    for c in 0..CLIENTS {
        let (server, done) = (server.clone(), done.clone());
        senders.push(tokio::spawn(async move {
            // Small images keep most of a message structure.
            let images = [("cam_high", image([3, 6, 8], c)), ("cam_left_wrist", image([3, 5, 5], c))];
            let small = with(without(aloha(c), "images"), "images", Value::Map(images.into()));
            let small = with(small, "rtc/delay", Value::Int(2));
            let tail = pi0_server::NdArray::from_f64(vec![4, 14], &[0.1; 56]).unwrap();
            let good = encode(&with(small, "rtc/previous", Value::Array(tail)));
            let mut random = ChaCha8Rng::seed_from_u64(c as u64);
            let mut outcomes = BTreeMap::<&str, usize>::new();
            let mut client = None;
            while done.fetch_add(1, Ordering::SeqCst) < frames {
                let mut connected = match client.take() {
                    Some(client) => client,
                    None => server.client().await,
                };
                connected.send(Message::Binary(damage(&good, &mut random).into())).await;
                let outcome = match connected.receive().await {
                    Reply::Actions(_) => {
                        client = Some(connected);
                        "harmless"
                    }
                    Reply::Error(text, Some(_)) => {
                        assert!(!text.contains("internal error"), "{text}");
                        "refused"
                    }
                    other => panic!("{other:?}"),
                };
                *outcomes.entry(outcome).or_default() += 1;
            }
            outcomes
        }));
    }
    while done.load(Ordering::SeqCst) < frames / 5 {
        tokio::time::sleep(Duration::from_millis(20)).await;
    }
    let warm = resident(&server).await;
    let mut outcomes = BTreeMap::<&str, usize>::new();
    for sender in senders {
        for (outcome, count) in sender.await.unwrap() {
            *outcomes.entry(outcome).or_default() += count;
        }
    }
    stop.store(true, Ordering::SeqCst);
    let served = witness.await.unwrap();
    let end = resident(&server).await;
    println!(
        "fuzz: {frames} damaged messages, {outcomes:?}; meanwhile {served} good requests served; resident {warm:.1} \
         MiB warm, {end:.1} MiB at the end"
    );
    assert_eq!(outcomes.values().sum::<usize>(), frames);
    assert_eq!(server.metric("pi0_requests_total{outcome=\"panic\"}").await, 0.0);
    if std::env::var_os("PI0_FUZZ").is_some() {
        assert!(end < warm + 32.0, "memory grew from {warm} to {end} MiB");
    }
    assert!(served > 0);
    Arc::into_inner(server).unwrap().end().await;
}
