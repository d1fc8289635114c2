//! From a frame to its answer: prepare on a worker thread, wait for the network, finish.

use std::any::Any;
use std::sync::Arc;
use std::time::{Duration, Instant};

use bytes::Bytes;
use pi0_model::Inputs;
use pi0_policy::{Actions, Prepared};
use tokio::sync::{Semaphore, oneshot};
use tokio::time::timeout_at;

use crate::Failure;
use crate::encode::encode;
use crate::metrics::Metrics;
use crate::queue::{Job, Queue};
use crate::record::Recorder;
use crate::translator::Translator;
use crate::value::{Map, NdArray, Value};

/// What all connections share.
pub(crate) struct Service {
    pub translator: Translator,
    pub queue: Queue,
    pub metrics: Metrics,
    pub recorder: Option<Recorder>,
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
}

impl Answer {
    /// openpi's reply, with `warnings` where the policy has any to give. `previous_total` is from the connection's second request on.
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
        let mut reply = vec![
            ("actions".to_owned(), actions),
            ("policy_timing".to_owned(), Value::Map([("infer_ms", ms(self.model))].into())),
            ("server_timing".to_owned(), Value::Map(Map(server_timing))),
        ];
        if !self.actions.warnings.is_empty() {
            let warnings = self.actions.warnings.iter().map(|w| Value::Text(w.to_string())).collect();
            reply.push(("warnings".to_owned(), Value::List(warnings)));
        }
        encode(&Value::Map(Map(reply)))
    }
}

impl Service {
    /// Answers one frame. Dropping the future gives up the request's place in the queue.
    pub async fn answer(self: &Arc<Self>, frame: Bytes) -> Result<Answer, Failure> {
        let start = Instant::now();
        let deadline = start + self.request_timeout;
        let expired = || Failure::Expired(self.request_timeout.as_secs_f64());

        let (prepared, inputs) = match timeout_at(deadline.into(), self.prepare(frame)).await {
            Ok(done) => done?,
            Err(_) => return Err(expired()),
        };
        let queued = Instant::now();
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
        for warning in &actions.warnings {
            tracing::warn!(%warning, "a reply");
        }
        let end = Instant::now();
        self.metrics.stage("finish", end - finishing);
        self.metrics.stage("total", end - start);
        let model = done.ended - done.started;
        let waited = done.started.saturating_duration_since(queued);
        self.metrics.stage("overhead", (end - start).saturating_sub(model + waited));
        Ok(Answer { actions, model, infer: end - start, seed: done.seed })
    }

    /// Preparation takes milliseconds for large images: not on the threads that serve connections.
    async fn prepare(self: &Arc<Self>, frame: Bytes) -> Result<(Prepared, Inputs), Failure> {
        let permit = self.workers.clone().acquire_owned().await.map_err(|_| Failure::ShuttingDown)?;
        let this = self.clone();
        let work = move || {
            // Held to the end of the work, even when the client leaves meanwhile.
            let _permit = permit;
            let mut prepared = this.translator.prepare(&frame)?;
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
