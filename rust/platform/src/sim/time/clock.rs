//! The clock of a simulated machine: whose turn it is, and when.
//!
//! **Guarantee.** The task that goes on is always the one with the smallest virtual time among those that can; ties go by task number. So an operation sees everything that
//! happened earlier in virtual time, and the same tasks with the same costs give the same run, bit for bit.
//!
//! **Mechanism.** Pure data: no coroutine, no memory of anybody's. Each task is *running* (it has one of the machine's CPUs), *queued* (runnable without one), or *asleep*. The
//! running task that executes just now adds to [`Clock::now`] until it passes [`Clock::horizon`], the time of the earliest other event; then somebody else is due. A task that
//! spins keeps its CPU and is an event at the end of its patience, or when the word that it looks at is changed ([`Clock::poke`]).
//!
//! CPUs are shared fairly: the queue gives way to the task that has had least CPU; a slice ends after [`Costs::slice`](super::Costs) if somebody is queued, and a sleeper that
//! wakes up cuts the slice of whoever has had most, unless it serves in the background. No per-CPU queues and no affinity: a host whose balancer leaves
//! two of three busy tasks on one of two CPUs for long differs from this, and the difference is its own.

use std::{cmp::Reverse, collections::BinaryHeap};

use super::costs::Ps;

/// What the clock needs of the costs, in picoseconds.
#[derive(Clone, Copy, Debug)]
pub(super) struct Timing {
    pub wake_latency: Ps,
    pub switch: Ps,
    pub slice: Ps,
    pub transfer: Ps,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    Running(usize),
    Queued,
    Asleep,
    Ended,
}

/// A running task that looks at a word until it changes, or until it has had enough.
#[derive(Clone, Copy, Debug)]
struct Spin {
    word: usize,
    until: Ps,
}

#[derive(Debug)]
struct Tcb {
    state: State,
    /// Its own time: where it goes on. Of a spinning one: since when it spins, or has its CPU back.
    at: Ps,
    spin: Option<Spin>,
    /// Invalidates events that were announced before.
    stamp: u32,
    on_cpu_since: Ps,
    queued_since: Ps,
    slice_end: Ps,
    last_cpu: usize,
    cpu: Ps,
    delay: Ps,
    /// CPU time for fairness: that of a long sleeper is moved up.
    virtual_cpu: Ps,
    background: bool,
    timed_out: bool,
    voluntary: u64,
    involuntary: u64,
}

/// See the module's text.
#[derive(Debug)]
pub(super) struct Clock {
    timing: Timing,
    tasks: Vec<Tcb>,
    cpus: Vec<Option<u32>>,
    queue: Vec<u32>,
    ready: BinaryHeap<Reverse<(Ps, u32, u32)>>,
    sleepers: BinaryHeap<Reverse<(Ps, u32, u32)>>,
    spinning: u32,
    current: u32,
    /// Time of the executing task.
    pub now: Ps,
    /// When somebody else is due.
    pub horizon: Ps,
    /// Latest time that any task has reached.
    latest: Ps,
}

impl Clock {
    pub(super) fn new(cpus: usize, timing: Timing) -> Self {
        Clock {
            timing,
            tasks: Vec::new(),
            cpus: vec![None; cpus.max(1)],
            queue: Vec::new(),
            ready: BinaryHeap::new(),
            sleepers: BinaryHeap::new(),
            spinning: 0,
            current: 0,
            now: 0,
            horizon: 0,
            latest: 0,
        }
    }

    /// A task begins, runnable from the present on; returns its number.
    pub(super) fn started(&mut self) -> u32 {
        let id = self.tasks.len() as u32;
        self.tasks.push(Tcb {
            state: State::Asleep,
            at: self.now,
            spin: None,
            stamp: 0,
            on_cpu_since: 0,
            queued_since: 0,
            slice_end: 0,
            last_cpu: id as usize % self.cpus.len(),
            cpu: 0,
            delay: 0,
            virtual_cpu: self.least_virtual(),
            background: false,
            timed_out: false,
            voluntary: 0,
            involuntary: 0,
        });
        self.runnable(id, self.now + if id == 0 { 0 } else { self.timing.wake_latency });
        id
    }

    pub(super) fn current(&self) -> u32 {
        self.current
    }

    pub(super) fn background(&mut self) {
        let current = self.current as usize;
        self.tasks[current].background = true;
    }

    /// CPU time of the executing task.
    pub(super) fn cpu_time(&self) -> Ps {
        let task = &self.tasks[self.current as usize];
        task.cpu + self.now.saturating_sub(task.on_cpu_since)
    }

    /// How long the executing task was runnable without a CPU.
    pub(super) fn delay(&self) -> Ps {
        self.tasks[self.current as usize].delay
    }

    /// (voluntary, involuntary) of the executing task.
    pub(super) fn switches(&self) -> (u64, u64) {
        let task = &self.tasks[self.current as usize];
        (task.voluntary, task.involuntary)
    }

    /// The CPU of the executing task.
    pub(super) fn cpu(&self) -> usize {
        self.tasks[self.current as usize].last_cpu
    }

    /// The last sleep or spin of the executing task ended by itself.
    pub(super) fn timed_out(&self) -> bool {
        self.tasks[self.current as usize].timed_out
    }

    pub(super) fn latest(&self) -> Ps {
        self.latest.max(self.now)
    }

    /// The executing task goes on at its time, when it is its turn.
    pub(super) fn pause(&mut self) {
        let (id, now) = (self.current, self.now);
        let task = &mut self.tasks[id as usize];
        task.at = now;
        self.announce(id, now);
    }

    /// The executing task looks at `word` until it changes, at most until `until`; it keeps its CPU.
    pub(super) fn spin(&mut self, word: usize, until: Ps) {
        let (id, now) = (self.current, self.now);
        let task = &mut self.tasks[id as usize];
        task.at = now;
        task.timed_out = false;
        task.spin = Some(Spin { word, until: until.max(now) });
        self.spinning += 1;
        self.announce(id, until.max(now));
    }

    /// `word` was changed by the executing task: who looks at it sees that.
    pub(super) fn poke(&mut self, word: usize) {
        if self.spinning == 0 {
            return;
        }
        for id in 0..self.tasks.len() as u32 {
            let seen = self.now + self.timing.transfer;
            let task = &mut self.tasks[id as usize];
            if task.spin.is_none_or(|spin| spin.word != word) {
                continue;
            }
            task.spin = None;
            self.spinning -= 1;
            if let State::Running(_) = task.state {
                task.at = task.at.max(seen);
                let at = task.at;
                self.announce(id, at);
                self.horizon = self.horizon.min(at);
            }
        }
    }

    /// The executing task sleeps until it is woken, or until `until`.
    pub(super) fn sleep(&mut self, until: Option<Ps>) {
        let (id, now) = (self.current, self.now);
        let task = &mut self.tasks[id as usize];
        task.voluntary += 1;
        task.timed_out = false;
        self.leave_cpu(id, now, State::Asleep);
        let task = &mut self.tasks[id as usize];
        task.stamp += 1;
        if let Some(until) = until {
            self.sleepers.push(Reverse((until.max(now), id, task.stamp)));
        }
    }

    /// Is this task asleep?
    pub(super) fn is_asleep(&self, id: u32) -> bool {
        self.tasks[id as usize].state == State::Asleep
    }

    /// Has this task ended?
    pub(super) fn has_ended(&self, id: u32) -> bool {
        self.tasks[id as usize].state == State::Ended
    }

    /// The executing task wakes `id`.
    pub(super) fn wake(&mut self, id: u32) {
        if self.is_asleep(id) {
            self.runnable(id, self.now + self.timing.wake_latency);
        }
    }

    /// The executing task ends a spin of `id` by name, as [`Clock::poke`] does by word.
    pub(super) fn nudge(&mut self, id: u32) {
        let seen = self.now + self.timing.transfer;
        let task = &mut self.tasks[id as usize];
        if task.spin.take().is_some() {
            self.spinning -= 1;
            if let State::Running(_) = task.state {
                task.at = task.at.max(seen);
                let at = task.at;
                self.announce(id, at);
                self.horizon = self.horizon.min(at);
            }
        }
    }

    /// The executing task gives its CPU away, if somebody wants it.
    pub(super) fn yielded(&mut self) {
        let (id, now) = (self.current, self.now);
        self.tasks[id as usize].voluntary += 1;
        if self.queue.is_empty() {
            return self.pause();
        }
        // Behind everybody, as sched_yield does.
        let most = self.queue.iter().map(|&q| self.tasks[q as usize].virtual_cpu).max().unwrap_or(0);
        self.leave_cpu_for_queue(id, now, most + 1);
    }

    /// The executing task is over.
    pub(super) fn ended(&mut self) {
        let (id, now) = (self.current, self.now);
        self.leave_cpu(id, now, State::Ended);
    }

    /// Who goes on: its time is [`Clock::now`] then. `None`: nobody can.
    pub(super) fn next(&mut self) -> Option<u32> {
        self.latest = self.latest.max(self.now);
        loop {
            let ready = self.first_ready();
            let asleep = self.first_sleeper();
            let cut = self.first_cut();
            let at = |event: Option<(Ps, u32)>| event.map_or(Ps::MAX, |event| event.0);
            if asleep.is_some() && at(asleep) <= at(ready).min(at(cut)) {
                let (at, id) = asleep?;
                self.sleepers.pop();
                self.tasks[id as usize].timed_out = true;
                self.runnable(id, at);
                continue;
            }
            if cut.is_some() && at(cut) < at(ready) {
                let (at, id) = cut?;
                self.rotate(id, at);
                continue;
            }
            let (at, id) = ready?;
            self.ready.pop();
            let task = &mut self.tasks[id as usize];
            task.at = task.at.max(at);
            let at = task.at;
            if task.spin.take().is_some() {
                self.spinning -= 1;
                task.timed_out = true;
            }
            if !self.queue.is_empty() && at >= self.tasks[id as usize].slice_end {
                self.rotate(id, at);
                continue;
            }
            self.current = id;
            self.now = at;
            self.look_ahead();
            return Some(id);
        }
    }

    /// Sets the horizon.
    fn look_ahead(&mut self) {
        let first = |event: Option<(Ps, u32)>| event.map_or(Ps::MAX, |event| event.0);
        let mut horizon =
            first(self.first_ready()).min(first(self.first_sleeper())).min(first(self.first_cut()));
        if !self.queue.is_empty() {
            horizon = horizon.min(self.tasks[self.current as usize].slice_end);
        }
        self.horizon = horizon;
    }

    fn first_ready(&mut self) -> Option<(Ps, u32)> {
        while let Some(&Reverse((at, id, stamp))) = self.ready.peek() {
            let task = &self.tasks[id as usize];
            if task.stamp == stamp && matches!(task.state, State::Running(_)) {
                return Some((at, id));
            }
            self.ready.pop();
        }
        None
    }

    fn first_sleeper(&mut self) -> Option<(Ps, u32)> {
        while let Some(&Reverse((at, id, stamp))) = self.sleepers.peek() {
            let task = &self.tasks[id as usize];
            if task.stamp == stamp && task.state == State::Asleep {
                return Some((at, id));
            }
            self.sleepers.pop();
        }
        None
    }

    /// The first spinning task whose slice ends while somebody is queued. (One that executes is asked when its turn comes.)
    fn first_cut(&self) -> Option<(Ps, u32)> {
        if self.queue.is_empty() || self.spinning == 0 {
            return None;
        }
        let running = self.cpus.iter().flatten();
        let spinning = running.filter(|&&id| self.tasks[id as usize].spin.is_some());
        spinning.map(|&id| (self.tasks[id as usize].slice_end.max(self.tasks[id as usize].at), id)).min()
    }

    fn announce(&mut self, id: u32, at: Ps) {
        let task = &mut self.tasks[id as usize];
        task.stamp += 1;
        self.ready.push(Reverse((at, id, task.stamp)));
    }

    fn runnable(&mut self, id: u32, at: Ps) {
        let least = self.least_virtual();
        let slice = self.timing.slice;
        let task = &mut self.tasks[id as usize];
        task.stamp += 1;
        task.queued_since = at;
        task.virtual_cpu = task.virtual_cpu.max(least.saturating_sub(slice / 2));
        let (last, background, mine) = (task.last_cpu, task.background, task.virtual_cpu);
        let free =
            if self.cpus[last].is_none() { Some(last) } else { self.cpus.iter().position(Option::is_none) };
        if let Some(cpu) = free {
            return self.give_cpu(id, cpu, at);
        }
        self.tasks[id as usize].state = State::Queued;
        self.queue.push(id);
        if !background {
            let had = |victim: u32| {
                let task = &self.tasks[victim as usize];
                let until = if victim == self.current { self.now } else { task.at };
                task.virtual_cpu + until.max(at).saturating_sub(task.on_cpu_since)
            };
            let most = self.cpus.iter().flatten().map(|&victim| (had(victim), victim)).max();
            if let Some((had, victim)) = most
                && had > mine
            {
                let victim = &mut self.tasks[victim as usize];
                victim.slice_end = victim.slice_end.min(at);
            }
        }
        self.look_ahead();
    }

    fn give_cpu(&mut self, id: u32, cpu: usize, at: Ps) {
        let (switch, slice) = (self.timing.switch, self.timing.slice);
        let task = &mut self.tasks[id as usize];
        let begin =
            at.max(task.queued_since) + if task.last_cpu == cpu && task.cpu != 0 { 0 } else { switch };
        task.state = State::Running(cpu);
        task.last_cpu = cpu;
        task.delay += begin - task.queued_since;
        task.on_cpu_since = begin;
        task.slice_end = begin + slice;
        task.at = begin;
        let until = task.spin.map_or(begin, |spin| spin.until.max(begin));
        self.cpus[cpu] = Some(id);
        self.announce(id, until);
        self.horizon = self.horizon.min(until);
    }

    /// Takes the CPU from `id` at `at` and gives it to whoever has waited.
    fn leave_cpu(&mut self, id: u32, at: Ps, to: State) {
        let task = &mut self.tasks[id as usize];
        let State::Running(cpu) = task.state else { return };
        let had = at.saturating_sub(task.on_cpu_since);
        task.cpu += had;
        task.virtual_cpu += had;
        task.state = to;
        task.at = at;
        task.stamp += 1;
        self.cpus[cpu] = None;
        if let Some(next) = self.take_queued() {
            let switch = self.timing.switch;
            self.give_cpu(next, cpu, at + switch);
        }
    }

    fn leave_cpu_for_queue(&mut self, id: u32, at: Ps, virtual_cpu: Ps) {
        // Queued first, so that who is chosen is chosen among all.
        let task = &mut self.tasks[id as usize];
        let State::Running(cpu) = task.state else { return };
        let had = at.saturating_sub(task.on_cpu_since);
        task.cpu += had;
        task.virtual_cpu = (task.virtual_cpu + had).max(virtual_cpu);
        task.state = State::Queued;
        task.at = at;
        task.queued_since = at;
        task.stamp += 1;
        self.cpus[cpu] = None;
        self.queue.push(id);
        if let Some(next) = self.take_queued() {
            let switch = if next == id { 0 } else { self.timing.switch };
            self.give_cpu(next, cpu, at + switch);
        }
    }

    /// The slice of `id` is over.
    fn rotate(&mut self, id: u32, at: Ps) {
        self.tasks[id as usize].involuntary += 1;
        self.leave_cpu_for_queue(id, at, 0);
    }

    fn take_queued(&mut self) -> Option<u32> {
        let best = (0..self.queue.len()).min_by_key(|&n| {
            let id = self.queue[n];
            (self.tasks[id as usize].virtual_cpu, id)
        })?;
        Some(self.queue.remove(best))
    }

    fn least_virtual(&self) -> Ps {
        let live = self.cpus.iter().flatten().chain(&self.queue);
        live.map(|&id| self.tasks[id as usize].virtual_cpu).min().unwrap_or(0)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const TIMING: Timing = Timing { wake_latency: 10, switch: 0, slice: 100, transfer: 5 };

    fn machine(cpus: usize, tasks: u32) -> Clock {
        let mut clock = Clock::new(cpus, TIMING);
        for _ in 0..tasks {
            clock.started();
        }
        clock
    }

    /// Each task does steps of `step`; returns CPU time by task at `end`.
    fn busy(mut clock: Clock, tasks: usize, step: Ps, end: Ps) -> Vec<Ps> {
        let mut had = vec![0; tasks];
        while let Some(id) = clock.next() {
            had[id as usize] = clock.cpu_time();
            if clock.now >= end {
                break;
            }
            clock.now += step;
            clock.pause();
        }
        had
    }

    #[test]
    fn the_task_with_the_smallest_time_goes_on() {
        let mut clock = machine(2, 2);
        assert_eq!(clock.next(), Some(0));
        clock.now += 50;
        assert!(clock.now > clock.horizon);
        clock.pause();
        assert_eq!(clock.next(), Some(1));
        assert_eq!(clock.now, 10);
        clock.now += 20;
        clock.pause();
        assert_eq!((clock.next(), clock.now), (Some(1), 30));
        clock.now += 30;
        clock.pause();
        assert_eq!((clock.next(), clock.now), (Some(0), 50));
    }

    #[test]
    fn three_busy_tasks_share_two_cpus_fairly() {
        let had = busy(machine(2, 3), 3, 7, 60_000);
        for cpu in &had {
            assert!((38_000..42_000).contains(cpu), "{had:?}");
        }
    }

    #[test]
    fn a_spinner_keeps_its_cpu_until_the_word_changes_and_not_longer() {
        let mut clock = machine(2, 2);
        assert_eq!(clock.next(), Some(0));
        clock.spin(77, 1_000_000);
        assert_eq!(clock.next(), Some(1));
        clock.now += 500;
        clock.poke(78);
        clock.poke(77);
        clock.now += 40;
        clock.pause();
        assert_eq!((clock.next(), clock.now), (Some(0), 515));
        assert!(!clock.timed_out());
        assert_eq!(clock.cpu_time(), 515);
        clock.spin(77, 600);
        assert_eq!(clock.next(), Some(1));
        clock.now = 700;
        clock.pause();
        assert_eq!((clock.next(), clock.now, clock.timed_out()), (Some(0), 600, true));
    }

    #[test]
    fn a_spinner_loses_its_cpu_at_the_end_of_its_slice_and_sees_later_what_happened() {
        let mut clock = machine(1, 2);
        assert_eq!(clock.next(), Some(0));
        clock.spin(77, 1_000);
        assert_eq!((clock.next(), clock.now), (Some(1), 10), "one that begins cuts in");
        clock.now += 20;
        clock.spin(78, 1_000);
        assert_eq!((clock.next(), clock.now), (Some(0), 1_000), "both have spun, in turn");
        let delay = clock.delay();
        assert!((450..550).contains(&delay) && clock.switches().1 >= 4, "{delay}");
    }

    #[test]
    fn a_sleeper_wakes_by_another_or_by_time_and_then_cuts_in() {
        let mut clock = machine(1, 2);
        assert_eq!(clock.next(), Some(0));
        clock.sleep(Some(40));
        assert_eq!((clock.next(), clock.now), (Some(1), 10));
        clock.now += 60;
        clock.pause();
        assert_eq!((clock.next(), clock.now), (Some(0), 70));
        assert!(clock.timed_out());
        clock.sleep(None);
        assert_eq!(clock.next(), Some(1));
        clock.wake(0);
        clock.sleep(None);
        assert_eq!(clock.next(), Some(0));
        assert!(!clock.timed_out());
        clock.ended();
        assert_eq!(clock.next(), None);
    }
}
