//! What the VMM's threads do: memslot updates, waiting for the teardown, and what comes in between from elsewhere.

use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use tdpmmu_platform::{Platform, Role as TaskRole, Task};
use tdpmmu_spte::geometry::span;
use tdpmmu_vm::slots::Region;
use tdpmmu_vm::{FastZapTimes, SlotFlags, SlotUpdate};

use super::setup::{Regions, task_config};
use super::{Account, Paid, Shared, internal, lock, sleep};
use crate::LabError;
use crate::guest::Felt;
use crate::scenario::{Flag, Intruder, Mark, Op, Update, Who};

/// Notifier calls come so often.
const NOTIFIER_PAUSE: Duration = Duration::from_millis(1);
/// Who churns waits so long for the guest to touch its memory again.
const FULL_NS: u64 = 5_000_000_000;
/// At most so many pages are unmapped.
const NOTIFIER_PAGES: u64 = 256;

/// [`Op::Churn`].
struct Churn {
    cycles: u64,
    pause_us: u64,
    full: u64,
}

impl<P: Platform> Shared<'_, P> {
    pub(super) fn vmm_thread(&self, name: &str, who: Who, ops: &[Op]) -> Result<(), LabError> {
        let task = self.vm.task_with(name, TaskRole::Caller, task_config(&self.scenario.vm));
        let mut account = self.account(who);
        for op in ops {
            self.vmm_op(&task, op, &mut account)?;
            account.look(&self.window, &task);
        }
        self.report(name, who, &task, account, Felt::default());
        Ok(())
    }

    fn vmm_op(&self, task: &Task<P>, op: &Op, account: &mut Account) -> Result<(), LabError> {
        let paid = &mut account.paid;
        match *op {
            Op::Zap(update) => {
                self.control.report("zapping", 0.0);
                let _ = self.zap(task, update, paid)?;
            }
            Op::Churn { cycles, pause_us, full } => {
                let done = AtomicU64::new(0);
                let fraction = || done.load(Ordering::Relaxed) as f64 / cycles as f64;
                self.watched("zapping", fraction, || {
                    self.churn(task, &Churn { cycles, pause_us, full }, &done, paid)
                })?;
            }
            Op::AwaitTeardown => self.await_teardown(task),
            Op::ReleaseUser => drop(self.vm.release_user()),
            Op::StartDirtyLog => {
                self.control.report("splitting", 0.0);
                let begin = P::ticks();
                for slot in self.vm.slots().space(0).iter().filter(|slot| slot.base < self.pages()) {
                    let flags = SlotFlags { log_dirty: true, ..slot.flags };
                    let region = Region {
                        id: slot.id,
                        as_id: slot.as_id,
                        base: slot.base,
                        pages: slot.pages,
                        hva: slot.hva,
                        flags,
                    };
                    self.set_slot(task, &region)?;
                }
                self.mark(Mark::Prepare, P::ticks() - begin);
            }
            Op::Promote { pieces, level } => {
                let gfns = 0..pieces * span(level);
                let made = self.vm.promote_gfns(task, gfns.clone(), level).map_err(internal("the host"))?;
                if made != gfns.end {
                    return Err(LabError::Internal(format!(
                        "the host collapsed {made} of {} pages",
                        gfns.end
                    )));
                }
            }
            Op::Intrude(what) => self.intrude(task, what, account)?,
            Op::Wake(vcpu) => {
                // A wake-up that comes before the sleep is lost: again, until the sleeper says so.
                while self.raised(Flag::Awake) == 0 {
                    if self.stopped() {
                        return Err(LabError::Cancelled);
                    }
                    self.vm.wake(vcpu);
                    sleep::<P>(Duration::from_micros(50));
                }
            }
            Op::SleepMs(ms) => sleep::<P>(Duration::from_millis(ms)),
            Op::Raise(flag) => self.raise(flag),
            Op::Await { flag, count } => self.wait_for(flag, count)?,
            _ => return Err(LabError::Usage(format!("{op:?} is for a vCPU's thread"))),
        }
        Ok(())
    }

    fn regions(&self) -> Result<&Regions, LabError> {
        self.regions.get().ok_or_else(|| LabError::Internal("the memslots were not prepared".into()))
    }

    fn set_slot(&self, task: &Task<P>, region: &Region) -> Result<SlotUpdate, LabError> {
        self.vm.set_memslot(task, region).map_err(internal("a memslot update"))
    }

    fn churn(
        &self,
        task: &Task<P>,
        churn: &Churn,
        done: &AtomicU64,
        paid: &mut Paid,
    ) -> Result<(), LabError> {
        for _ in 0..churn.cycles {
            self.until_mapped(churn.full);
            if self.stopped() {
                return Err(LabError::Cancelled);
            }
            let deleted = self.zap(task, Update::Delete, paid)?;
            let begin = P::ticks();
            self.set_slot(task, &self.regions()?.extra)?;
            self.mark(Mark::Cycle, P::ns_to_ticks(deleted.total_ns) + P::ticks() - begin);
            sleep::<P>(Duration::from_micros(churn.pause_us));
            done.fetch_add(1, Ordering::Relaxed);
        }
        Ok(())
    }

    /// Waits until so many leaves are mapped, five seconds at most.
    fn until_mapped(&self, leaves: u64) {
        let until = P::ticks() + P::ns_to_ticks(FULL_NS);
        while !self.is_mapped(leaves) && P::ticks() < until && !self.stopped() {
            sleep::<P>(Duration::from_millis(1));
        }
    }

    /// One update, timed. The first one opens the window.
    fn zap(&self, task: &Task<P>, update: Update, paid: &mut Paid) -> Result<FastZapTimes, LabError> {
        let first = paid.meter.is_none();
        if first {
            self.open_window(task, None);
        }
        let _ = task.meter().take();
        let delayed = P::run_delay_ns();
        let (cpu, switches) = (P::thread_cpu_ns(), P::switches());
        if first {
            self.window.t0.store(P::ticks(), Ordering::Release);
        }
        let times = self.update(task, update)?;
        self.window.updates.fetch_add(1, Ordering::Relaxed);
        self.returned(times.t0 + P::ns_to_ticks(times.total_ns));
        paid.cpu_ns += P::thread_cpu_ns() - cpu;
        paid.switched_out += P::switches().involuntary - switches.involuntary;
        paid.delayed::<P>(delayed);
        paid.add(times.t0, times.t0 + P::ns_to_ticks(times.total_ns), &times.phase_ticks);
        let meter = task.meter().take();
        match &mut paid.meter {
            Some(sum) => sum.merge(&meter),
            none => *none = Some(meter),
        }
        if first {
            // t0 is the entry of the fast-zap call; before it the ioctl swapped the slot arrays.
            self.window.t0.store(times.t0, Ordering::Release);
        }
        // What is still mapped under a root that this zap has invalidated: P-FZ says nothing.
        let left = P::quiet(|| self.stale_leaves(task));
        let mut all = lock(&self.collected);
        all.mapped_at_return = all.mapped_at_return.max(left);
        all.marks.entry(Mark::Update).or_default().record(times.total_ns);
        // Of many updates the one at t0: what it had to zap is what was counted there.
        all.update.get_or_insert(times);
        Ok(times)
    }

    fn update(&self, task: &Task<P>, update: Update) -> Result<FastZapTimes, LabError> {
        let regions = self.regions()?;
        let done = match update {
            Update::Delete => self.set_slot(task, &Region { pages: 0, ..regions.extra })?,
            Update::Move => self.set_slot(task, &regions.moved)?,
            Update::NxToggle => return self.vm.fast_zap(task).map_err(internal("the fast zap")),
        };
        match done {
            SlotUpdate::Deleted(times) | SlotUpdate::Moved(times) => Ok(times),
            other => Err(LabError::Internal(format!("{update:?} came to {other:?}"))),
        }
    }

    /// From t0 until the teardown is over.
    fn intrude(&self, task: &Task<P>, what: Intruder, account: &mut Account) -> Result<(), LabError> {
        while self.window.t0.load(Ordering::Acquire) == 0 {
            if self.stopped() {
                return Err(LabError::Cancelled);
            }
            sleep::<P>(Duration::from_micros(20));
        }
        account.look(&self.window, task);
        let timed = |call: &dyn Fn() -> Result<(), LabError>| {
            let begin = P::ticks();
            call()?;
            self.mark(Mark::Waiting, P::ticks() - begin);
            Ok(())
        };
        match what {
            Intruder::Update => timed(&|| self.set_slot(task, &self.regions()?.other).map(drop)),
            Intruder::Notifier => {
                let spec = &self.scenario.vm;
                let (pages, span) = (self.pages(), span(spec.level));
                // From the end of memory down, a quarter of it at most.
                for n in 1..=(pages / span / 4).clamp(1, NOTIFIER_PAGES) {
                    if self.stopped() || self.window.end.load(Ordering::Acquire) != 0 {
                        break;
                    }
                    let gfn = pages - n * span;
                    timed(&|| {
                        let unmapped = self.vm.unmap_gfns(task, gfn..gfn + 1, true);
                        unmapped.map(drop).map_err(internal("a notifier"))
                    })?;
                    sleep::<P>(NOTIFIER_PAUSE);
                }
                Ok(())
            }
        }
    }
}
