//! The head of a line: who, where, when, and which event.
//!
//! ```text
//! ftrace      CPU 0/KVM-8397  (   8390) [002] d....  1404.389366: kvm_entry: vcpu 1
//! trace-cmd   qemu-8397       [002]  1404.389366: kvm_entry:            vcpu 1
//! perf        CPU 0/KVM 8390/8397  [002]  1404.389366: kvm:kvm_entry: vcpu 1
//! ```
//!
//! The comm may hold anything, `-`, `:`, spaces and even ` [001] `, so the line is anchored at the first bracketed CPU
//! number that has a task before it *and* a time stamp after it.

use crate::bytes::Cursor;

/// Head of an event's line; borrows from the reader's buffer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Head<'a> {
    /// The task's name.
    pub comm: &'a [u8],
    /// Thread id.
    pub pid: u32,
    /// Thread-group id, where the recording has one.
    pub tgid: Option<u32>,
    /// CPU number.
    pub cpu: u32,
    /// ftrace's latency flags, empty when not printed.
    pub flags: &'a [u8],
    /// Time stamp in nanoseconds of the recording's clock.
    pub ns: u64,
    /// Event name without its system.
    pub event: &'a [u8],
    /// What follows `event: `.
    pub text: &'a [u8],
    /// Line number, from 1; 0 where the line does not come from a reader.
    pub line: u64,
}

/// What a line is.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Parsed<'a> {
    Event(Head<'a>),
    /// Events were lost here; the count and the CPU, where they are printed.
    Lost(Option<u64>, Option<u32>),
    /// A comment, a header or a blank line.
    Nothing,
    Bad {
        rule: &'static str,
        column: Option<u64>,
    },
}

pub(crate) fn parse(line: &[u8]) -> Parsed<'_> {
    let trimmed = line.trim_ascii_start();
    match trimmed.first() {
        None => return Parsed::Nothing,
        Some(b'#') => return comment(trimmed),
        _ => {}
    }
    if let Some(head) = event(line) {
        // perf's own record of a loss, as `perf script --show-lost-events` prints it.
        if head.event.is_empty()
            && let Some(count) = head.text.strip_prefix(b"PERF_RECORD_LOST lost ")
        {
            return Parsed::Lost(Cursor::new(count).dec(), Some(head.cpu));
        }
        return Parsed::Event(head);
    }
    if let Some(lost) = lost(trimmed) {
        return lost;
    }
    if trimmed.starts_with(b"cpus=")
        || trimmed.starts_with(b"version = ")
        || trimmed.starts_with(b"trace.dat")
    {
        return Parsed::Nothing;
    }
    if memchr::memchr(0, line).is_some() {
        return Parsed::Bad {
            rule: "a line must be text, without NUL bytes",
            column: memchr::memchr(0, line).map(|at| at as u64),
        };
    }
    Parsed::Bad { rule: "a line must be `comm-pid [cpu] time: event: text`", column: None }
}

fn comment(line: &[u8]) -> Parsed<'_> {
    // ftrace says in its header when the ring buffer was overrun: entries-in-buffer/entries-written: 10/20
    if let Some(rest) = line.strip_prefix(b"# entries-in-buffer/entries-written: ") {
        let mut c = Cursor::new(rest);
        if let (Some(kept), Some(()), Some(written)) = (c.dec(), c.lit(b"/"), c.dec())
            && written > kept
        {
            return Parsed::Lost(Some(written - kept), None);
        }
    }
    Parsed::Nothing
}

/// `CPU:3 [LOST 12 EVENTS]`, `CPU 3 is empty`, `LOST 12 events`, trace-cmd's `CPU:0 [12 EVENTS DROPPED]`.
fn lost(line: &[u8]) -> Option<Parsed<'_>> {
    let find = |needle: &[u8]| memchr::memmem::find(line, needle);
    if line.starts_with(b"CPU")
        || line.starts_with(b"LOST ")
        || line.starts_with(b"[LOST ")
        || line.starts_with(b"Processed ")
    {
        let cpu = line.strip_prefix(b"CPU").and_then(|rest| {
            let mut c = Cursor::new(rest);
            let _ = c.eat(b":") || c.eat(b" ");
            c.dec().and_then(|n| u32::try_from(n).ok())
        });
        if let Some(at) = find(b"LOST ") {
            return Some(Parsed::Lost(Cursor::new(&line[at + 5..]).dec(), cpu));
        }
        if let Some(at) = find(b"EVENTS DROPPED") {
            let digits = line[..at].trim_ascii_end();
            let start = digits.iter().rposition(|b| !b.is_ascii_digit()).map_or(0, |p| p + 1);
            return Some(Parsed::Lost(Cursor::new(&digits[start..]).dec(), cpu));
        }
        if line.ends_with(b" is empty") {
            return Some(Parsed::Nothing);
        }
    }
    None
}

fn event(line: &[u8]) -> Option<Head<'_>> {
    for open in memchr::memchr_iter(b'[', line) {
        if open == 0 || !matches!(line[open - 1], b' ' | b'\t') {
            continue;
        }
        let mut c = Cursor::new(&line[open + 1..]);
        let Some(cpu) = c.dec().and_then(|v| u32::try_from(v).ok()) else { continue };
        if c.lit(b"]").is_none() {
            continue;
        }
        let Some((flags, ns, rest)) = time(c.rest()) else { continue };
        let Some((comm, pid, tgid)) = task(&line[..open]) else { continue };
        let (event, text) = name(rest)?;
        return Some(Head { comm, pid, tgid, cpu, flags, ns, event, text, line: 0 });
    }
    None
}

/// After the CPU: optional flags, the stamp, its colon.
fn time(rest: &[u8]) -> Option<(&[u8], u64, &[u8])> {
    let mut c = Cursor::new(rest);
    c.skip_spaces();
    let mut flags: &[u8] = b"";
    let mut probe = c;
    match stamp(&mut probe) {
        Some(ns) => Some((flags, ns, probe.rest())),
        None => {
            flags = c.word();
            if flags.is_empty() || flags.len() > 12 {
                return None;
            }
            c.skip_spaces();
            let ns = stamp(&mut c)?;
            Some((flags, ns, c.rest()))
        }
    }
}

/// `seconds.fraction:` with 1 to 9 digits of fraction, or a raw counter `ticks:`.
fn stamp(c: &mut Cursor<'_>) -> Option<u64> {
    let whole = c.dec()?;
    if c.eat(b":") {
        return Some(whole);
    }
    c.lit(b".")?;
    let before = c.rest().len();
    let fraction = c.dec()?;
    let digits = before - c.rest().len();
    if digits > 9 {
        return None;
    }
    c.lit(b":")?;
    let scale = 10u64.pow(9 - digits as u32);
    whole.checked_mul(1_000_000_000)?.checked_add(fraction * scale)
}

/// Before the CPU: `comm-pid`, optional `(tgid)`; or perf's `comm pid` and `comm pid/tid`.
fn task(head: &[u8]) -> Option<(&[u8], u32, Option<u32>)> {
    let mut head = head.trim_ascii_end();
    let mut tgid = None;
    if let Some(open) =
        head.strip_suffix(b")").and_then(|h| h.iter().rposition(|&b| b == b'(').map(|at| (h, at)))
    {
        let inner = open.0[open.1 + 1..].trim_ascii();
        if inner.iter().all(|&b| b == b'-') && !inner.is_empty() {
            head = head[..open.1].trim_ascii_end();
        } else if let Some(id) = whole_number(inner) {
            tgid = Some(id);
            head = head[..open.1].trim_ascii_end();
        }
    }
    let digits = head.iter().rposition(|b| !b.is_ascii_digit()).map(|p| p + 1)?;
    let pid = whole_number(&head[digits..])?;
    match head[digits - 1] {
        b'-' => {
            let comm = head[..digits - 1].trim_ascii_start();
            (!comm.is_empty()).then_some((comm, pid, tgid))
        }
        b'/' => {
            let process = &head[..digits - 1];
            let start = process.iter().rposition(|b| !b.is_ascii_digit()).map(|p| p + 1)?;
            let tgid = whole_number(&process[start..])?;
            let comm = process[..start].trim_ascii();
            Some((comm, pid, Some(tgid)))
        }
        b' ' | b'\t' => {
            let comm = head[..digits].trim_ascii();
            (!comm.is_empty()).then_some((comm, pid, None))
        }
        _ => None,
    }
}

fn whole_number(digits: &[u8]) -> Option<u32> {
    let mut c = Cursor::new(digits);
    let value = c.dec()?;
    if !c.rest().is_empty() {
        return None;
    }
    u32::try_from(value).ok()
}

/// ` event: text` or perf's ` system:event: text`. Without a colon the whole rest is the name of something else.
fn name(rest: &[u8]) -> Option<(&[u8], &[u8])> {
    let rest = rest.trim_ascii_start();
    if rest.is_empty() {
        return None;
    }
    let Some(colon) = memchr::memchr(b':', rest) else {
        return Some((b"", rest));
    };
    let (first, after) = (&rest[..colon], &rest[colon + 1..]);
    if first.contains(&b' ') {
        return Some((b"", rest));
    }
    if let Some(&b) = after.first()
        && (b.is_ascii_alphabetic() || b == b'_')
        && let Some(second) = memchr::memchr(b':', after)
    {
        let name = &after[..second];
        if name.iter().all(|b| b.is_ascii_alphanumeric() || *b == b'_') {
            return Some((name, after[second + 1..].trim_ascii_start()));
        }
    }
    Some((first, after.trim_ascii_start()))
}
