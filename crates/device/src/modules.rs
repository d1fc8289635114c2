//! Which module of the model is running.

use std::collections::HashSet;
use std::fmt::{self, Write};
use std::sync::Arc;

/// The path of the module entered, and the way back. A path is kept once seen, so that entering it again, as every
/// inference does, allocates nothing.
#[derive(Default)]
pub(crate) struct Modules {
    path: String,
    /// `path`, as records share it.
    shared: Arc<str>,
    /// The modules around this one: the lengths of their paths, and these as records share them.
    outer: Vec<(usize, Arc<str>)>,
    known: HashSet<Arc<str>>,
}

impl Modules {
    /// Path of the module entered, such as `prefix.layer3`; empty outside of all.
    pub(crate) fn path(&self) -> Arc<str> {
        self.shared.clone()
    }

    pub(crate) fn enter(&mut self, module: fmt::Arguments<'_>) {
        let length = self.path.len();
        let dot = if length == 0 { "" } else { "." };
        write!(self.path, "{dot}{module}").expect("a string takes all");
        let inner = match self.known.get(self.path.as_str()) {
            Some(known) => known.clone(),
            None => {
                let new: Arc<str> = self.path.as_str().into();
                self.known.insert(new.clone());
                new
            }
        };
        self.outer.push((length, std::mem::replace(&mut self.shared, inner)));
    }

    pub(crate) fn exit(&mut self) {
        let (length, outer) = self.outer.pop().unwrap_or_default();
        self.path.truncate(length);
        self.shared = outer;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_shared_between_visits() {
        let mut m = Modules::default();
        let mut visit = |layer: usize| {
            m.enter(format_args!("prefix"));
            m.enter(format_args!("layer{layer}"));
            let inner = m.path();
            m.exit();
            let outer = m.path();
            m.exit();
            assert_eq!((&*outer, &*m.path()), ("prefix", ""));
            inner
        };
        let (first, other, again) = (visit(1), visit(12), visit(1));
        assert_eq!((&*first, &*other), ("prefix.layer1", "prefix.layer12"));
        assert!(Arc::ptr_eq(&first, &again));
    }

    #[test]
    fn leaving_more_than_was_entered_stays_outside() {
        let mut m = Modules::default();
        m.exit();
        m.enter(format_args!("a"));
        assert_eq!(&*m.path(), "a");
    }
}
