//! Launches of kernels that were asked for and not yet run.
//!
//! Every call of an operation goes through [`State::call`](crate::device::State::call): a tape that begins like a recorded one
//! follows that one's [`Script`], and writes launches only from where they part.

use std::sync::atomic::Ordering;
use std::sync::{Arc, Weak};

use crate::device::Stage;
use crate::error::{Result, VulkanError};
use crate::kernels::Pipeline;
use crate::memory::Region;
use crate::ops::Known;
use crate::script::{Key, Mark, Script};
use crate::tensor::{Place, Tensor, Value};

/// Most bindings of a kernel.
pub(crate) const BINDINGS: usize = 15;
/// Values kept to be used again.
const SPARE: usize = 1 << 14;
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

/// A script that the calls so far were equal to.
struct Following {
    script: Arc<Script>,
    calls: usize,
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
    /// Nothing while a script is followed; as are `outer`, `words` and `marks`.
    pub(crate) launches: Vec<Launch>,
    pub(crate) values: Vec<Arc<Value>>,
    pub(crate) outer: Vec<Arc<Region>>,
    pub(crate) uploads: Vec<Upload>,
    pub(crate) data: Vec<u8>,
    words: Vec<u32>,
    marks: Vec<Mark>,
    following: Option<Following>,
    /// Whether a call failed half way, so that no script says what is here.
    torn: bool,
    /// The part of an inference that launches belong to from here on; no part of a key.
    pub(crate) stage: Stage,
    /// Values of earlier tapes that nothing holds any more, to be used again.
    spare: Vec<Arc<Value>>,
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
        self.forget_shared();
        self.changed.clear();
        for (i, value) in self.values.drain(..).enumerate() {
            if Arc::strong_count(&value) == 1 {
                if self.spare.len() < SPARE {
                    self.spare.push(value);
                }
            } else if let Some(place) = place(i as u32) {
                value.set(place);
            }
        }
        self.number += 1;
        self.launches.clear();
        self.outer.clear();
        self.uploads.clear();
        self.data.clear();
        self.words.clear();
        self.marks.clear();
        self.following = None;
        self.torn = false;
    }

    /// What the tape itself shares between calls no longer counts as held.
    fn forget_shared(&mut self) {
        self.small.clear();
        self.spans.clear();
    }

    /// Whether nothing was asked for yet.
    pub(crate) fn is_blank(&self) -> bool {
        self.following.is_none() && self.marks.is_empty() && !self.torn
    }

    /// Whether some call failed half way: such a tape runs once and is not known again.
    pub(crate) fn is_torn(&self) -> bool {
        self.torn
    }

    /// How far the calls are.
    pub(crate) fn mark(&self) -> Mark {
        let marks = match &self.following {
            Some(f) => &f.script.marks[..f.calls],
            None => &self.marks[..],
        };
        marks.last().copied().unwrap_or_default()
    }

    /// Where `key` goes on with what is followed, or what is not begun begins with one of `scripts`: the values that the call
    /// makes, from which index on.
    pub(crate) fn follow<'a>(
        &mut self,
        key: &Key,
        scripts: impl Iterator<Item = &'a Arc<Script>>,
    ) -> Option<usize> {
        let calls = match &self.following {
            Some(f) => f.calls,
            None if self.is_blank() => 0,
            None => return None,
        };
        let at = self.mark().words;
        if !self.following.as_ref().is_some_and(|f| f.script.has(at, key)) {
            // Another one may have begun alike.
            let mut scripts = scripts;
            let alike = |s: &&Arc<Script>| {
                let begun =
                    self.following.as_ref().is_none_or(|f| s.words.get(..at) == Some(&f.script.words[..at]));
                begun && s.has(at, key)
            };
            let script = scripts.find(alike)?.clone();
            self.following = Some(Following { script, calls });
        }
        let first = self.values.len();
        let mut f = self.following.take()?;
        let end = f.script.marks[f.calls].values;
        f.calls += 1;
        f.script.values[first..end].iter().for_each(|&bytes| self.add(bytes));
        self.following = Some(f);
        Some(first)
    }

    /// The script, if all of it was followed.
    pub(crate) fn followed(&self) -> Option<&Arc<Script>> {
        let f = self.following.as_ref()?;
        (f.calls == f.script.marks.len()).then_some(&f.script)
    }

    /// From here on launches are written: those that were followed so far are what the script says.
    pub(crate) fn unfollow(&mut self) {
        let Some(f) = self.following.take() else { return };
        let (script, marks) = (&f.script, &f.script.marks[..f.calls]);
        let mark = marks.last().copied().unwrap_or_default();
        self.marks.extend_from_slice(marks);
        self.words.extend_from_slice(&script.words[..mark.words]);
        self.launches.extend_from_slice(&script.launches[..mark.launches]);
        for region in &script.outer[..mark.outer] {
            self.region(region);
        }
    }

    /// Notes that the call of `key` has been written.
    pub(crate) fn note(&mut self, key: &Key) {
        self.words.push(key.0.len() as u32);
        self.words.extend_from_slice(&key.0);
        self.marks.push(Mark {
            words: self.words.len(),
            values: self.values.len(),
            launches: self.launches.len(),
            outer: self.outer.len(),
        });
    }

    /// Notes that a call failed half way.
    pub(crate) fn tear(&mut self) {
        self.torn = true;
    }

    /// All that was written, to be followed later.
    pub(crate) fn script(&self) -> Arc<Script> {
        let values = self.values.iter().map(|v| v.bytes).collect();
        Script::kept(self.words.clone(), self.marks.clone(), values, self.launches.clone(), &self.outer)
    }

    /// A value that a launch will write.
    pub(crate) fn value(&mut self, bytes: u64) -> Arc<Value> {
        self.add(bytes);
        self.values[self.values.len() - 1].clone()
    }

    fn add(&mut self, bytes: u64) {
        let place = Place::Pending(self.number, self.values.len() as u32);
        let value = match self.spare.pop() {
            Some(mut spare) => match Arc::get_mut(&mut spare) {
                Some(value) => {
                    value.renew(bytes, place);
                    spare
                }
                None => Value::new(bytes, place),
            },
            None => Value::new(bytes, place),
        };
        self.values.push(value);
    }

    /// Brings these bytes to a value of this tape before its first launch.
    pub(crate) fn bring(&mut self, value: u32, bytes: &[u8]) {
        let start = self.data.len().next_multiple_of(16);
        self.data.resize(start, 0);
        self.data.extend_from_slice(bytes);
        self.uploads.push(Upload { value, start, len: bytes.len() });
    }

    /// The value that was brought with these integers, if there is one.
    pub(crate) fn same_integers(&self, data: &[u32]) -> Option<Arc<Value>> {
        let bytes: &[u8] = bytemuck::cast_slice(data);
        let same = |(upload, _): &&(u32, Arc<Value>)| {
            let u = &self.uploads[*upload as usize];
            u.len == bytes.len() && self.data[u.start..u.start + u.len] == *bytes
        };
        self.small.iter().rev().find(same).map(|(_, value)| value.clone())
    }

    /// Remembers the last upload for whoever brings the same integers.
    pub(crate) fn share(&mut self, value: &Arc<Value>) {
        self.small.push((self.uploads.len() as u32 - 1, value.clone()));
    }

    /// Whether something beside one owner and the tape holds a value.
    pub(crate) fn is_shared(&self, value: &Arc<Value>) -> bool {
        Arc::strong_count(value) > 1 + usize::from(value.pending(self.number).is_some())
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

    /// The values that something beside the tape holds, when its calls are done.
    pub(crate) fn held(&mut self) -> Vec<u32> {
        self.forget_shared();
        let held = |(i, v): (usize, &Arc<Value>)| (Arc::strong_count(v) > 1).then_some(i as u32);
        self.values.iter().enumerate().filter_map(held).collect()
    }

    /// The words of an operand in a key, with its shape.
    pub(crate) fn tensor(&self, key: &mut Key, x: &Tensor) {
        self.name(key, &x.value);
        key.sizes([x.rows, x.cols, x.offset, x.stride]);
    }

    /// The words of an operand in a key.
    pub(crate) fn name(&self, key: &mut Key, value: &Value) {
        match value.pending(self.number) {
            Some(index) => key.words(&[index, u32::MAX]),
            None => match value.place() {
                Place::Ready(region) => key.region(&region),
                // No script has it; the call itself says what is wrong.
                Place::Pending(..) | Place::Lost(_) => key.words(&[u32::MAX, u32::MAX]),
            },
        }
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
