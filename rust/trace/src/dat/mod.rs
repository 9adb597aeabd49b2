//! trace-cmd's `trace.dat`, versions 6 and 7, read directly.
//!
//! **Guarantee.** The events come out typed and in the order of their time stamps, as from the text of `trace-cmd report`; the replay of
//! either is the same. A damaged file is an error with its byte offset: no length that the file claims is
//! allocated before it is checked against what is there. Memory is bounded by the number of CPUs, not by the file.
//!
//! **Mechanism.** The header names the layouts of events (as the traced kernel described them), the threads' names and, per
//! CPU, where its ring-buffer pages are. Each CPU is a stream of records; the streams are merged by time. Fields are
//! found by name once, at the beginning, so that a kernel which moves one is read as well.
//!
//! | file | idea |
//! | --- | --- |
//! | `bytes.rs` | a seekable file with bounds; numbers of either endianness |
//! | `header.rs` | both versions' headers: layouts, names, streams, clock |
//! | `layout.rs` | the description of one event: its fields |
//! | `plan.rs` | from a record to an [`Event`](crate::Event) |
//! | `stream.rs` | one CPU's pages, plain or compressed: records and losses |
//!
//! Sources: the manual pages trace-cmd.dat.v6(5) and trace-cmd.dat.v7(5); where the v7 page and trace-cmd itself differ (the size in a
//! section's header has 8 bytes, a BUFFER option has the page size before the number of CPUs) trace-cmd's files are right.

mod bytes;
mod header;
mod layout;
mod plan;
mod stream;

use crate::error::TraceError;
use crate::event::Event;
use crate::line::Head;
use bytes::Bytes;
use header::Header;
use plan::{Plan, Scratch};
use std::collections::HashMap;
use std::fs::File;
use std::path::Path;
use stream::{Next, Stream};

/// How every trace.dat begins.
pub(crate) const MAGIC: &[u8] = b"\x17\x08\x44tracing";

/// What the reader gives out next.
pub(crate) enum Step<'a> {
    Event(Head<'a>, Event<'a>),
    /// Events were lost on this CPU.
    Lost {
        count: Option<u64>,
        cpu: u32,
    },
    /// An event with a text that breaks its format.
    Bad {
        rule: &'static str,
        offset: u64,
        event: &'a [u8],
    },
}

/// Reader of a trace.dat.
pub(crate) struct DatReader {
    streams: Vec<Stream>,
    plans: HashMap<u16, Plan>,
    names: HashMap<u32, Box<[u8]>>,
    header: Header,
    /// The stream whose record was given out last.
    given: Option<usize>,
    records: u64,
    scratch: Scratch,
    unnamed: Plan,
}

impl DatReader {
    /// Opens a file that begins with [`MAGIC`].
    pub(crate) fn open(path: &Path, file: File) -> Result<Self, TraceError> {
        let mut bytes = Bytes::new(path, file)?;
        let mut header = header::read(&bytes)?;
        bytes.endian = header.ring.endian;
        let plans = std::mem::take(&mut header.layouts).into_iter().map(|l| (l.id, Plan::new(&l))).collect();
        let mut streams = Vec::new();
        for source in &header.sources {
            let mut stream = Stream::open(&bytes, source, &header.ring)?;
            stream.advance()?;
            streams.push(stream);
        }
        Ok(Self {
            streams,
            plans,
            names: std::mem::take(&mut header.names),
            header,
            given: None,
            records: 0,
            scratch: Scratch::default(),
            unnamed: Plan::unknown(),
        })
    }

    /// `trace.dat v6` or `trace.dat v7`.
    pub(crate) fn kind(&self) -> &'static str {
        if self.header.version == 6 { "trace.dat v6" } else { "trace.dat v7" }
    }

    /// Bytes of the file that were read.
    pub(crate) fn bytes(&self) -> u64 {
        self.streams.iter().map(Stream::consumed).sum()
    }

    /// Records given out.
    pub(crate) fn records(&self) -> u64 {
        self.records
    }

    /// The next step, `None` at the end.
    pub(crate) fn next(&mut self) -> Result<Option<Step<'_>>, TraceError> {
        if let Some(given) = self.given.take() {
            self.streams[given].advance()?;
        }
        // Few CPUs: a search is as fast as a heap.
        let next = self.streams.iter().enumerate().filter_map(|(i, s)| Some((s.time()?, i))).min();
        let Some((_, at)) = next else { return Ok(None) };
        self.given = Some(at);
        let stream = &self.streams[at];
        let cpu = stream.cpu();
        let record = match stream.current() {
            Next::Record(record) => record,
            Next::Lost(count) => return Ok(Some(Step::Lost { count, cpu })),
            Next::End => return Ok(None),
        };
        self.records += 1;
        let ring = &self.header.ring;
        let id = ring.number(record.data, 0, 2).unwrap_or(0) as u16;
        let pid = ring.number(record.data, 4, 4).unwrap_or(0) as u32;
        let plan = self.plans.get(&id).unwrap_or(&self.unnamed);
        let comm = match self.names.get(&pid) {
            Some(name) => name,
            None if pid == 0 => b"<idle>".as_slice(),
            None => b"<...>",
        };
        let head = Head {
            comm,
            pid,
            tgid: None,
            cpu,
            flags: b"",
            ns: self.header.clock.ns(record.time),
            event: plan.name(),
            text: b"",
            line: self.records,
        };
        Ok(Some(match plan.event(ring, record.data, &mut self.scratch) {
            Ok(event) => Step::Event(head, event),
            Err(rule) => Step::Bad { rule, offset: record.offset, event: plan.name() },
        }))
    }
}
