//! Animated GIFs: one palette of the most frequent colours, and only what changed from frame to frame.

use std::borrow::Cow;
use std::collections::HashMap;
use std::io::Write;

use crate::render::Frame;
use crate::{Error, Result};

/// Colours of the palette; one more index means "as before".
const COLORS: usize = 255;

/// Writes frames, all of one size, each with the time that it is shown in hundredths of a second.
pub fn write_gif(out: impl Write, frames: &[(Frame, u16)]) -> Result<()> {
    let Some((first, _)) = frames.first() else { return Err(Error::NoFrames) };
    let mut palette = Palette::of(frames.iter().map(|(frame, _)| frame));
    let side =
        |length: usize| u16::try_from(length).map_err(|_| Error::Picture("a picture too large".into()));
    let (width, height) = (side(first.width)?, side(first.height)?);
    let picture = |error: gif::EncodingError| Error::Picture(error.to_string());
    let mut encoder = gif::Encoder::new(out, width, height, &palette.colors.concat()).map_err(picture)?;
    encoder.set_repeat(gif::Repeat::Infinite).map_err(picture)?;
    let mut before: Option<Vec<u8>> = None;
    for (frame, delay) in frames {
        let now: Vec<u8> = frame.rgb.chunks_exact(3).map(|p| palette.index([p[0], p[1], p[2]])).collect();
        let area =
            before.as_ref().map_or(Area::whole(first), |before| Area::changed(before, &now, first.width));
        let mut buffer = Vec::with_capacity(area.width * area.height);
        for row in area.top..area.top + area.height {
            for at in (row * first.width + area.left)..(row * first.width + area.left + area.width) {
                let same = before.as_ref().is_some_and(|before| before[at] == now[at]);
                buffer.push(if same { COLORS as u8 } else { now[at] });
            }
        }
        let encoded = gif::Frame {
            delay: *delay,
            dispose: gif::DisposalMethod::Keep,
            transparent: Some(COLORS as u8),
            left: area.left as u16,
            top: area.top as u16,
            width: area.width as u16,
            height: area.height as u16,
            buffer: Cow::Owned(buffer),
            ..gif::Frame::default()
        };
        encoder.write_frame(&encoded).map_err(picture)?;
        before = Some(now);
    }
    Ok(())
}

/// Part of a picture.
struct Area {
    left: usize,
    top: usize,
    width: usize,
    height: usize,
}

impl Area {
    fn whole(frame: &Frame) -> Self {
        Self { left: 0, top: 0, width: frame.width, height: frame.height }
    }

    /// The rectangle around everything that differs; one pixel if nothing does, since a frame cannot be empty.
    fn changed(before: &[u8], now: &[u8], width: usize) -> Self {
        let mut bounds: Option<[usize; 4]> = None;
        for at in (0..now.len()).filter(|&at| before[at] != now[at]) {
            let (x, y) = (at % width, at / width);
            let [left, top, right, bottom] = bounds.unwrap_or([x, y, x, y]);
            bounds = Some([left.min(x), top.min(y), right.max(x), bottom.max(y)]);
        }
        let [left, top, right, bottom] = bounds.unwrap_or_default();
        Self { left, top, width: right - left + 1, height: bottom - top + 1 }
    }
}

/// The most frequent colours, and for any colour the nearest of them.
struct Palette {
    colors: Vec<[u8; 3]>,
    nearest: HashMap<[u8; 3], u8>,
}

impl Palette {
    fn of<'a>(frames: impl Iterator<Item = &'a Frame>) -> Self {
        let mut counts: HashMap<[u8; 3], usize> = HashMap::new();
        // Neighbouring frames hardly differ: every fourth tells enough.
        for frame in frames.step_by(4) {
            for p in frame.rgb.chunks_exact(3) {
                *counts.entry([p[0] & 0xfc, p[1] & 0xfc, p[2] & 0xfc]).or_default() += 1;
            }
        }
        let mut colors: Vec<_> = counts.into_iter().collect();
        colors.sort_by_key(|&(color, count)| (std::cmp::Reverse(count), color));
        colors.truncate(COLORS);
        let mut colors: Vec<_> = colors.into_iter().map(|(color, _)| color).collect();
        colors.resize(COLORS + 1, [0; 3]);
        Self { colors, nearest: HashMap::new() }
    }

    fn index(&mut self, color: [u8; 3]) -> u8 {
        let Self { colors, nearest } = self;
        *nearest.entry(color).or_insert_with(|| {
            let far = |other: &[u8; 3]| -> i32 {
                color.iter().zip(other).map(|(&a, &b)| (i32::from(a) - i32::from(b)).pow(2)).sum()
            };
            (0..COLORS).min_by_key(|&i| far(&colors[i])).unwrap_or(0) as u8
        })
    }
}
