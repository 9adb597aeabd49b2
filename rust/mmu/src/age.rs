//! Aging: has the guest touched a page since it was last asked?
//!
//! **Guarantee.** [`TdpMmu::age`] says whether any leaf of the range was accessed, and takes that mark from each one that was; [`TdpMmu::test_age`] only looks. Nothing is unmapped, no
//! Dirty is lost, no flush is owed (a stale translation may hide an access: tolerated by the host, and paid for by the notifier where the kernel does flush). An entry that
//! is not a present leaf at the very moment of the write is left alone, frozen ones above all.
//!
//! **Mechanism.** Where hardware sets Accessed, the bit is cleared; where it does not, R and X are saved away and the next access faults (access tracking); Dirty, which is W then, goes
//! to the host first. Up to 6.14 under the exclusive lock and under all roots, by the set path (up to 6.3) or by an AND where the leaf is volatile and a store where it is not
//! (6.4 on). From 6.15 on only an RCU section is held and only valid roots are asked (`aging`, `aging-roots`, `aging-write`).
//! The frozen constants of all these kernels have the Accessed bit of both formats. So a blind AND without the lock thaws an entry that is frozen between the
//! read and the AND (bug-history 31); the profiles compare and exchange instead, and `aging-write=and` is the mistake.

use std::ops::Range;

use tdpmmu_platform::{Bug, Exclusive, Phase, Platform, Shared, Site, Task};
use tdpmmu_spte::{Aging, AgingWrite, RootSet, Spte};

use crate::TdpMmu;
use crate::change::{self, At};
use crate::iter::TdpIter;
use crate::ledger::Ledger;
use crate::root::Which;

impl<P: Platform> TdpMmu<P> {
    /// Ages `gfns` of one address space; true if any page was young. Takes mmu_lock exclusively, or only an RCU section, as the profile says.
    pub fn age(&self, task: &Task<P>, as_id: u8, gfns: Range<u64>) -> bool {
        self.age_range(task, as_id, gfns, false)
    }

    /// Is any page of `gfns` young? Changes nothing; takes what [`TdpMmu::age`] takes.
    pub fn test_age(&self, task: &Task<P>, as_id: u8, gfns: Range<u64>) -> bool {
        self.age_range(task, as_id, gfns, true)
    }

    fn age_range(&self, task: &Task<P>, as_id: u8, gfns: Range<u64>, test: bool) -> bool {
        let lock = (self.profile().aging == Aging::WriteLock).then(|| self.lock.write(task));
        let _work = task.phase(Phase::SpteWork);
        let which = match self.profile().aging_roots {
            RootSet::All => Which::All,
            RootSet::Valid => Which::Valid,
        };
        let end = gfns.end.min(self.max_gfn());
        let mut ledger = Ledger::default();
        let mut young = false;
        let rcu = task.rcu_read();
        for root in self.listed_roots() {
            if self.as_id(root) != as_id || which == Which::Valid && self.is_obsolete(root) {
                continue;
            }
            let mut iter = TdpIter::start::<P>(self.pool(), root, self.root_level(), 1, gfns.start);
            while iter.valid() && iter.gfn() < end {
                task.count(1, 0);
                let (old, level) = (iter.old(), iter.level());
                if old.is_leaf(level) && self.format().is_accessed(old) {
                    young = true;
                    if test {
                        break;
                    }
                    let at = At { as_id, root, gfn: iter.gfn(), level };
                    self.age_leaf(task, &mut ledger, at, iter.table(), iter.index(), old, lock.is_some());
                }
                iter.advance::<P>(self.pool());
            }
        }
        ledger.settle(self);
        drop(rcu);
        young
    }

    /// Takes the accessed mark from one leaf and books it.
    fn age_leaf(
        &self,
        task: &Task<P>,
        ledger: &mut Ledger,
        at: At,
        table: u32,
        index: u16,
        old: Spte,
        locked: bool,
    ) {
        let format = self.format();
        let cell = &self.pool().entries(table)[index as usize];
        let hardware = format.ad_enabled(old);
        let aged = |spte: Spte| {
            if hardware { Spte(spte.raw() & !format.accessed) } else { format.access_track(spte) }
        };
        // 6.15: a blind AND, beside a frozen value that has the bit.
        let blind = self.profile().aging_write == AgingWrite::And || P::bug(Bug::B31);
        let (was, now) = if !locked && (!hardware || !blind) {
            let Some(was) = self.age_by_exchange(cell, at.level, old, hardware, &aged) else { return };
            (was, aged(was))
        } else if hardware && self.profile().aging_write != AgingWrite::SetPath {
            let was = if !locked || format.is_volatile(old) {
                Spte(P::fetch_and(cell, !format.accessed, Site::SpteAd))
            } else {
                P::store(cell, aged(old).raw(), Site::SpteAd);
                old
            };
            (was, aged(was))
        } else {
            // From the snapshot: what hardware added meanwhile is in the old value, and goes to the host with it.
            (change::exchange::<P>(self, cell, old, aged(old), at.level), aged(old))
        };
        task.count(0, 1);
        if locked {
            change::aged::<P, Exclusive>(self, task, ledger, at, was, now);
        } else {
            change::aged::<P, Shared>(self, task, ledger, at, was, now);
        }
    }

    /// Without the lock: the old value if the exchange was made. Without hardware A/D one attempt: who was faster has most likely accessed the page.
    fn age_by_exchange(
        &self,
        cell: &std::sync::atomic::AtomicU64,
        level: u8,
        mut old: Spte,
        hardware: bool,
        aged: &dyn Fn(Spte) -> Spte,
    ) -> Option<Spte> {
        while old.is_leaf(level) && self.format().is_accessed(old) {
            match P::cmpxchg(cell, old.raw(), aged(old).raw(), Site::SpteAd) {
                Ok(_) => return Some(old),
                Err(_) if !hardware => return None,
                Err(seen) => old = Spte(seen),
            }
        }
        None
    }
}
