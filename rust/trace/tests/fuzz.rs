//! Any bytes at all: a result or a typed error that says where, never a panic, whatever the form of the input.

mod common;

use common::dat::{Shape, recording_of};
use common::{lines, shipped};
use proptest::prelude::*;
use std::io::Cursor;
use std::sync::OnceLock;
use tdpmmu_trace::{Input, ReplayError, ReplayOptions, TraceError, TraceReader, profile_named, replay};

fn input(bytes: &[u8]) -> Input {
    Input::Reader { name: "fuzz".to_owned(), reader: Box::new(Cursor::new(bytes.to_vec())) }
}

/// Replays strictly and leniently, with everything on that can be.
fn survives(bytes: &[u8], kernel: &str) {
    for check in [true, false] {
        let profile = Some(profile_named(kernel).expect("a known profile"));
        let options = ReplayOptions { profile, check, record: true, shapes: true, ..Default::default() };
        match replay(input(bytes), &options) {
            Ok(r) => {
                assert!(serde_json::to_string(&r).is_ok());
                tdpmmu_trace::perfetto_of(&r, std::io::sink()).expect("into nothing");
            }
            Err(ReplayError::Trace(TraceError::Malformed { line, rule, .. })) => {
                assert!(line > 0 && !rule.is_empty())
            }
            Err(ReplayError::Trace(TraceError::Dat { offset, rule, .. })) => {
                assert!(!rule.is_empty(), "at {offset}");
            }
            Err(ReplayError::Trace(_)) => {}
            Err(other) => panic!("{other}"),
        }
    }
}

fn known() -> &'static Vec<String> {
    static LINES: OnceLock<Vec<String>> = OnceLock::new();
    LINES.get_or_init(|| {
        // Each kind of event a few times.
        let mut kinds = std::collections::BTreeMap::<String, u32>::new();
        let mut kept = Vec::new();
        for line in shipped().iter().flat_map(|p| lines(p)) {
            let kind = line.split(": ").nth(1).unwrap_or("").to_owned();
            let n = kinds.entry(kind).or_default();
            *n += 1;
            if *n <= 12 {
                kept.push(line);
            }
        }
        kept
    })
}

fn dat() -> &'static Vec<u8> {
    static DAT: OnceLock<Vec<u8>> = OnceLock::new();
    DAT.get_or_init(|| {
        let path =
            shipped().into_iter().find(|p| p.ends_with("6.1/selftest_smm/trace.txt.gz")).expect("is shipped");
        recording_of(&lines(&path)[..120]).dat(Shape::V7, None)
    })
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 256, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn any_bytes(bytes in proptest::collection::vec(any::<u8>(), 0..4096)) {
        survives(&bytes, "6.1");
    }

    #[test]
    fn any_bytes_behind_the_magic_of_a_trace_dat(version in "[5-8]", bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
        let mut dat = b"\x17\x08\x44tracing".to_vec();
        dat.extend_from_slice(version.as_bytes());
        dat.push(0);
        dat.extend_from_slice(&bytes);
        survives(&dat, "6.12");
    }

    #[test]
    fn any_order_of_well_formed_lines(order in proptest::collection::vec(any::<prop::sample::Index>(), 0..300), kernel in prop::sample::select(vec!["6.1", "6.12", "7.2", "5.15"])) {
        let text: Vec<&str> = order.iter().map(|i| i.get(known()).as_str()).collect();
        survives(text.join("\n").as_bytes(), kernel);
    }

    #[test]
    fn any_edit_of_well_formed_lines(
        picks in proptest::collection::vec((any::<prop::sample::Index>(), any::<prop::sample::Index>(), any::<u8>(), 0u8..4), 1..40),
    ) {
        let mut text = Vec::new();
        for (line, at, byte, how) in picks {
            let mut line = line.get(known()).clone().into_bytes();
            let at = at.index(line.len().max(1)).min(line.len().saturating_sub(1));
            match how {
                0 => line[at] = byte,
                1 => line.insert(at, byte),
                2 => line.truncate(at),
                _ => drop(line.remove(at)),
            }
            text.extend_from_slice(&line);
            text.push(b'\n');
        }
        survives(&text, "6.1");
    }

    #[test]
    fn any_edits_of_a_trace_dat(edits in proptest::collection::vec((any::<prop::sample::Index>(), any::<u64>(), 0u8..3), 1..6)) {
        let mut bytes = dat().clone();
        for (at, value, how) in edits {
            let at = at.index(bytes.len());
            match how {
                0 => bytes[at] = value as u8,
                1 => {
                    let end = (at + 8).min(bytes.len());
                    bytes[at..end].copy_from_slice(&value.to_le_bytes()[..end - at]);
                }
                _ => bytes.truncate(at.max(1)),
            }
        }
        survives(&bytes, "6.1");
    }

    #[test]
    fn a_reader_that_is_only_read_survives_too(bytes in proptest::collection::vec(any::<u8>(), 0..2048)) {
        if let Ok(mut reader) = TraceReader::open(input(&bytes), false) {
            while let Ok(Some(_)) = reader.next() {}
            let _ = reader.finish();
        }
    }
}
