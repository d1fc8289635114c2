//! PaliGemma's vocabulary, from a Hugging Face `tokenizer.json` or a SentencePiece `.model`.
//!
//! The text of a user is only ever text: whatever it spells, BOS, EOS and padding never come out of it.

use std::borrow::Cow;
use std::io::Read;
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
    eos: u32,
    /// Ids that text must never become.
    control: Vec<u32>,
    unknown: Option<u32>,
    size: usize,
    /// Without what was added behind the vocabulary proper.
    proper: usize,
}

/// An entry of the vocabulary, as it reads in a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Piece<'a> {
    /// Characters, with `▁` for a space.
    Text(Cow<'a, str>),
    /// One byte of a character that has no entry.
    Byte(u8),
    /// Not in any text, such as `<eos>`.
    Control(Cow<'a, str>),
    /// What no entry covers.
    Unknown(Cow<'a, str>),
}

impl std::fmt::Display for Piece<'_> {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Piece::Text(text) | Piece::Control(text) | Piece::Unknown(text) => f.write_str(text),
            Piece::Byte(byte) => write!(f, "<0x{byte:02X}>"),
        }
    }
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
        let mut bytes = Vec::new();
        let read = pi0_model::open_file(&file).and_then(|mut file| file.read_to_end(&mut bytes));
        read.map_err(|source| Error::Read { path: file.clone(), source })?;
        Self::parse(&file, &bytes)
    }

    /// Reads the content of a tokenizer file; a `.model` is known by its name.
    pub fn parse(path: &Path, bytes: &[u8]) -> Result<Self> {
        if let Some(what) = pi0_model::placeholder(bytes) {
            return Err(Error::format(path, format!("it is {what}")));
        }
        let (encoder, size, proper) = if path.extension().is_some_and(|extension| extension == "model") {
            let model = SentencePiece::parse(bytes).map_err(|why| Error::format(path, why))?;
            let size = model.size();
            (Encoder::Model(model), size, size)
        } else {
            let mut json = read_tokenizer(bytes).map_err(|why| Error::format(path, why))?;
            json.with_truncation(None).map_err(|why| Error::format(path, why))?;
            json.with_padding(None);
            json.set_encode_special_tokens(true);
            let (size, proper) = (json.get_vocab_size(true), json.get_vocab_size(false));
            (Encoder::Json(Box::new(json)), size, proper)
        };
        let id = |piece: &str| match &encoder {
            Encoder::Json(json) => json.token_to_id(piece),
            Encoder::Model(model) => model.control(piece),
        };
        let control: Vec<u32> = ["<bos>", "<eos>", "<pad>"].into_iter().filter_map(id).collect();
        let bos = id("<bos>").ok_or_else(|| Error::format(path, "the vocabulary has no <bos>"))?;
        let eos = id("<eos>").unwrap_or(1);
        let unknown = match &encoder {
            Encoder::Json(json) => json.token_to_id("<unk>"),
            Encoder::Model(model) => Some(model.unknown()),
        };
        Ok(Self { path: path.into(), encoder, bos, eos, control, unknown, size, proper })
    }

    /// The file.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Entries of the vocabulary.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Entries of the vocabulary proper, without tokens such as `<image>` that were added behind it.
    pub fn proper_size(&self) -> usize {
        self.proper
    }

    /// The entry of an id.
    pub(crate) fn piece(&self, id: u32) -> Option<Piece<'_>> {
        let json = match &self.encoder {
            Encoder::Model(model) => return model.piece(id),
            Encoder::Json(json) => json,
        };
        let text = json.id_to_token(id)?;
        let byte = || {
            let hex = text.strip_prefix("<0x")?.strip_suffix('>').filter(|hex| hex.len() == 2)?;
            u8::from_str_radix(hex, 16).ok()
        };
        Some(match byte() {
            Some(byte) => Piece::Byte(byte),
            None if self.control.contains(&id) => Piece::Control(text.into()),
            None if self.unknown == Some(id) => Piece::Unknown(text.into()),
            None => Piece::Text(text.into()),
        })
    }

    /// The text of these ids, as SentencePiece writes it: control ids vanish, bytes that make no character become U+FFFD.
    /// Ids beyond the vocabulary are left out.
    pub(crate) fn decode(&self, ids: &[u32]) -> String {
        let (mut text, mut bytes) = (String::new(), Vec::new());
        for piece in ids.iter().filter_map(|&id| self.piece(id)) {
            if let Piece::Byte(byte) = piece {
                bytes.push(byte);
                continue;
            }
            push_bytes(&mut text, &mut bytes);
            match piece {
                Piece::Text(piece) => text.extend(piece.chars().map(|c| if c == '▁' { ' ' } else { c })),
                Piece::Unknown(_) => text.push_str(" ⁇ "),
                Piece::Control(_) | Piece::Byte(_) => {}
            }
        }
        push_bytes(&mut text, &mut bytes);
        text
    }

    /// The id that opens every prompt: 2 in Gemma's vocabularies.
    pub fn bos(&self) -> u32 {
        self.bos
    }

    /// The id that ends what a network writes: 1 in Gemma's vocabularies.
    pub fn eos(&self) -> u32 {
        self.eos
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

/// Appends bytes as characters; each byte that is part of none becomes U+FFFD.
fn push_bytes(text: &mut String, bytes: &mut Vec<u8>) {
    let mut rest = bytes.as_slice();
    while !rest.is_empty() {
        let good = match std::str::from_utf8(rest) {
            Ok(good) => good.len(),
            Err(error) => error.valid_up_to(),
        };
        text.push_str(std::str::from_utf8(&rest[..good]).unwrap_or_default());
        rest = &rest[good..];
        if !rest.is_empty() {
            text.push(char::REPLACEMENT_CHARACTER);
            rest = &rest[1..];
        }
    }
    bytes.clear();
}

/// Reads a `tokenizer.json`. The library panics on some broken files: on bad syntax, which is found out before, and
/// on some contradictions, which are caught.
pub(crate) fn read_tokenizer(bytes: &[u8]) -> Result<tokenizers::Tokenizer, String> {
    serde_json::from_slice::<serde::de::IgnoredAny>(bytes).map_err(|error| error.to_string())?;
    match std::panic::catch_unwind(|| tokenizers::Tokenizer::from_bytes(bytes)) {
        Ok(read) => read.map_err(|error| error.to_string()),
        Err(_) => Err("the tokenizers library cannot read it".into()),
    }
}
