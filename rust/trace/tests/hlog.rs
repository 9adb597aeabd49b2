//! A log that was written gives the same distributions back.

use std::time::{Duration, UNIX_EPOCH};

use hdrhistogram::{
    Histogram as Hdr,
    serialization::{
        Deserializer,
        interval_log::{IntervalLogIterator, LogEntry},
    },
};
use tdpmmu_platform::Histogram;
use tdpmmu_trace::hlog::{self, Interval};

/// Base64 of the standard alphabet, written for this test: what is read back is what anybody reads.
fn base64(text: &str) -> Vec<u8> {
    let alphabet = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    let (mut bits, mut have, mut bytes) = (0u32, 0, Vec::new());
    for c in text.bytes().filter(|c| *c != b'=') {
        bits = bits << 6 | alphabet.iter().position(|a| *a == c).unwrap() as u32;
        have += 6;
        if have >= 8 {
            have -= 8;
            bytes.push((bits >> have) as u8);
        }
    }
    bytes
}

#[test]
fn a_log_gives_the_distributions_back_under_their_tags() {
    let mut short = Histogram::new();
    for value in [0, 1, 7, 2_047, 1_000_000, 1_000_000, 3_599_999_999_999] {
        short.record(value);
    }
    let empty = Histogram::new();
    let interval = |tag: &str, histogram| Interval {
        tag: tag.to_owned(),
        begin: Duration::from_millis(250),
        length: Duration::from_secs(3),
        histogram,
    };
    let mut bytes = Vec::new();
    let intervals = [interval("sync/4K,2M/access ns", &short), interval("none", &empty)];
    let start = UNIX_EPOCH + Duration::from_millis(1_700_000_000_500);
    hlog::write(&mut bytes, start, "one\ntwo", &intervals).unwrap();
    let text = std::str::from_utf8(&bytes).unwrap();
    let head: Vec<&str> = text.lines().take(5).collect();
    assert_eq!(head[..3], ["#[Histogram log format version 1.3]", "#one", "#two"]);
    assert_eq!(head[3], "#[StartTime: 1700000000.500 (seconds since epoch)]");
    let mut seen = Vec::new();
    for entry in IntervalLogIterator::new(&bytes) {
        if let LogEntry::Interval(interval) = entry.unwrap() {
            let hdr: Hdr<u64> =
                Deserializer::new().deserialize(&mut &*base64(interval.encoded_histogram())).unwrap();
            let counts: Vec<(u64, u64)> =
                hdr.iter_recorded().map(|v| (v.value_iterated_to(), v.count_at_value())).collect();
            assert_eq!(
                (interval.start_timestamp(), interval.duration()),
                (Duration::from_millis(250), Duration::from_secs(3))
            );
            seen.push((interval.tag().unwrap().as_str().to_owned(), counts));
        }
    }
    assert_eq!(seen[0].0, "sync/4K+2M/access_ns");
    assert_eq!(seen[0].1, short.buckets().collect::<Vec<_>>());
    assert_eq!(seen[1], ("none".to_owned(), Vec::new()));
}
