//! Bytes in, lines out, in constant memory.
//!
//! A line is at most [`MAX_LINE`] bytes; nothing is ever allocated by a length found in the input. Gzip is recognised
//! by its magic, never by the file's name. What is neither text nor gzip is refused with the reader that fits.

use crate::dat::MAGIC;
use crate::error::TraceError;
use flate2::bufread::MultiGzDecoder;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Longest line that is accepted, in bytes. ftrace itself stops at one page.
pub const MAX_LINE: usize = 1 << 16;
const CHUNK: usize = 1 << 18;
/// Room that reading never fills: the beginning of an overlong line is kept there.
const SPARE: usize = 512;

/// Where a recording comes from.
pub enum Input {
    /// A file, plain or gzip.
    File(PathBuf),
    /// Standard input, plain or gzip.
    Stdin,
    /// An open file that can be read from any place, with a name for messages; the file's position does not matter.
    Open {
        /// The name in messages and in the result's `file`.
        name: String,
        /// The file.
        file: File,
    },
    /// Any reader, with a name for messages.
    Reader {
        /// The name in messages and in the result's `file`.
        name: String,
        /// The bytes, plain or gzip.
        reader: Box<dyn Read + Send>,
    },
}

impl std::fmt::Debug for Input {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "Input({})", self.path().display())
    }
}

impl Input {
    /// The name shown in messages: the path, or `-`.
    pub fn path(&self) -> PathBuf {
        match self {
            Input::File(path) => path.clone(),
            Input::Stdin => PathBuf::from("-"),
            Input::Open { name, .. } | Input::Reader { name, .. } => PathBuf::from(name),
        }
    }
}

/// The lines of a recording, one at a time out of one buffer.
pub(crate) struct Lines {
    path: PathBuf,
    source: Box<dyn Read + Send>,
    gzip: bool,
    buf: Vec<u8>,
    start: usize,
    end: usize,
    eof: bool,
    line: u64,
    offset: u64,
    last: (usize, usize, u64),
}

/// One line: where it is in [`Lines::bytes`].
#[derive(Clone, Copy, Debug)]
pub(crate) struct Span {
    pub(crate) start: usize,
    pub(crate) end: usize,
    /// Longer than [`MAX_LINE`]: only its beginning is here.
    pub(crate) overlong: bool,
}

/// What an input turned out to be.
pub(crate) enum Opened {
    Text(Lines),
    /// It begins as a trace.dat.
    Dat(PathBuf, File),
}

impl Lines {
    pub(crate) fn open(input: Input) -> Result<Opened, TraceError> {
        let path = input.path();
        let io = |source| TraceError::Io { path: path.clone(), source };
        let mut seekable = None;
        let mut raw: Box<dyn Read + Send> = match input {
            Input::File(ref p) => {
                let file = File::open(p).map_err(io)?;
                let kind = file.metadata().map_err(io)?;
                if kind.is_dir() {
                    return Err(io(std::io::Error::from(std::io::ErrorKind::IsADirectory)));
                }
                if kind.is_file() {
                    seekable = Some(file.try_clone().map_err(io)?);
                }
                Box::new(file)
            }
            Input::Open { file, .. } => {
                (&file).seek(SeekFrom::Start(0)).map_err(io)?;
                seekable = Some(file.try_clone().map_err(io)?);
                Box::new(file)
            }
            Input::Stdin => Box::new(std::io::stdin()),
            Input::Reader { reader, .. } => reader,
        };
        let mut head = [0u8; 16];
        let n = read_full(&mut raw, &mut head).map_err(io)?;
        if head[..n].starts_with(MAGIC) {
            let file = match seekable {
                Some(file) => file,
                None => spool(&mut head[..n].chain(raw)).map_err(io)?,
            };
            return Ok(Opened::Dat(path, file));
        }
        refuse_binary(&path, &head[..n])?;
        let gzip = head[..n].starts_with(&[0x1f, 0x8b]);
        let whole = std::io::Cursor::new(head[..n].to_vec()).chain(raw);
        let source: Box<dyn Read + Send> = if gzip {
            Box::new(MultiGzDecoder::new(BufReader::with_capacity(CHUNK, whole)))
        } else {
            Box::new(whole)
        };
        let mut lines = Self {
            path,
            source,
            gzip,
            buf: vec![0; CHUNK + MAX_LINE + SPARE],
            start: 0,
            end: 0,
            eof: false,
            line: 0,
            offset: 0,
            last: (0, 0, 0),
        };
        if gzip {
            lines.fill()?;
            if lines.buf[..lines.end].starts_with(MAGIC) {
                return lines.unpack_dat();
            }
            refuse_binary(&lines.path, &lines.buf[..lines.end.min(16)])?;
        }
        Ok(Opened::Text(lines))
    }

    /// A trace.dat inside gzip: out into a file that can be read from any place.
    fn unpack_dat(mut self) -> Result<Opened, TraceError> {
        let head = self.buf[self.start..self.end].to_vec();
        let offset = head.len() as u64;
        match spool(&mut head.as_slice().chain(&mut self.source)) {
            Ok(file) => Ok(Opened::Dat(self.path, file)),
            Err(e)
                if matches!(
                    e.kind(),
                    std::io::ErrorKind::UnexpectedEof
                        | std::io::ErrorKind::InvalidData
                        | std::io::ErrorKind::InvalidInput
                ) =>
            {
                Err(TraceError::Gzip { path: self.path, line: 0, offset, reason: e.to_string() })
            }
            Err(source) => Err(TraceError::Io { path: self.path, source }),
        }
    }

    pub(crate) fn path(&self) -> &Path {
        &self.path
    }

    /// Lines given out so far.
    pub(crate) fn line(&self) -> u64 {
        self.line
    }

    /// Bytes of (decompressed) text given out so far.
    pub(crate) fn offset(&self) -> u64 {
        self.offset
    }

    /// Offset of the current line's first byte.
    pub(crate) fn line_offset(&self) -> u64 {
        self.last.2
    }

    #[inline]
    pub(crate) fn bytes(&self, span: Span) -> &[u8] {
        &self.buf[span.start..span.end]
    }

    /// The next line without its end, or `None` at the end of the input.
    #[inline]
    pub(crate) fn next(&mut self) -> Result<Option<Span>, TraceError> {
        let mut searched = self.start;
        loop {
            if let Some(at) = memchr::memchr(b'\n', &self.buf[searched..self.end]) {
                return Ok(Some(self.give(searched + at, 1)));
            }
            searched = self.end;
            if self.end - self.start > MAX_LINE {
                return self.overlong();
            }
            if self.eof {
                return Ok((self.start < self.end).then(|| self.give(self.end, 0)));
            }
            let moved = self.start;
            self.fill()?;
            if self.start < moved {
                searched -= moved;
            }
        }
    }

    fn give(&mut self, end: usize, newline: usize) -> Span {
        let start = self.start;
        self.line += 1;
        self.last = (start, end, self.offset);
        self.offset += (end - start + newline) as u64;
        self.start = end + newline;
        let end = if end > start && self.buf[end - 1] == b'\r' { end - 1 } else { end };
        Span { start, end, overlong: end - start > MAX_LINE }
    }

    /// Gives the beginning of a line that does not fit and skips the rest of it.
    fn overlong(&mut self) -> Result<Option<Span>, TraceError> {
        let keep: Vec<u8> = self.buf[self.start..self.start + 256].to_vec();
        self.last = (0, 256, self.offset);
        self.line += 1;
        loop {
            let here = &self.buf[self.start..self.end];
            let newline = memchr::memchr(b'\n', here);
            let used = newline.map_or(here.len(), |at| at + 1);
            self.offset += used as u64;
            self.start += used;
            if newline.is_some() || self.eof {
                break;
            }
            self.fill()?;
        }
        // The head goes where the consumed bytes were: `start` is past it, or the buffer is empty.
        if self.start < 256 {
            let live = self.end - self.start;
            self.buf.copy_within(self.start..self.end, 256);
            (self.start, self.end) = (256, 256 + live);
        }
        self.buf[..256].copy_from_slice(&keep);
        Ok(Some(Span { start: 0, end: 256, overlong: true }))
    }

    fn fill(&mut self) -> Result<(), TraceError> {
        if self.start > 0 {
            self.buf.copy_within(self.start..self.end, 0);
            self.end -= self.start;
            self.start = 0;
        }
        let limit = self.buf.len() - SPARE;
        loop {
            match self.source.read(&mut self.buf[self.end..limit]) {
                Ok(0) => self.eof = true,
                Ok(n) => self.end += n,
                Err(e) if e.kind() == std::io::ErrorKind::Interrupted => continue,
                Err(e) if self.gzip => {
                    return Err(TraceError::Gzip {
                        path: self.path.clone(),
                        line: self.line,
                        offset: self.offset,
                        reason: e.to_string(),
                    });
                }
                Err(source) => return Err(TraceError::Io { path: self.path.clone(), source }),
            }
            return Ok(());
        }
    }
}

/// Reads the first bytes into `head`; are they those of a trace.dat?
pub(crate) fn begins_a_dat(source: &mut dyn Read, head: &mut Vec<u8>) -> std::io::Result<bool> {
    source.take(MAGIC.len() as u64).read_to_end(head)?;
    Ok(head.as_slice() == MAGIC)
}

/// A pipe's bytes in a file without a name, which the host deletes when it is closed.
pub(crate) fn spool(source: &mut dyn Read) -> std::io::Result<File> {
    use std::sync::atomic::{AtomicU64, Ordering};
    static NEXT: AtomicU64 = AtomicU64::new(0);
    let name = format!("tdpmmu-{}-{}.dat", std::process::id(), NEXT.fetch_add(1, Ordering::Relaxed));
    let path = std::env::temp_dir().join(name);
    let mut file = File::options().read(true).write(true).create_new(true).open(&path)?;
    std::fs::remove_file(&path)?;
    std::io::copy(source, &mut file)?;
    Ok(file)
}

fn read_full(source: &mut dyn Read, buf: &mut [u8]) -> std::io::Result<usize> {
    let mut n = 0;
    while n < buf.len() {
        match source.read(&mut buf[n..]) {
            Ok(0) => break,
            Ok(more) => n += more,
            Err(e) if e.kind() == std::io::ErrorKind::Interrupted => {}
            Err(e) => return Err(e),
        }
    }
    Ok(n)
}

fn refuse_binary(path: &Path, head: &[u8]) -> Result<(), TraceError> {
    let known: [(&[u8], &str, &str); 6] = [
        (
            b"PERFILE2",
            "a binary perf.data",
            "run `perf script -F comm,pid,tid,cpu,time,event,trace --ns` and give its output",
        ),
        (b"\xff\xfe", "UTF-16 text", "convert it with `iconv -f UTF-16 -t UTF-8`"),
        (b"\xfe\xff", "UTF-16 text", "convert it with `iconv -f UTF-16 -t UTF-8`"),
        (b"\x28\xb5\x2f\xfd", "zstd-compressed", "decompress it with `zstd -dc FILE` and give the output"),
        (b"\xfd7zXZ", "xz-compressed", "decompress it with `xz -dc FILE` and give the output"),
        (b"BZh", "bzip2-compressed", "decompress it with `bzip2 -dc FILE` and give the output"),
    ];
    for (magic, what, hint) in known {
        if head.starts_with(magic) {
            return Err(TraceError::NotText { path: path.to_path_buf(), what, hint });
        }
    }
    if !head.starts_with(&[0x1f, 0x8b]) && head.contains(&0) {
        return Err(TraceError::NotText {
            path: path.to_path_buf(),
            what: "binary data",
            hint: "give the text of ftrace's `trace` file, `trace-cmd report` or `perf script`",
        });
    }
    Ok(())
}
