//! Where the values of a tape lie in one arena, and between which launches a barrier must stand.

use crate::memory::ALIGNMENT;
use crate::tape::{Launch, Operand, Tape};

/// The plan of one tape.
pub(crate) struct Plan {
    /// Of each value, in the arena.
    pub(crate) offsets: Vec<u64>,
    /// Bytes of the arena.
    pub(crate) size: u64,
    /// Before which launches a barrier stands.
    pub(crate) barriers: Vec<bool>,
}

/// Plans a tape whose values `held` outlive it.
pub(crate) fn plan(tape: &Tape, held: &[u32]) -> Plan {
    let (offsets, size) = offsets(tape, held);
    let barriers = barriers(tape, &offsets);
    Plan { offsets, size, barriers }
}

fn padded(bytes: u64) -> u64 {
    bytes.max(16).next_multiple_of(ALIGNMENT)
}

/// A value takes the smallest gap that it fits, from its first launch to its last.
fn offsets(tape: &Tape, held: &[u32]) -> (Vec<u64>, u64) {
    let end = tape.launches.len();
    let mut first = vec![usize::MAX; tape.values.len()];
    let mut last = vec![0; tape.values.len()];
    for (i, launch) in tape.launches.iter().enumerate() {
        for o in &launch.operands[..launch.count] {
            if let Operand::Value(v) = *o {
                first[v as usize] = first[v as usize].min(i);
                last[v as usize] = i;
            }
        }
    }
    for u in &tape.uploads {
        first[u.value as usize] = 0;
    }
    for &v in held {
        last[v as usize] = end;
        first[v as usize] = first[v as usize].min(end);
    }
    let mut order: Vec<usize> = (0..tape.values.len()).filter(|&v| first[v] != usize::MAX).collect();
    order.sort_by_key(|&v| first[v]);
    let mut offsets = vec![0; tape.values.len()];
    let mut free: Vec<(u64, u64)> = vec![];
    let mut live: std::collections::BinaryHeap<std::cmp::Reverse<(usize, usize)>> = Default::default();
    let mut size = 0;
    for v in order {
        while let Some(&std::cmp::Reverse((end, old))) = live.peek() {
            if end >= first[v] {
                break;
            }
            live.pop();
            give_back(&mut free, offsets[old], padded(tape.values[old].bytes));
        }
        let bytes = padded(tape.values[v].bytes);
        let fit = free.iter().enumerate().filter(|(_, f)| f.1 >= bytes).min_by_key(|(_, f)| f.1);
        offsets[v] = match fit.map(|(i, f)| (i, *f)) {
            Some((i, (at, room))) => {
                match room == bytes {
                    true => {
                        free.remove(i);
                    }
                    false => free[i] = (at + bytes, room - bytes),
                }
                at
            }
            // The last gap grows, if it reaches the end.
            None => match free.last().copied() {
                Some((at, room)) if at + room == size => {
                    free.pop();
                    size = at + bytes;
                    at
                }
                _ => {
                    size += bytes;
                    size - bytes
                }
            },
        };
        live.push(std::cmp::Reverse((last[v], v)));
    }
    (offsets, size)
}

fn give_back(free: &mut Vec<(u64, u64)>, offset: u64, size: u64) {
    let at = free.partition_point(|&(o, _)| o < offset);
    free.insert(at, (offset, size));
    if at + 1 < free.len() && free[at].0 + free[at].1 == free[at + 1].0 {
        free[at].1 += free.remove(at + 1).1;
    }
    if at > 0 && free[at - 1].0 + free[at - 1].1 == free[at].0 {
        free[at - 1].1 += free.remove(at).1;
    }
}

/// A range of the arena, or a region outside of it.
#[derive(Debug, Clone, Copy)]
enum Area {
    Arena(u64, u64),
    Outer(u32),
}

/// Areas that were touched since the last barrier.
#[derive(Default)]
struct Touched(Vec<Area>);

impl Touched {
    fn meets(&self, area: Area) -> bool {
        self.0.iter().any(|&a| match (a, area) {
            (Area::Arena(a0, a1), Area::Arena(b0, b1)) => a0 < b1 && b0 < a1,
            // Regions do not overlap: each is a weight, or a value that a tape left.
            (Area::Outer(a), Area::Outer(b)) => a == b,
            _ => false,
        })
    }
}

fn barriers(tape: &Tape, offsets: &[u64]) -> Vec<bool> {
    let (mut read, mut written) = (Touched::default(), Touched::default());
    // Most of what lies outside of the arena is only read.
    let mut changed = vec![false; tape.outer.len()];
    for l in &tape.launches {
        for o in &l.operands[l.count - l.written..l.count] {
            if let Operand::Outer(o) = *o {
                changed[o as usize] = true;
            }
        }
    }
    let range = |o: &Operand| match *o {
        Operand::Value(v) => {
            let at = offsets[v as usize];
            Some(Area::Arena(at, at + padded(tape.values[v as usize].bytes)))
        }
        Operand::Outer(o) => changed[o as usize].then_some(Area::Outer(o)),
    };
    let needs = |l: &Launch| {
        let (reads, writes) = l.operands[..l.count].split_at(l.count - l.written);
        let reads: Vec<_> = reads.iter().filter_map(range).collect();
        let writes: Vec<_> = writes.iter().filter_map(range).collect();
        let hit = reads.iter().any(|&r| written.meets(r))
            || writes.iter().any(|&w| written.meets(w) || read.meets(w));
        if hit {
            read.0.clear();
            written.0.clear();
        }
        read.0.extend(reads);
        written.0.extend(writes);
        hit
    };
    tape.launches.iter().map(needs).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::kernels::Pipeline;
    use crate::tape::Builder;

    /// A chain: each launch reads the value before and writes the next.
    fn chain(length: usize) -> (Tape, Vec<std::sync::Arc<crate::tensor::Value>>) {
        let mut tape = Tape::default();
        let mut values = vec![tape.value(1000)];
        tape.bring(0, &[1; 1000]);
        for i in 0..length {
            values.push(tape.value(1000));
            Builder::new(&mut tape, Pipeline(0), [1, 1])
                .reads_value(&values[i])
                .unwrap()
                .writes(&values[i + 1])
                .unwrap()
                .launch();
        }
        (tape, values)
    }

    #[test]
    fn a_chain_needs_two_places_and_a_barrier_at_each_step() {
        let (mut tape, values) = chain(10);
        drop(values);
        let held = tape.held();
        let plan = plan(&tape, &held);
        assert_eq!(plan.size, 2 * 1024);
        assert!(!plan.barriers[0] && plan.barriers[1..].iter().all(|b| *b));
    }

    #[test]
    fn what_is_held_keeps_its_place_and_what_is_apart_needs_no_barrier() {
        let (mut tape, values) = chain(2);
        let other = tape.value(500);
        Builder::new(&mut tape, Pipeline(0), [1, 1])
            .reads_value(&values[1])
            .unwrap()
            .writes(&other)
            .unwrap()
            .launch();
        let held = tape.held();
        assert_eq!(held, [0, 1, 2, 3]);
        let plan = plan(&tape, &held);
        let mut ends: Vec<_> =
            (0..4).map(|i| (plan.offsets[i], plan.offsets[i] + tape.values[i].bytes)).collect();
        ends.sort();
        assert!(ends.windows(2).all(|w| w[0].1 <= w[1].0), "{ends:?}");
        assert_eq!(plan.barriers, [false, true, false]);
    }

    /// What launches change outside of the arena, such as a cache of keys, is guarded as what they write inside.
    #[test]
    fn what_is_changed_in_place_is_waited_for() {
        let memory = crate::memory::Memory::new(None, 1 << 30);
        let ready =
            || crate::tensor::Value::new(1000, crate::tensor::Place::Ready(memory.take(1000).unwrap()));
        let (cache, weight) = (ready(), ready());
        let mut tape = Tape::default();
        // Held, so that none takes another's place.
        let mut results = vec![];
        let mut launch = |read: &[&crate::tensor::Value], written: Option<&crate::tensor::Value>| {
            let own = tape.value(1000);
            let mut b = Builder::new(&mut tape, Pipeline(0), [1, 1]);
            for v in read {
                b = b.reads_value(v).unwrap();
            }
            b.writes(written.unwrap_or(&own)).unwrap().launch();
            results.push(own);
        };
        launch(&[&cache, &weight], None);
        launch(&[&weight], Some(&cache));
        launch(&[&weight], None);
        launch(&[&cache], None);
        launch(&[&cache], None);
        let held = tape.held();
        assert_eq!(plan(&tape, &held).barriers, [false, true, false, true, false]);
    }
}
