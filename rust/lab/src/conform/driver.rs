//! Inputs become operations of the engine.
//!
//! **Guarantee.** Each input is carried out once, whole, at its place in the order; what the kernel refused is not tried; nothing is taken from the recording but what an input
//! can say. What the engine refuses although the kernel did it is written down as a difference.
//!
//! **Mechanism.** A thread of the stage serves its inputs in a loop. While it is in KVM_RUN it holds its vCPU, as the kernel's thread does, and serves notifications in between
//! like the kernel, which takes them inside a fault.

use std::collections::HashMap;
use std::sync::Arc;

use tdpmmu_mmu::TdpMmu;
use tdpmmu_platform::{Platform, Real, Role, Task};
use tdpmmu_spte::WriteBack;
use tdpmmu_spte::geometry::{index, round_down, span};
use tdpmmu_vm::{FaultOutcome, GuestAccess, HostAnswer, Region, SlotFlags, Vcpu, Vm, VmError};

use super::host::Slot;
use super::inputs::{AccessKind, Input, Landed, NO_OP, What};
use super::load::Case;
use super::machine::{Machine, World};
use super::predict::Outcome;
use super::script::{Operation, number};
use super::thread::{PATIENCE, Stage};

const KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2: u64 = 168;
const KVM_CAP_DISABLE_QUIRKS2: u64 = 213;
const QUIRK_SLOT_ZAP_ALL: u64 = 1 << 7;
const PAGE: u64 = 4096;

/// A thread of the stage.
pub struct Actor<'a> {
    case: &'a Case,
    world: &'a World,
    stage: &'a Stage,
    thread: u32,
    tasks: HashMap<u64, Task<Real>>,
}

impl<'a> Actor<'a> {
    /// The thread with this index.
    pub fn new(case: &'a Case, world: &'a World, stage: &'a Stage, thread: u32) -> Self {
        Self { case, world, stage, thread, tasks: HashMap::new() }
    }

    /// Serves this thread's inputs to the end.
    pub fn run(mut self) {
        let mut taken = self.stage.take(self.thread);
        while let Some(at) = taken {
            let input = self.case.inputs[at];
            if self.guest(&input).is_some()
                && let Some(machine) = self.world.machine(self.vm_of(&input))
            {
                taken = self.in_guest(&machine, at);
                continue;
            }
            if let Err(why) = self.carry_out(at, &input) {
                self.note(at, why);
            }
            self.stage.release(self.thread);
            taken = self.stage.take(self.thread);
        }
    }

    fn note(&self, at: usize, why: String) {
        self.world.scribe.book().notes.push((at as u32, why));
    }

    fn operation(&self, op: u32) -> Option<&'a Operation> {
        self.case.script.operations.get(op as usize).filter(|_| op != NO_OP)
    }

    fn vm_of(&self, input: &Input) -> Option<u64> {
        self.operation(input.op).and_then(Operation::vm)
    }

    /// The vCPU that an input of a guest means.
    fn guest(&self, input: &Input) -> Option<u32> {
        let of_op = || u32::try_from(self.operation(input.op)?.number_of("vcpu")?).ok();
        match input.what {
            What::Enter | What::Walk { .. } => of_op(),
            What::Fault { vcpu, .. } => Some(vcpu),
            What::Map { vcpu, .. } => vcpu.or_else(of_op),
            _ => None,
        }
    }

    /// Holds a vCPU from input `at` on, until an input that another hold, or none, is needed for. Returns that one.
    fn in_guest(&mut self, machine: &Arc<Machine>, at: usize) -> Option<usize> {
        let first = self.case.inputs[at];
        let id = self.guest(&first)?;
        let mut vcpu = match machine.vm.vcpu_with(id as usize, self.world.task_config()) {
            Ok(vcpu) => vcpu,
            Err(error) => {
                self.note(at, error.to_string());
                self.stage.release(self.thread);
                return self.stage.take(self.thread);
            }
        };
        let mut taken = Some(at);
        while let Some(at) = taken {
            let input = self.case.inputs[at];
            let done = match input.what {
                What::Unmap { .. }
                | What::Age { .. }
                | What::Restart { .. }
                | What::Resume { .. }
                | What::Stat => self.carry_out(at, &input),
                What::Smm { vcpu: of, entering } if of == id => {
                    if entering {
                        vcpu.enter_smm();
                    } else {
                        vcpu.exit_smm();
                    }
                    Ok(())
                }
                What::Enter | What::Fault { .. } | What::Map { .. } | What::Walk { .. }
                    if self.guest(&input) == Some(id) && self.vm_of(&input) == self.vm_of(&first) =>
                {
                    self.fault(machine, &mut vcpu, &input)
                }
                _ => {
                    drop(vcpu);
                    return Some(at);
                }
            };
            if let Err(why) = done {
                self.note(at, why);
            }
            self.stage.release(self.thread);
            taken = self.stage.take(self.thread);
        }
        None
    }

    /// Requests are serviced and a root is loaded, as on the way into the guest.
    fn enter(vcpu: &mut Vcpu<'_, Real>) -> Result<(), String> {
        match vcpu.reload() {
            // A ring that is nearly full is an exit to user space (kvm_dirty_ring_exit), not a failure; nothing is serviced before it.
            Ok(_) | Err(VmError::RingFull { .. }) => Ok(()),
            Err(error) => Err(error.to_string()),
        }
    }

    fn fault(&self, machine: &Machine, vcpu: &mut Vcpu<'_, Real>, input: &Input) -> Result<(), String> {
        let access = |gfn, kind: AccessKind| GuestAccess { gfn, write: kind.write, exec: kind.exec };
        match input.what {
            What::Enter => Self::enter(vcpu),
            What::Fault { gfn, access: kind, present, .. } => {
                if !self.case.has_entries || vcpu.current_root().is_none() {
                    Self::enter(vcpu)?;
                }
                if present && kind.write {
                    let outcome = vcpu.fast_fault(access(gfn, kind), true);
                    if matches!(outcome, Some(FaultOutcome::Fast(_))) {
                        write_again(machine.vm.mmu(), vcpu, gfn);
                    }
                }
                Ok(())
            }
            What::Map { gfn, pfn, level, access: kind, prefetch, landed, .. } => {
                let as_id = vcpu.role().as_id();
                let hidden = kind.exec && machine.vm.mmu().nx_huge_pages();
                let host_level = {
                    let mut host = self.world.host();
                    host.faulted(machine.id, as_id, gfn, level, hidden);
                    let page = host.page_at(machine.id, as_id, gfn);
                    page.map_or(level, |page| host.level(page))
                };
                let writable = match landed {
                    Landed::Lost => return Ok(()),
                    Landed::Mmio => true,
                    Landed::Page { writable } => writable,
                };
                let answer = HostAnswer { pfn, level, host_level: host_level.max(level), writable };
                let outcome = match landed {
                    Landed::Mmio => vcpu.map_mmio(access(gfn, kind), prefetch),
                    _ => vcpu.map_page(access(gfn, kind), answer, prefetch),
                };
                let outcome = outcome.map_err(|e| e.to_string())?;
                if kind.write && !prefetch && matches!(outcome, FaultOutcome::Fixed { .. }) {
                    write_again(machine.vm.mmu(), vcpu, gfn);
                }
                Ok(())
            }
            What::Walk { gfn } => self.walk(machine, vcpu, input, gfn),
            _ => Ok(()),
        }
    }

    /// A recording without fault events: the frame is invented, the level is what the memory's kind promises.
    fn walk(
        &self,
        machine: &Machine,
        vcpu: &mut Vcpu<'_, Real>,
        input: &Input,
        gfn: u64,
    ) -> Result<(), String> {
        if !self.case.has_entries || vcpu.current_root().is_none() {
            Self::enter(vcpu)?;
        }
        let mode = self.operation(input.op).map_or("read", |op| op.text_of("mode"));
        let write = matches!(mode, "write" | "rmw");
        let access = GuestAccess { gfn, write, exec: mode == "exec" };
        let as_id = vcpu.role().as_id();
        let found = {
            let host = self.world.host();
            host.page_at(machine.id, as_id, gfn).map(|page| (page, host.level(page)))
        };
        let Some((page, level)) = found else {
            return vcpu.map_mmio(access, false).map(|_| ()).map_err(|e| e.to_string());
        };
        // Congruent to the host's address up to 1 GiB, so that huge frames are aligned.
        let pfn = 1 << 27 | page & ((1 << 26) - 1);
        let answer = HostAnswer { pfn, level, host_level: level, writable: true };
        vcpu.map_page(access, answer, false).map_err(|e| e.to_string())?;
        if write {
            write_again(machine.vm.mmu(), vcpu, gfn);
        }
        Ok(())
    }

    fn with_task<R>(&mut self, machine: &Machine, body: impl FnOnce(&Vm<Real>, &Task<Real>) -> R) -> R {
        let name = &self.case.threads[self.thread as usize];
        let config = self.world.task_config();
        let task =
            self.tasks.entry(machine.id).or_insert_with(|| machine.vm.task_with(name, Role::Caller, config));
        body(&machine.vm, task)
    }

    fn carry_out(&mut self, at: usize, input: &Input) -> Result<(), String> {
        match input.what {
            What::Script => match self.operation(input.op) {
                Some(op) => self.script(input.op, op),
                None => Ok(()),
            },
            What::Unmap { start, end, inner } => {
                let (start, end) = (start / PAGE, end.div_ceil(PAGE));
                // From 6.13 on, with Dirty written back at creation, a write to the huge zero page gets a huge page.
                let keeps = self.world.profile.write_back == WriteBack::AtCreation;
                let within = self.operation(input.op).is_some_and(|op| op.kind == "touch");
                self.world.host().taken(start, end, inner && !(keeps && within));
                for machine in self.world.all() {
                    self.with_task(&machine, |vm, task| vm.notifier_unmap(task, start..end))
                        .map_err(|e| e.to_string())?;
                }
                Ok(())
            }
            What::Age { start, end } => {
                let (start, end) = (start / PAGE, end.div_ceil(PAGE));
                for machine in self.world.all() {
                    access_all(&machine.vm, start..end, &self.world.scribe);
                    self.with_task(&machine, |vm, task| vm.notifier_age(task, start..end))
                        .map_err(|e| e.to_string())?;
                    self.world.scribe.force(std::iter::empty());
                }
                Ok(())
            }
            What::Smm { vcpu, entering } => {
                let Some(machine) = self.world.machine(self.vm_of(input)) else { return Ok(()) };
                self.smm(&machine, vcpu, entering)
            }
            What::NxZap => self.recovery_zaps(at as u32),
            What::Work => {
                // A profile without workers queues nothing, whatever was recorded.
                if self.world.all().iter().any(|machine| machine.vm.mmu().design().queue().is_some()) {
                    self.world.scribe.run_a_work(PATIENCE);
                }
                Ok(())
            }
            What::Release => match self.world.machine(self.vm_of(input)).or_else(|| self.world.newest()) {
                Some(machine) => self.release(&machine, input.op),
                None => Ok(()),
            },
            What::Stat => {
                let vm = self.vm_of(input);
                if let (Some(machine), Some(op)) = (self.world.machine(vm), self.operation(input.op)) {
                    let stats = machine.vm.stats();
                    self.world.scribe.book().stats.push((input.line, op.number, stats));
                }
                Ok(())
            }
            What::Nothing | What::Leave | What::Restart { .. } | What::Resume { .. } => Ok(()),
            What::Enter | What::Fault { .. } | What::Map { .. } | What::Walk { .. } => {
                Err(format!("line {}: a guest runs in no VM that is known", input.line))
            }
        }
    }

    fn smm(&mut self, machine: &Machine, vcpu: u32, entering: bool) -> Result<(), String> {
        let mut vcpu =
            machine.vm.vcpu_with(vcpu as usize, self.world.task_config()).map_err(|e| e.to_string())?;
        if entering {
            vcpu.enter_smm();
        } else {
            vcpu.exit_smm();
        }
        Ok(())
    }

    /// The recovery thread was seen to zap a table: unless an earlier run accounts for it, it ran.
    fn recovery_zaps(&mut self, at: u32) -> Result<(), String> {
        let earlier = {
            let mut machines = self.world.machines();
            let (left, by) = machines.recovered;
            machines.recovered.0 = left.saturating_sub(1);
            (left > 0).then_some(by)
        };
        if let Some(by) = earlier {
            self.world.scribe.book().covered.insert(at, by);
            return Ok(());
        }
        let zapped = self.recover()?;
        self.world.machines().recovered = (zapped.saturating_sub(1), at);
        Ok(())
    }

    fn recover(&mut self) -> Result<u64, String> {
        let ratio = self.world.machines().params.recovery_ratio;
        let mut zapped = 0;
        for machine in self.world.all() {
            zapped += self
                .with_task(&machine, |vm, task| vm.recover_nx(task, u32::try_from(ratio).unwrap_or(u32::MAX)))
                .map_err(|e| e.to_string())?;
        }
        self.world.machines().recovery_ran = true;
        Ok(zapped)
    }

    /// The VM's end: its memory goes, then its vCPUs, then its tables.
    fn release(&mut self, machine: &Machine, op: u32) -> Result<(), String> {
        self.world.machines().live.remove(&machine.id);
        self.tasks.remove(&machine.id);
        if op != NO_OP {
            let stats = machine.vm.stats();
            let pages = Some([stats.pages_4k, stats.pages_2m, stats.pages_1g]);
            self.world.scribe.book().outcomes.insert(op, Outcome { pages, ..Outcome::default() });
        }
        self.world.scribe.free_works(true);
        let closed = machine.vm.close();
        self.world.scribe.free_works(false);
        let report = closed.map_err(|e| e.to_string())?;
        match report.violations.first() {
            None => Ok(()),
            Some(first) => Err(format!("the engine found an invariant broken: {first}")),
        }
    }

    fn script(&mut self, at: u32, op: &'a Operation) -> Result<(), String> {
        // What the kernel refused has no effect.
        if op.errno != 0 {
            return Ok(());
        }
        let mut outcome = Outcome::default();
        let done = self.operate(op, &mut outcome);
        if let Err(why) = &done {
            outcome.refused = Some(why.clone());
        }
        if outcome != Outcome::default() {
            self.world.scribe.book().outcomes.insert(at, outcome);
        }
        done
    }

    fn operate(&mut self, op: &'a Operation, outcome: &mut Outcome) -> Result<(), String> {
        let need = |key: &'static str| {
            op.number_of(key).ok_or_else(|| format!("operation {}: {key} is missing", op.number))
        };
        if op.kind == "create_vm" {
            let vcpus = op.number_of("nvcpus").unwrap_or(1);
            return self.world.create(
                need("vm")?,
                vcpus as usize,
                op.number_of("dirty_ring_bytes").unwrap_or(0),
            );
        }
        match op.kind.as_str() {
            "write_file" => return self.write_file(op),
            "nx_recovery" => return self.nx_recovery(),
            "madvise" => return self.madvise(op),
            // Their effects on the VM arrive as notifications and as the answers to faults.
            "munmap"
            | "mprotect"
            | "mmap_fixed"
            | "mremap_away"
            | "ftruncate"
            | "fallocate_punch_hole"
            | "host_write"
            | "fork"
            | "child_exit"
            | "ksm_wait"
            | "note"
            | "touch"
            | "pre_fault_memory" => return Ok(()),
            _ => {}
        }
        let Some(vm) = op.vm() else {
            // It names no VM: whatever it did to the host, its effects arrive as those of the others.
            return Ok(());
        };
        let machine = self.world.machine(Some(vm)).ok_or_else(|| format!("VM {vm} does not live"))?;
        match op.kind.as_str() {
            "destroy_vm" => self.release(&machine, NO_OP),
            "set_memslot" => self.set_memslot(&machine, op),
            "enable_cap" => {
                let (cap, arg) = (need("cap")?, op.number_of("arg0").unwrap_or(0));
                match cap {
                    KVM_CAP_MANUAL_DIRTY_LOG_PROTECT2 => self
                        .with_task(&machine, |vm, task| {
                            vm.enable_dirty_log_protect(task, arg & 1 != 0, arg & 2 != 0)
                        })
                        .map_err(|e| e.to_string()),
                    KVM_CAP_DISABLE_QUIRKS2 if arg & QUIRK_SLOT_ZAP_ALL != 0 => {
                        machine.vm.set_slot_zap_all(false).map_err(|e| e.to_string())
                    }
                    _ => Ok(()),
                }
            }
            "get_dirty_log" => {
                let (as_id, id) = slot_of(need("slot")?);
                let log = self
                    .with_task(&machine, |vm, task| vm.get_dirty_log(task, as_id, id))
                    .map_err(|e| e.to_string())?;
                let relative = |gfn: Option<u64>| gfn.map(|gfn| (gfn - log.base) as i64);
                outcome.dirty_pages = Some(log.count());
                outcome.first = relative(log.gfns().next());
                outcome.last = relative(log.gfns().last());
                self.world.machines().bitmaps.insert((machine.id, as_id, id), log.words);
                Ok(())
            }
            "clear_dirty_log" => {
                let (as_id, id) = slot_of(need("slot")?);
                let (first, pages) = (need("first_page")?, need("num_pages")?);
                let words = self.words_to_clear(&machine, as_id, id, first, pages);
                self.with_task(&machine, |vm, task| vm.clear_dirty_log(task, as_id, id, first, pages, &words))
                    .map(|_| ())
                    .map_err(|e| e.to_string())
            }
            "reset_dirty_rings" => {
                let mut collected = 0;
                for vcpu in 0..machine.vm.vcpu_count() {
                    collected += machine.vm.dirty_ring(vcpu).map_err(|e| e.to_string())?.len() as u64;
                }
                outcome.collected = Some(collected);
                let reset = self.with_task(&machine, |vm, task| vm.reset_dirty_rings(task));
                outcome.reset = Some(reset.map_err(|e| e.to_string())?);
                Ok(())
            }
            "set_smm" => self.smm(&machine, need("vcpu")? as u32, need("smm")? != 0),
            other => Err(format!("operations of kind {other} are not known")),
        }
    }

    /// The bits of the last GET, restricted to the range.
    fn words_to_clear(&self, machine: &Machine, as_id: u8, id: u16, first: u64, pages: u64) -> Vec<u64> {
        let machines = self.world.machines();
        let got = machines.bitmaps.get(&(machine.id, as_id, id));
        let word = |n: u64| got.and_then(|words| words.get((first / 64 + n) as usize)).copied().unwrap_or(0);
        let mut words: Vec<u64> = (0..pages.div_ceil(64)).map(word).collect();
        if !pages.is_multiple_of(64)
            && let Some(last) = words.last_mut()
        {
            *last &= (1 << (pages % 64)) - 1;
        }
        words
    }

    fn set_memslot(&mut self, machine: &Machine, op: &Operation) -> Result<(), String> {
        let get = |key: &str| op.number_of(key).unwrap_or(0);
        for key in ["slot", "size", "hva"] {
            if op.number_of(key).is_none() && (key != "hva" || get("size") != 0) {
                return Err(format!("operation {}: {key} is missing, or no number", op.number));
            }
        }
        let small = |key: &str| format!("operation {}: {key} {} is out of range", op.number, get(key));
        let as_id = u8::try_from(get("as")).map_err(|_| small("as"))?;
        let id = u16::try_from(get("slot")).map_err(|_| small("slot"))?;
        let flags = get("flags");
        let region = Region {
            id,
            as_id,
            base: op.params.get("gpa").and_then(number).map_or(get("gfn"), |gpa| gpa / PAGE),
            pages: get("size") / PAGE,
            hva: get("hva") / PAGE,
            flags: SlotFlags { log_dirty: flags & 1 != 0, readonly: flags & 2 != 0 },
        };
        let slot = Slot { base: region.base, pages: region.pages, hva: region.hva, logs: flags & 1 != 0 };
        if region.pages != 0 {
            self.world.host().set_slot(machine.id, as_id, id, slot, op.text_of("backing"));
        }
        self.world.scribe.free_works(true);
        let done = self.with_task(machine, |vm, task| vm.set_memslot(task, &region));
        self.world.scribe.free_works(false);
        if region.pages == 0 {
            self.world.host().delete_slot(machine.id, as_id, id);
        }
        done.map(|_| ()).map_err(|e| e.to_string())
    }

    fn write_file(&mut self, op: &Operation) -> Result<(), String> {
        let params = {
            let mut machines = self.world.machines();
            let known = machines.params.set(op.text_of("path"), op.text_of("value").trim());
            if !known.map_err(str::to_owned)? {
                return Ok(());
            }
            machines.params
        };
        for machine in self.world.all() {
            machine.vm.set_eager_page_split(params.eager_page_split);
            self.world.scribe.free_works(true);
            let done = self.with_task(&machine, |vm, task| vm.set_nx_huge_pages(task, params.nx_huge_pages));
            self.world.scribe.free_works(false);
            done.map_err(|e| e.to_string())?;
        }
        Ok(())
    }

    /// What advice does to a VM arrives as notifications; what it promises for later does not.
    fn madvise(&mut self, op: &Operation) -> Result<(), String> {
        let at = |key: &str| op.number_of(key).unwrap_or(0);
        let start = at("hva").saturating_add(at("off"));
        let (start, end) = (start / PAGE, start.saturating_add(at("len")) / PAGE);
        let mut host = self.world.host();
        match op.text_of("advice") {
            "MADV_COLLAPSE" => host.gathered(start, end),
            "MADV_NOHUGEPAGE" => host.advise_small(start, end, true),
            "MADV_HUGEPAGE" => host.advise_small(start, end, false),
            _ => {}
        }
        Ok(())
    }

    /// The end of an operation that let the recovery thread run: a run of it that zapped nothing left no trace, and may have dropped candidates.
    fn nx_recovery(&mut self) -> Result<(), String> {
        let ran = std::mem::take(&mut self.world.machines().recovery_ran);
        self.world.machines().recovered.0 = 0;
        if ran {
            return Ok(());
        }
        self.recover()?;
        self.world.machines().recovery_ran = false;
        Ok(())
    }
}

/// Address space and slot of the number that the dirty-log ioctls take.
fn slot_of(number: u64) -> (u8, u16) {
    ((number >> 16) as u8, (number & 0xffff) as u16)
}

/// Adds `bits` to the leaf that maps `gfn` under `root`, as hardware does: without a lock, and only what is present. The leaf's level and what was added, or the level
/// at which nothing is mapped.
fn touch_leaf(mmu: &TdpMmu<Real>, root: u32, gfn: u64, bits: impl Fn(u64) -> u64) -> Result<(u8, u64), u8> {
    let format = mmu.format();
    let (mut table, mut level) = (root, mmu.root_level());
    loop {
        let cell = &mmu.pool().entries(table)[index(gfn, level)];
        let seen = tdpmmu_spte::Spte(Real::load(cell, tdpmmu_platform::Site::SpteRead));
        if seen.is_leaf(level) {
            let more = bits(seen.raw());
            if more != 0 {
                cell.fetch_or(more, std::sync::atomic::Ordering::AcqRel);
            }
            return Ok((level, more));
        }
        if !seen.is_table(level) || format.is_frozen(seen) {
            return Err(level);
        }
        table = seen.pfn() as u32;
        level -= 1;
    }
}

const NPT_W: u64 = 1 << 1;
const NPT_ACCESSED: u64 = 1 << 5;
const NPT_DIRTY: u64 = 1 << 6;

/// The guest repeats the write that faulted: hardware sets Dirty (and Accessed) where W is granted.
fn write_again(mmu: &TdpMmu<Real>, vcpu: &Vcpu<'_, Real>, gfn: u64) {
    if let Some(root) = vcpu.current_root() {
        let _ = touch_leaf(mmu, root, gfn, |value| {
            if value & NPT_W != 0 { (NPT_ACCESSED | NPT_DIRTY) & !value } else { 0 }
        });
    }
}

/// Whether hardware has set Accessed since the last aging is not determined: let it be set everywhere in the range, and let the comparator know that each of these
/// events is optional.
fn access_all(vm: &Vm<Real>, hvas: std::ops::Range<u64>, scribe: &super::predict::Scribe) {
    let mmu = vm.mmu();
    let mut forced = Vec::new();
    for (as_id, gfns) in vm.slots().gfns_of(&hvas) {
        for root in mmu.listed_roots().filter(|&root| mmu.as_id(root) == as_id) {
            let mut gfn = gfns.start;
            while gfn < gfns.end {
                match touch_leaf(mmu, root, gfn, |value| NPT_ACCESSED & !value) {
                    Ok((level, more)) => {
                        if more != 0 {
                            forced.push((as_id, level, round_down(gfn, level)));
                        }
                        gfn = round_down(gfn, level) + span(level);
                    }
                    Err(level) => gfn = round_down(gfn, level) + span(level),
                }
            }
        }
    }
    scribe.force(forced.into_iter());
}
