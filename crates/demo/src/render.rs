//! A small software renderer: pinhole cameras that look straight down, things as stacks of flat slices.

use crate::scene::{Scene, Shape, TABLE};
use crate::{Gripper, World};

/// An RGB image, row by row from the far edge of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Frame {
    /// Pixels in a row.
    pub width: usize,
    /// Rows.
    pub height: usize,
    /// `[height, width, 3]`.
    pub rgb: Vec<u8>,
}

impl Frame {
    /// Of one colour.
    pub fn filled(width: usize, height: usize, color: [u8; 3]) -> Self {
        Self { width, height, rgb: color.repeat(width * height) }
    }

    /// Colour at a column and row inside.
    pub fn pixel(&self, x: usize, y: usize) -> [u8; 3] {
        let at = (y * self.width + x) * 3;
        [self.rgb[at], self.rgb[at + 1], self.rgb[at + 2]]
    }

    /// Paints a rectangle, cut off at the edges.
    pub fn fill(&mut self, left: usize, top: usize, width: usize, height: usize, color: [u8; 3]) {
        for y in top..(top + height).min(self.height) {
            for x in left..(left + width).min(self.width) {
                let at = (y * self.width + x) * 3;
                self.rgb[at..at + 3].copy_from_slice(&color);
            }
        }
    }

    /// Copies another picture in, its upper left corner at `(left, top)`, cut off at the edges.
    pub fn paste(&mut self, other: &Frame, left: usize, top: usize) {
        for y in 0..other.height {
            for x in 0..other.width {
                self.fill(left + x, top + y, 1, 1, other.pixel(x, y));
            }
        }
    }
}

/// A camera that looks down.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Camera {
    /// Where it is: x, y, z in metres.
    pub at: [f32; 3],
    /// Tangent of half its field of view.
    pub tan: f32,
}

impl Camera {
    /// Fixed above the table.
    pub fn top() -> Self {
        Self { at: [0.0, 0.0, 0.8], tan: (TABLE + 0.008) / 0.8 }
    }

    /// Between the gripper's fingers, a hand's breadth above their tips.
    pub fn wrist(gripper: &Gripper) -> Self {
        Self { at: [gripper.x, gripper.y, gripper.z + 0.10], tan: 0.5 }
    }

    /// Where a point is seen, in pixels of an image of this size; and how many pixels a metre takes there.
    pub fn project(&self, point: [f32; 3], size: usize) -> ([f32; 2], f32) {
        let half = size as f32 / 2.0;
        let scale = half / (self.tan * (self.at[2] - point[2]));
        ([half + (point[0] - self.at[0]) * scale, half - (point[1] - self.at[1]) * scale], scale)
    }
}

/// What the camera above the table sees.
pub fn top(world: &World, size: usize) -> Frame {
    view(world, &Camera::top(), size)
}

/// What the camera at the gripper sees.
pub fn wrist(world: &World, size: usize) -> Frame {
    view(world, &Camera::wrist(&world.gripper), size)
}

/// What any camera sees.
pub fn view(world: &World, camera: &Camera, size: usize) -> Frame {
    let mut canvas = Canvas { camera: *camera, size, pixels: vec![[0.0; 3]; size * size] };
    canvas.table();
    canvas.bowl(world.scene.bowl);
    let held = |index: usize| world.held.is_some_and(|(object, _)| object == index);
    let (low, carried): (Vec<_>, Vec<_>) = (0..world.objects.len()).partition(|&index| !held(index));
    for index in low {
        canvas.object(world, index);
    }
    canvas.shadow(&world.gripper);
    for index in carried {
        canvas.object(world, index);
    }
    canvas.gripper(&world.gripper);
    canvas.finish()
}

type Rgb = [f32; 3];

const WOOD: Rgb = [0.80, 0.73, 0.62];
const FLOOR: Rgb = [0.33, 0.34, 0.37];
const BOWL: Rgb = [0.95, 0.95, 0.96];
const STEEL: Rgb = [0.20, 0.21, 0.24];

struct Canvas {
    camera: Camera,
    size: usize,
    pixels: Vec<Rgb>,
}

impl Canvas {
    fn finish(self) -> Frame {
        let byte = |value: f32| (value.clamp(0.0, 1.0) * 255.0 + 0.5) as u8;
        Frame {
            width: self.size,
            height: self.size,
            rgb: self.pixels.iter().flatten().map(|&value| byte(value)).collect(),
        }
    }

    /// Paints a flat figure at height `z`, smoothed over a pixel at its edge. `signed` is the distance in metres to
    /// the figure's edge, negative inside; nothing lies farther than `reach` from `at`.
    fn paint(
        &mut self,
        at: [f32; 2],
        z: f32,
        reach: f32,
        color: Rgb,
        alpha: f32,
        signed: impl Fn(f32, f32) -> f32,
    ) {
        let ([u, v], scale) = self.camera.project([at[0], at[1], z], self.size);
        let radius = reach * scale + 1.0;
        let clip = |value: f32| value.clamp(0.0, self.size as f32) as usize;
        for row in clip(v - radius)..clip(v + radius + 1.0) {
            for col in clip(u - radius)..clip(u + radius + 1.0) {
                let (dx, dy) = ((col as f32 + 0.5 - u) / scale, (v - row as f32 - 0.5) / scale);
                let cover = (0.5 - signed(dx, dy) * scale).clamp(0.0, 1.0) * alpha;
                let pixel = &mut self.pixels[row * self.size + col];
                for (old, new) in pixel.iter_mut().zip(color) {
                    *old += (new - *old) * cover;
                }
            }
        }
    }

    fn table(&mut self) {
        self.pixels.fill(FLOOR);
        self.paint([0.0; 2], 0.0, TABLE, WOOD, 1.0, |x, y| square(x, y, TABLE));
        // Lines every five centimetres, faint, as on a cutting mat.
        for i in -2..=2 {
            let c = 0.05 * i as f32;
            let line = shade(WOOD, 0.93);
            self.paint([0.0; 2], 0.0, TABLE, line, 1.0, |x, y| boxed(x - c, y, 0.0012, TABLE));
            self.paint([0.0; 2], 0.0, TABLE, line, 1.0, |x, y| boxed(x, y - c, TABLE, 0.0012));
        }
    }

    fn bowl(&mut self, at: [f32; 2]) {
        let r = Scene::BOWL;
        for (z, radius, light) in [(0.0, r - 0.006, 0.55), (0.01, r - 0.003, 0.72), (0.02, r, 1.0)] {
            self.paint(at, z, r, shade(BOWL, light), 1.0, |x, y| circle(x, y, radius));
        }
        self.paint(at, 0.012, r, shade(BOWL, 0.80), 1.0, |x, y| circle(x, y, r - 0.006));
        self.paint(at, 0.004, r, shade(BOWL, 0.70), 1.0, |x, y| circle(x, y, r - 0.016));
    }

    fn object(&mut self, world: &World, index: usize) {
        let (kind, at) = (world.scene.objects[index].kind, world.objects[index]);
        let (base, color, reach) = (world.height(index), kind.color.rgb(), Scene::OBJECT * 1.5);
        let figure = |x: f32, y: f32| match kind.shape {
            Shape::Block => square(x, y, Scene::OBJECT * 0.92),
            Shape::Disc => circle(x, y, Scene::OBJECT),
            Shape::Cross => {
                let (long, short) = (Scene::OBJECT, Scene::OBJECT * 0.34);
                boxed(x, y, long, short).min(boxed(x, y, short, long))
            }
            Shape::Wedge => triangle(x, y, Scene::OBJECT),
        };
        for slice in 0..4 {
            let z = base + World::OBJECT_HEIGHT * slice as f32 / 4.0;
            self.paint(at, z, reach, shade(color, 0.6), 1.0, figure);
        }
        let z = base + World::OBJECT_HEIGHT;
        self.paint(at, z, reach, color, 1.0, figure);
        if kind.shape == Shape::Disc {
            let spot = color.map(|value| value + (1.0 - value) * 0.6);
            self.paint(at, z, reach, spot, 1.0, |x, y| circle(x, y, Scene::OBJECT * 0.4));
        }
    }

    fn shadow(&mut self, g: &Gripper) {
        let radius = 0.012 + 0.1 * g.z;
        self.paint([g.x + 0.25 * g.z, g.y - 0.25 * g.z], 0.0, radius, [0.0; 3], 0.25, |x, y| {
            circle(x, y, radius)
        });
    }

    fn gripper(&mut self, g: &Gripper) {
        let spread = g.opening / 2.0 + 0.004;
        for side in [-1.0f32, 1.0] {
            for slice in 0..5 {
                let z = g.z + 0.03 * slice as f32 / 4.0;
                let color = shade(STEEL, 0.8 + 0.5 * slice as f32 / 4.0);
                self.paint([g.x + side * spread, g.y], z, 0.012, color, 1.0, |x, y| {
                    boxed(x, y, 0.004, 0.009)
                });
            }
        }
        // The palm hides no more than a bar; the wrist camera looks out from under it.
        if self.camera.at[2] > g.z + 0.11 {
            self.paint([g.x, g.y], g.z + 0.04, 0.05, shade(STEEL, 1.6), 1.0, |x, y| {
                boxed(x, y, spread + 0.006, 0.005)
            });
        }
    }
}

fn shade(color: Rgb, light: f32) -> Rgb {
    color.map(|value| value * light)
}

fn circle(x: f32, y: f32, radius: f32) -> f32 {
    (x * x + y * y).sqrt() - radius
}

fn boxed(x: f32, y: f32, half_width: f32, half_height: f32) -> f32 {
    (x.abs() - half_width).max(y.abs() - half_height)
}

fn square(x: f32, y: f32, half: f32) -> f32 {
    boxed(x, y, half, half)
}

/// Isosceles, tip away from the robot.
fn triangle(x: f32, y: f32, half: f32) -> f32 {
    let side = (2.0 * x.abs() + y - half) * 0.447_213_6;
    side.max(-half - y)
}
