//! Recordings of real KVM replay without a mismatch, whole or in the parts a user may have of them.

mod common;

use common::{all, check, check_bytes, kernel, lines, shipped};
use std::io::Read;
use std::path::Path;
use tdpmmu_trace::{Input, Replay, ReplayOptions, replay};

fn replayed(path: &Path) -> Replay {
    let options = ReplayOptions { check: true, ..Default::default() };
    replay(Input::File(path.to_path_buf()), &options).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn clean(name: &str, r: &Replay) {
    assert_eq!(r.checked.mismatch, 0, "{name}: {:#?}", r.mismatches);
    let c = r.checked;
    let sum = c.same + c.hw_ad + c.fast_pf + c.silent_unfreeze + c.split_child + c.reordered + c.unknown;
    assert_eq!(sum, r.transitions, "{name}: each transition is counted once");
}

/// Everything that a whole recording, with all its events, must show.
fn whole(path: &Path) -> Replay {
    let (r, name) = (replayed(path), path.display().to_string());
    clean(&name, &r);
    assert!(r.transitions > 1000, "{name}: {} transitions", r.transitions);
    assert_eq!((r.checked.unknown, r.lost, r.bad_lines), (0, 0, 0), "{name}");
    assert_eq!(r.kernel, kernel(path), "{name}");
    assert_eq!(r.stat_checks.mismatched, 0, "{name}");
    if r.kernel != "6.1" && r.kernel != "6.1-async" {
        assert_eq!(r.checked.silent_unfreeze, 0, "{name}: only kernels up to 6.9 unfreeze silently");
    }
    r
}

#[test]
fn the_shipped_recordings_replay_without_a_mismatch() {
    let recordings = shipped();
    assert!(recordings.len() >= 6, "tests/data is incomplete: {recordings:?}");
    for path in recordings {
        whole(&path);
    }
}

#[test]
fn all_recordings_replay_without_a_mismatch() {
    for path in all() {
        whole(&path);
    }
}

fn one(case: &str) -> Replay {
    whole(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data").join(case).join("trace.txt.gz"))
}

#[test]
fn racing_vcpus_show_reordered_lines_and_lost_links() {
    let r = one("6.1/f_concurrent");
    assert_eq!(r.checked.reordered, 25, "a known count: entries printed swapped");
    assert!(r.births.unlinked > 0, "tables whose link lost its race");
    assert!(r.checked.hw_ad > 1000, "D, skipped by the race's loser, is set by hardware");
}

#[test]
fn leaf_counts_equal_kvms_own_at_every_quiet_point() {
    for (case, points) in [("6.1/k_nx", 25), ("7.2/g_roots", 47), ("6.12/l_prefault", 15)] {
        let r = one(case);
        assert_eq!((r.stat_checks.matched, r.stat_checks.skipped), (points, 0), "{case}");
    }
}

#[test]
fn zaps_are_listed_by_cause() {
    let causes = |r: &Replay| r.zaps.iter().map(|z| z.cause).collect::<std::collections::BTreeSet<_>>();
    let nx = one("6.1/k_nx");
    assert!(
        causes(&nx).is_superset(&["nx_recovery", "fast_zap", "replace", "teardown"].into()),
        "{:?}",
        causes(&nx)
    );
    let recovered: u64 = nx.zaps.iter().filter(|z| z.cause == "nx_recovery").map(|z| z.tables).sum();
    assert_eq!(recovered, 2);
    let worker = one("6.1-async/i2_teardown_small");
    assert!(causes(&worker).is_superset(&["worker", "teardown"].into()), "{:?}", causes(&worker));
    assert!(worker.zaps.iter().filter(|z| z.cause == "worker").all(|z| z.comm.starts_with("kworker")));
}

#[test]
fn roots_are_told_apart_by_address_and_generation() {
    assert_eq!(one("6.1/selftest_smm").roots, Some(21));
    assert_eq!(one("7.2/g_roots").roots, Some(6));
}

fn is_kernels_own(line: &str) -> bool {
    line.starts_with('#')
        || ["kvm_", "fast_page_fault:", "mark_mmio", "check_mmio"].iter().any(|e| line.contains(e))
}

fn event(line: &str) -> &str {
    line.split_once(": ").and_then(|(_, rest)| rest.split(':').next()).unwrap_or("")
}

#[test]
fn a_recording_without_kprobes_and_marks_replays_without_roots() {
    for path in shipped() {
        let own: Vec<String> =
            lines(&path).into_iter().filter(|l| is_kernels_own(event(l)) || l.starts_with('#')).collect();
        let r = check(&kernel(&path), &own).expect("replays");
        clean(&path.display().to_string(), &r);
        assert_eq!(r.roots, None, "{}", path.display());
    }
}

#[test]
fn a_recording_of_nothing_but_spte_changes_replays() {
    for path in shipped() {
        let own: Vec<String> =
            lines(&path).into_iter().filter(|l| event(l) == "kvm_tdp_mmu_spte_changed").collect();
        let r = check(&kernel(&path), &own).expect("replays");
        clean(&path.display().to_string(), &r);
        assert_eq!((r.roots, r.births.traced), (None, 0), "{}", path.display());
    }
}

#[test]
fn a_recording_that_begins_in_the_middle_knows_what_it_does_not_know() {
    for path in shipped() {
        let text = lines(&path);
        let r = check(&kernel(&path), &text[text.len() / 3..]).expect("replays");
        clean(&path.display().to_string(), &r);
        assert!(r.checked.unknown > 0 || r.notes.is_empty(), "{}", path.display());
    }
}

#[test]
fn after_a_loss_what_is_unknown_is_counted_and_no_mismatch_is_claimed() {
    for path in shipped() {
        let text = lines(&path);
        let at = text.len() / 3;
        let mut cut = text[..at].to_vec();
        cut.push("CPU:0 [LOST 2000 EVENTS]".to_owned());
        cut.extend_from_slice(&text[at + 2000..]);
        let r = check(&kernel(&path), &cut).expect("replays");
        clean(&path.display().to_string(), &r);
        assert_eq!(r.lost, 2000);
        assert!(r.checked.unknown > 0, "{}", path.display());
        assert!(r.notes.iter().any(|n| n.contains("lost")), "{:?}", r.notes);
    }
}

#[test]
fn the_kernel_is_told_from_the_recording_when_no_folder_names_it() {
    for path in shipped() {
        let mut gzip = Vec::new();
        std::fs::File::open(&path)
            .and_then(|mut f| f.read_to_end(&mut gzip))
            .expect("the recording is readable");
        let r = check_bytes(None, gzip).expect("replays");
        assert_eq!(
            (r.kernel.as_str(), r.profile_from),
            (kernel(&path).as_str(), "inferred"),
            "{}",
            path.display()
        );
        assert_eq!(r.checked.mismatch, 0);
    }
}

#[test]
fn the_wrong_kernel_is_found_out() {
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/6.1/k_nx/trace.txt.gz");
    let r = check("7.2", &lines(&path)).expect("replays");
    assert!(r.checked.mismatch > 0);
}

#[test]
fn a_cancelled_replay_says_so() {
    let path = shipped().remove(0);
    let stop = |_bytes: u64| false;
    let options = ReplayOptions { progress: Some(&stop), ..Default::default() };
    let result = replay(Input::File(path), &options);
    assert!(matches!(result, Err(tdpmmu_trace::ReplayError::Cancelled { bytes }) if bytes > 0), "{result:?}");
}
