//! What is wrong with pictures.

use pi0_policy::{Picture, Pixels};

use crate::doctor::Findings;
use crate::profile::{Camera, Profile};
use crate::{History, Kind, Thresholds};

/// Samples along a side of the grid that a picture is judged by.
const GRID: usize = 24;

/// What a look at the grid tells.
struct Look {
    /// Mean of each channel, in 0 to 1.
    mean: [f64; 3],
    /// Standard deviation of the channel that varies most, of 255.
    deviation: f64,
    /// Largest sample as it came: of 255, or of 1 for floats.
    largest: f64,
    /// Of the samples.
    print: u64,
}

/// One step of a hash; collisions by chance are as rare as with any of 64 bits.
fn mix(hash: u64, value: u64) -> u64 {
    (hash ^ value).wrapping_mul(0x9e37_79b9_7f4a_7c15).rotate_left(29)
}

fn look(picture: &Picture<'_>) -> Look {
    match picture.pixels {
        Pixels::U8(data) => look_at(picture, |i| (f64::from(data[i]), u64::from(data[i]))),
        Pixels::F32(data) => look_at(picture, |i| (255.0 * f64::from(data[i]), u64::from(data[i].to_bits()))),
    }
}

fn look_at(picture: &Picture<'_>, sample: impl Fn(usize) -> (f64, u64)) -> Look {
    let [channel, row, column] = picture.strides;
    let steps = |side: usize| {
        let count = side.min(GRID);
        // In the middle of equal parts.
        (0..count).map(move |i| (2 * i + 1) * side / (2 * count))
    };
    let (mut sum, mut squares, mut largest, mut count) = ([0.0f64; 3], [0.0f64; 3], 0.0f64, 0.0);
    let mut print = mix(picture.height as u64, picture.width as u64);
    for y in steps(picture.height) {
        for x in steps(picture.width) {
            let at = y * row + x * column;
            let mut bits = 0;
            for c in 0..3 {
                let (value, raw) = sample(at + c * channel);
                sum[c] += value;
                squares[c] += value * value;
                largest = largest.max(value);
                bits = bits << 21 ^ raw;
            }
            print = mix(print, bits);
            count += 1.0;
        }
    }
    let mean = sum.map(|sum| sum / count);
    let variance = (0..3).map(|c| squares[c] / count - mean[c] * mean[c]).fold(0.0, f64::max);
    Look { mean: mean.map(|x| x / 255.0), deviation: variance.max(0.0).sqrt(), largest, print }
}

/// Of every sample.
fn whole(picture: &Picture<'_>) -> u64 {
    let mut lanes = [picture.height as u64, picture.width as u64, 1, 2];
    let mut put =
        |words: [u64; 4]| lanes.iter_mut().zip(words).for_each(|(lane, word)| *lane = mix(*lane, word));
    match picture.pixels {
        Pixels::U8(data) => {
            let (blocks, rest) = data.as_chunks::<32>();
            for block in blocks {
                let words = block.as_chunks::<8>().0;
                put(std::array::from_fn(|i| u64::from_le_bytes(words[i])));
            }
            rest.iter().for_each(|&byte| put([u64::from(byte); 4]));
        }
        Pixels::F32(data) => {
            let (blocks, rest) = data.as_chunks::<4>();
            blocks.iter().for_each(|block| put(block.map(|x| u64::from(x.to_bits()))));
            rest.iter().for_each(|x| put([u64::from(x.to_bits()); 4]));
        }
    }
    lanes.into_iter().fold(0, mix)
}

fn equal(a: &Picture<'_>, b: &Picture<'_>) -> bool {
    let same_shape = (a.height, a.width, a.strides) == (b.height, b.width, b.strides);
    same_shape
        && match (a.pixels, b.pixels) {
            (Pixels::U8(a), Pixels::U8(b)) => a == b,
            (Pixels::F32(a), Pixels::F32(b)) => a == b,
            _ => false,
        }
}

/// What the pictures of an observation tell about time.
pub(crate) struct Change {
    /// Every picture that came before came again, byte for byte, and there is one.
    pub all_same: bool,
    /// At least one picture is new.
    pub any_new: bool,
}

/// Looks at all pictures of an observation. `trained` is the state in the units of the statistics.
pub(crate) fn observe(
    profile: &Profile,
    limits: &Thresholds,
    history: &mut History,
    pictures: &[Option<Picture<'_>>],
    trained: &[f64],
    out: &mut Findings,
) -> Change {
    history.cameras.resize_with(profile.cameras.len(), Default::default);
    let mut prints = Vec::with_capacity(pictures.len());
    let (mut same, mut new, mut gone) = (0, 0, 0);
    for ((camera, picture), past) in profile.cameras.iter().zip(pictures).zip(&mut history.cameras) {
        let Some(picture) = picture else {
            let was_there = past.images > 0;
            gone += usize::from(past.print.is_some());
            (past.print, past.whole, past.same) = (None, None, 0);
            if camera.expected || was_there {
                let why = if was_there { "was there before and is missing" } else { "is missing" };
                out.add(Kind::CameraMissing, &camera.name, format!("camera `{}` {why}", camera.name));
            }
            prints.push(None);
            continue;
        };
        let look = look(picture);
        prints.push(Some(look.print));
        one(camera, picture, &look, limits, out);
        if look.largest > limits.black {
            past.images = past.images.saturating_add(1);
            (0..3).for_each(|c| past.colour[c] += look.mean[c]);
        }
        // All bytes are read only where samples of them did not change.
        let suspicious = past.print == Some(look.print);
        let hash = suspicious.then(|| whole(picture));
        let confirmed = hash.is_some() && past.whole == hash;
        match (suspicious, confirmed) {
            (true, true) => past.same += 1,
            // The picture before was not read whole, so it stands for itself.
            (true, false) => past.same = 0,
            (false, _) => (past.same, past.since) = (0, trained.to_vec()),
        }
        if past.same == 0 && past.since.is_empty() {
            past.since = trained.to_vec();
        }
        if confirmed {
            same += 1
        } else {
            new += usize::from(!suspicious)
        }
        (past.print, past.whole) = (Some(look.print), hash);
    }
    twins(profile, pictures, &prints, out);
    colours(profile, limits, history, out);
    Change {
        all_same: same > 0 && new == 0 && gone == 0 && same == prints.iter().flatten().count(),
        any_new: new > 0,
    }
}

/// Cameras whose pictures do not change although the state does. Apart from [`observe`], for a repeated observation is
/// another finding.
pub(crate) fn frozen(
    profile: &Profile,
    limits: &Thresholds,
    history: &History,
    trained: &[f64],
    out: &mut Findings,
) {
    for (camera, past) in profile.cameras.iter().zip(&history.cameras) {
        if past.same < limits.frozen_requests {
            continue;
        }
        let moved = profile.state.iter().zip(&past.since).zip(trained);
        let motion = moved.map(|((dimension, then), now)| (now - then).abs() / dimension.scale());
        if motion.fold(0.0, f64::max) > limits.frozen_motion {
            let (name, n) = (&camera.name, past.same + 1);
            let text = format!("camera `{name}` is frozen: {n} pictures are the same while the state moves");
            out.add(Kind::ImageFrozen, name, text);
        }
    }
}

/// A picture by itself.
fn one(camera: &Camera, picture: &Picture<'_>, look: &Look, limits: &Thresholds, out: &mut Findings) {
    let name = &camera.name;
    let (height, width) = (picture.height, picture.width);
    let bars = 1.0 - height.min(width) as f64 / height.max(width) as f64;
    if bars > limits.bars {
        let percent = 100.0 * bars;
        let text = format!(
            "camera `{name}` is {width} x {height}: bars take {percent:.0} % of what the policy sees"
        );
        out.add(Kind::ImageBars, name, text);
    }
    let is_float = matches!(picture.pixels, Pixels::F32(_));
    let text = if look.largest == 0.0 {
        (Kind::ImageBlack, format!("camera `{name}` is black"))
    } else if !is_float && look.largest <= 1.0 {
        let text = format!("camera `{name}` has bytes of 0 and 1 only: were floats in 0 to 1 made bytes?");
        (Kind::ImageRange, text)
    } else if is_float && look.largest <= 1.5 {
        let text = format!("camera `{name}` has floats below 1/255 only: was it divided by 255 twice?");
        (Kind::ImageRange, text)
    } else if look.largest <= limits.black {
        (Kind::ImageBlack, format!("camera `{name}` is black: no sample is above {:.0} of 255", look.largest))
    } else if look.deviation < limits.constant {
        let [red, green, blue] = look.mean.map(|x| (255.0 * x).round());
        let text = format!("all pixels of camera `{name}` are alike: {red}, {green}, {blue}");
        (Kind::ImageConstant, text)
    } else {
        return;
    };
    out.add(text.0, name, text.1);
}

/// Cameras that show the same.
fn twins(profile: &Profile, pictures: &[Option<Picture<'_>>], prints: &[Option<u64>], out: &mut Findings) {
    for b in 1..prints.len() {
        let twin = (0..b).find(|&a| match (&pictures[a], &pictures[b]) {
            (Some(x), Some(y)) => prints[a] == prints[b] && equal(x, y),
            _ => false,
        });
        // Two black pictures are black, and that was said.
        let Some(a) = twin.filter(|_| !out.has(Kind::ImageBlack) && !out.has(Kind::ImageConstant)) else {
            continue;
        };
        let (a, b) = (&profile.cameras[a].name, &profile.cameras[b].name);
        out.add(Kind::ImageEqual, b, format!("cameras `{a}` and `{b}` show the same picture, byte for byte"));
    }
}

fn distance(a: [f64; 3], b: [f64; 3]) -> f64 {
    a.iter().zip(b).map(|(a, b)| (a - b).abs()).sum::<f64>() / 3.0
}

/// Swapped channels and swapped cameras, by the colours of the training data.
fn colours(profile: &Profile, limits: &Thresholds, history: &History, out: &mut Findings) {
    let mean = |i: usize| {
        let past = &history.cameras[i];
        let is_here = past.images >= limits.colour_images && past.print.is_some();
        is_here.then(|| past.colour.map(|sum| sum / f64::from(past.images)))
    };
    let known: Vec<_> = (0..profile.cameras.len())
        .filter_map(|i| Some((&profile.cameras[i].name, mean(i)?, profile.cameras[i].colour?)))
        .collect();
    let flip = |[red, green, blue]: [f64; 3]| [blue, green, red];
    let straight: f64 = known.iter().map(|(_, mean, wanted)| distance(*mean, *wanted)).sum();
    // The distance that is left if some cameras have red and blue swapped, all of them or one.
    let flipped = |which: Option<usize>| {
        let one = |(i, (_, mean, wanted)): (usize, &(&String, [f64; 3], [f64; 3]))| {
            distance(if which.is_none_or(|only| only == i) { flip(*mean) } else { *mean }, *wanted)
        };
        known.iter().enumerate().map(one).sum::<f64>()
    };
    // And if two cameras are swapped.
    let crossed = |a: usize, b: usize| {
        let [(_, mean_a, wanted_a), (_, mean_b, wanted_b)] = [known[a], known[b]];
        straight - distance(mean_a, wanted_a) - distance(mean_b, wanted_b)
            + distance(mean_a, wanted_b)
            + distance(mean_b, wanted_a)
    };
    let least = |explanations: Vec<(f64, Option<usize>, Option<usize>)>| {
        explanations.into_iter().min_by(|a, b| a.0.total_cmp(&b.0))
    };
    let all = [None].into_iter().chain((0..known.len()).map(Some));
    let channels = least(all.map(|which| (flipped(which), which, None)).collect());
    let pairs = (0..known.len()).flat_map(|b| (0..b).map(move |a| (a, b)));
    let cameras = least(pairs.map(|(a, b)| (crossed(a, b), Some(a), Some(b))).collect());
    let explains = |with: f64, other: Option<f64>| {
        let better = straight - with > limits.colour_difference && with < limits.colour_ratio * straight;
        // Where two explanations are possible, nothing is claimed.
        better && other.is_none_or(|other| with < 0.7 * other)
    };
    let left =
        |explanation: &Option<(f64, Option<usize>, Option<usize>)>| explanation.as_ref().map(|best| best.0);
    if let Some((with, Some(a), Some(b))) = cameras
        && explains(with, left(&channels))
    {
        let (a, b) = (known[a].0, known[b].0);
        let text = format!(
            "cameras `{a}` and `{b}` are probably swapped: each has the colours of the other's training data"
        );
        out.add(Kind::CamerasSwapped, b, text);
    } else if let Some((with, which, _)) = channels
        && explains(with, left(&cameras))
    {
        for (i, (name, mean, wanted)) in known.iter().enumerate() {
            let gain = distance(*mean, *wanted) - distance(flip(*mean), *wanted);
            if which.is_none_or(|only| only == i) && gain > 0.0 {
                let text = format!(
                    "red and blue of camera `{name}` are probably swapped: {} on average, {} in the training data",
                    percents(*mean),
                    percents(*wanted)
                );
                out.add(Kind::ColoursSwapped, name, text);
            }
        }
    }
}

fn percents(colour: [f64; 3]) -> String {
    let [red, green, blue] = colour.map(|x| 100.0 * x);
    format!("{red:.0} % red, {green:.0} % green, {blue:.0} % blue")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_sample_counts_in_the_whole() {
        let mut data: Vec<u8> = (0..3 * 35).map(|i| (i * 7 % 251) as u8).collect();
        let hash = |data: &[u8]| {
            let pixels = Pixels::U8(data.to_vec().into());
            whole(&Picture { pixels: &pixels, height: 5, width: 7, strides: [1, 21, 3] })
        };
        let first = hash(&data);
        for i in 0..data.len() {
            data[i] ^= 1;
            assert_ne!(hash(&data), first, "sample {i}");
            data[i] ^= 1;
        }
        assert_eq!(hash(&data), first);
    }

    #[test]
    fn both_layouts_look_alike() {
        let (height, width) = (50, 70);
        let value = |c: usize, y: usize, x: usize| (c * 90 + y * 3 + x * 5) as u8;
        let mut hwc = vec![0; 3 * height * width];
        let mut chw = hwc.clone();
        for (c, y, x) in
            (0..3).flat_map(|c| (0..height).flat_map(move |y| (0..width).map(move |x| (c, y, x))))
        {
            hwc[(y * width + x) * 3 + c] = value(c, y, x);
            chw[(c * height + y) * width + x] = value(c, y, x);
        }
        let (hwc, chw) = (Pixels::U8(hwc.into()), Pixels::U8(chw.into()));
        let a = look(&Picture { pixels: &hwc, height, width, strides: [1, 3 * width, 3] });
        let b = look(&Picture { pixels: &chw, height, width, strides: [height * width, width, 1] });
        assert_eq!((a.mean, a.deviation, a.print), (b.mean, b.deviation, b.print));
    }
}
