//! The workers of a zap design: a queue of a VM's own, or the system's, which all VMs share.
//!
//! **Guarantee.** What [`ZapQueue::schedule`] took is run once, by a worker, in the order of scheduling. [`ZapQueue::flush`] returns when everything that *this* VM had scheduled
//! has ended, whatever other VMs have in the queue. After [`ZapQueue::shutdown`] no worker touches the MMU again; a system
//! worker then works on for others, and ends with the last VM.
//!
//! **Mechanism.** A *crew* is a [`WorkQueue`] and its workers; a *client* is one VM's account with it: its number (the owner of its
//! items), its delays, its reports. A VM with a queue of its own is the only client of its crew (`alloc_workqueue`, 5.18); the system's
//! crew is found by platform type and lives as long as one of its clients. A worker is a thread and one [`Task`] per client it has met.
//!
//! **Whose VM is it?** A queue of the VM's own is drained before the VM goes, so its items need hold nothing. The system's queue knows no VM: each item takes a user reference
//! ([`TdpMmu::get_user`]) and gives it back at its end. A dying VM has none to give: then `schedule` declines, and who asked zaps.
//!
//! **Reports** are asked for, not pushed: each worker answers between two items, for itself, and never waits for another.
//! **Fault injection**: [`ZapQueue::hold`] keeps this VM's items from being started until [`ZapQueue::release`].

use std::any::{Any, TypeId};
use std::cell::{Cell, RefCell};
use std::io;
use std::marker::PhantomData;
use std::panic::{self, AssertUnwindSafe};
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, Ordering};
use std::sync::{Arc, Mutex as StdMutex, OnceLock, PoisonError, Weak};
use std::thread;

use tdpmmu_platform::queue::Serve;
use tdpmmu_platform::{
    Bug, Event, Fault, Histogram, InjectedPanic, Mutex, MutexGuard, Owner, Platform, Role, Site, Task,
    WorkQueue,
};

use super::{DesignOptions, Held, QueueKind, WorkerReport, check_worker_cpus};
use tdpmmu_table::TableFlag;

use crate::TdpMmu;
use crate::walk::Yield;

/// What a worker does with what was scheduled.
type Work<P> = Arc<dyn Fn(&TdpMmu<P>, &Task<P>, u32) + Send + Sync>;

/// See the module text.
pub struct ZapQueue<P: Platform> {
    kind: QueueKind,
    workers: usize,
    cpus: Vec<usize>,
    work: Work<P>,
    place: OnceLock<(Arc<Crew<P>>, Arc<Client<P>>)>,
    /// Scheduled when the VM was dying, by a task that could not zap at once.
    owed: Mutex<P, Vec<u32>>,
    /// Tasks that zap what a dying VM's workers would have: a flush waits for them as for workers.
    direct: AtomicU32,
}

impl<P: Platform> ZapQueue<P> {
    /// A queue whose workers zap the root that was scheduled, under the shared lock, yielding, and put its [`Owner::Work`] reference.
    /// `own`: the design's kind of queue, if `options` do not ask for the other.
    pub fn new(own: QueueKind, options: &DesignOptions) -> Self {
        Self::with_work(own, options, |mmu, task, root| {
            let mut guard = mmu.lock.read(task);
            mmu.zap_root(&mut guard, root, Yield::Allowed);
            mmu.put_root(task, root, Owner::Work, Held::Shared(&mut guard));
        })
    }

    /// A queue whose workers do `work` with the number that was queued.
    pub fn with_work(
        own: QueueKind,
        options: &DesignOptions,
        work: impl Fn(&TdpMmu<P>, &Task<P>, u32) + Send + Sync + 'static,
    ) -> Self {
        Self {
            kind: options.queue.unwrap_or(own),
            workers: options.workers.max(1),
            cpus: options.worker_cpus.clone(),
            work: Arc::new(work),
            place: OnceLock::new(),
            owed: Mutex::new(Vec::new()),
            direct: AtomicU32::new(0),
        }
    }

    /// Starts the workers, or joins those of the system; from [`super::ZapDesign::attach`].
    ///
    /// # Errors
    /// A thread that cannot be started, a worker that dies before its first item, an MMU that has gone; a CPU that this process may not use.
    pub fn attach(&self, mmu: Weak<TdpMmu<P>>) -> io::Result<()> {
        check_worker_cpus::<P>(&self.cpus).map_err(|e| io::Error::new(io::ErrorKind::InvalidInput, e))?;
        let client = Client::new(mmu, self.work.clone());
        let crew = match self.kind {
            QueueKind::PerVm => {
                let crew =
                    Crew::start("tdp_mmu_zap_wq", Some(client.clone()), self.workers, &self.cpus, None)?;
                // Every worker has its task before the first root is scheduled, and a report is one of each.
                client.await_tasks(self.workers)?;
                crew
            }
            QueueKind::System => Crew::of_system(self.workers, &self.cpus)?,
        };
        let _ = self.place.set((crew, client));
        Ok(())
    }

    /// Hands `root` to a worker, with one [`Owner::Work`] reference that the caller has taken or re-armed. False: the VM is dying and no worker may have it; zap it yourself.
    #[must_use = "a root that no worker takes must be zapped by the caller"]
    pub fn schedule(&self, mmu: &TdpMmu<P>, task: &Task<P>, root: u32) -> bool {
        mmu.note_scheduled(task, root);
        self.push(mmu, root)
    }

    /// Queues `what` for [`ZapQueue::with_work`]; no report. False: the VM is dying.
    #[must_use = "what no worker takes must be done by the caller"]
    pub fn push(&self, mmu: &TdpMmu<P>, what: u32) -> bool {
        let Some((crew, client)) = self.place.get() else { return false };
        // queue_work: an item that is pending is not queued again.
        if P::bug(Bug::B23) && mmu.pool().meta(what).set(TableFlag::Scheduled) {
            return true;
        }
        P::point(Site::QueueWork);
        if client.left.load(Ordering::Acquire) || self.kind == QueueKind::System && !mmu.get_user() {
            return false;
        }
        let item =
            Item { client: client.clone(), what, queued: P::ticks(), user: self.kind == QueueKind::System };
        let queued = crew.queue.queue_for(client.id, item);
        if !queued && self.kind == QueueKind::System {
            mmu.put_user();
        }
        queued
    }

    /// Schedules `root`, or, in a dying VM, zaps it here and puts its reference: what the last put does with what it made.
    pub fn schedule_or_zap(&self, mmu: &TdpMmu<P>, task: &Task<P>, root: u32, held: Held<'_, '_, P>) {
        if !self.schedule(mmu, task, root) {
            self.zap_here(mmu, task, root, held);
        }
    }

    /// Zaps a root that no worker took, and puts its [`Owner::Work`] reference. It may yield: a fast zap that comes in between skips the root, which is
    /// invalid, and therefore waits in its [`ZapQueue::flush`] until this has ended.
    pub fn zap_here(&self, mmu: &TdpMmu<P>, task: &Task<P>, root: u32, mut held: Held<'_, '_, P>) {
        let _direct = Direct::<P>::begin(&self.direct);
        held.zap(mmu, task, root, Yield::Allowed);
        mmu.put_root(task, root, Owner::Work, held);
    }

    /// Schedules `root`; in a dying VM [`ZapQueue::zap_owed`] zaps it, since under the exclusive lock is no place for that.
    pub fn schedule_or_owe(&self, mmu: &TdpMmu<P>, task: &Task<P>, root: u32) {
        if !self.schedule(mmu, task, root) {
            self.owe(root);
        }
    }

    /// Leaves a root that no worker took, with its [`Owner::Work`] reference, to [`ZapQueue::zap_owed`].
    pub fn owe(&self, root: u32) {
        self.owed.lock().push(root);
    }

    /// Zaps what was scheduled when there was no user left.
    pub fn zap_owed(&self, mmu: &TdpMmu<P>, task: &Task<P>) {
        for root in std::mem::take(&mut *self.owed.lock()) {
            let mut guard = mmu.lock.read(task);
            mmu.zap_root(&mut guard, root, Yield::Allowed);
            mmu.put_root(task, root, Owner::Work, Held::Shared(&mut guard));
        }
    }

    /// Waits until everything that this VM has queued so far has ended, and what it zaps by itself because it is dying. Not from a worker, nor with
    /// mmu_lock held.
    pub fn flush(&self) {
        if let Some((crew, client)) = self.place.get() {
            crew.queue.flush_for(client.id);
        }
        loop {
            P::point(Site::QueueFlush);
            let direct = self.direct.load(Ordering::Acquire);
            if direct == 0 {
                return;
            }
            P::futex_wait(&self.direct, direct, None);
        }
    }

    /// Runs what this VM has queued, held back or not, and leaves the queue: its own workers end, the system's forget this VM.
    pub fn shutdown(&self) {
        let Some((crew, client)) = self.place.get() else { return };
        client.left.store(true, Ordering::Release);
        crew.queue.release_for(client.id);
        if P::bug(Bug::C10) {
            return;
        }
        crew.queue.flush_for(client.id);
        match self.kind {
            QueueKind::PerVm => crew.queue.shutdown(),
            QueueKind::System => crew.queue.nudge(),
        }
    }

    /// Items of this VM that are queued and not started.
    pub fn waiting(&self) -> usize {
        self.place.get().map_or(0, |(crew, client)| crew.queue.len_for(client.id))
    }

    /// Which kind of queue this is.
    pub fn kind(&self) -> QueueKind {
        self.kind
    }

    /// From queued to started, of this VM's items.
    pub fn queue_ns(&self) -> Histogram {
        self.place.get().map_or_else(Histogram::new, |(_, client)| client.delay_ns.lock().clone())
    }

    /// Items so far, of all VMs that share the queue, whose scheduling woke a worker.
    pub fn wakes(&self) -> u64 {
        self.place.get().map_or(0, |(crew, _)| crew.queue.wakes())
    }

    /// Waits until this VM's items are done, then asks each worker that has served it for what it has measured since the last time.
    pub fn take_worker_reports(&self) -> Vec<WorkerReport> {
        let Some((crew, client)) = self.place.get() else { return Vec::new() };
        self.flush();
        client.reports(|| crew.queue.nudge())
    }

    /// Fault injection: no item of this VM is started from here on. A [`ZapQueue::flush`], and with it a fast zap, waits for the release. The end of
    /// the VM is one, before it waits for what is under way; nothing is held back after it.
    pub fn hold(&self) {
        if let Some((crew, client)) = self.place.get() {
            crew.queue.hold_for(client.id);
            // Tested afterwards: a shutdown that comes in between sees the hold, or this sees the shutdown.
            if client.left.load(Ordering::Acquire) {
                crew.queue.release_for(client.id);
            }
        }
    }

    /// Between [`ZapQueue::hold`] and [`ZapQueue::release`].
    pub fn is_held(&self) -> bool {
        self.place.get().is_some_and(|(crew, client)| crew.queue.is_held(client.id))
    }

    /// Ends [`ZapQueue::hold`].
    pub fn release(&self) {
        if let Some((crew, client)) = self.place.get() {
            crew.queue.release_for(client.id);
        }
    }
}

impl<P: Platform> Drop for ZapQueue<P> {
    fn drop(&mut self) {
        if let Some((crew, client)) = self.place.get() {
            // A VM that was not drained: its items find it gone, the system's workers give up their tasks for it.
            client.left.store(true, Ordering::Release);
            crew.queue.release_for(client.id);
        }
    }
}

/// One thing to do for one VM.
struct Item<P: Platform> {
    client: Arc<Client<P>>,
    what: u32,
    queued: u64,
    /// It holds a user reference.
    user: bool,
}

/// What an item owes whatever becomes of its work: a panic is the VM's to know, since a fast zap that waited for it returns, and a user reference is given back.
struct Duty<'m, P: Platform> {
    mmu: &'m TdpMmu<P>,
    user: bool,
}

impl<P: Platform> Drop for Duty<'_, P> {
    fn drop(&mut self) {
        if thread::panicking() {
            self.mmu.violation("a worker panicked: what it was to zap may still be mapped, and referenced");
        }
        if self.user {
            self.mmu.put_user();
        }
    }
}

/// A zap by who lost the root, counted also when it panics. It begins in the hold of mmu_lock that made the root invalid, so a fast zap that finds the root
/// invalid finds the count too.
struct Direct<'q, P: Platform>(&'q AtomicU32, PhantomData<P>);

impl<'q, P: Platform> Direct<'q, P> {
    fn begin(count: &'q AtomicU32) -> Self {
        P::locked(Site::QueueRun);
        count.fetch_add(1, Ordering::Relaxed);
        Self(count, PhantomData)
    }
}

impl<P: Platform> Drop for Direct<'_, P> {
    fn drop(&mut self) {
        P::locked(Site::QueueRun);
        self.0.fetch_sub(1, Ordering::Release);
        P::futex_wake(self.0, u32::MAX);
    }
}

/// A queue and its workers.
struct Crew<P: Platform> {
    queue: WorkQueue<P, Item<P>>,
    pins: Arc<Mutex<P, Vec<Option<usize>>>>,
    /// The system's crew keeps its seat.
    _seat: Option<Arc<Seat<P>>>,
}

/// A crew of the system's queue, by platform, process and world: threads do not survive a fork, and each simulated world is a system of its own.
type Place = (TypeId, u32, u64);

/// The system's crew of one platform, while it has clients.
type Seat<P> = Mutex<P, Weak<Crew<P>>>;

/// The seats of the system's crews. Nothing is done under this lock but to find one: who attaches may wait for another at the seat, where the platform can tell.
static SYSTEM: StdMutex<Vec<(Place, Arc<dyn Any + Send + Sync>)>> = StdMutex::new(Vec::new());

/// Where `P` has its system's crew in this process.
fn seat<P: Platform>() -> Arc<Seat<P>> {
    let place = (TypeId::of::<P>(), std::process::id(), P::world());
    let mut seats = SYSTEM.lock().unwrap_or_else(PoisonError::into_inner);
    // A world that has ended asks no more.
    seats.retain(|(there, seat)| there.2 == 0 || *there == place || Arc::strong_count(seat) > 1);
    let found = seats.iter().find(|(there, _)| *there == place).map(|(_, seat)| Arc::clone(seat));
    if let Some(seat) = found.and_then(|seat| seat.downcast().ok()) {
        return seat;
    }
    let seat = Arc::new(Seat::<P>::new(Weak::new()));
    seats.push((place, seat.clone()));
    seat
}

impl<P: Platform> Crew<P> {
    fn start(
        name: &str,
        only: Option<Arc<Client<P>>>,
        workers: usize,
        cpus: &[usize],
        seat: Option<Arc<Seat<P>>>,
    ) -> io::Result<Arc<Self>> {
        let pins = Arc::new(Mutex::<P, _>::new(pins(0..workers, cpus)));
        let told = pins.clone();
        let queue = WorkQueue::served(name, workers, move |index| {
            let worker = Worker { own: only.is_some(), desks: RefCell::default() };
            // Somebody waits for the worker to be ready: that it will not be is told, not thrown.
            let ready = panic::catch_unwind(AssertUnwindSafe(|| {
                let cpu = told.lock().get(index).copied().flatten();
                // Tested at the attach: a CPU that has gone since costs the binding, not the worker. One that is not bound does not inherit
                // where the thread is bound that happened to start it, which may be another VM's.
                let _ = cpu.map_or_else(P::unpin, P::pin);
                only.as_ref().is_none_or(|client| worker.desk_of(client).is_some())
            }));
            if let Some(client) = &only
                && !matches!(ready, Ok(true))
            {
                client.note_failed(if ready.is_ok() { "its MMU has gone" } else { "it panicked" });
            }
            worker
        })?;
        Ok(Arc::new(Self { queue, pins, _seat: seat }))
    }

    /// The system's crew, with as many workers as any of its clients asked for. Those that an earlier client had bound stay bound.
    fn of_system(workers: usize, cpus: &[usize]) -> io::Result<Arc<Self>> {
        let seat = seat::<P>();
        let mut seated = seat.lock();
        if let Some(crew) = seated.upgrade() {
            {
                let mut all = crew.pins.lock();
                let have = all.len();
                all.extend(pins(have..workers.max(have), cpus));
            }
            crew.queue.grow(workers)?;
            return Ok(crew);
        }
        let crew = Self::start("system_unbound_wq", None, workers, cpus, Some(seat.clone()))?;
        *seated = Arc::downgrade(&crew);
        Ok(crew)
    }
}

fn pins(workers: std::ops::Range<usize>, cpus: &[usize]) -> Vec<Option<usize>> {
    workers.map(|n| (!cpus.is_empty()).then(|| cpus[n % cpus.len()])).collect()
}

/// One VM's account with a crew.
struct Client<P: Platform> {
    id: u64,
    mmu: Weak<TdpMmu<P>>,
    work: Work<P>,
    left: AtomicBool,
    delay_ns: Mutex<P, Histogram>,
    /// One request for reports at a time.
    asking: Mutex<P, ()>,
    asked: Mutex<P, Asked>,
    /// Changes, under the lock of `asked`, with each worker that is ready or has answered: who waits for that sleeps on it.
    answered: AtomicU32,
}

#[derive(Default)]
struct Asked {
    /// Workers that have a task for this VM.
    desks: usize,
    /// Why a worker will never have one.
    failed: Option<&'static str>,
    /// The number of the last request.
    round: u64,
    /// Workers that have not answered it yet.
    missing: usize,
    reports: Vec<WorkerReport>,
}

impl<P: Platform> Client<P> {
    fn new(mmu: Weak<TdpMmu<P>>, work: Work<P>) -> Arc<Self> {
        // 0 is the owner of items that nobody owns.
        static NEXT: AtomicU64 = AtomicU64::new(1);
        Arc::new(Self {
            id: NEXT.fetch_add(1, Ordering::Relaxed),
            mmu,
            work,
            left: AtomicBool::new(false),
            delay_ns: Mutex::new(Histogram::new()),
            asking: Mutex::new(()),
            asked: Mutex::new(Asked::default()),
            answered: AtomicU32::new(0),
        })
    }

    /// Waits until `done`; returns with the lock held under which that was so.
    fn wait_until(&self, done: impl Fn(&Asked) -> bool) -> MutexGuard<'_, P, Asked> {
        loop {
            let asked = self.asked.lock();
            if done(&asked) {
                return asked;
            }
            let seen = self.answered.load(Ordering::Acquire);
            drop(asked);
            P::futex_wait(&self.answered, seen, None);
        }
    }

    /// What [`Client::wait_until`] waits for has changed.
    fn tell(&self, asked: MutexGuard<'_, P, Asked>) {
        self.answered.fetch_add(1, Ordering::Release);
        drop(asked);
        P::futex_wake(&self.answered, u32::MAX);
    }

    /// A worker that starts will never have a task for this VM.
    fn note_failed(&self, why: &'static str) {
        let mut asked = self.asked.lock();
        asked.failed = Some(why);
        self.tell(asked);
    }

    fn await_tasks(&self, workers: usize) -> io::Result<()> {
        let asked = self.wait_until(|asked| asked.failed.is_some() || asked.desks >= workers);
        match asked.failed {
            Some(why) => Err(io::Error::other(format!("a zap worker ended as it started: {why}"))),
            None => Ok(()),
        }
    }

    fn reports(&self, nudge: impl FnOnce()) -> Vec<WorkerReport> {
        let _turn = self.asking.lock();
        {
            let mut asked = self.asked.lock();
            asked.round += 1;
            asked.missing = asked.desks;
        }
        nudge();
        let mut reports = std::mem::take(&mut self.wait_until(|asked| asked.missing == 0).reports);
        reports.sort_by(|a, b| a.name.cmp(&b.name));
        reports
    }
}

/// A worker's thread; `own`: it serves one VM only.
struct Worker<P: Platform> {
    own: bool,
    desks: RefCell<Vec<Desk<P>>>,
}

/// A worker's task for one VM.
struct Desk<P: Platform> {
    client: Arc<Client<P>>,
    task: Task<P>,
    /// CPU time of its items since the last report; looking for work is none of it.
    cpu_ns: Cell<u64>,
    answered: Cell<u64>,
}

impl<P: Platform> Worker<P> {
    /// This worker's task for `client`, made at the first meeting; `None` when the MMU has gone.
    fn desk_of(&self, client: &Arc<Client<P>>) -> Option<usize> {
        let mut desks = self.desks.borrow_mut();
        if let Some(at) = desks.iter().position(|desk| desk.client.id == client.id) {
            return Some(at);
        }
        let task = client.mmu.upgrade()?.task("zap-worker", Role::Worker);
        let mut asked = client.asked.lock();
        asked.desks += 1;
        let answered = Cell::new(asked.round);
        client.tell(asked);
        desks.push(Desk { client: client.clone(), task, cpu_ns: Cell::new(0), answered });
        Some(desks.len() - 1)
    }
}

impl<P: Platform> Worker<P> {
    fn serve(&self, mmu: &TdpMmu<P>, item: &Item<P>) {
        let _duty = Duty { mmu, user: item.user };
        let Some(at) = self.desk_of(&item.client) else { return };
        let desk = &self.desks.borrow()[at];
        let waited_ns = P::ticks_to_ns(P::ticks().saturating_sub(item.queued));
        let tell = |event: Event| {
            if let Some(observer) = mmu.observer() {
                observer.event(desk.task.id(), &event);
            }
        };
        tell(Event::WorkBegin { root: item.what, waited_ns });
        if P::inject(Fault::WorkerPanic, Site::QueueRun) {
            panic::panic_any(InjectedPanic);
        }
        let begin = P::thread_cpu_ns();
        if P::bug(Bug::B23) {
            mmu.pool().meta(item.what).clear(TableFlag::Scheduled);
        }
        (item.client.work)(mmu, &desk.task, item.what);
        desk.cpu_ns.set(desk.cpu_ns.get() + P::thread_cpu_ns().saturating_sub(begin));
        tell(Event::WorkEnd { root: item.what });
    }
}

impl<P: Platform> Serve<Item<P>> for Worker<P> {
    fn run(&self, item: &Item<P>) {
        let client = &item.client;
        let delay = P::ticks_to_ns(P::ticks().saturating_sub(item.queued));
        client.delay_ns.lock().record(delay);
        // A VM is drained before it goes away: while there is work, it is there. One that was only dropped leaves nothing to do.
        let Some(mmu) = client.mmu.upgrade() else { return };
        if self.own {
            return self.serve(&mmu, item);
        }
        // The queue would rethrow a panic where the last of its VMs ends: a stranger's. This VM has been told.
        let _ = panic::catch_unwind(AssertUnwindSafe(|| self.serve(&mmu, item)));
    }

    fn between(&self) {
        let mut desks = self.desks.borrow_mut();
        desks.iter().for_each(|desk| desk.answer(desk.client.asked.lock()));
        if !self.own {
            // The memory of a VM that has left does not wait for the next item.
            desks.retain(|desk| !desk.client.left.load(Ordering::Acquire));
        }
    }
}

impl<P: Platform> Desk<P> {
    /// Hands over what was measured, if somebody has asked since the last time.
    fn answer(&self, mut asked: MutexGuard<'_, P, Asked>) {
        if self.write_report(&mut asked) {
            self.client.tell(asked);
        }
    }

    /// False: nobody has asked.
    fn write_report(&self, asked: &mut Asked) -> bool {
        if asked.round == self.answered.get() {
            return false;
        }
        self.answered.set(asked.round);
        let cpu_ns = self.cpu_ns.take();
        let name = self.task.name().to_owned();
        asked.reports.push(WorkerReport { name, meter: self.task.meter().take(), cpu_ns });
        asked.missing = asked.missing.saturating_sub(1);
        true
    }
}

impl<P: Platform> Drop for Desk<P> {
    fn drop(&mut self) {
        // In one hold: who asks in between would wait for an answer that never comes.
        let mut asked = self.client.asked.lock();
        asked.desks -= 1;
        self.answer(asked);
    }
}
