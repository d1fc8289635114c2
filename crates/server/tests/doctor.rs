//! What the doctor says, as clients, operators and viewers see it.

mod common;

use common::checkpoint::openpi_checkpoint;
use common::*;
use pi0_doctor::Kind;
use pi0_policy::Robot;
use pi0_server::{Dtype, Examiner, Map, NdArray, Settings, Value, document, recordings};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;

const HORIZON: usize = 12;

async fn start(settings: Settings) -> Running {
    Running::start(openpi_checkpoint(Robot::Aloha, HORIZON), settings, None).await
}

/// An observation whose first camera is black.
fn black(seed: usize) -> Value {
    let Value::Map(mut map) = aloha(seed) else { panic!() };
    let images = map.0.iter_mut().find(|(key, _)| key == "images");
    let Some((_, Value::Map(images))) = images else { panic!() };
    let dark = NdArray::new(Dtype::U8, vec![3, 224, 224], vec![0; 3 * 224 * 224].into()).unwrap();
    images.0[0].1 = Value::Array(dark);
    Value::Map(map)
}

fn warnings(reply: &Map) -> Vec<(String, i128)> {
    let Some(Value::List(list)) = reply.get("pi0/warnings") else { return Vec::new() };
    let warning = |value: &Value| {
        let Value::Map(map) = value else { panic!("{value:?}") };
        let (Some(Value::Text(kind)), Some(Value::Int(count))) = (map.get("kind"), map.get("count")) else {
            panic!("{map:?}")
        };
        for key in ["subject", "text", "remedy"] {
            assert!(matches!(map.get(key), Some(Value::Text(text)) if !text.is_empty()), "{key} of {map:?}");
        }
        (kind.clone(), *count)
    };
    list.iter().map(warning).collect()
}

async fn infer(client: &mut Client, observation: &Value) -> Map {
    match client.infer(observation).await {
        Reply::Actions(reply) => reply,
        other => panic!("{other:?}"),
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_black_camera_is_told_and_counted() {
    let server = start(settings()).await;
    let mut client = server.client().await;
    let good = infer(&mut client, &aloha(1)).await;
    assert!(good.get("pi0/warnings").is_none(), "{good:?}");
    for count in 1..=3 {
        let reply = infer(&mut client, &black(count)).await;
        assert_eq!(warnings(&reply), [("image_black".to_owned(), count as i128)]);
        assert_eq!(actions(&reply).shape, [HORIZON, 14]);
    }
    assert_eq!(server.metric("pi0_warnings_total{kind=\"image_black\"}").await, 3.0);
    // Another robot has a history of its own.
    let mut other = server.client().await;
    assert_eq!(warnings(&infer(&mut other, &black(9)).await), [("image_black".to_owned(), 1)]);
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn strict_kinds_are_errors_and_others_are_not() {
    let strict = vec![Kind::ImageBlack, Kind::ActionsOutside];
    let server = start(Settings { strict, ..settings() }).await;
    let mut client = server.client().await;
    infer(&mut client, &aloha(1)).await;
    let Reply::Error(text, Some(close)) = client.infer(&black(1)).await else { panic!() };
    assert!(text.contains("--strict") && text.contains("image_black") && text.contains("cam_high"), "{text}");
    assert_eq!(u16::from(close.code), 1011);
    assert_eq!(server.metric("pi0_requests_total{outcome=\"strict\"}").await, 1.0);
    // An empty prompt is only a warning here.
    let mut client = server.client().await;
    let reply = infer(&mut client, &with(without(aloha(1), "prompt"), "prompt", text_value(" "))).await;
    assert_eq!(warnings(&reply), [("prompt_empty".to_owned(), 1)]);
    // What the network returns for this noise is far outside: the robot does not get it.
    let wild: Vec<u8> = (0..HORIZON * 32).flat_map(|_| 1000f32.to_le_bytes()).collect();
    let wild = NdArray::new(Dtype::F32, vec![HORIZON, 32], wild.into()).unwrap();
    let reply = client.infer(&with(aloha(2), "pi0/noise", Value::Array(wild))).await;
    let Reply::Error(text, _) = reply else { panic!("{reply:?}") };
    assert!(text.contains("actions_outside"), "{text}");
    server.end().await;
}

fn text_value(text: &str) -> Value {
    Value::Text(text.to_owned())
}

/// `GET path` with headers: the head, and the body's first bytes up to `until`.
async fn get(server: &Running, path: &str, headers: &str, until: &str) -> (String, String) {
    let mut stream = TcpStream::connect(server.address).await.unwrap();
    stream.write_all(format!("GET {path} HTTP/1.1\r\nHost: x\r\n{headers}\r\n").as_bytes()).await.unwrap();
    let (mut bytes, mut buffer) = (Vec::new(), [0; 4096]);
    loop {
        let n = stream.read(&mut buffer).await.unwrap();
        bytes.extend_from_slice(&buffer[..n]);
        let text = String::from_utf8_lossy(&bytes);
        if let Some((head, body)) = text.split_once("\r\n\r\n")
            && (n == 0 || body.contains(until))
        {
            return (head.to_owned(), body.to_owned());
        }
        assert!(n > 0, "{text}");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_needs_no_key_but_its_data_do() {
    let keys = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(keys.path(), "secret\n").unwrap();
    let server = start(Settings { api_key_file: Some(keys.path().into()), ..settings() }).await;
    let (head, body) = get(&server, "/", "", "</html>").await;
    assert!(head.starts_with("HTTP/1.1 200") && head.contains("text/html"), "{head}");
    assert!(head.to_lowercase().contains("content-security-policy: default-src 'none'"), "{head}");
    assert!(body.contains("what the policy sees"));
    for headers in ["", "Authorization: Api-Key wrong\r\n"] {
        let (head, body) = get(&server, "/live", headers, "key").await;
        assert!(head.starts_with("HTTP/1.1 401") && !body.contains("robots"), "{head} {body}");
    }
    let (head, body) = get(&server, "/live", "Authorization: Api-Key secret\r\n", "\n\n").await;
    assert!(head.starts_with("HTTP/1.1 200") && head.contains("text/event-stream"), "{head}");
    assert!(body.contains("event: view") && body.contains("\"robots\":[]"), "{body}");
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_viewer_hears_of_the_robot_and_gets_its_pictures() {
    let server = start(settings()).await;
    let mut client = server.client().await;
    let markup = "<img src=x onerror=alert(1)>";
    let observation = |seed| with(without(black(seed), "prompt"), "prompt", text_value(markup));
    infer(&mut client, &observation(1)).await;
    let looking = tokio::spawn({
        let address = server.address;
        async move {
            let mut stream = TcpStream::connect(address).await.unwrap();
            stream.write_all(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
            let (mut bytes, mut buffer) = (Vec::new(), vec![0; 1 << 16]);
            while !bytes.windows(16).any(|window| window == b"event: pictures\n")
                || !bytes.ends_with(b"\n\n\r\n")
            {
                let n = stream.read(&mut buffer).await.unwrap();
                assert!(n > 0);
                bytes.extend_from_slice(&buffer[..n]);
            }
            String::from_utf8(bytes).unwrap()
        }
    });
    // Pictures are kept from the moment on that somebody looks.
    let mut seed = 2;
    while !looking.is_finished() {
        infer(&mut client, &observation(seed)).await;
        seed += 1;
        tokio::time::sleep(std::time::Duration::from_millis(50)).await;
    }
    let text = looking.await.unwrap();
    let view = text.lines().find_map(|line| line.strip_prefix("data: {\"connected\"")).unwrap();
    let view: serde_json::Value = serde_json::from_str(&format!("{{\"connected\"{view}")).unwrap();
    assert_eq!(view["view"]["prompt"], markup);
    assert_eq!(view["view"]["findings"][0]["kind"], "image_black");
    assert_eq!(view["view"]["chunk"]["actions"].as_array().unwrap().len(), HORIZON);
    assert_eq!(view["view"]["state"].as_array().unwrap().len(), 14);
    assert_eq!(view["robots"][0]["id"], 1);
    assert!(text.contains("data:image/png;base64,"));
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn viewers_have_places_and_the_page_can_be_off() {
    let server = start(Settings { max_viewers: 1, ..settings() }).await;
    let mut first = TcpStream::connect(server.address).await.unwrap();
    first.write_all(b"GET /live HTTP/1.1\r\nHost: x\r\n\r\n").await.unwrap();
    let mut buffer = [0; 64];
    let n = first.read(&mut buffer).await.unwrap();
    assert!(n > 0);
    assert!(server.get("/live").await.0.contains("503"));
    // Whoever leaves makes room, once the server notices.
    drop(first);
    let begin = std::time::Instant::now();
    loop {
        let (head, _) = get(&server, "/live", "", "\n").await;
        if head.contains("200") {
            break;
        }
        assert!(begin.elapsed() < std::time::Duration::from_secs(20), "{head}");
        tokio::time::sleep(std::time::Duration::from_millis(100)).await;
    }
    server.end().await;

    let server = start(Settings { page: false, ..settings() }).await;
    for path in ["/", "/live"] {
        assert!(server.get(path).await.0.starts_with("HTTP/1.1 4"), "{path}");
    }
    // Websockets take any path, with the page and without it.
    server.client().await.actions(&aloha(1)).await;
    server.end().await;
}

#[tokio::test(flavor = "multi_thread")]
async fn websockets_still_take_the_paths_of_the_page() {
    let server = start(settings()).await;
    for path in ["/", "/live"] {
        let upgrade = "Connection: Upgrade\r\nUpgrade: websocket\r\nSec-WebSocket-Version: 13\r\n\
                       Sec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n";
        let (head, _) = get(&server, path, upgrade, "").await;
        assert!(head.starts_with("HTTP/1.1 101"), "{path}: {head}");
    }
    server.end().await;
}

/// A recording says what the server said, and its file holds no markup of a robot's.
#[tokio::test(flavor = "multi_thread")]
async fn recordings_are_examined_as_they_were_served() {
    let kept = tempfile::tempdir().unwrap();
    let server = start(Settings { record: Some(kept.path().into()), ..settings() }).await;
    let dir = server.dir.clone();
    let (mut a, mut b) = (server.client().await, server.client().await);
    let mut said = Vec::new();
    for seed in 1..4 {
        said.push(warnings(&infer(&mut a, &aloha(seed)).await));
        let tag = with(without(black(seed), "prompt"), "prompt", text_value("</script><b>hi"));
        said.push(warnings(&infer(&mut b, &tag).await));
    }
    assert!(matches!(a.infer(&without(aloha(5), "state")).await, Reply::Error(..)));
    server.end().await;
    let served = load(dir.path(), None);
    let config = served.model.config();
    let limits = settings().doctor;
    let mut examiner = Examiner::new(served.policy, config, limits);
    let mut views = Vec::new();
    for (i, (_, path)) in recordings(kept.path()).unwrap().iter().enumerate() {
        let examined = examiner.open(path).unwrap();
        let found: Vec<_> =
            examined.findings.iter().map(|f| (f.kind.name().to_owned(), f.count.into())).collect();
        match said.get(i) {
            Some(said) => assert_eq!(&found, said, "recording {i}"),
            None => assert_eq!(found, [("refused".to_owned(), 1)]),
        }
        views.extend(examined.view_with_pictures());
    }
    assert_eq!(views.len(), 6);
    assert!(views.iter().all(|view| view.pictures.iter().all(|picture| picture.src.is_some())));
    let page = document("recordings", &views);
    assert!(!page.contains("</script><b>") && page.contains("\\u003c/script\\u003e\\u003cb\\u003ehi"));
}
