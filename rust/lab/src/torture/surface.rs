//! Random operations over the whole surface of a VM: what the guest, the VMM and the host may do, in any order.
//!
//! **Guarantee.** What a thread does is a function of its seed and of its number of operations so far; nothing that other threads do changes it. Every operation is legal: KVM may refuse it (a slot that is
//! gone), and must survive it.
//!
//! **Mechanism.** The memory is small (a few leaf tables in three slots, one of them a GiB up), and half of all operations fall on its first and last entries: threads that never meet find nothing.

use std::ops::Range;

use super::Dice;
use crate::program::{Act, MachineSpec, SlotSpec};

/// Memslots: the first stays, the others come and go.
pub const SLOTS: [SlotSpec; 3] =
    [slot(0, 0, 2048, 0), slot(1, 0x40000, 1024, 2048), slot(2, 4096, 512, 3072)];

/// Host memory behind them.
pub const HOST_PAGES: u64 = 3584;

const fn slot(id: u16, gfn: u64, pages: u64, hva_page: u64) -> SlotSpec {
    SlotSpec { id, as_id: 0, gfn, pages, hva_page, log: false, read_only: false }
}

/// What a thread does in a torture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    /// A vCPU: the guest, and what its run loop does.
    Guest,
    /// The VMM's main thread: memslots, parameters.
    Vmm,
    /// The VMM's migration thread: dirty logs and rings.
    Migration,
    /// The host: reclaim, KSM, khugepaged.
    Host,
}

/// What the machine allows.
#[derive(Clone, Copy, Debug)]
pub struct Allowed {
    /// SMM memory.
    pub smm: bool,
    /// Dirty rings.
    pub ring: bool,
    /// Largest page of the host beyond 4K.
    pub huge: bool,
}

impl Allowed {
    /// Of this machine.
    pub fn of(machine: &MachineSpec) -> Self {
        Self { smm: machine.smm, ring: machine.ring.is_some(), huge: machine.max_level > 1 }
    }
}

/// Chooses a thread's operations.
#[derive(Clone, Debug)]
pub struct Chooser {
    part: Part,
    allowed: Allowed,
    dice: Dice,
}

impl Chooser {
    /// Operations of `part` by `seed`.
    pub fn new(part: Part, allowed: Allowed, seed: u64) -> Self {
        Self { part, allowed, dice: Dice::new(seed) }
    }

    /// The next operation.
    pub fn act(&mut self) -> Act {
        match self.part {
            Part::Guest => self.guest(),
            Part::Vmm => self.vmm(),
            Part::Migration => self.migration(),
            Part::Host => self.host(),
        }
    }

    fn gfn(&mut self) -> u64 {
        let dice = &mut self.dice;
        let slot = &SLOTS[[0, 0, 0, 1, 1, 2][dice.below(6) as usize]];
        match dice.below(8) {
            // Neighbours at the edges of tables and slots.
            0..=2 => slot.gfn + dice.below(4),
            3 => slot.gfn + 510 + dice.below(4).min(slot.pages - 511),
            4 if dice.one_in(16) => slot.gfn + slot.pages + dice.below(4),
            _ => slot.gfn + dice.below(slot.pages),
        }
    }

    fn range(&mut self, most: u64) -> Range<u64> {
        let start = match self.dice.below(4) {
            0 => 0,
            1 => 512 * self.dice.below(HOST_PAGES / 512),
            _ => self.dice.below(HOST_PAGES),
        };
        let most = if self.dice.one_in(8) { most } else { most.min(16) };
        start..(start + 1 + self.dice.below(most)).min(HOST_PAGES)
    }

    fn guest(&mut self) -> Act {
        let gfn = self.gfn();
        match self.dice.below(400) {
            0..=319 => {
                // One access is a read, a write or a fetch.
                let write = self.dice.one_in(2);
                Act::Access { gfn, write, exec: !write && self.dice.one_in(4) }
            }
            320..=349 => Act::Speculate { gfn },
            350..=369 => Act::LookUp { gfn },
            370..=374 => Act::Poll,
            375..=379 => Act::Leave,
            380..=383 => Act::DropRoot,
            384..=385 => Act::Unload,
            386..=388 => Act::SwitchRole { variant: self.dice.below(4) as u8 },
            389..=391 if self.allowed.smm => Act::EnterSmm,
            389..=394 if self.allowed.smm => Act::ExitSmm,
            395..=396 => Act::PreFault { gfn, pages: 1 + self.dice.below(8) },
            397 => Act::Enter,
            398 => Act::LoadRoot,
            _ => Act::read(gfn),
        }
    }

    fn vmm(&mut self) -> Act {
        let as_id = u8::from(self.allowed.smm && self.dice.one_in(4));
        let id = 1 + self.dice.below(2) as u16;
        let gfn = self.gfn();
        match self.dice.below(100) {
            0..=14 => Act::FastZap,
            15..=29 => Act::DeleteSlot { as_id, id },
            30..=54 => {
                let log = self.dice.one_in(3);
                Act::CreateSlot(SlotSpec { as_id, log, ..SLOTS[usize::from(id)].clone() })
            }
            55..=62 => {
                // Home, or a place that is free.
                let home = SLOTS[usize::from(id)].gfn;
                let gfn = if self.dice.one_in(2) { home } else { home + 0x8_0000 };
                Act::MoveSlot { as_id, id, gfn }
            }
            63..=74 => Act::SetSlotFlags { as_id, id: self.dice.below(3) as u16, log: self.dice.one_in(2) },
            75..=79 => Act::SetNx { on: self.dice.one_in(2) },
            80..=84 => Act::RecoverNx { ratio: 1 + self.dice.below(4) as u32 },
            85..=92 => Act::ZapRange { gfn, pages: 1 + self.dice.below(600) },
            93..=94 => Act::SetSlotZapAll { on: self.dice.one_in(2) },
            95..=96 => Act::SetEagerSplit { on: self.dice.one_in(2) },
            97 => Act::FlushWorkers,
            98 => Act::RcuBarrier,
            _ => Act::Synchronize,
        }
    }

    fn migration(&mut self) -> Act {
        let as_id = u8::from(self.allowed.smm && self.dice.one_in(8));
        let id = self.dice.below(3) as u16;
        let gfn = self.gfn();
        match self.dice.below(100) {
            0..=19 => Act::SetSlotFlags { as_id, id, log: self.dice.below(4) != 0 },
            20..=29 => Act::WriteProtect { as_id, gfn },
            30..=49 if self.allowed.ring => Act::CollectRings,
            30..=89 if self.allowed.ring => Act::ResetRings,
            30..=59 => Act::GetDirtyLog { as_id, id },
            60..=89 => {
                let words = SLOTS[usize::from(id)].pages / 64;
                let first = 64 * self.dice.below(words);
                Act::ClearDirtyLog { as_id, id, first, mask: self.dice.number() & self.dice.number() }
            }
            90..=93 => {
                // A log that is all set at first needs manual protection.
                let manual = self.dice.one_in(2);
                Act::SetLogProtect { manual, initially_set: manual && self.dice.one_in(2) }
            }
            _ => Act::ZapRange { gfn, pages: 1 + self.dice.below(64) },
        }
    }

    fn host(&mut self) -> Act {
        let range = self.range(600);
        let (hva_page, pages) = (range.start, range.end - range.start);
        let writable = self.dice.below(4) != 0;
        match self.dice.below(100) {
            0..=39 => Act::Unmap { hva_page, pages, may_block: self.dice.below(4) != 0 },
            // With it comes change_pte; alone it would name a frame that a vCPU's copy on write may have replaced meanwhile.
            40..=54 => Act::ReplacePage { hva_page, writable },
            55..=69 => Act::Age { hva_page, pages },
            70..=79 => Act::AgeFlush { hva_page, pages },
            80..=89 => Act::TestAge { hva_page, pages },
            _ if self.allowed.huge => {
                let gfn = 512 * self.dice.below(4);
                Act::SetHostLevel { gfn, pages: 512, level: 2 }
            }
            _ => Act::Yield,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::BTreeSet;

    use super::*;

    const ALL: Allowed = Allowed { smm: true, ring: false, huge: true };

    #[test]
    fn the_same_seed_chooses_the_same_operations_and_another_one_others() {
        let acts = |seed| {
            let mut chooser = Chooser::new(Part::Guest, ALL, seed);
            (0..500).map(|_| chooser.act()).collect::<Vec<_>>()
        };
        assert_eq!(acts(7), acts(7));
        assert_ne!(acts(7), acts(8));
    }

    #[test]
    fn every_operation_of_the_surface_is_chosen() {
        let mut titles = BTreeSet::new();
        for (part, ring) in [
            (Part::Guest, false),
            (Part::Vmm, false),
            (Part::Migration, false),
            (Part::Migration, true),
            (Part::Host, false),
        ] {
            let mut chooser = Chooser::new(part, Allowed { ring, ..ALL }, 1);
            for _ in 0..4000 {
                let act = chooser.act();
                titles.insert(act.title().split(' ').next().unwrap_or_default().to_owned());
            }
        }
        // Without those of the torture itself: meetings of threads, the vCPUs' stop, the last descriptor, the end.
        assert_eq!(titles.len(), 38, "{titles:?}");
    }
}
