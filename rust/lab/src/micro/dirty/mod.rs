//! Dirty logging: what it costs to turn on, to write under, to harvest, to turn off.
//!
//! **Guarantee.** A round begins with the guest mapped as asked, every leaf writable and dirty, no log; every page that was written was found by the harvest, or the
//! run is an error. The least of the rounds counts, phase by phase; the leaves by size after a phase stand beside its time.
//!
//! **Mechanism.** One thread is the VMM and the guest in turn (`round.rs`), so a phase has no company: what concurrent vCPUs lose to a harvest is another question.
//! How written pages are found is the protocol's (`harvest.rs`). What a phase must cost at least, and why (`floor.rs`):
//!
//! | phase | is | one operation | limit, and why |
//! | --- | --- | --- | --- |
//! | `enable` | the memslot's flags change: eager split, W or D taken, flush | an SPTE that must change | `cmpxchg_ns`: the walk shares mmu_lock; `write_ns` more where a split makes the SPTE first; the bitmap alone (`init-set`) is `write_ns / 64` |
//! | `first-clear` | `init-set`: GET, and CLEAR of everything | a page | as `clear`; `write_ns` more for the split |
//! | `write` | the first write of each page: exit, fault, entry, walk | a page | `cmpxchg_ns`: W or D comes back by one; where faults split, a page's share of the 512 `write_ns` of its table more |
//! | `get` | manual protection: the bitmap is copied | a word of 64 pages | `read_ns + write_ns` |
//! | `clear` | CLEAR, 64 pages a call or all at once | a page | `swap_ns`: a bit goes by one locked instruction under the exclusive lock, and an AND costs what an exchange does; where no two pages share a line, `7 read_ns` more for the rest of it |
//! | `collect`, `reset` | a ring is read; its pages are protected again | an entry | `2 read_ns` (16 bytes); as `clear` |
//! | `harvest` | all of that; or GET alone, which protects what it finds | a page found | as `clear` |
//! | `rewrite` | the same pages are written again | a page | as `write`; nothing is left to split |
//! | `disable` | logging ends: tables that could be huge leaves go | an entry of such a table | `swap_ns`: each is swapped out once, empty or not; where leaves are zapped and tables stay (up to 5.18), a leaf, `cmpxchg_ns + write_ns` |
//! | `refault` | the guest writes once per huge page | a huge page | none |
//! | `total` | up to and with `write`: what a migration costs before its first pass | a page written | none |

mod floor;
mod harvest;
mod round;

use serde::Serialize;
use tdpmmu_platform::Role as TaskRole;
use tdpmmu_spte::LEVEL_4K;
use tdpmmu_vm::{DirtyMode, Vm};

use self::floor::Limit;
use self::round::Round;
use super::{Bench, P, Row, clean, empty, fail};
use crate::LabError;
use crate::config::Protocol;

/// Rounds of each cycle.
const ROUNDS: usize = 3;
/// Below this many operations a phase is made of fixed costs, and a ratio to a limit says nothing.
const FEWEST: u64 = 4096;

/// One way to go through the phases.
#[derive(Clone, Copy)]
struct Setting {
    protocol: Protocol,
    eager: Option<bool>,
    density: u64,
}

/// What one phase came to in one round.
struct Lap {
    phase: &'static str,
    ns: u64,
    count: u64,
    of: Option<Limit>,
    /// Leaves by size afterwards, counted in the tree.
    mapped: [u64; 3],
    outcomes: Option<Outcomes>,
}

/// How the guest's writes ended.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
struct Outcomes {
    /// Translated as they were: nothing to pay.
    translated: u64,
    /// Faults fixed without mmu_lock.
    fast: u64,
    /// Faults that took it.
    slow: u64,
}

/// What only rows of `bench dirty` have.
#[derive(Clone, Debug, Serialize)]
pub struct DirtyRow {
    /// The phase.
    pub phase: &'static str,
    /// Page size at the start: `4K`, `2M` or `1G`.
    pub page: String,
    /// Huge pages were split when logging started; none: there were none.
    pub eager: Option<bool>,
    /// How written pages are found.
    pub protocol: &'static str,
    /// One page in so many was written.
    pub density: u64,
    /// The whole phase, in ns.
    pub total_ns: u64,
    /// 4 KiB leaves after it, counted in the tree.
    pub mapped_4k: u64,
    /// 2 MiB leaves after it.
    pub mapped_2m: u64,
    /// 1 GiB leaves after it.
    pub mapped_1g: u64,
    /// Writes that needed no fault.
    pub translated: Option<u64>,
    /// Writes whose fault was fixed without mmu_lock.
    pub fast_faults: Option<u64>,
    /// Writes whose fault took mmu_lock.
    pub slow_faults: Option<u64>,
}

impl Outcomes {
    fn add(&mut self, more: Outcomes) {
        self.translated += more.translated;
        self.fast += more.fast;
        self.slow += more.slow;
    }
}

impl Setting {
    /// What tells it from the others, for people.
    fn title(&self, page: &str) -> String {
        let eager = match self.eager {
            Some(true) => ", eager split",
            Some(false) => ", no eager split",
            None => "",
        };
        let density = if self.density == 1 { String::new() } else { format!(", 1 in {}", self.density) };
        format!("{}, {page}{eager}{density}", self.protocol.name())
    }
}

impl Bench<'_> {
    /// `bench dirty`.
    pub(super) fn dirty(&mut self) -> Result<(), LabError> {
        let plan = self.plan;
        for &protocol in &plan.dirty.protocols {
            for &eager in &plan.dirty.eager {
                let vm = self.dirty_vm(protocol, eager)?;
                for &density in &plan.dirty.densities {
                    self.cycle(&vm, Setting { protocol, eager, density })?;
                }
                clean(&vm)?;
            }
        }
        Ok(())
    }

    /// A VM that keeps its log as `protocol` has it, and splits huge pages ahead or not.
    fn dirty_vm(&self, protocol: Protocol, eager: Option<bool>) -> Result<Vm<P>, LabError> {
        // However large the pages are at first: logging makes 4K ones of them.
        let vm = self.vm_with(self.plan.config.memory_bytes, self.plan.level, LEVEL_4K, |config| {
            config.eager_page_split = eager != Some(false);
            config.dirty_ring = (protocol == Protocol::Ring).then_some(harvest::RING_ENTRIES);
            if protocol == Protocol::DBits {
                config.dirty_mode = DirtyMode::DBits;
            }
        })?;
        let task = vm.task("setup", TaskRole::Caller);
        vm.enable_dirty_log_protect(&task, protocol.is_manual(), protocol == Protocol::InitSet)
            .map_err(fail("the log's protocol"))?;
        Ok(vm)
    }

    /// The rounds of one setting, and their rows.
    fn cycle(&mut self, vm: &Vm<P>, setting: Setting) -> Result<(), LabError> {
        let title = setting.title(&self.plan.config.page);
        let mut best: Vec<Lap> = Vec::new();
        for n in 0..ROUNDS {
            self.control.check()?;
            self.control.report(&title, n as f64 / ROUNDS as f64);
            let laps = Round::run(self, vm, setting)?;
            empty(vm)?;
            if best.is_empty() {
                best = laps;
                continue;
            }
            for (best, lap) in best.iter_mut().zip(laps) {
                if (best.count, best.mapped, best.outcomes) != (lap.count, lap.mapped, lap.outcomes) {
                    return Err(LabError::Internal(format!(
                        "{title}: two rounds differ in {}: {} operations, then {}; leaves {:?}, then {:?}; writes {:?}, then {:?}",
                        lap.phase,
                        best.count,
                        lap.count,
                        best.mapped,
                        lap.mapped,
                        best.outcomes,
                        lap.outcomes
                    )));
                }
                best.ns = best.ns.min(lap.ns);
            }
        }
        let before_first_pass = |lap: &&Lap| matches!(lap.phase, "enable" | "first-clear" | "write");
        let ns = best.iter().filter(before_first_pass).map(|lap| lap.ns).sum();
        if let Some(write) = best.iter().find(|lap| lap.phase == "write") {
            best.push(Lap { phase: "total", ns, of: None, outcomes: None, ..*write });
        }
        let rows: Vec<Row> = best.iter().map(|lap| self.dirty_row(lap, setting)).collect();
        self.rows.extend(rows);
        Ok(())
    }

    fn dirty_row(&self, lap: &Lap, setting: Setting) -> Row {
        let page = &self.plan.config.page;
        let ns = lap.ns as f64 / lap.count.max(1) as f64;
        let of = lap.of.as_ref().filter(|_| lap.count >= FEWEST);
        Row {
            name: format!("{}: {}", lap.phase, setting.title(page)),
            ns,
            ratio: of.map(|of| ns / of.ns),
            of: of.map(|of| of.name.clone()),
            count: lap.count,
            goal: of.and_then(|of| of.goal),
            dirty: Some(DirtyRow {
                phase: lap.phase,
                page: page.clone(),
                eager: setting.eager,
                protocol: setting.protocol.name(),
                density: setting.density,
                total_ns: lap.ns,
                mapped_4k: lap.mapped[0],
                mapped_2m: lap.mapped[1],
                mapped_1g: lap.mapped[2],
                translated: lap.outcomes.map(|o| o.translated),
                fast_faults: lap.outcomes.map(|o| o.fast),
                slow_faults: lap.outcomes.map(|o| o.slow),
            }),
            reclaim: None,
        }
    }
}
