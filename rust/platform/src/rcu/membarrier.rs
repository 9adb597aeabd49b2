//! The asymmetric barrier: nothing for readers, an IPI for the reclaimer.
//!
//! # Semantics
//!
//! [`Asymmetric::light`] and [`Asymmetric::heavy`] are ordered against each other like SeqCst fences as long as one
//! of the two is heavy. Two light ones are not ordered.
//!
//! With [`Flavour::Membarrier`] the heavy side is `membarrier(PRIVATE_EXPEDITED)` (Linux 4.14 and later): the kernel
//! interrupts each CPU that runs a thread of this process, and each of them passes a full barrier between the call's
//! begin and its return. A thread that is not running passed one when it was switched out. The light side then is a
//! compiler barrier: program order is all that is needed, since the hardware's order is cut at that point.
//! With [`Flavour::Fence`] both sides are SeqCst fences.

use std::{
    io,
    sync::{
        OnceLock,
        atomic::{Ordering, compiler_fence, fence},
    },
};

use super::epoch::Barrier;

/// Which barrier a domain uses.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum Flavour {
    /// `membarrier(2)`, private expedited.
    Membarrier,
    /// SeqCst fences on both sides.
    Fence,
}

impl Flavour {
    /// `membarrier` or `fence`.
    pub const fn name(self) -> &'static str {
        match self {
            Flavour::Membarrier => "membarrier",
            Flavour::Fence => "fence",
        }
    }

    /// The best flavour that this host offers; the environment's `TDPMMU_RCU=fence` forces the fallback.
    pub fn detect() -> Flavour {
        static DETECTED: OnceLock<Flavour> = OnceLock::new();
        *DETECTED.get_or_init(|| {
            let forced = std::env::var_os("TDPMMU_RCU").is_some_and(|v| v == "fence");
            if !forced && register() { Flavour::Membarrier } else { Flavour::Fence }
        })
    }
}

// The commands of <linux/membarrier.h>, which libc does not carry.
const CMD_QUERY: libc::c_int = 0;
const CMD_PRIVATE_EXPEDITED: libc::c_int = 1 << 3;
const CMD_REGISTER_PRIVATE_EXPEDITED: libc::c_int = 1 << 4;

fn membarrier(command: libc::c_int) -> io::Result<libc::c_long> {
    // SAFETY: membarrier takes integers only and touches no memory of ours.
    let result = unsafe { libc::syscall(libc::SYS_membarrier, command, 0 as libc::c_uint, 0 as libc::c_int) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Asks whether the kernel knows the command, then registers this process for it.
fn register() -> bool {
    let wanted = libc::c_long::from(CMD_PRIVATE_EXPEDITED | CMD_REGISTER_PRIVATE_EXPEDITED);
    membarrier(CMD_QUERY).is_ok_and(|known| known & wanted == wanted)
        && membarrier(CMD_REGISTER_PRIVATE_EXPEDITED).is_ok()
}

/// The barrier of the real platform.
#[derive(Debug)]
pub struct Asymmetric {
    fence: bool,
}

impl Asymmetric {
    /// The wished flavour, or the detected one; a wish for membarrier on a host without it gives fences.
    pub fn new(wish: Option<Flavour>) -> Self {
        let fence = match wish {
            Some(Flavour::Fence) => true,
            Some(Flavour::Membarrier) => !register(),
            None => Flavour::detect() == Flavour::Fence,
        };
        Asymmetric { fence }
    }

    /// The flavour in use.
    pub fn flavour(&self) -> Flavour {
        if self.fence { Flavour::Fence } else { Flavour::Membarrier }
    }

    #[cold]
    fn membarrier_or_die() {
        if membarrier(CMD_PRIVATE_EXPEDITED).is_ok() {
            return;
        }
        // A forked child has lost the registration of its parent.
        if register() && membarrier(CMD_PRIVATE_EXPEDITED).is_ok() {
            return;
        }
        // The readers rely on it: to go on would be a use after free.
        panic!("membarrier worked at registration and fails now: {}", io::Error::last_os_error());
    }
}

impl Barrier for Asymmetric {
    #[inline(always)]
    fn light(&self) {
        if self.fence {
            fence(Ordering::SeqCst);
        } else {
            compiler_fence(Ordering::SeqCst);
        }
    }

    fn is_quick(&self) -> bool {
        !self.fence
    }

    #[inline(always)]
    fn light_if_quick(&self) {
        compiler_fence(Ordering::SeqCst);
    }

    fn heavy(&self) {
        fence(Ordering::SeqCst);
        if !self.fence {
            Self::membarrier_or_die();
        }
    }
}

#[cfg(all(test, not(loom)))]
mod tests {
    use std::sync::{
        Arc,
        atomic::{AtomicBool, AtomicU64},
    };

    use super::*;
    use crate::rcu::epoch::Epoch;

    /// The light side without a heavy one.
    struct LightOnly;

    impl Barrier for LightOnly {
        fn light(&self) {
            compiler_fence(Ordering::SeqCst);
        }
        fn heavy(&self) {}
        fn is_quick(&self) -> bool {
            true
        }
        fn light_if_quick(&self) {
            compiler_fence(Ordering::SeqCst);
        }
    }

    /// Store buffering on the real CPU: how often a reader inside a section saw the link while the scan that followed
    /// the cut did not see the section.
    fn forbidden_outcomes<B: Barrier + 'static>(barrier: B, rounds: u64) -> u64 {
        let epoch = Arc::new(Epoch::new(barrier));
        let handle = Epoch::register(&epoch, "reader");
        let (go, polled, left) = (AtomicU64::new(0), AtomicU64::new(0), AtomicU64::new(0));
        let (link, saw) = (AtomicU64::new(1), AtomicBool::new(false));
        let await_round = |word: &AtomicU64, round: u64| {
            let mut spins = 0u32;
            while word.load(Ordering::Acquire) < round {
                spins += 1;
                if spins.is_multiple_of(1_000) { std::thread::yield_now() } else { std::hint::spin_loop() }
            }
        };
        let mut forbidden = 0;
        std::thread::scope(|s| {
            let (go, polled, left, link, saw) = (&go, &polled, &left, &link, &saw);
            s.spawn(move || {
                for round in 1..=rounds {
                    await_round(go, round);
                    let section = handle.try_enter();
                    if section.is_none() {
                        handle.enter();
                    }
                    saw.store(link.load(Ordering::Relaxed) == 1, Ordering::Relaxed);
                    await_round(polled, round);
                    if !section.is_some_and(|q| q.try_leave()) {
                        handle.leave();
                    }
                    left.store(round, Ordering::Release);
                }
            });
            for round in 1..=rounds {
                link.store(1, Ordering::Relaxed);
                go.store(round, Ordering::Release);
                for _ in 0..round % 64 {
                    std::hint::spin_loop();
                }
                link.store(0, Ordering::Release);
                let over = epoch.is_over(epoch.begin(), |_| ());
                polled.store(round, Ordering::Release);
                await_round(left, round);
                forbidden += u64::from(over && saw.load(Ordering::Relaxed));
            }
        });
        forbidden
    }

    #[test]
    fn a_scan_never_misses_a_section_that_saw_the_link() {
        for flavour in [Flavour::Membarrier, Flavour::Fence] {
            assert_eq!(forbidden_outcomes(Asymmetric::new(Some(flavour)), 20_000), 0, "{flavour:?}");
        }
    }

    #[test]
    #[ignore = "canary: needs two free CPUs to show the reordering"]
    fn canary_without_membarrier_the_hardware_shows_the_reordering() {
        assert_ne!(forbidden_outcomes(LightOnly, 2_000_000), 0);
    }
}
