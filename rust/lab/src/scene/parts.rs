//! What every scene is made of: the VM, its population, its guests.

use super::Ask;
use crate::config::{AdMix, Plan, PopulateBy, ShadowCase};
use crate::memory::Estimate;
use crate::scenario::{
    Ad, By, Flag, GuestCode, Op, Populate, Scenario, ShadowSpec, Thread, Update, VmSpec, Who, wait,
};

/// Writes of 100 guest accesses.
const WRITE_PERCENT: u8 = 50;
/// Quiet time around a zap, so that every vCPU has settled.
pub(super) const SETTLE_MS: u64 = 20;

/// One root over all of the guest's memory.
pub(super) fn one_root(plan: &Plan) -> Estimate {
    Estimate::new(plan.config.memory_bytes, plan.level, plan.config.levels)
}

/// No setting is senseless.
pub(super) fn any(_plan: &Plan) -> Result<(), String> {
    Ok(())
}

/// It makes as much sense under the shadow MMU.
pub(super) fn any_shadow(_plan: &Plan, _case: &ShadowCase) -> Result<(), String> {
    Ok(())
}

/// One that needs SMM: an address space of its own, in which the model has no guest page tables.
pub(super) fn direct_shadow(_plan: &Plan, case: &ShadowCase) -> Result<(), String> {
    if case.shadows_guest() {
        return Err(
            "in SMM a guest has page tables of its own, which are not modelled: use paging direct".into()
        );
    }
    Ok(())
}

/// Tables beside the guest's own: other roots, working sets under new roots, vCPU caches.
fn spare_tables(plan: &Plan) -> u64 {
    let rebuilt = plan.working_set_pages * u64::from(plan.config.vcpus) / 256 + 64;
    4096 + 32 * u64::from(plan.config.vcpus) + rebuilt
}

/// A VM with `vcpus` vCPUs and room for `tables` tables of the guest's.
pub(super) fn vm_spec(ask: &Ask<'_>, tables: u64, vcpus: u32) -> VmSpec {
    let (c, case) = (&ask.plan.config, ask.case);
    VmSpec {
        profile: c.kernel_profile.clone(),
        design: case.info.name.into(),
        passes: case.passes_name(),
        ownership: case.ownership_name(),
        shadow: case.shadow.map(|shadow| ShadowSpec {
            paging: shadow.paging.name().into(),
            reclaim: shadow.reclaim.name().into(),
            quota: shadow.quota,
        }),
        vcpus: vcpus as usize,
        levels: c.levels,
        memory_bytes: c.memory_bytes,
        level: ask.plan.level,
        max_level: ask.plan.level,
        smm: false,
        max_tables: u32::try_from(tables + spare_tables(ask.plan)).unwrap_or(u32::MAX - 256),
        workers: c.workers,
        worker_cpus: c.worker_cpus.clone(),
        worker_queue: c.worker_queue.clone(),
        vcpu_cpus: c.vcpu_cpus.clone(),
        preempt: case.preempt_name().into(),
        tick_ns: c.tick_ns,
        write_back: ask.plan.write_back,
        step_ns: ask.step_ns,
        force_yield: None,
        record: !ask.step_ns && (c.timeline || c.perfetto.is_some()),
        log: !ask.step_ns,
    }
}

/// The usual scenario: a populated guest, and the threads.
pub(super) fn scenario(ask: &Ask<'_>, vcpus: u32, pays: Option<Who>, threads: Vec<Thread>) -> Scenario {
    // Under a smaller quota the begin of the memory is unmapped again before its end is mapped.
    let fits =
        ask.case.shadow.and_then(|s| s.quota).is_none_or(|quota| u64::from(quota) >= ask.estimate.tables);
    Scenario {
        name: ask.case.scene.name.into(),
        vm: vm_spec(ask, ask.estimate.tables, vcpus),
        populate: Some(populate(ask.plan, 1)),
        threads,
        seed: ask.plan.config.seed,
        pays,
        estimate: ask.estimate,
        sptes: fits.then_some(ask.estimate.sptes),
    }
}

/// All of the memory, under `roots` roots.
pub(super) fn populate(plan: &Plan, roots: usize) -> Populate {
    let by = match plan.populate {
        PopulateBy::Bulk => By::Bulk,
        PopulateBy::Fault => By::Faults,
    };
    let ad = match plan.ad_mix {
        AdMix::Clean => Ad::Clean,
        AdMix::Accessed => Ad::Accessed,
        AdMix::Dirty => Ad::Dirty,
    };
    Populate { by, ad, roots, smm: None }
}

/// Random accesses to a warm working set, until the teardown is over.
pub(super) fn code(plan: &Plan) -> GuestCode {
    GuestCode {
        pages: plan.working_set_pages,
        arrival_ns: plan.config.arrival_ns,
        write_percent: WRITE_PERCENT,
        sharing: plan.sharing,
        ascending: false,
        warm: true,
        migrate_ns: None,
        toggle_ns: None,
        rest_ns: None,
        until: Flag::Refault,
    }
}

/// Maps the working set again.
pub(super) fn touch(plan: &Plan) -> Op {
    Op::Touch { pages: plan.working_set_pages, sharing: plan.sharing }
}

/// One vCPU: what it does before, then guest code, then its working set again.
pub(super) fn guest(plan: &Plan, id: u32, before: Vec<Op>, code: GuestCode) -> Thread {
    let mut ops = before;
    ops.extend([Op::Guest(code), touch(plan)]);
    Thread { who: Who::Vcpu(id as usize), ops }
}

/// All vCPUs with the usual guest code.
pub(super) fn guests(plan: &Plan) -> Vec<Thread> {
    (0..plan.config.vcpus).map(|id| guest(plan, id, Vec::new(), code(plan))).collect()
}

/// The VMM's thread: waits until `vcpus` guests are warm, updates, waits for the end of the teardown, lets each vCPU fault once under
/// its new root, and ends the guests.
pub(super) fn vmm(vcpus: u32, update: Vec<Op>) -> Thread {
    let mut ops = vec![Op::Await { flag: Flag::WarmedUp, count: vcpus }, Op::SleepMs(SETTLE_MS)];
    ops.extend(update);
    ops.extend([Op::AwaitTeardown, Op::SleepMs(SETTLE_MS), Op::Raise(Flag::Refault)]);
    Thread { who: Who::Caller, ops }
}

/// The usual memslot update.
pub(super) fn delete() -> Vec<Op> {
    vec![Op::Zap(Update::Delete)]
}

/// Waits for a flag, then does `ops`.
pub(super) fn after(flag: Flag, ops: Vec<Op>) -> Vec<Op> {
    std::iter::once(wait(flag)).chain(ops).collect()
}
