//! Attention over spans.

use std::sync::Arc;

use pi0_device::{Attention, Error, KeyValue, Keys, OpKind, Span, flops};

use super::Op;
use crate::device::{NAME, State, Vulkan};
use crate::error::Result;
use crate::kernels::Kernel;
use crate::tape::Builder;
use crate::tensor::{Tensor, Value};

/// Pairs of a query row and a head in a workgroup, of the kernels with multiply-adds and of those on matrices.
const PAIRS: [usize; 2] = [16, 32];
/// Parts of keys and values that a kernel can read.
const PARTS: usize = 3;
/// Workgroups of one launch.
const MOST_ITEMS: usize = 32768;
/// Keys that a workgroup takes at once: parts of a span's keys are multiples of it.
const CHUNK: usize = 32;
/// Spans of fewer keys are not cut: joining the parts would cost more than it brings.
const FEW_KEYS: usize = 4 * CHUNK;
/// Most parts of a span's keys.
const MOST_PARTS: usize = 32;
/// Processors of a GPU that does not say how many it has.
const PROCESSORS: u32 = 64;

/// Into how many parts a span's keys are cut, so that a workgroup for each fills a GPU: nothing but the span itself
/// decides, since a robot's actions must not depend on its neighbours, and of its keys only the power of two, since the
/// launches stay the same while an answer grows by a key with each token.
fn parts(keys: usize, groups: usize, processors: usize) -> usize {
    if keys < FEW_KEYS || groups == 0 {
        return 1;
    }
    let wanted = (processors / groups).max(1);
    (1 << wanted.ilog2()).min(keys.next_power_of_two() / CHUNK).min(MOST_PARTS)
}

/// What the kernels' table holds: items, then runs of keys, then the joins of parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Table {
    items: usize,
    /// None where no keys are cut.
    joins: usize,
    joins_at: usize,
}

/// A table that is on the tape, and the call that it is of: it is the same in every layer.
pub(crate) struct Known {
    spans: Vec<Span>,
    heads: [usize; 2],
    table: Table,
    value: Arc<Value>,
}

fn table(spec: &Attention<'_>, pairs_each: usize, processors: usize) -> (Table, Vec<u32>) {
    let group = spec.heads / spec.kv_heads;
    let (mut items, mut runs, mut joins) = (Vec::new(), Vec::new(), Vec::new());
    let (mut count, mut cut) = (0, false);
    for span in spec.spans {
        let first = runs.len() / 3;
        for k in span.keys.iter().filter(|k| !k.rows.is_empty()) {
            runs.extend([k.part, k.rows.start, k.rows.end].map(|v| v as u32));
        }
        let (end, pairs) = (runs.len() / 3, span.queries.len() * group);
        let keys: usize = span.keys.iter().map(|k| k.rows.len()).sum();
        let parts = parts(keys, spec.kv_heads * pairs.div_ceil(pairs_each), processors);
        let length = if parts == 1 { keys } else { keys.div_ceil(parts).next_multiple_of(CHUNK) };
        cut |= parts > 1;
        for kv_head in 0..spec.kv_heads {
            for pair in (0..pairs).step_by(pairs_each) {
                let head =
                    [span.queries.start, pair, pairs_each.min(pairs - pair), kv_head].map(|v| v as u32);
                joins.extend(head);
                joins.extend([count as u32, parts as u32]);
                for part in 0..parts {
                    items.extend(head);
                    let start = (part * length).min(keys);
                    items.extend([first, end, start, keys.min(start + length)].map(|v| v as u32));
                    count += 1;
                }
            }
        }
    }
    let mut words = items;
    words.extend(runs);
    let joins_at = words.len();
    if !cut {
        joins.clear();
    }
    words.extend(&joins);
    (Table { items: count, joins: joins.len() / 6, joins_at }, words)
}

impl Vulkan {
    pub(crate) fn attend(
        &self,
        q: &Tensor,
        kv: &[KeyValue<'_, Tensor>],
        spec: &Attention<'_>,
    ) -> pi0_device::Result<Tensor> {
        if spec.head_dim > 256 {
            let why = format!("heads of {} columns; at most 256", spec.head_dim);
            return Err(Error::unsupported(NAME, OpKind::Attention, why));
        }
        if kv.len() <= PARTS {
            return self.write(|s| self.launch_attention(s, q, kv, spec));
        }
        // More parts than a kernel reads stand below each other first.
        let mut starts = vec![0];
        starts.extend(kv.iter().scan(0, |row, p| {
            *row += p.k.rows;
            Some(*row)
        }));
        let moved = |k: &Keys| {
            let start = starts[k.part];
            Keys { part: 0, rows: start + k.rows.start..start + k.rows.end }
        };
        let spans: Vec<Span> = spec
            .spans
            .iter()
            .map(|s| Span { queries: s.queries.clone(), keys: s.keys.iter().map(moved).collect() })
            .collect();
        let all = |of: fn(&KeyValue<'_, Tensor>) -> Tensor| kv.iter().map(of).collect::<Vec<_>>();
        let (k, v) = (all(|p| p.k.clone()), all(|p| p.v.clone()));
        self.write(|s| {
            let k = self.below_each_other(s, &k.iter().collect::<Vec<_>>())?;
            let v = self.below_each_other(s, &v.iter().collect::<Vec<_>>())?;
            let spec = Attention { spans: &spans, ..*spec };
            self.launch_attention(s, q, &[KeyValue { k: &k, v: &v }], &spec)
        })
    }

    fn launch_attention(
        &self,
        s: &mut State,
        q: &Tensor,
        kv: &[KeyValue<'_, Tensor>],
        spec: &Attention<'_>,
    ) -> Result<Tensor> {
        if q.rows == 0 {
            return self.empty(s, q.rows, q.cols);
        }
        let pairs_each = PAIRS[usize::from(self.attention.is_some())];
        let (cuts, table) = self.spans_table(s, spec, pairs_each)?;
        let mut key = s.key(Op::Attention);
        s.tape.tensor(&mut key, q);
        for part in kv {
            s.tape.tensor(&mut key, part.k);
            s.tape.tensor(&mut key, part.v);
        }
        s.tape.name(&mut key, &table);
        key.sizes([cuts.items, cuts.joins, cuts.joins_at, spec.heads, spec.kv_heads, spec.head_dim]);
        key.words(&[spec.scale.to_bits()]);
        let [y] = s.call(key, |s| {
            let y = Tensor::whole(self.value(s, q.rows, q.cols)?, q.rows, q.cols);
            self.launch_items(s, q, kv, spec, (cuts, &table), &y)?;
            Ok([y.value])
        })?;
        Ok(Tensor::whole(y, q.rows, q.cols))
    }

    fn launch_items(
        &self,
        s: &mut State,
        q: &Tensor,
        kv: &[KeyValue<'_, Tensor>],
        spec: &Attention<'_>,
        (Table { items, joins, joins_at }, table): (Table, &Arc<Value>),
        y: &Tensor,
    ) -> Result<()> {
        let pairs_each = PAIRS[usize::from(self.attention.is_some())];
        // Where keys are cut, what the launches write is sums of parts, which the last launch joins.
        let sums = match joins {
            0 => y.clone(),
            _ => {
                let cols = pairs_each * (spec.head_dim + 2);
                Tensor::whole(self.value(s, items, cols)?, items, cols)
            }
        };
        let kernel = match (spec.head_dim, self.attention) {
            (0..=128, Some(units)) => Kernel::AttentionMatrix128(units),
            (_, Some(units)) => Kernel::AttentionMatrix256(units),
            (0..=32, None) => Kernel::Attention32,
            (33..=64, None) => Kernel::Attention64,
            (65..=128, None) => Kernel::Attention128,
            (_, None) => Kernel::Attention256,
        };
        let pipeline = s.pipeline(kernel, &[u32::from(joins > 0)])?;
        let of = |f: fn(&KeyValue<'_, Tensor>) -> u32| {
            let mut words = [0; PARTS];
            words.iter_mut().zip(kv).for_each(|(w, p)| *w = f(p));
            words
        };
        for first in (0..items).step_by(MOST_ITEMS) {
            let count = MOST_ITEMS.min(items - first);
            let mut b = Builder::new(&mut s.tape, pipeline, [count as u32, 1]).reads(q)?;
            for i in 0..PARTS {
                b = match kv.get(i) {
                    Some(part) => b.reads(part.k)?.reads(part.v)?,
                    None => b.nothing().nothing(),
                };
            }
            let group = spec.heads / spec.kv_heads;
            let words = [spec.head_dim, group, q.offset, q.stride, q.cols].map(|v| v as u32);
            b.reads_value(table)?
                .writes(&sums.value)?
                .push(&words)
                .push(&[spec.scale.to_bits(), first as u32, items as u32 * 8])
                .push(&of(|p| p.k.offset as u32))
                .push(&of(|p| p.k.stride as u32))
                .push(&of(|p| p.v.offset as u32))
                .push(&of(|p| p.v.stride as u32))
                .shape([q.rows, kv.iter().map(|p| p.k.rows).sum(), q.cols])
                .flop(flops::attention(spec) * count as u64 / items as u64)
                .launch();
        }
        if joins > 0 {
            self.launch_joins(s, &sums, table, [joins, joins_at, pairs_each], spec, y)?;
        }
        Ok(())
    }

    /// The table of a call on the tape.
    fn spans_table(
        &self,
        s: &mut State,
        spec: &Attention<'_>,
        pairs_each: usize,
    ) -> Result<(Table, Arc<Value>)> {
        let heads = [spec.heads, spec.kv_heads];
        let known = s.tape.spans.iter().rev().find(|k| k.heads == heads && k.spans == spec.spans);
        if let Some(known) = known {
            return Ok((known.table, known.value.clone()));
        }
        let processors = self.info().processors.unwrap_or(PROCESSORS) as usize;
        let (table, words) = table(spec, pairs_each, processors);
        let value = s.integers(&words)?;
        s.tape.spans.push(Known { spans: spec.spans.to_vec(), heads, table, value: value.clone() });
        Ok((table, value))
    }

    fn launch_joins(
        &self,
        s: &mut State,
        sums: &Tensor,
        table: &Value,
        [joins, joins_at, pairs_each]: [usize; 3],
        spec: &Attention<'_>,
        y: &Tensor,
    ) -> Result<()> {
        let pipeline = s.pipeline(Kernel::AttentionJoin, &[])?;
        for first in (0..joins).step_by(MOST_ITEMS) {
            let count = MOST_ITEMS.min(joins - first);
            let group = spec.heads / spec.kv_heads;
            Builder::new(&mut s.tape, pipeline, [count as u32, pairs_each as u32])
                .reads(sums)?
                .reads_value(table)?
                .writes(&y.value)?
                .push(&[spec.head_dim, group, y.cols, pairs_each, first, joins_at].map(|v| v as u32))
                .shape([y.rows, sums.rows, y.cols])
                .flop(3 * (sums.rows * sums.cols) as u64 * count as u64 / joins as u64)
                .launch();
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Two cameras on an RTX 4090, an Orin and an answer's token; few keys and many queries are left whole.
    #[test]
    fn keys_are_cut_to_fill_a_gpu() {
        let of = |keys, groups, processors| parts(keys, groups, processors);
        assert_eq!([of(611, 13, 128), of(611, 13, 16), of(611, 1, 128)], [8, 1, 32]);
        assert_eq!([of(560, 140, 128), of(127, 1, 128), of(128, 1, 128), of(0, 0, 128)], [1, 1, 4, 1]);
    }

    /// Every key of a span is walked over once, and the parts of a group stand side by side.
    #[test]
    fn parts_are_all_keys_once() {
        let span = |queries, keys| Span { queries, keys };
        let run = |rows| Keys { part: 0, rows };
        let spans = [span(0..3, vec![run(0..5)]), span(3..54, vec![run(2..400), run(0..0), run(500..713)])];
        let spec = Attention { heads: 8, kv_heads: 1, head_dim: 4, scale: 1.0, spans: &spans };
        let (t, words) = table(&spec, 32, 128);
        let item = |i: usize| &words[8 * i..8 * i + 8];
        let mut next = 0;
        for join in words[t.joins_at..].chunks_exact(6) {
            assert_eq!(join[4], next);
            let (mut at, keys) = (0, if join[0] == 0 { 5 } else { 611 });
            for i in next..next + join[5] {
                assert_eq!(item(i as usize)[..4], join[..4]);
                assert_eq!(item(i as usize)[6], at);
                at = item(i as usize)[7];
            }
            assert_eq!(at, keys);
            next += join[5];
        }
        // One group of the first span, whole, and 13 of the second in eight parts.
        assert_eq!((t.joins, t.items, next as usize), (14, 1 + 13 * 8, t.items));
        let (alone, words) = table(&Attention { spans: &spans[..1], ..spec }, 32, 128);
        assert_eq!(alone, Table { items: 1, joins: 0, joins_at: words.len() });
    }
}
