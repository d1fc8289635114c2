//! Sizes of a network from the shapes of its tensors, where no configuration says them.

use std::collections::BTreeMap;

use super::stored::Stored;
use crate::weights::{EMBED, EXPERT, LANGUAGE, VISION};
use crate::{AnswerConfig, Config, Family, GemmaConfig, Kind, TimeSchedule, VisionConfig};

/// Numbers of heads: a matrix of `heads * width` outputs does not show them.
#[derive(Debug, Clone, Copy)]
pub(super) struct Heads {
    pub vision: usize,
    pub gemma: usize,
    pub kv: usize,
    pub head_dim: usize,
}

/// The configuration of openpi's that these tensors have, with the published models' horizon, prompt and steps.
/// `known` says that an `arch.json` follows, so that unusual sizes need no heads here.
pub(super) fn of_tensors(
    kind: Kind,
    stored: &[Stored],
    heads: Option<Heads>,
    known: bool,
) -> Result<Config, String> {
    let shapes: BTreeMap<&str, &[usize]> =
        stored.iter().map(|s| (s.name.as_str(), s.shape.as_slice())).collect();
    let dim = |name: String, axis: usize| {
        let size = shapes.get(name.as_str()).and_then(|shape| shape.get(axis)).copied();
        size.ok_or_else(|| format!("has no tensor {name}, whose shape would tell a size"))
    };
    let layers = |tower: &str| {
        let prefix = format!("{tower}.layers.");
        let number = |name: &&str| name.strip_prefix(&prefix)?.split('.').next()?.parse::<usize>().ok();
        let last = shapes.keys().filter_map(number).filter(|&n| n < 1000).max();
        last.map(|n| n + 1).ok_or_else(|| format!("has no layers {prefix}…"))
    };
    let full = Config::full().of_kind(kind);
    let published = heads.is_none() && !known;
    let heads = heads.unwrap_or(Heads { vision: 16, gemma: 8, kv: 1, head_dim: 256 });

    let patches = format!("{VISION}.embeddings");
    let patch_size = dim(format!("{patches}.patch_embedding.weight"), 2)?;
    let count = dim(format!("{patches}.position_embedding.weight"), 0)?;
    let side = count.isqrt();
    if side * side != count {
        return Err(format!("has {count} patches an image, which is no square"));
    }
    let vision = VisionConfig {
        hidden_size: dim(format!("{patches}.patch_embedding.weight"), 0)?,
        intermediate_size: dim(format!("{VISION}.encoder.layers.0.mlp.fc1.weight"), 0)?,
        num_hidden_layers: layers(&format!("{VISION}.encoder"))?,
        num_attention_heads: heads.vision,
        image_size: side.saturating_mul(patch_size),
        patch_size,
    };
    let tower = |tower: &str| {
        let layer = format!("{tower}.layers.0");
        Ok::<_, String>(GemmaConfig {
            width: dim(format!("{layer}.mlp.gate_proj.weight"), 1)?,
            mlp_dim: dim(format!("{layer}.mlp.gate_proj.weight"), 0)?,
            depth: layers(tower)?,
            num_heads: heads.gemma,
            num_kv_heads: heads.kv,
            head_dim: heads.head_dim,
        })
    };
    let fast = kind == Kind::Pi0Fast;
    let gemma = tower(LANGUAGE)?;
    let expert = if fast { gemma.clone() } else { tower(EXPERT)? };
    if published
        && (gemma != full.gemma || expert != full.expert || vision.hidden_size != full.vision.hidden_size)
    {
        return Err(
            "has tensors of other sizes than the published networks, and nothing says how many heads it \
                    has: give its sizes with --arch FILE (an arch.json, as `pi0 synth` writes them)"
                .into(),
        );
    }
    let embed = if shapes.contains_key(EMBED) { EMBED } else { crate::weights::LM_HEAD };
    let action_dim = if fast { full.action_dim } else { dim("action_in_proj.weight".into(), 1)? };
    Ok(Config {
        answer: fast.then(|| AnswerConfig::of_family(Family::Openpi)),
        family: Family::Openpi,
        schedule: TimeSchedule::Openpi,
        vision,
        gemma,
        expert,
        vocab_size: dim(embed.into(), 0)?,
        action_dim,
        state_dim: if kind == Kind::Pi0 { dim("state_proj.weight".into(), 1)? } else { action_dim },
        ..full
    })
}
