//! Names of tensors: every spelling that programs gave them leads to the one of the table.

use crate::Kind;
use crate::weights::{EMBED, EXPERT, LANGUAGE, LM_HEAD, PROJECTOR, VISION};

/// The name of the table for a stored name. Prefixes are stripped wherever they stand: those of wrappers
/// (torch.compile, data parallelism, PEFT, a policy around the model) and of earlier releases.
pub(super) fn canonical(name: &str) -> String {
    const WRAPPERS: [&str; 5] =
        ["_orig_mod", "module", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"];
    let parts: Vec<&str> = name.split('.').filter(|part| !WRAPPERS.contains(part)).collect();
    let after = |anchor: &str| parts.iter().position(|part| *part == anchor).map(|i| &parts[i + 1..]);
    let skip = |parts: &[&str], optional: &str| {
        let rest = if parts.first() == Some(&optional) { &parts[1..] } else { parts };
        rest.join(".")
    };
    for expert in ["gemma_expert", "expert", "action_expert"] {
        if let Some(rest) = after(expert) {
            return match skip(rest, "model") {
                rest if rest == "lm_head.weight" => {
                    "paligemma_with_expert.gemma_expert.lm_head.weight".into()
                }
                rest => format!("{EXPERT}.{rest}"),
            };
        }
    }
    if let Some(rest) = after("vision_tower") {
        return format!("{VISION}.{}", skip(rest, "vision_model"));
    }
    if let Some(rest) = after("multi_modal_projector") {
        return format!("{PROJECTOR}.{}", skip(rest, "linear"));
    }
    if let Some(rest) = after("language_model") {
        return match skip(rest, "model") {
            rest if rest == "lm_head.weight" => LM_HEAD.into(),
            rest => format!("{LANGUAGE}.{rest}"),
        };
    }
    match parts.as_slice() {
        [.., "lm_head", "weight"] => LM_HEAD.into(),
        [.., "embed_tokens", "weight"] => EMBED.into(),
        [.., layer, leaf @ ("weight" | "bias")] if PROJECTIONS.contains(layer) => format!("{layer}.{leaf}"),
        _ => parts.join(".").trim_start_matches("model.").into(),
    }
}

pub(super) const PROJECTIONS: [&str; 7] = [
    "state_proj",
    "action_in_proj",
    "action_out_proj",
    "action_time_mlp_in",
    "action_time_mlp_out",
    "time_mlp_in",
    "time_mlp_out",
];

/// Either network's time layers under the other's name.
pub(super) fn of_kind(name: String, kind: Kind) -> String {
    let (from, to) = match kind {
        Kind::Pi0 => ("time_mlp_", "action_time_mlp_"),
        Kind::Pi05 => ("action_time_mlp_", "time_mlp_"),
        Kind::Pi0Fast => return name,
    };
    for side in ["in", "out"] {
        if let Some(rest) = name.strip_prefix(&format!("{from}{side}.")) {
            return format!("{to}{side}.{rest}");
        }
    }
    name
}

/// Tensors that checkpoints carry and the network does not use.
pub(super) fn unused(name: &str, kind: Kind) -> bool {
    let expert = |leaf: &str| name.strip_prefix(EXPERT).is_some_and(|rest| rest == leaf);
    name == "paligemma_with_expert.gemma_expert.lm_head.weight"
        || expert(".embed_tokens.weight")
        // SigLIP's own pooling, which PaliGemma leaves out.
        || name.strip_prefix(VISION).is_some_and(|rest| rest.starts_with(".head."))
        // Buffers that old releases of Transformers stored.
        || name.ends_with(".position_ids")
        || name.ends_with(".rotary_emb.inv_freq")
        || name.ends_with(".rotary_emb.original_inv_freq")
        // lerobot leaves these of π0 out when it loads π0.5.
        || kind == Kind::Pi05 && name.starts_with("state_proj.")
        || ["normalize_inputs.", "normalize_targets.", "unnormalize_outputs."]
            .iter()
            .any(|p| name.starts_with(p))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_spellings_lead_to_one_name() {
        let v = "paligemma_with_expert.paligemma.model.vision_tower.vision_model.post_layernorm.bias";
        let e = "paligemma_with_expert.gemma_expert.model.layers.0.mlp.up_proj.weight";
        let p = "paligemma_with_expert.paligemma.model.multi_modal_projector.linear.weight";
        let norm = "paligemma_with_expert.gemma_expert.model.norm.dense.bias";
        for (stored, name) in [
            (v, v),
            ("model.paligemma_with_expert.paligemma.vision_tower.vision_model.post_layernorm.bias", v),
            (
                "model.paligemma_with_expert._orig_mod.paligemma.model.vision_tower.vision_model.post_layernorm.bias",
                v,
            ),
            ("paligemma_with_expert.paligemma.model.vision_tower.post_layernorm.bias", v),
            ("module.policy.paligemma_with_expert.paligemma.model.vision_tower.post_layernorm.bias", v),
            ("model.vision_tower.vision_model.post_layernorm.bias", v),
            (e, e),
            ("_orig_mod.model.paligemma_with_expert.gemma_expert.model.layers.0.mlp.up_proj.weight", e),
            ("model.expert.layers.0.mlp.up_proj.weight", e),
            (
                "base_model.model.model.paligemma_with_expert.gemma_expert.model.layers.0.mlp.up_proj.base_layer.weight",
                e,
            ),
            ("model.paligemma_with_expert.gemma_expert.model.norm.dense.bias", norm),
            ("model.multi_modal_projector.linear.weight", p),
            ("model.paligemma_with_expert.paligemma.language_model.lm_head.weight", LM_HEAD),
            ("lm_head.weight", LM_HEAD),
            ("paligemma_with_expert.paligemma.language_model.model.embed_tokens.weight", EMBED),
            ("model.time_mlp_in.weight", "time_mlp_in.weight"),
            ("_orig_mod.state_proj.bias", "state_proj.bias"),
            ("model.something_else", "something_else"),
        ] {
            assert_eq!(canonical(stored), name);
        }
        assert_eq!(of_kind("time_mlp_in.weight".into(), Kind::Pi0), "action_time_mlp_in.weight");
        assert_eq!(of_kind("action_time_mlp_out.bias".into(), Kind::Pi05), "time_mlp_out.bias");
    }
}
