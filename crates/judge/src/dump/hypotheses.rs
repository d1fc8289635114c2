//! Mistakes that implementations of π0 make, each as something that can be tried on the reference.

use std::rc::Rc;

use pi0_device::{Keys, OpKind, Span};
use pi0_model::layout::Layout;
use pi0_model::{Checkpoint, Config, Inputs, Kind, ModelError};

use super::file::Dump;
use super::order::{self, PREFIX, Rank, STEPS, SUFFIX, VISION};
use crate::mutated::mistakes::{self, Rotation};
use crate::mutated::{Adaptive, Plant, Repack, Reposition, Respan};

/// A mistake.
#[derive(Clone)]
pub struct Hypothesis {
    /// Short name, the same for all ways to make the mistake.
    pub name: String,
    /// What was done, and what the network wants.
    pub what: String,
    /// Before this nothing changes.
    pub from: Rank,
    /// How to make it on the reference.
    pub variation: Variation,
    /// Whether it changes what the network computes rather than how exactly.
    pub structural: bool,
}

/// Other times for the steps.
pub type Retime = fn(&[f32]) -> Vec<f32>;

/// An inference that differs from the right one.
#[derive(Clone, Default)]
pub struct Variation {
    /// What goes wrong on the device.
    pub plants: Vec<Plant>,
    /// What goes in.
    pub inputs: Vec<InputChange>,
    /// Whether the state rows are run again in every step.
    pub recompute_state: bool,
    /// The steps' times.
    pub times: Option<Retime>,
}

/// Inputs that the network was not meant to get.
#[derive(Debug, Clone, Copy, PartialEq)]
pub enum InputChange {
    /// Padded tokens and absent cameras taken as real.
    Unmasked,
    /// Padded tokens taken as real.
    UnmaskedTokens,
    /// Absent cameras taken as real.
    UnmaskedImages,
    /// Every sample times this plus that.
    Pixels(f32, f32),
    /// Blue, green, red.
    Channels,
    /// Zeros for the state.
    NoState,
}

impl Variation {
    /// Both.
    pub fn and(&self, other: &Variation) -> Self {
        let mut both = self.clone();
        both.plants.extend(other.plants.iter().cloned());
        both.inputs.extend(&other.inputs);
        both.recompute_state |= other.recompute_state;
        both.times = other.times.or(self.times);
        both
    }

    /// Whether it rounds where the network does not, which no other computation repeats bit by bit.
    pub fn rounds(&self) -> bool {
        self.plants.iter().any(|p| matches!(p, Plant::RoundSoftmax(_)))
    }

    fn plant(plants: Vec<Plant>) -> Self {
        Self { plants, ..Self::default() }
    }

    fn input(change: InputChange) -> Self {
        Self { inputs: vec![change], ..Self::default() }
    }

    /// What goes in.
    pub fn inputs(&self, dump: &Dump, noise: &[Option<Vec<f32>>]) -> Vec<Inputs> {
        let mut batch = dump.batch.clone();
        for (inputs, noise) in batch.iter_mut().zip(noise) {
            inputs.noise.clone_from(noise);
        }
        for change in &self.inputs {
            for (inputs, all) in batch.iter_mut().zip(&dump.unmasked) {
                change.apply(inputs, all);
            }
        }
        batch
    }
}

impl InputChange {
    fn apply(self, inputs: &mut Inputs, unmasked: &Inputs) {
        match self {
            InputChange::Unmasked => {
                inputs.images.clone_from(&unmasked.images);
                inputs.tokens.clone_from(&unmasked.tokens);
            }
            InputChange::UnmaskedTokens => inputs.tokens.clone_from(&unmasked.tokens),
            InputChange::UnmaskedImages => inputs.images.clone_from(&unmasked.images),
            InputChange::Pixels(scale, offset) => inputs
                .images
                .iter_mut()
                .flatten()
                .for_each(|image| image.iter_mut().for_each(|x| *x = *x * scale + offset)),
            InputChange::Channels => inputs.images.iter_mut().flatten().for_each(|image| {
                let plane = image.len() / 3;
                let (red, rest) = image.split_at_mut(plane);
                red.swap_with_slice(&mut rest[plane..]);
            }),
            InputChange::NoState => inputs.state.iter_mut().for_each(|x| *x = 0.0),
        }
    }
}

const LANGUAGE: &str = "language_model";
const EXPERT: &str = "gemma_expert";

/// The list for one network and one dump, without single weights.
pub fn common(checkpoint: &Checkpoint, dump: &Dump) -> Result<Vec<Hypothesis>, ModelError> {
    let c = &checkpoint.config;
    let mut list = List(Vec::new());
    vision(c, &mut list);
    embeddings(c, &mut list);
    masks(c, dump, &mut list)?;
    towers(c, &mut list);
    match c.kind {
        Kind::Pi0 => pi0_suffix(c, dump, &mut list)?,
        Kind::Pi05 => pi05_suffix(&mut list),
        // Behind the prompt there is the same language model.
        Kind::Pi0Fast => {}
    }
    steps(&mut list);
    everywhere(checkpoint, &mut list);
    Ok(list.0)
}

struct List(Vec<Hypothesis>);

impl List {
    fn add(&mut self, name: &str, what: &str, from: Rank, variation: Variation) {
        let (name, what) = (name.to_string(), what.to_string());
        self.0.push(Hypothesis { name, what, from, variation, structural: true });
    }

    fn plants(&mut self, name: &str, what: &str, from: Rank, plants: Vec<Plant>) {
        self.add(name, what, from, Variation::plant(plants));
    }

    /// A matter of rounding or of small constants.
    fn precision(&mut self, name: &str, what: &str, from: Rank, plants: Vec<Plant>) {
        self.plants(name, what, from, plants);
        if let Some(last) = self.0.last_mut() {
            last.structural = false;
        }
    }
}

fn weight(name: &str, change: impl Fn(&mut pi0_device::WeightSource) + 'static) -> Plant {
    Plant::Weight(name.to_string(), Rc::new(change))
}

fn scale(scope: &str, factor: impl Fn(f32) -> f32 + 'static) -> Plant {
    Plant::Attend(scope.to_string(), Rc::new(move |_, s| *s = factor(*s)))
}

fn vision(c: &Config, list: &mut List) {
    let start = (VISION, 0, 0);
    let pixels = |a, b| Variation::input(InputChange::Pixels(a, b));
    list.add("image-range", "images go in as 0..1 where the network wants -1..1", start, pixels(0.5, 0.5));
    list.add(
        "image-range",
        "images go in as 0..255 where the network wants -1..1",
        start,
        pixels(127.5, 127.5),
    );
    list.add(
        "image-range",
        "images are normalized twice: 2x - 1 of what is in -1..1 already",
        start,
        pixels(2.0, -1.0),
    );
    list.add(
        "image-channels",
        "images go in as blue, green, red where the network wants red, green, blue",
        start,
        Variation::input(InputChange::Channels),
    );
    list.plants(
        "vision-position",
        "the position embedding is not added to the patches",
        (VISION, 0, 1),
        vec![Plant::NoResidual("patch_embedding".into())],
    );
    let layer = (VISION, 1, 0);
    let dim = c.vision.head_dim();
    let padded = dim.next_multiple_of(32);
    list.plants(
        "vision-scale",
        "SigLIP's logits are scaled by 1 / head_dim where the network wants 1 / sqrt(head_dim)",
        layer,
        vec![scale("vision", |s| s * s)],
    );
    list.plants("vision-scale", "SigLIP's logits are not scaled", layer, vec![scale("vision", |_| 1.0)]);
    if padded != dim {
        list.plants(
            "vision-scale",
            "SigLIP's logits are scaled by the padded width of a head where the network wants the true one",
            layer,
            vec![scale("vision", move |_| (padded as f32).powf(-0.5))],
        );
    }
    list.precision(
        "vision-gelu",
        "SigLIP's MLP uses the exact GELU where the network wants the tanh form",
        layer,
        vec![Plant::Activation(OpKind::Gelu, "vision".into(), mistakes::gelu_exact)],
    );
    list.plants(
        "vision-gelu",
        "SigLIP's MLP uses SiLU where the network wants GELU (tanh)",
        layer,
        vec![Plant::Activation(OpKind::Gelu, "vision".into(), mistakes::silu_of)],
    );
    list.precision(
        "vision-eps",
        "SigLIP's layer norms use eps 1e-5 where the network wants 1e-6",
        layer,
        vec![weight("vision_tower", mistakes::norm_eps)],
    );
    list.precision(
        "softmax-bf16",
        "SigLIP's softmax is computed in bf16 where the network wants f32",
        layer,
        vec![Plant::RoundSoftmax("vision".into())],
    );
    list.plants(
        "vision-post-norm",
        "SigLIP's last norm (post_layernorm) is missing",
        (VISION, u32::MAX, 0),
        vec![Plant::SkipNorm("post_layernorm".into())],
    );
}

fn embeddings(c: &Config, list: &mut List) {
    let width = c.gemma.width as f32;
    let root = width.sqrt();
    for (factor, what) in [
        (1.0 / root, "the image rows are divided by sqrt(width), which PaliGemma does and π0 does not"),
        (root, "the image rows are multiplied by sqrt(width), which the network wants for tokens alone"),
    ] {
        // Where the projector's result is written down before the mistake, and where after it.
        let after = Plant::ScaleFirstRows("prefix".into(), factor);
        list.plants("image-scale", what, (PREFIX, 0, 1), vec![after]);
        let before = Plant::ScaleLinear("multi_modal_projector".into(), factor);
        list.plants("image-scale", what, (VISION, u32::MAX, 1), vec![before]);
    }
    list.plants(
        "token-scale",
        "token embeddings are not multiplied by sqrt(width)",
        (PREFIX, 0, 1),
        vec![Plant::ScaleEmbedding(1.0 / root)],
    );
    list.plants(
        "token-scale",
        "token embeddings are multiplied by sqrt(width) twice",
        (PREFIX, 0, 1),
        vec![Plant::ScaleEmbedding(root)],
    );
}

/// Positions for the rows of calls of either tower, by how many rows a call has.
fn positions(tables: Vec<Vec<u32>>) -> Reposition {
    Rc::new(move |old| tables.iter().find(|t| t.len() == old.len()).cloned().unwrap_or_else(|| old.to_vec()))
}

fn masks(c: &Config, dump: &Dump, list: &mut List) -> Result<(), ModelError> {
    let start = (PREFIX, 0, 0);
    let right = Layout::new(c, &dump.batch)?;
    let states = right.states();
    let patches = c.vision.patches();
    for (change, padding) in [
        (InputChange::Unmasked, "padded tokens and absent cameras are"),
        (InputChange::UnmaskedTokens, "padded tokens are"),
        (InputChange::UnmaskedImages, "absent cameras are"),
    ] {
        let mut batch = dump.batch.clone();
        batch.iter_mut().zip(&dump.unmasked).for_each(|(inputs, all)| change.apply(inputs, all));
        if batch == dump.batch {
            continue;
        }
        let variation = Variation::input(change);
        list.add(
            "masks-dropped",
            &format!("{padding} attended to and counted in the positions: the masks are dropped"),
            start,
            variation.clone(),
        );
        // The positions right, the attention open. Rows of the padded batch get the positions that masks give.
        let Ok(open) = Layout::new(c, &batch) else { continue };
        let mut prefix = vec![0; open.prefix_rows()];
        for (robot, inputs) in dump.batch.iter().enumerate() {
            let mut next = 0;
            let mut give = |row: usize, real: bool| {
                next += u32::from(real);
                prefix[row] = next.wrapping_sub(1);
            };
            let mut row = open.image_rows[robot].start;
            for camera in (0..batch[robot].images.len()).filter(|&c| batch[robot].images[c].is_some()) {
                for _ in 0..patches {
                    give(row, inputs.images[camera].is_some());
                    row += 1;
                }
            }
            // Real tokens come first; padding is on the right.
            for (i, row) in open.token_rows[robot].clone().enumerate() {
                give(row, i < inputs.tokens.len());
            }
        }
        let suffix = right.suffix_positions();
        let later = suffix[states..].to_vec();
        let plants = vec![
            Plant::Positions("prefix".into(), positions(vec![prefix])),
            Plant::Positions("suffix".into(), positions(vec![suffix, later])),
        ];
        list.add(
            "masks-dropped",
            &format!("{padding} attended to, though the positions are right: attention gets no mask"),
            start,
            Variation { plants, ..variation },
        );
    }
    list.plants(
        "prefix-causal",
        "the prefix attends causally where every prefix row sees the whole prefix",
        (PREFIX, 1, 0),
        vec![Plant::Attend("prefix".into(), causal_prefix(right.prefix_positions()))],
    );
    let one_up = Rc::new(|p: &[u32]| p.iter().map(|p| p + 1).collect::<Vec<_>>());
    list.plants(
        "positions",
        "positions count from 1 where the network counts from 0",
        start,
        vec![
            Plant::Positions("prefix".into(), one_up.clone()),
            Plant::Positions("suffix".into(), one_up.clone()),
        ],
    );
    let suffix_start = (SUFFIX, 0, 0);
    list.plants(
        "suffix-positions",
        "suffix positions are one too high",
        suffix_start,
        vec![Plant::Positions("suffix".into(), one_up)],
    );
    list.plants(
        "suffix-positions",
        "suffix positions are one too low: they begin on the last prefix row",
        suffix_start,
        vec![Plant::Positions("suffix".into(), Rc::new(|p| p.iter().map(|p| p.saturating_sub(1)).collect()))],
    );
    let first = states / right.batch().max(1);
    let begin = |start: &dyn Fn(usize) -> usize| {
        let states_at = (0..states).map(|b| start(b) as u32);
        let actions = |b: usize| (0..c.horizon).map(move |i| (first + i) as u32).map(move |i| (b, i));
        let actions: Vec<u32> =
            (0..right.batch()).flat_map(actions).map(|(b, i)| start(b) as u32 + i).collect();
        let all: Vec<u32> = states_at.chain(actions.iter().copied()).collect();
        vec![Plant::Positions("suffix".into(), positions(vec![all, actions]))]
    };
    list.plants(
        "suffix-positions",
        "suffix positions count from 0 where they continue behind the prefix",
        suffix_start,
        begin(&|_| 0),
    );
    let cameras = dump.batch.first().map_or(0, |i| i.images.len());
    let padded = cameras * patches + dump.padded_tokens;
    if (0..right.batch()).any(|b| right.prefix_len(b) != padded) {
        list.plants(
            "suffix-positions",
            "suffix positions continue behind the padded prefix where they continue behind its real rows",
            suffix_start,
            begin(&|_| padded),
        );
    }
    Ok(())
}

/// Every prefix row sees the rows of its robot up to itself.
fn causal_prefix(positions: Vec<u32>) -> Respan {
    Rc::new(move |spans, _| {
        let single = |span: &Span| {
            let span = span.clone();
            let positions = positions.clone();
            span.queries.clone().map(move |row| {
                let count = positions.get(row).map_or(1, |p| *p as usize + 1);
                Span { queries: row..row + 1, keys: first_keys(&span.keys, count) }
            })
        };
        *spans = spans.iter().flat_map(single).collect();
    })
}

fn first_keys(keys: &[Keys], mut count: usize) -> Vec<Keys> {
    let mut kept = Vec::new();
    for k in keys {
        let take = k.rows.len().min(count);
        count -= take;
        if take > 0 {
            kept.push(Keys { part: k.part, rows: k.rows.start..k.rows.start + take });
        }
    }
    kept
}

fn towers(c: &Config, list: &mut List) {
    let both = (PREFIX, 1, 0);
    let expert = (SUFFIX, 1, 0);
    // The scopes and weights of both towers, of one, of the other.
    let sides: [(&str, &[&str], &[&str], Rank); 3] = [
        ("", &["prefix", "suffix"], &[LANGUAGE, EXPERT], both),
        (" of the language model", &["prefix"], &[LANGUAGE], both),
        (" of the action expert", &["suffix"], &[EXPERT], expert),
    ];
    for (whose, scopes, weights, from) in sides {
        let each = |f: &dyn Fn(&str) -> Plant| scopes.iter().map(|s| f(s)).collect::<Vec<_>>();
        let packed = |name: &str, f: fn(&mut pi0_device::WeightSource)| {
            weights.iter().map(|w| weight(&format!("{w}{name}"), f)).collect::<Vec<_>>()
        };
        for (rotation, what) in [
            (
                Rotation::Neighbours,
                "turn neighbours (2i, 2i + 1) where the network turns halves (i, i + head_dim / 2)",
            ),
            (Rotation::Backwards, "turn backwards"),
            (Rotation::None, "are not rotated"),
            (Rotation::LongPeriods, "turn with base 1,000,000 where the network has 10,000"),
            (Rotation::NextFrequency, "turn with the frequency of the next pair"),
        ] {
            let plants = each(&|s| Plant::Rotate(s.into(), rotation));
            list.plants("rotary", &format!("queries and keys{whose} {what}"), from, plants);
        }
        let what = format!("the softmax{whose} is computed in bf16 where the network wants f32");
        list.precision("softmax-bf16", &what, from, each(&|s| Plant::RoundSoftmax(s.into())));
        let what = format!(
            "the logits{whose} are scaled by 1 / head_dim where the network wants 1 / sqrt(head_dim)"
        );
        list.plants("attention-scale", &what, from, each(&|s| scale(s, |x| x * x)));
        let what = format!("the logits{whose} are not scaled");
        list.plants("attention-scale", &what, from, each(&|s| scale(s, |_| 1.0)));
        let root = (c.gemma.width as f32 / c.gemma.num_heads as f32).powf(-0.5);
        if (root - (c.gemma.head_dim as f32).powf(-0.5)).abs() > 1e-6 {
            let what =
                format!("the logits{whose} are scaled by width / heads where head_dim is something else");
            list.plants("attention-scale", &what, from, each(&|s| scale(s, move |_| root)));
        }
        let geglu = |f| each(&|s| Plant::Activation(OpKind::Geglu, s.into(), f));
        let what = format!("the MLPs{whose} use SiLU where the network wants GELU (tanh)");
        list.plants("gelu", &what, from, geglu(mistakes::gate_silu));
        let what = format!("the MLPs{whose} use the exact GELU where the network wants the tanh form");
        list.precision("gelu", &what, from, geglu(mistakes::gate_exact));
        let what = format!("gate and up{whose} are swapped");
        list.plants("gate-up", &what, from, packed("", gate_up));
        let what = format!("keys and values{whose} are swapped");
        list.plants("key-value", &what, from, packed("", key_value));
        // π0.5's expert has adaptive norms alone, whose mistakes are others.
        if c.kind == Kind::Pi0 || scopes.contains(&"prefix") {
            let what = format!("norms{whose} scale by w where Gemma scales by 1 + w");
            list.plants("norm-one", &what, from, packed("", mistakes::norm_less_one));
            let what = format!("norms{whose} use eps 1e-5 where the network wants 1e-6");
            list.precision("norm-eps", &what, from, packed("", mistakes::norm_eps));
        }
        for (norm, adaptive, what) in [
            ("input_layernorm", Adaptive::Attention, "the norm before attention"),
            ("post_attention_layernorm", Adaptive::Mlp, "the norm before the MLP"),
        ] {
            let mut plants: Vec<_> = layer_paths(weights, norm).map(Plant::SkipNorm).collect();
            plants.extend(scopes.contains(&"suffix").then_some(Plant::SkipAdaptive(adaptive)));
            list.plants("norm-missing", &format!("{what}{whose} is missing"), from, plants);
        }
        for (linear, what) in [("self_attn.o_proj", "attention"), ("mlp.down_proj", "the MLP")] {
            let plants = layer_paths(weights, linear).map(Plant::NoResidual).collect();
            list.plants("residual", &format!("the residual behind {what}{whose} is not added"), from, plants);
        }
    }
    list.plants(
        "norm-missing",
        "the language model's final norm is missing",
        (PREFIX, u32::MAX, 0),
        vec![Plant::SkipNorm("language_model.norm".into())],
    );
    list.plants(
        "norm-missing",
        "the action expert's final norm is missing",
        (SUFFIX, u32::MAX, 0),
        vec![Plant::SkipNorm("gemma_expert.model.norm".into()), Plant::SkipAdaptive(Adaptive::Final)],
    );
}

/// `layers.*.NAME` of each tower: a tower's name and a leaf's cannot be matched in one piece, so by layer.
fn layer_paths<'a>(towers: &'a [&str], leaf: &'a str) -> impl Iterator<Item = String> + 'a {
    const MOST_LAYERS: usize = 64;
    towers.iter().flat_map(move |tower| {
        let model = if *tower == EXPERT { ".model" } else { "" };
        (0..MOST_LAYERS).map(move |i| format!("{tower}{model}.layers.{i}.{leaf}"))
    })
}

fn gate_up(w: &mut pi0_device::WeightSource) {
    if w.name().contains("gate_proj") {
        mistakes::swapped(0, 1)(w);
    }
}

fn key_value(w: &mut pi0_device::WeightSource) {
    if w.name().contains("self_attn.q_proj") {
        mistakes::swapped(1, 2)(w);
    } else if w.name().contains("self_attn.k_proj") {
        mistakes::swapped(0, 1)(w);
    }
}

/// Action rows: all rows of a call but state rows, which stand in spans of one row.
fn action_spans(spans: &mut [Span], horizon: usize) -> impl Iterator<Item = &mut Span> {
    spans.iter_mut().filter(move |s| s.queries.len() == horizon)
}

fn causal_actions(horizon: usize) -> Plant {
    Plant::Attend(
        "suffix".into(),
        Rc::new(move |spans, _| {
            let split = |span: &Span| -> Vec<Span> {
                if span.queries.len() != horizon {
                    return vec![span.clone()];
                }
                let all: usize = span.keys.iter().map(|k| k.rows.len()).sum();
                let row = |i: usize| Span {
                    queries: span.queries.start + i..span.queries.start + i + 1,
                    keys: first_keys(&span.keys, all - horizon + i + 1),
                };
                (0..horizon).map(row).collect()
            };
            *spans = spans.iter().flat_map(split).collect();
        }),
    )
}

fn pi0_suffix(c: &Config, dump: &Dump, list: &mut List) -> Result<(), ModelError> {
    let layout = Layout::new(c, &dump.batch)?;
    let (states, horizon) = (layout.states(), c.horizon);
    let layers = (SUFFIX, 1, 0);
    let open = Plant::Attend(
        "suffix".into(),
        Rc::new(move |spans, _| {
            for span in spans.iter_mut().filter(|s| s.queries.len() == 1 && s.queries.start < states) {
                let b = span.queries.start;
                span.keys.push(Keys { part: 0, rows: states + b * horizon..states + (b + 1) * horizon });
            }
        }),
    );
    list.add(
        "state-sees-actions",
        "the state row attends to the actions, which it must not see",
        (SUFFIX, 0, 1),
        Variation { plants: vec![open], recompute_state: true, ..Variation::default() },
    );
    let blind = Plant::Attend(
        "suffix".into(),
        Rc::new(move |spans, _| {
            for span in action_spans(spans, horizon) {
                // The state's row stands right before the actions' own.
                let at = span.keys.len().saturating_sub(2);
                span.keys.remove(at);
            }
        }),
    );
    list.plants("actions-blind", "the actions do not see the state row", layers, vec![blind]);
    list.plants(
        "suffix-causal",
        "the actions attend causally where each action sees all actions",
        layers,
        vec![causal_actions(horizon)],
    );
    list.add(
        "no-state",
        "the state goes in as zeros",
        (SUFFIX, 0, 2),
        Variation::input(InputChange::NoState),
    );
    list.plants(
        "action-time-order",
        "time stands before action in the suffix's first layer where action stands before time",
        (SUFFIX, 0, 4),
        vec![weight("action_time_mlp_in", mistakes::other_half)],
    );
    let silu = |f| vec![Plant::Activation(OpKind::Silu, "suffix".into(), f)];
    list.plants(
        "suffix-silu",
        "the suffix's MLP uses GELU where the network wants SiLU",
        (SUFFIX, 0, 5),
        silu(mistakes::gelu_of),
    );
    list.plants("suffix-silu", "the suffix's MLP has no SiLU", (SUFFIX, 0, 5), silu(mistakes::identity));
    Ok(())
}

fn pi05_suffix(list: &mut List) {
    let start = (SUFFIX, 0, 0);
    let silu = |f| vec![Plant::Activation(OpKind::Silu, "modulations".into(), f)];
    list.plants(
        "time-silu",
        "the time network uses GELU where the network wants SiLU",
        start,
        silu(mistakes::gelu_of),
    );
    list.plants("time-silu", "the time network has no SiLU", start, silu(mistakes::identity));
    let layers = (SUFFIX, 1, 0);
    for (what, change) in [
        (
            "adaptive norms scale by `scale` where the network wants 1 + scale",
            (|row, w| row[..w].iter_mut().for_each(|x| *x -= 1.0)) as fn(&mut [f32], usize),
        ),
        ("adaptive norms leave out the shift", |row, w| row[w..2 * w].fill(0.0)),
        ("adaptive norms take the gate for the shift", |row, w| row[w..].rotate_left(w)),
        ("adaptive norms take the shift for the scale", |row, w| row[..2 * w].rotate_left(w)),
    ] {
        list.plants("adaptive-norm", what, layers, vec![Plant::AdaTable(change)]);
    }
    for (what, change) in [
        ("residuals have no gate", (|row, w| row[2 * w..].fill(1.0)) as fn(&mut [f32], usize)),
        ("residuals are gated by 1 + gate where the network wants gate", |row, w| {
            row[2 * w..].iter_mut().for_each(|x| *x += 1.0);
        }),
        ("residuals are gated by the shift", |row, w| row[w..].rotate_left(w)),
    ] {
        list.plants("gate", what, layers, vec![Plant::GateTable(change)]);
    }
}

fn steps(list: &mut List) {
    let times = |f| Variation { times: Some(f), ..Variation::default() };
    let start = (SUFFIX, 0, 0);
    list.add(
        "time",
        "time runs from 0 to 1 where it runs from 1 to 0",
        start,
        times(|t| t.iter().map(|t| 1.0 - t).collect()),
    );
    list.add(
        "time",
        "each step is given the time at its end where the network wants the time at its beginning",
        start,
        times(|t| t.iter().map(|x| x - 1.0 / t.len() as f32).collect()),
    );
    list.add("time", "every step is given time 1", (STEPS, 1, 0), times(|t| vec![1.0; t.len()]));
    let step = |factor| vec![Plant::Step(factor)];
    list.plants("euler", "the Euler step goes the other way: x - dt v", (STEPS, 0, 4), step(-1.0));
}

/// Kinds of linear layers, by tower, folder and tensor.
const KINDS: [(&str, &str, &str, &str); 18] = [
    ("vision_tower", "self_attn.", "self_attn.q_proj", "SigLIP's q_proj"),
    ("vision_tower", "self_attn.", "self_attn.k_proj", "SigLIP's k_proj"),
    ("vision_tower", "self_attn.", "self_attn.v_proj", "SigLIP's v_proj"),
    ("vision_tower", "self_attn.", "self_attn.out_proj", "SigLIP's out_proj"),
    ("vision_tower", "mlp.", "mlp.fc1", "SigLIP's fc1"),
    ("vision_tower", "mlp.", "mlp.fc2", "SigLIP's fc2"),
    ("language_model", "self_attn.", "self_attn.q_proj", "the language model's q_proj"),
    ("language_model", "self_attn.", "self_attn.k_proj", "the language model's k_proj"),
    ("language_model", "self_attn.", "self_attn.v_proj", "the language model's v_proj"),
    ("language_model", "self_attn.", "self_attn.o_proj", "the language model's o_proj"),
    ("language_model", "mlp.", "mlp.down_proj", "the language model's down_proj"),
    ("gemma_expert", "self_attn.", "self_attn.q_proj", "the action expert's q_proj"),
    ("gemma_expert", "self_attn.", "self_attn.k_proj", "the action expert's k_proj"),
    ("gemma_expert", "self_attn.", "self_attn.v_proj", "the action expert's v_proj"),
    ("gemma_expert", "self_attn.", "self_attn.o_proj", "the action expert's o_proj"),
    ("gemma_expert", "mlp.", "mlp.down_proj", "the action expert's down_proj"),
    ("", "action_time_mlp_out", "action_time_mlp_out", "action_time_mlp_out"),
    ("", "time_mlp_in", "time_mlp_in", "time_mlp_in"),
];

/// A kind of weight that is wrong in every layer.
fn everywhere(checkpoint: &Checkpoint, list: &mut List) {
    for (tower, folder, leaf, title) in KINDS {
        let of_kind = |name: &str| name.contains(tower) && name.contains(leaf) && name.ends_with(".weight");
        let Some(first) = checkpoint.tensors().find(|t| of_kind(&t.name)) else { continue };
        let from = order::of_weight(&first.name);
        let plant = |change: Repack| {
            let tower = tower.to_string();
            let here = move |w: &mut pi0_device::WeightSource| {
                if w.name().contains(&tower) {
                    change(w);
                }
            };
            vec![Plant::Weight(folder.to_string(), Rc::new(here))]
        };
        let what = format!("{title} is transposed (its rows are read as columns) in every layer");
        list.plants("transposed", &what, from, plant(Rc::new(mistakes::transposed(leaf.to_string()))));
        // A bias of the keys moves all logits of a row alike, so nothing reads it.
        if tower == "vision_tower" && !leaf.contains("k_proj") {
            let what = format!("{title} has no bias in any layer");
            list.plants("no-bias", &what, from, plant(Rc::new(mistakes::without_bias(leaf.to_string()))));
        }
    }
}

/// Names of what [`of_weights`] lists.
pub const OF_WEIGHTS: [&str; 2] = ["transposed", "no-bias"];

/// Single weights that act after `after` and not after `until`: transposed, or without their bias.
pub fn of_weights(checkpoint: &Checkpoint, after: Option<Rank>, until: Rank) -> Vec<Hypothesis> {
    let mut list = List(Vec::new());
    let near = |name: &str| {
        let rank = order::of_weight(name);
        rank <= until && after.is_none_or(|after| rank >= (after.0, after.1, 0))
    };
    let is_linear = |name: &str| {
        name.ends_with(".weight")
            && !name.contains("norm")
            && !name.contains("embed")
            && !name.contains("lm_head")
            || name.contains("patch_embedding.weight")
    };
    for t in checkpoint.tensors().filter(|t| is_linear(&t.name) && near(&t.name)) {
        let from = order::of_weight(&t.name);
        let leaf = t.name.trim_end_matches(".weight");
        // Fused layers are named by their first tensor, so they are found by their folder.
        let folder = leaf.rsplit_once('.').map_or(leaf, |(folder, _)| folder).to_string();
        let plant = |change: Repack| vec![Plant::Weight(folder.clone(), change)];
        let what = format!("{leaf} is transposed (its rows are read as columns)");
        list.plants("transposed", &what, from, plant(Rc::new(mistakes::transposed(leaf.to_string()))));
        let bias = format!("{leaf}.bias");
        if checkpoint.tensors().any(|b| b.name == bias) && !leaf.contains("k_proj") {
            let what = format!("{leaf} has no bias");
            list.plants("no-bias", &what, from, plant(Rc::new(mistakes::without_bias(leaf.to_string()))));
        }
    }
    list.0
}
