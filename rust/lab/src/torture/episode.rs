//! One VM under torture, from its creation to its end.
//!
//! **Guarantee.** Between two quiet points every thread does nothing but its operations; at a quiet point no thread is inside an operation, no work is queued, nothing waits for RCU, no fault strikes, and everything is
//! compared with everything. A thread that does not come to a quiet point is a finding, and so is a panic; neither keeps the torture from ending.
//!
//! **Mechanism.** Stutter, after rcutorture: the conductor raises a phase, threads drop what they hold and gather, the judges look, the phase falls. Threads are not scoped: one that hangs is left behind, with its VM.

use std::any::Any;
use std::collections::BTreeMap;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use tdpmmu_oracle::{Judge, Rule, Rules};
use tdpmmu_platform::{Observer, Platform, RcuDomain, Role as TaskRole};
use tdpmmu_vm::slots::Region;
use tdpmmu_vm::{CloseReport, SlotFlags, Vm, VmError};

use super::report::{EpisodeReport, OperationCount, TortureViolation};
use super::rough::{self, Ground};
use super::surface::{Allowed, Chooser, HOST_PAGES, Part};
use super::{Dice, Draw};
use crate::Control;
use crate::faults::{Armed, FaultPlan, Injection, Length};
use crate::program::{Act, Done, Flags, Hands, SlotSpec, Who, perform};

/// Threads do operations.
const RUN: u32 = 0;
/// Threads gather.
const PAUSE: u32 = 1;
/// Threads go on until the VM is closed.
const CLOSE: u32 = 2;
/// Threads end.
const END: u32 = 3;

/// How long a thread may take to its next quiet point. Storms and lost CPUs included: an operation takes milliseconds.
const PATIENCE: Duration = Duration::from_secs(60);

/// What an episode adds to the report.
#[derive(Debug, Default)]
pub(super) struct Sum {
    pub(super) episode: EpisodeReport,
    pub(super) violations: Vec<TortureViolation>,
    pub(super) by_operation: BTreeMap<String, OperationCount>,
    pub(super) accesses: BTreeMap<String, u64>,
    /// A thread hangs: it and its VM were left behind.
    pub(super) stuck: bool,
}

struct Shared<P: Platform> {
    vm: Vm<P>,
    flags: Flags,
    host: u64,
    phase: AtomicU32,
    gathered: Mutex<usize>,
    changed: Condvar,
    /// Per thread: operations begun.
    begun: Vec<AtomicU64>,
    seats: Vec<Seat>,
    allowed: Allowed,
    armed: Arc<Armed>,
    storm_writes: AtomicU64,
    sum: Mutex<Sum>,
}

/// A thread of the torture.
#[derive(Clone, Debug)]
struct Seat {
    name: String,
    what: Task,
    seed: u64,
}

#[derive(Clone, Copy, Debug)]
enum Task {
    Operations(Part, Who),
    /// Holds read sections: grace periods take long.
    Holder(Length),
    StormReader,
    StormWriter,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// Runs the episode that was drawn, until its time is over or it is cancelled.
pub(super) fn run<P: Platform>(draw: &Draw, armed: &Arc<Armed>, ground: &Ground, control: &Control) -> Sum {
    let episode = EpisodeReport {
        seed: draw.seed,
        design: draw.design.clone(),
        profile: draw.machine.profile.clone(),
        ground: P::NAME.to_owned(),
        machine: draw.words(),
        closed_under_fire: draw.close_under_fire,
        ..EpisodeReport::default()
    };
    let refused = |what: String| {
        let violation = TortureViolation { episode: draw.number, rule: "setup".into(), what };
        Sum { episode: episode.clone(), violations: vec![violation], ..Sum::default() }
    };
    // Workers inherit the ground from who makes the VM; the conductor itself is on smooth ground otherwise.
    armed.disarm();
    let (vm, judge) = {
        let _on = rough::enter(ground.clone());
        let made = draw.machine.config(HOST_PAGES, None).map_err(|error| error.to_string()).and_then(
            |mut config| {
                // Whether a change under a root owes a flush depends on who holds the root, and whether it is valid, at that moment: reports of two threads have no true order here. Under the simulated platform,
                // which has it, both rules are awake; here frames with owners tell of a translation that was kept too long.
                let rules = || {
                    Rules::of(&config.profile, config.format, config.design_name())
                        .on::<P>()
                        .silence(Rule::WriteUnflushed)
                        .silence(Rule::FlushMissing)
                };
                let judge = draw.judged.then(|| Judge::new(rules()));
                config.observer = judge.clone().map(|judge| judge as Arc<dyn Observer>);
                config.rcu.stall_ns = 5_000_000;
                config.quarantine = draw.rough;
                Ok((Vm::<P>::new(config).map_err(|error| error.to_string())?, judge))
            },
        );
        match made {
            Ok(made) => made,
            Err(what) => {
                armed.rearm();
                return refused(what);
            }
        }
    };
    let host = match settle(&vm, draw) {
        Ok(host) => host,
        Err(error) => {
            armed.rearm();
            return refused(error.to_string());
        }
    };
    armed.rearm();
    let seats = seats(draw, armed.plan());
    let shared = Arc::new(Shared {
        vm,
        flags: Flags::default(),
        host,
        phase: AtomicU32::new(RUN),
        gathered: Mutex::new(0),
        changed: Condvar::new(),
        begun: seats.iter().map(|_| AtomicU64::new(0)).collect(),
        allowed: Allowed::of(&draw.machine),
        seats,
        armed: armed.clone(),
        storm_writes: AtomicU64::new(0),
        sum: Mutex::new(Sum { episode, ..Sum::default() }),
    });
    let conductor = Conductor { shared, judge, draw, seen: 0, told: 0 };
    conductor.conduct(ground, control)
}

/// The memory and what is set once. Returns the first host page.
fn settle<P: Platform>(vm: &Vm<P>, draw: &Draw) -> Result<u64, VmError> {
    let machine = &draw.machine;
    let host = vm.side().primary.region(HOST_PAGES, 0, machine.host_level, true)?;
    let task = vm.task("setup", TaskRole::Caller);
    for slot in &machine.slots {
        let SlotSpec { id, as_id, gfn, pages, hva_page, log, read_only } = *slot;
        let flags = SlotFlags { log_dirty: log, readonly: read_only };
        vm.set_memslot(&task, &Region { id, as_id, base: gfn, pages, hva: host + hva_page, flags })?;
    }
    if machine.smm {
        vm.share_memory_with_smm(&task)?;
    }
    Ok(host)
}

fn seats(draw: &Draw, plan: &FaultPlan) -> Vec<Seat> {
    let mut seats: Vec<Seat> = Vec::new();
    let mut add = |name: String, what: Task| {
        let seed = Dice::seed_of(draw.seed, seats.len() as u64 + 1);
        seats.push(Seat { name, what, seed });
    };
    for id in 0..draw.machine.vcpus {
        add(format!("vcpu-{id}"), Task::Operations(Part::Guest, Who::Vcpu(id)));
    }
    add("vmm".into(), Task::Operations(Part::Vmm, Who::Caller));
    add("migration".into(), Task::Operations(Part::Migration, Who::Other(0)));
    add("host".into(), Task::Operations(Part::Host, Who::Other(1)));
    for fault in plan.faults() {
        match *fault {
            Injection::GraceDelay(length) => add("rcu-holder".into(), Task::Holder(length)),
            Injection::Storm(readers) => {
                add("storm-writer".into(), Task::StormWriter);
                (0..readers).for_each(|n| add(format!("storm-{n}"), Task::StormReader));
            }
            _ => {}
        }
    }
    seats
}

struct Conductor<'d, P: Platform> {
    shared: Arc<Shared<P>>,
    judge: Option<Arc<Judge>>,
    draw: &'d Draw,
    /// Violations of the judge, and of the engine, that were booked before.
    seen: usize,
    told: usize,
}

impl<P: Platform> Conductor<'_, P> {
    fn conduct(mut self, ground: &Ground, control: &Control) -> Sum {
        let shared = Arc::clone(&self.shared);
        let mut threads = Vec::new();
        for (n, seat) in self.shared.seats.iter().enumerate() {
            let (shared, name) = (Arc::clone(&self.shared), seat.name.clone());
            let vcpu =
                if let Task::Operations(_, Who::Vcpu(id)) = seat.what { Some(id as u16) } else { None };
            let ground = Ground { seed: seat.seed.rotate_left(7), vcpu, ..ground.clone() };
            let body = move || {
                let result = panic::catch_unwind(AssertUnwindSafe(|| shared.thread(n, ground)));
                if let Err(payload) = result {
                    shared.found("panic", &format!("{}: {}", shared.seats[n].name, said(&*payload)));
                    // A quiet point is not to wait for it.
                    *lock(&shared.gathered) += 1;
                    shared.changed.notify_all();
                }
            };
            match thread::Builder::new().name(name).spawn(body) {
                Ok(handle) => threads.push(handle),
                Err(error) => {
                    self.shared.found("setup", &format!("the host refused a thread: {error}"));
                    break;
                }
            }
        }
        let all = threads.len();
        for round in 0..self.draw.rounds {
            let begin = Instant::now();
            self.run_for(self.draw.run, control);
            let last = round + 1 == self.draw.rounds || control.cancelled();
            if last && self.draw.close_under_fire {
                self.ran_since(begin);
                break;
            }
            if !self.gather(all) {
                return self.stuck();
            }
            self.ran_since(begin);
            self.quiet();
            if last || !lock(&shared.sum).violations.is_empty() {
                break;
            }
            self.go(RUN);
        }
        let report = if self.draw.close_under_fire && lock(&shared.sum).violations.is_empty() {
            self.go(CLOSE);
            self.close()
        } else {
            self.go(END);
            None
        };
        let deadline = Instant::now() + PATIENCE;
        while threads.iter().any(|thread| !thread.is_finished()) {
            if Instant::now() > deadline {
                return self.stuck();
            }
            thread::sleep(Duration::from_millis(1));
        }
        for thread in threads {
            let _ = thread.join();
        }
        shared.armed.disarm();
        let report = report.or_else(|| self.close());
        self.finish(report);
        shared.armed.rearm();
        self.sum()
    }

    fn run_for(&self, length: Duration, control: &Control) {
        let begin = Instant::now();
        while begin.elapsed() < length && !control.cancelled() {
            thread::sleep(Duration::from_millis(5).min(length));
        }
    }

    /// Operations ran since `begin`.
    fn ran_since(&self, begin: Instant) {
        lock(&self.shared.sum).episode.seconds += begin.elapsed().as_secs_f64();
    }

    fn go(&self, phase: u32) {
        let mut gathered = lock(&self.shared.gathered);
        *gathered = 0;
        self.shared.phase.store(phase, Ordering::Release);
        drop(gathered);
        self.shared.changed.notify_all();
    }

    /// Every thread has dropped what it held. False: one has not come.
    fn gather(&self, all: usize) -> bool {
        self.go(PAUSE);
        let gathered = lock(&self.shared.gathered);
        let waited = self.shared.changed.wait_timeout_while(gathered, PATIENCE, |n| *n < all);
        waited.map(|(_, timeout)| !timeout.timed_out()).unwrap_or(false)
    }

    fn quiet(&mut self) {
        let shared = Arc::clone(&self.shared);
        shared.armed.disarm();
        if let Some(queue) = shared.vm.mmu().design().queue() {
            queue.flush();
        }
        let task = shared.vm.task("judge", TaskRole::Observer);
        shared.vm.mmu().rcu().barrier();
        if let Some(judge) = &self.judge {
            judge.check_vm(&shared.vm, &task);
        } else {
            self.recount(&task);
        }
        drop(task);
        self.hear();
        self.recover();
        let writers = shared.seats.iter().any(|seat| matches!(seat.what, Task::StormWriter));
        if writers && shared.storm_writes.swap(0, Ordering::Relaxed) == 0 {
            shared
                .found("starved-writer", "the storm's writer got mmu_lock not once between two quiet points");
        }
        lock(&shared.sum).episode.quiet_checks += 1;
        shared.armed.rearm();
    }

    /// The cheap oracles: what the engine counts for itself against the tree.
    fn recount(&self, task: &tdpmmu_platform::Task<P>) {
        let mmu = self.shared.vm.mmu();
        if !mmu.profile().page_stats {
            return;
        }
        let counts = mmu.count_all(task);
        let told = mmu.leaf_pages();
        let counted = [1, 2, 3].map(|level: usize| counts.leaves[level] as i64);
        if counted != told {
            self.shared.found(
                "stats-differ",
                &format!("pages {told:?} by the statistics, {counted:?} by a recount"),
            );
        }
    }

    /// Takes over what the judge, the engine and the books of frames say.
    fn hear(&mut self) {
        if let Some(judge) = &self.judge {
            let all = judge.violations();
            for violation in all.iter().skip(self.seen) {
                self.shared.found(violation.rule.name(), &violation.to_string());
            }
            self.seen = all.len();
            lock(&self.shared.sum).episode.events = judge.events();
        }
        for (rule, what) in self.shared.armed.take_found() {
            self.shared.found(rule, &what);
        }
        let mmu = self.shared.vm.mmu();
        let told = mmu.violations();
        for what in told.iter().skip(self.told) {
            self.shared.found("engine", what);
        }
        self.told = told.len();
        let frames = self.shared.vm.side().primary.frames();
        if frames.stats().violations != 0 {
            let first: Vec<_> = frames.violations().into_iter().take(3).collect();
            self.shared.found(
                "frame-owner",
                &format!(
                    "{} accesses of frames that were somebody else's: {first:?}",
                    frames.stats().violations
                ),
            );
        }
        if mmu.pool().stats().double_frees != 0 {
            self.shared.found("freed-twice", "the pool counted frees of free pages");
        }
    }

    /// When the faults are over, what failed succeeds.
    fn recover(&self) {
        let shared = &*self.shared;
        let result = Hands::new(&shared.vm, Who::Vcpu(0), "recovery", shared.host, &shared.flags).and_then(
            |mut hands| {
                if let Some(vcpu) = hands.vcpu() {
                    vcpu.exit_smm();
                }
                let result = perform(&shared.vm, &mut hands, &Act::write(1));
                // A full ring is no starvation: it is emptied, as by user space.
                match result {
                    Err(VmError::RingFull { .. }) => {
                        perform(&shared.vm, &mut hands, &Act::ResetRings)?;
                        perform(&shared.vm, &mut hands, &Act::write(1))
                    }
                    other => other,
                }
            },
        );
        if let Err(error) = result {
            shared.found("not-recovered", &format!("with the faults over an access still fails: {error}"));
        }
    }

    /// A panic of a worker is rethrown at the end of its queue: injected ones are looked past.
    fn close(&mut self) -> Option<CloseReport> {
        let deadline = Instant::now() + PATIENCE;
        loop {
            match panic::catch_unwind(AssertUnwindSafe(|| self.shared.vm.close())) {
                Ok(Ok(report)) => return Some(report),
                Ok(Err(VmError::Busy { .. })) if Instant::now() < deadline => thread::yield_now(),
                Ok(Err(error)) => {
                    self.shared.found("close", &error.to_string());
                    return None;
                }
                Err(payload) if self.shared.armed.plan().panics() && is_injected(&*payload) => {}
                Err(payload) => {
                    self.shared.found("panic", &format!("at the end of the VM: {}", said(&*payload)));
                    return None;
                }
            }
        }
    }

    fn finish(&mut self, report: Option<CloseReport>) {
        let shared = Arc::clone(&self.shared);
        let Some(report) = report else { return };
        let panics = shared.armed.plan().panics();
        if let Some(judge) = self.judge.as_ref().filter(|_| !panics) {
            judge.finish(shared.vm.mmu(), &shared.vm.task("judge", TaskRole::Observer));
        }
        if !panics {
            self.hear();
            if !report.is_clean() && lock(&shared.sum).violations.is_empty() {
                shared.found("leak", &format!("{report:?}"));
            }
        }
        let rcu = shared.vm.mmu().rcu().stats();
        let mut sum = lock(&shared.sum);
        sum.episode.tables = shared.vm.mmu().pool().stats().allocs;
        for stall in rcu.stalls {
            *sum.episode.stalls.entry(stall.reader).or_default() += 1;
        }
    }

    /// Somebody hangs: says who and in what, and leaves them.
    fn stuck(self) -> Sum {
        let shared = &self.shared;
        let mut doing = Vec::new();
        for (seat, begun) in shared.seats.iter().zip(&shared.begun) {
            if let Task::Operations(part, _) = seat.what {
                let begun = begun.load(Ordering::Relaxed);
                let mut chooser = Chooser::new(part, shared.allowed, seat.seed);
                let act = (0..begun).map(|_| chooser.act()).last().map(|act| act.title()).unwrap_or_default();
                doing.push(format!("{}: operation {begun}, {act}", seat.name));
            }
        }
        let gathered = *lock(&shared.gathered);
        let what = format!(
            "{gathered} of {} threads came to the quiet point within {} s; {}",
            shared.seats.len(),
            PATIENCE.as_secs(),
            doing.join("; ")
        );
        shared.found("no-progress", &what);
        shared.phase.store(END, Ordering::Release);
        // The VM is never dropped: its end would wait for who hangs.
        std::mem::forget(Arc::clone(shared));
        let mut sum = self.sum();
        sum.stuck = true;
        sum
    }

    fn sum(&self) -> Sum {
        std::mem::take(&mut *lock(&self.shared.sum))
    }
}

/// Counts of one thread, merged when it pauses.
#[derive(Default)]
struct Tally {
    by_operation: BTreeMap<String, OperationCount>,
    accesses: BTreeMap<String, u64>,
}

impl<P: Platform> Shared<P> {
    fn found(&self, rule: &str, what: &str) {
        let mut sum = lock(&self.sum);
        // A worker that was made to panic is told by the engine, as it must be.
        if self.armed.plan().panics() && what.contains("panicked") {
            return;
        }
        let known = sum.violations.iter().any(|there| there.rule == rule && there.what == what);
        if !known && sum.violations.len() < 100 {
            sum.violations.push(TortureViolation { episode: 0, rule: rule.into(), what: what.into() });
        }
    }

    fn phase(&self) -> u32 {
        self.phase.load(Ordering::Acquire)
    }

    /// Waits while threads gather; returns the phase after that.
    fn gate(&self) -> u32 {
        let mut gathered = lock(&self.gathered);
        if self.phase() == PAUSE {
            *gathered += 1;
            self.changed.notify_all();
            while self.phase() == PAUSE {
                gathered = self.changed.wait(gathered).unwrap_or_else(PoisonError::into_inner);
            }
        }
        self.phase()
    }

    fn thread(&self, n: usize, ground: Ground) {
        let _on = rough::enter(ground);
        match self.seats[n].what {
            Task::Operations(part, who) => self.operations(n, part, who),
            Task::Holder(length) => self.holder(length),
            Task::StormReader => self.storm(false),
            Task::StormWriter => self.storm(true),
        }
    }

    fn operations(&self, n: usize, part: Part, who: Who) {
        let mut chooser = Chooser::new(part, self.allowed, self.seats[n].seed);
        let mut tally = Tally::default();
        let mut closed = false;
        while !closed && self.gate() != END {
            let mut hands = match Hands::new(&self.vm, who, &self.seats[n].name, self.host, &self.flags) {
                Ok(hands) => hands,
                Err(VmError::Busy { .. }) => {
                    thread::yield_now();
                    continue;
                }
                Err(VmError::Closed) => break,
                Err(error) => {
                    self.found("unexpected-error", &format!("{}: {error}", self.seats[n].name));
                    break;
                }
            };
            let mut left = 64;
            loop {
                let phase = self.phase();
                // The end of a VM waits for no vCPU: while it is tried, handles come and go.
                if phase == PAUSE || phase == END || (phase == CLOSE && left == 0) {
                    break;
                }
                left -= u32::from(phase == CLOSE);
                let act = chooser.act();
                self.begun[n].fetch_add(1, Ordering::Relaxed);
                let result = perform(&self.vm, &mut hands, &act);
                match &result {
                    Err(VmError::RingFull { .. }) => {
                        let _ = perform(&self.vm, &mut hands, &Act::CollectRings);
                        let _ = perform(&self.vm, &mut hands, &Act::ResetRings);
                    }
                    Err(VmError::Closed) => closed = true,
                    _ => {}
                }
                self.book(&mut tally, n, &act, &result);
                if closed {
                    break;
                }
            }
            drop(hands);
            self.merge(&mut tally);
        }
    }

    fn book(&self, tally: &mut Tally, n: usize, act: &Act, result: &Result<Done, VmError>) {
        let title = act.title();
        let name = title.split(' ').next().unwrap_or_default();
        if !tally.by_operation.contains_key(name) {
            tally.by_operation.insert(name.to_owned(), OperationCount::default());
        }
        let Some(count) = tally.by_operation.get_mut(name) else { return };
        match result {
            Ok(done) => {
                count.done += 1;
                if let Done::Access(outcome) = done {
                    *tally.accesses.entry(outcome.name().to_owned()).or_default() += 1;
                }
            }
            // Where the plan takes pages away or keeps them from coming back; and where the host's scheduler lets the RCU thread starve for so long that all wait for it. They come back: `recover` looks.
            Err(VmError::Pool(_) | VmError::Quota { .. }) => count.starved += 1,
            Err(VmError::Host { .. }) if self.armed.plan().starves() => count.starved += 1,
            Err(
                VmError::BadSlot { .. }
                | VmError::SlotOverlap { .. }
                | VmError::NoSlot { .. }
                | VmError::BadRange { .. }
                | VmError::BadHva { .. }
                | VmError::DirtyLog { .. }
                | VmError::NotLogging { .. }
                | VmError::OtherLog { .. }
                | VmError::Unsupported { .. }
                | VmError::HostFull { .. }
                | VmError::RingFull { .. }
                | VmError::NeedsTdp { .. }
                | VmError::Closed,
            ) => count.refused += 1,
            Err(error) => {
                self.found("unexpected-error", &format!("{}: {title}: {error}", self.seats[n].name))
            }
        }
    }

    fn merge(&self, tally: &mut Tally) {
        let mut sum = lock(&self.sum);
        for (name, count) in std::mem::take(&mut tally.by_operation) {
            sum.episode.operations += count.done + count.refused + count.starved;
            let all = sum.by_operation.entry(name).or_default();
            all.done += count.done;
            all.refused += count.refused;
            all.starved += count.starved;
        }
        for (name, count) in std::mem::take(&mut tally.accesses) {
            *sum.accesses.entry(name).or_default() += count;
        }
    }

    /// A reader that sits in its section, so that no grace period ends meanwhile.
    fn holder(&self, length: Length) {
        let task = self.vm.task("rcu-holder", TaskRole::Observer);
        while self.gate() == RUN {
            let begin = Instant::now();
            {
                let _section = task.rcu_read();
                let until = Duration::from_micros(u64::from(length.points()));
                while self.phase() == RUN && (length == Length::Endless || begin.elapsed() < until) {
                    thread::sleep(Duration::from_micros(100));
                }
            }
            thread::sleep(Duration::from_micros(200));
        }
    }

    /// Takes mmu_lock and does nothing, again and again.
    fn storm(&self, writes: bool) {
        let task = self.vm.task("storm", TaskRole::Observer);
        while self.gate() == RUN {
            while self.phase() == RUN {
                if writes {
                    drop(self.vm.mmu().lock.write(&task));
                    self.storm_writes.fetch_add(1, Ordering::Relaxed);
                    thread::sleep(Duration::from_micros(50));
                } else {
                    drop(self.vm.mmu().lock.read(&task));
                    thread::yield_now();
                }
            }
        }
    }
}

fn said(payload: &(dyn Any + Send)) -> String {
    let text = payload.downcast_ref::<&str>().map(|text| (*text).to_owned());
    text.or_else(|| payload.downcast_ref::<String>().cloned()).unwrap_or_else(|| "a panic".to_owned())
}

fn is_injected(payload: &(dyn Any + Send)) -> bool {
    rough::is_injected(payload)
}
