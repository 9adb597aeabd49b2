//! Outcomes become results: the row of a run, and whether it can be true.

mod believe;
mod shadow;

use std::collections::BTreeMap;

use tdpmmu_platform::{Histogram, Histograms, MeterSnapshot};
use tdpmmu_spte::LockMode;
use tdpmmu_spte::geometry::page_size_name;
use tdpmmu_table::{TABLE_BYTES, TablePool};
use tdpmmu_vm::AccessOutcome;

use crate::LabError;
use crate::attribution;
use crate::config::{BenchConfig, Case, Plan};
use crate::outcome::{Outcome, ThreadReport};
use crate::result::{
    CloseNs, CpuNs, Curve, DropLoop, H, LockStats, PopulateResult, RcuResult, Refault, Run, Teardown,
    UpdateNs, Updates, Waiting,
};

use crate::scenario::{Mark, Who};
use crate::scene::{Kind, LOOP_SPTES};
use crate::timeline;

pub use self::shadow::publish;

/// What `drop_loop` reports.
pub fn drop_loop(outcome: &Outcome, times: u64) -> DropLoop {
    let h = |mark| outcome.marks.get(&mark).map(H::from).unwrap_or_default();
    DropLoop {
        root_sptes: LOOP_SPTES,
        count: times,
        block_drop_ns: h(Mark::Drop),
        block_drop_woken_ns: outcome.marks.get(&Mark::DropWoken).map(H::from),
        worker_wakes: outcome.marks.get(&Mark::DropWoken).map(Histogram::count),
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
fn paying(outcome: &Outcome) -> MeterSnapshot {
    if outcome.pays.is_none() {
        let end = &outcome.close;
        return MeterSnapshot {
            entry_writes: end.entry_writes,
            entry_reads: end.entry_reads,
            walk_cpu_ns: end.walk_cpu_ns,
            ..MeterSnapshot::default()
        };
    }
    let threads = outcome.threads.iter().filter(|t| tears_down(outcome, t)).map(|t| &t.meter);
    merged(threads.chain(outcome.workers.iter().map(|w| &w.0)))
}

/// Is this thread part of the teardown?
fn tears_down(outcome: &Outcome, thread: &ThreadReport) -> bool {
    outcome.pays == Some(thread.who)
}

/// A distribution bucket by bucket.
fn curve(histogram: &Histogram) -> Curve {
    histogram.buckets().collect()
}

/// The run's row, and what is wrong with it, if anything is.
pub fn to_run(plan: &Plan, case: &Case, rep: u32, outcome: &Outcome, cpus: usize) -> Result<Run, LabError> {
    let c = &plan.config;
    let sptes = outcome.at_t0.sptes();
    let empty = Histograms::default();
    let all = merged(outcome.threads.iter().map(|t| &t.meter).chain(outcome.workers.iter().map(|w| &w.0)));
    let paying = paying(outcome);
    let (hist, pay_hist) =
        (all.histograms.as_deref().unwrap_or(&empty), paying.histograms.as_deref().unwrap_or(&empty));
    let worker_cpu: u64 = outcome.workers.iter().map(|w| w.1).sum();
    let op_cpu: u64 = outcome.threads.iter().filter(|t| tears_down(outcome, t)).map(|t| t.op_cpu_ns).sum();
    // A vCPU that puts the last reference to a root while somebody else's zap is under way may pay too.
    let others = outcome.threads.iter().filter(|t| !tears_down(outcome, t)).map(|t| t.meter.walk_cpu_ns);
    let (caller, vcpu) = match outcome.pays {
        Some(Who::Vcpu(_)) => (0, op_cpu),
        Some(_) => (op_cpu, 0),
        None => (outcome.close.cpu_ns, 0),
    };
    let vcpu = vcpu + others.sum::<u64>();
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
    let close_ns = outcome.pays.is_none().then_some(CloseNs {
        total: outcome.close.total_ns,
        zap_all: outcome.close.zap_all_ns,
        rest: outcome.close.total_ns.saturating_sub(outcome.close.zap_all_ns),
    });
    let since_t0 = |at: u64| (outcome.to_ns)(at.saturating_sub(outcome.t0));
    // Of many calls the last return: what is torn down is what all of them asked for.
    let requests = outcome.threads.iter().filter_map(|t| t.request.as_ref());
    let returned = requests.flat_map(|request| &request.calls).map(|call| call.1).max().map_or(0, since_t0);
    let return_ns = close_ns.as_ref().map_or(returned, |close| close.total);
    // A subtree that a huge page replaces is no zap of a root: its end is the end of the request.
    let replaced = outcome.marks.get(&Mark::Replace).map(|_| return_ns);
    // A design that zaps for the slot alone may find nothing of it: then nothing is torn down, and nothing is to be said of it.
    let untouched = case.shadow.is_some() && paying.entry_writes == 0 && outcome.freed == 0;
    let zapped = outcome.last_zap_end_ns.filter(|_| !untouched);
    let teardown = zapped.or(replaced).map(|zap_end| {
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
            ns_per_entry: match paying.entry_writes {
                0 => 0.0,
                writes => paying.walk_cpu_ns as f64 / writes as f64,
            },
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
    let mut block_update = Histogram::new();
    let mut visible = Histogram::new();
    for thread in &felt {
        block_update.merge(&thread.felt.block_update);
        if let Some(at) = thread.felt.visible_at {
            visible.record(since_t0(at));
        }
    }
    let empty_marks = Histogram::new();
    let all_of = |m| outcome.marks.get(&m).unwrap_or(&empty_marks);
    let curves = [
        ("access_ns", &access),
        ("block_update_ns", &block_update),
        ("reader_wait_ns", &hist.reader_wait),
        ("writer_wait_ns", &hist.writer_wait),
        ("step_units", &pay_hist.step_units),
        ("update_ns", all_of(Mark::Update)),
        ("block_drop_ns", all_of(Mark::Drop)),
    ];
    let many = all_of(Mark::Update).count() > 1;
    let threads_running = c.vcpus as usize + 1 + usize::from(case.info.queue.is_some()) * c.workers;
    let run = Run {
        scene: case.scene.name.into(),
        design: case.info.name.into(),
        flawed: case.info.flawed,
        workers: if case.info.queue.is_some() { c.workers } else { 0 },
        worker_queue: queue_of(case, c),
        sharing: plan.sharing.name(),
        passes: case.passes_name(),
        ownership: case.ownership_name(),
        lock_mode: if exclusive(plan, case, outcome) { "exclusive" } else { "shared" },
        preempt: case.preempt_name().into(),
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
        updates: many.then(|| {
            let updates = all_of(Mark::Update);
            Updates { count: updates.count(), update_ns: H::from(updates) }
        }),
        // The zap in place keeps its roots valid: what is mapped at its return may be new. Where vCPUs toggle, an invalid root may be younger than the
        // zap, and whoever lost it is at it: there the oracle follows each root. One design keeps obsolete pages on purpose.
        sptes_mapped_at_return: (outcome.update.is_some()
            && !case.info.obligations.keeps_roots
            && !shadow::keeps_obsolete(case)
            && toggled(outcome).is_none())
        .then_some(outcome.mapped_at_return),
        waiting: mark(Mark::Waiting).map(|wait_ns| Waiting {
            what: case.scene.name.strip_prefix("waiting-").unwrap_or("other"),
            wait_ns,
        }),
        wake_ns: mark(Mark::Wake),
        migrations: moved(outcome),
        toggles: toggled(outcome),
        blocked_ns: mark(Mark::Replace),
        prepare_ns: outcome.marks.get(&Mark::Prepare).and_then(|h| h.summary().max),
        close_ns,
        last: outcome.last,
        curves: curves.into_iter().filter(|c| c.1.count() > 0).map(|(name, h)| (name, curve(h))).collect(),
        block_drop_ns: mark(Mark::Drop),
        block_baseline_ns: mark(Mark::Baseline),
        retained_table_pages: retained(case, outcome),
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
            backlog_series: timeline::backlog(outcome),
        },
        queue_ns: outcome.queue.as_ref().map(H::from).unwrap_or_default(),
        refault: Refault { faults: outcome.refaults.0, wall_ns: outcome.refaults.1 },
        attribution: attribution::attribution(outcome),
        others: attribution::others(outcome, c.arrival_ns),
        timeline: if c.timeline { timeline::timeline(outcome) } else { None },
        fit: None,
        shadow: shadow::result(case, outcome),
        cycle_ns: mark(Mark::Cycle),
        published: None,
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
    believe::believable(plan, case, outcome, &paying, &run)?;
    Ok(run)
}

/// Is mmu_lock held exclusively for the SPTE work of the request?
fn exclusive(plan: &Plan, case: &Case, outcome: &Outcome) -> bool {
    if case.shadow.is_some() {
        return true;
    }
    let does = &case.info.obligations;
    match (outcome.pays, case.scene.kind) {
        // kvm_mmu_zap_all.
        (None, _) => true,
        // A fault holds it shared, whoever's design it is.
        (Some(_), Kind::Zap) => outcome.update.is_some() && does.keeps_roots,
        (Some(_), Kind::Drop) => does.last_put_zaps && plan.profile.root_free_lock == LockMode::Exclusive,
    }
}

/// Tables that stay: those of a dropped root that the MMU owns, or those of an invalid root that a halted vCPU holds.
fn retained(case: &Case, outcome: &Outcome) -> Option<u64> {
    match (case.scene.kind, case.scene.name) {
        (_, "halted-vcpu") => Some(outcome.stale_tables),
        (Kind::Drop, _) if outcome.pays.is_some() => Some(outcome.retained),
        _ => None,
    }
}

fn moved(outcome: &Outcome) -> Option<u64> {
    let moves: u64 = outcome.threads.iter().map(|t| t.felt.migrations).sum();
    (moves > 0).then_some(moves)
}

fn toggled(outcome: &Outcome) -> Option<u64> {
    let toggles: u64 = outcome.threads.iter().map(|t| t.felt.toggles).sum();
    (toggles > 0).then_some(toggles)
}

/// The queue in effect: the one asked for, else the design's own.
fn queue_of(case: &Case, config: &BenchConfig) -> Option<String> {
    let own = case.info.queue?.name();
    Some(config.worker_queue.clone().unwrap_or_else(|| own.into()))
}

/// The time between two reschedule checks of the tasks that tear down; how many samples a context switch spoilt, and the
/// longest of those.
pub fn step_ns(outcome: &Outcome) -> (H, u64, u64) {
    let paying = paying(outcome);
    let histogram = crate::bench::summary(paying.histograms.as_deref().map(|h| &h.step_ns));
    (histogram, paying.steps_dropped, paying.longest_dropped_step_cpu_ns)
}
