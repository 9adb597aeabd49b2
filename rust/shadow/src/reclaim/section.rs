//! The walker's side: a section in which what is linked stays memory of the tree.
//!
//! **Guarantee.** Between [`Walker::begin`] and the drop of the [`Section`] no page is recycled that a read in between can reach. A section neither waits nor sleeps.
//!
//! **Mechanism.** A thread registers once, as a [`Walker`]: what a kind needs of a thread (its mode word, its handle of the epoch library) is found there. Steps are numbered as in the text of [`super`].

use std::marker::PhantomData;

use crossbeam_epoch::LocalHandle;
use tdpmmu_platform::{Bug, Event, NO_TASK, Platform, RcuGuard, Site, Task};

use super::{ModeWord, NoMode, ReclaimKind, Reclamation};

/// A walk was refused.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
pub enum WalkError {
    /// The kind announces walks in a vCPU's mode word, and the task has none.
    #[error(
        "reclamation {kind}: lockless walks are for vCPUs only, as they are announced in a vCPU's mode word"
    )]
    NeedsVcpu {
        /// The kind in use.
        kind: ReclaimKind,
    },
}

/// A thread that walks. Made once, used for one section at a time.
pub struct Walker<'r, P: Platform, W: ModeWord = NoMode> {
    all: &'r Reclamation<P>,
    how: How<W>,
    /// The mode word and the epoch's handle have one thread.
    _one_thread: PhantomData<*const ()>,
}

enum How<W: ModeWord> {
    Counter,
    Ipi(W),
    Membarrier(W),
    Rcu,
    Epoch(LocalHandle),
}

/// A lockless walk in progress; ends with the drop.
pub struct Section<'a, P: Platform, W: ModeWord = NoMode> {
    task: &'a Task<P>,
    _inside: Inside<'a, P, W>,
}

enum Inside<'a, P: Platform, W: ModeWord> {
    Counted { _count: Counted<'a, P> },
    Reading { _mode: Reading<'a, P, W> },
    Rcu { _rcu: RcuGuard<'a, P> },
    Pinned { _pin: crossbeam_epoch::Guard },
}

/// One of the VM's readers. The RCU section began before it was counted and ends after.
struct Counted<'a, P: Platform> {
    all: &'a Reclamation<P>,
    _rcu: RcuGuard<'a, P>,
}

impl<P: Platform> Drop for Counted<'_, P> {
    #[inline]
    fn drop(&mut self) {
        // (4): locked, so the reads stay above it. The field, which ends the RCU section, is dropped after this.
        P::fetch_add(&self.all.readers.0, 1u64.wrapping_neg(), Site::ReadingMode);
    }
}

struct Reading<'a, P: Platform, W: ModeWord> {
    mode: &'a W,
    task: &'a Task<P>,
}

impl<P: Platform, W: ModeWord> Drop for Reading<'_, P, W> {
    #[inline]
    fn drop(&mut self) {
        self.task.detail(|| Event::ReadingEnd { vcpu: number(self.task) });
        // (4): a release.
        self.mode.end_reading::<P>();
    }
}

fn number<P: Platform>(task: &Task<P>) -> u32 {
    task.vcpu().map_or(NO_TASK, |vcpu| vcpu as u32)
}

impl<P: Platform> Reclamation<P> {
    /// Registers the calling thread as a walker; `mode` is the mode word of the vCPU that it runs.
    ///
    /// # Errors
    /// [`WalkError::NeedsVcpu`] without one, where the kind needs it.
    pub fn walker<W: ModeWord>(&self, mode: Option<W>) -> Result<Walker<'_, P, W>, WalkError> {
        let how = match (self.kind, mode) {
            (ReclaimKind::Ipi, Some(mode)) => How::Ipi(mode),
            (ReclaimKind::Membarrier, Some(mode)) => How::Membarrier(mode),
            (kind @ (ReclaimKind::Ipi | ReclaimKind::Membarrier), None) => {
                return Err(WalkError::NeedsVcpu { kind });
            }
            (ReclaimKind::Counter, _) => How::Counter,
            (ReclaimKind::Rcu, _) => How::Rcu,
            (ReclaimKind::Epoch, _) => How::Epoch(self.epochs.register()),
        };
        Ok(Walker { all: self, how, _one_thread: PhantomData })
    }
}

impl<'r, P: Platform, W: ModeWord> Walker<'r, P, W> {
    /// Begins a walk of `task`, the thread's own. The vCPU, if it is one, is outside of the guest and in no other section.
    #[inline]
    pub fn begin<'a>(&'a self, task: &'a Task<P>) -> Section<'a, P, W> {
        let inside = match &self.how {
            How::Ipi(mode) => {
                // (1)
                mode.begin_reading::<P>();
                // (2)
                if !P::bug(Bug::B44b) {
                    P::fence(Site::ReadingMode);
                }
                reading(task, mode)
            }
            How::Membarrier(mode) => {
                // (1)
                mode.begin_reading::<P>();
                // (2): the freer's heavy side makes it one.
                P::light_fence(Site::ReadingMode);
                reading(task, mode)
            }
            How::Counter => {
                let rcu = task.rcu_read();
                // (1) and (2): locked.
                P::fetch_add(&self.all.readers.0, 1, Site::ReadingMode);
                Inside::Counted { _count: Counted { all: self.all, _rcu: rcu } }
            }
            How::Rcu => Inside::Rcu { _rcu: task.rcu_read() },
            How::Epoch(handle) => Inside::Pinned { _pin: handle.pin() },
        };
        Section { task, _inside: inside }
    }

    /// What the walks are registered with.
    pub fn reclamation(&self) -> &'r Reclamation<P> {
        self.all
    }
}

#[inline]
fn reading<'a, P: Platform, W: ModeWord>(task: &'a Task<P>, mode: &'a W) -> Inside<'a, P, W> {
    task.detail(|| Event::ReadingBegin { vcpu: number(task) });
    Inside::Reading { _mode: Reading { mode, task } }
}

impl<'a, P: Platform, W: ModeWord> Section<'a, P, W> {
    /// The walking task.
    #[inline(always)]
    pub fn task(&self) -> &'a Task<P> {
        self.task
    }
}
