//! What Prometheus reads.

use std::sync::atomic::AtomicU64;
use std::time::Duration;

use pi0_device::MemoryMeter;
use pi0_doctor::Kind;
use prometheus_client::encoding::{EncodeLabelSet, text};
use prometheus_client::metrics::counter::Counter;
use prometheus_client::metrics::family::Family;
use prometheus_client::metrics::gauge::Gauge;
use prometheus_client::metrics::histogram::Histogram;
use prometheus_client::registry::{Registry, Unit};

use crate::Failure;

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Outcome {
    outcome: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Stage {
    stage: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Reason {
    reason: &'static str,
}

#[derive(Debug, Clone, PartialEq, Eq, Hash, EncodeLabelSet)]
struct Warning {
    kind: &'static str,
}

pub(crate) struct Metrics {
    registry: Registry,
    requests: Family<Outcome, Counter>,
    stages: Family<Stage, Histogram, fn() -> Histogram>,
    refused: Family<Reason, Counter>,
    warnings: Family<Warning, Counter>,
    queue_depth: Gauge,
    resident: Gauge<u64, AtomicU64>,
    device: Gauge<u64, AtomicU64>,
    device_memory: Option<MemoryMeter>,
    pub batch_size: Histogram,
    /// Requests that came in whole; in the end each has an outcome.
    pub accepted: Counter,
    connections: Gauge,
}

/// From 50 µs, which decoding takes, to 100 s, which a large model on a small CPU takes.
fn latency() -> Histogram {
    Histogram::new([
        5e-5, 1e-4, 2.5e-4, 5e-4, 1e-3, 2.5e-3, 5e-3, 1e-2, 2.5e-2, 5e-2, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0,
        10.0, 25.0, 50.0, 100.0,
    ])
}

impl Metrics {
    /// `lost` counts requests that could not be recorded.
    pub fn new(device_memory: Option<MemoryMeter>, lost: Option<Counter>) -> Self {
        let mut m = Self {
            registry: Registry::default(),
            requests: Family::default(),
            stages: Family::new_with_constructor(latency),
            refused: Family::default(),
            warnings: Family::default(),
            queue_depth: Gauge::default(),
            resident: Gauge::default(),
            device: Gauge::default(),
            batch_size: Histogram::new([1.0, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0, 16.0, 32.0]),
            accepted: Counter::default(),
            connections: Gauge::default(),
            device_memory,
        };
        let pi0 = m.registry.sub_registry_with_prefix("pi0");
        pi0.register("requests", "Requests by outcome; all but ok are errors", m.requests.clone());
        pi0.register("requests_accepted", "Requests that came in whole", m.accepted.clone());
        let help = "Time of a request by stage: prepare, queue, inference, finish, total; doctor is a part of \
                    prepare and finish; overhead is total without queue and inference";
        pi0.register_with_unit("stage", help, Unit::Seconds, m.stages.clone());
        pi0.register("batch_size", "Requests in one pass of the network", m.batch_size.clone());
        pi0.register("queue_depth", "Requests that wait for the network", m.queue_depth.clone());
        pi0.register("connections", "Websocket clients", m.connections.clone());
        pi0.register("connections_refused", "Clients refused at the door, by reason", m.refused.clone());
        pi0.register("warnings", "Requests that had a finding of the doctor, by kind", m.warnings.clone());
        if let Some(lost) = lost {
            let help = "Requests that were not recorded because the disk was too slow or failed";
            pi0.register("recordings_lost", help, lost);
        }
        if m.device_memory.is_some() {
            let help = "Memory that the model's device holds: weights, activations and what is kept for them";
            pi0.register_with_unit("device_memory", help, Unit::Bytes, m.device.clone());
        }
        let help = "Resident memory of this process";
        m.registry.register_with_unit("process_resident_memory", help, Unit::Bytes, m.resident.clone());
        m
    }

    pub fn request(&self, failure: Option<&Failure>) {
        let outcome = failure.map_or("ok", Failure::kind);
        self.requests.get_or_create(&Outcome { outcome }).inc();
    }

    /// The client went away before its result.
    pub fn cancelled(&self) {
        self.requests.get_or_create(&Outcome { outcome: "cancelled" }).inc();
    }

    /// Requests that have an outcome.
    pub fn finished(&self) -> u64 {
        self.outcomes().into_iter().map(|(_, count)| count).sum()
    }

    /// The doctor found something.
    pub fn warning(&self, kind: Kind) {
        self.warnings.get_or_create(&Warning { kind: kind.name() }).inc();
    }

    /// How often each outcome happened.
    pub fn outcomes(&self) -> Vec<(&'static str, u64)> {
        let outcomes = ["ok"].into_iter().chain(Failure::KINDS).chain(["cancelled"]);
        outcomes
            .map(|outcome| (outcome, self.requests.get(&Outcome { outcome }).map_or(0, |n| n.get())))
            .collect()
    }

    pub fn refused(&self, reason: &'static str) {
        self.refused.get_or_create(&Reason { reason }).inc();
    }

    pub fn stage(&self, stage: &'static str, time: Duration) {
        self.stages.get_or_create(&Stage { stage }).observe(time.as_secs_f64());
    }

    /// All metrics in the OpenMetrics text format.
    pub fn render(&self, queue_depth: usize, connections: usize) -> String {
        self.connections.set(i64::try_from(connections).unwrap_or(i64::MAX));
        self.queue_depth.set(i64::try_from(queue_depth).unwrap_or(i64::MAX));
        self.resident.set(resident_memory().unwrap_or(0));
        if let Some(memory) = &self.device_memory {
            self.device.set(memory.bytes());
        }
        let mut out = String::new();
        // Writing to a string cannot fail.
        let _ = text::encode(&mut out, &self.registry);
        out
    }
}

/// Resident memory of this process, where the system tells.
fn resident_memory() -> Option<u64> {
    let status = std::fs::read_to_string("/proc/self/status").ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmRSS:"))?;
    let kib: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    Some(kib * 1024)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_happened_is_in_the_text() {
        let meter = MemoryMeter::default();
        let _held = meter.hold(4096);
        let metrics = Metrics::new(Some(meter), None);
        metrics.request(None);
        metrics.request(Some(&Failure::ShuttingDown));
        metrics.cancelled();
        assert_eq!(metrics.finished(), 3);
        metrics.refused("api_key");
        metrics.warning(Kind::ImageBlack);
        metrics.stage("total", Duration::from_millis(3));
        let text = metrics.render(7, 2);
        for line in [
            "pi0_requests_total{outcome=\"ok\"} 1",
            "pi0_requests_total{outcome=\"shutting_down\"} 1",
            "pi0_requests_total{outcome=\"cancelled\"} 1",
            "pi0_connections_refused_total{reason=\"api_key\"} 1",
            "pi0_stage_seconds_bucket{le=\"0.005\",stage=\"total\"} 1",
            "pi0_warnings_total{kind=\"image_black\"} 1",
            "pi0_queue_depth 7",
            "pi0_connections 2",
            "pi0_device_memory_bytes 4096",
        ] {
            assert!(text.contains(line), "{line} is missing in\n{text}");
        }
        if cfg!(target_os = "linux") {
            assert!(!text.contains("process_resident_memory_bytes 0\n"), "{text}");
        }
    }
}
