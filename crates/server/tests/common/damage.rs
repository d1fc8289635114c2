//! Good messages, damaged: what a fuzzer, a broken client or an enemy sends.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{Rng, SeedableRng};

/// Makes damaged messages of good ones, the same for the same seed.
pub struct Vandal {
    good: Vec<Vec<u8>>,
    random: ChaCha8Rng,
}

/// Bytes for the wire below a websocket.
pub struct Wire {
    pub bytes: Vec<u8>,
    /// The server must end the connection by itself; else it may wait for more.
    pub offends: bool,
}

impl Vandal {
    pub fn new(good: Vec<Vec<u8>>, seed: u64) -> Self {
        Self { good, random: ChaCha8Rng::seed_from_u64(seed) }
    }

    /// A number below `n`, or 0.
    pub fn below(&mut self, n: usize) -> usize {
        (self.random.next_u64() % n.max(1) as u64) as usize
    }

    fn bytes(&mut self, count: usize) -> Vec<u8> {
        (0..count).map(|_| self.random.next_u64() as u8).collect()
    }

    /// A place in a message. What is not an image is at the ends: that is where most damage goes.
    fn place(&mut self, length: usize) -> usize {
        let edge = self.below(200.min(length));
        match self.below(3) {
            0 => self.below(length),
            1 => edge,
            _ => length - 1 - edge,
        }
    }

    /// One of the good messages with some damage done.
    pub fn message(&mut self) -> Vec<u8> {
        let which = self.below(self.good.len());
        let mut frame = self.good[which].clone();
        let (kind, length) = (self.below(11), frame.len());
        let at = self.place(length);
        match kind {
            0 => frame.truncate(at),
            1 => {
                for _ in 0..=self.below(4) {
                    let at = self.place(length);
                    frame[at] = self.below(256) as u8;
                }
            }
            2 => frame[at] ^= 1 << self.below(8),
            3 => drop(frame.splice(at..at, (0..=self.below(9)).map(|i| (i * 0x51) as u8 | 0x80))),
            4 => drop(frame.drain(at..(at + 1 + self.below(16)).min(length))),
            // Bytes, strings, lists and dictionaries that claim to be huge.
            5 => {
                let marker = [0xc6, 0xdb, 0xdd, 0xdf][self.below(4)];
                let claim = [u32::MAX, 1 << 31, 1 << 20, length as u32 + 1][self.below(4)];
                let claim: Vec<u8> = [marker].into_iter().chain(claim.to_be_bytes()).collect();
                frame.splice(at..(at + 5).min(length), claim);
            }
            // Lists and dictionaries within each other.
            6 => {
                let around: &[u8] = [&b"\x91"[..], b"\x81\xa1a", b"\xdd\0\0\0\x01"][self.below(3)];
                let levels = [1, 15, 16, 17, 300, 100_000][self.below(6)];
                frame.splice(0..0, around.repeat(levels));
            }
            // An array whose shape is a lie: huge, overflowing, empty, of many dimensions.
            7 => {
                let size = [u64::MAX, 1 << 63, 1 << 32, 1 << 22, 224, 0][self.below(6)];
                let rank = [0, 1, 2, 3, 15][self.below(5)];
                let sizes = std::iter::repeat_n(size.to_be_bytes(), rank)
                    .flat_map(|size| [&[0xcf], &size[..]].concat());
                self.behind(&mut frame, b"shape", [0x90 | rank as u8].into_iter().chain(sizes).collect(), 1);
            }
            // An array of another type.
            8 => {
                let types = [
                    "|O", "<f8", ">f4", "<f2", "<c16", "|V8", "<U9", "<U0", "|S3", "|S0", "|b1", "<i8",
                    "|u1", "x", "",
                ];
                let name = types[self.below(types.len())];
                let text = [0xa0 | name.len() as u8].into_iter().chain(name.bytes()).collect();
                self.behind(&mut frame, b"dtype", text, 4);
            }
            // The beginning of one message and the end of another.
            9 => {
                let other = self.below(self.good.len());
                let from = self.place(self.good[other].len());
                frame.truncate(at);
                frame.extend_from_slice(&self.good[other][from..]);
            }
            _ => {
                let count = self.below(300);
                frame = self.bytes(count);
            }
        }
        frame
    }

    /// Replaces `length` bytes behind one occurrence of a key.
    fn behind(&mut self, frame: &mut Vec<u8>, key: &[u8], new: Vec<u8>, length: usize) {
        let places: Vec<usize> = (0..frame.len()).filter(|&i| frame[i..].starts_with(key)).collect();
        let start = places[self.below(places.len())] + key.len();
        let end = (start + length).min(frame.len());
        frame.splice(start..end, new);
    }

    /// What breaks the protocol of websockets.
    pub fn wire(&mut self) -> Wire {
        const MASK: [u8; 4] = [0; 4];
        let masked =
            |first: u8, payload: &[u8]| [&[first, 0x80 | payload.len() as u8], &MASK[..], payload].concat();
        let (bytes, offends) = match self.below(10) {
            // A reserved kind of frame, reserved bits, a frame without a mask.
            0 => (masked(0x83, b"x"), true),
            1 => (masked(0xf2, b"x"), true),
            2 => (b"\x82\x01x".to_vec(), true),
            // Claims of a message beyond the limit, and of more than there is memory.
            3 => ([b"\x82\xff\0\0\0\0\x10\0\0\0", &MASK[..]].concat(), true),
            4 => ([b"\x82\xff\x7f\xff\xff\xff\xff\xff\xff\xff", &MASK[..]].concat(), true),
            // A ping that is too long, in parts, or the middle of a message without its beginning.
            5 => ([b"\x89\xfe\0\x80", &MASK[..], &[0; 128]].concat(), true),
            6 => (masked(0x09, b"x"), true),
            7 => (masked(0x80, b"x"), true),
            // Text that is not UTF-8.
            8 => (masked(0x81, b"\xff\xfe"), true),
            // A good frame that stops halfway.
            _ => {
                let which = self.below(self.good.len());
                let good = &self.good[which];
                let head = [&[0x82, 0xff], &(good.len() as u64).to_be_bytes()[..], &MASK].concat();
                let whole = [head, good.clone()].concat();
                let cut = self.below(whole.len());
                (whole[..cut].to_vec(), false)
            }
        };
        Wire { bytes, offends }
    }
}
