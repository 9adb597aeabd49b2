//! What a thread can do: each variant is one entry into KVM, one guest access, or one meeting of threads.

use serde::{Deserialize, Serialize};

use super::SlotSpec;

/// One operation. Gfns and host pages are in 4 KiB units; host pages count from the beginning of the program's host memory.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "act", rename_all = "kebab-case", deny_unknown_fields)]
pub enum Act {
    /// The guest makes an access, and it completes: by the TLB, by a walk, or by as many faults as it takes. The vCPU stays in the guest.
    Access {
        /// Where.
        gfn: u64,
        /// A write.
        #[serde(default)]
        write: bool,
        /// An instruction fetch.
        #[serde(default)]
        exec: bool,
    },
    /// The hardware walker runs ahead of the program and fills its caches, if the vCPU is in the guest.
    Speculate {
        /// Where.
        gfn: u64,
    },
    /// A walk without mmu_lock under the vCPU's current root.
    LookUp {
        /// Where.
        gfn: u64,
    },
    /// Enters the guest: requests are serviced, a root is loaded.
    Enter,
    /// Answers a kick if there is one, and is in the guest afterwards.
    Poll,
    /// Leaves the guest.
    Leave,
    /// Loads a root, if none is loaded, without entering the guest.
    LoadRoot,
    /// Puts every root and loads one: CR0.WP toggled.
    DropRoot,
    /// Puts every root.
    Unload,
    /// Wants a root of role variant 0..=7 from now on: bit 0 CR0.WP toggled, bit 1 EFER.NX, bit 2 an L2 (guest mode).
    SwitchRole {
        /// The variant.
        variant: u8,
    },
    /// An SMI.
    EnterSmm,
    /// RSM.
    ExitSmm,
    /// KVM_PRE_FAULT_MEMORY.
    PreFault {
        /// First gfn.
        gfn: u64,
        /// How many.
        pages: u64,
    },

    /// The guest maps a page in a process, by its own stores to its tables (L1 does, if an L2 runs: that has exited then); nothing is flushed.
    GuestMap {
        /// Which process, from 0.
        process: usize,
        /// The page.
        gva: u64,
        /// The frame.
        gfn: u64,
        /// Writable.
        #[serde(default = "yes")]
        write: bool,
    },
    /// The guest takes a page out of a process; nothing is flushed.
    GuestUnmap {
        /// Which process, from 0.
        process: usize,
        /// The page.
        gva: u64,
    },
    /// INVLPG.
    Invlpg {
        /// The page.
        gva: u64,
    },
    /// The guest flushes its TLB on this vCPU.
    FlushGuestTlb,
    /// MOV to CR3.
    SetCr3 {
        /// Which process from now on.
        process: usize,
    },
    /// L1 runs an L2 on the nested tables of that process: from here on accesses are L2's.
    EnterL2 {
        /// Which process.
        process: usize,
    },
    /// L2 exits to L1.
    LeaveL2,
    /// A walk of shadow pages without mmu_lock, under the reclamation in use.
    WalkShadow {
        /// The page.
        gva: u64,
    },

    /// KVM_SET_USER_MEMORY_REGION: a new slot.
    CreateSlot(SlotSpec),
    /// The slot goes: INVALID, fast zap, gone.
    DeleteSlot {
        /// Address space.
        #[serde(default)]
        as_id: u8,
        /// Slot id.
        id: u16,
    },
    /// The same memory at another gfn.
    MoveSlot {
        /// Address space.
        #[serde(default)]
        as_id: u8,
        /// Slot id.
        id: u16,
        /// Its first gfn from now on.
        gfn: u64,
    },
    /// Dirty logging on or off.
    SetSlotFlags {
        /// Address space.
        #[serde(default)]
        as_id: u8,
        /// Slot id.
        id: u16,
        /// KVM_MEM_LOG_DIRTY_PAGES.
        log: bool,
    },
    /// Everything is zapped, as by an nx_huge_pages toggle, without a change of a slot.
    FastZap,
    /// KVM_X86_QUIRK_SLOT_ZAP_ALL: off, a deletion zaps the slot's leaves alone.
    SetSlotZapAll {
        /// On: everything is zapped.
        on: bool,
    },
    /// Writes the module parameter nx_huge_pages.
    SetNx {
        /// Its value.
        on: bool,
    },
    /// A period of the NX recovery thread.
    RecoverNx {
        /// One of so many is recovered.
        ratio: u32,
    },
    /// kvm_zap_gfn_range.
    ZapRange {
        /// First gfn.
        gfn: u64,
        /// How many.
        pages: u64,
    },
    /// kvm_mmu_slot_gfn_write_protect.
    WriteProtect {
        /// Address space.
        #[serde(default)]
        as_id: u8,
        /// Which.
        gfn: u64,
    },

    /// The host takes pages away: notifier begin, the unmap, notifier end; the frames are re-issued at once.
    Unmap {
        /// First host page.
        hva_page: u64,
        /// How many.
        pages: u64,
        /// False: the OOM reaper, which must not wait.
        #[serde(default = "yes")]
        may_block: bool,
    },
    /// The host puts another frame behind a page (KSM, migration, copy on write).
    ReplacePage {
        /// Host page.
        hva_page: u64,
        /// Writable from now on.
        writable: bool,
    },
    /// The notifier's change_pte alone, with a frame that the host has there already (kernels up to 6.9).
    ChangePte {
        /// Host page.
        hva_page: u64,
        /// Writable from now on.
        writable: bool,
    },
    /// clear_young.
    Age {
        /// First host page.
        hva_page: u64,
        /// How many.
        pages: u64,
    },
    /// clear_flush_young.
    AgeFlush {
        /// First host page.
        hva_page: u64,
        /// How many.
        pages: u64,
    },
    /// test_young.
    TestAge {
        /// First host page.
        hva_page: u64,
        /// How many.
        pages: u64,
    },
    /// The host maps aligned pieces of a gfn range by larger pages from now on (khugepaged).
    SetHostLevel {
        /// First gfn.
        gfn: u64,
        /// How many.
        pages: u64,
        /// 2 or 3.
        level: u8,
    },

    /// KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2.
    SetLogProtect {
        /// GET only reads; CLEAR protects.
        manual: bool,
        /// A new log begins all dirty.
        #[serde(default)]
        initially_set: bool,
    },
    /// Module parameter eager_page_split.
    SetEagerSplit {
        /// Its value.
        on: bool,
    },
    /// KVM_GET_DIRTY_LOG.
    GetDirtyLog {
        /// Address space.
        #[serde(default)]
        as_id: u8,
        /// Slot id.
        id: u16,
    },
    /// KVM_CLEAR_DIRTY_LOG of 64 pages, or as many as are left in the slot.
    ClearDirtyLog {
        /// Address space.
        #[serde(default)]
        as_id: u8,
        /// Slot id.
        id: u16,
        /// First page, a multiple of 64.
        #[serde(default)]
        first: u64,
        /// Which of them.
        mask: u64,
    },
    /// Harvests the dirty rings of all vCPUs.
    CollectRings,
    /// KVM_RESET_DIRTY_RINGS.
    ResetRings,

    /// The last file descriptor of the VM is closed.
    ReleaseUser,
    /// Waits for a grace period.
    Synchronize,
    /// Waits until everything that was given to RCU is freed.
    RcuBarrier,
    /// Waits until the workers have nothing left.
    FlushWorkers,
    /// Asks every vCPU to leave its run loop.
    StopVcpus,
    /// Lets them run again.
    ResumeVcpus,
    /// The end of the VM. Refused (a result, no failure) while a vCPU's thread is alive.
    Close,

    /// How often the thread has held mmu_lock exclusively until now.
    ExclusiveHolds,

    /// Waits until the flag is raised. A vCPU leaves the guest first.
    WaitFor {
        /// Which, below [`Act::FLAGS`].
        flag: u8,
    },
    /// Raises a flag for good.
    Raise {
        /// Which, below [`Act::FLAGS`].
        flag: u8,
    },
    /// Lets others run.
    Yield,
}

fn yes() -> bool {
    true
}

impl Act {
    /// Flags that a program has.
    pub const FLAGS: u8 = 16;

    /// A read.
    pub const fn read(gfn: u64) -> Self {
        Act::Access { gfn, write: false, exec: false }
    }

    /// A write.
    pub const fn write(gfn: u64) -> Self {
        Act::Access { gfn, write: true, exec: false }
    }

    /// A fetch.
    pub const fn fetch(gfn: u64) -> Self {
        Act::Access { gfn, write: false, exec: true }
    }

    /// Only the thread of a vCPU can do it.
    pub const fn needs_vcpu(&self) -> bool {
        matches!(
            self,
            Act::Access { .. }
                | Act::Speculate { .. }
                | Act::LookUp { .. }
                | Act::Enter
                | Act::Poll
                | Act::Leave
                | Act::LoadRoot
                | Act::DropRoot
                | Act::Unload
                | Act::SwitchRole { .. }
                | Act::EnterSmm
                | Act::ExitSmm
                | Act::PreFault { .. }
                | Act::GuestMap { .. }
                | Act::GuestUnmap { .. }
                | Act::Invlpg { .. }
                | Act::FlushGuestTlb
                | Act::SetCr3 { .. }
                | Act::EnterL2 { .. }
                | Act::LeaveL2
                | Act::WalkShadow { .. }
        )
    }

    /// The act as one word of a story, with its operands.
    pub fn title(&self) -> String {
        let Ok(serde_json::Value::Object(fields)) = serde_json::to_value(self) else { return String::new() };
        let mut text = fields.get("act").and_then(|v| v.as_str()).unwrap_or_default().to_owned();
        for (name, value) in fields.iter().filter(|(name, _)| *name != "act") {
            match (name.as_str(), value) {
                ("as_id", v) if *v == 0 => {}
                ("pages", v) if *v == 1 => {}
                (_, serde_json::Value::Bool(false)) => {}
                (name, serde_json::Value::Bool(true)) => text += &format!(" {name}"),
                (name, serde_json::Value::Number(n))
                    if name == "gfn" || name == "gva" || name.starts_with("hva") =>
                {
                    text += &format!(" {name}={:#x}", n.as_u64().unwrap_or_default());
                }
                (name, value) => text += &format!(" {name}={value}"),
            }
        }
        text
    }
}
