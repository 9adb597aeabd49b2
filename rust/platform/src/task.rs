//! "current": what a thread that calls into the MMU carries with it.
//!
//! One task per OS thread: its RCU reader, its time slice, its measurements. A task is not `Sync`; everything in it is
//! a plain cell, and nothing on the hot path is atomic. With measuring off, a read section is the RCU reader's two stores
//! and one predictable branch each way.

use std::{
    cell::Cell,
    fmt,
    sync::{
        Arc,
        atomic::{AtomicU32, Ordering},
    },
};

use crate::{
    api::{Platform, RcuDomain, RcuReader},
    meter::{Meter, Phase, add},
    mmu_lock::MmuLock,
    observer::{Event, Observer},
    pace::{Pace, YieldPoint},
    rcu::QuickSection,
    site::Site,
    slice::Slice,
    timeline::{Mark, Moment, Recording, Timeline},
};

/// What a task is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Role {
    /// A vCPU thread.
    Vcpu,
    /// The thread of a memslot ioctl or another caller.
    Caller,
    /// A worker of the work queue.
    Worker,
    /// The RCU thread.
    Rcu,
    /// Populates in bulk.
    Populate,
    /// Looks on.
    Observer,
}

impl Role {
    /// The name that result files use.
    pub const fn name(self) -> &'static str {
        match self {
            Role::Vcpu => "vcpu",
            Role::Caller => "caller",
            Role::Worker => "worker",
            Role::Rcu => "rcu",
            Role::Populate => "populate",
            Role::Observer => "observer",
        }
    }
}

/// When a task gives way, after the kernel's preemption models.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash, Default)]
pub enum Preempt {
    /// On need_resched, at checks.
    None,
    /// The same, and at might-sleep points outside the walks.
    Voluntary,
    /// Also when somebody waits for the lock.
    #[default]
    Full,
}

/// How a task behaves and what it measures.
#[derive(Clone)]
pub struct TaskConfig {
    /// When to give way.
    pub preempt: Preempt,
    /// CPU time after which need_resched holds, in ns.
    pub tick_ns: u64,
    /// Fill the histograms.
    pub measure: bool,
    /// For tests: every n-th check yields.
    pub force_yield: Option<u32>,
    /// With `measure`: fill `step_ns` instead of `step_units`.
    pub step_ns: bool,
    /// Attribute time to phases; off, all of it is `Phase::Other`.
    pub attribute: bool,
    /// Keep a [`Recording`] of phases, holds and read sections.
    pub record: bool,
    /// Who says where this task yields, in the place of `preempt`, the tick and `force_yield`.
    pub pace: Option<Arc<dyn Pace>>,
}

impl fmt::Debug for TaskConfig {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Self { preempt, tick_ns, measure, force_yield, step_ns, attribute, record, pace } = self;
        f.debug_struct("TaskConfig")
            .field("preempt", preempt)
            .field("tick_ns", tick_ns)
            .field("measure", measure)
            .field("force_yield", force_yield)
            .field("step_ns", step_ns)
            .field("attribute", attribute)
            .field("record", record)
            .field("paced", &pace.is_some())
            .finish()
    }
}

/// What makes a check yield.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Gate {
    /// The time slice.
    Slice,
    /// The time slice, and who waits for the lock.
    Contention,
    /// The pace alone.
    Paced,
}

impl Default for TaskConfig {
    fn default() -> Self {
        TaskConfig {
            preempt: Preempt::Full,
            tick_ns: 4_000_000,
            measure: false,
            force_yield: None,
            step_ns: false,
            attribute: true,
            record: false,
            pace: None,
        }
    }
}

/// A thread's own state. Neither shared nor used by two threads at once.
pub struct Task<P: Platform> {
    reader: <P::Rcu as RcuDomain>::Reader,
    /// Measuring: histograms and steps.
    measure: bool,
    /// Measuring or recording: sections and holds are timed.
    timed: bool,
    gate: Gate,
    timeline: Option<Arc<Timeline>>,
    observer: Option<Arc<dyn Observer>>,
    /// The observer wants to hear of read sections and checks too.
    detail: bool,
    /// Measuring, or in detail observed: checks are noted.
    noted: bool,
    meter: Meter,
    slice: Slice<P>,
    config: TaskConfig,
    /// Guards of mmu_lock this task holds.
    held: Cell<u32>,
    /// Checks left until one yields by force; 0: never.
    force_in: Cell<u32>,
    /// Sum of reads and writes at the start of the step.
    step_base: Cell<u64>,
    step_since: Cell<u64>,
    step_preempted: Cell<u64>,
    step_cpu: Cell<u64>,
    section_since: Cell<u64>,
    vcpu: Cell<Option<usize>>,
    id: u32,
    name: Box<str>,
    role: Role,
}

static NEXT_ID: AtomicU32 = AtomicU32::new(0);

impl<P: Platform> Task<P> {
    /// A task for the calling thread, registered as a reader of `rcu`.
    pub fn new(rcu: &Arc<P::Rcu>, name: &str, role: Role, config: TaskConfig) -> Self {
        Self::with_observer(rcu, name, role, config, None)
    }

    /// Like [`Task::new`], and `observer` is told of this task's events.
    pub fn with_observer(
        rcu: &Arc<P::Rcu>,
        name: &str,
        role: Role,
        config: TaskConfig,
        observer: Option<Arc<dyn Observer>>,
    ) -> Self {
        let reader = rcu.register(name);
        let timed = config.measure || config.record;
        let detail = observer.as_ref().is_some_and(|observer| observer.wants_detail());
        if timed || detail {
            // Sections are timed, or told, which the quick path does not.
            reader.set_slow();
        }
        let gate = match (&config.pace, config.preempt) {
            (Some(_), _) => Gate::Paced,
            (None, Preempt::Full) => Gate::Contention,
            (None, Preempt::None | Preempt::Voluntary) => Gate::Slice,
        };
        let id = P::new_task_id().unwrap_or_else(|| NEXT_ID.fetch_add(1, Ordering::Relaxed));
        let recording = config.record.then(|| Recording::new(id, name, role));
        Task {
            reader,
            measure: config.measure,
            timed,
            gate,
            timeline: rcu.timeline().cloned(),
            observer,
            detail,
            noted: config.measure || detail,
            meter: Meter::new::<P>(config.measure, recording),
            slice: Slice::new(config.tick_ns),
            force_in: Cell::new(config.force_yield.unwrap_or(0)),
            config,
            held: Cell::new(0),
            step_base: Cell::new(0),
            step_since: Cell::new(0),
            step_preempted: Cell::new(0),
            step_cpu: Cell::new(0),
            section_since: Cell::new(0),
            vcpu: Cell::new(None),
            id,
            name: name.into(),
            role,
        }
    }

    /// Unique within the process, or within the simulated world.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// The name given.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The role given.
    pub fn role(&self) -> Role {
        self.role
    }

    /// The vCPU that this task runs (kvm_get_running_vcpu), if it runs one.
    #[inline]
    pub fn vcpu(&self) -> Option<usize> {
        self.vcpu.get()
    }

    /// This task runs vCPU `vcpu` from now on.
    pub fn set_vcpu(&self, vcpu: usize) {
        self.vcpu.set(Some(vcpu));
    }

    /// The configuration given.
    pub fn config(&self) -> &TaskConfig {
        &self.config
    }

    /// This task's measurements.
    #[inline(always)]
    pub fn meter(&self) -> &Meter {
        &self.meter
    }

    /// The observer, if any.
    pub fn observer(&self) -> Option<&Arc<dyn Observer>> {
        self.observer.as_ref()
    }

    /// Somebody listens to this task.
    #[inline(always)]
    pub fn is_observed(&self) -> bool {
        self.observer.is_some()
    }

    /// Somebody wants detail: for paths that exist twice, since a test at each event would cost a walk a tenth.
    #[inline(always)]
    pub fn wants_detail(&self) -> bool {
        self.detail
    }

    /// Reports an event to an observer that wants detail; `event` is built only then.
    #[inline(always)]
    pub fn detail(&self, event: impl FnOnce() -> Event) {
        if self.detail {
            self.observe(event);
        }
    }

    /// Reports an event; `event` is built only if somebody listens.
    #[inline(always)]
    pub fn observe(&self, event: impl FnOnce() -> Event) {
        if let Some(observer) = &self.observer {
            observer.event(self.id, &event());
        }
    }

    /// Puts a mark on the timeline of the task's RCU domain, if it keeps one.
    #[inline]
    pub fn mark(&self, moment: Moment, root: u32) {
        if let Some(timeline) = &self.timeline {
            timeline.mark(Mark { at: P::ticks(), task: self.id, moment, root });
        }
    }

    /// Begins an RCU read section; it ends with the guard. Sections nest.
    #[inline(always)]
    pub fn rcu_read(&self) -> RcuGuard<'_, P> {
        P::point(Site::RcuEnter);
        let quick = self.reader.try_enter();
        if quick.is_none() {
            self.rcu_enter_slow();
        }
        RcuGuard { task: self, quick }
    }

    /// Inside a read section.
    #[inline(always)]
    pub fn in_rcu(&self) -> bool {
        self.reader.depth() != 0
    }

    /// Holds mmu_lock, in either mode.
    #[inline(always)]
    pub fn holds_mmu_lock(&self) -> bool {
        self.held.get() != 0
    }

    /// Counts SPTE entries read and written, for the meter and for the current step.
    #[inline(always)]
    pub fn count(&self, reads: u64, writes: u64) {
        add(&self.meter.entry_reads, reads);
        add(&self.meter.entry_writes, writes);
    }

    /// A reschedule check: ends a step, and says whether to yield here. True if the test forces it, if the task needs
    /// to be rescheduled, or, fully preemptible, if somebody waits for `lock`. A task with a pace yields at walks only
    /// ([`Task::should_yield_at`]).
    #[inline]
    pub fn should_yield(&self, lock: &MmuLock<P>) -> bool {
        self.should_yield_at(lock, || None)
    }

    /// As [`Task::should_yield`], for a walk; `at` says where it stands, `None` where it must not yield. A pace is asked with that,
    /// and decides alone. (Without a pace the caller tests for itself whether it may.)
    #[inline]
    pub fn should_yield_at(&self, lock: &MmuLock<P>, at: impl FnOnce() -> Option<YieldPoint>) -> bool {
        P::point(Site::LockYield);
        if self.noted {
            self.check_noted();
        }
        match self.gate {
            Gate::Contention => {
                (self.force_in.get() != 0 && self.forced())
                    || lock.is_contended()
                    || P::asked_to_yield()
                    || self.need_resched()
            }
            Gate::Slice => {
                (self.force_in.get() != 0 && self.forced()) || P::asked_to_yield() || self.need_resched()
            }
            Gate::Paced => at().is_some_and(|at| self.paced(at)),
        }
    }

    /// A reschedule check at which nothing is asked.
    #[inline]
    pub fn check_passed(&self) {
        if self.noted {
            self.check_noted();
        }
    }

    #[cold]
    fn check_noted(&self) {
        if self.measure {
            self.step_ends();
        }
        self.detail(|| Event::YieldCheck);
    }

    #[cold]
    fn paced(&self, at: YieldPoint) -> bool {
        self.config.pace.as_ref().is_some_and(|pace| pace.wants_yield(self.id, at))
    }

    /// mmu_lock was released and is about to be taken back.
    #[inline]
    pub(crate) fn unlocked(&self) {
        if let Some(pace) = &self.config.pace {
            pace.unlocked(self.id);
        }
    }

    /// The task has used its tick of CPU since it last yielded or was switched in.
    #[inline]
    pub fn need_resched(&self) -> bool {
        self.slice.is_over()
    }

    /// A point at which the kernel might sleep (allocation, queueing, flush): with voluntary or full preemption the CPU
    /// is given away here if need_resched. Outside locks and read sections only.
    #[inline]
    pub fn might_sleep(&self) {
        self.detail(|| Event::MightSleep { what: "a point that might sleep" });
        debug_assert!(!self.holds_mmu_lock(), "{} might sleep with mmu_lock held", self.name);
        debug_assert!(!self.in_rcu(), "{} might sleep inside an RCU read section", self.name);
        if self.config.preempt != Preempt::None && self.need_resched() {
            let _yielding = self.phase(Phase::Yield);
            self.give_cpu_away();
        }
    }

    /// Attributes the time until the scope's end to `phase`; scopes nest.
    #[inline]
    pub fn phase(&self, phase: Phase) -> PhaseScope<'_> {
        let before =
            if self.config.attribute { self.meter.switch(phase, P::ticks()) } else { self.meter.phase() };
        PhaseScope {
            meter: &self.meter,
            before,
            clock: self.config.attribute.then_some(P::ticks as fn() -> u64),
        }
    }

    /// Gives the CPU away and begins a new slice.
    pub(crate) fn give_cpu_away(&self) {
        P::yield_cpu(Site::LockYield);
        self.slice.restart();
    }

    pub(crate) fn measures(&self) -> bool {
        self.measure
    }

    pub(crate) fn is_timed(&self) -> bool {
        self.timed
    }

    /// mmu_lock was taken.
    #[inline(always)]
    pub(crate) fn lock_taken(&self) {
        let held = self.held.get();
        self.held.set(held + 1);
        if self.measure && held == 0 && !self.in_rcu() {
            self.step_begins();
        }
    }

    /// mmu_lock is about to be released.
    #[inline(always)]
    pub(crate) fn lock_dropped(&self) {
        let held = self.held.get() - 1;
        self.held.set(held);
        if self.measure && held == 0 && !self.in_rcu() {
            self.step_ends();
        }
    }

    #[cold]
    fn forced(&self) -> bool {
        let left = self.force_in.get() - 1;
        self.force_in.set(if left == 0 { self.config.force_yield.unwrap_or(0) } else { left });
        left == 0
    }

    fn units(&self) -> u64 {
        self.meter.entry_reads.get().wrapping_add(self.meter.entry_writes.get())
    }

    fn step_begins(&self) {
        self.step_base.set(self.units());
        if self.config.step_ns {
            self.step_preempted.set(P::switches().involuntary);
            self.step_cpu.set(P::thread_cpu_ns());
            self.step_since.set(P::ticks());
        }
    }

    /// Ends a step and begins the next. A stretch without an SPTE is no step.
    #[cold]
    fn step_ends(&self) {
        // `take` of the meter restarts the counts: a step across it is counted from there.
        let units = self.units();
        let done = if units >= self.step_base.get() { units - self.step_base.get() } else { units };
        if done != 0 {
            if self.config.step_ns {
                let stretch = P::ticks().saturating_sub(self.step_since.get());
                if P::switches().involuntary == self.step_preempted.get() {
                    self.meter.histograms(|h| h.step_ns.record(P::ticks_to_ns(stretch)));
                } else {
                    add(&self.meter.steps_dropped, 1);
                    let cpu_ns = P::thread_cpu_ns().saturating_sub(self.step_cpu.get());
                    let longest = &self.meter.longest_dropped_step_cpu_ns;
                    longest.set(longest.get().max(cpu_ns));
                }
            } else {
                self.meter.histograms(|h| h.step_units.record(done));
            }
        }
        self.step_begins();
    }

    #[cold]
    fn rcu_enter_slow(&self) {
        self.reader.enter();
        if self.reader.depth() == 1 {
            self.detail(|| Event::RcuEnter);
        }
        if self.timed {
            self.section_begins();
        }
    }

    #[cold]
    fn rcu_leave_slow(&self) {
        if self.timed {
            self.section_ends();
        }
        if self.reader.depth() == 1 {
            self.detail(|| Event::RcuLeave);
        }
        self.reader.leave();
    }

    fn section_begins(&self) {
        if self.reader.depth() == 1 {
            self.section_since.set(P::ticks());
            if self.measure && self.held.get() == 0 {
                self.step_begins();
            }
        }
    }

    fn section_ends(&self) {
        if self.reader.depth() == 1 {
            let since = self.section_since.get();
            let until = P::ticks().max(since);
            self.meter.record(|recording| recording.section(since, until));
            self.meter.histograms(|h| h.rcu_section.record(P::ticks_to_ns(until - since)));
            if self.measure && self.held.get() == 0 {
                self.step_ends();
            }
        }
    }
}

impl<P: Platform> fmt::Debug for Task<P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Task")
            .field("id", &self.id)
            .field("name", &self.name)
            .field("role", &self.role)
            .finish_non_exhaustive()
    }
}

/// An RCU read section of a task. Ends on drop, on the task's own thread.
#[must_use = "the read section ends when the guard is dropped"]
pub struct RcuGuard<'a, P: Platform> {
    task: &'a Task<P>,
    /// Begun on the quick path.
    quick: Option<QuickSection<'a>>,
}

impl<'a, P: Platform> RcuGuard<'a, P> {
    /// The task whose section this is.
    pub fn task(&self) -> &'a Task<P> {
        self.task
    }
}

impl<P: Platform> fmt::Debug for RcuGuard<'_, P> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("RcuGuard").field(&self.task.id).finish()
    }
}

impl<P: Platform> Drop for RcuGuard<'_, P> {
    #[inline(always)]
    fn drop(&mut self) {
        if !self.quick.is_some_and(QuickSection::try_leave) {
            self.task.rcu_leave_slow();
        }
        P::point(Site::RcuLeave);
    }
}

/// Time attributed to a phase, until dropped.
#[must_use = "the phase ends when the scope is dropped"]
#[derive(Debug)]
pub struct PhaseScope<'a> {
    meter: &'a Meter,
    before: Phase,
    clock: Option<fn() -> u64>,
}

impl Drop for PhaseScope<'_> {
    #[inline]
    fn drop(&mut self) {
        if let Some(clock) = self.clock {
            self.meter.switch(self.before, clock());
        }
    }
}
