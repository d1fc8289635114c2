//! SentencePiece `.model` files of the BPE kind: a reader of the protobuf and the encoder.
//!
//! Only what Gemma's tokenizer uses is accepted: byte-pair merges, no text normalization, spaces as `▁`. Control
//! pieces such as `<bos>` never come out of text, as in SentencePiece itself.

use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};

use super::tokenizer::Piece as Entry;

/// What a piece is for; numbers of the protobuf.
const NORMAL: u64 = 1;
const UNKNOWN: u64 = 2;
const CONTROL: u64 = 3;
const USER_DEFINED: u64 = 4;
const UNUSED: u64 = 5;
const BYTE: u64 = 6;

/// A BPE model.
#[derive(Debug)]
pub(crate) struct SentencePiece {
    /// Pieces that text can become, with id and score.
    pieces: HashMap<Box<str>, Piece>,
    control: HashMap<Box<str>, u32>,
    /// Text and kind of every piece, by its id.
    by_id: Vec<(Box<str>, u64)>,
    /// Ids of the 256 byte pieces, if unknown characters fall back to bytes.
    bytes: Option<Box<[u32; 256]>>,
    unknown: u32,
    /// Length in bytes of the longest user-defined piece.
    longest_user_defined: usize,
    size: usize,
}

#[derive(Debug, Clone, Copy)]
struct Piece {
    id: u32,
    score: f32,
    kind: u64,
}

impl SentencePiece {
    /// Reads a `.model` file.
    pub fn parse(file: &[u8]) -> Result<Self, String> {
        let mut model = Model::default();
        let mut fields = Fields(file);
        while let Some((number, value)) = fields.next()? {
            match (number, value) {
                (1, Value::Bytes(piece)) => model.pieces.push(RawPiece::parse(piece)?),
                (2, Value::Bytes(spec)) => model.trainer(spec)?,
                (3, Value::Bytes(spec)) => model.normalizer(spec)?,
                _ => {}
            }
        }
        model.build()
    }

    /// Number of pieces.
    pub fn size(&self) -> usize {
        self.size
    }

    /// Id of a control piece such as `<bos>`.
    pub fn control(&self, piece: &str) -> Option<u32> {
        self.control.get(piece).copied()
    }

    /// Id of what no piece covers.
    pub fn unknown(&self) -> u32 {
        self.unknown
    }

    /// The piece of an id.
    pub fn piece(&self, id: u32) -> Option<Entry<'_>> {
        let (text, kind) = self.by_id.get(id as usize)?;
        Some(match *kind {
            CONTROL => Entry::Control((&**text).into()),
            UNKNOWN => Entry::Unknown((&**text).into()),
            BYTE => {
                let bytes = self.bytes.as_deref()?;
                Entry::Byte(bytes.iter().position(|&of| of == id)? as u8)
            }
            _ => Entry::Text((&**text).into()),
        })
    }

    /// Ids of a text, without BOS.
    pub fn encode(&self, text: &str) -> Vec<u32> {
        let text = text.replace(' ', "▁");
        let mut ids = Vec::new();
        let mut halves = HashMap::new();
        let mut symbols = self.merge(&text, &mut halves);
        symbols.reverse();
        while let Some(symbol) = symbols.pop() {
            // An unused piece exists only to be merged further; what was not falls apart again.
            if let Some(&(left, right)) = halves.get(symbol) {
                symbols.extend([right, left]);
                continue;
            }
            match (self.pieces.get(symbol), &self.bytes) {
                (Some(piece), _) if piece.kind != UNUSED => ids.push(piece.id),
                (_, Some(bytes)) => ids.extend(symbol.bytes().map(|b| bytes[b as usize])),
                // Neighbouring unknown symbols are one unknown.
                _ if ids.last() == Some(&self.unknown) => {}
                _ => ids.push(self.unknown),
            }
        }
        ids
    }

    /// Cuts off the first symbol: the longest user-defined piece, else one character.
    fn first_symbol<'a>(&self, text: &'a str) -> Option<(&'a str, bool)> {
        let longest = (1..=self.longest_user_defined.min(text.len())).rev().filter_map(|n| text.get(..n));
        for piece in longest {
            if self.pieces.get(piece).is_some_and(|piece| piece.kind == USER_DEFINED) {
                return Some((piece, true));
            }
        }
        text.chars().next().map(|c| (&text[..c.len_utf8()], false))
    }

    /// Merges neighbours, the best score first and the leftmost of equals, until nothing merges. `halves` receives
    /// what unused pieces were merged from.
    fn merge<'a>(&self, text: &'a str, halves: &mut HashMap<&'a str, (&'a str, &'a str)>) -> Vec<&'a str> {
        // Symbols as a linked list over ranges of `text`; a merged-away symbol is empty.
        let mut symbols: Vec<Symbol> = Vec::new();
        let mut at = 0;
        while let Some((piece, frozen)) = self.first_symbol(&text[at..]) {
            let i = symbols.len();
            symbols.push(Symbol {
                start: at,
                end: at + piece.len(),
                previous: i.checked_sub(1),
                next: Some(i + 1),
                frozen,
            });
            at += piece.len();
        }
        if let Some(last) = symbols.last_mut() {
            last.next = None;
        }

        let mut queue = BinaryHeap::new();
        let mut consider = |queue: &mut BinaryHeap<Merge>, symbols: &[Symbol], pair: [Option<usize>; 2]| {
            let [Some(left), Some(right)] = pair else { return };
            let (a, b) = (symbols[left], symbols[right]);
            if a.frozen || b.frozen {
                return;
            }
            let merged = &text[a.start..b.end];
            if let Some(piece) = self.pieces.get(merged) {
                if piece.kind == UNUSED {
                    halves.insert(merged, (&text[a.start..a.end], &text[b.start..b.end]));
                }
                let score = Score(piece.score);
                queue.push(Merge { score, left: Reverse(left), right, start: a.start, end: b.end });
            }
        };
        for i in 1..symbols.len() {
            consider(&mut queue, &symbols, [Some(i - 1), Some(i)]);
        }
        while let Some(best) = queue.pop() {
            let (left, right) = (best.left.0, best.right);
            let (a, b) = (symbols[left], symbols[right]);
            // Outdated: one of the two has grown or is gone since.
            if (a.start, b.end) != (best.start, best.end)
                || a.next != Some(right)
                || a.is_empty()
                || b.is_empty()
            {
                continue;
            }
            symbols[left].end = b.end;
            symbols[left].next = b.next;
            symbols[right].start = b.end;
            if let Some(next) = b.next {
                symbols[next].previous = Some(left);
            }
            consider(&mut queue, &symbols, [a.previous, Some(left)]);
            consider(&mut queue, &symbols, [Some(left), b.next]);
        }
        symbols.into_iter().filter(|s| !s.is_empty()).map(|s| &text[s.start..s.end]).collect()
    }
}

#[derive(Clone, Copy)]
struct Symbol {
    start: usize,
    end: usize,
    previous: Option<usize>,
    next: Option<usize>,
    /// User-defined: never merged.
    frozen: bool,
}

impl Symbol {
    fn is_empty(&self) -> bool {
        self.start == self.end
    }
}

/// Ordered by score, then from left to right.
#[derive(PartialEq, Eq, PartialOrd, Ord)]
struct Merge {
    score: Score,
    left: Reverse<usize>,
    right: usize,
    start: usize,
    end: usize,
}

/// A score that sorts; the reader lets no NaN in.
#[derive(Clone, Copy)]
struct Score(f32);

impl Ord for Score {
    fn cmp(&self, other: &Self) -> std::cmp::Ordering {
        self.0.total_cmp(&other.0)
    }
}
impl PartialOrd for Score {
    fn partial_cmp(&self, other: &Self) -> Option<std::cmp::Ordering> {
        Some(self.cmp(other))
    }
}
impl PartialEq for Score {
    fn eq(&self, other: &Self) -> bool {
        self.cmp(other).is_eq()
    }
}
impl Eq for Score {}

// ---- the file ----

/// What the protobuf says, with its defaults.
struct Model {
    pieces: Vec<RawPiece>,
    model_type: u64,
    byte_fallback: bool,
    charsmap: bool,
    add_dummy_prefix: bool,
    remove_extra_whitespaces: bool,
    escape_whitespaces: bool,
}

impl Default for Model {
    fn default() -> Self {
        Self {
            pieces: Vec::new(),
            model_type: 1,
            byte_fallback: false,
            charsmap: false,
            add_dummy_prefix: true,
            remove_extra_whitespaces: true,
            escape_whitespaces: true,
        }
    }
}

struct RawPiece {
    text: String,
    score: f32,
    kind: u64,
}

impl RawPiece {
    fn parse(bytes: &[u8]) -> Result<Self, String> {
        let (mut text, mut score, mut kind) = (None, 0.0, NORMAL);
        let mut fields = Fields(bytes);
        while let Some((number, value)) = fields.next()? {
            match (number, value) {
                (1, Value::Bytes(piece)) => {
                    text = Some(String::from_utf8(piece.to_vec()).map_err(|_| "a piece is not UTF-8")?);
                }
                (2, Value::Fixed32(bits)) => score = f32::from_bits(bits),
                (3, Value::Varint(number)) => kind = number,
                _ => {}
            }
        }
        let text = text.filter(|text| !text.is_empty()).ok_or("a piece has no text")?;
        if score.is_nan() {
            return Err(format!("the score of piece {text:?} is NaN"));
        }
        Ok(Self { text, score, kind })
    }
}

impl Model {
    fn trainer(&mut self, spec: &[u8]) -> Result<(), String> {
        let mut fields = Fields(spec);
        while let Some((number, value)) = fields.next()? {
            match (number, value) {
                (3, Value::Varint(kind)) => self.model_type = kind,
                (35, Value::Varint(flag)) => self.byte_fallback = flag != 0,
                _ => {}
            }
        }
        Ok(())
    }

    fn normalizer(&mut self, spec: &[u8]) -> Result<(), String> {
        let mut fields = Fields(spec);
        while let Some((number, value)) = fields.next()? {
            match (number, value) {
                (2, Value::Bytes(map)) => self.charsmap = !map.is_empty(),
                (3, Value::Varint(flag)) => self.add_dummy_prefix = flag != 0,
                (4, Value::Varint(flag)) => self.remove_extra_whitespaces = flag != 0,
                (5, Value::Varint(flag)) => self.escape_whitespaces = flag != 0,
                _ => {}
            }
        }
        Ok(())
    }

    fn build(self) -> Result<SentencePiece, String> {
        let unlike_gemma = [
            (self.model_type != 2, "it is not a BPE model"),
            (self.charsmap, "it normalizes its text with a character map"),
            (self.add_dummy_prefix, "it adds a space in front"),
            (self.remove_extra_whitespaces, "it removes extra spaces"),
            (!self.escape_whitespaces, "it does not write spaces as ▁"),
        ];
        if let Some((_, why)) = unlike_gemma.into_iter().find(|(unlike, _)| *unlike) {
            return Err(format!("this SentencePiece model is not like Gemma's: {why}"));
        }
        let size = self.pieces.len();
        let mut model = SentencePiece {
            pieces: HashMap::new(),
            control: HashMap::new(),
            by_id: self.pieces.iter().map(|piece| (piece.text.as_str().into(), piece.kind)).collect(),
            bytes: None,
            unknown: 0,
            longest_user_defined: 0,
            size,
        };
        let mut bytes = [None; 256];
        let mut unknown = None;
        for (i, RawPiece { text, score, kind }) in self.pieces.into_iter().enumerate() {
            let id = u32::try_from(i).map_err(|_| "too many pieces")?;
            match kind {
                NORMAL | USER_DEFINED | UNUSED => {
                    if kind == USER_DEFINED {
                        model.longest_user_defined = model.longest_user_defined.max(text.len());
                    }
                    if model.pieces.insert(text.clone().into(), Piece { id, score, kind }).is_some() {
                        return Err(format!("piece {text:?} is there twice"));
                    }
                }
                CONTROL => drop(model.control.insert(text.into(), id)),
                UNKNOWN => unknown = Some(id),
                BYTE => {
                    let byte = text.strip_prefix("<0x").and_then(|t| t.strip_suffix('>'));
                    let byte = byte.and_then(|hex| u8::from_str_radix(hex, 16).ok());
                    let byte = byte.ok_or_else(|| format!("piece {text:?} is no byte"))?;
                    bytes[byte as usize] = Some(id);
                }
                other => return Err(format!("piece {text:?} is of unknown kind {other}")),
            }
        }
        model.unknown = unknown.ok_or("there is no piece for the unknown")?;
        if self.byte_fallback {
            let mut all = Box::new([0; 256]);
            for (byte, (to, from)) in all.iter_mut().zip(bytes).enumerate() {
                *to = from.ok_or_else(|| format!("there is no piece for byte {byte:#04x}"))?;
            }
            model.bytes = Some(all);
        }
        Ok(model)
    }
}

/// Fields of one protobuf message.
struct Fields<'a>(&'a [u8]);

enum Value<'a> {
    Varint(u64),
    Fixed32(u32),
    Bytes(&'a [u8]),
    Other,
}

impl<'a> Fields<'a> {
    fn next(&mut self) -> Result<Option<(u64, Value<'a>)>, String> {
        if self.0.is_empty() {
            return Ok(None);
        }
        let tag = self.varint()?;
        let value = match tag & 7 {
            0 => Value::Varint(self.varint()?),
            1 => self.take(8).map(|_| Value::Other)?,
            2 => {
                let length = usize::try_from(self.varint()?).map_err(|_| CUT)?;
                Value::Bytes(self.take(length)?)
            }
            5 => {
                let bytes: [u8; 4] = self.take(4)?.try_into().map_err(|_| CUT)?;
                Value::Fixed32(u32::from_le_bytes(bytes))
            }
            wire => return Err(format!("not a SentencePiece model: wire type {wire}")),
        };
        Ok(Some((tag >> 3, value)))
    }

    fn varint(&mut self) -> Result<u64, String> {
        let mut value = 0;
        for shift in (0..64).step_by(7) {
            let [byte, rest @ ..] = self.0 else { return Err(CUT.into()) };
            self.0 = rest;
            value |= u64::from(byte & 0x7f) << shift;
            if byte & 0x80 == 0 {
                return Ok(value);
            }
        }
        Err("not a SentencePiece model: a number has more than 64 bits".into())
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], String> {
        let (taken, rest) = self.0.split_at_checked(length).ok_or(CUT)?;
        self.0 = rest;
        Ok(taken)
    }
}

const CUT: &str = "not a SentencePiece model, or cut short";
