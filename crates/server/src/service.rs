//! From a frame to its answer: prepare on a worker thread, wait for the network, finish.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use pi0_doctor::{Doctor, Finding, Kind};
use pi0_model::Inputs;
use pi0_policy::{Actions, Prepared};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout_at;

use crate::Failure;
use crate::encode::encode;
use crate::metrics::Metrics;
use crate::page::{Board, Client};
use crate::queue::{Job, Queue};
use crate::record::Recorder;
use crate::translator::{Ready, Translator};
use crate::value::{Map, NdArray, Value};

/// What all connections share.
pub(crate) struct Service {
    pub translator: Translator,
    pub queue: Queue,
    pub metrics: Metrics,
    pub recorder: Option<Recorder>,
    pub doctor: Doctor,
    /// Findings that are errors.
    pub strict: Vec<Kind>,
    pub board: Arc<Board>,
    pub request_timeout: Duration,
    /// Keeps preparation from taking more cores than there are.
    pub workers: Arc<Semaphore>,
}

/// A request's result, and where its time went.
#[derive(Debug)]
pub(crate) struct Answer {
    actions: Actions,
    /// Time of the network.
    model: Duration,
    /// Time from the frame's arrival to the result.
    infer: Duration,
    pub seed: u64,
    /// What the doctor says.
    findings: Vec<Finding>,
}

impl Answer {
    /// openpi's reply, with `pi0/warnings` where there are any. `previous_total` is from the connection's second request on.
    pub fn encode(&self, previous_total: Option<Duration>) -> Vec<u8> {
        let ms = |time: Duration| Value::Float(time.as_secs_f64() * 1e3);
        let shape = vec![self.actions.rows, self.actions.cols];
        let actions = match NdArray::from_f64(shape, &self.actions.data) {
            Ok(array) => Value::Array(array),
            // Unreachable while a policy's actions have the shape they say.
            Err(why) => Value::Text(why),
        };
        let mut server_timing = vec![("infer_ms".to_owned(), ms(self.infer))];
        server_timing.extend(previous_total.map(|total| ("prev_total_ms".to_owned(), ms(total))));
        let mut reply = Map::from([
            ("actions", actions),
            ("policy_timing", Value::Map([("infer_ms", ms(self.model))].into())),
            ("server_timing", Value::Map(Map(server_timing))),
        ]);
        // Only where there are any: clients of openpi's that know nothing of them get what they know.
        if !self.findings.is_empty() {
            reply.0.push(("pi0/warnings".into(), Value::List(self.findings.iter().map(warning).collect())));
        }
        encode(&Value::Map(reply))
    }
}

fn warning(finding: &Finding) -> Value {
    let text = |text: &str| Value::Text(text.to_owned());
    Value::Map(Map::from([
        ("kind", text(finding.kind.name())),
        ("subject", text(&finding.subject)),
        ("text", text(&finding.text)),
        ("remedy", text(finding.kind.remedy())),
        ("since", Value::Int(finding.since.into())),
        ("count", Value::Int(finding.count.into())),
    ]))
}

impl Service {
    /// Answers one frame. Dropping the future gives up the request's place in the queue.
    pub async fn answer(self: &Arc<Self>, frame: Bytes, client: &Arc<Client>) -> Result<Answer, Failure> {
        let start = Instant::now();
        let deadline = start + self.request_timeout;
        let expired = || Failure::Expired(self.request_timeout.as_secs_f64());

        let (prepared, inputs) = match timeout_at(deadline.into(), self.prepare(frame, client)).await {
            Ok(done) => done?,
            Err(_) => return Err(expired()),
        };
        let queued = Instant::now();
        let preparing = queued - start;
        self.metrics.stage("prepare", queued - start);

        let (reply, result) = oneshot::channel();
        self.queue.push(Job { inputs, deadline, reply })?;
        let done = match timeout_at(deadline.into(), result).await {
            Ok(Ok(done)) => done?,
            // The queue drops what has expired; the two clocks may differ by a moment.
            Ok(Err(_)) if Instant::now() >= deadline => return Err(expired()),
            Ok(Err(_)) => return Err(Failure::ShuttingDown),
            Err(_) => return Err(expired()),
        };
        self.metrics.stage("queue", done.started.saturating_duration_since(queued));

        let finishing = Instant::now();
        let actions = self.translator.policy().postprocess(&done.actions.data, &prepared);
        let actions = actions.map_err(|e| Failure::Model(e.to_string()))?;
        let looking = Instant::now();
        let found = client.answer(
            &self.doctor,
            self.translator.policy(),
            &done.actions.data,
            &actions,
            looking - start,
        );
        self.told(client, &found)?;
        let end = Instant::now();
        self.metrics.stage("doctor", end - looking);
        self.metrics.stage("finish", end - finishing);
        self.metrics.stage("total", end - start);
        let model = done.ended - done.started;
        let waited = done.started.saturating_duration_since(queued);
        let findings = client.finish([preparing, waited, model, end - finishing, end - start]);
        self.metrics.stage("overhead", (end - start).saturating_sub(model + waited));
        Ok(Answer { actions, model, infer: end - start, seed: done.seed, findings })
    }

    /// Counts and logs what the doctor found; an error where that is not allowed.
    fn told(&self, client: &Client, findings: &[Finding]) -> Result<(), Failure> {
        for (i, finding) in findings.iter().enumerate() {
            // A request with two black cameras is one.
            if findings[..i].iter().all(|other| other.kind != finding.kind) {
                self.metrics.warning(finding.kind);
            }
            if finding.news {
                let (kind, count) = (finding.kind.name(), finding.count);
                tracing::warn!(robot = client.id, kind, count, "{}", finding.sentence());
            }
        }
        match findings.iter().find(|finding| self.strict.contains(&finding.kind)) {
            Some(finding) => Err(Failure::Strict(format!("{}: {}", finding.kind, finding.sentence()))),
            None => Ok(()),
        }
    }

    /// Notes a request that failed.
    pub fn failed(&self, client: &Client, failure: &Failure) {
        if matches!(failure, Failure::BadRequest(_) | Failure::TooLarge(_)) {
            let finding = client.refuse(&self.doctor, &failure.to_string());
            self.metrics.warning(finding.kind);
        }
        self.board.trouble(&client.peer, failure.kind(), &failure.to_string());
    }

    /// Preparation takes milliseconds for large images: not on the threads that serve connections.
    async fn prepare(
        self: &Arc<Self>,
        frame: Bytes,
        client: &Arc<Client>,
    ) -> Result<(Prepared, Inputs), Failure> {
        let permit = self.workers.clone().acquire_owned().await.map_err(|_| Failure::ShuttingDown)?;
        let (this, client) = (self.clone(), client.clone());
        let work = move || {
            // Held to the end of the work, even when the client leaves meanwhile.
            let _permit = permit;
            let Ready { observation, mut prepared, unexecuted } = this.translator.prepare(&frame)?;
            let looking = Instant::now();
            let policy = this.translator.policy();
            let found = client.observe(&this.doctor, policy, &observation, &prepared, unexecuted);
            this.metrics.stage("doctor", looking.elapsed());
            this.told(&client, &found)?;
            let inputs = std::mem::take(&mut prepared.inputs);
            Ok((prepared, inputs))
        };
        match tokio::task::spawn_blocking(work).await {
            Ok(result) => result,
            Err(e) if e.is_panic() => {
                let payload: Box<dyn Any + Send> = e.into_panic();
                Err(Failure::panic(&*payload))
            }
            Err(_) => Err(Failure::ShuttingDown),
        }
    }
}
