//! Distributions as HdrHistogram logs: format version 1.3, histograms in V2 encoding, deflated.
//!
//! A log is read by HdrHistogram's own tools and libraries in any language. Each distribution is an interval with a tag that names its
//! run and its field; values keep their unit (ns in fields that end in `_ns`), as the field's name says.

use std::{
    io,
    time::{Duration, SystemTime},
};

use hdrhistogram::{
    Histogram as Hdr,
    serialization::{
        V2DeflateSerializer,
        interval_log::{IntervalLogWriterBuilder, IntervalLogWriterError, Tag},
    },
};
use tdpmmu_platform::Histogram;

/// One distribution of a log.
#[derive(Clone, Debug)]
pub struct Interval<'a> {
    /// What it is: run and field. Commas, blanks and line breaks, which the format forbids, become `+`, `_` and `_`.
    pub tag: String,
    /// When its measurement began, since the start of the log.
    pub begin: Duration,
    /// How long it was measured.
    pub length: Duration,
    /// The samples.
    pub histogram: &'a Histogram,
}

/// Writes a log that began at `start`; `about` is a comment on top, of one or more lines.
///
/// # Errors
/// What `out` says; a histogram that cannot be encoded is [`io::ErrorKind::InvalidData`] (none of ours is).
pub fn write(
    out: &mut impl io::Write,
    start: SystemTime,
    about: &str,
    intervals: &[Interval<'_>],
) -> io::Result<()> {
    let mut serializer = V2DeflateSerializer::new();
    let mut builder = IntervalLogWriterBuilder::new();
    builder.add_comment("[Histogram log format version 1.3]");
    for line in about.lines() {
        builder.add_comment(line);
    }
    let mut log =
        builder.with_start_time(start).with_base_time(start).begin_log_with(out, &mut serializer)?;
    for interval in intervals {
        let tag = sanitised(&interval.tag);
        let hdr = rebuilt(interval.histogram)?;
        log.write_histogram(&hdr, interval.begin, interval.length, Tag::new(&tag)).map_err(|error| {
            match error {
                IntervalLogWriterError::IoError(error) => error,
                IntervalLogWriterError::SerializeError(error) => {
                    io::Error::new(io::ErrorKind::InvalidData, error.to_string())
                }
            }
        })?;
    }
    Ok(())
}

fn sanitised(tag: &str) -> String {
    tag.chars()
        .map(|c| match c {
            ',' => '+',
            ' ' | '\n' | '\r' => '_',
            c => c,
        })
        .collect()
}

/// A histogram of the library with the same counts in the same buckets.
fn rebuilt(histogram: &Histogram) -> io::Result<Hdr<u64>> {
    let bad = |error: &dyn std::fmt::Display| io::Error::new(io::ErrorKind::InvalidData, error.to_string());
    let mut hdr =
        Hdr::<u64>::new_with_bounds(1, Histogram::CEILING, Histogram::DIGITS).map_err(|e| bad(&e))?;
    for (value, count) in histogram.buckets() {
        hdr.saturating_record_n(value, count);
    }
    Ok(hdr)
}
