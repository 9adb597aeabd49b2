//! One CPU's ring-buffer pages, in order: records and losses.
//!
//! A page begins with its first time stamp and how many bytes of it are used; bit 31 of that word says that events were lost
//! before it, bit 30 that their number stands behind the used bytes. A record begins with a word of a 5-bit type and a 27-bit
//! time since the one before: types 1 to 28 are data of that many words, 0 is data with its length in the next word, 29 is
//! padding, 30 a longer time, 31 an absolute one. Compressed files keep the pages in chunks, each compressed by itself.

use super::bytes::{Bytes, Endian};
use super::header::{Codec, Ring, Source};
use crate::error::TraceError;
use std::io::Read;

/// Longest chunk that is decompressed, in bytes.
const MOST_CHUNK: u64 = 256 << 20;
/// Plain pages are read so many bytes at a time.
const BATCH: u64 = 64 << 10;
const LOST: u64 = 1 << 31;
const LOST_STORED: u64 = 1 << 30;
const USED: u64 = (1 << 27) - 1;

/// A record of the ring buffer.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Record<'a> {
    pub(crate) time: u64,
    pub(crate) data: &'a [u8],
    /// Where it is in the file; in a compressed one, where its chunk is.
    pub(crate) offset: u64,
}

/// What a stream has to give.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Next<'a> {
    Record(Record<'a>),
    Lost(Option<u64>),
    End,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// A record at this range of the buffer.
    Record(usize, usize),
    Lost(Option<u64>),
    End,
}

pub(crate) struct Stream {
    file: Bytes,
    cpu: u32,
    ring: Ring,
    codec: Codec,
    /// Next byte of the file, and the end of this CPU's data.
    at: u64,
    end: u64,
    /// Chunks that are still to come, where the data is compressed.
    chunks: u64,
    /// Pages, and where they are from.
    buffer: Vec<u8>,
    origin: u64,
    /// The current page in the buffer.
    page: usize,
    /// Next record in it, and the end of its used bytes.
    next: usize,
    used: usize,
    time: u64,
    state: State,
    /// A page was begun: its loss was told.
    consumed: u64,
}

impl Stream {
    pub(crate) fn open(file: &Bytes, source: &Source, ring: &Ring) -> Result<Self, TraceError> {
        let mut ring = *ring;
        ring.page = source.page;
        let mut stream = Self {
            file: file.clone(),
            cpu: source.cpu,
            ring,
            codec: source.codec,
            at: source.offset,
            end: source.offset.saturating_add(source.size),
            chunks: 0,
            buffer: Vec::new(),
            origin: source.offset,
            page: 0,
            next: 0,
            used: 0,
            time: 0,
            state: State::End,
            consumed: 0,
        };
        if stream.end > file.len() {
            return Err(file.damaged(
                source.offset,
                format!(
                    "CPU {}: {} bytes of data are needed here, and the file ends at {}",
                    source.cpu,
                    source.size,
                    file.len()
                ),
            ));
        }
        if stream.codec != Codec::None && source.size > 0 {
            stream.chunks = stream.word()?;
        }
        Ok(stream)
    }

    pub(crate) fn cpu(&self) -> u32 {
        self.cpu
    }

    /// Bytes of the file that were read.
    pub(crate) fn consumed(&self) -> u64 {
        self.consumed
    }

    /// Time of what comes next; `None` at the end. A loss is as old as what follows it.
    #[inline]
    pub(crate) fn time(&self) -> Option<u64> {
        (self.state != State::End).then_some(self.time)
    }

    #[inline]
    pub(crate) fn current(&self) -> Next<'_> {
        match self.state {
            State::Record(from, to) => {
                let offset = if self.codec == Codec::None { self.origin + from as u64 } else { self.origin };
                Next::Record(Record { time: self.time, data: &self.buffer[from..to], offset })
            }
            State::Lost(count) => Next::Lost(count),
            State::End => Next::End,
        }
    }

    fn word(&mut self) -> Result<u64, TraceError> {
        let mut four = [0; 4];
        self.file.read(self.at, &mut four, "a compressed chunk")?;
        self.at += 4;
        self.consumed += 4;
        Ok(self.file.endian.number(&four))
    }

    /// Goes to the next record or loss.
    pub(crate) fn advance(&mut self) -> Result<(), TraceError> {
        loop {
            if self.next < self.used {
                if self.record()? {
                    return Ok(());
                }
                continue;
            }
            if !self.next_page()? {
                self.state = State::End;
                return Ok(());
            }
            if matches!(self.state, State::Lost(_)) {
                return Ok(());
            }
        }
    }

    fn damaged(&self, at: usize, rule: &str) -> TraceError {
        let offset = if self.codec == Codec::None { self.origin + at as u64 } else { self.origin };
        self.file.damaged(offset, format!("CPU {}: {rule}", self.cpu))
    }

    /// One entry of the page; is it a record?
    fn record(&mut self) -> Result<bool, TraceError> {
        let at = self.next;
        let word = |at: usize| -> Option<u64> {
            self.buffer.get(at..at + 4).filter(|_| at + 4 <= self.used).map(|b| self.file.endian.number(b))
        };
        let Some(head) = word(at) else { return Err(self.damaged(at, "a record ends outside its page")) };
        let (kind, delta) = match self.file.endian {
            Endian::Little => (head & 0x1f, head >> 5),
            Endian::Big => (head >> 27, head & ((1 << 27) - 1)),
        };
        let follows = word(at + 4);
        let need = || follows.ok_or_else(|| self.damaged(at, "a record ends outside its page"));
        let (data, size, step) = match kind {
            1..=28 => (at + 4, kind as usize * 4, 4 + kind as usize * 4),
            0 => {
                let size = need()?;
                if !(4..=self.ring.page).contains(&size) {
                    return Err(self.damaged(at, "the length of a record must be between 4 and a page"));
                }
                let size = size as usize;
                (at + 8, size - 4, 4 + size.next_multiple_of(4))
            }
            29 if delta == 0 => {
                self.next = self.used;
                return Ok(false);
            }
            29 => {
                let size = need()?;
                if size > self.ring.page {
                    return Err(self.damaged(at, "padding must be shorter than a page"));
                }
                self.time = self.time.wrapping_add(delta);
                self.next = at + 4 + (size as usize).max(4);
                return Ok(false);
            }
            30 => {
                self.time = self.time.wrapping_add(delta | need()? << 27);
                self.next = at + 8;
                return Ok(false);
            }
            _ => {
                let low = delta | need()? << 27;
                // An absolute time has 59 bits; those above are the page's.
                self.time = low & ((1 << 59) - 1) | self.time & !((1 << 59) - 1);
                self.next = at + 8;
                return Ok(false);
            }
        };
        if data + size > self.used {
            return Err(self.damaged(at, "a record ends outside its page"));
        }
        self.time = self.time.wrapping_add(delta);
        self.next = at + step;
        self.state = State::Record(data, data + size);
        Ok(true)
    }

    /// The next page; `false` when there is none.
    fn next_page(&mut self) -> Result<bool, TraceError> {
        let size = self.ring.page as usize;
        self.page += size;
        if self.page + size > self.buffer.len() && !self.refill()? {
            return Ok(false);
        }
        let page = &self.buffer[self.page..self.page + size];
        let endian = self.file.endian;
        let commit_at = self.ring.commit.0 as usize;
        let commit = endian.number(&page[commit_at..commit_at + self.ring.commit.1 as usize]);
        let first = endian.number(&page[self.ring.time.0 as usize..][..self.ring.time.1 as usize]);
        let data = self.ring.data as usize;
        let used = (commit & USED) as usize;
        if data + used > size {
            return Err(self.damaged(self.page, "a page says that more of it is used than there is"));
        }
        let stored = commit & LOST_STORED != 0;
        let count = page.get(data + used..data + used + self.ring.commit.1 as usize);
        let count = count.filter(|_| stored).map(|b| endian.number(b));
        self.time = first;
        self.next = self.page + data;
        self.used = self.page + data + used;
        self.state = if commit & LOST != 0 { State::Lost(count) } else { State::Record(0, 0) };
        Ok(true)
    }

    /// More pages in the buffer, from its beginning.
    fn refill(&mut self) -> Result<bool, TraceError> {
        self.page = 0;
        self.origin = self.at;
        match self.codec {
            Codec::None => {
                let left = self.end - self.at;
                let page = self.ring.page;
                let size = left.min((BATCH / page).max(1) * page) / page * page;
                if size == 0 {
                    if left > 0 {
                        return Err(self.damaged(0, "the data ends within a page"));
                    }
                    return Ok(false);
                }
                self.buffer.resize(size as usize, 0);
                self.file.read(self.at, &mut self.buffer, "ring-buffer pages")?;
                self.at += size;
                self.consumed += size;
            }
            codec => {
                if self.chunks == 0 {
                    return Ok(false);
                }
                self.chunks -= 1;
                let (packed, plain) = (self.word()?, self.word()?);
                if plain > MOST_CHUNK || plain == 0 || plain % self.ring.page != 0 {
                    return Err(self.damaged(0, "a chunk must hold whole pages, at most 256 MiB of them"));
                }
                let bytes = self.file.take(self.at, packed, "a compressed chunk")?;
                self.at += packed;
                self.consumed += packed;
                self.buffer = unpack(codec, &bytes, plain)
                    .map_err(|reason| self.damaged(0, &format!("a compressed chunk is damaged: {reason}")))?;
            }
        }
        Ok(true)
    }
}

/// Exactly `size` bytes out of `packed`.
pub(crate) fn unpack(codec: Codec, packed: &[u8], size: u64) -> Result<Vec<u8>, String> {
    // Grown as it is read: a claimed size allocates nothing by itself.
    let mut plain = Vec::new();
    let read = match codec {
        Codec::None => {
            plain.extend_from_slice(packed);
            Ok(())
        }
        Codec::Zlib => {
            flate2::read::ZlibDecoder::new(packed).take(size + 1).read_to_end(&mut plain).map(drop)
        }
        Codec::Zstd => match ruzstd::decoding::StreamingDecoder::new(packed) {
            Ok(decoder) => decoder.take(size + 1).read_to_end(&mut plain).map(drop),
            Err(error) => return Err(error.to_string()),
        },
    };
    read.map_err(|e| e.to_string())?;
    if plain.len() as u64 != size {
        return Err(format!("{size} bytes were promised, {} came", plain.len()));
    }
    Ok(plain)
}
