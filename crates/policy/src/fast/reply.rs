//! What the network wrote, as actions. openpi reads an answer through text, lerobot piece by piece; where the answer is
//! what it should be, both come to the same.

use std::fmt;

use serde::Serialize;

use super::codec::{Damage, FastCodec};
use crate::prompt::{Piece, Tokenizer, strip};
use crate::{Error, Result};

/// What an answer begins with.
const PREFIX: &str = "Action: ";
/// What ends its codes.
const END: &str = "|";

/// Ids between the end of the vocabulary and the first code: PaliGemma's `<seg…>`.
pub(crate) const SKIPPED: usize = 128;

/// Whose way an answer is read in.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum ReplyForm {
    /// Through text, which is tokenized anew; another number of coefficients makes all actions 0.
    OpenPi,
    /// Piece by piece; another number of coefficients is cut or filled up.
    Lerobot {
        /// Refuses an answer that does not begin with `Action` and `:` (`validate_action_token_prefix`).
        checked: bool,
    },
}

/// What is wrong with an answer of the network, and what became of it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum ReplyFault {
    /// It does not begin with `Action: `.
    NoPrefix {
        /// What it begins with.
        begins: String,
        /// What became of it.
        became: Became,
    },
    /// Its codes have no end mark.
    NoEnd {
        /// Tokens of the answer.
        tokens: usize,
    },
    /// A token among the codes that is none; it was left out.
    Stray {
        /// Where among the codes it stands.
        index: usize,
        /// The token.
        piece: String,
    },
    /// A token among the codes that makes them unreadable: all actions are 0.
    Negative {
        /// Where among the codes it stands.
        index: usize,
        /// The token.
        piece: String,
    },
    /// Its codes make another number of coefficients than the chunk has.
    Length {
        /// Coefficients that came.
        got: usize,
        /// Coefficients that the chunk has.
        wanted: usize,
        /// Whether they were cut or filled up with zeros; if not, all actions are 0.
        fitted: bool,
    },
    /// Its codes make bytes that are no characters.
    BrokenCharacters {
        /// How many.
        count: usize,
    },
}

/// What became of an answer with a wrong beginning.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Became {
    /// All actions are 0.
    Zeros,
    /// It was read, as if the beginning were right.
    Read,
    /// Nothing: no action is read from it.
    Refused,
}

impl fmt::Display for ReplyFault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const ZEROS: &str =
            "all actions are 0 in the network's units, which is the middle of their range and no stop";
        match self {
            ReplyFault::NoPrefix { begins, became } => {
                let became = match became {
                    Became::Zeros => ZEROS,
                    Became::Read => "it was read all the same",
                    Became::Refused => "no action is read from it",
                };
                write!(f, "the network's answer begins with {begins:?} and not with \"{PREFIX}\": {became}")
            }
            ReplyFault::NoEnd { tokens } => {
                write!(
                    f,
                    "the network's answer of {tokens} tokens has no end mark: it was read as far as it goes"
                )
            }
            ReplyFault::Stray { index, piece } => {
                write!(f, "token {index} of the answer's codes, {piece:?}, is no code: it was left out")
            }
            ReplyFault::Negative { index, piece } => {
                write!(f, "token {index} of the answer's codes, {piece:?}, makes them unreadable: {ZEROS}")
            }
            ReplyFault::Length { got, wanted, fitted } => {
                let became = match (fitted, got > wanted) {
                    (false, _) => ZEROS,
                    (true, true) => "the rest was cut off",
                    (true, false) => "those missing, the highest frequencies, are 0",
                };
                write!(f, "the answer's codes make {got} coefficients, the chunk has {wanted}: {became}")
            }
            ReplyFault::BrokenCharacters { count } => {
                write!(f, "the answer's codes make {count} bytes that are no characters, so no coefficients")
            }
        }
    }
}

/// A chunk that was read from an answer.
#[derive(Debug, Clone, PartialEq)]
pub struct Reply {
    /// Normalized, `[steps, dims]`.
    pub actions: Vec<f64>,
    /// Steps and dims.
    pub shape: [usize; 2],
    /// What was wrong with the answer.
    pub faults: Vec<ReplyFault>,
}

/// Reads answers.
#[derive(Debug)]
pub struct ReplyReader {
    codec: FastCodec,
    form: ReplyForm,
    /// The id of code 0; those of the others go down from it.
    zero: i64,
    /// Actions of a chunk.
    pub steps: usize,
    /// Values of an action.
    pub dims: usize,
}

/// The codes in an answer, each with its token.
struct Codes {
    ids: Vec<u32>,
    faults: Vec<ReplyFault>,
    /// Whether reading ends here, with a chunk of zeros.
    zeros: bool,
}

impl ReplyReader {
    /// A reader for chunks `[steps, dims]` in this vocabulary, `skipped` of whose last ids stand for no code.
    ///
    /// # Errors
    /// The vocabulary has no place for the codec's codes.
    pub fn new(
        codec: FastCodec,
        form: ReplyForm,
        tokenizer: &Tokenizer,
        skipped: usize,
        [steps, dims]: [usize; 2],
    ) -> Result<Self> {
        let refuse = |why: String| Err(Error::format(tokenizer.path(), why));
        let vocabulary = tokenizer.proper_size();
        if vocabulary <= skipped.saturating_add(codec.size()) {
            return refuse(format!(
                "has {vocabulary} entries, too few for the {} codes of {}",
                codec.size(),
                codec.directory().display()
            ));
        }
        let zero = vocabulary - 1 - skipped;
        if skipped == SKIPPED && tokenizer.piece(zero as u32) != Some(Piece::Text("<loc1023>".into())) {
            let found = tokenizer.piece(zero as u32).map_or("nothing".into(), |piece| piece.to_string());
            return refuse(format!(
                "has {found:?} where PaliGemma has <loc1023>, the first code of an action: π0-FAST needs PaliGemma's own \
                 tokenizer, not Gemma's"
            ));
        }
        Ok(Self { codec, form, zero: zero as i64, steps, dims })
    }

    /// The codec.
    pub fn codec(&self) -> &FastCodec {
        &self.codec
    }

    /// Whose way answers are read in.
    pub fn form(&self) -> ReplyForm {
        self.form
    }

    /// The token that ends an answer: lerobot stops at `|`, openpi behind it at `<eos>`.
    pub fn end(&self, tokenizer: &Tokenizer) -> Result<u32> {
        match self.form {
            ReplyForm::OpenPi => Ok(tokenizer.eos()),
            ReplyForm::Lerobot { .. } => match tokenizer.encode(END)?[..] {
                [end] => Ok(end),
                _ => Err(Error::format(
                    tokenizer.path(),
                    format!("has no entry {END:?}, which ends an answer"),
                )),
            },
        }
    }

    /// The ids of which a valid answer is made, in order: codes, end marks, the pieces of `Action: `.
    pub fn ids(&self, tokenizer: &Tokenizer) -> Result<Vec<u32>> {
        let first = self.zero - (self.codec.size() as i64 - 1);
        let mut ids: Vec<u32> = (first as u32..=self.zero as u32).collect();
        ids.extend(tokenizer.encode(PREFIX)?);
        ids.extend(tokenizer.encode(END)?);
        ids.push(tokenizer.eos());
        ids.sort_unstable();
        ids.dedup();
        Ok(ids)
    }

    /// The ids that these codes are written as.
    pub fn ids_of_codes(&self, codes: &[u32]) -> Vec<u32> {
        codes.iter().map(|&code| (self.zero - i64::from(code)) as u32).collect()
    }

    /// Reads an answer. What is merely odd about it is in the reply's faults.
    ///
    /// # Errors
    /// [`Error::Reply`] where no actions can be read from it that may reach a robot.
    pub fn read(&self, answer: &[u32], tokenizer: &Tokenizer) -> Result<Reply> {
        let Codes { ids, mut faults, zeros } = match self.form {
            ReplyForm::OpenPi => through_text(answer, tokenizer)?,
            ReplyForm::Lerobot { checked } => by_pieces(answer, tokenizer, checked)?,
        };
        let shape = [self.steps, self.dims];
        if zeros {
            return Ok(Reply { shape, actions: vec![0.0; self.steps * self.dims], faults });
        }
        let codes: Vec<i64> = ids.iter().map(|&id| self.zero - i64::from(id)).collect();
        let relaxed = self.form != ReplyForm::OpenPi;
        let decoded = self.codec.decode(&codes, self.steps, self.dims, relaxed)?;
        let piece = |index: usize| match tokenizer.piece(ids[index]) {
            Some(piece) => piece.to_string(),
            None => format!("id {}", ids[index]),
        };
        let zeroed = decoded.damage.iter().any(|d| matches!(d, Damage::Length { fitted: false, .. }));
        for damage in decoded.damage {
            match damage {
                Damage::Negative { index } => {
                    faults.push(ReplyFault::Negative { index, piece: piece(index) })
                }
                Damage::Unknown { indices } => {
                    // A network that has lost the thread writes hundreds.
                    let stray = |index| ReplyFault::Stray { index, piece: piece(index) };
                    faults.extend(indices.into_iter().take(8).map(stray));
                }
                Damage::Length { got, wanted, fitted } => {
                    faults.push(ReplyFault::Length { got, wanted, fitted })
                }
                Damage::BrokenCharacters { count } => {
                    faults.push(ReplyFault::BrokenCharacters { count });
                    // Each would be a coefficient of more than 65000: no robot may get that.
                    if !zeroed {
                        return Err(Error::Reply(faults));
                    }
                }
            }
        }
        Ok(Reply { actions: decoded.actions, shape, faults })
    }
}

/// The beginning of an answer, for messages.
fn beginning(answer: &[u32], tokenizer: &Tokenizer) -> String {
    answer.iter().take(4).filter_map(|&id| tokenizer.piece(id)).map(|piece| piece.to_string()).collect()
}

/// openpi: what stands between the first `Action: ` and the next `Action: ` or `|`, without spaces around it, as the
/// tokenizer cuts it.
fn through_text(answer: &[u32], tokenizer: &Tokenizer) -> Result<Codes> {
    let text = tokenizer.decode(answer);
    let mut faults = Vec::new();
    let Some((before, rest)) = text.split_once(PREFIX) else {
        faults.push(ReplyFault::NoPrefix { begins: beginning(answer, tokenizer), became: Became::Zeros });
        return Ok(Codes { ids: Vec::new(), faults, zeros: true });
    };
    if !before.is_empty() {
        faults.push(ReplyFault::NoPrefix { begins: beginning(answer, tokenizer), became: Became::Read });
    }
    let rest = rest.split(PREFIX).next().unwrap_or_default();
    let codes = match rest.split_once(END) {
        Some((codes, _)) => codes,
        None => {
            faults.push(ReplyFault::NoEnd { tokens: answer.len() });
            rest
        }
    };
    Ok(Codes { ids: tokenizer.encode(strip(codes))?, faults, zeros: false })
}

/// lerobot: what stands before the first piece `|`, without the pieces of `Action: ` wherever they stand.
fn by_pieces(answer: &[u32], tokenizer: &Tokenizer, checked: bool) -> Result<Codes> {
    let is = |id: u32, text: &str| tokenizer.piece(id) == Some(Piece::Text(text.into()));
    let mut faults = Vec::new();
    if !matches!(answer, [first, second, ..] if is(*first, "Action") && is(*second, ":")) {
        let became = if checked { Became::Refused } else { Became::Read };
        faults.push(ReplyFault::NoPrefix { begins: beginning(answer, tokenizer), became });
        if checked {
            return Err(Error::Reply(faults));
        }
    }
    let end = answer.iter().position(|&id| is(id, END));
    if end.is_none() {
        faults.push(ReplyFault::NoEnd { tokens: answer.len() });
    }
    let of_prefix = |id: u32| ["Action", ":", "▁"].iter().any(|piece| is(id, piece));
    let ids = answer[..end.unwrap_or(answer.len())].iter().copied().filter(|&id| !of_prefix(id)).collect();
    Ok(Codes { ids, faults, zeros: false })
}
