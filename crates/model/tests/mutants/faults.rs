//! The planted errors, and whose they are.

use std::sync::Arc;

use pi0_device::{
    ADA_EPS, Device, Dtype, HostTensor, Keys, Modulation, NormKind, OpKind, Reference, Result, TensorSource,
    WeightSource,
};

use crate::mutant::{Plant, map};

/// What is wrong, the module that must be blamed, and the error.
pub fn all() -> Vec<(&'static str, &'static str, Plant)> {
    use Plant::*;
    vec![
        (
            "projector weights 1 % too large",
            "projector",
            Weight("multi_modal_projector", |w| each(w, |x| 1.01 * x)),
        ),
        ("out_proj transposed", "siglip.attention", Weight("encoder.layers.1.self_attn.out_proj", transpose)),
        (
            "fc1 without its bias",
            "siglip.mlp",
            Weight("encoder.layers.0.mlp.fc1", |w| linear(w).0[0].bias = None),
        ),
        ("layer norm eps 1e-5", "siglip.mlp", Weight("encoder.layers.1.layer_norm2", |w| eps(w, 1e-5))),
        ("image channels reversed", "siglip.patch_embedding", Weight("patch_embedding", reverse_channels)),
        ("position embedding not added", "siglip.patch_embedding", Residual("patch_embedding")),
        ("attention residual not added", "siglip.attention", Residual("encoder.layers.0.self_attn.out_proj")),
        (
            "exact GELU in place of tanh",
            "siglip.mlp",
            Activation(OpKind::Gelu, "vision", |x| Ok(map(x, exact_gelu))),
        ),
        ("logits scaled by 1 / head_dim", "siglip.attention", Attention("vision", |_, s| *s *= *s)),
        (
            "gate and up swapped",
            "gemma.prefix.mlp",
            Weight("language_model.layers.0.mlp.gate", |w| linear(w).0.swap(0, 1)),
        ),
        (
            "k and v swapped",
            "gemma.prefix.attention",
            Weight("language_model.layers.0.self_attn.q_proj", |w| linear(w).0.swap(1, 2)),
        ),
        (
            "norm times w in place of 1 + w",
            "gemma.prefix.rms_norm",
            Weight("language_model.layers.1.input_layernorm", |w| norm(w, |x| x - 1.0)),
        ),
        (
            "RMS norm eps 1e-5",
            "gemma.expert.rms_norm",
            Weight("gemma_expert.model.layers.1.post_attention", |w| eps(w, 1e-5)),
        ),
        (
            "positions one too high",
            "gemma.prefix.rope",
            Rope("prefix", |x, p, d| Reference.rope(x, &shifted(p), d)),
        ),
        ("neighbours rotated in place of halves", "gemma.prefix.rope", Rope("prefix", rotate_neighbours)),
        ("rotation without its sine half", "gemma.expert.rope", Rope("suffix", rotate_without_sine)),
        (
            "last key of every row dropped",
            "gemma.expert.attention",
            Attention("suffix", |spans, _| {
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
            Attention("suffix", |spans, _| {
                let last = spans.last().map(|s| s.keys.clone()).unwrap_or_default();
                spans.iter_mut().filter(|s| s.queries.len() == 1).for_each(|s| s.keys.clone_from(&last));
            }),
        ),
        (
            "robots see each other's images",
            "gemma.prefix.attention",
            Attention("prefix", |spans, _| {
                let all: Vec<Keys> = spans.iter().take(2).flat_map(|s| s.keys.clone()).collect();
                spans[0].keys = all;
            }),
        ),
        (
            "every span one key short, everywhere",
            "attention.masks",
            Attention("", |spans, _| {
                spans
                    .iter_mut()
                    .map(|s| &mut s.keys[0].rows)
                    .filter(|r| r.len() > 1)
                    .for_each(|r| r.start += 1);
            }),
        ),
        ("SiLU gate in place of GELU", "gemma.expert.mlp", Activation(OpKind::Geglu, "suffix", silu_gate)),
        ("MLP residual not added", "gemma.expert.mlp", Residual("gemma_expert.model.layers.0.mlp.down_proj")),
        ("token embeddings not scaled", "prefix", EmbedScale(1.0)),
        ("prompt before images", "prefix", Concat("prefix")),
        (
            "time and action halves swapped",
            "common.time_embedding",
            Weight("action_time_mlp_in.weight[time]", |w| {
                let part = &mut linear(w).0[0];
                part.columns = Some(0..part.inputs());
            }),
        ),
        ("state projection without its bias", "suffix", Weight("state_proj", |w| linear(w).0[0].bias = None)),
        ("GELU in place of SiLU", "suffix", Activation(OpKind::Silu, "suffix", |x| Reference.gelu(x))),
        ("time of the neighbouring step", "suffix", SliceRows(1)),
        ("state rows kept one row off", "denoise", SliceRows(3)),
        ("actions before states", "denoise", Concat("suffix")),
        ("action_out_proj 1 % too small", "denoise", Weight("action_out_proj", |w| each(w, |x| 0.99 * x))),
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
            Ada("suffix", |x, by| ada(x, by, -1.0, 1.0, 1.0)),
        ),
        ("shift left out", "gemma.expert.rms_norm", Ada("suffix", |x, by| ada(x, by, 0.0, 1.0, 0.0))),
        (
            "adaptive norm eps 1e-5",
            "gemma.expert.rms_norm",
            Ada("suffix", |x, by| ada(x, by, 0.0, 10.0, 1.0)),
        ),
        (
            "gate and shift swapped in the norm",
            "gemma.expert.rms_norm",
            Ada("suffix", |x, by| {
                with_table(by, |row, w| row[w..].rotate_left(w), |by| Reference.ada_rms_norm(x, by))
            }),
        ),
        (
            "every row at the first row's time",
            "gemma.expert.rms_norm",
            Ada("suffix", |x, by| {
                Reference
                    .ada_rms_norm(x, &Modulation { table: by.table, rows: &vec![by.rows[0]; by.rows.len()] })
            }),
        ),
        ("gate left out", "gemma.expert.gated_add", Gated("suffix", |x, y, _| Reference.add(x, y))),
        (
            "1 + gate in place of gate",
            "gemma.expert.gated_add",
            Gated("suffix", |x, y, by| Reference.add(&Reference.gated_add(x, y, by)?, y)),
        ),
        (
            "shift in place of gate",
            "gemma.expert.gated_add",
            Gated("suffix", |x, y, by| {
                with_table(by, |row, w| row[w..].rotate_left(w), |by| Reference.gated_add(x, y, by))
            }),
        ),
        (
            "residual left out",
            "gemma.expert.gated_add",
            Gated("suffix", |x, y, by| Reference.add_scaled(&Reference.gated_add(x, y, by)?, x, -1.0)),
        ),
        (
            "gate and shift swapped in the checkpoint",
            "common.modulations",
            Weight("layers.1.input_layernorm.dense", swap_shift_and_gate),
        ),
        (
            "dense layer of a norm without its bias",
            "common.modulations",
            Weight("layers.0.post_attention_layernorm.dense", |w| linear(w).0[0].bias = None),
        ),
        (
            "SiLU left out",
            "common.time_embedding",
            Activation(OpKind::Silu, "modulations", |x| Ok(x.clone())),
        ),
        (
            "GELU in place of SiLU",
            "common.time_embedding",
            Activation(OpKind::Silu, "modulations", |x| Reference.gelu(x)),
        ),
        (
            "time_mlp_out without its bias",
            "common.time_embedding",
            Weight("time_mlp_out", |w| linear(w).0[0].bias = None),
        ),
        (
            "actions one position late, as behind a state row",
            "gemma.expert.rope",
            Rope("suffix", |x, p, d| Reference.rope(x, &shifted(p), d)),
        ),
        (
            "actions do not see the last action",
            "gemma.expert.attention",
            Attention("suffix", |spans, _| {
                spans.iter_mut().filter_map(|s| s.keys.last_mut()).for_each(|k| k.rows.end -= 1);
            }),
        ),
        (
            "action_in_proj without its bias",
            "suffix",
            Weight("action_in_proj", |w| linear(w).0[0].bias = None),
        ),
        ("action_out_proj 1 % too small", "denoise", Weight("action_out_proj", |w| each(w, |x| 0.99 * x))),
        (
            "known actions move",
            "pi0",
            Gated("", |x, y, by| {
                Reference.gated_add(x, y, &Modulation { table: by.table, rows: &vec![0; by.rows.len()] })
            }),
        ),
    ]
}

/// The same for what π0-FAST does in place of denoising.
pub fn fast() -> Vec<(&'static str, &'static str, Plant)> {
    use Plant::*;
    vec![
        ("projector 1 % too large", "projector", Weight("multi_modal_projector", |w| each(w, |x| 1.01 * x))),
        ("vocabulary head 1 % too large", "answer.head", Weight("lm_head", |w| each(w, |x| 1.01 * x))),
        (
            "final norm times w in place of 1 + w",
            "gemma.prefix.rms_norm",
            Weight("language_model.norm", |w| norm(w, |x| x - 1.0)),
        ),
        (
            "keys and values of a token stored one place early",
            "answer.tokens",
            Store(|at| at.iter_mut().for_each(|at| *at = at.saturating_sub(1))),
        ),
        (
            "tokens do not see themselves",
            "answer.tokens",
            Attention("answer", |spans, _| spans.iter_mut().for_each(|s| s.keys.truncate(s.keys.len() - 1))),
        ),
        (
            "tokens do not see the last of the prompt",
            "answer.tokens",
            Attention("answer", |spans, _| {
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
            Attention("answer", |spans, _| {
                let written = |k: &&mut Keys| k.part == 2 && k.rows.len() > 1;
                spans
                    .iter_mut()
                    .filter_map(|s| s.keys.iter_mut().find(written))
                    .for_each(|k| k.rows.start += 1);
            }),
        ),
        (
            "tokens one position late",
            "answer.tokens",
            Rope("answer", |x, p, d| Reference.rope(x, &shifted(p), d)),
        ),
        ("logits of attention scaled by 1 / head_dim", "answer.tokens", Attention("answer", |_, s| *s *= *s)),
        ("tokens embedded without sqrt(width)", "prefix, answer.tokens", EmbedScale(1.0)),
        ("the prompt's last row but one", "answer.prompt", SliceRows(1)),
        ("last rows of the robots in another order", "answer.prompt", Concat("prefix.layer1")),
        (
            "prompt one position late",
            "gemma.prefix.rope",
            Rope("prefix", |x, p, d| Reference.rope(x, &shifted(p), d)),
        ),
        (
            "gate and up swapped",
            "gemma.prefix.mlp",
            Weight("language_model.layers.1.mlp.gate", |w| linear(w).0.swap(0, 1)),
        ),
        (
            "k and v swapped",
            "gemma.prefix.attention",
            Weight("language_model.layers.1.self_attn.q_proj", |w| linear(w).0.swap(1, 2)),
        ),
    ]
}

/// The module that has a site of [`Mutant::sites`](crate::mutant::Mutant::sites). The last prefix layer computes
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

/// An adaptive norm with `1 + more + scale`, another eps, and the shift times a factor.
fn ada(
    x: &Arc<HostTensor>,
    by: &Modulation<'_, Arc<HostTensor>>,
    more: f32,
    eps_times: f32,
    shifts: f32,
) -> Result<Arc<HostTensor>> {
    let width = x.cols();
    let mut y = HostTensor::clone(x);
    for (r, &picked) in by.rows.iter().enumerate() {
        let drive = by.table.row(picked as usize);
        let mean = x.row(r).iter().map(|x| f64::from(*x).powi(2)).sum::<f64>() / width as f64;
        let inverse = 1.0 / (mean + f64::from(ADA_EPS * eps_times)).sqrt();
        for (i, y) in y.row_mut(r).iter_mut().enumerate() {
            *y = *y * inverse as f32 * (1.0 + more + drive[i]) + shifts * drive[width + i];
        }
    }
    Ok(Arc::new(y))
}

/// Runs `f` by a table of which each row was changed, given the width of its parts.
fn with_table(
    by: &Modulation<'_, Arc<HostTensor>>,
    change: fn(&mut [f32], usize),
    f: impl Fn(&Modulation<'_, Arc<HostTensor>>) -> Result<Arc<HostTensor>>,
) -> Result<Arc<HostTensor>> {
    let mut table = HostTensor::clone(by.table);
    let width = table.cols() / 3;
    (0..table.rows()).for_each(|r| change(table.row_mut(r), width));
    f(&Modulation { table: &Arc::new(table), rows: by.rows })
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

fn transpose(w: &mut WeightSource) {
    let part = &mut linear(w).0[0];
    let [n, m] = part.weight.shape[..] else { panic!("a matrix") };
    assert_eq!(n, m);
    let data = part.weight.to_f32();
    part.weight = changed(&part.weight, &(0..n * n).map(|i| data[i % n * n + i / n]).collect::<Vec<_>>());
}

fn reverse_channels(w: &mut WeightSource) {
    let part = &mut linear(w).0[0];
    let channel = part.inputs() / 3;
    let data = part.weight.to_f32();
    let rows = data.chunks_exact(3 * channel);
    let data: Vec<f32> = rows.flat_map(|row| row.chunks_exact(channel).rev().flatten().copied()).collect();
    part.weight = changed(&part.weight, &data);
}

fn eps(w: &mut WeightSource, wrong: f32) {
    match w {
        WeightSource::Norm { eps, .. } => *eps = wrong,
        other => panic!("{} is no norm", other.name()),
    }
}

fn norm(w: &mut WeightSource, f: fn(f32) -> f32) {
    let WeightSource::Norm { kind: NormKind::Rms, weight, .. } = w else { panic!("no RMS norm") };
    assert_eq!(weight.dtype, Dtype::Bf16);
    let data: Vec<f32> = weight.to_f32().into_iter().map(f).collect();
    *weight = changed(weight, &data);
}

fn shifted(positions: &[u32]) -> Vec<u32> {
    positions.iter().map(|p| p + 1).collect()
}

/// Cosine and sine of pair `i` at `position`.
fn angle(position: u32, i: usize, head_dim: usize) -> (f32, f32) {
    let (sin, cos) = (position as f32 / 10000f32.powf(2.0 * i as f32 / head_dim as f32)).sin_cos();
    (cos, sin)
}

fn rotate(
    x: &HostTensor,
    positions: &[u32],
    dim: usize,
    pair: impl Fn(&mut [f32], usize, f32, f32),
) -> Arc<HostTensor> {
    let mut y = x.clone();
    for (r, &p) in positions.iter().enumerate() {
        for head in y.row_mut(r).chunks_exact_mut(dim) {
            (0..dim / 2).for_each(|i| {
                let (cos, sin) = angle(p, i, dim);
                pair(head, i, cos, sin);
            });
        }
    }
    Arc::new(y)
}

fn rotate_neighbours(x: &Arc<HostTensor>, positions: &[u32], dim: usize) -> Result<Arc<HostTensor>> {
    Ok(rotate(x, positions, dim, |head, i, cos, sin| {
        let (a, b) = (head[2 * i], head[2 * i + 1]);
        (head[2 * i], head[2 * i + 1]) = (a * cos - b * sin, b * cos + a * sin);
    }))
}

fn rotate_without_sine(x: &Arc<HostTensor>, positions: &[u32], dim: usize) -> Result<Arc<HostTensor>> {
    Ok(rotate(x, positions, dim, |head, i, cos, _| {
        head[i] *= cos;
        head[i + dim / 2] *= cos;
    }))
}

/// `x / 2 (1 + erf(x / √2))`, with erf by its series and tail: differs from the tanh form by up to 5e-4.
fn exact_gelu(x: f32) -> f32 {
    let z = f64::from(x) / std::f64::consts::SQRT_2;
    let erf = if z.abs() > 4.0 {
        z.signum()
    } else {
        let mut term = z;
        let mut sum = z;
        for n in 1..80 {
            term *= -z * z / f64::from(n);
            sum += term / f64::from(2 * n + 1);
        }
        sum * 2.0 / std::f64::consts::PI.sqrt()
    };
    (0.5 * f64::from(x) * (1.0 + erf)) as f32
}

fn silu_gate(x: &Arc<HostTensor>) -> Result<Arc<HostTensor>> {
    let n = x.cols() / 2;
    let (gate, up) = (Reference.slice_cols(x, 0..n)?, Reference.slice_cols(x, n..2 * n)?);
    let gate = Reference.silu(&gate)?;
    let data = gate.data.iter().zip(&up.data).map(|(g, u)| g * u).collect();
    Ok(Arc::new(HostTensor::new(gate.shape.clone(), data)))
}
