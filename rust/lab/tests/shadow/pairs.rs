//! No two designs of the shadow MMU are the same, and none is `sync`: for each pair a test, named after what they differ in.
//!
//! A probe is one fast zap of a guest whose vCPU holds a root and does not run: a number without a race, and without a clock. `rust/mmu/tests/pairs` does the same for the designs of the TDP MMU.

use std::collections::BTreeMap;
use std::sync::{Mutex, OnceLock, PoisonError};

use tdpmmu_lab::config::BenchConfig;
use tdpmmu_lab::outcome::Outcome;
use tdpmmu_lab::result::Run;
use tdpmmu_lab::scenario::{Flag, Op, Thread, Update, Who, wait};
use tdpmmu_lab::scene::Kind;
use tdpmmu_lab::{Control, experiment, run};
use tdpmmu_shadow::SHADOW_DESIGNS;

/// 256 MiB of 4K pages: 128 leaf tables below four others.
const MEMORY: u64 = 256 << 20;
const LEAVES: u64 = MEMORY >> 12;
const TABLES: u64 = 128 + 3;

/// One fast zap under `design`; `forced`: every reschedule check asks to yield.
fn zap(design: &str, forced: bool) -> (Outcome, Run) {
    let config = BenchConfig {
        memory_bytes: MEMORY,
        vcpus: 1,
        designs: vec![design.into()],
        check: false,
        ..BenchConfig::default()
    };
    let plan = config.plan(Some(Kind::Zap)).expect("makes sense");
    let case = &plan.cases[0];
    let mut scenario = case.scene.scenario(&plan, case, false);
    scenario.vm.force_yield = forced.then_some(1);
    scenario.threads = vec![
        Thread { who: Who::Vcpu(0), ops: vec![Op::Load, Op::Raise(Flag::HolderReady), wait(Flag::Dropped)] },
        Thread {
            who: Who::Caller,
            ops: vec![
                wait(Flag::HolderReady),
                Op::Zap(Update::Delete),
                Op::AwaitTeardown,
                Op::Raise(Flag::Dropped),
            ],
        },
    ];
    let outcome = run::run(&scenario, &Control::silent(), None).expect("runs");
    let row = experiment::to_run(&plan, case, 0, &outcome, 2).expect("believable");
    (outcome, row)
}

/// The same, once a design.
fn quiet(design: &str) -> Run {
    static RUNS: OnceLock<Mutex<BTreeMap<String, Run>>> = OnceLock::new();
    let mut runs = RUNS.get_or_init(Default::default).lock().unwrap_or_else(PoisonError::into_inner);
    runs.entry(design.into()).or_insert_with(|| zap(design, false).1).clone()
}

/// Does the zap give the lock away when it is asked to at every check?
fn gives_way(design: &str) -> u64 {
    u64::from(zap(design, true).1.yields > 0)
}

/// Generations ended by the fast zap.
fn generations(design: &str) -> u64 {
    quiet(design).shadow.map_or(0, |shadow| shadow.toggles)
}

/// Pages that are of no use when the fast zap returns, and are not free.
fn retained(design: &str) -> u64 {
    quiet(design).shadow.map_or(0, |shadow| shadow.retained_at_return)
}

/// Leaves that are mapped when all is over.
fn still_mapped(design: &str) -> u64 {
    quiet(design).last.expect("counted").sptes
}

/// Are entries of the guest's leaves written by the caller of the fast zap, and how often each?
fn writes_a_leaf(design: &str) -> u64 {
    quiet(design).teardown.map_or(0, |teardown| teardown.entry_writes / LEAVES)
}

/// Is any entry written under the shared lock?
fn shared(design: &str) -> u64 {
    u64::from(quiet(design).lock_mode == "shared")
}

/// A test of a pair: `name: probe, first number, second number;`.
macro_rules! pairs {
    ($($name:ident: $probe:ident, $a:literal $x:expr, $b:literal $y:expr;)+) => {
        $(#[test]
        fn $name() {
            assert_ne!($x, $y, "no difference");
            assert_eq!(($probe($a), $probe($b)), ($x, $y), "{} of {} and {}", stringify!($probe), $a, $b);
        })+

        /// The name of each test above and its designs.
        const PAIRS: &[(&str, &str, &str)] = &[$((stringify!($name), $a, $b)),+];
    };
}

pairs! {
    shadow_walk_and_shadow_walk_break_differ_in_whether_they_give_way:
        gives_way, "shadow-walk" 0, "shadow-walk-break" 1;
    shadow_walk_and_shadow_gen_kept_differ_in_what_is_retained:
        retained, "shadow-walk" 0, "shadow-gen-kept" TABLES;
    shadow_walk_and_shadow_gen_differ_in_whether_they_give_way:
        gives_way, "shadow-walk" 0, "shadow-gen" 1;
    shadow_walk_and_shadow_slot_differ_in_what_stays_mapped:
        still_mapped, "shadow-walk" 0, "shadow-slot" LEAVES;
    shadow_walk_break_and_shadow_gen_kept_differ_in_the_writes_of_a_leaf:
        writes_a_leaf, "shadow-walk-break" 1, "shadow-gen-kept" 0;
    shadow_walk_break_and_shadow_gen_differ_in_the_generations_that_end:
        generations, "shadow-walk-break" 0, "shadow-gen" 1;
    shadow_walk_break_and_shadow_slot_differ_in_what_stays_mapped:
        still_mapped, "shadow-walk-break" 0, "shadow-slot" LEAVES;
    shadow_gen_kept_and_shadow_gen_differ_in_what_is_retained:
        retained, "shadow-gen-kept" TABLES, "shadow-gen" 0;
    shadow_gen_kept_and_shadow_slot_differ_in_the_generations_that_end:
        generations, "shadow-gen-kept" 1, "shadow-slot" 0;
    shadow_gen_and_shadow_slot_differ_in_what_stays_mapped:
        still_mapped, "shadow-gen" 0, "shadow-slot" LEAVES;
    sync_and_shadow_walk_differ_in_whether_they_give_way:
        gives_way, "sync" 1, "shadow-walk" 0;
    sync_and_shadow_walk_break_differ_in_the_writes_of_a_leaf:
        writes_a_leaf, "sync" 2, "shadow-walk-break" 1;
    sync_and_shadow_gen_kept_differ_in_what_is_retained:
        retained, "sync" 0, "shadow-gen-kept" TABLES;
    sync_and_shadow_gen_differ_in_how_the_lock_is_held:
        shared, "sync" 1, "shadow-gen" 0;
    sync_and_shadow_slot_differ_in_what_stays_mapped:
        still_mapped, "sync" 0, "shadow-slot" LEAVES;
}

#[test]
fn every_pair_of_shadow_designs_and_each_with_sync_has_its_test() {
    let names: Vec<_> = std::iter::once("sync").chain(SHADOW_DESIGNS.iter().map(|d| d.name)).collect();
    for (n, a) in names.iter().enumerate() {
        for b in &names[n + 1..] {
            let named = format!("{a}_and_{b}_differ_in_").replace('-', "_");
            let of = |p: &&(&str, &str, &str)| p.0.starts_with(&named) && (p.1, p.2) == (*a, *b);
            assert_eq!(PAIRS.iter().filter(of).count(), 1, "{named}...");
        }
    }
    assert_eq!(PAIRS.len(), names.len() * (names.len() - 1) / 2);
}

/// The lock is given away only when at least ten pages have been zapped since it was last asked, so that the zap makes progress whatever the others do.
#[test]
fn a_zap_that_is_always_asked_gives_way_once_in_ten_pages_at_most() {
    let (_, run) = zap("shadow-gen", true);
    let shadow = run.shadow.expect("a shadow design");
    // The root is held.
    assert_eq!(shadow.zapped, TABLES - 1);
    assert!((1..=TABLES / 10).contains(&run.yields), "{} yields for {TABLES} pages", run.yields);
    assert!(shadow.longest_batch >= 10, "{shadow:?}");
}
