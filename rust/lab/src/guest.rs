//! A guest: open-loop accesses to a working set, and what they felt.
//!
//! Access i is *intended* at start + i * arrival; its latency runs from there, so one stall counts for every access it delays
//! (no coordinated omission). Only accesses intended inside the window are kept. It opens when the ioctl begins (t0 itself, the entry of
//! the fast zap, is known only afterwards) and closes with the last table freed; what counts from t0 is kept as raw ticks.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use tdpmmu_platform::{Histogram, Platform, Site, Task};
use tdpmmu_vm::request::{FREE_OBSOLETE_ROOTS, RELOAD};
use tdpmmu_vm::{AccessOutcome, GuestAccess, Vcpu, VcpuProbe};

use crate::LabError;

/// A vCPU toggles so often from one update to the next at most: a fast zap that takes every invalid root which it finds (`system-workqueue`) would not end
/// while roots are lost faster than it zaps, as under oracles they are.
const TOGGLES: u64 = 4;

/// The window of a measurement, in ticks, shared by all threads; 0: not yet.
#[derive(Debug, Default)]
pub struct Window {
    /// Entry of the request.
    pub t0: AtomicU64,
    /// The last table is free.
    pub end: AtomicU64,
    /// Updates that have returned.
    pub updates: AtomicU64,
}

/// What a vCPU felt.
#[derive(Clone, Debug, Default)]
pub struct Felt {
    /// Latency of accesses in the window, by outcome.
    pub access: Vec<Histogram>,
    /// Kick seen to guest entry.
    pub block_update: Histogram,
    /// When the first slow fault under a root loaded after t0 was completed, in ticks; in a design that keeps its roots, the first that began after t0.
    pub visible_at: Option<u64>,
    /// Slow faults in the window.
    pub faults_after: u64,
    /// When the last of them was completed, in ticks.
    pub last_fault_at: u64,
    /// Moves from CPU to CPU.
    pub migrations: u64,
    /// Times that it dropped its roots and loaded one again.
    pub toggles: u64,
}

struct Probe<P> {
    window: Arc<Window>,
    keeps_root: bool,
    felt: Arc<std::sync::Mutex<Felt>>,
    platform: std::marker::PhantomData<fn() -> P>,
}

impl<P: Platform> VcpuProbe for Probe<P> {
    fn reentered(&mut self, bits: u64, seen_at: u64, entered_at: u64) {
        let t0 = self.window.t0.load(Ordering::Acquire);
        if t0 != 0 && entered_at >= t0 && bits & (FREE_OBSOLETE_ROOTS | RELOAD) != 0 {
            let mut felt = self.felt.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
            felt.block_update.record(P::ticks_to_ns(entered_at.saturating_sub(seen_at)));
        }
    }

    fn slow_fault(&mut self, _root: u32, loaded_at: u64, began: u64, ended: u64) {
        let t0 = self.window.t0.load(Ordering::Acquire);
        if t0 == 0 || ended < t0 {
            return;
        }
        let mut felt = self.felt.lock().unwrap_or_else(std::sync::PoisonError::into_inner);
        felt.faults_after += 1;
        felt.last_fault_at = ended;
        let under_new = if self.keeps_root { began >= t0 } else { loaded_at >= t0 };
        if under_new && felt.visible_at.is_none() {
            felt.visible_at = Some(ended);
        }
    }
}

/// The pages that one vCPU touches: a stretch of guest memory.
#[derive(Clone, Copy, Debug)]
pub struct WorkingSet {
    /// First gfn.
    pub first: u64,
    /// Pages.
    pub pages: u64,
    /// Gfns between two pages.
    pub stride: u64,
}

impl WorkingSet {
    /// vCPU `id` of `vcpus` touches `pages` leaves of `stride` gfns each, in a guest of `gfns`.
    pub fn new(id: usize, vcpus: usize, pages: u64, stride: u64, gfns: u64) -> Self {
        let leaves = gfns / stride;
        let pages = pages.clamp(1, leaves);
        let slice = leaves / vcpus.max(1) as u64;
        let first = (id as u64 * slice).min(leaves - pages) * stride;
        Self { first, pages, stride }
    }

    fn gfn(&self, n: u64) -> u64 {
        self.first + (n % self.pages) * self.stride
    }
}

/// xorshift64*: cheap enough to vanish beside an access.
pub struct Random(u64);

impl Random {
    /// Any seed will do.
    pub fn new(seed: u64) -> Self {
        Self(seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1)
    }

    /// The next 64 bits.
    pub fn draw(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }
}

/// How a guest behaves.
#[derive(Clone, Debug)]
pub struct GuestPlan {
    /// What it writes.
    pub writes: WorkingSet,
    /// What it reads.
    pub reads: WorkingSet,
    /// Through the sets in order instead of at random.
    pub ascending: bool,
    /// Moves the vCPU to the next of its CPUs so often.
    pub migrate_ns: Option<u64>,
    /// Toggles CR0.WP so often.
    pub toggle_ns: Option<u64>,
    /// Halts for so long after each pass through the sets; accesses come as fast as they go.
    pub rest_ns: Option<u64>,
    /// ns between two intended starts.
    pub arrival_ns: u64,
    /// Writes of 100 accesses.
    pub write_percent: u8,
    /// The zap design leaves the vCPU its root.
    pub keeps_root: bool,
    /// Its seed.
    pub seed: u64,
}

/// Runs guest code on `vcpu` until `stop` says so; returns what it felt. `look` is called before a kick is answered and before each access.
///
/// # Errors
/// [`LabError::Internal`] when a fault fails for want of memory.
pub fn run<P: Platform>(
    vcpu: &mut Vcpu<'_, P>,
    plan: &GuestPlan,
    window: &Arc<Window>,
    stop: impl Fn() -> bool,
    mut look: impl FnMut(&Task<P>),
) -> Result<Felt, LabError> {
    let felt = Arc::new(std::sync::Mutex::new(Felt::default()));
    let probe = Probe::<P> {
        window: window.clone(),
        keeps_root: plan.keeps_root,
        felt: felt.clone(),
        platform: std::marker::PhantomData,
    };
    vcpu.set_probe(Some(Box::new(probe)));
    let mut access = vec![Histogram::new(); AccessOutcome::ALL.len()];
    let mut random = Random::new(plan.seed);
    let arrival = P::ns_to_ticks(plan.arrival_ns).max(1);
    let mut intended = P::ticks();
    let mut mover = plan.migrate_ns.map(Mover::<P>::new);
    let mut toggle = plan.toggle_ns.map(|every| (P::ns_to_ticks(every), intended));
    let (mut turn, mut toggles) = (0u64, 0);
    let fail = |e: tdpmmu_vm::VmError| LabError::Internal(format!("a vCPU's access failed: {e}"));
    'run: loop {
        match plan.rest_ns {
            None => intended += arrival,
            Some(rest) => {
                if turn != 0 && turn.is_multiple_of(plan.writes.pages) {
                    vcpu.halt(Some(rest));
                }
                intended = P::ticks();
            }
        }
        while P::ticks() < intended {
            look(vcpu.task());
            if stop() || !vcpu.poll().map_err(fail)? {
                break 'run;
            }
            P::idle_until(intended, Site::VcpuMode);
        }
        // A vCPU that is far behind still polls its stop flag.
        if stop() {
            break;
        }
        look(vcpu.task());
        if let Some(mover) = &mut mover {
            mover.due(vcpu)?;
        }
        if let Some((every, next)) = &mut toggle
            && toggles < TOGGLES * (window.updates.load(Ordering::Relaxed) + 1)
            && P::ticks() >= *next
        {
            vcpu.drop_root().map_err(fail)?;
            toggles += 1;
            *next = P::ticks() + *every;
        }
        let bits = random.draw();
        let write = (bits >> 56) % 100 < u64::from(plan.write_percent);
        let set = if write { &plan.writes } else { &plan.reads };
        let gfn = set.gfn(if plan.ascending { turn } else { bits & 0xff_ffff_ffff });
        turn += 1;
        let outcome = vcpu.access(GuestAccess { gfn, write, exec: false }).map_err(fail)?;
        if outcome == AccessOutcome::Stopped {
            break;
        }
        let t0 = window.t0.load(Ordering::Acquire);
        if t0 == 0 {
            continue;
        }
        let end = window.end.load(Ordering::Acquire);
        if intended >= t0 && (end == 0 || intended <= end) {
            access[outcome as usize].record(P::ticks_to_ns(P::ticks().saturating_sub(intended)));
        }
    }
    vcpu.leave();
    vcpu.set_probe(None);
    let mut felt = std::mem::take(&mut *felt.lock().unwrap_or_else(std::sync::PoisonError::into_inner));
    felt.access = access;
    felt.toggles = toggles;
    felt.migrations = mover.map_or(0, |mover| mover.moves);
    Ok(felt)
}

/// The host's scheduler, which moves a vCPU about.
struct Mover<P> {
    cpus: Vec<usize>,
    every: u64,
    next: u64,
    moves: u64,
    platform: std::marker::PhantomData<fn() -> P>,
}

impl<P: Platform> Mover<P> {
    fn new(every_ns: u64) -> Self {
        let every = P::ns_to_ticks(every_ns);
        let platform = std::marker::PhantomData;
        Self { cpus: P::cpus(), every, next: P::ticks() + every, moves: 0, platform }
    }

    /// Moves the vCPU if it is time. It leaves the guest for it, as being scheduled out makes it do.
    fn due(&mut self, vcpu: &mut Vcpu<'_, P>) -> Result<(), LabError> {
        let now = P::ticks();
        if now < self.next || self.cpus.is_empty() {
            return Ok(());
        }
        self.next = now + self.every;
        vcpu.leave();
        self.moves += 1;
        let cpu = self.cpus[(vcpu.id() + self.moves as usize) % self.cpus.len()];
        P::pin(cpu).map_err(|e| LabError::Internal(format!("moving a vCPU to CPU {cpu}: {e}")))
    }
}

/// What touching the whole working set took.
#[derive(Clone, Copy, Debug, Default)]
pub struct Touched {
    /// Accesses that faulted.
    pub faults: u64,
    /// When the first of them was completed, in ticks.
    pub first_at: Option<u64>,
    /// When the last of them was completed, in ticks.
    pub last_at: Option<u64>,
}

/// Touches each page once, as fast as it goes.
///
/// # Errors
/// As [`run`].
pub fn touch<P: Platform>(vcpu: &mut Vcpu<'_, P>, set: &WorkingSet) -> Result<Touched, LabError> {
    let mut touched = Touched::default();
    for n in 0..set.pages {
        let access = GuestAccess { gfn: set.gfn(n), write: true, exec: false };
        let outcome =
            vcpu.access(access).map_err(|e| LabError::Internal(format!("a vCPU's access failed: {e}")))?;
        if outcome >= AccessOutcome::FastFault && outcome < AccessOutcome::Stopped {
            let now = P::ticks();
            touched.faults += 1;
            touched.first_at.get_or_insert(now);
            touched.last_at = Some(now);
        }
    }
    vcpu.leave();
    Ok(touched)
}
