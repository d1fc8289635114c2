//! In which order an inference makes its intermediates, and where in it a weight acts.

/// A place in an inference: stage, layer, part. What is made later is greater.
pub type Rank = (u8, u32, u8);

/// Stages of [`Rank`].
pub const VISION: u8 = 0;
/// The prefix.
pub const PREFIX: u8 = 1;
/// The first denoising step up to its velocity.
pub const SUFFIX: u8 = 2;
/// All steps.
pub const STEPS: u8 = 3;

/// Parts of a layer in order.
const PARTS: [&str; 8] = ["ln1", "k_cache", "v_cache", "attn", "ln2", "mlp", "out", "norm"];

fn number(text: &str) -> u32 {
    text.trim_start_matches(|c: char| !c.is_ascii_digit()).parse().unwrap_or(0)
}

/// Where a tap of the golden names is made.
pub fn of_tap(name: &str) -> Rank {
    let parts: Vec<&str> = name.split('.').collect();
    let in_layer = |rest: &[&str]| {
        let position = |p: &&str| PARTS.iter().position(|known| known == p).map(|i| i as u8);
        rest.first().and_then(position).unwrap_or(0)
    };
    match parts[..] {
        ["vision", _, "patch_conv"] => (VISION, 0, 0),
        ["vision", _, "embeddings"] => (VISION, 0, 1),
        ["vision", _, layer, ..] if layer.starts_with("layer") => {
            (VISION, 1 + number(layer), in_layer(&parts[3..]))
        }
        ["vision", _, "post_ln"] => (VISION, u32::MAX, 0),
        ["vision", ..] => (VISION, u32::MAX, 1),
        ["prefix", "embs"] => (PREFIX, 0, 1),
        ["prefix", layer, ..] if layer.starts_with("layer") => {
            (PREFIX, 1 + number(layer), in_layer(&parts[2..]))
        }
        ["prefix", "norm"] => (PREFIX, u32::MAX, 0),
        ["prefix", ..] => (PREFIX, 0, 0),
        ["suffix", layer, ..] if layer.starts_with("layer") => {
            (SUFFIX, 1 + number(layer), in_layer(&parts[2..]))
        }
        ["suffix", "norm", ..] => (SUFFIX, u32::MAX, 0),
        ["suffix", what] => {
            let order =
                ["positions", "attend", "state_emb", "action_emb", "time_mlp_in", "time_mlp_out", "embs"];
            (SUFFIX, 0, order.iter().position(|o| *o == what).unwrap_or(0) as u8)
        }
        [step, what] if step.starts_with("step") => {
            let order = ["time", "time_emb", "cond", "v_t", "v_guided", "x_next"];
            let part = order.iter().position(|o| *o == what).unwrap_or(0) as u8;
            match (number(step), part) {
                (0, 0..=1) => (SUFFIX, 0, 0),
                // Behind the time network.
                (0, 2) => (SUFFIX, 0, 6),
                (step, part) => (STEPS, step, part),
            }
        }
        _ => (STEPS, u32::MAX, 0),
    }
}

/// Where a weight acts first.
pub fn of_weight(name: &str) -> Rank {
    let layer = name.split("layers.").nth(1).map(|rest| number(rest.split('.').next().unwrap_or_default()));
    let attention = name.contains("self_attn");
    let out = name.contains("o_proj") || name.contains("out_proj");
    let part = match (attention, out) {
        (true, false) => 1,
        (true, true) => 3,
        _ => 5,
    };
    match layer {
        Some(i) if name.contains("vision_tower") => (VISION, 1 + i, part),
        Some(i) if name.contains("gemma_expert") => (SUFFIX, 1 + i, part),
        Some(i) => (PREFIX, 1 + i, part),
        None if name.contains("patch_embedding") => (VISION, 0, 0),
        None if name.contains("multi_modal_projector") => (VISION, u32::MAX, 1),
        None if name.contains("action_out_proj") => (STEPS, 0, 3),
        None if name.contains("state_proj") => (SUFFIX, 0, 2),
        None if name.contains("action_in_proj") => (SUFFIX, 0, 3),
        None if name.contains("mlp_in") => (SUFFIX, 0, 4),
        None if name.contains("mlp_out") => (SUFFIX, 0, 5),
        None => (SUFFIX, 0, 0),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn later_is_greater() {
        let order = [
            "vision.cam0.patch_conv",
            "vision.cam1.layer0.ln1",
            "vision.cam0.layer0.out",
            "vision.cam0.layer10.attn",
            "vision.cam2.projector",
            "prefix.embs",
            "prefix.layer0.k_cache",
            "prefix.layer17.out",
            "prefix.norm",
            "suffix.state_emb",
            "suffix.layer3.mlp",
            "suffix.norm",
            "step0.v_t",
            "step0.x_next",
            "step1.v_t",
            "actions",
        ];
        for pair in order.windows(2) {
            assert!(of_tap(pair[0]) < of_tap(pair[1]), "{pair:?}");
        }
        let weight = "paligemma_with_expert.gemma_expert.model.layers.3.mlp.down_proj.weight";
        assert!(of_weight(weight) <= of_tap("suffix.layer3.mlp"));
    }
}
