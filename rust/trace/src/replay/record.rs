//! What each thread did, kept for a timeline in the Perfetto UI.
//!
//! Only where it is asked for: it grows with the recording.

use super::report::Replay;
use crate::perfetto::{Counter, Flows, Lane, Name, Process, Span, Thread, Writer};
use std::io;

/// A thread of the recording.
#[derive(Clone, Debug, Default)]
pub struct RecordedThread {
    /// Thread id.
    pub pid: u32,
    /// Thread name.
    pub comm: String,
    /// Its VM's number in `per_vm`, where it served faults of one.
    pub vm: Option<u64>,
    /// Operations, notifier calls, zaps and faults.
    pub spans: Vec<Span>,
}

/// The threads of a recording, in the order in which they first appear.
#[derive(Clone, Debug, Default)]
pub struct Recorded {
    /// Each thread.
    pub threads: Vec<RecordedThread>,
}

impl Recorded {
    pub(crate) fn span(&mut self, thread: usize, begin: u64, end: u64, name: Name, category: &'static str) {
        if self.threads.len() <= thread {
            self.threads.resize_with(thread + 1, RecordedThread::default);
        }
        let span = Span { begin, end: end.max(begin), name, category, flows: Flows::default() };
        self.threads[thread].spans.push(span);
    }
}

/// Writes the replay as a Perfetto trace: a process per VM with its vCPU threads, one for the other threads, and the counters
/// of the timeline. Without [`ReplayOptions::record`](super::ReplayOptions::record) there are zaps and counters only.
///
/// # Errors
/// What `out` says.
pub fn perfetto_of(replay: &Replay, out: impl io::Write) -> io::Result<()> {
    let mut out = io::BufWriter::new(out);
    let mut writer = Writer::new(&mut out);
    writer.process(&counters(replay))?;
    let threads = match &replay.recorded {
        Some(recorded) => recorded.threads.clone(),
        None => from_zaps(replay),
    };
    let of = |vm: Option<u64>| {
        let mine = threads.iter().filter(|t| t.vm == vm && !t.spans.is_empty());
        mine.map(|t| Thread {
            name: format!("{} {}", t.comm, t.pid),
            main: Lane { spans: t.spans.clone(), ..Lane::default() },
            lanes: Vec::new(),
        })
        .collect::<Vec<_>>()
    };
    for vm in &replay.per_vm {
        let name = match (vm.script, vm.tgid) {
            (Some(n), _) => format!("VM {n} ({})", vm.comm),
            (None, Some(tgid)) => format!("VM {} ({} {tgid})", vm.id, vm.comm),
            (None, None) => format!("VM {} ({})", vm.id, vm.comm),
        };
        writer.process(&Process { name, threads: of(Some(vm.id)), counters: Vec::new() })?;
    }
    let others = of(None);
    if !others.is_empty() {
        writer.process(&Process {
            name: "other threads".to_owned(),
            threads: others,
            counters: Vec::new(),
        })?;
    }
    drop(writer);
    io::Write::flush(&mut out)
}

fn counters(replay: &Replay) -> Process {
    let t = &replay.timeline;
    let counter = |name: &str, unit, values: &[u64]| Counter {
        name: name.to_owned(),
        unit,
        points: t.t_ns.iter().copied().zip(values.iter().map(|&v| v as i64)).collect(),
    };
    Process {
        name: format!("{} (KVM {})", replay.file, replay.kernel),
        threads: Vec::new(),
        counters: vec![
            counter("pages of 4 KiB", "pages", &t.pages_4k),
            counter("pages of 2 MiB", "pages", &t.pages_2m),
            counter("pages of 1 GiB", "pages", &t.pages_1g),
            counter("page-table memory", "bytes", &t.table_bytes),
        ],
    }
}

fn from_zaps(replay: &Replay) -> Vec<RecordedThread> {
    let mut threads: Vec<RecordedThread> = Vec::new();
    for zap in &replay.zaps {
        let at = threads.iter().position(|t| t.pid == zap.pid).unwrap_or_else(|| {
            threads.push(RecordedThread {
                pid: zap.pid,
                comm: zap.comm.clone(),
                ..RecordedThread::default()
            });
            threads.len() - 1
        });
        threads[at].spans.push(Span {
            begin: zap.t0_ns,
            end: zap.t0_ns.saturating_add(zap.duration_ns),
            name: zap.refined.into(),
            category: "zap",
            flows: Flows::default(),
        });
    }
    threads
}
