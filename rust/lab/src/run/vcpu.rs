//! What a vCPU's thread does: guest code, root drops, waits.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tdpmmu_platform::{Histogram, Platform, Site};
use tdpmmu_spte::Ownership;
use tdpmmu_spte::geometry::{page_bytes, span};
use tdpmmu_vm::{GuestAccess, Vcpu};

use super::{P, Paid, Shared, internal, lock, setup::task_config};
use crate::LabError;
use crate::guest::{self, Felt, GuestPlan, WorkingSet};
use crate::scenario::{Flag, Mark, Op, Who};

impl Shared<'_> {
    pub(super) fn vcpu_thread(&self, name: &str, id: usize, ops: &[Op]) -> Result<(), LabError> {
        let mut vcpu = self.vm.vcpu_with(id, task_config(&self.scenario.vm)).map_err(internal("a vCPU"))?;
        let mut felt = Felt::default();
        let mut paid = Paid::default();
        for op in ops {
            self.vcpu_op(&mut vcpu, id, op, &mut felt, &mut paid)?;
        }
        vcpu.leave();
        self.report(name, Who::Vcpu(id), vcpu.task(), &mut paid, felt);
        Ok(())
    }

    fn working_set(&self, id: usize, pages: u64) -> WorkingSet {
        let spec = &self.scenario.vm;
        let gfns = spec.memory_bytes / page_bytes(1);
        WorkingSet::new(id, self.guests, pages, span(spec.level), gfns)
    }

    fn vcpu_op(
        &self,
        vcpu: &mut Vcpu<'_, P>,
        id: usize,
        op: &Op,
        felt: &mut Felt,
        paid: &mut Paid,
    ) -> Result<(), LabError> {
        match *op {
            Op::SwitchRole => {
                let layout = self.vm.mmu().profile().role_layout;
                let mut fields = layout.unpack(vcpu.role());
                fields.cr0_wp = !fields.cr0_wp;
                vcpu.switch_role(layout.pack(&fields));
            }
            Op::Load => {
                vcpu.root().map_err(internal("a root"))?;
            }
            Op::Unload => vcpu.unload(),
            Op::DropRoot { mark, times, sptes } => self.drop_root(vcpu, mark, times, sptes, paid)?,
            Op::Guest { pages, arrival_ns, write_percent, until } => {
                let plan = GuestPlan {
                    set: self.working_set(id, pages),
                    arrival_ns,
                    write_percent,
                    seed: self.scenario.seed ^ (id as u64) << 32,
                };
                // Everything mapped and most of it cached, before anybody measures.
                guest::touch(vcpu, &plan.set)?;
                self.raise(Flag::WarmedUp);
                let _ = vcpu.task().meter().take();
                let got = guest::run(vcpu, &plan, &self.window, || self.raised(until) > 0 || self.stopped())?;
                if self.stopped() {
                    return Err(LabError::Cancelled);
                }
                *felt = got;
            }
            Op::Touch { pages } => {
                let touched = guest::touch(vcpu, &self.working_set(id, pages))?;
                felt.visible_at = felt.visible_at.or(touched.first_at);
                let last = touched.last_at.unwrap_or(felt.last_fault_at);
                let mut all = lock(&self.collected);
                all.refaults.0 += touched.faults + felt.faults_after;
                all.refaults.1 = all.refaults.1.max(self.since_t0(last));
            }
            Op::SleepMs(ms) => std::thread::sleep(Duration::from_millis(ms)),
            Op::Raise(flag) => self.raise(flag),
            Op::Await { flag, count } => self.wait_for(flag, count, || {})?,
            Op::DeleteMemslot | Op::AwaitTeardown => {
                return Err(LabError::Usage("memslot updates are made by the caller's thread".into()));
            }
        }
        Ok(())
    }

    fn drop_root(
        &self,
        vcpu: &mut Vcpu<'_, P>,
        mark: Mark,
        times: u64,
        sptes: u64,
        paid: &mut Paid,
    ) -> Result<(), LabError> {
        let fail = internal("dropping a root");
        let mut histogram = Histogram::new();
        let big = mark == Mark::Drop && times == 1;
        for n in 0..times {
            if n % 256 == 0 {
                if self.stopped() {
                    return Err(LabError::Cancelled);
                }
                self.control.report("dropping roots", n as f64 / times as f64);
            }
            for gfn in 0..sptes {
                let access =
                    GuestAccess { gfn: gfn * span(self.scenario.vm.level), write: true, exec: false };
                vcpu.access(access).map_err(&fail)?;
            }
            if !vcpu.enter().map_err(&fail)? {
                return Err(LabError::Cancelled);
            }
            if big {
                vcpu.leave();
                self.open_window(vcpu.task(), vcpu.current_root());
                let _ = vcpu.task().meter().take();
                vcpu.enter().map_err(&fail)?;
                self.window.t0.store(P::ticks(), Ordering::Release);
            }
            let cpu = if big { P::thread_cpu_ns() } else { 0 };
            let begin = P::ticks();
            vcpu.drop_root().map_err(&fail)?;
            let end = P::ticks();
            if big {
                paid.cpu_ns += P::thread_cpu_ns() - cpu;
                paid.meter = Some(vcpu.task().meter().take());
            }
            histogram.record(P::ticks_to_ns(end - begin));
            if mark == Mark::Drop && !big {
                self.pace();
            }
        }
        lock(&self.collected).marks.entry(mark).or_default().merge(&histogram);
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
