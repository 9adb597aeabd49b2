//! The reader: each spelling of a line, the traps of real recordings, and input that is none.

mod common;

use common::{check, check_bytes, lines, shipped};
use std::io::{Cursor, Read, Write};
use tdpmmu_trace::{Event, Input, Item, Mark, ReplayError, ReplayOptions, TraceError, TraceReader, replay};

fn input(bytes: impl Into<Vec<u8>>) -> Input {
    Input::Reader { name: "test".to_owned(), reader: Box::new(Cursor::new(bytes.into())) }
}

/// comm, pid, tgid, cpu, ns of the only event in the text, and its debug form.
fn one(text: &str) -> (String, u32, Option<u32>, u32, u64, String) {
    let mut reader = TraceReader::open(input(text), true).expect("opens");
    let Some(Item::Record(head, event)) = reader.next().expect("a well-formed line") else {
        panic!("no record in {text:?}")
    };
    let comm = String::from_utf8_lossy(head.comm).into_owned();
    (comm, head.pid, head.tgid, head.cpu, head.ns, format!("{event:?}"))
}

const CHANGE: &str = "as id 0 gfn 100005 level 1 old_spte 0 new_spte 103d44e67";

#[test]
fn heads_of_every_recorder_and_every_odd_name_are_read() {
    let cases = [
        (
            "ftrace",
            " qemu-8397    [002] d....  1404.389366: kvm_tdp_mmu_spte_changed: ",
            "qemu",
            8397,
            None,
            2,
            1_404_389_366_000,
        ),
        (
            "four flags",
            " qemu-8397    [002] d..1  1404.389366: kvm_tdp_mmu_spte_changed: ",
            "qemu",
            8397,
            None,
            2,
            1_404_389_366_000,
        ),
        (
            "trace-cmd",
            "qemu-8397  [002]  1404.389366: kvm_tdp_mmu_spte_changed:   ",
            "qemu",
            8397,
            None,
            2,
            1_404_389_366_000,
        ),
        (
            "nanoseconds",
            "qemu-8397  [002]  1404.389366123: kvm_tdp_mmu_spte_changed: ",
            "qemu",
            8397,
            None,
            2,
            1_404_389_366_123,
        ),
        (
            "tgid",
            " CPU 0/KVM-8397 (   8390) [002] d....  1.000001: kvm_tdp_mmu_spte_changed: ",
            "CPU 0/KVM",
            8397,
            Some(8390),
            2,
            1_000_001_000,
        ),
        (
            "no tgid",
            " CPU 0/KVM-8397 (-------) [002] d....  1.000001: kvm_tdp_mmu_spte_changed: ",
            "CPU 0/KVM",
            8397,
            None,
            2,
            1_000_001_000,
        ),
        (
            "perf",
            "CPU 0/KVM  8390/8397  [002]  1404.389366: kvmmmu:kvm_tdp_mmu_spte_changed: ",
            "CPU 0/KVM",
            8397,
            Some(8390),
            2,
            1_404_389_366_000,
        ),
        (
            "perf, pid only",
            "qemu  8397 [002]  1404.389366: kvmmmu:kvm_tdp_mmu_spte_changed: ",
            "qemu",
            8397,
            None,
            2,
            1_404_389_366_000,
        ),
        (
            "dash and dot",
            " kdamond.0-1-50 [000] ...1. 5.457022: kvm_tdp_mmu_spte_changed: ",
            "kdamond.0-1",
            50,
            None,
            0,
            5_457_022_000,
        ),
        (
            "colon",
            " kworker/u4:0-9 [001] ...1. 5.457022: kvm_tdp_mmu_spte_changed: ",
            "kworker/u4:0",
            9,
            None,
            1,
            5_457_022_000,
        ),
        (
            "a bracket",
            " a [001] b-77 [003] ...1. 5.457022: kvm_tdp_mmu_spte_changed: ",
            "a [001] b",
            77,
            None,
            3,
            5_457_022_000,
        ),
        (
            "a raw clock",
            " qemu-1 [000] ..... 123456: kvm_tdp_mmu_spte_changed: ",
            "qemu",
            1,
            None,
            0,
            123_456,
        ),
    ];
    for (name, head, comm, pid, tgid, cpu, ns) in cases {
        let (c, p, t, u, n, event) = one(&format!("{head}{CHANGE}\n"));
        assert_eq!((c.as_str(), p, t, u, n), (comm, pid, tgid, cpu, ns), "{name}");
        assert!(
            event.starts_with("SpteChanged { as_id: 0, gfn: 1048581, level: 1, old: 0,"),
            "{name}: {event}"
        );
    }
}

fn event_of(text: &str) -> String {
    one(&format!(" q-1 [000] ..... 1.000000: {text}\n")).5
}

#[test]
fn every_spelling_of_an_event_is_read() {
    let cases = [
        (
            "kvm_page_fault: vcpu 1 rip 0x10 address 0x0000000000002000 error_code 0x200000006",
            "vcpu: Some(1)",
        ),
        (
            "kvm_page_fault: address 2000 error_code 6",
            "PageFault { vcpu: None, rip: None, address: 8192, error_code: 6 }",
        ),
        ("kvm_mmu_spte_requested: gfn 2 pfn 103cd4 level 1", "access: None"),
        ("kvm_mmu_spte_requested: gfn 2 pfn 103cd4 level 1 access f", "access: Some(15)"),
        (
            "kvm_mmu_get_page: sp gen 0 gfn 0 l4 8-byte q0 direct wux nxe ad root 0 sync new",
            "wide_access: false, root_count: 0 }, created: true",
        ),
        (
            "kvm_mmu_get_page: sp gen 0 gfn 0 l4 8-byte q0 direct rwux nxe ad root 0 sync existing",
            "wide_access: true, root_count: 0 }, created: false",
        ),
        ("kvm_mmu_zap_all_fast: kvm-mmu-valid-gen 1 used_pages 1f", "used_pages: 31"),
        (
            "fast_page_fault: vcpu 0 gva 100200008 error_code P|W|U sptep 0000000070499fa3 old 0x32ac825 new 32ac827 spurious 0 fixed 1",
            "fixed: true",
        ),
        (
            "kvm_unmap_hva_range: mmu notifier unmap range: 0x007f35e4e05000 -- 0x007f35e4e06000",
            "start: 139869449900032",
        ),
        ("kvm_dirty_ring_push: ring 0: dirty 0x1 reset 0x0 slot 1 offset 0x5 (used 1)", "offset: 5, used: 1"),
        ("kvm_smm_transition: vcpu 0: leaving SMM, smbase 0x30000", "entering: false, smbase: 196608"),
        ("kvm_mmu_split_huge_page: gfn 200 spte 10f600ee7 level 2 errno -12", "errno: -12"),
        (
            "iter_start: (tdp_iter_start+0x0/0x50 [kvm]) root=0xff spt=0xfe role=0x3784 refs=1 min_level=3 gfn=0x2",
            "role: 14212, refs: 1 }, min_level: 3, gfn: 2",
        ),
        (
            "zap_root_work_ret: (process_one_work+0x1c7/0x380 <- tdp_mmu_zap_root_work)",
            "Probe(ZapRootWorkRet)",
        ),
        ("print: tracing_mark_write: STAT 3 {\"pages_4k\":0}", "Mark(Stat { number: 3"),
        (
            "kvm_tdp_mmu_spte_changed: [FAILED TO PARSE] gfn=5 old_spte=0 new_spte=0x5a0 level=2 as_id=1",
            "SpteChanged { as_id: 1, gfn: 5, level: 2, old: 0, new: 1440 }",
        ),
        ("sched_switch: prev_comm=a: b", "Other"),
    ];
    for (text, expected) in cases {
        let got = event_of(text);
        assert!(got.contains(expected), "{text}: {got}");
    }
}

#[test]
fn marks_carry_their_json() {
    let text = " t-1 [000] ..... 1.0: tracing_mark_write: OP 7 begin touch {\"vm\":1}\n";
    let mut reader = TraceReader::open(input(text), true).expect("opens");
    let item = reader.next().expect("reads").expect("an item");
    let Item::Record(_, Event::Mark(Mark::Begin { number: 7, kind: b"touch", json: b"{\"vm\":1}" })) = item
    else {
        panic!("{item:?}")
    };
}

#[test]
fn losses_are_given_out_in_their_place() {
    for (text, count, cpu) in [
        ("CPU:3 [LOST 12 EVENTS]\n", Some(12), Some(3)),
        ("CPU:0 [LOST EVENTS]\n", None, Some(0)),
        ("LOST 5 events!\n", Some(5), None),
        ("CPU:0 [7 EVENTS DROPPED]\n", Some(7), Some(0)),
        ("qemu  8390/8397  [002]  1404.389366: PERF_RECORD_LOST lost 21\n", Some(21), Some(2)),
        ("# entries-in-buffer/entries-written: 10/25   #P:2\n", Some(15), None),
    ] {
        let mut reader = TraceReader::open(input(text), true).expect("opens");
        let item = reader.next().expect("reads");
        assert!(matches!(item, Some(Item::Lost(n)) if n == count), "{text}: {item:?}");
        assert_eq!(reader.lost_cpu(), cpu, "{text}");
    }
}

const HEAD: &str = " q-1 [000] ..... 1.000000: kvm_tdp_mmu_spte_changed: ";

#[test]
fn a_malformed_line_is_named_by_its_number_and_rule() {
    for bad in [
        "as id 0 gfn xyz level 1 old_spte 0 new_spte 1",
        "as id 0 gfn 1 level 9 old_spte 0 new_spte 1",
        "as id 0 gfn 1 level 1 old_spte 0 new_spte 10000000000000000",
        "as id 300 gfn 1 level 1 old_spte 0 new_spte 1",
        "as id 0 gfn 1 level 1 old_spte 0",
        "",
    ] {
        let text = format!("{HEAD}{CHANGE}\n{HEAD}{bad}\n");
        match check_bytes(Some("6.1"), text.into_bytes()) {
            Err(ReplayError::Trace(TraceError::Malformed { line, offset, rule, .. })) => {
                assert_eq!((line, offset), (2, (HEAD.len() + CHANGE.len() + 1) as u64), "{bad}");
                assert!(rule.contains("kvm_tdp_mmu_spte_changed"), "{rule}");
            }
            other => panic!("{bad}: {other:?}"),
        }
    }
}

#[test]
fn without_strictness_bad_lines_are_counted_and_the_first_five_reported() {
    let good = format!("{HEAD}{CHANGE}\n").repeat(1000);
    let text = format!("{good}{}", "garbage\n".repeat(7));
    let r = replay(
        input(text),
        &ReplayOptions { profile: tdpmmu_trace::profile_named("6.1").ok(), ..Default::default() },
    );
    let r = r.expect("under 1 % bad lines are tolerated");
    assert_eq!((r.bad_lines, r.bad.len(), r.bad[0].line), (7, 5, 1001));
    let text = format!("{HEAD}{CHANGE}\ngarbage\n");
    let r = replay(
        input(text),
        &ReplayOptions { profile: tdpmmu_trace::profile_named("6.1").ok(), ..Default::default() },
    );
    assert!(
        matches!(r, Err(ReplayError::Trace(TraceError::TooManyBadLines { bad: 1, lines: 2, .. }))),
        "{r:?}"
    );
}

#[test]
fn an_overlong_line_is_refused_and_the_next_one_read() {
    let text = format!("{}\n{HEAD}{CHANGE}\n", "x".repeat(700_000));
    let mut reader = TraceReader::open(input(text.clone()), false).expect("opens");
    assert!(matches!(reader.next(), Ok(Some(Item::Record(head, _))) if head.line == 2));
    let mut strict = TraceReader::open(input(text), true).expect("opens");
    assert!(matches!(strict.next(), Err(TraceError::Malformed { line: 1, .. })));
}

#[test]
fn binary_input_is_refused_with_the_reader_that_fits() {
    for (bytes, hint) in [
        (&b"\x17\x08\x44tracing5\0"[..], "versions 6 and 7"),
        (b"PERFILE2\0\0\0", "perf script"),
        (b"\xff\xfea\0b\0", "iconv"),
        (b"\x28\xb5\x2f\xfd....", "zstd"),
        (b"ab\0cd", "text"),
    ] {
        let error = check_bytes(Some("6.1"), bytes.to_vec()).expect_err("refused");
        assert!(error.to_string().contains(hint), "{error}");
    }
}

#[test]
fn a_recording_without_kvm_events_names_what_was_there() {
    let text = " a-1 [000] ..... 1.0: sched_switch: x\n a-1 [000] ..... 1.0: sched_wakeup: x\n a-1 [000] ..... 1.0: sched_switch: x\n";
    let error = check_bytes(Some("6.1"), text.into()).expect_err("refused").to_string();
    assert!(
        error.contains("0 of 3 lines") && error.contains("sched_switch (2), sched_wakeup (1)"),
        "{error}"
    );
}

#[test]
fn an_empty_recording_has_no_events_and_says_so() {
    let r = check_bytes(Some("6.1"), Vec::new()).expect("an empty input is none");
    assert_eq!((r.events, r.transitions), (0, 0));
    assert!(r.notes[0].contains("no events"), "{:?}", r.notes);
}

#[test]
fn a_missing_file_and_a_folder_are_io_errors_with_the_path() {
    for path in ["/nonexistent/trace.txt", env!("CARGO_MANIFEST_DIR")] {
        let options =
            ReplayOptions { profile: tdpmmu_trace::profile_named("6.1").ok(), ..Default::default() };
        let error = replay(Input::File(path.into()), &options).expect_err("refused");
        assert!(
            matches!(error, ReplayError::Trace(TraceError::Io { .. })) && error.to_string().contains(path),
            "{error}"
        );
    }
}

fn gzip(text: &str) -> Vec<u8> {
    let mut encoder = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::default());
    encoder.write_all(text.as_bytes()).expect("memory");
    encoder.finish().expect("memory")
}

#[test]
fn a_truncated_gzip_is_an_error_at_every_byte_and_never_a_panic() {
    let text = lines(&shipped()[0])[..40].join("\n");
    let whole = gzip(&text);
    for end in 2..whole.len() {
        for (check, strict) in [(true, true), (false, false)] {
            let options = ReplayOptions {
                profile: tdpmmu_trace::profile_named("6.1").ok(),
                check,
                strict,
                ..Default::default()
            };
            let error = replay(input(&whole[..end]), &options).expect_err("truncated");
            assert!(matches!(error, ReplayError::Trace(TraceError::Gzip { .. })), "{end}: {error}");
        }
    }
    assert!(check_bytes(Some("6.1"), whole).is_ok());
}

#[test]
fn text_cut_at_any_byte_is_a_result_or_a_typed_error() {
    let smm = shipped().into_iter().find(|p| p.ends_with("selftest_smm/trace.txt.gz")).expect("shipped");
    let text = lines(&smm)[..160].join("\n").into_bytes();
    for end in 0..text.len() {
        let _ = check_bytes(Some("6.1"), text[..end].to_vec());
    }
}

#[test]
fn any_damage_to_a_recording_is_a_result_or_a_typed_error() {
    let mut random = common::Random(41);
    for path in shipped().into_iter().filter(|p| !p.to_string_lossy().contains("f_concurrent")) {
        let text = lines(&path);
        for _ in 0..6 {
            let mut damaged: Vec<String> = text.clone();
            for _ in 0..40 {
                let (a, b) = (random.below(damaged.len()), random.below(damaged.len()));
                match random.below(4) {
                    0 => damaged.swap(a, b),
                    1 => drop(damaged.remove(a)),
                    2 => damaged.insert(a, text[random.below(text.len())].clone()),
                    _ => {
                        let (name, with) = if damaged[a].contains("old_spte") {
                            ("new_spte", random.next())
                        } else {
                            continue;
                        };
                        damaged[a] = common::with_field(&damaged[a], name, with);
                    }
                }
            }
            if let Ok(r) = check(&common::kernel(&path), &damaged) {
                assert!(r.checked.mismatch > 0, "forty edits of {} go unnoticed", path.display());
            }
        }
    }
}

#[test]
fn a_plain_file_and_its_gzip_give_the_same_result() {
    let path = &shipped()[0];
    let (mut packed, text) = (Vec::new(), lines(path).join("\n"));
    std::fs::File::open(path).and_then(|mut f| f.read_to_end(&mut packed)).expect("readable");
    let (a, b) = (check_bytes(Some("6.1"), packed), check_bytes(Some("6.1"), text.into_bytes()));
    let (a, b) = (a.expect("replays"), b.expect("replays"));
    assert_eq!((a.checked, a.transitions, a.lines), (b.checked, b.transitions, b.lines));
}
