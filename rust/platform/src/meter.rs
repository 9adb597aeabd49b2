//! What a task measures about itself: counters, attribution, histograms.
//!
//! **Attribution adds up by construction.** A task is in exactly one phase at any time; a change of phase books the
//! ticks since the last change on the phase that ends. The sum of the phases therefore is the time from the first
//! change to the last, to the tick.

use std::cell::{Cell, RefCell};

use crate::{api::Platform, histogram::Histogram, timeline::Recording};

/// What a task's time is attributed to.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Phase {
    /// None of the others.
    Other,
    /// Waiting for mmu_lock or slots_lock.
    LockWait,
    /// Walking and changing SPTEs.
    SpteWork,
    /// Sending and awaiting TLB flushes.
    Flush,
    /// Awaiting the acknowledgement of kicks.
    KickWait,
    /// Waiting for a grace period.
    GracePeriod,
    /// Freeing tables.
    Free,
    /// Between giving mmu_lock away at a yield and having it again.
    Yield,
    /// Waiting for a worker to start.
    QueueDelay,
}

impl Phase {
    /// Every phase, in the order of the discriminants.
    pub const ALL: [Phase; 9] = [
        Phase::Other,
        Phase::LockWait,
        Phase::SpteWork,
        Phase::Flush,
        Phase::KickWait,
        Phase::GracePeriod,
        Phase::Free,
        Phase::Yield,
        Phase::QueueDelay,
    ];

    /// The name that result files use.
    pub const fn name(self) -> &'static str {
        match self {
            Phase::Other => "other",
            Phase::LockWait => "lock_wait",
            Phase::SpteWork => "spte_work",
            Phase::Flush => "flush",
            Phase::KickWait => "kick_wait",
            Phase::GracePeriod => "grace_period",
            Phase::Free => "free",
            Phase::Yield => "yield",
            Phase::QueueDelay => "queue_delay",
        }
    }
}

const PHASES: usize = Phase::ALL.len();

/// A task's measurements. Plain cells: only the task's own thread touches them.
#[derive(Debug)]
pub struct Meter {
    /// SPTE entries read.
    pub entry_reads: Cell<u64>,
    /// SPTE entries written.
    pub entry_writes: Cell<u64>,
    /// mmu_lock given away and retaken.
    pub yields: Cell<u64>,
    /// Lost races that made an operation start again.
    pub retries: Cell<u64>,
    /// TLB flushes sent.
    pub flushes: Cell<u64>,
    /// vCPUs kicked.
    pub kicks: Cell<u64>,
    /// Yields at which somebody waited for the lock, and got it.
    pub handoffs: Cell<u64>,
    /// Acquisitions of mmu_lock that had to wait.
    pub contended: Cell<u64>,
    /// Times mmu_lock was taken.
    pub acquisitions: Cell<u64>,
    /// `step_ns` samples dropped because of an involuntary context switch inside.
    pub steps_dropped: Cell<u64>,
    /// CPU time of the longest of these, in ns.
    pub longest_dropped_step_cpu_ns: Cell<u64>,
    /// CPU time inside zaps of roots, in ns.
    pub walk_cpu_ns: Cell<u64>,
    holds: Cell<HoldSums>,
    phase: Cell<Phase>,
    phase_since: Cell<u64>,
    phase_ticks: [Cell<u64>; PHASES],
    elapsed_ticks: Cell<u64>,
    ticks_to_ns: fn(u64) -> u64,
    clock: fn() -> u64,
    histograms: Option<Box<RefCell<Histograms>>>,
    recording: Option<Box<RefCell<Recording>>>,
}

/// The exclusive holds of mmu_lock since the last reset, in ticks. A lock-break ends one hold and begins the next.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct HoldSums {
    /// How many.
    pub count: u64,
    /// All of them together.
    pub total_ticks: u64,
    /// The longest.
    pub longest_ticks: u64,
    /// The first.
    pub first_ticks: u64,
}

/// The histograms of a measuring task. Times in ns.
#[derive(Clone, Debug, Default)]
pub struct Histograms {
    /// Length of shared holds of mmu_lock.
    pub read_hold: Histogram,
    /// Length of exclusive holds.
    pub write_hold: Histogram,
    /// Wait for the lock, shared; 0 for an uncontended acquisition.
    pub reader_wait: Histogram,
    /// Wait for the lock, exclusive.
    pub writer_wait: Histogram,
    /// SPTE reads + writes between two reschedule checks.
    pub step_units: Histogram,
    /// The same stretch in ns (only with `step_ns`).
    pub step_ns: Histogram,
    /// Length of RCU read sections.
    pub rcu_section: Histogram,
}

impl Histograms {
    fn pairs<'a>(&'a mut self, other: &'a Histograms) -> [(&'a mut Histogram, &'a Histogram); 7] {
        [
            (&mut self.read_hold, &other.read_hold),
            (&mut self.write_hold, &other.write_hold),
            (&mut self.reader_wait, &other.reader_wait),
            (&mut self.writer_wait, &other.writer_wait),
            (&mut self.step_units, &other.step_units),
            (&mut self.step_ns, &other.step_ns),
            (&mut self.rcu_section, &other.rcu_section),
        ]
    }

    /// Adds the other's samples, histogram by histogram.
    pub fn merge(&mut self, other: &Histograms) {
        for (mine, others) in self.pairs(other) {
            mine.merge(others);
        }
    }
}

#[inline(always)]
pub(crate) fn add(cell: &Cell<u64>, n: u64) {
    cell.set(cell.get().wrapping_add(n));
}

impl Meter {
    pub(crate) fn new<P: Platform>(measure: bool, recording: Option<Recording>) -> Self {
        Meter {
            entry_reads: Cell::new(0),
            entry_writes: Cell::new(0),
            yields: Cell::new(0),
            retries: Cell::new(0),
            flushes: Cell::new(0),
            kicks: Cell::new(0),
            handoffs: Cell::new(0),
            contended: Cell::new(0),
            acquisitions: Cell::new(0),
            steps_dropped: Cell::new(0),
            longest_dropped_step_cpu_ns: Cell::new(0),
            walk_cpu_ns: Cell::new(0),
            holds: Cell::default(),
            phase: Cell::new(Phase::Other),
            phase_since: Cell::new(P::ticks()),
            phase_ticks: Default::default(),
            elapsed_ticks: Cell::new(0),
            ticks_to_ns: P::ticks_to_ns,
            clock: P::ticks,
            histograms: measure.then(Box::default),
            recording: recording.map(|recording| Box::new(RefCell::new(recording))),
        }
    }

    /// Counts `n` lost races.
    #[inline(always)]
    pub fn count_retries(&self, n: u64) {
        add(&self.retries, n);
    }

    /// Counts `n` TLB flushes.
    #[inline(always)]
    pub fn count_flushes(&self, n: u64) {
        add(&self.flushes, n);
    }

    /// Counts `n` kicks.
    #[inline(always)]
    pub fn count_kicks(&self, n: u64) {
        add(&self.kicks, n);
    }

    /// The exclusive holds that have ended since the last reset; kept whether or not the task measures.
    pub fn exclusive_holds(&self) -> HoldSums {
        self.holds.get()
    }

    /// Begins a new sum of exclusive holds; a hold that is under way counts in full when it ends.
    pub fn reset_exclusive_holds(&self) {
        self.holds.take();
    }

    /// An exclusive hold has ended.
    #[inline]
    pub(crate) fn note_exclusive_hold(&self, ticks: u64) {
        let mut holds = self.holds.get();
        if holds.count == 0 {
            holds.first_ticks = ticks;
        }
        holds.count += 1;
        holds.total_ticks += ticks;
        holds.longest_ticks = holds.longest_ticks.max(ticks);
        self.holds.set(holds);
    }

    /// The current phase.
    pub fn phase(&self) -> Phase {
        self.phase.get()
    }

    /// Books the time since the last change on the current phase and goes on in `to`; returns the phase left.
    #[inline]
    pub(crate) fn switch(&self, to: Phase, now: u64) -> Phase {
        let from = self.phase.replace(to);
        // A TSC may lag a little after a migration: time then stands still instead of going back.
        let now = now.max(self.phase_since.get());
        let stretch = now - self.phase_since.replace(now);
        add(&self.phase_ticks[from as usize], stretch);
        add(&self.elapsed_ticks, stretch);
        self.record(|recording| recording.slice(from, now - stretch, now));
        from
    }

    /// Records, if the task does.
    #[inline(always)]
    pub(crate) fn record(&self, what: impl FnOnce(&mut Recording)) {
        if let Some(recording) = &self.recording {
            what(&mut recording.borrow_mut());
        }
    }

    #[inline]
    pub(crate) fn histograms(&self, record: impl FnOnce(&mut Histograms)) {
        if let Some(histograms) = &self.histograms {
            record(&mut histograms.borrow_mut());
        }
    }

    /// Ticks by phase since the task began or since the last `take`, up to `now`, a reading of the clock that the caller has just taken as the
    /// begin or the end of a stretch. The difference of two is what the stretch was spent on.
    pub fn phase_ticks(&self, now: u64) -> [u64; PHASES] {
        self.switch(self.phase.get(), now);
        std::array::from_fn(|i| self.phase_ticks[i].get())
    }

    /// What was measured since the task began or since the last `take`; starts anew.
    pub fn take(&self) -> MeterSnapshot {
        self.switch(self.phase.get(), (self.clock)());
        let phase_ticks: [u64; PHASES] = std::array::from_fn(|i| self.phase_ticks[i].take());
        MeterSnapshot {
            entry_reads: self.entry_reads.take(),
            entry_writes: self.entry_writes.take(),
            yields: self.yields.take(),
            retries: self.retries.take(),
            flushes: self.flushes.take(),
            kicks: self.kicks.take(),
            handoffs: self.handoffs.take(),
            contended: self.contended.take(),
            acquisitions: self.acquisitions.take(),
            steps_dropped: self.steps_dropped.take(),
            longest_dropped_step_cpu_ns: self.longest_dropped_step_cpu_ns.take(),
            walk_cpu_ns: self.walk_cpu_ns.take(),
            phase_ns: phase_ticks.map(self.ticks_to_ns),
            phase_ticks,
            elapsed_ticks: self.elapsed_ticks.take(),
            histograms: self.histograms.as_ref().map(|h| Box::new(h.take())),
            recording: self.recording.as_ref().map(|r| Box::new(r.borrow_mut().take())),
        }
    }
}

/// A task's measurements, detached from it: sendable and mergeable.
#[derive(Clone, Debug, Default)]
pub struct MeterSnapshot {
    /// SPTE entries read.
    pub entry_reads: u64,
    /// SPTE entries written.
    pub entry_writes: u64,
    /// mmu_lock given away and retaken.
    pub yields: u64,
    /// Lost races.
    pub retries: u64,
    /// TLB flushes sent.
    pub flushes: u64,
    /// vCPUs kicked.
    pub kicks: u64,
    /// Yields at which somebody waited for the lock.
    pub handoffs: u64,
    /// Acquisitions that had to wait.
    pub contended: u64,
    /// Acquisitions.
    pub acquisitions: u64,
    /// `step_ns` samples dropped because of a context switch.
    pub steps_dropped: u64,
    /// See [`Meter::longest_dropped_step_cpu_ns`].
    pub longest_dropped_step_cpu_ns: u64,
    /// CPU time inside zaps of roots, in ns.
    pub walk_cpu_ns: u64,
    /// Time by phase in ns, indexed by `Phase as usize`.
    pub phase_ns: [u64; PHASES],
    /// The same in ticks; adds up to `elapsed_ticks` exactly.
    pub phase_ticks: [u64; PHASES],
    /// Time covered, in ticks.
    pub elapsed_ticks: u64,
    /// The histograms of a measuring task.
    pub histograms: Option<Box<Histograms>>,
    /// What a recording task did; its slices add up to `phase_ticks`.
    pub recording: Option<Box<Recording>>,
}

impl MeterSnapshot {
    /// Time attributed to `phase`, in ns.
    pub fn phase_ns(&self, phase: Phase) -> u64 {
        self.phase_ns[phase as usize]
    }

    /// Adds another task's measurements, or later ones of the same task: only then recordings are joined.
    pub fn merge(&mut self, other: &MeterSnapshot) {
        for (mine, others) in [
            (&mut self.entry_reads, other.entry_reads),
            (&mut self.entry_writes, other.entry_writes),
            (&mut self.yields, other.yields),
            (&mut self.retries, other.retries),
            (&mut self.flushes, other.flushes),
            (&mut self.kicks, other.kicks),
            (&mut self.handoffs, other.handoffs),
            (&mut self.contended, other.contended),
            (&mut self.acquisitions, other.acquisitions),
            (&mut self.steps_dropped, other.steps_dropped),
            (&mut self.walk_cpu_ns, other.walk_cpu_ns),
            (&mut self.elapsed_ticks, other.elapsed_ticks),
        ] {
            *mine += others;
        }
        self.longest_dropped_step_cpu_ns =
            self.longest_dropped_step_cpu_ns.max(other.longest_dropped_step_cpu_ns);
        for i in 0..PHASES {
            self.phase_ns[i] += other.phase_ns[i];
            self.phase_ticks[i] += other.phase_ticks[i];
        }
        match (&mut self.recording, &other.recording) {
            (Some(mine), Some(later)) if mine.task == later.task => mine.append(later),
            _ => (),
        }
        match (&mut self.histograms, &other.histograms) {
            (Some(mine), Some(others)) => mine.merge(others),
            (mine @ None, Some(others)) => *mine = Some(others.clone()),
            (_, None) => (),
        }
    }
}
