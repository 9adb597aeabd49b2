//! need_resched in user space.
//!
//! **Definition** (`docs/rules.md`): a task needs to be rescheduled once it has used `tick_ns` of CPU since it last
//! yielded or was switched in.
//!
//! **Mechanism.** CPU time never runs faster than the clock, so a comparison with the TSC says "surely not yet" for
//! nearly every check. Only when the TSC says "maybe" the thread's CPU clock and its count of context switches are read,
//! eight times a tick. A switch since the last look means that a new slice began somewhere in between; it is
//! dated to the last look, so a slice is at most an eighth of a tick shorter than defined and never longer.

use std::{cell::Cell, marker::PhantomData};

use crate::api::{Platform, Switches};

const LOOKS_PER_TICK: u64 = 8;

#[derive(Debug)]
pub(crate) struct Slice<P> {
    tick_ns: u64,
    /// Before this the answer is no.
    next_look: Cell<u64>,
    /// Set while the answer is yes.
    expired: Cell<bool>,
    /// CPU time at the start of the slice, and at the last look.
    start_cpu: Cell<u64>,
    look_cpu: Cell<u64>,
    switches: Cell<Switches>,
    begun: Cell<bool>,
    _platform: PhantomData<P>,
}

impl<P: Platform> Slice<P> {
    pub fn new(tick_ns: u64) -> Self {
        Slice {
            tick_ns,
            next_look: Cell::new(0),
            expired: Cell::new(false),
            start_cpu: Cell::new(0),
            look_cpu: Cell::new(0),
            switches: Cell::new(Switches::default()),
            begun: Cell::new(false),
            _platform: PhantomData,
        }
    }

    #[inline(always)]
    pub fn is_over(&self) -> bool {
        self.expired.get() || (P::ticks() >= self.next_look.get() && self.look())
    }

    /// A new slice begins: the task has yielded.
    pub fn restart(&self) {
        let cpu = P::thread_cpu_ns();
        self.begun.set(true);
        self.expired.set(false);
        self.start_cpu.set(cpu);
        self.look_cpu.set(cpu);
        self.switches.set(P::switches());
        self.look_again_in(self.tick_ns);
    }

    #[cold]
    fn look(&self) -> bool {
        if !self.begun.get() {
            // The task's own thread, not its creator's: the slice begins with the first check.
            self.restart();
            return false;
        }
        let switches = P::switches();
        if self.switches.replace(switches) != switches {
            self.start_cpu.set(self.look_cpu.get());
        }
        let cpu = P::thread_cpu_ns();
        self.look_cpu.set(cpu);
        let used = cpu.saturating_sub(self.start_cpu.get());
        self.expired.set(used >= self.tick_ns);
        self.look_again_in(self.tick_ns.saturating_sub(used));
        self.expired.get()
    }

    fn look_again_in(&self, left_ns: u64) {
        let wait = left_ns.min(self.tick_ns / LOOKS_PER_TICK);
        self.next_look.set(P::ticks().saturating_add(P::ns_to_ticks(wait)));
    }
}
