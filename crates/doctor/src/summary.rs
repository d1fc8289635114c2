//! Findings over a recording.

use serde::{Deserialize, Serialize};

use crate::{Finding, Kind};

/// All findings of many requests, folded by kind and subject.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Summary {
    /// Requests that were looked at.
    pub requests: u64,
    /// Requests with at least one finding.
    pub with_findings: u64,
    /// By kind and subject, in the order in which they came.
    pub lines: Vec<Line>,
}

/// One kind of finding about one thing.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Line {
    /// What kind.
    pub kind: Kind,
    /// About what.
    pub subject: String,
    /// Requests that had it.
    pub count: u64,
    /// Where it was first, in the caller's words.
    pub first: String,
    /// Where it was last.
    pub last: String,
    /// Its words at the last request.
    pub text: String,
}

impl Summary {
    /// Adds what a request had. `place` names the request.
    pub fn add(&mut self, place: &str, findings: &[Finding]) {
        self.requests += 1;
        self.with_findings += u64::from(!findings.is_empty());
        for finding in findings {
            self.enter(&Line {
                kind: finding.kind,
                subject: finding.subject.clone(),
                count: 1,
                first: place.to_owned(),
                last: place.to_owned(),
                text: finding.text.clone(),
            });
        }
    }

    /// Adds requests that came later.
    pub fn merge(&mut self, later: &Self) {
        self.requests += later.requests;
        self.with_findings += later.with_findings;
        later.lines.iter().for_each(|line| self.enter(line));
    }

    fn enter(&mut self, new: &Line) {
        // There are few kinds and few subjects of each.
        match self.lines.iter_mut().find(|line| line.kind == new.kind && line.subject == new.subject) {
            Some(line) => {
                line.count += new.count;
                line.last.clone_from(&new.last);
                line.text.clone_from(&new.text);
            }
            None => self.lines.push(new.clone()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn finding(kind: Kind, text: &str) -> Finding {
        let (subject, text) = ("x".to_owned(), text.to_owned());
        Finding { kind, subject, text, since: 1, for_seconds: 0.0, count: 1, news: true }
    }

    #[test]
    fn parts_add_up_to_the_whole() {
        let requests = [
            vec![finding(Kind::Latency, "a")],
            vec![],
            vec![finding(Kind::Latency, "b"), finding(Kind::Repeated, "c")],
        ];
        let add = |summary: &mut Summary, from: usize, to: usize| {
            (from..to).for_each(|i| summary.add(&i.to_string(), &requests[i]));
        };
        let (mut whole, mut first, mut second) = (Summary::default(), Summary::default(), Summary::default());
        add(&mut whole, 0, 3);
        add(&mut first, 0, 1);
        add(&mut second, 1, 3);
        first.merge(&second);
        assert_eq!(first, whole);
        assert_eq!((whole.requests, whole.with_findings, whole.lines.len()), (3, 2, 2));
        let line = &whole.lines[0];
        assert_eq!((line.count, &*line.first, &*line.last, &*line.text), (2, "0", "2", "b"));
    }
}
