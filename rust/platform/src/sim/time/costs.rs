//! What an operation costs: data, measured on the real platform, never tuned to a prediction.
//!
//! Each field is one thing that a micro-run can measure by itself (`tdpmmu_lab::simulate::calibrate` does, and says from what). Times are nanoseconds; the clock counts
//! picoseconds, since the cheapest operations take half a nanosecond.

use crate::site::Site;

/// Virtual time: picoseconds.
pub type Ps = u64;

/// Nanoseconds to picoseconds; negative and absurd values are cut.
pub fn ps(ns: f64) -> Ps {
    (ns.clamp(0.0, 1e12) * 1000.0).round() as Ps
}

/// The prices of a machine, in nanoseconds.
#[derive(Clone, Debug, PartialEq)]
pub struct Costs {
    /// Reading one entry of many that follow each other.
    pub read: f64,
    /// Storing one such entry.
    pub write: f64,
    /// Exchanging one such entry, bookkeeping included: teardown of a dead table.
    pub swap: f64,
    /// Compare-exchange of one such entry, bookkeeping included, the read before it not: the 4 KiB pass.
    pub cmpxchg: f64,
    /// One step of an iterator over upper tables, its reschedule check included.
    pub step: f64,
    /// One level of a walk through tables that other walks have left in the caches.
    pub walk: f64,
    /// A locked instruction on a line that this CPU has.
    pub locked: f64,
    /// A load or store of such a line.
    pub word: f64,
    /// A line that another CPU has changed: until this one has it. Lines that many want are served one after the other.
    pub transfer: f64,
    /// A full fence.
    pub fence: f64,
    /// One turn of a spinning wait.
    pub relax: f64,
    /// A system call that does nothing: a futex that need not wait, or finds nobody to wake.
    pub syscall: f64,
    /// Waking a sleeper, to the one who wakes.
    pub wake: f64,
    /// From there until the sleeper runs, if a CPU is free.
    pub wake_latency: f64,
    /// Changing from one runnable task to another.
    pub switch: f64,
    /// How long a task runs before another runnable one gets its CPU.
    pub slice: f64,
    /// Asking for the thread's CPU time.
    pub cpu_clock: f64,
    /// Asking for the thread's context switches.
    pub switch_count: f64,
    /// Asking for the thread's time without a CPU: a file of the host's is read for it.
    pub run_delay: f64,
    /// Starting a thread, to the starter.
    pub spawn: f64,
    /// A waiter for mmu_lock spins so long before it sleeps.
    pub lock_spin: f64,
    /// An asymmetric barrier beside running readers.
    pub membarrier: f64,
    /// One table back from RCU into the pool.
    pub free: f64,
    /// A guest's access that the TLB answers, its look at the mode word included.
    pub access: f64,
    /// A slow fault without its words: memslot, host page, making the leaf.
    pub fault: f64,
    /// A new table linked by a fault: taken from the cache, cleared.
    pub table: f64,
    /// A root made or found, without its words.
    pub root: f64,
    /// A call into RCU for a read section, enter and leave together.
    pub section: f64,
}

impl Default for Costs {
    /// A machine of the class in `DESIGN.md` 6, in round figures: for tests. Predictions take calibrated ones.
    fn default() -> Self {
        Costs {
            read: 0.5,
            write: 0.9,
            swap: 6.5,
            cmpxchg: 7.5,
            step: 20.0,
            walk: 4.0,
            locked: 6.0,
            word: 0.5,
            transfer: 100.0,
            fence: 8.0,
            relax: 40.0,
            syscall: 150.0,
            wake: 1_500.0,
            wake_latency: 8_000.0,
            switch: 1_500.0,
            slice: 3_000_000.0,
            cpu_clock: 250.0,
            switch_count: 300.0,
            run_delay: 15_000.0,
            spawn: 20_000.0,
            lock_spin: 4_000.0,
            membarrier: 5_000.0,
            free: 10.0,
            access: 5.0,
            fault: 20.0,
            table: 150.0,
            root: 300.0,
            section: 1.0,
        }
    }
}

macro_rules! rows {
    ($($field:ident),+ $(,)?) => {
        impl Costs {
            /// Every price by name, in nanoseconds.
            pub fn rows(&self) -> Vec<(&'static str, f64)> {
                vec![$((stringify!($field), self.$field)),+]
            }

            /// The price called `name`, to be set.
            pub fn row_mut(&mut self, name: &str) -> Option<&mut f64> {
                match name {
                    $(stringify!($field) => Some(&mut self.$field),)+
                    _ => None,
                }
            }
        }
    };
}

rows!(
    read,
    write,
    swap,
    cmpxchg,
    step,
    walk,
    locked,
    word,
    transfer,
    fence,
    relax,
    syscall,
    wake,
    wake_latency,
    switch,
    slice,
    spawn,
    lock_spin,
    membarrier,
    free,
    fault,
    table,
    root,
    section,
);

/// How a word is touched.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub(super) enum Kind {
    Load,
    Store,
    Swap,
    Cmpxchg,
    Rmw,
    Point,
}

pub(super) const KINDS: usize = Kind::Point as usize + 1;
pub(super) const SITES: usize = Site::ALL.len();

/// Words of tables: there are billions, each touched by few; nobody keeps books about whose cache they are in.
pub(super) fn is_entry(site: Site) -> bool {
    matches!(
        site,
        Site::SpteRead
            | Site::SpteInstall
            | Site::SpteZap
            | Site::SpteFreeze
            | Site::SpteTeardown
            | Site::SptePublish
            | Site::SpteAd
            | Site::SpteFast
            | Site::SpteSplit
            | Site::SpteProtect
            | Site::WalkLockless
            | Site::TlbAccess
    )
}

/// Prices by kind and site, in picoseconds: what a point looks up. Of words that are no entries the price is what comes on top of the word itself.
pub(super) struct Prices(pub [[Ps; SITES]; KINDS]);

impl Prices {
    pub(super) fn new(costs: &Costs) -> Self {
        let mut prices = [[0; SITES]; KINDS];
        for &site in Site::ALL {
            let mut set = |kind: Kind, ns: f64| prices[kind as usize][site as usize] = ps(ns);
            if is_entry(site) {
                let load = match site {
                    Site::WalkLockless | Site::TlbAccess => costs.walk,
                    _ => costs.read,
                };
                set(Kind::Load, load);
                set(Kind::Store, costs.write);
                set(Kind::Swap, costs.swap);
                set(
                    Kind::Cmpxchg,
                    if site == Site::SptePublish { costs.cmpxchg + costs.table } else { costs.cmpxchg },
                );
                set(Kind::Rmw, costs.locked);
            }
            match site {
                // Once an access, and once a turn of a guest that idles.
                Site::VcpuMode => set(Kind::Load, costs.access),
                // Once a fault.
                Site::NotifierSeq => set(Kind::Load, costs.fault),
                Site::LockYield => set(Kind::Point, costs.step),
                Site::RootList | Site::RootInvalidate => set(Kind::Point, costs.root),
                Site::RootRef => set(Kind::Point, costs.locked),
                Site::Mutex => set(Kind::Point, costs.locked),
                Site::RcuEnter | Site::RcuLeave => set(Kind::Point, costs.section / 2.0),
                _ => {}
            }
        }
        Prices(prices)
    }
}
