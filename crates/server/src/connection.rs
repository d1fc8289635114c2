//! One client: metadata first, then observation in, actions out, until it leaves.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::extract::ws::{CloseFrame, Message, Utf8Bytes, WebSocket, close_code};
use bytes::Bytes;
use tokio::time::{MissedTickBehavior, interval, timeout};
use tokio_util::sync::CancellationToken;

use crate::page::Registered;
use crate::service::{Answer, Service};
use crate::{Failure, Settings};

/// openpi's reason of a close after an error.
const ERROR_REASON: &str = "Internal server error. Traceback included in previous frame.";

/// Pings and pongs that a client may send between two pings of ours. Pings are read before anything else is looked at,
/// and their pongs are kept until the client reads: a flood of them would keep the server from stopping.
const MOST_CONTROLS: usize = 1000;

/// Why a connection ends.
enum End {
    /// The client left or broke the protocol of websockets.
    Gone,
    /// It does not answer pings or does not read.
    Silent,
    /// It sends pings without end.
    Flooding,
    /// A request failed: openpi's server closes then, and its client expects that.
    Failed(Failure),
    /// The server stops.
    Stopping,
}

pub(crate) struct Connection {
    socket: WebSocket,
    service: Arc<Service>,
    client: Registered,
    stop: CancellationToken,
    ping: tokio::time::Interval,
    ping_interval: Duration,
    write_timeout: Duration,
    /// When the client was last heard.
    heard: Instant,
    /// Pings and pongs heard since a moment, at most a ping interval before the last of them.
    controls: (usize, Instant),
    /// What came while another request ran. No more is read until it has its turn.
    waiting: Option<(Result<Bytes, Failure>, Instant)>,
}

impl Connection {
    pub fn new(
        socket: WebSocket,
        service: Arc<Service>,
        peer: String,
        settings: &Settings,
        stop: CancellationToken,
    ) -> Self {
        let mut ping = interval(settings.ping_interval);
        ping.set_missed_tick_behavior(MissedTickBehavior::Delay);
        ping.reset();
        Self {
            socket,
            client: service.board.register(peer),
            service,
            stop,
            ping,
            ping_interval: settings.ping_interval,
            write_timeout: settings.write_timeout,
            heard: Instant::now(),
            controls: (0, Instant::now()),
            waiting: None,
        }
    }

    /// Serves the client to its end.
    pub async fn run(mut self, metadata: Bytes) {
        let end = match self.send(Message::Binary(metadata)).await {
            Ok(()) => self.serve().await,
            Err(end) => end,
        };
        if self.waiting.take().is_some() {
            self.service.metrics.cancelled();
        }
        match end {
            End::Gone => tracing::debug!("client left"),
            End::Silent => tracing::info!("client does not answer, dropped"),
            End::Flooding => tracing::info!("client floods the server with pings, dropped"),
            End::Stopping => {
                self.close(close_code::AWAY, "the server is shutting down".into()).await;
            }
            End::Failed(failure) => {
                match &failure {
                    Failure::Panic(_) | Failure::Model(_) => tracing::error!(%failure, "request failed"),
                    _ => tracing::info!(%failure, "request refused"),
                }
                let text = failure.to_string();
                if self.send(Message::Text(text.clone().into())).await.is_ok() {
                    match failure {
                        Failure::TooLarge(_) => self.turn_away(text).await,
                        _ => self.close(close_code::ERROR, ERROR_REASON.into()).await,
                    }
                }
            }
        }
    }

    async fn serve(&mut self) -> End {
        let mut previous_total = None;
        loop {
            let (frame, received) = match self.next_request().await {
                Ok((Ok(frame), received)) => (frame, received),
                Ok((Err(failure), _)) => {
                    self.service.metrics.request(Some(&failure));
                    self.service.failed(&self.client, &failure);
                    return End::Failed(failure);
                }
                Err(end) => return end,
            };
            let result = match self.answer(frame.clone()).await {
                Ok(result) => result,
                Err(end) => {
                    self.service.metrics.cancelled();
                    return end;
                }
            };
            self.service.metrics.request(result.as_ref().err());
            let answer = match result {
                Ok(answer) => answer,
                Err(failure) => {
                    self.service.failed(&self.client, &failure);
                    self.record(&frame, Err(&failure));
                    return End::Failed(failure);
                }
            };
            let reply = Bytes::from(answer.encode(previous_total));
            self.record(&frame, Ok((&answer, reply.clone())));
            if let Err(end) = self.send(Message::Binary(reply)).await {
                return end;
            }
            previous_total = Some(received.elapsed());
            tracing::debug!(total_ms = received.elapsed().as_secs_f64() * 1e3, "answered");
        }
    }

    fn record(&self, frame: &Bytes, result: Result<(&Answer, Bytes), &Failure>) {
        if let Some(recorder) = &self.service.recorder {
            recorder.record(
                self.client.id,
                frame.clone(),
                result.map(|(answer, reply)| (answer.seed, reply)),
            );
        }
    }

    async fn next_request(&mut self) -> Result<(Result<Bytes, Failure>, Instant), End> {
        loop {
            if let Some(next) = self.waiting.take() {
                return Ok(next);
            }
            let stop = self.stop.clone();
            tokio::select! {
                // What has arrived is accepted, even if the server is about to stop.
                biased;
                message = self.socket.recv() => self.hear(message)?,
                () = stop.cancelled() => return Err(End::Stopping),
                _ = self.ping.tick() => self.send_ping().await?,
            }
        }
    }

    /// Waits for the answer while it keeps listening: pings are answered and a client that leaves is noticed.
    async fn answer(&mut self, frame: Bytes) -> Result<Result<Answer, Failure>, End> {
        let (service, client) = (self.service.clone(), self.client.share());
        let answer = service.answer(frame, &client);
        tokio::pin!(answer);
        loop {
            tokio::select! {
                result = &mut answer => return Ok(result),
                message = self.socket.recv(), if self.waiting.is_none() => self.hear(message)?,
                _ = self.ping.tick() => self.send_ping().await?,
            }
        }
    }

    fn hear(&mut self, message: Option<Result<Message, axum::Error>>) -> Result<(), End> {
        self.heard = Instant::now();
        let request = match message {
            Some(Ok(Message::Binary(frame))) => Ok(frame),
            Some(Ok(Message::Text(_))) => Err(Failure::bad("a request is a binary message, got text")),
            // Pongs to pings are sent by the library.
            Some(Ok(Message::Ping(_) | Message::Pong(_))) => return self.hear_control(),
            Some(Ok(Message::Close(_))) | None => return Err(End::Gone),
            Some(Err(error)) => Err(oversized(&error).ok_or(End::Gone)?),
        };
        self.service.metrics.accepted.inc();
        self.waiting = Some((request, self.heard));
        Ok(())
    }

    fn hear_control(&mut self) -> Result<(), End> {
        if self.controls.1.elapsed() > self.ping_interval {
            self.controls = (0, self.heard);
        }
        self.controls.0 += 1;
        if self.controls.0 > MOST_CONTROLS { Err(End::Flooding) } else { Ok(()) }
    }

    async fn send_ping(&mut self) -> Result<(), End> {
        // While a request waits we do not read, so silence proves nothing.
        if self.waiting.is_none() && self.heard.elapsed() > 2 * self.ping_interval {
            return Err(End::Silent);
        }
        self.send(Message::Ping(Bytes::new())).await
    }

    async fn send(&mut self, message: Message) -> Result<(), End> {
        match timeout(self.write_timeout, self.socket.send(message)).await {
            Ok(Ok(())) => Ok(()),
            Ok(Err(_)) => Err(End::Gone),
            Err(_) => Err(End::Silent),
        }
    }

    /// Says goodbye and waits for the client to do so: closing a socket with unread bytes in it would destroy what
    /// was sent last.
    async fn close(&mut self, code: u16, reason: Utf8Bytes) {
        const PATIENCE: Duration = Duration::from_secs(2);
        if self.send(Message::Close(Some(CloseFrame { code, reason }))).await.is_err() {
            return;
        }
        let drain = async { while let Some(Ok(_)) = self.socket.recv().await {} };
        let _ = timeout(PATIENCE, drain).await;
    }
}

impl Connection {
    /// Closes while the client may still be sending a message that is not read: it must have time to hear why before the
    /// socket goes, and its unread bytes with it.
    async fn turn_away(&mut self, mut reason: String) {
        /// Bytes that a close frame has for its reason.
        const MOST: usize = 123;
        const HEARING: Duration = Duration::from_secs(1);
        let whole = (0..=MOST.min(reason.len())).rev().find(|&end| reason.is_char_boundary(end));
        reason.truncate(whole.unwrap_or(0));
        self.close(close_code::SIZE, reason.into()).await;
        tokio::time::sleep(HEARING).await;
    }
}

/// A message beyond the limit gets an answer; any other error means that the connection is lost. By its text, for the
/// type belongs to a library that axum keeps to itself.
fn oversized(error: &axum::Error) -> Option<Failure> {
    let text = error.to_string();
    let sizes = text.strip_prefix("Space limit exceeded: ")?;
    Some(Failure::TooLarge(format!(
        "the observation is too large: {sizes} bytes; send smaller images, or raise max_message_bytes of the server"
    )))
}
