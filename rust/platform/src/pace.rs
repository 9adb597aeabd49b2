//! Yields as an input: a task that gives mmu_lock up where it is told to, and nowhere else.
//!
//! **Guarantee.** A task with a [`Pace`] yields at a check exactly when the pace says so and the walk has moved since its last yield; neither contention nor
//! the time slice makes it yield. Between release and retake of mmu_lock, at a yield or for an allocation, it calls [`Pace::unlocked`].
//!
//! **Mechanism.** A recording of a kernel says where its walks gave way, not why: to run its operations again, the yields come from it, and the order of
//! threads from what `unlocked` waits for. How often a walk checks is its own: at batch 1 (the kernel's) at each entry. A task without a
//! pace pays nothing: the choice is one more arm where its preemption model is looked at.

/// Where a walk asks whether to yield.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct YieldPoint {
    /// The root that is walked.
    pub root: u32,
    /// First gfn of the entry that the walk stands on. It restarts towards this gfn.
    pub gfn: u64,
    /// Level of that entry.
    pub level: u8,
}

/// Who decides where tasks yield. Called with locks held: it must not call back into the MMU, and only [`Pace::unlocked`] may block.
pub trait Pace: Send + Sync {
    /// Does `task` yield here? Asked at each reschedule check that may yield.
    fn wants_yield(&self, task: u32, at: YieldPoint) -> bool;

    /// `task` has released mmu_lock in the middle of a walk and will take it back when this returns: after a yield that was asked for, and after an
    /// allocation for which the kernel gives the lock up (the split of a huge page, which restarts its walk as a yield does).
    fn unlocked(&self, task: u32);
}
