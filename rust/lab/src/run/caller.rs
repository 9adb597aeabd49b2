//! What a thread of the VMM does: memslot updates, and waiting for the teardown.

use std::sync::atomic::Ordering;
use std::time::Duration;

use tdpmmu_platform::{Platform, Role as TaskRole};

use super::{P, Paid, Shared, internal, lock, setup::EXTRA_SLOT, setup::task_config};
use crate::LabError;
use crate::guest::Felt;
use crate::scenario::{Op, Who};

impl Shared<'_> {
    pub(super) fn caller_thread(&self, name: &str, ops: &[Op]) -> Result<(), LabError> {
        let task = self.vm.task_with(name, TaskRole::Caller, task_config(&self.scenario.vm));
        let mut paid = Paid::default();
        for op in ops {
            match *op {
                Op::DeleteMemslot => {
                    self.open_window(&task, None);
                    self.control.report("zapping", 0.0);
                    let _ = task.meter().take();
                    let (cpu, switches) = (P::thread_cpu_ns(), P::switches());
                    self.window.t0.store(P::ticks(), Ordering::Release);
                    let times = self
                        .vm
                        .delete_memslot(&task, 0, EXTRA_SLOT)
                        .map_err(internal("the memslot update"))?;
                    paid.cpu_ns += P::thread_cpu_ns() - cpu;
                    paid.switched_out += P::switches().involuntary - switches.involuntary;
                    // t0 is the entry of the fast-zap call; before it the ioctl swapped the slot arrays.
                    self.window.t0.store(times.t0, Ordering::Release);
                    lock(&self.collected).update = Some(times);
                }
                Op::AwaitTeardown => {
                    if lock(&self.collected).update.is_none() {
                        // Only waiting so far: not part of the teardown.
                        let _ = task.meter().take();
                    }
                    self.await_teardown(&task);
                    paid.meter = Some(task.meter().take());
                }
                Op::SleepMs(ms) => std::thread::sleep(Duration::from_millis(ms)),
                Op::Raise(flag) => self.raise(flag),
                Op::Await { flag, count } => self.wait_for(flag, count, || {})?,
                _ => return Err(LabError::Usage(format!("{op:?} is for a vCPU's thread"))),
            }
        }
        self.report(name, Who::Caller, &task, &mut paid, Felt::default());
        Ok(())
    }
}
