//! `pi0 inspect`: what a checkpoint is, and what is wrong with it.

use std::path::PathBuf;

use anyhow::{Result, bail};
use pi0_model::Kind;
use pi0_policy::Summary;
use serde::Serialize;

use crate::output;
use crate::policy::PolicyArgs;
use crate::weights::WeightsArgs;

/// Show what a checkpoint is: family, sizes, formats, memory needed, preprocessing; problems, if any
#[derive(clap::Args)]
#[command(after_help = "Examples:\n  pi0 inspect models/tiny\n  pi0 inspect pi0_base --json - | jq .cameras")]
pub struct Args {
    /// Checkpoint: a folder of lerobot's or of openpi's, JAX (with `params`) or PyTorch
    model: PathBuf,
    #[command(flatten)]
    weights: WeightsArgs,
    #[command(flatten)]
    policy: PolicyArgs,
    /// Write everything as JSON to this file (`-` for standard output)
    #[arg(long, value_name = "FILE")]
    json: Option<PathBuf>,
    /// Read every weight and look for NaN and infinity
    #[arg(long)]
    values: bool,
}

#[derive(Serialize)]
struct Report<'a> {
    variant: &'static str,
    config: &'a pi0_model::Config,
    parameters: u64,
    /// The policy's folder.
    directory: &'a std::path::Path,
    layout: &'a str,
    /// Where sizes, horizon and the like come from.
    sizes: &'a str,
    notes: &'a [String],
    stored_bytes: Vec<(&'static str, u64)>,
    memory_bf16: u64,
    policy: Option<&'a Summary>,
    /// What must be settled before it runs.
    missing: Vec<String>,
    problems: Vec<String>,
}

/// Runs the command.
pub fn run(args: &Args) -> Result<()> {
    let checkpoint = args.weights.open(&args.model, args.policy.config.as_deref())?;
    let c = &checkpoint.config;
    let mut problems = Vec::new();
    let policy = args.policy.load(&checkpoint.directory, c);
    let missing = match policy.as_ref().map(|policy| policy.ready()) {
        Ok(Ok(())) => Vec::new(),
        Ok(Err(pi0_policy::Error::NotReady(missing))) => missing,
        Ok(Err(e)) => vec![e.to_string()],
        Err(e) => vec![e.to_string()],
    };
    let summary = policy.map(|policy| policy.summary());
    if let Ok(s) = &summary {
        problems.extend(s.problems.iter().filter(|problem| !missing.contains(problem)).cloned());
    }
    if args.values
        && let Some((name, i)) = checkpoint.find_not_finite()?
    {
        problems.push(format!("the weight {name} holds NaN or infinity at index {i}"));
    }
    let stored = checkpoint.bytes_by_dtype();
    // The embedding table stays in the file: few of its rows are read.
    let table = match &c.answer {
        // It is the vocabulary head as well.
        Some(answer) if answer.tied => 0,
        _ => (c.vocab_size * c.gemma.width) as u64,
    };
    // Of what drives π0.5's norms only the results stay.
    let driven = match c.kind {
        Kind::Pi0 | Kind::Pi0Fast => 0,
        Kind::Pi05 => ((2 * c.expert.depth + 1) * 3 * c.expert.width * (c.expert.width + 1)) as u64,
    };
    let parameters = checkpoint.parameters();
    let report = Report {
        variant: c.kind.name(),
        config: c,
        parameters,
        directory: &checkpoint.directory,
        layout: &checkpoint.origin.layout,
        sizes: &checkpoint.origin.sizes,
        notes: &checkpoint.origin.notes,
        stored_bytes: stored.iter().map(|(d, &b)| (d.name(), b)).collect(),
        memory_bf16: 2 * (parameters - table - driven),
        policy: summary.as_ref().ok(),
        missing,
        problems,
    };
    match &args.json {
        Some(path) => output::write_json(path, &report)?,
        None => output::print(&text(&report, summary.as_ref().ok()))?,
    }
    match report.missing.is_empty() {
        true => Ok(()),
        false => bail!("nothing runs this checkpoint as it is; what is missing stands above"),
    }
}

fn text(r: &Report<'_>, policy: Option<&Summary>) -> String {
    let c = r.config;
    let formats: Vec<_> =
        r.stored_bytes.iter().map(|(name, b)| format!("{name} {}", output::size(*b))).collect();
    let tower = |g: &pi0_model::GemmaConfig| {
        let heads = format!("{} heads of {} over {}", g.num_heads, g.head_dim, g.num_kv_heads);
        format!("width {}, {} layers, MLP {}, {heads}", g.width, g.depth, g.mlp_dim)
    };
    let v = &c.vision;
    let mut rows = vec![
        ("model", format!("{}, {:.1} million parameters", c.kind, r.parameters as f64 / 1e6)),
        ("stored as", format!("{}: {}", r.layout, formats.join(", "))),
        ("sizes from", r.sizes.to_owned()),
        ("memory needed", format!("about {} in bf16, half of it in int8", output::size(r.memory_bf16))),
        (
            "vision",
            format!(
                "width {}, {} layers, MLP {}, {} heads of {}, images {} in patches of {}",
                v.hidden_size,
                v.num_hidden_layers,
                v.intermediate_size,
                v.num_attention_heads,
                v.head_dim(),
                v.image_size,
                v.patch_size
            ),
        ),
        ("language", tower(&c.gemma)),
    ];
    if let Some(answer) = &c.answer {
        let how = match answer.temperature {
            0.0 => "the likeliest each".into(),
            t => format!("drawn at temperature {t}"),
        };
        let head = if answer.tied { "the token embedding" } else { "a matrix of its own" };
        rows.push(("answer", format!("up to {} tokens, {how}; vocabulary head: {head}", answer.max_tokens)));
        if answer.sizes_known {
            rows.push(("actions", format!("{} steps of {}, read from the answer", c.horizon, c.action_dim)));
        }
    } else {
        rows.push(("action expert", tower(&c.expert)));
        let steps = c.num_steps;
        rows.push(("actions", format!("{} steps of {}, {steps} denoising steps", c.horizon, c.action_dim)));
        let chunking = match c.rtc_training_max_delay {
            0 => "guided (not trained for it)".into(),
            delay => format!("trained, for delays of up to {delay} actions; or guided"),
        };
        rows.push(("real-time chunking", chunking));
    }
    rows.push(("prompt", format!("up to {} tokens of {}", c.max_tokens, c.vocab_size)));
    rows.extend(policy.map(policy_facts).unwrap_or_default());
    let mut text = output::facts(&rows);
    for m in &r.missing {
        text += &format!("missing: {m}\n");
    }
    for p in &r.problems {
        text += &format!("problem: {p}\n");
    }
    text
}

/// What the policy worked out, one line a fact.
fn policy_facts(p: &Summary) -> Vec<(&'static str, String)> {
    let normalization = |n: &Option<pi0_policy::Normalization>| match n {
        Some(n) => format!("{}, eps {:e}, {} dimensions", word(n.kind), n.eps, n.dims),
        None => "none".into(),
    };
    let cameras = p.cameras.iter().map(|c| {
        let names = c.accepts.first().unwrap_or(&c.key);
        if c.required { format!("{names} (required)") } else { names.clone() }
    });
    let mut rows = vec![
        ("family", word(p.family)),
        ("robot", p.robot.map_or("none: the checkpoint's own keys and units".into(), word)),
        ("cameras", cameras.collect::<Vec<_>>().join(", ")),
        ("resize", format!("{}, bars {}", word(p.resize.filter), word(p.resize.pad))),
        ("state", normalization(&p.state_normalization)),
        (
            "returns",
            format!(
                "{} actions of {} values, {}",
                p.actions_per_chunk,
                p.action_width,
                normalization(&p.action_normalization)
            ),
        ),
        (
            "tokenizer",
            p.tokenizer.as_ref().map_or("none found; give --tokenizer".into(), |t| {
                format!("{}, {} entries", t.path.display(), t.vocabulary)
            }),
        ),
    ];
    if let Some(a) = &p.action_tokenizer {
        let [steps, dims] = a.chunk;
        rows.push((
            "action tokenizer",
            format!(
                "{}, {} codes for {steps} x {dims}, read as {}",
                a.path.display(),
                a.codes,
                match a.form {
                    pi0_policy::ReplyForm::OpenPi => "openpi does",
                    pi0_policy::ReplyForm::Lerobot { .. } => "lerobot does",
                }
            ),
        ));
    }
    rows.extend(p.config.iter().map(|c| ("openpi config", c.clone())));
    rows.extend(p.statistics.iter().map(|file| ("statistics", file.display().to_string())));
    if let Some(state) = p.state_in_prompt {
        let padded = if state.pad > 0 { format!(", filled up to {}", state.pad) } else { String::new() };
        rows.push(("state in prompt", format!("256 bins, {}{padded}", word(state.rounding))));
    }
    rows.extend(p.relative_actions.iter().map(|m| ("relative actions", m.clone())));
    rows.extend(p.default_prompt.iter().map(|d| ("default prompt", d.clone())));
    rows
}

/// A value as its JSON name: the words of the `--json` output.
fn word(value: impl Serialize) -> String {
    match serde_json::to_value(value) {
        Ok(serde_json::Value::String(s)) => s,
        Ok(other) => other.to_string(),
        Err(e) => e.to_string(),
    }
}
