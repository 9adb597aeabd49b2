//! Each fault under the simulated platform: what must hold is looked at by every judge, and by what is said here. The counts show that the fault was there at all.

use std::collections::BTreeSet;
use std::sync::Arc;

use tdpmmu_lab::Control;
use tdpmmu_lab::explore::{natural_profile, protocol, protocols, sound_designs};
use tdpmmu_lab::faults::{Armed, FaultPlan, enumerate};
use tdpmmu_lab::program::{Act, JudgeSet, Outcome, Program, SlotSpec, ThreadSpec, run_once};
use tdpmmu_platform::sim::{End, Limits, Schedule, SimConfig, Strategy};
use tdpmmu_platform::{Bug, Fault};

/// Lengths of sections and steps are another test's: here only what faults may not break. (The default stands for the program's own limits.)
const NO_LIMITS: Limits = Limits { rcu_units: u64::MAX - 1, step_units: u64::MAX - 1 };

fn plan(text: &str) -> FaultPlan {
    text.parse().expect(text)
}

fn run(program: &Program, armed: &Arc<Armed>, strategy: Strategy, bug: Option<Bug>) -> Outcome {
    let config =
        SimConfig { strategy, faults: Some(armed.clone()), bug, limits: NO_LIMITS, ..SimConfig::default() };
    run_once(program, config, &JudgeSet::default())
}

/// `runs` schedules of each program; returns how often the fault struck. Nothing may be found.
fn survives(text: &str, fault: Fault, runs: u64, programs: &[Program]) -> u64 {
    let mut struck = 0;
    for program in programs {
        let program = plan(text).apply(program);
        for seed in 0..runs {
            let armed = plan(text).arm();
            let outcome = run(&program, &armed, Strategy::Random { seed }, None);
            assert!(outcome.refused.is_none(), "{}: {:?}", program.name, outcome.refused);
            assert_eq!(
                outcome.finding(),
                None,
                "{text}: {} seed {seed}: {}",
                program.name,
                outcome.run.schedule
            );
            struck += armed.count(fault).1;
        }
    }
    assert!(struck > 0, "{text}: the fault never struck");
    struck
}

fn all(design: &str) -> Vec<Program> {
    let profile = natural_profile(design);
    protocols().iter().map(|p| p.program(design, profile).expect(p.name)).collect()
}

fn one(name: &str, design: &str) -> Program {
    protocol(name).expect(name).program(design, natural_profile(design)).expect(name)
}

/// One vCPU and a VMM: faults at every level, roots, SMM, prefaults, huge pages that are split for logging, a slot that goes and comes.
fn script(design: &str) -> Program {
    let mut program = Program::new(
        "script",
        vec![
            ThreadSpec::vcpu(
                0,
                vec![
                    Act::LoadRoot,
                    Act::write(0),
                    Act::write(0x200),
                    Act::read(0x40000),
                    Act::PreFault { gfn: 0x400, pages: 3 },
                    Act::DropRoot,
                    Act::write(1),
                    Act::EnterSmm,
                    Act::write(0),
                    Act::ExitSmm,
                    Act::SwitchRole { variant: 1 },
                    Act::write(0x201),
                    Act::Leave,
                    Act::Raise { flag: 0 },
                    Act::WaitFor { flag: 1 },
                    Act::write(2),
                    Act::write(0x203),
                ],
            ),
            ThreadSpec::caller(vec![
                Act::WaitFor { flag: 0 },
                Act::SetSlotFlags { as_id: 0, id: 0, log: true },
                Act::FastZap,
                Act::DeleteSlot { as_id: 0, id: 1 },
                Act::CreateSlot(SlotSpec { hva_page: 2048, ..SlotSpec::flat(1, 0x40000, 512) }),
                Act::Raise { flag: 1 },
            ]),
        ],
    );
    program.machine.design = design.into();
    program.machine.profile = natural_profile(design).into();
    program.machine.smm = true;
    program.machine.host_level = 2;
    program.machine.slots =
        vec![SlotSpec::flat(0, 0, 2048), SlotSpec { hva_page: 2048, ..SlotSpec::flat(1, 0x40000, 512) }];
    program
}

#[test]
fn each_allocation_of_a_script_fails_in_turn_and_every_failure_is_an_error_a_retry_and_no_leak() {
    let mut sites = BTreeSet::new();
    for design in sound_designs() {
        let sum = enumerate(&script(design), None, &Control::silent()).expect("a program that can be run");
        assert!(sum.ok && sum.findings.is_empty(), "{design}: {:#?}", sum.findings);
        assert!(sum.sites >= 4, "{design}: {sum:?}");
        assert_eq!(sum.runs.len() as u64, 2 * sum.sites);
        assert!(sum.runs.iter().any(|run| run.error.is_some()), "{design}: {sum:?}");
        assert!(sum.runs.iter().any(|run| run.retried_ok == Some(true)), "{design}: {sum:?}");
        assert!(sum.runs.iter().all(|run| run.clean && run.leaked == 0));
        sites.extend(sum.by_site.into_keys());
    }
    for site in ["AllocFault", "AllocRoot", "AllocSplit", "AllocSlot"] {
        assert!(sites.contains(site), "nothing was allocated at {site}: {sites:?}");
    }
}

#[test]
fn allocations_that_fail_in_the_middle_of_every_protocol_break_nothing() {
    survives("alloc=every", Fault::Alloc, 6, &all("sync"));
    survives("alloc=30%", Fault::Alloc, 3, &all("async-worker"));
}

#[test]
fn a_compare_exchange_that_fails_for_nothing_loses_no_update_and_ends_no_loop_in_circles() {
    survives("cmpxchg=30%", Fault::Cmpxchg, 6, &all("sync"));
    survives(
        "cmpxchg=SpteInstall:60%",
        Fault::Cmpxchg,
        8,
        &[one("freeze-install", "sync"), one("fault-zap", "async-worker")],
    );
}

/// What every act came to, and what is mapped in the end: zaps, protections and harvests of populated ranges, then a look at each gfn.
fn walks(design: &str) -> Program {
    let pages = [0, 1, 2, 0x200, 0x201, 0x400, 0x40000, 0x40001];
    let mut acts: Vec<_> = pages.map(Act::write).into();
    acts.extend([
        Act::ZapRange { gfn: 1, pages: 0x200 },
        Act::WriteProtect { as_id: 0, gfn: 0 },
        Act::Unmap { hva_page: 0x400, pages: 1, may_block: true },
        Act::Age { hva_page: 0, pages: 0x400 },
        Act::SetSlotFlags { as_id: 0, id: 0, log: true },
        Act::write(2),
        Act::GetDirtyLog { as_id: 0, id: 0 },
        Act::SetSlotFlags { as_id: 0, id: 0, log: false },
    ]);
    acts.extend(pages.map(|gfn| Act::LookUp { gfn }));
    acts.push(Act::FastZap);
    acts.extend(pages.map(|gfn| Act::LookUp { gfn }));
    let mut program = Program::new("walks", vec![ThreadSpec::vcpu(0, acts)]);
    program.machine.design = design.into();
    program.machine.profile = natural_profile(design).into();
    program.machine.slots =
        vec![SlotSpec::flat(0, 0, 2048), SlotSpec { hva_page: 2048, ..SlotSpec::flat(1, 0x40000, 512) }];
    program
}

#[test]
fn yields_at_every_check_change_nothing_of_what_the_operations_come_to() {
    for design in sound_designs() {
        let program = walks(design);
        let of = |text: &str| {
            let armed = plan(text).arm();
            let calm = Strategy::Pct { seed: 0, depth: 1, steps: 1000 };
            let outcome = run(&program, &armed, calm, None);
            assert_eq!(outcome.finding(), None, "{design} {text}");
            let results: Vec<_> = outcome.performed.into_iter().map(|done| done.result).collect();
            assert!(!results.is_empty());
            (results, armed.count(Fault::Yield).1)
        };
        let (calm, never) = of("none");
        let (torn, yields) = of("yield=all");
        assert_eq!(calm, torn, "{design}");
        assert!(never == 0 && yields > 10, "{design}: {yields}");
    }
}

#[test]
fn yields_in_every_protocol_keep_every_flush_obligation() {
    for design in ["sync", "async-worker", "second-list"] {
        survives("yield=all", Fault::Yield, 3, &all(design));
    }
}

#[test]
fn grace_periods_that_are_late_or_never_end_cost_memory_and_nothing_else() {
    survives("gp-delay=200", Fault::GraceDelay, 3, &all("sync"));
    // Without a memslot that goes: its deletion waits for readers, for ever, and a fault on it begins again for as long. So it is in KVM.
    let patient = ["root-lifecycle", "lockless-free", "fastzap-defunct", "teardown-worker", "freeze-install"];
    survives("gp-delay=inf", Fault::GraceDelay, 3, &patient.map(|name| one(name, "async-worker")));
}

#[test]
fn a_worker_that_stalls_or_dies_leaves_its_work_to_another_and_every_reference_is_put() {
    for design in ["async-worker", "async-worker-owned", "second-list-worker"] {
        let programs = ["root-lifecycle", "fastzap-defunct", "zapall-worker", "teardown-worker", "fault-zap"]
            .map(|name| one(name, design));
        survives("worker=stall", Fault::WorkerStall, 4, &programs);
        survives("worker=die", Fault::WorkerDie, 4, &programs);
    }
}

#[test]
fn a_worker_that_panics_is_told_by_its_vm_and_keeps_nobody_waiting() {
    let program = one("fault-zap", "async-worker");
    let mut panicked = 0;
    for seed in 0..20 {
        let armed = plan("worker=panic").arm();
        let config = SimConfig {
            strategy: Strategy::Random { seed },
            faults: Some(armed.clone()),
            limits: NO_LIMITS,
            stop_at_violation: false,
            ..SimConfig::default()
        };
        let outcome = run_once(&program, config, &JudgeSet::default());
        let struck = armed.count(Fault::WorkerPanic).1;
        panicked += struck;
        assert!(
            !matches!(outcome.run.end, End::Deadlock(_) | End::StepLimit),
            "seed {seed}: {:?}",
            outcome.run.end
        );
        let told = outcome.run.violations.iter().any(|violation| violation.what.contains("panicked"));
        assert_eq!(told, struck != 0, "seed {seed}: {struck} panics; {:?}", outcome.run.violations);
    }
    assert!(panicked > 0, "no worker ever panicked");
}

#[test]
fn flushes_that_are_late_shared_or_superfluous_leave_no_stale_translation_behind() {
    survives("tlb-delay=40", Fault::FlushDelay, 4, &all("sync"));
    survives("tlb-merge", Fault::FlushMerge, 4, &all("sync"));
    survives("tlb-extra", Fault::FlushExtra, 4, &all("async-worker"));
}

#[test]
fn a_walker_that_loses_its_cpu_keeps_what_it_looks_at_and_holds_nobody_up() {
    let programs =
        [one("lockless-free", "sync"), one("lockless-free", "async-worker"), one("slots-faults", "sync")];
    survives("pause=lockless", Fault::Pause, 15, &programs);
}

#[test]
fn a_table_that_is_freed_under_a_paused_walker_is_found() {
    // The same faults, and an engine that frees at once: the test above can fail.
    let program = one("lockless-free", "sync");
    let found = (0..400).find_map(|seed| {
        let outcome = run(&program, &plan("pause=lockless").arm(), Strategy::Random { seed }, Some(Bug::C04));
        outcome.finding()
    });
    assert!(found.is_some(), "tables without a grace period went unseen");
}

#[test]
fn a_vcpu_that_loses_its_cpu_in_the_guest_is_waited_for_and_no_longer() {
    survives("pause=guest:0", Fault::VcpuPause, 4, &all("sync"));
}

#[test]
fn a_contention_storm_makes_walks_yield_and_starves_nobody() {
    let calm = one("yield-put", "sync");
    let storm = plan("storm=3").apply(&calm);
    assert_eq!(storm.threads.len(), calm.threads.len() + 3);
    for seed in 0..10 {
        let outcome = run(&storm, &plan("none").arm(), Strategy::Random { seed }, None);
        assert_eq!(outcome.finding(), None, "seed {seed}");
        assert!(outcome.refused.is_none());
    }
}

#[test]
fn a_fault_that_made_a_run_fail_is_in_its_schedule_and_replays() {
    // A leaf that a lost race has counted: only a compare-exchange that fails shows it to a single task.
    let mut program = one("fault-zap", "sync");
    program.threads.truncate(1);
    let fails = |strategy: Strategy| {
        let outcome = run(&program, &plan("cmpxchg=30%").arm(), strategy, Some(Bug::C12));
        outcome.finding().map(|finding| (finding.rule, outcome.run.hash, outcome.run.schedule))
    };
    let (rule, hash, schedule) =
        (0..200).find_map(|seed| fails(Strategy::Random { seed })).expect("a lost race is counted");
    let text = schedule.to_string();
    let parsed: Schedule = text.parse().expect("what is printed parses");
    let again = fails(Strategy::Replay(parsed)).expect("the same failure");
    assert_eq!((again.0, again.1), (rule, hash));
}
