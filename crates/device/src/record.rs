//! What [`Traced`](crate::Traced) records, and the kinds that coverage counts by.

use std::fmt;
use std::sync::Arc;
use std::time::Duration;

use crate::{OpKind, Part};

/// Where an operation ran.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Place {
    /// On the device.
    Device,
    /// On the host, because the device lacks it or leaves it there by design
    /// ([`Device::on_host`](crate::Device::on_host)).
    Host,
    /// On the host, because the caller forced it there.
    Forced,
}

/// One call of a device, as it was executed.
#[derive(Debug, Clone, PartialEq)]
pub struct Record {
    /// Which operation.
    pub op: OpKind,
    /// The base operations that a fused one stands for; itself otherwise.
    pub parts: Vec<Part>,
    /// Module path, such as `prefix.layer3`.
    pub module: Arc<str>,
    /// Shapes of the operands; of a weight `[out, in]`.
    pub shapes: Vec<[usize; 2]>,
    /// Shape of the (first) result.
    pub result: [usize; 2],
    /// Where it ran.
    pub place: Place,
    /// Start, since the trace began.
    pub start: Duration,
    /// Duration of the call, transfers included. A device that enqueues shows its waiting in `download`.
    pub time: Duration,
    /// The part of `time` spent moving operands and results of a fallback; unknown, and 0, of what the device
    /// itself leaves to the host.
    pub transfer_time: Duration,
    /// Bytes moved across the bus: by a fallback, an upload or a download.
    pub transfer_bytes: u64,
    /// Bytes of the activations and weights read and written, as f32.
    pub bytes: u64,
    /// How long the device takes for the call in its stride, undisturbed by what the host did before, where the trace
    /// was asked to measure it ([`Traced::probe`](crate::Traced::probe)) and the device can. Not part of `time`.
    pub device_time: Option<Duration>,
}

/// What a device saves by fusing: a call that had to be composed because operations in it were forced to the host,
/// timed on the device both ways on the same operands.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Fusion {
    /// Which fused operation.
    pub op: OpKind,
    /// The operations in it that were forced; the device fuses again once all of them have moved.
    pub forced: Vec<OpKind>,
    /// The device's time for its base operations one by one.
    pub apart: Duration,
    /// The device's time for the fused call.
    pub fused: Duration,
}

impl Record {
    /// Floating-point operations of all parts.
    pub fn flop(&self) -> u64 {
        self.parts.iter().map(|p| p.flop).sum()
    }

    /// Whether it ran on the host.
    pub fn on_host(&self) -> bool {
        self.place != Place::Device
    }
}

/// Kinds of base operations, as coverage counts them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Kind {
    /// Matrix products.
    Linear,
    /// Attention.
    Attention,
    /// Layer and RMS norms.
    Normalization,
    /// GELU, SiLU, GeGLU.
    Activation,
    /// Token and rotary position embeddings.
    Embedding,
    /// Rows put together.
    Concatenation,
    /// Sums.
    ElementWise,
    /// Slices.
    Utilities,
}

impl Kind {
    /// Every kind.
    pub const ALL: [Kind; 8] = [
        Kind::Linear,
        Kind::Attention,
        Kind::Normalization,
        Kind::Activation,
        Kind::Embedding,
        Kind::Concatenation,
        Kind::ElementWise,
        Kind::Utilities,
    ];

    /// Name in reports and on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Kind::Linear => "linear",
            Kind::Attention => "attention",
            Kind::Normalization => "normalization",
            Kind::Activation => "activation",
            Kind::Embedding => "embedding",
            Kind::Concatenation => "concatenation",
            Kind::ElementWise => "element-wise",
            Kind::Utilities => "utilities",
        }
    }

    /// The base operations of this kind.
    pub fn ops(self) -> Vec<OpKind> {
        OpKind::BASE.into_iter().filter(|op| op.kind() == Some(self)).collect()
    }
}

impl fmt::Display for Kind {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl OpKind {
    /// The kind of a base operation; none for moves and fused operations.
    pub fn kind(self) -> Option<Kind> {
        Some(match self {
            OpKind::Linear => Kind::Linear,
            OpKind::Attention => Kind::Attention,
            OpKind::LayerNorm | OpKind::RmsNorm | OpKind::AdaRmsNorm => Kind::Normalization,
            OpKind::Gelu | OpKind::Silu | OpKind::Geglu => Kind::Activation,
            OpKind::Embed | OpKind::Rope => Kind::Embedding,
            OpKind::ConcatRows => Kind::Concatenation,
            OpKind::Add | OpKind::AddScaled | OpKind::GatedAdd => Kind::ElementWise,
            OpKind::SliceRows | OpKind::SliceCols => Kind::Utilities,
            OpKind::Upload
            | OpKind::Download
            | OpKind::Prepare
            | OpKind::Dense
            | OpKind::Qkv
            | OpKind::StoreRows => return None,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_base_operation_has_one_kind() {
        let listed: usize = Kind::ALL.iter().map(|k| k.ops().len()).sum();
        assert_eq!(listed, OpKind::BASE.len());
        assert!(Kind::ALL.iter().all(|k| !k.ops().is_empty()));
    }
}
