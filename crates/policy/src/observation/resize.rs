//! Images to the network's size and range: letterboxed, `[3, size, size]`, in `[-1, 1]`.
//!
//! Two filters, for the two worlds in which π0 is trained: [`Filter::Pillow`] equals Pillow's `BILINEAR` bit for
//! bit (openpi), [`Filter::Torch`] is `torch.nn.functional.interpolate(mode="bilinear", align_corners=False)`
//! (lerobot). They differ a lot when an image shrinks: the one averages, the other picks.

use serde::Serialize;

use crate::observation::{ImageView, LayoutRule, Pixels};
use crate::{Error, Image, Result};

/// How pixels are interpolated.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Filter {
    /// Antialiased triangle in 8-bit fixed point, as openpi's client and server do it.
    Pillow,
    /// Four neighbours in f32, as lerobot does it.
    Torch,
}

/// Where the bars of a letterboxed image go, and what is in them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum Pad {
    /// Black (-1), half on either side, the odd pixel at the bottom or right: openpi, lerobot since 0.5.
    Center,
    /// -3, otherwise like [`Pad::Center`]: lerobot 0.4, which pads with -1 before it maps `[0, 1]` to `[-1, 1]`.
    #[serde(rename = "center-3")]
    Center3,
    /// Black, all of it on top and left: lerobot up to 0.3.
    #[serde(rename = "topleft")]
    TopLeft,
}

/// How images are brought to the network's size.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Resize {
    /// Interpolation.
    pub filter: Filter,
    /// Bars.
    pub pad: Pad,
}

/// Where the resized image lies in the square.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Letterbox {
    height: usize,
    width: usize,
    top: usize,
    left: usize,
}

impl Letterbox {
    /// None when a side would vanish.
    fn new(height: usize, width: usize, size: usize, pad: Pad) -> Option<Self> {
        if (height, width) == (size, size) {
            return Some(Self { height, width, top: 0, left: 0 });
        }
        let ratio = (width as f64 / size as f64).max(height as f64 / size as f64);
        let (h, w) = ((height as f64 / ratio) as usize, (width as f64 / ratio) as usize);
        if h == 0 || w == 0 {
            return None;
        }
        let share = match pad {
            Pad::Center | Pad::Center3 => 2,
            Pad::TopLeft => 1,
        };
        Some(Self { height: h, width: w, top: (size - h) / share, left: (size - w) / share })
    }
}

impl Resize {
    /// The image as the network takes it, `[3, size, size]`. `key` is the camera, for errors.
    pub(crate) fn apply(self, key: &str, image: &Image, rule: LayoutRule, size: usize) -> Result<Vec<f32>> {
        let view = image.view(key, rule)?;
        let Some(spot) = Letterbox::new(view.height, view.width, size, self.pad) else {
            let why = format!("{} x {} pixels is too narrow to scale to {size}", view.height, view.width);
            return Err(Error::image(key, why));
        };
        let bars = if self.pad == Pad::Center3 { -3.0 } else { -1.0 };
        let mut out = vec![bars; 3 * size * size];
        let table = std::array::from_fn::<f32, 256, _>(|i| i as f32 / 255.0 * 2.0 - 1.0);
        match self.filter {
            // Nothing to resample, as openpi does: robots that resize their images themselves send these.
            Filter::Pillow if (view.height, view.width) == (spot.height, spot.width) => match view.pixels {
                Pixels::U8(data) => copy(&mut out, size, spot, &view, data, |x| table[usize::from(x)]),
                Pixels::F32(data) => {
                    copy(&mut out, size, spot, &view, data, |x| table[usize::from((255.0 * x) as u8)]);
                }
            },
            Filter::Pillow => {
                let source = view.to_rgb8();
                let small = pillow(&source, view.height, view.width, spot.height, spot.width);
                place(&mut out, size, spot, |c, y, x| table[small[(y * spot.width + x) * 3 + c] as usize]);
            }
            Filter::Torch => {
                let table = std::array::from_fn::<f32, 256, _>(|i| i as f32 / 255.0);
                match view.pixels {
                    Pixels::U8(data) => bilinear(&mut out, size, spot, &view, |i| table[data[i] as usize]),
                    Pixels::F32(data) => bilinear(&mut out, size, spot, &view, |i| data[i]),
                }
            }
        }
        Ok(out)
    }
}

/// Writes `sample(channel, y, x)` of the resized image to its place.
fn place(out: &mut [f32], size: usize, spot: Letterbox, sample: impl Fn(usize, usize, usize) -> f32) {
    for c in 0..3 {
        for y in 0..spot.height {
            let start = (c * size + spot.top + y) * size + spot.left;
            for (x, out) in out[start..start + spot.width].iter_mut().enumerate() {
                *out = sample(c, y, x);
            }
        }
    }
}

/// Writes an image that already has its size to its place, `scale` applied to every sample.
fn copy<T: Copy>(
    out: &mut [f32],
    size: usize,
    spot: Letterbox,
    view: &ImageView<'_>,
    data: &[T],
    scale: impl Fn(T) -> f32,
) {
    let [channel, row, column] = view.strides();
    let (red, rest) = out.split_at_mut(size * size);
    let (green, blue) = rest.split_at_mut(size * size);
    for y in 0..spot.height {
        let start = (spot.top + y) * size + spot.left;
        let mut planes =
            [&mut *red, &mut *green, &mut *blue].map(|plane| &mut plane[start..start + spot.width]);
        if (channel, column) == (1, 3) {
            // A pixel's three values lie together: read once, written to three places.
            let [red, green, blue] = planes;
            let pixels = data[y * row..].as_chunks::<3>().0;
            for (((pixel, red), green), blue) in pixels.iter().zip(red).zip(green).zip(blue) {
                [*red, *green, *blue] = pixel.map(&scale);
            }
            continue;
        }
        for (c, plane) in planes.iter_mut().enumerate() {
            let samples = data[c * channel + y * row..].iter().step_by(column);
            plane.iter_mut().zip(samples).for_each(|(out, &sample)| *out = scale(sample));
        }
    }
}

/// Bits behind the point of Pillow's coefficients.
const PRECISION: u32 = 22;

/// One output sample of one pass: the first source index and the fixed-point weights from there on.
struct Taps {
    first: usize,
    weights: Vec<i32>,
}

/// Pillow's coefficients of the triangle filter from `from` to `to` samples.
fn pillow_taps(from: usize, to: usize) -> Vec<Taps> {
    let scale = from as f64 / to as f64;
    let support = scale.max(1.0);
    (0..to)
        .map(|i| {
            let center = (i as f64 + 0.5) * scale;
            let first = ((center - support + 0.5) as i64).max(0) as usize;
            let last = ((center + support + 0.5) as usize).min(from);
            let weight = |x: usize| (1.0 - ((x as f64 - center + 0.5) * (1.0 / support)).abs()).max(0.0);
            let raw: Vec<f64> = (first..last).map(weight).collect();
            let sum: f64 = raw.iter().sum();
            let fixed = |w: f64| (0.5 + w / sum * f64::from(1 << PRECISION)) as i32;
            Taps { first, weights: raw.into_iter().map(fixed).collect() }
        })
        .collect()
}

/// `resize(BILINEAR)` of an RGB image: first along rows, then along columns, rounded to 8 bits in between.
fn pillow(source: &[u8], height: usize, width: usize, to_height: usize, to_width: usize) -> Vec<u8> {
    let round = |sum: i32| (sum >> PRECISION).clamp(0, 255) as u8;
    let half = 1 << (PRECISION - 1);

    let taps = pillow_taps(width, to_width);
    let mut narrow = vec![0; height * to_width * 3];
    for (row, out) in source.chunks_exact(width * 3).zip(narrow.chunks_exact_mut(to_width * 3)) {
        for (taps, out) in taps.iter().zip(out.chunks_exact_mut(3)) {
            let mut sum = [half; 3];
            for (pixel, &w) in row[taps.first * 3..].chunks_exact(3).zip(&taps.weights) {
                for (sum, &p) in sum.iter_mut().zip(pixel) {
                    *sum += i32::from(p) * w;
                }
            }
            for (out, sum) in out.iter_mut().zip(sum) {
                *out = round(sum);
            }
        }
    }

    let mut out = vec![0; to_height * to_width * 3];
    let mut sums = vec![half; to_width * 3];
    for (taps, out) in pillow_taps(height, to_height).iter().zip(out.chunks_exact_mut(to_width * 3)) {
        sums.fill(half);
        for (row, &w) in narrow[taps.first * to_width * 3..].chunks_exact(to_width * 3).zip(&taps.weights) {
            for (sum, &p) in sums.iter_mut().zip(row) {
                *sum += i32::from(p) * w;
            }
        }
        for (out, &sum) in out.iter_mut().zip(&sums) {
            *out = round(sum);
        }
    }
    out
}

/// The two neighbours of an output sample, and the second one's weight, in f32 as torch computes them.
fn torch_taps(from: usize, to: usize) -> Vec<(usize, usize, f32)> {
    let scale = from as f32 / to as f32;
    (0..to)
        .map(|i| {
            let at = (scale * (i as f32 + 0.5) - 0.5).max(0.0);
            let first = (at as usize).min(from - 1);
            (first, (first + 1).min(from - 1), (at - first as f32).clamp(0.0, 1.0))
        })
        .collect()
}

/// Torch's bilinear interpolation of samples in `[0, 1]`, then `[-1, 1]`.
fn bilinear(
    out: &mut [f32],
    size: usize,
    spot: Letterbox,
    view: &ImageView<'_>,
    sample: impl Fn(usize) -> f32,
) {
    let [channel, row, column] = view.strides();
    if (view.height, view.width) == (spot.height, spot.width) {
        return place(out, size, spot, |c, y, x| sample(c * channel + y * row + x * column) * 2.0 - 1.0);
    }
    let (rows, columns) = (torch_taps(view.height, spot.height), torch_taps(view.width, spot.width));
    place(out, size, spot, |c, y, x| {
        let (y0, y1, v) = rows[y];
        let (x0, x1, u) = columns[x];
        let line = |y: usize| {
            let at = c * channel + y * row;
            mix(sample(at + x0 * column), sample(at + x1 * column), u)
        };
        mix(line(y0), line(y1), v).clamp(0.0, 1.0) * 2.0 - 1.0
    });
}

/// `a (1 - t) + b t` with the roundings of torch's x86-64 build, which fuses the left product into the addition. In
/// f64 the product is exact, and fast also where the processor has no such instruction.
fn mix(a: f32, b: f32, t: f32) -> f32 {
    (f64::from(a) * f64::from(1.0 - t) + f64::from(b * t)) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The noise of `make_fixtures.py`.
    fn pattern(height: usize, width: usize) -> Vec<u8> {
        let mut x = 12345u32;
        let mut next = || {
            x = x.wrapping_mul(1664525).wrapping_add(1013904223);
            (x >> 24) as u8
        };
        (0..3 * height * width).map(|_| next()).collect()
    }

    struct Fixture<'a> {
        sizes: [usize; 4],
        pillow: &'a [u8],
        torch: Vec<f32>,
    }

    fn fixtures() -> Vec<Fixture<'static>> {
        let mut bytes: &[u8] = include_bytes!("../../tests/data/resize.bin");
        let mut all = Vec::new();
        while !bytes.is_empty() {
            let sizes: [usize; 4] = std::array::from_fn(|i| {
                u32::from_le_bytes(bytes[4 * i..4 * i + 4].try_into().unwrap()) as usize
            });
            let n = 3 * sizes[2] * sizes[3];
            let torch =
                bytes[16 + n..16 + 5 * n].as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect();
            all.push(Fixture { sizes, pillow: &bytes[16..16 + n], torch });
            bytes = &bytes[16 + 5 * n..];
        }
        assert_eq!(all.len(), 6);
        all
    }

    #[test]
    fn pillow_is_exact() {
        for Fixture { sizes: [h, w, to_h, to_w], pillow: wanted, .. } in fixtures() {
            assert!(pillow(&pattern(h, w), h, w, to_h, to_w) == wanted, "{h} x {w} to {to_h} x {to_w}");
        }
    }

    #[test]
    fn an_image_of_the_right_size_is_copied_as_pillow_would() {
        let resize = Resize { filter: Filter::Pillow, pad: Pad::Center };
        for (h, w) in [(8, 8), (6, 8), (8, 5)] {
            let data = pattern(h, w);
            let spot = Letterbox::new(h, w, 8, Pad::Center).unwrap();
            let (same, mut wanted) = (pillow(&data, h, w, h, w), vec![-1.0; 3 * 8 * 8]);
            place(&mut wanted, 8, spot, |c, y, x| f32::from(same[(y * w + x) * 3 + c]) / 255.0 * 2.0 - 1.0);
            let planes: Vec<u8> = (0..3 * h * w).map(|i| data[i % (h * w) * 3 + i / (h * w)]).collect();
            let floats =
                |bytes: &[u8]| bytes.iter().map(|&b| (f32::from(b) + 0.5) / 255.5).collect::<Vec<_>>();
            for image in [
                Image::rgb8(data.clone(), h, w),
                Image::rgb32f(floats(&data), h, w),
                Image::array(Pixels::U8(planes.clone().into()), [3, h, w]),
                Image::array(Pixels::F32(floats(&planes).into()), [3, h, w]),
            ] {
                assert_eq!(resize.apply("x", &image, LayoutRule::Guess, 8).unwrap(), wanted, "{h} x {w}");
            }
        }
    }

    #[test]
    fn torch_is_exact() {
        for Fixture { sizes: [h, w, to_h, to_w], torch, .. } in fixtures() {
            let image = Image::rgb8(pattern(h, w), h, w);
            let view = image.view("x", LayoutRule::Guess).unwrap();
            let size = to_h.max(to_w);
            let spot = Letterbox { height: to_h, width: to_w, top: 0, left: 0 };
            let (mut out, data) = (vec![0.0; 3 * size * size], pattern(h, w));
            bilinear(&mut out, size, spot, &view, |i| data[i] as f32 / 255.0);
            let got = |c, y, x| out[(c * size + y) * size + x];
            let wanted = |c, y, x| torch[(c * to_h + y) * to_w + x] * 2.0 - 1.0;
            for (c, y, x) in (0..3 * to_h * to_w).map(|i| (i / (to_h * to_w), i / to_w % to_h, i % to_w)) {
                assert_eq!(got(c, y, x), wanted(c, y, x), "{h} x {w} to {to_h} x {to_w} at {c}, {y}, {x}");
            }
        }
    }

    #[test]
    fn letterboxes_are_openpis() {
        let spot = |h, w, pad| {
            let Letterbox { height, width, top, left } = Letterbox::new(h, w, 224, pad).unwrap();
            [height, width, top, left]
        };
        assert_eq!(spot(480, 640, Pad::Center), [168, 224, 28, 0]);
        assert_eq!(spot(640, 480, Pad::Center), [224, 168, 0, 28]);
        assert_eq!(spot(480, 640, Pad::TopLeft), [168, 224, 56, 0]);
        assert_eq!(spot(224, 224, Pad::TopLeft), [224, 224, 0, 0]);
        // The odd row goes to the bottom.
        assert_eq!(spot(479, 640, Pad::Center), [167, 224, 28, 0]);
        assert!(Letterbox::new(1, 16384, 224, Pad::Center).is_none());
    }

    fn apply(image: &Image, filter: Filter, pad: Pad, size: usize) -> Vec<f32> {
        Resize { filter, pad }.apply("x", image, LayoutRule::Guess, size).unwrap()
    }

    #[test]
    fn bars_have_the_value_of_their_world() {
        let white = Image::rgb8(vec![255; 3 * 4 * 8], 4, 8);
        for (pad, bar, rows) in
            [(Pad::Center, -1.0, [0, 3]), (Pad::Center3, -3.0, [0, 3]), (Pad::TopLeft, -1.0, [0, 1])]
        {
            for filter in [Filter::Pillow, Filter::Torch] {
                let out = apply(&white, filter, pad, 4);
                for y in 0..4 {
                    let wanted = if rows.contains(&y) { bar } else { 1.0 };
                    assert!(out[y * 4..y * 4 + 4].iter().all(|&x| x == wanted), "{filter:?} {pad:?} row {y}");
                }
            }
        }
    }

    #[test]
    fn an_image_of_the_right_size_is_only_scaled() {
        let pixels = pattern(8, 8);
        let wanted: Vec<f32> =
            (0..3 * 64).map(|i| pixels[i % 64 * 3 + i / 64] as f32 / 255.0 * 2.0 - 1.0).collect();
        for filter in [Filter::Pillow, Filter::Torch] {
            assert_eq!(apply(&Image::rgb8(pixels.clone(), 8, 8), filter, Pad::Center, 8), wanted);
        }
    }

    #[test]
    fn layouts_and_types_agree() {
        let pixels = pattern(7, 9);
        let planar: Vec<u8> = (0..3 * 63).map(|i| pixels[i % 63 * 3 + i / 63]).collect();
        let hwc = Image::array(Pixels::U8(pixels.clone().into()), [7, 9, 3]);
        let chw = Image::array(Pixels::U8(planar.into()), [3, 7, 9]);
        let floats: Vec<f32> = pixels.iter().map(|&p| f32::from(p) / 255.0).collect();
        let float = Image::rgb32f(floats, 7, 9);
        for filter in [Filter::Pillow, Filter::Torch] {
            let wanted = apply(&hwc, filter, Pad::Center, 6);
            assert_eq!(apply(&chw, filter, Pad::Center, 6), wanted);
            if filter == Filter::Torch {
                assert_eq!(apply(&float, filter, Pad::Center, 6), wanted);
            }
        }
        // openpi truncates floats.
        let view = Image::rgb32f(vec![0.999; 3], 1, 1);
        assert_eq!(*view.view("x", LayoutRule::Guess).unwrap().to_rgb8(), [254; 3]);
    }
}
