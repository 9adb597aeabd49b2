//! What a recording comes to: curves, causes, storms, faults, operations, VMs, and the Perfetto trace of it.

mod common;

use common::{all, check, kernel, lines, shipped};
use std::path::Path;
use tdpmmu_trace::perfetto::schema::{Data, EventType};
use tdpmmu_trace::{
    Input, Replay, ReplayOptions, STORM_GAP_NS, STORM_ZAPS, TIMELINE_POINTS, TOP_OPERATIONS, perfetto,
    perfetto_of, replay,
};

fn replayed(path: &Path) -> Replay {
    let options = ReplayOptions { check: true, record: true, shapes: true, ..Default::default() };
    replay(Input::File(path.to_path_buf()), &options).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

fn one(case: &str) -> Replay {
    replayed(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data").join(case).join("trace.txt.gz"))
}

/// What must hold of every summary.
fn consistent(r: &Replay) {
    let t = &r.timeline;
    let name = &r.file;
    assert!(!t.t_ns.is_empty() && t.t_ns.len() <= TIMELINE_POINTS, "{name}");
    assert!(t.t_ns.windows(2).all(|w| w[0] < w[1]), "{name}: time rises");
    let lengths = [&t.pages_4k, &t.pages_2m, &t.pages_1g, &t.tables, &t.table_bytes].map(Vec::len);
    assert!(lengths.iter().all(|&n| n == t.t_ns.len()), "{name}: {lengths:?}");
    assert_eq!(t.tables.last(), Some(&r.tables_at_end), "{name}");
    assert!(t.tables.iter().zip(&t.table_bytes).all(|(n, b)| n * 4096 == *b));
    assert!(t.tables.iter().all(|&n| n <= r.tables_peak), "{name}");
    assert_eq!(t.t_ns.last(), Some(&(r.begin_ns + r.span_ns)), "{name}: to the end");
    let sum = |f: fn(&tdpmmu_trace::CauseSum) -> u64| r.causes.iter().map(f).sum::<u64>();
    assert_eq!(sum(|c| c.zaps), r.zaps.len() as u64, "{name}: every zap has its cause");
    assert_eq!(sum(|c| c.entries), r.zaps.iter().flat_map(|z| z.entries.values()).sum::<u64>());
    assert_eq!(sum(|c| c.leafs), r.zaps.iter().map(|z| z.leafs).sum::<u64>());
    assert!(r.causes.windows(2).all(|w| w[0].total_ns >= w[1].total_ns), "{name}: longest first");
    for z in &r.zaps {
        assert!(z.leafs <= z.entries.values().sum(), "{name}: {z:?}");
        assert_eq!(
            z.vm.is_some(),
            !z.entries.is_empty(),
            "{name}: a zap that removes something has a VM: {z:?}"
        );
    }
    for s in &r.storms {
        assert!(s.zaps >= STORM_ZAPS && s.t1_ns >= s.t0_ns, "{name}: {s:?}");
        let inside =
            r.zaps.iter().filter(|z| z.refined == s.cause && z.t0_ns >= s.t0_ns && z.t0_ns <= s.t1_ns);
        assert_eq!(inside.count() as u64, s.zaps, "{name}: {s:?}");
    }
    assert!(r.storms_total >= r.storms.len() as u64);
    let f = &r.faults;
    assert_eq!(f.read + f.write + f.exec, f.total, "{name}: each fault is of one kind");
    assert!(r.top_operations.len() <= TOP_OPERATIONS);
    assert!(r.top_operations.windows(2).all(|w| w[0].duration_ns >= w[1].duration_ns), "{name}");
    assert_eq!(r.per_vm.iter().map(|v| v.faults).sum::<u64>(), f.total, "{name}: each fault is of one VM");
    let changes: u64 = r.per_vm.iter().map(|v| v.transitions).sum();
    assert_eq!(changes, r.transitions, "{name}: each change is of one VM");
    assert_eq!(r.ambiguous.transitions, 0, "{name}");
    assert_eq!(r.per_vm.iter().map(|v| v.roots).sum::<u64>(), r.roots.unwrap_or(0), "{name}");
}

#[test]
fn every_summary_agrees_with_itself() {
    shipped().iter().chain(&all()).for_each(|path| consistent(&replayed(path)));
}

#[test]
fn the_recordings_vms_are_told_apart_by_their_marks() {
    for path in shipped().iter().filter(|p| p.with_file_name("script.json").exists()) {
        let r = replayed(path);
        let made = lines(path).iter().filter(|l| l.contains(" begin create_vm ")).count();
        let told: Vec<_> = r.per_vm.iter().filter_map(|v| v.script).collect();
        let mut once = told.clone();
        once.dedup();
        assert_eq!(told, once, "{}: each VM once", path.display());
        assert!(told.len() <= made && r.per_vm.iter().all(|v| v.told_by == "marks"), "{}", path.display());
    }
}

#[test]
fn zaps_are_refined_by_what_made_kvm_do_them() {
    let causes = |r: &Replay| r.causes.iter().map(|c| c.cause).collect::<std::collections::BTreeSet<_>>();
    let nx = one("6.1/k_nx");
    assert!(
        causes(&nx)
            .is_superset(&["nx_toggle", "nx_recovery", "memslot_delete", "dirty_log", "teardown"].into())
    );
    let toggles = nx.zaps.iter().filter(|z| z.refined == "nx_toggle");
    assert!(
        toggles.clone().count() > 0 && toggles.clone().all(|z| z.trigger.as_deref() == Some("write_file"))
    );
}

#[test]
fn faults_agree_with_kvms_own_statistics() {
    // KVM's last STAT of the only VM.
    let path = shipped().into_iter().find(|p| p.ends_with("6.1/k_nx/trace.txt.gz")).expect("is shipped");
    let text = lines(&path);
    let stat = text.iter().rev().find_map(|l| l.split_once(": STAT ")).expect("a STAT").1;
    let (_, json) = stat.split_once(' ').expect("a number first");
    let value: serde_json::Value = serde_json::from_str(json).expect("JSON");
    let r = replayed(&path);
    assert_eq!(Some(r.faults.fast_fixed), value["pf_fast"].as_u64());
    // pf_fixed counts the fast ones as well in this kernel; mapped are the slow ones.
    assert_eq!(r.faults.mapped.values().sum::<u64>() + r.faults.fast_fixed, r.faults.total);
}

/// The same recording twice at once, as two VMs: other threads, other addresses.
fn two_vms(path: &Path, tgid: impl Fn(usize) -> Option<u32>) -> Vec<String> {
    let text = lines(path);
    let mut both = Vec::new();
    let shift = |line: &str, which: usize| {
        let mut line = line.to_owned();
        if which == 1 {
            // Kernel addresses of tables and headers, and the physical ones that correspond.
            line = line.replace("0xffff8881", "0xffff8882");
            for key in ["old_spte ", "new_spte ", "pfn ", " spte ", " at ", "old 0x", " new "] {
                line = high(&line, key);
            }
        }
        let open = line.find(" [").unwrap_or(0);
        let (task, rest) = line.split_at(open);
        let (comm, pid) = task.rsplit_once('-').expect("a task");
        let pid: u32 = pid.trim().parse().expect("a pid");
        let tgid = tgid(which).map_or(String::new(), |t| format!(" ({t:7})"));
        format!("{comm}-{}{tgid}{rest}", pid + 1000 * which as u32)
    };
    for line in text.iter().filter(|l| l.contains(" [") && !l.contains("tracing_mark_write")) {
        (0..2).for_each(|which| both.push(shift(line, which)));
    }
    both
}

/// Adds 4 GiB to the frame of a present SPTE, or to a pfn, after this key.
fn high(line: &str, key: &str) -> String {
    let Some(at) = line.find(key).map(|at| at + key.len()) else { return line.to_owned() };
    let end = line[at..].find(|c: char| !c.is_ascii_hexdigit()).map_or(line.len(), |n| at + n);
    let Ok(value) = u64::from_str_radix(&line[at..end], 16) else { return line.to_owned() };
    let moved = match key {
        "pfn " => value + (1 << 20),
        " at " => value + (1 << 32),
        _ if value & 1 << 11 != 0 => value + (1 << 32),
        _ => value,
    };
    format!("{}{moved:x}{}", &line[..at], &line[end..])
}

#[test]
fn two_vms_at_once_are_told_apart_by_process_or_else_by_their_roots() {
    let path = shipped().into_iter().find(|p| p.ends_with("6.1/k_nx/trace.txt.gz")).expect("is shipped");
    let alone =
        check("6.1", &two_vms(&path, |_| None).into_iter().step_by(2).collect::<Vec<_>>()).expect("replays");
    assert_eq!((alone.per_vm.len(), alone.checked.mismatch), (1, 0));
    let cases: [(&str, fn(usize) -> Option<u32>); 3] =
        [("process", |w| Some(70 + w as u32)), ("roots", |_| Some(70)), ("roots", |_| None)];
    for (by, tgid) in cases {
        let r = check("6.1", &two_vms(&path, tgid)).expect("replays");
        assert_eq!(r.checked.mismatch, 0, "{by}: {:#?}", &r.mismatches[..r.mismatches.len().min(2)]);
        assert_eq!(r.per_vm.len(), 2, "{by}: {:?}", r.per_vm);
        for vm in &r.per_vm {
            assert_eq!((vm.transitions, vm.faults), (alone.transitions, alone.faults.total), "{by}");
            assert_eq!((vm.told_by, vm.zaps), (by, alone.zaps.len() as u64), "{by}");
        }
        assert_eq!(r.ambiguous.transitions, 0);
    }
}

#[test]
fn two_vms_whose_roots_no_event_names_are_ambiguous_and_it_says_so() {
    let path = shipped().into_iter().find(|p| p.ends_with("6.1/k_nx/trace.txt.gz")).expect("is shipped");
    let text: Vec<String> =
        two_vms(&path, |_| None).into_iter().filter(|l| l.contains("kvm_tdp_mmu_spte_changed")).collect();
    let r = check("6.1", &text).expect("replays");
    assert!(r.ambiguous.transitions > 0 || r.per_vm.len() < 2);
    if r.ambiguous.transitions > 0 {
        assert!(r.ambiguous.why.as_deref().is_some_and(|w| w.contains("iter_start")), "{:?}", r.ambiguous);
    }
}

#[test]
fn a_storm_is_found_where_the_recording_has_one() {
    let path =
        shipped().into_iter().find(|p| p.ends_with("6.12/l_prefault/trace.txt.gz")).expect("is shipped");
    let r = replayed(&path);
    let storm = r.storms.iter().find(|s| s.cause == "notifier").expect("hundreds of zero pages are replaced");
    assert!(storm.zaps > 100, "{storm:?}");
    let mut starts: Vec<u64> = r.zaps.iter().filter(|z| z.refined == "notifier").map(|z| z.t0_ns).collect();
    starts.retain(|t| (storm.t0_ns..=storm.t1_ns).contains(t));
    starts.sort_unstable();
    assert!(starts.windows(2).all(|w| w[1] - w[0] <= 2 * STORM_GAP_NS));
}

#[test]
fn shapes_are_the_trees_before_the_zaps() {
    for path in shipped() {
        let r = replayed(&path);
        for shape in &r.shapes {
            let zap = &r.zaps[shape.zap];
            let leafs: u64 = shape.roots.iter().map(|s| s.leafs()).sum();
            // Another thread may map more while it runs; what it took was there or came.
            assert!(zap.leafs >= leafs || zap.cause == "teardown", "{}: {leafs} {zap:?}", path.display());
            for root in &shape.roots {
                assert!(root.tables >= 1 && !root.cut && root.unknown == 0, "{}", path.display());
                for run in root.runs.windows(2) {
                    assert!(run[0].gfn < run[1].gfn, "{}: runs in order", path.display());
                }
            }
        }
    }
}

#[test]
fn the_perfetto_trace_has_every_zap_operation_and_count() {
    let r = one("6.1/k_nx");
    let mut bytes = Vec::new();
    perfetto_of(&r, &mut bytes).expect("into memory");
    let trace = perfetto::read(&bytes).expect("a trace");
    let mut names = Vec::new();
    let (mut begins, mut ends, mut counters) = (0, 0, 0);
    for packet in &trace.packet {
        if let Some(interned) = &packet.interned_data {
            names.extend(interned.event_names.iter().filter_map(|n| n.name.clone()));
        }
        let Some(Data::TrackEvent(event)) = &packet.data else { continue };
        match event.r#type {
            Some(t) if t == EventType::SliceBegin as i32 => begins += 1,
            Some(t) if t == EventType::SliceEnd as i32 => ends += 1,
            Some(t) if t == EventType::Counter as i32 => counters += 1,
            _ => {}
        }
    }
    let spans: usize = r.recorded.iter().flat_map(|r| &r.threads).map(|t| t.spans.len()).sum();
    assert_eq!((begins, ends), (spans, spans));
    assert_eq!(counters, 4 * r.timeline.t_ns.len());
    for name in ["nx_toggle", "nx_recovery", "notifier", "fault"] {
        assert!(names.iter().any(|n| n == name), "{name} in {names:?}");
    }
    assert!(names.iter().any(|n| n.ends_with(" touch")), "operations of the test program");
    // Without spans kept: the zaps and the counters.
    let path = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data/6.1/k_nx/trace.txt.gz");
    let plain = replay(Input::File(path.clone()), &ReplayOptions::default()).expect("replays");
    let mut short = Vec::new();
    perfetto_of(&plain, &mut short).expect("into memory");
    assert!(short.len() < bytes.len() && perfetto::read(&short).is_ok());
    assert_eq!(kernel(&path), "6.1");
}
