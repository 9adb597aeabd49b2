//! Outcomes become results: the row of a run, and whether it can be true.

mod believe;

use std::collections::BTreeMap;

use tdpmmu_platform::{Histogram, Histograms, MeterSnapshot, Platform, Real};
use tdpmmu_spte::LockMode;
use tdpmmu_spte::geometry::page_size_name;
use tdpmmu_table::{TABLE_BYTES, TablePool};
use tdpmmu_vm::AccessOutcome;

use crate::LabError;
use crate::config::{DesignPlan, Plan};
use crate::outcome::{Outcome, ThreadReport};
use crate::result::{
    CpuNs, DropLoop, H, LockStats, PopulateResult, RcuResult, Refault, Run, Teardown, UpdateNs,
};

use crate::scenario::{Mark, Who};
use crate::scene::{Kind, LOOP_SPTES};

/// What `drop_loop` reports.
pub fn drop_loop(outcome: &Outcome, times: u64) -> DropLoop {
    let h = |mark| outcome.marks.get(&mark).map(H::from).unwrap_or_default();
    DropLoop {
        root_sptes: LOOP_SPTES,
        count: times,
        block_drop_ns: h(Mark::Drop),
        block_baseline_ns: h(Mark::Baseline),
    }
}

fn merged<'a>(meters: impl Iterator<Item = &'a MeterSnapshot>) -> MeterSnapshot {
    let mut sum = MeterSnapshot::default();
    for meter in meters {
        sum.merge(meter);
    }
    sum
}

/// What those who tear down have measured, workers included.
fn paying(kind: Kind, outcome: &Outcome) -> MeterSnapshot {
    let threads = outcome.threads.iter().filter(|t| tears_down(kind, t)).map(|t| &t.meter);
    merged(threads.chain(outcome.workers.iter().map(|w| &w.0)))
}

/// Is this thread part of the teardown?
fn tears_down(kind: Kind, thread: &ThreadReport) -> bool {
    match kind {
        Kind::Zap => thread.who == Who::Caller,
        Kind::Drop => thread.who == Who::Vcpu(0),
    }
}

/// The run's row, and what is wrong with it, if anything is.
pub fn to_run(
    kind: Kind,
    plan: &Plan,
    design: &DesignPlan,
    rep: u32,
    outcome: &Outcome,
    cpus: usize,
) -> Result<Run, LabError> {
    let c = &plan.config;
    let sptes = outcome.at_t0.sptes();
    let empty = Histograms::default();
    let all = merged(outcome.threads.iter().map(|t| &t.meter).chain(outcome.workers.iter().map(|w| &w.0)));
    let paying = paying(kind, outcome);
    let (hist, pay_hist) =
        (all.histograms.as_deref().unwrap_or(&empty), paying.histograms.as_deref().unwrap_or(&empty));
    let worker_cpu: u64 = outcome.workers.iter().map(|w| w.1).sum();
    let op_cpu: u64 = outcome.threads.iter().filter(|t| tears_down(kind, t)).map(|t| t.op_cpu_ns).sum();
    let (caller, vcpu) = if kind == Kind::Zap { (op_cpu, 0) } else { (0, op_cpu) };
    let cpu_ns = CpuNs { caller, vcpu, worker: worker_cpu, rcu: outcome.rcu_cpu_ns };
    let update = outcome.update.map(|t| UpdateNs {
        total: t.total_ns,
        lock_wait: t.lock_wait_ns,
        exclusive_hold: t.exclusive_hold_ns,
        exclusive_total: t.exclusive_total_ns,
        exclusive_longest: t.exclusive_longest_ns,
        kick_wait: t.kick_wait_ns,
        zap: t.zap_ns,
    });
    let mark = |m| outcome.marks.get(&m).map(H::from);
    let drop_ns = mark(Mark::Drop).and_then(|h| h.max).unwrap_or(0);
    let return_ns = update.as_ref().map_or(drop_ns, |u| u.total);
    let teardown = outcome.last_zap_end_ns.map(|zap_end| {
        let free = outcome.last_free_ns.unwrap_or(zap_end);
        Teardown {
            fz_return_ns: return_ns,
            last_spte_unreachable_ns: zap_end,
            last_table_free_ns: free,
            cpus_used: (caller + vcpu + worker_cpu + cpu_ns.rcu) as f64 / free.max(1) as f64,
            cpu_ns,
            entry_writes: paying.entry_writes,
            entry_reads: paying.entry_reads,
            ns_per_spte: paying.walk_cpu_ns as f64 / sptes.max(1) as f64,
            ns_per_entry: paying.walk_cpu_ns as f64 / paying.entry_writes.max(1) as f64,
        }
    });
    let felt: Vec<_> = outcome.threads.iter().filter(|t| !t.felt.access.is_empty()).collect();
    let mut by_outcome = BTreeMap::new();
    let mut access = Histogram::new();
    for kind in AccessOutcome::ALL {
        let mut one = Histogram::new();
        for thread in &felt {
            one.merge(&thread.felt.access[kind as usize]);
        }
        if one.count() > 0 {
            access.merge(&one);
            by_outcome.insert(kind.name(), H::from(&one));
        }
    }
    let since_t0 = |at: u64| Real::ticks_to_ns(at.saturating_sub(outcome.t0));
    let mut block_update = Histogram::new();
    let mut visible = Histogram::new();
    for thread in &felt {
        block_update.merge(&thread.felt.block_update);
        if let Some(at) = thread.felt.visible_at {
            visible.record(since_t0(at));
        }
    }
    let exclusive_drop = kind == Kind::Drop
        && design.info.name == "inline"
        && plan.profile.root_free_lock == LockMode::Exclusive;
    let threads_running = c.vcpus as usize + 1 + usize::from(design.info.name == "async-worker") * c.workers;
    let run = Run {
        design: design.info.name.into(),
        passes: design.passes.to_string(),
        ownership: design.ownership.to_string(),
        lock_mode: if exclusive_drop { "exclusive" } else { "shared" },
        preempt: c.preempt.clone(),
        tick_ns: c.tick_ns,
        kernel_profile: plan.profile.to_string(),
        rep,
        memory_bytes: c.memory_bytes,
        page: page_size_name(plan.level).into(),
        vcpus: c.vcpus,
        overcommit: threads_running > cpus,
        sptes,
        table_pages: outcome.tables_at_t0,
        table_bytes: outcome.tables_at_t0 * TABLE_BYTES as u64,
        ad_mix: c.ad_mix.clone(),
        writeback: c.writeback.clone(),
        written_back_frames: outcome.written_back,
        populated_by: c.populate.clone(),
        extrapolated: false,
        populate: PopulateResult {
            wall_ns: outcome.populate_ns,
            ns_per_spte: outcome.populate_ns as f64 / outcome.populated.max(1) as f64,
            prefault_ns: outcome.prefault_ns,
        },
        update_ns: update,
        block_drop_ns: mark(Mark::Drop),
        block_baseline_ns: mark(Mark::Baseline),
        retained_table_pages: (kind == Kind::Drop).then_some(outcome.retained),
        drop_loop: None,
        block_update_ns: H::from(&block_update),
        visible_ns: H::from(&visible),
        visible_last_ns: felt.iter().filter_map(|t| t.felt.visible_at).max().map(since_t0),
        access_ns: H::from(&access),
        access_ns_by_outcome: by_outcome,
        arrival_ns: c.arrival_ns,
        step_units: H::from(&pay_hist.step_units),
        step_ns: H::default(),
        step_ns_dropped: 0,
        step_ns_dropped_cpu_max: None,
        teardown,
        lock: LockStats {
            read_hold_ns: H::from(&hist.read_hold),
            write_hold_ns: H::from(&hist.write_hold),
            reader_wait_ns: H::from(&hist.reader_wait),
            writer_wait_ns: H::from(&hist.writer_wait),
            handoffs: all.handoffs,
            contended: all.contended,
        },
        rcu: RcuResult {
            flavour: outcome.rcu.flavour.name().to_owned(),
            section_ns: H::from(&pay_hist.rcu_section),
            grace_period_ns: H::from(&outcome.rcu.grace_period_ns),
            backlog_pages_peak: outcome.rcu.backlog_peak,
        },
        queue_ns: outcome.queue.as_ref().map(H::from).unwrap_or_default(),
        refault: Refault { faults: outcome.refaults.0, wall_ns: outcome.refaults.1 },
        attribution: crate::attribution::attribution(outcome),
        fit: None,
        yields: paying.yields,
        retries: all.retries,
        kicks: outcome.kicks,
        flushes: outcome.flushes,
        table_pages_freed: outcome.freed,
        table_pages_leaked: outcome.close.tables_leaked,
        pool_peak_pages: outcome.pool_peak,
        pool_cap_hits: outcome.pool_cap_hits,
        overhead_bytes_per_table: TablePool::overhead_bytes_per_table(),
        violations: None,
        violation_list: Vec::new(),
        violations_checked_memory_bytes: None,
    };
    believe::believable(kind, plan, outcome, &paying, &run)?;
    Ok(run)
}

/// The time between two reschedule checks of the tasks that tear down; how many samples a context switch spoilt, and the
/// longest of those.
pub fn step_ns(kind: Kind, outcome: &Outcome) -> (H, u64, u64) {
    let paying = paying(kind, outcome);
    let histogram = crate::bench::summary(paying.histograms.as_deref().map(|h| &h.step_ns));
    (histogram, paying.steps_dropped, paying.longest_dropped_step_cpu_ns)
}
