//! All judges in one: an [`Observer`] that books what it hears and compares it with what is there.
//!
//! Lock order: mmu_lock (held by whoever reports), then the judge's own mutex. A judge never calls the MMU, nor anybody, while it holds that mutex: who asked to be told of
//! violations is called after it, in the thread that reported.

use std::collections::BTreeSet;
use std::fmt;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use tdpmmu_mmu::TdpMmu;
use tdpmmu_platform::{Event, Exclusive, Guard, NO_TASK, Observer, Platform, RcuDomain, Task};
use tdpmmu_shadow::ShadowMmu;
use tdpmmu_spte::Spte;

use crate::caches::Caches;
use crate::dirty::{DirtyBook, PendingWrite};
use crate::flush::FlushLedger;
use crate::history::{Answer, Call, History};
use crate::ledger::RootLedger;
use crate::lists::Lists;
use crate::locks::Locks;
use crate::model::{Key, ReferenceModel, judge_change};
use crate::notifier::{Notifier, still_mapped};
use crate::pool::CountingPool;
use crate::progress::Progress;
use crate::rcu::Sections;
use crate::rule::Rule;
use crate::rules::{Check, Rules};
use crate::shadow::ShadowBook;
use crate::shadow_tree::ShadowView;
use crate::tree::Tree;
use crate::verdict::{Verdict, Violation};

struct State {
    model: ReferenceModel,
    pool: CountingPool,
    ledger: RootLedger,
    flushes: FlushLedger,
    caches: Caches,
    sections: Sections,
    locks: Locks,
    notifier: Notifier,
    dirty: DirtyBook,
    lists: Lists,
    progress: Progress,
    shadow: ShadowBook,
    history: History,
    unlinear: BTreeSet<u64>,
    verdict: Verdict,
    events: u64,
}

/// Who is told of each violation.
pub type OnViolation = Arc<dyn Fn(&Violation) + Send + Sync>;

/// See the module text.
pub struct Judge {
    rules: Rules,
    state: Mutex<State>,
    told: Mutex<Option<OnViolation>>,
}

impl fmt::Debug for Judge {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Judge").field("rules", &self.rules).finish_non_exhaustive()
    }
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
                flushes: FlushLedger::new(rules),
                caches: Caches::new(rules),
                sections: Sections::new(rules),
                locks: Locks::new(rules),
                notifier: Notifier::new(rules),
                dirty: DirtyBook::new(rules),
                lists: Lists::new(rules),
                progress: Progress::new(rules),
                shadow: ShadowBook::new(rules),
                history: History::default(),
                unlinear: BTreeSet::new(),
                verdict: Verdict::silencing(rules.silenced),
                events: 0,
            }),
            told: Mutex::new(None),
        })
    }

    /// The rules that it judges by.
    pub fn rules(&self) -> &Rules {
        &self.rules
    }

    /// Calls `callback` at each violation from now on (of the first [`Verdict::KEPT`]), in the thread whose report showed it: possibly with locks of the MMU held, never with the judge's own. The one
    /// before is replaced.
    pub fn on_violation(&self, callback: impl Fn(&Violation) + Send + Sync + 'static) {
        *self.told.lock().unwrap_or_else(PoisonError::into_inner) = Some(Arc::new(callback));
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// With the books open; then, with them closed, tells what was found.
    fn judge<R>(&self, body: impl FnOnce(&mut State) -> R) -> R {
        let (done, fresh) = {
            let state = &mut *self.state();
            (body(state), state.verdict.take_fresh())
        };
        if !fresh.is_empty() {
            let told = self.told.lock().unwrap_or_else(PoisonError::into_inner).clone();
            if let Some(told) = told {
                fresh.iter().for_each(|violation| told(violation));
            }
        }
        done
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

    /// Flushes that the reports leave owed.
    pub fn owed_flushes(&self) -> usize {
        self.state().flushes.open()
    }

    /// A call whose answer is to be judged against all others of its gfns; [`Judge::answered`] takes the number returned.
    pub fn called(&self, task: u32, call: Call) -> usize {
        self.state().history.begin(task, call)
    }

    /// The answer of a call.
    pub fn answered(&self, call: usize, answer: Answer) {
        self.state().history.end(call, answer);
    }

    /// Notes a violation that somebody else has found.
    pub fn note(&self, violation: Violation) {
        self.judge(|state| state.verdict.note(violation));
    }

    pub(crate) fn pending_writes(&self) -> Vec<PendingWrite> {
        self.state().dirty.pending()
    }

    /// Compares everything with everything, at any time, under the exclusive lock. Roots must not be put without mmu_lock meanwhile.
    pub fn check_locked<P: Platform>(&self, mmu: &TdpMmu<P>, guard: &Guard<'_, P, Exclusive>) {
        self.check(mmu, guard, false);
    }

    fn check<P: Platform>(&self, mmu: &TdpMmu<P>, guard: &Guard<'_, P, Exclusive>, quiet: bool) {
        let mut found = Verdict::default();
        let tree = Tree::read(mmu, guard, &mut found);
        let stats = mmu.leaf_pages();
        let linked = mmu.linked_tables();
        self.judge(|state| {
            let verdict = &mut state.verdict;
            verdict.reported_by(NO_TASK);
            found.violations().iter().for_each(|violation| verdict.note(violation.clone()));
            if self.rules.check != Check::Cheap {
                state.model.settle_all(verdict);
                state.model.compare(&tree.entries, verdict);
            }
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
                let what =
                    format!("pages 4K/2M/1G are {stats:?} by the statistics, {recount:?} by a recount");
                verdict.broken(Rule::StatsDiffer, None, None, what);
            }
            if linked != tree.tables.len() as i64 {
                let what = format!("{linked} tables by the count, {} by a recount", tree.tables.len());
                verdict.broken(Rule::StatsDiffer, None, None, what);
            }
        });
    }

    /// A quiet point: no operation under way, no work queued. Waits for RCU, takes the exclusive lock, compares everything.
    pub fn check_quiet<P: Platform>(&self, mmu: &TdpMmu<P>, task: &Task<P>) {
        mmu.rcu().barrier();
        {
            let guard = mmu.lock.write(task);
            self.check(mmu, &guard, true);
        }
        self.check_engine(mmu);
        self.judge(|state| {
            let State { history, unlinear, verdict, .. } = state;
            verdict.reported_by(NO_TASK);
            for found in history.check() {
                if unlinear.insert(found.gfn) {
                    let answers: Vec<String> = found.history.iter().map(ToString::to_string).collect();
                    verdict.broken(Rule::NotLinearizable, None, Some(found.gfn), answers.join("; "));
                }
            }
        });
    }

    /// Compares the shadow MMU with itself, with its memslots and with what was told, at any time, under the exclusive lock.
    pub fn check_shadow<P: Platform>(
        &self,
        mmu: &ShadowMmu<P>,
        guard: &Guard<'_, P, Exclusive>,
    ) -> ShadowView {
        let view = ShadowView::read(mmu, guard);
        let told = mmu.violations();
        self.judge(|state| {
            let State { shadow, verdict, .. } = state;
            verdict.reported_by(NO_TASK);
            // What is told per SPTE is not heard there.
            let book = (self.rules.check != Check::Cheap).then_some(&*shadow);
            view.judge(&self.rules, book, verdict);
            for what in told {
                verdict.broken(Rule::Engine, None, None, what);
            }
        });
        view
    }

    fn check_engine<P: Platform>(&self, mmu: &TdpMmu<P>) {
        let (stats, told) = (mmu.pool().stats(), mmu.violations());
        self.judge(|state| {
            let verdict = &mut state.verdict;
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
        });
    }

    /// The end, after [`TdpMmu::uninit`] and with every cache drained: nothing may be left.
    pub fn finish<P: Platform>(&self, mmu: &TdpMmu<P>, task: &Task<P>) {
        self.check_quiet(mmu, task);
        let taken = mmu.pool().stats().taken;
        self.judge(|state| {
            state.verdict.reported_by(NO_TASK);
            state.ledger.finish(&mut state.verdict);
            state.pool.finish(taken, &mut state.verdict);
            state.shadow.finish(&mut state.verdict);
            if taken != 0 {
                let what = format!("{taken} pages never came back to the pool");
                state.verdict.broken(Rule::PoolCount, None, None, what);
            }
        });
    }
}

impl State {
    fn event(&mut self, rules: &Rules, task: u32, event: &Event) {
        let Self { model, pool, ledger, verdict, .. } = self;
        self.events += 1;
        verdict.reported_by(task);
        if rules.design.keeps_roots {
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
        // These look at what the others know before they hear of it.
        let shadow = &mut self.shadow;
        self.flushes.event(task, event, |root| ledger.in_use(root) || shadow.in_use(root), verdict);
        shadow.event(task, event, verdict);
        self.locks.event(task, event, verdict);
        self.sections.event(task, event, verdict);
        self.caches.event(task, event, verdict);
        self.notifier.event(task, event, verdict);
        self.dirty.event(task, event, verdict);
        self.lists.event(task, event, verdict);
        let (locks, notifier) = (&self.locks, &self.notifier);
        self.progress.event(task, event, || locks.held_by_another(task) || notifier.is_active(), verdict);
        if rules.check == Check::Full {
            match *event {
                Event::FrameRelease { pfn, count } if rules.in_true_order() => {
                    let counts = |root: u32| rules.unmaps_invalid || ledger.is_valid(root);
                    still_mapped(pfn, count, model.leaves().filter(|(key, _)| counts(key.root)), verdict);
                    shadow.released(pfn, count, verdict);
                }
                Event::WriteProtected { as_id, gfn, level } => {
                    let counts = |root: u32| rules.protects_invalid || ledger.is_valid(root);
                    let maps = |key: &Key| key.as_id == as_id && key.covers(gfn);
                    let shadow = shadow.leaves();
                    let leaves = model.leaves().chain(shadow.iter().map(|(key, leaf)| (key, *leaf)));
                    let counted = leaves.filter(|(key, _)| self.shadow.knows(key.root) || counts(key.root));
                    self.dirty.protected(gfn, level, counted.filter(|(key, _)| maps(key)), verdict);
                }
                _ => {}
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

impl Observer for Judge {
    fn event(&self, task: u32, event: &Event) {
        let task = if task == NO_TASK { (self.rules.who)().unwrap_or(NO_TASK) } else { task };
        if self.rules.check == Check::Cheap
            && let Event::SpteChanged { as_id, root, gfn, level, old, new, .. } = *event
        {
            // No lock and no book for what is told once per SPTE: its form alone.
            let mut found = Verdict::default();
            found.reported_by(task);
            judge_change(&self.rules, Key { as_id, root, gfn, level }, Spte(old), Spte(new), &mut found);
            if found.count() != 0 {
                found.violations().iter().for_each(|violation| self.note(violation.clone()));
            }
            return;
        }
        if self.rules.check == Check::Cheap && matches!(event, Event::ShadowLeaf { .. }) {
            return;
        }
        self.judge(|state| state.event(&self.rules, task, event));
    }

    fn wants_detail(&self) -> bool {
        self.rules.check == Check::Full
    }
}
