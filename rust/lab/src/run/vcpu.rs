//! What a vCPU's thread does: guest code, root drops, waits.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tdpmmu_mmu::design::ZapQueue;
use tdpmmu_platform::{Histogram, Phase, Platform, Site, Task};
use tdpmmu_spte::geometry::span;
use tdpmmu_spte::{Ownership, Role};
use tdpmmu_vm::{AccessOutcome, GuestAccess, Vcpu, design_info};

use super::{Account, NAP_NS, Paid, Shared, internal, lock, setup::task_config, sleep};
use crate::LabError;
use crate::guest::{self, Felt, GuestPlan, WorkingSet};
use crate::scenario::{Drop, Flag, Mark, Op, Sharing, Who};

/// [`Op::DropRoot`].
struct Drops {
    mark: Mark,
    times: u64,
    sptes: u64,
    by: Drop,
}

/// A task's ticks by phase until `end`, since it had spent `before`.
fn since<P: Platform>(task: &Task<P>, end: u64, before: &[u64; Phase::ALL.len()]) -> [u64; Phase::ALL.len()] {
    let now = task.meter().phase_ticks(end);
    std::array::from_fn(|phase| now[phase] - before[phase])
}

impl<P: Platform> Shared<'_, P> {
    pub(super) fn vcpu_thread(&self, name: &str, id: usize, ops: &[Op]) -> Result<(), LabError> {
        let cpus = &self.scenario.vm.vcpu_cpus;
        if !cpus.is_empty() {
            let cpu = cpus[id % cpus.len()];
            P::pin(cpu).map_err(|e| LabError::Internal(format!("binding vCPU {id} to CPU {cpu}: {e}")))?;
        }
        let mut vcpu = self.vm.vcpu_with(id, task_config(&self.scenario.vm)).map_err(internal("a vCPU"))?;
        let mut felt = Felt::default();
        let mut account = self.account(Who::Vcpu(id));
        for op in ops {
            self.vcpu_op(&mut vcpu, id, op, &mut felt, &mut account)?;
            account.look(&self.window, vcpu.task());
        }
        vcpu.leave();
        self.report(name, Who::Vcpu(id), vcpu.task(), account, felt);
        Ok(())
    }

    fn working_set(&self, id: usize, pages: u64) -> WorkingSet {
        WorkingSet::new(id, self.guests, pages, span(self.scenario.vm.level), self.pages())
    }

    /// What vCPU `id` writes, and what it reads.
    fn working_sets(&self, id: usize, pages: u64, sharing: Sharing) -> (WorkingSet, WorkingSet) {
        let before = (id + self.guests - 1) % self.guests;
        let (writes, reads) = match sharing {
            Sharing::Local => (id, id),
            Sharing::Pipeline => (id, before),
            Sharing::Global => (0, 0),
        };
        (self.working_set(writes, pages), self.working_set(reads, pages))
    }

    /// Does the zap design leave vCPUs their roots?
    fn keeps_roots(&self) -> bool {
        design_info(&self.scenario.vm.design).is_some_and(|info| info.obligations.keeps_roots)
    }

    /// Role word of a variant: see [`Op::SwitchRole`].
    pub(super) fn role(&self, variant: usize) -> Role {
        let layout = self.vm.mmu().profile().role_layout;
        let base = self.base_role.get().copied().unwrap_or_else(|| self.vm.mmu().root_role(false));
        let mut fields = layout.unpack(base);
        fields.cr0_wp ^= variant & 1 != 0;
        fields.efer_nx ^= variant & 2 != 0;
        layout.pack(&fields)
    }

    /// Books a time.
    pub(super) fn mark(&self, mark: Mark, ticks: u64) {
        lock(&self.collected).marks.entry(mark).or_default().record(P::ticks_to_ns(ticks));
    }

    fn vcpu_op(
        &self,
        vcpu: &mut Vcpu<'_, P>,
        id: usize,
        op: &Op,
        felt: &mut Felt,
        account: &mut Account,
    ) -> Result<(), LabError> {
        let paid = &mut account.paid;
        match *op {
            Op::SwitchRole(variant) => vcpu.switch_role(self.role(variant)),
            Op::EnterSmm => vcpu.enter_smm(),
            Op::Replace { pieces, level } => self.replace(vcpu, pieces, level, paid)?,
            Op::Load => {
                vcpu.root().map_err(internal("a root"))?;
            }
            Op::Unload => vcpu.unload(),
            Op::DropRoot { mark, times, sptes, by } => {
                let drops = Drops { mark, times, sptes, by };
                let done = AtomicU64::new(0);
                if times == 1 {
                    self.drop_root(vcpu, &drops, &done, paid)?;
                } else {
                    let fraction = || done.load(Ordering::Relaxed) as f64 / times as f64;
                    self.watched("dropping roots", fraction, || self.drop_root(vcpu, &drops, &done, paid))?;
                }
            }
            Op::Guest(ref code) => {
                let (writes, reads) = self.working_sets(id, code.pages, code.sharing);
                let plan = GuestPlan {
                    writes,
                    reads,
                    ascending: code.ascending,
                    migrate_ns: code.migrate_ns,
                    toggle_ns: code.toggle_ns,
                    rest_ns: code.rest_ns,
                    arrival_ns: code.arrival_ns,
                    write_percent: code.write_percent,
                    keeps_root: self.keeps_roots(),
                    seed: self.scenario.seed ^ (id as u64) << 32,
                };
                if code.warm {
                    // Everything mapped and most of it cached, before anybody measures.
                    guest::touch(vcpu, &plan.writes)?;
                }
                self.raise(Flag::WarmedUp);
                if let Some(meanwhile) = &mut account.meanwhile {
                    meanwhile.awake::<P>();
                }
                let until = code.until;
                let stop = || self.raised(until) > 0 || self.stopped();
                let got =
                    guest::run(vcpu, &plan, &self.window, stop, |task| account.look(&self.window, task))?;
                if self.stopped() {
                    return Err(LabError::Cancelled);
                }
                *felt = got;
            }
            Op::Halt => {
                while !vcpu.halt(Some(NAP_NS)) {
                    if self.stopped() {
                        return Err(LabError::Cancelled);
                    }
                    account.look(&self.window, vcpu.task());
                }
                let begin = P::ticks();
                let access = GuestAccess { gfn: 0, write: true, exec: false };
                vcpu.access(access).map_err(internal("an access after HLT"))?;
                self.mark(Mark::Wake, P::ticks() - begin);
                self.raise(Flag::Awake);
            }
            Op::Touch { pages, sharing } => {
                let touched = guest::touch(vcpu, &self.working_sets(id, pages, sharing).0)?;
                felt.visible_at = felt.visible_at.or(touched.first_at);
                let last = touched.last_at.unwrap_or(felt.last_fault_at);
                let mut all = lock(&self.collected);
                all.refaults.0 += touched.faults + felt.faults_after;
                all.refaults.1 = all.refaults.1.max(self.since_t0(last));
            }
            Op::SleepMs(ms) => sleep::<P>(Duration::from_millis(ms)),
            Op::Raise(flag) => self.raise(flag),
            Op::Await { flag, count } => self.wait_for(flag, count)?,
            _ => return Err(LabError::Usage(format!("{op:?} is for a thread of the VMM"))),
        }
        Ok(())
    }

    fn drop_root(
        &self,
        vcpu: &mut Vcpu<'_, P>,
        what: &Drops,
        done: &AtomicU64,
        paid: &mut Paid,
    ) -> Result<(), LabError> {
        let Drops { mark, times, sptes, by } = *what;
        let fail = internal("dropping a root");
        let (mut histogram, mut woken) = (Histogram::new(), Histogram::new());
        let queue = self.vm.mmu().design().queue();
        let wakes = || queue.map_or(0, ZapQueue::wakes);
        let big = mark == Mark::Drop && times == 1;
        for n in 0..times {
            if self.stopped() {
                return Err(LabError::Cancelled);
            }
            done.store(n, Ordering::Relaxed);
            for gfn in 0..sptes {
                let access =
                    GuestAccess { gfn: gfn * span(self.scenario.vm.level), write: true, exec: false };
                vcpu.access(access).map_err(&fail)?;
            }
            if !vcpu.enter().map_err(&fail)? {
                return Err(LabError::Cancelled);
            }
            let mut delayed = None;
            if big {
                vcpu.leave();
                self.open_window(vcpu.task(), vcpu.current_root());
                let _ = vcpu.task().meter().take();
                delayed = P::run_delay_ns();
                vcpu.enter().map_err(&fail)?;
                self.window.t0.store(P::ticks(), Ordering::Release);
            }
            let cpu = if big { P::thread_cpu_ns() } else { 0 };
            let asleep = wakes();
            // One stamp for the request and for its parts: what lies between two would be in one sum only.
            let begin = P::ticks();
            let before = if big { vcpu.task().meter().phase_ticks(begin) } else { [0; Phase::ALL.len()] };
            match by {
                Drop::Toggle => drop(vcpu.drop_root().map_err(&fail)?),
                Drop::Smi => {
                    vcpu.enter_smm();
                    vcpu.root().map_err(&fail)?;
                    vcpu.exit_smm();
                    vcpu.root().map_err(&fail)?;
                }
                Drop::Unload => vcpu.unload(),
            }
            let end = P::ticks();
            if big {
                paid.add(begin, end, &since(vcpu.task(), end, &before));
                paid.cpu_ns += P::thread_cpu_ns() - cpu;
                paid.delayed::<P>(delayed);
                paid.meter = Some(vcpu.task().meter().take());
            }
            histogram.record(P::ticks_to_ns(end - begin));
            if wakes() > asleep {
                woken.record(P::ticks_to_ns(end - begin));
            }
            if mark == Mark::Drop && !big {
                self.pace();
            }
        }
        let mut all = lock(&self.collected);
        all.marks.entry(mark).or_default().merge(&histogram);
        if mark == Mark::Drop && queue.is_some() {
            all.marks.entry(Mark::DropWoken).or_default().merge(&woken);
        }
        Ok(())
    }

    /// The first fault of each piece, timed.
    fn replace(
        &self,
        vcpu: &mut Vcpu<'_, P>,
        pieces: u64,
        level: u8,
        paid: &mut Paid,
    ) -> Result<(), LabError> {
        let fail = internal("a fault on a huge page");
        vcpu.leave();
        self.open_window(vcpu.task(), None);
        vcpu.enter().map_err(&fail)?;
        let _ = vcpu.task().meter().take();
        self.window.t0.store(P::ticks(), Ordering::Release);
        let delayed = P::run_delay_ns();
        let cpu = P::thread_cpu_ns();
        for piece in 0..pieces {
            let access = GuestAccess { gfn: piece * span(level), write: true, exec: false };
            let begin = P::ticks();
            let before = vcpu.task().meter().phase_ticks(begin);
            let outcome = vcpu.access(access).map_err(&fail)?;
            let end = P::ticks();
            paid.add(begin, end, &since(vcpu.task(), end, &before));
            if outcome == AccessOutcome::Stopped {
                return Err(LabError::Cancelled);
            }
            self.mark(Mark::Replace, end - begin);
        }
        paid.delayed::<P>(delayed);
        paid.cpu_ns += P::thread_cpu_ns() - cpu;
        paid.meter = Some(vcpu.task().meter().take());
        vcpu.leave();
        Ok(())
    }

    /// Between two drops of a loop: lets a worker finish, so that each drop is measured and not the backlog of those before.
    fn pace(&self) {
        if self.vm.mmu().ownership() == Ownership::Vcpu {
            let until = P::ticks() + P::ns_to_ticks(10_000_000);
            while self.vm.mmu().leaf_pages() != [0; 3] && P::ticks() < until {
                P::relax(Site::QueueFlush);
            }
        }
    }
}
