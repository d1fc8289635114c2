//! From a task in words to the ids of PaliGemma's vocabulary: the text that a family makes of it, and its tokenizer.

mod sentencepiece;
mod tokenizer;

use serde::Serialize;

pub(crate) use tokenizer::{Piece, read_tokenizer};
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
                ids.extend(tokenizer.encode(&clean(prompt))?);
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

/// The text of π0.5 and π0-FAST: the task, and the state as one of 256 bins for each dimension.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct StateText {
    /// Whose text.
    pub form: StateForm,
    /// In which precision values are compared with the bins' edges.
    pub rounding: Rounding,
    /// lerobot 0.4 fills the state up with zeros to so many dimensions first; 0: as it is.
    pub pad: usize,
}

/// Texts that hold the state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum StateForm {
    /// π0.5's, which ends with `Action: `.
    Pi05,
    /// π0-FAST's in openpi: the task in lower case, its newlines kept.
    FastOpenPi,
    /// π0-FAST's in lerobot.
    FastLerobot,
}

/// Precision of a normalized state.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Rounding {
    /// openpi.
    F64,
    /// lerobot.
    F32,
}

impl StateText {
    /// `Task: fold the towel, State: 25 -1 255;\nAction: `, with the space at the end; π0-FAST's ends before `Action`. Spaces
    /// and tabs inside the task do not change, nor does its case but for openpi's π0-FAST.
    pub fn write(self, task: &str, state: &[f64]) -> String {
        let padding = std::iter::repeat_n(&0.0, self.pad.saturating_sub(state.len()));
        let bins: Vec<String> =
            state.iter().chain(padding).map(|&x| bin(x, self.rounding).to_string()).collect();
        let (task, end) = match self.form {
            StateForm::Pi05 => (clean(task), "Action: "),
            StateForm::FastLerobot => (clean(task), ""),
            StateForm::FastOpenPi => (strip(&task.to_lowercase()).replace('_', " "), ""),
        };
        format!("Task: {task}, State: {};\n{end}", bins.join(" "))
    }
}

/// `np.digitize(x, np.linspace(-1, 1, 257)[:-1]) - 1`: how many of the edges -1, -1 + 2/256, … are at most `x`, less
/// one. Below -1 that is -1, printed with its sign; from 0.9921875 on 255, and so for NaN, which no state may hold.
fn bin(x: f64, rounding: Rounding) -> i32 {
    let x = match rounding {
        Rounding::F64 => x,
        Rounding::F32 => f64::from(x as f32),
    };
    match x {
        _ if x.is_nan() => 255,
        _ if x < -1.0 => -1,
        // The edges are multiples of 1/128, so the product is exact; the cast saturates.
        _ => ((x * 128.0).floor() as i32).saturating_add(128).min(255),
    }
}

/// A task as openpi and lerobot's π0.5 clean it.
fn clean(task: &str) -> String {
    strip(task).replace(['_', '\n'], " ")
}

/// Python's `str.strip`, which knows four separators more than Rust's `trim`.
pub(crate) fn strip(text: &str) -> &str {
    text.trim_matches(|c: char| c.is_whitespace() || ('\u{1c}'..='\u{1f}').contains(&c))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bins_are_numpys() {
        let each = |values: &[f64], rounding| values.iter().map(|&x| bin(x, rounding)).collect::<Vec<_>>();
        let edges = [-1.0, 1.0, 0.0, -0.9921875, 0.9921875, 0.5, 0.5000000000000001, 0.49999999999999994];
        assert_eq!(each(&edges, Rounding::F64), [0, 255, 128, 1, 255, 192, 192, 191]);
        let outside = [-1.0000001, -1.5, -30.0, 1.0000001, 1e300, -1e300, -0.0];
        assert_eq!(each(&outside, Rounding::F64), [-1, -1, -1, 255, 255, -1, 128]);
        let odd = [f64::NAN, f64::INFINITY, f64::NEG_INFINITY];
        assert_eq!(each(&odd, Rounding::F64), [255, 255, -1]);
        // Within an f32 rounding of an edge.
        let near = [0.5 - 1e-9, -1.0 - 1e-9, 0.9921875 - 1e-9, 0.5 + 1e-9];
        assert_eq!(each(&near, Rounding::F64), [191, -1, 254, 192]);
        assert_eq!(each(&near, Rounding::F32), [192, 0, 255, 192]);
    }

    /// Against the definition, on both sides of every edge.
    #[test]
    fn bins_count_edges() {
        let edges: Vec<f64> = (0..256).map(|k| -1.0 + 2.0 * f64::from(k) / 256.0).collect();
        for &edge in &edges {
            for x in [edge, edge.next_up(), edge.next_down()] {
                let wanted = edges.iter().filter(|edge| **edge <= x).count() as i32 - 1;
                assert_eq!(bin(x, Rounding::F64), wanted, "{x:?}");
            }
        }
    }

    #[test]
    fn the_state_is_written_unpadded_or_padded() {
        let text = StateText { form: StateForm::Pi05, rounding: Rounding::F64, pad: 0 };
        assert_eq!(text.write("  Fold_the\ttowel\n", &[]), "Task: Fold the\ttowel, State: ;\nAction: ");
        let text = StateText { form: StateForm::Pi05, rounding: Rounding::F32, pad: 4 };
        assert_eq!(text.write("x", &[-2.0, 1.0]), "Task: x, State: -1 255 128 128;\nAction: ");
        let text = StateText { form: StateForm::FastOpenPi, rounding: Rounding::F64, pad: 0 };
        assert_eq!(text.write("  Fold_the\nTowel\n", &[0.0]), "Task: fold the\ntowel, State: 128;\n");
        let text = StateText { form: StateForm::FastLerobot, ..text };
        assert_eq!(text.write("  Fold_the\nTowel\n", &[0.0]), "Task: Fold the Towel, State: 128;\n");
    }
}
