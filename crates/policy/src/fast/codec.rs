//! FAST, the codec: a chunk of actions as a few tokens. Cosine transform along time, rounding, and byte-level BPE over the
//! whole numbers written as characters. The files are those of `physical-intelligence/fast`.

use std::path::{Path, PathBuf};

use serde::Deserialize;
use serde_json::Value;

use super::dct;
use crate::files::{parse_json, read_small};
use crate::prompt::read_tokenizer;
use crate::{Error, Result};

/// File with the settings.
const SETTINGS: &str = "processor_config.json";
/// File with the BPE.
const BPE: &str = "tokenizer.json";

/// Longest chunk that is coded, in values: what a broken configuration asks for must not fill the memory.
const MOST_VALUES: usize = 1 << 20;

/// A codec, read from its folder.
pub struct FastCodec {
    directory: PathBuf,
    bpe: Box<tokenizers::Tokenizer>,
    size: usize,
    scale: f64,
    min_token: i64,
}

impl std::fmt::Debug for FastCodec {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("FastCodec").field("directory", &self.directory).finish_non_exhaustive()
    }
}

#[derive(Deserialize)]
struct Settings {
    #[serde(default = "ten")]
    scale: f64,
    vocab_size: Option<usize>,
    #[serde(default)]
    min_token: i64,
}

fn ten() -> f64 {
    10.0
}

/// What a list of codes stands for.
#[derive(Debug, Clone, PartialEq)]
pub struct Decoded {
    /// Normalized actions, `[steps, dims]`.
    pub actions: Vec<f64>,
    /// What was wrong with the codes; [`Damage::is_fatal`] says whether the actions mean anything.
    pub damage: Vec<Damage>,
}

/// Something wrong with a list of codes.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Damage {
    /// Codes below 0: nothing is read, all actions are 0.
    Negative {
        /// Where in the list the first stands.
        index: usize,
    },
    /// Codes that the codec does not have; they are left out.
    Unknown {
        /// Where in the list each stands.
        indices: Vec<usize>,
    },
    /// Another number of coefficients than the chunk has.
    Length {
        /// Coefficients that came.
        got: usize,
        /// Coefficients that the chunk has.
        wanted: usize,
        /// Whether they were cut or filled up with zeros; if not, all actions are 0.
        fitted: bool,
    },
    /// Bytes that are no characters: each became a coefficient of more than 65000.
    BrokenCharacters {
        /// How many.
        count: usize,
    },
}

impl Damage {
    /// Whether the actions mean nothing: they were all set to 0, or hold values that no encoder writes.
    pub fn is_fatal(&self) -> bool {
        match self {
            Damage::Negative { .. } | Damage::BrokenCharacters { .. } => true,
            Damage::Length { fitted, .. } => !fitted,
            Damage::Unknown { .. } => false,
        }
    }
}

/// In which precision a chunk is transformed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Precision {
    /// That of normalized actions in both families.
    F32,
    /// For chunks that were never f32.
    F64,
}

impl FastCodec {
    /// Reads the codec in `directory`: `processor_config.json` and `tokenizer.json`.
    ///
    /// # Errors
    /// A file is missing or no codec of this kind.
    pub fn open(directory: &Path) -> Result<Self> {
        let settings_path = directory.join(SETTINGS);
        let bpe_path = directory.join(BPE);
        let settings = read_small(&settings_path)?;
        let bpe = read_small(&bpe_path)?;
        Self::parse(directory, &settings, &bpe)
    }

    /// The same from the contents of the two files.
    pub fn parse(directory: &Path, settings: &[u8], bpe: &[u8]) -> Result<Self> {
        let (settings_path, bpe_path) = (directory.join(SETTINGS), directory.join(BPE));
        let settings: Settings = parse_json(&settings_path, settings)?;
        if !settings.scale.is_finite() || settings.scale <= 0.0 {
            let why = format!("scale is {}, wanted a number above 0", settings.scale);
            return Err(Error::format(settings_path, why));
        }
        if settings.min_token.unsigned_abs() > 1 << 20 {
            let why = format!("min_token is {}, which no alphabet begins with", settings.min_token);
            return Err(Error::format(settings_path, why));
        }
        let file: Value = parse_json(&bpe_path, bpe)?;
        let kind = |part: &str| file[part]["type"].as_str().unwrap_or("none").to_owned();
        let kinds = [kind("model"), kind("pre_tokenizer"), kind("decoder")];
        if kinds != ["BPE", "ByteLevel", "ByteLevel"] {
            let [model, before, after] = kinds;
            let why = format!(
                "is a tokenizer of {model} with {before} and {after}; FAST is byte-level BPE (is it the prompt's \
                 tokenizer?)"
            );
            return Err(Error::format(bpe_path, why));
        }
        let mut bpe = read_tokenizer(bpe).map_err(|why| Error::format(&bpe_path, why))?;
        bpe.with_truncation(None).map_err(|why| Error::format(&bpe_path, why))?;
        bpe.with_padding(None);
        let size = bpe.get_vocab(true).values().max().map_or(0, |&id| id as usize + 1);
        if let Some(stated) = settings.vocab_size.filter(|&stated| size > stated) {
            let why =
                format!("has {size} entries, {SETTINGS} beside it says {stated}: is it another codec's?");
            return Err(Error::format(bpe_path, why));
        }
        if size == 0 {
            return Err(Error::format(bpe_path, "has no entries"));
        }
        Ok(Self {
            directory: directory.into(),
            bpe: Box::new(bpe),
            size,
            scale: settings.scale,
            min_token: settings.min_token,
        })
    }

    /// The folder that it was read from.
    pub fn directory(&self) -> &Path {
        &self.directory
    }

    /// Codes there are: from 0 up to this.
    pub fn size(&self) -> usize {
        self.size
    }

    /// The codes of normalized actions `[steps, dims]`.
    ///
    /// # Errors
    /// The chunk is not `[steps, dims]`, or a value is too large to be written.
    pub fn encode(
        &self,
        actions: &[f64],
        steps: usize,
        dims: usize,
        precision: Precision,
    ) -> Result<Vec<u32>> {
        let refuse = |why: String| Err(Error::Actions(why));
        if actions.is_empty() || actions.len() != steps * dims || actions.len() > MOST_VALUES {
            return refuse(format!("{} values to encode, wanted {steps} x {dims}", actions.len()));
        }
        let mut text = String::with_capacity(2 * actions.len());
        for (i, symbol) in self.symbols(actions, steps, dims, precision).into_iter().enumerate() {
            match u32::try_from(symbol).ok().and_then(char::from_u32) {
                Some(c) => text.push(c),
                None => return refuse(format!("coefficient {i} of the chunk is too large to be written")),
            }
        }
        let encoding = self.bpe.encode_fast(text, false).map_err(|why| Error::Actions(why.to_string()))?;
        Ok(encoding.get_ids().to_vec())
    }

    /// The coefficients as code points: frequency by frequency, in each all dimensions.
    fn symbols(&self, actions: &[f64], steps: usize, dims: usize, precision: Precision) -> Vec<i64> {
        let frequencies = dct::forward(actions, steps, dims);
        let rounded = frequencies.into_iter().map(|x| match precision {
            Precision::F64 => (x * self.scale).round_ties_even(),
            Precision::F32 => f64::from((x as f32 * self.scale as f32).round_ties_even()),
        });
        // The cast saturates; NaN is 0.
        rounded.map(|x| (x as i64).saturating_sub(self.min_token).max(0)).collect()
    }

    /// The actions `[steps, dims]` that `codes` stand for. With `relaxed`, lerobot's way, a number of coefficients that
    /// does not fit is cut or filled up; without, openpi's, it makes all actions 0.
    ///
    /// # Errors
    /// The chunk asked for is empty or beyond all measure.
    pub fn decode(&self, codes: &[i64], steps: usize, dims: usize, relaxed: bool) -> Result<Decoded> {
        let wanted = steps.saturating_mul(dims);
        if wanted == 0 || wanted > MOST_VALUES {
            return Err(Error::Actions(format!("a chunk of {steps} x {dims} values cannot be decoded")));
        }
        let zeros = |damage| Ok(Decoded { actions: vec![0.0; wanted], damage });
        if let Some(index) = codes.iter().position(|&code| code < 0) {
            return zeros(vec![Damage::Negative { index }]);
        }
        let mut damage = Vec::new();
        let (mut known, mut unknown) = (Vec::with_capacity(codes.len()), Vec::new());
        for (i, &code) in codes.iter().enumerate() {
            match u32::try_from(code).ok().filter(|&code| self.bpe.id_to_token(code).is_some()) {
                Some(code) => known.push(code),
                None => unknown.push(i),
            }
        }
        if !unknown.is_empty() {
            damage.push(Damage::Unknown { indices: unknown });
        }
        let text = self.bpe.decode(&known, false).map_err(|why| Error::Actions(why.to_string()))?;
        let broken = text.chars().filter(|&c| c == char::REPLACEMENT_CHARACTER).count();
        if broken > 0 {
            damage.push(Damage::BrokenCharacters { count: broken });
        }
        let mut frequencies: Vec<f64> =
            text.chars().map(|c| (i64::from(u32::from(c)) + self.min_token) as f64 / self.scale).collect();
        let got = frequencies.len();
        if got != wanted {
            damage.push(Damage::Length { got, wanted, fitted: relaxed });
            if !relaxed {
                return zeros(damage);
            }
            frequencies.resize(wanted, 0.0);
        }
        Ok(Decoded { actions: dct::inverse(&frequencies, steps, dims), damage })
    }
}

#[cfg(test)]
impl FastCodec {
    pub(super) fn symbols_of(
        &self,
        actions: &[f64],
        steps: usize,
        dims: usize,
        precision: Precision,
    ) -> Vec<i64> {
        self.symbols(actions, steps, dims, precision)
    }
}
