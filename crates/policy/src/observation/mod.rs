//! What a robot sees, as it sends it: raw images, raw state, the task in words.

mod resize;

use std::borrow::Cow;
use std::io::Read;
use std::path::Path;
use std::sync::Arc;

use bytes::Bytes;
use pi0_model::open_file;

pub use resize::{Filter, Pad, Resize};

use crate::{Error, Result};

/// One observation. Keys are those of the robot (`cam_high`, `observation/image`) or of the checkpoint
/// (`observation.images.top`, `base_0_rgb`).
#[derive(Debug, Clone, Default)]
pub struct Observation {
    /// Camera and image; each camera at most once.
    pub images: Vec<(String, Image)>,
    /// Raw, in the robot's units, unpadded.
    pub state: Vec<f64>,
    /// What to do; the policy's default prompt when absent.
    pub prompt: Option<String>,
}

/// Samples of an image, shared rather than copied.
#[derive(Debug, Clone)]
pub enum Pixels {
    /// `0..=255`.
    U8(Bytes),
    /// `0.0..=1.0`.
    F32(Arc<[f32]>),
}

impl Pixels {
    fn len(&self) -> usize {
        match self {
            Pixels::U8(data) => data.len(),
            Pixels::F32(data) => data.len(),
        }
    }
}

/// Where the channels are.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Layout {
    /// `[height, width, 3]`.
    Hwc,
    /// `[3, height, width]`.
    Chw,
}

/// How to read an array whose layout is not stated.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum LayoutRule {
    /// Channels first if the first dimension is 3, as openpi's DROID and LIBERO transforms and lerobot decide.
    Guess,
    /// Always channels first: openpi's ALOHA transform.
    ChannelsFirst,
}

/// An RGB image.
#[derive(Debug, Clone)]
pub struct Image {
    pixels: Pixels,
    shape: [usize; 3],
    layout: Option<Layout>,
}

/// Longest side of an image that is accepted: 16384 pixels.
pub const MAX_SIDE: usize = 1 << 14;

impl Image {
    /// An array `[height, width, 3]` or `[3, height, width]`; which of the two, the policy decides as openpi does.
    /// Checked when it is used, so that the error can name the camera.
    pub fn array(pixels: Pixels, shape: [usize; 3]) -> Self {
        Self { pixels, shape, layout: None }
    }

    /// `[height, width, 3]` of `0..=255`.
    pub fn rgb8(data: impl Into<Bytes>, height: usize, width: usize) -> Self {
        Self { pixels: Pixels::U8(data.into()), shape: [height, width, 3], layout: Some(Layout::Hwc) }
    }

    /// `[height, width, 3]` of `0.0..=1.0`.
    pub fn rgb32f(data: impl Into<Arc<[f32]>>, height: usize, width: usize) -> Self {
        Self { pixels: Pixels::F32(data.into()), shape: [height, width, 3], layout: Some(Layout::Hwc) }
    }

    /// The samples, in the order of the array that the image was made of.
    pub fn pixels(&self) -> &Pixels {
        &self.pixels
    }

    /// Decodes a PNG or JPEG. `key` is the camera, for errors. An alpha channel is dropped, grey is repeated.
    pub fn decode(key: &str, bytes: &[u8]) -> Result<Self> {
        let bytes = with_png_end(bytes);
        let mut reader = image::ImageReader::new(std::io::Cursor::new(&bytes))
            .with_guessed_format()
            .map_err(|error| Error::image(key, error))?;
        match reader.format() {
            None => return Err(Error::image(key, "neither PNG nor JPEG")),
            // The decoder would make up the rest, and the policy would plan on it; Pillow refuses too.
            Some(image::ImageFormat::Jpeg) if !jpeg_is_whole(&bytes) => {
                return Err(Error::image(key, "the JPEG is cut off: its end marker is missing"));
            }
            Some(_) => {}
        }
        let mut limits = image::Limits::default();
        limits.max_image_width = Some(MAX_SIDE as u32);
        limits.max_image_height = Some(MAX_SIDE as u32);
        reader.limits(limits);
        let rgb = reader.decode().map_err(|error| Error::image(key, error))?.into_rgb8();
        let (width, height) = rgb.dimensions();
        Ok(Self::rgb8(rgb.into_raw(), height as usize, width as usize))
    }

    /// Reads and decodes a PNG or JPEG file.
    pub fn open(key: &str, path: &Path) -> Result<Self> {
        let mut bytes = Vec::new();
        let read = open_file(path).and_then(|mut file| file.read_to_end(&mut bytes));
        read.map_err(|source| Error::Read { path: path.into(), source })?;
        Self::decode(key, &bytes).map_err(|error| match error {
            Error::Image { key, why } => Error::Image { key, why: format!("{}: {why}", path.display()) },
            other => other,
        })
    }

    /// Checks everything about the image, and says how its samples lie.
    pub(crate) fn view(&self, key: &str, rule: LayoutRule) -> Result<ImageView<'_>> {
        let view = self.shaped(key, rule)?;
        if let Pixels::F32(data) = &self.pixels {
            // A little slack for rounding; 0..=255 sent as floats is the usual mistake.
            if let Some(bad) = data.iter().find(|x| !(-1e-3..=1.001).contains(*x)) {
                return Err(Error::image(key, format!("float samples must lie in 0.0..=1.0, found {bad}")));
            }
        }
        Ok(view)
    }

    /// Checks the shape only.
    pub(crate) fn shaped(&self, key: &str, rule: LayoutRule) -> Result<ImageView<'_>> {
        let shape = self.shape;
        let layout = self.layout.unwrap_or(match rule {
            LayoutRule::ChannelsFirst => Layout::Chw,
            LayoutRule::Guess if shape[0] == 3 => Layout::Chw,
            LayoutRule::Guess => Layout::Hwc,
        });
        let (channels, height, width) = match layout {
            Layout::Hwc => (shape[2], shape[0], shape[1]),
            Layout::Chw => (shape[0], shape[1], shape[2]),
        };
        if channels != 3 {
            let wanted = match rule {
                LayoutRule::Guess => "[height, width, 3] or [3, height, width]",
                LayoutRule::ChannelsFirst => "[3, height, width]",
            };
            return Err(Error::image(key, format!("shape is {shape:?}, wanted {wanted}")));
        }
        if !(1..=MAX_SIDE).contains(&height) || !(1..=MAX_SIDE).contains(&width) {
            let why = format!("{height} x {width} pixels; each side must have 1 to {MAX_SIDE}");
            return Err(Error::image(key, why));
        }
        let wanted = 3 * height * width;
        if self.pixels.len() != wanted {
            let why = format!("shape {shape:?} needs {wanted} samples, got {}", self.pixels.len());
            return Err(Error::image(key, why));
        }
        Ok(ImageView { pixels: &self.pixels, height, width, layout })
    }
}

/// The bytes, and the rest of a PNG's last chunk where only that was cut off: it holds nothing of the picture, and Pillow
/// does without it. Every chunk before it is there with its checksum.
fn with_png_end(bytes: &[u8]) -> Cow<'_, [u8]> {
    const END: &[u8] = b"\0\0\0\0IEND\xae\x42\x60\x82";
    let Some(mut rest) = bytes.strip_prefix(b"\x89PNG\r\n\x1a\n") else { return Cow::Borrowed(bytes) };
    let (mut picture, mut ended) = (false, false);
    // Length, type, as many bytes, checksum.
    while let Some((&[a, b, c, d], behind)) = rest.split_first_chunk() {
        let Some(next) = behind.get(8usize.saturating_add(u32::from_be_bytes([a, b, c, d]) as usize)..)
        else {
            break;
        };
        picture |= behind.starts_with(b"IDAT");
        ended |= behind.starts_with(b"IEND");
        rest = next;
    }
    let cut = picture && !ended && rest.len() < END.len() && END.starts_with(rest);
    if cut { Cow::Owned([bytes, &END[rest.len()..]].concat()) } else { Cow::Borrowed(bytes) }
}

/// Whether a JPEG comes to its end marker: walks from marker to marker, over segments and the data of scans.
fn jpeg_is_whole(bytes: &[u8]) -> bool {
    let mut rest = bytes.get(2..).unwrap_or_default();
    while let Some(at) = rest.iter().position(|&byte| byte == 0xff) {
        rest = &rest[at + 1..];
        let skip = match rest.first() {
            Some(0xd9) => return true,
            // Another byte of filling, which is the start of a marker too.
            Some(0xff) => 0,
            // Data, or a marker without a segment.
            Some(0x00 | 0x01 | 0xd0..=0xd8) => 1,
            Some(_) => match rest.get(1..3) {
                Some(length) => 1 + usize::from(u16::from_be_bytes([length[0], length[1]])),
                None => return false,
            },
            None => return false,
        };
        rest = rest.get(skip..).unwrap_or_default();
    }
    false
}

/// A checked image.
#[derive(Clone, Copy)]
pub(crate) struct ImageView<'a> {
    pub pixels: &'a Pixels,
    pub height: usize,
    pub width: usize,
    pub layout: Layout,
}

impl<'a> ImageView<'a> {
    /// Distances in samples between neighbouring channels, rows and columns.
    pub fn strides(&self) -> [usize; 3] {
        match self.layout {
            Layout::Hwc => [1, 3 * self.width, 3],
            Layout::Chw => [self.height * self.width, self.width, 1],
        }
    }

    /// `[height, width, 3]` of `0..=255`; floats become `trunc(255 x)`, as in openpi.
    pub fn to_rgb8(self) -> Cow<'a, [u8]> {
        match self.pixels {
            Pixels::U8(data) if self.layout == Layout::Hwc => Cow::Borrowed(data),
            Pixels::U8(data) => Cow::Owned(self.gather(|i| data[i])),
            Pixels::F32(data) => Cow::Owned(self.gather(|i| (255.0 * data[i]) as u8)),
        }
    }

    fn gather(&self, sample: impl Fn(usize) -> u8) -> Vec<u8> {
        let [channel, row, column] = self.strides();
        let mut out = Vec::with_capacity(3 * self.height * self.width);
        for y in 0..self.height {
            for x in 0..self.width {
                let at = y * row + x * column;
                out.extend([sample(at), sample(at + channel), sample(at + 2 * channel)]);
            }
        }
        out
    }
}
