//! A task's stack: a coroutine, and the pool that stacks go back to.
//!
//! A run has one OS thread; its tasks are coroutines on it, so a switch is a few loads and stores and not a system call. Stacks are mapped once and used by run
//! after run. A coroutine never leaves the OS thread that made it.

use std::cell::RefCell;

use corosensei::{Coroutine, CoroutineResult, Yielder, stack::DefaultStack};

/// Address space of a stack; only what is touched takes memory.
const STACK_BYTES: usize = 1 << 20;
/// Stacks that an OS thread keeps.
const STACKS_KEPT: usize = 64;

thread_local! {
    static POOL: RefCell<Vec<DefaultStack>> = const { RefCell::new(Vec::new()) };
}

/// A task's way back to the scheduler. Valid while the task's coroutine lives.
#[derive(Clone, Copy, Debug)]
pub(super) struct Way(*const Yielder<(), ()>);

impl Way {
    /// Gives the OS thread to the scheduler; returns when this task is resumed.
    ///
    /// # Safety
    /// Called on the coroutine that the way belongs to.
    pub unsafe fn suspend(self) {
        // SAFETY: the yielder lives at the bottom of the coroutine's stack, on which the caller runs.
        unsafe { (*self.0).suspend(()) };
    }
}

/// A task's stack and what is on it.
pub(super) struct Stack(Coroutine<(), (), (), DefaultStack>);

impl Stack {
    /// A coroutine that will run `body`. Errors: no memory for a stack.
    pub fn new(body: impl FnOnce(Way) + 'static) -> std::io::Result<Self> {
        let pooled = POOL.with_borrow_mut(Vec::pop);
        let stack = match pooled {
            Some(stack) => stack,
            None => DefaultStack::new(STACK_BYTES)?,
        };
        Ok(Stack(Coroutine::with_stack(stack, move |yielder, ()| body(Way(yielder)))))
    }

    /// Runs the task until it suspends (false) or ends (true).
    #[inline]
    pub fn resume(&mut self) -> bool {
        matches!(self.0.resume(()), CoroutineResult::Return(()))
    }

    /// Gives the stack of an ended task back.
    pub fn recycle(self) {
        let stack = self.0.into_stack();
        POOL.with_borrow_mut(|pool| {
            if pool.len() < STACKS_KEPT {
                pool.push(stack);
            }
        });
    }

    /// Gives up a task that cannot be unwound: what its stack owns is leaked.
    pub fn leak(mut self) {
        // SAFETY: the coroutine is never resumed again. What its frames own is leaked, which is safe; nobody is handed a reference into
        // its stack that outlives a task (closures given to tasks are 'static), and the stack itself is forgotten, not unmapped.
        unsafe { self.0.force_reset() };
        std::mem::forget(self);
    }
}
