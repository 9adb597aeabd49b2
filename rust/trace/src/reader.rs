//! The streaming reader: one typed record at a time, in constant memory.
//!
//! Guarantee: every line is either given out as a record, known to carry none (comments, foreign text), or accounted
//! for: an error in strict mode, a count and its first five places in lenient mode. A gzip stream that ends early is an
//! error in both. Announced losses ([`Item::Lost`]) are given out in their place, so that a consumer knows from where on it
//! can't trust its state.

use crate::error::TraceError;
use crate::event::Event;
use crate::line::{Head, Parsed, parse};
use crate::parse::parse_event;
use crate::source::{Input, Lines};
use serde::Serialize;

/// How many bad lines are reported in lenient mode.
pub const REPORTED_BAD_LINES: usize = 5;

/// A line that could not be read, as reported in lenient mode.
#[derive(Clone, Debug, Serialize, PartialEq, Eq)]
pub struct BadLine {
    /// Line number, from 1.
    pub line: u64,
    /// Byte offset of the line in the (decompressed) text.
    pub offset: u64,
    /// The beginning of the line.
    pub text: String,
    /// The rule that it breaks.
    pub rule: &'static str,
}

/// What the reader gives out.
#[derive(Clone, Copy, Debug)]
pub enum Item<'a> {
    /// An event.
    Record(Head<'a>, Event<'a>),
    /// Events were lost before this point; how many, where it is said.
    Lost(Option<u64>),
}

/// What the reader has counted.
#[derive(Clone, Debug, Default)]
pub struct ReadStats {
    /// Lines of any kind.
    pub lines: u64,
    /// Bytes of (decompressed) text.
    pub bytes: u64,
    /// Lines that hold an event of any kind.
    pub records: u64,
    /// Events of KVM's MMU, in the sense of [`Event::is_kvm`].
    pub kvm_events: u64,
    /// Lines that could not be read.
    pub bad_lines: u64,
    /// The first few of them.
    pub bad: Vec<BadLine>,
    /// Events announced as lost; a loss without a number counts as one.
    pub lost: u64,
    /// Names of foreign events with their counts; at most 64 names are kept.
    pub foreign: Vec<(String, u64)>,
}

/// Reader of a recording in the text of ftrace, trace-cmd or perf, plain or gzip.
pub struct TraceReader {
    lines: Lines,
    strict: bool,
    stats: ReadStats,
    lost_cpu: Option<u32>,
}

impl TraceReader {
    /// Opens a recording. In strict mode the first malformed line is an error.
    ///
    /// # Errors
    /// [`TraceError::Io`] and [`TraceError::NotText`].
    pub fn open(input: Input, strict: bool) -> Result<Self, TraceError> {
        Ok(Self { lines: Lines::open(input)?, strict, stats: ReadStats::default(), lost_cpu: None })
    }

    /// The next item, `None` at the end.
    ///
    /// # Errors
    /// Any [`TraceError`]; [`TraceError::Malformed`] in strict mode only.
    #[inline]
    #[allow(clippy::should_implement_trait)] // lending: an item borrows the reader's buffer
    pub fn next(&mut self) -> Result<Option<Item<'_>>, TraceError> {
        loop {
            let Some(span) = self.lines.next()? else {
                self.stats.lines = self.lines.line();
                self.stats.bytes = self.lines.offset();
                return Ok(None);
            };
            let bytes: *const [u8] = self.lines.bytes(span);
            // SAFETY: the bytes lie in the buffer that `self.lines` owns. It is written by `Lines::next` alone, which needs
            // `&mut self`: not before the returned item is gone, and in this loop not before `bytes` was last used. (The
            // borrow checker does not accept a loan that is returned on one path of a loop only.)
            let bytes = unsafe { &*bytes };
            if span.overlong {
                self.bad(bytes, "a line must be at most 64 KiB long", None)?;
                continue;
            }
            match parse(bytes) {
                Parsed::Nothing => {}
                Parsed::Lost(count, cpu) => {
                    self.stats.lost += count.unwrap_or(1);
                    self.lost_cpu = cpu;
                    return Ok(Some(Item::Lost(count)));
                }
                Parsed::Bad { rule, column } => self.bad(bytes, rule, column)?,
                Parsed::Event(head) => match parse_event(head.event, head.text) {
                    Err(rule) => {
                        let column = (head.text.as_ptr() as usize).checked_sub(bytes.as_ptr() as usize);
                        self.bad(bytes, rule, column.map(|c| c as u64))?;
                    }
                    Ok(event) => {
                        self.stats.records += 1;
                        if event.is_kvm() {
                            self.stats.kvm_events += 1;
                        } else if matches!(event, Event::Other) {
                            self.foreign(head.event);
                        }
                        return Ok(Some(Item::Record(Head { line: self.lines.line(), ..head }, event)));
                    }
                },
            }
        }
    }

    /// The CPU whose events the last [`Item::Lost`] speaks of, where it says so.
    pub fn lost_cpu(&self) -> Option<u32> {
        self.lost_cpu
    }

    /// What the recording is: `text`, `trace.dat v6`, `trace.dat v7`.
    pub fn kind(&self) -> &'static str {
        "text"
    }

    /// What has been counted so far; lines and bytes are complete at the end.
    pub fn stats(&self) -> &ReadStats {
        &self.stats
    }

    /// Bytes of (decompressed) text read so far.
    pub fn bytes(&self) -> u64 {
        self.lines.offset()
    }

    /// Number of the line that was given out last, from 1.
    pub fn line(&self) -> u64 {
        self.lines.line()
    }

    /// The recording's path, `-` for standard input.
    pub fn path(&self) -> &std::path::Path {
        self.lines.path()
    }

    /// Ends the reading: judges what was counted.
    ///
    /// # Errors
    /// [`TraceError::TooManyBadLines`] at 1 % or more, [`TraceError::NoKvmEvents`] when lines were read and none is KVM's.
    pub fn finish(self) -> Result<ReadStats, TraceError> {
        let mut stats = self.stats;
        stats.lines = self.lines.line();
        stats.bytes = self.lines.offset();
        let path = self.lines.path().to_path_buf();
        if stats.bad_lines > 0 && stats.bad_lines.saturating_mul(100) >= stats.lines {
            let first = stats.bad.first();
            return Err(TraceError::TooManyBadLines {
                path,
                bad: stats.bad_lines,
                lines: stats.lines,
                first: first.map_or(0, |b| b.line),
                rule: first.map_or("", |b| b.rule),
            });
        }
        if stats.records > 0 && stats.kvm_events == 0 {
            stats.foreign.sort_by(|a, b| b.1.cmp(&a.1).then_with(|| a.0.cmp(&b.0)));
            let saw: Vec<String> = stats.foreign.iter().take(5).map(|(n, c)| format!("{n} ({c})")).collect();
            let saw = if saw.is_empty() { "marks only".to_string() } else { saw.join(", ") };
            return Err(TraceError::NoKvmEvents { path, lines: stats.lines, saw });
        }
        Ok(stats)
    }

    #[cold]
    fn bad(&mut self, bytes: &[u8], rule: &'static str, column: Option<u64>) -> Result<(), TraceError> {
        let text = String::from_utf8_lossy(&bytes[..bytes.len().min(160)]).into_owned();
        let (line, offset) = (self.lines.line(), self.lines.line_offset());
        if self.strict {
            return Err(TraceError::Malformed {
                path: self.lines.path().to_path_buf(),
                line,
                offset,
                column,
                text,
                rule,
            });
        }
        self.stats.bad_lines += 1;
        if self.stats.bad.len() < REPORTED_BAD_LINES {
            self.stats.bad.push(BadLine { line, offset, text, rule });
        }
        Ok(())
    }

    fn foreign(&mut self, name: &[u8]) {
        let name = &name[..name.len().min(64)];
        if let Some(entry) = self.stats.foreign.iter_mut().find(|(n, _)| n.as_bytes() == name) {
            entry.1 += 1;
        } else if self.stats.foreign.len() < 64 {
            self.stats.foreign.push((String::from_utf8_lossy(name).into_owned(), 1));
        }
    }
}
