//! Errors of the reader and of the replay. Each names the place, the text and the rule that was broken.

use std::path::PathBuf;

/// A recording that cannot be read. `path` is `-` for standard input.
#[derive(Debug, thiserror::Error)]
pub enum TraceError {
    /// The file could not be opened or read.
    #[error("{path}: {source}")]
    Io {
        /// The recording.
        path: PathBuf,
        /// What the host said.
        #[source]
        source: std::io::Error,
    },
    /// The bytes are not a text recording; the hint names the reader that fits.
    #[error("{path}: this is {what}, not ftrace text; {hint}")]
    NotText {
        /// The recording.
        path: PathBuf,
        /// What the bytes look like.
        what: &'static str,
        /// How to get text from it.
        hint: &'static str,
    },
    /// A compressed stream ended early or is damaged.
    #[error(
        "{path}: the gzip stream is truncated or damaged after {offset} bytes of text (line {line}): {reason}"
    )]
    Gzip {
        /// The recording.
        path: PathBuf,
        /// Lines read before the damage.
        line: u64,
        /// Bytes of decompressed text before the damage.
        offset: u64,
        /// The decoder's words.
        reason: String,
    },
    /// A trace.dat that is damaged, cut short, or of a kind that can't be read.
    #[error("{path}: damaged trace.dat at byte {offset}: {rule}")]
    Dat {
        /// The recording.
        path: PathBuf,
        /// Byte offset in the file; in a compressed part, where the part begins.
        offset: u64,
        /// What must be there.
        rule: String,
    },
    /// A line that breaks the format. In lenient mode these are counted instead.
    #[error("{path}:{line}: {rule}, got {text:?} (byte {offset})")]
    Malformed {
        /// The recording.
        path: PathBuf,
        /// Line number, from 1.
        line: u64,
        /// Byte offset of the line's start in the (decompressed) text.
        offset: u64,
        /// Byte column in the line, from 0, where the rule broke, when known.
        column: Option<u64>,
        /// The beginning of the line.
        text: String,
        /// The rule that was broken.
        rule: &'static str,
    },
    /// Lines were read, but none is an event of KVM's MMU.
    #[error(
        "{path}: 0 of {lines} lines are kvmmmu events; saw: {saw}. Record with: trace-cmd record -C mono -e kvmmmu -e kvm:kvm_page_fault -e kvm:kvm_unmap_hva_range"
    )]
    NoKvmEvents {
        /// The recording.
        path: PathBuf,
        /// Lines read.
        lines: u64,
        /// The events that were there, most frequent first.
        saw: String,
    },
    /// Lenient mode gave up: 1 % of the lines or more cannot be read.
    #[error("{path}: {bad} of {lines} lines cannot be read (limit: 1 %); the first is line {first}: {rule}")]
    TooManyBadLines {
        /// The recording.
        path: PathBuf,
        /// Lines that could not be read.
        bad: u64,
        /// Lines read.
        lines: u64,
        /// Number of the first bad line.
        first: u64,
        /// The rule which the first bad line broke.
        rule: &'static str,
    },
}

/// A replay that could not be carried out. A mismatch is not an error but a result.
#[derive(Debug, thiserror::Error)]
pub enum ReplayError {
    /// The recording could not be read.
    #[error(transparent)]
    Trace(#[from] TraceError),
    /// The profile's name is not known.
    #[error("unknown kernel profile {name:?}; known: {known}")]
    UnknownProfile {
        /// What was asked for.
        name: String,
        /// The names there are.
        known: String,
    },
    /// No profile was given, and the recording does not tell.
    #[error(
        "{path}: cannot tell the kernel from this recording ({evidence}); name it with --profile ({known})"
    )]
    CannotInfer {
        /// The recording.
        path: PathBuf,
        /// What was seen.
        evidence: String,
        /// The names there are.
        known: String,
    },
    /// No thread of the process asked for changes SPTEs.
    #[error("{path}: nothing of process {asked} is in this recording; there are {seen}")]
    NoSuchVm {
        /// The recording.
        path: PathBuf,
        /// The process asked for.
        asked: u32,
        /// The processes that are there.
        seen: String,
    },
    /// The progress callback asked to stop.
    #[error("cancelled after {bytes} bytes of text")]
    Cancelled {
        /// Bytes of text read so far.
        bytes: u64,
    },
}
