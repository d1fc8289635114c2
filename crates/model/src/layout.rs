//! How the rows of a batch are packed: only what exists has a row.
//!
//! The prefix holds the images of every robot of the batch, then the tokens of every robot:
//! `[image rows of 0, of 1, …, token rows of 0, of 1, …]`. The suffix holds the state rows of all robots (of π0, first
//! step only), then their action rows. Attention's spans tie together what belongs to one robot.

use std::ops::Range;

use pi0_device::{Keys, Span};

use crate::{Config, Inputs, Kind, ModelError, Rtc};

/// Where everything of a batch lies.
#[derive(Debug, Clone, PartialEq)]
pub struct Layout {
    /// Robot and camera of each image, in packed order.
    pub images: Vec<(usize, usize)>,
    /// Image rows of each robot in the prefix.
    pub image_rows: Vec<Range<usize>>,
    /// Token rows of each robot in the prefix.
    pub token_rows: Vec<Range<usize>>,
    /// Tokens of one image.
    pub patches: usize,
    /// Actions of one chunk.
    pub horizon: usize,
    /// Whether each robot has a state row before its actions: π0 has, π0.5 has not.
    pub state_rows: bool,
}

impl Layout {
    /// Packs `batch` after checking it against the model's sizes.
    pub fn new(config: &Config, batch: &[Inputs]) -> Result<Self, ModelError> {
        let Some(first) = batch.first() else { return Err(ModelError::Call("an empty batch".into())) };
        let patches = config.vision.patches();
        let mut layout = Self {
            images: Vec::new(),
            image_rows: Vec::new(),
            token_rows: Vec::new(),
            patches,
            horizon: config.horizon,
            state_rows: config.kind.reads_state(),
        };
        for (row, inputs) in batch.iter().enumerate() {
            check(config, inputs, first.images.len()).map_err(|what| ModelError::Input { row, what })?;
            let start = layout.images.len();
            layout
                .images
                .extend((0..inputs.images.len()).filter(|&c| inputs.images[c].is_some()).map(|c| (row, c)));
            layout.image_rows.push(start * patches..layout.images.len() * patches);
        }
        let mut next = layout.images.len() * patches;
        for inputs in batch {
            let tokens = inputs.tokens.len() + usize::from(config.last_of_prompt().is_some());
            layout.token_rows.push(next..next + tokens);
            next += tokens;
        }
        Ok(layout)
    }

    /// Robots in the batch.
    pub fn batch(&self) -> usize {
        self.image_rows.len()
    }

    /// Rows of the packed prefix.
    pub fn prefix_rows(&self) -> usize {
        self.token_rows.last().map_or(0, |r| r.end)
    }

    /// Valid prefix rows of one robot: where its suffix positions begin.
    pub fn prefix_len(&self, robot: usize) -> usize {
        self.image_rows[robot].len() + self.token_rows[robot].len()
    }

    /// Position of each prefix row: `cumsum(mask) - 1` of the references.
    pub fn prefix_positions(&self) -> Vec<u32> {
        let images = self.image_rows.iter().flat_map(|r| 0..r.len());
        let tokens =
            self.token_rows.iter().zip(&self.image_rows).flat_map(|(t, i)| i.len()..i.len() + t.len());
        images.chain(tokens).map(|p| p as u32).collect()
    }

    /// Keys of one robot's whole prefix, as part `part`.
    fn prefix_keys(&self, robot: usize, part: usize) -> Vec<Keys> {
        let (images, tokens) = (self.image_rows[robot].clone(), self.token_rows[robot].clone());
        if images.end == tokens.start {
            return vec![Keys { part, rows: images.start..tokens.end }];
        }
        vec![Keys { part, rows: images }, Keys { part, rows: tokens }]
    }

    /// The last prefix row of each robot: what π0-FAST's answer is the continuation of.
    pub fn last_rows(&self) -> Vec<usize> {
        let last = |(tokens, images): (&Range<usize>, &Range<usize>)| {
            if tokens.is_empty() { images.end - 1 } else { tokens.end - 1 }
        };
        self.token_rows.iter().zip(&self.image_rows).map(last).collect()
    }

    /// One row for each robot, which sees the robot's prefix.
    pub fn last_row_spans(&self) -> Vec<Span> {
        (0..self.batch()).map(|b| Span { queries: b..b + 1, keys: self.prefix_keys(b, 0) }).collect()
    }

    /// New tokens of each of `robots`, so many as `new` says, behind `written[robot]` others; each sees those before it.
    /// Part 0 is the tokens' own rows, part 1 the prefix, part 2 what was written before, of robot b from row `b * room` on.
    pub fn token_spans(&self, robots: &[usize], new: &[usize], written: &[usize], room: usize) -> Vec<Span> {
        let mut spans = Vec::with_capacity(new.iter().sum());
        for (&robot, &new) in robots.iter().zip(new) {
            let (own, start) = (spans.len(), robot * room);
            let before = (written[robot] > 0).then(|| Keys { part: 2, rows: start..start + written[robot] });
            for row in own..own + new {
                let own = Keys { part: 0, rows: own..row + 1 };
                let keys =
                    self.prefix_keys(robot, 1).into_iter().chain(before.clone()).chain([own]).collect();
                spans.push(Span { queries: row..row + 1, keys });
            }
        }
        spans
    }

    /// Every prefix row sees every prefix row of its robot: no causality.
    pub fn prefix_spans(&self) -> Vec<Span> {
        let span = |robot, queries| Span { queries, keys: self.prefix_keys(robot, 0) };
        if self.batch() == 1 {
            return vec![span(0, 0..self.prefix_rows())];
        }
        let images = self.image_rows.iter().enumerate();
        let tokens = self.token_rows.iter().enumerate();
        images
            .chain(tokens)
            .map(|(robot, rows)| span(robot, rows.clone()))
            .filter(|s| !s.queries.is_empty())
            .collect()
    }

    /// State rows of the suffix: one a robot, or none at all.
    pub fn states(&self) -> usize {
        if self.state_rows { self.batch() } else { 0 }
    }

    /// Position of each suffix row of the first step: the state rows, then the action rows.
    pub fn suffix_positions(&self) -> Vec<u32> {
        let robots = 0..self.batch();
        let states = (0..self.states()).map(|b| self.prefix_len(b));
        let first = usize::from(self.state_rows);
        let actions = robots.flat_map(|b| (0..self.horizon).map(move |i| self.prefix_len(b) + first + i));
        states.chain(actions).map(|p| p as u32).collect()
    }

    /// The first step: part 0 is the step's own rows (states, then actions), part 1 the prefix. A state row sees the
    /// prefix and itself, an action row the prefix, its state row and all its actions.
    pub fn first_step_spans(&self) -> Vec<Span> {
        let state = |b: usize| Keys { part: 0, rows: b..b + 1 };
        let states = (0..self.states()).map(|b| Span {
            queries: b..b + 1,
            keys: self.prefix_keys(b, 1).into_iter().chain([state(b)]).collect(),
        });
        let actions = (0..self.batch()).map(|b| {
            let rows = self.states() + b * self.horizon..self.states() + (b + 1) * self.horizon;
            let own =
                self.state_rows.then(|| state(b)).into_iter().chain([Keys { part: 0, rows: rows.clone() }]);
            Span { queries: rows, keys: self.prefix_keys(b, 1).into_iter().chain(own).collect() }
        });
        states.chain(actions).collect()
    }

    /// A later step: part 0 is the step's action rows, part 1 the prefix, part 2 the state rows kept from the first,
    /// where there are any.
    pub fn later_step_spans(&self) -> Vec<Span> {
        let span = |b: usize| {
            let rows = b * self.horizon..(b + 1) * self.horizon;
            let state = self.state_rows.then(|| Keys { part: 2, rows: b..b + 1 });
            let rest = state.into_iter().chain([Keys { part: 0, rows: rows.clone() }]);
            Span { queries: rows, keys: self.prefix_keys(b, 1).into_iter().chain(rest).collect() }
        };
        (0..self.batch()).map(span).collect()
    }
}

/// Checks one robot's inputs against the model.
fn check(c: &Config, inputs: &Inputs, cameras: usize) -> Result<(), String> {
    let finite = |what: &str, data: &[f32]| match first_not_finite(data) {
        Some(i) => Err(format!("{what} holds {} at index {i}", data[i])),
        None => Ok(()),
    };
    let size = c.vision.image_size;
    if inputs.images.len() != cameras {
        return Err(format!(
            "{} cameras where the first input of the batch has {cameras}",
            inputs.images.len()
        ));
    }
    if inputs.images.iter().flatten().next().is_none() {
        return Err(match cameras {
            0 => "no camera at all; at least one image is needed".into(),
            _ => "every camera is masked; at least one image is needed".into(),
        });
    }
    for (camera, image) in inputs.images.iter().enumerate() {
        let Some(image) = image else { continue };
        if image.len() != 3 * size * size {
            return Err(format!("image {camera} has {} values, wanted 3 x {size} x {size}", image.len()));
        }
        finite(&format!("image {camera}"), image)?;
    }
    if inputs.tokens.len() > c.max_tokens {
        return Err(format!("{} tokens, the model takes at most {}", inputs.tokens.len(), c.max_tokens));
    }
    if let Some(t) = inputs.tokens.iter().find(|t| **t as usize >= c.vocab_size) {
        return Err(format!("token {t}, the vocabulary has {}", c.vocab_size));
    }
    let unread = !c.kind.reads_state() && inputs.state.is_empty();
    if inputs.state.len() != c.state_dim && !unread {
        return Err(format!("state of {} values, wanted {}", inputs.state.len(), c.state_dim));
    }
    finite("state", &inputs.state)?;
    if let Some(end) = inputs.end.filter(|end| *end as usize >= c.vocab_size) {
        return Err(format!("an answer that ends with token {end}, the vocabulary has {}", c.vocab_size));
    }
    if let Some(noise) = inputs.noise.as_ref().filter(|_| c.kind != Kind::Pi0Fast) {
        if noise.len() != c.horizon * c.action_dim {
            return Err(format!("noise of {} values, wanted {} x {}", noise.len(), c.horizon, c.action_dim));
        }
        finite("noise", noise)?;
    }
    match &inputs.rtc {
        None => {}
        Some(_) if c.kind == Kind::Pi0Fast => {
            return Err("real-time chunking, of which π0-FAST has none: it denoises nothing".into());
        }
        Some(Rtc::Guided(g)) => {
            if g.previous.len() > c.horizon * c.action_dim || !g.previous.len().is_multiple_of(c.action_dim) {
                let what = "previous chunk of";
                return Err(format!("{what} {} values, wanted rows of {}", g.previous.len(), c.action_dim));
            }
            finite("previous chunk", &g.previous)?;
        }
        Some(Rtc::Trained(clean)) => {
            let (delay, longest) = (clean.delay, c.rtc_training_max_delay);
            if longest == 0 {
                let why = "trained real-time chunking, which the checkpoint did not learn";
                return Err(format!("{why} (rtc_training_max_delay is 0); guided needs no training"));
            }
            if delay > longest || delay >= c.horizon {
                return Err(format!(
                    "a delay of {delay} actions; the checkpoint learned to continue after at most {longest}"
                ));
            }
            if clean.previous.len() < delay * c.action_dim
                || !clean.previous.len().is_multiple_of(c.action_dim)
            {
                let (values, width) = (clean.previous.len(), c.action_dim);
                return Err(format!(
                    "previous chunk of {values} values, wanted at least {delay} rows of {width}"
                ));
            }
            finite("previous chunk", &clean.previous)?;
        }
    }
    Ok(())
}

/// Index of the first value that is NaN or infinite. Whole blocks at once, which becomes vectors: images are large.
fn first_not_finite(data: &[f32]) -> Option<usize> {
    const BLOCK: usize = 1024;
    let bad = |block: &[f32]| block.iter().fold(false, |bad, x| bad | !x.is_finite());
    let block = data.chunks(BLOCK).position(bad)?;
    let start = block * BLOCK;
    data[start..].iter().position(|x| !x.is_finite()).map(|i| start + i)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn inputs(cameras: [bool; 2], tokens: usize) -> Inputs {
        let c = Config::tiny();
        let image = vec![0.0; 3 * c.vision.image_size.pow(2)];
        Inputs {
            images: cameras.map(|present| present.then(|| image.clone())).to_vec(),
            tokens: vec![2; tokens],
            state: vec![0.0; c.state_dim],
            ..Inputs::default()
        }
    }

    #[test]
    fn one_robot_is_contiguous() {
        let l = Layout::new(&Config::tiny(), &[inputs([true, true], 5)]).unwrap();
        assert_eq!(l.prefix_rows(), 517);
        assert_eq!(l.prefix_positions(), (0..517).collect::<Vec<u32>>());
        assert_eq!(l.prefix_spans(), [Span { queries: 0..517, keys: vec![Keys { part: 0, rows: 0..517 }] }]);
        assert_eq!(l.suffix_positions(), (517..517 + 17).collect::<Vec<u32>>());
    }

    #[test]
    fn absent_cameras_and_tokens_take_no_row_and_no_position() {
        let l = Layout::new(&Config::tiny(), &[inputs([false, true], 3), inputs([true, true], 0)]).unwrap();
        assert_eq!(l.images, [(0, 1), (1, 0), (1, 1)]);
        assert_eq!((l.prefix_rows(), l.prefix_len(0), l.prefix_len(1)), (771, 259, 512));
        assert_eq!(l.prefix_positions()[768..], [256, 257, 258]);
        let spans = l.prefix_spans();
        assert_eq!(spans.iter().map(|s| s.queries.clone()).collect::<Vec<_>>(), [0..256, 256..768, 768..771]);
        assert_eq!(spans.iter().map(Span::key_count).collect::<Vec<_>>(), [259, 512, 259]);
        let counts = |spans: Vec<Span>| spans.iter().map(Span::key_count).collect::<Vec<_>>();
        assert_eq!(counts(l.first_step_spans()), [260, 513, 259 + 17, 512 + 17]);
        assert_eq!(counts(l.later_step_spans()), [259 + 17, 512 + 17]);
    }

    #[test]
    fn without_state_rows_actions_follow_the_prefix() {
        let c = Config::tiny().of_kind(Kind::Pi05);
        let l = Layout::new(&c, &[inputs([false, true], 3), inputs([true, true], 0)]).unwrap();
        assert_eq!(l.suffix_positions()[..17], (259..275).chain([512]).collect::<Vec<u32>>());
        let counts = |spans: Vec<Span>| spans.iter().map(Span::key_count).collect::<Vec<_>>();
        assert_eq!(counts(l.first_step_spans()), [259 + 16, 512 + 16]);
        assert_eq!(l.first_step_spans(), l.later_step_spans());
    }

    #[test]
    fn previous_chunks_that_do_not_fit_are_named() {
        let learned = Config { rtc_training_max_delay: 4, ..Config::tiny().of_kind(Kind::Pi05) };
        let with = |c: &Config, rtc| {
            let input = Inputs { rtc: Some(rtc), ..inputs([true, true], 3) };
            Layout::new(c, &[input]).map(|_| ()).map_err(|e| e.to_string())
        };
        let clean = |values: usize, delay| Rtc::Trained(crate::Clean { previous: vec![0.1; values], delay });
        assert_eq!(with(&learned, clean(4 * 32, 4)), Ok(()));
        assert_eq!(with(&learned, clean(0, 0)), Ok(()));
        for (c, rtc, word) in [
            (&learned, clean(5 * 32, 5), "at most 4"),
            (&learned, clean(3 * 32, 4), "at least 4 rows"),
            (&learned, clean(4 * 32 + 1, 4), "rows of 32"),
            (&learned, Rtc::Trained(crate::Clean { previous: vec![f32::NAN; 128], delay: 2 }), "NaN"),
            (&Config::tiny().of_kind(Kind::Pi05), clean(128, 2), "did not learn"),
            (&Config::tiny(), clean(128, 2), "did not learn"),
        ] {
            let e = with(c, rtc).unwrap_err();
            assert!(e.contains(word), "{e} should say {word}");
        }
    }

    #[test]
    fn bad_inputs_are_named() {
        let c = Config::tiny();
        let good = inputs([true, true], 5);
        let mut cases = vec![(inputs([false, false], 1), "every camera is masked")];
        cases.push((Inputs { images: vec![], ..good.clone() }, "cameras where"));
        cases.push((Inputs { tokens: vec![2; 49], ..good.clone() }, "49 tokens"));
        cases.push((Inputs { tokens: vec![512], ..good.clone() }, "token 512"));
        cases.push((Inputs { state: vec![0.0; 33], ..good.clone() }, "state of 33"));
        cases.push((Inputs { state: vec![f32::NAN; 32], ..good.clone() }, "NaN"));
        cases.push((Inputs { noise: Some(vec![0.0; 3]), ..good.clone() }, "noise of 3"));
        cases.push((Inputs { images: vec![Some(vec![0.0; 7]), None], ..good.clone() }, "image 0 has 7"));
        for (bad, word) in cases {
            let e = Layout::new(&c, &[good.clone(), bad]).unwrap_err().to_string();
            assert!(e.contains("input 1") && e.contains(word), "{e} should say {word}");
        }
        assert!(Layout::new(&c, &[]).is_err());
        let none = Inputs { images: vec![], ..good };
        assert!(Layout::new(&c, &[none]).unwrap_err().to_string().contains("no camera"));
    }
    #[test]
    fn the_first_value_that_is_not_finite_is_found() {
        let mut data = vec![1.0; 5000];
        assert_eq!(first_not_finite(&data), None);
        data[4999] = f32::NAN;
        assert_eq!(first_not_finite(&data), Some(4999));
        data[1024] = f32::NEG_INFINITY;
        assert_eq!(first_not_finite(&data), Some(1024));
        assert_eq!(first_not_finite(&[]), None);
    }
}
