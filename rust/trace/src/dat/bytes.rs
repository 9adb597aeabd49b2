//! A seekable file with bounds, and numbers of either endianness.

use crate::error::TraceError;
use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};
use std::sync::Arc;

/// Order of a number's bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Endian {
    Little,
    Big,
}

impl Endian {
    /// An unsigned number of 1 to 8 bytes.
    #[inline]
    pub(crate) fn number(self, bytes: &[u8]) -> u64 {
        let shift = |value: u64, &b: &u8| value << 8 | u64::from(b);
        match (self, bytes.first_chunk::<8>(), bytes.len()) {
            (Endian::Little, Some(eight), 8) => u64::from_le_bytes(*eight),
            (Endian::Little, ..) => bytes.iter().rev().fold(0, shift),
            (Endian::Big, ..) => bytes.iter().fold(0, shift),
        }
    }
}

/// The file.
#[derive(Clone)]
pub(crate) struct Bytes {
    path: Arc<PathBuf>,
    file: Arc<File>,
    len: u64,
    pub(crate) endian: Endian,
}

impl Bytes {
    pub(crate) fn new(path: &Path, file: File) -> Result<Self, TraceError> {
        let len =
            file.metadata().map_err(|source| TraceError::Io { path: path.to_path_buf(), source })?.len();
        Ok(Self { path: Arc::new(path.to_path_buf()), file: Arc::new(file), len, endian: Endian::Little })
    }

    pub(crate) fn len(&self) -> u64 {
        self.len
    }

    /// The file breaks this rule at this offset.
    pub(crate) fn damaged(&self, offset: u64, rule: impl Into<String>) -> TraceError {
        TraceError::Dat { path: self.path.as_ref().clone(), offset, rule: rule.into() }
    }

    /// All of `buffer`, from `offset` on.
    pub(crate) fn read(&self, offset: u64, buffer: &mut [u8], what: &str) -> Result<(), TraceError> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.len) {
            return Err(self.damaged(
                offset,
                format!("{what}: {} bytes are needed here, and the file ends at {}", buffer.len(), self.len),
            ));
        }
        self.file.read_exact_at(buffer, offset).map_err(|source| match source.kind() {
            io::ErrorKind::UnexpectedEof => self.damaged(offset, format!("{what}: the file ends here")),
            _ => TraceError::Io { path: self.path.as_ref().clone(), source },
        })
    }

    /// `size` bytes from `offset` on, once it is known that the file has them.
    pub(crate) fn take(&self, offset: u64, size: u64, what: &str) -> Result<Vec<u8>, TraceError> {
        if offset.checked_add(size).is_none_or(|end| end > self.len) {
            return Err(self.damaged(
                offset,
                format!("{what}: {size} bytes are needed here, and the file ends at {}", self.len),
            ));
        }
        let mut buffer = vec![0; size as usize];
        self.read(offset, &mut buffer, what)?;
        Ok(buffer)
    }
}

/// A place in the file, or in a section that was decompressed.
pub(crate) struct Cursor<'a> {
    file: &'a Bytes,
    /// The section's bytes, where they are not the file's own.
    section: Option<Vec<u8>>,
    /// In the section, or in the file.
    at: u64,
    /// Offset in the file, for messages.
    origin: u64,
}

impl<'a> Cursor<'a> {
    pub(crate) fn new(file: &'a Bytes, at: u64) -> Self {
        Self { file, section: None, at, origin: 0 }
    }

    pub(crate) fn within(file: &'a Bytes, section: Vec<u8>, origin: u64) -> Self {
        Self { file, section: Some(section), at: 0, origin }
    }

    /// Offset in the file; in a decompressed section, that of its beginning.
    pub(crate) fn offset(&self) -> u64 {
        if self.section.is_some() { self.origin } else { self.at }
    }

    pub(crate) fn error(&self, rule: impl Into<String>) -> TraceError {
        self.file.damaged(self.offset(), rule)
    }

    pub(crate) fn bytes(&mut self, size: u64, what: &str) -> Result<Vec<u8>, TraceError> {
        let taken = match &self.section {
            None => self.file.take(self.at, size, what)?,
            Some(section) => {
                let end = self.at.checked_add(size).filter(|&end| end <= section.len() as u64);
                let Some(end) = end else {
                    return Err(self.error(format!("{what}: the section ends before it")));
                };
                section[self.at as usize..end as usize].to_vec()
            }
        };
        self.at += size;
        Ok(taken)
    }

    pub(crate) fn number(&mut self, size: u64, what: &str) -> Result<u64, TraceError> {
        let endian = self.file.endian;
        Ok(endian.number(&self.bytes(size, what)?))
    }

    /// Bytes up to a NUL, which is consumed.
    pub(crate) fn string(&mut self, most: usize, what: &str) -> Result<Vec<u8>, TraceError> {
        let mut text = Vec::new();
        loop {
            match self.bytes(1, what)?[0] {
                0 => return Ok(text),
                b => text.push(b),
            }
            if text.len() > most {
                return Err(self.error(format!("{what}: a string must be at most {most} bytes long")));
            }
        }
    }

    pub(crate) fn expect(&mut self, text: &[u8], what: &str) -> Result<(), TraceError> {
        let at = self.offset();
        if self.bytes(text.len() as u64, what)? != text {
            return Err(self.file.damaged(at, format!("{what} must stand here")));
        }
        Ok(())
    }
}
