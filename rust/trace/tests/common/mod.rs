//! Shared by the tests: recordings, edited copies of them, a small deterministic generator.
#![allow(dead_code)] // each test binary uses its own part

pub mod dat;

use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};
use tdpmmu_trace::{Input, Replay, ReplayError, ReplayOptions, profile_named, replay};

/// The recordings that are part of the repository.
pub fn shipped() -> Vec<PathBuf> {
    find(&Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/data"))
}

/// All recordings, where the checkout has them beside it; the reason is printed when it has not.
pub fn all() -> Vec<PathBuf> {
    let dir = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../../shared/kvm-traces");
    if !dir.is_dir() {
        eprintln!("skipped: no recordings at ../shared/kvm-traces beside the repository");
    }
    find(&dir)
}

fn find(dir: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let kernels = std::fs::read_dir(dir).into_iter().flatten().flatten();
    for case in kernels.filter_map(|k| std::fs::read_dir(k.path()).ok()).flatten().flatten() {
        let trace = case.path().join("trace.txt.gz");
        if trace.is_file() {
            found.push(trace);
        }
    }
    found.sort();
    found
}

/// The kernel that a recording's folder names.
pub fn kernel(path: &Path) -> String {
    path.ancestors()
        .nth(2)
        .and_then(|p| p.file_name())
        .map(|n| n.to_string_lossy().into_owned())
        .unwrap_or_default()
}

/// The lines of a recording.
pub fn lines(path: &Path) -> Vec<String> {
    let mut text = String::new();
    let file = std::fs::File::open(path).expect("the recording opens");
    flate2::read::MultiGzDecoder::new(file).read_to_string(&mut text).expect("the recording is gzip text");
    text.lines().map(str::to_owned).collect()
}

/// Replays text under a profile.
pub fn check<S: AsRef<str>>(kernel: &str, lines: &[S]) -> Result<Replay, ReplayError> {
    let mut text = String::new();
    for line in lines {
        text.push_str(line.as_ref());
        text.push('\n');
    }
    check_bytes(Some(kernel), text.into_bytes())
}

/// Replays bytes, under a profile or an inferred one.
pub fn check_bytes(kernel: Option<&str>, bytes: Vec<u8>) -> Result<Replay, ReplayError> {
    let profile = kernel.map(|k| profile_named(k).expect("a known profile"));
    let input = Input::Reader { name: "test".to_owned(), reader: Box::new(Cursor::new(bytes)) };
    replay(input, &ReplayOptions { profile, check: true, ..Default::default() })
}

/// SplitMix64.
pub struct Random(pub u64);

impl Random {
    pub fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = self.0;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        z ^ (z >> 31)
    }

    pub fn below(&mut self, n: usize) -> usize {
        (self.next() % n as u64) as usize
    }
}

/// Position and value of `old_spte` or `new_spte` in a line.
pub fn field(line: &str, name: &str) -> (usize, usize, u64) {
    let start = line.find(name).expect("an SPTE change") + name.len() + 1;
    let end = line[start..].find(' ').map_or(line.len(), |n| start + n);
    (start, end, u64::from_str_radix(&line[start..end], 16).expect("hexadecimal"))
}

/// The line with another value in that field.
pub fn with_field(line: &str, name: &str, value: u64) -> String {
    let (start, end, _) = field(line, name);
    format!("{}{value:x}{}", &line[..start], &line[end..])
}
