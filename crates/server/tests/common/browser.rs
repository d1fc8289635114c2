//! Chromium over its DevTools protocol: what a test of a page needs, no more.

use std::io::{BufRead, BufReader};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use futures_util::{SinkExt, StreamExt};
use serde_json::{Value, json};
use tokio::net::TcpStream;
use tokio_tungstenite::tungstenite::Message;
use tokio_tungstenite::tungstenite::protocol::WebSocketConfig;
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async_with_config};

/// How long something on the page may take on a machine that does other things too.
pub const PATIENCE: Duration = Duration::from_secs(120);

/// A page in a browser of its own.
pub struct Browser {
    process: Child,
    socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    session: String,
    next: u64,
    /// Errors of scripts and the console.
    pub complaints: Vec<String>,
    _profile: tempfile::TempDir,
}

impl Browser {
    /// Starts the browser of `PI0_CHROMIUM`, or says that the test is skipped.
    pub async fn start() -> Option<Self> {
        let Ok(program) = std::env::var("PI0_CHROMIUM") else {
            eprintln!("skipped: set PI0_CHROMIUM to a Chromium, such as PI0_CHROMIUM=chromium");
            return None;
        };
        let profile = tempfile::tempdir().unwrap();
        let mut process = Command::new(program)
            .args(["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0"])
            .args(["--disable-dev-shm-usage", "--force-color-profile=srgb", "--no-first-run", "--mute-audio"])
            .arg(format!("--user-data-dir={}", profile.path().display()))
            .arg("about:blank")
            .stderr(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .expect("PI0_CHROMIUM must start");
        let stderr = BufReader::new(process.stderr.take().unwrap());
        let mut lines = stderr.lines().map_while(Result::ok);
        let address = lines
            .find_map(|line| line.strip_prefix("DevTools listening on ").map(str::to_owned))
            .expect("the address of DevTools");
        // What it prints later must not fill the pipe.
        std::thread::spawn(move || lines.for_each(drop));
        let config = WebSocketConfig::default().max_message_size(None).max_frame_size(None);
        let (socket, _) = connect_async_with_config(address, Some(config), true).await.unwrap();
        let (session, next, complaints) = (String::new(), 1, Vec::new());
        let mut browser = Self { process, socket, session, next, complaints, _profile: profile };
        let target = browser.call("Target.createTarget", json!({"url": "about:blank"})).await;
        let attach = json!({"targetId": target["targetId"], "flatten": true});
        let attached = browser.call("Target.attachToTarget", attach).await;
        browser.session = attached["sessionId"].as_str().unwrap().to_owned();
        for domain in ["Page", "Runtime", "Log", "Network"] {
            browser.call(&format!("{domain}.enable"), json!({})).await;
        }
        Some(browser)
    }

    /// Calls a method and waits for its result.
    pub async fn call(&mut self, method: &str, params: Value) -> Value {
        let id = self.next;
        self.next += 1;
        let mut message = json!({"id": id, "method": method, "params": params});
        if !self.session.is_empty() {
            message["sessionId"] = json!(self.session);
        }
        self.socket.send(Message::Text(message.to_string().into())).await.unwrap();
        loop {
            let Some(Ok(Message::Text(text))) = self.socket.next().await else {
                panic!("the browser has gone")
            };
            let mut message: Value = serde_json::from_str(&text).unwrap();
            if message["id"] == id {
                assert!(message["error"].is_null(), "{method}: {message}");
                return message["result"].take();
            }
            match message["method"].as_str() {
                Some("Runtime.exceptionThrown") => self.complaints.push(message["params"].to_string()),
                // A browser also remarks on its own slowness; what is wrong with a page is a warning or an error.
                Some("Log.entryAdded")
                    if message["params"]["entry"]["source"] != "network"
                        && ["warning", "error"].iter().any(|l| message["params"]["entry"]["level"] == *l) =>
                {
                    self.complaints.push(message["params"]["entry"].to_string());
                }
                _ => {}
            }
        }
    }

    /// Opens an address.
    pub async fn open(&mut self, url: &str) {
        self.call("Page.navigate", json!({"url": url})).await;
        self.until("document.readyState === 'complete'").await;
    }

    /// The value of an expression.
    pub async fn value(&mut self, script: &str) -> Value {
        let params = json!({"expression": script, "returnByValue": true, "awaitPromise": true});
        let mut result = self.call("Runtime.evaluate", params).await;
        assert!(result["exceptionDetails"].is_null(), "{script}: {}", result["exceptionDetails"]);
        result["result"]["value"].take()
    }

    /// Waits until an expression is true.
    pub async fn until(&mut self, script: &str) {
        let start = Instant::now();
        while self.value(script).await != true {
            if start.elapsed() > PATIENCE {
                let text = self.value("document.body.innerText").await;
                panic!("never true: {script}\n{text}");
            }
            tokio::time::sleep(Duration::from_millis(50)).await;
        }
    }

    /// The size of the window in CSS pixels, and its colours.
    pub async fn dress(&mut self, width: u32, height: u32, scheme: &str) {
        let size = json!({"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600});
        self.call("Emulation.setDeviceMetricsOverride", size).await;
        let feature = json!({"features": [{"name": "prefers-color-scheme", "value": scheme}]});
        self.call("Emulation.setEmulatedMedia", feature).await;
    }

    /// Presses a key.
    pub async fn press(&mut self, key: &str) {
        for kind in ["keyDown", "keyUp"] {
            let code = match key {
                "Tab" => 9,
                "Enter" => 13,
                "ArrowRight" => 39,
                "ArrowDown" => 40,
                _ => 0,
            };
            let text = if key == "Enter" && kind == "keyDown" { json!("\r") } else { json!(null) };
            let mut event = json!({"type": kind, "key": key, "code": key, "windowsVirtualKeyCode": code});
            if !text.is_null() {
                event["text"] = text;
            }
            self.call("Input.dispatchKeyEvent", event).await;
        }
    }

    /// Writes a PNG of the whole page into `PI0_SCREENSHOTS`, where that is set.
    pub async fn photograph(&mut self, name: &str) {
        let Ok(dir) = std::env::var("PI0_SCREENSHOTS") else { return };
        let params = json!({"format": "png", "captureBeyondViewport": true});
        let shot = self.call("Page.captureScreenshot", params).await;
        use base64::Engine as _;
        let png = base64::prelude::BASE64_STANDARD.decode(shot["data"].as_str().unwrap()).unwrap();
        std::fs::write(Path::new(&dir).join(format!("{name}.png")), png).unwrap();
    }

    /// Bytes that scripts hold after collecting garbage, and nodes of all documents.
    pub async fn held(&mut self) -> (f64, u64) {
        self.call("HeapProfiler.enable", json!({})).await;
        for _ in 0..3 {
            self.call("HeapProfiler.collectGarbage", json!({})).await;
        }
        let heap = self.call("Runtime.getHeapUsage", json!({})).await;
        let counters = self.call("Memory.getDOMCounters", json!({})).await;
        (heap["usedSize"].as_f64().unwrap(), counters["nodes"].as_u64().unwrap())
    }
}

impl Drop for Browser {
    fn drop(&mut self) {
        let _ = self.process.kill();
        let _ = self.process.wait();
    }
}
