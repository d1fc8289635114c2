//! A few results that later calls need again: every layer of a tower turns by the same angles and sees through the
//! same masks.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// Results by what they were made from; so many are kept, and the oldest goes first.
#[derive(Debug)]
pub(crate) struct Cache<K, V> {
    made: Mutex<VecDeque<(K, Arc<V>)>>,
    kept: usize,
}

impl<K, V> Cache<K, V> {
    /// An empty one.
    pub(crate) fn new(kept: usize) -> Self {
        Self { made: Mutex::default(), kept }
    }
}

impl<K: PartialEq, V> Cache<K, V> {
    /// What was made from `key` before, or what `make` makes of it now.
    pub(crate) fn get<E>(&self, key: K, make: impl FnOnce(&K) -> Result<V, E>) -> Result<Arc<V>, E> {
        // Held while making, which never asks the same cache. The list is consistent even after a panic.
        let mut kept = self.made.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, value)) = kept.iter().find(|(k, _)| *k == key) {
            return Ok(Arc::clone(value));
        }
        let value = Arc::new(make(&key)?);
        kept.push_back((key, Arc::clone(&value)));
        if kept.len() > self.kept {
            kept.pop_front();
        }
        Ok(value)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn results_are_made_once_and_only_a_few_are_kept() {
        let cache = Cache::new(8);
        let mut made = Vec::new();
        for key in [1, 2, 1, 1, 2].into_iter().chain(3..20).chain([1, 19]) {
            let value = cache.get(key, |k| {
                made.push(*k);
                Ok::<_, ()>(k * 10)
            });
            assert_eq!(value.map(|v| *v), Ok(key * 10));
        }
        let want: Vec<i32> = (1..20).chain([1]).collect();
        assert_eq!(made, want);
        assert_eq!(cache.get(99, |_| Err::<i32, _>("failed")), Err("failed"));
        assert!(cache.get(99, |_| Ok::<_, ()>(1)).is_ok(), "a failure is not kept");
    }
}
