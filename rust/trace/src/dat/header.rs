//! The headers of both versions: layouts of events, names of threads, where each CPU's pages are, what the clock counts.
//!
//! Version 6 is one sequence. Version 7 is a list of options, each of which names a section somewhere in the file.

use super::MAGIC;
use super::bytes::{Bytes, Cursor, Endian};
use super::layout::{Layout, field};
use super::stream::unpack;
use crate::error::TraceError;
use std::collections::{HashMap, HashSet};

/// Longest description of an event, and of a name.
const MOST_TEXT: usize = 4096;
/// Most bytes of a decompressed section.
const MOST_SECTION: u64 = 256 << 20;
/// Most CPUs.
const MOST_CPUS: u64 = 1 << 16;
/// Most options sections that are followed.
const MOST_OPTION_SECTIONS: usize = 1024;

/// How sections and chunks are compressed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Codec {
    None,
    Zlib,
    Zstd,
}

/// The layout of a ring-buffer page: offset and size of fields.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Ring {
    pub(crate) page: u64,
    pub(crate) time: (u32, u32),
    pub(crate) commit: (u32, u32),
    pub(crate) data: u32,
    pub(crate) endian: Endian,
}

impl Ring {
    /// A number of a record.
    #[inline]
    pub(crate) fn number(&self, data: &[u8], offset: usize, size: usize) -> Option<u64> {
        data.get(offset..offset + size).map(|b| self.endian.number(b))
    }
}

/// One CPU's data.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Source {
    pub(crate) cpu: u32,
    pub(crate) offset: u64,
    pub(crate) size: u64,
    pub(crate) page: u64,
    pub(crate) codec: Codec,
}

/// From time stamps to nanoseconds.
#[derive(Clone, Copy, Debug, Default)]
pub(crate) struct Clock {
    /// multiplier, shift, offset
    tsc: Option<(u64, u32, u64)>,
    offset: i64,
}

impl Clock {
    #[inline]
    pub(crate) fn ns(&self, time: u64) -> u64 {
        let ns = match self.tsc {
            None => time,
            Some((mult, shift, offset)) => {
                let ns = (u128::from(time) * u128::from(mult)).checked_shr(shift).unwrap_or(0);
                (ns as u64).wrapping_add(offset)
            }
        };
        ns.wrapping_add_signed(self.offset)
    }
}

pub(crate) struct Header {
    pub(crate) version: u8,
    pub(crate) ring: Ring,
    pub(crate) layouts: Vec<Layout>,
    pub(crate) names: HashMap<u32, Box<[u8]>>,
    pub(crate) sources: Vec<Source>,
    pub(crate) clock: Clock,
}

pub(crate) fn read(file: &Bytes) -> Result<Header, TraceError> {
    let mut file = file.clone();
    let mut c = Cursor::new(&file, 0);
    c.expect(MAGIC, "the magic of a trace.dat")?;
    let version = match c.string(8, "the version")?.as_slice() {
        b"6" => 6,
        b"7" => 7,
        other => {
            let other = String::from_utf8_lossy(other).into_owned();
            return Err(c.error(format!("version {other:?}: versions 6 and 7 can be read")));
        }
    };
    let endian = match c.number(1, "the endianness")? {
        0 => Endian::Little,
        1 => Endian::Big,
        n => return Err(c.error(format!("the endianness must be 0 or 1, got {n}"))),
    };
    let at = c.offset();
    file.endian = endian;
    let mut c = Cursor::new(&file, at);
    let long = c.number(1, "the size of a long")?;
    if !matches!(long, 4 | 8) {
        return Err(c.error(format!("the size of a long must be 4 or 8, got {long}")));
    }
    let page = page_size(&mut c)?;
    let ring = Ring { page, time: (0, 8), commit: (8, long as u32), data: 8 + long as u32, endian };
    let header = Header {
        version,
        ring,
        layouts: Vec::new(),
        names: HashMap::new(),
        sources: Vec::new(),
        clock: Clock::default(),
    };
    if version == 6 { version_6(header, &file, c) } else { version_7(header, &file, c) }
}

fn page_size(c: &mut Cursor<'_>) -> Result<u64, TraceError> {
    let page = c.number(4, "the page size")?;
    if !page.is_power_of_two() || !(1 << 9..=1 << 24).contains(&page) {
        return Err(c.error(format!("the page size must be a power of two from 512 to 16 MiB, got {page}")));
    }
    Ok(page)
}

fn version_6<'f>(mut header: Header, file: &'f Bytes, mut c: Cursor<'f>) -> Result<Header, TraceError> {
    header_info(&mut header, &mut c)?;
    ftrace_events(&mut header, &mut c)?;
    event_formats(&mut header, &mut c)?;
    for what in ["kallsyms", "printk formats"] {
        let size = c.number(4, what)?;
        let (at, len) = (c.offset(), file.len());
        if at.checked_add(size).is_none_or(|end| end > len) {
            return Err(c.error(format!("{what}: {size} bytes are needed here, and the file ends at {len}")));
        }
        c = Cursor::new(file, at + size);
    }
    command_lines(&mut header, &mut c)?;
    let cpus = cpu_count(&mut c)?;
    let mut instances = Vec::new();
    let mut kind = c.bytes(10, "the kind of the data")?;
    if kind.starts_with(b"options") {
        loop {
            let id = c.number(2, "an option")?;
            if id == 0 {
                break;
            }
            let size = c.number(4, "an option's size")?;
            let data = c.bytes(size, "an option")?;
            option(&mut header, file, id, &data, &mut instances);
        }
        kind = c.bytes(10, "the kind of the data")?;
    }
    if !kind.starts_with(b"flyrecord") {
        let text = String::from_utf8_lossy(&kind).into_owned();
        return Err(c.error(format!("the data must be a flyrecord, got {text:?} (a latency trace is text)")));
    }
    sources_6(&mut header, &mut c, cpus)?;
    for at in instances {
        let mut c = Cursor::new(file, at);
        if c.bytes(10, "the kind of an instance's data")?.starts_with(b"flyrecord") {
            sources_6(&mut header, &mut c, cpus)?;
        }
    }
    Ok(header)
}

fn cpu_count(c: &mut Cursor<'_>) -> Result<u64, TraceError> {
    let cpus = c.number(4, "the number of CPUs")?;
    if cpus > MOST_CPUS {
        return Err(c.error(format!("there must be at most {MOST_CPUS} CPUs, got {cpus}")));
    }
    Ok(cpus)
}

fn sources_6(header: &mut Header, c: &mut Cursor<'_>, cpus: u64) -> Result<(), TraceError> {
    for cpu in 0..cpus {
        let (offset, size) = (c.number(8, "a CPU's data")?, c.number(8, "a CPU's data")?);
        if size > 0 {
            let page = header.ring.page;
            header.sources.push(Source { cpu: cpu as u32, offset, size, page, codec: Codec::None });
        }
    }
    Ok(())
}

fn number_at(file: &Bytes, data: &[u8], at: usize, size: usize) -> Option<u64> {
    data.get(at..at + size).map(|b| file.endian.number(b))
}

fn ascii_number(data: &[u8]) -> Option<i64> {
    let text = std::str::from_utf8(data).ok()?.trim_end_matches('\0').trim();
    let (negative, digits) = text.strip_prefix('-').map_or((false, text), |t| (true, t));
    let value = match digits.strip_prefix("0x").or_else(|| digits.strip_prefix("0X")) {
        Some(hex) => u64::from_str_radix(hex, 16).ok()? as i64,
        None => digits.parse().ok()?,
    };
    Some(if negative { value.wrapping_neg() } else { value })
}

/// Options that both versions have; the rest says nothing that matters here.
fn option(header: &mut Header, file: &Bytes, id: u64, data: &[u8], instances: &mut Vec<u64>) {
    match id {
        // The time of day at time stamp 0, in us; and an offset in ns.
        1 => {
            if let Some(us) = ascii_number(data) {
                header.clock.offset = header.clock.offset.wrapping_add(us.wrapping_mul(1000));
            }
        }
        3 if header.version == 6 => instances.extend(number_at(file, data, 0, 8)),
        7 => {
            if let Some(ns) = ascii_number(data) {
                header.clock.offset = header.clock.offset.wrapping_add(ns);
            }
        }
        14 => {
            let n = |at, size| number_at(file, data, at, size);
            if let (Some(mult), Some(shift), Some(offset)) = (n(0, 4), n(4, 4), n(8, 8)) {
                header.clock.tsc = Some((mult, shift as u32, offset));
            }
        }
        _ => {}
    }
}

fn version_7(mut header: Header, file: &Bytes, mut c: Cursor<'_>) -> Result<Header, TraceError> {
    let name = c.string(MOST_TEXT, "the compression's name")?;
    let _version = c.string(MOST_TEXT, "the compression's version")?;
    let codec = match name.as_slice() {
        b"none" => Codec::None,
        b"zlib" => Codec::Zlib,
        b"zstd" => Codec::Zstd,
        other => {
            let other = String::from_utf8_lossy(other).into_owned();
            return Err(c.error(format!("compression {other:?}: none, zlib and zstd can be read")));
        }
    };
    let mut next = c.number(8, "the offset of the options")?;
    let mut sections: Vec<(u64, u64)> = Vec::new();
    let mut buffers: Vec<Vec<u8>> = Vec::new();
    let mut seen = HashSet::new();
    while next != 0 {
        if !seen.insert(next) || seen.len() > MOST_OPTION_SECTIONS {
            return Err(file.damaged(next, "the options sections must not lead in a circle"));
        }
        let mut c = section(file, next, 0, codec)?;
        next = loop {
            let (id, size) = (c.number(2, "an option")?, c.number(4, "an option's size")?);
            let data = c.bytes(size, "an option")?;
            match id {
                0 => break number_at(file, &data, 0, 8).unwrap_or(0),
                3 => buffers.push(data),
                16..=18 | 21 => sections.extend(number_at(file, &data, 0, 8).map(|at| (id, at))),
                _ => option(&mut header, file, id, &data, &mut Vec::new()),
            }
        };
    }
    for (id, at) in sections {
        let mut c = section(file, at, id, codec)?;
        match id {
            16 => header_info(&mut header, &mut c)?,
            17 => ftrace_events(&mut header, &mut c)?,
            18 => event_formats(&mut header, &mut c)?,
            _ => command_lines(&mut header, &mut c)?,
        }
    }
    for data in buffers {
        buffer(&mut header, file, data, codec)?;
    }
    Ok(header)
}

/// The section of this kind at this offset, decompressed if it is compressed.
fn section(file: &Bytes, at: u64, id: u64, codec: Codec) -> Result<Cursor<'_>, TraceError> {
    let mut c = Cursor::new(file, at);
    let (got, flags, _description, size) = (
        c.number(2, "a section")?,
        c.number(2, "a section's flags")?,
        c.number(4, "a section's description")?,
        c.number(8, "a section's size")?,
    );
    if got != id {
        return Err(file.damaged(at, format!("a section of kind {id} must stand here, got {got}")));
    }
    if flags & 1 == 0 {
        return Ok(c);
    }
    let (packed, plain) = (c.number(4, "a compressed section")?, c.number(4, "a compressed section")?);
    if plain > MOST_SECTION || packed > size {
        return Err(file.damaged(at, "a compressed section is longer than it can be"));
    }
    let bytes = c.bytes(packed, "a compressed section")?;
    let plain = unpack(codec, &bytes, plain)
        .map_err(|reason| file.damaged(at, format!("a compressed section is damaged: {reason}")))?;
    Ok(Cursor::within(file, plain, at))
}

/// A BUFFER option: one trace instance.
fn buffer(header: &mut Header, file: &Bytes, data: Vec<u8>, codec: Codec) -> Result<(), TraceError> {
    let mut c = Cursor::within(file, data, 0);
    let at = c.number(8, "a buffer's offset")?;
    let _name = c.string(MOST_TEXT, "a buffer's name")?;
    let _clock = c.string(MOST_TEXT, "a buffer's clock")?;
    let page = page_size(&mut c)?;
    let cpus = cpu_count(&mut c)?;
    let mut head = Cursor::new(file, at);
    let (id, flags) = (head.number(2, "a buffer")?, head.number(2, "a buffer")?);
    if id != 3 {
        return Err(file.damaged(at, format!("a section of kind 3 must stand here, got {id}")));
    }
    let codec = if flags & 1 != 0 { codec } else { Codec::None };
    for _ in 0..cpus {
        let cpu = c.number(4, "a CPU's number")? as u32;
        let (offset, size) = (c.number(8, "a CPU's data")?, c.number(8, "a CPU's data")?);
        if size > 0 {
            header.sources.push(Source { cpu, offset, size, page, codec });
        }
    }
    Ok(())
}

fn header_info(header: &mut Header, c: &mut Cursor<'_>) -> Result<(), TraceError> {
    c.expect(b"header_page\0", "header_page")?;
    let size = c.number(8, "header_page")?;
    let page = c.bytes(size, "header_page")?;
    for line in String::from_utf8_lossy(&page).lines() {
        let Some((name, at)) = line.trim().strip_prefix("field:").and_then(field) else { continue };
        match name.as_str() {
            "timestamp" => header.ring.time = (at.offset, at.size),
            "commit" => header.ring.commit = (at.offset, at.size),
            "data" => header.ring.data = at.offset,
            _ => {}
        }
    }
    let fits = |(offset, size): (u32, u32)| size <= 8 && size > 0 && offset + size <= 256;
    if !(fits(header.ring.time) && fits(header.ring.commit) && header.ring.data <= 256) {
        return Err(c.error("header_page must put its fields at the beginning of the page"));
    }
    c.expect(b"header_event\0", "header_event")?;
    let size = c.number(8, "header_event")?;
    c.bytes(size, "header_event").map(drop)
}

fn layout(header: &mut Header, c: &mut Cursor<'_>) -> Result<(), TraceError> {
    let size = c.number(8, "an event's description")?;
    let text = c.bytes(size, "an event's description")?;
    match Layout::parse(&text) {
        Ok(layout) => header.layouts.push(layout),
        Err(rule) => return Err(c.error(rule)),
    }
    Ok(())
}

fn ftrace_events(header: &mut Header, c: &mut Cursor<'_>) -> Result<(), TraceError> {
    let count = c.number(4, "the events of ftrace")?;
    (0..count).try_for_each(|_| layout(header, c))
}

fn event_formats(header: &mut Header, c: &mut Cursor<'_>) -> Result<(), TraceError> {
    let systems = c.number(4, "the systems of events")?;
    for _ in 0..systems {
        let _name = c.string(MOST_TEXT, "a system's name")?;
        let events = c.number(4, "a system's events")?;
        (0..events).try_for_each(|_| layout(header, c))?;
    }
    Ok(())
}

/// `PID NAME` lines.
fn command_lines(header: &mut Header, c: &mut Cursor<'_>) -> Result<(), TraceError> {
    let size = c.number(8, "the threads' names")?;
    let text = c.bytes(size, "the threads' names")?;
    for line in text.split(|&b| b == b'\n' || b == 0) {
        let line = line.trim_ascii_start();
        let Some(space) = line.iter().position(|&b| b == b' ') else { continue };
        let pid = std::str::from_utf8(&line[..space]).ok().and_then(|t| t.parse().ok());
        if let Some(pid) = pid {
            header.names.insert(pid, line[space + 1..].into());
        }
    }
    Ok(())
}
