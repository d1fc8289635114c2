//! What moving each operation to the device would give, by Amdahl's law.

use pi0_device::{Kind, OpKind, Record};

use crate::results::Fallback;

/// One kind of operation that runs on the host. Times are seconds of a whole inference.
#[derive(Debug, Clone, PartialEq)]
pub struct Item {
    /// Which.
    pub op: OpKind,
    /// Modules it runs in.
    pub modules: Vec<String>,
    /// How often.
    pub count: u64,
    /// On the host.
    pub host: f64,
    /// Of the transfers that it needs because it is on the host.
    pub transfer: f64,
    /// That the device would take.
    pub device: f64,
    /// How that is known.
    pub basis: Basis,
    /// That operations on the device lose because this one ran on the host right before them: threads fell asleep,
    /// caches hold other things.
    pub disturbance: f64,
}

/// How the device's time for an operation is known.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Basis {
    /// The device ran it on the same operands.
    Measured,
    /// From the device's rate for operations of the same kind.
    SameKind,
    /// From the device's rate over all that it ran.
    Overall,
    /// The device ran nothing: as slow as the host.
    None,
}

impl Basis {
    /// In words.
    pub fn name(self) -> &'static str {
        match self {
            Basis::Measured => "measured",
            Basis::SameKind => "rate of its kind",
            Basis::Overall => "rate of the device",
            Basis::None => "as on the host",
        }
    }
}

/// What the device saves by fusing calls that had to be composed while these operations were on the host.
#[derive(Debug, Clone, PartialEq)]
pub struct Saving {
    /// All of these must have moved.
    pub ops: Vec<OpKind>,
    /// Of a whole inference. Negative where the device is faster without fusing.
    pub seconds: f64,
}

impl Item {
    pub(super) fn new(op: OpKind) -> Self {
        let (host, transfer, device, disturbance) = (0.0, 0.0, 0.0, 0.0);
        Self { op, modules: vec![], count: 0, host, transfer, device, basis: Basis::None, disturbance }
    }

    /// What the inference spends on it now.
    fn cost(&self) -> f64 {
        self.host + self.transfer + self.disturbance
    }
}

/// Seconds that the device takes for a unit of work, from what it ran.
pub struct Rates {
    kinds: Vec<(Kind, Rate)>,
    overall: Rate,
}

#[derive(Default, Clone, Copy)]
struct Rate {
    seconds: f64,
    flop: f64,
    bytes: f64,
}

impl Rate {
    fn add(&mut self, r: &Record) {
        self.seconds += r.time.as_secs_f64();
        self.flop += r.flop() as f64;
        self.bytes += r.bytes as f64;
    }
}

impl Rates {
    /// Of the operations that ran on the device.
    pub fn measured(records: &[Record]) -> Self {
        let mut rates = Self { kinds: vec![], overall: Rate::default() };
        for r in records.iter().filter(|r| !r.on_host()) {
            // A fused call measures its linear layer.
            let Some(kind) = r
                .parts
                .iter()
                .find_map(|p| (p.op == OpKind::Linear).then(|| p.op.kind()).flatten())
                .or_else(|| r.op.kind())
            else {
                continue;
            };
            rates.overall.add(r);
            match rates.kinds.iter_mut().find(|(k, _)| *k == kind) {
                Some((_, rate)) => rate.add(r),
                None => {
                    let mut rate = Rate::default();
                    rate.add(r);
                    rates.kinds.push((kind, rate));
                }
            }
        }
        rates
    }

    fn of_kind(&self, op: OpKind) -> Option<Rate> {
        self.kinds.iter().find(|(k, _)| Some(*k) == op.kind()).map(|(_, rate)| *rate)
    }

    /// How [`seconds`](Self::seconds) knows.
    pub fn basis(&self, op: OpKind) -> Basis {
        match (self.of_kind(op), self.overall.bytes > 0.0) {
            (Some(_), _) => Basis::SameKind,
            (None, true) => Basis::Overall,
            (None, false) => Basis::None,
        }
    }

    /// What the device would take for a call that ran on the host: products by their FLOP, the rest by their bytes.
    pub fn seconds(&self, r: &Record) -> f64 {
        let scale = |rate: Rate, by_flop: bool| match by_flop && rate.flop > 0.0 {
            true => r.flop() as f64 * rate.seconds / rate.flop,
            false => r.bytes as f64 * rate.seconds / rate.bytes.max(1.0),
        };
        let product = matches!(r.op, OpKind::Linear | OpKind::Attention);
        match (self.of_kind(r.op), self.overall) {
            (Some(rate), _) => scale(rate, product),
            (None, rate) if rate.bytes > 0.0 => scale(rate, product),
            _ => r.time.saturating_sub(r.transfer_time).as_secs_f64(),
        }
    }
}

/// Time of an inference of `total` seconds once all of `items` have moved.
pub fn predicted(total: f64, items: &[Item], savings: &[Saving]) -> f64 {
    let change: f64 = items.iter().map(|i| i.device - i.cost()).sum();
    let moved = |op: &OpKind| items.iter().any(|i| i.op == *op);
    let fused: f64 = savings.iter().filter(|s| s.ops.iter().all(moved)).map(|s| s.seconds).sum();
    // What is left cannot be less than what the moved operations take.
    (total + change - fused).max(items.iter().map(|i| i.device).sum::<f64>() - fused)
}

/// Ranks the fallbacks of an inference of `total` seconds, of whose `ops` base operations `on_device` are on the
/// device.
pub fn roadmap(
    total: f64,
    ops: u64,
    on_device: u64,
    mut items: Vec<Item>,
    savings: &[Saving],
) -> Vec<Fallback> {
    items.sort_by(|a, b| b.cost().total_cmp(&a.cost()));
    let mut moved = on_device;
    (0..items.len())
        .map(|i| {
            let item = &items[i];
            let speedup = total / predicted(total, std::slice::from_ref(item), savings);
            moved += item.count;
            Fallback {
                op: item.op.name().into(),
                modules: item.modules.clone(),
                count: item.count,
                host_seconds: item.host,
                transfer_seconds: item.transfer,
                disturbance_seconds: item.disturbance,
                device_seconds: item.device,
                basis: item.basis.name().into(),
                speedup,
                cumulative_speedup: total / predicted(total, &items[..=i], savings),
                coverage: if ops == 0 { 0.0 } else { moved as f64 / ops as f64 },
                priority: priority(speedup).into(),
            }
        })
        .collect()
}

/// Columns of the table of fallbacks; times are milliseconds.
pub const COLUMNS: [&str; 11] = [
    "to move",
    "priority",
    "calls",
    "host ms",
    "transfer ms",
    "disturbs ms",
    "device ms",
    "known by",
    "alone",
    "with all above",
    "coverage",
];

/// Cells of one fallback, under [`COLUMNS`].
pub fn cells(f: &Fallback) -> [String; 11] {
    let ms = |seconds: f64| format!("{:.2}", seconds * 1e3);
    [
        f.op.clone(),
        f.priority.clone(),
        f.count.to_string(),
        ms(f.host_seconds),
        ms(f.transfer_seconds),
        ms(f.disturbance_seconds),
        ms(f.device_seconds),
        f.basis.clone(),
        format!("{:.2}×", f.speedup),
        format!("{:.2}×", f.cumulative_speedup),
        format!("{:.1} %", 100.0 * f.coverage),
    ]
}

/// HIGH from a tenth off the inference's time, MEDIUM from a hundredth.
fn priority(speedup: f64) -> &'static str {
    match 1.0 - 1.0 / speedup {
        gain if gain >= 0.1 => "HIGH",
        gain if gain >= 0.01 => "MEDIUM",
        _ => "LOW",
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use pi0_device::{Fusion, Part, Place};

    use super::super::{Probe, fallbacks};
    use super::*;

    fn record(op: OpKind, place: Place, ms: u64, transfer: u64, flop: u64) -> Record {
        Record {
            op,
            parts: vec![Part { op, flop }],
            module: "suffix.layer3".into(),
            shapes: vec![[4, 8]],
            result: [4, 8],
            place,
            start: Duration::ZERO,
            time: Duration::from_millis(ms),
            transfer_time: Duration::from_millis(transfer),
            transfer_bytes: 256,
            bytes: 1000,
            device_time: None,
        }
    }

    #[test]
    fn amdahl_by_hand() {
        // Of 100 ms: linear 60 + 10 moving, silu 8 + 2, the device 20.
        let records = [
            record(OpKind::Linear, Place::Forced, 70, 10, 2000),
            record(OpKind::Silu, Place::Host, 10, 2, 0),
            record(OpKind::Linear, Place::Device, 5, 0, 1000),
            record(OpKind::Add, Place::Device, 15, 0, 0),
        ];
        let plan = roadmap(0.1, 4, 2, fallbacks(&records, &[]).0, &[]);
        let (linear, silu) = (&plan[0], &plan[1]);
        assert_eq!((linear.op.as_str(), linear.basis.as_str()), ("linear", "rate of its kind"));
        // Twice the FLOP of what took 5 ms.
        assert!((linear.device_seconds - 0.010).abs() < 1e-12);
        assert!((linear.speedup - 100.0 / 40.0).abs() < 1e-9, "{linear:?}");
        // No activation ran on the device: 1000 of the 2000 bytes that took it 20 ms.
        assert_eq!(silu.basis, "rate of the device");
        assert!((silu.device_seconds - 0.010).abs() < 1e-12);
        assert!((silu.speedup - 1.0).abs() < 1e-9 && silu.priority == "LOW");
        assert!((silu.cumulative_speedup - 100.0 / 40.0).abs() < 1e-9);
        assert_eq!((linear.coverage, silu.coverage), (0.75, 1.0));
        assert_eq!(linear.priority, "HIGH");
    }

    #[test]
    fn a_measured_time_goes_before_a_rate() {
        let records = [
            record(OpKind::Linear, Place::Forced, 70, 10, 2000),
            record(OpKind::Linear, Place::Device, 5, 0, 1000),
        ];
        let probed = Record { device_time: Some(Duration::from_millis(4)), ..records[0].clone() };
        // In its stride the device takes 3 of the 5 ms for the product that was its own all along.
        let in_stride = Record { device_time: Some(Duration::from_millis(3)), ..records[1].clone() };
        let probe = |fusions| Probe { records: vec![probed.clone(), in_stride.clone()], fusions };
        let (items, savings) = fallbacks(&records, &[probe(vec![]), probe(vec![])]);
        assert_eq!((items[0].basis, items[0].device), (Basis::Measured, 0.004));
        assert!((items[0].disturbance - 0.002).abs() < 1e-12);
        assert!((predicted(0.075, &items, &savings) - 0.007).abs() < 1e-12);

        // The device takes 7 ms for the layer in pieces, 5 fused; but not as long as its norm is on the host.
        let fusion = |forced| Fusion {
            op: OpKind::Dense,
            forced,
            apart: Duration::from_millis(7),
            fused: Duration::from_millis(5),
        };
        let fusions = vec![fusion(vec![OpKind::Linear]), fusion(vec![OpKind::RmsNorm, OpKind::Linear])];
        let (items, savings) = fallbacks(&records, &[probe(fusions)]);
        assert_eq!(savings.len(), 2);
        assert!((predicted(0.075, &items, &savings) - 0.005).abs() < 1e-12);
    }

    #[test]
    fn nothing_is_gained_from_a_device_that_ran_nothing() {
        let records = [record(OpKind::Linear, Place::Host, 70, 10, 2000)];
        let plan = roadmap(0.07, 1, 0, fallbacks(&records, &[]).0, &[]);
        assert_eq!(plan[0].basis, "as on the host");
        assert!((plan[0].speedup - 70.0 / 60.0).abs() < 1e-9);
    }
}
