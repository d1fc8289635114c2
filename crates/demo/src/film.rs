//! Pictures of an episode for people: both cameras, the instruction, the plan.

use crate::episode::Episode;
use crate::render::{self, Camera, Frame};
use crate::{Outcome, font};

/// Pixels along a side of each camera's picture.
const VIEW: usize = 240;
/// Height of the captions above and below.
const BAR: usize = 24;

const PAPER: [u8; 3] = [24, 26, 30];
const INK: [u8; 3] = [236, 236, 230];

/// Draws an episode as it is now: the top view with the rest of the plan on the left, the wrist view on the right.
pub fn draw(episode: &Episode) -> Frame {
    let mut picture = Frame::filled(2 * VIEW + 4, VIEW + 2 * BAR, PAPER);
    let mut top = render::top(&episode.world, VIEW);
    plan(&mut top, episode);
    picture.paste(&top, 0, BAR);
    picture.paste(&render::wrist(&episode.world, VIEW), VIEW + 4, BAR);
    font::write(&mut picture, 6, 5, 2, INK, &episode.instruction);
    let y = BAR + VIEW + 5;
    let (text, color) = match episode.world.outcome() {
        None => (format!("step {}", episode.world.steps), [150, 154, 160]),
        Some(Outcome::Success) => ("success".into(), [110, 220, 130]),
        Some(Outcome::WrongObject) => ("wrong object".into(), [240, 110, 100]),
        Some(Outcome::Timeout) => ("out of time".into(), [240, 190, 90]),
    };
    font::write(&mut picture, 6, y, 2, color, &text);
    font::write(&mut picture, VIEW + 10, y, 2, [150, 154, 160], "wrist camera");
    picture
}

/// Dots where the rest of the chunk would take the fingertips, the nearest in time the brightest.
fn plan(top: &mut Frame, episode: &Episode) {
    let g = &episode.world.gripper;
    let rest = episode.plan.get(episode.done..).unwrap_or_default();
    let (mut at, mut dots) = ([g.x, g.y, g.z], Vec::new());
    for action in rest {
        for (value, step) in at.iter_mut().zip(action) {
            *value += step;
        }
        dots.push(Camera::top().project(at, VIEW).0);
    }
    for (i, [x, y]) in dots.into_iter().enumerate().rev() {
        let fade = 1.0 - 0.7 * i as f32 / rest.len() as f32;
        let color = [255.0, 255.0, 255.0 * (1.0 - fade)].map(|c: f32| (c * (0.5 + 0.5 * fade)) as u8);
        if x >= 2.0 && y >= 2.0 {
            top.fill(x as usize - 2, y as usize - 2, 5, 5, [40, 40, 40]);
            top.fill(x as usize - 1, y as usize - 1, 3, 3, color);
        }
    }
}

/// Text for a terminal of 24-bit colours: two pixels a character, one above the other.
pub fn terminal(episode: &Episode) -> String {
    const SIDE: usize = 56;
    let (top, wrist) = (render::top(&episode.world, SIDE), render::wrist(&episode.world, SIDE));
    let mut text = format!("\x1b[2K{} (step {})\n", episode.instruction, episode.world.steps);
    for row in 0..SIDE / 2 {
        for (view, gap) in [(&top, " "), (&wrist, "\n")] {
            for col in 0..SIDE {
                let [[r, g, b], [r2, g2, b2]] = [2 * row, 2 * row + 1].map(|y| view.pixel(col, y));
                text += &format!("\x1b[38;2;{r};{g};{b};48;2;{r2};{g2};{b2}m▀");
            }
            text += "\x1b[0m";
            text += gap;
        }
    }
    text
}

/// Lines that [`terminal`] takes.
pub const TERMINAL_LINES: usize = 29;
