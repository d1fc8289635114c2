//! Writes a random π0 of any depth as openpi's JAX programs write theirs, to measure loading without a download.
//!
//!     cargo run --release -p pi0-model --example write_orbax -- DIR [LAYERS [RANK]]     # 18 layers: 12 GB
//!
//! With a rank, adapters (LoRA) lie beside the matrices of the language model and of the expert, as openpi's `…_lora`
//! configurations train them.

use std::path::PathBuf;

use pi0_model::Config;
use pi0_orbax::Dtype;
use pi0_orbax::writer::{Options, Writer};

fn main() -> Result<(), Box<dyn std::error::Error>> {
    let mut args = std::env::args().skip(1);
    let dir = PathBuf::from(args.next().ok_or("wanted the directory to make")?);
    let mut c = Config::full();
    let layers: usize = args.next().map_or(Ok(c.gemma.depth), |n| n.parse())?;
    let rank: Option<usize> = args.next().map(|n| n.parse()).transpose()?;
    c.vision.num_hidden_layers = c.vision.num_hidden_layers * layers / c.gemma.depth;
    (c.gemma.depth, c.expert.depth) = (layers, layers);
    let mut writer = Writer::create(&dir.join("params"), Options::default())?;
    let mut state = 0x9E37_79B9_7F4A_7C15u64;
    let mut put = |name: String, shape: &[usize], inputs: usize| -> std::io::Result<()> {
        // Chunks stay under 2 GiB, as Orbax cuts them: along the longest axis.
        let mut chunk = shape.to_vec();
        while 4 * chunk.iter().product::<usize>() > 1 << 31 {
            let longest = (0..chunk.len()).max_by_key(|&i| chunk[i]).expect("an axis");
            chunk[longest] /= 2;
        }
        // Norms begin at zero; matrices keep their inputs' size.
        let scale = if inputs == 0 { 0.05 } else { (1.0 / inputs as f32).sqrt() };
        let count = chunk.iter().product::<usize>();
        writer.array(&name, Dtype::F32, shape, &chunk, &mut |_, out| {
            let mut bytes = Vec::with_capacity(1 << 20);
            for first in (0..count).step_by(1 << 18) {
                bytes.clear();
                for _ in first..count.min(first + (1 << 18)) {
                    state ^= state << 13;
                    state ^= state >> 7;
                    state ^= state << 17;
                    // The sum of two uniform numbers: all bits of the mantissa are used, as in trained weights.
                    let (a, b) = ((state >> 40) as f32, (state & 0xFF_FFFF) as f32);
                    bytes.extend_from_slice(&((a + b - 16_777_215.0) / 6_800_000.0 * scale).to_le_bytes());
                }
                out.write_all(&bytes)?;
            }
            Ok(())
        })
    };
    let v = &c.vision;
    let (n, d, heads, width, f) =
        (v.num_hidden_layers, v.hidden_size, v.num_attention_heads, v.head_dim(), v.intermediate_size);
    put("PaliGemma/img/embedding/kernel".into(), &[v.patch_size, v.patch_size, 3, d], 588)?;
    put("PaliGemma/img/embedding/bias".into(), &[d], 0)?;
    put("PaliGemma/img/pos_embedding".into(), &[1, v.patches(), d], 0)?;
    let block = "PaliGemma/img/Transformer/encoderblock";
    for norm in ["LayerNorm_0", "LayerNorm_1"] {
        for leaf in ["scale", "bias"] {
            put(format!("{block}/{norm}/{leaf}"), &[n, d], 0)?;
        }
    }
    for (layer, inputs, outputs) in [("Dense_0", d, f), ("Dense_1", f, d)] {
        put(format!("{block}/MlpBlock_0/{layer}/kernel"), &[n, inputs, outputs], inputs)?;
        put(format!("{block}/MlpBlock_0/{layer}/bias"), &[n, outputs], 0)?;
    }
    let attention = format!("{block}/MultiHeadDotProductAttention_0");
    for part in ["query", "key", "value"] {
        put(format!("{attention}/{part}/kernel"), &[n, d, heads, width], d)?;
        put(format!("{attention}/{part}/bias"), &[n, heads, width], 0)?;
    }
    put(format!("{attention}/out/kernel"), &[n, heads, width, d], d)?;
    put(format!("{attention}/out/bias"), &[n, d], 0)?;
    for leaf in ["scale", "bias"] {
        put(format!("PaliGemma/img/Transformer/encoder_norm/{leaf}"), &[d], 0)?;
    }
    put("PaliGemma/img/head/kernel".into(), &[d, c.gemma.width], d)?;
    put("PaliGemma/img/head/bias".into(), &[c.gemma.width], 0)?;
    put("PaliGemma/llm/embedder/input_embedding".into(), &[c.vocab_size, c.gemma.width], c.gemma.width)?;
    for (g, s) in [(&c.gemma, ""), (&c.expert, "_1")] {
        let (l, w, f, h) = (g.depth, g.width, g.mlp_dim, g.head_dim);
        let layers = "PaliGemma/llm/layers";
        let matrices: [(String, Vec<usize>, usize); 5] = [
            (format!("attn/q_einsum{s}/w"), vec![l, g.num_heads, w, h], w),
            (format!("attn/kv_einsum{s}/w"), vec![l, 2, g.num_kv_heads, w, h], w),
            (format!("attn/attn_vec_einsum{s}/w"), vec![l, g.num_heads, h, w], g.num_heads * h),
            (format!("mlp{s}/gating_einsum"), vec![l, 2, w, f], w),
            (format!("mlp{s}/linear"), vec![l, f, w], f),
        ];
        for (name, shape, inputs) in matrices {
            put(format!("{layers}/{name}"), &shape, inputs)?;
            let Some(rank) = rank else { continue };
            let module = name.strip_suffix('w').map_or(format!("{name}_"), str::to_owned);
            for (leaf, axis, inputs) in [("a", shape.len() - 1, inputs), ("b", shape.len() - 2, 16 * rank)] {
                let mut shape = shape.clone();
                shape[axis] = rank;
                put(format!("{layers}/{module}lora_{leaf}"), &shape, inputs)?;
            }
        }
        put(format!("{layers}/pre_attention_norm{s}/scale"), &[l, w], 0)?;
        put(format!("{layers}/pre_ffw_norm{s}/scale"), &[l, w], 0)?;
        put(format!("PaliGemma/llm/final_norm{s}/scale"), &[w], 0)?;
    }
    let w = c.expert.width;
    for (name, inputs, outputs) in [
        ("state_proj", c.state_dim, w),
        ("action_in_proj", c.action_dim, w),
        ("action_time_mlp_in", 2 * w, w),
        ("action_time_mlp_out", w, w),
        ("action_out_proj", w, c.action_dim),
    ] {
        put(format!("{name}/kernel"), &[inputs, outputs], inputs)?;
        put(format!("{name}/bias"), &[outputs], 0)?;
    }
    writer.finish()?;
    Ok(())
}
