//! All judges in one: an [`Observer`] that books what it hears and compares it with what is there.
//!
//! Lock order: mmu_lock (held by whoever reports), then the judge's own mutex. A judge never calls the MMU while it holds that mutex.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tdpmmu_mmu::TdpMmu;
use tdpmmu_platform::{Event, Exclusive, Guard, NO_TASK, Observer, Platform, RcuDomain, Task};

use crate::ledger::RootLedger;
use crate::model::ReferenceModel;
use crate::pool::CountingPool;
use crate::rule::{Rule, Rules, Verdict, Violation};
use crate::tree::Tree;

struct State {
    model: ReferenceModel,
    pool: CountingPool,
    ledger: RootLedger,
    verdict: Verdict,
    events: u64,
}

/// See the module text.
pub struct Judge {
    rules: Rules,
    state: Mutex<State>,
}

impl Judge {
    /// A judge by `rules`, to be given to an MMU as its observer before the first root exists.
    pub fn new(rules: Rules) -> Arc<Self> {
        Arc::new(Self {
            rules,
            state: Mutex::new(State {
                model: ReferenceModel::new(rules),
                pool: CountingPool::new(),
                ledger: RootLedger::new(rules),
                verdict: Verdict::default(),
                events: 0,
            }),
        })
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// What was found so far, oldest first (at most [`Verdict::KEPT`]).
    pub fn violations(&self) -> Vec<Violation> {
        self.state().verdict.violations().to_vec()
    }

    /// How many violations there were, kept or not.
    pub fn count(&self) -> u64 {
        self.state().verdict.count()
    }

    /// Events heard: an oracle that heard nothing has judged nothing.
    pub fn events(&self) -> u64 {
        self.state().events
    }

    /// Present entries that the reports leave under `root`.
    pub fn present_under(&self, root: u32) -> u64 {
        self.state().model.present_under(root)
    }

    /// Compares everything with everything, at any time, under the exclusive lock. Roots must not be put without mmu_lock meanwhile.
    pub fn check_locked<P: Platform>(&self, mmu: &TdpMmu<P>, guard: &Guard<'_, P, Exclusive>) {
        self.check(mmu, guard, false);
    }

    fn check<P: Platform>(&self, mmu: &TdpMmu<P>, guard: &Guard<'_, P, Exclusive>, quiet: bool) {
        let mut found = Verdict::default();
        found.reported_by(NO_TASK);
        let tree = Tree::read(mmu, guard, &mut found);
        let stats = mmu.leaf_pages();
        let linked = mmu.linked_tables();
        let state = &mut *self.state();
        for v in found.violations() {
            state.verdict.reported_by(v.task);
            state.verdict.broken(v.rule, v.root, v.gfn, v.what.clone());
        }
        let verdict = &mut state.verdict;
        verdict.reported_by(NO_TASK);
        state.model.settle_all(verdict);
        state.model.compare(&tree.entries, verdict);
        state.ledger.check(&tree.roots, quiet, verdict);
        state.pool.check(&tree.tables, quiet, verdict);
        for &root in tree.roots.keys() {
            if !state.pool.is_root(root) {
                let what = "listed, and not allocated as a root".to_owned();
                verdict.broken(Rule::UsedAfterUnlink, Some(root), None, what);
            }
        }
        let recount = [tree.leaves[1], tree.leaves[2], tree.leaves[3]];
        if self.rules.page_stats && stats != recount {
            let what = format!("pages 4K/2M/1G are {stats:?} by the statistics, {recount:?} by a recount");
            verdict.broken(Rule::StatsDiffer, None, None, what);
        }
        if linked != tree.tables.len() as i64 {
            let what = format!("{linked} tables by the count, {} by a recount", tree.tables.len());
            verdict.broken(Rule::StatsDiffer, None, None, what);
        }
    }

    /// A quiet point: no operation under way, no work queued. Waits for RCU, takes the exclusive lock, compares everything.
    pub fn check_quiet<P: Platform>(&self, mmu: &TdpMmu<P>, task: &Task<P>) {
        mmu.rcu().barrier();
        {
            let guard = mmu.lock.write(task);
            self.check(mmu, &guard, true);
        }
        self.check_engine(mmu);
    }

    fn check_engine<P: Platform>(&self, mmu: &TdpMmu<P>) {
        let (stats, told) = (mmu.pool().stats(), mmu.violations());
        let verdict = &mut self.state().verdict;
        verdict.reported_by(NO_TASK);
        if stats.double_frees != 0 {
            let what = format!("the pool counted {} frees of free pages", stats.double_frees);
            verdict.broken(Rule::FreedTwice, None, None, what);
        }
        if stats.allocs - stats.frees != stats.taken {
            verdict.broken(Rule::PoolCount, None, None, format!("{stats:?} does not add up"));
        }
        for what in told {
            verdict.broken(Rule::Engine, None, None, what);
        }
    }

    /// The end, after [`TdpMmu::uninit`] and with every cache drained: nothing may be left.
    pub fn finish<P: Platform>(&self, mmu: &TdpMmu<P>, task: &Task<P>) {
        self.check_quiet(mmu, task);
        let taken = mmu.pool().stats().taken;
        let state = &mut *self.state();
        state.ledger.finish(&mut state.verdict);
        state.pool.finish(taken, &mut state.verdict);
        if taken != 0 {
            let what = format!("{taken} pages never came back to the pool");
            state.verdict.broken(Rule::PoolCount, None, None, what);
        }
    }
}

impl Observer for Judge {
    fn event(&self, task: u32, event: &Event) {
        let state = &mut *self.state();
        let State { model, pool, ledger, verdict, events } = state;
        *events += 1;
        verdict.reported_by(task);
        if self.rules.design.keeps_roots {
            // At the begin under the exclusive lock; at the end faults go on, and their reports are nobody's business.
            if let Event::FastZapBegin = event {
                model.settle_all(verdict);
            }
        } else if let Event::FastZapEnd = event {
            // Its roots are invalid and everybody who worked on them has told: no report of theirs is missing.
            for root in ledger.in_fast_zap() {
                model.settle_root(root, verdict);
            }
        }
        ledger.event(event, model, verdict);
        pool.event(event, verdict);
        model.event(event, verdict);
        if let Event::Unlock { debt: true, .. } = event {
            let what = "mmu_lock was released with a flush owed".to_owned();
            verdict.broken(Rule::FlushOwed, None, None, what);
        }
    }
}
