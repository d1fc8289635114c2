//! A whole inference on paper: every kernel that the operations of the model launch, with what it takes.

use super::{
    Attended, Chip, LinearTiles, Machine, Rates, Work, attention, best_linear, copy, eltwise, gather, linear,
    norm, norm_parts, parts_of_inputs,
};
use crate::kernels::{Banks, EltwiseOp, Epilogue, Matmul, NormForm, l1};
use crate::layout::{Format, tiles};

/// Which network.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Model {
    /// π0: a state row, and the time among the inputs of the suffix.
    Pi0,
    /// π0.5: no state row; norms modulated and residuals gated by the time.
    Pi05,
}

/// What one inference of one robot works on. The sizes of the network are those of PaliGemma 2B and the 300M expert.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Workload {
    /// Which network.
    pub model: Model,
    /// Pictures of 224x224.
    pub cameras: usize,
    /// Tokens of the prompt.
    pub tokens: usize,
    /// Denoising steps.
    pub steps: usize,
    /// Whether weights are bfp8.
    pub bfp8: bool,
}

/// Actions of a chunk.
const HORIZON: usize = 50;
const PATCHES: usize = 256;
const LAYERS: u64 = 18;
/// Key tiles of heads of 256 that stay in L1 in bf16.
const MOST_RESIDENT: usize = 24;

/// Kernels of one kind in one stage of an inference.
#[derive(Debug, Clone, PartialEq)]
pub struct Line {
    /// `vision`, `prefix` or `denoising`.
    pub stage: &'static str,
    /// What the kernels are.
    pub kind: &'static str,
    /// How many kernels are launched.
    pub launches: u64,
    /// What bounds most of their time in the realistic case.
    pub bound: &'static str,
    /// Seconds, without launches, if every unit does what is documented.
    pub optimistic: f64,
    /// Seconds, without launches, with measured rates.
    pub realistic: f64,
}

/// An inference on paper.
#[derive(Debug, Clone, PartialEq)]
pub struct Estimate {
    /// The chip.
    pub chip: Chip,
    /// By stage and kind, in the order in which they first run.
    pub lines: Vec<Line>,
    /// Seconds between kernels and of the one start, optimistic and realistic.
    pub launches: [f64; 2],
    /// Seconds if the matrix units were all that counts, at their documented rate.
    pub matrix: f64,
    /// Seconds if reading every weight once a use at 288 GB/s were all that counts.
    pub weights: f64,
}

impl Estimate {
    /// Kernels launched.
    pub fn launch_count(&self) -> u64 {
        self.lines.iter().map(|l| l.launches).sum()
    }

    /// Seconds of the kernels, optimistic and realistic.
    pub fn kernels(&self) -> [f64; 2] {
        [self.lines.iter().map(|l| l.optimistic).sum(), self.lines.iter().map(|l| l.realistic).sum()]
    }

    /// Seconds of everything, optimistic and realistic.
    pub fn total(&self) -> [f64; 2] {
        let kernels = self.kernels();
        [kernels[0] + self.launches[0], kernels[1] + self.launches[1]]
    }
}

/// What others have measured on cards.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Published {
    /// What was measured.
    pub what: &'static str,
    /// Milliseconds of one inference.
    pub milliseconds: f64,
    /// The accuracy that was reported with it.
    pub accuracy: &'static str,
    /// Where.
    pub source: &'static str,
}

/// Latencies of this family of models that Tenstorrent has published. All with ten steps.
pub const PUBLISHED: [Published; 3] = [
    Published {
        what: "π0, one chip of an n300, 2 cameras, 32 tokens, tt-metal with trace and two queues",
        milliseconds: 326.27,
        accuracy: "PCC 0.9876 against its own reference, which has no attention mask",
        source: "tt-metal PR #38174, February 2026",
    },
    Published {
        what: "π0, p150a (Blackhole), tt-metal",
        milliseconds: 140.6,
        accuracy: "PCC 0.9902",
        source: "tt-metal PR #41431, April 2026",
    },
    Published {
        what: "π0.5, p150a (Blackhole), 2 cameras, tt-metal with trace and two queues",
        milliseconds: 50.42,
        accuracy: "PCC 0.926",
        source: "tt-metal, models/experimental/pi0_5 README, October 2026",
    },
];

/// Collects kernels into lines.
struct Pass {
    chip: Chip,
    machines: [Machine; 2],
    bfp8: bool,
    stage: &'static str,
    lines: Vec<Line>,
    /// Seconds by bounding unit of each line.
    shares: Vec<Vec<(&'static str, f64)>>,
    matrix: f64,
    weights: f64,
}

impl Pass {
    fn add(&mut self, kind: &'static str, times: u64, work: &Work) {
        let [(_, optimistic), (bound, realistic)] = self.machines.each_ref().map(|m| m.bound(work));
        let seconds = |s: f64| s * times as f64;
        let at =
            self.lines.iter().position(|l| (l.stage, l.kind) == (self.stage, kind)).unwrap_or_else(|| {
                let zero =
                    Line { stage: self.stage, kind, launches: 0, bound: "", optimistic: 0.0, realistic: 0.0 };
                self.lines.push(zero);
                self.shares.push(Vec::new());
                self.lines.len() - 1
            });
        let line = &mut self.lines[at];
        line.launches += times;
        line.optimistic += seconds(optimistic);
        line.realistic += seconds(realistic);
        match self.shares[at].iter_mut().find(|s| s.0 == bound) {
            Some(share) => share.1 += seconds(realistic),
            None => self.shares[at].push((bound, seconds(realistic))),
        }
        let most = self.shares[at].iter().max_by(|a, b| a.1.total_cmp(&b.1));
        self.lines[at].bound = most.map_or("", |s| s.0);
    }

    /// Norms of rows of tiles before layers with bf16 weights, in the parts that the launcher chooses.
    fn norms(&mut self, times: u64, rows: usize, cols: usize, form: NormForm) {
        let parts = norm_parts(&self.machines[1], rows, cols, form, Format::Bf16);
        self.add("norms", times, &norm(self.chip.cores(), rows, cols, form, Format::Bf16, parts));
    }

    /// A linear layer from `inputs` to `outputs` columns, with the sizes that the launcher chooses.
    fn linear(&mut self, times: u64, rows: usize, inputs: usize, outputs: usize, form: Form) {
        let depth = tiles(inputs) + usize::from(form.bias);
        let plain = matches!(form.epilogue, Epilogue::None | Epilogue::Residual);
        let parts = if plain { parts_of_inputs(depth, form.bias) } else { 1 };
        let t = LinearTiles { rows: parts * tiles(rows), cols: tiles(outputs), depth: depth / parts, parts };
        if parts > 1 {
            let op = if form.epilogue == Epilogue::Residual { EltwiseOp::AddBoth } else { EltwiseOp::Add };
            let sum = eltwise(self.chip.cores(), op, t.rows / parts * t.cols, Format::F32);
            self.add("linear layers", times, &sum);
        }
        let epilogue = if parts > 1 { Epilogue::None } else { form.epilogue };
        let output = match epilogue {
            Epilogue::None | Epilogue::Residual => Format::F32,
            _ => form.weight.of_activations(),
        };
        let weight = if self.bfp8 && form.weight == Format::Bf16 { Format::Bfp8 } else { form.weight };
        let like = Matmul::smallest([form.x, weight], form.bias, epilogue, output, Banks(12));
        let cores = self.chip.cores();
        let room = L1_BYTES - l1::DATA;
        if let Some(plan) = best_linear(&self.machines[1], t, like, room, l1::ARG_WORDS - 64) {
            self.add("linear layers", times, &linear(cores, t, &plan));
        }
        let products = (t.rows * t.cols * t.depth) as f64;
        self.matrix += times as f64 * products * super::PRODUCT_CYCLES as f64 / cores as f64 * 1e-9;
        self.weights += times as f64 * (t.cols * t.depth * weight.whole_tile_bytes()) as f64 / 288e9;
    }
}

const L1_BYTES: u32 = 1464 * 1024;

/// The form of a linear layer.
#[derive(Clone, Copy)]
struct Form {
    x: Format,
    weight: Format,
    bias: bool,
    epilogue: Epilogue,
}

/// Without bias, as in Gemma, on what norms, attention and activations store as bf16; with bias, as in SigLIP; f32 with
/// bias, as at the edges of the network.
const PLAIN: Form = Form { x: Format::Bf16, weight: Format::Bf16, bias: false, epilogue: Epilogue::None };
const BIASED: Form = Form { bias: true, ..PLAIN };
const EXACT: Form = Form { x: Format::F32, weight: Format::F32, ..BIASED };

fn with(form: Form, epilogue: Epilogue) -> Form {
    Form { epilogue, ..form }
}

/// Estimates an inference of one robot on one chip.
pub fn estimate(chip: Chip, w: &Workload) -> Estimate {
    estimate_at(chip, [Rates::OPTIMISTIC, Rates::REALISTIC], w)
}

/// The same at other rates.
pub(super) fn estimate_at(chip: Chip, rates: [Rates; 2], w: &Workload) -> Estimate {
    let mut pass = Pass {
        chip,
        machines: rates.map(|rates| Machine::new(chip.cores(), rates)),
        bfp8: w.bfp8,
        stage: "vision",
        lines: Vec::new(),
        shares: Vec::new(),
        matrix: 0.0,
        weights: 0.0,
    };
    let vision = PATCHES * w.cameras;
    let prefix = vision + w.tokens;
    if vision > 0 {
        pass.vision(vision);
    }
    pass.stage = "prefix";
    pass.prefix(vision, prefix, w);
    pass.stage = "denoising";
    pass.denoising(prefix, w);
    let launches: u64 = pass.lines.iter().map(|l| l.launches).sum();
    Estimate {
        chip,
        launches: pass.machines.map(|m| m.rates.launch * launches as f64 + m.rates.go),
        lines: pass.lines,
        matrix: pass.matrix,
        weights: pass.weights,
    }
}

impl Pass {
    fn vision(&mut self, rows: usize) {
        let (cores, t) = (self.chip.cores(), tiles(rows));
        self.linear(1, rows, 588, 1152, EXACT);
        self.add("pointwise", 1, &eltwise(cores, EltwiseOp::Add, t * 36, Format::F32));
        self.norms(2 * 27 + 1, t, 36, NormForm::Layer);
        // Heads of 72 are stored in three tiles each, from the weights on.
        self.linear(27, rows, 1152, 3 * 16 * 96, BIASED);
        // The rows of queries of one picture and head see the same keys.
        let keys = tiles(PATCHES);
        let attended = Attended {
            heads: 16,
            width: 3,
            rows: t,
            keys,
            masked: false,
            q: Format::F32,
            kv: Format::F32,
            same: keys,
        };
        self.add("attention", 27, &attention(cores, attended));
        self.linear(27, rows, 16 * 96, 1152, with(BIASED, Epilogue::Residual));
        self.linear(27, rows, 1152, 4304, with(BIASED, Epilogue::Gelu));
        self.linear(27, rows, 4304, 1152, with(BIASED, Epilogue::Residual));
        self.linear(1, rows, 1152, 2048, BIASED);
    }

    fn prefix(&mut self, vision: usize, rows: usize, w: &Workload) {
        let (cores, t) = (self.chip.cores(), tiles(rows));
        if vision > 0 && w.tokens > 0 {
            self.add("moves", 1, &copy(cores, tiles(vision) * 64));
            if !vision.is_multiple_of(crate::layout::TILE) {
                self.add("moves", 1, &gather(cores, tiles(w.tokens) * 64, 2));
            } else {
                self.add("moves", 1, &copy(cores, tiles(w.tokens) * 64));
            }
        }
        // Of the last layer only keys and values are computed.
        let whole = LAYERS - 1;
        let masked = !rows.is_multiple_of(crate::layout::TILE);
        self.norms(2 * whole + 1, t, 64, NormForm::Rms);
        self.linear(whole, rows, 2048, 2048 + 512, PLAIN);
        self.linear(1, rows, 2048, 512, PLAIN);
        // Queries and keys with the values behind them; in the last layer keys alone.
        self.add("rope", whole, &eltwise(cores, EltwiseOp::Rope, t * 80, Format::Bf16));
        self.add("rope", 1, &eltwise(cores, EltwiseOp::Rope, t * 8, Format::F32));
        // All heads and all rows see the same keys; they stay where no mask is needed and they fit.
        let same = if masked || t > MOST_RESIDENT { 1 } else { 8 * t };
        let attended = Attended {
            heads: 8,
            width: 8,
            rows: t,
            keys: t,
            masked,
            q: Format::Bf16,
            kv: Format::Bf16,
            same,
        };
        self.add("attention", whole, &attention(cores, attended));
        self.linear(whole, rows, 2048, 2048, with(PLAIN, Epilogue::Residual));
        self.linear(whole, rows, 2048, 2 * 16384, with(PLAIN, Epilogue::Geglu));
        self.linear(whole, rows, 16384, 2048, with(PLAIN, Epilogue::Residual));
    }

    fn denoising(&mut self, prefix: usize, w: &Workload) {
        let (cores, steps) = (self.chip.cores(), w.steps as u64);
        let pi0 = w.model == Model::Pi0;
        // The state row is counted in every step, though only the first has it: it shares a tile.
        let rows = HORIZON + usize::from(pi0);
        let (t, keys) = (tiles(rows), tiles(prefix) + tiles(rows) + usize::from(pi0));
        self.linear(steps, HORIZON, 32, 1024, EXACT);
        if pi0 {
            self.linear(1, 1, 32, 1024, EXACT);
            self.linear(1, w.steps, 1024, 1024, EXACT);
            // The row of the time is taken out, repeated for all actions, and added.
            self.add("moves", 2 * steps, &gather(cores, 32, 2));
            self.linear(steps, HORIZON, 1024, 1024, Form { bias: false, ..EXACT });
            self.add("pointwise", steps, &eltwise(cores, EltwiseOp::Add, t * 32, Format::F32));
            self.add("pointwise", steps, &eltwise(cores, EltwiseOp::Silu, t * 32, Format::F32));
            self.linear(steps, HORIZON, 1024, 1024, EXACT);
            // The first step: state and actions come together and part; keys and values of the state are kept.
            self.add("moves", 2, &gather(cores, t * 32, 2));
            self.add("moves", 2 * LAYERS, &gather(cores, 8, 2));
        }
        let layers = LAYERS * steps;
        // The scales, shifts and gates of all steps are made once and kept.
        let form = if pi0 { NormForm::Rms } else { NormForm::Ada };
        self.norms(2 * layers + steps, t, 32, form);
        self.linear(layers, rows, 1024, 2048 + 512, PLAIN);
        self.add("rope", layers, &eltwise(cores, EltwiseOp::Rope, t * 80, Format::Bf16));
        let attended = Attended {
            heads: 8,
            width: 8,
            rows: t,
            keys,
            masked: true,
            q: Format::Bf16,
            kv: Format::Bf16,
            same: 1,
        };
        self.add("attention", layers, &attention(cores, attended));
        // The prefix's last layer has f32, once; in the first step so have the actions, which have parted from the state.
        self.add("moves", 2, &eltwise(cores, EltwiseOp::Copy, tiles(prefix) * 8, Format::Bf16));
        if pi0 {
            self.add("moves", 2 * LAYERS, &eltwise(cores, EltwiseOp::Copy, t * 8, Format::Bf16));
        }
        let residual = if pi0 { Epilogue::Residual } else { Epilogue::None };
        self.linear(layers, rows, 2048, 1024, with(PLAIN, residual));
        self.linear(layers, rows, 1024, 2 * 4096, with(PLAIN, Epilogue::Geglu));
        self.linear(layers, rows, 4096, 1024, with(PLAIN, residual));
        if !pi0 {
            self.add("pointwise", 2 * layers, &eltwise(cores, EltwiseOp::GatedAdd, t * 32, Format::F32));
        }
        self.linear(steps, HORIZON, 1024, 32, EXACT);
        self.add("pointwise", steps, &eltwise(cores, EltwiseOp::AddScaled(0), t, Format::F32));
    }
}
