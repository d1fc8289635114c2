//! From a task in words to the ids of PaliGemma's vocabulary: the text that a family makes of it, and its tokenizer.

mod sentencepiece;
mod tokenizer;

use serde::Serialize;

pub use tokenizer::{TOKENIZER_FILES, Tokenizer};

use crate::{Error, Result, Warning};

/// How the task becomes the text that the network was trained on.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PromptFormat {
    /// openpi π0: stripped, `_` and newlines become spaces; the closing newline is tokenized by itself.
    OpenPi,
    /// The text as it is; lerobot's processor steps have prepared it.
    Verbatim,
}

impl PromptFormat {
    /// BOS and the prompt's ids, at most `limit`, none of `vocabulary` or above.
    pub fn tokens(
        self,
        tokenizer: &Tokenizer,
        prompt: &str,
        limit: usize,
        vocabulary: usize,
        warnings: &mut Vec<Warning>,
    ) -> Result<Vec<u32>> {
        if strip(prompt).is_empty() {
            warnings.push(Warning::PromptEmpty);
        }
        let mut ids = vec![tokenizer.bos()];
        match self {
            PromptFormat::OpenPi => {
                ids.extend(tokenizer.encode(&strip(prompt).replace(['_', '\n'], " "))?);
                ids.extend(tokenizer.encode("\n")?);
            }
            PromptFormat::Verbatim => ids.extend(tokenizer.encode(prompt)?),
        }
        if ids.len() > limit {
            warnings.push(Warning::PromptTruncated { tokens: ids.len(), kept: limit });
            ids.truncate(limit);
        }
        match ids.iter().find(|&&id| id as usize >= vocabulary) {
            Some(id) => {
                let why = format!(
                    "id {id} lies outside the model's vocabulary of {vocabulary}; is {} its tokenizer?",
                    tokenizer.path().display()
                );
                Err(Error::Prompt(why))
            }
            None => Ok(ids),
        }
    }
}

/// Python's `str.strip`, which knows four separators more than Rust's `trim`.
fn strip(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c))
}
