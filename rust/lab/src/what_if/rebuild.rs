//! A recorded tree, built again: memslots, host memory, tables and leafs of the same levels at the same places.
//!
//! Each GiB that holds a leaf is a memslot with host memory that allows leafs of any level, so that the leafs come out as recorded. Tables without a leaf are
//! made as KVM makes them: by a page that a notifier takes away again. What a leaf allows does not matter to its removal; whether it is dirty does.

use std::collections::BTreeSet;

use tdpmmu_platform::{Real, Role as TaskRole, Task};
use tdpmmu_spte::Role;
use tdpmmu_spte::geometry::span;
use tdpmmu_trace::{RootShape, Shape};
use tdpmmu_vm::slots::Region;
use tdpmmu_vm::{AdMix, BulkOptions, MAX_HOST_PAGES, Progress, SlotFlags, Vcpu, Vm, VmConfig, VmError};

use super::Setting;
use crate::host::available_bytes;
use crate::{LabError, units};

/// Roles that a vCPU's roots can have: see `role`.
const VARIANTS: usize = 4;
/// Page-table pages beside the recorded ones: new roots, caches.
const SPARE_TABLES: u64 = 4096;
/// Bytes beside tables and frames: threads, pools.
const SPARE_BYTES: u64 = 64 << 20;

/// Can this tree be built?
pub(super) fn fits(shape: &Shape) -> Result<(), String> {
    for as_id in 0..2 {
        let roots = shape.roots.iter().filter(|r| r.as_id == as_id).count();
        if roots > VARIANTS {
            return Err(format!("more than {VARIANTS} trees of one address space at once"));
        }
    }
    if shape.roots.iter().any(|r| r.cut) {
        return Err("the tree has more pieces than are kept".to_owned());
    }
    if shape.roots.iter().any(|r| r.unknown > 0) {
        return Err(
            "part of the tree is not known: the recording begins later, or events were lost".to_owned()
        );
    }
    if slots(shape).len() > usize::from(u16::MAX / 4) {
        return Err("the leafs lie in more GiB than there are memslots".to_owned());
    }
    Ok(())
}

/// The GiB that hold leafs or bare tables, joined where they meet: first gfn, pages.
fn slots(shape: &Shape) -> Vec<(u64, u64)> {
    let gig = span(3);
    let mut gigs = BTreeSet::new();
    for root in &shape.roots {
        for run in &root.runs {
            gigs.extend(run.gfn / gig..=(run.gfn + run.count * span(run.level) - 1) / gig);
        }
        gigs.extend(root.bare.iter().map(|(gfn, _)| gfn / gig));
    }
    let mut slots: Vec<(u64, u64)> = Vec::new();
    for g in gigs {
        match slots.last_mut() {
            Some((base, pages)) if *base + *pages == g * gig => *pages += gig,
            _ => slots.push((g * gig, gig)),
        }
    }
    slots
}

fn fail(what: &str) -> impl Fn(VmError) -> LabError + '_ {
    move |error| match error {
        VmError::Cancelled => LabError::Cancelled,
        error => LabError::Internal(format!("what if: {what}: {error}")),
    }
}

/// The VM without its leafs.
pub(super) fn vm(shape: &Shape, setting: &Setting, vcpus: usize) -> Result<Vm<Real>, LabError> {
    let tables: u64 = shape.roots.iter().map(|r| r.tables).sum();
    let slots = slots(shape);
    let pages: u64 = slots.iter().map(|s| s.1).sum();
    // Tables, and three bits of books for each page of a memslot.
    let needed = (tables + SPARE_TABLES) * 4096 + pages / 8 * 3 + SPARE_BYTES;
    let available = available_bytes();
    if needed > available {
        return Err(LabError::Memory {
            needed_bytes: needed,
            available_bytes: available,
            message: format!(
                "the recorded tree needs {} of memory, {} are available",
                units::bytes(needed),
                units::bytes(available)
            ),
        });
    }
    let mut config = VmConfig::new(setting.profile);
    config.design = Some(setting.design.clone());
    config.root_level = shape.roots.iter().map(|r| r.level).max().unwrap_or(4).clamp(4, 5);
    config.maxphyaddr = if config.root_level == 5 { 52 } else { 48 };
    config.vcpus = vcpus;
    config.max_tables = u32::try_from(tables + SPARE_TABLES).unwrap_or(u32::MAX);
    config.host_pages = (2 * pages + span(3) * (slots.len() as u64 + 2)).clamp(1 << 20, MAX_HOST_PAGES);
    let vm = Vm::<Real>::new(config).map_err(fail("the VM"))?;
    let task = vm.task("rebuild", TaskRole::Caller);
    let spaces: BTreeSet<u8> = shape.roots.iter().map(|r| r.as_id).collect();
    for (n, (base, pages)) in slots.into_iter().enumerate() {
        let hva = vm.side().primary.region(pages, base, 3, true).map_err(fail("host memory"))?;
        for &as_id in &spaces {
            let region = Region { id: n as u16, as_id, base, pages, hva, flags: SlotFlags::default() };
            vm.set_memslot(&task, &region).map_err(fail("a memslot"))?;
        }
    }
    Ok(vm)
}

/// Role word of the n-th root of an address space: with CR0.WP toggled, EFER.NX toggled, both.
fn role(vm: &Vm<Real>, smm: bool, variant: usize) -> Role {
    let layout = vm.mmu().profile().role_layout;
    let mut fields = layout.unpack(vm.mmu().root_role(smm));
    fields.cr0_wp ^= variant & 1 != 0;
    fields.efer_nx ^= variant & 2 != 0;
    layout.pack(&fields)
}

/// Builds the trees. vCPU 0 ends with all roots of address space 0 in its cache; `smm` holds those of address space 1.
pub(super) fn populate<'v>(
    vm: &Vm<Real>,
    shape: &Shape,
    vcpu: &mut Vcpu<'v, Real>,
    smm: Option<&mut Vcpu<'v, Real>>,
) -> Result<(), LabError> {
    let task = vm.task("rebuild", TaskRole::Caller);
    let of_space = |as_id: u8| shape.roots.iter().filter(|r| r.as_id == as_id).collect::<Vec<_>>();
    let mut all = vec![(vcpu, of_space(0), false)];
    if let Some(vcpu) = smm {
        vcpu.enter_smm();
        all.push((vcpu, of_space(1), true));
    }
    // Bare tables first: a notifier takes their pages from every root.
    for bare in [true, false] {
        for (vcpu, roots, smm) in &mut all {
            for (variant, root) in roots.iter().enumerate().rev() {
                vcpu.switch_role(role(vm, *smm, variant));
                if bare {
                    place_bare(vm, vcpu, root)?;
                } else {
                    place_runs(vm, vcpu, root)?;
                }
            }
        }
        if bare {
            take_bare(vm, &task, shape)?;
        }
    }
    Ok(())
}

/// A leaf in each table that is to be left bare.
fn place_bare(vm: &Vm<Real>, vcpu: &mut Vcpu<'_, Real>, root: &RootShape) -> Result<(), LabError> {
    for &(gfn, level) in root.bare.iter().filter(|b| b.1 <= 3) {
        let options = BulkOptions { level, ad: AdMix::Clean, threads: 1 };
        vm.populate_bulk(vcpu, gfn..gfn + span(level), &options, &Progress::default())
            .map_err(fail("a table"))?;
    }
    Ok(())
}

/// By the notifier alone: were the host's own mapping to go as well, huge pages would be split there for good.
fn take_bare(vm: &Vm<Real>, task: &Task<Real>, shape: &Shape) -> Result<(), LabError> {
    let slots = vm.slots();
    for root in &shape.roots {
        for &(gfn, level) in root.bare.iter().filter(|b| b.1 <= 3) {
            let slot = slots.find(root.as_id, gfn).ok_or_else(|| {
                LabError::Internal(format!("what if: no memslot was made for the table at gfn {gfn:#x}"))
            })?;
            let hva = slot.hva_of(gfn);
            vm.notifier_unmap(task, hva..hva + span(level)).map_err(fail("a notifier"))?;
        }
    }
    Ok(())
}

fn place_runs(vm: &Vm<Real>, vcpu: &mut Vcpu<'_, Real>, root: &RootShape) -> Result<(), LabError> {
    for run in &root.runs {
        let ad = if run.dirty { AdMix::Dirty } else { AdMix::Clean };
        // Threads pay for long runs only.
        let threads = if run.count >= 1 << 18 { 0 } else { 1 };
        let options = BulkOptions { level: run.level, ad, threads };
        let gfns = run.gfn..run.gfn + run.count * span(run.level);
        vm.populate_bulk(vcpu, gfns, &options, &Progress::default()).map_err(fail("leafs"))?;
    }
    Ok(())
}
