//! A server in this process, its client, and observations to send.
#![allow(dead_code)] // each test file uses its share

pub mod browser;
pub mod checkpoint;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use futures_util::{SinkExt, StreamExt};
use pi0_cpu::{Cpu, CpuOptions};
use pi0_device::{HostTensor, MemoryMeter};
use pi0_model::{ActionModel, Checkpoint, Config, Extent, Inputs, ModelError, Pi0, SampleOptions};
use pi0_policy::{Policy, PolicyOptions};
use pi0_server::{
    Bound, CancellationToken, Dtype, Limits, Map, NdArray, ServeError, Served, Settings, Value, decode,
    encode,
};
use tempfile::TempDir;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::TcpStream;
use tokio::task::JoinHandle;
use tokio_tungstenite::tungstenite::protocol::{CloseFrame, WebSocketConfig};
use tokio_tungstenite::tungstenite::{Error as WsError, Message, client::IntoClientRequest};
use tokio_tungstenite::{MaybeTlsStream, WebSocketStream, connect_async_with_config};

/// What a test does before each call of the real network: wait, panic, fail, count.
pub type Hook = Arc<dyn Fn(&[Inputs]) -> Result<(), ModelError> + Send + Sync>;

/// The real network with a test's hook in front.
struct Hooked {
    model: Pi0<Cpu>,
    hook: Option<Hook>,
}

impl ActionModel for Hooked {
    fn config(&self) -> &Config {
        self.model.config()
    }

    fn sample_actions(
        &self,
        batch: &[Inputs],
        options: &SampleOptions,
    ) -> Result<Vec<HostTensor>, ModelError> {
        if let Some(hook) = &self.hook {
            hook(batch)?;
        }
        self.model.sample_actions(batch, options)
    }

    fn memory(&self) -> Option<MemoryMeter> {
        self.model.memory()
    }
}

/// Loads a checkpoint on the host, as `pi0 serve` does.
pub fn load(dir: &Path, hook: Option<Hook>) -> Served {
    let checkpoint = Checkpoint::open(dir).unwrap();
    let policy = Policy::load(dir, (&checkpoint.config).into(), &PolicyOptions::default()).unwrap();
    // One thread: tests run beside each other, and the tiny network gains nothing from more.
    let device = Cpu::new(CpuOptions { threads: Some(1), ..CpuOptions::default() }).unwrap();
    let model = Pi0::load(device, checkpoint, Extent::Cache, &|_| ()).unwrap();
    Served { model: Box::new(Hooked { model, hook }), policy }
}

/// A running server.
pub struct Running {
    pub address: std::net::SocketAddr,
    pub stop: CancellationToken,
    pub task: JoinHandle<Result<(), ServeError<String>>>,
    pub dir: Arc<TempDir>,
}

/// Settings for tests: this machine only, a free port, a fixed seed.
pub fn settings() -> Settings {
    // Tests share their machine: that an answer took long says nothing.
    let doctor = pi0_doctor::Thresholds { control_hz: Some(1e-3), ..Default::default() };
    Settings { host: "127.0.0.1".parse().unwrap(), port: 0, seed: Some(7), doctor, ..Settings::default() }
}

impl Running {
    /// Starts a server and waits until it listens.
    pub async fn start(dir: TempDir, settings: Settings, hook: Option<Hook>) -> Self {
        let bound = Bound::new(settings).unwrap();
        let (address, stop, dir) = (bound.address(), CancellationToken::new(), Arc::new(dir));
        let load = {
            let dir = dir.clone();
            move || Ok(load(dir.path(), hook))
        };
        let task = tokio::spawn(bound.serve(load, stop.clone()));
        while TcpStream::connect(address).await.is_err() {
            tokio::time::sleep(Duration::from_millis(10)).await;
        }
        Self { address, stop, task, dir }
    }

    pub async fn client(&self) -> Client {
        Client::connect(self.address, None).await.unwrap()
    }

    /// `GET path`: status line and body.
    pub async fn get(&self, path: &str) -> (String, String) {
        let mut stream = TcpStream::connect(self.address).await.unwrap();
        let request = format!("GET {path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
        stream.write_all(request.as_bytes()).await.unwrap();
        let mut text = String::new();
        stream.read_to_string(&mut text).await.unwrap();
        let (head, body) = text.split_once("\r\n\r\n").unwrap();
        (head.lines().next().unwrap().to_owned(), body.to_owned())
    }

    /// The value of a metric, 0 when it is not there.
    pub async fn metric(&self, name: &str) -> f64 {
        value(&self.get("/metrics").await.1, name)
    }

    /// Stops the server; all must end well.
    pub async fn end(self) {
        self.stop.cancel();
        self.task.await.unwrap().unwrap();
    }
}

/// The value of a metric in the text of all, 0 when it is not there.
pub fn value(metrics: &str, name: &str) -> f64 {
    let line = metrics.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(' '));
    line.map_or(0.0, |value| value.parse().unwrap())
}

/// A client, careful to see what happens on the wire.
pub struct Client {
    pub socket: WebSocketStream<MaybeTlsStream<TcpStream>>,
    pub metadata: Bytes,
}

/// What a client gets for a request.
#[derive(Debug)]
pub enum Reply {
    Actions(Map),
    /// The text and the close frame behind it.
    Error(String, Option<CloseFrame>),
    Closed(Option<CloseFrame>),
    Lost(WsError),
}

impl Client {
    pub async fn connect(address: std::net::SocketAddr, key: Option<&str>) -> Result<Self, WsError> {
        let mut request = format!("ws://{address}/any/path").into_client_request()?;
        if let Some(key) = key {
            let value = format!("Api-Key {key}").parse().unwrap();
            request.headers_mut().insert("Authorization", value);
        }
        let config = WebSocketConfig::default().max_message_size(None).max_frame_size(None);
        let (mut socket, _) = connect_async_with_config(request, Some(config), true).await?;
        match socket.next().await {
            Some(Ok(Message::Binary(metadata))) => Ok(Self { socket, metadata }),
            other => panic!("metadata wanted, got {other:?}"),
        }
    }

    pub async fn send(&mut self, message: Message) {
        // A server that has closed already answers with that.
        let _ = self.socket.send(message).await;
    }

    pub async fn receive(&mut self) -> Reply {
        let mut text = None;
        loop {
            match (self.socket.next().await, text.take()) {
                (Some(Ok(Message::Binary(frame))), None) => {
                    let Value::Map(map) = decode(&frame, Limits::default()).unwrap() else { panic!() };
                    return Reply::Actions(map);
                }
                (Some(Ok(Message::Text(error))), None) => text = Some(error.to_string()),
                (Some(Ok(Message::Close(frame))), None) => return Reply::Closed(frame),
                (Some(Ok(Message::Close(frame))), Some(error)) => return Reply::Error(error, frame),
                (Some(Ok(Message::Ping(_) | Message::Pong(_))), kept) => text = kept,
                (Some(Err(error)), None) => return Reply::Lost(error),
                (None, None) => return Reply::Closed(None),
                other => panic!("{other:?}"),
            }
        }
    }

    pub async fn infer(&mut self, observation: &Value) -> Reply {
        self.send(Message::Binary(encode(observation).into())).await;
        self.receive().await
    }

    /// The actions, which must come.
    pub async fn actions(&mut self, observation: &Value) -> NdArray {
        match self.infer(observation).await {
            Reply::Actions(map) => actions(&map),
            other => panic!("{other:?}"),
        }
    }
}

/// The actions of a reply.
pub fn actions(reply: &Map) -> NdArray {
    let Some(Value::Array(array)) = reply.get("actions") else { panic!("{reply:?}") };
    assert_eq!(array.dtype, Dtype::F64);
    array.clone()
}

/// An image of bytes that differ from place to place.
pub fn image(shape: [usize; 3], seed: usize) -> Value {
    let data = (0..shape.iter().product()).map(|i: usize| (i.wrapping_mul(31) / 7 + seed) as u8).collect();
    Value::Array(NdArray::new(Dtype::U8, shape.to_vec(), data).unwrap())
}

pub fn vector(values: &[f64]) -> Value {
    Value::Array(NdArray::from_f64(vec![values.len()], values).unwrap())
}

pub fn text(text: &str) -> Value {
    Value::Text(text.to_owned())
}

/// What an ALOHA with three cameras sends.
pub fn aloha(seed: usize) -> Value {
    let cameras = ["cam_high", "cam_left_wrist", "cam_right_wrist"];
    let images =
        cameras.iter().enumerate().map(|(i, name)| ((*name).to_owned(), image([3, 224, 224], seed + i)));
    Value::Map(Map::from([
        ("state", vector(&[0.01 * seed as f64; 14])),
        ("images", Value::Map(Map(images.collect()))),
        ("prompt", text("Transfer cube")),
    ]))
}

/// The same with one more key.
pub fn with(observation: Value, key: &str, value: Value) -> Value {
    let Value::Map(mut map) = observation else { panic!() };
    map.0.push((key.to_owned(), value));
    Value::Map(map)
}

/// The same without a key.
pub fn without(observation: Value, key: &str) -> Value {
    let Value::Map(mut map) = observation else { panic!() };
    map.0.retain(|(name, _)| name != key);
    Value::Map(map)
}

/// Noise for a request, so that its actions are known.
pub fn noise(horizon: usize, seed: usize) -> Value {
    let values: Vec<u8> =
        (0..horizon * 32).flat_map(|i| (((i * 37 + seed) as f32).sin()).to_le_bytes()).collect();
    Value::Array(NdArray::new(Dtype::F32, vec![horizon, 32], values.into()).unwrap())
}

/// How often to do something, from the environment; the default is quick.
pub fn amount(variable: &str, default: usize) -> usize {
    match std::env::var(variable) {
        Ok(text) => text.parse().expect("a number"),
        Err(_) => {
            eprintln!("{default} only; set {variable} for more");
            default
        }
    }
}
