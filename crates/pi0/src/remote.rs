//! A policy elsewhere, behind openpi's websocket protocol, as the demo's actor.

use std::net::{TcpStream, ToSocketAddrs};
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, Result, anyhow, bail};
use pi0_demo::actor::{Actor, action};
use pi0_demo::episode::View;
use pi0_demo::{Action, Error};
use pi0_server::{Dtype, Limits, Map, NdArray, Value, decode, encode};
use tungstenite::client::IntoClientRequest;
use tungstenite::handshake::client::Request;
use tungstenite::{HandshakeError, Message, WebSocket};

/// How long a server may take to accept a connection.
const CONNECT: Duration = Duration::from_secs(10);
/// How long it may take to answer an observation.
const ANSWER: Duration = Duration::from_secs(180);
/// Most connections at once, one for each robot that waits; a server with this many batches them.
const CONNECTIONS: usize = 8;

/// A server's address and the connections to it.
pub struct Remote {
    url: String,
    key: Option<String>,
    sockets: Vec<WebSocket<TcpStream>>,
}

impl Remote {
    /// Connects to `ws://host:port` and waits for the server's greeting.
    pub fn connect(url: &str, key_file: Option<&Path>) -> Result<Self> {
        let read = |path: &Path| {
            let text =
                std::fs::read_to_string(path).with_context(|| format!("cannot read {}", path.display()))?;
            let key = text.lines().map(str::trim).find(|line| !line.is_empty() && !line.starts_with('#'));
            key.map(str::to_owned).with_context(|| format!("{} holds no key", path.display()))
        };
        let key = key_file.map(read).transpose()?;
        let sockets = vec![open(url, key.as_deref())?];
        Ok(Self { url: url.to_owned(), key, sockets })
    }

    /// As many connections as this many robots need.
    fn reserve(&mut self, robots: usize) -> Result<(), String> {
        while self.sockets.len() < robots.min(CONNECTIONS) {
            self.sockets.push(open(&self.url, self.key.as_deref()).map_err(|e| format!("{e:#}"))?);
        }
        Ok(())
    }
}

impl Actor for Remote {
    /// The server draws its own noise, so the seed goes nowhere.
    fn act(&mut self, views: &[View], _seed: u64) -> pi0_demo::Result<Vec<Vec<Action>>> {
        self.reserve(views.len()).map_err(Error::Remote)?;
        let mut chunks = Vec::new();
        for views in views.chunks(self.sockets.len().max(1)) {
            for (socket, view) in self.sockets.iter_mut().zip(views) {
                send(socket, view).map_err(Error::Remote)?;
            }
            for (socket, _) in self.sockets.iter_mut().zip(views) {
                chunks.push(chunk(&receive(socket).map_err(Error::Remote)?).map_err(Error::Remote)?);
            }
        }
        Ok(chunks)
    }
}

fn open(url: &str, key: Option<&str>) -> Result<WebSocket<TcpStream>> {
    let wanted = "name the server as ws://HOST:PORT";
    let mut request = url.into_client_request().with_context(|| format!("{url}: {wanted}"))?;
    if request.uri().scheme_str() != Some("ws") {
        bail!("{url}: {wanted}; encryption belongs to a proxy in front of it");
    }
    let host = request.uri().host().with_context(|| format!("{url}: {wanted}"))?;
    let (host, port) = (host.trim_matches(['[', ']']).to_owned(), request.uri().port_u16().unwrap_or(8000));
    if let Some(key) = key {
        let value =
            format!("Api-Key {key}").parse().context("the API key has characters that no header may have")?;
        request.headers_mut().insert("authorization", value);
    }
    let stream = dial(&host, port).with_context(|| {
        format!("cannot reach {url}; start the server there with `pi0 serve models/demo --port {port}`")
    })?;
    stream.set_read_timeout(Some(CONNECT))?;
    stream.set_nodelay(true)?;
    let mut socket = greet(request, stream).with_context(|| format!("{url} is no policy server"))?;
    socket.get_ref().set_read_timeout(Some(ANSWER))?;
    receive(&mut socket).map_err(|why| anyhow!("{url}: {why}"))?;
    Ok(socket)
}

fn dial(host: &str, port: u16) -> std::io::Result<TcpStream> {
    let mut last = std::io::Error::other("this name has no address");
    for address in (host, port).to_socket_addrs()? {
        match TcpStream::connect_timeout(&address, CONNECT) {
            Ok(stream) => return Ok(stream),
            Err(why) => last = why,
        }
    }
    Err(last)
}

fn greet(request: Request, stream: TcpStream) -> Result<WebSocket<TcpStream>> {
    match tungstenite::client(request, stream) {
        Ok((socket, _)) => Ok(socket),
        Err(HandshakeError::Failure(tungstenite::Error::Http(reply))) if reply.status() == 401 => {
            bail!("it wants an API key: --api-key-file FILE")
        }
        Err(HandshakeError::Failure(why)) => Err(why.into()),
        Err(HandshakeError::Interrupted(_)) => bail!("it did not answer in {} s", CONNECT.as_secs()),
    }
}

/// Sends what openpi's client would.
fn send(socket: &mut WebSocket<TcpStream>, view: &View) -> Result<(), String> {
    let mut images = Vec::new();
    for (eye, frame) in &view.images {
        let shape = vec![frame.height, frame.width, 3];
        let array = NdArray::new(Dtype::U8, shape, frame.rgb.clone().into())?;
        images.push((eye.key().to_owned(), Value::Array(array)));
    }
    let state = NdArray::from_f64(vec![view.state.len()], &view.state.map(f64::from))?;
    let observation = Value::Map(Map::from([
        ("images", Value::Map(Map(images))),
        ("state", Value::Array(state)),
        ("prompt", Value::Text(view.prompt.clone())),
    ]));
    socket.send(Message::Binary(encode(&observation).into())).map_err(|e| e.to_string())
}

/// The next message; a text is the server's complaint.
fn receive(socket: &mut WebSocket<TcpStream>) -> Result<Value, String> {
    loop {
        match socket.read().map_err(|e| e.to_string())? {
            Message::Binary(frame) => return decode(&frame, Limits::default()).map_err(|e| e.to_string()),
            Message::Text(text) => return Err(text.trim().to_owned()),
            Message::Close(_) => return Err("it closed the connection".into()),
            _ => {}
        }
    }
}

/// The actions of a reply.
fn chunk(reply: &Value) -> Result<Vec<Action>, String> {
    let Value::Map(map) = reply else { return Err(format!("it answered {}", reply.describe())) };
    let Some(Value::Array(array)) = map.get("actions") else {
        return Err("its answer has no actions".into());
    };
    let (Some(values), &[_, width]) = (array.numbers(), array.shape.as_slice()) else {
        return Err(format!("its actions are an array of {} {:?}", array.dtype, array.shape));
    };
    values.chunks_exact(width.max(1)).map(|row| action(row).map_err(|e| e.to_string())).collect()
}
