//! What every scene is made of: the VM, its population, its guests.

use crate::config::{AdMix, DesignPlan, Plan, PopulateBy};
use crate::scenario::{Ad, By, Flag, Op, Populate, VmSpec};

/// Writes of 100 guest accesses.
const WRITE_PERCENT: u8 = 50;

/// Tables beside the guest's own: other roots, working sets under new roots, vCPU caches.
fn spare_tables(plan: &Plan) -> u64 {
    let rebuilt = plan.working_set_pages * u64::from(plan.config.vcpus) / 256 + 64;
    4096 + 32 * u64::from(plan.config.vcpus) + rebuilt
}

pub(super) fn vm_spec(plan: &Plan, design: &DesignPlan, tables: u64, vcpus: u32, step_ns: bool) -> VmSpec {
    let c = &plan.config;
    VmSpec {
        profile: c.kernel_profile.clone(),
        design: design.info.name.into(),
        passes: design.passes.to_string(),
        ownership: design.ownership.to_string(),
        vcpus: vcpus as usize,
        levels: c.levels,
        memory_bytes: c.memory_bytes,
        level: plan.level,
        max_tables: u32::try_from(tables + spare_tables(plan)).unwrap_or(u32::MAX - 256),
        workers: c.workers,
        preempt: c.preempt.clone(),
        tick_ns: c.tick_ns,
        write_back: plan.write_back,
        step_ns,
        force_yield: None,
    }
}

pub(super) fn populate(plan: &Plan) -> Option<Populate> {
    let by = match plan.populate {
        PopulateBy::Bulk => By::Bulk,
        PopulateBy::Fault => By::Faults,
    };
    let ad = match plan.ad_mix {
        AdMix::Clean => Ad::Clean,
        AdMix::Accessed => Ad::Accessed,
        AdMix::Dirty => Ad::Dirty,
    };
    Some(Populate { by, ad })
}

pub(super) fn guest(plan: &Plan) -> Op {
    Op::Guest {
        pages: plan.working_set_pages,
        arrival_ns: plan.config.arrival_ns,
        write_percent: WRITE_PERCENT,
        until: Flag::Refault,
    }
}
