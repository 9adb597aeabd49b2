//! Dirty logging: what it costs to turn on, to write under, to harvest, to turn off.
//!
//! **Guarantee.** A round begins with the guest mapped as asked, every leaf writable and dirty, no log; each written page was found by the harvest, each once, or the
//! run is an error. The least of the rounds counts, phase by phase; the leaves by size after a phase stand beside its time.
//!
//! **Mechanism.** One thread is the VMM and the guest in turn, so a phase has no company: what concurrent vCPUs lose to a harvest is `bench zap`'s kind of question. In order:
//!
//! | phase | is | one operation | limit, and why |
//! | --- | --- | --- | --- |
//! | `enable` | the memslot's flags change: eager split, write protection, flush | an SPTE that must change | `cmpxchg_ns`: W goes under the shared lock; `write_ns` more where a split makes the SPTE first |
//! | `write` | the first write of each page: exit, fault, entry, walk | a page | `cmpxchg_ns`: W comes back by one |
//! | `harvest` | the log is read and the pages protected again | a page found | `swap_ns`: W (or D) goes by one locked instruction, and an AND costs what an exchange does |
//! | `rewrite` | the same pages are written again | a page | as `write`; nothing is left to split |
//! | `disable` | logging ends: tables that could be huge again go | a small SPTE that could be part of a huge one | `swap_ns`: each is swapped out once |
//! | `refault` | the guest writes once per huge page | a huge page | none |
//! | `total` | `enable` and `write`: what a migration costs before its first pass | a page | none |

use serde::Serialize;
use tdpmmu_platform::{Platform, Role as TaskRole, Task};
use tdpmmu_spte::geometry::{page_bytes, span};
use tdpmmu_spte::{EagerSplit, LEVEL_4K};
use tdpmmu_vm::slot::MemSlot;
use tdpmmu_vm::{AccessOutcome, AdMix, BulkOptions, GuestAccess, Progress, Region, SlotFlags, Vcpu, Vm};

use super::{Bench, P, Row, clean, empty, fail};
use crate::LabError;
use crate::config::Protocol;
use crate::limits::EntryLimits;

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
    /// Leaves by size afterwards, where the kernel counts them.
    mapped: Option<[i64; 3]>,
    outcomes: Option<Outcomes>,
}

/// A limit for one operation: its name, its ns, and what we want to be within.
#[derive(Clone, Copy)]
struct Limit {
    name: &'static str,
    ns: f64,
    goal: Option<f64>,
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
    /// 4 KiB leaves after it; none where the kernel does not count.
    pub mapped_4k: Option<i64>,
    /// 2 MiB leaves after it.
    pub mapped_2m: Option<i64>,
    /// 1 GiB leaves after it.
    pub mapped_1g: Option<i64>,
    /// Writes that needed no fault.
    pub translated: Option<u64>,
    /// Writes whose fault was fixed without mmu_lock.
    pub fast_faults: Option<u64>,
    /// Writes whose fault took mmu_lock.
    pub slow_faults: Option<u64>,
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
                let vm = self.dirty_vm(eager)?;
                for &density in &plan.dirty.densities {
                    self.cycle(&vm, Setting { protocol, eager, density })?;
                }
                clean(&vm)?;
            }
        }
        Ok(())
    }

    fn dirty_vm(&self, eager: Option<bool>) -> Result<Vm<P>, LabError> {
        // However large the pages are at first: logging makes 4K ones of them.
        self.vm_with(self.plan.config.memory_bytes, self.plan.level, LEVEL_4K, |config| {
            if eager == Some(false) {
                config.profile.eager_split = EagerSplit::None;
            }
        })
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
        let of = |phase: &str| best.iter().find(|lap| lap.phase == phase);
        if let (Some(enable), Some(write)) = (of("enable"), of("write")) {
            let ns = enable.ns + write.ns;
            best.push(Lap { phase: "total", ns, of: None, outcomes: None, ..*write });
        }
        let rows: Vec<Row> = best.iter().map(|lap| self.dirty_row(lap, setting)).collect();
        self.rows.extend(rows);
        Ok(())
    }

    fn dirty_row(&self, lap: &Lap, setting: Setting) -> Row {
        let page = &self.plan.config.page;
        let ns = lap.ns as f64 / lap.count.max(1) as f64;
        let of = lap.of.filter(|_| lap.count >= FEWEST);
        Row {
            name: format!("{}: {}", lap.phase, setting.title(page)),
            ns,
            ratio: of.map(|of| ns / of.ns),
            of: of.map(|of| of.name),
            count: lap.count,
            goal: of.and_then(|of| of.goal),
            dirty: Some(DirtyRow {
                phase: lap.phase,
                page: page.clone(),
                eager: setting.eager,
                protocol: setting.protocol.name(),
                density: setting.density,
                total_ns: lap.ns,
                mapped_4k: lap.mapped.map(|m| m[0]),
                mapped_2m: lap.mapped.map(|m| m[1]),
                mapped_1g: lap.mapped.map(|m| m[2]),
                translated: lap.outcomes.map(|o| o.translated),
                fast_faults: lap.outcomes.map(|o| o.fast),
                slow_faults: lap.outcomes.map(|o| o.slow),
            }),
        }
    }
}

/// One pass through the phases.
struct Round<'r> {
    vm: &'r Vm<P>,
    task: Task<P>,
    limits: &'r EntryLimits,
    setting: Setting,
    /// Leaf level at the start.
    level: u8,
    pages: u64,
    laps: Vec<Lap>,
}

impl<'r> Round<'r> {
    fn run(bench: &'r Bench<'_>, vm: &'r Vm<P>, setting: Setting) -> Result<Vec<Lap>, LabError> {
        let mut round = Round {
            vm,
            task: vm.task("vmm", TaskRole::Caller),
            limits: &bench.limits.one,
            setting,
            level: bench.plan.level,
            pages: bench.plan.config.memory_bytes / page_bytes(LEVEL_4K),
            laps: Vec::new(),
        };
        round.go(bench)?;
        Ok(round.laps)
    }

    fn go(&mut self, bench: &Bench<'_>) -> Result<(), LabError> {
        let mut vcpu = self.vm.vcpu(0).map_err(fail("a vCPU"))?;
        let options = BulkOptions { level: self.level, ad: AdMix::Dirty, threads: 0 };
        let made = self
            .vm
            .populate_bulk(&mut vcpu, 0..self.pages, &options, &Progress::default())
            .map_err(fail("bulk"))?;
        let huge = self.pages / span(self.level);
        if made != huge {
            return Err(LabError::Internal(format!("{made} SPTEs made, {huge} expected")));
        }

        let begin = P::ticks();
        self.log(true)?;
        let (count, of) = self.enabled();
        self.lap("enable", begin, count, of);

        bench.control.check()?;
        self.write(&mut vcpu, "write")?;
        self.harvest()?;
        bench.control.check()?;
        self.write(&mut vcpu, "rewrite")?;

        let small = self.mapped().map_or(0, |mapped| mapped[0] as u64);
        let begin = P::ticks();
        self.log(false)?;
        let collapses = self.level > LEVEL_4K;
        let swap = self.limit("swap_ns", self.limits.swap_ns, Some(1.5));
        self.lap("disable", begin, if collapses { small } else { self.pages }, swap.filter(|_| collapses));

        let begin = P::ticks();
        let outcomes = writes(&mut vcpu, (0..self.pages).step_by(span(self.level) as usize))?;
        self.lap("refault", begin, huge, None);
        self.told(outcomes);
        Ok(())
    }

    fn limit(&self, name: &'static str, ns: f64, goal: Option<f64>) -> Option<Limit> {
        Some(Limit { name, ns, goal })
    }

    fn lap(&mut self, phase: &'static str, begin: u64, count: u64, of: Option<Limit>) {
        let ns = P::ticks_to_ns(P::ticks() - begin);
        self.laps.push(Lap { phase, ns, count, of, mapped: self.mapped(), outcomes: None });
    }

    /// The last phase's writes ended so.
    fn told(&mut self, outcomes: Outcomes) {
        if let Some(lap) = self.laps.last_mut() {
            lap.outcomes = Some(outcomes);
        }
    }

    fn mapped(&self) -> Option<[i64; 3]> {
        self.vm.mmu().profile().page_stats.then(|| self.vm.mmu().leaf_pages())
    }

    /// Turns logging on or off in every memslot.
    fn log(&self, on: bool) -> Result<(), LabError> {
        for slot in self.vm.slots().space(0) {
            let &MemSlot { id, as_id, base, pages, hva, flags, .. } = &**slot;
            let region = Region { id, as_id, base, pages, hva, flags: SlotFlags { log_dirty: on, ..flags } };
            self.vm.set_memslot(&self.task, &region).map_err(fail("a memslot's flags"))?;
        }
        Ok(())
    }

    /// The SPTEs that enabling had to change, and what that must cost.
    fn enabled(&self) -> (u64, Option<Limit>) {
        let EntryLimits { write_ns, cmpxchg_ns, .. } = *self.limits;
        if self.setting.eager == Some(true) {
            (self.pages, self.limit("write_ns + cmpxchg_ns", write_ns + cmpxchg_ns, Some(1.4)))
        } else {
            (self.pages / span(self.level), self.limit("cmpxchg_ns", cmpxchg_ns, Some(1.4)))
        }
    }

    /// The gfns that are written.
    fn written(&self) -> impl Iterator<Item = u64> + use<> {
        (0..self.pages).step_by(self.setting.density as usize)
    }

    /// How many those are.
    fn written_pages(&self) -> u64 {
        self.pages.div_ceil(self.setting.density)
    }

    fn write(&mut self, vcpu: &mut Vcpu<'_, P>, phase: &'static str) -> Result<(), LabError> {
        let begin = P::ticks();
        let outcomes = writes(vcpu, self.written())?;
        let of = self.limit("cmpxchg_ns", self.limits.cmpxchg_ns, None);
        self.lap(phase, begin, self.written_pages(), of);
        self.told(outcomes);
        Ok(())
    }

    fn harvest(&mut self) -> Result<(), LabError> {
        let begin = P::ticks();
        let mut found = 0;
        for slot in self.vm.slots().space(0) {
            let log = self.vm.take_dirty_log(&self.task, 0, slot.id).map_err(fail("a dirty log"))?;
            found += log.len() as u64;
        }
        let of = self.limit("swap_ns", self.limits.swap_ns, Some(1.5));
        self.lap("harvest", begin, found, of);
        self.all_found(found)
    }

    fn all_found(&self, found: u64) -> Result<(), LabError> {
        let written = self.written_pages();
        if found == written {
            return Ok(());
        }
        let message =
            format!("{written} pages written, {found} found dirty by {}", self.setting.protocol.name());
        Err(LabError::Check { message, partial: String::new() })
    }
}

/// The guest writes to `gfns`, each write to its end. Out of the guest on return.
fn writes(vcpu: &mut Vcpu<'_, P>, gfns: impl Iterator<Item = u64>) -> Result<Outcomes, LabError> {
    let mut outcomes = Outcomes::default();
    for gfn in gfns {
        match vcpu.access(GuestAccess::write(gfn)).map_err(fail("a write"))? {
            AccessOutcome::TlbHit | AccessOutcome::Walk => outcomes.translated += 1,
            AccessOutcome::FastFault => outcomes.fast += 1,
            AccessOutcome::SlowFault | AccessOutcome::Retry => outcomes.slow += 1,
            other => {
                return Err(LabError::Internal(format!("gfn {gfn:#x}: a write ended as {}", other.name())));
            }
        }
    }
    vcpu.leave();
    Ok(outcomes)
}
