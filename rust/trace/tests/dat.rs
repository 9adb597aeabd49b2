//! trace.dat: the replay of a file equals the replay of the text that it was made of, in every version and compression; damage
//! of any kind is a typed error.

mod common;

use common::dat::{Recording, Shape, recording, recording_of};
use common::{Random, all, kernel, lines, shipped};
use std::io::{Cursor, Write};
use std::path::Path;
use tdpmmu_trace::{Input, Replay, ReplayError, ReplayOptions, TraceError, profile_named, replay};

fn bytes(bytes: Vec<u8>) -> Input {
    Input::Reader { name: "test".to_owned(), reader: Box::new(Cursor::new(bytes)) }
}

fn replayed(input: Input, name: &str) -> Result<Replay, ReplayError> {
    let profile = Some(profile_named(name).expect("a known profile"));
    replay(input, &ReplayOptions { profile, check: true, shapes: true, ..Default::default() })
}

/// All of a result that does not speak of the file itself.
fn content(replay: &Replay) -> serde_json::Value {
    let mut value = serde_json::to_value(replay).expect("serialises");
    let object = value.as_object_mut().expect("an object");
    for key in ["file", "input", "lines", "bytes", "bad"] {
        object.remove(key);
    }
    value
}

fn same(recording: &Recording, name: &str, shape: Shape, formats: Option<&Path>) -> Replay {
    let text = replayed(bytes(recording.text.clone().into_bytes()), name).expect("the text replays");
    let dat = recording.dat(shape, formats);
    let binary = replayed(bytes(dat), name).unwrap_or_else(|e| panic!("{shape:?}: {e}"));
    assert_eq!(binary.input, if shape.version == 6 { "trace.dat v6" } else { "trace.dat v7" });
    let (a, b) = (content(&text), content(&binary));
    for (key, value) in a.as_object().expect("an object") {
        assert_eq!(value, &b[key], "{name} {shape:?}: {key}");
    }
    assert_eq!(text.shapes, binary.shapes);
    binary
}

#[test]
fn the_replay_of_a_trace_dat_equals_the_replay_of_its_text() {
    for (n, path) in shipped().into_iter().enumerate() {
        let recording = recording(&path);
        let others = [Shape::V7, Shape::ZLIB, Shape::ZSTD, Shape { big_endian: true, ..Shape::V6 }];
        for shape in [Shape::V6, others[n % others.len()]] {
            let r = same(&recording, &kernel(&path), shape, None);
            assert_eq!((r.checked.mismatch, r.checked.unknown), (0, 0), "{}", path.display());
            assert!(r.transitions > 1000);
        }
    }
}

#[test]
fn every_version_endianness_and_compression_is_read() {
    let path =
        shipped().into_iter().find(|p| p.ends_with("6.1/selftest_smm/trace.txt.gz")).expect("is shipped");
    let recording = recording(&path);
    for shape in [Shape::V6, Shape::V7, Shape::ZLIB, Shape::ZSTD] {
        for big_endian in [false, true] {
            for page in [4096, 65536] {
                same(&recording, "6.1", Shape { big_endian, page, ..shape }, None);
            }
        }
    }
}

#[test]
fn the_kernels_own_descriptions_of_events_are_understood() {
    let formats = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/kvm-traces/formats");
    for path in
        all().into_iter().filter(|p| p.ends_with("k_nx/trace.txt.gz") || p.ends_with("g_roots/trace.txt.gz"))
    {
        let name = kernel(&path);
        let folder = formats.join(name.trim_end_matches("-async"));
        // `ret` of a fast page fault has other values in each kernel; the writer's are those of 6.1.
        if folder.is_dir() && name.starts_with("6.1") && !name.starts_with("6.12") {
            same(&recording(&path), &name, Shape::V7, Some(&folder));
        }
    }
}

#[test]
fn a_loss_in_the_ring_buffer_is_a_loss() {
    let path = &shipped()[0];
    let mut text = lines(path);
    let at = text.len() / 2;
    text.drain(at..at + 500);
    let loss = |cpu: &str| format!("CPU:{cpu} [LOST 500 EVENTS]");
    text.insert(at, loss("0"));
    let r = same(&recording_of(&text), &kernel(path), Shape::V6, None);
    assert_eq!((r.lost, r.losses.len(), r.checked.mismatch), (500, 1, 0));
    assert_eq!((r.losses[0].cpu, r.losses[0].count), (Some(0), Some(500)));
    // Where the kernel had no room for the number, a loss counts as one.
    text[at] = "CPU:0 [LOST EVENTS]".to_owned();
    let r = same(&recording_of(&text), &kernel(path), Shape::V7, None);
    assert_eq!((r.lost, r.losses[0].count, r.checked.mismatch), (1, None, 0));
}

#[test]
fn a_trace_dat_is_read_from_a_file_a_pipe_and_gzip_alike_and_its_kernel_is_told() {
    let path = &shipped()[1];
    let dat = recording(path).dat(Shape::V7, None);
    let file = std::env::temp_dir().join(format!("tdpmmu-dat-test-{}.dat", std::process::id()));
    std::fs::write(&file, &dat).expect("writes");
    let mut gzip = flate2::write::GzEncoder::new(Vec::new(), flate2::Compression::fast());
    gzip.write_all(&dat).expect("into memory");
    let zipped = gzip.finish().expect("into memory");
    let options = ReplayOptions { check: true, ..Default::default() };
    let results: Vec<_> = [Input::File(file.clone()), bytes(dat), bytes(zipped)]
        .into_iter()
        .map(|input| replay(input, &options).expect("replays"))
        .collect();
    std::fs::remove_file(&file).expect("is there");
    for r in &results {
        assert_eq!(
            (r.profile_from, r.kernel.as_str(), r.input),
            ("inferred", kernel(path).as_str(), "trace.dat v7")
        );
        assert_eq!(content(r), content(&results[0]));
    }
}

/// A result, or an error with a place; never a panic, never a mismatch of types.
fn survives(dat: Vec<u8>, what: &str) -> bool {
    match replayed(bytes(dat), "6.1") {
        Ok(_) => true,
        Err(ReplayError::Trace(
            TraceError::Dat { .. }
            | TraceError::Malformed { .. }
            | TraceError::NotText { .. }
            | TraceError::NoKvmEvents { .. }
            | TraceError::Gzip { .. },
        )) => false,
        Err(other) => panic!("{what}: {other}"),
    }
}

fn small() -> Recording {
    let path =
        shipped().into_iter().find(|p| p.ends_with("6.1/selftest_smm/trace.txt.gz")).expect("is shipped");
    recording_of(&lines(&path)[..600])
}

#[test]
fn a_trace_dat_cut_anywhere_is_an_error_with_its_offset() {
    let recording = small();
    for shape in [Shape::V6, Shape::ZLIB, Shape::ZSTD] {
        let dat = recording.dat(shape, None);
        let mut random = Random(7);
        for n in 0..400 {
            // Every length of the header, then any.
            let at = if n < 200 { n } else { random.below(dat.len() - 1) };
            match replayed(bytes(dat[..at].to_vec()), "6.1") {
                Err(ReplayError::Trace(TraceError::Dat { offset, rule, .. })) => {
                    assert!(offset <= dat.len() as u64 && !rule.is_empty(), "{shape:?} cut at {at}");
                }
                Err(ReplayError::Trace(TraceError::Malformed { .. } | TraceError::NotText { .. }))
                    if at < 10 => {}
                Ok(r) if at == 0 => assert_eq!(r.events, 0),
                other => panic!("{shape:?} cut at {at}: {other:?}"),
            }
        }
    }
}

#[test]
fn any_damage_to_a_trace_dat_is_a_result_or_a_typed_error() {
    let recording = small();
    for shape in [Shape::V6, Shape::V7, Shape::ZLIB, Shape::ZSTD, Shape { big_endian: true, ..Shape::V6 }] {
        let dat = recording.dat(shape, None);
        let mut random = Random(u64::from(shape.version) + shape.codec.len() as u64);
        let mut refused = 0;
        for _ in 0..300 {
            let mut damaged = dat.clone();
            for _ in 0..=random.below(4) {
                let at = random.below(damaged.len());
                match random.below(4) {
                    0 => damaged[at] ^= 1 << random.below(8),
                    1 => damaged[at] = 0xff,
                    2 => {
                        let end = (at + random.below(64)).min(damaged.len());
                        damaged.drain(at..end);
                    }
                    _ => {
                        let end = (at + 8).min(damaged.len());
                        damaged[at..end].fill(random.next() as u8);
                    }
                }
            }
            refused += u32::from(!survives(damaged, &format!("{shape:?}")));
        }
        assert!(refused > 0, "{shape:?}: some damage must be seen");
    }
}

#[test]
fn lengths_that_a_file_only_claims_allocate_nothing() {
    let dat = small().dat(Shape::V7, None);
    let mut random = Random(3);
    for _ in 0..300 {
        let mut damaged = dat.clone();
        let at = random.below(2000.min(damaged.len() - 8));
        damaged[at..at + 8].copy_from_slice(&[0xff, 0xff, 0xff, 0x7f, 0xff, 0xff, 0xff, 0x7f]);
        survives(damaged, "a huge length");
    }
}
