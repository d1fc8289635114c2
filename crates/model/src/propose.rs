//! What may come next in an answer, guessed from answers written before: a robot's next chunk has much in common with the
//! last. The network reads some guessed tokens in one pass and chooses behind each; a guess counts only where it is what
//! was chosen. So a guess changes how long an answer takes and never what it says.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// Answers that are remembered: the last ones of some robots.
const REMEMBERED: usize = 16;
/// Tokens before the next one that are compared at most.
const CONTEXT: usize = 8;
/// Tokens that must agree. With one, eight of ten more proposals were wrong (docs/fast.md).
const ENOUGH: usize = 2;

/// The answers that were written last, of whichever robots.
#[derive(Debug, Default)]
pub(crate) struct Recent(Mutex<VecDeque<Arc<[u32]>>>);

impl Recent {
    /// The answers, the latest first.
    pub(crate) fn answers(&self) -> Vec<Arc<[u32]>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).iter().cloned().collect()
    }

    /// Keeps an answer, each only once.
    pub(crate) fn remember(&self, answer: &[u32]) {
        let mut answers = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        answers.retain(|known| **known != *answer);
        answers.truncate(REMEMBERED - 1);
        answers.push_front(answer.into());
    }
}

/// At most `most` tokens that may follow `text`: what followed where `answers` (the latest first) or the text itself agree
/// with its end for the most tokens; of several such places the one as far into its answer, of those the latest. An
/// agreement of a single token says nothing, unless it is all that is written: every answer opens alike.
pub(crate) fn propose(text: &[u32], answers: &[Arc<[u32]>], most: usize) -> Vec<u32> {
    let sources = answers.iter().map(|answer| &**answer).chain([text]);
    let agree = |source: &[u32], at: usize| {
        let pairs = source[..at].iter().rev().zip(text.iter().rev());
        pairs.take(CONTEXT).take_while(|(a, b)| a == b).count()
    };
    let best = sources
        .flat_map(|source| (1..source.len()).map(move |at| (source, at)))
        .map(|(source, at)| (agree(source, at), at.abs_diff(text.len()), source, at))
        .filter(|&(agreed, distance, ..)| agreed >= ENOUGH || agreed == text.len() && distance == 0)
        // Of equals the first, which is the latest answer's.
        .min_by_key(|(agreed, distance, ..)| (CONTEXT - agreed, *distance));
    best.map_or(Vec::new(), |(.., source, at)| source.iter().skip(at).take(most).copied().collect())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn answers(of: &[&[u32]]) -> Vec<Arc<[u32]>> {
        of.iter().map(|&answer| answer.into()).collect()
    }

    #[test]
    fn what_followed_the_longest_agreement_is_proposed() {
        let before = answers(&[&[7, 1, 2, 3, 9, 9], &[4, 1, 2, 5, 6]]);
        assert_eq!(propose(&[4, 1, 2], &before, 2), [5, 6]);
        assert_eq!(propose(&[7, 1, 2], &before, 2), [3, 9]);
        assert_eq!(propose(&[8, 1, 2], &before, 9), [3, 9, 9], "of equals the latest");
        assert_eq!(propose(&[1, 2], &before, 0), [0; 0]);
    }

    #[test]
    fn of_equal_agreements_the_place_as_far_in_counts() {
        let before = answers(&[&[5, 5, 1, 5, 5, 2, 5, 5, 3]]);
        assert_eq!(propose(&[0, 0, 0, 5, 5], &before, 1), [2]);
        assert_eq!(propose(&[5, 5], &before, 1), [1]);
    }

    #[test]
    fn little_agreement_proposes_nothing_but_the_opening() {
        let before = answers(&[&[1, 2, 3, 4], &[9, 9, 9]]);
        assert_eq!(propose(&[1], &before, 3), [2, 3, 4]);
        assert_eq!(propose(&[9], &before, 1), [9]);
        assert_eq!(propose(&[2], &before, 3), [0; 0]);
        assert_eq!(propose(&[8, 2], &before, 3), [0; 0]);
        assert_eq!(propose(&[], &before, 3), [0; 0]);
    }

    #[test]
    fn a_text_repeats_itself() {
        assert_eq!(propose(&[8, 8, 8, 8, 8], &[], 3), [8]);
        assert_eq!(propose(&[6, 7, 8, 6, 7], &[], 3), [8, 6, 7]);
        assert_eq!(propose(&[1, 2], &[], 3), [0; 0]);
    }

    #[test]
    fn the_last_answers_are_kept_once_each() {
        let recent = Recent::default();
        for i in 0..40u32 {
            recent.remember(&[i % 20, 1]);
        }
        recent.remember(&[30, 1]);
        let first: Vec<u32> = recent.answers().iter().map(|answer| answer[0]).collect();
        assert_eq!(first[..3], [30, 19, 18]);
        assert_eq!(first.len(), REMEMBERED);
        recent.remember(&[18, 1]);
        let first: Vec<u32> = recent.answers().iter().map(|answer| answer[0]).collect();
        assert_eq!(first[..3], [18, 30, 19]);
    }
}
