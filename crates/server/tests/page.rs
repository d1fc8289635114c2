//! The page in a real browser: `PI0_CHROMIUM=chromium cargo test -p pi0-server --test page`. With
//! `PI0_SCREENSHOTS=DIR` pictures of it are kept; `PI0_UPDATES=500` looks for leaks over as many updates.

mod common;

use std::time::{Duration, Instant};

use common::browser::{Browser, PATIENCE};
use common::checkpoint::openpi_checkpoint;
use common::*;
use pi0_policy::{Image, Observation, Pixels, Robot};
use pi0_server::{NdArray, Settings, Value};
use serde_json::json;

const HORIZON: usize = 12;
const PROMPT: &str = "</script><img src=x onerror=\"window.pwned=1\"><b id=bold>Transfer</b> & cube";

/// An ALOHA that moves, with two cameras; the first 48 x 64, so that it gets bars.
fn observation(step: usize) -> Value {
    let wave = |i: usize| 0.5 + 0.3 * (step as f64 / 7.0 + i as f64).sin();
    let state: Vec<f64> = (0..14).map(wave).collect();
    let images = [("cam_high", [3, 48, 64]), ("cam_left_wrist", [3, 64, 64])];
    let images =
        images.iter().enumerate().map(|(i, (name, shape))| ((*name).to_owned(), photo(*shape, step + i)));
    Value::Map(pi0_server::Map::from([
        ("state", vector(&state)),
        ("images", Value::Map(pi0_server::Map(images.collect()))),
        ("prompt", text(PROMPT)),
    ]))
}

fn bytes(shape: [usize; 3], step: usize) -> Vec<u8> {
    let [_, height, width] = shape;
    let place = (0..3).flat_map(|c| (0..height).flat_map(move |y| (0..width).map(move |x| (c, y, x))));
    place.map(|(c, y, x)| ((x * 4 + step * 3) ^ (y * 3) ^ (c * 90)) as u8).collect()
}

fn photo(shape: [usize; 3], step: usize) -> Value {
    let data = bytes(shape, step).into();
    Value::Array(NdArray::new(pi0_server::Dtype::U8, shape.to_vec(), data).unwrap())
}

/// The network's picture of a camera, as bytes: what the page must show.
fn network_picture(server: &Running, camera: usize, step: usize) -> Vec<u8> {
    let policy = load(server.dir.path(), None).policy;
    let image = |shape, step| Image::array(Pixels::U8(bytes(shape, step).into()), shape);
    let observation = Observation {
        images: vec![
            ("cam_high".into(), image([3, 48, 64], step)),
            ("cam_left_wrist".into(), image([3, 64, 64], step + 1)),
        ],
        state: vec![0.5; 14],
        prompt: Some("x".into()),
    };
    let prepared = policy.preprocess(&observation).unwrap();
    let planes = prepared.inputs.images[camera].as_ref().unwrap();
    let n = planes.len() / 3;
    (0..3 * n).map(|i| ((planes[i % 3 * n + i / 3] + 1.0) * 127.5).round() as u8).collect()
}

/// The pixels of the page's picture of a camera; none while there is no picture.
async fn shown(browser: &mut Browser, camera: usize) -> Vec<u8> {
    let script = format!(
        "(async () => {{ const img = document.querySelectorAll('#pictures figure')[{camera}].firstChild;
          if (!img.getAttribute('src')) return [];
          await img.decode().catch(() => 0);
          const c = document.createElement('canvas'); c.width = img.naturalWidth; c.height = img.naturalHeight;
          const g = c.getContext('2d'); g.drawImage(img, 0, 0);
          return Array.from(g.getImageData(0, 0, c.width, c.height).data); }})()"
    );
    let rgba = browser.value(&script).await;
    let rgba: Vec<u8> = rgba.as_array().unwrap().iter().map(|x| x.as_u64().unwrap() as u8).collect();
    rgba.chunks_exact(4).flat_map(|pixel| pixel[..3].to_vec()).collect()
}

async fn start(settings: Settings) -> Running {
    Running::start(openpi_checkpoint(Robot::Aloha, HORIZON), settings, None).await
}

async fn enter_key(browser: &mut Browser, key: &str) {
    browser.until("!document.getElementById('door').hidden").await;
    assert_eq!(browser.value("document.activeElement.id").await, "key");
    browser.call("Input.insertText", json!({"text": key})).await;
    browser.press("Enter").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn the_page_in_a_browser() {
    let Some(mut browser) = Browser::start().await else { return };
    let keys = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(keys.path(), "secret\n").unwrap();
    // A robot of this test answers no pings while the test looks at the page.
    let quiet = Duration::from_secs(3600);
    let settings = || Settings { api_key_file: Some(keys.path().into()), ping_interval: quiet, ..settings() };
    let mut server = start(settings()).await;
    let address = server.address;
    browser.dress(1280, 900, "light").await;
    browser.open(&format!("http://{address}/")).await;

    // Without a key, and with a wrong one, nothing is shown.
    enter_key(&mut browser, "wrong").await;
    browser.until("document.getElementById('refusal').textContent.includes('not accepted')").await;
    assert_eq!(browser.value("document.getElementById('main').hidden").await, true);
    assert_eq!(browser.value("document.getElementById('state').children.length").await, 0);
    enter_key(&mut browser, "secret").await;
    browser.until("!document.getElementById('main').hidden").await;

    // The right pictures: what the network gets, to the bit, bars and all.
    let mut robot = Client::connect(address, Some("secret")).await.unwrap();
    let step = std::cell::Cell::new(0);
    let act = async |robot: &mut Client| {
        robot.actions(&observation(step.get())).await;
        step.replace(step.get() + 1)
    };
    act(&mut robot).await;
    browser.until("document.querySelectorAll('#pictures figure').length === 3").await;
    // Pictures come from the first request after the viewer's arrival on, at most five a second.
    tokio::time::sleep(Duration::from_millis(400)).await;
    let last = act(&mut robot).await;
    browser
        .until(&format!("document.getElementById('request').textContent === ', request {}'", last + 1))
        .await;
    for camera in [0, 1] {
        // The picture comes behind the numbers, and after those of requests before.
        let (start, wanted) = (Instant::now(), network_picture(&server, camera, last));
        loop {
            let got = shown(&mut browser, camera).await;
            let differing = got.iter().zip(&wanted).filter(|(a, b)| a != b).count();
            if got.len() == wanted.len() && differing == 0 {
                break;
            }
            let (n, all) = (got.len(), wanted.len());
            assert!(start.elapsed() < PATIENCE, "camera {camera}: {n} samples of {all}, {differing} differ");
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }
    assert_eq!(browser.value("document.querySelectorAll('#pictures .masked:not([hidden])').length").await, 1);

    // What the robot sent is text.
    assert_eq!(browser.value("document.getElementById('prompt').textContent").await, PROMPT);
    assert_eq!(browser.value("document.querySelectorAll('#prompt *, #bold').length").await, 0);
    assert_eq!(browser.value("window.pwned === undefined").await, true);

    // State, chunk and latency are there, and change.
    assert_eq!(browser.value("document.querySelectorAll('#state tr').length").await, 14);
    assert_eq!(browser.value("document.querySelectorAll('#chunk figure').length").await, 14);
    let first = browser.value("document.getElementById('state').innerText").await;
    let last = act(&mut robot).await;
    browser
        .until(&format!("document.getElementById('request').textContent === ', request {}'", last + 1))
        .await;
    assert_ne!(browser.value("document.getElementById('state').innerText").await, first);
    let polylines = "document.querySelectorAll('#chunk figure polyline').length >= 28";
    assert_eq!(browser.value(polylines).await, true);

    // A finding is shown in words. The same observation four times:
    for _ in 0..5 {
        robot.actions(&observation(last)).await;
    }
    browser.until("document.getElementById('findings').textContent.includes('same observation again')").await;
    assert_eq!(browser.value("document.getElementById('healthy').hidden").await, true);
    browser.photograph("light").await;
    browser.dress(1280, 900, "dark").await;
    browser.photograph("dark").await;
    let ground = browser.value("getComputedStyle(document.body).backgroundColor").await;
    assert_eq!(ground, "rgb(17, 22, 29)");

    // On a phone nothing is wider than the screen.
    browser.dress(390, 844, "light").await;
    browser.photograph("phone").await;
    assert_eq!(browser.value("document.documentElement.scrollWidth <= 390").await, true);
    browser.dress(320, 640, "dark").await;
    browser.photograph("phone-dark").await;
    assert_eq!(browser.value("document.documentElement.scrollWidth <= 320").await, true);
    browser.dress(1280, 900, "light").await;

    // A second robot; keys of the keyboard choose it, and updates do not take the focus away.
    let mut second = Client::connect(address, Some("secret")).await.unwrap();
    second.actions(&observation(100)).await;
    browser.until("document.querySelectorAll('#robots input').length === 2").await;
    browser.value("document.querySelector('#robots input').focus()").await;
    browser.press("ArrowDown").await;
    browser.until("document.querySelectorAll('#robots input')[1].checked").await;
    browser.until("document.getElementById('request').textContent === ', request 1'").await;
    assert_eq!(
        browser.value("document.activeElement === document.querySelectorAll('#robots input')[1]").await,
        true
    );
    // What a screen reader is told: every control and picture has a name.
    let tree = browser.call("Accessibility.getFullAXTree", json!({})).await;
    let nameless: Vec<_> = tree["nodes"]
        .as_array()
        .unwrap()
        .iter()
        .filter(|node| {
            let role = node["role"]["value"].as_str().unwrap_or_default();
            ["radio", "radiogroup", "button", "img", "image", "region", "slider", "textbox"].contains(&role)
                && node["ignored"] == false
                && node["name"]["value"].as_str().is_none_or(str::is_empty)
        })
        .collect();
    assert!(nameless.is_empty(), "{nameless:#?}");
    drop(second);
    browser.until("document.querySelectorAll('#robots input').length === 1").await;

    // It outlives the server.
    let dir = server.dir.clone();
    server.end().await;
    browser.until("document.getElementById('status').textContent.includes('connection lost')").await;
    server = {
        let kept = openpi_checkpoint(Robot::Aloha, HORIZON);
        drop(dir);
        Running::start(kept, Settings { port: address.port(), ..settings() }, None).await
    };
    let mut robot = Client::connect(address, Some("secret")).await.unwrap();
    act(&mut robot).await;
    browser.until("document.getElementById('request').textContent === ', request 1'").await;

    // Nothing is kept of what was shown before.
    let wanted = amount("PI0_UPDATES", 20) as u64;
    let updates = async |browser: &mut Browser| {
        browser.value("Number(document.body.dataset.updates)").await.as_u64().unwrap()
    };
    let begin = updates(&mut browser).await;
    let mut early = None;
    let (mut done, mut moved) = (0, Instant::now());
    while done < wanted {
        act(&mut robot).await;
        tokio::time::sleep(Duration::from_millis(50)).await;
        let now = updates(&mut browser).await - begin;
        if now > done {
            (done, moved) = (now, Instant::now());
        }
        assert!(moved.elapsed() < PATIENCE, "no update after the {done}th");
        if early.is_none() && done >= wanted / 10 {
            early = Some(browser.held().await);
        }
    }
    let ((heap, nodes), (late_heap, late_nodes)) = (early.unwrap(), browser.held().await);
    eprintln!("{wanted} updates: heap {heap:.0} to {late_heap:.0} bytes, nodes {nodes} to {late_nodes}");
    assert!(late_heap < heap + 2e6, "heap grew from {heap} to {late_heap}");
    assert!(late_nodes < nodes + 400, "nodes grew from {nodes} to {late_nodes}");
    assert!(browser.complaints.is_empty(), "{:#?}", browser.complaints);
    server.end().await;
}

/// A file of observations works without a server, from the keyboard too.
#[tokio::test(flavor = "multi_thread")]
async fn a_file_in_a_browser() {
    let Some(mut browser) = Browser::start().await else { return };
    let kept = tempfile::tempdir().unwrap();
    let server = start(Settings { record: Some(kept.path().into()), ..settings() }).await;
    let dir = server.dir.clone();
    let mut robot = server.client().await;
    for step in 0..5 {
        robot.actions(&observation(step)).await;
    }
    let wanted = network_picture(&server, 0, 1);
    drop(robot);
    server.end().await;
    let served = load(dir.path(), None);
    let config = served.model.config();
    let limits = settings().doctor;
    let mut examiner = pi0_server::Examiner::new(served.policy, config, limits);
    let recordings = pi0_server::recordings(kept.path()).unwrap();
    let views: Vec<_> =
        recordings.iter().filter_map(|(_, path)| examiner.open(path).unwrap().view_with_pictures()).collect();
    let file = kept.path().join("page.html");
    std::fs::write(&file, pi0_server::document("a <recording>", &views)).unwrap();
    browser.dress(1280, 900, "light").await;
    browser.open(&format!("file://{}", file.display())).await;
    browser.until("document.getElementById('place').textContent === '1 of 5'").await;
    browser.value("document.getElementById('step').focus()").await;
    browser.press("ArrowRight").await;
    browser.until("document.getElementById('place').textContent === '2 of 5'").await;
    browser.until("document.querySelector('#pictures img').complete").await;
    assert_eq!(shown(&mut browser, 0).await, wanted);
    assert_eq!(browser.value("document.getElementById('title').textContent").await, "a <recording>");
    assert_eq!(browser.value("document.getElementById('prompt').textContent").await, PROMPT);
    assert_eq!(browser.value("window.pwned === undefined").await, true);
    browser.photograph("file").await;
    assert!(browser.complaints.is_empty(), "{:#?}", browser.complaints);
}
