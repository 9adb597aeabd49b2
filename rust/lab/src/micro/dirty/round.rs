//! One pass through the phases, by one thread that is the VMM and the guest in turn.

use tdpmmu_platform::{Platform, Role as TaskRole, Task};
use tdpmmu_spte::LEVEL_4K;
use tdpmmu_spte::geometry::{page_bytes, span};
use tdpmmu_vm::slot::MemSlot;
use tdpmmu_vm::{
    AccessOutcome, AdMix, BulkOptions, GuestAccess, Progress, Region, SlotFlags, Vcpu, Vm, VmError,
};

use super::floor::{self, Gone, Limit};
use super::{Bench, Lap, Outcomes, P, Setting, fail};
use crate::config::Protocol;
use crate::limits::EntryLimits;
use crate::{Control, LabError};

/// One pass. See the module text.
pub(super) struct Round<'r> {
    pub(super) vm: &'r Vm<P>,
    pub(super) task: Task<P>,
    pub(super) limits: &'r EntryLimits,
    pub(super) setting: Setting,
    control: &'r Control,
    /// Leaf level at the start.
    level: u8,
    pub(super) pages: u64,
    laps: Vec<Lap>,
}

impl<'r> Round<'r> {
    /// Goes through all phases. The guest is empty before, and anything after.
    pub(super) fn run(bench: &'r Bench<'_>, vm: &'r Vm<P>, setting: Setting) -> Result<Vec<Lap>, LabError> {
        let mut round = Round {
            vm,
            task: vm.task("vmm", TaskRole::Caller),
            limits: &bench.limits.one,
            setting,
            control: bench.control,
            level: bench.plan.level,
            pages: bench.plan.config.memory_bytes / page_bytes(LEVEL_4K),
            laps: Vec::new(),
        };
        round.go()?;
        Ok(round.laps)
    }

    fn go(&mut self) -> Result<(), LabError> {
        let mut vcpu = self.vm.vcpu(0).map_err(fail("a vCPU"))?;
        let options = BulkOptions { level: self.level, ad: AdMix::Dirty, threads: 0 };
        let made = self
            .vm
            .populate_bulk(&mut vcpu, 0..self.pages, &options, &Progress::default())
            .map_err(fail("bulk"))?;
        let leaves = self.pages / span(self.level);
        if made != leaves {
            return Err(LabError::Internal(format!("{made} SPTEs made, {leaves} expected")));
        }

        let ns = timed(|| self.log(true))?.0;
        let (count, of) = floor::enable(self.limits, self.setting, self.level, self.pages);
        self.lap("enable", ns, count, of);
        if self.setting.protocol == Protocol::InitSet {
            self.first_clear()?;
        }

        self.write_and_harvest(&mut vcpu, "write", true)?;
        self.write_and_harvest(&mut vcpu, "rewrite", false)?;

        let (before, tables) = (self.mapped(), self.vm.mmu().linked_tables());
        let ns = timed(|| self.log(false))?.0;
        let gone = Gone {
            entries: 512 * u64::try_from(tables - self.vm.mmu().linked_tables()).unwrap_or(0),
            leaves: before[0],
        };
        let (count, of) =
            floor::disable(self.limits, self.vm.mmu().profile().collapse, self.level, self.pages, gone);
        self.lap("disable", ns, count, of);

        let (level, pages) = (self.level, self.pages);
        let gfns = (0..pages).step_by(span(level) as usize);
        let (ns, outcomes) = timed(|| writes(&mut vcpu, &mut gfns.peekable()))?;
        self.lap("refault", ns, leaves, None);
        self.told(outcomes);
        Ok(())
    }

    /// The guest writes what it writes, and the log is harvested: at the end, and whenever the log is full. The harvest has laps of its own if `told`.
    fn write_and_harvest(
        &mut self,
        vcpu: &mut Vcpu<'_, P>,
        phase: &'static str,
        told: bool,
    ) -> Result<(), LabError> {
        let mut gfns = self.written().peekable();
        let mut harvest = self.new_harvest();
        let (mut ns, mut outcomes) = (0, Outcomes::default());
        while gfns.peek().is_some() {
            self.control.check()?;
            let (took, more) = timed(|| writes(vcpu, &mut gfns))?;
            ns += took;
            outcomes.add(more);
            if gfns.peek().is_some() {
                self.harvest(&mut harvest)?;
            }
        }
        // As it stands when the guest has written, before anything is taken for clean.
        let splits = told && self.setting.eager == Some(false);
        self.lap(phase, ns, self.written_pages(), floor::write(self.limits, self.setting, splits));
        self.told(outcomes);
        self.control.check()?;
        self.harvest(&mut harvest)?;
        self.all_found(&harvest)?;
        if told {
            self.harvested(&harvest);
        }
        Ok(())
    }

    pub(super) fn lap(&mut self, phase: &'static str, ns: u64, count: u64, of: Option<Limit>) {
        self.laps.push(Lap { phase, ns, count, of, mapped: self.mapped(), outcomes: None });
    }

    /// The last phase's writes ended so.
    fn told(&mut self, outcomes: Outcomes) {
        if let Some(lap) = self.laps.last_mut() {
            lap.outcomes = Some(outcomes);
        }
    }

    /// Leaves of 4K, 2M and 1G: read, not asked of the kernel's statistics, which 5.10 does not have.
    fn mapped(&self) -> [u64; 3] {
        let found = self.vm.mmu().count_all(&self.task).leaves;
        [found[1], found[2], found[3]]
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

    /// The gfns that are written.
    fn written(&self) -> impl Iterator<Item = u64> + use<> {
        (0..self.pages).step_by(self.setting.density as usize)
    }

    /// How many those are.
    pub(super) fn written_pages(&self) -> u64 {
        self.pages.div_ceil(self.setting.density)
    }
}

/// ns that `body` took, and what it returned.
pub(super) fn timed<T>(body: impl FnOnce() -> Result<T, LabError>) -> Result<(u64, T), LabError> {
    let begin = P::ticks();
    let done = body()?;
    Ok((P::ticks_to_ns(P::ticks() - begin), done))
}

/// The guest writes to `gfns`, each write to its end, until its log is full: the page that it could not finish is the next. Out of the guest on return.
fn writes(
    vcpu: &mut Vcpu<'_, P>,
    gfns: &mut std::iter::Peekable<impl Iterator<Item = u64>>,
) -> Result<Outcomes, LabError> {
    let mut outcomes = Outcomes::default();
    while let Some(&gfn) = gfns.peek() {
        match vcpu.access(GuestAccess::write(gfn)) {
            Ok(AccessOutcome::TlbHit | AccessOutcome::Walk) => outcomes.translated += 1,
            Ok(AccessOutcome::FastFault) => outcomes.fast += 1,
            Ok(AccessOutcome::SlowFault | AccessOutcome::Retry) => outcomes.slow += 1,
            Ok(other) => {
                let message = format!("gfn {gfn:#x}: a write ended as {}", other.name());
                return Err(LabError::Internal(message));
            }
            Err(VmError::RingFull { .. }) => break,
            Err(error) => return Err(fail("a write")(error)),
        }
        gfns.next();
    }
    vcpu.leave();
    Ok(outcomes)
}
