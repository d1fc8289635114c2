//! Attention: which key tiles each row of query tiles sees, and under which masks.

use std::sync::Arc;

use pi0_device::{Attention, Error, KeyValue, OpKind, Result, Span};

use super::{NAME, failed};
use crate::device::{Key, Tensix};
use crate::dram::Region;
use crate::error::Fault;
use crate::kernels::{ATTENDED, AttentionKernel, EltwiseOp, FIRST, LAST, MASKED, l1};
use crate::layout::{Format, TILE, push_tile, tiles};
use crate::tensor::{Heads, Tensor};

const OP: OpKind = OpKind::Attention;

/// For each of 32 queries the keys of a tile that it sees, one bit each.
type Mask = [u32; TILE];
const SEES_ALL: Mask = [u32::MAX; TILE];

/// A key tile that a row of query tiles sees.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Seen {
    part: usize,
    tile: usize,
    /// Index into the masks.
    mask: usize,
}

/// What a plan is made from.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct PlanKey {
    spans: Vec<Span>,
    queries: usize,
    /// Key rows of each part.
    parts: Vec<usize>,
    /// How the masks are stored: as the keys are.
    format: Format,
}

/// Keys or values in f32, by where they are, which other ones in bf16 came with. Holds on to them, so that others never have
/// their place. The last layer's of the prefix are the same in every step.
#[derive(Debug)]
pub(crate) struct Narrowed(Tensor);

impl PartialEq for Narrowed {
    fn eq(&self, Narrowed(b): &Self) -> bool {
        let Narrowed(a) = self;
        let place = |x: &Tensor| (x.first, x.pitch, x.rows, x.cols);
        Arc::ptr_eq(&a.region, &b.region) && place(a) == place(b)
    }
}

/// What each row of query tiles sees.
#[derive(Debug)]
pub(crate) struct Plan {
    rows: Vec<Vec<Seen>>,
    /// The first sees everything.
    masks: Vec<Mask>,
    /// Tiles of the masks, unless the first is the only one.
    tiles: Option<Region>,
}

/// Bits of keys `range` in the tile that starts at `start`.
fn bits(range: &std::ops::Range<usize>, start: usize) -> u32 {
    let from = range.start.clamp(start, start + TILE) - start;
    let to = range.end.clamp(start, start + TILE) - start;
    let below = |n: usize| if n == TILE { u32::MAX } else { (1 << n) - 1 };
    below(to) & !below(from)
}

impl Plan {
    fn new(key: &PlanKey) -> Self {
        let PlanKey { ref spans, queries, ref parts, .. } = *key;
        let mut plan = Plan { rows: Vec::new(), masks: vec![SEES_ALL], tiles: None };
        for row in 0..tiles(queries) {
            let own = row * TILE..((row + 1) * TILE).min(queries);
            let spans: Vec<&Span> =
                spans.iter().filter(|s| s.queries.start < own.end && s.queries.end > own.start).collect();
            let mut seen = Vec::new();
            for (part, &keys) in parts.iter().enumerate() {
                for tile in 0..tiles(keys) {
                    // Queries that fill the last tile see whatever their kernel computes: nobody reads them.
                    let mut mask = SEES_ALL;
                    for s in &spans {
                        let of_part = s.keys.iter().filter(|k| k.part == part);
                        let sees = of_part.fold(0, |m, k| m | bits(&k.rows, tile * TILE));
                        let rows = s.queries.start.max(own.start)..s.queries.end.min(own.end);
                        mask[rows.start - own.start..rows.end - own.start].fill(sees);
                    }
                    if mask[..own.len()].iter().any(|&m| m != 0) {
                        seen.push(Seen { part, tile, mask: plan.mask(mask) });
                    }
                }
            }
            plan.rows.push(seen);
        }
        plan
    }

    fn mask(&mut self, mask: Mask) -> usize {
        self.masks.iter().position(|m| *m == mask).unwrap_or_else(|| {
            self.masks.push(mask);
            self.masks.len() - 1
        })
    }

    /// Tiles `[key][query]` of what is added to a score.
    fn mask_tiles(&self, format: Format) -> Vec<u8> {
        let mut bytes = Vec::new();
        for mask in &self.masks {
            push_tile(
                &mut bytes,
                format,
                |key, query| {
                    if mask[query] >> key & 1 == 1 { 0.0 } else { MASKED }
                },
            );
        }
        bytes
    }
}

impl Tensix {
    pub(super) fn attention_op(
        &self,
        q: &Tensor,
        kv: &[KeyValue<'_, Tensor>],
        spec: &Attention<'_>,
    ) -> Result<Tensor> {
        spec.check(|t| [t.rows, t.cols], q, kv)?;
        if spec.spans.iter().any(overlapping) {
            return Err(Error::unsupported(NAME, OP, "a key that a query sees twice"));
        }
        let width = tiles(spec.head_dim);
        let stored_as_heads = q.heads.is_some();
        let (q, parts) = self.with_padded_heads(q, kv, spec)?;
        let rows: Vec<usize> = kv.iter().map(|p| p.k.rows).collect();
        let format = parts.first().map_or(Format::F32, |(k, _)| k.format);
        let key = PlanKey { spans: spec.spans.to_vec(), queries: q.rows, parts: rows, format };
        let plan = self.plans.get(key, |key| {
            let mut plan = Plan::new(key);
            if plan.masks.len() > 1 {
                plan.tiles = Some(self.region(&plan.mask_tiles(format), format).map_err(failed(OP))?);
            }
            Ok::<_, Error>(plan)
        })?;
        let key = AttentionKernel {
            width: width as u32,
            keys: plan.rows.iter().map(Vec::len).max().unwrap_or(0).next_multiple_of(8) as u32,
            masked: plan.tiles.is_some(),
            resident: false,
            scale: spec.scale.to_bits(),
            q: q.format,
            kv: format,
            banks: self.banks,
        };
        let resident = AttentionKernel { resident: true, ..key };
        let key = if !key.masked && resident.l1_bytes() <= self.l1_room() { resident } else { key };
        let y = self.tensor_of(q.rows, spec.heads * width * TILE, ATTENDED).map_err(failed(OP))?;
        let constants = self.constants().map_err(failed(OP))?;
        let identity = if q.format == Format::F32 { constants.identity } else { constants.identity_bf16 };
        let head = [y.base(), q.base(), plan.tiles.as_ref().map_or(0, Region::base), identity];
        // What an item sees, and where its queries and its result are. Those that see the same are neighbours.
        let mut items = Vec::new();
        for h in 0..spec.heads {
            let at = h / (spec.heads / spec.kv_heads) * width;
            for (row, seen) in plan.rows.iter().enumerate() {
                let keys = seen.iter().flat_map(|s| {
                    let (k, v) = &parts[s.part];
                    [k.base(), v.base(), k.tile(s.tile, at), v.tile(s.tile, at), s.mask as u32]
                });
                items.push((
                    [seen.len() as u32, y.tile(row, h * width), q.tile(row, h * width)],
                    keys.collect::<Vec<u32>>(),
                ));
            }
        }
        items.sort_by(|a, b| a.1.cmp(&b.1));
        self.run_attention(key, &head, &items).map_err(failed(OP))?;
        if spec.head_dim.is_multiple_of(TILE) {
            return Ok(y);
        }
        // Heads go out as they came.
        let y = y.as_heads(Heads { width: spec.head_dim });
        Ok(if stored_as_heads { y } else { self.plain(OP, &y)?.into_owned() })
    }

    /// Runs the kernel over items, each with its keys, spread over the cores so that neighbours stay together.
    fn run_attention(
        &self,
        key: AttentionKernel,
        head: &[u32],
        items: &[([u32; 3], Vec<u32>)],
    ) -> std::result::Result<(), Fault> {
        let words = items.iter().map(|(item, keys)| item.len() + 1 + keys.len()).max().unwrap_or(1);
        let (columns, rows) = self.grid();
        let cores = columns * rows;
        let room = (l1::ARG_WORDS - 1 - head.len()) / words;
        for round in items.chunks((room * cores).max(1)) {
            let each = round.len().div_ceil(cores);
            let args = |own: &[([u32; 3], Vec<u32>)]| {
                let mut args = vec![own.len() as u32];
                args.extend(head);
                for (i, (item, keys)) in own.iter().enumerate() {
                    let same = |n: usize| own.get(n).is_some_and(|(_, other)| other == keys);
                    let first = if i > 0 && same(i - 1) { 0 } else { FIRST };
                    let last = if same(i + 1) { 0 } else { LAST };
                    args.extend(item);
                    args.push(first | last);
                    args.extend(keys);
                }
                args
            };
            let work: Vec<_> = round.chunks(each).map(args).enumerate().collect();
            self.run_on(Key::Attention(key), &work)?;
        }
        Ok(())
    }

    /// `x` as bf16.
    fn in_bf16(&self, x: &Tensor) -> Result<Tensor> {
        let y = self.tensor_of(x.rows, x.cols, Format::Bf16).map_err(failed(OP))?;
        self.eltwise(OP, EltwiseOp::Copy, &y, &[x.base()], |r, c| vec![x.tile(r, c)])?;
        Ok(y)
    }

    /// The operands with every head starting at a tile, padded with zeros: keys and values all as bf16 if one of them came
    /// so, else all as f32.
    fn with_padded_heads(
        &self,
        q: &Tensor,
        kv: &[KeyValue<'_, Tensor>],
        spec: &Attention<'_>,
    ) -> Result<(Tensor, Vec<(Tensor, Tensor)>)> {
        let heads = Heads { width: spec.head_dim };
        let pad = |x: &Tensor| {
            if x.heads == Some(heads) {
                return Ok(x.as_stored());
            }
            if x.heads.is_none() && spec.head_dim.is_multiple_of(TILE) {
                return Ok(x.clone());
            }
            let x = self.plain(OP, x)?;
            if spec.head_dim.is_multiple_of(TILE) {
                return Ok(x.into_owned());
            }
            self.gather(OP, x.rows, heads.stored(x.cols), |r| (&*x, r), |c| heads.column(c))
        };
        let mut parts = kv.iter().map(|p| Ok((pad(p.k)?, pad(p.v)?))).collect::<Result<Vec<_>>>()?;
        let bf16 = |x: &Tensor| x.format == Format::Bf16;
        if parts.iter().any(|(k, v)| bf16(k) || bf16(v)) {
            for x in parts.iter_mut().flat_map(|(k, v)| [k, v]).filter(|x| !bf16(x)) {
                *x = (*self.narrowed.get(Narrowed(x.clone()), |Narrowed(x)| self.in_bf16(x))?).clone();
            }
        }
        Ok((pad(q)?, parts))
    }
}

/// Whether a span lists a key twice.
fn overlapping(span: &Span) -> bool {
    let mut keys: Vec<_> =
        span.keys.iter().filter(|k| !k.rows.is_empty()).map(|k| (k.part, k.rows.start, k.rows.end)).collect();
    keys.sort_unstable();
    keys.windows(2).any(|w| w[0].0 == w[1].0 && w[0].2 > w[1].1)
}

#[cfg(test)]
mod tests {
    use super::*;
    use pi0_device::Keys;

    #[test]
    fn plans_see_what_spans_say() {
        let keys = |part, rows| Keys { part, rows };
        let spans = vec![
            Span { queries: 0..1, keys: vec![keys(0, 0..45), keys(1, 0..1)] },
            Span { queries: 1..40, keys: vec![keys(0, 0..45), keys(1, 0..40)] },
        ];
        let plan = Plan::new(&PlanKey {
            spans: spans.clone(),
            queries: 40,
            parts: vec![80, 40],
            format: Format::F32,
        });
        // Key tile 2 of part 0 is seen by nobody.
        let seen: Vec<Vec<(usize, usize)>> =
            plan.rows.iter().map(|row| row.iter().map(|s| (s.part, s.tile)).collect()).collect();
        assert_eq!(seen, [[(0, 0), (0, 1), (1, 0), (1, 1)], [(0, 0), (0, 1), (1, 0), (1, 1)]]);
        for (row, tiles) in plan.rows.iter().enumerate() {
            for s in tiles {
                for q in (0..TILE).filter(|q| row * TILE + q < 40) {
                    for k in 0..TILE {
                        let (query, key) = (row * TILE + q, s.tile * TILE + k);
                        let span = spans.iter().find(|s| s.queries.contains(&query)).unwrap();
                        let want = span.keys.iter().any(|k| k.part == s.part && k.rows.contains(&key));
                        assert_eq!(plan.masks[s.mask][q] >> k & 1 == 1, want, "{query} {} {key}", s.part);
                    }
                }
            }
        }
    }

    #[test]
    fn whole_tiles_need_no_mask() {
        let spans = vec![Span { queries: 0..64, keys: vec![Keys { part: 0, rows: 0..96 }] }];
        let plan = Plan::new(&PlanKey { spans, queries: 64, parts: vec![96], format: Format::F32 });
        assert_eq!(plan.masks.len(), 1);
        assert!(plan.rows.iter().all(|row| row.len() == 3));
    }
}
