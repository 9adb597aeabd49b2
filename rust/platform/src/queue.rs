//! A queue of work and its workers.
//!
//! **Guarantee.** Items start in the order in which they were queued, each owner's for itself when some are held. [`WorkQueue::flush`] returns when
//! everything queued before the call has run to its end, whatever is queued meanwhile; [`WorkQueue::flush_for`] the same of one
//! owner's items, whatever others have in the queue. [`WorkQueue::shutdown`] runs what is queued, then ends the workers.
//!
//! **Mechanism.** Items are numbered as they are queued. What is not done is the queue, whose front has the smallest
//! number, and at most one item per worker; the smallest number of both is how far everything is done.
//!
//! **Fault injection.** [`WorkQueue::hold_for`] keeps one owner's items from being started: a worker that is late, without a clock in the test. On a platform with faults a worker may stand still before it
//! begins an item, or its thread may end there: the item goes back to the front, and whoever queues, flushes or shuts down next starts the worker anew (in Linux: the pool's manager, and the rescuer).

use std::{
    any::Any,
    collections::VecDeque,
    io,
    panic::{self, AssertUnwindSafe},
    sync::{
        Arc,
        atomic::{AtomicU32, AtomicU64, Ordering},
    },
    thread,
};

use crate::{
    api::{JoinHandle, Platform},
    fault::Fault,
    histogram::Histogram,
    mutex::Mutex,
    site::Site,
};

/// A worker: made by its own thread, which then calls it.
pub trait Serve<T> {
    /// Runs an item.
    fn run(&self, item: &T);
    /// Called after each item, before each sleep, and soon after each [`WorkQueue::nudge`].
    fn between(&self) {}
}

struct Closure<C, R> {
    context: C,
    run: Arc<R>,
}

impl<C, T, R: Fn(&C, &T)> Serve<T> for Closure<C, R> {
    fn run(&self, item: &T) {
        (self.run)(&self.context, item);
    }
}

type Body<P, T> = Arc<dyn Fn(&Shared<P, T>, usize) + Send + Sync>;

/// A first-in first-out queue served by worker threads.
pub struct WorkQueue<P: Platform, T: Send + 'static> {
    name: String,
    shared: Arc<Shared<P, T>>,
    body: Body<P, T>,
    threads: Mutex<P, Vec<JoinHandle>>,
}

struct Shared<P: Platform, T> {
    state: Mutex<P, State<T>>,
    /// Changes with each item queued, each nudge and the shutdown: idle workers sleep on it.
    work: AtomicU32,
    /// Changes with each item done: flushers sleep on it.
    done: AtomicU32,
    /// Items that found a worker asleep.
    wakes: AtomicU64,
}

struct Item<T> {
    number: u64,
    owner: u64,
    queued: u64,
    what: T,
}

struct State<T> {
    items: VecDeque<Item<T>>,
    next: u64,
    /// What each worker is at: number and owner.
    running: Vec<Option<(u64, u64)>>,
    /// Owners whose items are held back.
    held: Vec<u64>,
    /// Workers whose threads have ended before their time.
    dead: Vec<usize>,
    idle: u32,
    flushers: u32,
    stopping: bool,
    delay_ns: Histogram,
    panic: Option<Box<dyn Any + Send>>,
}

impl<T> State<T> {
    /// Every item with a smaller number is done, of one owner or of all.
    fn done_below(&self, owner: Option<u64>) -> u64 {
        let counts = |of: u64| owner.is_none_or(|owner| owner == of);
        let queued = self.items.iter().find(|item| counts(item.owner)).map(|item| item.number);
        let running = self.running.iter().flatten().filter(|(_, of)| counts(*of)).map(|(number, _)| *number);
        running.chain(queued).min().unwrap_or(self.next)
    }

    fn take(&mut self) -> Option<Item<T>> {
        if self.held.is_empty() {
            return self.items.pop_front();
        }
        let free = self.items.iter().position(|item| !self.held.contains(&item.owner))?;
        self.items.remove(free)
    }
}

impl<P: Platform, T: Send + 'static> WorkQueue<P, T> {
    /// A queue whose `workers` threads call `run` on each item. Errors: a thread could not be started (those
    /// started before have ended again), or `workers` is 0.
    pub fn new(name: &str, workers: usize, run: impl Fn(&T) + Send + Sync + 'static) -> io::Result<Self> {
        Self::with_context(name, workers, |_| (), move |(), item| run(item))
    }

    /// Like [`WorkQueue::new`]; each worker first makes a context of its own with `init` (a [`crate::Task`], which
    /// must be made by its thread) and passes it to each `run`. `init` gets the worker's index.
    pub fn with_context<C: 'static>(
        name: &str,
        workers: usize,
        init: impl Fn(usize) -> C + Send + Sync + 'static,
        run: impl Fn(&C, &T) + Send + Sync + 'static,
    ) -> io::Result<Self> {
        let run = Arc::new(run);
        Self::served(name, workers, move |index| Closure { context: init(index), run: run.clone() })
    }

    /// Like [`WorkQueue::new`], with workers that `init` makes, each in its own thread, from its index.
    pub fn served<S: Serve<T> + 'static>(
        name: &str,
        workers: usize,
        init: impl Fn(usize) -> S + Send + Sync + 'static,
    ) -> io::Result<Self> {
        if workers == 0 {
            let message = format!("work queue {name:?}: 0 workers would never run anything");
            return Err(io::Error::new(io::ErrorKind::InvalidInput, message));
        }
        let shared = Arc::new(Shared {
            state: Mutex::new(State {
                items: VecDeque::new(),
                next: 0,
                running: Vec::new(),
                held: Vec::new(),
                dead: Vec::new(),
                idle: 0,
                flushers: 0,
                stopping: false,
                delay_ns: Histogram::new(),
                panic: None,
            }),
            work: AtomicU32::new(0),
            done: AtomicU32::new(0),
            wakes: AtomicU64::new(0),
        });
        let body: Body<P, T> = Arc::new(move |shared, index| shared.serve(index, &init(index)));
        let queue = WorkQueue { name: name.to_owned(), shared, body, threads: Mutex::new(Vec::new()) };
        // On an error the queue is dropped, which ends the workers there are.
        queue.grow(workers)?;
        Ok(queue)
    }

    /// Starts workers until there are `workers`; nothing after a shutdown. Errors: a thread could not be started (those
    /// started before stay).
    pub fn grow(&self, workers: usize) -> io::Result<()> {
        let mut threads = self.threads.lock();
        loop {
            let index = {
                let mut state = self.shared.state.lock();
                if state.stopping || state.running.len() >= workers {
                    return Ok(());
                }
                state.running.push(None);
                state.running.len() - 1
            };
            match self.start(index) {
                Ok(handle) => threads.push(handle),
                Err(error) => {
                    self.shared.state.lock().running.pop();
                    return Err(error);
                }
            }
        }
    }

    fn start(&self, index: usize) -> io::Result<JoinHandle> {
        let (shared, body) = (self.shared.clone(), self.body.clone());
        let work = move || {
            P::background();
            P::set_serving(Arc::as_ptr(&shared).addr());
            body(&shared, index);
        };
        P::spawn(&format!("{}/{index}", self.name), Box::new(work))
    }

    /// Starts those workers anew whose threads have ended. A host that refuses a thread is asked again by the next who comes.
    #[cold]
    fn revive(&self) {
        let mut threads = self.threads.lock();
        loop {
            let Some(index) = self.shared.state.lock().dead.pop() else { return };
            match self.start(index) {
                Ok(handle) => threads.push(handle),
                Err(_) => {
                    self.shared.state.lock().dead.push(index);
                    P::yield_cpu(Site::QueueWork);
                    return;
                }
            }
        }
    }

    /// Workers started so far.
    pub fn workers(&self) -> usize {
        self.shared.state.lock().running.len()
    }

    /// Queues an item of owner 0. After `shutdown` it is run by nobody and dropped; returns whether it was queued.
    pub fn queue(&self, item: T) -> bool {
        self.queue_for(0, item)
    }

    /// Queues an item of `owner`, as [`WorkQueue::queue`] does.
    pub fn queue_for(&self, owner: u64, item: T) -> bool {
        P::point(Site::QueueWork);
        let mut state = self.shared.state.lock();
        if state.stopping {
            return false;
        }
        let number = state.next;
        state.next += 1;
        state.items.push_back(Item { number, owner, queued: P::ticks(), what: item });
        self.shared.work.fetch_add(1, Ordering::Release);
        let (idle, dead) = (state.idle > 0, !state.dead.is_empty());
        drop(state);
        if dead {
            self.revive();
        }
        if idle {
            self.shared.wakes.fetch_add(1, Ordering::Relaxed);
            P::futex_wake(&self.shared.work, 1);
        }
        true
    }

    /// Items so far whose queueing woke a worker, and cost the one who queued it that much more.
    pub fn wakes(&self) -> u64 {
        self.shared.wakes.load(Ordering::Relaxed)
    }

    /// Waits until everything queued so far has run. Not from a worker: it would wait for itself.
    pub fn flush(&self) {
        self.flush_owner(None);
    }

    /// Waits until everything that `owner` has queued so far has run. Not from a worker.
    pub fn flush_for(&self, owner: u64) {
        self.flush_owner(Some(owner));
    }

    fn flush_owner(&self, owner: Option<u64>) {
        P::point(Site::QueueFlush);
        let shared = &*self.shared;
        let mut state = shared.state.lock();
        let target = state.next;
        while state.done_below(owner) < target {
            if !state.dead.is_empty() {
                drop(state);
                self.revive();
                state = shared.state.lock();
                continue;
            }
            state.flushers += 1;
            let seen = shared.done.load(Ordering::Acquire);
            drop(state);
            P::futex_wait(&shared.done, seen, None);
            state = shared.state.lock();
            state.flushers -= 1;
        }
    }

    /// Keeps the items of `owner` from being started; what runs goes on. Ended by [`WorkQueue::release_for`] and by the shutdown.
    pub fn hold_for(&self, owner: u64) {
        let mut state = self.shared.state.lock();
        if !state.stopping {
            state.held.push(owner);
        }
    }

    /// Lets the items of `owner` be started again.
    pub fn release_for(&self, owner: u64) {
        self.shared.state.lock().held.retain(|held| *held != owner);
        self.nudge();
    }

    /// The items of `owner` are held back.
    pub fn is_held(&self, owner: u64) -> bool {
        self.shared.state.lock().held.contains(&owner)
    }

    /// Wakes every worker that sleeps, so that it calls [`Serve::between`].
    pub fn nudge(&self) {
        self.shared.work.fetch_add(1, Ordering::Release);
        P::futex_wake(&self.shared.work, u32::MAX);
    }

    /// Runs what is queued, held or not, then ends the workers; idempotent. A panic of `run` is rethrown here, once.
    /// Called by a worker of the queue itself it waits for nobody: the workers end when nothing is left.
    pub fn shutdown(&self) {
        let mut state = self.shared.state.lock();
        state.stopping = true;
        state.held.clear();
        drop(state);
        self.nudge();
        if P::serving() == Arc::as_ptr(&self.shared).addr() {
            return;
        }
        let mut payload = None;
        loop {
            for handle in self.threads.lock().drain(..) {
                payload = payload.or(handle.join().err());
            }
            if self.shared.state.lock().dead.is_empty() {
                break;
            }
            // One that died has left items behind, or might have.
            self.revive();
        }
        payload = self.shared.state.lock().panic.take().or(payload);
        if let Some(payload) = payload.filter(|_| !thread::panicking()) {
            panic::resume_unwind(payload);
        }
    }

    /// Items queued and not started.
    pub fn len(&self) -> usize {
        self.shared.state.lock().items.len()
    }

    /// Items of `owner` queued and not started.
    pub fn len_for(&self, owner: u64) -> usize {
        self.shared.state.lock().items.iter().filter(|item| item.owner == owner).count()
    }

    /// Nothing is queued; items may be running.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// From queued to started, in ns.
    pub fn queue_ns(&self) -> Histogram {
        self.shared.state.lock().delay_ns.clone()
    }
}

impl<P: Platform, T> Shared<P, T> {
    fn serve(&self, index: usize, worker: &impl Serve<T>) {
        let mut state = self.state.lock();
        loop {
            if let Some(Item { number, owner, queued, what }) = state.take() {
                state.running[index] = Some((number, owner));
                state.delay_ns.record(P::ticks_to_ns(P::ticks().saturating_sub(queued)));
                drop(state);
                P::point(Site::QueueRun);
                // As long as the fault says, but not for ever: a flush waits.
                for _ in 0..P::inject_for(Fault::WorkerStall, Site::QueueRun).min(STALL_STEPS) {
                    P::yield_cpu(Site::QueueRun);
                }
                if P::inject(Fault::WorkerDie, Site::QueueRun) {
                    return self.dies(index, Item { number, owner, queued, what });
                }
                // A panic must not leave a flush waiting for an item that will never be done.
                let result = panic::catch_unwind(AssertUnwindSafe(|| {
                    worker.run(&what);
                    drop(what);
                }));
                P::point(Site::QueueRun);
                state = self.state.lock();
                state.running[index] = None;
                if let Err(payload) = result {
                    state.panic.get_or_insert(payload);
                }
                self.done.fetch_add(1, Ordering::Release);
                let flushers = state.flushers > 0;
                drop(state);
                if flushers {
                    P::futex_wake(&self.done, u32::MAX);
                }
                worker.between();
                state = self.state.lock();
            } else if state.stopping {
                return;
            } else {
                let seen = self.work.load(Ordering::Acquire);
                drop(state);
                worker.between();
                let more = self.linger(seen);
                state = self.state.lock();
                if !more && self.work.load(Ordering::Relaxed) == seen {
                    // `idle` is set under the lock that a queueing task takes: it wakes us, or we see its item.
                    state.idle += 1;
                    drop(state);
                    P::futex_wait(&self.work, seen, None);
                    state = self.state.lock();
                    state.idle -= 1;
                }
            }
        }
    }

    /// The worker's thread ends with an item in its hands.
    #[cold]
    fn dies(&self, index: usize, item: Item<T>) {
        let mut state = self.state.lock();
        state.running[index] = None;
        state.items.push_front(item);
        state.dead.push(index);
        // A flusher that sleeps is to start another, a worker that sleeps is to take the item.
        self.done.fetch_add(1, Ordering::Release);
        self.work.fetch_add(1, Ordering::Release);
        drop(state);
        P::futex_wake(&self.done, u32::MAX);
        P::futex_wake(&self.work, 1);
    }

    /// Looks for more work for a while before sleeping: waking a sleeper costs the queueing task (a vCPU) far more than
    /// the word that it writes anyway. True: there is more.
    fn linger(&self, seen: u32) -> bool {
        if !P::SPINS {
            return false;
        }
        let until = P::ticks() + P::ns_to_ticks(LINGER_NS);
        while P::ticks() < until {
            if self.work.load(Ordering::Relaxed) != seen {
                return true;
            }
            P::relax(Site::QueueRun);
        }
        false
    }
}

/// How long a worker stands still at most that a fault makes stand still, in steps of others.
const STALL_STEPS: u32 = 1000;

/// How long an idle worker looks for more work before it sleeps: about the price of the wake-up that it saves.
const LINGER_NS: u64 = 50_000;

impl<P: Platform, T: Send + 'static> Drop for WorkQueue<P, T> {
    fn drop(&mut self) {
        self.shutdown();
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::atomic::{AtomicBool, AtomicU64};

    use super::*;
    use crate::real::Real;

    #[test]
    fn a_flush_waits_for_what_was_queued_before_and_for_nothing_else() {
        // Item n runs until gate n opens.
        let gates: Arc<[AtomicBool; 2]> = Arc::default();
        let ran = Arc::new(AtomicU64::new(0));
        let (gate, count) = (gates.clone(), ran.clone());
        let queue = WorkQueue::<Real, usize>::new("flush", 2, move |n| {
            while !gate[*n].load(Ordering::SeqCst) {
                thread::yield_now();
            }
            count.fetch_add(1, Ordering::SeqCst);
        })
        .unwrap();
        queue.queue(0);
        thread::scope(|s| {
            let flusher = s.spawn(|| {
                queue.flush();
                ran.load(Ordering::SeqCst)
            });
            while queue.shared.state.lock().flushers == 0 {
                thread::yield_now();
            }
            // Queued after the flush began: it may run for ever and does not matter.
            queue.queue(1);
            assert!(!flusher.is_finished());
            gates[0].store(true, Ordering::SeqCst);
            assert_eq!(flusher.join().unwrap(), 1);
        });
        gates[1].store(true, Ordering::SeqCst);
        queue.flush();
        assert_eq!(ran.load(Ordering::SeqCst), 2);
    }
}
