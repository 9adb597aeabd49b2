//! Page sizes that change under the guest: split by dirty logging, grown by the host.

use tdpmmu_spte::geometry::page_bytes;

use super::parts::{SETTLE_MS, code, delete, guest, guests, one_root, scenario, vmm};
use super::{Ask, Kind, Scene};
use crate::config::Plan;
use crate::memory::Estimate;
use crate::run::MOST_COLLAPSED;
use crate::scenario::{Flag, Op, Scenario, Sharing, Thread, Who, wait};

pub(super) const DIRTY_SPLIT: Scene = Scene {
    name: "dirty-split",
    kind: Kind::Zap,
    summary: "live migration begins under running vCPUs: dirty logging splits every huge page to 4K; then a memslot is deleted",
    look_at: "prepare_ns (the split), sptes (now of 4K), update_ns, ns_per_spte",
    estimate: |plan| Estimate::new(plan.config.memory_bytes, 1, plan.config.levels),
    fits: huge_pages,
    shadow: |_, _| Err(NO_SPLIT.into()),
    build: dirty_split,
};

pub(super) const HUGE_IN_FAULT: Scene = Scene {
    name: "huge-page-in-fault",
    kind: Kind::Zap,
    summary: "the host has collapsed pieces of the guest's memory into 1 GiB pages (2 MiB in small guests): the next fault puts a huge leaf over a table and tears the subtree down itself",
    look_at: "blocked_ns (per fault), teardown.entry_writes",
    estimate: one_root,
    fits: |plan| piece(plan).map(drop),
    shadow: |_, _| Err(STAYS_CACHED.into()),
    build: huge_in_fault,
};

const NO_SPLIT: &str =
    "without the TDP MMU nothing is split ahead of faults: each write that follows splits its own page";
const STAYS_CACHED: &str =
    "a table that a huge leaf replaces stays in the shadow MMU's cache: nobody tears it down";

fn huge_pages(plan: &Plan) -> Result<(), String> {
    if plan.level == 1 {
        return Err(
            "the guest is mapped by 4K pages, dirty logging would split nothing: use page 2M or 1G".into()
        );
    }
    Ok(())
}

fn dirty_split(ask: &Ask<'_>) -> Scenario {
    let vcpus = ask.plan.config.vcpus;
    let mut threads = guests(ask.plan);
    let mut before = vec![Op::StartDirtyLog, Op::SleepMs(SETTLE_MS)];
    before.extend(delete());
    threads.push(vmm(vcpus, before));
    scenario(ask, vcpus, Some(Who::Caller), threads)
}

/// Level of the pieces, and how many of them: the largest whose pieces fit into a quarter of the memory.
fn piece(plan: &Plan) -> Result<(u8, u64), String> {
    let quarter = plan.config.memory_bytes / 4;
    // The largest modelled host has little room beside the largest guest.
    let most = if plan.config.memory_bytes > 60 << 40 { 1 } else { MOST_COLLAPSED };
    (plan.level + 1..=3)
        .rev()
        .map(|level| (level, (quarter / page_bytes(level)).min(most)))
        .find(|piece| piece.1 > 0)
        .ok_or_else(|| match plan.level {
            3 => "the guest is mapped by 1G pages, no host page is larger: use page 4K or 2M".into(),
            level => format!(
                "pieces are to be a quarter of the memory at most: page {} needs {}",
                plan.config.page,
                crate::units::bytes(4 * page_bytes(level + 1))
            ),
        })
}

/// vCPU 0 meets the pieces at the begin of memory; the others run on its later half.
fn huge_in_fault(ask: &Ask<'_>) -> Scenario {
    let vcpus = ask.plan.config.vcpus;
    let (level, pieces) = piece(ask.plan).unwrap_or((2, 0));
    let mut plan = ask.plan.clone();
    plan.working_set_pages = plan.working_set_pages.min(ask.estimate.sptes / 2).max(1);
    plan.sharing = Sharing::Local;
    let mut threads: Vec<_> = (1..vcpus).map(|id| guest(&plan, id, Vec::new(), code(&plan))).collect();
    threads.push(Thread {
        who: Who::Vcpu(0),
        ops: vec![Op::Load, wait(Flag::Promoted), Op::Replace { pieces, level }, Op::Raise(Flag::Dropped)],
    });
    let others = Op::Await { flag: Flag::WarmedUp, count: vcpus - 1 };
    let promote = [Op::Promote { pieces, level }, Op::Raise(Flag::Promoted), wait(Flag::Dropped)];
    let end = [Op::AwaitTeardown, Op::Raise(Flag::Refault)];
    let ops = std::iter::once(others).chain(promote).chain(end).collect();
    threads.push(Thread { who: Who::Caller, ops });
    let mut made = scenario(ask, vcpus, Some(Who::Vcpu(0)), threads);
    // What is emptied at the promotion is the kernel profile's business.
    (made.vm.max_level, made.sptes) = (level, None);
    made
}
