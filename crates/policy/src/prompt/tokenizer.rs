//! PaliGemma's vocabulary, from a Hugging Face `tokenizer.json` or a SentencePiece `.model`.
//!
//! The text of a user is only ever text: whatever it spells, BOS, EOS and padding never come out of it.

use std::path::{Path, PathBuf};

use super::sentencepiece::SentencePiece;
use crate::{Error, Result};

/// Files in which a checkpoint directory may carry its tokenizer, in order of preference.
pub const TOKENIZER_FILES: [&str; 5] = [
    "tokenizer/tokenizer.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer/tokenizer.model",
    "paligemma_tokenizer.model",
];

/// Longest prompt that is looked at, in bytes.
const MAX_PROMPT: usize = 1 << 16;

/// A loaded vocabulary.
pub struct Tokenizer {
    path: PathBuf,
    encoder: Encoder,
    bos: u32,
    /// Ids that text must never become.
    control: Vec<u32>,
    size: usize,
}

enum Encoder {
    Json(Box<tokenizers::Tokenizer>),
    Model(SentencePiece),
}

impl std::fmt::Debug for Tokenizer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Tokenizer")
            .field("path", &self.path)
            .field("size", &self.size)
            .finish_non_exhaustive()
    }
}

impl Tokenizer {
    /// Reads a `tokenizer.json` (Hugging Face) or a `.model` (SentencePiece); of a directory, the one in it.
    pub fn open(path: &Path) -> Result<Self> {
        let file = if path.is_dir() {
            let found = TOKENIZER_FILES.iter().map(|name| path.join(name)).find(|file| file.is_file());
            found.ok_or_else(|| Error::NoTokenizer { path: path.into() })?
        } else {
            path.to_owned()
        };
        let bytes = std::fs::read(&file).map_err(|source| Error::Read { path: file.clone(), source })?;
        Self::parse(&file, &bytes)
    }

    /// Reads the content of a tokenizer file; a `.model` is known by its name.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        if bytes.starts_with(b"version https://git-lfs") {
            let why = "it is a git-lfs pointer, not the tokenizer: run `git lfs pull` in its folder, or download the file";
            return Err(Error::format(path, why));
        }
        let (encoder, size) = if path.extension().is_some_and(|extension| extension == "model") {
            let model = SentencePiece::parse(bytes).map_err(|why| Error::format(path, why))?;
            let size = model.size();
            (Encoder::Model(model), size)
        } else {
            let mut json = read_json(bytes).map_err(|why| Error::format(path, why))?;
            json.with_truncation(None).map_err(|why| Error::format(path, why))?;
            json.with_padding(None);
            json.set_encode_special_tokens(true);
            let size = json.get_vocab_size(true);
            (Encoder::Json(Box::new(json)), size)
        };
        let id = |piece: &str| match &encoder {
            Encoder::Json(json) => json.token_to_id(piece),
            Encoder::Model(model) => model.control(piece),
        };
        let control: Vec<u32> = ["<bos>", "<eos>", "<pad>"].into_iter().filter_map(id).collect();
        let bos = id("<bos>").ok_or_else(|| Error::format(path, "the vocabulary has no <bos>"))?;
        Ok(Self { path: path.into(), encoder, bos, control, size })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Entries of the vocabulary.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The id that opens every prompt: 2 in Gemma's vocabularies.
    pub fn bos(&self) -> u32 {
        self.bos
    }

    /// Ids of a text, without BOS.
    pub fn encode(&self, text: &str) -> Result<Vec<u32>> {
        if text.len() > MAX_PROMPT {
            return Err(Error::Prompt(format!("it has {} bytes, more than {MAX_PROMPT}", text.len())));
        }
        let ids = match &self.encoder {
            Encoder::Json(json) => {
                let encoding = json.encode_fast(text, false).map_err(|why| Error::Prompt(why.to_string()))?;
                encoding.get_ids().to_vec()
            }
            Encoder::Model(model) => model.encode(text),
        };
        match ids.iter().find(|id| self.control.contains(id)) {
            Some(id) => Err(Error::Prompt(format!("the tokenizer turned text into the control id {id}"))),
            None => Ok(ids),
        }
    }
}

/// Reads a `tokenizer.json`. The library panics on some broken files: on bad syntax, which is found out before, and
/// on some contradictions, which are caught.
fn read_json(bytes: &[u8]) -> Result<tokenizers::Tokenizer, String> {
    serde_json::from_slice::<serde::de::IgnoredAny>(bytes).map_err(|error| error.to_string())?;
    match std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(bytes)) {
        Ok(read) => read.map_err(|error| error.to_string()),
        Err(_) => Err("the tokenizers library cannot read it".into()),
    }
}
