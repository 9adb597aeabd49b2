//! The streaming reader: one typed record at a time, in constant memory.
//!
//! Guarantee: every line is either given out as a record, known to carry none (comments, foreign text), or accounted
//! for: an error in strict mode, a count and its first five places in lenient mode. A gzip stream that ends early is an
//! error in both. Announced losses ([`Item::Lost`]) are given out in their place, so that a consumer knows from where on it
//! can't trust its state.

use crate::dat::{DatReader, Step};
use crate::error::TraceError;
use crate::event::Event;
use crate::line::{Head, Parsed, parse};
use crate::parse::parse_event;
use crate::source::{Input, Lines, Opened};
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

enum Form {
    Text(Lines),
    Dat(std::path::PathBuf, Box<DatReader>),
}

/// Reader of a recording: the text of ftrace, trace-cmd or perf, or a trace.dat of version 6 or 7; plain or gzip.
pub struct TraceReader {
    form: Form,
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
        let form = match Lines::open(input)? {
            Opened::Text(lines) => Form::Text(lines),
            Opened::Dat(path, file) => {
                let reader = DatReader::open(&path, file)?;
                Form::Dat(path, Box::new(reader))
            }
        };
        Ok(Self { form, strict, stats: ReadStats::default(), lost_cpu: None })
    }

    /// The next item, `None` at the end.
    ///
    /// # Errors
    /// Any [`TraceError`]; [`TraceError::Malformed`] in strict mode only.
    #[inline]
    #[allow(clippy::should_implement_trait)] // lending: an item borrows the reader's buffer
    pub fn next(&mut self) -> Result<Option<Item<'_>>, TraceError> {
        match &mut self.form {
            Form::Text(lines) => next_line(lines, &mut self.stats, self.strict, &mut self.lost_cpu),
            Form::Dat(path, dat) => next_record(path, dat, &mut self.stats, self.strict, &mut self.lost_cpu),
        }
    }

    /// The CPU whose events the last [`Item::Lost`] speaks of, where it says so.
    pub fn lost_cpu(&self) -> Option<u32> {
        self.lost_cpu
    }

    /// What the recording is: `text`, `trace.dat v6`, `trace.dat v7`.
    pub fn kind(&self) -> &'static str {
        match &self.form {
            Form::Text(_) => "text",
            Form::Dat(_, dat) => dat.kind(),
        }
    }

    /// What has been counted so far; lines and bytes are complete at the end.
    pub fn stats(&self) -> &ReadStats {
        &self.stats
    }

    /// Bytes of (decompressed) text read so far; of a trace.dat, bytes of the file.
    pub fn bytes(&self) -> u64 {
        match &self.form {
            Form::Text(lines) => lines.offset(),
            Form::Dat(_, dat) => dat.bytes(),
        }
    }

    /// Number of the line that was given out last, from 1; in a trace.dat, of the record in the order of time.
    pub fn line(&self) -> u64 {
        match &self.form {
            Form::Text(lines) => lines.line(),
            Form::Dat(_, dat) => dat.records(),
        }
    }

    /// The recording's path, `-` for standard input.
    pub fn path(&self) -> &std::path::Path {
        match &self.form {
            Form::Text(lines) => lines.path(),
            Form::Dat(path, _) => path,
        }
    }

    /// Ends the reading: judges what was counted.
    ///
    /// # Errors
    /// [`TraceError::TooManyBadLines`] at 1 % or more, [`TraceError::NoKvmEvents`] when lines were read and none is KVM's.
    pub fn finish(self) -> Result<ReadStats, TraceError> {
        let (lines, bytes, path) = (self.line(), self.bytes(), self.path().to_path_buf());
        let mut stats = self.stats;
        (stats.lines, stats.bytes) = (lines, bytes);
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
}

#[inline]
fn next_line<'a>(
    lines: &'a mut Lines,
    stats: &mut ReadStats,
    strict: bool,
    lost_cpu: &mut Option<u32>,
) -> Result<Option<Item<'a>>, TraceError> {
    loop {
        let Some(span) = lines.next()? else {
            stats.lines = lines.line();
            stats.bytes = lines.offset();
            return Ok(None);
        };
        let bytes: *const [u8] = lines.bytes(span);
        // SAFETY: the bytes lie in the buffer that `lines` owns. It is written by `Lines::next` alone, which needs
        // `&mut lines`: not before the returned item is gone, and in this loop not before `bytes` was last used. (The
        // borrow checker does not accept a loan that is returned on one path of a loop only.)
        let bytes = unsafe { &*bytes };
        if span.overlong {
            bad_line(lines, stats, strict, bytes, "a line must be at most 64 KiB long", None)?;
            continue;
        }
        match parse(bytes) {
            Parsed::Nothing => {}
            Parsed::Lost(count, cpu) => {
                stats.lost += count.unwrap_or(1);
                *lost_cpu = cpu;
                return Ok(Some(Item::Lost(count)));
            }
            Parsed::Bad { rule, column } => bad_line(lines, stats, strict, bytes, rule, column)?,
            Parsed::Event(head) => match parse_event(head.event, head.text) {
                Err(rule) => {
                    let column = (head.text.as_ptr() as usize).checked_sub(bytes.as_ptr() as usize);
                    bad_line(lines, stats, strict, bytes, rule, column.map(|c| c as u64))?;
                }
                Ok(event) => {
                    stats.count(head.event, &event);
                    return Ok(Some(Item::Record(Head { line: lines.line(), ..head }, event)));
                }
            },
        }
    }
}

fn next_record<'a>(
    path: &std::path::Path,
    dat: &'a mut DatReader,
    stats: &mut ReadStats,
    strict: bool,
    lost_cpu: &mut Option<u32>,
) -> Result<Option<Item<'a>>, TraceError> {
    loop {
        let at = dat.records() + 1;
        let step: *mut DatReader = dat;
        // SAFETY: as in `next_line`: what a step borrows is returned, or is not used any more when the loop goes on.
        match unsafe { &mut *step }.next()? {
            None => return Ok(None),
            Some(Step::Lost { count, cpu }) => {
                stats.lost += count.unwrap_or(1);
                *lost_cpu = Some(cpu);
                return Ok(Some(Item::Lost(count)));
            }
            Some(Step::Event(head, event)) => {
                stats.count(head.event, &event);
                return Ok(Some(Item::Record(head, event)));
            }
            Some(Step::Bad { rule, offset, event }) => {
                let text = String::from_utf8_lossy(event).into_owned();
                stats.bad(path, strict, BadLine { line: at, offset, text, rule }, None)?;
            }
        }
    }
}

#[cold]
fn bad_line(
    lines: &Lines,
    stats: &mut ReadStats,
    strict: bool,
    bytes: &[u8],
    rule: &'static str,
    column: Option<u64>,
) -> Result<(), TraceError> {
    let text = String::from_utf8_lossy(&bytes[..bytes.len().min(160)]).into_owned();
    let bad = BadLine { line: lines.line(), offset: lines.line_offset(), text, rule };
    stats.bad(lines.path(), strict, bad, column)
}

impl ReadStats {
    #[inline]
    fn count(&mut self, name: &[u8], event: &Event<'_>) {
        self.records += 1;
        if event.is_kvm() {
            self.kvm_events += 1;
        } else if matches!(event, Event::Other) {
            self.foreign(name);
        }
    }

    /// An error in strict mode, else one more of its kind.
    fn bad(
        &mut self,
        path: &std::path::Path,
        strict: bool,
        bad: BadLine,
        column: Option<u64>,
    ) -> Result<(), TraceError> {
        if strict {
            let BadLine { line, offset, text, rule } = bad;
            let path = path.to_path_buf();
            return Err(TraceError::Malformed { path, line, offset, column, text, rule });
        }
        self.bad_lines += 1;
        if self.bad.len() < REPORTED_BAD_LINES {
            self.bad.push(bad);
        }
        Ok(())
    }

    fn foreign(&mut self, name: &[u8]) {
        let name = &name[..name.len().min(64)];
        if let Some(entry) = self.foreign.iter_mut().find(|(n, _)| n.as_bytes() == name) {
            entry.1 += 1;
        } else if self.foreign.len() < 64 {
            self.foreign.push((String::from_utf8_lossy(name).into_owned(), 1));
        }
    }
}
