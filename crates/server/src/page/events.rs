//! The page over HTTP: the page itself, and the events that fill it.

use std::sync::Arc;
use std::time::Duration;

use axum::body::Body;
use axum::extract::{ConnectInfo, FromRequest, Request, State};
use axum::http::{HeaderValue, StatusCode, header};
use axum::response::{IntoResponse, Response};
use bytes::Bytes;
use futures_util::stream;
use serde::Serialize;
use serde_json::json;
use tokio::sync::OwnedSemaphorePermit;
use tokio::time::{Instant, sleep};

use super::board::{BUCKET_SECONDS, STAGES, Watch};
use super::shell;
use crate::server::{Front, websocket};

/// How often a viewer hears news, at most; and at least, for what changes without requests.
const QUICK: Duration = Duration::from_millis(250);
const SLOW: Duration = Duration::from_secs(2);

/// Robots that are listed.
const LISTED: usize = 64;

/// `GET /`: the page, which holds no data and so needs no key; or a websocket, as on any path.
pub(crate) async fn page(
    State(front): State<Arc<Front>>,
    peer: ConnectInfo<std::net::SocketAddr>,
    request: Request,
) -> Response {
    if request.headers().contains_key(header::UPGRADE) || !front.settings.page {
        return websocket(State(front), peer, request).await;
    }
    let shell = shell();
    let mut response = shell.text.into_response();
    let headers = response.headers_mut();
    headers.insert(header::CONTENT_TYPE, HeaderValue::from_static("text/html; charset=utf-8"));
    if let Ok(policy) = HeaderValue::from_str(&shell.policy) {
        headers.insert(header::CONTENT_SECURITY_POLICY, policy);
    }
    harden(&mut response);
    response
}

/// Nothing is kept by caches, framed by others or guessed by browsers.
fn harden(response: &mut Response) {
    let headers = response.headers_mut();
    headers.insert(header::CACHE_CONTROL, HeaderValue::from_static("no-store"));
    headers.insert(header::X_CONTENT_TYPE_OPTIONS, HeaderValue::from_static("nosniff"));
    headers.insert(header::X_FRAME_OPTIONS, HeaderValue::from_static("DENY"));
    headers.insert(header::REFERRER_POLICY, HeaderValue::from_static("no-referrer"));
}

/// `GET /live?robot=N`: server-sent events, `view` and `pictures`, until the viewer leaves or the server stops.
pub(crate) async fn live(
    State(front): State<Arc<Front>>,
    peer: ConnectInfo<std::net::SocketAddr>,
    request: Request,
) -> Response {
    if request.headers().contains_key(header::UPGRADE) || !front.settings.page {
        return websocket(State(front), peer, request).await;
    }
    let (parts, _) = match Request::from_request(request, &()).await {
        Ok(request) => request.into_parts(),
        Err(never) => match never {},
    };
    if !front.keys.admit(&parts.headers) {
        front.service.metrics.refused("api_key");
        return (StatusCode::UNAUTHORIZED, "this server wants a valid API key\n").into_response();
    }
    if front.stop.is_cancelled() {
        // On another connection the next server may answer.
        let close = [(header::CONNECTION, "close")];
        return (StatusCode::SERVICE_UNAVAILABLE, close, "the server is shutting down\n").into_response();
    }
    let Ok(place) = front.service.board.viewers.clone().try_acquire_owned() else {
        front.service.metrics.refused("too_many");
        return (StatusCode::SERVICE_UNAVAILABLE, "too many viewers\n").into_response();
    };
    let query = parts.uri.query().unwrap_or_default();
    let wanted = query.split('&').find_map(|pair| pair.strip_prefix("robot=")).and_then(|id| id.parse().ok());
    let viewer = Viewer { front, wanted, watch: None, sent: None, pictures: None, _place: place };
    let events = stream::unfold(viewer, |mut viewer| async {
        let event = viewer.next().await?;
        Some((Ok::<_, std::convert::Infallible>(event), viewer))
    });
    let mut response = Body::from_stream(events).into_response();
    response.headers_mut().insert(header::CONTENT_TYPE, HeaderValue::from_static("text/event-stream"));
    harden(&mut response);
    response
}

/// Somebody who looks. Whatever it is slow to read is not sent: the next event says how things are then.
struct Viewer {
    front: Arc<Front>,
    wanted: Option<u64>,
    watch: Option<Watch>,
    /// When the last view was sent, and of which version.
    sent: Option<(Instant, u64)>,
    /// When the pictures were taken that were sent last.
    pictures: Option<std::time::Instant>,
    _place: OwnedSemaphorePermit,
}

impl Viewer {
    async fn next(&mut self) -> Option<Bytes> {
        loop {
            if self.front.stop.is_cancelled() {
                return None;
            }
            // The page knows a robot by its view: pictures come behind it.
            if self.sent.is_some()
                && let Some(pictures) = self.watch.as_ref().and_then(|watch| watch.pictures())
                && self.pictures != Some(pictures.taken)
            {
                self.pictures = Some(pictures.taken);
                let urls = pictures.urls(&self.front.service.board.encoding).await;
                let robot = self.watch.as_ref().map(|watch| watch.id);
                return Some(event("pictures", &json!({"robot": robot, "src": urls})));
            }
            let wait = self.sent.map_or(Duration::ZERO, |(time, _)| QUICK.saturating_sub(time.elapsed()));
            tokio::select! {
                () = sleep(wait) => {}
                () = self.front.stop.cancelled() => return None,
            }
            self.choose();
            let version = self.watch.as_ref().map_or(0, |watch| watch.version());
            if self.sent.is_none_or(|(time, last)| time.elapsed() >= SLOW || version != last) {
                self.sent = Some((Instant::now(), version));
                return Some(event("view", &self.view()));
            }
            tokio::select! {
                () = sleep(QUICK) => {}
                () = self.front.stop.cancelled() => return None,
            }
        }
    }

    /// Watches the robot that was asked for while it is connected, else the first.
    fn choose(&mut self) {
        let clients = self.front.service.board.clients();
        let wanted = clients.iter().find(|client| Some(client.id) == self.wanted);
        let current = self.watch.as_ref().map(|watch| watch.id);
        let current = clients.iter().find(|client| Some(client.id) == current);
        let chosen = wanted.or(current).or(clients.first());
        if chosen.map(|client| client.id) != self.watch.as_ref().map(|watch| watch.id) {
            self.watch = chosen.map(|client| Watch::new(client.clone()));
            (self.pictures, self.sent) = (None, None);
        }
    }

    fn view(&self) -> serde_json::Value {
        let service = &self.front.service;
        let (board, profile) = (&service.board, service.doctor.profile());
        let clients = board.clients();
        let robots: Vec<_> = clients
            .iter()
            .take(LISTED)
            .map(|client| {
                let (requests, warnings) =
                    client.latest(|latest| (latest.history.requests(), latest.findings.len()));
                json!({
                    "id": client.id, "peer": client.peer, "requests": requests, "rate": client.rate() as f32,
                    "warnings": warnings,
                })
            })
            .collect();
        let view = self.watch.as_ref().map(|client| {
            let max_tokens = service.translator.max_tokens();
            client.latest(|latest| latest.view(client.peer.clone(), profile, max_tokens))
        });
        let (now, buckets) = board.buckets();
        let latency: Vec<_> = buckets
            .iter()
            .map(|bucket| {
                let ago = (now - bucket.number) * BUCKET_SECONDS;
                json!({"ago": ago, "count": bucket.count, "ms": bucket.sums.map(|sum| (1e3 * sum / f64::from(bucket.count.max(1))) as f32)})
            })
            .collect();
        let seconds = board.seconds();
        let errors: Vec<_> = board
            .errors()
            .into_iter()
            .map(
                |e| json!({"ago": (seconds - e.time) as f32, "peer": e.peer, "kind": e.kind, "text": e.text}),
            )
            .collect();
        let outcomes: serde_json::Map<_, _> =
            service.metrics.outcomes().into_iter().map(|(name, n)| (name.to_owned(), n.into())).collect();
        json!({
            "robots": robots,
            "connected": clients.len(),
            "robot": self.watch.as_ref().map(|watch| watch.id),
            "view": view,
            "stages": STAGES,
            "latency": latency,
            "queue": service.queue.len(),
            "max_queue": self.front.settings.max_queue,
            "outcomes": outcomes,
            "errors": errors,
            "uptime": seconds as u64,
        })
    }
}

fn event(name: &str, data: &impl Serialize) -> Bytes {
    // Serialization of numbers and strings does not fail; JSON has no line breaks.
    let data = serde_json::to_string(data).unwrap_or_default();
    Bytes::from(format!("event: {name}\ndata: {data}\n\n"))
}
