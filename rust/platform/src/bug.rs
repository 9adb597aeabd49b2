//! The bugs of the museum: defects that the simulated platform can switch on, one at a time.
//!
//! **Guarantee.** On [`crate::Real`] no bug exists: [`crate::Platform::bug`] is an inlined `false` there, and what stands behind it is compiled out.
//!
//! **Mechanism.** The engine asks `P::bug(Bug::B01)` at the place where history went wrong and then does the one thing that was wrong. `B` numbers are those of the
//! museum's catalogue (defects that Linux had, or a patch on its list); a letter tells variants of one number apart. `C` numbers are canaries: defects that nobody
//! is known to have made, each there to show that an oracle is awake. A number without a variant is one that this engine cannot have (`museum::ABSENT` in the
//! laboratory says why).

macro_rules! bugs {
    ($($(#[$doc:meta])* $name:ident = $id:literal),+ $(,)?) => {
        /// One defect that can be switched on. What history knows of it stands in the museum's catalogue.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum Bug { $($(#[$doc])* $name),+ }

        impl Bug {
            /// Every defect, in the order of the discriminants.
            pub const ALL: &'static [Bug] = &[$(Bug::$name),+];

            /// Its name on the command line: `4a`, `21`, `C01`.
            pub const fn id(self) -> &'static str {
                match self { $(Bug::$name => $id),+ }
            }
        }
    };
}

bugs! {
    /// Flush debt of an earlier root is not paid at a yield in the next.
    B01 = "1",
    /// NX recovery does not flush.
    B02 = "2",
    /// NX recovery overwrites its debt with the last answer.
    B03 = "3",
    /// The iterator yields only after a change.
    B04a = "4a",
    /// The iterator may yield twice at one place.
    B04b = "4b",
    /// The loop steps on from where the restarted iterator stands.
    B05 = "5",
    /// The list of roots is walked outside of the RCU section.
    B06 = "6",
    /// At a yield the RCU section ends before the flush.
    B07 = "7",
    /// The flush of a removed table begins at its last entry.
    B08 = "8",
    /// The books of a table are written after it was linked.
    B09 = "9",
    /// A walk that yields visits roots without a reference.
    B10 = "10",
    /// A fault maps under a root that was invalidated.
    B11 = "11",
    /// A notifier's unmap leaves invalid roots out.
    B13 = "13",
    /// A volatile leaf is written by a plain store.
    B14 = "14",
    /// Clear-dirty does not look at the present bit again after a lost race.
    B15 = "15",
    /// Clear-dirty does not look whether it is still a leaf after a lost race.
    B16 = "16",
    /// Write-protecting a gfn stops at an entry that lacks W already.
    B17 = "17",
    /// Dirty logging of an L2's entries by their Dirty bit.
    B18 = "18",
    /// The last put of a root zaps it whole, without a yield.
    B19 = "19",
    /// A root is torn down in one pass, whole subtrees at a time.
    B20 = "20",
    /// A fast zap puts a gift that it was not given.
    B21 = "21",
    /// A fast zap does not wait for the workers.
    B22a = "22a",
    /// A fast zap waits for its own items only.
    B22b = "22b",
    /// A fast zap takes the mark and skips the zap.
    B22c = "22c",
    /// One work item is queued twice.
    B23 = "23",
    /// A zap of a range removes leaves where tables had to go.
    B24 = "24",
    /// A TDP fault reclaims shadow pages under the shared lock.
    B25 = "25",
    /// A table becomes an NX candidate after its teardown.
    B26 = "26",
    /// A leaf is mapped over a frozen entry.
    B27 = "27",
    /// A leaf is mapped at a level that was not reached.
    B28 = "28",
    /// The notifier's sequence is kept in a signed 32-bit snapshot.
    B29 = "29",
    /// Roots die whenever no vCPU uses them.
    B30 = "30",
    /// Lockless aging takes Accessed from a frozen entry.
    B31 = "31",
    /// The stale check runs before the quota reclaim.
    B33 = "33",
    /// NX recovery asks for the memslot in address space 0.
    B34 = "34",
    /// Zapped shadow pages count for a batch only when the list became unstable.
    B35 = "35",
    /// A zapped root goes back on the active list.
    B36 = "36",
    /// The zap of a slot leaves shadow pages whose accounting lies in it.
    B37 = "37",
    /// A fast zap checks once per GiB whether to yield.
    B39 = "39",
    /// A root is loaded under the exclusive lock.
    B40 = "40",
    /// Huge-page limits are asked for outside of the slot.
    B41 = "41",
    /// Any small table forbids a huge page.
    B42 = "42",
    /// Guest entry without the barrier between mode and requests.
    B44a = "44a",
    /// A lockless walk of shadow pages opens without its barrier.
    B44b = "44b",
    /// The freer of shadow pages asks for the walkers without its barrier.
    B44c = "44c",
    /// A remote flush kicks before it requests.
    C01 = "C01",
    /// A vCPU takes the request and leaves its TLB as it is.
    C02 = "C02",
    /// A notifier ends without the flush that it owes.
    C03 = "C03",
    /// A table goes back to the pool without a grace period.
    C04 = "C04",
    /// A lockless walk without an RCU section.
    C05 = "C05",
    /// A table is given back at once, and to RCU as well.
    C06 = "C06",
    /// The notifier's sequence is not compared after mmu_lock was taken.
    C07 = "C07",
    /// A fault descends without an RCU section.
    C08 = "C08",
    /// A new root is used without a flush of its tag.
    C09 = "C09",
    /// The queue's shutdown leaves an item behind.
    C10 = "C10",
    /// The last iterator reference is put before the zap.
    C11 = "C11",
    /// A leaf is counted after a lost race too.
    C12 = "C12",
    /// A lock is taken in the wrong order.
    C13 = "C13",
    /// A remote flush does not wait for vCPUs in the guest.
    C14 = "C14",
}

impl Bug {
    /// The number in the catalogue; `None` for a canary.
    pub fn number(self) -> Option<u32> {
        self.id().trim_end_matches(|c: char| c.is_ascii_lowercase()).parse().ok()
    }

    /// A defect that nobody is known to have made.
    pub fn is_canary(self) -> bool {
        self.number().is_none()
    }

    /// The defect of that name, in whatever case.
    pub fn parse(id: &str) -> Option<Self> {
        Self::ALL.iter().copied().find(|bug| bug.id().eq_ignore_ascii_case(id))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn each_name_is_unique_and_leads_back_to_its_bug() {
        for (at, &bug) in Bug::ALL.iter().enumerate() {
            assert_eq!(bug as usize, at);
            assert_eq!(Bug::parse(bug.id()), Some(bug));
            assert_eq!(format!("{bug:?}").starts_with('C'), bug.is_canary());
        }
        assert_eq!(Bug::parse("45"), None);
    }

    #[test]
    fn variants_share_the_number_of_the_catalogue() {
        assert_eq!((Bug::B04a.number(), Bug::B04b.number(), Bug::B21.number()), (Some(4), Some(4), Some(21)));
        assert_eq!(Bug::C01.number(), None);
    }
}
