//! Records while they are made: small, and in memory that stays, so that recording takes little beside an operation.
//! All that follows from what is kept is computed when they are read.

use std::fmt;
use std::time::{Duration, Instant};

use super::modules::Modules;
use crate::parts::Form;
use crate::record::{Place, Record};

pub(super) struct Tape {
    began: Instant,
    modules: Modules,
    entries: Vec<Entry>,
    /// Of the operands of all entries, in order.
    shapes: Vec<[usize; 2]>,
    /// What few entries have: the entry, and what it has.
    extras: Vec<(usize, Extra)>,
}

struct Entry {
    form: Form,
    outcome: Outcome,
    module: u32,
    /// Where its operands end among the shapes.
    operands_end: usize,
}

/// How a call went.
pub(super) struct Outcome {
    pub(super) start: Instant,
    pub(super) end: Instant,
    pub(super) result: [usize; 2],
    pub(super) place: Place,
}

/// What most calls do without.
#[derive(Default)]
pub(super) struct Extra {
    pub(super) transfer_time: Duration,
    pub(super) transfer_bytes: u64,
    pub(super) device_time: Option<Duration>,
}

impl Tape {
    pub(super) fn new() -> Self {
        let (entries, shapes, extras) = Default::default();
        Self { began: Instant::now(), modules: Modules::default(), entries, shapes, extras }
    }

    pub(super) fn enter(&mut self, module: fmt::Arguments<'_>) {
        self.modules.enter(module);
    }

    pub(super) fn exit(&mut self) {
        self.modules.exit();
    }

    /// Shape of an operand of the call that is recorded next.
    #[inline]
    pub(super) fn operand(&mut self, shape: [usize; 2]) {
        self.shapes.push(shape);
    }

    /// Records a call.
    pub(super) fn push(&mut self, form: Form, outcome: Outcome, extra: Option<Extra>) {
        if let Some(extra) = extra {
            self.extras.push((self.entries.len(), extra));
        }
        let (module, operands_end) = (self.modules.current(), self.shapes.len());
        self.entries.push(Entry { form, outcome, module, operands_end });
    }

    /// The records since the last call. Their memory stays.
    pub(super) fn take(&mut self) -> Vec<Record> {
        let values = |[rows, cols]: &[usize; 2]| 4 * (rows * cols) as u64;
        let mut operands_begin = 0;
        let mut extras = self.extras.drain(..).peekable();
        let entries = self.entries.drain(..).enumerate();
        let records = entries
            .map(|(i, Entry { form, outcome, module, operands_end })| {
                let Outcome { start, end, result, place } = outcome;
                let shapes = self.shapes[operands_begin..operands_end].to_vec();
                operands_begin = operands_end;
                let extra = extras.next_if(|(of, _)| *of == i).map(|(_, extra)| extra).unwrap_or_default();
                Record {
                    op: form.op(),
                    parts: form.parts(&shapes, result),
                    module: self.modules.path(module),
                    bytes: shapes.iter().chain([&result]).map(values).sum(),
                    shapes,
                    result,
                    place,
                    start: start - self.began,
                    time: end - start,
                    transfer_time: extra.transfer_time,
                    transfer_bytes: extra.transfer_bytes,
                    device_time: extra.device_time,
                }
            })
            .collect();
        self.shapes.clear();
        records
    }
}
