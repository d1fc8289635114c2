//! Attention over spans.

use pi0_device::{Attention, Error, KeyValue, Keys, OpKind, Span, flops};

use crate::device::{NAME, State, Vulkan};
use crate::error::Result;
use crate::kernels::Kernel;
use crate::tape::Builder;
use crate::tensor::Tensor;

/// Pairs of a query row and a head in a workgroup, of the kernels with multiply-adds and of those on matrices.
const PAIRS: [usize; 2] = [16, 32];
/// Parts of keys and values that a kernel can read.
const PARTS: usize = 3;
/// Workgroups of one launch.
const MOST_ITEMS: usize = 32768;

/// The kernel's table: items, then runs of keys; and how many items there are.
fn table(spec: &Attention<'_>, pairs_each: usize) -> (Vec<u32>, usize) {
    let group = spec.heads / spec.kv_heads;
    let (mut items, mut runs) = (Vec::new(), Vec::new());
    for span in spec.spans {
        let first = runs.len() / 3;
        for k in span.keys.iter().filter(|k| !k.rows.is_empty()) {
            runs.extend([k.part, k.rows.start, k.rows.end].map(|v| v as u32));
        }
        let (end, pairs) = (runs.len() / 3, span.queries.len() * group);
        for kv_head in 0..spec.kv_heads {
            for pair in (0..pairs).step_by(pairs_each) {
                let count = pairs_each.min(pairs - pair);
                items.extend([span.queries.start, pair, count, kv_head, first, end].map(|v| v as u32));
            }
        }
    }
    let count = items.len() / 6;
    items.extend(runs);
    (items, count)
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
        let y = self.tensor(s, q.rows, q.cols)?;
        let (table, items) = table(spec, PAIRS[usize::from(self.attention.is_some())]);
        if items == 0 {
            return Ok(y);
        }
        let table = s.tape.integers(&table);
        let kernel = match (spec.head_dim, self.attention) {
            (0..=128, Some(units)) => Kernel::AttentionMatrix128(units),
            (_, Some(units)) => Kernel::AttentionMatrix256(units),
            (0..=32, None) => Kernel::Attention32,
            (33..=64, None) => Kernel::Attention64,
            (65..=128, None) => Kernel::Attention128,
            (_, None) => Kernel::Attention256,
        };
        let pipeline = s.pipeline(kernel, &[])?;
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
            b.reads_value(&table)?
                .writes(&y.value)?
                .push(&words)
                .push(&[spec.scale.to_bits(), first as u32, items as u32 * 6])
                .push(&of(|p| p.k.offset as u32))
                .push(&of(|p| p.k.stride as u32))
                .push(&of(|p| p.v.offset as u32))
                .push(&of(|p| p.v.stride as u32))
                .shape([q.rows, kv.iter().map(|p| p.k.rows).sum(), q.cols])
                .flop(flops::attention(spec) * count as u64 / items as u64)
                .launch();
        }
        Ok(y)
    }
}
