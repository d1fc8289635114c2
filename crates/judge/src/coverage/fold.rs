//! From records to tables.

use std::collections::BTreeMap;

use pi0_device::{Fusion, Kind, OpKind, Record};

use super::roadmap::{Basis, Item, Rates, Saving};
use crate::results::{Row, Share, Stage, Transfer};

/// A module path without layer and step numbers: `step3.suffix.layer7` is `suffix.layer`.
pub fn module_name(path: &str) -> String {
    let name = |part: &str| part.trim_end_matches(|c: char| c.is_ascii_digit()).to_string();
    let parts: Vec<String> = path.split('.').map(name).collect();
    match parts.as_slice() {
        [step, rest @ ..] if step == "step" && !rest.is_empty() => rest.join("."),
        _ => parts.join("."),
    }
}

/// Base operations by module and kind, in the order that they first ran.
pub fn rows(records: &[Record]) -> Vec<Row> {
    let mut order: Vec<(String, Kind)> = Vec::new();
    let mut table: BTreeMap<(String, Kind), (Share, Share)> = BTreeMap::new();
    for r in records {
        let module = module_name(&r.module);
        // A fused call takes one time: it counts where the operation that dominates it does.
        let main = r.parts.iter().position(|p| p.op == OpKind::Linear).unwrap_or(0);
        for (i, part) in r.parts.iter().enumerate() {
            let Some(kind) = part.op.kind() else { continue };
            let key = (module.clone(), kind);
            if !table.contains_key(&key) {
                order.push(key.clone());
            }
            let (device, host) = table.entry(key).or_default();
            let share = if r.on_host() { host } else { device };
            share.ops += 1;
            share.flop += part.flop;
            if i == main {
                share.bytes += r.bytes;
                share.seconds += (r.time.saturating_sub(r.transfer_time)).as_secs_f64();
                share.transfer_seconds += r.transfer_time.as_secs_f64();
                share.transfer_bytes += r.transfer_bytes;
            }
        }
    }
    let modules = order.iter().map(|(module, _)| module).fold(Vec::new(), |mut seen, m| {
        if !seen.contains(&m) {
            seen.push(m);
        }
        seen
    });
    let keys = modules.into_iter().flat_map(|m| Kind::ALL.map(|kind| (m.clone(), kind)));
    keys.filter_map(|key| {
        let (device, host) = *table.get(&key)?;
        Some(Row { module: key.0, kind: key.1.name().into(), device, host })
    })
    .collect()
}

/// Everything that crossed the bus: what was uploaded and downloaded, and what fallbacks moved.
pub fn transfers(records: &[Record]) -> Vec<Transfer> {
    let mut list: Vec<Transfer> = Vec::new();
    for r in records.iter().filter(|r| r.transfer_bytes > 0) {
        let (what, module) = (r.op.name(), module_name(&r.module));
        let index = list.iter().position(|t| t.what == what && t.module == module).unwrap_or_else(|| {
            list.push(Transfer { what: what.into(), module, count: 0, bytes: 0, seconds: 0.0 });
            list.len() - 1
        });
        let line = &mut list[index];
        line.count += 1;
        line.bytes += r.transfer_bytes;
        line.seconds += r.transfer_time.as_secs_f64();
    }
    list.sort_by_key(|t| std::cmp::Reverse(t.bytes));
    list
}

/// What runs that timed the device too have found out ([`Traced::probe`](pi0_device::Traced::probe)).
pub struct Probe {
    /// Records with device times.
    pub records: Vec<Record>,
    /// Fused calls that the force broke up.
    pub fusions: Vec<Fusion>,
}

/// Operations that ran on the host, with what they cost and what the device would take: the median of the probes
/// where they timed it, else at the device's rate for its other operations. And what is saved by fusing again.
pub fn fallbacks(records: &[Record], probes: &[Probe]) -> (Vec<Item>, Vec<Saving>) {
    let rates = Rates::measured(records);
    let mut items: Vec<Item> = Vec::new();
    for r in records.iter().filter(|r| r.on_host()) {
        let index = items.iter().position(|i| i.op == r.op).unwrap_or_else(|| {
            items.push(Item::new(r.op));
            items.len() - 1
        });
        let item = &mut items[index];
        let module = module_name(&r.module);
        if !item.modules.contains(&module) {
            item.modules.push(module);
        }
        item.count += 1;
        item.host += r.time.saturating_sub(r.transfer_time).as_secs_f64();
        item.transfer += r.transfer_time.as_secs_f64();
        item.device += rates.seconds(r);
        item.basis = rates.basis(r.op);
    }
    for item in &mut items {
        let sum = |p: &Probe| -> Option<f64> {
            p.records
                .iter()
                .filter(|r| r.on_host() && r.op == item.op)
                .map(|r| Some(r.device_time?.as_secs_f64()))
                .sum()
        };
        if let Some(times) = probes.iter().map(sum).collect::<Option<Vec<f64>>>()
            && let Some(time) = median(times)
        {
            item.device = time;
            item.basis = Basis::Measured;
        }
    }
    for item in &mut items {
        // Operations of the device right after this one: how long they took, and in their stride.
        let after = |i: &usize| {
            let [before, r] = [&records[i - 1], &records[*i]];
            let moves = matches!(r.op, OpKind::Upload | OpKind::Download);
            before.on_host() && before.op == item.op && !r.on_host() && !moves
        };
        let after: Vec<usize> = (1..records.len()).filter(after).collect();
        let disturbed: f64 = after.iter().map(|&i| records[i].time.as_secs_f64()).sum();
        let in_stride = |p: &Probe| -> Option<f64> {
            after.iter().map(|&i| Some(p.records.get(i)?.device_time?.as_secs_f64())).sum()
        };
        let in_stride = probes.iter().map(in_stride).collect::<Option<Vec<f64>>>().and_then(median);
        // Less than nothing is noise.
        item.disturbance = in_stride.map_or(0.0, |seconds| (disturbed - seconds).max(0.0));
    }
    let mut savings: Vec<Saving> = Vec::new();
    for fusion in probes.iter().flat_map(|p| &p.fusions) {
        if !savings.iter().any(|s| s.ops == fusion.forced) {
            let sum = |p: &Probe| {
                let broken_up = p.fusions.iter().filter(|f| f.forced == fusion.forced);
                broken_up.map(|f| f.apart.as_secs_f64() - f.fused.as_secs_f64()).sum()
            };
            let seconds = median(probes.iter().map(sum).collect()).unwrap_or(0.0);
            savings.push(Saving { ops: fusion.forced.clone(), seconds });
        }
    }
    (items, savings)
}

/// The middle one, of an even number the upper.
pub fn median(mut values: Vec<f64>) -> Option<f64> {
    values.sort_by(f64::total_cmp);
    values.get(values.len() / 2).copied()
}

/// The stages of an inference: vision, prefix, preparation of the suffix, then each denoising step.
pub fn stages(records: &[Record]) -> Vec<Stage> {
    let mut list: Vec<Stage> = Vec::new();
    let origin = records.first().map_or(0.0, |r| r.start.as_secs_f64());
    for r in records {
        let name = match r.module.split('.').next() {
            Some(first) if !first.is_empty() => first.to_string(),
            _ => "outside".to_string(),
        };
        let (start, time) = (r.start.as_secs_f64() - origin, r.time.as_secs_f64());
        if list.last().is_none_or(|s| s.name != name) {
            list.push(Stage { name, start, end: start, kinds: vec![] });
        }
        let Some(stage) = list.last_mut() else { continue };
        stage.end = stage.end.max(start + time);
        let main = r.parts.iter().find(|p| p.op == OpKind::Linear).or(r.parts.first());
        let kind = main.map_or(r.op, |p| p.op);
        let kind = kind.kind().map_or(kind.name(), Kind::name);
        match stage.kinds.iter_mut().find(|(k, _)| k == kind) {
            Some((_, t)) => *t += time,
            None => stage.kinds.push((kind.into(), time)),
        }
    }
    list
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_of_layers_and_steps_do_not_count() {
        for (path, name) in [
            ("step3.suffix.layer12", "suffix.layer"),
            ("vision.layer0", "vision.layer"),
            ("prefix", "prefix"),
            ("step9", "step"),
            ("", ""),
        ] {
            assert_eq!(module_name(path), name);
        }
    }
}
