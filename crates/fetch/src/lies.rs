//! Answers that no honest server gives.

use proptest::prelude::*;

/// Pieces that a listing may be made to hold.
const PIECES: [&str; 14] = [
    "..",
    "/",
    "\\\\",
    "null",
    "-1",
    "1e999",
    "18446744073709551616",
    "[]",
    "{}",
    "\"\"",
    "\\u0000",
    "%2e%2e%2f",
    "C:",
    "\u{202e}",
];

/// An honest answer with some bytes changed, some pieces put in, and maybe cut; or no answer at all.
pub(crate) fn answers(honest: &'static [u8]) -> impl Strategy<Value = Vec<u8>> {
    let at = any::<prop::sample::Index>;
    let bytes = prop::collection::vec((at(), any::<u8>()), 0..3);
    let pieces = prop::collection::vec((at(), prop::sample::select(&PIECES[..])), 0..3);
    let changed = (bytes, pieces, prop::option::weighted(0.2, at())).prop_map(|(bytes, pieces, cut)| {
        let mut answer = honest.to_vec();
        for (at, byte) in bytes {
            let at = at.index(answer.len());
            answer[at] = byte;
        }
        for (at, piece) in pieces {
            // Behind something that ends a name or a value, or anywhere.
            let at = at.index(answer.len());
            let near = answer[at..].iter().position(|b| b":\",/".contains(b)).map_or(at, |n| at + n + 1);
            answer.splice(near..near, piece.bytes());
        }
        if let Some(cut) = cut {
            answer.truncate(cut.index(answer.len()));
        }
        answer
    });
    prop_oneof![9 => changed, 1 => prop::collection::vec(any::<u8>(), 0..200)]
}
