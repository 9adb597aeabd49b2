//! What a thread does and loses in the window of somebody else's request.
//!
//! **Guarantee.** The stretch is the window, from t0 to the end of the teardown, or as much of it as the thread lives; what it did before and after is no part of its
//! row. A thread that has ended before t0 has none.
//!
//! **Mechanism.** A thread looks at the window wherever it idles and between two accesses. At the first look after t0 its meter is split *at t0*: in the phase that it has
//! been in since before, or, if it was busy, at the last change of phase. The end is found in the same way. A vCPU to whom the host gave no CPU at t0 sees it late;
//! that lateness is waiting for a CPU.

use std::sync::atomic::Ordering;

use tdpmmu_platform::{MeterSnapshot, Phase, Platform, Task};

use crate::guest::Window;

const PHASES: usize = Phase::ALL.len();

/// Where a thread is in the window.
#[derive(Default)]
pub(super) struct Meanwhile {
    /// The thread's run delay when it began to run, for a thread that does not sleep.
    awake: Option<u64>,
    within: Option<Within>,
    over: Option<Stretch>,
}

struct Within {
    t0: u64,
    /// Where the first phase of the stretch begins: t0, but for a busy thread.
    from: u64,
    seen: u64,
    cpu_ns: u64,
    run_delay_ns: Option<u64>,
    late_ns: u64,
    /// The meter's sums at t0.
    before: [u64; PHASES],
}

/// What a thread did meanwhile.
pub(super) struct Stretch {
    pub(super) meter: MeterSnapshot,
    /// What the meter covers, in ticks.
    pub(super) covers: (u64, u64),
    /// How long that can have been by the clock of the window, in ticks: as much as `covers` says, within what the looks allow.
    pub(super) stamped_ticks: u64,
    pub(super) cpu_ns: u64,
    pub(super) run_delay_ns: Option<u64>,
}

/// Splits the meter at `at`: the ticks by phase before, and where the split is. The meter has been read up to `now`.
fn split<P: Platform>(task: &Task<P>, at: u64, now: u64) -> ([u64; PHASES], u64) {
    let before = task.meter().phase_ticks(at);
    let all = task.meter().phase_ticks(now);
    let since: u64 = all.iter().zip(&before).map(|(all, before)| all - before).sum();
    (before, now.saturating_sub(since))
}

impl Meanwhile {
    /// From here on the thread runs and does not sleep.
    pub(super) fn awake<P: Platform>(&mut self) {
        self.awake = P::run_delay_ns();
    }

    /// Looks at the window.
    #[inline]
    pub(super) fn look<P: Platform>(&mut self, window: &Window, task: &Task<P>) {
        match &self.within {
            None => {
                let t0 = window.t0.load(Ordering::Acquire);
                if t0 != 0 {
                    self.begin(task, t0);
                }
            }
            Some(_) if self.over.is_none() => {
                let end = window.end.load(Ordering::Acquire);
                if end != 0 {
                    self.end(task, end);
                }
            }
            Some(_) => {}
        }
    }

    #[cold]
    fn begin<P: Platform>(&mut self, task: &Task<P>, t0: u64) {
        // Only sums are read here: the vCPU is about to be kicked, and what a fresh set of histograms costs the kicker would wait for.
        let (before, from) = split(task, t0, P::ticks());
        let (run_delay_ns, cpu_ns, seen) = (P::run_delay_ns(), P::thread_cpu_ns(), P::ticks());
        let late_ns = match (self.awake, run_delay_ns) {
            (Some(awake), Some(now)) => {
                now.saturating_sub(awake).min(P::ticks_to_ns(seen.saturating_sub(t0)))
            }
            _ => 0,
        };
        self.within = Some(Within { t0, from, seen, cpu_ns, run_delay_ns, late_ns, before });
    }

    fn end<P: Platform>(&mut self, task: &Task<P>, end: u64) {
        let Some(within) = self.within.as_ref() else { return };
        let now = P::ticks();
        let (at_end, to) = split(task, end, now);
        let mut meter = task.meter().take();
        let (run_delay_ns, cpu_ns, seen) = (P::run_delay_ns(), P::thread_cpu_ns(), P::ticks());
        meter.phase_ticks = std::array::from_fn(|phase| at_end[phase].saturating_sub(within.before[phase]));
        meter.phase_ns = meter.phase_ticks.map(P::ticks_to_ns);
        meter.elapsed_ticks = meter.phase_ticks.iter().sum();
        // The clock of the window, in whose bounds the meter must be.
        let least = end.saturating_sub(within.seen);
        let most = seen.saturating_sub(within.t0);
        // Without a CPU after the end is not in the window.
        let after_ns = P::ticks_to_ns(seen.saturating_sub(end));
        let delay = run_delay_ns.zip(within.run_delay_ns).map(|(now, then)| now.saturating_sub(then));
        let stamped_ticks = meter.elapsed_ticks.max(least).min(most);
        let whole_ns = P::ticks_to_ns(stamped_ticks);
        self.over = Some(Stretch {
            stamped_ticks,
            covers: (within.from, to),
            cpu_ns: cpu_ns.saturating_sub(within.cpu_ns),
            run_delay_ns: delay.map(|ns| (within.late_ns + ns.saturating_sub(after_ns)).min(whole_ns)),
            meter,
        });
    }

    /// The thread ends; `None`: it had nothing to do with the window.
    pub(super) fn over<P: Platform>(&mut self, window: &Window, task: &Task<P>) -> Option<Stretch> {
        // Both edges may have passed since the last look.
        self.look(window, task);
        self.look(window, task);
        if self.within.is_some() && self.over.is_none() {
            self.end(task, P::ticks());
        }
        self.over.take()
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use tdpmmu_platform::{Role, TaskConfig};
    use tdpmmu_spte::KernelProfile;
    use tdpmmu_vm::{Vm, VmConfig};

    use super::*;

    type P = tdpmmu_platform::Real;

    fn vm() -> Vm<P> {
        Vm::new(VmConfig::new(KernelProfile::named("6.12").expect("a profile"))).expect("a small VM")
    }

    fn doze() {
        std::thread::sleep(Duration::from_millis(3));
    }

    #[test]
    fn a_thread_s_time_is_split_at_the_edges_of_the_window_however_late_it_looks() {
        let vm = vm();
        let config = TaskConfig { measure: true, attribute: true, record: true, ..TaskConfig::default() };
        let task = vm.task_with("guest", Role::Vcpu, config);
        let (window, mut meanwhile) = (Window::default(), Meanwhile::default());
        meanwhile.awake::<P>();
        meanwhile.look(&window, &task);
        doze();
        let t0 = P::ticks();
        window.t0.store(t0, Ordering::Release);
        doze();
        meanwhile.look(&window, &task);
        {
            let _waiting = task.phase(Phase::LockWait);
            doze();
        }
        let end = P::ticks();
        window.end.store(end, Ordering::Release);
        doze();
        let stretch = meanwhile.over(&window, &task).expect("it was there");
        assert_eq!(stretch.covers, (t0, end));
        assert_eq!((stretch.meter.elapsed_ticks, stretch.stamped_ticks), (end - t0, end - t0));
        assert_eq!(stretch.meter.phase_ticks.iter().sum::<u64>(), end - t0);
        assert!(stretch.meter.phase_ns(Phase::LockWait) >= 3_000_000);
        assert!(stretch.run_delay_ns.is_none_or(|ns| ns <= P::ticks_to_ns(end - t0)));
        let recording = stretch.meter.recording.expect("it records");
        let kept = crate::timeline::clipped(&recording.slices, Some(&[stretch.covers]));
        assert_eq!(kept.iter().map(|slice| slice.to - slice.from).sum::<u64>(), end - t0);
    }

    #[test]
    fn a_thread_that_is_gone_before_the_window_opens_had_no_part_in_it() {
        let vm = vm();
        let task = vm.task("holder", Role::Vcpu);
        assert!(Meanwhile::default().over(&Window::default(), &task).is_none());
    }
}
