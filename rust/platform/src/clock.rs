//! The clock: invariant TSC where the CPU has one, CLOCK_MONOTONIC_RAW where not.
//!
//! A tick is a cycle of the TSC or a nanosecond. Which one is decided once, by CPUID; the frequency is measured
//! against CLOCK_MONOTONIC_RAW on the first conversion, over at least [`CALIBRATION_NS`].

use std::{
    mem::MaybeUninit,
    sync::{
        OnceLock,
        atomic::{AtomicU8, Ordering},
    },
};

use crate::api::Switches;

const CALIBRATION_NS: u64 = 10_000_000;

const UNDECIDED: u8 = 0;
const TSC: u8 = 1;
const MONOTONIC: u8 = 2;

static SOURCE: AtomicU8 = AtomicU8::new(UNDECIDED);
static SCALE: OnceLock<Scale> = OnceLock::new();

/// What a tick is worth, as 32.32 fixed point in both directions.
#[derive(Clone, Copy, Debug)]
struct Scale {
    ns_per_tick: u64,
    ticks_per_ns: u64,
    hz: u64,
}

/// The source of ticks, for the record beside each result.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ClockInfo {
    /// `tsc` or `monotonic-raw`.
    pub source: &'static str,
    /// Ticks per second.
    pub hz: u64,
}

/// Which clock [`ticks`] reads and how fast it runs.
pub fn info() -> ClockInfo {
    let hz = scale().hz;
    let source = if SOURCE.load(Ordering::Relaxed) == TSC { "tsc" } else { "monotonic-raw" };
    ClockInfo { source, hz }
}

/// The clock's value now. Not serialising: a few instructions around it may move across.
#[inline(always)]
pub fn ticks() -> u64 {
    #[cfg(target_arch = "x86_64")]
    if SOURCE.load(Ordering::Relaxed) == TSC {
        return rdtsc();
    }
    ticks_slow()
}

#[cfg(target_arch = "x86_64")]
#[inline(always)]
fn rdtsc() -> u64 {
    // SAFETY: RDTSC has no memory effect; Linux leaves it enabled for user space unless a process asks otherwise.
    unsafe { core::arch::x86_64::_rdtsc() }
}

#[cold]
fn ticks_slow() -> u64 {
    if SOURCE.load(Ordering::Relaxed) == UNDECIDED {
        SOURCE.store(if tsc_is_invariant() { TSC } else { MONOTONIC }, Ordering::Relaxed);
        return ticks();
    }
    clock_ns(libc::CLOCK_MONOTONIC_RAW)
}

#[cfg(target_arch = "x86_64")]
fn tsc_is_invariant() -> bool {
    use core::arch::x86_64::__cpuid;
    const INVARIANT_TSC: u32 = 1 << 8;
    __cpuid(0x8000_0000).eax >= 0x8000_0007 && __cpuid(0x8000_0007).edx & INVARIANT_TSC != 0
}

#[cfg(not(target_arch = "x86_64"))]
fn tsc_is_invariant() -> bool {
    false
}

/// Ticks to nanoseconds. The first call may take [`CALIBRATION_NS`].
#[inline]
pub fn ticks_to_ns(ticks: u64) -> u64 {
    ((u128::from(ticks) * u128::from(scale().ns_per_tick)) >> 32) as u64
}

/// Nanoseconds to ticks, saturating. The first call may take [`CALIBRATION_NS`].
#[inline]
pub fn ns_to_ticks(ns: u64) -> u64 {
    u64::try_from((u128::from(ns) * u128::from(scale().ticks_per_ns)) >> 32).unwrap_or(u64::MAX)
}

#[inline]
fn scale() -> &'static Scale {
    SCALE.get_or_init(calibrate)
}

#[cold]
fn calibrate() -> Scale {
    let (ticks_a, ns_a) = sample();
    if SOURCE.load(Ordering::Relaxed) == MONOTONIC {
        return Scale { ns_per_tick: 1 << 32, ticks_per_ns: 1 << 32, hz: 1_000_000_000 };
    }
    std::thread::sleep(std::time::Duration::from_nanos(CALIBRATION_NS));
    let (ticks_b, ns_b) = sample();
    let dt = u128::from(ticks_b.saturating_sub(ticks_a).max(1));
    let dn = u128::from(ns_b.saturating_sub(ns_a).max(1));
    Scale {
        ns_per_tick: ((dn << 32) / dt) as u64,
        ticks_per_ns: ((dt << 32) / dn) as u64,
        hz: (dt * 1_000_000_000 / dn) as u64,
    }
}

/// A pair of readings taken close together: of several attempts the tightest, so that a preemption in between
/// does not enter the scale.
fn sample() -> (u64, u64) {
    let mut best = (u64::MAX, 0, 0);
    for _ in 0..16 {
        let before = ticks();
        let ns = clock_ns(libc::CLOCK_MONOTONIC_RAW);
        let after = ticks();
        let gap = after.saturating_sub(before);
        if gap < best.0 {
            best = (gap, before + gap / 2, ns);
        }
    }
    (best.1, best.2)
}

/// CPU time of the calling thread in nanoseconds.
pub fn thread_cpu_ns() -> u64 {
    clock_ns(libc::CLOCK_THREAD_CPUTIME_ID)
}

fn clock_ns(clock: libc::clockid_t) -> u64 {
    let mut now = MaybeUninit::<libc::timespec>::zeroed();
    // SAFETY: clock_gettime writes one timespec into `now`; an all-zero timespec is a valid value should it fail.
    let now = unsafe {
        libc::clock_gettime(clock, now.as_mut_ptr());
        now.assume_init()
    };
    now.tv_sec as u64 * 1_000_000_000 + now.tv_nsec as u64
}

/// Context switches of the calling thread.
pub fn switches() -> Switches {
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: getrusage writes one rusage into `usage`; an all-zero rusage is a valid value should it fail.
    let usage = unsafe {
        libc::getrusage(libc::RUSAGE_THREAD, usage.as_mut_ptr());
        usage.assume_init()
    };
    Switches { voluntary: usage.ru_nvcsw as u64, involuntary: usage.ru_nivcsw as u64 }
}

/// Time the calling thread has waited runnable for a CPU, in ns; `None` without schedstat.
pub fn run_delay_ns() -> Option<u64> {
    let text = std::fs::read_to_string("/proc/thread-self/schedstat").ok()?;
    text.split_ascii_whitespace().nth(1)?.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ticks_never_run_backwards_in_a_thread() {
        let mut last = ticks();
        for _ in 0..100_000 {
            let now = ticks();
            assert!(now >= last);
            last = now;
        }
    }

    #[test]
    fn conversion_round_trips_within_a_millionth() {
        for ns in [1_000u64, 1_000_000, 1_000_000_000, 3_600_000_000_000] {
            let back = ticks_to_ns(ns_to_ticks(ns));
            assert!(back.abs_diff(ns) <= 2 + ns / 1_000_000, "{ns} -> {back}");
        }
        assert_eq!(ns_to_ticks(0), 0);
    }

    #[test]
    fn thread_cpu_time_advances_with_work() {
        let start = thread_cpu_ns();
        while thread_cpu_ns() == start {
            std::hint::spin_loop();
        }
    }

    #[test]
    fn a_sleep_counts_as_a_voluntary_switch() {
        let before = switches();
        std::thread::sleep(std::time::Duration::from_millis(1));
        assert!(switches().voluntary > before.voluntary);
    }
}
