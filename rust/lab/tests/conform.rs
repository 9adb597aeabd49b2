//! The engine does what real KVM was recorded to do, and a wrong engine is told apart.

mod recorded;

use std::path::{Path, PathBuf};

use recorded::{Tape, folder, memslot, run, shipped, small_vm, small_vm_with, with_scripts, with_yields};
use tdpmmu_lab::conform::{CaseReport, ConformError, ConformOptions, blank, predict};

fn agreed(dir: &Path) -> CaseReport {
    let case = run(dir, None).unwrap_or_else(|e| panic!("{}: {e}", dir.display()));
    let name = format!("{}/{}", case.kernel, case.name);
    assert!(case.mismatches.is_empty(), "{name}: {:#?}", case.mismatches);
    assert!(case.passed(), "{name}: {} differences, skipped {:?}", case.differences, case.skipped);
    assert_eq!(case.expected, case.matched + case.undetermined, "{name}: each transition is counted once");
    assert!(case.expected > 1000, "{name}: {} transitions", case.expected);
    assert!(case.statistics.compared > 50 && case.results.compared > 0, "{name}: {:?}", case.statistics);
    case
}

#[test]
fn the_shipped_recordings_agree() {
    let cases = with_scripts(&shipped("."));
    assert!(cases.len() >= 10, "tests/data is incomplete: {cases:?}");
    for dir in cases {
        agreed(&dir);
    }
}

#[test]
fn all_recordings_agree_where_they_lie_beside_the_repository() {
    let beside = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/kvm-traces");
    if !beside.is_dir() {
        eprintln!("skipped: no recordings at ../shared/kvm-traces beside the repository");
        return;
    }
    let cases: Vec<CaseReport> = with_scripts(&beside).iter().map(|dir| agreed(dir)).collect();
    assert!(cases.len() >= 30, "{} recordings have scripts", cases.len());
    let undetermined: u64 = cases.iter().map(|case| case.undetermined).sum();
    assert_eq!(undetermined, 0, "no aging in these recordings was decided by hardware alone");
}

#[test]
fn racing_vcpus_are_compared_as_multisets_and_their_losers_pages_are_counted() {
    let case = agreed(&shipped("6.1/f_concurrent"));
    assert_eq!(case.races, 7);
    let births = case.births.expect("births are recorded");
    assert!(births.unlinked > 0, "tables whose link lost its race");
    assert_eq!(births.expected, births.matched + births.unlinked);
}

#[test]
fn a_blanked_copy_gives_the_same_prediction_byte_by_byte() {
    let out = folder("blanked");
    for case in
        ["6.1/k_nx", "6.1/f_concurrent", "6.1-async/i2_teardown_small", "6.12/l_prefault", "7.2/g_roots"]
    {
        let (original, copy) = (shipped(case), out.join(case));
        blank(&original, &copy).expect("the copy can be written");
        let text = |dir: &Path| {
            let predicted =
                predict(dir, &ConformOptions::default()).unwrap_or_else(|e| panic!("{case}: {e}"));
            assert!(predicted.transitions.len() > 1000, "{case}");
            serde_json::to_string(&predicted).expect("a prediction is JSON")
        };
        assert!(text(&original) == text(&copy), "{case}: the prediction depends on what was blanked");
    }
}

#[test]
fn blanked_values_are_differences_when_they_are_compared() {
    let copy = folder("compared").join("7.2/g_roots");
    blank(&shipped("7.2/g_roots"), &copy).expect("the copy can be written");
    let case = run(&copy, None).expect("a blanked recording is a recording");
    assert!(case.matched < case.expected / 2, "{} of {} agree with nothing", case.matched, case.expected);
    assert!(!case.passed());
}

/// (recording, profile with one switch of another kernel): the recording tells them apart.
const POLICIES: &[(&str, &str, &str)] = &[
    ("6.1/k_nx", "6.1,collapse=recover", "operation"),
    ("6.1/e2_dirty", "6.1,collapse=recover", "operation"),
    ("6.1/e2_dirty", "6.1,split-in-fault=split", "map"),
    ("6.12/k_nx", "6.12,split-in-fault=zap-then-link", "map"),
    ("6.1/f_concurrent", "6.1,remake-dirty=always-set", "race"),
    ("6.12/j_misc", "6.12,remake-dirty=always-set", "map"),
    ("6.12/l_prefault", "6.12,spurious-if-allowed=true", "prefault"),
    ("6.1/k_nx", "6.1,passes=4K+2M+1G+root", "operation"),
    ("6.12/k_nx", "6.12,passes=1G+root", "operation"),
    ("6.1/k_nx", "6.1,children-first=true", "operation"),
    ("7.2/g_roots", "7.2,children-first=false", "operation"),
    ("6.1/k_nx", "6.1,nx-recovery-lock=shared", "nx_recovery"),
    ("6.12/k_nx", "6.12,frozen=0x80000000000001a0", "operation"),
    ("7.2/g_roots", "7.2,frozen=0x80000000000005a0", "operation"),
    ("6.12/l_prefault", "6.12,nonpresent=0", "prefault"),
    ("6.1/e5_ring", "6.1,fast-page-fault=false", "statistics"),
    ("6.1-async/i2_teardown_small", "6.1", "worker"),
];

#[test]
fn a_policy_of_another_kernel_is_told_apart_where_it_shows() {
    for &(case, profile, cause) in POLICIES {
        let report = run(&shipped(case), Some(profile)).unwrap_or_else(|e| panic!("{case} {profile}: {e}"));
        assert!(!report.passed(), "{case} agrees with {profile}");
        let causes: Vec<&str> = report.mismatches.iter().map(|m| m.cause.as_str()).collect();
        assert!(causes.contains(&cause), "{case} {profile}: differs in {causes:?}, not in {cause}");
        let first = &report.mismatches[0];
        assert!(first.expected != first.got, "{case} {profile}: {first:?}");
    }
}

#[test]
fn a_recording_without_a_script_is_refused_with_that_reason() {
    match run(&shipped("6.1/selftest_smm"), None) {
        Err(e @ ConformError::NoScript { missing: "script.json", .. }) => {
            assert_eq!(e.exit_code(), 3);
            assert!(e.to_string().contains("without its script"), "{e}");
        }
        other => panic!("{other:?}"),
    }
}

fn copy_of(case: &str, name: &str) -> PathBuf {
    let dir = folder(name).join(case);
    std::fs::create_dir_all(&dir).expect("the folder can be made");
    for file in ["script.json", "params.txt", "trace.txt.gz"] {
        let bytes = std::fs::read(shipped(case).join(file)).expect("the recording is there");
        std::fs::write(dir.join(file), bytes).expect("the copy can be written");
    }
    dir
}

#[test]
fn damaged_files_are_errors_that_name_file_and_line() {
    let dir = copy_of("7.2/g_roots", "damaged");
    let refused = |what: &str| match run(&dir, None) {
        Err(e) => {
            assert_eq!(e.exit_code(), 3, "{what}: {e}");
            e.to_string()
        }
        Ok(_) => panic!("{what} was accepted"),
    };
    let script = std::fs::read_to_string(dir.join("script.json")).expect("text");
    std::fs::write(dir.join("script.json"), script.replacen("\"op\":3", "\"op\":}", 1)).expect("writable");
    assert!(refused("bad JSON").contains("script.json:4"), "{}", refused("bad JSON"));
    std::fs::write(dir.join("script.json"), &script).expect("writable");

    let params = std::fs::read_to_string(dir.join("params.txt")).expect("text");
    std::fs::write(
        dir.join("params.txt"),
        format!("{params}/sys/module/kvm/parameters/nx_huge_pages:perhaps\n"),
    )
    .expect("writable");
    let lines = params.lines().count() + 1;
    assert!(refused("a bad parameter").contains(&format!("params.txt:{lines}")));
    std::fs::write(dir.join("params.txt"), &params).expect("writable");

    let trace = std::fs::read(dir.join("trace.txt.gz")).expect("bytes");
    std::fs::write(dir.join("trace.txt.gz"), &trace[..trace.len() / 2]).expect("writable");
    assert!(refused("half a stream").contains("truncated"));
    std::fs::write(dir.join("trace.txt.gz"), b"\x00\x01\x02\x03").expect("writable");
    refused("no text");
    std::fs::write(
        dir.join("trace.txt.gz"),
        "   main-1 [000] ..... 5.000001: kvm_page_fault: vcpu 0 rip 0x0 address 0x1 error_code 0x2\n\
            main-1 [000] ..... 5.000002: kvm_tdp_mmu_spte_changed: as id 0 gfn zz\n",
    )
    .expect("writable");
    assert!(refused("a malformed line").contains("trace.txt.gz:2"));
}

#[test]
fn a_version_takes_the_nearest_profile_and_a_name_that_is_none_is_a_usage_error() {
    let error = run(&shipped("7.2/g_roots"), Some("9.9")).expect_err("there is no 9.9");
    assert_eq!(error.exit_code(), 2, "{error}");
    let near = folder("near").join("6.16/case");
    std::fs::create_dir_all(near.parent().expect("a parent")).expect("the folder can be made");
    std::fs::rename(copy_of("6.12/k_nx", "near_copy"), &near).expect("renamed");
    let case = run(&near, None).expect("a version between two profiles");
    assert_eq!((case.profile.as_str(), case.profile_from), ("6.12", "nearest"));
    assert!(case.passed());

    let strange = folder("strange").join("nokernel/case");
    std::fs::create_dir_all(strange.parent().expect("a parent")).expect("the folder can be made");
    std::fs::rename(copy_of("7.2/g_roots", "strange_copy"), &strange).expect("renamed");
    let error = run(&strange, None).expect_err("the folder names no kernel");
    assert!(error.exit_code() == 2 && error.to_string().contains("--profile"), "{error}");
}

/// How the walk that protects pages and the guest's fault fall between each other.
#[derive(Clone, Copy, PartialEq)]
enum Meanwhile {
    /// The walk gives mmu_lock up after two entries.
    Yield,
    /// It holds it shared; the fault is beside it.
    Beside,
    /// The fault comes when the walk is over.
    Afterwards,
}

/// Logging is turned on while the vCPU runs, which faults on a page that the walk has yet to come to: it is protected when the walk gets there.
fn logging_beside_a_guest(meanwhile: Meanwhile) -> Tape {
    const PROBE: &str = "(f+0x0/0x1 [kvm])";
    let mut tape = small_vm();
    tape.line("vcpu-101", "mmu_load", PROBE);
    for gfn in 0x1001..0x1004u64 {
        let pfn = 0x4000 + gfn;
        tape.fault("vcpu-101", gfn, 0x1_0000_0006, pfn, &[&format!("0 {gfn:x} 1 0 {pfn:x}e67")]);
    }
    tape.begin("main-100", 4, "set_memslot", &memslot(0, 1, 0x1000, 16, 1, 0x7f00_0000_0000))
        .line("main-100", "wrprot_slot", PROBE)
        .line(
            "main-100",
            "iter_start",
            "(f+0x0/0x1 [kvm]) root=0x1 spt=0x2 role=0x3784 refs=3 min_level=1 gfn=0x1000",
        )
        .line("main-100", "iter_restart", PROBE)
        .changed("main-100", "0 1000 1 5000e67 5000e65")
        .changed("main-100", "0 1001 1 5001e67 5001e65");
    let fault = |tape: &mut Tape| {
        tape.fault("vcpu-101", 0x1005, 0x1_0000_0006, 0x5005, &["0 1005 1 0 5005e67"]);
    };
    if meanwhile != Meanwhile::Afterwards {
        fault(&mut tape);
    }
    if meanwhile == Meanwhile::Yield {
        tape.line("main-100", "iter_restart", PROBE);
    }
    tape.changed("main-100", "0 1002 1 5002e67 5002e65")
        .changed("main-100", "0 1003 1 5003e67 5003e65")
        .changed("main-100", "0 1005 1 5005e67 5005e65");
    if meanwhile == Meanwhile::Afterwards {
        fault(&mut tape);
    }
    tape.end("main-100", 4, "set_memslot")
        .end("vcpu-101", 3, "touch")
        .begin("main-100", 5, "destroy_vm", r#""vm":1,"pages_4k":5"#)
        .line("main-100", "mn_release", PROBE)
        .changed("main-100", "0 0 3 901827 0")
        .changed("main-100", "0 1000 2 902827 5a0");
    for (gfn, bits) in [(0x1000, "e65"), (0x1001, "e65"), (0x1002, "e65"), (0x1003, "e65"), (0x1005, "e65")] {
        tape.changed("main-100", &format!("0 {gfn:x} 1 5{:03x}{bits} 5a0", gfn & 0xfff));
    }
    tape.changed("main-100", "0 0 4 900827 0").end("main-100", 5, "destroy_vm");
    tape
}

#[test]
fn a_walk_gives_way_where_it_was_recorded_to() {
    let dir = logging_beside_a_guest(Meanwhile::Yield).write(&folder("yields"), "6.1");
    let case = run(&dir, None).expect("a recording");
    assert!(case.passed(), "{:#?}", case.mismatches);
    assert_eq!((case.expected, case.races, case.yields, case.yields_taken), (21, 1, 1, 1));
}

#[test]
fn walks_that_yield_anywhere_come_to_the_same() {
    for (case, seed, places) in [
        ("6.1/e5_ring", 1, false),
        ("6.12/k_nx", 2, true),
        ("7.2/b_huge", 3, false),
        ("7.2/g_roots", 4, true),
    ] {
        let (dir, yields) = with_yields(case, &format!("yields_{seed}"), seed, places);
        let report = agreed(&dir);
        assert!(yields > 10, "{case} seed {seed}: {yields} yields");
        assert_eq!((report.yields, report.yields_taken), (yields, yields), "{case} seed {seed}");
    }
}

#[test]
fn a_walk_that_shares_the_lock_has_faults_between_its_changes() {
    let dir = logging_beside_a_guest(Meanwhile::Beside).write(&folder("beside"), "6.1");
    let case = run(&dir, None).expect("a recording");
    assert!(case.passed(), "{:#?}", case.mismatches);
    assert_eq!((case.expected, case.yields), (21, 0));
}

#[test]
fn a_page_that_was_mapped_after_the_walk_cannot_be_protected_by_it() {
    let dir = logging_beside_a_guest(Meanwhile::Afterwards).write(&folder("afterwards"), "6.1");
    let case = run(&dir, None).expect("a recording");
    assert!(!case.passed());
    assert!(case.mismatches.iter().any(|m| m.expected.contains("gfn 1005")), "{:#?}", case.mismatches);
}

/// The page that `small_vm` maps is aged by the host, `events` being what KVM is said to have changed each time.
fn aged(events: &[Option<&str>]) -> Tape {
    let mut tape = small_vm();
    tape.end("vcpu-101", 3, "touch");
    for event in events {
        tape.line(
            "kdamond.0-50",
            "kvm_age_hva",
            "mmu notifier age hva: 0x007f0000000000 -- 0x007f0000002000",
        );
        if let Some(change) = event {
            tape.changed("kdamond.0-50", change);
        }
        tape.line("kdamond.0-50", "inv_end", "(f+0x0/0x1 [kvm])");
    }
    tape
}

#[test]
fn an_aging_that_only_hardware_decides_is_undetermined() {
    let age = Some("0 1000 1 5000e67 5000e47");
    let dir = aged(&[age, age, None, age]).write(&folder("aging"), "6.1");
    let case = run(&dir, None).expect("a recording");
    assert!(case.passed(), "{:#?}", case.mismatches);
    assert_eq!(
        (case.matched, case.undetermined),
        (5, 2),
        "the first is KVM's doing, the later ones the guest's"
    );
}

#[test]
fn an_aging_of_what_is_not_mapped_is_a_difference() {
    let dir = aged(&[Some("0 1001 1 5001e67 5001e47")]).write(&folder("aging_nothing"), "6.1");
    let case = run(&dir, None).expect("a recording");
    assert!(!case.passed());
    let cleared = aged(&[Some("0 1000 1 5000e67 5000e07")]).write(&folder("aging_more"), "6.1");
    assert!(!run(&cleared, None).expect("a recording").passed(), "aging leaves D alone");
}

#[test]
fn a_guests_own_smi_changes_its_address_space() {
    let mut tape = small_vm_with(&[&memslot(1, 1, 0x1000, 16, 0, 0x7f00_0000_0000)]);
    tape.line("vcpu-101", "kvm_smm_transition", "vcpu 0: entering SMM, smbase 0x30000")
        .fault(
            "vcpu-101",
            0x1000,
            0x1_0000_0006,
            0x5000,
            &["1 0 4 0 910827", "1 0 3 0 911827", "1 1000 2 0 912827", "1 1000 1 0 5000e67"],
        )
        .line("vcpu-101", "kvm_smm_transition", "vcpu 0: leaving SMM, smbase 0x30000")
        .fault("vcpu-101", 0x1001, 0x1_0000_0006, 0x5001, &["0 1001 1 0 5001e67"])
        .end("vcpu-101", 3, "touch");
    let dir = tape.write(&folder("smi"), "6.1");
    let case = run(&dir, None).expect("a recording");
    assert!(case.passed(), "{:#?}", case.mismatches);
    assert_eq!(case.matched, 9);
}
