//! Roots: the list, the reference counts, the invalid bit.
//!
//! **Guarantee.** A root is on the list exactly while its count is above zero (or inside the critical section of its put or invalidation). `invalid` never goes
//! back. At most one valid root exists per role word. A root that a walker has referenced stays a root, whatever it yields.
//!
//! **Mechanism.** The list is written under `pages_lock` and read under RCU or the exclusive mmu_lock: a removed root keeps its own `next`,
//! so a reader standing on it finds the rest. Visiting takes a reference on the next root *before* it puts the previous one, and a reference is only
//! taken from a count above zero. The whole role word is compared on lookup, and again under the reference, so an invalid root is never re-used.
//! Who owns the first reference differs: the vCPU alone (5.10-6.3, `6.1-async`), or also the MMU (6.4+, 6.1.y stable), so that a root without vCPUs
//! survives until it is invalidated.

use std::sync::atomic::{AtomicU32, Ordering};

use tdpmmu_platform::{
    Bug, Event, Guard, Mode, Moment, Mutex, MutexGuard, NIL, Owner, Platform, RcuDomain, Site, Task,
};
use tdpmmu_spte::{LockMode, Ownership, Role as RootRole};
use tdpmmu_table::{PoolError, TableCache, TableFlag};

use crate::TdpMmu;
use crate::design::Held;

/// Which roots a visit wants.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Which {
    /// Behaviour walks: dirty logging, splitting, aging.
    Valid,
    /// Correctness walks (notifier unmap, zap_all): a skipped invalid root is a use-after-free (bug-history 13).
    All,
}

/// The per-VM list of roots.
pub struct RootList<P: Platform> {
    head: AtomicU32,
    pages_lock: Mutex<P, ()>,
}

impl<P: Platform> Default for RootList<P> {
    fn default() -> Self {
        Self { head: AtomicU32::new(NIL), pages_lock: Mutex::new(()) }
    }
}

impl<P: Platform> TdpMmu<P> {
    /// First root of the list, for plain iteration under the exclusive lock or RCU.
    pub fn first_root(&self) -> Option<u32> {
        P::point(Site::RootList);
        let head = self.roots.head.load(Ordering::Acquire);
        (head != NIL).then_some(head)
    }

    /// The root after `root` on the list.
    pub fn next_listed(&self, root: u32) -> Option<u32> {
        P::point(Site::RootList);
        let next = self.pool().meta(root).next.load(Ordering::Acquire);
        (next != NIL).then_some(next)
    }

    /// Listed roots, newest first; under the exclusive lock, or inside an RCU section for a snapshot that may be stale.
    pub fn listed_roots(&self) -> impl Iterator<Item = u32> + '_ {
        std::iter::successors(self.first_root(), |&root| self.next_listed(root))
    }

    /// Held to write the root list or the NX candidate list.
    pub(crate) fn pages_lock(&self) -> MutexGuard<'_, P, ()> {
        self.roots.pages_lock.lock()
    }

    /// role.invalid of a root (or of a page that was one).
    #[inline]
    pub fn is_obsolete(&self, root: u32) -> bool {
        P::point(Site::TableMeta);
        self.pool().meta(root).has(TableFlag::Invalid)
    }

    /// References of a root.
    pub fn refs(&self, root: u32) -> u32 {
        P::point(Site::RootRef);
        self.pool().meta(root).refs.load(Ordering::Acquire)
    }

    fn list_add(&self, root: u32) {
        let _turn = self.roots.pages_lock.lock();
        self.list_add_locked(root);
    }

    fn list_add_locked(&self, root: u32) {
        let head = self.roots.head.load(Ordering::Relaxed);
        let meta = self.pool().meta(root);
        meta.next.store(head, Ordering::Relaxed);
        meta.prev.store(NIL, Ordering::Relaxed);
        if head != NIL {
            self.pool().meta(head).prev.store(root, Ordering::Relaxed);
        }
        meta.set(TableFlag::Listed);
        // Release: a reader that finds the root finds its header and its 512 empty entries.
        self.roots.head.store(root, Ordering::Release);
    }

    fn list_del(&self, root: u32) {
        let _turn = self.roots.pages_lock.lock();
        let meta = self.pool().meta(root);
        let (next, prev) = (meta.next.load(Ordering::Relaxed), meta.prev.load(Ordering::Relaxed));
        if next != NIL {
            self.pool().meta(next).prev.store(prev, Ordering::Relaxed);
        }
        if prev == NIL {
            self.roots.head.store(next, Ordering::Release);
        } else {
            self.pool().meta(prev).next.store(next, Ordering::Release);
        }
        // `next` of the removed root stays: a reader may be standing on it.
        meta.clear(TableFlag::Listed);
    }

    /// Takes a reference unless the count is zero (the root is on its way out).
    pub fn get_root(&self, task: &Task<P>, root: u32, owner: Owner) -> bool {
        P::locked(Site::RootRef);
        let got = self
            .pool()
            .meta(root)
            .refs
            .fetch_update(Ordering::AcqRel, Ordering::Acquire, |refs| (refs != 0).then_some(refs + 1));
        if let (Ok(refs), Some(observer)) = (got, self.observer()) {
            observer.event(task.id(), &Event::RootGet { root, refs: refs + 1, owner });
        }
        got.is_ok()
    }

    /// Drops a reference; true when it was the last. A reference that nobody holds is refused and counted.
    fn drop_ref(&self, task: &Task<P>, root: u32, owner: Owner) -> bool {
        P::locked(Site::RootRef);
        let refs = &self.pool().meta(root).refs;
        let had =
            refs.fetch_update(Ordering::AcqRel, Ordering::Acquire, |refs| refs.checked_sub(1)).unwrap_or(0);
        if let Some(observer) = self.observer() {
            observer.event(task.id(), &Event::RootPut { root, refs: had.wrapping_sub(1), owner });
        }
        if had == 0 {
            self.violation("a root was put that nobody held");
        }
        had == 1
    }

    /// Puts a reference; the design decides what the last one does. `held` says how mmu_lock is held.
    pub fn put_root(&self, task: &Task<P>, root: u32, owner: Owner, held: Held<'_, '_, P>) {
        if matches!(held, Held::No) && self.ownership() == Ownership::Vcpu {
            // The last put of a valid root invalidates or zaps it: a count of zero, or a root off the list, must not be seen before that is done.
            let mut guard = self.lock.read(task);
            return self.put_root(task, root, owner, Held::Shared(&mut guard));
        }
        if self.drop_ref(task, root, owner) {
            self.design().last_put(self, task, root, held);
        }
    }

    /// The root is unreferenced, invalid and empty: off the list, and its page to RCU.
    pub fn retire_root(&self, task: &Task<P>, root: u32) {
        self.unlist_root(root);
        self.free_root(task, root);
    }

    /// Takes the root off the list; walkers that stand on it go on.
    pub fn unlist_root(&self, root: u32) {
        self.list_del(root);
    }

    /// Hands an unlisted root's page to RCU.
    pub fn free_root(&self, task: &Task<P>, root: u32) {
        task.mark(Moment::RootFree, root);
        if let Some(observer) = self.observer() {
            observer.event(task.id(), &Event::RootFree { root });
        }
        let link = &self.pool().meta(root).rcu_link;
        link.store(NIL, Ordering::Relaxed);
        P::point(Site::RcuDefer);
        self.rcu().defer(root, link, 1);
    }

    /// Sets role.invalid; true for the one caller that made the transition.
    pub fn invalidate_root(&self, task: &Task<P>, root: u32) -> bool {
        P::locked(Site::RootInvalidate);
        let meta = self.pool().meta(root);
        let layout = self.profile().role_layout;
        let was = meta.swap_role(RootRole(meta.role()).with_invalid(layout).0);
        let first = !RootRole(was).invalid(layout);
        if first {
            task.mark(Moment::RootInvalidate, root);
            if let Some(observer) = self.observer() {
                observer.event(task.id(), &Event::RootInvalidate { root });
            }
        }
        P::locked(Site::RootInvalidate);
        meta.set(TableFlag::Invalid);
        first
    }

    /// Re-arms the count of a root that went to zero inside this lock hold (5.18-6.3: the owner of the transition keeps it for the worker).
    pub fn rearm_root(&self, task: &Task<P>, root: u32) {
        P::point(Site::RootRef);
        self.pool().meta(root).refs.store(1, Ordering::Release);
        if let Some(observer) = self.observer() {
            observer.event(task.id(), &Event::RootGet { root, refs: 1, owner: Owner::Work });
        }
    }

    /// Runs `body` on every root of `which`, newest first, each referenced while it is visited, so that `body` may yield.
    pub fn for_each_root<'a, M: Mode>(
        &self,
        guard: &mut Guard<'a, P, M>,
        which: Which,
        mut body: impl FnMut(&mut Guard<'a, P, M>, u32),
    ) where
        for<'g> Held<'g, 'a, P>: From<&'g mut Guard<'a, P, M>>,
    {
        let task = guard.task();
        let mut at = self.next_root(task, None, which);
        while let Some(root) = at {
            if P::bug(Bug::C11) {
                self.put_root(task, root, Owner::Iterator, Held::from(&mut *guard));
                body(guard, root);
                at = self.next_root(task, Some(root), which);
                continue;
            }
            body(guard, root);
            // The next reference first: the one we hold keeps our place on the list.
            at = self.next_root(task, Some(root), which);
            self.put_root(task, root, Owner::Iterator, Held::from(&mut *guard));
        }
    }

    fn next_root(&self, task: &Task<P>, prev: Option<u32>, which: Which) -> Option<u32> {
        // 5.12-rc: the list was read outside of the section.
        let _rcu = (!P::bug(Bug::B06)).then(|| task.rcu_read());
        task.detail(|| Event::RcuRead { what: "the list of roots" });
        let mut at = match prev {
            None => self.first_root(),
            Some(root) => self.next_listed(root),
        };
        while let Some(root) = at {
            let wanted = which == Which::All || !self.is_obsolete(root);
            if wanted && self.get_root(task, root, Owner::Iterator) {
                return Some(root);
            }
            at = self.next_listed(root);
        }
        None
    }

    /// Loads a root for a vCPU: a listed valid one with the same role word, or a new one. Takes mmu_lock in the profile's mode (exclusive up to 6.8,
    /// shared since). The reference returned belongs to the vCPU.
    ///
    /// # Errors
    /// [`PoolError`] when there is no page for a new root; nothing is held then.
    pub fn load_root(
        &self,
        task: &Task<P>,
        cache: &mut TableCache,
        role: RootRole,
    ) -> Result<u32, PoolError> {
        self.top_up_at(task, cache, Site::AllocRoot)?;
        let mut stale = Vec::new();
        // 5.10-6.8.
        let mode = if P::bug(Bug::B40) { LockMode::Exclusive } else { self.profile().root_load_lock };
        match mode {
            LockMode::Exclusive => {
                let mut guard = self.lock.write(task);
                let loaded = self.find_root(task, role, &mut stale).map_or_else(
                    || {
                        let root = self.new_root(task, cache, role)?;
                        self.list_add(root);
                        Ok(root)
                    },
                    Ok,
                );
                for root in stale {
                    self.put_root(task, root, Owner::Vcpu, Held::Exclusive(&mut guard));
                }
                loaded
            }
            LockMode::Shared => {
                let mut guard = self.lock.read(task);
                let loaded = match self.find_root(task, role, &mut stale) {
                    Some(root) => Ok(root),
                    None => {
                        let _turn = self.roots.pages_lock.lock();
                        // Another vCPU may have added it between the scan and the lock.
                        self.find_root(task, role, &mut stale).map_or_else(
                            || {
                                let root = self.new_root(task, cache, role)?;
                                self.list_add_locked(root);
                                Ok(root)
                            },
                            Ok,
                        )
                    }
                };
                // After pages_lock: the last put takes it.
                for root in stale {
                    self.put_root(task, root, Owner::Vcpu, Held::Shared(&mut guard));
                }
                loaded
            }
        }
    }

    /// A listed root of `role`, referenced. Under the shared lock a root may be invalidated and re-armed by its last put (async-worker)
    /// between the comparison and the reference: the role is compared again under the reference, and what fails then goes to
    /// `stale`, for the caller to put outside of pages_lock.
    fn find_root(&self, task: &Task<P>, role: RootRole, stale: &mut Vec<u32>) -> Option<u32> {
        let _rcu = task.rcu_read();
        let mut at = self.first_root();
        while let Some(root) = at {
            let fits = || {
                P::point(Site::RootInvalidate);
                self.pool().meta(root).role() == role.0
            };
            if fits() && self.get_root(task, root, Owner::Vcpu) {
                if fits() {
                    return Some(root);
                }
                stale.push(root);
            }
            at = self.next_listed(root);
        }
        None
    }

    fn new_root(&self, task: &Task<P>, cache: &mut TableCache, role: RootRole) -> Result<u32, PoolError> {
        let root = self.pop_table(task, cache, role.0, 0, self.root_level(), None)?;
        let refs = match self.ownership() {
            Ownership::Vcpu => 1,
            Ownership::Mmu => 2,
        };
        self.pool().meta(root).refs.store(refs, Ordering::Relaxed);
        if let Some(observer) = self.observer() {
            observer.event(task.id(), &Event::RootAlloc { root, role: role.0, refs });
        }
        Ok(root)
    }

    /// A vCPU unloads `roots` (free_roots): one hold of mmu_lock in the profile's mode (exclusive up to 6.8, shared since 6.9), each put in it.
    pub fn put_roots(&self, task: &Task<P>, roots: &[u32]) {
        if roots.is_empty() {
            return;
        }
        match self.profile().root_free_lock {
            LockMode::Exclusive => {
                let mut guard = self.lock.write(task);
                for &root in roots {
                    self.put_root(task, root, Owner::Vcpu, Held::Exclusive(&mut guard));
                }
            }
            LockMode::Shared => {
                let mut guard = self.lock.read(task);
                for &root in roots {
                    self.put_root(task, root, Owner::Vcpu, Held::Shared(&mut guard));
                }
            }
        }
    }
}
