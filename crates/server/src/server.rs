//! The listener: websockets on any path, `/healthz`, `/readyz`, `/metrics`, the page at `/`; start and end of it all.

use std::future::Future;
use std::net::SocketAddr;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use axum::extract::{ConnectInfo, FromRequestParts, Request, State, WebSocketUpgrade};
use axum::http::{StatusCode, header};
use axum::response::{IntoResponse, Response};
use axum::routing::get;
use bytes::Bytes;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use pi0_doctor::{Doctor, Profile};
use pi0_model::ActionModel;
use pi0_policy::{Policy, Summary};
use tokio::net::{TcpListener, TcpSocket, TcpStream};
use tokio::runtime::Runtime;
use tokio::sync::Semaphore;
use tokio_util::sync::CancellationToken;
use tokio_util::task::TaskTracker;
use tower::Service as _;
use tracing::Instrument;

use crate::auth::ApiKeys;
use crate::connection::Connection;
use crate::encode::encode;
use crate::engine::{self, EngineOptions};
use crate::metrics::Metrics;
use crate::page::{Board, live, page};
use crate::queue::Queue;
use crate::record::Recorder;
use crate::service::Service;
use crate::translator::Translator;
use crate::value::{Map, Value};
use crate::{Error, Settings};

/// A model with its policy, ready to serve. Made in the thread that will run it, so it need not be `Send`.
pub struct Served {
    /// The network.
    pub model: Box<dyn ActionModel>,
    /// What is around it.
    pub policy: Policy,
}

/// An address that is taken but not yet listened on: clients are refused, and openpi's client waits and retries.
pub struct Bound {
    socket: TcpSocket,
    address: SocketAddr,
    settings: Settings,
    keys: ApiKeys,
    recorder: Option<Recorder>,
}

impl Bound {
    /// Checks the settings, reads the API keys and takes the address: what can fail fails before the model loads.
    ///
    /// # Errors
    /// A setting makes no sense, a file cannot be used, or the address is taken.
    pub fn new(settings: Settings) -> Result<Self, Error> {
        settings.check()?;
        let keys = settings.api_key_file.as_deref().map(ApiKeys::open).transpose()?.unwrap_or_default();
        let recorder = settings.record.as_deref().map(|dir| Recorder::open(dir, settings.record_max_bytes));
        let recorder = recorder.transpose()?;
        let wanted = SocketAddr::new(settings.host, settings.port);
        let bind = || {
            let socket = if wanted.is_ipv4() { TcpSocket::new_v4() } else { TcpSocket::new_v6() }?;
            socket.set_reuseaddr(true)?;
            socket.bind(wanted)?;
            let address = socket.local_addr()?;
            Ok((socket, address))
        };
        let (socket, address) = bind().map_err(|why| Error::Listen { address: wanted, why })?;
        Ok(Self { socket, address, settings, keys, recorder })
    }

    /// The address, with the port that was found.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Serves until `stop` is cancelled, then finishes what was accepted. `load` runs in the thread that will own
    /// the model; its error, as text, is returned as [`Error::File`] of the model.
    ///
    /// # Errors
    /// The model does not load, the system refuses, or requests outlasted the time to stop.
    pub async fn serve<E>(
        self,
        load: impl FnOnce() -> Result<Served, E> + Send + 'static,
        stop: CancellationToken,
    ) -> Result<(), ServeError<E>>
    where
        E: Send + 'static,
    {
        let (loaded, wait) = tokio::sync::oneshot::channel();
        let Self { socket, address, settings, keys, recorder } = self;
        let engine = {
            let (settings, stop) = (settings.clone(), stop.clone());
            std::thread::Builder::new().name("inference".into()).spawn(move || {
                own_model(load, loaded, &settings, recorder, stop);
            })
        };
        let engine = engine.map_err(Error::System)?;
        let (service, summary) = match wait.await {
            Ok(Ok(ready)) => ready,
            Ok(Err(error)) => return Err(ServeError::Load(error)),
            Err(_) => return Err(ServeError::LoadPanicked),
        };
        let listen = |why| Error::Listen { address, why };
        let listener = socket.listen(1024).map_err(listen)?;
        tracing::info!(%address, robot = summary.robot.map(tracing::field::display), "listening");

        let front = Arc::new(Front {
            metadata: encode(&metadata(&summary)).into(),
            places: Arc::new(Semaphore::new(settings.max_connections)),
            clients: TaskTracker::new(),
            stop,
            service,
            keys,
            settings,
        });
        accept(listener, &front).await;
        let late = front.finish().await;
        front.service.queue.close();
        // Once all jobs are answered it ends at once; one that hangs is left behind.
        let broken = (late == 0 || engine.is_finished()) && {
            let joined = tokio::task::spawn_blocking(move || engine.join()).await;
            !matches!(joined, Ok(Ok(())))
        };
        if let Some(recorder) = &front.service.recorder {
            recorder.close();
        }
        let metrics = &front.service.metrics;
        tracing::info!(accepted = metrics.accepted.get(), finished = metrics.finished(), "stopped");
        match late {
            _ if broken => Err(Error::Engine.into()),
            0 => Ok(()),
            n => Err(Error::CutOff(n).into()),
        }
    }
}

/// Why serving failed.
#[derive(Debug, thiserror::Error)]
pub enum ServeError<E> {
    /// The model did not load.
    #[error("{0}")]
    Load(E),
    /// Loading panicked; the panic was printed.
    #[error("loading the model failed")]
    LoadPanicked,
    /// Everything else.
    #[error(transparent)]
    Server(#[from] Error),
}

type Ready<E> = Result<(Arc<Service>, Summary), E>;

/// The body of the inference thread.
fn own_model<E>(
    load: impl FnOnce() -> Result<Served, E>,
    loaded: tokio::sync::oneshot::Sender<Ready<E>>,
    settings: &Settings,
    recorder: Option<Recorder>,
    stop: CancellationToken,
) {
    let Served { model, policy } = match load() {
        Ok(served) => served,
        Err(error) => return drop(loaded.send(Err(error))),
    };
    let summary = policy.summary();
    let service = Arc::new(Service {
        doctor: Doctor::new(Profile::of(&policy), settings.doctor),
        strict: settings.strict.clone(),
        board: Board::new(settings.max_viewers),
        translator: Translator::new(policy, model.config(), settings.limits()),
        queue: Queue::new(settings.max_queue),
        metrics: Metrics::new(model.memory(), recorder.as_ref().map(Recorder::lost)),
        recorder,
        request_timeout: settings.request_timeout,
        workers: Arc::new(Semaphore::new(cores())),
    });
    let options = EngineOptions {
        max_batch: settings.max_batch,
        steps: settings.steps,
        seed: settings.seed.unwrap_or_else(chance),
    };
    // A server without its network is of no use: should this thread break, the process ends and may be restarted.
    let _last = (stop.drop_guard(), Abandoning(service.clone()));
    if loaded.send(Ok((service.clone(), summary))).is_ok() {
        engine::run(&*model, &service.queue, options, &service.metrics);
    }
}

/// Empties the queue when dropped, so that nobody waits for a network that is gone.
struct Abandoning(Arc<Service>);

impl Drop for Abandoning {
    fn drop(&mut self) {
        self.0.queue.abandon();
    }
}

/// A number that differs from start to start.
fn chance() -> u64 {
    use std::hash::{BuildHasher, Hasher};
    std::collections::hash_map::RandomState::new().build_hasher().finish()
}

/// openpi's metadata: the configuration's reset pose, whole numbers as integers, as Python has them.
pub fn metadata(summary: &Summary) -> Value {
    let number = |x: f64| if x.fract() == 0.0 { Value::Int(x as i128) } else { Value::Float(x) };
    let pose = summary.reset_pose.map(|pose| Value::List(pose.map(number).to_vec()));
    Value::Map(Map(pose.map(|pose| ("reset_pose".to_owned(), pose)).into_iter().collect()))
}

/// What handlers share.
pub(crate) struct Front {
    pub service: Arc<Service>,
    pub settings: Settings,
    pub keys: ApiKeys,
    metadata: Bytes,
    places: Arc<Semaphore>,
    clients: TaskTracker,
    pub stop: CancellationToken,
}

impl Front {
    /// Waits for the clients' last answers; says how many were cut off.
    async fn finish(&self) -> usize {
        self.clients.close();
        let running = self.clients.len();
        tracing::info!(clients = running, "stopping: no new clients, accepted requests finish");
        match tokio::time::timeout(self.settings.shutdown_timeout, self.clients.wait()).await {
            Ok(()) => 0,
            Err(_) => self.clients.len(),
        }
    }
}

/// Accepts connections until told to stop.
async fn accept(listener: TcpListener, front: &Arc<Front>) {
    // Probes and half-open connections have places beside those of clients.
    let beside = 64 + front.settings.max_viewers;
    let doors = Arc::new(Semaphore::new(front.settings.max_connections.saturating_add(beside)));
    let app = Router::new()
        .route("/healthz", get(|| async { "OK\n" }))
        .route("/readyz", get(readyz))
        .route("/metrics", get(metrics))
        .route("/", get(page))
        .route("/live", get(live))
        .fallback(websocket)
        .with_state(front.clone());
    let mut app = app.into_make_service_with_connect_info::<SocketAddr>();
    loop {
        let (stream, peer) = tokio::select! {
            accepted = listener.accept() => match accepted {
                Ok(accepted) => accepted,
                Err(error) => {
                    // Mostly "too many open files": wait until some are closed.
                    tracing::warn!(%error, "cannot accept a connection");
                    tokio::time::sleep(Duration::from_millis(100)).await;
                    continue;
                }
            },
            () = front.stop.cancelled() => return,
        };
        let Ok(door) = doors.clone().try_acquire_owned() else {
            front.service.metrics.refused("too_many");
            continue;
        };
        let Ok(service) = app.call(peer).await;
        tokio::spawn(async move {
            serve_http(stream, TowerToHyperService::new(service)).await;
            drop(door);
        });
    }
}

/// Serves HTTP on a connection; it ends when the connection closes or becomes a websocket.
async fn serve_http<S>(stream: TcpStream, service: S)
where
    S: hyper::service::Service<hyper::Request<hyper::body::Incoming>, Response = Response>,
    S::Error: Into<Box<dyn std::error::Error + Send + Sync>>,
    S::Future: Send + 'static,
{
    const HEADER_TIME: Duration = Duration::from_secs(10);
    // Replies are small and awaited: they must not wait for each other.
    let _ = stream.set_nodelay(true);
    let mut http = hyper::server::conn::http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(HEADER_TIME);
    if let Err(error) = http.serve_connection(TokioIo::new(stream), service).with_upgrades().await {
        tracing::debug!(%error, "http connection");
    }
}

async fn readyz(State(front): State<Arc<Front>>) -> (StatusCode, &'static str) {
    match front.stop.is_cancelled() {
        false => (StatusCode::OK, "OK\n"),
        true => (StatusCode::SERVICE_UNAVAILABLE, "shutting down\n"),
    }
}

async fn metrics(State(front): State<Arc<Front>>) -> Response {
    const TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";
    let text = front.service.metrics.render(front.service.queue.len(), front.clients.len());
    ([(header::CONTENT_TYPE, TYPE)], text).into_response()
}

/// Any other path: a websocket, if the key fits and there is room.
pub(crate) async fn websocket(
    State(front): State<Arc<Front>>,
    ConnectInfo(peer): ConnectInfo<SocketAddr>,
    request: Request,
) -> Response {
    let (mut parts, _) = request.into_parts();
    let refuse = |status: StatusCode, reason, text: &'static str| {
        front.service.metrics.refused(reason);
        tracing::info!(%peer, reason, "client refused");
        (status, text).into_response()
    };
    if !front.keys.admit(&parts.headers) {
        return refuse(StatusCode::UNAUTHORIZED, "api_key", "this server wants a valid API key\n");
    }
    let upgrade = match WebSocketUpgrade::from_request_parts(&mut parts, &()).await {
        Ok(upgrade) => upgrade,
        Err(rejection) => return rejection.into_response(),
    };
    if front.stop.is_cancelled() {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "shutting_down", "the server is shutting down\n");
    }
    let Ok(place) = front.places.clone().try_acquire_owned() else {
        return refuse(StatusCode::SERVICE_UNAVAILABLE, "too_many", "too many clients\n");
    };
    let limit = front.settings.max_message_bytes;
    let task = front.clients.token();
    upgrade
        .max_message_size(limit)
        .max_frame_size(limit)
        // Frames are a few hundred kilobytes; replies are flushed at once.
        .write_buffer_size(0)
        .on_upgrade(move |socket| async move {
            let span = tracing::info_span!("client", %peer);
            let connection = Connection::new(
                socket,
                front.service.clone(),
                peer.to_string(),
                &front.settings,
                front.stop.clone(),
            );
            connection.run(front.metadata.clone()).instrument(span).await;
            drop((place, task));
        })
}

/// The runtime that a server is made for: two threads move bytes, and no more than there are cores prepare requests.
/// Each thread's allocator keeps memory of its own, so a crowd of them would only cost.
///
/// # Errors
/// The system refuses to start threads.
pub fn runtime() -> Result<Runtime, Error> {
    // One more waits for the inference thread in the end, one encodes pictures for those who look.
    let blocking = cores() + 2;
    let mut builder = tokio::runtime::Builder::new_multi_thread();
    builder.worker_threads(2).max_blocking_threads(blocking).enable_all().build().map_err(Error::System)
}

/// How many requests can be prepared at once.
fn cores() -> usize {
    std::thread::available_parallelism().map_or(2, usize::from)
}

/// A token that is cancelled by SIGTERM or ctrl-c.
///
/// # Errors
/// The system refuses to deliver signals.
pub fn stop_on_signal() -> Result<CancellationToken, Error> {
    let stop = CancellationToken::new();
    let token = stop.clone();
    let signal = signal().map_err(Error::System)?;
    tokio::spawn(async move {
        signal.await;
        token.cancel();
    });
    Ok(stop)
}

#[cfg(unix)]
fn signal() -> std::io::Result<impl Future<Output = ()>> {
    use tokio::signal::unix::{SignalKind, signal};
    let (mut term, mut int) = (signal(SignalKind::terminate())?, signal(SignalKind::interrupt())?);
    Ok(async move {
        tokio::select! { _ = term.recv() => {}, _ = int.recv() => {} }
    })
}

#[cfg(not(unix))]
fn signal() -> std::io::Result<impl Future<Output = ()>> {
    Ok(async { drop(tokio::signal::ctrl_c().await) })
}
