//! The runner: a scenario on a platform, the real one or that of virtual time.
//!
//! **Guarantee.** Every operation really happens, on threads of the platform. Measuring costs the measured threads nothing but clock reads at the ends of an operation. Whatever happens, also
//! cancellation and errors, every thread is joined and the VM closed, and what it left behind is part of the outcome.
//!
//! **Mechanism.** Threads are joined before the runner returns; each runs its ops in order. Flags are counters that threads sleep on: who waits takes no CPU from who is measured.
//! The first error raises the abort flag, which every wait and every guest loop tests.
//!
//! | file | idea |
//! | --- | --- |
//! | `setup.rs` | the VM, its memory, its population |
//! | `vcpu.rs` | what a vCPU's thread does |
//! | `caller.rs` | what a thread of the VMM does |
//! | `guest_os.rs` | a guest's own page tables |
//! | `retained.rs` | what obsolete shadow pages keep from others |
//! | `tree.rs` | what is mapped, in whichever MMU |
//! | `window.rs` | t0, the end of the teardown, the counters in between |
//! | `meanwhile.rs` | what a thread does and loses in the window of somebody else's request |
//! | `scoped.rs` | threads of a platform that borrow |
//! | `watch.rs` | progress, told from beside |

mod caller;
mod guest_os;
mod meanwhile;
mod retained;
mod scoped;
mod setup;
mod tree;
mod vcpu;
mod watch;
mod window;

use std::sync::atomic::{AtomicBool, AtomicU32, Ordering};
use std::sync::{Arc, OnceLock};

use tdpmmu_oracle::Judge;
use tdpmmu_platform::{MeterSnapshot, Observer, Phase, Platform, RcuDomain, Real, Role as TaskRole, Task};
use tdpmmu_spte::Role;
use tdpmmu_spte::geometry::page_bytes;
use tdpmmu_vm::{Vm, VmError};

use self::meanwhile::Meanwhile;
use self::setup::Regions;
use self::window::Collected;
use crate::attribution::Request;
use crate::guest::{Felt, Window};
use crate::outcome::{Outcome, ThreadReport};
use crate::scenario::{FLAGS, Flag, Op, Scenario, Who};
use crate::{Control, LabError};

pub(crate) use self::guest_os::build as build_guest;
pub(crate) use self::setup::MOST_COLLAPSED;
pub use self::setup::vm_config;

/// Who sleeps looks up so often whether the run was cancelled.
const NAP_NS: u64 = 20_000_000;

struct Shared<'a, P: Platform> {
    scenario: &'a Scenario,
    vm: &'a Vm<P>,
    control: &'a Control,
    abort: AtomicBool,
    flags: [AtomicU32; FLAGS],
    window: Arc<Window>,
    guests: usize,
    regions: OnceLock<Regions>,
    /// What a vCPU wants of its roots before anybody switches.
    base_role: OnceLock<Role>,
    collected: std::sync::Mutex<Collected>,
}

/// What a thread's measured operation cost it.
#[derive(Default)]
struct Paid {
    cpu_ns: u64,
    run_delay_ns: Option<u64>,
    switched_out: u64,
    meter: Option<MeterSnapshot>,
    request: Option<Request>,
}

/// What a thread brings through its ops.
#[derive(Default)]
struct Account {
    /// The request, if it is this thread's.
    paid: Paid,
    /// If it is somebody else's.
    meanwhile: Option<Meanwhile>,
}

impl Account {
    fn look<P: Platform>(&mut self, window: &Window, task: &Task<P>) {
        if let Some(meanwhile) = &mut self.meanwhile {
            meanwhile.look(window, task);
        }
    }
}

impl Paid {
    /// One more call of the request: its stamps, and its ticks by phase.
    fn add(&mut self, entered: u64, returned: u64, phase_ticks: &[u64; Phase::ALL.len()]) {
        self.request.get_or_insert_default().add(entered, returned, phase_ticks);
    }

    /// The time without a CPU since the host said `before` is part of the request.
    fn delayed<P: Platform>(&mut self, before: Option<u64>) {
        let delay = P::run_delay_ns().zip(before).map(|(now, then)| now.saturating_sub(then));
        self.run_delay_ns = delay.map(|delay| delay + self.run_delay_ns.unwrap_or(0));
    }
}

fn internal(what: &str) -> impl Fn(VmError) -> LabError + '_ {
    move |error| match error {
        VmError::Cancelled => LabError::Cancelled,
        VmError::Config { .. } => LabError::Usage(error.to_string()),
        error => LabError::Internal(format!("{what}: {error}")),
    }
}

/// Sleeps for as long, on the platform's clock.
fn sleep<P: Platform>(time: std::time::Duration) {
    let (nobody, until) = (AtomicU32::new(0), P::ticks() + P::ns_to_ticks(time.as_nanos() as u64));
    while P::ticks() < until {
        P::futex_wait(&nobody, 0, Some(P::ticks_to_ns(until - P::ticks().min(until)).max(1)));
    }
}

fn lock<T>(mutex: &std::sync::Mutex<T>) -> std::sync::MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
}

/// Runs `scenario` on the real platform; `judge` listens to everything.
///
/// # Errors
/// [`LabError`]; the VM is closed and all threads joined in any case.
pub fn run(scenario: &Scenario, control: &Control, judge: Option<Arc<Judge>>) -> Result<Outcome, LabError> {
    run_on::<Real>(scenario, control, judge)
}

/// Runs `scenario` on any platform.
///
/// # Errors
/// As [`run`].
pub fn run_on<P: Platform>(
    scenario: &Scenario,
    control: &Control,
    judge: Option<Arc<Judge>>,
) -> Result<Outcome, LabError> {
    let observer = judge.clone().map(|judge| judge as Arc<dyn Observer>);
    let mut config = vm_config(&scenario.vm, observer)?;
    // Where most tables are held by count, a huge page around each of the others would cost more than all of them.
    config.hugepages &= !P::BY_COUNT;
    let vm = Vm::<P>::new(config).map_err(internal("the VM"))?;
    let guests = scenario.threads.iter().filter(|t| t.ops.iter().any(|o| matches!(o, Op::Guest(_)))).count();
    let shared = Shared {
        scenario,
        vm: &vm,
        control,
        abort: AtomicBool::new(false),
        flags: Default::default(),
        window: Arc::default(),
        guests: guests.max(1),
        regions: OnceLock::new(),
        base_role: OnceLock::new(),
        collected: std::sync::Mutex::default(),
    };
    let result = P::quiet(|| shared.prepare()).and_then(|()| shared.sampled(|| shared.all_threads()));
    let queue = vm.mmu().design().queue_ns();
    if let Some(judge) = &judge {
        // A worker may still be at the roots that were lost last: their pages go to RCU after the barrier that the judge waits for.
        if let Some(queue) = vm.mmu().design().queue() {
            queue.flush();
        }
        let task = vm.task("judge", TaskRole::Observer);
        match shared.shadow() {
            None => judge.check_quiet(vm.mmu(), &task),
            Some(_) => judge.check_vm(&vm, &task),
        }
    }
    // The end of the VM is on the timeline only where it is what is measured.
    let recorded = || vm.mmu().rcu().timeline().map(|timeline| timeline.take());
    let timeline = scenario.pays.and_then(|_| recorded());
    let end = shared.close(result.is_ok())?;
    let books = shared.shadow_books();
    result?;
    if let Some(judge) = &judge {
        judge.finish(vm.mmu(), &vm.task("judge", TaskRole::Observer));
    }
    let mut collected = std::mem::take(&mut *lock(&shared.collected));
    let pool = vm.mmu().pool().stats();
    collected.threads.sort_by_key(|t| match t.who {
        Who::Caller => (0, 0),
        Who::Vcpu(id) => (1, id),
        Who::Other(n) => (2, n),
    });
    Ok(Outcome {
        to_ns: P::ticks_to_ns,
        by_count: vm.mmu().pool().by_count().map(|uniform| uniform.stats()),
        pays: scenario.pays,
        expected: scenario.sptes,
        t0: shared.window.t0.load(Ordering::Acquire),
        end: match shared.window.end.load(Ordering::Acquire) {
            0 => P::ticks(),
            end => end,
        },
        at_t0: collected.at_t0,
        tables_at_t0: collected.tables_at_t0,
        populate_ns: collected.populate_ns,
        prefault_ns: collected.prefault_ns,
        populated: collected.populated,
        update: collected.update,
        marks: collected.marks,
        last_zap_end_ns: collected.last_zap_end_ns,
        last_free_ns: collected.last_free_ns,
        tables_after: collected.tables_after,
        retained: collected.retained,
        threads: collected.threads,
        workers: collected.workers,
        queue,
        rcu: vm.mmu().rcu().stats(),
        rcu_cpu_ns: collected.rcu_cpu_ns,
        rcu_thread_ns: collected.rcu_thread_ns,
        timeline: timeline.or_else(recorded),
        flushes: collected.flushes,
        kicks: collected.kicks,
        refaults: collected.refaults,
        pool_peak: pool.peak,
        pool_cap_hits: pool.cap_hits,
        freed: collected.freed,
        written_back: collected.written_back,
        close: end.report,
        mapped_at_return: collected.mapped_at_return,
        stale_tables: collected.stale_tables,
        last: end.last,
        shadow: books,
    })
}

impl<P: Platform> Shared<'_, P> {
    fn stopped(&self) -> bool {
        self.abort.load(Ordering::Relaxed) || self.control.cancelled()
    }

    fn raise(&self, flag: Flag) {
        self.flags[flag as usize].fetch_add(1, Ordering::Release);
        P::futex_wake(&self.flags[flag as usize], u32::MAX);
    }

    fn raised(&self, flag: Flag) -> u32 {
        self.flags[flag as usize].load(Ordering::Acquire)
    }

    fn wait_for(&self, flag: Flag, count: u32) -> Result<(), LabError> {
        loop {
            let raised = self.raised(flag);
            if raised >= count {
                return Ok(());
            }
            if self.stopped() {
                return Err(LabError::Cancelled);
            }
            P::futex_wait(&self.flags[flag as usize], raised, Some(NAP_NS));
        }
    }

    /// The account of a thread that begins.
    fn account(&self, who: Who) -> Account {
        let meanwhile = (self.scenario.pays != Some(who)).then(Meanwhile::default);
        Account { meanwhile, ..Account::default() }
    }

    fn all_threads(&self) -> Result<(), LabError> {
        let jobs = self.scenario.threads.iter().map(|thread| {
            let name = match thread.who {
                Who::Vcpu(id) => format!("vcpu-{id}"),
                Who::Caller => "vmm".to_owned(),
                Who::Other(n) => format!("other-{n}"),
            };
            let own = name.clone();
            let job = move || {
                let done = match thread.who {
                    Who::Vcpu(id) => self.vcpu_thread(&own, id, &thread.ops),
                    who => self.vmm_thread(&own, who, &thread.ops),
                };
                if done.is_err() {
                    self.abort.store(true, Ordering::Relaxed);
                }
                done
            };
            (name, job)
        });
        let refused = || self.abort.store(true, Ordering::Relaxed);
        let results = scoped::all::<P, _>(jobs.collect(), refused).into_iter().map(|end| match end {
            Ok(Ok(done)) => done,
            Ok(Err(_)) => Err(LabError::Internal("a thread panicked".into())),
            Err(error) => Err(LabError::Internal(format!("the host refused a thread: {error}"))),
        });
        // An error explains more than the cancellations that it caused elsewhere.
        let mut cancelled = None;
        for result in results {
            match result {
                Ok(()) => {}
                Err(LabError::Cancelled) => cancelled = Some(LabError::Cancelled),
                Err(error) => return Err(error),
            }
        }
        cancelled.map_or(Ok(()), Err)
    }

    /// A thread has ended. One that had no part in the window is not reported: it was gone by then, or there was none.
    fn report(&self, name: &str, who: Who, task: &Task<P>, account: Account, felt: Felt) {
        let Account { mut paid, meanwhile } = account;
        let mut report = ThreadReport {
            name: name.to_owned(),
            who,
            // What came after the measured operation is not part of it.
            meter: paid.meter.take().unwrap_or_default(),
            covers: None,
            stamped_ticks: None,
            cpu_ns: paid.cpu_ns,
            op_cpu_ns: paid.cpu_ns,
            switched_out: paid.switched_out,
            felt,
            // Of the host's CPUs: a machine of virtual time has its own.
            cpu: if P::NAME == Real::NAME { current_cpu() } else { None },
            run_delay_ns: paid.run_delay_ns,
            request: paid.request.take(),
        };
        match meanwhile {
            None if report.request.is_none() => return,
            None => {}
            Some(mut meanwhile) => {
                let Some(stretch) = meanwhile.over(&self.window, task) else { return };
                report.meter = stretch.meter;
                report.covers = Some(stretch.covers);
                report.stamped_ticks = Some(stretch.stamped_ticks);
                report.cpu_ns = stretch.cpu_ns;
                report.run_delay_ns = stretch.run_delay_ns;
            }
        }
        lock(&self.collected).threads.push(report);
    }

    /// Guest memory in pages.
    fn pages(&self) -> u64 {
        self.scenario.vm.memory_bytes / page_bytes(1)
    }

    fn since_t0(&self, at: u64) -> u64 {
        P::ticks_to_ns(at.saturating_sub(self.window.t0.load(Ordering::Acquire)))
    }
}

fn current_cpu() -> Option<u32> {
    // SAFETY: no arguments, no memory touched.
    let cpu = unsafe { libc::sched_getcpu() };
    u32::try_from(cpu).ok()
}
