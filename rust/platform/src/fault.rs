//! Faults that a run can be given: what the host, the hardware or bad luck may do to an engine that is right.
//!
//! **Guarantee.** On [`crate::Real`] no fault exists: [`crate::Platform::inject`] is an inlined `false` there, and what stands behind it is compiled out.
//!
//! **Mechanism.** The engine asks `P::inject(Fault::Alloc, site)` where the thing could go wrong and then lets it go wrong. Whether it does is up to a
//! plan ([`Faults`]); what a plan leaves to chance it draws from the dice of the schedule, so that a run replays, and each fault that struck stands in the
//! printed schedule, so that those that do not matter can be left out of it.

use crate::site::Site;

macro_rules! faults {
    ($($(#[$doc:meta])* $name:ident = $id:literal),+ $(,)?) => {
        /// Something that may go wrong.
        #[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
        #[repr(u8)]
        pub enum Fault { $($(#[$doc])* $name),+ }

        impl Fault {
            /// Every fault, in the order of the discriminants.
            pub const ALL: &'static [Fault] = &[$(Fault::$name),+];

            /// Its name in fault plans.
            pub const fn name(self) -> &'static str {
                match self { $(Fault::$name => $id),+ }
            }
        }
    };
}

faults! {
    /// An allocation of a table page fails.
    Alloc = "alloc",
    /// A compare-exchange fails although the word holds what was expected.
    Cmpxchg = "cmpxchg",
    /// A flush takes effect late.
    FlushDelay = "flush-delay",
    /// A flush is done together with a later one.
    FlushMerge = "flush-merge",
    /// A TLB is emptied without need.
    FlushExtra = "flush-extra",
    /// A grace period takes so many steps of others more.
    GraceDelay = "gp-delay",
    /// A worker stands still for so many steps of others before it runs an item.
    WorkerStall = "worker-stall",
    /// A work item panics.
    WorkerPanic = "worker-panic",
    /// A worker's thread ends before it runs an item.
    WorkerDie = "worker-die",
    /// A vCPU loses its CPU for so many steps of others.
    VcpuPause = "vcpu-pause",
    /// A walk yields at a check.
    Yield = "yield",
    /// The task is not chosen for so many steps of others; `u32::MAX`: until nobody else can go on.
    Pause = "pause",
}

/// Says which faults strike. Asked in the order of the run, so that a plan may count.
pub trait Faults: Send + Sync {
    /// 0: the fault does not strike. Else it does, for so long where it is one that lasts.
    ///
    /// `nth` counts the questions about this fault in this run, from 0; `dice(n)` draws from `0..n` and belongs to the schedule.
    fn inject(&self, fault: Fault, site: Site, nth: u64, dice: &mut dyn FnMut(u32) -> u32) -> u32;
}

/// The payload of a panic that a plan asked for: `panic_any(InjectedPanic)`. A simulated run goes on after it if somebody catches it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct InjectedPanic;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn all_lists_each_fault_at_its_discriminant_under_a_name_of_its_own() {
        for (i, fault) in Fault::ALL.iter().enumerate() {
            assert_eq!(*fault as usize, i);
        }
        let mut names: Vec<_> = Fault::ALL.iter().map(|fault| fault.name()).collect();
        names.sort_unstable();
        names.dedup();
        assert_eq!(names.len(), Fault::ALL.len());
    }
}
