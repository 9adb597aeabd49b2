//! The stack of deferred ids: push a chain, take everything.
//!
//! A Treiber stack whose links live with the owner of the ids. Nobody pops a single id, so the classic ABA does not
//! arise: the only removal is a swap with [`NIL`].

use crate::{
    NIL,
    primitive::{AtomicU32, Ordering},
};

/// A stack of ids linked through their owner's links.
#[derive(Debug)]
pub struct Chain(AtomicU32);

impl Default for Chain {
    fn default() -> Self {
        Self::new()
    }
}

impl Chain {
    /// An empty stack.
    pub fn new() -> Self {
        Chain(AtomicU32::new(NIL))
    }

    /// Puts `head ..= tail` on the stack; `tail_link` is the tail's link. `first` is called before the chain becomes
    /// visible whenever the stack looked empty. Returns whether it was.
    pub fn splice(&self, head: u32, tail_link: &AtomicU32, mut first: impl FnMut()) -> bool {
        let mut top = self.0.load(Ordering::Relaxed);
        loop {
            if top == NIL {
                first();
            }
            // Relaxed: published by the exchange below, whose release covers the whole chain and the unlinking
            // before it. SeqCst also: the pusher looks for a sleeping RCU thread next.
            tail_link.store(top, Ordering::Relaxed);
            match self.0.compare_exchange(top, head, Ordering::SeqCst, Ordering::Relaxed) {
                Ok(_) => return top == NIL,
                Err(now) => top = now,
            }
        }
    }

    /// Takes everything; the ids are linked from the returned one on.
    pub fn take(&self) -> u32 {
        self.0.swap(NIL, Ordering::SeqCst)
    }

    /// Nothing is on the stack.
    pub fn is_empty(&self) -> bool {
        self.0.load(Ordering::SeqCst) == NIL
    }
}
