//! Which module of the model is running.

use std::fmt::{self, Write};
use std::sync::Arc;

/// The tree of the modules entered so far, and the place in it. A module is kept once seen, and every inference visits
/// them in the same order, so that entering one again is little more than a comparison with the one that is due. What
/// that needs lies close together: it is read between operations that fill the caches with other things.
pub(crate) struct Modules {
    /// The first is the root, outside of all.
    nodes: Vec<Node>,
    /// All nodes' own names, such as `layer3`, in a row.
    names: String,
    /// Of each node, as records share it, such as `prefix.layer3`; empty outside of all.
    paths: Vec<Arc<str>>,
    current: u32,
}

struct Node {
    /// The root's is itself.
    parent: u32,
    /// The child entered last; 0 before there is one.
    last_child: u32,
    /// The one after this in the ring of its parent's children, which stand in the order of their first visits.
    next: u32,
    /// Where in the names its own begins and ends.
    name: [u32; 2],
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
        let root = Node { parent: 0, last_child: 0, next: 0, name: [0, 0] };
        Self { nodes: vec![root], names: String::new(), paths: vec!["".into()], current: 0 }
    }
}

impl Modules {
    /// The module entered; 0 outside of all.
    pub(crate) fn current(&self) -> u32 {
        self.current
    }

    /// Path of a module that was once current.
    pub(crate) fn path(&self, module: u32) -> Arc<str> {
        self.paths[module as usize].clone()
    }

    pub(crate) fn enter(&mut self, module: fmt::Arguments<'_>) {
        let last = self.node(self.current).last_child;
        let due = self.node(last).next;
        let inner = match last {
            0 => self.add(last, module),
            _ if self.is_named(due, module) => due,
            _ => self.find_after(due, module).unwrap_or_else(|| self.add(last, module)),
        };
        self.node_mut(self.current).last_child = inner;
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

    fn is_named(&self, one: u32, module: fmt::Arguments<'_>) -> bool {
        let [begin, end] = self.node(one).name;
        let mut rest = Rest(&self.names[begin as usize..end as usize]);
        rest.write_fmt(module).is_ok() && rest.0.is_empty()
    }

    #[cold]
    fn find_after(&self, one: u32, module: fmt::Arguments<'_>) -> Option<u32> {
        let others = std::iter::successors(Some(self.node(one).next), |&m| Some(self.node(m).next));
        others.take_while(|&m| m != one).find(|&m| self.is_named(m, module))
    }

    /// A new child of the current module, in the ring after `last`, if it is not the first.
    #[cold]
    fn add(&mut self, last: u32, module: fmt::Arguments<'_>) -> u32 {
        let index = |length: usize| u32::try_from(length).expect("a model has fewer modules");
        let (new, begin) = (index(self.nodes.len()), self.names.len());
        write!(self.names, "{module}").expect("a string takes all");
        let (outer, name) = (&*self.paths[self.current as usize], &self.names[begin..]);
        let path = if outer.is_empty() { name.into() } else { format!("{outer}.{name}").into() };
        let name = [index(begin), index(self.names.len())];
        let next = if last == 0 { new } else { std::mem::replace(&mut self.node_mut(last).next, new) };
        self.nodes.push(Node { parent: self.current, last_child: 0, next, name });
        self.paths.push(path);
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
