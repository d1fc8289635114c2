//! Operations as launches on the tape.

mod attention;
mod linear;
mod norm;
mod pointwise;
mod rope;

pub(crate) use attention::Known;
pub(crate) use rope::Angles;

/// What is called: the first word of a call's key.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Op {
    Upload,
    Empty,
    Product,
    Attention,
    Norm,
    AdaNorm,
    Each,
    Sum,
    GatedSum,
    Copy,
    Store,
    Largest,
    Embed,
    Rope,
}

/// Groups of the grids that count in one dimension and fold at this width.
const FOLD: usize = 32768;

/// A grid of `count` workgroups.
fn folded(count: usize) -> [u32; 2] {
    [count.min(FOLD) as u32, count.div_ceil(FOLD) as u32]
}

/// Threads of a workgroup of the kernels that go element by element.
const EACH: usize = 256;
