//! A small VM whose every SPTE change is heard.
#![allow(dead_code, reason = "not every test uses all of it")]

use std::sync::{Arc, Mutex};

use tdpmmu_platform::{Event, Observer, Real, Task};
use tdpmmu_spte::{KernelProfile, Spte};
use tdpmmu_vm::{Region, SlotFlags, Vcpu, Vm, VmConfig};

/// SPTE changes since the last look: (gfn, level, old, new).
#[derive(Default)]
pub struct Heard(Mutex<Vec<(u64, u8, u64, u64)>>);

impl Observer for Heard {
    fn event(&self, _task: u32, event: &Event) {
        if let Event::SpteChanged { gfn, level, old, new, .. } = *event {
            self.0.lock().expect("no panic").push((gfn, level, old, new));
        }
    }
}

impl Heard {
    /// What changed since the last call.
    pub fn take(&self) -> Vec<(u64, u8, u64, u64)> {
        std::mem::take(&mut self.0.lock().expect("no panic"))
    }
}

/// A VM of `profile`, edited, and what listens to it.
pub fn small(profile: &str, edit: impl FnOnce(&mut VmConfig)) -> (Vm<Real>, Arc<Heard>) {
    let heard = Arc::new(Heard::default());
    let mut config = VmConfig {
        max_tables: 4_000,
        hugepages: false,
        host_pages: 1 << 23,
        check_frames: true,
        batch: 1,
        observer: Some(heard.clone()),
        ..VmConfig::new(KernelProfile::named(profile).expect("known"))
    };
    edit(&mut config);
    (Vm::new(config).expect("a small VM"), heard)
}

/// Flags.
pub fn flags(log_dirty: bool, readonly: bool) -> SlotFlags {
    SlotFlags { log_dirty, readonly }
}

/// A new slot of address space 0, backed by new host memory that is mapped by pages of `level`.
pub fn slot(vm: &Vm<Real>, task: &Task<Real>, id: u16, base: u64, pages: u64, level: u8) -> Region {
    let hva = vm.side().primary.region(pages, base, level, true).expect("room");
    let region = Region { id, as_id: 0, base, pages, hva, flags: SlotFlags::default() };
    vm.set_memslot(task, &region).expect("free");
    region
}

/// The leaf that the vCPU's root has for `gfn`.
pub fn leaf(vcpu: &Vcpu<'_, Real>, gfn: u64) -> Option<(Spte, u8)> {
    vcpu.vm().mmu().lookup(vcpu.task(), vcpu.current_root()?, gfn)
}

/// The VM ends and nothing was wrong.
pub fn assert_clean(vm: &Vm<Real>) {
    let report = vm.close().expect("no handle is left");
    assert!(report.is_clean(), "{report:?}");
}
