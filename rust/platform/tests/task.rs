//! Tasks: steps, forced yields, time slices, attribution, sections.

mod common;

use std::sync::Arc;

use common::Pool;
use tdpmmu_platform::{MmuLock, Phase, Platform, Preempt, RcuConfig, Real, Role, Task, TaskConfig};

fn task(config: TaskConfig) -> (Arc<common::Domain>, Task<Real>) {
    let domain = Pool::new(0).domain(RcuConfig::default());
    let task = Task::new(&domain, "task", Role::Caller, config);
    (domain, task)
}

const MEASURE: TaskConfig = TaskConfig {
    preempt: Preempt::Full,
    tick_ns: 4_000_000,
    measure: true,
    force_yield: None,
    step_ns: false,
    attribute: true,
    record: false,
    pace: None,
};

#[test]
fn a_step_is_what_was_counted_between_two_checks_under_the_lock() {
    let (_domain, task) = task(MEASURE);
    let lock = MmuLock::<Real>::new();
    task.count(1_000, 1_000); // outside: no step
    let mut guard = lock.read(&task);
    task.count(10, 5);
    assert!(!guard.should_yield());
    task.count(0, 7);
    guard.relock(); // a release ends a step as well
    task.count(3, 0);
    drop(guard);
    let seen = task.meter().take();
    let steps = &seen.histograms.as_ref().unwrap().step_units;
    assert_eq!(steps.buckets().collect::<Vec<_>>(), [(3, 1), (7, 1), (15, 1)]);
    assert_eq!((seen.entry_reads, seen.entry_writes), (1_013, 1_012));
}

#[test]
fn a_section_without_the_lock_has_steps_too() {
    let (_domain, task) = task(MEASURE);
    let lock = MmuLock::<Real>::new();
    {
        let _outer = task.rcu_read();
        task.count(4, 0);
        let _inner = task.rcu_read();
        task.count(5, 0);
        let _ = task.should_yield(&lock);
        task.count(6, 0);
    }
    let seen = task.meter().take();
    let h = seen.histograms.as_ref().unwrap();
    assert_eq!(h.step_units.buckets().collect::<Vec<_>>(), [(6, 1), (9, 1)]);
    assert_eq!(h.rcu_section.count(), 1, "nested sections are one");
}

#[test]
fn step_ns_is_measured_instead_of_units_on_request() {
    let (_domain, task) = task(TaskConfig { step_ns: true, ..MEASURE });
    let lock = MmuLock::<Real>::new();
    let guard = lock.read(&task);
    for _ in 0..100 {
        task.count(1, 0);
        let _ = guard.should_yield();
    }
    drop(guard);
    let seen = task.meter().take();
    let h = seen.histograms.as_ref().unwrap();
    assert_eq!(h.step_units.count(), 0);
    assert_eq!(h.step_ns.count() + seen.steps_dropped, 100);
}

#[test]
fn every_nth_check_yields_by_force() {
    let config = TaskConfig { preempt: Preempt::None, tick_ns: u64::MAX, force_yield: Some(3), ..MEASURE };
    let (_domain, task) = task(config);
    let lock = MmuLock::<Real>::new();
    let guard = lock.write(&task);
    let checks: Vec<bool> = (0..9).map(|_| guard.should_yield()).collect();
    assert_eq!(checks, [false, false, true, false, false, true, false, false, true]);
}

#[test]
fn need_resched_comes_with_cpu_time_and_goes_with_a_yield() {
    let (_domain, task) =
        task(TaskConfig { tick_ns: 1_000_000, preempt: Preempt::None, ..TaskConfig::default() });
    let lock = MmuLock::<Real>::new();
    assert!(!task.need_resched(), "the slice begins with the first check");
    let start = Real::thread_cpu_ns();
    let mut guard = lock.read(&task);
    while !guard.should_yield() {
        assert!(Real::thread_cpu_ns() - start < 60_000_000_000, "need_resched never came");
    }
    assert!(task.need_resched(), "it stays until the task gives way");
    guard.relock();
    assert!(!task.need_resched());
    drop(guard);
    assert_eq!(task.meter().take().yields, 1);
}

#[test]
fn a_task_that_sleeps_between_checks_is_never_overdue() {
    let (_domain, task) = task(TaskConfig { tick_ns: 2_000_000, ..TaskConfig::default() });
    // Wall time passes ten times over, CPU time does not.
    for _ in 0..20 {
        assert!(!task.need_resched());
        std::thread::sleep(std::time::Duration::from_millis(1));
    }
}

#[test]
fn might_sleep_gives_way_unless_preemption_is_off() {
    for (preempt, gives_way) in [(Preempt::None, false), (Preempt::Voluntary, true), (Preempt::Full, true)] {
        let (_domain, task) = task(TaskConfig { tick_ns: 200_000, preempt, ..TaskConfig::default() });
        while !task.need_resched() {}
        task.might_sleep();
        assert_eq!(!task.need_resched(), gives_way, "{preempt:?}");
    }
}

#[test]
fn the_phases_add_up_to_the_elapsed_time_to_the_tick() {
    let (_domain, task) = task(TaskConfig::default());
    for _ in 0..100 {
        let _work = task.phase(Phase::SpteWork);
        {
            let _flush = task.phase(Phase::Flush);
            std::hint::spin_loop();
        }
        let _free = task.phase(Phase::Free);
        std::hint::spin_loop();
    }
    assert_eq!(task.meter().phase(), Phase::Other);
    let seen = task.meter().take();
    assert_eq!(seen.phase_ticks.iter().sum::<u64>(), seen.elapsed_ticks);
    for phase in [Phase::Other, Phase::SpteWork, Phase::Flush, Phase::Free] {
        assert!(seen.phase_ticks[phase as usize] > 0, "{phase:?}");
    }
    assert_eq!(seen.phase_ticks[Phase::KickWait as usize], 0);
    let mut both = seen.clone();
    both.merge(&task.meter().take());
    assert_eq!(both.phase_ticks.iter().sum::<u64>(), both.elapsed_ticks);
}

#[test]
fn sections_nest_and_may_end_in_any_order() {
    let (_domain, task) = task(TaskConfig::default());
    assert!(!task.in_rcu());
    let outer = task.rcu_read();
    let inner = task.rcu_read();
    drop(outer);
    assert!(task.in_rcu(), "the inner section still lasts");
    drop(inner);
    assert!(!task.in_rcu());
}

#[test]
fn a_task_that_ends_inside_a_leaked_section_does_not_block_grace_periods() {
    use tdpmmu_platform::RcuDomain;
    let (domain, task) = task(TaskConfig::default());
    std::mem::forget(task.rcu_read());
    drop(task);
    domain.synchronize();
}

#[test]
fn the_slices_of_a_recording_follow_each_other_and_add_up_to_the_phases() {
    let (_domain, task) = task(TaskConfig { record: true, ..TaskConfig::default() });
    let lock = MmuLock::<Real>::new();
    let mut last = None;
    for round in 0..2 {
        for _ in 0..50 {
            let _work = task.phase(Phase::SpteWork);
            {
                let _section = task.rcu_read();
                let _nested = task.rcu_read();
            }
            let mut guard = lock.write(&task);
            let _flush = task.phase(Phase::Flush);
            std::hint::spin_loop();
            guard.relock();
            drop(guard);
            drop(lock.read(&task));
        }
        let seen = task.meter().take();
        let recording = seen.recording.as_ref().expect("it records");
        assert_eq!((recording.task, &*recording.name, recording.role), (task.id(), "task", Role::Caller));
        assert_eq!(recording.phase_ticks(), seen.phase_ticks, "round {round}");
        assert!(recording.slices.windows(2).all(|pair| pair[0].to == pair[1].from));
        assert!(recording.slices.windows(2).all(|pair| pair[0].phase != pair[1].phase));
        let modes = |shared| recording.holds.iter().filter(|hold| hold.shared == shared).count();
        assert_eq!((modes(false), modes(true), recording.sections.len()), (100, 50, 50));
        // What a `take` ends, the next recording continues.
        let begin = recording.slices.first().map(|slice| slice.from);
        assert!(last.is_none() || last == begin);
        last = recording.slices.last().map(|slice| slice.to);
    }
    drop(task);
}

#[test]
fn a_task_that_does_not_record_hands_no_recording_over() {
    let (_domain, task) = task(MEASURE);
    drop(task.phase(Phase::Flush));
    assert!(task.meter().take().recording.is_none());
}

#[test]
fn what_a_stretch_was_spent_on_adds_up_to_its_stamps() {
    let (_domain, task) = task(TaskConfig::default());
    let begin = Real::ticks();
    let before = task.meter().phase_ticks(begin);
    for phase in [Phase::Flush, Phase::SpteWork, Phase::Flush] {
        let _in_it = task.phase(phase);
        std::hint::spin_loop();
    }
    let end = Real::ticks();
    let after = task.meter().phase_ticks(end);
    assert_eq!((0..after.len()).map(|phase| after[phase] - before[phase]).sum::<u64>(), end - begin);
    assert!(after[Phase::Flush as usize] > before[Phase::Flush as usize]);
}
