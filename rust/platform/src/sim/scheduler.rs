//! Who runs: points, blocking, waking, and the end of a run.
//!
//! **Guarantee.** The OS thread changes hands at points, at calls that block or relax, and at ends, nowhere else. Every change is a choice of the strategy among those
//! that can go on, and what is chosen against the default stands in the schedule.
//!
//! **Mechanism.** Tasks are coroutines; the loop of [`super::run`] resumes whoever is current. A point that decides for the running task is a function call and no
//! switch. *Relaxed* tasks (spinning, or having given the CPU away) can go on once another task has made a step. If nobody is ready, first those
//! that relax, pause or wait with a timeout are let go (time passes); if there are none either, it is a deadlock.
//!
//! How an abandoned run is unwound: [`super::lifecycle`].

use std::cell::Cell;

use super::{
    coroutine::{Stack, Way},
    report::{End, Kind},
    schedule::Choice,
    strategy::Moment,
    world::{self, Abandoned, Counts, Payload, State, Task, World},
};
use crate::{
    fault::{Fault, InjectedPanic},
    site::Site,
};

thread_local! {
    /// A task was leaked in the middle of its unwinding: `std` will call this OS thread panicking for ever.
    pub(super) static LEAKED: Cell<bool> = const { Cell::new(false) };
}

/// Somebody on this OS thread unwinds.
fn panics() -> bool {
    std::thread::panicking() && !LEAKED.get()
}

/// What the caller of a point does next.
enum Go {
    On,
    Switch(Way),
    Unwind,
}

impl World {
    fn way(&self) -> Way {
        // Set at the first instruction of each task, before anything that can ask for it.
        self.tasks[self.current as usize].way.unwrap_or_else(|| unreachable!("a task without a stack runs"))
    }

    fn at_point(&mut self, site: Site, kind: Kind) -> Go {
        if self.abandoned.is_some() {
            return self.late();
        }
        if self.stopping {
            return self.give_up(End::Stopped);
        }
        if self.accesses > self.max_accesses {
            return self.give_up(End::StepLimit);
        }
        let id = self.current;
        if self.alive < 2 || self.tasks[id as usize].quiet != 0 {
            return Go::On;
        }
        self.steps += 1;
        self.sites.pass(site);
        if self.steps > self.max_steps {
            return self.give_up(End::StepLimit);
        }
        self.mix(u64::from(id) << 8 | site as u64);
        if kind == Kind::Point {
            self.note(site, kind, 0, 0, String::new);
        }
        if self.relaxed != 0 {
            stir(self);
        }
        if self.paused != 0 || self.timed != 0 {
            self.time_passes(false);
        }
        if panics() {
            return Go::On;
        }
        if self.faulty {
            let pause = self.question(Fault::Pause, site);
            if pause != 0 {
                return self.pauses(pause, site);
            }
        }
        let task = &mut self.tasks[id as usize];
        if self.ready.len() < 2 && self.buffered.is_empty() {
            task.counts.points += 1;
            return Go::On;
        }
        self.choose(site, true)
    }

    /// Leaves the ready for `pause` steps of others.
    fn pauses(&mut self, pause: u32, site: Site) -> Go {
        let until = if pause == u32::MAX { u64::MAX } else { self.steps + u64::from(pause) };
        self.sites.force(site);
        self.set_state(self.current, State::Paused(until));
        self.choose_other(site)
    }

    /// Asks the strategy, as often as it lets stores reach memory first.
    fn choose(&mut self, site: Site, able: bool) -> Go {
        let id = self.current;
        loop {
            let counts = &mut self.tasks[id as usize].counts;
            let at = counts.points;
            counts.points += 1;
            let moment = Moment { task: id, able, at, site, ready: &self.ready, buffers: &self.buffered };
            let default = moment.default_task();
            let single = self.ready.len() + self.buffered.len() < 2;
            let choice = if single {
                Choice::Run(default)
            } else {
                self.choices += 1;
                self.chooser.pick(&moment)
            };
            if choice != Choice::Run(default) {
                self.turn(id, at, choice);
            }
            match choice {
                Choice::Run(next) if next == id => return Go::On,
                Choice::Run(next) => {
                    let way = self.way();
                    let task = &mut self.tasks[id as usize];
                    if able {
                        task.involuntary += 1;
                        self.preemptions += 1;
                        self.sites.force(site);
                        self.note(site, Kind::Switch, 0, u64::from(next), String::new);
                    } else {
                        task.voluntary += 1;
                    }
                    self.current = next;
                    self.mix(u64::from(next) ^ 0x5C5C);
                    return Go::Switch(way);
                }
                Choice::Drain(task) => self.drain_one(task),
                Choice::Hold | Choice::Yield | Choice::Fault(_) => {}
            }
        }
    }

    /// The current task cannot go on: somebody else is chosen, or it itself if time lets it go on again.
    fn choose_other(&mut self, site: Site) -> Go {
        if self.ready.is_empty() {
            self.steps += 1;
            if self.steps > self.max_steps {
                return self.give_up(End::StepLimit);
            }
            self.time_passes(true);
            if self.ready.is_empty() {
                let who = self.who_waits();
                return self.give_up(End::Deadlock(who));
            }
        }
        self.choose(site, false)
    }

    /// Ends the run at a point of the current task.
    fn give_up(&mut self, end: End) -> Go {
        self.abandon(end);
        self.late()
    }

    /// A call in an abandoned run.
    fn late(&mut self) -> Go {
        let task = self.task();
        task.late_calls += 1;
        if task.unwinding && (panics() || LEAKED.get()) {
            // A destructor that goes on and on gives way to the others, and is leaked with its task in the end.
            let endless = task.late_calls > 1_000_000;
            return if endless { Go::Switch(self.way()) } else { Go::On };
        }
        task.unwinding = true;
        Go::Unwind
    }

    /// Moves a task between the lists.
    pub fn set_state(&mut self, id: u32, state: State) {
        let task = &mut self.tasks[id as usize];
        let before = std::mem::replace(&mut task.state, state);
        let timed = task.deadline.is_some();
        let after = &task.state;
        let count =
            |of: &State| (u32::from(*of == State::Relaxed), u32::from(matches!(of, State::Paused(_))));
        let (was, is) = (count(&before), count(after));
        let becomes_ready = *after == State::Ready;
        self.relaxed = self.relaxed + is.0 - was.0;
        self.paused = self.paused + is.1 - was.1;
        if becomes_ready && timed {
            self.tasks[id as usize].deadline = None;
            self.timed -= 1;
        }
        if (before == State::Ready) != becomes_ready {
            let place = self.ready.partition_point(|other| *other < id);
            if becomes_ready {
                self.ready.insert(place, id);
            } else {
                self.ready.remove(place);
            }
        }
    }

    /// Lets those go on whose time has come; `all`: time jumps as far as it takes.
    #[cold]
    fn time_passes(&mut self, all: bool) {
        let now = self.time();
        for id in 0..self.tasks.len() as u32 {
            let task = &self.tasks[id as usize];
            let free = match task.state {
                State::Relaxed => all,
                State::Paused(until) => all || self.steps >= until,
                State::Blocked(..) => task.deadline.is_some_and(|deadline| all || now >= deadline),
                State::Ready | State::Ended => false,
            };
            if free {
                self.waiters.retain(|(_, waiter)| *waiter != id);
                self.set_state(id, State::Ready);
            }
        }
    }

    /// Wakes one task that is blocked.
    pub fn wake_task(&mut self, id: u32) {
        self.waiters.retain(|(_, waiter)| *waiter != id);
        if matches!(self.tasks[id as usize].state, State::Blocked(..)) {
            self.mix(u64::from(id) ^ 0xA7A7);
            let name = self.record.then(|| self.tasks[id as usize].name.clone());
            self.note(Site::Spin, Kind::Wake, 0, 0, || name.unwrap_or_default());
            self.set_state(id, State::Ready);
        }
    }

    /// Wakes up to `count` of those that wait on `key`, in the order in which they came.
    pub fn wake(&mut self, key: usize, count: u32) -> u32 {
        let mut woken = 0;
        while woken < count {
            let Some(&(_, id)) = self.waiters.iter().find(|(on, _)| *on == key) else { break };
            self.wake_task(id);
            woken += 1;
        }
        woken
    }

    #[cold]
    fn who_waits(&self) -> String {
        let mut text = String::new();
        for task in &self.tasks {
            if let State::Blocked(_, why) = task.state {
                text += if text.is_empty() { "" } else { "; " };
                text += &format!("{} waits for {why}", task.name);
            }
        }
        text
    }

    /// The answer to a question for a fault.
    fn question(&mut self, fault: Fault, site: Site) -> u32 {
        let id = self.current;
        let task = &mut self.tasks[id as usize];
        if !self.faulty || self.abandoned.is_some() || task.quiet != 0 {
            return 0;
        }
        let at = task.counts.questions;
        task.counts.questions += 1;
        let nth = self.asked[fault as usize];
        self.asked[fault as usize] += 1;
        let answer = match (self.chooser.fault(id, at), &self.faults) {
            (Some(answer), _) => answer,
            (None, Some(faults)) => faults.inject(fault, site, nth, &mut |below| self.chooser.draw(below)),
            (None, None) => 0,
        };
        if answer != 0 {
            self.turn(id, at, Choice::Fault(answer));
            self.mix(fault as u64 ^ u64::from(answer) << 8 ^ 0xFA00_0000);
            self.note(site, Kind::Fault, 0, u64::from(answer), || fault.name().to_owned());
        }
        answer
    }

    /// A stretch of work with a lock held ends here.
    pub fn step_ends(&mut self) {
        if self.task().held == 0 || self.task().quiet != 0 {
            return;
        }
        let limit = self.limits.step_units;
        let task = self.task();
        let units = task.accesses - task.step_since;
        task.step_since = task.accesses;
        // In quiet nobody waits: judges read whole trees.
        if task.quiet != 0 {
            return;
        }
        if units > self.longest_step {
            self.longest_step = units;
        }
        if units > limit {
            let name = self.task().name.clone();
            self.violation(
                "step-too-long",
                format!("{name}: {units} accesses without a reschedule check, at most {limit}"),
            );
        }
    }
}

impl World {
    /// A stretch of a read section ends: at its end, or at a check, where the section could have been left.
    pub fn section_stretch_ends(&mut self) {
        let limit = self.limits.rcu_units;
        let task = self.task();
        if task.sections == 0 || task.quiet != 0 {
            return;
        }
        let units = task.accesses.saturating_sub(task.section_since);
        task.section_since = task.accesses;
        self.longest_rcu = self.longest_rcu.max(units);
        if units > limit {
            let name = self.task().name.clone();
            let what = format!(
                "{name}: {units} accesses in a read section without a reschedule check, at most {limit}"
            );
            self.violation("rcu-section-too-long", what);
        }
    }
}

/// Tasks that relax can go on: the current one has made a step.
#[cold]
pub(super) fn stir(world: &mut World) {
    for id in 0..world.tasks.len() as u32 {
        if id != world.current && world.tasks[id as usize].state == State::Relaxed {
            world.set_state(id, State::Ready);
        }
    }
}

/// Begins the unwinding of the calling task.
fn raise() -> ! {
    std::panic::resume_unwind(Box::new(Abandoned))
}

fn follow(go: Option<Go>) {
    match go {
        None | Some(Go::On) => {}
        Some(Go::Unwind) => raise(),
        Some(Go::Switch(way)) => {
            // SAFETY: `way` is that of the task that was current when the choice was made: the caller.
            unsafe { way.suspend() };
            if world::with(|world| world.abandoned.is_some() && matches!(world.late(), Go::Unwind))
                .unwrap_or(false)
            {
                raise();
            }
        }
    }
}

/// A schedule point.
#[inline]
pub(super) fn point(site: Site, kind: Kind) {
    follow(world::with(|world| world.at_point(site, kind)));
}

/// Before something that empties the calling task's store buffer: others may run while it is still full.
pub(super) fn settle(site: Site) {
    if world::with(|world| !world.task().buffer.is_empty()).unwrap_or(false) {
        point(site, Kind::Fence);
        world::with(|world| world.drain_all(world.current));
    }
}

/// The calling task goes on once another one has made a step.
pub(super) fn relax(site: Site) {
    follow(world::with(|world| {
        if world.abandoned.is_some() {
            return world.late();
        }
        if world.stopping {
            return world.give_up(End::Stopped);
        }
        world.steps += 1;
        if world.steps > world.max_steps {
            return world.give_up(End::StepLimit);
        }
        if world.alive < 2 {
            return Go::On;
        }
        world.sites.pass(site);
        world.mix(u64::from(world.current) << 8 ^ site as u64 ^ 0x3E1A_0000);
        stir(world);
        let id = world.current;
        world.set_state(id, State::Relaxed);
        world.chooser.relaxed(id);
        world.choose_other(site)
    }));
}

/// The calling task is not chosen for `steps` steps of others, or until nobody else can go on.
pub(super) fn pause(steps: u32, site: Site) {
    if steps != 0 {
        follow(world::with(|world| match world.abandoned {
            Some(_) => world.late(),
            None => world.pauses(steps, site),
        }));
    }
}

/// Blocks the calling task on `key` until it is woken or `deadline` (ticks) has passed. May return early in an abandoned run: callers look again.
pub(super) fn block(key: usize, why: &'static str, site: Site, timeout: Option<u64>) {
    // Whoever calls has settled the buffer before it looked at what it waits for: nothing is a point between that look and the sleep.
    follow(world::with(|world| {
        if world.abandoned.is_some() {
            return match world.late() {
                Go::Unwind => Go::Unwind,
                _ => Go::Switch(world.way()),
            };
        }
        if world.stopping {
            return world.give_up(End::Stopped);
        }
        let id = world.current;
        world.drain_all(id);
        world.mix(u64::from(id) << 8 ^ 0xB10C_0000);
        world.note(site, Kind::Block, 0, 0, || why.to_owned());
        if let Some(timeout) = timeout {
            let deadline = world.time().saturating_add(timeout);
            world.task().deadline = Some(deadline);
            world.timed += 1;
        }
        world.set_state(id, State::Blocked(key, why));
        world.waiters.push_back((key, id));
        world.choose_other(site)
    }));
}

/// Asks for a fault; 0 is no.
pub(super) fn ask(fault: Fault, site: Site) -> u32 {
    world::with(|world| if world.faulty { world.question(fault, site) } else { 0 }).unwrap_or(0)
}

/// A reschedule check: does the schedule want a yield?
pub(super) fn asked_to_yield() -> bool {
    world::with(|world| {
        if world.abandoned.is_some() {
            return false;
        }
        world.step_ends();
        world.section_stretch_ends();
        if world.faulty && world.question(Fault::Yield, Site::LockYield) != 0 {
            return true;
        }
        let (id, percent) = (world.current, world.yield_percent);
        let task = world.task();
        if task.quiet != 0 {
            return false;
        }
        let at = task.counts.checks;
        task.counts.checks += 1;
        let yields = world.chooser.yields(id, at, percent);
        if yields {
            world.turn(id, at, Choice::Yield);
            world.mix(0x17E1_D000);
        }
        yields
    })
    .unwrap_or(false)
}

/// Makes a task; it is ready and has not begun. Errors: no memory for its stack, or the run is being abandoned.
pub(super) fn spawn(name: &str, body: Box<dyn FnOnce()>) -> std::io::Result<u32> {
    if world::with(|world| !world.tasks.is_empty()).unwrap_or(false) {
        settle(Site::Spin);
    }
    let id = world::with(|world| world.abandoned.is_none().then_some(world.tasks.len() as u32)).flatten();
    let Some(id) = id else {
        return Err(std::io::Error::other(format!("thread {name:?}: no simulation runs on this OS thread")));
    };
    let stack = Stack::new(move |way| {
        let abandoned = world::with(|world| {
            world.tasks[id as usize].way = Some(way);
            world.abandoned.is_some()
        });
        let result = std::panic::catch_unwind(std::panic::AssertUnwindSafe(move || {
            if abandoned.unwrap_or(true) {
                world::with(|world| world.task().unwinding = true);
                drop_unwinding(body);
            }
            body();
            settle(Site::Spin);
        }));
        finish(id, result.err());
    })?;
    world::with(|world| {
        world.tasks.push(Task {
            name: name.to_owned(),
            state: State::Ended,
            stack: Some(stack),
            way: None,
            buffer: Default::default(),
            quiet: 0,
            serving: 0,
            task_id: None,
            counts: Counts::default(),
            accesses: 0,
            voluntary: 0,
            involuntary: 0,
            payload: None,
            unwinding: false,
            late_calls: 0,
            held: 0,
            step_since: 0,
            sections: 0,
            section_since: 0,
            deadline: None,
        });
        world.set_state(id, State::Ready);
        world.alive += 1;
        world.width = world.width.max(world.alive);
    });
    Ok(id)
}

/// Drops what a task that never began would have run, as its unwinding would.
fn drop_unwinding(body: Box<dyn FnOnce()>) -> ! {
    let _body = body;
    raise()
}

/// The key that those wait on who join a task.
pub(super) fn end_key(id: u32) -> usize {
    // Not the address of anything: the first page is never mapped.
    id as usize + 1
}

/// The end of a task, on its own stack.
fn finish(id: u32, payload: Option<Payload>) {
    world::with(|world| {
        world.drain_all(id);
        if let Some(payload) = payload {
            if !payload.is::<Abandoned>() && !payload.is::<InjectedPanic>() {
                let what = format!("{}: {}", world.tasks[id as usize].name, message(&payload));
                world.abandon(End::Panicked(what));
            }
            world.tasks[id as usize].payload = Some(payload);
        }
        world.mix(u64::from(id) ^ 0xE4D0_0000);
        world.set_state(id, State::Ended);
        world.alive -= 1;
        world.wake(end_key(id), u32::MAX);
        if world.abandoned.is_none() && world.alive != 0 {
            // The stack is left for good in any case: only who is current now matters.
            let _left = world.choose_other(Site::Spin);
        }
    });
}

fn message(payload: &Payload) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned())
        .unwrap_or_else(|| "a panic without words".to_owned())
}
