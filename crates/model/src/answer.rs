//! π0-FAST's answer: behind the prompt the language model goes on by itself, token by token, until it has written what a
//! codec reads a chunk of actions from. Where that is asked for, a pass also reads tokens that may come next
//! ([`crate::propose`]), and writes as many more as were guessed right.
//!
//! Shapes: B robots, N rows of a pass (the tokens of those still writing), W the language model's width, V tokens to choose
//! from.

use pi0_device::{Dense, Device, HostTensor, Largest, Norm, Scope, dense, store_rows};
use rand_chacha::ChaCha12Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

use crate::gemma::{Extent, LayerCache, pick_rows};
use crate::layout::Layout;
use crate::pi0::PrefixCache;
use crate::propose::{Recent, propose};
use crate::weights::{EMBED, LM_HEAD, Weights};
use crate::{AnswerConfig, Config, EOS, Inputs, ModelError, Pi0, SampleOptions};

/// Lengths of an answer that make sense.
const LENGTHS: std::ops::RangeInclusive<usize> = 1..=4096;

/// Rows of a pass at most, tokens of all robots and guesses together, where there are guesses.
const PASS_ROWS: usize = 8;

/// What of the network only answers need.
pub(crate) struct Answer<D: Device> {
    /// From the last layer to logits.
    head: D::Weight,
    config: AnswerConfig,
    /// Whether of the prompt's last layer only the last rows are computed: nothing reads the others.
    last_rows_only: bool,
    /// What proposals are taken from.
    recent: Recent,
}

/// A robot's answer while it is written.
struct Writer {
    robot: usize,
    text: Vec<u32>,
    chooser: Chooser,
    /// Tokens that are worth proposing: more where the last ones were right.
    trust: usize,
}

/// Keys and values of what was written: each robot has `room` rows in each layer.
pub(crate) struct Written<D: Device> {
    layers: Vec<LayerCache<D>>,
    room: usize,
    /// Tokens of each robot whose keys and values are here.
    counts: Vec<usize>,
}

impl<D: Device> Answer<D> {
    pub(crate) fn load(c: &Config, w: &Weights<'_, D>, extent: Extent) -> Result<Self, ModelError> {
        let config =
            c.answer.clone().ok_or_else(|| ModelError::Call("a network without an answer".into()))?;
        let beyond = |ids: &[u32]| ids.iter().any(|&id| id as usize >= c.vocab_size);
        if config.only.as_deref().is_some_and(|ids| ids.is_empty() || beyond(ids)) {
            let what =
                format!("the tokens to choose from are none or beyond the vocabulary of {}", c.vocab_size);
            return Err(ModelError::Call(what));
        }
        let head = w.rows(if config.tied { EMBED } else { LM_HEAD }, config.only.as_deref())?;
        Ok(Self { head, config, last_rows_only: extent == Extent::Cache, recent: Recent::default() })
    }

    /// The token behind row `i` of the logits.
    fn token(&self, i: usize) -> u32 {
        self.config.only.as_ref().map_or(i as u32, |ids| ids[i])
    }
}

impl<D: Device> Written<D> {
    /// Takes back the last `n` tokens of a robot.
    fn forget(&mut self, robot: usize, n: usize) {
        self.counts[robot] -= n;
    }
}

impl<D: Device> Pi0<D> {
    /// The tokens `[1, n]` of each robot's answer, its end mark included. A robot that has ended takes no further part:
    /// what one writes does not depend on the others.
    pub(crate) fn write_answers(
        &self,
        answer: &Answer<D>,
        batch: &[Inputs],
        options: &SampleOptions,
    ) -> Result<Vec<HostTensor>, ModelError> {
        let d = self.device();
        let layout = Layout::new(self.config(), batch)?;
        let limit = options.steps.unwrap_or(answer.config.max_tokens);
        if !LENGTHS.contains(&limit) {
            let what = format!("answers of {limit} tokens; from 1 to 4096 make sense, 256 is usual");
            return Err(ModelError::Call(what));
        }
        let (prefix, mut last) = self.read_prompt(batch, &layout)?;
        let mut written = self.nothing_written(batch.len(), limit - 1)?;
        // Nothing is guessed of what is drawn by chance.
        let most =
            if answer.config.temperature > 0.0 { 0 } else { answer.config.speculate.min(PASS_ROWS - 1) };
        let before = if most > 0 { answer.recent.answers() } else { Vec::new() };
        let writer = |robot| Writer {
            robot,
            text: Vec::new(),
            chooser: Chooser::new(answer.config.temperature, options.seed.wrapping_add(robot as u64)),
            trust: most,
        };
        let mut writing: Vec<Writer> = (0..batch.len()).map(writer).collect();
        let mut texts: Vec<Vec<u32>> = vec![Vec::new(); batch.len()];
        let mut proposed: Vec<Vec<u32>> = vec![Vec::new(); batch.len()];
        for pass in 0.. {
            let _scope = Scope::new(d, format_args!("step{pass}"));
            if pass > 0 {
                // Robots share the rows of one that is alone.
                let share = ((most + 1) / writing.len()).saturating_sub(1);
                let proposals =
                    |w: &Writer| propose(&w.text, &before, w.trust.min(share).min(limit - w.text.len() - 1));
                proposed = writing.iter().map(proposals).collect();
                let rows = writing.iter().zip(&proposed);
                let tokens: Vec<Vec<u32>> =
                    rows.map(|(w, next)| w.text.last().into_iter().chain(next).copied().collect()).collect();
                let robots: Vec<usize> = writing.iter().map(|w| w.robot).collect();
                last = self.read_tokens(&tokens, &robots, &layout, &prefix, &mut written)?;
            }
            let mut chosen = self.choose(answer, &last, &mut writing)?.into_iter();
            for (w, next) in writing.iter_mut().zip(&proposed) {
                let end = batch[w.robot].end.unwrap_or(EOS);
                let rows: Vec<Largest> = chosen.by_ref().take(1 + next.len()).collect();
                // Behind a wrong guess nothing is what it would be.
                let mut right = 0;
                for row in rows {
                    self.check_finite(&[row.value])?;
                    w.text.push(answer.token(row.at));
                    if w.text.last() == Some(&end) || w.text.last() != next.get(right) {
                        break;
                    }
                    right += 1;
                }
                written.forget(w.robot, next.len() - right);
                w.trust = most.min(2 * (right + 1));
            }
            writing.retain_mut(|w| {
                let end = batch[w.robot].end.unwrap_or(EOS);
                let over = w.text.last() == Some(&end) || w.text.len() == limit;
                if over {
                    texts[w.robot] = std::mem::take(&mut w.text);
                }
                !over
            });
            if writing.is_empty() {
                break;
            }
        }
        if most > 0 {
            texts.iter().for_each(|text| answer.recent.remember(text));
        }
        let tensor =
            |text: Vec<u32>| HostTensor::new([1, text.len()], text.iter().map(|&t| t as f32).collect());
        Ok(texts.into_iter().map(tensor).collect())
    }

    /// Runs the prompt: its keys and values, and the last layer's output `[B, W]` of each robot's last row.
    pub(crate) fn read_prompt(
        &self,
        batch: &[Inputs],
        layout: &Layout,
    ) -> Result<(PrefixCache<D>, D::Tensor), ModelError> {
        let (d, answer) = (self.device(), self.answer()?);
        let embs = self.embed_prefix(batch, layout)?;
        let _scope = Scope::new(d, format_args!("prefix"));
        let (positions, spans, rows) = (layout.prefix_positions(), layout.prefix_spans(), layout.last_rows());
        let mut cache = Vec::with_capacity(self.language.layers().len());
        let keep = |layer| cache.push(layer);
        let whole = || ModelError::Call("the language model is not loaded whole".into());
        let last = if answer.last_rows_only {
            let last_spans = layout.last_row_spans();
            self.language
                .forward_to(d, embs, &positions, &spans, &rows, &last_spans, keep)?
                .ok_or_else(whole)?
        } else {
            let out =
                self.language.forward(d, embs, &positions, &[], &spans, None, keep)?.ok_or_else(whole)?;
            if let Some(Norm::Rms(norm)) = self.language.norm(d, None) {
                d.tap("norm", &d.rms_norm(&out, norm)?);
            }
            pick_rows(d, &out, &rows)?
        };
        Ok((PrefixCache(cache), last))
    }

    /// Room for the keys and values of answers of `room` tokens.
    pub(crate) fn nothing_written(&self, robots: usize, room: usize) -> Result<Written<D>, ModelError> {
        let (d, g) = (self.device(), &self.config().gemma);
        let (rows, cols) = (robots * room.max(1), g.num_kv_heads * g.head_dim);
        let zeros = vec![0.0; rows * cols];
        let empty = || d.upload(rows, cols, &zeros);
        let layers = (0..g.depth).map(|_| Ok(LayerCache { k: empty()?, v: empty()? }));
        let layers = layers.collect::<Result<_, ModelError>>()?;
        Ok(Written { layers, room: room.max(1), counts: vec![0; robots] })
    }

    /// Runs some tokens of each of `robots` through the language model, each seeing those before it, and keeps their keys
    /// and values: the last layer's output `[N, W]`.
    pub(crate) fn read_tokens(
        &self,
        tokens: &[Vec<u32>],
        robots: &[usize],
        layout: &Layout,
        prefix: &PrefixCache<D>,
        written: &mut Written<D>,
    ) -> Result<D::Tensor, ModelError> {
        let (d, c, config) = (self.device(), self.config(), &self.answer()?.config);
        let _scope = Scope::new(d, format_args!("answer"));
        // Robot of each row, and how many tokens of it come before.
        let lengths: Vec<usize> = tokens.iter().map(Vec::len).collect();
        let rows: Vec<(usize, usize)> = robots
            .iter()
            .zip(&lengths)
            .flat_map(|(&robot, &n)| {
                (written.counts[robot]..written.counts[robot] + n).map(move |i| (robot, i))
            })
            .collect();
        let position =
            |&(robot, i): &(usize, usize)| (layout.prefix_len(robot) + config.skipped_positions + i) as u32;
        let positions: Vec<u32> = rows.iter().map(position).collect();
        let spans = layout.token_spans(robots, &lengths, &written.counts, written.room);
        let tokens = tokens.concat();
        let embs = d.embed(&self.embed_tokens, &tokens, (c.gemma.width as f32).sqrt())?;
        let mut new = Vec::with_capacity(written.layers.len());
        let cached = [prefix.0.as_slice(), &written.layers];
        let out =
            self.language.forward(d, embs, &positions, &cached, &spans, None, |layer| new.push(layer))?;
        let at: Vec<u32> = rows.iter().map(|&(robot, i)| (robot * written.room + i) as u32).collect();
        for (layer, new) in written.layers.iter_mut().zip(&new) {
            store_rows(d, &mut layer.k, &at, &new.k)?;
            store_rows(d, &mut layer.v, &at, &new.v)?;
        }
        robots.iter().zip(lengths).for_each(|(&robot, n)| written.counts[robot] += n);
        out.ok_or_else(|| ModelError::Call("the language model is not loaded whole".into()))
    }

    /// What comes behind each of the rows `[N, W]` of the last layer, as its place among the tokens to choose from and
    /// its logit. Only where the likeliest is taken may a writer have more rows than one.
    fn choose(
        &self,
        answer: &Answer<D>,
        last: &D::Tensor,
        writing: &mut [Writer],
    ) -> Result<Vec<Largest>, ModelError> {
        if answer.config.temperature > 0.0 {
            let logits = self.logits(answer, last)?;
            let draw = |(row, w): (usize, &mut Writer)| {
                let at = w.chooser.choose(logits.row(row));
                Largest { at, value: logits.row(row)[at] }
            };
            return Ok(writing.iter_mut().enumerate().map(draw).collect());
        }
        // The likeliest is found where the logits are.
        Ok(self.device().largest(&self.likelihoods(answer, last)?)?)
    }

    /// How likely each token comes next, `[N, V]`, behind rows `[N, W]` of the last layer.
    pub(crate) fn logits(&self, answer: &Answer<D>, last: &D::Tensor) -> Result<HostTensor, ModelError> {
        let logits = self.device().download(&self.likelihoods(answer, last)?)?;
        self.check_finite(&logits.data)?;
        Ok(logits)
    }

    fn likelihoods(&self, answer: &Answer<D>, last: &D::Tensor) -> Result<D::Tensor, ModelError> {
        let d = self.device();
        let _scope = Scope::new(d, format_args!("answer"));
        let norm = self.language.norm(d, None);
        let logits = dense(d, &Dense { norm, ..Dense::new(last, &answer.head) })?;
        d.tap("logits", &logits);
        Ok(logits)
    }
}

/// Draws a robot's tokens by chance, at a temperature.
struct Chooser {
    temperature: f32,
    rng: ChaCha12Rng,
}

impl Chooser {
    fn new(temperature: f32, seed: u64) -> Self {
        Self { temperature, rng: ChaCha12Rng::seed_from_u64(seed) }
    }

    fn choose(&mut self, logits: &[f32]) -> usize {
        let Largest { at: first, value: most } = Largest::of(logits);
        let weight = |&x: &f32| f64::from((x - most) / self.temperature).exp();
        let total: f64 = logits.iter().map(weight).sum();
        // 53 random bits, as many as an f64 has.
        let mut left = (self.rng.next_u64() >> 11) as f64 / (1u64 << 53) as f64 * total;
        for (i, x) in logits.iter().enumerate() {
            left -= weight(x);
            if left < 0.0 {
                return i;
            }
        }
        first
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn tokens_are_drawn_as_often_as_they_are_likely() {
        let logits = [0.0, 1.0, 2.0, -50.0];
        for temperature in [0.5f32, 1.0, 3.0] {
            let mut chooser = Chooser::new(temperature, 7);
            let mut counts = [0usize; 4];
            (0..20_000).for_each(|_| counts[chooser.choose(&logits)] += 1);
            let weights = logits.map(|x| f64::from(x / temperature).exp());
            let total: f64 = weights.iter().sum();
            for (count, weight) in counts.iter().zip(weights) {
                let (got, want) = (*count as f64 / 20_000.0, weight / total);
                assert!((got - want).abs() < 0.02, "{temperature}: {counts:?}");
            }
        }
        let draw = |seed| {
            (0..20)
                .map({
                    let mut chooser = Chooser::new(1.0, seed);
                    move |_| chooser.choose(&logits)
                })
                .collect::<Vec<_>>()
        };
        assert_eq!(draw(3), draw(3));
        assert_ne!(draw(3), draw(4));
    }
}
