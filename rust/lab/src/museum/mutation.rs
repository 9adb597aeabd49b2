//! Where each bug sits in the engine, and the line that it changes.

use tdpmmu_platform::Bug;

/// One place, and what is done there.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mutation {
    /// The file, from the root of the sources.
    pub file: &'static str,
    /// What it does there.
    pub does: &'static str,
}

/// The mutation of an exhibit; `None` for a bug that the engine does not have.
pub fn mutation(bug: Bug) -> Option<Mutation> {
    let (file, does) = match bug {
        Bug::B01 => ("rust/mmu/src/zap.rs", "the debt of earlier roots is laid aside while a root is walked"),
        Bug::B02 => ("rust/mmu/src/nx.rs", "a zapped candidate owes nothing"),
        Bug::B03 => ("rust/mmu/src/nx.rs", "what is owed is assigned, not added to"),
        Bug::B04a => ("rust/mmu/src/walk.rs", "no check while the walk has changed nothing"),
        Bug::B04b => ("rust/mmu/src/walk.rs", "a walk may yield where it has yielded last"),
        Bug::B05 => ("rust/mmu/src/walk.rs", "the iterator restarts at once, and the loop then steps on"),
        Bug::B06 => ("rust/mmu/src/root.rs", "no RCU section around the step to the next root"),
        Bug::B07 => ("rust/mmu/src/walk.rs", "at a yield the RCU section ends before the flush"),
        Bug::B08 => ("rust/mmu/src/zap.rs", "the flush of a removed table begins at its last entry"),
        Bug::B09 => (
            "rust/mmu/src/nx.rs",
            "the flag of a new table is written after the link, and not looked at again",
        ),
        Bug::B10 => ("rust/mmu/src/zap.rs", "the zap of a range visits roots without references"),
        Bug::B11 => ("rust/vm/src/fault.rs", "a fault does not ask whether its root is obsolete"),
        Bug::B13 => ("rust/mmu/src/zap.rs", "an unmap visits valid roots only"),
        Bug::B14 => ("rust/mmu/src/change.rs", "volatile leaves are stored over under the exclusive lock"),
        Bug::B15 => ("rust/mmu/src/dirty.rs", "after a lost race whatever is there is taken for a leaf"),
        Bug::B16 => ("rust/mmu/src/dirty.rs", "after a lost race whatever is present is taken for a leaf"),
        Bug::B17 => ("rust/mmu/src/wrprot.rs", "an entry without W is left alone, MMU-writable or not"),
        Bug::B18 => ("rust/mmu/src/dirty.rs", "D is taken from an L2's entries too"),
        Bug::B19 => ("rust/mmu/src/design/async_worker.rs", "the last put zaps in place, as in 5.13-5.17"),
        Bug::B20 => ("rust/mmu/src/zap.rs", "one pass, at the root's level"),
        Bug::B21 => {
            ("rust/mmu/src/design/defunct_flag.rs", "nobody looks at the flag that tells defunct roots apart")
        }
        Bug::B22a => ("rust/mmu/src/design/async_worker.rs", "the fast zap does not flush the queue"),
        Bug::B22b => (
            "rust/mmu/src/design/async_worker.rs",
            "the fast zap flushes the queue only if it has queued something",
        ),
        Bug::B22c => ("rust/mmu/src/design/sync.rs", "the mark is taken and the root not zapped"),
        Bug::B23 => {
            ("rust/mmu/src/design/async_worker.rs", "invalid roots are given a reference and queued again")
        }
        Bug::B24 => ("rust/mmu/src/zap.rs", "leaves go, tables stay"),
        Bug::B26 => ("rust/mmu/src/nx.rs", "the flag of a new table is not looked at again under the lock"),
        Bug::B27 => ("rust/mmu/src/map.rs", "the goal's level is tested before the frozen value"),
        Bug::B28 => ("rust/mmu/src/map.rs", "the leaf step is made at the level where the walk ended"),
        Bug::B29 => {
            ("rust/vm/src/notifier.rs", "the sequence is compared with a sign-extended 32-bit snapshot")
        }
        Bug::B30 => (
            "rust/mmu/src/lib.rs",
            "the first reference is the vCPU's alone, and who puts it queues the zap, as before 6.4 (two lines)",
        ),
        Bug::B31 => ("rust/mmu/src/age.rs", "aging without the lock is a blind AND"),
        Bug::B34 => ("rust/mmu/src/nx.rs", "the slot is looked up in address space 0"),
        Bug::B39 => ("rust/mmu/src/zap.rs", "no passes below 1 GiB"),
        Bug::B40 => ("rust/mmu/src/root.rs", "a root is loaded under the exclusive lock"),
        Bug::B41 => ("rust/mmu/src/collapse.rs", "limits are asked for gfns outside of the slot"),
        Bug::B42 => ("rust/mmu/src/nx.rs", "any table below forbids a huge page"),
        Bug::B44a => ("rust/vm/src/request.rs", "no barrier between the mode and the look at the requests"),
        Bug::B25 => ("rust/vm/src/fault.rs", "room is made in the quota with mmu_lock held shared"),
        Bug::B33 => ("rust/vm/src/shadow_fault.rs", "room is made in the quota after the stale check"),
        Bug::B35 => ("rust/shadow/src/zap.rs", "a zapped page counts only if others went along with it"),
        Bug::B36 => ("rust/shadow/src/zap.rs", "a zapped root goes back on the active list"),
        Bug::B37 => {
            ("rust/shadow/src/slot_zap.rs", "leaves go by reverse maps, and pages of the slot's tables stay")
        }
        Bug::B44b => {
            ("rust/shadow/src/reclaim/section.rs", "no barrier between the mode and the read of the tables")
        }
        Bug::B44c => (
            "rust/shadow/src/reclaim/free.rs",
            "no barrier between the unlink and the look at the modes, nor a locked instruction (four lines)",
        ),
        _ => return None,
    };
    Some(Mutation { file, does })
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::museum::entries;

    #[test]
    fn every_exhibit_has_its_mutation_where_the_catalogue_says() {
        let root = Path::new(env!("CARGO_MANIFEST_DIR")).join("../..");
        for entry in entries() {
            let place = mutation(entry.bug).unwrap_or_else(|| panic!("{} has no mutation", entry.id()));
            let text = std::fs::read_to_string(root.join(place.file)).expect("a source file");
            let name = format!("Bug::{:?}", entry.bug);
            assert!(text.contains(&name), "{} does not have {name}", place.file);
        }
    }
}
