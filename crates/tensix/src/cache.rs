//! A few results that later calls need again: every layer of a tower turns by the same angles and sees through the
//! same masks.

use std::collections::VecDeque;
use std::sync::{Arc, Mutex, PoisonError};

/// Results that are kept; the oldest goes first.
const KEPT: usize = 8;

/// Results by what they were made from.
#[derive(Debug)]
pub(crate) struct Cache<K, V>(Mutex<VecDeque<(K, Arc<V>)>>);

impl<K, V> Default for Cache<K, V> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: PartialEq, V> Cache<K, V> {
    /// What was made from `key` before, or what `make` makes of it now.
    pub(crate) fn get<E>(&self, key: K, make: impl FnOnce(&K) -> Result<V, E>) -> Result<Arc<V>, E> {
        // Held while making, which never asks the same cache. The list is consistent even after a panic.
        let mut kept = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, value)) = kept.iter().find(|(k, _)| *k == key) {
            return Ok(Arc::clone(value));
        }
        let value = Arc::new(make(&key)?);
        kept.push_back((key, Arc::clone(&value)));
        if kept.len() > KEPT {
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
        let cache = Cache::default();
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
