//! The planted errors, and whose they are.

use std::rc::Rc;

use pi0_device::{Keys, OpKind, Span, TensorSource, WeightSource};
use pi0_judge::mutated::Plant;
use pi0_judge::mutated::mistakes::{self, Rotation};

/// What is wrong, the module that must be blamed, and the error.
pub fn all() -> Vec<(&'static str, &'static str, Plant)> {
    use Plant::*;
    vec![
        (
            "projector weights 1 % too large",
            "projector",
            weight("multi_modal_projector", |w| each(w, |x| 1.01 * x)),
        ),
        (
            "out_proj transposed",
            "siglip.attention",
            Weight("encoder.layers.1.self_attn".into(), Rc::new(mistakes::transposed("out_proj".into()))),
        ),
        (
            "fc1 without its bias",
            "siglip.mlp",
            weight("encoder.layers.0.mlp.fc1", |w| linear(w).0[0].bias = None),
        ),
        ("layer norm eps 1e-5", "siglip.mlp", weight("encoder.layers.1.layer_norm2", mistakes::norm_eps)),
        ("image channels reversed", "siglip.patch_embedding", weight("patch_embedding", reverse_channels)),
        ("position embedding not added", "siglip.patch_embedding", NoResidual("patch_embedding".into())),
        (
            "attention residual not added",
            "siglip.attention",
            NoResidual("encoder.layers.0.self_attn.out_proj".into()),
        ),
        (
            "exact GELU in place of tanh",
            "siglip.mlp",
            Activation(OpKind::Gelu, "vision".into(), mistakes::gelu_exact),
        ),
        ("logits scaled by 1 / head_dim", "siglip.attention", attend("vision", |_, s| *s *= *s)),
        (
            "gate and up swapped",
            "gemma.prefix.mlp",
            weight("language_model.layers.0.mlp.gate", |w| linear(w).0.swap(0, 1)),
        ),
        (
            "k and v swapped",
            "gemma.prefix.attention",
            weight("language_model.layers.0.self_attn.q_proj", |w| linear(w).0.swap(1, 2)),
        ),
        (
            "norm times w in place of 1 + w",
            "gemma.prefix.rms_norm",
            weight("language_model.layers.1.input_layernorm", mistakes::norm_less_one),
        ),
        (
            "RMS norm eps 1e-5",
            "gemma.expert.rms_norm",
            weight("gemma_expert.model.layers.1.post_attention", mistakes::norm_eps),
        ),
        ("positions one too high", "gemma.prefix.rope", late("prefix")),
        (
            "neighbours rotated in place of halves",
            "gemma.prefix.rope",
            Rotate("prefix".into(), Rotation::Neighbours),
        ),
        ("rotated the other way round", "gemma.expert.rope", Rotate("suffix".into(), Rotation::Backwards)),
        (
            "last key of every row dropped",
            "gemma.expert.attention",
            attend("suffix", |spans, _| {
                spans
                    .iter_mut()
                    .filter_map(|s| s.keys.last_mut())
                    .filter(|k| k.rows.len() > 1)
                    .for_each(|k| k.rows.end -= 1);
            }),
        ),
        (
            "state rows see the actions",
            "gemma.expert.attention",
            attend("suffix", |spans, _| {
                let last = spans.last().map(|s| s.keys.clone()).unwrap_or_default();
                spans.iter_mut().filter(|s| s.queries.len() == 1).for_each(|s| s.keys.clone_from(&last));
            }),
        ),
        (
            "robots see each other's images",
            "gemma.prefix.attention",
            attend("prefix", |spans, _| {
                let all: Vec<Keys> = spans.iter().take(2).flat_map(|s| s.keys.clone()).collect();
                spans[0].keys = all;
            }),
        ),
        (
            "every span one key short, everywhere",
            "attention.masks",
            attend("", |spans, _| {
                spans
                    .iter_mut()
                    .map(|s| &mut s.keys[0].rows)
                    .filter(|r| r.len() > 1)
                    .for_each(|r| r.start += 1);
            }),
        ),
        (
            "SiLU gate in place of GELU",
            "gemma.expert.mlp",
            Activation(OpKind::Geglu, "suffix".into(), mistakes::gate_silu),
        ),
        (
            "MLP residual not added",
            "gemma.expert.mlp",
            NoResidual("gemma_expert.model.layers.0.mlp.down_proj".into()),
        ),
        ("token embeddings half as large", "prefix", ScaleEmbedding(0.5)),
        ("prompt before images", "prefix", ReverseRows("prefix".into())),
        (
            "time and action halves swapped",
            "common.time_embedding",
            weight("action_time_mlp_in.weight[time]", |w| {
                let part = &mut linear(w).0[0];
                part.columns = Some(0..part.inputs());
            }),
        ),
        ("state projection without its bias", "suffix", weight("state_proj", |w| linear(w).0[0].bias = None)),
        ("GELU in place of SiLU", "suffix", Activation(OpKind::Silu, "suffix".into(), mistakes::gelu_of)),
        ("time of the neighbouring step", "suffix", SliceRows(1)),
        ("state rows kept one row off", "denoise", SliceRows(3)),
        ("actions before states", "denoise", ReverseRows("suffix".into())),
        ("action_out_proj 1 % too small", "denoise", weight("action_out_proj", |w| each(w, |x| 0.99 * x))),
        ("Euler step 1 % too long", "pi0", Step(1.01)),
    ]
}

/// The same for what only π0.5 has, and for what it has otherwise than π0.
pub fn pi05() -> Vec<(&'static str, &'static str, Plant)> {
    use Plant::*;
    vec![
        (
            "norm times scale in place of 1 + scale",
            "gemma.expert.rms_norm",
            AdaTable(|row, w| row[..w].iter_mut().for_each(|x| *x -= 1.0)),
        ),
        ("shift left out", "gemma.expert.rms_norm", AdaTable(|row, w| row[w..2 * w].fill(0.0))),
        ("adaptive norm eps 1e-5", "gemma.expert.rms_norm", AdaEps(1e-5)),
        (
            "gate and shift swapped in the norm",
            "gemma.expert.rms_norm",
            AdaTable(|row, w| row[w..].rotate_left(w)),
        ),
        (
            "every row at the first row's time",
            "gemma.expert.rms_norm",
            AdaRows(|rows| vec![rows[0]; rows.len()]),
        ),
        ("gate left out", "gemma.expert.gated_add", GateTable(|row, w| row[2 * w..].fill(1.0))),
        (
            "1 + gate in place of gate",
            "gemma.expert.gated_add",
            GateTable(|row, w| row[2 * w..].iter_mut().for_each(|x| *x += 1.0)),
        ),
        ("shift in place of gate", "gemma.expert.gated_add", GateTable(|row, w| row[w..].rotate_left(w))),
        (
            "residuals of the expert left out",
            "gemma.expert.attention, gemma.expert.mlp",
            NoResidual("gemma_expert".into()),
        ),
        (
            "gate and shift swapped in the checkpoint",
            "common.modulations",
            weight("layers.1.input_layernorm.dense", swap_shift_and_gate),
        ),
        (
            "dense layer of a norm without its bias",
            "common.modulations",
            weight("layers.0.post_attention_layernorm.dense", |w| linear(w).0[0].bias = None),
        ),
        (
            "SiLU left out",
            "common.time_embedding",
            Activation(OpKind::Silu, "modulations".into(), mistakes::identity),
        ),
        (
            "GELU in place of SiLU",
            "common.time_embedding",
            Activation(OpKind::Silu, "modulations".into(), mistakes::gelu_of),
        ),
        (
            "time_mlp_out without its bias",
            "common.time_embedding",
            weight("time_mlp_out", |w| linear(w).0[0].bias = None),
        ),
        ("actions one position late, as behind a state row", "gemma.expert.rope", late("suffix")),
        (
            "actions do not see the last action",
            "gemma.expert.attention",
            attend("suffix", |spans, _| {
                spans.iter_mut().filter_map(|s| s.keys.last_mut()).for_each(|k| k.rows.end -= 1);
            }),
        ),
        (
            "action_in_proj without its bias",
            "suffix",
            weight("action_in_proj", |w| linear(w).0[0].bias = None),
        ),
        ("action_out_proj 1 % too small", "denoise", weight("action_out_proj", |w| each(w, |x| 0.99 * x))),
        ("known actions move", "pi0", StepRows(|rows| vec![0; rows.len()])),
    ]
}

/// The same for what π0-FAST does in place of denoising.
pub fn fast() -> Vec<(&'static str, &'static str, Plant)> {
    use Plant::*;
    vec![
        ("projector 1 % too large", "projector", weight("multi_modal_projector", |w| each(w, |x| 1.01 * x))),
        ("vocabulary head 1 % too large", "answer.head", weight("lm_head", |w| each(w, |x| 1.01 * x))),
        (
            "final norm times w in place of 1 + w",
            "gemma.prefix.rms_norm",
            weight("language_model.norm", mistakes::norm_less_one),
        ),
        (
            "keys and values of a token stored one place early",
            "answer.tokens",
            Store(|at| at.iter_mut().for_each(|at| *at = at.saturating_sub(1))),
        ),
        (
            "tokens do not see themselves",
            "answer.tokens",
            attend("answer", |spans, _| spans.iter_mut().for_each(|s| s.keys.truncate(s.keys.len() - 1))),
        ),
        (
            "tokens do not see the last of the prompt",
            "answer.tokens",
            attend("answer", |spans, _| {
                let of_prefix = |k: &&mut Keys| k.part == 1;
                spans
                    .iter_mut()
                    .filter_map(|s| s.keys.iter_mut().filter(of_prefix).last())
                    .for_each(|k| k.rows.end -= 1);
            }),
        ),
        (
            "tokens do not see the first of the answer",
            "answer.tokens",
            attend("answer", |spans, _| {
                let written = |k: &&mut Keys| k.part == 2 && k.rows.len() > 1;
                spans
                    .iter_mut()
                    .filter_map(|s| s.keys.iter_mut().find(written))
                    .for_each(|k| k.rows.start += 1);
            }),
        ),
        ("tokens one position late", "answer.tokens", late("answer")),
        ("logits of attention scaled by 1 / head_dim", "answer.tokens", attend("answer", |_, s| *s *= *s)),
        ("token embeddings half as large", "prefix, answer.tokens", ScaleEmbedding(0.5)),
        ("the prompt's last row but one", "answer.prompt", SliceRows(1)),
        ("last rows of the robots in another order", "answer.prompt", ReverseRows("prefix.layer1".into())),
        ("prompt one position late", "gemma.prefix.rope", late("prefix")),
        (
            "gate and up swapped",
            "gemma.prefix.mlp",
            weight("language_model.layers.1.mlp.gate", |w| linear(w).0.swap(0, 1)),
        ),
        (
            "k and v swapped",
            "gemma.prefix.attention",
            weight("language_model.layers.1.self_attn.q_proj", |w| linear(w).0.swap(1, 2)),
        ),
    ]
}

/// The module that has a site of [`Mutated::sites`](pi0_judge::mutated::Mutated::sites). The last prefix layer computes
/// only keys and values, in a form that no smaller module has.
pub fn owner(site: &str, last: usize) -> String {
    let [scope, op, key] = site.split('|').collect::<Vec<_>>()[..] else { panic!("{site}") };
    let has = |names: &[&str]| names.iter().any(|n| key.contains(n));
    let module = scope.split('.').collect::<Vec<_>>();
    match module[..] {
        _ if op == "ada_rms_norm" => "gemma.expert.rms_norm".into(),
        ["suffix", ..] if op == "gated_add" => "gemma.expert.gated_add".into(),
        ["modulations"] if has(&["dense"]) => "common.modulations".into(),
        ["modulations"] => "common.time_embedding".into(),
        ["answer"] if has(&["lm_head"]) || op == "rms_norm" => "answer.head".into(),
        ["answer", ..] => "answer.tokens".into(),
        ["prefix", _] if ["slice_rows", "concat_rows"].contains(&op) => "answer.prompt".into(),
        ["vision", _] if has(&["self_attn", "layer_norm1"]) => "siglip.attention".into(),
        ["vision", _] => "siglip.mlp".into(),
        ["vision"] if has(&["patch_embedding"]) => "siglip.patch_embedding".into(),
        ["vision"] => "projector".into(),
        [tower @ ("prefix" | "suffix"), layer] => {
            let tower = if tower == "prefix" { "prefix" } else { "expert" };
            match op {
                "rms_norm" => format!("gemma.{tower}.rms_norm"),
                _ if tower == "prefix" && layer == format!("layer{last}") => "paligemma".into(),
                _ if has(&["self_attn"]) => format!("gemma.{tower}.attention"),
                _ => format!("gemma.{tower}.mlp"),
            }
        }
        ["prefix"] => "prefix".into(),
        ["suffix"] if op == "rms_norm" => "gemma.expert.rms_norm".into(),
        ["suffix"] if op == "linear" && has(&["[time]"]) => "common.time_embedding".into(),
        ["suffix"] if has(&["action_out_proj"]) || op == "concat_rows" => "denoise".into(),
        ["suffix"] if op == "slice_rows" && !has(&["action_in_proj"]) => "denoise".into(),
        ["suffix"] => "suffix".into(),
        _ => "pi0".into(),
    }
}

fn linear(w: &mut WeightSource) -> (&mut Vec<pi0_device::LinearPart>, &mut bool) {
    match w {
        WeightSource::Linear { parts, exact } => (parts, exact),
        other => panic!("{} is no linear layer", other.name()),
    }
}

fn changed(t: &TensorSource, data: &[f32]) -> TensorSource {
    TensorSource::from_f32(t.name.clone(), t.shape.clone(), data).unwrap()
}

fn each(w: &mut WeightSource, f: fn(f32) -> f32) {
    for part in linear(w).0 {
        let data: Vec<f32> = part.weight.to_f32().into_iter().map(f).collect();
        part.weight = changed(&part.weight, &data);
    }
}

/// Rows of scale, gate, shift in place of scale, shift, gate.
fn swap_shift_and_gate(w: &mut WeightSource) {
    let part = &mut linear(w).0[0];
    let [outputs, inputs] = part.weight.shape[..] else { panic!("a matrix") };
    let mut data = part.weight.to_f32();
    data[outputs / 3 * inputs..].rotate_left(outputs / 3 * inputs);
    part.weight = changed(&part.weight, &data);
    let bias = part.bias.as_mut().expect("it has one");
    let mut data = bias.to_f32();
    data[outputs / 3..].rotate_left(outputs / 3);
    *bias = changed(bias, &data);
}

fn reverse_channels(w: &mut WeightSource) {
    let part = &mut linear(w).0[0];
    let channel = part.inputs() / 3;
    let data = part.weight.to_f32();
    let rows = data.chunks_exact(3 * channel);
    let data: Vec<f32> = rows.flat_map(|row| row.chunks_exact(channel).rev().flatten().copied()).collect();
    part.weight = changed(&part.weight, &data);
}

fn weight(name: &str, change: fn(&mut WeightSource)) -> Plant {
    Plant::Weight(name.into(), Rc::new(change))
}

fn attend(scope: &str, change: fn(&mut Vec<Span>, &mut f32)) -> Plant {
    Plant::Attend(scope.into(), Rc::new(change))
}

/// Positions one too high.
fn late(scope: &str) -> Plant {
    Plant::Positions(scope.into(), Rc::new(|positions| positions.iter().map(|p| p + 1).collect()))
}
