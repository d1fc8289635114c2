//! Launches of kernels that were asked for and not yet run.
//!
//! Beside the launches the tape keeps all that they depend on, other than the contents of what was uploaded, as one
//! list of words: two tapes with equal words are the same work on the same memory.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use crate::device::Stage;
use crate::error::{Result, VulkanError};
use crate::kernels::Pipeline;
use crate::memory::Region;
use crate::ops::Known;
use crate::tensor::{Place, Tensor, Value};

/// Most bindings of a kernel.
pub(crate) const BINDINGS: usize = 15;
/// Most words of push constants.
pub(crate) const PUSH: usize = 32;

/// What a kernel reads or writes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Operand {
    /// A value of this tape.
    Value(u32),
    /// A region that was there before.
    Outer(u32),
}

/// One launch.
#[derive(Debug, Clone)]
pub(crate) struct Launch {
    pub(crate) pipeline: u32,
    pub(crate) groups: [u32; 2],
    pub(crate) operands: [Operand; BINDINGS],
    pub(crate) count: usize,
    /// How many of the operands, the last ones, are written.
    pub(crate) written: usize,
    pub(crate) push: [u32; PUSH],
    pub(crate) push_count: usize,
    /// The part of an inference that asked for it.
    pub(crate) stage: Stage,
    /// Rows, and columns or inputs and outputs; for reports.
    pub(crate) shape: [u32; 3],
    /// Floating-point operations, for estimates.
    pub(crate) flop: u64,
    /// Bytes read and written if each operand moved once, for estimates.
    pub(crate) bytes: u64,
}

pub(crate) struct Pending {
    pub(crate) bytes: u64,
    pub(crate) handle: Weak<Value>,
}

/// Bytes to bring before the first launch.
pub(crate) struct Upload {
    pub(crate) value: u32,
    pub(crate) start: usize,
    pub(crate) len: usize,
}

#[derive(Default)]
pub(crate) struct Tape {
    /// Counts tapes, so that a tensor knows whether this is its own.
    pub(crate) number: u64,
    pub(crate) launches: Vec<Launch>,
    pub(crate) values: Vec<Pending>,
    pub(crate) outer: Vec<Arc<Region>>,
    pub(crate) uploads: Vec<Upload>,
    pub(crate) data: Vec<u8>,
    pub(crate) words: Vec<u32>,
    /// The part of an inference that launches belong to from here on; no part of the words.
    pub(crate) stage: Stage,
    /// Values in memory that launches of this tape change.
    changed: Vec<Weak<Value>>,
    /// Small integers that were uploaded already, such as positions: the same in every layer.
    small: Vec<(u32, Arc<Value>)>,
    /// Tables of attention, likewise.
    pub(crate) spans: Vec<Known>,
}

impl Tape {
    /// Notes that a launch changes a value, which may have been there before.
    pub(crate) fn changes(&mut self, value: &Arc<Value>) {
        self.changed.push(Arc::downgrade(value));
    }

    /// Empties a tape that failed: what it was to compute or change is lost to whatever still holds it.
    pub(crate) fn fail(&mut self, why: &str) {
        for value in self.changed.drain(..).filter_map(|v| v.upgrade()) {
            value.set(Place::Lost(why.into()));
        }
        self.clear(|_| Some(Place::Lost(why.into())));
    }

    /// Empties the tape; values that something still holds become `place`.
    pub(crate) fn clear(&mut self, place: impl Fn(u32) -> Option<Place>) {
        self.small.clear();
        self.spans.clear();
        self.changed.clear();
        for (i, v) in self.values.drain(..).enumerate() {
            if let (Some(value), Some(place)) = (v.handle.upgrade(), place(i as u32)) {
                value.set(place);
            }
        }
        self.number += 1;
        self.launches.clear();
        self.outer.clear();
        self.uploads.clear();
        self.data.clear();
        self.words.clear();
    }

    /// A value that a launch will write.
    pub(crate) fn value(&mut self, bytes: u64) -> Arc<Value> {
        let index = self.values.len() as u32;
        let value = Value::new(bytes, Place::Pending(self.number, index));
        self.values.push(Pending { bytes, handle: Arc::downgrade(&value) });
        self.words.extend([bytes as u32, (bytes >> 32) as u32]);
        value
    }

    /// A value with these bytes.
    pub(crate) fn upload(&mut self, bytes: &[u8]) -> Arc<Value> {
        let value = self.value(bytes.len() as u64);
        let start = self.data.len().next_multiple_of(16);
        self.data.resize(start, 0);
        self.data.extend_from_slice(bytes);
        let index = self.values.len() as u32 - 1;
        self.uploads.push(Upload { value: index, start, len: bytes.len() });
        self.words.extend([u32::MAX, index]);
        value
    }

    /// A value with these integers; the same one for the same integers.
    pub(crate) fn integers(&mut self, data: &[u32]) -> Arc<Value> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        for (upload, value) in self.small.iter().rev() {
            let u = &self.uploads[*upload as usize];
            if u.len == bytes.len() && self.data[u.start..u.start + u.len] == *bytes {
                return value.clone();
            }
        }
        let value = self.upload(bytes);
        self.small.push((self.uploads.len() as u32 - 1, value.clone()));
        value
    }

    pub(crate) fn region(&mut self, region: &Arc<Region>) -> Operand {
        // A region remembers the tape that named it last, and where it stands there.
        let (tape, slot) = (u64::from(self.number as u32) << 32, region.slot.load(Ordering::Relaxed));
        let at = slot as u32;
        if slot & !u64::from(u32::MAX) == tape
            && self.outer.get(at as usize).is_some_and(|r| r.id == region.id)
        {
            return Operand::Outer(at);
        }
        let at = self.outer.len() as u32;
        self.outer.push(region.clone());
        region.slot.store(tape | u64::from(at), Ordering::Relaxed);
        Operand::Outer(at)
    }

    pub(crate) fn operand(&mut self, value: &Value) -> Result<Operand> {
        if let Some(index) = value.pending(self.number) {
            return Ok(Operand::Value(index));
        }
        match value.place() {
            Place::Pending(..) => Err(VulkanError::NeverComputed("its tape is gone".into())),
            Place::Ready(region) => Ok(self.region(&region)),
            Place::Lost(why) => Err(VulkanError::NeverComputed(why)),
        }
    }

    /// The words of the last launch.
    fn spell(&mut self) {
        let Some(l) = self.launches.last() else { return };
        let operand = |o: &Operand| match *o {
            Operand::Value(i) => i,
            Operand::Outer(i) => i | 1 << 31,
        };
        self.words.push(l.pipeline << 16 | (l.count as u32) << 8 | l.push_count as u32);
        self.words.extend(l.groups);
        self.words.extend(l.operands[..l.count].iter().map(operand));
        self.words.extend(&l.push[..l.push_count]);
    }

    /// The last words: which regions were meant, which values something still holds, and what will be downloaded.
    /// Returns the values held.
    pub(crate) fn seal(&mut self, target: Option<u32>) -> Vec<u32> {
        // What the tape itself keeps does not count.
        self.small.clear();
        self.spans.clear();
        for region in &self.outer {
            self.words.extend([region.id as u32, (region.id >> 32) as u32]);
        }
        let held = |(i, v): (usize, &Pending)| (v.handle.strong_count() > 0).then_some(i as u32);
        let held: Vec<u32> = self.values.iter().enumerate().filter_map(held).collect();
        self.words.extend(&held);
        self.words.extend([held.len() as u32, target.map_or(u32::MAX, |t| t)]);
        held
    }
}

/// Collects a launch's operands and constants, where the launch will stand.
pub(crate) struct Builder<'a> {
    tape: &'a mut Tape,
    done: bool,
}

impl<'a> Builder<'a> {
    pub(crate) fn new(tape: &'a mut Tape, pipeline: Pipeline, groups: [u32; 2]) -> Self {
        tape.launches.push(Launch {
            pipeline: pipeline.0,
            groups,
            operands: [Operand::Value(0); BINDINGS],
            count: 0,
            written: 0,
            push: [0; PUSH],
            push_count: 0,
            stage: tape.stage,
            shape: [0; 3],
            flop: 0,
            bytes: 0,
        });
        Self { tape, done: false }
    }

    fn of(&mut self) -> &mut Launch {
        self.tape.launches.last_mut().expect("pushed when this was made")
    }

    fn add(&mut self, operand: Operand, bytes: u64) {
        let launch = self.of();
        // The same bound again moves no more bytes.
        if !launch.operands[..launch.count].contains(&operand) {
            launch.bytes += bytes;
        }
        launch.operands[launch.count] = operand;
        launch.count += 1;
    }

    /// Reads a tensor, of which only its own elements move.
    pub(crate) fn reads(mut self, x: &Tensor) -> Result<Self> {
        let operand = self.tape.operand(&x.value)?;
        self.add(operand, 4 * (x.rows * x.cols) as u64);
        Ok(self)
    }

    pub(crate) fn reads_value(mut self, x: &Value) -> Result<Self> {
        let operand = self.tape.operand(x)?;
        self.add(operand, x.bytes);
        Ok(self)
    }

    pub(crate) fn reads_region(self, region: &Arc<Region>) -> Self {
        self.reads_some(region, region.size)
    }

    /// Reads `bytes` of a region.
    pub(crate) fn reads_some(mut self, region: &Arc<Region>, bytes: u64) -> Self {
        let operand = self.tape.region(region);
        self.add(operand, bytes);
        self
    }

    /// A binding that this variant of the kernel does not read: whatever is bound first.
    pub(crate) fn nothing(mut self) -> Self {
        let first = self.of().operands[0];
        self.add(first, 0);
        self
    }

    pub(crate) fn writes(mut self, value: &Value) -> Result<Self> {
        let operand = self.tape.operand(value)?;
        self.add(operand, value.bytes);
        self.of().written += 1;
        Ok(self)
    }

    pub(crate) fn push(mut self, words: &[u32]) -> Self {
        let launch = self.of();
        let at = launch.push_count;
        launch.push[at..at + words.len()].copy_from_slice(words);
        launch.push_count += words.len();
        self
    }

    /// Says what is computed: rows, and columns or inputs and outputs.
    pub(crate) fn shape(mut self, shape: [usize; 3]) -> Self {
        self.of().shape = shape.map(|n| n as u32);
        self
    }

    pub(crate) fn flop(mut self, flop: u64) -> Self {
        self.of().flop = flop;
        self
    }

    /// Says how many bytes move, where that is not the sum of the operands.
    pub(crate) fn moved(mut self, bytes: u64) -> Self {
        self.of().bytes = bytes;
        self
    }

    pub(crate) fn launch(mut self) {
        self.done = true;
        self.tape.spell();
    }
}

impl Drop for Builder<'_> {
    /// A launch whose operands were not to be had is none.
    fn drop(&mut self) {
        if !self.done {
            self.tape.launches.pop();
        }
    }
}
