//! Which module of the model is running.

use std::fmt::{self, Write};
use std::sync::Arc;

/// The tree of the modules entered so far, and the place in it. A module is kept once seen, and every inference visits
/// them in the same order, so that entering one again is little more than a comparison with the one that is due.
pub(crate) struct Modules {
    /// The first is the root, outside of all.
    nodes: Vec<Node>,
    current: u32,
}

struct Node {
    /// As records share it, such as `prefix.layer3`; empty outside of all.
    path: Arc<str>,
    /// Where the path's last name begins.
    name: usize,
    /// The root's is itself.
    parent: u32,
    /// Its children stand in a ring, in the order of their first visits: the one visited last.
    last_child: Option<u32>,
    /// The next in the ring that this one stands in.
    next: u32,
}

impl Node {
    fn is_named(&self, module: fmt::Arguments<'_>) -> bool {
        let mut rest = Rest(&self.path[self.name..]);
        rest.write_fmt(module).is_ok() && rest.0.is_empty()
    }
}

/// What is left of a name once what is written has been taken off its front; anything else is an error.
struct Rest<'a>(&'a str);

impl Write for Rest<'_> {
    fn write_str(&mut self, front: &str) -> fmt::Result {
        self.0 = self.0.strip_prefix(front).ok_or(fmt::Error)?;
        Ok(())
    }
}

impl Default for Modules {
    fn default() -> Self {
        let root = Node { path: "".into(), name: 0, parent: 0, last_child: None, next: 0 };
        Self { nodes: vec![root], current: 0 }
    }
}

impl Modules {
    /// The module entered; 0 outside of all.
    pub(crate) fn current(&self) -> u32 {
        self.current
    }

    /// Path of a module that was once current.
    pub(crate) fn path(&self, module: u32) -> Arc<str> {
        self.node(module).path.clone()
    }

    pub(crate) fn enter(&mut self, module: fmt::Arguments<'_>) {
        let last = self.node(self.current).last_child;
        let known = last.and_then(|last| {
            let due = self.node(last).next;
            if self.node(due).is_named(module) { Some(due) } else { self.find_after(due, module) }
        });
        let inner = known.unwrap_or_else(|| self.add(last, module));
        self.node_mut(self.current).last_child = Some(inner);
        self.current = inner;
    }

    pub(crate) fn exit(&mut self) {
        self.current = self.node(self.current).parent;
    }

    fn node(&self, module: u32) -> &Node {
        &self.nodes[module as usize]
    }

    fn node_mut(&mut self, module: u32) -> &mut Node {
        &mut self.nodes[module as usize]
    }

    #[cold]
    fn find_after(&self, one: u32, module: fmt::Arguments<'_>) -> Option<u32> {
        let others = std::iter::successors(Some(self.node(one).next), |&m| Some(self.node(m).next));
        others.take_while(|&m| m != one).find(|&m| self.node(m).is_named(module))
    }

    /// A new child of the current module, in the ring after `last`.
    #[cold]
    fn add(&mut self, last: Option<u32>, module: fmt::Arguments<'_>) -> u32 {
        let new = u32::try_from(self.nodes.len()).expect("a model has fewer modules");
        let outer = &*self.node(self.current).path;
        let path = if outer.is_empty() { module.to_string() } else { format!("{outer}.{module}") };
        let name = if outer.is_empty() { 0 } else { outer.len() + 1 };
        let next = last.map_or(new, |last| std::mem::replace(&mut self.node_mut(last).next, new));
        self.nodes.push(Node { path: path.into(), name, parent: self.current, last_child: None, next });
        new
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn visit(m: &mut Modules, layer: usize) -> Arc<str> {
        m.enter(format_args!("prefix"));
        m.enter(format_args!("layer{layer}"));
        let inner = m.path(m.current());
        m.exit();
        let outer = m.path(m.current());
        m.exit();
        assert_eq!((&*outer, &*m.path(m.current())), ("prefix", ""));
        inner
    }

    #[test]
    fn paths_are_shared_between_visits_in_any_order() {
        let mut m = Modules::default();
        let first = [1, 12, 2, 0, 123].map(|layer| visit(&mut m, layer));
        assert_eq!(first.each_ref().map(|p| &p[12..]), ["1", "12", "2", "0", "123"]);
        let (kept, again) = (m.nodes.len(), [2, 12, 123, 0, 1, 1, 12].map(|layer| visit(&mut m, layer)));
        for (path, of) in again.iter().zip([2, 1, 4, 3, 0, 0, 1]) {
            assert!(Arc::ptr_eq(path, &first[of]), "{path}");
        }
        assert_eq!(m.nodes.len(), kept);
    }

    #[test]
    fn leaving_more_than_was_entered_stays_outside() {
        let mut m = Modules::default();
        m.exit();
        m.enter(format_args!("a"));
        assert_eq!(&*m.path(m.current()), "a");
    }
}
