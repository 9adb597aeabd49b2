//! One act on a VM, on any platform.
//!
//! What a thread carries is [`Hands`]: a vCPU's handle, or a task of its own. A vCPU that enters the kernel by an ioctl has left the guest; it answers kicks at its next access otherwise, so it must not sleep in
//! the guest either.

use std::fmt;
use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};

use tdpmmu_platform::{Platform, RcuDomain, Role as TaskRole, Site, Task};
use tdpmmu_spte::Role;
use tdpmmu_vm::slots::Region;
use tdpmmu_vm::{AccessOutcome, GuestAccess, Paging, SlotFlags, SlotUpdate, Vcpu, Vm, VmError};

use super::{Act, Guests, Process, SlotSpec, Who};

/// A sleeper on real threads looks up so often whether the run was given up.
const NAP_NS: u64 = 20_000_000;

/// What an act came to.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Done {
    /// Nothing to tell.
    Nothing,
    /// How the access ended.
    Access(AccessOutcome),
    /// Something was there, was cached, was young, was changed; or not.
    Was(bool),
    /// The entry found, with its level.
    Found(Option<(u64, u8)>),
    /// A root.
    Root(u32),
    /// A count.
    Count(u64),
    /// Gfns, ascending.
    Gfns(Vec<u64>),
    /// A memslot update that did something; `zapped`: everything.
    Slot {
        /// A fast zap was part of it.
        zapped: bool,
    },
    /// The VM has ended; it left nothing behind.
    Closed {
        /// Nothing leaked and nothing was violated.
        clean: bool,
    },
}

impl fmt::Display for Done {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Done::Nothing => f.write_str("done"),
            Done::Access(outcome) => f.write_str(outcome.name()),
            Done::Was(was) => write!(f, "{was}"),
            Done::Found(None) => f.write_str("nothing"),
            Done::Found(Some((spte, level))) => write!(f, "{spte:#x} at level {level}"),
            Done::Root(root) => write!(f, "root {root}"),
            Done::Count(count) => write!(f, "{count}"),
            Done::Gfns(gfns) => write!(f, "gfns {gfns:x?}"),
            Done::Slot { zapped: true } => f.write_str("done, with a fast zap"),
            Done::Slot { zapped: false } => f.write_str("done"),
            Done::Closed { clean } => f.write_str(if *clean { "closed, clean" } else { "closed, not clean" }),
        }
    }
}

/// Where threads meet.
#[derive(Debug, Default)]
pub struct Flags {
    cells: [AtomicU32; Act::FLAGS as usize],
    given_up: AtomicBool,
}

impl Flags {
    fn raise<P: Platform>(&self, flag: u8) {
        if let Some(cell) = self.cells.get(usize::from(flag)) {
            cell.store(1, Ordering::Release);
            P::futex_wake(cell, u32::MAX);
        }
    }

    /// Sleeps until the flag is raised; false: the run was given up.
    fn wait_for<P: Platform>(&self, flag: u8) -> bool {
        let Some(cell) = self.cells.get(usize::from(flag)) else { return true };
        while cell.load(Ordering::Acquire) == 0 {
            if self.given_up.load(Ordering::Acquire) {
                return false;
            }
            P::futex_wait(cell, 0, P::SPINS.then_some(NAP_NS));
        }
        true
    }

    /// Wakes who waits, for nothing: the run is given up.
    pub fn give_up<P: Platform>(&self) {
        self.given_up.store(true, Ordering::Release);
        for cell in &self.cells {
            P::futex_wake(cell, u32::MAX);
        }
    }

    /// Was the run given up?
    pub fn given_up(&self) -> bool {
        self.given_up.load(Ordering::Acquire)
    }
}

enum Body<'v, P: Platform> {
    Vcpu(Box<Vcpu<'v, P>>),
    Task(Box<Task<P>>),
}

/// What a thread carries through its acts; made by the thread itself.
pub struct Hands<'v, P: Platform> {
    body: Body<'v, P>,
    host: u64,
    flags: &'v Flags,
    guests: Option<&'v Guests<P>>,
}

impl<'v, P: Platform> Hands<'v, P> {
    /// The hands of `who`; `host` is the first page of the program's host memory.
    ///
    /// # Errors
    /// As [`Vm::vcpu`].
    pub fn new(vm: &'v Vm<P>, who: Who, name: &str, host: u64, flags: &'v Flags) -> Result<Self, VmError> {
        let body = match who {
            Who::Vcpu(id) => Body::Vcpu(Box::new(vm.vcpu(id)?)),
            Who::Caller | Who::Other(_) => Body::Task(Box::new(vm.task(name, TaskRole::Caller))),
        };
        Ok(Self { body, host, flags, guests: None })
    }

    /// With the guest's own tables at hand.
    #[must_use]
    pub fn with_guests(self, guests: Option<&'v Guests<P>>) -> Self {
        Self { guests, ..self }
    }

    /// "current".
    pub fn task(&self) -> &Task<P> {
        match &self.body {
            Body::Vcpu(vcpu) => vcpu.task(),
            Body::Task(task) => task,
        }
    }

    /// The vCPU, if it is one's thread.
    pub fn vcpu(&mut self) -> Option<&mut Vcpu<'v, P>> {
        match &mut self.body {
            Body::Vcpu(vcpu) => Some(vcpu),
            Body::Task(_) => None,
        }
    }

    fn leave(&mut self) {
        if let Body::Vcpu(vcpu) = &mut self.body {
            vcpu.leave();
        }
    }

    fn hvas(&self, at: u64, pages: u64) -> std::ops::Range<u64> {
        self.host + at..self.host + at + pages
    }
}

/// Role word of a variant: bit 0 toggles CR0.WP, bit 1 EFER.NX, bit 2 is an L2 (guest mode).
pub fn role<P: Platform>(vm: &Vm<P>, variant: u8) -> Role {
    let layout = vm.mmu().profile().role_layout;
    let mut fields = layout.unpack(vm.mmu().root_role(false));
    fields.cr0_wp ^= variant & 1 != 0;
    fields.efer_nx ^= variant & 2 != 0;
    fields.guest_mode |= variant & 4 != 0;
    layout.pack(&fields)
}

/// The same for a vCPU on shadow pages, whose role is `now`. (An L2 is entered there, not switched to.)
fn shadow_role<P: Platform>(vm: &Vm<P>, now: Role, variant: u8) -> Role {
    let layout = vm.mmu().profile().role_layout;
    let mut fields = layout.unpack(now);
    fields.cr0_wp = variant & 1 == 0;
    fields.efer_nx = variant & 2 == 0;
    layout.pack(&fields)
}

/// The region that a slot of a program stands for.
pub(super) fn region(slot: &SlotSpec, host: u64) -> Region {
    Region {
        id: slot.id,
        as_id: slot.as_id,
        base: slot.gfn,
        pages: slot.pages,
        hva: host + slot.hva_page,
        flags: SlotFlags { log_dirty: slot.log, readonly: slot.read_only },
    }
}

/// What the VM has under that id now.
fn current<P: Platform>(vm: &Vm<P>, as_id: u8, id: u16) -> Result<Region, VmError> {
    let set = vm.slots();
    let slot = set.by_id(as_id, id).ok_or(VmError::NoSlot { as_id, id })?;
    Ok(Region { id, as_id, base: slot.base, pages: slot.pages, hva: slot.hva, flags: slot.flags })
}

/// Carries `act` out.
///
/// # Errors
/// What the VM says: KVM's own refusals (a slot that is gone, a full ring, no page for a table), [`VmError::Closed`], [`VmError::Cancelled`] where the run was given up or a vCPU was asked to stop.
pub fn perform<P: Platform>(vm: &Vm<P>, hands: &mut Hands<'_, P>, act: &Act) -> Result<Done, VmError> {
    if act.needs_vcpu() {
        let Body::Vcpu(vcpu) = &mut hands.body else {
            let rule = "only the thread of a vCPU does that";
            return Err(VmError::Config { what: "act", value: act.title(), rule });
        };
        return match tables(vcpu, hands.guests, act) {
            Some(done) => done,
            None => guest(vm, vcpu, act),
        };
    }
    hands.leave();
    match *act {
        Act::WaitFor { flag } => {
            return if hands.flags.wait_for::<P>(flag) { Ok(Done::Nothing) } else { Err(VmError::Cancelled) };
        }
        Act::Raise { flag } => {
            hands.flags.raise::<P>(flag);
            return Ok(Done::Nothing);
        }
        Act::Yield => {
            P::yield_cpu(Site::Spin);
            return Ok(Done::Nothing);
        }
        Act::ExclusiveHolds => return Ok(Done::Count(hands.task().meter().exclusive_holds().count)),
        _ => {}
    }
    kernel(vm, hands, act)
}

/// What the guest does with its own tables; `None`: another act.
fn tables<P: Platform>(
    vcpu: &mut Vcpu<'_, P>,
    guests: Option<&Guests<P>>,
    act: &Act,
) -> Option<Result<Done, VmError>> {
    let done = match *act {
        Act::Invlpg { gva } => {
            vcpu.invlpg(gva);
            Ok(Done::Nothing)
        }
        Act::FlushGuestTlb => {
            vcpu.flush_guest_tlb();
            Ok(Done::Nothing)
        }
        Act::LeaveL2 => {
            vcpu.leave_l2();
            Ok(Done::Nothing)
        }
        Act::WalkShadow { gva } => {
            Ok(Done::Found(vcpu.walk_shadow(gva).map(|(spte, level)| (spte.0, level))))
        }
        Act::GuestMap { process, .. }
        | Act::GuestUnmap { process, .. }
        | Act::SetCr3 { process }
        | Act::EnterL2 { process } => {
            let Some(guests) = guests else {
                let rule = "the machine has no processes";
                return Some(Err(VmError::Config { what: "process", value: process.to_string(), rule }));
            };
            guests.process(process).and_then(|of| in_process(vcpu, guests, of, act))
        }
        _ => return None,
    };
    Some(done)
}

fn in_process<P: Platform>(
    vcpu: &mut Vcpu<'_, P>,
    guests: &Guests<P>,
    process: Process,
    act: &Act,
) -> Result<Done, VmError> {
    match *act {
        Act::GuestMap { gva, gfn, write, .. } => {
            vcpu.leave_l2();
            guests.os().map(vcpu, process.cr3, gva, gfn, 1, write)?;
            Ok(Done::Nothing)
        }
        Act::GuestUnmap { gva, .. } => {
            vcpu.leave_l2();
            Ok(Done::Was(guests.os().unmap(vcpu, process.cr3, gva)?))
        }
        Act::SetCr3 { .. } => vcpu.set_cr3(process.cr3).map(|()| Done::Nothing),
        _ => vcpu.enter_l2(process.cr3, process.levels).map(|()| Done::Nothing),
    }
}

/// What the guest, or the run loop of a vCPU, does.
fn guest<P: Platform>(vm: &Vm<P>, vcpu: &mut Vcpu<'_, P>, act: &Act) -> Result<Done, VmError> {
    let entered = |entered: bool| if entered { Ok(Done::Nothing) } else { Err(VmError::Cancelled) };
    Ok(match *act {
        Act::Access { gfn, write, exec } => Done::Access(vcpu.access(GuestAccess { gfn, write, exec })?),
        Act::Speculate { gfn } => Done::Was(vcpu.speculate(gfn)),
        Act::LookUp { gfn } => {
            let leaf = match vcpu.current_root() {
                // The walk that KVM makes, entry by entry, and not the short cut of measurements.
                Some(root) if vm.paging() == Paging::Tdp && !vcpu.in_l2() => {
                    vm.mmu().walk_lockless(vcpu.task(), root, gfn).leaf()
                }
                _ => vcpu.lookup(gfn),
            };
            Done::Found(leaf.map(|(spte, level)| (spte.0, level)))
        }
        Act::Enter => return entered(vcpu.enter()?),
        Act::Poll => return entered(vcpu.poll()?),
        Act::Leave => {
            vcpu.leave();
            Done::Nothing
        }
        Act::LoadRoot => Done::Root(vcpu.root()?),
        Act::DropRoot => Done::Root(vcpu.drop_root()?),
        Act::Unload => {
            vcpu.unload();
            Done::Nothing
        }
        Act::SwitchRole { variant } => {
            let role = match vm.paging() {
                Paging::Tdp if !vcpu.in_l2() => role(vm, variant),
                _ => shadow_role(vm, vcpu.role(), variant),
            };
            vcpu.switch_role(role);
            Done::Nothing
        }
        Act::EnterSmm => {
            vcpu.enter_smm();
            Done::Nothing
        }
        Act::ExitSmm => {
            vcpu.exit_smm();
            Done::Nothing
        }
        Act::PreFault { gfn, pages } => {
            vcpu.leave();
            Done::Count(vcpu.pre_fault(gfn..gfn + pages)?)
        }
        _ => Done::Nothing,
    })
}

fn updated(update: SlotUpdate) -> Done {
    Done::Slot { zapped: matches!(update, SlotUpdate::Deleted(_) | SlotUpdate::Moved(_)) }
}

/// What a call into the kernel does, whoever makes it.
fn kernel<P: Platform>(vm: &Vm<P>, hands: &Hands<'_, P>, act: &Act) -> Result<Done, VmError> {
    let task = hands.task();
    let flags =
        |log_dirty: bool, region: Region| Region { flags: SlotFlags { log_dirty, ..region.flags }, ..region };
    Ok(match *act {
        Act::CreateSlot(ref slot) => updated(vm.set_memslot(task, &region(slot, hands.host))?),
        Act::DeleteSlot { as_id, id } => {
            vm.delete_memslot(task, as_id, id)?;
            Done::Slot { zapped: true }
        }
        Act::MoveSlot { as_id, id, gfn } => {
            updated(vm.set_memslot(task, &Region { base: gfn, ..current(vm, as_id, id)? })?)
        }
        Act::SetSlotFlags { as_id, id, log } => {
            updated(vm.set_memslot(task, &flags(log, current(vm, as_id, id)?))?)
        }
        Act::FastZap => {
            vm.fast_zap(task)?;
            Done::Nothing
        }
        Act::SetSlotZapAll { on } => {
            vm.set_slot_zap_all(on)?;
            Done::Nothing
        }
        Act::SetNx { on } => Done::Was(vm.set_nx_huge_pages(task, on)?.is_some()),
        Act::RecoverNx { ratio } => Done::Count(vm.recover_nx(task, ratio)?),
        Act::ZapRange { gfn, pages } => {
            vm.zap_gfn_range(task, gfn..gfn + pages)?;
            Done::Nothing
        }
        Act::WriteProtect { as_id, gfn } => Done::Was(vm.write_protect_gfn(task, as_id, gfn)?),
        Act::Unmap { hva_page, pages, may_block } => {
            Done::Count(vm.unmap_hva(task, hands.hvas(hva_page, pages), may_block)?)
        }
        Act::ReplacePage { hva_page, writable } => {
            vm.set_host_page(task, hands.host + hva_page, writable)?;
            Done::Nothing
        }
        Act::ChangePte { hva_page, writable } => {
            let hva = hands.host + hva_page;
            match vm.side().primary.lookup(hva) {
                Some(page) => Done::Was(vm.notifier_change_pte(task, hva, page.pfn, writable)?),
                None => Done::Was(false),
            }
        }
        Act::Age { hva_page, pages } => Done::Was(vm.age_hva(task, hands.hvas(hva_page, pages))?),
        Act::AgeFlush { hva_page, pages } => {
            Done::Was(vm.notifier_age_flush(task, hands.hvas(hva_page, pages))?)
        }
        Act::TestAge { hva_page, pages } => Done::Was(vm.test_age_hva(task, hands.hvas(hva_page, pages))?),
        Act::SetHostLevel { gfn, pages, level } => {
            Done::Count(vm.promote_gfns(task, gfn..gfn + pages, level)?)
        }
        Act::SetLogProtect { manual, initially_set } => {
            vm.enable_dirty_log_protect(task, manual, initially_set)?;
            Done::Nothing
        }
        Act::SetEagerSplit { on } => {
            vm.set_eager_page_split(on);
            Done::Nothing
        }
        Act::GetDirtyLog { as_id, id } => Done::Gfns(vm.get_dirty_log(task, as_id, id)?.gfns().collect()),
        Act::ClearDirtyLog { as_id, id, first, mask } => {
            let left = current(vm, as_id, id)?.pages.saturating_sub(first).min(64);
            Done::Count(vm.clear_dirty_log(task, as_id, id, first, left, &[mask])?)
        }
        Act::CollectRings => {
            let mut count = 0;
            for vcpu in 0..vm.vcpu_count() {
                count += vm.dirty_ring(vcpu)?.len() as u64;
            }
            Done::Count(count)
        }
        Act::ResetRings => Done::Count(vm.reset_dirty_rings(task)?),
        Act::ReleaseUser => Done::Count(u64::from(vm.release_user())),
        Act::Synchronize => {
            vm.mmu().rcu().synchronize();
            Done::Nothing
        }
        Act::RcuBarrier => {
            vm.mmu().rcu().barrier();
            Done::Nothing
        }
        Act::FlushWorkers => {
            if let Some(queue) = vm.mmu().design().queue() {
                queue.flush();
            }
            Done::Nothing
        }
        Act::StopVcpus => {
            vm.stop_vcpus(task);
            Done::Nothing
        }
        Act::ResumeVcpus => {
            vm.resume();
            Done::Nothing
        }
        Act::Close => loop {
            match vm.close() {
                // The VM lives as long as a vCPU's file descriptor.
                Err(VmError::Busy { .. }) if !hands.flags.given_up() && hands.waits_for_vcpus() => {
                    P::yield_cpu(Site::Spin);
                }
                closed => break Done::Closed { clean: closed?.is_clean() },
            }
        },
        _ => Done::Nothing,
    })
}

impl<P: Platform> Hands<'_, P> {
    /// A vCPU's own thread would wait for itself.
    fn waits_for_vcpus(&self) -> bool {
        matches!(self.body, Body::Task(_))
    }
}
