//! The log that hardware keeps by itself where dirty pages are told by D bits (Intel's PML).
//!
//! **Guarantee.** A page whose D bit the walker sets while some slot logs is in the vCPU's log in the same guest entry, and in the slot's bitmap or ring before that guest entry has ended.
//! [`Vm::sync_hardware_logs`] returns when every write before it has got that far.
//!
//! **Mechanism.** 512 gfns a vCPU, its own; a full log is an exit of its own. KVM kicks and does not wait (a late page is in the next log); here the kick is waited for, so that a
//! harvest has what was written before it.

use tdpmmu_mmu::MmuHost;
use tdpmmu_platform::{Platform, Role as TaskRole};

use crate::dirty::DirtyMode;
use crate::request;
use crate::ring::HARDWARE_LOG;
use crate::{Vcpu, Vm};

/// One vCPU's log.
#[derive(Debug, Default)]
pub(crate) struct HardwareLog(Vec<u64>);

impl HardwareLog {
    /// Logs `gfn`; true: the log is full.
    pub(crate) fn push(&mut self, gfn: u64) -> bool {
        self.0.push(gfn);
        self.0.len() >= HARDWARE_LOG as usize
    }

    pub(crate) fn is_empty(&self) -> bool {
        self.0.is_empty()
    }
}

impl<P: Platform> Vm<P> {
    /// Makes every vCPU leave the guest entry that it is in, and so hand its log over. For a task without vCPU; nothing where no log is kept.
    pub(crate) fn sync_hardware_logs(&self) {
        if self.protocol.mode() == DirtyMode::DBits {
            let task = self.task("sync", TaskRole::Observer);
            self.side().request_all(&task, request::OUTSIDE_GUEST | request::WAIT | request::NO_WAKEUP);
        }
    }
}

impl<P: Platform> Vcpu<'_, P> {
    /// Hands the log over, as each exit does.
    #[cold]
    pub(crate) fn flush_hardware_log(&mut self) {
        let side = self.vm.side();
        let as_id = self.core.mmu.role.as_id();
        for gfn in std::mem::take(&mut self.core.hardware_log.0) {
            MmuHost::<P>::gfn_dirty(side, &self.task, as_id, gfn);
        }
    }
}
