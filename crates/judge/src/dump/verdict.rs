//! What a judgement comes to.

use std::fmt::Write as _;

use serde::{Deserialize, Serialize};

use crate::results::{CoverageResults, Line};
use crate::text;

/// The judgement of one dump.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Verdict {
    /// The checkpoint.
    pub model: String,
    /// The dump.
    pub dump: String,
    /// Who made it, if it says so.
    pub source: Option<String>,
    /// The number format that the tolerances are for.
    pub format: String,
    /// Denoising steps.
    pub steps: usize,
    /// Whether every intermediate is within its tolerance and nothing was noticed.
    pub passed: bool,
    /// Every intermediate of the dump, in the order that they are made.
    pub taps: Vec<Tap>,
    /// The first one that is out of its tolerance.
    pub first: Option<String>,
    /// Mistakes that explain the differences, in the order that they act.
    pub causes: Vec<Cause>,
    /// The first intermediate that still differs with all these mistakes made.
    pub unexplained: Option<String>,
    /// What else is worth knowing.
    pub notes: Vec<String>,
    /// What ran where, if the dump says so.
    pub coverage: Option<CoverageResults>,
}

/// One intermediate.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Tap {
    /// How it compares.
    #[serde(flatten)]
    pub line: Line,
    /// `device`, `host` or `device and host`, if the dump says where the operations of its module ran.
    pub place: Option<String>,
    /// Relative L2 against the reference with all the causes made.
    pub explained_l2: Option<f64>,
}

/// A mistake that explains a difference.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Cause {
    /// Short name, such as `suffix-positions`.
    pub name: String,
    /// What is done, and what the network wants.
    pub what: String,
    /// The intermediate at which it shows first.
    pub at: String,
    /// Relative L2 there without the mistake on the reference.
    pub before: f64,
    /// And with it.
    pub after: f64,
    /// Other mistakes that explain it as well: the dump has too few intermediates to tell them apart.
    pub or: Vec<String>,
    /// Whether the difference is within the tolerance, so that only its direction gives the mistake away.
    pub within_tolerance: bool,
}

impl Verdict {
    /// In words.
    pub fn text(&self) -> String {
        let number = |x: Option<f64>| x.map_or("-".into(), |x| format!("{x:.1e}"));
        let place = self.taps.iter().any(|t| t.place.is_some());
        let explained = !self.causes.is_empty();
        let mut header = vec!["intermediate", "pcc", "relative L2", "max abs", "tolerance", ""];
        if explained {
            header.push("L2 explained");
        }
        if place {
            header.push("ran on");
        }
        let row = |t: &Tap| {
            let l = &t.line;
            let mut cells = vec![
                l.name.clone(),
                l.pcc.map_or("-".into(), |p| format!("{p:.6}")),
                number(l.relative_l2),
                number(l.max_abs),
                number(Some(l.bound)),
                match (&l.error, l.passed) {
                    (Some(why), _) => format!("FAIL {why}"),
                    (None, true) => "ok".into(),
                    (None, false) => "FAIL".into(),
                },
            ];
            if explained {
                cells.push(number(t.explained_l2));
            }
            if place {
                cells.push(t.place.clone().unwrap_or_default());
            }
            cells
        };
        let header: Vec<String> = header.into_iter().map(String::from).collect();
        text::table(&header, self.taps.iter().map(row)) + &self.summary()
    }

    /// The end of [`text`](Self::text): how many pass, what explains the rest.
    pub fn summary(&self) -> String {
        let passed = self.taps.iter().filter(|t| t.line.passed).count();
        let mut out = format!(
            "{passed} of {} intermediates agree with the reference within the tolerance of {}\n",
            self.taps.len(),
            self.format
        );
        if let Some(first) = &self.first {
            let _ = writeln!(out, "first to differ: {first}");
        }
        for c in &self.causes {
            let how =
                if c.within_tolerance { "within the tolerance, but it leans this way" } else { "explains" };
            let _ = writeln!(
                out,
                "cause [{}]: {}\n    {how}: {} differs by {:.1e}, with the mistake made on the reference by {:.1e}",
                c.name, c.what, c.at, c.before, c.after
            );
            for other in &c.or {
                let _ = writeln!(out, "    or: {other}");
            }
        }
        if let Some(rest) = &self.unexplained {
            let _ = writeln!(
                out,
                "unexplained: {rest}; no known mistake makes this difference vanish, alone or with up to two others: more may be \
                 at work before it, or one that is not known here. Intermediates between the last one that agrees and this \
                 one take them apart"
            );
        }
        for note in &self.notes {
            let _ = writeln!(out, "note: {note}");
        }
        if let Some(c) = &self.coverage {
            let share = c.share();
            let _ = writeln!(
                out,
                "coverage: {:.1} % of {} operations ran on the device",
                100.0 * share.ops,
                share.total_ops
            );
        }
        out
    }

    /// Why it is not good, in one sentence; nothing if it is.
    pub fn failure(&self) -> Option<String> {
        if self.passed {
            return None;
        }
        let causes: Vec<&str> = self.causes.iter().map(|c| c.name.as_str()).collect();
        Some(match (&self.first, causes.is_empty()) {
            (Some(first), true) => format!("the implementation departs from the reference at {first}"),
            (Some(first), false) => format!(
                "the implementation departs from the reference at {first}; explained by {}",
                causes.join(", ")
            ),
            (None, false) => {
                format!("the implementation leans towards a known mistake: {}", causes.join(", "))
            }
            (None, true) => self.notes.join("; "),
        })
    }
}
