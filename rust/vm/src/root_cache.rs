//! A vCPU's roots: the current one and three previous ones.
//!
//! **Guarantee.** Each cached root carries exactly one reference of this vCPU. An entry is used again only if its *whole* role word and the guest page that it shadows equal
//! those wanted: the invalid bit of a root lives in its own role, so what is compared here is the role asked for at load, and obsolete roots are
//! dropped by request before the guest is entered again.
//!
//! **Mechanism.** As `cached_root_find_and_keep_current` does: the search rotates the previous roots through the current place, so that the order stays
//! least recently used, and the evicted one is handed to the caller, who puts it.

use tdpmmu_spte::role::Role;

/// Previous roots kept (KVM_MMU_NUM_PREV_ROOTS).
pub const PREVIOUS: usize = 3;

/// A root and the role it was loaded for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CachedRoot {
    /// Table index of the root page.
    pub root: u32,
    /// The role wanted at load.
    pub role: Role,
    /// The guest's CR3 in pages, for a root that shadows it; 0 for one that maps guest-physical addresses.
    pub frame: u64,
}

/// Current root and previous ones, each with one reference.
#[derive(Debug, Default)]
pub struct RootCache {
    current: Option<CachedRoot>,
    previous: [Option<CachedRoot>; PREVIOUS],
}

/// What a switch of roles found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Switch {
    /// The current root fits.
    Same,
    /// A previous root fits and is current now.
    Hit,
    /// None fits: the current place is empty; this one was evicted and must be put.
    Miss(Option<u32>),
}

impl RootCache {
    /// The current root.
    #[inline(always)]
    pub fn current(&self) -> Option<CachedRoot> {
        self.current
    }

    /// Installs a root just loaded; the place must be empty.
    pub fn install(&mut self, root: CachedRoot) {
        debug_assert!(self.current.is_none(), "the current root would leak its reference");
        self.current = Some(root);
    }

    /// Looks for a root of `role` that shadows `frame` and makes it current (kvm_mmu_new_pgd).
    pub fn switch(&mut self, role: Role, frame: u64) -> Switch {
        let fits = |root: &Option<CachedRoot>| root.is_some_and(|r| r.role == role && r.frame == frame);
        if fits(&self.current) {
            return Switch::Same;
        }
        for i in 0..PREVIOUS {
            std::mem::swap(&mut self.current, &mut self.previous[i]);
            if fits(&self.current) {
                return Switch::Hit;
            }
        }
        Switch::Miss(self.current.take().map(|r| r.root))
    }

    /// Removes every root that `obsolete` names; the caller puts them.
    pub fn take_if(&mut self, mut obsolete: impl FnMut(u32) -> bool) -> RootList {
        let mut out = RootList::default();
        for slot in std::iter::once(&mut self.current).chain(&mut self.previous) {
            if let Some(root) = *slot
                && obsolete(root.root)
            {
                out.push(root.root);
                *slot = None;
            }
        }
        out
    }

    /// Removes every root; the caller puts them.
    pub fn take_all(&mut self) -> RootList {
        self.take_if(|_| true)
    }

    /// Every root cached, the current one first.
    pub fn roots(&self) -> RootList {
        let mut out = RootList::default();
        for root in std::iter::once(&self.current).chain(&self.previous).flatten() {
            out.push(root.root);
        }
        out
    }

    /// Roots cached.
    pub fn len(&self) -> usize {
        usize::from(self.current.is_some()) + self.previous.iter().flatten().count()
    }

    /// No root cached?
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }
}

/// At most four roots, without allocation.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RootList {
    roots: [u32; PREVIOUS + 1],
    len: usize,
}

impl RootList {
    /// Appends a root; a fifth is not possible by construction.
    pub fn push(&mut self, root: u32) {
        if let Some(slot) = self.roots.get_mut(self.len) {
            *slot = root;
            self.len += 1;
        }
    }

    /// The roots.
    pub fn as_slice(&self) -> &[u32] {
        &self.roots[..self.len]
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn load(cache: &mut RootCache, n: u32) {
        cache.install(CachedRoot { root: n, role: Role(n), frame: 0 });
    }

    #[test]
    fn a_previous_root_is_found_by_its_whole_role_word() {
        let mut cache = RootCache::default();
        load(&mut cache, 1);
        assert_eq!(cache.switch(Role(2), 0), Switch::Miss(None));
        load(&mut cache, 2);
        assert_eq!(cache.switch(Role(1), 0), Switch::Hit);
        assert_eq!(cache.current().map(|r| r.root), Some(1));
        assert_eq!(cache.switch(Role(1), 0), Switch::Same);
        assert_eq!(cache.switch(Role(1 | 1 << 11), 0), Switch::Miss(None), "one bit differs");
    }

    #[test]
    fn roots_of_one_role_are_told_apart_by_what_they_shadow() {
        let mut cache = RootCache::default();
        cache.install(CachedRoot { root: 1, role: Role(4), frame: 100 });
        assert_eq!(cache.switch(Role(4), 200), Switch::Miss(None));
        cache.install(CachedRoot { root: 2, role: Role(4), frame: 200 });
        assert_eq!(cache.switch(Role(4), 100), Switch::Hit);
        assert_eq!(cache.roots().as_slice(), [1, 2]);
    }

    #[test]
    fn the_least_recently_used_root_is_evicted_and_none_leaks() {
        let mut cache = RootCache::default();
        for n in 1..=4 {
            load(&mut cache, n);
            if n < 4 {
                assert_eq!(cache.switch(Role(n + 1), 0), Switch::Miss(None));
            }
        }
        assert_eq!(cache.len(), 4);
        assert_eq!(cache.switch(Role(9), 0), Switch::Miss(Some(1)));
        load(&mut cache, 9);
        assert_eq!(cache.take_if(|r| r == 3 || r == 9).as_slice().len(), 2);
        assert_eq!(cache.len(), 2);
        assert_eq!(cache.take_all().as_slice().len(), 2);
        assert!(cache.is_empty());
    }
}
